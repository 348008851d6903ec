"""COCO's and LVIS's average precision against pycocotools' and lvis-api's figures, and examples by hand."""

import functools

import numpy as np
import pytest

from eval import average_precision, match_image

H, W = 120, 160


def draw(box, rectangle):
    """A box in whole pixels -> bool [H, W]: the whole box, or the ellipse in it."""
    x0, y0, x1, y1 = box
    y, x = np.mgrid[:H, :W] + 0.5
    inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
    if rectangle:
        return inside
    return inside & ((2 * x - x0 - x1) ** 2 * (y1 - y0) ** 2 + (2 * y - y0 - y1) ** 2 * (x1 - x0) ** 2
                     < (x1 - x0) ** 2 * (y1 - y0) ** 2)


def figures_of(records):
    return average_precision(records)[0]


def things(boxes, labels, rectangles, **more):
    """Boxes (x0, y0, x1, y1) and what belongs to them, as match_image takes them."""
    masks = np.array([draw(box, rectangle) for box, rectangle in zip(boxes, rectangles)], dtype=bool)
    boxes = np.reshape(boxes, (-1, 4)).astype(float)
    boxes[:, 2:] -= boxes[:, :2]
    return dict(boxes=boxes, masks=masks.reshape(-1, H, W),
                labels=np.array(labels, dtype=int), **{key: np.array(values) for key, values in more.items()})


def rectangles(boxes, labels, **more):
    """Boxes whose masks fill them."""
    return things(boxes, labels, [True] * len(boxes), **more)


def random_box(random):
    """A box in whole pixels; some have an area right on the bounds of COCO's ranges, 32 ** 2 or 96 ** 2."""
    side = random.choice([0, 0, 0, 32, 96])
    width, height = (side, side) if side else random.randint(6, 100, size=2)
    x, y = random.randint(0, W - width), random.randint(0, H - height)
    return np.array([x, y, x + width, y + height])


def moved(random, box):
    """The box with its sides moved by up to a third of it, at times not at all."""
    reach = min(box[2:] - box[:2]) // 6 * random.randint(0, 3)
    return (box + random.randint(-reach, reach + 1, size=4)).clip(0, [W, H, W, H])


