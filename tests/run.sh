#!/bin/sh
# Builds sessionfs three times (plain, ASan+UBSan, TSan) and runs the unit tests and the end-to-end suite on each.
#
#   sh tests/run.sh [--short] [--plain-only] [--work DIR]
#
#   --short       what CI runs: the sanitizer builds run the end-to-end files of SANITIZER_E2E only, and everything is
#                 over within 24 minutes. Without it they run all files, with three times the limits.
#   --plain-only  without the sanitizer builds
#   --work DIR    where to build and to keep the logs (default: build-tests in the source)
#
# Installs what is missing when run as root on Debian. The last line is always "N passed, N failed"; the exit status
# is 1 if anything failed. A stage that fails to build, to finish in time, or whose programs left a sanitizer report is
# a failure of its own. Nothing that was started here survives the script: processes, mounts, temporary files.

set -u
export LC_ALL=C

# End-to-end files for the sanitizer builds of --short.
SANITIZER_E2E='test_files.py test_coherence.py test_torn.py test_failure.py test_ttl.py test_listing.py test_hot_path.py test_seal.py
    test_users.py test_php.py test_cli.py test_local.py'

# Seconds. A stage never gets more than what is left of the budget.
BUDGET=1440
BUILD_LIMIT=200 UNIT_LIMIT=300 INSTALL_LIMIT=400
PLAIN_E2E_LIMIT=450 SANITIZER_E2E_LIMIT=330

ROOT=$(cd "$(dirname "$0")/.." && pwd -P) || exit 1
WORK=$ROOT/build-tests
SHORT=false PLAIN_ONLY=false

usage() {
    echo "usage: sh tests/run.sh [--short] [--plain-only] [--work DIR]" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
    --short) SHORT=true ;;
    --plain-only) PLAIN_ONLY=true ;;
    --work)
        [ $# -ge 2 ] || usage
        WORK=$2
        shift
        ;;
    *) usage ;;
    esac
    shift
done
if ! $SHORT; then
    BUDGET=5400
    PLAIN_E2E_LIMIT=$((PLAIN_E2E_LIMIT * 3)) SANITIZER_E2E_LIMIT=$((SANITIZER_E2E_LIMIT * 3))
fi
BUDGET=${SESSIONFS_TEST_BUDGET:-$BUDGET}

PYTHON=/usr/bin/python3
STARTED=$(date +%s)
RUN_ID=sessionfs-run-$$-$STARTED
TMP=
PASSED=0 FAILED=0
FAILURES=

say() {
    printf '%4ds  %s\n' "$(($(date +%s) - STARTED))" "$*"
}

fail() {
    FAILED=$((FAILED + 1))
    FAILURES="$FAILURES
  $*"
    say "FAILED: $*"
}

# ---- what was started must end -------------------------------------------------------------------------------------

# Processes of ours: they carry our mark in the environment, work in our temporary directory, name it on their command
# line (redis-server overwrites its environment), or are programs that we built. Read by single commands with a limit,
# because /proc/PID/environ of a process that hangs in a mount may hang too.
list_processes() {
    {
        timeout -s KILL 5 grep -lasF -f "$WORK/mark" /proc/[0-9]*/environ
        timeout -s KILL 5 grep -lasF -f "$WORK/paths" /proc/[0-9]*/cmdline
        timeout -s KILL 5 find /proc/[0-9]*/exe -maxdepth 0 -lname "$WORK/*"
        while IFS= read -r dir; do
            timeout -s KILL 5 find /proc/[0-9]*/cwd -maxdepth 0 \( -lname "$dir" -o -lname "$dir/*" \)
        done <"$WORK/paths"
    } 2>/dev/null | cut -d / -f 3 | sort -un | grep -vx -e $$
}

# The tests' own directories (/tmp/sfs-*), from the command lines of the processes that carry our mark; into the paths.
learn_paths() {
    for file in $(timeout -s KILL 5 grep -lasF -f "$WORK/mark" /proc/[0-9]*/environ 2>/dev/null); do
        timeout -s KILL 5 tr '\0' '\n' <"${file%environ}cmdline" 2>/dev/null
    done | grep -o '/tmp/sfs-[A-Za-z0-9_]*' | cat - "$WORK/paths" | sort -u >"$WORK/paths.new"
    mv "$WORK/paths.new" "$WORK/paths"
}

# Mounts of ours, as "MINOR MOUNTPOINT", innermost last.
list_mounts() {
    dirs="$WORK $(tr '\n' ' ' <"$WORK/paths")"
    awk -v dirs="$dirs" '
        BEGIN { n = split(dirs, dir, " ") }
        $0 !~ / - fuse[^ ]* / { next }
        { for (i = 1; i <= n; i++) if (index($5 "/", dir[i] "/") == 1) { split($3, dev, ":"); print dev[2], $5; next } }
    ' /proc/self/mountinfo
}

