#include "seal/meta.h"

#include <errno.h>
#include <string.h>

#include "seal/bytes.h"

enum {
    AT_FORMAT = 0,
    AT_POLICY = 1,
    AT_FIXED_SIZE = 2,
    AT_MODE = 4,
    AT_UID = 8,
    AT_GID = 12,
    AT_INO = 16,
    AT_TTL = 24,
    AT_MTIME = 32,
    AT_CTIME = 40,
    AT_CREATED = 48,
    AT_DIR_ID = 56,
    AT_NAME_SIZE = 72,
    AT_RESERVED = 74,
    AT_XATTRS_SIZE = 76,
};
_Static_assert(AT_XATTRS_SIZE + 4 == META_FIXED_BYTES, "the fields fill the fixed part");

static bool name_is_valid(const char *name, size_t size)
{
    return size <= META_NAME_MAX && (size == 0 || (!memchr(name, '/', size) && !memchr(name, 0, size)));
}

size_t seal_meta_size(const struct seal_meta *meta)
{
    return META_FIXED_BYTES + (size_t)meta->name_size + meta->xattrs_size;
}

int meta_check(const struct seal_meta *meta)
{
    if (meta->policy != SEAL_POLICY_SLIDING && meta->policy != SEAL_POLICY_FIXED)
        return -EINVAL;
    if (!name_is_valid(meta->name, meta->name_size))
        return -EINVAL;
    return seal_meta_size(meta) <= SEAL_META_MAX ? 0 : -EINVAL;
}

void meta_encode(const struct seal_meta *meta, uint8_t *out)
{
    out[AT_FORMAT] = META_FORMAT;
    out[AT_POLICY] = (uint8_t)meta->policy;
    put_le16(out + AT_FIXED_SIZE, META_FIXED_BYTES);
    put_le32(out + AT_MODE, meta->mode);
    put_le32(out + AT_UID, meta->uid);
    put_le32(out + AT_GID, meta->gid);
    put_le64(out + AT_INO, meta->ino);
    put_le64(out + AT_TTL, meta->ttl_ms);
    put_le64(out + AT_MTIME, (uint64_t)meta->mtime_ns);
    put_le64(out + AT_CTIME, (uint64_t)meta->ctime_ns);
    put_le64(out + AT_CREATED, (uint64_t)meta->created_ns);
    memcpy(out + AT_DIR_ID, meta->dir_id, SEAL_ID_BYTES);
    put_le16(out + AT_NAME_SIZE, meta->name_size);
    put_le16(out + AT_RESERVED, 0);
    put_le32(out + AT_XATTRS_SIZE, meta->xattrs_size);
    if (meta->name_size > 0)
        memcpy(out + META_FIXED_BYTES, meta->name, meta->name_size);
    if (meta->xattrs_size > 0)
        memcpy(out + META_FIXED_BYTES + meta->name_size, meta->xattrs, meta->xattrs_size);
}

int meta_decode(const uint8_t *buffer, size_t size, struct seal_meta *ret)
{
    if (size < META_FIXED_BYTES || buffer[AT_FORMAT] != META_FORMAT || get_le16(buffer + AT_RESERVED) != 0)
        return -EBADMSG;
    if (buffer[AT_POLICY] != SEAL_POLICY_SLIDING && buffer[AT_POLICY] != SEAL_POLICY_FIXED)
        return -EBADMSG;

    size_t fixed_size = get_le16(buffer + AT_FIXED_SIZE);
    uint16_t name_size = get_le16(buffer + AT_NAME_SIZE);
    uint32_t xattrs_size = get_le32(buffer + AT_XATTRS_SIZE);
    if (fixed_size < META_FIXED_BYTES || (uint64_t)fixed_size + name_size + xattrs_size != size)
        return -EBADMSG;

    const char *name = (const char *)buffer + fixed_size;
    if (!name_is_valid(name, name_size))
        return -EBADMSG;

    *ret = (struct seal_meta){
        .mode = get_le32(buffer + AT_MODE),
        .uid = get_le32(buffer + AT_UID),
        .gid = get_le32(buffer + AT_GID),
        .policy = buffer[AT_POLICY],
        .ino = get_le64(buffer + AT_INO),
        .ttl_ms = get_le64(buffer + AT_TTL),
        .mtime_ns = (int64_t)get_le64(buffer + AT_MTIME),
        .ctime_ns = (int64_t)get_le64(buffer + AT_CTIME),
        .created_ns = (int64_t)get_le64(buffer + AT_CREATED),
        .name = name,
        .name_size = name_size,
        .xattrs = name + name_size,
        .xattrs_size = xattrs_size,
    };
    memcpy(ret->dir_id, buffer + AT_DIR_ID, SEAL_ID_BYTES);
    return 0;
}
