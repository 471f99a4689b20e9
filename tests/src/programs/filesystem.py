"""What a program sees of the file system that it runs on: one line per fact, the same on any overlay of the same layers.

The layers below (`hermes_tests::programs`) have everything under /cases. Times, free space, process ids and device
numbers are never printed, only how they relate.
"""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_APPEND_FL = 0x80086601, 0x40086602, 0x20
FICLONE, FIGETBSZ = 0x40049409, 2
ROOT = "/cases"
FACTS = []


def fact(function):
    """A function whose answer is one line."""
    FACTS.append(function)
    return function


def attempt(function, *arguments, **named):
    """What a call gives, or the name of its error."""
    try:
        return function(*arguments, **named)
    except OSError as error:
        return errno.errorcode[error.errno]


def at(name):
    return f"{ROOT}/{name}"


def read(name):
    with open(at(name), "rb") as file:
        return file.read()


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def write(name, data, flags=os.O_WRONLY):
    file = os.open(at(name), flags, 0o644)
    try:
        return os.write(file, data)
    finally:
        os.close(file)


def look(name):
    """Everything of stat(2) that does not depend on where or when. Every file system has its own size of folders, and
    overlayfs its own count of their links, which is 1 for those that several layers have."""
    found = os.lstat(at(name))
    size = () if stat.S_ISDIR(found.st_mode) else (found.st_nlink, found.st_size)
    return (oct(found.st_mode), found.st_uid, found.st_gid, found.st_rdev, found.st_mtime_ns, *size)


