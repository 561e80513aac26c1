#include <sessionfs/store.h>

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/xattr.h>

#include "base/log.h"
#include "base/macros.h"
#include "redis_server.h"

#define DAY_MS     86400000u
#define TIMEOUT_MS 1000u
#define PAGE       4096u

/* One instance, and what came up from it. */
struct side {
    struct store *store;
    struct session *root;
    pthread_mutex_t lock;
    struct session *changed[256];
    char gone[256][32];
    _Atomic unsigned n_settled;
    unsigned n_changed, n_gone, n_watched;
};

/* An operation that is waited for. */
struct job {
    struct store_op op;
    struct side *side;
    _Atomic bool is_done;
    unsigned n_done;
};

static struct server server;
static struct side a = {.lock = PTHREAD_MUTEX_INITIALIZER}, b = {.lock = PTHREAD_MUTEX_INITIALIZER};
static struct seal_keys *keys; /* the test's own */
static const uint8_t master[SEAL_KEY_BYTES] = "0123456789abcdef0123456789abcde";
static char why[512];

/* ---- what comes up ---- */

static void on_changed(void *owner, struct session *session)
{
    struct side *side = owner;

    pthread_mutex_lock(&side->lock);
    side->changed[side->n_changed++ % ARRAY_SIZE(side->changed)] = session;
    pthread_mutex_unlock(&side->lock);
}

static void on_gone(void *owner, struct session *session, struct session *parent, const char *name, size_t size)
{
    struct side *side = owner;

    pthread_mutex_lock(&side->lock);
    snprintf(side->gone[side->n_gone++ % ARRAY_SIZE(side->gone)], sizeof(side->gone[0]), "%.*s", (int)size, name);
    pthread_mutex_unlock(&side->lock);
}

static void on_watch(void *owner, struct session *dir)
{
    struct side *side = owner;

    side->n_watched++;
    store_watched(side->store, dir, true);
}

static void on_settle(void *owner)
{
    ((struct side *)owner)->n_settled++;
}

static bool was_changed(struct side *side, const struct session *session)
{
    bool was = false;

    pthread_mutex_lock(&side->lock);
    for (unsigned i = 0; i < side->n_changed && i < ARRAY_SIZE(side->changed); i++)
        was |= side->changed[i] == session;
    pthread_mutex_unlock(&side->lock);
    return was;
}

static void forget_changed(struct side *side)
{
    pthread_mutex_lock(&side->lock);
    side->n_changed = 0;
    pthread_mutex_unlock(&side->lock);
}

static bool was_gone(struct side *side, const char *name)
{
    bool was = false;

    pthread_mutex_lock(&side->lock);
    for (unsigned i = 0; i < side->n_gone && i < ARRAY_SIZE(side->gone); i++)
        was |= strcmp(side->gone[i], name) == 0;
    pthread_mutex_unlock(&side->lock);
    return was;
}

/* ---- start ---- */

static struct store_config config(void)
{
    struct store_config config = {
        .address = {.path = server.path},
        .name_space = "test",
        .ttl_ms = DAY_MS,
        .l1_size = 16u << 20,
        .max_session = 4u << 20,
        .connections = 2,
        .timeout_ms = TIMEOUT_MS,
        .root_uid = 1,
        .root_gid = 2,
        .root_mode = 0755,
    };

    ck_assert_int_eq(seal_keys_new(&config.keys, master), 0);
    return config;
}

static void start_side(struct side *side, const struct store_config *with)
{
    int r = store_new(&side->store, with, why, sizeof(why));

    ck_assert_msg(r == 0, "%s", why);
    side->root = store_root(side->store);
    store_set_events(
        side->store,
        &(struct store_events){
            .owner = side, .changed = on_changed, .gone = on_gone, .watch = on_watch, .settle = on_settle});
}

static void set_up_with(struct store_config with)
{
    ck_assert_int_eq(seal_keys_new(&keys, master), 0);
    start_side(&a, &with);
    ck_assert_int_eq(seal_keys_new(&with.keys, master), 0);
    start_side(&b, &with);
}

static void set_up_server(void)
{
    server_start(&server, NULL, NULL);
}

static void set_up(void)
{
    set_up_server();
    set_up_with(config());
}

static void set_up_ttl(uint64_t ttl_ms)
{
    struct store_config with = config();

    with.ttl_ms = ttl_ms;
    set_up_with(with);
}

static void set_up_tiny(uint64_t l1_size)
{
    struct store_config with = config();

    with.l1_size = l1_size;
    set_up_with(with);
}

static void tear_down(void)
{
    store_free(a.store);
    store_free(b.store);
    seal_keys_free(keys);
    server_end(&server);
}

/* ---- operations ---- */

static void on_done(struct store_op *op)
{
    struct job *job = CONTAINER_OF(op, struct job, op);

    job->n_done++;
    atomic_store(&job->is_done, true);
}

static void begin(struct side *side, struct job *job)
{
    job->side = side;
    job->op.done = on_done;
    store_run(side->store, &job->op);
}

static int result_of(struct job *job)
{
    WAIT_UNTIL(atomic_load(&job->is_done));
    return job->op.result;
}

static int run_op(struct side *side, struct job *job)
{
    begin(side, job);
    return result_of(job);
}

static void set_name(struct store_op *op, const char *name)
{
    op->name_size = (uint16_t)strlen(name);
    memcpy(op->name, name, op->name_size + 1u);
}

static int lookup(struct side *side, struct session *dir, const char *name, struct session **ret,
                  struct store_attr *attr)
{
    struct job job = {.op = {.kind = STORE_LOOKUP, .dir = dir}};

    set_name(&job.op, name);
    int r = run_op(side, &job);
    if (r == 0 && ret)
        *ret = job.op.found;
    else if (r == 0)
        store_forget(side->store, job.op.found, 1);
    if (r == 0 && attr)
        *attr = job.op.attr;
    return r;
}

static int make(struct side *side, struct session *dir, const char *name, uint32_t mode, bool is_exclusive,
                struct session **ret)
{
    struct job job = {
        .op = {.kind = STORE_CREATE, .dir = dir, .mode = mode, .uid = 10, .gid = 20, .is_exclusive = is_exclusive}};

    set_name(&job.op, name);
    int r = run_op(side, &job);
    if (r == 0 && ret)
        *ret = job.op.found;
    else if (r == 0)
        store_forget(side->store, job.op.found, 1);
    return r;
}

static struct session *new_file(struct side *side, struct session *dir, const char *name)
{
    struct session *session = NULL;

    ck_assert_int_eq(make(side, dir, name, S_IFREG | 0600, true, &session), 0);
    return session;
}

static struct session *new_dir(struct side *side, struct session *dir, const char *name)
{
    struct session *session = NULL;

    ck_assert_int_eq(make(side, dir, name, S_IFDIR | 0700, true, &session), 0);
    return session;
}

static struct session *found(struct side *side, struct session *dir, const char *name)
{
    struct session *session = NULL;
    int r = lookup(side, dir, name, &session, NULL);

    ck_assert_msg(r == 0, "%s: %s", name, strerror(-r));
    return session;
}

static struct job write_job(struct session *session, uint64_t offset, const void *data, size_t size, bool is_cached)
{
    return (struct job){.op = {.kind = STORE_WRITE,
                               .session = session,
                               .offset = offset,
                               .data = data,
                               .size = size,
                               .is_cached = is_cached}};
}

/* A whole save: answered when it is in Redis. */
static int save(struct side *side, struct session *session, const char *text)
{
    struct job job = write_job(session, 0, text, strlen(text), false);

    return run_op(side, &job);
}

/* Part of a save, which a close will end. */
static int put(struct side *side, struct session *session, uint64_t offset, const void *data, size_t size)
{
    struct job job = write_job(session, offset, data, size, true);

    return run_op(side, &job);
}

static void close_name(struct store *store, struct session *dir, const char *name, size_t size)
{
    struct commit *batch = NULL;

    store_closed(store, dir, name, size, &batch);
    store_send(store, batch);
}

static void close_all(struct store *store)
{
    close_name(store, NULL, NULL, 0);
}

static void closed(struct side *side, struct session *dir, const char *name)
{
    close_name(side->store, dir, name, strlen(name));
}

static int getattr(struct side *side, struct session *session, struct store_attr *attr)
{
    struct job job = {.op = {.kind = STORE_GETATTR, .session = session}};
    int r = run_op(side, &job);

    *attr = job.op.attr;
    return r;
}

/* n bytes, or an error. */
static int get(struct side *side, struct session *session, uint64_t offset, void *out, size_t size)
{
    struct job job = {.op = {.kind = STORE_READ, .session = session, .offset = offset, .size = size}};
    int r = run_op(side, &job);

    if (r == 0) {
        ck_assert_uint_le(job.op.n_bytes, size);
        if (job.op.n_bytes)
            memcpy(out, job.op.bytes, job.op.n_bytes);
        r = (int)job.op.n_bytes;
    }
    store_done_with(side->store, &job.op);
    return r;
}

static bool reads_as(struct side *side, struct session *session, const char *text)
{
    char bytes[256];
    int n = get(side, session, 0, bytes, sizeof(bytes));

    return n == (int)strlen(text) && memcmp(bytes, text, strlen(text)) == 0;
}

static bool name_reads_as(struct side *side, const char *name, const char *text)
{
    struct session *session = NULL;

    if (lookup(side, side->root, name, &session, NULL) < 0)
        return false;
    bool is_same = reads_as(side, session, text);
    store_forget(side->store, session, 1);
    return is_same;
}

static int remove_name(struct side *side, struct session *dir, const char *name, enum store_kind kind)
{
    struct job job = {.op = {.kind = kind, .dir = dir}};

    set_name(&job.op, name);
    return run_op(side, &job);
}

static int rename_to(struct side *side, struct session *dir, const char *name, struct session *new_parent,
                     const char *new_name, bool no_replace)
{
    struct job job = {.op = {.kind = STORE_RENAME, .dir = dir, .new_dir = new_parent, .no_replace = no_replace}};

    set_name(&job.op, name);
    job.op.new_name_size = (uint16_t)strlen(new_name);
    memcpy(job.op.new_name, new_name, job.op.new_name_size + 1u);
    return run_op(side, &job);
}

static int set_xattr(struct side *side, struct session *session, const char *name, const char *value, int flags)
{
    struct job job = {
        .op = {.kind = STORE_SETXATTR, .session = session, .data = value, .size = strlen(value), .xattr_flags = flags}};

    set_name(&job.op, name);
    return run_op(side, &job);
}

static int remove_xattr(struct side *side, struct session *session, const char *name)
{
    struct job job = {.op = {.kind = STORE_REMOVEXATTR, .session = session}};

    set_name(&job.op, name);
    return run_op(side, &job);
}

static int get_xattr(struct side *side, struct session *session, const char *name, char out[256])
{
    struct job job = {.op = {.kind = STORE_GETXATTR, .session = session}};

    set_name(&job.op, name);
    int r = run_op(side, &job);
    if (r == 0) {
        size_t n = min_u64(job.op.n_bytes, 255);
        memcpy(out, job.op.bytes, n);
        out[n] = 0;
    }
    store_done_with(side->store, &job.op);
    return r;
}

static int set_attr(struct side *side, struct session *session, struct job job)
{
    job.op.kind = STORE_SETATTR;
    job.op.session = session;
    return run_op(side, &job);
}

