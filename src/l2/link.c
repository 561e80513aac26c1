/*
 * One link: its socket, its queue, its handshake. States:
 *
 *   DOWN --connect()--> CONNECTING --writable--> HELLO --last handshake reply--> READY
 *     ^------------------------- link_break(), from any state -------------------'
 *
 * Commands that come while the link is not READY are kept until their deadline. What was in flight when a READY link
 * breaks fails at once: whether Redis executed it is unknown, and the floor above decides about trying again.
 */
#include "l2/internal.h"

#include <assert.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/macros.h"

#define BULK_MIN       16384u
#define BACKOFF_MIN_MS 20u
#define BACKOFF_MAX_MS 1000u
#define PING_MS        1000u

void link_init(struct l2_link *link, struct l2 *l2, unsigned index, bool is_invalidation)
{
    *link = (struct l2_link){
        .l2 = l2,
        .index = index,
        .is_invalidation = is_invalidation,
        .generation = 1,
        .fd = -1,
        .backoff_ms = BACKOFF_MIN_MS,
        .lock = PTHREAD_MUTEX_INITIALIZER,
    };
    queue_init(&link->main);
    queue_init(&link->parked);
}

static void drop_chunks(struct l2_link *link, struct queue *queue)
{
    while (queue->head) {
        struct chunk *chunk = queue->head;
        queue->head = chunk->next;
        chunk_put(&link->l2->pool, chunk);
    }
    queue->tail = NULL;
}

/*
 * Empties both queues; returns the commands, to be failed without the lock. A command whose thread is still giving
 * parts is not among them: l2_write_end() reports it.
 */
static struct l2_op *take_ops_locked(struct l2_link *link)
{
    queue_splice(&link->main, &link->parked);
    drop_chunks(link, &link->main);
    struct l2_op *ops = link->main.ops;
    for (struct l2_op **slot = &ops; link->stream && *slot; slot = &(*slot)->next) {
        if (*slot == link->stream) {
            *slot = link->stream->next;
            break;
        }
    }
    queue_init(&link->main);
    if (link->stream)
        link->stream->is_broken = true;
    link->stream = NULL;
    return ops;
}

static void fail_ops(struct l2_op *ops)
{
    while (ops) {
        struct l2_op *op = ops;
        ops = op->next;
        op->result = -EIO;
        op->is_lost = true;
        op->done(op);
    }
}

void link_close(struct l2_link *link)
{
    pthread_mutex_lock(&link->lock);
    struct l2_op *ops = take_ops_locked(link);
    if (link->fd >= 0)
        close(link->fd);
    link->fd = -1;
    link->state = LINK_DOWN;
    pthread_mutex_unlock(&link->lock);
    fail_ops(ops);
}

void link_deinit(struct l2_link *link)
{
    if (link->reader)
        redisReaderFree(link->reader);
    pthread_mutex_destroy(&link->lock);
}

/* ---- output ---- */

static void watch_locked(struct l2_link *link, bool wants_out)
{
    struct epoll_event event = {.events = EPOLLIN | (wants_out ? EPOLLOUT : 0u), .data.ptr = link};

    link->wants_out = wants_out;
    epoll_ctl(link->l2->epoll_fd, EPOLL_CTL_MOD, link->fd, &event);
}

static void discard_sent(struct l2_link *link, size_t n)
{
    while (n) {
        struct chunk *chunk = link->main.head;
        size_t part = min_u64(n, chunk->size - chunk->sent);
        chunk->sent += part;
        n -= part;
        if (chunk->sent < chunk->size)
            return;
        link->main.head = chunk->next;
        if (!chunk->next)
            link->main.tail = NULL;
        chunk_put(&link->l2->pool, chunk);
    }
}

