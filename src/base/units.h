/*
 * Durations and sizes as people write them.
 * Threads: any. Errors: -EINVAL for what does not read (empty, sign, garbage, unknown unit), -ERANGE for overflow;
 * *ret is written on success only.
 */
#ifndef SESSIONFS_BASE_UNITS_H
#define SESSIONFS_BASE_UNITS_H

#include <stddef.h>
#include <stdint.h>

/** units_parse_ms() - "1500ms", "90s", "30m", "12h", "7d"; a bare number is seconds. 0 reads as 0 (callers decide). */
int units_parse_ms(const char *text, size_t length, uint64_t *ret);

/** units_parse_bytes() - "64K", "256M", "2G", "1T" (powers of 1024, also with a trailing "B" or "iB"), bare: bytes. */
int units_parse_bytes(const char *text, size_t length, uint64_t *ret);

/** units_parse_rfc3339() - "2026-01-31T12:00:00Z", fractions and numeric offsets allowed; nanoseconds since 1970. */
int units_parse_rfc3339(const char *text, size_t length, int64_t *ret_ns);

/** units_format_rfc3339() - UTC, whole seconds, rounded up: "2026-01-31T12:00:00Z" (20 bytes and NUL). */
void units_format_rfc3339(int64_t ns, char out[32]);

#endif
