#include <sessionfs/l2.h>

#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/un.h>

#include "base/macros.h"

#define PORT_DEFAULT 6379
#define DB_MAX       65535u

/* A piece of the source, not terminated. */
struct span {
    const char *at;
    size_t size;
};

struct why {
    char *text;
    size_t size;
};

static int fail(struct why why, const char *format, ...) __attribute__((format(printf, 2, 3)));
static int fail(struct why why, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(why.text, why.size, format, args);
    va_end(args);
    return -EINVAL;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

/* @what names the part in the message; its text may be secret and is never shown. */
static int decode(struct span in, const char *what, char **ret, struct why why)
{
    char *out = malloc(in.size + 1);
    size_t n = 0;

    if (!out)
        return fail(why, "out of memory");
    for (size_t i = 0; i < in.size; i++) {
        int byte = (unsigned char)in.at[i];
        if (byte == '%') {
            int high = in.size - i > 2 ? hex_digit(in.at[i + 1]) : -1;
            int low = in.size - i > 2 ? hex_digit(in.at[i + 2]) : -1;
            byte = high < 0 || low < 0 ? -1 : high * 16 + low;
            i += 2;
        }
        if (byte <= 0) {
            explicit_bzero(out, n);
            free(out);
            return byte ? fail(why,
                               "the %s has a %% that is not followed by two hexadecimal digits (write %%25 for a %%)",
                               what)
                        : fail(why, "the %s contains a zero byte", what);
        }
        out[n++] = (char)byte;
    }
    out[n] = '\0';
    *ret = out;
    return 0;
}

static int parse_number(struct span in, unsigned max, unsigned *ret)
{
    unsigned value = 0;

    if (in.size == 0 || in.size > 9)
        return -EINVAL;
    for (size_t i = 0; i < in.size; i++) {
        if (!isdigit((unsigned char)in.at[i]))
            return -EINVAL;
        value = value * 10 + (unsigned)(in.at[i] - '0');
    }
    if (value > max)
        return -EINVAL;
    *ret = value;
    return 0;
}

static int parse_db(struct l2_address *address, struct span in, struct why why)
{
    if (parse_number(in, DB_MAX, &address->db) < 0)
        return fail(why, "the database is a number from 0 to %u", DB_MAX);
    return 0;
}

static int parse_credentials(struct l2_address *address, struct span in, struct why why)
{
    const char *colon = memchr(in.at, ':', in.size);
    struct span user = {in.at, colon ? (size_t)(colon - in.at) : in.size};
    int r = 0;

    if (user.size)
        r = decode(user, "user name", &address->user, why);
    if (r == 0 && colon)
        r = decode((struct span){colon + 1, in.size - user.size - 1}, "password", &address->password, why);
    if (r == 0 && address->password && !*address->password)
        free(TAKE(address->password));
    return r;
}

static bool host_is_valid(struct span host, bool is_ipv6)
{
    for (size_t i = 0; i < host.size; i++) {
        unsigned char c = (unsigned char)host.at[i];
        if (!isalnum(c) && !strchr(is_ipv6 ? ":.%-_" : ".-_", c))
            return false;
    }
    return host.size > 0 && host.size < 256;
}

/* host[:port] or [ipv6][:port] */
static int parse_host(struct l2_address *address, struct span in, struct why why)
{
    bool is_ipv6 = in.size && in.at[0] == '[';
    const char *end = memchr(in.at, is_ipv6 ? ']' : ':', in.size);
    struct span host = {in.at + is_ipv6, (size_t)((end ? end : in.at + in.size) - in.at) - is_ipv6};
    unsigned port = PORT_DEFAULT;

    if (is_ipv6 && !end)
        return fail(why, "the address has a [ without its ]");
    if (host.size == 0)
        return fail(why, "the host is missing");
    struct span rest = {host.at + host.size + is_ipv6, in.size - host.size - 2u * is_ipv6};
    if (!is_ipv6 && rest.size && memchr(rest.at + 1, ':', rest.size - 1))
        return fail(why,
                    "more than one : behind the host; an IPv6 address goes into brackets, as in redis://[::1]:6379, "
                    "and a password before an @");
    if (!host_is_valid(host, is_ipv6))
        return fail(why, "the host is neither a name nor an address");
    if (rest.size &&
        (rest.at[0] != ':' || parse_number((struct span){rest.at + 1, rest.size - 1}, 65535, &port) < 0 || port == 0))
        return fail(why, "the port is a number from 1 to 65535");

    address->port = (uint16_t)port;
    address->host = strndup(host.at, host.size);
    return address->host ? 0 : fail(why, "out of memory");
}

/* Behind "redis://". */
static int parse_redis(struct l2_address *address, const char *text, struct why why)
{
    size_t size = strcspn(text, "/?#");
    const char *rest = text + size;
    const char *at = memrchr(text, '@', size);
    int r = 0;

    if (strchr(rest, '@'))
        return fail(why, "the user name or the password contains one of / ? # : write %%2F %%3F %%23");
    if (at)
        r = parse_credentials(address, (struct span){text, (size_t)(at - text)}, why);
    const char *host = at ? at + 1 : text;
    if (r == 0)
        r = parse_host(address, (struct span){host, (size_t)(rest - host)}, why);
    if (r < 0 || !*rest)
        return r;
    if (*rest != '/')
        return fail(why, "nothing but /DATABASE may follow host and port");
    return rest[1] ? parse_db(address, (struct span){rest + 1, strlen(rest + 1)}, why) : 0;
}

/* Behind "unix://". */
static int parse_unix(struct l2_address *address, const char *text, struct why why)
{
    size_t size = strcspn(text, "?#");
    const char *query = text + size;

    if (*text != '/')
        return fail(why, "the path of the socket must start with a /, as in unix:///run/redis/redis.sock");
    int r = decode((struct span){text, size}, "path", &address->path, why);
    if (r < 0)
        return r;
    if (strlen(address->path) >= sizeof(((struct sockaddr_un *)0)->sun_path))
        return fail(why, "the path of the socket is %zu bytes long, more than the %zu a unix socket can have",
                    strlen(address->path), sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
    if (!*query)
        return 0;
    if (strncmp(query, "?db=", 4) != 0)
        return fail(why, "nothing but ?db=NUMBER may follow the path of the socket");
    return parse_db(address, (struct span){query + 4, strlen(query + 4)}, why);
}

/* Behind "local". */
static int parse_local(struct l2_address *address, const char *text, struct why why)
{
    address->is_local = true;
    if (!*text)
        return 0;
    if (!text[1])
        return fail(why, "the directory is missing behind local:");
    address->path = strdup(text + 1);
    return address->path ? 0 : fail(why, "out of memory");
}

static int parse(struct l2_address *address, const char *source, struct why why)
{
    if (strncasecmp(source, "redis://", 8) == 0)
        return parse_redis(address, source + 8, why);
    if (strncasecmp(source, "unix://", 7) == 0)
        return parse_unix(address, source + 7, why);
    if (strcmp(source, "local") == 0 || strncmp(source, "local:", 6) == 0)
        return parse_local(address, source + 5, why);
    if (strncasecmp(source, "rediss://", 9) == 0)
        return fail(why, "TLS (rediss://) is not supported yet");
    return fail(why, "a source is redis://[user[:password]@]host[:port][/db], unix:///path[?db=N] or local[:DIR]");
}

int l2_address_parse(struct l2_address *ret, const char *source, char *why, size_t why_size)
{
    struct l2_address address = {0};

    int r = parse(&address, source, (struct why){why, why_size});
    if (r < 0) {
        l2_address_deinit(&address);
        return r;
    }
    *ret = address;
    return 0;
}

void l2_address_deinit(struct l2_address *address)
{
    if (address->password)
        explicit_bzero(address->password, strlen(address->password));
    free(address->password);
    free(address->user);
    free(address->host);
    free(address->path);
    *address = (struct l2_address){0};
}

/* A path as it stands in a source again: one line, no character that means something there or in mount options. */
static void encode_path(const char *path, char *out, size_t size)
{
    size_t n = 0;

    for (; *path && n + 4 < size; path++) {
        unsigned char c = (unsigned char)*path;
        if (c <= ' ' || c == 0x7f || strchr("%?#,\\", c))
            n += (size_t)snprintf(out + n, size - n, "%%%02X", c);
        else
            out[n++] = (char)c;
    }
    out[n] = '\0';
}

void l2_address_show(const struct l2_address *address, char *out, size_t size)
{
    char path[512] = "", port[8] = "", db[24] = "";
    bool is_ipv6 = address->host && strchr(address->host, ':');

    if (address->is_local) {
        snprintf(out, size, address->path ? "local:%s" : "local", address->path);
        return;
    }
    if (address->db)
        snprintf(db, sizeof(db), address->path ? "?db=%u" : "/%u", address->db);
    if (address->path) {
        encode_path(address->path, path, sizeof(path));
        snprintf(out, size, "unix://%s%s", path, db);
        return;
    }
    if (address->port != PORT_DEFAULT)
        snprintf(port, sizeof(port), ":%u", address->port);
    snprintf(out, size, is_ipv6 ? "redis://[%s]%s%s" : "redis://%s%s%s", address->host, port, db);
}
