/* Vectors come from $SESSIONFS_VECTORS, else VECTORS_DIR/seal.json; tests/vectors/seal.py makes and checks them. */
#include <sessionfs/seal.h>

#include <check.h>
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/macros.h"
#include "seal/blob.h"
#include "seal/bytes.h"
#include "seal/keys.h"
#include "seal/meta.h"
#include "seal/xaes.h"

#ifndef VECTORS_DIR
#define VECTORS_DIR "tests/vectors"
#endif

#define HEX_A "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
#define HEX_B "FFEEDDCCBBAA99887766554433221100ffeeddccbbaa99887766554433221100"
#define HEX_C "abababababababababababababababababababababababababababababababab"

static const char place[] = "sfs:web:AAAAAAAAAAAAAAAAAAAAAA:BBBBBBBBBBBBBBBBBBBBBB";
#define PLACE place, (sizeof(place) - 1)

static const struct seal_version version = {7, 0x1122334455667788};

static struct seal_keys *keys;
static struct seal_meta meta;

/* A sealed blob in memory of exactly its size, so that a sanitizer sees each byte read beyond it. */
struct sealed {
    uint8_t *bytes;
    size_t size, offset; /* of the content */
};

static void setup(void)
{
    uint8_t master[SEAL_KEY_BYTES];

    for (int i = 0; i < SEAL_KEY_BYTES; i++)
        master[i] = (uint8_t)i;
    ck_assert_int_eq(seal_keys_new(&keys, master), 0);
    meta = (struct seal_meta){
        .mode = S_IFREG | 0600,
        .uid = 33,
        .gid = 34,
        .policy = SEAL_POLICY_FIXED,
        .ino = 0x0102030405060708,
        .ttl_ms = 1800000,
        .mtime_ns = 1767225600123456789,
        .ctime_ns = -5,
        .created_ns = INT64_MIN,
        .dir_id = {1, 2, 3},
        .name = "sess_0123",
        .name_size = 9,
        .xattrs = "a\0b",
        .xattrs_size = 3,
    };
}

static void teardown(void)
{
    seal_keys_free(keys);
    keys = NULL;
}

static void *copy_of(const void *bytes, size_t size)
{
    void *copy = malloc(size ? size : 1);

    ck_assert_ptr_nonnull(copy);
    if (size)
        memcpy(copy, bytes, size);
    return copy;
}

static uint8_t *pattern(size_t size)
{
    uint8_t *bytes = malloc(size ? size : 1);

    ck_assert_ptr_nonnull(bytes);
    for (size_t i = 0; i < size; i++)
        bytes[i] = (uint8_t)(i * 31 + (i >> 8));
    return bytes;
}

static struct sealed seal_with(const struct seal_keys *with, const void *content, size_t size)
{
    struct sealed blob = {.size = seal_blob_size(&meta, size)};
    struct seal_head head;

    blob.bytes = malloc(blob.size);
    ck_assert_ptr_nonnull(blob.bytes);
    ck_assert_int_eq(seal_blob(with, PLACE, version, SEAL_STATE_FINISHED, &meta, content, size, blob.bytes), 0);
    ck_assert_int_eq(seal_head(blob.bytes, blob.size, &head), 0);
    blob.offset = seal_blob_offset(&head);
    return blob;
}

/* Opens into memory of exactly the announced size; -EBADMSG for a head that does not decode. */
static int try_meta(const struct seal_keys *with, const void *bytes, size_t size, struct seal_meta *ret)
{
    struct seal_meta opened;
    struct seal_head head;

    int r = seal_head(bytes, size, &head);
    if (r < 0)
        return r;
    CLEANUP(freep) void *buffer = malloc(head.meta_size + 1);
    r = seal_open_meta(with, PLACE, bytes, size, buffer, &opened);
    if (r == 0 && ret) {
        *ret = opened;
        ret->name = NULL;
        ret->xattrs = NULL;
    }
    return r;
}

static int try_content(const struct seal_keys *with, const void *bytes, size_t size)
{
    struct seal_head head;

    int r = seal_head(bytes, size, &head);
    if (r < 0)
        return r;
    CLEANUP(freep) uint8_t *out = malloc(head.content_size < 1 << 24 ? head.content_size + 1 : 1);
    return seal_open_content(with, PLACE, bytes, size, out);
}

static size_t unhex(const char *text, uint8_t *out)
{
    size_t n = strlen(text) / 2;

    for (size_t i = 0; i < n; i++)
        ck_assert_int_eq(sscanf(text + 2 * i, "%2hhx", &out[i]), 1);
    return n;
}

/* --- vectors --- */

static cJSON *vectors;

static void vectors_setup(void)
{
    const char *path = getenv("SESSIONFS_VECTORS");
    FILE *file = fopen(path ? path : VECTORS_DIR "/seal.json", "r");
    CLEANUP(freep) char *text = calloc(1, 1 << 16);

    ck_assert_msg(file != NULL, "the vectors are missing: set SESSIONFS_VECTORS");
    ck_assert_uint_lt(fread(text, 1, (1 << 16) - 1, file), (1 << 16) - 1);
    fclose(file);
    vectors = cJSON_Parse(text);
    ck_assert_ptr_nonnull(vectors);
}

static void vectors_teardown(void)
{
    cJSON_Delete(vectors);
    vectors = NULL;
}

static const char *text_of(const cJSON *v, const char *field)
{
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItem(v, field));

    ck_assert_msg(text != NULL, "vector without %s", field);
    return text;
}

static size_t bytes_of(const cJSON *v, const char *field, uint8_t *out)
{
    return unhex(text_of(v, field), out);
}

static uint64_t u64_of(const cJSON *v, const char *field)
{
    return strtoull(text_of(v, field), NULL, 10);
}

static int64_t i64_of(const cJSON *v, const char *field)
{
    return strtoll(text_of(v, field), NULL, 10);
}

static unsigned uint_of(const cJSON *v, const char *field)
{
    return (unsigned)cJSON_GetNumberValue(cJSON_GetObjectItem(v, field));
}

static const cJSON *list_of(const char *field, int at_least)
{
    const cJSON *list = cJSON_GetObjectItem(vectors, field);

    ck_assert_int_ge(cJSON_GetArraySize(list), at_least);
    return list;
}

static void xaes_seal_all(const uint8_t *key, const uint8_t *nonce, const uint8_t *text, size_t size,
                          const uint8_t *associated, size_t associated_size, uint8_t *out)
{
    struct xaes_key k;
    struct xaes x;

    ck_assert_int_eq(xaes_key_init(&k, key), 0);
    ck_assert_int_eq(xaes_init(&x), 0);
    ck_assert_int_eq(xaes_start(&x, &k, nonce, true), 0);
    ck_assert_int_eq(xaes_associate(&x, associated, associated_size), 0);
    ck_assert_int_eq(xaes_update(&x, text, size, out), 0);
    ck_assert_int_eq(xaes_tag(&x, out + size), 0);

    CLEANUP(freep) uint8_t *opened = malloc(size + 1);
    ck_assert_int_eq(xaes_start(&x, &k, nonce, false), 0);
    ck_assert_int_eq(xaes_associate(&x, associated, associated_size), 0);
    ck_assert_int_eq(xaes_update(&x, out, size, opened), 0);
    ck_assert_int_eq(xaes_check(&x, out + size), 0);
    ck_assert_int_eq(memcmp(opened, text, size), 0);
    xaes_deinit(&x);
}

START_TEST(xaes_gives_the_results_that_c2sp_published)
{
    const cJSON *v;

    cJSON_ArrayForEach(v, list_of("xaes", 2))
    {
        uint8_t key[32], nonce[24], text[64], associated[64], expected[96], got[96];
        size_t size = bytes_of(v, "plaintext", text), associated_size = bytes_of(v, "associated", associated);

        bytes_of(v, "key", key);
        bytes_of(v, "nonce", nonce);
        ck_assert_uint_eq(bytes_of(v, "result", expected), size + 16);
        xaes_seal_all(key, nonce, text, size, associated, associated_size, got);
        ck_assert_mem_eq(got, expected, size + 16);
    }
}
END_TEST

