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
import sys
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from textloader import EOS_IX, LETTRES, PAD_IX, ArgumentParser, LabError, clean, code2string, encode
from textloader import find_checkpoint, guard, in_range, printable

MAXLEN = 200
BUDGET = 250_000  # prefixes that exact search reads before it gives up; each takes about 4 kB
FIRST_BEAM = 100  # width of the beam that exact search begins with
BATCH = 512  # prefixes that exact search reads at once
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
    """

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
    nucleus of mass `alpha` stays. LabError if the temperature is out of range.
    """
    if not 0 < temperature < math.inf:
        raise LabError(f"temperature is {temperature}, must be above 0 and finite")
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
    return encode(cleaned, lettres)


def reader(rnn, emb, decoder, eos: int, start: str):
    """A model as a function that reads symbols, after EOS and `start`, but for the last of these.

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
    Raises LabError for a temperature out of range or a start text outside the alphabet.
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
def beam_steps(model, k, start, maxlen, *, n, min_length=0, length_penalty=0.0, **warping):
    """The steps of `generate_beam`. After each symbol, yields what is kept, a dict, prefix (END for EOS) →
    Hypothesis, ended ones first, then the best first; and a bound on the score of all sentences that begin
    with a prefix that was let go.
    """
    eos, lettres = model[-1], alphabet_of(model[1])
    read, symbols, states = reader(*model, start)
    live, ended, bound = [Hypothesis()], [], NEVER
    penalty = [((5 + length) / 6) ** length_penalty for length in range(maxlen + 1)]
    for length in range(1, maxlen + 1):
        log_probs, states = read(symbols, states)  # (K, V)
        before = log_probs.new_tensor([h.score * penalty[length - 1] for h in live])
        scores = (before[:, None] + warp(log_probs, **warping)) / penalty[length]
        if length <= min_length:
            scores[:, eos] = NEVER
        best, places = scores.flatten().topk(min(k + 1, scores.numel()))
        last = log_probs.flatten()[places]
        children = {}  # Hypothesis → its place in (K, V)
        for score, place, log_prob in zip(best.tolist(), places.tolist(), last.tolist(), strict=True):
            row, symbol = divmod(place, scores.shape[1])
            text = live[row].text + code2string([symbol], lettres)
            log_prob += live[row].log_prob
            if score > NEVER:
                h = Hypothesis(text=text, log_prob=log_prob, ended=symbol == eos, score=score)
                children[h] = place
        competing = sorted([*ended, *children], key=lambda h: -h.score)
        # At best a prefix keeps its log-probability up to the largest penalty. (The last child may stand for
        # live ones below it.) If the best n have ended, and nothing can overtake them, let all others go.
        rise = penalty[length] / penalty[maxlen]
        at_best = [h.score * rise if h in children else h.score for h in competing]
        done = all(h.ended and h.score >= max(at_best[n:], default=NEVER) for h in competing[:n])
        width = n if done else k
        bound = max([bound, *at_best[width:]])
        ended = [h for h in competing[:width] if h.ended]
        live = [h for h in competing[:width] if not h.ended]
        yield {h.text + END * h.ended: h for h in [*ended, *live]}, bound
        if not live:
            return
        places = torch.tensor([children[h] for h in live])
        symbols, states = places % scores.shape[1], select_rows(states, places // scores.shape[1])


@torch.inference_mode()
def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=MAXLEN, *, n=None, **search):
    """Questions 6 and 7: beam search for the likeliest sentences; `alpha` below 1: nucleus beam.

    At every step the `k` likeliest prefixes are kept, live and ended together, so `k = 1` is greedy. A
    prefix's log-probability can only fall: so the largest among those let go bounds every sentence that
    ends within `maxlen` and is not returned. `gap` is that bound minus a sentence's own score, at least 0.

    search  `min_length` in characters; the options of `warp`; `length_penalty` A from 0 to 10: score and gap
            are then log-probability / ((5 + m) / 6)^A of m symbols, EOS counted (Wu et al. 2016)
    Returns `n` sentences (None: k) or fewer, best first, ended ones before those cut at `maxlen`.
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
class Unread:
    """Children, not read yet, of K prefixes that were read together; the likeliest first."""

    scores: torch.Tensor  # (N,) nats
    places: torch.Tensor  # (N,) in (K, V), the table of all children
    codes: torch.Tensor  # (K, length) of the prefixes
    states: tuple | torch.Tensor

    def __getitem__(self, which) -> "Unread":
        return replace(self, scores=self.scores[which], places=self.places[which])

    def __lt__(self, other) -> bool:  # in the heap: whose first is the likelier comes first
        return bool(self.scores[0] > other.scores[0])


