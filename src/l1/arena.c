#include "l1/arena.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/macros.h"
#include "l1/sieve.h"
#include "sessionfs/l1.h"

/* Runs of this many pages (256 KiB) and more come from the high end. */
#define LARGE_PAGES 64

/* From here (16 MiB) a run goes back to the system instead of being written over. */
#define PUNCH_PAGES 4096

/* So many windows are looked at to choose one (some 10 us). */
#define WINDOWS_MAX 1024

#define NONE SIZE_MAX

static struct l1_entry claimed_page; /* its address marks pages that a claim keeps back */

static size_t words_for(size_t n_bits)
{
    return (n_bits + 63) / 64;
}

static void *map_private(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static int map_memory(struct arena *arena, size_t size)
{
    CLEANUP(closep) int fd = memfd_create("sessionfs-l1", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)size) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        return -errno;
    char *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (base == MAP_FAILED)
        return -errno;
    arena->base = base;
    arena->fd = fd;
    fd = -1;
    (void)madvise(base, size, MADV_DONTDUMP);
    arena->is_locked = mlock2(base, size, MLOCK_ONFAULT) == 0;
    return 0;
}

/* All pages free: bits beyond the last one stay 0. */
static void set_bits(uint64_t *words, size_t n_bits)
{
    memset(words, 0xff, n_bits / 64 * sizeof(*words));
    if (n_bits % 64)
        words[n_bits / 64] = (UINT64_C(1) << n_bits % 64) - 1;
}

static int make_maps(struct arena *arena)
{
    arena->n_words = words_for(arena->n_pages);
    arena->n_sums = words_for(arena->n_words);
    arena->free = calloc(arena->n_words, sizeof(uint64_t));
    arena->some = calloc(arena->n_sums, sizeof(uint64_t));
    arena->top = calloc(words_for(arena->n_sums), sizeof(uint64_t));
    arena->owner = map_private(arena->n_pages * sizeof(*arena->owner));
    if (!arena->free || !arena->some || !arena->top || !arena->owner)
        return -ENOMEM;
    set_bits(arena->free, arena->n_pages);
    set_bits(arena->some, arena->n_words);
    set_bits(arena->top, arena->n_sums);
    arena->n_free = arena->n_pages;
    return 0;
}

int arena_init(struct arena *arena, size_t size)
{
    if (size == 0 || size > SIZE_MAX / 2)
        return -EINVAL;
    *arena = (struct arena){.n_pages = (size + L1_PAGE - 1) / L1_PAGE, .fd = -1};
    pthread_mutex_init(&arena->lock, NULL);
    int r = map_memory(arena, arena->n_pages * L1_PAGE);
    if (r == 0)
        r = make_maps(arena);
    if (r < 0)
        arena_deinit(arena);
    return r;
}

void arena_deinit(struct arena *arena)
{
    if (arena->base)
        munmap(arena->base, arena->n_pages * L1_PAGE);
    if (arena->owner)
        munmap(arena->owner, arena->n_pages * sizeof(*arena->owner));
    closep(&arena->fd);
    free(arena->free);
    free(arena->some);
    free(arena->top);
    pthread_mutex_destroy(&arena->lock);
}

/* The bits of word @word that lie in [@at, @end). */
static uint64_t bits_in(size_t word, size_t at, size_t end)
{
    uint64_t bits = UINT64_MAX;
    if (word == at / 64)
        bits &= UINT64_MAX << at % 64;
    if (word == end / 64)
        bits &= (UINT64_C(1) << end % 64) - 1;
    return bits;
}

static void sum_up(struct arena *arena, size_t word)
{
    uint64_t *some = &arena->some[word / 64], *top = &arena->top[word / 64 / 64];
    uint64_t bit = UINT64_C(1) << word % 64, top_bit = UINT64_C(1) << word / 64 % 64;
    *some = arena->free[word] ? *some | bit : *some & ~bit;
    *top = *some ? *top | top_bit : *top & ~top_bit;
}

static void mark_lent(struct arena *arena, size_t at, size_t n)
{
    for (size_t word = at / 64; word * 64 < at + n; word++) {
        assert((arena->free[word] & bits_in(word, at, at + n)) == bits_in(word, at, at + n));
        arena->free[word] &= ~bits_in(word, at, at + n);
        sum_up(arena, word);
    }
    arena->n_free -= n;
}

static void mark_free(struct arena *arena, size_t at, size_t n)
{
    for (size_t word = at / 64; word * 64 < at + n; word++) {
        assert((arena->free[word] & bits_in(word, at, at + n)) == 0); /* else: freed twice */
        arena->free[word] |= bits_in(word, at, at + n);
        sum_up(arena, word);
    }
    arena->n_free += n;
}

static bool is_free(const struct arena *arena, size_t page)
{
    return arena->free[page / 64] >> page % 64 & 1;
}

