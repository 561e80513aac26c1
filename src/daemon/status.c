#include "daemon/status.h"

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>
#include <unistd.h>

#include <sessionfs/fs.h>
#include <sessionfs/store.h>

#include "base/clock.h"
#include "base/macros.h"

static bool add_number(cJSON *object, const char *name, uint64_t value)
{
    return cJSON_AddNumberToObject(object, name, (double)value);
}

static bool add_daemon(cJSON *root, const struct status *status)
{
    return cJSON_AddStringToObject(root, "version", SESSIONFS_VERSION) && add_number(root, "pid", (uint64_t)getpid()) &&
           cJSON_AddStringToObject(root, "mountpoint", status->mountpoint) &&
           cJSON_AddStringToObject(root, "source", status->source) &&
           cJSON_AddStringToObject(root, "namespace", status->name_space) &&
           add_number(root, "uptime_s", (clock_now_ms() - status->started_ms) / 1000);
}

static bool add_requests(cJSON *root, const struct fs_stats *stats)
{
    cJSON *requests = cJSON_AddObjectToObject(root, "requests");
    bool is_good = requests && add_number(requests, "total", stats->n_requests);

    for (unsigned i = 0; is_good && i < ARRAY_SIZE(stats->by_opcode); i++) {
        const char *name = fs_opcode_name(i);
        if (name && stats->by_opcode[i])
            is_good = add_number(requests, name, stats->by_opcode[i]);
    }
    return is_good;
}

static bool add_notifications(cJSON *root, const struct fs_stats *stats)
{
    cJSON *notifications = cJSON_AddObjectToObject(root, "notifications");

    return notifications && add_number(notifications, "inval_inode", stats->n_inval_inode) &&
           add_number(notifications, "inval_entry", stats->n_inval_entry);
}

static bool add_fs(cJSON *root, const struct status *status)
{
    struct fs_stats stats = {0};

    if (status->fs)
        fs_stats(status->fs, &stats);
    return add_requests(root, &stats) && add_notifications(root, &stats) && add_number(root, "nodes", stats.n_nodes);
}

static bool add_l1(cJSON *root, const struct store_stats *stats)
{
    cJSON *l1 = cJSON_AddObjectToObject(root, "l1");

    return l1 && add_number(l1, "entries", stats->l1.n_entries) && add_number(l1, "evictions", stats->l1.n_evictions) &&
           add_number(l1, "bytes_used", stats->l1.bytes_used) && add_number(l1, "bytes_total", stats->l1.bytes_total) &&
           cJSON_AddBoolToObject(l1, "locked", stats->l1.is_locked);
}

static bool add_l2(cJSON *root, const struct store_stats *stats)
{
    cJSON *l2 = cJSON_AddObjectToObject(root, "l2");
    const struct l2_stats *counts = stats->l2;

    return l2 && cJSON_AddBoolToObject(l2, "up", stats->l2_is_up) && add_number(l2, "commands", counts->n_commands) &&
           add_number(l2, "reads", counts->n_reads) && add_number(l2, "writes", counts->n_writes) &&
           add_number(l2, "invalidations", counts->n_invalidations) &&
           add_number(l2, "reconnects", counts->n_reconnects) && add_number(l2, "errors", counts->n_errors);
}

static bool add_sessions(cJSON *root, const struct store_stats *stats)
{
    cJSON *sessions = cJSON_AddObjectToObject(root, "sessions");

    return sessions && add_number(sessions, "fetches", stats->n_fetches) &&
           add_number(sessions, "commits", stats->n_commits) && add_number(sessions, "expired", stats->n_expired) &&
           add_number(sessions, "unsaved", stats->n_dirty) && add_number(sessions, "refused", stats->n_bad);
}

static bool add_store(cJSON *root, const struct status *status)
{
    struct store_stats stats;

    store_stats(status->store, &stats);
    return add_sessions(root, &stats) && add_l1(root, &stats) && add_l2(root, &stats);
}

/* A part of the text each. */
static bool (*const sections[])(cJSON *root, const struct status *status) = {
    add_daemon,
    add_fs,
    add_store,
};

char *status_text(void *arg)
{
    const struct status *status = arg;
    cJSON *root = cJSON_CreateObject();
    bool is_good = root;

    for (size_t i = 0; is_good && i < ARRAY_SIZE(sections); i++)
        is_good = sections[i](root, status);
    char *text = is_good ? cJSON_PrintUnformatted(root) : NULL;
    cJSON_Delete(root);
    return text;
}
