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
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from textloader import EOS_IX, PAD_IX, LabError, clean, code2string, guard, lettre2id, printable

RUNS = Path(__file__).parent / "runs"
MAXLEN = 200
BUDGET = 500_000  # prefixes that exact search reads before it gives up
SEED_BEAM, BATCH = 100, 512  # the beam that it starts from; prefixes that it reads at once
NEVER = -math.inf  # the log-probability of what cannot happen


@dataclass(frozen=True)
class Hypothesis:
    """A sentence that a decoder wrote, or a prefix of one, and how likely it is (nats)."""

    codes: bytes = b""  # of the new symbols, without the start text, EOS included where it ended
    log_prob: float = 0.0  # of those symbols under the model itself
    ended: bool = False  # with EOS; False: cut at `maxlen`
    gap: float | None = None  # how much likelier one not returned may be; 0: none is; None: unknown
    search_log_prob: float = 0.0  # under what was searched or drawn from (see `Predictor`)

    @property
    def text(self) -> str:
        """The new characters, without start text, EOS or BLANK."""
        return code2string(self.codes)


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


class Predictor:
    """The log-probability of each next symbol, for many prefixes at once.

    What is searched or drawn from may differ from the model: `temperature` divides its logits, `top_k`
    leaves the likeliest symbols, `alpha` the nucleus, in this order. LabError if they are out of range.
    """

    def __init__(self, rnn, emb, decoder, *, temperature=1.0, top_k=None, alpha=1.0):
        if not 0 < temperature < math.inf or (top_k is not None and top_k < 1):
            what = "temperature must be above 0 and finite, top_k at least 1"
            raise LabError(f"{what}: they are {temperature} and {top_k}")
        self.rnn, self.emb, self.decoder, self.device = rnn, emb, decoder, emb.weight.device
        self.temperature, self.top_k, self.alpha = temperature, top_k, alpha
        self.nucleus = p_nucleus(nn.Identity(), alpha)
        self.table = rnn.project(emb.weight) if hasattr(rnn, "project") else None  # (V, G·H)
        self.blank = torch.tensor([PAD_IX], device=self.device)

    def prompt(self, eos: int, start: str):
        """EOS and the start text, all but the last symbol read: that symbol (1,) and the state so far."""
        codes = torch.tensor([eos, *codes_of(start)], device=self.device)
        state = self.rnn(self.emb(codes[:-1])[:, None])[1] if len(codes) > 1 else None
        return codes[-1:], state

    def log_probs(self, h):
        """Hidden states (…, H) → log-probabilities (…, V) of the next symbol, which is never BLANK."""
        return self.decoder(h).double().index_fill(-1, self.blank, NEVER).log_softmax(-1)

    def step(self, symbols, state):
        """Read symbols (K,) after `state` (None: zeros). Returns the log-probabilities (K, V) of what comes
        next, the model's and those to search or draw by, and the state after."""
        if self.table is None:
            output, state = self.rnn(self.emb(symbols)[None], state)  # (1, K, H)
        else:  # our cells: a look-up instead of a product
            output, state = self.rnn.unroll(self.table[symbols][None], state)
        warped = log_probs = self.log_probs(output[0])
        if self.temperature != 1:  # the largest becomes 0 first, so that nothing overflows
            warped = ((warped - warped.amax(-1, keepdim=True)) / self.temperature).log_softmax(-1)
        if self.top_k:
            values, likeliest = warped.topk(min(self.top_k, warped.shape[-1]))
            warped = torch.full_like(warped, NEVER).scatter(-1, likeliest, values).log_softmax(-1)
        if self.alpha < 1:
            warped = self.nucleus(warped).log()
        return log_probs, warped, state


def codes_of(text: str) -> list[int]:
    """The codes of a text as a person types it; LabError if that would lose characters."""
    cleaned, dropped = clean(text)
    if dropped:
        raise LabError(f"the text has characters outside the alphabet: {' '.join(dropped)}")
    return [lettre2id[char] for char in cleaned]


def select(state, rows):
    """The given rows (K,) of a state: a tensor whose last axis but one is the batch, or a tuple of them."""
    if isinstance(state, tuple):
        return tuple(select(part, rows) for part in state)
    return state.index_select(-2, rows)