/* The first free page from @at on, NONE if there is none. */
static size_t next_free(const struct arena *arena, size_t at)
{
    if (at >= arena->n_pages)
        return NONE;
    size_t word = at / 64;
    uint64_t bits = arena->free[word] & UINT64_MAX << at % 64;
    if (bits)
        return word * 64 + (size_t)__builtin_ctzll(bits);
    if (++word >= arena->n_words)
        return NONE;
    size_t sum = word / 64;
    bits = arena->some[sum] & UINT64_MAX << word % 64;
    while (!bits && ++sum < arena->n_sums)
        bits = arena->some[sum];
    if (!bits)
        return NONE;
    word = sum * 64 + (size_t)__builtin_ctzll(bits);
    return word * 64 + (size_t)__builtin_ctzll(arena->free[word]);
}

/* The first page from @at on that is lent; n_pages if there is none before @limit. */
static size_t next_lent(const struct arena *arena, size_t at, size_t limit)
{
    for (size_t word = at / 64; word * 64 < limit; word++) {
        uint64_t bits = ~arena->free[word] & (word == at / 64 ? UINT64_MAX << at % 64 : UINT64_MAX);
        if (bits)
            return word * 64 + (size_t)__builtin_ctzll(bits);
    }
    return arena->n_pages;
}

/* One past the last free page below @end, 0 if there is none. */
static size_t prev_free(const struct arena *arena, size_t end)
{
    if (end == 0)
        return 0;
    size_t word = (end - 1) / 64;
    uint64_t bits = arena->free[word] & UINT64_MAX >> (63 - (end - 1) % 64);
    if (bits)
        return word * 64 + 64 - (size_t)__builtin_clzll(bits);
    if (word == 0)
        return 0;
    word--;
    size_t sum = word / 64;
    bits = arena->some[sum] & UINT64_MAX >> (63 - word % 64);
    while (!bits && sum > 0)
        bits = arena->some[--sum];
    if (!bits)
        return 0;
    word = sum * 64 + 63 - (size_t)__builtin_clzll(bits);
    return word * 64 + 64 - (size_t)__builtin_clzll(arena->free[word]);
}

/* One past the last page below @end that is lent; 0 if there is none above @limit. */
static size_t prev_lent(const struct arena *arena, size_t end, size_t limit)
{
    for (size_t word = (end - 1) / 64 + 1; word > 0 && word * 64 > limit; word--) {
        uint64_t bits = ~arena->free[word - 1];
        if (word - 1 == (end - 1) / 64)
            bits &= UINT64_MAX >> (63 - (end - 1) % 64);
        if (bits)
            return (word - 1) * 64 + 64 - (size_t)__builtin_clzll(bits);
    }
    return 0;
}

static size_t lowest_run(const struct arena *arena, size_t n)
{
    for (size_t at = next_free(arena, 0); at != NONE && n <= arena->n_pages - at;) {
        size_t end = next_lent(arena, at, at + n);
        if (end >= at + n)
            return at;
        at = next_free(arena, end);
    }
    return NONE;
}

static size_t highest_run(const struct arena *arena, size_t n)
{
    for (size_t end = prev_free(arena, arena->n_pages); end >= n;) {
        size_t begin = prev_lent(arena, end, end - n);
        if (begin + n <= end)
            return end - n;
        end = prev_free(arena, begin);
    }
    return NONE;
}

static size_t lowest_page(const struct arena *arena)
{
    for (size_t i = 0; i < words_for(arena->n_sums); i++) {
        if (!arena->top[i])
            continue;
        size_t sum = i * 64 + (size_t)__builtin_ctzll(arena->top[i]);
        size_t word = sum * 64 + (size_t)__builtin_ctzll(arena->some[sum]);
        return word * 64 + (size_t)__builtin_ctzll(arena->free[word]);
    }
    return NONE;
}

void *arena_get(struct arena *arena, size_t n_pages)
{
    size_t at = NONE;
    pthread_mutex_lock(&arena->lock);
    if (n_pages == 1)
        at = lowest_page(arena);
    else if (n_pages <= arena->n_free)
        at = n_pages < LARGE_PAGES ? lowest_run(arena, n_pages) : highest_run(arena, n_pages);
    if (at != NONE)
        mark_lent(arena, at, n_pages);
    pthread_mutex_unlock(&arena->lock);
    return at == NONE ? NULL : arena->base + at * L1_PAGE;
}

/*
 * Zeroes by writing, or by giving the memory back. Measured for 1 MiB: writing takes 12 us; giving back takes 180 us,
 * and the page faults of the next use 680 us more. So only what is very large, and rare, is given back.
 */
static void wipe(struct arena *arena, char *pages, size_t n_pages)
{
    size_t size = n_pages * L1_PAGE;
    if (n_pages >= PUNCH_PAGES &&
        fallocate(arena->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, pages - arena->base, (off_t)size) == 0)
        return;
    explicit_bzero(pages, size);
}

static void put_page_locked(struct arena *arena, size_t page)
{
    bool is_in_claim = page - arena->claim_at < arena->claim_size;
    arena->owner[page] = is_in_claim ? &claimed_page : NULL;
    if (is_in_claim)
        arena->n_claimed++;
    else
        mark_free(arena, page, 1);
}

