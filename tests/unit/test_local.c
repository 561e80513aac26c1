#include "daemon/local.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/macros.h"

#define SKIPPED 77
#define WAIT_MS 10000

static char base[] = "/tmp/test-local-XXXXXX"; /* mode 0700 */
static char dir[64], why[1024];
static struct local *local, *other;

static const char *in_dir(const char *name)
{
    static char path[2][256];
    static unsigned turn;
    char *out = path[turn++ % 2];

    snprintf(out, sizeof(path[0]), "%s/%s", dir, name);
    return out;
}

static bool exists(const char *name)
{
    struct stat st;

    return lstat(in_dir(name), &st) == 0;
}

static pid_t server_pid(void)
{
    FILE *file = fopen(in_dir("redis.pid"), "r");
    int pid = 0;

    if (file && fscanf(file, "%d", &pid) != 1)
        pid = 0;
    if (file)
        fclose(file);
    return pid;
}

/* Its lock is free when it is gone, however it ended. */
static bool server_is_gone(void)
{
    int fd = open(in_dir("redis.lock"), O_RDWR | O_CLOEXEC);

    if (fd < 0)
        return true;
    bool is_gone = flock(fd, LOCK_EX | LOCK_NB) == 0;
    close(fd);
    return is_gone;
}

static void wait_gone(void)
{
    uint64_t deadline = clock_now_ms() + WAIT_MS;

    while (!server_is_gone()) {
        ck_assert_msg(clock_now_ms() < deadline, "redis-server does not end");
        poll(NULL, 0, 2);
    }
}

static void kill_server(void)
{
    pid_t pid = server_pid();

    ck_assert_int_gt(pid, 1);
    ck_assert_int_eq(kill(pid, SIGKILL), 0);
    wait_gone();
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *where)
{
    return remove(path);
}

