/* The store itself: start and end, directories, timers, what L2 reports. */
#include "store/internal.h"

#include <stdio.h>
#include <stdlib.h>

/* ---- what goes up ---- */

void event_changed(struct store *store, struct session *session)
{
    pthread_rwlock_rdlock(&store->events_lock);
    store->events.changed(store->events.owner, session);
    pthread_rwlock_unlock(&store->events_lock);
}

void event_gone(struct store *store, struct session *session, struct session *parent, const char *name, size_t size)
{
    pthread_rwlock_rdlock(&store->events_lock);
    store->events.gone(store->events.owner, session, parent, name, size);
    pthread_rwlock_unlock(&store->events_lock);
}

void event_watch(struct store *store, struct session *dir)
{
    pthread_rwlock_rdlock(&store->events_lock);
    store->events.watch(store->events.owner, dir);
    pthread_rwlock_unlock(&store->events_lock);
}

void event_settle(struct store *store)
{
    pthread_rwlock_rdlock(&store->events_lock);
    store->events.settle(store->events.owner);
    pthread_rwlock_unlock(&store->events_lock);
}

/* ---- directories ---- */

struct dir *store_dir(struct store *store, const uint8_t id[SEAL_ID_BYTES])
{
    struct dir **bucket = &store->dirs[(id[0] | id[1] << 8) % ARRAY_SIZE(store->dirs)];

    pthread_mutex_lock(&store->dirs_lock);
    struct dir *dir = *bucket;
    while (dir && memcmp(dir->id, id, SEAL_ID_BYTES) != 0)
        dir = dir->next;
    if (!dir) {
        dir = calloc(1, sizeof(*dir));
        if (!dir)
            abort();
        memcpy(dir->id, id, SEAL_ID_BYTES);
        seal_id_format(id, dir->id_text);
        dir->number = ++store->n_dirs;
        dir->ttl_ms = SEAL_TTL_INHERIT;
        dir->next = *bucket;
        *bucket = dir;
    }
    pthread_mutex_unlock(&store->dirs_lock);
    return dir;
}

struct session *dir_session(struct store *store, struct dir *dir)
{
    pthread_mutex_lock(&store->dirs_lock);
    struct session *session = dir->session;
    if (session)
        l1_pin(&session->entry);
    pthread_mutex_unlock(&store->dirs_lock);
    return session;
}

/* Sets it if it is @from; NULL @from: whatever it is. */
void dir_set_session(struct store *store, struct dir *dir, struct session *from, struct session *to)
{
    pthread_mutex_lock(&store->dirs_lock);
    if ((!from || dir->session == from) && dir->session != to) {
        dir->session = to;
        atomic_store(&dir->watch, WATCH_NONE); /* a watch belongs to an inode, not to the directory's id */
    }
    pthread_mutex_unlock(&store->dirs_lock);
}

static void free_dirs(struct store *store)
{
    for (size_t i = 0; i < ARRAY_SIZE(store->dirs); i++) {
        while (store->dirs[i]) {
            struct dir *dir = store->dirs[i];
            store->dirs[i] = dir->next;
            free(dir);
        }
    }
}

static int path_of(struct store *store, struct session *dir, char *out, size_t size, size_t *length, unsigned depth)
{
    pthread_mutex_lock(&dir->lock);
    bool is_gone = dir->flags & S_GONE;
    struct dir *above = dir->dir;
    char name[256];
    size_t name_size = dir->entry.name_size;
    memcpy(name, dir->entry.name, name_size);
    pthread_mutex_unlock(&dir->lock);

    if (name_size == 0)
        return 0; /* the root */
    /* directories renamed into each other on two instances at once make a ring */
    struct session *parent = is_gone || depth > size / 2 ? NULL : dir_session(store, above);
    if (!parent)
        return -ENOENT;
    int r = parent == dir ? -ENOENT : path_of(store, parent, out, size, length, depth + 1);
    session_unpin(store, parent);
    if (r < 0)
        return r;
    if (*length + name_size + 2 > size)
        return -ENAMETOOLONG;
    out[(*length)++] = '/';
    memcpy(out + *length, name, name_size);
    *length += name_size;
    return 0;
}

