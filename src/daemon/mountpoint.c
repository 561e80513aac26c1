#include "daemon/mountpoint.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/statfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/macros.h"

#define FUSERMOUNT "/usr/bin/fusermount3"
#define FUSE_CONF  "/etc/fuse.conf"
#define ANSWER_MS  2000 /* how long a mount that is there already may take to answer */

static int fail(char *why, size_t why_size, int r, const char *format, ...) __attribute__((format(printf, 4, 5)));
static int fail(char *why, size_t why_size, int r, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(why, why_size, format, args);
    va_end(args);
    return r;
}

/* "\040" is how mountinfo writes a space. In place. */
static void unescape(char *text)
{
    char *out = text;

    for (; *text; text++) {
        unsigned byte;
        if (*text == '\\' && sscanf(text + 1, "%3o", &byte) == 1 && byte < 256) {
            *out++ = (char)byte;
            text += 3;
        } else {
            *out++ = *text;
        }
    }
    *out = '\0';
}

bool mountpoint_is_mount(const char *path)
{
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    CLEANUP(freep) char *line = NULL;
    size_t room = 0;
    bool is_found = false;

    if (!mounts)
        return false;
    while (!is_found && getline(&line, &room, mounts) > 0) {
        char *fields = line, *field = NULL;
        for (int i = 0; i < 5; i++) /* id, parent, device, root, mount point */
            field = strsep(&fields, " ");
        if (!field)
            continue;
        unescape(field);
        is_found = strcmp(field, path) == 0;
    }
    fclose(mounts);
    return is_found;
}

/* What stat() said about a directory that nobody can use. */
static int explain(const char *path, int error, char *why, size_t why_size)
{
    switch (error) {
    case ENOENT:
        return fail(why, why_size, -error, "mountpoint %s does not exist: make it with mkdir -p", path);
    case ENOTCONN:
    case ECONNABORTED:
        return fail(why, why_size, -error,
                    "mountpoint %s is a dead mount, its daemon is gone (Transport endpoint is not connected): "
                    "fusermount3 -u %s, then try again",
                    path, path);
    case EACCES:
        return fail(why, why_size, -error,
                    "mountpoint %s: permission denied: choose a directory of your own, or make its path accessible",
                    path);
    case ENOTDIR:
        return fail(why, why_size, -error, "mountpoint %s is not a directory: choose an empty directory", path);
    default:
        return fail(why, why_size, -error, "mountpoint %s cannot be used: %s", path, strerrordesc_np(error));
    }
}

static int check_is_empty(const char *path, char *why, size_t why_size)
{
    DIR *dir = opendir(path);
    const struct dirent *entry;
    bool is_empty = true;

    if (!dir)
        return explain(path, errno, why, why_size);
    while (is_empty && (entry = readdir(dir)))
        is_empty = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0;
    closedir(dir);
    if (!is_empty)
        return fail(why, why_size, -ENOTEMPTY,
                    "mountpoint %s is not empty, the mount would hide what is in it: choose an empty directory", path);
    return 0;
}

/* A process that asks; its exit status is the errno of statfs(). */
static pid_t probe(const char *path)
{
    pid_t pid = fork();

    if (pid != 0)
        return pid;
    struct statfs answer;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    _exit(statfs(path, &answer) == 0 ? 0 : errno);
}

/* Wait for the end of a child; false if it had to be killed. */
static bool reap(pid_t pid, unsigned wait_ms, int *status)
{
    uint64_t deadline = clock_now_ms() + wait_ms;

    for (;;) {
        pid_t r = waitpid(pid, status, WNOHANG);
        if (r == pid)
            return true;
        if (r < 0 && errno != EINTR)
            return false;
        if (clock_now_ms() >= deadline)
            break;
        poll(NULL, 0, 1);
    }
    kill(pid, SIGKILL);
    while (waitpid(pid, status, 0) < 0 && errno == EINTR)
        ;
    return false;
}

/* statfs(): 0, its errno, or -ETIMEDOUT. */
static int ask(const char *path, unsigned wait_ms)
{
    pid_t pid = probe(path);
    int status = 0;

    if (pid < 0)
        return -errno;
    if (!reap(pid, wait_ms, &status) || !WIFEXITED(status))
        return -ETIMEDOUT;
    return -WEXITSTATUS(status);
}

