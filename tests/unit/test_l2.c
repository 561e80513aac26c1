#include <sessionfs/l2.h>

#include <check.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "base/log.h"
#include "base/macros.h"
#include "redis_server.h"

#define TIMEOUT_MS 400 /* of l2, where a test waits for it */
#define PATIENT_MS 5000
#define PIECE      (256u * 1024u)

static struct server server;
static struct l2 *l2;
static char why[512];

/* ---- what l2 reports ---- */

static struct {
    pthread_mutex_t lock;
    char keys[4096][32];
    unsigned n_keys;
    _Atomic unsigned n_link_lost, n_all_lost, n_recovered, last_link;
} heard = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void on_invalidated(void *owner, const char *key, size_t size)
{
    pthread_mutex_lock(&heard.lock);
    if (heard.n_keys < ARRAY_SIZE(heard.keys))
        snprintf(heard.keys[heard.n_keys++], sizeof(heard.keys[0]), "%.*s", (int)size, key ? key : "");
    pthread_mutex_unlock(&heard.lock);
}

static void on_link_lost(void *owner, unsigned link)
{
    heard.last_link = link;
    heard.n_link_lost++;
}

static void on_all_lost(void *owner)
{
    heard.n_all_lost++;
}

static void on_recovered(void *owner)
{
    heard.n_recovered++;
}

/* How often @key was reported. */
static unsigned n_heard(const char *key)
{
    unsigned n = 0;

    pthread_mutex_lock(&heard.lock);
    for (unsigned i = 0; i < heard.n_keys; i++)
        n += strcmp(heard.keys[i], key) == 0;
    pthread_mutex_unlock(&heard.lock);
    return n;
}

static void forget_heard(void)
{
    pthread_mutex_lock(&heard.lock);
    heard.n_keys = 0;
    pthread_mutex_unlock(&heard.lock);
}

/* ---- commands that are waited for ---- */

struct call {
    struct l2_op op;
    _Atomic bool is_done;
    unsigned n_done;
    unsigned char *bytes;
    size_t n_bytes, total;
    unsigned n_pieces;
    bool is_odd; /* pieces that do not fit */
    char keys[64][64];
    unsigned n_keys;
    uint64_t cursor;
};

static void on_done(struct l2_op *op)
{
    struct call *call = CONTAINER_OF(op, struct call, op);

    if (op->scan) {
        call->cursor = op->scan->cursor;
        for (size_t i = 0; i < op->scan->n_keys && call->n_keys < ARRAY_SIZE(call->keys); i++)
            snprintf(call->keys[call->n_keys++], sizeof(call->keys[0]), "%.*s", (int)op->scan->key_sizes[i],
                     op->scan->keys[i] ? op->scan->keys[i] : "");
    }
    call->n_done++;
    atomic_store(&call->is_done, true);
}

static void on_data(struct l2_op *op, const void *bytes, size_t size, size_t total)
{
    struct call *call = CONTAINER_OF(op, struct call, op);

    if (call->n_pieces && call->total != total)
        call->is_odd = true;
    call->total = total;
    call->n_pieces++;
    if (call->n_bytes + size > total || total > 64u << 20) {
        call->is_odd = true;
        return;
    }
    if (!call->bytes)
        call->bytes = malloc(total + 1);
    memcpy(call->bytes + call->n_bytes, bytes, size);
    call->n_bytes += size;
}

static void call_init(struct call *call, bool wants_data)
{
    free(call->bytes);
    memset(call, 0, sizeof(*call));
    call->op.done = on_done;
    call->op.data = wants_data ? on_data : NULL;
}

static bool is_done(struct call *call)
{
    return atomic_load(&call->is_done);
}

static int result_of(struct call *call)
{
    WAIT_UNTIL(is_done(call));
    return call->op.result;
}

static void call_deinit(struct call *call)
{
    free(call->bytes);
    call->bytes = NULL;
}

static void begin_read(struct call *call, const char *key, size_t size)
{
    call_init(call, true);
    l2_read(l2, &call->op, key, strlen(key), size);
}

static int read_key(struct call *call, const char *key, size_t size)
{
    begin_read(call, key, size);
    return result_of(call);
}

/* 0, or what reading @key gives. */
static int touch_key(const char *key)
{
    struct call call = {0};
    int r = read_key(&call, key, L2_READ_ALL);

    call_deinit(&call);
    return r;
}

static void write_parts(struct call *call, const void *bytes, size_t size)
{
    for (size_t done = 0; done < size;) {
        size_t n = min_u64(PIECE, size - done);
        void *buffer = l2_buffer_get(l2, n);
        memcpy(buffer, (const char *)bytes + done, n);
        l2_write_part(l2, &call->op, buffer, n);
        done += n;
    }
}

static void begin_write(struct call *call, const char *key, const void *bytes, size_t size, uint64_t ttl_ms,
                        enum l2_condition condition)
{
    call_init(call, false);
    l2_write_begin(l2, &call->op, key, strlen(key), size, ttl_ms, condition);
    write_parts(call, bytes, size);
    l2_write_end(l2, &call->op);
}

static int write_key(const char *key, const char *text, uint64_t ttl_ms, enum l2_condition condition)
{
    struct call call = {0};

    begin_write(&call, key, text, strlen(text), ttl_ms, condition);
    return result_of(&call);
}

static int remove_key(const char *key)
{
    struct call call = {0};

    call_init(&call, false);
    l2_remove(l2, &call.op, key, strlen(key));
    return result_of(&call);
}

static int expire_key(const char *key, uint64_t ttl_ms)
{
    struct call call = {0};

    call_init(&call, false);
    l2_expire(l2, &call.op, key, strlen(key), ttl_ms);
    return result_of(&call);
}

static bool holds(const struct call *call, const void *bytes, size_t size)
{
    return !call->is_odd && call->n_bytes == size && call->total == size && memcmp(call->bytes, bytes, size) == 0;
}

/* Bytes that tell where they are from. */
static unsigned char *pattern(size_t size, unsigned seed)
{
    unsigned char *bytes = malloc(size + 1);
    uint32_t z = seed * 2654435761u + 1;

    for (size_t i = 0; i < size; i++) {
        z = z * 1664525 + 1013904223;
        bytes[i] = (unsigned char)(z >> 24);
    }
    return bytes;
}

/* A key whose link is @link. */
static const char *key_on_link(unsigned link, char key[32])
{
    for (unsigned i = 0;; i++) {
        snprintf(key, 32, "key:%u", i);
        if (l2_link_of(l2, key, strlen(key)) == link)
            return key;
    }
}

/* ---- start ---- */

static int try_l2_at(const struct l2_address *address, unsigned n_links, unsigned timeout_ms)
{
    struct l2_config config = {
        .address = *address,
        .n_links = n_links,
        .timeout_ms = timeout_ms,
        .invalidated = on_invalidated,
        .link_lost = on_link_lost,
        .all_lost = on_all_lost,
        .recovered = on_recovered,
    };

    ck_assert_int_eq(l2_new(&l2, &config), 0);
    return l2_start(l2, why, sizeof(why));
}

static void start_l2(unsigned n_links, unsigned timeout_ms)
{
    int r = try_l2_at(&(struct l2_address){.path = server.path}, n_links, timeout_ms);

    ck_assert_msg(r == 0, "%s", why);
}

static void set_up_server(void)
{
    server_start(&server, NULL, NULL);
}

static void set_up(void)
{
    set_up_server();
    start_l2(3, PATIENT_MS);
}

static void set_up_hasty(void)
{
    set_up_server();
    start_l2(2, TIMEOUT_MS);
}

static void tear_down(void)
{
    l2_free(l2);
    l2 = NULL;
    server_end(&server);
}

/* ---- reading and writing ---- */

START_TEST(absent_key_is_enoent)
{
    struct call call = {0};

    ck_assert_int_eq(read_key(&call, "nothing", L2_READ_ALL), -ENOENT);
    ck_assert_uint_eq(call.n_pieces, 0);
    ck_assert_int_eq(read_key(&call, "nothing", 100), -ENOENT);
    ck_assert_uint_eq(call.n_pieces, 0);
    ck_assert_uint_eq(call.op.generation, l2_generation(l2, l2_link_of(l2, "nothing", 7)));
}
END_TEST

