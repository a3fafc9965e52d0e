"""Questions 3, 6 and 7: write sentences with a trained model, and say how far they are from the likeliest.

    python generate.py                 # every decoder side by side
    python generate.py --beam 5 --nucleus 0.9 --start "Our "
    python generate.py --exact --min-length 20

Every search works on any `(rnn, emb, decoder)`: our cells or `torch.nn.RNN/GRU/LSTM`, a `torch.nn.Embedding`,
a linear layer to logits. It reads EOS and the start text once, then advances the state symbol by symbol.
Shapes: K beams or prefixes, H hidden, V symbols. Log-probabilities are in nats, in float64.
"""

import argparse
import heapq
import math
from collections import deque
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from textloader import EOS_IX, PAD_IX, LabError, clean, code2string, find_checkpoint, guard, in_range
from textloader import lettre2id, printable

MAXLEN = 200
BUDGET = 500_000  # prefixes that exact search reads before it gives up
FIRST_BEAM = 100  # width of the beam that exact search begins with
BATCH = 512  # prefixes that exact search reads at once
NEVER = -math.inf  # the log-probability of what cannot happen


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
        ranges = "temperature must be above 0 and finite, top_k at least 1"
        raise LabError(f"{ranges}: they are {temperature} and {top_k}")
    if temperature != 1:  # the largest becomes 0 first, so that nothing overflows
        log_probs = ((log_probs - log_probs.amax(-1, keepdim=True)) / temperature).log_softmax(-1)
    if top_k:
        values, likeliest = log_probs.topk(min(top_k, log_probs.shape[-1]))
        log_probs = torch.full_like(log_probs, NEVER).scatter(-1, likeliest, values).log_softmax(-1)
    if alpha != 1:
        log_probs = p_nucleus(nn.Identity(), alpha)(log_probs).log()
    return log_probs


# ---------------------------------------------------------------------------------- reading symbols
def without_blank(logits):
    """Logits (…, V) → log-probabilities in float64 of the next symbol, which is never BLANK."""
    blank = torch.tensor([PAD_IX], device=logits.device)
    return logits.double().index_fill(-1, blank, NEVER).log_softmax(-1)


def reader(rnn, emb, decoder):
    """A model as a function that reads one symbol of each of K prefixes.

    `read(symbols, states)`: symbols (K,), and the states after what was read before (None: nothing) →
    log-probabilities (K, V) of the next symbols, and the states after.
    """
    table = rnn.project(emb.weight) if hasattr(rnn, "project") else None  # (V, G·H)

    def read(symbols, states):
        symbols = symbols.to(emb.weight.device)
        if table is None:
            output, states = rnn(emb(symbols)[None], states)  # (1, K, H)
        else:  # our cells: a look-up instead of a product
            output, states = rnn.unroll(table[symbols][None], states)
        return without_blank(decoder(output[0])), states

    return read


def read_start(read, eos: int, start: str):
    """Read EOS and the start text, all but the last symbol: returns that symbol (1,), and the states."""
    symbols = torch.tensor([eos, *codes_of(start)])
    states = None
    for symbol in symbols[:-1]:
        _, states = read(symbol[None], states)
    return symbols[-1:], states


def codes_of(text: str) -> list[int]:
    """The codes of a text as a person types it; LabError if that would lose characters."""
    cleaned, dropped = clean(text)
    if dropped:
        raise LabError(f"the text has characters outside the alphabet: {' '.join(dropped)}")
    return [lettre2id[char] for char in cleaned]


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
    read = reader(rnn, emb, decoder)
    symbol, states = read_start(read, eos, start)
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
    return Hypothesis(text=code2string(codes), log_prob=log_prob, ended=eos in codes, score=score)


@torch.inference_mode()
def score(rnn, emb, decoder, eos, text, start="", *, ended=True) -> float:
    """Log-probability (nats) of `text`, in symbols of LETTRES, after `start`; EOS included if `ended`."""
    before = [eos, *codes_of(start)]
    codes = [lettre2id[char] for char in text] + [eos] * ended
    inputs = torch.tensor([*before, *codes[:-1]], device=emb.weight.device)
    output, _ = rnn(emb(inputs)[:, None])  # (T, 1, H), one forward pass
    log_probs = without_blank(decoder(output[len(before) - 1 :, 0]))
    return log_probs[range(len(codes)), codes].sum().item()


