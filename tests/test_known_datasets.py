"""Known datasets: each own layout and the hub's copy give the same examples; anything wrong is named with its place."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from bhpeft.errors import InputError
from bhpeft.tasks.dialogue import examples as dialogue_examples
from bhpeft.tasks.dialogue import read_pairs
from bhpeft.tasks.example import same_input
from bhpeft.tasks.hub import read_hub
from bhpeft.tasks.known import KNOWN, known_rows, read_known

# ------------------------------------------------------------ small datasets, each in its own layout and as on the hub


def put(folder, files):
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


CHOICES = ["bank", "library", "department store", "mall", 'a "new" shop']


def nested_question(name, stem, answer, texts=CHOICES):
    choices = [{"label": "ABCDE"[i], "text": choice} for i, choice in enumerate(texts)]
    return {
        "answerKey": answer,
        "id": name,
        "question": {"question_concept": "door", "choices": choices, "stem": stem},
    }


def flat_question(name, stem, answer):
    return {
        "id": name,
        "question": stem,
        "question_concept": "door",
        "choices": {"label": list("ABCDE"), "text": CHOICES},
        "answerKey": answer,
    }


def message(name, parent, role, words, tree="t1", **more):
    flags = {"lang": "en", "deleted": False, "synthetic": False, "review_result": True, **more}
    return {"message_id": name, "parent_id": parent, "role": role, "text": words, "message_tree_id": tree, **flags}


MESSAGES = [
    message("t1", None, "prompter", "Why is the sky blue?"),
    message("a1", "t1", "assistant", "Air scatters blue light most."),
    message("p2", "a1", "prompter", "And at dusk? \u2028 日本"),
    message("a3", "p2", "assistant", "Then the light's way is longer.", review_result=False),
    message("a2", "t1", "assistant", "A model wrote this.", synthetic=True),
    message("p4", "a2", "prompter", "Thank you!"),
    message("a4", "p4", "assistant", "You are welcome."),
    message("t2", None, "prompter", "¿Qué tal?", tree="t2", lang="es"),
    message("b1", "t2", "assistant", "Bien.", tree="t2", lang="es"),
    message("t3", None, "prompter", "Delete this.", tree="t3", deleted=True),
    message("c1", "t3", "assistant", "Gone.", tree="t3"),
]


def as_trees(messages):
    nodes = {m["message_id"]: {**m, "replies": []} for m in messages}
    for node in nodes.values():
        del node["message_tree_id"]
        if node["parent_id"]:
            nodes[node["parent_id"]]["replies"].append(node)
    roots = [node for node in nodes.values() if not node["parent_id"]]
    return [{"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root} for root in roots]


FILES = {
    "sst2": {
        "train.tsv": 'sentence\tlabel\na "fine film \t1\nWhat a mess\t0\n',
        "dev.tsv": "sentence\tlabel\nit is n't bad \t1\n",
        "test.tsv": "index\tsentence\n0\tunlabelled\n",
    },
    "ag_news": {
        "train.csv": '"3","Oil, up","Prices\\rose ""again"""\n"1","A  vote","In\\\\May"\n',
        "test.csv": '"4","Chips","Small"\n',
        "classes.txt": "World\nSports\nBusiness\nSci/Tech\n",
    },
    "imdb": {
        "train/neg/10_3.txt": "Dull.<br /><br />So dull.",
        "train/neg/2_1.txt": "Worst “film” ever",
        "train/pos/0_9.txt": "Grand",
        "test/neg/0_2.txt": "Meh",
        "test/pos/0_10.txt": "Wow<br />!",
        "train/unsup/0_0.txt": "never read",
    },
    "csqa": {
        "train_rand_split.jsonl": lines([nested_question("q1", "Where is a revolving door?", "A")]),
        "dev_rand_split.jsonl": lines([nested_question("q2", "Where are books lent?", "B")]),
        "test_rand_split_no_answers.jsonl": "never read",
    },
    "drug_reviews": {
        "drugsComTrain_raw.tsv": "\tdrugName\tcondition\treview\trating\tdate\tusefulCount\n"
        '7\tValsartan\tBP\t"""It&#039;s ""good"", no\r\nside effects"""\t9.0\tMay 20, 2012\t27\n'
        "8\tGuanfacine\tADHD\tsee above\t2.5\tMay 1, 2012\t1\n",
        "drugsComTest_raw.tsv": "\tdrugName\tcondition\treview\trating\tdate\tusefulCount\n"
        '9\tX\t\t"""Bad &amp; worse"""\t1.0\tMay 1, 2012\t0\n',
    },
    "amazon_polarity": {
        "train.csv": '"2","Great CD","My ""lovely"" Pat, one of the\\nbest"\n"1","","No title"\n',
        "test.csv": '"1","Junk","Broke at once"\n',
    },
    "oasst1": {"2023_ready.trees.jsonl": lines(as_trees(MESSAGES)), "2023_ready.messages.jsonl": lines(MESSAGES)},
}
HUB = {
    "sst2": {
        "train": [
            {"sentence": 'a "fine film ', "label": 1, "idx": 0},
            {"sentence": "What a mess", "label": 0, "idx": 1},
        ],
        "validation": [{"sentence": "it is n't bad ", "label": 1, "idx": 0}],
        "test": [{"sentence": "unlabelled", "label": -1, "idx": 0}],
    },
    "ag_news": {
        "train": [
            {"text": 'Oil, up Prices\\rose "again"', "label": 2},
            {"text": "A  vote In\\\\May", "label": 0},
        ],
        "test": [{"text": "Chips Small", "label": 3}],
    },
    "imdb": {
        "train": [
            {"text": "Dull.<br /><br />So dull.", "label": 0},
            {"text": "Worst “film” ever", "label": 0},
            {"text": "Grand", "label": 1},
        ],
        "test": [{"text": "Meh", "label": 0}, {"text": "Wow<br />!", "label": 1}],
    },
    "csqa": {
        "train": [flat_question("q1", "Where is a revolving door?", "A")],
        "validation": [flat_question("q2", "Where are books lent?", "B")],
        "test": [flat_question("q3", "Unanswered", "")],
    },
    "drug_reviews": {
        "train": [
            {"drugName": "Valsartan", "review": '"It&#039;s "good", no\r\nside effects"', "rating": 9.0},
            {"drugName": "Guanfacine", "review": "see above", "rating": 2.5},
        ],
        "test": [{"drugName": "X", "review": '"Bad &amp; worse"', "rating": 1.0}],
    },
    "amazon_polarity": {
        "train": [
            {"label": 1, "title": "Great CD", "content": 'My "lovely" Pat, one of the\\nbest'},
            {"label": 0, "title": "", "content": "No title"},
        ],
        "test": [{"label": 0, "title": "Junk", "content": "Broke at once"}],
    },
    "oasst1": {"train": MESSAGES, "validation": MESSAGES[:2]},
}
EXPECTED = {  # (query, answer) of the training rows
    "sst2": [('a "fine film', "positive"), ("What a mess", "negative")],
    "ag_news": [('Oil, up Prices\\rose "again"', "Business"), ("A  vote In\\\\May", "World")],
    "imdb": [("Dull.  So dull.", "negative"), ("Worst “film” ever", "negative"), ("Grand", "positive")],
    "csqa": [("Where is a revolving door?", "A")],
    "drug_reviews": [('It\'s "good", no\r\nside effects', "9"), ("see above", "2.5")],
    "amazon_polarity": [('Great CD. My "lovely" Pat, one of the\\nbest', "positive"), ("No title", "negative")],
    "oasst1": [
        ("Why is the sky blue?", "Air scatters blue light most."),
        ("And at dusk? \u2028 日本", "Then the light's way is longer."),
        ("Thank you!", "You are welcome."),
    ],
}


