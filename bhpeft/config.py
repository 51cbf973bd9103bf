"""Recipes and flags, read into a `Run`.

A recipe (`--config FILE.yaml`) is a flat mapping of flag names to values; a flag on the command line beats
the file. Every mistake is an `InputError` of one line, raised before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from bhpeft import environment
from bhpeft.adapters import adopt_settings, has_prefix
from bhpeft.arguments import (
    ADAPTER_OWN,
    ALL_OWN,
    BH_PEFT_OWN,
    AdapterArguments,
    BaseModelArguments,
    DataArguments,
    OutputArguments,
    PlanArguments,
    RoundArguments,
)
from bhpeft.checkpoints import PARTIAL, fault, steps
from bhpeft.errors import InputError
from bhpeft.flags import FlagParser, command_words
from bhpeft.tasks.card import TaskCard
from bhpeft.tasks.load import KNOWN_DATASETS
from bhpeft.trainer_arguments import ARGUMENT_CLASSES, UNSET_OUTPUT_DIR, TrainerArguments

ROUNDS_STATE = "rounds.json"  # in the folder of a run in rounds: which of them are finished


# Flags that only say how another one is done. A recipe may hold them while a flag switches the other off: no error.
IDLE_WITHOUT = {
    **dict.fromkeys(("temperature", "top_k", "top_p"), "do_sample"),
    **dict.fromkeys(("ood_data_path", "max_ood_samples"), "ood_dataset_name"),
}
# Flags of questions and answers as text, which a model with a head of its own does without.
OF_TEXT = ("prompt_template", "instruction", "answer_end", "predict_by", "max_new_tokens", "context_turns")


@dataclass
class Run:
    """All settings of one run, and the one-line notes to show before it starts."""

    base: BaseModelArguments
    adapter: AdapterArguments
    data: DataArguments
    output: OutputArguments
    rounds: RoundArguments
    plan: PlanArguments
    training: TrainerArguments
    precision: str  # "no" (fp32), "fp16" or "bf16"
    notes: list[str]
    given: frozenset[str] = frozenset()  # names of the flags that were given, in a recipe or on the command line

    @property
    def load_in_4bit(self) -> bool:
        """Whether the base is asked for in 4 bit: by the flag, or by QLoRA's name."""
        return self.base.load_in_4bit or self.adapter.adapter_name == "qlora"

    def as_dict(self) -> dict:
        """The whole configuration, JSON-ready, secrets left out."""
        settings = {"precision": self.precision, **self.training.to_sanitized_dict()}
        for part in (self.base, self.adapter, self.data, self.output, self.rounds):
            settings.update(dataclasses.asdict(part))
        return {name: value for name, value in settings.items() if not name.endswith("_token")}


def _flag_names(parser: FlagParser) -> set[str]:
    return {name[2:] for name in parser._option_string_actions if name.startswith("--")}