START_TEST(read_gives_value_and_remaining_time)
{
    struct call call = {0};

    server_do(&server, "SET a hello");
    ck_assert_int_eq(read_key(&call, "a", L2_READ_ALL), 0);
    ck_assert(holds(&call, "hello", 5));
    ck_assert_int_eq(call.op.pttl_ms, -1);
    server_do(&server, "PEXPIRE a 100000");
    ck_assert_int_eq(read_key(&call, "a", 4), 0);
    ck_assert(holds(&call, "hell", 4));
    ck_assert_int_gt(call.op.pttl_ms, 50000);
    ck_assert_int_le(call.op.pttl_ms, 100000);
    call_deinit(&call);
}
END_TEST

START_TEST(read_without_data_callback_gives_result_alone)
{
    struct call call = {0};

    server_do(&server, "SET a hello");
    call_init(&call, false);
    l2_read(l2, &call.op, "a", 1, L2_READ_ALL);
    ck_assert_int_eq(result_of(&call), 0);
}
END_TEST

/* Was it there (with 50 s to live)? TTL, condition -> result, and how long it has to live then (s; -1 for ever). */
static const struct {
    bool is_there;
    uint64_t ttl_ms;
    enum l2_condition condition;
    int result;
    int left_s;
} writes[] = {
    {false, L2_TTL_NONE, L2_ALWAYS, 0, -1},
    {true, L2_TTL_NONE, L2_ALWAYS, 0, -1},
    {false, 90000, L2_ALWAYS, 0, 90},
    {true, 90000, L2_ALWAYS, 0, 90},
    {false, L2_TTL_KEEP, L2_ALWAYS, 0, -1},
    {true, L2_TTL_KEEP, L2_ALWAYS, 0, 50},
    {false, 90000, L2_IF_ABSENT, 0, 90},
    {true, 90000, L2_IF_ABSENT, -EEXIST, 50},
    {false, L2_TTL_NONE, L2_IF_ABSENT, 0, -1},
    {true, L2_TTL_NONE, L2_IF_ABSENT, -EEXIST, 50},
    {false, 90000, L2_IF_PRESENT, -ENOENT, 0},
    {true, 90000, L2_IF_PRESENT, 0, 90},
    {false, L2_TTL_KEEP, L2_IF_PRESENT, -ENOENT, 0},
    {true, L2_TTL_KEEP, L2_IF_PRESENT, 0, 50},
    {false, L2_TTL_NONE, L2_IF_PRESENT, -ENOENT, 0},
    {true, L2_TTL_NONE, L2_IF_PRESENT, 0, -1},
};

START_TEST(write_obeys_time_and_condition_and_echoes_what_is_there)
{
    static const char before[] = "was here before, from 24: [0123456789abcdef]",
                      after[] = "is now here: 0123456789.ABCDEFGHIJKLMNOP";
    struct call call = {0};
    bool is_there = writes[_i].is_there, is_written = writes[_i].result == 0;

    if (is_there)
        server_do(&server, "SET a %s PX 50000", before);
    begin_write(&call, "a", after, strlen(after), writes[_i].ttl_ms, writes[_i].condition);
    ck_assert_int_eq(result_of(&call), writes[_i].result);

    const char *now = is_written ? after : is_there ? before : "";
    ck_assert_uint_eq(call.op.n_echo, is_written || is_there ? 16 : 0);
    if (call.op.n_echo)
        ck_assert_mem_eq(call.op.echo, now + 24, 16);
    ck_assert_uint_eq(call.op.generation, l2_generation(l2, l2_link_of(l2, "a", 1)));
    redisReply *value = server_reply(&server, "GET a");
    ck_assert_str_eq(value->str ? value->str : "", now);
    freeReplyObject(value);
    long long left_ms = server_do(&server, "PTTL a");
    if (writes[_i].left_s < 0)
        ck_assert_int_eq(left_ms, -1);
    else if (writes[_i].left_s > 0)
        ck_assert(left_ms > writes[_i].left_s * 1000 - 20000 && left_ms <= writes[_i].left_s * 1000);
    else
        ck_assert_int_eq(left_ms, -2);
}
END_TEST

static const size_t sizes[] = {
    1,      2,      39,     40,     16382,  16383,   16384,       16385,         20000,     262143,
    262144, 262145, 266239, 266240, 266241, 1000000, 1024 * 1024, 3 * PIECE - 1, 3 * PIECE, 4u << 20,
};

START_TEST(values_of_any_size_arrive_whole)
{
    size_t size = sizes[_i];
    unsigned char *bytes = pattern(size, (unsigned)_i);
    struct call call = {0}, small = {0};

    server_do(&server, "SET small x");
    begin_write(&call, "a", bytes, size, L2_TTL_NONE, L2_ALWAYS);
    ck_assert_int_eq(result_of(&call), 0);
    ck_assert_uint_eq(call.op.n_echo, size <= 24 ? 0 : min_u64(16, size - 24));

    for (int i = 0; i < 3; i++) {
        begin_read(&call, "a", L2_READ_ALL);
        ck_assert_int_eq(read_key(&small, "small", L2_READ_ALL), 0);
        ck_assert_int_eq(result_of(&call), 0);
        ck_assert(holds(&call, bytes, size));
        ck_assert_int_eq(read_key(&call, "a", size + 10), 0);
        ck_assert(holds(&call, bytes, size));
        ck_assert_int_eq(read_key(&call, "a", (size + 1) / 2), 0);
        ck_assert(holds(&call, bytes, (size + 1) / 2));
    }
    call_init(&call, true);
    l2_remove(l2, &call.op, "a", 1);
    ck_assert_int_eq(result_of(&call), 0);
    ck_assert(holds(&call, bytes, size));
    ck_assert_int_eq(server_do(&server, "EXISTS a"), 0);
    call_deinit(&call);
    call_deinit(&small);
    free(bytes);
}
END_TEST

START_TEST(large_value_is_given_in_pieces_whatever_came_before_it)
{
    size_t size = 4u << 20;
    unsigned char *bytes = pattern(size, 1);
    struct call call = {0};

    begin_write(&call, "a", bytes, size, L2_TTL_NONE, L2_ALWAYS);
    ck_assert_int_eq(result_of(&call), 0);
    for (int i = 0; i < 5; i++) {
        ck_assert_int_eq(read_key(&call, "a", 30), 0);
        ck_assert_int_eq(read_key(&call, "a", L2_READ_ALL), 0);
        ck_assert(holds(&call, bytes, size));
        ck_assert_uint_gt(call.n_pieces, 4);
    }
    call_deinit(&call);
    free(bytes);
}
END_TEST

#define N_KEYS  100
#define N_TURNS 20

START_TEST(commands_of_one_key_keep_their_order)
{
    struct call *w = calloc(N_KEYS * N_TURNS, sizeof(*w)), *r = calloc(N_KEYS * N_TURNS, sizeof(*r));
    char key[32], text[64];

    for (unsigned turn = 0; turn < N_TURNS; turn++) {
        for (unsigned k = 0; k < N_KEYS; k++) {
            unsigned at = turn * N_KEYS + k;
            snprintf(key, sizeof(key), "key:%u", k);
            snprintf(text, sizeof(text), "key %u turn %u", k, turn);
            begin_write(&w[at], key, text, strlen(text), L2_TTL_NONE, L2_ALWAYS);
            begin_read(&r[at], key, L2_READ_ALL);
        }
    }
    for (unsigned at = 0; at < N_KEYS * N_TURNS; at++) {
        WAIT_UNTIL(is_done(&w[at]) && is_done(&r[at]));
        snprintf(text, sizeof(text), "key %u turn %u", at % N_KEYS, at / N_KEYS);
        CHECK(w[at].op.result == 0 && r[at].op.result == 0 && w[at].n_done == 1 && r[at].n_done == 1);
        CHECK(holds(&r[at], text, strlen(text)));
        call_deinit(&r[at]);
    }
    free(w);
    free(r);
}
END_TEST

/* ---- several threads on one link ---- */

struct worker {
    pthread_t thread;
    unsigned number;
    size_t size;
    int n_turns;
    _Atomic int n_wrong;
};

/* May run on any thread: false instead of a failed test. */
static bool wait_quietly(struct call *call)
{
    uint64_t until = clock_now_ms() + WAIT_MS;

    while (!is_done(call)) {
        if (clock_now_ms() > until)
            return false;
        poll(NULL, 0, 1);
    }
    return true;
}