@functools.cache
def scenario():
    """40 images with truths of classes 1, 2, 3 and 5 (5: crowds alone) and detections of classes 1 to 5.

    Every sixth image has no truths, every seventh no detections. There are crowds, truths drawn twice,
    detections right on a truth, scores in steps of 1/16 (many are equal), and over 100 detections of class 1
    in images 8, 14 and 21.
    """
    images = []
    for k in range(40):
        random = np.random.RandomState(k)
        truths, found = [], []
        for i in range(0 if k % 6 == 5 else random.randint(2, 7)):
            box = random_box(random)
            label = random.choice([1, 1, 2, 3, 5])
            crowd = label == 5 or random.rand() < 0.15
            area = (box[2] - box[0]) * (box[3] - box[1]) * random.choice([0.7, 1.0])
            truths += [(box, label, crowd, area)] * random.randint(1, 3)
        for box, label, crowd, area in truths:
            for i in range(random.randint(0, 3)):
                found.append((moved(random, box), label, random.randint(4, 16) / 16))
            if crowd:
                half = np.array([box[0], box[1], (box[0] + box[2] + 1) // 2, box[3]])
                found.append((half, label, random.randint(8, 16) / 16))
        for i in range(random.randint(0, 5) + 125 * (k in (8, 14, 21))):
            label = 1 if i > 5 else random.randint(1, 6)
            found.append((random_box(random), label, random.randint(1 + i // 10, 15) / 16))
        found = [] if k % 7 == 6 else [found[i] for i in random.permutation(len(found))]
        boxes, labels, crowds, areas = zip(*truths) if truths else [()] * 4
        full = np.arange(len(truths)) % 2 == 0
        truths = things(boxes, labels, full, crowd=np.array(crowds, dtype=bool), areas=areas)
        boxes, labels, scores = zip(*found) if found else [()] * 3
        images.append((truths, things(boxes, labels, np.arange(len(found)) % 3 > 0, scores=scores)))
    return images


@functools.cache
def lvis_scenario():
    """`scenario` as of LVIS: no crowds; in each image some classes are known to be absent, of some not all
    objects are annotated. In images 8 and 21 there are over 300 detections."""
    images = []
    for k, (truths, found) in enumerate(scenario()):
        random = np.random.RandomState(1000 + k)
        others = np.setdiff1d([1, 2, 3, 4, 5], truths["labels"])
        negative = others[random.rand(len(others)) < 0.5]
        listed = np.union1d(truths["labels"], negative)
        partial = listed[random.rand(len(listed)) < 0.3].astype(int)
        truths = truths | dict(neg_category_ids=negative, not_exhaustive_category_ids=partial)
        truths["crowd"] = np.zeros(len(truths["crowd"]), bool)
        if k in (8, 21):
            found = {name: np.concatenate(3 * [values]) for name, values in found.items()}
            found["scores"] = found["scores"] * (1 - np.arange(len(found["scores"])) / 4096)
        images.append((truths, found))
    return images


FREQUENCIES = {1: "f", 2: "c", 3: "r", 4: "r", 5: "f"}

# 100 * stats[:6] of pycocotools 2.0.11: COCOeval(truths, truths.loadRes(detections), "bbox" or "segm"), then
# evaluate, accumulate, summarize; the ids of images and of annotations are 1, 2, ... in scenario()'s order.
EXPECTED = {
    "boxes": dict(ap=12.26356925, ap50=21.80404104, ap75=8.76529579,
                  ap_small=7.77842187, ap_medium=15.86909162, ap_large=24.08636281),
    "masks": dict(ap=11.75686463, ap50=24.68521707, ap75=8.30734154,
                  ap_small=7.69495658, ap_medium=16.03820096, ap_large=25.78616754),
}


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_the_figures_are_those_of_pycocotools(kind):
    figures = figures_of([match_image(truths, detections, kind) for truths, detections in scenario()])
    assert figures == pytest.approx(EXPECTED[kind], abs=1e-6)


# 100 * the results AP, AP50, AP75, APs, APm, APl, APr, APc, APf of lvis-api 0.5.3: LVISEval(truths,
# detections, "bbox" or "segm").run(), of `lvis_scenario`; for "segm" the detections are without their bbox.
LVIS_EXPECTED = {
    "boxes": dict(
        ap=21.84233236, ap50=44.0673007, ap75=18.80099695, ap_small=18.7430637, ap_medium=26.12171455,
        ap_large=31.15568023, ap_r=18.28600602, ap_c=29.10583157, ap_f=19.98874592),
    "masks": dict(
        ap=20.08501089, ap50=42.06309151, ap75=17.54216546, ap_small=17.09659409, ap_medium=25.04047609,
        ap_large=32.89124054, ap_r=18.29755678, ap_c=25.73882889, ap_f=18.15182894),
}


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_the_figures_are_those_of_lvis_api(kind):
    records = [match_image(truths, detections, kind) for truths, detections in lvis_scenario()]
    figures, _ = average_precision(records, FREQUENCIES)
    assert figures == pytest.approx(LVIS_EXPECTED[kind], abs=1e-6)


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_two_truths_and_three_detections_by_hand(kind):
    # Truths A and B of 40 x 40 pixels. By score: A itself (0.9), a box elsewhere (0.8), B's upper 29 rows
    # (0.7; IoU 29/40 = 0.725). At the thresholds 0.50 ... 0.70 that is hit, miss, hit: precision 1 up to
    # recall 1/2 (the 51 recalls 0 ... 0.50), then 2/3 (the other 50): (51 + 50 * 2/3) / 101. At 0.75 ...
    # 0.95 the last is a miss too: 51/101. AP is the mean of five thresholds each. All areas are medium.
    truths = rectangles([(0, 0, 40, 40), (60, 0, 100, 40)], [7, 7], crowd=[False] * 2, areas=[1600.0] * 2)
    boxes = [(60, 0, 100, 29), (0, 0, 40, 40), (0, 60, 40, 100)]
    detections = rectangles(boxes, [7, 7, 7], scores=[0.7, 0.9, 0.8])
    ap50, ap75 = 100 * (51 + 50 * 2 / 3) / 101, 100 * 51 / 101
    ap = (ap50 + ap75) / 2
    expected = dict(ap=ap, ap50=ap50, ap75=ap75, ap_small=None, ap_medium=ap, ap_large=None)
    assert figures_of([match_image(truths, detections, kind)]) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_detections_inside_a_crowd_are_neither_hits_nor_misses(kind):
    # Two detections inside the crowd score above the only hit. One with only a quarter of its area inside is
    # a miss, so that the precision is 1/2 at all recalls.
    boxes = [(0, 0, 80, 80), (100, 0, 140, 40)]
    truths = rectangles(boxes, [1, 1], crowd=[True, False], areas=[6400.0, 1600.0])
    boxes = [(0, 0, 20, 20), (10, 10, 40, 40), (100, 0, 140, 40)]
    inside = rectangles(boxes, [1] * 3, scores=[0.9, 0.8, 0.1])
    assert figures_of([match_image(truths, inside, kind)])["ap"] == pytest.approx(100)
    beside = rectangles(boxes + [(70, 40, 110, 80)], [1] * 4, scores=[0.9, 0.8, 0.1, 0.7])
    assert figures_of([match_image(truths, beside, kind)])["ap"] == pytest.approx(50)


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_of_equal_ious_the_last_truth_is_taken(kind):
    # The first detection has IoU 30/50 with both truths. As it takes the second truth, a detection right on
    # the first is a hit, and one right on the second a miss.
    truths = rectangles([(0, 0, 40, 40), (20, 0, 60, 40)], [1, 1], crowd=[False] * 2, areas=[1600.0] * 2)
    for second, ap50 in (((0, 0, 40, 40), 100), ((20, 0, 60, 40), 100 * 51 / 101)):
        detections = rectangles([(10, 0, 50, 40), second], [1, 1], scores=[0.9, 0.8])
        assert figures_of([match_image(truths, detections, kind)])["ap50"] == pytest.approx(ap50)


def test_a_class_has_100_detections_an_image():
    # The truth of class 1 is found by its 101st detection only, that of class 2 by its 100th: 0 and 1/100.
    truths = rectangles([(0, 0, 40, 40)] * 2, [1, 2], crowd=[False] * 2, areas=[1600.0] * 2)
    boxes = [(60, 60, 90, 90)] * 199 + [(0, 0, 40, 40)] * 2
    detections = rectangles(boxes, [1] * 100 + [2] * 99 + [1, 2], scores=np.linspace(1, 0, 201))
    assert figures_of([match_image(truths, detections)])["ap"] == pytest.approx((0 + 1) / 2)


def test_classes_without_truths_do_not_count_and_classes_that_are_not_found_do():
    # Class 1 is found, class 2 is not, and no truth is of class 3: the AP is the mean of 100 and 0. The only
    # large truth is of class 2, so that their AP is 0; there are no small ones.
    truths = rectangles([(0, 0, 40, 40), (0, 0, 100, 100)], [1, 2], crowd=[False] * 2, areas=[1600.0, 1e4])
    one = match_image(truths, rectangles([(0, 0, 40, 40), (50, 50, 70, 70)], [1, 3], scores=[0.5, 0.9]))
    nothing = rectangles([], [], crowd=np.zeros(0, bool), areas=np.zeros(0))
    two = match_image(nothing, rectangles([(0, 0, 9, 9)], [2], scores=[0.9]))
    expected = dict(ap=50, ap50=50, ap75=50, ap_small=None, ap_medium=100, ap_large=0)
    assert figures_of([one, two]) == pytest.approx(expected)
    missed = match_image(nothing, rectangles([(0, 0, 40, 40)], [1], scores=[0.9]))
    # A detection of class 1 where there is none scores higher: a precision of 1/2 at all recalls.
    assert figures_of([one, missed])["ap_medium"] == pytest.approx(50)


# Boxes (x, y, width, height) of a detection and of a truth, and pycocotools' IoU of the two. From corners,
# x + width and y + height, each would come out on the other side of 0.5 or 0.75.
NEAR = [
    ([96.61, 56.22, 11.47, 22.08], [96.61, 56.22, 22.94, 22.08], 0.49999999999999994),
    ([86.07, 24.71, 17.06, 21.75], [86.07, 24.71, 17.06, 43.5], 0.5000000000000001),
    ([48.88, 97.65, 48.78, 19.08], [48.88, 97.65, 48.78, 25.44], 0.7499999999999994),
    ([8.68, 70.84, 49.46, 37.47], [8.68, 70.84, 49.46, 49.96], 0.75),
]


@pytest.mark.parametrize("found, true, iou", NEAR)
def test_boxes_are_compared_without_losing_the_last_bit(found, true, iou):
    truths = dict(boxes=np.array([true]), labels=np.array([1]), crowd=np.array([False]),
                  areas=np.array([900]))
    detections = dict(boxes=np.array([found]), labels=np.array([1]), scores=np.array([0.9]))
    figures = figures_of([match_image(truths, detections)])
    assert figures["ap50"] == 100 * (iou >= 0.5) and figures["ap75"] == 100 * (iou >= 0.75)


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_truths_the_nearer_by_the_last_bit_is_taken(first):
    """The IoUs with the first detection are 0.5359565807327001 and 0.5359565807327004. The second detection
    is right on the truth that is left."""
    right, left = [10, 0, 16, 7.9], [4, 0.8, 16, 7.9]
    truths = dict(boxes=np.array([right, left][first:] + [right, left][:first]), labels=np.array([1, 1]),
                  crowd=np.zeros(2, bool), areas=np.array([126, 126]))
    detections = dict(boxes=np.array([[10.0, 0, 10, 10], right]), labels=np.array([1, 1]),
                      scores=np.array([0.9, 0.8]))
    assert figures_of([match_image(truths, detections)])["ap50"] == pytest.approx(100)


def test_nothing_to_evaluate_has_no_figures():
    figures, by_class = average_precision([], {1: "r"})
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ap_r")
    assert figures == dict.fromkeys(names) and by_class == {}


def test_the_classes_and_their_groups_have_their_own_figures():
    """Class 1 is found, class 2 is not, class 3 half of the time, and no truth is of class 4."""
    boxes = [(0, 0, 40, 40), (50, 50, 90, 90), (0, 50, 40, 90), (100, 50, 140, 90)]
    truths = rectangles(boxes, [1, 2, 3, 3], crowd=[False] * 4, areas=[1600.0] * 4)
    record = match_image(truths, rectangles(boxes[::2], [1, 3], scores=[0.5, 0.9]))
    figures, by_class = average_precision([record], {1: "c", 2: "r", 3: "c", 4: "f", 5: "r"})
    half = 100 * 51 / 101
    assert by_class == pytest.approx({1: 100, 2: 0, 3: half})
    assert figures["ap"] == pytest.approx((100 + half) / 3) and figures["ap_r"] == 0
    assert figures["ap_c"] == pytest.approx((100 + half) / 2) and figures["ap_f"] is None
