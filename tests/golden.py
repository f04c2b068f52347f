"""Numbers of the published program (tests/golden/README.md), and one forward and backward pass to hold against them."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import models
from models import POPULATIONS

FOLDER = Path(__file__).parent / "golden"
PUBLISHED = FOLDER / "published_format_checkpoint.pth.tar"  # as the published program writes them
FLOAT64 = ("small_defaults", "one_pair", "other_constants", "perfect_reset", "readout_delay_5", "full_size_float64")


class Golden(NamedTuple):
    params: dict
    dtype: torch.dtype
    state: dict
    inputs: dict
    out: dict
    grad_cross_entropy: dict
    grad_total: dict


def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "params"}
        params = json.loads(str(file["params"]))

    def group(prefix):
        return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}

    groups = (group(prefix) for prefix in ("state/", "in/", "out/", "grad_cross_entropy/", "grad_total/"))
    return Golden(params, getattr(torch, params["dtype"]), *groups)


def run(golden: Golden, backend: str, device: str = "cpu"):
    """The same pass by this program: the output, both losses, and the gradients of the two objectives."""
    model = models.build_model(golden.params, backend).to(device, golden.dtype)
    model.load_state_dict({k: v for k, v in golden.state.items() if k != "encoding_layer.encoding"})
    inputs = {name: value.to(device) for name, value in golden.inputs.items()}
    output = model(inputs["features"], inputs["labels"], inputs["query"], record=True)
    loss = cross_entropy(output.logits, inputs["answer"])
    mean_rates = {name: rate.mean(0) for name, rate in output.rates.items()}
    regularization = models.rate_regularization(mean_rates, golden.params["target_rate"])
    names, weights = zip(*model.named_parameters(), strict=True)

    def gradients(objective):
        return dict(zip(names, torch.autograd.grad(objective, weights, retain_graph=True), strict=True))

    return output, loss, regularization, gradients(loss), gradients(loss + golden.params["l2"] * regularization)


def check(golden: Golden, backend: str, device: str = "cpu", relative: float = 1e-9) -> None:
    """Float64: identical spikes, everything else to `relative` of the largest magnitude of its array."""
    output, loss, regularization, grad_cross_entropy, grad_total = run(golden, backend, device)
    for name in POPULATIONS:
        assert torch.equal(output.activity[name].cpu(), golden.out[name].to(golden.dtype)), f"spikes of {name} differ"

    def close(name, ours, theirs):
        error = (ours.detach().cpu() - theirs).abs().max()
        assert error <= relative * theirs.abs().max(), f"{name} differs by {error:.3g} of {theirs.abs().max():.3g}"

    close("logits", output.logits, golden.out["logits"])
    close("memory", output.activity["memory"], golden.out["memory"])
    close("cross entropy", loss, golden.out["cross_entropy"])
    close("rate regularization", regularization, golden.out["rate_regularization"])
    for name in grad_total:
        close(f"gradient of {name}", grad_cross_entropy[name], golden.grad_cross_entropy[name])
        close(f"total gradient of {name}", grad_total[name], golden.grad_total[name])
