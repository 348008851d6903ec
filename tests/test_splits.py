"""Which images a split has, with which labels and truth: every kind of data, written small, each image known.

An image's colour says which split it was written for, its number there and its label. So a split can be
compared with what it must hold, and an image with its label, however the data are stored.
"""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torchvision
from PIL import Image

import eval as evaluation
from datasets import IGNORED, SHAPE_CLASSES, UsageError, load_data, load_dense, open_regions, render_scene

WRITTEN_FOR = ("train", "val", "unlabelled")
HEIGHT, WIDTH = 16, 32
COCO_PLACE = dict(train=[18, 0, 12, 8], val=[3, 5, 20, 4])  # x, y, width and height of the objects
ADE_PARTS = dict(train="training", val="validation")
LAST = dict(train=2, val=3)  # the last pixel's label in ADE20K's and Pascal VOC's maps


def coded(split, number, label=0, height=HEIGHT, width=WIDTH):
    """An image uint8 [height, width, 3], its colour (split, number, label), its upper right white."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = [8 * k + 4 for k in (WRITTEN_FOR.index(split), number, label)]  # JPEG may change it by 3
    image[:height // 2, width // 2:] = 255
    return image


def code_of(image):
    """(split, number, label) of such an image [3, H, W], which must be neither turned nor mirrored."""
    height, width = image.shape[1:]
    assert image[:, :height // 2, width // 2:].min() > 245 and image[:, height // 2:].max() < 245
    assert image[:, :, :width // 2].max() < 245
    split, number, label = (image[:, -1, 0] // 8).tolist()
    return WRITTEN_FOR[split], number, label


def codes_of(source):
    return [code_of(source[i]["image"]) for i in range(len(source))]


def three_and_two():
    """Three images to train on and two to test on, without labels."""
    counts = dict(train=3, val=2)
    return {split: {(split, number, 0) for number in range(count)} for split, count in counts.items()}


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **(dict(quality=98, subsampling=0) if path.suffix == ".jpg" else {}))


# ---------------------------------------------------------------------------------------------------------
# Data by kind: write_...(root) -> what each split must hold, as a set of (written for, number, label)


def write_cifar(root, name):
    """Five files to train on in CIFAR-10, one in CIFAR-100; one to test on. 100 has coarse labels, too."""
    cls = getattr(torchvision.datasets, name.upper())
    folder, found = root / cls.base_folder, dict(train=set(), val=set())
    folder.mkdir()
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: list("abcdefghij")}))
    for split, files in (("train", cls.train_list), ("val", cls.test_list)):
        for k, (file, _) in enumerate(files):
            count = 3 if split == "val" else 2
            codes = [(split, number, (number * 3 + 1) % 10) for number in range(2 * k, 2 * k + count)]
            data = np.stack([coded(*code, 32, 32).transpose(2, 0, 1).ravel() for code in codes])
            labels = [label for _, _, label in codes]
            entry = dict(data=data, labels=labels)
            if name == "cifar100":
                entry = dict(data=data, fine_labels=labels, coarse_labels=labels[::-1])
            (folder / file).write_bytes(pickle.dumps(entry))
            found[split] |= set(codes)
    return dict(pretrain=found["train"]) | found


def write_stl10(root):
    """Images are stored by columns, labels from 1."""
    folder, found = root / "stl10_binary", {}
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    for split, stem, count in (("train", "train", 4), ("val", "test", 3), ("unlabelled", "unlabeled", 5)):
        codes = [(split, number, 9 - number) for number in range(count)]
        np.stack([coded(*code, 96, 96).transpose(2, 1, 0) for code in codes]).tofile(folder / f"{stem}_X.bin")
        if split != "unlabelled":
            np.array([label + 1 for *_, label in codes], np.uint8).tofile(folder / f"{stem}_y.bin")
        found[split] = set(codes)
    return dict(pretrain=found["train"] | found["unlabelled"], train=found["train"], val=found["val"])


def write_train_and_val(root):
    """A folder per class in train/ and val/. val/ lacks the first class, and labels are those of train/."""
    train = {("train", number, label) for label in range(3) for number in range(2 + label)}
    val = {("val", number, label) for label in (1, 2) for number in range(2)}
    for split, number, label in train | val:
        write(root / split / f"n0{label}" / f"{number}.png", coded(split, number, label))
    return dict(pretrain=train, train=train, val=val)


def write_folder_per_class(root):
    """Every tenth image of a class, in the order of names, is the val split."""
    every = {("train", number, label) for label, count in enumerate((21, 9, 10)) for number in range(count)}
    for split, number, label in every:
        write(root / "abc"[label] / "deeper" / f"{number:02d}.png", coded(split, number, label))
    val = {(split, number, label) for split, number, label in every if number % 10 == 9}
    return dict(pretrain=every, train=every - val, val=val)


def write_tiny_imagenet(root):
    """The images of val/ lie in one folder, their classes in a list."""
    train = {("train", number, label) for label in range(3) for number in range(2)}
    val = {("val", number, (2 * number + 1) % 3) for number in range(4)}
    for split, number, label in train:
        write(root / "train" / f"n0{label}" / "images" / f"{number}.png", coded(split, number, label))
    for split, number, label in val:
        write(root / "val" / "images" / f"val_{number}.png", coded(split, number, label))
    write(root / "test" / "images" / "test_0.png", coded("unlabelled", 0))
    rows = [f"val_{number}.png\tn0{label}\t0\t0\t9\t9\n" for _, number, label in sorted(val)]
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    return dict(pretrain=train, train=train, val=val)


def write_coco(root):
    """Two years of train images, of which the newer count, and a folder of test images."""
    found = three_and_two()
    for split, codes in found.items():
        for code in codes:
            write(root / f"{split}2017" / f"{code[1]:012d}.jpg", coded(*code))
        write_annotations(root, split, sorted(number for _, number, _ in codes))
    for folder in ("train2014", "test2017"):
        write(root / folder / "000000000000.jpg", coded("unlabelled", 0))
    (root / "val2018").mkdir()  # empty: not a newer split
    return dict(pretrain=found["train"]) | found


def write_annotations(root, split, numbers):
    """COCO's annotations: image k has one object and one segment, in `COCO_PLACE`, of category 30 + k."""
    images = [dict(id=k, file_name=f"{k:012d}.jpg", height=HEIGHT, width=WIDTH) for k in numbers]
    categories = [dict(id=30 + k, name=f"thing {k}") for k in (2, 0, 1)]
    x, y, width, height = COCO_PLACE[split]
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    objects = [dict(image_id=k, category_id=30 + k, area=50 + k, bbox=COCO_PLACE[split], iscrowd=int(k == 1),
                    segmentation=[polygon]) for k in numbers]
    segments = [dict(image_id=k, file_name=f"{k:012d}.png", segments_info=[dict(id=7, category_id=30 + k)])
                for k in numbers]
    for kind, annotations in (("instances", objects), ("panoptic", segments)):
        path = root / "annotations" / f"{kind}_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    ids = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    ids[..., 0] = 7 * in_place(split)
    for k in numbers:
        write(root / "annotations" / f"panoptic_{split}2017" / f"{k:012d}.png", ids)