def rename2(old, new, flags):
    if LIBC.renameat2(AT_FDCWD, at(old).encode(), AT_FDCWD, at(new).encode(), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return "done"


def as_user(user, function):
    """What `function` gives in a process of another user."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        os.write(writer, repr(attempt(function)).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as answer:
        return answer.read().decode()


# --- what the layers hold -----------------------------------------------------------------------------------------


@fact
def every_entry():
    names = sorted(os.path.relpath(os.path.join(top, name), ROOT) for top, dirs, files in os.walk(ROOT) for name in dirs + files)
    return len(names), digest(repr([(name, look(name)) for name in names]).encode())


@fact
def whiteouts_and_opaque_folders():
    return os.path.lexists(at("deleted")), sorted(os.listdir(at("opaque"))), sorted(os.listdir(at("replaced")))


@fact
def hard_links():
    inodes = {os.stat(at(f"links/{name}")).st_ino for name in "abc"}
    return len(inodes), os.stat(at("links/a")).st_nlink


@fact
def directory_entries_name_their_inodes():
    entries = list(os.scandir(at("links"))) + list(os.scandir("/usr/bin"))
    return all(entry.inode() == entry.stat(follow_symlinks=False).st_ino for entry in entries)


@fact
def one_device():
    here = os.stat(ROOT).st_dev
    return [name for name in ("data/large", "links/a", "tree", "to", "/etc/passwd") if os.lstat(os.path.join(ROOT, name)).st_dev != here]


@fact
def device_fifo_and_link():
    with open(at("null"), "wb") as null:
        null.write(b"nothing")
    kinds = [stat.S_IFMT(os.lstat(at(name)).st_mode) for name in ("null", "fifo", "to")]
    return kinds, os.readlink(at("to")), read("to")[:4], os.lstat(at("null")).st_rdev


@fact
def attributes_of_files():
    names = sorted(os.listxattr(at("data/attributes")))
    return [(name, os.getxattr(at("data/attributes"), name)) for name in names], os.listxattr(at("data/large"))


@fact
def access_by_other_users():
    ways = [lambda: read("data/private"), lambda: read("data/listed"), lambda: os.listdir(at("closed")), lambda: read("closed/inside")]
    return [as_user(user, way) for user in (1000, 1001) for way in ways]


@fact
def block_sizes():
    found = os.stat(at("data/large"))
    return found.st_blksize, os.statvfs(ROOT).f_namemax, os.statvfs(ROOT).f_bsize


# --- reading ------------------------------------------------------------------------------------------------------


@fact
def reads():
    file = os.open(at("data/large"), os.O_RDONLY)
    size = os.fstat(file).st_size
    pieces = [os.pread(file, 5000, offset) for offset in (0, 4095, size // 2 + 1, size - 10, size, size + 5)]
    return digest(b"".join(pieces)), [len(piece) for piece in pieces], digest(read("data/large"))


@fact
def direct_reads():
    file = attempt(os.open, at("data/large"), os.O_RDONLY | os.O_DIRECT)
    if isinstance(file, str):
        return file
    buffer = mmap.mmap(-1, 1 << 16)
    count = attempt(os.preadv, file, [buffer], 1 << 16)
    return count, digest(buffer[:])


@fact
def maps():
    with open(at("data/large"), "rb") as file:
        private = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        shared = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        private[7] = private[7] ^ 0xFF
        return digest(private[:]), digest(shared[:]), attempt(mmap.mmap, file.fileno(), 0, flags=mmap.MAP_SHARED)


@fact
def other_ways_to_read():
    source = os.open(at("data/large"), os.O_RDONLY)
    target = os.open(at("copied"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    sent = attempt(os.sendfile, target, source, 0, 100_000)
    ends = [attempt(os.lseek, source, 5, whence) for whence in (os.SEEK_DATA, os.SEEK_HOLE)]
    advice = attempt(os.posix_fadvise, source, 0, 0, os.POSIX_FADV_DONTNEED)
    return sent, digest(read("copied")), ends, attempt(os.fsync, source), advice


@fact
def copies_by_the_kernel():
    source = os.open(at("data/large"), os.O_RDONLY)
    target = os.open(at("copied"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    return attempt(os.copy_file_range, source, target, 100_000, 0), attempt(fcntl.ioctl, target, FICLONE, source)


@fact
def copies_by_programs():
    subprocess.run(["cp", "--archive", at("data/large"), at("copy-of-large")], check=True)
    shutil.copy2(at("data/large"), at("other-copy"))
    return look("copy-of-large") == look("data/large"), digest(read("copy-of-large")), digest(read("other-copy"))


@fact
def locks_on_what_is_below():
    file = os.open(at("data/locked"), os.O_RDONLY)
    other = os.open(at("data/locked"), os.O_RDONLY)
    answers = [attempt(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB), attempt(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB)]
    answers.append(attempt(fcntl.lockf, file, fcntl.LOCK_SH | fcntl.LOCK_NB))
    return answers + [attempt(fcntl.fcntl, file, fcntl.F_SETLEASE, fcntl.F_RDLCK)]


# --- copy-up ------------------------------------------------------------------------------------------------------


@fact
def what_copy_up_keeps():
    answers = []
    changes = {
        "append": lambda name: write(name, b"more", os.O_WRONLY | os.O_APPEND),
        "mode": lambda name: os.chmod(at(name), 0o4711),
        "owner": lambda name: os.chown(at(name), 1000, 1001),
        "time": lambda name: os.utime(at(name), ns=(1, 2_000_000_003)),
        "attribute": lambda name: os.setxattr(at(name), "user.new", b"value"),
        "shorter": lambda name: os.truncate(at(name), 3),
        "longer": lambda name: os.truncate(at(name), 10_000),
        "hole": lambda name: LIBC.fallocate(os.open(at(name), os.O_RDWR), 3, ctypes.c_long(0), ctypes.c_long(2)),
        "nothing": lambda name: os.close(os.open(at(name), os.O_RDWR)),
    }
    for name, change in changes.items():
        file = f"copy-up/{name}"
        before, done = look(file), attempt(change, file)
        after = look(file)
        kept = [old == new for old, new in zip(before, after)]
        answers.append((name, done, kept, after[:4], digest(read(file)), sorted(os.listxattr(at(file)))))
    return answers


@fact
def inode_numbers_over_copy_up():
    before = os.stat(at("copy-up/same"))
    write("copy-up/same", b"x")
    after = os.stat(at("copy-up/same"))
    return before.st_ino == after.st_ino, before.st_dev == after.st_dev


@fact
def a_descriptor_from_before_copy_up():
    old = os.open(at("copy-up/old"), os.O_RDONLY)
    before = mmap.mmap(old, 0, prot=mmap.PROT_READ)
    write("copy-up/old", b"NEW!")
    return os.pread(old, 4, 0), before[:4], read("copy-up/old")[:4]


@fact
def copy_up_by_many_at_once():
    threads = [threading.Thread(target=write, args=("copy-up/many", b"x", os.O_WRONLY | os.O_APPEND)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return digest(read("copy-up/many"))


@fact
def hard_links_over_copy_up():
    count = attempt(os.link, at("links/a"), at("links/new"))
    write("links/a", b"changed")
    inodes = [os.stat(at(f"links/{name}")).st_ino for name in ("a", "new", "b", "c")]
    alike = [inode == inodes[0] for inode in inodes]
    links = [os.stat(at(f"links/{name}")).st_nlink for name in ("a", "new", "b", "c")]
    os.unlink(at("links/b"))
    return count, alike, links, [digest(read(f"links/{name}")) for name in ("a", "new", "c")], os.stat(at("links/c")).st_nlink


@fact
def permission_to_change():
    return [as_user(1000, lambda: write(name, b"x")) for name in ("data/private", "data/locked", "data/writable")], digest(read("data/writable"))


@fact
def attributes_can_go():
    os.removexattr(at("data/attributes"), "user.first")
    return sorted(os.listxattr(at("data/attributes"))), attempt(os.getxattr, at("data/attributes"), "user.first")


@fact
def private_attributes_are_not_shown():
    return attempt(os.getxattr, at("copy-up/append"), "trusted.overlay.origin"), [name for name in os.listxattr(at("copy-up")) if "overlay" in name]


# --- names --------------------------------------------------------------------------------------------------------


@fact
def renames_of_files():
    answers = [attempt(os.rename, at("names/one"), at("names/renamed")), digest(read("names/renamed")), os.path.exists(at("names/one"))]
    answers += [attempt(rename2, "names/two", "names/three", flags) for flags in (RENAME_NOREPLACE, RENAME_EXCHANGE)]
    answers += [digest(read("names/two")), digest(read("names/three"))]
    answers += [attempt(os.rename, at("names/two"), at("names/three")), sorted(os.listdir(at("names")))]
    return answers + [attempt(rename2, "names/renamed", "names/again", RENAME_WHITEOUT), sorted(os.listdir(at("names")))]


@fact
def renames_of_folders():
    answers = [attempt(os.rename, at("tree"), at("tree-2")), sorted(os.listdir(at("tree")))]
    os.mkdir(at("fresh"))
    write("fresh/file", b"data", os.O_WRONLY | os.O_CREAT)
    answers += [attempt(os.rename, at("fresh"), at("fresh-2")), attempt(os.rename, at("fresh-2"), at("tree/sub"))]
    answers.append(attempt(rename2, "fresh-2", "tree", RENAME_EXCHANGE))
    shutil.move(at("tree"), at("tree-2"))
    found = sorted(os.path.join(top, name) for top, dirs, files in os.walk(at("tree-2")) for name in dirs + files)
    return answers + [os.path.exists(at("tree")), found]


@fact
def deleted_and_made_again():
    os.unlink(at("again/file"))
    answers = [os.path.exists(at("again/file")), sorted(os.listdir(at("again")))]
    write("again/file", b"new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    answers += [read("again/file"), attempt(os.rmdir, at("again"))]
    shutil.rmtree(at("again"))
    os.mkdir(at("again"))
    answers.append(os.listdir(at("again")))
    os.symlink("/nowhere", at("again/file"))
    os.unlink(at("replaced/new"))
    os.mkdir(at("replaced/new"))
    return answers + [os.readlink(at("again/file")), sorted(os.listdir(at("replaced")))]


@fact
def group_of_new_files():
    write("shared/new", b"", os.O_WRONLY | os.O_CREAT)
    os.mkdir(at("shared/folder"))
    return look("shared/new")[:3], look("shared/folder")[:3]


@fact
def sticky_folders():
    return as_user(1000, lambda: os.unlink(at("sticky/theirs"))), as_user(1000, lambda: os.unlink(at("sticky/mine")))


@fact
def special_files():
    os.mkfifo(at("new-fifo"))
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(at("new-socket"))
    nameless = os.open(ROOT, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(nameless, b"nameless")
    flags = 0x400  # AT_SYMLINK_FOLLOW
    linked = LIBC.linkat(AT_FDCWD, f"/proc/self/fd/{nameless}".encode(), AT_FDCWD, at("named").encode(), flags)
    reader = os.open(at("fifo"), os.O_RDWR)
    os.write(reader, b"through")
    return linked, read("named"), os.read(reader, 7), attempt(os.mknod, at("new-null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))


# --- flags --------------------------------------------------------------------------------------------------------


def flags_of(name):
    file = os.open(at(name), os.O_RDONLY)
    try:
        return int.from_bytes(fcntl.ioctl(file, FS_IOC_GETFLAGS, bytes(8))[:4], sys.byteorder)
    finally:
        os.close(file)


def set_flags(name, flags):
    file = os.open(at(name), os.O_RDONLY)
    try:
        fcntl.ioctl(file, FS_IOC_SETFLAGS, flags.to_bytes(8, sys.byteorder))
        return "done"
    finally:
        os.close(file)


@fact
def flags_of_files_below():
    return attempt(flags_of, "data/flags")


@fact
def flags_can_be_set():
    write("data/flags", b"x")
    flags = flags_of("data/flags")
    answers = [hex(flags), attempt(set_flags, "data/flags", flags | FS_APPEND_FL), attempt(write, "data/flags", b"x")]
    answers += [attempt(write, "data/flags", b"x", os.O_WRONLY | os.O_APPEND), attempt(os.unlink, at("data/flags"))]
    return answers + [attempt(set_flags, "data/flags", flags), attempt(os.unlink, at("data/flags"))]


# --- execution ----------------------------------------------------------------------------------------------------


@fact
def running_programs_are_busy():
    answers = []
    for program in (at("sleep"), "/bin/sleep"):
        if not os.path.exists(program):
            shutil.copy("/bin/sleep", program)
        with subprocess.Popen([program, "60"]) as running:
            answers += [attempt(os.open, program, flags) for flags in (os.O_WRONLY, os.O_RDWR | os.O_TRUNC)]
            answers = [answer if isinstance(answer, str) else "opened" for answer in answers]
            answers.append(attempt(os.rename, program, program + ".moved"))
            running.kill()
        answers.append(subprocess.run([program + ".moved", "0"], check=False).returncode)
    return answers


def main():
    for function in FACTS:
        try:
            answer = function()
        except Exception as error:  # Also a way to answer, if it is the same everywhere.
            answer = f"{type(error).__name__}: {error}"
        print(f"{function.__name__.replace('_', ' ')}: {answer}", flush=True)


if __name__ == "__main__":
    main()
