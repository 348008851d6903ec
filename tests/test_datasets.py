"""Data: what is recognised, what an item holds, and that geometry, order and randomness are as said.

Which images a split has, with which labels and dense truth, is tested in test_splits.py.
"""

import contextlib
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.io import write_png
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import datasets
import mim
from datasets import (DeviceLoader, EpochBatches, Images, UsageError, crop_boxes, decode, denormalize,
                      load_data, make_loader, name_broken, normalize, open_regions, random_boxes,
                      render_scene, renumber, seed_of)


def write(path, height=16, width=16):
    """A black image as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(torch.zeros(3, height, width, dtype=torch.uint8), str(path))


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


# Folders


@pytest.mark.parametrize("layout, paths, says", [
    ("train/ and val/", ("train/a/1.png", "train/b/1.png", "val/b/1.png"),
     "train/ and val/ with a folder per class, 2 images, 2 classes (a, b)"),
    ("a folder per class", ("a/1.png", "a/2.png", "b/x/1.png"),
     "a folder per class, 3 images, 2 classes (a, b)"),
    ("plain images", ("1.png", "x/2.png", "x/y/3.PNG"), "plain images, no labels, 3 images, 0 classes"),
])
def test_the_layout_of_a_folder_is_recognised(tmp_path, layout, paths, says):
    for path in paths:
        write(tmp_path / path)
    (tmp_path / "notes.txt").write_text("not an image")
    write(tmp_path / ".hidden" / "1.png")
    (tmp_path / paths[-1]).with_name("._2.png").write_bytes(b"hidden: what macOS adds to copied files")
    source = load_data(str(tmp_path))
    assert source.description == f"{tmp_path}: {says}"
    names = [str(tmp_path / path) for path in paths if not path.startswith("val")]
    assert [source.name(i) for i in range(len(source))] == names


@pytest.mark.parametrize("path, split, folder", [
    (None, "pretrain", ""), (None, "train", ""), (None, "val", ""),  # nothing at all
    ("val/a/1.png", "pretrain", "/train"), ("train/a/1.png", "val", "/val")])
def test_a_split_without_images_is_named(tmp_path, path, split, folder):
    (tmp_path / folder.strip("/")).mkdir(exist_ok=True)
    write(tmp_path / path) if path else None
    with pytest.raises(UsageError, match=f"no images in {tmp_path}{folder} for the {split} split"):
        load_data(str(tmp_path), split)


@pytest.mark.parametrize("listed", [False, True])
def test_a_class_of_val_that_train_lacks_is_named(tmp_path, listed):
    write(tmp_path / "train" / "n01" / "1.png")
    write(tmp_path / "val" / "n03" / "1.png")
    if listed:  # as in Tiny ImageNet
        (tmp_path / "val" / "images").mkdir()
        (tmp_path / "val" / "val_annotations.txt").write_text("1.png\tn03\t0\t0\t9\t9\n\n")
    with pytest.raises(UsageError, match="val has the class 'n03', which .*train does not have"):
        load_data(str(tmp_path), "val")


def test_tiny_imagenets_list_as_it_is_found(tmp_path):
    """Its val folder alone, images of a class scattered; a line that is none; sorted into folders already."""
    names = [f"n0{1 + k % 3}" for k in range(30)]
    (tmp_path / "images").mkdir()
    (tmp_path / "val_annotations.txt").write_text("".join(f"{k}.png\t{n}\t0\n" for k, n in enumerate(names)))
    for k in range(30):
        write(tmp_path / "images" / f"{k}.png")
    val = load_data(str(tmp_path), "val")
    assert [val.path(i) for i in range(3)] == ["images/27.png", "images/28.png", "images/29.png"]
    assert val.labels.tolist() == [0, 1, 2] and len(load_data(str(tmp_path), "train")) == 27
    (tmp_path / "val_annotations.txt").write_text("0.png n01\n")
    with pytest.raises(UsageError, match="val_annotations.txt has no line of file name, class and box"):
        load_data(str(tmp_path), "val")
    shutil.rmtree(tmp_path / "images")
    write(tmp_path / "train" / "n01" / "1.png")
    write(tmp_path / "val" / "n01" / "2.png")
    (tmp_path / "val_annotations.txt").rename(tmp_path / "val" / "val_annotations.txt")
    assert load_data(str(tmp_path), "val").path(0) == "n01/2.png"


def test_the_images_of_coco_are_those_that_its_annotations_name(tmp_path):
    for folder in ("train2014", "train2017", "train2017_sam"):
        write(tmp_path / folder / "1.png")
    (tmp_path / "annotations").mkdir()
    assert datasets.coco_folder(tmp_path, "train").name == "train2017_sam"
    for year in (2014, 2017):
        (tmp_path / "annotations" / f"captions_train{year}.json").touch()
    assert datasets.coco_folder(tmp_path, "train").name == "train2017"


def test_a_folder_named_annotations_alone_makes_no_coco(tmp_path):
    """Classes in train and none in val; classes annotations, cat, valve, whose images are not a val split."""
    for path in ("train/a/1", "train/b/1", "val/1", "annotations/1"):
        write(tmp_path / "one" / f"{path}.png")
    with pytest.raises(UsageError, match="images lie directly in .*val, which must have a folder per class"):
        load_data(str(tmp_path / "one"), "val")
    for k in range(10):
        for name in ("annotations", "cat", "valve"):
            write(tmp_path / "two" / name / f"{k}.png")
    assert [load_data(str(tmp_path / "two"), "val").path(i) for i in range(3)] == [
        "annotations/9.png", "cat/9.png", "valve/9.png"]


def test_a_link_to_itself_is_no_image(tmp_path):
    write(tmp_path / "1.png")
    for name in ("2.png", "folder"):
        (tmp_path / name).symlink_to(tmp_path / name)
    assert datasets.find_files(tmp_path) == ["1.png"]


def test_every_extension_is_found_in_small_and_capital_letters(tmp_path):
    for k, extension in enumerate(datasets.EXTENSIONS):
        write(tmp_path / f"{k}{extension}")
        write(tmp_path / f"{k}-capital{extension.upper()}")
    (tmp_path / "1.jpg.txt").write_text("not an image")
    assert {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"} == {e[1:] for e in datasets.EXTENSIONS}
    assert len(load_data(str(tmp_path))) == 2 * len(datasets.EXTENSIONS)


def test_two_folders_of_one_name_are_two_data_sets(tmp_path):
    for root in "ab":
        write(tmp_path / root / "images" / "1.png")
    sources = [load_data(str(tmp_path / root / "images")) for root in "ab"]
    one, other = (open_regions("fh", source, region_cache="cache").path(0) for source in sources)
    assert one != other and one.startswith(f"cache/fh-0.8-640-4-4-6{tmp_path}/a/images/1.png-")


@pytest.mark.parametrize("sides, size", [
    ((32, 32), 32), ((24, 40), 40), ((40, 24), 40), ((96, 96), 96), ((97, 97), 224), ((60, 97), 224),
    ((8, 8), 8), ((7, 7), 224),
])
def test_small_images_set_the_size(tmp_path, sides, size):
    for k in range(3):
        write(tmp_path / f"{k}.png", *(sides if k else (300, 300)))  # the median counts
    assert load_data(str(tmp_path)).image_size == size


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="none: no such folder, and not one of shapes, cifar10"):
        load_data("none")


def test_images_directly_in_train_or_val_are_for_pretraining_alone(tmp_path):
    write(tmp_path / "train" / "1.png")
    source = load_data(str(tmp_path))
    assert len(source) == 1 and source.name(0) == str(tmp_path / "train" / "1.png") and source.classes == []
    for split in ("train", "val"):
        with pytest.raises(UsageError, match="images lie directly in .*/train, which must have a folder per"):
            load_data(str(tmp_path), split)
    write(tmp_path / "other" / "train" / "a" / "1.png")
    write(tmp_path / "other" / "val" / "1.png")
    with pytest.raises(UsageError, match="images lie directly in .*/val, which must have a folder per class"):
        load_data(str(tmp_path / "other"), "val")


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(UsageError) as caught:
        load_data("cifar10", root=str(tmp_path))
    says = "--data cifar10: could not download it into .*cifar-10-python.tar.gz into .*a folder of images per"
    assert re.match(says + " class.*no network", str(caught.value)) and "\n" not in str(caught.value)


def test_misspelled_names_get_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="--data cifar: .*did you mean cifar10?"):
        load_data("cifar")
    with pytest.raises(UsageError, match="--regions instance: .*did you mean instances?"):
        open_regions("instance", load_data("shapes"), "shapes")
    with pytest.raises(UsageError, match="--image-size must be at least 8 pixels, got 4"):
        load_data("shapes", image_size=[4, 64])
    with pytest.raises(UsageError, match="--limit must be positive, got 0"):
        load_data("shapes", limit=0)


# Decoding


def test_all_kinds_of_images_come_out_as_rgb(tmp_path):
    rgb = np.zeros((12, 16, 3), np.uint8)
    rgb[:, :8] = (200, 40, 40)
    rgb[:, 8:] = (40, 40, 200)
    image = Image.fromarray(rgb)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    grey16 = Image.fromarray((np.full((12, 16), 200, np.uint16) * 257))
    files = {"rgb.png": image, "palette.png": palette, "rgba.png": image.convert("RGBA"), "rgb.bmp": image,
             "rgb.tiff": image, "rgb.gif": palette, "rgb.webp": image, "cmyk.jpg": image.convert("CMYK"),
             "rgb.jpg": image, "grey.png": image.convert("L"), "grey.jpg": image.convert("L"),
             "grey16.png": grey16, "grey16.tiff": grey16}
    options = dict(jpg=dict(quality=98), webp=dict(lossless=True))
    for name, picture in files.items():
        picture.save(tmp_path / name, **options.get(name.split(".")[1], {}))
        out = decode(str(tmp_path / name))
        assert out.shape == (3, 12, 16) and out.dtype == torch.uint8, name
        if "grey16" in name:
            assert (out.int() - 200).abs().max() <= 1, name
        elif "grey" in name:
            for column, luma in ((3, 88), (12, 58)):
                assert (out[:, 6, column].int() - luma).abs().max() <= 2, name
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


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_files_raise_and_nothing_worse(tmp_path, kind):
    """Cut short, with a zeroed end, or a changed byte: an exception or an image, never the process's end."""
    rgb = (np.random.default_rng(0).random((24, 24, 3)) * 255).astype(np.uint8)
    path, raised = tmp_path / f"x.{kind}", 0
    Image.fromarray(rgb).save(path)
    content = path.read_bytes()
    half = len(content) // 2
    damaged = [content[:half], content[:half] + bytes(half), b"", content[:20]]
    for k in range(30, len(content), len(content) // 10):
        damaged.append(content[:k] + bytes([content[k] ^ 255]) + content[k + 1:])
    for bad in damaged:
        path.write_bytes(bad)
        try:
            assert decode(str(path)).dtype == torch.uint8
        except Exception:
            raised += 1
    assert raised >= 2


@pytest.mark.parametrize("decoder", ["torchvision", "Pillow"])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_exif_rotation_is_applied_where_it_is_asked_for(tmp_path, kind, decoder, monkeypatch):
    """Pillow turns TIFFs as it reads them, torchvision turns JPEGs; the others are for `decode` to turn."""
    if decoder == "Pillow":  # torchvision without a decoder
        monkeypatch.setattr(datasets, "decode_image", None)
    rgb, exif, path = np.zeros((12, 16, 3), np.uint8), Image.Exif(), tmp_path / f"turned.{kind}"
    rgb[:4] = 255  # bright at the top
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(rgb).save(path, exif=exif)
    out = decode(str(path)).float()
    assert out.shape == (3, 16, 12) and out[:, :, 9:].mean() > 240 and out[:, :, :6].mean() < 15
    if kind != "tiff":
        out = decode(str(path), turn=False).float()
        assert out.shape == (3, 12, 16) and out[:, :3].mean() > 240 and out[:, 6:].mean() < 15


def test_broken_exif_data_are_ignored(tmp_path):
    path = tmp_path / "1.png"
    Image.fromarray(np.full((12, 16, 3), 7, np.uint8)).save(path, exif=b"Exif\0\0no TIFF header")
    assert (decode(str(path)) == 7).all()


def test_pngs_of_16_bits_are_read_alike_by_every_pillow(tmp_path, monkeypatch):
    """Pillow before 11 widens their pixels to 32 bits; white is 65535 all the same."""
    path = str(tmp_path / "1.png")
    Image.fromarray(np.full((12, 16), 20000, np.uint16)).save(path)
    assert (decode(path) == 78).all()
    wide = Image.fromarray(np.full((12, 16), 20000, np.int32))
    wide.format = "PNG"
    monkeypatch.setattr(datasets, "open_image", lambda path: wide)
    assert (decode(path) == 78).all() and (decode(path, turn=False) == 78).all()


def test_normalize_is_imagenets_and_invertible():
    x = torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4) * 2
    y = normalize(x)
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        torch.testing.assert_close(y[:, channel], (x[:, channel] / 255 - mean) / std)
    assert torch.allclose(denormalize(y), x / 255, atol=1e-6)
    assert denormalize(torch.full((1, 3, 1, 1), -9.0)).eq(0).all()  # clipped
    assert denormalize(torch.full((1, 3, 1, 1), 9.0)).eq(1).all()


