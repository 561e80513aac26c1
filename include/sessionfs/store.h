/*
 * store: sessions. Get, save, touch, rename, remove, list, expire; knows no FUSE and no Redis command.
 *
 * Everything that may have to ask L2 is an operation: the caller fills a struct store_op, calls store_run() and gets
 * op->done() back, at once on the same thread when the answer is known, later on the I/O thread when it is not. No call
 * of this header waits for the network but store_new(), store_flush() and store_free().
 *
 * Sessions (files and directories) are handed out as pointers, which fs uses as FUSE node ids. One that was given to
 * the caller as op->found carries one reference of the kernel's: store_forget() takes it back. The root is
 * store_root().
 *
 * Freshness: an entry is *trusted* while L2 reports changes of it to us (link generation); everything else is asked for
 * again. Threads: any. Callbacks run on the I/O thread, the timer thread or inside store_run(), without a lock of the
 * store. Errors: negative errno in op->result.
 */
#ifndef SESSIONFS_STORE_H
#define SESSIONFS_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <sessionfs/l1.h>
#include <sessionfs/l2.h>
#include <sessionfs/seal.h>

#define STORE_LEASE_MS   2000u  /* what the kernel was told is never believed longer than this */
#define STORE_XATTRS_MAX 32768u /* all user.* attributes of one session together */
#define STORE_BLOCK      L1_PAGE

struct store;
struct session;
struct content;

struct store_config {
    struct l2_address address; /* where Redis is (not local any more) */
    struct seal_keys *keys;    /* the store's from then on, also when store_new() fails */
    const char *name_space;
    uint64_t ttl_ms; /* of new sessions; 0 never expires */
    uint64_t l1_size;
    uint64_t max_session;
    unsigned connections;
    unsigned timeout_ms;
    uint32_t root_uid, root_gid, root_mode; /* of the root directory, when this is the first instance */
};

/** store_new() - connect. On failure @why is the reason in one line with what mends it; nothing is left behind. */
int store_new(struct store **ret, const struct store_config *config, char *why, size_t why_size);

/** What comes up to fs. Set before the first operation. Any thread; must not block; may call store_remember(). */
struct store_events {
    void *owner;
    /* The kernel's copy of @session is not to be believed any more. */
    void (*changed)(void *owner, struct session *session);
    /* @name is gone from directory @parent (NULL: the kernel does not know that one), or stands for another session. */
    void (*gone)(void *owner, struct session *session, struct session *parent, const char *name, size_t size);
    /* A save in @dir will end with a close: make sure that closes in it are heard of, then call store_watched(). */
    void (*watch)(void *owner, struct session *dir);
    /* Report the closes which the kernel has queued already (store_closed()). Called before a new save begins. */
    void (*settle)(void *owner);
};
void store_set_events(struct store *store, const struct store_events *events); /* NULL: nobody listens any more */

/** store_flush() - wait until everything unsaved is in L2, @timeout_ms at most. Return: 0 or -ETIMEDOUT. */
int store_flush(struct store *store, unsigned timeout_ms);
void store_free(struct store *store);

struct session *store_root(struct store *store);
void store_remember(struct store *store, struct session *session, uint64_t n); /* n more references of the kernel */
void store_forget(struct store *store, struct session *session, uint64_t n);

/** store_path() - the path of directory @dir below the mount ("" for the root). 0, -ENAMETOOLONG, -ENOENT if it is
 * gone. */
int store_path(struct store *store, struct session *dir, char *out, size_t size);

/**
 * store_closed() - a writer of @name in @dir has closed it; NULL name: reports were lost, take all as closed
 * @batch: what has to be sealed and sent for that is added to it, for store_send(), without the caller's locks
 */
struct commit;
void store_closed(struct store *store, struct session *dir, const char *name, size_t size, struct commit **batch);
void store_send(struct store *store, struct commit *batch);

/** store_watched() - closes in @dir are (or, on failure, will never be) heard of. */
void store_watched(struct store *store, struct session *dir, bool is_watched);