static void *work(void *arg)
{
    struct worker *worker = arg;
    struct call *w = calloc(1, sizeof(*w)), *r = calloc(1, sizeof(*r));
    char key[32];

    snprintf(key, sizeof(key), "worker:%u", worker->number);
    for (int i = 0; i < worker->n_turns && !worker->n_wrong; i++) {
        size_t size = worker->size + (unsigned)i;
        unsigned char *bytes = pattern(size, worker->number * 1000 + (unsigned)i);
        begin_write(w, key, bytes, size, L2_TTL_NONE, L2_ALWAYS);
        begin_read(r, key, L2_READ_ALL);
        if (!wait_quietly(w) || !wait_quietly(r)) {
            worker->n_wrong++;
            return NULL; /* they are still in use */
        }
        if (w->op.result != 0 || r->op.result != 0 || !holds(r, bytes, size) || w->op.n_echo != 16 ||
            memcmp(w->op.echo, bytes + 24, 16) != 0)
            worker->n_wrong++;
        free(bytes);
    }
    call_deinit(r);
    free(w);
    free(r);
    return NULL;
}

START_TEST(streams_and_small_commands_of_many_threads_share_one_link)
{
    static struct worker workers[6];

    set_up_server();
    start_l2(1, PATIENT_MS);
    for (unsigned i = 0; i < ARRAY_SIZE(workers); i++) {
        bool is_large = i < 3;
        workers[i] =
            (struct worker){.number = i, .size = is_large ? (1u << 20) + 5 : 100, .n_turns = is_large ? 6 : 150};
        ck_assert_int_eq(pthread_create(&workers[i].thread, NULL, work, &workers[i]), 0);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(workers); i++) {
        pthread_join(workers[i].thread, NULL);
        ck_assert_int_eq(workers[i].n_wrong, 0);
    }
}
END_TEST

START_TEST(two_streams_begun_in_turn_on_one_thread_do_not_mix)
{
    size_t size = 3 * PIECE + 7;
    unsigned char *one = pattern(size, 1), *two = pattern(size, 2);
    struct call a = {0}, b = {0}, between = {0}, r = {0};

    set_up_server();
    start_l2(1, PATIENT_MS);
    call_init(&a, false);
    call_init(&b, false);
    l2_write_begin(l2, &a.op, "a", 1, size, 0, L2_ALWAYS);
    l2_write_begin(l2, &b.op, "b", 1, size, 50000, L2_IF_ABSENT);
    write_parts(&a, one, PIECE);
    write_parts(&b, two, PIECE);
    begin_write(&between, "c", "small", 5, L2_TTL_NONE, L2_ALWAYS);
    write_parts(&a, one + PIECE, size - PIECE);
    write_parts(&b, two + PIECE, size - PIECE);
    l2_write_end(l2, &b.op);
    l2_write_end(l2, &a.op);
    ck_assert_int_eq(result_of(&a), 0);
    ck_assert_int_eq(result_of(&b), 0);
    ck_assert_int_eq(result_of(&between), 0);
    ck_assert_int_eq(read_key(&r, "a", L2_READ_ALL), 0);
    ck_assert(holds(&r, one, size));
    ck_assert_int_eq(read_key(&r, "b", L2_READ_ALL), 0);
    ck_assert(holds(&r, two, size));
    ck_assert_int_gt(r.op.pttl_ms, 0);
    ck_assert_int_eq(read_key(&r, "c", L2_READ_ALL), 0);
    ck_assert(holds(&r, "small", 5));
    call_deinit(&r);
    free(one);
    free(two);
}
END_TEST

/* ---- the other commands ---- */

START_TEST(remove_tells_whether_it_was_there)
{
    struct call call = {0};

    server_do(&server, "SET a hello");
    ck_assert_int_eq(remove_key("a"), 0);
    ck_assert_int_eq(server_do(&server, "EXISTS a"), 0);
    ck_assert_int_eq(remove_key("a"), -ENOENT);
    call_init(&call, true);
    l2_remove(l2, &call.op, "a", 1);
    ck_assert_int_eq(result_of(&call), -ENOENT);
    ck_assert_uint_eq(call.n_pieces, 0);
    server_do(&server, "SET a hello");
    call_init(&call, true);
    l2_remove(l2, &call.op, "a", 1);
    ck_assert_int_eq(result_of(&call), 0);
    ck_assert(holds(&call, "hello", 5));
    ck_assert_int_eq(server_do(&server, "EXISTS a"), 0);
    call_deinit(&call);
}
END_TEST

START_TEST(expire_sets_and_ends_the_time_to_live)
{
    struct call call = {0};

    server_do(&server, "SET a xxxxxxxxxxxxxxxxxxxxxxxx0123456789abcdefyyy");
    call_init(&call, false);
    l2_expire(l2, &call.op, "a", 1, 60000);
    ck_assert_int_eq(result_of(&call), 0);
    ck_assert_uint_eq(call.op.n_echo, 16);
    ck_assert_mem_eq(call.op.echo, "0123456789abcdef", 16);
    ck_assert_int_gt(server_do(&server, "PTTL a"), 30000);
    ck_assert_int_eq(expire_key("a", L2_TTL_NONE), 0);
    ck_assert_int_eq(server_do(&server, "PTTL a"), -1);
    ck_assert_int_eq(expire_key("a", L2_TTL_NONE), 0); /* it had none already */
    ck_assert_int_eq(expire_key("b", 1000), -ENOENT);
    ck_assert_int_eq(expire_key("b", L2_TTL_NONE), -ENOENT);
}
END_TEST

START_TEST(patch_changes_one_byte_of_the_version_it_knows_only)
{
    const uint8_t version[17] = "0123\0"
                                "56789abcdef",
                  other[17] = "0123\0"
                              "56789abcdeg";
    unsigned char blob[64] = {0};
    struct call call = {0};

    memset(blob, 'x', sizeof(blob));
    memcpy(blob + 24, version, 16);
    server_do(&server, "SET a %b PX 50000", blob, sizeof(blob));
    call_init(&call, false);
    l2_patch(l2, &call.op, "a", 1, other, 5, 0);
    ck_assert_int_eq(result_of(&call), -ENOENT);
    ck_assert_int_eq(read_key(&call, "a", L2_READ_ALL), 0);
    ck_assert(holds(&call, blob, sizeof(blob)));

    call_init(&call, false);
    l2_patch(l2, &call.op, "a", 1, version, 5, 0);
    ck_assert_int_eq(result_of(&call), 0);
    ck_assert_uint_eq(call.op.n_echo, 16);
    ck_assert_mem_eq(call.op.echo, version, 16);
    blob[5] = 0;
    ck_assert_int_eq(read_key(&call, "a", L2_READ_ALL), 0);
    ck_assert(holds(&call, blob, sizeof(blob)));
    ck_assert_int_gt(call.op.pttl_ms, 0);

    call_init(&call, false);
    l2_patch(l2, &call.op, "b", 1, version, 5, 0);
    ck_assert_int_eq(result_of(&call), -ENOENT);
    ck_assert_int_eq(server_do(&server, "EXISTS b"), 0);
    call_deinit(&call);
}
END_TEST

START_TEST(scan_finds_every_key_of_the_pattern)
{
    bool is_found[500] = {false};
    struct call call = {0};
    uint64_t cursor = 0;

    for (int i = 0; i < 500; i++) {
        server_do(&server, "SET wanted:%d x", i);
        server_do(&server, "SET other:%d x", i);
    }
    do {
        int n;
        call_init(&call, false);
        l2_scan(l2, &call.op, cursor, "wanted:*", 20);
        ck_assert_int_eq(result_of(&call), 0);
        for (unsigned i = 0; i < call.n_keys; i++) {
            CHECK(sscanf(call.keys[i], "wanted:%d", &n) == 1 && n >= 0 && n < 500);
            is_found[n] = true;
        }
        cursor = call.cursor;
    } while (cursor);
    for (int i = 0; i < 500; i++)
        CHECK(is_found[i]);
}
END_TEST

START_TEST(info_tells_of_memory)
{
    struct call call = {0};

    call_init(&call, true);
    l2_info(l2, &call.op);
    ck_assert_int_eq(result_of(&call), 0);
    ck_assert_uint_gt(call.n_bytes, 0);
    call.bytes[call.n_bytes] = 0; /* there is room */
    ck_assert_ptr_nonnull(strstr((char *)call.bytes, "used_memory:"));
    call_deinit(&call);
}
END_TEST

START_TEST(commands_are_counted)
{
    uint64_t n_reads = l2_stats(l2)->n_reads, n_writes = l2_stats(l2)->n_writes;

    write_key("a", "x", L2_TTL_NONE, L2_ALWAYS);
    touch_key("a");
    touch_key("a");
    ck_assert_uint_eq(l2_stats(l2)->n_reads, n_reads + 2);
    ck_assert_uint_eq(l2_stats(l2)->n_writes, n_writes + 1);
    ck_assert(l2_is_up(l2));
}
END_TEST

