#include "seal/thread.h"

#include <openssl/kdf.h>
#include <pthread.h>
#include <stdlib.h>

#include "base/macros.h"
#include "seal/random.h"

static pthread_once_t once = PTHREAD_ONCE_INIT;
/* Set by set_up(), then read-only. Never freed: other threads may still run at exit(). */
static struct algorithms algorithms;
static bool is_ready;
static pthread_key_t at_thread_end;

static __thread struct thread_state *mine;

static void thread_state_free(struct thread_state *state)
{
    EVP_CIPHER_CTX_free(state->derive); /* OpenSSL wipes the key schedules */
    EVP_MD_CTX_free(state->digest);
    xaes_deinit(&state->aead);
    random_pool_free(state->pool);
    free(state);
}

DEFINE_CLEANUP(struct thread_state *, thread_state_free)

static void end_thread(void *state)
{
    mine = NULL;
    thread_state_free(state);
}

/* The main thread's: pthread keys have no say at exit(). Registered after OpenSSL's handler, so it runs before it. */
static void end_process(void)
{
    if (!mine)
        return;
    pthread_setspecific(at_thread_end, NULL);
    end_thread(mine);
}

static void set_up(void)
{
    OPENSSL_init_crypto(0, NULL);
    algorithms.aes_ecb = EVP_CIPHER_fetch(NULL, "AES-256-ECB", NULL);
    algorithms.aes_gcm = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
    algorithms.sha256 = EVP_MD_fetch(NULL, "SHA2-256", NULL);
    algorithms.hkdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
    is_ready = algorithms.aes_ecb && algorithms.aes_gcm && algorithms.sha256 && algorithms.hkdf &&
               pthread_key_create(&at_thread_end, end_thread) == 0 && atexit(end_process) == 0;
}

const struct algorithms *algorithms_get(void)
{
    pthread_once(&once, set_up);
    return is_ready ? &algorithms : NULL;
}

static struct thread_state *thread_state_new(void)
{
    CLEANUP(thread_state_freep) struct thread_state *state = NULL;
    const struct algorithms *get = algorithms_get();

    if (!get)
        return NULL;
    state = calloc(1, sizeof(*state));
    if (!state)
        return NULL;
    state->derive = EVP_CIPHER_CTX_new();
    state->digest = EVP_MD_CTX_new();
    if (!state->derive || !state->digest || xaes_init(&state->aead) < 0)
        return NULL;
    if (!EVP_CipherInit_ex2(state->derive, get->aes_ecb, NULL, NULL, 1, NULL) ||
        !EVP_CIPHER_CTX_set_padding(state->derive, 0) || !EVP_DigestInit_ex2(state->digest, get->sha256, NULL))
        return NULL;
    if (pthread_setspecific(at_thread_end, state) != 0)
        return NULL;
    return TAKE(state);
}

struct thread_state *thread_state_get(void)
{
    if (UNLIKELY(!mine))
        mine = thread_state_new();
    return mine;
}
