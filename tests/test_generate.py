"""Questions 3, 6 and 7: every decoder, against enumeration of all sentences of a toy alphabet."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import LETTERS, MAXLEN, enumerated, every_cell, letters, small_search, table_model, toy, toys

from generate import generate, generate_beam, generate_exact, p_nucleus, score, search_error
from textloader import EOS_IX


def symbols_read(rnn):
    """A list that grows with each step of the cell, by the number of prefixes that it reads a symbol for."""
    calls = []
    if hasattr(rnn, "one_step"):
        one_step = rnn.one_step

        def counted(projected, *states):
            calls.append(len(projected))
            return one_step(projected, *states)

        rnn.one_step = counted
    else:
        rnn.register_forward_pre_hook(lambda _, inputs: calls.extend([inputs[0].shape[1]] * len(inputs[0])))
    return calls


# ------------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize(
    ("probs", "alpha", "kept"),
    [
        ([0.5, 0.25, 0.25], 0.75, [0.5, 0.25, 0]),  # mass exactly alpha adds none; ties keep their order
        ([0.4, 0.3, 0.2, 0.1], 0.7, [0.4, 0.3, 0, 0]),
        ([0.1, 0.2, 0.3, 0.4], 0.71, [0, 0.2, 0.3, 0.4]),  # the crossing symbol stays
        ([0.4, 0.3, 0.2, 0.1], 1e-9, [0.4, 0, 0, 0]),
        ([0.4, 0.3, 0.2, 0.1], 1, [0.4, 0.3, 0.2, 0.1]),
        ([1, 0, 0], 0.5, [1, 0, 0]),
        ([0.1] * 10, 0.6, [0.1] * 6 + [0] * 4),  # a mass that rounding makes 0.59999996
    ],
)
def test_nucleus_of_known_distributions(probs, alpha, kept):
    logits, expected = torch.tensor(probs).log(), torch.tensor(kept) / sum(kept)
    torch.testing.assert_close(p_nucleus(lambda h: h, alpha)(logits), expected)
    batch = torch.stack([logits, logits.flip(0)])[None]  # any leading axes, each row by itself
    torch.testing.assert_close(p_nucleus(lambda h: h, alpha)(batch)[0, 0], expected)


@settings(max_examples=200)
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=12), st.floats(0.001, 1))
def test_nucleus_is_the_smallest_set_with_the_mass(logits, alpha):
    h = torch.tensor(logits, dtype=torch.float64)
    probs, nucleus = h.softmax(-1), p_nucleus(lambda h: h, alpha)(h)
    kept = nucleus > 0
    assert torch.equal(h, torch.tensor(logits, dtype=torch.float64))
    torch.testing.assert_close(nucleus, probs * kept / probs[kept].sum())
    assert probs[kept].sum() >= alpha - 1e-9
    assert kept.sum() == 1 or alpha == 1 or probs[kept].sum() - probs[kept].min() < alpha + 1e-9
    assert kept.all() or probs[kept].min() >= probs[~kept].max()


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (dict(temperature=0.5), [4, 16, 1, 9]),  # probabilities squared
        (dict(temperature=0.5, top_k=3), [4, 16, 0, 9]),
        (dict(temperature=0.5, top_k=3, alpha=0.8), [0, 16, 0, 9]),  # of the best three, 16 + 9 are 86 %
        (dict(alpha=0.8), [2, 4, 0, 3]),
        (dict(top_k=1), [0, 1, 0, 0]),
        (dict(top_k=9), [2, 4, 1, 3]),
    ],
)
def test_temperature_then_top_k_then_nucleus(options, weights):
    probs = [0.2, 0.4, 0.1, 0.3]
    found = generate_beam(*table_model(probs), EOS_IX, 9, "", 1, **options)
    assert all(h.ended == (h.text == "") for h in found)
    narrowed = {h.text: math.exp(h.score) for h in found}
    expected = {text: w / sum(weights) for text, w in zip(("", *LETTERS), weights, strict=True) if w}
    assert narrowed == pytest.approx(expected, rel=1e-5)
    unchanged = dict(zip(("", *LETTERS), probs, strict=True))
    assert all(math.exp(h.log_prob) == pytest.approx(unchanged[h.text], rel=1e-5) for h in found)


# --------------------------------------------------------------------------------- symbol by symbol


@every_cell
def test_greedy_is_a_beam_of_one(cell, library):
    """Of the model, against prefixes run anew each time; in a nucleus or the top k, against the beam."""
    for seed in range(5):
        rnn, emb, decoder = model = toy(cell, library, seed=seed)
        codes, ended = [], False
        while len(codes) < 6 and not ended:
            logits = decoder(rnn(emb(torch.tensor([EOS_IX, *codes]))[:, None])[0][-1, 0])
            symbol = 1 + int(logits[1:].argmax())
            ended = symbol == EOS_IX
            codes += [] if ended else [symbol]
        greedy = generate(*model, EOS_IX, maxlen=6)
        assert (greedy.text, greedy.ended) == (letters(codes), ended)
        for narrowing in ({}, dict(alpha=0.6), dict(top_k=2), dict(alpha=0.8, top_k=3)):
            greedy = generate(*model, EOS_IX, "", 6, **narrowing)
            [beam] = generate_beam(*model, EOS_IX, 1, "", 6, **narrowing)
            assert (greedy.text, greedy.ended, greedy.gap) == (beam.text, beam.ended, None)
            assert greedy.log_prob == pytest.approx(beam.log_prob)
            assert greedy.score == pytest.approx(beam.score)


@every_cell
def test_every_score_is_that_of_a_full_pass(cell, library):
    model, generator = toy(cell, library), torch.Generator().manual_seed(0)
    for log_prob, text in enumerated(model, "ab"):
        assert score(*model, EOS_IX, text, "ab") == pytest.approx(log_prob)
    for start, hypotheses in (
        ("ab", generate_beam(*model, EOS_IX, 99, "ab", 3)),
        ("", generate_beam(*model, EOS_IX, 9, "", 7, alpha=0.7)),
        ("c", [generate(*model, EOS_IX, "c", 2, temperature=1.5, generator=generator) for _ in range(9)]),
    ):
        for h in hypotheses:
            assert h.log_prob == pytest.approx(score(*model, EOS_IX, h.text, start, ended=h.ended))


def test_sampling_follows_the_model():
    """Pearson's chi-square over the likeliest sentences; a fair sampler fails one seed in a thousand."""
    model, generator, draws = toy("gru", "ours", seed=1), torch.Generator().manual_seed(0), 2000
    drawn = [generate(*model, EOS_IX, "", MAXLEN, temperature=1, generator=generator) for _ in range(draws)]
    found, truth = Counter(h.text for h in drawn if h.ended), enumerated(model)[:8]
    expected, observed = [draws * math.exp(p) for p, _ in truth], [found[text] for _, text in truth]
    expected.append(draws - sum(expected))
    observed.append(draws - sum(observed))
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert statistic < 26.1  # 8 degrees of freedom


