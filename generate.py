"""Questions 3, 6 and 7: write sentences with a trained model, and say how far they are from the likeliest.

A decoder here works on any `(rnn, emb, decoder)`: our cells or `torch.nn.RNN/GRU/LSTM`, a
`torch.nn.Embedding`, a linear layer from hidden state to logits. It reads EOS and the start text
once, then advances the state one symbol at a time; it never runs a prefix again.

    greedy           `generate`: a beam of one
    sampling         `generate(temperature=…)`: a stochastic beam of one
    beam             `generate_beam`: the k likeliest prefixes at every step, with a certificate
    stochastic beam  `generate_distinct`: k different sentences, drawn without replacement
    exact            `generate_exact`: the likeliest sentence, proved

    python generate.py                 # every decoder side by side
    python generate.py --beam 5 --nucleus 0.9 --start "Our "
    python generate.py --exact --min-length 20

Shapes: K beams or prefixes, V symbols. Scores are log-probabilities in nats, in float64.
"""

import math
import re
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from textloader import EOS_IX, HERE, PAD_IX, LabError, Parser, clean, code2string, lettre2id, number, one_line, run_main

RUNS = HERE / "runs"
MAXLEN = 200
BUDGET = 500_000  # prefixes that exact search expands before it gives up
FRONTIER_BYTES = 2**26  # of the prefixes that exact search holds
BATCH, SEED_BEAM = 512, 100  # prefixes that it expands at once; the beam that it starts from
BEAM, NUCLEUS = 5, 0.9  # where the command line names none
WIDEST = 4096  # beam that is tried in search of an optimum
NEVER = -math.inf  # log-probability


@dataclass(frozen=True)
class Hypothesis:
    """A sentence that a decoder wrote, and how likely it is.

    text             the new characters, without start text, EOS or BLANK
    log_prob         nats, of those characters and of EOS where it ended, under the model itself
    ended            True if it closed with EOS, False if it was cut at `maxlen`
    gap              nats by which a sentence that the search did not return may still be better:
                     0 means proved, None that nothing was searched
    search_log_prob  nats, under the distribution that was searched or drawn from (see `reshaped`)
    """

    text: str
    log_prob: float
    ended: bool
    gap: float | None
    search_log_prob: float

    @property
    def bits_per_character(self) -> float:
        """-log_prob in bits, by symbols written (EOS included where it ended)."""
        return -self.log_prob / math.log(2) / max(len(self.text) + self.ended, 1)


# ---------------------------------------------------------------------------------- distributions


def p_nucleus(decoder, alpha: float):
    """The nucleus of a model's distribution (Holtzman et al. 2020).

    Returns `compute(h)`: hidden states (…, H) → probabilities (…, V) in which only the smallest set
    of most likely symbols with mass at least `alpha` is left, renormalised. The symbol that crosses
    `alpha` is in the set; ties keep the order of the codes.

    Raises ValueError unless 0 < alpha <= 1.
    """
    check("alpha", alpha, 0, 1, above=True)

    def compute(h):
        probs = decoder(h).softmax(-1)  # (…, V)
        if alpha == 1:
            return probs
        ranked, symbols = probs.sort(dim=-1, descending=True, stable=True)
        mass_before = ranked.cumsum(-1) - ranked  # of the symbols more likely than this one
        kept = mass_before < alpha - 4 * torch.finfo(probs.dtype).eps  # rounding is no mass
        kept[..., 0] = True
        nucleus = torch.zeros_like(probs).scatter(-1, symbols, ranked * kept)
        return nucleus / nucleus.sum(-1, keepdim=True)

    return compute


def at_temperature(log_probs, temperature: float):
    """The distribution (…, V) with all log-odds divided by `temperature` (> 0)."""
    # The largest becomes 0 first, so that a temperature near 0 cannot overflow.
    return ((log_probs - log_probs.amax(-1, keepdim=True)) / temperature).log_softmax(-1)


def of_top_k(log_probs, k: int):
    """The distribution (…, V) with only its `k` most likely symbols left; ties keep the codes' order."""
    ranked, symbols = log_probs.sort(dim=-1, descending=True, stable=True)
    ranked[..., k:] = NEVER
    return torch.empty_like(log_probs).scatter(-1, symbols, ranked).log_softmax(-1)


def reshaped(temperature: float = 1.0, top_k: int | None = None, alpha: float = 1.0):
    """What is searched or drawn from instead of the model: temperature, then top-k, then nucleus.

    Returns a function from log-probabilities (…, V) to new ones, or None where nothing changes.
    Raises ValueError for options out of range; `temperature` must be above 0 here.
    """
    check("temperature", temperature, 0, above=True)
    check("alpha", alpha, 0, 1, above=True)
    if top_k is not None:
        check_count("top_k", top_k, 1)
    if temperature == 1 and top_k is None and alpha == 1:
        return None

    def reshape(log_probs):
        if temperature != 1:
            log_probs = at_temperature(log_probs, temperature)
        if top_k is not None:
            log_probs = of_top_k(log_probs, top_k)
        return p_nucleus(lambda logits: logits, alpha)(log_probs).log() if alpha < 1 else log_probs

    return reshape


def check_count(name: str, value, low=1, high=math.inf) -> None:
    """Raise ValueError unless `value` is a whole number from `low` to `high`."""
    if not isinstance(value, int):
        raise ValueError(f"{name} is {value}, must be a whole number")
    check(name, value, low, high)


