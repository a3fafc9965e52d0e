"""generate.py as a user runs it: it prints what the decoders return; mistakes are told in one line."""

import math
import re
import shutil
import sys

import pytest
from conftest import command, here, refused
from hypothesis import given, settings
from hypothesis import strategies as st

import textloader
from generate import generate_exact, parts, score, search_error
from textloader import find_checkpoint
from tp5 import load

FACTS = (
    r"^  (.*?)\n    (-[\d.]+) nats,(?: (-[\d.]+) with the options,)? ([\d.]+) bits per character, "
    r"([^\n]*(?:\n    (?:another|proved)[^\n]*)?)$"
)


@pytest.fixture
def written(runs):
    """What the command prints with these options: nothing that a terminal would obey."""

    def run(*options, model="lstm") -> str:
        result = here("generate.py", "--checkpoint", runs / model, *options)
        assert result.returncode == 0 and result.stderr == "", result.stderr
        assert all(c.isprintable() or c == "\n" for c in result.stdout)
        return result.stdout

    return run


def test_every_decoder_side_by_side(runs, tmp_path):
    """Without a decoder: greedy, three sampled, two beams, exact. Nothing is left in the folder."""
    result = command("generate.py", "--checkpoint", runs / "rnn" / "best.pt", "--start", "We ", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.startswith(f"{runs / 'rnn' / 'best.pt'}: rnn")
    found = re.findall(FACTS, result.stdout, re.M)
    assert len(found) == 7 and all(text.startswith("We ") for text, *_ in found)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "model", "count"),
    [
        (["--greedy"], "gru", 1),
        (["--sample", "--temperature", "0"], "rnn", 1),
        (["--sample", "-n", "2"], "lstm", 2),
        (["--sample", "--temperature", "0.5", "--top-k", "3", "--nucleus", "0.9"], "gru", 1),
        (["--beam", "120", "-n", "3", "--maxlen", "8", "--min-length", "4"], "rnn", 3),
        (["--beam", "5", "--nucleus", "0.9", "-n", "2"], "lstm", 2),
        (["--exact", "2"], "gru", 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_printed_scores_are_those_of_a_full_pass(runs, options, model, count, written):
    """The model's log-probability, narrowed or not, and bits; a certificate only of what was searched."""
    found = re.findall(FACTS, written("--start", "They ", *options, model=model), re.M)
    assert len(found) == count
    for sentence, log_prob, narrowed, bits, rest in found:
        cut = rest.startswith("cut at --maxlen")
        text = sentence.removeprefix("They ")
        expected = score(*parts(load(runs / model / "best.pt").model), text, "They ", ended=not cut)
        assert float(log_prob) == pytest.approx(expected, abs=0.006)
        assert float(bits) == pytest.approx(-expected / math.log(2) / (len(text) + (not cut)), abs=0.006)
        assert narrowed == "" or float(narrowed) > float(log_prob)
        assert cut or rest.startswith("ended")
        assert ("likelier" in rest) == (options[0] in ("--beam", "--exact"))


def test_the_users_own_run_speaks_first(runs, tmp_path, monkeypatch):
    """Before the reference, even one touched later; without any, the command says what to do."""
    monkeypatch.setattr(textloader, "RUNS", tmp_path)
    refused(here("generate.py"), "no best.pt", "tp5.py --model lstm")
    shutil.copytree(runs / "lstm", tmp_path / "reference" / "lstm")
    assert find_checkpoint(None, "best.pt") == tmp_path / "reference" / "lstm" / "best.pt"
    (tmp_path / "compare" / "rnn").mkdir(parents=True)
    own = shutil.copy2(runs / "rnn" / "best.pt", tmp_path / "compare" / "rnn" / "best.pt")
    (tmp_path / "reference" / "lstm" / "best.pt").touch()  # later than the user's own
    assert find_checkpoint(None, "best.pt") == own
    assert here("generate.py", "--greedy").stdout.startswith(f"{own}: rnn")


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_what_is_no_run_is_not_the_newest(runs, tmp_path, monkeypatch):
    """A folder named best.pt; a run behind a symbolic link is one."""
    monkeypatch.setattr(textloader, "RUNS", tmp_path / "runs")
    (tmp_path / "runs" / "later" / "best.pt").mkdir(parents=True)
    (tmp_path / "runs" / "linked").symlink_to(runs / "rnn")
    assert find_checkpoint(None, "best.pt") == tmp_path / "runs" / "linked" / "best.pt"


def test_same_seed_same_sentences(written):
    first, again, other = (written("--sample", "-n", "3", "--seed", seed) for seed in (3, 3, 4))
    assert first == again
    assert first.splitlines()[1:] != other.splitlines()[1:]
    assert written("--sample", "--temperature", "0").splitlines()[3:] == written("--greedy").splitlines()[3:]


@pytest.mark.parametrize("k", [1, 3, 50])
def test_exact_search_says_where_a_beam_loses(runs, written, k):
    arguments = parts(load(runs / "lstm" / "best.pt").model)
    output = written("--exact", k, "--maxlen", "40", "--start", "They saw ")
    [best] = generate_exact(*arguments, "They saw ", 40)
    assert best.gap == 0 and f"  They saw {best.text}\n" in output and "proved" in output
    lost = search_error(*arguments, k, best.text, "They saw ", 40)
    assert (f"a beam of {k} finds it" in output) == (lost is None)
    if lost:
        assert re.search(rf"a beam of {k} loses it at step {lost} \(.*\); one of [0-9]+ finds it", output)


def test_a_cut_sentence_is_no_proof(written):
    """Nothing ends within five symbols of the likeliest one each: a beam's prefix is shown for what it is."""
    output = written("--exact", "--top-k", "1", "--maxlen", "5")
    assert "cut at --maxlen" in output and "proved" not in output and "a beam" not in output


def test_exact_search_out_of_budget_says_how_far_it_may_be(written):
    output = written("--exact", "--min-length", "30", "--budget", "20")
    assert re.search(r"another may be up to [\d.]+ likelier by its score", output)
    assert re.search(r"gave up after \d+ prefixes \(--budget", output)
    assert "proved" not in output and "a beam" not in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--beam 0", "--beam: from 1"),
        ("--beam 2 --length-penalty -1", "--length-penalty: from 0 to 10"),
        ("--nucleus 1.1", "--nucleus: to 1"),
        ("--nucleus nan", "--nucleus: to 1"),
        ("--top-k 0", "--top-k: from 1"),
        ("--temperature -1", "--temperature: from 0"),
        ("--exact --maxlen 100000000000", "--maxlen: 10000"),
        ("--greedy --sample", "--greedy"),
        ("--beam 2 -n 3", "-n 3 needs --beam 3"),
        ("--exact --min-length 9 --maxlen 9", "--min-length: below --maxlen"),
        ("--greedy -n 2", "--n is for --sample, --beam"),
        ("--greedy --temperature 2", "--temperature: for --sample, --beam, --exact"),
        ("--greedy --seed 3", "--seed: for --sample"),
        ("--greedy --nucleus 0.9", "--nucleus: for --sample, --beam, --exact"),
        ("--beam 3 --seed 3", "--seed: for --sample"),
        ("--exact --length-penalty 1", "--length-penalty: for --beam"),
        ("--sample --tree", "--tree: for --beam, --exact"),
        ("--sample --budget 3", "--budget: for --exact"),
        ("--score x --maxlen 3", "--maxlen: for --greedy"),
        ("--score x --plain", "--plain: for --greedy"),
        ("--score x --temperature 2", "--temperature: for --sample"),
        ("--score x --beam 2", "--beam: --score"),
        ("--beam 2 --plain --tree", "--tree: --plain"),
        ("--tree", "--tree is for --beam, --exact"),
        ("--plain", "--plain is for --greedy, --sample"),
        ("--exact --budget -1", "--budget"),
        ("--beam 3 --budget 9", "--budget: for --exact"),
        ("--sample --min-length 3", "--min-length: for --beam, --exact"),
        ("-n 2", "--n: for --sample, --beam"),
        ("--nucleus 0.9", "--nucleus: for --sample"),
    ],
)
def test_bad_options(arguments, words):
    refused(here("generate.py", *arguments.split()), *words.split(": "), code=2)


