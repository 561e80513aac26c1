#include "base/units.h"

#include <check.h>
#include <errno.h>
#include <string.h>

#include "base/macros.h"

#define UNTOUCHED UINT64_C(4711)

struct row {
    const char *text;
    int result;
    uint64_t value;
};

static const struct row durations[] = {
    {"0", 0, 0},
    {"0s", 0, 0},
    {"1800", 0, 1800000},
    {"007", 0, 7000},
    {"1500ms", 0, 1500},
    {"1ms", 0, 1},
    {"90s", 0, 90000},
    {"30m", 0, 1800000},
    {"12h", 0, 43200000},
    {"7d", 0, 604800000},
    {"18446744073709551615ms", 0, UINT64_MAX},
    {"18446744073709551s", 0, UINT64_C(18446744073709551000)},
    {"18446744073709551616ms", -ERANGE, 0},
    {"18446744073709552s", -ERANGE, 0},
    {"99999999999999999999999d", -ERANGE, 0},
    {"213503982335d", -ERANGE, 0},
    {"", -EINVAL, 0},
    {"s", -EINVAL, 0},
    {"-1s", -EINVAL, 0},
    {"+1s", -EINVAL, 0},
    {" 1s", -EINVAL, 0},
    {"1s ", -EINVAL, 0},
    {"1 s", -EINVAL, 0},
    {"1s\n", -EINVAL, 0},
    {"1.5s", -EINVAL, 0},
    {"1e3", -EINVAL, 0},
    {"0x10", -EINVAL, 0},
    {"1M", -EINVAL, 0},
    {"1D", -EINVAL, 0},
    {"1w", -EINVAL, 0},
    {"1mss", -EINVAL, 0},
    {"1h30m", -EINVAL, 0},
    {"none", -EINVAL, 0},
    {"99999999999999999999999x", -EINVAL, 0},
};

static const struct row sizes[] = {
    {"0", 0, 0},
    {"512", 0, 512},
    {"512B", 0, 512},
    {"64K", 0, 65536},
    {"64k", 0, 65536},
    {"64KB", 0, 65536},
    {"64KiB", 0, 65536},
    {"256M", 0, UINT64_C(256) << 20},
    {"256m", 0, UINT64_C(256) << 20},
    {"2G", 0, UINT64_C(2) << 30},
    {"1T", 0, UINT64_C(1) << 40},
    {"1TiB", 0, UINT64_C(1) << 40},
    {"18446744073709551615", 0, UINT64_MAX},
    {"16777215T", 0, UINT64_C(16777215) << 40},
    {"16777216T", -ERANGE, 0},
    {"18446744073709551616", -ERANGE, 0},
    {"18014398509481984K", -ERANGE, 0},
    {"", -EINVAL, 0},
    {"K", -EINVAL, 0},
    {"-1", -EINVAL, 0},
    {"+1", -EINVAL, 0},
    {" 1", -EINVAL, 0},
    {"1 K", -EINVAL, 0},
    {"1.5G", -EINVAL, 0},
    {"1iB", -EINVAL, 0},
    {"1P", -EINVAL, 0},
    {"1Ki", -EINVAL, 0},
    {"1KK", -EINVAL, 0},
    {"0x1", -EINVAL, 0},
};

static const struct {
    const char *text;
    int result;
    int64_t ns;
} times[] = {
    {"1970-01-01T00:00:00Z", 0, 0},
    {"1969-12-31T23:59:59Z", 0, INT64_C(-1000000000)},
    {"2026-01-31T12:00:00Z", 0, INT64_C(1769860800000000000)},
    {"2026-01-31t12:00:00z", 0, INT64_C(1769860800000000000)},
    {"2026-01-31 12:00:00Z", 0, INT64_C(1769860800000000000)},
    {"2026-01-31T14:00:00+02:00", 0, INT64_C(1769860800000000000)},
    {"2026-01-31T06:30:00-05:30", 0, INT64_C(1769860800000000000)},
    {"2026-01-31T12:00:00.5Z", 0, INT64_C(1769860800500000000)},
    {"2026-01-31T12:00:00.123456789Z", 0, INT64_C(1769860800123456789)},
    {"2026-01-31T12:00:00.1234567899Z", 0, INT64_C(1769860800123456789)},
    {"2024-02-29T00:00:00Z", 0, INT64_C(1709164800000000000)},
    {"2000-02-29T00:00:00Z", 0, INT64_C(951782400000000000)},
    {"2016-12-31T23:59:60Z", 0, INT64_C(1483228800000000000)},
    {"2023-02-29T00:00:00Z", -EINVAL, 0},
    {"1900-02-29T00:00:00Z", -EINVAL, 0},
    {"2026-13-01T00:00:00Z", -EINVAL, 0},
    {"2026-00-01T00:00:00Z", -EINVAL, 0},
    {"2026-04-31T00:00:00Z", -EINVAL, 0},
    {"2026-01-00T00:00:00Z", -EINVAL, 0},
    {"2026-01-31T24:00:00Z", -EINVAL, 0},
    {"2026-01-31T12:60:00Z", -EINVAL, 0},
    {"2026-01-31T12:00:61Z", -EINVAL, 0},
    {"2026-01-31T12:00:00", -EINVAL, 0},
    {"2026-01-31T12:00:00.Z", -EINVAL, 0},
    {"2026-01-31T12:00:00+0200", -EINVAL, 0},
    {"2026-01-31T12:00:00+24:00", -EINVAL, 0},
    {"2026-01-31T12:00:00Z ", -EINVAL, 0},
    {"2026-1-31T12:00:00Z", -EINVAL, 0},
    {"26-01-31T12:00:00Z", -EINVAL, 0},
    {"-026-01-31T12:00:00Z", -EINVAL, 0},
    {"2026-01-31", -EINVAL, 0},
    {"now", -EINVAL, 0},
    {"", -EINVAL, 0},
    {"2300-01-01T00:00:00Z", -ERANGE, 0},
    {"1600-01-01T00:00:00Z", -ERANGE, 0},
};

