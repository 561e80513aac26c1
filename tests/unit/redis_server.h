/*
 * A private redis-server for a test: started in a directory of its own, killed with the process that started it.
 *
 * Check runs each test in a child of its own and gives up without the teardown when it fails: so the directories live
 * in one which main() makes (servers_begin()) and removes (servers_end()), and the servers end by PR_SET_PDEATHSIG.
 * Threads: the main thread only, but for server_do() with a context of one's own.
 */
#ifndef TESTS_REDIS_SERVER_H
#define TESTS_REDIS_SERVER_H

#include <check.h>
#include <ftw.h>
#include <hiredis/hiredis.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"

#define SKIPPED 77
#define WAIT_MS 20000 /* only a broken program takes that long */

/* Polls until @condition; the test fails if it does not come true. Main thread only. */
#define WAIT_UNTIL(condition)                                                                                          \
    do {                                                                                                               \
        uint64_t wait_until_ = clock_now_ms() + WAIT_MS;                                                               \
        while (!(condition)) {                                                                                         \
            if (clock_now_ms() > wait_until_)                                                                          \
                ck_abort_msg("waited in vain for: %s", #condition);                                                    \
            poll(NULL, 0, 1);                                                                                          \
        }                                                                                                              \
    } while (0)

/* For inner loops: ck_assert() reports each success to the parent process. */
#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            ck_abort_msg("%s", #condition);                                                                            \
    } while (0)

static char servers_base[] = "/tmp/test-redis-XXXXXX";

struct server {
    char dir[64], path[80];
    pid_t pid;
    redisContext *client; /* the test's own, "the other client" */
};

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    return remove(path);
}

static bool servers_begin(void)
{
    if (system("redis-server --version >/dev/null 2>&1") != 0) {
        fprintf(stderr, "SKIPPED: redis-server is not installed\n");
        return false;
    }
    return mkdtemp(servers_base);
}

static void servers_end(void)
{
    nftw(servers_base, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

static int suite_main(Suite *suite)
{
    if (!servers_begin())
        return SKIPPED;
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    servers_end();
    return n_failed != 0;
}

static redisContext *server_connect(const struct server *server)
{
    redisContext *client = redisConnectUnix(server->path);

    if (client && client->err) {
        redisFree(client);
        client = NULL;
    }
    return client;
}

/* The reply of the other client, to be freed; never an error. */
static redisReply *server_reply(struct server *server, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    redisReply *reply = redisvCommand(server->client, format, args);
    va_end(args);
    ck_assert_msg(reply != NULL, "%s: %s", format, server->client->errstr);
    ck_assert_msg(reply->type != REDIS_REPLY_ERROR, "%s: %s", format, reply->str);
    return reply;
}

/* A command of the other client; its integer reply, or 0. */
#define server_do(server, ...)                                                                                         \
    __extension__({                                                                                                    \
        redisReply *reply_ = server_reply(server, __VA_ARGS__);                                                        \
        long long integer_ = reply_->integer;                                                                          \
        freeReplyObject(reply_);                                                                                       \
        integer_;                                                                                                      \
    })

static bool server_answers(struct server *server)
{
    server->client = server_connect(server);
    redisReply *reply = server->client ? redisCommand(server->client, "PING") : NULL;
    bool is_fine = reply && (reply->type != REDIS_REPLY_ERROR || strncmp(reply->str, "NOAUTH", 6) == 0);

    if (reply)
        freeReplyObject(reply);
    if (!is_fine && server->client) {
        redisFree(server->client);
        server->client = NULL;
    }
    return is_fine;
}

/* @option, @value: one more of its command line, or NULL. Also restarts one that was killed. */
static void server_start(struct server *server, const char *option, const char *value)
{
    static unsigned n_servers;

    if (!server->dir[0]) {
        snprintf(server->dir, sizeof(server->dir), "%s/%d.%u", servers_base, (int)getpid(), ++n_servers);
        snprintf(server->path, sizeof(server->path), "%s/r.sock", server->dir);
        ck_assert_int_eq(mkdir(server->dir, 0700), 0);
    }
    pid_t parent = getpid();
    server->pid = fork();
    ck_assert_int_ge(server->pid, 0);
    if (server->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
        execlp("redis-server", "redis-server", "--port", "0", "--unixsocket", server->path, "--save", "",
               "--appendonly", "no", "--daemonize", "no", "--logfile", "/dev/null", "--dir", server->dir, option, value,
               (char *)NULL);
        _exit(1);
    }
    WAIT_UNTIL(server_answers(server));
}

static void server_kill(struct server *server)
{
    if (server->client)
        redisFree(server->client);
    server->client = NULL;
    if (server->pid <= 0)
        return;
    kill(server->pid, SIGKILL);
    waitpid(server->pid, NULL, 0);
    server->pid = 0;
}

/* It neither reads nor answers, until server_continue(). */
static void server_freeze(struct server *server)
{
    int status;

    kill(server->pid, SIGSTOP);
    ck_assert_int_eq(waitpid(server->pid, &status, WUNTRACED), server->pid);
    ck_assert(WIFSTOPPED(status));
}

static void server_continue(struct server *server)
{
    kill(server->pid, SIGCONT);
}

static void server_end(struct server *server)
{
    server_kill(server);
    nftw(server->dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    server->dir[0] = 0;
}

/* Kills connections: the first (or all) whose name is @name, or begins with it if @is_prefix. Returns how many. */
__attribute__((unused)) static unsigned server_kill_clients(struct server *server, const char *name, bool is_prefix,
                                                            bool all)
{
    redisReply *list = server_reply(server, "CLIENT LIST");
    unsigned n = 0;

    for (char *line = strtok(list->str, "\n"); line && (all || !n); line = strtok(NULL, "\n")) {
        unsigned long long id = 0;
        char found[64] = "";
        const char *at = strstr(line, " name=");
        if (!at || sscanf(line, "id=%llu", &id) != 1 || sscanf(at, " name=%63[^ ]", found) != 1)
            continue;
        if (is_prefix ? strncmp(found, name, strlen(name)) != 0 : strcmp(found, name) != 0)
            continue;
        n += (unsigned)server_do(server, "CLIENT KILL ID %llu", id);
    }
    freeReplyObject(list);
    return n;
}

#endif
