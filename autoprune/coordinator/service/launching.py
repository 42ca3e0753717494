"""Starts a program that ends with its parent and keeps to its share of the cores.

Run as a script, so that what it sets holds before the program begins: `launching.py PARENT CPUS PROGRAM ARGUMENT...`
with the process id of the parent and the numbers of the cores (`0,1`; `-` for all). Imports the standard library
alone. On Linux the kernel sends the program SIGTERM when its parent dies, however that happens; elsewhere a program
whose parent is killed goes on until it is ended by hand.
"""

from __future__ import annotations

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def launch(parent: int, cpus: str, command: list[str]) -> None:
    """Becomes `command`."""
    if sys.platform == "linux":
        import ctypes

        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if cpus != "-":
            os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    if os.getppid() != parent:  # it died before this process could be told
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    launch(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
