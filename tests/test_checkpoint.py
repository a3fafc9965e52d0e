"""A checkpoint that is not whole is refused in one line; it runs nothing, and cannot fill the memory."""

import hashlib
import io
import os
import pickle
import random
import zipfile

import pytest
import torch
from conftest import checkpoint_file, here, refused, same

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


def assert_refused(path, contents) -> None:
    """Each of the contents, with the file's name and in one line."""
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(LabError) as error:
            load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("count", [200, pytest.param(6000, marks=pytest.mark.slow)])
def test_flipped_bits(file, tmp_path, count):
    whole, dice, contents = file.read_bytes(), random.Random(count), []
    for _ in range(count):
        byte = dice.randrange(len(whole))
        flipped = bytes([whole[byte] ^ 1 << dice.randrange(8)])
        contents.append(whole[:byte] + flipped + whole[byte + 1 :])
    assert_refused(tmp_path / "flipped.pt", contents)


def test_truncated(file, tmp_path):
    whole, dice = file.read_bytes(), random.Random(0)
    ends = {0, 1, 31, 32, 33, len(whole) - 33, len(whole) - 32, len(whole) - 1}
    cut = [whole[:end] for end in ends | {dice.randrange(len(whole)) for _ in range(60)}]
    holes = [whole[: len(whole) // 2] + whole[len(whole) // 2 + n :] for n in (1, 64, 1000)]
    assert_refused(tmp_path / "cut.pt", [*cut, *holes, whole + b"\0", bytes(len(whole))])


class Calls:
    """Unpickled by a careless reader, it calls `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def signed(content: bytes) -> bytes:
    """Followed by its SHA-256, as a whole checkpoint is."""
    return content + hashlib.sha256(content).digest()


def saved(content, **options) -> bytes:
    """What torch.save writes of it."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def foreign(whole: bytes, good: dict, boom) -> dict[str, bytes]:
    """Files of other kinds, other versions, bombs: by name."""
    with zipfile.ZipFile(io.BytesIO(whole[:-32])) as file:
        records = {record.filename: file.read(record) for record in file.infolist()}
    bomb, bombed = pickle.dumps(Calls(os.mkdir, str(boom)), 2), io.BytesIO()
    with zipfile.ZipFile(bombed, "w") as file:
        for name, record in records.items():
            file.writestr(name, bomb if name.endswith("data.pkl") else record)
    return {
        "empty": b"",
        "text": "Yes we can. é".encode(),
        "pickle": pickle.dumps(good["progress"]),
        "pickle bomb": bomb,
        "not signed": saved(good),
        "edited": saved({**good, "global_batch_size": 1}) + whole[-32:],
        "version 1": signed(saved({**good, "format": 1})),
        "later version": signed(saved({**good, "format": 99})),
        "another dict": signed(saved({"weights": 1})),
        # Whoever makes these knows what a checkpoint ends with.
        "bomb": signed(saved({**good, "weights": Calls(os.mkdir, str(boom))})),
        "system": signed(saved({**good, "options": Calls(os.system, f"mkdir '{boom}'")})),
        "bomb in place": signed(bombed.getvalue()),
        "4 GB": signed(saved({**good, "options": Calls(bytearray, 4 * 10**9)})),
    }


def test_foreign_files_and_bombs(file, tmp_path):
    boom, run = tmp_path / "boom", tmp_path / "run"
    run.mkdir()
    cases = foreign(file.read_bytes(), torch.load(file, weights_only=True), boom)
    for content in cases.values():
        (run / "last.pt").write_bytes(content)
        refused(here("generate.py", "--checkpoint", run / "last.pt"), str(run / "last.pt"), "version")
        refused(here("tp5.py", "--resume", run, "--epochs", 2), str(run / "last.pt"), "version")
    (run / "best.pt").write_bytes(cases["system"])
    refused(here("tp5.py", "--compare", run), str(run / "best.pt"))
    refused(here("tp5.py", "--resume", run, "--look", "abc"), str(run / "best.pt"))
    assert not boom.exists()


def test_a_rewritten_checkpoint_is_the_same(file, tmp_path):
    """What the tests edit and write is what `save` would have written."""
    checkpoint_file(torch.load(file, weights_only=True), tmp_path / "again.pt")
    assert same(load(tmp_path / "again.pt"), load(file))


def test_a_model_of_other_sizes_is_not_allocated(file, tmp_path):
    """Its weights are compared with its options before there is any."""
    content = torch.load(file, weights_only=True)
    checkpoint_file({**content, "options": {**content["options"], "hidden": 10**6}}, tmp_path / "large.pt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(tmp_path / "large.pt")


def test_a_cell_of_another_script_is_named(file, tmp_path):
    content = torch.load(file, weights_only=True)
    checkpoint_file({**content, "options": {**content["options"], "model": "minimal"}}, tmp_path / "best.pt")
    refused(here("generate.py", "--checkpoint", tmp_path, "--greedy"), "best.pt", "'minimal'")


def test_other_paths(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for name in ("folder.pt", "missing.pt", "nul\0.pt"):
        with pytest.raises(LabError, match="no such file"):
            load(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX files")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    """A pipe that nobody writes, and one that has no end."""
    os.mkfifo(tmp_path / "best.pt")
    (tmp_path / "last.pt").symlink_to("/dev/zero")
    refused(here("generate.py", "--checkpoint", tmp_path), "best.pt")
    refused(here("tp5.py", "--compare", tmp_path), "best.pt")
    refused(here("tp5.py", "--resume", tmp_path), "last.pt")
    with pytest.raises(LabError, match="no such file"):
        load(tmp_path / "best.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")
def test_a_run_made_with_cuda_goes_on_without(file, tmp_path, monkeypatch):
    """What torch.save writes of a CUDA tensor differs in the location that its storage names."""
    good = torch.load(file, weights_only=True)
    good["options"]["device"] = "cuda"
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        for name in ("last.pt", "best.pt"):
            checkpoint_file(good, tmp_path / name)
    assert b"cuda:0" in (tmp_path / "best.pt").read_bytes()
    found, expected = load(tmp_path / "best.pt", device="cpu"), load(file)
    assert same(found.model, expected.model) and same(found.optimizers, expected.optimizers)
    refused(here("tp5.py", "--resume", tmp_path, "--epochs", 2), "last.pt", "--device cpu")
    for ending in (["--look", "A"], ["--epochs", 2, "--device", "cpu"]):
        result = here("tp5.py", "--resume", tmp_path, *ending)
        assert result.returncode == 0, (ending, result.stderr)
    for called in (["tp5.py", "--compare", tmp_path], ["generate.py", "--checkpoint", tmp_path, "--greedy"]):
        result = here(*called)
        assert result.returncode == 0, result.stderr
