#include "sessionfs/l1.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/macros.h"
#include "l1/arena.h"
#include "l1/hash.h"
#include "l1/index.h"
#include "l1/readers.h"
#include "l1/sieve.h"

#define N_SHARDS 256

/* To make room for a run of several pages: so many evictions as SIEVE likes, then so many windows to clear. */
#define SIEVE_FIRST 8
#define N_WINDOWS   16

#define WALK_BATCH 64

/*
 * Why a reader may look at an entry without a lock: what leaves a shard's index is freed, or gets another name, only
 * after readers_wait() for that shard; and it may pin only what has pins (entry_pin_if_alive()). A reader that finds
 * nothing asks again under the lock, so that it misses nothing which is being moved by growth or by a rename.
 */
struct shard {
    _Alignas(64) pthread_mutex_t lock;
    struct index index; /* see index.h */
};

struct l1 {
    struct l1_config config; /* set by l1_new(), then read-only */
    struct hash_key key;

    struct arena arena;
    struct sieve sieve;
    _Atomic uint64_t n_evictions;
    struct shard shards[N_SHARDS];
};

static struct shard *shard_of(struct l1 *l1, uint64_t hash)
{
    return &l1->shards[hash % N_SHARDS];
}

static struct index_key key_of(const struct l1 *l1, uint64_t dir, const char *name, size_t size)
{
    return (struct index_key){hash_name(&l1->key, dir, name, size), dir, name, size};
}

static int init_shards(struct l1 *l1)
{
    for (size_t i = 0; i < N_SHARDS; i++)
        pthread_mutex_init(&l1->shards[i].lock, NULL);
    for (size_t i = 0; i < N_SHARDS; i++) {
        int r = index_init(&l1->shards[i].index);
        if (r < 0)
            return r;
    }
    return 0;
}

static void free_parts(struct l1 *l1)
{
    for (size_t i = 0; i < N_SHARDS; i++) {
        index_deinit(&l1->shards[i].index);
        pthread_mutex_destroy(&l1->shards[i].lock);
    }
    sieve_deinit(&l1->sieve);
    explicit_bzero(&l1->key, sizeof(l1->key));
    free(l1);
}

int l1_new(struct l1 **ret, const struct l1_config *config)
{
    if (!config->size || !config->make || !config->release || !config->evict)
        return -EINVAL;
    struct l1 *l1 = aligned_alloc(_Alignof(struct l1), sizeof(*l1));
    if (!l1)
        return -ENOMEM;
    memset(l1, 0, sizeof(*l1));
    l1->config = *config;
    sieve_init(&l1->sieve);
    int r = init_shards(l1);
    if (r == 0 && getrandom(&l1->key, sizeof(l1->key), 0) != (ssize_t)sizeof(l1->key))
        r = -EIO;
    if (r == 0)
        r = arena_init(&l1->arena, config->size);
    if (r < 0) {
        free_parts(l1);
        return r;
    }
    *ret = l1;
    return 0;
}

void l1_free(struct l1 *l1)
{
    if (!l1)
        return;
    for (size_t i = 0; i < N_SHARDS; i++)
        assert(l1->shards[i].index.n_entries == 0);
    arena_deinit(&l1->arena);
    free_parts(l1);
}

static struct l1_entry *find_without_lock(struct shard *shard, const struct index_key *key)
{
    struct reader *reader = reader_enter(shard);
    if (UNLIKELY(!reader))
        return NULL;
    struct l1_entry *entry = index_find(&shard->index, key);
    if (entry && !entry_pin_if_alive(entry))
        entry = NULL;
    reader_leave(reader);
    return entry;
}

static struct l1_entry *find_locked(struct shard *shard, const struct index_key *key)
{
    struct l1_entry *entry = index_find(&shard->index, key);
    if (entry)
        l1_pin(entry);
    return entry;
}

static struct l1_entry *find_with_lock(struct shard *shard, const struct index_key *key)
{
    pthread_mutex_lock(&shard->lock);
    struct l1_entry *entry = find_locked(shard, key);
    pthread_mutex_unlock(&shard->lock);
    return entry;
}

static struct l1_entry *find(struct l1 *l1, const struct index_key *key)
{
    struct shard *shard = shard_of(l1, key->hash);
    struct l1_entry *entry = find_without_lock(shard, key);
    if (UNLIKELY(!entry))
        entry = find_with_lock(shard, key);
    if (LIKELY(entry != NULL))
        l1_mark_used(entry);
    return entry;
}

