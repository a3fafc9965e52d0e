"""Question 1: symbols, sentences and batches, against the handout, cases by hand, any text."""

import re
import string
import time
from collections import Counter
from unicodedata import normalize as decomposed

import pytest
import torch
from conftest import here, refused
from hypothesis import given
from hypothesis import strategies as st

from textloader import CORPUS, EOS_IX, LETTRES, PAD_IX, TYPOGRAPHY, BucketSampler, LabError, TextDataset
from textloader import clean, code2string, normalize, pad_collate_fn, read_text
from textloader import string2code

texts = st.text() | st.text(alphabet="aé.!?\"') \n\u0301…—«»œ\u00a0\u202e\x1b", max_size=80)


def test_handouts_example():
    assert string.ascii_letters + string.punctuation + string.digits + " " == LETTRES
    assert string2code("a ~").tolist() == [2, 96, 85] and (PAD_IX, EOS_IX) == (0, 1)
    dataset = TextDataset("C'est. Un. Test.")
    batch = pad_collate_fn([dataset[i] for i in range(3)])
    assert batch.shape == (7, 3) and batch.dtype == torch.int64
    assert batch[:, 1].tolist() == [*string2code("Un.").tolist(), EOS_IX, PAD_IX, PAD_IX, PAD_IX]
    assert [code2string(column) for column in batch.T] == ["C'est.", "Un.", "Test."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 3.5 km. Yes!", ["It is 3.5 km.", "Yes!"]),
        ("The U.S.A is (e.g.this) big? No", ["The U.S.A is (e.g.this) big?"]),
        ('He said "no." Then?! (Really.) End', ['He said "no."', "Then?!", "(Really.)"]),
        ("One\nline.\r\nTwo\u00a0words.", ["One line.", "Two words."]),
        ("“Élan” — it’s… fine.", ['"Elan" -- it\'s...', "fine."]),
        ("Il dit : « Tu viens ? » Elle sourit.", ['Il dit : "Tu viens ?"', "Elle sourit."]),
        ("«\u202fNon.\u00a0» Et «\u00a0oui\u00a0», dit-il. «Là»", ['"Non."', 'Et "oui", dit-il.']),
        ("L’« ami » (« oui »). »Wort!« dann.", ['L\'"ami" ("oui").', '"Wort!"', "dann."]),
        ("L'œuvre d'Œdipe. Cæsar.", ["L'oeuvre d'OEdipe.", "Caesar."]),
        ("no end", []),
        ("", []),
        ("... . !", ["...", ".", "!"]),
    ],
)
def test_sentence_rules(text, expected):
    assert TextDataset(text).sentences == expected


@given(texts)
def test_cleaning_keeps_or_counts_every_character(text):
    kept, dropped = clean(text)
    assert normalize(text) == kept == normalize(kept) == code2string(string2code(text))
    assert set(kept) <= set(LETTRES) and "  " not in kept
    for char, count in Counter(decomposed("NFC", text)).items():  # each that leaves no trace is counted
        if clean(char) == ("", Counter([char])):
            assert dropped[char] >= count
    assert not set(dropped) & set(LETTRES)
    if "«" not in text:  # which loses the spaces inside
        assert kept == re.sub(" +", " ", "".join(clean(char)[0] for char in text))


@given(st.text(st.characters(exclude_characters=[chr(code) for code in TYPOGRAPHY])))
def test_handouts_normalize(text):
    """Without typographic signs: the handout's formula, but for white space."""
    handouts = "".join(c for c in decomposed("NFD", re.sub(r"\s", " ", text)) if c in LETTRES)
    assert normalize(text) == re.sub(" +", " ", handouts)


@given(st.text())
def test_composed_or_not_is_the_same(text):
    assert normalize(decomposed("NFC", text)) == normalize(decomposed("NFD", text))


@given(texts, st.integers(1, 8), st.integers(1, 4))
def test_every_sentence_is_kept_or_counted(text, maxlen, maxsent):
    whole, cleaned = TextDataset(text), normalize(text).strip()
    joined = " ".join(whole.sentences)
    assert cleaned.startswith(joined) and len(cleaned[len(joined) :].strip()) == whole.unfinished
    assert all(re.search(r"""[.!?]["')\]}]*$""", sentence) for sentence in whole.sentences)
    assert whole.dropped == clean(text)[1]
    for dataset in (whole, TextDataset(text, maxlen=maxlen, maxsent=maxsent)):
        assert [code2string(dataset[i]) for i in range(len(dataset))] == dataset.sentences
        assert dataset.lengths.tolist() == [len(sentence) for sentence in dataset.sentences]
    assert dataset.sentences == [s for s in whole.sentences if len(s) <= maxlen][:maxsent]
    assert len(dataset) + dataset.too_long + dataset.beyond_maxsent == len(whole)
    said = sum(map(int, re.findall(r"\d+", dataset.left_out())))
    assert said == len(whole) - len(dataset) + dataset.dropped.total() + dataset.unfinished