def test_same_seed_same_sentence():
    """And torch's own random state is not touched."""
    model, before = toy("lstm", "ours"), torch.get_rng_state()
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 7, 8)]
    texts = [[generate(*model, EOS_IX, temperature=1, generator=g) for _ in range(5)] for g in generators]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_the_ends_of_the_options():
    """The coldest and the narrowest are greedy, the widest are the model; nothing overflows."""
    _, _, decoder = model = toy("lstm", "ours", seed=3)

    def drawn(temperature=1.0, **options):
        generator = torch.Generator().manual_seed(5)
        return generate(*model, EOS_IX, "", 9, temperature=temperature, generator=generator, **options)

    assert drawn(alpha=1.0) == drawn() and drawn(top_k=99).text == drawn().text
    for factor in (1, 1700):
        with torch.no_grad():
            decoder.weight *= factor
        greedy = generate(*model, EOS_IX, "", 9)
        for narrow in (dict(alpha=1e-9), dict(top_k=1), dict(temperature=1e-30), dict(temperature=1e-300)):
            found = drawn(**narrow)
            assert (found.text, found.ended) == (greedy.text, greedy.ended)
            assert found.log_prob == pytest.approx(greedy.log_prob)
            assert found.score == pytest.approx(0)


# -------------------------------------------------------------------------------------- beam search


