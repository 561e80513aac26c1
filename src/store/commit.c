/*
 * Commit: a session's unsaved changes become one new version in L2. One at a time for a session.
 *
 * commit_new_locked() takes a snapshot under the session's lock (the content is shared: who writes meanwhile writes to
 * a copy); commit_send() seals and sends it without any lock, so that a large session blocks nobody.
 */
#include "store/internal.h"

#include <stdlib.h>

#define PIECE (256u * 1024u)

void commit_free(struct commit *commit)
{
    content_unref(commit->store, commit->content);
    session_unpin(commit->store, commit->session);
    free(commit);
}

static void on_done(struct l2_op *op);

static uint64_t l2_ttl(const struct session *session)
{
    if (S_ISDIR(session->mode) || session->ttl_ms == 0)
        return L2_TTL_NONE;
    if (session->policy == SEAL_POLICY_FIXED && session->deadline_ms) {
        uint64_t now_ms = clock_now_ms();
        return session->deadline_ms > now_ms ? session->deadline_ms - now_ms : 1;
    }
    return session->ttl_ms;
}

struct commit *commit_new_locked(struct store *store, struct session *session, enum seal_state state)
{
    size_t name_size = session->entry.name_size;
    struct commit *commit = calloc(1, sizeof(*commit) + name_size + session->xattrs_size + 1);

    if (!commit)
        abort();
    memcpy(commit->tail, session->entry.name, name_size);
    if (session->xattrs_size)
        memcpy(commit->tail + name_size, session->xattrs, session->xattrs_size);
    commit->op = (struct l2_op){.done = on_done};
    commit->store = store;
    commit->session = session;
    l1_pin(&session->entry);
    commit->key_size = session_key(store, session, commit->key);
    commit->meta = (struct seal_meta){
        .mode = session->mode,
        .uid = session->uid,
        .gid = session->gid,
        .policy = session->policy,
        .ino = session->ino,
        .ttl_ms = session->ttl_ms,
        .mtime_ns = session->mtime_ns,
        .ctime_ns = session->ctime_ns,
        .created_ns = session->created_ns,
        .name = commit->tail,
        .name_size = (uint16_t)name_size,
        .xattrs = commit->tail + name_size,
        .xattrs_size = session->xattrs_size,
    };
    if (session->self)
        memcpy(commit->meta.dir_id, session->self->id, SEAL_ID_BYTES);
    commit->content = content_ref(session->content);
    commit->version.seq = session->version.seq + 1;
    seal_random(&commit->version.unique, sizeof(commit->version.unique));
    commit->state = state;
    commit->ttl_ms = l2_ttl(session);
    commit->change_no = session->change_no;
    commit->started_ms = clock_now_ms();
    commit->invalid_no = session->invalid_no;
    commit->condition = L2_IF_PRESENT;
    return commit;
}

void commit_start_locked(struct store *store, struct session *session, enum seal_state state)
{
    session->commit = session->unsent = commit_new_locked(store, session, state);
    session->flags &= ~(unsigned)S_CLOSED;
    atomic_fetch_add_explicit(&store->n_commits, 1, memory_order_relaxed);
}

/* ---- sealing and sending ---- */

static void send_small(struct commit *commit, size_t size)
{
    struct l2 *l2 = commit->store->l2;
    const struct content *content = commit->content;
    void *buffer = l2_buffer_get(l2, size);

    if (seal_blob(commit->store->keys, commit->key, commit->key_size, commit->version, commit->state, &commit->meta,
                  content ? content->bytes : NULL, content ? content->size : 0, buffer) < 0)
        abort(); /* OpenSSL cannot encrypt */
    l2_write_begin(l2, &commit->op, commit->key, commit->key_size, size, commit->ttl_ms, commit->condition);
    l2_write_part(l2, &commit->op, buffer, size);
    l2_write_end(l2, &commit->op);
}

/* Redis reads one piece while the next is sealed. */
static void send_large(struct commit *commit, size_t size)
{
    struct l2 *l2 = commit->store->l2;
    const struct content *content = commit->content;
    size_t n_head = size - content->size - SEAL_TAG_BYTES;
    void *head = l2_buffer_get(l2, n_head);
    struct seal_stream *stream = NULL;

    if (seal_blob_begin(&stream, commit->store->keys, commit->key, commit->key_size, commit->version, commit->state,
                        &commit->meta, content->size, head) < 0)
        abort();
    l2_write_begin(l2, &commit->op, commit->key, commit->key_size, size, commit->ttl_ms, commit->condition);
    l2_write_part(l2, &commit->op, head, n_head);
    for (size_t done = 0; done < content->size;) {
        size_t n = min_u64(PIECE, content->size - done);
        void *piece = l2_buffer_get(l2, PIECE);
        if (seal_stream_update(stream, content->bytes + done, n, piece) < 0)
            abort();
        l2_write_part(l2, &commit->op, piece, n);
        done += n;
    }
    unsigned char *tag = l2_buffer_get(l2, SEAL_TAG_BYTES);
    if (seal_stream_finish(stream, tag) < 0)
        abort();
    l2_write_part(l2, &commit->op, tag, SEAL_TAG_BYTES);
    l2_write_end(l2, &commit->op);
}

