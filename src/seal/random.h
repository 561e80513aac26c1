/*
 * Random bytes for nonces, versions and ids (seal_random() in <sessionfs/seal.h>): small requests are served from a
 * pool of the thread's own, because each call of OpenSSL's generator costs as much as sealing a kilobyte. The kernel
 * clears the pool in a forked child (MADV_WIPEONFORK), so that parent and child never draw the same bytes. Keys are
 * not made here: seal_keys_create() asks OpenSSL directly.
 */
#ifndef SESSIONFS_SEAL_RANDOM_H
#define SESSIONFS_SEAL_RANDOM_H

struct random_pool;

void random_pool_free(struct random_pool *pool); /* wipes; NULL is fine */

#endif