@every_cell
@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_wide_beam_finds_the_enumerated_order(cell, library, alpha):
    for start, min_length in (("", 0), ("ab", 0), ("c", 3)):
        model = toy(cell, library, seed=len(start))
        truth = enumerated(model, start, alpha, min_length)
        found = generate_beam(*model, EOS_IX, 400, start, MAXLEN, alpha=alpha, min_length=min_length)
        ended = [h for h in found if h.ended]
        assert [h.text for h in ended] == [text for _, text in truth]
        assert [h.score for h in ended] == pytest.approx([log_prob for log_prob, _ in truth])
        assert all(h.gap == 0 for h in ended)
        assert all(len(h.text) == MAXLEN for h in found[len(ended) :])  # the cut ones come last


@settings(max_examples=80)
@given(toys, st.integers(1, 20), st.integers(1, 20), st.sampled_from((1.0, 0.8, 0.6)), st.integers(0, 3))
def test_certificate_is_never_wrong(model, k, n, alpha, min_length):
    """Whatever the search did not return is at most `gap` better than each sentence that it did return."""
    truth = enumerated(model, "", alpha, min_length)
    found = generate_beam(*model, EOS_IX, k, "", MAXLEN, n=min(n, k), alpha=alpha, min_length=min_length)
    returned = {h.text for h in found if h.ended}
    best_other = max((p for p, text in truth if text not in returned), default=-math.inf)
    assert len(found) <= min(n, k) and (found or (min_length and alpha < 1))  # nothing goes on but EOS
    for h in found:
        assert h.gap >= 0 and best_other <= h.score + h.gap + 1e-9
    if found and found[0].ended and found[0].gap == 0:
        assert found[0].text == truth[0][1]
    for kind in (True, False):
        scores = [h.score for h in found if h.ended == kind]
        assert scores == sorted(scores, reverse=True)


@every_cell
@pytest.mark.parametrize("k", [0, 1, 3])
def test_only_the_state_advances(cell, library, k):
    """The start text is read once, then one symbol per live prefix and step: no prefix is run again."""
    rnn, _, decoder = model = toy(cell, library)
    with torch.no_grad():
        decoder.bias[EOS_IX] = -1e9  # never ends
    arguments, calls = (*model, EOS_IX), symbols_read(rnn)
    found = generate_beam(*arguments, k, "abc", 10) if k else [generate(*arguments, "abc", 10, temperature=1)]
    assert calls == [1, 1, 1, 1] + [len(found)] * 9
    assert all(len(h.text) == 10 and not h.ended for h in found) and len(found) == max(k, 1)


@every_cell
def test_ended_sentences_are_not_extended(cell, library):
    """They cost no further reading, and the search stops with the sentences wanted."""
    model = toy(cell, library)
    calls = symbols_read(model[0])
    whole = generate_beam(*model, EOS_IX, 40, "", 12)
    reading, calls[:] = list(calls), []
    [best] = generate_beam(*model, EOS_IX, 40, "", 12, n=1)
    assert (best.text, best.ended) == (whole[0].text, whole[0].ended)
    assert len(calls) < len(reading) and max(reading) <= 40 and reading[-1] < 40


