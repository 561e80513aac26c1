/*
 * What a lookup in L1 costs: find by name, pin, unpin. Printed as a table, with --json as JSON. --quick: fewer rounds.
 * Names are drawn uniformly beforehand and lie in a row in the order of their use: a request brings its name into the
 * cache. Two threads draw both from all sessions, or ("apart") each from a half of its own: the difference is what it
 * costs that both pin the same entries. The yardstick for many sessions is a load that depends on the one before, from
 * an array as large as the entries: a lookup is two such cache misses and some arithmetic. Times are the threads'
 * processor time, each thread on a processor of its own, the median of several runs: so a busy machine disturbs less.
 * But two threads disturb each other only while both run: judge them on an idle machine.
 */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "sessionfs/l1.h"

#define SESSION_SIZE 2048
#define N_HOT        1000
#define N_MANY       1000000
#define NAME_SIZE    32
#define N_RUNS       5
#define N_DRAWS      (1u << 20)

/* As large as the store's struct may be. */
struct session {
    struct l1_entry entry;
    void *content;
    char rest[256 - sizeof(struct l1_entry) - sizeof(void *)];
};

_Static_assert(sizeof(struct session) == 256, "the store's struct is 256 bytes");

struct job {
    struct l1 *l1;
    const char (*draws)[NAME_SIZE]; /* N_DRAWS names */
    size_t n_rounds;
    int cpu;
    pthread_barrier_t *start;
    double n_per_second; /* the result */
};

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint64_t draw(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

/* The owner's structs lie in one array: no malloc() overhead in the numbers. */
struct slab {
    struct session *sessions;
    size_t n_made;
};

static void *make_session(void *owner)
{
    struct slab *slab = owner;
    return &slab->sessions[slab->n_made++];
}

static void free_session(void *owner, struct l1_entry *entry)
{
}

static bool evict_nothing(void *owner, struct l1_entry *entry)
{
    return false;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *ns)
{
    qsort(ns, N_RUNS, sizeof(*ns), compare);
    return ns[N_RUNS / 2];
}

static void die(const char *what)
{
    fprintf(stderr, "bench_l1: %s\n", what);
    exit(1);
}

static size_t resident_bytes(void)
{
    unsigned long size = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (!f || fscanf(f, "%lu %lu", &size, &resident) != 2)
        die("/proc/self/statm does not read");
    fclose(f);
    return resident * (size_t)sysconf(_SC_PAGESIZE);
}

static struct l1 *make_l1(struct slab *slab, size_t n_sessions)
{
    struct l1_config config = {.size = n_sessions * L1_PAGE,
                               .make = make_session,
                               .release = free_session,
                               .evict = evict_nothing,
                               .owner = slab};
    struct l1 *l1 = NULL;
    size_t bytes = n_sessions * sizeof(struct session);
    slab->n_made = 0;
    slab->sessions = aligned_alloc(64, bytes);
    if (!slab->sessions || l1_new(&l1, &config) < 0)
        die("no l1");
    memset(slab->sessions, 0, bytes);
    return l1;
}

static void make_names(char (*names)[NAME_SIZE], size_t n)
{
    uint64_t state = 1;
    for (size_t i = 0; i < n; i++) {
        char text[NAME_SIZE + 1];
        snprintf(text, sizeof(text), "%016lx%016lx", (unsigned long)draw(&state), (unsigned long)draw(&state));
        memcpy(names[i], text, NAME_SIZE);
    }
}

/* A content, if @has_content, as the store makes it: a run of pages, an owner, a place in the eviction list. */
static void fill(struct l1 *l1, const char (*names)[NAME_SIZE], size_t n, bool has_content)
{
    for (size_t i = 0; i < n; i++) {
        bool is_new;
        struct l1_entry *entry = l1_get(l1, 1, names[i], NAME_SIZE, &is_new);
        if (!entry || !is_new)
            die("no entry");
        if (!has_content)
            continue;
        struct session *session = (struct session *)entry;
        session->content = l1_pages_get(l1, SESSION_SIZE);
        if (!session->content)
            die("no pages");
        memset(session->content, 'x', SESSION_SIZE);
        l1_pages_own(l1, session->content, SESSION_SIZE, entry);
        l1_set_resident(l1, entry, true);
    }
}

static void empty(struct l1 *l1, const char (*names)[NAME_SIZE], size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct l1_entry *entry = l1_find(l1, 1, names[i], NAME_SIZE);
        struct session *session = (struct session *)entry;
        if (session->content)
            l1_pages_put(l1, session->content, SESSION_SIZE);
        l1_unpin(l1, entry);
        l1_unpin(l1, entry);
    }
}

static void *look_up(void *arg)
{
    struct job *job = arg;
    uint64_t n_found = 0;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(job->cpu, &cpus);
    pthread_setaffinity_np(pthread_self(), sizeof(cpus), &cpus);
    pthread_barrier_wait(job->start);
    double begin = seconds();
    for (size_t round = 0; round < job->n_rounds; round++) {
        for (size_t i = 0; i < N_DRAWS; i++) {
            struct l1_entry *entry = l1_find(job->l1, 1, job->draws[i], NAME_SIZE);
            n_found += entry != NULL;
            l1_unpin(job->l1, entry);
        }
    }
    if (n_found != N_DRAWS * job->n_rounds)
        die("a lookup missed");
    job->n_per_second = (double)n_found / (seconds() - begin);
    return NULL;
}