/* ---- errors that Redis gives ---- */

START_TEST(other_type_is_ebadmsg)
{
    struct call call = {0};

    server_do(&server, "RPUSH a 1 2 3");
    ck_assert_int_eq(touch_key("a"), -EBADMSG);
    ck_assert_int_eq(read_key(&call, "a", 100), -EBADMSG);
    call_init(&call, true);
    l2_remove(l2, &call.op, "a", 1);
    ck_assert_int_eq(result_of(&call), -EBADMSG);
    ck_assert_int_eq(expire_key("a", 50000), -EBADMSG);
    call_init(&call, false);
    l2_patch(l2, &call.op, "a", 1, (const uint8_t *)"0123456789abcdef", 5, 0);
    ck_assert_int_eq(result_of(&call), -EBADMSG);
    ck_assert_int_eq(remove_key("a"), 0); /* DEL takes it whatever it is */
    ck_assert_uint_ge(l2_stats(l2)->n_errors, 5);
    call_deinit(&call);
}
END_TEST

START_TEST(full_redis_is_enospc_for_writes_alone)
{
    server_do(&server, "SET a hello");
    server_do(&server, "CONFIG SET maxmemory 1");
    ck_assert_int_eq(write_key("b", "x", L2_TTL_NONE, L2_ALWAYS), -ENOSPC);
    ck_assert_int_eq(write_key("b", "x", 1000, L2_IF_ABSENT), -ENOSPC);
    ck_assert_int_eq(write_key("a", "x", 1000, L2_IF_PRESENT), -ENOSPC);
    ck_assert_int_eq(touch_key("a"), 0);
    ck_assert_int_eq(touch_key("b"), -ENOENT);
    ck_assert_int_eq(remove_key("a"), 0);
    server_do(&server, "CONFIG SET maxmemory 0");
    ck_assert_int_eq(write_key("b", "x", L2_TTL_NONE, L2_ALWAYS), 0);
}
END_TEST

START_TEST(what_the_acl_forbids_is_eacces)
{
    struct call call = {0};

    set_up_server();
    server_do(&server, "ACL SETUSER limited on >pw ~mine:* &* +@all");
    struct l2_address address = {.path = server.path, .user = (char *)"limited", .password = (char *)"pw"};
    ck_assert_msg(try_l2_at(&address, 2, PATIENT_MS) == 0, "%s", why);
    ck_assert_int_eq(write_key("mine:1", "x", L2_TTL_NONE, L2_ALWAYS), 0);
    ck_assert_int_eq(touch_key("mine:1"), 0);
    ck_assert_int_eq(touch_key("yours"), -EACCES);
    ck_assert_int_eq(read_key(&call, "yours", 10), -EACCES);
    ck_assert_int_eq(write_key("yours", "x", L2_TTL_NONE, L2_ALWAYS), -EACCES);
    ck_assert_int_eq(write_key("yours", "x", L2_TTL_NONE, L2_IF_ABSENT), -EACCES);
    ck_assert_int_eq(remove_key("yours"), -EACCES);
    ck_assert_int_eq(expire_key("yours", 100), -EACCES);
    call_init(&call, false);
    l2_patch(l2, &call.op, "yours", 5, (const uint8_t *)"0123456789abcdef", 5, 0);
    ck_assert_int_eq(result_of(&call), -EACCES);
    server_do(&server, "ACL SETUSER limited -scan -info");
    call_init(&call, false);
    l2_scan(l2, &call.op, 0, "*", 10);
    ck_assert_int_eq(result_of(&call), -EACCES);
    call_init(&call, true);
    l2_info(l2, &call.op);
    ck_assert_int_eq(result_of(&call), -EACCES);
}
END_TEST

/* ---- invalidations ---- */

/* All that happened before is reported when this returns. */
static void settle_reports(void)
{
    static unsigned n;
    char key[32];

    for (unsigned link = 0; link < 3; link++) {
        do
            snprintf(key, sizeof(key), "sentinel:%u", ++n);
        while (l2_link_of(l2, key, strlen(key)) != link);
        ck_assert_int_eq(touch_key(key), -ENOENT);
        server_do(&server, "SET %s x", key);
        WAIT_UNTIL(n_heard(key) > 0);
    }
}

static const char *const changes[] = {
    "SET a new", "SET a new PX 50000", "SETRANGE a 3 x", "DEL a",      "UNLINK a",
    "GETDEL a",  "PEXPIRE a 90000",    "PERSIST a",      "RENAME a b", "PEXPIRE a 1",
};

START_TEST(change_by_another_client_is_reported)
{
    server_do(&server, "SET a old PX 70000");
    ck_assert_int_eq(touch_key("a"), 0);
    settle_reports();
    ck_assert_uint_eq(n_heard("a"), 0);
    server_do(&server, changes[_i]);
    WAIT_UNTIL(n_heard("a") > 0);
    ck_assert_uint_gt(l2_stats(l2)->n_invalidations, 0);
}
END_TEST

START_TEST(expiry_is_reported)
{
    server_do(&server, "SET a old PX 150");
    server_do(&server, "SET b old PX 200");
    ck_assert_int_eq(touch_key("a"), 0);
    ck_assert_int_eq(write_key("c", "x", 150, L2_ALWAYS), 0);
    WAIT_UNTIL(n_heard("a") > 0 && n_heard("c") > 0);
    ck_assert_int_eq(touch_key("a"), -ENOENT);
}
END_TEST

START_TEST(absent_key_is_tracked_too)
{
    ck_assert_int_eq(touch_key("a"), -ENOENT);
    server_do(&server, "SET a new");
    WAIT_UNTIL(n_heard("a") > 0);
}
END_TEST

START_TEST(own_changes_are_not_reported_and_keep_the_tracking)
{
    struct call call = {0};

    server_do(&server, "SET a xxxxxxxxxxxxxxxxxxxxxxxx0123456789abcdefyyy");
    ck_assert_int_eq(touch_key("a"), 0);
    ck_assert_int_eq(expire_key("a", 60000), 0);
    call_init(&call, false);
    l2_patch(l2, &call.op, "a", 1, (const uint8_t *)"0123456789abcdef", 5, 0);
    ck_assert_int_eq(result_of(&call), 0);
    ck_assert_int_eq(write_key("a", "mine, much longer than 24 bytes, all of it", 60000, L2_ALWAYS), 0);
    settle_reports();
    ck_assert_uint_eq(n_heard("a"), 0);
    server_do(&server, "SET a theirs");
    WAIT_UNTIL(n_heard("a") > 0);

    forget_heard();
    ck_assert_int_eq(write_key("a", "mine, much longer than 24 bytes, all of it", 60000, L2_ALWAYS), 0);
    server_do(&server, "PEXPIRE a 100000"); /* nobody read it since: the write tracks */
    WAIT_UNTIL(n_heard("a") > 0);

    forget_heard();
    ck_assert_int_eq(expire_key("a", 60000), 0); /* so does this */
    server_do(&server, "DEL a");
    WAIT_UNTIL(n_heard("a") > 0);
    settle_reports();

    forget_heard();
    ck_assert_int_eq(write_key("a", "mine", 60000, L2_ALWAYS), 0);
    ck_assert_int_eq(remove_key("a"), 0);
    settle_reports();
    ck_assert_uint_eq(n_heard("a"), 0);
}
END_TEST

START_TEST(flushall_loses_all)
{
    uint64_t before[3], n_lost = heard.n_all_lost;

    server_do(&server, "SET a x");
    ck_assert_int_eq(touch_key("a"), 0);
    for (unsigned i = 0; i < 3; i++)
        before[i] = l2_generation(l2, i);
    server_do(&server, "FLUSHALL");
    WAIT_UNTIL(heard.n_all_lost > n_lost);
    for (unsigned i = 0; i < 3; i++)
        ck_assert_uint_gt(l2_generation(l2, i), before[i]);
    ck_assert_int_eq(touch_key("a"), -ENOENT);
    server_do(&server, "SET a x");
    WAIT_UNTIL(n_heard("a") > 0);
}
END_TEST

/* ---- broken links ---- */