def check(name: str, value, low, high=math.inf, *, above=False) -> None:
    """Raise ValueError unless `value` is finite and from `low` (`above`: beyond it) to `high`."""
    if not (low < value if above else low <= value) or not value <= high or value == math.inf:
        most = f" and at most {high}" if high < math.inf else ""
        raise ValueError(f"{name} is {value}, must be {'above' if above else 'at least'} {low}{most}")


# ----------------------------------------------------------------------------- reading the model


class Reader:
    """Reads one symbol per beam and says how likely each next one is, for any `(rnn, emb, decoder)`.

    A cell that offers `project`, `one_step` and `zero_state` takes its input from a table of the V
    projected symbols, computed once; any other cell is called like `torch.nn`'s. What is searched or drawn from
    may differ from the model: the other options are those of `reshaped`.
    """

    def __init__(self, rnn, emb, decoder, **options):
        self.rnn, self.emb, self.decoder, self.device = rnn, emb, decoder, emb.weight.device
        self.reshape = reshaped(**options)
        self.table = rnn.project(emb.weight) if hasattr(rnn, "project") else None  # (V, G·H)
        self.blank = torch.tensor([PAD_IX], device=self.device)

    def logits(self, h):
        """Hidden states (…, H) → logits (…, V) of the next symbol; BLANK's is −inf."""
        return self.decoder(h).index_fill(-1, self.blank, NEVER)

    def advance(self, symbols, state):
        """Read symbols (K,) after `state` (None: zeros): hidden states (K, H), the state after."""
        if self.table is None:
            output, state = self.rnn(self.emb(symbols)[None], state)
            return output[0], state
        projected = self.table.index_select(0, symbols)
        state = self.rnn.one_step(projected, self.rnn.zero_state(projected) if state is None else state)
        return (state[0] if isinstance(state, tuple) else state), state

    def read(self, symbols, state):
        """`advance`, then log-probabilities (K, V) of the next symbol: the model's, those to search or draw by."""
        h, state = self.advance(symbols, state)
        model = self.logits(h).double().log_softmax(-1)
        return model, model if self.reshape is None else self.reshape(model), state

    def prompt(self, eos: int, start: str):
        """EOS and the start text, all but the last symbol read: that symbol (1,) and the state so far."""
        codes = torch.tensor([eos, *codes_of(read_start(start))], device=self.device)
        state = self.rnn(self.emb(codes[:-1])[:, None])[1] if len(codes) > 1 else None
        return codes[-1:], state


def codes_of(text: str) -> list[int]:
    """The codes of a text, symbol by symbol; ValueError if some are outside the alphabet."""
    outside = sorted({c for c in text if c not in lettre2id})
    if outside:
        raise ValueError(f"the text has characters outside the alphabet: {' '.join(outside)}")
    return [lettre2id[c] for c in text]


def read_start(start: str) -> str:
    """A start text as a person types it, written in the alphabet; ValueError if that would lose characters."""
    text, dropped = clean(start)
    if dropped:
        raise ValueError(f"the start text has characters outside the alphabet: {' '.join(dropped)}")
    return text


def map_state(function, *states):
    """`function` of every tensor of a state: one tensor or nested tuples of them, K the last axis but one."""
    if isinstance(states[0], tuple):
        return tuple(map_state(function, *parts) for parts in zip(*states, strict=True))
    return function(*states)


def select(state, beams):
    """The state of the given beams (K,), in their order."""
    return map_state(lambda part: part.index_select(-2, beams), state)


# ------------------------------------------------------------------------------------ beam search