static int set_size(struct side *side, struct session *session, size_t size)
{
    /* truncate(2): a save of its own */
    return set_attr(side, session, (struct job){.op = {.set = STORE_SET_SIZE | STORE_SET_MTIME_NOW, .size = size}});
}

/* ---- what Redis has ---- */

struct stored {
    char key[L2_KEY_MAX];
    size_t key_size, content_size;
    struct seal_head head;
    long long pttl_ms;
    char content[512]; /* its beginning */
};

static bool take_stored(const char *key, size_t key_size, const char *name, struct stored *ret)
{
    redisReply *blob = server_reply(&server, "GET %b", key, key_size);
    static unsigned char plain[SEAL_META_MAX + 1];
    struct seal_meta meta;
    bool is_it = blob->type == REDIS_REPLY_STRING && seal_head(blob->str, blob->len, &ret->head) == 0 &&
                 seal_open_meta(keys, key, key_size, blob->str, blob->len, plain, &meta) == 0 &&
                 meta.name_size == strlen(name) && memcmp(meta.name, name, meta.name_size) == 0;

    if (is_it) {
        unsigned char *content = malloc(ret->head.content_size + 1);
        is_it = seal_open_content(keys, key, key_size, blob->str, blob->len, content) == 0;
        ret->content_size = ret->head.content_size;
        memcpy(ret->content, content, min_u64(ret->content_size, sizeof(ret->content)));
        free(content);
        snprintf(ret->key, sizeof(ret->key), "%.*s", (int)key_size, key);
        ret->key_size = key_size;
        ret->pttl_ms = server_do(&server, "PTTL %b", key, key_size);
    }
    freeReplyObject(blob);
    return is_it;
}

/* The session of that name (in whichever directory) as it is in Redis. */
static bool is_stored(const char *name, struct stored *ret)
{
    redisReply *list = server_reply(&server, "KEYS sfs:test:*");
    bool is_there = false;

    for (size_t i = 0; i < list->elements && !is_there; i++)
        is_there = take_stored(list->element[i]->str, list->element[i]->len, name, ret);
    freeReplyObject(list);
    return is_there;
}

static bool is_stored_as(const char *name, const char *text)
{
    struct stored stored = {0};

    return is_stored(name, &stored) && stored.content_size == strlen(text) &&
           memcmp(stored.content, text, min_u64(strlen(text), sizeof(stored.content))) == 0;
}

static unsigned char *bytes_of(size_t size, unsigned seed)
{
    unsigned char *bytes = malloc(size + 1);

    for (size_t i = 0; i < size; i++)
        bytes[i] = (unsigned char)((i * 2654435761u + seed * 40503u) >> 7);
    return bytes;
}

static uint64_t n_dirty(struct side *side)
{
    struct store_stats stats;

    store_stats(side->store, &stats);
    return stats.n_dirty;
}

/* ---- names ---- */

START_TEST(root_is_the_same_for_both)
{
    struct store_attr one, two;

    ck_assert_int_eq(getattr(&a, a.root, &one), 0);
    ck_assert_int_eq(getattr(&b, b.root, &two), 0);
    ck_assert_uint_eq(one.ino, 1);
    ck_assert_uint_eq(one.mode, S_IFDIR | 0755);
    ck_assert_uint_eq(one.uid, 1);
    ck_assert_uint_eq(one.gid, 2);
    ck_assert_int_eq(one.mtime_ns, two.mtime_ns);
}
END_TEST

START_TEST(created_file_is_found_by_both)
{
    struct store_attr one, two;
    struct session *file = new_file(&a, a.root, "x"), *theirs = found(&b, b.root, "x");

    ck_assert_int_eq(getattr(&a, file, &one), 0);
    ck_assert_int_eq(getattr(&b, theirs, &two), 0);
    ck_assert_uint_eq(one.mode, S_IFREG | 0600);
    ck_assert_uint_eq(one.uid, 10);
    ck_assert_uint_eq(one.gid, 20);
    ck_assert_uint_eq(one.size, 0);
    ck_assert_uint_gt(one.valid_ms, 0);
    ck_assert_uint_eq(one.ino, two.ino);
    ck_assert_uint_eq(one.mode, two.mode);
    ck_assert_int_eq(one.mtime_ns, two.mtime_ns);
    ck_assert_ptr_eq(found(&a, a.root, "x"), file);
    struct store_attr attr;
    ck_assert_ptr_eq(store_peek(a.store, a.root, "x", 1, &attr), file);
    ck_assert_ptr_null(store_peek(a.store, a.root, "y", 1, &attr));
}
END_TEST

START_TEST(exclusive_create_of_what_is_there_is_eexist)
{
    struct session *file = new_file(&a, a.root, "x"), *again = NULL, *theirs = NULL;

    ck_assert_int_eq(save(&a, file, "content"), 0);
    closed(&a, a.root, "x");
    ck_assert_int_eq(make(&a, a.root, "x", S_IFREG | 0644, true, NULL), -EEXIST);
    ck_assert_int_eq(make(&b, b.root, "x", S_IFREG | 0644, true, NULL), -EEXIST);
    ck_assert_int_eq(make(&a, a.root, "x", S_IFREG | 0644, false, &again), 0);
    ck_assert_ptr_eq(again, file);
    ck_assert_int_eq(make(&b, b.root, "x", S_IFREG | 0644, false, &theirs), 0);
    ck_assert(reads_as(&a, file, "content"));
    WAIT_UNTIL(reads_as(&b, theirs, "content"));
}
END_TEST

START_TEST(absent_name_is_enoent_until_somebody_makes_it)
{
    ck_assert_int_eq(lookup(&b, b.root, "x", NULL, NULL), -ENOENT);
    ck_assert_int_eq(lookup(&a, a.root, "x", NULL, NULL), -ENOENT);
    new_file(&a, a.root, "x");
    ck_assert_int_eq(lookup(&b, b.root, "x", NULL, NULL), 0);
}
END_TEST

START_TEST(impossible_names_are_refused)
{
    ck_assert_int_eq(make(&a, a.root, "a/b", S_IFREG | 0600, true, NULL), -EINVAL);
    ck_assert_int_eq(make(&a, a.root, "", S_IFREG | 0600, true, NULL), -EINVAL);
    ck_assert_int_eq(make(&a, a.root, "..", S_IFREG | 0600, true, NULL), -EINVAL);
    struct session *file = new_file(&a, a.root, "x");
    ck_assert_int_eq(lookup(&a, file, "y", NULL, NULL), -ENOTDIR);
}
END_TEST

START_TEST(names_are_case_sensitive_bytes_of_up_to_255)
{
    char name[256];

    memset(name, 0xfe, 255);
    name[255] = 0;
    struct session *file = new_file(&a, a.root, name);
    ck_assert_int_eq(save(&a, file, "long"), 0);
    ck_assert_int_eq(make(&a, a.root, "N", S_IFREG | 0600, true, NULL), 0);
    ck_assert_int_eq(lookup(&b, b.root, "n", NULL, NULL), -ENOENT);
    ck_assert_int_eq(lookup(&b, b.root, name, NULL, NULL), 0);
}
END_TEST

START_TEST(removed_name_is_gone_on_both_but_its_holder_reads_on)
{
    struct session *file = new_file(&a, a.root, "x");

    ck_assert_int_eq(save(&a, file, "content"), 0);
    closed(&a, a.root, "x");
    struct session *theirs = found(&b, b.root, "x");
    WAIT_UNTIL(reads_as(&b, theirs, "content"));
    forget_changed(&b);
    ck_assert_int_eq(remove_name(&a, a.root, "x", STORE_REMOVE), 0);
    ck_assert_int_eq(lookup(&a, a.root, "x", NULL, NULL), -ENOENT);
    ck_assert(reads_as(&a, file, "content"));
    ck_assert_int_eq(put(&a, file, 0, "CON", 3), 0);
    ck_assert(reads_as(&a, file, "CONtent"));
    WAIT_UNTIL(was_changed(&b, theirs));
    ck_assert_int_eq(lookup(&b, b.root, "x", NULL, NULL), -ENOENT);
    WAIT_UNTIL(was_gone(&b, "x"));
    ck_assert_int_eq(remove_name(&a, a.root, "x", STORE_REMOVE), -ENOENT);
    ck_assert_int_eq(remove_name(&b, b.root, "x", STORE_REMOVE), -ENOENT);
    ck_assert_int_eq(server_do(&server, "DBSIZE"), 1); /* the root */
    ck_assert_uint_eq(n_dirty(&a), 0);
    store_forget(a.store, file, 1);
}
END_TEST

START_TEST(name_can_be_made_again_after_its_removal)
{
    struct session *file = new_file(&a, a.root, "x");

    ck_assert_int_eq(save(&a, file, "one"), 0);
    ck_assert_int_eq(remove_name(&a, a.root, "x", STORE_REMOVE), 0);
    struct session *again = new_file(&a, a.root, "x");
    ck_assert_ptr_ne(again, file);
    ck_assert_int_eq(save(&a, again, "two"), 0);
    closed(&a, a.root, "x");
    ck_assert(reads_as(&a, file, "one"));
    WAIT_UNTIL(name_reads_as(&b, "x", "two"));
    store_forget(a.store, file, 1);
}
END_TEST

START_TEST(directories_are_removed_only_when_empty)
{
    struct session *dir = new_dir(&a, a.root, "d");

    new_file(&a, dir, "x");
    ck_assert_int_eq(remove_name(&a, a.root, "d", STORE_RMDIR), -ENOTEMPTY);
    ck_assert_int_eq(remove_name(&b, b.root, "d", STORE_RMDIR), -ENOTEMPTY);
    ck_assert_int_eq(remove_name(&a, a.root, "d", STORE_REMOVE), -EISDIR);
    ck_assert_int_eq(remove_name(&a, dir, "x", STORE_RMDIR), -ENOTDIR);
    ck_assert_int_eq(remove_name(&a, dir, "x", STORE_REMOVE), 0);
    ck_assert_int_eq(remove_name(&b, b.root, "d", STORE_RMDIR), 0);
    WAIT_UNTIL(lookup(&a, a.root, "d", NULL, NULL) == -ENOENT);
    ck_assert_int_eq(make(&a, dir, "y", S_IFREG | 0600, true, NULL), -ENOENT);
    ck_assert_int_eq(remove_name(&a, a.root, "d", STORE_RMDIR), -ENOENT);
}
END_TEST

START_TEST(path_of_nested_directories)
{
    struct session *one = new_dir(&a, a.root, "one"), *two = new_dir(&a, one, "two");
    char path[64], little[5];

    ck_assert_int_eq(store_path(a.store, a.root, path, sizeof(path)), 0);
    ck_assert_str_eq(path, "");
    ck_assert_int_eq(store_path(a.store, two, path, sizeof(path)), 0);
    ck_assert_str_eq(path, "/one/two");
    ck_assert_int_eq(store_path(a.store, two, little, sizeof(little)), -ENAMETOOLONG);
    ck_assert_int_eq(rename_to(&a, a.root, "one", a.root, "eins", false), 0);
    ck_assert_int_eq(store_path(a.store, two, path, sizeof(path)), 0);
    ck_assert_str_eq(path, "/eins/two");
    ck_assert_int_eq(remove_name(&a, one, "two", STORE_RMDIR), 0);
    ck_assert_int_eq(store_path(a.store, two, path, sizeof(path)), -ENOENT);
    store_forget(a.store, two, 1);
}
END_TEST

