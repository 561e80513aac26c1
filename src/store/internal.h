/*
 * What the files of store share: one session, what is in flight for it, the store itself.
 *
 * A session's life. Its struct lives while it has pins (l1.h): the kernel (n_known > 0), content, being dirty, an armed
 * timer, a fetch, a commit and every operation hold one. IS_KNOWN: its attributes were read from L2 or made here. GONE:
 * it is out of the index for good, removed, expired or replaced; ORPHAN: removed here, so its holders may go on using
 * it.
 *
 * Operations are functions that run from the top each time something they waited for has happened: "what do I miss? ask
 * for it and park". They change the session only when nothing is missing any more, so running again is harmless.
 *
 * Locks: session->lock (first), then any of: l1's, key stripe, timer_lock, dirs_lock, l2's. Two sessions: never both,
 * but for rename, which locks the lower address first. No callback runs with a lock held.
 */
#ifndef SESSIONFS_STORE_INTERNAL_H
#define SESSIONFS_STORE_INTERNAL_H

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>

#include <sessionfs/store.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/macros.h"
#include "base/wheel.h"

#include <endian.h>

#define PREFIX_BYTES       81920u /* a first read: brings whole sessions of up to 79 kB */
#define PREFIX_LARGE_BYTES 4096u  /* ... and where sessions are larger than that, header and metadata are enough */
#define AHEAD_MAX          8      /* credit for fetching large contents before they are read */
#define LIST_PREFIX        1024u
#define OPEN_WAIT_MS       1000u  /* how long a reader waits for a save that is not closed yet */
#define FINISH_MS          300u   /* an open save without a close is finished after this */
#define DIRTY_IDLE_MS      2000u  /* unsaved changes without a close are saved after this pause ... */
#define DIRTY_MAX_MS       10000u /* ... or at the latest */
#define RETRY_MS           500u
#define REFUSED_MS         20u /* after an error reply that may pass (LOADING, ...) the command is sent again */
#define TRUNCATED_MS       5u
#define PREVIOUS_MS        10u
#define OUTAGE_MS          500u /* after a failed fetch what is cached is served without asking */
#define TRUST_AFTER        16   /* so many whole saves in a row make a directory trusted */
#define MISTRUST           (-1000)
#define KEY_STRIPES        64u
#define KEY_BUCKETS        (1u << 17)
#define PARKED             1 /* what a step returns that has to wait */

struct dir {
    struct dir *next;
    uint8_t id[SEAL_ID_BYTES];
    char id_text[SEAL_ID_TEXT];
    uint64_t number;         /* as l1 knows it */
    _Atomic int trust;       /* whole saves in a row */
    _Atomic uint64_t ttl_ms; /* of new sessions; SEAL_TTL_INHERIT */
    _Atomic int policy;
    _Atomic bool is_large;   /* the session fetched last was larger than a prefix */
    _Atomic int ahead;       /* credit: lookups of large sessions that were followed by reads, less the others */
    _Atomic int watch;       /* enum watch_state */
    struct session *session; /* the directory itself while the kernel knows it; dirs_lock */
};

enum watch_state { WATCH_NONE, WATCH_ASKED, WATCH_ON, WATCH_FAILED };

struct content {
    _Atomic unsigned refs;
    size_t size, room; /* bytes used; bytes of the page run, 0: none */
    uint64_t unique;   /* the version it belongs to; 0 while it is changed */
    unsigned char *bytes;
};

struct fetch;
struct commit;

