"""Judging explanations: what is kept, resumed, shown and hidden; in the terminal and over HTTP as they are used."""

import http.client
import json
import os
import select
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from bhpeft.annotation import Session
from bhpeft.annotation_terminal import annotate, printable
from bhpeft.annotation_web import AnnotationServer
from bhpeft.errors import InputError
from bhpeft.results import (
    HumanScore,
    ModelOutput,
    RunFiles,
    read_human_evaluation,
    run_and_annotator,
    write_human_evaluation,
    write_model_outputs,
)

SCRIPT = ROOT / "util" / "explanation_evaluation.py"


@pytest.fixture
def outputs(tmp_path):
    """Files of two runs, three rows each."""
    files = [tmp_path / "results" / "model_outputs" / f"{name}.txt" for name in ("first", "second")]
    for file in files:
        rows = [ModelOutput(f"All a{i} fly.", f"False, {file.stem} {i} does not.", "False, b.") for i in range(3)]
        write_model_outputs(file, rows)
    return files


def scores(outputs, annotator="anna"):
    path = outputs.parents[1] / "human_evaluation" / f"{outputs.stem}.{annotator}.csv"
    return [(s.factual, s.justifies) for s in read_human_evaluation(path)] if path.exists() else None


def keys(session, text):
    pressed = iter(text)
    annotate(session, lambda: next(pressed, ""))


def test_every_answer_is_on_the_disk_at_once_and_the_order_is_the_seeds(outputs, capsys):
    session = Session([outputs[0]], "anna", seed=5)
    row = int(session.shown()["query"][5])  # "All a2 fly."
    session.answer(True)
    assert scores(outputs[0])[row] == (1, None) and session.place.question == 1
    session.answer(False)
    assert scores(outputs[0])[row] == (1, 0) and session.judged == 1
    orders = set()
    for seed in range(20):
        session, order = Session([outputs[0]], "other", seed), []
        while session.place:
            order.append(session.shown()["query"])
            session.skip()
        orders.add(tuple(order))
    assert 3 < len(orders) <= 6 and not (outputs[0].parents[1] / "human_evaluation" / "first.other.csv").exists()


def test_a_session_goes_on_where_the_last_one_stopped(outputs, capsys):
    keys(Session([outputs[0]], "anna"), "ynsy")  # one row whole, one skipped, one half
    assert sorted(scores(outputs[0]), key=str) == [(1, 0), (1, None), (None, None)]
    session = Session([outputs[0]], "anna")
    asked = []
    while session.place:
        asked.append(session.shown()["question"].split(":")[0])
        session.answer(True)
    assert asked == ["factual", "justifies", "justifies"]  # in the order's places: the skipped row, then the half one
    assert session.judged == 3 and "3 of 3" not in capsys.readouterr().out


def test_back_goes_over_earlier_sessions_too_and_replaces_what_was_said(outputs, capsys):
    keys(Session([outputs[0]], "anna"), "yy")
    session = Session([outputs[0]], "anna")
    assert session.back() and session.shown()["answered"] == 1 and session.place.question == 1
    assert session.back() and session.place.question == 0 and not session.back()
    session.answer(False)
    assert session.place.question == 1  # the same row's other question is open again
    session.answer(True)
    assert (0, 1) in scores(outputs[0]) and session.judged == 1
    skipped = session.place
    session.skip()
    assert session.back() and session.place == skipped
    assert session.back() and session.place.item != skipped.item
    session.answer(True)
    assert session.place == skipped  # who has gone back over it is asked it again


def test_what_is_judged_is_what_was_printed_last(outputs, capsys):
    """Going back over rows, and going on where only the second question is open."""
    opened = []  # questions that sessions began with
    for pressed in ("ybnsyybbbnq", "yq", "nbyq"):
        session, left, seen = Session([outputs[0]], "anna"), iter(pressed), []
        opened.append(session.place.question)

        def key(session=session, left=left, seen=seen):
            seen.append(capsys.readouterr().out)
            printed = "".join(seen).rpartition("  query     ")[2].splitlines()
            assert printed and printed[0] == session.shown()["query"]
            assert printed[1].split(maxsplit=1)[1] == session.shown()["output"]
            return next(left)

        annotate(session, key)
    assert 1 in opened


def test_several_runs_are_mixed_and_not_named(outputs, capsys):
    keys(Session(outputs[::-1], "anna"), "yn" * 6)
    shown = capsys.readouterr().out
    questions = shown[: shown.index("6 of 6 judged")]
    assert "model_outputs" not in questions and ".txt" not in questions
    assert scores(outputs[0]) == scores(outputs[1]) == [(1, 0)] * 3
    for seed in range(10):
        session, order = Session(outputs, "other", seed), []
        while session.place:
            order.append(session.shown()["output"].split()[1])
            session.skip()
        if order not in (["first"] * 3 + ["second"] * 3, ["second"] * 3 + ["first"] * 3):
            return
    pytest.fail("the runs come one after the other with every seed")


def test_what_cannot_be_judged_is_refused(outputs, tmp_path):
    for name in ("", "a.b", "a/b", "x" * 41):
        with pytest.raises(InputError, match="--annotator"):
            Session([outputs[0]], name)
    with pytest.raises(InputError, match="two files of outputs are called first"):
        Session([outputs[0], outputs[0]], "anna")
    Session([outputs[0]], "anna").answer(True)
    write_model_outputs(outputs[0], [ModelOutput("All a0 fly.", "another output", "")])
    with pytest.raises(InputError, match="judgements of other outputs"):
        Session([outputs[0]], "anna")
    write_model_outputs(outputs[1].with_name("second.ben.txt"), [ModelOutput("a", "b", "c")])
    with pytest.raises(InputError, match="there is a run second.ben"):
        Session([outputs[1]], "ben")


