#include "daemon/options.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/macros.h"

#define MAX_ARGS 16
#define VARIABLE "SESSIONFS_REDIS_PASSWORD"

static struct settings settings;
static char why[SETTINGS_WHY_MAX];
static char *argv[MAX_ARGS + 1]; /* writable copies, as exec() gives them */
static int argc;

static void setup(void)
{
    why[0] = '\0';
    argc = 0;
    unsetenv(VARIABLE);
    ck_assert_int_eq(settings_init(&settings), 0);
}

static void teardown(void)
{
    settings_deinit(&settings);
    for (int i = 0; i < argc; i++)
        free(argv[i]);
}

/* The arguments behind the program's name, ended by NULL. */
static int parse(const char *first, ...)
{
    va_list args;

    argv[argc++] = strdup("sessionfs");
    va_start(args, first);
    for (const char *arg = first; arg; arg = va_arg(args, const char *))
        argv[argc++] = strdup(arg);
    va_end(args);
    argv[argc] = NULL;
    return options_parse(&settings, argc, argv, why, sizeof(why));
}

START_TEST(a_lone_argument_is_the_mountpoint)
{
    ck_assert_msg(parse("/m", NULL) == OPTIONS_MOUNT, "%s", why);
    ck_assert_str_eq(settings.mountpoint, "/m");
    ck_assert(settings.address.is_local);
    ck_assert_ptr_null(settings.address.path);
}
END_TEST

START_TEST(the_defaults_are_those_of_the_manual)
{
    ck_assert_int_eq(parse("/m", NULL), OPTIONS_MOUNT);
    ck_assert_uint_eq(settings.ttl_ms, 24 * 60 * 1000);
    ck_assert_str_eq(settings.name_space, "default");
    ck_assert_uint_eq(settings.l1_size, UINT64_C(256) << 20);
    ck_assert_uint_eq(settings.max_session, UINT64_C(64) << 20);
    ck_assert_uint_eq(settings.connections, 32);
    ck_assert_uint_eq(settings.timeout_ms, 1000);
    ck_assert(!settings.has_uid && !settings.has_gid && !settings.has_umask);
    ck_assert(!settings.is_foreground && !settings.is_debug);
    ck_assert_str_eq(settings.fuse_options, "");
    ck_assert_ptr_null(settings.keyfile);
}
END_TEST

START_TEST(two_arguments_are_source_and_mountpoint)
{
    ck_assert_msg(parse("redis://h:1/2", "/m", "-o", "keyfile=/k", NULL) == OPTIONS_MOUNT, "%s", why);
    ck_assert_str_eq(settings.mountpoint, "/m");
    ck_assert_str_eq(settings.address.host, "h");
    ck_assert_str_eq(settings.keyfile, "/k");
}
END_TEST

START_TEST(what_fstab_has_instead_of_a_source_is_local)
{
    static const char *const sources[] = {"sessionfs", "none", "", "local"};

    ck_assert_msg(parse(sources[_i], "/m", NULL) == OPTIONS_MOUNT, "%s", why);
    ck_assert(settings.address.is_local);
    ck_assert_ptr_null(settings.address.path);
}
END_TEST

START_TEST(options_may_stand_anywhere)
{
    ck_assert_msg(parse("-o", "ttl=1h", "local:/d", "-f", "/m", "-o", "namespace=a", NULL) == OPTIONS_MOUNT, "%s", why);
    ck_assert_uint_eq(settings.ttl_ms, 3600000);
    ck_assert_str_eq(settings.name_space, "a");
    ck_assert_str_eq(settings.address.path, "/d");
    ck_assert(settings.is_foreground);
    ck_assert(!settings.is_debug);
}
END_TEST

START_TEST(debug_implies_foreground)
{
    ck_assert_int_eq(parse("-d", "/m", NULL), OPTIONS_MOUNT);
    ck_assert(settings.is_foreground && settings.is_debug);
}
END_TEST

START_TEST(a_double_dash_ends_the_options)
{
    ck_assert_msg(parse("-f", "--", "-m", NULL) == OPTIONS_MOUNT, "%s", why);
    ck_assert_str_eq(settings.mountpoint, "-m");
}
END_TEST

