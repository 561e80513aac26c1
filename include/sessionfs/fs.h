/*
 * fs: the mount. FUSE requests in, replies and kernel notifications out.
 * Threads: fs_run() blocks its caller and runs the workers; fs_stop() may be called from any thread and from a
 * signal handler. Errors: negative errno, with @why for the operator.
 */
#ifndef SESSIONFS_FS_H
#define SESSIONFS_FS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fs;
struct store;

struct fs_config {
    struct store *store;      /* borrowed */
    const char *mountpoint;   /* absolute */
    const char *fsname;       /* the source as /proc/mounts shows it, no password */
    const char *fuse_options; /* further mount options, comma separated, passed to libfuse ("allow_other,ro"), or "" */
    bool has_uid, has_gid, has_umask; /* override what programs see */
    uint32_t uid, gid, umask;
    bool debug;         /* libfuse's own request log */
    unsigned n_workers; /* 0: as many as there are CPUs, at least 2, at most 8 */
    uint64_t default_ttl_ms;
    /* The status as JSON text (malloc()ed), shown by the attribute user.session.status of the mount's root. */
    char *(*status)(void *arg);
    void *status_arg;
};

/** fs_new() - mount. The mount answers only after fs_run() runs. */
int fs_new(struct fs **ret, const struct fs_config *config, char *why, size_t why_size);

/**
 * fs_run() - serve until fs_stop() or until it is unmounted
 * @ready: called once, on a thread of its own, when the kernel has agreed on the protocol
 */
int fs_run(struct fs *fs, void (*ready)(void *arg), void *arg);
void fs_stop(struct fs *fs);
void fs_free(struct fs *fs); /* unmounts if need be */

struct fs_stats {
    uint64_t n_requests;    /* all that the kernel sent */
    uint64_t by_opcode[64]; /* index: FUSE opcode; fs_opcode_name() */
    uint64_t n_inval_inode, n_inval_entry, n_nodes;
};
void fs_stats(struct fs *fs, struct fs_stats *ret);
const char *fs_opcode_name(unsigned opcode); /* "lookup", ...; NULL if unknown */

#endif
