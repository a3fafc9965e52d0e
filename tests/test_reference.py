"""The README against the reference runs: its tables are theirs, its sentences hold, its example runs."""

import re
import shlex
import shutil

import pytest
from conftest import CELLS, ROOT, command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tp5

REFERENCE = ROOT / "runs" / "reference"
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMPARISON = (REFERENCE / "comparison" / "comparison.md").read_text(encoding="utf-8")


def rows(text: str) -> dict[tuple, list[str]]:
    """The lines of Markdown tables, by the words and numbers of their first cells."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {tuple(row): row for row in cells}


def lag_40(run: str, of: str, when: str) -> float:
    """The gradient's norm 40 characters back."""
    return float(next(row for row in rows(COMPARISON) if row[:3] == (run, of, when))[-1])


def decoded(run: str, decoder: str) -> dict[str, float]:
    """What a decoder's sentences are like."""
    row = next(row for row in rows(COMPARISON) if row[:2] == (run, decoder) and len(row) == 7)
    return dict(zip(("known", "copied 16", "copied 32", "length", "ended"), map(float, row[2:]), strict=True))


def best_nats(cell: str) -> float:
    return tp5.load(REFERENCE / cell / "best.pt").progress.best_loss


@pytest.mark.parametrize("cell", CELLS)
def test_validation_loss_is_computed_again(cell):
    run = tp5.load(REFERENCE / cell / "best.pt")
    where = {"run": "any", "device": "any"}
    documented = vars(tp5.run_options(["--model", cell])) | where  # the command has the defaults
    assert vars(run.options) | where == documented
    train_set, valid_set = tp5.load_corpus(run.options)
    assert train_set.sha256 == run.sha256
    nats = tp5.evaluate(run.model, tp5.batches(valid_set, run.batch_size), "cpu")
    assert nats == pytest.approx(best_nats(cell), abs=1e-4)
    assert f"{nats:.3f}" in next(row for row in rows(README) if row[0] == cell and len(row) == 6)


def test_tables_of_results_are_those_of_the_comparison():
    shown = [row for row in rows(README) if row[0] in (*CELLS, "corpus")]
    assert len(shown) >= 12
    assert set(shown) <= set(rows(COMPARISON))


def test_gradients_vanish_and_gates_keep_them():
    for state in ("rnn", "h"), ("gru", "h"), ("lstm", "h"), ("lstm", "C"):
        assert lag_40(*state, "at start") < 1e-3
    for cell in ("gru", "lstm"):
        times = lag_40(cell, "h", "trained") / lag_40("rnn", "h", "trained")
        assert f" {float(f'{times:.2g}'):,.0f} times" in README, times
    assert lag_40("lstm", "C", "trained") > lag_40("lstm", "h", "trained")


def test_units_follow_what_is_said():
    events = EventAccumulator(str(REFERENCE / "lstm"), size_guidance={"tensors": 0}).Reload()
    found = events.Tensors("units/text_summary")[-1].tensor_proto.string_val[0].decode()
    units = {row[1]: (row[0][0], float(row[2])) for row in rows(found) if row[2][-1].isdigit()}
    assert units["position in the word"][0] == "C" and abs(units["position in the word"][1]) > 0.7
    assert {units[feature][0] for feature in ("after a space", "after a vowel")} <= set("fio")
    assert abs(units["position in the sentence"][1]) < 0.5


def test_the_loss_is_in_the_order_that_is_told():
    assert best_nats("lstm") < best_nats("gru") < best_nats("rnn")


def test_likelihood_is_not_quality():
    corpus = decoded("corpus", "")
    for cell in CELLS:
        beam, sampled, nucleus = (decoded(cell, name) for name in ("beam", "sampled", "nucleus"))
        assert beam["length"] < corpus["length"] / 3
        assert sampled["known"] < nucleus["known"] < beam["known"]
        assert abs(nucleus["known"] - corpus["known"]) < abs(sampled["known"] - corpus["known"]) / 3 < 0.07
        assert beam["copied 16"] > corpus["copied 16"]
        assert max(sampled["copied 32"], nucleus["copied 32"]) < 0.01


def test_the_session_of_the_readme_is_what_the_commands_print():
    blocks = re.findall(r"    \$ python generate\.py (.*)\n((?:    .*\n)+)", README)
    assert blocks
    for arguments, shown in blocks:
        found = command("generate.py", *shlex.split(arguments), cwd=ROOT)
        assert found.returncode == 0, found.stderr
        for line in shown.splitlines():
            assert line[4:].split(" … (")[0].rstrip() in found.stdout, line


def test_a_cell_of_ones_own_trains(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    for name in ("tp5.py", "generate.py", "textloader.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "mycell.py").write_text(code, encoding="utf-8")
    text = "We met in 2004. They said no. Who knows?\n" * 400
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    small = ("--hidden", 16, "--embedding", 8, "--epochs", 1, "--data", tmp_path / "text.txt")
    found = command(tmp_path / "mycell.py", "--model", "minimal", *small, "--run", tmp_path / "run")
    assert found.returncode == 0 and "validation" in found.stdout, found.stderr


def test_they_are_small():
    files = [path for path in REFERENCE.glob("**/*") if path.is_file() and path.name != "last.pt"]
    assert sum(path.stat().st_size for path in files) < 15e6
