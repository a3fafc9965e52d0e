"""What a search shows: trees, surprise, length penalty, and exact search that is not silent."""

import io
import math
import re
from contextlib import redirect_stderr, suppress
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from unicodedata import east_asian_width
from unittest.mock import patch

import pytest
import torch
from conftest import here, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import MAXLEN, enumerated, every_cell, small_search, table_model, toy, toys

import generate as lab
from generate import END, beam_steps, command_parser, generate_beam, generate_exact, parts, score, tree_lines
from textloader import EOS_IX, LETTRES
from tp5 import CELLS, load


# ------------------------------------------------------------------------------- length penalty
def penalised(truth, penalty):
    """(score, text) of enumerated sentences as Wu et al. rank them, best first; EOS is counted."""
    return sorted(((p / ((5 + len(text) + 1) / 6) ** penalty, text) for p, text in truth), reverse=True)


@every_cell
@pytest.mark.parametrize("penalty", [0.6, 1.0, 4.0])
def test_wide_beam_ranks_all_sentences_by_the_penalised_score(cell, library, penalty):
    for start, alpha, min_length in (("", 1.0, 0), ("ab", 0.8, 0), ("c", 1.0, 3)):
        model = toy(cell, library, seed=len(start))
        truth = dict(map(reversed, enumerated(model, start, alpha, min_length)))
        options = {"alpha": alpha, "min_length": min_length, "length_penalty": penalty}
        found = generate_beam(*model, EOS_IX, 400, start, MAXLEN, **options)
        ended = [h for h in found if h.ended]
        ranked = penalised([(p, text) for text, p in truth.items()], penalty)
        assert [h.text for h in ended] == [text for _, text in ranked]
        assert [h.score for h in ended] == pytest.approx([total for total, _ in ranked])
        for h in ended:
            assert h.gap == 0 and h.log_prob == pytest.approx(score(*model, EOS_IX, h.text, start))


@settings(max_examples=150)
@given(
    toys, st.integers(1, 20), st.integers(1, 5), st.sampled_from((1.0, 0.8, 0.6)), st.integers(0, 3), st.floats(0, 10)
)
def test_no_sentence_beats_score_and_gap(model, k, n, alpha, min_length, penalty):
    truth = penalised(enumerated(model, "", alpha, min_length), penalty)
    options = {"alpha": alpha, "min_length": min_length, "length_penalty": penalty}
    found = generate_beam(*model, EOS_IX, k, "", MAXLEN, n=n, **options)
    returned = {h.text for h in found if h.ended}
    best_other = max((total for total, text in truth if text not in returned), default=-math.inf)
    for h in found:
        assert h.gap >= 0 and best_other <= h.score + h.gap + 1e-9
    if found and found[0].ended and found[0].gap == 0:
        assert found[0].score == pytest.approx(truth[0][0])
    ended = [h.score for h in found if h.ended]
    assert ended == sorted(ended, reverse=True)


@given(toys, st.integers(1, 20), st.sampled_from((1.0, 0.7)))
@settings(max_examples=30)
def test_no_penalty_changes_nothing(model, k, alpha):
    plain = generate_beam(*model, EOS_IX, k, "a", MAXLEN, n=2, alpha=alpha)
    assert generate_beam(*model, EOS_IX, k, "a", MAXLEN, n=2, alpha=alpha, length_penalty=0.0) == plain


def test_a_penalty_keeps_what_could_still_overtake():
    """The likeliest sentence is empty (0.5); at A = 3 the longest wins, although an ended one leads long."""
    model = table_model([0.5, 0.5], [1e-9, 1.0])
    with torch.no_grad():
        model[2].weight[EOS_IX, 2] = math.log(0.3)  # after a: EOS 0.3 / 1.3
    [first] = generate_beam(*model, EOS_IX, 2, "", 9, n=1)
    [longer] = generate_beam(*model, EOS_IX, 2, "", 9, n=1, length_penalty=3.0)
    assert first.text == "" and len(longer.text) > 0 and longer.score > first.log_prob
    assert longer.score == pytest.approx(longer.log_prob / ((5 + len(longer.text) + 1) / 6) ** 3)


