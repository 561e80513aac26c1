#!/bin/sh
# Measure sessionfs beside tmpfs and hiredis: starts a private redis-server and two instances, prints the table, and
# leaves nothing behind, however it ends.
#
#   sh tests/bench/run.sh [--quick] [--json FILE] [--only TEXT] [--seconds N] [--no-l1] [--stand-in]
#
#   --quick      about 20 seconds instead of 2 to 3 minutes (and the quick run of bench_l1)
#   --json FILE  everything as JSON too: {"bench": ..., "l1": ...}
#   --only TEXT  only operations with TEXT in their name; implies --no-l1
#   --seconds N  time for one operation and size
#   --no-l1      without bench_l1
#   --stand-in   both mounts are one tmpfs: tries the bench itself, needs no sessionfs (root only)
#
# BUILD is the build directory (default: build in the source tree; made if it is not there).
# TMPDIR is where the mounts are made. As root it mounts a tmpfs of its own to compare with, else it uses /dev/shm.
# Exit status: that of bench (0 measured, 1 something failed or was wrong, 2 set-up).
set -u
umask 077

root=$(cd "$(dirname "$0")/../.." && pwd)
build=${BUILD:-$root/build}
work='' tmpfs='' json='' l1=yes stand_in='' quick=''
redis='' daemon_a='' daemon_b='' running=''

fail() {
    printf 'run.sh: %s\n' "$*" >&2
    exit 2
}

is_mounted() { # never touches the mount: a dead one would answer with an error, a stuck one not at all
    grep -q " $1 " /proc/self/mountinfo
}

stop() { # PID [SIGNAL]: and wait five seconds for its end
    [ -n "$1" ] || return 0
    kill "-${2:-TERM}" "$1" 2>/dev/null
    i=0
    while kill -0 "$1" 2>/dev/null && [ $i -lt 100 ]; do
        sleep 0.05
        i=$((i + 1))
    done
    kill -KILL "$1" 2>/dev/null
    wait "$1" 2>/dev/null
}

unmount() {
    is_mounted "$1" || return 0
    if [ "$(id -u)" = 0 ]; then
        umount "$1" 2>/dev/null || umount -l "$1"
    else
        fusermount3 -u "$1" 2>/dev/null || fusermount3 -uz "$1"
    fi
}

clean() {
    status=$?
    trap - EXIT
    trap '' INT TERM HUP
    stop "$running"
    stop "$daemon_a"
    stop "$daemon_b"
    [ -n "$work" ] || exit "$status"
    unmount "$work/a"
    unmount "$work/b"
    unmount "$work/t"
    stop "$redis"
    case $tmpfs in
    /dev/shm/?*) rm -rf "$tmpfs" ;;
    esac
    # A mount that is still there is somebody's data: leave it and say so.
    if grep -q " $work/" /proc/self/mountinfo; then
        printf 'run.sh: still mounted below %s\n' "$work" >&2
        exit 2
    fi
    rm -rf --one-file-system "$work"
    exit "$status"
}
trap clean EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

set_args() {
    args=
    while [ $# -gt 0 ]; do
        case $1 in
        --quick) quick=--quick args="$args --quick" ;;
        --json) [ $# -gt 1 ] || fail "--json needs a file"; json=$2; shift ;;
        --only) [ $# -gt 1 ] || fail "--only needs a text"; only=$2 l1=; shift ;;
        --seconds) [ $# -gt 1 ] || fail "--seconds needs a number"; args="$args --seconds $2"; shift ;;
        --no-l1) l1= ;;
        --stand-in) stand_in=yes args="$args --stand-in" ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) fail "unknown option $1 (see --help)" ;;
        esac
        shift
    done
}

build_if_missing() {
    [ -x "$build/tests/bench/bench" ] && { [ -n "$stand_in" ] || [ -x "$build/src/sessionfs" ]; } && return
    [ -f "$build/build.ninja" ] || meson setup "$build" "$root" >&2 || fail "meson setup failed"
    ninja -C "$build" >&2 || fail "the build failed"
}

