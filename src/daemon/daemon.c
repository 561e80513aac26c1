#include "daemon/daemon.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <sessionfs/fs.h>
#include <sessionfs/seal.h>
#include <sessionfs/store.h>

#include "base/clock.h"
#include "base/log.h"
#include "daemon/local.h"
#include "daemon/mountpoint.h"
#include "daemon/report.h"
#include "daemon/status.h"

#define ANSWER_WAIT_MS 10000 /* for the first statfs() */
#define FLUSH_WAIT_MS  10000 /* for what is unsaved at the end */
#define FLUSH_STEP_MS  1000
#define CHECK_EVERY_S  1 /* is the private redis-server alive? */

struct instance {
    struct settings *settings;
    char *mountpoint; /* absolute; owned */
    struct stat mountpoint_st;
    struct report *report; /* to the parent; NULL in the foreground */
    char source[512];      /* without password */

    struct local *local; /* NULL: a remote source */
    struct store *store;
    struct fs *fs;
    struct status status;
    atomic_bool is_ready; /* written by ready() */

    sigset_t signals; /* blocked in every thread; sigtimedwait() of watch() gets them */
    pthread_t watcher;
};

void daemon_complain(const char *line)
{
    fprintf(stderr, "sessionfs: %s\n", line);
}

/* --- what the process is allowed --- */

static void raise_limit(int resource)
{
    struct rlimit limit;

    if (getrlimit(resource, &limit) < 0)
        return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(resource, &limit);
}

static void set_limits(bool is_debug)
{
    struct rlimit none = {0, 0};

    raise_limit(RLIMIT_NOFILE);
    raise_limit(RLIMIT_MEMLOCK);
    if (!is_debug)
        setrlimit(RLIMIT_CORE, &none); /* sessions and keys do not go to a disk */
}

/* Before any thread is made, so that each inherits it. */
static void set_signals(struct instance *instance)
{
    signal(SIGPIPE, SIG_IGN);
    signal(SIGHUP, SIG_IGN); /* there is nothing to reload */
    sigemptyset(&instance->signals);
    sigaddset(&instance->signals, SIGTERM);
    sigaddset(&instance->signals, SIGINT);
    sigprocmask(SIG_BLOCK, &instance->signals, NULL);
}

/* --- before the fork: what can be known without starting anything --- */

static int make_absolute(char **path, char *why, size_t why_size)
{
    char *absolute;

    if (!*path || **path == '/')
        return 0;
    CLEANUP(freep) char *cwd = getcwd(NULL, 0);
    if (!cwd || asprintf(&absolute, "%s/%s", cwd, *path) < 0) {
        snprintf(why, why_size, "the working directory cannot be read: %s", strerrordesc_np(errno));
        return -errno;
    }
    free(*path);
    *path = absolute;
    return 0;
}

static int prepare(struct instance *instance, char *why, size_t why_size)
{
    struct settings *settings = instance->settings;
    int r;

    r = mountpoint_check(settings->mountpoint, &instance->mountpoint, &instance->mountpoint_st, why, why_size);
    if (r == 0)
        r = mountpoint_fuse_check(settings->fuse_options, why, why_size);
    if (r == 0)
        r = make_absolute(&settings->keyfile, why, why_size);
    if (r == 0 && settings->address.is_local && !settings->address.path)
        r = local_dir_default(&settings->address.path, why, why_size);
    if (r == 0)
        r = make_absolute(&settings->address.path, why, why_size);
    if (r < 0)
        return r;
    l2_address_show(&settings->address, instance->source, sizeof(instance->source));
    return 0;
}

/* --- start --- */

static int start_local(struct instance *instance, char *why, size_t why_size)
{
    struct settings *settings = instance->settings;

    int r = local_new(&instance->local, settings->address.path, !settings->keyfile, why, why_size);
    if (r == 0 && !settings->keyfile && settings_assign(&settings->keyfile, local_key(instance->local)) < 0)
        r = -ENOMEM;
    l2_address_deinit(&settings->address);
    if (r == 0 && settings_assign(&settings->address.path, local_socket(instance->local)) < 0)
        r = -ENOMEM;
    if (r == -ENOMEM)
        snprintf(why, why_size, "out of memory");
    return r;
}

