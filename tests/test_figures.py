"""Figures show the recorded values, files go to the right folder, and invalid input gets one error line."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from golden import PUBLISHED
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

import memorizing_associations_task as task
import models
import plot_memorizing_associations_task as plot
from utils import results
from utils.figures import activity, animation, curves, files

STORED = {store for _, store, _ in activity.ROWS}


def make_trial(pairs=3, classes=10, neurons=20, steps=40, rate=0.1, seed=0) -> activity.Trial:
    """A trial with random numbers, of any size."""
    rng = np.random.default_rng(seed)
    duration = {name: steps * (pairs if name in STORED else 1) for name in models.POPULATIONS}
    features, labels, asked = rng.random((pairs, 10)), rng.permutation(classes)[:pairs], int(rng.integers(pairs))
    return activity.Trial(
        features=features,
        labels=labels,
        query=features[asked],
        answer=int(labels[asked]),
        logits=rng.normal(size=classes),
        readout_weights=rng.normal(size=(classes, neurons)),
        spikes={name: rng.random((time, neurons)) < rate for name, time in duration.items()},
        membranes={name: rng.normal(size=(time, neurons)) for name, time in duration.items()},
        memories=rng.random((pairs, neurons, neurons)) ** 4,
        threshold=0.1,
        num_time_steps=steps,
        readout_steps=30,
    )


@pytest.fixture(scope="module")
def trial():
    return make_trial()


def drawn(figure) -> dict:
    """Artists by the name of what they show."""
    return {artist.get_gid(): artist for artist in figure.findobj() if artist.get_gid()}


def words_of(figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.findobj(Text))


# Contents of figures


def test_the_overview_shows_spikes_rates_inputs_readout_and_logits():
    trial = make_trial(steps=43)  # the last bin of a rate is shorter
    figure = activity.overview(trial)
    artists = drawn(figure)
    for name, spikes in trial.spikes.items():
        time, neuron = artists[f"{name} spikes"].get_xydata().reshape(-1, 3, 2)[:, 0].T
        start = 0 if name in STORED else trial.store_ms
        assert np.array_equal(np.stack([time - start, np.ceil(neuron)], axis=1), np.argwhere(spikes)), name
        assert np.allclose(artists[f"{name} rates"].get_xdata(), spikes.sum(0) / (len(spikes) / 1000))
        values, edges, _ = artists[f"{name} population rate"].get_data()
        assert (edges[0], edges[-1]) == (start, start + len(spikes))
        assert np.isclose((values * np.diff(edges) / 1000).sum() * spikes.shape[1], spikes.sum())
    assert np.array_equal(artists["features"].get_array(), trial.features.T)
    assert np.array_equal(artists["query"].get_array(), trial.query[:, None])
    assert np.array_equal(artists["readout"].get_data().values, trial.spikes["read_value"][-30:].sum(0))
    assert [artists[f"logit {n}"].get_height() for n in range(len(trial.logits))] == pytest.approx(trial.logits)
    words = {text.get_text() for text in figure.findobj(Text)}
    assert {"label", *map(str, trial.labels), f"answer {trial.answer}", f"▾ prediction {trial.logits.argmax()}"} <= words
    assert "Orange: recall, and the pair that is asked for" in words_of(figure)


def test_the_values_of_many_features_are_not_blurred():
    """784 features, more than there are pixels; each pair is black or white."""
    trial = make_trial(pairs=6)
    features = np.repeat([[0.0], [1.0]] * 3, 784, axis=1)
    figure = activity.overview(trial._replace(features=features, query=features[0]))
    (canvas := FigureCanvasAgg(figure)).draw()
    box = drawn(figure)["features"].get_window_extent()
    pixels = np.asarray(canvas.buffer_rgba())[::-1][round(box.y0) + 5 : round(box.y1) - 5, :, 0]
    edges = np.linspace(box.x0, box.x1, 7)
    for pair, value in enumerate((255, 0) * 3):
        inner = pixels[:, int(edges[pair]) + 3 : int(edges[pair + 1]) - 3]
        assert (inner == value).all(), pair


def test_memories_share_one_scale_and_include_the_first_and_last_pair(trial):
    artists = drawn(activity.memory(trial))
    matrix = artists["memory"].axes
    assert (matrix.get_xlabel(), matrix.get_ylabel(), matrix.yaxis_inverted()) == ("Key neuron", "Value neuron", False)
    assert np.array_equal(artists["memory"].get_array(), trial.memories[-1])
    for n, memory in enumerate(trial.memories):
        image = artists[f"memory after pair {n + 1}"]
        assert np.array_equal(image.get_array(), memory) and image.get_clim() == (0, trial.memories.max())
    counts, edges, _ = artists["weights"].get_data()
    assert np.array_equal(counts, np.histogram(trial.memories[-1], edges)[0]) and counts.sum() == trial.memories[-1].size
    names = [name for name in drawn(activity.memory(make_trial(55, 55))) if name.startswith("memory after pair ")]
    assert len(names) == 10 and {"memory after pair 1", "memory after pair 55"} <= set(names)


def test_membranes_are_shown_with_spikes_from_the_most_to_the_least_active_neuron(trial):
    artists = drawn(activity.membranes(trial))
    lines = {gid: artist for gid, artist in artists.items() if " membrane of neuron " in gid}
    for gid, line in lines.items():
        name, neuron = gid.split()[0], int(gid.split()[-1])
        assert np.allclose(line.get_ydata(), trial.membranes[name][:, neuron] / trial.threshold)
        ticks = artists[f"{name} spikes of neuron {neuron}"].get_xdata() - (0 if name in STORED else trial.store_ms)
        assert np.array_equal(ticks, np.flatnonzero(trial.spikes[name][:, neuron]))
    assert len(lines) == 3 * len(models.POPULATIONS)
    spikes = np.zeros((10, 6), bool)
    for neuron, count in enumerate((0, 4, 1, 0, 9, 2)):
        spikes[:count, neuron] = True
    few = trial._replace(spikes={"labels_encoded": spikes})
    for neurons, expected in ((None, [4, 5, 2]), ((0, 3), [1, 2, 0]), ((2, 3), [2, 3])):
        zoom = activity.Zoom(neurons)
        assert activity.representative(few, activity.ROWS[1], zoom).tolist() == expected


def test_zoom_shows_the_given_neurons_and_times(trial):
    zoom = activity.Zoom(neurons=(5, 8), time_range=(30, 130))
    overview = drawn(activity.overview(trial, zoom))
    for name, spikes in trial.spikes.items():
        assert len(overview[f"{name} spikes"].get_xdata()) == 3 * spikes[:, 5:9].sum()
    assert overview["write_key spikes"].axes.get_xlim() == (30, 120)
    assert overview["read_key spikes"].axes.get_xlim() == (120, 130)
    assert np.array_equal(drawn(activity.memory(trial, zoom))["memory"].get_array(), trial.memories[-1, 5:9, 5:9])
    recall = drawn(activity.overview(trial, activity.Zoom(time_range=(125, 160))))
    assert "read_key spikes" in recall and "write_key spikes" not in recall


def test_animated_logits_start_with_the_readout_and_end_at_the_final_logits(trial):
    assert trial.readout_ms == 130
    logits = animation.logits_in_time(trial, np.array([0, 130, 131, 160]))
    assert not logits[:2].any()
    assert np.allclose(logits[2], trial.readout_weights @ trial.spikes["read_value"][10])
    assert np.allclose(logits[3], trial.readout_weights @ trial.readout)


def test_animation_shows_the_past_and_hides_the_future(trial, monkeypatch, tmp_path):
    monkeypatch.setattr(animation, "FRAMES", 5)  # at 0, 40, 80, 120 and 160 ms
    memories = np.stack([np.zeros((20, 20)), *trial.memories, trial.memories[-1]])
    spikes = trial.spikes["write_value"].copy()
    spikes[85:115] ^= True
    other = trial._replace(spikes=trial.spikes | {"write_value": spikes})
    frames, others = animation.animate(trial, memories), animation.animate(other, memories)
    assert [a.tobytes() == b.tobytes() for a, b in zip(frames, others, strict=True)] == [True, True, True, False, False]
    assert len({frame.tobytes() for frame in frames}) == 5
    files.save(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (5, frames[0].size, 0)


# Layout and files


def overlapping(figure) -> list[tuple[str, str]]:
    """Texts that overlap or leave the page."""
    figure.draw_without_rendering()
    beyond = set()  # texts of ticks outside the axis limits are not drawn
    for axis in (axis for axes in figure.findobj(matplotlib.axes.Axes) for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() + axis.get_minor_ticks() if not low <= tick.get_loc() <= high]
        beyond.update(text for tick in ticks for text in (tick.label1, tick.label2))
        if not axis.axes.axison:
            beyond.update(axis.findobj(Text))
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


ONE, MANY, SILENT = (1, 2, 1, 0.1), (55, 55, 30, 0.1), (10, 10, 100, 0.0)
DRAWN = [(activity.overview, sizes) for sizes in (ONE, MANY, SILENT)] + [(activity.memory, sizes) for sizes in (ONE, MANY)]


@pytest.mark.parametrize("draw, sizes", [*DRAWN, (activity.membranes, ONE), (activity.membranes, SILENT)])
def test_texts_do_not_overlap(draw, sizes):
    pairs, classes, neurons, rate = sizes
    trial = make_trial(pairs, classes, neurons, rate=rate)
    zoom = activity.ALL
    if not rate:  # a silent network, mostly recall
        trial = trial._replace(memories=np.zeros_like(trial.memories), logits=np.zeros(classes))
        zoom = activity.Zoom(time_range=(trial.store_ms - 5, trial.duration_ms))
    assert overlapping(draw(trial, zoom)) == []


def test_files_do_not_depend_on_matplotlib_settings_and_leave_them_unchanged(tmp_path):
    settings, trial = dict(matplotlib.rcParams), make_trial(1, 2, 5, 10)
    others = {"font.size": 20, "pdf.fonttype": 3, "figure.dpi": 50, "image.cmap": "jet", "savefig.dpi": 50}
    for kind in files.FORMATS:
        files.save(activity.memory(trial), tmp_path / f"one.{kind}")
        with matplotlib.rc_context(others):
            files.save(activity.memory(trial), tmp_path / f"two.{kind}")
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes(), kind
    assert dict(matplotlib.rcParams) == settings
    pdf = (tmp_path / "one.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf  # TrueType, embedded
    assert matplotlib.image.imread(tmp_path / "one.png").shape[1] == round(183 / 25.4 * 300)


# The script


def run(capsys, *arguments) -> str:
    assert plot.main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_saved_and_printed_numbers_agree_with_the_recording_of_the_network(capsys, tmp_path):
    """Draws a checkpoint of the original implementation."""
    data_file = tmp_path / "data.npz"
    arguments = ("--checkpoint-path", PUBLISHED, "--sequence-length", 3, "--example", 7, "--metrics", "none")
    output = run(capsys, *arguments, "--figure", "memory", "--output", tmp_path / "a.svg", "--save_data", data_file)
    assert "memory after pair 3" in (tmp_path / "a.svg").read_text()
    checkpoint = plot.checkpoints.load(PUBLISHED)
    model = models.build_model(checkpoint["params"], "reference")
    model.load_state_dict(checkpoint["state_dict"])
    sample = plot.data.evaluation_set("test", 3, 3, 10, 42)[7:8]
    with torch.no_grad():
        expected = model(sample.features, sample.labels, sample.query, record=True)
    with np.load(data_file) as saved:
        assert np.array_equal(saved["logits"], expected.logits[0]) and saved["answer"] == sample.answer[0]
        assert np.allclose(saved["readout_weights"] @ saved["readout"], saved["logits"], atol=1e-5)
        assert np.array_equal(saved["memories"], expected.activity["memories"][0])
        for name in models.POPULATIONS:
            assert np.array_equal(saved[f"{name}/spikes"], expected.activity[name][0])
            (line,) = (line for line in output.splitlines() if line.strip().startswith(name))
            assert float(line.split()[1]) == pytest.approx(expected.rates[name].mean().item(), abs=1e-3)
    assert "40.700 %" in output


@pytest.fixture
def recorded():
    """A network with backend auto, its trial for a given sample, and the output of the plain function."""
    model = plot.checkpoints.load_model(PUBLISHED)
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.rand(2, 10, generator=generator), torch.tensor([2, 0])
    query, names = 0.9 * features[1], dict.fromkeys(model.__dict__)  # a corrupted vector
    trial = activity.record(model, features, labels, query, 0)
    assert model.backend == "auto" and dict.fromkeys(model.__dict__) == names
    with torch.no_grad():
        plain = plot.checkpoints.load_model(PUBLISHED, "reference")
        return model, trial, plain(features[None], labels[None], query[None], record=True)


def test_a_given_sample_is_recorded_for_the_figures(recorded):
    _, trial, output = recorded
    assert np.array_equal(trial.logits, output.logits[0]) and (trial.answer, trial.labels.tolist()) == (0, [2, 0])
    assert np.array_equal(trial.query, np.float32(0.9) * trial.features[1])
    assert all(np.array_equal(trial.membranes[name], output.activity["membranes"][name][0]) for name in models.POPULATIONS)
    assert (trial.threshold, trial.num_time_steps, trial.readout_steps) == (0.1, 40, 30)


def test_the_animated_memory_agrees_with_the_network(monkeypatch, recorded):
    monkeypatch.setattr(animation, "FRAMES", 7)  # with 2 pairs of 40 ms: every 20 ms
    model, trial, output = recorded
    memories, after_pairs = animation.memory_in_time(model.dynamics.rule, trial), output.activity["memories"][0].numpy()
    assert not memories[0].any() and np.abs(memories[1]).max() > 0
    assert np.allclose(memories[[2, 4, 5, 6]], after_pairs[[0, 1, 1, 1]], atol=1e-6)


def test_checkpoints_in_one_folder_get_separate_figures_and_a_seed_chooses_the_sample(capsys, tmp_path):
    for name in ("a.pth.tar", "b.v2.pth.tar", plot.checkpoints.BEST):
        shutil.copy(PUBLISHED, tmp_path / name)
    samples = []
    for name, seed in (("a.pth.tar", 1), ("b.v2.pth.tar", 2), (".", 1)):
        printed = run(capsys, "--checkpoint_path", tmp_path / name, "--figure", "memory", "--format", "svg", "--seed", seed)
        samples.append(printed.splitlines()[2])
    assert {path.name for path in tmp_path.glob("*.svg")} == {"a.memory.svg", "b.v2.memory.svg", "model_best.memory.svg"}
    assert samples[0] == samples[2] != samples[1]


@pytest.mark.slow
def test_a_notebooks_matplotlib_backend_is_not_needed(tmp_path):
    """MPLBACKEND may name a module that is not installed, or that opens windows."""
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, plot.__file__, "--metrics", str(write_run(tmp_path / "a"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "metrics.training.png").exists()


# Curves

NUMBERS = ("learning_rate", "train_loss", "train_accuracy", "rate_regularization", "validation_loss", "validation_accuracy")


def write_run(folder, epochs=4, seed=1, **options):
    """A run folder with the files that training and evaluation leave."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    names = (*NUMBERS, *models.POPULATIONS)
    lines = [{"epoch": n} | {name: 50 * rng.random() for name in names} for n in range(1, epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recorded = task.add_options(parser := plot.Parser(""))
    options = {name: parser.get_default(name) for name in recorded} | {"seed": seed, "epochs": epochs} | options
    (folder / "options.yaml").write_text(yaml.safe_dump(options))
    rows = [f"{length},{100 * rng.random()},{rng.random()},10,30" for length in (10, 2, 30)]
    table = "\n".join(["sequence_length,accuracy,loss,trained_length,num_classes", *rows, ""])
    (folder / results.TABLE).write_text(table)
    return folder / "metrics.jsonl"


def test_training_curves_show_every_epoch_over_samples(tmp_path):
    path = write_run(tmp_path / "a")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    figure = curves.training_curves(read(path), 9000)
    artists = drawn(figure)
    for name in ("learning_rate", "train_loss", "validation_accuracy", *models.POPULATIONS):
        line = artists[f"sequence_length 10 {name}"]
        assert line.get_xdata().tolist() == [9, 18, 27, 36]  # thousands of samples
        assert line.get_ydata().tolist() == [epoch[name] for epoch in lines]
    keys = artists["sequence_length 10 read_key"]
    assert keys.axes is artists["sequence_length 10 write_key"].axes and keys.axes.get_ylabel() == "Rate (Hz)"
    legend = {line.get_label(): line.get_color() for line in keys.axes.get_legend().get_lines()}
    assert legend["recall"] == keys.get_color() != legend["store"]


def change(path, numbers=(), **options):
    """Change a run of `write_run`. An option that is None is removed from its record."""
    record = path.with_name("options.yaml")
    options = yaml.safe_load(record.read_text()) | options
    record.write_text(yaml.safe_dump({name: value for name, value in options.items() if value is not None}))
    path.write_text("".join(json.dumps(json.loads(line) | dict(numbers)) + "\n" for line in path.read_text().splitlines()))


def read(*places, against=""):
    return plot.read_curves(list(map(str, places)), "metrics", plot.METRICS, against)


def test_groups_show_their_mean_and_chance_level(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / f"s{seed}", epochs=3 + seed, seed=seed)
    write_run(tmp_path / "w", seed=4, num_classes=30)
    runs = read(tmp_path)  # all runs of a folder
    assert sorted(run.label for run in runs) == ["num_classes 10"] * 3 + ["num_classes 30"]
    figure = curves.training_curves(runs, 1000)
    artists = drawn(figure)
    mean = artists["mean num_classes 10 train_loss"]
    assert list(mean.get_xdata()) == [1, 2, 3, 4]  # the epochs that all three have
    expected = [run.columns["train_loss"][:4] for run in runs if run.num_classes == 10]
    assert np.allclose(mean.get_ydata(), np.mean(expected, axis=0))
    assert all(words in words_of(figure) for words in ("num_classes 10 (3 runs)", "chance, 10, 30 classes"))
    assert artists["chance, 30 classes"].get_ydata() == pytest.approx([100 / 30] * 2)
    assert overlapping(figure) == []


def test_seeds_that_did_not_learn_are_drawn_separately(tmp_path):
    for seed, accuracy in ((1, 90), (2, 94), (3, 10), (4, 55)):  # halfway from 10 % to 100 % is 55 %
        change(write_run(tmp_path / f"s{seed}", seed=seed), {"validation_accuracy": accuracy})
    figure = curves.training_curves(read(tmp_path), 1000)
    artists = drawn(figure)
    for label, mean in (("sequence_length 10", 92), ("sequence_length 10, not learned", 32.5)):
        assert artists[f"mean {label} validation_accuracy"].get_ydata()[0] == mean
    assert curves.NOT_LEARNED in words_of(figure)


def test_runs_are_averaged_only_if_they_differ_in_the_seed_alone(tmp_path, capsys):
    ways = [{}, {"inf_data": 0}, {"dataset_seed": 7}, {"start_epoch": 3}]
    for n, options in enumerate(ways):
        write_run(tmp_path / str(n), seed=n, **options)
    assert len({run.label for run in read(tmp_path)}) == len(ways)
    for name in "ab":  # runs without recorded options are not averaged
        write_run(tmp_path / name, seed=ord(name)).with_name("options.yaml").unlink()
    files = [tmp_path / name / "metrics.jsonl" for name in "ab"]
    assert [run.label for run in read(*files)] == [file.as_posix() for file in files]
    copy = shutil.copytree(tmp_path / "0", tmp_path / "0.bak")
    change(copy / "metrics.jsonl", {"seconds": 3}, epochs=9)
    for where in ([copy, tmp_path / "0"], [tmp_path / "1", tmp_path / "1"]):
        assert "the same run" in refused(capsys, "--metrics", *where)


def test_labels_name_the_differing_options_and_the_group_if_a_seed_repeats():
    def labels(*options, against=""):
        names = ("a/1", "a/2", "b/1", "b/2")
        runs = [results.Result(name, dict(own), [], [], []) for name, own in zip(names, options, strict=False)]
        return results.labels(runs, {"seed": 1, "sequence_length": 10, "w_max": 1.0, "l2": 0}, against)

    assert labels({"seed": 1}, {"seed": 2}) == ["sequence_length 10"] * 2  # nothing differs
    assert labels({"seed": 1, "w_max": 3}, {"seed": 1}) == ["w_max 3", "w_max 1.0"]  # an old record lacks the default
    again = labels({"seed": 1}, {"seed": 2}, {"seed": 1}, {"seed": 3})
    assert again == [f"sequence_length 10, {group}" for group in "aabb"]
    both = [{"seed": seed, "w_max": value, "l2": value} for value in (1, 2) for seed in (1, 2)]
    assert labels(*both) == ["w_max 1, l2 1"] * 2 + ["w_max 2, l2 2"] * 2
    assert labels(*both, against="w_max") == [""] * 4
    both[3]["l2"] = 0
    assert labels(*both, against="w_max") == ["l2 1", "l2 1", "l2 2", "l2 0"]


def test_long_labels_stay_on_the_page(tmp_path):
    for seed, options in ((1, {}), (2, dict.fromkeys("tau_mem tau_trace batch_size learning_rate l2 w_max".split(), 7))):
        write_run(tmp_path / str(seed), seed=seed, **options)
    long = [run._replace(label=f"{run.label} of a $folder$ " * 3) for run in read(tmp_path)]
    for figure in (curves.training_curves(long, 9000), curves.accuracy_by_option(long, "l2")):
        assert overlapping(figure) == []


def test_a_curriculum_is_marked_where_sequences_get_longer(tmp_path):
    write_run(tmp_path / "a", epochs=5, sequence_length=6, curriculum_start=2, curriculum_step=2)
    (run,) = read(tmp_path)
    marks = drawn(curves.training_curves([run], 1000))["sequence_length 6 longer sequences"]
    assert marks.get_xdata().tolist() == [1, 2]  # 2, 4, 6, 6, 6 pairs


def test_a_sweep_over_an_option_gives_a_figure_and_a_table_sorted_by_value(tmp_path, capsys):
    for value, both in {10.0: (10, 11), 0.0: (91, 93), 0.3: (80, 10), 3.0: (95, 97)}.items():
        for seed, accuracy in enumerate(both):
            path = write_run(tmp_path / f"{value}-{seed}", seed=seed)
            change(path, {"validation_accuracy": accuracy, "train_loss": value + seed}, gamma_neg=value)
    printed = run(capsys, "--metrics", tmp_path, "--against", "gamma_neg", "--figure", "option").splitlines()
    table = [" ".join(line.split()[:5]) for line in printed[1:-1]]
    assert table == ["0.0 2 of 2 92.00", "0.3 1 of 2 80.00", "3.0 2 of 2 96.00", "10.0 0 of 2 -"]
    figure = curves.accuracy_by_option(read(tmp_path, against="gamma_neg"), "gamma_neg")
    artists, (ax,) = drawn(figure), figure.axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0.0", "0.3", "3.0", "10.0"]
    assert artists["mean "].get_xydata().tolist() == [[0, 92], [1, 80], [2, 96]]
    (bars,) = (bars for bars in ax.collections if len(bars.get_segments()) == 3)
    assert np.allclose([np.ptp(bar[:, 1]) for bar in bars.get_segments()], [2 * 2**0.5, 0, 2 * 2**0.5])
    assert sorted(artists[" x"].get_ydata()) == [10, 10, 11]


def test_linked_runs_are_found_once_and_unreadable_folders_are_named(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "elsewhere")
    (folder := tmp_path / "runs").mkdir()
    write_run(folder / "own", seed=2)
    for name, to in (("link", tmp_path / "elsewhere"), ("latest", folder / "own"), ("circle", folder)):
        (folder / name).symlink_to(to)
    assert [result.name for result in results.read_results(folder)] == ["link", "own"]
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    assert f"{folder / 'gone'}: is a broken link" in refused(capsys, "--metrics", folder)
    (folder / "gone").unlink()
    iterdir = type(folder).iterdir

    def locked(path):
        return iterdir(path) if path.name != "own" else os.listdir("/nowhere")

    monkeypatch.setattr(type(folder), "iterdir", locked)
    assert f"{folder / 'own'}: " in refused(capsys, "--metrics", folder)


def test_accuracy_by_length_shows_chance_and_the_trained_length(capsys, tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"s{seed}", seed=seed)
    runs = plot.read_curves([tmp_path], "tests", ["sequence_length", "accuracy"])
    (one,) = plot.read_curves([tmp_path / "s1" / results.TABLE], "tests", ["accuracy"])  # a file
    assert (one.columns["accuracy"] == runs[0].columns["accuracy"]).all() and one.trained_length == 10
    figure = curves.accuracy_by_length(runs)
    artists = drawn(figure)
    guessing = artists["guessing"].get_xydata()
    assert np.allclose(guessing.prod(axis=1), 100) and (guessing[0, 0], guessing[-1, 0]) == (2, 30)
    mean = artists["mean sequence_length 10 accuracy"]
    assert list(mean.get_xdata()) == [2, 10, 30]
    tested = [run.columns["accuracy"][[1, 0, 2]] for run in runs]  # in the order of their length
    assert np.allclose(mean.get_ydata(), np.mean(tested, axis=0))
    assert artists["chance, 30 classes"].get_ydata() == pytest.approx([100 / 30] * 2)
    assert artists["trained length 10"].get_xdata() == [10, 10]
    assert overlapping(figure) == []
    for where in ((), ("--output", f"{tmp_path}/new.v2/")):  # beside the input, then in a new folder
        run(capsys, "--csv", tmp_path, "--metrics", tmp_path, "--format", "svg", *where)
    for folder in (tmp_path, tmp_path / "new.v2"):
        assert {path.name for path in folder.glob("*.svg")} == {"training.svg", "lengths.svg"}


# Invalid input


def refused(capsys, *arguments) -> str:
    """The one line that a refused command prints."""
    assert plot.main(list(map(str, arguments))) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], ["--checkpoint_path", "--metrics", "--csv"]),
        (["--thr", "0.2", "--memory-size", "50"], ["thr 0.2 (checkpoint: 0.1)", "memory_size 50 (checkpoint: 20)"]),
        (["--memory_size", "5", "--check_params", "0"], [str(PUBLISHED), "size mismatch"]),
        (["--sequence_length", "4"], ["--sequence_length 4", "knows 3 labels"]),
        (["--sequence_length", "2,3"], ["--sequence_length", "one length"]),
        (["--neurons", "16", "18"], ["--neurons 16 18", "< 16"]),
        (["--time_range", "120", "130"], ["--time_range 120 130", "< 120"]),
        (["--output", "figure.jpg", "--figure", "memory"], ["--output figure.jpg", ".png", ".pdf", ".svg"]),
        (["--output", "one.png"], ["--output one.png", "--figure overview, memory, membranes"]),
        (["--output", f"{PUBLISHED}/figures"], [f"{PUBLISHED}/figures", "cannot be written"]),
        (["--save_data", f"{PUBLISHED}/data.npz"], ["data.npz", "cannot be written"]),
        (["--figure", "training"], ["--figure training", "--metrics"]),
        (["--against", "tau_mem"], ["--against tau_mem", "--metrics"]),
    ],
)
def test_wrong_options_are_named_before_anything_is_computed(capsys, monkeypatch, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.MemorizingAssociations, "forward", None)
    message = refused(capsys, *(["--checkpoint_path", PUBLISHED, *arguments] if arguments else []))
    assert all(word in message for word in named), message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "", "{}\n", '{"epoch": 0}\n', "[1]\n", "\x80", "a: 1"])
@pytest.mark.parametrize(
    "option, name", [("--metrics", "metrics.jsonl"), ("--csv", "table.csv"), ("--metrics", "folder/x.jsonl")]
)
def test_unusable_metrics_and_tables_are_named(capsys, tmp_path, option, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    asked = path if path.parent == tmp_path else path.parent
    assert str(asked) in refused(capsys, option, asked)
