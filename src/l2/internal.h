/*
 * What the files of l2 share: output chunks, the queue of commands, one link.
 *
 * Locks: link->lock guards the queue and the socket of a link; pool->lock the spare buffers. link->lock first. Neither
 * is held while a callback of l2_op or l2_config runs. Reading, connecting and the handshake belong to the I/O thread
 * alone.
 */
#ifndef SESSIONFS_L2_INTERNAL_H
#define SESSIONFS_L2_INTERNAL_H

#include <hiredis/hiredis.h>
#include <pthread.h>

#include <sessionfs/l2.h>

#define CHUNK_SMALL 16384u
#define CHUNK_LARGE (256u * 1024u + 4096u)
#define TOKEN_SIZE  32
#define INPUT_SIZE  (256u * 1024u)

/* A piece of output. */
struct chunk {
    struct chunk *next;
    size_t size, room, sent;
    unsigned char data[];
};

/* Spare chunks, so that a save does not pay for fresh pages each time. */
struct chunk_pool {
    pthread_mutex_t lock;
    struct chunk *small, *large;
    unsigned n_small, n_large;
};
void chunk_pool_init(struct chunk_pool *pool);
void chunk_pool_deinit(struct chunk_pool *pool);
struct chunk *chunk_get(struct chunk_pool *pool, size_t room);
void chunk_put(struct chunk_pool *pool, struct chunk *chunk);

/* Output bytes and the commands that wait for replies, both in order. */
struct queue {
    struct chunk *head, *tail;
    struct l2_op *ops, **ops_end;
};
void queue_init(struct queue *queue);
void queue_append_chunk(struct queue *queue, struct chunk *chunk);
void queue_append_op(struct queue *queue, struct l2_op *op);
void queue_splice(struct queue *queue, struct queue *more); /* @more is empty afterwards */

/* Commands are encoded by hand: hiredis' formatter allocates for each and would copy the blob. */
void resp_command(struct chunk_pool *pool, struct queue *queue, unsigned n_args);
void resp_arg(struct chunk_pool *pool, struct queue *queue, const void *arg, size_t size);
void resp_text(struct chunk_pool *pool, struct queue *queue, const char *arg);
void resp_number(struct chunk_pool *pool, struct queue *queue, uint64_t number);
void resp_arg_header(struct chunk_pool *pool, struct queue *queue, size_t size); /* the bytes follow, then resp_end */
void resp_raw(struct chunk_pool *pool, struct queue *queue, const void *bytes, size_t size);

enum op_kind { OP_READ, OP_WRITE, OP_REMOVE, OP_REMOVE_IF, OP_EXPIRE, OP_PATCH, OP_SCAN, OP_INFO, OP_PING, OP_REARM };

enum link_state { LINK_DOWN, LINK_CONNECTING, LINK_HELLO, LINK_READY };

struct l2_link {
    struct l2 *l2;
    unsigned index;
    bool is_invalidation;
    _Atomic uint64_t generation; /* counted up when what it tracked is forgotten; from 1 */

    /* I/O thread */
    redisReader *reader;
    uint64_t retry_at_ms, heard_at_ms, state_until_ms;
    unsigned backoff_ms, n_attempts, hello_step, rearm_step;
    uint64_t hello_redirect; /* which invalidation link the handshake named */
    struct l2_op *bulk_op;   /* a large value is arriving for it, bulk_left bytes and CRLF to come */
    size_t bulk_left, bulk_total;
    unsigned crlf_left;
    struct l2_op ping, rearm;
    bool is_pinging, is_rearming;
    _Atomic uint64_t sent_at_ms; /* the socket took something: a long value on a slow line is no dead peer */

    pthread_mutex_t lock;
    /* guarded by lock */
    enum link_state state;
    int fd;
    bool wants_out, is_tracked;
    struct queue main, parked; /* parked: what came while another thread streams a value into main */
    struct l2_op *stream;
};

struct l2 {
    struct l2_config config;
    struct l2_stats stats;
    struct chunk_pool pool;
    struct l2_link *links; /* n_links data links, then the invalidation link */
    struct l2_link *invalidation;
    _Atomic bool is_up, is_stopping;
    int epoll_fd, wake_fd;
    pthread_t thread;
    bool has_thread;
    char *input; /* I/O thread: what recv() gives */

    /* I/O thread */
    unsigned n_addresses;   /* of the host, when it was last looked up; 0 before */
    unsigned address_no;    /* the one that answered last */
    char token[TOKEN_SIZE]; /* the invalidation link's client name, new with each connection */
    uint64_t redirect_id;
    bool was_lost;

    pthread_mutex_t start_lock;
    pthread_cond_t started;
    /* guarded by start_lock */
    unsigned n_ready, n_refusals;
    bool has_started, is_refused;
    char why[256];
};

void link_init(struct l2_link *link, struct l2 *l2, unsigned index, bool is_invalidation);
void link_close(struct l2_link *link); /* after the I/O thread has ended: fail what is in flight */
void link_deinit(struct l2_link *link);

/* On the I/O thread. */
void link_connect(struct l2_link *link, uint64_t now_ms);
void link_input(struct l2_link *link);
void link_output(struct l2_link *link);
void link_check(struct l2_link *link, uint64_t now_ms); /* deadlines, pings, reconnection */
void link_break(struct l2_link *link, const char *reason);
void link_rearm(struct l2_link *link); /* report to the new invalidation link from now on */

/* On any thread. */
struct queue *link_lock_queue(struct l2_link *link);
void link_submit_unlock(struct l2_link *link, struct queue *queue, struct l2_op *op);
void link_flush_locked(struct l2_link *link);

/* Replies (reply.c): on the I/O thread. */
bool reply_wants_bulk(const struct l2_op *op);
/* One reply of @op; NULL for a value that was delivered piece by piece. True: it was the last and done() was called. */
bool reply_take(struct l2_op *op, const redisReply *reply);
int reply_errno(const char *error);

/* link -> l2 */
void l2_link_is_ready(struct l2_link *link);
void l2_link_is_lost(struct l2_link *link);
void l2_refuse(struct l2 *l2, const char *why);

#endif
