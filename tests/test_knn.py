import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from test_ranks import write_images
from test_runs import train as run
from torch import nn
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_pil_image

from snclr.datasets.files import FileImages
from snclr.datasets.folders import Paths
from snclr.datasets.images import ResidentImages
from snclr.evaluation import features as frozen
from snclr.evaluation import knn
from snclr.loader import whole_images

CPU = torch.device("cpu")
MOMENTS = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
LOAD = partial(whole_images, size=8, device=CPU, workers=0)


def accuracy(embed, train, val, k):
    """Top-1 of one weighted vote."""
    return knn.accuracy(embed, train, val, LOAD, CPU, votes={"one": knn.Vote(k, 0.07)})["one"]


def classify(queries, features, labels, num_classes, *, k, temperature, chunk=1024):
    return knn.vote(*knn.nearest(queries, features, labels, k, chunk), num_classes, temperature)


def scores_by_loops(queries, features, labels, num_classes, k, temperature):
    """Score of class c = sum of exp(cosine / temperature) over those of the k nearest that are of
    class c.
    """
    scores = torch.zeros(len(queries), num_classes, dtype=torch.float64)
    for i, query in enumerate(queries.double()):
        cosines = [
            (float(query @ feature), int(label))
            for feature, label in zip(features.double(), labels, strict=True)
        ]
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            scores[i, label] += math.exp(cosine / temperature)
    return scores


def problem(num_queries=9, num_features=40, num_classes=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_features)
    queries, features = (
        normalize(torch.randn(n, 6, generator=generator, dtype=dtype))
        for n in (num_queries, num_features)
    )
    return (
        queries,
        features,
        torch.randint(0, num_classes, (num_features,), generator=generator),
        num_classes,
    )


@pytest.fixture
def on_ranks(monkeypatch):
    """on_ranks(n, function): function(rank) on n threads as ranks, their gathers joined; the list
    of results.
    """

    def on_ranks(num_ranks, function):
        here, barrier, slots = (
            threading.local(),
            threading.Barrier(num_ranks, timeout=300),
            [None] * num_ranks,
        )

        def all_gather(x):
            slots[here.rank] = x
            barrier.wait()
            gathered = list(slots)
            barrier.wait()
            assert len({part.shape for part in gathered}) == 1, "ranks gather unequal shapes"
            return torch.cat(gathered)

        def as_rank(rank):
            here.rank = rank
            try:
                return function(rank)
            except BaseException:
                barrier.abort()
                raise

        for module in (knn, frozen):
            monkeypatch.setattr(module, "rank", lambda: here.rank)
            monkeypatch.setattr(module, "world_size", lambda: num_ranks)
        monkeypatch.setattr(knn, "all_gather", all_gather)
        with ThreadPoolExecutor(num_ranks) as pool:
            futures = [pool.submit(as_rank, rank) for rank in range(num_ranks)]
        errors = [future.exception() for future in futures if future.exception()]
        for error in sorted(
            errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)
        ):
            raise error  # the first error, not the timeouts that follow from it
        return [future.result() for future in futures]

    return on_ranks


# -- the vote ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 20, 40, 100])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_scores_equal_the_loops(k, temperature, chunk):
    scores = classify(*problem(), k=k, temperature=temperature, chunk=chunk)
    torch.testing.assert_close(
        scores, scores_by_loops(*problem(), k, temperature), rtol=1e-11, atol=1e-12
    )


def test_scores_of_float32_features_equal_the_loops_to_rounding():
    arguments = problem(num_queries=50, num_features=300, dtype=torch.float32)
    scores = classify(*arguments, k=20, temperature=0.07)
    torch.testing.assert_close(
        scores.double(), scores_by_loops(*arguments, 20, 0.07), rtol=1e-4, atol=1e-6
    )


def test_one_neighbour_is_the_label_of_the_nearest():
    queries, features, labels, num_classes = problem()
    scores = classify(queries, features, labels, num_classes, k=1, temperature=0.07)
    assert scores.argmax(dim=1).tolist() == labels[(queries @ features.T).argmax(dim=1)].tolist()
    assert ((scores > 0).sum(dim=1) == 1).all()


def test_a_single_stored_feature_is_enough():
    queries, features, labels, num_classes = problem(num_features=1)
    scores = classify(queries, features, labels, num_classes, k=20, temperature=0.5)
    torch.testing.assert_close(
        scores, scores_by_loops(queries, features, labels, num_classes, 20, 0.5)
    )


def test_a_close_neighbour_outvotes_two_distant_ones():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    scores = classify(
        torch.tensor([[1.0, 0.0]]), features, torch.tensor([0, 1, 1]), 2, k=3, temperature=0.07
    )
    torch.testing.assert_close(scores, torch.tensor([[math.exp(1 / 0.07), 2.0]]))


