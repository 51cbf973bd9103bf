"""The known datasets: what is known of each, and how its rows, from the hub or its own folder, become examples.

Folder readers (`layouts.py`, `dialogue.py`) give rows in the columns of the hub's copy, so that one function a
dataset makes examples of either.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bhpeft.errors import InputError, nearest
from bhpeft.tasks import dialogue, layouts
from bhpeft.tasks.example import Example, same_input
from bhpeft.tasks.hub import load_from_hub, with_place
from bhpeft.tasks.layouts import Row, class_name, column, number_text, text

SPLITS = ("train", "test")
SENTIMENT = ("negative", "positive")
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
LETTERS = ("A", "B", "C", "D", "E")


@dataclass(frozen=True)
class KnownDataset:
    """What is known of a dataset.

    Attributes:
        task_type: "classification", "multiple_choice", "regression" or "generation".
        labels: names of the classes, or letters of the choices, in the order of their index; () if there are none.
        instruction: one sentence that asks for the answer.
        hub_id, hub_config: where `datasets.load_dataset` finds it.
        hub_train, hub_test: names of the hub's splits that are trained and tested on; both have labels.
        files: what stands in its folder, for a reader of an error.
        patterns: the same as glob patterns: what its rows are read from.
        read_folder: (folder, "train" or "test") -> rows in the hub's columns, or None if it has no such split.
        examples: (rows, "train" or "test", notes) -> examples, as far as can be one after the other.
    """

    task_type: str
    labels: tuple[str, ...]
    instruction: str
    hub_id: str
    files: str
    patterns: tuple[str, ...]
    read_folder: Callable[[Path, str], Iterator[Row] | None]
    examples: Callable[[Iterable[Row], str, list[str]], Iterable[Example]]
    hub_config: str | None = None
    hub_train: str = "train"
    hub_test: str = "test"

    @property
    def hub_name(self) -> str:
        """The hub id, with its configuration where it has one."""
        return f"{self.hub_id} {self.hub_config}" if self.hub_config else self.hub_id


def read_known(
    name: str,
    split: str,
    data_path: str | None,
    notes: list[str],
    keep: Callable[[Iterable[Example]], Sequence[Example]] = list,
) -> Sequence[Example]:
    """Read one split of a known dataset.

    Args:
        name: a key of `KNOWN`.
        split: "train" or "test"; the latter may be what others call validation, where the test rows are unlabelled.
        data_path: the folder of the dataset's own files; None reads from the hub.
        notes: gets a line for everything left out.
        keep: puts examples, which come one after the other, where they stay.

    Returns:
        The examples in the order of their rows, as `keep` gives them; [] if the folder's layout has no test split.

    Raises:
        InputError: the name is unknown, the hub out of reach, or anything wrong with the data; the file and row
            are named.
    """
    rows = known_rows(name, split, data_path)
    if rows is None:
        return []
    before = len(notes)
    examples = keep(KNOWN[name].examples(rows, split, notes))
    if not examples:
        source = f"--data_path {data_path}" if data_path else KNOWN[name].hub_name
        reasons = "; ".join(notes[before:]) or "there are no rows"
        raise InputError(f"{source}: no {split} examples of {name} ({reasons}); give it at least one")
    return examples


def known_files(name: str, data_path: Path) -> list[Path]:
    """The files in a known dataset's folder that its rows are read from, as far as they are there."""
    if data_path.is_file():
        return [data_path]
    return sorted(file for pattern in KNOWN[name].patterns for file in data_path.glob(pattern) if file.is_file())


def known_rows(name: str, split: str, data_path: str | None) -> Iterator[Row] | None:
    """The rows of one split in the hub's columns, each with its place; arguments and errors as `read_known`."""
    if name not in KNOWN:
        raise InputError(f"--dataset_name {name}: unknown.{nearest(name, KNOWN)} Known: {', '.join(KNOWN)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {SPLITS}")
    if data_path:
        return KNOWN[name].read_folder(Path(data_path), split)
    return _hub_rows(name, KNOWN[name].hub_train if split == "train" else KNOWN[name].hub_test)


def _hub_rows(name: str, hub_split: str) -> Iterator[Row]:
    known = KNOWN[name]
    rows = load_from_hub(known.hub_id, known.hub_config, hub_split, f"give --data_path with a folder of {known.files}")
    return with_place(rows, f"{known.hub_name}, {hub_split}")


def classification(
    query_of: Callable[[dict[str, Any], str], str], labels: tuple[str, ...]
) -> Callable[[Iterable[Row], str, list[str]], Iterator[Example]]:
    """The function that makes examples of rows with an input, `query_of(row, place)`, and a class index `label`."""

    def examples(rows: Iterable[Row], split: str, notes: list[str]) -> Iterator[Example]:
        for i, (where, row) in enumerate(rows):
            query = query_of(row, where)
            yield Example(f"{split}-{i}", query, class_name(row, labels, where), same_input(query))

    return examples


def imdb_query(row: dict[str, Any], where: str) -> str:
    """The review, its HTML line breaks made spaces."""
    review = text(row, "text", where).replace("<br />", " ")
    return text({"text": review}, "text", where)


def amazon_query(row: dict[str, Any], where: str) -> str:
    """Title, full stop, content; one of them alone where the other is empty."""
    parts = [str(column(row, name, where) or "").strip() for name in ("title", "content")]
    return text({"title and content": ". ".join(filter(None, parts))}, "title and content", where)