def test_each_line_is_an_example():
    dataset = TextDataset("Léa\n\n  Jean. Luc\r\nZoé ☺\n", lines=True)
    assert dataset.sentences == ["Lea", "Jean. Luc", "Zoe"] and dataset.unfinished == 0
    assert dataset.dropped == {"☺": 1}


@pytest.mark.parametrize(
    "text",
    ["x" * 10**6, "a" + "\u0301" * 10**6 + ".", "." * 10**6, '."' * 10**5, "«a" + " " * 10**5, " »" * 10**5],
    ids=["no space", "accents", "full stops", "quotes", "blanks", "guillemets"],
)
def test_long_monotonous_texts(text):
    """Time grows with the length, not with its square."""
    since = time.process_time()
    TextDataset(text)
    assert time.process_time() - since < 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b" \n", ["empty"]),
        (b"\xef\xbb\xbf", ["empty"]),
        (b"ab\xffcd.", ["UTF-8", "position 2"]),
        (b"ab\0.", ["binary"]),
        ("Un.".encode("utf-16"), ["UTF-8"]),
        (b"\xef\xbb\xbfa\xff", ["UTF-8", "0xff"]),
        (None, ["cannot read"]),
    ],
)
def test_bad_files(tmp_path, content, words):
    path = tmp_path / "corpus.txt"
    path.write_bytes("\ufeffHé.".encode())  # a byte order mark is no text
    assert read_text(path) == "Hé."
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabError) as error:
        read_text(path)
    assert all(word in str(error.value) for word in words)


# ---------------------------------------------------------------------------------------- batches


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_sampler_takes_every_sentence_once(lengths, batch_size, epoch, shuffle):
    sampler = BucketSampler(lengths, batch_size, shuffle=shuffle, seed=3)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler) and max(map(len, batches)) <= batch_size
    assert batches == list(sampler)  # the same epoch again


def test_sampler_shuffles_by_epoch_and_seed():
    def epoch(number, seed, shuffle=True):
        sampler = BucketSampler([5, 500] * 100, 10, seed=seed, shuffle=shuffle)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0, 0) != epoch(1, 0) != epoch(1, 1)
    assert {frozenset(batch) for batch in epoch(0, 0)} != {frozenset(batch) for batch in epoch(1, 0)}
    assert [batch[0] % 2 for batch in epoch(0, 0)] != sorted(batch[0] % 2 for batch in epoch(0, 0))
    assert epoch(0, 0, shuffle=False) == epoch(3, 1, shuffle=False)


def test_buckets_waste_little_on_the_corpus():
    """Counted in the batches themselves."""
    dataset = TextDataset(read_text(CORPUS))
    blank = total = 0
    for batch in BucketSampler(dataset.lengths, 32):
        codes = pad_collate_fn([dataset[i] for i in batch])
        blank, total = blank + int((codes == PAD_IX).sum()), total + codes.numel()
    assert blank / total <= 0.03


# ----------------------------------------------------------------------------------- command line


def test_command_describes_a_corpus_in_printable_text(tmp_path):
    """Nothing that a terminal would obey: not from the text, not from its name."""
    path = tmp_path / "c\x1b[31m\u202e\r.txt"
    path.write_text("Un ☺ \x1b]0;title\x07\u202e\x9b31m\x7f\ue000. Deux. Reste", encoding="utf-8")
    result = here("textloader.py", path)
    assert result.returncode == 0, result.stderr
    said = "7 × 3 batch", "2 sentences", "☺ WHITE SMILING FACE", "RIGHT-TO-LEFT", "1 × ? U+0007"
    for words in (*said, "5 characters after the last sentence end", "7 characters outside the alphabet"):
        assert words in result.stdout
    assert all(c.isprintable() or c == "\n" for c in result.stdout)


def test_command_refuses_a_bad_file(tmp_path):
    (tmp_path / "bytes").write_bytes(b"ab\xffcd.")
    refused(here("textloader.py", tmp_path / "bytes"), "UTF-8", "position 2")