/* Sends what the socket takes; the rest when epoll says so. An error is left to the I/O thread, which will meet it. */
void link_flush_locked(struct l2_link *link)
{
    while (link->state == LINK_READY && link->main.head) {
        struct iovec iov[16];
        size_t n_iov = 0, total = 0;
        for (struct chunk *c = link->main.head; c && n_iov < ARRAY_SIZE(iov); c = c->next) {
            iov[n_iov] = (struct iovec){c->data + c->sent, c->size - c->sent};
            total += iov[n_iov++].iov_len;
        }
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = n_iov};
        ssize_t n = sendmsg(link->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN)
            return;
        if (n > 0) {
            atomic_store_explicit(&link->sent_at_ms, clock_now_ms(), memory_order_relaxed);
            discard_sent(link, (size_t)n);
        }
        if (n < 0 || (size_t)n < total) {
            if (!link->wants_out)
                watch_locked(link, true);
            return;
        }
    }
    if (link->state == LINK_READY && link->wants_out)
        watch_locked(link, false);
}

void link_output(struct l2_link *link)
{
    pthread_mutex_lock(&link->lock);
    link_flush_locked(link);
    pthread_mutex_unlock(&link->lock);
}

struct queue *link_lock_queue(struct l2_link *link)
{
    pthread_mutex_lock(&link->lock);
    return link->stream ? &link->parked : &link->main;
}

void link_submit_unlock(struct l2_link *link, struct queue *queue, struct l2_op *op)
{
    op->link = link;
    op->deadline_ms = clock_now_ms() + link->l2->config.timeout_ms;
    queue_append_op(queue, op);
    if (queue == &link->main)
        link_flush_locked(link);
    pthread_mutex_unlock(&link->lock);
}

/* ---- connecting ---- */

static int connect_unix(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0)
        return -errno;
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0 && errno != EINPROGRESS) {
        int r = -errno;
        close(fd);
        return r;
    }
    int size = 1 << 20;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
    return fd;
}

/* Tries the host's addresses in turn with each attempt. */
static int connect_tcp(struct l2 *l2, unsigned attempt)
{
    const struct l2_address *to = &l2->config.address;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_ADDRCONFIG}, *list = NULL;
    char port[8];

    snprintf(port, sizeof(port), "%u", to->port);
    hints.ai_flags = AI_NUMERICHOST;
    int e = getaddrinfo(to->host, port, &hints, &list);
    if (e) {
        hints.ai_flags = AI_ADDRCONFIG;
        e = getaddrinfo(to->host, port, &hints, &list);
    }
    if (e)
        return -EHOSTUNREACH;
    unsigned n = 0;
    for (struct addrinfo *a = list; a; a = a->ai_next)
        n++;
    l2->n_addresses = n;
    struct addrinfo *chosen = list;
    for (attempt %= n; attempt; attempt--)
        chosen = chosen->ai_next;
    int fd = socket(chosen->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), r = fd < 0 ? -errno : 0;
    if (fd >= 0 && connect(fd, chosen->ai_addr, chosen->ai_addrlen) < 0 && errno != EINPROGRESS) {
        r = -errno;
        close(fd);
    }
    freeaddrinfo(list);
    if (r < 0)
        return r;
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    return fd;
}

static void plan_retry(struct l2_link *link)
{
    unsigned jitter = (unsigned)(clock_now_us() % (link->backoff_ms / 2 + 1));

    link->retry_at_ms = clock_now_ms() + link->backoff_ms / 2 + jitter;
    link->backoff_ms = (unsigned)min_u64(link->backoff_ms * 2, BACKOFF_MAX_MS);
}

void link_connect(struct l2_link *link, uint64_t now_ms)
{
    const struct l2_address *to = &link->l2->config.address;
    int fd = to->path ? connect_unix(to->path) : connect_tcp(link->l2, link->l2->address_no + link->n_attempts++);

    if (fd < 0) {
        char why[128];
        snprintf(why, sizeof(why), "cannot connect: %s", strerror(-fd));
        l2_refuse(link->l2, why);
        plan_retry(link);
        return;
    }
    pthread_mutex_lock(&link->lock);
    link->fd = fd;
    link->state = LINK_CONNECTING;
    link->state_until_ms = now_ms + link->l2->config.timeout_ms;
    link->heard_at_ms = now_ms;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = link};
    epoll_ctl(link->l2->epoll_fd, EPOLL_CTL_ADD, fd, &event);
    link->wants_out = true;
    pthread_mutex_unlock(&link->lock);
    link->reader = redisReaderCreate();
}

