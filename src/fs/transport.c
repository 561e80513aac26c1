/*
 * The descriptor of /dev/fuse: requests in, replies out. libfuse is the codec between.
 *
 * Writing passes through transport_writev(), which patches the reply to INIT: FUSE_HANDLE_KILLPRIV_V2 spares the
 * kernel's question for security.capability before each write, and libfuse does not offer it. Clearing suid and sgid is
 * ours then; the request bits which say when are read here, because libfuse drops them.
 */
#include "fs/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fuse.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/macros.h"

static __thread struct fs_raw raw;

const struct fs_raw *fs_raw(void)
{
    return &raw;
}

/*
 * Threads that may sleep in the kernel until a request of this mount is answered must not keep the connection alive: if
 * the daemon is killed just then, the kernel ends the requests that a worker had read when the workers' descriptor is
 * closed for good (and the guardian those that none had), and that is what such a thread waits for. So it has a table
 * of descriptors of its own, with only a clone of the device.
 */
static __thread int own_fd = -1;

static void close_between(int from, int to)
{
    if (from <= to)
        close_range((unsigned)from, (unsigned)to, 0);
}

void transport_close_others(int keep, int keep_too)
{
    int low = keep < keep_too ? keep : keep_too, high = keep < keep_too ? keep_too : keep;

    close_between(3, low - 1);
    close_between(low + 1, high - 1);
    close_between(high + 1, INT_MAX);
}

void transport_detach(int keep, int keep_too)
{
    if (unshare(CLONE_FILES) < 0)
        log_warning(-errno, "fs: a thread shares its descriptors: if this process is killed, programs may hang");
    else
        transport_close_others(keep, keep_too);
}

