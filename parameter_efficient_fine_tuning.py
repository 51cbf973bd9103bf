"""Fine-tune a frozen language model with few parameters, sharded, answer held-out rows, write results/.

    accelerate launch --config_file ds_zero3_cpu.yaml parameter_efficient_fine_tuning.py --config recipes/NAME.yaml
    python parameter_efficient_fine_tuning.py --config recipes/NAME.yaml --lr 1e-3      # one process, no DeepSpeed

The way of the data: recipe and flags -> task -> frozen base -> adapter -> train -> predict -> results.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # until main begins: an eighth of the imports' time, and nothing that they make is garbage

from bhpeft.early import begin
from bhpeft.errors import InputError, run_main

if __name__ == "__main__":
    run_main(begin)  # mistakes are told before the imports below, which take seconds

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from bhpeft import environment
from bhpeft.adapters import attach_adapter, base_model_of, check_adapter, is_bayesian, virtual_tokens
from bhpeft.base_model import (
    check_4bit,
    check_positions,
    load_base_model,
    load_config,
    load_tokenizer,
    load_with_head,
    parameter_counts,
    settle_head,
)
from bhpeft.calibration import calibrate, check_calibration
from bhpeft.config import (
    Run,
    adopt_adapter,
    adopt_task,
    check_embeddings,
    check_output_dir,
    goes_on,
    name_run,
    note_idle,
    parse_arguments,
)
from bhpeft.feature_distance import check_distance
from bhpeft.fit import fit
from bhpeft.job import Job, Learned
from bhpeft.mc_dropout import check_dropout
from bhpeft.plan.model import Question, check_names
from bhpeft.plan.report import print_plan
from bhpeft.prediction import check_do_sample, greedy_config, sampling_config
from bhpeft.record import parameters_line, say, write_run
from bhpeft.results import RunFiles
from bhpeft.resume import alone, check_launch, check_unfinished, clear, find, refuse_if_running, settings_of
from bhpeft.rounds import learn_in_rounds
from bhpeft.tasks.cache import encode_cached, load_cached, open_cache
from bhpeft.tasks.encoding import Collator
from bhpeft.tasks.ood import encode_ood, read_ood
from bhpeft.tasks.packing import PackingCollator, check_packing
from bhpeft.tasks.question import card_of, make_encoder
from bhpeft.tasks.rounds import load_in_rounds
from bhpeft.tensor_files import check_weights
from bhpeft.trainer_arguments import TrainerArguments
from bhpeft.training import AdapterTrainer

GAUSSIAN = "train one with --adapter_name bh-peft or bayesian-lora (and not --bayesian none)"


def main(argv: list[str] | None = None) -> dict | None:
    """Run once; return the record written to `results/metrics/RUN.json` (on rank 0; None on the others)."""
    started = time.perf_counter()
    environment.keep_freed_memory()
    run = parse_arguments(argv)
    if run.plan.plan:
        return print_plan(run)
    job = prepare(run)
    with environment.naming_lost_ranks(), alone(job):
        return carry_out(job, started)


def carry_out(job: Job, started: float) -> dict | None:
    """Learn, answer and write; `started` by `time.perf_counter`. Returns as `main`."""
    run, training = job.run, job.run.training
    learned = learn_in_rounds(job, build_trainer) if job.plan else learn(job)
    trainer, answered = learned.trainer, learned.answered
    trained = time.perf_counter()
    job.know_the_domain(trainer)
    validation = trainer.evaluate() if training.do_eval else {}
    if training.do_eval and (job.task.task_type != "generation" or run.data.fit_temperature):
        rows = job.encoder.test_rows(job.task.validation, [])
        answered["validation"] = job.answer(trainer, rows, job.task.validation)
    if training.do_predict:
        answered["adapter"] = job.answer(trainer, job.test_rows, job.task.test)
    if training.do_predict and job.ood_rows:
        answered["ood"] = job.answer(trainer, job.ood_rows, job.ood)
    calibrate(run, job.task, answered, trainer.card)
    timings = {"load": trained - started - learned.seconds, "train": learned.seconds}
    timings["predict"] = time.perf_counter() - trained
    trained_rows = len(job.task.train if job.plan else trainer.train_dataset or ())  # those that fit --max_length
    return write_run(run, job.files, job.task, answered, learned.parameters, timings, validation, learned.history,
                     trained_rows, learned.rounds)  # fmt: skip


def prepare(run: Run) -> Job:
    """What the run needs but for weights: what is wrong with its input is found here, before one is loaded."""
    training = run.training
    trained_labels = ()
    if run.adapter.adapter_path:
        adopt_adapter(run)
        trained_labels = adopt_task(run)
    check_embeddings(run)
    if run.data.posterior_samples and not is_bayesian(run.adapter):
        raise InputError(f"--posterior_samples: {run.adapter.adapter_name} has no Gaussian weights; {GAUSSIAN}")
    if run.rounds.on and run.rounds.carry == "posterior" and not is_bayesian(run.adapter):
        raise InputError(
            f"--carry posterior: {run.adapter.adapter_name} has no Gaussian weights; {GAUSSIAN}, or --carry weights"
        )
    name_run(run)
    files = RunFiles(run.output.results_dir, training.run_name)
    refuse_if_running(run, files)
    check_unfinished(run, files.metrics)
    files.check_free(run.output.overwrite or goes_on(run))
    check_output_dir(run)
    base_name = run.base.base_model or base_model_of(run.adapter.adapter_path)
    config = load_config(base_name, run.base.revision)
    check_dropout(run, config)
    environment.check_compiler(training)
    if training.do_train:
        training.check_optimizer()
    in_4bit = settle_4bit(run)
    if training.idle_gpus:
        gpus = training.idle_gpus + 1
        run.notes.append(f"1 of {gpus} GPUs is used; `accelerate launch --num_processes {gpus} ...` uses all (README)")
    load = (run.data, training.data_seed, training.do_eval, training.do_train, trained_labels)
    cache = open_cache(run.output.row_cache, run.notes)
    task, plan = load_in_rounds(run.rounds, *load) if run.rounds.on else (load_cached(cache, *load), None)
    check_calibration(run, task)
    check_distance(run, task)
    ood = read_ood(run.data, task, training.data_seed)
    with_head = settle_head(run.base.head, config, task.task_type)
    note_idle(run, with_head)
    head = task.task_type if with_head else "lm"
    check_adapter(run.adapter, config, base_name, head, len(task.labels))
    check_packing(run, config, is_bayesian(run.adapter), with_head)
    check_do_sample(run.data, task)
    if training.label_smoothing_factor and task.task_type == "regression":
        raise InputError("--label_smoothing_factor: is about labels, and here they are numbers; leave it out")
    tokenizer = load_tokenizer(base_name, run.base.revision, generates=not with_head)
    known = task if plan is None else plan.at_first(task)
    encoder = make_encoder(tokenizer, run.data, known, with_head, run.adapter.adapter_path)
    notes = run.notes + task.notes
    if plan:
        plan.check_rows(task, encoder, notes)
    train_rows = encode_cached(cache, encoder, task, notes) if training.do_train and not plan else None
    validation_rows = encoder.train_rows(task.validation, notes) if training.do_eval else None
    test_rows = encoder.test_rows(task.test, notes)
    ood_rows = encode_ood(encoder, ood, notes)
    answers = training.do_predict or training.do_eval or run.output.compare_base
    generates = not with_head and run.data.predict_by == "generate" and answers
    beside = 0 if with_head else virtual_tokens(run.adapter) + run.data.max_new_tokens * generates
    check_positions(config, run.data.max_length + beside)
    check_names(run, config, base_name, Question(head, len(task.labels)))
    check_weights(base_name)
    files.prepare()
    say(*notes)
    rows = (train_rows, validation_rows, test_rows, ood, ood_rows)
    job = Job(run, files, task, plan, base_name, with_head, in_4bit, tokenizer, encoder, *rows)
    if run.output.resume and not plan:
        training.resume_from_checkpoint = find(job)
    elif training.resume_from_checkpoint:
        check_launch(training.resume_from_checkpoint)
    return job


def build_trainer(
    job: Job,
    train_rows: Sequence[dict] | None,
    training: TrainerArguments | None = None,
    adapter_path: str | None = None,
) -> AdapterTrainer:
    """The frozen base, sharded while it loads; the adapter, whole on every rank until DeepSpeed takes the model; and
    the trainer of the two.

    Args:
        train_rows: encoded rows to train on.
        training: in place of the run's own.
        adapter_path: folder of the adapter to start from, in place of the run's own.
    """
    run, task, encoder = job.run, job.task, job.encoder
    training = training or run.training
    set_seed(training.seed)
    how = (run.precision, job.in_4bit, run.base.revision, run.base.attn_implementation, run.base.base_dropout)
    if job.with_head:
        pad = job.tokenizer.pad_token_id
        base, trained_too = load_with_head(job.base_name, task.task_type, task.labels, pad, *how)
    else:
        base, trained_too = load_base_model(job.base_name, *how), []
    trained_too += run.adapter.modules_to_save or []
    adapter = dataclasses.replace(run.adapter, adapter_path=adapter_path or run.adapter.adapter_path)
    trainer = AdapterTrainer(
        model=attach_adapter(base, adapter, job.base_name, job.head, trained_too),
        args=training,
        train_dataset=train_rows,
        eval_dataset=job.validation_rows,
        data_collator=(PackingCollator if run.data.packing else Collator)(job.tokenizer.pad_token_id),
        processing_class=job.tokenizer,
        with_head=job.with_head,
    )
    trainer.settings = settings_of(job)
    trainer.kl_weight = run.adapter.kl_weight
    trainer.posterior_samples, trainer.mc_dropout_samples = run.data.posterior_samples, run.data.mc_dropout_samples
    trainer.card = card_of(run.data, task, encoder, job.in_4bit)
    if not job.with_head and run.data.predict_by == "generate":
        trainer.generation_config = greedy_config(job.tokenizer, run.data.max_new_tokens, encoder.end_id)
        if run.data.do_sample:
            how = (run.data.temperature, run.data.top_k, run.data.top_p)
            trainer.sampling_config = sampling_config(trainer.generation_config, *how)
    return trainer


def learn(job: Job) -> Learned:
    """Train on all rows at once, if the run trains."""
    trainer = build_trainer(job, job.train_rows)
    parameters = parameter_counts(trainer.model)
    say(parameters_line(parameters))
    loaded = time.perf_counter()
    learned = Learned(trainer, parameters, trainer.state.log_history)
    if job.run.output.compare_base:
        job.answer_with_base(trainer, learned.answered)
    if job.train_rows is not None:
        checkpoint = job.run.training.resume_from_checkpoint
        if checkpoint is None:
            clear(Path(job.run.training.output_dir))
        fit(trainer, checkpoint)
    learned.history = trainer.state.log_history
    learned.seconds = time.perf_counter() - loaded
    return learned


def settle_4bit(run: Run) -> bool:
    """Whether the base is loaded in 4 bit: it is what was asked for, or the run stops, or it says so."""
    if not run.load_in_4bit:
        return False
    try:
        check_4bit()
    except InputError as error:
        if not run.base.allow_full_precision:
            raise
        run.notes.append(f"NOT in 4 bit, as --allow_full_precision permits: {error}")
        return False
    return True


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    run_main(main)
    environment.leave_together()
