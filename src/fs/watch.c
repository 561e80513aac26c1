/*
 * Who closes? Without open and flush requests only inotify tells: IN_CLOSE_WRITE on the mount's directories.
 *
 * Two threads. The adder looks up paths on our own mount, which the workers serve; it holds no descriptor of the mount
 * and runs nothing of the store (transport_detach()). The watcher reads events, and a worker that is about to change a
 * content reads what is queued already, so that a close is never taken for one of the save after it.
 */
#include "fs/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/log.h"
#include "base/macros.h"

#define PATH_ROOM     4096u
#define TRIES         5
#define READ_AHEAD_KB "2048"

/* A directory to be watched: from whoever asks to the adder, and from there with its result to the watcher. */
struct request {
    struct request *next;
    struct session *dir; /* with a reference of the kernel's */
    int n_tries, result; /* a watch descriptor or a negative errno */
    char path[];
};

struct watcher {
    struct fs *fs;
    pthread_t thread, adder;
    bool has_thread, has_adder;
    _Atomic bool is_stopping;
    int inotify_fd, event_fd;

    pthread_mutex_t lock;
    pthread_cond_t wanted_more;
    /* guarded by lock */
    struct request *wanted, *added;
    bool sets_read_ahead;

    pthread_mutex_t read_lock; /* whoever reads events, until they are handled */
    struct session **dirs;     /* read_lock; by watch descriptor; each with a reference of the kernel's */
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

static void handle_event(struct watcher *watcher, const struct inotify_event *event, struct commit **batch)
{
    struct store *store = watcher->fs->store;

    if (event->mask & IN_Q_OVERFLOW) {
        store_closed(store, NULL, NULL, 0, batch);
        return;
    }
    struct session *dir = event->wd >= 0 && (size_t)event->wd < watcher->n_dirs ? watcher->dirs[event->wd] : NULL;
    if (!dir)
        return;
    if (event->mask & IN_IGNORED)
        set_dir(watcher, event->wd, NULL);
    else if ((event->mask & IN_CLOSE_WRITE) && event->len)
        store_closed(store, dir, event->name, strlen(event->name), batch);
}

static void read_events(struct watcher *watcher)
{
    char buffer[16384] __attribute__((aligned(8)));
    struct commit *batch = NULL; /* sealed and sent when others may read again */
    ssize_t n;

    pthread_mutex_lock(&watcher->read_lock);
    while ((n = read(watcher->inotify_fd, buffer, sizeof(buffer))) > 0) {
        const char *p = buffer;
        while (p < buffer + n) {
            const struct inotify_event *event = (const void *)p;
            handle_event(watcher, event, &batch);
            p += sizeof(*event) + event->len;
        }
        if ((size_t)n < sizeof(buffer) / 2)
            break;
    }
    pthread_mutex_unlock(&watcher->read_lock);
    store_send(watcher->fs->store, batch);
}

void watch_settle(void *arg)
{
    struct fs *fs = arg;

    read_events(fs->watcher);
}

static void wake(struct watcher *watcher)
{
    uint64_t one = 1;

    if (write(watcher->event_fd, &one, sizeof(one)) < 0)
        log_debug("fs: the watcher is awake already");
}

/* ---- the adder ---- */

static void want(struct watcher *watcher, struct session *dir, int n_tries)
{
    struct fs *fs = watcher->fs;
    size_t base = strlen(fs->mountpoint);
    struct request *request = calloc(1, sizeof(*request) + PATH_ROOM);

    if (!request)
        abort();
    store_remember(fs->store, dir, 1);
    request->dir = dir;
    request->n_tries = n_tries;
    memcpy(request->path, fs->mountpoint, base + 1);
    request->result = store_path(fs->store, dir, request->path + base, PATH_ROOM - base);
    pthread_mutex_lock(&watcher->lock);
    bool is_stopping = atomic_load(&watcher->is_stopping);
    if (!is_stopping) {
        request->next = watcher->wanted;
        watcher->wanted = request;
        pthread_cond_signal(&watcher->wanted_more);
    }
    pthread_mutex_unlock(&watcher->lock);
    if (is_stopping) {
        store_watched(fs->store, dir, false);
        store_forget(fs->store, dir, 1);
        free(request);
    }
}

void watch_add(void *arg, struct session *dir)
{
    want(((struct fs *)arg)->watcher, dir, 1);
}

/* Larger read-ahead makes fewer and larger requests of a cold read; who may not set it lives with the default. */
static void raise_read_ahead(const struct fs *fs)
{
    struct stat st;
    char path[96];

    if (stat(fs->mountpoint, &st) < 0)
        return;
    snprintf(path, sizeof(path), "/sys/class/bdi/%u:%u/read_ahead_kb", major(st.st_dev), minor(st.st_dev));
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    ssize_t n = write(fd, READ_AHEAD_KB, strlen(READ_AHEAD_KB));
    (void)n; /* it stays as it is */
    close(fd);
}

void watch_ready(struct fs *fs)
{
    struct watcher *watcher = fs->watcher;

    pthread_mutex_lock(&watcher->lock);
    watcher->sets_read_ahead = true;
    pthread_cond_signal(&watcher->wanted_more);
    pthread_mutex_unlock(&watcher->lock);
}

static void *adder_thread(void *arg)
{
    struct watcher *watcher = arg;

    transport_detach(watcher->inotify_fd, watcher->event_fd);
    pthread_mutex_lock(&watcher->lock);
    while (!atomic_load(&watcher->is_stopping)) {
        struct request *request = watcher->wanted;
        bool sets_read_ahead = watcher->sets_read_ahead;
        if (!request && !sets_read_ahead) {
            pthread_cond_wait(&watcher->wanted_more, &watcher->lock);
            continue;
        }
        watcher->sets_read_ahead = false;
        if (request)
            watcher->wanted = request->next;
        pthread_mutex_unlock(&watcher->lock);
        if (sets_read_ahead)
            raise_read_ahead(watcher->fs);
        if (request && request->result == 0) {
            int wd = inotify_add_watch(watcher->inotify_fd, request->path, IN_CLOSE_WRITE | IN_ONLYDIR);
            request->result = wd < 0 ? -errno : wd;
        }
        pthread_mutex_lock(&watcher->lock);
        if (request) {
            request->next = watcher->added;
            watcher->added = request;
            wake(watcher);
        }
    }
    pthread_mutex_unlock(&watcher->lock);
    return NULL;
}
/* ---- the watcher ---- */

static void settle_request(struct watcher *watcher, struct request *request)
{
    struct fs *fs = watcher->fs;
    int r = request->result;

    if (r == -ENOENT && request->n_tries < TRIES) { /* renamed meanwhile? */
        want(watcher, request->dir, request->n_tries + 1);
        return;
    }
    if (r >= 0) {
        /* Events that were read meanwhile matter to nobody: writes in this directory wait for store_watched(). */
        pthread_mutex_lock(&watcher->read_lock);
        store_remember(fs->store, request->dir, 1);
        set_dir(watcher, r, request->dir);
        pthread_mutex_unlock(&watcher->read_lock);
    } else {
        log_warning(r, "fs: a directory cannot be watched (fs.inotify.max_user_watches?); "
                       "saves of several writes in it reach Redis late");
    }
    store_watched(fs->store, request->dir, r >= 0);
}

static struct request *take_requests(struct watcher *watcher, struct request **list)
{
    pthread_mutex_lock(&watcher->lock);
    struct request *requests = *list;
    *list = NULL;
    pthread_mutex_unlock(&watcher->lock);
    return requests;
}

static void free_request(struct watcher *watcher, struct request *request)
{
    store_forget(watcher->fs->store, request->dir, 1);
    free(request);
}

static void settle_requests(struct watcher *watcher)
{
    struct request *requests = take_requests(watcher, &watcher->added);

    while (requests) {
        struct request *request = requests;
        requests = request->next;
        settle_request(watcher, request);
        free_request(watcher, request);
    }
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
        settle_requests(watcher);
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
    pthread_cond_init(&watcher->wanted_more, NULL);
    pthread_mutex_init(&watcher->read_lock, NULL);
    watcher->inotify_fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    watcher->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (watcher->inotify_fd < 0 || watcher->event_fd < 0)
        return -errno;
    int r = pthread_create(&watcher->thread, NULL, watcher_thread, watcher);
    watcher->has_thread = r == 0;
    if (r == 0) {
        r = pthread_create(&watcher->adder, NULL, adder_thread, watcher);
        watcher->has_adder = r == 0;
    }
    return -r;
}

static void drop_requests(struct watcher *watcher, struct request **list)
{
    struct request *requests = take_requests(watcher, list);

    while (requests) {
        struct request *request = requests;
        requests = request->next;
        store_watched(watcher->fs->store, request->dir, false);
        free_request(watcher, request);
    }
}

/* While the workers still serve: the adder may be in the middle of a look-up. */
void watch_stop(struct fs *fs)
{
    struct watcher *watcher = fs->watcher;

    if (!watcher)
        return;
    pthread_mutex_lock(&watcher->lock);
    atomic_store(&watcher->is_stopping, true);
    pthread_cond_signal(&watcher->wanted_more);
    pthread_mutex_unlock(&watcher->lock);
    wake(watcher);
    if (watcher->has_adder)
        pthread_join(watcher->adder, NULL);
    if (watcher->has_thread)
        pthread_join(watcher->thread, NULL);
    watcher->has_adder = watcher->has_thread = false;
    drop_requests(watcher, &watcher->wanted);
    drop_requests(watcher, &watcher->added);
}

/* After the workers have ended, which settle. */
void watch_free(struct fs *fs)
{
    struct watcher *watcher = TAKE(fs->watcher);

    if (!watcher)
        return;
    drop_requests(watcher, &watcher->wanted);
    closep(&watcher->inotify_fd);
    closep(&watcher->event_fd);
    for (size_t i = 0; i < watcher->n_dirs; i++)
        if (watcher->dirs[i])
            store_forget(fs->store, watcher->dirs[i], 1);
    free(watcher->dirs);
    pthread_cond_destroy(&watcher->wanted_more);
    pthread_mutex_destroy(&watcher->lock);
    pthread_mutex_destroy(&watcher->read_lock);
    free(watcher);
}
