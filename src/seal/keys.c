#include "seal/keys.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/kdf.h>
#include <openssl/rand.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "base/macros.h"
#include "seal/thread.h"

#define HOW_TO_MAKE "make one with: openssl rand -hex 32"

struct seal_keys {
    size_t n_keys;
    struct key {
        uint32_t id;
        struct xaes_key data;
    } list[KEYS_MAX];  /* in the order of the file: the first one seals */
    uint32_t names_id; /* the lowest id */
    struct name_key names;
};

/* The line for the operator; the path is a part of every message. */
struct reason {
    const char *path;
    char *why;
    size_t why_size;
};

__attribute__((format(printf, 3, 4))) static int fail(const struct reason *reason, int error, const char *format, ...)
{
    char what[512];
    va_list args;

    va_start(args, format);
    vsnprintf(what, sizeof(what), format, args);
    va_end(args);
    if (reason->why_size > 0)
        snprintf(reason->why, reason->why_size, "key file %s: %s", reason->path, what);
    return error;
}

/* Zeroed pages that neither swap nor a core dump shall see; best effort: the limit of locked memory may be low. */
static void *locked_new(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED)
        return NULL;
    (void)!mlock(memory, size);
    (void)!madvise(memory, size, MADV_DONTDUMP);
    return memory;
}

static void locked_free(void *memory, size_t size)
{
    if (!memory)
        return;
    OPENSSL_cleanse(memory, size);
    munmap(memory, size);
}

void seal_keys_free(struct seal_keys *keys)
{
    locked_free(keys, sizeof(*keys));
}

DEFINE_CLEANUP(struct seal_keys *, seal_keys_free)

static int hkdf(const uint8_t master[SEAL_KEY_BYTES], const char *info, uint8_t out[SEAL_KEY_BYTES])
{
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, (char *)"SHA2-256", 0),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)master, SEAL_KEY_BYTES),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, (void *)info, strlen(info)),
        OSSL_PARAM_construct_end(),
    };
    const struct algorithms *get = algorithms_get();
    EVP_KDF_CTX *ctx = get ? EVP_KDF_CTX_new(get->hkdf) : NULL;
    bool ok = ctx && EVP_KDF_derive(ctx, out, SEAL_KEY_BYTES, params) == 1;

    EVP_KDF_CTX_free(ctx);
    if (!ok)
        ERR_clear_error();
    return ok ? 0 : -EIO;
}

int keys_derive(const uint8_t master[SEAL_KEY_BYTES], uint8_t data[SEAL_KEY_BYTES], uint8_t names[SEAL_KEY_BYTES])
{
    int r = hkdf(master, "sessionfs data 1", data);
    if (r < 0)
        return r;
    return hkdf(master, "sessionfs names 1", names);
}

static void set_names(struct seal_keys *keys, uint32_t id, const uint8_t key[SEAL_KEY_BYTES])
{
    keys->names_id = id;
    memset(keys->names.inner, 0x36, sizeof(keys->names.inner));
    memset(keys->names.outer, 0x5c, sizeof(keys->names.outer));
    for (int i = 0; i < SEAL_KEY_BYTES; i++) {
        keys->names.inner[i] ^= key[i];
        keys->names.outer[i] ^= key[i];
    }
}

static int add_key(struct seal_keys *keys, uint32_t id, const uint8_t master[SEAL_KEY_BYTES])
{
    uint8_t data[SEAL_KEY_BYTES], names[SEAL_KEY_BYTES];

    assert(keys->n_keys < KEYS_MAX);
    int r = keys_derive(master, data, names);
    if (r == 0)
        r = xaes_key_init(&keys->list[keys->n_keys].data, data);
    if (r == 0) {
        keys->list[keys->n_keys++].id = id;
        if (keys->n_keys == 1 || id < keys->names_id)
            set_names(keys, id, names);
    }
    OPENSSL_cleanse(data, sizeof(data));
    OPENSSL_cleanse(names, sizeof(names));
    return r;
}

int seal_keys_new(struct seal_keys **ret, const uint8_t key[SEAL_KEY_BYTES])
{
    CLEANUP(seal_keys_freep) struct seal_keys *keys = locked_new(sizeof(*keys));

    if (!keys)
        return -ENOMEM;
    int r = add_key(keys, 1, key);
    if (r < 0)
        return r;
    *ret = TAKE(keys);
    return 0;
}

