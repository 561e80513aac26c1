/*
 * bench: what sessionfs costs beside tmpfs and beside plain hiredis, in one table, all measured in one run.
 *
 * Interleaved: for every operation and size the subjects take turns in batches of a few milliseconds at most, so that
 * noise of the machine hits all alike; the first of a round rotates. A subject is
 *   sessionfs  mount A (cold sessions are made through mount B, an instance of its own)
 *   tmpfs      the same system calls on a plain directory
 *   hiredis    GET, SET PX, DEL, PTTL, PEXPIRE on the same Redis over the same unix socket; only the round trip is
 *              timed (redisCommand()), not the release of the reply
 *   trip       one FUSE round trip: user.session.tier, answered from memory
 * The floor of a cold read is the median GET plus two median trips, that of a save the median SET plus two, both of
 * the rounds in which the cold reads and saves themselves were measured.
 *
 * The bench keeps freed memory (mallopt()): else glibc gives the buffers of a 2 MB command back to the kernel or not,
 * as its heap happens to lie, and hiredis takes 0.8 ms or 4 ms for the same SET. So hiredis is seen at its best.
 *
 * A sample is one operation; for hot ones, shorter than the clock is exact, the mean of a few ("reps" in the JSON), so
 * that their p99 is that of such means. Contents are compared outside the timed part. Entry and attribute time-outs
 * of the kernel are refreshed before every hot batch: what a refresh costs is not what these rows ask for.
 *
 * A save larger than one FUSE WRITE (1 MiB) is committed after its close() returned, which flatters it beside SET;
 * "save+fsync" is the same save with its commit waited for.
 *
 * Exit status: 0 measured (whatever the verdicts), 1 an operation failed or a content was wrong, 2 usage or set-up.
 * Threads: one. The busy part forks children, which die with it.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <malloc.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#include <hiredis/hiredis.h>

#include "base/macros.h"

#define POOL_MAX         16
#define STAMP_EVERY      512 /* contents carry their stamp this often, so that a mixture of two shows */
#define SIZE_SMALL       2048
#define SIZE_LARGE       2000000
#define REDIS_TTL_MS     1440000
#define TTL_NAME         "user.session.ttl"
#define TIER_NAME        "user.session.tier"
#define STATUS_NAME      "user.session.status"
#define VISIBLE_LIMIT_NS 5000000000ull
#define VISIBLE_STALLS   3  /* so many saves never seen, or */
#define VISIBLE_TIME_S   60 /* so long a part, and the rest is not tried */
#define PASSES_MAX       4
#define N_COUNTS         128
#define UNUSED           __attribute__((unused)) /* operations and checks share one signature */

enum subject { ON_FS, ON_TMPFS, ON_REDIS, ON_TRIP, N_SUBJECTS };
static const char *const subject_names[N_SUBJECTS] = {"sessionfs", "tmpfs", "hiredis", "round_trip"};

/* None is a multiple of a page: a save which ends on a page boundary may be one part of many. */
static const size_t sizes[] = {200, SIZE_SMALL, 65000, 350000, SIZE_LARGE};

struct samples {
    double *us;
    size_t n, room;
};

struct session {
    char path[PATH_MAX], feed_path[PATH_MAX];
    char key[64];
    uint64_t stamp; /* of the content it should have */
    int fd;         /* held open, or -1 */
    char *map;      /* held mapped, or NULL */
};

/* One subject with the sessions it works on. */
struct side {
    enum subject subject;
    const char *dir, *feed; /* files: where they are measured, where cold ones are made */
    redisContext *redis;
    redisReply *reply; /* of the last command, until its check */
    bool has_xattr;
    size_t size, got; /* of the operation under measurement; what the last read brought */
    struct stat st;
    char text[64];
    char *input, *output; /* read into, written from */
    struct session pool[POOL_MAX];
    unsigned n_pool;
    int trip_fd;
};

/* How long the sessions of an operation live. */
enum life {
    LIFE_STEADY, /* made once, through A */
    LIFE_FED,    /* made anew for every round, through B */
    LIFE_NEW,    /* made by the operation */
    LIFE_DOOMED, /* removed by the operation */
};

struct op {
    const char *name;
    enum life life;
    unsigned reps; /* operations in a sample, of small sizes; 0: one, and no warm-up (not a hot one) */
    bool is_held, is_writing, has_trip, needs_ttl;
    unsigned n_trips; /* of the floor: GET or SET and so many round trips; 0: no floor */
    int (*run_file)(struct side *side, struct session *session);
    int (*check_file)(struct side *side, struct session *session);
    int (*run_redis)(struct side *side, struct session *session);
    int (*check_redis)(struct side *side, struct session *session);
};

struct summary {
    size_t n;
    double p50, p99;
};

struct verdict {
    char text[48]; /* "<= 1.1 x tmpfs", "" without a target */
    bool is_ok;
};

/* Ratios of medians, NAN where there is none. */
struct ratios {
    double x_tmpfs, x_redis, floor, x_floor;
};

struct row {
    const struct op *op;
    size_t size;
    unsigned reps;
    int error;
    struct summary by[N_SUBJECTS];
    struct ratios all, passes[PASSES_MAX]; /* of all samples, and of those of each pass */
    struct samples samples[N_SUBJECTS];
    struct verdict verdict;
};

struct measure {
    char name[64], note[256];
    const char *unit;
    double p50, p99; /* one value: p99 is NAN */
    size_t n;
    struct verdict verdict;
};

struct count {
    char name[32];
    double value;
};

struct bench {
    const char *a, *b, *tmpfs, *socket, *json_path, *l1_path, *only;
    pid_t pid;
    bool is_quick, is_stand_in;
    unsigned n_passes;
    double seconds; /* for one operation and size of weight 1 */

    char *base, *expected; /* what contents are made of; what a content is compared with */
    uint64_t stamp, serial;
    double clock_us; /* what reading the clock costs */
    int root_fd;     /* of mount A */

    struct side sides[N_SUBJECTS];
    struct samples trips;
    struct row rows[128];
    size_t n_rows;
    struct measure measures[64];
    size_t n_measures;
    bool has_failed;
};

static struct bench bench;

/* ---- small things ---- */

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void sleep_us(unsigned us)
{
    struct timespec t = {us / 1000000, (long)(us % 1000000) * 1000};
    nanosleep(&t, NULL);
}