START_TEST(rename_moves_the_session_for_both)
{
    struct session *dir = new_dir(&a, a.root, "d"), *file = new_file(&a, a.root, "x"), *theirs = NULL;

    ck_assert_int_eq(save(&a, file, "content"), 0);
    ck_assert_int_eq(set_xattr(&a, file, "user.color", "red", 0), 0);
    theirs = found(&b, b.root, "x");
    ck_assert_int_eq(rename_to(&a, a.root, "x", dir, "y", false), 0);
    ck_assert_ptr_eq(found(&a, dir, "y"), file);
    ck_assert(reads_as(&a, file, "content"));
    ck_assert_int_eq(lookup(&a, a.root, "x", NULL, NULL), -ENOENT);
    WAIT_UNTIL(was_changed(&b, theirs));
    ck_assert_int_eq(lookup(&b, b.root, "x", NULL, NULL), -ENOENT);
    struct session *moved = found(&b, found(&b, b.root, "d"), "y");
    ck_assert(reads_as(&b, moved, "content"));
    char value[256];
    ck_assert_int_eq(get_xattr(&b, moved, "user.color", value), 0);
    ck_assert_str_eq(value, "red");
    ck_assert_int_eq(rename_to(&a, a.root, "x", dir, "z", false), -ENOENT);
    ck_assert_int_eq(rename_to(&a, dir, "y", dir, "y", false), 0);
    ck_assert_int_eq(save(&a, file, "changed after the rename"), 0);
    closed(&a, dir, "y");
    WAIT_UNTIL(reads_as(&b, moved, "changed after the rename"));
}
END_TEST

START_TEST(rename_replaces_unless_told_not_to)
{
    struct session *one = new_file(&a, a.root, "one"), *two = new_file(&a, a.root, "two");

    ck_assert_int_eq(save(&a, one, "1"), 0);
    ck_assert_int_eq(save(&a, two, "2"), 0);
    closed(&a, a.root, "one");
    closed(&a, a.root, "two");
    ck_assert_int_eq(rename_to(&a, a.root, "one", a.root, "two", true), -EEXIST);
    ck_assert_int_eq(rename_to(&b, b.root, "one", b.root, "two", true), -EEXIST);
    ck_assert(reads_as(&a, two, "2"));
    ck_assert_int_eq(rename_to(&a, a.root, "one", a.root, "two", false), 0);
    ck_assert_ptr_eq(found(&a, a.root, "two"), one);
    ck_assert(reads_as(&a, one, "1"));
    ck_assert(reads_as(&a, two, "2")); /* who has it open */
    WAIT_UNTIL(name_reads_as(&b, "two", "1"));
    ck_assert_int_eq(server_do(&server, "DBSIZE"), 2);
    store_forget(a.store, two, 1);
}
END_TEST

START_TEST(rename_takes_unsaved_changes_along)
{
    struct session *file = new_file(&a, a.root, "tmp");

    ck_assert_int_eq(put(&a, file, 0, "unsaved", 7), 0);
    ck_assert_int_eq(rename_to(&a, a.root, "tmp", a.root, "final", false), 0);
    ck_assert(is_stored_as("final", "unsaved"));
    ck_assert_uint_eq(n_dirty(&a), 0);
    ck_assert(name_reads_as(&b, "final", "unsaved"));
}
END_TEST

START_TEST(directory_is_not_renamed_onto_one_that_has_something)
{
    struct session *full = new_dir(&a, a.root, "full");

    new_dir(&a, a.root, "one");
    new_dir(&a, a.root, "empty");
    new_file(&a, full, "x");
    ck_assert_int_eq(rename_to(&a, a.root, "one", a.root, "full", false), -ENOTEMPTY);
    ck_assert_int_eq(rename_to(&a, a.root, "full", a.root, "empty", false), 0);
    ck_assert_int_eq(lookup(&a, full, "x", NULL, NULL), 0);
    ck_assert_int_eq(lookup(&b, found(&b, b.root, "empty"), "x", NULL, NULL), 0);
}
END_TEST

/* ---- content ---- */

START_TEST(whole_save_is_in_redis_when_it_is_answered)
{
    struct session *file = new_file(&a, a.root, "x");
    char text[64];

    for (int i = 0; i < 30; i++) {
        snprintf(text, sizeof(text), "save number %d", i);
        ck_assert_int_eq(save(&a, file, text), 0);
        ck_assert(is_stored_as("x", text));
        ck_assert_uint_eq(n_dirty(&a), 0);
        closed(&a, a.root, "x");
        WAIT_UNTIL(name_reads_as(&b, "x", text));
    }
    ck_assert_uint_eq(a.n_watched, 1);
}
END_TEST

START_TEST(partial_writes_are_saved_by_the_close)
{
    struct session *file = new_file(&a, a.root, "x");
    unsigned char *bytes = bytes_of(3 * PAGE + 100, 1);
    struct stored stored = {0};
    unsigned char read[3 * PAGE + 200];

    for (size_t at = 0; at < 3 * PAGE; at += PAGE)
        ck_assert_int_eq(put(&a, file, at, bytes + at, PAGE), 0);
    ck_assert_int_eq(put(&a, file, 3 * PAGE, bytes + 3 * PAGE, 100), 0);
    ck_assert_uint_eq(n_dirty(&a), 1);
    ck_assert(is_stored_as("x", ""));
    closed(&a, a.root, "x");
    WAIT_UNTIL(n_dirty(&a) == 0);
    ck_assert(is_stored("x", &stored));
    ck_assert_uint_eq(stored.content_size, 3 * PAGE + 100);
    ck_assert_int_eq(stored.head.state, SEAL_STATE_FINISHED);
    struct session *theirs = found(&b, b.root, "x");
    ck_assert_int_eq(get(&b, theirs, 0, read, sizeof(read)), 3 * PAGE + 100);
    ck_assert_mem_eq(read, bytes, 3 * PAGE + 100);
    free(bytes);
}
END_TEST

START_TEST(partial_writes_without_a_close_are_saved_after_a_pause)
{
    struct session *file = new_file(&a, a.root, "x");

    ck_assert_int_eq(put(&a, file, 0, "unsaved", 7), 0);
    WAIT_UNTIL(n_dirty(&a) == 0);
    ck_assert(is_stored_as("x", "unsaved"));
}
END_TEST

START_TEST(sync_saves)
{
    struct session *file = new_file(&a, a.root, "x");
    struct job job = {.op = {.kind = STORE_SYNC, .session = file}}, again = job;

    ck_assert_int_eq(put(&a, file, 0, "unsaved", 7), 0);
    ck_assert_int_eq(run_op(&a, &job), 0);
    ck_assert(is_stored_as("x", "unsaved"));
    ck_assert_int_eq(run_op(&a, &again), 0);
}
END_TEST

START_TEST(flush_saves_everything)
{
    char name[16];

    for (int i = 0; i < 50; i++) {
        snprintf(name, sizeof(name), "x%d", i);
        ck_assert_int_eq(put(&a, new_file(&a, a.root, name), 0, name, strlen(name)), 0);
    }
    ck_assert_uint_eq(n_dirty(&a), 50);
    ck_assert_int_eq(store_flush(a.store, WAIT_MS), 0);
    ck_assert_uint_eq(n_dirty(&a), 0);
    ck_assert(is_stored_as("x49", "x49"));
    ck_assert(is_stored_as("x0", "x0"));
    ck_assert_int_eq(store_flush(a.store, 0), 0);
}
END_TEST

START_TEST(flush_gives_up_in_time)
{
    ck_assert_int_eq(put(&a, new_file(&a, a.root, "x"), 0, "unsaved", 7), 0);
    server_freeze(&server);
    uint64_t began_ms = clock_now_ms();
    ck_assert_int_eq(store_flush(a.store, 100), -ETIMEDOUT);
    ck_assert_uint_lt(clock_now_ms() - began_ms, 3000);
    server_continue(&server);
    ck_assert_int_eq(store_flush(a.store, WAIT_MS), 0);
    ck_assert(is_stored_as("x", "unsaved"));
}
END_TEST

START_TEST(overlapping_writes_and_truncations_give_what_a_file_would)
{
    struct session *file = new_file(&a, a.root, "x");
    static unsigned char model[64 * 1024], read[sizeof(model)];
    size_t size = 0;
    uint64_t z = 42 + (uint64_t)_i;

    for (int i = 0; i < 400; i++) {
        z = z * 6364136223846793005u + 1442695040888963407u;
        size_t at = (z >> 33) % (size + 3000), n = (z >> 20) % 9000 + 1;
        if (z >> 60 == 0) {
            size_t to = (z >> 33) % (size + PAGE);
            ck_assert_int_eq(set_attr(&a, file, (struct job){.op = {.set = STORE_SET_SIZE, .size = to}}), 0);
            if (to < size)
                memset(model + to, 0, size - to);
            size = to;
        } else if (at + n < sizeof(model)) {
            unsigned char *bytes = bytes_of(n, (unsigned)i);
            struct job job = write_job(file, at, bytes, n, z & 0x100);
            CHECK(run_op(&a, &job) == 0);
            memcpy(model + at, bytes, n);
            size = max_u64(size, at + n);
            free(bytes);
        }
        if (i % 16 == 0) {
            CHECK(get(&a, file, 0, read, sizeof(read)) == (int)size && memcmp(read, model, size) == 0);
            closed(&a, a.root, "x");
        }
    }
    ck_assert_int_eq(store_flush(a.store, WAIT_MS), 0);
    struct session *theirs = found(&b, b.root, "x");
    WAIT_UNTIL(get(&b, theirs, 0, read, sizeof(read)) == (int)size && memcmp(read, model, size) == 0);
}
END_TEST

START_TEST(reads_end_where_the_content_ends)
{
    struct session *file = new_file(&a, a.root, "x");
    char bytes[32];

    ck_assert_int_eq(get(&a, file, 0, bytes, 10), 0);
    ck_assert_int_eq(save(&a, file, "0123456789"), 0);
    ck_assert_int_eq(get(&a, file, 4, bytes, 3), 3);
    ck_assert_mem_eq(bytes, "456", 3);
    ck_assert_int_eq(get(&a, file, 8, bytes, 10), 2);
    ck_assert_int_eq(get(&a, file, 10, bytes, 10), 0);
    ck_assert_int_eq(get(&a, file, UINT64_MAX - 5, bytes, 10), 0);
}
END_TEST

START_TEST(what_is_lent_does_not_change)
{
    struct session *file = new_file(&a, a.root, "x");
    struct job job = {.op = {.kind = STORE_READ, .session = file, .size = 100}};

    ck_assert_int_eq(save(&a, file, "before"), 0);
    ck_assert_int_eq(run_op(&a, &job), 0);
    ck_assert_int_eq(save(&a, file, "after!"), 0);
    ck_assert_int_eq(put(&a, file, 0, "x", 1), 0);
    ck_assert_int_eq(remove_name(&a, a.root, "x", STORE_REMOVE), 0);
    ck_assert_mem_eq(job.op.bytes, "before", 6);
    store_done_with(a.store, &job.op);
    store_forget(a.store, file, 1);
}
END_TEST

START_TEST(sessions_larger_than_allowed_are_efbig)
{
    struct session *file = new_file(&a, a.root, "x");

    ck_assert_int_eq(put(&a, file, 4u << 20, "x", 1), -EFBIG);
    ck_assert_int_eq(set_size(&a, file, (4u << 20) + 1), -EFBIG);
    ck_assert_int_eq(put(&a, file, (4u << 20) - 1, "x", 1), 0);
    closed(&a, a.root, "x");
    WAIT_UNTIL(n_dirty(&a) == 0);
    struct store_attr attr;
    ck_assert_int_eq(lookup(&b, b.root, "x", NULL, &attr), 0);
    ck_assert_uint_eq(attr.size, 4u << 20);
}
END_TEST

