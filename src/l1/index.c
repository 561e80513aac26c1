#include "l1/index.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/macros.h"

/*
 * The home bucket of a hash is named by its topmost bits, so that buckets are in the order of hashes for any size of
 * table (index_collect() relies on it). An entry whose home is full goes into the next bucket with room; each full
 * bucket on its way counts it as overflowed, which tells a lookup how far it has to go.
 * Bits of the hash: lowest 8 the shard (l1.c), next 8 the tag, the highest the bucket.
 */
#define BUCKET_SLOTS    7
#define OVERFLOW_SHIFT  56
#define OVERFLOW_STICKY 255u /* has been that many: no longer counted down */
#define LOG2_MASK       63u

/* Grows at 5.5 entries a bucket of 7 (then 23.3 bytes an entry), shrinks at 1. */
#define GROW_AT(n_buckets)   ((n_buckets)*11 / 2)
#define SHRINK_AT(n_buckets) (n_buckets)

struct bucket {
    _Alignas(64) _Atomic uint64_t tags; /* byte i: tag of slot i, 0: empty; byte 7: overflow count */
    _Atomic(struct l1_entry *) slots[BUCKET_SLOTS];
};

static inline struct bucket *buckets_of(uintptr_t table)
{
    return (struct bucket *)(table & ~(uintptr_t)LOG2_MASK);
}

static inline unsigned log2_of(uintptr_t table)
{
    return (unsigned)(table & LOG2_MASK);
}

static inline size_t home_of(uintptr_t table, uint64_t hash)
{
    return (size_t)(hash >> 1 >> (63 - log2_of(table)));
}

static inline size_t mask_of(uintptr_t table)
{
    return ((size_t)1 << log2_of(table)) - 1;
}

static inline uint64_t tag_of(uint64_t hash)
{
    uint64_t tag = hash >> 8 & 0xff;
    return tag + !tag;
}

/* The high bit of each byte of @tags that equals @tag (and now and then of the byte above a true one). */
static inline uint64_t match_tags(uint64_t tags, uint64_t tag)
{
    uint64_t x = tags ^ tag * UINT64_C(0x0101010101010101);
    return (x - UINT64_C(0x0101010101010101)) & ~x & UINT64_C(0x0080808080808080);
}

static inline unsigned overflow_of(uint64_t tags)
{
    return (unsigned)(tags >> OVERFLOW_SHIFT);
}

static inline bool has_name(const struct l1_entry *entry, const struct index_key *key)
{
    if (entry->dir != key->dir || entry->name_size != key->size)
        return false;
    const char *name = key->size <= L1_NAME_SHORT_MAX ? entry->short_name : entry->name;
    return key->size == 0 || memcmp(name, key->name, key->size) == 0;
}

/* The entry will be pinned, that is written: ask for its line as one's own at once. */
static inline void prefetch_to_write(const void *p)
{
#ifdef __x86_64__
    __asm__ volatile("prefetchw %0" : : "m"(*(const char *)p));
#else
    __builtin_prefetch(p, 1);
#endif
}

struct l1_entry *index_find(const struct index *index, const struct index_key *key)
{
    uintptr_t table = atomic_load(&index->table);
    size_t mask = mask_of(table);
    size_t home = home_of(table, key->hash);
    for (size_t i = 0; i <= mask; i++) {
        const struct bucket *bucket = &buckets_of(table)[(home + i) & mask];
        uint64_t tags = atomic_load(&bucket->tags);
        for (uint64_t match = match_tags(tags, tag_of(key->hash)); match; match &= match - 1) {
            struct l1_entry *entry = atomic_load(&bucket->slots[__builtin_ctzll(match) / 8]);
            if (!entry)
                continue;
            prefetch_to_write(entry);
            if (LIKELY(has_name(entry, key)))
                return entry;
        }
        if (!overflow_of(tags))
            return NULL;
    }
    return NULL;
}

/* 0: no memory. */
static uintptr_t make_table(unsigned log2)
{
    size_t bytes = sizeof(struct bucket) << log2;
    void *buckets = aligned_alloc(_Alignof(struct bucket), bytes);
    if (!buckets)
        return 0;
    memset(buckets, 0, bytes);
    return (uintptr_t)buckets | log2;
}

static void store_tags(struct bucket *bucket, uint64_t tags)
{
    atomic_store(&bucket->tags, tags);
}

static unsigned empty_slot(uint64_t tags)
{
    for (unsigned i = 0; i < BUCKET_SLOTS; i++)
        if (!(tags >> 8 * i & 0xff))
            return i;
    return BUCKET_SLOTS;
}

static void add(uintptr_t table, struct l1_entry *entry, uint64_t hash)
{
    for (size_t at = home_of(table, hash);; at = (at + 1) & mask_of(table)) {
        struct bucket *bucket = &buckets_of(table)[at];
        uint64_t tags = atomic_load_explicit(&bucket->tags, memory_order_relaxed);
        unsigned slot = empty_slot(tags);
        if (slot < BUCKET_SLOTS) {
            atomic_store_explicit(&bucket->slots[slot], entry, memory_order_release);
            store_tags(bucket, tags | tag_of(hash) << 8 * slot);
            return;
        }
        if (overflow_of(tags) < OVERFLOW_STICKY)
            store_tags(bucket, tags + (UINT64_C(1) << OVERFLOW_SHIFT));
    }
}

/* The slot of @entry in @bucket, or BUCKET_SLOTS. */
static unsigned slot_of(const struct bucket *bucket, const struct l1_entry *entry)
{
    unsigned i = 0;
    while (i < BUCKET_SLOTS && atomic_load_explicit(&bucket->slots[i], memory_order_relaxed) != entry)
        i++;
    return i;
}

