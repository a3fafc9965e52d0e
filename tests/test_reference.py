"""The README against the reference runs: its tables are theirs, its sentences hold, its example runs."""

import re
import shlex
import shutil

import pytest
from conftest import ROOT, command, here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tp5
from figures import originality
from tp5 import CELLS

REFERENCE = ROOT / "runs" / "reference"
README = (ROOT / "README.md").read_text(encoding="utf-8")
FINDINGS = (REFERENCE / "README.md").read_text(encoding="utf-8")
COMPARISON = (REFERENCE / "comparison" / "comparison.md").read_text(encoding="utf-8")
WORDS = (REFERENCE / "words.md").read_text(encoding="utf-8")
MEMORY = (REFERENCE / "memory.md").read_text(encoding="utf-8")
SEEDS = (REFERENCE / "seeds.md").read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of each line of the Markdown tables in a text."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def table(text: str, *header: str) -> list[dict[str, str]]:
    """The rows, by column, of the table whose header begins with these names."""
    for part in text.split("\n\n"):
        lines = rows(part)
        if lines and lines[0][: len(header)] == [*header]:
            return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    raise LookupError(header)


def two_digits(number: float) -> str:
    return f"{float(f'{number:.2g}'):,.10g}"


def said(sentence: str, *texts: str) -> None:
    """Assert that all the texts say so, however their lines are broken."""
    for text in texts:
        assert sentence in " ".join(text.split()), sentence


def lag_40(run: str, of: str, when: str) -> float:
    """The gradient's norm 40 characters back."""
    flows = table(COMPARISON, "run", "of", "when")
    return next(float(row["40"]) for row in flows if (row["run"], row["of"], row["when"]) == (run, of, when))


def decoded(run: str, decoder: str) -> dict[str, str]:
    """What a decoder's sentences are like."""
    shares = table(WORDS, "run", "decoder")
    return next(row for row in shares if (row["run"], row["decoder"]) == (run, decoder))


@pytest.mark.parametrize("cell", CELLS)
def test_validation_loss_is_computed_again(cell):
    run = tp5.load(REFERENCE / cell / "best.pt", device="cpu")
    where = {"run": "any", "device": "any"}
    documented = vars(tp5.run_options({"model": cell})) | where  # the command has the defaults
    assert vars(run.options) | where == documented
    train_set, valid_set = tp5.load_corpus(run.options)
    assert train_set.sha256 == run.sha256
    nats = tp5.evaluate(run.model, tp5.batches(valid_set, run.global_batch_size), "cpu")
    assert nats == pytest.approx(run.progress.best_loss, abs=1e-4)
    shown = next(row for row in table(FINDINGS, "run", "parameters") if row["run"] == cell)
    assert shown["validation"] == f"{run.progress.best_loss:.3f}"
    said(f"{len(train_set) + len(valid_set):,} sentences", FINDINGS, (ROOT / "data" / "README.md").read_text("utf-8"))


def test_tables_are_those_of_the_runs():
    measured = [*rows(COMPARISON), *rows(WORDS), *rows(SEEDS)]
    shown = [row for row in rows(FINDINGS) if row[0].split(" ")[0] in (*CELLS, "corpus")]
    assert len(shown) == 19 and all(row in measured for row in shown)


def test_losses_by_seed():
    """Of three seeds the mean and the range; every seed puts the cells in the same order."""
    by_seed = {row["tp5.py --model"]: row for row in table(SEEDS, "tp5.py --model")}
    losses = [by_seed[cell]["validation nats, seeds 0, 1, 2"].split(", ") for cell in ("lstm", "gru", "rnn")]
    assert all(len(of_cell) == 3 for of_cell in losses)
    assert all(lstm < gru < rnn for lstm, gru, rnn in zip(*losses, strict=True))
    rnn, gru, lstm = (by_seed[cell]["mean"] for cell in CELLS)
    said(f"the RNN ends at {rnn} nats a symbol, the GRU at {gru}, the LSTM at {lstm}", README)


def test_the_rnns_gradient_vanishes_the_lstm_is_given_its_memory_the_gru_learns_it():
    trained, start = ({cell: lag_40(cell, "h", when) for cell in CELLS} for when in ("trained", "at start"))
    assert trained["rnn"] < 1e-5 and start["rnn"] < 1e-6
    times = {cell: two_digits(trained[cell] / trained["rnn"]) for cell in CELLS}
    sentence = f"{times['lstm']} times the gradient that the RNN's gets, the GRU's {times['gru']} times"
    said(sentence, README, FINDINGS)
    given = two_digits(start["lstm"] / start["rnn"])
    said(f"{given} times at the start", README, FINDINGS)
    by_training = {cell: two_digits(trained[cell] / start[cell]) for cell in CELLS}
    said(f"the RNN's by {by_training['rnn']}, the LSTM's by {by_training['lstm']}", FINDINGS)
    said(f"the GRU's by {by_training['gru']}", FINDINGS)
    said(f"multiplies its gradient by {by_training['gru']}", README)