struct l1_entry *l1_find(struct l1 *l1, uint64_t dir, const char *name, size_t size)
{
    if (size > L1_NAME_MAX)
        return NULL;
    struct index_key key = key_of(l1, dir, name, size);
    return find(l1, &key);
}

/* Memory for a name that does not fit into the entry. False: none left. */
static bool make_long_name(char **ret, size_t size)
{
    *ret = size > L1_NAME_SHORT_MAX ? malloc(size) : NULL;
    return *ret || size <= L1_NAME_SHORT_MAX;
}

/* @long_name is the entry's from now on. */
static void set_name(struct l1_entry *entry, const struct index_key *key, char *long_name)
{
    explicit_bzero(entry->short_name, sizeof(entry->short_name));
    entry->name = long_name ? long_name : entry->short_name;
    if (key->size)
        memcpy(entry->name, key->name, key->size);
    entry->name_size = (uint8_t)key->size;
    entry->dir = key->dir;
    atomic_store_explicit(&entry->hash, key->hash, memory_order_relaxed);
}

/* The long name of the entry, or NULL. */
static char *long_name_of(const struct l1_entry *entry)
{
    return entry->name == entry->short_name ? NULL : entry->name;
}

static void free_long_name(char *name, size_t size)
{
    if (name)
        explicit_bzero(name, size);
    free(name);
}

/* No reader, no pin, no list has it. */
static void destroy(struct l1 *l1, struct l1_entry *entry)
{
    free_long_name(long_name_of(entry), entry->name_size);
    explicit_bzero(entry->short_name, sizeof(entry->short_name));
    entry->name = entry->short_name;
    entry->name_size = 0;
    l1->config.release(l1->config.owner, entry);
}

static struct l1_entry *make_entry(struct l1 *l1, const struct index_key *key)
{
    char *long_name;
    if (!make_long_name(&long_name, key->size))
        return NULL;
    struct l1_entry *entry = l1->config.make(l1->config.owner);
    if (!entry) {
        free(long_name);
        return NULL;
    }
    set_name(entry, key, long_name);
    atomic_store_explicit(&entry->pins, 1, memory_order_relaxed);
    return entry;
}

static void insert_locked(struct shard *shard, struct l1_entry *entry)
{
    index_insert(&shard->index, entry);
    entry->is_indexed = true;
}

static void remove_locked(struct shard *shard, struct l1_entry *entry)
{
    index_remove(&shard->index, entry);
    entry->is_indexed = false;
}

/* Readers may still be in the table which was replaced. */
static void free_stale(struct shard *shard, struct index_table *stale)
{
    if (LIKELY(!stale))
        return;
    readers_wait(shard);
    index_free_table(stale);
}

/* @made, or who was faster (pinned), or NULL: no memory. */
static struct l1_entry *insert_or_find(struct l1 *l1, struct l1_entry *made, const struct index_key *key)
{
    struct shard *shard = shard_of(l1, key->hash);
    struct index_table *stale = NULL;
    pthread_mutex_lock(&shard->lock);
    struct l1_entry *entry = find_locked(shard, key);
    if (!entry && index_reserve(&shard->index, &stale) == 0) {
        insert_locked(shard, made);
        entry = made;
    }
    pthread_mutex_unlock(&shard->lock);
    free_stale(shard, stale);
    return entry;
}

struct l1_entry *l1_get(struct l1 *l1, uint64_t dir, const char *name, size_t size, bool *is_new)
{
    assert(size <= L1_NAME_MAX);
    struct index_key key = key_of(l1, dir, name, size);
    *is_new = false;
    struct l1_entry *entry = find(l1, &key);
    if (entry)
        return entry;
    struct l1_entry *made = make_entry(l1, &key);
    if (!made)
        return NULL;
    entry = insert_or_find(l1, made, &key);
    if (entry == made) {
        *is_new = true;
        return entry;
    }
    destroy(l1, made);
    if (entry)
        l1_mark_used(entry);
    return entry;
}

void l1_pin(struct l1_entry *entry)
{
    atomic_fetch_add_explicit(&entry->pins, 1, memory_order_relaxed);
}

/* The shard in which @entry is, or was last; a rename may move it until the lock is held. */
static struct shard *lock_shard_of(struct l1 *l1, const struct l1_entry *entry)
{
    for (;;) {
        uint64_t hash = atomic_load_explicit(&entry->hash, memory_order_relaxed);
        struct shard *shard = shard_of(l1, hash);
        pthread_mutex_lock(&shard->lock);
        if (LIKELY(shard_of(l1, atomic_load_explicit(&entry->hash, memory_order_relaxed)) == shard))
            return shard;
        pthread_mutex_unlock(&shard->lock);
    }
}

