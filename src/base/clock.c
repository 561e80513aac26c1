#include "base/clock.h"

#include <time.h>

static uint64_t nanoseconds(clockid_t id)
{
    struct timespec now;

    clock_gettime(id, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t clock_now_ms(void)
{
    return nanoseconds(CLOCK_BOOTTIME) / 1000000u;
}

uint64_t clock_now_us(void)
{
    return nanoseconds(CLOCK_BOOTTIME) / 1000u;
}

int64_t clock_wall_ns(void)
{
    return (int64_t)nanoseconds(CLOCK_REALTIME);
}
