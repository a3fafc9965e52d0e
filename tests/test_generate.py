"""Questions 3, 6 and 7: the decoders, against enumeration of every sentence of a toy alphabet."""

import itertools
import math
from collections import Counter

import pytest
import torch
from conftest import CELLS, toy
from hypothesis import given, settings
from hypothesis import strategies as st

import generate as decoders
from generate import (
    generate,
    generate_beam,
    generate_distinct,
    generate_exact,
    narrowest_beam,
    p_nucleus,
    reshaped,
    score,
    search_error,
    trace,
)
from textloader import EOS_IX, PAD_IX

MAXLEN = 4
LETTERS = "abc"
EVERY_CELL = list(itertools.product(CELLS, ("ours", "torch")))
every_cell = pytest.mark.parametrize(("cell", "library"), EVERY_CELL)


def enumerated(model, start="", alpha=1.0):
    """(log-probability, text) of every sentence that ends after at most MAXLEN letters, best first.

    By the chain rule, symbol by symbol, from full forward passes over all sentences of a length.
    """
    rnn, emb, decoder = model
    prompt, found = [EOS_IX, *(LETTERS.index(c) + 2 for c in start)], []
    for length in range(MAXLEN + 1):
        texts = ["".join(letters) for letters in itertools.product(LETTERS, repeat=length)]
        codes = [[LETTERS.index(c) + 2 for c in text] for text in texts]
        output, _ = rnn(emb(torch.tensor([prompt + each for each in codes]).T))
        probs = decoder(output[len(prompt) - 1 :])[..., 1:].softmax(-1).tolist()  # BLANK is never predicted
        for column, (text, each) in enumerate(zip(texts, codes, strict=True)):
            log_prob = 0.0
            for step, code in enumerate([*each, EOS_IX]):
                p = probs[step][column]
                if alpha < 1:
                    mass, kept = 0.0, []
                    for symbol in sorted(range(len(p)), key=lambda s: -p[s]):
                        if mass < alpha:
                            kept.append(symbol)
                            mass += p[symbol]
                    p = [x / mass if symbol in kept else 0.0 for symbol, x in enumerate(p)]
                log_prob += math.log(p[code - 1]) if p[code - 1] else -math.inf
            found.append((log_prob, text))
    return sorted(found, reverse=True)


@every_cell
@pytest.mark.parametrize("start", ["", "ab"])
@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_wide_beam_finds_the_enumerated_order(cell, library, start, alpha):
    for seed in range(3):
        model = toy(cell, library, seed=seed)
        truth = [pair for pair in enumerated(model, start, alpha) if pair[0] > -math.inf]
        found = generate_beam(*model, EOS_IX, 400, start, MAXLEN, alpha=alpha)
        ended = [h for h in found if h.ended]
        assert [h.text for h in ended] == [text for _, text in truth]
        for hypothesis, (log_prob, _) in zip(ended, truth, strict=True):
            assert hypothesis.search_log_prob == pytest.approx(log_prob)
            assert hypothesis.gap == 0


@every_cell
@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_certificate_is_never_wrong(cell, library, alpha):
    proofs = 0
    for seed, k in itertools.product(range(6), (1, 2, 3, 5, 8, 20)):
        model = toy(cell, library, seed=seed)
        truth = enumerated(model, alpha=alpha)
        found = generate_beam(*model, EOS_IX, k, "", MAXLEN, alpha=alpha)
        returned = {h.text for h in found if h.ended}
        best_other = max(p for p, text in truth if text not in returned)
        assert 1 <= len(found) <= k
        for hypothesis in found:
            assert best_other <= hypothesis.search_log_prob + hypothesis.gap + 1e-9
        if found[0].ended and found[0].gap == 0:
            proofs += 1
            assert found[0].text == truth[0][1]
    assert proofs > 0