enum session_flags {
    S_IS_INIT = 1,
    S_IS_KNOWN = 2, /* attributes are valid */
    S_GONE = 4,
    S_ORPHAN = 8,
    S_DIRTY = 16,         /* differs from L2 */
    S_CONTENT_DIRTY = 32, /* ... in its content: a save is in progress */
    S_TRUNCATED = 64,     /* ... by nothing but a truncation */
    S_OPEN = 128,         /* our last version is marked open in L2 */
    S_SHOWED_PREVIOUS = 256,
    S_RENEWING = 512,    /* a PEXPIRE is on its way */
    S_BUSY = 1024,       /* a removal or rename is under way: others wait */
    S_BAD = 2048,        /* the last fetch did not authenticate */
    S_CLOSED = 4096,     /* closed while a commit was in flight: commit again */
    S_FAILED = 8192,     /* unsaved changes could not be saved: see what L2 has before trying again */
    S_REPLACED = 16384,  /* gone because another session has its name now */
    S_WHOLE = 32768,     /* the save in progress was published by its first write */
    S_FINISHING = 65536, /* a patch is on its way */
    S_KEYED = 131072,    /* found by its key */
    S_AHEAD = 262144,    /* its content was fetched ahead and not read yet */
    S_PUBLISH = 524288,  /* a truncation that a close followed: save it if no write comes at once */
};

struct session {
    struct l1_entry entry;
    pthread_mutex_t lock;
    /* guarded by lock */
    unsigned flags;
    uint32_t mode, uid, gid;
    uint32_t fetch_no, done_no; /* fetches started, and the last that ended */
    uint32_t invalid_no;        /* changes elsewhere that were reported */
    int fetch_error, commit_error;
    struct dir *dir;           /* where it lives */
    struct dir *self;          /* of a directory: what lives in it */
    uint8_t id[SEAL_ID_BYTES]; /* hash of its name */
    struct session *key_next;  /* key stripe lock */
    unsigned link;             /* which link its key uses */
    uint64_t ino, size, ttl_ms;
    int64_t mtime_ns, ctime_ns, created_ns;
    enum seal_policy policy;
    uint32_t xattrs_size;
    char *xattrs;
    struct seal_version version; /* of what L2 has */
    uint64_t generation;         /* of its link when it was read; 0: suspect */
    uint64_t deadline_ms;        /* 0: never */
    uint64_t told;               /* version whose attributes the kernel was told */
    struct content *content, *previous;
    uint64_t previous_until_ms, commit_at_ms, dirty_since_ms, finish_at_ms;
    uint64_t change_no, saved_no, failed_no;
    struct fetch *fetch;
    struct commit *commit, *unsent;
    struct store_op *waiters, **waiters_end;
    uint64_t n_known;
    struct session *gone_next, **gone_link; /* gone_lock */
    struct wheel_timer timer;               /* timer_lock */
};

struct fetch {
    struct l2_op op;
    struct store *store;
    struct session *session; /* pinned */
    char key[L2_KEY_MAX];
    size_t key_size, wanted;
    uint64_t started_ms;
    uint64_t wait_until_ms; /* the blob is open: until then, or until it changes; 0: does not wait */
    uint64_t give_up_ms;    /* ... and however often it changes until then */
    uint64_t retry_at_ms;   /* L2 refused for the moment; 0: did not */
    bool was_invalidated, is_whole;
    int error; /* of decoding */
    /* what arrived */
    unsigned char *prefix; /* header and metadata */
    size_t n_prefix, prefix_size, prefix_room;
    struct seal_head head;
    struct seal_meta meta;
    unsigned char *plain; /* the metadata, opened */
    bool has_head, has_meta;
    struct seal_stream *stream;
    struct content *content;
    size_t n_content, n_tag;
    uint8_t tag[SEAL_TAG_BYTES];
};

struct commit {
    struct l2_op op;
    struct store *store;
    struct session *session; /* pinned */
    char key[L2_KEY_MAX];
    size_t key_size;
    struct seal_meta meta;   /* name and xattrs point into tail */
    struct content *content; /* a reference; NULL: empty */
    struct seal_version version;
    enum seal_state state;
    uint64_t ttl_ms, change_no, started_ms;
    uint64_t retry_at_ms; /* L2 refused for the moment; 0: did not */
    struct commit *next;  /* in a batch */
    uint32_t invalid_no;  /* of the session that has the key: a report may come before our reply does */
    enum l2_condition condition;
    void (*finished)(struct commit *commit, int result); /* instead of the usual end (create, rename) */
    struct store_op *for_op;
    char tail[];
};