@torch.inference_mode()
def exact_steps(model, start, maxlen, *, budget=BUDGET, min_length=0, **warping):
    """The steps of `generate_exact`: branch and bound (Land & Doig 1960), begun with a beam.

    After each batch of prefixes read, yields the best sentence known, a bound on the score of all others, and
    how many were read: of those that score above the best sentence, likeliest first, about `budget` at most.
    """
    by_beam = generate_beam(*model, FIRST_BEAM, start, maxlen, n=1, min_length=min_length, **warping)
    best = by_beam[0] if by_beam else Hypothesis(score=NEVER)
    to_beat = best.score if best.ended else NEVER
    yield best, 0.0, 0
    _, emb, _, eos = model
    read, symbols, states = reader(*model, start)
    codes = torch.empty(1, 0, dtype=torch.int64, device=emb.weight.device)
    scores, count = 0.0, 0
    frontier = []  # a heap
    while True:
        log_probs, states = read(symbols, states)
        scores = scores + warp(log_probs, **warping)  # (K, V)
        count += len(codes)
        best_end, row = scores[:, eos].max(0)
        if codes.shape[1] >= min_length and best_end > to_beat:
            to_beat = best_end.item()
            best = Hypothesis(text=code2string(codes[row], alphabet_of(emb)), ended=True, score=to_beat)
        scores[:, eos] = NEVER
        [places] = (scores.flatten() > to_beat).nonzero(as_tuple=True)
        if len(places) and codes.shape[1] + 1 < maxlen:
            ranked, order = scores.flatten()[places].sort(descending=True)
            heapq.heappush(frontier, Unread(ranked, places[order], codes, states))
        bound = frontier[0].scores[0].item() if frontier else NEVER
        yield best, bound, count
        if bound <= to_beat or count >= budget:
            return
        unread = heapq.heappop(frontier)
        unread = unread[unread.scores > to_beat]
        if len(unread.scores) > BATCH:
            heapq.heappush(frontier, unread[BATCH:])
        batch = unread[:BATCH]
        rows, symbols = batch.places // scores.shape[1], batch.places % scores.shape[1]
        scores, states = batch.scores[:, None], select_rows(batch.states, rows)
        codes = torch.cat([batch.codes[rows], symbols[:, None]], dim=1)


def generate_exact(rnn, emb, decoder, eos, start="", maxlen=MAXLEN, *, watch=iter, **search):
    """The likeliest sentence of at most `maxlen` symbols, in a list; where none ends, the beam's cut one.

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
SEARCH = ["start", "maxlen", *WARPING, "min_length"]
# The options that are each decoder's keyword arguments, and the others that it has a use for.
OPTIONS = {
    "greedy": (["start", "maxlen"], ["plain"]),
    "sample": (["start", "maxlen", *WARPING], ["plain", "n", "seed"]),
    "beam": ([*SEARCH, "n", "length_penalty"], ["plain", "tree"]),
    "exact": ([*SEARCH, "budget"], ["plain", "tree"]),
    "score": (["start"], []),
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
    add("--budget", type=count, default=BUDGET, metavar="N", help="exact: prefixes (4 kB) read (%(default)s)")
    add("-n", "--n", type=many, default=1, metavar="N", help="sentences to draw, or of a beam (%(default)s)")
    add("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="of the random draws (%(default)s)")
    add("--checkpoint", metavar="FILE", help="a checkpoint or a run's folder (the newest run's best.pt)")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--tree", action="store_true", help="draw what the beam kept and let go")
    layout.add_argument("--plain", action="store_true", help="print the sentences alone")
    # fmt: on
    return parser


def parts(model) -> tuple:
    """What every decoder takes first, of a `CharModel`."""
    return model.rnn, model.emb, model.decoder, EOS_IX


def chosen(options, names: list[str]) -> dict:
    """Of the command line's options those with these names."""
    return {name: getattr(options, name) for name in names}


def follow(options, steps):
    """Hand on the steps of exact search, shown: the beam's sentence, a bar on a terminal; Ctrl-C ends it."""
    best, bound, count = next(steps)
    yield best, bound, count
    to = sys.stderr if options.plain else sys.stdout
    print(f"  first, by beam search: {printable(options.start + best.text)} ({best.score:.2f} nats)", file=to)
    bar = tqdm(total=options.budget, disable=None, leave=False, unit=" read", unit_scale=True)
    with bar, suppress(KeyboardInterrupt):
        for best, bound, count in steps:
            bar.set_postfix_str(f"best {best.score:.2f}, bound {bound:.2f}", refresh=False)
            bar.update(count - bar.n)
            yield best, bound, count
    if bound > best.score:
        print(f"  gave up after {count:,} prefixes (--budget, or Ctrl-C)", file=to)


def decode(model, options) -> list[Hypothesis]:
    """What the decoder that the command line's options name writes with `model`, a `CharModel`."""
    decoder = next(name for name in OPTIONS if getattr(options, name))
    keywords = chosen(options, OPTIONS[decoder][0])
    if decoder == "beam":
        return generate_beam(*parts(model), options.beam, **keywords)
    if decoder == "exact":
        return generate_exact(*parts(model), watch=partial(follow, options), **keywords)
    generator = torch.Generator().manual_seed(options.seed)
    return [generate(*parts(model), generator=generator, **keywords) for _ in range(options.n)]


