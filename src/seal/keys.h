/*
 * The inside of struct seal_keys: for every master key a data key, and one name key (that of the lowest id). The master
 * keys themselves are not kept. The memory is locked and left out of core dumps where the kernel allows it.
 * Threads: read-only after loading. Errors: as in <sessionfs/seal.h>.
 */
#ifndef SESSIONFS_SEAL_KEYS_H
#define SESSIONFS_SEAL_KEYS_H

#include <sessionfs/seal.h>

#include "seal/xaes.h"

#define KEYS_MAX      64          /* keys in one file */
#define KEYS_FILE_MAX (64 * 1024) /* bytes in one file */

/* HMAC-SHA-256's first block of each pass: the key, padded, xor 0x36 or 0x5c. */
struct name_key {
    uint8_t inner[64], outer[64];
};

/** keys_derive() - the two keys that a master key stands for. */
int keys_derive(const uint8_t master[SEAL_KEY_BYTES], uint8_t data[SEAL_KEY_BYTES], uint8_t names[SEAL_KEY_BYTES]);

const struct xaes_key *keys_get_sealing(const struct seal_keys *keys, uint32_t *ret_id);
const struct xaes_key *keys_get_opening(const struct seal_keys *keys, uint32_t id); /* NULL: we have no such key */
const struct name_key *keys_get_names(const struct seal_keys *keys);

#endif
