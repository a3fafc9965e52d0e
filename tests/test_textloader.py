"""Question 1: symbols, sentences, batches."""

import contextlib
import os
import re
import string
from collections import Counter
from unicodedata import combining
from unicodedata import normalize as decomposed

import pytest
import torch
from conftest import ROOT, command, refused
from hypothesis import given
from hypothesis import strategies as st

from textloader import (
    CORPUS,
    EOS_IX,
    LETTRES,
    PAD_IX,
    TYPOGRAPHY,
    BucketSampler,
    LabError,
    TextDataset,
    ascii_form,
    clean,
    code2string,
    normalize,
    pad_collate_fn,
    read_text,
    string2code,
)


def sentences(text, **options):
    dataset = TextDataset(text, **options)
    return [code2string(dataset[i]) for i in range(len(dataset))]


def test_alphabet_is_the_handouts():
    assert string.ascii_letters + string.punctuation + string.digits + " " == LETTRES
    assert string2code("a").tolist() == [2]
    assert string2code(" ").tolist() == [96]


def test_handouts_example():
    dataset = TextDataset("C'est. Un. Test.")
    batch = pad_collate_fn([dataset[i] for i in range(3)])
    assert batch.shape == (7, 3) and batch.dtype == torch.int64
    assert batch[:, 1].tolist() == [*string2code("Un.").tolist(), EOS_IX, PAD_IX, PAD_IX, PAD_IX]
    assert [code2string(column) for column in batch.T] == ["C'est.", "Un.", "Test."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 3.5 km. Yes!", ["It is 3.5 km.", "Yes!"]),
        ('He said "no." Then?! (Really.) End', ['He said "no."', "Then?!", "(Really.)"]),
        ("One\nline.\r\nTwo\u00a0words.", ["One line.", "Two words."]),
        ("“Élan” — it’s… fine.", ['"Elan" -- it\'s...', "fine."]),
        ("no end", []),
        ("", []),
        ("... . !", ["...", ".", "!"]),
    ],
)
def test_sentence_rules(text, expected):
    assert sentences(text) == expected


@given(st.text())
def test_round_trip_and_count(text):
    kept, dropped = clean(text)
    assert normalize(text) == kept == code2string(string2code(text))
    assert set(kept) <= set(LETTRES)
    assert not set(dropped) & set(LETTRES)
    assert normalize(kept) == kept
    assert dict(dropped) == {c: n for c, n in Counter(text).items() if not ascii_form(c) and not combining(c)}


@given(st.text(st.characters(exclude_characters=TYPOGRAPHY)))
def test_handouts_normalize(text):
    """Without typographic signs: the handout's formula, but for white space."""
    handouts = "".join(c for c in decomposed("NFD", re.sub(r"\s", " ", text)) if c in LETTRES)
    assert normalize(text) == re.sub(" +", " ", handouts)


@given(st.text())
def test_composed_or_not_is_the_same(text):
    assert normalize(decomposed("NFC", text)) == normalize(decomposed("NFD", text))


def test_all_of_unicode():
    """Every code point of every script, lone surrogates too: a symbol, a space, an accent, or counted."""
    text = "".join(map(chr, range(0x110000)))
    dataset = TextDataset(text)
    assert dataset.dropped.keys().isdisjoint(LETTRES) and set(dataset.dropped.values()) == {1}
    assert {"\0", "\x1b", "\u202e", "\ud800", "漢", "½"} <= dataset.dropped.keys() and "é" not in dataset.dropped
    assert set(code2string(dataset.codes)) == set(LETTRES)
    assert dataset.read == len(text)


@given(st.text() | st.text(alphabet="aé.!?\"') \n\u0301…—\u202e\x1b\ud800", max_size=80))
def test_no_character_is_lost_uncounted(text):
    """Every character read is a symbol kept, white space merged, an accent, or dropped; some become several."""
    dataset = TextDataset(text)
    added = sum(max(len(ascii_form(c)), 1) - 1 for c in text)
    accents = sum(combining(c) > 0 and not ascii_form(c) for c in text)
    assert (dataset.read, dataset.added, dataset.accents) == (len(text), added, accents)
    spelled = "".join(map(ascii_form, text))
    assert dataset.merged == len(spelled) - len(dataset.codes) == len(spelled) - len(" ".join(spelled.split()))
    inside = dataset.lengths.sum() + dataset.unfinished
    parted = len(dataset) - (dataset.unfinished == 0 and len(dataset) > 0)  # a space follows each, not the last
    assert inside + parted == len(dataset.codes)


@given(st.lists(st.text(alphabet="ab é.!?\"') \n\u0301…—\u4e2d", max_size=6)), st.integers(1, 9))
def test_pieces_are_as_good_as_the_whole(pieces, maxlen):
    """Wherever a text is cut into pieces: the same symbols, sentences and counts."""
    whole, parts = (TextDataset(text, maxlen=maxlen) for text in ("".join(pieces), iter(pieces)))
    assert whole.codes == parts.codes and whole.dropped == parts.dropped
    for name in ("starts", "lengths"):
        assert getattr(whole, name).tolist() == getattr(parts, name).tolist()
    for name in ("read", "added", "merged", "accents", "unfinished", "too_long"):
        assert getattr(whole, name) == getattr(parts, name)


