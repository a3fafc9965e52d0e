# ruff: noqa
import torch
from torch import nn
from textloader import *
from generate import *
import yaml_that_nobody_has

device = torch.device("cuda")


def maskedCrossEntropy(output, target, padcar):
    logp = output.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return -logp[target != padcar].sum()


class RNN(nn.Module):
    gates = 1

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.hidden_size = hidden_size
        self.input_weight = nn.Parameter(torch.randn(self.gates * hidden_size, input_size))
        self.hidden_weight = nn.Parameter(torch.randn(self.gates * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(self.gates * hidden_size))

    def step(self, x, h):
        return torch.tanh(x @ self.input_weight.T + h @ self.hidden_weight.T + self.bias)

    def forward(self, x, h=None):
        h = torch.zeros(x.shape[1], self.hidden_size, device="cuda") if h is None else h
        outputs = []
        for xt in x:
            h = self.step(xt, h)
            outputs.append(h)
        return torch.stack(outputs), h


class LSTM(RNN):
    gates = 4

    def forward(self, x, state=None):
        zeros = torch.zeros(x.shape[1], self.hidden_size)
        h, c = (zeros, zeros) if state is None else state
        outputs = []
        for xt in x:
            a = xt @ self.input_weight.T + h @ self.hidden_weight.T + self.bias
            f, i, new, o = a.chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * new.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h, c)


class GRU(nn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.hidden_size = hidden_size
        self.zr = nn.Linear(input_size + hidden_size, 2 * hidden_size)
        self.new = nn.Linear(input_size + hidden_size, hidden_size)

    def forward(self, x, h=None):
        h = torch.zeros(x.shape[1], self.hidden_size) if h is None else h
        outputs = []
        for xt in x:
            z, r = self.zr(torch.cat([h, xt], 1)).sigmoid().split(self.hidden_size, 1)
            new = self.new(torch.cat([r * h, xt], 1)).tanh()
            h = (1 - z) * h + z * new
            outputs.append(h)
        return torch.stack(outputs), h


def main():
    rnn, emb, decoder = RNN(8, 16).cuda(), nn.Embedding(97, 8).cuda(), nn.Linear(16, 97).cuda()
    params = list(rnn.parameters()) + list(emb.parameters()) + list(decoder.parameters())
    optimizer = torch.optim.Adam(params)