# Items


def coordinates(height=40, width=60):
    """An image whose red says the column, whose green the row, both as fractions of 250."""
    row, column = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    red, green = 250 * column / width, 250 * row / height
    return torch.stack([red, green, torch.zeros(height, width)]).round().to(torch.uint8)


def noise(height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def pixel_box(item, height, width):
    """An item's box as (top, left, height, width) in the pixels of its image."""
    box = item["box"] * torch.tensor([width, height, width, height])
    x1, y1, x2, y2 = (round(v, 3) for v in box.tolist())
    return y1, x1, y2 - y1, x2 - x1


@pytest.mark.parametrize("image, size, expected", [
    # square: 7/8 of the side for images of 97 to 224 pixels, as 224 of 256
    ((800, 1600), 96, (0, 400, 800, 800)), ((800, 1600), 97, (50, 450, 700, 700)),
    ((1600, 800), 224, (450, 50, 700, 700)), ((1600, 800), 225, (400, 0, 800, 800)),
    ((800, 800), 448, (0, 0, 800, 800)),
    # sizes that are not square: the longer side decides, and the proportions are kept
    ((100, 300), (32, 64), (0, 50, 100, 200)), ((300, 100), (32, 64), (125, 0, 50, 100)),
    ((300, 100), (64, 32), (50, 0, 200, 100)), ((512, 1024), (128, 224), (32, 120, 448, 784)),
    ((512, 1024), (96, 97), (32, 285, 448, 453)), ((400, 400), (100, 250), (120, 0, 160, 400)),
])
def test_evaluation_crops_as_the_authors_do(image, size, expected):
    item = Images(Source(torch.zeros(3, *image, dtype=torch.uint8)), size, "center")[0]
    assert pixel_box(item, *image) == expected and item["flip"] is False


def test_the_whole_view_is_the_whole_image():
    item = Images(Source(noise(40, 60)), (24, 16), "whole")[0]
    assert item["box"].tolist() == [0, 0, 1, 1] and item["flip"] is False


@pytest.mark.parametrize("view", ["crop", "center", "whole"])
def test_an_item_is_its_box_resized_as_torchvision_resizes(view):
    image, size = noise(50, 70), [20, 12]
    for epoch in range(8):
        item = Images(Source(image), size, view)[epoch, 0]
        box = [round(v) for v in pixel_box(item, 50, 70)]
        expected = TF.resized_crop(image, *box, size, v2.InterpolationMode.BICUBIC, antialias=True)
        expected = expected.flip(-1) if item["flip"] else expected
        assert item["image"].dtype == torch.uint8 and torch.equal(item["image"], expected)


@pytest.mark.parametrize("view", ["crop", "center", "whole"])
@pytest.mark.parametrize("size", [16, (16, 32), (30, 12)])
def test_box_and_flip_say_where_the_pixels_come_from(view, size):
    dataset = Images(Source(coordinates()), size, view)
    height, width = (size, size) if isinstance(size, int) else size
    flips = set()
    for epoch in range(10 if view == "crop" else 1):
        item = dataset[epoch, 0]
        x1, y1, x2, y2 = item["box"].tolist()
        columns = x1 + (x2 - x1) * (torch.arange(width) + 0.5) / width
        rows = y1 + (y2 - y1) * (torch.arange(height) + 0.5) / height
        columns = columns.flip(0) if item["flip"] else columns
        inner = slice(1, -1)  # the border is the interpolation's
        assert (item["image"][0].float() / 250 - columns)[inner, inner].abs().max() < 0.02
        assert (item["image"][1].float() / 250 - rows[:, None])[inner, inner].abs().max() < 0.02
        flips.add(item["flip"])
    assert flips == ({True, False} if view == "crop" else {False})


def test_random_crops_are_distributed_as_asked():
    """Area uniform in the range, width / height log-uniform in 3/4..4/3, place uniform, half mirrored."""
    dataset, count = Images(Source(noise(300, 400)), 8, crop_scale=(0.1, 0.4), seed=1), 400
    items = [dataset[epoch, 0] for epoch in range(count)]
    top, left, height, width = torch.tensor([pixel_box(item, 300, 400) for item in items]).T
    area, aspect = height * width / (300 * 400), (width / height).log() / math.log(4 / 3)
    place = torch.stack([top / (300 - height), left / (400 - width)])
    for values, low, high in ((area, 0.1, 0.4), (aspect, -1, 1), (place[0], 0, 1), (place[1], 0, 1)):
        share = (values - low) / (high - low)  # uniform in 0..1, but that boxes lie on whole pixels
        assert -0.02 < share.min() < 0.05 and 0.95 < share.max() < 1.02
        assert abs(share.mean() - 0.5) < 0.05 and abs(share.std() - 12**-0.5) < 0.02
    assert abs(sum(item["flip"] for item in items) - count / 2) < 40


@pytest.mark.parametrize("view, flip", [("crop", False), ("center", True), ("whole", True)])
def test_flips_are_of_random_crops_and_can_be_turned_off(view, flip):
    dataset = Images(Source(noise(16, 24)), 8, view, flip=flip)
    assert not any(dataset[epoch, 0]["flip"] for epoch in range(30))


def choice(item):
    """What was drawn for an item."""
    return *item["box"].tolist(), item["flip"]


def test_crops_depend_on_seed_epoch_and_index():
    source = Source(*4 * [noise(200, 300)])
    keys = [(epoch, index) for epoch in range(4) for index in range(4)]
    crops = {(seed, *key): choice(Images(source, 8, seed=seed)[key]) for seed in (0, 1) for key in keys}
    assert len({crop[:4] for crop in crops.values()}) == len(crops) == 32
    for fixed in range(3):  # with the seed, the epoch or the index fixed, both flips occur
        assert {crop[4] for key, crop in crops.items() if key[fixed] == 1} == {True, False}
    dataset = Images(source, 8)
    assert choice(dataset[3]) == choice(dataset[0, 3]) == crops[0, 0, 3]  # seed and epoch are 0 by default


def test_crops_depend_on_nothing_else():
    """Not on the order of reading, nor on anybody's generators, which are left as they were."""
    def read(keys):
        return {key: choice(dataset[key]) for key in keys}

    dataset = Images(Source(*4 * [noise(200, 300)]), 8, seed=3, augment=v2.RandAugment())
    keys = [(epoch, index) for epoch in range(2) for index in range(4)]
    first = read(keys)
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()[1].tolist()
    assert read(keys[::-1]) == first
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert np.random.get_state()[1].tolist() == numpy_state


def test_augmentation_is_of_the_cropped_image_and_follows_from_the_seed():
    def augment(image):
        seen.append(image)
        return image ^ torch.randint(0, 256, (), dtype=torch.uint8)

    source, seen = Source(*2 * [noise(40, 60)]), []
    plain, augmented = Images(source, (8, 12), seed=5), Images(source, (8, 12), seed=5, augment=augment)
    changes = {}
    for key in ((0, 0), (0, 1), (1, 0), (0, 0)):
        before, after = plain[key], augmented[key]
        assert torch.equal(seen[-1], before["image"]) and choice(before) == choice(after)
        [change] = (before["image"] ^ after["image"]).unique().tolist()
        assert changes.setdefault(key, change) == change
    assert len(set(changes.values())) == 3


def test_seeds_depend_on_every_number_and_on_how_many_they_are():
    keys = [(), (0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (1, 2), (2, 1), (1, 2, 0), (2**40, 1)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) > 2**60  # all 64 bits


def test_a_limit_takes_images_evenly(folder):
    whole, part = load_data(str(folder), "train"), load_data(str(folder), "train", limit=6)
    assert len(part) == 6 and [part[i]["label"] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [part.name(i) for i in range(6)] == [whole.name(i) for i in range(0, 24, 4)]
    assert part.description == whole.description + ", 6 of them"
    for limit in (24, 100):  # all
        same = load_data(str(folder), "train", limit=limit)
        assert len(same) == 24 and same.description == whole.description
    assert torch.equal(Images(part, 32, "whole")[2]["image"], Images(whole, 32, "whole")[8]["image"])
    scenes = load_data("shapes", limit=4)
    assert len(scenes) == 4 and torch.equal(scenes[1]["image"], load_data("shapes")[1024]["image"])
    assert scenes.name(1) == load_data("shapes").name(1024)


# Maps of regions


class Maps:
    """Region maps that are the same for every image."""

    def __init__(self, maps):
        self.maps = maps

    def read(self, index, item):
        return self.maps


def enlarged(blocks, times):
    """Each number of [h, w] as a square of times x times pixels."""
    return blocks.repeat_interleave(times, 0).repeat_interleave(times, 1)


@pytest.mark.parametrize("times", [1, 4, 12])
def test_regions_are_cropped_and_mirrored_exactly_as_their_image(times):
    """An image of 48 x 72 pixels that shows its own map, of any resolution: in every crop it still does."""
    blocks = torch.arange(24).view(4, 6)
    image = (10 * enlarged(blocks, 12)).to(torch.uint8).expand(3, -1, -1)
    maps = enlarged(blocks, times)[None].int()
    dataset, flips = Images(Source(image), (36, 48), "crop", (0.2, 0.8), regions=Maps(maps)), set()
    for epoch in range(10):
        item = dataset[epoch, 0]
        regions, shown = item["regions"][0], (item["image"][0].float() / 10).round().long()
        assert item["regions"].shape == (1, 36, 48) and item["regions"].dtype == torch.uint8
        areas = torch.bincount(regions.flatten().long())
        assert (areas[1:].diff() <= 0).all()  # numbered from the largest down
        names = [int(shown[regions == number].mode().values) for number in range(len(areas)) if areas[number]]
        assert len(set(names)) == len(names)
        same = torch.tensor([*[0] * (areas[0] == 0), *names])[regions.long()] == shown
        assert same.float().mean() > 0.9  # but at edges, where the image is interpolated and the map is not
        flips.add(item["flip"])
    assert flips == {True, False}


@pytest.mark.parametrize("size", [(4, 16), (16, 4)])
def test_maps_are_read_at_the_pixels_centres(size):
    """Of each four columns, or rows, the third: pixels 2, 6, 10 and 14 lie at the centres."""
    third = (torch.arange(16) % 4 == 2).int().expand(1, 16, -1)
    third = third.transpose(1, 2) if size == (4, 16) else third
    read = Images(Source(noise(16, 16)), size, "whole", regions=Maps(third))[0]["regions"]
    assert read.shape == (1, *size) and read.eq(1).all()


def test_float_maps_are_cropped_and_mirrored_with_their_image():
    """The values of two layers are x and y."""
    x, y = torch.meshgrid((torch.arange(7) + 0.5) / 7, (torch.arange(5) + 0.5) / 5, indexing="xy")
    maps, flips = Maps(torch.stack([x, y])), set()
    dataset = Images(Source(coordinates(50, 70)), (20, 28), crop_scale=(0.2, 0.6), regions=maps)
    for epoch in range(12):
        item = dataset[epoch, 0]
        x1, y1, x2, y2 = item["box"].tolist()
        x = x1 + (x2 - x1) * (torch.arange(28) + 0.5) / 28
        y = y1 + (y2 - y1) * (torch.arange(20) + 0.5) / 20
        x = x.flip(0) if item["flip"] else x
        # beyond the last pixels' centres the map stays constant
        expected = x.clamp(0.5 / 7, 6.5 / 7).expand(20, 28), y.clamp(0.1, 0.9)[:, None].expand(20, 28)
        torch.testing.assert_close(item["regions"], torch.stack(expected), atol=1e-5, rtol=0)
        flips.add(item["flip"])
    assert flips == {True, False}


def test_regions_are_numbered_from_the_largest_down():
    labels = torch.tensor([[[9, 0, 7, 7], [9, 9, 9, 7]], [[3, 3, 3, 3], [3, 3, 3, 3]]])
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
    assert renumber(torch.zeros(3, 2, 2, dtype=torch.bool)).tolist() == [[[0, 0], [0, 0]]]


def test_images_with_fewer_layers_get_empty_ones():
    items = [dict(index=k, regions=torch.full((layers, 2, 3), k + 1)) for k, layers in enumerate((1, 3))]
    batch = datasets.collate(items)
    assert batch["index"].tolist() == [0, 1] and batch["regions"].shape == (2, 3, 2, 3)
    assert batch["regions"][:, :, 0, 0].tolist() == [[1, 0, 0], [2, 2, 2]]


# Where regions come from


@pytest.mark.parametrize("method, data, expected", [
    ("rmae", "shapes", "instances"), ("objmae", "shapes", "instances"), ("rmae", "folder", "fh"),
    ("rae", "folder", "fh"), ("objmae", "folder", "cam"), ("rmae", "coco", "fh"),
    ("objmae", "coco", "instances")])
def test_regions_by_default(method, data, expected, tmp_path):
    if data != "shapes":
        write(tmp_path / "train2017" / "1.jpg")
        data, coco = str(tmp_path), data == "coco"
        if coco:
            (tmp_path / "annotations").mkdir()
    assert datasets.default_regions(method, data) == expected


@pytest.mark.parametrize("image_size, scales", [
    (64, [25, 50, 100]), (32, [6, 12, 25]), (16, [4, 4, 6]), (96, [56, 112, 225]), (97, [1000]),
    (224, [1000]),
])
def test_scales_of_segments_by_default(image_size, scales, tmp_path):
    source = Source(noise(16, 16))
    source.image_size = image_size
    assert open_regions("fh", source, str(tmp_path)).scales == scales
    write(tmp_path / "train2017" / "1.jpg")
    (tmp_path / "annotations").mkdir()  # now it is COCO's layout
    scales = [500, 1000, 1500] if image_size > 96 else scales
    assert open_regions("fh", source, str(tmp_path)).scales == scales
    assert open_regions("fh", source, str(tmp_path), fh_scales=[50, 9.5]).scales == [9.5, 50]


def test_regions_of_turned_images_are_not_those_of_stored_ones(tmp_path):
    write(tmp_path / "1.png")
    stored, turned = (datasets.ComputedRegions(datasets.Files(str(tmp_path), ["1.png"], turn=turn), "cache", [9])
                      for turn in (False, True))
    assert stored.path(0) != turned.path(0)


def test_segments_are_of_images_of_640_pixels_at_most(monkeypatch):
    """Numbered from 1."""
    seen = []

    def number_pixels(image, scales):
        seen.append(image)
        return np.stack([scale + np.arange(image[0].size).reshape(image.shape[1:]) for scale in scales])

    monkeypatch.setattr(datasets, "felzenszwalb", number_pixels)
    large = torch.zeros(3, 12, 1600, dtype=torch.uint8)
    large[:, :, 800:] = 200
    maps = datasets.fh_maps(large, [0, 5])
    assert np.array_equal(maps[0], 1 + np.arange(5 * 640).reshape(5, 640))
    assert np.array_equal(maps[1], maps[0] + 5)
    assert not seen[0][..., :319].any() and (seen[0][..., 321:] == 200).all()
    assert datasets.fh_maps(torch.zeros(3, 8, 6000, dtype=torch.uint8), [0]).shape == (1, 1, 640)
    small = noise(640, 12)
    assert datasets.fh_maps(small, [0]).shape == (1, 640, 12) and np.array_equal(seen[-1], small)


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
    def read(name):
        return regions.read(number[name], source[number[name]])

    source = load_data(folder)
    regions = open_regions(str(masked), source, folder)
    number = {source.name(i).rsplit("/", 1)[1]: i for i in range(len(source))}
    assert set(regions.files) == {source.path(number[f"{k}.png"]) for k in range(3)}
    assert np.array_equal(read("0.png")[0], render_scene(0, 32)[2])
    assert read("1.png").dtype == torch.bool and read("1.png").shape == (2, 32, 32)
    assert np.array_equal(read("1.png")[0], render_scene(1, 32)[2] == 1)
    coloured, truth = read("2.png")[0], render_scene(2, 32)[2]
    pairs = np.unique(np.stack([coloured, truth]).reshape(2, -1), axis=1)
    assert coloured[truth == 0].eq(0).all() and pairs.shape[1] == len(np.unique(pairs[0])) == truth.max() + 1
    assert coloured.max() < 2**16  # colours become small numbers
    assert not read("3.png").any() and read("3.png").shape == (1, 32, 32)
    batch = next(iter(make_loader(Images(source, 32, regions=regions), batch_size=24)))
    assert batch["regions"].dtype == torch.uint8 and batch["regions"].shape == (24, 1, 32, 32)
    (masked / "2.png").write_bytes(b"no image")
    np.savez(masked / "b" / "1.npz", masks=np.zeros(3))
    for name in ("2.png", "1.png"):
        with pytest.raises(UsageError, match=f"{name[0]}.* must hold (labels|binary masks)"):
            read(name)


@pytest.mark.parametrize("values, dtype", [([0, 1], np.uint8), ([0, 255], np.uint8), ([0, 3], np.int64),
                                           ([0.0, 0.25, 1.0], np.float32), ([False, True], bool)])
def test_masks_of_any_values_are_binary(tmp_path, values, dtype):
    """Whatever is not 0 belongs to the mask: two masks of different values are not one label map."""
    write(tmp_path / "images" / "a.png", 8, 12)
    masks = np.random.default_rng(0).choice(np.array(values, dtype), (3, 8, 12))
    (tmp_path / "masks").mkdir()
    np.savez(tmp_path / "masks" / "a.npz", masks=masks)
    source = load_data(str(tmp_path / "images"))
    read = open_regions(str(tmp_path / "masks"), source, str(tmp_path / "images")).read(0, source[0])
    assert read.dtype == torch.bool and np.array_equal(read, masks != 0)
    if dtype == np.int64:
        for own, fine in ((masks * [[[1]], [[2]], [[3]]], True), (masks + (masks > 0) * np.arange(12), False)):
            np.savez(tmp_path / "masks" / "a.npz", masks=own)
            regions = open_regions(str(tmp_path / "masks"), source, str(tmp_path / "images"))
            with contextlib.nullcontext() if fine else pytest.raises(UsageError, match="has several values"):
                regions.read(0, source[0])


def test_masks_of_equal_names_lie_in_their_images_folders(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for path in ("a/1.png", "b/1.png", "b/2.png", "b/3.png"):
        write(images / path)
    for value, path in enumerate(("1.png", "2.png", "3.png", "b/1.png", "b/2.png"), start=1):
        (masks / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16), value, np.uint8)).save(masks / path)
    source = load_data(str(images))
    regions = open_regions(str(masks), source, str(images))
    # 1.png could be of a/1.png or of b/1.png; for b/2.png the mask in its own folder counts
    assert [int(regions.read(i, source[i]).max()) for i in range(4)] == [0, 4, 5, 3]


def test_masks_of_the_scenes_are_named_by_their_seeds(tmp_path):
    source = load_data("shapes", "val", 16, limit=4)
    seed = source.name(2).removeprefix("shapes-16/")
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(tmp_path / f"{seed}.png")
    regions = open_regions(str(tmp_path), source)
    assert [int(regions.read(i, source[i]).max()) for i in range(4)] == [0, 0, 7, 0]


@pytest.mark.parametrize("size, welcome", [
    ((40, 60), True), ((20, 30), True), ((80, 120), True), ((7, 10), True), ((7, 11), True),
    ((60, 40), False), ((40, 40), False), ((20, 33), False)])
def test_maps_of_other_proportions_than_their_image_are_refused(size, welcome):
    """Of any resolution, rounded to whole pixels; `exact`: of the image's size."""
    def refused(exact):
        try:
            datasets.check_shape("x.png", noise(40, 60), size, exact)
        except UsageError as error:
            assert str(error) == f"x.png has 60x40 pixels, its annotations have {size[1]}x{size[0]}"
            return True
        return False

    assert refused(False) is not welcome and refused(True) is (size != (40, 60))


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
        computed = torch.from_numpy(fh_maps(source[i]["image"], regions.scales))
        assert torch.equal(regions.read(i, source[i]), computed)
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
    assert torch.equal(regions.read(2, source[2]), computed)  # a map that is not kept is computed
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
    with pytest.raises(UsageError, match="cannot write .*file/.*npz: .*Not a directory"):
        open_regions("fh", source, "shapes", region_cache=str(tmp_path / "file")).fill()


def test_segments_of_a_broken_file_are_those_of_the_image_in_its_place(folder, tmp_path):
    image = (folder / "train" / "a" / "0.png").read_bytes()
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(image[:60] if i == 1 else image)
    source = load_data(str(tmp_path))
    regions = open_regions("fh", source, str(tmp_path), region_cache=str(tmp_path / "cache"))
    regions.fill()
    assert sorted(map(str, (tmp_path / "cache").rglob("*.npz"))) == [regions.path(0), regions.path(2)]
    item = Images(source, 32, "whole", regions=regions)[1]
    assert item["index"] == 2 and item["broken"] == 1 and item["regions"].shape == (3, 32, 32)


# Class activation maps


@pytest.fixture
def classifier(monkeypatch):
    """A small network of 1000 classes for the ResNet-50; `loaded` has the weights that were asked for."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 32, 32), torch.nn.BatchNorm2d(4),
                                  torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(4, 1000))
    network.loaded = []
    monkeypatch.setattr(datasets, "resnet50", lambda weights: network.loaded.append(weights) or network)
    return network


def test_class_activation_maps_of_a_folder(folder, tmp_path, classifier):
    source = load_data(folder, limit=10)
    regions = open_regions("cam", source, folder, region_cache=str(tmp_path))
    with pytest.raises(UsageError, match="--regions: there is no .*npz"):
        regions.read(0, source[0])
    regions.fill()
    assert classifier.loaded == [None] and len(list(tmp_path.rglob("*.npz"))) == 10
    again = open_regions("cam", source, folder, region_cache=str(tmp_path))
    again.fill()  # with all maps there, weights are not needed
    assert classifier.loaded == [None] and torch.equal(again.read(3, source[3]), regions.read(3, source[3]))
    for index in (0, 9):
        image = Images(source, 224, "whole")[index]["image"]
        expected = mim.class_activation_map(classifier, normalize(image[None]))[0].clamp(0, 1)
        read = regions.read(index, source[index])
        assert read.shape == (1, 7, 7) and read.dtype == torch.float32 and 0 <= read.min() < read.max() == 1
        torch.testing.assert_close(read, expected, atol=0.51 / 255, rtol=0)
    item = Images(source, 16, regions=regions)[0]
    assert item["regions"].shape == (1, 16, 16) and item["regions"].is_floating_point()
    objmae = mim.ObjMAE(mim.ViT(16, 4, 16, 1, 2), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    assert objmae(normalize(item["image"][None]), item["regions"][None])["loss"].isfinite()


@pytest.mark.parametrize("labelled", [False, True])
def test_class_activation_maps_are_of_the_classes_asked_for(labelled, tmp_path, classifier):
    """Of the labels, or of the predictions; each in a folder of its own, and so for each file of weights."""
    class Labelled(Source):
        classes = list(range(1000))

        def __getitem__(self, index):
            return super().__getitem__(index) | dict(label=500 + 7 * index)

        def file(self, index):
            return f"test/{index}"

    source = Labelled(*3 * [noise(40, 60)])
    options = dict(region_cache=str(tmp_path), cam_labels=labelled)
    regions = open_regions("cam", source, "folder", **options)
    regions.fill()
    images = normalize(torch.stack([Images(source, 224, "whole")[k]["image"] for k in range(3)]))
    labels = torch.tensor([500, 507, 514])
    maps = [mim.class_activation_map(classifier, images, asked).clamp(0, 1) for asked in (None, labels)]
    for index in range(3):
        read = regions.read(index, source[index])
        torch.testing.assert_close(read, maps[labelled][index], atol=0.51 / 255, rtol=0)
        assert (read - maps[not labelled][index]).abs().max() > 0.1
    (tmp_path / "weights.pt").write_bytes(b"1")
    folders = {open_regions("cam", source, "folder", cam_labels=asked, cam_weights=weights).folder
               for asked in (False, True) for weights in (None, str(tmp_path / "weights.pt"))}
    assert len(folders) == 4


def test_regions_that_cannot_be_had(folder, tmp_path, monkeypatch):
    source = load_data(folder)
    (tmp_path / "weights.pt").write_bytes(b"none")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "nothing").mkdir()

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    small = torch.nn.ModuleDict(dict(conv1=torch.nn.Conv2d(3, 1, 1, bias=False), bn1=torch.nn.BatchNorm2d(1)))
    download = torchvision.models.resnet50
    monkeypatch.setattr(torchvision.models, "resnet50",
                        lambda weights: download(weights=weights) if weights else small)
    weights = {name: str(tmp_path / f"{name}.pt") for name in ("none", "weights", "other")}
    for kind, options, says in [
            ("instances", {}, "--regions instances: --data .* has none; they come with COCO and shapes"),
            ("panoptic", {}, "--regions panoptic"), ("samm", {}, "--regions samm: no such folder"),
            (str(tmp_path / "nothing"), {}, "nothing in it has the name of an image"),
            ("cam", dict(cam_weights=weights["none"]), "--cam-weights: there is no .*none.pt"),
            ("cam", dict(cam_weights=weights["weights"]),
             "--cam-weights .*weights.pt: the weights of .* could not be loaded .*weights.pt"),
            ("cam", dict(cam_weights=weights["other"]), "--cam-weights .*other.pt: .*[Mm]issing key.*bn1"),
            ("cam", {}, "--cam-weights is not given, so there was a download: .*no network"),
            ("cam", dict(cam_labels=True), "--cam-labels: the labels must be"),
            ("fh", dict(cam_labels=True), "--cam-labels belong to --regions cam, not to fh"),
            ("cam", dict(fh_scales=[9.0]), "--fh-scales belongs to --regions fh, not to cam"),
            ("fh", dict(fh_scales=[9.0, 0.0]), "--fh-scales must be positive, got 0")]:
        with pytest.raises(UsageError, match=says) as caught:
            open_regions(kind, source, folder, region_cache=str(tmp_path / "cache"), **options).fill()
        assert "\n" not in str(caught.value) and not str(caught.value).endswith(":")


@pytest.mark.parametrize("counted", [True, False])
def test_weights_of_the_classifier_may_count_batches(counted, tmp_path, monkeypatch):
    """torchvision's older files do not."""
    saved, network = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    saved.weight.data.fill_(7)
    state = saved.state_dict()
    if not counted:
        del state["num_batches_tracked"]
    torch.save(state, tmp_path / "w.pt")
    monkeypatch.setattr(torchvision.models, "resnet50", lambda weights: network)
    assert (datasets.resnet50(str(tmp_path / "w.pt")).weight == 7).all()


# Maps of the whole image, cut out as an item


def test_a_bright_square_draws_attention_where_crop_and_flip_put_it():
    """Maps of whole images, cut with the items' boxes and flips, agree with the cropped images by patches."""
    torch.manual_seed(0)
    image = torch.zeros(3, 96, 160, dtype=torch.uint8)
    image[:, 16:48, 32:96] = 250
    size, grid, count = (48, 80), (6, 10), 48
    whole = bright_patches(Images(Source(image), size, "whole")[0]["image"][None]).view(1, *grid)
    dataset = Images(Source(image), size, "crop")
    items = [dataset[epoch, 0] for epoch in range(count)]
    flips = torch.tensor([item["flip"] for item in items])
    boxes = torch.stack([item["box"] for item in items])
    weights = mim.crop_maps(whole.half().expand(count, -1, -1), boxes, flips, grid)
    shown = bright_patches(torch.stack([item["image"] for item in items])).view(count, *grid)
    assert (weights - shown).abs().mean() < 0.04
    bright = shown > 0.99
    assert bright.sum() > 200 and weights[bright].min() > 0.45 and weights[shown < 0.01].max() < 0.55
    # ... and so the masks: with every weight on the square, the patches masked first are its own.
    full = [k for k in range(count) if bright[k].sum() >= 6]
    _, ids_masked, _ = mim.attention_masking(weights[full].flatten(1), 5, 20)
    hit = shown[full].flatten(1).gather(1, ids_masked).mean()
    mirrored = shown[full].flip(-1).flatten(1).gather(1, ids_masked).mean()
    assert hit > 0.75 and mirrored < hit - 0.2


def bright_patches(images):
    """uint8 images [B, 3, H, W] -> how bright their patches of 8 x 8 pixels are, [B, N]."""
    return mim.patchify(images.float() / 250, 8).mean(-1)


# Batches


def test_a_seed_gives_the_same_items_for_any_number_of_workers():
    source = load_data("shapes", limit=12)
    batches = [[(1, i) for i in range(k, k + 4)] for k in (0, 4, 8)]
    first, second = (list(make_loader(Images(source, 32, seed=3), w, batch_sampler=batches)) for w in (0, 2))
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert torch.cat([batch["index"] for batch in first]).tolist() == list(range(12))
    labels = [source[i]["label"] for i in range(12)]
    assert torch.cat([batch["label"] for batch in first]).tolist() == labels


def indices_of(*arguments, epoch=0, **options):
    """The micro-batches of an epoch, lists of indices; each key has the epoch."""
    batches = EpochBatches(*arguments, **options)
    batches.epoch = epoch
    found = list(batches)
    assert {e for batch in found for e, _ in batch} == {epoch}
    return [[index for _, index in batch] for batch in found]


def test_an_epochs_order_follows_from_seed_and_epoch_alone():
    keys = [dict(seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    orders = [sum(indices_of(30, 10, 1, **key), []) for key in keys]
    assert all(sorted(order) == list(range(30)) for order in orders)  # every image once
    assert len({tuple(order) for order in orders}) == 6 and list(range(30)) not in orders
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert sum(indices_of(30, 10, 1, epoch=2), []) == orders[2] and torch.equal(torch.get_rng_state(), state)
    assert sum(indices_of(30, 6, 3, epoch=2), []) == orders[2]  # other batches, the same order


def test_images_that_fill_no_batch_wait_for_another_epoch():
    epochs = [sum(indices_of(23, 8, 2, epoch=epoch), []) for epoch in range(12)]
    assert all(len(order) == len(set(order)) == 16 for order in epochs)
    assert set().union(*epochs) == set(range(23))
    assert len(indices_of(8, 8, 1)) == len(indices_of(15, 8, 1)) == 1


def test_processes_share_a_steps_micro_batches_out():
    one = indices_of(23, 8, 4, seed=1)
    assert [len(batch) for batch in one] == [2] * 8  # two steps of four micro-batches
    two = [indices_of(23, 8, 4, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    assert [batch for pair in zip(*two, strict=True) for batch in pair] == one
    four = [indices_of(23, 8, 4, seed=1, rank=rank, world_size=4) for rank in range(4)]
    assert [batch for batches in zip(*four, strict=True) for batch in batches] == one


# Broken files


def test_a_broken_file_is_named_once_and_replaced(tmp_path, capsys):
    for i in range(12):
        write(tmp_path / f"{i:02d}.png", 16, 20 + i)
    for i in (7, 11):
        (tmp_path / f"{i:02d}.png").write_bytes((tmp_path / "01.png").read_bytes()[:40])
    dataset = Images(load_data(str(tmp_path)), 32)
    for asked, found, broken in ((6, 6, -1), (7, 8, 7), (8, 8, -1), (11, 0, 11)):  # 0 comes after the last
        item = dataset[asked]
        assert (item["index"], item["broken"]) == (found, broken)
        assert dataset.read(asked)[0]["image"].shape == (3, 16, 20 + found)
    known, batches = set(), [dict(broken=torch.tensor(broken)) for broken in ([-1, 7, -1], [7], [0, 8, 7])]
    given = name_broken(batches, dataset.source, known)
    assert next(given) is batches[0] and known == {7}
    assert list(given) == batches[1:] and known == {0, 7, 8}
    said = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert said[0] == "07.png" and sorted(said) == ["00.png", "07.png", "08.png"]


def test_tiny_images_count_as_broken_and_all_broken_stops(tmp_path):
    for i, height in enumerate((8, 7, 7)):
        write(tmp_path / f"{i}.png", height, 30)
    dataset = Images(load_data(str(tmp_path)), 32)
    assert [(dataset[k]["index"], dataset[k]["broken"]) for k in range(3)] == [(0, -1), (0, 1), (0, 2)]
    (tmp_path / "0.png").unlink()
    says = "1.png and the images after it are broken; the last one tried: a side has fewer than 8 pixels"
    with pytest.raises(UsageError, match=says):
        Images(load_data(str(tmp_path)), 32)[0]


def test_after_a_hundred_broken_files_none_is_tried():
    class Broken(Source):
        def __getitem__(self, index):
            tried.append(index)
            raise OSError("broken")

    tried = []
    with pytest.raises(UsageError, match="250 and the images after it are broken; .*: broken$"):
        Images(Broken(*300 * [noise(8, 8)]), 8)[250]
    assert tried == [*range(250, 300), *range(50)]


# Batches cropped on the device


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.5, 0.9), (0.95, 1.0)])
def test_boxes_are_distributed_as_torchvisions(scale):
    torch.manual_seed(0)
    count = 1500
    x1, y1, x2, y2 = random_boxes(count, scale, torch.Generator().manual_seed(0)).T
    image = torch.empty(0, 1000, 1000)
    draw = v2.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, scale, (3 / 4, 4 / 3)) for _ in range(count)]) / 1000
    for ours, theirs in zip((y1, x1, y2 - y1, x2 - x1), theirs.T):
        assert ours.min() >= 0 and ours.max() <= 1
        assert abs(ours.mean() - theirs.mean()) < 5 * theirs.std() / (count / 2) ** 0.5
        assert abs(ours.std() - theirs.std()) < 0.1 * theirs.std()
        assert all(abs(ours.quantile(q) - theirs.quantile(q)) < 0.03 for q in (0.1, 0.5, 0.9))


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


