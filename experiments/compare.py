"""Other networks on the same task: a table, and one figure.

python -m experiments.compare experiments/comparison --output_dir experiments/comparison

Reads the groups of experiments/comparison.yaml, kept compactly or as folders of runs, and the noise on the query that
`python -m experiments.analyze` measured (analysis/noise.csv below the folder), where it is there.
Writes comparison.md, .csv and .png.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import data
from experiments.summarize import accuracy_at, group_of, mean_and_deviation
from utils.errors import in_one_line
from utils.figures import save
from utils.figures.curves import draw_repetitions
from utils.figures.style import BLACK, DOTTED, GREY, SERIES, TWO_COLUMNS, heading, new_figure, styled
from utils.metrics import to_csv
from utils.results import Result, columns, read_results

# Trained with 10 pairs of 30 classes: group -> words.
NETWORKS = {
    "ood_linear_attention": "linear attention (a sum of outer products)",
    "ood_transformer": "Transformer encoder, no positions",
    "ood_transformer_positions": "Transformer encoder, positions",
    "ood_delta_rule": "delta rule",
    "ood_h_mem": "H-Mem (published, without spikes)",
    "ood_lstm": "LSTM",
    "ood_hebbian_snn": "spiking (published)",
    "ood_hebbian_snn_tuned": "spiking, rule tuned",
}
# From the sum of outer products to the spiking network, one change at a time.
STEPS = {
    "ood_h_mem_sum_unrectified": "sum of outer products",
    "ood_h_mem_sum": "keys and values rectified",
    "ood_h_mem": "saturating rule with depression",
    "ood_hebbian_snn_without_feedback": "time and spikes",
    "ood_hebbian_snn": "both feedbacks (published)",
}
LENGTHS = (2, 5, 10, 20, 30)
REACHED = 90.0  # percent in validation


@in_one_line
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, metavar="FOLDER", help="folder with the runs of experiments/comparison.yaml")
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="where to write table and figure")
    args = parser.parse_args(argv)
    groups: dict[str, list[Result]] = {}
    for result in read_results(args.runs):
        groups.setdefault(group_of(result.name), []).append(result)
    noise = args.runs / "analysis" / "noise.csv"
    noise_rows = list(csv.DictReader(noise.read_text(encoding="utf-8").splitlines())) if noise.exists() else []
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = table(groups)
    (args.output_dir / "comparison.csv").write_text(to_csv(rows), encoding="utf-8")
    (args.output_dir / "comparison.md").write_text(to_markdown(rows), encoding="utf-8")
    save(draw(groups, noise_rows), args.output_dir / "comparison.png")
    print(to_markdown(rows), end="")
    return 0


def table(groups: dict[str, list[Result]]) -> list[dict]:
    """A row per group: test accuracy in percent at each length (mean and standard deviation over the seeds), thousands of
    training samples until 90 % in validation (mean; "-" where a seed never gets there)."""
    rows = []
    for group in dict.fromkeys((*NETWORKS, *STEPS)):
        runs, words = groups.get(group, []), (STEPS | NETWORKS)[group]
        if not runs:
            continue
        reached = [first_above(run, REACHED) for run in runs]
        epochs = sorted({len(run.metrics) for run in runs})
        rows.append(
            {"group": group, "network": words, "seeds": len(runs), "epochs": "-".join(map(str, epochs))}
            | {f"{length} pairs": mean_and_deviation([accuracy_at(run, length) for run in runs]) for length in LENGTHS}
            | {"thousand samples to 90 %": "-" if None in reached else f"{np.mean(reached):.0f}"}
        )
    return rows


def first_above(run: Result, percent: float) -> float | None:
    """Thousands of training samples at the end of the first epoch that is this good in validation."""
    epochs = (n for n, line in enumerate(run.metrics, start=1) if line["validation_accuracy"] >= percent)
    return next((n * data.TRAINING_SAMPLES / 1000 for n in epochs), None)


def to_markdown(rows: list[dict]) -> str:
    head = list(rows[0]) if rows else []
    lines = [head, ["---"] * len(head), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


@styled
def draw(groups: dict[str, list[Result]], noise_rows: list[dict[str, str]]) -> Figure:
    """Accuracy by tested length, in training and under noise, a line per network; and step by step from the sum of outer
    products to the spiking network."""
    figure = new_figure(TWO_COLUMNS, 108)
    (lengths, training), (noise, steps) = figure.subplots(2, 2)
    handles = []
    for (group, words), colour in zip(NETWORKS.items(), (*SERIES, GREY), strict=False):
        runs, look = [columns(run.tests) | columns(run.metrics) for run in groups.get(group, [])], {"color": colour}
        if runs:
            handles.append(Line2D([], [], label=f"{words} ({len(runs)})", **look))
        draw_repetitions(lengths, [(run["sequence_length"], run["accuracy"]) for run in runs], group, **look)
        seen = data.TRAINING_SAMPLES / 1000
        draw_repetitions(training, [(seen * run["epoch"], run["validation_accuracy"]) for run in runs], group, **look)
        rows = [row for row in noise_rows if row["network"] == group.removeprefix("ood_")]
        noise.plot([float(row["deviation"]) for row in rows], [float(row["accuracy"]) for row in rows], **look)
    exact = [row for row in noise_rows if row["network"] == noise_rows[0]["network"]]
    noise.plot([float(r["deviation"]) for r in exact], [float(r["nearest"]) for r in exact], ls=DOTTED, color=BLACK,
               label="exact nearest neighbour")  # fmt: skip
    there = [group for group in STEPS if group in groups]
    for length, marker in ((10, "o"), (20, "s"), (30, "^")):
        means = []
        for place, group in enumerate(there):
            found = [value for run in groups[group] if (value := accuracy_at(run, length)) is not None]
            steps.plot([place] * len(found), found, marker, ms=2.5, mew=0.4, mfc="none", color=BLACK)
            means.append(np.mean(found))
        steps.plot(means, marker=marker, ms=2.5, lw=0.6, color=BLACK, label=f"{length} pairs")
    steps.set_xticks(range(len(there)), [STEPS[group].replace(" ", "\n") for group in there])
    steps.legend(loc="lower right")
    heading(lengths, "a", "Tested at other lengths (trained with 10 pairs)")
    heading(training, "b", "Training")
    heading(noise, "c", "Noise on the query, 10 pairs")
    heading(steps, "d", "One change at a time")
    lengths.set_xlabel("Pairs at test")
    training.set_xlabel("Training samples (thousands)")
    noise.set_xlabel("Standard deviation")
    for ax in (lengths, training, noise, steps):
        ax.set(ylabel="Accuracy (%)", ylim=(0, 103))
    figure.legend(handles=[*handles, *noise.get_legend_handles_labels()[0]], loc="outside lower left", ncols=3)
    return figure


if __name__ == "__main__":
    sys.exit(main())