START_TEST(xaes_passes_the_accumulated_test_over_shake128)
{
    const cJSON *v = cJSON_GetObjectItem(vectors, "xaes_accumulated");
    unsigned iterations = uint_of(v, "iterations");
    size_t stream_size = (size_t)iterations * (32 + 24 + 2 * 256);
    CLEANUP(freep) uint8_t *stream = malloc(stream_size);
    EVP_MD_CTX *source = EVP_MD_CTX_new(), *sum = EVP_MD_CTX_new();
    uint8_t expected[32], got[32], out[256 + 16];
    const uint8_t *next = stream;

    ck_assert_uint_eq(iterations, 10000);
    ck_assert_uint_eq(bytes_of(v, "result", expected), 32);
    ck_assert_int_eq(EVP_DigestInit_ex(source, EVP_shake128(), NULL), 1);
    ck_assert_int_eq(EVP_DigestFinalXOF(source, stream, stream_size), 1);
    ck_assert_int_eq(EVP_DigestInit_ex(sum, EVP_shake128(), NULL), 1);
    for (unsigned i = 0; i < iterations; i++) {
        const uint8_t *key = next, *nonce = key + 32, *text = nonce + 25, *associated = text + text[-1] + 1;

        xaes_seal_all(key, nonce, text, text[-1], associated, associated[-1], out);
        EVP_DigestUpdate(sum, out, text[-1] + (size_t)16);
        next = associated + associated[-1];
    }
    EVP_DigestFinalXOF(sum, got, sizeof(got));
    ck_assert_mem_eq(got, expected, 32);
    EVP_MD_CTX_free(source);
    EVP_MD_CTX_free(sum);
}
END_TEST

START_TEST(derived_keys_agree_with_the_vectors)
{
    const cJSON *v;

    cJSON_ArrayForEach(v, list_of("derivation", 2))
    {
        uint8_t master[32], data[32], names[32], expected[32];

        bytes_of(v, "master", master);
        ck_assert_int_eq(keys_derive(master, data, names), 0);
        bytes_of(v, "data", expected);
        ck_assert_mem_eq(data, expected, 32);
        bytes_of(v, "names", expected);
        ck_assert_mem_eq(names, expected, 32);
    }
}
END_TEST

START_TEST(name_hashes_agree_with_the_vectors)
{
    const cJSON *v;

    cJSON_ArrayForEach(v, list_of("names", 6))
    {
        uint8_t master[32], directory[16], name[256], expected[16], got[16];
        char text[SEAL_ID_TEXT];
        struct seal_keys *k;

        bytes_of(v, "master", master);
        bytes_of(v, "directory", directory);
        size_t size = bytes_of(v, "name", name);
        bytes_of(v, "hash", expected);
        ck_assert_int_eq(seal_keys_new(&k, master), 0);
        ck_assert_int_eq(seal_name(k, directory, (char *)name, size, got), 0);
        ck_assert_mem_eq(got, expected, 16);
        seal_id_format(got, text);
        ck_assert_mem_eq(text, text_of(v, "text"), SEAL_ID_TEXT);
        seal_keys_free(k);
    }
}
END_TEST

START_TEST(id_texts_agree_with_the_vectors_both_ways)
{
    const cJSON *v;

    cJSON_ArrayForEach(v, list_of("ids", 5))
    {
        const char *expected = text_of(v, "text");
        uint8_t id[16], parsed[16];
        char text[SEAL_ID_TEXT];

        bytes_of(v, "id", id);
        ck_assert_uint_eq(strlen(expected), SEAL_ID_TEXT);
        seal_id_format(id, text);
        ck_assert_mem_eq(text, expected, SEAL_ID_TEXT);
        ck_assert_int_eq(seal_id_parse(expected, parsed), 0);
        ck_assert_mem_eq(parsed, id, 16);
    }
}
END_TEST

static void check_blob_vector(const cJSON *v)
{
    static uint8_t blob[4096], got[4096], content[4096], plaintext[1024], buffer[1024], name[256], xattrs[256];
    const cJSON *m = cJSON_GetObjectItem(v, "meta");
    const char *key = text_of(v, "l2_key");
    uint8_t master[32], nonce[24];
    struct seal_meta in = {
        .mode = uint_of(m, "mode"),
        .uid = uint_of(m, "uid"),
        .gid = uint_of(m, "gid"),
        .policy = uint_of(m, "policy"),
        .ino = u64_of(m, "ino"),
        .ttl_ms = u64_of(m, "ttl_ms"),
        .mtime_ns = i64_of(m, "mtime_ns"),
        .ctime_ns = i64_of(m, "ctime_ns"),
        .created_ns = i64_of(m, "created_ns"),
        .name = (char *)name,
        .name_size = (uint16_t)bytes_of(m, "name", name),
        .xattrs = xattrs,
        .xattrs_size = (uint32_t)bytes_of(m, "xattrs", xattrs),
    };
    struct seal_version ver = {u64_of(v, "seq"), u64_of(v, "unique")};
    size_t size = bytes_of(v, "blob", blob), content_size = bytes_of(v, "content", content);
    size_t meta_size = bytes_of(v, "meta_plaintext", plaintext);
    enum seal_state state = uint_of(v, "state");
    struct seal_keys *k;
    struct seal_head head;
    struct seal_meta out;

    bytes_of(m, "dir_id", in.dir_id);
    bytes_of(v, "master", master);
    bytes_of(v, "nonce", nonce);
    ck_assert_int_eq(seal_keys_new(&k, master), 0);

    ck_assert_uint_eq(seal_blob_size(&in, content_size), size);
    ck_assert_int_eq(blob_seal(k, key, strlen(key), ver, state, &in, content, content_size, nonce, got), 0);
    ck_assert_mem_eq(got, blob, size);

    ck_assert_int_eq(seal_head(blob, size, &head), 0);
    ck_assert_int_eq(head.state, state);
    ck_assert_uint_eq(head.key_id, uint_of(v, "key_id"));
    ck_assert_uint_eq(head.version.seq, ver.seq);
    ck_assert_uint_eq(head.version.unique, ver.unique);
    ck_assert_uint_eq(head.meta_size, meta_size);
    ck_assert_int_eq(seal_open_meta(k, key, strlen(key), blob, size, buffer, &out), 0);
    ck_assert_mem_eq(buffer, plaintext, meta_size);
    ck_assert_mem_eq(out.dir_id, in.dir_id, 16);
    ck_assert_int_eq(seal_open_content(k, key, strlen(key), blob, size, got), 0);
    ck_assert_int_eq(memcmp(got, content, content_size), 0);
    seal_keys_free(k);
}

START_TEST(whole_blobs_agree_with_the_vectors)
{
    const cJSON *v;

    cJSON_ArrayForEach(v, list_of("blobs", 2))
    {
        check_blob_vector(v);
    }
}
END_TEST

/* --- ids and names --- */

START_TEST(id_parse_refuses_what_format_never_gives)
{
    static const char *const bad[] = {"AAAAAAAAAAAAAAAAAAAAAB",   "AAAAAAAAAAAAAAAAAAAAA=", "AAAAAAAAAA+AAAAAAAAAAA",
                                      "AAAAAAAAAA/AAAAAAAAAAA",   " AAAAAAAAAAAAAAAAAAAAA", "AAAAAAAAAA\0AAAAAAAAAAA",
                                      "AAAAAAAAAA\xffxAAAAAAAAAA"};
    uint8_t id[16], before[16];

    memset(id, 0x5a, sizeof(id));
    memcpy(before, id, sizeof(id));
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
        ck_assert_int_eq(seal_id_parse(bad[i], id), -EINVAL);
    ck_assert_mem_eq(id, before, 16);
}
END_TEST

