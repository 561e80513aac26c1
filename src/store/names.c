/* Steps of the operations on names: lookup, create, remove, rmdir, rename. */
#include "store/internal.h"

#include <stdio.h>
#include <stdlib.h>

static bool name_is_valid(const char *name, size_t size)
{
    return size > 0 && size <= L1_NAME_MAX && !memchr(name, '/', size) && strcmp(name, ".") != 0 &&
           strcmp(name, "..") != 0;
}

/* The directory's inside; -ENOENT if it is gone. */
static int dir_of(struct session *session, struct dir **ret)
{
    pthread_mutex_lock(&session->lock);
    bool is_gone = session->flags & S_GONE;
    struct dir *self = session->self;
    pthread_mutex_unlock(&session->lock);
    if (is_gone)
        return -ENOENT;
    if (!self)
        return -ENOTDIR;
    *ret = self;
    return 0;
}

/* op->target: the session of that name, pinned until the operation ends. */
static int find_target(struct store_op *op)
{
    struct dir *dir = NULL;

    if (op->target)
        return 0;
    if (op->name_size > L1_NAME_MAX)
        return -ENAMETOOLONG;
    if (!name_is_valid(op->name, op->name_size))
        return -EINVAL;
    int r = dir_of(op->dir, &dir);
    if (r < 0)
        return r;
    op->target = session_get(op->store, dir, op->name, op->name_size);
    return op->target ? 0 : -ENOMEM;
}

static void drop_target(struct store_op *op)
{
    session_unpin(op->store, TAKE(op->target));
}

/* ---- lookup ---- */

static void give_found_locked(struct store_op *op, struct session *session)
{
    session_attr_locked(op->store, session, &op->attr);
    op->found = session;
}

/*
 * A large session that is looked up is mostly read next, where that was so before: its content is on its way then.
 * Whoever only looks (stat, find) uses the credit up.
 */
static void fetch_ahead_locked(struct store *store, struct session *session)
{
    if (session->content || session->fetch || session->size <= PREFIX_BYTES || !S_ISREG(session->mode) ||
        (session->flags & S_GONE) || atomic_load(&session->dir->ahead) <= 0)
        return;
    atomic_fetch_sub(&session->dir->ahead, 1);
    session->flags |= S_AHEAD;
    fetch_start_locked(store, session, L2_READ_ALL);
}

static int lookup_once(struct store_op *op, bool *is_replaced)
{
    struct session *session = op->target;

    pthread_mutex_lock(&session->lock);
    int r = op_need_attr_locked(op, session);
    *is_replaced = session->flags & S_REPLACED;
    if (r == 0 && (session->flags & S_GONE))
        r = -ESTALE;
    if (r == 0) {
        session_renew_locked(op->store, session); /* looking it up again is use */
        give_found_locked(op, session);
        fetch_ahead_locked(op->store, session);
    }
    session_unlock(session);
    return r;
}

int step_lookup(struct store_op *op)
{
    for (;;) {
        bool is_replaced = false;
        int r = find_target(op);
        if (r < 0)
            return r;
        r = lookup_once(op, &is_replaced);
        if (r == PARKED)
            return PARKED;
        if (r == 0)
            store_remember(op->store, op->found, 1);
        if (r != -ESTALE)
            return r;
        if (!is_replaced)
            return -ENOENT;
        drop_target(op); /* the name stands for another session now */
    }
}

struct session *store_peek(struct store *store, struct session *dir, const char *name, size_t size,
                           struct store_attr *attr)
{
    struct dir *inside = session_inside(dir);
    struct l1_entry *entry = inside ? l1_find(store->l1, inside->number, name, size) : NULL;

    if (!entry)
        return NULL;
    struct session *session = CONTAINER_OF(entry, struct session, entry);
    pthread_mutex_lock(&session->lock);
    bool is_fresh = (session->flags & S_IS_KNOWN) && !(session->flags & (S_GONE | S_BUSY)) &&
                    ((session->flags & S_DIRTY) || session_is_trusted(store, session));
    if (is_fresh)
        session_attr_locked(store, session, attr);
    pthread_mutex_unlock(&session->lock);
    if (is_fresh)
        store_remember(store, session, 1);
    session_unpin(store, session);
    return is_fresh ? session : NULL;
}

