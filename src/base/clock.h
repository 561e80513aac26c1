/*
 * Time. Deadlines and timers use the boot clock (monotonic, goes on while the machine sleeps, so that a
 * session does not live longer because a laptop slept); what programs see (mtime) is the wall clock.
 * Threads: any. Errors: none.
 */
#ifndef SESSIONFS_BASE_CLOCK_H
#define SESSIONFS_BASE_CLOCK_H

#include <stdint.h>

/** clock_now_ms() - CLOCK_BOOTTIME in milliseconds: for deadlines. */
uint64_t clock_now_ms(void);

/** clock_now_us() - CLOCK_BOOTTIME in microseconds: for measuring. */
uint64_t clock_now_us(void);

/** clock_wall_ns() - the wall clock, nanoseconds since 1970: for mtime, ctime and created. */
int64_t clock_wall_ns(void);

#endif