def show(h: Hypothesis, options) -> None:
    """Print a sentence, indented, with its scores and certificate."""
    bits = -h.log_prob / math.log(2) / (len(h.text) + h.ended)
    score = f"{h.score:.2f} with the options, " if abs(h.score - h.log_prob) > 0.005 else ""
    end = "ended" if h.ended else "cut at --maxlen"
    print("  " + f"{options.start}{h.text}".replace("\n", "\n  "))
    print(f"    {h.log_prob:.2f} nats, {score}{bits:.2f} bits per character, {end}")
    if h.gap == 0 and h.ended:
        print("    proved: none left out is likelier with these options")
    elif h.gap:
        print(f"    another may be up to {h.gap:.3g} likelier by its score")


def show_score(model, options) -> None:
    """Print how likely the text of --score is, and under each symbol its bits as a digit."""
    nats = symbol_scores(*parts(model), options.score, options.start)
    bits = -nats / math.log(2)
    print(f"  {nats.sum():.2f} nats, {bits.mean():.2f} bits per character; of each, with ■ for EOS:")
    shown = printable(options.start + clean(options.score, model.emb.lettres)[0]) + "■"
    digits = [" "] * len(options.start) + [f"{min(bit, 9):.0f}" for bit in bits.tolist()]
    widths = [1 + (unicodedata.east_asian_width(char) in "WF") for char in shown]  # columns on a terminal
    below = [digit.ljust(width) for digit, width in zip(digits, widths, strict=True)]
    length = 78 // max(widths)  # of a line
    for i in range(0, len(shown), length):
        print(f"  {shown[i : i + length]}\n  {''.join(below[i : i + length])}")


def tree_lines(scores: dict, marks: dict, start: str) -> list[str]:
    """Prefixes (→ score) as a tree below EOS and `start`; a line ends at a fork or at a prefix in `marks`."""
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
        label = printable(label.replace(END, "■")).replace(" ", "·")
        lines.append(f"{scores[prefix]:8.2f}  {corner}{label}  {marks.get(prefix, '')}".rstrip())
        corner, rail = "└─ ", "   " if len(rails) < 40 else ""  # a deep tree goes on below its parent
        for child in sorted(children[prefix], key=lambda child: (-size[child], scores[child])):
            stack.append((child, child[-1], rails + corner, rails + rail))  # the largest comes last
            corner, rail = "├─ ", "│  "
    return lines


@torch.inference_mode()
def show_tree(model, options, likeliest: Hypothesis | None = None) -> None:
    """Print the tree of the beam that the options name, and in it the likeliest sentence, if it is known."""
    k = options.beam or options.exact
    steps = [kept for kept, _ in beam_steps(parts(model), k, **chosen(options, OPTIONS["beam"][0]))]
    scores = {"": 0.0} | {prefix: h.score for kept in steps for prefix, h in kept.items()}
    marks = dict.fromkeys([*steps[-1]][: options.n], "◀ the beam's sentence")
    if likeliest:
        path = likeliest.text + END
        sums = symbol_scores(*parts(model), likeliest.text, options.start, **chosen(options, WARPING))
        scores |= {path[:i]: total for i, total in enumerate(sums.cumsum(0).tolist(), start=1)}
        marks[path] = "★ the likeliest sentence"
        lost = search_error(*parts(model), k, likeliest.text, **chosen(options, SEARCH))
        if lost:
            worst = min((h.score for h in steps[lost - 1].values()), default=NEVER)
            marks[path[:lost]] = f"✗ let go: the {k} that were kept had {worst:.2f} or more"
    print(f"  What a beam of {k} kept, and its score; · is a space, ■ EOS, ⏎ a line end.")
    print("\n".join(tree_lines(scores, marks, options.start)))


def where_a_beam_loses(model, text: str, options) -> str:
    """Where the beam that --exact names loses the optimum, and which wider one finds it."""
    lost_at = partial(search_error, *parts(model), text=text, **chosen(options, SEARCH))
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
    proved = [h for h in hypotheses if options.exact and h.ended and h.gap == 0]
    if proved and not options.plain:
        with suppress(NotImplementedError):  # in a handout, where `beam_steps` is optional
            print(f"    {where_a_beam_loses(model, proved[0].text, options)}")
    if options.tree:
        show_tree(model, options, *proved)


def main() -> None:
    parser = command_parser()
    options = parser.parse_args()
    decoder = next((name for name in OPTIONS if getattr(options, name) not in (None, False)), None)
    uses = {name: keywords + others for name, (keywords, others) in OPTIONS.items()}
    useful = uses[decoder] if decoder else ["start", "maxlen", "seed"]
    for name in sorted(set().union(*uses.values()).difference(useful)):
        if getattr(options, name) != parser.get_default(name):
            flag = name.replace("alpha", "nucleus").replace("_", "-")
            parser.error(f"--{flag} is for --{', --'.join(other for other in uses if name in uses[other])}")
    if options.beam and options.n > options.beam:
        parser.error(f"-n {options.n} needs --beam {options.n} or more")
    if options.min_length >= options.maxlen:
        parser.error("--min-length must be below --maxlen: else no sentence could end")
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
