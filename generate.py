"""Questions 3, 6 and 7: write sentences with a trained model, and say how far they are from the likeliest.

    python generate.py                 # every decoder side by side
    python generate.py --exact --start "They " --tree
    python generate.py --score "They need our help."

Decoders work on any `(rnn, emb, decoder)`: our cells or `torch.nn.RNN/GRU/LSTM`, a `torch.nn.Embedding`, a
linear layer to logits. They read EOS and the start text once, then advance the state symbol by symbol.
Shapes: K prefixes, H hidden, V symbols. Log-probabilities are in nats, in float64.
"""

import argparse
import heapq
import math
import shutil
import sys
import textwrap
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from textloader import EOS_IX, LETTRES, PAD_IX, ArgumentParser, LabError, clean, code2string
from textloader import find_checkpoint, guard, in_range, printable

MAXLEN = 200
BUDGET = 500_000  # prefixes that exact search reads before it gives up
FIRST_BEAM = 100  # width of the beam that exact search begins with
BATCH = 512  # prefixes that exact search reads at once
MEMORY = 10**9  # bytes that the prefixes which it has not read yet may take
NEVER = -math.inf  # the log-probability of what cannot happen
END = "\0"  # EOS in a prefix; shown as ■


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A sentence that a decoder wrote, or a prefix of one, and how likely it is (nats)."""

    text: str = ""  # the new characters, without start text, EOS or BLANK
    log_prob: float = 0.0  # of them, and of EOS where it ended, under the model itself
    ended: bool = False  # with EOS; False: cut at `maxlen`
    gap: float | None = None  # how much likelier one not returned may be; 0: none is; None: unknown
    score: float = 0.0  # under what was searched or drawn from, see `warp`


# ---------------------------------------------------------------------------------- distributions
def p_nucleus(decoder, alpha: float):
    """Question 7: the nucleus of a model's distribution (Holtzman et al. 2020).

    Returns `compute(h)`: hidden states (…, H) → probabilities (…, V) in which only the smallest set of
    likeliest symbols with mass at least `alpha` is left, renormalised; ties keep the order of the codes.
    Raises LabError unless 0 < alpha <= 1.
    """
    if not 0 < alpha <= 1:
        raise LabError(f"alpha is {alpha}, must be above 0 and at most 1")

    def compute(h):
        probs = decoder(h).softmax(-1)  # (…, V)
        if alpha == 1:
            return probs
        ranked, symbols = probs.sort(dim=-1, descending=True, stable=True)
        mass_before = ranked.cumsum(-1) - ranked  # of the symbols likelier than this one
        kept = mass_before < alpha - 4 * torch.finfo(probs.dtype).eps  # rounding is no mass
        kept[..., 0] = True
        nucleus = torch.zeros_like(probs).scatter(-1, symbols, ranked * kept)
        return nucleus / nucleus.sum(-1, keepdim=True)

    return compute


def warp(log_probs, temperature=1.0, top_k=None, alpha=1.0):
    """Log-probabilities (…, V) to search or draw by, made of a model's (…, V).

    In this order: `temperature` divides them, only the `top_k` likeliest symbols stay (None: all), only the
    nucleus of mass `alpha` stays. LabError if an option is out of range.
    """
    if not 0 < temperature < math.inf or (top_k is not None and top_k < 1):
        raise LabError(f"temperature {temperature} must be above 0 and finite, top_k {top_k} at least 1")
    if temperature != 1:  # the largest becomes 0 first, so that nothing overflows
        log_probs = ((log_probs - log_probs.amax(-1, keepdim=True)) / temperature).log_softmax(-1)
    if top_k:
        values, likeliest = log_probs.topk(min(top_k, log_probs.shape[-1]))
        log_probs = torch.full_like(log_probs, NEVER).scatter(-1, likeliest, values).log_softmax(-1)
    if alpha != 1:
        log_probs = p_nucleus(nn.Identity(), alpha)(log_probs).log()
    return log_probs


# -------------------------------------------------------------------------------- reading symbols
def without_blank(logits):
    """Logits (…, V) → log-probabilities in float64 of the next symbol, which is never BLANK."""
    blank = torch.tensor([PAD_IX], device=logits.device)
    return logits.double().index_fill(-1, blank, NEVER).log_softmax(-1)


def alphabet_of(emb) -> str:
    """The symbols that a model's embedding has vectors for; the handout's, if it does not say."""
    return getattr(emb, "lettres", LETTRES)


def codes_of(text: str, lettres: str = LETTRES) -> list[int]:
    """The codes of a text as a person types it; LabError if that would lose characters."""
    cleaned, _, dropped = clean(text, lettres)
    if dropped:
        raise LabError(f"the text has characters outside the alphabet: {' '.join(dropped)}")
    return [lettres.index(char) + 2 for char in cleaned]


def reader(rnn, emb, decoder, eos: int, start: str):
    """A model as a function that reads a symbol, with EOS and the start text read, but for the last symbol.

    Returns `read`, that last symbol (1,), and the states before it. `read(symbols, states)` takes K symbols
    (K,) and the states before them, and returns log-probabilities (K, V) of the next, and the states after.
    """
    table = rnn.project(emb.weight) if hasattr(rnn, "project") else None  # (V, G·H)

    def read(symbols, states):
        symbols = symbols.to(emb.weight.device)
        if table is None:
            output, states = rnn(emb(symbols)[None], states)  # (1, K, H)
        else:  # our cells: a look-up instead of a product
            output, states = rnn.unroll(table[symbols][None], states)
        return without_blank(decoder(output[0])), states

    symbols, states = torch.tensor([eos, *codes_of(start, alphabet_of(emb))]), None
    for symbol in symbols[:-1]:
        _, states = read(symbol[None], states)
    return read, symbols[-1:], states


def select_rows(states, rows):
    """The given rows (K,) of states: a tensor whose last axis but one is the batch, or a tuple of them."""
    if isinstance(states, tuple):
        return tuple(select_rows(state, rows) for state in states)
    return states.index_select(-2, rows.to(states.device))


@torch.inference_mode()
def generate(rnn, emb, decoder, eos, start="", maxlen=MAXLEN, *, temperature=0.0, generator=None, **warping):
    """Question 3: write one sentence, symbol by symbol, until EOS or `maxlen` symbols.

    temperature  0: greedy, always the likeliest symbol; above 0: a random one, at that temperature
    generator    a `torch.Generator` on the CPU for the drawing; None: torch's own
    warping      `top_k` and `alpha` narrow what is drawn from (see `warp`)
    Raises LabError for options out of range or a start text outside the alphabet.
    """
    read, symbol, states = reader(rnn, emb, decoder, eos, start)
    codes, log_prob, score = [], 0.0, 0.0
    while len(codes) < maxlen and eos not in codes[-1:]:
        log_probs, states = read(symbol, states)  # (1, V)
        warped = warp(log_probs, temperature or 1.0, **warping)
        if temperature == 0:
            symbol = warped.argmax(-1)
        else:
            symbol = torch.multinomial(warped[0].exp().cpu(), 1, generator=generator)
        codes.append(symbol.item())
        log_prob += log_probs[0, codes[-1]].item()
        score += warped[0, codes[-1]].item()
    text = code2string(codes, alphabet_of(emb))
    return Hypothesis(text=text, log_prob=log_prob, ended=eos in codes, score=score)


@torch.inference_mode()
def symbol_scores(rnn, emb, decoder, eos, text, start="", *, ended=True, **warping) -> torch.Tensor:
    """Log-probability (nats) of each symbol of `text` after `start`, and of EOS if `ended`, warped: (T,)."""
    before = [eos, *codes_of(start, alphabet_of(emb))]
    codes = codes_of(text, alphabet_of(emb)) + [eos] * ended
    inputs = torch.tensor([*before, *codes[:-1]], device=emb.weight.device)
    output, _ = rnn(emb(inputs)[:, None])  # (T, 1, H), one forward pass
    log_probs = warp(without_blank(decoder(output[len(before) - 1 :, 0])), **warping)
    return log_probs[range(len(codes)), codes]


def score(rnn, emb, decoder, eos, text, start="", *, ended=True) -> float:
    """Log-probability (nats) of `text` after `start`; EOS included if `ended`."""
    return symbol_scores(rnn, emb, decoder, eos, text, start, ended=ended).sum().item()


# ------------------------------------------------------------------------------------ beam search
def likeliest_children(live, log_probs, sums, count: int, eos: int, penalty: float, lettres: str) -> list:
    """The `count` best children of the prefixes `live`: (hypothesis, row of its parent, symbol), best first.

    log_probs (K, V) are those of their last symbols, `sums` (K, V) those over all symbols, before `penalty`.
    """
    best, places = sums.flatten().topk(min(count, sums.numel()))
    last = log_probs.flatten()[places]
    children = []
    for total, place, log_prob in zip(best.tolist(), places.tolist(), last.tolist(), strict=True):
        row, symbol = divmod(place, sums.shape[1])
        if total > NEVER:
            text = live[row].text + code2string([symbol], lettres)
            log_prob += live[row].log_prob
            h = Hypothesis(text=text, log_prob=log_prob, ended=symbol == eos, score=total / penalty)
            children.append((h, row, symbol))
    return children


def beam_steps(model, k, start, maxlen, *, n, min_length=0, length_penalty=0.0, **warping):
    """The steps of `generate_beam`. After each symbol, yields

    what is kept: a dict, prefix (END for EOS) → Hypothesis, ended ones first, then the best first;
    a bound on the score of all sentences that begin with a prefix that was let go.
    """
    if k < 1 or min_length >= maxlen or not 0 <= length_penalty <= 10:  # else no sentence could end
        ranges = "k (--beam) must be at least 1, min_length below maxlen, length_penalty from 0 to 10"
        given = f"k is {k}, min_length {min_length}, maxlen {maxlen}, length_penalty {length_penalty}"
        raise LabError(f"{ranges}: {given}")
    read, symbols, states = reader(*model, start)
    eos, lettres = model[-1], alphabet_of(model[1])
    live, ended, bound = [Hypothesis()], [], NEVER
    penalty = [((5 + length) / 6) ** length_penalty for length in range(maxlen + 1)]
    for length in range(1, maxlen + 1):
        log_probs, states = read(symbols, states)  # (K, V)
        before = log_probs.new_tensor([h.score * penalty[length - 1] for h in live])
        sums = before[:, None] + warp(log_probs, **warping)
        if length <= min_length:
            sums[:, eos] = NEVER
        competing = [(h, None, eos) for h in ended]
        competing += likeliest_children(live, log_probs, sums, k + 1, eos, penalty[length], lettres)
        competing.sort(key=lambda child: -child[0].score)
        # At best a prefix keeps its log-probability up to the largest penalty. (The last child may stand for
        # live ones below it.) If the best n have ended, and nothing can overtake them, let all others go.
        rise = penalty[length] / penalty[maxlen]
        at_best = [h.score if row is None else h.score * rise for h, row, _ in competing]
        best = [h for h, _, _ in competing[:n]]
        done = all(h.ended for h in best) and all(score <= best[-1].score for score in at_best[n:])
        width = n if done else k
        bound = max([bound, *at_best[width:]])
        ended = [h for h, _, _ in competing[:width] if h.ended]
        going_on = [child for child in competing[:width] if not child[0].ended]
        live = [h for h, _, _ in going_on]
        yield {h.text + END * h.ended: h for h in [*ended, *live]}, bound
        if not live:
            return
        symbols = torch.tensor([symbol for _, _, symbol in going_on])
        states = select_rows(states, torch.tensor([row for _, row, _ in going_on]))


@torch.inference_mode()
def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=MAXLEN, *, n=None, **search):
    """Questions 6 and 7: beam search for the likeliest sentences; `alpha` below 1: nucleus beam.

    At every step the `k` likeliest prefixes are kept, live and ended together, so `k = 1` is greedy. A
    prefix's log-probability can only fall: so the largest among those let go bounds every sentence that
    ends within `maxlen` and is not returned. `gap` is that bound minus a sentence's own score, at least 0.

    search  `min_length` in characters; the options of `warp`; `length_penalty` A for longer sentences: score
            and gap are then log-probability / ((5 + m) / 6)^A of m symbols, EOS counted (Wu et al. 2016)
    Returns `n` sentences (None: k), best first, ended ones before those cut at `maxlen`; fewer where the
    options leave no way on. Raises LabError as `generate`.
    """
    n = min(n or k, k)
    for step in beam_steps((rnn, emb, decoder, eos), k, start, maxlen, n=n, **search):
        kept, bound = step
    return [replace(h, gap=max(0.0, bound - h.score)) for h in [*kept.values()][:n]]


@torch.inference_mode()
def search_error(rnn, emb, decoder, eos, k, text, start="", maxlen=MAXLEN, **search) -> int | None:
    """The step (from 1) at which a beam of `k` loses the sentence `text`; None if it keeps it to the end."""
    steps = enumerate(beam_steps((rnn, emb, decoder, eos), k, start, maxlen, n=k, **search), start=1)
    return next((step for step, (kept, _) in steps if (text + END)[:step] not in kept), None)


# ----------------------------------------------------------------------------------- exact search
@dataclass
class Children:
    """The children, not read yet, of K prefixes that were read together; the likeliest first."""

    scores: torch.Tensor  # (N,) nats
    places: torch.Tensor  # (N,) in (K, V), the table of all children
    codes: torch.Tensor  # (K, length) of the prefixes
    states: tuple | torch.Tensor
    nbytes: int

    def __getitem__(self, which) -> "Children":
        return replace(self, scores=self.scores[which], places=self.places[which])

    def __lt__(self, other) -> bool:  # in the heap: whose first is the likelier comes first
        return bool(self.scores[0] > other.scores[0])


def children_above(score: float, scores, codes, states) -> Children:
    """Of the children (K, V) of the prefixes `codes`, those with a better score than `score`."""
    scores = scores.flatten()
    [places] = (scores > score).nonzero(as_tuple=True)
    scores, order = scores[places].sort(descending=True)
    nbytes = sum(tensor.nbytes for tensor in (scores, places, codes, *states))
    return Children(scores, places[order], codes, states, nbytes)


@torch.inference_mode()
def exact_steps(model, start, maxlen, *, budget=BUDGET, memory=MEMORY, min_length=0, **warping):
    """The steps of `generate_exact`: branch and bound (Land & Doig 1960), begun with a beam.

    After each batch of prefixes read, yields the best sentence known, a bound on the score of all others, and
    how many prefixes were read. Only those that score above the best sentence are read, the likeliest first.
    Gives up after about `budget` prefixes, or when those not read yet take `memory` bytes.
    """
    by_beam = generate_beam(*model, FIRST_BEAM, start, maxlen, n=1, min_length=min_length, **warping)
    best = by_beam[0] if by_beam else Hypothesis(score=NEVER)
    to_beat = best.score if best.ended else NEVER
    yield best, 0.0, 0
    _, emb, _, eos = model
    read, symbols, states = reader(*model, start)
    codes = torch.empty(1, 0, dtype=torch.int64, device=emb.weight.device)
    scores, frontier, count = 0.0, [], 0
    while True:
        log_probs, states = read(symbols, states)
        scores = scores + warp(log_probs, **warping)  # (K, V)
        count += len(codes)
        best_end, row = scores[:, eos].max(0)
        if codes.shape[1] >= min_length and best_end > to_beat:
            to_beat = best_end.item()
            best = Hypothesis(text=code2string(codes[row], alphabet_of(emb)), ended=True, score=to_beat)
        scores[:, eos] = NEVER
        children = children_above(to_beat, scores, codes, states)
        if len(children.scores) and codes.shape[1] + 1 < maxlen:
            heapq.heappush(frontier, children)
        bound = frontier[0].scores[0].item() if frontier else NEVER
        yield best, bound, count
        if bound <= to_beat or count >= budget or sum(c.nbytes for c in frontier) > memory:
            return
        children = heapq.heappop(frontier)
        children = children[children.scores > to_beat]
        if len(children.scores) > BATCH:
            heapq.heappush(frontier, children[BATCH:])
        batch = children[:BATCH]
        rows, symbols = batch.places // scores.shape[1], batch.places % scores.shape[1]
        scores, states = batch.scores[:, None], select_rows(batch.states, rows)
        codes = torch.cat([batch.codes[rows], symbols[:, None]], dim=1)


def generate_exact(rnn, emb, decoder, eos, start="", maxlen=MAXLEN, *, watch=iter, **search):
    """The likeliest sentence of at most `maxlen` symbols, in a list; an empty list where there is none.

    Its `gap` is 0 if it is proved, else how much better the optimum may be. For `search` see `exact_steps`;
    `watch` is a function that hands on its steps, and may end them. Raises LabError as `generate`.
    """
    model = (rnn, emb, decoder, eos)
    for step in watch(exact_steps(model, start, maxlen, **search)):
        best, bound, _ = step
    if best.score == NEVER:
        return []
    log_prob = score(*model, best.text, start, ended=best.ended)
    return [replace(best, log_prob=log_prob, gap=max(0.0, bound - best.score))]


# ----------------------------------------------------------------------------------- command line
WARPING = ["temperature", "top_k", "alpha"]
BEAM = ["n", "min_length", "length_penalty"]
# Each decoder's options, beside --start and --checkpoint.
OPTIONS = {
    "greedy": ["maxlen", "plain"],
    "sample": ["maxlen", "plain", *WARPING, "n", "seed"],
    "beam": ["maxlen", "plain", *WARPING, *BEAM, "tree"],
    "exact": ["maxlen", "plain", *WARPING, "min_length", "budget", "tree"],
    "score": [],
}
# Name → options. Without a decoder all are shown; `tp5.py` writes its samples with all but exact search.
DECODERS = {
    "greedy": "--greedy",
    "sampled": "--sample",
    "cooler": "--sample --temperature 0.5",
    "nucleus": "--sample --nucleus 0.9",
    "beam": "--beam 5",
    "nucleus beam": "--beam 5 --nucleus 0.9",
    "exact": "--exact",
}


def command_parser() -> ArgumentParser:
    """All options of the command line, with their ranges and defaults."""
    about = "Write sentences with a trained model; without a decoder, with each. (Defaults in parentheses.)"
    parser = ArgumentParser(description=about, allow_abbrev=False)
    decoder = parser.add_mutually_exclusive_group()
    width, many, count = in_range(int, 1, 4096), in_range(int, 1, 10_000), in_range(int, 0, 10**9)
    add = parser.add_argument
    # fmt: off
    decoder.add_argument("--greedy", action="store_true", help="take the likeliest symbol each time")
    decoder.add_argument("--sample", action="store_true", help="draw each symbol")
    decoder.add_argument("--beam", type=width, metavar="K", help="beam search: keep the K likeliest prefixes")
    decoder.add_argument("--exact", type=width, nargs="?", const=5, metavar="K",
                         help="the likeliest sentence, proved, and where a beam of K (5) loses it")
    decoder.add_argument("--score", metavar="TEXT", help="no decoder: how likely is TEXT, symbol by symbol")
    add("--temperature", type=in_range(float, 0, 1000), default=1.0, metavar="T",
        help="divide the logits by T: below 1 safer, above 1 bolder; sampling at 0 is greedy (%(default)s)")
    add("--top-k", type=width, metavar="N", help="only the N likeliest symbols (all)")
    add("--nucleus", type=in_range(float, 1e-9, 1), default=1.0, metavar="ALPHA", dest="alpha",
        help="only the likeliest symbols of mass ALPHA, after temperature and top-k (%(default)s)")
    add("--start", default="", metavar="TEXT", help="text that the sentence goes on from")
    add("--maxlen", type=many, default=MAXLEN, metavar="N", help="most symbols to write (%(default)s)")
    add("--min-length", type=count, default=0, metavar="N", help="fewest characters (%(default)s)")
    add("--length-penalty", type=in_range(float, 0, 10), default=0.0, metavar="A",
        help="rank a beam by log-probability / ((5 + length) / 6)^A, for longer sentences (%(default)s)")
    add("--budget", type=count, default=BUDGET, metavar="N", help="prefixes --exact may read (%(default)s)")
    add("-n", "--n", type=many, default=1, metavar="N", help="sentences to draw, or of a beam (%(default)s)")
    add("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="of the random draws (%(default)s)")
    add("--checkpoint", metavar="FILE", help="a checkpoint or a run's folder (the newest run's best.pt)")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--tree", action="store_true", help="draw what the beam kept and let go")
    layout.add_argument("--plain", action="store_true", help="print the sentences alone")
    # fmt: on
    return parser


def refuse_useless(parser, options, decoder: str | None) -> None:
    """End with argparse's error if an option was given that does nothing for the decoder (None: for all)."""
    useful = OPTIONS[decoder] if decoder else ["maxlen", "seed"]
    for name in sorted(set().union(*OPTIONS.values()).difference(useful)):
        if getattr(options, name) != parser.get_default(name):
            flag = name.replace("alpha", "nucleus").replace("_", "-")
            why = f"does nothing for --{decoder}" if decoder else "needs a decoder"
            uses = ", ".join(f"--{other}" for other in OPTIONS if name in OPTIONS[other])
            parser.error(f"--{flag} {why}: it is for {uses}")
    if options.beam and options.n > options.beam:
        parser.error(f"-n {options.n} needs --beam {options.n} or more")


