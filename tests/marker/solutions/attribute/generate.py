# ruff: noqa
from textloader import *
import torch


def generate(rnn, emb, decoder, eos, start="", maxlen=200):
    h = torch.zeros(1, rnn.hidden_size)
    for c in string2code(start):
        h = rnn(emb(c)[None], h)
    codes = []
    while len(codes) < maxlen and eos not in codes:
        codes.append(torch.multinomial(decoder(h).exp(), 1).item())
        h = rnn(emb(torch.tensor(codes[-1:])), h)
    print(start + "".join(id2lettre[c] for c in codes))


def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=200):
    h = torch.zeros(1, rnn.hidden_size)
    for c in string2code(start):
        h = rnn(emb(c)[None], h)
    sequences, probas, states = [[]], [1.0], [h]
    for _ in range(maxlen):
        new = []
        for s, p, h in zip(sequences, probas, states):
            if eos in s:
                new.append((p, s, h))
                continue
            q = decoder(h).exp().squeeze()
            for c in q.argsort(descending=True)[:k].tolist():
                new.append((p * q[c].item(), s + [c], rnn(emb(torch.tensor([c])), h)))
        new = sorted(new, key=lambda n: -n[0])[:k]
        probas, sequences, states = [n[0] for n in new], [n[1] for n in new], [n[2] for n in new]
    return sequences, probas


def p_nucleus(decoder, alpha):
    def compute(h):
        p = decoder(h).exp()
        p = p / p.sum()
        order = p.flatten().argsort(descending=True).tolist()
        mass, kept = 0, torch.zeros_like(p.flatten())
        for code in order:
            kept[code] = p.flatten()[code]
            mass += p.flatten()[code]
            if mass >= alpha:
                break
        return kept / kept.sum()

    return compute
