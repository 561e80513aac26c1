/*
 * The directory that is mounted on: what would make a mount fail or do harm is found before anything is started.
 * Threads: any. Errors: negative errno, with @why for the operator: what is wrong and how to mend it, in one line.
 */
#ifndef SESSIONFS_DAEMON_MOUNTPOINT_H
#define SESSIONFS_DAEMON_MOUNTPOINT_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/stat.h>

/**
 * mountpoint_check() - it exists, is an empty directory, no mount (dead or alive), and we may mount there
 * @path: the absolute path without symbolic links (malloc()ed)
 * @st:   the directory's attributes
 */
int mountpoint_check(const char *given, char **path, struct stat *st, char *why, size_t why_size);

/** mountpoint_fuse_check() - /dev/fuse can be opened, and an ordinary user has what libfuse needs; @fuse_options as of
 * libfuse. */
int mountpoint_fuse_check(const char *fuse_options, char *why, size_t why_size);

/**
 * mountpoint_answers() - does the mount answer a statfs()? Asked by a process of its own, as the question may hang
 * @wait_ms: how long to wait for the answer
 */
bool mountpoint_answers(const char *path, unsigned wait_ms);

/** mountpoint_is_mount() - something is mounted on @path (absolute, without symbolic links); does not touch it. */
bool mountpoint_is_mount(const char *path);

/** mountpoint_detach() - unmount @path by force, after its daemon is gone. */
void mountpoint_detach(const char *path);

#endif