START_TEST(large_sessions_travel_whole)
{
    size_t size = (3u << 20) + 12345;
    unsigned char *bytes = bytes_of(size, 1), *read = malloc(size + 1);
    struct session *file = new_file(&a, a.root, "x");

    struct job job = write_job(file, 0, bytes, size, false);
    ck_assert_int_eq(run_op(&a, &job), 0);
    closed(&a, a.root, "x");
    struct session *theirs = found(&b, b.root, "x");
    WAIT_UNTIL(get(&b, theirs, 0, read, size + 1) == (int)size);
    ck_assert(memcmp(read, bytes, size) == 0);
    free(bytes);
    free(read);
}
END_TEST

/* ---- attributes ---- */

START_TEST(attributes_are_set_for_both)
{
    struct session *file = new_file(&a, a.root, "x"), *theirs = found(&b, b.root, "x");
    struct store_attr attr;

    ck_assert_int_eq(
        set_attr(&a, file,
                 (struct job){.op = {.set = STORE_SET_MODE | STORE_SET_UID | STORE_SET_GID | STORE_SET_MTIME,
                                     .mode = 0640,
                                     .uid = 77,
                                     .gid = 88,
                                     .mtime_ns = 12345678901}}),
        0);
    WAIT_UNTIL(getattr(&b, theirs, &attr) == 0 && attr.mode == (S_IFREG | 0640));
    ck_assert_uint_eq(attr.uid, 77);
    ck_assert_uint_eq(attr.gid, 88);
    ck_assert_int_eq(attr.mtime_ns, 12345678901);
    ck_assert_int_gt(attr.ctime_ns, 12345678901);
}
END_TEST

START_TEST(size_shrinks_and_grows_with_zeros)
{
    struct session *file = new_file(&a, a.root, "x"), *theirs;
    char bytes[64];

    ck_assert_int_eq(save(&a, file, "0123456789"), 0);
    ck_assert_int_eq(set_size(&a, file, 4), 0);
    ck_assert(is_stored_as("x", "0123"));
    ck_assert_int_eq(set_size(&a, file, 8), 0);
    closed(&a, a.root, "x");
    theirs = found(&b, b.root, "x");
    ck_assert_int_eq(get(&b, theirs, 0, bytes, sizeof(bytes)), 8);
    ck_assert_mem_eq(bytes, "0123\0\0\0\0", 8);
    ck_assert_int_eq(set_size(&b, theirs, 0), 0);
    WAIT_UNTIL(get(&a, file, 0, bytes, sizeof(bytes)) == 0);
    ck_assert_int_eq(set_size(&a, a.root, 0), -EISDIR);
}
END_TEST

START_TEST(write_and_truncation_end_suid)
{
    struct session *file = new_file(&a, a.root, "x");
    struct store_attr attr;
    struct job job = write_job(file, 0, "x", 1, false);

    ck_assert_int_eq(set_attr(&a, file, (struct job){.op = {.set = STORE_SET_MODE, .mode = 06755}}), 0);
    job.op.kills_suid = true;
    ck_assert_int_eq(run_op(&a, &job), 0);
    ck_assert_int_eq(getattr(&a, file, &attr), 0);
    ck_assert_uint_eq(attr.mode, S_IFREG | 0755);
}
END_TEST

START_TEST(group_is_inherited_from_a_set_group_id_directory)
{
    struct session *dir = new_dir(&a, a.root, "d");
    struct store_attr attr;

    ck_assert_int_eq(
        set_attr(&a, dir, (struct job){.op = {.set = STORE_SET_MODE | STORE_SET_GID, .mode = 02770, .gid = 99}}), 0);
    ck_assert_int_eq(getattr(&a, new_file(&a, dir, "x"), &attr), 0);
    ck_assert_uint_eq(attr.gid, 99);
    ck_assert_int_eq(getattr(&a, new_dir(&a, dir, "e"), &attr), 0);
    ck_assert_uint_eq(attr.gid, 99);
    ck_assert_uint_eq(attr.mode, S_IFDIR | 02700);
}
END_TEST

START_TEST(own_attributes_are_kept_and_listed)
{
    struct session *file = new_file(&a, a.root, "x"), *theirs = found(&b, b.root, "x");
    char value[256];

    ck_assert_int_eq(get_xattr(&a, file, "user.color", value), -ENODATA);
    ck_assert_int_eq(set_xattr(&a, file, "user.color", "red", XATTR_REPLACE), -ENODATA);
    ck_assert_int_eq(set_xattr(&a, file, "user.color", "red", XATTR_CREATE), 0);
    ck_assert_int_eq(set_xattr(&a, file, "user.color", "blue", XATTR_CREATE), -EEXIST);
    ck_assert_int_eq(set_xattr(&a, file, "user.color", "green", XATTR_REPLACE), 0);
    ck_assert_int_eq(set_xattr(&a, file, "user.empty", "", 0), 0);
    WAIT_UNTIL(get_xattr(&b, theirs, "user.empty", value) == 0);
    ck_assert_str_eq(value, "");
    ck_assert_int_eq(get_xattr(&b, theirs, "user.color", value), 0);
    ck_assert_str_eq(value, "green");

    struct job list = {.op = {.kind = STORE_LISTXATTR, .session = file}};
    ck_assert_int_eq(run_op(&a, &list), 0);
    ck_assert_ptr_nonnull(memmem(list.op.bytes, list.op.n_bytes, "user.color", 11));
    ck_assert_ptr_nonnull(memmem(list.op.bytes, list.op.n_bytes, "user.session.ttl", 17));
    store_done_with(a.store, &list.op);

    ck_assert_int_eq(remove_xattr(&b, theirs, "user.color"), 0);
    ck_assert_int_eq(remove_xattr(&b, theirs, "user.color"), -ENODATA);
    WAIT_UNTIL(get_xattr(&a, file, "user.color", value) == -ENODATA);
    ck_assert_int_eq(set_xattr(&a, file, "security.x", "1", 0), -EOPNOTSUPP);
}
END_TEST

START_TEST(own_attributes_have_a_bound)
{
    struct session *file = new_file(&a, a.root, "x");
    char *large = calloc(1, STORE_XATTRS_MAX + 1), value[256];

    memset(large, 'x', STORE_XATTRS_MAX);
    ck_assert_int_eq(set_xattr(&a, file, "user.large", large, 0), -ENOSPC);
    large[STORE_XATTRS_MAX - 20] = 0;
    ck_assert_int_eq(set_xattr(&a, file, "user.large", large, 0), 0);
    ck_assert_int_eq(set_xattr(&a, file, "user.more", "more than fits", 0), -ENOSPC);
    ck_assert_int_eq(get_xattr(&b, found(&b, b.root, "x"), "user.large", value), 0);
    ck_assert_int_eq(set_xattr(&a, file, "user.large", "small", 0), 0);
    ck_assert_int_eq(set_xattr(&a, file, "user.more", "fits now", 0), 0);
    free(large);
}
END_TEST

START_TEST(attributes_of_the_session_are_shown)
{
    struct session *file = new_file(&a, a.root, "x");
    char value[256];

    ck_assert_int_eq(get_xattr(&a, file, "user.session.policy", value), 0);
    ck_assert_str_eq(value, "sliding");
    ck_assert_int_eq(get_xattr(&a, file, "user.session.ttl", value), 0);
    ck_assert_int_gt(atoi(value), 86000);
    ck_assert_int_eq(get_xattr(&a, file, "user.session.version", value), 0);
    ck_assert_int_eq(strncmp(value, "1-", 2), 0);
    ck_assert_int_eq(get_xattr(&a, file, "user.session.tier", value), 0);
    ck_assert_str_eq(value, "l1");
    ck_assert_int_eq(set_xattr(&a, file, "user.session.version", "1", 0), -EPERM);
    ck_assert_int_eq(set_xattr(&a, file, "user.session.nonsense", "1", 0), -EINVAL);
    ck_assert_int_eq(set_xattr(&a, file, "user.session.ttl", "soon", 0), -EINVAL);
    ck_assert_int_eq(set_xattr(&a, file, "user.session.policy", "never", 0), -EINVAL);
    ck_assert_int_eq(remove_xattr(&a, file, "user.session.policy"), -EPERM);
}
END_TEST

/* ---- listing ---- */

static void list_all(struct side *side, struct session *dir, bool learns, unsigned *n, char (*names)[16], unsigned room)
{
    struct store_list *list = store_list_new(dir);
    struct store_entry entry;
    int r;

    *n = 0;
    while ((r = store_list_at(list, *n, &entry)) >= 0) {
        if (r == 1) {
            CHECK(*n < room);
            snprintf(names[(*n)++], 16, "%.*s", entry.name_size, entry.name);
            continue;
        }
        struct job job = {.op = {.kind = STORE_LIST, .dir = dir, .list = list, .is_cached = learns}};
        CHECK(run_op(side, &job) == 0);
    }
    store_list_free(side->store, list);
}

static int by_name(const void *x, const void *y)
{
    return strcmp(x, y);
}

START_TEST(list_has_every_name_once)
{
    static char names[2000][16];
    struct session *dir = new_dir(&a, a.root, "d");
    static struct job jobs[1500];
    unsigned n;

    list_all(&b, b.root, _i, &n, names, 2000);
    ck_assert_uint_eq(n, 1);
    ck_assert_str_eq(names[0], "d");
    struct session *theirs = found(&b, b.root, "d");
    list_all(&b, theirs, _i, &n, names, 2000);
    ck_assert_uint_eq(n, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(jobs); i++) {
        jobs[i].op = (struct store_op){.kind = STORE_CREATE, .dir = dir, .mode = S_IFREG | 0600, .is_exclusive = true};
        char name[16];
        snprintf(name, sizeof(name), "x%04u", i);
        set_name(&jobs[i].op, name);
        begin(&a, &jobs[i]);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(jobs); i++)
        CHECK(result_of(&jobs[i]) == 0);
    list_all(&b, theirs, _i, &n, names, 2000);
    ck_assert_uint_eq(n, ARRAY_SIZE(jobs));
    qsort(names, n, sizeof(names[0]), by_name);
    for (unsigned i = 0; i < n; i++) {
        char name[16];
        snprintf(name, sizeof(name), "x%04u", i);
        CHECK(strcmp(names[i], name) == 0);
    }
    struct store_attr attr;
    struct session *known = store_peek(b.store, theirs, "x0000", 5, &attr);
    ck_assert_int_eq(known != NULL, _i);
}
END_TEST

/* Names that are learnt while another instance saves them must be reported or doubted afterwards. */
struct saver {
    pthread_t thread;
    struct session **files;
    unsigned n_files;
    _Atomic bool is_ending;
    _Atomic unsigned n_saves;
    uint64_t sizes[300];
};

static void saver_done(struct store_op *op)
{
    atomic_store(&CONTAINER_OF(op, struct job, op)->is_done, true);
}

