#include "daemon/config.h"

#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/macros.h"
#include "daemon/options.h"

static struct settings settings;
static char why[SETTINGS_WHY_MAX];
static char path[] = "/tmp/test-config-XXXXXX";
static char expected[sizeof(path) + 256];

static void setup(void)
{
    strcpy(path, "/tmp/test-config-XXXXXX");
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    close(fd);
    why[0] = '\0';
    unsetenv("SESSIONFS_REDIS_PASSWORD");
    ck_assert_int_eq(settings_init(&settings), 0);
}

static void teardown(void)
{
    unlink(path);
    settings_deinit(&settings);
}

static void write_file(const char *text)
{
    FILE *file = fopen(path, "w");

    ck_assert_ptr_nonnull(file);
    fputs(text, file);
    ck_assert_int_eq(fclose(file), 0);
}

static int load(const char *text)
{
    write_file(text);
    return config_load(&settings, path, why, sizeof(why));
}

START_TEST(every_member_reaches_its_setting)
{
    ck_assert_msg(load("{\"source\": \"redis://h\", \"mountpoint\": \"/m\", \"password\": \"p\", \"ttl\": \"30m\","
                       " \"namespace\": \"n\", \"keyfile\": \"/k\", \"l1_size\": \"1G\", \"max_session\": \"2M\","
                       " \"connections\": 4, \"timeout\": \"500ms\", \"uid\": 33, \"gid\": \"34\", \"umask\": \"0077\","
                       " \"allow_other\": true, \"ro\": false, \"subtype\": \"s\", \"max_read\": 65536}") == 0,
                  "%s", why);
    ck_assert_str_eq(settings.source, "redis://h");
    ck_assert_str_eq(settings.mountpoint, "/m");
    ck_assert_str_eq(settings.password, "p");
    ck_assert_uint_eq(settings.ttl_ms, 1800000);
    ck_assert_str_eq(settings.name_space, "n");
    ck_assert_str_eq(settings.keyfile, "/k");
    ck_assert_uint_eq(settings.l1_size, 1u << 30);
    ck_assert_uint_eq(settings.max_session, 2u << 20);
    ck_assert_uint_eq(settings.connections, 4);
    ck_assert_uint_eq(settings.timeout_ms, 500);
    ck_assert_uint_eq(settings.uid, 33);
    ck_assert_uint_eq(settings.gid, 34);
    ck_assert_uint_eq(settings.umask, 077);
    ck_assert_str_eq(settings.fuse_options, "allow_other,subtype=s,max_read=65536");
}
END_TEST

START_TEST(plain_numbers_are_seconds_and_bytes)
{
    ck_assert_msg(load("{\"ttl\": 90, \"l1_size\": 1073741824, \"timeout\": 2}") == 0, "%s", why);
    ck_assert_uint_eq(settings.ttl_ms, 90000);
    ck_assert_uint_eq(settings.l1_size, 1u << 30);
    ck_assert_uint_eq(settings.timeout_ms, 2000);
}
END_TEST

START_TEST(an_empty_object_changes_nothing)
{
    ck_assert_msg(load(" { }\n") == 0, "%s", why);
    ck_assert_uint_eq(settings.ttl_ms, 24 * 60000);
}
END_TEST