def test_exact_search_refuses_a_length_penalty():
    """It proves the likeliest sentence, not the best one by that score."""
    with pytest.raises(TypeError, match="length_penalty"):
        generate_exact(*toy("gru", "ours"), EOS_IX, length_penalty=1.0)


# ----------------------------------------------------------------------------------------- trees
BRANCH = re.compile(r"^ *(-?\d+\.\d\d)  ((?:[│ ]  )*)(?:[├└]─ )?(\S*)(?:  (\S.*))?$")


def read_back(lines):
    """The prefixes that a tree shows, as (prefix, score or None inside a branch, mark), by its rails."""
    shown, path = [], []
    for line in lines:
        total, rails, label, mark = BRANCH.match(line).groups()
        depth = len(rails) // 3 + ("─" in line)
        path[depth:] = [label]
        whole, before = "".join(path[: depth + 1]), len("".join(path[:depth]))
        inside = [(whole[:i], None, None) for i in range(before + 1, len(whole))]
        shown += [*inside, (whole, float(total), mark)]
    return shown


def kept_by(model, k, **options):
    """What a beam kept: prefix → score, with END for EOS."""
    steps = [kept for kept, _ in beam_steps((*model, EOS_IX), k, "", 12, **options)]
    return {"": 0.0} | {prefix: h.score for kept in steps for prefix, h in kept.items()}


@settings(max_examples=80)
@given(toys, st.integers(1, 8), st.integers(1, 3), st.sampled_from((0.0, 1.0)))
def test_every_kept_prefix_stands_once_in_the_tree(model, k, n, penalty):
    kept = kept_by(model, k, n=min(n, k), length_penalty=penalty)
    returned = generate_beam(*model, EOS_IX, k, "", 12, n=n, length_penalty=penalty)
    marks = {h.text + END * h.ended: "◀ it" for h in returned}
    shown = read_back(tree_lines(kept, marks, "c"))
    shown = [(prefix.replace("■", END), total, mark) for prefix, total, mark in shown]
    assert sorted(prefix for prefix, _, _ in shown) == sorted([END, *(END + "c" + prefix for prefix in kept)])
    for prefix, total, mark in shown:
        assert total is None or total == pytest.approx(kept[prefix[2:]], abs=0.0051)
        assert (mark == "◀ it") == (prefix[2:] in marks)


def test_a_deep_tree_stays_narrow_and_loses_nothing():
    """A prefix is a symbol more than its parent: so there are as many symbols as prefixes."""
    deep = {"a" * i: -float(i) for i in range(99)} | {"a" * i + "b": -i - 0.5 for i in range(99)}
    lines = tree_lines(deep | {"a": -1.0, "ac": -2.0, "ac ": -3.0}, {"ac ": "◀"}, "")
    assert max(map(len, lines)) <= 70
    assert [sum(line.count(char) for line in lines) for char in "abc·"] == [98, 99, 1, 1]


def test_tree_of_the_table_by_hand(capsys):
    """A beam of one writes aa; the likeliest sentence is b: let go at once, for a had 0.6 and b 0.4."""
    rnn, emb, decoder = table_model([0.0, 0.6, 0.4], [0.2, 0.5, 0.3], [0.9, 0.05, 0.05])
    options = command_parser().parse_args(["--exact", "1", "--tree", "--maxlen", "2"])
    lab.write(SimpleNamespace(rnn=rnn, emb=emb, decoder=decoder), options)
    lines = capsys.readouterr().out.splitlines()
    tree = lines.index("  What a beam of 1 kept, and its score; · is a space, ■ EOS, ⏎ a line end.") + 1
    assert lines[tree:] == [
        "    0.00  ■",
        "   -1.20  ├─ aa  ◀ the beam's sentence",
        "   -0.92  └─ b  ✗ let go: the 1 that were kept had -0.51 or more",
        "   -1.02     └─ ■  ★ the likeliest sentence",
    ]