void arena_put(struct arena *arena, void *pages, size_t n_pages)
{
    size_t at = (size_t)((char *)pages - arena->base) / L1_PAGE;
    assert((char *)pages >= arena->base && n_pages <= arena->n_pages && at <= arena->n_pages - n_pages);
    wipe(arena, pages, n_pages);
    pthread_mutex_lock(&arena->lock);
    if (arena->claim_size == 0) {
        memset(&arena->owner[at], 0, n_pages * sizeof(*arena->owner));
        mark_free(arena, at, n_pages);
    } else {
        for (size_t page = at; page < at + n_pages; page++)
            put_page_locked(arena, page);
    }
    pthread_mutex_unlock(&arena->lock);
}

void arena_own(struct arena *arena, void *pages, size_t n_pages, struct l1_entry *entry)
{
    size_t at = (size_t)((char *)pages - arena->base) / L1_PAGE;
    pthread_mutex_lock(&arena->lock);
    for (size_t page = at; page < at + n_pages; page++)
        arena->owner[page] = entry;
    pthread_mutex_unlock(&arena->lock);
}

static size_t count_free(const struct arena *arena, size_t at, size_t n)
{
    size_t count = 0;
    for (size_t word = at / 64; word * 64 < at + n; word++)
        count += (size_t)__builtin_popcountll(arena->free[word] & bits_in(word, at, at + n));
    return count;
}

static bool has_bad_page(size_t at, size_t n, const size_t *bad, size_t n_bad)
{
    for (size_t i = 0; i < n_bad; i++)
        if (bad[i] - at < n)
            return true;
    return false;
}

/*
 * Looks at windows that overlap by half, in a huge arena at a sample of them: a good one will do. The search goes on
 * where the last one ended: in a full arena, where all are alike, the windows take turns.
 */
static size_t emptiest_window(const struct arena *arena, size_t n, const size_t *bad, size_t n_bad)
{
    size_t n_starts = arena->n_pages - n + 1;
    size_t step = max_u64(max_u64(n / 2, 1), n_starts / WINDOWS_MAX);
    size_t best = NONE, best_free = 0;
    for (size_t offset = 0; offset < n_starts; offset += step) {
        size_t at = (arena->claim_from + offset) % n_starts;
        size_t n_free = count_free(arena, at, n);
        if ((best == NONE || n_free > best_free) && !has_bad_page(at, n, bad, n_bad)) {
            best = at;
            best_free = n_free;
        }
    }
    return best;
}

static void claim_locked(struct arena *arena, size_t at, size_t n)
{
    arena->claim_at = at;
    arena->claim_size = n;
    arena->claim_from = at + n;
    arena->n_claimed = 0;
    for (size_t page = at; page < at + n; page++) {
        if (!is_free(arena, page))
            continue;
        mark_lent(arena, page, 1);
        arena->owner[page] = &claimed_page;
        arena->n_claimed++;
    }
}

size_t arena_claim(struct arena *arena, size_t n_pages, const size_t *bad, size_t n_bad)
{
    pthread_mutex_lock(&arena->lock);
    size_t at = arena->claim_size ? NONE : emptiest_window(arena, n_pages, bad, n_bad);
    if (at != NONE)
        claim_locked(arena, at, n_pages);
    pthread_mutex_unlock(&arena->lock);
    return at;
}

bool arena_claim_next(struct arena *arena, size_t *page, struct l1_entry **ret)
{
    pthread_mutex_lock(&arena->lock);
    size_t end = arena->claim_at + arena->claim_size;
    while (*page < end && arena->owner[*page] == &claimed_page)
        (*page)++;
    bool is_found = *page < end;
    struct l1_entry *owner = is_found ? arena->owner[*page] : NULL;
    /* An owner's pages are put before its last pin goes, under our lock: the entry is still there. */
    *ret = owner && entry_pin_if_alive(owner) ? owner : NULL;
    pthread_mutex_unlock(&arena->lock);
    return is_found;
}

static void release_claim_locked(struct arena *arena)
{
    for (size_t page = arena->claim_at; page < arena->claim_at + arena->claim_size; page++) {
        if (arena->owner[page] != &claimed_page)
            continue;
        arena->owner[page] = NULL;
        mark_free(arena, page, 1);
    }
}

void *arena_claim_end(struct arena *arena)
{
    pthread_mutex_lock(&arena->lock);
    bool is_complete = arena->n_claimed == arena->claim_size;
    char *run = arena->base + arena->claim_at * L1_PAGE;
    if (is_complete)
        memset(&arena->owner[arena->claim_at], 0, arena->claim_size * sizeof(*arena->owner));
    else
        release_claim_locked(arena);
    arena->claim_size = 0;
    pthread_mutex_unlock(&arena->lock);
    return is_complete ? run : NULL;
}

size_t arena_bytes_used(struct arena *arena)
{
    pthread_mutex_lock(&arena->lock);
    size_t n_used = arena->n_pages - arena->n_free;
    pthread_mutex_unlock(&arena->lock);
    return n_used * L1_PAGE;
}