@pytest.mark.parametrize("image, size", [
    ((40, 40), (8, 8)), ((40, 40), (8, 40)), ((40, 40), (40, 8)), ((40, 80), (40, 16)), ((80, 40), (16, 40)),
    ((40, 40), (8, 24)), ((40, 40), (24, 8))])
def test_a_fine_pattern_becomes_grey_in_a_smaller_image(image, size):
    """Stripes a pixel wide, across sides that become five times smaller; sampled alone they stay stripes."""
    places = torch.meshgrid(*map(torch.arange, image), indexing="ij")
    stripes = sum(place for place, small, large in zip(places, size, image) if large == 5 * small) % 2
    images = (250.0 * stripes).expand(1, 3, -1, -1)
    out = crop_boxes(images, torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([False]), size)
    assert out.shape == (1, 3, *size) and (out[..., 1:-1, 1:-1] - 125).abs().max() < 30


def test_the_device_loader_makes_a_fine_pattern_grey():
    checkers = (torch.arange(40)[:, None] + torch.arange(40)) % 2 * 250
    dataset = Images(Source(*4 * [checkers.to(torch.uint8).expand(3, -1, -1)]), 8, crop_scale=(0.99, 1.0))
    [batch] = DeviceLoader(dataset, EpochBatches(4, 4, 1), "cpu")
    for image in (*batch["image"], dataset[0]["image"]):  # on the device as in `Images`
        assert (image.float() - 125).abs().mean() < 20


