/*
 * What the daemon says about itself: the JSON text behind the attribute user.session.status.
 * Threads: status_text() on any; the struct does not change once the daemon serves. Errors: NULL for out of memory.
 */
#ifndef SESSIONFS_DAEMON_STATUS_H
#define SESSIONFS_DAEMON_STATUS_H

#include <stdint.h>

struct fs;
struct store;

struct status {
    const char *source; /* without password; lent, as all of these */
    const char *mountpoint;
    const char *name_space;
    uint64_t started_ms; /* clock_now_ms() */
    struct fs *fs;
    struct store *store;
};

/** status_text() - the JSON text (malloc()ed). @arg: the struct status. */
char *status_text(void *arg);

#endif
