#include "base/wheel.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/macros.h"

/*
 * A tick number is read as groups of LEVEL_BITS bits. A timer sits on the level of the highest group in which its tick
 * differs from the wheel's, in the slot that its own group names. So all timers of a level agree with the wheel in the
 * groups above, every used slot lies ahead of the wheel, and what comes first is the first used slot of the lowest used
 * level. 7 levels hold every 64-bit time: nothing is clamped. 1024 slots a level (a level-1 slot is 4 s wide) keep a
 * cascade short: it moves the timers of one slot, each timer at most once a level.
 */
#define LEVEL_BITS  10
#define LEVEL_SLOTS (1u << LEVEL_BITS)
#define N_LEVELS    7
#define N_WORDS     (LEVEL_SLOTS / 64)

#define SLEEP_MAX_MS 1000

struct level {
    uint64_t used_words;    /* bit w: used[w] is not 0 */
    uint64_t used[N_WORDS]; /* bit s: slot s has timers */
};

struct wheel {
    uint64_t tick; /* what is due at this tick or before is in due, all else lies ahead */
    struct wheel_timer *due;
    struct level levels[N_LEVELS];
    struct wheel_timer *slots[N_LEVELS * LEVEL_SLOTS];
};

int wheel_new(struct wheel **ret, uint64_t now_ms)
{
    struct wheel *wheel = calloc(1, sizeof(*wheel));
    if (!wheel)
        return -ENOMEM;
    wheel->tick = now_ms / WHEEL_TICK_MS;
    *ret = wheel;
    return 0;
}

void wheel_free(struct wheel *wheel)
{
    free(wheel);
}

/* Rounded up: a timer is never early. */
static uint64_t tick_of(uint64_t at_ms)
{
    return at_ms / WHEEL_TICK_MS + (at_ms % WHEEL_TICK_MS != 0);
}

static void push(struct wheel_timer **list, struct wheel_timer *timer)
{
    timer->next = *list;
    timer->link = list;
    if (timer->next)
        timer->next->link = &timer->next;
    *list = timer;
}

static void mark_used(struct level *level, unsigned slot)
{
    level->used[slot / 64] |= UINT64_C(1) << slot % 64;
    level->used_words |= UINT64_C(1) << slot / 64;
}

static void mark_empty(struct level *level, unsigned slot)
{
    level->used[slot / 64] &= ~(UINT64_C(1) << slot % 64);
    if (!level->used[slot / 64])
        level->used_words &= ~(UINT64_C(1) << slot / 64);
}

static void place(struct wheel *wheel, struct wheel_timer *timer)
{
    uint64_t tick = tick_of(timer->at_ms);
    if (tick <= wheel->tick) {
        push(&wheel->due, timer);
        return;
    }
    unsigned level = (63 - (unsigned)__builtin_clzll(tick ^ wheel->tick)) / LEVEL_BITS;
    unsigned slot = (unsigned)(tick >> level * LEVEL_BITS) % LEVEL_SLOTS;
    push(&wheel->slots[level * LEVEL_SLOTS + slot], timer);
    mark_used(&wheel->levels[level], slot);
}

void wheel_set(struct wheel *wheel, struct wheel_timer *timer, uint64_t at_ms)
{
    wheel_cancel(wheel, timer);
    timer->at_ms = at_ms;
    place(wheel, timer);
}

void wheel_cancel(struct wheel *wheel, struct wheel_timer *timer)
{
    if (!timer->link)
        return;
    *timer->link = timer->next;
    if (timer->next)
        timer->next->link = timer->link;
    /* The head of a slot was the only timer there: the bitmap must know. */
    uintptr_t offset = (uintptr_t)timer->link - (uintptr_t)wheel->slots;
    if (!timer->next && offset < sizeof(wheel->slots)) {
        unsigned index = (unsigned)(offset / sizeof(wheel->slots[0]));
        mark_empty(&wheel->levels[index / LEVEL_SLOTS], index % LEVEL_SLOTS);
    }
    timer->next = NULL;
    timer->link = NULL;
}

/* The used slot that comes first; *@start is the tick at which it begins. False: there is none. */
static bool first_slot(const struct wheel *wheel, unsigned *level, unsigned *slot, uint64_t *start)
{
    for (unsigned i = 0; i < N_LEVELS; i++) {
        const struct level *l = &wheel->levels[i];
        if (!l->used_words)
            continue;
        unsigned word = (unsigned)__builtin_ctzll(l->used_words);
        *level = i;
        *slot = word * 64 + (unsigned)__builtin_ctzll(l->used[word]);
        unsigned above = (i + 1) * LEVEL_BITS;
        uint64_t high = above < 64 ? wheel->tick >> above << above : 0;
        *start = high | (uint64_t)*slot << i * LEVEL_BITS;
        return true;
    }
    return false;
}

/* The wheel has come to the begin of that slot: its timers are due, or move to lower levels. */
static void open_slot(struct wheel *wheel, unsigned level, unsigned slot)
{
    struct wheel_timer **list = &wheel->slots[level * LEVEL_SLOTS + slot];
    struct wheel_timer *timer = *list;
    *list = NULL;
    mark_empty(&wheel->levels[level], slot);
    while (timer) {
        struct wheel_timer *next = timer->next;
        place(wheel, timer);
        timer = next;
    }
}

struct wheel_timer *wheel_expire(struct wheel *wheel, uint64_t now_ms)
{
    uint64_t now = now_ms / WHEEL_TICK_MS;
    while (!wheel->due && wheel->tick < now) {
        unsigned level, slot;
        uint64_t start;
        if (!first_slot(wheel, &level, &slot, &start) || start > now) {
            wheel->tick = now;
            return NULL;
        }
        wheel->tick = start;
        open_slot(wheel, level, slot);
    }
    struct wheel_timer *timer = wheel->due;
    if (timer)
        wheel_cancel(wheel, timer);
    return timer;
}

unsigned wheel_next_ms(const struct wheel *wheel, uint64_t now_ms)
{
    unsigned level, slot;
    uint64_t start;
    if (wheel->due)
        return 0;
    if (!first_slot(wheel, &level, &slot, &start))
        return SLEEP_MAX_MS;
    /* On a high level the slot's begin is when its timers move down: a bound from below. */
    if (start <= now_ms / WHEEL_TICK_MS)
        return 0;
    if (start - now_ms / WHEEL_TICK_MS > SLEEP_MAX_MS / WHEEL_TICK_MS)
        return SLEEP_MAX_MS;
    return (unsigned)min_u64(start * WHEEL_TICK_MS - now_ms, SLEEP_MAX_MS);
}