# Ends requests that nobody will answer, which even SIGKILL waits for.
abort_connections() {
    control=/sys/fs/fuse/connections
    own=
    if [ ! -e "$control/$1" ] && [ "$(id -u)" = 0 ] && [ -n "$TMP" ]; then
        own=$TMP/.fusectl
        mkdir -p "$own" && mount -t fusectl none "$own" 2>/dev/null && control=$own
    fi
    for minor; do
        [ ! -w "$control/$minor/abort" ] || echo 1 >"$control/$minor/abort" 2>/dev/null
    done
    [ -z "$own" ] || umount -l "$own" 2>/dev/null
}

stop_everything() {
    [ -e "$WORK/paths" ] || return 0
    learn_paths
    pids=$(list_processes)
    if [ -n "$pids" ]; then
        # shellcheck disable=SC2086 # a list of numbers
        kill -TERM $pids 2>/dev/null
        for _ in 1 2 3 4 5 6; do
            sleep 0.5
            pids=$(list_processes)
            [ -n "$pids" ] || break
        done
        # shellcheck disable=SC2086
        [ -z "$pids" ] || kill -KILL $pids 2>/dev/null
    fi
    minors=$(list_mounts | cut -d ' ' -f 1)
    # shellcheck disable=SC2086
    [ -z "$minors" ] || abort_connections $minors
    list_mounts | cut -d ' ' -f 2- | sed 's/\\\([0-7][0-7][0-7]\)/\\0\1/g' | while IFS= read -r escaped; do
        mountpoint=$(printf '%b' "$escaped")
        if [ "$(id -u)" = 0 ]; then
            timeout -s KILL 10 umount -l "$mountpoint" 2>/dev/null
        else
            timeout -s KILL 10 fusermount3 -uz "$mountpoint" 2>/dev/null
        fi
    done
    return 0
}

finish() {
    trap '' INT TERM HUP
    stop_everything
    if [ -n "$TMP" ] && [ -z "$(list_mounts)" ]; then
        # shellcheck disable=SC2046 # paths of ours, without spaces
        timeout -k 5 60 rm -rf --one-file-system $(cat "$WORK/paths") && rm -f "$WORK/paths" "$WORK/mark"
    fi
    if [ -n "$FAILURES" ]; then
        printf 'failures:%s\n' "$FAILURES"
        echo "logs: $WORK/logs"
    fi
    echo "$PASSED passed, $FAILED failed"
    [ "$FAILED" -eq 0 ]
    exit
}

# shellcheck disable=SC2317 # called by the trap
interrupted() {
    fail "interrupted"
    finish
}
trap interrupted INT TERM HUP

# ---- stages --------------------------------------------------------------------------------------------------------

# stage NAME SECONDS SIGNAL COMMAND...: runs the command with a limit; its output is $LOG, the result its exit status,
# or 124 if it did not end in time, or 125 if there was no time to start it. The command runs in the background and
# is polled: a process that hangs in a dead mount cannot be waited for, not even by timeout(1).
stage() {
    name=$1 limit=$2 signal=$3
    shift 3
    LOG=$WORK/logs/$(printf '%s' "$name" | tr ' ' '-').log
    left=$((BUDGET - $(date +%s) + STARTED))
    if [ "$left" -lt 10 ]; then
        fail "$name: skipped, the budget of $BUDGET s is used up"
        return 125
    fi
    [ "$limit" -le "$left" ] || limit=$left
    status=$WORK/status
    rm -f "$status"
    (
        SESSIONFS_RUN=$RUN_ID timeout -s "$signal" -k 10 "$limit" "$@" </dev/null >"$LOG" 2>&1 9>&-
        echo $? >"$status.new"
        mv "$status.new" "$status"
    ) 9>&- &
    give_up=$(($(date +%s) + limit + 15))
    while [ ! -e "$status" ]; do
        sleep 0.3
        if [ "$(date +%s)" -ge "$give_up" ]; then
            stop_everything
            sleep 2
            break
        fi
    done
    result=$(cat "$status" 2>/dev/null)
    case ${result:-124} in
    124 | 137) result=124 ;;
    esac
    return "$result"
}

# show_log LINES: the end of what the last stage printed.
show_log() {
    tail -n "$1" "$LOG" 2>/dev/null | sed 's/^/    | /'
}