static void *save_on_and_on(void *arg)
{
    static const char text[4000];
    struct saver *saver = arg;

    for (unsigned i = 0; !atomic_load(&saver->is_ending); i++) {
        unsigned at = (i * 7919u) % saver->n_files;
        uint64_t size = 1 + i % 3999;
        struct job job = write_job(saver->files[at], 0, text, size, false);
        job.op.done = saver_done;
        /* a truncation first, so that each save is whole */
        struct job cut = {
            .op = {.kind = STORE_SETATTR, .session = saver->files[at], .set = STORE_SET_SIZE, .done = saver_done}};
        store_run(a.store, &cut.op);
        while (!atomic_load(&cut.is_done))
            poll(NULL, 0, 0);
        store_run(a.store, &job.op);
        while (!atomic_load(&job.is_done))
            poll(NULL, 0, 0);
        saver->sizes[at] = size;
        saver->n_saves++;
    }
    return NULL;
}

START_TEST(what_is_learnt_by_listing_is_never_stale_for_long)
{
    static struct saver saver;
    struct session *files[300];
    static char names[400][16];
    char name[16];
    unsigned n, n_seen = 0, n_wrong = 0;

    for (unsigned round = 0; round < 6; round++) {
        snprintf(name, sizeof(name), "d%u", round);
        struct session *dir = new_dir(&a, a.root, name), *theirs = found(&b, b.root, name);
        for (unsigned i = 0; i < ARRAY_SIZE(files); i++) {
            snprintf(name, sizeof(name), "x%03u", i);
            files[i] = new_file(&a, dir, name);
        }
        saver = (struct saver){.files = files, .n_files = ARRAY_SIZE(files)};
        pthread_create(&saver.thread, NULL, save_on_and_on, &saver);
        WAIT_UNTIL(saver.n_saves > 20); /* the directory is trusted: what is saved is finished */
        list_all(&b, theirs, true, &n, names, 400);
        atomic_store(&saver.is_ending, true);
        pthread_join(saver.thread, NULL);
        ck_assert_int_eq(store_flush(a.store, WAIT_MS), 0);
        /* A report for this one comes after all the others. */
        struct session *last = new_file(&a, dir, "last");
        struct session *seen = found(&b, theirs, "last");
        forget_changed(&b);
        ck_assert_int_eq(save(&a, last, "x"), 0);
        WAIT_UNTIL(was_changed(&b, seen));
        for (unsigned i = 0; i < ARRAY_SIZE(files); i++) {
            struct store_attr attr, right;
            snprintf(name, sizeof(name), "x%03u", i);
            struct session *peeked = store_peek(b.store, theirs, name, 4, &attr);
            CHECK(getattr(&a, files[i], &right) == 0);
            n_seen += peeked != NULL;
            n_wrong += peeked && attr.size != right.size;
        }
    }
    ck_assert_uint_gt(n_seen, 0);
    ck_assert_msg(n_wrong == 0, "%u of %u trusted entries are out of date", n_wrong, n_seen);
}
END_TEST

/* ---- two instances ---- */

START_TEST(change_elsewhere_makes_it_suspect_and_is_told)
{
    struct session *file = new_file(&a, a.root, "x"), *theirs = found(&b, b.root, "x");
    struct store_attr attr;

    ck_assert_int_eq(save(&a, file, "one"), 0);
    closed(&a, a.root, "x");
    WAIT_UNTIL(reads_as(&b, theirs, "one"));
    forget_changed(&b);
    ck_assert_int_eq(save(&a, file, "two"), 0);
    closed(&a, a.root, "x");
    WAIT_UNTIL(was_changed(&b, theirs));
    WAIT_UNTIL(reads_as(&b, theirs, "two"));
    WAIT_UNTIL(getattr(&b, theirs, &attr) == 0 && attr.size == 3 && attr.valid_ms > 0);
    ck_assert_uint_le(attr.valid_ms, STORE_LEASE_MS);
    forget_changed(&a);
    ck_assert_int_eq(save(&b, theirs, "three"), 0);
    closed(&b, b.root, "x");
    WAIT_UNTIL(was_changed(&a, file));
    WAIT_UNTIL(reads_as(&a, file, "three"));
}
END_TEST

START_TEST(open_save_is_waited_for_and_the_close_finishes_it)
{
    struct session *file = new_file(&a, a.root, "x"), *theirs = found(&b, b.root, "x");
    struct stored stored = {0};
    char bytes[64];

    for (int i = 0; i < 5; i++) {
        forget_changed(&b);
        ck_assert_int_eq(getattr(&b, theirs, &(struct store_attr){0}), 0);
        ck_assert_int_eq(save(&a, file, "first half, "), 0);
        ck_assert(is_stored("x", &stored));
        WAIT_UNTIL(was_changed(&b, theirs));
        struct job job = {.op = {.kind = STORE_READ, .session = theirs, .size = 64}};
        begin(&b, &job);
        ck_assert_int_eq(put(&a, file, 12, "second half", 11), 0);
        closed(&a, a.root, "x");
        ck_assert_int_eq(result_of(&job), 0);
        bool is_old = job.op.n_bytes == 0; /* the version before it, for some milliseconds */
        ck_assert_msg(job.op.n_bytes == 23 || is_old, "half a save was read: %zu bytes (turn %d)", job.op.n_bytes, i);
        store_done_with(b.store, &job.op);
        WAIT_UNTIL(get(&b, theirs, 0, bytes, sizeof(bytes)) == 23);
        WAIT_UNTIL(n_dirty(&a) == 0 && is_stored("x", &stored) && stored.head.state == SEAL_STATE_FINISHED);
        ck_assert_int_eq(set_size(&a, file, 0), 0);
        closed(&a, a.root, "x");
        WAIT_UNTIL(get(&b, theirs, 0, bytes, sizeof(bytes)) == 0);
    }
}
END_TEST

START_TEST(whole_save_is_marked_open_and_the_close_finishes_it)
{
    struct session *file = new_file(&a, a.root, "x");
    struct stored stored = {0};

    ck_assert_int_eq(save(&a, file, "content"), 0);
    closed(&a, a.root, "x");
    uint64_t closed_ms = clock_now_ms();
    WAIT_UNTIL(is_stored("x", &stored) && stored.head.state == SEAL_STATE_FINISHED);
    ck_assert_uint_lt(clock_now_ms() - closed_ms, 10000);
    struct session *theirs = found(&b, b.root, "x");
    ck_assert(reads_as(&b, theirs, "content"));
}
END_TEST

START_TEST(open_save_of_a_writer_that_died_is_taken_after_a_while)
{
    struct session *file = new_file(&a, a.root, "x");
    struct stored stored = {0};
    uint64_t began_ms;

    ck_assert_int_eq(save(&a, file, "content"), 0);
    closed(&a, a.root, "x");
    WAIT_UNTIL(is_stored("x", &stored) && stored.head.state == SEAL_STATE_FINISHED);
    server_do(&server, "SETRANGE %b 5 %b", stored.key, stored.key_size, "\xa5", (size_t)1);
    began_ms = clock_now_ms();
    struct session *theirs = found(&b, b.root, "x");
    ck_assert(reads_as(&b, theirs, "content"));
    ck_assert_uint_ge(clock_now_ms() - began_ms, 500);
    WAIT_UNTIL(is_stored("x", &stored) && stored.head.state == SEAL_STATE_FINISHED);
}
END_TEST

/* Redis takes both saves in one go; the report of the second overtakes the answer to the first. */
START_TEST(save_that_is_overtaken_before_its_answer_is_not_believed)
{
    struct session *file = new_file(&a, a.root, "x"), *theirs = found(&b, b.root, "x");
    struct store_attr attr;

    for (int i = 0; i < 20; i++) {
        char mine[32], other[32];
        snprintf(mine, sizeof(mine), "mine %d", i);
        snprintf(other, sizeof(other), "theirs %d", i);
        WAIT_UNTIL(getattr(&a, file, &attr) == 0 && attr.valid_ms && getattr(&b, theirs, &attr) == 0 && attr.valid_ms);
        server_freeze(&server);
        struct job first = write_job(file, 0, mine, strlen(mine), false);
        struct job second = write_job(theirs, 0, other, strlen(other), false);
        first.op.set = second.op.set = 0;
        begin(&a, &first);
        begin(&b, &second);
        server_continue(&server);
        ck_assert_int_eq(result_of(&first), 0);
        ck_assert_int_eq(result_of(&second), 0);
        closed(&a, a.root, "x");
        closed(&b, b.root, "x");
        const char *last = is_stored_as("x", other) ? other : mine;
        uint64_t until_ms = clock_now_ms() + 3000; /* nobody saves any more: both must come to agree */
        while (!(reads_as(&a, file, last) && reads_as(&b, theirs, last)) && clock_now_ms() < until_ms)
            poll(NULL, 0, 2);
        ck_assert_msg(reads_as(&a, file, last), "round %d: Redis has \"%s\", but the first instance shows its own", i,
                      last);
        ck_assert_msg(reads_as(&b, theirs, last), "round %d: Redis has \"%s\", but the second shows its own", i, last);
        ck_assert_int_eq(set_size(&a, file, 0), 0);
        WAIT_UNTIL(getattr(&b, theirs, &attr) == 0 && attr.size == 0 && attr.valid_ms);
    }
}
END_TEST

START_TEST(create_of_a_name_that_was_something_else_is_a_new_session)
{
    struct session *file = new_file(&a, a.root, "x"), *theirs = found(&b, b.root, "x"), *dir = NULL;
    struct store_attr attr;

    ck_assert_int_eq(save(&a, file, "content"), 0);
    closed(&a, a.root, "x");
    WAIT_UNTIL(reads_as(&b, theirs, "content"));
    forget_changed(&b);
    ck_assert_int_eq(remove_name(&a, a.root, "x", STORE_REMOVE), 0);
    WAIT_UNTIL(was_changed(&b, theirs));
    ck_assert_int_eq(make(&b, b.root, "x", S_IFDIR | 0700, true, &dir), 0);
    ck_assert_ptr_ne(dir, theirs);
    int r = getattr(&b, theirs, &attr);
    ck_assert(r == -ESTALE || (r == 0 && S_ISREG(attr.mode)));
    store_forget(a.store, file, 1);
}
END_TEST

START_TEST(damaged_session_is_ebadmsg_and_can_be_removed)
{
    struct session *file = new_file(&a, a.root, "x");
    struct stored stored = {0};
    struct store_stats stats;
    char bytes[64];

    ck_assert_int_eq(save(&a, file, "content"), 0);
    closed(&a, a.root, "x");
    WAIT_UNTIL(is_stored("x", &stored) && stored.head.state == SEAL_STATE_FINISHED);
    static const int places[] = {0, 20, 45, 70, -20, -1};
    redisReply *blob = server_reply(&server, "GET %b", stored.key, stored.key_size);
    int at = places[_i] < 0 ? (int)blob->len + places[_i] : places[_i];
    char damaged = (char)(blob->str[at] ^ 1);
    freeReplyObject(blob);
    ck_assert_int_eq(lookup(&b, b.root, "x", NULL, NULL), 0);
    forget_changed(&a);
    server_do(&server, "SETRANGE %b %d %b", stored.key, stored.key_size, at, &damaged, (size_t)1);
    WAIT_UNTIL(was_changed(&a, file));
    ck_assert_int_eq(get(&a, file, 0, bytes, sizeof(bytes)), -EBADMSG);
    WAIT_UNTIL(lookup(&b, b.root, "x", NULL, NULL) == -EBADMSG);
    store_stats(a.store, &stats);
    ck_assert_uint_gt(stats.n_bad, 0);
    ck_assert_int_eq(remove_name(&b, b.root, "x", STORE_REMOVE), 0);
    ck_assert_int_eq(lookup(&b, b.root, "x", NULL, NULL), -ENOENT);
    new_file(&b, b.root, "x");
}
END_TEST

