"""Questions 3, 6 and 7: write sentences with a trained model.

A decoder here works on any `(rnn, emb, decoder)`: our cells or `torch.nn.RNN/GRU/LSTM`, a
`torch.nn.Embedding`, a linear layer from hidden state to logits. It reads EOS and the start text
once, then advances the state one symbol at a time; it never runs a prefix again.

    python generate.py                 # every decoder side by side
    python generate.py --beam 5        # the most likely sentences that a beam of 5 finds
    python generate.py --beam 5 --nucleus 0.9 --start "Our "
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from textloader import EOS_IX, HERE, PAD_IX, LabError, Parser, clean, id2lettre, number, run_main, string2code

RUNS = HERE / "runs"
MAXLEN = 200


@dataclass(frozen=True)
class Hypothesis:
    """A sentence that a decoder wrote, and how likely it is.

    text             the new characters, without start text, EOS or BLANK
    log_prob         nats, of those characters and of EOS where it ended, under the model itself
    ended            True if it closed with EOS, False if it was cut at `maxlen`
    gap              nats by which a sentence that the search did not return may still be better:
                     0 means proved, None that nothing was searched
    search_log_prob  nats, under the distribution that was searched or sampled (temperature, nucleus)
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
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}, must be above 0 and at most 1")

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


def without_blank(decoder):
    """`decoder` with BLANK's logit at −inf: the distribution that every decoder here reads."""

    def logits(h):
        blank = torch.tensor([PAD_IX], device=h.device)
        return decoder(h).index_fill(-1, blank, float("-inf"))

    return logits


def distributions(decoder, h, temperature: float = 1.0, alpha: float = 1.0):
    """Log-probabilities of the next symbol after `h` (K, H), float64: the model's, and the search's.

    The search's is the model's at `temperature` (> 0), then cut to its nucleus of mass `alpha`.
    """
    logits = without_blank(decoder)(h).double()  # (K, V)
    model = logits.log_softmax(-1)
    # The largest logit becomes 0 first, so that a temperature near 0 cannot overflow.
    cooled = (logits - logits.amax(-1, keepdim=True)) / temperature
    if alpha == 1:
        return model, cooled.log_softmax(-1)
    return model, p_nucleus(lambda logits: logits, alpha)(cooled).log()


# ------------------------------------------------------------------------------------------ state


def advance(rnn, emb, symbols, state=None):
    """Read `symbols` (T, K); return the last hidden state (K, H) and the state after it."""
    output, state = rnn(emb(symbols), state)
    return output[-1], state


def select(state, beams):
    """The state of the given beams, in their order: the batch is every tensor's last axis but one."""
    if isinstance(state, tuple):
        return tuple(select(part, beams) for part in state)
    return state.index_select(-2, beams)


def read_start(rnn, emb, eos: int, start: str):
    """Read EOS and the start text from a zero state: hidden state (1, H) and state of one beam."""
    dropped = clean(start)[1]
    if dropped:
        raise ValueError(f"the start text has characters outside the alphabet: {' '.join(dropped)}")
    codes = torch.cat([torch.tensor([eos]), string2code(start)]).to(emb.weight.device)
    return advance(rnn, emb, codes.unsqueeze(1))


def check_options(k=1, maxlen=1, temperature=1.0, alpha=1.0) -> None:
    """Raise ValueError for an option out of range."""
    if k < 1:
        raise ValueError(f"k is {k}, must be at least 1")
    if maxlen < 1:
        raise ValueError(f"maxlen is {maxlen}, must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, must be 0 or more")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}, must be above 0 and at most 1")


# --------------------------------------------------------------------------------------- decoders


def generate(rnn, emb, decoder, eos, start="", maxlen=MAXLEN, *, temperature=0.0, alpha=1.0, generator=None):
    """Question 3: write one sentence, symbol by symbol, until EOS or `maxlen` characters.

    temperature  0: greedy, always the most likely symbol (a beam of one); above 0: a random symbol
                 from the distribution at that temperature
    alpha        sample from the nucleus of this mass (after the temperature)
    generator    a CPU `torch.Generator` for the sampling; None: a fresh one, seeded by the system

    Returns a Hypothesis. Raises ValueError for options out of range or a start text outside the
    alphabet. The global random state is not touched.
    """
    check_options(maxlen=maxlen, temperature=temperature, alpha=alpha)
    if temperature == 0:
        return generate_beam(rnn, emb, decoder, eos, 1, start, maxlen)[0]
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return _sample(rnn, emb, decoder, eos, start, maxlen, temperature, alpha, generator)


