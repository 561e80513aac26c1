#include "daemon/status.h"

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>
#include <unistd.h>

#include <sessionfs/fs.h>

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

/* A section of the text each; the floors below get theirs ("l1", "l2") as they come to tell their counters. */
static bool (*const sections[])(cJSON *root, const struct status *status) = {
    add_daemon,
    add_fs,
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
