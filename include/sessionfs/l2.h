/*
 * l2: the links to Redis. Sends commands, gives replies and invalidations to the floor above. Knows neither sessions
 * nor the blob format; sees only keys and ciphertext.
 *
 * Links: n_links data links, pipelined; the commands of one key always use the same link (hash of the key), so they
 * stay in order. Every data link has CLIENT TRACKING ON REDIRECT to the invalidation link, NOLOOP. A link that breaks
 * fails what it had in flight with -EIO, reconnects alone with back-off, and counts its generation up. Threads: submit
 * functions on any thread: they write to the socket themselves when it takes it (never waiting). One I/O thread reads,
 * reconnects and finds deadlines. done() and the callbacks of l2_config run on the I/O thread, or inside the submit
 * call when it fails at once; no lock of l2 is held then. Errors: op->result: 0 or -ENOENT, -EEXIST (conditions),
 * -ENOSPC (OOM), -EACCES (NOAUTH, NOPERM, WRONGPASS), -EBADMSG (the key holds another type), -EIO (everything else,
 * time-outs included).
 */
#ifndef SESSIONFS_L2_H
#define SESSIONFS_L2_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct l2_address {
    bool is_local; /* local[:DIR]: path is the state directory, or NULL for the default */
    char *path;    /* unix socket (or DIR); NULL for TCP */
    char *host;    /* TCP; without the brackets of an IPv6 address */
    uint16_t port; /* 6379 unless said */
    unsigned db;
    char *user, *password; /* percent-decoded; NULL if absent */
};

/**
 * l2_address_parse() - redis://[user[:password]@]host[:port][/db], unix:///path[?db=N], local[:DIR]
 * @why: on failure one line that says what is wrong (never the password)
 * Return: 0 or -EINVAL. The strings are the caller's, for l2_address_deinit() (which wipes the password).
 */
int l2_address_parse(struct l2_address *ret, const char *source, char *why, size_t why_size);
void l2_address_deinit(struct l2_address *address);

/** l2_address_show() - the address without user and password, for logs, df and /proc/mounts. */
void l2_address_show(const struct l2_address *address, char *out, size_t size);

#define L2_KEY_MAX  128
#define L2_TTL_NONE 0u         /* never expires */
#define L2_TTL_KEEP UINT64_MAX /* what the key has */
#define L2_READ_ALL SIZE_MAX

struct l2;
struct l2_link;

struct l2_config {
    struct l2_address address; /* copied; not local any more */
    unsigned n_links;
    unsigned timeout_ms; /* connect, handshake and reply, each */
    void *owner;
    void (*invalidated)(void *owner, const char *key, size_t size); /* another client changed it, or it expired */
    void (*link_lost)(void *owner, unsigned link);                  /* what this link tracked is no longer reported */
    void (*all_lost)(void *owner);  /* no report can be relied on (the invalidation link broke), or FLUSHALL */
    void (*recovered)(void *owner); /* invalidations flow again after all_lost */
};

int l2_new(struct l2 **ret, const struct l2_config *config);

/**
 * l2_start() - start the I/O thread, connect; waits until links work (the only call that waits)
 * @why: on failure the reason in one line, with what mends it
 */
int l2_start(struct l2 *l2, char *why, size_t why_size);

/** l2_stop() - fail what is in flight, end the I/O thread. No callback after it. */
void l2_stop(struct l2 *l2);
void l2_free(struct l2 *l2);

struct l2_scan_result;

/* One command in flight. Embedded by the caller, who zeroes it, sets the callbacks and keeps it until done(). */
struct l2_op {
    void (*done)(struct l2_op *op);
    /* Reads: the value as it arrives, in one or several pieces; @total is its whole size. May be NULL. */
    void (*data)(struct l2_op *op, const void *bytes, size_t size, size_t total);
    int result;
    int64_t pttl_ms;     /* reads: remaining time, -1 for none */
    uint64_t generation; /* of the link when the command was sent */
    uint8_t echo[16];    /* writes: bytes 24..39 of the value right after the write; n_echo of them */
    unsigned n_echo;
    bool is_lost;                      /* -EIO because the link broke: whether Redis did it is not known */
    const struct l2_scan_result *scan; /* l2_scan() */
    /* private to l2 */
    struct l2_link *link;
    struct l2_op *next;
    void *parts, *parts_end; /* of a write that waits for its turn */
    uint64_t deadline_ms;
    uint8_t kind, n_replies;
    bool is_streaming, is_broken;
};

/** l2_link_of() - which data link a key uses; l2_generation() - how often that link was lost. */
unsigned l2_link_of(const struct l2 *l2, const char *key, size_t size);
uint64_t l2_generation(const struct l2 *l2, unsigned link);

/** l2_read() - the first @size bytes (L2_READ_ALL: all) and the remaining time of a key; tracked from then on. */
void l2_read(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size, size_t size);

enum l2_condition { L2_ALWAYS, L2_IF_ABSENT, L2_IF_PRESENT };

/**
 * l2_write_begin() - SET; the value of @total bytes follows in l2_write_part()s, then l2_write_end()
 * Between begin and end other threads' commands of that link queue up behind: do not wait for anything meanwhile.
 * Part buffers come from l2_buffer_get() and go over to l2, which wipes nothing (they hold ciphertext).
 * The reply also brings op->echo, read in the same pipeline, which renews the tracking.
 */
void l2_write_begin(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size, size_t total, uint64_t ttl_ms,
                    enum l2_condition condition);
void l2_write_part(struct l2 *l2, struct l2_op *op, void *buffer, size_t size);
void l2_write_end(struct l2 *l2, struct l2_op *op);
void *l2_buffer_get(struct l2 *l2, size_t size);

/** l2_remove() - DEL, or GETDEL when op->data wants the value. -ENOENT if it was not there. */
void l2_remove(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size);

/** l2_remove_if() - DEL if the 16 bytes at 24 are still @version. -EEXIST: they are not; -ENOENT: it was not there. */
void l2_remove_if(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size, const uint8_t version[16]);

/** l2_expire() - PEXPIRE (PERSIST for L2_TTL_NONE). -ENOENT if it is not there. Brings op->echo. */
void l2_expire(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size, uint64_t ttl_ms);

/** l2_patch() - one byte at @offset, if the 16 bytes at 24 are still @version; -ENOENT if not. Brings op->echo. */
void l2_patch(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size, const uint8_t version[16],
              size_t offset, uint8_t byte);

struct l2_scan_result {
    uint64_t cursor; /* 0: the end */
    size_t n_keys;
    const char **keys; /* not terminated; valid during done() */
    const size_t *key_sizes;
};

/** l2_scan() - one SCAN MATCH @pattern COUNT @count from @cursor; op->scan is the result. */
void l2_scan(struct l2 *l2, struct l2_op *op, uint64_t cursor, const char *pattern, unsigned count);

/** l2_info() - INFO memory, given as op->data. */
void l2_info(struct l2 *l2, struct l2_op *op);

struct l2_stats {
    _Atomic uint64_t n_commands, n_reads, n_writes, n_invalidations, n_reconnects, n_errors;
};
const struct l2_stats *l2_stats(const struct l2 *l2);
bool l2_is_up(const struct l2 *l2); /* the invalidation link works */

#endif