class Beam:
    """Beam search, one symbol per `step`: the `k` best among live and ended prefixes together survive.

    "Best" is by score; with a `generator` by the score perturbed with Gumbel noise, which makes it the
    stochastic beam (see `generate_distinct`). A prefix's score, perturbed or not, can only fall: so the
    largest among those let go, `bound`, is above every sentence that they could have become, and the
    search is over once the `n` best prefixes have ended.
    """

    def __init__(self, reader, eos, k, start, maxlen, *, n=None, min_length=0, generator=None):
        check_count("k", k, 1)
        self.n = k if n is None else n
        check_count("n", self.n, 1, k)
        check_count("maxlen", maxlen, 1)
        check_count("min_length", min_length, 0, maxlen)
        self.reader, self.eos, self.k, self.maxlen, self.min_length = reader, eos, k, maxlen, min_length
        self.generator = generator
        self.symbols, self.state = reader.prompt(eos, start)  # what the live beams read next, and after what
        self.scores = torch.zeros(1, dtype=torch.float64, device=reader.device)  # of the live beams
        self.own = self.keys = self.scores  # under the model itself; as ranked
        self.parents, self.written = [], []  # back-pointers and symbols: a tuple over live beams per step
        self.ended, self.cut, self.bound = [], [], NEVER  # (key, Hypothesis without its gap), best first

    def step(self) -> bool:
        """Read the live beams' symbols, keep the best of what may follow; False when that is the end."""
        model, search = self.distributions()
        scores = self.scores[:, None] + search  # (live, V)
        keys = scores if self.generator is None else perturbed(scores, self.keys, self.generator)
        self.pool = keys.flatten()  # what competes: the ended, then every child of live beams
        if self.ended:
            self.pool = torch.cat([self.pool.new_tensor([key for key, _ in self.ended]), self.pool])
        best = self.pool.topk(min(self.k + 1, len(self.pool)))
        ranked = zip(*(column.tolist() for column in best), strict=True)

        before, self.ended, self.ended_places, grown = self.ended, [], [], []
        offset, V = len(before), scores.shape[1]
        for rank, (key, place) in enumerate(ranked):
            if key == NEVER:
                break
            if rank == self.k or (len(self.ended) == self.n and not grown):
                self.bound = max(self.bound, key)
                break
            beam, symbol = divmod(place - offset, V)  # beam < 0: ended at an earlier step
            if beam >= 0 and symbol == PAD_IX:
                self.cut.append((key, self.hypothesis(beam, False, self.own[beam], self.scores[beam])))
            elif beam >= 0 and symbol != self.eos:
                grown.append((place, key, beam, symbol))
            else:
                self.ended_places.append(place)
                self.ended.append(before[place] if beam < 0 else (key, self.closed(beam, model, scores)))
        self.grow(grown, scores, model)
        return bool(grown)

    def distributions(self):
        """Log-probabilities (live, V) of the next symbol: the model's, and those to search by."""
        model, search, self.state = self.reader.read(self.symbols, self.state)
        if len(self.written) < self.min_length:
            search = search.clone()
            search[:, self.eos] = NEVER
        if len(self.written) == self.maxlen:
            # EOS, or the cut: BLANK's free column takes the best of all else, or its mass.
            end, search = search, torch.full_like(search, NEVER)
            search[:, self.eos] = end[:, self.eos]
            others = end.index_fill(-1, self.symbols.new_tensor([self.eos]), NEVER)
            search[:, PAD_IX] = others.amax(-1) if self.generator is None else others.logsumexp(-1)
        return model, search

    def closed(self, beam: int, model, scores) -> Hypothesis:
        """The sentence that EOS makes of a live beam."""
        return self.hypothesis(beam, True, self.own[beam] + model[beam, self.eos], scores[beam, self.eos])

    def hypothesis(self, beam: int, ended: bool, own, score) -> Hypothesis:
        """What a live beam has written, found along the back-pointers."""
        codes, row = [], beam
        for parents, symbols in zip(reversed(self.parents), reversed(self.written), strict=True):
            codes.append(symbols[row])
            row = parents[row]
        return Hypothesis(code2string(reversed(codes)), own.item(), ended, None, score.item())

    def grow(self, grown, scores, model) -> None:
        """Make the (place, key, beam, symbol) in `grown` the live beams; `state` follows by back-pointer."""
        self.grown_places, keys, parents, symbols = zip(*grown, strict=True) if grown else [()] * 4
        if not grown:
            return
        beams = torch.tensor(parents, device=self.reader.device)
        self.symbols = torch.tensor(symbols, device=self.reader.device)
        if (len(self.scores), len(beams)) != (1, 1):  # unmoved ones too: it leaves rows, and W·h is faster on few
            self.state = select(self.state, beams)
        self.keys = scores.new_tensor(keys)
        self.scores = self.keys if self.generator is None else scores[beams, self.symbols]
        self.own = self.scores if self.reader.reshape is None else self.own[beams] + model[beams, self.symbols]
        self.parents.append(parents)
        self.written.append(symbols)

    def run(self) -> list[Hypothesis]:
        """Search to the end."""
        while self.step():
            pass
        return self.hypotheses()

    def hypotheses(self) -> list[Hypothesis]:
        """The `n` best first: the ended, then the cut; drawn ones in the order of drawing."""
        if self.generator is not None:
            return [drawn for _, drawn in sorted(self.ended + self.cut, key=lambda pair: -pair[0])]
        cut = sorted((found for _, found in self.cut), key=lambda found: -found.search_log_prob)
        return with_gaps([*(found for _, found in self.ended), *cut][: self.n], self.bound)


def with_gaps(found: list[Hypothesis], bound: float) -> list[Hypothesis]:
    """Each with its gap to `bound`, the best that a sentence not in `found` may reach."""
    return [replace(each, gap=max(0.0, bound - each.search_log_prob)) for each in found]


@torch.inference_mode()
def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=MAXLEN, *, n=None, min_length=0, **space):
    """Questions 6 and 7: beam search for the most likely sentences; `alpha` below 1: nucleus beam.

    At every step the `k` most likely prefixes are kept, live and ended together, so `k = 1` is
    greedy. A prefix's log-probability can only fall. So the largest among the prefixes that the
    search let go bounds every sentence that it did not return: what a sentence lacks to that bound
    is its `gap`, and one without gap is proved to be the most likely (of those not returned).

    n              sentences wanted (None: k); the search stops when no live prefix can be among them
    min_length     a sentence of fewer characters does not count
    space          what to search instead of the model: `alpha`, `top_k`, `temperature` (see `reshaped`)

    Returns a list of at most `n` Hypothesis, best first: ended ones by the log-probability that was
    searched, then those cut at `maxlen`. It is empty only where `min_length` and the nucleus leave no
    way on. Raises ValueError for options out of range or a start text outside the alphabet.
    """
    reader = Reader(rnn, emb, decoder, **space)
    return Beam(reader, eos, k, start, maxlen, n=n, min_length=min_length).run()


