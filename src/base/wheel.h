/*
 * A hierarchical timer wheel: any number of timers, O(1) to set, to cancel and to run each.
 * Ticks of WHEEL_TICK_MS; a timer fires at its time or at most one tick after it, never before.
 * Ownership: the timer is embedded in its owner's struct, zero-initialised; the wheel only links it.
 * A month or a century ahead is as good as a second; timers that fire in the same call come in no particular order.
 * Threads: none inside; the owner of the wheel holds its own lock around every call.
 * Errors: -ENOMEM from wheel_new().
 */
#ifndef SESSIONFS_BASE_WHEEL_H
#define SESSIONFS_BASE_WHEEL_H

#include <stdbool.h>
#include <stdint.h>

#define WHEEL_TICK_MS 4

struct wheel_timer {
    struct wheel_timer *next, **link; /* link is NULL while the timer is not set */
    uint64_t at_ms;
};

struct wheel;

/** wheel_new() - an empty wheel (60 KiB) that starts at @now_ms. */
int wheel_new(struct wheel **ret, uint64_t now_ms);

/** wheel_free() - timers that are still set are left as they are: nobody may cancel or set them afterwards. */
void wheel_free(struct wheel *wheel);

/** wheel_set() - (re)arm @timer for @at_ms (clock_now_ms()); a time in the past fires at the next wheel_expire(). */
void wheel_set(struct wheel *wheel, struct wheel_timer *timer, uint64_t at_ms);

/** wheel_cancel() - disarm; fine on a timer that is not set. */
void wheel_cancel(struct wheel *wheel, struct wheel_timer *timer);

static inline bool wheel_timer_is_set(const struct wheel_timer *timer)
{
    return timer->link;
}

/** wheel_expire() - take one timer that is due at @now_ms (disarmed by this), or NULL when none is left. */
struct wheel_timer *wheel_expire(struct wheel *wheel, uint64_t now_ms);

/**
 * wheel_next_ms() - how long a poll may sleep at @now_ms: milliseconds, at most 1000, 0 when something is due
 * Never longer than until the next timer's tick; it may be shorter (a far timer wakes once or twice on its way): then
 * wheel_expire() returns NULL and the next answer is longer.
 */
unsigned wheel_next_ms(const struct wheel *wheel, uint64_t now_ms);

#endif