@pytest.fixture
def hub(monkeypatch):
    """`hub(splits)` has `datasets.load_dataset` give these rows, and returns the arguments it was called with."""
    import datasets

    def serve(splits):
        calls = []

        def load_dataset(path, name=None, split=None):
            calls.append((path, name, split))
            tables = {key: datasets.Dataset.from_list(rows) for key, rows in splits.items()}
            return tables[split] if split else datasets.DatasetDict(tables)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def message_of(call):
    with pytest.raises(InputError) as error:
        call()
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- right data


@pytest.mark.parametrize("name", KNOWN)
def test_folder_gives_the_expected_rows(tmp_path, name):
    examples = read_known(name, "train", str(put(tmp_path, FILES[name])), [])
    assert [(e.query, e.answer) for e in examples] == EXPECTED[name]
    assert len({e.id for e in examples}) == len(examples)


@pytest.mark.parametrize("name", KNOWN)
def test_hub_and_folder_give_equal_examples(tmp_path, hub, name):
    folder = str(put(tmp_path, FILES[name]))
    calls = hub(HUB[name])
    assert read_known(name, "train", None, []) == read_known(name, "train", folder, [])
    test = read_known(name, "test", None, [])
    if name != "oasst1":
        assert test == read_known(name, "test", folder, []) and test
    known = KNOWN[name]
    assert calls == [(known.hub_id, known.hub_config, split) for split in (known.hub_train, known.hub_test)]


