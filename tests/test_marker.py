"""The marker itself: our own scripts are all right, the skeleton is all missing, every mistake is found and named."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from marker.mutations import MISTAKES, RIGHT_VARIANTS, write
from marker.questions import answer, mark
from marker.report import QUESTIONS
from marker.sandbox import run
from marker.source import read_folder

ROOT = Path(__file__).resolve().parents[1]
FAST = [change for change in MISTAKES if change.style in ("steps", "lists")][::9]  # all of them take minutes


def statuses(report) -> set[str]:
    return {verdict.status for verdict in report.verdicts.values()}


def named(verdict, words: str) -> bool:
    """True if the verdict tells of the mistake in those words."""
    return words in " ".join([verdict.detail, *verdict.warnings]) and (
        verdict.status != "right" or bool(verdict.warnings)
    )


def scripts(folder: Path) -> Path:
    """The project's three scripts alone."""
    for name in ("textloader.py", "generate.py", "tp5.py"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_our_own_scripts_are_all_right(tmp_path):
    report = mark(scripts(tmp_path))
    assert statuses(report) == {"right"}, str(report)
    assert report.passed and list(report.verdicts) == list(QUESTIONS)
    assert not any(verdict.warnings for verdict in report.verdicts.values())


def test_the_skeleton_is_all_missing(tmp_path):
    report = mark(write("skeleton", tmp_path))
    assert statuses(report) == {"missing"}, str(report)
    assert report.passed  # nothing is wrong


@pytest.mark.parametrize("change", FAST, ids=lambda change: change.name)
def test_a_mistake_is_found_and_named(change, tmp_path):
    verdict = run(answer, change.question, read_folder(change.write(tmp_path)))
    assert named(verdict, change.words), verdict


@pytest.mark.slow
@pytest.mark.parametrize("change", MISTAKES, ids=lambda change: change.name)
def test_every_mistake_is_found_and_nothing_else_is_wrong(change, tmp_path):
    report = mark(change.write(tmp_path))
    assert named(report.verdicts[change.question], change.words), str(report)
    others = [verdict for question, verdict in report.verdicts.items() if question != change.question]
    # Another class may inherit it; and with a cell that forgets its state, sentences are wrong, too.
    known = [change.words, "the state is lost"] if "given state" in change.name else [change.words]
    wrong = [verdict for verdict in others if verdict.status == "wrong"]
    assert all(any(named(verdict, words) for words in known) for verdict in wrong), str(report)


@pytest.mark.slow
@pytest.mark.parametrize("change", RIGHT_VARIANTS, ids=lambda change: change.name)
def test_no_right_folder_is_called_wrong(change, tmp_path):
    report = mark(change.write(tmp_path))
    assert statuses(report) == {"right"}, str(report)
    assert not any(verdict.warnings for verdict in report.verdicts.values()), str(report)


HORRORS = """
import os, sys, shutil, threading, subprocess
from tp5 import nothing  # imports itself
import no_such_package
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


def test_whatever_a_folder_does_at_import_is_survived(tmp_path):
    write("steps", tmp_path)
    script = tmp_path / "tp5.py"
    script.write_text(HORRORS.replace("WHERE", str(tmp_path)) + script.read_text(encoding="utf-8"), encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    report = mark(tmp_path)
    assert statuses(report) == {"right"}, str(report)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert any("conflict" in repair for repair in report.repairs)


def test_the_command_prints_a_line_a_question_and_fails_if_something_is_wrong(tmp_path):
    write("steps", tmp_path, ("textloader.py", "torch.tensor(columns).t()", "torch.tensor(columns)"))
    for name in ("tp5.py", "generate.py"):
        (tmp_path / name).unlink()
    command = [sys.executable, "-m", "tests.marker", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=200)
    assert done.returncode == 1, done.stderr
    assert "pad_collate_fn" in done.stdout and "the batch is B × T, not T × B" in done.stdout
    assert not done.stderr