int transport_clone(int fuse_fd)
{
    uint32_t master = (uint32_t)fuse_fd;
    int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);

    if (fd >= 0 && ioctl(fd, FUSE_DEV_IOC_CLONE, &master) < 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

void transport_detach_writer(struct fs *fs)
{
    int fd = transport_clone(fs->fd);

    if (fd < 0) {
        log_debug("fs: /dev/fuse cannot be opened again: notifications use the workers' descriptor");
        return;
    }
    transport_detach(fd, fd);
    own_fd = fd;
}

static void patch_init(struct fs *fs, struct iovec *iov, int count)
{
    const struct fuse_out_header *out = iov[0].iov_base;

    if (count < 2 || out->error || iov[1].iov_len < offsetof(struct fuse_init_out, max_background))
        return;
    struct fuse_init_out *init = iov[1].iov_base;
    init->flags &= ~(uint32_t)FUSE_HANDLE_KILLPRIV;
    init->flags |= fs->kernel_flags & FUSE_HANDLE_KILLPRIV_V2;
    atomic_store(&fs->is_agreed, true);
}

/*
 * A reply happens before the next request which the kernel sends because of it. ThreadSanitizer does not see that
 * order, as it goes through the kernel: show it.
 */
#ifdef __SANITIZE_THREAD__
static _Atomic uint64_t kernel_order;

static void before_reply(void)
{
    atomic_fetch_add_explicit(&kernel_order, 1, memory_order_acq_rel);
}

static void after_request(void)
{
    atomic_load_explicit(&kernel_order, memory_order_acquire);
}
#else
static void before_reply(void)
{
}

static void after_request(void)
{
}
#endif

static void wake_main(struct fs *fs)
{
    uint64_t one = 1;

    if (write(fs->event_fd, &one, sizeof(one)) < 0)
        log_debug("fs: the main thread is awake already");
}

static ssize_t transport_writev(int fd, struct iovec *iov, int count, void *userdata)
{
    struct fs *fs = userdata;
    const struct fuse_out_header *out = iov[0].iov_base;
    bool is_init = out->unique && out->unique == atomic_load(&fs->init_unique);

    if (is_init)
        patch_init(fs, iov, count);
    before_reply();
    ssize_t n = writev(own_fd >= 0 ? own_fd : fs->fd, iov, count);
    if (is_init) {
        atomic_store(&fs->init_unique, 0);
        wake_main(fs);
    }
    return n;
}

static ssize_t transport_read(int fd, void *buffer, size_t size, void *userdata)
{
    return read(fd, buffer, size);
}

int transport_hook(struct fs *fs)
{
    static const struct fuse_custom_io io = {.writev = transport_writev, .read = transport_read};

    /* libfuse closes its descriptor when it unmounts; ours lives until nobody replies any more */
    fs->fd = fcntl(fuse_session_fd(fs->se), F_DUPFD_CLOEXEC, 0);
    return fs->fd < 0 ? -errno : fuse_session_custom_io(fs->se, &io, fuse_session_fd(fs->se));
}

static void look_at(struct fs *fs, const char *buffer, size_t size)
{
    const struct fuse_in_header *in = (const void *)buffer;
    const char *body = buffer + sizeof(*in);
    size_t rest = size - sizeof(*in);

    raw = (struct fs_raw){.opcode = in->opcode};
    atomic_fetch_add_explicit(&fs->by_opcode[in->opcode & 63], 1, memory_order_relaxed);
    if (in->opcode == FUSE_WRITE && rest >= sizeof(struct fuse_write_in))
        raw.write_flags = ((const struct fuse_write_in *)body)->write_flags;
    if (in->opcode == FUSE_SETATTR && rest >= sizeof(struct fuse_setattr_in))
        raw.setattr_valid = ((const struct fuse_setattr_in *)body)->valid;
    if (in->opcode == FUSE_INIT && rest >= 16) {
        fs->kernel_flags = ((const struct fuse_init_in *)body)->flags;
        atomic_store(&fs->init_unique, in->unique);
    }
}

static void serve(struct fs *fs, char *buffer, size_t room)
{

    while (!atomic_load(&fs->is_stopping)) {
        ssize_t n = read(fs->fd, buffer, room);
        if (n < 0 && (errno == EINTR || errno == EAGAIN || errno == ENOENT))
            continue;
        if (n < 0 && errno != ENODEV)
            log_error(-errno, "fs: reading from /dev/fuse failed");
        if (n < (ssize_t)sizeof(struct fuse_in_header))
            return;
        after_request();
        look_at(fs, buffer, (size_t)n);
        struct fuse_buf buf = {.mem = buffer, .size = (size_t)n};
        fuse_session_process_buf(fs->se, &buf);
    }
}

static void *worker_thread(void *arg)
{
    struct worker *worker = arg;
    struct fs *fs = worker->fs;
    size_t room = FS_BUFFER_SIZE;
    char *buffer = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (buffer == MAP_FAILED) {
        log_error(-errno, "fs: no memory for a worker");
    } else {
        madvise(buffer, room, MADV_DONTDUMP);
        serve(fs, buffer, room);
        explicit_bzero(buffer, room);
        munmap(buffer, room);
    }
    atomic_store(&worker->has_ended, true);
    atomic_store(&fs->is_stopping, true);
    wake_main(fs);
    return NULL;
}

/* Does nothing, but for interrupting a read. */
static void on_signal(int signal_number)
{
}

int transport_start(struct fs *fs)
{
    struct sigaction action = {.sa_handler = on_signal};

    sigaction(SIGUSR1, &action, NULL);
    for (unsigned i = 0; i < fs->n_workers; i++) {
        struct worker *worker = &fs->workers[i];
        worker->fs = fs;
        int r = pthread_create(&worker->thread, NULL, worker_thread, worker);
        if (r)
            return -r;
        worker->has_thread = true;
    }
    return 0;
}

/* A worker may sleep in read(): wake it until it has seen that it is over. */
static void end_worker(struct worker *worker)
{
    struct timespec pause = {.tv_nsec = 5000000};

    while (!atomic_load(&worker->has_ended)) {
        pthread_kill(worker->thread, SIGUSR1);
        nanosleep(&pause, NULL);
    }
    pthread_join(worker->thread, NULL);
    worker->has_thread = false;
}

void transport_stop(struct fs *fs)
{
    atomic_store(&fs->is_stopping, true);
    for (unsigned i = 0; i < fs->n_workers; i++)
        if (fs->workers[i].has_thread)
            end_worker(&fs->workers[i]);
}