/* ---- create ---- */

enum { CREATE_START, CREATE_ASKED, CREATE_FOUND };

static void adopt_commit_locked(struct commit *commit, struct session *session)
{
    session_adopt_meta_locked(commit->store, session, &commit->meta);
    session_set_content_locked(commit->store, session, content_ref(commit->content));
    if (session->content)
        session->content->unique = commit->version.unique;
    session->size = commit->content ? commit->content->size : 0;
    session->version = commit->version;
    session->saved_no = session->change_no;
    session->generation = commit_generation_locked(commit, session);
    session->deadline_ms = commit->ttl_ms == L2_TTL_NONE ? 0 : clock_now_ms() + commit->ttl_ms;
    store_arm_locked(commit->store, session);
}

/* What had the name before is gone from L2, or SET NX had failed: whoever has it open has a stale file, the name a new
 * one. */
static void replace_target(struct store_op *op)
{
    struct session *old = op->target;

    pthread_mutex_lock(&old->lock);
    old->flags &= ~(unsigned)S_BUSY;
    struct dir *dir = old->dir;
    bool is_gone = session_kill_locked(op->store, old, S_GONE | S_REPLACED);
    struct store_op *ops = op_take_waiters_locked(old);
    pthread_mutex_unlock(&old->lock);
    if (is_gone)
        session_tell_gone(op->store, old);
    drop_target(op);
    op->target = session_get(op->store, dir, op->name, op->name_size);
    if (!op->target)
        abort(); /* out of memory for one session */
    op_run_all(ops);
}

static void created(struct commit *commit, int result)
{
    struct store_op *op = commit->for_op;
    struct session *session = commit->session;

    pthread_mutex_lock(&session->lock);
    bool was_another = result == 0 && (session->flags & S_IS_KNOWN);
    pthread_mutex_unlock(&session->lock);
    if (was_another) { /* the new one is asked for: what was reported of it meanwhile went to the old one */
        replace_target(op);
        op->later = 0;
        op->stage = CREATE_ASKED;
        op_run(op);
        return;
    }
    pthread_mutex_lock(&session->lock);
    session->flags &= ~(unsigned)S_BUSY;
    if (result == 0)
        adopt_commit_locked(commit, session);
    struct store_op *ops = op_take_waiters_locked(session);
    pthread_mutex_unlock(&session->lock);
    op->later = result;
    op->stage = CREATE_ASKED;
    op_run(op);
    op_run_all(ops);
}

static uint64_t default_ttl(const struct store *store, struct dir *dir)
{
    uint64_t ttl_ms = atomic_load(&dir->ttl_ms);

    return ttl_ms == SEAL_TTL_INHERIT ? store->config.ttl_ms : ttl_ms;
}

/* What is made in a set-group-id directory gets its group; a directory the bit as well. */
static void inherit_group(struct store_op *op, struct seal_meta *meta)
{
    pthread_mutex_lock(&op->dir->lock);
    bool inherits = op->dir->mode & S_ISGID;
    uint32_t gid = op->dir->gid;
    pthread_mutex_unlock(&op->dir->lock);
    if (!inherits)
        return;
    meta->gid = gid;
    if (S_ISDIR(meta->mode))
        meta->mode |= S_ISGID;
}