@pytest.mark.parametrize("name", KNOWN)
def test_answers_are_labels_and_groups_are_inputs(tmp_path, name):
    known = KNOWN[name]
    for example in read_known(name, "train", str(put(tmp_path, FILES[name])), []):
        assert example.answer in known.labels or not known.labels
        assert len(example.choices) == (5 if known.task_type == "multiple_choice" else 0)
        if name != "oasst1":
            assert example.group == same_input(example.query)


def test_labelled_splits_are_tested_on():
    assert KNOWN["sst2"].hub_test == KNOWN["csqa"].hub_test == "validation"
    assert {known.task_type for known in KNOWN.values()} == {
        "classification", "multiple_choice", "regression", "generation",
    }  # fmt: skip


def test_groups_ignore_case_and_spaces():
    assert same_input(" A  film\nto LOVE ") == same_input("a film to love")


def test_choices_keep_their_order(tmp_path):
    [example] = read_known("csqa", "test", str(put(tmp_path, FILES["csqa"])), [])
    assert example.choices == tuple(CHOICES) and example.id == "q2"


def test_flat_questions_are_read_from_a_folder_too(tmp_path):
    put(tmp_path, {"train_rand_split.jsonl": lines(HUB["csqa"]["train"])})
    assert [e.answer for e in read_known("csqa", "train", str(tmp_path), [])] == ["A"]


def test_row_number_column_without_a_name(tmp_path):
    header, rest = FILES["drug_reviews"]["drugsComTrain_raw.tsv"].split("\n", 1)
    put(tmp_path, {"drugsComTrain_raw.tsv": header.lstrip("\t") + "\n" + rest})
    examples = read_known("drug_reviews", "train", str(tmp_path), [])
    assert [(e.query, e.answer) for e in examples] == EXPECTED["drug_reviews"]


def test_byte_order_mark_is_no_part_of_the_data(tmp_path):
    put(tmp_path, {"train.csv": b"\xef\xbb\xbf" + FILES["ag_news"]["train.csv"].encode()})
    assert read_known("ag_news", "train", str(tmp_path), [])[0].answer == "Business"


# --------------------------------------------------------------------------------------------------------- dialogue