int store_path(struct store *store, struct session *dir, char *out, size_t size)
{
    size_t length = 0;
    int r = path_of(store, dir, out, size, &length, 0);

    out[length] = 0;
    return r;
}

/* ---- timers: one a session, armed for the earliest thing that is due ---- */

static uint64_t earlier(uint64_t a, uint64_t b)
{
    return !b || (a && a < b) ? a : b;
}

static uint64_t due_ms(const struct session *session)
{
    uint64_t due = session->deadline_ms;

    if (session->flags & S_GONE)
        return session->fetch ? session->fetch->wait_until_ms : 0;
    if (session->commit)
        due = earlier(due, session->commit->retry_at_ms);
    if (session->fetch)
        due = earlier(due, session->fetch->retry_at_ms);
    if (session->flags & S_DIRTY)
        due = earlier(due, session->commit_at_ms);
    if (session->flags & S_OPEN)
        due = earlier(due, session->finish_at_ms);
    if (session->fetch)
        due = earlier(due, session->fetch->wait_until_ms);
    if (session->previous)
        due = earlier(due, session->previous_until_ms);
    return due;
}

void store_arm_locked(struct store *store, struct session *session)
{
    uint64_t due = due_ms(session);

    if (!due)
        return;
    due = max_u64(due, clock_now_ms() + 1); /* whatever is overdue takes turns with the others */
    pthread_mutex_lock(&store->timer_lock);
    bool was_set = wheel_timer_is_set(&session->timer);
    if (!was_set || session->timer.at_ms > due) {
        wheel_set(store->wheel, &session->timer, due);
        if (!was_set)
            l1_pin(&session->entry);
        if (due < store->timer_sleeps_until_ms)
            pthread_cond_signal(&store->timer_wake);
    }
    pthread_mutex_unlock(&store->timer_lock);
}

void store_disarm_locked(struct store *store, struct session *session)
{
    pthread_mutex_lock(&store->timer_lock);
    bool was_set = wheel_timer_is_set(&session->timer);
    wheel_cancel(store->wheel, &session->timer);
    pthread_mutex_unlock(&store->timer_lock);
    if (was_set)
        session_unpin(store, session); /* never the last one: the caller has a pin */
}

/* Its time is over. An entry that may be out of date is asked for: it may have been renewed elsewhere. */
static bool expire_locked(struct store *store, struct session *session)
{
    bool can_ask = l2_is_up(store->l2) && clock_now_ms() >= atomic_load(&store->outage_until_ms);

    if (can_ask && !session_is_trusted(store, session)) {
        if (!session->fetch && !(session->flags & S_BUSY))
            fetch_start_locked(store, session, fetch_prefix(session));
        session->deadline_ms += 50;
        return false;
    }
    atomic_fetch_add(&store->n_expired, 1);
    return session_kill_locked(store, session, S_GONE);
}

static void timer_fired(struct store *store, struct session *session)
{
    uint64_t now_ms = clock_now_ms();
    bool is_gone = false, is_changed = false;
    struct store_op *ops = NULL;

    pthread_mutex_lock(&session->lock);
    if (session->previous && now_ms >= session->previous_until_ms) {
        content_unref(store, session->previous);
        session->previous = NULL;
        is_changed = session->flags & S_SHOWED_PREVIOUS;
        session->flags &= ~(unsigned)S_SHOWED_PREVIOUS;
    }
    bool settles = session->fetch && fetch_is_due_locked(session->fetch, now_ms);
    bool is_over = session->deadline_ms && now_ms >= session->deadline_ms && !(session->flags & S_GONE);
    if (is_over && (session->commit || (session->flags & S_BUSY))) {
        session->deadline_ms = now_ms + 20; /* see what comes of it */
    } else if (is_over) {
        is_gone = expire_locked(store, session);
        if (session->flags & S_GONE)
            ops = op_take_waiters_locked(session);
    }
    if (!(session->flags & S_GONE))
        commit_due_locked(store, session, now_ms);
    struct commit *resend = session->commit && commit_is_due_locked(session->commit, now_ms) ? session->commit : NULL;
    if (session->fetch)
        fetch_retry_locked(session->fetch, now_ms);
    store_arm_locked(store, session);
    session_unlock(session);

    if (resend)
        commit_send(resend);
    if (settles)
        fetch_settle(store, session);
    if (is_changed)
        event_changed(store, session);
    if (is_gone)
        session_tell_gone(store, session);
    op_run_all(ops);
    session_unpin(store, session);
}

