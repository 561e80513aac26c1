#include "seal/blob.h"

#include <assert.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <string.h>

#include "base/macros.h"
#include "seal/bytes.h"
#include "seal/keys.h"
#include "seal/meta.h"
#include "seal/thread.h"
#include "seal/xaes.h"

#define FORMAT            1
#define NONCE_SECTION_BIT 1 /* in the nonce's last byte: clear for the metadata, set for the content */

enum {
    AT_MAGIC = 0,
    AT_FORMAT = 4,
    AT_STATE = SEAL_STATE_OFFSET,
    AT_HEADER_SIZE = 6,
    AT_KEY_ID = 8,
    AT_META_SIZE = 12,
    AT_CONTENT_SIZE = 16,
    AT_VERSION = SEAL_VERSION_OFFSET,
    AT_NONCE = 40,
};
_Static_assert(AT_NONCE + SEAL_NONCE_BYTES == SEAL_HEADER_BYTES, "the fields fill the header");
_Static_assert(SEAL_NONCE_BYTES == XAES_NONCE_BYTES && SEAL_TAG_BYTES == XAES_TAG_BYTES, "one cipher, two names");

enum section { SECTION_META = 'M', SECTION_CONTENT = 'C' };

/* The L2 key of the session: which blob this is. */
struct place {
    const char *key;
    size_t key_size;
};

/* What a blob is made of, but for the content. */
struct recipe {
    const struct seal_keys *keys;
    struct place place;
    struct seal_version version;
    enum seal_state state;
    const struct seal_meta *meta;
    uint64_t content_size;
    uint8_t nonce[SEAL_NONCE_BYTES];
};

struct seal_stream {
    struct xaes *aead; /* &own, or the thread's for a call that begins and ends the stream */
    struct xaes own;
    uint64_t left; /* content bytes still to come */
    bool sealing;
    int error; /* the first one: what follows fails alike */
};

static void head_encode(const struct seal_head *head, uint8_t out[SEAL_HEADER_BYTES])
{
    memcpy(out + AT_MAGIC, "SFSB", 4);
    out[AT_FORMAT] = FORMAT;
    out[AT_STATE] = (uint8_t)head->state;
    put_le16(out + AT_HEADER_SIZE, SEAL_HEADER_BYTES);
    put_le32(out + AT_KEY_ID, head->key_id);
    put_le32(out + AT_META_SIZE, head->meta_size);
    put_le64(out + AT_CONTENT_SIZE, head->content_size);
    put_le64(out + AT_VERSION, head->version.seq);
    put_le64(out + AT_VERSION + 8, head->version.unique);
    memcpy(out + AT_NONCE, head->nonce, SEAL_NONCE_BYTES);
}

int seal_head(const void *blob, size_t size, struct seal_head *ret)
{
    const uint8_t *in = blob;

    if (size < SEAL_HEADER_BYTES || memcmp(in + AT_MAGIC, "SFSB", 4) != 0 || in[AT_FORMAT] != FORMAT ||
        get_le16(in + AT_HEADER_SIZE) != SEAL_HEADER_BYTES)
        return -EBADMSG;
    if (in[AT_STATE] != SEAL_STATE_FINISHED && in[AT_STATE] != SEAL_STATE_OPEN)
        return -EBADMSG;

    struct seal_head head = {
        .state = in[AT_STATE],
        .key_id = get_le32(in + AT_KEY_ID),
        .meta_size = get_le32(in + AT_META_SIZE),
        .content_size = get_le64(in + AT_CONTENT_SIZE),
        .version = {get_le64(in + AT_VERSION), get_le64(in + AT_VERSION + 8)},
    };
    memcpy(head.nonce, in + AT_NONCE, SEAL_NONCE_BYTES);
    if (head.meta_size > SEAL_META_MAX || head.content_size > XAES_SIZE_MAX ||
        head.nonce[SEAL_NONCE_BYTES - 1] & NONCE_SECTION_BIT)
        return -EBADMSG;
    *ret = head;
    return 0;
}

size_t seal_blob_offset(const struct seal_head *head)
{
    return SEAL_HEADER_BYTES + (size_t)head->meta_size + SEAL_TAG_BYTES;
}

size_t seal_blob_size(const struct seal_meta *meta, size_t content_size)
{
    return SEAL_HEADER_BYTES + seal_meta_size(meta) + SEAL_TAG_BYTES + content_size + SEAL_TAG_BYTES;
}

/* Sets nonce and associated data of a section: the place, the header with state 0, the section's letter. */
static int section_start(struct xaes *aead, const struct xaes_key *key, struct place place, const uint8_t *header,
                         enum section section, bool sealing)
{
    uint8_t nonce[SEAL_NONCE_BYTES], place_size[4], tail[SEAL_HEADER_BYTES + 1];

