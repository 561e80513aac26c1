#include <sessionfs/l2.h>

#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/macros.h"

static const struct {
    const char *source;
    struct l2_address expected;
    const char *shown;
} good[] = {
    {"redis://h", {.host = "h", .port = 6379}, "redis://h"},
    {"redis://h/", {.host = "h", .port = 6379}, "redis://h"},
    {"redis://h:6379/0", {.host = "h", .port = 6379}, "redis://h"},
    {"REDIS://h:1/15", {.host = "h", .port = 1, .db = 15}, "redis://h:1/15"},
    {"redis://h.example-1.org:65535", {.host = "h.example-1.org", .port = 65535}, "redis://h.example-1.org:65535"},
    {"redis://10.0.0.1/3", {.host = "10.0.0.1", .port = 6379, .db = 3}, "redis://10.0.0.1/3"},
    {"redis://[::1]", {.host = "::1", .port = 6379}, "redis://[::1]"},
    {"redis://[fe80::1%eth0]:7000/2", {.host = "fe80::1%eth0", .port = 7000, .db = 2}, "redis://[fe80::1%eth0]:7000/2"},
    {"redis://:secret@h", {.host = "h", .port = 6379, .password = "secret"}, "redis://h"},
    {"redis://me:secret@h:7", {.host = "h", .port = 7, .user = "me", .password = "secret"}, "redis://h:7"},
    {"redis://me@h", {.host = "h", .port = 6379, .user = "me"}, "redis://h"},
    {"redis://me:@h", {.host = "h", .port = 6379, .user = "me"}, "redis://h"},
    {"redis://@h", {.host = "h", .port = 6379}, "redis://h"},
    {"redis://m%40e:p%3Aa%2fs%25s@[::1]:7/1",
     {.host = "::1", .port = 7, .db = 1, .user = "m@e", .password = "p:a/s%s"},
     "redis://[::1]:7/1"},
    {"redis://u:a:b@h", {.host = "h", .port = 6379, .user = "u", .password = "a:b"}, "redis://h"},
    {"redis://u:a@b@h", {.host = "h", .port = 6379, .user = "u", .password = "a@b"}, "redis://h"},
    {"unix:///run/redis.sock", {.path = "/run/redis.sock"}, "unix:///run/redis.sock"},
    {"unix:///run/redis.sock?db=7", {.path = "/run/redis.sock", .db = 7}, "unix:///run/redis.sock?db=7"},
    {"unix:///a%20b%3Fc,d", {.path = "/a b?c,d"}, "unix:///a%20b%3Fc%2Cd"},
    {"local", {.is_local = true}, "local"},
    {"local:/var/lib/x", {.is_local = true, .path = "/var/lib/x"}, "local:/var/lib/x"},
    {"local:rel/ative", {.is_local = true, .path = "rel/ative"}, "local:rel/ative"},
};

#define SECRET "hunter2"

static const char *const bad[] = {
    "",
    "h",
    "/mnt",
    "ftp://h",
    "http://u:" SECRET "@h",
    "rediss://u:" SECRET "@h",
    "redis:h",
    "redis://",
    "redis:///1",
    "redis://:" SECRET "@",
    "redis://u:" SECRET "@:6379",
    "redis://u:" SECRET "@h:",
    "redis://u:" SECRET "@h:0",
    "redis://u:" SECRET "@h:65536",
    "redis://u:" SECRET "@h:99999999999999999999",
    "redis://u:" SECRET "@h:6379x",
    "redis://u:" SECRET "@h:-1",
    "redis://u:" SECRET "@h:+1",
    "redis://u:" SECRET "@h/x",
    "redis://u:" SECRET "@h/-1",
    "redis://u:" SECRET "@h/65536",
    "redis://u:" SECRET "@h/1/2",
    "redis://u:" SECRET "@h/1?x=y",
    "redis://u:" SECRET "@h?db=1",
    "redis://u:" SECRET "@h#x",
    "redis://u:" SECRET "%@h",
    "redis://u:" SECRET "%2@h",
    "redis://u:" SECRET "%zz@h",
    "redis://u:" SECRET "%00@h",
    "redis://u%:" SECRET "@h",
    "redis://u:" SECRET "/x@h",
    "redis://u:" SECRET "?x@h",
    "redis://u:" SECRET "#x@h",
    "redis://u:" SECRET, /* the @ forgotten */
    "redis://u:" SECRET "@h h",
    "redis://u:" SECRET "@h\n",
    "redis://u:" SECRET "@[::1",
    "redis://u:" SECRET "@[]",
    "redis://u:" SECRET "@[::1]6379",
    "redis://u:" SECRET "@[::1]:",
    "redis://u:" SECRET "@::1:6379",
    "unix://",
    "unix://run/redis.sock",
    "unix://u:" SECRET "@/run/redis.sock",
    "unix:///a?db=",
    "unix:///a?db=x",
    "unix:///a?db=1&x=" SECRET,
    "unix:///a?password=" SECRET,
    "unix:///a%",
    "unix:///a%00b",
    "unix:///"
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "local:",
    "locale",
};

