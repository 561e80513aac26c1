/*
 * The metadata section in plaintext (format 1; all numbers little endian, times in nanoseconds since 1970):
 *
 *   offset size
 *    0      1   metadata format, 1
 *    1      1   policy: SEAL_POLICY_*
 *    2      2   fixed size F: where the name starts, 80
 *    4      4   mode, with the file type
 *    8      4   uid
 *   12      4   gid
 *   16      8   inode number
 *   24      8   time to live in milliseconds; 0 never expires; all ones: SEAL_TTL_INHERIT
 *   32      8   mtime, signed
 *   40      8   ctime, signed
 *   48      8   created, signed
 *   56     16   directory id (of a directory; else zero)
 *   72      2   name size N, 0 to 255
 *   74      2   reserved, 0
 *   76      4   extended attributes size X
 *    F      N   name; no '/' and no NUL
 *   F+N     X   extended attributes, opaque here; they end the section
 *
 * A later version may add fields between 80 and F: readers of format 1 skip what they do not know there. A change that
 * they may not ignore raises the format.
 *
 * Threads: no state. Errors: -EINVAL for metadata that the format cannot hold, -EBADMSG for bytes that do not decode.
 */
#ifndef SESSIONFS_SEAL_META_H
#define SESSIONFS_SEAL_META_H

#include <sessionfs/seal.h>

#define META_FORMAT      1
#define META_FIXED_BYTES 80
#define META_NAME_MAX    255

/** meta_check() - can it be encoded? */
int meta_check(const struct seal_meta *meta);

/** meta_encode() - write seal_meta_size() bytes; @meta has passed meta_check(). */
void meta_encode(const struct seal_meta *meta, uint8_t *out);

/** meta_decode() - @ret points into @buffer; written on success only. */
int meta_decode(const uint8_t *buffer, size_t size, struct seal_meta *ret);

#endif
