/*
 * What the operator asked for: one table of settings with their types and ranges, whatever they were read from.
 * Threads: one; the struct is read-only once the daemon serves. Errors: negative errno, with @why for the operator in
 * one line that never contains the password.
 */
#ifndef SESSIONFS_DAEMON_SETTINGS_H
#define SESSIONFS_DAEMON_SETTINGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <sessionfs/l2.h>

#include "base/macros.h"

#define SETTINGS_WHY_MAX 1024

struct settings {
    char *source; /* as given; wiped on deinit */
    char *mountpoint;
    char *password; /* from the environment or the configuration; NULL if absent; wiped on deinit */
    char *keyfile;  /* NULL: the local directory's own */
    char *name_space;
    char *fsname;       /* NULL: the source */
    char *fuse_options; /* comma separated, for libfuse; "" if there are none */
    char *config_path;  /* NULL: none */
    uint64_t ttl_ms;    /* 0 never expires */
    uint64_t l1_size, max_session;
    unsigned connections, timeout_ms;
    bool has_uid, has_gid, has_umask, has_max_session;
    uint32_t uid, gid, umask;
    bool is_foreground, is_debug;
    bool is_source_explicit;   /* given on the command line: its password wins */
    bool has_public_password;  /* read from a file that everybody can read */
    struct l2_address address; /* set by settings_finish() */
};

/** settings_init() - the defaults. -ENOMEM. */
int settings_init(struct settings *settings);
void settings_deinit(struct settings *settings);
static inline void settings_deinitp(struct settings *settings)
{
    settings_deinit(settings);
}

enum setting_shape {
    SETTING_UNKNOWN,
    SETTING_FOREIGN, /* of mount(8), fstab or systemd: accepted after -o, means nothing to us */
    SETTING_FLAG,
    SETTING_TEXT,
    SETTING_VALUE, /* a number, perhaps with a unit */
    SETTING_OCTAL, /* a value whose number people write in octal */
};

/** settings_shape() - whether there is an option of that name, and whether it wants a value. */
enum setting_shape settings_shape(const char *name);

/**
 * settings_set() - one option, as after -o
 * @value: NULL for a flag
 * @why:   on failure the reason, without the option's name ("must be 1s to 3650d, or none")
 * Return: 0, -ENOENT (no such option), -EINVAL, -ENOMEM
 */
int settings_set(struct settings *settings, const char *name, const char *value, char *why, size_t why_size);

/**
 * settings_finish() - after all was read: the address, the password, what does not go together
 * Return: 0, -EINVAL (usage), -EBADMSG (the configuration file), -ENOKEY (a remote source without a key file)
 */
int settings_finish(struct settings *settings, char *why, size_t why_size);

/** settings_assign() - replace the string at @slot by a copy of @value; the old one is wiped. 0 or -ENOMEM. */
int settings_assign(char **slot, const char *value);

#endif
