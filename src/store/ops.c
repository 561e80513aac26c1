/* Running operations: what they need, parking, and the steps of those that work on one open file. */
#include "store/internal.h"

#include <stdlib.h>

/* ---- running ---- */

static int step_getattr(struct store_op *op);
static int step_setattr(struct store_op *op);
static int step_read(struct store_op *op);
static int step_write(struct store_op *op);
static int step_sync(struct store_op *op);

static int (*const steps[])(struct store_op *) = {
    [STORE_LOOKUP] = step_lookup,
    [STORE_GETATTR] = step_getattr,
    [STORE_SETATTR] = step_setattr,
    [STORE_READ] = step_read,
    [STORE_WRITE] = step_write,
    [STORE_SYNC] = step_sync,
    [STORE_CREATE] = step_create,
    [STORE_REMOVE] = step_remove,
    [STORE_RMDIR] = step_rmdir,
    [STORE_RENAME] = step_rename,
    [STORE_GETXATTR] = step_getxattr,
    [STORE_SETXATTR] = step_setxattr,
    [STORE_REMOVEXATTR] = step_removexattr,
    [STORE_LISTXATTR] = step_listxattr,
    [STORE_LIST] = step_list,
    [STORE_STATFS] = step_statfs,
};

void op_finish(struct store_op *op, int result)
{
    struct store *store = op->store;

    op->result = result;
    if (op->target)
        session_unpin(store, TAKE(op->target));
    if (op->copy) {
        explicit_bzero(op->copy, op->size);
        free(TAKE(op->copy));
    }
    op->done(op);
}

void op_run(struct store_op *op)
{
    int r = steps[op->kind](op);

    if (r != PARKED)
        op_finish(op, r);
}

void op_run_all(struct store_op *ops)
{
    while (ops) {
        struct store_op *op = ops;
        ops = op->next;
        op_run(op);
    }
}

/* Data of a caller's buffer outlives store_run() only as a copy; it is made before the op can be seen by others. */
static void keep_data(struct store_op *op)
{
    if (!op->data || op->copy || op->is_applied || !op->size)
        return;
    op->copy = malloc(op->size);
    if (!op->copy)
        abort();
    memcpy(op->copy, op->data, op->size);
    op->data = op->copy;
}

void op_park_locked(struct session *session, struct store_op *op)
{
    keep_data(op);
    op->next = NULL;
    *session->waiters_end = op;
    session->waiters_end = &op->next;
}

struct store_op *op_take_waiters_locked(struct session *session)
{
    struct store_op *ops = session->waiters;

    session->waiters = NULL;
    session->waiters_end = &session->waiters;
    return ops;
}

void session_unlock(struct session *session)
{
    struct commit *commit = TAKE(session->unsent);

    pthread_mutex_unlock(&session->lock);
    if (commit)
        commit_send(commit);
}

void store_run(struct store *store, struct store_op *op)
{
    op->store = store;
    op_run(op);
}

void store_done_with(struct store *store, struct store_op *op)
{
    content_unref(store, TAKE(op->content));
    free(TAKE(op->lent));
}

/* ---- what operations need ---- */

static int park(struct session *session, struct store_op *op)
{
    op_park_locked(session, op);
    return PARKED;
}

/* Has a fetch ended that began after this operation did? Then its result is right for us, whatever happened since. */
static bool was_asked_for(struct store_op *op, struct session *session)
{
    if (op->seen_of != session) {
        op->seen_of = session;
        op->seen = session->fetch_no;
    }
    return (int32_t)(session->done_no - op->seen) > 0;
}

static bool is_outage(struct store *store)
{
    return clock_now_ms() < atomic_load(&store->outage_until_ms);
}

int op_need_attr_locked(struct store_op *op, struct session *session)
{
    struct store *store = op->store;
    bool was_asked = was_asked_for(op, session);

    if (session->flags & S_GONE)
        return session->flags & S_ORPHAN ? 0 : -ESTALE;
    if (session->flags & S_BUSY)
        return park(session, op);
    bool is_known = session->flags & S_IS_KNOWN;
    if (is_known && ((session->flags & S_DIRTY) || session_is_trusted(store, session)))
        return 0;
    if (session->fetch)
        return park(session, op);
    if (was_asked) {
        int r = session->fetch_error;
        return r == -EIO && is_known ? 0 : r;
    }
    if (is_known && is_outage(store))
        return 0; /* serve what we have */
    fetch_start_locked(store, session, fetch_prefix(session));
    return park(session, op);
}

