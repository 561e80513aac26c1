/* The mount: begin and end. */
#include <sessionfs/fs.h>

#include <errno.h>
#include <linux/fuse.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/macros.h"
#include "fs/internal.h"

#define CALLS_MS 10000u

/* libfuse reports to its log only; the last line is the reason. */
static pthread_mutex_t why_lock = PTHREAD_MUTEX_INITIALIZER;
static char last_line[256];

static void on_fuse_log(enum fuse_log_level level, const char *format, va_list args)
{
    char line[sizeof(last_line)];

    vsnprintf(line, sizeof(line), format, args);
    line[strcspn(line, "\n")] = 0;
    pthread_mutex_lock(&why_lock);
    if (level <= FUSE_LOG_WARNING && line[0])
        memcpy(last_line, line, sizeof(line));
    pthread_mutex_unlock(&why_lock);
    log_debug("fuse: %s", line);
}

static void explain(char *why, size_t size, const char *what)
{
    pthread_mutex_lock(&why_lock);
    snprintf(why, size, "%s%s%s", what, last_line[0] ? ": " : "", last_line);
    pthread_mutex_unlock(&why_lock);
}

/* A comma or backslash in a name would end the mount option. */
static void escape(char *out, size_t size, const char *text)
{
    size_t n = 0;

    for (; *text && n + 2 < size; text++) {
        if (*text == ',' || *text == '\\')
            out[n++] = '\\';
        out[n++] = *text;
    }
    out[n] = 0;
}

static struct fuse_session *new_session(struct fs *fs)
{
    char name[256], options[2048];

    escape(name, sizeof(name), fs->config.fsname);
    snprintf(options, sizeof(options), "default_permissions,subtype=sessionfs,fsname=%s%s%s", name,
             fs->config.fuse_options[0] ? "," : "", fs->config.fuse_options);
    char *argv[] = {"sessionfs", "-o", options, fs->config.debug ? "-d" : NULL, NULL};
    struct fuse_args args = FUSE_ARGS_INIT(fs->config.debug ? 4 : 3, argv);
    struct fuse_session *se = fuse_session_new(&args, &fs_handlers, sizeof(fs_handlers), fs);
    fuse_opt_free_args(&args);
    return se;
}

static unsigned count_workers(unsigned wanted)
{
    long n = wanted ? (long)wanted : sysconf(_SC_NPROCESSORS_ONLN);

    return (unsigned)(n < 2 ? 2 : n > (long)FS_MAX_WORKERS ? (long)FS_MAX_WORKERS : n);
}

int fs_new(struct fs **ret, const struct fs_config *config, char *why, size_t why_size)
{
    struct fs *fs = calloc(1, sizeof(*fs));
    int r = -ENOMEM;

    if (!fs) {
        snprintf(why, why_size, "out of memory");
        return r;
    }
    fuse_set_log_func(on_fuse_log);
    fs->config = *config;
    fs->store = config->store;
    pthread_mutex_init(&fs->streams_lock, NULL);
    fs->mountpoint = strdup(config->mountpoint);
    fs->n_workers = count_workers(config->n_workers);
    fs->fd = fs->guardian_fd = -1;
    fs->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    fs->se = new_session(fs);
    if (!fs->se) {
        explain(why, why_size, "bad mount option");
        r = -EINVAL;
        goto fail;
    }
    if (fuse_session_mount(fs->se, fs->mountpoint) != 0) {
        explain(why, why_size, "cannot mount");
        r = -EPERM;
        goto fail;
    }
    fs->is_mounted = true;
    r = transport_hook(fs);
    if (r < 0) {
        snprintf(why, why_size, "libfuse does not take our transport: %s", strerror(-r));
        goto fail;
    }
    r = guardian_start(fs);
    if (r < 0) {
        snprintf(why, why_size, "cannot start the guardian process: %s", strerror(-r));
        goto fail;
    }
    *ret = fs;
    return 0;
fail:
    fs_free(fs);
    return r;
}

static void wait_until_over(struct fs *fs, void (*ready)(void *), void *arg)
{
    bool is_ready = false;

    for (;;) {
        struct pollfd pfd = {.fd = fs->event_fd, .events = POLLIN};
        uint64_t n;
        if (poll(&pfd, 1, -1) > 0 && read(fs->event_fd, &n, sizeof(n)) < 0 && errno != EAGAIN)
            return;
        if (atomic_load(&fs->is_stopping) || atomic_load(&fs->is_leaving))
            return;
        if (atomic_load(&fs->is_agreed) && !is_ready) {
            is_ready = true;
            watch_ready(fs);
            ready(arg);
        }
    }
}

static void unmount(struct fs *fs)
{
    if (!fs->is_mounted)
        return;
    fs->is_mounted = false;
    fuse_session_unmount(fs->se);
}

