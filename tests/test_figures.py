"""What is drawn is what was recorded; every file opens and is the same each time; what cannot be drawn is said in one line."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import golden
import matplotlib
import numpy as np
import pytest
import torch
import yaml
from matplotlib.text import Text

import models
import plot_memorizing_associations_task as plot
from models import POPULATIONS
from utils import figures
from utils.options import CURRICULUM, MODEL, TRAINING

PUBLISHED = golden.FOLDER / "published_format_checkpoint.pth.tar"
SCRIPT = Path(plot.__file__)


def make_trial(pairs=3, classes=10, neurons=20, steps=40, rate=0.1, seed=0) -> figures.Trial:
    """A trial of arbitrary numbers, of any size."""
    rng = np.random.default_rng(seed)

    def activity(name, inputs):
        time = inputs * steps
        return figures.Activity(name, rng.random((time, neurons)) < rate, rng.normal(size=(time, neurons)).astype(np.float32))

    populations = [
        figures.Population(title, activity(store, pairs), activity(recall, 1) if recall else None)
        for title, store, recall in plot.ROWS
    ]
    features, labels = rng.random((pairs, 10)), rng.permutation(classes)[:pairs]
    memories = rng.random((pairs, neurons, neurons)) ** 4
    asked = int(rng.integers(pairs))
    logits = rng.normal(size=classes)
    return figures.Trial(
        features, labels, features[asked], int(labels[asked]), logits, memories, populations, 0.1, steps, min(30, steps)
    )


def drawn(figure) -> dict:
    """Artists by the name of what they show."""
    return {artist.get_gid(): artist for artist in figure.findobj() if artist.get_gid()}


def activities(trial):
    """Each activity, and the time at which its phase starts, ms."""
    for population in trial.populations:
        yield population.store, 0
        if population.recall:
            yield population.recall, trial.store_ms


@pytest.fixture(scope="module")
def trial():
    return make_trial()


# --- What is drawn ------------------------------------------------------------------------------------------------------------


def test_rasters_show_every_spike_once(trial):
    artists = drawn(figures.overview(trial))
    for activity, start in activities(trial):
        shown = artists[f"{activity.name} spikes"].get_xydata() - [start, 0]
        assert np.array_equal(shown, np.argwhere(activity.spikes)), activity.name
    assert sum(name.endswith(" spikes") for name in artists) == len(POPULATIONS)


def test_rates_are_spikes_per_second(trial):
    artists = drawn(figures.overview(trial))
    for activity, start in activities(trial):
        seconds = len(activity.spikes) / 1000
        rates = artists[f"{activity.name} rates"].get_xdata()
        assert np.allclose(rates, activity.spikes.sum(0) / seconds)
        values, edges, _ = artists[f"{activity.name} population rate"].get_data()
        assert (edges[0], edges[-1]) == (start, start + len(activity.spikes))
        assert np.isclose((values * np.diff(edges) / 1000).sum() * activity.spikes.shape[1], activity.spikes.sum())


def test_inputs_readout_and_logits_are_shown(trial):
    figure = figures.overview(trial)
    artists = drawn(figure)
    assert np.array_equal(artists["features"].get_array(), trial.features.T)
    assert np.array_equal(artists["query"].get_array(), trial.query[:, None])
    last = trial.populations[-1].recall.spikes
    assert np.array_equal(artists["readout"].get_data().values, last[-trial.readout_steps :].sum(0))
    assert [artists[f"logit {n}"].get_height() for n in range(len(trial.logits))] == pytest.approx(trial.logits)
    words = {text.get_text() for text in figure.findobj(Text)}
    assert {*map(str, trial.labels), f"answer {trial.answer}", f"prediction {trial.logits.argmax()}"} <= words


def test_memories_are_shown_on_one_scale(trial):
    artists = drawn(figures.memory(trial))
    assert np.array_equal(artists["memory"].get_array(), trial.memories[-1])
    for n, memory in enumerate(trial.memories):
        image = artists[f"memory after pair {n + 1}"]
        assert np.array_equal(image.get_array(), memory)
        assert image.get_clim() == (0, trial.memories.max())
    counts, edges, _ = artists["weights"].get_data()
    assert np.array_equal(counts, np.histogram(trial.memories[-1], edges)[0])
    assert counts.sum() == trial.memories[-1].size


def test_of_many_pairs_some_memories_are_shown_with_first_and_last():
    names = [name for name in drawn(figures.memory(make_trial(pairs=55, classes=55))) if name.startswith("memory after pair ")]
    assert len(names) == 10
    assert {"memory after pair 1", "memory after pair 55"} <= set(names)


def test_membranes_are_shown_with_their_spikes(trial):
    artists = drawn(figures.membranes(trial))
    shown = 0
    for activity, start in activities(trial):
        for neuron in range(activity.spikes.shape[1]):
            if line := artists.get(f"{activity.name} membrane of neuron {neuron}"):
                shown += 1
                assert np.allclose(line.get_ydata(), activity.membrane[:, neuron] / trial.threshold)
                ticks = artists[f"{activity.name} spikes of neuron {neuron}"]
                assert np.array_equal(ticks.get_xdata() - start, np.flatnonzero(activity.spikes[:, neuron]))
    assert shown == 3 * len(POPULATIONS)


def test_neurons_with_membranes_span_most_to_least_active_and_prefer_those_that_spike():
    spikes = np.zeros((10, 6), bool)
    for neuron, count in enumerate((0, 4, 1, 0, 9, 2)):
        spikes[:count, neuron] = True
    population = figures.Population("", figures.Activity("", spikes, spikes), None)
    assert figures.representative(population, figures.ALL, 3).tolist() == [4, 5, 2]
    assert figures.representative(population, figures.Zoom(neurons=(0, 3)), 3).tolist() == [1, 2, 0]
    assert figures.representative(population, figures.Zoom(neurons=(2, 3)), 3).tolist() == [2, 3]


def test_zoom_shows_the_neurons_and_times_asked_for(trial):
    zoom = figures.Zoom(neurons=(5, 8), time_range=(30, 130))
    overview = drawn(figures.overview(trial, zoom))
    for activity, _ in activities(trial):
        assert len(overview[f"{activity.name} spikes"].get_xdata()) == activity.spikes[:, 5:9].sum()
    assert overview["write_key spikes"].axes.get_xlim() == (30, 120)
    assert overview["read_key spikes"].axes.get_xlim() == (120, 130)
    assert np.array_equal(drawn(figures.memory(trial, zoom))["memory"].get_array(), trial.memories[-1, 5:9, 5:9])
    recall_only = drawn(figures.overview(trial, figures.Zoom(time_range=(125, 160))))
    assert "read_key spikes" in recall_only and "write_key spikes" not in recall_only


# --- How it is drawn ----------------------------------------------------------------------------------------------------------


def overlapping(figure) -> list[tuple[str, str]]:
    """Texts that lie on each other, or leave the page."""
    figure.draw_without_rendering()
    beyond = set()  # ticks outside the limits of their axis keep a text, which is not drawn
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() + axis.get_minor_ticks() if not low <= tick.get_loc() <= high]
        beyond.update(text for tick in ticks for text in (tick.label1, tick.label2))
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in beyond]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    width, height = figure.bbox.size
    outside = [(a, "page") for a, box in boxes if min(box.x0, box.y0) < -0.5 or box.x1 > width + 0.5 or box.y1 > height + 0.5]
    collide = [
        (a, b)
        for (a, p), (b, q) in itertools.combinations(boxes, 2)
        if min(p.x1, q.x1) - max(p.x0, q.x0) > 0.5 and min(p.y1, q.y1) - max(p.y0, q.y0) > 1.5
    ]
    return outside + collide


@pytest.mark.parametrize("pairs, classes, neurons", [(1, 2, 1), (5, 10, 100), (55, 55, 30)])
@pytest.mark.parametrize("draw", [figures.overview, figures.memory, figures.membranes])
def test_no_text_lies_on_another(draw, pairs, classes, neurons):
    assert overlapping(draw(make_trial(pairs, classes, neurons))) == []


@pytest.mark.parametrize("draw", [figures.overview, figures.memory, figures.membranes])
def test_a_silent_network_can_be_drawn(draw):
    trial = make_trial(rate=0.0)
    draw(trial._replace(memories=np.zeros_like(trial.memories), logits=np.zeros(10))).draw_without_rendering()


@pytest.mark.parametrize("draw", [figures.overview, figures.memory, figures.membranes])
def test_figures_have_the_width_of_two_columns_and_leave_no_trace(draw, trial):
    import matplotlib.pyplot as plt

    settings, windows = dict(matplotlib.rcParams), plt.get_fignums()
    figure = draw(trial)
    assert figure.get_figwidth() * 25.4 == pytest.approx(183)
    assert dict(matplotlib.rcParams) == settings
    assert plt.get_fignums() == windows


@pytest.mark.parametrize("kind", figures.FORMATS)
def test_files_are_the_same_whatever_the_settings_of_the_user(kind, trial, tmp_path):
    figures.save(figures.memory(trial), tmp_path / f"one.{kind}")
    with matplotlib.rc_context({"font.size": 20, "pdf.fonttype": 3, "figure.dpi": 50, "image.cmap": "jet", "savefig.dpi": 50}):
        figures.save(figures.memory(trial), tmp_path / f"two.{kind}")
    assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()


# --- The script ---------------------------------------------------------------------------------------------------------------


def run(capsys, *arguments) -> str:
    assert plot.main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_published_checkpoint_is_drawn_as_recorded(capsys, tmp_path):
    """The whole way: the numbers saved and printed are those that the network records."""
    output = run(
        capsys, "--checkpoint_path", PUBLISHED, "--output", tmp_path, "--save_data", tmp_path / "data.npz", "--example", 7
    )
    assert {path.name for path in tmp_path.iterdir()} == {"overview.png", "memory.png", "membranes.png", "data.npz"}

    checkpoint = plot.checkpoints.load(PUBLISHED)
    model = models.build_model(checkpoint["params"])
    model.load_state_dict(checkpoint["state_dict"])
    sample = plot.data.evaluation_set("test", 2, 3, 10, 42)[7:8]
    with torch.no_grad():
        expected = model(sample.features, sample.labels, sample.query, record=True)
    with np.load(tmp_path / "data.npz") as saved:
        assert np.array_equal(saved["features"], sample.features[0])
        assert np.array_equal(saved["logits"], expected.logits[0])
        assert saved["answer"] == sample.answer[0]
        assert np.allclose(saved["memories"][-1], expected.activity["memory"][0], atol=1e-6)
        for name in POPULATIONS:
            assert np.array_equal(saved[f"{name}/spikes"], expected.activity[name][0])
            assert np.array_equal(saved[f"{name}/rates"], expected.rates[name][0])
            (line,) = (line for line in output.splitlines() if line.strip().startswith(name))
            assert float(line.split()[1]) == pytest.approx(expected.rates[name].mean().item(), abs=1e-3)
    assert "40.700 %" in output


def test_another_length_than_trained_on_can_be_drawn(capsys, tmp_path):
    where = ("--save-data", tmp_path / "3.npz", "--output", tmp_path / "3.png", "--figure", "memory")
    run(capsys, "--checkpoint-path", PUBLISHED, "--sequence-length", 3, *where)
    with np.load(tmp_path / "3.npz") as saved:
        assert saved["labels"].shape == (3,)


def test_seed_chooses_a_sample(capsys, tmp_path):
    arguments = ("--checkpoint_path", PUBLISHED, "--figure", "memory", "--output", tmp_path / "a.png")
    first, second, again = (run(capsys, *arguments, "--seed", seed) for seed in (1, 2, 1))
    assert first == again != second
    assert "sample            5 of" in run(capsys, *arguments, "--seed", 1, "--example", 5)


def test_every_format_opens_and_another_process_writes_the_same_bytes(capsys, tmp_path):
    arguments = ["--checkpoint_path", str(PUBLISHED), "--figure", "overview", "--format"]
    for kind in figures.FORMATS:
        run(capsys, *arguments, kind, "--output", tmp_path / "here")
    again = "import plot_memorizing_associations_task as plot\n" + "".join(
        f"plot.main({[*arguments, kind, '--output', 'there']!r})\n" for kind in figures.FORMATS
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(SCRIPT.parent), "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", again], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    png, pdf, svg = (tmp_path / "here" / f"overview.{kind}" for kind in ("png", "pdf", "svg"))
    for path in (png, pdf, svg):
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name
    assert matplotlib.image.imread(png).shape[1] == round(183 / 25.4 * 300)
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF") and b"%%EOF" in content[-10:]
    assert b"/FontFile2" in content and b"/Type3" not in content  # TrueType, embedded
    assert b"CreationDate" not in content
    root = ElementTree.parse(svg).getroot()
    assert root.tag.endswith("svg") and root.get("width").endswith("pt")
    assert {"write_key rates", "logit 2"} <= {element.get("id") for element in root.iter()}


def test_output_may_be_a_file(capsys, tmp_path):
    run(capsys, "--checkpoint_path", PUBLISHED, "--output", tmp_path / "new" / "one.PDF")
    run(capsys, "--checkpoint_path", PUBLISHED, "--output", tmp_path / "two.svg", "--figure", "memory")
    assert (tmp_path / "new" / "one.PDF").read_bytes().startswith(b"%PDF")
    assert "memory after pair 1" in (tmp_path / "two.svg").read_text()
    assert len(list(tmp_path.iterdir())) == 2


def test_every_published_option_is_accepted_in_both_spellings():
    published = [*(option.name for option in MODEL), "checkpoint_path", "check_params", "dataset_seed", "seed"]
    parser = plot.Parser("", plot.GROUPS)
    accepted = {spelling for action in parser._actions for spelling in action.option_strings}
    assert {f"--{name}" for name in published} | {f"--{name.replace('_', '-')}" for name in published} <= accepted


# --- Curves -------------------------------------------------------------------------------------------------------------------


def write_run(folder: Path, epochs=4, seed=1, **options) -> Path:
    """A run folder with the files that training leaves."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    names = ("learning_rate", "train_loss", "train_accuracy", "rate_regularization", "validation_loss", "validation_accuracy")
    lines = [
        {"epoch": n} | {name: rng.random() for name in names} | {"rates": {name: 50 * rng.random() for name in POPULATIONS}}
        for n in range(epochs)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {option.name: option.default for option in (*MODEL, *TRAINING, *CURRICULUM)} | {"seed": seed, "epochs": epochs}
    (folder / "options.yaml").write_text(yaml.safe_dump(record | options))
    rows = [f"{length},{100 * rng.random()},{rng.random()},10,30" for length in (10, 2, 30)]
    (folder / "table.csv").write_text("\n".join(["sequence_length,accuracy,loss,trained_length,num_classes", *rows, ""]))
    return folder / "metrics.jsonl"


def curves_of(paths, read) -> list[figures.Curves]:
    records = [plot.read_record(path) for path in paths]
    return [read(*each) for each in zip(paths, plot.labels(paths, records), records, strict=True)]


def test_training_curves_show_every_epoch(tmp_path):
    path = write_run(tmp_path / "a")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    artists = drawn(figures.training_curves(curves_of([path], plot.read_metrics)))
    for name in ("train_loss", "validation_accuracy", "learning_rate"):
        assert artists[f"sequence_length 10 {name}"].get_ydata().tolist() == [line[name] for line in lines]
    for name in POPULATIONS:
        line = artists[f"sequence_length 10 {name}"]
        assert line.get_ydata().tolist() == [line["rates"][name] for line in lines]
        assert line.get_xdata().tolist() == [1, 2, 3, 4]
    assert artists["chance of 10 classes"].get_ydata() == [10, 10]


def test_runs_that_differ_in_the_seed_give_mean_and_range(tmp_path):
    same = [write_run(tmp_path / f"s{seed}", epochs=3 + seed, seed=seed) for seed in (1, 2, 3)]
    other = write_run(tmp_path / "w", seed=4, w_max=0.5)
    runs = curves_of([*same, other], plot.read_metrics)
    assert [run.label for run in runs] == ["w_max 1.0"] * 3 + ["w_max 0.5"]
    figure = figures.training_curves(runs)
    mean = drawn(figure)["w_max 1.0 mean train_loss"]
    assert list(mean.get_xdata()) == [1, 2, 3, 4]  # where all of them have values
    assert np.allclose(mean.get_ydata(), np.mean([run.columns["train_loss"][:4] for run in runs[:3]], axis=0))
    assert any("mean and range of 3 runs" in text.get_text() for text in figure.findobj(Text))


def test_accuracy_is_shown_against_length_with_chance_and_trained_length(tmp_path):
    paths = [write_run(tmp_path / f"s{seed}", seed=seed).with_name("table.csv") for seed in (1, 2)]
    runs = curves_of(paths, plot.read_table)
    artists = drawn(figures.accuracy_by_length(runs))
    assert list(artists["sequence_length 10 mean accuracy"].get_xdata()) == [2, 10, 30]
    expected = np.mean([run.columns["accuracy"] for run in runs], axis=0)
    assert np.allclose(artists["sequence_length 10 mean accuracy"].get_ydata(), expected)
    assert artists["chance of 30 classes"].get_ydata() == pytest.approx([100 / 30] * 2)
    assert artists["sequence_length 10 trained length"].get_xdata() == [10, 10]


def test_no_text_of_curves_lies_on_another(tmp_path):
    paths = [write_run(tmp_path / f"{n}", seed=n, memory_size=50 * n) for n in (1, 2, 3)]
    assert overlapping(figures.training_curves(curves_of(paths, plot.read_metrics))) == []
    tables = [path.with_name("table.csv") for path in paths]
    assert overlapping(figures.accuracy_by_length(curves_of(tables, plot.read_table))) == []


def test_script_draws_curves(capsys, tmp_path):
    path = write_run(tmp_path / "a")
    run(capsys, "--metrics", path, "--csv", path.with_name("table.csv"), "--save_data", tmp_path / "d.npz", "--format", "svg")
    assert {file.name for file in (tmp_path / "a" / "figures").iterdir()} == {"training.svg", "lengths.svg"}
    with np.load(tmp_path / "d.npz") as saved:
        assert saved[f"{path}/epoch"].tolist() == [1, 2, 3, 4]


# --- What cannot be drawn -----------------------------------------------------------------------------------------------------


def refused(capsys, *arguments) -> tuple[int, str]:
    """Exit status and the one line of a command that must not succeed."""
    try:
        status = plot.main(list(map(str, arguments)))
    except SystemExit as end:
        status = end.code
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message, message
    return status, message


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], ["--checkpoint_path", "--metrics", "--csv"]),
        (["--thr", "0.2", "--memory-size", "50"], ["thr 0.2 (checkpoint: 0.1)", "memory_size 50 (checkpoint: 20)"]),
        (["--sequence_length", "4"], ["--sequence_length 4", "--num_classes 3"]),
        (["--sequence_length", "2", "3"], ["--sequence_length"]),
        (["--example", "2000"], ["--example", "1999"]),
        (["--neurons", "3"], ["--neurons", "first", "last"]),
        (["--neurons", "16", "18"], ["--neurons 16 18", "< 16"]),
        (["--neurons", "8", "2"], ["--neurons 8 2"]),
        (["--time_range", "120", "130"], ["--time_range 120 130", "< 120"]),
        (["--time_range", "0", "nan"], ["--time_range"]),
        (["--time_range", "-5", "10"], ["--time_range"]),
        (["--output", "figure.jpg"], ["--output figure.jpg", ".png", ".pdf", ".svg"]),
        (["--figure", "training"], ["--figure training", "--metrics"]),
        (["--figure", "raster"], ["--figure", "overview"]),
        (["--format", "gif"], ["--format", "png"]),
        (["--tau", "3"], ["--tau"]),
    ],
)
def test_wrong_options_are_named(capsys, arguments, named):
    status, message = refused(capsys, *(["--checkpoint_path", PUBLISHED, *arguments] if arguments else []))
    assert status == 2
    assert all(word in message for word in named), message