def test_tree_of_a_beam_that_dies_out(capsys):
    """After a nothing but EOS is left, too early for --min-length 2: a beam of one keeps nothing."""
    rnn, emb, decoder = table_model([0.0, 0.6, 0.4], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5])
    search = ["--exact", "1", "--tree", "--maxlen", "4", "--min-length", "2", "--nucleus", "0.9"]
    lab.write(SimpleNamespace(rnn=rnn, emb=emb, decoder=decoder), command_parser().parse_args(search))
    output = capsys.readouterr().out
    assert "   -0.51  ├─ a\n" in output and "★ the likeliest sentence" in output
    assert "b  ✗ let go: the 1 that were kept had -0.51 or more" in output


def test_spaces_and_line_ends_are_seen():
    lines = tree_lines({"": 0.0, "a": -1.0, "a ": -2.0, "a \n": -3.0, "a \n\x1b": -4.0}, {}, "b ")
    assert lines == ["   -4.00  ■b·a·⏎?"]


@pytest.mark.parametrize("options", ["--beam 4 --tree", "--exact 2 --tree --nucleus 0.95", "--beam 3 -n 2 --tree"])
@pytest.mark.parametrize("cell", CELLS)
def test_trees_of_trained_models(runs, cell, options):
    given = ("--start", "They ", "--maxlen", "40", *options.split())
    result = here("generate.py", "--checkpoint", runs / cell, *given)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines[1:])) <= 110 and "    0.00  ■They·" in result.stdout
    tree = lines[next(i for i, line in enumerate(lines) if "What a beam" in line) :]
    assert max(map(len, tree)) <= 110
    marked = sum(" ◀ " in line or " ★ " in line for line in tree)
    assert marked == (2 if "✗" in result.stdout else 2 if "-n 2" in options else 1)


# -------------------------------------------------------------------------------------- surprise
@pytest.mark.parametrize("start", ["", "They saw "])
@pytest.mark.parametrize("text", ["", "We met 2 men.", "men, " * 40 + "Qx~"])
def test_score_shows_the_bits_of_each_symbol(runs, start, text):
    result = here("generate.py", "--checkpoint", runs / "gru", "--score", text, "--start", start)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    _, facts, *pairs = result.stdout.splitlines()
    model = parts(load(runs / "gru" / "best.pt").model)
    total = score(*model, text, start)
    nats, bits = re.match(r"  (-[\d.]+) nats, ([\d.]+) bits per character", facts).groups()
    assert float(nats) == pytest.approx(total, abs=0.006)
    assert float(bits) == pytest.approx(-total / math.log(2) / (len(text) + 1), abs=0.006)
    assert max(map(len, [facts, *pairs])) <= 80
    assert "".join(line[2:] for line in pairs[::2]) == start + text + "■"
    digits = "".join(line[2:] for line in pairs[1::2])
    totals = [score(*model, text[:i], start, ended=False) for i in range(len(text) + 1)] + [total]
    expected = [(before - after) / math.log(2) for before, after in pairwise(totals)]
    assert digits[: len(start)].strip() == "" and len(digits) == len(start) + len(expected)
    for digit, surprise in zip(digits[len(start) :], expected, strict=True):
        assert abs(int(digit) - min(9, surprise)) <= 0.501


def test_digits_stand_below_wide_characters(capsys):
    """A wide character takes two columns of a terminal, and so does its digit."""
    torch.manual_seed(0)
    rnn, emb, decoder = CELLS["rnn"](3, 4), nn.Embedding(len(LETTRES) + 4, 3), nn.Linear(4, len(LETTRES) + 4)
    emb.lettres = LETTRES + "中文"
    options = command_parser().parse_args(["--score", "中a文" * 20, "--start", "文b"])
    lab.show_score(SimpleNamespace(rnn=rnn, emb=emb, decoder=decoder), options)
    _, *lines = capsys.readouterr().out.splitlines()
    assert "".join(line[2:] for line in lines[::2]) == "文b" + "中a文" * 20 + "■"
    for shown, digits in zip(lines[::2], lines[1::2], strict=True):
        assert sum(1 + (east_asian_width(char) in "WF") for char in shown) == len(digits) <= 80
    assert re.fullmatch(r"     \d \d\d .*", lines[1])


