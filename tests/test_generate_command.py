"""generate.py as a user runs it."""

import re

import pytest
from conftest import command, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from generate import generate, generate_exact, main, score, trace
from textloader import EOS_IX, run_main
from tp5 import CELLS, load_model

FACTS = r"^    (-[\d.]+) nats,.* bits per character, (?:ended|cut at maxlen)(.*)$"


def checked(output: str) -> str:
    """`output`, which has nothing in it that a terminal would obey or a reader would stumble over."""
    assert all(c.isprintable() or c == "\n" for c in output)
    assert "<EOS>" not in output and "<PAD>" not in output
    return output


@pytest.fixture
def written(runs, monkeypatch, capsys):
    """What `main` prints with these options: the command line without the seconds that a process takes to start."""

    def run(*options, model="lstm") -> str:
        arguments = ["generate.py", "--checkpoint", runs / model / "best.pt", *options]
        monkeypatch.setattr("sys.argv", [str(a) for a in arguments])
        main()
        return checked(capsys.readouterr().out)

    return run


def parts(runs, model="lstm"):
    loaded = load_model(runs / model / "best.pt")
    return loaded.rnn, loaded.emb, loaded.decoder, EOS_IX


@pytest.mark.parametrize(
    ("options", "model", "count"),
    [
        (["--maxlen", "30"], "rnn", 12),
        (["--greedy"], "gru", 1),
        (["--sample", "-n", "2"], "lstm", 2),
        (["--temperature", "0"], "rnn", 1),
        (["--temperature", "0.5", "--top-k", "3", "--nucleus", "0.9"], "gru", 1),
        (["--beam", "5"], "lstm", 1),
        (["--beam", "120", "-n", "3", "--maxlen", "8"], "rnn", 3),
        (["--beam", "5", "--nucleus", "0.9", "--start", "Our "], "gru", 1),
        (["--beam", "4", "--sample", "--nucleus", "0.9"], "lstm", 4),
        (["--exact", "-n", "2", "--maxlen", "4"], "gru", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sentences_come_with_scores(runs, options, model, count, tmp_path):
    result = command("generate.py", "--checkpoint", runs / model / "best.pt", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    output = checked(result.stdout)
    assert output.startswith(f"{runs / model / 'best.pt'}: {model}")
    assert len(re.findall(FACTS, output, re.M)) == count
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", CELLS)
def test_printed_scores_are_those_of_a_full_pass(runs, model, written):
    output = written("--beam", "9", "-n", "3", "--start", "Our ", "--maxlen", "40", model=model)
    sentences = re.findall(r"^  Our (.*?)( …)?\n    (-[\d.]+) nats", output, re.M)
    assert len(sentences) == 3
    for text, cut, log_prob in sentences:
        expected = score(*parts(runs, model), text, "Our ", ended=not cut)
        assert float(log_prob) == pytest.approx(expected, abs=0.006)


def test_exact_search_says_what_it_took(runs, written):
    output = written("--exact", "--maxlen", "5", "--min-length", "2", "--beam", "1")
    [best] = generate_exact(*parts(runs), "", 5, min_length=2)
    assert f"  {best.text}\n" in output and "proved optimal" in output
    assert re.search(r"[\d,]+ prefixes expanded in [\d.]+ s$", output, re.M)
    assert re.search(r"a beam of 1 (keeps it to the end|loses it at step \d+, where .* has rank \d+);", output)
    assert re.search(r"the narrowest of 1, 2, 4, … that finds it: \d+$", output, re.M)


def test_exact_search_out_of_budget_says_how_far_it_may_be(written):
    output = written("--exact", "--min-length", "30", "--budget", "20")
    assert re.search(r"no sentence that ends is above -[\d.]+ nats|at most [\d.]+ nats from the optimum", output)
    assert "20 prefixes expanded" in output and "proved" not in output


def test_stochastic_beam_prints_different_sentences(written):
    output = written("--beam", "6", "--sample", "--maxlen", "20")
    sentences = re.findall(r"^  (.*)\n    -", output, re.M)
    assert len(sentences) == len(set(sentences)) == 6
    assert "optim" not in output
    assert output == written("--beam", "6", "--sample", "--maxlen", "20")
    assert output != written("--beam", "6", "--sample", "--maxlen", "20", "--seed", "1")


def test_streamed_is_what_is_not_streamed(written):
    for options in (["--greedy"], ["--sample", "-n", "3"]):
        options += ["--start", "We ", "--maxlen", "30"]
        assert written(*options, "--stream") == written(*options)


def test_trace_has_a_line_for_each_symbol(runs, written):
    output = written("--greedy", "--maxlen", "12", "--trace", "--start", "We ")
    best = generate(*parts(runs), "We ", 12)
    rows = re.findall(r"^    (.{6})  +([\d.]+)  +(\d+)  (yes|no) \((\d+)\) +([\d.]+)$", output, re.M)
    expected = trace(*parts(runs), best.text, "We ", ended=best.ended)
    assert [row[0][:3].rstrip() or " " for row in rows] == [c.symbol or "end" for c in expected]
    for row, choice in zip(rows, expected, strict=True):
        assert float(row[1]) == pytest.approx(choice.prob, abs=1e-4) and int(row[2]) == choice.rank == 1
        assert (row[3] == "yes", int(row[4])) == (choice.in_nucleus, choice.nucleus_size)


def test_same_seed_same_sentences(written):
    first, again, other = (written("--sample", "--seed", seed) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--beam", "0"], ["--beam", "at least 1"]),
        (["--nucleus", "1.1"], ["--nucleus", "at most 1"]),
        (["--nucleus", "0"], ["--nucleus", "above 0"]),
        (["--top-k", "0"], ["--top-k", "at least 1"]),
        (["--temperature", "-1"], ["--temperature", "at least 0"]),
        (["--maxlen", "0"], ["--maxlen"]),
        (["--budget", "0"], ["--budget"]),
        (["--beam", "3", "--budget", "5"], ["--budget", "--exact"]),
        (["--exact", "--maxlen", "100000000000"], ["--maxlen", "at most"]),
        (["--beam", "2", "-n", "3"], ["--beam 3"]),
        (["--greedy", "--sample"], ["--greedy"]),
        (["--greedy", "-n", "2"], ["-n"]),
        (["--exact", "--sample"], ["--exact"]),
        (["--beam", "3", "--temperature", "0"], ["--greedy"]),
        (["--temperature", "0", "-n", "3"], ["-n"]),
        (["--temperature", "0", "--nucleus", "0.5"], ["--greedy"]),
        (["--sample", "--min-length", "3"], ["--min-length"]),
        (["--beam", "3", "--stream"], ["--stream"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_options(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert all(word in said for word in words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--start", "中\x1b[31m"], ["alphabet", "中"]),
        (["--beam", "3", "--min-length", "9", "--maxlen", "8"], ["--min-length 9", "--maxlen 8"]),
        (["--beam", "3", "--temperature", "0"], ["--greedy"]),
        (["--temperature", "0", "-n", "3"], ["-n"]),
        (["--temperature", "0", "--nucleus", "0.5"], ["--greedy"]),
        (["--checkpoint", "missing.pt"], ["cannot read"]),
    ],
)
def test_refused_in_one_line(runs, options, words):
    refused(command("generate.py", "--checkpoint", runs / "rnn" / "best.pt", *options), *words)


VALUES = st.sampled_from(
    ["", "0", "1", "3", "-1", "0.5", "1.5", "nan", "inf", "1e400", "٣", "中\x1b[31m", "Our ", "--"]
)
NAMES = ("beam", "nucleus", "temperature", "top-k", "min-length", "budget", "n", "seed", "start", "wrong")
FLAGS = ("--greedy", "--sample", "--exact", "--trace", "--stream")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=4), st.lists(st.sampled_from(FLAGS), max_size=2))
def test_any_options_work_or_are_refused_in_one_line(runs, monkeypatch, capsys, named, flags):
    given_options = [f"{'-n' if name == 'n' else '--' + name}={value}" for name, value in named]
    few = ["--maxlen", "6", "--checkpoint", str(runs / "rnn" / "best.pt")]
    monkeypatch.setattr("sys.argv", ["generate.py", *few, *given_options, *flags])
    try:
        run_main(main)
    except SystemExit as stopped:
        assert stopped.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and all(c.isprintable() or c == "\n" for c in said)
    else:
        checked(capsys.readouterr().out)