int op_need_content_locked(struct store_op *op, struct session *session)
{
    int r = op_need_attr_locked(op, session);

    if (r)
        return r;
    if (session->content || session->size == 0 || !S_ISREG(session->mode))
        return 0;
    if (session->flags & S_GONE)
        return -ESTALE;
    if (session->fetch)
        return park(session, op);
    if (was_asked_for(op, session) && session->fetch_error)
        return session->fetch_error;
    if (is_outage(op->store))
        return -EIO;
    fetch_start_locked(op->store, session, L2_READ_ALL);
    return park(session, op);
}

/* Which state a save gets: its writer may go on writing, unless the programs of that directory never do. */
static enum seal_state state_for(const struct store_op *op, const struct session *session)
{
    bool is_whole = op->kind == STORE_WRITE && atomic_load(&session->dir->trust) < TRUST_AFTER;

    return is_whole ? SEAL_STATE_OPEN : SEAL_STATE_FINISHED;
}

int op_need_saved_locked(struct store_op *op, struct session *session)
{
    if (session->saved_no >= op->need)
        return 0;
    if (session->flags & S_GONE)
        return session->flags & S_ORPHAN ? 0 : -ESTALE;
    if (session->failed_no >= op->need)
        return session->commit_error;
    /* An attribute that was set amid another program's save goes with that save: alone it would publish half of it. */
    bool is_content_op = op->kind == STORE_WRITE || op->kind == STORE_SYNC || (op->set & STORE_SET_SIZE);
    if (!session->commit && !is_content_op && (session->flags & S_CONTENT_DIRTY))
        return 0;
    if (!session->commit && !(session->flags & S_BUSY)) {
        session->flags &= ~(unsigned)S_FAILED;
        commit_start_locked(op->store, session, state_for(op, session));
    }
    return park(session, op);
}

int op_save_now_locked(struct store_op *op, struct session *session)
{
    op->need = session->change_no;
    op->is_applied = true;
    session->commit_at_ms = clock_now_ms() + DIRTY_IDLE_MS;
    return op_need_saved_locked(op, session);
}

/* ---- attributes ---- */

static int step_getattr(struct store_op *op)
{
    struct session *session = op->session;

    pthread_mutex_lock(&session->lock);
    int r = op_need_attr_locked(op, session);
    if (r == 0)
        session_attr_locked(op->store, session, &op->attr);
    session_unlock(session);
    return r;
}

static void changed_now(struct session *session)
{
    session->ctime_ns = clock_wall_ns();
}

static void content_changed_now(struct session *session)
{
    session->mtime_ns = session->ctime_ns = clock_wall_ns();
    session->flags |= S_CONTENT_DIRTY;
}

/* A write or truncation ends suid, and sgid where it means a group (not mandatory locking). */
static void kill_suid(struct session *session)
{
    session->mode &= ~(uint32_t)S_ISUID;
    if (session->mode & S_IXGRP)
        session->mode &= ~(uint32_t)S_ISGID;
}

/* A save that is closed and waits for the commit before it must not be changed by the save after it. */
static bool is_closed_save_waiting(const struct session *session)
{
    return session->commit && (session->flags & S_CLOSED) && (session->flags & S_CONTENT_DIRTY) &&
           session->change_no != session->commit->change_no;
}

/* Changes @session's size; the content is here, or not needed. */
static int resize_locked(struct store *store, struct session *session, uint64_t size)
{
    struct content *content = session->content;

    if (size == 0) {
        session_set_content_locked(store, session, NULL);
        session->size = 0;
        return 0;
    }
    session->content = NULL; /* consumed by content_writable(), under the same pin and place in the list */
    if (content && content->bytes && atomic_load(&content->refs) > 1)
        l1_pages_own(store->l1, content->bytes, content->room, NULL); /* whoever else has it may outlive the session */
    struct content *resized = content_writable(store, content, size);
    if (!resized) {
        session->content = content;
        return -ENOSPC;
    }
    if (size > resized->size)
        memset(resized->bytes + resized->size, 0, size - resized->size);
    resized->size = size;
    resized->unique = 0;
    session->size = size;
    if (content) {
        session->content = resized;
        l1_pages_own(store->l1, resized->bytes, resized->room, &session->entry);
        l1_mark_used(&session->entry);
    } else {
        session_set_content_locked(store, session, resized);
    }
    return 0;
}