def test_line_ends_stay_and_are_indented(capsys):
    h = lab.Hypothesis(text="b\n\n  c", log_prob=-2.0, score=-2.0)
    lab.show(h, command_parser().parse_args(["--greedy", "--start", "a\n"]))
    assert capsys.readouterr().out.startswith("  a\n  b\n  \n    c\n    -2.00 nats")


def test_a_text_to_score_is_refused_as_a_start_text_is(runs):
    refused(here("generate.py", "--checkpoint", runs / "rnn", "--score", "中"), "alphabet", "中")


# ---------------------------------------------------------------------------------- exact search
HARD = ("--exact", "--min-length", "30")  # takes many batches


def interrupted(calls: int):
    """Exact search that is interrupted by Ctrl-C when it keeps prefixes for later the time number `calls`."""
    real, made = lab.heapq.heappush, []

    def heappush(*arguments):
        made.append(arguments)
        if len(made) == calls:
            raise KeyboardInterrupt
        return real(*arguments)

    return patch.object(lab.heapq, "heappush", heappush)


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_ctrl_c_ends_exact_search_with_what_is_known(runs, calls):
    with interrupted(calls):
        result = here("generate.py", "--checkpoint", runs / "lstm", *HARD)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert re.search(r"gave up after [\d,]+ prefixes \(.*Ctrl-C\)\n", result.stdout)
    assert re.search(r"another may be up to [\d.]+ likelier by its score", result.stdout)
    assert "first, by beam search: We " in result.stdout and "proved" not in result.stdout


@settings(max_examples=40)
@given(toys, st.integers(1, 6), st.integers(1, 4))
def test_an_interrupted_search_keeps_a_true_bound(model, calls, batch):
    """The last step that was handed on bounds all sentences, whichever call was interrupted."""
    best, known = enumerated(model)[0][0], []
    with small_search(batch), interrupted(calls), suppress(KeyboardInterrupt):
        known.extend(lab.exact_steps((*model, EOS_IX), "", MAXLEN))
    found, bound, _ = known[-1]
    assert best <= max(bound, found.score if found.ended else -math.inf) + 1e-9


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(capsys):
    options = command_parser().parse_args(["--exact", "--budget", "500"])
    best = lab.Hypothesis(text="Yes.", score=-7.25, ended=True)
    steps = [(best, 0.0, 0), (best, -2.5, 97), (best, -3.125, 400), (best, -7.5, 450)]
    with redirect_stderr(Terminal()) as terminal, patch.object(lab, "tqdm", partial(lab.tqdm, mininterval=0)):
        assert list(lab.follow(options, iter(steps))) == steps
    assert "best -7.25, bound -3.12" in terminal.getvalue() and "400/500" in terminal.getvalue()
    assert capsys.readouterr().out == "  first, by beam search: Yes. (-7.25 nats)\n"


# -------------------------------------------------------------------------------------- plain
@pytest.mark.parametrize("options", ["--greedy", "--sample -n 3", "--beam 5 -n 2", "--exact", "--exact --budget 9"])
def test_plain_prints_the_sentences_alone(runs, options):
    given = ("--checkpoint", runs / "gru", "--start", "We ", "--maxlen", "40", *options.split())
    full, plain = here("generate.py", *given).stdout, here("generate.py", *given, "--plain")
    sentences = re.findall(r"^  (We .*?)\n    -", full, re.M)
    assert plain.returncode == 0 and plain.stdout.splitlines() == sentences and sentences
    assert ("by beam search" in plain.stderr) == ("--exact" in options)