def test_trees_and_messages_give_the_same_pairs(tmp_path):
    folder = put(tmp_path, FILES["oasst1"])
    with gzip.open(folder / "packed.jsonl.gz", "wb") as file:
        file.write((folder / "2023_ready.messages.jsonl").read_bytes())
    bare = [{k: v for k, v in m.items() if k != "message_tree_id"} for m in MESSAGES]  # the root's id then
    put(folder, {"bare.jsonl": lines(bare), "nested.jsonl": lines([tree["prompt"] for tree in as_trees(MESSAGES)])})
    names = ["2023_ready.trees.jsonl", "2023_ready.messages.jsonl", "packed.jsonl.gz", "bare.jsonl", "nested.jsonl"]
    read = [read_known("oasst1", "train", str(folder / name), []) for name in names]
    assert all(examples == read[0] for examples in read) and len(read[0]) == 3
    assert read_known("oasst1", "train", str(folder), []) == read[0]  # the file of trees


def test_a_file_of_dialogues_has_no_test_rows(tmp_path):
    assert read_known("oasst1", "test", str(put(tmp_path, FILES["oasst1"])), []) == []


def test_trees_are_groups_and_drops_are_counted(tmp_path):
    notes = []
    examples = read_known("oasst1", "train", str(put(tmp_path, FILES["oasst1"])), notes)
    assert {e.group for e in examples} == {"t1"}
    assert sorted(notes) == [
        "oasst1 train: 1 pairs hold a message that failed review; they are kept",
        "oasst1 train: 1 replies left out, deleted, or answering a deleted message",
        "oasst1 train: 1 replies left out, not in the language 'en'",
        "oasst1 train: 1 replies left out, synthetic, or answering a synthetic message",
    ]


def test_pairs_know_the_turns_before_them(tmp_path):
    rows = known_rows("oasst1", "train", str(put(tmp_path, FILES["oasst1"])))
    pairs = {pair.id: pair for pair in read_pairs(rows, "x", [])}
    assert pairs["a1"].history == ()
    assert pairs["a3"].history == (
        ("prompter", "Why is the sky blue?"),
        ("assistant", "Air scatters blue light most."),
    )
    assert pairs["a4"].history[1] == ("assistant", "A model wrote this.")


def test_another_language_can_be_read(tmp_path):
    rows = known_rows("oasst1", "train", str(put(tmp_path, FILES["oasst1"])))
    assert [(p.prompt, p.reply) for p in read_pairs(rows, "x", [], language="es")] == [("¿Qué tal?", "Bien.")]


def test_messages_without_their_parents_are_dropped_and_counted():
    rows = [
        *MESSAGES[:2],
        message("p8", "nowhere", "prompter", "Lost"),
        message("a8", "p8", "assistant", "Lost too"),
        message("p9", "a9", "prompter", "Round"),
        message("a9", "p9", "assistant", "and round"),
        message("r", None, "assistant", "Unasked"),
    ]
    notes = []
    examples = dialogue_examples(((f"m:{i}", row) for i, row in enumerate(rows)), "train", notes)
    assert [e.id for e in examples] == ["a1"]
    assert any("4 messages left out, a message above them" in note for note in notes)
    assert any("1 replies left out, answering no prompter" in note for note in notes)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*MESSAGES[:2], MESSAGES[0]], [":3:", "message t1", ":1 already"]),
        ([message("t1", None, "system", "Hi")], [":1:", "'system'", "prompter, assistant"]),
        ([MESSAGES[0], message("a1", "t1", "assistant", "  ")], [":2:", "'text' is empty"]),
        ([{"text": "no id", "role": "prompter", "parent_id": None}], [":1:", "no 'message_id'"]),
        ([{"message_tree_id": "t1", "prompt": "a string"}], [":1:", "a string"]),
        ([MESSAGES[7], MESSAGES[8]], ["no train examples", "not in the language 'en'"]),
    ],
)
def test_broken_dialogues_are_named(tmp_path, rows, words):
    put(tmp_path, {"m.jsonl": lines(rows)})
    found = message_of(lambda: read_known("oasst1", "train", str(tmp_path), []))
    assert all(word in found for word in words), found