/* The link is of no use any more: fail what was in flight (if it was ever READY), try again later. */
void link_break(struct l2_link *link, const char *reason)
{
    struct l2_op *ops = NULL;

    pthread_mutex_lock(&link->lock);
    bool was_ready = link->state == LINK_READY;
    if (link->fd >= 0) {
        epoll_ctl(link->l2->epoll_fd, EPOLL_CTL_DEL, link->fd, NULL);
        close(link->fd);
    }
    link->fd = -1;
    link->state = LINK_DOWN;
    link->wants_out = false;
    if (was_ready) {
        link->is_tracked = false;
        atomic_fetch_add(&link->generation, 1);
        ops = take_ops_locked(link);
    }
    pthread_mutex_unlock(&link->lock);

    if (link->reader)
        redisReaderFree(link->reader);
    link->reader = NULL;
    link->bulk_op = NULL;
    link->bulk_left = link->crlf_left = 0;
    link->is_pinging = false;
    if (was_ready) {
        log_debug("redis: link %u is lost: %s", link->index, reason);
        link->backoff_ms = BACKOFF_MIN_MS;
        l2_link_is_lost(link);
    } else {
        l2_refuse(link->l2, reason);
    }
    plan_retry(link);
    fail_ops(ops);
}

/* ---- handshake ---- */

static bool send_all(struct l2_link *link, struct queue *queue)
{
    bool is_sent = true;

    for (struct chunk *c = queue->head; c && is_sent; c = c->next)
        is_sent = send(link->fd, c->data, c->size, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)c->size;
    drop_chunks(link, queue);
    return is_sent;
}

static void encode_tracking(struct l2 *l2, struct queue *queue)
{
    resp_command(&l2->pool, queue, 6);
    resp_text(&l2->pool, queue, "CLIENT");
    resp_text(&l2->pool, queue, "TRACKING");
    resp_text(&l2->pool, queue, "ON");
    resp_text(&l2->pool, queue, "REDIRECT");
    resp_number(&l2->pool, queue, l2->redirect_id);
    resp_text(&l2->pool, queue, "NOLOOP");
    /* Ids start anew when a server restarts: make sure that this one is our invalidation link and not a stranger. */
    resp_command(&l2->pool, queue, 4);
    resp_text(&l2->pool, queue, "CLIENT");
    resp_text(&l2->pool, queue, "LIST");
    resp_text(&l2->pool, queue, "ID");
    resp_number(&l2->pool, queue, l2->redirect_id);
}

enum hello { HELLO_AUTH, HELLO_SELECT, HELLO_NAME, HELLO_A, HELLO_B, HELLO_DONE };

static unsigned first_hello(const struct l2_link *link)
{
    const struct l2_address *to = &link->l2->config.address;

    return to->password ? HELLO_AUTH : to->db ? HELLO_SELECT : HELLO_NAME;
}

static unsigned next_hello(const struct l2_link *link)
{
    unsigned next = link->hello_step + 1;

    return next == HELLO_SELECT && !link->l2->config.address.db ? HELLO_NAME : next;
}

