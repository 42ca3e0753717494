"""Where evaluations run: in this process, in a pool of local processes, or on a Ray cluster.

Decides how a task reaches a process and what happens when that process dies, hangs or takes too long. Knows nothing of
what is evaluated: an executor is handed a factory, and calls the function that it makes with the arguments of `submit`.
"""

from autoprune.executors.base import Beat, Executor, Factory, InlineExecutor, Limits
from autoprune.executors.cluster import RayExecutor, Share
from autoprune.executors.processes import ATTEMPTS, ProcessExecutor

__all__ = [
    "ATTEMPTS",
    "Beat",
    "Executor",
    "Factory",
    "InlineExecutor",
    "Limits",
    "ProcessExecutor",
    "RayExecutor",
    "Share",
]
