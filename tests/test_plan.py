"""The planner: what it counts is what is there, and what it plans is what a run really takes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import ROOT, run_command

import parameter_efficient_fine_tuning as trainer_script
from benchmarks.planner import make_model, make_rows, trainer_words
from bhpeft.adapters import attach_adapter
from bhpeft.base_model import head_modules, load_base_model, load_config, load_with_head, parameter_counts
from bhpeft.config import parse_arguments
from bhpeft.errors import InputError
from bhpeft.plan import step as plan_step
from bhpeft.plan.advice import Advice, cut, divisors
from bhpeft.plan.layouts import MAX_LIVE, REDUCE_BUCKET, Layout, memory_of, model_states
from bhpeft.plan.model import Inventory, meta_model, nf4_bytes, question_of
from bhpeft.plan.report import Plan
from bhpeft.plan.speed import Rates, break_even_tokens
from bhpeft.plan.step import FakeStep, StepCost, _Counter, shallow

PLAN_RATES = ["--cpu_memory", 64, "--link_gbps", 25, "--flops", 3e12, "--plan_ranks", 1]  # nothing is measured

LLAMA_13B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 40,
    "num_attention_heads": 40, "intermediate_size": 13824, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
MIXED = Inventory((10, 3), (128, 64), (5, 4), 0, {})  # 13 plain and 192 linear weights, 9 trained


def arguments(model, *flags):
    return parse_arguments(["--base_model", str(model), "--dataset_name", "rows.csv", *map(str, flags)])


def planned(model, *flags, dtype=torch.float32, cut_layers=False):
    """(model on the meta device, inventory, configuration, question) of a run."""
    run = arguments(model, *flags)
    config = load_config(str(model))
    question = question_of(run, config)
    made = meta_model(run, shallow(config) if cut_layers else config, str(model), question, dtype)
    return *made, config, question


@pytest.mark.parametrize("adapter", ["lora", "bh-peft", "prompt-tuning"])
def test_counts_and_bytes_of_a_language_model_are_the_real_ones(tiny_model, adapter):
    flags = ["--adapter_name", adapter, "--bn_reduction_factor", 8]
    _, inventory, _, _ = planned(tiny_model, *flags, dtype=torch.bfloat16)
    base = load_base_model(str(tiny_model), "bf16")
    model = attach_adapter(base, arguments(tiny_model, *flags).adapter, str(tiny_model))
    assert inventory.counts == parameter_counts(model)
    assert inventory.frozen_bytes(2, in_4bit=False) == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert 4 * inventory.trained == sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("adapter", ["lora", "bh-peft"])
def test_counts_of_an_encoder_with_a_head_are_the_real_ones(tiny_encoder, adapter):
    _, inventory, _, question = planned(tiny_encoder, "--adapter_name", adapter, "--labels", "a", "b", "c")
    assert (question.head, question.labels) == ("classification", 3)
    base, trained_too = load_with_head(str(tiny_encoder), "classification", ["a", "b", "c"], 1)
    flags = arguments(tiny_encoder, "--adapter_name", adapter)
    model = attach_adapter(base, flags.adapter, "x", "classification", trained_too)
    assert inventory.counts == parameter_counts(model)
    # A pooler that the checkpoint lacks is trained, in the plan as in a run.
    base, trained_too = load_with_head(str(tiny_encoder), "multiple_choice", "ABCDE", 1)
    model = attach_adapter(base, flags.adapter, "x", "multiple_choice", trained_too)
    run = arguments(tiny_encoder, "--adapter_name", adapter)
    run.data.dataset_name = "csqa"
    question = question_of(run, base.config)
    assert question.labels == 5 and head_modules(base, []) == ["classifier"]
    _, inventory = meta_model(run, load_config(str(tiny_encoder)), str(tiny_encoder), question, torch.float32)
    assert inventory.counts == parameter_counts(model)


def test_4bit_bytes_are_those_that_bitsandbytes_holds(tiny_model, tiny_encoder):
    for name, load in (
        (tiny_model, lambda: load_base_model(str(tiny_model), "bf16", in_4bit=True)),
        (tiny_encoder, lambda: load_with_head(str(tiny_encoder), "classification", "ab", 1, "bf16", True)[0]),
    ):
        _, inventory, _, _ = planned(name, dtype=torch.bfloat16)
        held, quantised = 0, 0
        for parameter in load().parameters():
            held += parameter.nbytes
            if (state := getattr(parameter, "quant_state", None)) is not None:
                nested = state.state2
                tensors = (state.absmax, state.code, state.offset, nested.absmax, nested.code)
                held += sum(tensor.nbytes for tensor in tensors)
                quantised += 1
        assert quantised == len(inventory.linear) > 10
        assert inventory.frozen_bytes(2, in_4bit=True) == held


def test_nf4_by_hand():
    # 100 weights: 50 bytes packed, 2 blocks of 64 with a byte of scale each, 1 scale of scales, tables of 16 + 256 + 1.
    assert nf4_bytes(100) == 50 + 2 + 4 + 4 * 273
    assert nf4_bytes(64 * 256) == 64 * 128 + 256 + 4 + 4 * 273


def test_shards_and_states_by_hand():
    # Every parameter is cut into equal parts, rounded up: 3 ranks hold 4 + 1 + 43 + 22 weights of 2 bytes each.
    assert MIXED.shard_bytes(2, in_4bit=False, ranks=3) == 2 * (4 + 1 + 43 + 22)
    packed = 2 * (-(-32 // 3) + -(-16 // 3))  # 128 and 64 weights lie in 32 and 16 numbers of 2 bytes
    scales = sum(nf4_bytes(size) - size // 2 for size in (128, 64))
    assert MIXED.shard_bytes(2, in_4bit=True, ranks=3) == 2 * (4 + 1) + packed + scales

    one = model_states(Layout("bf16"), MIXED)
    assert one.gpu == {"weights": 2 * 205, "gathered": 0, "adapter": 36, "gradients": 36, "optimizer": 72}
    three = model_states(Layout("bf16", stage=3, ranks=3, offload=True), MIXED)
    assert three.host == {"weights": 140, "adapter": 12, "optimizer": 36, "gradients": 12}
    assert three.gpu["gathered"] == 2 * (205 + 128)  # all of it, and the largest on its way
    assert three.gpu["buckets"] == 4 * REDUCE_BUCKET
    large = Inventory((3 * MAX_LIVE, 7), (), (1,), 0, {})
    assert model_states(Layout("bf16", stage=3, ranks=3), large).gpu["gathered"] == 2 * (MAX_LIVE + 3 * MAX_LIVE)
    # Without a GPU the two are one memory, and one rank's shard is the weight itself.
    alone = memory_of(Layout("bf16", stage=3, offload=True), MIXED, StepCost(100, 40, 0), 1000, on_gpu=False)
    assert alone.gpu == {} and alone.host["weights"] == 410 and alone.host["gathered"] == 0
    assert (alone.host["activations"], alone.host["logits"], alone.host["process"]) == (60, 40, 1000)


def test_states_are_those_of_deepspeeds_estimators_where_everything_is_trained():
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    numel, ranks = 10**9, 4
    inventory = Inventory((), (0,), (numel,), 0, {})
    _, theirs = estimate_zero2_model_states_mem_needs(numel, ranks, 1, False, 1)
    states = model_states(Layout("bf16", stage=2, ranks=ranks), inventory, on_gpu=False)
    assert states.gpu_bytes == theirs
    _, theirs, _ = estimate_zero3_model_states_mem_needs(numel, 0, ranks, 1, False, False)
    ours = model_states(Layout("bf16", stage=3, ranks=ranks), inventory, on_gpu=False).gpu_bytes
    assert ours == theirs + 2 * numel / ranks  # our adapter stays in fp32: 2 bytes more a weight


def test_break_even_by_hand():
    # 13e9 weights of 2 bytes, streamed twice; 4 FLOP a weight and token; 300 TFLOP/s, 25 GB/s: 2 x 3e14 / (2 x 25e9).
    rates = Rates(25e9, 3e14, "")
    assert break_even_tokens(2 * 2 * 13e9, 4 * 13e9, rates) == pytest.approx(12_000)
    assert break_even_tokens(2 * 0.5 * 13e9, 4 * 13e9, rates) == pytest.approx(3_000)  # four bits
    assert break_even_tokens(2 * 2 * 13e9, 6 * 13e9, rates) == pytest.approx(8_000)  # checkpointing


@pytest.mark.parametrize("adapter", ["lora", "bh-peft"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_step_allocates_and_computes_what_the_plan_says(tiny_model, adapter, checkpointing):
    fake_model, _, config, question = planned(tiny_model, "--adapter_name", adapter)
    fake = FakeStep(fake_model, config, question, 40)
    wanted = fake.train(6, checkpointing)

    run = arguments(tiny_model, "--adapter_name", adapter)
    base = load_base_model(str(tiny_model), attn_implementation=run.base.attn_implementation)
    model = attach_adapter(base, run.adapter, "x").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    batch = fake._batch(6)
    batch["attention_mask"][0, -1] = 0  # a mask that is all ones is left out; a plan counts on padding
    counter = _Counter([*model.parameters(), *model.buffers(), *(p.grad for p in trained)], config.vocab_size)
    with counter:
        model(**batch).loss.backward()
    assert counter.flops == wanted.flops
    assert counter.peak == pytest.approx(wanted.peak, rel=0.03)
    logits = 6 * 40 * config.vocab_size * 4
    assert wanted.logits % logits == 0
    assert checkpointing or wanted.logits >= 2 * logits


def test_more_layers_are_extended_exactly(tmp_path, monkeypatch, adapter="bh-peft"):
    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_13B, **small, "vocab_size": 300}))
    extended = planned(tmp_path, "--adapter_name", adapter, cut_layers=True)
    step = FakeStep(extended[0], *extended[2:], 32)
    assert len(step.layers) == 3
    costs = [step.train(4), step.train(4, True), step.predict(4, 2)]
    monkeypatch.setattr(plan_step, "PREDICT_DEPTHS", (3, 4))
    whole = planned(tmp_path, "--adapter_name", adapter)
    step = FakeStep(whole[0], *whole[2:], 32)
    assert step.whole and len(step.layers) == 4
    assert costs == [step.train(4), step.train(4, True), step.predict(4, 2)]


@pytest.mark.parametrize("adapter", ["lora", "bh-peft"])
def test_rows_between_two_steps_are_extended_exactly(tiny_model, adapter):
    ask = [(7, False), (5, False), (7, True)]
    steps = []
    for _ in range(2):
        model, _, *rest = planned(tiny_model, "--adapter_name", adapter)
        steps.append(FakeStep(model, *rest, 32))
    between, each = steps
    run = []
    real = between._at_depths
    between._at_depths = lambda depths, kind, rows, *how: (run.append(rows), real(depths, kind, rows, *how))[1]
    for checkpointing in (False, True):
        between.train(12, checkpointing)
    assert [between.train(*how) for how in ask] == [each.train(*how) for how in ask]
    assert between.predict(12) and between.predict(7, 0) == each.predict(7, 0)
    assert 5 not in run and (adapter == "bh-peft" or run == [12, 12, 2, 2, 12, 2])  # nor is 7, of LoRA


def test_rows_between_steps_of_other_moments_are_run():
    known = {2: (StepCost(20, 2, 4), [(5, 9)]), 6: (StepCost(60, 6, 12), [(5, 9)])}
    assert plan_step._interpolated(known, 3) == StepCost(30, 3, 6)
    assert plan_step._interpolated(known, 7) is None and plan_step._interpolated(known, 1) is None
    known[6] = (StepCost(60, 6, 12), [(6, 9)])
    assert plan_step._interpolated(known, 3) is None


def test_the_cut_is_the_best_that_fits():
    layout = Layout("bf16")

    def cost(layout, rows, checkpointing):
        return StepCost(rows * (3 if checkpointing else 10), 0, rows)

    for room in range(0, 130, 3):
        found = cut(layout, 12, cost, lambda _, c, room=room: c.peak <= room, lambda *_: True)
        plain = [rows for rows in divisors(12) if 10 * rows <= room]
        saving = [rows for rows in divisors(12) if 3 * rows <= room]
        best = (plain[0], False) if plain else (saving[0], True) if saving else None
        assert (found and (found.rows, found.checkpointing)) == best
        assert found is None or found.rows * found.accumulation == 12
    # Where streaming is not hidden, more rows are worth computing twice.
    streaming = cut(layout, 12, cost, lambda _, c: c.peak <= 40, lambda _, rows, cost: rows >= 12)
    assert (streaming.rows, streaming.checkpointing) == (12, True)
    assert "--load_in_4bit" in Advice(Layout("bf16", True), 2, 6, False, StepCost(0, 0, 0)).flags


def test_llama_13b_is_planned_from_its_configuration_alone(tmp_path):
    folder = tmp_path / "llama-13b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_13B))
    script = (
        "import sys\n"
        "from parameter_efficient_fine_tuning import main\n"
        "main(sys.argv[1:])\n"
        "from bhpeft.environment import resident_bytes\n"
        "print(resident_bytes(at_most=True) / 2**30)"
    )
    flags = ["--config", ROOT / "recipes/qlora_llama2_sst2.yaml", "--base_model", folder, "--adapter_name", "lora"]
    flags += ["--plan", "--bf16", "--gpu_memory", 12, "--cpu_memory", 64, "--link_gbps", 25, "--flops", 3e14]
    flags += ["--batch_size", 1, "--eval_batch_size", 1, "--plan_json", tmp_path / "plan.json", "--plan_ranks", 1, 2]
    done = run_command([sys.executable, "-c", script, *flags], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) < 2  # GiB
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-13b", "plan.json"]  # nothing else was written

    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["parameters"]["all"] == 13_015_864_320 + 52_428_800
    assert plan["parameters"]["trainable"] == 52_428_800  # rank 64 on two projections of 40 layers
    by_name = {(line["name"], line["ranks"]): line for line in plan["layouts"]}
    assert by_name["one process, bf16", 1]["gpu"]["weights"] == pytest.approx(2 * 13_015_864_320, rel=1e-4)
    shard = by_name["ZeRO-3 + offload, bf16", 2]
    assert shard["host"]["weights"] == pytest.approx(13_015_864_320, rel=1e-4) and shard["gpu"].get("weights", 0) == 0
    assert not by_name["one process, bf16", 1]["fits"] and by_name["one process, NF4, bf16", 1]["fits"]
    assert "does not fit on 12 GiB: it takes" in done.stdout and "it fits with --load_in_4bit." in done.stdout
    assert plan["advice"]["layout"] == "ZeRO-3 + offload, bf16"  # as asked: not in 4 bit
    assert "streaming is hidden from" in done.stdout and "ds_zero3_cpu.yaml" in plan["advice"]["launch"]


@pytest.mark.parametrize("name", ["lora", "bh-peft"])
def test_an_existing_adapter_with_a_head_is_planned(name, tiny_encoder, labelled, tmp_path, capsys):
    flags = ["--base_model", tiny_encoder, "--dataset_name", labelled, "--results_dir", tmp_path / "results"]
    train = [*flags, "--adapter_name", name, "--max_steps", 1, "--output_dir", tmp_path / "a", "--do_predict", "false"]
    record = trainer_script.main([*map(str, [*train, "--save_strategy", "no", "--disable_tqdm", "true"])])
    capsys.readouterr()
    plan = ["--plan", "--adapter_path", tmp_path / "a", "--plan_json", tmp_path / "p.json", *PLAN_RATES]
    trainer_script.main([*map(str, [*flags, *plan])])
    planned = json.loads((tmp_path / "p.json").read_text())["parameters"]
    assert planned["trainable"] == record["parameters"]["trainable"]


def test_flash_attention_is_planned_for_a_gpu_that_is_elsewhere(tiny_model, labelled, tmp_path):
    flags = ["--base_model", tiny_model, "--dataset_name", labelled, "--plan", *PLAN_RATES, "--gpu_memory", 24]
    plans = []
    for attention in ("sdpa", "flash_attention_2"):
        file = tmp_path / f"{attention}.json"
        words = [*flags, "--attn_implementation", attention, "--plan_json", file]
        trainer_script.main([*map(str, words)])
        plans.append([line["gpu"] for line in json.loads(file.read_text())["layouts"]])
    assert plans[0] and plans[0] == plans[1]


def test_a_run_takes_the_memory_that_was_planned(tmp_path):
    model = make_model(tmp_path / "neox", hidden=256, layers=3, vocabulary=16384)
    rows = make_rows(tmp_path / "rows.csv", 128)
    words = trainer_words(model, rows, tmp_path, 128, ["--batch_size", 48])
    for more in (["--plan", "--plan_json", tmp_path / "plan.json"], []):
        done = run_command([*words, *more], cwd=tmp_path, real=True)  # with what a process of its own imports
        assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "plan.json").read_text())["asked"]["host"]
    record = json.loads((tmp_path / "results/metrics/run.json").read_text())
    measured = record["hardware"]["peak_memory_mib"][0]["host"]
    assert sum(parts.values()) / 2**20 == pytest.approx(measured, rel=0.15)
    # Nor is it right for the libraries' sake alone: what the run itself takes is right, too.
    own, process = (sum(parts.values()) - parts["process"]) / 2**20, parts["process"] / 2**20
    assert measured - process == pytest.approx(own, rel=0.25) and measured > 1.6 * process


def test_memory_is_that_of_the_process_not_of_the_one_that_started_it():
    child = (
        "from bhpeft.environment import resident_bytes\n"
        "before = resident_bytes(at_most=True)\n"
        "held = b'1' * 2**30\n"
        "del held\n"
        "print(before, resident_bytes(at_most=True), resident_bytes())\n"
    )
    parent = "import subprocess, sys; held = b'1' * 2**31\n"
    parent += "subprocess.run([sys.executable, '-c', sys.argv[1]])"
    done = run_command([sys.executable, "-c", parent, child])
    before, most, now = map(int, done.stdout.split())
    assert before < 2**30 <= most < 2**31  # not the 2 GiB of its parent
    assert abs(now - before) < 2**28


def test_a_plan_in_4_bit_needs_no_bitsandbytes(tiny_model, tmp_path):
    words = [
        sys.executable,
        ROOT / "parameter_efficient_fine_tuning.py",
        "--base_model",
        tiny_model,
        "--labels",
        "a",
        "b",
    ]
    words += ["--dataset_name", "rows.csv", "--adapter_name", "qlora", "--plan", "--plan_ranks", 1]
    words += ["--link_gbps", 25, "--flops", "3e14"]
    done = run_command([*words, "--plan_json", tmp_path / "plan.json"], real=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["asked"]["in_4bit"]


def test_what_is_compiled_is_planned_whole(tiny_model):
    """A compiled model's last feed-forward block is computed everywhere (`labelled_alone`)."""
    flags = ["--labels", "a", "b", "--max_length", 64, "--plan", "--batch_size", 4]
    spared, whole = (Plan(arguments(tiny_model, *flags, *more)) for more in ((), ("--torch_compile", "true")))
    costs = [plan.cost(plan.asked, 4, False) for plan in (spared, whole)]
    assert costs[0].flops < costs[1].flops and costs[0].peak < costs[1].peak


