"""The COCO reader against masks worked out by hand."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from datasets import (CocoRegions, MaskFolder, UsageError, coco_folder, coco_mask, fill_polygon, load_coco,
                      read_ids, rle_counts)

H, W = 8, 10


def compress(counts):
    """COCO's compressed run lengths, from the bits of the numbers as two's complement text."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        length = 5
        while not -(1 << length - 1) <= value < 1 << length - 1:
            length += 5
        bits = format(value % (1 << length), f"0{length}b")
        groups = [bits[k:k + 5] for k in range(0, length, 5)][::-1]
        text += "".join(chr(48 + int(g, 2) + 32 * (k + 1 < len(groups))) for k, g in enumerate(groups))
    return text


def run_lengths(mask):
    """The lengths of the runs of 0, 1, 0, ... down the columns."""
    counts, last = [0], 0
    for value in mask.T.ravel().astype(int).tolist():
        if value != last:
            counts, last = counts + [0], value
        counts[-1] += 1
    return counts


def picture(*rows):
    """A map drawn as text, a row a string, "." for 0."""
    return np.array([[0 if c == "." else int(c) for c in row] for row in rows])


def write(root, year=2017, split="train"):
    """A COCO root: the image 7 has all kinds of annotations, 8 and 9 none, 10 is not in the JSON file."""
    name = f"{split}{year}"
    for folder in (root / name, root / "annotations" / f"panoptic_{name}"):
        folder.mkdir(parents=True)
    for number in (9, 7, 8, 10):
        Image.new("RGB", (W, H), (90, 120, 30)).save(root / name / f"{number:012d}.jpg")
    rle = np.zeros((H, W), bool)
    rle[6:8, 0:9] = True
    segmentations = [  # in no order of area
        dict(area=4, iscrowd=0, image_id=7, category_id=3, bbox=[2, 1, 2, 2],
             segmentation=[[2, 1, 4, 1, 4, 3, 2, 3]]),
        dict(area=80, iscrowd=1, image_id=7, segmentation=dict(size=[H, W], counts=[0, 80])),
        dict(area=18, iscrowd=0, image_id=7, segmentation=dict(size=[H, W], counts=run_lengths(rle))),
        dict(area=30, iscrowd=0, image_id=7, segmentation=[[1, 0, 7, 0, 7, 5, 1, 5]]),
        dict(area=1, iscrowd=0, image_id=7, segmentation=dict(size=[H, W], counts=compress([79, 1]))),
    ]
    images = [dict(id=n, file_name=f"{n:012d}.jpg", height=H, width=W) for n in (9, 8, 7)]
    instances = dict(images=images, annotations=segmentations, categories=[dict(id=3, name="cat")])
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(instances))
    ids = [70000, 5, 300]  # beyond two bytes, in one, in two
    colours = np.zeros((H, W, 3), np.uint8)
    colours[0:4, 0:5] = (112, 17, 1)  # 112 + 256 * 17 + 65536 = 70000
    colours[0:4, 5:10] = (5, 0, 0)
    colours[4:6] = (44, 1, 0)  # 44 + 256 = 300; the last two rows stay void
    Image.fromarray(colours).save(root / "annotations" / f"panoptic_{name}" / "000000000007.png")
    segments = dict(image_id=7, file_name="000000000007.png", segments_info=[dict(id=i) for i in ids])
    panoptic = dict(images=images, annotations=[segments])
    (root / "annotations" / f"panoptic_{name}.json").write_text(json.dumps(panoptic))
    return root


def test_a_polygon_holds_the_pixels_whose_centres_it_holds():
    rectangle = fill_polygon([2, 1, 5, 1, 5, 7, 2, 7], H, W)
    assert rectangle.dtype == bool and rectangle.shape == (H, W)
    expected = np.zeros((H, W), bool)
    expected[1:7, 2:5] = True
    np.testing.assert_array_equal(rectangle, expected)
    # The centres (3, 2 and 4, 3) of columns and rows lie inside, those half a pixel on do not
    small = fill_polygon([2.6, 1.6, 4.4, 1.6, 4.4, 3.4, 2.6, 3.4], H, W)
    np.testing.assert_array_equal(np.argwhere(small), [[2, 3]])
    triangle = fill_polygon([0, 0, 4.2, 0, 0, 4.2], 4, 5)  # x + y < 4.2 at the centres
    np.testing.assert_array_equal(triangle, picture("1111.", "111..", "11...", "1...."))
    assert fill_polygon([-5, -5, 50, -5, 50, 50, -5, 50], H, W).all()  # over all borders
    assert not fill_polygon([3, 3, 8, 3], H, W).any()  # a line