static void sleep_until_due_locked(struct store *store, uint64_t now_ms)
{
    unsigned wait_ms = wheel_next_ms(store->wheel, now_ms);
    struct timespec until;

    if (!wait_ms)
        return;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)(wait_ms % 1000) * 1000000;
    until.tv_sec += wait_ms / 1000 + until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    store->timer_sleeps_until_ms = now_ms + wait_ms;
    pthread_cond_timedwait(&store->timer_wake, &store->timer_lock, &until);
    store->timer_sleeps_until_ms = 0;
}

static void *timer_thread(void *arg)
{
    struct store *store = arg;

    pthread_mutex_lock(&store->timer_lock);
    while (!store->is_stopping) {
        uint64_t now_ms = clock_now_ms();
        struct wheel_timer *timer = wheel_expire(store->wheel, now_ms);
        if (!timer) {
            sleep_until_due_locked(store, now_ms);
            continue;
        }
        pthread_mutex_unlock(&store->timer_lock);
        timer_fired(store, CONTAINER_OF(timer, struct session, timer)); /* its pin is ours now */
        pthread_mutex_lock(&store->timer_lock);
    }
    pthread_mutex_unlock(&store->timer_lock);
    return NULL;
}

/* ---- what L2 reports ---- */

/* Reports of changes are counted by key, for those who read something of which no session exists yet to be told. */
_Atomic uint32_t *store_invalid_no(struct store *store, const char *key, size_t size)
{
    uint32_t hash = 0;

    for (size_t i = size > SEAL_ID_TEXT ? size - SEAL_ID_TEXT : 0; i < size; i++)
        hash = hash * 31 + (unsigned char)key[i];
    return &store->invalid_no[hash % ARRAY_SIZE(store->invalid_no)];
}

static void count_all_invalid(struct store *store)
{
    for (size_t i = 0; i < ARRAY_SIZE(store->invalid_no); i++)
        atomic_fetch_add(&store->invalid_no[i], 1);
}

static void on_invalidated(void *owner, const char *key, size_t size)
{
    struct store *store = owner;

    atomic_fetch_add(store_invalid_no(store, key, size), 1);
    struct session *session = session_by_key(store, key, size);
    if (!session)
        return;
    session_distrust(store, session);
    session_unpin(store, session);
}

struct walk {
    struct store *store;
    unsigned link;
    bool is_all;
};

static void distrust_entry(void *arg, struct l1_entry *entry)
{
    struct walk *walk = arg;
    struct session *session = CONTAINER_OF(entry, struct session, entry);

    pthread_mutex_lock(&session->lock);
    bool is_meant = (session->flags & S_IS_INIT) && (walk->is_all || session->link == walk->link);
    pthread_mutex_unlock(&session->lock);
    if (is_meant)
        session_distrust(walk->store, session);
}

static void on_link_lost(void *owner, unsigned link)
{
    struct walk walk = {.store = owner, .link = link};

    count_all_invalid(owner);
    l1_walk(walk.store->l1, distrust_entry, &walk);
}

static void on_all_lost(void *owner)
{
    struct walk walk = {.store = owner, .is_all = true};

    count_all_invalid(owner);
    l1_walk(walk.store->l1, distrust_entry, &walk);
}

static void on_recovered(void *owner)
{
    struct store *store = owner;

    atomic_store(&store->outage_until_ms, 0);
    on_all_lost(owner);
}

/* ---- the kernel's references ---- */

void store_remember(struct store *store, struct session *session, uint64_t n)
{
    pthread_mutex_lock(&session->lock);
    if (session->n_known == 0) {
        l1_pin(&session->entry);
        if (session->self && !(session->flags & S_GONE))
            dir_set_session(store, session->self, NULL, session);
    }
    session->n_known += n;
    pthread_mutex_unlock(&session->lock);
}

