#include <sessionfs/l2.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/macros.h"
#include "l2/internal.h"

static char *dup_or_null(const char *text)
{
    return text ? strdup(text) : NULL;
}

int l2_new(struct l2 **ret, const struct l2_config *config)
{
    struct l2 *l2 = calloc(1, sizeof(*l2));

    if (!l2)
        return -ENOMEM;
    l2->config = *config;
    l2->config.address = (struct l2_address){
        .path = dup_or_null(config->address.path),
        .host = dup_or_null(config->address.host),
        .port = config->address.port,
        .db = config->address.db,
        .user = dup_or_null(config->address.user),
        .password = dup_or_null(config->address.password),
    };
    chunk_pool_init(&l2->pool);
    pthread_mutex_init(&l2->start_lock, NULL);
    pthread_cond_init(&l2->started, NULL);
    l2->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    l2->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    l2->input = malloc(INPUT_SIZE);
    l2->links = calloc(config->n_links + 1, sizeof(*l2->links));
    if (l2->epoll_fd < 0 || l2->wake_fd < 0 || !l2->input || !l2->links) {
        l2_free(l2);
        return -ENOMEM;
    }
    for (unsigned i = 0; i <= config->n_links; i++)
        link_init(&l2->links[i], l2, i, i == config->n_links);
    l2->invalidation = &l2->links[config->n_links];
    *ret = l2;
    return 0;
}

void l2_free(struct l2 *l2)
{
    if (!l2)
        return;
    l2_stop(l2);
    free(l2->links);
    free(l2->input);
    closep(&l2->epoll_fd);
    closep(&l2->wake_fd);
    chunk_pool_deinit(&l2->pool);
    l2_address_deinit(&l2->config.address);
    pthread_cond_destroy(&l2->started);
    pthread_mutex_destroy(&l2->start_lock);
    free(l2);
}

/* ---- what the links report (I/O thread) ---- */

static void new_token(struct l2 *l2)
{
    uint64_t bits[1];

    if (getrandom(bits, sizeof(bits), 0) != sizeof(bits))
        bits[0] = clock_now_us();
    snprintf(l2->token, sizeof(l2->token), "sessionfs-%016llx", (unsigned long long)bits[0]);
}

static void count_ready(struct l2 *l2)
{
    pthread_mutex_lock(&l2->start_lock);
    if (++l2->n_ready == l2->config.n_links + 1) {
        l2->has_started = true;
        pthread_cond_broadcast(&l2->started);
    }
    pthread_mutex_unlock(&l2->start_lock);
}

static void invalidation_is_ready(struct l2 *l2)
{
    bool was_lost = l2->was_lost;

    l2->was_lost = false;
    atomic_store(&l2->is_up, true);
    for (unsigned i = 0; i < l2->config.n_links; i++) {
        l2->links[i].retry_at_ms = 0;
        link_rearm(&l2->links[i]);
    }
    if (was_lost) {
        log_info("redis: connected again");
        l2->config.recovered(l2->config.owner);
    }
}

void l2_link_is_ready(struct l2_link *link)
{
    struct l2 *l2 = link->l2;

    if (link->is_invalidation)
        invalidation_is_ready(l2);
    count_ready(l2);
}

static void distrust(struct l2_link *link)
{
    pthread_mutex_lock(&link->lock);
    link->is_tracked = false;
    atomic_fetch_add(&link->generation, 1);
    pthread_mutex_unlock(&link->lock);
}

void l2_link_is_lost(struct l2_link *link)
{
    struct l2 *l2 = link->l2;

    atomic_fetch_add(&l2->stats.n_reconnects, 1);
    if (!link->is_invalidation) {
        l2->config.link_lost(l2->config.owner, link->index);
        return;
    }
    if (!l2->was_lost)
        log_warning(0, "redis: the connection is lost: serving what is cached, connecting again");
    l2->was_lost = true;
    atomic_store(&l2->is_up, false);
    for (unsigned i = 0; i < l2->config.n_links; i++)
        distrust(&l2->links[i]);
    l2->config.all_lost(l2->config.owner);
}

