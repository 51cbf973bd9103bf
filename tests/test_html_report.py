"""The report: every figure in its place, nothing executed or loaded, torn files named, the same bytes twice."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT
from made_results import TEXT, make_results
from scipy.stats import binomtest

from bhpeft.errors import InputError
from bhpeft.files import write_rows
from bhpeft.html_report import markdown_text, round_curves, write_report
from bhpeft.report_data import Rounds, RunFacts, answers_of, gather, samples, shared_rows
from bhpeft.report_tables import differing_settings, settings_of
from bhpeft.run_comparisons import comparisons

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC")


class Page(HTMLParser):
    """What stands in a page: tags with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self.depth = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "results"
    make_results(folder)
    return folder


@pytest.fixture(scope="module")
def report(results):
    (html, markdown), warnings = write_report(results)
    assert [w for w in warnings if "no record" not in w] == []
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


def test_texts_of_models_are_shown_and_never_obeyed(report):
    html, markdown = report
    page = Page(html)
    assert TEXT in page.text and not page.all("script") and not page.all("img")
    assert TEXT not in html and "<script" not in markdown
    assert markdown_text("a | b\n<i> *c* `d` $e$") == r"a \| b &lt;i&gt; \*c\* \`d\` \$e\$"


def test_the_page_loads_nothing_and_its_ids_are_its_own(report):
    page = Page(report[0])
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("href", "src", "xlink:href") and v]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in report[0] and not re.search(r"url\((?!#)", report[0])
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    referenced = set(re.findall(r"url\(#([^)]+)\)", report[0]))
    assert referenced and referenced <= set(ids)


def test_every_part_is_there(report):
    html, markdown = report
    plots = {attrs["aria-label"] for attrs in Page(html).all("svg")}
    for words in ("Loss of strong over 100 steps", "Learning rate of strong", "What the loss is made of of strong",
                  "KL of posterior and prior (nats) of strong", "Reliability of strong, 200 rows",
                  "Accuracy after rejecting the least sure of weak", "accuracy of 2 runs on films with intervals",
                  "Predictions over labels of numbers", "Rows inside intervals of numbers",
                  "accuracy of weak over the rounds", "nll of weak over the rounds"):  # fmt: skip
        assert any(plot.startswith(words) for plot in plots), words
    assert not any("of weak" in plot and plot.startswith("KL") for plot in plots)  # no KL was logged there
    for text in ("lora_rank", "0.9500 (0.9104 to 0.9726)", "61.2 s", "812 MiB", "10 of 1,000 (1 %)"):
        assert text in html, text
    table = html[html.index("Labels and predictions") :]
    assert [int(n) for n in re.findall(r'<td style="[^"]*">(\d+)</td>', table)[:4]] == [92, 8, 2, 98]
    for text in ("## strong", "| negative | 92 | 8 |", "| anna, negative exemplars | 4 |", "# Rounds"):
        assert text in markdown, text
    assert re.search(r"\| factual \| anna and ben \| 0.7500 \| 0.5000 \|", markdown)


def test_the_same_results_give_the_same_files_but_for_the_time(results, report):
    write_report(results, made="2001-02-03 04:05:06 UTC")
    for text, name in zip(report, ("report.html", "report.md"), strict=True):
        again = (results / name).read_text(encoding="utf-8")
        assert "2001-02-03 04:05:06 UTC" in again and again != text
        assert STAMP.sub("", again) == STAMP.sub("", text)


def test_runs_are_compared_where_they_share_their_rows(results):
    found = {(c.a, c.b): c for c in comparisons(gather(results).runs)}
    assert set(found) == {("weak", "strong"), ("texts", "texts-2")}
    better = found["weak", "strong"]
    assert better.rows == 200
    assert better.sentences[0].startswith("strong is better than weak by 15.0 points (95 %: ")
    assert "2 only weak has right, 32 only strong" in better.sentences[1]
    assert better.p == pytest.approx(binomtest(2, 34).pvalue) and better.adjusted == better.p
    low, high = map(float, re.search(r"95 %: (.*) to (.*)\)", better.sentences[0]).groups())
    sd = math.sqrt(34 / 200 - 0.15**2)  # of the rows' differences: 32 times 1, 2 times -1
    assert (low, high) == pytest.approx((15 - 196 * sd / 200**0.5, 15 + 196 * sd / 200**0.5), abs=0.7)
    perplexities = math.exp(2.5 / 4), math.exp(1.25 / 4)
    by = re.search(r"texts-2 is better than texts by ([\d.]+)", found["texts", "texts-2"].sentences[0])
    assert float(by[1]) == pytest.approx(perplexities[0] - perplexities[1], abs=1e-3)


def test_rows_are_matched_by_id_and_not_by_place(results):
    facts = {run.name: run for run in gather(results).runs}
    strong = answers_of(facts["strong"])
    turned = RunFacts("turned", rows=facts["strong"].rows[::-1], outputs=facts["strong"].outputs[::-1])
    assert shared_rows(strong, answers_of(turned))
    assert np.array_equal(strong.arrays["right"], answers_of(turned).arrays["right"])
    other = [{**row, "label": "positive"} for row in facts["strong"].rows]
    assert not shared_rows(strong, answers_of(RunFacts("other", rows=other)))
    outputs = [type(o)(o.query + "!", o.output, o.expected) for o in facts["strong"].outputs]
    assert not shared_rows(strong, answers_of(RunFacts("other", rows=facts["strong"].rows, outputs=outputs)))
    assert answers_of(RunFacts("twice", rows=facts["strong"].rows * 2)) is None
    # A row without a label is no wrong answer, and numbers beside one stay numbers.
    bare = [{**row, "id": f"x{i}", "label": ""} for i, row in enumerate(facts["strong"].rows[:50])]
    more = answers_of(RunFacts("more", rows=[*bare, *facts["strong"].rows]))
    assert shared_rows(strong, more) and np.array_equal(strong.arrays["nll"], more.arrays["nll"])
    assert answers_of(RunFacts("bare", rows=bare)) is None
    some = facts["numbers"].rows
    assert answers_of(RunFacts("numbers", rows=[*some, {**some[0], "id": "x", "label": " "}])).kind == "numbers"


