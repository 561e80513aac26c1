/*
 * Steps of the operations on extended attributes: user.session.* (the table of "Time to live" in sessionfs(8)) and the
 * programs' own user.*, which are kept as a packed list of
 *   1 byte name size (without NUL), 4 bytes value size (little endian), name, value.
 */
#include "store/internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/xattr.h>

#include "base/units.h"

#define HEAD       5u
#define OURS       "user.session."
#define TTL_MAX_MS (10ull * 366 * 24 * 3600 * 1000) /* Redis would take more; ten years is no session any more */

/* ---- the packed list ---- */

struct item {
    size_t at, size; /* of the whole record */
    size_t name_size;
    const char *name, *value;
    size_t value_size;
};

static bool item_at(const struct session *session, size_t at, struct item *ret)
{
    uint32_t value_size;

    if (at + HEAD > session->xattrs_size)
        return false;
    const char *p = session->xattrs + at;
    memcpy(&value_size, p + 1, sizeof(value_size));
    *ret = (struct item){.at = at, .name_size = (unsigned char)*p, .value_size = le32toh(value_size)};
    ret->size = HEAD + ret->name_size + ret->value_size;
    ret->name = p + HEAD;
    ret->value = ret->name + ret->name_size;
    return at + ret->size <= session->xattrs_size;
}

static bool find_item(const struct session *session, const char *name, struct item *ret)
{
    size_t size = strlen(name);

    for (size_t at = 0; item_at(session, at, ret); at += ret->size)
        if (ret->name_size == size && memcmp(ret->name, name, size) == 0)
            return true;
    return false;
}

static void remove_item(struct session *session, const struct item *item)
{
    size_t end = item->at + item->size;

    memmove(session->xattrs + item->at, session->xattrs + end, session->xattrs_size - end);
    session->xattrs_size -= (uint32_t)item->size;
}

static int append_item(struct session *session, const char *name, const void *value, size_t value_size)
{
    size_t name_size = strlen(name), size = HEAD + name_size + value_size;
    uint32_t stored = htole32((uint32_t)value_size);

    if (session->xattrs_size + size > STORE_XATTRS_MAX)
        return -ENOSPC;
    char *list = realloc(session->xattrs, session->xattrs_size + size);
    if (!list)
        return -ENOMEM;
    session->xattrs = list;
    char *p = list + session->xattrs_size;
    *p = (char)name_size;
    memcpy(p + 1, &stored, sizeof(stored));
    memcpy(p + HEAD, name, name_size);
    if (value_size)
        memcpy(p + HEAD + name_size, value, value_size);
    session->xattrs_size += (uint32_t)size;
    return 0;
}

/* ---- reading ours ---- */

static uint64_t shown_ttl(const struct store *store, const struct session *session, uint64_t now_ms)
{
    if (session->self) {
        uint64_t ttl_ms = session->ttl_ms;
        return ttl_ms == SEAL_TTL_INHERIT ? store->config.ttl_ms : ttl_ms;
    }
    return session->deadline_ms > now_ms ? session->deadline_ms - now_ms : 0;
}

static int show_ttl(const struct store *store, const struct session *session, char *out, size_t size)
{
    uint64_t ttl_ms = shown_ttl(store, session, clock_now_ms());
    bool never = session->self ? ttl_ms == 0 : session->deadline_ms == 0;

    return never ? snprintf(out, size, "none") : snprintf(out, size, "%llu", (unsigned long long)(ttl_ms + 999) / 1000);
}

static int show_expires(const struct store *store, const struct session *session, char *out, size_t size)
{
    uint64_t ttl_ms = shown_ttl(store, session, clock_now_ms());
    char text[32];

    if (session->self)
        return -ENODATA;
    if (!session->deadline_ms)
        return snprintf(out, size, "none");
    units_format_rfc3339(clock_wall_ns() + (int64_t)ttl_ms * 1000000, text);
    return snprintf(out, size, "%s", text);
}

static int show_policy(const struct store *store, const struct session *session, char *out, size_t size)
{
    return snprintf(out, size, "%s", session->policy == SEAL_POLICY_FIXED ? "fixed" : "sliding");
}

