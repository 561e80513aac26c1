#include "seal/random.h"

#include <limits.h>
#include <openssl/crypto.h>
#include <openssl/rand.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <sessionfs/seal.h>

#include "base/macros.h"
#include "seal/thread.h"

#define POOL_REQUEST_MAX 64 /* what is larger is not worth a copy */

struct random_pool {
    uint32_t left; /* bytes not yet given away, at the start of bytes[]; 0 in a forked child */
    uint8_t bytes[1024];
};

/* NULL when the kernel cannot promise to clear it on fork: then there is no pool. */
static struct random_pool *random_pool_new(void)
{
    struct random_pool *pool = mmap(NULL, sizeof(*pool), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (pool == MAP_FAILED)
        return NULL;
    if (madvise(pool, sizeof(*pool), MADV_WIPEONFORK) < 0) {
        munmap(pool, sizeof(*pool));
        return NULL;
    }
    madvise(pool, sizeof(*pool), MADV_DONTDUMP);
    return pool;
}

void random_pool_free(struct random_pool *pool)
{
    if (!pool)
        return;
    OPENSSL_cleanse(pool, sizeof(*pool));
    munmap(pool, sizeof(*pool));
}

static void generate(uint8_t *out, size_t size)
{
    while (size > 0) {
        int piece = size < INT_MAX ? (int)size : INT_MAX;

        if (RAND_bytes(out, piece) != 1) {
            fputs("sessionfs: OpenSSL has no random bytes: cannot go on safely\n", stderr);
            abort();
        }
        out += piece;
        size -= (size_t)piece;
    }
}

static struct random_pool *get_pool(void)
{
    struct thread_state *state = thread_state_get();

    if (!state)
        return NULL;
    if (UNLIKELY(!state->pool))
        state->pool = random_pool_new();
    return state->pool;
}

void seal_random(void *out, size_t size)
{
    struct random_pool *pool = size <= POOL_REQUEST_MAX ? get_pool() : NULL;

    if (!pool) {
        generate(out, size);
        return;
    }
    if (pool->left < size) {
        generate(pool->bytes, sizeof(pool->bytes));
        pool->left = sizeof(pool->bytes);
    }
    pool->left -= (uint32_t)size;
    memcpy(out, pool->bytes + pool->left, size);
    memset(pool->bytes + pool->left, 0, size); /* given away once, and only once */
}
