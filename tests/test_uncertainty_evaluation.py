"""util/uncertainty_evaluation.py on made-up predictions: figures, files, curves, one-line errors, light imports."""

import csv
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from bhpeft import uncertainty as un
from bhpeft import uncertainty_report as report
from bhpeft.files import write_rows

SCRIPT = ROOT / "util" / "uncertainty_evaluation.py"


def run(*arguments, script=SCRIPT):
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, env={**os.environ})


def refused(done, *parts):
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in parts:
        assert str(part) in done.stderr


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(path, name, **where):
    rows = [row for row in table(path) if all(row[key] == value for key, value in where.items())]
    return [float(row[name]) for row in rows]


def label_rows(labels, rows=120, seed=0, samples=0, scale=1.5):
    """Probabilities, labels drawn from them, and predictions that are the likeliest label."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (rows, len(labels)))
    p_s = np.exp(logits + rng.normal(0, 1, (max(samples, 1), rows, len(labels))))
    p_s /= p_s.sum(axis=2, keepdims=True)
    p = p_s.mean(axis=0)
    y = np.array([rng.choice(len(labels), p=row) for row in p])
    measures = {"entropy": un.predictive_entropy(p_s)} | (un.sample_measures(p_s) if samples else {})
    return p, y, measures


def write_labels(path, labels, p, y, measures, predicted=None):
    predicted = [labels[i] for i in p.argmax(axis=1)] if predicted is None else predicted
    header = ["id", "label", "prediction", *(f"prob_{label}" for label in labels), "max_prob", *measures]
    columns = [range(len(p)), [labels[i] for i in y], predicted, *p.T.tolist(), p.max(axis=1).tolist()]
    write_rows(path, header, zip(*columns, *(v.tolist() for v in measures.values()), strict=True))


FOUR = ["World", "Sports", "Business, etc.", "Sci/Tech"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A binary run with generated answers and one of four labels with samples, evaluated together with plots."""
    folder = tmp_path_factory.mktemp("results")
    p, y, measures = label_rows(["true", "false"], seed=1)
    answers = [("true", "false")[i] for i in p.argmax(axis=1)]
    answers[:5] = ["tie"] * 4 + ["(irregular)"]
    write_labels(folder / "predictions" / "binary.csv", ["true", "false"], p, y, measures, answers)
    p4, y4, measures4 = label_rows(FOUR, seed=2, samples=8)
    write_labels(folder / "predictions" / "four.csv", FOUR, p4, y4, measures4)
    done = run("--results_dir", folder, "--reject", 0, 25, 50)
    assert done.returncode == 0, done.stderr
    correct = np.array(answers) == np.array([("true", "false")[i] for i in y])
    return folder, done.stdout, (p, y, measures, correct), (p4, y4, measures4, p4.argmax(axis=1) == y4)


def test_files_and_plots(evaluated):
    folder, stdout, *_ = evaluated
    names = {"uncertainty_figures.csv", "rejection_of_runs.png", "rejection_of_runs.svg"}
    names |= {f"{c}.{kind}" for c in ("reliability", "rejection", "risk_coverage") for kind in ("csv", "png", "svg")}
    runs = {"rejection_of_runs.png", "rejection_of_runs.svg"}
    assert {f.name for f in (folder / "plots").iterdir()} == runs | {"binary", "four"}
    for name in ("binary", "four"):
        found = {f.name: f.read_bytes() for f in (folder / "plots" / name).iterdir()}
        assert set(found) == names - runs
        assert all(data.startswith(b"\x89PNG") for file, data in found.items() if file.endswith("png"))
        assert all(b"<svg" in data for file, data in found.items() if file.endswith("svg"))
        assert f"written to {folder / 'plots' / name}: uncertainty_figures, reliability" in stdout


