/* A session: its life, its names, its trust, its attributes. */
#include "store/internal.h"

#include <stdio.h>
#include <stdlib.h>

void *session_make(void *owner)
{
    size_t size = (sizeof(struct session) + 63) / 64 * 64; /* l1 wants its first fields in one cache line */
    struct session *session = aligned_alloc(64, size);

    if (!session)
        return NULL;
    memset(session, 0, size);
    pthread_mutex_init(&session->lock, NULL);
    session->waiters_end = &session->waiters;
    return session;
}

/* ---- by key ---- */

static uint64_t key_hash(const uint8_t id[SEAL_ID_BYTES])
{
    uint64_t hash;

    memcpy(&hash, id, sizeof(hash)); /* an HMAC: random enough as it is */
    return hash;
}

static struct session **key_bucket(struct store *store, uint64_t hash)
{
    return &store->key_buckets[hash % KEY_BUCKETS];
}

static pthread_mutex_t *key_lock(struct store *store, uint64_t hash)
{
    return &store->key_stripes[hash % KEY_BUCKETS % KEY_STRIPES].lock;
}

static void key_add(struct store *store, struct session *session)
{
    uint64_t hash = key_hash(session->id);
    pthread_mutex_t *lock = key_lock(store, hash);

    pthread_mutex_lock(lock);
    struct session **bucket = key_bucket(store, hash);
    session->key_next = *bucket;
    *bucket = session;
    pthread_mutex_unlock(lock);
}

static void key_remove(struct store *store, struct session *session)
{
    uint64_t hash = key_hash(session->id);
    pthread_mutex_t *lock = key_lock(store, hash);

    pthread_mutex_lock(lock);
    for (struct session **slot = key_bucket(store, hash); *slot; slot = &(*slot)->key_next) {
        if (*slot == session) {
            *slot = session->key_next;
            break;
        }
    }
    pthread_mutex_unlock(lock);
}

static bool try_pin(struct session *session)
{
    uint32_t pins = atomic_load(&session->entry.pins);

    while (pins)
        if (atomic_compare_exchange_weak(&session->entry.pins, &pins, pins + 1))
            return true;
    return false;
}

struct session *session_by_key(struct store *store, const char *key, size_t size)
{
    uint8_t id[SEAL_ID_BYTES];
    struct session *found = NULL;

    if (size < 2 * SEAL_ID_TEXT + 1 || seal_id_parse(key + size - SEAL_ID_TEXT, id) < 0)
        return NULL;
    uint64_t hash = key_hash(id);
    pthread_mutex_t *lock = key_lock(store, hash);
    pthread_mutex_lock(lock);
    for (struct session *s = *key_bucket(store, hash); s && !found; s = s->key_next)
        if (memcmp(s->id, id, sizeof(id)) == 0 && try_pin(s))
            found = s;
    pthread_mutex_unlock(lock);
    return found;
}

struct dir *session_inside(struct session *session)
{
    pthread_mutex_lock(&session->lock);
    struct dir *inside = session->self;
    pthread_mutex_unlock(&session->lock);
    return inside;
}

size_t session_key(const struct store *store, const struct session *session, char key[L2_KEY_MAX])
{
    size_t n = strlen(store->name_space);

    memcpy(key, store->name_space, n);
    memcpy(key + n, session->dir->id_text, SEAL_ID_TEXT);
    key[n + SEAL_ID_TEXT] = ':';
    seal_id_format(session->id, key + n + SEAL_ID_TEXT + 1);
    return n + 2 * SEAL_ID_TEXT + 1;
}

static void name_locked(struct store *store, struct session *session, struct dir *dir, const char *name, size_t size)
{
    session->dir = dir;
    if (seal_name(store->keys, dir->id, name, size, session->id) < 0)
        abort(); /* OpenSSL cannot compute an HMAC */
    char key[L2_KEY_MAX];
    size_t key_size = session_key(store, session, key);
    session->link = l2_link_of(store->l2, key, key_size);
    session->flags |= S_KEYED;
    key_add(store, session);
}

struct session *session_get(struct store *store, struct dir *dir, const char *name, size_t size)
{
    bool is_new;
    struct l1_entry *entry = l1_get(store->l1, dir->number, name, size, &is_new);

    if (!entry)
        return NULL;
    struct session *session = CONTAINER_OF(entry, struct session, entry);
    pthread_mutex_lock(&session->lock);
    if (!(session->flags & S_IS_INIT)) {
        session->flags |= S_IS_INIT;
        name_locked(store, session, dir, name, size);
    }
    pthread_mutex_unlock(&session->lock);
    return session;
}

void session_rekey_locked(struct store *store, struct session *session, struct dir *dir, const char *name, size_t size)
{
    key_remove(store, session);
    if (l1_rename(store->l1, &session->entry, dir->number, name, size) < 0)
        abort(); /* out of memory for a file name */
    name_locked(store, session, dir, name, size);
}