@every_cell
def test_greedy_is_a_beam_of_one(cell, library):
    for seed in range(10):
        rnn, emb, decoder = model = toy(cell, library, seed=seed)
        codes, ended = [EOS_IX], False
        while len(codes) <= 6 and not ended:
            logits = decoder(rnn(emb(torch.tensor(codes))[:, None])[0][-1, 0]).tolist()
            codes.append(max(range(1, 5), key=lambda s: logits[s]))
            ended = codes[-1] == EOS_IX
        if not ended:  # a further symbol decides whether it ends at maxlen
            logits = decoder(rnn(emb(torch.tensor(codes))[:, None])[0][-1, 0]).tolist()
            ended = max(range(1, 5), key=lambda s: logits[s]) == EOS_IX
        expected = "".join(LETTERS[c - 2] for c in codes[1:] if c != EOS_IX)
        greedy = generate(*model, EOS_IX, maxlen=6)
        assert (greedy.text, greedy.ended) == (expected, ended)
        [beam] = generate_beam(*model, EOS_IX, 1, "", 6)
        assert (greedy.text, greedy.ended) == (beam.text, beam.ended)
        assert (greedy.log_prob, greedy.gap) == (pytest.approx(beam.log_prob), pytest.approx(beam.gap, abs=1e-9))
        greedy, [beam] = generate(*model, EOS_IX, maxlen=1), generate_beam(*model, EOS_IX, 1, "", 1)
        assert (greedy.text, greedy.gap) == (beam.text, pytest.approx(beam.gap, abs=1e-9))


@every_cell
def test_every_score_is_that_of_a_full_pass(cell, library):
    model = toy(cell, library)
    generator = torch.Generator().manual_seed(0)
    for start, hypotheses in (
        ("ab", generate_beam(*model, EOS_IX, 9, "ab", 3)),
        ("", generate_beam(*model, EOS_IX, 9, "", 7, alpha=0.7)),
        ("c", [generate(*model, EOS_IX, "c", 5, temperature=1.5, generator=generator) for _ in range(9)]),
    ):
        for h in hypotheses:
            assert h.log_prob == pytest.approx(score(*model, EOS_IX, h.text, start, ended=h.ended))


def test_sampling_follows_the_model():
    """Pearson's chi-square over the likeliest sentences; a fair sampler fails one seed in a thousand."""
    model = toy("gru", "ours", seed=1)
    truth = enumerated(model)[:8]
    generator, draws = torch.Generator().manual_seed(0), 2000
    found = Counter(
        h.text
        for h in (generate(*model, EOS_IX, "", MAXLEN, temperature=1, generator=generator) for _ in range(draws))
        if h.ended
    )
    expected = [draws * math.exp(p) for p, _ in truth]
    observed = [found[text] for _, text in truth]
    expected.append(draws - sum(expected))
    observed.append(draws - sum(observed))
    assert sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True)) < 26.1  # 8 degrees of freedom


def test_same_seed_same_sentence_and_global_state_untouched():
    model = toy("lstm", "ours")
    before = torch.get_rng_state()
    texts = [
        [generate(*model, EOS_IX, temperature=1, generator=g).text for _ in range(5)]
        for g in (torch.Generator().manual_seed(s) for s in (7, 7, 8))
    ]
    generate(*model, EOS_IX, temperature=1)
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_cold_temperature_is_greedy_without_nan():
    rnn, emb, decoder = toy("rnn", "ours")
    with torch.no_grad():
        decoder.weight *= 1700
    greedy = generate(rnn, emb, decoder, EOS_IX, maxlen=20)
    for temperature in (1e-3, 1e-30, 1e-300):
        cold = generate(rnn, emb, decoder, EOS_IX, maxlen=20, temperature=temperature)
        assert cold.text == greedy.text and not math.isnan(cold.log_prob)


def symbols_read(rnn, monkeypatch):
    """A list that grows by (time steps, beams) with every call of the cell, however it is called."""
    calls = []
    if hasattr(rnn, "one_step"):
        step = rnn.one_step
        monkeypatch.setattr(rnn, "one_step", lambda x, state: calls.append((1, len(x))) or step(x, state))
    else:
        rnn.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape[:2])))
    return calls