def test_figures_are_those_of_the_functions(evaluated):
    folder, stdout, binary, four = evaluated
    for name, (p, y, measures, correct) in (("binary", binary), ("four", four)):
        path = folder / "plots" / name / "uncertainty_figures.csv"
        likeliest = p.argmax(axis=1) == y
        expected = {
            "accuracy": correct.mean(),
            "likeliest_accuracy": likeliest.mean(),
            "nll": un.nll(p, y),
            "brier": un.brier(p, y),
            "ece_width": un.ece(p.max(axis=1), likeliest),
            "ece_mass": un.ece(p.max(axis=1), likeliest, scheme="mass"),
            "ece_width_if_calibrated": un.ece_if_calibrated(p.max(axis=1)),
            "ece_mass_if_calibrated": un.ece_if_calibrated(p.max(axis=1), scheme="mass"),
        }
        assert {row["figure"]: float(row["value"]) for row in table(path) if not row["measure"]} == pytest.approx(
            expected
        )
        for measure, values in {"one_minus_max_prob": 1 - p.max(axis=1), **measures}.items():
            rows = [row for row in table(path) if row["measure"] == measure]
            found = un.selective_figures(values, correct, [0.1, 0.2, 0.5])
            assert [float(row["value"]) for row in rows] == pytest.approx(found.tolist())
            assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)
    measures = {row["measure"] for row in table(folder / "plots" / "four" / "uncertainty_figures.csv")} - {""}
    assert measures == set(report.MEASURES) - {"feature_distance"}  # a column that is not there


def test_intervals_are_bootstrapped(evaluated):
    folder, _, (p, y, measures, correct), _ = evaluated
    path = folder / "plots" / "binary" / "uncertainty_figures.csv"
    interval = un.bootstrap_interval(un.aurc, [measures["entropy"], correct])
    found = column(path, "low", measure="entropy", figure="aurc") + column(
        path, "high", measure="entropy", figure="aurc"
    )
    assert found == pytest.approx(interval)
    interval = un.bootstrap_interval(un.nll, [p, y])
    assert column(path, "low", figure="nll") + column(path, "high", figure="nll") == pytest.approx(interval)


def test_curves_are_those_of_the_functions(evaluated):
    folder, _, binary, four = evaluated
    for name, (p, y, measures, correct) in (("binary", binary), ("four", four)):
        plots = folder / "plots" / name
        for measure, values in measures.items():
            coverages, risks = un.risk_coverage(values, correct)
            assert column(plots / "risk_coverage.csv", "coverage", measure=measure) == pytest.approx(coverages.tolist())
            assert column(plots / "risk_coverage.csv", "risk", measure=measure) == pytest.approx(risks.tolist())
            accuracies = un.accuracy_after_rejecting(values, correct, [0, 0.25, 0.5])
            assert column(plots / "rejection.csv", "rejected_percent", measure=measure) == [0, 25, 50]
            assert column(plots / "rejection.csv", "accuracy", measure=measure) == pytest.approx(accuracies.tolist())
        for scheme in ("width", "mass"):
            bins = un.reliability_bins(p.max(axis=1), p.argmax(axis=1) == y, 15, scheme)
            rows = [row for row in table(plots / "reliability.csv") if row["scheme"] == scheme]
            assert [int(row["rows"]) for row in rows] == bins.count.tolist()
            assert [float(row["up_to"]) for row in rows] == pytest.approx(bins.edges[1:].tolist())
            there = [row for row in rows if row["rows"] != "0"]
            assert [float(r["accuracy"]) for r in there] == pytest.approx(bins.accuracy[bins.count > 0].tolist())
            assert all(row["accuracy"] == row["confidence"] == "" for row in rows if row["rows"] == "0")


def test_the_printed_table(evaluated):
    folder, stdout, (p, y, _, correct), _ = evaluated
    first = stdout.split("\n\nwritten to")[0].splitlines()
    assert first[0] == str(folder / "predictions" / "binary.csv")
    assert first[1] == "note: 5 of 120 predictions are none of the labels: wrong answers"
    assert re.fullmatch(r"rows +120 of 2 labels", first[2])
    assert re.fullmatch(rf"accuracy +{correct.mean():.4f} \(0\.\d+ to 0\.\d+\)", first[3])
    assert re.fullmatch(rf"of the likeliest +{(p.argmax(axis=1) == y).mean():.4f} \(.*\)", first[4])
    assert "15 bins; below 0." in first[7] and first[7].startswith("ECE, equal width")
    assert re.split(r" {2,}", first[10].strip())[:3] == ["AURC", "AUROC of errors", "accuracy without 10 %"]
    assert [line.split()[0] for line in first[11:]] == ["one_minus_max_prob", "entropy"]
    assert "of the likeliest" not in stdout.split("four.csv")[1]  # there the prediction is the likeliest label


