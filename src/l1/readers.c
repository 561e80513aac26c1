#include "l1/readers.h"

#include <pthread.h>
#include <sched.h>

#define SPINS 200

_Thread_local struct reader *reader_mine;

static struct reader readers[READERS_MAX];
static atomic_size_t n_readers; /* slots that were ever taken: those below are scanned */

static pthread_once_t key_once = PTHREAD_ONCE_INIT;
static pthread_key_t key;
static bool key_is_made;

static void give_back(void *slot)
{
    struct reader *reader = slot;
    reader_mine = NULL;
    atomic_store(&reader->is_taken, false);
}

static void make_key(void)
{
    key_is_made = pthread_key_create(&key, give_back) == 0;
}

static struct reader *take_slot(void)
{
    for (size_t i = 0; i < READERS_MAX; i++) {
        if (atomic_exchange(&readers[i].is_taken, true))
            continue;
        size_t n = atomic_load(&n_readers);
        while (n < i + 1 && !atomic_compare_exchange_weak(&n_readers, &n, i + 1))
            ;
        return &readers[i];
    }
    return NULL;
}

struct reader *reader_register(void)
{
    pthread_once(&key_once, make_key);
    struct reader *reader = key_is_made ? take_slot() : NULL;
    if (!reader)
        return NULL;
    if (pthread_setspecific(key, reader) != 0) {
        atomic_store(&reader->is_taken, false);
        return NULL;
    }
    reader_mine = reader;
    return reader;
}

void readers_wait(const void *what)
{
    size_t n = atomic_load(&n_readers);
    for (size_t i = 0; i < n; i++) {
        for (unsigned spins = 0; atomic_load(&readers[i].at) == what; spins++)
            if (spins >= SPINS)
                sched_yield(); /* the reader was preempted in its section */
    }
}