static void count_down_overflow(struct bucket *bucket)
{
    uint64_t tags = atomic_load_explicit(&bucket->tags, memory_order_relaxed);
    if (overflow_of(tags) < OVERFLOW_STICKY)
        store_tags(bucket, tags - (UINT64_C(1) << OVERFLOW_SHIFT));
}

void index_remove(struct index *index, struct l1_entry *entry)
{
    uintptr_t table = atomic_load_explicit(&index->table, memory_order_relaxed);
    size_t at = home_of(table, atomic_load_explicit(&entry->hash, memory_order_relaxed));
    for (;; at = (at + 1) & mask_of(table)) {
        struct bucket *bucket = &buckets_of(table)[at];
        unsigned slot = slot_of(bucket, entry);
        if (slot < BUCKET_SLOTS) {
            uint64_t tags = atomic_load_explicit(&bucket->tags, memory_order_relaxed);
            store_tags(bucket, tags & ~(UINT64_C(0xff) << 8 * slot));
            atomic_store(&bucket->slots[slot], NULL);
            break;
        }
        count_down_overflow(bucket);
    }
    index->n_entries--;
}

void index_insert(struct index *index, struct l1_entry *entry)
{
    uintptr_t table = atomic_load_explicit(&index->table, memory_order_relaxed);
    assert(index->n_entries < (mask_of(table) + 1) * BUCKET_SLOTS);
    add(table, entry, atomic_load_explicit(&entry->hash, memory_order_relaxed));
    index->n_entries++;
}

/* Copies: readers go on in the old table, which does not change any more. The hashes of a bucket are fetched together.
 */
static void copy_entries(uintptr_t to, uintptr_t from)
{
    for (size_t b = 0; b <= mask_of(from); b++) {
        struct l1_entry *entries[BUCKET_SLOTS];
        for (unsigned i = 0; i < BUCKET_SLOTS; i++) {
            entries[i] = atomic_load_explicit(&buckets_of(from)[b].slots[i], memory_order_relaxed);
            if (entries[i])
                __builtin_prefetch(&entries[i]->hash);
        }
        for (unsigned i = 0; i < BUCKET_SLOTS; i++)
            if (entries[i])
                add(to, entries[i], atomic_load_explicit(&entries[i]->hash, memory_order_relaxed));
    }
}

static int resize(struct index *index, unsigned log2, struct index_table **stale)
{
    uintptr_t old = atomic_load_explicit(&index->table, memory_order_relaxed);
    uintptr_t new = make_table(log2);
    if (!new)
        return -ENOMEM;
    copy_entries(new, old);
    atomic_store(&index->table, new);
    *stale = (struct index_table *)buckets_of(old);
    return 0;
}

int index_reserve(struct index *index, struct index_table **stale)
{
    uintptr_t table = atomic_load_explicit(&index->table, memory_order_relaxed);
    size_t n_buckets = mask_of(table) + 1;
    *stale = NULL;
    if (LIKELY(index->n_entries < GROW_AT(n_buckets)))
        return 0;
    int r = resize(index, log2_of(table) + 1, stale);
    /* No memory, but while there are free slots it will do. */
    return r < 0 && index->n_entries < n_buckets * BUCKET_SLOTS ? 0 : r;
}

void index_shrink(struct index *index, struct index_table **stale)
{
    uintptr_t table = atomic_load_explicit(&index->table, memory_order_relaxed);
    *stale = NULL;
    if (UNLIKELY(log2_of(table) > 0 && index->n_entries < SHRINK_AT(mask_of(table) + 1)))
        (void)resize(index, log2_of(table) - 1, stale);
}

void index_free_table(struct index_table *stale)
{
    free(stale);
}

int index_init(struct index *index)
{
    uintptr_t table = make_table(0);
    if (!table)
        return -ENOMEM;
    atomic_init(&index->table, table);
    index->n_entries = 0;
    return 0;
}

void index_deinit(struct index *index)
{
    free(buckets_of(atomic_load(&index->table)));
    atomic_store(&index->table, 0);
}

/* Those whose home is @home and whose hash is >= @position. A home has a handful, however full the table is. */
static size_t collect_home(uintptr_t table, size_t home, uint64_t position, struct l1_entry **ret, size_t max)
{
    size_t n = 0;
    for (size_t i = 0; i <= mask_of(table); i++) {
        const struct bucket *bucket = &buckets_of(table)[(home + i) & mask_of(table)];
        for (unsigned slot = 0; slot < BUCKET_SLOTS; slot++) {
            struct l1_entry *entry = atomic_load_explicit(&bucket->slots[slot], memory_order_relaxed);
            uint64_t hash = entry ? atomic_load_explicit(&entry->hash, memory_order_relaxed) : 0;
            if (entry && home_of(table, hash) == home && hash >= position && n < max)
                ret[n++] = entry;
        }
        if (!overflow_of(atomic_load_explicit(&bucket->tags, memory_order_relaxed)))
            break;
    }
    return n;
}

size_t index_collect(const struct index *index, uint64_t *position, struct l1_entry **ret, size_t max)
{
    uintptr_t table = atomic_load_explicit(&index->table, memory_order_relaxed);
    size_t n = 0;
    while (n == 0 && *position != UINT64_MAX) {
        size_t home = home_of(table, *position);
        n = collect_home(table, home, *position, ret, max);
        unsigned log2 = log2_of(table);
        *position = home == mask_of(table) ? UINT64_MAX : (uint64_t)(home + 1) << (64 - log2);
    }
    return n;
}

size_t index_bytes(const struct index *index)
{
    return (mask_of(atomic_load_explicit(&index->table, memory_order_relaxed)) + 1) * sizeof(struct bucket);
}