# ------------------------------------------------------------------------------------ beam search
def likeliest_children(live, log_probs, scores, count: int, eos: int) -> list[tuple]:
    """The `count` best among all prefixes in `live`, longer by a symbol: (hypothesis, row, symbol) each.

    log_probs, scores  (K, V): of each next symbol alone; of each prefix with it
    """
    best, places = scores.flatten().topk(min(count, scores.numel()))
    log_probs = log_probs.flatten()[places]
    children = []
    for total, place, log_prob in zip(best.tolist(), places.tolist(), log_probs.tolist(), strict=True):
        if total > NEVER:
            row, symbol = divmod(place, scores.shape[1])
            text, log_prob = live[row].text + code2string([symbol]), live[row].log_prob + log_prob
            child = Hypothesis(text=text, log_prob=log_prob, ended=symbol == eos, score=total)
            children.append((child, row, symbol))
    return children


def beam_steps(read, eos, k, start, maxlen, n, min_length=0, **warping):
    """Beam search: after each symbol yields the live and the ended prefixes that are kept, best first,
    and the largest score (nats) among all that were let go so far."""
    symbols, states = read_start(read, eos, start)
    live, ended, bound = [Hypothesis()], [], NEVER
    for length in range(1, maxlen + 1):
        log_probs, states = read(symbols, states)  # (K, V)
        scores = warp(log_probs, **warping)
        scores = scores + scores.new_tensor([h.score for h in live])[:, None]
        if length <= min_length:
            scores[:, eos] = NEVER
        competing = [(h, None, eos) for h in ended] + likeliest_children(live, log_probs, scores, k + 1, eos)
        competing.sort(key=lambda child: -child[0].score)

        # If the best n have ended, nothing can overtake them: let all others go.
        width = n if all(h.ended for h, _, _ in competing[:n]) else k
        bound = max([bound, *(h.score for h, _, _ in competing[width:])])
        ended = [h for h, _, _ in competing[:width] if h.ended]
        going_on = [child for child in competing[:width] if not child[0].ended]
        live = [h for h, _, _ in going_on]
        yield live, ended, bound
        if not live:
            return
        symbols = torch.tensor([symbol for _, _, symbol in going_on])
        states = select_rows(states, torch.tensor([row for _, row, _ in going_on]))


@torch.inference_mode()
def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=MAXLEN, *, n=None, min_length=0, **warping):
    """Questions 6 and 7: beam search for the likeliest sentences; `alpha` below 1: nucleus beam.

    At every step the `k` likeliest prefixes are kept, live and ended together, so `k = 1` is greedy. A
    prefix's log-probability can only fall: so the largest among those let go bounds every sentence that
    ends within `maxlen` and is not returned. `gap` is that bound minus a sentence's own score, at least 0.

    Returns `n` sentences (None: k) of at least `min_length` characters, best first, ended ones before those
    cut at `maxlen`; fewer where `min_length` and `warping`, the options of `warp`, leave no way on.
    Raises LabError as `generate`.
    """
    if k < 1 or min_length >= maxlen:  # no sentence could end
        given = f"k is {k}, min_length {min_length}, maxlen {maxlen}"
        raise LabError(f"k must be at least 1 and min_length below maxlen: {given}")
    n = min(n or k, k)
    steps = beam_steps(reader(rnn, emb, decoder), eos, k, start, maxlen, n, min_length, **warping)
    live, ended, bound = deque(steps, maxlen=1).pop()  # after the last step
    return [replace(h, gap=max(0.0, bound - h.score)) for h in [*ended, *live][:n]]


@torch.inference_mode()
def search_error(rnn, emb, decoder, eos, k, text, start="", maxlen=MAXLEN, *, min_length=0, **warping):
    """The step (from 1) at which a beam of `k` loses the sentence `text`; None if it keeps it to the end."""
    steps = beam_steps(reader(rnn, emb, decoder), eos, k, start, maxlen, k, min_length, **warping)
    for step, (live, ended, _) in enumerate(steps, start=1):
        kept = [h.text for h in live] if step <= len(text) else [h.text for h in ended]
        if text[:step] not in kept:
            return step
    return None


# ----------------------------------------------------------------------------------- exact search
@dataclass(order=True)
class Children:
    """Prefixes of one length that exact search has not read yet, at most BATCH, the likeliest first."""

    loss: float  # of the likeliest: its score, negated, since a heap gives its smallest first
    scores: torch.Tensor = field(compare=False)  # (K,) nats
    symbols: torch.Tensor = field(compare=False)  # (K,) their last ones
    rows: torch.Tensor = field(compare=False)  # (K,) where their parents stand in `texts` and `states`
    texts: list[str] = field(compare=False)
    states: tuple | torch.Tensor = field(compare=False)

    def above(self, score: float):
        """Those with a better score, ready to be read: scores, symbols, texts, and their parents' states."""
        better = self.scores > score
        symbols, rows = self.symbols[better], self.rows[better]
        pairs = zip(rows.tolist(), symbols.tolist(), strict=True)
        texts = [self.texts[row] + code2string([symbol]) for row, symbol in pairs]
        return self.scores[better], symbols, texts, select_rows(self.states, rows)