def csqa_examples(rows: Iterable[Row], split: str, notes: list[str]) -> Iterator[Example]:
    """Questions with five choices; the answer is the letter of the right one.

    Raises:
        InputError: no answer (as in the test split), a letter that is no choice's, or choices that are not A to E.
    """
    for i, (where, row) in enumerate(rows):
        query = text(row, "question", where)
        choices = column(row, "choices", where)
        if not isinstance(choices, dict) or not isinstance(choices.get("text"), list):
            raise InputError(f"{where}: 'choices' has no lists 'label' and 'text'; mend or remove this row")
        letters = choices.get("label")
        if letters != list(LETTERS) or len(choices["text"]) != len(LETTERS):
            raise InputError(
                f"{where}: the choices are labelled {letters!r:.60} instead of {', '.join(LETTERS)}, one text each; "
                "mend or remove this row"
            )
        texts = tuple(
            text({f"choice {a}": t}, f"choice {a}", where) for a, t in zip(LETTERS, choices["text"], strict=True)
        )
        answer = row.get("answerKey")
        if not answer:
            raise InputError(
                f"{where}: no answerKey; the test split of CommonsenseQA has none, give one with answers (train, dev)"
            )
        if answer not in LETTERS:
            raise InputError(f"{where}: answerKey {answer!r:.40} is none of {', '.join(LETTERS)}; mend this row")
        yield Example(str(row.get("id") or f"{split}-{i}"), query, answer, same_input(query), texts)


def drug_review_examples(rows: Iterable[Row], split: str, notes: list[str]) -> Iterator[Example]:
    """Reviews, without the quotes around them and with HTML entities as characters; the answer is the rating.

    A rating of 9.0, as some copies have it, is the text "9".

    Raises:
        InputError: a rating that is no finite number.
    """
    for i, (where, row) in enumerate(rows):
        query = html.unescape(text(row, "review", where)).strip()
        if len(query) > 1 and query[0] == query[-1] == '"':
            query = query[1:-1]
        query = text({"review": query}, "review", where)
        yield Example(f"{split}-{i}", query, number_text(row, "rating", where), same_input(query))


KNOWN: dict[str, KnownDataset] = {
    "sst2": KnownDataset(
        task_type="classification",
        labels=SENTIMENT,
        instruction="Say whether the sentiment of the following film review sentence is negative or positive.",
        hub_id="nyu-mll/glue",
        hub_config="sst2",
        hub_test="validation",  # the labels of GLUE's test split are all -1
        files="train.tsv and dev.tsv",
        patterns=("train.tsv", "dev.tsv"),
        read_folder=layouts.sst2,
        examples=classification(lambda row, where: text(row, "sentence", where), SENTIMENT),
    ),
    "ag_news": KnownDataset(
        task_type="classification",
        labels=TOPICS,
        instruction="Classify the following news item as World, Sports, Business or Sci/Tech.",
        hub_id="fancyzhx/ag_news",
        files="train.csv and test.csv (class, title, description)",
        patterns=("train.csv", "test.csv"),
        read_folder=layouts.ag_news,
        examples=classification(lambda row, where: text(row, "text", where), TOPICS),
    ),
    "imdb": KnownDataset(
        task_type="classification",
        labels=SENTIMENT,
        instruction="Say whether the sentiment of the following film review is negative or positive.",
        hub_id="stanfordnlp/imdb",
        files="train/ and test/, each with neg/ and pos/ (aclImdb)",
        patterns=("train/neg/*.txt", "train/pos/*.txt", "test/neg/*.txt", "test/pos/*.txt"),
        read_folder=layouts.imdb,
        examples=classification(imdb_query, SENTIMENT),
    ),
    "csqa": KnownDataset(
        task_type="multiple_choice",
        labels=LETTERS,
        instruction="Answer the following question with the letter of the most sensible choice.",
        hub_id="tau/commonsense_qa",
        hub_test="validation",  # the test split has no answers
        files="train_rand_split.jsonl and dev_rand_split.jsonl",
        patterns=("train_rand_split.jsonl", "dev_rand_split.jsonl"),
        read_folder=layouts.csqa,
        examples=csqa_examples,
    ),
    "drug_reviews": KnownDataset(
        task_type="regression",
        labels=(),
        instruction="Rate how satisfied the writer of the following drug review is, from 1 to 10.",
        hub_id="lewtun/drug-reviews",
        files="drugsComTrain_raw.tsv and drugsComTest_raw.tsv",
        patterns=("drugsComTrain_raw.tsv", "drugsComTest_raw.tsv"),
        read_folder=layouts.drug_reviews,
        examples=drug_review_examples,
    ),
    "amazon_polarity": KnownDataset(
        task_type="classification",
        labels=SENTIMENT,
        instruction="Say whether the sentiment of the following product review is negative or positive.",
        hub_id="fancyzhx/amazon_polarity",
        files="train.csv and test.csv (class, title, content)",
        patterns=("train.csv", "test.csv"),
        read_folder=layouts.amazon_polarity,
        examples=classification(amazon_query, SENTIMENT),
    ),
    "oasst1": KnownDataset(
        task_type="generation",
        labels=(),
        instruction="Reply to the following message as a helpful assistant.",
        hub_id="OpenAssistant/oasst1",
        hub_test="validation",
        files="one .jsonl or .jsonl.gz of trees or messages",
        patterns=("*.jsonl", "*.jsonl.gz"),
        read_folder=dialogue.oasst1,
        examples=dialogue.examples,
    ),
}
