"""Which layout to take, and how to cut a step into micro-steps so that it fits and hides streaming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bhpeft.plan.layouts import Layout
from bhpeft.plan.step import StepCost


@dataclass(frozen=True)
class Advice:
    """A layout and the flags that go with it; rows are of one rank, in a micro-step and in a step that answers."""

    layout: Layout
    rows: int
    accumulation: int
    checkpointing: bool
    cost: StepCost
    eval_rows: int = 0

    @property
    def flags(self) -> str:
        """The trainer's flags that ask for it."""
        flags = f"--batch_size {self.rows} --gradient_accumulation_steps {self.accumulation}"
        flags += f" --eval_batch_size {self.eval_rows} --gradient_checkpointing {str(self.checkpointing).lower()}"
        return flags + (" --load_in_4bit" if self.layout.in_4bit else "")

    @property
    def launch(self) -> str:
        """How to start it, and which lines of the YAML to change."""
        layout = self.layout
        if not layout.stage:
            precision = "" if layout.precision == "no" else f"--{layout.precision} "
            return f"python parameter_efficient_fine_tuning.py {precision}{self.flags} ...".replace("  ", " ")
        changes = []
        if layout.stage != 3:
            changes.append(f"zero_stage: {layout.stage}, zero3_init_flag: false")
        if not layout.offload:
            changes.append("offload_param_device: none, offload_optimizer_device: none")
        if layout.precision == "bf16":
            changes.append("mixed_precision: bf16")
        text = f"accelerate launch --config_file ds_zero3_cpu.yaml --num_processes {layout.ranks} "
        text += f"parameter_efficient_fine_tuning.py {self.flags} ..."
        return text + (f"\n    with {'; '.join(changes)} in a copy of the YAML" if changes else "")


def divisors(number: int) -> list[int]:
    """All divisors, the largest first."""
    return [i for i in range(number, 0, -1) if number % i == 0]


def cut(
    layout: Layout,
    rows: int,
    cost: Callable[[Layout, int, bool], StepCost],
    fits: Callable[[Layout, StepCost], bool],
    enough: Callable[[Layout, int, StepCost], bool],
) -> Advice | None:
    """The largest micro-step that fits, without checkpointing where that is enough.

    Args:
        rows: of one rank and optimizer step; a micro-step takes a divisor of them.
        cost: of a micro-step of so many rows, with checkpointing or without.
        fits: whether a layout with such a micro-step fits into memory.
        enough: whether so many rows are as good as more of them would be (streaming is hidden, or there is none).

    Returns:
        None if not even one row fits.
    """
    if not fits(layout, StepCost(0, 0, 0)):  # not even what lies there between steps: no step is looked at
        return None
    plain = _largest(layout, rows, False, cost, fits)
    if plain and (plain.rows == rows or enough(layout, plain.rows, plain.cost)):
        return plain
    saving = _largest(layout, rows, True, cost, fits)
    if plain is None or saving is None:
        return plain or saving
    # Computing everything twice in the forward pass costs a third more: worth it only where streaming is not hidden.
    return saving if saving.rows > plain.rows and not enough(layout, plain.rows, plain.cost) else plain


def _largest(layout, rows, checkpointing, cost, fits) -> Advice | None:
    sizes = divisors(rows)
    low, high = 0, len(sizes)  # sizes[high:] are known to fit
    while low < high:
        middle = (low + high) // 2
        if fits(layout, cost(layout, sizes[middle], checkpointing)):
            high = middle
        else:
            low = middle + 1
    if high == len(sizes):
        return None
    found = sizes[high]
    return Advice(layout, found, rows // found, checkpointing, cost(layout, found, checkpointing))
