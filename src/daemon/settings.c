#include "daemon/settings.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/units.h"

#define KIB    (UINT64_C(1) << 10)
#define MIB    (UINT64_C(1) << 20)
#define TIB    (UINT64_C(1) << 40)
#define DAY_MS UINT64_C(86400000)

enum kind {
    KIND_IGNORED,   /* belongs to mount(8), fstab or systemd */
    KIND_FUSE_FLAG, /* goes to libfuse as it is */
    KIND_FUSE_TEXT,
    KIND_FUSE_COUNT,
    KIND_ROOT_FLAG, /* likewise, but only root may: dropped for others, as mount(8) adds it unasked */
    KIND_DURATION,  /* milliseconds; 0 is "none" */
    KIND_BYTES,
    KIND_COUNT,
    KIND_MILLIS, /* a duration in an unsigned, never "none" */
    KIND_ID,
    KIND_OCTAL,
    KIND_NAMESPACE,
    KIND_STRING,
};

struct setting {
    const char *name; /* a trailing * stands for anything */
    enum kind kind;
    size_t offset;     /* of the member in struct settings */
    size_t has_offset; /* of the bool that says it was given; 0: none */
    uint64_t min, max;
    const char *range; /* the same for people */
};

#define AT(member) offsetof(struct settings, member)

static const struct setting table[] = {
    {"ttl", KIND_DURATION, AT(ttl_ms), 0, 1000, 3650 * DAY_MS, "1s to 3650d, or none"},
    {"namespace", KIND_NAMESPACE, AT(name_space), 0, 0, 0, "1 to 64 of A-Z a-z 0-9 . _ -"},
    {"keyfile", KIND_STRING, AT(keyfile), 0, 0, 0, "the path of a file"},
    {"l1_size", KIND_BYTES, AT(l1_size), 0, MIB, TIB, "1M to 1T"},
    {"max_session", KIND_BYTES, AT(max_session), AT(has_max_session), 4 * KIB, 511 * MIB, "4K to 511M"},
    {"connections", KIND_COUNT, AT(connections), 0, 1, 256, "1 to 256"},
    {"timeout", KIND_MILLIS, AT(timeout_ms), 0, 10, 300000, "10ms to 5m"},
    {"uid", KIND_ID, AT(uid), AT(has_uid), 0, UINT32_MAX - 1, "a number from 0 to 4294967294"},
    {"gid", KIND_ID, AT(gid), AT(has_gid), 0, UINT32_MAX - 1, "a number from 0 to 4294967294"},
    {"umask", KIND_OCTAL, AT(umask), AT(has_umask), 0, 0777,
     "octal, 0 to 0777, in a configuration file a string (\"0077\")"},
    {"fsname", KIND_STRING, AT(fsname), 0, 0, 0, "a name"},

    {"allow_other", KIND_FUSE_FLAG},
    {"allow_root", KIND_FUSE_FLAG},
    {"auto_unmount", KIND_FUSE_FLAG},
    {"subtype", KIND_FUSE_TEXT},
    {"max_read", KIND_FUSE_COUNT, 0, 0, 4096, UINT32_MAX, "a number of bytes, 4096 or more"},
    {"context", KIND_FUSE_TEXT},
    {"fscontext", KIND_FUSE_TEXT},
    {"defcontext", KIND_FUSE_TEXT},
    {"rootcontext", KIND_FUSE_TEXT},
    {"ro", KIND_FUSE_FLAG},
    {"rw", KIND_FUSE_FLAG},
    {"nodev", KIND_FUSE_FLAG},
    {"dev", KIND_ROOT_FLAG},
    {"nosuid", KIND_FUSE_FLAG},
    {"suid", KIND_ROOT_FLAG},
    {"noexec", KIND_FUSE_FLAG},
    {"exec", KIND_FUSE_FLAG},
    {"sync", KIND_FUSE_FLAG},
    {"async", KIND_FUSE_FLAG},
    {"dirsync", KIND_FUSE_FLAG},
    {"noatime", KIND_FUSE_FLAG},

    {"default_permissions", KIND_IGNORED}, /* always on */
    {"defaults", KIND_IGNORED},
    {"atime", KIND_IGNORED},
    {"diratime", KIND_IGNORED},
    {"nodiratime", KIND_IGNORED},
    {"relatime", KIND_IGNORED},
    {"norelatime", KIND_IGNORED},
    {"strictatime", KIND_IGNORED},
    {"nostrictatime", KIND_IGNORED},
    {"lazytime", KIND_IGNORED},
    {"nolazytime", KIND_IGNORED},
    {"mand", KIND_IGNORED},
    {"nomand", KIND_IGNORED},
    {"iversion", KIND_IGNORED},
    {"noiversion", KIND_IGNORED},
    {"silent", KIND_IGNORED},
    {"loud", KIND_IGNORED},
    {"auto", KIND_IGNORED},
    {"noauto", KIND_IGNORED},
    {"user", KIND_IGNORED},
    {"nouser", KIND_IGNORED},
    {"users", KIND_IGNORED},
    {"nousers", KIND_IGNORED},
    {"owner", KIND_IGNORED},
    {"noowner", KIND_IGNORED},
    {"group", KIND_IGNORED},
    {"nogroup", KIND_IGNORED},
    {"_netdev", KIND_IGNORED},
    {"nofail", KIND_IGNORED},
    {"comment", KIND_IGNORED},
    {"x-*", KIND_IGNORED},
    {"X-*", KIND_IGNORED},
};