static void unpin_last(struct l1 *l1, struct l1_entry *entry)
{
    struct index_table *stale = NULL;
    struct shard *shard = lock_shard_of(l1, entry);
    bool is_last = atomic_fetch_sub_explicit(&entry->pins, 1, memory_order_acq_rel) == 1;
    if (is_last && entry->is_indexed) {
        remove_locked(shard, entry);
        index_shrink(&shard->index, &stale);
    }
    pthread_mutex_unlock(&shard->lock);
    if (is_last) {
        sieve_remove(&l1->sieve, entry);
        readers_wait(shard);
        destroy(l1, entry);
    }
    free_stale(shard, stale);
}

void l1_unpin(struct l1 *l1, struct l1_entry *entry)
{
    uint32_t pins = atomic_load_explicit(&entry->pins, memory_order_relaxed);
    assert(pins > 0);
    while (pins > 1)
        if (atomic_compare_exchange_weak_explicit(&entry->pins, &pins, pins - 1, memory_order_release,
                                                  memory_order_relaxed))
            return;
    unpin_last(l1, entry);
}

bool l1_forget(struct l1 *l1, struct l1_entry *entry)
{
    struct index_table *stale = NULL;
    struct shard *shard = lock_shard_of(l1, entry);
    bool was_indexed = entry->is_indexed;
    if (was_indexed) {
        remove_locked(shard, entry);
        index_shrink(&shard->index, &stale);
    }
    pthread_mutex_unlock(&shard->lock);
    free_stale(shard, stale);
    return was_indexed;
}

/* Both shards' locks are held. */
static int rename_locked(struct shard *from, struct shard *to, struct l1_entry *entry, const struct index_key *key,
                         char **long_name, struct index_table **stale)
{
    struct l1_entry *other = index_find(&to->index, key);
    if (other == entry)
        return 0;
    int r = index_reserve(&to->index, stale);
    if (r < 0)
        return r;
    if (other)
        remove_locked(to, other);
    if (entry->is_indexed)
        remove_locked(from, entry);
    readers_wait(from); /* indexed or not: one may still compare the name that goes now */
    char *old_name = long_name_of(entry);
    size_t old_size = entry->name_size;
    set_name(entry, key, TAKE(*long_name));
    free_long_name(old_name, old_size);
    insert_locked(to, entry);
    return 0;
}

static void unlock_both(struct shard *a, struct shard *b)
{
    pthread_mutex_unlock(&a->lock);
    if (a != b)
        pthread_mutex_unlock(&b->lock);
}

/* @to and the shard of @entry, which is returned; another rename may move it until the locks are held. */
static struct shard *lock_both(struct l1 *l1, const struct l1_entry *entry, struct shard *to)
{
    for (;;) {
        struct shard *from = shard_of(l1, atomic_load_explicit(&entry->hash, memory_order_relaxed));
        pthread_mutex_lock(from < to ? &from->lock : &to->lock);
        if (from != to)
            pthread_mutex_lock(from < to ? &to->lock : &from->lock);
        if (LIKELY(shard_of(l1, atomic_load_explicit(&entry->hash, memory_order_relaxed)) == from))
            return from;
        unlock_both(from, to);
    }
}

int l1_rename(struct l1 *l1, struct l1_entry *entry, uint64_t dir, const char *name, size_t size)
{
    assert(size <= L1_NAME_MAX);
    CLEANUP(freep) char *long_name = NULL;
    struct index_table *stale = NULL;
    struct index_key key = key_of(l1, dir, name, size);
    if (!make_long_name(&long_name, size))
        return -ENOMEM;
    struct shard *to = shard_of(l1, key.hash);
    struct shard *from = lock_both(l1, entry, to);
    int r = rename_locked(from, to, entry, &key, &long_name, &stale);
    unlock_both(from, to);
    free_stale(to, stale);
    return r;
}

void l1_set_resident(struct l1 *l1, struct l1_entry *entry, bool is_resident)
{
    if (is_resident)
        sieve_add(&l1->sieve, entry);
    else
        sieve_remove(&l1->sieve, entry);
}

/* Takes over the pin. */
static bool try_evict(struct l1 *l1, struct l1_entry *entry)
{
    bool is_evicted = l1->config.evict(l1->config.owner, entry);
    if (is_evicted)
        atomic_fetch_add_explicit(&l1->n_evictions, 1, memory_order_relaxed);
    l1_unpin(l1, entry);
    return is_evicted;
}

