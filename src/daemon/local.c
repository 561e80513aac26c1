#include "daemon/local.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <sessionfs/seal.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/macros.h"

#define START_WAIT_MS        30000 /* for a server that loads its data */
#define LOCK_WAIT_MS         45000 /* for another instance that starts or stops it */
#define STOP_WAIT_MS         10000
#define PAUSE_MS             10
#define REPLY_WAIT_MS        1000
#define RESTART_PAUSE_MS     1000 /* doubled with every restart, up to the following */
#define RESTART_PAUSE_MAX_MS 60000

struct local {
    char *dir, *socket, *key;
    int users_fd; /* holds users.lock */
    bool is_user;
    uint64_t restart_at_ms; /* not before; local_check() */
    unsigned restart_pause_ms;
};

struct why {
    char *text;
    size_t size;
};

static int fail(struct why why, int r, const char *format, ...) __attribute__((format(printf, 3, 4)));
static int fail(struct why why, int r, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(why.text, why.size, format, args);
    va_end(args);
    return r;
}

static char *path_join(const char *dir, const char *name)
{
    char *path;

    return asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path;
}

/* Waiting is over when the operator wants us to end: the daemon has blocked these signals, so they stay pending. */
static bool is_interrupted(void)
{
    sigset_t pending;

    sigpending(&pending);
    return sigismember(&pending, SIGTERM) || sigismember(&pending, SIGINT);
}

/* --- the directory --- */

int local_dir_default(char **ret, char *why_text, size_t why_size)
{
    struct why why = {why_text, why_size};
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");

    if (state && *state == '/') {
        *ret = path_join(state, "sessionfs");
    } else if (geteuid() == 0) {
        *ret = strdup("/var/lib/sessionfs");
    } else {
        if (!home || *home != '/') {
            const struct passwd *user = getpwuid(geteuid());
            home = user ? user->pw_dir : NULL;
        }
        if (!home)
            return fail(why, -ENOENT, "no home directory to keep the state in: say where, as local:DIR");
        *ret = path_join(home, ".local/state/sessionfs");
    }
    return *ret ? 0 : fail(why, -ENOMEM, "out of memory");
}

/* Like mkdir -p; what is missing above is made as the XDG specification wants it. */
static int make_path(const char *dir)
{
    CLEANUP(freep) char *path = strdup(dir);

    if (!path)
        return -ENOMEM;
    for (char *slash = path + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
        *slash = '\0';
        if (mkdir(path, 0700) < 0 && errno != EEXIST && errno != EROFS && errno != EACCES)
            return -errno;
    }
    if (mkdir(dir, 0700) < 0 && errno != EEXIST)
        return -errno;
    return 0;
}

/* A directory that is empty or has our locks is ours to close to others; any other one is left as it is. */
static bool dir_is_ours(const char *path)
{
    CLEANUP(freep) char *lock = path_join(path, "users.lock");
    DIR *dir = opendir(path);
    const struct dirent *entry;
    bool is_empty = true;

    if (!dir)
        return false;
    while (is_empty && (entry = readdir(dir)))
        is_empty = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0;
    closedir(dir);
    return is_empty || (lock && access(lock, F_OK) == 0);
}

static int dir_prepare(const char *dir, struct why why)
{
    struct stat st;
    int r = make_path(dir);

    if (r == 0 && stat(dir, &st) < 0)
        r = -errno;
    if (r < 0)
        return fail(why, r, "local:%s: the directory cannot be made: %s: choose another one, as local:DIR", dir,
                    strerrordesc_np(-r));
    if (!S_ISDIR(st.st_mode))
        return fail(why, -ENOTDIR, "local:%s: is not a directory: choose another one", dir);
    if (st.st_uid != geteuid())
        return fail(why, -EACCES, "local:%s: belongs to another user: choose another one, as local:DIR", dir);
    if (!(st.st_mode & 077))
        return 0;
    if (!dir_is_ours(dir) || chmod(dir, 0700) < 0)
        return fail(why, -EACCES, "local:%s: is open to other users: chmod 700 it, or choose another one", dir);
    return 0;
}

