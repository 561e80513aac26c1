/* What each command makes of its replies. */
#include "l2/internal.h"

#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "base/macros.h"

static bool starts_with(const char *text, const char *word)
{
    return strncmp(text, word, strlen(word)) == 0;
}

int reply_errno(const char *error)
{
    static const struct {
        const char *word;
        int error;
    } table[] = {
        {"OOM", -ENOSPC}, {"NOAUTH", -EACCES}, {"NOPERM", -EACCES}, {"WRONGPASS", -EACCES}, {"WRONGTYPE", -EBADMSG},
    };

    for (size_t i = 0; i < ARRAY_SIZE(table); i++)
        if (starts_with(error, table[i].word))
            return table[i].error;
    return -EIO;
}

/* An absent key's GETRANGE is the empty string: no blob is empty. */
static void take_value(struct l2_op *op, const redisReply *reply)
{
    if (reply->type == REDIS_REPLY_NIL || (reply->type == REDIS_REPLY_STRING && reply->len == 0)) {
        op->result = -ENOENT;
        return;
    }
    if (reply->type != REDIS_REPLY_STRING) {
        op->result = -EIO;
        return;
    }
    if (op->data)
        op->data(op, reply->str, reply->len, reply->len);
}

static void take_echo(struct l2_op *op, const redisReply *reply)
{
    if (reply->type != REDIS_REPLY_STRING || reply->len > sizeof(op->echo))
        return;
    op->n_echo = (unsigned)reply->len;
    memcpy(op->echo, reply->str, reply->len);
}

static bool scan_is_valid(const redisReply *reply)
{
    return reply->elements == 2 && reply->element[0]->type == REDIS_REPLY_STRING &&
           reply->element[1]->type == REDIS_REPLY_ARRAY;
}

/* Calls done() itself, while the keys live. */
static void take_scan(struct l2_op *op, const redisReply *reply)
{
    const redisReply *list = reply->element[1];
    CLEANUP(freep) const char **keys = calloc(list->elements + 1, sizeof(*keys));
    CLEANUP(freep) size_t *sizes = calloc(list->elements + 1, sizeof(*sizes));
    if (!keys || !sizes) {
        op->result = -ENOMEM;
        op->done(op);
        return;
    }
    for (size_t i = 0; i < list->elements; i++) {
        keys[i] = list->element[i]->str;
        sizes[i] = list->element[i]->len;
    }
    struct l2_scan_result result = {
        .cursor = strtoull(reply->element[0]->str, NULL, 10),
        .n_keys = list->elements,
        .keys = keys,
        .key_sizes = sizes,
    };
    op->scan = &result;
    op->done(op);
}

bool reply_wants_bulk(const struct l2_op *op)
{
    return op->data && ((op->kind == OP_READ && op->n_replies == 2) || op->kind == OP_REMOVE);
}

static void take_first(struct l2_op *op, const redisReply *reply)
{
    switch ((enum op_kind)op->kind) {
    case OP_READ:
    case OP_INFO:
        take_value(op, reply);
        return;
    case OP_WRITE:
        if (reply->type == REDIS_REPLY_NIL)
            op->result = op->result == 1 ? -EEXIST : -ENOENT; /* 1: was asked with NX */
        else
            op->result = reply->type == REDIS_REPLY_STATUS ? 0 : -EIO;
        return;
    case OP_REMOVE:
        if (op->data)
            take_value(op, reply);
        else if (reply->type != REDIS_REPLY_INTEGER)
            op->result = -EIO;
        else if (reply->integer == 0)
            op->result = -ENOENT;
        return;
    case OP_REMOVE_IF:
        if (reply->type != REDIS_REPLY_INTEGER)
            op->result = -EIO;
        else if (reply->integer <= 0)
            op->result = reply->integer < 0 ? -ENOENT : -EEXIST;
        return;
    case OP_EXPIRE:
        /* PERSIST says 0 as well for a key without expiry; the echo tells whether the key is there. */
    case OP_PATCH:
        if (reply->type != REDIS_REPLY_INTEGER)
            op->result = -EIO;
        else if (op->kind == OP_PATCH && reply->integer == 0)
            op->result = -ENOENT;
        return;
    case OP_SCAN:
        op->result = -EIO;
        return;
    case OP_PING:
    case OP_REARM:
        return;
    }
}

static void take_second(struct l2_op *op, const redisReply *reply)
{
    if (op->kind == OP_READ) {
        op->pttl_ms = reply->type == REDIS_REPLY_INTEGER ? reply->integer : -1;
        if (op->pttl_ms == -2 && op->result == 0)
            op->result = -ENOENT;
        return;
    }
    take_echo(op, reply);
    if (op->kind == OP_EXPIRE && op->result == 0 && op->n_echo == 0)
        op->result = -ENOENT;
}

bool reply_take(struct l2_op *op, const redisReply *reply)
{
    bool is_first = op->n_replies == 2 || op->kind == OP_REMOVE || op->kind == OP_REMOVE_IF || op->kind == OP_SCAN ||
                    op->kind == OP_INFO || op->kind == OP_PING;

    if (!reply) {
        /* the value was delivered piece by piece */
    } else if (reply->type == REDIS_REPLY_ERROR) {
        if (op->result >= 0)
            op->result = reply_errno(reply->str);
        if (op->result == -EACCES || op->result == -ENOSPC)
            log_error(0, "redis: refused a command: %.*s", (int)min_u64(reply->len, 120), reply->str);
        else
            log_debug("redis: error reply: %.*s", (int)min_u64(reply->len, 120), reply->str);
        atomic_fetch_add(&op->link->l2->stats.n_errors, 1);
    } else if (is_first) {
        if (op->kind == OP_SCAN && reply->type == REDIS_REPLY_ARRAY && scan_is_valid(reply)) {
            take_scan(op, reply);
            return true;
        }
        take_first(op, reply);
    } else {
        take_second(op, reply);
    }
    op->n_replies--;
    return false;
}