static __attribute__((format(printf, 1, 2), noreturn)) void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("bench: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

static void *allocate(size_t size)
{
    void *p = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    if (!p)
        die("out of memory");
    memset(p, 0, size);
    return p;
}

static void samples_add(struct samples *samples, double us)
{
    if (samples->n == samples->room) {
        samples->room = samples->room ? samples->room * 2 : 1024;
        samples->us = realloc(samples->us, samples->room * sizeof *samples->us);
        if (!samples->us)
            die("out of memory");
    }
    samples->us[samples->n++] = us;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts them. The p99 is the nearest rank: of fewer than 100 samples, the worst. */
static struct summary samples_summary(struct samples *samples)
{
    if (!samples->n)
        return (struct summary){0, NAN, NAN};
    qsort(samples->us, samples->n, sizeof *samples->us, compare_doubles);
    size_t rank = (samples->n * 99 + 99) / 100;
    return (struct summary){samples->n, samples->us[samples->n / 2], samples->us[rank - 1]};
}

static void samples_deinit(struct samples *samples)
{
    free(samples->us);
    *samples = (struct samples){0};
}

static double clock_cost_us(void)
{
    struct samples samples = {0};
    for (int i = 0; i < 2000; i++) {
        uint64_t start = now_ns();
        samples_add(&samples, (double)(now_ns() - start) / 1000);
    }
    double cost = samples_summary(&samples).p50;
    samples_deinit(&samples);
    return cost;
}

/* ---- contents ---- */

static void content_fill(char *out, size_t size, uint64_t stamp)
{
    memcpy(out, bench.base, size);
    for (size_t at = 0; at + sizeof stamp <= size; at += STAMP_EVERY)
        memcpy(out + at, &stamp, sizeof stamp);
    memcpy(out + size - sizeof stamp, &stamp, sizeof stamp);
}

static int content_check(const char *data, size_t got, size_t size, uint64_t stamp)
{
    content_fill(bench.expected, size, stamp);
    return got == size && memcmp(data, bench.expected, size) == 0 ? 0 : -EBADMSG;
}

static uint64_t content_stamp(const char *data)
{
    uint64_t stamp;
    memcpy(&stamp, data, sizeof stamp);
    return stamp;
}

/* ---- the operations on files ---- */

static int read_whole(int fd, char *out, size_t size, size_t *ret)
{
    size_t got = 0;
    while (got < size) {
        ssize_t n = read(fd, out + got, size - got);
        if (n < 0)
            return -errno;
        if (!n)
            break;
        got += (size_t)n;
    }
    *ret = got;
    return 0;
}

static int save_file(const char *path, int flags, const char *data, size_t size, bool is_synced)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC | flags, 0600);
    if (fd < 0)
        return -errno;
    ssize_t n = write(fd, data, size);
    int r = n < 0 ? -errno : (size_t)n < size ? -EIO : 0;
    if (r == 0 && is_synced && fsync(fd) < 0)
        r = -errno;
    if (close(fd) < 0 && r == 0)
        r = -errno;
    return r;
}

static int file_pread(struct side *side, struct session *session)
{
    ssize_t n = pread(session->fd, side->input, side->size, 0);
    if (n < 0)
        return -errno;
    side->got = (size_t)n;
    return 0;
}

static int file_mmap_read(struct side *side, struct session *session)
{
    memcpy(side->input, session->map, side->size);
    __asm__ volatile("" ::"r"(side->input) : "memory"); /* the copy is wanted, each time */
    side->got = side->size;
    return 0;
}