static const struct {
    const char *text, *reason; /* what follows "FILE: " */
} bad[] = {
    {"{\"ttl\": \"x\"}", "member \"ttl\": must be 1s to 3650d, or none"},
    {"{\"ttl\": 0}", "member \"ttl\": must be 1s to 3650d, or none"},
    {"{\"ttl\": -5}", "member \"ttl\": must be 1s to 3650d, or none"},
    {"{\"ttl\": 1.5}", "member \"ttl\": must be 1s to 3650d, or none"},
    {"{\"ttl\": 1e300}", "member \"ttl\": must be 1s to 3650d, or none"},
    {"{\"ttl\": 99999999999999999999}", "member \"ttl\": must be 1s to 3650d, or none"},
    {"{\"ttl\": null}", "member \"ttl\": must be a string or a number"},
    {"{\"ttl\": true}", "member \"ttl\": must be a string or a number"},
    {"{\"ttl\": [1]}", "member \"ttl\": must be a string or a number"},
    {"{\"ttl\": {}}", "member \"ttl\": must be a string or a number"},
    {"{\"connections\": 257}", "member \"connections\": must be 1 to 256"},
    {"{\"connections\": \"many\"}", "member \"connections\": must be 1 to 256"},
    {"{\"l1_size\": \"1K\"}", "member \"l1_size\": must be 1M to 1T"},
    {"{\"namespace\": \"a b\"}", "member \"namespace\": must be 1 to 64 of A-Z a-z 0-9 . _ -"},
    {"{\"namespace\": 5}", "member \"namespace\": must be a string"},
    {"{\"keyfile\": 5}", "member \"keyfile\": must be a string"},
    {"{\"source\": 5}", "member \"source\": must be a string"},
    {"{\"mountpoint\": null}", "member \"mountpoint\": must be a string"},
    {"{\"password\": 1234}", "member \"password\": must be a string"},
    {"{\"umask\": 77}", "member \"umask\": must be a string, as \"0077\""},
    {"{\"umask\": \"99\"}", "member \"umask\": must be octal, 0 to 0777, in a configuration file a string (\"0077\")"},
    {"{\"allow_other\": \"yes\"}", "member \"allow_other\": must be true or false"},
    {"{\"tll\": 5}", "member \"tll\": unknown"},
    {"{\"TTL\": 5}", "member \"TTL\": unknown"},
    {"{\"\": 5}", "member \"\": unknown"},
    {"{\"user\": \"me\"}", "member \"user\": unknown"},
    {"{\"x-foo\": 1}", "member \"x-foo\": unknown"},
    {"{\"ttl\": 5, \"ttl\": 6}", "member \"ttl\": given twice"},
    {"", "is not JSON at line 1, column 1"},
    {"ttl=5\n", "is not JSON at line 1, column 1"},
    {"{\"ttl\": 5,\n\"uid\": }", "is not JSON at line 2, column 8"},
    {"[]", "must be one JSON object, as {\"ttl\": \"30m\"}"},
    {"5", "must be one JSON object, as {\"ttl\": \"30m\"}"},
};

START_TEST(what_is_wrong_is_told_by_file_member_and_reason)
{
    ck_assert_msg(load(bad[_i].text) == -EBADMSG, "%s is accepted", bad[_i].text);
    snprintf(expected, sizeof(expected), "%s: %s", path, bad[_i].reason);
    ck_assert_str_eq(why, expected);
}
END_TEST

START_TEST(text_behind_the_object_is_refused)
{
    ck_assert_int_eq(load("{} x"), -EBADMSG);
    ck_assert_ptr_nonnull(strstr(why, "is not JSON at line 1"));
}
END_TEST

START_TEST(a_file_that_is_missing_is_named)
{
    ck_assert_int_eq(config_load(&settings, "/nonexistent/file", why, sizeof(why)), -EBADMSG);
    ck_assert_str_eq(why, "/nonexistent/file: cannot be read: No such file or directory");
    ck_assert_int_eq(config_load(&settings, "/", why, sizeof(why)), -EBADMSG);
    ck_assert_str_eq(why, "/: cannot be read: Is a directory");
}
END_TEST

START_TEST(a_file_that_never_ends_is_refused)
{
    ck_assert_int_eq(config_load(&settings, "/dev/zero", why, sizeof(why)), -EBADMSG);
    ck_assert_ptr_nonnull(strstr(why, "larger than"));
}
END_TEST

START_TEST(a_password_that_everybody_can_read_is_noticed)
{
    write_file("{\"password\": \"p\"}");
    chmod(path, 0644);
    ck_assert_int_eq(config_load(&settings, path, why, sizeof(why)), 0);
    ck_assert(settings.has_public_password);
    chmod(path, 0600);
    ck_assert_int_eq(config_load(&settings, path, why, sizeof(why)), 0);
    ck_assert(!settings.has_public_password);
}
END_TEST

START_TEST(a_file_without_a_password_may_be_read_by_everybody)
{
    write_file("{\"ttl\": 5}");
    chmod(path, 0644);
    ck_assert_int_eq(config_load(&settings, path, why, sizeof(why)), 0);
    ck_assert(!settings.has_public_password);
}
END_TEST

/* Together with the command line. */

static int parse(const char *a, const char *b, const char *c, const char *d)
{
    const char *argv[] = {"sessionfs", "-c", path, a, b, c, d, NULL};
    char *copies[ARRAY_SIZE(argv)] = {0};
    int argc = 0;

    for (; argv[argc]; argc++)
        copies[argc] = strdup(argv[argc]);
    int r = options_parse(&settings, argc, copies, why, sizeof(why));
    for (int i = 0; i < argc; i++)
        free(copies[i]);
    return r;
}

