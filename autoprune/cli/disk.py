"""What a command says when a disk is full or must not be written.

Decides which errors of the operating system are about the disk, in which words they are told, and with which status:
3 where space has to be made, 2 where the place was a wrong choice. Any other such error is a bug and keeps its
traceback. Must not import anything heavy at module level.
"""

from __future__ import annotations

import errno

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOCKED = {errno.EROFS, errno.EACCES, errno.EPERM}
_WORDS = ("disk is full", "No space left on device", "Disk quota exceeded", "File too large")
_HINT = "free some space; nothing that was finished is lost, and the same command goes on"


def disk_fault(error: OSError) -> tuple[str, int] | None:
    """Returns what is told of an error of the disk, and the exit status; None where the error is another one."""
    place = f" {error.filename2 or error.filename}" if error.filename or error.filename2 else ""
    if error.errno in _FULL:
        return f"cannot write{place}: {error.strerror}; {_HINT}", 3
    if error.errno in _LOCKED:
        return f"cannot use{place}: {error.strerror}; name another place, or make this one writable", 2
    return None


def with_hint(message: str) -> str:
    """Returns a message with what to do, where it tells of a full disk."""
    return f"{message}; {_HINT}" if any(words in message for words in _WORDS) else message
