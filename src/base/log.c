#include "base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <syslog.h>
#include <unistd.h>

#define LINE_MAX_BYTES 1024 /* longer messages are cut */

static atomic_bool is_debug, is_syslog;

static const struct {
    const char *name;
    int priority; /* of syslog */
} levels[] = {
    [LOG_LEVEL_ERROR] = {"error", LOG_ERR},
    [LOG_LEVEL_WARNING] = {"warning", LOG_WARNING},
    [LOG_LEVEL_INFO] = {"info", LOG_INFO},
    [LOG_LEVEL_DEBUG] = {"debug", LOG_DEBUG},
};

void log_set_debug(bool on)
{
    atomic_store(&is_debug, on);
}

void log_to_syslog(void)
{
    openlog("sessionfs", LOG_PID | LOG_NDELAY, LOG_DAEMON);
    atomic_store(&is_syslog, true);
}

/* A message is one line whatever was put into it: a line feed could forge another message. */
static void flatten(char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < ' ' || *text == 0x7f)
            *text = ' ';
}

/* One write() a line, so that the lines of several threads do not mix. */
static void write_stderr(enum log_level level, const char *message)
{
    char line[LINE_MAX_BYTES + 64];
    int n = snprintf(line, sizeof(line), "sessionfs: %s: %s\n", levels[level].name, message);

    if (n > 0 && write(STDERR_FILENO, line, (size_t)n) < 0)
        return; /* dropped: there is nobody left to tell */
}

int log_write(enum log_level level, int error, const char *format, ...)
{
    char message[LINE_MAX_BYTES];
    int saved_errno = errno;
    va_list args;

    if (level == LOG_LEVEL_DEBUG && !atomic_load_explicit(&is_debug, memory_order_relaxed))
        return error;

    va_start(args, format);
    int n = vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    if (n >= 0 && error < 0 && (size_t)n < sizeof(message)) {
        const char *text = strerrordesc_np(-error);
        snprintf(message + n, sizeof(message) - (size_t)n, ": %s", text ? text : "unknown error");
    }
    flatten(message);

    if (atomic_load(&is_syslog))
        syslog(levels[level].priority, "%s", message);
    else
        write_stderr(level, message);
    errno = saved_errno;
    return error;
}
