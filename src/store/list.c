/*
 * Listing a directory: SCAN gives the keys of one batch, pipelined prefix reads give names and attributes. What was
 * seen keeps its place in the list, so a reader may go back; SCAN's repetitions are left out.
 */
#include "store/internal.h"

#include <stdio.h>
#include <stdlib.h>

#define BATCH 1000u

struct entry {
    uint64_t ino;
    uint32_t mode;
    uint32_t name_at;
    uint16_t name_size;
};

struct store_list {
    struct dir *dir;
    /* changed by the I/O thread while a STORE_LIST runs, read by its caller between them */
    struct entry *entries;
    size_t n_entries, room;
    char *names;
    size_t n_names, names_room;
    uint64_t *seen; /* open addressing, 0 empty: first half of the name's hash */
    size_t n_seen, seen_room;
    uint64_t cursor;
    bool has_started, is_over;

    pthread_mutex_t lock;
    unsigned n_pending; /* prefix reads in flight, and the scan itself */
    int error;
    struct store_op *op;
    struct l2_op scan;
    char pattern[L2_KEY_MAX];
};

struct list_read {
    struct l2_op op;
    struct store_list *list;
    struct store *store;
    char key[L2_KEY_MAX];
    size_t key_size, wanted;
    uint32_t invalid_no; /* of its key, when it was sent */
    unsigned char *blob;
    size_t n_blob;
    unsigned n_tries;
};

struct store_list *store_list_new(struct session *dir)
{
    struct store_list *list = calloc(1, sizeof(*list));

    if (!list)
        return NULL;
    pthread_mutex_init(&list->lock, NULL);
    list->dir = session_inside(dir);
    return list;
}

void store_list_free(struct store *store, struct store_list *list)
{
    if (!list)
        return;
    pthread_mutex_destroy(&list->lock);
    free(list->entries);
    if (list->names)
        explicit_bzero(list->names, list->n_names);
    free(list->names);
    free(list->seen);
    free(list);
}

int store_list_at(struct store_list *list, uint64_t position, struct store_entry *ret)
{
    if (position >= list->n_entries)
        return list->is_over ? -1 : 0;
    const struct entry *entry = &list->entries[position];
    *ret = (struct store_entry){
        .name = list->names + entry->name_at,
        .name_size = entry->name_size,
        .mode = entry->mode,
        .ino = entry->ino,
    };
    return 1;
}

/* ---- what was seen (list->lock) ---- */

static void put_seen(uint64_t *table, size_t room, uint64_t hash)
{
    size_t at = hash & (room - 1);

    while (table[at])
        at = (at + 1) & (room - 1);
    table[at] = hash;
}

static int grow_seen(struct store_list *list)
{
    size_t room = list->seen_room ? list->seen_room * 2 : 1024;
    uint64_t *table = calloc(room, sizeof(*table));

    if (!table)
        return -ENOMEM;
    for (size_t i = 0; i < list->seen_room; i++)
        if (list->seen[i])
            put_seen(table, room, list->seen[i]);
    free(list->seen);
    list->seen = table;
    list->seen_room = room;
    return 0;
}

/* True if it is new. */
static bool see(struct store_list *list, const char *key, size_t key_size)
{
    uint8_t id[SEAL_ID_BYTES];
    uint64_t hash;

    if (key_size < SEAL_ID_TEXT || seal_id_parse(key + key_size - SEAL_ID_TEXT, id) < 0)
        return false;
    memcpy(&hash, id, sizeof(hash));
    hash |= 1;
    if (2 * (list->n_seen + 1) > list->seen_room && grow_seen(list) < 0)
        return false;
    for (size_t at = hash & (list->seen_room - 1); list->seen[at]; at = (at + 1) & (list->seen_room - 1))
        if (list->seen[at] == hash)
            return false;
    put_seen(list->seen, list->seen_room, hash);
    list->n_seen++;
    return true;
}