START_TEST(name_hash_is_hmac_sha256_of_directory_and_name)
{
    uint8_t master[32], data[32], names[32], message[16 + 300], expected[32], got[16];

    for (int i = 0; i < 32; i++)
        master[i] = (uint8_t)i;
    ck_assert_int_eq(keys_derive(master, data, names), 0);
    for (size_t size = 0; size <= 300; size++) {
        seal_random(message, sizeof(message));
        ck_assert_ptr_nonnull(HMAC(EVP_sha256(), names, 32, message, 16 + size, expected, NULL));
        ck_assert_int_eq(seal_name(keys, message, (char *)message + 16, size, got), 0);
        ck_assert_mem_eq(got, expected, 16);
    }
}
END_TEST

START_TEST(same_name_in_another_directory_has_another_hash)
{
    uint8_t one[16] = {1}, two[16] = {2}, a[16], b[16];

    ck_assert_int_eq(seal_name(keys, one, "x", 1, a), 0);
    ck_assert_int_eq(seal_name(keys, two, "x", 1, b), 0);
    ck_assert_mem_ne(a, b, 16);
}
END_TEST

/* --- blobs --- */

static const size_t content_sizes[] = {0, 1, 15, 16, 17, 2048, 4096, 65537, 1 << 20};

START_TEST(what_was_sealed_opens_with_all_its_fields)
{
    size_t size = content_sizes[_i];
    CLEANUP(freep) uint8_t *content = pattern(size), *out = malloc(size + 1), *buffer = NULL;
    struct sealed blob = seal_with(keys, content, size);
    struct seal_head head;
    struct seal_meta got;

    ck_assert_int_eq(seal_head(blob.bytes, blob.size, &head), 0);
    ck_assert_uint_eq(head.content_size, size);
    ck_assert_uint_eq(head.version.seq, version.seq);
    ck_assert_uint_eq(head.version.unique, version.unique);
    ck_assert_int_eq(head.state, SEAL_STATE_FINISHED);
    buffer = malloc(head.meta_size);
    ck_assert_int_eq(seal_open_meta(keys, PLACE, blob.bytes, blob.offset, buffer, &got), 0);
    ck_assert_uint_eq(got.mode, meta.mode);
    ck_assert_uint_eq(got.uid, meta.uid);
    ck_assert_uint_eq(got.gid, meta.gid);
    ck_assert_int_eq(got.policy, meta.policy);
    ck_assert_uint_eq(got.ino, meta.ino);
    ck_assert_uint_eq(got.ttl_ms, meta.ttl_ms);
    ck_assert_int_eq(got.mtime_ns, meta.mtime_ns);
    ck_assert_int_eq(got.ctime_ns, meta.ctime_ns);
    ck_assert(got.created_ns == meta.created_ns);
    ck_assert_mem_eq(got.dir_id, meta.dir_id, 16);
    ck_assert_uint_eq(got.name_size, meta.name_size);
    ck_assert_mem_eq(got.name, meta.name, meta.name_size);
    ck_assert_uint_eq(got.xattrs_size, meta.xattrs_size);
    ck_assert_mem_eq(got.xattrs, meta.xattrs, meta.xattrs_size);
    ck_assert_int_eq(seal_open_content(keys, PLACE, blob.bytes, blob.size, out), 0);
    ck_assert_int_eq(memcmp(out, content, size), 0);
    free(blob.bytes);
}
END_TEST

START_TEST(content_may_be_sealed_in_its_own_place)
{
    CLEANUP(freep) uint8_t *content = pattern(5000), *out = malloc(5000);
    struct sealed blob = seal_with(keys, content, 5000);

    memcpy(blob.bytes + blob.offset, content, 5000);
    ck_assert_int_eq(seal_blob(keys, PLACE, version, 0, &meta, blob.bytes + blob.offset, 5000, blob.bytes), 0);
    ck_assert_int_eq(seal_open_content(keys, PLACE, blob.bytes, blob.size, out), 0);
    ck_assert_mem_eq(out, content, 5000);
    free(blob.bytes);
}
END_TEST

START_TEST(blob_shows_neither_content_nor_name)
{
    CLEANUP(freep) uint8_t *content = pattern(100);
    struct sealed blob = seal_with(keys, content, 100);

    ck_assert_ptr_null(memmem(blob.bytes, blob.size, meta.name, 4));
    ck_assert_ptr_null(memmem(blob.bytes, blob.size, content + 10, 8));
    free(blob.bytes);
}
END_TEST

START_TEST(no_nonce_comes_twice_and_its_lowest_bit_is_clear)
{
    enum { N = 3000 };
    static uint8_t nonces[N][SEAL_NONCE_BYTES];

    for (int i = 0; i < N; i++) {
        struct sealed blob = seal_with(keys, "x", 1);
        memcpy(nonces[i], blob.bytes + 40, SEAL_NONCE_BYTES);
        ck_assert_int_eq(nonces[i][23] & 1, 0);
        free(blob.bytes);
    }
    for (int i = 0; i < N; i++)
        for (int j = i + 1; j < N; j++)
            if (memcmp(nonces[i], nonces[j], 8) == 0)
                ck_abort_msg("two nonces begin alike");
}
END_TEST

START_TEST(no_flipped_byte_is_accepted)
{
    static const uint8_t flips[] = {0x01, 0x10, 0x80, 0xff};
    CLEANUP(freep) uint8_t *content = pattern(200);
    struct sealed blob = seal_with(keys, content, 200);

    for (size_t i = 0; i < blob.size; i++) {
        if (i == SEAL_STATE_OFFSET)
            continue;
        for (size_t j = 0; j < ARRAY_SIZE(flips); j++) {
            blob.bytes[i] ^= flips[j];
            int m = try_meta(keys, blob.bytes, blob.size, NULL), c = try_content(keys, blob.bytes, blob.size);
            bool is_header = i < SEAL_HEADER_BYTES, is_meta = !is_header && i < blob.offset;
            int expected = i >= 8 && i < 12 ? -ENOKEY : -EBADMSG;

            ck_assert_msg(m == (is_header || is_meta ? expected : 0), "byte %zu: metadata: %d", i, m);
            ck_assert_msg(c == (is_meta ? 0 : expected), "byte %zu: content: %d", i, c);
            blob.bytes[i] ^= flips[j];
        }
    }
    ck_assert_int_eq(try_meta(keys, blob.bytes, blob.size, NULL), 0);
    ck_assert_int_eq(try_content(keys, blob.bytes, blob.size), 0);
    free(blob.bytes);
}
END_TEST

START_TEST(state_can_change_without_sealing_anew_but_only_to_a_known_one)
{
    struct sealed blob = seal_with(keys, "abc", 3);
    struct seal_head head;

    for (int state = 0; state < 256; state++) {
        int expected = state == SEAL_STATE_FINISHED || state == SEAL_STATE_OPEN ? 0 : -EBADMSG;

        blob.bytes[SEAL_STATE_OFFSET] = (uint8_t)state;
        ck_assert_int_eq(seal_head(blob.bytes, blob.size, &head), expected);
        ck_assert_int_eq(try_meta(keys, blob.bytes, blob.size, NULL), expected);
        ck_assert_int_eq(try_content(keys, blob.bytes, blob.size), expected);
    }
    free(blob.bytes);
}
END_TEST