@every_cell
@pytest.mark.parametrize("decode", ["beam", "greedy", "sampled", "distinct"])
def test_only_the_state_advances(cell, library, decode, monkeypatch):
    """The start text is read once, then one symbol per live beam and step: no prefix again, nothing after an end."""
    rnn, _, decoder = model = toy(cell, library)
    with torch.no_grad():
        decoder.bias[EOS_IX] = -1e9  # never ends
    calls = symbols_read(rnn, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    found, beams = {
        "beam": lambda: (generate_beam(*model, EOS_IX, 3, "abc", 10), 3),
        "greedy": lambda: ([generate(*model, EOS_IX, "abc", 10)], 1),
        "sampled": lambda: ([generate(*model, EOS_IX, "abc", 10, temperature=1, generator=generator)], 1),
        "distinct": lambda: (generate_distinct(*model, EOS_IX, 3, "abc", 10, generator=generator), 3),
    }[decode]()
    assert sum(steps * width for steps, width in calls) <= 3 + 1 + 10 * beams
    assert calls[-10:] == [(1, beams)] * 10
    assert all(len(h.text) == 10 and not h.ended for h in found)


def test_ended_sentences_are_not_extended():
    """A beam that has ended costs no further reading, and the search stops with the sentences wanted."""
    rnn, _, _ = model = toy("gru", "torch")
    calls = []
    rnn.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape[1]))
    whole = generate_beam(*model, EOS_IX, 40, "", 12)
    reading, calls[:] = list(calls), []
    best = generate_beam(*model, EOS_IX, 40, "", 12, n=1)
    assert best == whole[:1]
    assert len(calls) < len(reading) and max(reading) <= 40 and reading[-1] < 40


def test_blank_and_eos_have_no_text():
    rnn, emb, decoder = toy("gru", "torch")
    with torch.no_grad():
        decoder.bias[PAD_IX] = 1e9
    for h in generate_beam(rnn, emb, decoder, EOS_IX, 50, "a", 5):
        assert set(h.text) <= set(LETTERS)


@pytest.mark.parametrize(
    ("probs", "alpha", "kept"),
    [
        ([0.5, 0.25, 0.25], 0.75, [0.5, 0.25, 0]),  # mass exactly alpha adds none; ties keep their order
        ([0.4, 0.3, 0.2, 0.1], 0.7, [0.4, 0.3, 0, 0]),
        ([0.1, 0.2, 0.3, 0.4], 0.71, [0, 0.2, 0.3, 0.4]),  # the crossing symbol stays
        ([0.4, 0.3, 0.2, 0.1], 1e-9, [0.4, 0, 0, 0]),
        ([0.4, 0.3, 0.2, 0.1], 1, [0.4, 0.3, 0.2, 0.1]),
        ([1, 0, 0], 0.5, [1, 0, 0]),
    ],
)
def test_nucleus_of_known_distributions(probs, alpha, kept):
    logits = torch.tensor(probs).log()
    expected = torch.tensor(kept) / sum(kept)
    torch.testing.assert_close(p_nucleus(lambda h: h, alpha)(logits), expected)
    batch = torch.stack([logits, logits.flip(0)])[None]  # any leading axes, each row by itself
    torch.testing.assert_close(p_nucleus(lambda h: h, alpha)(batch)[0, 0], expected)


@settings(max_examples=200)
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=12), st.floats(0.001, 1))
def test_nucleus_is_the_smallest_set_with_the_mass(logits, alpha):
    h = torch.tensor(logits, dtype=torch.float64)
    before = h.clone()
    probs, nucleus = h.softmax(-1), p_nucleus(lambda h: h, alpha)(h)
    kept = nucleus > 0
    assert torch.equal(h, before)
    assert nucleus.sum().item() == pytest.approx(1)
    if alpha < 1:
        assert probs[kept].sum() >= alpha - 1e-9
        assert kept.sum() == 1 or probs[kept].sum() - probs[kept].min() < alpha + 1e-9
        assert not (~kept).any() or probs[kept].min() >= probs[~kept].max()