/* Nanoseconds a lookup, the median of N_RUNS; n threads together do n in the time of one. */
static double measure(struct l1 *l1, const char (*names)[NAME_SIZE], size_t n, size_t n_threads, bool is_apart,
                      size_t n_rounds)
{
    double ns[N_RUNS];
    char(*draws[2])[NAME_SIZE];
    uint64_t state = 7;
    for (size_t t = 0; t < n_threads; t++) {
        draws[t] = malloc((size_t)N_DRAWS * NAME_SIZE);
        for (size_t i = 0; i < N_DRAWS; i++)
            memcpy(draws[t][i], names[is_apart ? n / 2 * t + draw(&state) % (n / 2) : draw(&state) % n], NAME_SIZE);
    }
    for (size_t run = 0; run < N_RUNS; run++) {
        pthread_barrier_t start;
        pthread_barrier_init(&start, NULL, (unsigned)n_threads);
        pthread_t threads[2];
        struct job jobs[2];
        for (size_t t = 0; t < n_threads; t++) {
            jobs[t] = (struct job){l1, (const char(*)[NAME_SIZE])draws[t], n_rounds, (int)t, &start, 0};
            pthread_create(&threads[t], NULL, look_up, &jobs[t]);
        }
        double n_per_second = 0;
        for (size_t t = 0; t < n_threads; t++) {
            pthread_join(threads[t], NULL);
            n_per_second += jobs[t].n_per_second;
        }
        ns[run] = 1e9 / n_per_second;
        pthread_barrier_destroy(&start);
    }
    for (size_t t = 0; t < n_threads; t++)
        free(draws[t]);
    return median(ns);
}

/* A walk along one random cycle through all lines of an array of that size. */
static double measure_dependent_load(size_t bytes, size_t n_steps)
{
    size_t n = bytes / 64;
    uint64_t state = 3, (*lines)[8] = aligned_alloc(64, n * 64);
    if (!lines)
        die("no memory");
    memset(lines, 0, n * 64);
    for (size_t i = 0; i < n; i++)
        lines[i][0] = i;
    for (size_t i = n - 1; i > 0; i--) {
        size_t j = draw(&state) % i;
        uint64_t other = lines[j][0];
        lines[j][0] = lines[i][0];
        lines[i][0] = other;
    }
    double ns[N_RUNS];
    for (size_t run = 0; run < N_RUNS; run++) {
        uint64_t at = run;
        double begin = seconds();
        for (size_t i = 0; i < n_steps; i++)
            at = lines[at][0];
        __asm__ volatile("" : : "r"(at));
        ns[run] = (seconds() - begin) * 1e9 / (double)n_steps;
    }
    free(lines);
    return median(ns);
}

int main(int argc, char **argv)
{
    bool is_json = false, is_quick = false;
    for (int i = 1; i < argc; i++) {
        is_json |= strcmp(argv[i], "--json") == 0;
        is_quick |= strcmp(argv[i], "--quick") == 0;
    }
    size_t n_hot_rounds = is_quick ? 2 : 8, n_many_rounds = is_quick ? 1 : 2;

    char(*names)[NAME_SIZE] = malloc((size_t)N_MANY * NAME_SIZE);
    if (!names)
        die("no memory");
    make_names(names, N_MANY);
    const char(*all)[NAME_SIZE] = (const char(*)[NAME_SIZE])names;

    struct slab slab;
    struct l1 *hot = make_l1(&slab, N_HOT);
    fill(hot, all, N_HOT, true);
    double hot1 = measure(hot, all, N_HOT, 1, false, n_hot_rounds);
    double hot2 = measure(hot, all, N_HOT, 2, false, n_hot_rounds);
    double apart2 = measure(hot, all, N_HOT, 2, true, n_hot_rounds);
    empty(hot, all, N_HOT);
    l1_free(hot);
    free(slab.sessions);

    size_t before = resident_bytes();
    struct l1 *many = make_l1(&slab, N_MANY);
    fill(many, all, N_MANY, true);
    double bytes = (double)(resident_bytes() - before) / N_MANY;
    struct l1_stats stats;
    l1_stats(many, &stats);
    double index_bytes = (double)stats.bytes_index / N_MANY;
    double many1 = measure(many, all, N_MANY, 1, false, n_many_rounds);
    double many2 = measure(many, all, N_MANY, 2, false, n_many_rounds);
    double load = measure_dependent_load((size_t)N_MANY * sizeof(struct session), N_DRAWS * n_many_rounds);
    empty(many, all, N_MANY);
    l1_free(many);
    free(slab.sessions);
    free(names);

    if (is_json) {
        printf("{\"lookup_ns\": {\"sessions_1000\": {\"threads_1\": %.1f, \"threads_2\": %.1f, \"threads_2_apart\": "
               "%.1f}, "
               "\"sessions_1000000\": {\"threads_1\": %.1f, \"threads_2\": %.1f}}, "
               "\"speedup_2_threads\": {\"sessions_1000\": %.2f, \"sessions_1000_apart\": %.2f, \"sessions_1000000\": "
               "%.2f}, "
               "\"dependent_load_ns\": %.1f, \"lookup_per_load\": %.2f, "
               "\"bytes_per_session_2k\": %.1f, \"index_bytes_per_session\": %.1f}\n",
               hot1, hot2, apart2, many1, many2, hot1 / hot2, hot1 / apart2, many1 / many2, load, many1 / load, bytes,
               index_bytes);
        return 0;
    }
    printf("lookup, 1,000 sessions:       %6.1f ns, 2 threads %6.1f ns (x %.2f), apart %6.1f ns (x %.2f)\n", hot1, hot2,
           hot1 / hot2, apart2, hot1 / apart2);
    printf("lookup, 1,000,000 sessions:   %6.1f ns, 2 threads %6.1f ns (x %.2f)\n", many1, many2, many1 / many2);
    printf("dependent random load:        %6.1f ns; a lookup is %.2f of them\n", load, many1 / load);
    printf("memory of a cached 2 KB session: %.1f bytes (its page 4096, its struct 256, index %.1f)\n", bytes,
           index_bytes);
    return 0;
}
