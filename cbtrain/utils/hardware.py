"""What this process runs on, in words for a report."""

import os
import platform
from pathlib import Path


def hardware() -> dict[str, str]:
    """`cpu`, `memory` and, where there are any, `gpu`: names and amounts, of this process's node."""
    import torch

    found = {"cpu": f"{len(os.sched_getaffinity(0))} cores of {_cpu_name()}", "memory": _memory()}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["gpu"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return {name: text for name, text in found.items() if text}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, names), platform.machine())


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"
    except (ValueError, OSError):
        return ""