START_TEST(no_truncated_or_longer_blob_is_accepted)
{
    CLEANUP(freep) uint8_t *content = pattern(100);
    struct sealed blob = seal_with(keys, content, 100);

    for (size_t size = 0; size < blob.size; size++) {
        CLEANUP(freep) uint8_t *cut = copy_of(blob.bytes, size);

        ck_assert_int_eq(try_content(keys, cut, size), -EBADMSG);
        ck_assert_int_eq(try_meta(keys, cut, size, NULL), size < blob.offset ? -EBADMSG : 0);
    }
    CLEANUP(freep) uint8_t *longer = malloc(blob.size + 1);
    memcpy(longer, blob.bytes, blob.size);
    longer[blob.size] = 0;
    ck_assert_int_eq(try_content(keys, longer, blob.size + 1), -EBADMSG);
    free(blob.bytes);
}
END_TEST

START_TEST(impossible_lengths_are_refused_before_anything_is_read)
{
    static const uint64_t sizes[] = {1,          (UINT64_C(1) << 36) - 32, (UINT64_C(1) << 36) - 31, INT64_MAX,
                                     UINT64_MAX, UINT64_MAX - 100,         UINT64_MAX - 15};
    struct sealed blob = seal_with(keys, "", 0);
    struct seal_head head;

    for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
        put_le64(blob.bytes + 16, sizes[i]);
        ck_assert_int_eq(try_content(keys, blob.bytes, blob.size), -EBADMSG);
        ck_assert_int_eq(seal_head(blob.bytes, blob.size, &head), sizes[i] > (UINT64_C(1) << 36) - 32 ? -EBADMSG : 0);
    }
    put_le64(blob.bytes + 16, 0);
    put_le32(blob.bytes + 12, SEAL_META_MAX + 1);
    ck_assert_int_eq(seal_head(blob.bytes, blob.size, &head), -EBADMSG);
    put_le32(blob.bytes + 12, UINT32_MAX);
    ck_assert_int_eq(seal_head(blob.bytes, blob.size, &head), -EBADMSG);
    put_le32(blob.bytes + 12, SEAL_META_MAX);
    ck_assert_int_eq(seal_head(blob.bytes, blob.size, &head), 0);
    ck_assert_int_eq(try_meta(keys, blob.bytes, blob.size, NULL), -EBADMSG);
    ck_assert_int_eq(try_content(keys, blob.bytes, blob.size), -EBADMSG);
    free(blob.bytes);
}
END_TEST

START_TEST(blob_under_another_sessions_key_does_not_open)
{
    static const char *const others[] = {"sfs:web:AAAAAAAAAAAAAAAAAAAAAA:BBBBBBBBBBBBBBBBBBBBBA",
                                         "sfs:web:AAAAAAAAAAAAAAAAAAAAAA:BBBBBBBBBBBBBBBBBBBBBBS", "", "sfs:web"};
    struct sealed blob = seal_with(keys, "abc", 3);
    uint8_t buffer[512];
    struct seal_meta got;

    for (size_t i = 0; i < ARRAY_SIZE(others); i++) {
        size_t size = strlen(others[i]);

        ck_assert_int_eq(seal_open_meta(keys, others[i], size, blob.bytes, blob.size, buffer, &got), -EBADMSG);
        ck_assert_int_eq(seal_open_content(keys, others[i], size, blob.bytes, blob.size, buffer), -EBADMSG);
    }
    free(blob.bytes);
}
END_TEST

START_TEST(old_metadata_with_new_content_does_not_open)
{
    struct sealed old = seal_with(keys, "old", 3), new = seal_with(keys, "new", 3);

    /* the new header with the old metadata */
    CLEANUP(freep) uint8_t *mixed = copy_of(new.bytes, new.size);
    memcpy(mixed + SEAL_HEADER_BYTES, old.bytes + SEAL_HEADER_BYTES, old.offset - SEAL_HEADER_BYTES);
    ck_assert_int_eq(try_meta(keys, mixed, new.size, NULL), -EBADMSG);

    /* the old header and metadata with the new content */
    memcpy(mixed, old.bytes, old.size);
    memcpy(mixed + old.offset, new.bytes + new.offset, new.size - new.offset);
    ck_assert_int_eq(try_content(keys, mixed, new.size), -EBADMSG);
    free(old.bytes);
    free(new.bytes);
}
END_TEST

START_TEST(metadata_does_not_pass_for_content)
{
    uint8_t nonce[SEAL_NONCE_BYTES] = {9}, buffer[512];
    CLEANUP(freep) uint8_t *plaintext = malloc(seal_meta_size(&meta));
    size_t size = seal_meta_size(&meta);
    struct seal_meta got;

    meta_encode(&meta, plaintext); /* both sections hold the same bytes, under the same header */
    CLEANUP(freep) uint8_t *blob = malloc(seal_blob_size(&meta, size));
    ck_assert_int_eq(blob_seal(keys, PLACE, version, 0, &meta, plaintext, size, nonce, blob), 0);
    ck_assert_mem_ne(blob + 64, blob + 64 + size + 16, size);
    memcpy(blob + 64, blob + 64 + size + 16, size + 16);
    ck_assert_int_eq(seal_open_meta(keys, PLACE, blob, seal_blob_size(&meta, size), buffer, &got), -EBADMSG);
}
END_TEST

START_TEST(content_that_fails_is_wiped)
{
    CLEANUP(freep) uint8_t *content = pattern(300);
    struct sealed blob = seal_with(keys, content, 300);
    uint8_t out[300], zero[300] = {0};

    memset(out, 1, sizeof(out));
    blob.bytes[blob.size - 1] ^= 1;
    ck_assert_int_eq(seal_open_content(keys, PLACE, blob.bytes, blob.size, out), -EBADMSG);
    ck_assert_mem_eq(out, zero, 300);
    free(blob.bytes);
}
END_TEST

START_TEST(another_key_of_the_same_id_does_not_open)
{
    const uint8_t master[SEAL_KEY_BYTES] = {42};
    struct sealed blob = seal_with(keys, "abc", 3);
    struct seal_keys *other;

    ck_assert_int_eq(seal_keys_new(&other, master), 0);
    ck_assert_int_eq(try_meta(other, blob.bytes, blob.size, NULL), -EBADMSG);
    ck_assert_int_eq(try_content(other, blob.bytes, blob.size), -EBADMSG);
    ck_assert_int_eq(try_content(keys, blob.bytes, blob.size), 0);
    seal_keys_free(other);
    free(blob.bytes);
}
END_TEST

START_TEST(a_freed_key_opens_nothing_even_where_it_was_cached)
{
    const uint8_t one[SEAL_KEY_BYTES] = {1}, two[SEAL_KEY_BYTES] = {2};
    struct seal_keys *k;

    ck_assert_int_eq(seal_keys_new(&k, one), 0);
    struct sealed blob = seal_with(k, "abc", 3);
    seal_keys_free(k);
    ck_assert_int_eq(seal_keys_new(&k, two), 0); /* likely at the same address */
    ck_assert_int_eq(try_content(k, blob.bytes, blob.size), -EBADMSG);
    seal_keys_free(k);
    free(blob.bytes);
}
END_TEST

/* --- metadata --- */

START_TEST(metadata_that_the_format_cannot_hold_is_not_sealed)
{
    CLEANUP(freep) uint8_t *out = malloc(1 << 18), *big = calloc(1, 1 << 17);
    char name[300];
    struct seal_meta good = meta;

    memset(name, 'n', sizeof(name));
    meta.name = name;
    meta.name_size = 255;
    ck_assert_int_eq(seal_blob(keys, PLACE, version, 0, &meta, "", 0, out), 0);
    meta.name_size = 256;
    ck_assert_int_eq(seal_blob(keys, PLACE, version, 0, &meta, "", 0, out), -EINVAL);
    meta.name_size = 255;
    name[100] = '/';
    ck_assert_int_eq(seal_blob(keys, PLACE, version, 0, &meta, "", 0, out), -EINVAL);
    meta = good;
    meta.policy = 2;
    ck_assert_int_eq(seal_blob(keys, PLACE, version, 0, &meta, "", 0, out), -EINVAL);
    meta = good;
    meta.xattrs = big;
    meta.xattrs_size = SEAL_META_MAX - META_FIXED_BYTES - meta.name_size;
    ck_assert_int_eq(seal_blob(keys, PLACE, version, 0, &meta, "", 0, out), 0);
    meta.xattrs_size++;
    ck_assert_int_eq(seal_blob(keys, PLACE, version, 0, &meta, "", 0, out), -EINVAL);
}
END_TEST

