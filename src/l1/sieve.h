/*
 * SIEVE: the list of resident entries in the order in which they came, and a hand that goes from the oldest to the
 * newest and round again. Used entries lose their mark and stay where they are; the first unused one is the candidate.
 * An entry that is looked up once and never again (a scan) goes at the hand's first visit; the used ones survive.
 * Ownership: the list borrows the entries; the last pin takes an entry out before it is freed.
 * Threads: any; one lock.
 * Errors: none.
 */
#ifndef SESSIONFS_L1_SIEVE_H
#define SESSIONFS_L1_SIEVE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

struct l1_entry;

struct sieve {
    pthread_mutex_t lock;
    /* guarded by lock */
    struct l1_entry *newest, *oldest;
    struct l1_entry *hand; /* the next to look at; NULL: the oldest */
    size_t n_entries;
};

void sieve_init(struct sieve *sieve);
void sieve_deinit(struct sieve *sieve);

/** sieve_add() / sieve_remove() - fine if it is (not) in already. */
void sieve_add(struct sieve *sieve, struct l1_entry *entry);
void sieve_remove(struct sieve *sieve, struct l1_entry *entry);

/* A search for candidates: a round that proposes the unused ones, then a round that proposes all. */
struct sieve_search {
    size_t n_first, n_second; /* steps left of the round that spares the used, and of the one that spares nobody */
};

void sieve_search_init(struct sieve *sieve, struct sieve_search *search);

/** sieve_next() - the next candidate, pinned; NULL when every entry had its turn. */
struct l1_entry *sieve_next(struct sieve *sieve, struct sieve_search *search);

/** entry_pin_if_alive() - false if the last pin is gone (somebody is freeing it). */
bool entry_pin_if_alive(struct l1_entry *entry);

#endif
