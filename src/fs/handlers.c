/*
 * Handlers: unpack the request, run one operation of the store, reply exactly once. Replies are sent from whichever
 * thread ends the operation; no lock is held then.
 */
#include "fs/internal.h"

#include <errno.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>

#include "base/log.h"
#include "base/macros.h"

#define STATUS_XATTR "user.session.status"

/* One request until it is answered. */
struct call {
    struct store_op op;
    struct fs *fs;
    fuse_req_t req;
    struct stream *stream;
    size_t room;
};

/* An open directory. */
struct stream {
    struct stream *next, **link; /* fs->streams_lock: whatever the kernel has not closed when the mount ends */
    _Atomic unsigned refs;
    struct session *dir;
    struct store_list *list;
    bool has_started;
};

static struct fs *fs_of(fuse_req_t req)
{
    return fuse_req_userdata(req);
}

static struct call *call_new(fuse_req_t req, enum store_kind kind, void (*done)(struct store_op *))
{
    struct call *call = calloc(1, sizeof(*call));

    if (!call)
        abort();
    call->fs = fs_of(req);
    call->req = req;
    call->op.kind = kind;
    call->op.done = done;
    atomic_fetch_add_explicit(&call->fs->n_calls, 1, memory_order_relaxed);
    return call;
}

static void call_free(struct call *call)
{
    struct fs *fs = call->fs;

    store_done_with(fs->store, &call->op);
    free(call);
    atomic_fetch_sub(&fs->n_calls, 1);
}

static void call_run(struct call *call)
{
    store_run(call->fs->store, &call->op);
}

static struct call *call_of(struct store_op *op)
{
    return CONTAINER_OF(op, struct call, op);
}

static void set_name(struct store_op *op, const char *name)
{
    size_t size = strlen(name);

    op->name_size = (uint16_t)(size > 256 ? 256 : size);
    memcpy(op->name, name, size > 255 ? 0 : size + 1);
}

static void set_new_name(struct store_op *op, const char *name)
{
    size_t size = strlen(name);

    op->new_name_size = (uint16_t)(size > 256 ? 256 : size);
    memcpy(op->new_name, name, size > 255 ? 0 : size + 1);
}

/* ---- replies ---- */

static void reply_error(struct store_op *op)
{
    struct call *call = call_of(op);

    fuse_reply_err(call->req, -op->result);
    call_free(call);
}

static struct stat stat_of(const struct fs *fs, const struct store_attr *attr)
{
    struct stat st = {
        .st_ino = attr->ino,
        .st_mode = attr->mode,
        .st_nlink = S_ISDIR(attr->mode) ? 2 : 1,
        .st_uid = fs->config.has_uid ? fs->config.uid : attr->uid,
        .st_gid = fs->config.has_gid ? fs->config.gid : attr->gid,
        .st_size = (off_t)attr->size,
        .st_blksize = STORE_BLOCK,
        .st_blocks = (blkcnt_t)((attr->size + 511) / 512),
        .st_mtim = {attr->mtime_ns / 1000000000, attr->mtime_ns % 1000000000},
        .st_ctim = {attr->ctime_ns / 1000000000, attr->ctime_ns % 1000000000},
    };

    if (fs->config.has_umask)
        st.st_mode = (st.st_mode & S_IFMT) | (0777 & ~fs->config.umask);
    st.st_atim = st.st_mtim;
    return st;
}

static double seconds(unsigned ms)
{
    return ms / 1000.0;
}

static struct fuse_entry_param entry_of(struct fs *fs, struct session *session, const struct store_attr *attr)
{
    return (struct fuse_entry_param){
        .ino = fs_node(fs, session),
        .attr = stat_of(fs, attr),
        .attr_timeout = seconds(attr->valid_ms),
        .entry_timeout = seconds(attr->valid_ms),
    };
}

