/* Contents: runs of L1 pages that are shared by whoever reads, seals or has lent them, and changed only by a single
 * owner. */
#include "store/internal.h"

struct content *content_new(struct store *store, size_t size)
{
    struct content *content = calloc(1, sizeof(*content));

    if (!content)
        return NULL;
    content->refs = 1;
    content->size = size;
    content->room = (size + L1_PAGE - 1) / L1_PAGE * L1_PAGE;
    if (content->room) {
        content->bytes = l1_pages_get(store->l1, content->room);
        if (!content->bytes) {
            free(content);
            return NULL;
        }
    }
    return content;
}

struct content *content_ref(struct content *content)
{
    if (content)
        atomic_fetch_add(&content->refs, 1);
    return content;
}

void content_unref(struct store *store, struct content *content)
{
    if (!content || atomic_fetch_sub(&content->refs, 1) != 1)
        return;
    if (content->bytes)
        l1_pages_put(store->l1, content->bytes, content->room);
    free(content);
}

/* Growth leaves room, so that a file written in many small pieces is not copied each time. */
static size_t room_for(size_t room)
{
    return room <= 4 * L1_PAGE ? room : room + room / 2;
}

struct content *content_writable(struct store *store, struct content *content, size_t room)
{
    if (content && atomic_load(&content->refs) == 1 && content->room >= room)
        return content;
    struct content *copy = content_new(store, room_for(room));
    if (!copy)
        copy = content_new(store, room);
    if (!copy)
        return NULL;
    copy->size = content ? min_u64(content->size, room) : 0;
    if (copy->size)
        memcpy(copy->bytes, content->bytes, copy->size);
    content_unref(store, content);
    return copy;
}
