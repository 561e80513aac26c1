#include "daemon/config.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILE_MAX_BYTES (1u << 20)

struct reader {
    struct settings *settings;
    const char *path;
    char *why;
    size_t why_size;
};

static int fail(const struct reader *reader, const char *format, ...) __attribute__((format(printf, 2, 3)));
static int fail(const struct reader *reader, const char *format, ...)
{
    char reason[SETTINGS_WHY_MAX];
    va_list args;

    va_start(args, format);
    vsnprintf(reason, sizeof(reason), format, args);
    va_end(args);
    snprintf(reader->why, reader->why_size, "%s: %s", reader->path, reason);
    return -EBADMSG;
}

/* @ret has room for FILE_MAX_BYTES and a NUL. */
static int read_file(const struct reader *reader, char *ret, size_t *size)
{
    CLEANUP(closep) int fd = open(reader->path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    struct stat st;
    ssize_t n = 0;

    if (fd < 0 || fstat(fd, &st) < 0)
        return fail(reader, "cannot be read: %s", strerrordesc_np(errno));
    for (*size = 0; *size < FILE_MAX_BYTES; *size += (size_t)n) {
        n = read(fd, ret + *size, FILE_MAX_BYTES - *size);
        if (n < 0)
            return fail(reader, "cannot be read: %s", strerrordesc_np(errno));
        if (n == 0)
            break;
    }
    if (*size == FILE_MAX_BYTES)
        return fail(reader, "is larger than a configuration can be (1 MiB)");
    ret[*size] = '\0';
    reader->settings->has_public_password = st.st_mode & S_IROTH; /* if there is one: see below */
    return 0;
}

static int fail_syntax(const struct reader *reader, const char *text, const char *at)
{
    unsigned line = 1, column = 1;

    for (; text < at; text++) {
        column = *text == '\n' ? 1 : column + 1;
        line += *text == '\n';
    }
    return fail(reader, "is not JSON at line %u, column %u", line, column);
}

static int fail_member(const struct reader *reader, const cJSON *item, const char *reason)
{
    return fail(reader, "member \"%s\": %s", item->string, reason);
}

static int read_text(const struct reader *reader, const cJSON *item, char **slot)
{
    if (!cJSON_IsString(item))
        return fail_member(reader, item, "must be a string");
    return settings_assign(slot, item->valuestring);
}

/* A number as one would write it after -o; one that we cannot have (fraction, sign, beyond 2^53) reads as no number
 * there. */
static void number_format(double number, char out[32])
{
    bool is_whole = number >= 0 && number <= 9007199254740992.0 && (double)(uint64_t)number == number;

    if (is_whole)
        snprintf(out, 32, "%.0f", number);
    else
        strcpy(out, "-");
}

static int read_setting(const struct reader *reader, const cJSON *item)
{
    enum setting_shape shape = settings_shape(item->string);
    char reason[SETTINGS_WHY_MAX], number[32];
    const char *value = NULL;

    if (shape == SETTING_UNKNOWN || shape == SETTING_FOREIGN)
        return fail_member(reader, item, "unknown");
    if (shape == SETTING_FLAG) {
        if (!cJSON_IsBool(item))
            return fail_member(reader, item, "must be true or false");
        if (cJSON_IsFalse(item))
            return 0;
    } else if (cJSON_IsString(item)) {
        value = item->valuestring;
    } else if (cJSON_IsNumber(item) && shape == SETTING_VALUE) {
        number_format(item->valuedouble, number);
        value = number;
    } else {
        return fail_member(reader, item,
                           shape == SETTING_OCTAL  ? "must be a string, as \"0077\""
                           : shape == SETTING_TEXT ? "must be a string"
                                                   : "must be a string or a number");
    }

    int r = settings_set(reader->settings, item->string, value, reason, sizeof(reason));
    return r < 0 ? fail_member(reader, item, reason) : 0;
}

static int read_member(const struct reader *reader, const cJSON *root, const cJSON *item)
{
    struct settings *settings = reader->settings;

    if (cJSON_GetObjectItemCaseSensitive(root, item->string) != item)
        return fail_member(reader, item, "given twice");
    if (strcmp(item->string, "source") == 0)
        return read_text(reader, item, &settings->source);
    if (strcmp(item->string, "mountpoint") == 0)
        return read_text(reader, item, &settings->mountpoint);
    if (strcmp(item->string, "password") == 0)
        return read_text(reader, item, &settings->password);
    return read_setting(reader, item);
}

static int read_members(const struct reader *reader, const cJSON *root)
{
    const cJSON *item;
    int r = 0;

    if (!cJSON_IsObject(root))
        return fail(reader, "must be one JSON object, as {\"ttl\": \"30m\"}");
    cJSON_ArrayForEach(item, root)
    {
        r = read_member(reader, root, item);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Every string may be the password, or contain it. */
static void wipe_strings(cJSON *root)
{
    cJSON *item;

    cJSON_ArrayForEach(item, root)
    {
        if (cJSON_IsString(item) && item->valuestring)
            explicit_bzero(item->valuestring, strlen(item->valuestring));
    }
}

static int parse(const struct reader *reader, const char *text, size_t size)
{
    const char *end = text;
    cJSON *root = cJSON_ParseWithLengthOpts(text, size + 1, &end, true);

    if (!root)
        return fail_syntax(reader, text, end);
    int r = read_members(reader, root);
    wipe_strings(root);
    cJSON_Delete(root);
    return r;
}

static bool password_is_inside(const struct settings *settings)
{
    return settings->password || (settings->source && strchr(settings->source, '@'));
}

int config_load(struct settings *settings, const char *path, char *why, size_t why_size)
{
    struct reader reader = {settings, path, why, why_size};
    char *text = malloc(FILE_MAX_BYTES + 1);
    size_t size = 0;

    if (!text || settings_assign(&settings->config_path, path) < 0) {
        free(text);
        return fail(&reader, "cannot be read: out of memory");
    }
    int r = read_file(&reader, text, &size);
    if (r == 0)
        r = parse(&reader, text, size);
    settings->has_public_password = settings->has_public_password && password_is_inside(settings);
    explicit_bzero(text, size);
    free(text);
    return r;
}
