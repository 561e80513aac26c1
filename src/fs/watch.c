/*
 * Who closes? Without open and flush requests only inotify tells: IN_CLOSE_WRITE on the mount's directories. The thread here
 * adds watches (a path look-up on our own mount, which the workers serve) and reads events; a worker that is about
 * to change a content reads what is queued already, so that a close is never taken for one of the save after it.
 */
#include "fs/internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <unistd.h>

#include "base/log.h"
#include "base/macros.h"

#define PATH_ROOM 4096u

struct request {
    struct request *next;
    struct session *dir; /* with a reference of the kernel's */
};

struct watcher {
    struct fs *fs;
    pthread_t thread;
    bool has_thread;
    _Atomic bool is_stopping;
    int inotify_fd, event_fd;

    pthread_mutex_t lock;
    struct request *requests;    /* lock */

    pthread_mutex_t read_lock;   /* whoever reads events, until they are handled */
    struct session **dirs;       /* read_lock; by watch descriptor; each with a reference of the kernel's */
    size_t n_dirs;
};

static void set_dir(struct watcher *watcher, int wd, struct session *dir)
{
    size_t at = (size_t)wd;

    if (at >= watcher->n_dirs) {
        size_t n = at * 2 + 16;
        struct session **dirs = realloc(watcher->dirs, n * sizeof(*dirs));
        if (!dirs)
            abort();
        memset(dirs + watcher->n_dirs, 0, (n - watcher->n_dirs) * sizeof(*dirs));
        watcher->dirs = dirs;
        watcher->n_dirs = n;
    }
    struct session *was = watcher->dirs[at];
    watcher->dirs[at] = dir;
    if (was)
        store_forget(watcher->fs->store, was, 1);
}

static void handle_event(struct watcher *watcher, const struct inotify_event *event)
{
    struct store *store = watcher->fs->store;

    if (event->mask & IN_Q_OVERFLOW) {
        store_closed(store, NULL, NULL, 0);
        return;
    }
    struct session *dir = event->wd >= 0 && (size_t)event->wd < watcher->n_dirs ? watcher->dirs[event->wd] : NULL;
    if (!dir)
        return;
    if (event->mask & IN_IGNORED)
        set_dir(watcher, event->wd, NULL);
    else if ((event->mask & IN_CLOSE_WRITE) && event->len)
        store_closed(store, dir, event->name, strlen(event->name));
}

static void read_events(struct watcher *watcher)
{
    char buffer[16384] __attribute__((aligned(8)));
    ssize_t n;

    pthread_mutex_lock(&watcher->read_lock);
    while ((n = read(watcher->inotify_fd, buffer, sizeof(buffer))) > 0) {
        const char *p = buffer;
        while (p < buffer + n) {
            const struct inotify_event *event = (const void *)p;
            handle_event(watcher, event);
            p += sizeof(*event) + event->len;
        }
        if ((size_t)n < sizeof(buffer) / 2)
            break;
    }
    pthread_mutex_unlock(&watcher->read_lock);
}

void watch_settle(void *arg)
{
    struct fs *fs = arg;

    read_events(fs->watcher);
}

void watch_add(void *arg, struct session *dir)
{
    struct watcher *watcher = ((struct fs *)arg)->watcher;
    struct request *request = calloc(1, sizeof(*request));
    uint64_t one = 1;

    if (!request)
        abort();
    store_remember(watcher->fs->store, dir, 1);
    request->dir = dir;
    pthread_mutex_lock(&watcher->lock);
    request->next = watcher->requests;
    watcher->requests = request;
    pthread_mutex_unlock(&watcher->lock);
    if (write(watcher->event_fd, &one, sizeof(one)) < 0)
        log_debug("fs: the watcher is awake already");
}