def test_files_of_annotators_are_known_and_protected(outputs):
    folder = outputs[0].parents[1]
    for name in ("first", "first.anna", "second.anna"):
        write_human_evaluation(folder / "human_evaluation" / f"{name}.csv", [HumanScore(0, "q", "o")])
    assert run_and_annotator(folder / "human_evaluation" / "first.anna.csv") == ("first", "anna")
    assert run_and_annotator(folder / "human_evaluation" / "first.csv") == ("first", "")
    files = RunFiles(folder, "first")
    assert [path.name for path in files.judgements()] == ["first.anna.csv", "first.csv"]
    files.check_free(overwrite=True)  # nothing is judged yet
    write_human_evaluation(folder / "human_evaluation" / "first.anna.csv", [HumanScore(0, "q", "o", 1, None)])
    with pytest.raises(InputError, match="first.anna.csv holds scores a person gave"):
        files.check_free(overwrite=True)
    RunFiles(folder, "second").check_free(overwrite=True)
    write_model_outputs(folder / "model_outputs" / "first.anna.txt", [ModelOutput("a", "b", "c")])
    assert run_and_annotator(folder / "human_evaluation" / "first.anna.csv") == ("first.anna", "")


def test_a_model_cannot_write_to_the_terminal():
    assert printable("a\x1b[2Jb\r\nü\x07") == "a\\x1b[2Jb\\r\nü\\x07"


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_one_key_is_one_answer_at_a_pseudo_terminal(outputs):
    import pty

    main, side = pty.openpty()
    words = [sys.executable, SCRIPT, "--annotate", outputs[0], "--annotator", "anna"]
    process = subprocess.Popen(list(map(str, words)), stdin=side, stdout=side, stderr=side, close_fds=True)
    os.close(side)
    seen = b""

    def wait_for(text):
        nonlocal seen
        deadline = time.monotonic() + 30
        while text not in seen:
            assert select.select([main], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(main, 4096)
        seen = seen[seen.index(text) + len(text) :]

    for key in b"y", b"x", b"n", b"b", b"\x03":  # x is no key; Ctrl-C ends it as q does
        wait_for(b"[q]uit ")
        os.write(main, key)
    wait_for(b"1 of 3 judged")
    assert process.wait(timeout=30) == 0
    os.close(main)
    assert sorted(scores(outputs[0]), key=str) == [(1, 0), (None, None), (None, None)]


def test_lines_of_a_pipe_and_agreement_of_two(outputs):
    def run(*words, text=""):
        command = [sys.executable, str(SCRIPT), *map(str, words)]
        return subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", timeout=60)

    for name, text in (("anna", "y\ny\n" * 3), ("ben", "y\ny\nn\ny\ny\ny\n")):
        done = run("--annotate", outputs[0], "--annotator", name, text=text)
        assert done.returncode == 0 and "3 of 3 judged" in done.stdout
    done = run("--results_dir", outputs[0].parents[1], "--automatic")
    assert "agreement on first: anna, ben" in done.stdout
    assert "factual: rows_of_two_or_more=3 krippendorff_alpha=0.0000" in done.stdout
    assert "anna and ben: raw_agreement=0.6667 cohen_kappa=0.0000" in done.stdout
    assert done.stdout.count("differ on ") == 1 and "(anna 1, ben 0): All a" in done.stdout
    assert "polarity=1.0000 over 3" in done.stdout and "scores of ben" in done.stdout
    assert run("--annotate", outputs[0]).stderr.startswith("error: --annotate: whose judgements")
    assert run("--annotator", "anna").returncode == 2


# ------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture
def server(outputs):
    with AnnotationServer(Session([outputs[0]], "anna")) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, body=None, host=None, kind="application/json"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    headers = {"Host": host or f"127.0.0.1:{server.server_port}", **({"Content-Type": kind} if body else {})}
    connection.request("POST" if body else "GET", path, body and json.dumps(body), headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def test_the_page_is_for_this_machine_and_its_token_alone(server, outputs):
    path = f"/{server.token}/"
    status, headers, page = ask(server, path)
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert "http://" not in page and "https://" not in page and "NONCE" not in page
    assert server.server_address[0] == "127.0.0.1" and len(server.token) >= 32
    act = {"key": "y", "at": [0, 0]}
    for where, host in ((path, "evil.example"), (path, f"evil.example:{server.server_port}"), ("/", None),
                        (f"/{server.token[:-1]}/", None), ("/%C3%A9/", None)):  # fmt: skip
        assert ask(server, where, host=host)[0] in (403, 404)
        assert ask(server, where + "act", act, host=host)[0] in (403, 404)
    assert ask(server, path + "act", act, kind="text/plain")[0] == 404  # what another site's form could send
    assert ask(server, path + "act", {"key": "y"})[0] == 400
    assert ask(server, path + "act", {"key": "y", "at": [0, 0], "more": "x" * 2000})[0] == 400
    assert scores(outputs[0]) is None


def test_answers_over_http_are_saved_and_a_key_counts_once(server, outputs):
    path = f"/{server.token}/"
    state = json.loads(ask(server, path + "state")[2])
    assert state["at"] == [0, 0] and state["judged"] == 0 and state["query"].startswith("All a")
    for key, at in (("y", [0, 0]), ("y", [0, 0]), ("n", [0, 1]), ("s", [1, 0]), ("b", [2, 0])):
        status, _, text = ask(server, path + "act", {"key": key, "at": at})
        assert status == 200
    assert json.loads(text)["at"] == [1, 0]
    assert sorted(scores(outputs[0]), key=str) == [(1, 0), (None, None), (None, None)]
    assert json.loads(ask(server, path + "act", {"key": "q", "at": [1, 0]})[2])["quit"] is True
