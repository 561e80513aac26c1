#!/bin/sh
# From a clean clone to a mounted session store, with a short tour of what it does.
#
#   sh packaging/quickstart.sh [DIR]          DIR: where to mount (default: ~/sessions); DIR-2 is a second instance
#   sh packaging/quickstart.sh --stop [DIR]   unmount, and stop what this script started
#
# As root on Debian it installs what is missing; any user can run it when the packages are there. Running it again is
# harmless: what is built, mounted or written already is used as it is.

set -eu

ROOT=$(cd "$(dirname "$0")/.." && pwd -P)
BUILD=$ROOT/build
PROGRAM=$BUILD/src/sessionfs
MINE=${XDG_STATE_HOME:-${HOME:-/root}/.local/state}/sessionfs-quickstart # the mounts that we made, one a line

usage() {
    echo "usage: sh packaging/quickstart.sh [DIR]
       sh packaging/quickstart.sh --stop [DIR]" >&2
    exit 2
}

die() {
    echo "quickstart: $*" >&2
    exit 1
}

title() {
    printf '\n== %s\n' "$*"
}

# show COMMAND...: prints the command, then runs it.
show() {
    printf '   $ %s\n' "$*"
    "$@" >"$SCRATCH/output" || die "failed: $*"
    sed 's/^/     /' "$SCRATCH/output"
}

absolute() {
    case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s/%s\n' "$PWD" "${1#./}" ;;
    esac
}

is_mounted() {
    [ "$(findmnt -n -o FSTYPE -M "$1" 2>/dev/null || true)" = fuse.sessionfs ]
}

unmount() {
    is_mounted "$1" || return 0
    fusermount3 -u "$1" || die "$1 is busy: close what uses it (fuser -vm $1) and run --stop again"
    n=0
    while is_mounted "$1" && [ $n -lt 50 ]; do
        sleep 0.1
        n=$((n + 1))
    done
    echo "unmounted $1"
}

# ---- --stop --------------------------------------------------------------------------------------------------------

stop() {
    [ $# -gt 0 ] || [ -s "$MINE" ] || {
        echo "nothing to stop"
        return 0
    }
    list=$MINE.stopping
    mkdir -p "$(dirname "$MINE")"
    if [ $# -gt 0 ]; then
        printf '%s\n' "$1-2" "$1" >"$list"
    else
        sort -ru "$MINE" >"$list"
    fi
    while IFS= read -r dir; do
        unmount "$dir" </dev/null
        rmdir "$dir" 2>/dev/null || true # we made it; stays if there is something in it
    done <"$list"
    if [ -e "$MINE" ]; then
        grep -vxF -f "$list" "$MINE" >"$MINE.new" || true
        mv "$MINE.new" "$MINE"
        [ -s "$MINE" ] || rm -f "$MINE"
    fi
    rm -f "$list"
    echo "The private redis-server ends with its last instance; the sessions stay in its state directory."
}

# ---- install and build ---------------------------------------------------------------------------------------------

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
    need fuse3 command -v fusermount3
    need redis-server command -v redis-server
    need redis-tools command -v redis-cli
    need attr command -v setfattr
}

install_missing() {
    find_missing
    [ -n "$MISSING" ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        die "these packages are missing:$MISSING
quickstart: install them as root: apt-get install$MISSING"
    fi
    title "Installing:$MISSING"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update </dev/null
    # shellcheck disable=SC2086 # a list of words
    apt-get -q -y --no-install-recommends install $MISSING </dev/null
    case " $MISSING " in
    *' redis-server '*)
        echo "Debian's package also starts a Redis of its own on 127.0.0.1:6379. sessionfs does not use it here;"
        echo "'systemctl disable --now redis-server' ends it."
        ;;
    esac
    find_missing
    [ -z "$MISSING" ] || die "still missing:$MISSING"
}

build() {
    if [ -x "$PROGRAM" ] && [ ! -w "$BUILD/build.ninja" ]; then
        return 0 # somebody else's build, finished
    fi
    if [ ! -w "$ROOT" ]; then
        BUILD=${XDG_CACHE_HOME:-$HOME/.cache}/sessionfs-build
        PROGRAM=$BUILD/src/sessionfs
    fi
    title "Building in $BUILD"
    if [ ! -e "$BUILD/build.ninja" ]; then
        mkdir -p "$BUILD"
        meson setup "$BUILD" "$ROOT" -Dtests=disabled >"$SCRATCH/log" 2>&1 || {
            tail -n 20 "$SCRATCH/log"
            die "meson setup failed"
        }
    fi
    ninja -C "$BUILD" --quiet || die "the build failed"
}

# ---- mount and show ------------------------------------------------------------------------------------------------