@torch.inference_mode()
def generate(rnn, emb, decoder, eos, start="", maxlen=MAXLEN, *, temperature=0.0, generator=None, **warp):
    """Question 3: write one sentence, symbol by symbol, until EOS or `maxlen` symbols.

    temperature  0: greedy, always the likeliest symbol; above 0: a random one, at that temperature
    generator    a `torch.Generator` on the CPU for the drawing; None: torch's own
    warp         `top_k` and `alpha` narrow what is drawn from (see `Predictor`)

    Raises LabError for options out of range or a start text outside the alphabet.
    """
    predictor = Predictor(rnn, emb, decoder, temperature=temperature or 1.0, **warp)
    symbol, state = predictor.prompt(eos, start)
    codes, log_prob, search_log_prob = [], 0.0, 0.0
    while len(codes) < maxlen and codes[-1:] != [eos]:
        log_probs, search_log_probs, state = predictor.step(symbol, state)  # (1, V)
        if temperature == 0:
            symbol = search_log_probs.argmax(-1)
        else:
            probs = search_log_probs[0].exp().cpu()
            symbol = torch.multinomial(probs, 1, generator=generator).to(predictor.device)
        codes.append(symbol.item())
        log_prob += log_probs[0, codes[-1]].item()
        search_log_prob += search_log_probs[0, codes[-1]].item()
    return Hypothesis(bytes(codes), log_prob, eos in codes, None, search_log_prob)


@torch.inference_mode()
def score(rnn, emb, decoder, eos, text, start="", *, ended=True) -> float:
    """Log-probability (nats) of `text`, in symbols of LETTRES, after `start`; EOS included if `ended`."""
    prompt, codes = [eos, *codes_of(start)], [lettre2id[char] for char in text] + [eos] * ended
    inputs = torch.tensor([*prompt, *codes[:-1]], device=emb.weight.device)
    output, _ = rnn(emb(inputs)[:, None])  # (T, 1, H), one forward pass
    log_probs = Predictor(rnn, emb, decoder).log_probs(output[len(prompt) - 1 :, 0])
    return log_probs[range(len(codes)), codes].sum().item()


# ------------------------------------------------------------------------------------ beam search
def beam_steps(predictor, eos, k, start, maxlen, n, min_length):
    """Beam search: after each symbol yields the live and the ended prefixes that are kept, best first,
    and the largest score (nats) among all that were let go so far."""
    symbols, state = predictor.prompt(eos, start)
    live, ended, bound = [Hypothesis()], [], NEVER
    for length in range(1, maxlen + 1):
        log_probs, search_log_probs, state = predictor.step(symbols, state)
        scores = search_log_probs + search_log_probs.new_tensor([h.search_log_prob for h in live])[:, None]
        if length <= min_length:
            scores[:, eos] = NEVER
        best, places = scores.flatten().topk(min(k + 1, scores.numel()))
        log_probs = log_probs.flatten()[places]

        competing = [(h, None) for h in ended]  # with the row of its parent
        for total, place, log_prob in zip(best.tolist(), places.tolist(), log_probs.tolist(), strict=True):
            if total == NEVER:
                break
            row, symbol = divmod(place, scores.shape[1])
            codes = live[row].codes + bytes([symbol])
            child = Hypothesis(codes, live[row].log_prob + log_prob, symbol == eos, None, total)
            competing.append((child, row))
        competing.sort(key=lambda pair: -pair[0].search_log_prob)

        # If the best n have ended, nothing can overtake them: let all others go.
        width = n if all(h.ended for h, _ in competing[:n]) else k
        bound = max([bound, *(h.search_log_prob for h, _ in competing[width:])])
        ended = [h for h, _ in competing[:width] if h.ended]
        live = [h for h, _ in competing[:width] if not h.ended]
        rows = [row for h, row in competing[:width] if not h.ended]
        yield live, ended, bound
        if not live:
            return
        symbols = torch.tensor([h.codes[-1] for h in live], device=predictor.device)
        state = select(state, torch.tensor(rows, device=predictor.device))


@torch.inference_mode()
def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=MAXLEN, *, n=None, min_length=0, **warp):
    """Questions 6 and 7: beam search for the likeliest sentences; `alpha` below 1: nucleus beam.

    At every step the `k` likeliest prefixes are kept, live and ended together, so `k = 1` is greedy. A
    prefix's log-probability can only fall: so the largest among those let go bounds every sentence that
    ends within `maxlen` and is not returned. `gap` is that bound minus a sentence's own score, at least 0.

    Returns `n` sentences (None: k) of at least `min_length` characters, best first, ended ones before those
    cut at `maxlen`; fewer where `min_length` and `warp`, the options of `Predictor`, leave no way on.
    Raises LabError as `generate`.
    """
    if k < 1 or min_length >= maxlen:  # no sentence could end
        what = f"k is {k}, min_length {min_length}, maxlen {maxlen}"
        raise LabError(f"k must be at least 1 and min_length below maxlen: {what}")
    n, predictor = min(n or k, k), Predictor(rnn, emb, decoder, **warp)
    for live, ended, bound in beam_steps(predictor, eos, k, start, maxlen, n, min_length):  # noqa: B007
        pass
    return [replace(h, gap=max(0.0, bound - h.search_log_prob)) for h in [*ended, *live][:n]]


