"""What strangers' files and a machine's secrets may do: see SECURITY.md."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from bad_world import _Bomb
from conftest import ROOT, TRAINER, run_command
from made_results import classifier
from secret_scan import scan, scan_files

from bhpeft.html_report import write_report

FAKE = {
    "HF_TOKEN": "hf_" + "FakeTokenOfNobody" * 2,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "OtherTokenOfNobody" * 2,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "fakefake",
    "AWS_SECRET_ACCESS_KEY": "FakeSecretOfNobody" * 2,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, statements):
    """A run with checkpoints, made with secrets in its environment: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    words = [sys.executable, ROOT / TRAINER, "--base_model", tiny_model, "--dataset_name", statements[0],
             "--max_length", 48, "--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1, "--run_name", "r",
             "--output_dir", folder / "adapter", "--results_dir", folder / "results"]  # fmt: skip
    finished = run_command(words, cwd=folder, **FAKE)
    assert finished.returncode == 0, finished.stderr
    return folder, finished, words


def test_no_secret_of_the_environment_is_printed_or_saved(trained):
    folder, finished, _ = trained
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"r.json", "optimizer.pt", "task.json"} <= {path.name for path in files}
    held = {str(path): path.read_bytes() for path in files} | {"printed": (finished.stdout + finished.stderr).encode()}
    for secret in FAKE.values():
        for encoded in (secret.encode(), secret.encode("utf-16-le")):
            assert [name for name, content in held.items() if encoded in content] == []


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_is_a_pickle_of_code_is_not_run(file, trained, tmp_path):
    folder, _, words = trained
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/checkpoint-1" / file).write_bytes(pickle.dumps(_Bomb()))
    changed = [tmp_path / "adapter" if word == folder / "adapter" else word for word in words]
    resumed = run_command([*changed, "--overwrite", "--resume_from_checkpoint", tmp_path / "adapter/checkpoint-1"],
                          cwd=tmp_path)  # fmt: skip
    assert resumed.returncode != 0 and not (tmp_path / "pwned").exists()


def test_torch_loads_nothing_but_tensors_whoever_asks(tmp_path):
    """DeepSpeed asks for any pickle; once the flags are read, it gets tensors and plain values alone."""
    code = (
        "import sys, pickle, torch; sys.path[:0] = ['.', 'tests']; from bad_world import _Bomb\n"
        "from bhpeft.environment import load_tensors_alone; load_tensors_alone()\n"
        "torch.save({'a': torch.ones(2)}, sys.argv[1]); torch.load(sys.argv[1], weights_only=False)\n"
        "torch.save(_Bomb(), sys.argv[1])\n"
        "try: torch.load(sys.argv[1], weights_only=False)\n"
        "except pickle.UnpicklingError: print('refused')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.pt")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "refused\n", done.stderr
    assert not (ROOT / "pwned").exists()


def test_what_models_and_strangers_wrote_is_text_in_the_report(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    classifier(tmp_path, "a", np.arange(20) % 2, {3}, adapter_name=evil, base_model=evil)
    files, _ = write_report(tmp_path, [])
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "<script>alert" not in text and "<img src=x" not in text
        assert file.suffix != ".html" or "&lt;script&gt;alert(1)" in text


def test_web_parts_listen_on_this_machine_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import chat

    assert chat.parse_arguments(["--base_only", "--base_model", "x", "--web"]).host == "127.0.0.1"


def test_no_secret_is_kept_in_this_project():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert scan_files() == []


@pytest.mark.parametrize("text", [
    "hf_" + "a1B2" * 9, "ghp_" + "a1B2" * 9, "AKIA" + "ABCD1234" * 2, "-----BEGIN RSA PRIVATE " + "KEY-----",
    "https://me:" + "pass@host/x", "api_key = '" + "a1B2c3D4" * 4 + "'", "sk-" + "abcd1234" * 5,
    "xoxb-" + "12345678901",
])  # fmt: skip
def test_the_scan_finds_what_it_is_for(text, tmp_path):
    assert scan(f"first\n{text}\n")[0][0] == 2
    assert scan("hf_upload, ghp_, AKIA, token = 'none', https://host:80/x, a@b.c") == []
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "notes.txt").write_text(text)
    found = scan_files(tmp_path)
    assert found[0].startswith("notes.txt:1: ") and text not in found[0]  # also where it is not yet committed