static int show_version(const struct store *store, const struct session *session, char *out, size_t size)
{
    return snprintf(out, size, "%llu-%016llx", (unsigned long long)session->version.seq,
                    (unsigned long long)session->version.unique);
}

static int show_tier(const struct store *store, const struct session *session, char *out, size_t size)
{
    return snprintf(out, size, "%s", session->content || session->size == 0 ? "l1" : "l2");
}

static int show_created(const struct store *store, const struct session *session, char *out, size_t size)
{
    char text[32];

    units_format_rfc3339(session->created_ns, text);
    return snprintf(out, size, "%s", text);
}

/* ---- writing ours ---- */

static bool is_word(const void *value, size_t size, const char *word)
{
    return size == strlen(word) && memcmp(value, word, size) == 0;
}

static int set_ttl_ms(struct session *session, uint64_t ttl_ms)
{
    session->ttl_ms = ttl_ms;
    if (session->self)
        atomic_store(&session->self->ttl_ms, ttl_ms);
    else
        session->deadline_ms = ttl_ms ? clock_now_ms() + ttl_ms : 0;
    return 0;
}

static int set_ttl(struct store *store, struct session *session, const char *value, size_t size)
{
    uint64_t ttl_ms = 0;

    if (is_word(value, size, "none"))
        return set_ttl_ms(session, 0);
    if (units_parse_ms(value, size, &ttl_ms) < 0 || ttl_ms == 0 || ttl_ms > TTL_MAX_MS)
        return -EINVAL;
    return set_ttl_ms(session, ttl_ms);
}

static int set_expires(struct store *store, struct session *session, const char *value, size_t size)
{
    int64_t at_ns = 0, now_ns = clock_wall_ns();

    if (session->self)
        return -EINVAL;
    if (is_word(value, size, "none"))
        return set_ttl_ms(session, 0);
    if (units_parse_rfc3339(value, size, &at_ns) < 0 || at_ns <= now_ns ||
        (uint64_t)(at_ns - now_ns) / 1000000 > TTL_MAX_MS)
        return -EINVAL;
    return set_ttl_ms(session, max_u64(1, (uint64_t)(at_ns - now_ns) / 1000000));
}

static int set_policy(struct store *store, struct session *session, const char *value, size_t size)
{
    if (is_word(value, size, "fixed"))
        session->policy = SEAL_POLICY_FIXED;
    else if (is_word(value, size, "sliding"))
        session->policy = SEAL_POLICY_SLIDING;
    else
        return -EINVAL;
    if (session->self)
        atomic_store(&session->self->policy, session->policy);
    return 0;
}

static const struct ours {
    const char *name;
    int (*show)(const struct store *, const struct session *, char *, size_t); /* size, or -errno */
    int (*set)(struct store *, struct session *, const char *, size_t);        /* NULL: read only */
} ours[] = {
    {OURS "ttl", show_ttl, set_ttl},          {OURS "expires", show_expires, set_expires},
    {OURS "policy", show_policy, set_policy}, {OURS "version", show_version, NULL},
    {OURS "tier", show_tier, NULL},           {OURS "created", show_created, NULL},
};

static const struct ours *find_ours(const char *name)
{
    for (size_t i = 0; i < ARRAY_SIZE(ours); i++)
        if (strcmp(ours[i].name, name) == 0)
            return &ours[i];
    return NULL;
}

static bool is_user(const char *name)
{
    return strncmp(name, "user.", 5) == 0 && name[5];
}

static bool is_reserved(const char *name)
{
    return strncmp(name, OURS, strlen(OURS)) == 0;
}

/* ---- steps ---- */

/* A result of @size bytes which the caller reads until store_done_with(). */
static int give(struct store_op *op, const void *bytes, size_t size)
{
    op->lent = malloc(size + 1);
    if (!op->lent)
        return -ENOMEM;
    if (size)
        memcpy(op->lent, bytes, size);
    op->bytes = op->lent;
    op->n_bytes = size;
    return 0;
}

static int get_locked(struct store_op *op, struct session *session)
{
    const struct ours *our = find_ours(op->name);
    struct item item;
    char text[96];

    if (our) {
        int n = our->show(op->store, session, text, sizeof(text));
        return n < 0 ? n : give(op, text, (size_t)n);
    }
    return find_item(session, op->name, &item) ? give(op, item.value, item.value_size) : -ENODATA;
}