@torch.inference_mode()
def search_error(rnn, emb, decoder, eos, k, codes, start="", maxlen=MAXLEN, *, min_length=0, **warp):
    """The step (from 1) at which a beam of `k` loses the sentence `codes`; None if it keeps it to the end."""
    predictor = Predictor(rnn, emb, decoder, **warp)
    search = beam_steps(predictor, eos, k, start, maxlen, k, min_length)
    for step, (live, ended, _) in enumerate(search, start=1):
        if codes[:step] not in [h.codes for h in live + ended]:
            return step
    return None


@torch.inference_mode()
def generate_exact(rnn, emb, decoder, eos, start="", maxlen=MAXLEN, *, budget=BUDGET, min_length=0, **warp):
    """The likeliest sentence of at most `maxlen` symbols (branch and bound): a list of one, or none.

    A prefix is read only while it scores above the best sentence known, at first a beam's. The frontier is
    a heap of batches of children, the one with the likeliest child first. After `budget` prefixes the
    search gives up; `gap` then says how much better the optimum may be, and 0 is a proof.
    """
    predictor, parts = Predictor(rnn, emb, decoder, **warp), (rnn, emb, decoder, eos)
    by_beam = generate_beam(*parts, SEED_BEAM, start, maxlen, n=1, min_length=min_length, **warp)
    best = by_beam[0] if by_beam and by_beam[0].ended else Hypothesis(search_log_prob=NEVER)
    frontier, pushed, unread = [], 0, budget
    symbols, state = predictor.prompt(eos, start)
    codes, scores = [b""], torch.zeros(1, dtype=torch.float64, device=predictor.device)
    while True:
        _, search_log_probs, state = predictor.step(symbols, state)
        unread -= len(codes)
        scores = scores[:, None] + search_log_probs  # (K, V)
        length = len(codes[0])  # all prefixes of a batch have one length
        at_end, winner = scores[:, eos].max(0)
        if length >= min_length and at_end > best.search_log_prob:
            best = Hypothesis(codes[winner] + bytes([eos]), ended=True, search_log_prob=at_end.item())
        scores[:, eos] = NEVER
        if length + 1 < maxlen:
            parents, children = (scores > best.search_log_prob).nonzero(as_tuple=True)
            order = scores[parents, children].argsort(descending=True)
            for part in order.split(BATCH) if len(order) else ():
                p, c = parents[part], children[part]
                pushed += 1  # breaks ties
                best_child = scores[p[0], c[0]].item()
                heapq.heappush(frontier, (-best_child, pushed, scores[p, c], c, p, codes, state))
        bound = -frontier[0][0] if frontier else NEVER
        if bound <= best.search_log_prob or unread <= 0:
            break
        _, _, scores, symbols, rows, codes, state = heapq.heappop(frontier)
        kept = scores > best.search_log_prob
        scores, symbols, rows = scores[kept], symbols[kept], rows[kept]
        state = select(state, rows)
        codes = [codes[p] + bytes([c]) for p, c in zip(rows.tolist(), symbols.tolist(), strict=True)]
    found = [replace(best, log_prob=score(*parts, best.text, start))] if best.ended else by_beam
    return [replace(h, gap=max(0.0, bound - h.search_log_prob)) for h in found]


# ----------------------------------------------------------------------------------- command line
def number(kind, low, high):
    """An argparse type: an int or float from `low` to `high`."""

    def parse(text: str):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low:,} to {high:,}")

    return parse


def checkpoint_of(run: str | None, name: str = "best.pt") -> Path:
    """The checkpoint `name` of a run; without `run` of the one saved last, else of the reference."""
    if run:
        return Path(run) / name if Path(run).is_dir() else Path(run)
    reference = RUNS / "reference"
    own = [file for file in RUNS.glob(f"**/{name}") if reference not in file.parents]
    newest = max(own, key=lambda file: file.stat().st_mtime, default=reference / "lstm" / name)
    if not newest.exists():
        raise LabError(f"no run in {RUNS} yet: train one first with `python tp5.py --model lstm`")
    return newest


def show(h: Hypothesis, start: str) -> None:
    """Print a sentence with its scores and certificate."""
    bits, end = -h.log_prob / math.log(2) / len(h.codes), "ended" if h.ended else "cut at --maxlen"
    differs = abs(h.search_log_prob - h.log_prob) > 0.005
    searched = f"{h.search_log_prob:.2f} with the options, " if differs else ""
    print(f"  {start}{h.text}{'' if h.ended else ' …'}")
    print(f"    {h.log_prob:.2f} nats, {searched}{bits:.2f} bits per character, {end}")
    if h.gap == 0 and h.ended:
        print("    proved: none left out is likelier with these options")
    elif h.gap:
        print(f"    another may be up to {h.gap:.3g} nats likelier")


