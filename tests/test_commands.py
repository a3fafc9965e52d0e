"""tp5.py as a user runs it: what it says, what it refuses, and in which words."""

import io
import math
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES, command, here, refused, start

import generate
from textloader import guard, read_text
from tp5 import CELLS, load

TINY = ("--hidden", "2", "--embedding", "2", "--epochs", "1", "--batch-size", "32")
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files and pipes")


def test_training_says_what_it_did(runs):
    output = (runs / "output.txt").read_text(encoding="utf-8")
    assert "1,000 sentences, 900 to train on, 100 to validate" in output and "left out: nothing" in output
    losses = [float(x) for x in re.findall(r"validation ([\d.]+) nats", output)]
    first, last = np.reshape(losses, (3, 2)).T
    assert (last < first).all() and (first < math.log(97)).all()
    bits = [float(x) for x in re.findall(r"([\d.]+) bits", output)]
    assert bits == pytest.approx([x / math.log(2) for x in losses], abs=1.3e-3)
    assert all(output.count(f"\n  {name:12s}  ") == 6 for name in SAMPLES)
    assert "skipped" not in output
    short = [line for line in output.splitlines() if str(runs.parent) not in line]  # paths stay whole
    assert max(map(len, short)) <= 80
    assert f"\n    python generate.py --beam 5 --checkpoint '{runs / 'lstm'}'\n" in output  # to be pasted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epochs", 0], ["--epochs", "from 1 to"]),
        (["--lr", -1], ["--lr", "from "]),
        (["--lr", "nan"], ["--lr"]),
        (["--hidden", "x"], ["--hidden", "'x'"]),
        (["--hidden", 10**6], ["--hidden", "from 1 to"]),
        (["--hidden=--"], ["--"]),
        (["--batch-size", 23 * "9"], ["--batch-size"]),
        (["--maxlen", 10**6], ["--maxlen", "10,000"]),
        (["--model", "rnn", "cnn"], ["--model", "lstm"]),
        (["--resume", "there", "--run", "here"], ["--run", "--resume"]),
        (["--compare", "runs", "--run", "x"], ["--run", "--compare"]),
        (["--compare", "runs", "--look", "x"], ["--compare"]),
        (["--look", "x", "--lr", 1], ["--lr", "--look"]),
        pytest.param(["--device", "cuda"], ["cpu"], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")),
    ],
)
def test_bad_options(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    found = here("tp5.py", *options)
    refused(found, code=2)
    assert all(word in found.stderr.splitlines()[-1].replace("10000", "10,000") for word in words), found.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "missing.txt"], ["No such file", "missing.txt"]),
        (["--data", "."], ["directory"]),
        (["--data="], ["directory"]),
        (["--resume", "nowhere"], ["no last.pt", "nowhere"]),
        (["--compare", "."], ["no best.pt", "train"]),
        (["--look", " "], ["--look", "text"]),
        (["--look", "→"], ["alphabet: →"]),
        (["--look", "a" * 100_000], ["--look", "1,000"]),
    ],
)
def test_refused_in_one_line(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    refused(here("tp5.py", *options), *words)
    assert not any(tmp_path.glob("**/*.pt"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["too little text", "0 sentences"]),
        (b" \n\t ", ["too little text", "0 sentences"]),
        (b"Yes\0. We. Can. ", ["too little text", "3 sentences", "1 characters outside the alphabet"]),
        (b"\x89PNG\r\n\x1a\n", ["as UTF-8"]),
        ("Liberté. Égalité.".encode("latin-1"), ["as UTF-8"]),
        (b"no sentence at all\nthat ends\n", ["too little text", "0 sentences", "--lines"]),
        (b"Only one.", ["too little text", "1 sentences", "--lines"]),
        ("Это мой дом".encode(), ["too little text", "characters outside the alphabet", "3 о"]),
    ],
)
def test_corpora_that_cannot_be_learned(tmp_path, data, words):
    (tmp_path / "odd.txt").write_bytes(data)
    refused(here("tp5.py", "--data", tmp_path / "odd.txt", "--run", tmp_path / "run"), "odd.txt", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "text", ["Ab. Cd! Ef? Gh. Ij. " * 2, ". . . . . . . . . . . ."], ids=["ten sentences", "one symbol"]
)
def test_smallest_corpora_train(tmp_path, cell, text):
    (tmp_path / "small.txt").write_text(text, encoding="utf-8")
    options = ("--hidden", 1, "--embedding", 1, "--batch-size", 1, "--epochs", 1, "--clip", 0)
    found = here("tp5.py", "--model", cell, "--data", tmp_path / "small.txt", "--run", tmp_path / "run", *options)
    assert found.returncode == 0 and "1 to validate" in found.stdout and load(tmp_path / "run" / "best.pt").model
    assert re.fullmatch("warning: .*[0-9]+ sentences.*\n", found.stderr)