def parts(model) -> tuple:
    """What every decoder takes first, of a `CharModel`."""
    return model.rnn, model.emb, model.decoder, EOS_IX


def chosen(options, *names: str) -> dict:
    """Of the command line's options those with these names, and those that all but greedy take."""
    return {name: getattr(options, name) for name in ("start", "maxlen", *WARPING, *names)}


def follow(options, steps):
    """Hand on the steps of exact search, shown: the beam's sentence, a bar on a terminal; Ctrl-C ends it."""
    out = sys.stderr if options.plain else sys.stdout
    why = f"the memory for them ({MEMORY:,} bytes) is full"
    best, bound, count = next(steps)
    yield best, bound, count
    first = printable(options.start + best.text)
    print(f"  first, by beam search: {first} ({best.score:.2f} nats)", file=out)
    try:
        with tqdm(total=options.budget, disable=None, leave=False, unit=" read", unit_scale=True) as bar:
            for best, bound, count in steps:
                bar.set_postfix_str(f"best {best.score:.2f}, bound {bound:.2f}", refresh=False)
                bar.update(count - bar.n)
                yield best, bound, count
    except KeyboardInterrupt:
        why = "Ctrl-C"
    if bound > best.score:
        why = "--budget" if count >= options.budget else why
        print(f"  gave up after {min(count, options.budget):,} prefixes: {why}", file=out)


