"""Questions 3, 6 and 7: the decoders, against enumeration of every sentence of a toy alphabet."""

import itertools
import math
from collections import Counter

import pytest
import torch
from conftest import CELLS, toy
from hypothesis import given, settings
from hypothesis import strategies as st

from generate import generate, generate_beam, generate_distinct, p_nucleus, score
from textloader import EOS_IX, PAD_IX

MAXLEN = 4
LETTERS = "abc"
EVERY_CELL = list(itertools.product(CELLS, ("ours", "torch")))
every_cell = pytest.mark.parametrize(("cell", "library"), EVERY_CELL)


def enumerated(model, start="", alpha=1.0):
    """(log-probability, text) of every sentence that ends after at most MAXLEN letters, best first.

    One symbol at a time by the chain rule, with a full forward pass for each prefix.
    """
    rnn, emb, decoder = model
    found = []
    for length in range(MAXLEN + 1):
        for letters in itertools.product(LETTERS, repeat=length):
            codes = [LETTERS.index(c) + 2 for c in letters]
            prompt = [EOS_IX, *(LETTERS.index(c) + 2 for c in start)]
            output, _ = rnn(emb(torch.tensor(prompt + codes))[:, None])
            logits = decoder(output[:, 0])[:, 1:]  # BLANK is never predicted
            probs = logits.softmax(-1).detach()
            log_prob = 0.0
            for step, code in enumerate([*codes, EOS_IX]):
                p = probs[len(prompt) - 1 + step].tolist()
                if alpha < 1:
                    ranked = sorted(range(len(p)), key=lambda s: -p[s])
                    mass, kept = 0.0, []
                    for symbol in ranked:
                        if mass < alpha:
                            kept.append(symbol)
                            mass += p[symbol]
                    p = [x / mass if symbol in kept else 0.0 for symbol, x in enumerate(p)]
                log_prob += math.log(p[code - 1]) if p[code - 1] else -math.inf
            found.append((log_prob, "".join(letters)))
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
        whole, step = rnn.unroll, rnn.one_step
        monkeypatch.setattr(rnn, "one_step", lambda x, state: calls.append((1, len(x))) or step(x, state))
        monkeypatch.setattr(rnn, "unroll", lambda x, state=None: whole(x, state))
    else:
        rnn.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape[:2])))
    return calls


@every_cell
@pytest.mark.parametrize("decode", ["beam", "greedy", "sampled", "distinct"])
def test_only_the_state_advances(cell, library, decode, monkeypatch):
    """The start text is read once, then one symbol per live beam and step: no prefix again, nothing after an end."""
    rnn, emb, decoder = model = toy(cell, library)
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
    assert sum(steps * width for steps, width in calls) == 3 + 1 + 10 * beams
    assert len([width for steps, width in calls if steps == 1 and width == beams]) >= 10
    assert all(len(h.text) == 10 and not h.ended for h in found)


def test_ended_sentences_are_not_extended():
    """A beam that has ended costs no further reading, and the search stops with the sentences wanted."""
    rnn, emb, decoder = model = toy("gru", "torch")
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
