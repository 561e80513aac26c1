#include "l2/internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/macros.h"

#define SPARE_MAX 24u

void chunk_pool_init(struct chunk_pool *pool)
{
    *pool = (struct chunk_pool){.lock = PTHREAD_MUTEX_INITIALIZER};
}

static void free_list(struct chunk *chunk)
{
    while (chunk) {
        struct chunk *next = chunk->next;
        free(chunk);
        chunk = next;
    }
}

void chunk_pool_deinit(struct chunk_pool *pool)
{
    free_list(pool->small);
    free_list(pool->large);
    pthread_mutex_destroy(&pool->lock);
}

static struct chunk *take_spare(struct chunk_pool *pool, struct chunk **list, unsigned *n)
{
    pthread_mutex_lock(&pool->lock);
    struct chunk *chunk = *list;
    if (chunk) {
        *list = chunk->next;
        (*n)--;
    }
    pthread_mutex_unlock(&pool->lock);
    return chunk;
}

/* Out of memory for a few kilobytes of output: there is no sensible way on, and L2 has all that was acknowledged. */
static void *must_malloc(size_t size)
{
    void *p = malloc(size);
    if (!p)
        abort();
    return p;
}

struct chunk *chunk_get(struct chunk_pool *pool, size_t room)
{
    struct chunk *chunk = NULL;

    if (room <= CHUNK_SMALL) {
        room = CHUNK_SMALL;
        chunk = take_spare(pool, &pool->small, &pool->n_small);
    } else if (room <= CHUNK_LARGE) {
        room = CHUNK_LARGE;
        chunk = take_spare(pool, &pool->large, &pool->n_large);
    }
    if (!chunk)
        chunk = must_malloc(sizeof(*chunk) + room);
    *chunk = (struct chunk){.room = room};
    return chunk;
}

void chunk_put(struct chunk_pool *pool, struct chunk *chunk)
{
    bool is_small = chunk->room == CHUNK_SMALL, is_large = chunk->room == CHUNK_LARGE;
    struct chunk **list = is_small ? &pool->small : &pool->large;
    unsigned *n = is_small ? &pool->n_small : &pool->n_large;

    pthread_mutex_lock(&pool->lock);
    if ((is_small || is_large) && *n < SPARE_MAX) {
        chunk->next = *list;
        *list = chunk;
        (*n)++;
        chunk = NULL;
    }
    pthread_mutex_unlock(&pool->lock);
    free(chunk);
}

void queue_init(struct queue *queue)
{
    *queue = (struct queue){0};
    queue->ops_end = &queue->ops;
}

void queue_append_chunk(struct queue *queue, struct chunk *chunk)
{
    chunk->next = NULL;
    if (queue->tail)
        queue->tail->next = chunk;
    else
        queue->head = chunk;
    queue->tail = chunk;
}

void queue_append_op(struct queue *queue, struct l2_op *op)
{
    op->next = NULL;
    *queue->ops_end = op;
    queue->ops_end = &op->next;
}

void queue_splice(struct queue *queue, struct queue *more)
{
    if (more->head) {
        if (queue->tail)
            queue->tail->next = more->head;
        else
            queue->head = more->head;
        queue->tail = more->tail;
    }
    if (more->ops) {
        *queue->ops_end = more->ops;
        queue->ops_end = more->ops_end;
    }
    queue_init(more);
}

void resp_raw(struct chunk_pool *pool, struct queue *queue, const void *bytes, size_t size)
{
    const unsigned char *from = bytes;

    while (size) {
        struct chunk *tail = queue->tail;
        if (!tail || tail->size == tail->room) {
            tail = chunk_get(pool, CHUNK_SMALL);
            queue_append_chunk(queue, tail);
        }
        size_t n = min_u64(size, tail->room - tail->size);
        memcpy(tail->data + tail->size, from, n);
        tail->size += n;
        from += n;
        size -= n;
    }
}

static void header(struct chunk_pool *pool, struct queue *queue, char type, size_t number)
{
    char text[32];
    char *end = text + sizeof(text), *p = end;

    *--p = '\n';
    *--p = '\r';
    do
        *--p = (char)('0' + number % 10);
    while (number /= 10);
    *--p = type;
    resp_raw(pool, queue, p, (size_t)(end - p));
}

void resp_command(struct chunk_pool *pool, struct queue *queue, unsigned n_args)
{
    header(pool, queue, '*', n_args);
}

void resp_arg_header(struct chunk_pool *pool, struct queue *queue, size_t size)
{
    header(pool, queue, '$', size);
}

void resp_arg(struct chunk_pool *pool, struct queue *queue, const void *arg, size_t size)
{
    resp_arg_header(pool, queue, size);
    resp_raw(pool, queue, arg, size);
    resp_raw(pool, queue, "\r\n", 2);
}

void resp_text(struct chunk_pool *pool, struct queue *queue, const char *arg)
{
    resp_arg(pool, queue, arg, strlen(arg));
}

void resp_number(struct chunk_pool *pool, struct queue *queue, uint64_t number)
{
    char text[24];
    int size = snprintf(text, sizeof(text), "%llu", (unsigned long long)number);

    resp_arg(pool, queue, text, (size_t)size);
}
