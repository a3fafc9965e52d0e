# ruff: noqa
from textloader import *
import torch
from torch.distributions import Categorical


def generate(rnn, emb, decoder, eos, start="", maxlen=200):
    codes = string2code(start) if start else torch.tensor([eos])
    h = rnn(emb(codes).unsqueeze(1))[-1]
    written = []
    for _ in range(maxlen):
        code = Categorical(logits=decoder(h)).sample()
        if code.item() == eos:
            break
        written.append(code.item())
        h = rnn.one_step(emb(code), h)
    return start + code2string(written)


def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=200):
    codes = string2code(start) if start else torch.tensor([eos])
    h = rnn(emb(codes).unsqueeze(1))[-1]
    beams = [([], 0.0, h)]
    for _ in range(maxlen):
        children = []
        for written, score, h in beams:
            if written and written[-1] == eos:
                children.append((written, score, h))
                continue
            if written:
                h = rnn.one_step(emb(torch.tensor([written[-1]])), h)
            logp = torch.log_softmax(decoder(h), dim=-1).squeeze(0)
            values, indices = logp.topk(k)
            for value, index in zip(values.tolist(), indices.tolist()):
                children.append((written + [index], score + value, h))
        children.sort(key=lambda child: child[1], reverse=True)
        beams = children[:k]
    return start + code2string(beams[0][0])


def p_nucleus(decoder, alpha):
    def compute(h):
        p = torch.softmax(decoder(h), dim=-1)
        sorted_p, order = torch.sort(p, dim=-1, descending=True)
        total = sorted_p.cumsum(-1)
        remove = total - sorted_p >= alpha
        sorted_p = sorted_p.masked_fill(remove, 0.0)
        q = torch.zeros_like(p).scatter(-1, order, sorted_p)
        return q / q.sum(-1, keepdim=True)

    return compute
