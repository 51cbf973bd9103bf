"""The machine and the launcher a run finds itself under: precision, process group, compiler, versions, memory."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bhpeft.errors import InputError, RunError

if TYPE_CHECKING:
    from transformers import TrainingArguments

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "numpy", "pandas")
EAGER_LENGTH = 256  # tokens up to which plain attention trains faster than the fused one on a CPU, see below
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT, MAPPED = 2**27, 2**22  # bytes
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def under_deepspeed() -> bool:
    """Whether `accelerate launch` was given a DeepSpeed configuration."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes")


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def leave_together() -> None:
    """End this process once every rank has come here; in a single process do nothing.

    Rank 0 writes results after the others are done, and a rank that tears down its connections while another still
    works takes the whole run down with it. gloo's threads outlive `destroy_process_group`, and one of them that lets go
    of a tensor while Python takes itself down aborts a run which has written everything (pytorch/pytorch#179291):
    what is registered to be done at the end is done here, and Python's own farewell is not waited for.
    """
    wait_for_all()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextlib.contextmanager
def naming_lost_ranks():
    """Turn the error of a collective whose other ranks are gone into a `RunError` of one line."""
    try:
        yield
    except RuntimeError as error:
        lost = re.search(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe", f"{type(error)} {error}")
        if isinstance(error, RunError) or not lost or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        raise RunError(
            f"rank {os.environ.get('RANK')} has lost another rank, which was killed or has failed ({lost[0]}); nothing "
            "that was saved is lost: go on with --resume",
            every_rank=True,
        ) from error


def wait_for_all() -> None:
    """Go on once every rank has come here; at once in a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def prepare(settings: dict) -> tuple[str, list[str]]:
    """Choose precision and process group for this machine, before `TrainingArguments` is built.

    `accelerate launch` hands its settings over in environment variables; a flag beats them.

    Args:
        settings: every flag's value; `fp16`, `bf16` and `ddp_backend` are changed in place.

    Returns:
        The precision ("no", "fp16" or "bf16"), and one-line notes on what was asked for and cannot be had.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked data loaders would warn at every start
    _quieten()
    load_tensors_alone()
    if settings["fp16"] and settings["bf16"]:
        raise InputError("--fp16 and --bf16 are both on: choose one")
    asked = "fp16" if settings["fp16"] else "bf16" if settings["bf16"] else None
    asked = asked or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision, notes = choose_precision(
        asked, device_precisions(under_deepspeed()), frozenset() if bf16_in_hardware() else frozenset({"bf16"})
    )
    # TrainingArguments refuses --bf16 without a GPU, though CPUs have it; the launcher's variable says it instead.
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    settings["fp16"] = settings["bf16"] = False
    if not torch.cuda.is_available():
        settings["dataloader_pin_memory"] = False  # there is no device to copy to
        if "LOCAL_RANK" in os.environ:
            # Without a GPU accelerate counts one process, unless DeepSpeed is told its backend and torch the CPU.
            settings["ddp_backend"] = settings["ddp_backend"] or "gloo"
            settings["use_cpu"] = settings["use_cpu"] or not under_deepspeed()
    return precision, notes


def load_tensors_alone() -> None:
    """Have every `torch.load` of this process refuse pickles that are more than tensors and plain values, which would
    run what is in them: DeepSpeed's of its checkpoints too, which asks for any. Its own few types are let through.
    """
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    if under_deepspeed():
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum

        torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum])


def _quieten() -> None:
    """Silence what libraries say at every start or step and no user can act on."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft still asks for it
    # DeepSpeed calls collectives by names that torch 2.13 renamed: one warning a rank and step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+_tensor` is deprecated")


def device_precisions(deepspeed: bool) -> set[str]:
    """The half precisions this machine trains in: a subset of {"fp16", "bf16"}."""
    if torch.cuda.is_available():
        return {"fp16", "bf16"} if torch.cuda.is_bf16_supported(including_emulation=False) else {"fp16"}
    if deepspeed and _cpu_has_fp16():
        return {"fp16", "bf16"}
    return {"bf16"}  # accelerate trains in fp16 on accelerators alone


def bf16_in_hardware() -> bool:
    """Whether this machine multiplies in bf16, and does not emulate it: 30 times slower than fp32 on an AVX2 CPU."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _cpu_has_fp16() -> bool:
    from deepspeed.accelerator import get_accelerator  # slow to import: only where it is in use

    return bool(get_accelerator().is_fp16_supported())


