"""Questions 3, 6 and 7: write sentences with a trained model, and say how far they are from the likeliest.

    python generate.py                 # every decoder side by side
    python generate.py --beam 5 --nucleus 0.9 --start "Our "
    python generate.py --exact --min-length 20

A decoder here works on any `(rnn, emb, decoder)`: our cells or `torch.nn.RNN/GRU/LSTM`, a
`torch.nn.Embedding`, a linear layer from hidden state to logits. It reads EOS and the start text
once, then advances the state one symbol at a time; it never runs a prefix again.

Shapes: K beams or prefixes, H hidden, V symbols. Log-probabilities are in nats, in float64.
"""

import argparse
import heapq
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from textloader import EOS_IX, PAD_IX, LabError, id2lettre, lettre2id
from textloader import clean, code2string, guard, printable, string2code

RUNS = Path(__file__).parent / "runs"
MAXLEN = 200
BUDGET = 500_000  # prefixes that exact search reads before it gives up
SEED_BEAM, BATCH = 100, 512  # the beam that it starts from; prefixes that it reads at once
NEVER = -math.inf  # the log-probability of what cannot happen


@dataclass(frozen=True)
class Hypothesis:
    """A sentence that a decoder wrote, or a prefix of one, and how likely it is.

    codes            of the new symbols, without the start text, EOS included where it ended
    log_prob         nats, of those symbols under the model itself
    ended            True if it closed with EOS, False if it was cut at `maxlen`
    gap              nats by which another sentence that ends within `maxlen` may still be better: 0 is
                     a proof, None says that nothing was searched
    search_log_prob  nats, under the distribution that was searched or drawn from (see `Predictor`)
    """

    codes: bytes = b""
    log_prob: float = 0.0
    ended: bool = False
    gap: float | None = None
    search_log_prob: float = 0.0

    @property
    def text(self) -> str:
        """The new characters, without start text, EOS or BLANK."""
        return code2string(self.codes)


# ---------------------------------------------------------------------------------- distributions


