"""The marker itself: our own scripts are all right, the skeleton is all missing, every mistake is found and named."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from marker import loader, sandbox
from marker.__main__ import main
from marker.mutations import MISTAKES, RIGHT_VARIANTS, SOLUTIONS, write
from marker.questions import answer, ask, mark
from marker.report import QUESTIONS, Report, Verdict, table

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("textloader.py", "generate.py", "tp5.py")
FAST = {change.question: change for change in MISTAKES if change.style == "steps"}.values()  # all take minutes
NOT_KNOWN = {"a GRU of its own": {"gru"}}  # right variants whose equations the marker does not know
landlock = pytest.mark.skipif(bool(sandbox.unprotected()), reason=sandbox.unprotected())


def statuses(report) -> set[str]:
    return {verdict.status for verdict in report.verdicts.values()}


def named(verdict, words: str) -> bool:
    """True if the verdict tells of the mistake in those words."""
    found = words in " ".join([verdict.detail, *verdict.warnings])
    return found and (verdict.status != "right" or bool(verdict.warnings))


def insert(path: Path, *lines: str, before: str = "") -> Path:
    """Put lines into a file, at its start or before a text; indented as that text is."""
    text = path.read_text(encoding="utf-8")
    at = text.index(before)
    indent = " " * (len(before) - len(before.lstrip()))
    path.write_text(text[:at] + "".join(f"{indent}{line}\n" for line in lines) + text[at:], encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------- verdicts


def test_our_own_scripts_are_all_right(tmp_path):
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path)
    report = mark(tmp_path)
    assert statuses(report) == {"right"}, str(report)
    assert report.passed and list(report.verdicts) == list(QUESTIONS)
    assert not any(verdict.warnings for verdict in report.verdicts.values())


@pytest.mark.slow
def test_the_skeleton_is_all_missing(tmp_path):
    report = mark(write("skeleton", tmp_path))
    assert statuses(report) == {"missing"}, str(report)
    assert report.passed  # nothing is wrong


@pytest.mark.parametrize("change", FAST, ids=str)
def test_a_mistake_is_found_and_named(change, tmp_path):
    folder, cells = str(change.write(tmp_path)), {}
    if change.question in ("generate", "beam"):  # with the student's RNN
        cells = {"rnn": ask("rnn", folder, [], {}).cell}
    verdict = ask(change.question, folder, [], cells)
    assert named(verdict, change.words), verdict


@pytest.mark.slow
@pytest.mark.parametrize("change", MISTAKES, ids=str)
def test_every_mistake_is_found_and_nothing_else_is_wrong(change, tmp_path):
    report = mark(change.write(tmp_path))
    assert named(report.verdicts[change.question], change.words), str(report)
    wrong = [verdict for verdict in report.verdicts.values() if verdict.status in ("wrong", "cannot run")]
    assert all(named(verdict, change.words) for verdict in wrong), str(report)  # another class may inherit it


@pytest.mark.slow
@pytest.mark.parametrize("change", RIGHT_VARIANTS, ids=str)
def test_no_right_folder_is_called_wrong(change, tmp_path):
    report = mark(change.write(tmp_path))
    unknown = NOT_KNOWN.get(change.name, set())
    assert {q for q, v in report.verdicts.items() if v.status == "not judged"} == unknown, str(report)
    assert statuses(report) <= {"right", "not judged"}, str(report)
    assert not any(verdict.warnings for verdict in report.verdicts.values()), str(report)


def test_a_generator_waits_for_cells_that_are_wrong(tmp_path):
    folder = str(write("library", tmp_path))
    for question in ("generate", "beam"):
        verdict = ask(question, folder, [], {"rnn": {"mistake": "wrong"}})
        assert verdict.status == "not judged" and "waits for RNN" in verdict.detail


def test_a_syntax_error_is_told_with_its_line(tmp_path):
    write("steps", tmp_path, ("tp5.py", "f = torch.sigmoid(self.wf(xh))", "f = torch.sigmoid(self.wf(xh)"))
    verdict = ask("lstm", str(tmp_path), [], {})
    assert verdict.status == "cannot run" and "tp5.py, line 52" in verdict.detail
    assert ask("rnn", str(tmp_path), [], {}).status == "right"


def test_a_notebook_alone_is_read_and_named(tmp_path):
    source = (SOLUTIONS / "textloader.py").read_text(encoding="utf-8").splitlines(True)
    cells = [{"cell_type": "markdown", "source": ["text"]}, {"cell_type": "code", "source": ["%pylab\n", *source]}]
    (tmp_path / "tp.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    report = mark(tmp_path)
    assert report.verdicts["batches"].status == "right", str(report)
    assert "tp.ipynb: a notebook" in str(report)


# -------------------------------------------------------------------------------- hostile folders

HORRORS = """
import os, sys, shutil, threading, subprocess
from tp5 import nothing  # imports itself
import no_such_package
names = list(no_such_package.names)
text = open("no such file.txt").read()
for i in iter(int, 1):
    pass
