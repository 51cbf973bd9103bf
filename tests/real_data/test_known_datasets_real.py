"""The known datasets' readers on real files; rows are counted here in another way."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from bhpeft.tasks.dialogue import read_pairs
from bhpeft.tasks.known import KNOWN, known_rows, read_known


def read(name, split, folder):
    notes = []
    examples = read_known(name, split, str(folder), notes)
    assert all(e.query and e.answer and e.group for e in examples)
    assert len({e.id for e in examples}) == len(examples)
    return examples, notes


@pytest.mark.parametrize(("split", "file", "count"), [("train", "train.tsv", 67_349), ("test", "dev.tsv", 872)])
def test_sst2(shared_data, split, file, count):
    examples, notes = read("sst2", split, shared_data / "SST-2")
    raw = (shared_data / "SST-2" / file).read_bytes()
    assert len(examples) == raw.count(b"\n") - 1 == count and notes == []
    names = {b"0": "negative", b"1": "positive"}
    assert [e.answer for e in examples] == [names[line[-1:]] for line in raw.splitlines()[1:]]
    if split == "test":
        assert Counter(e.answer for e in examples) == {"positive": 444, "negative": 428}


@pytest.mark.parametrize("split", ["train", "test"])
def test_ag_news(shared_data, split):
    folder = shared_data / "samples/ag_news_csv"
    examples, _ = read("ag_news", split, folder)
    raw = (folder / f"{split}.csv").read_text(encoding="utf-8").splitlines()
    classes = (folder / "classes.txt").read_text(encoding="utf-8").split("\n")
    assert tuple(filter(None, classes)) == KNOWN["ag_news"].labels
    assert [e.answer for e in examples] == [classes[int(line[1]) - 1] for line in raw] and len(raw) == 40
    assert any("\\" in e.query for e in examples) and not any(e.query.startswith('"') for e in examples)


@pytest.mark.parametrize("split", ["train", "test"])
def test_imdb(shared_data, split):
    folder = shared_data / "samples/aclImdb" / split
    examples, _ = read("imdb", split, shared_data / "samples/aclImdb")
    count = Counter(path.parent.name for path in folder.rglob("*.txt"))
    assert Counter(e.answer for e in examples) == {"negative": count["neg"], "positive": count["pos"]}
    assert not any("<br" in e.query for e in examples)


@pytest.mark.parametrize(("split", "file"), [("train", "train"), ("test", "dev")])
def test_csqa(shared_data, split, file):
    folder = shared_data / "samples/CommonsenseQA"
    examples, _ = read("csqa", split, folder)
    raw = [json.loads(line) for line in (folder / f"{file}_rand_split.jsonl").open(encoding="utf-8")]
    assert [e.id for e in examples] == [row["id"] for row in raw]
    for example, row in zip(examples, raw, strict=True):
        by_letter = {choice["label"]: choice["text"] for choice in row["question"]["choices"]}
        assert example.choices["ABCDE".index(example.answer)] == by_letter[row["answerKey"]]


@pytest.mark.parametrize(("split", "file"), [("train", "Train"), ("test", "Test")])
def test_drug_reviews(shared_data, split, file):
    folder = shared_data / "samples/drug_reviews"
    examples, _ = read("drug_reviews", split, folder)
    raw = (folder / f"drugsCom{file}_raw.tsv").read_bytes().decode()
    ends = re.findall(r"\t(\d+)\t[^\t]*\t\d+\r\n", raw)  # rating, date, count: the end of a row
    assert [e.answer for e in examples] == ends and len(ends) == {"train": 60, "test": 40}[split]
    assert any("\n" in e.query for e in examples) and {float(e.answer) for e in examples} <= set(range(1, 11))


def test_oasst1_trees_and_messages_give_the_same_pairs(shared_data):
    folder = shared_data / "oasst1"
    trees, notes = read("oasst1", "train", folder / "en_100_tree.jsonl")
    messages, _ = read("oasst1", "train", folder / "en_100_message.jsonl")
    assert trees == messages == read("oasst1", "train", folder)[0]
    raw = (folder / "en_100_tree.jsonl").read_text(encoding="utf-8")
    replies = raw.count('"role": "assistant"')
    assert replies == 687 and notes == [
        "oasst1 train: 17 replies left out, synthetic, or answering a synthetic message"
    ]
    assert len(trees) == replies - 17
    assert read("oasst1", "test", folder)[0] == []


def test_oasst1_pairs_are_edges_of_the_trees(shared_data):
    folder = shared_data / "oasst1"
    edges = {}

    def walk(message, above, tree):
        for reply in message["replies"]:
            edges[reply["message_id"]] = (above, message["text"].strip(), reply["text"].strip(), tree)
            walk(reply, (*above, (message["role"], message["text"].strip())), tree)

    for line in (folder / "en_100_tree.jsonl").open(encoding="utf-8"):
        tree = json.loads(line)
        walk(tree["prompt"], (), tree["message_tree_id"])
    pairs = read_pairs(known_rows("oasst1", "train", str(folder)), "oasst1", [])
    assert len(pairs) == 670
    for pair in pairs:
        above, prompt, reply, tree = edges[pair.id]
        assert (pair.history, pair.prompt, pair.reply, pair.tree) == (above, prompt, reply, tree)