@pytest.mark.parametrize(
    "options",
    [dict(k=0), dict(maxlen=0), dict(alpha=0.0), dict(alpha=1.5), dict(alpha=math.nan), dict(start="é☺")],
)
def test_options_out_of_range(options):
    model = toy("rnn", "ours")
    with pytest.raises(ValueError, match=r"must be|alphabet: ☺$"):
        generate_beam(*model, EOS_IX, **{"k": 2, **options})


@pytest.mark.parametrize("temperature", [-1.0, math.inf, math.nan])
def test_temperature_out_of_range(temperature):
    with pytest.raises(ValueError, match="temperature"):
        generate(*toy("rnn", "ours"), EOS_IX, temperature=temperature)


# ----------------------------------------------------------------------------------- exact search


@every_cell
@pytest.mark.parametrize("alpha", [1.0, 0.8])
@pytest.mark.parametrize("min_length", [0, 2])
def test_exact_search_finds_the_enumerated_order(cell, library, alpha, min_length, monkeypatch):
    monkeypatch.setattr(decoders, "SEED_BEAM", 1)  # else the beam finds them all, in so small a world
    for seed in range(6):
        model = toy(cell, library, seed=seed)
        truth = [(p, text) for p, text in enumerated(model, "b", alpha) if len(text) >= min_length and p > -math.inf]
        n = seed % 4 + 1
        found = generate_exact(*model, EOS_IX, "b", MAXLEN, n=n, min_length=min_length, alpha=alpha)
        assert [h.text for h in found if h.ended] == [text for _, text in truth[:n]]
        for h, (log_prob, _) in zip(found, truth, strict=False):
            assert (h.search_log_prob, h.gap) == (pytest.approx(log_prob), 0)
            assert h.log_prob == pytest.approx(score(*model, EOS_IX, h.text, "b"))


@pytest.mark.parametrize(
    ("budget", "memory"), [(1, 2**20), (7, 2**20), (40, 2**20), (10**6, 2000), (10**6, 400), (30, 1)]
)
def test_exact_search_cut_short_tells_how_far_it_may_be(budget, memory, monkeypatch):
    """Without a seeding beam, and with a frontier of a few prefixes: never a wrong proof nor a violated bound."""
    monkeypatch.setattr(decoders, "FRONTIER_BYTES", memory)
    monkeypatch.setattr(decoders, "SEED_BEAM", 1)
    monkeypatch.setattr(decoders, "BATCH", 3)
    proofs = 0
    for seed, cell in itertools.product(range(6), CELLS):
        model = toy(cell, "ours", seed=seed)
        truth = enumerated(model)
        [h] = generate_exact(*model, EOS_IX, "", MAXLEN, budget=budget)
        assert truth[0][0] <= h.search_log_prob + h.gap + 1e-9
        if h.ended and h.gap == 0:
            proofs += 1
            assert h.text == truth[0][1]
        elif h.ended:
            assert h.search_log_prob <= truth[0][0] + 1e-9
    assert proofs > (0 if budget > 1 else -1)


# ------------------------------------------------------------------------------- a table by hand


class LastSymbol(torch.nn.Module):
    """A cell without memory, called like `torch.nn`'s: the next symbol depends on the last one only."""

    def forward(self, x, state=None):
        return x, x[-1:]


def table_model(*rows):
    """P(next | last) by hand: rows after EOS, a, b, over EOS, a, b."""
    table = torch.zeros(4, 4)
    table[1:, 1:] = torch.tensor(rows)
    emb, decoder = torch.nn.Embedding(4, 4), torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        emb.weight.copy_(torch.eye(4))
        decoder.weight.copy_(table.T.clamp_min(1e-30).log())
    return LastSymbol(), emb, decoder