void commit_send(struct commit *commit)
{
    size_t size = seal_blob_size(&commit->meta, commit->content ? commit->content->size : 0);

    if (size <= PIECE)
        send_small(commit, size);
    else
        send_large(commit, size);
}

/* ---- the end ---- */

/*
 * The echo tells whether L2 had our version right after the write. A change after that is reported to us, perhaps
 * before the reply is: the report comes by another link.
 */
uint64_t commit_generation_locked(const struct commit *commit, const struct session *session)
{
    bool is_ours = echo_unique(&commit->op) == commit->version.unique && commit->invalid_no == session->invalid_no;

    return is_ours ? commit->op.generation : 0;
}

/* L2 has our version. @op tells whether it still had it right afterwards, and whether changes will be reported. */
static bool succeed_locked(struct commit *commit, struct session *session)
{
    session->version = commit->version;
    session->saved_no = commit->change_no;
    session->generation = commit_generation_locked(commit, session);
    if (session->content && session->content == commit->content)
        session->content->unique = commit->version.unique;
    session->flags = commit->state == SEAL_STATE_OPEN ? session->flags | S_OPEN : session->flags & ~(unsigned)S_OPEN;
    if (session->flags & S_OPEN)
        session->finish_at_ms = clock_now_ms() + FINISH_MS;
    if (session->change_no == commit->change_no) /* else the next commit says it */
        session->deadline_ms = commit->ttl_ms == L2_TTL_NONE ? 0 : clock_now_ms() + commit->ttl_ms;
    bool was_closed = session->flags & S_CLOSED;
    if (session->change_no == commit->change_no)
        session_set_clean_locked(commit->store, session);
    else if (was_closed)
        commit_start_locked(commit->store, session, SEAL_STATE_FINISHED);
    if (was_closed && (session->flags & S_OPEN) && !session->commit)
        commit_finish_open_locked(commit->store, session);
    return session->generation == 0;
}

static void fail_locked(struct commit *commit, struct session *session, int error)
{
    session->failed_no = commit->change_no;
    session->commit_error = error;
    session->flags |= S_FAILED;
    session->generation = 0;
    session->commit_at_ms = clock_now_ms() + RETRY_MS;
}

bool commit_is_due_locked(struct commit *commit, uint64_t now_ms)
{
    if (!commit->retry_at_ms || now_ms < commit->retry_at_ms)
        return false;
    commit->retry_at_ms = 0;
    return true;
}

/* A link that broke: again at once. A refusal that may pass: again in a moment, if a session's timer can see to it. */
static bool try_again(struct commit *commit, int result)
{
    struct store *store = commit->store;
    uint64_t now_ms = clock_now_ms();

    if (result != -EIO || now_ms >= commit->started_ms + store->config.timeout_ms * 3 / 4 ||
        atomic_load(&store->is_closing))
        return false;
    if (commit->op.is_lost) {
        commit_send(commit);
        return true;
    }
    if (commit->finished)
        return false;
    pthread_mutex_lock(&commit->session->lock);
    commit->retry_at_ms = now_ms + REFUSED_MS;
    store_arm_locked(store, commit->session);
    pthread_mutex_unlock(&commit->session->lock);
    return true;
}

static void on_done(struct l2_op *op)
{
    struct commit *commit = CONTAINER_OF(op, struct commit, op);
    struct store *store = commit->store;
    struct session *session = commit->session;
    int result = op->result;
    bool is_overtaken = false, is_gone = false;

    if (result == -EEXIST && echo_unique(op) == commit->version.unique)
        result = 0; /* the first try did it, and its reply was lost */
    if (try_again(commit, result))
        return;
    if (commit->finished) {
        commit->finished(commit, result);
        commit_free(commit);
        return;
    }
    pthread_mutex_lock(&session->lock);
    session->commit = NULL;
    if (session->flags & S_GONE)
        ;
    else if (result == 0)
        is_overtaken = succeed_locked(commit, session);
    else if (result == -ENOENT && session == store->root)
        fail_locked(commit, session, -EIO); /* its entry is made anew by the next fetch */
    else if (result == -ENOENT)
        is_gone = session_kill_locked(store, session, S_GONE); /* removed or expired elsewhere meanwhile */
    else
        fail_locked(commit, session, result);
    store_arm_locked(store, session);
    struct store_op *ops = op_take_waiters_locked(session);
    session_unlock(session);

    if (result < 0 && result != -ENOENT)
        log_warning(result, "store: a save did not reach Redis, will try again");
    if (is_overtaken)
        session_distrust(store, session);
    if (is_gone)
        session_tell_gone(store, session);
    op_run_all(ops);
    commit_free(commit);
}