static int file_open_read(struct side *side, struct session *session)
{
    int fd = open(session->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    int r = fstat(fd, &side->st) < 0 ? -errno : 0;
    if (r == 0)
        r = (size_t)side->st.st_size == side->size ? read_whole(fd, side->input, side->size, &side->got) : -EBADMSG;
    close(fd);
    return r;
}

/* As PHP does it: with a lock. Not timed; the daemon's requests are counted while it runs. */
static int file_open_lock_read(struct side *side, struct session *session)
{
    int fd = open(session->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    int r = fstat(fd, &side->st) < 0 || flock(fd, LOCK_SH) < 0 ? -errno : 0;
    if (r == 0)
        r = read_whole(fd, side->input, side->size, &side->got);
    close(fd);
    return r;
}

static int file_stat(struct side *side, struct session *session)
{
    return stat(session->path, &side->st) < 0 ? -errno : 0;
}

static int file_save(struct side *side, struct session *session)
{
    return save_file(session->path, O_TRUNC, side->output, side->size, false);
}

static int file_save_synced(struct side *side, struct session *session)
{
    return save_file(session->path, O_TRUNC, side->output, side->size, true);
}

static int file_new(struct side *side, struct session *session)
{
    return save_file(session->path, O_CREAT, side->output, side->size, false);
}

static int file_unlink(UNUSED struct side *side, struct session *session)
{
    return unlink(session->path) < 0 ? -errno : 0;
}

static int file_ttl_get(struct side *side, struct session *session)
{
    ssize_t n = getxattr(session->path, TTL_NAME, side->text, sizeof side->text - 1);
    if (n < 0)
        return -errno;
    side->text[n] = '\0';
    return 0;
}

static int file_ttl_set(UNUSED struct side *side, struct session *session)
{
    return setxattr(session->path, TTL_NAME, "1800", 4, 0) < 0 ? -errno : 0;
}

static int trip_get(struct side *side, UNUSED struct session *session)
{
    return fgetxattr(side->trip_fd, TIER_NAME, side->text, sizeof side->text) < 0 ? -errno : 0;
}

static int check_input(struct side *side, struct session *session)
{
    return content_check(side->input, side->got, side->size, session->stamp);
}

static int check_size(struct side *side, UNUSED struct session *session)
{
    return (size_t)side->st.st_size == side->size ? 0 : -EBADMSG;
}

/* Reads it back. Waits for the commit first, so that nothing of this save runs into the next sample. */
static int check_stored(struct side *side, struct session *session)
{
    CLEANUP(closep) int fd = open(session->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fsync(fd) < 0)
        return -errno;
    int r = read_whole(fd, side->input, side->size + 1, &side->got);
    return r < 0 ? r : check_input(side, session);
}

static int check_ttl(struct side *side, UNUSED struct session *session)
{
    long seconds = strtol(side->text, NULL, 10);
    return seconds > 0 && seconds <= 1800 ? 0 : -EBADMSG;
}

static int check_ttl_set(struct side *side, struct session *session)
{
    int r = file_ttl_get(side, session);
    if (r < 0)
        return r;
    long seconds = strtol(side->text, NULL, 10);
    return seconds >= 1790 && seconds <= 1800 ? 0 : -EBADMSG;
}

static int check_gone(UNUSED struct side *side, struct session *session)
{
    return access(session->path, F_OK) < 0 && errno == ENOENT ? 0 : -EEXIST;
}

/* ---- the operations by hiredis ---- */

static int redis_done(struct side *side, redisReply *reply)
{
    side->reply = reply;
    return !reply ? -EIO : reply->type == REDIS_REPLY_ERROR ? -EPROTO : 0;
}

static int redis_get(struct side *side, struct session *session)
{
    return redis_done(side, redisCommand(side->redis, "GET %s", session->key));
}

static int redis_set(struct side *side, struct session *session)
{
    return redis_done(
        side, redisCommand(side->redis, "SET %s %b PX %d", session->key, side->output, side->size, REDIS_TTL_MS));
}

static int redis_del(struct side *side, struct session *session)
{
    return redis_done(side, redisCommand(side->redis, "DEL %s", session->key));
}

static int redis_pttl(struct side *side, struct session *session)
{
    return redis_done(side, redisCommand(side->redis, "PTTL %s", session->key));
}

static int redis_pexpire(struct side *side, struct session *session)
{
    return redis_done(side, redisCommand(side->redis, "PEXPIRE %s %d", session->key, REDIS_TTL_MS));
}

static void reply_release(struct side *side)
{
    if (side->reply)
        freeReplyObject(side->reply);
    side->reply = NULL;
}

static int check_reply_content(struct side *side, struct session *session)
{
    bool is_string = side->reply->type == REDIS_REPLY_STRING;
    int r = is_string ? content_check(side->reply->str, side->reply->len, side->size, session->stamp) : -EBADMSG;
    reply_release(side);
    return r;
}

static int check_reply_status(struct side *side, UNUSED struct session *session)
{
    int r = side->reply->type == REDIS_REPLY_STATUS ? 0 : -EBADMSG;
    reply_release(side);
    return r;
}

static int check_reply_positive(struct side *side, UNUSED struct session *session)
{
    int r = side->reply->type == REDIS_REPLY_INTEGER && side->reply->integer > 0 ? 0 : -EBADMSG;
    reply_release(side);
    return r;
}

/* clang-format off */
#define READS .run_redis = redis_get, .check_redis = check_reply_content
#define SAVES .is_writing = true, .has_trip = true, .check_file = check_stored, .run_redis = redis_set, \
    .check_redis = check_reply_status
static const struct op ops[] = {
    {"hot pread", LIFE_STEADY, .reps = 32, .is_held = true, .run_file = file_pread, .check_file = check_input, READS},
    {"hot mmap read", LIFE_STEADY, .reps = 128, .is_held = true, .run_file = file_mmap_read, .check_file = check_input,
        READS},
    {"hot open+fstat+read+close", LIFE_STEADY, .reps = 8, .run_file = file_open_read, .check_file = check_input, READS},
    {"stat", LIFE_STEADY, .reps = 16, .run_file = file_stat, .check_file = check_size},
    {"cold read", LIFE_FED, .has_trip = true, .n_trips = 2, .run_file = file_open_read, .check_file = check_input,
        READS},
    {"save", LIFE_STEADY, .n_trips = 2, .run_file = file_save, SAVES},
    {"save+fsync", LIFE_STEADY, .n_trips = 3, .run_file = file_save_synced, SAVES},
    {"new session", LIFE_NEW, .run_file = file_new, SAVES},
    {"unlink", LIFE_DOOMED, .has_trip = true, .run_file = file_unlink, .check_file = check_gone,
        .run_redis = redis_del, .check_redis = check_reply_positive},
    {"TTL get", LIFE_STEADY, .has_trip = true, .needs_ttl = true, .run_file = file_ttl_get, .check_file = check_ttl,
        .run_redis = redis_pttl, .check_redis = check_reply_positive},
    {"TTL set", LIFE_STEADY, .has_trip = true, .needs_ttl = true, .run_file = file_ttl_set,
        .check_file = check_ttl_set, .run_redis = redis_pexpire, .check_redis = check_reply_positive},
};
/* clang-format on */

/* ---- the sessions of a round ---- */

static bool side_is_file(const struct side *side)
{
    return side->subject == ON_FS || side->subject == ON_TMPFS;
}

static void session_name(struct side *side, struct session *session)
{
    char name[40];
    snprintf(name, sizeof name, "sess_%08x%018llx", (unsigned)getpid(), (unsigned long long)++bench.serial);
    snprintf(session->key, sizeof session->key, "plain:%s", name);
    session->fd = -1;
    session->map = NULL;
    if (!side_is_file(side))
        return;
    snprintf(session->path, sizeof session->path, "%s/%s", side->dir, name);
    snprintf(session->feed_path, sizeof session->feed_path, "%s/%s", side->feed, name);
}

static int session_make(const struct op *op, struct side *side, struct session *session)
{
    session->stamp = ++bench.stamp;
    content_fill(side->output, side->size, session->stamp);
    if (side->subject == ON_REDIS) {
        int r = redis_set(side, session);
        reply_release(side);
        return r;
    }
    const char *path = op->life == LIFE_FED ? session->feed_path : session->path;
    int r = save_file(path, O_CREAT | O_EXCL, side->output, side->size, true);
    return r == 0 && op->needs_ttl ? file_ttl_set(side, session) : r;
}

static int session_hold(struct side *side, struct session *session)
{
    session->fd = open(session->path, O_RDONLY | O_CLOEXEC);
    if (session->fd < 0)
        return -errno;
    void *map = mmap(NULL, side->size, PROT_READ, MAP_SHARED, session->fd, 0);
    if (map == MAP_FAILED)
        return -errno;
    session->map = map;
    return 0;
}

static void session_remove(struct side *side, struct session *session)
{
    if (session->map)
        munmap(session->map, side->size);
    closep(&session->fd);
    if (side_is_file(side)) {
        unlink(session->path);
    } else {
        redis_del(side, session);
        reply_release(side);
    }
}

static int pool_make(const struct op *op, struct side *side)
{
    int r = 0;
    for (unsigned i = 0; i < side->n_pool; i++)
        session_name(side, &side->pool[i]);
    for (unsigned i = 0; i < side->n_pool && r == 0 && op->life != LIFE_NEW; i++) {
        r = session_make(op, side, &side->pool[i]);
        if (r == 0 && op->is_held && side_is_file(side))
            r = session_hold(side, &side->pool[i]);
    }
    return r;
}

static void pool_remove(struct side *side)
{
    for (unsigned i = 0; i < side->n_pool; i++)
        session_remove(side, &side->pool[i]);
}

/* ---- measuring an operation ---- */

static bool side_takes_part(const struct op *op, const struct side *side)
{
    switch (side->subject) {
    case ON_REDIS:
        return op->run_redis;
    case ON_TRIP:
        return op->has_trip;
    case ON_TMPFS:
        return side->has_xattr || !op->needs_ttl;
    default:
        return true;
    }
}

static unsigned op_batch(const struct op *op, enum subject subject, size_t size)
{
    if (op->reps && subject != ON_REDIS)
        return size <= 65000 ? POOL_MAX : 8;
    if (op->reps)
        return size <= 65000 ? 4 : 2;
    return size <= 65000 ? 8 : size <= 350000 ? 4 : 2;
}

static unsigned op_reps(const struct op *op, size_t size)
{
    unsigned reps = size <= 4096 ? op->reps : size <= 65000 ? op->reps / 8 : 1;
    return reps ? reps : 1;
}

static int op_run(const struct op *op, struct side *side, struct session *session)
{
    return side->subject == ON_TRIP    ? trip_get(side, session)
           : side->subject == ON_REDIS ? op->run_redis(side, session)
                                       : op->run_file(side, session);
}

static int op_check(const struct op *op, struct side *side, struct session *session)
{
    return side->subject == ON_TRIP    ? 0
           : side->subject == ON_REDIS ? op->check_redis(side, session)
                                       : op->check_file(side, session);
}

static int sample_take(const struct op *op, struct side *side, struct session *session, struct samples *samples)
{
    unsigned reps = side_is_file(side) ? op_reps(op, side->size) : 1;
    int r = 0;
    if (op->is_writing && side->subject != ON_TRIP) {
        session->stamp = ++bench.stamp;
        content_fill(side->output, side->size, session->stamp);
    }
    uint64_t start = now_ns();
    for (unsigned i = 0; i < reps && r == 0; i++)
        r = op_run(op, side, session);
    double us = (double)(now_ns() - start) / 1000 - bench.clock_us;
    if (r < 0) {
        reply_release(side);
        return r;
    }
    if (samples)
        samples_add(samples, us > 0 ? us / reps : 0);
    return op_check(op, side, session);
}

static int batch_take(const struct op *op, struct side *side, struct samples *samples)
{
    int r = 0;
    unsigned n = side->n_pool;
    if (op->reps && side_is_file(side))
        for (unsigned i = 0; i < n && r == 0; i++)
            r = sample_take(op, side, &side->pool[i], NULL); /* refreshes the kernel's time-outs */
    for (unsigned i = 0; i < n && r == 0; i++)
        r = sample_take(op, side, &side->pool[i], samples);
    return r;
}

/* Makes (@is_made) or removes the pools of all that take part. */
static int pools_turn(const struct op *op, bool is_made)
{
    int r = 0;
    for (unsigned s = 0; s < N_SUBJECTS; s++) {
        struct side *side = &bench.sides[s];
        if (s == ON_TRIP || !side_takes_part(op, side))
            continue;
        if (!is_made)
            pool_remove(side);
        else if (r == 0)
            r = pool_make(op, side);
    }
    return r;
}

static int round_take(const struct op *op, unsigned round, struct samples samples[N_SUBJECTS])
{
    bool is_steady = op->life == LIFE_STEADY;
    int r = is_steady ? 0 : pools_turn(op, true);
    if (op->life == LIFE_FED)
        sleep_us(500); /* what B has still to do for its save is over */
    for (unsigned i = 0; i < N_SUBJECTS && r == 0; i++) {
        unsigned s = (round + i) % N_SUBJECTS;
        if (side_takes_part(op, &bench.sides[s]))
            r = batch_take(op, &bench.sides[s], &samples[s]);
    }
    if (!is_steady && (op->life != LIFE_DOOMED || r < 0))
        pools_turn(op, false);
    return r;
}

static void sides_set_size(const struct op *op, size_t size)
{
    for (unsigned s = 0; s < N_SUBJECTS; s++) {
        struct side *side = &bench.sides[s];
        side->size = size;
        side->n_pool = op_batch(op, s, size);
        for (unsigned i = 0; i < side->n_pool; i++)
            session_name(side, &side->pool[i]); /* so that removing what was never made is harmless */
    }
}

static int op_measure(const struct op *op, size_t size, struct samples samples[N_SUBJECTS])
{
    double weight = size == SIZE_SMALL ? 2 : size == SIZE_LARGE ? 1.5 : 1; /* where the targets are */
    uint64_t end = now_ns() + (uint64_t)(bench.seconds / bench.n_passes * weight * 1e9);
    sides_set_size(op, size);
    int r = op->life == LIFE_STEADY ? pools_turn(op, true) : 0;
    for (unsigned round = 0; r == 0 && (round < 5 || now_ns() < end); round++)
        r = round_take(op, round, samples);
    if (op->life == LIFE_STEADY)
        pools_turn(op, false);
    return r;
}

/* ---- verdicts ---- */

static struct verdict verdict_make(bool is_ok, const char *format, ...) __attribute__((format(printf, 2, 3)));
static struct verdict verdict_make(bool is_ok, const char *format, ...)
{
    struct verdict verdict = {.is_ok = is_ok};
    va_list args;
    va_start(args, format);
    vsnprintf(verdict.text, sizeof verdict.text, format, args);
    va_end(args);
    return verdict;
}

static const struct row *row_find(const char *name, size_t size)
{
    for (size_t i = 0; i < bench.n_rows; i++)
        if (bench.rows[i].size == size && !strcmp(bench.rows[i].op->name, name))
            return &bench.rows[i];
    return NULL;
}

/* The targets of the issue; a comparison with NAN (not measured) is a MISS. */
static struct verdict row_verdict(const struct row *row)
{
    const char *name = row->op->name;
    if (row->size == SIZE_SMALL) {
        if (!strcmp(name, "hot pread") || !strcmp(name, "hot mmap read"))
            return verdict_make(row->all.x_tmpfs <= 1.1, "<= 1.1 x tmpfs");
        if (!strcmp(name, "hot open+fstat+read+close"))
            return verdict_make(row->all.x_tmpfs <= 1.6, "<= 1.6 x tmpfs");
        if (!strcmp(name, "cold read") || !strcmp(name, "save"))
            return verdict_make(row->all.x_floor <= 1.3, "<= 1.3 x floor");
    }
    if (row->size == SIZE_LARGE && (!strcmp(name, "cold read") || !strcmp(name, "save") || !strcmp(name, "save+fsync")))
        return verdict_make(1 / row->all.x_redis >= 0.6, ">= 60%% of hiredis (%.0f%%)", 100 / row->all.x_redis);
    return (struct verdict){0};
}

static struct ratios ratios_make(const struct op *op, const struct summary by[N_SUBJECTS])
{
    double fs = by[ON_FS].p50;
    double floor = op->n_trips ? by[ON_REDIS].p50 + op->n_trips * by[ON_TRIP].p50 : NAN;
    return (struct ratios){fs / by[ON_TMPFS].p50, fs / by[ON_REDIS].p50, floor, fs / floor};
}

/* Adds what pass @pass measured, and empties @samples. */
static void row_add_pass(struct row *row, unsigned pass, struct samples samples[N_SUBJECTS])
{
    struct summary by[N_SUBJECTS];
    for (unsigned s = 0; s < N_SUBJECTS; s++) {
        for (size_t i = 0; i < samples[s].n; i++)
            samples_add(&row->samples[s], samples[s].us[i]);
        for (size_t i = 0; s == ON_TRIP && i < samples[s].n; i++)
            samples_add(&bench.trips, samples[s].us[i]);
        by[s] = samples_summary(&samples[s]);
        samples_deinit(&samples[s]);
    }
    row->passes[pass] = ratios_make(row->op, by);
}

static void row_finish(struct row *row)
{
    for (unsigned s = 0; s < N_SUBJECTS; s++) {
        row->by[s] = samples_summary(&row->samples[s]);
        samples_deinit(&row->samples[s]);
    }
    row->all = ratios_make(row->op, row->by);
    row->verdict = row_verdict(row);
}

/* ---- the table ---- */

static const char *number(double value, char out[16])
{
    if (isnan(value))
        return "-";
    snprintf(out, 16, fabs(value) < 0.1 ? "%.4f" : fabs(value) < 10 ? "%.2f" : value < 100 ? "%.1f" : "%.0f", value);
    return out;
}

static void table_head(void)
{
    printf("microseconds; p50 is the median\n%-26s %8s |%19s |%19s |%19s |%8s%9s%9s%8s | %s\n", "", "", "sessionfs ",
           "tmpfs ", "hiredis ", "/tmpfs", "/hiredis", "floor", "/floor", "target, verdict, spread of the passes");
    printf("%-26s %8s |", "operation", "bytes");
    for (int i = 0; i < 3; i++)
        printf("%9s%9s  |", "p50", "p99");
    printf("%8s%9s%9s%8s |\n", "", "", "", "");
}

/* The lowest and highest of the passes of the ratio that matters: to the floor where there is one, else to tmpfs. */
static void row_print_spread(const struct row *row)
{
    char low_text[16], high_text[16];
    double low = INFINITY, high = 0;
    for (unsigned i = 0; i < bench.n_passes; i++) {
        double x = row->op->n_trips ? row->passes[i].x_floor : row->passes[i].x_tmpfs;
        low = x < low ? x : low;
        high = x > high ? x : high;
    }
    printf("  %s-%s %s", number(low, low_text), number(high, high_text), row->op->n_trips ? "x floor" : "x tmpfs");
}

static void row_print(const struct row *row)
{
    char text[16];
    printf("%-26s %8zu |", row->op->name, row->size);
    for (unsigned s = 0; s < ON_TRIP; s++) {
        printf("%9s", number(row->by[s].p50, text));
        printf("%9s  |", number(row->by[s].p99, text));
    }
    printf("%8s", number(row->all.x_tmpfs, text));
    printf("%9s", number(row->all.x_redis, text));
    printf("%9s", number(row->all.floor, text));
    printf("%8s |", number(row->all.x_floor, text));
    if (row->error)
        printf(" FAILED: %s", strerror(-row->error));
    else if (*row->verdict.text)
        printf(" %-28s %-4s", row->verdict.text, row->verdict.is_ok ? "ok" : "MISS");
    if (!row->error && *row->verdict.text)
        row_print_spread(row);
    printf("\n");
    fflush(stdout);
}

static void measure_add(struct measure measure)
{
    char text[16];
    if (bench.n_measures == ARRAY_SIZE(bench.measures))
        die("too many measures");
    bench.measures[bench.n_measures++] = measure;
    printf("%-46s |%9s", measure.name, number(measure.p50, text));
    printf("%9s  | %-8s %-72s |", number(measure.p99, text), measure.unit, measure.note);
    if (*measure.verdict.text)
        printf(" %-28s %s", measure.verdict.text, measure.verdict.is_ok ? "ok" : "MISS");
    printf("\n");
    fflush(stdout);
}

static void rows_make(void)
{
    for (size_t o = 0; o < ARRAY_SIZE(ops); o++)
        for (size_t z = 0; z < ARRAY_SIZE(sizes); z++)
            if (!bench.only || strstr(ops[o].name, bench.only))
                bench.rows[bench.n_rows++] =
                    (struct row){.op = &ops[o], .size = sizes[z], .reps = op_reps(&ops[o], sizes[z])};
}

static void row_measure(struct row *row, unsigned pass)
{
    struct samples samples[N_SUBJECTS] = {0};
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "pass %u of %u: %s, %zu bytes\033[K\r", pass + 1, bench.n_passes, row->op->name, row->size);
    if (row->error == 0)
        row->error = op_measure(row->op, row->size, samples);
    row_add_pass(row, pass, samples);
    bench.has_failed |= row->error < 0;
}

/*
 * Several passes over all of them: where the scheduler leaves the threads of a pair (one core or two) is stable for
 * seconds and makes a factor of three in a round trip, of Redis as of FUSE. The spread of the passes shows it.
 */
static void operations_measure(void)
{
    rows_make();
    for (unsigned pass = 0; pass < bench.n_passes; pass++)
        for (size_t i = 0; i < bench.n_rows; i++)
            row_measure(&bench.rows[i], pass);
    if (isatty(STDERR_FILENO))
        fputs("\033[K", stderr);
    for (size_t i = 0; i < bench.n_rows; i++) {
        row_finish(&bench.rows[i]);
        row_print(&bench.rows[i]);
    }
}

/* ---- what the daemon says of itself ---- */

/* The numbers in the object @name of @json, nested ones too; names as they are, the first of a name wins. */
static size_t json_numbers(const char *json, const char *name, struct count out[N_COUNTS])
{
    char quoted[40];
    size_t n = 0;
    int depth = 0;
    snprintf(quoted, sizeof quoted, "\"%s\"", name);
    const char *at = strstr(json, quoted);
    at = at ? strchr(at, '{') : NULL;
    for (; at && *at && n < N_COUNTS; at++) {
        depth += *at == '{' ? 1 : *at == '}' ? -1 : 0;
        if (!depth)
            break;
        const char *end = *at == '"' ? strchr(at + 1, '"') : NULL;
        if (!end)
            continue;
        const char *value = end + 1 + strspn(end + 1, " \t\n:");
        if (*value >= '0' && *value <= '9') {
            snprintf(out[n].name, sizeof out[n].name, "%.*s", (int)(end - at - 1), at + 1);
            out[n++].value = strtod(value, NULL);
        }
        at = end;
    }
    return n;
}

static double count_of(const struct count *counts, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (!strcmp(counts[i].name, name))
            return counts[i].value;
    return NAN;
}

static int status_numbers(const char *object, struct count out[N_COUNTS], size_t *ret_n)
{
    static char json[65536];
    ssize_t n = fgetxattr(bench.root_fd, STATUS_NAME, json, sizeof json - 1);
    if (n < 0)
        return -errno;
    json[n] = '\0';
    *ret_n = json_numbers(json, object, out);
    return *ret_n ? 0 : -EBADMSG;
}

/* What was counted between two readings, less @cost (what a reading itself adds); the kinds of requests into @note. */
static double requests_between(const struct count *before, const struct count *after, size_t n, double cost,
                               unsigned n_ops, char *note, size_t note_size)
{
    size_t used = 0;
    note[0] = '\0';
    for (size_t i = 0; i < n; i++) {
        double was = count_of(before, n, after[i].name);
        double more = after[i].value - (isnan(was) ? 0 : was) - (strcmp(after[i].name, "getxattr") ? 0 : cost);
        if (more > 0 && strcmp(after[i].name, "total") && used < note_size)
            used += (size_t)snprintf(note + used, note_size - used, "%s %.3g  ", after[i].name, more / n_ops);
    }
    return count_of(after, n, "total") - count_of(before, n, "total") - cost;
}

struct requests {
    double total;
    char note[160];
};

static const struct op *op_find(const char *name)
{
    for (size_t i = 0; i < ARRAY_SIZE(ops); i++)
        if (!strcmp(ops[i].name, name))
            return &ops[i];
    return NULL;
}

/* Runs @op on sessionfs @n_ops times between two readings of the status. Reading twice first tells what a reading adds.
 */
static int requests_count(const struct op *op, unsigned n_ops, struct requests *ret)
{
    struct count counts[3][N_COUNTS];
    struct side *side = &bench.sides[ON_FS];
    size_t n = 0;
    int r = status_numbers("requests", counts[0], &n); /* the first one may refresh attributes of the root */
    for (unsigned i = 0; i < 2 && r == 0; i++)
        r = status_numbers("requests", counts[i], &n);
    if (r < 0)
        return r;
    double cost = count_of(counts[1], n, "total") - count_of(counts[0], n, "total");
    for (unsigned i = 0; i < n_ops && r == 0; i++)
        r = op->run_file(side, &side->pool[i % side->n_pool]);
    if (r == 0)
        r = status_numbers("requests", counts[2], &n);
    if (r == 0)
        ret->total = requests_between(counts[1], counts[2], n, cost, n_ops, ret->note, sizeof ret->note);
    return r;
}

/* Some trials; every one of hot operations must be free of requests, so they add up. */
static int requests_trials(const struct op *op, unsigned n_trials, unsigned n_ops, double *ret, struct requests *last)
{
    struct side *side = &bench.sides[ON_FS];
    int r = 0;
    *ret = 0;
    sides_set_size(op, SIZE_SMALL);
    for (unsigned trial = 0; trial < n_trials && r == 0; trial++) {
        r = pool_make(op, side);
        /* Twice: a read that reached the daemon makes the kernel ask for the access time once more. */
        for (unsigned i = 0; i < 2 * side->n_pool && r == 0 && op->life == LIFE_STEADY; i++)
            r = op->run_file(side, &side->pool[i % side->n_pool]);
        content_fill(side->output, side->size, ++bench.stamp);
        sleep_us(50000); /* what the kernel and the daemon have in flight is over; far below the time-outs */
        if (r == 0)
            r = requests_count(op, n_ops, last);
        *ret += last->total;
        pool_remove(side);
    }
    return r;
}

static const struct op op_locked_read = {"hot open+fstat+flock+read+close", LIFE_STEADY, .reps = 1,
                                         .run_file = file_open_lock_read};

static void requests_measure_one(const struct op *op, bool is_hot)
{
    struct requests last = {0};
    double total = NAN;
    unsigned n_ops = is_hot ? 1000 : op_batch(op, ON_FS, SIZE_SMALL);
    int r = requests_trials(op, 5, n_ops, &total, &last);
    struct measure measure = {.unit = "requests", .p99 = NAN, .n = 5 * n_ops};
    measure.p50 = r < 0 ? NAN : is_hot ? total : total / (double)measure.n;
    snprintf(measure.name, sizeof measure.name, "requests: %s", op->name);
    if (r < 0)
        snprintf(measure.note, sizeof measure.note, "not counted: %s", strerror(-r));
    else
        snprintf(measure.note, sizeof measure.note, "%s%s", is_hot ? "in 5000 operations  " : "each  ", last.note);
    if (is_hot)
        measure.verdict = verdict_make(measure.p50 == 0, "0 requests");
    measure_add(measure);
}

static void requests_measure(void)
{
    requests_measure_one(op_find("hot pread"), true);
    requests_measure_one(op_find("hot mmap read"), true);
    requests_measure_one(op_find("hot open+fstat+read+close"), true);
    requests_measure_one(&op_locked_read, true);
    requests_measure_one(op_find("stat"), true);
    requests_measure_one(op_find("cold read"), false);
    requests_measure_one(op_find("save"), false);
    requests_measure_one(op_find("new session"), false);
    requests_measure_one(op_find("unlink"), false);
    requests_measure_one(op_find("TTL get"), false);
    requests_measure_one(op_find("TTL set"), false);
}

static double proc_status_mb(const char *member)
{
    char path[64], line[256];
    double mb = NAN;
    snprintf(path, sizeof path, "/proc/%d/status", (int)bench.pid);
    FILE *file = fopen(path, "re");
    size_t size = strlen(member);
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, member, size) && line[size] == ':')
            mb = strtod(line + size + 1, NULL) / 1024;
    if (file)
        fclose(file);
    return mb;
}

