"""What this process runs on: in words for a report, and how many CPUs are its own."""

import itertools
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath


def usable_cpus(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """CPUs that this process may use, whatever the machine has: its affinity, the quota of its control groups
    (rounded down) and its share of a SLURM allocation, the least of them; at least 1.

    Args:
        environment: with SLURM's variables, in a job.
        root: below which `proc` and `sys` lie.
    """
    share = environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE") or ""
    slurm = [int(share)] if share.isdecimal() else []
    return max(1, min([len(os.sched_getaffinity(0)), *slurm, *map(int, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs by the quota of each control group that this process is in, versions 1 and 2; a container's own lies at the
    top of the mount, whatever `/proc` calls it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            places, files = ("", "unified"), ["cpu.max"]
        elif "cpu" in controllers.split(","):
            places, files = ("cpu", controllers), ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        inside = PurePosixPath(group.lstrip("/"))
        for place, level in itertools.product(places, (inside, *inside.parents)):
            directory = root / "sys/fs/cgroup" / place / level
            words = " ".join(_read(directory / file) for file in files).split()
            if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
                yield int(words[0]) / int(words[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def hardware() -> dict[str, str]:
    """`cpu`, `memory` and, where there are any, `gpu`: names and amounts, of this process's node."""
    import torch

    found = {"cpu": f"{usable_cpus()} cores of {_cpu_name()}", "memory": _memory()}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["gpu"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return {name: text for name, text in found.items() if text}


def _cpu_name() -> str:
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, names), platform.machine())


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"
    except (ValueError, OSError):
        return ""