/* On failure closes in it are not heard of: what needs one is saved after a pause instead. */
static void add(struct watcher *watcher, struct session *dir)
{
    struct fs *fs = watcher->fs;
    char path[PATH_ROOM];
    size_t base = strlen(fs->mountpoint);
    int wd = -1;

    memcpy(path, fs->mountpoint, base + 1);
    int r = store_path(fs->store, dir, path + base, sizeof(path) - base);
    /* No lock here: the look-up may need a worker, and a worker may be waiting for read_lock. */
    if (r == 0) {
        wd = inotify_add_watch(watcher->inotify_fd, path, IN_CLOSE_WRITE | IN_ONLYDIR);
        r = wd < 0 ? -errno : 0;
    }
    if (wd >= 0) {
        /* Events that were read meanwhile matter to nobody: writes in this directory wait for store_watched(). */
        pthread_mutex_lock(&watcher->read_lock);
        store_remember(fs->store, dir, 1);
        set_dir(watcher, wd, dir);
        pthread_mutex_unlock(&watcher->read_lock);
    }
    if (r < 0)
        log_warning(r, "fs: a directory cannot be watched (fs.inotify.max_user_watches?); "
                       "saves of several writes in it reach Redis late");
    store_watched(fs->store, dir, r == 0);
    store_forget(fs->store, dir, 1);
}

static struct request *take_request(struct watcher *watcher)
{
    pthread_mutex_lock(&watcher->lock);
    struct request *request = watcher->requests;
    if (request)
        watcher->requests = request->next;
    pthread_mutex_unlock(&watcher->lock);
    return request;
}

static void *watcher_thread(void *arg)
{
    struct watcher *watcher = arg;
    struct pollfd fds[] = {{.fd = watcher->inotify_fd, .events = POLLIN}, {.fd = watcher->event_fd, .events = POLLIN}};

    while (!atomic_load(&watcher->is_stopping)) {
        uint64_t n;
        if (poll(fds, ARRAY_SIZE(fds), -1) < 0 && errno != EINTR)
            break;
        if ((fds[1].revents & POLLIN) && read(watcher->event_fd, &n, sizeof(n)) < 0)
            continue;
        struct request *request;
        while (!atomic_load(&watcher->is_stopping) && (request = take_request(watcher))) {
            add(watcher, request->dir);
            free(request);
        }
        if (fds[0].revents & POLLIN)
            read_events(watcher);
    }
    return NULL;
}

int watch_start(struct fs *fs)
{
    struct watcher *watcher = calloc(1, sizeof(*watcher));

    if (!watcher)
        return -ENOMEM;
    fs->watcher = watcher;
    watcher->fs = fs;
    pthread_mutex_init(&watcher->lock, NULL);
    pthread_mutex_init(&watcher->read_lock, NULL);
    watcher->inotify_fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    watcher->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (watcher->inotify_fd < 0 || watcher->event_fd < 0)
        return -errno;
    int r = pthread_create(&watcher->thread, NULL, watcher_thread, watcher);
    watcher->has_thread = r == 0;
    return -r;
}

void watch_stop(struct fs *fs)
{
    struct watcher *watcher = TAKE(fs->watcher);
    uint64_t one = 1;

    if (!watcher)
        return;
    atomic_store(&watcher->is_stopping, true);
    if (watcher->has_thread) {
        if (write(watcher->event_fd, &one, sizeof(one)) < 0)
            log_debug("fs: the watcher is awake already");
        pthread_join(watcher->thread, NULL);
    }
    closep(&watcher->inotify_fd);
    closep(&watcher->event_fd);
    for (struct request *request; (request = take_request(watcher));) {
        store_watched(fs->store, request->dir, false);
        store_forget(fs->store, request->dir, 1);
        free(request);
    }
    for (size_t i = 0; i < watcher->n_dirs; i++)
        if (watcher->dirs[i])
            store_forget(fs->store, watcher->dirs[i], 1);
    free(watcher->dirs);
    pthread_mutex_destroy(&watcher->lock);
    pthread_mutex_destroy(&watcher->read_lock);
    free(watcher);
}