def p_nucleus(decoder, alpha: float):
    """Question 7: the nucleus of a model's distribution (Holtzman et al. 2020).

    Returns `compute(h)`: hidden states (…, H) → probabilities (…, V) in which only the smallest set
    of likeliest symbols with mass at least `alpha` is left, renormalised. The symbol that crosses
    `alpha` is in the set; ties keep the order of the codes.

    Raises ValueError unless 0 < alpha <= 1.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}, must be above 0 and at most 1")

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
    """The log-probability of each next symbol, for any `(rnn, emb, decoder)` and many prefixes at once.

    What is searched or drawn from may differ from the model: `temperature` divides its logits,
    `top_k` leaves the likeliest symbols, `alpha` the nucleus, in this order.

    Raises ValueError for options out of range.
    """

    def __init__(self, rnn, emb, decoder, *, temperature=1.0, top_k=None, alpha=1.0):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}, must be above 0 and finite")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}, must be at least 1")
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

    def step(self, symbols, state):
        """Read symbols (K,) after `state` (None: zeros).

        Returns the log-probabilities (K, V) of the next symbol, the model's and those to search or
        draw by, and the state after.
        """
        if self.table is None:
            output, state = self.rnn(self.emb(symbols)[None], state)  # (1, K, H)
        else:  # our cells: a look-up instead of a product
            output, state = self.rnn.unroll(self.table[symbols][None], state)
        log_probs = self.log_probs(output[0])
        return log_probs, self.warp(log_probs), state

    def log_probs(self, h):
        """Hidden states (…, H) → log-probabilities (…, V) of the next symbol, which is never BLANK."""
        return self.decoder(h).double().index_fill(-1, self.blank, NEVER).log_softmax(-1)

    def warp(self, log_probs):
        """Temperature, top-k and nucleus on log-probabilities (…, V)."""
        if self.temperature != 1:  # the largest becomes 0 first, so that nothing overflows
            log_probs = ((log_probs - log_probs.amax(-1, keepdim=True)) / self.temperature).log_softmax(-1)
        if self.top_k is not None:
            values, symbols = log_probs.topk(min(self.top_k, log_probs.shape[-1]))
            log_probs = torch.full_like(log_probs, NEVER).scatter(-1, symbols, values).log_softmax(-1)
        return self.nucleus(log_probs).log() if self.alpha < 1 else log_probs


def codes_of(text: str) -> list[int]:
    """The codes of a text as a person types it; ValueError if that would lose characters."""
    dropped = clean(text)[1]
    if dropped:
        raise ValueError(f"the text has characters outside the alphabet: {' '.join(dropped)}")
    return string2code(text).tolist()


def select(state, rows):
    """The given rows (K,) of a state: a tensor whose last axis but one is the batch, or a tuple of them."""
    if isinstance(state, tuple):
        return tuple(select(part, rows) for part in state)
    return state.index_select(-2, rows)


# --------------------------------------------------------------------------------------- one by one


@torch.inference_mode()
def generate(rnn, emb, decoder, eos, start="", maxlen=MAXLEN, *, temperature=0.0, generator=None, **options):
    """Question 3: write one sentence, symbol by symbol, until EOS or `maxlen` symbols.

    temperature  0: greedy, always the likeliest symbol; above 0: a random one from the distribution
                 at that temperature
    options      `top_k` and `alpha` narrow it (see `Predictor`)
    generator    a `torch.Generator` on the CPU for the drawing; None: torch's own

    Returns a Hypothesis. Raises ValueError for options out of range or a start text outside the
    alphabet.
    """
    predictor = Predictor(rnn, emb, decoder, temperature=temperature or 1.0, **options)
    symbol, state = predictor.prompt(eos, start)
    codes, log_prob, search_log_prob = [], 0.0, 0.0
    while len(codes) < maxlen and eos not in codes[-1:]:
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


# ------------------------------------------------------------------------------------ beam search


def beam_steps(predictor, eos, k, start, maxlen, n, min_length):
    """Beam search, one symbol per step; yields (live, ended, bound) after each.

    live, ended  the surviving prefixes, best first
    bound        the largest score among all prefixes let go so far, nats
    """
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
        for score, place, log_prob in zip(best.tolist(), places.tolist(), log_probs.tolist(), strict=True):
            row, symbol = divmod(place, scores.shape[1])
            codes = live[row].codes + bytes([symbol])
            child = Hypothesis(codes, live[row].log_prob + log_prob, symbol == eos, None, score)
            competing.append((child, row))
        competing.sort(key=lambda pair: -pair[0].search_log_prob)

        live, ended, rows = [], [], []
        for rank, (h, row) in enumerate(competing):
            all_found = len(ended) == n and not live
            if rank == k or all_found or h.search_log_prob == NEVER:
                bound = max(bound, h.search_log_prob)
                break
            if h.ended:
                ended.append(h)
            else:
                live.append(h)
                rows.append(row)
        yield live, ended, bound
        if not live:
            return
        symbols = torch.tensor([h.codes[-1] for h in live], device=predictor.device)
        state = select(state, torch.tensor(rows, device=predictor.device))


@torch.inference_mode()
def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=MAXLEN, *, n=None, min_length=0, **options):
    """Questions 6 and 7: beam search for the likeliest sentences; `alpha` below 1: nucleus beam.

    At every step the `k` likeliest prefixes are kept, live and ended together, so `k = 1` is greedy. A
    prefix's log-probability can only fall: so the largest among those let go bounds every sentence that
    ends within `maxlen` and is not returned. `gap` is that bound minus a sentence's own score, at least 0.

    n           sentences wanted (None: k); the search stops when no live prefix can be among them
    min_length  a sentence of fewer characters does not count
    options     what to search instead of the model: `alpha`, `top_k`, `temperature` (see `Predictor`)

    Returns at most `n` Hypothesis, best first, ended ones before those cut at `maxlen`; none where
    `min_length` and the nucleus leave no way on. Raises ValueError for options out of range or a start
    text outside the alphabet.
    """
    if k < 1 or maxlen < 1:
        raise ValueError(f"k is {k} and maxlen {maxlen}, both must be at least 1")
    if min_length >= maxlen:  # no sentence could end
        raise ValueError(f"min_length is {min_length}, must be below maxlen, {maxlen}")
    n, predictor = n or k, Predictor(rnn, emb, decoder, **options)
    for live, ended, bound in beam_steps(predictor, eos, k, start, maxlen, n, min_length):  # noqa: B007
        pass
    return [replace(h, gap=max(0.0, bound - h.search_log_prob)) for h in [*ended, *live][:n]]


@torch.inference_mode()
def search_error(rnn, emb, decoder, eos, k, codes, start="", maxlen=MAXLEN, *, min_length=0, **options):
    """The step (from 1) at which a beam of `k` loses the sentence `codes`; None if it keeps it to the end."""
    predictor = Predictor(rnn, emb, decoder, **options)
    search = beam_steps(predictor, eos, k, start, maxlen, k, min_length)
    for step, (live, ended, _) in enumerate(search, start=1):
        if codes[:step] not in [h.codes for h in live + ended]:
            return step
    return None


# ----------------------------------------------------------------------------------- exact search


@torch.inference_mode()
def generate_exact(
    rnn, emb, decoder, eos, start="", maxlen=MAXLEN, *, budget=BUDGET, min_length=0, **options
):
    """The likeliest sentence of at most `maxlen` symbols, proved (branch and bound): a list of one, or none.

    A prefix is read only while it scores above the best sentence known, at first a beam's. The frontier is
    a heap of batches of children, the one with the likeliest child first. After `budget` prefixes the
    search gives up; `gap` then says how much better the optimum may be. Else as `generate_beam`.
    """
    predictor, parts = Predictor(rnn, emb, decoder, **options), (rnn, emb, decoder, eos)
    by_beam = generate_beam(*parts, SEED_BEAM, start, maxlen, n=1, min_length=min_length, **options)
    best = by_beam[0] if by_beam and by_beam[0].ended else Hypothesis(search_log_prob=NEVER)
    frontier, pushed, unread = [], 0, budget
    symbols, state = predictor.prompt(eos, start)
    codes, scores = [b""], torch.zeros(1, dtype=torch.float64, device=predictor.device)
    model_scores = scores
    while True:
        log_probs, search_log_probs, state = predictor.step(symbols, state)
        unread -= len(codes)
        scores, model_scores = scores[:, None] + search_log_probs, model_scores[:, None] + log_probs  # (K, V)
        length = len(codes[0])  # all prefixes of a batch have one length
        score, winner = scores[:, eos].max(0)
        if length >= min_length and score > best.search_log_prob:
            log_prob = model_scores[winner, eos].item()
            best = Hypothesis(codes[winner] + bytes([eos]), log_prob, True, None, score.item())
        scores[:, eos] = NEVER
        if length + 1 < maxlen:
            parents, children = (scores > best.search_log_prob).nonzero(as_tuple=True)
            order = scores[parents, children].argsort(descending=True)
            for part in order.split(BATCH) if len(order) else ():
                p, c = parents[part], children[part]
                batch = scores[p, c], model_scores[p, c], c, p, codes, state
                pushed += 1  # breaks ties
                heapq.heappush(frontier, (-batch[0][0].item(), pushed, batch))
        bound = -frontier[0][0] if frontier else NEVER
        if bound <= best.search_log_prob or unread <= 0:
            break
        scores, model_scores, symbols, rows, codes, state = heapq.heappop(frontier)[2]
        kept = scores > best.search_log_prob
        scores, model_scores, symbols, rows = scores[kept], model_scores[kept], symbols[kept], rows[kept]
        state = select(state, rows)
        codes = [codes[p] + bytes([c]) for p, c in zip(rows.tolist(), symbols.tolist(), strict=True)]
    found = [best] if best.ended else by_beam
    return [replace(h, gap=max(0.0, bound - h.search_log_prob)) for h in found]


# -------------------------------------------------------------------------------- looking at a text


def predictions(rnn, emb, decoder, eos, codes, start=""):
    """By one forward pass: log-probabilities (n, V) before each of the codes (n,) after the start text."""
    prompt = [eos, *codes_of(start)]
    inputs = torch.tensor([*prompt, *codes[:-1]], device=emb.weight.device)
    output, _ = rnn(emb(inputs)[:, None])  # (T, 1, H)
    return Predictor(rnn, emb, decoder).log_probs(output[len(prompt) - 1 :, 0])


@torch.inference_mode()
def score(rnn, emb, decoder, eos, text, start="", *, ended=True) -> float:
    """Log-probability (nats) of `text`, in symbols of LETTRES, after `start`; EOS included if `ended`."""
    if unknown := set(text) - lettre2id.keys():
        raise ValueError(f"the text has characters outside the alphabet: {' '.join(unknown)}")
    codes = [lettre2id[char] for char in text] + [eos] * ended
    log_probs = predictions(rnn, emb, decoder, eos, codes, start)
    return log_probs.gather(1, torch.tensor(codes, device=log_probs.device)[:, None]).sum().item()


@torch.inference_mode()
def show_trace(hypothesis, start: str, parts, alpha: float) -> None:
    """Print the model's view of a sentence, a line for each symbol."""
    log_probs = predictions(*parts, hypothesis.codes, start)
    in_nucleus = p_nucleus(nn.Identity(), alpha)(log_probs) > 0  # (n, V)
    print(f"    symbol  probability  rank  in nucleus of {alpha:g} (size)  probability of EOS")
    for row, kept, code in zip(log_probs, in_nucleus, hypothesis.codes, strict=True):
        rank, nucleus = int((row > row[code]).sum()) + 1, f"{'yes' if kept[code] else 'no'} ({kept.sum()})"
        probability, end = row[code].exp(), row[EOS_IX].exp()
        print(f"    {id2lettre[code]:6}  {probability:11.4f}  {rank:4}  {nucleus:24}  {end:.4f}")


