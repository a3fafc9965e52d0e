"""Question 1: from a text to batches of sentences of unequal length.

    text ─ normalize ─▶ sentences ─ TextDataset ─▶ codes ─ BucketSampler, pad_collate_fn ─▶ (T, B) batches

Run as a script it checks itself on the handout's example, then describes a corpus:

    python textloader.py [PATH]
"""

import argparse
import re
import string
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "data" / "speeches.txt"
BATCH_SIZE = 32

# ---------------------------------------------------------------------------------------- symbols

PAD_IX = 0  # BLANK: fills a batch, never read nor predicted
EOS_IX = 1  # opens and closes every sentence
LETTRES = string.ascii_letters + string.punctuation + string.digits + " "
id2lettre = {PAD_IX: "<PAD>", EOS_IX: "<EOS>", **dict(enumerate(LETTRES, start=2))}
lettre2id = {lettre: code for code, lettre in id2lettre.items()}
SYMBOLS = len(id2lettre)  # V = 97

TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′`´", "'"),
        **dict.fromkeys("“”„‟″«»", '"'),
        **dict.fromkeys("‐‑‒–−", "-"),
        **dict.fromkeys("—―", "--"),
        "…": "...",
    }
)
CODE_OF_BYTE = np.zeros(256, dtype=np.uint8)  # ASCII byte → code
CODE_OF_BYTE[np.frombuffer(LETTRES.encode("ascii"), dtype=np.uint8)] = range(2, SYMBOLS)


class LabError(ValueError):
    """A mistake that the user can mend; its message is one line that says how."""


def clean(text: str) -> tuple[str, Counter]:
    """Write `text` with the symbols of `LETTRES`; return it and what was dropped, by character.

    Typographic signs take their ASCII form, letters lose their accents, every run of white space
    becomes one space. What is still outside the alphabet is dropped and counted.
    """
    text = unicodedata.normalize("NFD", text.translate(TYPOGRAPHY))
    text = re.sub(r"\s+", " ", text)
    outside = Counter({c: n for c, n in Counter(text).items() if c not in lettre2id})
    text = text.translate(dict.fromkeys(map(ord, outside)))
    dropped = Counter({c: n for c, n in outside.items() if not unicodedata.combining(c)})
    return re.sub(" +", " ", text), dropped  # dropping "x" from "a x b" leaves two spaces


def normalize(s: str) -> str:
    """`s` as the model sees it: only symbols of `LETTRES` (see `clean`)."""
    return clean(s)[0]


def string2code(s: str) -> torch.Tensor:
    """Codes of `normalize(s)`: (length,) int64."""
    return torch.from_numpy(_codes(normalize(s)).astype(np.int64))


def code2string(codes) -> str:
    """The text of a tensor or list of codes; BLANK and EOS have no text."""
    return "".join(id2lettre[int(code)] for code in codes if code not in (PAD_IX, EOS_IX))


def _codes(text: str) -> np.ndarray:
    return CODE_OF_BYTE[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]


# -------------------------------------------------------------------------------------- sentences

# A run of . ! ? with closing quotes or brackets, then white space or the end: "3.5" ends nothing.
SENTENCE_END = re.compile(r"""(?<![.!?])[.!?]+["')\]}]*(?=\s|$)""")


def read_text(path) -> str:
    """The UTF-8 text of a file, with or without byte-order mark.

    Raises LabError where it is missing, empty, binary or not UTF-8 (with the byte's offset).
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror}; give a text file with --data") from None
    if not data.strip():
        raise LabError(f"{path} is empty: give a text file with --data")
    if b"\0" in data:
        raise LabError(f"{path} is not a text file: NUL at byte {data.index(0)}")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise LabError(f"{path} is not UTF-8: byte {error.start}; save it as UTF-8 first") from None


class TextDataset(Dataset):
    """The sentences of a text, held as one flat array of codes and the offsets that part them.

    text     any string; it is cleaned, then cut after every sentence end
    maxsent  keep the first `maxsent` sentences (None: all)
    maxlen   leave out sentences of more than `maxlen` characters (None: none): cutting them
             would teach a false ending

    `dropped` counts the characters outside the alphabet, `too_long`, `beyond_maxsent` the
    sentences left out, `unfinished` the characters after the last sentence end.
    """

    def __init__(self, text: str, *, maxsent: int | None = None, maxlen: int | None = None):
        text, self.dropped = clean(text)
        sentences, start = [], 0
        for end in SENTENCE_END.finditer(text):
            sentences.append(text[start : end.end()].lstrip())
            start = end.end()
        self.unfinished = len(text[start:].strip())
        short = [s for s in sentences if maxlen is None or len(s) <= maxlen]
        kept = short[:maxsent]
        self.too_long, self.beyond_maxsent = len(sentences) - len(short), len(short) - len(kept)
        self.codes = _codes("".join(kept))  # (characters,) uint8
        self.offsets = np.cumsum([0, *map(len, kept)])  # (sentences + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> torch.Tensor:
        """Sentence `i`: (length,) int64 codes, without EOS."""
        if not 0 <= i < len(self):
            raise IndexError(f"sentence {i} of {len(self)}")
        return torch.from_numpy(self.codes[self.offsets[i] : self.offsets[i + 1]].astype(np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """Characters of each sentence, without EOS: (sentences,)."""
        return np.diff(self.offsets)

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
    batch = torch.full((max(map(len, samples)) + 1, len(samples)), PAD_IX)
    for b, sample in enumerate(samples):
        batch[: len(sample), b] = sample
        batch[len(sample), b] = EOS_IX
    return batch


class BucketSampler(Sampler):
    """Batches of indices for `DataLoader(batch_sampler=…)`: sentences of like length together.

    Each epoch takes every index once. With `shuffle`, the batches come in random order and
    sentences of one length meet in other batches each epoch (`set_epoch`), as the seed says.
    """

    def __init__(self, lengths, batch_size: int, *, shuffle: bool = True, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        self.lengths = np.asarray(lengths)
        self.batch_size, self.shuffle, self.seed, self.epoch = batch_size, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffling of epoch `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self):
        random = np.random.default_rng([self.seed, self.epoch])
        order = np.arange(len(self.lengths))
        if self.shuffle:
            random.shuffle(order)
        order = order[np.argsort(self.lengths[order], kind="stable")]
        starts = np.arange(0, len(order), self.batch_size)
        if self.shuffle:
            random.shuffle(starts)
        for start in starts:
            yield order[start : start + self.batch_size].tolist()