def device_items(dataset, epoch=0, batch_size=4, **options):
    """index -> dict of what the device loader gives of an image in an epoch."""
    batches = EpochBatches(len(dataset), batch_size, **dict(accumulate=1, seed=dataset.seed) | options)
    batches.epoch = epoch
    loader, items = DeviceLoader(dataset, batches, "cpu"), {}
    for count, batch in enumerate(loader, start=1):
        assert set(batch) == {"image", "index", "box", "flip", "broken"} and len(batch["broken"]) == 0
        for k, index in enumerate(batch["index"].tolist()):
            items[index] = {key: batch[key][k] for key in ("image", "box", "flip")}
    assert count == len(list(batches))
    return items


def same_items(a, b):
    return all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])


def test_the_device_loader_says_where_the_pixels_come_from():
    dataset = Images(Source(*[coordinates(40, 60)] * 24), (16, 24), crop_scale=(0.3, 0.9), seed=5)
    items = device_items(dataset, 3)
    assert len(items) == 24 and {bool(item["flip"]) for item in items.values()} == {True, False}
    for item in items.values():
        image, (x1, y1, x2, y2) = item["image"], item["box"]
        x = x1 + (x2 - x1) * (torch.arange(24) + 0.5) / 24
        y = y1 + (y2 - y1) * (torch.arange(16) + 0.5) / 16
        x = x.flip(0) if item["flip"] else x
        assert image.shape == (3, 16, 24) and image.dtype == torch.uint8
        assert (image[0, 3:-3, 3:-3] - 250 * x[3:-3]).abs().max() < 2
        assert (image[1, 3:-3, 3:-3] - 250 * y[3:-3, None]).abs().max() < 2
        assert 0.29 < (x2 - x1) * (y2 - y1) < 0.91


