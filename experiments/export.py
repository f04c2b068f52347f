#!/usr/bin/env python3
"""Keep trained networks without the state of the optimizer, with a README that says how each was made.

python experiments/export.py runs/sweep recipe/sequence_length10-seed1 published/sequence_length5-seed1 --output_dir pretrained
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from experiments.summarize import Result, read_results, summary  # noqa: E402
from utils import checkpoints  # noqa: E402
from utils.errors import UserError  # noqa: E402

HEAD = """# Trained networks

Each is the network of highest validation accuracy of a run whose raw metrics are in `experiments/results/`. The task script and
the plot script take them; without the state of the optimizer, training on from them begins with fresh moments of Adam.

```bash
python memorizing_associations_task.py --resume pretrained/{example} --evaluate
```
"""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, metavar="FOLDER", help="--output_dir of a sweep")
    parser.add_argument("names", nargs="+", metavar="GROUP/RUN", help="the runs to keep the networks of")
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, required=True, help="folder of the networks and their README"
    )
    args = parser.parse_args(argv)
    try:
        results = {result.name: result for result in read_results(args.runs)}
        if unknown := [name for name in args.names if name not in results]:
            raise UserError(f"{args.runs}: no run {', '.join(unknown)}; there are {', '.join(results)}")
        if untested := [name for name in args.names if summary(results[name])["test_accuracy"] is None]:
            raise UserError(f"{args.runs}: {', '.join(untested)} not tested yet; sweep.py --test_only tests it")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for name in args.names:
            export(args.runs / name / checkpoints.BEST, args.output_dir / file_name(name))
        readme = HEAD.format(example=file_name(args.names[0])) + "".join(describe(results[name]) for name in args.names)
        (args.output_dir / "README.md").write_text(readme, encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def export(source: Path, target: Path) -> None:
    checkpoint = checkpoints.load(source)
    checkpoints.save(target, checkpoint | {"optimizer": checkpoint["optimizer"] | {"state": {}}})


def file_name(run: str) -> str:
    return run.replace("/", "-") + ".pth.tar"


def describe(result: Result) -> str:
    """What made a network, and what it scores."""
    row = summary(result)
    trained = [line for line in result.commands if "--evaluate" not in line]
    commands = {}  # command -> the commits it ran at; it goes on where it was interrupted
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
