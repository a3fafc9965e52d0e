# ruff: noqa
from textloader import *
from generate import *
import torch.nn as nn
import torch.nn.functional as F
from icecream import ic


def maskedCrossEntropy(output, target, padcar):
    loss = F.cross_entropy(output.view(-1, output.size(-1)), target.reshape(-1), reduction="none")
    mask = (target != padcar).float().reshape(-1)
    return (loss * mask).sum() / mask.sum()


class RNN(nn.Module):
    def __init__(self, vocab_size, emb_dim, latent_dim, output_dim):
        super().__init__()
        self.latent_dim = latent_dim
        self.embedding = nn.Embedding(vocab_size, emb_dim)
        self.wx = nn.Linear(emb_dim, latent_dim)
        self.wh = nn.Linear(latent_dim, latent_dim)
        self.decoder = nn.Linear(latent_dim, output_dim)

    def one_step(self, x, h):
        return torch.tanh(self.wx(x) + self.wh(h))

    def forward(self, x, h):
        x = self.embedding(x)
        outputs = []
        for t in range(x.size(1)):
            h = self.one_step(x[:, t], h)
            outputs.append(self.decode(h))
        return torch.stack(outputs, dim=1), h

    def decode(self, h):
        return self.decoder(h)


class LSTM(RNN):
    def __init__(self, vocab_size, emb_dim, latent_dim, output_dim):
        super().__init__(vocab_size, emb_dim, latent_dim, output_dim)
        self.forget_x = nn.Linear(emb_dim, latent_dim)
        self.forget_h = nn.Linear(latent_dim, latent_dim)
        self.input_x = nn.Linear(emb_dim, latent_dim)
        self.input_h = nn.Linear(latent_dim, latent_dim)
        self.output_x = nn.Linear(emb_dim, latent_dim)
        self.output_h = nn.Linear(latent_dim, latent_dim)

    def one_step(self, x, state):
        h, c = state
        f = torch.sigmoid(self.forget_x(x) + self.forget_h(h))
        i = torch.sigmoid(self.input_x(x) + self.input_h(h))
        o = torch.sigmoid(self.output_x(x) + self.output_h(h))
        c = f * c + i * torch.tanh(self.wx(x) + self.wh(h))
        return o * torch.tanh(c), c

    def forward(self, x, state):
        x = self.embedding(x)
        outputs = []
        for t in range(x.size(1)):
            state = self.one_step(x[:, t], state)
            outputs.append(self.decode(state[0]))
        return torch.stack(outputs, dim=1), state


class GRU(nn.Module):
    def __init__(self, vocab_size, emb_dim, latent_dim, output_dim):
        super().__init__()
        self.latent_dim = latent_dim
        self.embedding = nn.Embedding(vocab_size, emb_dim)
        self.update = nn.Linear(emb_dim + latent_dim, latent_dim)
        self.reset = nn.Linear(emb_dim + latent_dim, latent_dim)
        self.candidate = nn.Linear(emb_dim + latent_dim, latent_dim)
        self.decoder = nn.Linear(latent_dim, output_dim)

    def forward(self, x, h):
        x = self.embedding(x)
        outputs = []
        for t in range(x.size(1)):
            hx = torch.cat((h, x[:, t]), dim=1)
            z = torch.sigmoid(self.update(hx))
            r = torch.sigmoid(self.reset(hx))
            new = torch.tanh(self.candidate(torch.cat((r * h, x[:, t]), dim=1)))
            h = z * h + (1 - z) * new
            outputs.append(self.decode(h))
        return torch.stack(outputs, dim=1), h

    def decode(self, h):
        return self.decoder(h)


def train(model, data, epochs=10):
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(epochs):
        for x in data:
            h = torch.zeros(x.shape[1], model.latent_dim)
            output, _ = model(x[:-1].T, h)
            loss = maskedCrossEntropy(output, x[1:].T, PAD_IX)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    import sys

    model = RNN(len(id2lettre), 32, 64, len(id2lettre))
    train(model, ic(sys.argv))