@torch.inference_mode()
def generate(rnn, emb, decoder, eos, start="", maxlen=MAXLEN, *, temperature=0.0, generator=None, write=None, **space):
    """Question 3: write one sentence, symbol by symbol, until EOS or `maxlen` characters.

    temperature  0: greedy, always the most likely symbol (a beam of one); above 0: a random symbol
                 from the distribution at that temperature (a stochastic beam of one)
    space        narrows it further: `top_k`, `alpha` (see `reshaped`)
    generator    a CPU `torch.Generator` for the drawing; None: a fresh one, seeded by the system
    write        called with each new character as soon as it is chosen

    Returns a Hypothesis. Raises ValueError for options out of range or a start text outside the
    alphabet. The global random state is not touched.
    """
    check("temperature", temperature, 0)
    reader = Reader(rnn, emb, decoder, temperature=temperature or 1.0, **space)
    if temperature == 0 and reader.reshape is None:
        return greedy(reader, eos, start, maxlen, write)
    noise = (generator or fresh_generator()) if temperature else None
    beam = Beam(reader, eos, 1, start, maxlen, generator=noise)
    while beam.step():
        if write is not None:
            write(code2string(beam.written[-1]))
    return beam.hypotheses()[0]


def greedy(reader, eos, start, maxlen, write) -> Hypothesis:
    """A beam of one, faster: each step only looks for the largest logit, all scores are worked out at the end."""
    check_count("maxlen", maxlen, 1)
    symbol, state = reader.prompt(eos, start)
    logits, codes = [], []
    while len(codes) <= maxlen and eos not in codes[-1:]:
        h, state = reader.advance(symbol, state)
        logits.append(reader.logits(h))
        symbol = logits[-1].argmax(-1)
        codes.append(symbol.item())
        if write is not None and codes[-1] != eos and len(codes) <= maxlen:
            write(code2string(codes[-1:]))
    log_probs = torch.cat(logits).double().log_softmax(-1)  # (n, V)
    chosen = torch.tensor(codes, device=reader.device)[:, None]
    steps = log_probs.gather(1, chosen)[:, 0]
    before = steps.cumsum(0) - steps
    others = log_probs.scatter(1, chosen, NEVER)
    bound, ended = (before[:, None] + others).max().item(), codes[-1] == eos
    score = (before[-1] + steps[-1] * ended).item()
    return Hypothesis(code2string(codes[: len(codes) - 1]), score, ended, max(0.0, bound - score), score)


# ------------------------------------------------------------------------------- stochastic beam


@torch.inference_mode()
def generate_distinct(rnn, emb, decoder, eos, k, start="", maxlen=MAXLEN, *, generator=None, **space):
    """`k` different sentences, drawn without replacement (stochastic beam search, Kool et al. 2019).

    To add Gumbel noise to every sentence's log-probability and keep the `k` largest sums is to draw
    without replacement. Top-down it needs no enumeration: the largest perturbed log-probability below a
    prefix is drawn first, then those of its children given that maximum (see `perturbed`).

    Options and errors as for `generate`, but `temperature` is 1 unless given, and above 0. A sentence
    cut at `maxlen` counts as one, with the probability of its characters and of not ending there.
    Returns at most `k` Hypothesis in the order of drawing: the first m are a draw of m.
    """
    reader = Reader(rnn, emb, decoder, **space)
    return Beam(reader, eos, k, start, maxlen, generator=generator or fresh_generator()).run()


def perturbed(scores, maxima, generator):
    """Gumbel noise on the children's scores (K, V), given each parent's largest one, `maxima` (K,).

    With G = score + noise, Z the row's largest G and T the wanted maximum, exp(−G) is moved by
    exp(−T) − exp(−Z): G' = −log(exp(−T) − exp(−Z) + exp(−G)), here without overflow (appendix B.3).
    """
    noise = torch.empty(scores.shape, dtype=scores.dtype).exponential_(generator=generator)
    G = scores - noise.clamp_min(1e-300).log().to(scores.device)
    T = maxima[:, None]
    v = T - G + log1mexp(G - G.amax(-1, keepdim=True))
    return T - v.clamp_min(0) - (-v.abs()).exp().log1p()