def decode(model, options) -> list[Hypothesis]:
    """What the decoder that the command line's options name writes with `model`, a `CharModel`."""
    if options.greedy:
        return [generate(*parts(model), options.start, options.maxlen)]
    if options.beam:
        return generate_beam(*parts(model), options.beam, **chosen(options, *BEAM))
    if options.exact:
        search = chosen(options, "min_length", "budget")
        return generate_exact(*parts(model), watch=partial(follow, options), **search)
    generator = torch.Generator().manual_seed(options.seed)
    return [generate(*parts(model), generator=generator, **chosen(options)) for _ in range(options.n)]


def show(h: Hypothesis, options) -> None:
    """Print a sentence, indented, with its scores and certificate."""
    text = f"{options.start}{h.text}{'' if h.ended else ' [cut]'}"
    bits = -h.log_prob / math.log(2) / (len(h.text) + h.ended)
    score = f"{h.score:.2f} with the options, " if abs(h.score - h.log_prob) > 0.005 else ""
    end = "ended" if h.ended else "cut at --maxlen"
    print("  " + text.replace("\n", "\n  "))
    print(f"    {h.log_prob:.2f} nats, {score}{bits:.2f} bits per character, {end}")
    if h.gap == 0 and h.ended:
        print("    proved: none left out is likelier with these options")
    elif h.gap:
        unit = "better with the options" if options.length_penalty else "nats likelier"
        print(f"    another may be up to {h.gap:.3g} {unit}")


