"""Checkpoints whose pickle tries to run code: none runs anything, whichever reader opens it."""

import argparse
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import golden
import pytest
import torch

import memorizing_associations_task as task
from utils import checkpoints
from utils.errors import UserError

PUBLISHED = golden.FOLDER / "published_format_checkpoint.pth.tar"


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


class Opcodes:
    """Raw opcodes, as only a forger writes them."""

    def __init__(self, code: bytes):
        self.code = code


def payloads(mark: str) -> dict[str, object]:
    """Each would leave a file or a folder at `mark`."""
    python = f"open({mark!r}, 'w').close()"
    shell = f"touch {mark}"
    quoted = f"{mark}".encode()
    from_module = {
        "os.system": ("posix", "system", shell),
        "os.popen": ("os", "popen", shell),
        "subprocess": ("subprocess", "getoutput", shell),
        "runpy": ("runpy", "run_path", mark),
        "timeit": ("timeit", "timeit", python),
        "pty": ("pty", "spawn", shell),
        "code": ("code", "interact", python),
        "importlib": ("importlib", "import_module", mark),
        "torch.load": ("torch", "load", mark),
        "torch.hub": ("torch.hub", "load", mark),
        "torch.utils.cpp_extension": ("torch.utils.cpp_extension", "load", mark),
        "torch serialization": ("torch.serialization", "load", mark),
        "numpy": ("numpy", "load", mark),
        "ctypes": ("ctypes", "CDLL", mark),
        "shutil": ("shutil", "rmtree", mark),
        "argparse.FileType": ("argparse", "FileType", "w"),
        "pickle.loads": ("_pickle", "loads", mark),
        "torch inner attribute": ("torch", "_utils.os.system", shell),
        "getattr": ("builtins", "getattr", mark),
        "own module": ("utils.checkpoints", "remove_left_behind", mark),
    }
    calls = {
        "eval": Call(eval, python),
        "exec": Call(exec, python),
        "mkdir": Call(os.mkdir, mark),
        "makedirs": Call(os.makedirs, mark),
        "mkfifo": Call(os.mkfifo, mark),
        "open": Call(open, mark, "w"),
        "copyfile": Call(shutil.copyfile, __file__, mark),
        "compile": Call(compile, python, "x", "exec"),
        "__import__": Call(__import__, "os"),
        "Path.touch": Call(Path.touch, Path(mark)),
        "setattr": Call(setattr, "mark", "mark", mark),
        "Namespace by calls": Call(argparse.Namespace, mark, state={"__setstate__": Call(os.mkdir, mark)}),
        "Namespace of slots": Call(argparse.Namespace, state=(None, {"__class__": Call(os.mkdir, mark)})),
    }
    opcodes = {
        name: Opcodes(b"c" + f"{module}\n{function}\n".encode() + b"(V" + str(argument).encode() + b"\ntR")
        for name, (module, function, argument) in from_module.items()
    }
    opcodes["INST"] = Opcodes(b"(V" + quoted + b"\nios\nmkdir\n")
    opcodes["OBJ"] = Opcodes(b"(cos\nmkdir\nV" + quoted + b"\no")
    opcodes["NEWOBJ"] = Opcodes(b"cos\nmkdir\n(V" + quoted + b"\nt\x81")
    opcodes["STACK_GLOBAL"] = Opcodes(b"\x8c\x02os\x8c\x05mkdir\x93(V" + quoted + b"\ntR")
    opcodes["BUILD on Namespace"] = Opcodes(b"cargparse\nNamespace\n)\x81(dV__class__\ncos\nmkdir\n(V" + quoted + b"\ntRsb")
    opcodes["EXT"] = Opcodes(b"\x82\x01")
    return calls | opcodes


NAMES = sorted(payloads("mark"))
PLACES = ("whole file", "params", "in the Namespace", "weights", "optimizer", "nested deep", "key")


def hostile_file(path: Path, payload, place: str) -> None:
    """A published checkpoint with the payload in one place."""
    checkpoint = torch.load(PUBLISHED, weights_only=False)
    marker = "PAYLOAD-GOES-HERE"
    planted = marker if isinstance(payload, Opcodes) else payload
    match place:
        case "whole file":
            checkpoint = planted
        case "params":
            checkpoint["params"] = planted
        case "in the Namespace":
            checkpoint["params"].thr = planted
        case "weights":
            checkpoint["state_dict"]["writing_layer.W"] = planted
        case "optimizer":
            checkpoint["optimizer"]["state"][0]["step"] = planted
        case "nested deep":
            checkpoint["log_dir"] = [({"a": [(planted,)]},)]
        case "key":
            checkpoint[(planted,) if isinstance(payload, Opcodes) else (1, 2)] = planted
    torch.save(checkpoint, path)
    if isinstance(payload, Opcodes):
        plant_opcodes(path, marker, payload.code)


