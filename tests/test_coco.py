"""The COCO reader against masks worked out by hand."""

import json
import os

import numpy as np
import pytest
from PIL import Image

import datasets
from datasets import (IGNORED, CocoRegions, MaskFolder, UsageError, coco_folder, coco_mask, encode_mask,
                      fill_polygon, load_coco, load_dense, open_regions, read_ids, rle_counts)
from eval import DenseImages

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


def test_polygons_are_filled_as_by_cocos_own_tools():
    """60 polygons in and around an image, with whole coordinates to thousandths. The digest is that of
    pycocotools 2.0.11's masks; by the centres alone 1 pixel of 433 differs."""
    rng, data, area = np.random.RandomState(0), b"", 0
    for k in range(60):
        points = (rng.uniform(-0.2, 1.2, (3 + k % 9, 2)) * [80, 60]).round(k % 4)
        mask = fill_polygon(points.ravel().tolist(), 60, 80)
        data, area = data + np.ascontiguousarray(mask).tobytes(), area + mask.sum()
    assert area == 76902 and datasets.digest(data) == "187e0f50adf3"
    assert fill_polygon([0, 0, 10, 0, 10, 7], 10, 10).sum() == 34  # 35 centres are inside


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


def test_masks_are_encoded_as_they_are_read():
    rng = np.random.default_rng(0)
    for share in (0, 0.02, 0.5, 1):
        mask = np.repeat(np.repeat(rng.random((23, 31)) < share, 7, 0), 9, 1)
        encoded = encode_mask(mask)
        assert encoded == dict(size=[161, 279], counts=compress(run_lengths(mask)))
        assert np.array_equal(coco_mask(encoded, 161, 279), mask)


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
    assert regions.categories == {3: "cat"}
    image, annotations = regions.annotations(0)
    assert (image["height"], image["width"]) == (H, W)
    assert [a["area"] for a in annotations] == [4, 80, 18, 30, 1]  # in the order of the file
    assert [a["iscrowd"] for a in annotations] == [0, 1, 0, 0, 0]
    square = annotations[0]
    assert (square["category_id"], square["bbox"]) == (3, [2, 1, 2, 2])
    mask = coco_mask(square["segmentation"], H, W)
    assert mask.sum() == 4 and mask[1:3, 2:4].all()
    assert regions.annotations(1)[0]["id"] == 8 and regions.annotations(1)[1] == []
    assert regions.annotations(3) == ({}, [])
    panoptic = CocoRegions(source, root, "train", "panoptic")
    _, [annotation] = panoptic.annotations(0)
    ids = read_ids(panoptic.pngs / annotation["file_name"])
    assert {s["id"] for s in annotation["segments_info"]} == {70000, 5, 300} == set(ids[ids > 0].tolist())


def test_images_and_detection(tmp_path):
    root = write(tmp_path / "coco")
    source = load_coco(root, "pretrain")
    assert [os.path.basename(source.name(i)) for i in range(4)] == [f"{n:012d}.jpg" for n in (7, 8, 9, 10)]
    assert source.description == f"{root}: COCO train2017, 4 images" and source.classes == []
    assert source[0]["image"].shape == (3, H, W) and source[0]["label"] == 0
    assert coco_folder(root, "train").name == "train2017" and coco_folder(root, "val") is None
    with pytest.raises(UsageError, match=r"coco: there is no folder val\*"):
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


def annotate(root, kind="instances", split="train"):
    """(path, content) of a JSON file that `write` wrote."""
    path = root / "annotations" / f"{kind}_{split}2017.json"
    return path, json.loads(path.read_text())


def test_broken_segmentations(tmp_path):
    path, data = annotate(write(tmp_path))
    told = f"{path}: broken annotations of {tmp_path}/train2017/000000000007.jpg ("
    for segmentation in ([[1, 2, 3, 4, 5, 6, 7]], dict(counts=[3, 4]), dict(counts="\u20ac"), [6 * ["a"]]):
        data["annotations"][0]["segmentation"] = segmentation
        path.write_text(json.dumps(data))
        assert message(read, tmp_path, "train", "instances").startswith(told)


