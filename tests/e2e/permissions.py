"""
What test_files.py lets another user do: root prepares a directory, the other one runs, the results on tmpfs and on
sessionfs are compared. No import of the harness: the other user runs this file, from a copy.
"""
import os

from operations import make, result


class Group:
    def __init__(self, name, prepare, run):
        self.name, self.prepare, self.run = name, prepare, run


def prepare_permissions(d, user):
    for name, mode in ((b"/closed", 0o700), (b"/readable", 0o755), (b"/open", 0o777), (b"/sticky", 0o1777)):
        os.mkdir(d + name)
        make(d + name + b"/f", b"x")
        os.chmod(d + name, mode)
    for name, mode in ((b"/secret", 0o600), (b"/public", 0o644), (b"/writable", 0o666)):
        make(d + name, b"x")
        os.chmod(d + name, mode)
    make(d + b"/mine", b"x")
    os.chmod(d + b"/mine", 0)
    os.chown(d + b"/mine", user, user)


def run_permissions(d):
    opens = [result(lambda path, flags: os.close(os.open(path, flags, 0o600)), d + name, flags)
             for name in (b"/secret", b"/public", b"/writable", b"/mine", b"/closed/f", b"/closed/new",
                          b"/readable/new")
             for flags in (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_CREAT)]
    changes = [result(os.chmod, d + b"/public", 0o666), result(os.chown, d + b"/mine", 0, 0),
               result(os.chmod, d + b"/mine", 0o600), result(os.utime, d + b"/public"),
               result(os.utime, d + b"/writable"), result(os.utime, d + b"/writable", (1, 1)),
               result(os.truncate, d + b"/public", 0), result(os.setxattr, d + b"/public", "user.a", b"x"),
               result(os.setxattr, d + b"/writable", "user.a", b"x"), result(os.listdir, d + b"/closed")]
    removals = [result(os.unlink, d + name + b"/f") for name in (b"/closed", b"/readable", b"/open", b"/sticky")]
    renames = [result(os.rename, d + b"/sticky/f", d + b"/open/g"), result(os.rename, d + b"/mine", d + b"/open/mine")]
    made = [result(os.mkdir, d + name + b"/d") for name in (b"/closed", b"/readable", b"/open")]
    reads = [result(os.access, d + name, os.R_OK) for name in (b"/secret", b"/public", b"/mine", b"/closed")]
    return [opens, changes, removals, renames, made, reads]


def prepare_suid(d, user):
    for name in (b"/write", b"/truncate", b"/chown", b"/write0"):
        make(d + name, b"x" * 10)
        os.chown(d + name, user, user)
        os.chmod(d + name, 0o6777)


def run_suid(d):
    def modes():
        return [oct(os.stat(d + name).st_mode) for name in (b"/write", b"/truncate", b"/chown", b"/write0")]

    before = modes()
    for name, data in ((b"/write", b"y"), (b"/write0", b"")):
        fd = os.open(d + name, os.O_WRONLY)
        os.write(fd, data)
        os.close(fd)
    os.truncate(d + b"/truncate", 3)
    os.chown(d + b"/chown", -1, os.getgid())
    return before, modes()


PERMISSIONS = Group("permissions", prepare_permissions, run_permissions)
SUID = Group("suid", prepare_suid, run_suid)


def run_as_other(name, directory):
    group = {"permissions": PERMISSIONS, "suid": SUID}[name]
    return group.run(os.fsencode(directory))