/* --- locks --- */

static int lock_open(const char *dir, const char *name)
{
    CLEANUP(freep) char *path = path_join(dir, name);
    int fd = path ? open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600) : -1;

    return fd < 0 ? -errno : fd;
}

/* @how: LOCK_EX or LOCK_SH. Return: 0, -ETIMEDOUT, -EINTR (if @is_patient is false), ... */
static int lock_wait(int fd, int how, unsigned wait_ms, bool is_patient)
{
    uint64_t deadline = clock_now_ms() + wait_ms;

    while (flock(fd, how | LOCK_NB) < 0) {
        if (errno != EWOULDBLOCK && errno != EINTR)
            return -errno;
        if (!is_patient && is_interrupted())
            return -EINTR;
        if (clock_now_ms() >= deadline)
            return -ETIMEDOUT;
        poll(NULL, 0, PAUSE_MS);
    }
    return 0;
}

/* Take start.lock. Return: the descriptor that holds it. */
static int start_lock(const char *dir, unsigned wait_ms, bool is_patient)
{
    int fd = lock_open(dir, "start.lock");
    int r = fd < 0 ? fd : lock_wait(fd, LOCK_EX, wait_ms, is_patient);

    if (r < 0 && fd >= 0)
        close(fd);
    return r < 0 ? r : fd;
}

/* Is a redis-server of this directory alive? If not, *@fd is a descriptor that holds its lock (to be inherited or
 * closed). */
static int server_is_alive(const char *dir, int *fd)
{
    *fd = lock_open(dir, "redis.lock");
    if (*fd < 0)
        return *fd;
    if (flock(*fd, LOCK_EX | LOCK_NB) == 0)
        return 0;
    int r = errno == EWOULDBLOCK ? 1 : -errno;
    close(*fd);
    *fd = -1;
    return r;
}

/* --- the server --- */

static char *program_find(const char *name)
{
    const char *path = getenv("PATH");
    CLEANUP(freep) char *list = NULL;

    /* mount(8) and systemd may run us with hardly a PATH. */
    if (asprintf(&list, "%s:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin", path ? path : "") < 0)
        return NULL;
    for (char *rest = list, *dir; (dir = strsep(&rest, ":"));) {
        CLEANUP(freep) char *file = *dir ? path_join(dir, name) : NULL;
        if (file && access(file, X_OK) == 0)
            return TAKE(file);
    }
    return NULL;
}

/* Nothing of ours goes along: no blocked signal, no handler, no descriptor but the lock. */
static int spawn_prepare(posix_spawnattr_t *attributes, posix_spawn_file_actions_t *actions, const char *dir,
                         int lock_fd)
{
    sigset_t none, all;

    sigemptyset(&none);
    sigfillset(&all);
    int r = posix_spawnattr_setflags(attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSID);
    r = r ? r : posix_spawnattr_setsigmask(attributes, &none);
    r = r ? r : posix_spawnattr_setsigdefault(attributes, &all);
    r = r ? r : posix_spawn_file_actions_addchdir_np(actions, dir);
    r = r ? r : posix_spawn_file_actions_addopen(actions, 0, "/dev/null", O_RDONLY, 0);
    r = r ? r : posix_spawn_file_actions_addopen(actions, 1, "redis.log", O_WRONLY | O_CREAT | O_APPEND, 0600);
    r = r ? r : posix_spawn_file_actions_adddup2(actions, 1, 2);
    r = r ? r : posix_spawn_file_actions_adddup2(actions, lock_fd, lock_fd); /* clears O_CLOEXEC */
    return -r;
}