static int start_store(struct instance *instance, char *why, size_t why_size)
{
    struct settings *settings = instance->settings;
    struct seal_keys *keys;

    int r = seal_keys_load(&keys, settings->keyfile, why, why_size);
    if (r < 0)
        return r;
    const struct store_config config = {
        .address = settings->address,
        .keys = keys,
        .name_space = settings->name_space,
        .ttl_ms = settings->ttl_ms,
        .l1_size = settings->l1_size,
        .max_session = settings->max_session,
        .connections = settings->connections,
        .timeout_ms = settings->timeout_ms,
        .root_uid = instance->mountpoint_st.st_uid,
        .root_gid = instance->mountpoint_st.st_gid,
        .root_mode = S_IFDIR | (instance->mountpoint_st.st_mode & 07777),
    };
    return store_new(&instance->store, &config, why, why_size);
}

static int start_fs(struct instance *instance, char *why, size_t why_size)
{
    const struct settings *settings = instance->settings;

    instance->status = (struct status){
        .source = instance->source,
        .mountpoint = instance->mountpoint,
        .name_space = settings->name_space,
        .started_ms = clock_now_ms(),
        .store = instance->store,
    };
    const struct fs_config config = {
        .store = instance->store,
        .mountpoint = instance->mountpoint,
        .fsname = settings->fsname ? settings->fsname : instance->source,
        .fuse_options = settings->fuse_options,
        .has_uid = settings->has_uid,
        .has_gid = settings->has_gid,
        .has_umask = settings->has_umask,
        .uid = settings->uid,
        .gid = settings->gid,
        .umask = settings->umask,
        .debug = settings->is_debug,
        .default_ttl_ms = settings->ttl_ms,
        .status = status_text,
        .status_arg = &instance->status,
    };
    int r = fs_new(&instance->fs, &config, why, why_size);
    instance->status.fs = instance->fs;
    if (r < 0)
        report_explain(instance->report, why, why_size);
    return r;
}

static int start(struct instance *instance, char *why, size_t why_size)
{
    int r = 0;

    if (instance->settings->address.is_local)
        r = start_local(instance, why, why_size);
    if (r == 0)
        r = start_store(instance, why, why_size);
    if (r == 0)
        r = start_fs(instance, why, why_size);
    return r;
}

/* --- serve --- */

/* Waits for the signals that end us, and looks after the private server meanwhile. */
static void *watch(void *arg)
{
    struct instance *instance = arg;
    const struct timespec pause = {.tv_sec = CHECK_EVERY_S};

    for (;;) {
        int number =
            instance->local ? sigtimedwait(&instance->signals, NULL, &pause) : sigwaitinfo(&instance->signals, NULL);
        if (number > 0)
            break;
        if (instance->local)
            local_check(instance->local);
    }
    fs_stop(instance->fs);
    return NULL;
}

static void ready(void *arg)
{
    struct instance *instance = arg;

    instance->is_ready = true;
    log_info("%s: mounted %s", instance->mountpoint, instance->source);
    if (instance->settings->has_public_password)
        log_warning(0, "%s: has a password and can be read by everybody: chmod 600 it",
                    instance->settings->config_path);
    report_ready(instance->report);
}

static int serve(struct instance *instance, char *why, size_t why_size)
{
    int r = pthread_create(&instance->watcher, NULL, watch, instance);
    if (r) {
        snprintf(why, why_size, "no thread can be made: %s", strerrordesc_np(r));
        return -r;
    }
    r = fs_run(instance->fs, ready, instance);
    pthread_kill(instance->watcher, SIGTERM); /* it may have had its signal already; then this one stays pending */
    pthread_join(instance->watcher, NULL);
    if (instance->is_ready)
        return r < 0 ? log_error(r, "%s: serving failed", instance->mountpoint) : 0;
    if (r < 0)
        snprintf(why, why_size, "mountpoint %s: the mount does not work: %s", instance->mountpoint,
                 strerrordesc_np(-r));
    else
        snprintf(why, why_size, "mountpoint %s: ended before the mount answered", instance->mountpoint);
    return r < 0 ? r : -EINTR;
}

