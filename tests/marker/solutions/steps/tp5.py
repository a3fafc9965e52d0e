# ruff: noqa
import torch
import torch.nn as nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from textloader import *
from generate import *

writer = SummaryWriter("runs/steps")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def maskedCrossEntropy(output, target, padcar):
    mask = target != padcar
    loss = nn.functional.cross_entropy(output, target, reduction="none")
    return (loss * mask).sum() / mask.sum()


class RNN(nn.Module):
    def __init__(self, dim_in, dim_hidden, dim_out):
        super().__init__()
        self.dim_hidden = dim_hidden
        self.w = nn.Linear(dim_in + dim_hidden, dim_hidden)
        self.v = nn.Linear(dim_hidden, dim_out)

    def one_step(self, x, h):
        return torch.tanh(self.w(torch.cat([x, h], dim=1)))

    def forward(self, x, h=None):
        if h is None:
            h = torch.zeros(x.shape[1], self.dim_hidden)
        states = []
        for xt in x:
            h = self.one_step(xt, h)
            states.append(h)
        return torch.stack(states)

    def decode(self, h):
        return self.v(h)


class LSTM(RNN):
    def __init__(self, dim_in, dim_hidden, dim_out):
        super().__init__(dim_in, dim_hidden, dim_out)
        self.wf = nn.Linear(dim_in + dim_hidden, dim_hidden)
        self.wi = nn.Linear(dim_in + dim_hidden, dim_hidden)
        self.wc = nn.Linear(dim_in + dim_hidden, dim_hidden)
        self.wo = nn.Linear(dim_in + dim_hidden, dim_hidden)

    def one_step(self, x, h, c):
        xh = torch.cat([x, h], dim=1)
        f = torch.sigmoid(self.wf(xh))
        i = torch.sigmoid(self.wi(xh))
        c = f * c + i * torch.tanh(self.wc(xh))
        o = torch.sigmoid(self.wo(xh))
        return o * torch.tanh(c), c

    def forward(self, x, h=None, c=None):
        if h is None:
            h = torch.zeros(x.shape[1], self.dim_hidden)
        if c is None:
            c = torch.zeros(x.shape[1], self.dim_hidden)
        states = []
        for xt in x:
            h, c = self.one_step(xt, h, c)
            states.append(h)
        return torch.stack(states)


class GRU(nn.Module):
    def __init__(self, dim_in, dim_hidden, dim_out):
        super().__init__()
        self.dim_hidden = dim_hidden
        self.wz = nn.Linear(dim_in + dim_hidden, dim_hidden, bias=False)
        self.wr = nn.Linear(dim_in + dim_hidden, dim_hidden, bias=False)
        self.w = nn.Linear(dim_in + dim_hidden, dim_hidden, bias=False)
        self.v = nn.Linear(dim_hidden, dim_out)

    def one_step(self, x, h):
        xh = torch.cat([x, h], dim=1)
        z = torch.sigmoid(self.wz(xh))
        r = torch.sigmoid(self.wr(xh))
        return (1 - z) * h + z * torch.tanh(self.w(torch.cat([x, r * h], dim=1)))

    def forward(self, x, h=None):
        if h is None:
            h = torch.zeros(x.shape[1], self.dim_hidden)
        states = []
        for xt in x:
            h = self.one_step(xt, h)
            states.append(h)
        return torch.stack(states)

    def decode(self, h):
        return self.v(h)


data = DataLoader(TextDataset(open("data/trump_full_speech.txt").read()), collate_fn=pad_collate_fn, batch_size=32)
emb = nn.Embedding(len(id2lettre), 64)
rnn = RNN(64, 100, len(id2lettre))
optim = torch.optim.Adam([*rnn.parameters(), *emb.parameters()], lr=1e-3)
for epoch in range(100):
    for x in data:
        y = rnn.decode(rnn(emb(x[:-1])))
        loss = maskedCrossEntropy(y.flatten(0, 1), x[1:].flatten(), PAD_IX)
        optim.zero_grad()
        loss.backward()
        optim.step()
    print(generate(rnn, emb, rnn.decode, EOS_IX, "The "))