/* Operations that wait for L2 are answered before what they refer to goes: they are bounded by its time-outs. */
static void wait_for_calls(struct fs *fs)
{
    uint64_t until_ms = clock_now_ms() + CALLS_MS;
    struct timespec pause = {.tv_nsec = 1000000};

    while (atomic_load(&fs->n_calls) && clock_now_ms() < until_ms)
        nanosleep(&pause, NULL);
    if (atomic_load(&fs->n_calls))
        log_warning(0, "fs: %llu requests were never answered", (unsigned long long)atomic_load(&fs->n_calls));
}

int fs_run(struct fs *fs, void (*ready)(void *arg), void *arg)
{
    struct store_events events = {
        .owner = fs, .changed = notify_changed, .gone = notify_gone, .watch = watch_add, .settle = watch_settle};

    int r = notify_start(fs);
    if (r == 0)
        r = watch_start(fs);
    if (r == 0) {
        store_set_events(fs->store, &events);
        r = transport_start(fs);
    }
    if (r == 0)
        wait_until_over(fs, ready, arg);
    if (fs->watcher)
        watch_settle(fs);
    watch_stop(fs); /* the workers still answer what this and the unmount make the kernel ask */
    unmount(fs);
    store_set_events(fs->store, NULL);
    notify_stop(fs); /* a notifier may wait for the pages or names of a request that a worker answers */
    transport_stop(fs);
    wait_for_calls(fs);
    watch_free(fs);
    return r;
}

void fs_stop(struct fs *fs)
{
    uint64_t one = 1;

    /* The workers go on until the mount is gone: only fs_run()'s thread is told. */
    atomic_store(&fs->is_leaving, true);
    if (write(fs->event_fd, &one, sizeof(one)) < 0)
        return;
}

void fs_free(struct fs *fs)
{
    if (!fs)
        return;
    unmount(fs);
    if (fs->fd >= 0)
        closep(&fs->fd);
    fs->fd = -1;
    guardian_stop(fs);
    fs_free_streams(fs);
    pthread_mutex_destroy(&fs->streams_lock);
    if (fs->se)
        fuse_session_destroy(fs->se);
    closep(&fs->event_fd);
    free(fs->mountpoint);
    free(fs);
}

void fs_stats(struct fs *fs, struct fs_stats *ret)
{
    *ret = (struct fs_stats){
        .n_inval_inode = atomic_load(&fs->n_inval_inode),
        .n_inval_entry = atomic_load(&fs->n_inval_entry),
    };
    for (unsigned i = 0; i < ARRAY_SIZE(ret->by_opcode); i++) {
        ret->by_opcode[i] = atomic_load(&fs->by_opcode[i]);
        ret->n_requests += ret->by_opcode[i];
    }
}

const char *fs_opcode_name(unsigned opcode)
{
    static const char *const names[] = {
        [FUSE_LOOKUP] = "lookup",
        [FUSE_FORGET] = "forget",
        [FUSE_GETATTR] = "getattr",
        [FUSE_SETATTR] = "setattr",
        [FUSE_SYMLINK] = "symlink",
        [FUSE_MKNOD] = "mknod",
        [FUSE_MKDIR] = "mkdir",
        [FUSE_UNLINK] = "unlink",
        [FUSE_RMDIR] = "rmdir",
        [FUSE_RENAME] = "rename",
        [FUSE_LINK] = "link",
        [FUSE_OPEN] = "open",
        [FUSE_READ] = "read",
        [FUSE_WRITE] = "write",
        [FUSE_STATFS] = "statfs",
        [FUSE_RELEASE] = "release",
        [FUSE_FSYNC] = "fsync",
        [FUSE_SETXATTR] = "setxattr",
        [FUSE_GETXATTR] = "getxattr",
        [FUSE_LISTXATTR] = "listxattr",
        [FUSE_REMOVEXATTR] = "removexattr",
        [FUSE_FLUSH] = "flush",
        [FUSE_INIT] = "init",
        [FUSE_OPENDIR] = "opendir",
        [FUSE_READDIR] = "readdir",
        [FUSE_RELEASEDIR] = "releasedir",
        [FUSE_FSYNCDIR] = "fsyncdir",
        [FUSE_ACCESS] = "access",
        [FUSE_CREATE] = "create",
        [FUSE_INTERRUPT] = "interrupt",
        [FUSE_DESTROY] = "destroy",
        [FUSE_IOCTL] = "ioctl",
        [FUSE_POLL] = "poll",
        [FUSE_BATCH_FORGET] = "batch_forget",
        [FUSE_FALLOCATE] = "fallocate",
        [FUSE_READDIRPLUS] = "readdirplus",
        [FUSE_RENAME2] = "rename2",
        [FUSE_LSEEK] = "lseek",
        [FUSE_COPY_FILE_RANGE] = "copy_file_range",
        [FUSE_SYNCFS] = "syncfs",
    };

    return opcode < ARRAY_SIZE(names) ? names[opcode] : NULL;
}