def test_parts_of_a_polygon_are_a_union():
    left, right = [0, 0, 4, 0, 4, 4, 0, 4], [2, 0, 6, 0, 6, 4, 2, 4]
    assert coco_mask([left, right], H, W).sum() == 24  # and not 16, as even-odd over both would give
    hole = [2, 2, 4, 2, 4, 4, 2, 4, 2, 2]
    assert fill_polygon([0, 0, 6, 0, 6, 6, 0, 6, 0, 0, *hole], H, W).sum() == 36 - 4


def test_area_of_a_large_triangle():
    mask = fill_polygon([10.3, 5.1, 190.7, 40.2, 60.4, 150.9], 160, 200)
    area = abs((190.7 - 10.3) * (150.9 - 5.1) - (60.4 - 10.3) * (40.2 - 5.1)) / 2
    assert mask.sum() == pytest.approx(area, rel=0.005)


def test_run_lengths():
    assert rle_counts("3") == [3]
    assert rle_counts("_1") == [47]  # "_" is 47: 15, and more bits follow; "1" is 1: 32 more
    for counts in ([0, 80], [5, 3, 2, 1, 4, 65], [0, 15, 16, 31, 32, 1000, 0, 5, 100000, 1, 3]):
        assert rle_counts(compress(counts)) == counts
    mask = np.random.default_rng(0).random((H, W)) < 0.5
    mask[0, 0] = True  # starts with a run of no zeros
    counts = run_lengths(mask)
    assert counts[0] == 0
    for form in (counts, compress(counts)):
        np.testing.assert_array_equal(coco_mask(dict(size=[H, W], counts=form), H, W), mask)
    # down the columns: zeros in all of the first and one of the second, then three ones
    mask = coco_mask(dict(size=[4, 3], counts=[5, 3, 4]), 4, 3)
    np.testing.assert_array_equal(mask, picture("...", ".1.", ".1.", ".1."))


@pytest.mark.parametrize("year", [2014, 2017])
def test_instances(tmp_path, year):
    found = read(write(tmp_path, year), "pretrain", "instances")
    np.testing.assert_array_equal(found, picture(  # the small square lies on the large one, the crowd nowhere
        ".111111...",
        ".133111...",
        ".133111...",
        ".111111...",
        ".111111...",
        "..........",
        "222222222.",
        "2222222224"))


def test_panoptic(tmp_path):
    found = read(write(tmp_path, split="val"), "val", "panoptic")
    expected = picture(*4 * ["1111122222"], *2 * ["3333333333"], *2 * [".........."])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["instances", "panoptic"])
def test_images_without_annotations(tmp_path, kind):
    root = write(tmp_path)
    for index in (1, 3):  # 8 is listed in the JSON, 10 is not
        found = read(root, "train", kind, index)
        assert found.shape == (H, W) and not found.any()


def test_annotations_of_an_image_for_detection(tmp_path):
    root = write(tmp_path)
    source = load_coco(root, "train")
    regions = CocoRegions(source, root, "train", "instances")
    assert regions.categories == [dict(id=3, name="cat")]
    height, width, annotations = regions.annotations(0)
    assert (height, width) == (H, W) and [a["area"] for a in annotations] == [80, 30, 18, 4, 1]
    assert [a["iscrowd"] for a in annotations] == [1, 0, 0, 0, 0]
    square = annotations[3]
    assert (square["category_id"], square["bbox"]) == (3, [2, 1, 2, 2])
    mask = coco_mask(square["segmentation"], height, width)
    assert mask.sum() == 4 and mask[1:3, 2:4].all()
    assert regions.annotations(1) == (H, W, []) and regions.annotations(3) is None
    panoptic = CocoRegions(source, root, "train", "panoptic")
    _, _, [annotation] = panoptic.annotations(0)
    ids = read_ids(panoptic.pngs / annotation["file_name"])
    assert {s["id"] for s in annotation["segments_info"]} == {70000, 5, 300} == set(ids[ids > 0].tolist())


def test_images_and_detection(tmp_path):
    root = write(tmp_path / "coco")
    source = load_coco(root, "pretrain")
    assert [os.path.basename(source.name(i)) for i in range(4)] == [f"{n:012d}.jpg" for n in (7, 8, 9, 10)]
    assert source.description == f"{root}: COCO train2017, 4 images" and source.classes == []
    assert source[0]["image"].shape == (3, H, W) and source[0]["label"] == 0
    assert coco_folder(root, "train").name == "train2017" and coco_folder(root, "val") is None
    with pytest.raises(UsageError, match=r"coco: no val\* folder with .jpg images"):
        load_coco(root, "val")
    (tmp_path / "folders" / "train" / "cat").mkdir(parents=True)  # as ImageNet is laid out
    Image.new("RGB", (W, H)).save(tmp_path / "folders" / "train" / "cat" / "1.jpg")
    (tmp_path / "folders" / "annotations").mkdir()
    assert coco_folder(tmp_path / "folders", "train") is None
    assert coco_folder(tmp_path / "none", "train") is None