def test_what_carries_the_memory():
    by_lstm = {row["LSTM"]: row for row in table(MEMORY, "LSTM")}
    start, trained = by_lstm["bias 1, at start"], by_lstm["bias 1, trained"]
    said(f"from {float(start['mean f']):.2f} to {float(trained['mean f']):.2f}", FINDINGS)
    share = "its share of the squared gradient"
    said(f"the largest of 256 units has {float(start[share]):.1%}".replace("%", " %"), FINDINGS)
    said(f"one unit has {float(trained[share]):.0%} of it".replace("%", " %"), FINDINGS)
    said(f"one of 256 has {float(trained[share]):.0%}".replace("%", " %"), README)
    said(f"its f has a mean of {float(trained['its mean f']):.2f}", FINDINGS)
    plain, plain_trained = (float(by_lstm[f"bias 0, {when}"]["h 40 back"]) for when in ("at start", "trained"))
    assert plain < lag_40("rnn", "h", "at start")  # as small as the RNN's
    said(f"multiplies its gradient by {two_digits(plain_trained / plain)}, to an eighth", FINDINGS)
    assert 7 < lag_40("lstm", "h", "trained") / plain_trained < 9
    loss = re.search(r"bias 0: ([\d.]+) nats", MEMORY)[1]
    said(f"ends at {loss} nats as this one at {table(COMPARISON, 'run', 'parameters')[2]['validation']}", FINDINGS)


def test_units_follow_what_is_said():
    events = EventAccumulator(str(REFERENCE / "lstm"), size_guidance={"tensors": 0}).Reload()
    shown = events.Tensors("units/text_summary")[-1].tensor_proto.string_val[0].decode()
    units = {row["follows"]: row for row in table(shown, "unit", "follows")}
    assert units["position in the word"]["unit"].startswith("C ")
    said(f"(r {float(units['position in the word']['correlation']):.2f})".replace("-", "−"), FINDINGS)
    assert {units[feature]["unit"].split()[0] for feature in ("a space", "a vowel")} <= {*"fio", "candidate"}
    assert all(abs(float(unit["correlation"])) >= 0.5 for unit in units.values())


def test_copied_shares_are_those_of_plain_search():
    corpus = ["We the people of the United States.", "The people hold the power here today."]
    groups = ["the people of the world", "We the xyz"], ["", "it"], [corpus[0]]
    rows = originality(groups, corpus)
    for texts, row in zip(groups, rows, strict=True):
        for n in (16, 32):
            pieces = [text[i : i + n] for text in texts for i in range(len(text)) if len(text[i : i + n]) == n]
            copied = sum(any(piece in sentence for sentence in corpus) for piece in pieces)
            assert row[f"copied {n}"] == pytest.approx(copied / max(len(pieces), 1))
    assert [row["known"] for row in rows] == [6 / 8, 0, 1]  # all but "world" and "xyz"


def test_likelihood_is_not_quality():
    people = decoded("corpus", "")
    for cell in CELLS:
        beam, sampled, nucleus = (decoded(cell, name) for name in ("beam", "sampled", "nucleus"))
        assert int(beam["length"]) < int(people["length"]) / 3
        assert float(sampled["known"]) < float(nucleus["known"]) < float(beam["known"]) == 1
    said(f"of {beam['length']} characters in the median, people's have {people['length']}", FINDINGS)  # the LSTM's
    said(f"({beam['length']} characters in the median, people {people['length']})", README)
    said(f"({sampled['known']} known, of people's {people['known']})", FINDINGS)
    said(f"share ({nucleus['known']})", FINDINGS)
    shares = (f"{float(of['known']):.0%}".replace("%", " %") for of in (nucleus, people))
    said("{} of the words are known, of people's {}".format(*shares), README)
    times = float(beam["copied 16"]) / float(nucleus["copied 16"])
    said(f"copies {times:.0f} times as much as the nucleus", FINDINGS)


def test_the_likeliest_sentences_are_those_that_exact_search_proves():
    shown = table(FINDINGS, "start", "the likeliest sentence, proved")
    assert len(shown) == 6 and sum(row["found by a beam of"] == "5" for row in shown) == 1
    for row in shown:
        found = here("generate.py", "--checkpoint", REFERENCE / "lstm", "--exact", "--start", f"{row['start']} ")
        facts = f"  {row['the likeliest sentence, proved']}\n    {row['nats']} nats,"
        width = row["found by a beam of"]
        finds = "a beam of 5 finds it" if width == "5" else f"one of {width} finds it"
        assert facts in found.stdout and "proved: " in found.stdout and finds in found.stdout, found.stdout


def test_length_penalties_write_what_is_said():
    for row in table(FINDINGS, "beam", "A = 0"):
        for penalty in ("0", "0.6", "1"):
            options = ("--beam", row["beam"], "--length-penalty", penalty, "--start", "They ", "--plain")
            found = here("generate.py", "--checkpoint", REFERENCE / "lstm", *options)
            assert found.stdout.strip() == row[f"A = {penalty}"]


def test_the_session_of_the_readme_is_what_the_commands_print(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"    \$ python generate\.py (.*)\n((?:    .*\n)+)", README + FINDINGS)
    assert len(blocks) == 3
    for arguments, shown in blocks:
        found = here("generate.py", *shlex.split(arguments))
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
