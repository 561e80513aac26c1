"""
The operations that test_files.py runs on tmpfs and on sessionfs: each gets an empty directory (bytes) and returns what
is compared; an OSError counts by its errno. No import of the harness: another user runs this file as well.
"""
import ctypes
import errno
import os
import stat

libc = ctypes.CDLL(None, use_errno=True)
OPERATIONS = []


def operation(function):
    OPERATIONS.append(function)
    return function


def result(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except OSError as error:
        return errno.errorcode[error.errno]


def make(path, data=b"", mode=0o644):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    os.write(fd, data)
    os.close(fd)
    return path


def get(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def seen(path):
    status = os.lstat(path)
    size = status.st_size if stat.S_ISREG(status.st_mode) else None
    return oct(status.st_mode), size, status.st_uid, status.st_gid


@operation
def create_makes_an_empty_file(d):
    os.close(os.open(d + b"/f", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    return seen(d + b"/f"), os.stat(d + b"/f").st_nlink, os.listdir(d)


@operation
def create_excl_over_existing(d):
    make(d + b"/f")
    return result(os.open, d + b"/f", os.O_CREAT | os.O_EXCL | os.O_RDWR)


@operation
def create_keeps_the_content_of_an_existing_file(d):
    make(d + b"/f", b"old")
    os.close(os.open(d + b"/f", os.O_CREAT | os.O_RDWR, 0o600))
    return get(d + b"/f"), seen(d + b"/f")


@operation
def opening_what_cannot_be_opened(d):
    make(d + b"/f")
    return [result(os.open, *args) for args in (
        (d + b"/missing", os.O_RDONLY), (d + b"/missing/f", os.O_CREAT | os.O_RDWR), (d + b"/f/x", os.O_RDONLY),
        (d + b"/f/x", os.O_CREAT | os.O_RDWR), (d, os.O_WRONLY), (d + b"/f", os.O_RDONLY | os.O_DIRECTORY))]


@operation
def mknod_of_a_regular_file(d):
    os.mknod(d + b"/f", stat.S_IFREG | 0o640)
    return seen(d + b"/f"), result(os.mknod, d + b"/f", stat.S_IFREG | 0o640)


@operation
def reading_and_writing_move_the_offset(d):
    fd = os.open(d + b"/f", os.O_CREAT | os.O_RDWR, 0o600)
    out = [os.write(fd, b"hello "), os.write(fd, b"world"), os.lseek(fd, 0, os.SEEK_CUR), os.read(fd, 5)]
    out += [os.lseek(fd, -5, os.SEEK_END), os.read(fd, 100), os.read(fd, 100), os.lseek(fd, 2, os.SEEK_SET)]
    out += [os.write(fd, b"LL"), os.pread(fd, 100, 0), os.lseek(fd, 0, os.SEEK_CUR)]
    os.close(fd)
    return out


@operation
def pread_and_pwrite_at_offsets(d):
    fd = os.open(d + b"/f", os.O_CREAT | os.O_RDWR, 0o600)
    out = [os.pwrite(fd, b"0123456789" * 1000, 0), os.pwrite(fd, b"abc", 4094), os.pread(fd, 8, 4092)]
    out += [os.pread(fd, 10, 9995), os.pread(fd, 10, 10000), os.pread(fd, 10, 99999), os.fstat(fd).st_size]
    out += [result(os.pwrite, fd, b"x", -1)]
    os.close(fd)
    return out


@operation
def append_always_goes_to_the_end(d):
    fds = [os.open(d + b"/f", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600) for _ in range(2)]
    for i in range(6):
        os.write(fds[i % 2], b"%d" % i)
        os.lseek(fds[i % 2], 0, os.SEEK_SET)
    for fd in fds:
        os.close(fd)
    return get(d + b"/f")


@operation
def descriptors_of_the_wrong_kind(d):
    make(d + b"/f", b"x")
    reader, writer = os.open(d + b"/f", os.O_RDONLY), os.open(d + b"/f", os.O_WRONLY)
    out = [result(os.write, reader, b"x"), result(os.read, writer, 1), result(os.ftruncate, reader, 0)]
    os.close(reader)
    os.close(writer)
    return out


@operation
def o_trunc_leaves_no_old_tail(d):
    make(d + b"/f", b"hello")
    make(d + b"/f", b"ab")
    return get(d + b"/f"), seen(d + b"/f")


@operation
def truncate_down_and_up(d):
    make(d + b"/f", b"0123456789")
    out = []
    for size in (4, 8, 0, 5000, 3):
        os.truncate(d + b"/f", size)
        out += [get(d + b"/f"), os.stat(d + b"/f").st_size]
    return out


@operation
def ftruncate_shows_to_other_descriptors(d):
    make(d + b"/f", b"0123456789")
    fds = [os.open(d + b"/f", os.O_RDWR) for _ in range(2)]
    os.ftruncate(fds[0], 3)
    out = [os.pread(fds[1], 100, 0), os.fstat(fds[1]).st_size]
    for fd in fds:
        os.close(fd)
    return out


@operation
def truncating_what_cannot_be_truncated(d):
    make(d + b"/f", b"x")
    return [result(os.truncate, d, 0), result(os.truncate, d + b"/f", -1), result(os.truncate, d + b"/missing", 0)]


@operation
def a_hole_reads_as_zeros(d):
    fd = os.open(d + b"/f", os.O_CREAT | os.O_RDWR, 0o600)
    os.pwrite(fd, b"x", 100000)
    out = [os.pread(fd, 200000, 0) == bytes(100000) + b"x", os.fstat(fd).st_size]
    os.close(fd)
    return out


@operation
def rename_moves_content_and_attributes(d):
    make(d + b"/f", b"content", 0o640)
    os.rename(d + b"/f", d + b"/g")
    return get(d + b"/g"), seen(d + b"/g"), result(os.stat, d + b"/f"), os.listdir(d)


@operation
def rename_over_an_existing_file(d):
    make(d + b"/f", b"new")
    make(d + b"/g", b"old and longer")
    fd = os.open(d + b"/g", os.O_RDONLY)
    os.rename(d + b"/f", d + b"/g")
    out = get(d + b"/g"), os.listdir(d), os.pread(fd, 100, 0)
    os.close(fd)
    return out


@operation
def rename_between_directories(d):
    os.mkdir(d + b"/d1")
    os.mkdir(d + b"/d2")
    make(d + b"/d1/f", b"x")
    os.rename(d + b"/d1/f", d + b"/d2/g")
    return os.listdir(d + b"/d1"), os.listdir(d + b"/d2"), get(d + b"/d2/g")


@operation
def renames_that_must_fail(d):
    for name in (b"/empty", b"/full", b"/full/sub", b"/dir"):
        os.mkdir(d + name)
    make(d + b"/f", b"x")
    pairs = ((b"/missing", b"/x"), (b"/f", b"/empty"), (b"/dir", b"/f"), (b"/dir", b"/full"),
             (b"/full", b"/full/sub/x"), (b"/f", b"/missing/x"), (b"/f", b"/f/x"), (b"/full/sub", b"/full"))
    out = [result(os.rename, d + old, d + new) for old, new in pairs]
    return out, sorted(os.listdir(d)), get(d + b"/f")


@operation
def renames_of_directories(d):
    for name in (b"/a", b"/a/b", b"/empty"):
        os.mkdir(d + name)
    make(d + b"/a/b/f", b"deep")
    out = [result(os.rename, d + b"/a", d + b"/empty"), get(d + b"/empty/b/f"), result(os.stat, d + b"/a")]
    out += [result(os.rename, d + b"/empty/b", d + b"/b"), os.listdir(d + b"/empty"), get(d + b"/b/f")]
    return out + [result(os.rename, d + b"/b", d + b"/b")]


@operation
def unlink_and_rmdir(d):
    for name in (b"/empty", b"/full"):
        os.mkdir(d + name)
    make(d + b"/full/f")
    make(d + b"/f")
    names = (b"/missing", b"/full", b"/f", b"/f", b"/f/x")
    out = [result(os.unlink, d + name) for name in names]
    make(d + b"/f")
    out += [result(os.rmdir, d + name) for name in (b"/missing", b"/full", b"/f", b"/empty", b"/empty", b"/f/x")]
    return out, sorted(os.listdir(d))


@operation
def mkdir_and_what_it_refuses(d):
    make(d + b"/f")
    out = [result(os.mkdir, d + name, 0o750) for name in (b"/d", b"/d", b"/f", b"/missing/d", b"/f/d", b"/d/d")]
    return out, seen(d + b"/d"), os.listdir(d + b"/d")


@operation
def names_up_to_255_bytes(d):
    long, longer = d + b"/" + b"n" * 255, d + b"/" + b"n" * 256
    make(long, b"x")
    make(d + b"/f")
    out = [get(long), [result(call, longer) for call in (os.stat, os.mkdir, os.unlink, os.rmdir)]]
    out += [result(os.open, longer, os.O_CREAT | os.O_RDWR), result(os.rename, d + b"/f", longer)]
    return out, sorted(os.listdir(d))


@operation
def chmod_and_chown(d):
    make(d + b"/f")
    out = []
    for mode in (0o600, 0o777, 0o4755, 0o2711, 0o1644, 0):
        os.chmod(d + b"/f", mode)
        out.append(seen(d + b"/f"))
    for uid, gid in ((12, -1), (-1, 34), (65534, 65534), (0, 0)):
        os.chown(d + b"/f", uid, gid)
        out.append(seen(d + b"/f"))
    os.chmod(d, 0o1777)
    return out, seen(d), result(os.chmod, d + b"/missing", 0), result(os.chown, d + b"/missing", 0, 0)


@operation
def chown_takes_suid_and_sgid_away(d):
    make(d + b"/f")
    os.chmod(d + b"/f", 0o6755)
    os.chown(d + b"/f", 12, 34)
    return seen(d + b"/f")


@operation
def fchmod_and_fchown(d):
    fd = os.open(d + b"/f", os.O_CREAT | os.O_RDWR, 0o600)
    os.fchmod(fd, 0o604)
    os.fchown(fd, 7, 8)
    os.close(fd)
    return seen(d + b"/f")


@operation
def the_umask_counts(d):
    old = os.umask(0o027)
    try:
        make(d + b"/f", mode=0o666)
        os.mkdir(d + b"/d", 0o777)
    finally:
        os.umask(old)
    return seen(d + b"/f"), seen(d + b"/d")


@operation
def times_can_be_set(d):
    make(d + b"/f")
    os.utime(d + b"/f", ns=(10**18 + 1, 10**18 + 2))
    status = os.stat(d + b"/f")
    os.utime(d + b"/f")
    return status.st_mtime_ns, os.stat(d + b"/f").st_mtime_ns > 10**18 + 2, result(os.utime, d + b"/missing")


@operation
def xattrs_of_files_and_directories(d):
    make(d + b"/f")
    os.mkdir(d + b"/d")
    out = []
    for path in (d + b"/f", d + b"/d"):
        out.append(result(os.getxattr, path, "user.a"))
        os.setxattr(path, "user.a", b"one")
        os.setxattr(path, "user.b\xe9", b"")
        os.setxattr(path, "user.big", b"\x00\xff" * 500)
        out += [os.getxattr(path, name) for name in ("user.a", "user.b\xe9", "user.big")]
        out.append(sorted(name for name in os.listxattr(path) if not name.startswith("user.session.")))
        os.removexattr(path, "user.a")
        out += [result(os.getxattr, path, "user.a"), result(os.removexattr, path, "user.a")]
    return out, result(os.setxattr, d + b"/missing", "user.a", b"x"), result(os.setxattr, d + b"/f", "nonsense.a", b"x")


@operation
def xattr_create_and_replace(d):
    make(d + b"/f")
    out = [result(os.setxattr, d + b"/f", "user.a", b"1", os.XATTR_REPLACE)]
    out += [result(os.setxattr, d + b"/f", "user.a", b"2", os.XATTR_CREATE), os.getxattr(d + b"/f", "user.a")]
    out += [result(os.setxattr, d + b"/f", "user.a", b"3", os.XATTR_CREATE), os.getxattr(d + b"/f", "user.a")]
    return out + [result(os.setxattr, d + b"/f", "user.a", b"4", os.XATTR_REPLACE), os.getxattr(d + b"/f", "user.a")]


@operation
def xattr_sizes(d):
    make(d + b"/f")
    os.setxattr(d + b"/f", "user.a", b"12345")
    out = []
    for size in (0, 4, 5, 100):
        buffer = ctypes.create_string_buffer(100)
        count = libc.getxattr(d + b"/f", b"user.a", buffer, size)
        out.append(count if count >= 0 else errno.errorcode[ctypes.get_errno()])
    count = libc.listxattr(d + b"/f", ctypes.create_string_buffer(8), 3)
    return out, count if count >= 0 else errno.errorcode[ctypes.get_errno()]


@operation
def xattrs_follow_a_rename(d):
    make(d + b"/f")
    os.setxattr(d + b"/f", "user.a", b"x")
    os.rename(d + b"/f", d + b"/g")
    return os.getxattr(d + b"/g", "user.a")


@operation
def access_as_root(d):
    make(d + b"/f", mode=0o600)
    return os.access(d + b"/f", os.R_OK | os.W_OK), os.access(d + b"/f", os.X_OK), os.access(d + b"/missing", os.F_OK)