START_TEST(session_moved_to_another_key_is_ebadmsg)
{
    struct stored one = {0}, two = {0};

    new_file(&a, a.root, "one");
    new_file(&a, a.root, "two");
    ck_assert(is_stored("one", &one) && is_stored("two", &two));
    server_do(&server, "RENAME %b %b", one.key, one.key_size, two.key, two.key_size);
    ck_assert_int_eq(lookup(&b, b.root, "two", NULL, NULL), -EBADMSG);
    ck_assert_int_eq(lookup(&b, b.root, "one", NULL, NULL), -ENOENT);
}
END_TEST

START_TEST(namespace_of_another_key_is_refused)
{
    struct store_config with = config();
    struct store *store = NULL;
    uint8_t other[SEAL_KEY_BYTES] = {1};

    seal_keys_free(with.keys);
    ck_assert_int_eq(seal_keys_new(&with.keys, other), 0);
    int r = store_new(&store, &with, why, sizeof(why));
    ck_assert_msg(r == -EBADMSG || r == 0, "%d: %s", r, why);
    if (r == 0) { /* its names hash differently: it sees nothing of ours */
        struct side c = {.lock = PTHREAD_MUTEX_INITIALIZER, .store = store, .root = store_root(store)};
        new_file(&a, a.root, "x");
        ck_assert_int_eq(lookup(&c, c.root, "x", NULL, NULL), -ENOENT);
        store_free(store);
    }
}
END_TEST

/* ---- time to live ---- */

START_TEST(expiry_removes_on_both)
{
    set_up_server();
    set_up_ttl(400);
    struct session *file = new_file(&a, a.root, "x"), *theirs = found(&b, b.root, "x");
    struct store_stats stats;

    ck_assert_ptr_nonnull(file);
    ck_assert_ptr_nonnull(theirs);
    WAIT_UNTIL(was_gone(&a, "x") && was_gone(&b, "x"));
    WAIT_UNTIL(server_do(&server, "DBSIZE") == 1); /* the instances may be a moment ahead of Redis */
    ck_assert_int_eq(lookup(&a, a.root, "x", NULL, NULL), -ENOENT);
    ck_assert_int_eq(lookup(&b, b.root, "x", NULL, NULL), -ENOENT);
    ck_assert_int_eq(getattr(&a, file, &(struct store_attr){0}), -ESTALE);
    store_stats(a.store, &stats);
    new_file(&a, a.root, "x");
    store_forget(a.store, file, 1);
    store_forget(b.store, theirs, 1);
}
END_TEST

START_TEST(sliding_session_lives_while_it_is_looked_up)
{
    set_up_server();
    set_up_ttl(1000);
    struct session *file = new_file(&a, a.root, "x");
    uint64_t until_ms = clock_now_ms() + 2500;

    ck_assert_ptr_nonnull(file);
    while (clock_now_ms() < until_ms) {
        ck_assert_int_eq(lookup(&a, a.root, "x", NULL, NULL), 0);
        poll(NULL, 0, 20);
    }
    ck_assert_int_eq(lookup(&b, b.root, "x", NULL, NULL), 0);
    WAIT_UNTIL(was_gone(&a, "x"));
}
END_TEST

START_TEST(fixed_session_ends_however_it_is_used)
{
    set_up_server();
    set_up_ttl(DAY_MS);
    struct session *file = new_file(&a, a.root, "x");

    ck_assert_int_eq(set_xattr(&a, file, "user.session.policy", "fixed", 0), 0);
    ck_assert_int_eq(set_xattr(&a, file, "user.session.ttl", "1500ms", 0), 0);
    uint64_t began_ms = clock_now_ms();
    int n_saves = 0;
    while (!was_gone(&a, "x")) {
        ck_assert_uint_lt(clock_now_ms() - began_ms, WAIT_MS);
        lookup(&a, a.root, "x", NULL, NULL);
        n_saves += save(&a, file, "used") == 0;
        lookup(&b, b.root, "x", NULL, NULL);
        poll(NULL, 0, 20);
    }
    ck_assert_uint_ge(clock_now_ms() - began_ms, 1000);
    ck_assert_uint_lt(clock_now_ms() - began_ms, 6000);
    ck_assert_int_gt(n_saves, 3);
    ck_assert_int_eq(lookup(&b, b.root, "x", NULL, NULL), -ENOENT);
    store_forget(a.store, file, 1);
}
END_TEST

START_TEST(save_and_touch_renew_a_sliding_session)
{
    set_up_server();
    set_up_ttl(100000);
    struct session *file = new_file(&a, a.root, "x");
    struct stored stored = {0};

    ck_assert(is_stored("x", &stored));
    server_do(&server, "PEXPIRE %b 5000", stored.key, stored.key_size);
    ck_assert_int_eq(save(&a, file, "renews"), 0);
    ck_assert(is_stored("x", &stored) && stored.pttl_ms > 50000);
    closed(&a, a.root, "x");
    WAIT_UNTIL(is_stored("x", &stored) && stored.head.state == SEAL_STATE_FINISHED);
    forget_changed(&a);
    server_do(&server, "PEXPIRE %b 5000", stored.key, stored.key_size);
    WAIT_UNTIL(was_changed(&a, file));
    ck_assert_int_eq(set_attr(&a, file, (struct job){.op = {.set = STORE_SET_MTIME_NOW}}), 0);
    WAIT_UNTIL(is_stored("x", &stored) && stored.pttl_ms > 50000);
    ck_assert_uint_eq(stored.content_size, 6);
}
END_TEST

START_TEST(new_sessions_inherit_the_time_of_their_directory)
{
    struct session *dir = new_dir(&a, a.root, "d"), *theirs;
    struct stored stored = {0};
    char value[256];

    ck_assert_int_eq(set_xattr(&a, dir, "user.session.ttl", "300", 0), 0);
    ck_assert_int_eq(set_xattr(&a, dir, "user.session.policy", "fixed", 0), 0);
    new_file(&a, dir, "x");
    ck_assert(is_stored("x", &stored));
    ck_assert(stored.pttl_ms > 200000 && stored.pttl_ms <= 300000);
    theirs = found(&b, b.root, "d");
    new_file(&b, theirs, "y");
    ck_assert(is_stored("y", &stored));
    ck_assert(stored.pttl_ms > 200000 && stored.pttl_ms <= 300000);
    ck_assert_int_eq(get_xattr(&a, found(&a, dir, "y"), "user.session.policy", value), 0);
    ck_assert_str_eq(value, "fixed");
    ck_assert(is_stored("d", &stored));
    ck_assert_int_eq(stored.pttl_ms, -1);
    ck_assert_int_eq(remove_xattr(&a, dir, "user.session.ttl"), 0);
    new_file(&a, dir, "z");
    ck_assert(is_stored("z", &stored));
    ck_assert_int_gt(stored.pttl_ms, 80000000);
    new_file(&a, a.root, "w");
    ck_assert(is_stored("w", &stored));
    ck_assert_int_gt(stored.pttl_ms, 80000000);
}
END_TEST

START_TEST(time_to_live_none_never_ends)
{
    struct session *file = new_file(&a, a.root, "x");
    struct stored stored = {0};
    char value[256];

    ck_assert_int_eq(set_xattr(&a, file, "user.session.ttl", "none", 0), 0);
    ck_assert(is_stored("x", &stored) && stored.pttl_ms == -1);
    ck_assert_int_eq(save(&a, file, "x"), 0);
    ck_assert(is_stored("x", &stored) && stored.pttl_ms == -1);
    ck_assert_int_eq(get_xattr(&a, file, "user.session.expires", value), 0);
    ck_assert_str_eq(value, "none");
    ck_assert_int_eq(set_xattr(&a, file, "user.session.ttl", "60", 0), 0);
    ck_assert(is_stored("x", &stored) && stored.pttl_ms > 30000 && stored.pttl_ms <= 60000);
}
END_TEST

START_TEST(rename_is_no_renewal)
{
    set_up_server();
    set_up_ttl(100000);
    struct session *file = new_file(&a, a.root, "x");
    struct stored stored = {0};

    ck_assert_int_eq(save(&a, file, "content"), 0);
    closed(&a, a.root, "x");
    WAIT_UNTIL(is_stored("x", &stored) && stored.head.state == SEAL_STATE_FINISHED);
    server_do(&server, "PEXPIRE %b 40000", stored.key, stored.key_size);
    WAIT_UNTIL(was_changed(&a, file));
    ck_assert_int_eq(rename_to(&a, a.root, "x", a.root, "y", false), 0);
    ck_assert(is_stored("y", &stored) && stored.pttl_ms > 0 && stored.pttl_ms <= 40000);
}
END_TEST

/* ---- memory ---- */

START_TEST(write_that_finds_no_room_is_enospc_and_loses_nothing)
{
    set_up_server();
    set_up_tiny(256 * 1024);
    struct session *files[16];
    unsigned char *bytes = bytes_of(32 * 1024, 1), read[40 * 1024];
    unsigned n = 0;
    char name[16];

    for (unsigned i = 0; i < ARRAY_SIZE(files); i++) {
        snprintf(name, sizeof(name), "x%u", i);
        files[i] = new_file(&a, a.root, name);
    }
    server_freeze(&server); /* so that none of it gets clean meanwhile */
    int r;
    while ((r = put(&a, files[n], 0, bytes, 32 * 1024)) == 0)
        ck_assert_uint_lt(++n, ARRAY_SIZE(files));
    ck_assert_int_eq(r, -ENOSPC);
    ck_assert_uint_ge(n, 4);
    for (unsigned i = 0; i < n; i++) {
        ck_assert_int_eq(get(&a, files[i], 0, read, sizeof(read)), 32 * 1024);
        ck_assert(memcmp(read, bytes, 32 * 1024) == 0);
    }
    server_continue(&server);
    ck_assert_int_eq(store_flush(a.store, WAIT_MS), 0);
    ck_assert_int_eq(put(&a, files[n], 0, bytes, 32 * 1024), 0);
    ck_assert_int_eq(store_flush(a.store, WAIT_MS), 0);
    for (unsigned i = 0; i <= n; i++) {
        ck_assert_int_eq(get(&a, files[i], 0, read, sizeof(read)), 32 * 1024);
        ck_assert(memcmp(read, bytes, 32 * 1024) == 0);
    }
    free(bytes);
}
END_TEST

START_TEST(eviction_keeps_what_is_not_saved)
{
    set_up_server();
    set_up_tiny(512 * 1024);
    unsigned char *bytes = bytes_of(100 * 1024, 1), *others = bytes_of(50 * 1024, 2), *read = malloc(128 * 1024);
    struct session *precious = new_file(&a, a.root, "precious");
    struct store_stats stats;
    char name[16];

    ck_assert_int_eq(put(&a, precious, 0, bytes, 100 * 1024), 0);
    for (int i = 0; i < 40; i++) {
        snprintf(name, sizeof(name), "x%d", i);
        struct job job = write_job(new_file(&a, a.root, name), 0, others, 50 * 1024 - 1, false);
        ck_assert_int_eq(run_op(&a, &job), 0);
    }
    store_stats(a.store, &stats);
    ck_assert_uint_gt(stats.l1.n_evictions, 20);
    ck_assert_int_eq(get(&a, precious, 0, read, 128 * 1024), 100 * 1024);
    ck_assert(memcmp(read, bytes, 100 * 1024) == 0);
    closed(&a, a.root, "precious");
    WAIT_UNTIL(n_dirty(&a) == 0);
    ck_assert_int_eq(get(&a, found(&a, a.root, "x0"), 0, read, 128 * 1024), 50 * 1024 - 1);
    ck_assert(memcmp(read, others, 50 * 1024 - 1) == 0);
    ck_assert_int_eq(get(&b, found(&b, b.root, "precious"), 0, read, 128 * 1024), 100 * 1024);
    ck_assert(memcmp(read, bytes, 100 * 1024) == 0);
    free(bytes);
    free(others);
    free(read);
}
END_TEST

