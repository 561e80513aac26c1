/*
 * The guardian: a small process that outlives the daemon by a moment.
 *
 * A notifier may sleep in the kernel on a lock whose holder waits for a request that no worker has read yet. If the
 * daemon is killed just then, that sleep keeps the connection alive, and the connection the sleep: neither the daemon
 * nor the program could ever be killed. The guardian learns of the death from a pipe, answers what is queued with
 * ENOTCONN, and goes; then the kernel ends the connection. In the daemon's life it does nothing.
 *
 * It is forked from a process with threads: it calls only what is safe then.
 */
#include "fs/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fuse.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"

#define QUIET_MS     200
#define MAX_REQUESTS 100000

static bool wants_reply(uint32_t opcode)
{
    return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT;
}

static void answer_all(int fuse_fd, char *buffer)
{
    struct pollfd pfd = {.fd = fuse_fd, .events = POLLIN};

    for (int i = 0; i < MAX_REQUESTS && poll(&pfd, 1, QUIET_MS) > 0; i++) {
        ssize_t n = read(fuse_fd, buffer, FS_BUFFER_SIZE);
        if (n < 0 && errno == ENODEV)
            return;
        if (n < (ssize_t)sizeof(struct fuse_in_header))
            continue;
        const struct fuse_in_header *in = (const void *)buffer;
        struct fuse_out_header out = {.len = sizeof(out), .error = -ENOTCONN, .unique = in->unique};
        if (wants_reply(in->opcode) && write(fuse_fd, &out, sizeof(out)) < 0)
            continue; /* nobody waits for it any more */
    }
}

static void guard(int fuse_fd, int pipe_fd)
{
    char byte, *buffer = mmap(NULL, FS_BUFFER_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int null = open("/dev/null", O_RDWR);

    for (int signal_number = 1; signal_number < 32; signal_number++)
        signal(signal_number, SIG_IGN); /* a SIGTERM for the whole group is the daemon's to handle */
    for (int fd = 0; fd < 3 && null >= 0; fd++)
        dup2(null, fd);
    int clone = transport_clone(fuse_fd);
    if (clone >= 0)
        fuse_fd = clone;
    transport_close_others(fuse_fd, pipe_fd);
    while (read(pipe_fd, &byte, 1) < 0 && errno == EINTR)
        ;
    if (buffer != MAP_FAILED)
        answer_all(fuse_fd, buffer);
    _exit(0);
}

int guardian_start(struct fs *fs)
{
    int ends[2];

    if (pipe2(ends, O_CLOEXEC) < 0)
        return -errno;
    fs->guardian = fork();
    if (fs->guardian == 0) {
        close(ends[1]);
        guard(fs->fd, ends[0]);
    }
    close(ends[0]);
    fs->guardian_fd = ends[1];
    return fs->guardian < 0 ? -errno : 0;
}

void guardian_stop(struct fs *fs)
{
    if (fs->guardian_fd >= 0)
        close(fs->guardian_fd);
    fs->guardian_fd = -1;
    if (fs->guardian > 0)
        waitpid(fs->guardian, NULL, 0);
    fs->guardian = 0;
}