void l2_refuse(struct l2 *l2, const char *why)
{
    pthread_mutex_lock(&l2->start_lock);
    /* a host may have several addresses: each gets its chance */
    bool is_last = ++l2->n_refusals >= l2->n_addresses;
    if (!l2->has_started && !l2->is_refused && is_last) {
        l2->is_refused = true;
        snprintf(l2->why, sizeof(l2->why), "%s", why);
        pthread_cond_broadcast(&l2->started);
    }
    pthread_mutex_unlock(&l2->start_lock);
}

/* ---- the I/O thread ---- */

static void handle_event(struct l2 *l2, const struct epoll_event *event)
{
    struct l2_link *link = event->data.ptr;

    if (!link) {
        uint64_t n;
        if (read(l2->wake_fd, &n, sizeof(n)) < 0)
            return;
        return;
    }
    if (link->state == LINK_DOWN)
        return;
    if (link->state == LINK_CONNECTING || (event->events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        link_input(link);
    if (link->state == LINK_READY && (event->events & EPOLLOUT))
        link_output(link);
}

static void *io_thread(void *arg)
{
    struct l2 *l2 = arg;
    struct epoll_event events[64];
    int tick_ms = (int)max_u64(5, min_u64(50, l2->config.timeout_ms / 8));
    uint64_t checked_at_ms = 0;

    while (!atomic_load(&l2->is_stopping)) {
        int n = epoll_wait(l2->epoll_fd, events, ARRAY_SIZE(events), tick_ms);
        for (int i = 0; i < n; i++)
            handle_event(l2, &events[i]);
        uint64_t now_ms = clock_now_ms();
        if (now_ms < checked_at_ms + 5)
            continue;
        checked_at_ms = now_ms;
        for (unsigned i = l2->config.n_links + 1; i-- > 0;) {
            struct l2_link *link = &l2->links[i];
            if (link->is_invalidation && link->state == LINK_DOWN)
                new_token(l2);
            link_check(link, now_ms);
        }
    }
    return NULL;
}

static int wait_for_links(struct l2 *l2, char *why, size_t why_size)
{
    char shown[256];
    struct timespec until;
    int r = 0;

    l2_address_show(&l2->config.address, shown, sizeof(shown));
    clock_gettime(CLOCK_REALTIME, &until);
    unsigned wait_ms = 3 * l2->config.timeout_ms + 500;
    until.tv_sec += wait_ms / 1000;
    until.tv_nsec += (long)(wait_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&l2->start_lock);
    while (!l2->has_started && !l2->is_refused && r == 0)
        r = pthread_cond_timedwait(&l2->started, &l2->start_lock, &until);
    bool has_started = l2->has_started;
    if (!has_started)
        snprintf(why, why_size, "redis at %s: %s", shown,
                 l2->is_refused ? l2->why : "no answer in time: is it running, and is timeout= long enough?");
    l2->has_started = true;
    pthread_mutex_unlock(&l2->start_lock);
    return has_started ? 0 : -ECONNREFUSED;
}

int l2_start(struct l2 *l2, char *why, size_t why_size)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};

    epoll_ctl(l2->epoll_fd, EPOLL_CTL_ADD, l2->wake_fd, &event);
    int r = pthread_create(&l2->thread, NULL, io_thread, l2);
    if (r) {
        snprintf(why, why_size, "cannot start a thread: %s", strerror(r));
        return -r;
    }
    l2->has_thread = true;
    r = wait_for_links(l2, why, why_size);
    if (r < 0)
        l2_stop(l2);
    return r;
}

void l2_stop(struct l2 *l2)
{
    uint64_t one = 1;

    if (l2->has_thread) {
        atomic_store(&l2->is_stopping, true);
        if (write(l2->wake_fd, &one, sizeof(one)) < 0)
            log_debug("redis: the I/O thread is awake already");
        pthread_join(l2->thread, NULL);
        l2->has_thread = false;
    }
    /* What fails may be sent again by its done(), until nobody does: then the links can go. */
    for (int round = 0; l2->invalidation && round < 2; round++)
        for (unsigned i = 0; i <= l2->config.n_links; i++)
            link_close(&l2->links[i]);
    for (unsigned i = 0; l2->invalidation && i <= l2->config.n_links; i++)
        link_deinit(&l2->links[i]);
    l2->invalidation = NULL;
}