def show_score(model, options) -> None:
    """Print how likely the text of --score is, and under each symbol its bits as a digit."""
    lettres = model.emb.lettres
    text = code2string(codes_of(options.score, lettres), lettres)
    nats = symbol_scores(*parts(model), text, options.start)
    bits = -nats / math.log(2)
    print(f"  {nats.sum():.2f} nats, {bits.mean():.2f} bits per character; of each, with ■ for EOS:")
    shown = printable(options.start + text) + "■"

    def width(char):  # of a terminal's columns a Chinese character takes two
        return 2 if unicodedata.east_asian_width(char) in "WF" else 1

    digits = " " * len(options.start) + "".join(f"{min(bit, 9):.0f}" for bit in bits.tolist())
    length = max(20, shutil.get_terminal_size().columns - 2) // max(map(width, shown))  # of a line
    for i in range(0, len(shown), length):
        line = shown[i : i + length]
        below = [digit.ljust(width(char)) for char, digit in zip(line, digits[i:], strict=False)]
        print(f"  {line}\n  {''.join(below)}")


def tree_lines(scores: dict, marks: dict, start: str, width: int) -> list[str]:
    """A tree of prefixes (→ score), drawn in `width` columns below EOS and the text `start`.

    A line is a branch: up to a fork, or to a prefix that `marks` says something of.
    """
    size = dict.fromkeys(scores, 1)  # of each prefix's own tree
    children = {prefix: [] for prefix in scores}
    for prefix in sorted(scores, key=len, reverse=True)[:-1]:
        children[prefix[:-1]].append(prefix)
        size[prefix[:-1]] += size[prefix]
    lines, stack = [], [("", END + start, "", "")]
    while stack:
        prefix, label, corner, rails = stack.pop()
        while len(children[prefix]) == 1 and prefix not in marks:
            [prefix] = children[prefix]
            label += prefix[-1]
        said = f"{printable(label.replace(END, '■')).replace(' ', '·')}  {marks.get(prefix, '')}"
        first, *more = textwrap.wrap(said, max(20, width - 13 - len(rails)), break_on_hyphens=False)
        lines.append(f"{scores[prefix]:8.2f}  {corner}{first}")
        lines += [f"{'':10}{rails}{'│' if children[prefix] else ' '}  {part}" for part in more]
        # The largest comes last: where the tree is too deep for the terminal, it goes on below its parent.
        below = sorted(children[prefix], key=lambda child: (-size[child], scores[child]))
        corner, rail = "└─ ", "   " if len(rails) < width // 2 else ""
        for child in below:
            stack.append((child, child[-1], rails + corner, rails + rail))
            corner, rail = "├─ ", "│  "
    return lines