struct key_stripe {
    pthread_mutex_t lock;
    char pad[24];
};

struct store {
    struct store_config config;
    char name_space[72];
    struct seal_keys *keys;
    struct l1 *l1;
    struct l2 *l2;
    pthread_rwlock_t events_lock; /* held for reading during a call up */
    struct store_events events;
    struct session *root;

    pthread_mutex_t gone_lock;
    struct session *gone; /* gone_lock: gone from the index, but known to the kernel */

    pthread_mutex_t watch_lock;
    struct store_op *watch_waiters; /* watch_lock */

    pthread_mutex_t dirs_lock;
    struct dir *dirs[1024];
    uint64_t n_dirs;

    struct key_stripe key_stripes[KEY_STRIPES];
    struct session **key_buckets;

    pthread_mutex_t timer_lock;
    pthread_cond_t timer_wake;
    pthread_t timer_thread;
    bool has_timer_thread, is_stopping;
    uint64_t timer_sleeps_until_ms;
    struct wheel *wheel;

    _Atomic uint64_t outage_until_ms;
    _Atomic uint32_t invalid_no[1024]; /* store_invalid_no() */
    _Atomic bool is_closing;
    _Atomic uint64_t n_fetches, n_commits, n_expired, n_dirty, n_bad;
};

/* store.c: what goes up, directories, timers */
void event_changed(struct store *store, struct session *session);
void event_gone(struct store *store, struct session *session, struct session *parent, const char *name, size_t size);
void event_watch(struct store *store, struct session *dir);
void event_settle(struct store *store);
struct dir *store_dir(struct store *store, const uint8_t id[SEAL_ID_BYTES]);
struct session *dir_session(struct store *store, struct dir *dir); /* the directory itself, pinned; NULL: not known */
void dir_set_session(struct store *store, struct dir *dir, struct session *from, struct session *to);
void store_arm_locked(struct store *store, struct session *session); /* for the earliest thing that is due */
void store_disarm_locked(struct store *store, struct session *session);
_Atomic uint32_t *store_invalid_no(struct store *store, const char *key, size_t size);

/* session.c: life, names, trust */
void *session_make(void *owner);
void session_release(void *owner, struct l1_entry *entry);
bool session_evict(void *owner, struct l1_entry *entry);
struct session *session_get(struct store *store, struct dir *dir, const char *name, size_t size); /* pinned */
struct session *session_by_key(struct store *store, const char *key, size_t size);                /* pinned, or NULL */
void session_rekey_locked(struct store *store, struct session *session, struct dir *dir, const char *name, size_t size);
/* The version's random half in what a write brought back of the key, 0: none. */
static inline uint64_t echo_unique(const struct l2_op *op)
{
    uint64_t unique = 0;

    if (op->n_echo == sizeof(op->echo))
        memcpy(&unique, op->echo + 8, sizeof(unique));
    return le64toh(unique);
}
size_t session_key(const struct store *store, const struct session *session, char key[L2_KEY_MAX]);
static inline void session_unpin(struct store *store, struct session *session)
{
    l1_unpin(store->l1, &session->entry);
}
struct dir *session_inside(struct session *session); /* of a directory: what lives in it, else NULL; takes the lock */
bool session_is_trusted(struct store *store, const struct session *session);
void session_distrust(struct store *store, struct session *session); /* another instance changed it; takes the lock */
void session_adopt_meta_locked(struct store *store, struct session *session, const struct seal_meta *meta);
void session_set_content_locked(struct store *store, struct session *session,
                                struct content *content); /* takes the ref */