/* Evict until there is a run, at most @max times, at most each entry once. */
static void *get_by_sieve(struct l1 *l1, size_t n_pages, struct sieve_search *search, size_t max)
{
    void *pages = NULL;
    while (!pages && max > 0) {
        struct l1_entry *entry = sieve_next(&l1->sieve, search);
        if (!entry)
            break;
        if (!try_evict(l1, entry))
            continue;
        max--;
        pages = arena_get(&l1->arena, n_pages);
    }
    return pages;
}

/* Empty the claimed window; on the way *@page moves to its end, or stops at a page that stays. */
static void clear_window(struct l1 *l1, size_t *page)
{
    struct l1_entry *owner;
    for (size_t last = SIZE_MAX; arena_claim_next(&l1->arena, page, &owner); last = *page)
        if (!owner || !try_evict(l1, owner) || *page == last)
            return;
}

/* Choose a window of that many pages and evict whose pages they are; a window with a page that must stay is given up.
 */
static void *get_by_window(struct l1 *l1, size_t n_pages)
{
    size_t bad[N_WINDOWS];
    void *pages = NULL;
    for (size_t i = 0; !pages && i < N_WINDOWS; i++) {
        bad[i] = arena_claim(&l1->arena, n_pages, bad, i);
        if (bad[i] == SIZE_MAX)
            break;
        clear_window(l1, &bad[i]);
        pages = arena_claim_end(&l1->arena);
    }
    return pages;
}

void *l1_pages_get(struct l1 *l1, size_t size)
{
    assert(size > 0);
    size_t n_pages = size / L1_PAGE + (size % L1_PAGE != 0);
    if (n_pages > l1->arena.n_pages)
        return NULL;
    void *pages = arena_get(&l1->arena, n_pages);
    if (LIKELY(pages != NULL))
        return pages;

    struct sieve_search search;
    sieve_search_init(&l1->sieve, &search);
    pages = get_by_sieve(l1, n_pages, &search, n_pages > 1 ? SIEVE_FIRST : SIZE_MAX);
    if (!pages && n_pages > 1)
        pages = get_by_window(l1, n_pages);
    if (!pages)
        pages = get_by_sieve(l1, n_pages, &search, SIZE_MAX);
    return pages ? pages : arena_get(&l1->arena, n_pages); /* others may have put some */
}

void l1_pages_own(struct l1 *l1, void *pages, size_t size, struct l1_entry *entry)
{
    arena_own(&l1->arena, pages, size / L1_PAGE + (size % L1_PAGE != 0), entry);
}

void l1_pages_put(struct l1 *l1, void *pages, size_t size)
{
    arena_put(&l1->arena, pages, size / L1_PAGE + (size % L1_PAGE != 0));
}

/* The next entries from *@position on, pinned. */
static size_t collect(struct shard *shard, uint64_t *position, struct l1_entry **ret)
{
    pthread_mutex_lock(&shard->lock);
    size_t n = index_collect(&shard->index, position, ret, WALK_BATCH);
    for (size_t i = 0; i < n; i++)
        l1_pin(ret[i]);
    pthread_mutex_unlock(&shard->lock);
    return n;
}

void l1_walk(struct l1 *l1, void (*visit)(void *arg, struct l1_entry *entry), void *arg)
{
    struct l1_entry *batch[WALK_BATCH];
    for (size_t i = 0; i < N_SHARDS; i++) {
        uint64_t position = 0;
        for (size_t n; (n = collect(&l1->shards[i], &position, batch)) > 0;) {
            for (size_t j = 0; j < n; j++) {
                visit(arg, batch[j]);
                l1_unpin(l1, batch[j]);
            }
        }
    }
}

void l1_stats(struct l1 *l1, struct l1_stats *ret)
{
    struct l1_stats stats = {
        .n_evictions = atomic_load_explicit(&l1->n_evictions, memory_order_relaxed),
        .bytes_used = arena_bytes_used(&l1->arena),
        .bytes_total = l1->arena.n_pages * L1_PAGE,
        .bytes_index = sizeof(*l1),
        .is_locked = l1->arena.is_locked,
    };
    for (size_t i = 0; i < N_SHARDS; i++) {
        pthread_mutex_lock(&l1->shards[i].lock);
        stats.n_entries += l1->shards[i].index.n_entries;
        stats.bytes_index += index_bytes(&l1->shards[i].index);
        pthread_mutex_unlock(&l1->shards[i].lock);
    }
    *ret = stats;
}