mount_at() {
    if is_mounted "$1"; then
        if timeout 5 stat "$1" >/dev/null 2>&1; then
            echo "   $1 is mounted already"
            return 0
        fi
        echo "   $1 is a mount whose daemon is gone: mounting again"
        fusermount3 -uz "$1"
    fi
    mkdir -p "$1"
    printf '   $ sessionfs %s\n' "$1"
    "$PROGRAM" "$1" </dev/null || die "could not mount $1"
    mkdir -p "$(dirname "$MINE")"
    printf '%s\n' "$1" >>"$MINE"
}

# The state directory of `local`: what the mount says, or where the defaults are.
find_socket() {
    said=$(findmnt -n -o SOURCE -M "$1" | sed -n 's/^local:\(\/.*\)/\1/p')
    for dir in "$said" "${XDG_STATE_HOME:+$XDG_STATE_HOME/sessionfs}" "${HOME:+$HOME/.local/state/sessionfs}" \
        /var/lib/sessionfs; do
        if [ -n "$dir" ] && [ -S "$dir/redis.sock" ]; then
            SOCKET=$dir/redis.sock
            return 0
        fi
    done
    return 1
}

redis() {
    redis-cli -s "$SOCKET" "$@"
}

show_redis() {
    find_socket "$1" || {
        echo "   (the private Redis was not found, so its contents are not shown)"
        return 0
    }
    echo "   every key: hashes instead of names"
    echo "   \$ redis-cli -s $SOCKET --scan --pattern 'sfs:default:*'"
    redis --scan --pattern 'sfs:default:*' >"$SCRATCH/keys"
    head -n 5 "$SCRATCH/keys" | sed 's/^/     /'
    [ "$(wc -l <"$SCRATCH/keys")" -le 5 ] || echo "     ..."
    # The demo's own key is the one that was not there before it.
    key=$(grep -vxF -f "$SCRATCH/before" "$SCRATCH/keys" | head -n 1 || true)
    [ -n "$key" ] || key=$(tail -n 1 "$SCRATCH/keys")
    echo "   what is stored: a header of 64 bytes, then ciphertext"
    echo "   \$ redis-cli -s $SOCKET GETRANGE '$key' 0 143 | od -A d -t x1z"
    redis GETRANGE "$key" 0 143 | od -A d -t x1z | sed 's/^/     /'
    redis GET "$key" >"$SCRATCH/blob"
    if grep -aqF -e "$SECRET" -e "$NAME" "$SCRATCH/blob" "$SCRATCH/keys"; then
        die "the session's name or content shows in Redis: please report this"
    fi
    echo "   Neither '$NAME' nor '$SECRET' is in it."
}

tour() {
    NAME=sess_quickstart
    SECRET=alice@example.org
    title "Two instances, one store"
    mount_at "$1"
    mount_at "$1-2"

    rm -f "$1/$NAME"
    : >"$SCRATCH/before"
    ! find_socket "$1" || redis --scan --pattern 'sfs:default:*' >"$SCRATCH/before"

    title "A session written on one is there on the other"
    printf '   $ echo %s > %s\n' "'user|s:17:\"$SECRET\";visits|i:1;'" "$1/$NAME"
    printf 'user|s:17:"%s";visits|i:1;\n' "$SECRET" >"$1/$NAME"
    sleep 0.1 # another instance may know the session of an earlier run for a moment longer
    show cat "$1-2/$NAME"

    title "Its time to live is an attribute"
    show setfattr -n user.session.ttl -v 30m "$1/$NAME"
    show getfattr --absolute-names -n user.session.ttl "$1-2/$NAME"
    show getfattr --absolute-names -n user.session.expires "$1-2/$NAME"

    title "What Redis holds"
    show_redis "$1"
}

next() {
    title "Ready: $1 (and $1-2)"
    cat <<END
   PHP, here and now:
     php -S localhost:8000 -d session.save_path=$1
   PHP behind a web server (php.ini; www-data is user 33 on Debian):
     session.save_path = "/srv/sessions"
     sessionfs /srv/sessions -o allow_other,uid=33,gid=33      (as root)
   Several machines: give them one Redis and one key
     openssl rand -hex 32 > /etc/sessionfs.key; chmod 600 /etc/sessionfs.key
     sessionfs redis://HOST:6379 /srv/sessions -o allow_other,keyfile=/etc/sessionfs.key
   Everything else: man -l $ROOT/docs/sessionfs.8
   The end:         sh $ROOT/packaging/quickstart.sh --stop
END
}

# ---- main ----------------------------------------------------------------------------------------------------------

STOP=false
if [ "${1:-}" = --stop ]; then
    STOP=true
    shift
fi
case ${1:-} in
-*) usage ;;
esac
[ $# -le 1 ] || usage

if $STOP; then
    if [ $# = 1 ]; then
        stop "$(absolute "${1%/}")"
    else
        stop
    fi
    exit
fi

[ -n "${1:-${HOME:-}}" ] || die "HOME is not set: name a directory"
DIR=$(absolute "${1:-$HOME/sessions}")
DIR=${DIR%/}
install_missing
[ -e /dev/fuse ] || die "there is no /dev/fuse: modprobe fuse (in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
build
tour "$DIR"
next "$DIR"
