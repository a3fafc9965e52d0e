"""A checkpoint that is not whole and sound is refused in one line or loads equal; it runs nothing."""

import io
import itertools
import math
import os
import pickle
import random
import zipfile

import pytest
import torch
from conftest import command, here, refused

from textloader import LabError
from tp5 import load_checkpoint


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The smallest last.pt that training writes."""
    folder = tmp_path_factory.mktemp("smallest")
    (folder / "small.txt").write_text("A b. Cd! E? F. G. " * 200, encoding="utf-8")
    sizes = ("--model", "gru", "--hidden", 1, "--embedding", 1, "--batch-size", 512, "--epochs", 1)
    found = here("tp5.py", "--data", folder / "small.txt", "--run", folder / "run", *sizes)
    assert found.returncode == 0, found.stderr
    return folder / "run" / "last.pt"


def same(left, right) -> bool:
    """Equal to the bit and in type, through dicts and lists."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, torch.nn.Module):
        return same(left.state_dict(), right.state_dict())
    if hasattr(left, "__dict__"):
        return same(vars(left), vars(right))
    return (type(left), left) == (type(right), right)


def refusals(path, contents, good, wrong: int = 0) -> int:
    """How many of the contents were refused; all others, but `wrong` ones at most, must load as equal to `good`."""
    count = differing = 0
    for content in contents:
        path.write_bytes(content)
        try:
            found = load_checkpoint(path)
        except LabError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            count += 1
        else:
            differing += not same(found, good)
    assert differing <= wrong
    return count


def boundaries(whole: bytes) -> list[int]:
    """Where the parts of the archive begin: records, directory, end."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        starts = [record.header_offset for record in archive.infolist()]
        return [*starts, archive.start_dir, len(whole)]


@pytest.mark.parametrize("count", [120, pytest.param(6000, marks=pytest.mark.slow)])
def test_flipped_bits(file, tmp_path, count):
    """Half of them anywhere, half near a boundary of the archive.

    No checksum covers the archive's directory: one flip in 3,000 there may move what torch reads.
    """
    whole, dice, contents = file.read_bytes(), random.Random(count), []
    near = [b + d for b in boundaries(whole) for d in range(-8, 60) if 0 <= b + d < len(whole)]
    for i in range(count):
        byte = dice.choice(near) if i % 2 else dice.randrange(len(whole))
        flipped = bytes([whole[byte] ^ 1 << dice.randrange(8)])
        contents.append(whole[:byte] + flipped + whole[byte + 1 :])
    refused = refusals(tmp_path / "flipped.pt", contents, load_checkpoint(file), wrong=count // 3000)
    assert refused > count // 2


def test_truncated(file, tmp_path):
    whole, dice = file.read_bytes(), random.Random(0)
    ends = {b + d for b in boundaries(whole) for d in (-1, 0, 1)} | {dice.randrange(len(whole)) for _ in range(60)}
    cut = [whole[:end] for end in ends if 0 <= end < len(whole)]
    holes = [whole[: len(whole) // 2] + whole[len(whole) // 2 + n :] for n in (1, 64, 1000)]
    zeros = [whole[:start] + bytes(512) + whole[start + 512 :] for start in range(0, len(whole), 2048)]
    count = refusals(tmp_path / "cut.pt", [*cut, *holes, *zeros], load_checkpoint(file))
    assert count >= len(cut) + len(holes)


class Calls:
    """Unpickled by a careless reader, it calls `function`."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def archive(records: dict, compression=zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        for name, record in records.items():
            file.writestr(name, record)
    return content.getvalue()