/* What has to be so before a content changes: earlier closes are known, this one's will be. */
static int need_order(struct store_op *op, struct session *session)
{
    if (!op->is_settled) {
        op->is_settled = true;
        event_settle(op->store);
    }
    pthread_mutex_lock(&session->lock);
    struct dir *dir = session->dir;
    pthread_mutex_unlock(&session->lock);
    int watch = atomic_load(&dir->watch);
    if (watch == WATCH_ON || watch == WATCH_FAILED)
        return 0;
    keep_data(op);
    return op_need_watch(op, dir);
}

static int set_size_locked(struct store_op *op, struct session *session)
{
    struct store *store = op->store;

    if (S_ISDIR(session->mode))
        return -EISDIR;
    if (op->size > store->config.max_session)
        return -EFBIG;
    bool was_dirty = session->flags & S_CONTENT_DIRTY;
    int r = resize_locked(store, session, op->size);
    if (r < 0)
        return r;
    content_changed_now(session);
    if (op->size == 0 && !was_dirty)
        session->flags |= S_TRUNCATED;
    session->flags &= ~(unsigned)S_WHOLE;
    return 0;
}

static void set_others_locked(struct store_op *op, struct session *session)
{
    if (op->set & STORE_SET_MODE)
        session->mode = (session->mode & S_IFMT) | (op->mode & 07777);
    if (op->set & STORE_SET_UID)
        session->uid = op->uid;
    if (op->set & STORE_SET_GID)
        session->gid = op->gid;
    if (op->set & STORE_SET_KILL_SUID)
        kill_suid(session);
    if (op->set & STORE_SET_MTIME)
        session->mtime_ns = op->mtime_ns;
    if (op->set & STORE_SET_MTIME_NOW)
        session->mtime_ns = clock_wall_ns();
    changed_now(session);
}

/* touch(1): renews the TTL and moves no content. */
static bool touch_locked(struct store_op *op, struct session *session)
{
    unsigned real = op->set & ~(unsigned)STORE_SET_CTIME;

    if (real != STORE_SET_MTIME_NOW || session->policy != SEAL_POLICY_SLIDING || !session->ttl_ms ||
        !session->deadline_ms || (session->flags & (S_DIRTY | S_GONE)))
        return false;
    session->mtime_ns = session->ctime_ns = clock_wall_ns();
    session_renew_locked(op->store, session);
    return true;
}

static int set_locked(struct store_op *op, struct session *session)
{
    bool has_size = op->set & STORE_SET_SIZE;
    int r = has_size && op->size ? op_need_content_locked(op, session) : op_need_attr_locked(op, session);

    if (r)
        return r;
    if (has_size && is_closed_save_waiting(session))
        return park(session, op);
    if (touch_locked(op, session))
        return 0;
    if (has_size)
        r = set_size_locked(op, session);
    if (r < 0)
        return r;
    set_others_locked(op, session);
    if (session->flags & S_GONE)
        return 0;
    session_set_dirty_locked(op->store, session);
    /* open(O_TRUNC) and ftruncate() go with the save they belong to; truncate(2), which sets the time, is a save
     * itself. */
    bool is_part = (has_size && !(op->set & STORE_SET_MTIME_NOW)) || (!has_size && (session->flags & S_CONTENT_DIRTY));
    return is_part ? 0 : op_save_now_locked(op, session);
}

static int step_setattr(struct store_op *op)
{
    struct session *session = op->session;

    if ((op->set & STORE_SET_SIZE) && !op->is_applied && need_order(op, session) == PARKED)
        return PARKED;
    pthread_mutex_lock(&session->lock);
    int r = op->is_applied ? op_need_saved_locked(op, session) : set_locked(op, session);
    if (r == 0)
        session_attr_locked(op->store, session, &op->attr);
    session_unlock(session);
    return r;
}

/* ---- content ---- */

/* Reads of large sessions earn credit for fetching the next ones ahead (names.c). */
static void earn_ahead_locked(struct session *session)
{
    bool was_ahead = session->flags & S_AHEAD, is_late = !session->content && session->size > PREFIX_BYTES;

    session->flags &= ~(unsigned)S_AHEAD;
    if ((was_ahead || is_late) && atomic_load(&session->dir->ahead) < AHEAD_MAX)
        atomic_fetch_add(&session->dir->ahead, 1 + is_late);
}