START_TEST(names_are_found_though_there_is_no_room_for_contents)
{
    set_up_server();
    set_up_tiny(256 * 1024);
    unsigned char *bytes = bytes_of(64 * 1024, 1);
    struct session *full = new_file(&a, a.root, "full");
    struct store_attr attr;
    uint64_t at = 0;

    ck_assert_int_eq(save(&b, new_file(&b, b.root, "x"), "content"), 0);
    closed(&b, b.root, "x");
    WAIT_UNTIL(n_dirty(&b) == 0);
    for (size_t n = 64 * 1024; n >= PAGE; n /= 2)
        while (put(&a, full, at, bytes, n) == 0)
            at += n;
    char name[16];
    for (int i = 0; i < 64; i++) { /* what growing could not use */
        snprintf(name, sizeof(name), "y%d", i);
        if (put(&a, new_file(&a, a.root, name), 0, bytes, PAGE) < 0)
            break;
    }
    int r = lookup(&a, a.root, "x", NULL, &attr);
    ck_assert_msg(r == 0, "lookup: %s", strerror(-r));
    ck_assert_uint_eq(attr.size, 7);
    ck_assert_int_eq(store_flush(a.store, WAIT_MS), 0);
    free(bytes);
}
END_TEST

/* ---- outages ---- */

START_TEST(cached_sessions_are_served_while_redis_is_away)
{
    struct session *file = new_file(&a, a.root, "x");
    struct store_attr attr;

    ck_assert_int_eq(save(&a, file, "content"), 0);
    closed(&a, a.root, "x");
    server_freeze(&server);
    uint64_t began_ms = clock_now_ms();
    ck_assert_int_eq(lookup(&a, a.root, "unknown", NULL, NULL), -EIO);
    ck_assert_uint_lt(clock_now_ms() - began_ms, 2 * TIMEOUT_MS + 2000);
    for (int i = 0; i < 20; i++) {
        began_ms = clock_now_ms();
        ck_assert_int_eq(lookup(&a, a.root, "x", NULL, NULL), 0);
        ck_assert_int_eq(getattr(&a, file, &attr), 0);
        ck_assert(reads_as(&a, file, "content"));
        ck_assert_uint_lt(clock_now_ms() - began_ms, 2 * TIMEOUT_MS + 2000);
        poll(NULL, 0, 20);
    }
    began_ms = clock_now_ms();
    ck_assert_int_eq(make(&a, a.root, "new", S_IFREG | 0600, true, NULL), -EIO);
    ck_assert_int_eq(save(&a, file, "changed in the outage"), -EIO);
    ck_assert_int_eq(remove_name(&a, a.root, "x", STORE_REMOVE), -EIO);
    ck_assert_uint_lt(clock_now_ms() - began_ms, 8 * TIMEOUT_MS + 2000);
    server_continue(&server);
    WAIT_UNTIL(lookup(&a, a.root, "unknown", NULL, NULL) == -ENOENT);
    WAIT_UNTIL(n_dirty(&a) == 0);
    WAIT_UNTIL(lookup(&a, a.root, "x", NULL, NULL) == lookup(&b, b.root, "x", NULL, NULL));
    new_file(&a, a.root, "healed");
    ck_assert_int_eq(lookup(&b, b.root, "healed", NULL, NULL), 0);
}
END_TEST

START_TEST(unsaved_changes_survive_an_outage)
{
    struct session *file = new_file(&a, a.root, "x");

    ck_assert_int_eq(save(&a, file, "before"), 0);
    closed(&a, a.root, "x");
    server_freeze(&server);
    ck_assert_int_eq(put(&a, file, 0, "BEF", 3), 0);
    closed(&a, a.root, "x");
    struct job job = {.op = {.kind = STORE_SYNC, .session = file}};
    ck_assert_int_eq(run_op(&a, &job), -EIO);
    ck_assert(reads_as(&a, file, "BEFore"));
    server_continue(&server);
    WAIT_UNTIL(n_dirty(&a) == 0);
    ck_assert(is_stored_as("x", "BEFore"));
    WAIT_UNTIL(name_reads_as(&b, "x", "BEFore"));
}
END_TEST

/* Seeing what Redis has needs room, while all the room is taken by what is to be saved. */
START_TEST(unsaved_changes_that_fill_the_memory_survive_an_outage)
{
    set_up_server();
    set_up_tiny(256 * 1024);
    struct session *files[16];
    unsigned char *bytes = bytes_of(32 * 1024, 1);
    char name[16];
    int n = 0;

    for (unsigned i = 0; i < ARRAY_SIZE(files); i++) {
        snprintf(name, sizeof(name), "x%u", i);
        files[i] = new_file(&a, a.root, name);
        struct job job = write_job(files[i], 0, bytes, 32 * 1024 - 1, false);
        ck_assert_int_eq(run_op(&a, &job), 0);
        closed(&a, a.root, name);
    }
    server_freeze(&server);
    for (unsigned i = 0; i < ARRAY_SIZE(files); i++)
        n += put(&a, files[i], 0, bytes, 32 * 1024) == 0;
    ck_assert_int_ge(n, 4);
    close_all(a.store);
    for (unsigned i = 0; i < ARRAY_SIZE(files); i++) {
        struct job job = {.op = {.kind = STORE_SYNC, .session = files[i]}};
        run_op(&a, &job); /* the saves have failed when this is over */
    }
    ck_assert_uint_eq(n_dirty(&a), n);
    server_continue(&server);
    uint64_t until_ms = clock_now_ms() + 10000;
    while (n_dirty(&a) && clock_now_ms() < until_ms)
        poll(NULL, 0, 5);
    ck_assert_msg(n_dirty(&a) == 0, "%d sessions are still unsaved 10 s after Redis came back", (int)n_dirty(&a));
    free(bytes);
}
END_TEST

START_TEST(killed_redis_comes_back_empty_and_the_root_is_made_again)
{
    struct session *file = new_file(&a, a.root, "x");

    found(&b, b.root, "x");
    server_kill(&server);
    server_start(&server, NULL, NULL);
    WAIT_UNTIL(lookup(&a, a.root, "x", NULL, NULL) == -ENOENT);
    WAIT_UNTIL(lookup(&b, b.root, "x", NULL, NULL) == -ENOENT);
    WAIT_UNTIL(make(&a, a.root, "y", S_IFREG | 0600, false, NULL) == 0);
    WAIT_UNTIL(lookup(&b, b.root, "y", NULL, NULL) == 0);
    store_forget(a.store, file, 1);
}
END_TEST

START_TEST(flushall_ends_the_sessions_but_not_the_root)
{
    struct session *file = new_file(&a, a.root, "x"), *theirs = found(&b, b.root, "x");
    struct store_attr attr;

    ck_assert_int_eq(save(&a, file, "content"), 0);
    closed(&a, a.root, "x");
    WAIT_UNTIL(n_dirty(&a) == 0);
    server_do(&server, "FLUSHALL");
    WAIT_UNTIL(was_changed(&a, a.root) && was_changed(&b, b.root));
    ck_assert_int_eq(lookup(&a, a.root, "x", NULL, NULL), -ENOENT);
    ck_assert_int_eq(lookup(&b, b.root, "x", NULL, NULL), -ENOENT);
    WAIT_UNTIL(was_gone(&a, "x") && was_gone(&b, "x"));
    ck_assert_int_eq(getattr(&a, a.root, &attr), 0);
    ck_assert_int_eq(getattr(&b, b.root, &attr), 0);
    struct session *again = new_file(&a, a.root, "x");
    ck_assert_int_eq(save(&a, again, "again"), 0);
    closed(&a, a.root, "x");
    WAIT_UNTIL(name_reads_as(&b, "x", "again"));
    ck_assert_int_eq(server_do(&server, "DBSIZE"), 2);
    store_forget(a.store, file, 1);
    store_forget(b.store, theirs, 1);
}
END_TEST

START_TEST(free_answers_what_is_in_flight)
{
    struct session *file = new_file(&a, a.root, "x");
    struct job ask = {.op = {.kind = STORE_LOOKUP, .dir = a.root}}, write = write_job(file, 0, "x", 1, false);
    struct job create = {.op = {.kind = STORE_CREATE, .dir = a.root, .mode = S_IFREG | 0600}};

    set_name(&ask.op, "unknown");
    set_name(&create.op, "new");
    server_freeze(&server);
    begin(&a, &ask);
    begin(&a, &write);
    begin(&a, &create);
    store_free(a.store);
    a.store = NULL;
    ck_assert_msg(ask.n_done == 1, "lookup: done() was called %u times", ask.n_done);
    ck_assert_msg(write.n_done == 1, "write: done() was called %u times", write.n_done);
    ck_assert_msg(create.n_done == 1, "create: done() was called %u times", create.n_done);
    server_continue(&server);
}
END_TEST

START_TEST(free_forgets_what_the_kernel_knows)
{
    struct session *one = new_file(&a, a.root, "one");

    new_file(&a, new_dir(&a, a.root, "d"), "two");
    ck_assert_int_eq(save(&a, one, "content"), 0);
    ck_assert_int_eq(remove_name(&a, a.root, "one", STORE_REMOVE), 0); /* open, and removed */
    store_free(a.store);
    a.store = NULL;
    ck_assert_int_eq(lookup(&b, b.root, "d", NULL, NULL), 0);
}
END_TEST

START_TEST(second_life_finds_what_the_first_saved)
{
    ck_assert_int_eq(save(&a, new_file(&a, a.root, "x"), "content"), 0);
    ck_assert_int_eq(store_flush(a.store, WAIT_MS), 0);
    store_free(a.store);
    struct store_config with = config();
    start_side(&a, &with);
    ck_assert(name_reads_as(&a, "x", "content"));
}
END_TEST

START_TEST(start_without_redis_says_so_in_a_line)
{
    struct store_config with = config();
    struct store *store = NULL;

    with.address.path = (char *)"/tmp/nobody/is/here.sock";
    ck_assert_int_lt(store_new(&store, &with, why, sizeof(why)), 0);
    ck_assert_ptr_nonnull(strstr(why, "cannot connect"));
    ck_assert_ptr_null(strchr(why, '\n'));
}
END_TEST

START_TEST(statfs_tells_what_redis_uses)
{
    struct job job = {.op = {.kind = STORE_STATFS}}, full = job;

    server_do(&server, "CONFIG SET maxmemory 100000000");
    ck_assert_int_eq(run_op(&a, &job), 0);
    ck_assert_uint_eq(job.op.total, 100000000);
    ck_assert_uint_gt(job.op.used, 100000);
    server_do(&server, "CONFIG SET maxmemory 0");
    ck_assert_int_eq(run_op(&a, &full), 0);
    ck_assert_uint_gt(full.op.total, full.op.used);
}
END_TEST