def test_an_opposite_feature_still_votes():
    scores = classify(
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[-1.0, 0.0]]),
        torch.tensor([1]),
        2,
        k=5,
        temperature=1.0,
    )
    torch.testing.assert_close(scores, torch.tensor([[0.0, math.exp(-1)]]))


def test_autocast_does_not_coarsen_the_scores():
    arguments = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = classify(*arguments, k=5, temperature=0.07)
    torch.testing.assert_close(inside, classify(*arguments, k=5, temperature=0.07))


@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize("shares", [[20, 20], [38, 1, 1], [13, 0, 27]])
def test_ranks_with_shares_of_the_features_give_the_scores_of_one(on_ranks, k, shares):
    queries, features, labels, num_classes = problem()
    feature_shares, label_shares = features.split(shares), labels.split(shares)

    def on_rank(rank):
        return classify(
            queries,
            feature_shares[rank],
            label_shares[rank],
            num_classes,
            k=k,
            temperature=0.07,
            chunk=4,
        )

    expected = scores_by_loops(queries, features, labels, num_classes, k, 0.07)
    for scores in on_ranks(len(shares), on_rank):
        torch.testing.assert_close(scores, expected, rtol=1e-11, atol=1e-12)


# -- encoding and accuracy ---------------------------------------------------------------------


def coloured(labels, seed=0, truth=None):
    """8-px pictures of the class's colour with faint noise, labelled `truth` (the class itself if
    None).
    """
    rng = np.random.default_rng(seed)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
    images = colours[labels][:, :, None, None] + rng.integers(-20, 21, (len(labels), 3, 8, 8))
    return ResidentImages(
        images.astype(np.uint8),
        np.array(labels if truth is None else truth),
        ["r", "g", "b"],
        MOMENTS,
    )


def mean_colour(x):
    return x.mean(dim=(2, 3))


TRAIN = coloured([0, 1, 2] * 10)


def test_encoding_gives_features_and_labels_in_order():
    features, labels = frozen.encode_share(lambda x: 5 * mean_colour(x), TRAIN, LOAD)
    pixels = (TRAIN.images.double() / 255 - TRAIN.mean.view(3, 1, 1)) / TRAIN.std.view(3, 1, 1)
    torch.testing.assert_close(features.double(), 5 * pixels.mean(dim=(2, 3)), rtol=0, atol=1e-5)
    assert torch.equal(labels, TRAIN.labels)


def test_accuracy_is_the_percentage_of_right_votes():
    val = coloured([0, 1, 2, 0, 1, 2, 0, 1], seed=1, truth=[0, 1, 2, 0, 1, 2, 1, 0])
    assert accuracy(mean_colour, TRAIN, val, k=5) == 75.0
    assert accuracy(mean_colour, TRAIN, TRAIN, k=100) == 100.0


def test_images_without_a_label_neither_vote_nor_count():
    val = coloured([0, 1, 2, 0, 1, 2, 0, 1], seed=1, truth=[0, 1, 2, 0, 1, 2, 1, -1])
    train = coloured([0, 1, 2] * 10 + [0, 1, 2], truth=[0, 1, 2] * 10 + [-1, -1, -1])
    assert accuracy(mean_colour, train, val, k=5) == pytest.approx(100 * 6 / 7)


def test_accuracy_without_information_is_chance():
    val = coloured([0, 1, 2] * 4, seed=1)
    assert accuracy(lambda x: torch.ones(len(x), 2), TRAIN, val, k=30) == pytest.approx(100 / 3)


@pytest.mark.parametrize("num_ranks, num_val", [(2, 8), (3, 8), (4, 3)])
@pytest.mark.parametrize("kind", ["resident", "files"])
def test_accuracy_is_the_same_on_any_number_of_ranks(on_ranks, tmp_path, num_ranks, num_val, kind):
    """Uneven shares too, and a rank without a validation image."""
    classes = ([0, 1, 2] * 3)[:num_val]
    val = coloured(classes, seed=1, truth=[*classes[:-2], 0, 0])
    if kind == "files":
        paths = [str(tmp_path / f"{number}.png") for number in range(num_val)]
        for path, image in zip(paths, val.images, strict=True):
            to_pil_image(image).save(path)
        val = FileImages(Paths(paths), val.labels.numpy(), val.classes, MOMENTS)
    expected = 100 * np.mean([*[True] * (num_val - 2), classes[-2] == 0, classes[-1] == 0])
    results = on_ranks(num_ranks, lambda rank: accuracy(mean_colour, TRAIN, val, k=5))
    assert results == pytest.approx([expected] * num_ranks)