@torch.no_grad()
def _sample(rnn, emb, decoder, eos, start, maxlen, temperature, alpha, generator) -> Hypothesis:
    h, state = read_start(rnn, emb, eos, start)
    text, log_prob, search_log_prob = "", 0.0, 0.0
    while True:
        model, search = distributions(decoder, h, temperature, alpha)  # (1, V) each
        symbol = torch.multinomial(search[0].exp().cpu(), 1, generator=generator).item()
        ended = symbol == eos
        if not ended and len(text) == maxlen:
            return Hypothesis(text, log_prob, False, None, search_log_prob)
        log_prob += model[0, symbol].item()
        search_log_prob += search[0, symbol].item()
        if ended:
            return Hypothesis(text, log_prob, True, None, search_log_prob)
        text += id2lettre[symbol]
        h, state = advance(rnn, emb, torch.tensor([[symbol]], device=h.device), state)


@torch.no_grad()
def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=MAXLEN, *, alpha=1.0):
    """Questions 6 and 7: beam search for the most likely sentences; `alpha` below 1: nucleus beam.

    At every step the `k` most likely prefixes are kept, live and ended together, so `k = 1` is
    greedy. A prefix's log-probability can only fall. So the largest among the prefixes that the
    search let go bounds every sentence that it did not return: what a sentence lacks to that bound
    is its `gap`, and one without gap is proved to be the most likely (of those not returned).

    Returns a list of at most `k` Hypothesis, best first: ended ones by the log-probability that was
    searched, then those cut at `maxlen`. Raises ValueError for options out of range or a start text
    outside the alphabet.
    """
    check_options(k=k, maxlen=maxlen, alpha=alpha)
    h, state = read_start(rnn, emb, eos, start)
    texts, own, scores = [""], h.new_zeros(1).double(), h.new_zeros(1).double()  # of the live beams
    ended, cut = [], []  # (search score, own score, text), best first
    bound = -math.inf
    for length in range(maxlen + 1):
        model, search = distributions(decoder, h, alpha=alpha)  # (live, V) each
        pool = torch.cat([scores.new_tensor([e[0] for e in ended]), (scores[:, None] + search).flatten()])
        ranked, places = pool.sort(descending=True, stable=True)
        bound = max(bound, *ranked[k : k + 1].tolist(), -math.inf)  # the best of those let go
        survivors = places[:k][ranked[:k] > -math.inf].tolist()

        grown, now_ended = [], [ended[p] for p in survivors if p < len(ended)]
        for place in survivors:
            beam, symbol = divmod(place - len(ended), search.shape[-1])
            if beam < 0:  # ended at an earlier step
                continue
            if symbol == eos:
                now_ended.append((pool[place].item(), (own[beam] + model[beam, eos]).item(), texts[beam]))
            elif length < maxlen:
                grown.append((place, beam, symbol))
            elif (scores[beam].item(), own[beam].item(), texts[beam]) not in cut:
                cut.append((scores[beam].item(), own[beam].item(), texts[beam]))
        ended = sorted(now_ended, key=lambda e: -e[0])
        if not grown:
            break

        places, beams, symbols = (torch.tensor(column, device=h.device) for column in zip(*grown, strict=True))
        texts = [texts[beam] + id2lettre[symbol] for _, beam, symbol in grown]
        scores, own = pool[places], own[beams] + model[beams, symbols]
        h, state = advance(rnn, emb, symbols.unsqueeze(0), select(state, beams))

    found = [(*e, True) for e in ended] + [(*c, False) for c in sorted(cut, key=lambda c: -c[0])]
    return [
        Hypothesis(text, log_prob, is_ended, max(0.0, bound - score), score)
        for score, log_prob, text, is_ended in found[:k]
    ]


@torch.no_grad()
def score(rnn, emb, decoder, eos, text, start="", *, ended=True) -> float:
    """Log-probability (nats) of `text` after `start`, EOS included if `ended`, by one forward pass."""
    read = torch.cat([torch.tensor([eos]), string2code(start), string2code(text)]).to(emb.weight.device)
    wanted = torch.cat([string2code(text), torch.tensor([eos] if ended else [], dtype=torch.int64)])
    if not len(wanted):
        return 0.0
    output, _ = rnn(emb(read).unsqueeze(1))  # (T, 1, H)
    first = len(read) - len(string2code(text)) - 1
    logits = without_blank(decoder)(output[first : first + len(wanted), 0]).double()  # (n, V)
    wanted = wanted.to(logits.device).unsqueeze(1)
    return logits.log_softmax(-1).gather(1, wanted).sum().item()


# ----------------------------------------------------------------------------------- command line