static void reply_entry(struct store_op *op)
{
    struct call *call = call_of(op);

    if (op->result < 0) {
        reply_error(op);
        return;
    }
    struct fuse_entry_param entry = entry_of(call->fs, op->found, &op->attr);
    if (fuse_reply_entry(call->req, &entry) < 0)
        store_forget(call->fs->store, op->found, 1); /* nobody waits for it any more */
    call_free(call);
}

static void reply_create(struct store_op *op)
{
    struct call *call = call_of(op);
    struct fuse_file_info fi = {.keep_cache = 1};

    if (op->result < 0) {
        if (op->found) /* it was there, but could not be truncated */
            store_forget(call->fs->store, op->found, 1);
        reply_error(op);
        return;
    }
    struct fuse_entry_param entry = entry_of(call->fs, op->found, &op->attr);
    if (fuse_reply_create(call->req, &entry, &fi) < 0)
        store_forget(call->fs->store, op->found, 1);
    call_free(call);
}

static void reply_attr(struct store_op *op)
{
    struct call *call = call_of(op);

    if (op->result < 0) {
        reply_error(op);
        return;
    }
    struct stat st = stat_of(call->fs, &op->attr);
    fuse_reply_attr(call->req, &st, seconds(op->attr.valid_ms));
    call_free(call);
}

static void reply_data(struct store_op *op)
{
    struct call *call = call_of(op);

    if (op->result < 0) {
        reply_error(op);
        return;
    }
    fuse_reply_buf(call->req, op->bytes, op->n_bytes);
    call_free(call);
}

static void reply_written(struct store_op *op)
{
    struct call *call = call_of(op);

    if (op->result < 0) {
        reply_error(op);
        return;
    }
    fuse_reply_write(call->req, op->n_bytes);
    call_free(call);
}

static void reply_xattr_bytes(fuse_req_t req, const void *bytes, size_t size, size_t room)
{
    if (room == 0)
        fuse_reply_xattr(req, size);
    else if (size > room)
        fuse_reply_err(req, ERANGE);
    else
        fuse_reply_buf(req, bytes, size);
}

static void reply_xattr(struct store_op *op)
{
    struct call *call = call_of(op);

    if (op->result < 0) {
        reply_error(op);
        return;
    }
    reply_xattr_bytes(call->req, op->bytes, op->n_bytes, call->room);
    call_free(call);
}

static void reply_statfs(struct store_op *op)
{
    struct call *call = call_of(op);
    struct statvfs st = {
        .f_bsize = STORE_BLOCK,
        .f_frsize = STORE_BLOCK,
        .f_blocks = op->total / STORE_BLOCK,
        .f_bfree = (op->total - op->used) / STORE_BLOCK,
        .f_bavail = (op->total - op->used) / STORE_BLOCK,
        .f_namemax = L1_NAME_MAX,
    };

    fuse_reply_statfs(call->req, &st);
    call_free(call);
}

/* ---- the protocol ---- */

static void handle_init(void *userdata, struct fuse_conn_info *conn)
{
    /* A truncation has to come as a SETATTR: there is no open request that would carry it. Locks stay with the kernel.
     */
    conn->want &=
        ~(unsigned)(FUSE_CAP_ATOMIC_O_TRUNC | FUSE_CAP_WRITEBACK_CACHE | FUSE_CAP_FLOCK_LOCKS | FUSE_CAP_POSIX_LOCKS |
                    FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE);
    conn->want |= conn->capable & (FUSE_CAP_AUTO_INVAL_DATA | FUSE_CAP_READDIRPLUS | FUSE_CAP_READDIRPLUS_AUTO |
                                   FUSE_CAP_PARALLEL_DIROPS | FUSE_CAP_ASYNC_READ);
    conn->max_write = FS_MAX_WRITE;
    conn->max_readahead = 2u << 20;
    conn->max_background = 64;
    conn->time_gran = 1;
}

/* Neither open nor close is asked for: the kernel answers alone from what it has. */
static void handle_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    fuse_reply_err(req, ENOSYS);
}

