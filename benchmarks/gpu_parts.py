"""The parts of benchmarks/gpu.py: each builds a model of random weights, takes a few steps and returns figures.

Libraries are imported where they are used, so that one that is missing is missed by its parts alone.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

GIB = 2**30
LLAMA_13B = {
    "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824,
    "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
SHAPE_1B = {**LLAMA_13B, "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16}
SHAPE_1B["intermediate_size"] = 5632
TOY = {**LLAMA_13B, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TOY |= {"vocab_size": 512, "max_position_embeddings": 256}
LORA = {"adapter_name": "lora", "lora_rank": 8, "target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Settings:
    """Sizes of all parts.

    Attributes:
        rows, length: of a micro-step of the large model.
        steps: that are timed, behind two that are not.
    """

    device: str
    large: dict
    middle: dict
    rows: int
    length: int
    steps: int
    samples: int = 10


def settings_of(smoke: bool) -> Settings:
    return Settings("cpu", TOY, TOY, 2, 16, 2) if smoke else Settings("cuda", LLAMA_13B, SHAPE_1B, 16, 512, 4)


@dataclass(frozen=True)
class Part:
    """A part and the seconds it may take."""

    function: Callable[[Settings, dict | None], dict]
    limit: float

    def __call__(self, settings: Settings, rates: dict | None) -> dict:
        return self.function(settings, rates)


def rates(settings: Settings, _) -> dict:
    """TFLOP/s of matrix products and GB/s of copies to the GPU."""
    import torch

    from bhpeft.plan.speed import best_of, measure_rates

    found = {"device": torch.cuda.get_device_name() if settings.device == "cuda" else "cpu"}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        measured = measure_rates(dtype)
        found[f"tflops_{name}"] = measured.flops / 1e12
        found["link_pinned_gbps"] = measured.link / 1e9
    pageable = torch.zeros(64 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(pageable, device=settings.device)
    seconds = best_of(lambda: target.copy_(pageable), settings.device == "cuda")
    return found | {"link_pageable_gbps": pageable.numel() / seconds / 1e9}


# What a frozen base asks of ZeRO-3 with offload. Only the adapter has gradients, so their bucket may be small; the turn
# from forward to backward reuses little.
KNOBS = {
    "pin": {"pin_memory": True},
    "bucket": {"reduce_bucket_size": 5 * 10**6},
    "prefetch": {"stage3_prefetch_bucket_size": 2 * 10**8},
    "live": {"stage3_max_live_parameters": 6 * 10**8, "stage3_max_reuse_distance": 3 * 10**8},
    "persistence": {"stage3_param_persistence_threshold": 10**6},
}
TUNED = ("pin", "bucket", "prefetch", "live")


def zero3(precision: str, knobs: tuple[str, ...] = ()):
    """A part that trains LoRA on the large shape, sharded and offloaded, with these of `KNOBS` turned."""

    def part(settings: Settings, measured: dict | None) -> dict:
        import deepspeed  # noqa: F401 - named here, so that its absence is said

        on_gpu = settings.device == "cuda"
        used = precision if on_gpu else "no"  # what the launcher arranges on a CPU, TrainingArguments refuse there
        turned = {name: value for knob in knobs for name, value in KNOBS[knob].items()}
        offload = {"device": "cpu", "pin_memory": turned.pop("pin_memory", False) and on_gpu}
        zero = {"stage": 3, "offload_param": offload, "offload_optimizer": offload, **turned}
        config = {
            "zero_optimization": zero, "gradient_clipping": 1.0,
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
        }  # fmt: skip
        if on_gpu:
            config[used] = {"enabled": True}
        found = {"precision": used, **_train(settings, settings.large, used, LORA, deepspeed_config=config)}
        return found | _planned(settings, settings.large, used, LORA, 3, measured)

    return part


def whole(in_4bit: bool):
    """A part that trains LoRA on the large shape, whole on the device, in NF4 or bf16."""

    def part(settings: Settings, measured: dict | None) -> dict:
        found = _train(settings, settings.large, "bf16", LORA, in_4bit=in_4bit)
        return found | _planned(settings, settings.large, "bf16", LORA, 0, measured, in_4bit)

    return part


def bh_peft(settings: Settings, _) -> dict:
    """Step time and memory of BH-PEFT over those of LoRA, on one model shape and the same rows."""
    found = {}
    for name, flags in (("lora", LORA), ("bh_peft", {"adapter_name": "bh-peft"})):
        one = _train(settings, settings.middle, "bf16", flags)
        found |= {f"{name}_{key}": value for key, value in one.items()}
    return found | {"seconds_ratio": found["bh_peft_step_seconds"] / found["lora_step_seconds"]}


def sampling(settings: Settings, _) -> dict:
    """S posterior samples in one pass against one deterministic pass, at batch 1 and more."""
    import torch

    from bhpeft.adapters.posterior import posterior_samples
    from bhpeft.plan.speed import best_of

    model = _model(settings, settings.middle, "bf16", {"adapter_name": "bh-peft"}).eval()
    found, on_gpu = {"samples": settings.samples}, settings.device == "cuda"
    for rows in (1, settings.rows):
        ids = torch.ones(rows, 64 if on_gpu else 8, dtype=torch.long, device=settings.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            once = best_of(lambda batch=batch: model(**batch), on_gpu)
            many = best_of(lambda batch=batch: posterior_samples(model, batch, settings.samples), on_gpu)
        found |= {f"one_pass_ms_batch_{rows}": 1e3 * once, f"samples_ms_batch_{rows}": 1e3 * many}
        found |= {f"ratio_batch_{rows}": many / once}
    return found


def stock(settings: Settings, _) -> dict:
    """Samples a second of our trainer over those of stock Trainer + peft: one model, rows of unequal length."""
    ours = _train(settings, settings.middle, "bf16", LORA, unequal=True, group=True)
    theirs = _train(settings, settings.middle, "bf16", LORA, unequal=True, ours=False)
    grouped = _train(settings, settings.middle, "bf16", LORA, unequal=True, ours=False, group=True)
    found = {f"ours_{key}": value for key, value in ours.items()}
    found |= {f"stock_{key}": value for key, value in theirs.items()}
    found |= {f"stock_grouped_{key}": value for key, value in grouped.items()}
    found["ratio_to_stock"] = ours["samples_per_second"] / theirs["samples_per_second"]
    return found | {"ratio_to_stock_grouped": ours["samples_per_second"] / grouped["samples_per_second"]}


def _model(settings: Settings, shape: dict, precision: str, flags: dict, in_4bit: bool = False, ours: bool = True):
    """A LLaMA of random weights on the device (under ZeRO-3: sharded while it is made), with its adapter."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from bhpeft.adapters import attach_adapter
    from bhpeft.arguments import AdapterArguments
    from bhpeft.environment import DTYPES

    config = LlamaConfig(**shape, pad_token_id=0)
    torch.manual_seed(0)
    if in_4bit:
        base = _quantised(config, settings.device, precision)
    else:
        with torch.device(settings.device):
            base = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])
    base.requires_grad_(False)
    if ours:
        with torch.device(settings.device):
            return attach_adapter(base, AdapterArguments(**flags), "random")
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(r=flags["lora_rank"], target_modules=flags["target_modules"], task_type=TaskType.CAUSAL_LM)
    return get_peft_model(base, lora)


