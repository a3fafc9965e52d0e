"""A checkpoint that is not whole and sound is refused in one line or loads equal; it runs nothing."""

import io
import math
import os
import pickle
import random
import zipfile

import pytest
import torch
from conftest import command, here, refused, same

from textloader import LabError
from tp5 import load


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The smallest last.pt that training writes."""
    folder = tmp_path_factory.mktemp("smallest")
    (folder / "small.txt").write_text("Ab. Cd! Ef? Gh. Ij. " * 200, encoding="utf-8")
    sizes = ("--model", "gru", "--hidden", 1, "--embedding", 1, "--batch-size", 512, "--epochs", 1)
    found = here("tp5.py", "--data", folder / "small.txt", "--run", folder / "run", *sizes)
    assert found.returncode == 0, found.stderr
    return folder / "run" / "last.pt"


def refusals(path, contents, good, wrong: int = 0) -> int:
    """How many of the contents were refused; all others, but `wrong` ones at most, must load as equal to `good`."""
    count = differing = 0
    for content in contents:
        path.write_bytes(content)
        try:
            found = load(path)
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
    assert refusals(tmp_path / "flipped.pt", contents, load(file), wrong=count // 3000) > count // 2


def test_truncated(file, tmp_path):
    whole, dice = file.read_bytes(), random.Random(0)
    ends = {b + d for b in boundaries(whole) for d in (-1, 0, 1)} | {dice.randrange(len(whole)) for _ in range(60)}
    cut = [whole[:end] for end in ends if 0 <= end < len(whole)]
    holes = [whole[: len(whole) // 2] + whole[len(whole) // 2 + n :] for n in (1, 64, 1000)]
    zeros = [whole[:start] + bytes(512) + whole[start + 512 :] for start in range(0, len(whole), 2048)]
    count = refusals(tmp_path / "cut.pt", [*cut, *holes, *zeros], load(file))
    assert count >= len(cut) + len(holes)


class Calls:
    """Unpickled by a careless reader, it calls `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


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
        "pickle": pickle.dumps(good["progress"]),
        "pickle bomb": bomb,
        "bomb": saved({**good, "weights": Calls(os.mkdir, str(boom))}),
        "system": saved({**good, "arguments": Calls(os.system, f"mkdir '{boom}'")}),
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
        "another cell": saved({**good, "arguments": [*good["arguments"], "--model=lstm"]}),
        "bytes": saved({**good, "arguments": Calls(bytearray, 4 * 10**9)}),
        "no width": saved({**good, "weights": {**weights, "emb.weight": torch.zeros(10**7, 0)}}),
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
            with pytest.raises(LabError, match="no checkpoint of this version"):
                load(run / "last.pt")
    (run / "best.pt").write_bytes(cases["system"])
    refused(here("tp5.py", "--compare", run), str(run / "best.pt"))
    refused(here("tp5.py", "--resume", run, "--look", "abc"), str(run / "best.pt"))
    assert not boom.exists()


HOSTILE = (None, True, -1, 0, 2.5, 10**6, 10**40, math.nan, "x", [], {}, torch.zeros(0), torch.zeros(1).expand(10**9))


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
    *((("progress", name), value) for name, value in [("step", -1), ("step", 10**6), ("step", "x")]),
    *((("progress", name), None) for name in ("best_loss", "step", "skipped", "recent_nats", "seconds")),
    (("batch_size",), 2.5),
    (("weights", "decoder.bias"), torch.zeros(97, dtype=torch.float64)),
    *((("moments", 1, 0, "step"), value) for value in (torch.zeros(0), torch.tensor(-1.0), "x")),
    *((("moments", 0, 0), value) for value in ({}, None, {"momentum": torch.zeros(1)})),
    *((("moments", 0), value) for value in ({}, None, {"momentum": torch.zeros(1)})),
    *((("moments",), value) for value in ([], [{}] * 20, {}, "x")),
)


def resumed_safely(run, checkpoint, path) -> None:
    """Train on from a checkpoint whose value at `path` is crafted: to its end, or refused in one line."""
    torch.save(checkpoint, run / "last.pt")
    found = here("tp5.py", "--resume", run, "--epochs", 2)
    if found.returncode:
        refused(found)
        said = ("last.pt", "best.pt", "train anew", "another text", "directory")
        assert any(words in found.stderr for words in said), (path, found.stderr)
    else:
        assert "going on after step" in found.stdout, (path, found.stdout)
        load(run / "last.pt")


@pytest.mark.parametrize(
    ("path", "value"), CRAFTED, ids=lambda value: None if isinstance(value, torch.Tensor) else str(value)
)
def test_crafted_checkpoints(file, tmp_path, path, value):
    resumed_safely(tmp_path, edited(file, path, (value,)), path)


ARGUMENTS = ["--hidden=1000000", "--hidden=-1", "--hidden=2", "--batch-size=0", "--seed=x", "--maxsent=x"]
ARGUMENTS += ["--model=x", "--model=lstm", "--data=", "--device=x", "--help", "--x", "x", "\x1b[31m", "--hidden=--"]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_crafted_arguments(file, tmp_path, argument):
    """A checkpoint's arguments are not those of the person who loads it: what they say is one line, too."""
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["arguments"].append(argument)
    torch.save(checkpoint, tmp_path / "last.pt")
    refused(here("tp5.py", "--resume", tmp_path), str(tmp_path) if argument != "--data=" else "directory")


@pytest.mark.slow
def test_every_field_replaced_or_missing(file, tmp_path):
    for path in places(torch.load(file, weights_only=True)):
        # A number of the run's progress that says something else is that number.
        hostile = () if path[0] == "progress" and len(path) > 1 else HOSTILE
        for value in (None, *((each,) for each in hostile)):
            resumed_safely(tmp_path, edited(file, path, value), path)


@pytest.mark.parametrize("size", [1, 10**6], ids=["one element", "too many elements"])
def test_crafted_moments_do_not_end_the_process(file, tmp_path, size):
    """Of the right shape over one element, or of a wrong shape, they once did, by signal 6 or 11."""
    checkpoint = torch.load(file, weights_only=True)
    for path in places(checkpoint["moments"]):
        if path[-1] in ("momentum", "exp_avg", "exp_avg_sq"):
            optimizer, parameter, name = path
            moments = checkpoint["moments"][optimizer][parameter]
            moments[name] = torch.zeros(1).expand(moments[name].shape if size == 1 else size)
    torch.save(checkpoint, tmp_path / "last.pt")
    refused(command("tp5.py", "--resume", tmp_path, "--epochs", 2), "last.pt")


def test_other_paths(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for name in ("folder.pt", "missing.pt", "nul\0.pt"):
        with pytest.raises(LabError):
            load(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX files")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    """A pipe that nobody writes, and one that has no end."""
    os.mkfifo(tmp_path / "best.pt")
    (tmp_path / "last.pt").symlink_to("/dev/zero")
    refused(here("generate.py", "--checkpoint", tmp_path), "best.pt")
    refused(here("tp5.py", "--compare", tmp_path), "best.pt")
    refused(here("tp5.py", "--resume", tmp_path), "last.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")
def test_a_run_made_with_cuda_goes_on_without(file, tmp_path, monkeypatch):
    """What torch.save writes of a CUDA tensor differs in the location that its storage names."""
    good = torch.load(file, weights_only=True)
    good["arguments"].append("--device=cuda")
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        for name in ("last.pt", "best.pt"):
            torch.save(good, tmp_path / name)
    assert b"cuda:0" in (tmp_path / "best.pt").read_bytes()
    found, expected = load(tmp_path / "best.pt", "--device=cpu"), load(file)
    assert same(found.model, expected.model) and same(found.optimizers, expected.optimizers)
    for ending in (["--look", "A"], ["--epochs", 2, "--device", "cpu"]):
        result = here("tp5.py", "--resume", tmp_path, *ending)
        assert result.returncode == 0, (ending, result.stderr)
    for called in (["tp5.py", "--compare", tmp_path], ["generate.py", "--checkpoint", tmp_path, "--greedy"]):
        result = here(*called)
        assert result.returncode == 0, result.stderr