while True:
    pass
answer = input("How many epochs? ")
threading.Thread(target=lambda: [None for i in iter(int, 1)]).start()
memory = [0] * 10**10
shutil.rmtree(os.path.dirname(os.path.abspath(__file__)))
os._exit(3)
sys.exit(4)
class Loop:
    while True:
        try:
            pass
        except:
            pass
class Writes:
    open("WHERE/left behind", "w")
    os.remove("WHERE/tp5.py")
class Runs:
    subprocess.run(["touch", "WHERE/left behind"])
<<<<<<< HEAD
lr = 1
=======
lr = 2
>>>>>>> theirs
def broken(:
    pass
"""


@landlock
def test_whatever_a_folder_does_at_import_is_survived(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "STATEMENT_SECONDS", 0.3)
    write("steps", tmp_path)
    script = tmp_path / "tp5.py"
    script.write_text(HORRORS.replace("WHERE", str(tmp_path)) + script.read_text(encoding="utf-8"), encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    report = mark(tmp_path)
    assert statuses(report) == {"right"}, str(report)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert any("conflict" in repair for repair in report.repairs)


# Each writes, changes or removes a file of its own, whose path is WHERE.
ATTACKS = {
    "torch.save": "torch.save(torch.ones(2), WHERE)",
    "torch.from_file": "torch.from_file(WHERE, shared=True, size=4).fill_(1)",
    "os.open": "os.close(os.open(WHERE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))",
    "dir_fd": "os.mkdir(os.path.basename(WHERE), dir_fd=os.open(os.path.dirname(WHERE), os.O_RDONLY))",
    "mkfifo": "os.mkfifo(WHERE)",
    "ctypes open": "libc.open(WHERE.encode(), os.O_WRONLY | os.O_CREAT, 0o600)",
    "ctypes system": "libc.system(('echo x > ' + WHERE).encode())",
    "os.system": "os.system('echo x > ' + WHERE)",
    "forked session": "libc.wait(None) if libc.fork() else "
    "(os.setsid(), libc.open(WHERE.encode(), os.O_WRONLY | os.O_CREAT, 0o600), os._exit(0))",
    "os.unlink": "os.unlink(WHERE)",
    "ctypes unlink": "libc.unlink(WHERE.encode())",
    "truncate": "open(WHERE, 'w').close()",
}


@landlock
@pytest.mark.parametrize("protected", [True, False])
def test_nothing_is_written_outside_a_checks_folder(protected, tmp_path, monkeypatch):
    if not protected:  # then each of them succeeds: they are attacks
        monkeypatch.setattr(sandbox, "protect_files", lambda folder: None)
        monkeypatch.setattr(sandbox, "refuse", lambda event, arguments: None)
    folder, beside = write("steps", tmp_path / "folder"), tmp_path / "beside"
    beside.mkdir()
    lines = ["import ctypes, os", "libc = ctypes.CDLL(None)"]
    for place in (folder, beside):
        for name, attack in ATTACKS.items():
            path = place / name.replace(" ", "_")
            if name in ("os.unlink", "ctypes unlink", "truncate"):
                path.write_text("kept", encoding="utf-8")
            lines += ["try:", "    " + attack.replace("WHERE", repr(str(path))), "except BaseException:", "    pass"]
    insert(folder / "textloader.py", *lines, before="    longest = ")

    def contents():
        files = [path for place in (folder, beside) for path in place.iterdir()]
        return {path: path.read_bytes() if path.is_file() else None for path in files}

    before = contents()
    verdict = ask("batches", str(folder), [], {})
    assert verdict.status == "right", verdict
    changed = {path for path in before.keys() | contents().keys() if before.get(path, 0) != contents().get(path, 0)}
    assert len(changed) == (0 if protected else 2 * len(ATTACKS)), changed


FORGED = '{"status": "right", "detail": "", "warnings": [], "cell": null}'


def test_a_verdict_cannot_be_forged_by_files_and_pipes(tmp_path):
    write("steps", tmp_path, ("textloader.py", "torch.tensor(columns).t()", "torch.tensor(columns)"))
    insert(
        tmp_path / "textloader.py", "import os", "for number in range(3, 64):", "    try:",
        f"        os.write(number, {FORGED.encode()!r})", "    except OSError:", "        pass",
        f"open('answer.json', 'w').write({FORGED!r})", before="    longest = ",
    )  # fmt: skip
    assert ask("batches", str(tmp_path), [], {}).status == "wrong"


NONSENSE = ["[1, 2]", '{"status": "excellent", "detail": "", "warnings": []}', '{"status": "wrong", "detail": 7}',
            "[" * 100_000, "no JSON", "\\x80\\x04cos\\nsystem\\n"]  # fmt: skip


@pytest.mark.parametrize("nonsense", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_from_a_check_is_not_judged(nonsense, tmp_path):
    """A solution that looks for the answer's file in the marker's own frames can write it; it is only text."""
    write("steps", tmp_path)
    insert(
        tmp_path / "textloader.py", "import os, sys", "frame = sys._getframe()",
        "while 'answer_file' not in frame.f_locals:", "    frame = frame.f_back",
        f"open(frame.f_locals['answer_file'], 'w').write({nonsense!r})", "os._exit(0)", before="    longest = ",
    )  # fmt: skip
    assert ask("batches", str(tmp_path), [], {}).status == "not judged"


def test_an_endless_loop_leaves_the_other_questions_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "CALL_SECONDS", 0.3)
    write("library", tmp_path)
    insert(tmp_path / "tp5.py", "while True:", "    pass", before="    return nn.functional.cross_entropy")
    verdict = ask("loss", str(tmp_path), [], {})
    assert verdict.status == "not judged" and "tp5.py, line 9: while True:" in verdict.detail
    assert ask("batches", str(tmp_path), [], {}).status == "right"


@pytest.mark.slow
def test_a_check_that_takes_too_long_or_waits_for_ever_is_not_judged(tmp_path, monkeypatch):
    write("steps", tmp_path)
    endless = "while True:", "    try:", "        while True: pass", "    except BaseException: pass"
    insert(tmp_path / "textloader.py", *endless, before="    longest = ")
    with pytest.raises(sandbox.NoAnswer, match="CPU"):
        sandbox.run(answer, "batches", str(tmp_path), [], {}, cpu=3)
    write("steps", tmp_path)
    insert(tmp_path / "textloader.py", "import threading", "threading.Event().wait()", before="    longest = ")
    monkeypatch.setattr(sandbox, "IDLE", 2)
    with pytest.raises(sandbox.NoAnswer, match="waits"):
        sandbox.run(answer, "batches", str(tmp_path), [], {}, cpu=3)


def test_a_nested_or_large_file_costs_neither_the_folder_nor_the_next(tmp_path, monkeypatch, capsys):
    nested, large, empty = (tmp_path / name for name in ("1_nested", "2_large", "3_empty"))
    for folder in (nested, large):
        folder.mkdir()
        shutil.copy(SOLUTIONS / "textloader.py", folder)
    insert(nested / "textloader.py", "y = f" + "()" * 900, "z = " + "lambda: " * 900 + "0")
    (large / "large.py").write_text("x = 1\n" * 400_000, encoding="utf-8")
    empty.mkdir()
    (tmp_path / "4_loose.txt").write_text("", encoding="utf-8")
    arguments = ["marker", "--csv", str(tmp_path / "class.csv"), *map(str, sorted(tmp_path.iterdir()))]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().out
    assert end.value.code == 1 and "3_empty: error: no Python file in it" in printed
    assert "large.py: not read" in printed and "skipped: " in printed and printed.count("6 generate_beam") == 2
    assert "wrong" not in printed and "cannot run" not in printed.replace("cannot: it cannot run", "")
    assert all(len(line) <= 80 for line in printed.split("\n") if str(tmp_path) not in line)
    with open(tmp_path / "class.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    verdicts = {(row["folder"], row["question"]): row["verdict"] for row in rows}
    assert len(verdicts) == 3 * len(QUESTIONS) and verdicts[str(large), "1 pad_collate_fn"] == "right"


def test_the_command_prints_a_line_a_question_and_fails_if_something_is_wrong(tmp_path):
    write("steps", tmp_path, ("textloader.py", "torch.tensor(columns).t()", "torch.tensor(columns)"))
    for name in ("tp5.py", "generate.py"):
        (tmp_path / name).unlink()
    command = [sys.executable, "-m", "tests.marker", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=200)
    assert done.returncode == 1, done.stderr
    assert "pad_collate_fn" in done.stdout and "the batch is B × T, not T × B" in done.stdout
    assert sandbox.unprotected() in done.stderr and len(done.stderr.splitlines()) <= 1


@pytest.mark.slow
def test_a_model_of_a_test_can_be_had_in_a_shell(tmp_path):
    write("lists", tmp_path)
    command = [sys.executable, "-i", "-m", "tests.marker.example", str(tmp_path), "beam", "RNN", "1"]
    typed = "print(generate_beam(rnn, emb, decoder, eos, 3, start)[0])\n"
    done = subprocess.run(command, cwd=ROOT, input=typed, capture_output=True, encoding="utf-8")
    assert "qcn<EOS>" in done.stdout, done.stderr


def test_a_class_is_a_table():
    report = Report("a folder", dict.fromkeys(QUESTIONS, Verdict("missing")))
    lines = table([report, report]).split("\n")
    assert len(lines) == 4 and lines[1] == lines[2] and lines[1].split()[2:] == ["-"] * len(QUESTIONS)
