#include "sessionfs/l1.h"

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SLOWDOWN 8u
#else
#define SLOWDOWN 1u
#endif

/* For inner loops: ck_assert() reports each success to the parent process. */
#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            ck_abort_msg("line %d: %s", __LINE__, #condition);                                                         \
    } while (0)

/* A small store. Whoever gives an entry its content holds a pin for it. */
struct session {
    struct l1_entry entry;
    pthread_mutex_t lock;
    /* guarded by lock */
    char *content;
    size_t size;
    bool is_dirty;
};

static struct l1 *l1;
static atomic_size_t n_alive, n_evict_calls;
static atomic_bool is_own_told = true;
static bool is_memory_out;

static void *make_session(void *owner)
{
    if (is_memory_out)
        return NULL;
    struct session *session = aligned_alloc(64, (sizeof(*session) + 63) / 64 * 64);
    memset(session, 0, sizeof(*session));
    pthread_mutex_init(&session->lock, NULL);
    atomic_fetch_add(&n_alive, 1);
    return session;
}

static void free_session(void *owner, struct l1_entry *entry)
{
    struct session *session = (struct session *)entry;
    CHECK(!session->content);
    CHECK(entry->name_size == 0);
    pthread_mutex_destroy(&session->lock);
    memset(session, 0xee, sizeof(*session));
    free(session);
    atomic_fetch_sub(&n_alive, 1);
}

/* True if there was one; the caller then drops the content's pin. */
static bool drop_content_locked(struct session *session)
{
    if (!session->content)
        return false;
    l1_set_resident(l1, &session->entry, false);
    l1_pages_put(l1, session->content, session->size);
    session->content = NULL;
    return true;
}

static bool evict_session(void *owner, struct l1_entry *entry)
{
    struct session *session = (struct session *)entry;
    atomic_fetch_add(&n_evict_calls, 1);
    if (pthread_mutex_trylock(&session->lock) != 0)
        return false;
    bool is_dropped = !session->is_dirty && drop_content_locked(session);
    pthread_mutex_unlock(&session->lock);
    if (is_dropped)
        l1_unpin(l1, entry);
    return is_dropped;
}

static void drop_content(struct session *session)
{
    pthread_mutex_lock(&session->lock);
    bool is_dropped = drop_content_locked(session);
    pthread_mutex_unlock(&session->lock);
    if (is_dropped)
        l1_unpin(l1, &session->entry);
}

/* False: no room. */
static bool give_content(struct session *session, size_t size)
{
    char *pages = l1_pages_get(l1, size);
    if (!pages)
        return false;
    for (size_t i = 0; i < size; i++)
        CHECK(pages[i] == 0);
    memset(pages, (int)((uintptr_t)session >> 6 | 1), size);
    pthread_mutex_lock(&session->lock);
    bool had_content = drop_content_locked(session);
    session->content = pages;
    session->size = size;
    if (is_own_told)
        l1_pages_own(l1, pages, size, &session->entry);
    if (!had_content)
        l1_pin(&session->entry);
    l1_set_resident(l1, &session->entry, true);
    pthread_mutex_unlock(&session->lock);
    return true;
}

static void make_l1(size_t n_pages)
{
    struct l1_config config = {
        .size = n_pages * L1_PAGE, .make = make_session, .release = free_session, .evict = evict_session};
    ck_assert_int_eq(l1_new(&l1, &config), 0);
}

static void set_up(void)
{
    make_l1(64);
}

static void free_l1(void)
{
    struct l1_stats stats;
    l1_stats(l1, &stats);
    ck_assert_uint_eq(stats.n_entries, 0);
    ck_assert_uint_eq(stats.bytes_used, 0);
    ck_assert_uint_eq(n_alive, 0);
    l1_free(l1);
}

static struct session *get(const char *name)
{
    bool is_new;
    struct l1_entry *entry = l1_get(l1, 1, name, strlen(name), &is_new);
    CHECK(entry);
    return (struct session *)entry;
}

static struct session *get_number(size_t i)
{
    char name[32];
    snprintf(name, sizeof(name), "session-%zu", i);
    return get(name);
}

static struct session *find(const char *name)
{
    return (struct session *)l1_find(l1, 1, name, strlen(name));
}

static struct session *find_number(size_t i)
{
    char name[32];
    snprintf(name, sizeof(name), "session-%zu", i);
    return find(name);
}

static void unpin(struct session *session)
{
    l1_unpin(l1, &session->entry);
}