def children_above(score: float, scores, texts, states) -> list[Children]:
    """All children (K, V) with a better score than `score`, in batches, the likeliest first."""
    rows, symbols = (scores > score).nonzero(as_tuple=True)
    scores = scores[rows, symbols]
    order = scores.argsort(descending=True)
    parts = order.split(BATCH) if len(order) else ()
    return [Children(-scores[i[0]].item(), scores[i], symbols[i], rows[i], texts, states) for i in parts]


@torch.inference_mode()
def generate_exact(
    rnn, emb, decoder, eos, start="", maxlen=MAXLEN, *, budget=BUDGET, min_length=0, **warping
):
    """The likeliest sentence of at most `maxlen` symbols (branch and bound): a list of one, or none.

    A prefix is read only while it scores above the best sentence known, at first a beam's. The frontier is
    a heap of batches of children, the one with the likeliest child first. After `budget` prefixes the
    search gives up; `gap` then says how much better the optimum may be, and 0 is a proof.
    """
    model = (rnn, emb, decoder, eos)
    by_beam = generate_beam(*model, FIRST_BEAM, start, maxlen, n=1, min_length=min_length, **warping)
    best = by_beam[0] if by_beam and by_beam[0].ended else Hypothesis(score=NEVER)
    read, frontier = reader(rnn, emb, decoder), []
    symbols, states = read_start(read, eos, start)
    texts, scores = [""], torch.zeros(1, dtype=torch.float64, device=emb.weight.device)
    while True:
        log_probs, states = read(symbols, states)
        scores = scores[:, None] + warp(log_probs, **warping)  # (K, V)
        budget -= len(texts)
        length = len(texts[0])  # of all that are read together
        best_end, row = scores[:, eos].max(0)
        if length >= min_length and best_end > best.score:
            best = Hypothesis(text=texts[row], ended=True, score=best_end.item())
        scores[:, eos] = NEVER
        if length + 1 < maxlen:
            for children in children_above(best.score, scores, texts, states):
                heapq.heappush(frontier, children)
        bound = -frontier[0].loss if frontier else NEVER
        if bound <= best.score or budget <= 0:
            break
        scores, symbols, texts, states = heapq.heappop(frontier).above(best.score)
    likeliest = [replace(best, log_prob=score(*model, best.text, start))] if best.ended else by_beam
    return [replace(h, gap=max(0.0, bound - h.score)) for h in likeliest]


# ----------------------------------------------------------------------------------- command line