static int fail(char *why, size_t why_size, int r, const char *format, ...) __attribute__((format(printf, 4, 5)));
static int fail(char *why, size_t why_size, int r, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(why, why_size, format, args);
    va_end(args);
    return r;
}

static void wipe_and_free(char *secret)
{
    if (secret)
        explicit_bzero(secret, strlen(secret));
    free(secret);
}

int settings_assign(char **slot, const char *value)
{
    char *copy = strdup(value);

    if (!copy)
        return -ENOMEM;
    wipe_and_free(*slot);
    *slot = copy;
    return 0;
}

int settings_init(struct settings *settings)
{
    *settings = (struct settings){
        .ttl_ms = 24 * 60000,
        .l1_size = 256 * MIB,
        .max_session = 64 * MIB,
        .connections = 32,
        .timeout_ms = 1000,
        .name_space = strdup("default"),
        .fuse_options = strdup(""),
    };
    if (settings->name_space && settings->fuse_options)
        return 0;
    settings_deinit(settings);
    return -ENOMEM;
}

void settings_deinit(struct settings *settings)
{
    wipe_and_free(settings->source);
    wipe_and_free(settings->password);
    free(settings->mountpoint);
    free(settings->keyfile);
    free(settings->name_space);
    free(settings->fsname);
    free(settings->fuse_options);
    free(settings->config_path);
    l2_address_deinit(&settings->address);
    *settings = (struct settings){0};
}

static const struct setting *find(const char *name)
{
    for (size_t i = 0; i < ARRAY_SIZE(table); i++) {
        size_t n = strcspn(table[i].name, "*");
        if (strncmp(table[i].name, name, n) == 0 && (table[i].name[n] == '*' || name[n] == '\0'))
            return &table[i];
    }
    return NULL;
}

enum setting_shape settings_shape(const char *name)
{
    const struct setting *setting = find(name);

    if (!setting)
        return SETTING_UNKNOWN;
    switch (setting->kind) {
    case KIND_IGNORED:
        return SETTING_FOREIGN;
    case KIND_FUSE_FLAG:
    case KIND_ROOT_FLAG:
        return SETTING_FLAG;
    case KIND_OCTAL:
        return SETTING_OCTAL;
    case KIND_FUSE_TEXT:
    case KIND_NAMESPACE:
    case KIND_STRING:
        return SETTING_TEXT;
    default:
        return SETTING_VALUE;
    }
}

