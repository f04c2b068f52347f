"""Analyse what trained networks recall: by position of the asked pair, by noise on the query, and which labels errors name.

python -m experiments.analyze pretrained/*.pth.tar --output_dir experiments/results/analysis

All tables but the last use the original test set (2,000 samples) at the training length. Writes memory.png and these tables:

position    accuracy by position of the asked pair
errors      the labels that wrong answers name
noise       accuracy with Gaussian noise on every component of the query, not clipped. `nearest`: the share of samples in which
            the asked vector is still the nearest to the query, which is an exact memory's accuracy
pause       accuracy without and with one pair's time without input between the last pair and the query
depression  accuracy with other values of gamma_neg at the test and unchanged weights
fresh       accuracy on 20,000 samples that no network has seen, as trained and without depression
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import data
import models
from utils import checkpoints
from utils.errors import in_one_line
from utils.figures import save
from utils.figures.style import DASHED, DOTTED, GREY, SERIES, TWO_COLUMNS, new_figure, styled
from utils.metrics import to_csv

DEPRESSION = (0.3, 0.2, 0.1, 0.02, 0.0)
BATCH = 125  # as in the task script: rounding depends on the batch size
FRESH, UNUSED_EPOCH = 20_000, 1_000_000  # training samples of an epoch that no run reaches
NOISE = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)  # standard deviations


@in_one_line
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("networks", type=Path, nargs="+", metavar="CHECKPOINT", help="trained networks")
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="folder of tables and figure")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    names = ("position", "noise", "errors", "pause", "depression", "fresh")
    tables: dict[str, list[dict]] = {name: [] for name in names}
    for name, path in named(args.networks).items():
        for table, row in analyse(path):
            tables[table].append({"network": name} | row)
    for name, rows in tables.items():
        (args.output_dir / f"{name}.csv").write_text(to_csv(rows), encoding="utf-8")
    save(draw(tables), args.output_dir / "memory.png")
    print(to_csv(tables["errors"]), end="")
    return 0


def named(paths: list[Path]) -> dict[str, Path]:
    """Paths by file name, or by path from the common folder if two files have the same name."""
    paths = list(dict.fromkeys(path.absolute() for path in paths))
    several = len({path.name for path in paths}) < len(paths)
    base = Path(os.path.commonpath(paths)) if several else None
    return {(path.relative_to(base).as_posix() if several else path.name).removesuffix(".pth.tar"): path for path in paths}


def in_words(network: str) -> str:
    """Pairs and training of a network in pretrained/; of another one, its name."""
    group, _, length = network.rpartition("-")[0].partition("-sequence_length")
    words = {"published": ", published options", "recipe": "", "recipe_tuned": ", rule tuned", "ood_recipe": " of 30 classes"}
    words["recipe_from_one_pair"] = ", from one pair"
    return f"{length or 10}{words[group]}" if group in words else network


@torch.no_grad()
def analyse(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of the tables for one network. Accuracies and shares in percent."""
    checkpoint = checkpoints.load(path)
    params = checkpoint["params"]

    def network(**constants) -> torch.nn.Module:
        model = models.build_model(params | constants)
        model.load_state_dict(checkpoint["state_dict"])
        return model

    sizes = {name: params[name] for name in ("sequence_length", "num_classes", "feature_size", "dataset_seed")}
    model, test = network(), data.evaluation_set("test", **sizes)
    distances = torch.cdist(test.query[:, None], test.features)[:, 0]  # N x L
    asked = distances.argmin(1)
    rank = distances.argsort(1).argsort(1)  # 0: the asked vector itself, 1: the one nearest to it
    answers = answer(model, test, test.query)

    correct = answers == test.answer
    for position in range(test.labels.shape[1]):
        here = asked == position
        yield "position", {"position": position + 1, "samples": int(here.sum()), "accuracy": percent(correct[here])}

    # The pair that a wrong answer names, if its label was shown.
    wrong = ~correct
    shown = test.labels[wrong] == answers[wrong, None]  # errors x L
    known = shown.any(1)
    taken = shown[known].long().argmax(1)
    later = (taken - asked[wrong][known]).double()
    nearness = rank[wrong][known].gather(1, taken[:, None])[:, 0]
    yield (
        "errors",
        {
            "sequence_length": test.labels.shape[1],
            "accuracy": percent(correct),
            "errors": int(wrong.sum()),
            "label_not_shown": percent(~known),
            "of_nearest_vector": percent(nearness == 1),
            "of_nearest_three": percent(nearness <= 3),
            "of_later_pair": percent(later > 0),
            "mean_positions_later": later.mean().item() if len(later) else float("nan"),
        },
    )

    last = asked == test.labels.shape[1] - 1
    for pause in (False, True):
        right = (answer(model, test, test.query, pause) if pause else answers) == test.answer
        yield "pause", {"pause": pause, "last_pair": percent(right[last]), "other_pairs": percent(right[~last])}

    early = asked < test.labels.shape[1] // 2
    for gamma_neg in DEPRESSION:
        right = answer(network(gamma_neg=gamma_neg), test, test.query) == test.answer
        halves = {"first_half": percent(right[early]), "second_half": percent(right[~early])}
        yield "depression", {"gamma_neg": gamma_neg, "accuracy": percent(right)} | halves

    fresh = data.training_samples(0, FRESH, UNUSED_EPOCH, **sizes)
    for gamma_neg in (params["gamma_neg"], 0.0):
        right = answer(network(gamma_neg=gamma_neg), fresh, fresh.query) == fresh.answer
        yield "fresh", {"gamma_neg": gamma_neg, "samples": FRESH, "accuracy": percent(right)}

    generator = torch.Generator().manual_seed(0)
    for deviation in NOISE:
        query = test.query + deviation * torch.randn(test.query.shape, generator=generator)
        nearest = torch.cdist(query[:, None], test.features)[:, 0].argmin(1) == asked
        accuracy = percent(answer(model, test, query) == test.answer)
        yield "noise", {"deviation": deviation, "accuracy": accuracy, "nearest": percent(nearest)}


