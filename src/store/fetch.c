/*
 * Fetch: ask L2 for a session, open what comes, adopt it. One at a time for a session, for any number of waiters.
 *
 * The blob is opened while it arrives: first header and metadata are collected, then the content is decrypted straight
 * into L1's pages. All that runs on the I/O thread without the session's lock; the result is adopted under it.
 */
#include "store/internal.h"

#include <stdlib.h>

#define TRIES_MS(store) ((store)->config.timeout_ms * 3 / 4)

static void fetch_free(struct fetch *fetch)
{
    seal_stream_free(fetch->stream);
    content_unref(fetch->store, fetch->content);
    free(fetch->prefix);
    free(fetch->plain);
    free(fetch);
}

/* Forget what arrived: it will come again. */
static void reset(struct fetch *fetch)
{
    seal_stream_free(fetch->stream);
    content_unref(fetch->store, fetch->content);
    fetch->stream = NULL;
    fetch->content = NULL;
    fetch->n_prefix = fetch->n_content = fetch->n_tag = 0;
    fetch->has_head = fetch->has_meta = fetch->is_whole = false;
    fetch->error = 0;
    fetch->wait_until_ms = 0;
    fetch->was_invalidated = false;
}

/* ---- what arrives (I/O thread, no lock) ---- */

static int take_head(struct fetch *fetch, size_t total)
{
    int r = seal_head(fetch->prefix, fetch->n_prefix, &fetch->head);
    if (r < 0)
        return r;
    fetch->has_head = true;
    fetch->prefix_size = seal_blob_offset(&fetch->head);
    uint64_t whole = fetch->prefix_size + fetch->head.content_size + SEAL_TAG_BYTES;
    fetch->is_whole = total == whole;
    if (total > whole || (total < whole && (fetch->wanted == L2_READ_ALL || total < fetch->wanted)))
        return -EBADMSG; /* cut, or something hangs on behind */
    return 0;
}

static int take_meta(struct fetch *fetch)
{
    fetch->plain = realloc(fetch->plain, fetch->head.meta_size + 1);
    if (!fetch->plain)
        return -ENOMEM;
    int r = seal_open_meta(fetch->store->keys, fetch->key, fetch->key_size, fetch->prefix, fetch->n_prefix,
                           fetch->plain, &fetch->meta);
    if (r < 0)
        return r;
    fetch->has_meta = true;
    if (!fetch->is_whole)
        return 0;
    fetch->content = content_new(fetch->store, fetch->head.content_size);
    if (!fetch->content && fetch->wanted != L2_READ_ALL) {
        fetch->is_whole = false; /* no room: the attributes alone */
        return 0;
    }
    if (!fetch->content)
        return -ENOMEM;
    fetch->content->unique = fetch->head.version.unique;
    return seal_open_begin(&fetch->stream, fetch->store->keys, fetch->key, fetch->key_size, fetch->prefix);
}

/* Collect up to @size bytes of header and metadata. Returns what it used. */
static size_t collect(struct fetch *fetch, const unsigned char *bytes, size_t size, size_t until)
{
    size_t n = min_u64(size, until - fetch->n_prefix);

    if (fetch->prefix_room < until) {
        unsigned char *more = realloc(fetch->prefix, until);
        if (!more)
            abort();
        fetch->prefix = more;
        fetch->prefix_room = until;
    }
    memcpy(fetch->prefix + fetch->n_prefix, bytes, n);
    fetch->n_prefix += n;
    return n;
}

static int take_bytes(struct fetch *fetch, const unsigned char *bytes, size_t size, size_t total)
{
    int r = 0;

    while (size && r == 0) {
        size_t n = size;
        if (!fetch->has_head) {
            n = collect(fetch, bytes, size, SEAL_HEADER_BYTES);
            if (fetch->n_prefix == SEAL_HEADER_BYTES)
                r = take_head(fetch, total);
        } else if (!fetch->has_meta) {
            n = collect(fetch, bytes, size, fetch->prefix_size);
            if (fetch->n_prefix == fetch->prefix_size)
                r = take_meta(fetch);
        } else if (!fetch->is_whole) {
            return 0;
        } else if (fetch->n_content < fetch->head.content_size) {
            n = min_u64(size, fetch->head.content_size - fetch->n_content);
            r = seal_stream_update(fetch->stream, bytes, n, fetch->content->bytes + fetch->n_content);
            fetch->n_content += n;
        } else {
            n = min_u64(size, SEAL_TAG_BYTES - fetch->n_tag);
            memcpy(fetch->tag + fetch->n_tag, bytes, n);
            fetch->n_tag += n;
        }
        bytes += n;
        size -= n;
    }
    return r;
}