static void fill_new_meta(struct store_op *op, struct commit *commit)
{
    struct store *store = op->store;
    struct dir *dir = op->target->dir;
    int64_t now_ns = clock_wall_ns();
    bool is_dir = S_ISDIR(op->mode);

    commit->meta.mode = op->mode;
    commit->meta.uid = op->uid;
    commit->meta.gid = op->gid;
    inherit_group(op, &commit->meta);
    commit->meta.policy = (enum seal_policy)atomic_load(&dir->policy);
    commit->meta.ttl_ms = is_dir ? SEAL_TTL_INHERIT : default_ttl(store, dir);
    commit->meta.mtime_ns = commit->meta.ctime_ns = commit->meta.created_ns = now_ns;
    commit->meta.xattrs_size = 0;
    seal_random(&commit->meta.ino, sizeof(commit->meta.ino));
    commit->meta.ino |= 2; /* neither 0 nor the root's */
    memset(commit->meta.dir_id, 0, SEAL_ID_BYTES);
    if (is_dir)
        seal_random(commit->meta.dir_id, SEAL_ID_BYTES);
    commit->ttl_ms = is_dir || !commit->meta.ttl_ms ? L2_TTL_NONE : commit->meta.ttl_ms;
    commit->condition = L2_IF_ABSENT;
    commit->finished = created;
    commit->for_op = op;
    content_unref(store, TAKE(commit->content));
}

/* L2 decides who creates it: SET NX. */
static int ask_to_create(struct store_op *op)
{
    struct session *session = op->target;

    pthread_mutex_lock(&session->lock);
    bool is_there = (session->flags & S_IS_KNOWN) && !(session->flags & S_GONE) &&
                    ((session->flags & S_DIRTY) || session_is_trusted(op->store, session));
    if (session->flags & S_GONE) {
        pthread_mutex_unlock(&session->lock);
        l1_forget(op->store->l1, &session->entry);
        drop_target(op);
        return -EAGAIN;
    }
    if (is_there) {
        pthread_mutex_unlock(&session->lock);
        op->stage = CREATE_ASKED;
        op->later = -EEXIST;
        return 0;
    }
    if ((session->flags & S_BUSY) || session->fetch || session->commit) {
        op_park_locked(session, op);
        pthread_mutex_unlock(&session->lock);
        return PARKED;
    }
    session->flags |= S_BUSY;
    struct commit *commit = commit_new_locked(op->store, session, SEAL_STATE_FINISHED);
    pthread_mutex_unlock(&session->lock);
    fill_new_meta(op, commit);
    commit_send(commit);
    return PARKED;
}

int step_create(struct store_op *op)
{
    int r;

    while (op->stage == CREATE_START) {
        r = find_target(op);
        if (r == 0)
            r = ask_to_create(op);
        if (r != 0 && r != -EAGAIN)
            return r;
    }
    if (op->stage == CREATE_ASKED) {
        op->stage = CREATE_FOUND;
        if (op->later < 0 && (op->later != -EEXIST || op->is_exclusive))
            return op->later;
        op->is_applied = op->later == 0; /* it is our own making */
    }
    r = step_lookup(op);
    if (r == -ENOENT) { /* somebody else's, and removed again in the meantime */
        op->stage = CREATE_START;
        if (op->target)
            drop_target(op);
        return step_create(op);
    }
    return r;
}

/* ---- remove ---- */

enum { REMOVE_START, REMOVE_ANSWERED };

/* Nothing may be in flight for @session when it is removed or renamed. */
static bool is_idle_locked(struct session *session)
{
    return !session->fetch && !session->commit && !(session->flags & (S_BUSY | S_FINISHING | S_RENEWING));
}

struct removal {
    struct l2_op op;
    struct store_op *for_op;
    char key[L2_KEY_MAX];
    size_t key_size;
    bool is_conditional, was_sent_before;
    uint8_t version[16];
    uint64_t started_ms;
};

static void submit_removal(struct store *store, struct removal *removal)
{
    if (removal->is_conditional)
        l2_remove_if(store->l2, &removal->op, removal->key, removal->key_size, removal->version);
    else
        l2_remove(store->l2, &removal->op, removal->key, removal->key_size);
}