@pytest.mark.parametrize("segmentation", [[], None, [2, 1, 2, 2], [[2, 1, 2, 2]], "missing"])
def test_objects_without_a_mask_are_refused_when_the_file_is_opened(tmp_path, segmentation):
    """Four numbers are a box, too."""
    path, data = annotate(write(tmp_path))
    data["annotations"][4]["segmentation"] = segmentation
    if segmentation == "missing":
        del data["annotations"][4]["segmentation"]
    path.write_text(json.dumps(data))
    source = load_coco(tmp_path, "train")
    told = message(CocoRegions, source, tmp_path, "train", "instances")
    assert told == f"{path}: an object of image 7 has no mask, which is needed beside its box"
    assert message(load_dense, str(tmp_path), True) == told


@pytest.mark.parametrize("empty", [False, True])
def test_missing_fields_are_computed(tmp_path, empty):
    """Area, box and crowd of the objects, and the size of the image; also where they are null or empty."""
    path, data = annotate(write(tmp_path))
    for image in data["images"]:
        del image["height"], image["width"]
    for annotation in data["annotations"]:
        annotation["category_id"] = 3
        for field in ("area", "bbox", "iscrowd"):
            annotation.pop(field, None)
        if empty:
            annotation |= dict(area=None, bbox=[], iscrowd=None)
    path.write_text(json.dumps(data))
    source = load_dense(str(tmp_path), True)
    truth = source.truth(0, source[0])
    assert truth["areas"].tolist() == [4, 80, 18, 30, 1] and not truth["crowd"].any()
    boxes = [[2, 1, 2, 2], [0, 0, 10, 8], [0, 6, 9, 2], [1, 0, 6, 5], [9, 7, 1, 1]]  # x, y, width, height
    assert truth["boxes"].tolist() == boxes and truth["labels"].tolist() == [1] * 5
    expected = picture(  # by falling area; the second, no crowd now, is below all others
        "1222222111", "1244222111", "1244222111", "1222222111", "1222222111", "1111111111", "3333333331",
        "3333333335")
    np.testing.assert_array_equal(read(tmp_path, "train", "instances"), expected)
    data["annotations"] = [dict(image_id=7, category_id=3, segmentation=[[1, 1, 1.2, 1, 1.2, 1.2]])]
    path.write_text(json.dumps(data))
    source = load_dense(str(tmp_path), True)
    truth = source.truth(0, source[0])  # no pixel's centre is inside
    assert truth["boxes"].tolist() == [[0, 0, 0, 0]] and truth["areas"].tolist() == [0]


# ---------------------------------------------------------------------------------------------------------
# Images and categories find their own annotations


def small_coco(root, images, categories, split="train", objects=None):
    """A COCO root: images is a dict of file_name -> category id of its one segment and object, in which the
    rows up to this id are. categories: dict id -> name."""
    listed, instances, segments = [], [], []
    for number, (name, category) in enumerate(images.items()):
        path = root / f"{split}2017" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (W, H), (90, 120, number)).save(path)
        listed.append(dict(id=number, file_name=name))
        square = [0, 0, W, 0, W, 1 + category % H, 0, 1 + category % H]
        instances.append(dict(image_id=number, category_id=category, segmentation=[square]))
        ids = np.zeros((H, W, 3), np.uint8)
        ids[:1 + category % H, :, 0] = 9
        (root / "annotations" / f"panoptic_{split}2017").mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids).save(root / "annotations" / f"panoptic_{split}2017" / f"{number}.png")
        segments.append(dict(image_id=number, file_name=f"{number}.png",
                             segments_info=[dict(id=9, category_id=category)]))
    categories = [dict(id=k, name=name) for k, name in categories.items()]
    for kind, annotations in (("instances", instances), ("panoptic", segments)):
        path = root / "annotations" / f"{kind}_{split}2017.json"
        path.write_text(json.dumps(dict(images=listed, annotations=annotations, categories=categories)))
    return str(root)


def rows_of(source):
    """The path of each image -> its class, and the rows that this class has."""
    found = {}
    for i in range(len(source)):
        truth = source.truth(i, source[i])
        if isinstance(truth, dict):
            found[source.path(i)] = truth["labels"][0] - 1, truth["masks"][0].any(1).sum()
        else:
            found[source.path(i)] = truth[0, 0], (truth[:, 0] != IGNORED).sum()
    return found


OBJECTS = pytest.mark.parametrize("objects", [True, False])