@posix
def test_lines_through_a_pipe(tmp_path):
    """Names without full stops, one a line, that can be read only once, as with --data <(cat names)."""
    reader, writer = os.pipe()
    os.write(writer, b"Ann\nBob Lee\n\nCid\n" * 400)
    os.close(writer)
    found = here("tp5.py", "--data", f"/dev/fd/{reader}", "--lines", "--run", tmp_path / "run", *TINY)
    os.close(reader)
    assert found.returncode == 0 and found.stderr == "" and "1,200 lines" in found.stdout


def test_a_finished_run_goes_on_with_a_renamed_corpus(small, tmp_path):
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text(read_text(small[1]), encoding="utf-8")
    assert here("tp5.py", "--data", text, "--run", run, *TINY).returncode == 0
    before = (run / "last.pt").read_bytes()
    found = here("tp5.py", "--resume", run)  # only looks inside again
    assert found.returncode == 0 and "epoch" not in found.stdout and "Units of this lstm" in found.stdout
    assert (run / "last.pt").read_bytes() == before
    refused(here("tp5.py", "--resume", run, "--lr", 0.5), "--lr", "--resume", code=2)
    text.rename(tmp_path / "renamed.txt")
    refused(here("tp5.py", "--resume", run, "--epochs", 2), "No such file", "text.txt")
    (tmp_path / "other.txt").write_text("Yes. We. Can. " * 20, encoding="utf-8")
    found = here("tp5.py", "--resume", run, "--epochs", 2, "--data", tmp_path / "other.txt")
    assert found.returncode == 1 and "--data" in found.stderr.splitlines()[-1]
    assert (run / "last.pt").read_bytes() == before
    found = here("tp5.py", "--resume", run / "last.pt", "--epochs", 2, "--data", tmp_path / "renamed.txt")
    assert found.returncode == 0 and "epoch 2/2" in found.stdout and "epoch 1/" not in found.stdout
    assert load(run / "last.pt").progress.step == 58


def test_a_run_goes_on_from_another_folder(small, tmp_path, monkeypatch):
    """Its text was named by where it stood then."""
    monkeypatch.chdir(Path(small[1]).parent)
    named = ("--data", Path(small[1]).name)
    assert here("tp5.py", *named, "--run", tmp_path / "run", *TINY).returncode == 0
    monkeypatch.chdir(tmp_path)
    found = here("tp5.py", "--resume", "run", "--epochs", 2)
    assert found.returncode == 0 and "epoch 2/2" in found.stdout, found.stderr


def test_run_folders_are_not_overwritten(runs, small, tmp_path):
    before = (runs / "rnn" / "last.pt").read_bytes()
    refused(here("tp5.py", "--run", runs / "rnn", *small), "--resume")
    refused(here("tp5.py", "--model", "gru", "rnn", "--run", runs, *small), "--resume")  # before any training
    (tmp_path / "best.pt").write_bytes((runs / "rnn" / "best.pt").read_bytes())
    refused(here("tp5.py", "--run", tmp_path, *small), "another --run")
    assert (runs / "rnn" / "last.pt").read_bytes() == before