static int decode_changed(size_t at, uint8_t value)
{
    CLEANUP(freep) uint8_t *buffer = malloc(seal_meta_size(&meta));
    struct seal_meta got;

    meta_encode(&meta, buffer);
    buffer[at] = value;
    return meta_decode(buffer, seal_meta_size(&meta), &got);
}

START_TEST(metadata_decoder_refuses_wrong_sizes_and_ranges)
{
    static const struct {
        size_t at;
        uint8_t value;
    } bad[] = {{0, 0},  {0, 2},    {1, 2},  {1, 255}, {2, 79}, {2, 81}, {3, 1},    {3, 255},  {72, 8}, {72, 10},
               {73, 1}, {73, 255}, {74, 1}, {75, 1},  {76, 2}, {76, 4}, {79, 255}, {80, '/'}, {81, 0}};

    ck_assert_int_eq(decode_changed(0, 1), 0);
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
        ck_assert_msg(decode_changed(bad[i].at, bad[i].value) == -EBADMSG, "byte %zu = %d", bad[i].at, bad[i].value);
}
END_TEST

START_TEST(metadata_decoder_refuses_every_truncation_and_trailing_garbage)
{
    size_t size = seal_meta_size(&meta);
    CLEANUP(freep) uint8_t *whole = calloc(1, size + 1);
    struct seal_meta got;

    meta_encode(&meta, whole);
    for (size_t n = 0; n <= size + 1; n++) {
        CLEANUP(freep) uint8_t *cut = copy_of(whole, n);
        ck_assert_int_eq(meta_decode(cut, n, &got), n == size ? 0 : -EBADMSG);
    }
}
END_TEST

START_TEST(metadata_decoder_skips_fields_of_a_later_version)
{
    size_t size = seal_meta_size(&meta);
    CLEANUP(freep) uint8_t *old = malloc(size), *later = calloc(1, size + 8);
    struct seal_meta got;

    meta_encode(&meta, old);
    memcpy(later, old, 80);
    later[2] = 88;
    memcpy(later + 88, old + 80, size - 80);
    ck_assert_int_eq(meta_decode(later, size + 8, &got), 0);
    ck_assert_mem_eq(got.name, meta.name, meta.name_size);
    ck_assert_mem_eq(got.xattrs, meta.xattrs, meta.xattrs_size);
}
END_TEST

START_TEST(metadata_decoder_survives_random_bytes)
{
    for (int i = 0; i < 100000; i++) {
        uint8_t bytes[128];
        struct seal_meta got;

        seal_random(bytes, 64);
        seal_random(bytes + 64, 64);
        bytes[0] = 1;
        bytes[1] &= 1;
        bytes[2] = (uint8_t)(80 + (bytes[2] & 15));
        bytes[3] = bytes[73] = bytes[74] = bytes[75] = bytes[77] = bytes[78] = bytes[79] = 0;
        size_t size = 80 + bytes[4] % 49u;
        CLEANUP(freep) uint8_t *exact = copy_of(bytes, size);
        if (meta_decode(exact, size, &got) < 0)
            continue;
        ck_assert((const uint8_t *)got.name >= exact + 80);
        ck_assert_ptr_eq((const uint8_t *)got.xattrs + got.xattrs_size, exact + size);
    }
}
END_TEST

/* --- streaming --- */

static const size_t piece_sizes[] = {1, 7, 15, 16, 17, 64, 1000, 4096, 100000};

static int stream_pieces(struct seal_stream *stream, const uint8_t *in, size_t size, size_t piece, uint8_t *out)
{
    for (size_t at = 0; at < size; at += piece) {
        size_t n = min_u64(piece, size - at);
        int r = seal_stream_update(stream, in + at, n, out + at);
        if (r < 0)
            return r;
    }
    return 0;
}

START_TEST(sealing_in_pieces_gives_the_same_blob)
{
    const size_t size = 9999;
    CLEANUP(freep) uint8_t *content = pattern(size);
    size_t blob_size = seal_blob_size(&meta, size);
    CLEANUP(freep) uint8_t *streamed = malloc(blob_size), *whole = malloc(blob_size);
    struct seal_stream *stream;
    struct seal_head head;

    ck_assert_int_eq(seal_blob_begin(&stream, keys, PLACE, version, SEAL_STATE_OPEN, &meta, size, streamed), 0);
    ck_assert_int_eq(seal_head(streamed, SEAL_HEADER_BYTES, &head), 0);
    size_t offset = seal_blob_offset(&head);
    ck_assert_int_eq(stream_pieces(stream, content, size, piece_sizes[_i], streamed + offset), 0);
    ck_assert_int_eq(seal_stream_finish(stream, streamed + offset + size), 0);

    ck_assert_int_eq(blob_seal(keys, PLACE, version, SEAL_STATE_OPEN, &meta, content, size, head.nonce, whole), 0);
    ck_assert_mem_eq(streamed, whole, blob_size);
}
END_TEST

START_TEST(opening_in_pieces_gives_the_same_content)
{
    const size_t size = 9999;
    CLEANUP(freep) uint8_t *content = pattern(size), *out = malloc(size);
    struct sealed blob = seal_with(keys, content, size);
    struct seal_stream *stream;

    ck_assert_int_eq(seal_open_begin(&stream, keys, PLACE, blob.bytes), 0);
    ck_assert_int_eq(stream_pieces(stream, blob.bytes + blob.offset, size, piece_sizes[_i], out), 0);
    ck_assert_int_eq(seal_stream_finish(stream, blob.bytes + blob.offset + size), 0);
    ck_assert_mem_eq(out, content, size);
    free(blob.bytes);
}
END_TEST

START_TEST(streams_may_interleave_with_each_other_and_with_whole_blobs)
{
    CLEANUP(freep) uint8_t *content = pattern(100);
    struct sealed one = seal_with(keys, content, 100), two = seal_with(keys, content + 1, 99);
    struct seal_stream *a, *b;
    uint8_t x[100], y[99];

    ck_assert_int_eq(seal_open_begin(&a, keys, PLACE, one.bytes), 0);
    ck_assert_int_eq(seal_open_begin(&b, keys, PLACE, two.bytes), 0);
    ck_assert_int_eq(seal_stream_update(a, one.bytes + one.offset, 50, x), 0);
    ck_assert_int_eq(try_content(keys, two.bytes, two.size), 0);
    ck_assert_int_eq(seal_stream_update(b, two.bytes + two.offset, 99, y), 0);
    ck_assert_int_eq(seal_stream_update(a, one.bytes + one.offset + 50, 50, x + 50), 0);
    ck_assert_int_eq(seal_stream_finish(b, two.bytes + two.offset + 99), 0);
    ck_assert_int_eq(seal_stream_finish(a, one.bytes + one.offset + 100), 0);
    ck_assert_mem_eq(x, content, 100);
    ck_assert_mem_eq(y, content + 1, 99);
    free(one.bytes);
    free(two.bytes);
}
END_TEST

