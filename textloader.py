"""Question 1: from a text to batches of sentences of unequal length.

    text ─ normalize ─▶ sentences ─ TextDataset ─▶ codes ─ BucketSampler, pad_collate_fn ─▶ (T, B) batches

Run as a script it checks itself on the handout's example, then describes a corpus:

    python textloader.py [PATH]
"""

import argparse
import codecs
import re
import string
import sys
import unicodedata
from array import array
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "data" / "speeches.txt"
BATCH_SIZE = 32
JITTER = 0.02  # of a length, when sentences of like length are shuffled

# ---------------------------------------------------------------------------------------- symbols

PAD_IX = 0  # BLANK: fills a batch, never read nor predicted
EOS_IX = 1  # opens and closes every sentence
LETTRES = string.ascii_letters + string.punctuation + string.digits + " "
id2lettre = {PAD_IX: "<PAD>", EOS_IX: "<EOS>", **dict(enumerate(LETTRES, start=2))}
lettre2id = {lettre: code for code, lettre in id2lettre.items()}
SYMBOLS = len(id2lettre)  # V = 97

TYPOGRAPHY = {
    **dict.fromkeys("‘’‚‛′´", "'"),
    **dict.fromkeys("“”„‟″«»", '"'),
    **dict.fromkeys("‐‑‒–−", "-"),
    **dict.fromkeys("—―", "--"),
    "…": "...",
}
CODE_OF_BYTE = bytes(lettre2id.get(chr(byte), PAD_IX) for byte in range(256))  # ASCII byte → code


class LabError(ValueError):
    """A mistake that the user can mend; its message is one line that says how."""


def ascii_form(char: str) -> str:
    """The symbols of `LETTRES` that stand for one character; "" if there are none.

    White space is a space, a typographic sign its ASCII form, a letter itself without its accents
    (canonical decomposition, NFD: so "é" is "e", but "½" and "№" are nothing).
    """
    if char.isspace():
        return " "
    return "".join(c for c in unicodedata.normalize("NFD", TYPOGRAPHY.get(char, char)) if c in lettre2id)