/* Every link works, and reports what changes. */
static void check_all_links(unsigned n_links)
{
    char key[32];

    for (unsigned link = 0; link < n_links; link++) {
        struct call call = {0};
        key_on_link(link, key);
        server_do(&server, "SET %s x", key);
        WAIT_UNTIL(read_key(&call, key, L2_READ_ALL) == 0 && call.op.generation == l2_generation(l2, link));
        settle_reports();
        forget_heard();
        server_do(&server, "SET %s y", key);
        WAIT_UNTIL(n_heard(key) > 0);
        call_deinit(&call);
    }
}

START_TEST(killed_data_link_is_lost_and_comes_back)
{
    uint64_t before = 0, after = 0;

    for (unsigned i = 0; i < 3; i++)
        before += l2_generation(l2, i);
    ck_assert_uint_eq(server_kill_clients(&server, "sessionfs", false, false), 1);
    WAIT_UNTIL(heard.n_link_lost > 0);
    ck_assert_uint_eq(heard.n_link_lost, 1);
    ck_assert_uint_eq(heard.n_all_lost, 0);
    for (unsigned i = 0; i < 3; i++)
        after += l2_generation(l2, i);
    ck_assert_uint_eq(after, before + 1);
    ck_assert_uint_lt(heard.last_link, 3);
    char key[32];
    key_on_link(heard.last_link, key);
    ck_assert_int_eq(write_key(key, "x", L2_TTL_NONE, L2_ALWAYS), 0);
    check_all_links(3);
    ck_assert_uint_ge(l2_stats(l2)->n_reconnects, 1);
}
END_TEST

START_TEST(killed_invalidation_link_loses_all_and_recovers)
{
    for (unsigned i = 1; i <= 3; i++) {
        ck_assert_uint_eq(server_kill_clients(&server, "sessionfs-", true, false), 1);
        WAIT_UNTIL(heard.n_recovered == i);
        ck_assert_uint_eq(heard.n_all_lost, i);
        ck_assert(l2_is_up(l2));
        check_all_links(3);
    }
}
END_TEST

START_TEST(all_links_killed_at_once_come_back)
{
    ck_assert_uint_eq(server_kill_clients(&server, "sessionfs", true, true), 4);
    WAIT_UNTIL(heard.n_recovered == 1);
    check_all_links(3);
}
END_TEST

/* While a value is streamed, the renewal of the tracking waits behind it. */
START_TEST(invalidation_link_lost_twice_while_a_link_is_busy_recovers)
{
    size_t size = 3 * PIECE;
    unsigned char *bytes = pattern(size, 1);
    struct call call = {0}, r = {0};

    set_up_server();
    start_l2(1, PATIENT_MS);
    call_init(&call, false);
    l2_write_begin(l2, &call.op, "a", 1, size, 0, L2_ALWAYS);
    write_parts(&call, bytes, PIECE);
    for (unsigned i = 1; i <= 2; i++) {
        ck_assert_uint_eq(server_kill_clients(&server, "sessionfs-", true, false), 1);
        WAIT_UNTIL(heard.n_recovered == i);
    }
    write_parts(&call, bytes + PIECE, size - PIECE);
    l2_write_end(l2, &call.op);
    int result = result_of(&call);
    ck_assert(result == 0 || result == -EIO);
    server_do(&server, "SET b hello");
    WAIT_UNTIL(read_key(&r, "b", L2_READ_ALL) == 0 && r.op.generation == l2_generation(l2, 0));
    ck_assert(holds(&r, "hello", 5));
    server_do(&server, "SET b other");
    WAIT_UNTIL(n_heard("b") > 0);
    call_deinit(&r);
    free(bytes);
}
END_TEST

START_TEST(link_lost_in_the_middle_of_a_stream_fails_that_write_once)
{
    size_t size = 4 * PIECE;
    unsigned char *bytes = pattern(size, 1);
    struct call call = {0}, behind = {0};

    set_up_server();
    start_l2(1, PATIENT_MS);
    call_init(&call, false);
    l2_write_begin(l2, &call.op, "a", 1, size, 0, L2_ALWAYS);
    write_parts(&call, bytes, PIECE);
    begin_read(&behind, "b", L2_READ_ALL);
    ck_assert_uint_eq(server_kill_clients(&server, "sessionfs", false, false), 1);
    ck_assert_int_eq(result_of(&behind), -EIO);
    ck_assert(!is_done(&call)); /* its parts are not all given yet */
    write_parts(&call, bytes + PIECE, size - PIECE);
    l2_write_end(l2, &call.op);
    ck_assert_int_eq(result_of(&call), -EIO);
    ck_assert_uint_eq(call.n_done, 1);
    begin_write(&call, "a", bytes, size, 0, L2_ALWAYS);
    ck_assert_int_eq(result_of(&call), 0);
    call_deinit(&behind);
    free(bytes);
}
END_TEST

/* ---- broken servers ---- */

START_TEST(killed_server_fails_what_is_in_flight_and_a_new_one_heals)
{
    struct call read = {0}, write = {0}, late = {0};

    server_freeze(&server);
    begin_read(&read, "a", L2_READ_ALL);
    begin_write(&write, "b", "x", 1, 0, L2_ALWAYS);
    uint64_t began_ms = clock_now_ms();
    server_kill(&server);
    ck_assert_int_eq(result_of(&read), -EIO);
    ck_assert_int_eq(result_of(&write), -EIO);
    ck_assert_uint_lt(clock_now_ms() - began_ms, TIMEOUT_MS + 2000);
    begin_read(&late, "a", L2_READ_ALL);
    ck_assert_int_eq(result_of(&late), -EIO);
    ck_assert(!l2_is_up(l2));
    ck_assert_uint_ge(heard.n_all_lost, 1);
    ck_assert_uint_eq(heard.n_recovered, 0);

    server_start(&server, NULL, NULL);
    WAIT_UNTIL(heard.n_recovered == 1);
    ck_assert_int_eq(write_key("a", "x", L2_TTL_NONE, L2_ALWAYS), 0);
    ck_assert_int_eq(touch_key("a"), 0);
    server_do(&server, "SET a y");
    WAIT_UNTIL(n_heard("a") > 0);
}
END_TEST

START_TEST(frozen_server_fails_commands_in_time_and_heals)
{
    struct call calls[10] = {0};
    char key[32];

    for (int round = 0; round < 2; round++) {
        server_freeze(&server);
        uint64_t began_ms = clock_now_ms();
        for (unsigned i = 0; i < ARRAY_SIZE(calls); i++) {
            snprintf(key, sizeof(key), "key:%u", i);
            begin_read(&calls[i], key, L2_READ_ALL);
        }
        for (unsigned i = 0; i < ARRAY_SIZE(calls); i++)
            ck_assert_int_eq(result_of(&calls[i]), -EIO);
        ck_assert_uint_ge(clock_now_ms() - began_ms, TIMEOUT_MS / 2);
        ck_assert_uint_lt(clock_now_ms() - began_ms, 2 * TIMEOUT_MS + 2000);
        server_continue(&server);
        WAIT_UNTIL(write_key("a", "x", L2_TTL_NONE, L2_ALWAYS) == 0);
        WAIT_UNTIL(l2_is_up(l2));
    }
    struct call call = {0};
    WAIT_UNTIL(read_key(&call, "a", L2_READ_ALL) == 0 &&
               call.op.generation == l2_generation(l2, l2_link_of(l2, "a", 1)));
    server_do(&server, "SET a y");
    WAIT_UNTIL(n_heard("a") > 0);
    call_deinit(&call);
}
END_TEST

START_TEST(idle_link_to_a_frozen_server_is_found_dead)
{
    server_freeze(&server);
    WAIT_UNTIL(heard.n_all_lost > 0); /* by a ping of its own */
    server_continue(&server);
    WAIT_UNTIL(heard.n_recovered > 0);
}
END_TEST

START_TEST(slow_answers_of_a_long_pipeline_are_no_failure)
{
    size_t size = 1u << 20;
    unsigned char *bytes = pattern(size, 1);
    static struct call calls[60];
    char key[32];

    for (unsigned i = 0; i < ARRAY_SIZE(calls); i++) {
        snprintf(key, sizeof(key), "key:%u", i % 10);
        begin_write(&calls[i], key, bytes, size, 0, L2_ALWAYS);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(calls); i++)
        CHECK(result_of(&calls[i]) == 0);
    free(bytes);
}
END_TEST

