"""FH: images with known segments, and equality with the algorithm written as plainly as possible."""

import numpy as np
import pytest
import torch

from datasets import felzenszwalb, grid_edges, smooth

CRISP = 0.1  # pixels: too narrow a Gaussian to reach a neighbour


def picture(gray):
    """[H, W] of 0 to 255 -> uint8 [3, H, W]."""
    return np.stack([np.asarray(gray, np.uint8)] * 3)


def noise(seed, height=24, width=24):
    """Noise on four flat quarters, uint8 [3, H, W]: some edges weigh little, some much."""
    rng = np.random.default_rng(seed)
    flat = np.kron(rng.integers(60, 190, (3, 2, 2)), np.ones((1, height // 2, width // 2)))
    return (flat + rng.normal(0, 12, flat.shape)).clip(0, 255).astype(np.uint8)


def reference(image, scale, sigma, min_size):
    """FH, one edge at a time on plain lists: labels [H, W], each the number of its segment's first pixel."""
    weights, ends = grid_edges(smooth(image, sigma))
    label, members, heaviest = {}, {}, {}
    for i in range(image[0].size):
        label[i], members[i], heaviest[i] = i, [i], 0.0

    def join(u, v):
        members[u] += members.pop(v)
        label.update((i, u) for i in members[u])

    def limit(u):
        return np.float32(heaviest[u] + scale / 255 / len(members[u]))

    edges = list(zip(weights.tolist(), *ends.tolist()))
    for weight, i, j in edges:
        u, v = sorted((label[i], label[j]))
        if u != v and weight < float(min(limit(u), limit(v))):
            join(u, v)
            heaviest[u] = weight
    for _, i, j in edges:
        u, v = sorted((label[i], label[j]))
        if u != v and min(len(members[u]), len(members[v])) < min_size:
            join(u, v)
    return np.array([label[i] for i in range(image[0].size)]).reshape(image.shape[1:])


def same_partition(a, b):
    """Whether two label maps are equal up to the labels' names."""
    pairs = np.unique(np.stack((a.ravel(), b.ravel())), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


def test_sigma_0_leaves_the_image_as_it_is():
    """As scikit-image, which takes such a sigma."""
    image = np.random.default_rng(0).integers(0, 256, (3, 9, 7)).astype(np.uint8)
    assert np.array_equal(smooth(image, 0), image * (1 / 255))
    near = felzenszwalb(torch.from_numpy(image), 50, 1e-3, 4)
    assert np.array_equal(felzenszwalb(torch.from_numpy(image), 50, 0, 4), near)


@pytest.mark.parametrize("sigma", [CRISP, 0.8])
def test_two_flat_halves(sigma):
    labels = felzenszwalb(picture(np.repeat([[0, 255]], 10, 1).repeat(12, 0)), scale=20, sigma=sigma)
    assert labels.dtype == np.int32
    assert np.array_equal(labels, np.repeat([[0, 1]], 10, 1).repeat(12, 0))


def test_colours_of_equal_brightness():
    image = np.zeros((3, 8, 8), np.uint8)
    image[0, :, :4] = image[1, :, 4:] = 200
    assert np.array_equal(felzenszwalb(image, 10), np.repeat([[0, 1]], 4, 1).repeat(8, 0))


@pytest.mark.parametrize("gray", [
    np.zeros((9, 7)), np.full((16, 16), 255), np.arange(64)[None].repeat(40, 0) * 4])
def test_flat_and_gradient_stay_one(gray):
    assert not felzenszwalb(picture(gray), scale=1000).any()


def test_checkers():
    board = (np.indices((4, 4)).sum(0) % 2 * 255).repeat(8, 0).repeat(8, 1)
    labels = felzenszwalb(picture(board), scale=10, sigma=CRISP)
    # squares of one colour touch at their corners, so the diagonal edges join them
    assert np.array_equal(labels, (board != 0).astype(int))
    apart = (np.indices((4, 4)) * [[[40]], [[10]]]).sum(0).repeat(8, 0).repeat(8, 1)
    labels = felzenszwalb(picture(apart), scale=0.5, sigma=CRISP, min_size=1)
    assert np.array_equal(labels, np.arange(16).reshape(4, 4).repeat(8, 0).repeat(8, 1))


def test_min_size_joins_a_speck():
    gray = np.repeat([[0, 100]], 16, 1).repeat(16, 0)
    gray[4:7, 20:23] = 255
    small, large = (felzenszwalb(picture(gray), scale=10, sigma=CRISP, min_size=size) for size in (9, 10))
    assert small.max() == 2 and (small == 2).sum() == 9
    assert np.array_equal(large, np.repeat([[0, 1]], 16, 1).repeat(16, 0))


@pytest.mark.parametrize("min_size", [5, 40, 300])
def test_none_is_too_small(min_size):
    image = np.random.default_rng(0).integers(0, 256, (3, 50, 70)).astype(np.uint8)
    labels = felzenszwalb(image, scale=100, min_size=min_size)
    counts = np.bincount(labels.ravel())
    assert len(counts) > 1 and counts.min() >= min_size  # every label from 0 to n - 1 occurs
    assert np.bincount(felzenszwalb(image, scale=min_size).ravel()).min() >= min_size


@pytest.mark.parametrize("scale", [1, 20, 1000])
@pytest.mark.parametrize("min_size", [1, 10])
def test_equals_the_plain_algorithm(monkeypatch, scale, min_size):
    for seed, size in enumerate([(12, 20), (16, 14)]):
        image = noise(seed, *size)
        truth = reference(image, scale, 0.8, min_size)
        for chunk in (1, 7, 64, 10 ** 6):
            monkeypatch.setattr("datasets.CHUNK", chunk)
            assert same_partition(felzenszwalb(image, scale, min_size=min_size), truth)


def test_equals_the_plain_algorithm_with_ties():
    for seed in range(3):
        image = np.random.default_rng(seed).integers(0, 3, (3, 12, 18)).astype(np.uint8) * 40
        for scale in (5, 50):
            assert same_partition(felzenszwalb(image, scale, CRISP, 6), reference(image, scale, CRISP, 6))


def test_equal_weights_keep_the_order_of_the_grid():
    """To the right, down, down to the right, up to the right, each by rows: a stable sort changes nothing."""
    image = np.random.default_rng(0).integers(0, 2, (3, 9, 13)) * 0.5
    height, width = image.shape[1:]
    edges = []
    for down, right in ((0, 1), (1, 0), (1, 1), (-1, 1)):
        for y in range(height):
            for x in range(width):
                if 0 <= y + down < height and x + right < width:
                    a, b = (y, x), (y + down, x + right)
                    weight = np.linalg.norm(image[:, *a] - image[:, *b])
                    edges.append((weight, {y * width + x for y, x in (a, b)}))
    edges.sort(key=lambda edge: round(edge[0], 6))  # Python's sort is stable
    weights, ends = grid_edges(image)
    assert np.allclose(weights, [weight for weight, _ in edges])
    assert len(np.unique(weights)) == 4
    assert [{*pair} for pair in ends.T.tolist()] == [pair for _, pair in edges]


def test_an_edge_that_weighs_as_much_as_the_limit_joins_nothing():
    """Every pixel is a segment of limit scale / 255 = 1, and the edges weigh exactly 1."""
    image = np.zeros((3, 1, 2), np.uint8)
    image[0, 0, 1] = 255
    assert felzenszwalb(image, 255, CRISP, min_size=1).tolist() == [[0, 1]]
    assert felzenszwalb(image, 256, CRISP, min_size=1).tolist() == [[0, 0]]
    assert felzenszwalb(image, 255, CRISP, min_size=2).tolist() == [[0, 0]]
    three = np.pad(image, ((0, 0), (0, 0), (1, 0)))  # the first two join, and then have the limit 1
    assert felzenszwalb(three, 510, CRISP, min_size=1).tolist() == [[0, 0, 1]]
    assert felzenszwalb(three, 511, CRISP, min_size=1).tolist() == [[0, 0, 0]]


def test_a_limit_is_the_heaviest_edge_and_the_scale_by_the_size():
    image = np.zeros((3, 1, 4), np.uint8)
    image[0, 0] = [0, 100, 200, 240]
    # 40 joins the last two, with limit 40 + 101 / 2 = 90.5; 100 joins the first two, but not both pairs.
    assert felzenszwalb(image, 101, CRISP, min_size=1).tolist() == [[0, 0, 1, 1]]
    assert felzenszwalb(image, 121, CRISP, min_size=1).tolist() == [[0, 0, 0, 0]]  # 40 + 121 / 2 = 100.5


def test_small_segments_join_by_equal_edges_in_the_order_of_the_grid():
    """Pixel after pixel joins the segment on its left; another order would leave pairs apart."""
    row = picture([[0, 100] * 20])
    assert not felzenszwalb(row, 1, CRISP, min_size=2).any()
    assert not felzenszwalb(row.transpose(0, 2, 1), 1, CRISP, min_size=2).any()


def test_smoothing_is_a_gaussian():
    image = np.zeros((3, 15, 17), np.uint8)
    image[:, 7, 8] = 255
    y, x = np.indices((15, 17))
    bell = np.exp(-((y - 7) ** 2 + (x - 8) ** 2) / (2 * 0.8 ** 2)) * (abs(y - 7) <= 3) * (abs(x - 8) <= 3)
    assert np.allclose(smooth(image, 0.8), bell / bell.sum(), atol=1e-12)
    # At the borders the image is mirrored, with its outermost pixels: each comes twice
    image[:] = 0
    image[:, 1, 0] = 255
    y, x = np.indices((15, 17))
    rows, columns = ([np.exp(-(n - k) ** 2 / (2 * 0.8 ** 2)) * (abs(n - k) <= 3) for k in places]
                     for n, places in ((y, (1, -2)), (x, (0, -1))))
    assert np.allclose(smooth(image, 0.8), sum(rows) * sum(columns) / bell.sum(), atol=1e-12)
    image[:] = 51
    assert np.allclose(smooth(image, 0.8), 0.2, atol=1e-12)  # also at the borders


def test_edges_of_the_grid():
    image = np.random.default_rng(0).random((3, 5, 7))
    weights, (a, b) = grid_edges(image)
    pixels = image.reshape(3, -1)
    assert (np.diff(weights) >= 0).all()
    assert np.allclose(weights, np.linalg.norm(pixels[:, a] - pixels[:, b], axis=0))
    found = {tuple(sorted(pair)) for pair in zip(a.tolist(), b.tolist())}
    near = {(i, j) for i in range(35) for j in range(i) if max(abs(i // 7 - j // 7), abs(i % 7 - j % 7)) == 1}
    assert len(a) == len(found) and found == {(j, i) for i, j in near}


def test_several_scales_equal_single_ones():
    image = noise(5, 60, 80)
    scales = (10, 50, 200)
    maps = felzenszwalb(image, scales)
    assert maps.shape == (3, 60, 80) and len({m.max() for m in maps}) > 1
    assert all(np.array_equal(m, felzenszwalb(image, scale)) for m, scale in zip(maps, scales))
    assert all(np.array_equal(m, felzenszwalb(image, scale, min_size=7))
               for m, scale in zip(felzenszwalb(image, scales, min_size=7), scales))


def test_torch_images_and_odd_shapes():
    image = noise(1)
    assert np.array_equal(felzenszwalb(torch.from_numpy(image), 50), felzenszwalb(image, 50))
    flipped = torch.from_numpy(image).flip(2).transpose(1, 2)
    assert felzenszwalb(flipped, 50).shape == (24, 24)
    for shape in ((1, 1), (1, 9), (9, 1), (2, 3)):
        assert np.array_equal(felzenszwalb(np.zeros((3, *shape), np.uint8)), np.zeros(shape))