START_TEST(help_and_version_need_nothing_else)
{
    static const struct {
        const char *arg;
        int task;
    } rows[] = {
        {"-h", OPTIONS_HELP}, {"--help", OPTIONS_HELP}, {"-V", OPTIONS_VERSION}, {"--version", OPTIONS_VERSION}};

    ck_assert_int_eq(parse(rows[_i].arg, NULL), rows[_i].task);
}
END_TEST

START_TEST(every_option_reaches_its_setting)
{
    ck_assert_msg(
        parse("/m", "-o",
              "ttl=none,namespace=A.b_c-9,keyfile=/k,l1_size=2G,max_session=1M,connections=256,timeout=1500ms,"
              "uid=0,gid=4294967294,umask=0027,fsname=x",
              NULL) == OPTIONS_MOUNT,
        "%s", why);
    ck_assert_uint_eq(settings.ttl_ms, 0);
    ck_assert_str_eq(settings.name_space, "A.b_c-9");
    ck_assert_str_eq(settings.keyfile, "/k");
    ck_assert_uint_eq(settings.l1_size, UINT64_C(2) << 30);
    ck_assert_uint_eq(settings.max_session, 1u << 20);
    ck_assert_uint_eq(settings.connections, 256);
    ck_assert_uint_eq(settings.timeout_ms, 1500);
    ck_assert(settings.has_uid && settings.has_gid && settings.has_umask);
    ck_assert_uint_eq(settings.uid, 0);
    ck_assert_uint_eq(settings.gid, 4294967294u);
    ck_assert_uint_eq(settings.umask, 027);
    ck_assert_str_eq(settings.fsname, "x");
    ck_assert_str_eq(settings.fuse_options, "");
}
END_TEST

START_TEST(the_last_of_two_wins)
{
    ck_assert_int_eq(parse("/m", "-o", "ttl=1h,ttl=2h", "-o", "ttl=3h", NULL), OPTIONS_MOUNT);
    ck_assert_uint_eq(settings.ttl_ms, 3 * 3600000);
}
END_TEST

START_TEST(empty_options_are_nothing)
{
    ck_assert_msg(parse("/m", "-o", "", "-o", ",ttl=1h,,", NULL) == OPTIONS_MOUNT, "%s", why);
    ck_assert_uint_eq(settings.ttl_ms, 3600000);
}
END_TEST

START_TEST(a_backslash_keeps_a_comma)
{
    ck_assert_msg(parse("/m", "-o", "keyfile=/a\\,b\\\\c,ttl=1h", NULL) == OPTIONS_MOUNT, "%s", why);
    ck_assert_str_eq(settings.keyfile, "/a,b\\c");
    ck_assert_uint_eq(settings.ttl_ms, 3600000);
}
END_TEST

START_TEST(options_of_fuse_go_to_libfuse)
{
    ck_assert_msg(parse("/m", "-o", "allow_other,ro,subtype=a\\,b,max_read=65536,noatime", NULL) == OPTIONS_MOUNT, "%s",
                  why);
    ck_assert_str_eq(settings.fuse_options, "allow_other,ro,subtype=a\\,b,max_read=65536,noatime");
}
END_TEST

START_TEST(options_of_mount_and_fstab_mean_nothing)
{
    ck_assert_msg(parse("/m", "-o",
                        "defaults,auto,noauto,user,user=me,users,nouser,owner,group,_netdev,nofail,atime,relatime,"
                        "x-systemd.automount,x-gvfs-show,X-mount.mkdir,comment=hi,default_permissions",
                        NULL) == OPTIONS_MOUNT,
                  "%s", why);
    ck_assert_str_eq(settings.fuse_options, "");
}
END_TEST

START_TEST(what_mount_fuse_passes_is_accepted)
{
    ck_assert_msg(parse("local", "/m", "-o", "rw,dev,suid,exec,ttl=1h", NULL) == OPTIONS_MOUNT, "%s", why);
    ck_assert_str_eq(settings.fuse_options, geteuid() == 0 ? "rw,dev,suid,exec" : "rw,exec");
}
END_TEST

START_TEST(a_large_max_session_shrinks_with_l1_unless_it_was_given)
{
    ck_assert_int_eq(parse("/m", "-o", "l1_size=1M", NULL), OPTIONS_MOUNT);
    ck_assert_uint_eq(settings.max_session, 512u << 10);
}
END_TEST