def test_the_same_file_gives_the_same_bytes(evaluated, tmp_path):
    folder, *_ = evaluated
    done = run(folder / "predictions" / "binary.csv", "--out_dir", tmp_path, "--reject", 0, 25, 50)
    assert done.returncode == 0, done.stderr
    for file in (folder / "plots" / "binary").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_out_of_domain_rows_need_no_labels(tmp_path):
    p, y, measures = label_rows(FOUR, seed=3, samples=4)
    write_labels(tmp_path / "in.csv", FOUR, p, y, measures)
    q, _, others = label_rows(FOUR, rows=70, seed=4, samples=4, scale=0.1)
    header = ["prediction", *(f"prob_{label}" for label in FOUR), *others]
    columns = [["a"] * 70, *q.T.tolist(), *(v.tolist() for v in others.values())]
    write_rows(tmp_path / "out.csv", header, zip(*columns, strict=True))
    done = run(tmp_path / "in.csv", "--ood", tmp_path / "out.csv", "--out_dir", tmp_path / "o", "--no_plots")
    assert done.returncode == 0, done.stderr
    assert "AUROC of out-of-domain rows" in done.stdout
    assert sorted(file.suffix for file in (tmp_path / "o").iterdir()) == [".csv"] * 4
    for measure, values in measures.items():
        expected = un.auroc(np.concatenate([values, others[measure]]), [False] * 120 + [True] * 70)
        path = tmp_path / "o" / "uncertainty_figures.csv"
        assert column(path, "value", measure=measure, figure="auroc_ood") == pytest.approx([expected])
        low, high = (column(path, end, measure=measure, figure="auroc_ood")[0] for end in ("low", "high"))
        assert low < expected < high


def test_measures_by_name(tmp_path):
    p, y, measures = label_rows(["a", "b"], samples=3)
    write_labels(tmp_path / "x.csv", ["a", "b"], p, y, {**measures, "mine": measures["variance"] * 2})
    done = run(tmp_path / "x.csv", "--uncertainty", "mine", "entropy", "--out_dir", tmp_path / "o", "--no_plots")
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "o" / "uncertainty_figures.csv")
    assert [row["measure"] for row in rows if row["figure"] == "aurc"] == ["mine", "entropy"]
    wrong = run(tmp_path / "x.csv", "--uncertainty", "one_minus_max")
    refused(wrong, "no measure 'one_minus_max'", "'one_minus_max_prob'")
    refused(run(tmp_path / "x.csv", "--uncertainty", "label"), "no measure 'label'")


def test_entropy_is_computed_where_it_is_not_a_column(tmp_path):
    p, y, measures = label_rows(["a", "b"])
    write_labels(tmp_path / "x.csv", ["a", "b"], p, y, {})
    found = report.read_uncertainty(tmp_path / "x.csv")
    assert list(found.measures) == ["one_minus_max_prob", "entropy"]
    assert found.measures["entropy"] == pytest.approx(measures["entropy"])


def number_rows(path, rows=400, names=("sd",), seed=5):
    rng = np.random.default_rng(seed)
    mean, sd = rng.normal(0, 3, rows), rng.uniform(0.5, 2, rows)
    y = rng.normal(mean, sd)
    columns = [range(rows), y.tolist(), mean.tolist(), *[sd.tolist()] * len(names)]
    write_rows(path, ["id", "label", "prediction", *names], zip(*columns, strict=True))
    return mean, sd, y


