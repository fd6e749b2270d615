"""Fences around a process: namespaces, capabilities and resource limits.

``enter_namespaces`` needs Linux 5.12 and either root with CAP_SYS_ADMIN or user namespaces that anybody may create.
Root of a container without that capability gets neither: the kernel counts no processes of root, in no namespace.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

NOBODY = 65534
FIRST_USER = 1_000_000_000  # plus the process id: users that own nothing, one for each sandbox
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the system call has this number on every machine
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CAPABILITIES_V3 = 0x20080522
SCRATCH, HOME = "/tmp", "/tmp/home"
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """Call a function of libc. Raises OSError."""
    result = getattr(libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def enter_namespaces(folder: str, visible: list[str], scratch_bytes: int) -> None:
    """See only ``visible``, read only, and an empty ``HOME``; no network, no other processes, no privileges.

    ``folder`` is an empty one to build the new root in. Returns in a child, process 1 of its own world; the caller's
    process waits for it and ends as it ends. Raises OSError where the kernel or a container forbids it.
    """
    user, group = os.geteuid(), os.getegid()
    flags = NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
    if user == 0:
        call("unshare", flags)
    else:
        call("unshare", flags | NEW_USER)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{NOBODY} {user} 1")
        write("/proc/self/gid_map", f"{NOBODY} {group} 1")
    build_root(folder, visible, scratch_bytes)
    nobodys = FIRST_USER + os.getpid()
    child = os.fork()
    if child:
        for descriptor in range(3):
            os.close(descriptor)
        end_like(os.waitpid(child, 0)[1])
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    if user == 0:
        become(nobodys)
    drop_privileges()


def write(path: str, text: str) -> None:
    """Write a small file of /proc."""
    with open(path, "w") as file:
        file.write(text)


def build_root(folder: str, visible: list[str], scratch_bytes: int) -> None:
    """Make a file system of ``visible`` and scratch space, and move into it."""

    def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
        call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())

    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    os.mkdir(folder + SCRATCH)
    limits = f"mode=1777,size={scratch_bytes},nr_inodes=4096"
    mount("tmpfs", folder + SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, limits)  # first: what is visible may lie below it
    for path in [*visible, *DEVICES]:
        target = folder + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, mode=0o755, exist_ok=True)
            mount(path, target, "none", MS_BIND | MS_REC)
            read_only(target)
        elif os.path.exists(path):
            os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
            mount(path, target, "none", MS_BIND)
    os.chdir(folder)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)  # the old root, which now lies on top of the new one
    mount("none", "/", "none", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.mkdir(HOME, 0o777)
    os.chmod(HOME, 0o777)
    os.chdir(HOME)


def read_only(target: str) -> None:
    """Make a mount and all below it read only."""
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)  # the same bits as of mount
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call("syscall", MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, size)


def end_like(status: int) -> None:
    """Exit with the same code or signal as a child did."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def leave_root() -> None:
    """Without namespaces: become a user who owns nothing, unless nobody but root can read the standard library.

    A root who may not become anybody (without CAP_SETUID, or alone in a user namespace) stays, without capabilities.
    """
    if os.geteuid() == 0 and others_can_read(json.__file__):
        os.chmod(".", 0o777)
        become(FIRST_USER + os.getpid())
    drop_privileges()


def others_can_read(file: str) -> bool:
    """Whether root can become another user, and that one read ``file``."""
    try:
        os.seteuid(NOBODY)
    except OSError:
        return False
    readable = os.access(file, os.R_OK, effective_ids=True)
    os.seteuid(0)
    return readable


def become(user: int) -> None:
    """Change from root to a user who owns nothing; to nobody where a container knows no such user."""
    os.setgroups([])
    for candidate in (user, NOBODY):
        try:
            os.setresgid(candidate, candidate, candidate)
            os.setresuid(candidate, candidate, candidate)
            return
        except OSError:
            if candidate == NOBODY:
                raise


def drop_privileges() -> None:
    """Give up every capability for good, and hide this process's memory from others of the same user."""
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def set_limits(cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    """Resource limits that cannot be raised again."""
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    sys.set_int_max_str_digits(0)  # the limit of CPU time is enough


def limit_tasks(count: int) -> None:
    """Most processes and threads of this process's user; has no effect on root."""
    resource.setrlimit(resource.RLIMIT_NPROC, (count, count))