def foreign(whole: bytes, good: dict, boom) -> dict[str, bytes]:
    """Files of other kinds, other versions, bombs: by name."""
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        records = {record.filename: file.read(record) for record in file.infolist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    data = next(name for name in records if name.endswith("data/0"))
    bomb = pickle.dumps(Calls(os.mkdir, str(boom)), 2)
    weights = good["weights"]
    return {
        "empty": b"",
        "text": "Yes we can. é".encode(),
        "zip": archive({"a.txt": b"a"}),
        "empty zip": archive({}),
        "pickle": pickle.dumps(good["options"]),
        "pickle bomb": bomb,
        "bomb": saved({**good, "weights": Calls(os.mkdir, str(boom))}),
        "system": saved({**good, "options": Calls(os.system, f"mkdir '{boom}'")}),
        "bomb in place": archive({**records, pickled: bomb}),
        "legacy": saved(good, _use_new_zipfile_serialization=False),
        "list": saved([1, 2]),
        "tensor": saved(torch.zeros(3)),
        "another dict": saved({"weights": 1}),
        "version 1": saved({**good, "format": 1}),
        "later version": saved({**good, "format": 99}),
        "another alphabet": saved({**good, "alphabet": "ab"}),
        "views of one": saved({**good, "weights": dict.fromkeys(weights, torch.zeros(1).expand(10**9))}),
        "expanded": saved({**good, "weights": {n: torch.zeros(1).expand(t.shape) for n, t in weights.items()}}),
        "meta": saved({**good, "weights": {n: t.to("meta") for n, t in weights.items()}}),
        "nan": saved({**good, "weights": {n: t * math.nan for n, t in weights.items()}}),
        "a weight less": saved({**good, "weights": dict([*weights.items()][1:])}),
        "a weight more": saved({**good, "weights": {**weights, "more": torch.zeros(1)}}),
        "another cell": saved({**good, "options": {**good["options"], "model": "lstm"}}),
        "compressed": archive(records, zipfile.ZIP_DEFLATED),
        "short record": archive({**records, data: records[data][:-4]}),
        "no pickle": archive({name: content for name, content in records.items() if name != pickled}),
    }


def test_foreign_files_and_bombs(file, tmp_path):
    boom, run = tmp_path / "boom", tmp_path / "run"
    run.mkdir()
    cases = foreign(file.read_bytes(), torch.load(file, weights_only=True), boom)
    for name, content in cases.items():
        (run / "last.pt").write_bytes(content)
        refused(here("generate.py", "--checkpoint", run / "last.pt"), str(run / "last.pt"))
        refused(here("tp5.py", "--resume", run, "--epochs", 2), str(run / "last.pt"))
        if name == "version 1":
            with pytest.raises(LabError, match=r"another format .*train again"):
                load_checkpoint(run / "last.pt")
    (run / "best.pt").write_bytes(cases["system"])
    refused(here("tp5.py", "--compare", run), str(run / "best.pt"))
    refused(here("tp5.py", "--resume", run, "--look", "abc"), str(run / "best.pt"))
    assert not boom.exists()


HOSTILE = (None, True, -1, 0, 10**6, 10**40, math.nan, "x", [], {}, torch.zeros(0), torch.zeros(1).expand(10**9))


def places(value, path=()):
    """The path to every value in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


def edited(file, path: tuple, value=None) -> dict:
    """The checkpoint with the value at `path` replaced, or without it."""
    checkpoint = torch.load(file, weights_only=True)
    *parents, key = path
    part = checkpoint
    for parent in parents:
        part = part[parent]
    if value is None:
        del part[key]
    else:
        part[key] = value[0]
    return checkpoint


CRAFTED = (  # these once crashed the process, hung it, or ended in a traceback
    *((("options", name), value) for name, value in [("hidden", 10**6), ("hidden", -1), ("batch_size", 0)]),
    *((("options", name), "x") for name in ("seed", "model", "maxsent")),
    *((("progress", name), value) for name, value in [("step", -1), ("step", 10**6), ("step", "x")]),
    *((("progress", name), None) for name in ("best_loss", "step", "skipped", "recent_nats", "seconds")),
    *((("moments", 0, "step"), value) for value in (torch.zeros(0), "x")),
    *((("moments", 0), value) for value in ({}, None, {"step": torch.zeros(()), "momentum": torch.zeros(1)})),
    *((("moments",), value) for value in ([], [{}] * 20, {}, "x")),
)


def resumed_safely(run, checkpoint, what) -> None:
    """Train on from a checkpoint: to its end, or refused in one line."""
    torch.save(checkpoint, run / "last.pt")
    found = here("tp5.py", "--resume", run, "--epochs", 2)
    if found.returncode:
        refused(found)
        said = ("last.pt", "best.pt", "train anew", "another text")
        assert any(words in found.stderr for words in said), (what, found.stderr)
    else:
        load_checkpoint(run / "last.pt")


@pytest.mark.parametrize(
    ("path", "value"), CRAFTED, ids=lambda value: None if isinstance(value, torch.Tensor) else str(value)
)
def test_crafted_checkpoints(file, tmp_path, path, value):
    resumed_safely(tmp_path, edited(file, path, (value,)), path)


@pytest.mark.slow
def test_every_field_replaced_or_missing(file, tmp_path):
    for path in places(torch.load(file, weights_only=True)):
        if path[0] == "options" and len(path) > 1:
            continue  # an option that says something else is that option, or an error of its own
        # A number of the run's progress that says something else is that number.
        hostile = () if path[0] == "progress" and len(path) > 1 else HOSTILE
        for value in (None, *((each,) for each in hostile)):
            resumed_safely(tmp_path, edited(file, path, value), (path, value))


@pytest.mark.parametrize("size", [1, 10**6], ids=["one element", "too many elements"])
def test_crafted_moments_do_not_end_the_process(file, tmp_path, size):
    """Of the right shape over one element, or of a wrong shape, they once did, by signal 6 or 11."""
    checkpoint = torch.load(file, weights_only=True)
    for moments in checkpoint["moments"]:
        for name, moment in moments.items():
            if name != "step":
                moments[name] = torch.zeros(1).expand(moment.shape if size == 1 else size)
    torch.save(checkpoint, tmp_path / "last.pt")
    found = command("tp5.py", "--resume", tmp_path, "--epochs", 2)
    if size == 1:
        assert found.returncode == 0 and load_checkpoint(tmp_path / "last.pt"), found.stderr
    else:
        refused(found, "last.pt")


def test_other_paths(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for name, path in itertools.product(("folder.pt", "missing.pt", "nul\0.pt"), [tmp_path]):
        with pytest.raises(LabError):
            load_checkpoint(path / name)


def test_a_checkpoint_made_with_cuda_loads_without(file, tmp_path, monkeypatch):
    """What torch.save writes of a CUDA tensor differs in the location that its storage names."""
    good = torch.load(file, weights_only=True)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(good, tmp_path / "cuda.pt")
    assert b"cuda:0" in (tmp_path / "cuda.pt").read_bytes()
    assert same(load_checkpoint(tmp_path / "cuda.pt"), load_checkpoint(file))