def test_missing_or_unclear_dialogue_files_are_named(tmp_path):
    put(tmp_path, {"a.txt": "x"})
    assert "a.txt" in message_of(lambda: read_known("oasst1", "train", str(tmp_path), []))
    put(tmp_path, {"a.jsonl": "{}", "b.jsonl": "{}"})
    found = message_of(lambda: read_known("oasst1", "train", str(tmp_path), []))
    assert "several files" in found and "b.jsonl" in found
    put(tmp_path, {"c.jsonl": "", "broken.jsonl.gz": b"no gzip"})
    assert "empty" in message_of(lambda: read_known("oasst1", "train", str(tmp_path / "c.jsonl"), []))
    found = message_of(lambda: read_known("oasst1", "train", str(tmp_path / "broken.jsonl.gz"), []))
    assert "broken.jsonl.gz" in found and "cannot be read" in found


# --------------------------------------------------------------------------------------------------------- bad data

DRUGS = "\tdrugName\tcondition\treview\trating\n"
QUESTION = nested_question("q", "Where?", "A")
BAD = [
    ("sst2", {"test.tsv": "x"}, ["no train.tsv", "found: test.tsv"]),
    ("sst2", {"train.tsv": ""}, ["train.tsv", "empty"]),
    ("sst2", {"train.tsv": "sentence\tlabel\n"}, ["no train examples of sst2", "no rows"]),
    ("sst2", {"train.tsv": "sentence\tlabel\na\t1\nb\n"}, ["train.tsv:3", "1 fields"]),
    ("sst2", {"train.tsv": "text\tlabel\na\t1\n"}, ["no column 'sentence'", "text, label"]),
    ("sst2", {"train.tsv": "sentence\tlabel\na\t1\nb\t2\n"}, ["train.tsv:3", "'2'", "0 (negative), 1 (positive)"]),
    ("sst2", {"train.tsv": "sentence\tlabel\na\t-1\n"}, ["train.tsv:2", "-1", "GLUE's test split"]),
    ("sst2", {"train.tsv": "sentence\tlabel\na\t1\n  \t1\n"}, ["train.tsv:3", "'sentence' is empty"]),
    ("sst2", {"train.tsv": b"sentence\tlabel\na\t1\nb\xff\t1\n"}, ["train.tsv:3", "0xff", "UTF-8"]),
    ("ag_news", {}, ["no train.csv", "found: nothing"]),
    ("ag_news", {"train.csv": '"1","a"\n'}, ["train.csv:1", "2 fields"]),
    ("ag_news", {"train.csv": '"1","a","b"\n"5","a","b"\n'}, ["train.csv:2", "'5'", "1, 2, 3, 4"]),
    ("ag_news", {"train.csv": "Class Index,Title,Description\n1,a,b\n"}, ["train.csv:1", "'Class Index'", "header"]),
    ("ag_news", {"train.csv": '"0","a","b"\n'}, ["'0'"]),
    ("ag_news", {"train.csv": '"1"," ",""\n'}, ["train.csv:1", "'text' is empty"]),
    ("ag_news", {"train.csv": '"1","a","b"\n"2","a" x,"b"\n'}, ["train.csv:2", "quoting"]),
    ("ag_news", {"train.csv": '"1","a","b"\n"2","never closed,"b\n'}, ["train.csv:2"]),
    ("ag_news", {"train.csv": b'"1","a","b"\n"2","\xe9","b"\n'}, ["train.csv:2", "0xe9"]),
    ("amazon_polarity", {"train.csv": '"3","a","b"\n'}, ["train.csv:1", "'3'", "1, 2"]),
    ("amazon_polarity", {"train.csv": '"1","",""\n'}, ["train.csv:1", "'title and content' is empty"]),
    ("imdb", {"train/neg/0_1.txt": "x"}, ["no train/pos/*.txt", "found: neg"]),
    ("imdb", {"pos/0_1.txt": "x"}, ["no train/neg/*.txt", "found: pos"]),
    ("imdb", {"train/neg/0_1.txt": "x", "train/pos/0_9.txt": " "}, ["0_9.txt", "'text' is empty"]),
    ("imdb", {"train/neg/0_1.txt": "x", "train/pos/0_9.txt": "<br /> <br />"}, ["0_9.txt", "'text' is empty"]),
    ("imdb", {"train/neg/0_1.txt": b"x\n\xff", "train/pos/0_9.txt": "y"}, ["0_1.txt:2", "UTF-8"]),
    ("csqa", {"train_rand_split.jsonl": lines([QUESTION]) + "{oh\n"}, ["train_rand_split.jsonl:2", "JSON"]),
    ("csqa", {"train_rand_split.jsonl": "\n[1]\n"}, [":2", "list instead of an object"]),
    ("csqa", {"train_rand_split.jsonl": b'{"a": 1}\n{"b": "\xff"}\n'}, [":1", "no 'question'"]),
    ("csqa", {"train_rand_split.jsonl": b'{"a": "\xff"}\n'}, [":1", "0xff", "UTF-8"]),
    ("csqa", {"train_rand_split.jsonl": lines([{**QUESTION, "answerKey": ""}])}, [":1", "no answerKey", "dev"]),
    ("csqa", {"train_rand_split.jsonl": lines([{"question": QUESTION["question"]}])}, [":1", "no answerKey"]),
    ("csqa", {"train_rand_split.jsonl": lines([{**QUESTION, "answerKey": "F"}])}, [":1", "'F'", "A, B, C, D, E"]),
    ("csqa", {"train_rand_split.jsonl": lines([nested_question("q", "W?", "A", CHOICES[:4])])}, [":1", "['A', 'B'"]),
    ("csqa", {"train_rand_split.jsonl": lines([nested_question("q", "W?", "A", [*CHOICES[:4], ""])])}, ["'choice E'"]),
    ("csqa", {"train_rand_split.jsonl": lines([{"question": {"stem": "W?"}}])}, [":1", "no 'choices'", "stem"]),
    ("csqa", {"train_rand_split.jsonl": lines([{"question": {"stem": "W?", "choices": "x"}}])}, [":1", "'choices'"]),
    ("csqa", {"train_rand_split.jsonl": lines([{"question": "W?", "choices": [1]}])}, [":1", "'choices'"]),
    ("csqa", {"train_rand_split.jsonl": lines([nested_question("q", " ", "A")])}, [":1", "'question' is empty"]),
    ("drug_reviews", {"drugsComTest_raw.tsv": DRUGS}, ["no drugsComTrain_raw.tsv", "found: drugsComTest_raw.tsv"]),
    ("drug_reviews", {"drugsComTrain_raw.tsv": "a\tb\n1\t2\n"}, ["no column 'review'", "found: a, b"]),
    ("drug_reviews", {"drugsComTrain_raw.tsv": DRUGS + '1\tX\tY\t"o\nk"\t9\n2\tX\tY\tok\n'}, [":4", "4 fields"]),
    ("drug_reviews", {"drugsComTrain_raw.tsv": DRUGS + "1\tX\tY\tok\tgood\n"}, [":2", "rating 'good'", "number"]),
    ("drug_reviews", {"drugsComTrain_raw.tsv": DRUGS + "1\tX\tY\tok\tnan\n"}, [":2", "rating 'nan'", "finite"]),
    ("drug_reviews", {"drugsComTrain_raw.tsv": DRUGS + "1\tX\tY\tok\t\n"}, [":2", "rating ''"]),
    ("drug_reviews", {"drugsComTrain_raw.tsv": DRUGS + '1\tX\tY\t""" """\t9\n'}, [":2", "'review' is empty"]),
    ("drug_reviews", {"drugsComTrain_raw.tsv": "\n\n"}, ["no column 'review'"]),
]