# ----------------------------------------------------------------------------------- command line


def number(kind, low, high):
    """An argparse type: an int or float from `low` to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be from {low:,} to {high:,}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse: "invalid number value"
    return parse


def checkpoint_of(run: str | None, name: str = "best.pt") -> Path:
    """A run's checkpoint of this name; of the run saved last, else of the reference, if `run` names none.

    Raises LabError if there is no run at all.
    """
    if run:
        return Path(run) / name if Path(run).is_dir() else Path(run)
    reference = RUNS / "reference"
    own = [found for found in RUNS.glob(f"**/{name}") if reference not in found.parents]
    newest = max(own, key=lambda found: found.stat().st_mtime, default=reference / "lstm" / name)
    if not newest.exists():
        raise LabError(f"no run in {RUNS} yet: train one first with `python tp5.py --model lstm`")
    return newest


def show(h: Hypothesis, start: str) -> None:
    """Print a sentence with its scores and certificate."""
    bits, end = -h.log_prob / math.log(2) / len(h.codes), "ended" if h.ended else "cut at --maxlen"
    facts = [f"{h.log_prob:.2f} nats", f"{bits:.2f} bits per character", end]
    if abs(h.search_log_prob - h.log_prob) > 0.005:
        facts.insert(1, f"{h.search_log_prob:.2f} with the options")
    print(f"  {start}{h.text}{'' if h.ended else ' …'}\n    {', '.join(facts)}")
    if h.gap is not None:
        doubt = f"another may be up to {h.gap:.3g} nats likelier"
        print(f"    {doubt if h.gap else 'proved: no other is likelier with these options'}")


def where_a_beam_loses(codes: bytes, k: int, parts, place, search) -> str:
    """Where a beam of `k` loses the optimum, and which wider one finds it."""
    step = search_error(*parts, k, codes, *place, **search)
    if step is None:
        return f"a beam of {k} finds it, too"
    what = repr(code2string(codes[:step])) if step < len(codes) else "the end"
    for wide in [2**power for power in range(k.bit_length(), 13)]:
        if search_error(*parts, wide, codes, *place, **search) is None:
            return f"a beam of {k} loses it at step {step} ({what}); one of {wide} finds it"
    return f"a beam of {k} loses it at step {step} ({what}); not even one of 4096 finds it"


def write(decoder: str, options, parts) -> None:
    """Print what a decoder writes."""
    place = options.start, options.maxlen
    warping = {"temperature": options.temperature, "top_k": options.top_k, "alpha": options.nucleus}
    search = {**warping, "min_length": options.min_length}
    if decoder == "greedy":
        found = [generate(*parts, *place)]
    elif decoder == "sample":
        generator = torch.Generator().manual_seed(options.seed)
        found = [generate(*parts, *place, generator=generator, **warping) for _ in range(options.n)]
    elif decoder == "beam":
        found = generate_beam(*parts, options.beam, *place, n=options.n, **search)
    else:
        found = generate_exact(*parts, *place, budget=options.budget, **search)
    for h in found:
        show(h, options.start)
        if options.trace:
            show_trace(h, options.start, parts, options.nucleus if options.nucleus < 1 else 0.9)
    if not found:
        print("  nothing: --min-length, --nucleus and --top-k leave no sentence")
    elif decoder == "exact" and found[0].gap:
        print(f"    gave up after {options.budget:,} prefixes (--budget)")
    elif decoder == "exact" and found[0].ended:
        print(f"    {where_a_beam_loses(found[0].codes, options.beam or 5, parts, place, search)}")


# The options that each decoder takes, beside those that all take. The first decoder that is given is
# meant, since --exact takes --beam.
TAKES = {
    "greedy": ["greedy"],
    "sample": ["sample", "n", "temperature", "top_k", "nucleus"],
    "exact": ["exact", "beam", "temperature", "top_k", "nucleus", "min_length", "budget"],
    "beam": ["beam", "n", "temperature", "top_k", "nucleus", "min_length"],
}
EACH = ("--greedy", "--sample", "--sample --temperature 0.5", "--sample --nucleus 0.9", "--beam 5",
        "--beam 5 --nucleus 0.9", "--exact")  # what is shown without a decoder  # fmt: skip


def command_parser() -> argparse.ArgumentParser:
    """All options of the command line, with their ranges and defaults."""
    about = "Write sentences with a trained model; without a decoder, with each. (Defaults in parentheses.)"
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    add, decoder = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    width, few, many = number(int, 1, 4096), number(int, 0, 10_000), number(int, 1, 10_000)
    # fmt: off
    decoder("--greedy", action="store_true", help="take the likeliest symbol each time")
    decoder("--sample", action="store_true", help="draw each symbol")
    decoder("--exact", action="store_true",
            help="the likeliest sentence, proved, and where a beam (of --beam K, else 5) loses it")
    add("--beam", type=width, metavar="K", help="beam search that keeps the K likeliest prefixes")
    add("--temperature", type=number(float, 0, 1000), default=1.0, metavar="T",
        help="divide the logits by T: below 1 safer, above 1 bolder; sampling at 0 is greedy (%(default)s)")
    add("--top-k", type=width, metavar="N", help="only the N likeliest symbols")
    add("--nucleus", type=number(float, 1e-9, 1), default=1.0, metavar="ALPHA",
        help="only the likeliest symbols of mass ALPHA, after temperature and top-k (%(default)s)")
    add("--start", default="", metavar="TEXT", help="text that the sentence goes on from")
    add("--maxlen", type=many, default=MAXLEN, metavar="N", help="most symbols to write (%(default)s)")
    add("--min-length", type=few, default=0, metavar="N", help="fewest characters (%(default)s)")
    add("--budget", type=number(int, 1, 10**9), default=BUDGET, metavar="N",
        help="prefixes that --exact may read (%(default)s)")
    add("-n", "--n", type=many, default=1, metavar="N",
        help="sentences to draw, or the N best of a beam (%(default)s)")
    add("--trace", action="store_true", help="the model's view of each sentence, symbol by symbol")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the random draws (%(default)s)")
    add("--checkpoint", metavar="FILE",
        help="a best.pt or last.pt, or a run's folder (the newest run's best.pt)")
    # fmt: on
    return parser


def chosen_decoder(options, parser) -> str | None:
    """The decoder that is asked for (None: each of them), if it takes the options that are given."""
    given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    decoder = next((name for name in TAKES if name in given), None)
    if decoder is None and {"temperature", "top_k", "nucleus"} & {*given}:
        decoder = "sample"
    for name in given:
        if any(name in taken for taken in TAKES.values()) and name not in TAKES.get(decoder, ()):
            rest = f"does not go with --{decoder}" if decoder else "needs a decoder, such as --beam 5"
            parser.error(f"--{name.replace('_', '-')} {rest}")
    if decoder == "beam" and options.n > options.beam:
        parser.error(f"-n {options.n} needs --beam {options.n} or more")
    return decoder


def main() -> None:
    parser = command_parser()
    options = parser.parse_args()
    decoder = chosen_decoder(options, parser)
    checkpoint = checkpoint_of(options.checkpoint)
    from tp5 import load_model  # tp5 imports this file

    model = load_model(checkpoint)
    parts = model.rnn, model.emb, model.decoder, EOS_IX
    print(printable(f"{checkpoint}: {model.cell}, start {options.start!r}, seed {options.seed}"))
    try:
        options.start = code2string(codes_of(options.start))
        if decoder:
            write(decoder, options, parts)
        for arguments in () if decoder else EACH:
            print(f"\n{arguments}")
            each = parser.parse_args(arguments.split(), argparse.Namespace(**vars(options)))
            write(chosen_decoder(each, parser), each, parts)
    except ValueError as error:
        raise LabError(error) from None


if __name__ == "__main__":
    guard(main)
