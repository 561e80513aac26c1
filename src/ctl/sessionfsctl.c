/*
 * sessionfsctl: asks a mount how it is, shows and sets the time to live of a session. Everything goes through extended
 * attributes, so that it needs no right beyond those on the file.
 */
#include <cjson/cJSON.h>
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>

#include "base/macros.h"

#define EXIT_USAGE       2
#define STATUS_ATTRIBUTE "user.session.status"
#define TTL_ATTRIBUTE    "user.session.ttl"

static const char usage[] =
    "usage: sessionfsctl status [--json] MOUNTPOINT   what the daemon of a mount says about itself\n"
    "       sessionfsctl ttl FILE                     the remaining time to live in seconds, or none\n"
    "       sessionfsctl ttl FILE TTL                 expire in TTL from now: 1800, 90s, 30m, 12h, 7d, none\n"
    "       sessionfsctl -h | -V\n";

static int fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
static int fail(int status, const char *format, ...)
{
    va_list args;

    fputs("sessionfsctl: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return status;
}

/* The attribute as a string; NULL with errno. It may grow between the question for its size and the one for itself. */
static char *get_attribute(const char *path, const char *name)
{
    size_t room = 16384;
    CLEANUP(freep) char *text = NULL;

    for (;;) {
        CLEANUP(freep) char *larger = realloc(text, room);
        if (!larger)
            return NULL;
        text = TAKE(larger);
        ssize_t n = getxattr(path, name, text, room - 1);
        if (n >= 0) {
            text[n] = '\0';
            return TAKE(text);
        }
        if (errno != ERANGE || room > 1 << 20)
            return NULL;
        room *= 4;
    }
}

static int fail_attribute(const char *path, const char *what)
{
    switch (errno) {
    case ENODATA:
    case ENOTSUP:
        return fail(EXIT_FAILURE, "%s: is not %s", path, what);
    case ENOTCONN:
        return fail(EXIT_FAILURE, "%s: the mount is dead, its daemon is gone: fusermount3 -u it, and mount again",
                    path);
    default:
        return fail(EXIT_FAILURE, "%s: %s", path, strerrordesc_np(errno));
    }
}

/* "l2.reads   12", members of members by a dot. */
static void print_object(const cJSON *object, const char *prefix)
{
    const cJSON *item;

    cJSON_ArrayForEach(item, object)
    {
        char name[256];
        snprintf(name, sizeof(name), "%s%s%s", prefix, *prefix ? "." : "", item->string ? item->string : "");
        if (cJSON_IsObject(item) || cJSON_IsArray(item))
            print_object(item, name);
        else if (cJSON_IsString(item))
            printf("%-28s %s\n", name, item->valuestring);
        else if (cJSON_IsNumber(item))
            printf("%-28s %.15g\n", name, item->valuedouble);
        else
            printf("%-28s %s\n", name, cJSON_IsTrue(item) ? "yes" : cJSON_IsFalse(item) ? "no" : "-");
    }
}

static int finish_output(void)
{
    if (fflush(stdout) == 0 && !ferror(stdout))
        return 0;
    return fail(EXIT_FAILURE, "standard output: %s", strerrordesc_np(errno));
}

static int show_status(const char *path, bool is_json)
{
    CLEANUP(freep) char *text = get_attribute(path, STATUS_ATTRIBUTE);

    if (!text)
        return fail_attribute(path, "the mountpoint of a sessionfs");
    if (is_json) {
        puts(text);
        return finish_output();
    }
    cJSON *status = cJSON_Parse(text);
    if (!status)
        return fail(EXIT_FAILURE, "%s: its status is not JSON: is it of another version?", path);
    print_object(status, "");
    cJSON_Delete(status);
    return finish_output();
}

static int show_ttl(const char *path)
{
    CLEANUP(freep) char *text = get_attribute(path, TTL_ATTRIBUTE);

    if (!text)
        return fail_attribute(path, "a session of a sessionfs");
    puts(text);
    return finish_output();
}

static int set_ttl(const char *path, const char *ttl)
{
    if (setxattr(path, TTL_ATTRIBUTE, ttl, strlen(ttl), 0) == 0)
        return 0;
    if (errno == EINVAL)
        return fail(EXIT_FAILURE, "%s: \"%s\" is no time to live: 1800, 90s, 30m, 12h, 7d or none", path, ttl);
    return fail_attribute(path, "a session of a sessionfs");
}

static int run(int argc, char **argv, bool is_json)
{
    const char *command = argc > 0 ? argv[0] : "";

    if (strcmp(command, "status") == 0 && argc == 2)
        return show_status(argv[1], is_json);
    if (strcmp(command, "ttl") == 0 && argc == 2 && !is_json)
        return show_ttl(argv[1]);
    if (strcmp(command, "ttl") == 0 && argc == 3 && !is_json)
        return set_ttl(argv[1], argv[2]);
    if (strcmp(command, "status") == 0 || strcmp(command, "ttl") == 0)
        return fail(EXIT_USAGE, "%s: wrong arguments: see sessionfsctl -h", command);
    if (*command)
        return fail(EXIT_USAGE, "\"%s\" is no command: see sessionfsctl -h", command);
    return fail(EXIT_USAGE, "the command is missing: see sessionfsctl -h");
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {
        {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'V'},
        {0},
    };
    bool is_json = false;
    int c;

    opterr = 0;
    while ((c = getopt_long(argc, argv, "hV", longs, NULL)) != -1) {
        switch (c) {
        case 'j':
            is_json = true;
            break;
        case 'h':
            fputs(usage, stdout);
            return finish_output();
        case 'V':
            puts("sessionfsctl " SESSIONFS_VERSION);
            return finish_output();
        default:
            return fail(EXIT_USAGE, "\"%s\" is no option: see sessionfsctl -h", argv[optind - 1]);
        }
    }
    return run(argc - optind, argv + optind, is_json);
}
