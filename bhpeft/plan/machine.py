"""Memory of this machine: what a plan has to fit into where no flag says it."""

from __future__ import annotations

import os
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