void session_leave_gone(struct store *store, struct session *session)
{
    pthread_mutex_lock(&store->gone_lock);
    if (session->gone_link)
        *session->gone_link = session->gone_next;
    if (session->gone_link && session->gone_next)
        session->gone_next->gone_link = session->gone_link;
    session->gone_link = NULL;
    pthread_mutex_unlock(&store->gone_lock);
}

void session_release(void *owner, struct l1_entry *entry)
{
    struct store *store = owner;
    struct session *session = CONTAINER_OF(entry, struct session, entry);

    if (session->flags & S_KEYED)
        key_remove(store, session);
    session_leave_gone(store, session);
    content_unref(store, session->previous);
    content_unref(store, session->content);
    free(session->xattrs);
    pthread_mutex_destroy(&session->lock);
    free(session);
}

/* ---- content ---- */

static void drop_previous_locked(struct store *store, struct session *session)
{
    content_unref(store, session->previous);
    session->previous = NULL;
}

void session_set_content_locked(struct store *store, struct session *session, struct content *content)
{
    bool had = session->content, has = content;

    if (session->content && session->content->bytes)
        l1_pages_own(store->l1, session->content->bytes, session->content->room, NULL);
    content_unref(store, session->content);
    session->content = content;
    if (content && content->bytes)
        l1_pages_own(store->l1, content->bytes, content->room, &session->entry);
    if (had == has)
        return;
    if (has)
        l1_pin(&session->entry);
    l1_set_resident(store->l1, &session->entry, has);
    if (had)
        session_unpin(store, session); /* never the last one: the caller has a pin */
}

bool session_evict(void *owner, struct l1_entry *entry)
{
    struct store *store = owner;
    struct session *session = CONTAINER_OF(entry, struct session, entry);

    if (pthread_mutex_trylock(&session->lock) != 0)
        return false;
    bool is_evictable = !(session->flags & (S_DIRTY | S_ORPHAN | S_BUSY)) && !session->commit && !session->fetch &&
                        !session->waiters && session->content;
    if (is_evictable) {
        drop_previous_locked(store, session);
        session_set_content_locked(store, session, NULL);
        if (!session->n_known && !(session->flags & S_OPEN))
            store_disarm_locked(store, session);
    }
    pthread_mutex_unlock(&session->lock);
    return is_evictable;
}

/* ---- trust ---- */

bool session_is_trusted(struct store *store, const struct session *session)
{
    return session->generation && session->generation == l2_generation(store->l2, session->link);
}

/*
 * Another instance changed it. What is in flight may have been answered before the change: it is not believed (but
 * by those who asked before it was sent).
 */
void session_distrust(struct store *store, struct session *session)
{
    pthread_mutex_lock(&session->lock);
    session->generation = 0;
    session->invalid_no++;
    if (session->fetch)
        fetch_wake_locked(session->fetch);
    bool is_known = session->n_known;
    pthread_mutex_unlock(&session->lock);
    if (is_known)
        event_changed(store, session);
}

/* ---- attributes ---- */

static void adopt_xattrs(struct session *session, const struct seal_meta *meta)
{
    free(session->xattrs);
    session->xattrs = NULL;
    session->xattrs_size = 0;
    if (!meta->xattrs_size)
        return;
    session->xattrs = malloc(meta->xattrs_size);
    if (!session->xattrs)
        abort();
    memcpy(session->xattrs, meta->xattrs, meta->xattrs_size);
    session->xattrs_size = meta->xattrs_size;
}

void session_adopt_meta_locked(struct store *store, struct session *session, const struct seal_meta *meta)
{
    session->mode = meta->mode;
    session->uid = meta->uid;
    session->gid = meta->gid;
    session->ino = meta->ino;
    session->ttl_ms = meta->ttl_ms;
    session->policy = meta->policy;
    session->created_ns = meta->created_ns;
    session->mtime_ns = meta->mtime_ns;
    session->ctime_ns = meta->ctime_ns;
    adopt_xattrs(session, meta);
    if (S_ISDIR(meta->mode)) {
        struct dir *self = store_dir(store, meta->dir_id);
        if (session->self && session->self != self)
            dir_set_session(store, session->self, session, NULL);
        if (session->self != self)
            session->self = self;
        atomic_store(&session->self->ttl_ms, meta->ttl_ms);
        atomic_store(&session->self->policy, meta->policy);
        if (session->n_known)
            dir_set_session(store, session->self, NULL, session);
    }
    session->flags |= S_IS_KNOWN;
}

void session_set_dirty_locked(struct store *store, struct session *session)
{
    uint64_t now_ms = clock_now_ms();

    session->change_no++;
    if (!(session->flags & S_DIRTY)) {
        session->flags |= S_DIRTY;
        session->dirty_since_ms = now_ms;
        l1_pin(&session->entry);
        atomic_fetch_add(&store->n_dirty, 1);
    }
    session->commit_at_ms = min_u64(now_ms + DIRTY_IDLE_MS, session->dirty_since_ms + DIRTY_MAX_MS);
    store_arm_locked(store, session);
}

