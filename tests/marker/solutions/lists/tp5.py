# ruff: noqa
import torch
from torch import nn
from torch.nn import CrossEntropyLoss
from textloader import *
from generate import *


def maskedCrossEntropy(output, target, padcar):
    loss = CrossEntropyLoss(ignore_index=padcar)
    return loss(output.permute(0, 2, 1), target)


class RNN(nn.Module):
    def __init__(self, hidden, inp, out):
        super().__init__()
        self.hidden = hidden
        self.W = nn.Parameter(torch.zeros(hidden, inp))
        self.U = nn.Parameter(torch.zeros(hidden, hidden))
        self.b = nn.Parameter(torch.zeros(hidden))
        self.D = nn.Parameter(torch.zeros(out, hidden))
        self.bd = nn.Parameter(torch.zeros(out))

    def one_step(self, x, h):
        return torch.relu(x @ self.W.T + h @ self.U.T + self.b)

    def forward(self, x, h):
        history = [h]
        for t in range(x.shape[0]):
            history.append(self.one_step(x[t], history[-1]))
        return history

    def decode(self, h):
        return nn.functional.linear(h, self.D, self.bd)


class LSTM(RNN):
    def __init__(self, hidden, inp, out):
        super().__init__(hidden, inp, out)
        self.f = nn.Linear(hidden + inp, hidden)
        self.i = nn.Linear(hidden + inp, hidden)
        self.c = nn.Linear(hidden + inp, hidden)
        self.o = nn.Linear(hidden + inp, hidden)

    def one_step(self, x, c, h):
        hx = torch.cat((h, x), -1)
        c = self.f(hx).sigmoid() * c + self.i(hx).sigmoid() * self.c(hx).tanh()
        return c, self.o(hx).sigmoid() * c.tanh()

    def forward(self, x, c, h):
        history = [h]
        for t in range(x.shape[0]):
            c, h = self.one_step(x[t], c, h)
            history.append(h)
        return c, history


class GRU(nn.Module):
    def __init__(self, hidden, inp, out):
        super().__init__()
        self.z = nn.Linear(hidden + inp, hidden)
        self.r = nn.Linear(hidden + inp, hidden)
        self.w = nn.Linear(hidden + inp, hidden)
        self.out = nn.Linear(hidden, out)

    def one_step(self, x, h):
        hx = torch.cat((h, x), -1)
        z, r = self.z(hx).sigmoid(), self.r(hx).sigmoid()
        return (1 - z) * h + z * self.w(torch.cat((r * h, x), -1)).tanh()

    def forward(self, x, h):
        history = [h]
        for t in range(x.shape[0]):
            history.append(self.one_step(x[t], history[-1]))
        return history

    def decode(self, h):
        return self.out(h)


class Model(nn.Module):
    def __init__(self, rnn, emb):
        super().__init__()
        self.rnn, self.emb = rnn, emb

    def forward(self, x):
        h = self.rnn(self.emb(x), torch.zeros(x.shape[1], self.rnn.hidden))
        return self.rnn.decode(torch.stack(h[1:]))


def main():
    emb = nn.Embedding(97, 20)
    model = Model(RNN(50, 20, 97), emb)
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in TextDataset("A. B."):
        loss = maskedCrossEntropy(model(x[:-1]), x[1:], padcar=PAD_IX)
        loss.backward()
        optim.step()
