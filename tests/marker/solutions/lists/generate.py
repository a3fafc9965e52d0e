# ruff: noqa
import torch
from textloader import *


def generate(rnn, emb, decoder, eos, start="", maxlen=200):
    h = torch.zeros(1, rnn.D.shape[1])
    for letter in start:
        h = rnn.one_step(emb(string2code(letter)), h)
    sentence = start
    while len(sentence) < maxlen:
        code = torch.multinomial(torch.softmax(decoder(h), -1), 1).flatten()
        sentence += code2string(code)
        if code == eos:
            return sentence
        h = rnn.one_step(emb(code), h)
    return sentence


def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=200):
    h = rnn(emb(string2code(start))[:, None], torch.zeros(1, rnn.D.shape[1]))[-1]
    scores, written, ended = torch.zeros(1), [[]], []
    for _ in range(maxlen):
        logp = torch.log_softmax(decoder(h), -1) + scores[:, None]
        best, places = logp.flatten().topk(k)
        rows, codes = places // logp.shape[1], places % logp.shape[1]
        written = [written[r] + [c] for r, c in zip(rows.tolist(), codes.tolist())]
        h, scores = rnn.one_step(emb(codes), h[rows]), best
        live = []
        for j, w in enumerate(written):
            if w[-1] == eos:
                ended.append((scores[j].item(), w))
            else:
                live.append(j)
        if not live:
            break
        h, scores, written = h[live], scores[live], [written[j] for j in live]
    else:
        ended += [(s.item(), w) for s, w in zip(scores, written)]
    return [start + code2string(w) for s, w in sorted(ended, reverse=True)]


def p_nucleus(decoder, alpha):
    def compute(h):
        logits = decoder(h)
        values, order = torch.sort(logits, descending=True)
        total = torch.softmax(values, -1).cumsum(-1)
        remove = total > alpha
        remove[..., 1:] = remove[..., :-1].clone()
        remove[..., 0] = False
        logits = logits.masked_fill(remove.scatter(-1, order, remove), float("-inf"))
        return torch.log_softmax(logits, -1)

    return compute