def test_table_by_hand():
    """Greedy writes aa… (0.6, 0.5, 0.5); the optimum is b (0.4 · 0.9); a beam of one loses it at once, as second."""
    model = table_model([0.0, 0.6, 0.4], [0.2, 0.5, 0.3], [0.9, 0.05, 0.05])
    greedy = generate(*model, EOS_IX, "", 2)
    assert (greedy.text, greedy.ended) == ("aa", False)
    assert greedy.log_prob == pytest.approx(math.log(0.6 * 0.5))
    assert greedy.gap == pytest.approx(math.log(0.4 / (0.6 * 0.5)))
    [best] = generate_exact(*model, EOS_IX, "", 2)
    assert (best.text, best.gap) == ("b", 0) and best.log_prob == pytest.approx(math.log(0.36))
    assert search_error(*model, EOS_IX, 1, "b", "", 2) == (1, 2)
    # with two beams: a 0.6, b 0.4; then b. 0.36, aa 0.3, ab 0.18, a. 0.12; then aa dies at maxlen
    assert search_error(*model, EOS_IX, 2, "b", "", 2) is None
    assert search_error(*model, EOS_IX, 2, "a", "", 2) == (2, 4)
    assert search_error(*model, EOS_IX, 2, "ab", "", 2) == (2, 3)
    assert narrowest_beam(*model, EOS_IX, "b", "", 2) == 2
    assert narrowest_beam(*model, EOS_IX, "a", "", 2) is None
    found = generate_beam(*model, EOS_IX, 2, "", 2)
    assert [(h.text, h.ended) for h in found] == [("b", True), ("aa", False)]
    assert found[0].gap == 0
    rows = trace(*model, EOS_IX, "ab", "", alpha=0.7)
    assert [(r.symbol, r.rank, r.in_nucleus, r.nucleus_size) for r in rows] == [
        ("a", 1, True, 2), ("b", 2, True, 2), ("", 1, True, 1)
    ]  # fmt: skip
    assert [r.prob for r in rows] == pytest.approx([0.6, 0.3, 0.9])
    assert [r.end_prob for r in rows] == pytest.approx([0, 0.2, 0.9], abs=1e-6)


def test_search_error_agrees_with_the_search():
    for seed, k in itertools.product(range(8), (1, 2, 3, 6)):
        model = toy("gru", "ours", seed=seed)
        found = {h.text for h in generate_beam(*model, EOS_IX, k, "", MAXLEN) if h.ended}
        for _, text in enumerated(model)[:5]:
            lost = search_error(*model, EOS_IX, k, text, "", MAXLEN)
            assert (lost is None) == (text in found)
            assert lost is None or (1 <= lost[0] <= MAXLEN + 1 and lost[1] > k)


# ----------------------------------------------------------------------------------- distributions


def test_temperature_then_top_k_then_nucleus():
    """At temperature 0.5 probabilities are squared: 16 : 9 : 4 : 1. Of the best three, 16 + 9 are 86 %."""
    log_probs = torch.tensor([0.2, 0.4, 0.1, 0.3], dtype=torch.float64).log()
    before = log_probs.clone()
    expected = {
        (0.5, None, 1.0): [4, 16, 1, 9],
        (0.5, 3, 1.0): [4, 16, 0, 9],
        (0.5, 3, 0.8): [0, 16, 0, 9],
        (1.0, None, 0.8): [2, 4, 0, 3],
        (1.0, 1, 1.0): [0, 1, 0, 0],
        (1.0, 9, 1.0): [2, 4, 1, 3],
    }
    for options, weights in expected.items():
        probs = reshaped(*options)(log_probs[None]).exp()[0]
        torch.testing.assert_close(probs, torch.tensor(weights, dtype=torch.float64) / sum(weights))
    assert torch.equal(log_probs, before)
    assert reshaped() is None


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.floats(-9, 9), min_size=4, max_size=4), min_size=1, max_size=5),
    st.floats(1e-3, 9), st.integers(1, 5), st.floats(0.01, 0.99),
)  # fmt: skip
def test_a_batch_is_reshaped_row_by_row(logits, temperature, top_k, alpha):
    log_probs = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    reshape = reshaped(temperature, top_k, alpha)
    batch = reshape(log_probs)
    assert not batch.isnan().any()
    torch.testing.assert_close(batch, torch.cat([reshape(row[None]) for row in log_probs]))
    torch.testing.assert_close(batch.exp().sum(-1), torch.ones(len(logits), dtype=torch.float64))