/* A comma or a backslash inside a value is escaped for libfuse. */
static int add_fuse_option(struct settings *settings, const char *name, const char *value)
{
    size_t room = strlen(settings->fuse_options) + strlen(name) + (value ? 2 * strlen(value) : 0) + 3;
    char *text = realloc(settings->fuse_options, room);

    if (!text)
        return -ENOMEM;
    settings->fuse_options = text;
    char *end = text + strlen(text);
    if (end != text)
        *end++ = ',';
    end = stpcpy(end, name);
    if (value)
        *end++ = '=';
    for (; value && *value; *end++ = *value++)
        if (*value == ',' || *value == '\\')
            *end++ = '\\';
    *end = '\0';
    return 0;
}

static int parse_digits(const char *text, unsigned base, uint64_t *ret)
{
    uint64_t value = 0;

    if (!*text)
        return -EINVAL;
    for (; *text; text++) {
        if (*text < '0' || *text >= (char)('0' + base))
            return -EINVAL;
        if (__builtin_mul_overflow(value, base, &value) ||
            __builtin_add_overflow(value, (uint64_t)(*text - '0'), &value))
            return -ERANGE;
    }
    *ret = value;
    return 0;
}

static int parse_value(enum kind kind, const char *text, uint64_t *ret)
{
    switch (kind) {
    case KIND_DURATION:
    case KIND_MILLIS:
        return units_parse_ms(text, strlen(text), ret);
    case KIND_BYTES:
        return units_parse_bytes(text, strlen(text), ret);
    case KIND_OCTAL:
        return parse_digits(text, 8, ret);
    default:
        return parse_digits(text, 10, ret);
    }
}

