"""The numbers in the READMEs agree with the kept runs."""

import copy
import math
import re
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from experiments import analyze, compare, readme
from experiments.summarize import accuracy_at
from utils.errors import UserError
from utils.results import Result

ROOT = Path(__file__).resolve().parent.parent
FRONT, PAGE = ROOT / "README.md", ROOT / "experiments" / "README.md"
# Numbers that kept runs cannot give: the cost of future runs, and the definition of a silent run.
GIVEN = [
    "0.9 core-hours a seed",
    "three seeds: 2.7",
    "30 pairs, one seed: 3.3",
    "fire below 0.01 Hz",
]


@pytest.fixture(scope="module")
def kept():
    return readme.Kept(ROOT / "experiments")


@pytest.mark.parametrize("path", readme.FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_parts_of_the_readmes_are_up_to_date(path, kept):
    text = path.read_text(encoding="utf-8")
    assert readme.fill(text, kept) == text, "run python -m experiments.readme"


def test_every_generated_part_is_used_and_an_unknown_name_is_refused(kept):
    names = {name for path in readme.FILES for name in readme.BLOCK.findall(path.read_text(encoding="utf-8"))}
    assert names == set(readme.FROM_RUNS)
    with pytest.raises(UserError, match="no 'resluts'"):
        readme.fill("<!-- resluts --><!-- end -->", kept)


def test_every_number_in_the_text_is_computed_from_the_runs(kept):
    """The text contains each phrase and, outside the phrases, no decimal number, percentage or number of points."""
    for path, phrases in {
        FRONT: front_page(kept),
        PAGE: [*GIVEN, *of_seeds(kept), *of_training(kept), *of_recall(kept), *of_networks(kept)],
    }.items():
        text = written_by_hand(path)
        for phrase in phrases:
            assert phrase in text, f"{path}: {phrase}"
        for phrase in phrases:
            text = text.replace(phrase, "")
        assert re.findall(r"[^.]{0,30}\d\.\d[^.]{0,30}|.{0,30}\d (?:%|points|Hz|core)", text) == [], path


def written_by_hand(path: Path) -> str:
    """The results on a page, in one line, without generated parts, commands, options and links."""
    text = path.read_text(encoding="utf-8")
    if path == FRONT:
        text = text.partition("## Results\n")[2].partition("\n## ")[0]
    for left_out in (readme.BLOCK, r"(?s)```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"v0\.3"):
        text = re.sub(left_out, "", text)
    return " ".join(text.replace("*", "").split())


def test_numbers_become_words():
    assert (readme.several([]), readme.several([92.35]), readme.several([1.0, 2.0, 3.0])) == ("", "92.35 (1)", "2.0 ± 1.0 (3)")
    assert readme.difference([1.0, 2.0, 3.0], [2.0, 2.5, 3.0]) == "none"  # 0.5, with an error of 0.645
    assert (
        readme.difference([1.0, 2.0, 3.0], [5.0, 5.0]) == "+3.00 ± 0.58" and readme.difference([1.0], [2.0, 3.0]) == "one seed"
    )
    assert (readme.span([9, 1400, 20]), readme.span({7}), readme.listed([1, 2, 3]), readme.listed([1, 3])) == (
        "9 to 1,400",
        "7",
        "1 to 3",
        "1, 3",
    )
    assert readme.error_of_share(90, 100) == pytest.approx(3)


def test_silence_spikes_and_later_pairs_agree_with_a_count_by_hand(kept):
    rates = dict.fromkeys([*readme.STORING, *readme.RECALLING], 10.0)
    quiet = [{"epoch": epoch, "read_value": rate} for epoch, rate in ((1, 5.0), (2, 0.0099), (3, 0.01), (4, 0.0))]
    run = Result("a/b", {"sequence_length": 3}, [], [*quiet, rates], [])
    # 3 pairs of 0.1 s with 360 neurons, and a recall of 0.1 s with 280, all at 10 Hz.
    assert readme.spikes(run) == pytest.approx(3 * 360 + 280)
    assert readme.silent_epochs(run._replace(metrics=quiet)) == [2, 4]
    kept = copy.copy(kept)
    places = [
        ("1", "10", "70.0"),
        ("2", "10", "90.0"),
        ("3", "10", "100.0"),
    ]  # in 3 errors both other pairs are later, in 1 one of them
    kept.analysis = {
        "position": [dict(zip(("network", "position", "samples", "accuracy"), ("n", *p), strict=True)) for p in places]
    }
    assert readme.later_by_chance(kept, "n") == pytest.approx((3 * 100 + 50) / 4)


def run_of(kept, name):
    return next((run, row) for run, row in kept.both(*kept.runs) if row["run"] == name)


def accuracy_of(kept, name) -> float:
    return run_of(kept, name)[1]["test_accuracy"]


def rows_of(kept, table, network, key, column) -> dict[str, float]:
    return {row[key]: float(row[column]) for row in kept.of_network(table, network)}


def searched(group: str) -> list[dict[str, str]]:
    rows = readme.read_csv(ROOT / "experiments" / "search.csv")
    return [row for row in rows if re.fullmatch(group, row["group"])]


def accuracies_at(kept, group, length) -> list[float]:
    return [accuracy_at(run, length) for run in kept.runs[group]]


def front_page(kept) -> list[str]:
    recipe, control = (mean(kept.tests(group, 30)) for group in ("recipe", "first_recipe"))
    without = {n: rows_of(kept, "fresh", name, "gamma_neg", "accuracy") for n, name in NETWORKS.items()}
    named = {row["group"]: row["30 pairs"].split()[0] for row in kept.networks}
    return [
        f"({recipe:.2f} and {control:.2f} %, three seeds each)",
        f"55 pairs rises from {without[55]['0.3']:.2f} to {without[55]['0.0']:.2f} %",
        f"the network trained with 5 falls from {without[5]['0.3']:.2f} to {without[5]['0.0']:.2f} %",
        f"the recipe reaches {mean(accuracies_at(kept, 'ood_recipe', 30)):.1f} % at 30 pairs",
        f"and {mean(accuracies_at(kept, 'ood_recipe_tuned', 30)):.1f} % with the tuned rule (4 seeds each)",
        f"a Transformer ({named['transformer']}), a sum of outer products ({named['linear_attention']}) and the",
        f"delta rule ({named['delta_rule']}) are more accurate than the tuned spiking network ({named['ood_recipe_tuned']});",
        f"H-Mem ({named['h_mem']}) is not, and an LSTM ({named['lstm']}) learns little",
    ]


NETWORKS = {5: "recipe-sequence_length5-seed2", 30: "recipe-sequence_length30-seed3", 55: "recipe-sequence_length55-seed1"}


def of_seeds(kept) -> list[str]:
    """Sections 1 to 3."""
    losses = [run_of(kept, f"{group}/sequence_length10-seed3")[0].metrics[0]["train_loss"] for group in readme.PUBLISHED]
    never = [run_of(kept, f"published_0.3/sequence_length10-seed{seed}")[0] for seed in (3, 5)]
    assert all(run.metrics[-1]["write_key"] < 0.01 and len(readme.silent_epochs(run)) > 98 for run in never)
    unregularized = [float(row["best_validation_accuracy"]) for row in searched("published_unregularized")]
    runs = [run_of(kept, f"published/sequence_length10-seed{seed}")[0] for seed in (7, 9, 10)]
    regularized = [max(line["validation_accuracy"] for line in run.metrics[:20]) for run in runs]
    at_2 = [run.metrics[-1]["validation_loss"] for run, row in kept.both("published_0.3_short")]
    assert (len(at_2), sum(math.log(2) / 2 < loss < math.log(2) for loss in at_2)) == (7, 6)
    whole = [run for run, row in kept.both(*readme.PUBLISHED) if row["sequence_length"] == row["num_classes"] == 2]
    *half, both = sorted((run.metrics[-1]["validation_loss"] for run in whole), reverse=True)
    assert len(half) == 4 and both < 0.1
    for length, seeds in ((20, 3), (30, 1)):
        ended = [run for run, row in kept.both(*readme.PUBLISHED) if row["sequence_length"] == length]
        assert [readme.silent_epochs(run) == list(range(2, 101)) for run in ended] == [True] * seeds
    repeated = run_of(kept, "published_0.3/sequence_length10-seed4")[0]
    curriculum = kept.both("curriculum")
    assert not any(readme.silent_epochs(run) for run, _ in curriculum)
    by = [max(row["learned_in_epoch"] for _, row in curriculum if row["sequence_length"] == n) for n in (5, 10, 20, 30, 40, 55)]
    return [
        f"begins with a loss of {losses[0]:.2f} before and {losses[1]:.2f} since",
        f"accuracy of 98 % has a standard error of {readme.error_of_share(98, readme.TESTED):.1f}",
        "the writing keys also end below 0.01 Hz",
        f"With published options and a length curriculum no seed falls silent | 3 | {len(curriculum)} |",
        f"reach at most {max(unregularized)} % in validation in 20 epochs, with it {min(regularized)} to {max(regularized)} %",
        f"The {len(curriculum)} runs are past halfway from guessing to 100 % by epoch {by[0]} at 5 pairs, {by[1]} at 10,"
        f" {by[2]} at 20, {by[3]} at 30, {by[4]} at 40 and {by[5]} at 55",
        "6 % of the published 250",  # 15 epochs
        f"guessing costs ln 2 = {math.log(2):.2f}",
        f"their losses end at {half[-1]:.2f} or {half[0]:.2f}",
        "accuracy nears 100 %",
        f"the loss is 0.2337 in epoch 20 (record: {repeated.metrics[19]['train_loss']:.4f})",
        f"accuracy 93.9 % (record: {repeated.metrics[19]['validation_accuracy']:.1f} %)",
        f"a loss of 2.4901 (record: {run_of(kept, 'published_0.3/sequence_length10-seed2')[0].metrics[0]['train_loss']:.4f})",
    ]


def of_training(kept) -> list[str]:
    """Section 4."""
    recipe, control = (mean(kept.tests(group, 30)) for group in ("recipe", "first_recipe"))
    spikes = [
        mean(readme.spikes(run) for run, row in kept.both(group) if row["sequence_length"] == 30)
        for group in ("recipe", "first_recipe")
    ]
    assert 0.45 < spikes[0] / spikes[1] < 0.55 and 5.5 < recipe - control < 6.5, "half the spikes and six points more"
    rule = {row["options"].partition(" --batch")[0]: row["best_validation_accuracy"] for row in searched("rule10")}
    longer, usual = (
        [accuracy_of(kept, f"{group}/sequence_length10-seed{n}") for n in (1, 2)] for group in ("recipe_longer", "recipe")
    )
    from_one = [row["silent"] for row in searched("search_from_one_pair.*")]
    assert (len(rule), from_one.count("1"), len(from_one)) == (6, 3, 8)
    parts = {row["run"].split("seed1-")[-1]: row["test_accuracy"] for row in kept.rows["parts10"]}
    worst = [parts.pop(name) for name in ("num_time_steps50", "tau_trace80", "memory_size50")]
    unchanged, at_2 = kept.tests("first_recipe", 10), run_of(kept, "first_recipe/sequence_length2-seed1")[0]
    (held,) = [row["test_accuracy"] for row in searched("recipe_l2") if row["sequence_length"] == "30"]
    assert len(parts) == 9 and min(parts.values()) > max(worst)
    from_one_pair = readme.several(kept.tests("recipe_from_one_pair", 2), 2).removesuffix(" (3)")
    return [
        f"{spikes[0]:,.0f} spikes a sample instead of {spikes[1]:,.0f}, {recipe:.2f} % instead of {control:.2f}",
        f"had more in validation ({rule['--gamma_neg 0.02']} against {rule['--gamma_pos 0.1 --gamma_neg 0.02']})",
        f"accuracy is {accuracy_of(kept, 'parts30/sequence_length30-seed1-gamma_pos0.1-gamma_neg0'):.2f}, with the tuned rule"
        f" {accuracy_of(kept, 'recipe_tuned/sequence_length30-seed1'):.2f}: one seed",
        f"{longer[0]:.2f} and {longer[1]:.2f} instead of {usual[0]:.2f} and {usual[1]:.2f}: two seeds",
        f"three seeds learn 2 pairs of 2 classes (; {from_one_pair} %)",
        f"(one seed; {float(at_2.tests[0]['accuracy']):.2f}, validation loss {at_2.metrics[-1]['validation_loss']:.2f})",
        f"gives seed 1 {float(held):.2f} at 30 pairs, falling {kept.tests('recipe', 30)[0]:.2f}",
        f"one seed each; unchanged: {unchanged[0]:.2f}) three cost more than seeds differ",
        f"inputs held 50 ms ({worst[0]:.2f}), traces of 80 ms ({worst[1]:.2f}), 50 neurons in the memory ({worst[2]:.2f})",
    ]


def of_recall(kept) -> list[str]:
    """Sections 5 to 8."""
    counts = [int(row["errors"]) for row in kept.analysis["errors"] if int(row["sequence_length"]) > 2]
    (apart,) = kept.of_network("errors", "ood_recipe-seed3")
    assert float(apart["label_not_shown"]) == 0
    without = {n: rows_of(kept, "depression", name, "gamma_neg", "accuracy") for n, name in NETWORKS.items()}
    lost = {n: {strength: round(20 * (100 - accuracy)) for strength, accuracy in of.items()} for n, of in without.items()}
    first, second = (rows_of(kept, "depression", NETWORKS[55], "gamma_neg", half) for half in ("first_half", "second_half"))
    noise = {name: rows_of(kept, "noise", name, "deviation", "accuracy") for name in kept.networks_in("noise")}
    costs = {name: of["0.0"] - of["0.1"] for name, of in noise.items()}
    long = [cost for name, cost in costs.items() if int(re.split("[ ,]", analyze.in_words(name))[0]) >= 20]
    nearest = min(float(row["nearest"]) for row in kept.analysis["noise"] if row["deviation"] == "0.1")
    for row in readme.depression(kept)[1:]:  # costs at 20 pairs and more, helps at 10 and fewer
        pairs, change = int(re.split("[ ,]", row[0])[0]), row[-1]
        assert change.startswith("+" if pairs >= 20 else "-") or row[0] == "30, rule tuned", row
    two = costs["recipe_from_one_pair-sequence_length2-seed1"]
    return [
        f"one network each, {min(counts)} to {max(counts)} errors",
        f"none of {apart['errors']} errors names one of these",
        f"rises from {first['0.3']:.1f} to {first['0.0']:.1f}, the second",
        f"falls from {second['0.3']:.1f} to {second['0.0']:.1f}",
        f"fall from {lost[55]['0.3']} to {lost[55]['0.0']} at 55 pairs",
        f"the nearest in {nearest} % of the samples or more, and costs {two:.2f} points at 2 pairs",
        f"{min(long):.2f} to {max(long):.2f} from 20 pairs on",
    ]


def of_networks(kept) -> list[str]:
    """Sections 6 and 7."""
    groups = compare.read_groups(ROOT / "experiments" / "comparison", ROOT / "experiments" / "results")
    at = {n: {row["group"]: row[f"{n} pairs"].split(" ±") for row in kept.networks} for n in (10, 30)}
    others = sorted(float(at[10][name][0]) for name in compare.NETWORKS if name != "lstm")
    best = sorted(float(at[30][name][0]) for name in ("linear_attention", "transformer", "delta_rule"))
    recipe, tuned, without = (accuracies_at(kept, group, 30) for group in compare.SPIKING)
    instead = " % at 30 pairs instead of ".join(readme.several(seeds).removesuffix(" (4)") for seeds in (without, recipe))
    h_mem, positions = (" ±".join(at[30][name]) for name in ("h_mem", "transformer_positions"))
    gains = {name: readme.difference(tuned, [accuracy_at(run, 30) for run in groups[name]]) for name in compare.NETWORKS}
    assert all(gains[name].startswith("+") for name in ("linear_attention", "transformer", "delta_rule"))
    assert [gains[name] for name in ("h_mem", "transformer_positions")] == ["none"] * 2
    assert readme.difference(recipe, without) == "none" and others[0] > float(at[10]["ood_recipe_tuned"][0])
    at_30 = [mean(kept.tests(group, 30)) for group in ("recipe", "recipe_tuned")]
    lost = [trained - mean(longer) for trained, longer in zip(at_30, (recipe, tuned), strict=True)]
    first = [np.argmax([line["validation_accuracy"] for line in run.metrics]) + 1 for name in compare.NETWORKS
             for run in groups[name] if max(line["validation_accuracy"] for line in run.metrics) == 100]  # fmt: skip
    runs = [run for name, run in compare.read_runs(ROOT / "experiments" / "comparison").items() if "-seed1-" in name]
    good = [run for run in runs if max(line["validation_accuracy"] for line in run.metrics) >= 99]
    return [
        f"at 10 pairs: {others[0]} to {others[-1]} % instead",
        f"of {at[10]['ood_recipe'][0]} and {at[10]['ood_recipe_tuned'][0]}",
        f"have {best[0]} to {best[-1]} %, the tuned rule {mean(tuned):.1f}, the published rule {mean(recipe):.1f}",
        f"H-Mem ({h_mem}) and the Transformer with positions ({positions})",
        f"has {instead}",
        f"{len(good)} of {len(runs)} reach 99 %",
        f"reaches 100 %, this epoch is early ({min(first)} to {max(first)} of 40)",
        f"{at_30[0]:.2f} (published rule) and {at_30[1]:.2f} (tuned): {lost[0]:.1f} and {lost[1]:.1f} points more",
        f"with a loss of {lost[0]:.1f} points (published rule) and {lost[1]:.1f} (tuned)",
        f"a search of {len(searched('(rule|schedule|search|recipe_l2).*'))} runs",
    ]