def parse_arguments(argv: list[str] | None = None) -> Run:
    """Read `--config FILE.yaml` and flags into a `Run`.

    Args:
        argv: words of the command line without the program's name; default `sys.argv[1:]`.

    Raises:
        InputError: unknown flag or key (with the nearest name), or a value that cannot be.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = FlagParser(ARGUMENT_CLASSES, allow_abbrev=False, description="Fine-tune a frozen language model.")
    parser.add_argument("--config", help="recipe: a YAML file of flag names and values; flags beat it")
    known = _flag_names(parser)
    words = command_words(argv, known)
    namespace, rest = parser.parse_known_args(words)
    if rest:
        raise InputError(f"{rest[0]!r}: a value without a flag. All flags: --help")
    settings = vars(namespace)
    precision, notes = environment.prepare(settings)
    try:
        base, adapter, data, output, rounds, plan, training = parser.parse_dict(settings, allow_extra_keys=True)
    except InputError:
        raise
    except (ValueError, OSError) as error:  # TrainingArguments refuses a value or a combination, or reads a file
        raise InputError(str(error)) from error
    environment.set_precision(training, precision)
    given = frozenset(word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--"))
    run = Run(base, adapter, data, output, rounds, plan, training, precision, notes, given)
    if output.smoke:
        _make_small(run)
    _check(run)
    if training.do_train and base.attn_implementation is None and not plan.gpu_memory:  # a plan for a GPU: its own
        how = (precision, data.max_length, has_prefix(adapter))
        base.attn_implementation = environment.training_attention(*how)
    return run


def _make_small(run: Run) -> None:
    """--smoke: everything a run does, on a handful of rows; nothing that decides what the code does is changed."""
    data, training = run.data, run.training
    data.max_train_samples = min(data.max_train_samples or 64, 64)
    data.max_validation_samples = min(data.max_validation_samples or 16, 16)
    data.max_test_samples = min(data.max_test_samples or 16, 16)
    data.max_ood_samples = min(data.max_ood_samples, 16)
    data.max_new_tokens = min(data.max_new_tokens, 8)
    data.long_prompts = "truncate"
    training.max_steps = min(training.max_steps, 4) if training.max_steps > 0 else 4
    training.per_device_train_batch_size = min(training.per_device_train_batch_size, 4)
    training.gradient_accumulation_steps = min(training.gradient_accumulation_steps, 2)
    training.logging_steps = 1
    training.warmup_steps = 0
    if run.rounds.rounds:
        run.rounds.rounds = [min(size, 16) for size in run.rounds.rounds[:3]]
    run.notes.append("--smoke: at most 64 training, 16 validation and 16 test rows, 4 steps; its figures mean nothing")


def _check(run: Run) -> None:
    """Settings that only make sense together, and the names that follow from others."""
    checkpoint = run.training.resume_from_checkpoint
    if checkpoint and (why := fault(Path(checkpoint))):
        whole = ", ".join(str(path) for _, path in steps(Path(checkpoint).parent) if not fault(path)) or "none"
        what = f"--resume_from_checkpoint {checkpoint}: no whole checkpoint"
        raise InputError(f"{what}, {why}; whole ones beside it: {whole}")
    if run.output.resume:
        _check_resume(run)
    if run.rounds.on:
        _check_rounds(run)
    elif unused := sorted(run.given & {field.name for field in dataclasses.fields(RoundArguments)}):
        raise InputError(f"--{unused[0]}: is about rounds; give --rounds or --round_files as well")
    if not run.data.dataset_name:
        raise InputError("--dataset_name: missing; give a known name, or a .csv file with text_input,text_label")
    if not run.base.base_model and not run.adapter.adapter_path:
        raise InputError("--base_model: missing; give a hub id or a folder (or --adapter_path, which knows its base)")
    if not run.training.do_train and not run.adapter.adapter_path:
        raise InputError("--do_train false: there is nothing to test; give --adapter_path FOLDER")
    for name in ("fit_temperature", "validation_file"):
        if getattr(run.data, name) and not run.training.do_eval:
            raise InputError(f"--{name}: is about validation rows; give --do_eval as well")
    if not run.adapter.adapter_path:
        _leave_out_idle(run)
    for name, needed in IDLE_WITHOUT.items():
        if name in run.given and not getattr(run.data, needed):
            run.notes.append(f"--{name}: has no effect without --{needed}")
    if not (run.training.do_train or run.training.do_eval or run.training.do_predict):
        raise InputError("--do_train, --do_eval and --do_predict are all false: nothing to do; switch one on")


def _leave_out_idle(run: Run) -> None:
    """Settings that another adapter has and this one has not: said, and as if they were not given, so that the record
    does not claim them. A recipe may hold them while a flag asks for another adapter."""
    name = run.adapter.adapter_name
    idle = (run.given & ALL_OWN) - set(ADAPTER_OWN.get(name, BH_PEFT_OWN))
    defaults = {field.name: field.default for field in dataclasses.fields(run.adapter)}
    for flag in sorted(idle):
        setattr(run.adapter, flag, defaults[flag])
        run.notes.append(f"--{flag}: has no effect with --adapter_name {name}")


def adopt_adapter(run: Run) -> None:
    """Take over what the adapter at `--adapter_path` is; say which flags ask for something else."""
    asked = dict(vars(run.adapter))
    adopt_settings(run.adapter)
    own = set(ADAPTER_OWN.get(run.adapter.adapter_name, BH_PEFT_OWN)) | {"adapter_name"}
    for flag in sorted(run.given & own - {"target_modules"}):
        if (has := getattr(run.adapter, flag)) != asked[flag]:
            run.notes.append(f"--{flag} {asked[flag]}: has no effect; the adapter at --adapter_path has {has}")
    _leave_out_idle(run)


def check_embeddings(run: Run) -> None:
    """Raise `InputError` for settings that take embeddings or logits for those of text alone, where a prompt is tuned;
    the adapter's settings are adopted."""
    if run.training.do_train and run.adapter.adapter_name == "prompt-tuning":
        for name, why in (
            ("label_smoothing_factor", "it takes virtual tokens for text"),
            ("neftune_noise_alpha", "its embeddings are what is trained"),
        ):
            if getattr(run.training, name):
                raise InputError(f"--{name} with prompt-tuning: {why}; leave it out")


def _check_resume(run: Run) -> None:
    """`--resume` goes on with this run's own training; in rounds it is `--resume_rounds`."""
    for name, why in (
        ("overwrite", "one goes on, the other begins again"),
        ("resume_from_checkpoint", "it finds the checkpoint itself"),
    ):
        if getattr(run.output, name, None) or getattr(run.training, name, None):
            raise InputError(f"--resume with --{name}: {why}; give one of them")
    if not run.training.do_train:
        raise InputError("--resume with --do_train false: there is no training to go on with; leave one of them out")
    run.rounds.resume_rounds = run.rounds.on