def plant_opcodes(path: Path, marker: str, code: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (name,) = (name for name in records if name.endswith("/data.pkl"))
    text = b"X" + len(marker).to_bytes(4, "little") + marker.encode()
    assert text in records[name]
    records[name] = records[name].replace(text, code)
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records.items():
            archive.writestr(record, content)


def assert_refused_and_nothing_ran(path: Path, mark: Path) -> None:
    before = set(path.parent.iterdir())
    with pytest.raises(UserError) as refusal:
        checkpoints.load(path)
    assert len(str(refusal.value).splitlines()) == 1
    assert str(refusal.value).startswith(f"{path}: ")
    assert not mark.exists(), "the payload ran"
    assert set(path.parent.iterdir()) == before
    assert argparse.Namespace(a=1).a == 1


@pytest.mark.parametrize("name", NAMES)
def test_payloads_in_every_place(name, tmp_path):
    mark = tmp_path / "ran"
    payload = payloads(str(mark))[name]
    for number, place in enumerate(PLACES):
        path = tmp_path / f"{number}.pth.tar"
        hostile_file(path, payload, place)
        assert_refused_and_nothing_ran(path, mark)


def test_there_is_something_to_fear(tmp_path):
    """The same files do run code where pickle is trusted, so the tests above can fail."""
    mark = tmp_path / "ran"
    for name in ("mkdir", "os.system", "open", "STACK_GLOBAL", "exec"):
        hostile_file(tmp_path / "file.pth.tar", payloads(str(mark))[name], "in the Namespace")
        torch.load(tmp_path / "file.pth.tar", weights_only=False)
        assert mark.exists(), name
        mark.rmdir() if mark.is_dir() else mark.unlink()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_and_files_of_old_pytorch_are_not_opened(protocol, tmp_path):
    mark = tmp_path / "ran"
    path = tmp_path / "file.pth.tar"
    path.write_bytes(pickle.dumps({"params": Call(os.mkdir, str(mark))}, protocol=protocol))
    assert_refused_and_nothing_ran(path, mark)
    torch.save({"params": Call(os.mkdir, str(mark))}, path, _use_new_zipfile_serialization=False)
    assert_refused_and_nothing_ran(path, mark)


def test_scripted_modules_are_not_opened(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)), str(tmp_path / "file.pth.tar"))
    assert_refused_and_nothing_ran(tmp_path / "file.pth.tar", tmp_path / "ran")


def test_a_tensor_that_claims_more_than_its_record_holds(tmp_path):
    path = tmp_path / "file.pth.tar"
    shutil.copy(PUBLISHED, path)
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    records = {name: content[:8] if "/data/" in name else content for name, content in records.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records.items():
            archive.writestr(record, content)
    assert_refused_and_nothing_ran(path, tmp_path / "ran")


def test_deep_nesting_and_many_references(tmp_path):
    path = tmp_path / "file.pth.tar"
    for code in (b"]" * 100_000 + b"a" * 99_999, many_references()):
        hostile_file(path, Opcodes(code), "in the Namespace")
        assert_refused_and_nothing_ran(path, tmp_path / "ran")


def many_references() -> bytes:
    """A list of 10 lists of 10 lists of ... the same list: 10^30 visits for whoever walks it."""
    code = io.BytesIO()
    code.write(b"]r\x00\x10\x00\x00")
    for level in range(30):
        before, after = (0x1000 + level).to_bytes(4, "little"), (0x1001 + level).to_bytes(4, "little")
        code.write(b"0]r" + after + b"(" + (b"j" + before) * 10 + b"e")
    return code.getvalue()


@pytest.mark.parametrize("arguments", [["--evaluate"], []])
def test_the_script_refuses_in_one_line(arguments, tmp_path, capsys):
    mark, path = tmp_path / "ran", tmp_path / "file.pth.tar"
    hostile_file(path, payloads(str(mark))["os.system"], "in the Namespace")
    assert task.main(["--resume", str(path), "--output_dir", str(tmp_path / "run"), *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "refused, it holds more than tensors and plain values" in line
    assert not mark.exists()