def test_the_device_loaders_images_are_those_of_their_indices():
    images = [torch.full((3, 16, 16), 10 * k + 5, dtype=torch.uint8) for k in range(12)]
    for index, item in device_items(Images(Source(*images), 8, seed=2)).items():
        assert item["image"].unique().tolist() == [10 * index + 5]


def test_the_device_loader_clips_what_interpolation_adds():
    """Beside an edge from black to white bicubic interpolation goes beyond both: black stays black."""
    edge = (torch.arange(16) >= 8).to(torch.uint8).expand(3, 16, -1) * 255
    for item in device_items(Images(Source(*8 * [edge]), 32, crop_scale=(0.5, 0.9))).values():
        image = item["image"].flip(-1) if item["flip"] else item["image"]
        assert (image.int().diff(dim=-1) >= 0).all() and image.min() == 0 and image.max() == 255


def test_the_device_loader_depends_on_seed_and_epoch_alone():
    source = Source(*12 * [noise(40, 40)])
    dataset = Images(source, 16, seed=5)
    items = device_items(dataset, 3)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert same_items(items, device_items(dataset, 3)) and torch.equal(torch.get_rng_state(), state)
    halves = [device_items(dataset, 3, accumulate=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert same_items(items, halves[0] | halves[1])  # two processes: the same items
    others = [device_items(dataset, 4), device_items(Images(source, 16, seed=6), 3), items]
    boxes = {tuple(item["box"].tolist()) for other in others for item in other.values()}
    assert len(boxes) == 36  # no two images, epochs or seeds have a crop in common


def test_the_device_loaders_flips_and_crops_are_as_asked():
    dataset = Images(Source(*400 * [noise(16, 16)]), 8, crop_scale=(0.3, 0.5))
    items = device_items(dataset, batch_size=100)
    assert abs(sum(int(item["flip"]) for item in items.values()) - 200) < 40
    boxes = torch.stack([item["box"] for item in items.values()])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert 0.3 - 1e-4 < areas.min() < 0.31 and 0.49 < areas.max() < 0.5 + 1e-4
    items = device_items(replace(dataset, flip=False), batch_size=100)
    assert not any(item["flip"] for item in items.values())


def test_a_loop_over_images_ends():
    images = datasets.Images(torch.utils.data.Subset(datasets.load_data("shapes", "val", 16), range(3)), 16)
    assert [item["index"] for item in images] == [0, 1, 2]
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"there are 3 images, and none at {index}"):
            images[index]