def _check_rounds(run: Run) -> None:
    """Settings that rounds do not go together with; and the dataset's name where each round has a file of its own."""
    flag = "rounds" if run.rounds.rounds else "round_files"
    for name, why in (
        ("do_train", "there is nothing to learn in rounds"),
        ("do_predict", "rounds are judged by their answers"),
    ):
        if not getattr(run.training, name):
            raise InputError(f"--{flag} with --{name} false: {why}; leave --{name} out")
    if run.training.resume_from_checkpoint:
        raise InputError(f"--resume_from_checkpoint with --{flag}: give --resume_rounds; it finds the checkpoint")
    if run.rounds.min_round_steps and run.training.max_steps > 0 and "max_steps" in run.given:
        raise InputError("--min_round_steps with --max_steps: every round takes just --max_steps; give one of them")
    if run.rounds.carry == "none" and run.adapter.adapter_path:
        raise InputError("--adapter_path with --carry none: every round would start from scratch; give another --carry")
    if run.rounds.round_files:
        for name in ("dataset_name", "test_file", "validation_file"):
            if getattr(run.data, name, None):
                raise InputError(f"--{name} with --round_files: rows come from the files, which are held out from, too")
        for file in run.rounds.round_files:
            if not Path(file).is_file():
                raise InputError(f"--round_files {file}: no such file")
        run.data.dataset_name = "+".join(Path(file).stem for file in run.rounds.round_files)[:60]


def adopt_task(run: Run) -> tuple[str, ...]:
    """Set what is asked to what the adapter at `--adapter_path` was trained for, where no flag says otherwise.

    Returns:
        The labels it was trained with, in their order; empty where its folder says nothing.

    Raises:
        InputError: `--task_type` is another one than it was trained for.
    """
    card = TaskCard.read(run.adapter.adapter_path)
    if card is None:
        return ()
    if run.data.task_type not in (None, card.task_type):
        raise InputError(
            f"--task_type {run.data.task_type}: the adapter {run.adapter.adapter_path} was trained for {card.task_type}"
        )
    run.data.task_type = card.task_type
    if run.base.head == "auto":
        run.base.head = "task" if card.head else "lm"
    for name in ("prompt_template", "instruction", "max_length", "answer_end", "predict_by", "context_turns"):
        if name not in run.given:
            setattr(run.data, name, getattr(card, name))
    if card.base_in_4bit and not run.load_in_4bit and not run.base.allow_full_precision:
        run.base.load_in_4bit = True
        run.notes.append("base in 4 bit, as the adapter was trained; --allow_full_precision loads it whole")
    if card.head and run.data.labels and list(run.data.labels) != list(card.labels):
        run.notes.append(f"--labels: has no effect; the adapter's head tells {', '.join(card.labels)} apart")
    if card.task_type != "classification" or (run.data.labels and not card.head):
        return ()  # labels as text may be others in another run; a head's are fixed
    return tuple(card.labels)


def note_idle(run: Run, with_head: bool) -> None:
    """Add a note on each flag that was given and does nothing in this run.

    Args:
        with_head: the model answers by a head of its own.
    """
    if with_head:
        for name in sorted(run.given & set(OF_TEXT)):
            run.notes.append(f"--{name}: has no effect; the model answers by a head of its own (--head lm: by text)")
    name = run.data.dataset_name
    if run.data.data_path and name not in KNOWN_DATASETS and not run.rounds.round_files:
        run.notes.append(f"--data_path: has no effect; {name} is no known dataset")


def name_run(run: Run) -> None:
    """Set the run's name and the adapter's folder where no flag gave them."""
    if run.training.run_name is None:
        source = run.base.base_model or run.adapter.adapter_path
        parts = [run.adapter.adapter_name, Path(source).name, Path(run.data.dataset_name).stem]
        name = "_".join(parts if run.training.do_train else ["test", *parts])
        run.training.run_name = re.sub(r"\.ood$", "-ood", re.sub(r"[^A-Za-z0-9._-]+", "-", name))
    if run.training.output_dir is None or run.training.output_dir == UNSET_OUTPUT_DIR:
        run.training.output_dir = str(Path("adapters") / run.training.run_name)


def goes_on(run: Run) -> bool:
    """Whether `--resume` or `--resume_rounds` finds anything of this run to go on with, whole or not."""
    folder = Path(run.training.output_dir)
    if run.rounds.on:
        return run.rounds.resume_rounds and (folder / ROUNDS_STATE).is_file()
    return run.output.resume and bool(steps(folder) or (folder / PARTIAL).exists())


def check_output_dir(run: Run) -> None:
    """Raise `InputError` if the run would write its adapter over another one and may not."""
    folder = Path(run.training.output_dir)
    if not run.training.do_train:
        return
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise InputError(f"--output_dir {folder}: {part} is a file; choose another --output_dir or --run_name")
    checkpoint = run.training.resume_from_checkpoint
    if goes_on(run):
        return
    if run.output.overwrite or (checkpoint and Path(checkpoint).resolve().parent == folder.resolve()):
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(
            f"{folder} exists and is not empty; choose another --run_name or --output_dir, or pass --overwrite"
        )
