"""The files of `results/`: what a run leaves behind, and how to read it again (see results/README.md).

Plain Python; pandas only for predictions.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bhpeft.errors import InputError
from bhpeft.files import column_indices, csv_line, read_json, read_rows, read_text, write_atomic
from bhpeft.locks import held, lock_beside

if TYPE_CHECKING:
    import pandas

SCHEMA_VERSION = 1  # of results/metrics/RUN.json
METRICS_KEYS = ("run_name", "metrics", "config", "seed", "versions", "hardware", "timings", "parameters")
RECORD_GROUPS = ("metrics", "config", "versions", "hardware", "timings", "parameters")
HUMAN_HEADER = ["index", "query", "model output", "factual", "justifies"]
PREDICTION_COLUMNS = ["id", "label", "prediction"]
OOD_SUFFIX = ".ood.csv"  # of the predictions of rows of another domain
TAGS = {"<QUERY>": "\t\t\t ", "<MODEL OUTPUT>": "\t\t ", "<EXPECTED OUTPUT>": "\t "}  # tag -> what follows it
_TAG = "|".join(TAGS)
_SCORES = {"": None, "0": 0, "1": 1, "0.0": 0, "1.0": 1}  # spreadsheets write 1.0 once a cell is empty


# -------------------------------------------------------------------------------------- model outputs


@dataclass(frozen=True)
class ModelOutput:
    """One generated answer: the query, what the model wrote, and what was expected."""

    query: str
    output: str
    expected: str


def write_model_outputs(path: str | Path, outputs: Iterable[ModelOutput]) -> None:
    r"""Write blocks `<QUERY>`, `<MODEL OUTPUT>`, `<EXPECTED OUTPUT>`, a blank line after each.

    Texts stand as they are, over as many lines as they have; only a line after a text's first that would
    read as a tag is escaped with one backslash (`\<QUERY>`). Reading gives back the very same texts.
    """
    escape = re.compile(rf"\n(?=\\*(?:{_TAG}))")
    blocks = []
    for block in outputs:
        texts = zip(TAGS.items(), (block.query, block.output, block.expected), strict=True)
        blocks.append("\n".join(tag + gap + escape.sub(r"\n\\", text) for (tag, gap), text in texts) + "\n\n")
    if not blocks:
        raise InputError(f"{path}: no model outputs to write; predict at least one row.")
    write_atomic(path, "".join(blocks))


def read_model_outputs(path: str | Path) -> list[ModelOutput]:
    """Read what `write_model_outputs` wrote, and the older files (whose last line end may be missing).

    Raises `InputError` with file and line for a missing tag, text before the first tag, bytes that are
    not UTF-8, and an empty file.
    """
    text = read_text(path)
    tags = list(re.finditer(rf"^(?:{_TAG})", text, re.MULTILINE))
    if not text.strip():
        raise InputError(f"{path}:1: the file is empty; it must hold blocks that begin with <QUERY>.")
    before = text[: tags[0].start()] if tags else text
    if before.strip():
        line = before[: len(before) - len(before.lstrip())].count("\n") + 1
        raise InputError(f"{path}:{line}: text before the first <QUERY>; remove it or add the tag.")

    order, line, texts = list(TAGS), 1 + before.count("\n"), []
    for i, tag in enumerate(tags):
        expected = order[i % 3]
        if tag[0] != expected:
            raise InputError(
                f"{path}:{line}: found {tag[0]} where {expected} must come; add the missing "
                "tag, or write a backslash before a tag that belongs to a text."
            )
        end = tags[i + 1].start() if i + 1 < len(tags) else len(text)
        body = text[tag.end() : end]
        line += body.count("\n")
        body = re.sub(r"\n\n?\Z" if expected == order[2] else r"\n\Z", "", body)
        gap = TAGS[expected]
        body = body.removeprefix(gap) if body.startswith(gap) else re.sub(r"\A\t* ?", "", body)
        texts.append(re.sub(rf"\n\\(?=\\*(?:{_TAG}))", "\n", body))
    if len(texts) % 3:
        raise InputError(f"{path}:{line}: the file ends where {order[len(texts) % 3]} must come; add it.")
    return [ModelOutput(*texts[i : i + 3]) for i in range(0, len(texts), 3)]


# ----------------------------------------------------------------------------------- human evaluation


@dataclass(frozen=True)
class HumanScore:
    """A person's judgement of one output; `factual` and `justifies` are 0, 1, or None when not yet judged."""

    index: int
    query: str
    output: str
    factual: int | None = None
    justifies: int | None = None


