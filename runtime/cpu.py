"""How many cores this process may use. Needs no engine."""

import os
from contextlib import suppress
from pathlib import Path

import psutil

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU per period, or "max"


def physical_cores() -> int:
    """Physical cores this process may use, by the machine, the process's affinity and its container's quota; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # there is none, or it is no number but "max"
        quota, period = _CGROUP_QUOTA.read_text().split()
        allowed = min(allowed, int(quota) // int(period))
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))