def log1mexp(x):
    """log(1 − exp(x)) for x <= 0, exact near 0 and far from it (Mächler 2012)."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


def fresh_generator() -> torch.Generator:
    """A generator seeded by the system."""
    generator = torch.Generator()
    generator.seed()
    return generator


# ----------------------------------------------------------------------------------- exact search


@torch.inference_mode()
def generate_exact(rnn, emb, decoder, eos, start="", maxlen=MAXLEN, *, budget=BUDGET, n=1, min_length=0, **space):
    """The `n` most likely sentences of at most `maxlen` characters, proved (branch and bound).

    budget  prefixes expanded before the search gives up; then `gap` says how much better the
            optimum may be than what was found. The memory is bounded too, by FRONTIER_BYTES.

    Other options, result and errors as `generate_beam`'s.
    """
    reader = Reader(rnn, emb, decoder, **space)
    return Exact(reader, eos, start, maxlen, budget=budget, n=n, min_length=min_length).run()


class Exact:
    """Best-first search over batches of prefixes, from what a beam has found.

    A prefix is worth expanding while its score is above the n-th best sentence known, the `floor`; a
    beam of SEED_BEAM gives the first. The likeliest prefixes go first. When half the frontier's memory
    is used, the longest do: they end or fall below the floor soonest. Should it overflow all the same,
    some are let go, and `bound` remembers the best of them.
    """

    def __init__(self, reader, eos, start, maxlen, *, budget, n, min_length):
        check_count("budget", budget, 1)
        check_count("n", n, 1)
        beam = Beam(reader, eos, max(SEED_BEAM, n), start, maxlen, n=n, min_length=min_length)
        self.reader, self.eos, self.n, self.maxlen, self.min_length = reader, eos, n, maxlen, min_length
        self.budget, self.expanded, self.bound = budget, 0, NEVER
        self.symbols, self.state = reader.prompt(eos, start)
        seeds = beam.run()
        self.cut = [seed for seed in seeds if not seed.ended]
        self.found = {seed.text: seed for seed in seeds if seed.ended}

    def run(self) -> list[Hypothesis]:
        """Search until nothing can be better or the budget is spent; the `n` best, best first."""
        zero = torch.zeros(1, dtype=torch.float64, device=self.reader.device)
        codes = torch.zeros(1, self.maxlen, dtype=torch.uint8, device=self.reader.device)
        frontier, nodes = None, (zero, zero, self.symbols, zero.long()[:, None], codes, self.state)
        while nodes is not None:
            children = self.expand(*nodes)
            frontier = frontier or Frontier(children[0], children[-1], len(self.reader.emb.weight))
            self.bound = max(self.bound, frontier.push(*children))
            nodes = frontier.pop(min(BATCH, self.budget - self.expanded), self.floor())
        self.bound = max(self.bound, *frontier.waiting[0].sort(descending=True).values[:1].tolist(), NEVER)
        return with_gaps([*self.found.values(), *self.cut][: self.n], self.bound)

    def floor(self) -> float:
        """The score that a sentence must beat to be among the `n` best."""
        return [*self.found.values()][self.n - 1].search_log_prob if len(self.found) >= self.n else NEVER

    def expand(self, scores, own, symbols, lengths, codes, state):
        """Read the last symbols (K,) of prefixes; note the sentences that end there.

        lengths (K, 1), codes (K, maxlen), state before those symbols. Returns what `Frontier.push` takes.
        """
        self.expanded += len(scores)
        model, search, state = self.reader.read(symbols, state)
        scores, own = scores[:, None] + search, own[:, None] + model  # (K, V)
        ends = scores[:, self.eos].masked_fill(lengths[:, 0] < self.min_length, NEVER)
        for row in (ends > self.floor()).nonzero()[:, 0].tolist():
            self.note(code2string(codes[row].tolist()), ends[row].item(), own[row, self.eos].item())
        scores[:, self.eos] = NEVER
        scores.masked_fill_(lengths == self.maxlen, NEVER)
        rows, symbols = (scores > self.floor()).nonzero(as_tuple=True)
        return scores[rows, symbols], own[rows, symbols], symbols, rows, (lengths, codes, state)

    def note(self, text: str, score: float, own: float) -> None:
        """Keep a sentence if it is new and among the `n` best."""
        self.found.setdefault(text, Hypothesis(text, own, True, None, score))
        best = sorted(self.found.items(), key=lambda item: -item[1].search_log_prob)
        self.found = dict(best[: self.n])


class Frontier:
    """Prefixes that wait to be expanded: each one's score, score under the model, last symbol, and slot.

    A slot holds what the children of a prefix share: its length, codes and state. It is free again
    when none of them waits any more.
    """

    def __init__(self, scores, parents, V: int):
        sizes = []
        map_state(lambda part: sizes.append(part.numel() * part.element_size() // part.shape[-2]), parents)
        self.capacity = max(1, FRONTIER_BYTES // (sum(sizes) + 32 * V))  # slots; 32 bytes for a child
        self.slots = map_state(lambda part: part.new_empty(*part.shape[:-2], self.capacity, part.shape[-1]), parents)
        integers = torch.empty(0, dtype=torch.int64, device=scores.device)
        self.waiting = (scores.new_empty(0), scores.new_empty(0), integers, integers)
        self.uses = integers.new_zeros(self.capacity)  # of each slot, by those that wait
        self.room, self.gone, self.floor = self.capacity, 0, NEVER

    def push(self, scores, own, symbols, rows, parents) -> float:
        """Add the children (n,) of `rows` (n,) of `parents`; return the best score that had no room (or −inf)."""
        mothers, rows = rows.unique(return_inverse=True)
        free = (self.uses == 0).nonzero()[:, 0]
        self.room = max(0, len(free) - len(mothers))
        lost = scores[rows >= len(free)]
        scores, own, symbols, rows = (column[rows < len(free)] for column in (scores, own, symbols, rows))
        slots, mothers = free[: len(mothers)], mothers[: len(free)]
        map_state(lambda slot, part: slot.index_copy_(-2, slots, part), self.slots, select(parents, mothers))
        children = (scores, own, symbols, slots[rows])
        self.waiting = tuple(torch.cat(pair) for pair in zip(self.waiting, children, strict=True))
        self.uses += torch.bincount(children[3], minlength=self.capacity)
        return lost.max().item() if len(lost) else NEVER

    def pop(self, count: int, floor: float):
        """Take out the `count` prefixes to expand next, for `Exact.expand`; None if there is none above `floor`."""
        if not count:
            return None
        self.discard(floor)
        scores, own, symbols, slots = self.waiting
        keys = scores
        if self.room < self.capacity // 2:  # the longest first, in smaller batches
            keys, count = scores + 1e9 * self.slots[0][slots, 0], -(-count // 2)
        best, chosen = keys.topk(min(count, len(keys)))
        chosen = chosen[best > NEVER]
        if not len(chosen):
            return None
        lengths, codes, state = select(self.slots, slots[chosen])
        codes.scatter_(1, lengths, symbols[chosen, None].to(codes.dtype))
        nodes = (scores[chosen], own[chosen], symbols[chosen], lengths + 1, codes, state)
        scores[chosen] = NEVER
        self.uses -= torch.bincount(slots[chosen], minlength=self.capacity)
        self.gone += len(chosen)
        return nodes

    def discard(self, floor: float) -> None:
        """Forget those that cannot win: when the floor has risen, or half of them have gone."""
        if floor == self.floor and self.gone <= len(self.waiting[0]) // 2:
            return
        left = (self.waiting[0] > floor).nonzero()[:, 0]
        self.waiting = tuple(column[left] for column in self.waiting)
        self.uses = torch.bincount(self.waiting[3], minlength=self.capacity)
        self.floor, self.gone = floor, 0


# -------------------------------------------------------------------------------- looking at a text


def predictions(rnn, emb, decoder, eos, text, start, ended):
    """By one forward pass: log-probabilities (n, V) before each symbol of `text`, and those symbols (n,).

    EOS is the last one if `ended`.
    """
    prompt, written = [eos, *codes_of(read_start(start))], codes_of(text)
    wanted = torch.tensor(written + [eos] * ended, dtype=torch.int64, device=emb.weight.device)
    output, _ = rnn(emb(torch.tensor(prompt + written, device=emb.weight.device))[:, None])  # (T, 1, H)
    first = len(prompt) - 1
    logits = Reader(rnn, emb, decoder).logits(output[first : first + len(wanted), 0])
    return logits.double().log_softmax(-1), wanted


@torch.inference_mode()
def score(rnn, emb, decoder, eos, text, start="", *, ended=True) -> float:
    """Log-probability (nats) of `text` after `start`, EOS included if `ended`, by one forward pass."""
    log_probs, wanted = predictions(rnn, emb, decoder, eos, text, start, ended)
    return log_probs.gather(1, wanted[:, None]).sum().item()


@dataclass(frozen=True)
class Choice:
    """What the model thought of one symbol of a sentence."""

    symbol: str  # "" is EOS
    prob: float
    rank: int  # 1 is the likeliest
    in_nucleus: bool
    nucleus_size: int
    end_prob: float  # of EOS in its place


@torch.inference_mode()
def trace(rnn, emb, decoder, eos, text, start="", *, ended=True, alpha=NUCLEUS) -> list[Choice]:
    """The model's view of `text`, symbol by symbol; the nucleus is that of mass `alpha`."""
    log_probs, wanted = predictions(rnn, emb, decoder, eos, text, start, ended)
    nucleus = p_nucleus(lambda logits: logits, alpha)(log_probs) > 0  # (n, V)
    own = log_probs.gather(1, wanted[:, None])  # (n, 1)
    columns = (
        own[:, 0].exp(),
        (log_probs > own).sum(1) + 1,
        nucleus.gather(1, wanted[:, None])[:, 0],
        nucleus.sum(1),
        log_probs[:, eos].exp(),
    )
    symbols = [*text, ""] if ended else text
    return [Choice(*row) for row in zip(symbols, *(column.tolist() for column in columns), strict=True)]