def test_differing_options_can_be_forced(capsys, tmp_path):
    where = ("--output", tmp_path / "a.png", "--figure", "memory")
    run(capsys, "--checkpoint_path", PUBLISHED, "--thr", 0.2, "--check_params", 0, *where)
    status, message = refused(capsys, "--checkpoint_path", PUBLISHED, "--memory_size", 5, "--check_params", 0)
    assert status == 1 and str(PUBLISHED) in message


@pytest.mark.parametrize("kind", ["missing", "empty", "foreign", "cut short", "flipped bit", "folder"])
def test_checkpoints_that_cannot_be_used_are_named(capsys, tmp_path, kind):
    path = tmp_path / "checkpoint.pth.tar"
    content = bytearray(PUBLISHED.read_bytes())
    if kind == "empty":
        path.touch()
    elif kind == "foreign":
        torch.save({"weights": torch.ones(3)}, path)
    elif kind == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flipped bit":
        content[content.index(np.ones(16, np.float32).tobytes())] ^= 1  # inside a tensor
        path.write_bytes(content)
    elif kind == "folder":
        path.mkdir()
    status, message = refused(capsys, "--checkpoint_path", path)
    assert status == 1 and str(path) in message


@pytest.mark.parametrize(
    "content", [None, "", "{}\n", '{"epoch": 0}\n', "[1]\n", '{"epoch": 0, "rates": {}}\n', "\x80", "a: 1"]
)
@pytest.mark.parametrize("option", ["--metrics", "--csv"])
def test_metrics_and_tables_that_cannot_be_used_are_named(capsys, tmp_path, option, content):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    status, message = refused(capsys, option, path)
    assert status == 1 and str(path) in message


def test_what_cannot_be_written_is_named(capsys, tmp_path):
    (tmp_path / "file").touch()
    for option in ("--output", "--save_data"):
        target = tmp_path / "file" / "figure.png"
        arguments = ("--checkpoint_path", PUBLISHED, "--output", tmp_path, option, target)
        status, message = refused(capsys, *arguments)
        assert status == 1 and str(target) in message


def test_show_without_a_display_says_so_after_writing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "agg")
    path = shutil.copy(PUBLISHED, tmp_path)
    status, message = refused(capsys, "--checkpoint_path", path, "--show", "--figure", "memory")
    assert status == 1 and "--show" in message
    assert (tmp_path / "figures" / "memory.png").exists()