def newest_checkpoint(runs: Path = RUNS) -> Path:
    """`best.pt` of the newest run in `runs`; raises LabError if there is none."""
    found = sorted(runs.glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise LabError(f"no run in {runs} yet: train one first with `python tp5.py --model lstm`")
    return found[-1]


def show(title: str, start: str, hypotheses: list[Hypothesis]) -> None:
    """Print a decoder's sentences with their scores."""
    print(f"\n{title}")
    for hypothesis in hypotheses:
        print(f"  {start}{hypothesis.text}{'' if hypothesis.ended else ' …'}")
        facts = [
            f"{hypothesis.log_prob:.2f} nats",
            f"{hypothesis.bits_per_character:.2f} bits per character",
            "ended" if hypothesis.ended else "cut at maxlen",
        ]
        if hypothesis.search_log_prob != hypothesis.log_prob:
            facts.insert(1, f"{hypothesis.search_log_prob:.2f} as searched or sampled")
        if hypothesis.gap is not None:
            proved = hypothesis.gap == 0 and hypothesis.ended
            facts.append("proved optimal" if proved else f"at most {hypothesis.gap:.2f} nats from the optimum")
        print(f"    {', '.join(facts)}")


def parse_options() -> object:
    parser = Parser(prog="generate.py", description="Write sentences with a trained model.")
    add = parser.add_argument
    add("--beam", type=number(int, 1), metavar="K", help="beam search that keeps the K likeliest prefixes")
    add("--nucleus", type=number(float, 0, 1, above=True), metavar="ALPHA",
        help="only the likeliest symbols of mass ALPHA: with --beam a nucleus beam, alone sampling")  # fmt: skip
    add("--sample", action="store_true", help="draw each symbol from the model")
    add("--temperature", type=number(float, 0), metavar="T",
        help="sample at this temperature: below 1 bolder, 0 greedy")  # fmt: skip
    add("--greedy", action="store_true", help="take the likeliest symbol each time")
    add("--start", default="", metavar="TEXT", help="text that the sentence goes on from")
    add("--maxlen", type=number(int, 1), default=MAXLEN, metavar="N", help="most new characters of a sentence")
    add("-n", type=number(int, 1), default=1, metavar="N", help="number of sentences of each decoder")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the sampling")
    add("--checkpoint", type=Path, metavar="FILE", help="a best.pt or last.pt (default: newest run's best.pt)")
    options = parser.parse_args()
    sampling = options.sample or options.temperature is not None
    if options.beam and (sampling or options.greedy):
        parser.error("--beam does not go with --sample, --temperature or --greedy")
    if options.greedy and (sampling or options.nucleus):
        parser.error("--greedy does not go with --sample, --temperature or --nucleus")
    if options.beam and options.n > options.beam:
        parser.error(f"-n {options.n} sentences need a beam of at least as many: --beam {options.n}")
    if options.greedy and options.n > 1:
        parser.error("--greedy writes one sentence: leave -n out")
    return options


def main() -> None:
    options = parse_options()
    path = options.checkpoint or newest_checkpoint()
    from tp5 import load_model  # tp5 imports this file

    model = load_model(path)
    parts = (model.rnn, model.emb, model.decoder, EOS_IX, options.start, options.maxlen)
    generator = torch.Generator().manual_seed(options.seed)
    print(f"{path}: {model.cell}, start {options.start!r}, seed {options.seed}")

    def sample(temperature=1.0, alpha=1.0):
        count = options.n if temperature else 1
        sampled = dict(temperature=temperature, alpha=alpha, generator=generator)
        return [generate(*parts, **sampled) for _ in range(count)]

    def beam(k, alpha=1.0):
        return generate_beam(*parts[:4], k, *parts[4:], alpha=alpha)[: options.n]

    try:
        if options.beam:
            nucleus = f" over the nucleus of {options.nucleus}" if options.nucleus else ""
            show(f"beam of {options.beam}{nucleus}", options.start, beam(options.beam, options.nucleus or 1.0))
        elif options.greedy:
            show("greedy", options.start, sample(0.0))
        elif options.sample or options.temperature is not None or options.nucleus:
            temperature = 1.0 if options.temperature is None else options.temperature
            alpha = options.nucleus or 1.0
            title = f"sampled at temperature {temperature} from the nucleus of {alpha}"
            show(title, options.start, sample(temperature, alpha))
        else:
            show("greedy", options.start, sample(0.0))
            show("sampled", options.start, sample())
            show("sampled at temperature 0.5", options.start, sample(0.5))
            show("sampled from the nucleus of 0.9", options.start, sample(alpha=0.9))
            show("beam of 5", options.start, beam(max(5, options.n)))
            show("beam of 5 over the nucleus of 0.9", options.start, beam(max(5, options.n), 0.9))
    except ValueError as error:
        raise LabError(error) from None


if __name__ == "__main__":
    run_main(main)