static int add_entry(struct store_list *list, const struct seal_meta *meta)
{
    if (list->n_entries == list->room) {
        size_t room = list->room ? list->room * 2 : 256;
        struct entry *entries = realloc(list->entries, room * sizeof(*entries));
        if (!entries)
            return -ENOMEM;
        list->entries = entries;
        list->room = room;
    }
    if (list->n_names + meta->name_size > list->names_room) {
        size_t room = list->names_room ? list->names_room * 2 : 8192;
        char *names = realloc(list->names, room);
        if (!names)
            return -ENOMEM;
        list->names = names;
        list->names_room = room;
    }
    memcpy(list->names + list->n_names, meta->name, meta->name_size);
    list->entries[list->n_entries++] = (struct entry){
        .ino = meta->ino,
        .mode = meta->mode,
        .name_at = (uint32_t)list->n_names,
        .name_size = meta->name_size,
    };
    list->n_names += meta->name_size;
    return 0;
}

/* ---- reading ---- */

static void scan_more(struct store_list *list, struct store *store);

/* One of the pending is over. With the last one the operation ends, or goes on if nothing was found. */
static void one_less(struct store_list *list, struct store *store)
{
    pthread_mutex_lock(&list->lock);
    bool is_last = --list->n_pending == 0;
    struct store_op *op = list->op;
    bool goes_on = is_last && list->error == 0 && !list->is_over && list->n_entries == op->offset;
    pthread_mutex_unlock(&list->lock);
    if (goes_on)
        scan_more(list, store);
    else if (is_last)
        op_run(op);
}

static void on_data(struct l2_op *op, const void *bytes, size_t size, size_t total)
{
    struct list_read *read = CONTAINER_OF(op, struct list_read, op);
    unsigned char *blob = realloc(read->blob, read->n_blob + size);

    if (!blob)
        abort();
    read->blob = blob;
    memcpy(blob + read->n_blob, bytes, size);
    read->n_blob += size;
}

/* The session as it is listed becomes known here, if it is not better known already. */
static void learn(struct list_read *read, const struct seal_head *head, const struct seal_meta *meta)
{
    struct store *store = read->store;
    struct session *session = session_get(store, read->list->dir, meta->name, meta->name_size);

    if (!session)
        return;
    pthread_mutex_lock(&session->lock);
    bool is_free = !(session->flags & (S_IS_KNOWN | S_GONE | S_BUSY)) && !session->fetch && !session->commit &&
                   head->state == SEAL_STATE_FINISHED;
    if (is_free) {
        session_adopt_meta_locked(store, session, meta);
        session->size = head->content_size;
        session->version = head->version;
        /* a report of a change since would have found no session to tell */
        session->generation = read->invalid_no == atomic_load(store_invalid_no(store, read->key, read->key_size))
                                  ? read->op.generation
                                  : 0;
        session_set_deadline_locked(store, session, read->op.pttl_ms < 0 ? 0 : max_u64(1, (uint64_t)read->op.pttl_ms));
    }
    pthread_mutex_unlock(&session->lock);
    session_unpin(store, session);
}

/* True: more of it is needed, and asked for. */
static bool take_entry(struct list_read *read)
{
    struct store_list *list = read->list;
    struct seal_head head;
    struct seal_meta meta;

    if (read->op.is_lost && ++read->n_tries < 3) {
        read->n_blob = 0;
        l2_read(read->store->l2, &read->op, read->key, read->key_size, read->wanted);
        return true;
    }
    if (read->op.result < 0) {
        if (read->op.result == -EIO)
            list->error = -EIO;
        return false;
    }
    if (seal_head(read->blob, read->n_blob, &head) < 0)
        return false;
    size_t needed = seal_blob_offset(&head);
    if (read->n_blob < needed && read->wanted < needed) {
        read->wanted = needed;
        read->n_blob = 0;
        l2_read(read->store->l2, &read->op, read->key, read->key_size, needed);
        return true;
    }
    unsigned char *plain = malloc(head.meta_size + 1);
    if (!plain)
        abort();
    if (seal_open_meta(read->store->keys, read->key, read->key_size, read->blob, read->n_blob, plain, &meta) == 0) {
        pthread_mutex_lock(&list->lock);
        if (add_entry(list, &meta) < 0)
            list->error = -ENOMEM;
        pthread_mutex_unlock(&list->lock);
        if (read->list->op->is_cached)
            learn(read, &head, &meta);
    } else {
        atomic_fetch_add(&read->store->n_bad, 1);
    }
    explicit_bzero(plain, head.meta_size);
    free(plain);
    return false;
}