static void on_data(struct l2_op *op, const void *bytes, size_t size, size_t total)
{
    struct fetch *fetch = CONTAINER_OF(op, struct fetch, op);

    if (fetch->error == 0)
        fetch->error = take_bytes(fetch, bytes, size, total);
}

/* All has arrived: what is it worth? */
static int judge(struct fetch *fetch)
{
    if (fetch->op.result < 0)
        return fetch->op.result;
    if (fetch->error < 0)
        return fetch->error;
    if (!fetch->has_meta)
        return -EBADMSG;
    if (fetch->is_whole) {
        if (fetch->n_tag != SEAL_TAG_BYTES)
            return -EBADMSG;
        return seal_stream_finish(TAKE(fetch->stream), fetch->tag);
    }
    return 0;
}

/* ---- adopting (session locked) ---- */

/* Another instance's version takes the place of ours; who is in the middle of reading may finish with the old one. */
static void replace_content_locked(struct fetch *fetch, struct session *session)
{
    struct store *store = fetch->store;
    bool is_new_version = session->content && session->content->unique != fetch->head.version.unique;

    if (is_new_version && session->n_known && session->told == session->content->unique) {
        content_unref(store, session->previous);
        session->previous = content_ref(session->content);
        session->previous_until_ms = clock_now_ms() + PREVIOUS_MS;
    }
    if (fetch->content)
        session_set_content_locked(store, session, TAKE(fetch->content));
    else if (is_new_version)
        session_set_content_locked(store, session, NULL);
}

/*
 * A touch elsewhere moves the deadline and nothing else: when it was follows from that. Only what is clearly later than
 * the save counts, and once shown it stays put: PTTL and clocks are a little off each time.
 */
static void derive_times_locked(struct fetch *fetch, struct session *session, int64_t shown_ns)
{
    int64_t ttl_ms = (int64_t)session->ttl_ms;

    if (fetch->op.pttl_ms < 0 || !ttl_ms || session->policy != SEAL_POLICY_SLIDING)
        return;
    int64_t touched_ns = clock_wall_ns() + (fetch->op.pttl_ms - ttl_ms) * 1000000;
    int64_t coarse_ns = (int64_t)min_u64(1000, (uint64_t)ttl_ms / 16 + 20) * 1000000;
    if (shown_ns > session->ctime_ns && shown_ns + coarse_ns > touched_ns)
        touched_ns = shown_ns;
    else if (touched_ns <= session->ctime_ns + coarse_ns)
        return;
    session->mtime_ns = session->ctime_ns = touched_ns;
}

static void adopt_locked(struct fetch *fetch, struct session *session)
{
    struct store *store = fetch->store;
    bool is_same = (session->flags & S_IS_KNOWN) && session->version.unique == fetch->head.version.unique;
    int64_t shown_ns = is_same ? session->mtime_ns : 0;

    session_adopt_meta_locked(store, session, &fetch->meta);
    session->size = fetch->head.content_size;
    atomic_store(&session->dir->is_large, session->size > PREFIX_BYTES - SEAL_META_MAX / 32);
    session->version = fetch->head.version;
    replace_content_locked(fetch, session);
    session->flags &= ~(unsigned)S_BAD;
    session->generation = fetch->was_invalidated ? 0 : fetch->op.generation;
    derive_times_locked(fetch, session, shown_ns);
    session_set_deadline_locked(store, session, fetch->op.pttl_ms < 0 ? 0 : max_u64(1, (uint64_t)fetch->op.pttl_ms));
}

/* We have changes that are not saved. Only a failed save asks: somebody else's newer version wins over it. */
static void meet_dirty_locked(struct fetch *fetch, struct session *session)
{
    bool is_ours = session->version.unique == fetch->head.version.unique;

    if (!(session->flags & S_FAILED) || session->commit)
        return;
    if (is_ours) {
        session->flags &= ~(unsigned)S_FAILED;
        session->generation = fetch->was_invalidated ? 0 : fetch->op.generation;
        commit_start_locked(fetch->store, session, SEAL_STATE_FINISHED);
        return;
    }
    log_warning(0, "store: a change that could not be saved is given up: another instance saved that session since");
    session_set_clean_locked(fetch->store, session);
    adopt_locked(fetch, session);
}