def in_place(split):
    """Bool [HEIGHT, WIDTH]: where the object of each of COCO's images is."""
    x, y, width, height = COCO_PLACE[split]
    rows, columns = np.indices((HEIGHT, WIDTH))
    return (rows >= y) & (rows < y + height) & (columns >= x) & (columns < x + width)


def write_ade20k(root):
    """Classes from 1, 0 is unlabelled: the upper right of image k is of 3 k + 1, the lower left of 150."""
    found = three_and_two()
    for split, part in ADE_PARTS.items():
        for _, number, _ in found[split]:
            labels = quarters(3 * number + 1, 150, 0, LAST[split])
            write(root / "images" / part / f"ADE_{number}.jpg", coded(split, number))
            write(root / "annotations" / part / f"ADE_{number}.png", labels)
    return found


def write_pascal_voc(root):
    """Classes from 0, the background; 255 is ignored. All images lie in one folder, the splits in lists."""
    found = three_and_two()
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, codes in found.items():
        for _, number, _ in codes:
            labels = quarters(3 * number, 20, 255, LAST[split])
            write(root / "JPEGImages" / f"{split}_{number}.jpg", coded(split, number))
            write(root / "SegmentationClass" / f"{split}_{number}.png", labels)
        names = [f"{split}_{number}\n" for _, number, _ in sorted(codes)]
        (lists / f"{split}.txt").write_text("".join(names))
        with open(lists / "trainval.txt", "a") as file:
            file.writelines(names)
    write(root / "JPEGImages" / "other.jpg", coded("unlabelled", 0))  # has no pixels' classes
    return found


