"""Learning in rounds: rows arrive bit by bit, and each round starts from what the one before has left.

    round t:  loss = mean NLL over its N_t rows + kl_weight KL(q || p_t) / N_t + what `--carry l2` adds
              p_{t+1} = q_t with --carry posterior      Chai et al. 2025, arXiv 2508.02711; Nguyen et al. 2018,
                                                        arXiv 1710.10628

A round is an ordinary training that starts from the folder of the round before, with an optimizer and a schedule of its
own. So saving, sharding and resuming are the same as for any run. `adapters/RUN/rounds.json` says which rounds are
finished; a round is when its adapter is saved and its answers are counted.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from bhpeft import environment
from bhpeft.adapters.carry import Anchor, posterior_to_prior
from bhpeft.arguments import RoundArguments
from bhpeft.base_model import parameter_counts
from bhpeft.config import ROUNDS_STATE
from bhpeft.errors import InputError
from bhpeft.files import read_text, write_atomic
from bhpeft.fit import fit
from bhpeft.job import Job, Learned
from bhpeft.prediction import read_answers
from bhpeft.record import parameters_line, say
from bhpeft.report import rounds as report
from bhpeft.report.answered import Answered
from bhpeft.resume import check_same, find_in, settings_of
from bhpeft.tasks import Example
from bhpeft.trainer_arguments import TrainerArguments
from bhpeft.training import AdapterTrainer

FEW_STEPS = 5  # a round of fewer is told of --min_round_steps


def learn_in_rounds(job: Job, build: Callable[..., AdapterTrainer]) -> Learned:
    """Train round after round, and after each answer the test and the rows of all rounds so far.

    Writes after every round its adapter, `results/rounds/RUN.csv` and the plot.

    Args:
        job: with a plan.
        build: `build(job, rows, training, adapter_path)` gives a trainer, its model's weights whole.

    Returns:
        The last round's, with `rounds` and the history of all.

    Raises:
        InputError: `--resume_rounds`, and the rounds that are finished are those of another run.
    """
    run = job.run
    folder, last = Path(run.training.output_dir), len(job.plan.new)
    finished = open_rounds(folder, settings_of(job), run.rounds.resume_rounds)
    answered: dict[str, Answered] = {}
    first, trainer, before = min(len(finished) + 1, last), None, len(finished)
    for number in range(first, last + 1):
        if trainer is not None:
            release(trainer)
        to_do = number > len(finished)  # else every round is finished, and only the run's own files are missing
        trainer, examples = begin_round(job, build, number, to_do)
        if number == first:
            parameters = parameter_counts(trainer.model)
            say(parameters_line(parameters))
        if run.output.compare_base and number == last:
            job.answer_with_base(trainer, answered)
        if to_do:
            finished.append(train_round(job, trainer, number, len(examples)))
            keep(job, finished)
            say(line_of(finished[-1]))
            if finished[-1]["steps"] < FEW_STEPS and run.training.max_steps <= 0:
                say(f"  fewer than {FEW_STEPS} steps: --min_round_steps gives small rounds more")
    trainer.save_model(str(folder))
    told = [{name: value for name, value in done.items() if name != "history"} for done in finished]
    history = [entry for done in finished for entry in done["history"]]
    seconds = sum(done["seconds"] for done in finished[before:])  # of this process
    return Learned(trainer, parameters, history, answered, seconds, told)


def begin_round(
    job: Job, build: Callable[..., AdapterTrainer], number: int, to_do: bool
) -> tuple[AdapterTrainer, list[Example]]:
    """The trainer of a round, and the examples that it trains on.

    Args:
        to_do: it starts from what the round before has left; else it is finished, and loaded as it ended.
    """
    run, rounds = job.run, job.run.rounds
    here, before = (Path(run.training.output_dir) / report.name_of(n) for n in (number, number - 1))
    examples = job.plan.trained(job.task, number, rounds.replay, rounds.replay_ratio, run.training.data_seed)
    rows = job.encoder.train_rows(examples, [])
    training = training_of(job, here, len(rows))
    if not to_do:
        return build(job, None, training, str(here)), examples
    afresh = number == 1 or rounds.carry == "none"
    trainer = build(job, rows, training, None if afresh else str(before))
    if number > 1 or run.adapter.adapter_path:
        carry(rounds, trainer)
    return trainer, examples


def carry(rounds: RoundArguments, trainer: AdapterTrainer) -> None:
    """Give a round what the one before has left, beside the weights, which its trainer starts from.

    Args:
        trainer: not trained yet, its model's weights whole.
    """
    if rounds.carry == "posterior":
        posterior_to_prior(trainer.model, rounds.prior_widening)
    if rounds.l2_weight:
        trainer.anchor = Anchor(trainer.model, gaussian=rounds.carry == "l2")
        trainer.l2_weight = rounds.l2_weight


def train_round(job: Job, trainer: AdapterTrainer, number: int, examples: int) -> dict:
    """Train, save the adapter and answer; what the round did, as `report.write_rounds` takes it.

    Args:
        examples: how many it trains on, those that are too long counted.
    """
    rounds, new = job.run.rounds, job.plan.new
    begun = time.perf_counter()
    fit(trainer, find_in(Path(trainer.args.output_dir)) if rounds.resume_rounds else None)
    seconds = time.perf_counter() - begun
    return {
        "round": number,
        "new_rows": len(new[number - 1]),
        "total_rows": sum(map(len, new[:number])),
        "trained_rows": len(trainer.train_dataset),
        "replayed_rows": examples - len(new[number - 1]),
        "epochs": round(trainer.state.epoch, 4),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 3),
        "carry": rounds.carry,
        "replay": rounds.replay,
        "history": [{"round": number, **entry} for entry in trainer.state.log_history],
        "evaluations": evaluate(job, trainer, number),
    }


def training_of(job: Job, folder: Path, rows: int) -> TrainerArguments:
    """Settings of one round: fresh ones, for DeepSpeed fills its own in; epochs as `--min_round_steps` wants them.

    Args:
        folder: of the round's adapter and checkpoints.
        rows: how many it trains on.
    """
    own = job.run.training
    batch = own.per_device_train_batch_size * own.world_size
    a_epoch = math.ceil(math.ceil(rows / batch) / own.gradient_accumulation_steps)
    epochs = max(own.num_train_epochs, math.ceil(job.run.rounds.min_round_steps / a_epoch))
    # Precision is told afterwards, as in config.py: TrainingArguments refuse half precision on a CPU.
    made = dataclasses.replace(own, output_dir=str(folder), num_train_epochs=epochs, fp16=False, bf16=False)
    environment.set_precision(made, job.run.precision)
    return made


def evaluate(job: Job, trainer: AdapterTrainer, number: int) -> list[dict]:
    """Answer the test and what is asked of every round so far, in one pass, and judge each part.

    Returns:
        For each part `evaluated_on` ("test"; "test-02": that of the second file; "round-02": its training rows) and
        the figures of `report.evaluation`.
    """
    task, plan, rounds = job.task, job.plan, job.run.rounds
    parts = {"test": list(range(len(task.test)))}
    parts |= {report.name_of(i, "test"): places for i, places in enumerate(plan.tests, 1)}
    examples = list(task.test)
    for before in range(1, number + 1):
        known = plan.known(before, rounds.max_known_samples, job.run.training.data_seed)
        parts[report.name_of(before)] = list(range(len(examples), len(examples) + len(known)))
        examples += [task.train[place] for place in known]
    rows = job.encoder.test_rows(examples, [])
    answers = trainer.answer(rows)
    answered = read_answers(answers, rows, examples, task, job.encoder)
    place_of = {int(index): place for place, index in enumerate(answers.index)}  # too long ones may have been dropped
    found = []
    for name, wanted in parts.items():
        some = report.some_of(answered, [place_of[index] for index in wanted if index in place_of])
        if some.ids:
            found.append({"evaluated_on": name, **report.evaluation(some, task)})
    return found


def keep(job: Job, finished: list[dict]) -> None:
    """Write down what is finished, on rank 0: the table, the plot, and last of all that it is finished."""
    if environment.is_main_process():
        report.write_rounds(job.files.rounds, finished)
        write_atomic(job.files.plots / "rounds.png", report.draw(finished, job.plan.files))
        write_state(Path(job.run.training.output_dir), settings_of(job), finished)
    environment.wait_for_all()


def line_of(done: dict) -> str:
    """One line on a round, for the terminal."""
    test, *_ = (asked for asked in done["evaluations"] if asked["evaluated_on"] == "test")
    rows = f"{done['new_rows']} new rows" + (f", {done['replayed_rows']} replayed" if done["replayed_rows"] else "")
    steps = f"{done['steps']} step{'s' if done['steps'] != 1 else ''}"
    value = f"{report.NAMES[test['metric']]} {test['value']:.3f} on the test"
    return f"round {done['round']}: {rows}, {steps}, {done['seconds']:.1f} s; {value}"


# --------------------------------------------------------------------------------------------- resuming


def open_rounds(folder: Path, settings: dict, resume: bool) -> list[dict]:
    """The rounds that are finished in a run's folder; without `resume` none, and what an earlier run left is removed.

    Raises:
        InputError: they were made with other settings, or other rows.
    """
    if not resume:
        return begin(folder, settings)
    state = read_state(folder)
    if state is None:
        say(f"{folder}: nothing to go on with; beginning with the first round")
        return begin(folder, settings)
    check_same(state["settings"], settings, f"--resume_rounds: {folder / ROUNDS_STATE}")
    say(f"{len(state['rounds'])} rounds are finished in {folder}: going on behind them")
    return state["rounds"]


def begin(folder: Path, settings: dict) -> list[dict]:
    """Make a folder of rounds of which none is finished; what an earlier run left in it is removed."""
    environment.wait_for_all()  # every rank has looked into the folder
    if environment.is_main_process():
        for old in folder.glob("round-*"):
            if old.is_dir() and re.fullmatch(r"round-\d{2,}", old.name):
                shutil.rmtree(old)
        write_state(folder, settings, [])
    environment.wait_for_all()
    return []


def write_state(folder: Path, settings: dict, finished: list[dict]) -> None:
    """Write which rounds are finished, and with what settings."""
    state = {"settings": settings, "rounds": finished}
    write_atomic(folder / ROUNDS_STATE, json.dumps(state, indent=1) + "\n")


def read_state(folder: Path) -> dict | None:
    """What `keep` wrote into a run's folder; None where it has not yet.

    Raises:
        InputError: it is something else.
    """
    file = folder / ROUNDS_STATE
    if not file.is_file():
        return None
    try:
        state = json.loads(read_text(file))
        return {"settings": dict(state["settings"]), "rounds": list(state["rounds"])}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not what a run in rounds writes ({error}); begin again with --overwrite") from error


def release(trainer: AdapterTrainer) -> None:
    """Free a trainer's model, optimizer and, under DeepSpeed, its engine, before the next is built."""
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.deepspeed = trainer.anchor = None  # the engine holds the shards of the base
    trainer.gaussian, trainer.trained = [], []
    trainer.callback_handler.model = trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    gc.collect()
