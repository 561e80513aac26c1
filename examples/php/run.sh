#!/bin/sh
# Two PHP servers, each on a sessionfs mount of its own, share one session: sh run.sh [REQUESTS]
# Needs php-cli, redis-server and sessionfs (from $SESSIONFS, the build directory or the path). Leaves nothing behind.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
requests=${1:-100}
sessionfs=${SESSIONFS:-$here/../../build/src/sessionfs}
[ -x "$sessionfs" ] || sessionfs=$(command -v sessionfs) || { echo "run.sh: build sessionfs first, or set SESSIONFS" >&2; exit 1; }
for program in php redis-server fusermount3; do
    command -v "$program" >/dev/null || { echo "run.sh: $program is missing: apt install php-cli redis-server fuse3" >&2; exit 1; }
done

dir=$(mktemp -d "${TMPDIR:-/tmp}/sfs-php-XXXXXX")
pids=
finish() {
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    for mount in "$dir/a" "$dir/b"; do fusermount3 -u "$mount" 2>/dev/null || true; done
    for pid in $pids; do wait "$pid" 2>/dev/null || true; done
    [ -z "${redis:-}" ] || kill "$redis" 2>/dev/null || true
    # Never remove through a mount that would not go.
    if grep -q " $dir/" /proc/self/mountinfo; then echo "run.sh: something is still mounted below $dir" >&2; else rm -rf "$dir"; fi
}
trap finish EXIT
trap 'exit 1' INT TERM

mkdir "$dir/a" "$dir/b"
(umask 077; head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$dir/key")
redis-server --port 0 --unixsocket "$dir/redis.sock" --dir "$dir" --save '' --logfile "$dir/redis.log" &
redis=$!
i=0
until redis-cli -s "$dir/redis.sock" ping >/dev/null 2>&1; do
    i=$((i + 1)); [ "$i" -lt 100 ] || { echo "run.sh: redis-server does not answer" >&2; exit 1; }
    sleep 0.05
done

port=${PORT:-8001}
urls=
for name in a b; do
    "$sessionfs" "unix://$dir/redis.sock" "$dir/$name" -o "keyfile=$dir/key"  # returns when the mount answers
    mkdir -p "$dir/$name/php" # one directory of the shared namespace; absent, not empty, while nothing is mounted
    php -d session.save_path="$dir/$name/php" -S "127.0.0.1:$port" "$here/session.php" >"$dir/$name.log" 2>&1 &
    pids="$pids $!"
    urls="$urls http://127.0.0.1:$port"
    i=0
    until php -r "exit(@fsockopen('127.0.0.1', $port) ? 0 : 1);"; do
        i=$((i + 1)); [ "$i" -lt 100 ] || { cat "$dir/$name.log" >&2; exit 1; }
        sleep 0.05
    done
    port=$((port + 1))
done
# shellcheck disable=SC2086 # words on purpose
php "$here/client.php" "$requests" $urls