@OBJECTS
def test_categories_are_those_of_the_training_data_by_their_ids(tmp_path, objects):
    """The validation file lists one of three categories, in another order of names."""
    root = small_coco(tmp_path, {"1.jpg": 5, "2.jpg": 9, "3.jpg": 20}, {9: "dog", 20: "ant", 5: "cat"})
    small_coco(tmp_path, {"1.jpg": 20, "2.jpg": 9}, {20: "ant", 9: "dog"}, "val")
    train = load_dense(root, objects)
    assert train.classes == ["cat", "dog", "ant"] and train.categories == {5: "cat", 9: "dog", 20: "ant"}
    assert rows_of(train) == {"1.jpg": (0, 6), "2.jpg": (1, 2), "3.jpg": (2, 5)}
    for known in (None, train.categories):
        val = load_dense(root, objects, "val", categories=known)
        assert val.classes == train.classes and rows_of(val) == {"1.jpg": (2, 5), "2.jpg": (1, 2)}
    val = load_dense(root, objects, "val", categories={9: "dog", 20: "ant"})  # of a model of other data
    assert val.classes == ["dog", "ant"] and rows_of(val) == {"1.jpg": (1, 5), "2.jpg": (0, 2)}


@OBJECTS
@pytest.mark.parametrize("names", [{9: "dog"}, {9: "dog", 5: "cow"}, {9: "dog", 20: "cat"}])
def test_categories_that_the_training_data_do_not_have_are_refused(tmp_path, objects, names):
    """The object of category 5: unknown to its own file, of another name, or to the training data alone."""
    root = small_coco(tmp_path, {"1.jpg": 9}, {9: "dog", 5: "cat"} if 5 in names else {9: "dog"})
    small_coco(tmp_path, {"1.jpg": 9, "2.jpg": 5}, names, "val")
    path = f"{tmp_path}/annotations/{'instances' if objects else 'panoptic'}_val2017.json"
    told = message(load_dense, root, objects, "val")
    assert told.startswith(f"{path}: it has objects of category 5, which is not among its categories, or")


@pytest.mark.parametrize("spoil, words", [
    (lambda data: data["categories"].append(dict(id=9, name="cow")), "9 is listed 2 times"),
    (lambda data: data["images"].append(dict(id=7, file_name="1.jpg")), "1.jpg is listed 2 times"),
    (lambda data: data["categories"][0].pop("name"), "is not a file of COCO annotations (it has no 'name')"),
    (lambda data: data.pop("categories"), "it has objects of category 9, which is not among its categories"),
    (lambda data: data["images"].append(dict(id=0, file_name="2.jpg")), "the image 0 is listed 2 times"),
    (lambda data: data["annotations"][0].update(image_id="0"), "no annotation's image_id is the id of an image"),
])
def test_doubled_and_nameless_entries_are_one_line(tmp_path, spoil, words):
    root = small_coco(tmp_path, {"1.jpg": 9}, {9: "dog"})
    path, data = annotate(tmp_path)
    spoil(data)
    path.write_text(json.dumps(data))
    told = message(load_dense, root, True)
    assert words in told and str(path) in told


@pytest.mark.parametrize("own, words", [
    (dict(bbox=[5, 1, -2, 3]), "broken bbox of {name} ([5, 1, -2, 3])"),
    (dict(bbox=[5, 1, 2]), "broken bbox of {name} (could not broadcast"),
    (dict(segmentation=dict(size=[W, H], counts=[0, W * H])), "a mask's size is [10, 8], the image's [8, 10]"),
])
def test_broken_objects_are_one_line(tmp_path, own, words):
    root = small_coco(tmp_path, {"1.jpg": 2}, {2: 3})
    path, data = annotate(tmp_path)
    data["annotations"][0] |= own
    path.write_text(json.dumps(data))
    source = load_dense(root, True)
    assert source.classes == ["3"]  # a name is a text
    told = message(source.truth, 0, source[0])
    assert words.format(name=source.name(0)) in told and str(path) in told


def test_a_stray_line_of_a_polygon_and_classes_of_one_name(tmp_path):
    root = small_coco(tmp_path, {"1.jpg": 2, "2.jpg": 5}, {2: "hole", 5: "hole", 7: "lid"})
    path, data = annotate(tmp_path)
    data["annotations"][0]["segmentation"].insert(0, [1, 1, 2, 2])
    path.write_text(json.dumps(data))
    source = load_dense(root, True)
    assert source.classes == ["hole (2)", "hole (5)", "lid"] and rows_of(source)["1.jpg"] == (0, 3)


