"""How much memory a program may take: the machine's, or less where a container or a batch system says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

UNLIMITED = 1 << 60  # version 1 writes the largest page-aligned integer where there is no limit


def available_memory(device: torch.device | None = None, root: Path = Path("/")) -> int:
    """Bytes that this process may take now, on the host or, if ``device`` is a GPU, there.

    On the host it is the least of what /proc/meminfo has available and what every control group above this process
    (Docker, Kubernetes, Slurm; version 2 or 1) leaves of its limit; the page cache that a group holds is given back
    when memory is asked for, so it counts as free. ``root`` is where /proc and /sys are looked for.
    """
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return min([_of_machine(root), *_of_groups(root)])


def _of_machine(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return UNLIMITED


def _of_groups(root: Path) -> list[int]:
    """What each control group of this process leaves; version 2 has one line ``0::path``, version 1 one for memory."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's, of which only the mounted top is seen.
        inner = Path(path.strip("/"))
        for group in dict.fromkeys([top / inner, *(top / parent for parent in inner.parents), top]):
            left = _left(group, *files)
            if left is not None:
                found.append(left)
    return found


def _left(group: Path, limit: str, used: str, cache: str) -> int | None:
    """Bytes that a control group leaves of its limit, or None if it has none."""
    try:
        most, taken = (group / limit).read_text().strip(), int((group / used).read_text())
    except (OSError, ValueError):
        return None
    if not most.isdigit() or int(most) >= UNLIMITED:
        return None
    try:
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken -= int(counts.get(cache, 0))
    except (OSError, ValueError):
        pass
    return max(int(most) - taken, 0)