int step_getxattr(struct store_op *op)
{
    struct session *session = op->session;

    /* security.capability and its like: asked for by the kernel itself, never kept here. */
    if (!is_user(op->name))
        return strncmp(op->name, "system.", 7) == 0 ? -EOPNOTSUPP : -ENODATA;
    pthread_mutex_lock(&session->lock);
    int r = op_need_attr_locked(op, session);
    if (r == 0)
        r = get_locked(op, session);
    session_unlock(session);
    return r;
}

int step_listxattr(struct store_op *op)
{
    struct session *session = op->session;
    char names[ARRAY_SIZE(ours) * 32];
    size_t n = 0;
    struct item item;

    for (size_t i = 0; i < ARRAY_SIZE(ours); i++)
        n += (size_t)snprintf(names + n, sizeof(names) - n, "%s", ours[i].name) + 1;
    pthread_mutex_lock(&session->lock);
    int r = op_need_attr_locked(op, session);
    if (r == 0) {
        op->lent = malloc(n + session->xattrs_size + 1);
        r = op->lent ? 0 : -ENOMEM;
    }
    if (r == 0) {
        char *out = op->lent;
        memcpy(out, names, n);
        for (size_t at = 0; item_at(session, at, &item); at += item.size) {
            memcpy(out + n, item.name, item.name_size);
            n += item.name_size;
            out[n++] = 0;
        }
        op->bytes = out;
        op->n_bytes = n;
    }
    session_unlock(session);
    return r;
}

static int set_own(struct store_op *op, struct session *session)
{
    struct item item;
    bool is_there = find_item(session, op->name, &item);

    if (is_there && (op->xattr_flags & XATTR_CREATE))
        return -EEXIST;
    if (!is_there && (op->xattr_flags & XATTR_REPLACE))
        return -ENODATA;
    size_t freed = is_there ? item.size : 0;
    if (session->xattrs_size - freed + HEAD + strlen(op->name) + op->size > STORE_XATTRS_MAX)
        return -ENOSPC;
    if (is_there)
        remove_item(session, &item);
    return append_item(session, op->name, op->data, op->size);
}

static int change_locked(struct store_op *op, struct session *session)
{
    const struct ours *our = find_ours(op->name);

    if (our && !our->set)
        return -EPERM;
    if (!our && is_reserved(op->name))
        return -EINVAL;
    if (our && (op->xattr_flags & XATTR_CREATE))
        return -EEXIST;
    return our ? our->set(op->store, session, op->data, op->size) : set_own(op, session);
}

static int remove_locked(struct store_op *op, struct session *session)
{
    struct item item;

    if (is_reserved(op->name)) {
        if (strcmp(op->name, OURS "ttl") != 0)
            return -EPERM;
        if (session->self)
            return set_ttl_ms(session, SEAL_TTL_INHERIT);
        uint64_t ttl_ms = atomic_load(&session->dir->ttl_ms);
        return set_ttl_ms(session, ttl_ms == SEAL_TTL_INHERIT ? op->store->config.ttl_ms : ttl_ms);
    }
    if (!find_item(session, op->name, &item))
        return -ENODATA;
    remove_item(session, &item);
    return 0;
}

static int change(struct store_op *op, int (*apply)(struct store_op *, struct session *))
{
    struct session *session = op->session;

    if (!is_user(op->name))
        return -EOPNOTSUPP;
    pthread_mutex_lock(&session->lock);
    int r = op->is_applied ? op_need_saved_locked(op, session) : op_need_attr_locked(op, session);
    if (r == 0 && !op->is_applied) {
        r = apply(op, session);
        if (r == 0) {
            session->ctime_ns = clock_wall_ns();
            if (!(session->flags & S_GONE)) {
                session_set_dirty_locked(op->store, session);
                r = session->flags & S_CONTENT_DIRTY ? 0 : op_save_now_locked(op, session);
            }
        }
    }
    session_unlock(session);
    return r;
}

int step_setxattr(struct store_op *op)
{
    return change(op, change_locked);
}

int step_removexattr(struct store_op *op)
{
    return change(op, remove_locked);
}
