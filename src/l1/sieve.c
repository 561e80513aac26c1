#include "l1/sieve.h"

#include "base/macros.h"
#include "sessionfs/l1.h"

#define STEPS_PER_LOCK 64 /* so that a sweep over a million used entries does not stop everybody */

void sieve_init(struct sieve *sieve)
{
    *sieve = (struct sieve){0};
    pthread_mutex_init(&sieve->lock, NULL);
}

void sieve_deinit(struct sieve *sieve)
{
    pthread_mutex_destroy(&sieve->lock);
}

static void add_locked(struct sieve *sieve, struct l1_entry *entry)
{
    entry->newer = NULL;
    entry->older = sieve->newest;
    *(sieve->newest ? &sieve->newest->newer : &sieve->oldest) = entry;
    sieve->newest = entry;
    entry->is_resident = true;
    atomic_store_explicit(&entry->used, 0, memory_order_relaxed); /* it has yet to show that it is asked for again */
    sieve->n_entries++;
}

static void remove_locked(struct sieve *sieve, struct l1_entry *entry)
{
    if (sieve->hand == entry)
        sieve->hand = entry->newer;
    *(entry->newer ? &entry->newer->older : &sieve->newest) = entry->older;
    *(entry->older ? &entry->older->newer : &sieve->oldest) = entry->newer;
    entry->newer = entry->older = NULL;
    entry->is_resident = false;
    sieve->n_entries--;
}

void sieve_add(struct sieve *sieve, struct l1_entry *entry)
{
    pthread_mutex_lock(&sieve->lock);
    if (!entry->is_resident)
        add_locked(sieve, entry);
    pthread_mutex_unlock(&sieve->lock);
}

void sieve_remove(struct sieve *sieve, struct l1_entry *entry)
{
    pthread_mutex_lock(&sieve->lock);
    if (entry->is_resident)
        remove_locked(sieve, entry);
    pthread_mutex_unlock(&sieve->lock);
}

bool entry_pin_if_alive(struct l1_entry *entry)
{
    uint32_t pins = atomic_load_explicit(&entry->pins, memory_order_relaxed);
    while (pins)
        if (atomic_compare_exchange_weak_explicit(&entry->pins, &pins, pins + 1, memory_order_acquire,
                                                  memory_order_relaxed))
            return true;
    return false;
}

void sieve_search_init(struct sieve *sieve, struct sieve_search *search)
{
    pthread_mutex_lock(&sieve->lock);
    search->n_first = search->n_second = sieve->n_entries;
    pthread_mutex_unlock(&sieve->lock);
}

static struct l1_entry *step_locked(struct sieve *sieve)
{
    struct l1_entry *entry = sieve->hand ? sieve->hand : sieve->oldest;
    sieve->hand = entry->newer;
    if (sieve->hand)
        __builtin_prefetch(sieve->hand);
    return entry;
}

/* NULL: no candidate among those steps. An entry without pins waits for our lock to leave the list: pass it by. */
static struct l1_entry *next_locked(struct sieve *sieve, struct sieve_search *search)
{
    for (unsigned i = 0; i < STEPS_PER_LOCK && search->n_first + search->n_second > 0 && sieve->oldest; i++) {
        struct l1_entry *entry = step_locked(sieve);
        bool is_spared = search->n_first > 0 && atomic_exchange_explicit(&entry->used, 0, memory_order_relaxed);
        (*(search->n_first ? &search->n_first : &search->n_second))--;
        if (!is_spared && entry_pin_if_alive(entry))
            return entry;
    }
    if (!sieve->oldest)
        search->n_first = search->n_second = 0;
    return NULL;
}

struct l1_entry *sieve_next(struct sieve *sieve, struct sieve_search *search)
{
    struct l1_entry *entry = NULL;
    while (!entry && search->n_first + search->n_second > 0) {
        pthread_mutex_lock(&sieve->lock);
        entry = next_locked(sieve, search);
        pthread_mutex_unlock(&sieve->lock);
    }
    return entry;
}