def write_human_evaluation(path: str | Path, scores: Iterable[HumanScore]) -> None:
    """Write index, query, model output, factual, justifies as quoted CSV with a header."""
    lines = [csv_line(HUMAN_HEADER)]
    for s in scores:
        pair = (s.factual, s.justifies)
        if not set(pair) <= {None, 0, 1}:
            raise InputError(f"{path}: index {s.index} has the scores {pair}; give 0, 1 or None.")
        pair = (None if score is None else int(score) for score in pair)  # True is 1
        lines.append(csv_line([s.index, s.query, s.output, *pair]))
    write_atomic(path, "".join(lines))


def read_human_evaluation(path: str | Path) -> list[HumanScore]:
    """Read a human evaluation: quoted CSV where the first line is the header, else the older unquoted rows.

    An older row is `index,query,output,factual,justifies,` with commas inside its texts: the index ends at
    the first comma, the scores are the last two fields, the output begins after the query's full stop
    (the first ".,", else the first comma). Raises `InputError` with file and line for any other row.
    """
    text = read_text(path)
    if re.match(r'"?index"?\s*,', text):
        header, rows = read_rows(path)
        where = column_indices(path, header, HUMAN_HEADER)
        return [_human_score(path, line, [row[i] for i in where]) for line, row in rows]
    rows = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise InputError(f"{path}: the file is empty; its first line must be {','.join(HUMAN_HEADER)}.")
    return [_human_score(path, number, _older_fields(row)) for number, row in rows]


def _older_fields(row: str) -> list[str]:
    index, _, rest = row.removesuffix(",").partition(",")
    texts, *scores = rest.rsplit(",", 2)
    query, stop, output = texts.partition(".,")
    if stop:
        return [index, query + ".", output, *scores]
    return [index, *texts.split(",", 1), *scores]


def _human_score(path: str | Path, line: int, fields: list[str]) -> HumanScore:
    if len(fields) != 5 or not re.fullmatch(r"\s*-?[0-9]{1,18}\s*", fields[0]):
        raise InputError(f"{path}:{line}: not a row of {', '.join(HUMAN_HEADER)}; mend the row.")
    for name, value in zip(HUMAN_HEADER[3:], fields[3:], strict=True):
        if value.strip() not in _SCORES:
            raise InputError(
                f"{path}:{line}: {name} is {value.strip()[:40]!r}; give 0, 1, or nothing where not yet judged."
            )
    return HumanScore(int(fields[0].strip()), fields[1], fields[2], *(_SCORES[value.strip()] for value in fields[3:]))


def annotation_file(outputs: str | Path, annotator: str, folder: str | Path | None = None) -> Path:
    """Where an annotator's scores of a file of outputs are kept: human_evaluation/RUN.ANNOTATOR.csv.

    `folder` takes the place of the human_evaluation/ that lies beside the outputs' folder. Raises `InputError` where
    that would be the file of another run, called RUN.ANNOTATOR.
    """
    outputs = Path(outputs)
    if outputs.with_name(f"{outputs.stem}.{annotator}{outputs.suffix}").exists():
        raise InputError(f"--annotator {annotator}: there is a run {outputs.stem}.{annotator}; use another name.")
    folder = Path(folder) if folder else outputs.resolve().parent.parent / "human_evaluation"
    return folder / f"{outputs.stem}.{annotator}.csv"


def run_and_annotator(path: str | Path) -> tuple[str, str]:
    """The run whose human evaluation a file is, and the annotator: "" for RUN.csv, which names none.

    A run's name may hold full stops: RUN.ANNOTATOR is read as a whole where a run of that name has outputs.
    """
    path = Path(path)
    run, _, annotator = path.stem.rpartition(".")
    whole = path.resolve().parent.parent / "model_outputs" / f"{path.stem}.txt"
    if not run or whole.exists() or not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", annotator):
        return path.stem, ""
    return run, annotator