@torch.inference_mode()
def search_error(rnn, emb, decoder, eos, k, text, start="", maxlen=MAXLEN, *, min_length=0, **space):
    """Where a beam of `k` loses the sentence `text`: (step, rank among all that competed there).

    Steps and ranks count from 1. None if the beam keeps it to the end.
    """
    beam = Beam(Reader(rnn, emb, decoder, **space), eos, k, start, maxlen, min_length=min_length)
    codes, step, going = [*codes_of(text), eos], 0, True
    place = codes[0]  # of the prefix among all that compete
    while going:
        going, step = beam.step(), step + 1
        if place in beam.ended_places:
            place = beam.ended_places.index(place)
        elif place in beam.grown_places:
            place = len(beam.ended) + beam.grown_places.index(place) * len(emb.weight) + codes[step]
        else:
            return step, int((beam.pool > beam.pool[place]).sum()) + 1
    return None


def narrowest_beam(rnn, emb, decoder, eos, text, start="", maxlen=MAXLEN, **search) -> int | None:
    """The smallest power of two up to WIDEST whose beam returns the sentence `text` as its best, or None."""
    for k in (2**power for power in range(WIDEST.bit_length())):
        best = generate_beam(rnn, emb, decoder, eos, k, start, maxlen, n=1, **search)
        if best and best[0].ended and best[0].text == text:
            return k
    return None


SPANS = (8, 16, 32)  # characters


def copied(groups: dict, corpus: str) -> dict:
    """Learned or copied: of the texts in each group, the shares of words and substrings that `corpus` has too.

    groups   name → texts; substrings are those of each length in SPANS

    Returns name → shares, NaN where there is nothing to share. Only what the texts have is kept of the corpus.
    """

    def words(text):
        return re.findall(r"[\w']+", text.lower())

    def spans(text, n):
        return (text[i : i + n] for i in range(len(text) - n + 1))

    shares = {group: {} for group in groups}
    measures = {f"{n} characters copied": partial(spans, n=n) for n in SPANS}
    for what, cut in {"words known": words, **measures}.items():
        items = {group: [item for text in texts for item in cut(text)] for group, texts in groups.items()}
        known = set().union(*items.values()).intersection(cut(corpus))
        for group, own in items.items():
            shares[group][what] = sum(item in known for item in own) / len(own) if own else math.nan
    return shares