static double arena_used_mb(void)
{
    static const char *const names[] = {"bytes_used", "used_bytes", "used"};
    struct count counts[N_COUNTS];
    size_t n = 0;
    if (status_numbers("l1", counts, &n) < 0)
        return NAN;
    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        if (!isnan(count_of(counts, n, names[i])))
            return count_of(counts, n, names[i]) / 1048576;
    return NAN;
}

/* What is resident beyond the arena in use: that the daemon's status tells, or else all its shared memory. */
static void memory_measure(const char *name, bool is_target)
{
    if (!bench.pid)
        return;
    double all = proc_status_mb("VmRSS"), shared = proc_status_mb("RssShmem"), used = arena_used_mb();
    double arena = isnan(used) || used > shared ? shared : used;
    struct measure measure = {.unit = "MB", .p50 = all - arena, .p99 = NAN, .n = 1};
    snprintf(measure.name, sizeof measure.name, "%s", name);
    snprintf(measure.note, sizeof measure.note, "VmRSS %.1f, RssShmem %.1f, arena in use %s%.1f", all, shared,
             isnan(used) ? "unknown, taken as " : "", isnan(used) ? shared : used);
    if (is_target)
        measure.verdict = verdict_make(measure.p50 <= 20, "<= 20 MB");
    measure_add(measure);
}