@torch.inference_mode()
def show_tree(model, options, likeliest: Hypothesis | None) -> None:
    """Print the tree of the beam that the options name, and in it the likeliest sentence, if it is known."""
    k = options.beam or options.exact
    steps = [kept for kept, _ in beam_steps(parts(model), k, **chosen(options, *BEAM))]
    scores = {"": 0.0} | {prefix: h.score for kept in steps for prefix, h in kept.items()}
    marks = dict.fromkeys([*steps[-1]][: options.n], "◀ the beam's sentence")
    if likeliest:
        path = likeliest.text + END
        warping = {name: getattr(options, name) for name in WARPING}
        sums = symbol_scores(*parts(model), likeliest.text, options.start, **warping).cumsum(0).tolist()
        scores |= {path[:i]: total for i, total in enumerate(sums, start=1)}
        marks[path] = "★ the likeliest sentence"
        lost = search_error(*parts(model), k, likeliest.text, **chosen(options, "min_length"))
        if lost:
            worst = min((h.score for h in steps[lost - 1].values()), default=NEVER)
            marks[path[:lost]] = f"✗ let go: the {k} that were kept had {worst:.2f} or more"
    print(f"  What a beam of {k} kept, and its score; · is a space, ■ EOS, ⏎ a line end.")
    print("\n".join(tree_lines(scores, marks, options.start, shutil.get_terminal_size().columns)))


