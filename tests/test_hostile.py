"""Files whose pickle tries to run code: none runs anything, and each is refused in one line."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from golden import PUBLISHED

import memorizing_associations_task as task
from utils import checkpoints
from utils.errors import UserError

MARKER = "PAYLOAD-GOES-HERE"


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_files(folder: Path) -> dict[str, Path]:
    """Published checkpoints with a payload each, which would leave a folder `ran`."""
    mark = str(folder / "ran")
    # A forger's opcodes: BUILD sets an attribute of the one class that may be unpickled, argparse.Namespace, by a call.
    opcodes = b"cargparse\nNamespace\n)\x81(dV__class__\ncos\nmkdir\n(V" + mark.encode() + b"\ntRsb"
    paths, checkpoint = {}, torch.load(PUBLISHED, weights_only=False)
    for name, payload in {"call": Call(os.mkdir, mark), "opcodes": MARKER}.items():
        checkpoint["params"].thr = payload
        paths[name] = folder / f"{name}.pth.tar"
        torch.save(checkpoint, paths[name])
    with zipfile.ZipFile(paths["opcodes"]) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    text = b"X" + len(MARKER).to_bytes(4, "little") + MARKER.encode()
    with zipfile.ZipFile(paths["opcodes"], "w") as archive:
        for record, content in records.items():
            archive.writestr(record, content.replace(text, opcodes))
    return paths


@pytest.mark.parametrize("name", ["call", "opcodes"])
def test_no_payload_runs(name, tmp_path, capsys):
    path, mark = hostile_files(tmp_path)[name], tmp_path / "ran"
    assert task.main(["--resume", str(path), "--evaluate"]) == 1
    assert capsys.readouterr().err == f"error: {path}: refused, it holds more than tensors and plain values\n"
    assert not mark.exists(), "the payload ran"
    torch.load(path, weights_only=False)
    assert mark.exists(), "harmless: a test of it cannot fail"


def test_files_of_old_pytorch_are_not_opened(tmp_path):
    path, payload = tmp_path / "file.pth.tar", {"params": Call(os.mkdir, str(tmp_path / "ran"))}
    torch.save(payload, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
        checkpoints.load(path)
    assert not (tmp_path / "ran").exists()