/* 1 to 4294967295 in decimal, no sign, no leading zero; else 0. */
static uint32_t parse_id(const char *text, size_t size)
{
    uint64_t id = 0;

    if (size == 0 || size > 10 || text[0] == '0')
        return 0;
    for (size_t i = 0; i < size; i++) {
        if (text[i] < '0' || text[i] > '9')
            return 0;
        id = id * 10 + (uint64_t)(text[i] - '0');
    }
    return id <= UINT32_MAX ? (uint32_t)id : 0;
}

static bool parse_hex(const char *text, size_t size, uint8_t out[SEAL_KEY_BYTES])
{
    if (size != 2 * SEAL_KEY_BYTES)
        return false;
    for (int i = 0; i < SEAL_KEY_BYTES; i++) {
        int high = OPENSSL_hexchar2int((unsigned char)text[2 * i]);
        int low = OPENSSL_hexchar2int((unsigned char)text[2 * i + 1]);

        if (high < 0 || low < 0)
            return false;
        out[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

static uint32_t free_id(const struct seal_keys *keys)
{
    uint32_t id = 1;

    while (keys_get_opening(keys, id))
        id++;
    return id;
}

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r';
}

/* One line, without its newline. Says nothing of what stands in it: it may be a key, only not quite. */
static int parse_line(struct seal_keys *keys, const char *line, size_t size, size_t number, const struct reason *reason)
{
    uint8_t master[SEAL_KEY_BYTES];
    uint32_t id = 1;
    int r;

    while (size > 0 && is_blank(line[size - 1]))
        size--;
    if (size == 0 || line[0] == '#')
        return 0;

    const char *colon = memchr(line, ':', size);
    if (colon) {
        id = parse_id(line, (size_t)(colon - line));
        size -= (size_t)(colon + 1 - line);
        line = colon + 1;
    }
    if (id == 0)
        return fail(reason, -EINVAL, "line %zu: the key id before ':' must be a number from 1 to 4294967295", number);
    if (!parse_hex(line, size, master))
        r = fail(reason, -EINVAL, "line %zu: not 64 hexadecimal digits (" HOW_TO_MAKE ")", number);
    else if (keys_get_opening(keys, id))
        r = fail(reason, -EINVAL, "line %zu: a second key with the id %u: give each key an id of its own, as in %u:HEX",
                 number, id, free_id(keys));
    else if (keys->n_keys == KEYS_MAX)
        r = fail(reason, -EINVAL, "line %zu: more than %d keys: remove those that no session uses any more", number,
                 KEYS_MAX);
    else if ((r = add_key(keys, id, master)) < 0)
        fail(reason, r, "line %zu: OpenSSL cannot derive keys: %s", number, strerror(-r));
    OPENSSL_cleanse(master, sizeof(master));
    return r;
}

static int parse(struct seal_keys *keys, const char *text, size_t size, const struct reason *reason)
{
    size_t number = 0;

    for (const char *line = text, *end = text + size; line < end;) {
        const char *newline = memchr(line, '\n', (size_t)(end - line));
        const char *line_end = newline ? newline : end;

        int r = parse_line(keys, line, (size_t)(line_end - line), ++number, reason);
        if (r < 0)
            return r;
        line = line_end + 1;
    }
    return keys->n_keys > 0 ? 0 : fail(reason, -EINVAL, "holds no key (" HOW_TO_MAKE ")");
}

/* O_NONBLOCK: a FIFO in its place must not hang the start. A symbolic link is fine: its target is what is judged. */
static int open_checked(const struct reason *reason)
{
    CLEANUP(closep) int fd = open(reason->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    struct stat st;

    if (fd < 0 && errno == ENOENT)
        return fail(reason, -ENOENT, "does not exist: make one with: (umask 077; openssl rand -hex 32 > %s)",
                    reason->path);
    if (fd < 0 || fstat(fd, &st) < 0)
        return fail(reason, -errno, "cannot be opened by uid %u: %s", (unsigned)geteuid(), strerror(errno));
    if (!S_ISREG(st.st_mode))
        return fail(reason, -EINVAL, "not a regular file: give the path of a file that holds the key");
    if (st.st_uid != geteuid() && st.st_uid != 0)
        return fail(reason, -EACCES, "belongs to uid %u, who could change it: chown %u %s", (unsigned)st.st_uid,
                    (unsigned)geteuid(), reason->path);
    if (st.st_mode & 07177)
        return fail(reason, -EACCES, "mode %04o %s: chmod 600 %s", (unsigned)st.st_mode & 07777,
                    st.st_mode & 044   ? "lets others read it"
                    : st.st_mode & 033 ? "lets others use it"
                                       : "is wider than 0600",
                    reason->path);
    int taken = fd;
    fd = -1;
    return taken;
}

/* Return: bytes read, at most @size; or negative errno. */
static ssize_t read_all(int fd, char *out, size_t size)
{
    size_t n = 0;

    while (n < size) {
        ssize_t got = read(fd, out + n, size - n);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -errno;
        if (got == 0)
            break;
        n += (size_t)got;
    }
    return (ssize_t)n;
}

static int load(struct seal_keys *keys, char *text, const struct reason *reason)
{
    CLEANUP(closep) int fd = open_checked(reason);

    if (fd < 0)
        return fd;
    ssize_t size = read_all(fd, text, KEYS_FILE_MAX + 1);
    if (size < 0)
        return fail(reason, (int)size, "cannot be read: %s", strerror((int)-size));
    if (size > KEYS_FILE_MAX)
        return fail(reason, -EINVAL, "larger than %d bytes: is this the right file?", KEYS_FILE_MAX);
    return parse(keys, text, (size_t)size, reason);
}

int seal_keys_load(struct seal_keys **ret, const char *path, char *why, size_t why_size)
{
    const struct reason reason = {path, why, why_size};
    CLEANUP(seal_keys_freep) struct seal_keys *keys = locked_new(sizeof(*keys));
    char *text = locked_new(KEYS_FILE_MAX + 1);

    int r = keys && text ? load(keys, text, &reason) : fail(&reason, -ENOMEM, "no memory for the keys");
    locked_free(text, KEYS_FILE_MAX + 1);
    if (r < 0)
        return r;
    *ret = TAKE(keys);
    return 0;
}

static int write_all(int fd, const char *text, size_t size)
{
    while (size > 0) {
        ssize_t done = write(fd, text, size);

        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return -errno;
        text += done;
        size -= (size_t)done;
    }
    return 0;
}

static int write_new_key(int fd)
{
    char line[2 + 2 * SEAL_KEY_BYTES + 2] = "1:"; /* its newline, then the NUL of the last snprintf() */
    uint8_t key[SEAL_KEY_BYTES];
    int r = -EIO;

    if (RAND_priv_bytes(key, sizeof(key)) == 1) {
        for (int i = 0; i < SEAL_KEY_BYTES; i++)
            snprintf(line + 2 + 2 * i, 3, "%02x", key[i]);
        line[sizeof(line) - 2] = '\n';
        r = write_all(fd, line, sizeof(line) - 1);
    }
    OPENSSL_cleanse(key, sizeof(key));
    OPENSSL_cleanse(line, sizeof(line));
    if (r < 0)
        return r;
    return fchmod(fd, 0600) < 0 || fsync(fd) < 0 ? -errno : 0;
}

/* So that the name is on the disk, too: sessions sealed with a key that a crash took would be lost. */
static int sync_parent(const char *path)
{
    CLEANUP(freep) char *copy = strdup(path);
    CLEANUP(closep) int fd = copy ? open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;

    if (!copy)
        return -ENOMEM;
    return fd < 0 || fsync(fd) < 0 ? -errno : 0;
}

int seal_keys_create(const char *path)
{
    CLEANUP(closep) int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

    if (fd < 0)
        return -errno;
    int r = write_new_key(fd);
    if (r == 0)
        r = sync_parent(path);
    if (r < 0)
        unlink(path);
    return r;
}

const struct xaes_key *keys_get_sealing(const struct seal_keys *keys, uint32_t *ret_id)
{
    *ret_id = keys->list[0].id;
    return &keys->list[0].data;
}

const struct xaes_key *keys_get_opening(const struct seal_keys *keys, uint32_t id)
{
    for (size_t i = 0; i < keys->n_keys; i++)
        if (keys->list[i].id == id)
            return &keys->list[i].data;
    return NULL;
}

const struct name_key *keys_get_names(const struct seal_keys *keys)
{
    return &keys->names;
}
