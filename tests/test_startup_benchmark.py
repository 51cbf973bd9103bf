"""benchmarks/startup.py runs: what has to be refused is, and every training comes to its first step."""

from __future__ import annotations

import contextlib
import io
import sys
import time

import pytest
from conftest import run_command

from benchmarks import processes, startup


def test_everything_begins(tiny_encoder, tmp_path, monkeypatch, capsys):
    (tmp_path / "SST-2").mkdir()
    lines = [f"a river and stone {i} \t{i % 2}" for i in range(60)]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "SST-2" / name).write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    (tmp_path / "SST-2/dev.tsv").write_text("sentence\tlabel\nof which nothing is asked\t1\n")

    def execute(words, timeout, mark=None, **environment):
        if "--help" in words or "-c" in words:  # libraries imported, which takes seconds, and nothing else
            return processes.Finished(0, "", 4.0)
        began, code = time.perf_counter(), 0
        if "--stock" in words:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                startup.main(words[2:])
            said = out.getvalue()
        else:
            done = run_command(words, timeout=timeout, **environment)
            code, said = done.returncode, done.stdout + done.stderr
        took = time.perf_counter() - began
        return processes.Finished(code, said, took, took if mark and mark in said else None)

    monkeypatch.setattr(processes, "execute", execute)
    flags = ["--base_model", tiny_encoder, "--data_path", tmp_path / "SST-2", "--smoke", "--out", tmp_path / "s.json"]
    record = startup.main(list(map(str, flags)))
    assert set(startup.RIVALS) | set(startup.RIVALS.values()) == set(record["medians"]) == set(record["turns"])
    for name, rival in startup.RIVALS.items():
        mine, its = (record["turns"][key][0]["seconds"] for key in (name, rival))
        assert record["medians"][name]["ratio"] == pytest.approx(mine / its)
    assert "second start" in capsys.readouterr().out
    assert not (tmp_path / "s.json").exists()  # --smoke
    assert startup.draw(record["turns"]).startswith(b"\x89PNG")


def test_a_first_start_finds_nothing_and_a_failed_one_is_told(tmp_path):
    (tmp_path / "kept").mkdir()
    code = f"import os; print('{{\\'loss\\': 1}}', os.path.exists({str(tmp_path / 'kept')!r}))"
    found = startup.until_first_step([sys.executable, "-c", code], tmp_path / "kept")
    assert 0 < found["seconds"] < 30 and not (tmp_path / "kept").exists()
    with pytest.raises(RuntimeError, match="no loss was said: nothing"):
        startup.until_first_step([sys.executable, "-c", "print('nothing')"])
    with pytest.raises(RuntimeError, match="exit code 0 in place of 2"):
        startup.until_end([sys.executable, "-c", "pass"], 2)