def test_mistakes_end_in_one_line(runs):
    refused(here("generate.py", "--checkpoint", "missing\x1b[31m.pt"), "no best.pt in missing?[31m.pt")
    refused(here("generate.py", "--checkpoint", "x" * 5000), "too long")
    refused(here("generate.py", "--checkpoint", __file__), "no checkpoint of this version")
    refused(here("generate.py", "--checkpoint", runs / "rnn", "--start", "中\x1b[31m"), "alphabet", "中")


NAMES = st.sampled_from(["beam", "nucleus", "temperature", "top-k", "min-length", "n", "seed", "start"])
VALUES = st.sampled_from(["", "0", "1", "3", "-1", "0.5", "nan", "1e400", "٣", "中\x1b[31m", "We "])
FLAGS = st.sampled_from(["--greedy", "--sample", "--exact"])


@settings(max_examples=60)
@given(data=st.data())
def test_any_options_work_or_are_refused(runs, data):
    named = data.draw(st.lists(st.tuples(NAMES, VALUES), max_size=4))
    options = [f"{'-n' if name == 'n' else '--' + name}={value}" for name, value in named]
    options += data.draw(st.lists(FLAGS, max_size=2))
    result = here("generate.py", "--maxlen", "6", "--checkpoint", runs / "rnn", *options)
    if result.returncode:
        refused(result, code=result.returncode)
    else:
        assert " nats, " in result.stdout and result.stderr == ""
        assert all(c.isprintable() or c == "\n" for c in result.stdout)