# judge NAME STATUS KIND FILE: adds what the last stage's result file says; KIND is meson or pytest.
judge() {
    counts=$($PYTHON - "$3" "$4" "$LOG" <<'END'
import json, re, sys, xml.etree.ElementTree as tree

kind, path, log = sys.argv[1:]
passed = failed = skipped = 0
if kind == 'meson':
    for line in open(path, errors='replace'):
        test = json.loads(line)
        checks = re.search(r'Checks: (\d+), Failures: (\d+), Errors: (\d+)', test.get('stdout') or '')
        n, bad = (int(checks[1]), int(checks[2]) + int(checks[3])) if checks else (1, 0)
        if test['result'] == 'SKIP':
            skipped += 1
        elif test['result'] == 'OK':
            passed += n
        else:
            bad = max(bad, 1)
            failed += bad
            passed += max(n - bad, 0)
else:
    try:
        for suite in tree.parse(path).getroot().iter('testsuite'):
            bad = int(suite.get('failures', 0)) + int(suite.get('errors', 0))
            skip = int(suite.get('skipped', 0))
            failed += bad
            skipped += skip
            passed += max(int(suite.get('tests', 0)) - bad - skip, 0)
    except (OSError, tree.ParseError):  # pytest was killed: what it had printed by then
        for line in open(log, errors='replace'):
            word = re.search(r'(?:::\S.* |^)(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*\[ *\d+%\]', line)
            if word:
                passed += word[1] == 'PASSED'
                failed += word[1] in ('FAILED', 'ERROR')
                skipped += word[1] in ('SKIPPED', 'XFAIL')
print(passed, failed, skipped)
END
    ) || counts='0 0 0'
    # shellcheck disable=SC2086
    set -- "$1" "$2" $counts
    PASSED=$((PASSED + $3)) FAILED=$((FAILED + $4))
    [ "$4" -eq 0 ] || FAILURES="$FAILURES
  $1: $4 tests"
    say "$1: $3 passed, $4 failed, $5 skipped"
    if [ "$2" = 124 ]; then
        fail "$1: not finished in time"
    elif [ "$2" != 0 ] && [ "$4" -eq 0 ]; then
        fail "$1: exit status $2"
    elif [ $(($3 + $4)) -eq 0 ]; then
        fail "$1: ran no tests"
    fi
    [ "$2" = 0 ] || show_log 120
}

# Reports of ASan, UBSan and TSan in the unit tests go to files, or a race that fails no check would go unseen. The
# end-to-end suite looks for them itself, in the daemons' logs, so that it can tell in which test it was.
sanitizer_begin() {
    REPORTS='' to=''
    if [ "$2" = files ]; then
        REPORTS=$WORK/logs/$1.reports
        rm -rf "$REPORTS"
        mkdir -p "$REPORTS"
        to=:log_path=$REPORTS/report
    fi
    export ASAN_OPTIONS="detect_leaks=1:abort_on_error=0:exitcode=99$to"
    export UBSAN_OPTIONS="print_stacktrace=1$to"
    export TSAN_OPTIONS="halt_on_error=0:exitcode=0$to"
    [ ! -e "$ROOT/tests/tsan.supp" ] || TSAN_OPTIONS="$TSAN_OPTIONS:suppressions=$ROOT/tests/tsan.supp"
    export CK_TIMEOUT_MULTIPLIER=5
}