START_TEST(opening_stream_refuses_a_flipped_bit_a_wrong_tag_and_a_wrong_length)
{
    CLEANUP(freep) uint8_t *content = pattern(100);
    struct sealed blob = seal_with(keys, content, 100);
    uint8_t *sealed = blob.bytes + blob.offset, out[101], no_tag[16] = {0};
    struct seal_stream *stream;

    ck_assert_int_eq(seal_open_begin(&stream, keys, PLACE, blob.bytes), 0);
    ck_assert_int_eq(seal_stream_update(stream, sealed, 100, out), 0);
    ck_assert_int_eq(seal_stream_finish(stream, no_tag), -EBADMSG);

    sealed[50] ^= 1;
    ck_assert_int_eq(seal_open_begin(&stream, keys, PLACE, blob.bytes), 0);
    ck_assert_int_eq(seal_stream_update(stream, sealed, 100, out), 0);
    ck_assert_int_eq(seal_stream_finish(stream, sealed + 100), -EBADMSG);
    sealed[50] ^= 1;

    ck_assert_int_eq(seal_open_begin(&stream, keys, PLACE, blob.bytes), 0);
    ck_assert_int_eq(seal_stream_update(stream, sealed, 101, out), -EBADMSG);
    ck_assert_int_eq(seal_stream_update(stream, sealed, 100, out), -EBADMSG);
    ck_assert_int_eq(seal_stream_finish(stream, sealed + 100), -EBADMSG);

    ck_assert_int_eq(seal_open_begin(&stream, keys, PLACE, blob.bytes), 0);
    ck_assert_int_eq(seal_stream_update(stream, sealed, 99, out), 0);
    ck_assert_int_eq(seal_stream_finish(stream, sealed + 100), -EBADMSG);

    ck_assert_int_eq(seal_open_begin(&stream, keys, "other", 5, blob.bytes), 0);
    ck_assert_int_eq(seal_stream_update(stream, sealed, 100, out), 0);
    ck_assert_int_eq(seal_stream_finish(stream, sealed + 100), -EBADMSG);

    blob.bytes[0] ^= 1;
    ck_assert_int_eq(seal_open_begin(&stream, keys, PLACE, blob.bytes), -EBADMSG);
    blob.bytes[0] ^= 1;
    blob.bytes[8] ^= 2;
    ck_assert_int_eq(seal_open_begin(&stream, keys, PLACE, blob.bytes), -ENOKEY);
    free(blob.bytes);
}
END_TEST

START_TEST(sealing_stream_insists_on_the_announced_size)
{
    CLEANUP(freep) uint8_t *out = malloc(seal_blob_size(&meta, 10));
    struct seal_stream *stream;
    uint8_t tag[16], sealed[16];

    ck_assert_int_eq(seal_blob_begin(&stream, keys, PLACE, version, 0, &meta, 10, out), 0);
    ck_assert_int_eq(seal_stream_update(stream, "0123456789x", 11, sealed), -EINVAL);
    ck_assert_int_eq(seal_stream_finish(stream, tag), -EINVAL);
    ck_assert_int_eq(seal_blob_begin(&stream, keys, PLACE, version, 0, &meta, 10, out), 0);
    ck_assert_int_eq(seal_stream_update(stream, "012345678", 9, sealed), 0);
    ck_assert_int_eq(seal_stream_finish(stream, tag), -EINVAL);
    ck_assert_int_eq(seal_blob_begin(&stream, keys, PLACE, version, 0, &meta, 10, out), 0);
    seal_stream_free(stream);
    seal_stream_free(NULL);
}
END_TEST

/* --- key files --- */

static char directory[64], path[96];

static void files_setup(void)
{
    strcpy(directory, "/tmp/test_seal.XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(directory));
    snprintf(path, sizeof(path), "%s/key", directory);
}

static void files_teardown(void)
{
    unlink(path);
    rmdir(directory);
}

static void write_file(const char *text, size_t size, mode_t mode)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, text, size), (ssize_t)size);
    ck_assert_int_eq(fchmod(fd, mode), 0);
    close(fd);
}

/* @says: what the line for the operator contains; NULL for files that load */
static const struct {
    const char *text;
    mode_t mode;
    int result;
    const char *says;
} files[] = {
    {HEX_A "\n", 0600, 0, NULL},
    {HEX_A, 0400, 0, NULL},
    {"1:" HEX_A "\n", 0600, 0, NULL},
    {"4294967295:" HEX_B "\n", 0600, 0, NULL},
    {"# comment\n\n  \t\r\n2:" HEX_A "\r\n" HEX_B "  \n#\n", 0600, 0, NULL},
    {HEX_A "\n", 0644, -EACCES, "mode 0644 lets others read it: chmod 600 /"},
    {HEX_A "\n", 0640, -EACCES, "mode 0640 lets others read it: chmod 600 /"},
    {HEX_A "\n", 0620, -EACCES, "mode 0620 lets others use it: chmod 600 /"},
    {HEX_A "\n", 0700, -EACCES, "mode 0700 is wider than 0600: chmod 600 /"},
    {"", 0600, -EINVAL, "holds no key (make one with: openssl rand -hex 32)"},
    {"# only a comment\n\n", 0600, -EINVAL, "holds no key"},
    {"#\n\nabc\n", 0600, -EINVAL, "line 3: not 64 hexadecimal digits (make one with: openssl rand -hex 32)"},
    {HEX_A "0\n", 0600, -EINVAL, "line 1: not 64"},
    {HEX_A "00\n", 0600, -EINVAL, "line 1: not 64"},
    {"0x" HEX_A "\n", 0600, -EINVAL, "line 1: not 64"},
    {" " HEX_A "\n", 0600, -EINVAL, "line 1: not 64"},
    {"1: " HEX_A "\n", 0600, -EINVAL, "line 1: not 64"},
    {"1:\n", 0600, -EINVAL, "line 1: not 64"},
    {"g00102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n", 0600, -EINVAL, "line 1: not 64"},
    {"1:2:" HEX_A "\n", 0600, -EINVAL, "line 1: not 64"},
    {"0:" HEX_A "\n", 0600, -EINVAL, "line 1: the key id before ':' must be a number from 1 to 4294967295"},
    {":" HEX_A "\n", 0600, -EINVAL, "line 1: the key id"},
    {"-1:" HEX_A "\n", 0600, -EINVAL, "line 1: the key id"},
    {"+1:" HEX_A "\n", 0600, -EINVAL, "line 1: the key id"},
    {"a:" HEX_A "\n", 0600, -EINVAL, "line 1: the key id"},
    {"4294967296:" HEX_A "\n", 0600, -EINVAL, "line 1: the key id"},
    {"18446744073709551617:" HEX_A "\n", 0600, -EINVAL, "line 1: the key id"},
    {HEX_A "\n" HEX_B "\n", 0600, -EINVAL,
     "line 2: a second key with the id 1: give each key an id of its own, as in 2"},
    {"3:" HEX_A "\n3:" HEX_B "\n", 0600, -EINVAL, "line 2: a second key with the id 3"},
    {HEX_A "\n2:" HEX_B "\nabc", 0600, -EINVAL, "line 3: not 64"},
};

static void check_why(const char *why, const char *says)
{
    ck_assert_msg(strncmp(why, "key file /", 10) == 0, "%s", why);
    ck_assert_msg(strstr(why, says) != NULL, "\"%s\" lacks \"%s\"", why, says);
    ck_assert_ptr_null(strchr(why, '\n'));
    ck_assert_ptr_null(strstr(why, "0001020304")); /* no key material */
    ck_assert_ptr_null(strstr(why, "FFEE"));
}

START_TEST(key_files_load_or_say_how_to_mend_them)
{
    struct seal_keys *loaded = NULL;
    char why[512] = "";

    write_file(files[_i].text, strlen(files[_i].text), files[_i].mode);
    int r = seal_keys_load(&loaded, path, why, sizeof(why));
    ck_assert_msg(r == files[_i].result, "%s: %d: %s", files[_i].text, r, why);
    if (files[_i].says)
        check_why(why, files[_i].says);
    ck_assert(files[_i].says ? !loaded : !!loaded);
    seal_keys_free(loaded);
}
END_TEST