static void assert_same(const char *a, const char *b)
{
    ck_assert_msg(!a == !b && (!a || strcmp(a, b) == 0), "\"%s\" is not \"%s\"", a ? a : "(null)", b ? b : "(null)");
}

START_TEST(a_good_source_is_taken_apart)
{
    const struct l2_address *expected = &good[_i].expected;
    struct l2_address address;
    char why[256] = "";

    ck_assert_msg(l2_address_parse(&address, good[_i].source, why, sizeof(why)) == 0, "%s: %s", good[_i].source, why);
    ck_assert_int_eq(address.is_local, expected->is_local);
    assert_same(address.path, expected->path);
    assert_same(address.host, expected->host);
    assert_same(address.user, expected->user);
    assert_same(address.password, expected->password);
    ck_assert_uint_eq(address.db, expected->db);
    ck_assert_uint_eq(address.port, expected->port);
    l2_address_deinit(&address);
}
END_TEST

START_TEST(it_is_shown_without_user_and_password)
{
    struct l2_address address;
    char why[256], shown[256];

    ck_assert_int_eq(l2_address_parse(&address, good[_i].source, why, sizeof(why)), 0);
    l2_address_show(&address, shown, sizeof(shown));
    ck_assert_str_eq(shown, good[_i].shown);
    l2_address_deinit(&address);
}
END_TEST

START_TEST(what_is_shown_reads_as_the_same_place)
{
    struct l2_address address, again;
    char why[256], shown[256], shown_again[256];

    ck_assert_int_eq(l2_address_parse(&address, good[_i].source, why, sizeof(why)), 0);
    l2_address_show(&address, shown, sizeof(shown));
    ck_assert_int_eq(l2_address_parse(&again, shown, why, sizeof(why)), 0);
    l2_address_show(&again, shown_again, sizeof(shown_again));
    ck_assert_str_eq(shown, shown_again);
    assert_same(address.path, again.path);
    l2_address_deinit(&address);
    l2_address_deinit(&again);
}
END_TEST

START_TEST(a_bad_source_is_refused_in_one_line_without_the_password)
{
    struct l2_address address = {.port = 4711};
    char why[512] = "";

    ck_assert_msg(l2_address_parse(&address, bad[_i], why, sizeof(why)) == -EINVAL, "\"%s\" is accepted", bad[_i]);
    ck_assert_uint_gt(strlen(why), 0);
    ck_assert_ptr_null(strchr(why, '\n'));
    ck_assert_ptr_null(strstr(why, SECRET));
    ck_assert_uint_eq(address.port, 4711); /* written on success only */
}
END_TEST

START_TEST(what_is_shown_fits_into_what_there_is)
{
    struct l2_address address;
    char why[256], shown[12];

    ck_assert_int_eq(l2_address_parse(&address, "unix:///%20%20%20%20/abc?db=3", why, sizeof(why)), 0);
    l2_address_show(&address, shown, sizeof(shown));
    ck_assert_uint_lt(strlen(shown), sizeof(shown));
    l2_address_deinit(&address);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("address");
    TCase *tcase = tcase_create("address");

    tcase_add_loop_test(tcase, a_good_source_is_taken_apart, 0, ARRAY_SIZE(good));
    tcase_add_loop_test(tcase, it_is_shown_without_user_and_password, 0, ARRAY_SIZE(good));
    tcase_add_loop_test(tcase, what_is_shown_reads_as_the_same_place, 0, ARRAY_SIZE(good));
    tcase_add_loop_test(tcase, a_bad_source_is_refused_in_one_line_without_the_password, 0, ARRAY_SIZE(bad));
    tcase_add_test(tcase, what_is_shown_fits_into_what_there_is);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