@OBJECTS
@pytest.mark.parametrize("prefix", ["", "train2017/"])
def test_annotations_belong_to_paths(tmp_path, objects, prefix):
    """Not to the names without folder and extension. Images lie below folders, and are PNG files too."""
    images = {"s/1.png": 0, "t/1.png": 1, "u/1.png": 2, "u/1.bmp": 3, "u/v/1.jpg": 4}
    root = small_coco(tmp_path, images, {k: f"thing {k}" for k in range(5)})
    for kind in ("instances", "panoptic"):
        path, data = annotate(tmp_path, kind)
        for image in data["images"]:
            image["file_name"] = prefix + image["file_name"]
        path.write_text(json.dumps(data))
    assert rows_of(load_dense(root, objects)) == {name: (k, k + 1) for name, k in images.items()}
    maps = CocoRegions(load_coco(root, "pretrain"), root, "pretrain", "panoptic")
    for index, name in enumerate(sorted(images)):
        assert maps.read(index, maps.source[index]).sum() == W * (images[name] + 1)


@OBJECTS
def test_the_run_tells_what_has_no_annotations(tmp_path, objects):
    """Files that the JSON does not list are left out, and do not count as images of nothing."""
    root = small_coco(tmp_path, {f"{k}.jpg": 0 for k in range(4)}, {0: "thing"})
    os.rename(tmp_path / "train2017" / "1.jpg", tmp_path / "train2017" / "8.jpg")
    Image.new("RGB", (W, H)).save(tmp_path / "train2017" / "9.png")
    source = load_dense(root, objects)
    assert list(rows_of(source)) == ["0.jpg", "2.jpg", "3.jpg"]
    kind = "instances" if objects else "panoptic"
    words = "3 images, objects: 4, files without entry: 2, entries without file: 1"
    assert source.description == f"{root}/annotations/{kind}_train2017.json: {words}"
    for path in (tmp_path / "train2017").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    words = f"annotations/{kind}_train2017.json: nothing in it has the name of an image, such as x0.jpg"
    assert message(load_dense, root, objects) == f"{root}/{words}"
    assert message(open_regions, kind, load_coco(root, "train"), root) == f"{root}/{words}"


def test_300_categories(tmp_path):
    names = {k: f"thing {k}" for k in range(300)}
    source = load_dense(small_coco(tmp_path, {"1.jpg": 298, "2.jpg": 255}, names), False)
    assert rows_of(source) == {"1.jpg": (298, 3), "2.jpg": (255, 8)}
    labels = DenseImages(source, (H, W), (1.0, 1.0))[0, 0]["label"]
    assert labels.unique().tolist() == [IGNORED, 298]


def test_errors(tmp_path):
    root = write(tmp_path)
    annotations = root / "annotations"
    png = annotations / "panoptic_train2017" / "000000000007.png"
    png.write_bytes(png.read_bytes()[:60])
    told = message(read, root, "train", "panoptic")
    path, image = f"{annotations}/panoptic_train2017.json", f"{root}/train2017/000000000007.jpg"
    assert told.startswith(f"{path}: broken annotations of {image} (")
    png.unlink()
    told = message(read, root, "train", "panoptic")
    assert told == f"{annotations}/panoptic_train2017.json: there is no {png}"
    (annotations / "panoptic_train2017").rmdir()  # the folder is a zip inside COCO's zip, easily left packed
    told = message(read, root, "train", "panoptic")
    assert told == f"--data {root}: there is no {annotations}/panoptic_train2017"
    for kind in ("instances", "panoptic"):
        path = annotations / f"{kind}_train2017.json"
        for broken in ('{"images": [', "[]", "{}", '{"images": [], "annotations": [3]}', "\udcff"):
            path.write_bytes(broken.encode(errors="surrogateescape"))
            (annotations / "panoptic_train2017").mkdir(exist_ok=True)
            told = message(read, root, "train", kind)
            assert told.startswith(f"--data {root}: {path} is not a file of COCO")
        path.unlink()
        assert message(read, root, "train", kind) == f"--data {root}: there is no {path}"


# ---------------------------------------------------------------------------------------------------------
# LVIS