/* ---- L1 alone, in process: what bench_l1 --json wrote ---- */

/* The number @name after the name @object. */
static double json_value(const char *json, const char *object, const char *name)
{
    char quoted[40];
    snprintf(quoted, sizeof quoted, "\"%s\"", object);
    const char *at = strstr(json, quoted);
    snprintf(quoted, sizeof quoted, "\"%s\":", name);
    at = at ? strstr(at, quoted) : NULL;
    return at ? strtod(at + strlen(quoted), NULL) : NAN;
}

static void l1_row(const char *name, double value, const char *unit, struct verdict verdict)
{
    struct measure measure = {.unit = unit, .p50 = value, .p99 = NAN, .n = 1, .verdict = verdict};
    snprintf(measure.name, sizeof measure.name, "L1: %s", name);
    measure_add(measure);
}

static void l1_report(void)
{
    char json[4096] = "";
    FILE *file = fopen(bench.l1_path, "re");
    size_t n = file ? fread(json, 1, sizeof json - 1, file) : 0;
    json[n] = '\0';
    if (file)
        fclose(file);
    double hot = json_value(json, "sessions_1000", "threads_1"),
           many = json_value(json, "sessions_1000000", "threads_1");
    double load = json_value(json, "dependent_load_ns", "dependent_load_ns"), x = many / load;
    double hot_2 = json_value(json, "speedup_2_threads", "sessions_1000");
    double many_2 = json_value(json, "speedup_2_threads", "sessions_1000000");
    double bytes = json_value(json, "bytes_per_session_2k", "bytes_per_session_2k");
    l1_row("lookup, 1,000 sessions", hot, "ns", verdict_make(hot <= 85, "<= 85 ns"));
    l1_row("lookup, 1,000,000 sessions", many, "ns", verdict_make(x <= 2.5, "<= 2.5 x load (%.2f)", x));
    l1_row("one dependent random load", load, "ns", (struct verdict){0});
    l1_row("2 threads, 1,000 sessions", hot_2, "x one", verdict_make(hot_2 >= 1.8, ">= 1.8 x one"));
    l1_row("2 threads, 1,000,000 sessions", many_2, "x one", verdict_make(many_2 >= 1.8, ">= 1.8 x one"));
    l1_row("memory of a cached 2 KB session", bytes, "bytes", verdict_make(bytes <= 4608, "<= 4.5 KB"));
}

