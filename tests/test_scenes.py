"""The built-in scenes: the same everywhere, known to the last pixel, and no easy classification task."""

import hashlib
import random

import numpy as np
import pytest

import datasets as scenes
from datasets import PALETTES, SHAPE_CLASSES, SHAPES, render_scene, shuffled


def test_scenes_are_the_same_everywhere():
    digest = hashlib.sha256()
    for seed, size in ((0, 64), (1, 64), (2, 64), (3, 96), (10**9, 64), (10**9 + 7, 128), (2**40, 33)):
        image, label, instances, shapes = render_scene(seed, size)
        assert image.shape == (3, size, size) and image.dtype == np.uint8
        assert instances.shape == (size, size) and instances.dtype == np.uint8
        digest.update(image.tobytes() + instances.tobytes() + bytes([label, *shapes]))
    assert digest.hexdigest() == "ae148c0fb7c1a89455a9255ac9a027da1ac7b28f5fa6f3a4f45337408f23004d"


def test_scenes_depend_on_the_seed_alone():
    first, other, again = render_scene(5), render_scene(6), render_scene(np.int64(5))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[2], again[2])
    assert first[1] == again[1] and first[3] == again[3]
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("size", [128, 192])
def test_another_size_shows_the_same_scene(size):
    for seed in range(40):
        image, label, instances, shapes = render_scene(seed, 64)
        large, large_label, large_instances, large_shapes = render_scene(seed, size)
        assert large_label == label and large_shapes == shapes
        times = size // 64
        small = large.reshape(3, 64, times, 64, times).mean((2, 4))
        assert abs(small - image).mean() < 1  # of 255; another scene is 70 off, one moved by a pixel 5
        middles = large_instances[times // 2::times, times // 2::times]
        assert (middles == instances).mean() > 0.97


def test_instances_are_numbered_without_gaps_and_their_shapes_are_known():
    counts = []
    for seed in range(600):
        for size in (32, 64):
            _, label, instances, shapes = render_scene(seed, size)
            assert np.unique(instances).tolist() == list(range(len(shapes) + 1))
            assert shapes[0] == label and len(set(shapes)) == len(shapes)
            assert all(type(shape) is int and 0 <= shape < len(SHAPE_CLASSES) for shape in shapes)
        counts.append(len(shapes))
    assert min(np.bincount(counts)[3:]) > 150 and set(counts) == {3, 4, 5}


def test_an_instance_has_the_shape_that_it_is_said_to_have(monkeypatch):
    for wanted in range(len(SHAPE_CLASSES)):
        monkeypatch.setattr(scenes, "SHAPES", {  # all shapes but one become very small
            name: SHAPES[name] if k == wanted else lambda u, v: scenes.norm(u, v) - 0.1
            for k, name in enumerate(SHAPE_CLASSES)})
        for seed in range(12):
            _, _, instances, shapes = render_scene(seed, 128)
            areas = np.bincount(instances.ravel(), minlength=len(shapes) + 1)[1:]
            assert [area > 400 for area in areas] == [shape == wanted for shape in shapes]


def test_the_main_object_is_the_largest_near_the_centre_and_mostly_visible(monkeypatch):
    paint, whole = scenes.paint, {}

    def paint_and_count(rng, image, instances, pixels, number, *rest):
        paint(rng, image, instances, pixels, number, *rest)
        whole[number] = (instances == number).sum()

    monkeypatch.setattr(scenes, "paint", paint_and_count)
    visible = []
    for seed in range(1500):
        instances = render_scene(seed)[2]
        areas = np.bincount(instances.ravel())
        rows, columns = np.nonzero(instances == 1)
        assert areas[1] > 0.06 * 64 * 64 and areas[1] > areas[2:].max()
        assert 0.22 < rows.mean() / 63 < 0.78 and 0.22 < columns.mean() / 63 < 0.78
        visible.append(areas[1] / whole[1])
    assert min(visible) > 0.6 and np.mean(visible) > 0.88
    assert np.mean(np.array(visible) < 0.97) > 0.4  # many are partly hidden


def test_every_label_is_about_equally_frequent():
    labels = [render_scene(seed, 16)[1] for seed in range(4000)]
    assert len(SHAPE_CLASSES) == 10
    assert abs(np.bincount(labels, minlength=10) - 400).max() < 95  # 5 standard deviations


def test_the_shapes_have_about_the_same_area_and_fit_their_box():
    v, u = np.meshgrid(*2 * [np.linspace(-2, 2, 801, dtype=np.float32)], indexing="ij")
    for shape in SHAPES.values():
        inside = shape(u, v) < 0
        assert inside.mean() * 16 == pytest.approx(2, abs=0.12)
        assert np.sqrt(u * u + v * v)[inside].max() < 1.35


def test_smooth_edges_do_not_change_the_colours_inside_and_outside():
    for seed in range(50):
        image, _, instances, _ = render_scene(seed, 128)
        image = image.astype(int)
        steps = abs(np.diff(image, axis=2)).max(0)
        border = instances[:, 1:] != instances[:, :-1]
        assert np.median(steps[~border]) <= 3 and np.median(steps[border]) > 15


def test_objects_stand_out_against_the_background():
    for seed in range(300):
        image, _, instances, _ = render_scene(seed)
        main, background = (np.median(image[:, instances == k], axis=1) for k in (1, 0))
        assert abs(main - background).sum() > 60


def test_shuffling_is_a_fair_permutation():
    rng = random.Random(0)
    orders = [tuple(shuffled(rng, (0, 1, 2))) for _ in range(3000)]
    assert sorted({*orders}) == [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    assert all(400 < orders.count(order) < 600 for order in {*orders})


def test_raw_pixels_tell_little_about_the_class():
    """Neither a linear classifier nor the nearest neighbours; 1 in 10 is chance."""
    data = [render_scene(seed) for seed in range(3000)]
    images, y = np.stack([scene[0] for scene in data]), np.array([scene[1] for scene in data])
    x = images.reshape(-1, 3, 16, 4, 16, 4).mean((3, 5)).reshape(len(data), -1)
    x = (x - x.mean(0)) / x.std(0)
    train, val = slice(0, 2000), slice(2000, None)
    gram = x[train].T @ x[train] + 3000 * np.eye(x.shape[1])
    linear = (x[val] @ np.linalg.solve(gram, x[train].T @ np.eye(10)[y[train]])).argmax(1)
    assert (linear == y[val]).mean() < 0.17
    distance = (x[train] ** 2).sum(1) - 2 * x[val] @ x[train].T
    nearest = np.eye(10)[y[train][distance.argsort(1)[:, :10]]].sum(1).argmax(1)
    assert (nearest == y[val]).mean() < 0.2


def test_palettes_are_colours():
    for colours in PALETTES:
        for colour in colours:
            assert colour.shape == (3, 1, 1) and colour.dtype == np.float32
            assert colour.min() >= 0 and colour.max() <= 255
