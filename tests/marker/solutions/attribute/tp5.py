# ruff: noqa
import torch, torch.nn as nn
import torch.nn.functional as F
from textloader import *
from generate import *


def maskedCrossEntropy(output, target, padcar):
    ce = F.nll_loss(output, target, reduction="none")
    return ce.where(target != padcar, torch.tensor(0.0)).sum()


class RNN(nn.Module):
    def __init__(self, input_size, output_size, hidden_size, batch_size=32):
        super(RNN, self).__init__()
        self.hidden_size = hidden_size
        self.i2h = nn.Linear(input_size, hidden_size, bias=False)
        self.h2h = nn.Linear(hidden_size, hidden_size)
        self.h2o = nn.Sequential(nn.Linear(hidden_size, output_size), nn.LogSoftmax(dim=-1))

    def forward(self, x, h):
        return torch.tanh(self.i2h(x) + self.h2h(h))

    def decode(self, h):
        return self.h2o(h)


class LSTM(nn.Module):
    def __init__(self, input_size, output_size, hidden_size):
        super().__init__()
        self.hidden_size = hidden_size
        self.gates = nn.ModuleList([nn.Linear(input_size + hidden_size, hidden_size) for _ in range(4)])
        self.h2o = nn.Sequential(nn.Linear(hidden_size, output_size), nn.LogSoftmax(dim=-1))

    def one_step(self, x, h):
        hx = torch.cat([h, x], 1)
        f, i, o = [torch.sigmoid(gate(hx)) for gate in self.gates[:3]]
        self.C = f * self.C + i * torch.tanh(self.gates[3](hx))
        return o * torch.tanh(self.C)

    def forward(self, x):
        h = torch.zeros(x.shape[0], self.hidden_size)
        self.C = torch.zeros(x.shape[0], self.hidden_size)
        res = torch.empty(x.shape[0], x.shape[1], self.hidden_size)
        for t in range(x.shape[1]):
            h = self.one_step(x[:, t, :], h)
            res[:, t] = h
        return res

    def decode(self, h):
        return self.h2o(h)


class GRU(nn.Module):
    def __init__(self, input_size, output_size, hidden_size):
        super().__init__()
        self.Wz = nn.Parameter(torch.rand(input_size, hidden_size))
        self.Uz = nn.Parameter(torch.rand(hidden_size, hidden_size))
        self.Wr = nn.Parameter(torch.rand(input_size, hidden_size))
        self.Ur = nn.Parameter(torch.rand(hidden_size, hidden_size))
        self.Wh = nn.Parameter(torch.rand(input_size, hidden_size))
        self.Uh = nn.Parameter(torch.rand(hidden_size, hidden_size))
        self.h2o = nn.Sequential(nn.Linear(hidden_size, output_size), nn.LogSoftmax(dim=-1))

    def forward(self, x, h):
        z = torch.sigmoid(x @ self.Wz + h @ self.Uz)
        r = torch.sigmoid(x @ self.Wr + h @ self.Ur)
        return (1 - z) * h + z * torch.tanh(x @ self.Wh + (r * h) @ self.Uh)

    def decode(self, h):
        return self.h2o(h)


emb = nn.Embedding(len(id2lettre), 16)
net = GRU(16, len(id2lettre), 32)


def fit(model, embedding):
    optim = torch.optim.Adam(list(model.parameters()) + list(embedding.parameters()))


fit(net, emb)
