#include "seal/xaes.h"

#include <assert.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <stdatomic.h>
#include <string.h>

#include "base/macros.h"
#include "seal/thread.h"

#define PIECE_MAX (1u << 30) /* OpenSSL counts in int */

/* TLS reads the same error queue: what failed here must not be taken for a failure there. */
static int fail(int error)
{
    ERR_clear_error();
    return error;
}

/* Encrypts @n_blocks blocks in place; the context forgets the key again. */
static int aes_blocks(const uint8_t key[XAES_KEY_BYTES], uint8_t *blocks, int n_blocks)
{
    static const uint8_t no_key[XAES_KEY_BYTES];
    struct thread_state *state = thread_state_get();
    int size;

    if (!state)
        return fail(-ENOMEM);
    bool ok = EVP_CipherInit_ex2(state->derive, NULL, key, NULL, 1, NULL) &&
              EVP_EncryptUpdate(state->derive, blocks, &size, blocks, 16 * n_blocks) && size == 16 * n_blocks;
    return EVP_CipherInit_ex2(state->derive, NULL, no_key, NULL, 1, NULL) && ok ? 0 : fail(-EIO);
}

int xaes_key_init(struct xaes_key *ret, const uint8_t key[XAES_KEY_BYTES])
{
    static _Atomic uint64_t last_serial;
    uint8_t l[16] = {0};

    int r = aes_blocks(key, l, 1);
    if (r < 0)
        return r;
    memcpy(ret->key, key, sizeof(ret->key));
    for (int i = 0; i < 16; i++)
        ret->k1[i] = (uint8_t)(l[i] << 1 | (i < 15 ? l[i + 1] >> 7 : 0));
    ret->k1[15] ^= (uint8_t)(-(l[0] >> 7) & 0x87); /* without a branch on a secret */
    ret->serial = atomic_fetch_add(&last_serial, 1) + 1;
    OPENSSL_cleanse(l, sizeof(l));
    return 0;
}

static int derive(const struct xaes_key *key, const uint8_t prefix[XAES_PREFIX_BYTES], uint8_t subkey[XAES_KEY_BYTES])
{
    for (uint8_t half = 0; half < 2; half++) {
        uint8_t *block = subkey + 16 * half;
        const uint8_t label[4] = {0, half + 1, 'X', 0};

        memcpy(block, label, sizeof(label));
        memcpy(block + sizeof(label), prefix, XAES_PREFIX_BYTES);
        for (int i = 0; i < 16; i++)
            block[i] ^= key->k1[i];
    }
    return aes_blocks(key->key, subkey, 2);
}

int xaes_init(struct xaes *xaes)
{
    const struct algorithms *get = algorithms_get();

    memset(xaes, 0, sizeof(*xaes));
    if (!get)
        return fail(-EIO);
    xaes->gcm = EVP_CIPHER_CTX_new();
    if (!xaes->gcm)
        return fail(-ENOMEM);
    return EVP_CipherInit_ex2(xaes->gcm, get->aes_gcm, NULL, NULL, 1, NULL) ? 0 : fail(-EIO);
}

void xaes_deinit(struct xaes *xaes)
{
    EVP_CIPHER_CTX_free(xaes->gcm); /* OpenSSL wipes the key schedule */
    memset(xaes, 0, sizeof(*xaes));
}

static int set_subkey(struct xaes *xaes, const struct xaes_key *key, const uint8_t prefix[XAES_PREFIX_BYTES])
{
    uint8_t subkey[XAES_KEY_BYTES];

    xaes->serial = 0;
    int r = derive(key, prefix, subkey);
    if (r == 0 && !EVP_CipherInit_ex2(xaes->gcm, NULL, subkey, NULL, 1, NULL))
        r = fail(-EIO);
    OPENSSL_cleanse(subkey, sizeof(subkey));
    if (r < 0)
        return r;
    xaes->serial = key->serial;
    memcpy(xaes->prefix, prefix, XAES_PREFIX_BYTES);
    return 0;
}

int xaes_start(struct xaes *xaes, const struct xaes_key *key, const uint8_t nonce[XAES_NONCE_BYTES], bool sealing)
{
    if (xaes->serial != key->serial || memcmp(xaes->prefix, nonce, XAES_PREFIX_BYTES) != 0) {
        int r = set_subkey(xaes, key, nonce);
        if (r < 0)
            return r;
    }
    return EVP_CipherInit_ex2(xaes->gcm, NULL, NULL, nonce + XAES_PREFIX_BYTES, sealing, NULL) ? 0 : fail(-EIO);
}

static int update(struct xaes *xaes, const uint8_t *in, size_t size, uint8_t *out)
{
    while (size > 0) {
        int piece = size < PIECE_MAX ? (int)size : (int)PIECE_MAX, done;

        if (!EVP_CipherUpdate(xaes->gcm, out, &done, in, piece) || done != piece)
            return fail(-EIO);
        in += piece;
        size -= (size_t)piece;
        if (out)
            out += piece;
    }
    return 0;
}

int xaes_associate(struct xaes *xaes, const void *data, size_t size)
{
    return update(xaes, data, size, NULL);
}

int xaes_update(struct xaes *xaes, const void *in, size_t size, void *out)
{
    assert(out || size == 0); /* OpenSSL would take it for associated data */
    return update(xaes, in, size, out);
}

int xaes_tag(struct xaes *xaes, uint8_t tag[XAES_TAG_BYTES])
{
    uint8_t rest[16];
    int size;

    if (!EVP_CipherFinal_ex(xaes->gcm, rest, &size) ||
        !EVP_CIPHER_CTX_ctrl(xaes->gcm, EVP_CTRL_AEAD_GET_TAG, XAES_TAG_BYTES, tag))
        return fail(-EIO);
    return 0;
}

int xaes_check(struct xaes *xaes, const uint8_t tag[XAES_TAG_BYTES])
{
    uint8_t expected[XAES_TAG_BYTES], rest[16];
    int size;

    memcpy(expected, tag, sizeof(expected));
    if (!EVP_CIPHER_CTX_ctrl(xaes->gcm, EVP_CTRL_AEAD_SET_TAG, XAES_TAG_BYTES, expected))
        return fail(-EIO);
    return EVP_CipherFinal_ex(xaes->gcm, rest, &size) ? 0 : fail(-EBADMSG);
}