def quarters(upper_right, lower_left, elsewhere, last):
    """A label map [HEIGHT, WIDTH]; `last` is the label of the last pixel, at the lower right."""
    labels = np.full((HEIGHT, WIDTH), elsewhere, np.int16 if elsewhere < 0 else np.uint8)
    labels[:HEIGHT // 2, WIDTH // 2:] = upper_right
    labels[HEIGHT // 2:, :WIDTH // 2] = lower_left
    labels[-1, -1] = last
    return labels


WRITERS = dict(
    cifar10=lambda root: write_cifar(root, "cifar10"), cifar100=lambda root: write_cifar(root, "cifar100"),
    stl10=write_stl10, train_and_val=write_train_and_val, folder_per_class=write_folder_per_class,
    tiny_imagenet=write_tiny_imagenet, coco=write_coco)
DENSE_WRITERS = dict(coco=write_coco, ade20k=write_ade20k, pascal_voc=write_pascal_voc)


@pytest.fixture
def trusting(monkeypatch):
    """torchvision takes the small archives for its own."""
    for module in ("cifar", "stl10"):
        check = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(check, lambda path, md5=None: os.path.exists(path))


# ---------------------------------------------------------------------------------------------------------
# Splits


def check_splits(sources, expected):
    """Each split holds what it must, no image twice, and train nothing of val, nor a file of its regions."""
    codes = {split: codes_of(source) for split, source in sources.items()}
    files = {split: [source.name(i) for i in range(len(source))] for split, source in sources.items()}
    for split in expected:
        assert len(codes[split]) == len(set(codes[split])) == len(set(files[split]))
        assert set(codes[split]) == expected[split], split
    assert not set(codes["train"]) & set(codes["val"]) and not set(files["train"]) & set(files["val"])
    return codes


@pytest.mark.parametrize("kind", WRITERS)
def test_every_split_is_the_split_that_it_says(kind, tmp_path, trusting):
    expected = WRITERS[kind](tmp_path)
    data = kind if kind.startswith(("cifar", "stl")) else str(tmp_path)
    sources = {split: load_data(data, split, root=str(tmp_path)) for split in ("pretrain", "train", "val")}
    codes = check_splits(sources, expected)
    for split in ("train", "val"):
        source = sources[split]
        assert [source[i]["label"] for i in range(len(source))] == [label for *_, label in codes[split]]
        assert source.classes == sources["train"].classes
    assert codes_of(load_data(data, root=str(tmp_path))) == codes["pretrain"]
    part, places = load_data(data, "train", limit=2, root=str(tmp_path)), (0, len(codes["train"]) // 2)
    assert codes_of(part) == [codes["train"][k] for k in places]
    assert [part[i]["label"] for i in range(2)] == [codes["train"][k][2] for k in places]
    assert [part.name(i) for i in range(2)] == [sources["train"].name(k) for k in places]


@pytest.mark.parametrize("split, other", [("train", "val"), ("val", "train")])
def test_a_coco_root_with_one_split_is_cocos(tmp_path, split, other):
    expected = write_coco(tmp_path)
    for folder in tmp_path.glob(f"{other}20*"):
        shutil.rmtree(folder)
    for file in (tmp_path / "annotations").glob(f"*_{other}2017.json"):
        file.unlink()
    source, found = evaluation.load_unlabelled(str(tmp_path))
    assert found == ("val" if split == "val" else "pretrain") and not source.turn
    assert set(codes_of(source)) == expected[split]
    settings = dict(data=str(tmp_path), regions="instances", workers=0)
    drawn = evaluation.open_images(str(tmp_path), [16, 16], settings, count=2)
    assert drawn["regions"].any()


@pytest.mark.parametrize("objects", [False, True])
@pytest.mark.parametrize("kind", DENSE_WRITERS)
def test_every_dense_split_is_the_split_that_it_says(kind, objects, tmp_path):
    expected = DENSE_WRITERS[kind](tmp_path)
    if objects and kind != "coco":
        with pytest.raises(UsageError, match="has no objects for the val split; give shapes or COCO"):
            load_dense(str(tmp_path), objects, "val")
        return
    check_splits({split: load_dense(str(tmp_path), objects, split) for split in ("train", "val")},
                 {split: expected[split] for split in ("train", "val")})
    assert code_of(load_dense(str(tmp_path), objects)[0]["image"])[0] == "train"


@pytest.mark.parametrize("objects", [False, True])
def test_the_scenes_dense_splits_share_none(objects):
    sources = {split: load_dense("shapes", objects, split, (24, 16)) for split in ("train", "val")}
    names = {split: {source.name(i) for i in range(len(source))} for split, source in sources.items()}
    assert len(names["train"]) == 4096 and len(names["val"]) == 1024 and not names["train"] & names["val"]
    for split, source in sources.items():
        assert np.array_equal(source[9]["image"], load_data("shapes", split, 24)[9]["image"])


def test_data_of_classes_of_pixels_are_found_by_their_split(tmp_path):
    with pytest.raises(UsageError, match="has no classes of pixels for the val split"):
        load_dense(str(tmp_path), False, "val")
    write_coco(tmp_path / "coco")
    for path in (tmp_path / "coco" / "val2017").iterdir():
        path.unlink()
    for objects in (False, True):
        assert len(load_dense(str(tmp_path / "coco"), objects, "train")) == 3
        with pytest.raises(UsageError, match="no images in .*/coco/val2017"):
            load_dense(str(tmp_path / "coco"), objects, "val")


@pytest.mark.parametrize("kind", [*DENSE_WRITERS, "shapes"])
def test_a_limit_thins_dense_data_out(kind, tmp_path):
    data = kind
    if kind != "shapes":
        DENSE_WRITERS[kind](tmp_path)
        data = str(tmp_path)
    whole, part = load_dense(data, False, "train"), load_dense(data, False, "train", limit=2)
    assert len(part) == 2 and part.name(1) == whole.name(len(whole) // 2)
    item = part[1]
    assert np.array_equal(part.truth(1, item), whole.truth(len(whole) // 2, item))


# ---------------------------------------------------------------------------------------------------------
# Dense truth


@pytest.mark.parametrize("split, count", [("train", 3), ("val", 2)])
def test_ade20ks_classes_are_counted_from_1(split, count, tmp_path):
    write_ade20k(tmp_path)
    source = load_dense(str(tmp_path), False, split)
    assert source.classes == [f"class {k}" for k in range(1, 151)]
    for i in range(count):
        truth = source.truth(i, source[i])
        assert truth.dtype == np.int16
        assert np.array_equal(truth, quarters(3 * i, 149, IGNORED, LAST[split] - 1))
    for label, known in ((151, False), (255, True), (150, True), (0, True)):
        labels = np.full((HEIGHT, WIDTH), label, np.uint8)
        write(tmp_path / "annotations" / ADE_PARTS[split] / "ADE_0.png", labels)
        if known:
            expected = 149 if label == 150 else IGNORED
            assert (source.truth(0, source[0]) == expected).all()
        else:
            with pytest.raises(UsageError, match="ADE_0.png: label 151 is not one of 150 classes"):
                source.truth(0, source[0])


@pytest.mark.parametrize("split, count", [("train", 3), ("val", 2)])
def test_pascal_vocs_classes_are_counted_from_0(split, count, tmp_path):
    write_pascal_voc(tmp_path)
    source = load_dense(str(tmp_path), False, split)
    assert (len(source.classes), source.classes[0], source.classes[20]) == (21, "background", "tvmonitor")
    for i in range(count):
        truth = source.truth(i, source[i])
        assert truth.dtype == np.int16 and np.array_equal(truth, quarters(3 * i, 20, IGNORED, LAST[split]))
    write(tmp_path / "SegmentationClass" / f"{split}_0.png", np.full((HEIGHT, WIDTH), 21, np.uint8))
    with pytest.raises(UsageError, match=f"{split}_0.png: label 21 is not one of 21 classes"):
        source.truth(0, source[0])


def test_labels_of_another_size_are_refused(tmp_path):
    write_pascal_voc(tmp_path)
    source = load_dense(str(tmp_path), False, "val")
    for height, width in ((WIDTH, HEIGHT), (2 * HEIGHT, 2 * WIDTH)):
        write(tmp_path / "SegmentationClass" / "val_1.png", np.zeros((height, width), np.uint8))
        with pytest.raises(UsageError, match=f"has 32x16 pixels, its annotations have {width}x{height}"):
            source.truth(1, source[1])


@pytest.mark.parametrize("split, count", [("train", 3), ("val", 2)])
def test_cocos_segments_are_classes_in_the_order_of_the_ids(split, count, tmp_path):
    write_coco(tmp_path)
    source = load_dense(str(tmp_path), False, split)
    assert source.classes == [f"thing {k}" for k in range(3)]
    for i in range(count):
        truth = source.truth(i, source[i])
        assert truth.dtype == np.int16 and np.array_equal(truth, np.where(in_place(split), i, IGNORED))


@pytest.mark.parametrize("split, count", [("train", 3), ("val", 2)])
def test_cocos_objects_have_the_areas_boxes_and_crowds_of_the_annotations(split, count, tmp_path):
    write_coco(tmp_path)
    source = load_dense(str(tmp_path), True, split)
    assert source.classes == [f"thing {k}" for k in range(3)]
    for i in range(count):
        truth = source.truth(i, source[i])
        assert truth["masks"].dtype == bool and np.array_equal(truth["masks"], in_place(split)[None])
        assert truth["boxes"].tolist() == [COCO_PLACE[split]] and truth["labels"].tolist() == [i + 1]
        assert truth["areas"].tolist() == [50 + i] and truth["crowd"].tolist() == [i == 1]


@pytest.mark.parametrize("split", ["pretrain", "train", "val"])
def test_cocos_regions_are_of_the_splits_own_annotations(split, tmp_path):
    write_coco(tmp_path)
    source = load_data(str(tmp_path), split)
    place = in_place("val" if split == "val" else "train")
    for kind in ("instances", "panoptic"):
        regions = open_regions(kind, source, str(tmp_path), split)
        assert np.array_equal(regions.read(0, source[0]), place[None])
        crowd = regions.read(1, source[1])  # is no instance, but a segment
        assert np.array_equal(crowd, place[None] & (kind == "panoptic"))


def write_own(root, labels, layout="{what}/{split}", names=None):
    """One's own images and masks: labels is a dict of split -> lists of two labels, an image each."""
    for split, pairs in labels.items():
        for number, (one, other) in enumerate(pairs):
            masks = np.full((HEIGHT, WIDTH), one, np.uint16 if max(one, other) > 255 else np.uint8)
            masks[3:, 5:] = other
            images, to = (root / layout.format(what=what, split=split) for what in ("images", "masks"))
            write(images / f"{number}" / "1.jpg", coded(split, number))
            write(to / f"{number}" / "1.png", masks)
    if names:
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return str(root)


def labels_of(source):
    """The classes of two pixels of each image: the first, and the last."""
    truths = [source.truth(i, source[i]) for i in range(len(source))]
    assert all((truth[3:, 5:] == truth[-1, -1]).all() for truth in truths)
    return [(truth[0, 0], truth[-1, -1]) for truth in truths]


@pytest.mark.parametrize("layout", ["{what}/{split}", "{split}/{what}"])
def test_ones_own_masks_have_the_classes_of_the_training_masks(layout, tmp_path):
    """Labels 0, 7, 300 and 255, which does not count; the validation masks have one of them."""
    labels = dict(train=[(0, 7), (7, 300), (255, 300)], val=[(300, 255)])
    root = write_own(tmp_path, labels, layout)
    train, val = load_dense(root, False), load_dense(root, False, "val")
    assert train.classes == val.classes == ["0", "7", "300"] and list(train.categories) == [0, 7, 300]
    assert codes_of(train) == [("train", k, 0) for k in range(3)] and codes_of(val) == [("val", 0, 0)]
    assert labels_of(train) == [(0, 1), (1, 2), (IGNORED, 2)] and labels_of(val) == [(2, IGNORED)]
    masks = tmp_path / layout.format(what="masks", split="val")
    write(masks / "0" / "1.png", np.full((HEIGHT, WIDTH), 9, np.uint8))
    with pytest.raises(UsageError, match="val/.*1.png: label 9 is not one of 3 classes"):
        labels_of(load_dense(root, False, "val"))


def test_classes_txt_names_the_labels(tmp_path):
    """Of one's own masks and of those in ADE20K's layout, in which 0 is then a class."""
    names = ["grass", "tree", "lake"]
    root = write_own(tmp_path / "own", dict(train=[(0, 1)], val=[(2, 255)]), names=names)
    for split, expected in (("train", [(0, 1)]), ("val", [(2, IGNORED)])):
        source = load_dense(root, False, split)
        assert source.classes == names and labels_of(source) == expected
    (tmp_path / "own" / "classes.txt").write_text("\ufeffgrass\ntree\nlake\n\n", "utf-8")
    assert load_dense(root, False).classes == names
    names = {0: "tree", 1: "grass", 2: "lake"}
    with pytest.raises(UsageError, match="own: its classes are not those of the training data"):
        load_dense(root, False, "val", categories=names)
    write_ade20k(tmp_path / "ade")
    (tmp_path / "ade" / "classes.txt").write_text("\n".join(f"name {k}" for k in range(151)))
    source = load_dense(str(tmp_path / "ade"), False, "val")
    assert source.classes[150] == "name 150"
    for i in range(2):
        assert np.array_equal(source.truth(i, source[i]), quarters(3 * i + 1, 150, 0, LAST["val"]))


@pytest.mark.parametrize("labels", [(0, 0), (1, 1), (1, 255)])
def test_two_names_are_those_of_0_and_1(tmp_path, labels):
    root = write_own(tmp_path, dict(train=[labels], val=[(0, 1)]), names=["road", "crack"])
    train = load_dense(root, False)
    assert train.categories == {0: "road", 1: "crack"} == load_dense(root, False, "val").categories
    assert labels_of(train) == [tuple(IGNORED if k == 255 else k for k in labels)]


@pytest.mark.parametrize("names", [None, ["paper", "ink"]])
@pytest.mark.parametrize("last, expected", [
    (0, [(0, 1), (1, 1), (0, 0)]), (1, [(0, IGNORED), (IGNORED, IGNORED), (0, 1)])])
def test_masks_of_0_and_255_are_two_classes(tmp_path, names, last, expected):
    """If there is a 1, too, 255 does not count, as elsewhere."""
    root = write_own(tmp_path, dict(train=[(0, 255), (255, 255), (0, last)], val=[(255, 0)]), names=names)
    train, val = load_dense(root, False), load_dense(root, False, "val")
    assert labels_of(train) == expected
    assert labels_of(val) == [(1, 0) if last == 0 else (IGNORED, 0)]
    assert train.classes == val.classes == (names or ["0", "1" if last else "255"])


@pytest.mark.parametrize("layout", ["{what}/{split}", "{split}/{what}", "ade20k", "pascal_voc"])
def test_masks_are_no_images_to_pretrain_on(tmp_path, layout):
    """In the layouts of semantic segmentation all images are for pre-training, without labels."""
    if layout in DENSE_WRITERS:
        expected = DENSE_WRITERS[layout](tmp_path)["train"]
    else:
        write_own(tmp_path, dict(train=[(0, 1), (1, 0)], val=[(0, 0)]), layout)
        expected = {("train", 0, 0), ("train", 1, 0)}
    source = load_data(str(tmp_path))
    codes = {(split, number) for split, number, _ in codes_of(source)}
    wanted = {(split, number) for split, number, _ in expected}
    if layout == "pascal_voc":  # its splits share a folder
        assert codes > wanted and len(source) == len(list((tmp_path / "JPEGImages").iterdir()))
    else:
        assert codes == wanted
        assert {split for split, *_ in codes_of(load_data(str(tmp_path), "val"))} == {"val"}
    assert source.classes == [] and source.description.endswith("images, no labels")


def test_masks_of_the_val_split_alone_are_not_in_the_way(tmp_path):
    write_train_and_val(tmp_path)
    (tmp_path / "images" / "val").mkdir(parents=True)
    (tmp_path / "masks" / "val").mkdir(parents=True)
    assert load_data(str(tmp_path)).description.startswith(f"{tmp_path}: train/ and val/ with a folder per class")


def test_images_with_masks_without_a_val_split_are_drawn_from_train(tmp_path):
    root = write_own(tmp_path, dict(train=[(0, 1), (1, 0)]))
    with pytest.raises(UsageError, match="it has images with masks, but none for the val split"):
        load_data(root, "val")
    source, split = evaluation.load_unlabelled(root)
    assert split == "pretrain" and len(source) == 2


def test_masks_of_255_alone_have_no_classes(tmp_path):
    with pytest.raises(UsageError, match="no pixel of .*masks/train counts, all labels are 255"):
        load_dense(write_own(tmp_path, dict(train=[(255, 255)])), False)


def test_images_without_a_mask_are_left_out(tmp_path):
    root = write_own(tmp_path, dict(train=[(0, 1), (1, 0), (2, 2)]))
    (tmp_path / "masks" / "train" / "1" / "1.png").unlink()
    source = load_dense(root, False)
    assert codes_of(source) == [("train", 0, 0), ("train", 2, 0)] and labels_of(source) == [(0, 1), (2, 2)]
    assert source.description == f"{root}: images/train, 2 images, 3 classes, images without mask: 1"
    (tmp_path / "masks" / "train" / "2" / "1.png").write_bytes(b"no mask")
    with pytest.raises(UsageError, match="--data .*: .*train/2/1.png cannot be read .cannot identify"):
        load_dense(root, False)


def test_folders_without_images_are_one_line(tmp_path):
    for what in ("images", "masks"):
        (tmp_path / what / "train").mkdir(parents=True)
    with pytest.raises(UsageError, match=f"no images in {tmp_path}/images/train .looked for .jpg"):
        load_dense(str(tmp_path), False)
    write_coco(tmp_path / "coco")
    for path in (tmp_path / "coco" / "train2017").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match=f"no images in {tmp_path}/coco/train2017 .looked"):
        load_dense(str(tmp_path / "coco"), True)


def test_images_that_differ_in_their_extensions_share_no_mask(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg"):
        write(tmp_path / "images" / "train" / name, coded("train", 0))
    for name in ("a.png", "b.png"):
        write(tmp_path / "masks" / "train" / name, np.ones((HEIGHT, WIDTH), np.uint8))
    source = load_dense(str(tmp_path), False)
    assert [source.path(i) for i in range(len(source))] == ["b.jpg"]


def test_the_scenes_objects_and_classes():
    objects, classes = (load_dense("shapes", kind, "val", 48, 30) for kind in (True, False))
    assert objects.classes == list(SHAPE_CLASSES) and classes.classes == ["background", *SHAPE_CLASSES]
    for i in range(30):
        item = objects[i]
        _, label, instances, shapes = render_scene(int(objects.name(i).split("/")[1]), 48)
        truth = objects.truth(i, item)
        assert truth["labels"].tolist() == [shape + 1 for shape in shapes] and shapes[0] == label
        for k, (mask, box, area) in enumerate(zip(truth["masks"], truth["boxes"], truth["areas"])):
            assert np.array_equal(mask, instances == k + 1) and area == mask.sum()
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert truth["crowd"].tolist() == [False] * len(shapes)
        expected = np.array([0] + [shape + 1 for shape in shapes])[instances]
        assert np.array_equal(classes.truth(i, item), expected)


def test_a_hidden_object_of_a_scene_is_left_out():
    source = load_dense("shapes", True, "val", 16)
    item = dict(source[0], shapes=[4, 7, 2])
    item["instances"] = item["instances"].clone().fill_(0)
    item["instances"][2:5, 3:9], item["instances"][9, 9] = 1, 3  # the second is hidden
    truth = source.truth(0, item)
    assert truth["labels"].tolist() == [5, 3] and truth["areas"].tolist() == [18, 1]
    assert truth["boxes"].tolist() == [[3, 2, 6, 3], [9, 9, 1, 1]]