# ----------------------------------------------------------------------------------- command line


def newest_checkpoint(runs: Path = RUNS, name: str = "best.pt") -> Path:
    """The checkpoint of this name that was saved last in `runs`, else the reference; LabError if there is none."""
    reference = runs / "reference"
    own = [path for path in runs.glob(f"**/{name}") if reference not in path.parents]
    if not own and (reference / "lstm" / name).exists():
        return reference / "lstm" / name
    if not own:
        raise LabError(f"no run in {runs} yet: train one first with `python tp5.py --model lstm`")
    return max(own, key=lambda path: path.stat().st_mtime)


def show_trace(hypothesis, start: str, parts, alpha: float) -> None:
    """Print the model's view of a sentence, a line for each symbol."""
    print(f"    symbol  probability  rank  in nucleus of {alpha:g} (size)  probability of ending here")
    for c in trace(*parts, hypothesis.text, start, ended=hypothesis.ended, alpha=alpha):
        nucleus = f"{'yes' if c.in_nucleus else 'no'} ({c.nucleus_size})"
        print(f"    {c.symbol or 'end':6}  {c.prob:11.4f}  {c.rank:4}  {nucleus:24}  {c.end_prob:.4f}")


def facts(hypothesis, first: bool) -> str:
    """Scores and certificate of a sentence, the `first` of those returned or a later one."""
    said = [f"{hypothesis.log_prob:.2f} nats"]
    if hypothesis.search_log_prob != hypothesis.log_prob:
        said.append(f"{hypothesis.search_log_prob:.2f} as {'drawn' if hypothesis.gap is None else 'searched'}")
    said.append(f"{hypothesis.bits_per_character:.2f} bits per character")
    said.append("ended" if hypothesis.ended else "cut at maxlen")
    if hypothesis.gap == 0 and hypothesis.ended:
        said.append("proved optimal" if first else "proved next best")
    elif hypothesis.gap is not None and not hypothesis.ended:
        which = "no sentence" if first else "no other sentence"
        said.append(f"{which} that ends is above {hypothesis.search_log_prob + hypothesis.gap:.2f} nats")
    elif hypothesis.gap is not None:
        where = "from the optimum" if first else "below a sentence not shown"
        said.append(f"at most {hypothesis.gap:.2f} nats {where}")
    return ", ".join(said)


def exact(options, parts, space):
    """Yield the sentences of exact search, then print what it took and where beam search loses the best."""
    since, place = time.perf_counter(), (options.start, options.maxlen)
    limits = dict(n=options.n or 1, min_length=options.min_length)
    exact = Exact(Reader(*parts[:3], **space), EOS_IX, *place, budget=options.budget, **limits)
    found = exact.run()
    seconds = time.perf_counter() - since
    yield from found
    print(f"    {exact.expanded:,} prefixes expanded in {seconds:.1f} s")
    if not found or not found[0].ended or found[0].gap:
        return  # there is no optimum yet that a beam could lose
    k, best, space = options.beam or BEAM, found[0].text, dict(min_length=options.min_length, **space)
    lost = search_error(*parts, k, best, *place, **space)
    said = f"a beam of {k} keeps it to the end"
    if lost is not None:
        step, rank = lost
        what = repr(best[:step]) if step <= len(best) else "its end"
        said = f"a beam of {k} loses it at step {step}, where {what} has rank {rank}"
    narrowest = narrowest_beam(*parts, best, *place, **space) or f"none up to {WIDEST}"
    print(f"    {said}; the narrowest of 1, 2, 4, … that finds it: {narrowest}")


def decode(options, parts, generator):
    """Yield the sentences that the options ask for; with --stream, print each while it is written."""
    place = (options.start, options.maxlen)
    temperature = 1.0 if options.temperature is None else options.temperature
    space = dict(temperature=0.0 if options.greedy else temperature, top_k=options.top_k, alpha=options.nucleus or 1.0)
    if options.exact:
        yield from exact(options, parts, space)
    elif options.beam and options.sample:
        yield from generate_distinct(*parts, options.beam, *place, generator=generator, **space)[: options.n]
    elif options.beam:
        n, min_length = options.n or 1, options.min_length
        yield from generate_beam(*parts, options.beam, *place, n=n, min_length=min_length, **space)
    else:
        for _ in range(1 if options.greedy else options.n or 1):
            write = stream(options.start) if options.stream else None
            yield generate(*parts, *place, write=write, generator=generator, **space)


def stream(start: str):
    """Begin a line with the start text; what is returned goes on with it, character by character."""
    print(f"  {start}", end="", flush=True)
    return lambda symbol: print(symbol, end="", flush=True)


def title(options) -> str:
    """What stands above a decoder's sentences."""
    if options.greedy:
        return "greedy"
    kind = "stochastic beam" if options.sample else "beam"
    said = "exact" if options.exact else f"{kind} of {options.beam}" if options.beam else "sampled"
    for value, words in (
        (options.temperature, "at temperature {}"),
        (options.top_k, "over the {} likeliest symbols"),
        (options.nucleus, "over the nucleus of {}"),
        (options.min_length, "with at least {} characters"),
    ):
        said += f" {words.format(value)}" if value else ""
    return said


