/* Telling the kernel what changed behind its back. */
#include "fs/internal.h"

#include <stdlib.h>
#include <string.h>

#include "base/macros.h"

static struct notice *notice_new(struct fs *fs, struct session *session, struct session *parent, const char *name,
                                 size_t size)
{
    struct notice *notice = malloc(sizeof(*notice) + size + 1);

    if (!notice)
        abort();
    *notice = (struct notice){.session = session, .parent = parent, .name_size = (uint16_t)size};
    if (size)
        memcpy(notice->name, name, size);
    notice->name[size] = 0;
    store_remember(fs->store, session, 1);
    if (parent)
        store_remember(fs->store, parent, 1);
    return notice;
}

static void notice_free(struct fs *fs, struct notice *notice)
{
    store_forget(fs->store, notice->session, 1);
    if (notice->parent)
        store_forget(fs->store, notice->parent, 1);
    free(notice);
}

static void queue(struct notifier *notifier, struct notice *notice)
{
    pthread_mutex_lock(&notifier->lock);
    *notifier->tail = notice;
    notifier->tail = &notice->next;
    pthread_cond_signal(&notifier->wake);
    pthread_mutex_unlock(&notifier->lock);
}

static void handle_inode(struct fs *fs, struct notice *notice)
{
    fuse_lowlevel_notify_inval_inode(fs->se, fs_node(fs, notice->session), 0, 0);
    atomic_fetch_add_explicit(&fs->n_inval_inode, 1, memory_order_relaxed);
    if (notice->name_size)
        queue(&fs->entries, notice);
    else
        notice_free(fs, notice);
}

static void handle_entry(struct fs *fs, struct notice *notice)
{
    fuse_lowlevel_notify_delete(fs->se, fs_node(fs, notice->parent), fs_node(fs, notice->session), notice->name,
                                notice->name_size);
    atomic_fetch_add_explicit(&fs->n_inval_entry, 1, memory_order_relaxed);
    notice_free(fs, notice);
}

void notify_changed(void *arg, struct session *session)
{
    struct fs *fs = arg;

    queue(&fs->inodes, notice_new(fs, session, NULL, NULL, 0));
}

void notify_gone(void *arg, struct session *session, struct session *parent, const char *name, size_t size)
{
    struct fs *fs = arg;

    queue(&fs->inodes, notice_new(fs, session, parent, name, parent ? size : 0));
}

static struct notice *next_notice(struct notifier *notifier)
{
    pthread_mutex_lock(&notifier->lock);
    while (!notifier->head && !notifier->is_stopping)
        pthread_cond_wait(&notifier->wake, &notifier->lock);
    struct notice *notice = notifier->head;
    if (notice) {
        notifier->head = notice->next;
        if (!notice->next)
            notifier->tail = &notifier->head;
        notice->next = NULL;
    }
    pthread_mutex_unlock(&notifier->lock);
    return notice;
}

static void *notifier_thread(void *arg)
{
    struct notifier *notifier = arg;
    struct notice *notice;

    transport_detach_writer(notifier->fs);
    while ((notice = next_notice(notifier)))
        notifier->handle(notifier->fs, notice);
    return NULL;
}

static int start(struct fs *fs, struct notifier *notifier, void (*handle)(struct fs *, struct notice *))
{
    notifier->fs = fs;
    notifier->handle = handle;
    notifier->tail = &notifier->head;
    pthread_mutex_init(&notifier->lock, NULL);
    pthread_cond_init(&notifier->wake, NULL);
    int r = pthread_create(&notifier->thread, NULL, notifier_thread, notifier);
    notifier->has_thread = r == 0;
    return -r;
}

int notify_start(struct fs *fs)
{
    int r = start(fs, &fs->inodes, handle_inode);

    return r < 0 ? r : start(fs, &fs->entries, handle_entry);
}

static void stop(struct fs *fs, struct notifier *notifier)
{
    if (!notifier->has_thread)
        return;
    pthread_mutex_lock(&notifier->lock);
    notifier->is_stopping = true;
    pthread_cond_signal(&notifier->wake);
    pthread_mutex_unlock(&notifier->lock);
    pthread_join(notifier->thread, NULL);
    notifier->has_thread = false;
    pthread_mutex_destroy(&notifier->lock);
    pthread_cond_destroy(&notifier->wake);
}

void notify_stop(struct fs *fs)
{
    stop(fs, &fs->inodes);
    stop(fs, &fs->entries);
}