/* ---- an open version becomes a finished one ---- */

struct finish {
    struct l2_op op;
    struct store *store;
    struct session *session;
    uint64_t unique;
};

static void on_finished(struct l2_op *op)
{
    struct finish *finish = CONTAINER_OF(op, struct finish, op);
    struct session *session = finish->session;
    struct store *store = finish->store;

    pthread_mutex_lock(&session->lock);
    session->flags &= ~(unsigned)S_FINISHING;
    bool is_current = session->version.unique == finish->unique;
    bool is_overtaken = is_current && (op->result == -ENOENT || (op->result == 0 && echo_unique(op) != finish->unique));
    if (is_current && op->result != -EIO)
        session->flags &= ~(unsigned)S_OPEN;
    if (is_current && op->result == 0 && !is_overtaken)
        session->generation = session->generation ? op->generation : 0;
    session->finish_at_ms = clock_now_ms() + FINISH_MS;
    store_arm_locked(store, session);
    struct store_op *ops = op_take_waiters_locked(session);
    pthread_mutex_unlock(&session->lock);
    if (is_overtaken)
        session_distrust(store, session);
    op_run_all(ops);
    session_unpin(store, session);
    free(finish);
}

void commit_finish_open_locked(struct store *store, struct session *session)
{
    uint64_t version[2] = {htole64(session->version.seq), htole64(session->version.unique)};
    struct finish *finish;
    char key[L2_KEY_MAX];

    if (!(session->flags & S_OPEN) || (session->flags & (S_FINISHING | S_GONE)) || session->commit)
        return;
    finish = calloc(1, sizeof(*finish));
    if (!finish)
        abort();
    *finish =
        (struct finish){.op.done = on_finished, .store = store, .session = session, .unique = session->version.unique};
    session->flags |= S_FINISHING;
    l1_pin(&session->entry);
    size_t size = session_key(store, session, key);
    l2_patch(store->l2, &finish->op, key, size, (const uint8_t *)version, SEAL_STATE_OFFSET, SEAL_STATE_FINISHED);
}

/* ---- when ---- */

struct commit *commit_closed(struct store *store, struct session *session)
{
    pthread_mutex_lock(&session->lock);
    session->flags &= ~(unsigned)S_WHOLE;
    if (session->flags & (S_GONE | S_BUSY)) {
        /* nothing to save, or the rename saves it */
    } else if (session->commit) {
        session->flags |= S_CLOSED;
    } else if (session->flags & S_TRUNCATED) {
        /* another program's close, or is the file to stay empty? In a moment it is clear. */
        if (!(session->flags & S_PUBLISH))
            session->commit_at_ms = clock_now_ms() + TRUNCATED_MS;
        session->flags |= S_PUBLISH;
        store_arm_locked(store, session);
    } else if ((session->flags & S_DIRTY) && !(session->flags & S_FAILED)) {
        commit_start_locked(store, session, SEAL_STATE_FINISHED);
    } else {
        commit_finish_open_locked(store, session);
    }
    struct commit *commit = TAKE(session->unsent);
    pthread_mutex_unlock(&session->lock);
    return commit;
}

/* A truncation alone is not published before the write that follows it, unless a close did, or closes are not heard. */
static bool is_held(const struct session *session)
{
    return (session->flags & S_TRUNCATED) && !(session->flags & (S_PUBLISH | S_FAILED)) &&
           atomic_load(&session->dir->watch) != WATCH_FAILED;
}

void commit_due_locked(struct store *store, struct session *session, uint64_t now_ms)
{
    if (session->commit || (session->flags & S_BUSY)) {
        if (session->commit_at_ms)
            session->commit_at_ms = max_u64(session->commit_at_ms, now_ms + 100);
        if (session->finish_at_ms)
            session->finish_at_ms = max_u64(session->finish_at_ms, now_ms + 100);
        return;
    }
    if ((session->flags & S_DIRTY) && session->commit_at_ms && now_ms >= session->commit_at_ms) {
        session->commit_at_ms = now_ms + RETRY_MS;
        if (is_held(session))
            ;
        else if (!(session->flags & S_FAILED))
            commit_start_locked(store, session, SEAL_STATE_FINISHED);
        else if (!session->fetch)
            fetch_start_locked(store, session, fetch_prefix(session));
    }
    if ((session->flags & S_OPEN) && now_ms >= session->finish_at_ms) {
        session->finish_at_ms = now_ms + FINISH_MS;
        if (!(session->flags & S_DIRTY)) /* else its writer is not done, and the next version ends the waiting */
            commit_finish_open_locked(store, session);
    }
}
