"""Files that mean harm: none runs anything, takes memory or time, or writes more to the terminal than one printable line."""

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

import memorizing_associations_task as task
from utils import checkpoints

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


# Sizes


@contextlib.contextmanager
def little_room(more: int = 2**29, seconds: float = 2.0):
    """This process may take no more memory than it has and `more` bytes, and no more than `seconds` of its processor."""
    limits, start = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - start < seconds


def nest(first="lol", levels: int = 40) -> list:
    """Small in a file, where its parts are shared; written out it has 9 to the power of `levels` of them."""
    for _ in range(levels):
        first = [first] * 9
    return first


def huge(*shape: int) -> torch.Tensor:
    """One number in the file."""
    return torch.zeros(1).expand(shape)


HUGE = {"memory_size": 10**6}
HUGE_WEIGHTS = {
    "writing_layer.W": huge(2 * 10**6, 32),
    "reading_layer.W": huge(10**6, 16 + 10**6),
    "output_layer.weight": huge(3, 10**6),
}
OTHERS = "holds other elements than the file"
NOT_PLAIN = "must be a number of 64 bits, a word, or a list of them"
HARMFUL = {  # what is changed in the file, and what is said
    "sizes without weights": ({"params": HUGE}, "does not fit the network"),
    "no size": ({"params": {"memory_size": 10**12}}, "memory_size must be at most"),
    "weights of one number": ({"params": HUGE, "state_dict": HUGE_WEIGHTS}, f"state_dict: writing_layer.W {OTHERS}"),
    "a weight of one number": ({"state_dict": {"writing_layer.W": huge(40, 32)}}, f"state_dict: writing_layer.W {OTHERS}"),
    "weights without numbers": ({"state_dict": {"writing_layer.W": torch.empty(40, 32, device="meta")}}, OTHERS),
    "complex weights": ({"state_dict": {"writing_layer.W": torch.zeros(40, 32) * 1j}}, OTHERS),
    "another weight": ({"state_dict": {"more": torch.zeros(1)}}, "does not fit the network (Unexpected key"),
    "ones of one number": ({"state_dict": {"encoding_layer.encoding": huge(10**5, 10**5)}}, f"encoding {OTHERS}"),
    "gigabytes by a call": ({"more": Call(bytearray, 8 * 10**9)}, "refused, it holds more than tensors and plain values"),
    "a nest of options": ({"params": {"epochs": nest()}}, f"params: epochs: {NOT_PLAIN}"),
    "a nest of model options": ({"params": {"thr": nest()}}, f"params: thr: {NOT_PLAIN}"),
    "a nest in the history": ({"history": [{"train_loss": nest()}]}, "history: train_loss: holds"),
    "a nest of sums": ({"running": {"loss": nest()}}, "running: loss: holds"),
    "a nest of parts": ({"parts": nest()}, "parts: must be a word"),
    "a nest as history": ({"history": nest()}, "not a checkpoint"),
    "a nest as accuracy": ({"best_acc": nest()}, "not a checkpoint"),
    "a nest as epoch": ({"epoch": nest()}, "epoch: must be a whole number"),
    "a terminal's commands": ({"state_dict": {"\x1b[31m\n": torch.zeros(1)}}, r'(Unexpected key(s) in state_dict: "\x1b[31m'),
    "a long name": ({"state_dict": {"x" * 10**6: torch.zeros(1)}}, "does not fit the network (Unexpected key"),
    "commands in a text": ({"parts": "\x1b[31m"}, r"has \x1b[31m, not the published neuron and rule"),
}  # fmt: skip


def harmed(content: dict, changes: dict) -> dict:
    for name, change in changes.items():
        part = vars(content[name]) if name == "params" else content.get(name)
        if isinstance(change, dict) and name in ("params", "state_dict"):
            part.update(change)
        else:
            content[name] = change
    return content


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_file_is_refused_at_once_and_without_memory(name, tmp_path, capsys):
    path, (changes, message) = tmp_path / "file.pth.tar", HARMFUL[name]
    torch.save(harmed(torch.load(PUBLISHED, weights_only=False), changes), path)
    with little_room():
        line = refuse(capsys, "--resume", path, "--evaluate", "--device", "cpu")
    assert line.startswith(f"error: {path}: ") and message in line
    assert line.isprintable() and len(line) < 1000


@pytest.mark.parametrize(
    ("name", "value"), [("seed", "\x1b[31m"), ("device", "cpu\x1b[31m\n"), ("backend", "x" * 10**5)], ids=range(3)
)
def test_the_options_of_a_file_reach_the_terminal_printable_and_short(name, value, tmp_path, capsys):
    path = tmp_path / "file.pth.tar"
    torch.save(harmed(torch.load(PUBLISHED, weights_only=False), {"params": {name: value}}), path)
    line = refuse(capsys, "--resume", path, "--evaluate", "--device", "cpu")
    assert line.startswith(f"error: {path}: params: --{name}: ")
    assert line.isprintable() and len(line) < 1000


@pytest.mark.parametrize("part", ["step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [nest(), huge(10**6, 10**6), torch.full((10, 10), -1.0), -1.0, "\x1b[31m"], ids=range(5))
def test_what_is_no_state_of_adam_is_left_out_without_memory(part, value, tmp_path):
    content = torch.load(PUBLISHED, weights_only=False)
    content["optimizer"]["state"][0][part] = value
    torch.save(content, tmp_path / "file.pth.tar")
    with little_room():
        assert checkpoints.load(tmp_path / "file.pth.tar")["optimizer"] is None


def test_means_of_one_number_are_spread_out_before_adam_writes_into_them(tmp_path):
    content = torch.load(PUBLISHED, weights_only=False)
    state = content["optimizer"]["state"][0]
    state["exp_avg"] = huge(*state["exp_avg"].shape)
    torch.save(content, tmp_path / "file.pth.tar")
    checkpoints.load(tmp_path / "file.pth.tar")["optimizer"]["state"][0]["exp_avg"].add_(1)
