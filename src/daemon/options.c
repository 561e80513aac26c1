#include "daemon/options.h"

#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "daemon/config.h"

#define PASSWORD_VARIABLE "SESSIONFS_REDIS_PASSWORD"

static const char usage[] =
    "usage: sessionfs [SOURCE] MOUNTPOINT [-o option,...] [-c FILE] [-f] [-d] [-h] [-V]\n"
    "\n"
    "Mounts a directory that stores sessions as files, shared by every instance of the same source and namespace.\n"
    "\n"
    "SOURCE\n"
    "    local[:DIR]            a private redis-server in DIR, started on demand (the default)\n"
    "    redis://[user[:password]@]host[:port][/db]\n"
    "    unix:///path[?db=N]\n"
    "\n"
    "    -o option,...          see below; wins over the file\n"
    "    -c, --config FILE      read options, \"source\", \"mountpoint\" and \"password\" from a JSON file\n"
    "    -f, --foreground       stay in the foreground, log to standard error\n"
    "    -d, --debug            log every request; implies -f\n"
    "    -h, --help\n"
    "    -V, --version\n"
    "\n"
    "Options (times: 90s 30m 12h 7d; sizes: 64K 256M 2G)\n"
    "    ttl=TIME|none          time to live of new sessions (24m)\n"
    "    namespace=NAME         the set of sessions that is shared (default)\n"
    "    keyfile=FILE           256-bit keys, mode 0600; made by: openssl rand -hex 32 > FILE; chmod 600 FILE\n"
    "    l1_size=SIZE           memory for cached sessions (256M)\n"
    "    max_session=SIZE       largest session (64M, at most half of l1_size)\n"
    "    connections=N          links to Redis (32)\n"
    "    timeout=TIME           how long Redis may take to answer (1s)\n"
    "    uid=N gid=N umask=M    owner and mode that programs see\n"
    "    allow_other, allow_root, auto_unmount, fsname=, subtype=, max_read=, ro, nosuid, nodev, noexec, noatime, ...\n"
    "                           as in mount.fuse3(8); default_permissions is always on\n"
    "\n"
    "The password of Redis is read from " PASSWORD_VARIABLE " or from the file of -c.\n"
    "End it with fusermount3 -u MOUNTPOINT or SIGTERM. See also sessionfsctl -h.\n";

struct args {
    char *sources[2]; /* what is neither an option nor its value; borrowed from argv */
    unsigned n_sources;
    char **options; /* the values of -o; borrowed from argv */
    unsigned n_options;
    const char *config;
};

const char *options_usage(void)
{
    return usage;
}

static int fail(char *why, size_t why_size, const char *format, ...) __attribute__((format(printf, 3, 4)));
static int fail(char *why, size_t why_size, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(why, why_size, format, args);
    va_end(args);
    return -EINVAL;
}

/* "redis://user:secret@host" becomes "redis://user:*@host", the rest of the argument zero. */
static void hide_password(char *arg)
{
    char *start = strstr(arg, "://"), *at = strrchr(arg, '@');

    if (!start || !at || at < start)
        return;
    start += 3;
    char *colon = memchr(start, ':', (size_t)(at - start));
    if (colon)
        start = colon + 1;
    if (start == at)
        return;
    size_t rest = strlen(at);
    char *end = at + rest;
    *start = '*';
    memmove(start + 1, at, rest);
    explicit_bzero(start + 1 + rest, (size_t)(end - (start + 1 + rest)));
}

static int take_password_variable(struct settings *settings)
{
    char *value = getenv(PASSWORD_VARIABLE);
    int r = 0;

    if (!value)
        return 0;
    if (*value)
        r = settings_assign(&settings->password, value);
    explicit_bzero(value, strlen(value)); /* unsetenv() alone leaves it in /proc/PID/environ */
    unsetenv(PASSWORD_VARIABLE);
    return r;
}

static int read_args(struct settings *settings, struct args *args, int argc, char **argv, char *why, size_t why_size)
{
    static const struct option longs[] = {
        {"config", required_argument, NULL, 'c'}, {"foreground", no_argument, NULL, 'f'},
        {"debug", no_argument, NULL, 'd'},        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'V'},      {0},
    };
    int c, task = OPTIONS_MOUNT;

    optind = 0; /* glibc: start anew */
    opterr = 0;
    while ((c = getopt_long(argc, argv, "-:o:c:fdhV", longs, NULL)) != -1) {
        switch (c) {
        case 1:
            if (args->n_sources == ARRAY_SIZE(args->sources))
                return fail(why, why_size, "too many arguments: sessionfs [SOURCE] MOUNTPOINT, see sessionfs -h");
            args->sources[args->n_sources++] = optarg;
            break;
        case 'o':
            args->options[args->n_options++] = optarg;
            break;
        case 'c':
            args->config = optarg;
            break;
        case 'd':
            settings->is_debug = true;
            settings->is_foreground = true;
            break;
        case 'f':
            settings->is_foreground = true;
            break;
        case 'h':
            task = task == OPTIONS_MOUNT ? OPTIONS_HELP : task;
            break;
        case 'V':
            task = task == OPTIONS_MOUNT ? OPTIONS_VERSION : task;
            break;
        case ':':
            return fail(why, why_size, "-%c needs a value: see sessionfs -h", optopt);
        default:
            return fail(why, why_size, "\"%s\" is no option: see sessionfs -h", argv[optind - 1]);
        }
    }
    for (; optind < argc; optind++) { /* after "--" */
        if (args->n_sources == ARRAY_SIZE(args->sources))
            return fail(why, why_size, "too many arguments: sessionfs [SOURCE] MOUNTPOINT, see sessionfs -h");
        args->sources[args->n_sources++] = argv[optind];
    }
    return task;
}

