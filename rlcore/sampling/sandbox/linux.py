"""What Linux gives a process to give up its own rights, by ctypes and without being root.

Each function raises OSError where the kernel refuses. They are one-way: there is no way back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterable, Mapping

NOBODY = 65534
_INNER_ID = 1000  # not 0: whoever is root inside gets all rights inside with every exec

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
NAMESPACES = {"mount": 0x00020000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000}
NAMESPACES["net"] = 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 1 << 14, 1 << 18

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# how many of the rights on files an ABI version knows, from version 1 on
_FILE_RIGHTS = (13, 14, 15, 15, 16)
_READ, _READ_FILE, _READ_AND_WRITE_FILE = 0b1101, 0b100, 0b110

# numbers of system calls that no program needs and that have let programs out
_NEEDLESS = {
    "x86_64": (
        "ptrace 101, mount 165, umount2 166, pivot_root 155, keyctl 250, add_key 248, "
        "request_key 249, unshare 272, perf_event_open 298, open_by_handle_at 304, setns 308, "
        "process_vm_readv 310, process_vm_writev 311, kcmp 312, bpf 321, userfaultfd 323, "
        "io_uring_setup 425, pidfd_getfd 438"
    ),
    "aarch64": (
        "ptrace 117, mount 40, umount2 39, pivot_root 41, keyctl 219, add_key 217, "
        "request_key 218, unshare 97, perf_event_open 241, open_by_handle_at 265, setns 268, "
        "process_vm_readv 270, process_vm_writev 271, kcmp 272, bpf 280, userfaultfd 282, "
        "io_uring_setup 425, pidfd_getfd 438"
    ),
}
# (AUDIT_ARCH, socket, clone, clone3)
_ARCHITECTURES = {"x86_64": (0xC000003E, 41, 56, 435), "aarch64": (0xC00000B7, 198, 220, 435)}

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _prctl(option: int, *arguments: int) -> None:
    words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:4]]
    _checked(_libc.prctl(option, *words))


def die_with_parent() -> None:
    """Be killed when the thread that started this process ends."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Be the parent of whatever below this process loses its own."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide_memory(hidden: bool = True) -> None:
    """Nobody without root's rights reads this process's memory and files, or traces it.

    Forks inherit it; nor does such a process reach all of its own /proc/self.
    """
    _prctl(_PR_SET_DUMPABLE, int(not hidden))


def leave_root() -> None:
    """Become nobody."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def unshare(names: Iterable[str]) -> None:
    """Get namespaces of one's own; of a pid namespace the next child is the first process."""
    names, flags = set(names), 0
    for name in names:
        flags |= NAMESPACES[name]
    user, group = os.getuid(), os.getgid()
    _checked(_libc.unshare(flags))
    if "user" in names:
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{_INNER_ID} {user} 1"),
            ("gid_map", f"{_INNER_ID} {group} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(text)


def mount(kind: str, place: str, options: str = "") -> None:
    """Mount a file system that nobody outside this mount namespace sees."""
    _checked(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    _checked(_libc.mount(kind.encode(), place.encode(), kind.encode(), flags, options.encode()))


def drop_capabilities() -> None:
    """Lose all rights of root, and never gain any by running another program."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    header = struct.pack("=Ii", 0x20080522, 0)
    _checked(_libc.capset(header, bytes(24)))


def set_limits(limits: Mapping[str, int]) -> None:
    """Set resource limits, none above what holds already."""
    for name, wanted in limits.items():
        which = getattr(resource, name)
        ceiling = resource.getrlimit(which)[1]
        if ceiling != resource.RLIM_INFINITY:
            wanted = min(wanted, ceiling)
        # other systems than Linux have no limit on some of these
        with contextlib.suppress(*(() if sys.platform == "linux" else (ValueError, OSError))):
            resource.setrlimit(which, (wanted, wanted))


def landlock_version() -> int:
    """The Landlock ABI's version; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    version = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(version, 0)


def landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Reach no file but these and what lies below them; no TCP and no signals out, where known.

    Nor does a process so confined trace, or read the memory of, one that is not.
    """
    version = landlock_version()
    if not version:
        raise OSError("no Landlock here")
    all_rights = (1 << _FILE_RIGHTS[min(version, len(_FILE_RIGHTS)) - 1]) - 1
    attributes = [all_rights, *([0b11] if version >= 4 else []), *([0b11] if version >= 6 else [])]
    packed = struct.pack(f"={len(attributes)}Q", *attributes)
    rules = _checked(
        _libc.syscall(_LANDLOCK_CREATE, packed, ctypes.c_size_t(len(packed)), ctypes.c_uint32(0))
    )
    for paths, rights in ((readable, _READ), (writable, all_rights)):
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                _allow(rules, path, rights)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _checked(_libc.syscall(_LANDLOCK_RESTRICT, rules, ctypes.c_uint32(0)))
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        rights &= _READ_AND_WRITE_FILE if rights != _READ else _READ_FILE | 1
    rule = struct.pack("=Qi", rights, place)
    _checked(_libc.syscall(_LANDLOCK_ADD, rules, 1, rule, ctypes.c_uint32(0)))
    os.close(place)


def seccomp() -> None:
    """Refuse system calls that no program needs, new namespaces, and sockets but local ones."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(f"no filter for {machine}")
    architecture, socket, clone, clone3 = _ARCHITECTURES[machine]
    needless = [int(entry.split()[1]) for entry in _NEEDLESS[machine].split(", ")]
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000  # EPERM
    code = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, kill), (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000), (end, 0, 0, refuse),  # x32's numbers
        # glibc goes back to clone, whose flags can be seen
        (equal, 0, 1, clone3), (end, 0, 0, 0x00050026),
        (equal, 0, 4, clone), (load, 0, 0, 16), (any_bit, 0, 1, 0x7E020000),
        (end, 0, 0, refuse), (end, 0, 0, allow),
        (equal, 0, 4, socket), (load, 0, 0, 16), (equal, 0, 1, 1),  # AF_UNIX
        (end, 0, 0, allow), (end, 0, 0, refuse),
    ]  # fmt: skip
    for number in needless:
        code += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    code.append((end, 0, 0, allow))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(filters))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    address = ctypes.create_string_buffer(program)
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(address))
