/*
 * XAES-256-GCM (C2SP): AES-256-GCM under a subkey that is derived from the key and the first half of a 192-bit nonce.
 *
 *   K1 = L << 1, xor 0x87 if the top bit of L is set, where L = AES_K(0^128)
 *   Kx = AES_K(M1 xor K1) || AES_K(M2 xor K1), M1 = 00 01 'X' 00 || N[:12], M2 = 00 02 'X' 00 || N[:12]
 *   result = AES-256-GCM under Kx with the nonce N[12:]
 *
 * Ownership: a struct xaes_key is the caller's, to be wiped by him; a struct xaes owns its context.
 * Threads: a struct xaes_key is read-only after xaes_key_init(); a struct xaes is used by one thread at a time.
 * Errors: -ENOMEM, -EIO (OpenSSL failed), -EBADMSG from xaes_check() only. OpenSSL's error queue is left empty.
 */
#ifndef SESSIONFS_SEAL_XAES_H
#define SESSIONFS_SEAL_XAES_H

#include <openssl/types.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define XAES_KEY_BYTES    32
#define XAES_NONCE_BYTES  24
#define XAES_PREFIX_BYTES 12 /* the part of the nonce that makes the subkey */
#define XAES_TAG_BYTES    16
#define XAES_SIZE_MAX     ((UINT64_C(1) << 36) - 32) /* AES-GCM's bound for one message */

struct xaes_key {
    uint64_t serial; /* never the same for two keys in a process, never 0 */
    uint8_t key[XAES_KEY_BYTES], k1[16];
};

/* One message at a time. Keeps the last subkey, so that the next message under the same prefix derives nothing. */
struct xaes {
    EVP_CIPHER_CTX *gcm;
    uint64_t serial; /* of the key whose subkey gcm holds; 0 none */
    uint8_t prefix[XAES_PREFIX_BYTES];
};

int xaes_key_init(struct xaes_key *ret, const uint8_t key[XAES_KEY_BYTES]);

int xaes_init(struct xaes *xaes);
void xaes_deinit(struct xaes *xaes); /* wipes; fine on zeros */

/* A message: start, associated data in any number of pieces, text in any number of pieces, then one of the two ends. */
int xaes_start(struct xaes *xaes, const struct xaes_key *key, const uint8_t nonce[XAES_NONCE_BYTES], bool sealing);
int xaes_associate(struct xaes *xaes, const void *data, size_t size);
int xaes_update(struct xaes *xaes, const void *in, size_t size, void *out);
int xaes_tag(struct xaes *xaes, uint8_t tag[XAES_TAG_BYTES]);
int xaes_check(struct xaes *xaes, const uint8_t tag[XAES_TAG_BYTES]);

#endif
