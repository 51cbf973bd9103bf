"""Compile what DeepSpeed compiles at first use: minutes on two busy cores, which no test's timeout shall count.

Run by `make test`; what is compiled lies in TORCH_EXTENSIONS_DIR, and is found there by every later run.
"""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.accelerator import get_accelerator  # noqa: E402

for name in ("CPUAdamBuilder", "ShareMemCommBuilder"):
    builder = get_accelerator().create_op_builder(name)
    if builder is not None and builder.is_compatible():
        builder.load(verbose=False)