sanitizer_end() {
    # A program that a test killed halfway through a report leaves an empty file, or one line.
    found=$(grep -lE 'ERROR|WARNING: ThreadSanitizer|runtime error' "$REPORTS"/* 2>/dev/null)
    [ -n "$found" ] || return 0
    fail "$1: sanitizer reports in $REPORTS"
    # shellcheck disable=SC2086 # names of ours, without spaces after REPORTS
    (cd "$REPORTS" && for file in report.*; do head -n 40 "$file"; done | head -n 150 | sed 's/^/    | /')
}

# variant NAME PREFIX E2E_LIMIT SCALE E2E_FILES MESON_OPTION...: one build directory, and its tests.
variant() {
    build=$WORK/$1 prefix=$2 e2e_limit=$3 scale=$4 files=$5 variant=$1
    shift 5
    [ -e "$build/build.ninja" ] || {
        rm -rf "$build"
        stage "$variant configure" 100 TERM meson setup "$build" "$ROOT" -Dtests=enabled "$@"
        result=$?
        if [ $result != 0 ]; then
            [ $result = 125 ] || fail "$variant: meson setup (status $result)"
            show_log 40
            return
        fi
    }
    stage "$variant build" $BUILD_LIMIT TERM ninja -C "$build"
    result=$?
    if [ $result != 0 ]; then
        [ $result = 125 ] || fail "$variant: build (status $result)"
        show_log 60
        return
    fi
    say "$variant: built"

    name="$variant unit"
    sanitizer_begin "$variant-unit" files
    rm -f "$build/meson-logs/testlog.json"
    # shellcheck disable=SC2086 # $prefix is nothing, or "setarch MACHINE -R"
    stage "$name" $UNIT_LIMIT TERM $prefix meson test -C "$build" --suite unit --no-rebuild --print-errorlogs
    result=$?
    [ $result = 125 ] || judge "$name" $result meson "$build/meson-logs/testlog.json"
    stop_everything
    sanitizer_end "$name"

    name="$variant e2e"
    if [ -z "$files" ]; then
        paths=$ROOT/tests/e2e
    else
        paths=
        for file in $files; do
            if [ -e "$ROOT/tests/e2e/$file" ]; then
                paths="$paths $ROOT/tests/e2e/$file"
            else
                fail "$name: tests/e2e/$file is in SANITIZER_E2E of tests/run.sh, but not there"
            fi
        done
    fi
    sanitizer_begin "$variant-e2e" stderr
    junit=$WORK/logs/$variant-e2e.xml
    rm -f "$junit"
    # shellcheck disable=SC2086
    stage "$name" "$e2e_limit" INT \
        env TMPDIR="$TMP" SESSIONFS_BUILD="$build" SESSIONFS_TEST_SCALE="$scale" PYTHONDONTWRITEBYTECODE=1 \
        $prefix $PYTHON -m pytest $paths -v --tb=short --color=no --junitxml="$junit" \
        -p no:cacheprovider -o faulthandler_timeout=150
    result=$?
    case $result in
    77) say "$name: SKIPPED, there is no /dev/fuse: nothing can be mounted here" ;;
    125) ;;
    *) judge "$name" $result pytest "$junit" ;;
    esac
    stop_everything
}

# ---- what the tests need -------------------------------------------------------------------------------------------

# need PACKAGE COMMAND...: adds the package unless the command succeeds.
need() {
    package=$1
    shift
    "$@" >/dev/null 2>&1 || MISSING="$MISSING $package"
}

find_missing() {
    MISSING=
    need gcc command -v gcc
    need libc6-dev test -e /usr/include/stdio.h
    need meson command -v meson
    need ninja-build command -v ninja
    need pkg-config command -v pkg-config
    need libfuse3-dev pkg-config --exists fuse3
    need libhiredis-dev pkg-config --exists hiredis
    need libssl-dev pkg-config --exists libcrypto
    need libcjson-dev pkg-config --exists libcjson
    need check pkg-config --exists check
    need fuse3 command -v fusermount3
    need redis-server command -v redis-server
    need redis-tools command -v redis-cli
    need attr command -v setfattr
    need php-cli command -v php
    need openssl command -v openssl
    need python3-pytest $PYTHON -c 'import pytest'
}

install_missing() {
    DEBIAN_FRONTEND=noninteractive
    export DEBIAN_FRONTEND
    say "installing:$MISSING"
    # shellcheck disable=SC2086
    stage "install" $INSTALL_LIMIT TERM sh -c \
        'apt-get -q update && apt-get -q -y --no-install-recommends install "$@"' sh $MISSING || show_log 20
    find_missing
}

# ---- the run -------------------------------------------------------------------------------------------------------

mkdir -p "$WORK/logs" || exit 1
WORK=$(cd "$WORK" && pwd -P)
exec 9>"$WORK/lock"
if ! flock -n 9; then
    echo "another tests/run.sh uses $WORK"
    echo "0 passed, 1 failed"
    exit 1
fi
stop_everything # of a run that was killed
rm -rf "$WORK/logs" "$WORK/paths" "$WORK/mark"
mkdir -p "$WORK/logs"

# Short, because the path of a unix socket has 107 bytes at most.
if ! TMP=$(mktemp -d /tmp/sfs.XXXXXX); then
    fail "no temporary directory below /tmp"
    finish
fi
echo "$TMP" >"$WORK/paths"
echo "SESSIONFS_RUN=$RUN_ID" >"$WORK/mark"

find_missing
if [ -n "$MISSING" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    install_missing
fi
if [ -n "$MISSING" ]; then
    fail "missing packages:$MISSING (as root: apt-get install$MISSING)"
    finish
fi
if [ ! -e /dev/fuse ]; then
    say "there is no /dev/fuse (modprobe fuse; in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
fi

variant plain '' $PLAIN_E2E_LIMIT 1 '' -Dwerror=true

if ! $PLAIN_ONLY; then
    files=
    ! $SHORT || files=$SANITIZER_E2E
    variant asan '' $SANITIZER_E2E_LIMIT 0.1 "$files" -Db_sanitize=address,undefined

    # ThreadSanitizer of GCC 12 does not start where the kernel randomises addresses by more than 28 bits.
    prefix=
    bits=$(cat /proc/sys/vm/mmap_rnd_bits 2>/dev/null || echo 28)
    if [ "$bits" -gt 28 ] && setarch "$(uname -m)" -R true 2>/dev/null; then
        prefix="setarch $(uname -m) -R"
    fi
    variant tsan "$prefix" $SANITIZER_E2E_LIMIT 0.1 "$files" -Db_sanitize=thread
fi

finish