def test_the_ends_of_the_options():
    model = toy("lstm", "ours", seed=3)

    def drawn(**options):
        return generate(*model, EOS_IX, "", 9, temperature=1, generator=torch.Generator().manual_seed(5), **options)

    greedy = generate(*model, EOS_IX, "", 9)
    assert drawn(alpha=1e-9).text == drawn(top_k=1).text == greedy.text
    assert drawn(alpha=1.0) == drawn() == drawn(top_k=99)
    assert drawn(alpha=1e-9).search_log_prob == pytest.approx(0)


# -------------------------------------------------------------------------------- stochastic beam


def leaves(model, maxlen):
    """Probability of all that can be drawn: (text, ended), a cut one counted with all that goes on from it."""
    found = {}
    for length in range(maxlen + 1):
        for letters in itertools.product(LETTERS, repeat=length):
            text = "".join(letters)
            found[text, True] = math.exp(score(*model, EOS_IX, text))
            if length == maxlen:
                found[text, False] = math.exp(score(*model, EOS_IX, text, ended=False)) - found[text, True]
    assert sum(found.values()) == pytest.approx(1)
    return found


def test_distinct_sentences_are_drawn_without_replacement():
    """Pearson's chi-square over ordered pairs of draws; a fair drawing fails one seed in a thousand."""
    model = toy("gru", "ours", seed=2)
    probs = leaves(model, 2)
    generator, draws = torch.Generator().manual_seed(0), 2000
    drawn = Counter()
    for _ in range(draws):
        pair = [(h.text, h.ended) for h in generate_distinct(*model, EOS_IX, 2, "", 2, generator=generator)]
        assert len(set(pair)) == 2
        drawn[tuple(pair)] += 1
    expected = {
        (one, two): draws * probs[one] * probs[two] / (1 - probs[one]) for one, two in itertools.permutations(probs, 2)
    }
    common = [pair for pair, count in expected.items() if count >= 5]
    observed = [drawn[pair] for pair in common]
    expected = [expected[pair] for pair in common]
    expected.append(draws - sum(expected))
    observed.append(draws - sum(observed))
    freedom = len(common)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson & Hilferty
    assert freedom > 20
    assert sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True)) < limit


@every_cell
def test_enough_beams_draw_everything(cell, library):
    model = toy(cell, library)
    probs = leaves(model, 2)
    found = generate_distinct(*model, EOS_IX, 99, "", 2, generator=torch.Generator().manual_seed(1))
    assert {(h.text, h.ended) for h in found} == set(probs) and len(found) == len(probs)
    assert all(h.gap is None for h in found)
    for h in found:
        assert h.log_prob == pytest.approx(score(*model, EOS_IX, h.text, ended=h.ended))


def test_distinct_sentences_stay_in_the_nucleus():
    model = toy("rnn", "torch", seed=4)
    possible = {text for p, text in enumerated(model, alpha=0.7) if p > -math.inf}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        found = generate_distinct(*model, EOS_IX, 5, "", MAXLEN, alpha=0.7, generator=generator)
        assert {h.text for h in found if h.ended} <= possible
        assert not any(math.isnan(x) or math.isinf(x) for h in found for x in (h.log_prob, h.search_log_prob))


def test_noise_of_extreme_scores():
    """Each parent's largest child takes the parent's value; impossible children stay so; nothing is NaN."""
    scores = torch.tensor([[0.0, -1e-12, -800.0, -math.inf], [-1e5, -1e5, -math.inf, -1e5 - 1e-9]], dtype=torch.float64)
    maxima = torch.tensor([3.0, -2e5], dtype=torch.float64)
    for seed in range(200):
        noisy = decoders.perturbed(scores, maxima, torch.Generator().manual_seed(seed))
        assert not noisy.isnan().any()
        assert torch.equal(noisy.amax(-1), maxima)
        assert torch.equal(noisy == -math.inf, scores == -math.inf)


# ---------------------------------------------------------------------------------- looking closer


