# ruff: noqa
from textloader import string2code, code2string, id2lettre, PAD_IX
import torch
import torch.nn.functional as F


def read(rnn, codes):
    zeros = torch.zeros(1, rnn.latent_dim)
    h = (zeros, zeros) if type(rnn).__name__ == "LSTM" else zeros
    logits, h = rnn(torch.tensor([codes]), h)
    return logits[0, -1]


def generate(rnn, emb, decoder, eos, start="", maxlen=200):
    codes = [PAD_IX] + string2code(start).tolist()
    while len(codes) < maxlen:
        code = read(rnn, codes).argmax().item()
        codes.append(code)
        if code == eos:
            break
    return codes[1:]


def generate_beam(rnn, emb, decoder, eos, k, start="", maxlen=200):
    beams = [([PAD_IX] + string2code(start).tolist(), 0)]
    for _ in range(maxlen):
        if all(codes[-1] == eos for codes, _ in beams):
            break
        children = []
        for codes, score in beams:
            if codes[-1] == eos:
                children.append((codes, score))
                continue
            logp = F.log_softmax(read(rnn, codes), dim=-1)
            children += [(codes + [i], score + logp[i].item()) for i in range(len(id2lettre))]
        beams = sorted(children, key=lambda c: c[1])[-k:]
    return [(code2string(codes), score) for codes, score in beams]


def p_nucleus(decoder, alpha):
    def compute(h):
        p = F.softmax(decoder(h).squeeze(), dim=-1)
        values, indices = torch.sort(p, descending=True)
        kept, total = 0, 0.0
        while total < alpha and kept < len(p):
            total += values[kept].item()
            kept += 1
        values, indices = values[:kept], indices[:kept]
        return values / values.sum(), indices

    return compute