/* Only files which came by CREATE are released; the close itself was heard from inotify. */
static void handle_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    fuse_reply_err(req, 0);
}

static void handle_forget(fuse_req_t req, fuse_ino_t ino, uint64_t n)
{
    struct fs *fs = fs_of(req);

    if (ino != FUSE_ROOT_ID)
        store_forget(fs->store, fs_session(fs, ino), n);
    fuse_reply_none(req);
}

static void handle_forget_multi(fuse_req_t req, size_t count, struct fuse_forget_data *forgets)
{
    struct fs *fs = fs_of(req);

    for (size_t i = 0; i < count; i++)
        if (forgets[i].ino != FUSE_ROOT_ID)
            store_forget(fs->store, fs_session(fs, forgets[i].ino), forgets[i].nlookup);
    fuse_reply_none(req);
}

static void handle_statfs(fuse_req_t req, fuse_ino_t ino)
{
    call_run(call_new(req, STORE_STATFS, reply_statfs));
}

/* ---- names ---- */

static struct call *name_call(fuse_req_t req, enum store_kind kind, void (*done)(struct store_op *), fuse_ino_t parent,
                              const char *name)
{
    struct call *call = call_new(req, kind, done);

    call->op.dir = fs_session(call->fs, parent);
    set_name(&call->op, name);
    return call;
}

static void handle_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    call_run(name_call(req, STORE_LOOKUP, reply_entry, parent, name));
}

static struct call *create_call(fuse_req_t req, void (*done)(struct store_op *), fuse_ino_t parent, const char *name,
                                mode_t mode, bool is_exclusive)
{
    struct call *call = name_call(req, STORE_CREATE, done, parent, name);
    const struct fuse_ctx *ctx = fuse_req_ctx(req);

    call->op.mode = mode;
    call->op.uid = ctx->uid;
    call->op.gid = ctx->gid;
    call->op.is_exclusive = is_exclusive;
    return call;
}

/* It was there already, and the program wants it empty: the kernel leaves that to CREATE. */
static void truncate_found(struct store_op *op)
{
    struct call *call = call_of(op);

    if (op->result < 0 || op->attr.size == 0) {
        reply_create(op);
        return;
    }
    struct session *found = op->found;
    *op = (struct store_op){
        .kind = STORE_SETATTR, .done = reply_create, .session = found, .found = found, .set = STORE_SET_SIZE};
    call_run(call);
}

static void handle_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi)
{
    call_run(create_call(req, fi->flags & O_TRUNC ? truncate_found : reply_create, parent, name,
                         S_IFREG | (mode & 07777), fi->flags & O_EXCL));
}

static void handle_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t rdev)
{
    if ((mode & S_IFMT) && !S_ISREG(mode))
        fuse_reply_err(req, EPERM);
    else
        call_run(create_call(req, reply_entry, parent, name, S_IFREG | (mode & 07777), true));
}

static void handle_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
    call_run(create_call(req, reply_entry, parent, name, S_IFDIR | (mode & 07777), true));
}

static void handle_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    call_run(name_call(req, STORE_REMOVE, reply_error, parent, name));
}

static void handle_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    call_run(name_call(req, STORE_RMDIR, reply_error, parent, name));
}

static void handle_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t new_parent,
                          const char *new_name, unsigned flags)
{
    if (flags & ~(unsigned)RENAME_NOREPLACE) {
        fuse_reply_err(req, EINVAL);
        return;
    }
    struct call *call = name_call(req, STORE_RENAME, reply_error, parent, name);
    call->op.new_dir = fs_session(call->fs, new_parent);
    set_new_name(&call->op, new_name);
    call->op.no_replace = flags & RENAME_NOREPLACE;
    call_run(call);
}

static void handle_symlink(fuse_req_t req, const char *link, fuse_ino_t parent, const char *name)
{
    fuse_reply_err(req, EPERM);
}