/* ---- commands ---- */

unsigned l2_link_of(const struct l2 *l2, const char *key, size_t size)
{
    uint64_t hash = 0xcbf29ce484222325u;

    for (size_t i = 0; i < size; i++)
        hash = (hash ^ (unsigned char)key[i]) * 0x100000001b3u;
    return (unsigned)((hash ^ hash >> 32) % l2->config.n_links);
}

uint64_t l2_generation(const struct l2 *l2, unsigned link)
{
    return atomic_load(&l2->links[link].generation);
}

static struct l2_link *link_of(struct l2 *l2, const char *key, size_t size)
{
    return &l2->links[l2_link_of(l2, key, size)];
}

static void begin(struct l2 *l2, struct l2_op *op, enum op_kind kind, unsigned n_replies)
{
    op->kind = (uint8_t)kind;
    op->n_replies = (uint8_t)n_replies;
    op->result = 0;
    op->pttl_ms = -1;
    op->generation = 0;
    op->n_echo = 0;
    op->scan = NULL;
    op->is_streaming = op->is_broken = op->is_lost = false;
    atomic_fetch_add_explicit(&l2->stats.n_commands, n_replies, memory_order_relaxed);
}

void l2_read(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size, size_t size)
{
    struct l2_link *link = link_of(l2, key, key_size);

    begin(l2, op, OP_READ, 2);
    atomic_fetch_add_explicit(&l2->stats.n_reads, 1, memory_order_relaxed);
    struct queue *queue = link_lock_queue(link);
    if (size == L2_READ_ALL) {
        resp_command(&l2->pool, queue, 2);
        resp_text(&l2->pool, queue, "GET");
        resp_arg(&l2->pool, queue, key, key_size);
    } else {
        resp_command(&l2->pool, queue, 4);
        resp_text(&l2->pool, queue, "GETRANGE");
        resp_arg(&l2->pool, queue, key, key_size);
        resp_number(&l2->pool, queue, 0);
        resp_number(&l2->pool, queue, size - 1);
    }
    resp_command(&l2->pool, queue, 2);
    resp_text(&l2->pool, queue, "PTTL");
    resp_arg(&l2->pool, queue, key, key_size);
    link_submit_unlock(link, queue, op);
}

static void encode_echo(struct l2 *l2, struct queue *queue, const char *key, size_t key_size)
{
    resp_command(&l2->pool, queue, 4);
    resp_text(&l2->pool, queue, "GETRANGE");
    resp_arg(&l2->pool, queue, key, key_size);
    resp_text(&l2->pool, queue, "24");
    resp_text(&l2->pool, queue, "39");
}

void *l2_buffer_get(struct l2 *l2, size_t size)
{
    return chunk_get(&l2->pool, size)->data;
}

/*
 * A value is streamed into the link's queue if nobody else does that just now; otherwise it is collected in a queue of
 * its own (op->parts, op->parts_end) and joins the others at the end.
 */
static void set_parts(struct l2_op *op, const struct queue *queue)
{
    op->parts = queue->head;
    op->parts_end = queue->tail;
}

static struct queue own_queue(const struct l2_op *op)
{
    struct queue queue;

    queue_init(&queue);
    queue.head = op->parts;
    queue.tail = op->parts_end;
    return queue;
}

/* What SET needs after the value. */
static void encode_write_tail(struct l2 *l2, struct queue *queue, const struct queue *tail)
{
    for (const struct chunk *c = tail->head; c; c = c->next)
        resp_raw(&l2->pool, queue, c->data, c->size);
}

void l2_write_begin(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size, size_t total, uint64_t ttl_ms,
                    enum l2_condition condition)
{
    unsigned n_args = 3 + (condition != L2_ALWAYS) + (ttl_ms == L2_TTL_NONE ? 0 : ttl_ms == L2_TTL_KEEP ? 1 : 2);
    struct queue head, tail;

    begin(l2, op, OP_WRITE, 2);
    op->result = condition == L2_IF_ABSENT; /* reply.c: what nil means */
    atomic_fetch_add_explicit(&l2->stats.n_writes, 1, memory_order_relaxed);
    op->link = link_of(l2, key, key_size);