START_TEST(what_is_no_key_file_is_refused_at_once)
{
    struct seal_keys *loaded = NULL;
    char why[512];

    ck_assert_int_eq(seal_keys_load(&loaded, path, why, sizeof(why)), -ENOENT);
    check_why(why, "does not exist: make one with: (umask 077; openssl rand -hex 32 > /");
    ck_assert_int_eq(seal_keys_load(&loaded, directory, why, sizeof(why)), -EINVAL);
    check_why(why, "not a regular file");
    ck_assert_int_eq(mkfifo(path, 0600), 0);
    ck_assert_int_eq(seal_keys_load(&loaded, path, why, sizeof(why)), -EINVAL);
    check_why(why, "not a regular file");
    ck_assert_int_eq(seal_keys_load(&loaded, "/dev/null", why, sizeof(why)), -EINVAL);
    ck_assert_int_eq(seal_keys_load(&loaded, path, NULL, 0), -EINVAL);
    ck_assert_int_eq(seal_keys_load(&loaded, path, why, 5), -EINVAL);
    ck_assert_str_eq(why, "key ");
    unlink(path);

    CLEANUP(freep) char *large = malloc(KEYS_FILE_MAX + 1);
    memset(large, '\n', KEYS_FILE_MAX + 1);
    write_file(large, KEYS_FILE_MAX + 1, 0600);
    ck_assert_int_eq(seal_keys_load(&loaded, path, why, sizeof(why)), -EINVAL);
    check_why(why, "larger than 65536 bytes");
    write_file("1:\0", 3, 0600);
    ck_assert_int_eq(seal_keys_load(&loaded, path, why, sizeof(why)), -EINVAL);
    check_why(why, "line 1: not 64");
}
END_TEST

START_TEST(key_file_of_somebody_else_is_refused)
{
    struct seal_keys *loaded = NULL;
    char why[512], says[64];

    write_file(HEX_A, 64, 0600);
    if (geteuid() != 0)
        return; /* only root can give a file away */
    ck_assert_int_eq(chown(path, 12345, 0), 0);
    ck_assert_int_eq(seal_keys_load(&loaded, path, why, sizeof(why)), -EACCES);
    snprintf(says, sizeof(says), "belongs to uid 12345, who could change it: chown 0 /");
    check_why(why, says);
}
END_TEST

START_TEST(as_many_keys_as_promised_fit_and_not_one_more)
{
    struct seal_keys *loaded = NULL;
    CLEANUP(freep) char *text = malloc(80 * (KEYS_MAX + 1));
    char why[512], *end = text;

    for (int i = 1; i <= KEYS_MAX; i++)
        end += sprintf(end, "%d:%s\n", i, HEX_A);
    write_file(text, (size_t)(end - text), 0600);
    ck_assert_int_eq(seal_keys_load(&loaded, path, why, sizeof(why)), 0);
    seal_keys_free(loaded);
    end += sprintf(end, "%d:%s\n", KEYS_MAX + 1, HEX_A);
    write_file(text, (size_t)(end - text), 0600);
    ck_assert_int_eq(seal_keys_load(&loaded, path, why, sizeof(why)), -EINVAL);
    check_why(why, "line 65: more than 64 keys");
}
END_TEST

static struct seal_keys *load_text(const char *text)
{
    struct seal_keys *loaded = NULL;
    char why[512] = "";

    write_file(text, strlen(text), 0600);
    ck_assert_msg(seal_keys_load(&loaded, path, why, sizeof(why)) == 0, "%s", why);
    return loaded;
}

START_TEST(rotation_seals_with_the_first_key_and_opens_with_all)
{
    struct seal_keys *before = load_text(HEX_A "\n");
    struct seal_keys *both = load_text("2:" HEX_B "\n1:" HEX_A "\n");
    struct seal_keys *other = load_text("3:" HEX_C "\n");
    struct sealed old = seal_with(before, "old", 3), new = seal_with(both, "new", 3);
    struct seal_head head;

    ck_assert_int_eq(seal_head(new.bytes, new.size, &head), 0);
    ck_assert_uint_eq(head.key_id, 2);
    ck_assert_int_eq(try_meta(both, old.bytes, old.size, NULL), 0);
    ck_assert_int_eq(try_content(both, old.bytes, old.size), 0);
    ck_assert_int_eq(try_content(both, new.bytes, new.size), 0);
    ck_assert_int_eq(try_meta(before, new.bytes, new.size, NULL), -ENOKEY);
    ck_assert_int_eq(try_content(before, new.bytes, new.size), -ENOKEY);
    ck_assert_int_eq(try_content(other, old.bytes, old.size), -ENOKEY);
    free(old.bytes);
    free(new.bytes);
    seal_keys_free(before);
    seal_keys_free(both);
    seal_keys_free(other);
}
END_TEST

START_TEST(names_stay_the_same_through_a_rotation)
{
    struct seal_keys *before = load_text("5:" HEX_A "\n");
    struct seal_keys *during = load_text("9:" HEX_B "\n5:" HEX_A "\n7:" HEX_C "\n");
    struct seal_keys *other = load_text("5:" HEX_B "\n");
    uint8_t dir[16] = {0}, a[16], b[16], c[16];

    ck_assert_int_eq(seal_name(before, dir, "name", 4, a), 0);
    ck_assert_int_eq(seal_name(during, dir, "name", 4, b), 0);
    ck_assert_int_eq(seal_name(other, dir, "name", 4, c), 0);
    ck_assert_mem_eq(a, b, 16);
    ck_assert_mem_ne(a, c, 16);
    seal_keys_free(before);
    seal_keys_free(during);
    seal_keys_free(other);
}
END_TEST

START_TEST(created_key_file_loads_is_private_and_never_overwrites)
{
    struct seal_keys *loaded = NULL;
    char why[512] = "", first[128] = "", second[128] = "";
    struct stat st;

    mode_t umask_before = umask(0);
    ck_assert_int_eq(seal_keys_create(path), 0);
    umask(umask_before);
    ck_assert_int_eq(stat(path, &st), 0);
    ck_assert_int_eq(st.st_mode & 07777, 0600);
    ck_assert_int_eq(st.st_size, 2 + 64 + 1);
    ck_assert_msg(seal_keys_load(&loaded, path, why, sizeof(why)) == 0, "%s", why);
    seal_keys_free(loaded);

    int fd = open(path, O_RDONLY);
    ck_assert_int_eq(read(fd, first, sizeof(first)), 67);
    ck_assert_int_eq(seal_keys_create(path), -EEXIST);
    ck_assert_int_eq(pread(fd, second, sizeof(second), 0), 67);
    ck_assert_mem_eq(first, second, sizeof(first));
    close(fd);
    unlink(path);
    ck_assert_int_eq(seal_keys_create("/nonexistent/key"), -ENOENT);
}
END_TEST

/* --- threads and processes --- */

struct work {
    struct seal_keys *one, *two;
    struct seal_stream *stream; /* begun by another thread */
    const uint8_t *sealed;
    int error;
};

static int seal_and_open(const struct seal_keys *with, uint8_t *blob, uint8_t *out, const uint8_t *content, size_t size)
{
    struct seal_meta got;
    uint8_t buffer[256];
    size_t blob_size = seal_blob_size(&meta, size);

    int r = seal_blob(with, PLACE, version, SEAL_STATE_FINISHED, &meta, content, size, blob);
    if (r == 0)
        r = seal_open_meta(with, PLACE, blob, blob_size, buffer, &got);
    if (r == 0)
        r = seal_open_content(with, PLACE, blob, blob_size, out);
    return r < 0 ? r : memcmp(out, content, size) == 0 ? 0 : -EIO;
}

