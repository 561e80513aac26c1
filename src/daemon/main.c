/*
 * The program sessionfs: reads what is wanted, hands over to the daemon.
 */
#include <errno.h>
#include <stdio.h>

#include "daemon/daemon.h"
#include "daemon/options.h"

#define EXIT_USAGE 2

static int fail(int r, const char *why)
{
    daemon_complain(why);
    return r == -EINVAL ? EXIT_USAGE : EXIT_FAILURE;
}

int main(int argc, char **argv)
{
    CLEANUP(settings_deinitp) struct settings settings = {0};
    char why[SETTINGS_WHY_MAX];

    if (settings_init(&settings) < 0)
        return fail(-ENOMEM, "out of memory");
    int r = options_parse(&settings, argc, argv, why, sizeof(why));
    if (r < 0)
        return fail(r, why);
    if (r == OPTIONS_HELP) {
        fputs(options_usage(), stdout);
        return 0;
    }
    if (r == OPTIONS_VERSION) {
        puts("sessionfs " SESSIONFS_VERSION);
        return 0;
    }
    return daemon_run(&settings);
}