static void handle_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t new_parent, const char *new_name)
{
    fuse_reply_err(req, EPERM);
}

/* ---- open files ---- */

static struct call *file_call(fuse_req_t req, enum store_kind kind, void (*done)(struct store_op *), fuse_ino_t ino)
{
    struct call *call = call_new(req, kind, done);

    call->op.session = fs_session(call->fs, ino);
    return call;
}

static void handle_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    call_run(file_call(req, STORE_GETATTR, reply_attr, ino));
}

static unsigned set_of(int valid, uint32_t raw_valid)
{
    static const struct {
        int fuse;
        unsigned store;
    } table[] = {
        {FUSE_SET_ATTR_MODE, STORE_SET_MODE},   {FUSE_SET_ATTR_UID, STORE_SET_UID},
        {FUSE_SET_ATTR_GID, STORE_SET_GID},     {FUSE_SET_ATTR_SIZE, STORE_SET_SIZE},
        {FUSE_SET_ATTR_CTIME, STORE_SET_CTIME},
    };
    unsigned set = 0;

    for (size_t i = 0; i < ARRAY_SIZE(table); i++)
        if (valid & table[i].fuse)
            set |= table[i].store;
    if (valid & FUSE_SET_ATTR_MTIME_NOW)
        set |= STORE_SET_MTIME_NOW;
    else if (valid & FUSE_SET_ATTR_MTIME)
        set |= STORE_SET_MTIME;
    if (raw_valid & FATTR_KILL_SUIDGID)
        set |= STORE_SET_KILL_SUID;
    return set;
}

static void handle_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int valid, struct fuse_file_info *fi)
{
    struct call *call = file_call(req, STORE_SETATTR, reply_attr, ino);
    struct store_op *op = &call->op;

    op->set = set_of(valid, fs_raw()->setattr_valid);
    op->mode = attr->st_mode;
    op->uid = attr->st_uid;
    op->gid = attr->st_gid;
    op->size = (size_t)attr->st_size;
    op->mtime_ns = attr->st_mtim.tv_sec * 1000000000 + attr->st_mtim.tv_nsec;
    /* ftruncate() sets the time as well, but belongs to the save of its descriptor. */
    if ((op->set & STORE_SET_SIZE) && (fs_raw()->setattr_valid & FATTR_FH))
        op->set &= ~(unsigned)STORE_SET_MTIME_NOW;
    if (op->set == 0) /* an access time alone: not kept */
        op->kind = STORE_GETATTR;
    call_run(call);
}

static void handle_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *fi)
{
    struct call *call = file_call(req, STORE_READ, reply_data, ino);

    call->op.offset = (uint64_t)offset;
    call->op.size = size;
    call_run(call);
}

static void handle_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t offset,
                         struct fuse_file_info *fi)
{
    struct call *call = file_call(req, STORE_WRITE, reply_written, ino);

    call->op.data = data;
    call->op.size = size;
    call->op.offset = (uint64_t)offset;
    call->op.is_cached = fs_raw()->write_flags & FUSE_WRITE_CACHE;
    call->op.kills_suid = fs_raw()->write_flags & FUSE_WRITE_KILL_SUIDGID;
    call_run(call);
}

static void handle_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
    call_run(file_call(req, STORE_SYNC, reply_error, ino));
}

/* ---- extended attributes ---- */

static void reply_status(fuse_req_t req, size_t room)
{
    struct fs *fs = fs_of(req);
    CLEANUP(freep) char *text = fs->config.status ? fs->config.status(fs->config.status_arg) : NULL;

    if (text)
        reply_xattr_bytes(req, text, strlen(text), room);
    else
        fuse_reply_err(req, ENODATA);
}

static struct call *xattr_call(fuse_req_t req, enum store_kind kind, void (*done)(struct store_op *), fuse_ino_t ino,
                               const char *name)
{
    struct call *call = file_call(req, kind, done, ino);

    set_name(&call->op, name);
    return call;
}

