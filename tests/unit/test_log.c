#include "base/log.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int memory, saved_stderr;
static char text[8192];

/* Standard error goes to memory during a test. */
static void setup(void)
{
    memory = memfd_create("stderr", MFD_CLOEXEC);
    saved_stderr = dup(STDERR_FILENO);
    ck_assert_int_ge(memory, 0);
    ck_assert_int_eq(dup2(memory, STDERR_FILENO), STDERR_FILENO);
}

static void teardown(void)
{
    dup2(saved_stderr, STDERR_FILENO);
    close(saved_stderr);
    close(memory);
}

static const char *written(void)
{
    ssize_t n = pread(memory, text, sizeof(text) - 1, 0);

    text[n > 0 ? n : 0] = '\0';
    return text;
}

START_TEST(a_message_is_one_line_with_its_level)
{
    log_warning(0, "session %s: is odd", "x");
    ck_assert_str_eq(written(), "sessionfs: warning: session x: is odd\n");
}
END_TEST

START_TEST(the_text_of_an_error_is_appended)
{
    log_error(-ENOENT, "key file");
    ck_assert_str_eq(written(), "sessionfs: error: key file: No such file or directory\n");
}
END_TEST

START_TEST(an_error_without_a_text_is_no_crash)
{
    log_error(-100000, "odd");
    ck_assert_str_eq(written(), "sessionfs: error: odd: unknown error\n");
}
END_TEST

START_TEST(the_error_is_handed_back)
{
    ck_assert_int_eq(log_error(-EIO, "x"), -EIO);
    ck_assert_int_eq(log_warning(0, "x"), 0);
    ck_assert_int_eq(log_debug("not even written"), 0);
}
END_TEST

START_TEST(errno_is_kept)
{
    errno = EXDEV;
    log_info("x");
    ck_assert_int_eq(errno, EXDEV);
}
END_TEST

START_TEST(debug_lines_appear_only_when_asked_for)
{
    log_debug("one");
    ck_assert_str_eq(written(), "");
    log_set_debug(true);
    log_debug("two");
    ck_assert_str_eq(written(), "sessionfs: debug: two\n");
    log_set_debug(false);
    log_debug("three");
    ck_assert_str_eq(written(), "sessionfs: debug: two\n");
}
END_TEST

START_TEST(a_line_feed_cannot_forge_a_message)
{
    log_info("a%s", "b\nsessionfs: error: forged\r\x1b[0m");
    ck_assert_str_eq(written(), "sessionfs: info: ab sessionfs: error: forged  [0m\n");
}
END_TEST

START_TEST(a_long_message_is_cut_and_still_one_line)
{
    char longer[4000];

    memset(longer, 'x', sizeof(longer) - 1);
    longer[sizeof(longer) - 1] = '\0';
    log_error(-EIO, "%s", longer);
    const char *line = written();
    ck_assert_uint_lt(strlen(line), 1100);
    ck_assert_ptr_eq(strchr(line, '\n'), line + strlen(line) - 1);
}
END_TEST

START_TEST(nothing_goes_to_standard_error_once_it_is_syslog)
{
    log_to_syslog();
    log_error(-EIO, "x");
    ck_assert_str_eq(written(), "");
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("log");
    TCase *tcase = tcase_create("log");

    tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_add_test(tcase, a_message_is_one_line_with_its_level);
    tcase_add_test(tcase, the_text_of_an_error_is_appended);
    tcase_add_test(tcase, an_error_without_a_text_is_no_crash);
    tcase_add_test(tcase, the_error_is_handed_back);
    tcase_add_test(tcase, errno_is_kept);
    tcase_add_test(tcase, debug_lines_appear_only_when_asked_for);
    tcase_add_test(tcase, a_line_feed_cannot_forge_a_message);
    tcase_add_test(tcase, a_long_message_is_cut_and_still_one_line);
    tcase_add_test(tcase, nothing_goes_to_standard_error_once_it_is_syslog); /* the last one: there is no way back */
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
