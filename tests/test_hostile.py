"""Malicious files run no code, take little memory and time, and cause one printable line."""

import contextlib
import os
import resource
import time
import zipfile
from pathlib import Path

import pytest
import torch
from golden import PUBLISHED
from helpers import refuse

from utils import checkpoints

MARKER = "PAYLOAD-GOES-HERE"


def published() -> dict:
    return torch.load(PUBLISHED, weights_only=False)


class Call:
    """An object that is pickled as a function call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["call", "opcodes"])
def test_no_payload_runs(kind, tmp_path, capsys):
    path, mark = tmp_path / "file.pth.tar", tmp_path / "ran"
    checkpoint = published()
    checkpoint["params"].thr = Call(os.mkdir, str(mark)) if kind == "call" else MARKER
    torch.save(checkpoint, path)
    if kind == "opcodes":  # BUILD sets an attribute of argparse.Namespace, the only class allowed, by a call
        opcodes = b"cargparse\nNamespace\n)\x81(dV__class__\ncos\nmkdir\n(V" + str(mark).encode() + b"\ntRsb"
        text = b"X" + len(MARKER).to_bytes(4, "little") + MARKER.encode()
        with zipfile.ZipFile(path) as archive:
            records = {entry.filename: archive.read(entry).replace(text, opcodes) for entry in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                archive.writestr(name, content)
    line = refuse(capsys, "--resume", path, "--evaluate")
    assert line == f"error: {path}: refused, it holds more than tensors and plain values"
    assert not mark.exists(), "the payload ran"
    torch.load(path, weights_only=False)
    assert mark.exists(), "the payload is harmless, so this test cannot fail"


# Sizes


@contextlib.contextmanager
def little_room(more: int = 2**29, seconds: float = 2.0):
    """Allow this process `more` bytes of additional memory and `seconds` of processor time."""
    limits, start = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - start < seconds


def nest(first="lol", levels: int = 40) -> list:
    """A list that is small in a file, where its parts are shared, but has 9 ** `levels` elements in full."""
    for _ in range(levels):
        first = [first] * 9
    return first


def huge(*shape: int) -> torch.Tensor:
    """A tensor that is stored as one number."""
    return torch.zeros(1).expand(shape)


HUGE_WEIGHTS = {
    "writing_layer.W": huge(2 * 10**6, 32),
    "reading_layer.W": huge(10**6, 16 + 10**6),
    "output_layer.weight": huge(3, 10**6),
}
OTHERS = "must hold floats, all of them in the file"
HARMFUL = [  # changes to the file, and the error message
    ({"params": {"memory_size": 10**6}}, "does not fit the network"),
    ({"params": {"memory_size": 10**12}}, "memory_size must be at most"),
    ({"params": {"memory_size": 10**6}, "state_dict": HUGE_WEIGHTS}, f"state_dict: writing_layer.W {OTHERS}"),
    ({"state_dict": {"writing_layer.W": huge(40, 32)}}, f"state_dict: writing_layer.W {OTHERS}"),
    ({"state_dict": {"writing_layer.W": torch.empty(40, 32, device="meta")}}, OTHERS),
    ({"state_dict": {"encoding_layer.encoding": huge(10**5, 10**5)}}, f"encoding {OTHERS}"),
    ({"more": Call(bytearray, 8 * 10**9)}, "refused, it holds more than tensors and plain values"),
    ({"params": {"thr": nest()}}, "params: thr: must be a 64-bit number, a word, or a list of them"),
    ({"history": [{"train_loss": nest()}]}, "history: train_loss: holds"),
    ({"running": {"loss": nest()}}, "running: loss: holds"),
    ({"parts": nest()}, "parts: must be a word"),
    ({"history": nest()}, "not a checkpoint"),
    ({"epoch": nest()}, "epoch: must be a whole number"),
    ({"state_dict": {"\x1b[31m\n": torch.zeros(1)}}, r'(Unexpected key(s) in state_dict: "\x1b[31m'),
    ({"state_dict": {"x" * 10**6: torch.zeros(1)}}, "does not fit the network (Unexpected key"),
    ({"parts": "\x1b[31m"}, r"has \x1b[31m, not the paper's neuron and rule"),
    ({"params": {"device": "cpu\x1b[31m\n"}}, "params: --device: "),
    ({"params": {"backend": "x" * 10**5}}, "params: --backend: "),
]


@pytest.mark.parametrize(("changes", "message"), HARMFUL, ids=range(len(HARMFUL)))
def test_a_malicious_file_is_refused_fast_and_with_little_memory(changes, message, tmp_path, capsys):
    path, content = tmp_path / "file.pth.tar", published()
    for name, change in changes.items():
        part = {"params": vars(content["params"]), "state_dict": content["state_dict"]}.get(name)
        if part is None:
            content[name] = change
        else:
            part.update(change)
    torch.save(content, path)
    with little_room():
        line = refuse(capsys, "--resume", path, "--evaluate", "--device", "cpu")
    assert line.startswith(f"error: {path}: ") and message in line
    assert line.isprintable() and len(line) < 1000


@pytest.mark.parametrize("part", ["step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [nest(), huge(10**6, 10**6), -1.0, "\x1b[31m"], ids=range(4))
def test_an_invalid_adam_state_is_ignored_with_little_memory(part, value, tmp_path):
    content = published()
    content["optimizer"]["state"][0][part] = value
    torch.save(content, tmp_path / "file.pth.tar")
    with little_room():
        assert checkpoints.load(tmp_path / "file.pth.tar")["optimizer"] is None


def test_expanded_adam_moments_are_copied_so_that_adam_can_write_to_them(tmp_path):
    content = published()
    state = content["optimizer"]["state"][0]
    state["exp_avg"] = huge(*state["exp_avg"].shape)
    torch.save(content, tmp_path / "file.pth.tar")
    checkpoints.load(tmp_path / "file.pth.tar")["optimizer"]["state"][0]["exp_avg"].add_(1)