START_TEST(full_redis_is_enospc_and_heals)
{
    struct session *file = new_file(&a, a.root, "x");

    ck_assert_int_eq(save(&a, file, "before"), 0);
    server_do(&server, "CONFIG SET maxmemory 1");
    ck_assert_int_eq(make(&a, a.root, "y", S_IFREG | 0600, true, NULL), -ENOSPC);
    ck_assert_int_eq(save(&a, file, "afterwards"), -ENOSPC);
    server_do(&server, "CONFIG SET maxmemory 0");
    WAIT_UNTIL(n_dirty(&a) == 0);
    ck_assert(is_stored_as("x", "afterwards"));
    new_file(&a, a.root, "y");
}
END_TEST

/* ---- everything at once ---- */

struct chaos {
    pthread_t thread;
    struct side *side;
    unsigned seed;
    _Atomic unsigned n_odd, n_hung, n_ops;
    int odd;
};

static bool quiet_run(struct chaos *chaos, struct job *job)
{
    uint64_t until_ms = clock_now_ms() + WAIT_MS;

    begin(chaos->side, job);
    while (!atomic_load(&job->is_done)) {
        if (clock_now_ms() > until_ms) {
            chaos->n_hung++;
            return false;
        }
        poll(NULL, 0, 0);
    }
    chaos->n_ops++;
    return true;
}

static bool is_usual(int r)
{
    return r == 0 || r == -ENOENT || r == -EEXIST || r == -ESTALE;
}

static void *wreak(void *arg)
{
    static const enum store_kind kinds[] = {STORE_LOOKUP, STORE_CREATE, STORE_CREATE, STORE_WRITE,   STORE_WRITE,
                                            STORE_READ,   STORE_REMOVE, STORE_RENAME, STORE_SETATTR, STORE_SETXATTR};
    struct chaos *chaos = arg;
    struct side *side = chaos->side;
    uint64_t z = chaos->seed;
    static const char text[20000];

    for (unsigned i = 0; i < 400 && !chaos->n_hung; i++) {
        z = z * 6364136223846793005u + 1442695040888963407u;
        enum store_kind kind = kinds[(z >> 32) % ARRAY_SIZE(kinds)];
        struct job *job = calloc(1, sizeof(*job)), *find = calloc(1, sizeof(*find));
        char name[8] = {'x', (char)('0' + (z >> 40) % 5), 0}, other[8] = {'x', (char)('0' + (z >> 50) % 5), 0};
        bool has_session = kind == STORE_WRITE || kind == STORE_READ || kind == STORE_SETATTR || kind == STORE_SETXATTR;
        struct session *session = NULL;

        *job = (struct job){.op = {.kind = kind, .dir = side->root, .new_dir = side->root, .mode = S_IFREG | 0600}};
        set_name(&job->op, kind == STORE_SETXATTR ? "user.x" : name);
        memcpy(job->op.new_name, other, 3);
        job->op.new_name_size = 2;
        if (has_session) {
            find->op = (struct store_op){.kind = STORE_LOOKUP, .dir = side->root};
            set_name(&find->op, name);
            if (!quiet_run(chaos, find))
                return NULL;
            session = find->op.result == 0 ? find->op.found : NULL;
            job->op.session = session;
            job->op.data = text;
            job->op.size = kind == STORE_SETXATTR ? 5 : (z >> 17) % 20000;
            job->op.set = STORE_SET_SIZE;
            job->op.is_cached = z & 1 << 9;
        }
        if (!has_session || session) {
            if (!quiet_run(chaos, job))
                return NULL;
            if (!is_usual(job->op.result)) {
                chaos->n_odd++;
                chaos->odd = job->op.result;
            }
            if (job->op.result == 0 && (kind == STORE_LOOKUP || kind == STORE_CREATE))
                store_forget(side->store, job->op.found, 1);
            store_done_with(side->store, &job->op);
        }
        if (session) {
            close_name(side->store, side->root, name, 2);
            store_forget(side->store, session, 1);
        }
        free(job);
        free(find);
    }
    return NULL;
}

START_TEST(many_threads_on_two_instances_do_no_harm)
{
    static struct chaos chaos[6];
    struct stored stored;

    for (unsigned i = 0; i < ARRAY_SIZE(chaos); i++) {
        chaos[i] = (struct chaos){.side = i % 2 ? &a : &b, .seed = i * 77 + 1};
        ck_assert_int_eq(pthread_create(&chaos[i].thread, NULL, wreak, &chaos[i]), 0);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(chaos); i++) {
        pthread_join(chaos[i].thread, NULL);
        ck_assert_msg(chaos[i].n_hung == 0, "an operation never ended");
        ck_assert_msg(chaos[i].n_odd == 0, "odd results, as %s", strerror(-chaos[i].odd));
    }
    ck_assert_int_eq(store_flush(a.store, WAIT_MS), 0);
    ck_assert_int_eq(store_flush(b.store, WAIT_MS), 0);
    for (int i = 0; i < 5; i++) { /* both see what Redis has */
        char name[8] = {'x', (char)('0' + i), 0};
        struct store_attr one = {0}, two = {0};
        uint64_t until_ms = clock_now_ms() + 5000;
        bool is_agreed = false;
        while (!is_agreed && clock_now_ms() < until_ms) {
            int r = lookup(&a, a.root, name, NULL, &one), s = lookup(&b, b.root, name, NULL, &two);
            bool is_there = is_stored(name, &stored);
            is_agreed =
                r == s && is_there == (r == 0) && (r != 0 || (one.size == two.size && one.size == stored.content_size));
        }
        ck_assert_msg(is_agreed, "%s: sizes %d, %d", name, (int)one.size, (int)two.size);
    }
}
END_TEST

/* ---- suite ---- */

static TCase *add_case(Suite *suite, const char *name, void (*set)(void))
{
    TCase *tcase = tcase_create(name);

    tcase_set_timeout(tcase, 60);
    tcase_add_checked_fixture(tcase, set, tear_down);
    suite_add_tcase(suite, tcase);
    return tcase;
}

static Suite *make_suite(void)
{
    Suite *suite = suite_create("store");

    TCase *names = add_case(suite, "names", set_up);
    tcase_add_test(names, root_is_the_same_for_both);
    tcase_add_test(names, created_file_is_found_by_both);
    tcase_add_test(names, exclusive_create_of_what_is_there_is_eexist);
    tcase_add_test(names, absent_name_is_enoent_until_somebody_makes_it);
    tcase_add_test(names, impossible_names_are_refused);
    tcase_add_test(names, names_are_case_sensitive_bytes_of_up_to_255);
    tcase_add_test(names, removed_name_is_gone_on_both_but_its_holder_reads_on);
    tcase_add_test(names, name_can_be_made_again_after_its_removal);
    tcase_add_test(names, directories_are_removed_only_when_empty);
    tcase_add_test(names, path_of_nested_directories);
    tcase_add_test(names, rename_moves_the_session_for_both);
    tcase_add_test(names, rename_replaces_unless_told_not_to);
    tcase_add_test(names, rename_takes_unsaved_changes_along);
    tcase_add_test(names, directory_is_not_renamed_onto_one_that_has_something);
    tcase_add_loop_test(names, list_has_every_name_once, 0, 2);

    TCase *content = add_case(suite, "content", set_up);
    tcase_add_test(content, whole_save_is_in_redis_when_it_is_answered);
    tcase_add_test(content, partial_writes_are_saved_by_the_close);
    tcase_add_test(content, partial_writes_without_a_close_are_saved_after_a_pause);
    tcase_add_test(content, sync_saves);
    tcase_add_test(content, flush_saves_everything);
    tcase_add_test(content, flush_gives_up_in_time);
    tcase_add_loop_test(content, overlapping_writes_and_truncations_give_what_a_file_would, 0, 2);
    tcase_add_test(content, reads_end_where_the_content_ends);
    tcase_add_test(content, what_is_lent_does_not_change);
    tcase_add_test(content, sessions_larger_than_allowed_are_efbig);
    tcase_add_test(content, large_sessions_travel_whole);

    TCase *attributes = add_case(suite, "attributes", set_up);
    tcase_add_test(attributes, attributes_are_set_for_both);
    tcase_add_test(attributes, size_shrinks_and_grows_with_zeros);
    tcase_add_test(attributes, write_and_truncation_end_suid);
    tcase_add_test(attributes, group_is_inherited_from_a_set_group_id_directory);
    tcase_add_test(attributes, own_attributes_are_kept_and_listed);
    tcase_add_test(attributes, own_attributes_have_a_bound);
    tcase_add_test(attributes, attributes_of_the_session_are_shown);

    TCase *both = add_case(suite, "both", set_up);
    tcase_add_test(both, change_elsewhere_makes_it_suspect_and_is_told);
    tcase_add_test(both, open_save_is_waited_for_and_the_close_finishes_it);
    tcase_add_test(both, whole_save_is_marked_open_and_the_close_finishes_it);
    tcase_add_test(both, open_save_of_a_writer_that_died_is_taken_after_a_while);
    tcase_add_test(both, save_that_is_overtaken_before_its_answer_is_not_believed);
    tcase_add_test(both, create_of_a_name_that_was_something_else_is_a_new_session);
    tcase_add_loop_test(both, damaged_session_is_ebadmsg_and_can_be_removed, 0, 6);
    tcase_add_test(both, session_moved_to_another_key_is_ebadmsg);
    tcase_add_test(both, namespace_of_another_key_is_refused);
    tcase_add_test(both, what_is_learnt_by_listing_is_never_stale_for_long);
    tcase_add_test(both, many_threads_on_two_instances_do_no_harm);

    TCase *living = add_case(suite, "living", NULL); /* each starts its own */
    tcase_add_test(living, expiry_removes_on_both);
    tcase_add_test(living, sliding_session_lives_while_it_is_looked_up);
    tcase_add_test(living, fixed_session_ends_however_it_is_used);
    tcase_add_test(living, save_and_touch_renew_a_sliding_session);
    tcase_add_test(living, rename_is_no_renewal);

    TCase *directories = add_case(suite, "directories", set_up);
    tcase_add_test(directories, new_sessions_inherit_the_time_of_their_directory);
    tcase_add_test(directories, time_to_live_none_never_ends);

    TCase *memory = add_case(suite, "memory", NULL);
    tcase_add_test(memory, write_that_finds_no_room_is_enospc_and_loses_nothing);
    tcase_add_test(memory, eviction_keeps_what_is_not_saved);
    tcase_add_test(memory, names_are_found_though_there_is_no_room_for_contents);
    tcase_add_test(memory, unsaved_changes_that_fill_the_memory_survive_an_outage);

    TCase *outage = add_case(suite, "outage", set_up);
    tcase_add_test(outage, cached_sessions_are_served_while_redis_is_away);
    tcase_add_test(outage, unsaved_changes_survive_an_outage);
    tcase_add_test(outage, killed_redis_comes_back_empty_and_the_root_is_made_again);
    tcase_add_test(outage, flushall_ends_the_sessions_but_not_the_root);
    tcase_add_test(outage, free_answers_what_is_in_flight);
    tcase_add_test(outage, free_forgets_what_the_kernel_knows);
    tcase_add_test(outage, second_life_finds_what_the_first_saved);
    tcase_add_test(outage, start_without_redis_says_so_in_a_line);
    tcase_add_test(outage, statfs_tells_what_redis_uses);
    tcase_add_test(outage, full_redis_is_enospc_and_heals);
    return suite;
}

int main(void)
{
    return suite_main(make_suite());
}