# Each decoder's options, beside those that all take.
OPTIONS = {
    "greedy": [],
    "sample": ["n", "temperature", "top_k", "nucleus"],
    "beam": ["n", "temperature", "top_k", "nucleus", "min_length"],
    "exact": ["temperature", "top_k", "nucleus", "min_length", "budget"],
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


def command_parser() -> argparse.ArgumentParser:
    """All options of the command line, with their ranges and defaults."""
    about = "Write sentences with a trained model; without a decoder, with each. (Defaults in parentheses.)"
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    decoder = parser.add_mutually_exclusive_group()
    width, many, count = in_range(int, 1, 4096), in_range(int, 1, 10_000), in_range(int, 0, 10**9)
    add = parser.add_argument
    # fmt: off
    decoder.add_argument("--greedy", action="store_true", help="take the likeliest symbol each time")
    decoder.add_argument("--sample", action="store_true", help="draw each symbol")
    decoder.add_argument("--beam", type=width, metavar="K",
                         help="beam search that keeps the K likeliest prefixes")
    decoder.add_argument("--exact", type=width, nargs="?", const=5, metavar="K",
                         help="the likeliest sentence, proved, and where a beam of K (5) loses it")
    add("--temperature", type=in_range(float, 0, 1000), default=1.0, metavar="T",
        help="divide the logits by T: below 1 safer, above 1 bolder; sampling at 0 is greedy (%(default)s)")
    add("--top-k", type=width, metavar="N", help="only the N likeliest symbols (all)")
    add("--nucleus", type=in_range(float, 1e-9, 1), default=1.0, metavar="ALPHA",
        help="only the likeliest symbols of mass ALPHA, after temperature and top-k (%(default)s)")
    add("--start", default="", metavar="TEXT", help="text that the sentence goes on from")
    add("--maxlen", type=many, default=MAXLEN, metavar="N", help="most symbols to write (%(default)s)")
    add("--min-length", type=count, default=0, metavar="N", help="fewest characters (%(default)s)")
    add("--budget", type=count, default=BUDGET, metavar="N", help="prefixes --exact may read (%(default)s)")
    add("-n", "--n", type=many, default=1, metavar="N", help="sentences to draw, or of a beam (%(default)s)")
    add("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="of the random draws (%(default)s)")
    add("--checkpoint", metavar="FILE", help="a checkpoint or a run's folder (the newest run's best.pt)")
    # fmt: on
    return parser


def search_options(options) -> dict:
    """The keyword options of a search."""
    warping = {"temperature": options.temperature, "top_k": options.top_k, "alpha": options.nucleus}
    return {"start": options.start, "maxlen": options.maxlen, "min_length": options.min_length, **warping}


def decode(model, options) -> list[Hypothesis]:
    """What the decoder that the command line's options name writes with `model`, a `CharModel`."""
    parts = (model.rnn, model.emb, model.decoder, EOS_IX)
    if options.greedy:
        return [generate(*parts, options.start, options.maxlen)]
    search = search_options(options)
    if options.beam:
        return generate_beam(*parts, options.beam, n=options.n, **search)
    if options.exact:
        return generate_exact(*parts, budget=options.budget, **search)
    del search["min_length"]
    generator = torch.Generator().manual_seed(options.seed)
    return [generate(*parts, generator=generator, **search) for _ in range(options.n)]


def show(h: Hypothesis, start: str) -> None:
    """Print a sentence with its scores and certificate."""
    bits = -h.log_prob / math.log(2) / (len(h.text) + h.ended)
    score = f"{h.score:.2f} with the options, " if abs(h.score - h.log_prob) > 0.005 else ""
    print(f"  {start}{h.text}{'' if h.ended else ' …'}")
    end = "ended" if h.ended else "cut at --maxlen"
    print(f"    {h.log_prob:.2f} nats, {score}{bits:.2f} bits per character, {end}")
    if h.gap == 0 and h.ended:
        print("    proved: none left out is likelier with these options")
    elif h.gap:
        print(f"    another may be up to {h.gap:.3g} nats likelier")


def where_a_beam_loses(model, text: str, options) -> str:
    """Where the beam that --exact names loses the optimum, and which wider one finds it."""

    def lost_at(width: int) -> int | None:
        return search_error(
            model.rnn, model.emb, model.decoder, EOS_IX, width, text, **search_options(options)
        )

    k = options.exact
    step = lost_at(k)
    if step is None:
        return f"a beam of {k} finds it, too"
    wider = (2**power for power in range(k.bit_length(), 13))
    enough = next((width for width in wider if lost_at(width) is None), None)
    finds = f"one of {enough} finds it" if enough else "not even one of 4096 finds it"
    return f"a beam of {k} loses it at step {step} ({text[:step]!r}); {finds}"


def write(model, options) -> None:
    """Print what the chosen decoder writes."""
    hypotheses = decode(model, options)
    for h in hypotheses:
        show(h, options.start)
    if not hypotheses:
        print("  nothing: --min-length, --nucleus and --top-k leave no sentence")
    elif options.exact and hypotheses[0].gap:
        print(f"    gave up after {options.budget:,} prefixes (--budget)")
    elif options.exact and hypotheses[0].ended:
        print(f"    {where_a_beam_loses(model, hypotheses[0].text, options)}")


def main() -> None:
    parser = command_parser()
    options = parser.parse_args()
    decoder = next((name for name in OPTIONS if getattr(options, name)), None)
    for name in [*OPTIONS["beam"], "budget"]:
        if name not in OPTIONS.get(decoder, ()) and getattr(options, name) != parser.get_default(name):
            rest = f"does not go with --{decoder}" if decoder else "needs a decoder, such as --sample"
            parser.error(f"--{name.replace('_', '-')} {rest}")
    if options.beam and options.n > options.beam:
        parser.error(f"-n {options.n} needs --beam {options.n} or more")
    file = find_checkpoint(options.checkpoint, "best.pt")
    from tp5 import load  # tp5 imports this file

    model = load(file, "--device=cpu").model
    print(printable(f"{file}: {model.cell}, start {options.start!r}, seed {options.seed}"))
    start = code2string(codes_of(options.start))
    if decoder:
        write(model, argparse.Namespace(**vars(options) | {"start": start}))
        return
    for arguments in DECODERS.values():
        print(f"\n{arguments}")
        common = [f"--start={start}", f"--maxlen={options.maxlen}", f"--seed={options.seed}"]
        write(model, parser.parse_args([*arguments.split(), *common]))


if __name__ == "__main__":
    guard(main)
