/*
 * The private redis-server of local[:DIR]: started on demand, shared by all instances of DIR, stopped with the last
 * one.
 *
 * DIR (mode 0700) holds
 *   redis.sock, redis.log, redis.pid, appendonlydir/   the server's
 *   key          the key of the sessions, made on first use
 *   users.lock   every instance holds it shared (flock) while it lives
 *   start.lock   held exclusively while a server is started or stopped
 *   redis.lock   held exclusively by redis-server itself, which inherits the descriptor: free means that it is gone,
 * however it ended. The other locks do not reach it. A kill -9 of the last instance leaves the server running; the next
 * instance uses it.
 *
 * Threads: one at a time. Errors: negative errno, with @why for the operator in one line.
 */
#ifndef SESSIONFS_DAEMON_LOCAL_H
#define SESSIONFS_DAEMON_LOCAL_H

#include <stdbool.h>
#include <stddef.h>

struct local;

/** local_dir_default() - $XDG_STATE_HOME/sessionfs, /var/lib/sessionfs for root, else ~/.local/state/sessionfs;
 * malloc()ed. */
int local_dir_default(char **ret, char *why, size_t why_size);

/**
 * local_new() - become a user of @dir (absolute; made if need be), start its server if none runs, wait until it answers
 * @make_key: make DIR/key if there is none
 * A blocked SIGTERM or SIGINT that arrives meanwhile ends the waiting (-EINTR). On failure nothing is left running that
 * was not running before.
 */
int local_new(struct local **ret, const char *dir, bool make_key, char *why, size_t why_size);

const char *local_socket(const struct local *local); /* lent */
const char *local_key(const struct local *local);    /* lent: the path of DIR/key */

/** local_check() - start the server again if it died; call it now and then. Logs what it does; never waits for the
 * server. */
void local_check(struct local *local);

/** local_free() - stop being a user; the last one stops the server and waits (bounded) until it is gone. NULL is fine.
 */
void local_free(struct local *local);

#endif