def test_trace_is_the_model_step_by_step():
    model = toy("lstm", "torch", seed=6)
    rows = trace(*model, EOS_IX, "acb", "b")
    for i, row in enumerate(rows):
        so_far = score(*model, EOS_IX, "acb"[:i], "b", ended=False)
        ends = {True: score(*model, EOS_IX, "acb"[:i], "b")}
        ends |= {c: score(*model, EOS_IX, "acb"[:i] + c, "b", ended=False) for c in LETTERS}
        chosen = ends["acb"[i] if i < 3 else True]
        assert row.prob == pytest.approx(math.exp(chosen - so_far))
        assert row.rank == 1 + sum(other > chosen + 1e-12 for other in ends.values())
        assert row.end_prob == pytest.approx(math.exp(ends[True] - so_far))
    assert "".join(row.symbol for row in rows) == "acb" and len(rows) == 4


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_sentence_is_written_as_it_grows(temperature):
    model, written = toy("rnn", "ours", seed=1), []
    options = dict(temperature=temperature, generator=torch.Generator().manual_seed(2))
    hypothesis = generate(*model, EOS_IX, "a", 7, write=written.append, **options)
    assert "".join(written) == hypothesis.text and all(len(c) == 1 for c in written)


def test_minimal_length():
    model = toy("gru", "ours", seed=5)
    found = generate_beam(*model, EOS_IX, 400, "", MAXLEN, min_length=3)
    truth = [text for _, text in enumerated(model) if len(text) >= 3]
    assert [h.text for h in found if h.ended] == truth


@pytest.mark.parametrize(
    ("decode", "options", "word"),
    [
        (generate_beam, dict(k=2, n=3), "n is 3"),
        (generate_beam, dict(k=2, top_k=0), "top_k"),
        (generate_beam, dict(k=2, maxlen=3, min_length=4), "min_length"),
        (generate_distinct, dict(k=0), "k is 0"),
        (generate_distinct, dict(k=2, temperature=0), "temperature"),
        (generate_exact, dict(budget=0), "budget"),
        (generate_exact, dict(n=0), "n is 0"),
        (generate, dict(top_k=-1), "top_k"),
        (generate, dict(maxlen=0), "maxlen"),
        (trace, dict(text="abc", alpha=2), "alpha"),
        (score, dict(text="é"), "alphabet: é"),
    ],
)  # fmt: skip
def test_more_options_out_of_range(decode, options, word):
    with pytest.raises(ValueError, match=word):
        decode(*toy("rnn", "ours"), EOS_IX, **options)


@every_cell
def test_cut_sentences_come_best_first(cell, library):
    rnn, emb, decoder = toy(cell, library)
    with torch.no_grad():
        decoder.bias[EOS_IX] = -1e9
    for start, k in itertools.product(("", "a", "cab"), (3, 8, 20)):
        scores = [h.search_log_prob for h in generate_beam(rnn, emb, decoder, EOS_IX, k, start, 5)]
        assert len(scores) == k and scores == sorted(scores, reverse=True)


@every_cell
def test_greedy_in_a_nucleus_is_a_beam_of_one(cell, library):
    for seed in range(6):
        model = toy(cell, library, seed=seed)
        for space in (dict(alpha=0.6), dict(top_k=2), dict(alpha=0.8, top_k=3)):
            greedy = generate(*model, EOS_IX, "", 6, **space)
            assert greedy == generate_beam(*model, EOS_IX, 1, "", 6, **space)[0]


@pytest.mark.parametrize("base", [torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM])
def test_a_cell_with_another_one_step_is_called_like_torchs(base):
    """The handout's own `one_step(x, h)` is not ours: without `project`, it is not used."""

    class Students(base):
        def one_step(self, x, h):
            raise AssertionError

    torch.manual_seed(0)
    parts = Students(3, 4).double(), torch.nn.Embedding(5, 3).double(), torch.nn.Linear(4, 5).double()
    assert generate_beam(*parts, EOS_IX, 3, "ab", 4)


@pytest.mark.parametrize(
    "options", [dict(k=2.5), dict(k=2, maxlen=2.5), dict(k=2, min_length=0.5), dict(k=2, top_k=1.5)]
)
def test_counts_are_whole(options):
    with pytest.raises(ValueError, match="whole"):
        generate_beam(*toy("rnn", "ours"), EOS_IX, **options)
