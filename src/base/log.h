/*
 * The log: one line a message, "subject: what happened", free of keys, contents and session names.
 * Goes to standard error while the program is in the foreground, to syslog(3) (facility daemon, identity "sessionfs")
 * once log_to_syslog() was called. debug lines appear only after log_set_debug(true).
 * Threads: any. Errors: none; a message that cannot be written is dropped.
 */
#ifndef SESSIONFS_BASE_LOG_H
#define SESSIONFS_BASE_LOG_H

#include <stdbool.h>

enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARNING, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };

void log_set_debug(bool on);
void log_to_syslog(void);

/**
 * log_write() - one message
 * @error: a negative errno whose text is appended (": No such file ..."), or 0
 * Return: @error, so that a caller can write `return log_warning(r, ...)`.
 */
int log_write(enum log_level level, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));

#define log_error(error, ...)   log_write(LOG_LEVEL_ERROR, error, __VA_ARGS__)
#define log_warning(error, ...) log_write(LOG_LEVEL_WARNING, error, __VA_ARGS__)
#define log_info(...)           log_write(LOG_LEVEL_INFO, 0, __VA_ARGS__)
#define log_debug(...)          log_write(LOG_LEVEL_DEBUG, 0, __VA_ARGS__)

#endif
