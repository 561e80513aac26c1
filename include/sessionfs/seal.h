/*
 * seal: keys, the blob format (docs/format.md) and the hashing of names. All cryptography is OpenSSL's.
 *
 * A blob is what L2 stores for one session:
 *
 *   offset size
 *    0      4   magic "SFSB"
 *    4      1   format, 1
 *    5      1   state: SEAL_STATE_*; not authenticated (taken as 0 in the associated data)
 *    6      2   header size, 64 (all numbers are little endian)
 *    8      4   key id
 *   12      4   metadata length M (plaintext = ciphertext, without the tag)
 *   16      8   content length C
 *   24      8   version, sequence number: one more with every save
 *   32      8   version, unique: random for every save
 *   40     24   nonce N (192 bits, random, lowest bit of the last byte clear)
 *   64      M   metadata, XAES-256-GCM under N              + 16 bytes tag
 *   80+M    C   content,  XAES-256-GCM under N with the lowest bit of its last byte set   + 16 bytes tag
 *
 * Associated data of each section: the L2 key of the session (its length as 4 bytes first), the 64 header bytes with
 * state 0, and one byte 'M' or 'C'. So nothing can be moved to another key, nor mixed between versions.
 *
 * Keys: every 256-bit master key gives, by HKDF-SHA-256 (empty salt), a data key (info "sessionfs data 1") and a name
 * key (info "sessionfs names 1"). New blobs use the first key of the file; names always use the key of the
 * lowest id, so that the others can be rotated.
 *
 * Threads: a struct seal_keys is immutable after loading; every function may run on any thread.
 * Errors: negative errno; -EBADMSG for what fails to decode or to authenticate, -ENOKEY for a key id we do not have.
 */
#ifndef SESSIONFS_SEAL_H
#define SESSIONFS_SEAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SEAL_KEY_BYTES    32
#define SEAL_ID_BYTES     16 /* a directory's id, and the hash of a name */
#define SEAL_ID_TEXT      22 /* either of them in base64url, without padding */
#define SEAL_HEADER_BYTES 64
#define SEAL_TAG_BYTES    16
#define SEAL_NONCE_BYTES  24
#define SEAL_META_MAX     65536u /* encoded metadata: a bound for readers */

enum seal_state { SEAL_STATE_FINISHED = 0, SEAL_STATE_OPEN = 0xA5 };
#define SEAL_STATE_OFFSET   5
#define SEAL_VERSION_OFFSET 24 /* 16 bytes: sequence number, unique */

struct seal_keys;

/**
 * seal_keys_load() - read a key file
 * @path: lines of "HEX" or "ID:HEX" (64 hexadecimal digits; ID a decimal number 1 to 4294967295, 1 if left out), empty
 *        lines and lines starting with '#' are skipped. The first key seals, all of them open.
 * @why:  on failure one line for the operator: what is wrong and how to mend it. Never contains key material.
 * Return: 0; -ENOENT; -EACCES (mode wider than 0600, or owned by somebody else than us or root); -EINVAL (content)
 */
int seal_keys_load(struct seal_keys **ret, const char *path, char *why, size_t why_size);

/** seal_keys_create() - write a new random key to @path (O_EXCL, mode 0600, fsynced). -EEXIST if it is there. */
int seal_keys_create(const char *path);

/** seal_keys_new() - one key from memory, id 1 (tests, embedding programs). */
int seal_keys_new(struct seal_keys **ret, const uint8_t key[SEAL_KEY_BYTES]);
void seal_keys_free(struct seal_keys *keys); /* wipes; NULL is fine */

/** seal_name() - the hash of @name in directory @dir: first 128 bits of HMAC-SHA-256(name key, dir id || name). */
int seal_name(const struct seal_keys *keys, const uint8_t dir[SEAL_ID_BYTES], const char *name, size_t length,
              uint8_t ret[SEAL_ID_BYTES]);

/** seal_id_format() - base64url without padding: SEAL_ID_TEXT characters, no NUL. seal_id_parse(): 0 or -EINVAL. */
void seal_id_format(const uint8_t id[SEAL_ID_BYTES], char out[SEAL_ID_TEXT]);
int seal_id_parse(const char text[SEAL_ID_TEXT], uint8_t ret[SEAL_ID_BYTES]);

/** seal_random() - cryptographically strong bytes (RAND_bytes); aborts the process if there are none. */
void seal_random(void *out, size_t size);

struct seal_version {
    uint64_t seq, unique;
};

/* The plaintext header, decoded. */
struct seal_head {
    enum seal_state state;
    uint32_t key_id;
    uint32_t meta_size;
    uint64_t content_size;
    struct seal_version version;
    uint8_t nonce[SEAL_NONCE_BYTES];
};

