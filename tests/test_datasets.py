"""Data: what is recognised, what an item holds, and that geometry, order and randomness are what they claim."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import write_png
from torchvision.transforms import v2

import datasets
import mim
from datasets import (Arrays, BrokenFiles, DeviceLoader, EpochBatches, Images, Shapes, UsageError, crop_boxes,
                      decode, denormalize, load_data, make_loader, normalize, open_regions, random_boxes,
                      render_scene, renumber, seed_of)


class Source:
    """A source in memory."""

    description, classes = "source: test", ["a", "b"]

    def __init__(self, *images, instances=None):
        self.images, self.instances, self.image_size = images, instances, images[0].shape[-1]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = dict(image=self.images[index], label=index % 2)
        return item if self.instances is None else item | dict(instances=self.instances[index])

    def name(self, index):
        return f"image {index}"


# The built-in scenes


def test_scenes_are_a_function_of_the_seed():
    first, again, other = render_scene(5), render_scene(5), render_scene(6)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[2], again[2]) and first[1] == again[1]
    assert not np.array_equal(first[0], other[0])
    assert first[0].shape == (3, 64, 64) and first[0].dtype == np.uint8 and first[2].shape == (64, 64)


def test_scenes_hold_a_large_main_object_among_smaller_ones():
    labels = []
    for seed in range(300):
        _, label, instances = render_scene(seed)[:3]
        sizes = np.bincount(instances.ravel())
        assert (sizes > 0).all() and 3 <= len(sizes) <= 6  # background and 2 to 5 objects, without gaps
        labels.append(label)
        assert sizes[1] > 0.05 * 64 * 64
    assert np.bincount(labels, minlength=10).min() > 10


def test_splits_share_no_scene():
    assert not torch.equal(Shapes("val")[0]["image"], Shapes("train")[0]["image"])
    assert Shapes(image_size=96)[0]["image"].shape == (3, 96, 96)


def test_a_scenes_item_names_the_class_of_each_instance():
    source = load_data("shapes", "val", image_size=64, limit=20)
    for index in range(20):
        item = source[index]
        assert item["instances"].dtype == torch.uint8 and item["instances"].shape == (64, 64)
        assert item["instances"].unique().tolist() == list(range(len(item["shapes"]) + 1))
        assert item["shapes"][0] == item["label"] and max(item["shapes"]) < len(source.classes)


def test_rendering_reaches_1000_images_a_second_on_a_core():
    render_scene(0)
    speeds = []
    for _ in range(4):
        began = time.process_time()
        for seed in range(150):
            render_scene(seed)
        speeds.append(150 / (time.process_time() - began))
    assert max(speeds) > 1000


def test_raw_pixels_tell_little_about_the_class():
    scenes = [render_scene(seed) for seed in range(1500)]
    x = torch.tensor(np.stack([s[0] for s in scenes])).float()
    x = torch.nn.functional.avg_pool2d(x, 4).flatten(1)
    x, y = (x - x.mean(0)) / x.std(0), torch.tensor([s[1] for s in scenes])
    targets = torch.nn.functional.one_hot(y, 10).float()
    weights = torch.linalg.solve(x[:1200].T @ x[:1200] + 300 * torch.eye(x.shape[1]), x[:1200].T @ targets[:1200])
    assert ((x[1200:] @ weights).argmax(1) == y[1200:]).float().mean() < 0.3


# Folders


def test_folder_with_train_and_val(folder):
    source = load_data(str(folder), "train")
    assert "train/ and val/ with a folder per class, 24 images, 2 classes" in source.description
    assert len(load_data(str(folder), "val")) == 8 and source.classes == ["a", "b"]
    assert [source[i]["label"] for i in (0, 23)] == [0, 1]


def test_folder_per_class_holds_every_tenth_image_out(folder, tmp_path):
    for name, count in (("cat", 20), ("dog", 11)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i in range(count):
            write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(tmp_path / name / "deeper" / f"{i}.png"))
    sizes = {split: len(load_data(str(tmp_path), split)) for split in ("pretrain", "train", "val")}
    assert sizes == {"pretrain": 31, "train": 28, "val": 3}
    assert "a folder per class" in load_data(str(tmp_path)).description
    names = [{load_data(str(tmp_path), s).name(i) for i in range(n)} for s, n in (("train", 28), ("val", 3))]
    assert not names[0] & names[1]


def test_plain_images_at_any_depth(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    for path in ("1.png", "x/2.png", "x/y/3.PNG"):
        write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(tmp_path / path))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "x" / "._2.png").write_bytes(b"hidden: what macOS adds to copied files")
    assert "plain images, no labels, 3 images, 0 classes" in load_data(str(tmp_path)).description


def test_a_missing_val_folder_is_named(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(tmp_path / "train" / "a" / "1.png"))
    with pytest.raises(UsageError, match="no images in .*/val for the val split"):
        load_data(str(tmp_path), "val")


@pytest.mark.parametrize("split", ["pretrain", "train", "val"])
def test_an_empty_folder_has_no_split(tmp_path, split):
    with pytest.raises(UsageError, match=f"no images in .* for the {split} split"):
        load_data(str(tmp_path), split)


def test_tiny_imagenets_validation_list(folder, tmp_path):
    image = (folder / "train" / "a" / "0.png").read_bytes()
    for path in ("train/n01/images/1.png", "train/n02/images/1.png", "val/images/v0.png", "val/images/v1.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(image)
    (tmp_path / "val" / "val_annotations.txt").write_text("v0.png\tn02\t0\t0\t9\t9\nv1.png\tn01\t0\t0\t9\t9\n")
    source = load_data(str(tmp_path), "val")
    assert [source[i]["label"] for i in range(2)] == [1, 0] and source.classes == ["n01", "n02"]
    with open(tmp_path / "val" / "val_annotations.txt", "a") as file:
        file.write("v1.png\tn03\t0\t0\t9\t9\n")
    with pytest.raises(UsageError, match="val has the class 'n03', which .*train does not have"):
        load_data(str(tmp_path), "val")


@pytest.mark.parametrize("make, words", [
    (lambda p: p / "none", "none: no such folder, and not one of shapes, cifar10"),
    (lambda p: p, "no images in"),
    (lambda p: (p / "train" / "a").mkdir(parents=True) or p, "no images in .*train for the pretrain split"),
])
def test_bad_folders_are_named(tmp_path, make, words):
    with pytest.raises(UsageError, match=words):
        load_data(str(make(tmp_path)))


@pytest.mark.parametrize("split", ["pretrain", "train", "val"])
def test_images_directly_in_train_are_for_pretraining_alone(tmp_path, split):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.png").write_bytes(b"")
    if split == "pretrain":
        assert len(load_data(str(tmp_path))) == 1
    else:
        with pytest.raises(UsageError, match="images lie directly in .*train, which must have a folder per class"):
            load_data(str(tmp_path), split)


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(UsageError) as caught:
        load_data("cifar10", root=str(tmp_path))
    says = "--data cifar10: could not download it into .*cifar-10-python.tar.gz into .*a folder of images per class"
    assert re.match(says + ".*no network", str(caught.value)) and "\n" not in str(caught.value)


def test_misspelled_names_get_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="--data cifar: .*did you mean cifar10?"):
        load_data("cifar")
    with pytest.raises(UsageError, match="--regions instance: .*did you mean instances?"):
        open_regions("instance", load_data("shapes"), "shapes")
    with pytest.raises(UsageError, match="--image-size must be at least 8 pixels, got 4"):
        load_data("shapes", image_size=[4, 64])
    with pytest.raises(UsageError, match="--limit must be positive, got 0"):
        load_data("shapes", limit=0)


def test_torchvisions_arrays_come_out_channels_first():
    class Cifar:
        data, targets, classes = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3), [1, 0], ["x", "y"]

    source = Arrays(Cifar(), "CIFAR-10")
    assert source[1]["image"][2, 3, 1] == Cifar.data[1, 3, 1, 2] and source[1]["label"] == 0
    assert "CIFAR-10: 2 images of 4x4, 2 classes" == source.description


# Decoding


def test_all_kinds_of_images_come_out_as_rgb(tmp_path):
    rgb = np.zeros((12, 16, 3), np.uint8)
    rgb[:, :8] = (200, 40, 40)
    rgb[:, 8:] = (40, 40, 200)
    image = Image.fromarray(rgb)
    grey16 = Image.fromarray((np.full((12, 16), 200, np.uint16) * 257))
    files = {"rgb.png": image, "palette.png": image.convert("P", palette=Image.Palette.ADAPTIVE), "rgba.png": image.convert("RGBA"),
             "rgb.bmp": image, "rgb.tiff": image, "rgb.gif": image.convert("P", palette=Image.Palette.ADAPTIVE), "rgb.webp": image,
             "cmyk.jpg": image.convert("CMYK"), "rgb.jpg": image, "grey.png": image.convert("L"), "grey.jpg": image.convert("L"),
             "grey16.png": grey16, "grey16.tiff": grey16}
    for name, picture in files.items():
        picture.save(tmp_path / name, **(dict(quality=98) if name.endswith("jpg") else dict(lossless=True) if name.endswith("webp") else {}))
        out = decode(str(tmp_path / name))
        assert out.shape == (3, 12, 16) and out.dtype == torch.uint8, name
        if "grey16" in name:
            assert (out.int() - 200).abs().max() <= 1, name
        elif "grey" in name:
            assert out[0].float().std() > 1 and torch.equal(out[0], out[2]), name
        else:
            expected = torch.tensor([200, 40, 40]), torch.tensor([40, 40, 200])
            for column, colour in zip((3, 12), expected):
                assert (out[:, 6, column].int() - colour).abs().max() <= 12, name


@pytest.mark.parametrize("dtype, high, middle", [
    ("float32", 1, 128), ("float32", 250, 125), ("float32", 4e4, 128), ("int32", 200, 100),
    ("int32", 2**31 - 1, 128), ("uint16", 65535, 128), ("uint16", 510, 1)])
def test_tiffs_of_16_and_32_bits_are_scaled_by_their_range(tmp_path, dtype, high, middle):
    pixels = np.linspace(0, high, 17).astype(dtype)[:, None].repeat(16, axis=1)
    Image.fromarray(pixels).save(tmp_path / "x.tiff")
    out = decode(str(tmp_path / "x.tiff")).int()
    assert abs(out[0, 8, 3] - middle) <= 1 and abs(out[2, 16, 5] - min(255, 2 * middle)) <= 1
    assert out[:, 0].eq(0).all()


def test_damaged_files_raise_and_nothing_worse(tmp_path):
    """A file cut short, with a zeroed end, or with a changed byte: an exception or an image, never the process's end."""
    rgb = (np.random.default_rng(0).random((40, 40, 3)) * 255).astype(np.uint8)
    for kind in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        path = tmp_path / f"x.{kind}"
        Image.fromarray(rgb).save(path)
        content, raised = path.read_bytes(), 0
        half = len(content) // 2
        damaged = [content[:half], content[:half] + bytes(half), b"", content[:20]]
        damaged += [content[:k] + bytes([content[k] ^ 255]) + content[k + 1 :] for k in range(30, len(content), len(content) // 20)]
        for bad in damaged:
            path.write_bytes(bad)
            try:
                assert decode(str(path)).dtype == torch.uint8
            except Exception:
                raised += 1
        assert raised >= 2, kind


def test_small_images_set_the_size(folder):
    assert load_data(str(folder)).image_size == 32


def test_exif_rotation_is_applied(tmp_path):
    rgb = np.zeros((12, 16, 3), np.uint8)
    rgb[:4] = 255  # bright at the top
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    for name in ("turned.jpg", "turned.tiff"):
        Image.fromarray(rgb).save(tmp_path / name, exif=exif)
        out = decode(str(tmp_path / name)).float()
        assert out.shape == (3, 16, 12) and out[:, :, 9:].mean() > 240 and out[:, :, :6].mean() < 15, name


def test_normalize_is_imagenets_and_invertible():
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    y = normalize(x)
    assert y[0, 1, 2, 3].item() == pytest.approx((x[0, 1, 2, 3].item() / 255 - 0.456) / 0.224, abs=1e-5)
    assert torch.allclose(denormalize(y), x / 255, atol=1e-6)


# Items


def coordinates(height=40, width=60):
    """An image whose red says the column, whose green the row, both as fractions of 250."""
    row, column = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([250 * column / width, 250 * row / height, torch.zeros(height, width)]).round().to(torch.uint8)


@pytest.mark.parametrize("size, share", [(96, 1.0), (97, 7 / 8), (224, 7 / 8), (225, 1.0), (448, 1.0)])
def test_evaluation_crops_as_the_authors_do(size, share):
    item = Images(Source(torch.zeros(3, 1000, 2000, dtype=torch.uint8)), size, "center")[0]
    x1, y1, x2, y2 = item["box"].tolist()
    assert y2 - y1 == pytest.approx(share, abs=1e-3) and x2 - x1 == pytest.approx(share / 2, abs=1e-3)
    assert x1 + x2 == pytest.approx(1, abs=2e-3) and y1 + y2 == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("view, size", [("crop", 16), ("crop", (16, 32)), ("center", 16), ("whole", (24, 16))])
def test_box_and_flip_say_where_the_pixels_come_from(view, size):
    dataset = Images(Source(coordinates()), size, view)
    height, width = (size, size) if isinstance(size, int) else size
    boxes, flips = set(), set()
    for epoch in range(40):
        item = dataset[epoch, 0]
        x1, y1, x2, y2 = item["box"].tolist()
        columns = x1 + (x2 - x1) * (torch.arange(width) + 0.5) / width
        rows = y1 + (y2 - y1) * (torch.arange(height) + 0.5) / height
        columns = columns.flip(0) if item["flip"] else columns
        inner = slice(1, -1)  # the border is the interpolation's
        assert (item["image"][0].float() / 250 - columns)[inner, inner].abs().max() < 0.02
        assert (item["image"][1].float() / 250 - rows[:, None])[inner, inner].abs().max() < 0.02
        boxes.add(tuple(item["box"].tolist()))
        flips.add(item["flip"])
    assert (len(boxes) > 20 and flips == {True, False}) if view == "crop" else (len(boxes) == 1 and flips == {False})
    if view == "whole":
        assert boxes == {(0.0, 0.0, 1.0, 1.0)}


def test_a_limit_takes_images_evenly(folder):
    whole, part = load_data(str(folder), "train"), load_data(str(folder), "train", limit=6)
    assert len(part) == 6 and [part[i]["label"] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [part.name(i) for i in range(6)] == [whole.name(i) for i in range(0, 24, 4)]
    assert part.file(1) == whole.file(4) and "24 images" in part.description and "6 of them" in part.description
    assert len(load_data(str(folder), "train", limit=100)) == 24
    assert torch.equal(Images(part, 32, "whole")[2]["image"], Images(whole, 32, "whole")[8]["image"])
    scenes = load_data("shapes", limit=4)
    assert len(scenes) == 4 and torch.equal(scenes[1]["image"], load_data("shapes")[1024]["image"])
    assert scenes.file(1) == load_data("shapes").file(1024)


def test_random_crops_cover_the_asked_share():
    dataset = Images(Source(coordinates(60, 60)), 16, "crop", crop_scale=(0.67, 1.0))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (dataset[e, 0]["box"] for e in range(200))]
    assert 0.63 < min(areas) < 0.75 and max(areas) > 0.9


def test_flips_can_be_turned_off():
    assert not any(Images(Source(coordinates()), 16, flip=False)[e, 0]["flip"] for e in range(30))


def test_regions_are_cropped_exactly_as_their_image():
    source = Shapes(image_size=64)
    instances = renumber(source[3]["instances"][None].int())  # items number the regions from the largest down
    source = Source(instances.expand(3, -1, -1) * 40, instances=instances)  # an image that shows its own map
    dataset = Images(source, 64, "crop", regions=datasets.SceneInstances())
    for epoch in range(20):
        item = dataset[epoch, 0]
        assert item["regions"].shape == (1, 64, 64) and item["regions"].dtype == torch.uint8
        shown = (item["image"][0].float() / 40).round().long()  # an image that shows its own map
        numbers, areas = item["regions"].unique(return_counts=True)
        names = {n: int(shown[item["regions"][0] == n].mode().values) for n in numbers[areas > 30].tolist()}
        assert len(set(names.values())) == len(names) and names[0] == 0
        same = torch.tensor([names.get(n, -1) for n in item["regions"].flatten().tolist()]) == shown.flatten()
        assert same.float().mean() > 0.85  # but at edges, where the image is interpolated and the map is not


def test_maps_of_another_resolution_are_cropped_with_the_image():
    class Coarse:
        def read(self, index, item):
            return torch.arange(1, 17, dtype=torch.int32).view(1, 4, 4)  # each a block of 16x16 pixels

    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 4, 4).repeat_interleave(16, 1).repeat_interleave(16, 2) * 10
    dataset = Images(Source(image.expand(3, -1, -1)), 64, "whole", regions=Coarse())
    blocks = dataset[0]["regions"][0].unfold(0, 16, 16).unfold(1, 16, 16).flatten(2)
    assert (blocks == blocks[..., :1]).all() and blocks[..., 0].unique().numel() == 16


def test_maps_are_read_at_the_pixels_centres():
    class Columns:
        def read(self, index, item):
            return (torch.arange(16) % 4 == 2).int().expand(1, 16, -1)

    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    read = Images(Source(image), (16, 4), "whole", regions=Columns())[0]["regions"][0, 0]
    assert read.tolist() == [1, 1, 1, 1]  # of each four columns the third: pixels 2, 6, 10, 14 lie at the centres


def test_regions_are_numbered_from_the_largest_down():
    labels = torch.tensor([[[0, 0, 7, 7], [9, 9, 9, 7]], [[3, 3, 3, 3], [3, 3, 3, 3]]])
    labels[0, 0, 0] = 9
    assert renumber(labels).tolist() == [[[1, 0, 2, 2], [1, 1, 1, 2]], [[1] * 4] * 2]
    many = torch.arange(400).repeat_interleave(torch.arange(400) // 100 + 1).view(1, 1, -1)
    few = renumber(many)
    kept = many[few > 0].unique()
    assert few.max() == 255 and len(kept) == 255 and set(range(200, 400)) < set(kept.tolist())


def test_overlapping_masks_go_to_layers():
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[0, :2], masks[1], masks[2, 2:], masks[3, 0, 0] = True, True, True, True
    layers = renumber(masks)  # the whole; the two halves beside each other; the pixel above them
    assert layers.shape == (3, 4, 4) and layers[0].eq(1).all()
    assert layers[1].tolist() == [[1] * 4] * 2 + [[2] * 4] * 2 and layers[2].sum() == layers[2, 0, 0] == 1
    assert renumber(torch.ones(20, 2, 2, dtype=torch.bool)).shape == (8, 2, 2)


@pytest.fixture
def masked(folder, tmp_path):
    """A folder of masks for the scenes 0 (PNG), 1 (in its class's folder, .npz) and 2 (a colour a region)."""
    (tmp_path / "b").mkdir()
    label = render_scene(0, 32)[2]
    Image.fromarray(label).save(tmp_path / "0.png")
    np.savez(tmp_path / "b" / "1.npz", masks=np.stack([render_scene(1, 32)[2] == n for n in (1, 2)]))
    colours = np.array([[0, 0, 0], [200, 0, 0], [0, 200, 0], [0, 0, 200], [9, 9, 9], [99, 9, 9]], np.uint8)
    Image.fromarray(colours[render_scene(2, 32)[2]]).save(tmp_path / "2.png")
    return tmp_path


def test_a_users_masks_are_matched_by_name(folder, masked):
    source = load_data(folder)
    regions = open_regions(str(masked), source, folder)
    assert sum(path is not None for path in regions.paths) == 3
    number = {source.name(i).rsplit("/", 1)[1]: i for i in range(len(source))}
    read = lambda name: regions.read(number[name], source[number[name]])  # noqa: E731
    assert np.array_equal(read("0.png")[0], render_scene(0, 32)[2])
    assert read("1.png").dtype == torch.bool and np.array_equal(read("1.png")[0], render_scene(1, 32)[2] == 1)
    coloured, truth = read("2.png")[0], render_scene(2, 32)[2]
    assert coloured[truth == 0].eq(0).all() and len(np.unique(np.stack([coloured, truth]).reshape(2, -1), axis=1)[0]) == truth.max() + 1
    assert not read("3.png").any()
    batch = next(iter(make_loader(Images(source, 32, regions=regions), batch_size=24)))
    assert batch["regions"].dtype == torch.uint8 and batch["regions"].shape[0] == 24 and batch["regions"].ndim == 4
    (masked / "2.png").write_bytes(b"no image")
    np.savez(masked / "b" / "1.npz", masks=np.zeros(3))
    for name in ("2.png", "1.png"):
        with pytest.raises(UsageError, match=name[0]):
            read(name)


def test_computed_regions_are_kept_continued_and_bound_to_their_settings(tmp_path, monkeypatch):
    source, calls, fh_maps = load_data("shapes", image_size=16, limit=6), [], datasets.fh_maps

    def interrupted(image, scales):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fh_maps(image, scales)

    def kept():
        return sorted(tmp_path.rglob("*.npz"))

    monkeypatch.setattr(datasets, "fh_maps", interrupted)
    options = dict(source=source, data="shapes", region_cache=str(tmp_path))
    regions = open_regions("fh", **options)
    with pytest.raises(KeyboardInterrupt):
        regions.fill()
    assert len(kept()) == 3
    regions.fill()
    assert len(calls) == 7 and len(kept()) == 6 and not list(tmp_path.rglob("*.tmp*"))
    for i in range(6):
        assert torch.equal(regions.read(i, source[i]), torch.from_numpy(fh_maps(source[i]["image"], regions.scales)))
    assert len(calls) == 7
    open_regions("fh", fh_scales=[9], **options).fill()  # other settings, other files
    assert len(kept()) == 12
    larger = load_data("shapes", image_size=24, limit=6)
    open_regions("fh", **options | dict(source=larger), fh_scales=[9]).fill()  # other images
    assert len(kept()) == 18
    Path(regions.path(2)).write_bytes(b"broken")
    with pytest.raises(UsageError, match="delete it"):
        regions.read(2, source[2])
    Path(regions.path(2)).unlink()
    computed = torch.from_numpy(fh_maps(source[2]["image"], regions.scales))
    assert torch.equal(regions.read(2, source[2]), computed)  # a map that is not kept is computed in its place
    halves = [open_regions("fh", **options, fh_scales=[5]) for _ in range(2)]
    for rank, half in enumerate(halves):  # two processes share the images
        half.fill(rank=rank, world_size=2)
        assert len(kept()) == 17 + 3 * (rank + 1)


def test_regions_are_the_same_for_any_number_of_workers(tmp_path):
    source = load_data("shapes", image_size=16, limit=10)
    one, two = (open_regions("fh", source, "shapes", region_cache=str(tmp_path / name)) for name in "ab")
    one.fill(0)
    two.fill(2)
    for i in range(10):
        assert Path(one.path(i)).read_bytes() == Path(two.path(i)).read_bytes()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    source = load_data("shapes", image_size=16, limit=2)
    with pytest.raises(UsageError, match="--region-cache: cannot write .*file/.*npz .*Not a directory"):
        open_regions("fh", source, "shapes", region_cache=str(tmp_path / "file")).fill()


def test_segments_of_a_broken_file_are_those_of_the_image_in_its_place(folder, tmp_path):
    image = (folder / "train" / "a" / "0.png").read_bytes()
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(image[:60] if i == 1 else image)
    source = load_data(str(tmp_path))
    regions = open_regions("fh", source, str(tmp_path), region_cache=str(tmp_path / "cache"))
    regions.fill()
    item = Images(source, 32, "whole", regions=regions)[1]
    assert item["index"] == 2 and item["broken"] == 1 and item["regions"].shape == (3, 32, 32)


def test_class_activation_maps_of_a_folder_through_a_small_network(folder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 32, 32), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(4, 5))
    loaded = []
    monkeypatch.setattr(datasets, "resnet50", lambda weights: loaded.append(1) or network)
    source = load_data(folder)
    regions = open_regions("cam", source, folder, region_cache=str(tmp_path))
    with pytest.raises(UsageError, match="--regions: there is no .*npz"):
        regions.read(0, source[0])
    regions.fill()
    assert loaded == [1] and len(list(tmp_path.rglob("*.npz"))) == 24
    again = open_regions("cam", source, folder, region_cache=str(tmp_path))
    again.fill()  # with all maps there, weights are not needed
    assert loaded == [1] and torch.equal(again.read(3, source[3]), regions.read(3, source[3]))
    read = regions.read(0, source[0])
    assert read.shape == (1, 7, 7) and read.dtype == torch.float32 and 0 <= read.min() < read.max() == 1
    batch = next(iter(make_loader(Images(source, 224, "whole"), batch_size=1)))
    alone = datasets.open_cam(None, False, "cpu")(batch)[0]
    assert np.abs(alone / 255 - read.numpy()).max() <= 1 / 255 + 1e-6  # on its own instead of in a batch
    item = Images(source, 16, regions=regions)[0]
    assert item["regions"].shape == (1, 16, 16) and item["regions"].is_floating_point()
    objmae = mim.ObjMAE(mim.ViT(16, 4, 16, 1, 2), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    assert objmae(normalize(item["image"][None]), item["regions"][None])["loss"].isfinite()


def test_float_maps_are_cropped_and_mirrored_with_their_image():
    row = (torch.arange(7) + 0.5) / 7

    class Ramp:
        def read(self, index, item):
            return row.expand(1, 7, -1)  # the value at a place is its x

    dataset = Images(Source(coordinates(70, 70)), 28, crop_scale=(0.2, 0.6), regions=Ramp())
    flips = set()
    for epoch in range(30):
        item = dataset[epoch, 0]
        x1, _, x2, _ = item["box"].tolist()
        x = x1 + (x2 - x1) * (torch.arange(28) + 0.5) / 28
        x = x.flip(0) if item["flip"] else x
        inside = (x > 0.5 / 7) & (x < 6.5 / 7)  # beyond the last pixels' centres the map stays constant
        assert (item["regions"][0, 5] - x)[inside].abs().max() < 1e-5
        flips.add(item["flip"])
    assert flips == {True, False}


def test_regions_that_cannot_be_had(folder, tmp_path, monkeypatch):
    source = load_data(folder)
    (tmp_path / "weights.pt").write_bytes(b"none")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "nothing").mkdir()

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    for kind, options, says in [
            ("instances", {}, "--regions instances: --data .* has none; they come with COCO and shapes"),
            ("panoptic", {}, "--regions panoptic"), ("samm", {}, "--regions samm: no such folder"),
            (str(tmp_path / "nothing"), {}, "no .png or .npz in it has the name of an image"),
            ("cam", dict(cam_weights=str(tmp_path / "none.pt")), "--cam-weights: there is no .*none.pt"),
            ("cam", dict(cam_weights=str(tmp_path / "weights.pt")), "--cam-weights .*weights.pt: the weights of .* could not be loaded .*weights.pt"),
            ("cam", dict(cam_weights=str(tmp_path / "other.pt")), "--cam-weights .*other.pt: .*[Mm]issing key.*bn1"),
            ("cam", {}, "--cam-weights is not given, so there was a download: .*no network"),
            ("cam", dict(cam_labels=True), "--cam-labels: the labels must be"),
            ("fh", dict(cam_labels=True), "--cam-labels belong to --regions cam, not to fh"),
            ("cam", dict(fh_scales=[9.0]), "--fh-scales belongs to --regions fh, not to cam"),
            ("fh", dict(fh_scales=[9.0, 0.0]), "--fh-scales must be positive, got 0")]:
        with pytest.raises(UsageError, match=says) as caught:
            open_regions(kind, source, folder, region_cache=str(tmp_path / "cache"), **options).fill()
        assert "\n" not in str(caught.value) and not str(caught.value).endswith(":")


def test_a_bright_square_draws_attention_where_crop_and_flip_put_it():
    """Maps of whole images, cut with the items' boxes and flips, agree with the cropped images patch by patch."""
    torch.manual_seed(0)
    image = torch.zeros(3, 128, 128, dtype=torch.uint8)
    image[:, 16:64, 32:80] = 250
    dataset, p = Images(Source(image), 64, "crop"), 8
    whole = mim.patchify(Images(Source(image), 64, "whole")[0]["image"][None].float() / 250, p).mean(-1).view(1, 8, 8)
    items = [dataset[epoch, 0] for epoch in range(64)]
    weights = mim.crop_maps(whole.half().expand(64, -1, -1), torch.stack([i["box"] for i in items]),
                            torch.tensor([i["flip"] for i in items]), (8, 8))
    shown = mim.patchify(torch.stack([i["image"] for i in items]).float() / 250, p).mean(-1).view(64, 8, 8)
    assert (weights - shown).abs().mean() < 0.04
    bright = shown > 0.99
    assert bright.sum() > 200 and weights[bright].min() > 0.45 and weights[shown < 0.01].max() < 0.55
    # ... and so the masks: with every weight on the square, the patches masked first are its own.
    full = [k for k in range(64) if 6 <= bright[k].sum()]
    _, ids_masked, _ = mim.attention_masking(weights[full].flatten(1), 5, 20)
    hit = shown[full].flatten(1).gather(1, ids_masked).mean()
    assert hit > 0.75 and shown[full].flip(-1).flatten(1).gather(1, ids_masked).mean() < hit - 0.2  # a flip would show


def test_a_seed_gives_the_same_items_for_any_number_of_workers():
    source = load_data("shapes", limit=12)
    batches = [[(1, i) for i in range(k, k + 4)] for k in (0, 4, 8)]
    first, second = ([b for b in make_loader(Images(source, 32, seed=3), w, batch_sampler=batches)] for w in (0, 2))
    for a, b in zip(first, second):
        assert all(torch.equal(a[k], b[k]) for k in a)
    state = torch.get_rng_state()
    other = Images(source, 32, seed=4)[1, 0]["image"]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
    assert not torch.equal(first[0]["image"][0], other)
    assert not torch.equal(Images(source, 32, seed=3)[2, 0]["image"], first[0]["image"][0])
    assert seed_of(1, 2) != seed_of(2, 1)


def test_processes_share_a_steps_micro_batches_out():
    one = list(EpochBatches(23, 8, 4, seed=1))
    assert len(one) == len(EpochBatches(23, 8, 4)) == 8  # 2 whole steps of 4 micro-batches; 7 images wait for another epoch
    assert len({i for batch in one for _, i in batch}) == 16
    two = [list(EpochBatches(23, 8, 4, seed=1, rank=r, world_size=2)) for r in (0, 1)]
    assert [b for pair in zip(*two) for b in pair] == one
    later = EpochBatches(23, 8, 4, seed=1)
    later.epoch = 1
    assert list(later)[0] != one[0] and list(later)[0][0][0] == 1


# Broken files


def test_a_broken_file_is_named_once_and_replaced(folder, tmp_path):
    image = (folder / "train" / "a" / "0.png").read_bytes()
    for i in range(12):
        (tmp_path / f"{i:03d}.png").write_bytes(image[:60] if i == 7 else image)
    dataset, said = Images(load_data(str(tmp_path)), 32), []
    item = dataset[0, 7]
    assert (item["index"], item["broken"]) == (8, 7) and dataset[0, 8]["broken"] == -1
    assert torch.equal(item["image"], dataset[0, 8]["image"])
    watch = BrokenFiles(dataset.source, said.append)
    for _ in range(2):
        watch.watch(torch.tensor([-1, 7, -1]))
    assert len(said) == 1 and "007.png" in said[0] and watch.found == {7}
    watch.watch(torch.tensor([9, 8, 7]))
    assert len(said) == 3 and watch.found == {7, 8, 9}


def test_tiny_images_count_as_broken_and_all_broken_stops(tmp_path):
    for i in range(3):
        write_png(torch.zeros(3, 4, 30, dtype=torch.uint8), str(tmp_path / f"{i}.png"))
    with pytest.raises(UsageError, match="0.png and the images after it are broken; the last: 30x4 pixels, too small"):
        Images(load_data(str(tmp_path)), 32)[0]


# Batches cropped on the device


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.5, 0.9), (0.95, 1.0)])
def test_boxes_are_distributed_as_torchvisions(scale):
    torch.manual_seed(0)
    x1, y1, x2, y2 = random_boxes(4000, scale, torch.Generator().manual_seed(0)).T
    image = torch.empty(0, 1000, 1000)
    draw = v2.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)]) / 1000
    for ours, theirs in zip((y1, x1, y2 - y1, x2 - x1), theirs.T):
        assert ours.min() >= 0 and ours.max() <= 1
        assert abs(ours.mean() - theirs.mean()) < 5 * theirs.std() / 2000**0.5
        assert abs(ours.std() - theirs.std()) < 0.07 * theirs.std()
        assert all(abs(ours.quantile(q) - theirs.quantile(q)) < 0.02 for q in (0.1, 0.5, 0.9))