START_TEST(a_duration_reads_as_the_table_says)
{
    const struct row *row = &durations[_i];
    uint64_t value = UNTOUCHED;

    ck_assert_msg(units_parse_ms(row->text, strlen(row->text), &value) == row->result, "\"%s\"", row->text);
    ck_assert_msg(value == (row->result ? UNTOUCHED : row->value), "\"%s\" reads as %llu", row->text,
                  (unsigned long long)value);
}
END_TEST

START_TEST(a_size_reads_as_the_table_says)
{
    const struct row *row = &sizes[_i];
    uint64_t value = UNTOUCHED;

    ck_assert_msg(units_parse_bytes(row->text, strlen(row->text), &value) == row->result, "\"%s\"", row->text);
    ck_assert_msg(value == (row->result ? UNTOUCHED : row->value), "\"%s\" reads as %llu", row->text,
                  (unsigned long long)value);
}
END_TEST

START_TEST(a_time_reads_as_the_table_says)
{
    int64_t ns = (int64_t)UNTOUCHED;

    ck_assert_msg(units_parse_rfc3339(times[_i].text, strlen(times[_i].text), &ns) == times[_i].result, "\"%s\"",
                  times[_i].text);
    ck_assert_msg(ns == (times[_i].result ? (int64_t)UNTOUCHED : times[_i].ns), "\"%s\" reads as %lld", times[_i].text,
                  (long long)ns);
}
END_TEST

START_TEST(only_length_bytes_are_read)
{
    uint64_t value = 0;
    int64_t ns = 0;

    ck_assert_int_eq(units_parse_ms("90sGARBAGE", 3, &value), 0);
    ck_assert_uint_eq(value, 90000);
    ck_assert_int_eq(units_parse_bytes("64Kxyz", 3, &value), 0);
    ck_assert_uint_eq(value, 65536);
    ck_assert_int_eq(units_parse_rfc3339("2026-01-31T12:00:00Zxyz", 20, &ns), 0);
    ck_assert_int_eq(units_parse_ms("90", 0, &value), -EINVAL);
}
END_TEST

START_TEST(a_zero_byte_inside_is_garbage)
{
    uint64_t value = 0;
    int64_t ns = 0;

    ck_assert_int_eq(units_parse_ms("90\0s", 4, &value), -EINVAL);
    ck_assert_int_eq(units_parse_ms("90\0", 3, &value), -EINVAL);
    ck_assert_int_eq(units_parse_bytes("64\0K", 4, &value), -EINVAL);
    ck_assert_int_eq(units_parse_rfc3339("2026-01-31T12:00:00Z\0", 21, &ns), -EINVAL);
    ck_assert_int_eq(units_parse_rfc3339("2026-01-31T12:00:00\0", 20, &ns), -EINVAL);
}
END_TEST

START_TEST(a_time_is_written_in_whole_seconds_rounded_up)
{
    static const struct {
        int64_t ns;
        const char *text;
    } rows[] = {
        {0, "1970-01-01T00:00:00Z"},
        {1, "1970-01-01T00:00:01Z"},
        {999999999, "1970-01-01T00:00:01Z"},
        {1000000000, "1970-01-01T00:00:01Z"},
        {-1, "1970-01-01T00:00:00Z"},
        {-1000000000, "1969-12-31T23:59:59Z"},
        {INT64_C(1769860800000000000), "2026-01-31T12:00:00Z"},
        {INT64_MAX, "2262-04-11T23:47:17Z"},
    };
    char text[32];

    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        units_format_rfc3339(rows[i].ns, text);
        ck_assert_str_eq(text, rows[i].text);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("units");
    TCase *tcase = tcase_create("units");

    tcase_add_loop_test(tcase, a_duration_reads_as_the_table_says, 0, ARRAY_SIZE(durations));
    tcase_add_loop_test(tcase, a_size_reads_as_the_table_says, 0, ARRAY_SIZE(sizes));
    tcase_add_loop_test(tcase, a_time_reads_as_the_table_says, 0, ARRAY_SIZE(times));
    tcase_add_test(tcase, only_length_bytes_are_read);
    tcase_add_test(tcase, a_zero_byte_inside_is_garbage);
    tcase_add_test(tcase, a_time_is_written_in_whole_seconds_rounded_up);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
