# ruff: noqa
import torch
from textloader import string2code, code2string, EOS_IX


def generate(rnn, emb, decoder, eos, start="", maxlen=200, temperature=1.0):
    written, symbol, state = [], torch.tensor([eos] + string2code(start).tolist()), None
    while len(written) < maxlen:
        output, state = rnn(emb(symbol)[:, None], state)
        p = (decoder(output[-1, 0]) / temperature).softmax(-1)
        symbol = torch.multinomial(p, 1)
        written.append(symbol)
        if symbol.item() == eos:
            break
    return torch.cat(written)


def pick(state, rows):
    return tuple(part[:, rows] for part in state) if isinstance(state, tuple) else state[:, rows]


def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=200):
    symbol, state = torch.tensor([[eos] + string2code(start).tolist()]).T, None
    beams, scores = [[]], torch.zeros(1)
    done = []
    for step in range(maxlen):
        output, state = rnn(emb(symbol), state)
        total = scores[:, None] + decoder(output[-1]).log_softmax(-1)
        scores, places = total.flatten().topk(min(k, total.numel()))
        rows, codes = places // total.shape[1], places % total.shape[1]
        beams = [beams[r] + [c] for r, c in zip(rows.tolist(), codes.tolist())]
        done += [(s, b) for s, b in zip(scores.tolist(), beams) if b[-1] == eos or len(b) == maxlen]
        live = [j for j, b in enumerate(beams) if b[-1] != eos]
        if not live or len(done) >= k and max(done)[0] > scores[live].max():
            break
        beams, scores, rows, symbol = [beams[j] for j in live], scores[live], rows[live], codes[live][None]
        state = pick(state, rows)
    return code2string(max(done)[1])


def p_nucleus(decoder, alpha):
    def compute(h):
        p = decoder(h).softmax(-1).flatten()
        order = p.argsort(descending=True)
        total = p[order].cumsum(0)
        count = min(int((total < alpha).sum()) + 1, len(p))
        return order[torch.multinomial(p[order[:count]], 1)]

    return compute