START_TEST(stop_fails_what_is_in_flight_and_is_the_last_word)
{
    struct call calls[20] = {0};
    char key[32];

    server_freeze(&server);
    for (unsigned i = 0; i < ARRAY_SIZE(calls); i++) {
        snprintf(key, sizeof(key), "key:%u", i);
        begin_read(&calls[i], key, L2_READ_ALL);
    }
    l2_stop(l2);
    for (unsigned i = 0; i < ARRAY_SIZE(calls); i++) {
        ck_assert(is_done(&calls[i]));
        ck_assert_int_eq(calls[i].op.result, -EIO);
        ck_assert_uint_eq(calls[i].n_done, 1);
    }
    server_continue(&server);
}
END_TEST

/* ---- start-up ---- */

static void check_why(const char *word)
{
    ck_assert_msg(strstr(why, word), "\"%s\" is not in: %s", word, why);
    ck_assert_msg(strstr(why, "redis at "), "no address in: %s", why);
    ck_assert_msg(!strchr(why, '\n') && !strchr(why, '\r'), "more than a line: %s", why);
    ck_assert_msg(!strstr(why, "sesame"), "a password in: %s", why);
}

START_TEST(start_without_server_says_so)
{
    struct l2_address address = {.path = (char *)"/tmp/nobody/is/here.sock"};
    uint64_t began_ms = clock_now_ms();

    ck_assert_int_lt(try_l2_at(&address, 3, PATIENT_MS), 0);
    ck_assert_uint_lt(clock_now_ms() - began_ms, PATIENT_MS);
    check_why("cannot connect");
}
END_TEST

START_TEST(start_at_a_server_that_is_silent_ends_in_time)
{
    struct l2_address address = {.path = server.path};

    set_up_server();
    server_freeze(&server);
    uint64_t began_ms = clock_now_ms();
    ck_assert_int_lt(try_l2_at(&address, 3, 200), 0);
    ck_assert_uint_lt(clock_now_ms() - began_ms, 200 * 4 + 3000);
    check_why("no answer in time");
    server_continue(&server);
}
END_TEST

START_TEST(start_without_the_password_asks_for_it)
{
    struct l2_address address = {.path = server.path};

    server_start(&server, "--requirepass", "opensesame");
    ck_assert_int_lt(try_l2_at(&address, 3, PATIENT_MS), 0);
    check_why("password");
}
END_TEST

START_TEST(start_with_a_wrong_password_is_refused)
{
    struct l2_address address = {.path = server.path, .password = (char *)"sesame-wrong"};

    server_start(&server, "--requirepass", "opensesame");
    ck_assert_int_lt(try_l2_at(&address, 3, PATIENT_MS), 0);
    check_why("password");
}
END_TEST

START_TEST(start_with_a_database_that_is_not_there_is_refused)
{
    struct l2_address address = {.path = server.path, .db = 4711};

    set_up_server();
    ck_assert_int_lt(try_l2_at(&address, 3, PATIENT_MS), 0);
    check_why("database");
}
END_TEST

START_TEST(password_and_database_are_used_on_every_link)
{
    struct l2_address address = {.path = server.path, .password = (char *)"opensesame", .db = 3};
    char key[32];

    server_start(&server, "--requirepass", "opensesame");
    ck_assert_msg(try_l2_at(&address, 3, PATIENT_MS) == 0, "%s", why);
    server_do(&server, "AUTH opensesame");
    for (unsigned link = 0; link < 3; link++) {
        key_on_link(link, key);
        ck_assert_int_eq(write_key(key, "x", L2_TTL_NONE, L2_ALWAYS), 0);
        ck_assert_int_eq(server_do(&server, "EXISTS %s", key), 0);
        server_do(&server, "SELECT 3");
        ck_assert_int_eq(server_do(&server, "EXISTS %s", key), 1);
        server_do(&server, "SELECT 0");
    }
    server_do(&server, "SELECT 3");
    ck_assert_uint_eq(server_kill_clients(&server, "sessionfs", true, true), 4);
    WAIT_UNTIL(heard.n_recovered == 1);
    check_all_links(3);
}
END_TEST

START_TEST(user_and_password_are_used)
{
    struct l2_address address = {.path = server.path, .user = (char *)"alice", .password = (char *)"opensesame"};

    set_up_server();
    server_do(&server, "ACL SETUSER alice on >opensesame ~* &* +@all");
    server_do(&server, "ACL SETUSER default off");
    ck_assert_msg(try_l2_at(&address, 2, PATIENT_MS) == 0, "%s", why);
    ck_assert_int_eq(write_key("a", "x", L2_TTL_NONE, L2_ALWAYS), 0);
    redisReply *list = redisCommand(server.client, "CLIENT LIST");
    ck_assert_ptr_nonnull(list);
    ck_assert_ptr_nonnull(strstr(list->str, "user=alice"));
    freeReplyObject(list);
}
END_TEST

/* ---- a host with two addresses: the linker prefers this one to libc's ---- */

static const char *two_hosts[2];

static struct addrinfo *make_address(const char *ip, const char *port)
{
    struct addrinfo *info = calloc(1, sizeof(*info) + sizeof(struct sockaddr_in));
    struct sockaddr_in *address = (struct sockaddr_in *)(info + 1);

    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    address->sin_addr.s_addr = htonl(strcmp(ip, "127.0.0.1") == 0 ? 0x7f000001 : 0x7f000002);
    info->ai_family = AF_INET;
    info->ai_socktype = SOCK_STREAM;
    info->ai_addr = (struct sockaddr *)address;
    info->ai_addrlen = sizeof(*address);
    return info;
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **ret)
{
    if (strcmp(node, "two.test") != 0 || (hints->ai_flags & AI_NUMERICHOST))
        return EAI_NONAME;
    *ret = make_address(two_hosts[0], service);
    (*ret)->ai_next = make_address(two_hosts[1], service);
    return 0;
}

void freeaddrinfo(struct addrinfo *list)
{
    while (list) {
        struct addrinfo *next = list->ai_next;
        free(list);
        list = next;
    }
}

static unsigned free_port(void)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000001)};
    socklen_t size = sizeof(address);

    ck_assert_int_eq(bind(fd, (struct sockaddr *)&address, size), 0);
    ck_assert_int_eq(getsockname(fd, (struct sockaddr *)&address, &size), 0);
    close(fd);
    return ntohs(address.sin_port);
}

START_TEST(host_with_two_addresses_is_reached_at_either)
{
    char port[8];
    struct l2_address address = {.host = (char *)"two.test", .port = (uint16_t)free_port()};

    snprintf(port, sizeof(port), "%u", address.port);
    two_hosts[_i] = "127.0.0.1";  /* Redis is here */
    two_hosts[!_i] = "127.0.0.2"; /* and not here */
    server_start(&server, NULL, NULL);
    server_do(&server, "CONFIG SET bind 127.0.0.1");
    server_do(&server, "CONFIG SET port %s", port);
    ck_assert_msg(try_l2_at(&address, 2, PATIENT_MS) == 0, "%s", why);
    ck_assert_int_eq(write_key("a", "x", L2_TTL_NONE, L2_ALWAYS), 0);
    ck_assert_uint_eq(server_kill_clients(&server, "sessionfs", true, true), 3);
    WAIT_UNTIL(heard.n_recovered == 1);
    ck_assert_int_eq(write_key("a", "y", L2_TTL_NONE, L2_ALWAYS), 0);
}
END_TEST

/* ---- a server that is none ---- */

static struct {
    char path[96];
    int fd;
    pthread_t thread;
    _Atomic bool is_ending;
    _Atomic int invalidation_fd;
    const char *answer; /* to any command but those of the handshake */
    bool answers_early; /* as soon as anything of a command came in */
    _Atomic unsigned n_answered;
} fake;

struct peer {
    int fd;
    redisReader *reader;
    bool is_invalidation, is_in_hello;
};

static void say(int fd, const char *text)
{
    size_t size = strlen(text);

    if (send(fd, text, size, MSG_NOSIGNAL) != (ssize_t)size)
        return;
}