def test_both_named_votes_come_from_one_search(monkeypatch):
    val = coloured([0, 1, 2, 0, 1, 2, 0, 1], seed=1, truth=[0, 1, 2, 0, 1, 2, 1, 0])
    searches, nearest = [], knn.nearest
    monkeypatch.setattr(knn, "nearest", lambda *a: searches.append(a[3]) or nearest(*a))
    top1 = knn.accuracy(mean_colour, TRAIN, val, LOAD, CPU)
    assert searches == [200]  # more than there are features
    queries, features = (
        normalize(frozen.encode_share(mean_colour, images, LOAD)[0].double())
        for images in (val, TRAIN)
    )
    for name, k, temperature in (("knn_top1", 20, 0.07), ("knn200_top1", 200, 0.1)):
        scores = scores_by_loops(queries, features, TRAIN.labels, 3, k, temperature)
        assert top1[name] == 100 * (scores.argmax(dim=1) == val.labels).double().mean()


def test_an_evaluation_of_a_run_logs_both_votes(tmp_path):
    write_images(tmp_path / "images")
    evaluations, _ = run(tmp_path / "images", tmp_path / "run")
    assert [line["epoch"] for line in evaluations] == [0, 1, 2]
    assert all(0 <= line[name] <= 100 for line in evaluations for name in knn.NAMED_VOTES)


# -- calibration of an untrained encoder -------------------------------------------------------


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last_norm = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.BatchNorm1d(4),
        )

    def embed(self, x):
        return self.last_norm(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))


def noise_images(count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    return ResidentImages(pixels, np.zeros(count, int), ["noise"], MOMENTS)


def encoder_with_other_statistics():
    torch.manual_seed(0)
    encoder = SmallNet()
    encoder.norm.running_mean.fill_(3)
    encoder.last_norm.running_var.fill_(7)
    encoder.norm.num_batches_tracked.fill_(9)
    return encoder.eval()


@pytest.mark.parametrize("count", [2, 100, 256])
def test_calibration_sets_the_statistics_of_the_images(count):
    encoder, images = encoder_with_other_statistics(), noise_images(300)
    calibrated = knn.calibrated_copy(encoder, images, LOAD, count=count)
    pixels = images.images[:count].double() / 255
    x = (pixels - images.mean.double().view(3, 1, 1)) / images.std.double().view(3, 1, 1)
    with torch.no_grad():
        x = encoder.double().conv(x)
        mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3))
        biased = x.var(dim=(0, 2, 3), correction=0)
        normed = (x - mean.view(4, 1, 1)) / (biased + 1e-5).sqrt().view(4, 1, 1)
        pooled = normed.relu().mean(dim=(2, 3))
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(calibrated.norm.running_mean.double(), mean, **close)
    torch.testing.assert_close(calibrated.norm.running_var.double(), variance, **close)
    torch.testing.assert_close(
        calibrated.last_norm.running_mean.double(), pooled.mean(dim=0), **close
    )
    torch.testing.assert_close(
        calibrated.last_norm.running_var.double(), pooled.var(dim=0), **close
    )


@pytest.mark.parametrize("count", [257, 300, 512, 1024])
def test_calibration_in_several_batches_comes_close_to_all_statistics(count):
    """With any size of the last batch, also one image."""
    encoder, images = encoder_with_other_statistics(), noise_images(count)
    calibrated = knn.calibrated_copy(encoder, images, LOAD)
    with torch.no_grad():
        x = encoder.conv(
            (images.images / 255 - images.mean.view(3, 1, 1)) / images.std.view(3, 1, 1)
        )
    torch.testing.assert_close(
        calibrated.norm.running_mean, x.mean(dim=(0, 2, 3)), rtol=0, atol=0.02
    )
    torch.testing.assert_close(calibrated.norm.running_var, x.var(dim=(0, 2, 3)), rtol=0.05, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_calibration_does_not_change_the_original(training):
    encoder = encoder_with_other_statistics().train(training)
    before = copy.deepcopy(encoder.state_dict())
    calibrated = knn.calibrated_copy(encoder, noise_images(20), LOAD)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.norm.training == training and encoder.norm.momentum == 0.1
    assert all(
        torch.equal(one, other)
        for one, other in zip(encoder.parameters(), calibrated.parameters(), strict=True)
    )


def test_the_calibrated_copy_evaluates_and_no_longer_moves():
    calibrated = knn.calibrated_copy(encoder_with_other_statistics(), noise_images(20), LOAD)
    assert not any(module.training for module in calibrated.modules())
    before = calibrated.norm.running_mean.clone()
    features = calibrated.embed(torch.rand(5, 3, 8, 8))
    torch.testing.assert_close(calibrated.embed(torch.rand(5, 3, 8, 8)).shape, features.shape)
    assert torch.equal(calibrated.norm.running_mean, before)
    assert calibrated.norm.momentum == 0.1  # trained later, it averages over the last steps


def test_an_encoder_without_batch_norm_is_copied_without_a_pass():
    class NormFree(nn.Module):
        def embed(self, x):
            raise AssertionError("needless pass")

    assert not knn.calibrated_copy(NormFree(), noise_images(20), LOAD).training