def test_settings_are_those_that_the_run_had():
    config = {"adapter_name": "lora", "lora_rank": 8, "prefix_length": 30, "learning_rate": 1e-3, "max_steps": -1}
    assert dict(settings_of({"config": config})) == {"adapter_name": "lora", "lora_rank": "8", "learning_rate": "0.001"}
    assert "learning_rate" not in dict(settings_of({"config": {**config, "do_train": False}}))
    other = {**config, "prefix_length": 5, "logging_steps": 3, "adapter_name": "bh-peft"}
    runs = [RunFacts(n, {"run_name": n, "config": c, "metrics": {}}) for n, c in (("a", config), ("b", other))]
    (table,) = differing_settings(runs)
    assert table.rows == [["adapter_name", "lora", "bh-peft"], ["prefix_length", "-", "5"]]


def test_samples_are_of_every_kind(results):
    facts = {run.name: run for run in gather(results).runs}
    how = [sample.how for sample in samples(facts["strong"])]
    assert how == ["right"] * 3 + ["wrong"] * 3
    assert [s.how for s in samples(facts["explained"])] == ["right"] * 3
    odd = [{**facts["strong"].rows[0], "prediction": "(irregular)"}, *facts["strong"].rows[1:]]
    how = [s.how for s in samples(RunFacts("odd", rows=odd, outputs=facts["strong"].outputs))]
    assert how.count("irregular") == 1


def test_torn_and_foreign_files_are_named_and_the_rest_is_reported(tmp_path):
    make_results(tmp_path)
    (tmp_path / "metrics" / "weak.json").write_text('{"schema_version": 1, "run_')
    (tmp_path / "metrics" / "odd.json").write_text("[]")
    (tmp_path / "predictions" / "texts.csv").write_text("id,label,prediction\n1,a\n")
    (tmp_path / "model_outputs" / "strong.txt").write_text("<QUERY>\t\t\t a\n<EXPECTED OUTPUT>\t b\n")
    (tmp_path / "human_evaluation" / "explained.anna.csv").write_bytes(b"\xff\xfe")
    (tmp_path / "rounds" / "weak.csv").write_text("a,b\n1,2\n")
    write_rows(tmp_path / "predictions" / "bad.csv", ["id", "label", "prediction", "prob_a"], [[1, "a", "a", "1.5"]])
    record = json.loads((tmp_path / "metrics" / "strong.json").read_text())
    for name, change in (("shape", {"metrics": 5}), ("history", {"history": [{"step": "x", "loss": None}, 3]})):
        (tmp_path / "metrics" / f"{name}.json").write_text(json.dumps({**record, **change}))
    script = [sys.executable, ROOT / "util" / "report.py", "--results_dir", tmp_path]
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("metrics/weak.json:1", "metrics/odd.json", "predictions/texts.csv:2", "model_outputs/strong.txt:2",
                 "human_evaluation/explained.anna.csv:1", "rounds/weak.csv", "predictions/bad.csv:2",
                 "metrics/shape.json"):  # fmt: skip
        assert f"warning: {name}" in done.stderr, (name, done.stderr)
        assert name in html
    assert str(tmp_path) not in html
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert {"strong", "weak", "texts", "numbers", "history", "explained"} <= set(headings)


def test_nothing_to_report_is_an_error(tmp_path, results):
    with pytest.raises(InputError, match="no run's files that can be read"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="nobody: no run of that name in .*; there are: "):
        write_report(results, ["nobody"])
    write_report(results, ["strong"])
    assert re.findall(r"<h2>(.*?)</h2>", (results / "report.html").read_text()) == ["Side by side", "strong"]


def test_rounds_are_read_as_one_figure_a_row_or_one_evaluation_a_row():
    header = ["round", "evaluated_on", "rows", "accuracy", "nll"]
    rows = [["2", "all", "9", "0.7", ""], ["1", "all", "9", "0.6", "0.5"], ["1", "new", "4", "0.5", "0.4"]]
    wide = round_curves(Rounds("r", header, rows))
    assert wide["accuracy"] == {"all": ((1, 2), (0.6, 0.7)), "new": ((1,), (0.5,))} and set(wide) == {"accuracy", "nll"}
    header = ["round", "evaluated_on", "metric", "value", "low_95", "ece", "steps", "carry"]
    rows = [[r, "test", "rmse", v, "0.1", e, "30", "none"] for r, v, e in (("1", "0.5", ""), ("2", "0.4", "0.2"))]
    long = round_curves(Rounds("r", header, rows))
    assert long == {"rmse": {"test": ((1, 2), (0.5, 0.4))}, "ece": {"test": ((2,), (0.2,))}}


def test_the_script_starts_without_what_it_may_not_need():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'util')!r}); import report, interpret; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "pandas", "matplotlib", "jinja2", "numpy"} & set(done.stdout.split())
