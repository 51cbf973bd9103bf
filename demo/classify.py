"""Ask a trained adapter: a text's label, how probable each label is, and how sure the model may be.

    python demo/classify.py "TEXT" --adapter_path FOLDER
    python demo/classify.py --adapter_path FOLDER < lines.txt
    python demo/classify.py --adapter_path FOLDER --file rows.csv --text_column text_input --out answers.csv

An adapter with Gaussian weights answers with S weights drawn from its posterior (--posterior_samples). With p_s the
probabilities under sample s and H the entropy in nats:

    probability          p = mean_s p_s
    entropy              H(p), all uncertainty
    mutual information   H(p) - mean_s H(p_s), the part of it that is the weights' and not the text's

--posterior_samples 0 answers with the posterior mean of the weights, as the trainer's results/predictions/ do. Where
the adapter was trained with --fit_temperature, p_s = softmax(scores / T) with the temperature T of its card.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from bhpeft.adapter_files import check_adapter_folder  # noqa: E402
from bhpeft.errors import InputError, Parser, check_utf8, run_main  # noqa: E402
from bhpeft.files import csv_line, write_rows  # noqa: E402
from bhpeft.scores import entropy, probabilities  # noqa: E402
from bhpeft.uncertainty import total_deviation  # noqa: E402

if TYPE_CHECKING:  # torch and transformers are loaded once the flags are known to be right
    from transformers import PretrainedConfig

    from bhpeft.arguments import AdapterArguments
    from bhpeft.tasks.card import TaskCard

PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}
ANSWER_COLUMNS = ("prediction", "max_prob", "entropy", "mutual_information", "max_prob_sd", "prediction_sd",
                  "total_sd", "low_95", "high_95")  # fmt: skip
SAMPLES = 10  # of the posterior, where nothing else is asked for and there is one


@dataclass
class Trained:
    """An adapter that has been checked, its base not yet loaded.

    Attributes:
        card: what it was trained for.
        base_name, config: its base model.
        with_head: whether it answers by a head of its own.
        samples: S weights to draw from its posterior; 0 for its weights as they are, or their mean.
    """

    card: TaskCard
    arguments: AdapterArguments
    base_name: str
    config: PretrainedConfig
    with_head: bool
    samples: int

    @property
    def head(self) -> str:
        return self.card.task_type if self.with_head else "lm"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags.

    Raises:
        InputError: two sources of texts, an empty text, or a number that cannot be.
    """
    parser = Parser(__doc__)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="one text (default, and for '-': lines of stdin)")
    parser.add_argument("--adapter_path", required=True, metavar="FOLDER", help="folder of the adapter")
    parser.add_argument("--base_model", help="hub id or folder (default: the one the adapter names)")
    parser.add_argument(
        "--file", type=Path, help=".csv, .tsv, .jsonl or .parquet of texts, all of whose rows are asked"
    )
    parser.add_argument("--text_column", default="text_input", help="column of the texts (default: text_input)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the answers as CSV (default: print them)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file --out")
    parser.add_argument(
        "--posterior_samples", type=int, metavar="S",
        help=f"weights drawn from the posterior (default: {SAMPLES} where the adapter has one; 0: its mean)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="of the samples (default: 42, as the trainer's)")
    parser.add_argument("--batch_size", type=int, default=32, help="texts times samples a forward pass (default: 32)")
    parser.add_argument("--max_length", type=int, help="most tokens of a text (default: the adapter's)")
    parser.add_argument("--long_prompts", choices=["error", "truncate"], default="error", help="default: error")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="of the base (default: float32)")
    parser.add_argument(
        "--allow_full_precision", action="store_true", help="load the base whole where it was trained on in 4 bit"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    if args.file and args.text is not None:
        raise InputError("TEXT and --file: two sources of texts; give one")
    if args.text is not None and not args.text.strip():
        raise InputError("TEXT: is empty; give a text to classify")
    if args.out:
        check_out(args.out, args.file, args.overwrite)
    if args.text is not None:
        check_utf8("TEXT", args.text)
    for name, least in (("batch_size", 1), ("max_length", 1), ("seed", 0)):
        if getattr(args, name) is not None and not least <= getattr(args, name) < 2**32:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least {least} and below 2**32")
    if args.posterior_samples is not None and (args.posterior_samples < 0 or args.posterior_samples == 1):
        raise InputError(f"--posterior_samples {args.posterior_samples}: must be 0 (the posterior mean), or 2 or more")
    return args


def check_out(out: Path, file: Path | None, overwrite: bool) -> None:
    """Raise `InputError` where the answers cannot be written, or would take the place of what is there."""
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; give the name of a file")
    if file and out.resolve() == file.resolve():
        raise InputError(f"--out {out}: is the file that is read; choose another name")
    if out.exists() and not overwrite:
        raise InputError(f"--out {out}: exists; choose another name or pass --overwrite")
    folder = next(part for part in out.absolute().parents if part.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: {folder} is no folder that can be written to; choose another")


def find_adapter(args: argparse.Namespace) -> Trained:
    """Everything about the adapter that can be wrong and be seen without weights.

    Raises:
        InputError: no adapter there, one of another base model, or one for a task without labels or numbers.
    """
    from bhpeft.tasks.card import FILE, TaskCard

    folder = args.adapter_path
    check_adapter_folder(folder)
    card = TaskCard.read(folder)
    if card is None:
        raise InputError(
            f"--adapter_path {folder}: the folder has no {FILE}, which says what it was trained for; give the folder "
            "as parameter_efficient_fine_tuning.py wrote it"
        )
    if card.task_type not in ("classification", "regression"):
        raise InputError(
            f"--adapter_path {folder}: trained for {card.task_type}, and this script gives labels or numbers to texts; "
            f"answer rows with parameter_efficient_fine_tuning.py --adapter_path {folder} --do_train false "
            "--dataset_name FILE"
        )
    if card.task_type == "regression" and None in (card.target_mean, card.target_deviation):
        raise InputError(f"{Path(folder) / FILE}: lacks target_mean or target_deviation; train again to have them")

    from bhpeft.adapters import adopt_settings, base_model_of, check_adapter, is_bayesian
    from bhpeft.arguments import AdapterArguments
    from bhpeft.base_model import load_config, settle_head

    arguments = AdapterArguments(adapter_path=folder)
    adopt_settings(arguments)
    bayesian = is_bayesian(arguments)
    samples = args.posterior_samples
    if samples and not bayesian:
        raise InputError(
            f"--posterior_samples {samples}: the adapter ({arguments.adapter_name}) has no Gaussian weights to draw "
            "from; leave it out, or train with --adapter_name bh-peft"
        )
    base_name = args.base_model or base_model_of(folder)
    config = load_config(base_name)
    with_head = settle_head("task" if card.head else "lm", config, card.task_type)
    if samples is None:
        samples = SAMPLES if bayesian else 0
    found = Trained(card, arguments, base_name, config, with_head, samples)
    labels = len(card.labels) if card.task_type == "classification" else None
    check_adapter(arguments, config, base_name, found.head, labels)
    return found


def read_texts(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The texts to ask about, and their column's name.

    Raises:
        InputError: there is none, one is empty, or the file is not as it should be.
    """
    if args.file:
        from bhpeft.tasks.table import read_columns

        return args.text_column, read_columns(args.file, [args.text_column])[args.text_column].tolist()
    if args.text not in (None, "-"):
        return "text", [args.text]
    if sys.stdin.isatty():
        print("one text a line; end with Ctrl-D", file=sys.stderr)
    try:
        lines = sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: byte {error.start} is not UTF-8; convert the text first") from None
    if lines == [""]:
        raise InputError("standard input: is empty; give lines of text, or TEXT, or --file")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise InputError(f"standard input:{number}: the line is empty; each line is a text, so remove it")
    return "text", lines


def answer(found: Trained, texts: Sequence[str], args: argparse.Namespace) -> dict[str, list]:
    """Load the model and ask it about N texts.

    Returns:
        As of `label_columns` or `number_columns`.

    Raises:
        InputError: texts are longer than the adapter or its base allows, or the weights do not fit.
    """
    import torch

    from bhpeft.adapters import attach_adapter, virtual_tokens
    from bhpeft.arguments import DataArguments
    from bhpeft.base_model import (
        check_4bit,
        check_positions,
        load_base_model,
        load_tokenizer,
        load_with_head,
    )
    from bhpeft.calibration import noise_note
    from bhpeft.scoring import score
    from bhpeft.tasks import Example, Task
    from bhpeft.tasks.card import TaskCard
    from bhpeft.tasks.question import make_encoder
    from bhpeft.tensor_files import check_weights

    card, notes = found.card, []
    shared = {field.name for field in dataclasses.fields(TaskCard)} - {"labels"}
    data = DataArguments(
        **{f.name: getattr(card, f.name) for f in dataclasses.fields(DataArguments) if f.name in shared}
    )
    data.max_length, data.long_prompts = args.max_length or card.max_length, args.long_prompts
    room_for = card.labels[0] if card.labels else "0"  # a cut text leaves room for an answer
    examples = [Example(str(i), text.strip(), room_for, str(i)) for i, text in enumerate(texts)]
    task = Task("texts", [], [], examples, card.task_type, tuple(card.labels))
    tokenizer = load_tokenizer(found.base_name, generates=not found.with_head)
    encoder = make_encoder(tokenizer, data, task, found.with_head, found.arguments.adapter_path)
    rows = encoder.test_rows(examples, notes)
    longest = max(len(row["input_ids"]) + max(map(len, row.get("label_ids", [[]]))) for row in rows)
    check_positions(found.config, longest + virtual_tokens(found.arguments))
    check_weights(found.base_name)
    in_4bit = card.base_in_4bit and not args.allow_full_precision
    if in_4bit:
        check_4bit()
    for note in notes:
        print(note, file=sys.stderr)

    how = (PRECISIONS[args.dtype], in_4bit)
    if found.with_head:
        base, _ = load_with_head(found.base_name, card.task_type, card.labels, tokenizer.pad_token_id, *how)
    else:
        base = load_base_model(found.base_name, *how)
    model = attach_adapter(base, found.arguments, found.base_name, found.head).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    scores = score(model, rows, tokenizer.pad_token_id, args.batch_size, found.samples, args.seed)
    if not task.labels:
        if card.noise_sd is not None and (note := noise_note(card.noise_samples, found.samples)):
            print(f"noise of the labels by validation rows{note}", file=sys.stderr)
        return number_columns(encoder.standardiser.restore(scores), card.noise_sd, card.noise_samples)
    if card.score_temperature is not None:
        note = f"probabilities at temperature {card.score_temperature:.3f}, as the adapter's card says"
        if card.score_temperature_samples != found.samples:
            note += f" (fitted with {card.score_temperature_samples} samples of the weights, not {found.samples})"
        print(note, file=sys.stderr)
    return label_columns(scores / (card.score_temperature or 1.0), card.labels)


def label_columns(scores: np.ndarray, labels: Sequence[str]) -> dict[str, list]:
    """Labels and how sure they are.

    Args:
        scores: (S, N, C), log-likelihoods or logits of C labels under S weights.

    Returns:
        prediction, `prob_<label>`, max_prob and entropy (nats) of the mean over the weights, N values each; where S
        is above 1 also mutual_information (nats) and max_prob_sd, the standard deviation of the prediction's
        probability over the weights.
    """
    each = probabilities(scores)
    p = each.mean(0)
    best = p.argmax(1)
    columns = {"prediction": np.array(labels, dtype=object)[best]}
    columns |= {f"prob_{label}": p[:, i] for i, label in enumerate(labels)}
    columns |= {"max_prob": p.max(1), "entropy": entropy(p)}
    if len(scores) > 1:
        columns["mutual_information"] = np.maximum(entropy(p) - entropy(each).mean(0), 0)  # rounding may go below
        columns["max_prob_sd"] = each[:, np.arange(len(p)), best].std(0)
    return {name: values.tolist() for name, values in columns.items()}


def number_columns(
    values: np.ndarray, noise_sd: float | None = None, noise_samples: int | None = None
) -> dict[str, list]:
    """Numbers and their spread.

    Args:
        values: (S, N, 1) in the labels' own units, under S weights.
        noise_sd: deviation of the labels' own noise, where the adapter's card knows it.
        noise_samples: how many samples it was measured beside, likewise (`total_deviation`).

    Returns:
        prediction, the mean over the weights, N values; where S is above 1 also prediction_sd; with `noise_sd` also
        total_sd and the Gaussian 95 % interval low_95 to high_95.
    """
    mean, spread = values[..., 0].mean(0), values[..., 0].std(0)
    columns = {"prediction": mean.tolist()}
    if len(values) > 1:
        columns["prediction_sd"] = spread.tolist()
    if noise_sd is not None:
        total = total_deviation(spread, noise_sd, noise_samples)
        half = NormalDist().inv_cdf(0.975) * total
        columns |= {"total_sd": total.tolist(), "low_95": (mean - half).tolist(), "high_95": (mean + half).tolist()}
    return columns


def describe(answers: dict[str, list], row: int, samples: int) -> str:
    """One text's answer in words, the likeliest label first."""
    at = {name: values[row] for name, values in answers.items()}
    over = f"over {samples} posterior samples"
    if "max_prob" not in at:
        lines = [("number", f"{at['prediction']:.6g}")]
        if "prediction_sd" in at:
            lines.append(("standard deviation", f"{at['prediction_sd']:.4g} {over}"))
        if "low_95" in at:
            lines.append(("95 % interval", f"{at['low_95']:.6g} to {at['high_95']:.6g}"))
    else:
        probable = {name.removeprefix("prob_"): p for name, p in at.items() if name.startswith("prob_")}
        ranked = sorted(probable, key=probable.get, reverse=True)
        lines = [("label", at["prediction"])]
        lines += [("" if i else "probability", f"{probable[label]:.4f}  {label}") for i, label in enumerate(ranked)]
        lines.append(("entropy", f"{at['entropy']:.4f} nats"))
        if "mutual_information" in at:
            lines.append(("mutual information", f"{at['mutual_information']:.4f} nats {over}"))
            lines.append(("standard deviation", f"{at['max_prob_sd']:.4f} of the label's probability {over}"))
    return "\n".join(f"{name:<20} {value}" for name, value in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the texts that the flags name, on standard output or in `--out`."""
    args = parse_arguments(argv)
    if args.file:
        read_texts(args)  # what is wrong with it is said before torch is loaded
    found = find_adapter(args)
    heading, texts = read_texts(args)
    if heading in ANSWER_COLUMNS or heading.startswith("prob_"):
        raise InputError(f"--text_column {heading}: is also the name of a column of the answers; rename it in the file")
    answers = answer(found, texts, args)
    header, rows = [heading, *answers], list(zip(texts, *answers.values(), strict=True))
    if args.out:
        write_rows(args.out, header, rows)
    elif args.file:
        print("".join(map(csv_line, [header, *rows])), end="")
    else:
        blocks = [describe(answers, i, found.samples) for i in range(len(texts))]
        if args.text in (None, "-"):
            blocks = [f"{'text':<20} {text}\n{block}" for text, block in zip(texts, blocks, strict=True)]
        print("\n\n".join(blocks))


def quieten() -> None:
    """Silence what libraries say that no user can act on; to be called before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # peft imports DeepSpeed, which remarks on a machine without a GPU
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional CPU kernels that are not installed
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft still asks for it


if __name__ == "__main__":
    quieten()
    run_main(main)