/* Paths are relative to DIR, so that no quoting of redis-server's matters. */
static int server_spawn(const char *program, const char *dir, int lock_fd, pid_t *pid)
{
    static const char *const argv[] = {
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        "redis.sock",
        "--unixsocketperm",
        "600",
        "--logfile",
        "redis.log",
        "--pidfile",
        "redis.pid",
        "--appendonly",
        "yes",
        "--appendfsync",
        "everysec",
        "--save",
        "",
        "--databases",
        "1",
        "--daemonize",
        "yes",
        NULL,
    };
    posix_spawnattr_t attributes;
    posix_spawn_file_actions_t actions;

    posix_spawnattr_init(&attributes);
    posix_spawn_file_actions_init(&actions);
    int r = spawn_prepare(&attributes, &actions, dir, lock_fd);
    if (r == 0)
        r = -posix_spawn(pid, program, &actions, &attributes, (char *const *)argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    return r;
}

/* Starts it; it may still be loading its data, or fail to, when this returns. */
static int server_start(const char *dir, int lock_fd, struct why why)
{
    CLEANUP(freep) char *program = program_find("redis-server");
    pid_t pid;
    int status = 0;

    if (!program)
        return fail(why, -ENOENT,
                    "local:%s: redis-server is not installed: apt-get install redis-server, or give another SOURCE",
                    dir);
    int r = server_spawn(program, dir, lock_fd, &pid);
    if (r < 0)
        return fail(why, r, "local:%s: %s cannot be started: %s", dir, program, strerrordesc_np(-r));
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) /* returns when it has gone to the background */
        ;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        return fail(why, -EIO, "local:%s: redis-server refuses to start: see %s/redis.log", dir, dir);
    return 0;
}

/* Return: a socket; -ECONNREFUSED or -ENOENT if nobody listens. */
static int server_connect(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval limit = {REPLY_WAIT_MS / 1000, REPLY_WAIT_MS % 1000 * 1000};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return -errno;
    memcpy(address.sun_path, path, strlen(path) + 1); /* its length was checked by local_new() */
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0)
        return fd;
    int r = -errno;
    close(fd);
    return r;
}

/* Send one inline command; @reply is the first line of the answer, or "" when the server closed the connection. */
static int server_ask(const char *path, const char *command, char *reply, size_t reply_size)
{
    CLEANUP(closep) int fd = server_connect(path);
    size_t n = 0;

    if (fd < 0)
        return fd;
    if (send(fd, command, strlen(command), MSG_NOSIGNAL) < 0)
        return -errno;
    while (n + 1 < reply_size) {
        ssize_t got = recv(fd, reply + n, reply_size - 1 - n, 0);
        if (got < 0)
            return -errno;
        n += (size_t)got;
        if (got == 0 || memchr(reply, '\n', n))
            break;
    }
    reply[n] = '\0';
    reply[strcspn(reply, "\r\n")] = '\0';
    return 0;
}

/* The last line of redis.log, for a message. */
static void log_tail(const char *dir, char *out, size_t size)
{
    CLEANUP(freep) char *path = path_join(dir, "redis.log");
    CLEANUP(closep) int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    char text[256];
    off_t end = fd < 0 ? 0 : lseek(fd, 0, SEEK_END);
    off_t start = end > (off_t)sizeof(text) - 1 ? end - (off_t)sizeof(text) + 1 : 0;
    ssize_t n = fd < 0 ? 0 : pread(fd, text, sizeof(text) - 1, start);

    while (n > 0 && (unsigned char)text[n - 1] <= ' ')
        n--;
    text[n > 0 ? n : 0] = '\0';
    const char *line = strrchr(text, '\n');
    snprintf(out, size, "%s", line ? line + 1 : text);
}