/* True: the link was lost, it is sent again. Then "it is not there" may be our own doing. */
static bool removal_goes_on(struct removal *removal)
{
    struct store *store = removal->for_op->store;

    if (removal->op.is_lost && !atomic_load(&store->is_closing) &&
        clock_now_ms() < removal->started_ms + store->config.timeout_ms * 3 / 4) {
        removal->was_sent_before = true;
        submit_removal(store, removal);
        return true;
    }
    if (removal->was_sent_before && removal->op.result == -ENOENT)
        removal->op.result = 0;
    return false;
}

static void removed(struct l2_op *l2_op)
{
    struct removal *removal = CONTAINER_OF(l2_op, struct removal, op);
    struct store_op *op = removal->for_op;
    struct session *session = op->target;
    struct store *store = op->store;

    if (removal_goes_on(removal))
        return;
    int result = l2_op->result;
    pthread_mutex_lock(&session->lock);
    session->flags &= ~(unsigned)S_BUSY;
    if (result == 0)
        session_kill_locked(store, session, S_GONE | S_ORPHAN);
    else if (result == -ENOENT)
        session_kill_locked(store, session, S_GONE);
    else
        session->generation = 0;
    struct store_op *ops = op_take_waiters_locked(session);
    pthread_mutex_unlock(&session->lock);
    free(removal);
    op->later = result;
    op->stage = REMOVE_ANSWERED;
    op_run(op);
    op_run_all(ops);
}

/* @version: only if L2 still has that one; NULL: whatever it has. */
static void send_removal(struct store_op *op, const char *key, size_t key_size, const struct seal_version *version,
                         void (*done)(struct l2_op *))
{
    struct removal *removal = calloc(1, sizeof(*removal));

    if (!removal)
        abort();
    removal->op.done = done;
    removal->for_op = op;
    memcpy(removal->key, key, key_size);
    removal->key_size = key_size;
    removal->started_ms = clock_now_ms();
    if (version) {
        uint64_t stored[2] = {htole64(version->seq), htole64(version->unique)};
        memcpy(removal->version, stored, sizeof(stored));
        removal->is_conditional = true;
    }
    submit_removal(op->store, removal);
}

/*
 * Whoever has the file open goes on reading it: its content has to be here before it is gone from L2. The kernel does
 * not tell who has it open.
 */
static int ask_to_remove(struct store_op *op, bool is_dir)
{
    struct session *session = op->target;
    char key[L2_KEY_MAX];

    pthread_mutex_lock(&session->lock);
    int r = session->n_known && !is_dir ? op_need_content_locked(op, session) : op_need_attr_locked(op, session);
    if (r == -EBADMSG || r == -ENOMEM)
        r = 0; /* what cannot be read can still be removed */
    if (r == -ESTALE || (r == 0 && (session->flags & S_GONE)))
        r = -ENOENT;
    if (r == 0 && (session->flags & S_IS_KNOWN) && is_dir != !!S_ISDIR(session->mode))
        r = is_dir ? -ENOTDIR : -EISDIR;
    if (r == 0 && !is_idle_locked(session)) {
        op_park_locked(session, op);
        r = PARKED;
    }
    if (r == 0) {
        session->flags |= S_BUSY;
        size_t size = session_key(op->store, session, key);
        send_removal(op, key, size, NULL, removed);
        r = PARKED;
    }
    session_unlock(session);
    return r;
}

int step_remove(struct store_op *op)
{
    if (op->stage == REMOVE_ANSWERED)
        return op->later;
    int r = find_target(op);
    return r < 0 ? r : ask_to_remove(op, false);
}

/* ---- is a directory empty? ---- */

struct emptiness {
    struct l2_op op;
    struct store_op *for_op;
    char pattern[L2_KEY_MAX];
    unsigned n_tries;
};

enum { RMDIR_START, RMDIR_ANSWERED = REMOVE_ANSWERED, RMDIR_COUNTED };