/* ---- visibility: from the return of a save on A to the first read on B that brings it ---- */

enum look { LOOK_PREAD, LOOK_FSTAT_PREAD, LOOK_OPEN, N_LOOKS };
static const char *const look_names[N_LOOKS] = {"pread, held", "fstat+pread, held", "open+fstat+read+close"};

struct visibility {
    struct side *on_a, *on_redis;
    struct session session, plain;
    struct side on_b; /* reads through B */
    bool is_busy;
    unsigned n_torn, n_never;
    struct samples samples[N_LOOKS], get;
};

static int look(struct visibility *v, enum look how)
{
    struct side *b = &v->on_b;
    if (how == LOOK_OPEN)
        return file_open_read(b, &v->session);
    if (how == LOOK_FSTAT_PREAD && fstat(v->session.fd, &b->st) < 0)
        return -errno;
    return file_pread(b, &v->session);
}

/* One save on A and the wait for it on B. Whatever B sees meanwhile must be the old version or the new one. */
static int visibility_once(struct visibility *v, enum look how)
{
    struct side *b = &v->on_b;
    uint64_t old = v->session.stamp, start, seen;
    v->session.stamp = ++bench.stamp;
    content_fill(v->on_a->output, b->size, v->session.stamp);
    int r = save_file(v->session.feed_path, O_TRUNC, v->on_a->output, b->size, false);
    start = now_ns();
    for (;;) {
        if (r == 0)
            r = look(v, how);
        seen = now_ns();
        if (r < 0)
            return r;
        if (content_stamp(b->input) == v->session.stamp || seen - start > VISIBLE_LIMIT_NS)
            break;
        v->n_torn += content_check(b->input, b->got, b->size, old) < 0;
        if (v->is_busy)
            sleep_us(50); /* the reader is not one more of those who keep the cores busy */
    }
    v->n_torn += content_stamp(b->input) == v->session.stamp && check_input(b, &v->session) < 0;
    v->n_never += seen - start > VISIBLE_LIMIT_NS;
    samples_add(&v->samples[how], (double)(seen - start) / 1000 - bench.clock_us);
    return 0;
}

