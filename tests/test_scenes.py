"""The built-in scenes: the same everywhere, known to the last pixel, in splits that share none."""

import hashlib

import numpy as np
import pytest
import torch

from datasets import SHAPE_CLASSES, Shapes, load_data, render_scene


@pytest.fixture(scope="module")
def scenes():
    """The first 1000 scenes at 32x32 pixels."""
    return [render_scene(seed, 32) for seed in range(1000)]


def test_scenes_are_the_same_everywhere():
    """Same bits on every machine, so that results can be compared; a new renderer has a new digest."""
    digest, main = hashlib.sha256(), set()
    some = [(seed, 64) for seed in range(48)]  # with every class as main object, and as one of the others
    for seed, size in [*some, (3, 96), (10**9, 64), (10**9 + 7, 128), (2**32 - 1, 33)]:
        image, label, instances, shapes = render_scene(seed, size)
        assert image.shape == (3, size, size) and image.dtype == np.uint8
        assert instances.shape == (size, size) and instances.dtype == np.uint8
        digest.update(image.tobytes() + instances.tobytes() + bytes([label, *shapes]))
        main.add(label)
    assert main == set(range(10))
    assert digest.hexdigest() == "5028ed0c21b84c3375beceebf0b4dcec4a1e7b5319e27938a5440967def17837"


def test_scenes_depend_on_the_seed_alone():
    first, other, again = render_scene(5), render_scene(6), render_scene(np.int64(5))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[2], again[2])
    assert first[1] == again[1] and first[3] == again[3]
    assert not np.array_equal(first[0], other[0])


def test_another_size_shows_the_same_scene():
    for seed in range(10):
        image, label, instances, shapes = render_scene(seed, 64)
        large, large_label, large_instances, large_shapes = render_scene(seed, 192)
        assert large_label == label and large_shapes == shapes
        small = large.reshape(3, 64, 3, 64, 3).mean((2, 4))
        moved = abs(small[..., 1:] - image[..., :-1]).mean()  # by a pixel
        assert abs(small - image).mean() < 0.4 * moved
        assert (large_instances[1::3, 1::3] == instances).mean() > 0.97


def test_instances_are_numbered_without_gaps_and_the_main_object_is_the_largest(scenes):
    counts = []
    for _, label, instances, shapes in scenes:
        areas = np.bincount(instances.ravel())
        assert len(areas) == len(shapes) + 1 and areas.min() > 0
        assert shapes[0] == label and len(set(shapes)) == len(shapes)
        assert all(type(shape) is int and 0 <= shape < len(SHAPE_CLASSES) for shape in shapes)
        assert areas[1] > 0.15 * 32 * 32 and areas[1] > areas[2:].max()
        counts.append(len(shapes))
    assert set(counts) == {3, 4} and min(np.bincount(counts)[3:]) > 420


def test_every_label_is_about_equally_frequent(scenes):
    counts = np.bincount([label for _, label, _, _ in scenes], minlength=10)
    assert len(counts) == len(SHAPE_CLASSES) == 10 and abs(counts - 100).max() < 48  # 5 standard deviations


def test_objects_stand_out_against_the_background(scenes):
    for image, _, instances, _ in scenes[:200]:
        main, background = (np.median(image[:, instances == k], axis=1) for k in (1, 0))
        assert abs(main - background).sum() > 60


def test_most_scenes_have_several_objects_that_objmae_may_choose(scenes):
    """Above 5% of the image, the least that ObjMAE takes."""
    areas = [np.bincount(instances.ravel())[1:] for _, _, instances, _ in scenes]
    assert np.mean([(area > 0.05 * 32 * 32).sum() >= 2 for area in areas]) > 0.9


def test_the_class_is_no_matter_of_colour_or_place(scenes):
    """A linear classifier of the raw pixels sees little of it; 1 in 10 is chance."""
    y = np.array([label for _, label, _, _ in scenes])
    x = np.stack([image for image, _, _, _ in scenes])
    x = x.reshape(-1, 3, 8, 4, 8, 4).mean((3, 5)).reshape(1000, -1)
    x = (x - x.mean(0)) / x.std(0)
    train, val = slice(0, 700), slice(700, None)
    gram = x[train].T @ x[train] + 1000 * np.eye(x.shape[1])
    linear = (x[val] @ np.linalg.solve(gram, x[train].T @ np.eye(10)[y[train]])).argmax(1)
    assert (linear == y[val]).mean() < 0.25


def test_the_texture_tells_the_class(scenes):
    """The main object's share of dark pixels is that of its class's texture, whatever its colour."""
    shares = [[] for _ in SHAPE_CLASSES]
    for image, label, instances, _ in scenes:
        brightness = image.mean(0)[instances == 1]
        shares[label].append((brightness < (brightness.min() + brightness.max()) / 2).mean())
    dark = dict(zip(SHAPE_CLASSES, map(np.mean, shares)))
    assert max(dark, key=dark.get) in ("ring", "hourglass") and min(dark, key=dark.get) == "cross"
    assert 0.4 < dark["crescent"] < 0.6 and dark["ring"] > 0.6 and dark["cross"] < 0.45


# The source


def seeds_of(source):
    """The seeds of a source's scenes, as its messages name them."""
    return [int(source.name(i).split("/")[1]) for i in range(len(source))]


def test_no_scene_is_in_train_and_in_val():
    splits = {split: Shapes(split, 16) for split in ("pretrain", "train", "val")}
    seeds = {split: seeds_of(source) for split, source in splits.items()}
    assert [len(source) for source in splits.values()] == [4096, 4096, 1024]
    assert [len(set(numbers)) for numbers in seeds.values()] == [4096, 4096, 1024]
    assert seeds["pretrain"] == seeds["train"] and not set(seeds["val"]) & set(seeds["train"])
    for split, source in splits.items():
        for index in (0, 1, 1023, len(source) - 1):
            image, label, instances, shapes = render_scene(seeds[split][index], 16)
            item = source[index]
            assert np.array_equal(item["image"], image) and np.array_equal(item["instances"], instances)
            assert item["label"] == label and item["shapes"] == shapes
    assert seeds_of(Shapes()) == seeds["pretrain"]
    files = [{source.name(i) for i in range(len(source))} for source in (splits["train"], splits["val"])]
    assert len(files[0]) == 4096 and not files[0] & files[1]  # nor do they share the maps of their regions


@pytest.mark.parametrize("asked, size, in_memory", [
    (None, 64, True), (64, 64, True), (65, 65, False), ((48, 80), 80, False), ([32, 16], 32, True),
    (8, 8, True)])
def test_scenes_are_as_large_as_the_longer_side(asked, size, in_memory):
    source = load_data("shapes", "val", image_size=asked)
    assert source[3]["image"].shape == (3, size, size) and source.image_size == size
    assert source[3]["image"].dtype == source[3]["instances"].dtype == torch.uint8
    assert source.in_memory is in_memory and source.classes == list(SHAPE_CLASSES)
    assert source.description == f"shapes: 1024 built-in scenes of {size}x{size}, 10 classes"
    assert source.name(3) != Shapes("val", size + 8).name(3)


def test_scenes_in_memory_are_drawn_once():
    source = Shapes("val", 16)
    first, other = source[5], source[6]
    assert source[5] is first and source[6] is other and first is not other
    assert np.array_equal(first["image"], render_scene(seeds_of(source)[5], 16)[0])
