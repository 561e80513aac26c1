#include "daemon/report.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/macros.h"

#define START_WAIT_MS 180000 /* every step of a start is bounded: this is for the impossible */
#define END_WAIT_MS   15000
#define READY         '+'

struct report {
    int fd; /* the parent's end, or the child's; -1 when all is said */
};

static volatile sig_atomic_t child; /* to hand signals on to */

static void hand_on(int number)
{
    if (child > 0)
        kill(child, number);
}

/* Whoever stops the command stops what it is starting; how that ended, the child tells. */
static void hand_signals_on(pid_t pid)
{
    struct sigaction action = {.sa_handler = hand_on, .sa_flags = SA_RESTART};
    sigset_t signals;

    child = pid;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    sigprocmask(SIG_UNBLOCK, &signals, NULL);
}

static void to_null(int fd)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    if (null >= 0 && null != fd) {
        dup2(null, fd);
        close(null);
    }
}

/* Standard error goes to memory until we are ready, as fusermount3 explains itself there. */
static void enter_background(struct report *report)
{
    setsid();
    report->fd = fcntl(report->fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1); /* the caller may have closed 0 to 2 */
    if (report->fd != STDERR_FILENO + 1)
        report->fd = dup3(report->fd, STDERR_FILENO + 1, O_CLOEXEC);
    close_range(STDERR_FILENO + 2, ~0u, 0);
    to_null(STDIN_FILENO);
    to_null(STDOUT_FILENO);
    int memory = memfd_create("sessionfs-stderr", MFD_CLOEXEC);
    if (memory >= 0) {
        dup2(memory, STDERR_FILENO);
        close(memory);
    } else {
        to_null(STDERR_FILENO);
    }
}

int report_fork(struct report **ret, pid_t *pid, char *why, size_t why_size)
{
    struct report *report = calloc(1, sizeof(*report));
    int fds[2] = {-1, -1};

    fflush(NULL);
    if (!report || pipe2(fds, O_CLOEXEC) < 0 || (*pid = fork()) < 0) {
        int r = -errno;
        snprintf(why, why_size, "no process can be made: %s", strerrordesc_np(-r));
        closep(&fds[0]);
        closep(&fds[1]);
        free(report);
        return r;
    }
    report->fd = fds[*pid == 0];
    close(fds[*pid != 0]);
    if (*pid == 0)
        enter_background(report);
    else
        hand_signals_on(*pid);
    *ret = report;
    return 0;
}

void report_free(struct report *report)
{
    if (report && report->fd >= 0)
        close(report->fd);
    free(report);
}

/* Read until the child has closed its end. Return: bytes, or -ETIMEDOUT. */
static ssize_t read_all(int fd, char *out, size_t size)
{
    uint64_t deadline = clock_now_ms() + START_WAIT_MS;
    size_t n = 0;

    while (n + 1 < size) {
        struct pollfd event = {.fd = fd, .events = POLLIN};
        uint64_t now = clock_now_ms();
        if (now >= deadline)
            return -ETIMEDOUT;
        if (poll(&event, 1, (int)(deadline - now)) <= 0)
            continue;
        ssize_t got = read(fd, out + n, size - 1 - n);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        n += (size_t)got;
        if (out[0] == READY)
            break;
    }
    out[n] = '\0';
    return (ssize_t)n;
}

static bool wait_child(pid_t pid, int *status, unsigned wait_ms)
{
    uint64_t deadline = clock_now_ms() + wait_ms;

    while (clock_now_ms() < deadline) {
        pid_t r = waitpid(pid, status, WNOHANG);
        if (r == pid || (r < 0 && errno == ECHILD))
            return true;
        poll(NULL, 0, 2);
    }
    return false;
}

static void kill_child(pid_t pid, int *status)
{
    kill(pid, SIGKILL);
    while (waitpid(pid, status, 0) < 0 && errno == EINTR)
        ;
}

void report_end_child(pid_t pid)
{
    int status;

    kill(pid, SIGTERM);
    if (!wait_child(pid, &status, END_WAIT_MS))
        kill_child(pid, &status);
}

int report_wait(struct report *report, pid_t pid, char *why, size_t why_size)
{
    int status = 0;
    ssize_t n = read_all(report->fd, why, why_size);

    close(report->fd);
    report->fd = -1;
    if (n > 0 && why[0] == READY)
        return 0;
    if (n == -ETIMEDOUT) {
        report_end_child(pid);
        snprintf(why, why_size, "the daemon does not get ready: see the system log");
        return -ECHILD;
    }
    if (!wait_child(pid, &status, END_WAIT_MS))
        kill_child(pid, &status);
    if (n == 0 && WIFSIGNALED(status))
        snprintf(why, why_size, "the daemon ended before it was ready, by signal %d: see the system log",
                 WTERMSIG(status));
    else if (n == 0)
        snprintf(why, why_size, "the daemon ended before it was ready: see the system log");
    return n == 0 ? -ECHILD : -EIO;
}

static void write_all(struct report *report, const char *text, size_t size)
{
    while (size) {
        ssize_t n = write(report->fd, text, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break; /* the parent is gone */
        text += n;
        size -= (size_t)n;
    }
    close(report->fd);
    report->fd = -1;
}

void report_ready(struct report *report)
{
    if (!report)
        return;
    to_null(STDERR_FILENO);
    write_all(report, (const char[]){READY}, 1);
}

void report_failure(struct report *report, const char *line)
{
    if (report)
        write_all(report, line, strlen(line));
}

void report_explain(struct report *report, char *why, size_t why_size)
{
    char text[1024];
    ssize_t n = report ? pread(STDERR_FILENO, text, sizeof(text) - 1, 0) : 0;

    if (n <= 0)
        return;
    text[n] = '\0';
    const char *said = strstr(text, "fusermount3: ");
    if (!said)
        return;
    size_t used = strlen(why);
    snprintf(why + used, why_size - used, " (%.*s)", (int)strcspn(said, "\n"), said);
}