static void handle_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size)
{
    if (ino == FUSE_ROOT_ID && strcmp(name, STATUS_XATTR) == 0) {
        reply_status(req, size);
        return;
    }
    struct call *call = xattr_call(req, STORE_GETXATTR, reply_xattr, ino, name);
    call->room = size;
    call_run(call);
}

static void handle_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags)
{
    struct call *call = xattr_call(req, STORE_SETXATTR, reply_error, ino, name);

    call->op.data = value;
    call->op.size = size;
    call->op.xattr_flags = flags;
    call_run(call);
}

static void handle_listxattr(fuse_req_t req, fuse_ino_t ino, size_t size)
{
    struct call *call = file_call(req, STORE_LISTXATTR, reply_xattr, ino);

    call->room = size;
    call_run(call);
}

static void handle_removexattr(fuse_req_t req, fuse_ino_t ino, const char *name)
{
    call_run(xattr_call(req, STORE_REMOVEXATTR, reply_error, ino, name));
}

/* ---- directories ---- */

static void stream_unref(struct fs *fs, struct stream *stream)
{
    if (atomic_fetch_sub(&stream->refs, 1) != 1)
        return;
    pthread_mutex_lock(&fs->streams_lock);
    *stream->link = stream->next;
    if (stream->next)
        stream->next->link = stream->link;
    pthread_mutex_unlock(&fs->streams_lock);
    store_list_free(fs->store, stream->list);
    free(stream);
}

static void stream_add(struct fs *fs, struct stream *stream)
{
    pthread_mutex_lock(&fs->streams_lock);
    stream->next = fs->streams;
    stream->link = &fs->streams;
    if (stream->next)
        stream->next->link = &stream->next;
    fs->streams = stream;
    pthread_mutex_unlock(&fs->streams_lock);
}

void fs_free_streams(struct fs *fs)
{
    while (fs->streams)
        stream_unref(fs, fs->streams);
}

static void handle_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct fs *fs = fs_of(req);
    struct stream *stream = calloc(1, sizeof(*stream));

    if (stream) {
        stream->refs = 1;
        stream->dir = fs_session(fs, ino);
        stream->list = store_list_new(stream->dir);
    }
    if (!stream || !stream->list) {
        free(stream);
        fuse_reply_err(req, ENOMEM);
        return;
    }
    stream_add(fs, stream);
    fi->fh = (uintptr_t)stream;
    if (fuse_reply_open(req, fi) < 0)
        stream_unref(fs, stream);
}

static void handle_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    stream_unref(fs_of(req), (struct stream *)(uintptr_t)fi->fh);
    fuse_reply_err(req, 0);
}

/* Entry @at of a listing: "." and ".." come first. 1, 0 or -1 as store_list_at(). */
static int entry_at(const struct stream *stream, uint64_t at, struct store_entry *ret)
{
    if (at < 2) {
        *ret =
            (struct store_entry){.name = at ? ".." : ".", .name_size = (uint16_t)(at + 1), .mode = S_IFDIR, .ino = 1};
        return 1;
    }
    return store_list_at(stream->list, at - 2, ret);
}

/* Puts one entry into @out; its size, more than @room if it does not fit. */
static size_t put_entry(struct call *call, char *out, size_t room, const struct store_entry *entry, uint64_t at)
{
    struct fs *fs = call->fs;
    struct fuse_entry_param param = {.attr.st_mode = entry->mode, .attr.st_ino = entry->ino};
    char name[L1_NAME_MAX + 1];

    memcpy(name, entry->name, entry->name_size);
    name[entry->name_size] = 0;
    if (!call->op.is_cached)
        return fuse_add_direntry(call->req, out, room, name, &param.attr, (off_t)at + 1);
    /* "plus": the attributes too, where they are known; the kernel asks for the others when it needs them */
    size_t size = fuse_add_direntry_plus(call->req, NULL, 0, name, &param, (off_t)at + 1);
    if (size > room)
        return size;
    struct store_attr attr;
    struct session *session = at < 2 ? NULL : store_peek(fs->store, call->stream->dir, name, entry->name_size, &attr);
    if (session)
        param = entry_of(fs, session, &attr);
    return fuse_add_direntry_plus(call->req, out, room, name, &param, (off_t)at + 1);
}