def padding_share(batches) -> float:
    """Share of BLANK among the symbols of (T, B) batches."""
    blank, total = map(sum, zip(*((int((b == PAD_IX).sum()), b.numel()) for b in batches), strict=True))
    return blank / total


# ----------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` that shows defaults in its help; a mistake is a LabError."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        raise LabError(message)


def number(kind, low, high=float("inf"), *, above=False):
    """An argparse type: a finite `kind` (int or float) from `low` (`above`: beyond it) to `high`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (low < value if above else low <= value) or not value <= high or value == float("inf"):
            bounds = f"above {low}" if above else f"at least {low}"
            bounds += f" and at most {high}" if high < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {bounds}")
        return value

    return parse


def one_line(message) -> str:
    """`message` without line breaks or control characters, fit for a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(message))


def run_main(main) -> None:
    """Call `main`; a LabError becomes one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        main()
    except LabError as error:
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has read enough
        sys.stderr.close()
    except KeyboardInterrupt:
        sys.exit(130)


def check_handout() -> None:
    """The handout's example: three sentences, one 7 × 3 batch, and back."""
    dataset = TextDataset("C'est. Un. Test.")
    batch = pad_collate_fn([dataset[i] for i in range(3)])
    print(f"The handout's example as a {batch.shape[0]} × {batch.shape[1]} batch:\n{batch}")
    decoded = [code2string(column) for column in batch.T]
    if batch.shape != (7, 3) or decoded != ["C'est.", "Un.", "Test."]:
        raise AssertionError(f"the example decodes to {decoded}")
    print(f"and back: {decoded}\n")


def describe(path) -> None:
    """Print what a corpus holds and what was left out of it."""
    dataset = TextDataset(read_text(path))
    if not len(dataset):
        raise LabError(f"{path} has no sentence: none ends with . ! or ? before white space")
    lengths, dropped = dataset.lengths, dataset.dropped
    print(f"{path}: {len(dataset):,} sentences, {lengths.sum():,} characters")
    used = np.unique(dataset.codes)
    print(f"symbols     {len(used)} of {len(LETTRES)}: {code2string(used)}")
    print(f"dropped     {dropped.total():,} characters outside the alphabet")
    for char, count in dropped.most_common(10):
        print(f"            {count:7,} × {one_line(char)} {unicodedata.name(char, f'U+{ord(char):04X}')}")
    if len(dropped) > 10:
        print(f"            and {len(dropped) - 10} other characters")
    print(f"unfinished  {dataset.unfinished:,} characters after the last sentence end")
    quantiles = [0, 5, 25, 50, 75, 95, 99, 100]
    print("quantile    " + " ".join(f"{q:4d} %" for q in quantiles))
    print("length      " + " ".join(f"{n:6.0f}" for n in np.percentile(lengths, quantiles)))
    bucketed = BucketSampler(lengths, BATCH_SIZE)
    random = DataLoader(dataset, BATCH_SIZE, shuffle=True, collate_fn=pad_collate_fn)
    batches = DataLoader(dataset, batch_sampler=bucketed, collate_fn=pad_collate_fn)
    print(
        f"padding     {padding_share(random):.1%} of random batches of {BATCH_SIZE}, "
        f"{padding_share(batches):.1%} of bucketed ones"
    )


def main() -> None:
    parser = Parser(prog="textloader.py", description="Check the loader, then describe a corpus.")
    parser.add_argument("data", nargs="?", default=CORPUS, metavar="PATH", help="a UTF-8 text file")
    options = parser.parse_args()
    check_handout()
    describe(options.data)


if __name__ == "__main__":
    run_main(main)
