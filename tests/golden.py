"""Numbers of the original implementation (tests/golden/README.md), and a forward and backward pass to compare with them."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import models
from models import POPULATIONS

FOLDER = Path(__file__).parent / "golden"
PUBLISHED = FOLDER / "published_format_checkpoint.pth.tar"  # written by the original implementation
FLOAT64 = ("small_defaults", "one_pair", "other_constants", "perfect_reset", "readout_delay_5", "full_size_float64")


class Golden(NamedTuple):
    params: dict
    dtype: torch.dtype
    state: dict
    inputs: dict
    out: dict  # spikes of every population, logits, memory and losses
    grad_cross_entropy: dict
    grad_total: dict


def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "params"}
        params = json.loads(str(file["params"]))

    def group(prefix):
        return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}

    groups = [group(prefix) for prefix in ("state/", "in/", "out/", "grad_cross_entropy/", "grad_total/")]
    groups[0].pop("encoding_layer.encoding", None)  # ones, which are not learned
    return Golden(params, getattr(torch, params["dtype"]), *groups)


def numbers(golden: Golden) -> dict:
    """The values of the original implementation for what `run` computes."""
    objectives = {"cross_entropy": golden.grad_cross_entropy, "total": golden.grad_total}
    return golden.out | {f"gradient of {o} by {name}": g for o, found in objectives.items() for name, g in found.items()}


def run(golden: Golden, backend: str, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[models.Output, dict]:
    """Run the same pass in this program, in the precision of the file or another. Returns the output and its numbers."""
    dtype = dtype or golden.dtype
    model = models.build_model(golden.params, backend).to(device, dtype)
    model.load_state_dict(golden.state)
    features, labels, query, answer = (golden.inputs[name].to(device) for name in ("features", "labels", "query", "answer"))
    output = model(features.to(dtype), labels, query.to(dtype), record=True)
    loss = cross_entropy(output.logits, answer)
    regularization = models.rate_regularization({n: x.mean(0) for n, x in output.rates.items()}, golden.params["target_rate"])
    ours = {"logits": output.logits, "memory": output.activity["memory"]}
    ours |= {"cross_entropy": loss, "rate_regularization": regularization}
    objectives = {"cross_entropy": loss, "total": loss + golden.params["l2"] * regularization}
    names, weights = zip(*model.named_parameters(), strict=True)
    for objective, value in objectives.items():
        gradients = torch.autograd.grad(value, weights, retain_graph=True)
        ours |= {f"gradient of {objective} by {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return output, ours


def check(golden: Golden, backend: str, device: str = "cpu") -> None:
    """Check in float64: spikes are identical, every other array agrees to 1e-9 of its largest magnitude."""
    output, ours = run(golden, backend, device)
    for name in POPULATIONS:
        assert torch.equal(output.activity[name].cpu(), golden.out[name].to(golden.dtype)), f"spikes of {name} differ"
    theirs = numbers(golden)
    for name in ours:
        error = (ours[name].detach().cpu() - theirs[name]).abs().max()
        assert error <= 1e-9 * theirs[name].abs().max(), f"{name} differs by {error:.3g}"