void session_set_clean_locked(struct store *store, struct session *session)
{
    session->flags &= ~(unsigned)(S_CONTENT_DIRTY | S_TRUNCATED | S_PUBLISH | S_FAILED | S_CLOSED);
    session->commit_at_ms = 0;
    if (!(session->flags & S_DIRTY))
        return;
    session->flags &= ~(unsigned)S_DIRTY;
    atomic_fetch_sub(&store->n_dirty, 1);
    session_unpin(store, session);
}

/* Found by nothing any more but by the kernel's node id, and by store_free(). */
static void add_gone(struct store *store, struct session *session)
{
    pthread_mutex_lock(&store->gone_lock);
    session->gone_next = store->gone;
    session->gone_link = &store->gone;
    if (session->gone_next)
        session->gone_next->gone_link = &session->gone_next;
    store->gone = session;
    pthread_mutex_unlock(&store->gone_lock);
}

bool session_kill_locked(struct store *store, struct session *session, unsigned flags)
{
    if (session->flags & S_GONE)
        return false;
    session->flags |= S_GONE | flags;
    session->flags &= ~(unsigned)(S_OPEN | S_WHOLE | S_SHOWED_PREVIOUS);
    session_set_clean_locked(store, session);
    store_disarm_locked(store, session);
    drop_previous_locked(store, session);
    if (!(flags & S_ORPHAN) || !session->n_known)
        session_set_content_locked(store, session, NULL);
    l1_forget(store->l1, &session->entry);
    key_remove(store, session);
    session->flags &= ~(unsigned)S_KEYED;
    if (session->n_known)
        add_gone(store, session);
    return session->n_known && !(flags & S_ORPHAN);
}

void session_tell_gone(struct store *store, struct session *session)
{
    struct session *parent = dir_session(store, session->dir);

    event_gone(store, session, parent, session->entry.name, session->entry.name_size);
    if (parent)
        session_unpin(store, parent);
}

static unsigned valid_ms(struct store *store, const struct session *session)
{
    uint64_t valid = STORE_LEASE_MS;

    if (session->flags & S_GONE)
        return session->flags & S_ORPHAN ? STORE_LEASE_MS : 0;
    if (!session_is_trusted(store, session) && !(session->flags & S_DIRTY))
        return 0;
    if (session->deadline_ms) {
        uint64_t now_ms = clock_now_ms();
        valid = session->deadline_ms > now_ms ? min_u64(valid, session->deadline_ms - now_ms) : 0;
        valid = min_u64(valid, session->ttl_ms / 8);
    }
    return (unsigned)valid;
}

void session_attr_locked(struct store *store, struct session *session, struct store_attr *ret)
{
    *ret = (struct store_attr){
        .ino = session->ino,
        .size = S_ISDIR(session->mode) ? STORE_BLOCK : session->size,
        .mode = session->mode,
        .uid = session->uid,
        .gid = session->gid,
        .mtime_ns = session->mtime_ns,
        .ctime_ns = session->ctime_ns,
        .valid_ms = valid_ms(store, session),
    };
    session->told = session->version.unique;
}

/* ---- time to live ---- */

void session_set_deadline_locked(struct store *store, struct session *session, uint64_t ttl_ms)
{
    session->deadline_ms = ttl_ms ? clock_now_ms() + ttl_ms : 0;
    store_arm_locked(store, session);
}

struct renewal {
    struct l2_op op;
    struct store *store;
    struct session *session;
    uint64_t ttl_ms;
};

static void renewed(struct l2_op *op)
{
    struct renewal *renewal = CONTAINER_OF(op, struct renewal, op);
    struct store *store = renewal->store;
    struct session *session = renewal->session;

    pthread_mutex_lock(&session->lock);
    session->flags &= ~(unsigned)S_RENEWING;
    bool is_changed = op->result == -ENOENT || (op->result == 0 && echo_unique(op) != session->version.unique);
    if (op->result == 0 && !is_changed)
        session->generation = session->generation ? op->generation : 0;
    else
        session->generation = 0;
    struct store_op *ops = op_take_waiters_locked(session);
    pthread_mutex_unlock(&session->lock);
    if (is_changed)
        session_distrust(store, session);
    op_run_all(ops);
    session_unpin(store, session);
    free(renewal);
}

void session_renew_locked(struct store *store, struct session *session)
{
    uint64_t now_ms = clock_now_ms();

    if (session->policy != SEAL_POLICY_SLIDING || !session->ttl_ms || !session->deadline_ms ||
        (session->flags & (S_RENEWING | S_GONE | S_DIRTY | S_BUSY)) || session->commit || S_ISDIR(session->mode))
        return;
    if (session->deadline_ms > now_ms + session->ttl_ms - session->ttl_ms / 8)
        return;
    struct renewal *renewal = calloc(1, sizeof(*renewal));
    if (!renewal)
        return;
    *renewal = (struct renewal){.op.done = renewed, .store = store, .session = session, .ttl_ms = session->ttl_ms};
    l1_pin(&session->entry);
    session->flags |= S_RENEWING;
    session->deadline_ms = now_ms + session->ttl_ms;
    store_arm_locked(store, session);
    char key[L2_KEY_MAX];
    size_t size = session_key(store, session, key);
    l2_expire(store->l2, &renewal->op, key, size, session->ttl_ms);
}