enum store_kind {
    STORE_LOOKUP,      /* dir, name -> found, attr */
    STORE_GETATTR,     /* session -> attr */
    STORE_SETATTR,     /* session, set -> attr */
    STORE_READ,        /* session, offset, size -> bytes, n_bytes (lent until store_done_with(op)) */
    STORE_WRITE,       /* session, offset, data, size, is_cached, kills_suid */
    STORE_SYNC,        /* session */
    STORE_CREATE,      /* dir, name, mode (with type), uid, gid, is_exclusive -> found, attr */
    STORE_REMOVE,      /* dir, name: a file */
    STORE_RMDIR,       /* dir, name */
    STORE_RENAME,      /* dir, name, new_dir, new_name, no_replace */
    STORE_GETXATTR,    /* session, xattr -> bytes, n_bytes */
    STORE_SETXATTR,    /* session, xattr, data, size, xattr_flags */
    STORE_REMOVEXATTR, /* session, xattr */
    STORE_LISTXATTR,   /* session -> bytes, n_bytes: terminated names */
    STORE_LIST,        /* dir, list: get more entries */
    STORE_STATFS,      /* -> total, used (bytes) */
};

enum {
    STORE_SET_MODE = 1,
    STORE_SET_UID = 2,
    STORE_SET_GID = 4,
    STORE_SET_SIZE = 8,
    STORE_SET_MTIME = 16,
    STORE_SET_MTIME_NOW = 32,
    STORE_SET_CTIME = 64,
    STORE_SET_KILL_SUID = 128,
};

struct store_attr {
    uint64_t ino, size;
    uint32_t mode, uid, gid;
    int64_t mtime_ns, ctime_ns;
    unsigned valid_ms; /* how long the kernel may believe this without asking */
};

struct store_list;

struct store_op {
    enum store_kind kind;
    void (*done)(struct store_op *op);

    struct session *session, *dir, *new_dir; /* the kernel's references keep them during the operation */
    char name[256], new_name[256];           /* terminated; file names, or name: of the attribute */
    uint16_t name_size, new_name_size;
    uint32_t mode, uid, gid;
    uint64_t offset;
    size_t size;
    const void *data; /* the caller's during store_run(); copied when the operation has to wait */
    unsigned set;     /* STORE_SET_* */
    int64_t mtime_ns;
    int xattr_flags; /* XATTR_CREATE, XATTR_REPLACE */
    bool is_exclusive, no_replace, is_cached, kills_suid;
    struct store_list *list;

    int result;
    struct store_attr attr;
    struct session *found;
    const void *bytes;
    size_t n_bytes;
    uint64_t total, used;

    /* private to store */
    struct store *store;
    struct store_op *next;
    struct content *content;
    struct session *target; /* rename, create: pinned */
    void *copy;             /* of data */
    void *lent;             /* what bytes points to */
    const struct session *seen_of;
    uint64_t need;
    uint32_t seen;
    uint8_t stage;
    bool is_applied, is_settled;
    int later;  /* a result that waits for the next stage */
    void *work; /* of a stage */
};

/** store_run() - carry it out. The op (zeroed, then filled) stays the caller's, and untouched, until done(). */
void store_run(struct store *store, struct store_op *op);

/**
 * store_peek() - the session of that name if it is known and fresh, without asking anybody
 * Return: it, with one reference of the kernel's for the caller, and *@attr; NULL if a STORE_LOOKUP would have to wait.
 */
struct session *store_peek(struct store *store, struct session *dir, const char *name, size_t size,
                           struct store_attr *attr);

/** store_done_with() - give back what the result lent. Called by the caller when it has used bytes. */
void store_done_with(struct store *store, struct store_op *op);

/* A listing of a directory in progress. Entries keep their place: position 0 is the first that was seen. */
struct store_entry {
    const char *name;
    uint16_t name_size;
    uint32_t mode;
    uint64_t ino;
};
struct store_list *store_list_new(struct session *dir);
void store_list_free(struct store *store, struct store_list *list);
/** store_list_at() - 1 and @ret; 0: STORE_LIST has to be run first; -1: the end. One thread at a time. */
int store_list_at(struct store_list *list, uint64_t position, struct store_entry *ret);

struct store_stats {
    struct l1_stats l1;
    const struct l2_stats *l2;
    bool l2_is_up;
    uint64_t n_fetches, n_commits, n_expired, n_dirty, n_bad;
};
void store_stats(struct store *store, struct store_stats *ret);

#endif
