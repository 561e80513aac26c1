/*
 * The hash of names: SipHash-1-3 with a random key, so that nobody can choose session ids that collide.
 * Threads: no state. Errors: none.
 */
#ifndef SESSIONFS_L1_HASH_H
#define SESSIONFS_L1_HASH_H

#include <stddef.h>
#include <stdint.h>

struct hash_key {
    uint64_t k0, k1;
};

/** hash_name() - of the number @dir followed by the @size bytes of @name. */
uint64_t hash_name(const struct hash_key *key, uint64_t dir, const char *name, size_t size);

#endif
