"""The original evaluation sets, and training samples that depend only on seed, epoch, index and sizes."""

import dataclasses
import hashlib
import time

import golden
import numpy as np
import pytest
import torch

import data
from data.loader import prefetch

FIELDS = [field.name for field in dataclasses.fields(data.Samples)]


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(("length", "classes"), [(10, 10), (3, 7), (55, 55)])
def test_evaluation_sets_are_those_of_the_original_implementation(split, length, classes):
    samples = data.evaluation_set(split, length, classes, 10, dataset_seed=42)
    digest = hashlib.sha256()
    with np.load(golden.FOLDER / "published_datasets.npz") as published:
        prefix = f"{split}/L{length}_C{classes}_F10/"
        for name in FIELDS:
            array = getattr(samples, name).numpy()
            np.testing.assert_array_equal(array[:3], published[f"{prefix}first3/{name}"])
            digest.update(array.tobytes())
        assert digest.hexdigest() == str(published[f"{prefix}sha256"])


def test_batches_come_in_order_and_few_are_made_ahead():
    made, ranges = [], [(n, n + 1) for n in range(20)]

    def make(start, stop):
        made.append((start, stop))
        return start, stop

    batches = prefetch(make, ranges, workers=2, depth=3)
    first = next(batches)
    time.sleep(0.1)  # time enough to make all of them
    assert len(made) <= 2 * 3 + 1
    assert [first, *batches] == ranges


def draw(start, stop, epoch=3, length=4, classes=7, features=5, seed=42):
    return data.training_samples(start, stop, epoch, length, classes, features, seed)


def test_training_samples_do_not_depend_on_batches():
    whole = draw(0, 100)
    for start, stop in [(0, 1), (0, 33), (33, 100), (99, 100), (50, 50)]:
        for name in FIELDS:
            assert torch.equal(getattr(draw(start, stop), name), getattr(whole[start:stop], name))


@pytest.mark.parametrize("other", [{"epoch": 4}, {"seed": 43}, {"length": 5}])
def test_training_samples_differ_between_epochs_seeds_and_lengths(other):
    features = draw(0, 50).features
    assert not torch.isin(draw(0, 50, **other).features, features).any()


def test_training_samples_follow_the_task():
    samples = draw(0, 9000)
    assert samples.features.shape == (9000, 4, 5) and samples.features.dtype == torch.float32
    assert samples.features.min() >= 0 and samples.features.max() < 1 and abs(samples.features.mean() - 0.5) < 0.005
    assert all(len(set(row.tolist())) == 4 for row in samples.labels)
    counts = torch.bincount(samples.labels.flatten(), minlength=7) / 9000
    assert (counts - 4 / 7).abs().max() < 0.03  # uniform over the classes
    matches = (samples.features == samples.query.unsqueeze(1)).all(-1)
    assert (matches.sum(1) == 1).all()
    assert (matches.float().mean(0) - 0.25).abs().max() < 0.02  # uniform over the pairs
    assert torch.equal(samples.labels[matches], samples.answer)


def test_the_fixed_set_is_generated_once(monkeypatch):
    calls, generate = [], data.training_samples
    monkeypatch.setattr(data, "training_samples", lambda *arguments: calls.append(arguments) or generate(*arguments))
    sizes = {"sequence_length": 2, "num_classes": 3, "feature_size": 4, "dataset_seed": 5}
    parts = [data.fixed_training_samples(start, start + 3000, epoch=7, **sizes) for start in (0, 3000, 6000)]
    assert len(calls) == 1
    order = torch.from_numpy(data.training_order(7, 5))
    assert torch.equal(torch.cat([part.features for part in parts]), generate(0, 9000, 0, **sizes).features[order])


def test_a_curriculum_lengthens_sequences_up_to_the_full_length():
    grown = [data.training_length(epoch, 6, curriculum_start=2, curriculum_step=3) for epoch in range(4)]
    assert grown == [2, 5, 6, 6]
    assert [data.training_length(epoch, 6) for epoch in range(3)] == [6, 6, 6]