static void *work_with_two_keys(void *argument)
{
    struct work *work = argument;
    CLEANUP(freep) uint8_t *content = pattern(2048), *out = malloc(2048), *blob = malloc(4096);
    uint8_t dir[16] = {0}, first[16], hash[16];

    work->error = seal_name(work->one, dir, "n", 1, first);
    for (int i = 0; i < 500 && work->error == 0; i++) {
        const struct seal_keys *with = i & 1 ? work->one : work->two, *other = i & 1 ? work->two : work->one;

        work->error = seal_and_open(with, blob, out, content, 2048);
        if (work->error == 0 && seal_open_content(other, PLACE, blob, seal_blob_size(&meta, 2048), out) != -EBADMSG)
            work->error = -EIO;
        if (work->error == 0)
            work->error = seal_name(work->one, dir, "n", 1, hash);
        if (work->error == 0 && memcmp(hash, first, 16) != 0)
            work->error = -EIO;
    }
    return NULL;
}

START_TEST(many_threads_share_two_keys)
{
    const uint8_t master[SEAL_KEY_BYTES] = {77};
    struct work work[8] = {0};
    pthread_t threads[8];
    struct seal_keys *other;

    ck_assert_int_eq(seal_keys_new(&other, master), 0);
    for (int i = 0; i < 8; i++) {
        work[i] = (struct work){.one = keys, .two = other};
        ck_assert_int_eq(pthread_create(&threads[i], NULL, work_with_two_keys, &work[i]), 0);
    }
    for (int i = 0; i < 8; i++) {
        pthread_join(threads[i], NULL);
        ck_assert_int_eq(work[i].error, 0);
    }
    seal_keys_free(other);
}
END_TEST

static void *finish_stream(void *argument)
{
    struct work *work = argument;
    uint8_t out[100];

    work->error = seal_stream_update(work->stream, work->sealed, 100, out);
    if (work->error == 0)
        work->error = seal_stream_finish(work->stream, (uint8_t *)work->sealed + 100);
    return NULL;
}

START_TEST(a_stream_may_move_to_another_thread)
{
    CLEANUP(freep) uint8_t *content = pattern(100);
    struct sealed blob = seal_with(keys, content, 100);
    struct work work = {.sealed = blob.bytes + blob.offset, .error = -1};
    pthread_t thread;

    ck_assert_int_eq(seal_open_begin(&work.stream, keys, PLACE, blob.bytes), 0);
    ck_assert_int_eq(pthread_create(&thread, NULL, finish_stream, &work), 0);
    pthread_join(thread, NULL);
    ck_assert_int_eq(work.error, 0);
    free(blob.bytes);
}
END_TEST

START_TEST(a_forked_child_draws_other_random_bytes)
{
    uint8_t warm[8], *child, parent[64] = {0};

    child = mmap(NULL, 64, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert_ptr_ne(child, MAP_FAILED);
    seal_random(warm, sizeof(warm)); /* the pool is full when we fork */
    pid_t pid = fork();
    if (pid == 0) {
        seal_random(child, 64);
        _exit(0);
    }
    ck_assert_int_gt(pid, 0);
    waitpid(pid, NULL, 0);
    seal_random(parent, 64);
    ck_assert_mem_ne(parent, child, 64);
    munmap(child, 64);
}
END_TEST

START_TEST(random_bytes_of_any_size_do_not_repeat)
{
    static uint8_t a[5000], b[5000];

    for (size_t size = 16; size <= sizeof(a); size = size * 3 / 2) {
        seal_random(a, size);
        seal_random(b, size);
        ck_assert_mem_ne(a, b, size);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("seal");
    TCase *tc = tcase_create("vectors");
    tcase_add_checked_fixture(tc, vectors_setup, vectors_teardown);
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, xaes_gives_the_results_that_c2sp_published);
    tcase_add_test(tc, xaes_passes_the_accumulated_test_over_shake128);
    tcase_add_test(tc, derived_keys_agree_with_the_vectors);
    tcase_add_test(tc, name_hashes_agree_with_the_vectors);
    tcase_add_test(tc, id_texts_agree_with_the_vectors_both_ways);
    tcase_add_test(tc, whole_blobs_agree_with_the_vectors);
    suite_add_tcase(suite, tc);

    tc = tcase_create("blobs");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, id_parse_refuses_what_format_never_gives);
    tcase_add_test(tc, name_hash_is_hmac_sha256_of_directory_and_name);
    tcase_add_test(tc, same_name_in_another_directory_has_another_hash);
    tcase_add_loop_test(tc, what_was_sealed_opens_with_all_its_fields, 0, ARRAY_SIZE(content_sizes));
    tcase_add_test(tc, content_may_be_sealed_in_its_own_place);
    tcase_add_test(tc, blob_shows_neither_content_nor_name);
    tcase_add_test(tc, no_nonce_comes_twice_and_its_lowest_bit_is_clear);
    tcase_add_test(tc, no_flipped_byte_is_accepted);
    tcase_add_test(tc, state_can_change_without_sealing_anew_but_only_to_a_known_one);
    tcase_add_test(tc, no_truncated_or_longer_blob_is_accepted);
    tcase_add_test(tc, impossible_lengths_are_refused_before_anything_is_read);
    tcase_add_test(tc, blob_under_another_sessions_key_does_not_open);
    tcase_add_test(tc, old_metadata_with_new_content_does_not_open);
    tcase_add_test(tc, metadata_does_not_pass_for_content);
    tcase_add_test(tc, content_that_fails_is_wiped);
    tcase_add_test(tc, another_key_of_the_same_id_does_not_open);
    tcase_add_test(tc, a_freed_key_opens_nothing_even_where_it_was_cached);
    tcase_add_test(tc, metadata_that_the_format_cannot_hold_is_not_sealed);
    tcase_add_test(tc, metadata_decoder_refuses_wrong_sizes_and_ranges);
    tcase_add_test(tc, metadata_decoder_refuses_every_truncation_and_trailing_garbage);
    tcase_add_test(tc, metadata_decoder_skips_fields_of_a_later_version);
    tcase_add_test(tc, metadata_decoder_survives_random_bytes);
    suite_add_tcase(suite, tc);

    tc = tcase_create("streams");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_loop_test(tc, sealing_in_pieces_gives_the_same_blob, 0, ARRAY_SIZE(piece_sizes));
    tcase_add_loop_test(tc, opening_in_pieces_gives_the_same_content, 0, ARRAY_SIZE(piece_sizes));
    tcase_add_test(tc, streams_may_interleave_with_each_other_and_with_whole_blobs);
    tcase_add_test(tc, opening_stream_refuses_a_flipped_bit_a_wrong_tag_and_a_wrong_length);
    tcase_add_test(tc, sealing_stream_insists_on_the_announced_size);
    suite_add_tcase(suite, tc);

    tc = tcase_create("key files");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_checked_fixture(tc, files_setup, files_teardown);
    tcase_add_loop_test(tc, key_files_load_or_say_how_to_mend_them, 0, ARRAY_SIZE(files));
    tcase_add_test(tc, what_is_no_key_file_is_refused_at_once);
    tcase_add_test(tc, key_file_of_somebody_else_is_refused);
    tcase_add_test(tc, as_many_keys_as_promised_fit_and_not_one_more);
    tcase_add_test(tc, rotation_seals_with_the_first_key_and_opens_with_all);
    tcase_add_test(tc, names_stay_the_same_through_a_rotation);
    tcase_add_test(tc, created_key_file_loads_is_private_and_never_overwrites);
    suite_add_tcase(suite, tc);

    tc = tcase_create("threads");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, many_threads_share_two_keys);
    tcase_add_test(tc, a_stream_may_move_to_another_thread);
    tcase_add_test(tc, a_forked_child_draws_other_random_bytes);
    tcase_add_test(tc, random_bytes_of_any_size_do_not_repeat);
    suite_add_tcase(suite, tc);

    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