static void counted(struct l2_op *l2_op)
{
    struct emptiness *emptiness = CONTAINER_OF(l2_op, struct emptiness, op);
    struct store_op *op = emptiness->for_op;
    const struct l2_scan_result *scan = l2_op->scan;

    if (l2_op->is_lost && ++emptiness->n_tries < 3) {
        l2_scan(op->store->l2, l2_op, 0, emptiness->pattern, 1000);
        return;
    }
    if (l2_op->result == 0 && scan && scan->n_keys == 0 && scan->cursor) {
        l2_scan(op->store->l2, l2_op, scan->cursor, emptiness->pattern, 1000);
        return;
    }
    op->later = l2_op->result < 0 ? l2_op->result : scan->n_keys ? -ENOTEMPTY : 0;
    free(emptiness);
    op->stage = RMDIR_COUNTED;
    op_run(op);
}

static void ask_if_empty(struct store_op *op, const struct dir *dir)
{
    struct emptiness *emptiness = calloc(1, sizeof(*emptiness));

    if (!emptiness)
        abort();
    emptiness->op.done = counted;
    emptiness->for_op = op;
    snprintf(emptiness->pattern, sizeof(emptiness->pattern), "%s%.*s:*", op->store->name_space, SEAL_ID_TEXT,
             dir->id_text);
    l2_scan(op->store->l2, &emptiness->op, 0, emptiness->pattern, 1000);
}

/* The directory's inside, once its entry is known. */
static int inside_of(struct store_op *op, struct session *session, struct dir **ret)
{
    pthread_mutex_lock(&session->lock);
    int r = op_need_attr_locked(op, session);
    if (r == -ESTALE || (r == 0 && (session->flags & S_GONE)))
        r = -ENOENT;
    if (r == 0 && !session->self)
        r = -ENOTDIR;
    if (r == 0)
        *ret = session->self;
    session_unlock(session);
    return r;
}

int step_rmdir(struct store_op *op)
{
    struct dir *inside = NULL;

    if (op->stage == RMDIR_ANSWERED)
        return op->later;
    int r = find_target(op);
    if (r < 0)
        return r;
    if (op->stage == RMDIR_COUNTED)
        return op->later < 0 ? op->later : ask_to_remove(op, true);
    r = inside_of(op, op->target, &inside);
    if (r != 0)
        return r;
    ask_if_empty(op, inside);
    return PARKED;
}

/* ---- rename ---- */

/*
 * The session moves to another key: SET under the new one, then DEL of the old one. op->session is the source,
 * op->target what has the new name now (an entry that may stand for nothing). Both are BUSY meanwhile.
 */
#define RENAME_TRIES 8
enum { RENAME_START, RENAME_ANSWERED, RENAME_COUNTED = RMDIR_COUNTED, RENAME_READY };

static void lock_both(struct session *a, struct session *b)
{
    pthread_mutex_lock(a < b ? &a->lock : &b->lock);
    pthread_mutex_lock(a < b ? &b->lock : &a->lock);
}

static void unlock_both(struct session *a, struct session *b)
{
    pthread_mutex_unlock(&a->lock);
    pthread_mutex_unlock(&b->lock);
}

static void end_rename(struct store_op *op, int result, struct commit *commit)
{
    struct session *from = op->session, *to = op->target;
    struct store *store = op->store;

    lock_both(from, to);
    from->flags &= ~(unsigned)S_BUSY;
    to->flags &= ~(unsigned)S_BUSY;
    if (result == 0 && (from->flags & S_GONE))
        result = -ENOENT;
    if (result == 0) {
        struct dir *dir = to->dir;
        uint64_t generation = commit_generation_locked(commit, to);
        char name[256];
        size_t size = to->entry.name_size;
        memcpy(name, to->entry.name, size);
        session_rekey_locked(store, from, dir, name, size); /* takes the name from @to in one step */
        session_kill_locked(store, to, S_GONE | S_ORPHAN | S_REPLACED);
        session_set_clean_locked(store, from);
        from->version = commit->version;
        from->saved_no = from->change_no;
        from->deadline_ms = commit->ttl_ms == L2_TTL_NONE ? 0 : clock_now_ms() + commit->ttl_ms;
        from->ctime_ns = commit->meta.ctime_ns;
        if (from->content)
            from->content->unique = commit->version.unique;
        from->flags &= ~(unsigned)(S_OPEN | S_WHOLE);
        from->generation = generation;
    } else {
        from->generation = to->generation = 0;
    }
    struct store_op *ops = op_take_waiters_locked(from), *more = op_take_waiters_locked(to);
    unlock_both(from, to);
    op->later = result;
    op->stage = result == -EAGAIN ? RENAME_START : RENAME_ANSWERED;
    op_run(op);
    op_run_all(ops);
    op_run_all(more);
}