# ---------------------------------------------------------------------------------------- predictions


def write_predictions(path: str | Path, table: pandas.DataFrame) -> None:
    """Write a table with id, label, prediction, then `prob_<class>` columns, then uncertainty columns.

    Columns are put in that order; floats keep every digit, NaN and None become empty fields.
    """
    names = [str(name) for name in table.columns]
    column_indices(path, names, PREDICTION_COLUMNS)
    rest = [name for name in names if name not in PREDICTION_COLUMNS]
    order = PREDICTION_COLUMNS + sorted(rest, key=lambda name: not name.startswith("prob_"))  # a stable sort
    table = table.iloc[:, [names.index(name) for name in order]].astype(object)
    rows = table.where(table.notna(), None).itertuples(index=False, name=None)
    write_atomic(path, csv_line(order) + "".join(map(csv_line, rows)))


def read_predictions(path: str | Path) -> pandas.DataFrame:
    """Read what `write_predictions` wrote, one row an example.

    Ids and labels become numbers only where the text is just how that number is written ("007" and "NA"
    stay text). Raises `InputError` for a missing column, a broken row, or a probability that is no number.
    """
    import pandas

    header, rows = read_rows(path)
    column_indices(path, header, PREDICTION_COLUMNS)
    table = {}
    for i, name in enumerate(header):
        texts = [row[i] for _, row in rows]
        table[name] = _typed(texts, exact=name in PREDICTION_COLUMNS)
        if name.startswith("prob_") and table[name] is texts:
            line, row = next((line, row) for line, row in rows if _typed([row[i]], exact=False) == [row[i]])
            raise InputError(f"{path}:{line}: {name} is {row[i]!r}; a probability must be a number.")
    return pandas.DataFrame(table, columns=header)


def _typed(texts: list[str], exact: bool) -> list[Any]:
    """Return the column as ints, floats (empty: NaN) or bools, or the very same list where it is text."""
    for kind in (int, float):
        try:
            values = [kind(text) if text or kind is int else math.nan for text in texts]
        except ValueError:
            continue
        if not exact or all(
            text == "" or text == str(value) != "nan" for text, value in zip(texts, values, strict=True)
        ):
            return values
    return texts if exact or set(texts) - {"True", "False"} else [text == "True" for text in texts]


# -------------------------------------------------------------------------------------------- metrics


def write_metrics(path: str | Path, record: dict[str, Any]) -> None:
    """Write a run's record as strict JSON: NaN and infinities become null.

    `record` has run_name, metrics (name -> number or dict), config, seed, versions, hardware, timings
    (seconds) and parameters {trainable, all, trainable_percent}; schema_version and, unless given,
    created (UTC) are added. Values JSON does not know (paths, dtypes) are written as their text.
    """
    missing = [key for key in METRICS_KEYS if key not in record]
    if missing:
        raise InputError(f"{path}: the record lacks {', '.join(missing)}; see results/README.md.")
    created = record.get("created") or _now()
    head = {"schema_version": SCHEMA_VERSION, "run_name": record["run_name"], "created": created}
    plain = _plain(head | record | head)
    write_atomic(path, json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_metrics(path: str | Path) -> dict[str, Any]:
    """Read a run's record; `InputError` where it is no JSON, another schema version, or lacks a key or a group."""
    record = read_json(path, "run again with --overwrite.")
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version is {version!r} and this code reads {SCHEMA_VERSION}; "
            "use the version of bhpeft that wrote it, or run again."
        )
    missing = [key for key in (*METRICS_KEYS, "created") if key not in record]
    if missing:
        raise InputError(f"{path}: the record lacks {', '.join(missing)}; run again with --overwrite.")
    for key in RECORD_GROUPS:
        if not isinstance(record[key], dict):
            raise InputError(f"{path}: {key} is no group of values; run again with --overwrite.")
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        value = value.value
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