@pytest.mark.parametrize(("name", "files", "words"), BAD)
def test_bad_files_are_named(tmp_path, name, files, words):
    found = message_of(lambda: read_known(name, "train", str(put(tmp_path, files)), []))
    assert all(word in found for word in [str(tmp_path), *words]) and "\n" not in found, found


@pytest.mark.parametrize("name", KNOWN)
def test_a_missing_folder_is_named(tmp_path, name):
    found = message_of(lambda: read_known(name, "train", str(tmp_path / "gone"), []))
    assert str(tmp_path / "gone") in found and "no such folder" in found, found


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "oasst1"])
def test_a_missing_test_file_is_an_error(tmp_path, name):
    files = {file: content for file, content in FILES[name].items() if "rain" in file}
    found = message_of(lambda: read_known(name, "test", str(put(tmp_path, files)), []))
    assert "no " in found and "found: " in found, found


def test_unknown_names_get_the_nearest(tmp_path):
    assert "Did you mean 'imdb'" in message_of(lambda: read_known("imbd", "train", None, []))


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("sst2", {"sentence": "a", "label": -1}, ["nyu-mll/glue sst2, train row 0", "-1"]),
        ("sst2", {"text": "a", "label": 1}, ["no 'sentence'", "found: text, label"]),
        ("imdb", {"text": None, "label": 1}, ["stanfordnlp/imdb, train row 0", "None instead of text"]),
        ("drug_reviews", {"review": "a", "rating": float("nan")}, ["rating nan"]),
        ("drug_reviews", {"review": "a", "rating": None}, ["rating None"]),
        ("amazon_polarity", {"title": "a", "content": "b"}, ["no 'label'"]),
    ],
)
def test_bad_rows_of_the_hub_are_named(hub, name, row, words):
    hub({"train": [row]})
    found = message_of(lambda: read_known(name, "train", None, []))
    assert all(word in found for word in words), found


