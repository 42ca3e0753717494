"""System metrics of a search's run: processor, memory, disk, network and GPU, by MLflow's own monitor.

Decides whether they are wanted. MLflow needs psutil for them, and nvidia-ml-py for the GPU. Must not know what the
machine is busy with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec

from autoprune.errors import TrackingError
from autoprune.tracking.connection import translated

SETTING = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"
_ANSWERS = {"true": True, "1": True, "false": False, "0": False}


def watches_machine(env: Mapping[str, str]) -> bool:
    """Returns whether a search records system metrics: as `SETTING` in `env` says, else where psutil is installed.

    Raises:
        TrackingError: The setting is neither true nor false, or it is true and psutil is missing.
    """
    wanted = env.get(SETTING, "").strip().lower()
    installed = find_spec("psutil") is not None
    if not wanted:
        return installed
    if wanted not in _ANSWERS:
        raise TrackingError(f"{SETTING} is {wanted!r}: expected true or false")
    if _ANSWERS[wanted] and not installed:
        raise TrackingError(f"{SETTING} is {wanted}, which needs psutil: pip install psutil (GPU: nvidia-ml-py)")
    return _ANSWERS[wanted]


def watch_machine(uri: str, run_id: str) -> Callable[[], None]:
    """Starts a thread that writes system metrics to a run every ten seconds; returns what ends it.

    The thread ends by itself where the store goes away or the run is no longer running. The run of a search that goes
    on continues its series.

    Raises:
        TrackingError: The store cannot be used, or the machine does not tell.
    """
    with translated("record system metrics in", uri):
        import psutil
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        try:
            monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)  # type: ignore[no-untyped-call]
        except (psutil.Error, AttributeError, RuntimeError) as error:  # a sandbox without counters
            raise TrackingError(f"cannot read this machine's system metrics: {error}") from error
        monitor.start()  # type: ignore[no-untyped-call]
    finish: Callable[[], None] = monitor.finish
    return finish
