/*
 * One shard's table of entries: open addressing in buckets of a cache line, which hold seven pointers and for each a
 * byte of its hash, so that a lookup reads a bucket and the entry it is after, seldom more. Ownership: the table
 * borrows the entries. Threads: index_find() on any thread, in a reader's section (readers.h) or under the shard's
 * lock; under the lock it finds whatever is there, without it may miss an entry that is on the move. All else under the
 * lock. Errors: -ENOMEM from index_reserve().
 */
#ifndef SESSIONFS_L1_INDEX_H
#define SESSIONFS_L1_INDEX_H

#include <stdatomic.h>
#include <stdint.h>

#include "sessionfs/l1.h"

struct index_table;

struct index {
    _Atomic uintptr_t table; /* struct bucket[], aligned; the low bits are log2 of how many */
    size_t n_entries;        /* the shard's lock */
};

struct index_key {
    uint64_t hash, dir;
    const char *name;
    size_t size;
};

/** index_init() - an empty table. Return: 0 or -ENOMEM. */
int index_init(struct index *index);
void index_deinit(struct index *index);

/** index_find() - the entry of that name, or NULL. */
struct l1_entry *index_find(const struct index *index, const struct index_key *key);

/**
 * index_reserve() - make room for one more entry
 * @stale: a table that was replaced, or NULL: for index_free_table() after readers_wait()
 * Return: 0, or -ENOMEM (the table is full and cannot grow)
 */
int index_reserve(struct index *index, struct index_table **stale);

/** index_insert() - there must be room (index_reserve()) and no entry of that name. */
void index_insert(struct index *index, struct l1_entry *entry);

/** index_remove() - of an entry that is in. Readers may still see it: readers_wait() before changing or freeing it. */
void index_remove(struct index *index, struct l1_entry *entry);

/** index_shrink() - when few entries are left, go to a smaller table. @stale: as for index_reserve(). */
void index_shrink(struct index *index, struct index_table **stale);

void index_free_table(struct index_table *stale);

/** index_collect() - put up to @max entries whose hash is >= *@position into @ret and move *@position behind them;
   their number, 0 at the end. Growth and shrinking in between do not disturb the order. */
size_t index_collect(const struct index *index, uint64_t *position, struct l1_entry **ret, size_t max);

size_t index_bytes(const struct index *index);

#endif