def answer(model, test: data.Samples, query: Tensor, pause: bool = False) -> Tensor:
    """The answers of a network, N labels. `pause` adds one pair's time without input before the query."""
    answers = []
    for first in range(0, len(query), BATCH):
        part = slice(first, first + BATCH)
        if pause:
            features, labels, asked = model.currents(test.features[part], test.labels[part], query[part])
            features, labels = (torch.cat([current, torch.zeros_like(current[:, :1])], 1) for current in (features, labels))
            readout, *_ = model.store_and_recall(features, labels, asked)
            answers.append(model.output_layer(readout).argmax(1))
        else:
            answers.append(model(test.features[part], test.labels[part], query[part]).logits.argmax(1))
    return torch.cat(answers)


def percent(hits: Tensor) -> float:
    return round(100 * hits.double().mean().item(), 2) if len(hits) else float("nan")


@styled
def draw(tables: dict[str, list[dict]]) -> Figure:
    """Accuracy by position and by noise, and the labels that errors name."""
    figure = new_figure(TWO_COLUMNS, 62)
    position, noise, errors = figure.subplots(1, 3)
    networks = sorted(tables["errors"], key=lambda row: row["sequence_length"])
    names, longest = [row["network"] for row in networks], networks[-1]["sequence_length"]
    colours = dict(zip(names, SERIES * len(names), strict=False))
    repeated = names[len(SERIES) :]  # dashed and hatched, since another has the colour
    for name in names:
        look = {"marker": ".", "ms": 2, "ls": DASHED if name in repeated else "-", "color": colours[name]}
        *others, last = [row for row in tables["position"] if row["network"] == name and row["samples"]]
        parts = [*(part for part in np.array_split(others, 10) if len(part)), [last]]  # neighbours together, the last alone
        table = [[(row["position"], row["accuracy"], row["samples"]) for row in part] for part in parts]
        points = [np.average(part, axis=0, weights=[samples for *_, samples in part]) for part in table]
        position.plot(*np.transpose(points)[:2], **look)
        exact = [row for row in tables["noise"] if row["network"] == name]
        deviations = [row["deviation"] for row in exact]
        noise.plot(deviations, [row["accuracy"] for row in exact], label=in_words(name), **look)
    noise.plot(deviations, [row["nearest"] for row in exact], ls=DOTTED, color=GREY, label=f"exact memory, {longest} pairs")
    kinds = {"of_nearest_vector": "of the\nnearest vector", "of_later_pair": "of a\nlater pair", "label_not_shown": "not shown"}
    of_several = [row for row in networks if row["sequence_length"] > 2]  # of two pairs, only one is left to name
    width = 0.8 / max(1, len(of_several))
    for number, row in enumerate(of_several):
        places = np.arange(len(kinds)) + (number - (len(of_several) - 1) / 2) * width
        hatch = "///" if row["network"] in repeated else None
        errors.bar(places, [row[k] for k in kinds], width, color=colours[row["network"]], hatch=hatch, ec="white", lw=0)
    errors.set_xticks(range(len(kinds)), kinds.values())
    position.set(title="Position of the asked pair", xlabel="Position", ylabel="Accuracy (%)", ylim=(None, 101))
    noise.set(title="Noise on the query", xlabel="Standard deviation", ylabel="Accuracy (%)", ylim=(0, 103))
    errors.set(title="Wrong answers: the label", ylabel="Share of errors (%)", ylim=(0, 103))
    figure.legend(*noise.get_legend_handles_labels(), loc="outside lower center", ncols=4, title="Pairs")
    return figure


if __name__ == "__main__":
    sys.exit(main())