void session_set_dirty_locked(struct store *store, struct session *session);
void session_set_clean_locked(struct store *store, struct session *session);
/* Gone for good: @flags S_GONE, with S_ORPHAN if its holders may go on. Call events.gone after unlocking if it returns
 * true. */
bool session_kill_locked(struct store *store, struct session *session, unsigned flags);
void session_tell_gone(struct store *store, struct session *session);
void session_leave_gone(struct store *store, struct session *session); /* store->gone */
void session_attr_locked(struct store *store, struct session *session, struct store_attr *ret);
void session_renew_locked(struct store *store,
                          struct session *session); /* use or touch: the TTL starts anew, coarsely */
void session_set_deadline_locked(struct store *store, struct session *session, uint64_t ttl_ms);

/* content.c */
struct content *content_new(struct store *store, size_t size); /* NULL: no room. Zeroed pages. */
struct content *content_ref(struct content *content);
void content_unref(struct store *store, struct content *content);
/* @content (consumed) made writable by its only owner, with room for @room bytes; NULL: no room, nothing consumed. */
struct content *content_writable(struct store *store, struct content *content, size_t room);

/* fetch.c */
void fetch_start_locked(struct store *store, struct session *session, size_t wanted);
size_t fetch_prefix(const struct session *session);            /* how much a first read asks for */
void fetch_wake_locked(struct fetch *fetch);                   /* the version it waits for may be there */
void fetch_retry_locked(struct fetch *fetch, uint64_t now_ms); /* ask again if it is time */
bool fetch_is_due_locked(struct fetch *fetch, uint64_t now_ms);
void fetch_settle(struct store *store,
                  struct session *session); /* waited long enough for an open save; takes the lock */

/* commit.c */
struct commit *commit_new_locked(struct store *store, struct session *session, enum seal_state state);
void commit_start_locked(struct store *store, struct session *session,
                         enum seal_state state); /* sent by session_unlock() */
void commit_send(struct commit *commit);         /* without locks */
/* The generation to trust our new version by, 0 if it is not to be trusted: @session has its key. */
uint64_t commit_generation_locked(const struct commit *commit, const struct session *session);
void commit_free(struct commit *commit);
void commit_finish_open_locked(struct store *store, struct session *session); /* mark our open version finished */
struct commit *commit_closed(struct store *store, struct session *session);   /* a commit to be sent, or NULL */
bool commit_is_due_locked(struct commit *commit, uint64_t now_ms);            /* true: send it again */
void commit_due_locked(struct store *store, struct session *session, uint64_t now_ms);

/* ops.c */
void op_run(struct store_op *op);
void op_finish(struct store_op *op, int result);
void op_park_locked(struct session *session, struct store_op *op);
struct store_op *op_take_waiters_locked(struct session *session);
void op_run_all(struct store_op *ops);
/* Unlock; then send what has to be sent. */
void session_unlock(struct session *session);
/* 0: fresh enough for @op; PARKED; or an error. */
int op_need_attr_locked(struct store_op *op, struct session *session);
int op_need_content_locked(struct store_op *op, struct session *session);
int op_need_saved_locked(struct store_op *op, struct session *session);
int op_save_now_locked(struct store_op *op, struct session *session); /* start a commit of all changes, and park */

/* A close in @dir will matter: 0 when it will be heard of (or never can be), or PARKED. */
int op_need_watch(struct store_op *op, struct dir *dir);

/* names.c, xattr.c, list.c: steps */
int step_lookup(struct store_op *op);
int step_create(struct store_op *op);
int step_remove(struct store_op *op);
int step_rmdir(struct store_op *op);
int step_rename(struct store_op *op);
int step_getxattr(struct store_op *op);
int step_setxattr(struct store_op *op);
int step_removexattr(struct store_op *op);
int step_listxattr(struct store_op *op);
int step_list(struct store_op *op);
int step_statfs(struct store_op *op);

#endif