/* All of it in one go; the replies are judged one by one. */
static void hello(struct l2_link *link)
{
    struct l2 *l2 = link->l2;
    const struct l2_address *to = &l2->config.address;
    struct queue queue;

    queue_init(&queue);
    if (to->password) {
        resp_command(&l2->pool, &queue, to->user ? 3 : 2);
        resp_text(&l2->pool, &queue, "AUTH");
        if (to->user)
            resp_text(&l2->pool, &queue, to->user);
        resp_text(&l2->pool, &queue, to->password);
    }
    if (to->db) {
        resp_command(&l2->pool, &queue, 2);
        resp_text(&l2->pool, &queue, "SELECT");
        resp_number(&l2->pool, &queue, to->db);
    }
    resp_command(&l2->pool, &queue, 3);
    resp_text(&l2->pool, &queue, "CLIENT");
    resp_text(&l2->pool, &queue, "SETNAME");
    resp_text(&l2->pool, &queue, link->is_invalidation ? l2->token : "sessionfs");
    if (link->is_invalidation) {
        resp_command(&l2->pool, &queue, 2);
        resp_text(&l2->pool, &queue, "CLIENT");
        resp_text(&l2->pool, &queue, "ID");
        resp_command(&l2->pool, &queue, 2);
        resp_text(&l2->pool, &queue, "SUBSCRIBE");
        resp_text(&l2->pool, &queue, "__redis__:invalidate");
    } else {
        encode_tracking(l2, &queue);
    }
    link->hello_step = first_hello(link);
    link->hello_redirect = l2->redirect_id;
    link->state_until_ms = clock_now_ms() + l2->config.timeout_ms;
    if (!send_all(link, &queue))
        link_break(link, "the connection was closed during the handshake");
}

/* The socket became writable: connected, or not. */
static void connected(struct l2_link *link)
{
    int error = 0;
    socklen_t size = sizeof(error);

    getsockopt(link->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        char why[128];
        snprintf(why, sizeof(why), "cannot connect: %s", strerror(error));
        link_break(link, why);
        return;
    }
    pthread_mutex_lock(&link->lock);
    link->state = LINK_HELLO;
    watch_locked(link, false);
    pthread_mutex_unlock(&link->lock);
    hello(link);
}

static void ready(struct l2_link *link)
{
    pthread_mutex_lock(&link->lock);
    link->state = LINK_READY;
    link->is_tracked = !link->is_invalidation && l2_is_up(link->l2) && link->hello_redirect == link->l2->redirect_id;
    uint64_t now_ms = clock_now_ms();
    for (struct l2_op *op = link->main.ops; op; op = op->next)
        op->deadline_ms = max_u64(op->deadline_ms, now_ms + 100); /* sent only now: give the reply a chance */
    link_flush_locked(link);
    pthread_mutex_unlock(&link->lock);
    link->backoff_ms = BACKOFF_MIN_MS;
    if (link->n_attempts > 1) /* the others need not try what did not answer */
        link->l2->address_no += link->n_attempts - 1;
    link->n_attempts = 0;
    l2_link_is_ready(link);
}

static bool names_us(const struct l2 *l2, const redisReply *reply)
{
    return reply->type == REDIS_REPLY_STRING && strstr(reply->str, l2->token);
}

static const char *const hello_words[] = {
    [HELLO_AUTH] = "the password (or user) was refused",
    [HELLO_SELECT] = "the database number was refused",
    [HELLO_NAME] = "CLIENT SETNAME was refused",
    [HELLO_A] = "CLIENT TRACKING was refused (needs Redis 6.2 or later)",
    [HELLO_B] = "the client list was refused",
};

static void refuse_hello(struct l2_link *link, const redisReply *reply)
{
    char why[224];

    if (strncmp(reply->str, "NOAUTH", 6) == 0)
        snprintf(why, sizeof(why),
                 "it wants a password: put it in the source, in the -c file or in "
                 "SESSIONFS_REDIS_PASSWORD");
    else
        snprintf(why, sizeof(why), "%s: %.*s", hello_words[link->hello_step], (int)min_u64(reply->len, 120),
                 reply->str);
    link_break(link, why);
}

static void take_hello(struct l2_link *link, const redisReply *reply)
{
    struct l2 *l2 = link->l2;

    if (reply->type == REDIS_REPLY_ERROR) {
        refuse_hello(link, reply);
        return;
    }
    if (link->is_invalidation && link->hello_step == HELLO_A)
        l2->redirect_id = (uint64_t)reply->integer;
    if (!link->is_invalidation && link->hello_step == HELLO_B && !names_us(l2, reply)) {
        link_break(link, "the invalidation link belongs to another server");
        return;
    }
    link->hello_step = next_hello(link);
    if (link->hello_step == HELLO_DONE)
        ready(link);
}

