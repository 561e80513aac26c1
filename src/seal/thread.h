/*
 * What each thread keeps ready: OpenSSL contexts, which are dear to make and may not be shared, and a pool of random
 * bytes. None of it belongs to a particular struct seal_keys, so that any number of them may come and go.
 * Ownership: made at a thread's first use, wiped and freed when it ends (that of the main thread at exit()).
 * Threads: every function may run on any thread; what they lend is the calling thread's alone.
 * Errors: NULL when memory, or the algorithm in OpenSSL, is missing.
 */
#ifndef SESSIONFS_SEAL_THREAD_H
#define SESSIONFS_SEAL_THREAD_H

#include <openssl/evp.h>

#include "seal/xaes.h"

/* Fetched once for the process: a fetch by name at every call would cost more than the encryption. */
struct algorithms {
    EVP_CIPHER *aes_ecb, *aes_gcm;
    EVP_MD *sha256;
    EVP_KDF *hkdf;
};

struct random_pool;

struct thread_state {
    EVP_CIPHER_CTX *derive;   /* AES-256-ECB; holds a key of zeros between calls */
    EVP_MD_CTX *digest;       /* SHA-256 */
    struct xaes aead;         /* for what begins and ends in one call; remembers the subkey of one blob */
    struct random_pool *pool; /* random.c's; NULL until the first use */
};

const struct algorithms *algorithms_get(void);
struct thread_state *thread_state_get(void);

#endif