static void answer(struct peer *peer, const redisReply *command)
{
    static char token[64];
    char text[128];
    const char *word = command->elements ? command->element[0]->str : "";
    const char *second = command->elements > 1 ? command->element[1]->str : "";

    if (strcmp(word, "PING") == 0) {
        say(peer->fd, peer->is_invalidation ? "*2\r\n$4\r\npong\r\n$0\r\n\r\n" : "+PONG\r\n");
    } else if (strcmp(word, "SUBSCRIBE") == 0) {
        atomic_store(&fake.invalidation_fd, peer->fd);
        say(peer->fd, "*3\r\n$9\r\nsubscribe\r\n$20\r\n__redis__:invalidate\r\n:1\r\n");
    } else if (strcmp(word, "CLIENT") == 0 && strcmp(second, "SETNAME") == 0) {
        peer->is_invalidation = strncmp(command->element[2]->str, "sessionfs-", 10) == 0;
        if (peer->is_invalidation)
            snprintf(token, sizeof(token), "%s", command->element[2]->str);
        say(peer->fd, "+OK\r\n");
    } else if (strcmp(word, "CLIENT") == 0 && strcmp(second, "ID") == 0) {
        say(peer->fd, ":1\r\n");
    } else if (strcmp(word, "CLIENT") == 0 && strcmp(second, "LIST") == 0) {
        snprintf(text, sizeof(text), "$%zu\r\nid=1 name=%s\r\n", strlen(token) + 10, token);
        say(peer->fd, text);
        peer->is_in_hello = false;
    } else if (strcmp(word, "CLIENT") == 0) {
        say(peer->fd, "+OK\r\n");
    } else if (!fake.answers_early) {
        say(peer->fd, fake.answer);
        fake.n_answered++;
    }
}

/* False: it has gone. */
static bool serve(struct peer *peer)
{
    char bytes[65536];
    ssize_t n = recv(peer->fd, bytes, sizeof(bytes), MSG_DONTWAIT);
    void *command = NULL;

    if (n <= 0)
        return n < 0 && errno == EAGAIN;
    if (fake.answers_early && !peer->is_in_hello && !peer->is_invalidation) {
        if (fake.n_answered++ == 0)
            say(peer->fd, fake.answer);
        return true;
    }
    redisReaderFeed(peer->reader, bytes, (size_t)n);
    while (redisReaderGetReply(peer->reader, &command) == REDIS_OK && command) {
        answer(peer, command);
        freeReplyObject(command);
    }
    return true;
}

static void *fake_thread(void *arg)
{
    struct peer peers[32];
    struct pollfd fds[33];
    unsigned n = 0;

    while (!atomic_load(&fake.is_ending)) {
        fds[0] = (struct pollfd){.fd = fake.fd, .events = POLLIN};
        for (unsigned i = 0; i < n; i++)
            fds[i + 1] = (struct pollfd){.fd = peers[i].fd, .events = POLLIN};
        poll(fds, n + 1, 20);
        unsigned kept = 0, n_before = n;
        for (unsigned i = 0; i < n_before; i++) {
            if (!fds[i + 1].revents || serve(&peers[i])) {
                peers[kept++] = peers[i];
            } else {
                redisReaderFree(peers[i].reader);
                close(peers[i].fd);
            }
        }
        n = kept;
        int fd = (fds[0].revents & POLLIN) && n < ARRAY_SIZE(peers) ? accept4(fake.fd, NULL, NULL, SOCK_CLOEXEC) : -1;
        if (fd >= 0)
            peers[n++] = (struct peer){.fd = fd, .reader = redisReaderCreate(), .is_in_hello = true};
    }
    for (unsigned i = 0; i < n; i++) {
        redisReaderFree(peers[i].reader);
        close(peers[i].fd);
    }
    return NULL;
}

static void start_fake(const char *answer_text, bool answers_early)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    snprintf(fake.path, sizeof(fake.path), "%s/fake.%d", servers_base, (int)getpid());
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", fake.path);
    fake.answer = answer_text;
    fake.answers_early = answers_early;
    fake.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_eq(bind(fake.fd, (struct sockaddr *)&address, sizeof(address)), 0);
    ck_assert_int_eq(listen(fake.fd, 64), 0);
    ck_assert_int_eq(pthread_create(&fake.thread, NULL, fake_thread, NULL), 0);
    ck_assert_msg(try_l2_at(&(struct l2_address){.path = fake.path}, 1, TIMEOUT_MS) == 0, "%s", why);
}

static void tear_down_fake(void)
{
    l2_free(l2);
    l2 = NULL;
    if (fake.fd > 0) {
        atomic_store(&fake.is_ending, true);
        pthread_join(fake.thread, NULL);
        close(fake.fd);
        unlink(fake.path);
    }
}

enum fake_op { FAKE_READ, FAKE_WRITE, FAKE_REMOVE, FAKE_GETDEL, FAKE_EXPIRE, FAKE_PATCH, FAKE_SCAN, FAKE_INFO };

static const struct {
    const char *what;
    enum fake_op op;
    const char *answer; /* to each of the commands of the operation */
    int result;
    bool is_broken; /* and the link is given up */
} odd_answers[] = {
    {"no protocol", FAKE_READ, "HTTP/1.1 400 Bad Request\r\n\r\n", -EIO, true},
    {"zero bytes", FAKE_READ, "\1\2\3\4\5", -EIO, true},
    {"a size that is none", FAKE_READ, "$12x\r\nabc\r\n", -EIO, true},
    {"a large size that is none", FAKE_READ, "$99999x\r\nabc\r\n", -EIO, true},
    {"half a reply, then silence", FAKE_READ, "$100\r\nabc", -EIO, true},
    {"half a large reply, then silence", FAKE_READ, "$100000\r\nabc", -EIO, true},
    {"a reply without an end of the line", FAKE_READ, "$100", -EIO, true},
    {"a size beyond all reason", FAKE_READ, "$99999999999\r\nabc", -EIO, true},
    {"a size beyond 64 bits", FAKE_READ, "$99999999999999999999999\r\nabc", -EIO, true},
    {"a negative size", FAKE_READ, "$-7\r\n", -EIO, true},
    {"nothing at all", FAKE_READ, "", -EIO, true},
    {"a number for a value", FAKE_READ, ":5\r\n", -EIO, false},
    {"a list for a value", FAKE_READ, "*1\r\n$1\r\na\r\n", -EIO, false},
    {"a status for a value", FAKE_READ, "+OK\r\n", -EIO, false},
    {"an error without a text", FAKE_READ, "-\r\n", -EIO, false},
    {"an error of another kind", FAKE_READ, "-LOADING Redis is loading the dataset in memory\r\n", -EIO, false},
    {"a number for a write", FAKE_WRITE, ":5\r\n", -EIO, false},
    {"a list for a write", FAKE_WRITE, "*0\r\n", -EIO, false},
    {"an empty list of lists", FAKE_WRITE, "*3\r\n*0\r\n*-1\r\n$-1\r\n", -EIO, false},
    {"a text for a removal", FAKE_REMOVE, "$3\r\nabc\r\n", -EIO, false},
    {"a number for a removed value", FAKE_GETDEL, ":5\r\n", -EIO, false},
    {"a text for an expiry", FAKE_EXPIRE, "$3\r\nabc\r\n", -EIO, false},
    {"a text for a patch", FAKE_PATCH, "$3\r\nabc\r\n", -EIO, false},
    {"a number for a scan", FAKE_SCAN, ":5\r\n", -EIO, false},
    {"a scan of one element", FAKE_SCAN, "*1\r\n$1\r\n0\r\n", -EIO, false},
    {"a scan with a number for a cursor", FAKE_SCAN, "*2\r\n:0\r\n*0\r\n", -EIO, false},
    {"a scan whose keys are none", FAKE_SCAN, "*2\r\n$1\r\n0\r\n*3\r\n:1\r\n$-1\r\n*0\r\n", 0, false},
    {"no list for a scan", FAKE_SCAN, "*-1\r\n", -EIO, false},
    {"a number for the info", FAKE_INFO, ":5\r\n", -EIO, false},
};

static void submit(struct call *call, enum fake_op kind)
{
    call_init(call, kind == FAKE_READ || kind == FAKE_GETDEL || kind == FAKE_INFO);
    switch (kind) {
    case FAKE_READ:
        l2_read(l2, &call->op, "a", 1, L2_READ_ALL);
        return;
    case FAKE_WRITE:
        begin_write(call, "a", "x", 1, L2_TTL_NONE, L2_ALWAYS);
        return;
    case FAKE_REMOVE:
    case FAKE_GETDEL:
        l2_remove(l2, &call->op, "a", 1);
        return;
    case FAKE_EXPIRE:
        l2_expire(l2, &call->op, "a", 1, 1000);
        return;
    case FAKE_PATCH:
        l2_patch(l2, &call->op, "a", 1, (const uint8_t *)"0123456789abcdef", 5, 0);
        return;
    case FAKE_SCAN:
        l2_scan(l2, &call->op, 0, "*", 10);
        return;
    case FAKE_INFO:
        l2_info(l2, &call->op);
        return;
    }
}