def write_lvis(root):
    """Training images 0..9 and 20 validation images, of which the first is among COCO's training images."""
    (root / "annotations").mkdir(parents=True)
    categories = [dict(id=7, name="zebra", frequency="f", image_count=9),
                  dict(id=2, name="ant", frequency="r", image_count=1),
                  dict(id=4, name="bee", frequency="c", image_count=4)]
    for split, paths in (("train", [f"train2017/{k}.jpg" for k in range(10)]),
                         ("val", ["train2017/10.jpg", *(f"val2017/{k}.jpg" for k in range(19))])):
        images, objects = [], []
        for number, path in enumerate(paths):
            (root / path).parent.mkdir(exist_ok=True)
            Image.new("RGB", (W, H), (9, 9, number)).save(root / path)
            url = f"http://images.cocodataset.org/{path}"
            images.append(dict(id=50 - number, coco_url=url, height=H, width=W, neg_category_ids=[2],
                               not_exhaustive_category_ids=[7, 4]))
            for category in [7] * (number < 9) + [2] * (number == 3) + [4] * (number in (3, 5, 8, 9)):
                objects.append(dict(image_id=50 - number, category_id=category, area=6, bbox=[0, 0, 3, 2],
                                    segmentation=[[0, 0, 3, 0, 3, 2, 0, 2]]))
        content = dict(images=images, annotations=objects, categories=categories)
        (root / "annotations" / f"lvis_v1_{split}.json").write_text(json.dumps(content))
    return str(root)


def test_lvis_is_read_by_its_urls(tmp_path):
    val = load_dense(write_lvis(tmp_path), True, "val")
    assert [val.path(i) for i in (0, 1)] == ["train2017/10.jpg", "val2017/0.jpg"] and len(val) == 20
    assert val[1]["image"][2, 0, 0] == 1  # the blue that it was written with
    assert val.classes == ["ant", "bee", "zebra"] and val.image_counts == [1, 4, 9]
    assert val.groups == {1: "r", 2: "c", 3: "f"}
    truth = val.truth(0, val[0])
    assert truth["labels"].tolist() == [3] and truth["areas"].tolist() == [6]
    assert truth["neg_category_ids"].tolist() == [1]
    assert truth["not_exhaustive_category_ids"].tolist() == [3, 2]
    path = tmp_path / "annotations" / "lvis_v1_val.json"
    path.write_text(path.read_text().replace('"neg_category_ids": [2]', '"neg_category_ids": [99, 2]'))
    trained = {1: "rat", 2: "ant", 4: "bee", 7: "zebra"}  # which the validation file does not list
    other = load_dense(str(tmp_path), True, "val", categories=trained)
    assert other.groups == {2: "r", 3: "c", 4: "f"} and other.truth(0, other[0])["neg_category_ids"].tolist() == [2]
    coco = small_coco(tmp_path / "coco", {"1.jpg": 1}, {1: "thing"})
    assert not hasattr(load_dense(coco, True), "groups")


def test_images_of_rare_classes_are_repeated(tmp_path, monkeypatch):
    """With a threshold of 2, not 0.001, a class in 9 of 10 images asks for sqrt(2 / 0.9) = 1.49 times, one in
    4 for 2.24, one in a single image for 4.47. An image is there as often as its rarest class asks."""
    repeat = datasets.repeat_rare
    monkeypatch.setattr(datasets, "repeat_rare", lambda source, regions: repeat(source, regions, 2))
    root = write_lvis(tmp_path)
    train = load_dense(root, True)
    asked = [1.49, 1.49, 1.49, 4.47, 1.49, 2.24, 1.49, 1.49, 2.24, 2.24]
    places, counts = np.unique(train.order, return_counts=True)
    assert [train.paths[k].decode() for k in places] == [f"train2017/{k}.jpg" for k in range(10)]
    assert len(train) == int(sum(asked)) and (abs(counts - asked) < 1).all()
    assert [train.truth(i, train[i])["labels"].tolist() for i in range(2)] == [[3], [3]]
    assert len(load_dense(root, True, "val")) == 20
    monkeypatch.undo()
    assert len(load_dense(root, True)) == 10 and len(load_dense(root, True, limit=4)) == 4
    path = tmp_path / "annotations" / "lvis_v1_train.json"
    path.write_text(path.read_text().replace('"image_count": 1', '"image_count": 0'))  # as in some subsets
    assert len(load_dense(root, True)) == 10


def test_cocos_objects_beside_lviss_are_not_guessed(tmp_path):
    root = write_lvis(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(UsageError, match="has both LVIS's and COCO's objects"):
        load_dense(root, True, "val")


def test_other_categories_than_lviss_are_one_line(tmp_path):
    root = write_lvis(tmp_path)
    path = tmp_path / "annotations" / "lvis_v1_train.json"
    path.write_text(path.read_text().replace("image_count", "images"))
    told = message(load_dense, root, True)
    assert told == f"{path}: its categories are not LVIS's (it has no 'image_count')"
