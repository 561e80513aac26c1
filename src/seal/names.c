#include <errno.h>
#include <openssl/err.h>
#include <string.h>

#include <sessionfs/seal.h>

#include "seal/keys.h"
#include "seal/thread.h"

static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/* HMAC-SHA-256 written out (RFC 2104): OpenSSL's own would keep the key in each thread's context. */
static bool hmac(EVP_MD_CTX *digest, const struct name_key *key, const uint8_t dir[SEAL_ID_BYTES], const char *name,
                 size_t length, uint8_t out[32])
{
    return EVP_DigestInit_ex2(digest, NULL, NULL) && EVP_DigestUpdate(digest, key->inner, sizeof(key->inner)) &&
           EVP_DigestUpdate(digest, dir, SEAL_ID_BYTES) && EVP_DigestUpdate(digest, name, length) &&
           EVP_DigestFinal_ex(digest, out, NULL) && EVP_DigestInit_ex2(digest, NULL, NULL) &&
           EVP_DigestUpdate(digest, key->outer, sizeof(key->outer)) && EVP_DigestUpdate(digest, out, 32) &&
           EVP_DigestFinal_ex(digest, out, NULL);
}

int seal_name(const struct seal_keys *keys, const uint8_t dir[SEAL_ID_BYTES], const char *name, size_t length,
              uint8_t ret[SEAL_ID_BYTES])
{
    struct thread_state *state = thread_state_get();
    uint8_t hash[32];

    if (!state || !hmac(state->digest, keys_get_names(keys), dir, name, length, hash)) {
        ERR_clear_error();
        return state ? -EIO : -ENOMEM;
    }
    memcpy(ret, hash, SEAL_ID_BYTES);
    return 0;
}

void seal_id_format(const uint8_t id[SEAL_ID_BYTES], char out[SEAL_ID_TEXT])
{
    uint32_t bits = 0;
    int n_bits = 0;

    for (int i = 0; i < SEAL_ID_BYTES; i++) {
        bits = bits << 8 | id[i];
        for (n_bits += 8; n_bits >= 6; n_bits -= 6)
            *out++ = alphabet[bits >> (n_bits - 6) & 63];
    }
    *out = alphabet[bits << (6 - n_bits) & 63]; /* the last 2 bits, then 4 zero bits */
}

static int digit(char c)
{
    if (c >= 'A' && c <= 'Z')
        return c - 'A';
    if (c >= 'a' && c <= 'z')
        return c - 'a' + 26;
    if (c >= '0' && c <= '9')
        return c - '0' + 52;
    return c == '-' ? 62 : c == '_' ? 63 : -1;
}

/* Strict: one text for each id, so the four bits beyond the id must be zero. */
int seal_id_parse(const char text[SEAL_ID_TEXT], uint8_t ret[SEAL_ID_BYTES])
{
    uint8_t id[SEAL_ID_BYTES], *next = id;
    uint32_t bits = 0;
    int n_bits = 0;

    for (int i = 0; i < SEAL_ID_TEXT; i++) {
        int value = digit(text[i]);

        if (value < 0)
            return -EINVAL;
        bits = bits << 6 | (uint32_t)value;
        n_bits += 6;
        if (n_bits >= 8) {
            n_bits -= 8;
            *next++ = (uint8_t)(bits >> n_bits);
        }
    }
    if (bits & 15)
        return -EINVAL;
    memcpy(ret, id, SEAL_ID_BYTES);
    return 0;
}