static bool namespace_is_valid(const char *text)
{
    size_t n = strspn(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-");

    return n >= 1 && n <= 64 && text[n] == '\0';
}

static int set_text(struct settings *settings, const struct setting *setting, const char *value, char *why,
                    size_t why_size)
{
    if (!*value || (setting->kind == KIND_NAMESPACE && !namespace_is_valid(value)))
        return fail(why, why_size, -EINVAL, "must be %s", setting->range);
    if (settings_assign((char **)((char *)settings + setting->offset), value) < 0)
        return fail(why, why_size, -ENOMEM, "out of memory");
    return 0;
}

static int set_number(struct settings *settings, const struct setting *setting, const char *value, char *why,
                      size_t why_size)
{
    void *member = (char *)settings + setting->offset;
    uint64_t number = 0;

    if (setting->kind == KIND_DURATION && strcmp(value, "none") == 0) {
        *(uint64_t *)member = 0;
        return 0;
    }
    if (parse_value(setting->kind, value, &number) < 0 || number < setting->min || number > setting->max)
        return fail(why, why_size, -EINVAL, "must be %s", setting->range);
    if (setting->kind == KIND_DURATION || setting->kind == KIND_BYTES)
        *(uint64_t *)member = number;
    else
        *(uint32_t *)member = (uint32_t)number;
    if (setting->has_offset)
        *(bool *)((char *)settings + setting->has_offset) = true;
    return 0;
}

static int set_fuse(struct settings *settings, const struct setting *setting, const char *value, char *why,
                    size_t why_size)
{
    uint64_t number;

    if (setting->kind == KIND_FUSE_COUNT &&
        (parse_digits(value, 10, &number) < 0 || number < setting->min || number > setting->max))
        return fail(why, why_size, -EINVAL, "must be %s", setting->range);
    if (add_fuse_option(settings, setting->name, value) < 0)
        return fail(why, why_size, -ENOMEM, "out of memory");
    return 0;
}

int settings_set(struct settings *settings, const char *name, const char *value, char *why, size_t why_size)
{
    const struct setting *setting = find(name);

    if (strcmp(name, "password") == 0)
        return fail(why, why_size, -EINVAL,
                    "would show in ps: give it in SESSIONFS_REDIS_PASSWORD or in the file of -c");
    if (!setting)
        return fail(why, why_size, -ENOENT, "unknown: see sessionfs -h");
    if (setting->kind == KIND_IGNORED)
        return 0;
    if (settings_shape(name) == SETTING_FLAG && value)
        return fail(why, why_size, -EINVAL, "takes no value");
    if (settings_shape(name) != SETTING_FLAG && (!value || !*value))
        return fail(why, why_size, -EINVAL, "needs a value: %s",
                    setting->range ? setting->range : "see mount.fuse3(8)");

    switch (setting->kind) {
    case KIND_ROOT_FLAG:
        if (geteuid() != 0)
            return 0;
        return set_fuse(settings, setting, NULL, why, why_size);
    case KIND_FUSE_FLAG:
    case KIND_FUSE_TEXT:
    case KIND_FUSE_COUNT:
        return set_fuse(settings, setting, value, why, why_size);
    case KIND_NAMESPACE:
    case KIND_STRING:
        return set_text(settings, setting, value, why, why_size);
    default:
        return set_number(settings, setting, value, why, why_size);
    }
}

/* What an fstab line has in its first column when there is nothing to say. */
static bool source_is_default(const char *source)
{
    return !source || !*source || strcmp(source, "sessionfs") == 0 || strcmp(source, "none") == 0;
}

static int finish_address(struct settings *settings, char *why, size_t why_size)
{
    char reason[SETTINGS_WHY_MAX];
    bool is_from_file = settings->source && !settings->is_source_explicit;

    int r = l2_address_parse(&settings->address, source_is_default(settings->source) ? "local" : settings->source,
                             reason, sizeof(reason));
    if (r < 0 && is_from_file)
        return fail(why, why_size, -EBADMSG, "%s: member \"source\": %s", settings->config_path, reason);
    if (r < 0)
        return fail(why, why_size, -EINVAL, "source: %s", reason);

    /* The command line wins over the environment and the file, they win over the file's source. */
    if (settings->address.is_local) /* it has no password: only its owner reaches the socket */
        return 0;
    if (settings->password && !(settings->address.password && settings->is_source_explicit)) {
        wipe_and_free(settings->address.password);
        settings->address.password = TAKE(settings->password);
    }
    return 0;
}

/* A session must fit into L1, and leave room for others there. */
static int finish_sizes(struct settings *settings, char *why, size_t why_size)
{
    uint64_t most = settings->l1_size / 2;

    if (settings->max_session <= most)
        return 0;
    if (settings->has_max_session)
        return fail(why, why_size, -EINVAL,
                    "max_session is %llu bytes, more than half of l1_size (%llu): make it smaller, or l1_size larger",
                    (unsigned long long)settings->max_session, (unsigned long long)settings->l1_size);
    settings->max_session = most;
    return 0;
}

int settings_finish(struct settings *settings, char *why, size_t why_size)
{
    char shown[512];

    if (!settings->mountpoint || !*settings->mountpoint)
        return fail(why, why_size, -EINVAL,
                    "the mountpoint is missing: sessionfs [SOURCE] MOUNTPOINT, see sessionfs -h");
    int r = finish_address(settings, why, why_size);
    if (r == 0)
        r = finish_sizes(settings, why, why_size);
    if (r < 0 || settings->keyfile || settings->address.is_local)
        return r;
    l2_address_show(&settings->address, shown, sizeof(shown));
    return fail(
        why, why_size, -ENOKEY,
        "%s: a remote source needs a key: make one with \"openssl rand -hex 32 > FILE; chmod 600 FILE\", copy it to "
        "every machine that shares the sessions, and add -o keyfile=FILE",
        shown);
}
