/*
 * What the files of fs share. A node id is the address of its struct session (store keeps it while the kernel knows
 * it); the root is FUSE_ROOT_ID.
 *
 * Threads: workers (transport.c) read requests and run handlers; two notifiers (notify.c), one for inodes, one for
 * entries, because the kernel may make each wait for a request that a worker answers; one watcher (watch.c).
 */
#ifndef SESSIONFS_FS_INTERNAL_H
#define SESSIONFS_FS_INTERNAL_H

#include <fuse_lowlevel.h>
#include <pthread.h>
#include <stdatomic.h>

#include <sessionfs/fs.h>
#include <sessionfs/store.h>

#define FS_MAX_WRITE   (1u << 20)
#define FS_MAX_WORKERS 8u
#define FS_BUFFER_SIZE (FS_MAX_WRITE + 65536) /* holds every request */

struct notice {
    struct notice *next;
    struct session *session, *parent; /* each with a reference of the kernel's */
    uint16_t name_size;
    char name[];
};

struct notifier {
    struct fs *fs;
    pthread_t thread;
    bool has_thread, is_stopping;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct notice *head, **tail;
    void (*handle)(struct fs *fs, struct notice *notice); /* consumes the notice */
};

struct watcher;

struct worker {
    struct fs *fs;
    pthread_t thread;
    bool has_thread;
    _Atomic bool has_ended;
};

struct fs {
    struct fs_config config;
    struct store *store;
    struct fuse_session *se;
    char *mountpoint;
    int fd; /* /dev/fuse */
    pid_t guardian;
    int guardian_fd;                                 /* closed by our death */
    int event_fd;                                    /* tells fs_run(): something of the following changed */
    _Atomic bool is_leaving, is_stopping, is_agreed; /* asked to stop; the workers end; INIT was answered */
    bool is_mounted;
    struct worker workers[FS_MAX_WORKERS];
    unsigned n_workers;
    _Atomic uint64_t init_unique;
    uint32_t kernel_flags;
    _Atomic uint64_t n_calls; /* requests that are not answered yet */
    _Atomic uint64_t by_opcode[64], n_inval_inode, n_inval_entry;
    struct notifier inodes, entries;
    pthread_mutex_t streams_lock;
    struct stream *streams; /* streams_lock: open directories */
    struct watcher *watcher;
};

static inline fuse_ino_t fs_node(struct fs *fs, struct session *session)
{
    return session == store_root(fs->store) ? FUSE_ROOT_ID : (fuse_ino_t)(uintptr_t)session;
}

static inline struct session *fs_session(struct fs *fs, fuse_ino_t node)
{
    return node == FUSE_ROOT_ID ? store_root(fs->store) : (struct session *)(uintptr_t)node;
}

/* What libfuse does not hand to handlers, of the request that this thread works on. */
struct fs_raw {
    uint32_t opcode;
    uint32_t setattr_valid;
    uint32_t write_flags;
};
const struct fs_raw *fs_raw(void);

extern const struct fuse_lowlevel_ops fs_handlers;
void fs_free_streams(struct fs *fs);

/* transport.c */
int transport_start(struct fs *fs);
void transport_stop(struct fs *fs);            /* the mount is gone or going: end the workers */
int transport_hook(struct fs *fs);             /* after the mount: our reads and writes instead of libfuse's */
void transport_detach(int keep, int keep_too); /* this thread: no descriptors from 3 on but these two */
void transport_close_others(int keep, int keep_too);
int transport_clone(int fuse_fd);            /* another descriptor of that connection, or -1 */
void transport_detach_writer(struct fs *fs); /* this thread: only a clone of /dev/fuse, to write to */

/* guardian.c */
int guardian_start(struct fs *fs);
void guardian_stop(struct fs *fs); /* the mount is gone */

/* notify.c */
int notify_start(struct fs *fs);
void notify_stop(struct fs *fs);
void notify_changed(void *fs, struct session *session);
void notify_gone(void *fs, struct session *session, struct session *parent, const char *name, size_t size);

/* watch.c */
int watch_start(struct fs *fs);
void watch_stop(struct fs *fs);
void watch_free(struct fs *fs);
void watch_add(void *fs, struct session *dir);
void watch_settle(void *fs);
void watch_ready(struct fs *fs); /* the mount answers */

#endif
