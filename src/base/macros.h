/*
 * Small words used everywhere: ownership that is visible, checks, sizes.
 * Threads: no state. Errors: none.
 */
#ifndef SESSIONFS_BASE_MACROS_H
#define SESSIONFS_BASE_MACROS_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#define CLEANUP(fn) __attribute__((cleanup(fn), unused))
#define DEFINE_CLEANUP(type, fn)                                                                                       \
    static inline void fn##p(type *slot)                                                                               \
    {                                                                                                                  \
        if (*slot)                                                                                                     \
            fn(*slot);                                                                                                 \
    }
#define TAKE(p)                                                                                                        \
    __extension__({                                                                                                    \
        __typeof__(p) taken_ = (p);                                                                                    \
        (p) = NULL;                                                                                                    \
        taken_;                                                                                                        \
    })

#define ARRAY_SIZE(a)                 (sizeof(a) / sizeof((a)[0]))
#define CONTAINER_OF(p, type, member) ((type *)((char *)(p)-offsetof(type, member)))
#define LIKELY(x)                     __builtin_expect(!!(x), 1)
#define UNLIKELY(x)                   __builtin_expect(!!(x), 0)

static inline void freep(void *slot)
{
    free(*(void **)slot);
}

static inline void closep(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline uint64_t max_u64(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

#endif