/* One "name" or "name=value"; unescaped in place. */
static int apply_option(struct settings *settings, char *option, char *why, size_t why_size)
{
    char reason[SETTINGS_WHY_MAX];
    char *value = strchr(option, '=');

    if (value)
        *value++ = '\0';
    int r = settings_set(settings, option, value, reason, sizeof(reason));
    if (r == 0)
        return 0;
    if (strcmp(option, "password") == 0) /* never shown */
        value = NULL;
    return fail(why, why_size, "option \"%s%s%s\": %s", option, value ? "=" : "", value ? value : "", reason);
}

/* "a,b=1,c=x\,y": a backslash keeps a comma. */
static int apply_options(struct settings *settings, const char *list, char *why, size_t why_size)
{
    CLEANUP(freep) char *option = malloc(strlen(list) + 1);
    size_t n = 0;
    int r = 0;

    if (!option)
        return fail(why, why_size, "out of memory");
    for (;; list++) {
        if (*list == '\\' && (list[1] == ',' || list[1] == '\\')) {
            option[n++] = *++list;
            continue;
        }
        if (*list && *list != ',') {
            option[n++] = *list;
            continue;
        }
        option[n] = '\0';
        if (n)
            r = apply_option(settings, option, why, why_size);
        if (r < 0 || !*list)
            return r;
        n = 0;
    }
}

static bool source_is_likely(const char *text)
{
    return strncasecmp(text, "redis://", 8) == 0 || strncasecmp(text, "rediss://", 9) == 0 ||
           strncasecmp(text, "unix://", 7) == 0 || strncmp(text, "local:", 6) == 0;
}

static int copy_sources(const struct args *args, char *texts[2])
{
    for (unsigned i = 0; i < args->n_sources; i++)
        if (!(texts[i] = strdup(args->sources[i])))
            return -ENOMEM;
    return 0;
}

static void place_sources(struct settings *settings, unsigned n, char *texts[2])
{
    if (n == 1 && !source_is_likely(texts[0])) {
        free(settings->mountpoint);
        settings->mountpoint = TAKE(texts[0]);
        return;
    }
    if (n >= 1) {
        free(settings->source);
        settings->source = TAKE(texts[0]);
        settings->is_source_explicit = true;
    }
    if (n == 2) {
        free(settings->mountpoint);
        settings->mountpoint = TAKE(texts[1]);
    }
}

static int apply(struct settings *settings, const struct args *args, char *texts[2], char *why, size_t why_size)
{
    int r = 0;

    if (args->config)
        r = config_load(settings, args->config, why, why_size);
    for (unsigned i = 0; r == 0 && i < args->n_options; i++)
        r = apply_options(settings, args->options[i], why, why_size);
    if (r < 0)
        return r;
    place_sources(settings, args->n_sources, texts);
    if (take_password_variable(settings) < 0)
        return fail(why, why_size, "out of memory");
    return settings_finish(settings, why, why_size);
}

int options_parse(struct settings *settings, int argc, char **argv, char *why, size_t why_size)
{
    CLEANUP(freep) char **options = calloc((size_t)argc + 1, sizeof(*options));
    struct args args = {.options = options};
    char *texts[2] = {NULL, NULL};

    if (!options)
        return fail(why, why_size, "out of memory");
    int r = read_args(settings, &args, argc, argv, why, why_size);
    if (r == OPTIONS_MOUNT && copy_sources(&args, texts) < 0)
        r = fail(why, why_size, "out of memory");
    for (int i = 1; i < argc; i++)
        hide_password(argv[i]);
    if (r == OPTIONS_MOUNT)
        r = apply(settings, &args, texts, why, why_size);
    for (unsigned i = 0; i < ARRAY_SIZE(texts); i++) {
        if (texts[i])
            explicit_bzero(texts[i], strlen(texts[i]));
        free(texts[i]);
    }
    return r;
}
