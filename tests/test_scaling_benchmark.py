"""benchmarks/scaling.py runs; with rows in memory or in files it trains on the same ones; what it tells is true."""

from __future__ import annotations

import sys
import time

import pytest
from conftest import run_command

from benchmarks import processes, scaling
from bhpeft.errors import InputError


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "SST-2"
    folder.mkdir()
    words = ("river", "stone", "cloud", "tiger", "moon", "glass")
    lines = [f"{' '.join(words[(i + j) % 6] for j in range(3 + i % 7))} {i}\t{i % 2}" for i in range(200)]
    (folder / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    (folder / "dev.tsv").write_text("sentence\tlabel\nof which nothing is asked\t1\n")
    return folder


@pytest.fixture
def forked(monkeypatch):
    """Runs of the trainer need not import torch again."""

    def execute(words, timeout, mark=None, **environment):
        began = time.perf_counter()
        done = run_command(words, timeout=timeout, **environment)
        return processes.Finished(done.returncode, done.stdout + done.stderr, time.perf_counter() - began)

    monkeypatch.setattr(processes, "execute", execute)


def test_rows_in_files_are_the_rows_in_memory(data, tiny_encoder, forked, capsys):
    words = ["--base_model", tiny_encoder, "--data_path", data, "--parts", "rows", "--smoke"]
    found = scaling.main(list(map(str, words)))["parts"]["rows"]
    assert len(found) == 6 and {run["rows"] for name, (run,) in found.items() if name.endswith("x1")} == {200}
    for times, rows in ((1, 200), (scaling.TIMES, 200 * scaling.TIMES)):
        in_memory, first, second = (found[f"{n}, x{times}"][0] for n in ("in memory", "first start", "second start"))
        assert in_memory["rows"] == rows and len(in_memory["losses"]) == 2
        assert in_memory["losses"] == first["losses"] == second["losses"]
    said = capsys.readouterr().out
    assert f"second start, x{scaling.TIMES}" in said and "peak MiB" in said


def test_wider_models_and_larger_adapters_are_what_they_are_called(data, tiny_encoder, forked, tmp_path):
    words = ["--base_model", tiny_encoder, "--data_path", data, "--parts", "widths,adapters", "--smoke"]
    record = scaling.main([*map(str, words), "--out", str(tmp_path / "scaling.json")])
    parts = record["parts"]
    trained = {part: [run["trainable_percent"] for (run,) in found.values()] for part, found in parts.items()}
    assert trained["widths"][0] > trained["widths"][1] and trained["adapters"][0] < trained["adapters"][1]
    assert all(run["rows_per_second"] > 0 and run["peak_mib"] > 100 for f in parts.values() for (run,) in f.values())
    assert not (tmp_path / "scaling.json").exists()  # --smoke
    assert scaling.draw(record).startswith(b"\x89PNG")


def test_ranks_share_a_step(data, tiny_encoder, forked):
    words = ["--base_model", tiny_encoder, "--data_path", data, "--parts", "ranks", "--smoke"]
    found = scaling.main(list(map(str, words)))["parts"]["ranks"]
    assert [(name, run["ranks"]) for name, (run,) in found.items()] == [("1", 1), ("2", 2)]


def test_ten_times_the_rows_are_all_different(data, tmp_path):
    many = scaling.write_many(data, tmp_path / "many", 10, 7)
    lines = (many / "train.tsv").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 71 and lines[:8] == (data / "train.tsv").read_text().splitlines()[:8]


def test_what_is_told_of_a_process_is_so():
    code = "import time; print('a'); time.sleep(0.5); print('now'); x = bytearray(200 * 2**20); time.sleep(0.5)"
    done = processes.execute([sys.executable, "-c", code], 60, mark="now")
    assert done.code == 0 and done.output.split() == ["a", "now"] and 200 < done.peak_mib < 260
    assert 0.5 < done.marked < done.seconds - 0.5
    with pytest.raises(RuntimeError, match="exit code 3: sorry"):
        processes.execute([sys.executable, "-c", "print('sorry'); raise SystemExit(3)"], 60).checked()
    nested = "import subprocess; print('begun'); subprocess.run(['sleep', '99'])"  # it holds open what is read
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match="over its limit of 2 s: begun"):
        processes.execute([sys.executable, "-c", nested], 2)
    assert time.perf_counter() - began < 30


def test_turns_go_round():
    said = []
    found = processes.in_turns("part", {"a": lambda: said.append("a") or {}, "b": lambda: said.append("b") or {}}, 3)
    assert said == list("ababab") and {name: len(runs) for name, runs in found.items()} == {"a": 3, "b": 3}


def test_an_unknown_part_is_told(tmp_path):
    with pytest.raises(InputError, match="--parts rows,x: must be of rows, ranks, widths, adapters"):
        scaling.main(["--base_model", "x", "--data_path", str(tmp_path), "--parts", "rows,x"])
