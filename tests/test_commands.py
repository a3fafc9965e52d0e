"""The three scripts as a user runs them."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CELLS, ROOT, SMALL, command, refused, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tp5
from textloader import PAD_IX, LabError, TextDataset, pad_collate_fn, read_text
from tp5 import load_checkpoint, load_model

GATES = {"rnn": ["h"], "gru": ["z", "r", "candidate", "h"], "lstm": ["f", "i", "candidate", "o", "C", "h"]}


@pytest.mark.parametrize("model", CELLS)
def test_training_says_what_it_did(runs, model):
    output = (runs / f"{model}.txt").read_text(encoding="utf-8")
    assert "400 sentences, 360 to train on and 40 to validate" in output
    assert "sentences beyond maxsent" in output
    losses = [float(x) for x in re.findall(r"validation ([\d.]+) nats", output)]
    assert len(losses) == 2 and losses[1] < losses[0] < math.log(97)
    bits = [float(x) for x in re.findall(r"= ([\d.]+) bits", output)]
    assert bits == pytest.approx([x / math.log(2) for x in losses], abs=1.3e-3)
    assert all(output.count(f"  {decoder} ") == 2 for decoder in ("greedy", "sampled", "beam"))
    assert f"Run saved in {runs / model}" in output and "generate.py --beam 5" in output


@pytest.mark.parametrize("model", CELLS)
def test_validation_loss_is_that_of_torch(runs, model):
    """Recomputed from the checkpoint, one sentence at a time, with torch's own loss."""
    checkpoint = load_checkpoint(runs / model / "best.pt")
    dataset = TextDataset(read_text(ROOT / checkpoint["options"]["data"]), maxsent=400)
    split = torch.Generator().manual_seed(checkpoint["options"]["seed"])
    _, valid = torch.utils.data.random_split(dataset, [360, 40], split)
    loaded, nats, symbols = load_model(runs / model / "best.pt"), 0.0, 0
    for sentence in valid:
        target = pad_collate_fn([sentence])
        loss = torch.nn.functional.cross_entropy(loaded(target).flatten(0, 1), target.flatten(), reduction="sum")
        nats, symbols = nats + loss.item(), symbols + len(target)
    assert nats / symbols == pytest.approx(checkpoint["progress"]["best"], rel=1e-5)


