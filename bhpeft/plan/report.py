"""The plan of a run, as a record, a table and sentences."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from bhpeft.adapters import adopt_settings, base_model_of
from bhpeft.adapters.architectures import attention_shape
from bhpeft.adapters.posterior import TOKENS, rows_at_once
from bhpeft.base_model import check_positions, load_config
from bhpeft.config import Run, adopt_task
from bhpeft.environment import DTYPES, is_main_process, resident_bytes, under_deepspeed
from bhpeft.files import write_atomic
from bhpeft.plan import machine
from bhpeft.plan.advice import Advice, cut
from bhpeft.plan.layouts import GIB, Layout, Memory, layouts_for, memory_of
from bhpeft.plan.model import meta_model, question_of
from bhpeft.plan.speed import PASSES, Rates, break_even_tokens, measure_rates, step_seconds
from bhpeft.plan.step import FakeStep, StepCost, shallow

DEEPSPEED_PROCESS = 180 * 2**20  # DeepSpeed, process group and engine beside the other libraries; seen on Linux
SPARE = 0.95  # of the memory there is, what a plan may take
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
COLUMNS = {
    "weights": "weights", "gathered": "gathered", "adapter": "adapter", "gradients": "grads", "optimizer": "Adam",
    "activations": "activ.", "logits": "logits", "allocator": "waste",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One layout of the plan: its memory, and whether it fits; None where the limit is not known."""

    layout: Layout
    memory: Memory
    fits: bool