bool mountpoint_answers(const char *path, unsigned wait_ms)
{
    return ask(path, wait_ms) == 0;
}

static int check_mount(const char *path, char *why, size_t why_size)
{
    int r = ask(path, ANSWER_MS);

    if (r == -ENOTCONN || r == -ECONNABORTED)
        return explain(path, -r, why, why_size);
    if (r == -ETIMEDOUT)
        return fail(why, why_size, r,
                    "mountpoint %s is busy, a mount that does not answer: umount -l %s, then try again", path, path);
    return fail(why, why_size, -EBUSY,
                "mountpoint %s is busy, something is mounted there: umount %s first, or choose another directory", path,
                path);
}

int mountpoint_check(const char *given, char **ret, struct stat *st, char *why, size_t why_size)
{
    CLEANUP(freep) char *path = realpath(given, NULL);

    if (!path)
        return explain(given, errno, why, why_size);
    if (mountpoint_is_mount(path))
        return check_mount(path, why, why_size);
    if (stat(path, st) < 0)
        return explain(path, errno, why, why_size);
    if (!S_ISDIR(st->st_mode))
        return explain(path, ENOTDIR, why, why_size);
    int r = check_is_empty(path, why, why_size);
    if (r < 0)
        return r;
    if (geteuid() != 0 && access(path, W_OK) < 0)
        return fail(
            why, why_size, -EACCES,
            "mountpoint %s: you may not write there, so you may not mount there: choose a directory of your own", path);
    *ret = TAKE(path);
    return 0;
}

static bool user_allow_other_is_set(void)
{
    FILE *conf = fopen(FUSE_CONF, "re");
    char line[256];
    bool is_set = false;

    if (!conf)
        return false;
    while (!is_set && fgets(line, sizeof(line), conf)) {
        line[strcspn(line, " \t\r\n#")] = '\0';
        is_set = strcmp(line, "user_allow_other") == 0;
    }
    fclose(conf);
    return is_set;
}

static bool has_option(const char *options, const char *name)
{
    size_t n = strlen(name);

    for (const char *at = options; *at; at += strcspn(at, ",")) {
        at += *at == ',';
        if (strncmp(at, name, n) == 0 && (at[n] == ',' || !at[n]))
            return true;
    }
    return false;
}

int mountpoint_fuse_check(const char *fuse_options, char *why, size_t why_size)
{
    CLEANUP(closep) int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);

    if (fd < 0 && (errno == ENOENT || errno == ENODEV || errno == ENXIO))
        return fail(
            why, why_size, -errno,
            "/dev/fuse is missing: load the kernel's module with modprobe fuse (a container: --device /dev/fuse "
            "--cap-add SYS_ADMIN)");
    if (fd < 0)
        return fail(why, why_size, -errno, "/dev/fuse cannot be opened: %s: chmod 666 /dev/fuse, or run it as root%s",
                    strerrordesc_np(errno), errno == EPERM ? " (a container: --device /dev/fuse)" : "");
    if (prctl(PR_CAPBSET_READ, CAP_SYS_ADMIN) == 0)
        return fail(why, why_size, -EPERM,
                    "nothing may be mounted here: CAP_SYS_ADMIN is missing (a container: --cap-add SYS_ADMIN --device "
                    "/dev/fuse)");
    if (geteuid() == 0)
        return 0;
    if (access(FUSERMOUNT, X_OK) < 0)
        return fail(why, why_size, -errno, FUSERMOUNT " cannot be run: %s: apt-get install fuse3, or run it as root",
                    strerrordesc_np(errno));
    if ((has_option(fuse_options, "allow_other") || has_option(fuse_options, "allow_root")) &&
        !user_allow_other_is_set())
        return fail(why, why_size, -EPERM,
                    "option allow_other: only root may use it, unless " FUSE_CONF
                    " has the line user_allow_other: add it");
    return 0;
}

void mountpoint_detach(const char *path)
{
    char *argv[] = {(char *)"fusermount3", (char *)"-u", (char *)"-q", (char *)"-z", (char *)path, NULL};
    int status;
    pid_t pid;

    if (!mountpoint_is_mount(path) || umount2(path, MNT_DETACH) == 0)
        return;
    if (posix_spawnp(&pid, "fusermount3", NULL, NULL, argv, environ) == 0)
        reap(pid, 5000, &status);
}