static void list_more(struct call *call);

static void fill(struct call *call)
{
    CLEANUP(freep) char *out = malloc(call->room);
    struct store_entry entry;
    size_t used = 0;
    int r = 1;

    if (!out) {
        call->op.result = -ENOMEM;
    }
    for (uint64_t at = call->op.total; out; at++) {
        r = entry_at(call->stream, at, &entry);
        if (r != 1)
            break;
        size_t size = put_entry(call, out + used, call->room - used, &entry, at);
        if (size > call->room - used)
            break;
        used += size;
    }
    if (call->op.result == 0 && r == 0 && used == 0) {
        list_more(call);
        return;
    }
    if (call->op.result < 0)
        fuse_reply_err(call->req, -call->op.result);
    else
        fuse_reply_buf(call->req, out, used);
    stream_unref(call->fs, call->stream);
    call_free(call);
}

static void listed(struct store_op *op)
{
    fill(call_of(op));
}

static void list_more(struct call *call)
{
    struct store_op *op = &call->op;
    uint64_t at = op->total;
    bool is_plus = op->is_cached;

    *op = (struct store_op){.kind = STORE_LIST, .done = listed, .dir = call->stream->dir, .list = call->stream->list};
    op->total = at;
    op->is_cached = is_plus;
    call_run(call);
}

static void read_dir(fuse_req_t req, size_t size, off_t offset, struct fuse_file_info *fi, bool is_plus)
{
    struct call *call = call_new(req, STORE_LIST, listed);
    struct stream *stream = (struct stream *)(uintptr_t)fi->fh;

    atomic_fetch_add(&stream->refs, 1);
    if (offset == 0 && stream->has_started) { /* rewinddir(): what is there now */
        struct store_list *fresh = store_list_new(stream->dir);
        if (fresh) {
            store_list_free(call->fs->store, stream->list);
            stream->list = fresh;
        }
    }
    stream->has_started = true;
    call->stream = stream;
    call->room = size;
    call->op.total = (uint64_t)offset; /* where to go on; store leaves it alone */
    call->op.is_cached = is_plus;
    fill(call);
}

static void handle_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *fi)
{
    read_dir(req, size, offset, fi, false);
}

static void handle_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *fi)
{
    read_dir(req, size, offset, fi, true);
}

static void handle_fsyncdir(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
    fuse_reply_err(req, 0); /* what changes names is in L2 before it is answered */
}

const struct fuse_lowlevel_ops fs_handlers = {
    .init = handle_init,
    .lookup = handle_lookup,
    .forget = handle_forget,
    .forget_multi = handle_forget_multi,
    .getattr = handle_getattr,
    .setattr = handle_setattr,
    .mknod = handle_mknod,
    .mkdir = handle_mkdir,
    .unlink = handle_unlink,
    .rmdir = handle_rmdir,
    .symlink = handle_symlink,
    .rename = handle_rename,
    .link = handle_link,
    .open = handle_open,
    .read = handle_read,
    .write = handle_write,
    .release = handle_release,
    .fsync = handle_fsync,
    .opendir = handle_opendir,
    .readdir = handle_readdir,
    .readdirplus = handle_readdirplus,
    .releasedir = handle_releasedir,
    .fsyncdir = handle_fsyncdir,
    .statfs = handle_statfs,
    .setxattr = handle_setxattr,
    .getxattr = handle_getxattr,
    .listxattr = handle_listxattr,
    .removexattr = handle_removexattr,
    .create = handle_create,
};