def test_answering_counts_samples_and_labels(tiny_encoder):
    run = arguments(tiny_encoder, "--adapter_name", "bh-peft", "--plan", "--eval_batch_size", 8, "--labels", "a", "b")
    plan = Plan(run)
    once = plan.answering(Layout("no"), 400)
    run.data.posterior_samples = 10
    ten, sharded = (Plan(run).answering(Layout("no", stage=stage), 400) for stage in (0, 3))
    assert 0.8 < ten.peak / once.peak < 1.3  # passes of no more tokens than a batch has
    assert 8 < sharded.peak / once.peak < 12  # all in one
    assert all(9 < samples.flops / once.flops < 11 for samples in (ten, sharded))


def test_a_tuned_prompt_is_planned(tiny_model):
    flags = ["--adapter_name", "prompt-tuning", "--prompt_init_text", "say", "--plan", "--batch_size", 4]
    plan = Plan(arguments(tiny_model, *flags, "--num_virtual_tokens", 8))
    longer = Plan(arguments(tiny_model, *flags, "--num_virtual_tokens", 80))
    few, many = (p.cost(p.asked, 4, False) for p in (plan, longer))
    assert many.flops > few.flops > 0 and many.peak > few.peak


@pytest.mark.parametrize("flags", [("--gpu_memory", "0"), ("--flops", "-1"), ("--plan_ranks", "0")])
def test_values_that_cannot_be_are_refused(tiny_model, flags):
    with pytest.raises(InputError, match=flags[0]):
        arguments(tiny_model, *flags)