@pytest.mark.parametrize("size", [[48, 48], [96, 64], [24, 24]])
def test_crops_on_the_device_are_nearly_torchvisions(size):
    images = torch.stack([torch.from_numpy(render_scene(i, 48)[0]) for i in range(12)])
    pixels = torch.tensor([[0, 0, 48, 48], [5, 9, 20, 31], [37, 20, 11, 8], [0, 13, 48, 35]] * 3)
    top, left, height, width = pixels.T / 48
    flip = torch.arange(12) % 2 == 1
    boxes = torch.stack([left, top, left + width, top + height], dim=1)
    out = crop_boxes(images.float(), boxes, flip, size).clamp(0, 255)
    for i in range(12):
        crop = datasets.resized_crop(images[i], pixels[i].tolist(), size).float()
        crop = crop.flip(-1) if flip[i] else crop
        wrong = (out[i] - crop.flip(-1)).abs().mean()
        # Another bicubic kernel, no antialiasing at large crops, and pixels from beyond the box at its border
        assert (out[i] - crop).abs().mean() < min(6, 0.35 * wrong)


def test_the_device_loader_says_where_the_pixels_come_from_and_repeats_itself():
    source = Source(*[coordinates(40, 60)] * 12)
    dataset = Images(source, (16, 24), crop_scale=(0.3, 0.9), seed=5)
    batches = EpochBatches(12, 4, 1, seed=5)
    batches.epoch = 3
    items = {}
    for batch in DeviceLoader(dataset, batches, "cpu"):
        assert batch["image"].shape == (4, 3, 16, 24) and batch["image"].dtype == torch.uint8
        for image, index, (x1, y1, x2, y2), flip in zip(*(batch[k] for k in ("image", "index", "box", "flip"))):
            x = x1 + (x2 - x1) * (torch.arange(24) + 0.5) / 24
            y = y1 + (y2 - y1) * (torch.arange(16) + 0.5) / 16
            assert (image[0, 3:-3, 3:-3] - 250 * (x.flip(0) if flip else x)[3:-3]).abs().max() < 2
            assert (image[1, 3:-3, 3:-3] - 250 * y[3:-3, None]).abs().max() < 2
            assert 0.25 < (x2 - x1) * (y2 - y1) < 0.95
            items[int(index)] = image
    assert len(items) == 12
    halves = EpochBatches(12, 4, 2, seed=5, rank=1, world_size=2)  # another process, smaller batches: the same items
    halves.epoch = 3
    for batch in DeviceLoader(dataset, halves, "cpu"):
        assert all(torch.equal(image, items[int(i)]) for image, i in zip(batch["image"], batch["index"]))

    def loader_of(epoch):
        batches.epoch = epoch
        return DeviceLoader(dataset, batches, "cpu")

    resumed = {int(i): image for b in loader_of(3) for image, i in zip(b["image"], b["index"])}
    assert all(torch.equal(resumed[i], items[i]) for i in items)
    other = next(iter(loader_of(4)))
    assert not torch.equal(other["image"][0], items[int(other["index"][0])])
    assert 0.3 < torch.cat([b["flip"].float() for e in range(10) for b in loader_of(e)]).mean() < 0.7
    dataset.flip = False
    assert not any(batch["flip"].any() for batch in DeviceLoader(dataset, batches, "cpu"))