wait_for() { # PID LOG TEST...: until TEST holds, at most 10 seconds, while PID lives
    pid=$1 log=$2 i=0
    shift 2
    until "$@"; do
        kill -0 "$pid" 2>/dev/null || fail "$(tail -n 3 "$log")"
        i=$((i + 1))
        [ $i -lt 200 ] || fail "no answer in 10 seconds: $* ($(tail -n 3 "$log"))"
        sleep 0.05
    done
}

answers() { # a stat that hangs must not hang us
    is_mounted "$1" && timeout 2 stat -c %i "$1" >/dev/null 2>&1
}

start_redis() {
    redis-server --port 0 --unixsocket "$work/redis.sock" --unixsocketperm 700 --save '' --appendonly no \
        --dir "$work" --daemonize no >"$work/redis.log" 2>&1 &
    redis=$!
    wait_for $redis "$work/redis.log" test -S "$work/redis.sock"
}

start_instances() {
    for side in a b; do
        mkdir "$work/$side" || exit 2
        "$build/src/sessionfs" "unix://$work/redis.sock" "$work/$side" -f \
            -o "namespace=bench,keyfile=$work/key,l1_size=1G" >"$work/$side.log" 2>&1 &
        eval "daemon_$side=$!"
        wait_for $! "$work/$side.log" answers "$work/$side"
    done
}

start_stand_in() {
    mkdir "$work/a" "$work/b"
    mount -t tmpfs -o mode=0700 tmpfs "$work/a" && mount --bind "$work/a" "$work/b" || fail "cannot mount a tmpfs"
}

make_tmpfs() {
    mkdir "$work/t"
    if [ "$(id -u)" = 0 ] && mount -t tmpfs -o mode=0700 tmpfs "$work/t"; then
        tmpfs=$work/t
    else
        tmpfs=$(mktemp -d /dev/shm/sessionfs-bench.XXXXXX) || fail "no tmpfs"
    fi
}

run() { # in the background, so that a signal is answered at once; killed if it hangs
    timeout -k 5 1200 "$@" &
    running=$!
    wait "$running"
    r=$?
    running=
    return $r
}

only=
set_args "$@"
for program in redis-server timeout; do
    command -v $program >/dev/null || fail "$program is missing (apt-get install redis-server coreutils)"
done
build_if_missing
# The path as the kernel shows it, without spaces, which mountinfo would escape.
work=$(mktemp -d "$(cd "${TMPDIR:-/tmp}" && pwd -P)/sessionfs-bench.XXXXXX") || fail "no temporary directory"
case $work in
*[!A-Za-z0-9_./-]*) fail "set TMPDIR to a path of plain characters: $work" ;;
esac
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$work/key"
echo >>"$work/key"

# L1 alone in process first: nothing else shall run beside it.
status=0
echo null >"$work/l1.json"
if [ -n "$l1" ] && [ -x "$build/tests/bench/bench_l1" ]; then
    run "$build/tests/bench/bench_l1" $quick --json >"$work/l1.json" || fail "bench_l1 failed"
fi
[ "$(cat "$work/l1.json")" = null ] || args="$args --l1 $work/l1.json"

start_redis
make_tmpfs
if [ -n "$stand_in" ]; then start_stand_in; else start_instances; fi

# shellcheck disable=SC2086 # $args is a list of words without blanks
run "$build/tests/bench/bench" --a "$work/a" --b "$work/b" --tmpfs "$tmpfs" --redis "$work/redis.sock" \
    --json "$work/bench.json" ${daemon_a:+--pid $daemon_a} ${only:+--only "$only"} $args || status=$?
[ -n "$stand_in" ] || for side in a b; do
    [ ! -s "$work/$side.log" ] || { echo "log of instance $side:"; tail -n 20 "$work/$side.log"; } >&2
done
if [ -n "$json" ] && [ -s "$work/bench.json" ]; then
    { printf '{"bench": '; cat "$work/bench.json"; printf ', "l1": '; cat "$work/l1.json"; printf '}\n'; } >"$json" ||
        status=2
fi
exit $status