/* A session that only its content keeps alive. False: no room. */
static bool cache(size_t i, size_t size)
{
    struct session *session = get_number(i);
    bool is_done = give_content(session, size);
    unpin(session);
    return is_done;
}

/* Drops what cache() left of sessions 0 to n-1; their number. */
static size_t uncache(size_t n)
{
    size_t n_found = 0;
    for (size_t i = 0; i < n; i++) {
        struct session *session = find_number(i);
        if (!session)
            continue;
        drop_content(session);
        unpin(session);
        n_found++;
    }
    return n_found;
}

static uint64_t draw(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

/* --- index --- */

START_TEST(find_returns_what_get_made)
{
    char name[L1_NAME_MAX];
    size_t size = (size_t)_i * 17;
    memset(name, 'n', sizeof(name));
    bool is_new;
    ck_assert_ptr_null(l1_find(l1, 7, name, size));
    struct l1_entry *made = l1_get(l1, 7, name, size, &is_new);
    ck_assert(is_new);
    ck_assert_uint_eq(made->name_size, size);
    ck_assert(size == 0 || memcmp(made->name, name, size) == 0);
    ck_assert_ptr_eq(l1_find(l1, 7, name, size), made);
    ck_assert_ptr_eq(l1_get(l1, 7, name, size, &is_new), made);
    ck_assert(!is_new);
    ck_assert_ptr_null(l1_find(l1, 8, name, size));
    if (size > 0)
        ck_assert_ptr_null(l1_find(l1, 7, name, size - 1));
    for (int i = 0; i < 3; i++)
        l1_unpin(l1, made);
    ck_assert_ptr_null(l1_find(l1, 7, name, size));
}
END_TEST

START_TEST(name_that_is_too_long_is_not_found)
{
    char name[L1_NAME_MAX + 1] = {0};
    ck_assert_ptr_null(l1_find(l1, 1, name, sizeof(name)));
}
END_TEST

START_TEST(without_memory_get_returns_nothing)
{
    bool is_new;
    char name[100] = {0};
    is_memory_out = true;
    ck_assert_ptr_null(l1_get(l1, 1, "a", 1, &is_new));
    ck_assert_ptr_null(l1_get(l1, 1, name, sizeof(name), &is_new));
    is_memory_out = false;
}
END_TEST

START_TEST(last_pin_takes_the_entry_out_and_frees_it)
{
    struct session *session = get("a");
    l1_pin(&session->entry);
    unpin(session);
    ck_assert_uint_eq(n_alive, 1);
    unpin(session);
    ck_assert_uint_eq(n_alive, 0);
    ck_assert_ptr_null(find("a"));
}
END_TEST

START_TEST(forgotten_entry_lives_while_it_is_pinned)
{
    struct session *old = get("a");
    ck_assert(l1_forget(l1, &old->entry));
    ck_assert(!l1_forget(l1, &old->entry));
    ck_assert_ptr_null(find("a"));
    struct session *new = get("a");
    ck_assert_ptr_ne(new, old);
    unpin(old);
    ck_assert_uint_eq(n_alive, 1);
    struct session *found = find("a");
    ck_assert_ptr_eq(found, new);
    unpin(found);
    unpin(new);
}
END_TEST

START_TEST(renamed_entry_is_found_by_its_new_name_only)
{
    char long_name[201], other_long_name[151];
    memset(long_name, 'x', 200);
    memset(other_long_name, 'y', 150);
    long_name[200] = other_long_name[150] = 0;
    const char *names[] = {"a", "b", long_name, other_long_name, "", long_name, "c"};
    struct session *session = get(names[0]);
    for (size_t i = 1; i < sizeof(names) / sizeof(names[0]); i++) {
        ck_assert_int_eq(l1_rename(l1, &session->entry, 1, names[i], strlen(names[i])), 0);
        ck_assert_ptr_null(find(names[i - 1]));
        ck_assert_ptr_eq(find(names[i]), session);
        unpin(session);
    }
    ck_assert_int_eq(l1_rename(l1, &session->entry, 2, "c", 1), 0);
    ck_assert_ptr_null(find("c"));
    unpin(session);
}
END_TEST

START_TEST(rename_takes_out_who_had_the_name)
{
    struct session *a = get("a"), *b = get("b");
    ck_assert_int_eq(l1_rename(l1, &a->entry, 1, "b", 1), 0);
    struct session *found = find("b");
    ck_assert_ptr_eq(found, a);
    ck_assert(!l1_forget(l1, &b->entry));
    unpin(found);
    unpin(a);
    unpin(b);
}
END_TEST

START_TEST(rename_to_its_own_name_changes_nothing)
{
    struct session *a = get("a");
    ck_assert_int_eq(l1_rename(l1, &a->entry, 1, "a", 1), 0);
    ck_assert_ptr_eq(find("a"), a);
    unpin(a);
    unpin(a);
}
END_TEST

START_TEST(rename_puts_a_forgotten_entry_back)
{
    struct session *a = get("a");
    l1_forget(l1, &a->entry);
    ck_assert_int_eq(l1_rename(l1, &a->entry, 1, "a", 1), 0);
    ck_assert_ptr_eq(find("a"), a);
    unpin(a);
    unpin(a);
    ck_assert_ptr_null(find("a"));
}
END_TEST

START_TEST(index_grows_and_shrinks_and_loses_nothing)
{
    size_t n = 200000 / SLOWDOWN;
    struct session **sessions = calloc(n, sizeof(*sessions));
    struct l1_stats stats;
    for (size_t i = 0; i < n; i++)
        sessions[i] = get_number(i);
    l1_stats(l1, &stats);
    ck_assert_uint_eq(stats.n_entries, n);
    size_t large = stats.bytes_index;
    ck_assert_uint_le(large, n * 24 + 64 * 1024);
    for (size_t i = 0; i < n; i++) {
        CHECK(find_number(i) == sessions[i]);
        unpin(sessions[i]);
    }
    CHECK(!find("session-x"));
    for (size_t i = 0; i < n; i++)
        if (i % 100 != 0)
            unpin(sessions[i]);
    l1_stats(l1, &stats);
    ck_assert_uint_eq(stats.n_entries, n / 100);
    ck_assert_uint_lt(stats.bytes_index, large / 2);
    for (size_t i = 0; i < n; i++) {
        struct session *found = find_number(i);
        CHECK(found == (i % 100 ? NULL : sessions[i]));
        if (found)
            unpin(found);
    }
    for (size_t i = 0; i < n; i += 100)
        unpin(sessions[i]);
    free(sessions);
}
END_TEST

#define N_WALKED 3000

static unsigned n_visits[N_WALKED];
static struct session *walked[N_WALKED], *added[N_WALKED * 20];
static size_t n_added;

static void count_and_add(void *arg, struct l1_entry *entry)
{
    size_t i;
    char name[64] = {0};
    memcpy(name, entry->name, entry->name_size);
    if (sscanf(name, "session-%zu", &i) != 1 || i >= N_WALKED)
        return;
    n_visits[i]++;
    for (size_t j = 0; j < 20 && n_added < N_WALKED * 20; j++, n_added++)
        added[n_added] = get_number(N_WALKED + n_added);
}

START_TEST(walk_visits_each_entry_once_though_the_index_grows)
{
    for (size_t i = 0; i < N_WALKED; i++)
        walked[i] = get_number(i);
    l1_walk(l1, count_and_add, NULL);
    for (size_t i = 0; i < N_WALKED; i++) {
        CHECK(n_visits[i] == 1);
        unpin(walked[i]);
    }
    for (size_t i = 0; i < n_added; i++)
        unpin(added[i]);
}
END_TEST

static void count_and_drop(void *arg, struct l1_entry *entry)
{
    size_t *n = arg;
    (*n)++;
    l1_forget(l1, entry);
    l1_unpin(l1, entry);
}

START_TEST(walk_may_drop_what_it_visits_though_the_index_shrinks)
{
    size_t n_visited = 0;
    for (size_t i = 0; i < 5000; i++)
        get_number(i);
    l1_walk(l1, count_and_drop, &n_visited);
    ck_assert_uint_eq(n_visited, 5000);
    ck_assert_uint_eq(n_alive, 0);
}
END_TEST

/* --- arena --- */

START_TEST(bad_configuration_is_refused)
{
    struct l1_config config = {.make = make_session, .release = free_session, .evict = evict_session};
    struct l1 *none = NULL;
    ck_assert_int_eq(l1_new(&none, &config), -EINVAL);
    config.size = 1;
    config.evict = NULL;
    ck_assert_int_eq(l1_new(&none, &config), -EINVAL);
    ck_assert_ptr_null(none);
    l1_free(NULL);
}
END_TEST

START_TEST(freed_pages_are_wiped)
{
    /* from one page to what is given back to the system */
    static const size_t sizes[] = {1, 2048, 4096, 4097, 2 << 20, (16 << 20) - 1, 16 << 20, (32 << 20) + 5};
    size_t size = sizes[_i];
    l1_free(l1);
    make_l1((size + L1_PAGE - 1) / L1_PAGE);
    char *pages = l1_pages_get(l1, size);
    ck_assert_ptr_nonnull(pages);
    ck_assert_uint_eq((uintptr_t)pages % L1_PAGE, 0);
    memset(pages, 's', size);
    l1_pages_put(l1, pages, size);
    for (size_t i = 0; i < size; i++)
        CHECK(pages[i] == 0); /* still mapped: the arena's own memory */
    ck_assert_ptr_eq(l1_pages_get(l1, size), pages);
    l1_pages_put(l1, pages, size);
}
END_TEST

START_TEST(whole_arena_can_be_one_run_but_not_more)
{
    char *pages = l1_pages_get(l1, 64 * L1_PAGE);
    ck_assert_ptr_nonnull(pages);
    ck_assert_ptr_null(l1_pages_get(l1, 1));
    l1_pages_put(l1, pages, 64 * L1_PAGE);
    ck_assert_ptr_null(l1_pages_get(l1, 64 * L1_PAGE + 1));
    ck_assert_ptr_null(l1_pages_get(l1, SIZE_MAX));
}
END_TEST

START_TEST(every_page_of_any_arena_can_be_had)
{
    size_t n = (size_t)_i;
    l1_free(l1);
    make_l1(n);
    char **pages = calloc(n, sizeof(*pages));
    for (size_t i = 0; i < n; i++) {
        pages[i] = l1_pages_get(l1, 1);
        CHECK(pages[i]);
        *pages[i] = 1;
    }
    ck_assert_ptr_null(l1_pages_get(l1, 1));
    for (size_t i = 0; i < n; i++)
        l1_pages_put(l1, pages[i], 1);
    free(pages);
    char *all = l1_pages_get(l1, n * L1_PAGE);
    ck_assert_ptr_nonnull(all);
    l1_pages_put(l1, all, n * L1_PAGE);
}
END_TEST

#define MODEL_PAGES 700
#define MODEL_RUNS  300

static bool model_has_room(const uint16_t *owners, size_t n)
{
    size_t n_free = 0;
    for (size_t i = 0; i < MODEL_PAGES && n_free < n; i++)
        n_free = owners[i] ? 0 : n_free + 1;
    return n_free >= n;
}

START_TEST(runs_never_overlap_and_are_found_whenever_there_is_room)
{
    static uint16_t owners[MODEL_PAGES];
    static struct {
        char *pages;
        size_t size;
    } runs[MODEL_RUNS];
    static const size_t sizes[] = {1, 1, 3, 70, 200};
    uint64_t state = (uint64_t)_i;
    l1_free(l1);
    make_l1(MODEL_PAGES);
    char *whole = l1_pages_get(l1, MODEL_PAGES * L1_PAGE);
    l1_pages_put(l1, whole, MODEL_PAGES * L1_PAGE);
    for (unsigned step = 0; step < 20000 / SLOWDOWN; step++) {
        size_t r = draw(&state) % MODEL_RUNS, n = 1 + draw(&state) % sizes[draw(&state) % 5];
        if (runs[r].pages) {
            size_t at = (size_t)(runs[r].pages - whole) / L1_PAGE, size = runs[r].size;
            for (size_t p = at; p < at + (size + L1_PAGE - 1) / L1_PAGE; p++) {
                CHECK(owners[p] == r + 1 && *(uint16_t *)(whole + p * L1_PAGE) == r + 1);
                owners[p] = 0;
            }
            l1_pages_put(l1, runs[r].pages, size);
            runs[r].pages = NULL;
            continue;
        }
        runs[r].size = n * L1_PAGE - draw(&state) % L1_PAGE;
        runs[r].pages = l1_pages_get(l1, runs[r].size);
        CHECK((runs[r].pages != NULL) == model_has_room(owners, n));
        if (!runs[r].pages)
            continue;
        size_t at = (size_t)(runs[r].pages - whole) / L1_PAGE;
        CHECK(runs[r].pages >= whole && at + n <= MODEL_PAGES);
        for (size_t p = at; p < at + n; p++) {
            CHECK(owners[p] == 0 && *(uint16_t *)(whole + p * L1_PAGE) == 0);
            owners[p] = *(uint16_t *)(whole + p * L1_PAGE) = (uint16_t)(r + 1);
        }
    }
    for (size_t r = 0; r < MODEL_RUNS; r++)
        if (runs[r].pages)
            l1_pages_put(l1, runs[r].pages, runs[r].size);
}
END_TEST

static size_t shared_resident_pages(void)
{
    unsigned long size, resident, shared;
    FILE *f = fopen("/proc/self/statm", "re");
    ck_assert_int_eq(fscanf(f, "%lu %lu %lu", &size, &resident, &shared), 3);
    fclose(f);
    return shared;
}

START_TEST(memory_that_was_never_used_is_never_touched)
{
    l1_free(l1);
    size_t before = shared_resident_pages();
    make_l1(1 << 18); /* 1 GiB */
    char *pages = l1_pages_get(l1, 1);
    *pages = 1;
    ck_assert_uint_lt(shared_resident_pages() - before, 256);
    l1_pages_put(l1, pages, 1);
}
END_TEST

START_TEST(very_large_runs_give_their_memory_back)
{
    l1_free(l1);
    make_l1(1 << 14); /* 64 MiB */
    size_t before = shared_resident_pages();
    char *pages = l1_pages_get(l1, 64 << 20);
    memset(pages, 1, 64 << 20);
    ck_assert_uint_gt(shared_resident_pages() - before, 16000);
    l1_pages_put(l1, pages, 64 << 20);
    ck_assert_uint_lt(shared_resident_pages() - before, 256);
}
END_TEST

START_TEST(arena_is_left_out_of_core_dumps)
{
    char line[512];
    bool is_arena = false, is_excluded = false;
    FILE *f = fopen("/proc/self/smaps", "re");
    while (fgets(line, sizeof(line), f)) {
        if (strchr(line, '-') && strstr(line, " rw-s "))
            is_arena = strstr(line, "sessionfs-l1") != NULL;
        if (is_arena && strncmp(line, "VmFlags:", 8) == 0) {
            is_excluded = strstr(line, " dd") != NULL;
            is_arena = false;
        }
    }
    fclose(f);
    ck_assert(is_excluded);
}
END_TEST

/* --- eviction --- */

START_TEST(full_arena_makes_room_by_evicting)
{
    struct l1_stats stats;
    for (size_t i = 0; i < 200; i++)
        CHECK(cache(i, 2048));
    l1_stats(l1, &stats);
    ck_assert_uint_eq(stats.n_evictions, 200 - 64);
    ck_assert_uint_eq(stats.n_entries, 64);
    ck_assert_uint_eq(stats.bytes_used, stats.bytes_total);
    ck_assert_uint_eq(uncache(200), 64);
}
END_TEST

START_TEST(scan_does_not_flush_what_is_used)
{
    for (size_t i = 0; i < 32; i++)
        CHECK(cache(i, 2048));
    for (size_t i = 100; i < 2000; i++) {
        struct session *hot = find_number(i % 32);
        CHECK(hot);
        unpin(hot);
        CHECK(cache(i, 2048)); /* the scan: nobody asks for it again */
    }
    ck_assert_uint_eq(uncache(32), 32);
    uncache(2000);
}
END_TEST

START_TEST(what_evict_refuses_stays_and_the_search_ends)
{
    for (size_t i = 0; i < 64; i++) {
        CHECK(cache(i, 2048));
        struct session *session = find_number(i);
        session->is_dirty = true;
        unpin(session);
    }
    n_evict_calls = 0;
    ck_assert_ptr_null(l1_pages_get(l1, 1));
    ck_assert_uint_ge(n_evict_calls, 64);
    ck_assert_uint_le(n_evict_calls, 128);
    ck_assert_ptr_null(l1_pages_get(l1, 3 * L1_PAGE));

    struct session *clean = find_number(40);
    clean->is_dirty = false;
    unpin(clean);
    char *pages = l1_pages_get(l1, 1);
    ck_assert_ptr_nonnull(pages);
    ck_assert_ptr_null(find_number(40));
    l1_pages_put(l1, pages, 1);
    ck_assert_uint_eq(uncache(64), 63);
}
END_TEST

START_TEST(all_are_tried_though_all_are_used)
{
    for (size_t i = 0; i < 64; i++) {
        CHECK(cache(i, 2048));
        struct session *session = find_number(i);
        session->is_dirty = i != 63;
        unpin(session);
    }
    char *pages = l1_pages_get(l1, 1);
    ck_assert_ptr_nonnull(pages);
    ck_assert_ptr_null(find_number(63));
    l1_pages_put(l1, pages, 1);
    uncache(64);
}
END_TEST

START_TEST(entry_that_goes_while_the_hand_is_on_it_does_no_harm)
{
    uint64_t state = 5;
    for (size_t i = 0; i < 5000; i++) {
        CHECK(cache(i % 300, 2048));
        struct session *session = find_number(draw(&state) % 300);
        if (!session)
            continue;
        l1_forget(l1, &session->entry);
        if (draw(&state) % 2)
            drop_content(session);
        else if (evict_session(NULL, &session->entry))
            ck_assert_ptr_nonnull(session);
        unpin(session);
    }
    uncache(300);
}
END_TEST

/* Pages in an order of their own: 0..n-1 shuffled, so that eviction in order of age scatters. */
static void cache_scattered(size_t n)
{
    uint64_t state = 11;
    char **pages = calloc(n, sizeof(*pages));
    for (size_t i = 0; i < n; i++)
        pages[i] = l1_pages_get(l1, 1);
    for (size_t i = n; i > 1; i--) {
        size_t j = draw(&state) % i;
        char *other = pages[j];
        pages[j] = pages[i - 1];
        pages[i - 1] = other;
    }
    for (size_t i = 0; i < n; i++) {
        l1_pages_put(l1, pages[i], 1);
        CHECK(cache(i, 2048));
    }
    free(pages);
}

START_TEST(large_run_evicts_neighbours_not_everybody)
{
    l1_free(l1);
    make_l1(4096);
    cache_scattered(4096);
    char *runs[4];
    for (size_t i = 0; i < 4; i++) {
        runs[i] = l1_pages_get(l1, 2 << 20);
        ck_assert_ptr_nonnull(runs[i]);
    }
    for (size_t i = 0; i < 4; i++)
        l1_pages_put(l1, runs[i], 2 << 20);
    ck_assert_uint_gt(uncache(4096), 4096 - 4 * (512 + 8) - 1);
}
END_TEST

START_TEST(large_run_avoids_what_must_stay)
{
    l1_free(l1);
    make_l1(4096);
    cache_scattered(4096);
    struct session *dirty = find_number(77);
    dirty->is_dirty = true;
    size_t n_runs = 0;
    char *runs[8];
    for (; n_runs < 8 && (runs[n_runs] = l1_pages_get(l1, 2 << 20)); n_runs++)
        memset(runs[n_runs], 1, 2 << 20);
    ck_assert_uint_ge(n_runs, 6);
    ck_assert_ptr_nonnull(dirty->content);
    ck_assert_int_eq(dirty->content[2047], dirty->content[0]);
    ck_assert_int_ne(dirty->content[0], 0);
    unpin(dirty);
    for (size_t i = 0; i < n_runs; i++)
        l1_pages_put(l1, runs[i], 2 << 20);
    uncache(4096);
}
END_TEST

START_TEST(large_run_is_found_though_nobody_told_whose_pages_they_are)
{
    is_own_told = false;
    l1_free(l1);
    make_l1(1024);
    cache_scattered(1024);
    char *run = l1_pages_get(l1, 1024 * L1_PAGE);
    ck_assert_ptr_nonnull(run);
    l1_pages_put(l1, run, 1024 * L1_PAGE);
    ck_assert_uint_eq(uncache(1024), 0);
}
END_TEST

START_TEST(large_contents_do_not_evict_each_other_in_turn)
{
    l1_free(l1);
    make_l1(4096);
    cache_scattered(4096);
    for (size_t i = 0; i < 4; i++)
        CHECK(cache(10000 + i, 2 << 20));
    for (size_t i = 0; i < 4; i++) {
        struct session *large = find_number(10000 + i);
        ck_assert_ptr_nonnull(large);
        drop_content(large);
        unpin(large);
    }
    uncache(4096);
}
END_TEST

/* --- threads --- */

#define N_THREADS 4
#define N_NAMES   48

static void check_content(struct session *session)
{
    pthread_mutex_lock(&session->lock);
    char expected = (char)((uintptr_t)session >> 6 | 1);
    for (size_t i = 0; session->content && i < session->size; i += 512)
        CHECK(session->content[i] == expected);
    pthread_mutex_unlock(&session->lock);
}

static void *hammer(void *arg)
{
    uint64_t state = (uint64_t)(uintptr_t)arg;
    for (unsigned step = 0; step < 100000 / SLOWDOWN; step++) {
        char name[80];
        struct session *session =
            draw(&state) % 2 ? get_number(draw(&state) % N_NAMES) : find_number(draw(&state) % N_NAMES);
        if (!session)
            continue;
        switch (draw(&state) % 16) {
        case 0:
            l1_forget(l1, &session->entry);
            break;
        case 1:
            snprintf(name, sizeof(name), "session-%zu", (size_t)(draw(&state) % N_NAMES));
            CHECK(l1_rename(l1, &session->entry, 1, name, strlen(name)) == 0);
            break;
        case 2: /* a long name */
            snprintf(name, sizeof(name), "%060zu", (size_t)(draw(&state) % N_NAMES));
            CHECK(l1_rename(l1, &session->entry, 1, name, strlen(name)) == 0);
            break;
        case 3:
            drop_content(session);
            break;
        case 4:
        case 5:
        case 6:
        case 7:
            (void)give_content(session, 1 + draw(&state) % (draw(&state) % 4 ? L1_PAGE : 5 * L1_PAGE));
            break;
        default:
            check_content(session);
        }
        unpin(session);
    }
    return NULL;
}

static void drop_all(void *arg, struct l1_entry *entry)
{
    drop_content((struct session *)entry);
}

static void check_one(void *arg, struct l1_entry *entry)
{
    check_content((struct session *)entry);
}

static void *walk_often(void *arg)
{
    atomic_bool *is_over = arg;
    size_t n = 0;
    struct l1_stats stats;
    while (!atomic_load(is_over)) {
        l1_walk(l1, n++ % 8 ? check_one : drop_all, NULL);
        l1_stats(l1, &stats);
        CHECK(stats.bytes_used <= stats.bytes_total);
    }
    return NULL;
}

/* Forgotten entries with content are reachable by eviction alone. */
static void evict_everything(size_t n_pages)
{
    char *all = l1_pages_get(l1, n_pages * L1_PAGE);
    ck_assert_ptr_nonnull(all);
    l1_pages_put(l1, all, n_pages * L1_PAGE);
}

START_TEST(threads_that_do_everything_at_once_break_nothing)
{
    pthread_t threads[N_THREADS], walker;
    atomic_bool is_over = false;
    l1_free(l1);
    make_l1(24);
    pthread_create(&walker, NULL, walk_often, &is_over);
    for (uintptr_t i = 0; i < N_THREADS; i++)
        pthread_create(&threads[i], NULL, hammer, (void *)(i + 1));
    for (size_t i = 0; i < N_THREADS; i++)
        pthread_join(threads[i], NULL);
    atomic_store(&is_over, true);
    pthread_join(walker, NULL);
    evict_everything(24);
}
END_TEST

static atomic_bool is_replacing;

static void *find_target(void *arg)
{
    while (atomic_load(&is_replacing)) {
        struct session *target = find("target");
        CHECK(target);
        unpin(target);
    }
    return NULL;
}

START_TEST(name_that_is_replaced_by_rename_is_always_there)
{
    pthread_t threads[N_THREADS];
    struct session *target = get("target");
    is_replacing = true;
    for (size_t i = 0; i < N_THREADS; i++)
        pthread_create(&threads[i], NULL, find_target, NULL);
    for (size_t i = 0; i < 4000; i++) {
        struct session *new = get_number(i % 1000);
        CHECK(l1_rename(l1, &new->entry, 1, "target", 6) == 0);
        unpin(target);
        target = new;
    }
    is_replacing = false;
    for (size_t i = 0; i < N_THREADS; i++)
        pthread_join(threads[i], NULL);
    unpin(target);
}
END_TEST

static void *make_many(void *arg)
{
    size_t from = *(size_t *)arg, n = 40000 / SLOWDOWN;
    for (size_t i = from; i < from + n; i++) {
        get_number(i); /* the pin stays */
        struct session *session = find_number(from + (i - from) / 2);
        CHECK(session);
        unpin(session);
    }
    for (size_t i = from; i < from + n; i++) {
        struct session *session = find_number(i);
        CHECK(session);
        unpin(session);
        unpin(session);
    }
    return NULL;
}

START_TEST(nothing_is_missed_while_the_index_grows_and_shrinks)
{
    pthread_t threads[N_THREADS];
    size_t from[N_THREADS];
    for (size_t i = 0; i < N_THREADS; i++) {
        from[i] = i * 1000000;
        pthread_create(&threads[i], NULL, make_many, &from[i]);
    }
    for (size_t i = 0; i < N_THREADS; i++)
        pthread_join(threads[i], NULL);
}
END_TEST

#define N_CROWD 300

static pthread_barrier_t crowd_is_there;

static void *find_in_crowd(void *arg)
{
    struct session *first = find("a");
    pthread_barrier_wait(&crowd_is_there);
    struct session *second = find("a");
    bool is_same = first && first == second;
    unpin(first);
    unpin(second);
    return is_same ? first : NULL;
}

START_TEST(more_threads_than_reader_slots_find_as_well)
{
    pthread_t threads[N_CROWD];
    struct session *session = get("a");
    for (int round = 0; round < 2; round++) {
        pthread_barrier_init(&crowd_is_there, NULL, N_CROWD);
        for (size_t i = 0; i < N_CROWD; i++)
            ck_assert_int_eq(pthread_create(&threads[i], NULL, find_in_crowd, NULL), 0);
        for (size_t i = 0; i < N_CROWD; i++) {
            void *result;
            pthread_join(threads[i], &result);
            CHECK(result == session);
        }
        pthread_barrier_destroy(&crowd_is_there);
    }
    unpin(session);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("l1");
    TCase *index = tcase_create("index");
    tcase_add_checked_fixture(index, set_up, free_l1);
    tcase_add_loop_test(index, find_returns_what_get_made, 0, 16);
    tcase_add_test(index, name_that_is_too_long_is_not_found);
    tcase_add_test(index, without_memory_get_returns_nothing);
    tcase_add_test(index, last_pin_takes_the_entry_out_and_frees_it);
    tcase_add_test(index, forgotten_entry_lives_while_it_is_pinned);
    tcase_add_test(index, renamed_entry_is_found_by_its_new_name_only);
    tcase_add_test(index, rename_takes_out_who_had_the_name);
    tcase_add_test(index, rename_to_its_own_name_changes_nothing);
    tcase_add_test(index, rename_puts_a_forgotten_entry_back);
    tcase_add_test(index, index_grows_and_shrinks_and_loses_nothing);
    tcase_add_test(index, walk_visits_each_entry_once_though_the_index_grows);
    tcase_add_test(index, walk_may_drop_what_it_visits_though_the_index_shrinks);
    tcase_set_timeout(index, 60);
    suite_add_tcase(suite, index);

    TCase *arena = tcase_create("arena");
    tcase_add_checked_fixture(arena, set_up, free_l1);
    tcase_add_test(arena, bad_configuration_is_refused);
    tcase_add_loop_test(arena, freed_pages_are_wiped, 0, 8);
    tcase_add_test(arena, whole_arena_can_be_one_run_but_not_more);
    tcase_add_loop_test(arena, every_page_of_any_arena_can_be_had, 1, 10);
    tcase_add_loop_test(arena, every_page_of_any_arena_can_be_had, 62, 67);
    tcase_add_loop_test(arena, every_page_of_any_arena_can_be_had, 4095, 4098);
    tcase_add_loop_test(arena, runs_never_overlap_and_are_found_whenever_there_is_room, 0, 4);
    tcase_add_test(arena, memory_that_was_never_used_is_never_touched);
    tcase_add_test(arena, very_large_runs_give_their_memory_back);
    tcase_add_test(arena, arena_is_left_out_of_core_dumps);
    tcase_set_timeout(arena, 60);
    suite_add_tcase(suite, arena);

    TCase *eviction = tcase_create("eviction");
    tcase_add_checked_fixture(eviction, set_up, free_l1);
    tcase_add_test(eviction, full_arena_makes_room_by_evicting);
    tcase_add_test(eviction, scan_does_not_flush_what_is_used);
    tcase_add_test(eviction, what_evict_refuses_stays_and_the_search_ends);
    tcase_add_test(eviction, all_are_tried_though_all_are_used);
    tcase_add_test(eviction, entry_that_goes_while_the_hand_is_on_it_does_no_harm);
    tcase_add_test(eviction, large_run_evicts_neighbours_not_everybody);
    tcase_add_test(eviction, large_run_avoids_what_must_stay);
    tcase_add_test(eviction, large_run_is_found_though_nobody_told_whose_pages_they_are);
    tcase_add_test(eviction, large_contents_do_not_evict_each_other_in_turn);
    tcase_set_timeout(eviction, 60);
    suite_add_tcase(suite, eviction);

    TCase *threads = tcase_create("threads");
    tcase_add_checked_fixture(threads, set_up, free_l1);
    tcase_add_test(threads, threads_that_do_everything_at_once_break_nothing);
    tcase_add_test(threads, name_that_is_replaced_by_rename_is_always_there);
    tcase_add_test(threads, nothing_is_missed_while_the_index_grows_and_shrinks);
    tcase_add_test(threads, more_threads_than_reader_slots_find_as_well);
    tcase_set_timeout(threads, 120);
    suite_add_tcase(suite, threads);
    return suite;
}

int main(void)
{
    SRunner *runner = srunner_create(make_suite());
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