@posix
@pytest.mark.parametrize("option", ["--run", "--resume", "--data", "--compare", "--checkpoint"])
def test_paths_that_the_system_refuses(tmp_path, option):
    (tmp_path / "file").write_text("It is. So be it.", encoding="utf-8")
    (tmp_path / "loop").symlink_to("loop")
    script = "generate.py" if option == "--checkpoint" else "tp5.py"
    for name in ("file/there", "loop/there", "x" * 300, "\x1b[31m\n" * 60, os.fsdecode(b"\xe9/" + b"x" * 300)):
        refused(here(script, option, tmp_path / name))


@posix
def test_names_do_not_reach_the_terminal_raw(tmp_path):
    """An escape sequence, a line break, and bytes that are not UTF-8."""
    folder = tmp_path / "\x1b[31m\n"
    folder.mkdir()
    text = folder / os.fsdecode(b"caf\xe9.txt")
    text.write_text("Yes. We. Can. " * 400, encoding="utf-8")
    trained = here("tp5.py", "--data", text, "--run", folder / "run", *TINY)
    again = here("tp5.py", "--resume", folder / "run", "--epochs", 2)
    looked = here("tp5.py", "--resume", folder / "run", "--look", "We can.")
    written = here("generate.py", "--checkpoint", folder / "run", "--greedy")
    refusals = (here("tp5.py", "--resume", folder / "none"), here("tp5.py", "--resume", folder / "run", "--lr", 1))
    for found in (trained, again, looked, written):
        assert found.returncode == 0, found.stderr
    for found in (trained, again, looked, written, *refusals):
        assert all(line.isprintable() for line in (found.stdout + found.stderr).splitlines())


def test_reader_of_the_output_goes_away(small, tmp_path):
    """As `head` does. What a hundred epochs print is more than a pipe holds: it cannot end before."""
    process = start("tp5.py", "--model", "rnn", "gru", "--run", tmp_path / "run", *small, "--epochs", 50)
    assert "1,000 sentences" in process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    refused(subprocess.CompletedProcess(process.args, process.wait(), "", errors), "pipe")
    assert not (tmp_path / "run" / "gru" / "best.pt").exists()


@pytest.mark.slow
@posix
@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_stream_that_the_shell_has_closed(small, tmp_path, closed):
    script = [sys.executable, str(ROOT / "tp5.py"), "--run", str(tmp_path), *small[:2], *TINY]
    found = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *script], capture_output=True, text=True)
    assert found.returncode == 0 and found.stderr == "" and load(tmp_path / "last.pt").progress.step == 29


def test_streams_of_a_notebook(runs):
    """They write text, and know no encoding."""
    with redirect_stdout(io.StringIO()) as output, patch.object(sys, "argv", ["generate.py", "--greedy"]):
        sys.argv += ["--checkpoint", str(runs / "rnn")]
        guard(generate.main)
    assert "nats" in output.getvalue()


@pytest.mark.parametrize("clip", [1, 0])
def test_diverging_run_stops_with_advice(small, tmp_path, clip):
    found = here("tp5.py", "--run", tmp_path, *small, "--lr", 1e9, "--clip", clip)
    refused(found, "not finite", "three steps in a row", "smaller --lr", "--clip 1")
    assert load(tmp_path / "last.pt").progress.step == 0


def test_imports_do_no_work(tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); before = torch.get_num_threads();"
        "import tp5, generate, textloader; assert torch.get_num_threads() == before;"
        "assert 'tensorboard' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["tp5.py", "generate.py", "textloader.py"])
def test_help(script):
    found = command(script, "--help") if script == "tp5.py" else here(script, "--help")
    assert found.returncode == 0 and found.stdout.startswith("usage:")
    assert max(map(len, found.stdout.splitlines())) <= 80
    if script == "tp5.py":
        assert "{rnn,gru,lstm,all}" in found.stdout and "None" not in found.stdout
