"""Other networks on the same task: what they compute, how large they are, how they are trained, and the committed table."""

import csv
import itertools
import math
from collections import Counter
from pathlib import Path

import golden
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, silu

import data
import models
from experiments import compare
from models.plasticity import HebbianRule
from utils.errors import UserError
from utils.metrics import to_csv
from utils.results import write_groups

RESULTS = Path(__file__).resolve().parent.parent / "experiments" / "results"
COMPARISON = RESULTS.with_name("comparison")


def new(name: str, seed: int = 1):
    torch.manual_seed(seed)
    return compare.NETWORKS[name][1]()


def draw_samples(number: int = 20, length: int = 4) -> data.Samples:
    return data.training_samples(0, number, 0, length, **compare.SIZES)


def answer(network, samples: data.Samples) -> torch.Tensor:
    return network(samples.features, samples.labels, samples.query)


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


# The networks


def test_h_mem_agrees_with_the_original_implementation():
    expected = golden.load("non_spiking_defaults")
    assert [expected.params[n] for n in ("w_max", "gamma_pos", "gamma_neg")] == [1.0, 0.1, 0.1]
    assert [getattr(compare.RULE, n) for n in ("w_max", "gamma_pos", "gamma_neg")] == [1.0, 0.1, 0.1]
    network = compare.HMem(expected.params["num_classes"], memory_size=expected.params["memory_size"]).double()
    network.load_state_dict(expected.state)
    inputs = expected.inputs
    logits, activity = network.recall(inputs["features"], inputs["labels"], inputs["query"])
    loss = cross_entropy(logits, inputs["answer"])
    loss.backward()
    ours = {"logits": logits, "cross_entropy": loss} | activity
    ours |= {f"gradient of {name}": weight.grad for name, weight in network.named_parameters()}
    theirs = expected.out | {f"gradient of {name}": value for name, value in expected.grad_cross_entropy.items()}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        error = (ours[name] - value).abs().max() / value.abs().max()
        assert error <= 1e-9, f"{name} differs by {error:.3g}"