# ------------------------------------------------------------------------------- descriptions, a run


ADAPTER_SETTINGS = (
    "prefix_length", "prefix_bottleneck_size", "bn_reduction_factor", "adapter_scaling", "lora_rank",
    "lora_alpha", "lora_dropout", "target_modules", "num_virtual_tokens", "prompt_init_text", "bayesian",
    "kl_weight", "prior_mu", "prior_sigma", "initial_sigma", "load_in_4bit",
)  # fmt: skip


def describe_run(path: str | Path, record: dict[str, Any]) -> None:
    """Add a run's entry to the plain-text file of descriptions, or replace the entry of the same run name.

    An entry stands between the lines `==== RUN name ====` and `==== END name ====`; all text outside such
    lines is a person's and stays as it is. `record` is that of `write_metrics`, with `rows`
    ({split: count}) if known. Raises `InputError` where an entry has lost its last line.
    """
    with held(lock_beside(path), wait=True):  # two runs may end at once
        _describe(path, _plain(record))


def _describe(path: str | Path, record: dict[str, Any]) -> None:
    name = check_run_name(record["run_name"])
    text = read_text(path) if Path(path).exists() else ""
    first, last = f"==== RUN {name} ====", f"==== END {name} ===="
    entry = "\n".join([first, *_description(record), last])
    body = r"\r?\n(?:(?!==== ).*\n)*"
    found = re.search(rf"^{re.escape(first)}{body}{re.escape(last)}(?=\r?$)", text, re.MULTILINE)
    if found:
        text = text[: found.start()] + entry + text[found.end() :]
    elif line := re.search(rf"^{re.escape(first)}\r?$", text, re.MULTILINE):
        number = text.count("\n", 0, line.start()) + 1
        raise InputError(f"{path}:{number}: this entry has no line {last!r} before the next; add it.")
    else:
        gap = "" if not text or text.endswith("\n\n") else "\n" if text.endswith("\n") else "\n\n"
        text += gap + entry + "\n"
    write_atomic(path, text)


def check_descriptions(path: str | Path) -> None:
    """Raise `InputError` if the file of descriptions cannot be read, or an entry has lost its last line."""
    text = read_text(path)
    for mark in re.finditer(r"^==== RUN (.*) ====\r?$", text, re.MULTILINE):
        end = re.search(r"^==== (RUN|END) .* ====\r?$", text[mark.end() :], re.MULTILINE)
        if end is None or end[1] == "RUN":
            line = text.count("\n", 0, mark.start()) + 1
            raise InputError(
                f"{path}:{line}: this entry has no line '==== END {mark[1]} ====' before the next; add it."
            )