def test_regions_of_another_size_than_their_image_are_refused(tmp_path):
    root = write(tmp_path)
    source = load_coco(root, "train")
    path = root / "annotations" / "instances_train2017.json"
    data = json.loads(path.read_text())
    for image in data["images"]:
        image["height"], image["width"] = W, H  # swapped
    path.write_text(json.dumps(data))
    told = message(CocoRegions(source, root, "train", "instances").read, 0, source[0])
    assert told == f"{source.name(0)} has {W}x{H} pixels, its annotations have {H}x{W}"
    Image.new("RGB", (W + 1, H)).save(root / "annotations" / "panoptic_train2017" / "000000000007.png")
    told = message(CocoRegions(source, root, "train", "panoptic").read, 0, source[0])
    assert told.endswith(f"its annotations have {W + 1}x{H}")
    (tmp_path / "masks").mkdir()
    Image.new("L", (H, W)).save(tmp_path / "masks" / "000000000007.png")
    told = message(MaskFolder(source, str(tmp_path / "masks")).read, 0, source[0])
    assert told.endswith(f"its annotations have {H}x{W}")
    # another resolution is welcome
    Image.new("L", (3 * W, 3 * H), 1).save(tmp_path / "masks" / "000000000007.png")
    assert MaskFolder(source, str(tmp_path / "masks")).read(0, source[0]).shape == (1, 3 * H, 3 * W)


def test_coco_images_are_not_turned_by_exif(tmp_path):
    """COCO's annotations are of the pixels as they are stored."""
    root = write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (W, H), (90, 120, 30)).save(root / "train2017" / "000000000007.jpg", exif=exif)
    source = load_coco(root, "train")
    item = source[0]
    assert item["image"].shape == (3, H, W)
    assert CocoRegions(source, root, "train", "instances").read(0, item).shape == (1, H, W)


def read(root, split, kind, index=0):
    """The label map of an image, by default of the image 7: [H, W]."""
    source = load_coco(root, split)
    maps = CocoRegions(source, root, split, kind).read(index, source[index])
    assert len(maps) == 1 and not maps.is_floating_point()
    return maps[0].numpy()


def message(call, *arguments):
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_broken_segmentations(tmp_path):
    path = write(tmp_path) / "annotations" / "instances_train2017.json"
    data = json.loads(path.read_text())
    for segmentation in ([[1, 2, 3]], dict(counts=[3, 4]), dict(counts="\u20ac"), [["a", "b"]], None):
        data["annotations"][0]["segmentation"] = segmentation
        path.write_text(json.dumps(data))
        told = message(read, tmp_path, "train", "instances")
        assert told.startswith("--regions instances: broken annotations of 000000000007 (")
    data["annotations"] = [dict(image_id=7, area=0, segmentation=[])]  # no part, and no word about crowds
    path.write_text(json.dumps(data))
    assert not read(tmp_path, "train", "instances").any()


def test_errors(tmp_path):
    root = write(tmp_path)
    annotations = root / "annotations"
    png = annotations / "panoptic_train2017" / "000000000007.png"
    png.write_bytes(png.read_bytes()[:60])
    told = message(read, root, "train", "panoptic")
    assert told.startswith("--regions panoptic: broken annotations of 000000000007 (")
    png.unlink()
    told = message(read, root, "train", "panoptic")
    assert told == f"--regions panoptic: there is no {annotations}/panoptic_train2017/000000000007.png"
    (annotations / "panoptic_train2017").rmdir()  # the folder is a zip inside COCO's zip, easily left packed
    told = message(read, root, "train", "panoptic")
    assert told == f"--regions panoptic: there is no {annotations}/panoptic_train2017"
    for kind in ("instances", "panoptic"):
        path = annotations / f"{kind}_train2017.json"
        for broken in ('{"images": [', "[]", "{}", '{"images": [], "annotations": [3]}', "\udcff"):
            path.write_bytes(broken.encode(errors="surrogateescape"))
            (annotations / "panoptic_train2017").mkdir(exist_ok=True)
            told = message(read, root, "train", kind)
            assert told.startswith(f"--regions {kind}: {path} is not a file of COCO")
        path.unlink()
        assert message(read, root, "train", kind) == f"--regions {kind}: there is no {path}"
