/*
 * The life of one instance: checks, into the background, start of what it needs, serving, the end.
 * Threads: the only one of the process calls it, before any other was made. Errors: one line on standard error.
 */
#ifndef SESSIONFS_DAEMON_DAEMON_H
#define SESSIONFS_DAEMON_DAEMON_H

#include "daemon/settings.h"

/**
 * daemon_run() - mount and serve
 * In the background unless settings->is_foreground: returns in the parent once the mount answers, and never in the
 * daemon. Return: the exit status of the process: 0, or 1 when the start failed (nothing is left behind then) or when
 * not all that was saved reached Redis at the end.
 */
int daemon_run(struct settings *settings);

/** daemon_complain() - "sessionfs: @line" on standard error. */
void daemon_complain(const char *line);

#endif
