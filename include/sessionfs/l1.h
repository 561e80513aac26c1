/*
 * l1: the memory of the daemon. An index of entries by name, a page-aligned arena for their contents, and the choice of
 * what leaves when the arena is full (SIEVE).
 *
 * Entries: the owner (store) embeds struct l1_entry as the FIRST member of its own struct. An entry lives while it
 * has pins; whoever has a reason that it lives (a caller, its content, the kernel that knows it) holds a pin. The
 * pin that goes last takes the entry out of the index and frees it by config.release().
 * Names: (dir, bytes): dir is a number which the owner chose for the directory, unique in the process.
 * A lookup touches one cache line of an entry, its first 64 bytes: allocate it at a multiple of 64 (aligned_alloc) and
 * keep what a hit needs next in the line that follows.
 *
 * Arena: one memfd mapping of config.size bytes, 4 KiB pages, contiguous runs; locked in memory when RLIMIT_MEMLOCK
 * allows, MADV_DONTDUMP always, MADV_WIPEONFORK not needed; every run is wiped when it is freed. Memory that was never
 * used is never touched.
 *
 * Threads: every function on any thread. A lookup that hits takes no lock and writes nothing that another lookup
 * writes, but for the entry's pins. Locks: the index is sharded, one lock a shard; the eviction list has one, the arena
 * has one; each is held for a few instructions (a shard's for some 10 us when its table grows), never across a
 * callback. Order: shards by address, then list or arena. Callbacks run without any lock of l1 and may call any
 * function of it. Errors: NULL or negative errno.
 */
#ifndef SESSIONFS_L1_H
#define SESSIONFS_L1_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define L1_PAGE           4096u
#define L1_NAME_MAX       255
#define L1_NAME_SHORT_MAX 48

struct l1;

/*
 * Private to l1, but for being embedded, and for dir, name and name_size, which whoever has it pinned may read while no
 * l1_rename() of it can run. The name does not end with a NUL byte. Zero-initialised by the owner.
 */
struct l1_entry {
    /* the line that a lookup touches; dir, name_size and short_name change only while no reader can see the entry */
    uint64_t dir;
    _Atomic uint32_t pins; /* 1 -> 0 under the shard's lock only */
    uint8_t name_size;
    _Atomic uint8_t used;               /* SIEVE's visited bit */
    uint8_t is_resident;                /* in the eviction list; list lock */
    uint8_t is_indexed;                 /* shard lock */
    char short_name[L1_NAME_SHORT_MAX]; /* the name, if it fits */

    _Atomic uint64_t hash;          /* of dir and name, names the shard; changes under the locks of both shards */
    char *name;                     /* = short_name, or malloc()ed; owned */
    struct l1_entry *newer, *older; /* eviction list; list lock */
};

struct l1_config {
    size_t size;                /* bytes of the arena, rounded up to pages */
    void *(*make)(void *owner); /* a new zeroed struct that starts with l1_entry, or NULL: out of memory */
    /* The last pin is gone and it is out of the index: free it. Its name is wiped already. (Also called for a struct
       that make() has just given, when another thread was faster to make an entry of that name.) */
    void (*release)(void *owner, struct l1_entry *entry);
    /* Give up the content of @entry (pinned for the call): l1_set_resident(false), free its pages, drop the pin of the
       content. Return true if something was freed, false if it must stay (unsaved, busy: use a trylock). */
    bool (*evict)(void *owner, struct l1_entry *entry);
    void *owner;
};

/** l1_new() - Return: 0, -EINVAL (size 0, a callback missing), -ENOMEM, or what memfd_create(2) and mmap(2) say. */
int l1_new(struct l1 **ret, const struct l1_config *config);
void l1_free(struct l1 *l1); /* every entry must be gone */

/** l1_find() - the entry of that name, pinned, marked as used; NULL if there is none. */
struct l1_entry *l1_find(struct l1 *l1, uint64_t dir, const char *name, size_t size);

/** l1_get() - the same, made (config.make), not marked, if there is none. NULL: out of memory. *@is_new tells. */
struct l1_entry *l1_get(struct l1 *l1, uint64_t dir, const char *name, size_t size, bool *is_new);

void l1_pin(struct l1_entry *entry); /* by one who has a pin */
void l1_unpin(struct l1 *l1, struct l1_entry *entry);

/** l1_forget() - take it out of the index; it lives on for those who have it pinned. False if it was out already. */
bool l1_forget(struct l1 *l1, struct l1_entry *entry);

/**
 * l1_rename() - give @entry (indexed or not) another name; an entry that had the name is taken out of the index first
 * One step for everybody else: a lookup sees the names as they were before, or as they are after. The caller has a pin.
 * Return: 0, -ENOMEM (then nothing changed).
 */
int l1_rename(struct l1 *l1, struct l1_entry *entry, uint64_t dir, const char *name, size_t size);

/**
 * l1_set_resident() - @entry got content (true: enters the eviction list as newest, not yet used) or lost it (false)
 * What is in already keeps its place and its mark.
 */
void l1_set_resident(struct l1 *l1, struct l1_entry *entry, bool is_resident);

static inline void l1_mark_used(struct l1_entry *entry)
{
    if (!atomic_load_explicit(&entry->used, memory_order_relaxed))
        atomic_store_explicit(&entry->used, 1, memory_order_relaxed);
}

/**
 * l1_pages_get() - a run of pages of at least @size bytes (> 0), evicting what SIEVE chooses until there is room
 * Call it without holding what config.evict() locks. The bytes are zero. NULL: no room even after trying every entry
 * once.
 */
void *l1_pages_get(struct l1 *l1, size_t size);

/**
 * l1_pages_own() - say whose content a run (same @size) is, so that room for a large run can be made by evicting
 * neighbours Without it room for a large run is found only by evicting nearly everything that is small. Call it while
 * nobody else can give the run back, and again when the run passes to another entry. Give it back before the entry's
 * last pin goes.
 */
void l1_pages_own(struct l1 *l1, void *pages, size_t size, struct l1_entry *entry);

/** l1_pages_put() - give a run back (same @size); wiped here. */
void l1_pages_put(struct l1 *l1, void *pages, size_t size);

/**
 * l1_walk() - @visit each indexed entry (pinned for the call, no lock held; entries come and go meanwhile)
 * What is indexed under one name from begin to end is visited exactly once.
 */
void l1_walk(struct l1 *l1, void (*visit)(void *arg, struct l1_entry *entry), void *arg);

struct l1_stats {
    uint64_t n_entries, n_evictions, bytes_used, bytes_total; /* indexed entries; bytes of the arena */
    uint64_t bytes_index;                                     /* what the index takes besides the entries */
    bool is_locked;                                           /* in memory (mlock) */
};
void l1_stats(struct l1 *l1, struct l1_stats *ret);

#endif