    queue_init(&head);
    resp_command(&l2->pool, &head, n_args);
    resp_text(&l2->pool, &head, "SET");
    resp_arg(&l2->pool, &head, key, key_size);
    resp_arg_header(&l2->pool, &head, total);

    queue_init(&tail);
    resp_raw(&l2->pool, &tail, "\r\n", 2);
    if (ttl_ms == L2_TTL_KEEP) {
        resp_text(&l2->pool, &tail, "KEEPTTL");
    } else if (ttl_ms != L2_TTL_NONE) {
        resp_text(&l2->pool, &tail, "PX");
        resp_number(&l2->pool, &tail, ttl_ms);
    }
    if (condition != L2_ALWAYS)
        resp_text(&l2->pool, &tail, condition == L2_IF_ABSENT ? "NX" : "XX");
    encode_echo(l2, &tail, key, key_size);
    op->scan = (void *)tail.head; /* kept until l2_write_end() */

    pthread_mutex_lock(&op->link->lock);
    if (op->link->stream || total < CHUNK_LARGE) {
        set_parts(op, &head);
    } else {
        op->is_streaming = true;
        op->link->stream = op;
        op->deadline_ms = UINT64_MAX;
        queue_splice(&op->link->main, &head);
        queue_append_op(&op->link->main, op);
    }
    pthread_mutex_unlock(&op->link->lock);
}

void l2_write_part(struct l2 *l2, struct l2_op *op, void *buffer, size_t size)
{
    struct chunk *chunk = CONTAINER_OF(buffer, struct chunk, data);
    struct l2_link *link = op->link;

    chunk->size = size;
    if (size == 0) {
        chunk_put(&l2->pool, chunk);
        return;
    }
    if (!op->is_streaming) {
        struct queue queue = own_queue(op);
        queue_append_chunk(&queue, chunk);
        set_parts(op, &queue);
        return;
    }
    pthread_mutex_lock(&link->lock);
    if (op->is_broken) {
        chunk_put(&l2->pool, chunk);
    } else {
        queue_append_chunk(&link->main, chunk);
        link_flush_locked(link);
    }
    pthread_mutex_unlock(&link->lock);
}

static void end_stream(struct l2 *l2, struct l2_op *op, const struct queue *tail)
{
    struct l2_link *link = op->link;

    pthread_mutex_lock(&link->lock);
    op->is_streaming = false;
    bool is_broken = op->is_broken;
    if (!is_broken) {
        link->stream = NULL;
        encode_write_tail(l2, &link->main, tail);
        op->deadline_ms = clock_now_ms() + l2->config.timeout_ms;
        queue_splice(&link->main, &link->parked);
        link_flush_locked(link);
    }
    pthread_mutex_unlock(&link->lock);
    if (is_broken) {
        op->result = -EIO;
        op->is_lost = true;
        op->done(op);
    }
}

void l2_write_end(struct l2 *l2, struct l2_op *op)
{
    struct queue tail = {.head = (struct chunk *)op->scan};
    struct chunk *spare = tail.head;

    op->scan = NULL;
    if (op->is_streaming) {
        end_stream(l2, op, &tail);
    } else {
        struct queue own = own_queue(op);
        encode_write_tail(l2, &own, &tail);
        struct l2_link *link = op->link;
        struct queue *queue = link_lock_queue(link);
        queue_splice(queue, &own);
        link_submit_unlock(link, queue, op);
    }
    while (spare) {
        struct chunk *next = spare->next;
        chunk_put(&l2->pool, spare);
        spare = next;
    }
}

void l2_remove(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size)
{
    struct l2_link *link = link_of(l2, key, key_size);

    begin(l2, op, OP_REMOVE, 1);
    struct queue *queue = link_lock_queue(link);
    resp_command(&l2->pool, queue, 2);
    resp_text(&l2->pool, queue, op->data ? "GETDEL" : "DEL");
    resp_arg(&l2->pool, queue, key, key_size);
    link_submit_unlock(link, queue, op);
}

