"""Training: a step and a validation against torch's own, the schedule, steps that are not finite."""

import itertools
import math
import re

import pytest
import torch
from conftest import here, refused, valid_split

import tp5
from textloader import PAD_IX, TextDataset, pad_collate_fn
from tp5 import CELLS, load, new_run, run_options, schedule, train_step


def small_run(cell: str, **options):
    """A run before its first step."""
    sizes = {"model": cell, "hidden": 6, "embedding": 4, "device": "cpu"}
    return new_run(run_options(sizes | options), TextDataset(""))


BATCH = torch.tensor([[2, 3, 4], [5, 6, 1], [2, 1, 0], [1, 0, 0]])  # 9 symbols


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("clip", [0, 1e-3])
def test_a_step_is_torchs(cell, clip):
    """Cross-entropy over the mean batch's symbols, clipped by the norm of all gradients, AdamW."""
    run, peer = (small_run(cell, optimizer="adamw", clip=clip) for _ in range(2))
    nats, symbols, norm = train_step(run, BATCH, 0.01, mean_symbols=5.0)
    logits, parameters = peer.model(BATCH).flatten(0, 1), [*peer.model.parameters()]
    loss = torch.nn.functional.cross_entropy(logits, BATCH.flatten(), ignore_index=PAD_IX, reduction="sum")
    (loss / 5).backward()
    assert (nats, symbols) == (pytest.approx(loss.item()), 9)
    assert norm == pytest.approx(math.sqrt(sum(p.grad.square().sum().item() for p in parameters)), rel=1e-5)
    if clip:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    torch.optim.AdamW(parameters, 0.01, betas=(0.9, 0.95)).step()
    torch.testing.assert_close(run.model.state_dict(), peer.model.state_dict())


def test_a_step_that_is_not_finite_teaches_nothing():
    run, before = small_run("lstm"), small_run("lstm").model.state_dict()
    run.model.decoder.register_forward_hook(lambda module, inputs, output: output * math.nan)
    assert math.isnan(train_step(run, BATCH, 0.01, mean_symbols=9.0)[0])
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


def test_learning_rate_rises_for_a_twentieth_then_falls_as_a_cosine():
    rates = [schedule(step, 100) for step in range(101)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    falling = [math.cos(math.pi / 2 * step / 95) ** 2 for step in range(96)]  # (1 + cos 2a) / 2
    assert rates[5:] == pytest.approx(falling)


# -------------------------------------------------------------------------- of the whole command


@pytest.mark.parametrize("cell", CELLS)
def test_validation_loss_is_that_of_torch(runs, small, cell):
    """Recomputed from the checkpoint, one sentence at a time, with torch's own loss."""
    model, nats, symbols = load(runs / cell / "best.pt").model, 0.0, 0
    for sentence in valid_split(small):
        target = pad_collate_fn([sentence])
        loss = torch.nn.functional.cross_entropy(model(target).flatten(0, 1), target.flatten(), reduction="sum")
        nats, symbols = nats + loss.item(), symbols + len(target)
    best = load(runs / cell / "best.pt").progress.best_loss
    assert nats / symbols == pytest.approx(best, rel=1e-5)


def test_same_seed_same_run(runs, small, tmp_path):
    """A run alone is bit for bit that among a comparison's, in another process."""
    assert here("tp5.py", "--model", "gru", "--run", tmp_path, *small).returncode == 0
    first, again = (load(folder / "last.pt").model.state_dict() for folder in (runs / "gru", tmp_path))
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())


def spoil(monkeypatch, steps, part: str) -> None:
    """Make the "loss" of these training steps (0, 1, …) not finite, or its "gradient" only."""
    loss, count = tp5.maskedCrossEntropy, itertools.count()

    def spoiled(output, target, padcar):
        step = next(count) if torch.is_grad_enabled() else None  # validation is no step
        if step in steps and part == "gradient":
            output.register_hook(lambda gradient: gradient * math.inf)
        elif step in steps:
            output = output * math.nan
        return loss(output, target, padcar)

    monkeypatch.setattr(tp5, "maskedCrossEntropy", spoiled)


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch, small, part):
    spoil(monkeypatch, {0, 3, 4, 6, 40}, part)
    found = here("tp5.py", "--run", tmp_path, *small, "--histograms-every", 1)
    assert re.findall("([0-9]+) steps skipped so far", found.stdout) == ["4", "5"], found.stderr
    run = load(tmp_path / "last.pt")
    assert (run.progress.step, run.progress.skipped) == (58, 5)
    adamw = next(optimizer for optimizer in run.optimizers if isinstance(optimizer, torch.optim.AdamW))
    assert {int(state["step"]) for state in adamw.state.values()} == {53}


def test_three_steps_in_a_row_stop_the_run(tmp_path, monkeypatch, small):
    spoil(monkeypatch, {30, 31, 32}, "loss")
    refused(here("tp5.py", "--run", tmp_path, *small), "three steps in a row", "--lr")
    assert load(tmp_path / "last.pt").progress.step == 29  # the epoch before