/* ---- re-arming: the invalidation link is a new one ---- */

static void rearmed(struct l2_op *op)
{
    struct l2_link *link = CONTAINER_OF(op, struct l2_link, rearm);

    link->is_rearming = false;
    if (op->result == -EIO)
        return; /* the link broke: its next handshake does it */
    pthread_mutex_lock(&link->lock);
    link->is_tracked = true;
    atomic_fetch_add(&link->generation, 1);
    pthread_mutex_unlock(&link->lock);
    l2_link_is_ready(link);
}

void link_rearm(struct l2_link *link)
{
    struct l2 *l2 = link->l2;

    if (link->is_rearming) { /* the one before is still on its way: a handshake does the same */
        link_break(link, "the invalidation link changed twice");
        return;
    }
    struct queue *queue = link_lock_queue(link);

    if (link->state != LINK_READY) {
        pthread_mutex_unlock(&link->lock);
        return;
    }
    resp_command(&l2->pool, queue, 3);
    resp_text(&l2->pool, queue, "CLIENT");
    resp_text(&l2->pool, queue, "TRACKING");
    resp_text(&l2->pool, queue, "OFF");
    encode_tracking(l2, queue);
    link->rearm_step = 0;
    link->is_rearming = true;
    link->rearm = (struct l2_op){.done = rearmed, .kind = OP_REARM, .n_replies = 3};
    link_submit_unlock(link, queue, &link->rearm);
}

/* False: the link must be given up. */
static bool rearm_is_fine(struct l2_link *link, const redisReply *reply)
{
    unsigned step = link->rearm_step++;

    return reply->type != REDIS_REPLY_ERROR && (step != 2 || names_us(link->l2, reply));
}

/* ---- pings ---- */

static void pinged(struct l2_op *op)
{
    CONTAINER_OF(op, struct l2_link, ping)->is_pinging = false;
}

static void ping(struct l2_link *link)
{
    struct queue *queue = link_lock_queue(link);

    link->is_pinging = true;
    link->ping = (struct l2_op){.done = pinged, .kind = OP_PING, .n_replies = 1};
    resp_command(&link->l2->pool, queue, 1);
    resp_text(&link->l2->pool, queue, "PING");
    link_submit_unlock(link, queue, &link->ping);
}

/* ---- input ---- */

static void take_push(struct l2_link *link, const redisReply *reply)
{
    struct l2 *l2 = link->l2;

    if (reply->type != REDIS_REPLY_ARRAY || reply->elements < 2 || reply->element[0]->type != REDIS_REPLY_STRING)
        return;
    if (strcmp(reply->element[0]->str, "pong") == 0) {
        pthread_mutex_lock(&link->lock);
        queue_init(&link->main); /* the ping was all that it held; its output is sent */
        pthread_mutex_unlock(&link->lock);
        link->is_pinging = false;
        return;
    }
    if (strcmp(reply->element[0]->str, "message") != 0 || reply->elements != 3)
        return;
    const redisReply *keys = reply->element[2];
    if (keys->type != REDIS_REPLY_ARRAY) { /* FLUSHALL, or the tracking table was flushed */
        for (unsigned i = 0; i < l2->config.n_links; i++)
            atomic_fetch_add(&l2->links[i].generation, 1);
        l2->config.all_lost(l2->config.owner);
        return;
    }
    for (size_t i = 0; i < keys->elements; i++) {
        atomic_fetch_add(&l2->stats.n_invalidations, 1);
        l2->config.invalidated(l2->config.owner, keys->element[i]->str, keys->element[i]->len);
    }
}

