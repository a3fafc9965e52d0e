"""Question 1: from a text to batches of sentences of unequal length.

    text ─ normalize ─▶ sentences ─ TextDataset ─▶ codes ─ BucketSampler, pad_collate_fn ─▶ (T, B) batches

Run as a script it shows the handout's example, then describes a corpus:

    python textloader.py [PATH]
"""

import argparse
import math
import os
import re
import string
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

CORPUS = Path(__file__).parent / "data" / "speeches.txt"

# ---------------------------------------------------------------------------------------- symbols

PAD_IX = 0  # BLANK: fills a batch, never read nor predicted
EOS_IX = 1  # opens and closes every sentence
LETTRES = string.ascii_letters + string.punctuation + string.digits + " "
id2lettre = {PAD_IX: "<PAD>", EOS_IX: "<EOS>", **dict(enumerate(LETTRES, start=2))}
lettre2id = {lettre: code for code, lettre in id2lettre.items()}

TYPOGRAPHY = {
    **dict.fromkeys("‘’‚‛′´", "'"),
    **dict.fromkeys("“”„‟″«»", '"'),
    **dict.fromkeys("‐‑‒–−", "-"),
    **dict.fromkeys("—―", "--"),
    **{"…": "...", "œ": "oe", "Œ": "OE", "æ": "ae", "Æ": "AE"},
}
FRENCH_QUOTES = re.compile(r"(?<!\S)«\s+|(?<!\s)\s+»(?!\w)")  # with the spaces inside them: « non »
OTHER = re.compile(f"[^{re.escape(LETTRES)}]+")
SENTENCE_END = re.compile(r"""([.!?]["')\]}]*) """)  # before a space only: "3.5" ends nothing


class LabError(Exception):
    """A mistake that the user can mend; its message is one line that says how."""


def ascii_form(char: str) -> str:
    """The symbols of `LETTRES` that stand for one character; "" if there are none.

    White space is a space, a typographic sign its ASCII form, a letter itself without accents (NFD).
    """
    if char.isspace():
        return " "
    return "".join(c for c in unicodedata.normalize("NFD", TYPOGRAPHY.get(char, char)) if c in lettre2id)


def clean(text: str) -> tuple[str, Counter]:
    """Write `text` with the symbols of `LETTRES`; return it and the characters dropped, counted.

    Each character takes its `ascii_form`, then a run of white space becomes one space. Combining
    accents are not counted.
    """
    if "«" in text:
        text = FRENCH_QUOTES.sub(lambda quote: quote[0].strip(), text)
    others = Counter("".join(OTHER.findall(text)))
    forms = {ord(char): ascii_form(char) for char in others}
    text = OTHER.sub(lambda run: run[0].translate(forms), text)
    lost = {char: n for char, n in others.items() if not forms[ord(char)] and not unicodedata.combining(char)}
    return re.sub("  +", " ", text), Counter(lost)


def normalize(s: str) -> str:
    """`s` as the model sees it: only symbols of `LETTRES` (see `clean`)."""
    return clean(s)[0]


def string2code(s: str) -> torch.Tensor:
    """Codes of `normalize(s)`: (length,) int64."""
    return torch.tensor([lettre2id[char] for char in normalize(s)], dtype=torch.int64)


def code2string(codes) -> str:
    """The text of a tensor or list of codes; BLANK and EOS have no text."""
    return "".join(id2lettre[int(code)] for code in codes if code not in (PAD_IX, EOS_IX))


# -------------------------------------------------------------------------------------- sentences


def read_text(path) -> str:
    """The text of a UTF-8 file; LabError where it is missing, empty, binary or not UTF-8."""
    try:
        data = Path(path).read_bytes()
        if b"\0" in data:
            raise LabError(f"{path} is not UTF-8 text: NUL at byte {data.index(0)}; give a text file")
        text = data.decode("utf-8").removeprefix("\ufeff")  # the byte-order mark
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError as error:
        raise LabError(f"{path} is not UTF-8: byte {error.start}; save it as UTF-8 first") from None
    if not text.strip():
        raise LabError(f"{path} is empty: give a text file")
    return text


