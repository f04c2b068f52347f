"""Keep trained networks without the state of the optimizer, with a README that says how each was made.

python -m experiments.export runs/sweep recipe/sequence_length10-seed1 published/sequence_length5-seed1 --output_dir pretrained

Or write a checkpoint that the published program loads, with Adam's state:

python -m experiments.export --published runs/quickstart/model_best.pth.tar quickstart.pth.tar
"""

import argparse
import io
import sys
from collections import OrderedDict
from pathlib import Path

import torch

from experiments.summarize import summary
from utils import checkpoints
from utils.errors import UserError, in_one_line
from utils.options import MODEL, TASK_GROUPS
from utils.results import Result, read_results

HEAD = """# Trained networks

Each is the network of highest validation accuracy of a run whose raw metrics are in `experiments/results/`. The task script and
the plot script take them; without the state of the optimizer, training on from them begins with fresh moments of Adam.

```bash
python memorizing_associations_task.py --resume pretrained/{example} --evaluate
```
"""


@in_one_line
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="?", metavar="FOLDER", help="--output_dir of a sweep")
    parser.add_argument("names", nargs="*", metavar="GROUP/RUN", help="the runs to keep the networks of")
    parser.add_argument("--output_dir", "--output-dir", type=Path, help="folder of the networks and their README")
    parser.add_argument(
        "--published", nargs=2, type=Path, metavar=("CHECKPOINT", "FILE"), help="write FILE for the published program"
    )
    args = parser.parse_args(argv)
    if not args.published and not (args.names and args.output_dir):
        parser.error("needs FOLDER GROUP/RUN --output_dir FOLDER, or --published CHECKPOINT FILE")
    if args.published:
        export_published(*args.published)
        return 0
    results = {result.name: result for result in read_results(args.runs)}
    if unknown := [name for name in args.names if name not in results]:
        raise UserError(f"{args.runs}: no run {', '.join(unknown)}; there are {', '.join(results)}")
    if untested := [name for name in args.names if summary(results[name])["test_accuracy"] is None]:
        raise UserError(f"{args.runs}: {', '.join(untested)} not tested yet; let the sweep finish")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        export(args.runs / name / checkpoints.BEST, args.output_dir / file_name(name))
    readme = HEAD.format(example=file_name(args.names[0])) + "".join(describe(results[name]) for name in args.names)
    (args.output_dir / "README.md").write_text(readme, encoding="utf-8")
    return 0


def export(source: Path, target: Path) -> None:
    """Without the state of the optimizer, and without the folder of the machine that it was trained on."""
    checkpoints.save(target, checkpoints.load(source) | {"optimizer": None, "log_dir": ""})


# The published program's options, in its order; `distributed` is what it makes of them.
PUBLISHED_OPTIONS = """sequence_length num_classes feature_size inf_data num_time_steps workers prefetch_factor embedding_size
    memory_size w_max gamma_pos gamma_neg tau_trace readout_delay thr perfect_reset refractory_time_steps tau_mem
    dampening_factor epochs batch_size learning_rate learning_rate_decay decay_learning_rate_every max_grad_norm l2 target_rate
    start_epoch resume evaluate logging print_freq world_size rank dist_url dist_backend seed dataset_seed gpu
    multiprocessing_distributed""".split()


def export_published(source: Path, target: Path) -> None:
    """Write a checkpoint of this program as one of the published program.

    Raises:
        UserError: it cannot be read or written, or has a model option that the published program does not know.
    """
    checkpoint = checkpoints.load(source)
    file = io.BytesIO()
    torch.save(published(checkpoint, source), file)
    checkpoints.write_atomically(target, lambda target: target.write(file.getbuffer()))


def published(checkpoint: dict, source: Path) -> dict:
    """The content of a published checkpoint (format: utils/checkpoints.py)."""
    params, table = checkpoint["params"], {option.name: option for group in TASK_GROUPS.values() for option in group}
    own = [option for option in MODEL if option.name not in PUBLISHED_OPTIONS]
    if unknown := [f"{o.name} {params[o.name]}" for o in own if params.get(o.name, o.default) != o.default]:
        raise UserError(f"{source}: the published program has no {', '.join(unknown)}")
    options = {name: params.get(name, table[name].default) for name in PUBLISHED_OPTIONS} | {"distributed": False}
    options |= {"inf_data": bool(options["inf_data"]), "resume": "", "evaluate": False}

    weights = list(checkpoint["state_dict"].items())
    ones = torch.ones(params["embedding_size"], params["embedding_size"])
    weights.insert(2, ("encoding_layer.encoding", ones))
    # The matrix of ones counts as a parameter, but is not learned and has no state.
    optimizer = torch.optim.Adam([weight for _, weight in weights], lr=options["learning_rate"]).state_dict()
    if ours := checkpoint["optimizer"]:
        optimizer["param_groups"][0] |= {"lr": ours["param_groups"][0]["lr"]}
        optimizer["state"] = {number: ours["state"][n] for n, number in enumerate((0, 1, 3, 4, 5))}
    return {
        "epoch": checkpoint["epoch"],
        "state_dict": OrderedDict(weights),
        "best_acc": checkpoint["best_acc"].float(),
        "optimizer": optimizer,
        "log_dir": checkpoint["log_dir"],
        "time_stamp": checkpoint["time_stamp"],
        "params": argparse.Namespace(**options),
    }


def file_name(run: str) -> str:
    return run.replace("/", "-") + ".pth.tar"


def describe(result: Result) -> str:
    """What made a network, and what it scores."""
    row = summary(result)
    trained = [line for line in result.commands if "--evaluate" not in line]
    commands = {}  # command -> the commits it ran at; an interrupted run resumes at a later one
    for line in trained:
        commit, command = line.split(": ", maxsplit=1)
        commands.setdefault(command, []).append(commit)
    words = [
        f"\n## {file_name(result.name)}\n",
        f"{row['sequence_length']} pairs of {row['num_classes']} classes, {row['training']}, seed {row['seed']}: "
        f"{row['test_accuracy']:.2f} % on the published test set, {row['best_validation_accuracy']:.1f} % in validation, after "
        f"{row['best_epoch']} epochs.\n",
        *(f"Commit {', '.join(dict.fromkeys(commits))}:\n\n```bash\n{command}\n```" for command, commits in commands.items()),
    ]
    return "\n".join(words) + "\n"


if __name__ == "__main__":
    sys.exit(main())
