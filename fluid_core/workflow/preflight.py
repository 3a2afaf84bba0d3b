"""What can be known to fail before any work starts: each problem is one line that names the fix."""

import os
import shutil
from pathlib import Path

from fluid_core.config import Recipe

GIB = 1024**3
MINIMUM_DISK = 3 * GIB
MINIMUM_MEMORY = 4 * GIB
MINIMUM_SHARED_MEMORY = 128 * 1024**2


def check_machine(recipe: Recipe) -> None:
    """Look at disk, memory and shared memory.

    Raises:
        ValueError: every problem found, one a line.
    """
    problems = [problem for problem in (_disk(recipe), _memory()) if problem]
    if problems:
        raise ValueError("\n       ".join(problems))


def _disk(recipe: Recipe) -> str | None:
    folder = Path(recipe.runs_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return f"{folder} cannot be written: change its owner, or set runs_dir to a folder that can"
    free = shutil.disk_usage(folder).free
    if free < MINIMUM_DISK:
        need = MINIMUM_DISK / GIB
        return f"{folder} has {free / GIB:.1f} GiB free, {need:.0f} are needed: free some, or set runs_dir to another disk"
    return None


def available_memory() -> int | None:
    """Bytes that can still be had: the machine's, or the container's limit where that is less. None: not known."""
    values = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                values.append(int(line.split()[1]) * 1024)
    except OSError:
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            # What the page cache holds counts as used and is given back when it is wanted.
            stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            values.append(int(limit) - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))
    except (OSError, ValueError):
        pass
    return min(values) if values else None


def _memory() -> str | None:
    available = available_memory()
    if available is not None and available < MINIMUM_MEMORY:
        need = MINIMUM_MEMORY / GIB
        have = available / GIB
        return f"{have:.1f} GiB of memory are available, {need:.0f} are needed: close programs or raise the container's limit"
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < MINIMUM_SHARED_MEMORY:
        return "/dev/shm has less than 128 MiB free: give the container more (docker run --shm-size=2g)"
    return None