class TextDataset(Dataset):
    """The sentences of a text; item `i` is sentence `i` as int64 codes (length,), without EOS.

    A sentence ends with a run of . ! or ?, closing quotes included, before white space or the end.

    maxsent  keep the first `maxsent` sentences (None: all)
    maxlen   leave out sentences of more than `maxlen` characters (None: none): a cut sentence
             would teach a false ending
    lines    each line is an example, with or without a full stop

    `sentences` are the texts, `lengths` (sentences,) their characters. What was left out is counted:
    `dropped` characters outside the alphabet, `too_long` and `beyond_maxsent` sentences, `unfinished`
    characters after the last sentence end.
    """

    def __init__(
        self, text: str, *, maxsent: int | None = None, maxlen: int | None = None, lines: bool = False
    ):
        cleaned, self.dropped = clean(text)
        if lines:
            sentences, rest = map(normalize, text.splitlines()), ""
        else:
            *sentences, rest = SENTENCE_END.sub(r"\1\n", cleaned + " ").split("\n")
        sentences = [stripped for sentence in sentences if (stripped := sentence.strip())]
        short = [sentence for sentence in sentences if maxlen is None or len(sentence) <= maxlen]
        self.sentences = short[:maxsent]
        self.lengths = np.array([len(sentence) for sentence in self.sentences], dtype=np.int64)
        self.unfinished = len(rest.strip())
        self.too_long = len(sentences) - len(short)
        self.beyond_maxsent = len(short) - len(self.sentences)

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([lettre2id[char] for char in self.sentences[i]])

    def left_out(self) -> str:
        """In words, what of the text is not in the sentences; empty if nothing."""
        counts = {
            "characters outside the alphabet": self.dropped.total(),
            "sentences longer than maxlen": self.too_long,
            "sentences beyond maxsent": self.beyond_maxsent,
            "characters after the last sentence end": self.unfinished,
        }
        return ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)


# ---------------------------------------------------------------------------------------- batches


def pad_collate_fn(samples: list[torch.Tensor]) -> torch.Tensor:
    """One (T, B) int64 batch of B sentences: EOS after each, then BLANK up to the longest."""
    batch = torch.full((max(map(len, samples), default=0) + 1, len(samples)), PAD_IX)
    for b, sample in enumerate(samples):
        batch[: len(sample), b] = sample
        batch[len(sample), b] = EOS_IX
    return batch


class BucketSampler(Sampler):
    """Batches of indices for `DataLoader(batch_sampler=…)`: sentences of like length together.

    lengths  of the sentences: (n,)
    shuffle  batches in random order, and lengths jittered by 2 %, so that sentences of like length meet
             in other batches each epoch (`set_epoch`), as `seed` says; otherwise all by length

    Each epoch takes every index once. Padding is then 3 % of the symbols; in random batches of 64, 70 %.
    """

    def __init__(self, lengths, batch_size: int, *, shuffle: bool = True, seed: int = 0):
        self.lengths = np.asarray(lengths)
        self.batch_size, self.shuffle, self.seed, self.epoch = batch_size, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffling of epoch `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self):
        random = np.random.default_rng([self.seed, self.epoch])
        sort_key, starts = self.lengths, np.arange(len(self)) * self.batch_size
        if self.shuffle:
            sort_key = sort_key * (1 + 0.02 * random.random(len(sort_key), dtype=np.float32))
            random.shuffle(starts)
        order = np.argsort(sort_key, kind="stable")
        for start in starts:
            yield order[start : start + self.batch_size].tolist()


def padding_share(lengths, batches) -> float:
    """Share of BLANK among the symbols of all `batches` of indices, each sentence closed by EOS."""
    symbols = sum(len(batch) * (int(lengths[batch].max()) + 1) for batch in batches)
    return 1 - (int(lengths.sum()) + len(lengths)) / symbols


# ----------------------------------------------------------------------------------- command line


def printable(text) -> str:
    """`text` as one line that is safe on a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def guard(main) -> None:
    """Call `main`; what a user can mend ends in one line on standard error and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        main()
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's exit fails again
        reason = "nobody reads the output any more"
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    except LabError as error:
        reason = str(error)
    sys.exit(f"{Path(sys.argv[0]).name}: {printable(reason)}")


def describe(path) -> None:
    """Print what a corpus holds and what was left out of it."""
    dataset = TextDataset(read_text(path))
    if not len(dataset):
        raise LabError(f"{path} has no sentence: none ends with . ! or ? before white space")
    lengths = dataset.lengths
    print(f"{printable(path)}: {len(dataset):,} sentences of {np.median(lengths):.0f} characters (median)")
    print(f"left out: {dataset.left_out() or 'nothing'}")
    for char, count in dataset.dropped.most_common(10):
        print(f"    {count:,} × {printable(char)} {unicodedata.name(char, f'U+{ord(char):04X}')}")
    for name, like in {"random": np.ones_like(lengths), "bucketed": lengths}.items():
        print(f"padding: {padding_share(lengths, BucketSampler(like, 64)):.1%} of {name} batches of 64")


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the handout's example, then describe a corpus.")
    parser.add_argument("data", nargs="?", default=CORPUS, metavar="PATH", help="a UTF-8 text file")
    options = parser.parse_args()
    dataset = TextDataset("C'est. Un. Test.")
    batch = pad_collate_fn([dataset[i] for i in range(3)])
    print(f"The handout's example as a {batch.shape[0]} × {batch.shape[1]} batch:\n{batch}")
    print(f"and back: {[code2string(column) for column in batch.T]}\n")
    describe(options.data)


if __name__ == "__main__":
    guard(main)