def _symbols(text: str, outside: Counter, after_space: bool = False) -> bytes:
    """`text` in ASCII, character by character, every run of white space one space.

    Adds each character outside the alphabet to `outside`. A text may come in pieces: `after_space`
    says that a space came before this one. NumPy does the work: 40 MB/s leave 25 ns a character.
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)  # (n,)
    where = np.flatnonzero(points - ord(" ") > ord("~") - ord(" "))  # below " " it wraps around
    odd, which, counts = np.unique(points[where], return_inverse=True, return_counts=True)
    chars = [chr(point) for point in odd]
    outside.update(dict(zip(chars, counts.tolist(), strict=True)))
    forms = np.array([ascii_form(char).encode() for char in chars], dtype="S3")  # NUL where shorter
    wide = np.zeros((len(points), 3), dtype=np.uint8)  # row i: what stands for character i
    wide[:, 0] = points
    wide[where] = forms.view(np.uint8).reshape(-1, 3)[which]
    flat = np.frombuffer(wide.tobytes().translate(None, b"\0"), dtype=np.uint8)
    space = flat == ord(" ")
    before = np.roll(space, 1)
    before[:1] = after_space
    return flat[~(space & before)].tobytes()


def clean(text: str) -> tuple[str, Counter]:
    """Write `text` with the symbols of `LETTRES`; return it and what was dropped, by character.

    Each character takes its `ascii_form`, then every run of white space becomes one space.
    Characters without such a form are dropped and counted; combining accents are not counted.
    """
    outside = Counter()
    return _symbols(text, outside).decode("ascii"), _dropped(outside)


def _dropped(outside: Counter) -> Counter:
    return Counter({c: n for c, n in outside.items() if not ascii_form(c) and not unicodedata.combining(c)})


def normalize(s: str) -> str:
    """`s` as the model sees it: only symbols of `LETTRES` (see `clean`)."""
    return clean(s)[0]


def string2code(s: str) -> torch.Tensor:
    """Codes of `normalize(s)`: (length,) int64."""
    return torch.tensor(list(_symbols(s, Counter()).translate(CODE_OF_BYTE)), dtype=torch.int64)


def code2string(codes) -> str:
    """The text of a tensor or list of codes; BLANK and EOS have no text."""
    return "".join(id2lettre[int(code)] for code in codes if code not in (PAD_IX, EOS_IX))


CLASSES = dict(
    vowel="[aeiou]", consonant="[a-z]", capital="[A-Z]", digit="[0-9]", space=" ", punctuation=".", code=".*"
)


def class_of(symbol: str) -> str:
    """The first of CLASSES that a symbol belongs to; BLANK and EOS are a "code"."""
    return next(name for name, pattern in CLASSES.items() if re.fullmatch(pattern, symbol))


# What a person can say of the character just read: the stretches of text where it holds, then counts.
STRETCHES = {
    "inside a quotation": r'"[^"]*"?',
    "inside brackets": r"[(\[][^)\]]*",
    "in a capitalised word": r"[A-Z][\w']*",
    "in a number": r"\d[\d.,]*",
    "after a vowel": r"[aeiouAEIOU]",
    "after a space": r" ",
}
FEATURES = (*STRETCHES, "position in the sentence", "position in the word")


def features(text: str) -> torch.Tensor:
    """FEATURES after 0, 1, … n characters of `text`, a stretch as 1 or 0: (n + 1, features)."""
    found = torch.zeros(len(text) + 1, len(FEATURES))
    for i, pattern in enumerate(STRETCHES.values()):
        for match in re.finditer(pattern, text):
            found[match.start() + 1 : match.end() + 1, i] = 1
    found[:, -2] = torch.arange(len(text) + 1)
    found[:, -1] = torch.tensor([n - 1 - text.rfind(" ", 0, n) for n in range(len(text) + 1)])
    return found


# -------------------------------------------------------------------------------------- sentences

# A . ! or ? with closing quotes or brackets, then white space or the end: "3.5" ends nothing.
KIND = bytes.maketrans(b".!?" + b"\"')]}", b"..." + b")))))")
SENTENCE_END = re.compile(rb"\.\)*(?= )")  # in symbols translated to their KIND
CHUNK = 1 << 18  # bytes read at a time


def read_text(path, digest=None):
    """Yield the UTF-8 text of a file in pieces, without byte-order mark.

    digest   a `hashlib` object; it is given the file's bytes as they are read

    Raises LabError where the file is missing, empty, binary or not UTF-8 (with the byte's offset).
    """
    decoder, position, empty = codecs.getincrementaldecoder("utf-8")(), 0, True
    try:
        with open(path, "rb") as file:
            while True:
                data = file.read(CHUNK)
                if b"\0" in data:
                    raise LabError(f"{path} is not a text file: NUL at byte {position + data.index(0)}")
                pending = len(decoder.getstate()[0])  # the bytes of a character that the last piece cut
                text = decoder.decode(data, final=not data)
                yield text if position else text.removeprefix("\ufeff")
                position, empty = position + len(data), empty and not data.strip()
                if digest:
                    digest.update(data)
                if not data:
                    break
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError as error:
        offset = position - pending + error.start
        raise LabError(f"{path} is not UTF-8: byte {offset}; save it as UTF-8 first") from None
    if empty:
        raise LabError(f"{path} is empty: give a text file")


class TextDataset(Dataset):
    """The sentences of a text: its `codes` as one flat array of bytes, and where each sentence starts.

    text     any string, or its pieces one by one (`read_text`), so that it is never whole in
             memory; it is cleaned, then cut after every sentence end
    maxsent  keep the first `maxsent` sentences (None: all)
    maxlen   leave out sentences of more than `maxlen` characters (None: none): cutting them
             would teach a false ending

    Memory: a byte for each symbol, 12 for each sentence. `too_long`, `beyond_maxsent` count the
    sentences left out, `unfinished` the symbols after the last sentence end, `dropped` the
    characters outside the alphabet. No character is lost uncounted: `read` + `added` =
    `len(codes)` + `merged` + `accents` + `dropped.total()`.
    """

    def __init__(self, text, *, maxsent: int | None = None, maxlen: int | None = None):
        self.read, outside = 0, Counter()
        codes, ends = bytearray(), array("q")
        last = b" "  # kind of the last symbol that is not a closing quote or bracket
        for piece in [text] if isinstance(text, str) else text:
            self.read += len(piece)
            symbols = _symbols(piece, outside, not codes or codes[-1] == lettre2id[" "])
            kinds = last + symbols.translate(KIND)  # the piece may go on with the end of a sentence
            ends.extend(len(codes) + end.end() - 1 for end in SENTENCE_END.finditer(kinds))
            codes += symbols.translate(CODE_OF_BYTE)
            last = kinds.rstrip(b")")[-1:]
        if last == b".":
            ends.append(len(codes))
        elif codes and codes[-1] == lettre2id[" "]:
            codes.pop()
        self.codes = codes
        self._count(outside)
        self._choose(np.frombuffer(ends, dtype=np.int64), maxsent, maxlen)

    def _count(self, outside: Counter) -> None:
        """Account for every character read, from those `outside` the alphabet."""
        self.dropped = _dropped(outside)
        widths = {char: len(ascii_form(char)) for char in outside}
        self.accents = sum(outside[char] for char, width in widths.items() if not width) - self.dropped.total()
        self.added = sum(outside[char] * (width - 1) for char, width in widths.items() if width)
        self.merged = self.read + self.added - self.accents - self.dropped.total() - len(self.codes)

    def _choose(self, ends, maxsent: int | None, maxlen: int | None) -> None:
        """Keep the sentences asked for, out of those that end before the symbols `ends`."""
        starts = np.roll(ends, 1) + 1  # one space parts two sentences
        starts[:1] = 0
        self.unfinished = max(0, len(self.codes) - int(ends[-1]) - 1) if len(ends) else len(self.codes)
        lengths = (ends - starts).astype(np.uint32)
        if maxlen is not None:
            starts, lengths = starts[lengths <= maxlen], lengths[lengths <= maxlen]
        self.too_long = len(ends) - len(starts)
        self.starts, self.lengths = starts[:maxsent], lengths[:maxsent]  # (sentences,), EOS not counted
        self.beyond_maxsent = len(starts) - len(self.starts)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Sentence `i`: (length,) int64 codes, without EOS."""
        if not 0 <= i < len(self):
            raise IndexError(f"sentence {i} of {len(self)}")
        codes = np.frombuffer(self.codes, np.uint8, count=self.lengths[i], offset=self.starts[i])
        return torch.from_numpy(codes.astype(np.int64))

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

    lengths  of the sentences: (n,)
    shuffle  batches in random order, and sentences of like length meet in other batches each epoch
             (`set_epoch`), as `seed` says; otherwise all by length

    Each epoch takes every index once. In a batch, sentences stand by length, within JITTER if shuffled.
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
        like, starts = self.lengths, np.arange(len(self)) * self.batch_size
        if self.shuffle:
            like = like * (1 + JITTER * random.random(len(like), dtype=np.float32))
            random.shuffle(starts)
        order = np.argsort(like, kind="stable")
        del like
        for start in starts:
            yield order[start : start + self.batch_size].tolist()


def padding_share(lengths, batches) -> float:
    """Share of BLANK among the symbols of all `batches` of indices, each sentence closed by EOS."""
    symbols = sum(len(batch) * (int(lengths[batch].max()) + 1) for batch in batches)
    return 1 - (int(lengths.sum()) + len(lengths)) / symbols


# ----------------------------------------------------------------------------------- command line


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows a default where there is one to show."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "", False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` that shows defaults in its help; a mistake is a LabError."""

    def __init__(self, **options):
        super().__init__(formatter_class=Defaults, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for argument in args:
            if argument.endswith("=--"):  # argparse would drop the -- and leave a list in place of the value
                self.error(f"{argument} has no value")
        return super().parse_known_args(args, namespace)

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
        with suppress(BrokenPipeError):
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
    print(f"{one_line(path)}: {len(dataset):,} sentences, {lengths.sum():,} characters")
    used = [letter for letter in LETTRES if lettre2id[letter] in dataset.codes]
    print(f"symbols     {len(used)} of {len(LETTRES)}: {''.join(used)}")
    print(
        f"characters  {dataset.read:,} read + {dataset.added:,} added (… is three) = {len(dataset.codes):,} kept + "
        f"{dataset.merged:,} white space merged + {dataset.accents:,} combining accents + {dropped.total():,} dropped"
    )
    for char, count in dropped.most_common(10):
        print(f"            {count:7,} × {one_line(char)} {unicodedata.name(char, f'U+{ord(char):04X}')}")
    if len(dropped) > 10:
        print(f"            and {len(dropped) - 10} other characters")
    print(f"unfinished  {dataset.unfinished:,} characters after the last sentence end")
    quantiles = [0, 5, 25, 50, 75, 95, 99, 100]
    print("quantile    " + " ".join(f"{q:4d} %" for q in quantiles))
    print("length      " + " ".join(f"{n:6.0f}" for n in np.percentile(lengths, quantiles)))
    random = padding_share(lengths, BucketSampler(np.ones_like(lengths), BATCH_SIZE))
    bucketed = padding_share(lengths, BucketSampler(lengths, BATCH_SIZE))
    print(f"padding     {random:.1%} of random batches of {BATCH_SIZE}, {bucketed:.1%} of bucketed ones")


def main() -> None:
    parser = Parser(prog="textloader.py", description="Check the loader, then describe a corpus.")
    parser.add_argument("data", nargs="?", default=CORPUS, metavar="PATH", help="a UTF-8 text file")
    options = parser.parse_args()
    check_handout()
    describe(options.data)


if __name__ == "__main__":
    run_main(main)