class Plan:
    """A run's plan. Nothing is computed before it is asked for, and no weight is loaded."""

    def __init__(self, run: Run):
        self.process = resident_bytes()
        self.run = run
        if run.adapter.adapter_path:
            adopt_settings(run.adapter)
            adopt_task(run)
        if "flash" in (run.base.attn_implementation or "") and run.plan.gpu_memory:
            # Not to be had on a machine without that GPU; it keeps as little as the fused attention that torch has.
            run.base.attn_implementation = "sdpa"
        self.base_name = run.base.base_model or base_model_of(run.adapter.adapter_path)
        self.config = load_config(self.base_name, run.base.revision)
        self.question = question_of(run, self.config)
        check_positions(self.config, run.data.max_length)
        found = machine.gpu_bytes()
        self.gpu_limit = run.plan.gpu_memory * GIB if run.plan.gpu_memory else found
        self.on_gpu = self.gpu_limit is not None
        if self.on_gpu:
            # A GPU's fused attention has dropout in it; the CPU's, on which steps are counted, keeps all scores then.
            for name in ATTENTION_DROPOUTS:
                if getattr(self.config, name, None):
                    setattr(self.config, name, 0.0)
        self.host_limit = run.plan.cpu_memory * GIB if run.plan.cpu_memory else machine.host_bytes()
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        many = max(self.world, torch.cuda.device_count())
        self.ranks = run.plan.plan_ranks or ([1, many] if many > 1 else [1, 2, 4])
        self.rows = run.training.per_device_train_batch_size
        self.step_rows = self.rows * run.training.gradient_accumulation_steps * self.world
        self._steps: dict[torch.dtype, FakeStep] = {}
        _, self.inventory = self._model(self.config, DTYPES["no"])

    def _model(self, config, dtype: torch.dtype):
        return meta_model(self.run, config, self.base_name, self.question, dtype)

    def step(self, precision: str) -> FakeStep:
        """The micro-step on tensors without numbers, made once a precision."""
        dtype = DTYPES[precision]
        if dtype not in self._steps:
            model, _ = self._model(shallow(self.config), dtype)
            compiled = self.run.training.torch_compile
            self._steps[dtype] = FakeStep(model, self.config, self.question, self.run.data.max_length, compiled)
        return self._steps[dtype]

    def cost(self, layout: Layout, rows: int, checkpointing: bool) -> StepCost:
        """Of one micro-step of training."""
        return self.step(layout.precision).train(rows, checkpointing, layout.autocast)

    def answering(self, layout: Layout, rows: int) -> StepCost:
        """Of one step that answers `rows` test rows: scores of every label and posterior sample, or generation."""
        data, lm = self.run.data, self.question.head == "lm"
        together, samples = rows, data.posterior_samples
        if samples and layout.stage < 3:
            together = min(rows, rows_at_once(max(rows * data.max_length, TOKENS), data.max_length, samples))
        scored = together * (max(1, self.question.labels) if lm else 1)
        found = self.step(layout.precision).predict(scored, samples, layout.autocast)
        found = StepCost(found.peak, found.logits, found.flops * math.ceil(rows / together))
        if not lm or data.predict_by != "generate":
            return found
        heads, kv_heads, width = attention_shape(self.config)
        cache = 2 * self.config.num_hidden_layers * kv_heads * width * data.max_new_tokens * rows * layout.width
        return StepCost(found.peak + cache, found.logits, found.flops)

    def memory(self, layout: Layout, work: StepCost | None = None) -> Memory:
        """Of one rank where it holds most: with `work`, or else with the configured steps of training and answering."""
        if work is None:
            training, works = self.run.training, []
            if training.do_train:
                works.append(self.cost(layout, self.rows, training.gradient_checkpointing))
            if training.do_predict or not works:
                works.append(self.answering(layout, training.per_device_eval_batch_size))
            work = max(works, key=lambda cost: cost.peak)
        process = self.process + (DEEPSPEED_PROCESS if layout.stage else 0)
        return memory_of(layout, self.inventory, work, process, self.on_gpu)

    def fits(self, layout: Layout, memory: Memory) -> bool:
        """Whether all ranks' memory fits this host, and one rank's its GPU."""
        on_host = memory.host_bytes * layout.ranks <= SPARE * self.host_limit  # all ranks on one host
        return on_host and (not self.on_gpu or memory.gpu_bytes <= SPARE * self.gpu_limit)

    @cached_property
    def lines(self) -> list[Line]:
        """A line for each layout of `layouts_for`."""
        found = []
        for layout in layouts_for(self.run.precision, self.ranks):
            memory = self.memory(layout)
            found.append(Line(layout, memory, self.fits(layout, memory)))
        return found

    @cached_property
    def asked(self) -> Layout:
        """The layout of the run as it is configured and launched."""
        stage, offload = 0, False
        plugin = self.run.training.deepspeed_plugin if under_deepspeed() else None
        if plugin is not None:
            zero = plugin.deepspeed_config["zero_optimization"]
            stage, offload = zero["stage"], zero.get("offload_param", {}).get("device", "none") != "none"
        return Layout(self.run.precision, self.run.load_in_4bit, stage, self.world, offload)

    @cached_property
    def rates(self) -> Rates | None:
        """Given, or measured on the device that is planned for; None where it is not here."""
        plan = self.run.plan
        if plan.link_gbps and plan.flops:
            return Rates(plan.link_gbps * 1e9, plan.flops, "as given")
        if self.on_gpu and not torch.cuda.is_available():
            return None
        precision = self.run.precision if self.run.precision != "no" else ("bf16" if self.on_gpu else "no")
        found = measure_rates(DTYPES[precision])
        link, flops = (plan.link_gbps or 0) * 1e9 or found.link, plan.flops or found.flops
        return Rates(link, flops, found.source)

    def streamed(self, layout: Layout) -> int:
        """Bytes that one rank copies from its host to its GPU in a micro-step."""
        if not (layout.offload and layout.stage == 3):
            return 0
        return PASSES * self.inventory.shard_bytes(layout.width, layout.in_4bit, layout.ranks)

    def tokens(self, rows: int) -> int:
        """Tokens of so many rows at their widest."""
        choices = self.question.labels if self.question.head == "multiple_choice" else 1
        return rows * choices * self.run.data.max_length

    def break_even(self, layout: Layout, rows: int, cost: StepCost) -> float | None:
        """Tokens of a micro-step from which streaming is hidden; None where there is none, or rates are unknown."""
        if self.rates is None or not self.streamed(layout):
            return None
        return break_even_tokens(self.streamed(layout), cost.flops / self.tokens(rows), self.rates)

    @cached_property
    def advice(self) -> Advice | None:
        """The layout to take: precision as asked, nothing streamed, few ranks, in this order, as far as it fits."""
        asked = self.run.load_in_4bit
        candidates = [line.layout for line in self.lines if line.layout.precision != "no" or self.run.precision == "no"]
        if self.run.precision == "no" and not self.on_gpu:
            candidates.sort(key=lambda layout: layout.precision != "no")
        candidates.sort(key=lambda layout: (layout.in_4bit != asked, layout.offload, layout.ranks, layout.stage))

        def fits(layout: Layout, cost: StepCost) -> bool:
            return self.fits(layout, self.memory(layout, cost))

        def enough(layout: Layout, rows: int, cost: StepCost) -> bool:
            tokens = self.break_even(layout, rows, cost)
            return tokens is None or self.tokens(rows) >= tokens

        for layout in candidates:
            rows = max(1, self.step_rows // layout.ranks)
            if (found := cut(layout, rows, self.cost, fits, enough)) and (answered := self._answered(layout)):
                return replace(found, eval_rows=answered)
        return None

    def _answered(self, layout: Layout) -> int:
        """Rows of a step that answers: as many as asked for, or halved until they fit; 0 where not one does."""
        rows = self.run.training.per_device_eval_batch_size
        while rows and not self.fits(layout, self.memory(layout, self.answering(layout, rows))):
            rows //= 2
        return rows


def print_plan(run: Run) -> dict:
    """Print the plan of a run, write it to `--plan_json` if that is given, and return it."""
    if not is_main_process():
        return {}
    plan = Plan(run)
    print(text_of(plan))
    record = record_of(plan)
    if run.plan.plan_json:
        write_atomic(run.plan.plan_json, json.dumps(record, indent=2) + "\n")
    return record


def record_of(plan: Plan) -> dict:
    """The plan, JSON-ready; bytes."""
    advice, asked = plan.advice, plan.memory(plan.asked)
    return {
        "base_model": plan.base_name,
        "parameters": plan.inventory.counts,
        "tokens": plan.tokens(plan.rows),
        "gpu_limit": plan.gpu_limit,
        "host_limit": plan.host_limit,
        "rates": asdict(plan.rates) if plan.rates else None,
        "asked": _line_record(Line(plan.asked, asked, plan.fits(plan.asked, asked))),
        "layouts": [_line_record(line) for line in plan.lines],
        "advice": advice and {"layout": advice.layout.name, "flags": advice.flags, "launch": advice.launch},
    }


def _line_record(line: Line) -> dict:
    parts = {"gpu": line.memory.gpu, "host": line.memory.host}
    return {"name": line.layout.name, **asdict(line.layout), **parts, "fits": line.fits}


def text_of(plan: Plan) -> str:
    """The plan as it is printed."""
    run, counts = plan.run, plan.inventory.counts
    checkpointing = run.training.gradient_checkpointing
    flops = plan.cost(plan.asked, plan.rows, checkpointing).flops
    head = [
        f"Plan for {plan.base_name}, {run.adapter.adapter_name}: {counts['trainable']:,} trained of {counts['all']:,} "
        f"parameters ({counts['trainable_percent']:.4f} %)",
        f"micro-step: {plan.rows} rows of {run.data.max_length} tokens, {flops:.3g} FLOP; gradient checkpointing "
        + ("on" if checkpointing else "off"),
    ]
    if plan.question.assumed:
        head.append(f"assumed: {plan.question.assumed}")
    where = "each GPU" if plan.on_gpu else "each process"
    head += ["", f"GiB on {where}, and on the host for all ranks together:"]
    return "\n".join([*head, *_table(plan), "", *_sentences(plan)])


def _table(plan: Plan) -> list[str]:
    titles = [*COLUMNS.values(), "other"]
    shown = f"{'layout':<27}{'ranks':>6}" + "".join(f"{title:>9}" for title in titles)
    lines = [shown + (f"{'GPU':>8}" if plan.on_gpu else "") + f"{'host':>8}  fits"]
    for line in plan.lines:
        parts = line.memory.gpu if plan.on_gpu else line.memory.host
        values = [parts.get(column, 0) for column in COLUMNS]
        values.append(sum(parts.values()) - sum(values))
        text = f"{line.layout.name:<27}{line.layout.ranks:>6}" + "".join(f"{value / GIB:>9.2f}" for value in values)
        if plan.on_gpu:
            text += f"{line.memory.gpu_bytes / GIB:>8.1f}"
        text += f"{line.memory.host_bytes * line.layout.ranks / GIB:>8.1f}  {'yes' if line.fits else 'no'}"
        lines.append(text)
    return lines


def _sentences(plan: Plan) -> list[str]:
    found = [_verdict(plan)]
    if plan.rates is None:
        found.append("Speed: the GPU is not here; give --link_gbps and --flops to see from where streaming is hidden.")
    advice = plan.advice
    if advice is None:
        found.append("Recommended: nothing here fits; shorten --max_length, or a smaller base model, or more ranks.")
        return found
    memory = plan.memory(advice.layout, advice.cost)
    tokens = plan.break_even(advice.layout, advice.rows, advice.cost)
    if plan.rates is not None:
        streaming, computing = step_seconds(plan.streamed(advice.layout), advice.cost.flops, plan.rates)
        rates = f"{plan.rates.flops / 1e12:.3g} TFLOP/s and {plan.rates.link / 1e9:.3g} GB/s, {plan.rates.source}"
        if tokens is not None:
            found.append(
                f"Speed: streaming {plan.streamed(advice.layout) / GIB:.1f} GiB a micro-step takes {streaming:.2f} s, "
                f"computing {computing:.2f} s; streaming is hidden from {tokens:,.0f} tokens a micro-step on "
                f"(it has {plan.tokens(advice.rows):,}). Rates: {rates}."
            )
        else:
            found.append(f"Speed: a micro-step takes {computing:.2f} s at best; nothing is streamed. Rates: {rates}.")
    use = f"{memory.gpu_bytes / GIB:.1f} GiB a GPU, " if plan.on_gpu else ""
    ranks = f" on {advice.layout.ranks} ranks" if advice.layout.stage else ""
    found.append(
        f"Recommended: {advice.layout.name}{ranks}; {use}{memory.host_bytes * advice.layout.ranks / GIB:.1f} GiB host:"
    )
    found.append(f"    {advice.launch}")
    return found


def _verdict(plan: Plan) -> str:
    layout = plan.asked
    memory = plan.memory(layout)
    if plan.fits(layout, memory):
        return f"As configured ({layout.name}) it fits."
    over, limit, parts = memory.host_bytes * layout.ranks, plan.host_limit, memory.host
    where = f"the host's {limit / GIB:.0f} GiB"
    if plan.on_gpu and memory.gpu_bytes > SPARE * plan.gpu_limit:
        over, limit, parts = memory.gpu_bytes, plan.gpu_limit, memory.gpu
        where = f"{limit / GIB:.0f} GiB"
    most = sorted(parts, key=parts.get, reverse=True)[:2]
    need = " and ".join(f"{parts[name] / GIB:.1f} for {name}" for name in most)
    text = f"As configured ({layout.name}) it does not fit on {where}: it takes {over / GIB:.1f}, {need}"
    quantised = Layout(layout.precision, True, layout.stage, layout.ranks, layout.offload)
    if not layout.in_4bit and plan.fits(quantised, plan.memory(quantised)):
        return f"{text}; it fits with --load_in_4bit."
    return f"{text}."