/* The command that the next reply belongs to; the caller pops it with its last reply. NULL: nobody asked. */
static struct l2_op *first_op(struct l2_link *link)
{
    pthread_mutex_lock(&link->lock);
    struct l2_op *op = link->main.ops;
    pthread_mutex_unlock(&link->lock);
    return op;
}

static void pop_op(struct l2_link *link)
{
    pthread_mutex_lock(&link->lock);
    struct l2_op *op = link->main.ops;
    link->main.ops = op->next;
    if (!op->next)
        link->main.ops_end = &link->main.ops;
    pthread_mutex_unlock(&link->lock);
}

/* False: the link is broken. */
static bool take_reply(struct l2_link *link, const redisReply *reply)
{
    if (link->is_invalidation && link->state == LINK_READY) {
        take_push(link, reply);
        return true;
    }
    if (link->state == LINK_HELLO) {
        take_hello(link, reply);
        return link->state != LINK_DOWN;
    }
    struct l2_op *op = first_op(link);
    if (!op) {
        link_break(link, "a reply that nobody asked for");
        return false;
    }
    if (op->is_streaming) {
        link_break(link, "a reply before the end of its command");
        return false;
    }
    if (op->kind == OP_REARM && !rearm_is_fine(link, reply)) {
        link_break(link, "tracking could not be renewed");
        return false;
    }
    bool is_last = op->n_replies == 1;
    if (is_last) {
        pop_op(link);
        op->generation = link->is_tracked ? atomic_load(&link->generation) : 0;
    }
    bool is_done = reply_take(op, reply);
    if (is_last && !is_done)
        op->done(op);
    return link->state != LINK_DOWN;
}

/* Bytes of a large value. Returns how many it took. */
static size_t take_bulk(struct l2_link *link, const char *bytes, size_t size)
{
    size_t n = min_u64(size, link->bulk_left);

    if (n) {
        link->bulk_op->data(link->bulk_op, bytes, n, link->bulk_total);
        link->bulk_left -= n;
    }
    size_t end = min_u64(size - n, link->crlf_left);
    if (link->bulk_left == 0)
        link->crlf_left -= (unsigned)end;
    else
        end = 0;
    if (link->bulk_left || link->crlf_left)
        return n + end;
    struct l2_op *op = link->bulk_op;
    link->bulk_op = NULL;
    bool is_last = op->n_replies == 1;
    if (is_last) {
        pop_op(link);
        op->generation = link->is_tracked ? atomic_load(&link->generation) : 0;
    }
    reply_take(op, NULL);
    if (is_last)
        op->done(op);
    return n + end;
}

/*
 * A large value starts at @bytes? Then it goes to its command piece by piece: the reader would collect it in a
 * growing buffer first. Returns the size of its header line, 0 if it is something else.
 */
static size_t begins_bulk(struct l2_link *link, const char *bytes, size_t size)
{
    size_t total = 0, i = 1;

    if (size < 4 || bytes[0] != '$' || link->state != LINK_READY || link->is_invalidation)
        return 0;
    for (; i < size && i < 12 && bytes[i] >= '0' && bytes[i] <= '9'; i++)
        total = total * 10 + (size_t)(bytes[i] - '0');
    if (i + 1 >= size || bytes[i] != '\r' || bytes[i + 1] != '\n' || total < BULK_MIN)
        return 0;
    struct l2_op *op = first_op(link);
    if (!op || !reply_wants_bulk(op))
        return 0;
    link->bulk_op = op;
    link->bulk_total = link->bulk_left = total;
    link->crlf_left = 2;
    return i + 2;
}

static bool reader_is_idle(const redisReader *reader)
{
    return reader->ridx < 0 && reader->pos == reader->len;
}

