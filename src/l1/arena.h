/*
 * The arena: one memfd mapping, cut into runs of 4 KiB pages. A bitmap says which pages are free, two levels of summary
 * find a free page at once. Small runs come from the low end, large ones from the high end, so that the small ones do
 * not cut the space of the large ones to pieces.
 * Every page that is not lent is zero. What was never lent is never touched.
 * Threads: every function on any thread, save arena_deinit(); one lock, held for the bitmap only, never while wiping.
 * Errors: negative errno.
 */
#ifndef SESSIONFS_L1_ARENA_H
#define SESSIONFS_L1_ARENA_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct l1_entry;

struct arena {
    char *base; /* set by arena_init(), then read-only, as the sizes below */
    size_t n_pages;
    size_t n_words, n_sums;
    int fd;
    bool is_locked;

    pthread_mutex_t lock;
    /* guarded by lock */
    uint64_t *free;          /* bit p: page p is free */
    uint64_t *some;          /* bit w: free[w] is not 0 */
    uint64_t *top;           /* bit s: some[s] is not 0 */
    struct l1_entry **owner; /* of each page: whose content it is, NULL if nobody said, or claimed_page */
    size_t n_free;
    size_t claim_at, claim_size, n_claimed; /* the window that is being cleared; claim_size 0: none */
    size_t claim_from;                      /* the next search for a window begins here */
};

int arena_init(struct arena *arena, size_t size);
void arena_deinit(struct arena *arena);

/** arena_get() - @n_pages pages in a row, or NULL. */
void *arena_get(struct arena *arena, size_t n_pages);

/** arena_put() - wipes, then frees. */
void arena_put(struct arena *arena, void *pages, size_t n_pages);

/** arena_own() - note that the run belongs to @entry, which is borrowed until the run is put or owned by another. */
void arena_own(struct arena *arena, void *pages, size_t n_pages, struct l1_entry *entry);

/**
 * arena_claim() - choose a window of @n_pages that takes the fewest evictions, keep its free pages back, and from now
 * on those which are put
 * @bad, @n_bad: pages that the window must not contain
 * Return: the first page of it; SIZE_MAX if there is no such window, or another thread has one.
 */
size_t arena_claim(struct arena *arena, size_t n_pages, const size_t *bad, size_t n_bad);

/**
 * arena_claim_next() - the owner, pinned, of the first page at or behind *@page of the window which is still lent
 * Return: true if there is such a page (*@page: it; *@ret NULL if nobody owns it, or the owner is about to go).
 */
bool arena_claim_next(struct arena *arena, size_t *page, struct l1_entry **ret);

/** arena_claim_end() - take the window if it is complete, else free what was kept back and return NULL. */
void *arena_claim_end(struct arena *arena);

size_t arena_bytes_used(struct arena *arena);

#endif