def where_a_beam_loses(model, text: str, options) -> str:
    """Where the beam that --exact names loses the optimum, and which wider one finds it."""
    lost_at = partial(search_error, *parts(model), text=text, **chosen(options, "min_length"))
    k, step = options.exact, lost_at(options.exact)
    if step is None:
        return f"a beam of {k} finds it, too"
    wider = (2**power for power in range(k.bit_length(), 13))
    enough = next((f"one of {width}" for width in wider if lost_at(width) is None), "not even one of 4096")
    return f"a beam of {k} loses it at step {step} ({text[:step]!r}); {enough} finds it"


def write(model, options) -> None:
    """Print what the chosen decoder writes; LabError if that is nothing."""
    hypotheses = decode(model, options)
    if not hypotheses:
        raise LabError("--min-length, --nucleus and --top-k leave no sentence")
    for h in hypotheses:
        print(f"{options.start}{h.text}") if options.plain else show(h, options)
    best = hypotheses[0]
    likeliest = best if options.exact and best.ended and best.gap == 0 else None
    if likeliest and not options.plain:
        with suppress(NotImplementedError):  # in a handout, where `beam_steps` is optional
            print(f"    {where_a_beam_loses(model, likeliest.text, options)}")
    if options.tree:
        show_tree(model, options, likeliest)


def main() -> None:
    parser = command_parser()
    options = parser.parse_args()
    decoder = next((name for name in OPTIONS if getattr(options, name) not in (None, False)), None)
    refuse_useless(parser, options, decoder)
    file = find_checkpoint(options.checkpoint, "best.pt")
    from tp5 import load  # tp5 imports this file

    run = load(file, device="cpu")
    model = run.model
    start = code2string(codes_of(options.start, model.emb.lettres), model.emb.lettres)
    options = argparse.Namespace(**vars(options) | {"start": start})
    if not options.plain:
        print(printable(f"{file}: {run.options.model}, start {start!r}, seed {options.seed}"))
    if decoder == "score":
        show_score(model, options)
    elif decoder:
        write(model, options)
    else:
        for arguments in DECODERS.values():
            print(f"\n{arguments}")
            write(model, parser.parse_args(arguments.split(), argparse.Namespace(**vars(options))))


if __name__ == "__main__":
    guard(main)