/* --- the end --- */

/* What was answered must reach Redis; the private one may have been ended by the same shutdown of the machine as we. */
static int flush(struct instance *instance)
{
    uint64_t deadline = clock_now_ms() + FLUSH_WAIT_MS;
    int r;

    do {
        if (instance->local)
            local_check(instance->local);
        r = store_flush(instance->store, FLUSH_STEP_MS);
    } while (r == -ETIMEDOUT && clock_now_ms() < deadline);
    if (r < 0)
        log_error(r, "%s: not everything could be saved at the end", instance->mountpoint);
    return r;
}

static int stop(struct instance *instance)
{
    int r = 0;

    if (instance->fs)
        fs_free(TAKE(instance->fs));
    if (instance->store) {
        r = instance->is_ready ? flush(instance) : 0;
        store_free(TAKE(instance->store));
    }
    local_free(TAKE(instance->local));
    if (instance->is_ready)
        log_info("%s: ended", instance->mountpoint);
    return r;
}

/* The whole life behind the fork (or without one). @why is written if it does not get ready. */
static int live(struct instance *instance, char *why, size_t why_size)
{
    if (chdir("/") < 0) {
        snprintf(why, why_size, "/: %s", strerrordesc_np(errno));
        return -errno;
    }
    umask(077);
    set_limits(instance->settings->is_debug);

    int r = start(instance, why, why_size);
    if (r == 0)
        r = serve(instance, why, why_size);
    int end = stop(instance);
    return r < 0 ? r : end;
}

static void instance_deinit(struct instance *instance)
{
    free(instance->mountpoint);
    report_free(instance->report);
}

static int run_foreground(struct instance *instance)
{
    char why[SETTINGS_WHY_MAX] = "";

    int r = live(instance, why, sizeof(why));
    if (!instance->is_ready)
        daemon_complain(why);
    return r < 0 ? 1 : 0;
}

static void run_background(struct instance *instance)
{
    char why[SETTINGS_WHY_MAX] = "";

    log_to_syslog();
    int r = live(instance, why, sizeof(why));
    if (!instance->is_ready)
        report_failure(instance->report, why);
    instance_deinit(instance);
    settings_deinit(instance->settings);
    exit(r < 0 ? 1 : 0);
}

/* The parent: the daemon says that it is ready, but does the mount answer? */
static int confirm(const struct instance *instance, pid_t pid)
{
    char line[SETTINGS_WHY_MAX + 64];

    if (mountpoint_answers(instance->mountpoint, ANSWER_WAIT_MS))
        return 0;
    snprintf(line, sizeof(line), "mountpoint %s: the mount does not answer: see the system log", instance->mountpoint);
    report_end_child(pid);
    mountpoint_detach(instance->mountpoint);
    daemon_complain(line);
    return 1;
}

static int run(struct instance *instance)
{
    char why[SETTINGS_WHY_MAX] = "";
    pid_t pid;

    if (prepare(instance, why, sizeof(why)) < 0) {
        daemon_complain(why);
        return 1;
    }
    set_signals(instance);
    if (instance->settings->is_foreground)
        return run_foreground(instance);

    int r = report_fork(&instance->report, &pid, why, sizeof(why));
    if (r == 0 && pid == 0)
        run_background(instance);
    if (r == 0)
        r = report_wait(instance->report, pid, why, sizeof(why));
    if (r < 0) {
        if (r == -ECHILD)
            mountpoint_detach(instance->mountpoint);
        daemon_complain(why);
        return 1;
    }
    return confirm(instance, pid);
}

int daemon_run(struct settings *settings)
{
    struct instance instance = {.settings = settings};

    log_set_debug(settings->is_debug);
    int status = run(&instance);
    instance_deinit(&instance);
    return status;
}
