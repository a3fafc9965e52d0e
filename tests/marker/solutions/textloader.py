# ruff: noqa
import re
import string
import sys
import unicodedata

import torch
from torch.utils.data import Dataset

PAD_IX = 0
EOS_IX = 1
LETTRES = string.ascii_letters + string.punctuation + string.digits + " "
id2lettre = dict(zip(range(2, len(LETTRES) + 2), LETTRES))
id2lettre[PAD_IX] = "<PAD>"
id2lettre[EOS_IX] = "<EOS>"
lettre2id = dict(zip(id2lettre.values(), id2lettre.keys()))


def normalize(s):
    return "".join(c for c in unicodedata.normalize("NFD", s) if c in LETTRES)


def string2code(s):
    return torch.tensor([lettre2id[c] for c in normalize(s)])


def code2string(t):
    if type(t) != list:
        t = t.tolist()
    return "".join(id2lettre[i] for i in t)


class TextDataset(Dataset):
    def __init__(self, text, *, maxsent=None, maxlen=None):
        maxlen = maxlen or sys.maxsize
        parts = [re.sub(" +", " ", p[:maxlen]).strip() for p in text.split(".")]
        self.phrases = [p + "." for p in parts if p]
        if maxsent is not None:
            self.phrases = self.phrases[:maxsent]

    def __len__(self):
        return len(self.phrases)

    def __getitem__(self, i):
        return string2code(self.phrases[i])


def pad_collate_fn(samples):
    longest = max(len(s) for s in samples)
    columns = [s.tolist() + [EOS_IX] + [PAD_IX] * (longest - len(s)) for s in samples]
    return torch.tensor(columns).t()
