"""A checkpoint that is not whole and sound is refused in one line, whatever is wrong with it."""

import copy
import io
import itertools
import math
import os
import pickle
import random
import re
import warnings
import zipfile

import pytest
import torch
from conftest import command, refused

from textloader import LabError
from tp5 import load_checkpoint, load_model


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The smallest last.pt that training writes."""
    folder = tmp_path_factory.mktemp("smallest")
    (folder / "small.txt").write_text("A b. Cd! E? F. G.", encoding="utf-8")
    sizes = ("--model", "gru", "--hidden", 1, "--embedding", 1, "--batch-size", 2, "--epochs", 1)
    result = command("tp5.py", "--data", folder / "small.txt", "--run", folder / "run", *sizes)
    assert result.returncode == 0, result.stderr
    return folder / "run" / "last.pt"


def same(left, right) -> bool:
    """Equal to the bit and in type, through dicts."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else (type(left), left) == (type(right), right)


def refusals(path, contents, good) -> tuple[int, int]:
    """Load each content: how many were refused, how many were read as equal to `good`; nothing else may be."""
    refused_, equal = 0, 0
    for content in contents:
        path.write_bytes(content)
        try:
            found = load_checkpoint(path)
        except LabError as error:
            assert str(path) in str(error)
            refused_ += 1
        else:
            assert same(found, good)
            equal += 1
    return refused_, equal


def flips(whole: bytes, places):
    """`whole` with one bit changed at each (byte, bit)."""
    for byte, bit in places:
        yield whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :]


def boundaries(whole: bytes) -> list[int]:
    """Where the parts of the archive begin: records, their content, directory, end."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        starts = [record.header_offset for record in archive.infolist()]
        contents = [archive.open(record)._fileobj._pos for record in archive.infolist()]
        return sorted({0, *starts, *contents, archive.start_dir, len(whole)})


@pytest.mark.parametrize("count", [120, pytest.param(6000, marks=pytest.mark.slow)])
def test_flipped_bits(file, tmp_path, count):
    whole, good, dice = file.read_bytes(), load_checkpoint(file), random.Random(count)
    near = [b + d for b in boundaries(whole) for d in range(-8, 60) if 0 <= b + d < len(whole)]
    places = [(dice.choice(near) if dice.random() < 0.5 else dice.randrange(len(whole)), dice.randrange(8))
              for _ in range(count)]  # fmt: skip
    no, equal = refusals(tmp_path / "flipped.pt", flips(whole, places), good)
    print(f"\n{count} flipped bits: {no} refused, {equal} without effect on what is read")
    assert no > count // 2


@pytest.mark.slow
def test_every_byte_flipped(file, tmp_path):
    whole, good, dice = file.read_bytes(), load_checkpoint(file), random.Random(0)
    places = [(byte, dice.randrange(8)) for byte in range(len(whole))]
    no, equal = refusals(tmp_path / "flipped.pt", flips(whole, places), good)
    print(f"\n{len(places)} flipped bits, one in each byte: {no} refused, {equal} without effect on what is read")
    assert no > len(whole) // 2


def test_truncated(file, tmp_path):
    whole, dice = file.read_bytes(), random.Random(0)
    ends = {b + d for b in boundaries(whole) for d in (-1, 0, 1)} | {dice.randrange(len(whole)) for _ in range(60)}
    cut = [whole[:end] for end in ends if 0 <= end < len(whole)]
    holes = [whole[: len(whole) // 2] + whole[len(whole) // 2 + n :] for n in (1, 64, 1000)]
    zeros = [whole[:start] + bytes(512) + whole[start + 512 :] for start in range(0, len(whole), 2048)]
    contents = [content for content in (*cut, *holes, *zeros) if content != whole]
    no, equal = refusals(tmp_path / "cut.pt", contents, load_checkpoint(file))
    print(f"\n{len(contents)} truncations, holes and blocks of zeros: {no} refused, {equal} without effect")
    assert no >= len(cut) + len(holes)


HOSTILE = (
    *(None, True, -1, 0, 2**63, 10**40, 0.5, -0.5, math.nan, math.inf, "", "x", "\x1b[2J", [], {}, {"a": 1}),
    *(torch.zeros(0), torch.zeros(1).expand(10**9), torch.full((3,), math.nan), torch.zeros(2, dtype=torch.int64)),
)


def places(value, path=()):
    """The path to every value in nested dicts."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key))
    if path:
        yield path


def changed(checkpoint: dict, path: tuple, value) -> dict:
    """A copy with the value at `path` replaced."""
    checkpoint = copy.deepcopy(checkpoint)
    part = checkpoint
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return checkpoint


def at(checkpoint: dict, path: tuple):
    for key in path:
        checkpoint = checkpoint[key]
    return checkpoint


def swapped_fields(good: dict):
    """Checkpoints with a field replaced by a hostile value, by another field's, or taken away."""
    everywhere = list(places(good))
    for path, value in itertools.product(everywhere, HOSTILE):
        yield path, changed(good, path, value)
    for path, other in itertools.permutations(everywhere, 2):
        yield path, changed(good, path, at(good, other))
    for path in everywhere:
        without = copy.deepcopy(good)
        del at(without, path[:-1])[path[-1]]
        yield path, without


