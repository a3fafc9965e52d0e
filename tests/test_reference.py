"""The reference runs: they load, and their validation loss is the README's, computed again."""

import math
import re
import shutil

import pytest
from conftest import CELLS, ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tp5
from generate import newest_checkpoint

REFERENCE = ROOT / "runs" / "reference"


def figures_of(cell: str) -> dict[str, float]:
    """The row of a reference run in the README's first table."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith(f"| {cell} "))
    names = ("parameters", "seconds", "speed", "train", "valid", "bits", "perplexity")
    return dict(zip(names, (float(cell.replace(",", "")) for cell in row.split("|")[2:9]), strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_validation_loss_is_the_readmes(cell):
    checkpoint, shown = tp5.load_checkpoint(REFERENCE / cell / "best.pt"), figures_of(cell)
    options = tp5.command_parser().parse_args([])  # the documented command has the defaults
    assert {**tp5.to_save(options), "model": cell, "data": "data/speeches.txt"} == checkpoint["options"]
    _, valid, corpus = tp5.load_corpus(options)
    assert corpus == checkpoint["corpus"]
    nats = tp5.evaluate(tp5.load_model(REFERENCE / cell / "best.pt"), tp5.batches(valid, options, False), "cpu")
    assert nats == pytest.approx(checkpoint["progress"]["best"], abs=1e-4)
    assert shown["valid"] == pytest.approx(nats, abs=6e-4)
    assert shown["bits"] == pytest.approx(nats / math.log(2), abs=6e-4)
    assert shown["perplexity"] == pytest.approx(math.exp(nats), abs=6e-3)
    assert shown["parameters"] == sum(weight.numel() for weight in checkpoint["weights"].values())


@pytest.mark.parametrize("cell", CELLS)
def test_tags_that_the_readme_names_are_there(cell):
    events = EventAccumulator(str(REFERENCE / cell), size_guidance={"scalars": 0}).Reload()
    tags = {tag.removesuffix("/text_summary") for kind in ("scalars", "histograms", "images", "tensors")
            for tag in events.Tags()[kind]}  # fmt: skip
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| view | tags |") :].split("\n\n")[0]
    for group, names in re.findall(r"`([\w/]+)/\{([\w, ]+)\}`", table):
        if f"/{cell}" in group or not any(f"/{other}" in group for other in CELLS):
            assert {f"{group}/{name.strip()}" for name in names.split(",")} <= tags
    assert {tag for tag in re.findall(r"`([\w/]+)`", table) if "/" in tag and "{" not in tag} <= tags


def test_they_are_small_and_without_optimiser():
    files = [path for path in REFERENCE.glob("**/*") if path.is_file() and path.name not in ("lock", "last.pt")]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert all(not tp5.load_checkpoint(REFERENCE / cell / "best.pt")["optimizer"] for cell in CELLS)


def test_the_users_own_run_speaks_first(tmp_path):
    shutil.copytree(REFERENCE / "lstm", tmp_path / "reference" / "lstm")
    assert newest_checkpoint(tmp_path) == tmp_path / "reference" / "lstm" / "best.pt"
    (tmp_path / "compare" / "rnn").mkdir(parents=True)
    own = shutil.copy2(REFERENCE / "rnn" / "best.pt", tmp_path / "compare" / "rnn" / "best.pt")
    (tmp_path / "reference" / "lstm" / "best.pt").touch()  # later than the user's own
    assert newest_checkpoint(tmp_path) == own