def _description(record: dict[str, Any]) -> list[str]:
    config: dict[str, Any] = {}
    for key, value in record["config"].items():  # flat, or one level of groups
        config.update(value if isinstance(value, dict) else {key: value})

    def pairs(values: dict[str, Any], sign: str) -> str:
        known = {key: value for key, value in values.items() if value not in (None, "")}
        texts = (f"{k}{sign}{v:.6g}" if isinstance(v, float) else f"{k}{sign}{v}" for k, v in known.items())
        return ", ".join(texts) or "unknown"

    settings = {key: config[key] for key in ADAPTER_SETTINGS if key in config}
    rounds = {}
    if record.get("rounds"):
        sizes = " ".join(str(done["new_rows"]) for done in record["rounds"])
        rounds["rounds"] = f"{sizes} rows (carry {config.get('carry')}, replay {config.get('replay')})"
    parameters = {"trainable": 0, "all": 0, "trainable_percent": 0.0, **record["parameters"]}
    fields = {
        "date": record.get("created") or _now(),
        "base model": config.get("base_model", "unknown"),
        "adapter": f"{config.get('adapter_name', 'unknown')} ({pairs(settings, '=')})",
        "dataset": config.get("dataset_name") or config.get("data_path") or "unknown",
        "rows": pairs(record.get("rows") or {}, " "),
        **rounds,
        "trainable": "{trainable:,} of {all:,} parameters ({trainable_percent:.4g} %)".format(**parameters),
        "metrics": pairs(record["metrics"], " "),
    }
    return [f"{key + ':':<12} {' '.join(str(value).split())}" for key, value in fields.items()]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def check_run_name(name: str) -> str:
    """Return the run name; `InputError` unless it is 1 to 100 letters, digits, '.', '_' or '-', not ending in .ood."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name) or name in (".", ".."):
        raise InputError(f"--run_name {name!r} is no file name; use 1 to 100 letters, digits, '.', '_', '-'.")
    if f"{name}.csv".endswith(OOD_SUFFIX):
        raise InputError(f"--run_name {name!r}: '.ood' at its end marks another run's rows of another domain.")
    return name


class RunFiles:
    """Where a run's files lie under `results_dir`; `InputError` for a run name that is no file name.

    `plots` is the run's own folder; `descriptions` is the one file all runs share; `left` are the files that an earlier
    run of the name had left when `check_free` looked.
    """

    def __init__(self, results_dir: str | Path, run_name: str):
        self.results_dir, self.run_name = Path(results_dir), check_run_name(run_name)
        self.model_outputs = self.results_dir / "model_outputs" / f"{run_name}.txt"
        self.human_evaluation = self.results_dir / "human_evaluation" / f"{run_name}.csv"
        self.predictions = self.results_dir / "predictions" / f"{run_name}.csv"
        self.ood_predictions = self.results_dir / "predictions" / f"{run_name}{OOD_SUFFIX}"
        self.metrics = self.results_dir / "metrics" / f"{run_name}.json"
        self.rounds = self.results_dir / "rounds" / f"{run_name}.csv"
        self.plots = self.results_dir / "plots" / run_name
        self.descriptions = self.results_dir / "model_descriptions"
        self.left: list[Path] = []

    def check_free(self, overwrite: bool) -> None:
        """Raise `InputError` if a file of this run exists and may not be replaced, or a file stands for the folder.

        Scores that a person gave are never replaced, `overwrite` or not.
        """
        for part in (self.results_dir, *self.results_dir.parents):
            if part.exists() and not part.is_dir():
                raise InputError(f"--results_dir {self.results_dir}: {part} is a file; choose another --results_dir.")
        for path in self.own():
            if path.exists() and not overwrite:
                raise InputError(f"{path} exists; choose another --run_name or pass --overwrite.")
        self.left = [path for path in self.own() if path.is_file()]
        for path in self.judgements():
            if self.judged(path):
                raise InputError(f"{path} holds scores a person gave; move it away, or choose another --run_name.")

    def own(self) -> list[Path]:
        """All files that are this run's alone, whether they are there or not, and whatever lies in its folder of plots;
        but for what annotators judged."""
        files = [self.model_outputs, self.human_evaluation, self.predictions, self.ood_predictions, self.metrics]
        return [*files, self.rounds, *sorted(self.plots.glob("*"))]

    def judged(self, path: Path) -> bool:
        """Whether a file of this run holds scores that a person gave."""
        if path not in self.judgements() or not path.is_file():
            return False
        return any(row.factual is not None or row.justifies is not None for row in read_human_evaluation(path))

    def judgements(self) -> list[Path]:
        """The files of human evaluation of this run: RUN.csv, and RUN.ANNOTATOR.csv of each annotator."""
        own, folder = self.human_evaluation, self.human_evaluation.parent
        found = sorted(folder.glob(f"{self.run_name}.*csv")) if folder.is_dir() else []
        return [path for path in found if path == own or run_and_annotator(path)[0] == self.run_name]

    def prepare(self) -> None:
        """Make the folders; `InputError` where one cannot be made or written to."""
        files = [self.model_outputs, self.human_evaluation, self.predictions, self.metrics, self.rounds]
        if self.descriptions.exists():  # found out now rather than after hours of training
            check_descriptions(self.descriptions)
        for folder in [*(file.parent for file in files), self.plots.parent]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = error.strerror
                raise InputError(f"{folder}: cannot be made ({why}); choose another --results_dir.") from None
            if not os.access(folder, os.W_OK | os.X_OK):
                raise InputError(f"{folder}: not writable; choose another --results_dir.")
