"""Bytes of one rank, on its GPU and on its host, for each way of spreading a frozen model with an adapter.

n: frozen weights, T: trained weights (few), N: ranks, b: bytes of a weight in the precision. Adam keeps two moments.

    one process     n b                        T (4 + 4 + 8): weights, gradients and moments in fp32
    ZeRO-2          n b                        T b + T / N (b + 4 + 12): gradients twice, fp32 copies and moments
    ZeRO-3          n b / N + gathered         T / N (4 + 4 + 12): the adapter stays in fp32
    with offload    gathered on the GPU; shards, fp32 gradients, copies and moments on the host

Rajbhandari et al. 2020 (arXiv 1910.02054) for the stages. DeepSpeed's own estimators
(`estimate_zero3_model_states_mem_needs`) know trained weights alone, 18 bytes each, so a frozen base is overestimated
nine times; where everything is trained, ours and theirs agree (ZeRO-3: but for the fp32 adapter; tests/test_plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bhpeft.environment import DTYPES
from bhpeft.plan.model import Inventory
from bhpeft.plan.step import StepCost

GIB = 2**30
# DeepSpeed's defaults (runtime/zero/config.py), which ds_zero3_cpu.yaml leaves as they are; numbers of weights.
MAX_LIVE = 10**9  # stage3_max_live_parameters: gathered at one time
REDUCE_BUCKET = 5 * 10**8  # reduce_bucket_size: gradients gathered before they are reduced; allocated whole
# Between tensors: glibc's heap and what kernels use inside, seen at 25 to 50 % of a step's tensors, beside what the
# first steps load; CUDA's caching allocator, assumed.
WASTE = {"host": 0.30, "gpu": 0.10}
FIRST_STEPS = {"host": 40 * 2**20, "gpu": 0}
CUDA_RUNTIME = 0.6 * GIB  # context and libraries' workspaces; assumed


@dataclass(frozen=True)
class Layout:
    """One way of spreading the model."""

    precision: str  # "no" (fp32), "fp16" or "bf16"
    in_4bit: bool = False
    stage: int = 0  # of ZeRO; 0 without DeepSpeed
    ranks: int = 1
    offload: bool = False  # frozen weights and optimizer rest in the host's memory

    @property
    def name(self) -> str:
        """In words: stage, offload, precision."""
        precision = "fp32" if self.precision == "no" else self.precision
        weights = f"NF4, {precision}" if self.in_4bit else precision
        where = f"ZeRO-{self.stage}{' + offload' if self.offload else ''}" if self.stage else "one process"
        return f"{where}, {weights}"

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return DTYPES[self.precision].itemsize

    @property
    def autocast(self) -> bool:
        """Whether the Trainer casts: accelerate does so in half precision, DeepSpeed never."""
        return self.stage == 0 and self.precision != "no"


@dataclass
class Memory:
    """Bytes of one rank by what they hold: on its GPU, and in its host's memory. Without a GPU all is on the host."""

    gpu: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)

    @property
    def gpu_bytes(self) -> float:
        """All that is on the GPU."""
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> float:
        """All that is in the host's memory."""
        return sum(self.host.values())


def memory_of(layout: Layout, inventory: Inventory, work: StepCost, process: float, on_gpu: bool) -> Memory:
    """What one rank holds where it holds most.

    Args:
        work: tensors of the micro-step, or of the forward pass that answers, whichever are more.
        process: bytes of the interpreter with its libraries.
        on_gpu: whether there is a GPU beside the host.
    """
    states = model_states(layout, inventory, on_gpu)
    device = dict(states.gpu)
    device["activations"] = work.peak - work.logits
    device["logits"] = work.logits
    where = "gpu" if on_gpu else "host"
    device["allocator"] = FIRST_STEPS[where] + WASTE[where] * work.peak
    if on_gpu:
        device["runtime"] = CUDA_RUNTIME
        # from_pretrained reads a model that is not sharded into the host's memory first; a 4-bit one goes by layers.
        reading = 0 if layout.stage == 3 or layout.in_4bit else inventory.frozen_bytes(layout.width, False)
        if layout.in_4bit:
            reading = layout.width * max((*inventory.linear, *inventory.frozen))
        return Memory(device, {**states.host, "reading": reading, "process": process})
    host = {name: states.host.get(name, 0) + device.get(name, 0) for name in {**device, **states.host}}
    return Memory({}, {**host, "process": process})


def model_states(layout: Layout, inventory: Inventory, on_gpu: bool = True) -> Memory:
    """Weights, gradients and optimizer state of one rank; nothing that depends on the batch."""
    trained, ranks, width = inventory.trained, layout.ranks, layout.width
    frozen = inventory.frozen_bytes(width, layout.in_4bit) + inventory.buffers
    dequantised = width * max(inventory.linear, default=0) if layout.in_4bit else 0
    if layout.stage == 0:
        parts = {"weights": frozen, "gathered": dequantised, "adapter": 4 * trained}
        return Memory({**parts, "gradients": 4 * trained, "optimizer": 8 * trained})
    if layout.stage == 2:
        parts = {"weights": frozen, "gathered": dequantised, "adapter": width * trained}
        parts["gradients"] = (width + 4) * trained / ranks
        parts["optimizer"] = 12 * trained / ranks
        if on_gpu:
            parts["buckets"] = width * REDUCE_BUCKET
        return Memory(parts)
    shards = inventory.shard_bytes(width, layout.in_4bit, ranks) + inventory.buffers
    gathered = _gathered(layout, inventory, on_gpu) + dequantised
    resting = {"weights": shards, "adapter": 4 * trained / ranks, "optimizer": 12 * trained / ranks}
    resting["gradients"] = 4 * trained / ranks
    if not layout.offload:
        parts, host = {**resting, "gathered": gathered}, {}
    else:
        parts, host = {"gathered": gathered, "gradients": 4 * trained}, resting
    if on_gpu:
        parts["buckets"] = 4 * REDUCE_BUCKET  # in the dtype of the trained weights; on a CPU never touched
    return Memory(parts, host)


def _gathered(layout: Layout, inventory: Inventory, on_gpu: bool) -> int:
    """Bytes of frozen weights that are whole on a rank at one time, and of the largest one on its way.

    DeepSpeed gathers no more than `MAX_LIVE`, and keeps what it will need again within as many.
    """
    if layout.ranks == 1 and not (layout.offload and on_gpu):
        return 0  # the one shard is the weight
    sizes = [*inventory.frozen]
    sizes += [-(-size // 2 // layout.width) for size in inventory.linear] if layout.in_4bit else inventory.linear
    return layout.width * (min(sum(sizes), MAX_LIVE) + max(sizes))


def layouts_for(precision: str, rank_counts: list[int]) -> list[Layout]:
    """The layouts that a plan shows: whole on one GPU, then spread over ranks."""
    half = precision if precision != "no" else "bf16"
    found = [Layout("no"), Layout(half), Layout(half, in_4bit=True)]
    for ranks in rank_counts:
        if ranks > 1:
            found += [Layout(half, stage=2, ranks=ranks), Layout(half, stage=3, ranks=ranks)]
        found.append(Layout(half, stage=3, ranks=ranks, offload=True))
        found.append(Layout(half, in_4bit=True, stage=3, ranks=ranks, offload=True))
    return found