def test_h_mem_strengthens_by_gamma_pos_and_weakens_by_gamma_neg():
    """In the golden file gamma_pos and gamma_neg are equal, so it cannot distinguish them."""
    torch.manual_seed(1)
    network = compare.HMem(memory_size=7, rule=HebbianRule(w_max=0.8, gamma_pos=0.2, gamma_neg=0.05)).double()
    samples = draw_samples(2, length=3)
    _, activity = network.recall(samples.features.double(), samples.labels, samples.query.double())
    keys, values = activity["write_key"].tolist(), activity["write_value"].tolist()
    for n, i, j in itertools.product(range(2), range(7), range(7)):
        weight = 0.0
        for key, value in zip(keys[n], values[n], strict=True):
            weight += 0.2 * (0.8 - weight) * value[i] * key[j] - 0.05 * key[j] ** 2 * weight
        assert activity["memory"][n, i, j].item() == pytest.approx(weight, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", compare.NETWORKS)
def test_a_network_has_the_size_of_the_spiking_one_and_uses_pairs_query_and_all_parameters(name):
    """Another label of the asked pair or another query changes the logits, and every parameter has a gradient."""
    network, samples = new(name), draw_samples()
    spiking = models.build_model({"num_classes": compare.SIZES["num_classes"]})
    ours, theirs = (sum(parameter.numel() for parameter in parameters.parameters()) for parameters in (network, spiking))
    assert ours == pytest.approx(theirs, rel=0.1)
    logits = answer(network, samples)
    cross_entropy(logits, samples.answer).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    asked = (samples.labels == samples.answer.unsqueeze(1)).long()
    relabelled = network(samples.features, (samples.labels + asked) % 30, samples.query)
    requeried = network(samples.features, samples.labels, samples.query.roll(1, 0))
    before_the_last = asked[:, -1] == 0
    for other in (relabelled, requeried):
        assert (other - logits)[before_the_last].abs().max() > 1e-6


def test_linear_attention_adds_outer_products_of_values_and_keys():
    network, samples = new("linear_attention"), draw_samples(5)
    read_key, value = network.query(silu(network.input_layer(samples.query))), 0
    for n in range(4):
        key = network.key(silu(network.input_layer(samples.features[:, n])))
        value = value + network.value(network.embedding_layer(samples.labels[:, n])) * (key * read_key).sum(1, keepdim=True)
    torch.testing.assert_close(answer(network, samples), network.output_layer(value))


def test_the_delta_rule_writes_one_pair_after_the_other():
    network, samples = new("delta_rule").double(), draw_samples(5)
    features, query = samples.features.double(), samples.query.double()
    memory = torch.zeros(5, 128, 128).double()
    for n in range(4):
        vector = silu(network.input_layer(features[:, n]))
        key = normalize(network.key(vector), dim=-1)
        error = network.value(network.embedding_layer(samples.labels[:, n])) - torch.einsum("bvk,bk->bv", memory, key)
        memory = memory + torch.einsum("bv,bk->bvk", network.write_strength(vector).sigmoid() * error, key)
    read_key = normalize(network.query(silu(network.input_layer(query))), dim=-1)
    expected = network.output_layer(torch.einsum("bvk,bk->bv", memory, read_key))
    torch.testing.assert_close(network(features, samples.labels, query), expected)


def test_positions_tell_the_pairs_apart():
    """Without positions the order of pairs has no effect. Positions are sines and cosines; the query has none."""
    samples, tokens = draw_samples(5, length=3), {}
    for name in ("transformer", "transformer_positions"):
        network = new(name)
        logits = [network(samples.features[:, o], samples.labels[:, o], samples.query) for o in ([0, 1, 2], [2, 0, 1])]
        assert torch.allclose(*logits, atol=1e-5) == (name == "transformer")
        network.encoder.register_forward_pre_hook(lambda _, inputs, name=name: tokens.update({name: inputs[0]}))
        answer(network, samples)
    added = (tokens["transformer_positions"] - tokens["transformer"])[0]
    rates = [10_000 ** -(n / 28) for n in range(28)]
    expected = [[wave(place * rate) for wave in (math.sin, math.cos) for rate in rates] for place in range(3)]
    torch.testing.assert_close(added, torch.tensor([*expected, [0.0] * 56]), atol=1e-5, rtol=0)


# Training


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(data, "TRAINING_SAMPLES", 150)
    monkeypatch.setattr(data, "EVALUATION_SAMPLES", {"validation": 130, "test": 50})
    monkeypatch.setitem(compare.COMMON, "epochs", 3)
    monkeypatch.setattr(compare, "TESTED", (2, 10))


def train(name="lstm", **options):
    return compare.train(
        "a run", compare.COMMON | {"network": name, "seed": 1, "learning_rate": 0.003, "curriculum_start": 2} | options
    )


def test_training_again_repeats_the_first_epochs_of_a_committed_run():
    """This checks the whole training: initial weights, samples, curriculum, learning rate and its decay."""
    committed = next(run for name, run in compare.read_runs(COMPARISON).items() if name.startswith("lstm-seed1-"))
    _, metrics = compare.train("a run", committed.options | {"epochs": 2})
    for ours, theirs in zip(metrics, committed.metrics, strict=False):
        for column in ("epoch", "learning_rate", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
            # On another processor, rounding may change the answers to some of the 1,000 or 9,000 samples.
            assert ours[column] == pytest.approx(theirs[column], rel=2e-3, abs=0.2 * ("accuracy" in column)), column


def test_the_network_of_the_best_epoch_is_returned(tiny, monkeypatch):
    states, queries, accuracies = [], [], iter([50.0, 70.0, 70.0])

    def evaluate(network, samples):
        states.append(network.output_layer.weight.detach().clone())
        queries.append(samples.query)
        return 0.0, next(accuracies)

    monkeypatch.setattr(compare, "evaluate", evaluate)
    network, metrics = train()
    assert [torch.equal(network.output_layer.weight, state) for state in states] == [False, True, False]
    assert [line["validation_accuracy"] for line in metrics] == [50, 70, 70]
    validation = data.evaluation_set("validation", 10, **compare.SIZES).query
    assert len(queries) == 3 and all(torch.equal(query, validation) for query in queries)


def test_an_epoch_uses_all_samples_and_the_curriculum_lengthens_sequences(tiny, monkeypatch):
    drawn, draw = [], data.training_samples
    monkeypatch.setattr(data, "training_samples", lambda *a, **sizes: drawn.append(a) or draw(*a, **sizes))
    train()
    ranges = [(0, 64), (64, 128), (128, 150)]
    assert drawn == [(*of, epoch, length) for epoch, length in enumerate([2, 6, 10]) for of in ranges]
    drawn.clear()
    train(curriculum_start=0)
    assert {length for *_, length in drawn} == {10}


def test_the_norm_of_the_gradient_is_clipped(tiny, monkeypatch):
    """Clipped to 1e-14, gradients hardly move the weights, since Adam adds 1e-8 to their root mean square."""
    initial, _ = compare.evaluate(new("lstm"), data.evaluation_set("validation", 10, **compare.SIZES))
    moved = train()[1][-1]["validation_loss"]
    monkeypatch.setattr(compare, "MAX_GRAD_NORM", 1e-14)
    assert train()[1][-1]["validation_loss"] == pytest.approx(initial, abs=1e-5) != moved


def test_the_best_setting_in_validation_is_tested_and_finished_runs_are_not_repeated(tiny, monkeypatch, tmp_path):
    trained, train = [], compare.train
    found = {(0.001, 0): (70, 0.5), (0.003, 2): (70, 0.4), (0.01, 0): (69, 0.1), (0.01, 2): (70, 0.6)}  # accuracy, loss

    def recorded(run, options):
        setting = options["learning_rate"], options["curriculum_start"]
        trained.append((run, options["seed"], *setting))
        network, metrics = train(run, options)
        accuracy, loss = found.get(setting, (60, 0.0))
        return network, [*metrics[:2], metrics[2] | {"validation_accuracy": accuracy, "validation_loss": loss}]

    monkeypatch.setattr(compare, "train", recorded)
    folder = tmp_path / "new"
    command = ["--output_dir", str(folder), "--spiking", str(tmp_path / "none"), "--networks", "lstm", "delta_rule"]
    assert compare.main([*command, "--seeds", "10", "1"]) == 0
    settings, networks = itertools.product((0.001, 0.003, 0.01), (0, 2)), ("lstm", "delta_rule")
    tested = [(10, 0.003, 2), (1, 0.003, 2)]
    every = [*tested, *((1, *setting) for setting in settings)]
    runs = {(f"{n}-seed{s}-learning_rate{r}-curriculum_start{c}", s, r, c) for n in networks for s, r, c in every}
    assert {run for run, times in Counter(trained).items() if times == 1} == {run for run in runs if run[1:] != (1, 0.003, 2)}
    assert set(trained) == runs and len(trained) == 2 * 8  # the best of the search is trained again, and tested
    kept = compare.read_runs(folder)
    assert kept.keys() == {name for name, *_ in runs} and {len(run.metrics) for run in kept.values()} == {3}
    for name, *setting in runs:
        lengths = [int(row["sequence_length"]) for row in kept[name].tests]
        assert lengths == ([2, 10] if tuple(setting) in tested else []), name
    table = read(folder / "comparison.csv")
    assert [(row["group"], row["seeds"], row["epochs"], row["updates"]) for row in table] == [
        (name, "2", "3", "9") for name in ("delta_rule", "lstm")
    ]
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    monkeypatch.setattr(compare, "train", None)
    (folder / "comparison.md").unlink()
    assert compare.main([*command, "--seeds", "10", "1"]) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before

    # Runs of another budget or of two settings are not taken for repetitions.
    monkeypatch.setitem(compare.COMMON, "batch_size", 32)
    assert compare.main([*command, "--seeds", "2"]) == 1
    other = next(run for name, run in kept.items() if name.startswith("lstm-seed1-learning_rate0.001"))
    tested_too = other._replace(tests=next(run.tests for run in kept.values() if run.tests))
    write_groups((kept | {other.name: tested_too}).values(), folder)
    with pytest.raises(UserError, match="lstm was tested with two settings"):
        compare.read_groups(folder, tmp_path / "none")


def test_a_loss_that_is_not_finite_loses_the_search_and_is_not_tested(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "LEARNING_RATES", (math.inf, 0.003))
    assert compare.best_setting(tmp_path / "a", "lstm")["learning_rate"] == 0.003
    monkeypatch.setattr(compare, "LEARNING_RATES", (math.inf,))
    assert compare.main(["--output_dir", str(tmp_path / "b"), "--networks", "lstm"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: lstm-seed1-learning_rateinf") and "the loss is not finite" in error
    assert all(run.tests == [] for run in compare.read_runs(tmp_path / "b").values())


def test_a_setting_that_diverges_after_good_epochs_is_not_chosen(monkeypatch, tmp_path):
    def complete(_, options):
        epochs = [(0.5, 80.0)] if options["learning_rate"] == 0.003 else [(0.1, 99.0), (math.nan, 3.0)]
        metrics = [{"train_loss": 0.1, "validation_loss": loss, "validation_accuracy": accuracy} for loss, accuracy in epochs]
        return compare.Result("", options, [], metrics, [])

    monkeypatch.setattr(compare, "complete", complete)
    assert compare.best_setting(tmp_path, "lstm")["learning_rate"] == 0.003


# The files


def test_the_committed_table_agrees_with_the_committed_runs():
    groups = compare.read_groups(COMPARISON, RESULTS)
    rows = compare.table(groups)
    assert list(groups) == [*compare.NETWORKS, *compare.SPIKING]
    assert {len(groups[name]) for name in compare.NETWORKS} == {5}
    assert (COMPARISON / "comparison.csv").read_text(encoding="utf-8") == to_csv(rows)
    assert (COMPARISON / "comparison.md").read_text(encoding="utf-8") == compare.to_markdown(rows)
    lengths, training = compare.draw(groups).axes
    for ax, name, column, place in ((lengths, "tests", "accuracy", 5), (training, "metrics", "validation_accuracy", -1)):
        means = {line.get_gid().split()[1]: line.get_ydata() for line in ax.lines if line.get_gid().startswith("mean ")}
        for group, values in means.items():
            each = [float(getattr(run, name)[place][column]) for run in groups[group]]
            assert values[place] == pytest.approx(100 - sum(each) / len(each))


def test_all_committed_runs_have_one_budget_and_the_best_setting(monkeypatch):
    monkeypatch.setattr(compare, "train", None)
    runs = [run for runs in compare.read_groups(COMPARISON, RESULTS).values() for run in runs]
    for name, budget in compare.COMMON.items():
        assert {run.options[name] for run in runs} == {budget}, name
    assert {len(run.metrics) for run in runs} == {40}
    for name in compare.NETWORKS:
        setting = compare.best_setting(COMPARISON, name)
        assert all(setting.items() <= run.options.items() for run in runs if run.options.get("network") == name)


def test_the_table_gives_mean_and_deviation():
    def run(accuracy: float) -> compare.Result:
        options = {"batch_size": 64, "learning_rate": 0.01, "curriculum_start": 0}
        return compare.Result("lstm", options, [], [{}, {}], [{"sequence_length": "5", "accuracy": str(accuracy)}])

    (row,) = compare.table({"lstm": [run(50), run(52)]})
    assert (row["5 pairs"], row["10 pairs"], row["updates"]) == ("51.0 ± 1.4", "", 2 * 141)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("metrics.csv", lambda text: text.replace("seed3", "seed9")),
        ("metrics.csv", lambda text: text[: len(text) // 2]),
        ("metrics.csv", lambda text: text.replace(",0.01,", ",x,", 1)),
        ("tests.csv", lambda text: text.replace("accuracy", "percent", 1)),
        ("tests.csv", lambda text: text.replace(",10,", ",ten,", 1)),
        ("tests.csv", lambda text: "\n".join(text.splitlines()[:-1])),
        ("runs.yaml", lambda text: text[: len(text) // 2]),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, monkeypatch, capsys, file, damage):
    monkeypatch.setattr(compare, "train", None)
    for name in ("metrics.csv", "tests.csv", "runs.yaml"):
        text = (COMPARISON / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(damage(text) if name == file else text, encoding="utf-8")
        assert name != file or damage(text) != text
    assert compare.main(["--output_dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path) in error and "damaged" in error and not (tmp_path / "comparison.csv").exists()


@pytest.mark.parametrize("words", ["--networks lstn", "--seeds -1", "--seeds x"])
def test_invalid_options_train_nothing(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr(compare, "train", None)
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--output_dir", str(tmp_path / "new"), *words.split()])
    assert words.split()[0] in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "new").exists()