    assert(place.key_size <= UINT32_MAX);
    put_le32(place_size, (uint32_t)place.key_size);
    memcpy(tail, header, SEAL_HEADER_BYTES);
    tail[AT_STATE] = 0;
    tail[SEAL_HEADER_BYTES] = (uint8_t)section;
    memcpy(nonce, header + AT_NONCE, SEAL_NONCE_BYTES);
    if (section == SECTION_CONTENT)
        nonce[SEAL_NONCE_BYTES - 1] |= NONCE_SECTION_BIT;

    int r = xaes_start(aead, key, nonce, sealing);
    if (r == 0)
        r = xaes_associate(aead, place_size, sizeof(place_size));
    if (r == 0)
        r = xaes_associate(aead, place.key, place.key_size);
    if (r == 0)
        r = xaes_associate(aead, tail, sizeof(tail));
    return r;
}

/* Encodes in place, then encrypts in place. */
static int seal_meta_section(struct xaes *aead, const struct xaes_key *key, const struct recipe *recipe, uint8_t *out)
{
    uint8_t *section = out + SEAL_HEADER_BYTES;
    size_t size = seal_meta_size(recipe->meta);

    meta_encode(recipe->meta, section);
    int r = section_start(aead, key, recipe->place, out, SECTION_META, true);
    if (r == 0)
        r = xaes_update(aead, section, size, section);
    if (r == 0)
        r = xaes_tag(aead, section + size);
    return r;
}

static int begin_sealing(struct seal_stream *stream, const struct recipe *recipe, uint8_t *out)
{
    struct seal_head head = {
        .state = recipe->state,
        .content_size = recipe->content_size,
        .version = recipe->version,
    };
    const struct xaes_key *key = keys_get_sealing(recipe->keys, &head.key_id);

    int r = meta_check(recipe->meta);
    if (r < 0)
        return r;
    if (recipe->content_size > XAES_SIZE_MAX)
        return -EFBIG;
    head.meta_size = (uint32_t)seal_meta_size(recipe->meta);
    memcpy(head.nonce, recipe->nonce, SEAL_NONCE_BYTES);
    head.nonce[SEAL_NONCE_BYTES - 1] &= (uint8_t)~NONCE_SECTION_BIT;
    head_encode(&head, out);

    r = seal_meta_section(stream->aead, key, recipe, out);
    if (r == 0)
        r = section_start(stream->aead, key, recipe->place, out, SECTION_CONTENT, true);
    if (r < 0)
        OPENSSL_cleanse(out, seal_blob_offset(&head));
    stream->left = recipe->content_size;
    stream->sealing = true;
    return r;
}

static int begin_opening(struct seal_stream *stream, const struct seal_keys *keys, struct place place,
                         const uint8_t *header)
{
    struct seal_head head;

    int r = seal_head(header, SEAL_HEADER_BYTES, &head);
    if (r < 0)
        return r;
    const struct xaes_key *key = keys_get_opening(keys, head.key_id);
    if (!key)
        return -ENOKEY;
    stream->left = head.content_size;
    stream->sealing = false;
    return section_start(stream->aead, key, place, header, SECTION_CONTENT, false);
}

/* More or less content than announced: our own caller's mistake when sealing, a damaged blob when opening. */
static int wrong_size(const struct seal_stream *stream)
{
    return stream->sealing ? -EINVAL : -EBADMSG;
}

int seal_stream_update(struct seal_stream *stream, const void *in, size_t size, void *out)
{
    if (stream->error == 0 && size > stream->left)
        stream->error = wrong_size(stream);
    if (stream->error == 0)
        stream->error = xaes_update(stream->aead, in, size, out);
    if (stream->error == 0)
        stream->left -= size;
    return stream->error;
}

static int finish(struct seal_stream *stream, uint8_t tag[SEAL_TAG_BYTES])
{
    if (stream->error == 0 && stream->left > 0)
        stream->error = wrong_size(stream);
    if (stream->error < 0)
        return stream->error;
    return stream->sealing ? xaes_tag(stream->aead, tag) : xaes_check(stream->aead, tag);
}

int blob_seal(const struct seal_keys *keys, const char *key, size_t key_size, struct seal_version version,
              enum seal_state state, const struct seal_meta *meta, const void *content, size_t content_size,
              const uint8_t nonce[SEAL_NONCE_BYTES], void *out)
{
    struct recipe recipe = {keys, {key, key_size}, version, state, meta, content_size, {0}};
    struct thread_state *thread = thread_state_get();
    size_t offset = SEAL_HEADER_BYTES + seal_meta_size(meta) + SEAL_TAG_BYTES;
    uint8_t *sealed = (uint8_t *)out + offset;

    if (!thread)
        return -ENOMEM;
    struct seal_stream stream = {.aead = &thread->aead};
    memcpy(recipe.nonce, nonce, SEAL_NONCE_BYTES);
    int r = begin_sealing(&stream, &recipe, out);
    if (r < 0)
        return r;
    r = seal_stream_update(&stream, content, content_size, sealed);
    if (r == 0)
        r = finish(&stream, sealed + content_size);
    if (r < 0)
        OPENSSL_cleanse(out, offset + content_size + SEAL_TAG_BYTES);
    return r;
}