def show(options, parts) -> None:
    """Print what the options ask for: sentences, scores, certificates, the trace if wanted."""
    print(f"\n{title(options)}")
    generator = torch.Generator().manual_seed(options.seed)
    first = True
    for hypothesis in decode(options, parts, generator):
        text = "" if options.stream else f"  {options.start}{hypothesis.text}"
        print(f"{text}{'' if hypothesis.ended else ' …'}\n    {facts(hypothesis, first)}")
        if options.trace:
            show_trace(hypothesis, options.start, parts, options.nucleus or NUCLEUS)
        first = False
    if first:
        print("    nothing: --min-length, --nucleus and --top-k leave no sentence")


def parse_options():
    """The command line's options; LabError for those that do not go together."""
    parser = Parser(prog="generate.py", description="Write sentences with a trained model.")
    add = parser.add_argument
    add("--greedy", action="store_true", help="take the likeliest symbol each time")
    add("--sample", action="store_true", help="draw each symbol; with --beam K, draw K different sentences")
    add("--beam", type=number(int, 1), metavar="K", help="beam search that keeps the K likeliest prefixes")
    add("--exact", action="store_true", help="the likeliest sentence, proved, and where a beam (of --beam K) loses it")
    add("--temperature", type=number(float, 0), metavar="T", help="draw at this temperature: below 1 bolder, 0 greedy")
    add("--top-k", type=number(int, 1), metavar="N", help="only the N likeliest symbols")
    add("--nucleus", type=number(float, 0, 1, above=True), metavar="ALPHA",
        help="only the likeliest symbols of mass ALPHA (after temperature and top-k)")  # fmt: skip
    add("--start", default="", metavar="TEXT", help="text that the sentence goes on from")
    add("--maxlen", type=number(int, 1, 2**20), default=MAXLEN, metavar="N", help="most new characters of a sentence")
    add("--min-length", type=number(int, 0), default=0, metavar="N", help="fewest, for --beam and --exact")
    add("--budget", type=number(int, 1), default=BUDGET, metavar="N", help="prefixes that --exact may expand")
    add("-n", type=number(int, 1), metavar="N", help="sentences of each decoder (default: 1; --beam K --sample: K)")
    add("--trace", action="store_true", help="the model's view of each sentence, symbol by symbol")
    add("--stream", action="store_true", help="print a greedy or sampled sentence as it is written")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the drawing")
    add("--checkpoint", type=Path, metavar="FILE",
        help="a best.pt or last.pt, or a run's folder (default: newest run's best.pt)")  # fmt: skip
    options = parser.parse_args()
    options.greedy = options.greedy or options.temperature == 0
    searched, drawn = bool(options.beam or options.exact), options.sample or bool(options.temperature)
    narrowed = bool(options.nucleus or options.top_k)
    for wrong, advice in (
        (options.greedy and (searched or drawn or narrowed),
         "--greedy (or --temperature 0) goes with no other decoder's options"),
        (options.greedy and options.n, "--greedy (or --temperature 0) writes one sentence: leave -n out"),
        (options.exact and options.sample, "--exact does not go with --sample"),
        (options.beam and not options.exact and (options.n or 1) > options.beam,
         f"-n {options.n} sentences need a beam of at least as many: --beam {options.n}"),
        (options.min_length > options.maxlen, f"--min-length {options.min_length} is above --maxlen {options.maxlen}"),
        (options.min_length and (options.sample or not searched), "--min-length goes with --beam or --exact"),
        (options.budget != BUDGET and not options.exact and (options.greedy or options.beam or drawn or narrowed),
         "--budget goes with --exact"),
        (options.stream and (searched or not (options.greedy or drawn or narrowed)),
         "--stream goes with --greedy, --sample, --temperature, --top-k or --nucleus, without --beam or --exact"),
    ):  # fmt: skip
        if wrong:
            parser.error(advice)
    options.sample = options.sample or ((drawn or narrowed) and not searched and not options.greedy)
    return options


def side_by_side(options):
    """The options of every decoder in turn, where none was asked for."""
    width = max(BEAM, options.n or 1)
    for chosen in (
        dict(greedy=True),
        dict(sample=True),
        dict(sample=True, temperature=0.5),
        dict(sample=True, nucleus=NUCLEUS),
        dict(beam=width),
        dict(beam=width, nucleus=NUCLEUS),
        dict(beam=width, sample=True),
        dict(exact=True),
    ):
        yield Namespace(**{**vars(options), **chosen})


def main() -> None:
    options = parse_options()
    path = options.checkpoint or newest_checkpoint()
    from tp5 import load_model  # tp5 imports this file

    model = load_model(path / "best.pt" if path.is_dir() else path)
    chosen = options.greedy or options.sample or options.beam or options.exact
    try:
        options.start = read_start(options.start)
        print(one_line(f"{path}: {model.cell}, start {options.start!r}, seed {options.seed}"))
        with torch.inference_mode():
            for each in [options] if chosen else side_by_side(options):
                show(each, (model.rnn, model.emb, model.decoder, EOS_IX))
    except ValueError as error:
        raise LabError(error) from None


if __name__ == "__main__":
    run_main(main)
