/*
 * Readers without a lock. A thread that reads a shard's table says so in a slot of its own (a private cache line);
 * whoever wants to free or change what readers may see first unlinks it from the shard, then waits here until no slot
 * names that shard any more.
 * A reader's section is short: no lock, no callback, no system call inside; sections do not nest.
 * Threads: any; up to READERS_MAX at a time read without a lock, the others must lock (reader_enter() returns NULL).
 * Errors: none.
 */
#ifndef SESSIONFS_L1_READERS_H
#define SESSIONFS_L1_READERS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/macros.h"

#define READERS_MAX 256

struct reader {
    _Alignas(64) _Atomic(const void *) at; /* what its thread reads now, or NULL */
    atomic_bool is_taken;
};

extern _Thread_local struct reader *reader_mine;

/** reader_register() - a slot for this thread until it ends; NULL if all are taken. */
struct reader *reader_register(void);

/**
 * reader_enter() - begin to read @what (a shard)
 * Sequentially consistent, as the loads of what can be unlinked must be: either the reader sees that it was
 * unlinked, or readers_wait() sees the reader.
 */
static inline struct reader *reader_enter(const void *what)
{
    struct reader *reader = reader_mine;
    if (UNLIKELY(!reader))
        reader = reader_register();
    if (LIKELY(reader != NULL))
        atomic_store(&reader->at, what);
    return reader;
}

static inline void reader_leave(struct reader *reader)
{
    atomic_store_explicit(&reader->at, NULL, memory_order_release);
}

/** readers_wait() - return when every section that may have seen what was unlinked from @what is over. */
void readers_wait(const void *what);

#endif