static void on_read(struct l2_op *op)
{
    struct list_read *read = CONTAINER_OF(op, struct list_read, op);
    struct store_list *list = read->list;
    struct store *store = read->store;

    if (take_entry(read))
        return;
    free(read->blob);
    free(read);
    one_less(list, store);
}

static void read_entry(struct store_list *list, struct store *store, const char *key, size_t size)
{
    struct list_read *read = calloc(1, sizeof(*read));

    if (!read)
        abort();
    read->op = (struct l2_op){.done = on_read, .data = on_data};
    read->list = list;
    read->store = store;
    memcpy(read->key, key, size);
    read->key_size = size;
    read->wanted = LIST_PREFIX;
    read->invalid_no = atomic_load(store_invalid_no(store, key, size));
    l2_read(store->l2, &read->op, read->key, size, LIST_PREFIX);
}

static void on_scan(struct l2_op *op)
{
    struct store_list *list = CONTAINER_OF(op, struct store_list, scan);
    struct store *store = list->op->store;
    const struct l2_scan_result *scan = op->scan;

    if (op->result < 0) {
        list->error = op->result;
        one_less(list, store);
        return;
    }
    list->cursor = scan->cursor;
    list->is_over = scan->cursor == 0;
    for (size_t i = 0; i < scan->n_keys; i++) {
        if (scan->key_sizes[i] >= L2_KEY_MAX)
            continue;
        pthread_mutex_lock(&list->lock);
        bool is_new = see(list, scan->keys[i], scan->key_sizes[i]);
        list->n_pending += is_new;
        pthread_mutex_unlock(&list->lock);
        if (is_new)
            read_entry(list, store, scan->keys[i], scan->key_sizes[i]);
    }
    one_less(list, store);
}

static void scan_more(struct store_list *list, struct store *store)
{
    list->n_pending = 1;
    list->scan = (struct l2_op){.done = on_scan};
    l2_scan(store->l2, &list->scan, list->cursor, list->pattern, BATCH);
}

int step_list(struct store_op *op)
{
    struct store_list *list = op->list;

    if (op->is_applied)
        return list->error;
    if (list->is_over)
        return 0;
    op->is_applied = true;
    op->offset = list->n_entries;
    list->op = op;
    list->error = 0;
    snprintf(list->pattern, sizeof(list->pattern), "%s%.*s:*", op->store->name_space, SEAL_ID_TEXT, list->dir->id_text);
    scan_more(list, op->store);
    return PARKED;
}

/* ---- how full is L2? ---- */

struct info {
    struct l2_op op;
    struct store_op *for_op;
    char text[8192];
    size_t size;
};

static void on_info_data(struct l2_op *op, const void *bytes, size_t size, size_t total)
{
    struct info *info = CONTAINER_OF(op, struct info, op);
    size_t n = min_u64(size, sizeof(info->text) - 1 - info->size);

    memcpy(info->text + info->size, bytes, n);
    info->size += n;
}

static uint64_t field(const char *text, const char *name)
{
    const char *at = strstr(text, name);

    return at ? strtoull(at + strlen(name), NULL, 10) : 0;
}

static void on_info(struct l2_op *op)
{
    struct info *info = CONTAINER_OF(op, struct info, op);
    struct store_op *for_op = info->for_op;

    if (op->result == 0) {
        for_op->used = field(info->text, "\nused_memory:");
        for_op->total = field(info->text, "\nmaxmemory:");
        if (!for_op->total)
            for_op->total = field(info->text, "\ntotal_system_memory:");
        for_op->total = max_u64(for_op->total, for_op->used);
    }
    free(info);
    op_finish(for_op, 0); /* df shows zeros when L2 is away, as for a file system that cannot tell */
}

int step_statfs(struct store_op *op)
{
    struct info *info = calloc(1, sizeof(*info));

    if (!info)
        return -ENOMEM;
    info->op = (struct l2_op){.done = on_info, .data = on_info_data};
    info->for_op = op;
    l2_info(op->store->l2, &info->op);
    return PARKED;
}
