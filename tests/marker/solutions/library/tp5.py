# ruff: noqa
import torch
import torch.nn as nn
from textloader import *
from generate import *


def maskedCrossEntropy(output, target, padcar):
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=padcar, reduction="sum")


class RNN(nn.Module):
    def __init__(self, input_size, hidden_size, output_size):
        super().__init__()
        self.rnn = nn.RNN(input_size, hidden_size)
        self.out = nn.Linear(hidden_size, output_size)

    def forward(self, x, h=None):
        return self.rnn(x, h)

    def decode(self, h):
        return self.out(h)


class LSTM(RNN):
    def __init__(self, input_size, hidden_size, output_size):
        super().__init__(input_size, hidden_size, output_size)
        self.rnn = nn.LSTM(input_size, hidden_size)


class GRU(RNN):
    def __init__(self, input_size, hidden_size, output_size):
        super().__init__(input_size, hidden_size, output_size)
        self.rnn = nn.GRU(input_size, hidden_size)


def train(data):
    emb = nn.Embedding(97, 16, padding_idx=PAD_IX)
    rnn = GRU(16, 32, 97)
    optimizer = torch.optim.Adam(rnn.parameters())
    optimizer.add_param_group({"params": emb.parameters()})
