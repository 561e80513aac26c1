#include "base/units.h"

#include <ctype.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/macros.h"

#define NS_PER_S INT64_C(1000000000)

struct unit {
    const char *name;
    uint64_t factor;
};

/* The digits that @text starts with; *@rest is how many bytes they are. */
static int parse_digits(const char *text, size_t length, uint64_t *ret, size_t *rest)
{
    uint64_t value = 0;
    size_t i;

    for (i = 0; i < length && isdigit((unsigned char)text[i]); i++)
        if (__builtin_mul_overflow(value, 10u, &value) ||
            __builtin_add_overflow(value, (uint64_t)(text[i] - '0'), &value))
            return -ERANGE;
    if (i == 0)
        return -EINVAL;
    *ret = value;
    *rest = i;
    return 0;
}

/* Garbage behind an overflow is still garbage: look at the unit first. */
static int scale(const char *text, size_t length, const struct unit *units, size_t n_units, uint64_t *ret)
{
    size_t n_digits = 0;
    uint64_t value = 0;

    while (n_digits < length && isdigit((unsigned char)text[n_digits]))
        n_digits++;
    for (size_t i = 0; i < n_units; i++) {
        if (strlen(units[i].name) != length - n_digits ||
            strncasecmp(units[i].name, text + n_digits, length - n_digits) != 0)
            continue;
        int r = parse_digits(text, n_digits, &value, &n_digits);
        if (r < 0)
            return r;
        if (__builtin_mul_overflow(value, units[i].factor, &value))
            return -ERANGE;
        *ret = value;
        return 0;
    }
    return -EINVAL;
}

int units_parse_ms(const char *text, size_t length, uint64_t *ret)
{
    static const struct unit units[] = {
        {"", 1000}, {"ms", 1}, {"s", 1000}, {"m", 60000}, {"h", 3600000}, {"d", 86400000},
    };

    for (size_t i = 0; i < length; i++)
        if (isupper((unsigned char)text[i])) /* "1M" is no minute */
            return -EINVAL;
    return scale(text, length, units, ARRAY_SIZE(units), ret);
}

int units_parse_bytes(const char *text, size_t length, uint64_t *ret)
{
    static const struct unit units[] = {
        {"", 1},
        {"B", 1},
        {"K", UINT64_C(1) << 10},
        {"KB", UINT64_C(1) << 10},
        {"KiB", UINT64_C(1) << 10},
        {"M", UINT64_C(1) << 20},
        {"MB", UINT64_C(1) << 20},
        {"MiB", UINT64_C(1) << 20},
        {"G", UINT64_C(1) << 30},
        {"GB", UINT64_C(1) << 30},
        {"GiB", UINT64_C(1) << 30},
        {"T", UINT64_C(1) << 40},
        {"TB", UINT64_C(1) << 40},
        {"TiB", UINT64_C(1) << 40},
    };

    return scale(text, length, units, ARRAY_SIZE(units), ret);
}

/* What is left of a text that is taken apart from its front. */
struct cursor {
    const char *at, *end;
};

static bool take_char(struct cursor *cursor, const char *choices)
{
    if (cursor->at == cursor->end || !*cursor->at || !strchr(choices, *cursor->at))
        return false;
    cursor->at++;
    return true;
}

/* Exactly @n_digits digits. */
static bool take_number(struct cursor *cursor, unsigned n_digits, int *ret)
{
    int value = 0;

    for (unsigned i = 0; i < n_digits; i++, cursor->at++) {
        if (cursor->at == cursor->end || !isdigit((unsigned char)*cursor->at))
            return false;
        value = value * 10 + (*cursor->at - '0');
    }
    *ret = value;
    return true;
}

/* ".5": nanoseconds; digits beyond the ninth are dropped. Nothing there is fine. */
static bool take_fraction(struct cursor *cursor, int64_t *ret)
{
    int64_t unit = NS_PER_S;

    *ret = 0;
    if (!take_char(cursor, "."))
        return true;
    if (cursor->at == cursor->end || !isdigit((unsigned char)*cursor->at))
        return false;
    for (; cursor->at < cursor->end && isdigit((unsigned char)*cursor->at); cursor->at++) {
        unit /= 10;
        *ret += unit * (*cursor->at - '0');
    }
    return true;
}

/* "Z" or "+02:00": seconds to subtract for UTC. */
static bool take_zone(struct cursor *cursor, int *ret)
{
    int hours, minutes;

    *ret = 0;
    if (take_char(cursor, "Zz"))
        return true;
    bool is_west = cursor->at < cursor->end && *cursor->at == '-';
    if (!take_char(cursor, "+-") || !take_number(cursor, 2, &hours) || !take_char(cursor, ":") ||
        !take_number(cursor, 2, &minutes) || hours > 23 || minutes > 59)
        return false;
    *ret = (hours * 60 + minutes) * 60 * (is_west ? -1 : 1);
    return true;
}

static int days_of_month(int year, int month)
{
    static const int days[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    bool is_leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;

    return days[month - 1] + (month == 2 && is_leap);
}

static bool time_is_valid(const struct tm *tm, int year, int month)
{
    return month >= 1 && month <= 12 && tm->tm_mday >= 1 && tm->tm_mday <= days_of_month(year, month) &&
           tm->tm_hour <= 23 && tm->tm_min <= 59 && tm->tm_sec <= 60; /* 60: a leap second */
}

int units_parse_rfc3339(const char *text, size_t length, int64_t *ret_ns)
{
    struct cursor cursor = {text, text + length};
    struct tm tm = {0};
    int year, month, zone;
    int64_t ns;

    if (!take_number(&cursor, 4, &year) || !take_char(&cursor, "-") || !take_number(&cursor, 2, &month) ||
        !take_char(&cursor, "-") || !take_number(&cursor, 2, &tm.tm_mday) || !take_char(&cursor, "Tt ") ||
        !take_number(&cursor, 2, &tm.tm_hour) || !take_char(&cursor, ":") || !take_number(&cursor, 2, &tm.tm_min) ||
        !take_char(&cursor, ":") || !take_number(&cursor, 2, &tm.tm_sec) || !take_fraction(&cursor, &ns) ||
        !take_zone(&cursor, &zone) || cursor.at != cursor.end || !time_is_valid(&tm, year, month))
        return -EINVAL;

    tm.tm_year = year - 1900;
    tm.tm_mon = month - 1;
    int64_t total;
    if (__builtin_mul_overflow((int64_t)timegm(&tm) - zone, NS_PER_S, &total) ||
        __builtin_add_overflow(total, ns, &total))
        return -ERANGE;
    *ret_ns = total;
    return 0;
}

void units_format_rfc3339(int64_t ns, char out[32])
{
    time_t seconds = ns / NS_PER_S + (ns % NS_PER_S > 0); /* division truncates towards zero: up, for a negative one */
    struct tm tm;

    gmtime_r(&seconds, &tm);
    strftime(out, 32, "%Y-%m-%dT%H:%M:%SZ", &tm);
}