START_TEST(the_command_line_wins_over_the_file)
{
    write_file("{\"ttl\": \"1h\", \"namespace\": \"file\", \"source\": \"local:/file\", \"mountpoint\": \"/file\"}");
    ck_assert_msg(parse("-o", "ttl=2h", "local:/line", "/line") == OPTIONS_MOUNT, "%s", why);
    ck_assert_uint_eq(settings.ttl_ms, 2 * 3600000);
    ck_assert_str_eq(settings.name_space, "file");
    ck_assert_str_eq(settings.address.path, "/line");
    ck_assert_str_eq(settings.mountpoint, "/line");
}
END_TEST

START_TEST(the_file_alone_is_enough)
{
    write_file("{\"source\": \"redis://h\", \"mountpoint\": \"/m\", \"keyfile\": \"/k\", \"password\": \"p\"}");
    ck_assert_msg(parse(NULL, NULL, NULL, NULL) == OPTIONS_MOUNT, "%s", why);
    ck_assert_str_eq(settings.address.host, "h");
    ck_assert_str_eq(settings.address.password, "p");
    ck_assert_str_eq(settings.mountpoint, "/m");
}
END_TEST

START_TEST(a_lone_argument_replaces_the_mountpoint_or_the_source)
{
    write_file("{\"source\": \"local:/file\", \"mountpoint\": \"/file\"}");
    ck_assert_msg(parse("/line", NULL, NULL, NULL) == OPTIONS_MOUNT, "%s", why);
    ck_assert_str_eq(settings.mountpoint, "/line");
    ck_assert_str_eq(settings.address.path, "/file");
    settings_deinit(&settings);
    ck_assert_int_eq(settings_init(&settings), 0);
    ck_assert_msg(parse("local:/line", NULL, NULL, NULL) == OPTIONS_MOUNT, "%s", why);
    ck_assert_str_eq(settings.mountpoint, "/file");
    ck_assert_str_eq(settings.address.path, "/line");
}
END_TEST

START_TEST(the_environment_wins_over_the_password_of_the_file)
{
    write_file("{\"source\": \"redis://h\", \"mountpoint\": \"/m\", \"keyfile\": \"/k\", \"password\": \"file\"}");
    setenv("SESSIONFS_REDIS_PASSWORD", "environment", 1);
    ck_assert_int_eq(parse(NULL, NULL, NULL, NULL), OPTIONS_MOUNT);
    ck_assert_str_eq(settings.address.password, "environment");
}
END_TEST

START_TEST(a_bad_source_in_the_file_names_the_file)
{
    write_file("{\"source\": \"redis://u:hunter2@h:x\", \"mountpoint\": \"/m\"}");
    ck_assert_int_eq(parse(NULL, NULL, NULL, NULL), -EBADMSG);
    ck_assert_ptr_eq(strstr(why, path), why);
    ck_assert_ptr_nonnull(strstr(why, "member \"source\": "));
    ck_assert_ptr_null(strstr(why, "hunter2"));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("config");
    TCase *tcase = tcase_create("config");

    tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_add_test(tcase, every_member_reaches_its_setting);
    tcase_add_test(tcase, plain_numbers_are_seconds_and_bytes);
    tcase_add_test(tcase, an_empty_object_changes_nothing);
    tcase_add_loop_test(tcase, what_is_wrong_is_told_by_file_member_and_reason, 0, ARRAY_SIZE(bad));
    tcase_add_test(tcase, text_behind_the_object_is_refused);
    tcase_add_test(tcase, a_file_that_is_missing_is_named);
    tcase_add_test(tcase, a_file_that_never_ends_is_refused);
    tcase_add_test(tcase, a_password_that_everybody_can_read_is_noticed);
    tcase_add_test(tcase, a_file_without_a_password_may_be_read_by_everybody);
    tcase_add_test(tcase, the_command_line_wins_over_the_file);
    tcase_add_test(tcase, the_file_alone_is_enough);
    tcase_add_test(tcase, a_lone_argument_replaces_the_mountpoint_or_the_source);
    tcase_add_test(tcase, the_environment_wins_over_the_password_of_the_file);
    tcase_add_test(tcase, a_bad_source_in_the_file_names_the_file);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