/* Wait until it answers. -ECHILD: it died. */
static int server_wait(const char *dir, const char *socket, struct why why)
{
    uint64_t deadline = clock_now_ms() + START_WAIT_MS;
    char reply[256] = "", tail[256];
    int lock_fd;

    for (;;) {
        bool is_dead = server_is_alive(dir, &lock_fd) == 0;
        if (is_dead)
            close(lock_fd);
        int r = server_ask(socket, "PING\r\n", reply, sizeof(reply));
        if (r == 0 && strcmp(reply, "+PONG") == 0)
            return 0;
        if (r == 0 && strncmp(reply, "-NOAUTH", 7) == 0)
            return fail(why, -EACCES,
                        "local:%s: the server there wants a password, so it is not sessionfs' own: choose another DIR",
                        dir);
        if (is_dead && r < 0) {
            log_tail(dir, tail, sizeof(tail));
            return fail(why, -ECHILD, "local:%s: redis-server ended at its start (%s): see %s/redis.log", dir, tail,
                        dir);
        }
        if (is_interrupted())
            return fail(why, -EINTR, "local:%s: interrupted", dir);
        if (clock_now_ms() >= deadline)
            return fail(why, -ETIMEDOUT, "local:%s: redis-server does not answer after %d s (%s): see %s/redis.log",
                        dir, START_WAIT_MS / 1000, r < 0 ? strerrordesc_np(-r) : reply, dir);
        poll(NULL, 0, PAUSE_MS);
    }
}

/* Under start.lock, and nobody uses it. */
static void server_stop(const char *dir, const char *socket)
{
    uint64_t deadline = clock_now_ms() + STOP_WAIT_MS;
    char reply[256] = "";
    int lock_fd;

    int r = server_ask(socket, "SHUTDOWN NOSAVE\r\n", reply, sizeof(reply)); /* NOSAVE: no RDB; the AOF is flushed */
    while (server_is_alive(dir, &lock_fd) == 1) {
        if (clock_now_ms() >= deadline) {
            log_error(r, "local:%s: redis-server does not stop %s", dir, reply);
            return;
        }
        poll(NULL, 0, PAUSE_MS);
    }
    close(lock_fd);
}

/* --- one user of it --- */

/* Sessions whose key is gone must not be mixed with others under a new one. */
static int key_make(const struct local *local, struct why why)
{
    CLEANUP(freep) char *data = path_join(local->dir, "appendonlydir");

    if (access(local->key, F_OK) == 0)
        return 0;
    if (data && access(data, F_OK) == 0)
        return fail(
            why, -ENOKEY,
            "local:%s: there are sessions, but the key they are sealed with is gone: restore %s, give its copy with -o "
            "keyfile=, or remove %s to start anew",
            local->dir, local->key, data);
    int r = seal_keys_create(local->key);
    if (r < 0 && r != -EEXIST)
        return fail(why, r, "local:%s: %s cannot be made: %s", local->dir, local->key, strerrordesc_np(-r));
    return 0;
}

/* Start a server unless one runs. *@is_started tells. */
static int server_start_if_dead(const struct local *local, bool *is_started, struct why why)
{
    char reply[16];
    int lock_fd;
    int r = server_is_alive(local->dir, &lock_fd);

    *is_started = false;
    if (r < 0)
        return fail(why, r, "local:%s: redis.lock cannot be used: %s", local->dir, strerrordesc_np(-r));
    if (r == 1)
        return 0;
    if (server_ask(local->socket, "PING\r\n", reply, sizeof(reply)) <
        0) { /* else it is somebody's: server_wait() judges */
        r = server_start(local->dir, lock_fd, why);
        *is_started = r == 0;
    }
    close(lock_fd);
    return r;
}

/* Under start.lock. One that was there may be dying: then once more. */
static int server_ensure(const struct local *local, struct why why)
{
    bool is_started;
    int r;

    do {
        r = server_start_if_dead(local, &is_started, why);
        if (r == 0)
            r = server_wait(local->dir, local->socket, why);
    } while (r == -ECHILD && !is_started);
    return r;
}

static int user_enter(struct local *local, bool make_key, struct why why)
{
    local->users_fd = lock_open(local->dir, "users.lock");
    int r = local->users_fd < 0 ? local->users_fd : lock_wait(local->users_fd, LOCK_SH, START_WAIT_MS, false);
    if (r < 0)
        return fail(why, r, "local:%s: users.lock cannot be taken: %s", local->dir, strerrordesc_np(-r));
    local->is_user = true;
    r = make_key ? key_make(local, why) : 0;
    return r < 0 ? r : server_ensure(local, why);
}