static const struct {
    const char *option, *part; /* of the message */
} bad_options[] = {
    {"foo", "foo"},
    {"foo=1", "foo"},
    {"allow_otherx", "allow_otherx"},
    {"TTL=1h", "TTL"},
    {"=1", "\"=1\""},
    {"ttl", "ttl"},
    {"ttl=", "1s to"},
    {"ttl=0", "1s to"},
    {"ttl=999ms", "1s to"},
    {"ttl=3651d", "1s to"},
    {"ttl=-1", "1s to"},
    {"ttl=abc", "ttl=abc"},
    {"ttl=99999999999999999999d", "1s to"},
    {"namespace=", "namespace"},
    {"namespace=a/b", "A-Z"},
    {"namespace=a b", "A-Z"},
    {"namespace=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "64"},
    {"keyfile", "keyfile"},
    {"keyfile=", "keyfile"},
    {"l1_size=1048575", "1M to"},
    {"l1_size=1025G", "1M to"},
    {"max_session=1K", "4K to"},
    {"max_session=512M", "4K to"},
    {"l1_size=1M,max_session=1M", "half of l1_size"},
    {"max_session=129M", "half of l1_size"},
    {"connections=0", "1 to 256"},
    {"connections=257", "1 to 256"},
    {"connections=4294967297", "1 to 256"},
    {"connections=two", "1 to 256"},
    {"timeout=9ms", "10ms to"},
    {"timeout=6m", "10ms to"},
    {"timeout=none", "10ms to"},
    {"uid=4294967295", "uid"},
    {"uid=root", "uid"},
    {"gid=-1", "gid"},
    {"umask=1000", "octal"},
    {"umask=08", "octal"},
    {"ro=1", "no value"},
    {"allow_other=yes", "no value"},
    {"max_read=x", "max_read"},
    {"subtype", "needs a value"},
};

START_TEST(a_bad_option_is_named_with_its_range)
{
    ck_assert_msg(parse("/m", "-o", bad_options[_i].option, NULL) == -EINVAL, "%s is accepted", bad_options[_i].option);
    ck_assert_msg(strstr(why, bad_options[_i].part), "\"%s\" is not in: %s", bad_options[_i].part, why);
    ck_assert_ptr_null(strchr(why, '\n'));
}
END_TEST

START_TEST(a_password_is_no_option_and_is_not_repeated)
{
    ck_assert_int_eq(parse("/m", "-o", "password=hunter2", NULL), -EINVAL);
    ck_assert_ptr_null(strstr(why, "hunter2"));
    ck_assert_ptr_nonnull(strstr(why, VARIABLE));
}
END_TEST

START_TEST(bad_usage_is_refused)
{
    static const char *const rows[][4] = {
        {NULL},       {""},         {"-f"},        {"a", "b", "c"}, {"-x", "/m"},           {"--nonsense", "/m"},
        {"/m", "-o"}, {"/m", "-c"}, {"redis://h"}, {"local:/d"},    {"nonsense://h", "/m"}, {"a", "--", "b", "c"},
    };

    ck_assert_msg(parse(rows[_i][0], rows[_i][1], rows[_i][2], rows[_i][3], NULL) == -EINVAL, "row %d", _i);
    ck_assert_uint_gt(strlen(why), 0);
    ck_assert_ptr_null(strchr(why, '\n'));
}
END_TEST

START_TEST(a_remote_source_without_a_key_is_told_how_to_make_one)
{
    ck_assert_int_eq(parse("redis://u:hunter2@h", "/m", NULL), -ENOKEY);
    ck_assert_ptr_nonnull(strstr(why, "openssl rand -hex 32 > FILE; chmod 600 FILE"));
    ck_assert_ptr_nonnull(strstr(why, "keyfile="));
    ck_assert_ptr_null(strstr(why, "hunter2"));
}
END_TEST

START_TEST(a_password_in_the_source_is_used_and_leaves_argv)
{
    ck_assert_int_eq(parse("redis://me:hunter2@h:7/1", "/m", "-o", "keyfile=/k", NULL), OPTIONS_MOUNT);
    ck_assert_str_eq(settings.address.password, "hunter2");
    ck_assert_str_eq(argv[1], "redis://me:*@h:7/1");
    ck_assert_ptr_null(memmem(argv[1], strlen("redis://me:hunter2@h:7/1"), "hunter", 6)); /* nor behind its new end */
}
END_TEST

START_TEST(a_password_leaves_argv_on_failure_too)
{
    static const char *const sources[] = {"redis://:hunter2@h:x", "redis://u:hun/ter2@h", "rediss://:hunter2@h",
                                          "redis://u:h@nter2@h"};

    ck_assert_int_eq(parse(sources[_i], "/m", "-x", NULL), -EINVAL);
    ck_assert_ptr_null(strstr(argv[1], "ter2"));
    ck_assert_ptr_null(strstr(why, "ter2"));
}
END_TEST

START_TEST(the_password_of_the_environment_is_used_and_removed)
{
    char entry[] = VARIABLE "=hunter2"; /* putenv() lends it, as the kernel does */

    ck_assert_int_eq(putenv(entry), 0);
    ck_assert_int_eq(parse("redis://me@h", "/m", "-o", "keyfile=/k", NULL), OPTIONS_MOUNT);
    ck_assert_str_eq(settings.address.user, "me");
    ck_assert_str_eq(settings.address.password, "hunter2");
    ck_assert_ptr_null(getenv(VARIABLE));
    ck_assert_ptr_null(memmem(entry, sizeof(entry), "hunter2", 7));
}
END_TEST

START_TEST(the_password_of_the_source_wins_over_the_environment)
{
    setenv(VARIABLE, "other", 1);
    ck_assert_int_eq(parse("redis://:hunter2@h", "/m", "-o", "keyfile=/k", NULL), OPTIONS_MOUNT);
    ck_assert_str_eq(settings.address.password, "hunter2");
    ck_assert_ptr_null(getenv(VARIABLE));
}
END_TEST

START_TEST(the_private_server_gets_no_password)
{
    setenv(VARIABLE, "hunter2", 1);
    ck_assert_int_eq(parse("local:/d", "/m", NULL), OPTIONS_MOUNT);
    ck_assert_ptr_null(settings.address.password);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("options");
    TCase *tcase = tcase_create("options");

    tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_add_test(tcase, a_lone_argument_is_the_mountpoint);
    tcase_add_test(tcase, the_defaults_are_those_of_the_manual);
    tcase_add_test(tcase, two_arguments_are_source_and_mountpoint);
    tcase_add_loop_test(tcase, what_fstab_has_instead_of_a_source_is_local, 0, 4);
    tcase_add_test(tcase, options_may_stand_anywhere);
    tcase_add_test(tcase, debug_implies_foreground);
    tcase_add_test(tcase, a_double_dash_ends_the_options);
    tcase_add_loop_test(tcase, help_and_version_need_nothing_else, 0, 4);
    tcase_add_test(tcase, every_option_reaches_its_setting);
    tcase_add_test(tcase, the_last_of_two_wins);
    tcase_add_test(tcase, empty_options_are_nothing);
    tcase_add_test(tcase, a_backslash_keeps_a_comma);
    tcase_add_test(tcase, options_of_fuse_go_to_libfuse);
    tcase_add_test(tcase, options_of_mount_and_fstab_mean_nothing);
    tcase_add_test(tcase, what_mount_fuse_passes_is_accepted);
    tcase_add_test(tcase, a_large_max_session_shrinks_with_l1_unless_it_was_given);
    tcase_add_loop_test(tcase, a_bad_option_is_named_with_its_range, 0, ARRAY_SIZE(bad_options));
    tcase_add_test(tcase, a_password_is_no_option_and_is_not_repeated);
    tcase_add_loop_test(tcase, bad_usage_is_refused, 0, 12);
    tcase_add_test(tcase, a_remote_source_without_a_key_is_told_how_to_make_one);
    tcase_add_test(tcase, a_password_in_the_source_is_used_and_leaves_argv);
    tcase_add_loop_test(tcase, a_password_leaves_argv_on_failure_too, 0, 4);
    tcase_add_test(tcase, the_password_of_the_environment_is_used_and_removed);
    tcase_add_test(tcase, the_password_of_the_source_wins_over_the_environment);
    tcase_add_test(tcase, the_private_server_gets_no_password);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