def where_a_beam_loses(codes: bytes, k: int, parts, search: dict) -> str:
    """Where a beam of `k` loses the optimum, and which wider one finds it."""
    step = search_error(*parts, k, codes, **search)
    if step is None:
        return f"a beam of {k} finds it, too"
    wider = (2**power for power in range(k.bit_length(), 13))
    finds = next((wide for wide in wider if search_error(*parts, wide, codes, **search) is None), None)
    found = f"one of {finds} finds it" if finds else "not even one of 4096 finds it"
    return f"a beam of {k} loses it at step {step} ({code2string(codes[:step])!r}); {found}"


def write(options, parts) -> None:
    """Print what the chosen decoder writes."""
    place = {"start": options.start, "maxlen": options.maxlen}
    warped = {**place, "temperature": options.temperature, "top_k": options.top_k, "alpha": options.nucleus}
    search = {**warped, "min_length": options.min_length}
    if options.greedy:
        found = [generate(*parts, **place)]
    elif options.sample:
        generator = torch.Generator().manual_seed(options.seed)
        found = [generate(*parts, generator=generator, **warped) for _ in range(options.n)]
    elif options.beam:
        found = generate_beam(*parts, options.beam, n=options.n, **search)
    else:
        found = generate_exact(*parts, budget=options.budget, **search)
    for h in found:
        show(h, options.start)
    if not found:
        print("  nothing: --min-length, --nucleus and --top-k leave no sentence")
    elif options.exact and found[0].gap:
        print(f"    gave up after {options.budget:,} prefixes (--budget)")
    elif options.exact and found[0].ended:
        print(f"    {where_a_beam_loses(found[0].codes, options.exact, parts, search)}")


# The options of each decoder, beside those that all take.
OPTIONS = {
    "greedy": [],
    "sample": ["n", "temperature", "top_k", "nucleus"],
    "beam": ["n", "temperature", "top_k", "nucleus", "min_length"],
    "exact": ["temperature", "top_k", "nucleus", "min_length", "budget"],
}
EACH = ("--greedy", "--sample", "--sample --temperature 0.5", "--sample --nucleus 0.9", "--beam 5",
        "--beam 5 --nucleus 0.9", "--exact")  # what is shown without a decoder  # fmt: skip


def command_parser() -> argparse.ArgumentParser:
    """All options of the command line, with their ranges and defaults."""
    about = "Write sentences with a trained model; without a decoder, with each. (Defaults in parentheses.)"
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    add, decoder = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    width, many, count = number(int, 1, 4096), number(int, 1, 10_000), number(int, 0, 10**9)
    # fmt: off
    decoder("--greedy", action="store_true", help="take the likeliest symbol each time")
    decoder("--sample", action="store_true", help="draw each symbol")
    decoder("--beam", type=width, metavar="K", help="beam search that keeps the K likeliest prefixes")
    decoder("--exact", type=width, nargs="?", const=5, metavar="K",
            help="the likeliest sentence, proved, and where a beam of K (5) loses it")
    add("--temperature", type=number(float, 0, 1000), default=1.0, metavar="T",
        help="divide the logits by T: below 1 safer, above 1 bolder; sampling at 0 is greedy (%(default)s)")
    add("--top-k", type=width, metavar="N", help="only the N likeliest symbols (all)")
    add("--nucleus", type=number(float, 1e-9, 1), default=1.0, metavar="ALPHA",
        help="only the likeliest symbols of mass ALPHA, after temperature and top-k (%(default)s)")
    add("--start", default="", metavar="TEXT", help="text that the sentence goes on from")
    add("--maxlen", type=many, default=MAXLEN, metavar="N", help="most symbols to write (%(default)s)")
    add("--min-length", type=count, default=0, metavar="N", help="fewest characters (%(default)s)")
    add("--budget", type=count, default=BUDGET, metavar="N", help="prefixes --exact may read (%(default)s)")
    add("-n", "--n", type=many, default=1, metavar="N", help="sentences to draw, or of a beam (%(default)s)")
    add("--seed", type=count, default=0, help="of the random draws (%(default)s)")
    add("--checkpoint", metavar="FILE", help="a checkpoint or a run's folder (the newest run's best.pt)")
    # fmt: on
    return parser


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
    file = checkpoint_of(options.checkpoint)
    from tp5 import load_checkpoint  # tp5 imports this file

    model = load_checkpoint(file).model
    parts = model.rnn, model.emb, model.decoder, EOS_IX
    print(printable(f"{file}: {model.cell}, start {options.start!r}, seed {options.seed}"))
    options.start = code2string(codes_of(options.start))
    if decoder:
        write(options, parts)
        return
    for arguments in EACH:
        print(f"\n{arguments}")
        write(parser.parse_args(arguments.split(), argparse.Namespace(**vars(options))), parts)


if __name__ == "__main__":
    guard(main)