@pytest.mark.parametrize("model", CELLS)
def test_tensorboard_reads_every_tag(runs, model):
    events = EventAccumulator(str(runs / model), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    inside = ("gradient_flow/", "recurrence/", "summary/")  # see test_monitoring.py
    assert {tag for tag in tags["scalars"] if not tag.startswith(inside)} == {
        "loss/train",
        "loss/validation",
        "loss/validation_bits_per_character",
        "gradient/norm_before_clipping",
        "gradient/clipped_share",
        "training/learning_rate",
        "training/characters_per_second",
    }
    parameters = [name for name, _ in load_model(runs / model / "best.pt").named_parameters()]
    expected = {f"{kind}/{name}" for kind in ("parameters", "gradients") for name in parameters}
    assert set(tags["histograms"]) == expected | {f"gates/{model}/{gate}" for gate in GATES[model]}
    assert {f"samples/{d}/text_summary" for d in ("greedy", "sampled", "beam")} <= set(tags["tensors"])
    steps = [event.step for event in events.Scalars("loss/train")]
    assert steps == sorted(set(steps)) and len(steps) >= 2
    if model == "lstm":
        gate = events.Histograms("gates/lstm/f")[0].histogram_value
        assert 0 <= gate.min <= gate.max <= 1
        # BLANK positions are left out: the values are whole hidden vectors of the real symbols
        assert gate.num % 24 == 0


def test_recorded_gates_leave_blank_out(tmp_path):
    from tp5 import CharModel, Monitor, watch

    class Options:
        scalars_every = histograms_every = 1

    model = CharModel("lstm", 4, 8)
    batch = pad_collate_fn([torch.tensor([5, 6, 7]), torch.tensor([5])])  # 4 + 2 real symbols
    monitor = Monitor(tmp_path, Options, 0)
    with watch(model.rnn) as states:
        model(batch).sum().backward()
    monitor.histograms(model, states, batch != PAD_IX, 0)
    monitor.writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Histograms("gates/lstm/C")[0].histogram_value.num == 6 * 8


def test_turned_off_nothing_is_recorded(tmp_path):
    off = ("--scalars-every", 0, "--histograms-every", 0)
    assert command("tp5.py", "--run", tmp_path, *SMALL, *off).returncode == 0
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert tags["histograms"] == [] and "loss/train" not in tags["scalars"]


def test_same_seed_same_run(runs, tmp_path):
    assert command("tp5.py", "--model", "gru", "--run", tmp_path / "again", *SMALL).returncode == 0
    first, again = (load_checkpoint(folder / "last.pt") for folder in (runs / "gru", tmp_path / "again"))
    assert all(torch.equal(first["weights"][name], again["weights"][name]) for name in first["weights"])


def test_resuming_a_finished_run(runs):
    """It says so, and what of the command line it ignores; nothing is written."""
    before = (runs / "lstm" / "last.pt").read_bytes()
    result = command("tp5.py", "--resume", runs / "lstm" / "last.pt", "--lr", "0.5", "--epochs", "9", "--hidden", "24")
    assert result.returncode == 0, result.stderr
    assert "ignored: --lr 0.5; the run has 0.008" in result.stdout
    assert "ignored: --epochs 9; the run has 2" in result.stdout and "--hidden" not in result.stdout
    assert "has finished its 2 epochs" in result.stdout
    assert (runs / "lstm" / "last.pt").read_bytes() == before


def test_resuming_with_another_corpus(runs, tmp_path):
    checkpoint = load_checkpoint(runs / "lstm" / "last.pt")
    checkpoint["progress"].update(epoch=1)
    (tmp_path / "run").mkdir()
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    (tmp_path / "other.txt").write_text("Yes. We. Can. " * 20, encoding="utf-8")
    result = command("tp5.py", "--resume", tmp_path / "run", "--data", tmp_path / "other.txt")
    refused(result, "other.txt", "not the corpus")


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("tp5.py", ["--epochs", "0"], ["--epochs", "at least 1"]),
        ("tp5.py", ["--lr", "0"], ["--lr", "above 0"]),
        ("tp5.py", ["--lr", "nan"], ["--lr"]),
        ("tp5.py", ["--hidden", "x"], ["--hidden", "not a number"]),
        ("tp5.py", ["--hidden", "99999999"], ["GB", "--hidden"]),
        ("tp5.py", ["--hidden", "100000000000"], ["--hidden", "at most"]),
        ("tp5.py", ["--batch-size", 23 * "9"], ["--batch-size", "at most"]),
        ("tp5.py", ["--threads", "2147483647"], ["--threads", "at most"]),
        ("tp5.py", ["--model", "transformer"], ["--model", "lstm"]),
        ("tp5.py", ["--data", "missing.txt"], ["cannot read"]),
        ("tp5.py", ["--data", "."], ["cannot read"]),
        ("tp5.py", ["--resume", "nowhere"], ["cannot read"]),
        ("tp5.py", ["--resume", "there", "--run", "here"], ["--run", "--resume"]),
    ],
)
def test_bad_options(tmp_path, script, arguments, words):
    refused(command(script, *arguments, cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_no_cuda(tmp_path):
    refused(command("tp5.py", "--device", "cuda", "--run", tmp_path / "run"), "CUDA")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["no sentence at all", "Only one."])
def test_corpus_too_small(tmp_path, text):
    (tmp_path / "small.txt").write_text(text, encoding="utf-8")
    refused(command("tp5.py", "--data", tmp_path / "small.txt", "--run", tmp_path / "run"), "sentence")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", CELLS)
@pytest.mark.parametrize("text", ["A. B!", ". . . . . . . . . . . ."], ids=["two sentences", "one symbol"])
def test_smallest_corpora_train(tmp_path, trained, model, text):
    (tmp_path / "small.txt").write_text(text, encoding="utf-8")
    sizes = ("--hidden", 1, "--embedding", 1, "--batch-size", 1, "--epochs", 1, "--clip", 0)
    output = trained("--model", model, "--data", tmp_path / "small.txt", "--run", tmp_path / "run", *sizes)
    assert "1 to validate" in output and load_model(tmp_path / "run" / "best.pt")


def test_run_folder_is_not_overwritten(runs):
    before = (runs / "rnn" / "last.pt").read_bytes()
    refused(command("tp5.py", "--run", runs / "rnn", *SMALL), "--resume")
    assert (runs / "rnn" / "last.pt").read_bytes() == before


def test_diverging_run_stops_with_advice(tmp_path):
    result = command("tp5.py", "--run", tmp_path / "run", *SMALL, "--lr", "1e38", "--clip", "0")
    refused(result, "not finite", "--lr")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_are_not_utf8(tmp_path, trained):
    corpus = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(corpus)).write_text("Yes. We. Can. " * 20, encoding="utf-8")
    small = (*SMALL[2:6], "--epochs", 1)
    trained("--data", os.fsdecode(corpus), "--run", tmp_path / "run", *small)
    assert load_checkpoint(tmp_path / "run" / "best.pt")["corpus"]["name"] == "caf .txt"
    with pytest.raises(LabError, match="not UTF-8"):
        trained("--data", os.fsdecode(corpus), "--run", os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"), *small)


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX pipe")
def test_reader_of_the_output_goes_away(tmp_path):
    process = start("tp5.py", "--model", "rnn", "gru", "--run", tmp_path / "run", *SMALL[:-1], 500)
    assert any(line.startswith("epoch 1/500") for line in process.stdout)
    process.stdout.close()
    assert process.wait(timeout=100) == 2 and "--resume" in process.stderr.read()
    assert not (tmp_path / "run" / "gru").exists()


@pytest.fixture
def trained(monkeypatch, capsys):
    """Train in this process: what the command prints."""

    def train(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["tp5.py", *map(str, arguments)])
        tp5.main()
        return capsys.readouterr().out

    return train


def spoil(monkeypatch, steps, how) -> None:
    """Make the training loss of these steps (0, 1, …) not finite, or its gradient only."""
    loss, step = tp5.maskedCrossEntropy, iter(range(10**6))

    def spoiled(output, target, padcar):
        if torch.is_grad_enabled() and next(step) in steps:
            if how == "gradient":
                output.register_hook(lambda gradient: gradient * math.inf)
            else:
                output = output * math.nan
        return loss(output, target, padcar)

    monkeypatch.setattr(tp5, "maskedCrossEntropy", spoiled)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch, trained, how):
    spoil(monkeypatch, {0, 3, 4, 6, 23}, how)
    output = trained("--run", tmp_path / "run", *SMALL, "--histograms-every", 1)
    assert re.findall("([0-9]+) steps skipped so far", output) == ["4", "5"]
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (checkpoint["progress"]["step"], checkpoint["progress"]["skipped"]) == (24, 5)
    assert checkpoint["optimizer"][0]["step"] == 19


def test_three_steps_in_a_row_stop_the_run(tmp_path, monkeypatch, trained):
    spoil(monkeypatch, {12, 13, 14}, "loss")
    with pytest.raises(tp5.LabError, match="three steps in a row"):
        trained("--run", tmp_path / "run", *SMALL)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"] == 12  # the epoch before


def test_imports_do_no_work(tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); before = torch.get_num_threads();"
        "import tp5, generate, textloader; assert torch.get_num_threads() == before"
    )
    result = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["tp5.py", "generate.py", "textloader.py"])
def test_help(script):
    result = command(script, "--help")
    assert result.returncode == 0 and result.stdout.startswith("usage:")