def test_hub_out_of_reach(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no way\nthere")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for call in (lambda: read_known("sst2", "train", None, []), lambda: read_hub("some/set", "a", "b")):
        found = message_of(call)
        assert "ConnectionError: no way there" in found
    found = message_of(lambda: read_known("sst2", "train", None, []))
    assert all(word in found for word in ["nyu-mll/glue sst2", "--data_path", "train.tsv and dev.tsv"])


def test_hub_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    found = message_of(lambda: read_known("imdb", "test", None, []))
    assert all(word in found for word in ["stanfordnlp/imdb", "pip install datasets", "--data_path"])


# ---------------------------------------------------------------------------------------- any dataset of the hub


def test_any_hub_dataset_with_class_names(monkeypatch):
    import datasets

    features = datasets.Features({"body": datasets.Value("string"), "kind": datasets.ClassLabel(names=["ham", "spam"])})
    rows = {"train": [("a", 1), ("b", 0)], "validation": [("c", 1)], "test": [("d", -1)]}
    tables = {
        split: datasets.Dataset.from_list([{"body": b, "kind": k} for b, k in part], features=features)
        for split, part in rows.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.DatasetDict(tables))
    train, test, task_type, labels = read_hub("some/set", "body", "kind")
    assert [(e.id, e.query, e.answer) for e in train] == [("train-0", "a", "spam"), ("train-1", "b", "ham")]
    assert [(e.query, e.answer) for e in test] == [("c", "spam")]  # the test split has no labels
    assert (task_type, labels) == ("classification", ("ham", "spam"))


def test_any_hub_dataset_without_class_names(hub):
    hub({"train": [{"q": "a", "a": "b"}]})
    train, test, task_type, labels = read_hub("some/set", "q", "a")
    assert [(e.query, e.answer) for e in train] == [("a", "b")] and test is None
    assert task_type is None and labels == ()
    assert "no 'text'" in message_of(lambda: read_hub("some/set", "text", "a"))
    hub({"extra": [{"q": "a", "a": "b"}]})
    assert "found: extra" in message_of(lambda: read_hub("some/set", "q", "a"))
    hub({"train": [{"q": "a", "a": None}]})
    assert "some/set, train row 0: 'a' is empty" in message_of(lambda: read_hub("some/set", "q", "a"))