static int visibility_get(struct visibility *v)
{
    uint64_t start = now_ns();
    int r = redis_get(v->on_redis, &v->plain);
    samples_add(&v->get, (double)(now_ns() - start) / 1000);
    reply_release(v->on_redis);
    return r;
}

static int visibility_run(struct visibility *v, unsigned n)
{
    int r = 0;
    uint64_t end = now_ns() + (bench.is_quick ? VISIBLE_TIME_S / 4 : VISIBLE_TIME_S) * 1000000000ull;
    for (unsigned i = 0; i < n && r == 0 && v->n_never < VISIBLE_STALLS && now_ns() < end; i++) {
        for (unsigned how = 0; how < N_LOOKS && r == 0; how++) {
            sleep_us(500 + (unsigned)(random() % 1000));
            r = visibility_once(v, how);
        }
        if (r == 0)
            r = visibility_get(v);
    }
    return r;
}

static void hog(void)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close_range(3, ~0u, 0); /* a descriptor on a mount would outlive the bench */
    for (volatile uint64_t i = 0;; i++)
        ;
}

static unsigned hogs_start(pid_t pids[], unsigned max)
{
    unsigned n = 0, n_cpus = (unsigned)sysconf(_SC_NPROCESSORS_ONLN);
    for (; n < n_cpus && n < max; n++) {
        pids[n] = fork();
        if (pids[n] < 0)
            break;
        if (!pids[n])
            hog();
    }
    sleep_us(200000);
    return n;
}

static void hogs_stop(pid_t pids[], unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        kill(pids[i], SIGKILL);
        waitpid(pids[i], NULL, 0);
    }
}

static void visibility_report(struct visibility *v, unsigned how, int error)
{
    const struct row *cold = row_find("cold read", SIZE_SMALL);
    struct summary summary = samples_summary(&v->samples[how]);
    struct measure measure = {.unit = "us", .p50 = summary.p50, .p99 = summary.p99, .n = summary.n};
    snprintf(measure.name, sizeof measure.name, "visible on B, %s: %s", v->is_busy ? "busy" : "quiet", look_names[how]);
    if (error)
        snprintf(measure.note, sizeof measure.note, "FAILED: %s", strerror(-error));
    else if (v->n_torn || v->n_never)
        snprintf(measure.note, sizeof measure.note, "of all three: %u mixtures, %u never seen", v->n_torn, v->n_never);
    if (v->is_busy)
        measure.verdict = verdict_make(summary.p99 <= 10000, "p99 <= 10 ms");
    else if (cold)
        measure.verdict =
            verdict_make(summary.p50 <= 1.5 * cold->all.floor, "p50 <= 1.5 x cold floor (%.0f)", 1.5 * cold->all.floor);
    measure_add(measure);
    samples_deinit(&v->samples[how]);
}

static void visibility_report_get(struct visibility *v)
{
    struct summary summary = samples_summary(&v->get);
    struct measure measure = {.unit = "us", .p50 = summary.p50, .p99 = summary.p99, .n = summary.n};
    snprintf(measure.name, sizeof measure.name, "for comparison, %s: hiredis GET", v->is_busy ? "busy" : "quiet");
    measure_add(measure);
    samples_deinit(&v->get);
}

static int visibility_make(struct visibility *v)
{
    static const struct op op = {.name = "visibility", .life = LIFE_FED};
    struct side *b = &v->on_b;
    b->subject = ON_FS;
    b->dir = bench.b;
    b->feed = bench.a;
    b->size = v->on_redis->size = SIZE_SMALL;
    session_name(b, &v->session);
    session_name(v->on_redis, &v->plain);
    int r = session_make(&op, v->on_redis, &v->plain);
    if (r == 0)
        r = session_make(&op, b, &v->session);
    if (r == 0)
        r = session_hold(b, &v->session);
    return r;
}

static void visibility_measure(bool is_busy)
{
    pid_t hogs[64];
    struct side *fs = &bench.sides[ON_FS];
    struct visibility v = {.on_a = fs, .on_redis = &bench.sides[ON_REDIS], .is_busy = is_busy};
    v.on_b.input = fs->input;
    v.on_b.output = fs->output;
    v.session.fd = -1;
    unsigned n_hogs = is_busy ? hogs_start(hogs, ARRAY_SIZE(hogs)) : 0;
    int r = visibility_make(&v);
    if (r == 0)
        r = visibility_run(&v, bench.is_quick ? 100 : 500);
    hogs_stop(hogs, n_hogs);
    for (unsigned how = 0; how < N_LOOKS; how++)
        visibility_report(&v, how, r);
    visibility_report_get(&v);
    bench.has_failed |= r < 0 || v.n_torn || v.n_never;
    session_remove(&v.on_b, &v.session);
    session_remove(v.on_redis, &v.plain);
}

/* ---- JSON ---- */

static void json_number(FILE *out, const char *name, double value, const char *end)
{
    if (isnan(value) || isinf(value))
        fprintf(out, "\"%s\": null%s", name, end);
    else
        fprintf(out, "\"%s\": %.4f%s", name, value, end);
}

static void json_verdict(FILE *out, const struct verdict *verdict)
{
    if (*verdict->text)
        fprintf(out, "\"target\": \"%s\", \"ok\": %s}", verdict->text, verdict->is_ok ? "true" : "false");
    else
        fprintf(out, "\"target\": null, \"ok\": null}");
}

static void json_row(FILE *out, const struct row *row)
{
    fprintf(out, "{\"operation\": \"%s\", \"bytes\": %zu, \"reps\": %u, ", row->op->name, row->size, row->reps);
    for (unsigned s = 0; s < N_SUBJECTS; s++) {
        if (!row->by[s].n) {
            fprintf(out, "\"%s\": null, ", subject_names[s]);
            continue;
        }
        fprintf(out, "\"%s\": {\"n\": %zu, ", subject_names[s], row->by[s].n);
        json_number(out, "p50_us", row->by[s].p50, ", ");
        json_number(out, "p99_us", row->by[s].p99, "}, ");
    }
    json_number(out, "x_tmpfs", row->all.x_tmpfs, ", ");
    json_number(out, "x_hiredis", row->all.x_redis, ", ");
    json_number(out, "floor_us", row->all.floor, ", ");
    json_number(out, "x_floor", row->all.x_floor, ", ");
    fprintf(out, "\"passes\": [");
    for (unsigned i = 0; i < bench.n_passes; i++) {
        fprintf(out, "{");
        json_number(out, "x_tmpfs", row->passes[i].x_tmpfs, ", ");
        json_number(out, "x_hiredis", row->passes[i].x_redis, ", ");
        json_number(out, "floor_us", row->passes[i].floor, ", ");
        json_number(out, "x_floor", row->passes[i].x_floor, i + 1 < bench.n_passes ? "}, " : "}], ");
    }
    fprintf(out, row->error ? "\"error\": \"%s\", " : "\"error\": null, ", strerror(-row->error));
    json_verdict(out, &row->verdict);
}

static void json_measure(FILE *out, const struct measure *measure)
{
    fprintf(out, "{\"name\": \"%s\", \"unit\": \"%s\", \"n\": %zu, ", measure->name, measure->unit, measure->n);
    json_number(out, isnan(measure->p99) ? "value" : "p50", measure->p50, ", ");
    json_number(out, "p99", measure->p99, ", ");
    fprintf(out, "\"note\": \"%s\", ", measure->note);
    json_verdict(out, &measure->verdict);
}