static bool is_other_type(const struct fetch *fetch, const struct session *session)
{
    return (session->flags & S_IS_KNOWN) && (session->mode & S_IFMT) != (fetch->meta.mode & S_IFMT);
}

static bool succeed_locked(struct fetch *fetch, struct session *session)
{
    if (is_other_type(fetch, session))
        return session_kill_locked(fetch->store, session, S_GONE | S_REPLACED);
    if (session->flags & S_DIRTY)
        meet_dirty_locked(fetch, session);
    else
        adopt_locked(fetch, session);
    return false;
}

/* ---- the end ---- */

static bool must_wait(struct fetch *fetch, struct session *session)
{
    return fetch->head.state == SEAL_STATE_OPEN && session->version.unique != fetch->head.version.unique &&
           !(session->flags & S_DIRTY);
}

static void log_failure(struct fetch *fetch, int error)
{
    struct store *store = fetch->store;

    if (error == 0 || error == -EIO || error == -ENOENT)
        return;
    atomic_fetch_add(&store->n_bad, 1);
    if (fetch->session == store->root)
        return; /* store_new() says it */
    log_error(0, "store: session %.8s..: %s", fetch->key + fetch->key_size - SEAL_ID_TEXT,
              error == -EBADMSG ? "what Redis has does not authenticate: it was damaged, moved or made with another key"
              : error == -ENOKEY ? "it was sealed with a key that the key file does not have"
              : error == -ENOMEM ? "no room in L1 (l1_size=) to open it"
                                 : strerror(-error));
}

/*
 * L2 lost everything, the root's entry too: make it again as it was here, or take the one that somebody else just made.
 * What waits for it goes on meanwhile.
 */
static void root_is_back(struct commit *commit, int result)
{
    struct store *store = commit->store;

    pthread_mutex_lock(&store->root->lock);
    store->root->flags &= ~(unsigned)S_BUSY;
    if (result == 0) {
        store->root->version = commit->version;
        store->root->generation = commit_generation_locked(commit, store->root);
    } else {
        store->root->generation = 0;
    }
    struct store_op *ops = op_take_waiters_locked(store->root);
    pthread_mutex_unlock(&store->root->lock);
    op_run_all(ops);
}

static void revive_root_locked(struct store *store, struct commit **ret)
{
    *ret = commit_new_locked(store, store->root, SEAL_STATE_FINISHED);
    (*ret)->condition = L2_IF_ABSENT;
    (*ret)->ttl_ms = L2_TTL_NONE;
    (*ret)->finished = root_is_back;
    store->root->flags |= S_BUSY;
}

/* Takes the session's lock; ends the fetch. */
static void conclude(struct fetch *fetch, int result)
{
    struct store *store = fetch->store;
    struct session *session = fetch->session;
    struct commit *revival = NULL;
    bool is_gone = false;

    log_failure(fetch, result);
    pthread_mutex_lock(&session->lock);
    uint64_t now_ms = clock_now_ms();
    if (result == 0 && must_wait(fetch, session) && !fetch->wait_until_ms &&
        (!fetch->give_up_ms || now_ms < fetch->give_up_ms)) {
        if (!fetch->give_up_ms)
            fetch->give_up_ms = now_ms + OPEN_WAIT_MS;
        fetch->wait_until_ms = fetch->give_up_ms;
        store_arm_locked(store, session);
        bool is_stale = fetch->was_invalidated;
        pthread_mutex_unlock(&session->lock);
        if (is_stale) {
            pthread_mutex_lock(&session->lock);
            fetch_wake_locked(fetch);
            pthread_mutex_unlock(&session->lock);
        }
        return;
    }
    session->fetch = NULL;
    session->done_no = session->fetch_no;
    session->fetch_error = result == -ENOKEY ? -EBADMSG : result;
    if (session->flags & S_GONE) {
        /* removed here meanwhile */
    } else if (result == 0) {
        is_gone = succeed_locked(fetch, session);
        atomic_store(&store->outage_until_ms, 0);
    } else if (result == -ENOENT && session == store->root) {
        session->fetch_error = 0;
        revive_root_locked(store, &revival);
    } else if (result == -ENOENT) {
        is_gone = session_kill_locked(store, session, S_GONE);
    } else if (result == -EIO) {
        atomic_store(&store->outage_until_ms, clock_now_ms() + OUTAGE_MS);
        if (session->flags & S_FAILED)
            session->commit_at_ms = clock_now_ms() + RETRY_MS;
    } else {
        session->flags |= S_BAD;
        session->generation = 0;
    }
    store_arm_locked(store, session);
    struct store_op *ops = op_take_waiters_locked(session);
    session_unlock(session);

    if (revival)
        commit_send(revival);
    if (is_gone)
        session_tell_gone(store, session);
    op_run_all(ops);
    session_unpin(store, session);
    fetch_free(fetch);
}

