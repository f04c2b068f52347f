"""Train other networks on the same task, test them at several lengths, and compare all in a table and a figure.

python -m experiments.compare --output_dir experiments/comparison
python -m experiments.compare --output_dir runs/comparison --networks lstm delta_rule --seeds 1 2

Each network is trained with seed 1 at three learning rates, with and without a curriculum. With the setting that is best in
validation it is trained with every seed, and tested. Runs in OUTPUT_DIR are not repeated; if none is missing, only table and
figure are written again. The committed runs used one thread (OMP_NUM_THREADS=1); another processor rounds differently.

runs.yaml, metrics.csv, tests.csv   the runs, as in utils/results.py; those of the search are not tested
comparison.*                        table (csv, md) and figure (png), including the spiking networks in the --spiking folder

Shapes: B batch, L pairs in a sequence, C classes, F features, E embedding size, M memory size.
"""

import argparse
import copy
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad, relu, silu

import data
from experiments.summarize import accuracy_at, mean_and_deviation
from models.hebbian_memory import XAVIER_GAIN
from models.memorizing_associations import EmbeddingLayer
from models.plasticity import HebbianRule
from utils.errors import UserError, in_one_line
from utils.figures import save
from utils.figures.curves import LINE_STYLES, draw_repetitions
from utils.figures.style import BLACK, SERIES, TWO_COLUMNS, heading, new_figure, styled
from utils.metrics import to_csv
from utils.results import GROUP, Result, columns, read_results, write_groups
from utils.run import commit

# All are trained with 10 pairs of 30 classes and the budget of the recipes, and have about as many parameters as the spiking
# network. The learning rate decays each epoch.
SIZES = {"num_classes": 30, "feature_size": 10, "dataset_seed": 42}
COMMON = {"sequence_length": 10, "epochs": 40, "batch_size": 64, "learning_rate_decay": 0.94, "curriculum_step": 4} | SIZES
LEARNING_RATES, CURRICULUM_STARTS = (0.001, 0.003, 0.01), (0, 2)  # pairs in the first epoch; 0: always all
MAX_GRAD_NORM, EVALUATION_BATCH = 40.0, 125
TESTED, SHOWN = (2, 3, 4, 5, 7, 10, 15, 20, 25, 30), (2, 5, 10, 20, 30)  # lengths tested, and those in the table


@in_one_line
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="folder of runs, table and figure")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(1, 6), help="seeds of initial weights (default: 1 to 5)")
    parser.add_argument("--spiking", type=Path, default=Path("experiments/results"), help="folder of kept spiking runs")
    args = parser.parse_args(argv)
    if not all(0 <= seed < 2**31 for seed in args.seeds):
        parser.error("argument --seeds: must be 0 to 2147483647")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in args.networks:
        setting = best_setting(args.output_dir, name)
        for seed in args.seeds:
            complete(args.output_dir, {"network": name, "seed": seed} | setting, TESTED)
    groups = read_groups(args.output_dir, args.spiking)
    rows = table(groups)
    (args.output_dir / "comparison.csv").write_text(to_csv(rows), encoding="utf-8")
    (args.output_dir / "comparison.md").write_text(to_markdown(rows), encoding="utf-8")
    save(draw(groups), args.output_dir / "comparison.png")
    print(to_markdown(rows), end="")
    return 0


# The networks. Each has `forward(features, labels, query) -> logits`: B x L x F, B x L (int64), B x F -> B x C.