def test_numbers(tmp_path):
    mean, sd, y = number_rows(tmp_path / "x.csv", names=("epistemic_sd", "total_sd"))
    done = run(tmp_path / "x.csv", "--out_dir", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert {f.name for f in (tmp_path / "o").iterdir()} == {
        "uncertainty_figures.csv", "intervals.csv", "intervals.png", "intervals.svg"}  # fmt: skip
    path = tmp_path / "o" / "uncertainty_figures.csv"
    assert column(path, "value", figure="rmse") == pytest.approx([np.sqrt(np.mean((y - mean) ** 2))])
    expected = {f"coverage_{100 * level:g}": un.interval_coverage(mean, sd, y, level) for level in (0.5, 0.9, 0.95)}
    expected |= {"crps": un.crps_gaussian(mean, sd, y), "nll": un.nll_gaussian(mean, sd, y), "mean_sd": sd.mean()}
    for name in ("epistemic_sd", "total_sd"):
        found = {row["figure"]: float(row["value"]) for row in table(path) if row["measure"] == name}
        assert found == pytest.approx(expected)
        levels = column(tmp_path / "o" / "intervals.csv", "level", deviation=name)
        assert levels == pytest.approx(np.arange(1, 20) / 20)
        curve = [un.interval_coverage(mean, sd, y, level) for level in levels]
        assert column(tmp_path / "o" / "intervals.csv", "inside", deviation=name) == pytest.approx(curve)
    assert "inside the 90 % interval" in done.stdout and "CRPS" in done.stdout


def test_numbers_without_a_deviation_and_with_zeros(tmp_path):
    mean, _, y = number_rows(tmp_path / "x.csv", names=())
    done = run(tmp_path / "x.csv", "--out_dir", tmp_path / "o")
    assert done.returncode == 0 and "note: no column of sd, total_sd" in done.stdout
    assert [f.name for f in (tmp_path / "o").iterdir()] == ["uncertainty_figures.csv"]
    write_rows(tmp_path / "z.csv", ["id", "label", "prediction", "sd"], [[0, 1, 1, 0], [1, 2, 4, 0]])
    done = run(tmp_path / "z.csv", "--out_dir", tmp_path / "z", "--no_plots")
    assert done.returncode == 0 and column(tmp_path / "z" / "uncertainty_figures.csv", "value", figure="crps") == [1]
    assert not column(tmp_path / "z" / "uncertainty_figures.csv", "value", figure="nll")


def test_deviations_tell_out_of_domain_numbers(tmp_path):
    _, sd, _ = number_rows(tmp_path / "in.csv")
    write_rows(tmp_path / "out.csv", ["prediction", "sd"], [[0, 3], [1, 0.1]])
    done = run(tmp_path / "in.csv", "--ood", tmp_path / "out.csv", "--out_dir", tmp_path / "o", "--no_plots")
    assert done.returncode == 0, done.stderr
    assert column(tmp_path / "o" / "uncertainty_figures.csv", "value", figure="auroc_ood") == [0.5]


def test_few_rows_all_right_and_rows_without_labels(tmp_path):
    rows = [["0", "a", "a", 0.9, 0.1], ["1", "", "b", 0.2, 0.8], ["2", "b", "b", 0.5, 0.5]]
    write_rows(tmp_path / "x.csv", ["id", "label", "prediction", "prob_a", "prob_b"], rows)
    done = run(tmp_path / "x.csv", "--out_dir", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert "note: 1 of 3 rows have no label and are left out" in done.stdout
    assert re.search(r"entropy +0\.0000 \(0\.0000 to 0\.0000\) +- ", done.stdout)  # AUROC: no errors, none to tell


# --------------------------------------------------------------------------------------------- errors


HEADER = "id,label,prediction,prob_a,prob_b"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("id,label,prob_a,prob_b\n0,a,1,0\n", ["no column 'prediction'; found: id, label"]),
        (HEADER + "\n", ["a header and no rows"]),
        (HEADER + "\n0,a,a,0.9,0.1\n1,a,a,nan,0.1\n", [":3: prob_a is 'nan'", "finite number"]),
        (HEADER + "\n0,a,a,0.9,0.1\n1,a,a,,0.1\n", [":3: prob_a is ''"]),
        (HEADER + "\n0,a,a,0.9,0.3\n", [":2: ", "sum to 1.2"]),
        (HEADER + "\n0,a,a,1.5,-0.5\n", [":2: ", "no probabilities"]),
        (HEADER + "\n0,A,a,0.9,0.1\n", [":2: the label 'A' has no column", "found: a, b"]),
        (HEADER + "\n0,,a,0.9,0.1\n", ["no row has a label"]),
        (HEADER + ",entropy\n0,a,a,0.9,0.1,\n1,a,a,0.9,0.1,0.5\n", [":2: entropy is ''"]),
        ("id,label,prediction,reference_nll\n0,Hello.,Good day.,3.5\n", ["no prob_<label> columns", "free text"]),
        ("id,label,prediction,sd\n0,1.5,1,0.1\n1,2,2,-1\n", [":3: sd is -1.0", "0 or more"]),
        ("id,label,prediction,sd\n0,1.5,1,0.1\n1,2,,1\n", [":3: prediction is ''"]),
        ("", ["the file is empty"]),
    ],
)
def test_broken_files(text, parts, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    refused(run(tmp_path / "x.csv", "--out_dir", tmp_path / "o"), tmp_path / "x.csv", *parts)
    assert not (tmp_path / "o").exists()


def test_free_text_in_a_folder_is_left_out_and_where_it_is_named_refused(tmp_path):
    folder = tmp_path / "predictions"
    folder.mkdir()
    write_labels(folder / "good.csv", ["a", "b"], *label_rows(["a", "b"]))
    (folder / "chat.csv").write_text("id,label,prediction,reference_nll\n0,Hello.,Good day.,3.5\n")
    flags = ("--results_dir", tmp_path, "--no_plots")
    for done in (run(*flags), run(folder, *flags)):
        assert done.returncode == 0 and "good.csv" in done.stdout and "chat" not in done.stdout
        assert done.stderr == f"{folder / 'chat.csv'}: free text, which has no uncertainty here: left out\n"
    assert (tmp_path / "plots/good/uncertainty_figures.csv").is_file()
    refused(run(folder / "good.csv", folder / "chat.csv", *flags), "chat.csv", "free text")
    (folder / "chat2.csv").write_text((folder / "chat.csv").read_text())
    (folder / "good.csv").unlink()
    done = run(*flags)
    assert done.returncode == 2 and "free text alone" in done.stderr.splitlines()[-1]


def test_broken_flags_and_a_broken_file_after_a_good_one(tmp_path):
    good = tmp_path / "good.csv"
    write_labels(good, ["a", "b"], *label_rows(["a", "b"]))
    (tmp_path / "bad.csv").write_text(HEADER + "\n0,a,a,0.9\n")
    refused(run(good, tmp_path / "bad.csv", "--out_dir", tmp_path / "o"), "bad.csv:2: ")
    refused(run(good, "--bins", 0), "--bins 0")
    refused(run(good, "--reject", 100), "--reject")
    refused(run(good, good), "two files are called good")
    refused(run(good, "--ood", good, good), "--ood names 2 files for 1")
    refused(run(good, "--ood", tmp_path / "none.csv"), "none.csv: cannot be read")
    refused(run(tmp_path / "goood.csv"), "Did you mean 'good.csv'?")
    refused(run("--results_dir", tmp_path), tmp_path / "predictions")
    number_rows(tmp_path / "numbers.csv")
    refused(run(good, "--ood", tmp_path / "numbers.csv"), "predictions of numbers beside a file of labels")
    (tmp_path / "file").write_text("")
    done = run(good, "--out_dir", tmp_path / "file")
    assert done.returncode == 2 and "cannot be written" in done.stderr
    done = run(tmp_path / "bad.csv", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


# -------------------------------------------------------------------------------------------- imports


def test_nothing_heavy_is_loaded(tmp_path):
    write_labels(tmp_path / "x.csv", ["a", "b"], *label_rows(["a", "b"]))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'util')!r}); import uncertainty_evaluation as script; "
        f"script.main([{str(tmp_path / 'x.csv')!r}, '--no_plots', '--out_dir', {str(tmp_path)!r}]); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "bhpeft.uncertainty_report" in loaded
    assert not loaded & {"torch", "transformers", "peft", "sklearn", "pandas", "matplotlib", "scipy"}
