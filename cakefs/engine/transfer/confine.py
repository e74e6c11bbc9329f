"""What a transfer process gives up before it reads a byte that strangers send: it can write nowhere but the store,
start no program, and gain no rights, whatever such a byte does to it. Landlock (Linux 5.19) and no_new_privs: no
privilege is needed for either, and both hold in the mount of an ordinary user, where systemd's means break fusermount3.
As root it keeps no capability but those that open the files of others, and no core file will hold the token.

Reading stays free: borrowed files may lie anywhere.
"""

import ctypes
import logging
import os
import resource
import struct
from pathlib import Path

log = logging.getLogger(__name__)

_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITIES = 0x20080522  # The third version of the call.
_KEPT = 1 << 1 | 1 << 2 | 1 << 3  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER: the store may be another user's.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # The same on all architectures.
_VERSION, _PATH_BENEATH = 1, 1
_ABI = 2  # The first that allows renames between directories.
_EXECUTE = 1
_WRITE = 1 << 1 | sum(1 << bit for bit in range(4, 14))  # Write, remove, make, rename or link between directories.
_TRUNCATE = 1 << 14  # Since the third.


def confine(store: Path) -> bool:
    """Confines the thread that calls it and those it starts later, for ever. False where the kernel cannot."""
    try:
        return _confine(store)
    except OSError as error:
        log.warning("transfers are not confined: %s", error)  # A mount that serves is worth more.
        return False


def _confine(store: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise _error("no_new_privs")
    _drop_capabilities(libc)
    abi = libc.syscall(_CREATE_RULESET, None, 0, _VERSION)
    if abi < _ABI:
        return False
    writing = _WRITE | (_TRUNCATE if abi > _ABI else 0)
    ruleset = libc.syscall(_CREATE_RULESET, struct.pack("=Q", writing | _EXECUTE), 8, 0)
    if ruleset < 0:
        raise _error("landlock_create_ruleset")
    try:
        for directory in _directories(store):
            _allow(libc, ruleset, directory, writing)
        if libc.syscall(_RESTRICT_SELF, ruleset, 0):
            raise _error("landlock_restrict_self")
    finally:
        os.close(ruleset)
    return True


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    head = struct.pack("=Ii", _CAPABILITIES, 0)
    words = ctypes.create_string_buffer(24)  # Effective, permitted and inheritable; twice, for 64 bits.
    if libc.capget(head, words):
        raise _error("capget")
    held = struct.unpack("=6I", words.raw)
    kept = [held[0] & _KEPT, held[1] & _KEPT, 0, 0, 0, 0]
    if libc.capset(head, struct.pack("=6I", *kept)):
        raise _error("capset")


def _directories(store: Path) -> set[str]:
    """The store, and where its parts are if somebody has moved them to another disk."""
    return {os.path.realpath(path) for path in (store, *store.iterdir()) if path.is_dir()}


def _allow(libc: ctypes.CDLL, ruleset: int, directory: str, access: int) -> None:
    fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        if libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", access, fd), 0):
            raise _error("landlock_add_rule")
    finally:
        os.close(fd)


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
