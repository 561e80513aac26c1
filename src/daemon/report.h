/*
 * How the daemon tells the parent that started it, over a pipe, that it is ready, or in one line why it is not.
 * Threads: the parent and the child are one process each; report_ready() may run on any thread of the child.
 * Errors: negative errno, with @why for the operator in one line.
 */
#ifndef SESSIONFS_DAEMON_REPORT_H
#define SESSIONFS_DAEMON_REPORT_H

#include <stddef.h>
#include <sys/types.h>

struct report;

/**
 * report_fork() - go into the background: fork, in the child setsid(), standard streams and inherited descriptors away
 * @pid: 0 in the child
 * SIGTERM and SIGINT must be blocked; the child keeps them so, the parent hands them on to the child.
 */
int report_fork(struct report **ret, pid_t *pid, char *why, size_t why_size);

/**
 * report_wait() - the parent: wait until the child is ready or gone
 * Return: 0; -EIO if the child gave up (@why is what it said), -ECHILD if it was killed, so that it cleaned up nothing.
 */
int report_wait(struct report *report, pid_t pid, char *why, size_t why_size);

void report_free(struct report *report); /* NULL is fine */

/** report_end_child() - the parent: SIGTERM, and SIGKILL if it does not obey. */
void report_end_child(pid_t pid);

/* The child. A NULL report is fine: there is no parent that waits. */
void report_ready(struct report *report);
void report_failure(struct report *report, const char *line);

/** report_explain() - add what fusermount3 printed on (what was) standard error to @why. */
void report_explain(struct report *report, char *why, size_t why_size);

#endif