static const char remove_script[] = "if redis.call('GETRANGE',KEYS[1],24,39)==ARGV[1] then "
                                    "return redis.call('DEL',KEYS[1]) end "
                                    "if redis.call('EXISTS',KEYS[1])==0 then return -1 end return 0";

void l2_remove_if(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size, const uint8_t version[16])
{
    struct l2_link *link = link_of(l2, key, key_size);

    begin(l2, op, OP_REMOVE_IF, 1);
    struct queue *queue = link_lock_queue(link);
    resp_command(&l2->pool, queue, 5);
    resp_text(&l2->pool, queue, "EVAL");
    resp_text(&l2->pool, queue, remove_script);
    resp_text(&l2->pool, queue, "1");
    resp_arg(&l2->pool, queue, key, key_size);
    resp_arg(&l2->pool, queue, version, 16);
    link_submit_unlock(link, queue, op);
}

void l2_expire(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size, uint64_t ttl_ms)
{
    struct l2_link *link = link_of(l2, key, key_size);

    begin(l2, op, OP_EXPIRE, 2);
    struct queue *queue = link_lock_queue(link);
    resp_command(&l2->pool, queue, ttl_ms == L2_TTL_NONE ? 2 : 3);
    resp_text(&l2->pool, queue, ttl_ms == L2_TTL_NONE ? "PERSIST" : "PEXPIRE");
    resp_arg(&l2->pool, queue, key, key_size);
    if (ttl_ms != L2_TTL_NONE)
        resp_number(&l2->pool, queue, ttl_ms);
    encode_echo(l2, queue, key, key_size);
    link_submit_unlock(link, queue, op);
}

/* ARGV: offset of the version, its end, version, offset of the byte, byte */
static const char patch_script[] = "if redis.call('GETRANGE',KEYS[1],24,39)==ARGV[1] then "
                                   "redis.call('SETRANGE',KEYS[1],ARGV[2],ARGV[3]) return 1 end return 0";

void l2_patch(struct l2 *l2, struct l2_op *op, const char *key, size_t key_size, const uint8_t version[16],
              size_t offset, uint8_t byte)
{
    struct l2_link *link = link_of(l2, key, key_size);

    begin(l2, op, OP_PATCH, 2);
    struct queue *queue = link_lock_queue(link);
    resp_command(&l2->pool, queue, 7);
    resp_text(&l2->pool, queue, "EVAL");
    resp_text(&l2->pool, queue, patch_script);
    resp_text(&l2->pool, queue, "1");
    resp_arg(&l2->pool, queue, key, key_size);
    resp_arg(&l2->pool, queue, version, 16);
    resp_number(&l2->pool, queue, offset);
    resp_arg(&l2->pool, queue, &byte, 1);
    encode_echo(l2, queue, key, key_size);
    link_submit_unlock(link, queue, op);
}

void l2_scan(struct l2 *l2, struct l2_op *op, uint64_t cursor, const char *pattern, unsigned count)
{
    struct l2_link *link = &l2->links[0];

    begin(l2, op, OP_SCAN, 1);
    struct queue *queue = link_lock_queue(link);
    resp_command(&l2->pool, queue, 6);
    resp_text(&l2->pool, queue, "SCAN");
    resp_number(&l2->pool, queue, cursor);
    resp_text(&l2->pool, queue, "MATCH");
    resp_text(&l2->pool, queue, pattern);
    resp_text(&l2->pool, queue, "COUNT");
    resp_number(&l2->pool, queue, count);
    link_submit_unlock(link, queue, op);
}

void l2_info(struct l2 *l2, struct l2_op *op)
{
    struct l2_link *link = &l2->links[0];

    begin(l2, op, OP_INFO, 1);
    struct queue *queue = link_lock_queue(link);
    resp_command(&l2->pool, queue, 2);
    resp_text(&l2->pool, queue, "INFO");
    resp_text(&l2->pool, queue, "memory");
    link_submit_unlock(link, queue, op);
}

const struct l2_stats *l2_stats(const struct l2 *l2)
{
    return &l2->stats;
}

bool l2_is_up(const struct l2 *l2)
{
    return atomic_load(&l2->is_up);
}
