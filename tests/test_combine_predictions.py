"""A deep ensemble of predictions files: their mean, how they disagree, and files that do not belong together."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
from conftest import ROOT

from bhpeft import uncertainty as un
from bhpeft.errors import InputError
from bhpeft.results import read_predictions

sys.path.insert(0, str(ROOT / "util"))
import combine_predictions  # noqa: E402
import uncertainty_evaluation  # noqa: E402

P = np.random.default_rng(0).dirichlet([1, 1, 1], size=(3, 8))  # (K, N, C)
LABELS = ["a", "b", "c"]


def write(path, p, labels=LABELS, ids=range(8), expected="aabbccab"):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "prediction", *(f"prob_{label}" for label in labels)])
        for i, row in zip(ids, p, strict=True):
            writer.writerow([i, expected[i], labels[row.argmax()], *row])
    return path


def test_members_are_averaged_whatever_the_order_of_their_rows_and_labels(tmp_path):
    order = [5, 0, 7, 1, 2, 6, 4, 3]
    files = [
        write(tmp_path / "1.csv", P[0]),
        write(tmp_path / "2.csv", P[1][order], ids=order),
        write(tmp_path / "3.csv", P[2][:, [2, 0, 1]], labels=["c", "a", "b"]),
    ]
    combine_predictions.main([*map(str, files), "--out", str(tmp_path / "all.csv")])
    table = read_predictions(tmp_path / "all.csv")
    mean = P.mean(0)
    assert table[[f"prob_{label}" for label in LABELS]].to_numpy() == pytest.approx(mean)
    assert table["prediction"].tolist() == [LABELS[i] for i in mean.argmax(1)]
    assert table["id"].tolist() == list(range(8))
    best = mean.argmax(1)
    expected = {
        "expected_entropy": -(P * np.log(P)).sum(-1).mean(0),
        "mutual_information": -(mean * np.log(mean)).sum(-1) + (P * np.log(P)).sum(-1).mean(0),
        "variance": P.var(0).mean(-1),
        "max_prob_sd": P[:, np.arange(8), best].std(0),
    }
    for name, values in expected.items():
        assert table[name].to_numpy() == pytest.approx(values), name
    assert un.max_prob_sd(P[:1]).tolist() == [0] * 8  # one sample has no spread


def test_files_of_other_rows_are_refused(tmp_path):
    first = write(tmp_path / "1.csv", P[0])
    cases = {
        "no row '7'": write(tmp_path / "short.csv", P[1][:7], ids=range(7)),
        "has the label 'c', and 'a'": write(tmp_path / "label.csv", P[1], expected="cabbccab"),
        "labels x, b, c": write(tmp_path / "names.csv", P[1], labels=["x", "b", "c"]),
        "two rows have the id '1'": write(tmp_path / "twice.csv", P[1], ids=[0, 1, 1, 3, 4, 5, 6, 7]),
        "sum to 2": write(tmp_path / "sums.csv", 2 * P[1]),
    }
    for words, file in cases.items():
        with pytest.raises(InputError, match=words):
            combine_predictions.main([str(first), str(file), "--out", str(tmp_path / "out.csv")])
    more = write(tmp_path / "more.csv", P[1])
    with pytest.raises(InputError, match="8 rows, and .* has 7"):
        combine_predictions.main([str(cases["no row '7'"]), str(more), "--out", str(tmp_path / "out.csv")])
    with pytest.raises(InputError, match="two or more"):
        combine_predictions.main([str(first), "--out", str(tmp_path / "out.csv")])
    with pytest.raises(InputError, match="one of the files that are read"):
        combine_predictions.main([str(first), str(more), "--out", str(first)])
    with pytest.raises(InputError, match="exists"):
        combine_predictions.main([str(first), str(more), "--out", str(cases["sum to 2"])])
    assert not (tmp_path / "out.csv").exists()


def test_a_runs_rows_of_another_domain_are_found_beside_it(tmp_path, capsys):
    folder = tmp_path / "predictions"
    folder.mkdir()
    write(folder / "run.csv", P[0])
    write(folder / "run.ood.csv", np.full((8, 3), 1 / 3), expected=[""] * 8)
    flags = ["--no_plots", "--out_dir", str(tmp_path / "out")]
    uncertainty_evaluation.main([str(folder), *flags])
    text = capsys.readouterr().out
    assert "AUROC of out-of-domain rows" in text and "run.ood.csv" not in text
    with open(tmp_path / "out/uncertainty_figures.csv", encoding="utf-8") as file:
        found = {(row["measure"], row["figure"]): float(row["value"]) for row in csv.DictReader(file)}
    assert found["entropy", "auroc_ood"] == 1  # nothing is less sure than one third each
    with pytest.raises(InputError, match="no row has a label"):  # named outright it is a file as any other
        uncertainty_evaluation.main([str(folder / "run.ood.csv"), *flags])