static void setup(void)
{
    strcpy(base, "/tmp/test-local-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(base));
    snprintf(dir, sizeof(dir), "%s/state", base);
    why[0] = '\0';
    local = other = NULL;
}

static void teardown(void)
{
    local_free(local);
    local_free(other);
    if (!server_is_gone() && server_pid() > 1)
        kill(server_pid(), SIGKILL);
    nftw(base, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static void start(struct local **ret)
{
    ck_assert_msg(local_new(ret, dir, true, why, sizeof(why)) == 0, "%s", why);
}

static void assert_why(const char *part)
{
    ck_assert_msg(strstr(why, part), "\"%s\" is not in: %s", part, why);
    ck_assert_msg(strstr(why, dir) || strstr(why, "/"), "no directory in: %s", why);
    ck_assert_ptr_null(strchr(why, '\n'));
}

START_TEST(the_first_user_starts_a_private_server)
{
    struct stat st;

    start(&local);
    ck_assert_str_eq(local_socket(local), in_dir("redis.sock"));
    ck_assert_str_eq(local_key(local), in_dir("key"));
    ck_assert_int_eq(stat(dir, &st), 0);
    ck_assert_uint_eq(st.st_mode & 07777, 0700);
    ck_assert_int_eq(stat(in_dir("redis.sock"), &st), 0);
    ck_assert_uint_eq(st.st_mode & 0777, 0600);
    ck_assert_int_eq(stat(in_dir("key"), &st), 0);
    ck_assert_uint_eq(st.st_mode & 0777, 0600);
    ck_assert(exists("appendonlydir"));
    ck_assert(!server_is_gone());
}
END_TEST

START_TEST(no_key_is_made_when_another_is_given)
{
    ck_assert_msg(local_new(&local, dir, false, why, sizeof(why)) == 0, "%s", why);
    ck_assert(!exists("key"));
}
END_TEST

START_TEST(the_last_user_stops_it)
{
    start(&local);
    start(&other);
    pid_t pid = server_pid();
    local_free(TAKE(local));
    ck_assert(!server_is_gone());
    ck_assert_int_eq(server_pid(), pid);
    local_free(TAKE(other));
    ck_assert(server_is_gone());
    ck_assert(!exists("redis.sock"));
}
END_TEST

START_TEST(the_key_stays_the_same)
{
    char first[128] = "", second[128] = "";

    start(&local);
    int fd = open(in_dir("key"), O_RDONLY);
    ck_assert_int_gt(read(fd, first, sizeof(first)), 0);
    close(fd);
    local_free(TAKE(local));
    start(&local);
    fd = open(in_dir("key"), O_RDONLY);
    ck_assert_int_gt(read(fd, second, sizeof(second)), 0);
    close(fd);
    ck_assert_mem_eq(first, second, sizeof(first));
}
END_TEST

START_TEST(the_server_survives_the_kill_of_its_last_user_and_is_used_again)
{
    pid_t child = fork();

    if (child == 0) {
        struct local *mine;
        if (local_new(&mine, dir, true, why, sizeof(why)) == 0)
            raise(SIGKILL);
        _exit(1);
    }
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert(WIFSIGNALED(status));
    pid_t pid = server_pid();
    ck_assert(!server_is_gone());
    start(&local);
    ck_assert_int_eq(server_pid(), pid);
    local_free(TAKE(local));
    ck_assert(server_is_gone());
}
END_TEST

START_TEST(users_that_start_at_once_share_one_server)
{
    enum { N = 8 };
    int ready[2], go[2];
    pid_t children[N], pid = 0;
    char byte;

    ck_assert_int_eq(pipe(ready), 0);
    ck_assert_int_eq(pipe(go), 0);
    for (int i = 0; i < N; i++) {
        children[i] = fork();
        if (children[i] == 0) {
            struct local *mine = NULL;
            close(go[1]);
            int r = local_new(&mine, dir, true, why, sizeof(why));
            pid = server_pid();
            if (write(ready[1], &pid, sizeof(pid)) < 0 || read(go[0], &byte, 1) < 0) /* until the test says go */
                r = -EIO;
            local_free(mine);
            _exit(r < 0);
        }
    }
    for (int i = 0; i < N; i++) {
        pid_t theirs;
        ck_assert_int_eq(read(ready[0], &theirs, sizeof(theirs)), sizeof(theirs));
        ck_assert_int_gt(theirs, 1);
        ck_assert(pid == 0 || pid == theirs);
        pid = theirs;
    }
    close(go[0]);
    close(go[1]);
    for (int i = 0; i < N; i++) {
        int status;
        ck_assert_int_eq(waitpid(children[i], &status, 0), children[i]);
        ck_assert_int_eq(status, 0);
    }
    ck_assert(server_is_gone());
    close(ready[0]);
    close(ready[1]);
}
END_TEST

START_TEST(a_stale_socket_does_not_matter)
{
    start(&local);
    kill_server();
    local_free(TAKE(local));
    ck_assert(exists("redis.sock"));
    start(&local);
    ck_assert(!server_is_gone());
}
END_TEST

START_TEST(a_server_that_died_is_started_again)
{
    start(&local);
    pid_t pid = server_pid();
    kill_server();
    local_check(local);
    start(&other); /* waits until it answers */
    ck_assert(!server_is_gone());
    ck_assert_int_ne(server_pid(), pid);
}
END_TEST

START_TEST(a_living_server_is_left_alone)
{
    start(&local);
    pid_t pid = server_pid();
    local_check(local);
    local_check(local);
    ck_assert_int_eq(server_pid(), pid);
}
END_TEST

START_TEST(no_lock_of_ours_reaches_the_server)
{
    char link[64], target[512];

    start(&local);
    for (int fd = 3; fd < 256; fd++) {
        snprintf(link, sizeof(link), "/proc/%d/fd/%d", (int)server_pid(), fd);
        ssize_t n = readlink(link, target, sizeof(target) - 1);
        if (n < 0)
            continue;
        target[n] = '\0';
        ck_assert_msg(!strstr(target, "users.lock") && !strstr(target, "start.lock"), "%s", target);
    }
}
END_TEST

START_TEST(the_server_gets_no_blocked_signal)
{
    sigset_t signals, saved;
    char path[64], line[256];
    unsigned long long blocked = 1;

    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigprocmask(SIG_BLOCK, &signals, &saved);
    start(&local);
    sigprocmask(SIG_SETMASK, &saved, NULL);
    snprintf(path, sizeof(path), "/proc/%d/status", (int)server_pid());
    FILE *file = fopen(path, "r");
    ck_assert_ptr_nonnull(file);
    while (fgets(line, sizeof(line), file))
        if (sscanf(line, "SigBlk: %llx", &blocked) == 1)
            break;
    fclose(file);
    ck_assert_uint_eq(blocked, 0);
}
END_TEST

START_TEST(a_path_too_long_for_a_socket_is_refused)
{
    char longer[256];

    snprintf(longer, sizeof(longer), "%s/%0120d", base, 0);
    ck_assert_int_eq(local_new(&local, longer, true, why, sizeof(why)), -ENAMETOOLONG);
    assert_why("shorter");
    ck_assert_int_lt(access(longer, F_OK), 0);
}
END_TEST

START_TEST(a_directory_open_to_others_is_refused_unless_it_is_ours)
{
    FILE *file;

    ck_assert_int_eq(mkdir(dir, 0755), 0);
    file = fopen(in_dir("somebodys"), "w");
    ck_assert_ptr_nonnull(file);
    fclose(file);
    ck_assert_int_eq(local_new(&local, dir, true, why, sizeof(why)), -EACCES);
    assert_why("chmod 700");
    ck_assert_int_eq(unlink(in_dir("somebodys")), 0);
    start(&local); /* an empty one is closed */
    struct stat st;
    ck_assert_int_eq(stat(dir, &st), 0);
    ck_assert_uint_eq(st.st_mode & 0777, 0700);
}
END_TEST

START_TEST(what_is_no_directory_is_refused)
{
    FILE *file = fopen(dir, "w");

    ck_assert_ptr_nonnull(file);
    fclose(file);
    ck_assert_int_lt(local_new(&local, dir, true, why, sizeof(why)), 0);
    assert_why(dir);
}
END_TEST

START_TEST(damaged_data_are_told_and_nothing_is_left_running)
{
    start(&local);
    local_free(TAKE(local));
    FILE *file = fopen(in_dir("appendonlydir/appendonly.aof.manifest"), "w");
    ck_assert_ptr_nonnull(file);
    fputs("garbage\n", file);
    fclose(file);
    ck_assert_int_lt(local_new(&local, dir, true, why, sizeof(why)), 0);
    assert_why("redis.log");
    ck_assert(server_is_gone());
}
END_TEST

START_TEST(sessions_without_their_key_are_not_mixed_with_others)
{
    start(&local);
    local_free(TAKE(local));
    ck_assert_int_eq(unlink(in_dir("key")), 0);
    ck_assert_int_eq(local_new(&local, dir, true, why, sizeof(why)), -ENOKEY);
    assert_why("restore");
    ck_assert(!exists("key"));
    ck_assert(server_is_gone());
}
END_TEST

START_TEST(waiting_ends_with_a_signal)
{
    sigset_t signals, saved;

    start(&local);
    int fd = open(in_dir("start.lock"), O_RDWR);
    ck_assert_int_eq(flock(fd, LOCK_EX), 0);
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigprocmask(SIG_BLOCK, &signals, &saved);
    raise(SIGTERM);
    ck_assert_int_eq(local_new(&other, dir, true, why, sizeof(why)), -EINTR);
    sigwaitinfo(&signals, NULL);
    sigprocmask(SIG_SETMASK, &saved, NULL);
    close(fd);
}
END_TEST

START_TEST(the_default_directory_follows_the_environment)
{
    char *path;

    setenv("XDG_STATE_HOME", "/xdg", 1);
    ck_assert_int_eq(local_dir_default(&path, why, sizeof(why)), 0);
    ck_assert_str_eq(path, "/xdg/sessionfs");
    free(path);
    setenv("XDG_STATE_HOME", "relative/is/invalid", 1);
    setenv("HOME", "/home/me", 1);
    ck_assert_int_eq(local_dir_default(&path, why, sizeof(why)), 0);
    ck_assert_str_eq(path, geteuid() == 0 ? "/var/lib/sessionfs" : "/home/me/.local/state/sessionfs");
    free(path);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("local");
    TCase *tcase = tcase_create("local");

    if (system("command -v redis-server >/dev/null 2>&1") != 0)
        return SKIPPED;
    tcase_set_timeout(tcase, 60);
    tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_add_test(tcase, the_first_user_starts_a_private_server);
    tcase_add_test(tcase, no_key_is_made_when_another_is_given);
    tcase_add_test(tcase, the_last_user_stops_it);
    tcase_add_test(tcase, the_key_stays_the_same);
    tcase_add_test(tcase, the_server_survives_the_kill_of_its_last_user_and_is_used_again);
    tcase_add_test(tcase, users_that_start_at_once_share_one_server);
    tcase_add_test(tcase, a_stale_socket_does_not_matter);
    tcase_add_test(tcase, a_server_that_died_is_started_again);
    tcase_add_test(tcase, a_living_server_is_left_alone);
    tcase_add_test(tcase, no_lock_of_ours_reaches_the_server);
    tcase_add_test(tcase, the_server_gets_no_blocked_signal);
    tcase_add_test(tcase, a_path_too_long_for_a_socket_is_refused);
    tcase_add_test(tcase, a_directory_open_to_others_is_refused_unless_it_is_ours);
    tcase_add_test(tcase, what_is_no_directory_is_refused);
    tcase_add_test(tcase, damaged_data_are_told_and_nothing_is_left_running);
    tcase_add_test(tcase, sessions_without_their_key_are_not_mixed_with_others);
    tcase_add_test(tcase, waiting_ends_with_a_signal);
    tcase_add_test(tcase, the_default_directory_follows_the_environment);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