enum seal_policy { SEAL_POLICY_SLIDING = 0, SEAL_POLICY_FIXED = 1 };

/* The metadata section, decoded. Encoding: docs/format.md. */
struct seal_meta {
    uint32_t mode, uid, gid; /* mode with the file type */
    enum seal_policy policy;
    uint64_t ino;
    uint64_t ttl_ms; /* the session's time to live when renewed; 0 never expires. Of a directory: the default
                        for what is created in it, SEAL_TTL_INHERIT for the mount's default */
    int64_t mtime_ns, ctime_ns, created_ns;
    uint8_t dir_id[SEAL_ID_BYTES]; /* of a directory: the id its entries are stored under; else zero */
    const char *name;              /* not terminated; the last component; points into the decoded buffer */
    uint16_t name_size;
    uint32_t xattrs_size;
    const void *xattrs; /* opaque to seal; points into the decoded buffer */
};
#define SEAL_TTL_INHERIT UINT64_MAX

/** seal_meta_size() - bytes of @meta when encoded. */
size_t seal_meta_size(const struct seal_meta *meta);

/** seal_blob_size() - bytes of the whole blob: header, both sections, both tags. */
size_t seal_blob_size(const struct seal_meta *meta, size_t content_size);

/** seal_blob_offset() - where the content's ciphertext starts in a blob with this head. */
size_t seal_blob_offset(const struct seal_head *head);

/**
 * seal_blob() - make a blob in @out, which has room for seal_blob_size() bytes
 * @key: the L2 key under which it will be stored (bound as associated data)
 * @content: must not overlap @out, or lie exactly at its place there: seal_blob_size() - tag - content_size
 * Return: 0, -EINVAL (metadata that the format cannot hold: a name longer than 255 bytes or with '/' or NUL in it, more
 *         than SEAL_META_MAX bytes in all, an unknown policy), -EFBIG (more than 64 GiB - 32 of content), -ENOMEM, or
 *         -EIO if OpenSSL fails; then @out is wiped.
 */
int seal_blob(const struct seal_keys *keys, const char *key, size_t key_size, struct seal_version version,
              enum seal_state state, const struct seal_meta *meta, const void *content, size_t content_size, void *out);

/**
 * seal_head() - decode the header from the first bytes of a blob
 * Return: 0, -EBADMSG if @size is too short or a field is impossible (M > SEAL_META_MAX, wrong magic, ...).
 */
int seal_head(const void *blob, size_t size, struct seal_head *ret);

/**
 * seal_open_meta() - decrypt and decode the metadata of a blob or of its prefix
 * @buffer: receives the plaintext, room for head->meta_size bytes; @ret points into it
 * Return: 0, -EBADMSG (prefix too short, authentication, decoding), -ENOKEY
 */
int seal_open_meta(const struct seal_keys *keys, const char *key, size_t key_size, const void *blob, size_t size,
                   void *buffer, struct seal_meta *ret);

/**
 * seal_open_content() - decrypt the content of a whole blob into @out (head->content_size bytes)
 * Return: 0, -EBADMSG (then @out is wiped), -ENOKEY
 */
int seal_open_content(const struct seal_keys *keys, const char *key, size_t key_size, const void *blob, size_t size,
                      void *out);

/*
 * The content section piece by piece, so that a large session is sealed while it is sent and opened while it arrives.
 * seal_blob_begin() writes header, metadata and its tag (seal_blob_offset() bytes) and starts the content.
 * Plaintext that seal_stream_update() gives is not to be believed before seal_stream_finish() returned 0.
 * More or less content than announced: -EINVAL when sealing, -EBADMSG when opening. A stream is used by one thread at a
 * time, may move between threads and does not need @keys any more once it has begun.
 */
struct seal_stream;
int seal_blob_begin(struct seal_stream **ret, const struct seal_keys *keys, const char *key, size_t key_size,
                    struct seal_version version, enum seal_state state, const struct seal_meta *meta,
                    size_t content_size, void *out);
int seal_open_begin(struct seal_stream **ret, const struct seal_keys *keys, const char *key, size_t key_size,
                    const void *header /* SEAL_HEADER_BYTES */);
int seal_stream_update(struct seal_stream *stream, const void *in, size_t size, void *out);
/** seal_stream_finish() - sealing: writes the tag; opening: checks it (-EBADMSG). Frees the stream either way. */
int seal_stream_finish(struct seal_stream *stream, uint8_t tag[SEAL_TAG_BYTES]);
void seal_stream_free(struct seal_stream *stream); /* gives up; NULL is fine */

#endif