void store_forget(struct store *store, struct session *session, uint64_t n)
{
    pthread_mutex_lock(&session->lock);
    session->n_known -= min_u64(n, session->n_known);
    bool is_last = session->n_known == 0;
    if (is_last) {
        if (session->self)
            dir_set_session(store, session->self, session, NULL);
        if (session->flags & S_GONE)
            session_set_content_locked(store, session, NULL);
        else if (!session->content && !(session->flags & (S_DIRTY | S_OPEN)) && !session->fetch && !session->commit)
            store_disarm_locked(store, session);
    }
    pthread_mutex_unlock(&session->lock);
    if (is_last)
        session_unpin(store, session);
}

/* ---- closes ---- */

struct closing {
    struct store *store;
    struct commit **batch;
};

static void close_entry(void *arg, struct l1_entry *entry)
{
    struct closing *closing = arg;
    struct commit *commit = commit_closed(closing->store, CONTAINER_OF(entry, struct session, entry));

    if (!commit)
        return;
    commit->next = *closing->batch;
    *closing->batch = commit;
}

void store_send(struct store *store, struct commit *batch)
{
    while (batch) {
        struct commit *commit = batch;
        batch = commit->next;
        commit_send(commit);
    }
}

void store_closed(struct store *store, struct session *dir, const char *name, size_t size, struct commit **batch)
{
    struct closing closing = {store, batch};

    if (!name) {
        l1_walk(store->l1, close_entry, &closing);
        return;
    }
    struct dir *inside = session_inside(dir);
    struct l1_entry *entry = inside ? l1_find(store->l1, inside->number, name, size) : NULL;
    if (!entry)
        return;
    close_entry(&closing, entry);
    l1_unpin(store->l1, entry);
}

void store_watched(struct store *store, struct session *dir, bool is_watched)
{
    struct dir *inside = session_inside(dir);

    pthread_mutex_lock(&store->watch_lock);
    if (inside)
        atomic_store(&inside->watch, is_watched ? WATCH_ON : WATCH_FAILED);
    struct store_op *ops = store->watch_waiters;
    store->watch_waiters = NULL;
    pthread_mutex_unlock(&store->watch_lock);
    op_run_all(ops);
}

int op_need_watch(struct store_op *op, struct dir *dir)
{
    struct store *store = op->store;
    int state = atomic_load(&dir->watch);

    if (state == WATCH_ON || state == WATCH_FAILED)
        return 0;
    struct session *parent = dir_session(store, dir);
    if (!parent)
        return 0;
    pthread_mutex_lock(&store->watch_lock);
    state = atomic_load(&dir->watch);
    if (state == WATCH_ON || state == WATCH_FAILED) {
        pthread_mutex_unlock(&store->watch_lock);
        session_unpin(store, parent);
        return 0;
    }
    atomic_store(&dir->watch, WATCH_ASKED);
    op->next = store->watch_waiters;
    store->watch_waiters = op;
    pthread_mutex_unlock(&store->watch_lock);
    if (state == WATCH_NONE)
        event_watch(store, parent);
    session_unpin(store, parent);
    return PARKED;
}

/* ---- start and end ---- */

static void no_change(void *owner, struct session *session)
{
}

static void no_gone(void *owner, struct session *session, struct session *parent, const char *name, size_t size)
{
}

/* Nobody would hear of a close: whoever waits for a watch goes on without. */
static void no_watch(void *owner, struct session *dir)
{
    store_watched(owner, dir, false);
}

static void no_settle(void *owner)
{
}

static const struct store_events no_events = {
    .changed = no_change, .gone = no_gone, .watch = no_watch, .settle = no_settle};

void store_set_events(struct store *store, const struct store_events *events)
{
    pthread_rwlock_wrlock(&store->events_lock);
    store->events = events ? *events : no_events;
    if (!events)
        store->events.owner = store;
    pthread_rwlock_unlock(&store->events_lock);
}

/* One operation that is waited for: only at the start, before anybody else uses the store. */
struct root_wait {
    struct store_op op;
    pthread_mutex_t lock;
    pthread_cond_t done;
    bool is_done;
};