int seal_blob(const struct seal_keys *keys, const char *key, size_t key_size, struct seal_version version,
              enum seal_state state, const struct seal_meta *meta, const void *content, size_t content_size, void *out)
{
    uint8_t nonce[SEAL_NONCE_BYTES];

    seal_random(nonce, sizeof(nonce));
    return blob_seal(keys, key, key_size, version, state, meta, content, content_size, nonce, out);
}

static int decrypt_meta(const struct seal_keys *keys, const struct seal_head *head, struct place place,
                        const uint8_t *blob, uint8_t *out)
{
    const struct xaes_key *key = keys_get_opening(keys, head->key_id);
    struct thread_state *state = thread_state_get();
    const uint8_t *section = blob + SEAL_HEADER_BYTES;

    if (!key)
        return -ENOKEY;
    if (!state)
        return -ENOMEM;
    int r = section_start(&state->aead, key, place, blob, SECTION_META, false);
    if (r == 0)
        r = xaes_update(&state->aead, section, head->meta_size, out);
    if (r == 0)
        r = xaes_check(&state->aead, section + head->meta_size);
    return r;
}

int seal_open_meta(const struct seal_keys *keys, const char *key, size_t key_size, const void *blob, size_t size,
                   void *buffer, struct seal_meta *ret)
{
    struct seal_head head;

    int r = seal_head(blob, size, &head);
    if (r < 0)
        return r;
    if (size < seal_blob_offset(&head))
        return -EBADMSG;
    r = decrypt_meta(keys, &head, (struct place){key, key_size}, blob, buffer);
    if (r == 0)
        r = meta_decode(buffer, head.meta_size, ret);
    if (r < 0)
        OPENSSL_cleanse(buffer, head.meta_size);
    return r;
}

int seal_open_content(const struct seal_keys *keys, const char *key, size_t key_size, const void *blob, size_t size,
                      void *out)
{
    struct thread_state *state = thread_state_get();
    struct seal_head head;
    uint8_t tag[SEAL_TAG_BYTES];

    int r = seal_head(blob, size, &head);
    if (r < 0)
        return r;
    if (size < seal_blob_offset(&head) + SEAL_TAG_BYTES ||
        head.content_size != size - seal_blob_offset(&head) - SEAL_TAG_BYTES)
        return -EBADMSG;
    if (!state)
        return -ENOMEM;

    const uint8_t *sealed = (const uint8_t *)blob + seal_blob_offset(&head);
    struct seal_stream stream = {.aead = &state->aead};
    memcpy(tag, sealed + head.content_size, sizeof(tag));
    r = begin_opening(&stream, keys, (struct place){key, key_size}, blob);
    if (r == 0)
        r = seal_stream_update(&stream, sealed, (size_t)head.content_size, out);
    if (r == 0)
        r = finish(&stream, tag);
    if (r < 0 && head.content_size > 0)
        OPENSSL_cleanse(out, (size_t)head.content_size);
    return r;
}

DEFINE_CLEANUP(struct seal_stream *, seal_stream_free)

static int stream_new(struct seal_stream **ret)
{
    CLEANUP(seal_stream_freep) struct seal_stream *stream = calloc(1, sizeof(*stream));

    if (!stream)
        return -ENOMEM;
    stream->aead = &stream->own;
    int r = xaes_init(&stream->own);
    if (r < 0)
        return r;
    *ret = TAKE(stream);
    return 0;
}

int seal_blob_begin(struct seal_stream **ret, const struct seal_keys *keys, const char *key, size_t key_size,
                    struct seal_version version, enum seal_state state, const struct seal_meta *meta,
                    size_t content_size, void *out)
{
    struct recipe recipe = {keys, {key, key_size}, version, state, meta, content_size, {0}};
    CLEANUP(seal_stream_freep) struct seal_stream *stream = NULL;

    int r = stream_new(&stream);
    if (r < 0)
        return r;
    seal_random(recipe.nonce, sizeof(recipe.nonce));
    r = begin_sealing(stream, &recipe, out);
    if (r < 0)
        return r;
    *ret = TAKE(stream);
    return 0;
}

int seal_open_begin(struct seal_stream **ret, const struct seal_keys *keys, const char *key, size_t key_size,
                    const void *header)
{
    CLEANUP(seal_stream_freep) struct seal_stream *stream = NULL;

    int r = stream_new(&stream);
    if (r < 0)
        return r;
    r = begin_opening(stream, keys, (struct place){key, key_size}, header);
    if (r < 0)
        return r;
    *ret = TAKE(stream);
    return 0;
}

int seal_stream_finish(struct seal_stream *stream, uint8_t tag[SEAL_TAG_BYTES])
{
    int r = finish(stream, tag);

    seal_stream_free(stream);
    return r;
}

void seal_stream_free(struct seal_stream *stream)
{
    if (!stream)
        return;
    xaes_deinit(&stream->own);
    free(stream);
}
