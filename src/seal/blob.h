/*
 * Sealing with a nonce of the caller's choice, for test vectors. Everybody else uses seal_blob(): a nonce that comes
 * twice under one key breaks the encryption of both.
 */
#ifndef SESSIONFS_SEAL_BLOB_H
#define SESSIONFS_SEAL_BLOB_H

#include <sessionfs/seal.h>

/** blob_seal() - seal_blob() with @nonce, whose lowest bit of the last byte is cleared. */
int blob_seal(const struct seal_keys *keys, const char *key, size_t key_size, struct seal_version version,
              enum seal_state state, const struct seal_meta *meta, const void *content, size_t content_size,
              const uint8_t nonce[SEAL_NONCE_BYTES], void *out);

#endif