# In these, and in tensors of one shape, another value is as good as the one that was there.
FREE = (
    *("threads", "lr", "clip", "seed", "maxlen", "maxsent", "epochs", "batch_size"),
    *("scalars_every", "histograms_every", "epoch", "batch", "steps", "nats", "symbols", "seconds", "clipped"),
    *("best", "trained", "data", "name", "sha256", "processes"),
    *("recurrent_scale", "read", "train", "norms"),
)


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_swapped_fields(file, tmp_path, step):
    """Refused, or loaded where the value is one that a run may have there."""
    good, counts = load_checkpoint(file), {"refused": 0, "equal": 0, "as valid": 0}
    path = tmp_path / "swapped.pt"
    for where, checkpoint in itertools.islice(swapped_fields(good), 0, None, step):
        torch.save(checkpoint, path)
        try:
            found = load_checkpoint(path)
        except LabError as error:
            assert str(path) in str(error)
            counts["refused"] += 1
            continue
        if same(found, good):
            counts["equal"] += 1
            continue
        load_model(path)
        assert where[0] in ("weights", "optimizer") or where[-1] in FREE, (where, at(found, where))
        counts["as valid"] += 1
    print(f"\nswapped fields: {counts}")
    assert counts["refused"] > 5 * counts["as valid"]


def archive(records: dict, compression=zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of doubled names
        for name, record in records.items():
            file.writestr(name.rstrip("*"), record)
    return content.getvalue()


class Calls:
    """Unpickled by a careless reader, it calls `function`."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def foreign(whole: bytes, good: dict, boom) -> dict[str, bytes]:
    """Files of other kinds, older versions, bombs: by name."""

    def saved(content, **options) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, **options)
        return file.getvalue()

    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        records = {record.filename: file.read(record) for record in file.infolist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    data = next(name for name in records if name.endswith("data/0"))
    deep: dict = {}
    for _ in range(100):
        deep = {"a": deep, "b": deep}  # 2**100 leaves, in a few bytes
    loop: dict = {}
    loop["loop"] = loop
    return {
        "empty": b"",
        "text": "Yes we can. é".encode(),
        "zip": archive({"a.txt": b"a"}),
        "empty zip": archive({}),
        "pickle": pickle.dumps(good["options"]),
        "pickle bomb": pickle.dumps(Calls(os.mkdir, str(boom))),
        "bomb": saved({**good, "weights": Calls(os.mkdir, str(boom))}),
        "system": saved({**good, "options": Calls(os.system, f"mkdir {boom}")}),
        "allowed call": saved({**good, "options": Calls(bytearray, 10**12)}),
        "legacy": saved(good, _use_new_zipfile_serialization=False),
        "module": saved({**good, "weights": torch.nn.Parameter(torch.zeros(1))}),
        "list": saved([1, 2]),
        "tensor": saved(torch.zeros(3)),
        "another dict": saved({"weights": 1}),
        "version 1": saved({**good, "format": 1}),
        "later version": saved({**good, "format": 99}),
        "deep": saved({**good, "options": deep}),
        "loop": saved({**good, "weights": loop}),
        "views of one": saved({**good, "weights": dict.fromkeys(good["weights"], torch.zeros(1).expand(10**9))}),
        "meta": saved({**good, "weights": {n: t.to("meta") for n, t in good["weights"].items()}}),
        "huge": saved(
            {**changed(good, ("options", "hidden"), 10**6), "model": {**good["model"], "hidden_size": 10**6}}
        ),
        "inflating": archive(records, zipfile.ZIP_DEFLATED),
        "claims more": archive({**records, pickled: records[pickled].replace(b"K\x61", b"J\xff\xff\xff\x7f", 1)}),
        "short record": archive({**records, data: records[data][:-4]}),
        "long record": archive({**records, data: records[data] + bytes(4)}),
        "no pickle": archive({name: content for name, content in records.items() if name != pickled}),
        "two pickles": archive({**records, pickled + "*": pickle.dumps(Calls(os.mkdir, str(boom)), 2)}),
        "big endian": archive({n: b"big" if n.endswith("byteorder") else c for n, c in records.items()}),
    }


def test_foreign_files_and_bombs(file, tmp_path):
    boom = tmp_path / "boom"
    cases = foreign(file.read_bytes(), load_checkpoint(file), boom)
    for name, content in cases.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(LabError, match=re.escape(str(path))) as caught:
            load_model(path)
        assert "\n" not in str(caught.value), name
        if name == "version 1":
            assert "format 1, this program reads" in str(caught.value) and "train again" in str(caught.value)
    assert not boom.exists()
    refused(command("generate.py", "--checkpoint", tmp_path / "bomb.pt"), "bomb.pt", "mkdir")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes(cases["system"])
    refused(command("tp5.py", "--resume", tmp_path / "run"), "last.pt", "system")
    assert not boom.exists()


def test_other_paths(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for name in ("folder.pt", "missing.pt", "nul\0.pt"):
        with pytest.raises(LabError):
            load_model(tmp_path / name)


def test_a_checkpoint_made_with_cuda_loads_without(file, tmp_path, monkeypatch):
    """What torch.save writes of a CUDA tensor differs in the location that its storage names."""
    good = load_checkpoint(file)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(good, tmp_path / "cuda.pt")
    assert b"cuda:0" in (tmp_path / "cuda.pt").read_bytes()
    assert same(load_checkpoint(tmp_path / "cuda.pt"), good)