static int step_read(struct store_op *op)
{
    struct session *session = op->session;

    pthread_mutex_lock(&session->lock);
    if (op->offset == 0)
        earn_ahead_locked(session);
    int r = op_need_content_locked(op, session);
    if (r == 0) {
        struct content *content = session->content;
        if (session->previous && session->told == session->previous->unique &&
            clock_now_ms() < session->previous_until_ms) {
            content = session->previous;
            session->flags |= S_SHOWED_PREVIOUS;
        }
        size_t size = content ? content->size : 0;
        if (op->offset < size) {
            op->content = content_ref(content);
            op->bytes = content->bytes + op->offset;
            op->n_bytes = min_u64(op->size, size - op->offset);
        }
        l1_mark_used(&session->entry);
    }
    session_unlock(session);
    return r;
}

static int replace_locked(struct store_op *op, struct session *session)
{
    struct store *store = op->store;
    struct content *content = session->content;

    if (!content || atomic_load(&content->refs) != 1 || content->room < op->size) {
        /* a request of the largest size is mostly the first of several */
        bool goes_on = op->size >= 65536 && op->size % L1_PAGE == 0;
        content = goes_on ? content_new(store, 2 * op->size) : NULL;
        if (!content)
            content = content_new(store, op->size);
        if (!content)
            return -ENOSPC;
        session_set_content_locked(store, session, content);
    } else if (content->size > op->size) {
        explicit_bzero(content->bytes + op->size, content->size - op->size);
    }
    memcpy(content->bytes, op->data, op->size);
    content->size = session->size = op->size;
    content->unique = 0;
    return 0;
}

static int patch_locked(struct store_op *op, struct session *session)
{
    uint64_t end = op->offset + op->size;

    if (end > session->size || !session->content || atomic_load(&session->content->refs) != 1) {
        int r = resize_locked(op->store, session, max_u64(end, session->size));
        if (r < 0)
            return r;
    }
    memcpy(session->content->bytes + op->offset, op->data, op->size);
    session->content->unique = 0;
    return 0;
}

/* The whole content in one request, and more may not follow: a request that ends on a page boundary may be the first of
 * several. */
static bool is_whole(const struct store_op *op, const struct session *session)
{
    return op->offset == 0 && op->size >= session->size && op->size % L1_PAGE != 0 && !op->is_cached;
}

static int write_locked(struct store_op *op, struct session *session)
{
    int r = op_need_attr_locked(op, session);

    if (r == 0 && op->offset + op->size > op->store->config.max_session)
        return -EFBIG;
    if (r == 0 && !(op->offset == 0 && op->size >= session->size))
        r = op_need_content_locked(op, session);
    if (r || !op->size)
        return r;
    if (is_closed_save_waiting(session))
        return park(session, op);
    bool whole = is_whole(op, session);
    r = op->offset == 0 && op->size >= session->size ? replace_locked(op, session) : patch_locked(op, session);
    if (r < 0)
        return r;
    content_changed_now(session);
    session->flags &= ~(unsigned)(S_TRUNCATED | S_PUBLISH);
    if (op->kills_suid)
        kill_suid(session);
    op->n_bytes = op->size;
    if (session->flags & S_GONE) /* unlinked: lives here alone, until it is closed */
        return 0;
    session_set_dirty_locked(op->store, session);
    if (!whole) {
        if (session->flags & S_WHOLE)
            atomic_store(&session->dir->trust, MISTRUST);
        session->flags &= ~(unsigned)S_WHOLE;
        return 0;
    }
    session->flags |= S_WHOLE;
    if (atomic_load(&session->dir->trust) < 2 * TRUST_AFTER)
        atomic_fetch_add(&session->dir->trust, 1);
    return op_save_now_locked(op, session);
}

static int step_write(struct store_op *op)
{
    struct session *session = op->session;

    if (!op->is_applied && need_order(op, session) == PARKED)
        return PARKED;
    pthread_mutex_lock(&session->lock);
    int r = op->is_applied ? op_need_saved_locked(op, session) : write_locked(op, session);
    session_unlock(session);
    return r;
}

static int step_sync(struct store_op *op)
{
    struct session *session = op->session;

    pthread_mutex_lock(&session->lock);
    int r = 0;
    if (op->is_applied)
        r = op_need_saved_locked(op, session);
    else if ((session->flags & S_DIRTY) && session->failed_no >= session->change_no) {
        session->change_no++; /* the last try failed: try again, for this one */
        r = op_save_now_locked(op, session);
    } else if (session->flags & S_DIRTY)
        r = op_save_now_locked(op, session);
    else
        commit_finish_open_locked(op->store, session);
    session_unlock(session);
    return r;
}
