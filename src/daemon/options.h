/*
 * The command line, in the way of sshfs and mount(8):
 * sessionfs [SOURCE] MOUNTPOINT [-o option,...] [-c FILE] [-f] [-d] [-h] [-V]
 * Threads: one, at the start. Errors: negative errno, with @why for the operator in one line.
 */
#ifndef SESSIONFS_DAEMON_OPTIONS_H
#define SESSIONFS_DAEMON_OPTIONS_H

#include "daemon/settings.h"

enum options_task { OPTIONS_MOUNT, OPTIONS_HELP, OPTIONS_VERSION };

/**
 * options_parse() - read the command line, the configuration file that it names and SESSIONFS_REDIS_PASSWORD
 * Overwrites a password in @argv and in the environment, so that ps and /proc do not show it.
 * @settings: initialised; filled and finished if the task is OPTIONS_MOUNT
 * Return: enum options_task, or -EINVAL (usage), -EBADMSG (the configuration file), -ENOKEY (a remote source without
 * key)
 */
int options_parse(struct settings *settings, int argc, char **argv, char *why, size_t why_size);

/** options_usage() - the text of -h. */
const char *options_usage(void);

#endif