static void old_is_removed(struct l2_op *l2_op)
{
    struct removal *removal = CONTAINER_OF(l2_op, struct removal, op);
    struct store_op *op = removal->for_op;
    struct commit *commit = op->work;

    if (removal_goes_on(removal))
        return;
    int result = l2_op->result;
    free(removal);
    if (result == -ENOENT)
        result = 0;
    if (result == -EEXIST) {    /* saved elsewhere since we read it: the newer content moves as well */
        op->no_replace = false; /* what has the new name is our own work */
        result = op->need++ < RENAME_TRIES ? -EAGAIN : 0;
    }
    end_rename(op, result, commit);
    commit_free(commit);
}

static void new_is_written(struct commit *commit, int result)
{
    struct store_op *op = commit->for_op;
    char key[L2_KEY_MAX];

    if (result < 0) {
        end_rename(op, result, commit);
        return;
    }
    /* commit_free() follows this return: keep a copy of what the last step needs */
    struct commit *kept = calloc(1, sizeof(*kept));
    if (!kept)
        abort();
    *kept = *commit;
    kept->content = content_ref(commit->content);
    l1_pin(&kept->session->entry);
    op->work = kept;
    pthread_mutex_lock(&op->session->lock);
    size_t size = session_key(op->store, op->session, key);
    struct seal_version version = op->session->version;
    pthread_mutex_unlock(&op->session->lock);
    send_removal(op, key, size, &version, old_is_removed);
}

/* The source as it will be under its new name. */
static void write_new(struct store_op *op)
{
    struct session *from = op->session, *to = op->target;
    struct store *store = op->store;

    pthread_mutex_lock(&from->lock);
    struct commit *commit = commit_new_locked(store, from, SEAL_STATE_FINISHED);
    if (from->deadline_ms && !(from->flags & S_DIRTY)) { /* a rename is no renewal */
        uint64_t now_ms = clock_now_ms();
        commit->ttl_ms = from->deadline_ms > now_ms ? from->deadline_ms - now_ms : 1;
    }
    pthread_mutex_unlock(&from->lock);
    struct commit *moved = calloc(1, sizeof(*moved) + op->new_name_size + commit->meta.xattrs_size + 1);
    if (!moved)
        abort();
    memcpy(moved, commit, sizeof(*moved));
    memcpy(moved->tail, op->new_name, op->new_name_size);
    if (commit->meta.xattrs_size)
        memcpy(moved->tail + op->new_name_size, commit->meta.xattrs, commit->meta.xattrs_size);
    free(commit);
    moved->meta.name = moved->tail;
    moved->meta.name_size = op->new_name_size;
    moved->meta.xattrs = moved->tail + op->new_name_size;
    moved->meta.ctime_ns = clock_wall_ns();
    pthread_mutex_lock(&to->lock);
    moved->key_size = session_key(store, to, moved->key);
    moved->invalid_no = to->invalid_no;
    pthread_mutex_unlock(&to->lock);
    moved->condition = op->no_replace ? L2_IF_ABSENT : L2_ALWAYS;
    moved->finished = new_is_written;
    moved->for_op = op;
    commit_send(moved);
}