def _quantised(config, device: str, precision: str):
    """The same with linear layers in NF4, made and quantised one by one: the whole model is never there unquantised."""
    import bitsandbytes
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert

    from bhpeft.base_model import quantisation_config
    from bhpeft.environment import DTYPES

    dtype = DTYPES[precision]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantisation_config(precision))
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            values = torch.randn(module.out_features, module.in_features, dtype=dtype, device=device) * 0.02
            module.weight = bitsandbytes.nn.Params4bit(
                values.cpu() if device == "cuda" else values, requires_grad=False, compress_statistics=True,
                quant_type="nf4", quant_storage=dtype, module=module,
            ).to(device)  # fmt: skip
            module.support_avx512bf16_for_cpu = False  # as base_model.py has it
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                made = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02
                setattr(module, name, nn.Parameter(made, requires_grad=False))
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            with torch.device(device):  # rotary frequencies, which come from the configuration
                module._buffers.update(type(module)(config)._buffers)
    # What from_pretrained would note: peft and the Trainer ask for it.
    model.is_quantized = model.is_loaded_in_4bit = True
    model.hf_quantizer = AutoHfQuantizer.from_config(quantisation_config(precision))
    model.quantization_method = model.hf_quantizer.quantization_config.quant_method
    return model


def _rows(settings: Settings, shape: dict, count: int, unequal: bool) -> list[dict]:
    """Random tokens; the last two are the answer."""
    import random

    draw = random.Random(0)
    rows = []
    for _ in range(count):
        length = draw.randint(max(4, settings.length // 8), settings.length) if unequal else settings.length
        ids = [draw.randrange(3, shape["vocab_size"]) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * (length - 2) + ids[-2:]})
    return rows


def _train(
    settings: Settings,
    shape: dict,
    precision: str,
    flags: dict,
    deepspeed_config: dict | None = None,
    in_4bit: bool = False,
    unequal: bool = False,
    ours: bool = True,
    group: bool = False,
) -> dict:
    """Take a few steps; time (median), throughput and the most memory they held."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from bhpeft import environment
    from bhpeft.tasks.encoding import Collator
    from bhpeft.training import AdapterTrainer

    on_gpu = settings.device == "cuda"
    if deepspeed_config is not None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    environment._quieten()
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.started = self.now()

        def on_step_end(self, *args, **kwargs):
            times.append(self.now() - self.started)

        def now(self) -> float:
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

    steps = settings.steps * (4 if unequal and on_gpu else 1) + 2
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=settings.rows, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=1000, remove_unused_columns=False,
            use_cpu=not on_gpu and deepspeed_config is None, dataloader_pin_memory=on_gpu, deepspeed=deepspeed_config,
            ddp_backend="gloo" if deepspeed_config is not None and not on_gpu else None,
            train_sampling_strategy="group_by_length" if group else "random",
            **({precision: True} if on_gpu else {}),
        )  # fmt: skip
        environment.set_precision(arguments, precision)
        model = _model(settings, shape, precision, flags, in_4bit, ours)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        rows = _rows(settings, shape, settings.rows * steps, unequal)
        kind = AdapterTrainer if ours else Trainer
        trainer = kind(model=model, args=arguments, train_dataset=rows, data_collator=Collator(0), callbacks=[Clock()])
        trainer.train()
    timed = times[2:]
    found = {"step_seconds": statistics.median(timed), "samples_per_second": settings.rows * len(timed) / sum(timed)}
    memory = environment.peak_memory_mib()
    found["host_gib"] = memory["host"] / 1024
    if on_gpu:
        found["gpu_gib"] = memory["gpu"] / 1024
        found["gpu_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return found


def _planned(
    settings: Settings, shape: dict, precision: str, flags: dict, stage: int, measured: dict | None,
    in_4bit: bool = False,
) -> dict:  # fmt: skip
    """What the planner says of the same step: GiB allocated, and seconds by the measured rates."""
    from transformers import LlamaConfig

    from bhpeft.arguments import AdapterArguments, BaseModelArguments, DataArguments
    from bhpeft.environment import DTYPES
    from bhpeft.plan.layouts import Layout, memory_of
    from bhpeft.plan.model import meta_model, question_of
    from bhpeft.plan.speed import PASSES
    from bhpeft.plan.step import FakeStep, shallow

    config = LlamaConfig(**shape, pad_token_id=0)
    run = SimpleNamespace(
        base=BaseModelArguments(base_model="random"), adapter=AdapterArguments(**flags), data=DataArguments()
    )
    question = question_of(run, config)
    _, inventory = meta_model(run, config, "random", question, DTYPES[precision])
    model, _ = meta_model(run, shallow(config), "random", question, DTYPES[precision])
    layout = Layout(precision, in_4bit, stage, 1, stage == 3)
    cost = FakeStep(model, config, question, settings.length).train(settings.rows, autocast=layout.autocast)
    memory = memory_of(layout, inventory, cost, 0, on_gpu=True).gpu
    found = {"planned_gpu_gib": sum(memory[name] for name in memory if name not in ("runtime", "allocator")) / GIB}
    if measured and f"tflops_{precision}" in measured:
        found["planned_compute_seconds"] = cost.flops / measured[f"tflops_{precision}"] / 1e12
        if stage == 3:
            streamed = PASSES * inventory.shard_bytes(layout.width, in_4bit, 1)
            found["planned_stream_seconds"] = streamed / measured["link_pinned_gbps"] / 1e9
    return found


PARTS = {
    "rates": Part(rates, 40),
    "zero3-bf16": Part(zero3("bf16"), 130),
    "zero3-fp16": Part(zero3("fp16"), 100),
    "zero3-bf16-tuned": Part(zero3("bf16", TUNED), 100),
    "qlora-13b": Part(whole(in_4bit=True), 80),
    "lora-13b": Part(whole(in_4bit=False), 60),
    "bh-peft": Part(bh_peft, 50),
    "sampling": Part(sampling, 40),
    "stock": Part(stock, 60),
}
KNOB_PARTS = {f"zero3-bf16-{knob}": Part(zero3("bf16", (knob,)), 100) for knob in KNOBS}