@pytest.mark.parametrize("base", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_cell_with_another_one_step_is_called_like_torchs(base):
    """The handout's own `one_step(x, h)` is not ours: without `project`, it is not used."""
    cell = type("Students", (base,), {"one_step": lambda self, x, h: 1 / 0})(3, 4).double()
    assert generate_beam(cell, nn.Embedding(5, 3).double(), nn.Linear(4, 5).double(), EOS_IX, 3, "ab", 4)


# ------------------------------------------------------------------------------------- exact search


@settings(max_examples=60)
@given(toys, st.sampled_from(("", "b")), st.sampled_from((1.0, 0.8)), st.integers(0, 3), st.integers(1, 9))
def test_exact_search_finds_the_likeliest(model, start, alpha, min_length, batch):
    truth = enumerated(model, start, alpha, min_length)
    with small_search(batch):
        found = generate_exact(*model, EOS_IX, start, MAXLEN, min_length=min_length, alpha=alpha)
    ended = [h for h in found if h.ended]
    assert [h.text for h in ended] == [text for _, text in truth[:1]]
    for h in ended:
        assert (h.score, h.gap) == (pytest.approx(truth[0][0]), 0)
        assert h.log_prob == pytest.approx(score(*model, EOS_IX, h.text, start))


@settings(max_examples=60)
@given(toys, st.integers(1, 40), st.integers(1, 5))
def test_exact_search_out_of_budget_tells_how_far_it_may_be(model, budget, batch):
    truth, calls = {text: p for p, text in enumerated(model)}, symbols_read(model[0])
    best = max(truth.values())
    with small_search(batch):
        [h] = generate_exact(*model, EOS_IX, "", MAXLEN, budget=budget)
    assert best <= h.score + h.gap + 1e-9
    assert not h.ended or (h.score <= best + 1e-9 and h.log_prob == pytest.approx(truth[h.text]))
    assert not (h.ended and h.gap == 0) or h.text == max(truth, key=truth.get)
    assert sum(calls) <= MAXLEN + budget + batch + MAXLEN  # the beam's, the search's, the score's


def test_table_by_hand():
    """Greedy writes aa… (0.6, 0.5); the optimum is b. (0.4 · 0.9): a beam of one loses it at once."""
    model = table_model([0.0, 0.6, 0.4], [0.2, 0.5, 0.3], [0.9, 0.05, 0.05])
    greedy, [one] = generate(*model, EOS_IX, "", 2), generate_beam(*model, EOS_IX, 1, "", 2)
    assert (greedy.text, greedy.ended) == (one.text, one.ended) == ("aa", False)
    assert greedy.log_prob == pytest.approx(math.log(0.6 * 0.5))
    assert one.gap == pytest.approx(math.log(0.4 / (0.6 * 0.5)))
    [best] = generate_exact(*model, EOS_IX, "", 2)
    assert (best.text, best.gap) == ("b", 0) and best.log_prob == pytest.approx(math.log(0.36))
    with small_search():
        [early] = generate_exact(*model, EOS_IX, "", 2, budget=1)  # b is not yet read
    assert early.gap == pytest.approx(math.log(0.6) - early.log_prob)
    assert search_error(*model, EOS_IX, 1, "b", "", 2) == 1
    # with two beams: a 0.6, b 0.4; then b. 0.36, aa 0.3 live on, ab 0.18 and a. 0.12 are lost
    assert search_error(*model, EOS_IX, 2, "b", "", 2) is None
    assert search_error(*model, EOS_IX, 2, "a", "", 2) == 2
    assert search_error(*model, EOS_IX, 2, "ab", "", 3) == 2
    found = generate_beam(*model, EOS_IX, 2, "", 2)
    assert [(h.text, h.ended, h.gap) for h in found] == [("b", True, 0), ("aa", False, 0)]


@settings(max_examples=80)
@given(toys, st.integers(1, 8), st.integers(0, 2))
def test_search_error_agrees_with_the_search(model, k, min_length):
    """None where the beam returns the sentence; else the step."""
    found = {h.text for h in generate_beam(*model, EOS_IX, k, "", MAXLEN, min_length=min_length) if h.ended}
    for _, text in enumerated(model, min_length=min_length)[:5]:
        lost = search_error(*model, EOS_IX, k, text, "", MAXLEN, min_length=min_length)
        assert (lost is None) == (text in found)
        assert lost is None or 1 <= lost <= MAXLEN


# ------------------------------------------------------------------------------------------ options


def test_options_out_of_range():
    for decode, options, words in (
        (generate_beam, dict(k=2, start="é☺"), "alphabet: ☺$"),
        (generate, dict(temperature=-1.0), "temperature"),
        (generate, dict(temperature=math.nan), "temperature"),
    ):
        with pytest.raises(ValueError, match=words):
            decode(*toy("rnn", "ours"), EOS_IX, **options)