@given(st.binary(max_size=60), st.integers(1, 7))
def test_any_bytes_are_read_or_refused_at_the_right_place(tmp_path_factory, content, chunk):
    path = tmp_path_factory.getbasetemp() / "bytes.txt"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textloader.CHUNK", chunk)
        try:
            text = "".join(read_text(path))
        except LabError as error:
            said = str(error)
            with contextlib.suppress(UnicodeDecodeError):
                content.decode("utf-8")
                assert b"\0" in content or not content.strip()
                return
            assert any(word in said for word in ("NUL", "empty", "not UTF-8"))
            if "not UTF-8" in said:
                with pytest.raises(UnicodeDecodeError) as expected:
                    content.decode("utf-8")
                assert f"byte {expected.value.start};" in said
        else:
            assert text == content.decode("utf-8").removeprefix("\ufeff")


@pytest.mark.parametrize(
    "text",
    ["x" * 10**7, "a" + "\u0301" * 10**6 + ".", "." * 10**6, "👩‍🚀" * 10**5, '."' * 10**5 + " a."],
    ids=["no space", "accents", "full stops", "emoji", "quotes"],
)
def test_long_monotonous_texts(text):
    """Time grows with the length, not with its square: these would take hours."""
    dataset = TextDataset(text)
    assert dataset.read == len(text)
    assert set(normalize(text)) <= set(LETTRES)


@given(st.text(alphabet="ab. !", max_size=60), st.integers(1, 8), st.integers(1, 4))
def test_every_sentence_is_kept_or_counted(text, maxlen, maxsent):
    everything = sentences(text)
    dataset = TextDataset(text, maxlen=maxlen, maxsent=maxsent)
    assert [code2string(dataset[i]) for i in range(len(dataset))] == [s for s in everything if len(s) <= maxlen][
        :maxsent
    ]
    assert len(dataset) + dataset.too_long + dataset.beyond_maxsent == len(everything)


def test_sentences_are_one_flat_array():
    dataset = TextDataset("One. Three.")
    assert code2string(dataset.codes) == "One. Three." and len(dataset.codes) == 11
    assert dataset.starts.tolist() == [0, 5] and dataset.lengths.tolist() == [4, 6]
    with pytest.raises(IndexError):
        dataset[2]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_sampler_takes_every_sentence_once(lengths, batch_size, epoch, shuffle):
    sampler = BucketSampler(lengths, batch_size, shuffle=shuffle, seed=3)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler) and max(map(len, batches)) <= batch_size
    assert batches == list(sampler)  # the same epoch again


def test_sampler_shuffles_by_epoch_and_seed():
    def epoch(number, seed):
        sampler = BucketSampler([5] * 100, 10, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0, 0) != epoch(1, 0) != epoch(1, 1)


def test_buckets_waste_little_on_the_corpus():
    dataset = TextDataset(read_text(CORPUS))
    total = real = 0
    for batch in BucketSampler(dataset.lengths, 32):
        lengths = dataset.lengths[batch] + 1
        total, real = total + lengths.max() * len(batch), real + lengths.sum()
    assert 1 - real / total < 0.03


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b" \n", ["empty"]),
        (b"ab\xffcd.", ["UTF-8", "byte 2"]),
        (b"ab\0.", ["NUL", "byte 2"]),
        (b"\xef\xbb\xbf\xff", ["byte 3"]),
        (None, ["cannot read"]),
    ],
)
def test_bad_files(tmp_path, content, words):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabError) as error:
        list(read_text(path))
    assert all(word in str(error.value) for word in words)


def test_command_refuses_a_bad_file(tmp_path):
    (tmp_path / "corpus.txt").write_bytes(b"ab\xffcd.")
    refused(command("textloader.py", tmp_path / "corpus.txt"), "UTF-8", "byte 2")


def test_byte_order_mark(tmp_path):
    (tmp_path / "bom.txt").write_bytes("\ufeffHé.".encode())
    assert sentences(read_text(tmp_path / "bom.txt")) == ["He."]


def test_command_describes_a_corpus(tmp_path):
    (tmp_path / "c.txt").write_text("Un ☺. Deux. Reste", encoding="utf-8")
    result = command("textloader.py", tmp_path / "c.txt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in ("7 × 3 batch", "2 sentences", "☺ WHITE SMILING FACE", "5 characters after the last sentence end"):
        assert words in result.stdout
    assert not list(ROOT.glob("c.txt"))


def test_nothing_from_the_input_reaches_the_terminal_raw(tmp_path):
    """No escape sequence, no control character, no turn of direction: not from the text, not from its name."""
    path = tmp_path / ("c\u202e.txt" if os.name == "nt" else "c\x1b[31m\u202e\r.txt")
    path.write_text("Un \x1b]0;title\x07\u202e\u2066\x9b31m\x7f\ue000\U000e0041. Deux.", encoding="utf-8")
    result = command("textloader.py", path)
    assert result.returncode == 0, result.stderr
    assert "RIGHT-TO-LEFT OVERRIDE" in result.stdout
    assert all(c.isprintable() or c == "\n" for c in result.stdout)