START_TEST(odd_answer_is_an_error_and_no_disaster)
{
    struct call call = {0};

    start_fake(odd_answers[_i].answer, false);
    uint64_t began_ms = clock_now_ms();
    submit(&call, odd_answers[_i].op);
    ck_assert_msg(result_of(&call) == odd_answers[_i].result, "%s: %d", odd_answers[_i].what, call.op.result);
    ck_assert_uint_lt(clock_now_ms() - began_ms, 2 * TIMEOUT_MS + 2000);
    ck_assert_uint_eq(call.n_done, 1);
    if (odd_answers[_i].is_broken)
        WAIT_UNTIL(heard.n_link_lost > 0);
    call_deinit(&call);
}
END_TEST

START_TEST(reply_that_nobody_asked_for_breaks_the_link)
{
    struct call call = {0};

    start_fake("$3\r\nabc\r\n:-1\r\n+and another\r\n", false); /* twice: GET and PTTL */
    begin_read(&call, "a", L2_READ_ALL);
    result_of(&call); /* it got some answer */
    WAIT_UNTIL(heard.n_link_lost > 0);
    ck_assert_uint_eq(call.n_done, 1);
    begin_read(&call, "a", L2_READ_ALL); /* after the reconnection */
    result_of(&call);
    call_deinit(&call);
}
END_TEST

START_TEST(write_that_is_answered_before_its_end_is_not_done_before_its_end)
{
    size_t size = 3 * PIECE;
    unsigned char *bytes = pattern(size, 1);
    struct call call = {0};

    start_fake("+OK\r\n$16\r\n0123456789abcdef\r\n", true);
    call_init(&call, false);
    l2_write_begin(l2, &call.op, "a", 1, size, 0, L2_ALWAYS);
    write_parts(&call, bytes, PIECE);
    WAIT_UNTIL(fake.n_answered > 0 && (is_done(&call) || heard.n_link_lost));
    ck_assert_msg(!is_done(&call), "done() while the caller still gives parts");
    write_parts(&call, bytes + PIECE, size - PIECE);
    l2_write_end(l2, &call.op);
    ck_assert_int_eq(result_of(&call), -EIO);
    ck_assert_uint_eq(call.n_done, 1);
    free(bytes);
}
END_TEST

static const char *const odd_reports[] = {
    "rubbish\r\n",
    "$3\r\nabc\r\n",
    "*0\r\n",
    "*-1\r\n",
    "*2\r\n:1\r\n:2\r\n",
    "*3\r\n$7\r\nmessage\r\n$20\r\n__redis__:invalidate\r\n*3\r\n:1\r\n$-1\r\n*0\r\n",
    "*3\r\n$7\r\nmessage\r\n$20\r\n__redis__:invalidate\r\n:1\r\n",
    "*3\r\n$7\r\nmessage\r\n$-1\r\n*1\r\n$1\r\na\r\n",
    "*2\r\n$4\r\npong\r\n$0\r\n\r\n",
    "-ERR nothing in particular\r\n",
};

START_TEST(odd_report_is_no_disaster)
{
    struct call call = {0};

    start_fake("$3\r\nabc\r\n", false);
    say(atomic_load(&fake.invalidation_fd), odd_reports[_i]);
    say(atomic_load(&fake.invalidation_fd), "*3\r\n$7\r\nmessage\r\n$20\r\n__redis__:invalidate\r\n*1\r\n$1\r\nz\r\n");
    WAIT_UNTIL(n_heard("z") > 0 || heard.n_all_lost > 0);
    WAIT_UNTIL(read_key(&call, "a", L2_READ_ALL) == 0);
    ck_assert(holds(&call, "abc", 3));
    call_deinit(&call);
}
END_TEST

/* ---- suite ---- */

static TCase *add_case(Suite *suite, const char *name, void (*set)(void), void (*tear)(void))
{
    TCase *tcase = tcase_create(name);

    tcase_set_timeout(tcase, 60);
    tcase_add_checked_fixture(tcase, set, tear);
    suite_add_tcase(suite, tcase);
    return tcase;
}

static Suite *make_suite(void)
{
    Suite *suite = suite_create("l2");

    TCase *commands = add_case(suite, "commands", set_up, tear_down);
    tcase_add_test(commands, absent_key_is_enoent);
    tcase_add_test(commands, read_gives_value_and_remaining_time);
    tcase_add_test(commands, read_without_data_callback_gives_result_alone);
    tcase_add_loop_test(commands, write_obeys_time_and_condition_and_echoes_what_is_there, 0, ARRAY_SIZE(writes));
    tcase_add_loop_test(commands, values_of_any_size_arrive_whole, 0, ARRAY_SIZE(sizes));
    tcase_add_test(commands, large_value_is_given_in_pieces_whatever_came_before_it);
    tcase_add_test(commands, commands_of_one_key_keep_their_order);
    tcase_add_test(commands, remove_tells_whether_it_was_there);
    tcase_add_test(commands, expire_sets_and_ends_the_time_to_live);
    tcase_add_test(commands, patch_changes_one_byte_of_the_version_it_knows_only);
    tcase_add_test(commands, scan_finds_every_key_of_the_pattern);
    tcase_add_test(commands, info_tells_of_memory);
    tcase_add_test(commands, commands_are_counted);
    tcase_add_test(commands, other_type_is_ebadmsg);
    tcase_add_test(commands, full_redis_is_enospc_for_writes_alone);

    TCase *reports = add_case(suite, "reports", set_up, tear_down);
    tcase_add_loop_test(reports, change_by_another_client_is_reported, 0, ARRAY_SIZE(changes));
    tcase_add_test(reports, expiry_is_reported);
    tcase_add_test(reports, absent_key_is_tracked_too);
    tcase_add_test(reports, own_changes_are_not_reported_and_keep_the_tracking);
    tcase_add_test(reports, flushall_loses_all);

    TCase *links = add_case(suite, "links", set_up, tear_down);
    tcase_add_test(links, killed_data_link_is_lost_and_comes_back);
    tcase_add_test(links, killed_invalidation_link_loses_all_and_recovers);
    tcase_add_test(links, all_links_killed_at_once_come_back);

    TCase *outage = add_case(suite, "outage", set_up_hasty, tear_down);
    tcase_add_test(outage, killed_server_fails_what_is_in_flight_and_a_new_one_heals);
    tcase_add_test(outage, frozen_server_fails_commands_in_time_and_heals);
    tcase_add_test(outage, idle_link_to_a_frozen_server_is_found_dead);
    tcase_add_test(outage, slow_answers_of_a_long_pipeline_are_no_failure);
    tcase_add_test(outage, stop_fails_what_is_in_flight_and_is_the_last_word);

    TCase *special = add_case(suite, "special", NULL, tear_down); /* each starts its own */
    tcase_add_test(special, streams_and_small_commands_of_many_threads_share_one_link);
    tcase_add_test(special, two_streams_begun_in_turn_on_one_thread_do_not_mix);
    tcase_add_test(special, invalidation_link_lost_twice_while_a_link_is_busy_recovers);
    tcase_add_test(special, link_lost_in_the_middle_of_a_stream_fails_that_write_once);
    tcase_add_test(special, what_the_acl_forbids_is_eacces);

    TCase *start = add_case(suite, "start", NULL, tear_down);
    tcase_add_test(start, start_without_server_says_so);
    tcase_add_test(start, start_at_a_server_that_is_silent_ends_in_time);
    tcase_add_test(start, start_without_the_password_asks_for_it);
    tcase_add_test(start, start_with_a_wrong_password_is_refused);
    tcase_add_test(start, start_with_a_database_that_is_not_there_is_refused);
    tcase_add_test(start, password_and_database_are_used_on_every_link);
    tcase_add_test(start, user_and_password_are_used);
    tcase_add_loop_test(start, host_with_two_addresses_is_reached_at_either, 0, 2);

    TCase *odd = add_case(suite, "odd", NULL, tear_down_fake);
    tcase_add_loop_test(odd, odd_answer_is_an_error_and_no_disaster, 0, ARRAY_SIZE(odd_answers));
    tcase_add_loop_test(odd, odd_report_is_no_disaster, 0, ARRAY_SIZE(odd_reports));
    tcase_add_test(odd, reply_that_nobody_asked_for_breaks_the_link);
    tcase_add_test(odd, write_that_is_answered_before_its_end_is_not_done_before_its_end);
    return suite;
}

int main(void)
{
    return suite_main(make_suite());
}