static void root_done(struct store_op *op)
{
    struct root_wait *wait = CONTAINER_OF(op, struct root_wait, op);

    pthread_mutex_lock(&wait->lock);
    wait->is_done = true;
    pthread_cond_signal(&wait->done);
    pthread_mutex_unlock(&wait->lock);
}

static void root_made(struct commit *commit, int result)
{
    commit->for_op->result = result;
    root_done(commit->for_op);
}

static int wait_for(struct root_wait *wait)
{
    pthread_mutex_lock(&wait->lock);
    while (!wait->is_done)
        pthread_cond_wait(&wait->done, &wait->lock);
    pthread_mutex_unlock(&wait->lock);
    return wait->op.result;
}

static int make_root(struct commit *commit)
{
    struct root_wait wait = {.lock = PTHREAD_MUTEX_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

    commit->for_op = &wait.op;
    commit->finished = root_made;
    commit_send(commit);
    return wait_for(&wait);
}

static int read_root(struct store *store)
{
    struct root_wait wait = {.lock = PTHREAD_MUTEX_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

    wait.op = (struct store_op){.kind = STORE_GETATTR, .done = root_done, .session = store->root};
    store_run(store, &wait.op);
    return wait_for(&wait);
}

/* The root's entry is made by the first instance of a namespace; then everybody reads it. */
static int open_root(struct store *store, char *why, size_t why_size)
{
    static const uint8_t nowhere[SEAL_ID_BYTES];
    struct dir *above = store_dir(store, nowhere);

    store->root = session_get(store, above, "", 0);
    if (!store->root)
        return -ENOMEM;
    pthread_mutex_lock(&store->root->lock);
    struct commit *commit = commit_new_locked(store, store->root, SEAL_STATE_FINISHED);
    pthread_mutex_unlock(&store->root->lock);
    int64_t now_ns = clock_wall_ns();
    commit->meta = (struct seal_meta){
        .mode = S_IFDIR | store->config.root_mode,
        .uid = store->config.root_uid,
        .gid = store->config.root_gid,
        .policy = SEAL_POLICY_SLIDING,
        .ino = 1,
        .ttl_ms = SEAL_TTL_INHERIT,
        .mtime_ns = now_ns,
        .ctime_ns = now_ns,
        .created_ns = now_ns,
        .name = "",
    };
    seal_random(commit->meta.dir_id, sizeof(commit->meta.dir_id));
    commit->condition = L2_IF_ABSENT;
    commit->ttl_ms = L2_TTL_NONE;
    int r = make_root(commit);
    if (r == 0 || r == -EEXIST)
        r = read_root(store);
    if (r == -EBADMSG || r == -ENOKEY)
        snprintf(why, why_size, "namespace %s was made with another key: use its key file, or another namespace=",
                 store->config.name_space);
    else if (r < 0)
        snprintf(why, why_size, "redis: cannot make the root directory: %s%s", strerror(-r),
                 r == -EACCES ? " (its ACL refuses a command that is needed; see the log)" : "");
    if (r < 0)
        return r;
    store_remember(store, store->root, 1);
    return 0;
}

static int start(struct store *store, char *why, size_t why_size)
{
    pthread_condattr_t attr;

    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&store->timer_wake, &attr);
    pthread_condattr_destroy(&attr);
    int r = wheel_new(&store->wheel, clock_now_ms());
    if (r == 0)
        r = l1_new(&store->l1, &(struct l1_config){.size = store->config.l1_size,
                                                   .make = session_make,
                                                   .release = session_release,
                                                   .evict = session_evict,
                                                   .owner = store});
    if (r == 0)
        r = l2_new(&store->l2, &(struct l2_config){.address = store->config.address,
                                                   .n_links = store->config.connections,
                                                   .timeout_ms = store->config.timeout_ms,
                                                   .owner = store,
                                                   .invalidated = on_invalidated,
                                                   .link_lost = on_link_lost,
                                                   .all_lost = on_all_lost,
                                                   .recovered = on_recovered});
    store->key_buckets = calloc(KEY_BUCKETS, sizeof(*store->key_buckets));
    if (r < 0 || !store->key_buckets) {
        snprintf(why, why_size, "cannot get memory (l1_size=): %s", strerror(r ? -r : ENOMEM));
        return r ? r : -ENOMEM;
    }
    r = -pthread_create(&store->timer_thread, NULL, timer_thread, store);
    if (r < 0) {
        snprintf(why, why_size, "cannot start a thread: %s", strerror(-r));
        return r;
    }
    store->has_timer_thread = true;
    r = l2_start(store->l2, why, why_size);
    return r < 0 ? r : open_root(store, why, why_size);
}

int store_new(struct store **ret, const struct store_config *config, char *why, size_t why_size)
{
    struct store *store = calloc(1, sizeof(*store));

    if (!store) {
        seal_keys_free(config->keys);
        snprintf(why, why_size, "out of memory");
        return -ENOMEM;
    }
    store->config = *config;
    store->keys = config->keys;
    store->config.address = (struct l2_address){0};
    snprintf(store->name_space, sizeof(store->name_space), "sfs:%s:", config->name_space);
    store->config.name_space = strdup(config->name_space);
    pthread_rwlock_init(&store->events_lock, NULL);
    store_set_events(store, NULL);
    pthread_mutex_init(&store->gone_lock, NULL);
    pthread_mutex_init(&store->dirs_lock, NULL);
    pthread_mutex_init(&store->watch_lock, NULL);
    pthread_mutex_init(&store->timer_lock, NULL);
    for (unsigned i = 0; i < KEY_STRIPES; i++)
        pthread_mutex_init(&store->key_stripes[i].lock, NULL);
    store->config.address = config->address; /* l2 copies it */
    int r = start(store, why, why_size);
    store->config.address = (struct l2_address){0};
    if (r < 0) {
        store_free(store);
        return r;
    }
    *ret = store;
    return 0;
}

int store_flush(struct store *store, unsigned timeout_ms)
{
    uint64_t until_ms = clock_now_ms() + timeout_ms;

    for (;;) {
        struct commit *batch = NULL;
        store_closed(store, NULL, NULL, 0, &batch);
        store_send(store, batch);
        if (!atomic_load(&store->n_dirty))
            return 0;
        if (clock_now_ms() >= until_ms)
            return -ETIMEDOUT;
        usleep(2000);
    }
}

static void drop_entry(void *arg, struct l1_entry *entry)
{
    struct store *store = arg;
    struct session *session = CONTAINER_OF(entry, struct session, entry);

    pthread_mutex_lock(&session->lock);
    uint64_t n_known = session->n_known;
    session_kill_locked(store, session, S_GONE);
    pthread_mutex_unlock(&session->lock);
    if (n_known)
        store_forget(store, session, n_known);
}

void store_free(struct store *store)
{
    if (!store)
        return;
    if (store->has_timer_thread) {
        pthread_mutex_lock(&store->timer_lock);
        store->is_stopping = true;
        pthread_cond_signal(&store->timer_wake);
        pthread_mutex_unlock(&store->timer_lock);
        pthread_join(store->timer_thread, NULL);
    }
    store_set_events(store, NULL);
    atomic_store(&store->is_closing, true);
    if (store->l2)
        l2_stop(store->l2);
    if (store->l1) {
        l1_walk(store->l1, drop_entry, store);
        while (store->gone) {
            struct session *session = store->gone;
            session_leave_gone(store, session);
            if (session->n_known)
                store_forget(store, session, session->n_known);
        }
        if (store->root)
            session_unpin(store, store->root);
        l1_free(store->l1);
    }
    l2_free(store->l2);
    wheel_free(store->wheel);
    seal_keys_free(store->keys);
    free_dirs(store);
    free(store->key_buckets);
    free((char *)store->config.name_space);
    free(store);
}

struct session *store_root(struct store *store)
{
    return store->root;
}

void store_stats(struct store *store, struct store_stats *ret)
{
    *ret = (struct store_stats){
        .l2 = l2_stats(store->l2),
        .l2_is_up = l2_is_up(store->l2),
        .n_fetches = atomic_load(&store->n_fetches),
        .n_commits = atomic_load(&store->n_commits),
        .n_expired = atomic_load(&store->n_expired),
        .n_dirty = atomic_load(&store->n_dirty),
        .n_bad = atomic_load(&store->n_bad),
    };
    l1_stats(store->l1, &ret->l1);
}