static void on_done(struct l2_op *op)
{
    struct fetch *fetch = CONTAINER_OF(op, struct fetch, op);
    int result = judge(fetch);

    /* A link that broke is no reason to fail: another one, or the same again, may answer in time. */
    uint64_t now_ms = clock_now_ms();
    if (op->result == -EIO && now_ms < fetch->started_ms + TRIES_MS(fetch->store) &&
        !atomic_load(&fetch->store->is_closing)) {
        pthread_mutex_lock(&fetch->session->lock);
        reset(fetch);
        fetch->retry_at_ms = op->is_lost ? now_ms : now_ms + REFUSED_MS;
        fetch_retry_locked(fetch, now_ms);
        store_arm_locked(fetch->store, fetch->session);
        pthread_mutex_unlock(&fetch->session->lock);
        return;
    }
    conclude(fetch, result);
}

size_t fetch_prefix(const struct session *session)
{
    return atomic_load(&session->dir->is_large) ? PREFIX_LARGE_BYTES : PREFIX_BYTES;
}

void fetch_start_locked(struct store *store, struct session *session, size_t wanted)
{
    struct fetch *fetch = calloc(1, sizeof(*fetch));

    if (!fetch)
        abort();
    fetch->op = (struct l2_op){.done = on_done, .data = on_data};
    fetch->store = store;
    fetch->session = session;
    fetch->key_size = session_key(store, session, fetch->key);
    fetch->wanted = wanted;
    fetch->started_ms = clock_now_ms();
    l1_pin(&session->entry);
    session->fetch = fetch;
    session->fetch_no++;
    atomic_fetch_add_explicit(&store->n_fetches, 1, memory_order_relaxed);
    l2_read(store->l2, &fetch->op, fetch->key, fetch->key_size, wanted);
}

void fetch_wake_locked(struct fetch *fetch)
{
    fetch->was_invalidated = true;
    if (!fetch->wait_until_ms)
        return;
    reset(fetch);
    l2_read(fetch->store->l2, &fetch->op, fetch->key, fetch->key_size, fetch->wanted);
}

void fetch_retry_locked(struct fetch *fetch, uint64_t now_ms)
{
    if (!fetch->retry_at_ms || now_ms < fetch->retry_at_ms)
        return;
    fetch->retry_at_ms = 0;
    l2_read(fetch->store->l2, &fetch->op, fetch->key, fetch->key_size, fetch->wanted);
}

bool fetch_is_due_locked(struct fetch *fetch, uint64_t now_ms)
{
    return fetch->wait_until_ms && now_ms >= fetch->wait_until_ms;
}

static void healed(struct l2_op *op)
{
    free(op);
}

/* The writer has not closed it in all this time, or died: take it as it is, and let nobody else wait for it. */
void fetch_settle(struct store *store, struct session *session)
{
    pthread_mutex_lock(&session->lock);
    struct fetch *fetch = session->fetch;
    bool is_due = fetch && fetch_is_due_locked(fetch, clock_now_ms());
    if (is_due) {
        fetch->head.state = SEAL_STATE_FINISHED;
        fetch->wait_until_ms = 0;
    }
    pthread_mutex_unlock(&session->lock);
    if (!is_due)
        return;
    struct l2_op *op = calloc(1, sizeof(*op));
    if (op) {
        op->done = healed;
        l2_patch(store->l2, op, fetch->key, fetch->key_size, fetch->prefix + SEAL_VERSION_OFFSET, SEAL_STATE_OFFSET,
                 SEAL_STATE_FINISHED);
    }
    conclude(fetch, 0);
}