static int need_source(struct store_op *op)
{
    struct session *from = op->session;

    pthread_mutex_lock(&from->lock);
    int r = op_need_content_locked(op, from);
    if (r == -ESTALE || (r == 0 && (from->flags & S_GONE)))
        r = -ENOENT;
    if (r == 0 && !is_idle_locked(from)) {
        op_park_locked(from, op);
        r = PARKED;
    }
    session_unlock(from);
    return r;
}

/* What has the new name: 0 if it may be replaced or is not there. */
static int need_target(struct store_op *op, struct dir **inside)
{
    struct session *to = op->target;

    /* What nobody here knows need not be asked for: the kernel has just looked it up, and SET decides. */
    pthread_mutex_lock(&to->lock);
    bool is_unknown = !(to->flags & (S_IS_KNOWN | S_GONE)) && !to->fetch;
    int r = is_unknown ? -ENOENT : to->n_known ? op_need_content_locked(op, to) : op_need_attr_locked(op, to);
    bool is_there = r == 0 && !(to->flags & S_GONE);
    if (r == -ESTALE || r == -EBADMSG || r == -ENOENT)
        r = 0;
    if (is_there && op->no_replace)
        r = -EEXIST;
    if (is_there && r == 0 && to->self)
        *inside = to->self;
    if (r == 0 && !is_idle_locked(to)) {
        op_park_locked(to, op);
        r = PARKED;
    }
    session_unlock(to);
    return r;
}

/* The source's and the target's entries; the source hides in op->session, pinned. */
static int find_both(struct store_op *op)
{
    struct dir *dir = NULL;

    if (!name_is_valid(op->new_name, op->new_name_size))
        return -EINVAL;
    int r = dir_of(op->new_dir, &dir);
    if (r < 0)
        return r;
    r = find_target(op);
    if (r < 0)
        return r;
    op->session = TAKE(op->target);
    op->target = session_get(op->store, dir, op->new_name, op->new_name_size);
    return op->target ? 0 : -ENOMEM;
}

static int end_of_rename(struct store_op *op, int result)
{
    if (op->session)
        session_unpin(op->store, TAKE(op->session));
    return result;
}

/* An entry that went out of the index since we found it no longer stands for the name. */
static bool is_out(struct session *session)
{
    pthread_mutex_lock(&session->lock);
    bool is_gone = session->flags & S_GONE;
    pthread_mutex_unlock(&session->lock);
    return is_gone;
}

static int make_busy(struct store_op *op)
{
    struct session *from = op->session, *to = op->target;
    int r = 0;

    lock_both(from, to);
    if (from->flags & S_GONE)
        r = -ENOENT;
    else if ((to->flags & S_GONE) || !is_idle_locked(from) || !is_idle_locked(to))
        r = -EAGAIN;
    if (r == 0) {
        from->flags |= S_BUSY;
        to->flags |= S_BUSY;
    }
    unlock_both(from, to);
    return r;
}

int step_rename(struct store_op *op)
{
    struct dir *inside = NULL;
    int r;

    if (op->stage == RENAME_ANSWERED)
        return end_of_rename(op, op->later);
    if (op->stage == RENAME_COUNTED) {
        if (op->later < 0)
            return end_of_rename(op, op->later);
        op->stage = RENAME_READY;
    }
    do {
        if (!op->session || is_out(op->target)) {
            if (op->session)
                session_unpin(op->store, TAKE(op->session));
            if (op->target)
                drop_target(op);
            r = find_both(op);
            if (r < 0)
                return end_of_rename(op, r);
        }
        if (op->session == op->target)
            return end_of_rename(op, 0);
        r = need_source(op);
        if (r == 0)
            r = need_target(op, &inside);
        if (r == PARKED)
            return PARKED;
        if (r < 0)
            return end_of_rename(op, r);
        if (inside && op->stage != RENAME_READY) {
            ask_if_empty(op, inside);
            return PARKED;
        }
        r = is_out(op->target) ? -EAGAIN : make_busy(op);
    } while (r == -EAGAIN);
    if (r < 0)
        return end_of_rename(op, r);
    write_new(op);
    return PARKED;
}