def choose_precision(asked: str, available: set[str], slow: frozenset[str] = frozenset()) -> tuple[str, list[str]]:
    """Return the precision to run in, and a note where it is not the one that was asked for, or slow.

    Args:
        available: those that this device trains in.
        slow: those of them that it emulates; taken where they are asked for, not in another's place.
    """
    if asked == "no" or asked in available - slow:
        return asked, []
    if asked not in DTYPES:
        raise InputError(f"mixed precision {asked!r}: unknown here; choose no, fp16 or bf16")
    if asked in available:
        return asked, [f"{asked} is emulated on this CPU, which is slower than fp32: better without"]
    other = "bf16" if asked == "fp16" else "fp16"
    other = "no" if other in slow else other
    return other, [f"{asked} cannot be trained in on this device: using {'fp32' if other == 'no' else other} instead"]


def set_precision(training: TrainingArguments, precision: str) -> None:
    """Tell built `TrainingArguments` the precision; the Trainer compares it with DeepSpeed's configuration."""
    training.fp16 = precision == "fp16"
    training.bf16 = precision == "bf16"


def training_attention(precision: str, max_length: int, prefix: bool = False) -> str | None:
    """The attention implementation to train with where none is asked for; None is the model's own.

    On CPUs torch's fused attention (torch 2.13, bf16) takes 2 to 10 times as long in its backward pass as plain matrix
    products, until scores of (L, L) for every head outgrow the cache. With a prefix it has to be run twice.
    """
    slow = prefix or precision == "bf16"
    return "eager" if slow and not torch.cuda.is_available() and max_length <= EAGER_LENGTH else None


def keep_freed_memory() -> None:
    """Let glibc keep up to `KEPT` bytes that a step frees for the next one, where it would give them back.

    By default it maps what is larger than 128 KiB anew and hands the heap's free end back, so that activations of a few
    MB are paged in afresh in every step: up to a tenth of a small model's time on a CPU. Blocks above `MAPPED` are
    mapped all the same: between batches of many lengths the holes they leave in the heap cost more than their pages, a
    tenth of the peak memory of a model of 76 M against a twentieth of its time. What the user's environment says
    (MALLOC_..., another allocator) stands. Without glibc nothing is done.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def check_compiler(training: TrainingArguments) -> None:
    """DeepSpeed compiles its CPU optimizer at first use; say what is missing before anything is loaded."""
    plugin = training.deepspeed_plugin
    if plugin is None or not training.do_train:
        return
    offload = plugin.deepspeed_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if offload != "none" and missing and "CXX" not in os.environ:
        raise InputError(
            f"{' and '.join(missing)} not found: DeepSpeed compiles its CPU optimizer with them at first use; "
            "install them (Debian: apt-get install g++ ninja-build), or set offload_optimizer_device: none"
        )
    for lock in stale_locks():
        raise InputError(f"{lock}: left by a compile of DeepSpeed's that was killed; every run waits for it: delete it")


def stale_locks(older: float = 3600.0) -> list[Path]:
    """Locks in torch's folder of compiled extensions that are older than any compile takes (seconds).

    torch waits for such a file to vanish, without a word and without end, and nothing removes it when the process that
    made it is killed.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    now = time.time()
    return sorted(lock for lock in root.glob("**/lock") if now - lock.stat().st_mtime > older)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a run's numbers; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, str | int]:
    """What the run ran on: devices, cores, ranks."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu,
        "gpus": torch.cuda.device_count(),
        "cpu": platform.machine(),
        "cores": os.cpu_count() or 0,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
    }


def resident_bytes(at_most: bool = False) -> int:
    """Host memory that this process holds now, or has held at most so far (all that systems but Linux tell)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss, which outlives exec: it begins with the memory of the process that started this one.
        field = "VmHWM:" if at_most else "VmRSS:"
        return int(status.read_text().split(field)[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory_mib() -> dict[str, float]:
    """The most memory this process has held so far, in MiB: resident on the host, allocated on the GPU."""
    peak = {"host": round(resident_bytes(at_most=True) / 2**20, 1)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak
