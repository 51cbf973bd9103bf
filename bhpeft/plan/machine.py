"""Memory of this machine: what a plan has to fit into where no flag says it."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch


def gpu_bytes() -> int | None:
    """Memory of the smallest visible GPU, or None."""
    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


def host_bytes() -> int:
    """Memory that processes can have in all: the machine's, or less where a container's limit is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def process_bytes() -> int:
    """What this process holds now: interpreter and libraries, where nothing has been built yet."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