static int json_write(void)
{
    struct utsname machine;
    FILE *out = fopen(bench.json_path, "we");
    if (!out)
        return -errno;
    uname(&machine);
    fprintf(out, "{\"kernel\": \"%s\", \"cpus\": %ld, \"quick\": %s, \"stand_in\": %s, \"failed\": %s,\n",
            machine.release, sysconf(_SC_NPROCESSORS_ONLN), bench.is_quick ? "true" : "false",
            bench.is_stand_in ? "true" : "false", bench.has_failed ? "true" : "false");
    fprintf(out, "\"operations\": [\n");
    for (size_t i = 0; i < bench.n_rows; i++) {
        json_row(out, &bench.rows[i]);
        fputs(i + 1 < bench.n_rows ? ",\n" : "\n", out);
    }
    fprintf(out, "],\n\"measures\": [\n");
    for (size_t i = 0; i < bench.n_measures; i++) {
        json_measure(out, &bench.measures[i]);
        fputs(i + 1 < bench.n_measures ? ",\n" : "\n", out);
    }
    fprintf(out, "]}\n");
    return fclose(out) == 0 ? 0 : -errno;
}

/* ---- set-up ---- */

static void contents_setup(void)
{
    srandom(1);
    bench.base = allocate(SIZE_LARGE);
    bench.expected = allocate(SIZE_LARGE);
    for (size_t i = 0; i < SIZE_LARGE; i++)
        bench.base[i] = (char)random(); /* neither compressible nor the same page twice */
}

static void redis_setup(struct side *side)
{
    side->redis = redisConnectUnix(bench.socket);
    if (!side->redis || side->redis->err)
        die("%s: %s", bench.socket, side->redis ? side->redis->errstr : "out of memory");
}

static void xattr_probe(struct side *side)
{
    struct session session;
    session_name(side, &session);
    if (save_file(session.path, O_CREAT, "x", 1, false) < 0)
        die("%s: %s", session.path, strerror(errno));
    side->has_xattr = file_ttl_set(side, &session) == 0;
    unlink(session.path);
}

/* The session whose attribute is asked for, for as long as the bench runs. */
static void trip_setup(struct side *side)
{
    struct session *session = &side->pool[0];
    struct side *fs = &bench.sides[ON_FS];
    session_name(fs, session);
    content_fill(fs->output, SIZE_SMALL, 1);
    int r = save_file(session->path, O_CREAT, fs->output, SIZE_SMALL, true);
    if (r < 0)
        die("%s: %s", session->path, strerror(-r));
    side->trip_fd = open(session->path, O_RDONLY | O_CLOEXEC);
    if (side->trip_fd >= 0 && bench.is_stand_in)
        fsetxattr(side->trip_fd, TIER_NAME, "l1", 2, 0);
    r = trip_get(side, session);
    if (r < 0)
        die("%s of %s: %s", TIER_NAME, session->path, strerror(-r));
}

static void sides_setup(void)
{
    for (unsigned s = 0; s < N_SUBJECTS; s++) {
        struct side *side = &bench.sides[s];
        side->subject = s;
        side->dir = s == ON_FS ? bench.a : bench.tmpfs;
        side->feed = s == ON_FS ? bench.b : bench.tmpfs;
        side->input = allocate(SIZE_LARGE + 1);
        side->output = allocate(SIZE_LARGE);
    }
    redis_setup(&bench.sides[ON_REDIS]);
    bench.sides[ON_FS].has_xattr = true;
    xattr_probe(&bench.sides[ON_TMPFS]);
    trip_setup(&bench.sides[ON_TRIP]);
}

static void usage(void)
{
    fprintf(stderr, "Usage: bench --a DIR --b DIR --tmpfs DIR --redis SOCKET [option...]\n"
                    "  --a DIR, --b DIR  mounts of two instances of one namespace\n"
                    "  --tmpfs DIR       a directory on tmpfs\n"
                    "  --redis SOCKET    the unix socket of the Redis behind the mounts\n"
                    "  --pid PID         the daemon of mount A, for its memory\n"
                    "  --l1 FILE         what bench_l1 --json wrote, for its rows of the table\n"
                    "  --quick           a run of about 20 s instead of 2 to 3 minutes\n"
                    "  --only TEXT       only operations with TEXT in their name, nothing else\n"
                    "  --seconds N       time for one operation and size (default 1.5, quick 0.12)\n"
                    "  --json FILE       write everything to FILE too\n"
                    "  --stand-in        A and B are one plain directory: try the bench without sessionfs\n");
    exit(2);
}

static void options_read(int argc, char **argv)
{
    static const struct option options[] = {{"a", 1, 0, 'a'},     {"b", 1, 0, 'b'},        {"tmpfs", 1, 0, 't'},
                                            {"redis", 1, 0, 'r'}, {"pid", 1, 0, 'p'},      {"quick", 0, 0, 'q'},
                                            {"l1", 1, 0, 'l'},    {"only", 1, 0, 'o'},     {"seconds", 1, 0, 's'},
                                            {"json", 1, 0, 'j'},  {"stand-in", 0, 0, 'i'}, {0}};
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'a':
            bench.a = optarg;
            break;
        case 'b':
            bench.b = optarg;
            break;
        case 't':
            bench.tmpfs = optarg;
            break;
        case 'r':
            bench.socket = optarg;
            break;
        case 'p':
            bench.pid = (pid_t)atoi(optarg);
            break;
        case 'q':
            bench.is_quick = true;
            break;
        case 'l':
            bench.l1_path = optarg;
            break;
        case 'o':
            bench.only = optarg;
            break;
        case 's':
            bench.seconds = atof(optarg);
            break;
        case 'j':
            bench.json_path = optarg;
            break;
        case 'i':
            bench.is_stand_in = true;
            break;
        default:
            usage();
        }
    }
    if (!bench.a || !bench.b || !bench.tmpfs || !bench.socket || optind < argc)
        usage();
    if (bench.seconds <= 0)
        bench.seconds = bench.is_quick ? 0.12 : 1.5;
    bench.n_passes = bench.is_quick ? 2 : PASSES_MAX;
}

static void trips_report(void)
{
    struct summary summary = samples_summary(&bench.trips);
    measure_add((struct measure){.name = "FUSE round trip (getxattr of tier)",
                                 .unit = "us",
                                 .p50 = summary.p50,
                                 .p99 = summary.p99,
                                 .n = summary.n,
                                 .note = "of all rounds"});
}

int main(int argc, char **argv)
{
    options_read(argc, argv);
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
    prctl(PR_SET_TIMERSLACK, 1000); /* sleeps of 50 us shall be that */
    bench.root_fd = open(bench.a, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (bench.root_fd < 0)
        die("%s: %s", bench.a, strerror(errno));
    table_head();
    if (!bench.only)
        memory_measure("memory of a fresh daemon", true); /* before anything else is asked of it */
    contents_setup();
    bench.clock_us = clock_cost_us();
    sides_setup();

    operations_measure();
    trips_report();
    if (!bench.only) {
        requests_measure();
        visibility_measure(false);
        visibility_measure(true);
        memory_measure("memory after the run", false);
    }
    if (bench.l1_path)
        l1_report();
    int r = bench.json_path ? json_write() : 0;
    if (r < 0)
        die("%s: %s", bench.json_path, strerror(-r));
    unlink(bench.sides[ON_TRIP].pool[0].path);
    return bench.has_failed ? 1 : 0;
}