/* The replies which the reader holds whole. False: the link is broken. */
static bool drain_reader(struct l2_link *link)
{
    for (;;) {
        redisReader *reader = link->reader;
        if (reader->ridx < 0 && reader->pos < reader->len) {
            size_t n = begins_bulk(link, reader->buf + reader->pos, reader->len - reader->pos);
            if (n) {
                reader->pos += n;
                reader->pos += take_bulk(link, reader->buf + reader->pos, reader->len - reader->pos);
                continue;
            }
        }
        if (reader->ridx < 0 && reader->pos == reader->len)
            return true; /* asked now, the reader would take itself to be amid a reply */
        void *reply = NULL;
        if (redisReaderGetReply(reader, &reply) != REDIS_OK) {
            link_break(link, "its replies do not read as Redis' protocol");
            return false;
        }
        if (!reply)
            return true;
        bool goes_on = take_reply(link, reply);
        freeReplyObject(reply);
        if (!goes_on)
            return false;
    }
}

/* False: the link is broken. */
static bool take_input(struct l2_link *link, const char *bytes, size_t size)
{
    while (size) {
        size_t n = 0;
        if (link->bulk_op) {
            n = take_bulk(link, bytes, size);
        } else if (reader_is_idle(link->reader) && (n = begins_bulk(link, bytes, size))) {
            /* its bytes follow */
        } else {
            redisReaderFeed(link->reader, bytes, size);
            return drain_reader(link);
        }
        bytes += n;
        size -= n;
    }
    return true;
}

void link_input(struct l2_link *link)
{
    if (link->state == LINK_CONNECTING) {
        connected(link);
        return;
    }
    for (int i = 0; i < 16 && link->state >= LINK_HELLO; i++) {
        ssize_t n = recv(link->fd, link->l2->input, INPUT_SIZE, MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n <= 0) {
            link_break(link, n == 0 ? "the server closed it" : strerror(errno));
            return;
        }
        link->heard_at_ms = clock_now_ms();
        if (!take_input(link, link->l2->input, (size_t)n))
            return;
        if ((size_t)n < INPUT_SIZE && !link->bulk_op)
            return;
    }
}

/* ---- time ---- */

/* Commands that wait for a connection which does not come. */
static void fail_overdue(struct l2_link *link, uint64_t now_ms)
{
    struct l2_op *ops = NULL;

    pthread_mutex_lock(&link->lock);
    if (link->state != LINK_READY && link->main.ops && link->main.ops->deadline_ms <= now_ms)
        ops = take_ops_locked(link);
    pthread_mutex_unlock(&link->lock);
    fail_ops(ops);
}

static bool is_overdue(struct l2_link *link, uint64_t now_ms)
{
    pthread_mutex_lock(&link->lock);
    struct l2_op *op = link->main.ops;
    uint64_t alive_at_ms = link->heard_at_ms;
    if (link->main.head) /* what is left to send moves */
        alive_at_ms = max_u64(alive_at_ms, atomic_load_explicit(&link->sent_at_ms, memory_order_relaxed));
    bool is_overdue = op && !op->is_streaming && op->deadline_ms <= now_ms && alive_at_ms + 50 < now_ms;
    /* A large value that keeps moving, or a long pipeline that keeps being answered, is no dead peer. */
    if (is_overdue && alive_at_ms + link->l2->config.timeout_ms / 2 > now_ms &&
        op->deadline_ms + 20 * (uint64_t)link->l2->config.timeout_ms > now_ms)
        is_overdue = false;
    pthread_mutex_unlock(&link->lock);
    return is_overdue;
}

void link_check(struct l2_link *link, uint64_t now_ms)
{
    switch (link->state) {
    case LINK_DOWN:
        fail_overdue(link, now_ms);
        if (now_ms >= link->retry_at_ms && (link->is_invalidation || link->l2->is_up))
            link_connect(link, now_ms);
        return;
    case LINK_CONNECTING:
    case LINK_HELLO:
        fail_overdue(link, now_ms);
        if (now_ms >= link->state_until_ms)
            link_break(link, "no answer in time");
        return;
    case LINK_READY:
        if (is_overdue(link, now_ms))
            link_break(link, "no answer in time");
        else if (!link->is_pinging && link->heard_at_ms + PING_MS <= now_ms)
            ping(link);
        return;
    }
}