/* Under start.lock. A lock that is converted is given up first, which is as well: nobody gets it before us. */
static void user_leave(struct local *local)
{
    if (local->is_user && flock(local->users_fd, LOCK_EX | LOCK_NB) == 0)
        server_stop(local->dir, local->socket);
    local->is_user = false;
}

static void free_memory(struct local *local)
{
    if (local->users_fd >= 0)
        close(local->users_fd);
    free(local->dir);
    free(local->socket);
    free(local->key);
    free(local);
}

static int enter(struct local *local, bool make_key, struct why why)
{
    int r = dir_prepare(local->dir, why);
    if (r < 0)
        return r;
    CLEANUP(closep) int start_fd = start_lock(local->dir, LOCK_WAIT_MS, false);
    if (start_fd == -ETIMEDOUT)
        return fail(why, start_fd,
                    "local:%s: another sessionfs is starting or stopping its server, and does not get done: "
                    "see fuser %s/start.lock",
                    local->dir, local->dir);
    if (start_fd < 0)
        return fail(why, start_fd, "local:%s: start.lock cannot be taken: %s", local->dir, strerrordesc_np(-start_fd));
    r = user_enter(local, make_key, why);
    if (r < 0)
        user_leave(local);
    return r;
}

int local_new(struct local **ret, const char *dir, bool make_key, char *why_text, size_t why_size)
{
    struct why why = {why_text, why_size};
    struct local *local = calloc(1, sizeof(*local));

    if (!local)
        return fail(why, -ENOMEM, "out of memory");
    *local = (struct local){
        .dir = strdup(dir),
        .socket = path_join(dir, "redis.sock"),
        .key = path_join(dir, "key"),
        .users_fd = -1,
        .restart_pause_ms = RESTART_PAUSE_MS,
    };
    size_t most = sizeof(((struct sockaddr_un *)0)->sun_path) - 1;
    int r;
    if (!local->dir || !local->socket || !local->key)
        r = fail(why, -ENOMEM, "out of memory");
    else if (strlen(local->socket) > most)
        r = fail(why, -ENAMETOOLONG,
                 "local:%s: the path of its socket would have %zu bytes, a unix socket's has %zu at most: choose a "
                 "shorter DIR",
                 dir, strlen(local->socket), most);
    else
        r = enter(local, make_key, why);
    if (r < 0) {
        free_memory(local);
        return r;
    }
    *ret = local;
    return 0;
}

const char *local_socket(const struct local *local)
{
    return local->socket;
}

const char *local_key(const struct local *local)
{
    return local->key;
}

void local_check(struct local *local)
{
    char text[512];
    int lock_fd;

    if (clock_now_ms() < local->restart_at_ms || server_is_alive(local->dir, &lock_fd) != 0)
        return;
    close(lock_fd);
    CLEANUP(closep) int start_fd = start_lock(local->dir, 0, false);
    if (start_fd < 0 || server_is_alive(local->dir, &lock_fd) != 0) /* another instance does it, or has done it */
        return;
    log_warning(0, "local:%s: redis-server has died: starting it again", local->dir);
    if (server_start(local->dir, lock_fd, (struct why){text, sizeof(text)}) < 0)
        log_error(0, "%s", text);
    close(lock_fd);
    local->restart_at_ms = clock_now_ms() + local->restart_pause_ms;
    if (local->restart_pause_ms < RESTART_PAUSE_MAX_MS)
        local->restart_pause_ms *= 2;
}

void local_free(struct local *local)
{
    if (!local)
        return;
    CLEANUP(closep) int start_fd = start_lock(local->dir, LOCK_WAIT_MS, true);
    if (start_fd >= 0)
        user_leave(local);
    else
        log_error(start_fd, "local:%s: start.lock cannot be taken, redis-server stays", local->dir);
    free_memory(local);
}
