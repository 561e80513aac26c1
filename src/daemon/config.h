/*
 * The configuration file: the options of the command line as members of one JSON object, and "source", "mountpoint" and
 * "password". Numbers may be numbers or strings with units; flags are true or false.
 * Threads: one, at the start. Errors: negative errno, with @why for the operator in one line: file, member, reason.
 */
#ifndef SESSIONFS_DAEMON_CONFIG_H
#define SESSIONFS_DAEMON_CONFIG_H

#include "daemon/settings.h"

/** config_load() - read @path into @settings. Return: 0, -EBADMSG (unreadable, no JSON, or a member is wrong), -ENOMEM.
 */
int config_load(struct settings *settings, const char *path, char *why, size_t why_size);

#endif
