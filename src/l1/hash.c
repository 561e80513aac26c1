#include "l1/hash.h"

#include <endian.h>
#include <string.h>

struct sip {
    uint64_t v0, v1, v2, v3;
};

static inline uint64_t rotate(uint64_t x, unsigned n)
{
    return x << n | x >> (64 - n);
}

static inline void sip_round(struct sip *s)
{
    s->v0 += s->v1;
    s->v1 = rotate(s->v1, 13) ^ s->v0;
    s->v0 = rotate(s->v0, 32);
    s->v2 += s->v3;
    s->v3 = rotate(s->v3, 16) ^ s->v2;
    s->v0 += s->v3;
    s->v3 = rotate(s->v3, 21) ^ s->v0;
    s->v2 += s->v1;
    s->v1 = rotate(s->v1, 17) ^ s->v2;
    s->v2 = rotate(s->v2, 32);
}

static inline void sip_word(struct sip *s, uint64_t word)
{
    s->v3 ^= word;
    sip_round(s);
    s->v0 ^= word;
}

static inline uint64_t load_word(const char *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, sizeof(word));
    return le64toh(word);
}

/* The last bytes, fewer than 8, and the size in the byte on top. */
static inline uint64_t tail_word(const char *bytes, size_t n_bytes, size_t size)
{
    uint64_t word = (uint64_t)size << 56;
    for (size_t i = 0; i < n_bytes; i++)
        word |= (uint64_t)(uint8_t)bytes[i] << 8 * i;
    return word;
}

uint64_t hash_name(const struct hash_key *key, uint64_t dir, const char *name, size_t size)
{
    struct sip s = {
        .v0 = key->k0 ^ UINT64_C(0x736f6d6570736575),
        .v1 = key->k1 ^ UINT64_C(0x646f72616e646f6d),
        .v2 = key->k0 ^ UINT64_C(0x6c7967656e657261),
        .v3 = key->k1 ^ UINT64_C(0x7465646279746573),
    };
    sip_word(&s, dir);
    size_t at = 0;
    for (; at + 8 <= size; at += 8)
        sip_word(&s, load_word(name + at));
    sip_word(&s, size % 8 ? tail_word(name + at, size % 8, size + 8) : (uint64_t)(size + 8) << 56);
    s.v2 ^= 0xff;
    sip_round(&s);
    sip_round(&s);
    sip_round(&s);
    return s.v0 ^ s.v1 ^ s.v2 ^ s.v3;
}