class LinearAttention(nn.Module):
    """The memory is a plain sum of outer products of values and keys. Source: Katharopoulos et al., Transformers are RNNs, ICML
    2020; here the feature map is that of the embedding, and nothing is normalized."""

    def __init__(self, num_classes: int = 30, feature_size: int = 10, embedding_size: int = 128, memory_size: int = 128):
        super().__init__()
        self.input_layer = nn.Linear(feature_size, embedding_size)
        self.embedding_layer = nn.Embedding(num_classes, embedding_size)
        self.key = nn.Linear(embedding_size, memory_size, bias=False)
        self.value = nn.Linear(embedding_size, memory_size, bias=False)
        self.query = nn.Linear(embedding_size, memory_size, bias=False)
        self.output_layer = nn.Linear(memory_size, num_classes)

    def forward(self, features: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        vectors, asked = silu(self.input_layer(features)), silu(self.input_layer(query))
        memory = self.store(vectors, self.value(self.embedding_layer(labels)))
        return self.output_layer((memory @ self.read_key(asked).unsqueeze(-1)).squeeze(-1))

    def store(self, vectors: Tensor, values: Tensor) -> Tensor:
        """The memory, B x M x M, after all pairs, of embedded vectors B x L x E and values B x L x M."""
        return values.mT @ self.key(vectors)

    def read_key(self, query: Tensor) -> Tensor:
        return self.query(query)


class DeltaRule(LinearAttention):
    """Each pair replaces what the memory holds for its key: W + beta (v - W k) k^T, keys of length 1 and beta in 0..1.
    Source: Schlag, Irie, Schmidhuber, Linear Transformers Are Secretly Fast Weight Programmers, ICML 2021."""

    def __init__(self, num_classes: int = 30, feature_size: int = 10, embedding_size: int = 128, memory_size: int = 128):
        super().__init__(num_classes, feature_size, embedding_size, memory_size)
        self.write_strength = nn.Linear(embedding_size, 1)

    def store(self, vectors: Tensor, values: Tensor) -> Tensor:
        keys, strengths = normalize(self.key(vectors), dim=-1), torch.sigmoid(self.write_strength(vectors))
        # All pairs at once: what pair n writes, u_n = beta_n (v_n - sum of u_m (k_m k_n) over the pairs m before it), is the
        # solution of a triangular system with ones on its diagonal.
        overlap = strengths * (keys @ keys.mT)
        written = torch.linalg.solve_triangular(overlap, strengths * values, upper=False, unitriangular=True)
        return written.mT @ keys

    def read_key(self, query: Tensor) -> Tensor:
        return normalize(self.query(query), dim=-1)


class Tokens(nn.Module):
    """Base of the sequence networks: each pair, and the query, is a token, the sum of embedded vector and label."""

    def __init__(self, num_classes: int, feature_size: int, embedding_size: int):
        super().__init__()
        self.input_layer = nn.Linear(feature_size, embedding_size)
        self.embedding_layer = nn.Embedding(num_classes + 1, embedding_size)  # the last one marks the query

    def tokens(self, features: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """B x (L + 1) x E, the query last."""
        pairs = self.input_layer(features) + self.embedding_layer(labels)
        unknown = labels.new_full((len(labels),), self.embedding_layer.num_embeddings - 1)
        asked = self.input_layer(query) + self.embedding_layer(unknown)
        return torch.cat([pairs, asked.unsqueeze(1)], 1)


class Transformer(Tokens):
    """An encoder of two layers of four heads, normalized before each part; the answer is read from the query's token.
    `positions` adds sines and cosines to the pairs. Source: Vaswani et al., Attention Is All You Need, 2017."""

    def __init__(self, positions: bool = False, num_classes: int = 30, feature_size: int = 10, embedding_size: int = 56):
        super().__init__(num_classes, feature_size, embedding_size)
        self.positions = positions
        layer = nn.TransformerEncoderLayer(
            embedding_size, nhead=4, dim_feedforward=2 * embedding_size, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(embedding_size), enable_nested_tensor=False)
        self.output_layer = nn.Linear(embedding_size, num_classes)

    def forward(self, features: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        tokens = self.tokens(features, labels, query)
        if self.positions:  # wavelengths from 2 pi to 20,000 pi; the query has none
            half = tokens.shape[2] // 2
            angles = torch.arange(labels.shape[1]).unsqueeze(1) * torch.exp(-math.log(10_000) * torch.arange(half) / half)
            tokens = tokens + pad(torch.cat([angles.sin(), angles.cos()], 1), (0, 0, 0, 1))
        return self.output_layer(self.encoder(tokens)[:, -1])


class LSTM(Tokens):
    """One layer of cells sees the pairs one after the other, then the query; the answer is read from its last hidden state.
    Source: Hochreiter, Schmidhuber, Long Short-Term Memory, 1997."""

    def __init__(self, num_classes: int = 30, feature_size: int = 10, embedding_size: int = 32, memory_size: int = 96):
        super().__init__(num_classes, feature_size, embedding_size)
        self.cells = nn.LSTM(embedding_size, memory_size, batch_first=True)
        self.output_layer = nn.Linear(memory_size, num_classes)

    def forward(self, features: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        hidden, _ = self.cells(self.tokens(features, labels, query))
        return self.output_layer(hidden[:, -1])


RULE = HebbianRule(w_max=1.0, gamma_pos=0.1, gamma_neg=0.1)  # its time constant is not used here


class HMem(nn.Module):
    """Rectified keys and values, one Hebbian update per pair. Source: the newest variant without spikes in the original
    implementation of arXiv:2205.11276, with its constants and parameter names; its memory size was 100."""

    def __init__(self, num_classes: int = 30, memory_size: int = 120, rule: HebbianRule = RULE):
        super().__init__()
        feature_size, embedding_size, self.rule = 10, 80, rule
        self.input_layer = nn.Linear(feature_size, embedding_size, bias=False)
        nn.init.xavier_uniform_(self.input_layer.weight, gain=XAVIER_GAIN)
        self.embedding_layer = EmbeddingLayer(num_classes, embedding_size)
        writing, reading = torch.empty(2 * memory_size, 2 * embedding_size), torch.empty(memory_size, embedding_size)
        self.writing_layer = nn.ParameterDict({"W": nn.init.xavier_uniform_(writing, gain=XAVIER_GAIN)})
        self.reading_layer = nn.ParameterDict({"W": nn.init.xavier_uniform_(reading, gain=XAVIER_GAIN)})
        self.output_layer = nn.Linear(memory_size, num_classes, bias=False)

    def forward(self, features: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        return self.recall(features, labels, query)[0]

    def recall(self, features: Tensor, labels: Tensor, query: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits, and the activity of each population and the memory, B x M x M, after all pairs."""
        vectors, asked = relu(self.input_layer(features)), relu(self.input_layer(query))
        names = relu(self.embedding_layer(labels))
        keys, values = relu(torch.cat([vectors, names], -1) @ self.writing_layer["W"].T).chunk(2, -1)
        memory = keys.new_zeros(len(keys), values.shape[-1], keys.shape[-1])
        for key, value in zip(keys.unbind(1), values.unbind(1), strict=True):
            memory = self.rule.update(memory, value, key)
        read_key = relu(asked @ self.reading_layer["W"].T)
        read_value = (memory @ read_key.unsqueeze(-1)).squeeze(-1)
        activity = {"features_encoded": vectors, "labels_encoded": names, "query_encoded": asked, "write_key": keys}
        activity |= {"write_value": values, "read_key": read_key, "read_value": read_value, "memory": memory}
        return self.output_layer(read_value), activity


NETWORKS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "linear_attention": ("linear attention (a sum of outer products)", LinearAttention),
    "transformer": ("Transformer encoder, no positions", Transformer),
    "transformer_positions": ("Transformer encoder, positions", functools.partial(Transformer, True)),
    "delta_rule": ("delta rule", DeltaRule),
    "h_mem": ("H-Mem (published, without spikes)", HMem),
    "lstm": ("LSTM", LSTM),
}
SPIKING = {  # groups of kept runs of the task script
    "ood_recipe": "spiking, recipe",
    "ood_recipe_tuned": "spiking, recipe, rule tuned",
    "ood_recipe_without_feedback": "spiking, recipe, without the feedbacks",
}
WORDS = {name: words for name, (words, _) in NETWORKS.items()} | SPIKING


# Training


def best_setting(folder: Path, name: str) -> dict[str, Any]:
    """Learning rate and start of the curriculum with the highest validation accuracy (of equal ones, the lowest loss)."""

    def validation(setting: dict[str, Any]) -> tuple[float, float]:
        run = complete(folder, {"network": name, "seed": 1} | setting)
        if not is_finite(run.metrics):
            return 0.0, -math.inf
        return max((line["validation_accuracy"], -line["validation_loss"]) for line in run.metrics)

    settings = itertools.product(LEARNING_RATES, CURRICULUM_STARTS)
    return max(({"learning_rate": rate, "curriculum_start": start} for rate, start in settings), key=validation)


def complete(folder: Path, varied: dict[str, Any], lengths: tuple[int, ...] = ()) -> Result:
    """The run with these options, trained and tested at these lengths if the folder lacks it."""
    name, options = "-".join(f"{option}{value}" for option, value in varied.items()).removeprefix("network"), COMMON | varied
    found = read_runs(folder).get(name)
    if found and found.options != options:
        raise UserError(f"{folder}: {name} had other options; choose another --output_dir")
    if found and (found.tests or not lengths):
        return found
    network, metrics = train(name, options)
    if lengths and not is_finite(metrics):
        raise UserError(f"{name}: the loss is not finite")
    tests = []
    for length in lengths:
        loss, accuracy = evaluate(network, data.evaluation_set("test", length, **SIZES))
        tests.append({"sequence_length": length, "accuracy": accuracy, "loss": loss})
    command = f"{commit()}: python -m experiments.compare --output_dir {folder} --networks {options['network']}"
    runs = read_runs(folder) | {name: Result(name, options, [command], metrics, tests)}  # another process may have added some
    write_groups((runs[name] for name in sorted(runs)), folder)
    return runs[name]


def is_finite(metrics: list[dict[str, Any]]) -> bool:
    return all(math.isfinite(line["train_loss"] + line["validation_loss"]) for line in metrics)


def train(run: str, options: dict[str, Any]) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train a network as the task script trains the spiking one. Returns the network of its best epoch, and the metrics."""
    torch.manual_seed(options["seed"])
    network, samples = NETWORKS[options["network"]][1](), data.TRAINING_SAMPLES
    optimizer = torch.optim.Adam(network.parameters())
    pairs, batch_size = options["sequence_length"], options["batch_size"]
    validation = data.evaluation_set("validation", pairs, **SIZES)
    metrics, best_accuracy, best = [], -1.0, {}
    for epoch in range(options["epochs"]):
        begin, loss_sum, correct = time.perf_counter(), 0.0, 0
        learning_rate = options["learning_rate"] * options["learning_rate_decay"] ** epoch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        length = data.training_length(epoch, pairs, options["curriculum_start"], options["curriculum_step"])
        for start in range(0, samples, batch_size):
            batch = data.training_samples(start, min(start + batch_size, samples), epoch, length, **SIZES)
            logits = network(batch.features, batch.labels, batch.query)
            loss = cross_entropy(logits, batch.answer, reduction="sum")
            optimizer.zero_grad()
            (loss / len(batch)).backward()
            nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            loss_sum += loss.item()
            correct += (logits.argmax(1) == batch.answer).sum().item()
        loss, accuracy = evaluate(network, validation)
        if accuracy > best_accuracy:
            best_accuracy, best = accuracy, copy.deepcopy(network.state_dict())
        line = {"epoch": epoch + 1, "learning_rate": learning_rate}
        line |= {"train_loss": loss_sum / samples, "train_accuracy": 100 * (correct / samples)}
        line |= {"validation_loss": loss, "validation_accuracy": accuracy, "seconds": time.perf_counter() - begin}
        metrics.append(line)
        print(f"{run}, epoch {epoch + 1}/{options['epochs']}: validation loss {loss:.4f}, accuracy {accuracy:.1f} %")
    network.load_state_dict(best)
    return network, metrics


@torch.no_grad()
def evaluate(network: nn.Module, samples: data.Samples) -> tuple[float, float]:
    """Mean cross entropy, and accuracy in percent."""
    loss, correct = 0.0, 0
    for first in range(0, len(samples), EVALUATION_BATCH):
        batch = samples[first : first + EVALUATION_BATCH]
        logits = network(batch.features, batch.labels, batch.query)
        loss += cross_entropy(logits, batch.answer, reduction="sum").item()
        correct += (logits.argmax(1) == batch.answer).sum().item()
    return loss / len(samples), 100 * correct / len(samples)


# Reading


def read_runs(folder: Path) -> dict[str, Result]:
    """The runs of a folder by name. Raises UserError where a file is damaged or lacks a part of a run."""
    runs = {run.name: run for run in read_results(folder)} if (folder / GROUP).exists() else {}
    for name, run in runs.items():
        try:
            tests = {int(row["sequence_length"]): float(row["accuracy"]) + float(row["loss"]) for row in run.tests}
            whole = len(run.metrics) == run.options["epochs"] and tuple(tests) in ((), TESTED)
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise UserError(
                f"{folder}: {name}: epochs or tests are missing or damaged; restore them, or remove it from {GROUP}"
            )
    return runs


def read_groups(folder: Path, spiking: Path) -> dict[str, list[Result]]:
    """The tested runs of each network, including the spiking networks with a folder."""
    runs = [run for run in read_runs(folder).values() if run.tests]
    found = {name: [run for run in runs if run.options["network"] == name] for name in NETWORKS}
    for name, members in found.items():
        if len({(run.options["learning_rate"], run.options["curriculum_start"]) for run in members}) > 1:
            raise UserError(f"{folder}: {name} was tested with two settings; choose another --output_dir")
    found |= {group: read_results(spiking / group) for group in SPIKING if (spiking / group).is_dir()}
    return {group: members for group, members in found.items() if members}


# Table and figure


def table(groups: dict[str, list[Result]]) -> list[dict]:
    """A row per group: test accuracy in percent at each length (mean and standard deviation over the seeds)."""
    rows = []
    for group, runs in groups.items():
        options, epochs = runs[0].options, max(len(run.metrics) for run in runs)
        rows.append(
            {"group": group, "network": WORDS[group], "seeds": len(runs)}
            | {"learning rate": options["learning_rate"], "curriculum from": options["curriculum_start"]}
            | {"epochs": epochs, "updates": epochs * -(-data.TRAINING_SAMPLES // options["batch_size"])}
            | {f"{length} pairs": mean_and_deviation([accuracy_at(run, length) for run in runs]) for length in SHOWN}
        )
    return rows


def to_markdown(rows: list[dict]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


@styled
def draw(groups: dict[str, list[Result]]) -> Figure:
    """Errors by tested length, and in training: a colour per network, the spiking ones in black."""
    figure = new_figure(TWO_COLUMNS, 72)
    lengths, training = figure.subplots(1, 2)
    looks = {name: {"color": colour} for name, colour in zip(NETWORKS, SERIES, strict=False)}
    looks |= {name: {"color": BLACK, "ls": line} for name, line in zip(SPIKING, LINE_STYLES, strict=True)}
    handles, seen = [], data.TRAINING_SAMPLES / 1000
    for group, members in groups.items():
        runs, look = [columns(run.tests) | columns(run.metrics) for run in members], looks[group]
        handles.append(Line2D([], [], label=f"{WORDS[group]} ({len(runs)} seed{'s' * (len(runs) > 1)})", **look))
        draw_repetitions(lengths, [(run["sequence_length"], 100 - run["accuracy"]) for run in runs], group, **look)
        draw_repetitions(training, [(seen * run["epoch"], 100 - run["validation_accuracy"]) for run in runs], group, **look)
    heading(lengths, "a", f"Tested at other lengths (trained with {COMMON['sequence_length']} pairs)")
    heading(training, "b", "Training")
    for ax, words, of in ((lengths, "Pairs at test", "test"), (training, "Training samples (thousands)", "validation")):
        ax.set_yscale("symlog", linthresh=0.1, linscale=0.3)  # a network without errors is at 0
        ax.set(xlabel=words, ylabel=f"Errors in {of} (%)", ylim=(0, 103), yticks=[0, 0.1, 1, 10, 100])
        ax.yaxis.set_major_formatter("{x:g}")
    figure.legend(handles=handles, loc="outside lower left", ncols=3)
    return figure


if __name__ == "__main__":
    sys.exit(main())
