"""Images for pre-training and evaluation, and maps of their regions: the built-in `shapes`, torchvision's small sets,
COCO, any folder.

A *source* reads one image as it is; `Images` turns a source into items, cropped and flipped in uint8.
Every item is a dict of image [3, H, W] uint8, label, index, box (x1, y1, x2, y2 as fractions of the whole
image), flip, broken (see `Images`), and on request the maps of its regions. `normalize` does the rest on the
device, a batch at a time.

All randomness of an item is a function of (seed, epoch, index): a run is the same for any number of workers
and processes, and one resumed is the same as one never stopped.
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import random
from array import array
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import mim

try:  # torchvision has announced that it will drop its decoders; Pillow, which it brings, takes over then
    from torchvision.io import decode_image
except ImportError:
    decode_image = None

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as all the papers normalise
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MIN_SIDE = 8  # pixels; an image with a shorter side is taken for a broken one
SMALL = 96  # pixels; up to here images are evaluated whole, and recipes shrink


class UsageError(ValueError):
    """A user's mistake, told in one line: which file or flag, what it was, what it may be."""


class TooSmall(ValueError):
    """An image with a side shorter than MIN_SIDE."""


def seed_of(*keys):
    """Non-negative ints -> one 64-bit seed that depends on all of them, and on how many they are."""
    return int(np.random.SeedSequence((len(keys), *keys)).generate_state(1, np.uint64)[0])


@functools.cache
def statistics(device):
    """ImageNet's mean and standard deviation, [3, 1, 1] each, copied to a device once: every copy would wait for it."""
    return tuple(torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))


def normalize(images):
    """uint8 [B, 3, H, W] -> float32 of ImageNet's mean 0 and standard deviation 1, on the images' device."""
    mean, std = statistics(images.device)
    return (images.float() / 255 - mean) / std


def denormalize(images):
    """The inverse of `normalize`, clipped to floats in [0, 1]: what a picture shows."""
    mean, std = statistics(images.device)
    return (images.float() * std + mean).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------
# Sources: len(source), source.read(i) -> dict(image=uint8 [3, H, W], label=int, instances=optional [H, W]),
# source.name(i) for messages, source.file(i) a relative path for what is kept of image i, source.classes,
# source.image_size (its natural one), source.description; in_memory: it is small, and all images are of one size;
# with can_shrink, read(i, shrink) as `decode`

# The built-in scenes: a textured background with 3 to 5 textured objects that partly hide each other. The largest,
# near the centre, is the main object, and its shape is the label; colours and textures say nothing about it.

def star(u, v):
    """A pentagram: the points inside at least four of its five half-planes."""
    angles = [0.4 * math.pi * k for k in range(5)]
    return sum((math.cos(a) * u + math.sin(a) * v < 0.309).view(np.uint8) for a in angles) >= 4


def flower(u, v):
    """Six petals around a disc; by symmetry two of the petals stand for all."""
    u, v = abs(u), abs(v)
    petals = np.minimum((u - 0.66) ** 2 + v * v, (u - 0.33) ** 2 + (v - 0.57) ** 2)
    return (petals < 0.08) | (u * u + v * v < 0.3)


# Which points belong to a shape; u and v count radii from its centre. All shapes lie inside the
# unit circle, because an object is evaluated only inside the bounding box of that circle.
SHAPES = {
    "disc": lambda u, v: u * u + v * v < 0.72,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.7,
    "triangle": lambda u, v: np.maximum(-v, 0.866 * abs(u) + 0.5 * v) < 0.5,
    "star": star,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.27) & (np.maximum(abs(u), abs(v)) < 0.93),
    "ring": lambda u, v: abs(u * u + v * v - 0.58) < 0.28,
    "crescent": lambda u, v: (u * u + v * v < 0.92) & ((u - 0.5) ** 2 + v * v > 0.5),
    "heart": lambda u, v: u * u + (v + 0.25 - 0.75 * np.sqrt(abs(u))) ** 2 < 0.54,
    "flower": flower,
    "hourglass": lambda u, v: (abs(v) < 0.76) & (abs(u) < 0.75 * abs(v) + 0.06),
}
SHAPE_CLASSES = tuple(SHAPES)


def wave(x):
    """A sine-like wave of period 1, made of exactly rounded operations: same bits everywhere."""
    x = x - np.rint(x)
    return x * (8 - 16 * abs(x))


TEXTURES = (  # how much of the second colour; p and q count periods along two axes
    lambda p, q: 0 * p,  # flat
    lambda p, q: 0.5 + 0.5 * wave(0.15 * p),  # gradient
    lambda p, q: 0.5 + 0.5 * wave(p),  # soft stripes
    lambda p, q: wave(p) > 0,  # stripes
    lambda p, q: wave(p) * wave(q) > 0,  # checks
    lambda p, q: wave(p) + wave(q) > 0.8,  # dots
)


@functools.cache
def pixel_centres(size):
    """The centres of `size` pixels as fractions of the side, [size]."""
    return (np.arange(size, dtype=np.float32) + 0.5) / size


def project(x, y, axes):
    """The pixels (x, y) along each axis (angle, scale, offset): [axes, rows, columns]."""
    axes = [(scale * math.cos(angle), scale * math.sin(angle), offset) for angle, scale, offset in axes]
    cosines, sines, offsets = np.array(axes, np.float32).T[:, :, None]
    return (cosines * x)[:, None, :] + (sines * y + offsets)[:, :, None]


def pick(rng, options):
    """One of the options, by a draw that is the same on every Python."""
    return options[int(rng.random() * len(options))]


def new_colour(rng, *others):
    """A random colour that stands out against the others."""
    while True:
        colour = [255 * rng.random() for _ in range(3)]
        if all(sum(abs(a - b) for a, b in zip(colour, other)) > 180 for other in others):
            return colour


def background(rng, size, colour):
    """The colour plus three tinted waves, from coarse and strong to fine and faint."""
    pixels = pixel_centres(size)
    axes = [(2 * math.pi * rng.random(), f * rng.uniform(0.6, 1.4), rng.random()) for f in (1, 4, 11)]
    tints = [[strength * rng.uniform(-1, 1) for _ in range(3)] for strength in (64, 38, 26)]
    mean, *tints = np.array([colour, *tints], np.float32)[:, :, None, None]
    return sum((t * w for t, w in zip(tints, wave(project(pixels, pixels, axes)))), start=mean)


def paint(rng, image, instances, colour, number, shape, x, y, radius):
    """Draws one object over what is there, nearly upright, with a random texture."""
    size, pixels = len(instances), pixel_centres(len(instances))
    columns = slice(max(0, int((x - radius) * size)), int((x + radius) * size) + 1)
    rows = slice(max(0, int((y - radius) * size)), int((y + radius) * size) + 1)
    turn, texture_turn, frequency = rng.uniform(-0.25, 0.25), 2 * math.pi * rng.random(), rng.uniform(6, 13)
    axes = [(turn, 1 / radius, 0), (turn + math.pi / 2, 1 / radius, 0)]
    axes += [(texture_turn, frequency, rng.random()), (texture_turn + math.pi / 2, frequency, 0)]
    u, v, p, q = project(pixels[columns] - x, pixels[rows] - y, axes)
    mask = SHAPES[shape](u, v)
    weight = pick(rng, TEXTURES)(p, q).astype(np.float32)
    contrast = [0.7 * (255 * rng.random() - c) for c in colour]
    colour, contrast = np.array([colour, contrast], np.float32)[:, :, None, None]
    np.copyto(image[:, rows, columns], colour + contrast * weight, where=mask)
    np.copyto(instances[rows, columns], number, where=mask)


def layout(rng):
    """The main object and all objects in drawing order, as (number, shape, x, y, radius)."""
    x, y, radius = rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58), rng.uniform(0.28, 0.42)
    main = 1, pick(rng, SHAPE_CLASSES), x, y, radius
    others = [shape for shape in SHAPE_CLASSES if shape != main[1]]
    objects = []
    for number in range(2, pick(rng, (4, 5, 6))):
        angle, distance = 2 * math.pi * rng.random(), rng.uniform(0.8 * radius, 0.6)
        centre = x + distance * math.cos(angle), y + distance * math.sin(angle)
        centre = (min(max(c, 0.04), 0.96) for c in centre)
        objects.append((number, pick(rng, others), *centre, rng.uniform(0.1, 0.19)))
    # At most two distractors lie over the main object, so that most of it stays visible.
    objects.insert(len(objects) - pick(rng, (0, 1, 2)), main)
    return main, objects


def render_scene(seed: int, size: int = 64) -> tuple[np.ndarray, int, np.ndarray]:
    """One scene, a pure function of (seed, size); another size shows the same scene.

    Returns the image (uint8, [3, size, size]), the class of the main object (an index into
    SHAPE_CLASSES) and the instance map (uint8, [size, size]). The map marks visible pixels:
    0 is background, 1 always the main object, and 2.. the others in drawing order, without gaps.
    """
    rng = random.Random(int(seed))
    main, objects = layout(rng)
    base = [rng.uniform(40, 215) for _ in range(3)]
    main_colour = new_colour(rng, base)
    image, instances = background(rng, size, base), np.zeros((size, size), np.uint8)
    for item in objects:
        colour = main_colour if item is main else new_colour(rng, base, main_colour)
        paint(rng, image, instances, colour, *item)
    numbers = [0] + [n for n in range(1, len(objects) + 1) if n in instances.tobytes()]
    if len(numbers) <= len(objects):  # something is fully hidden
        instances = np.searchsorted(numbers, instances).astype(np.uint8)
    grain = np.frombuffer(rng.randbytes(size * size), np.uint8).reshape(size, size)
    image += grain.astype(np.float32) / 12 - 10
    return image.clip(0, 255).astype(np.uint8), SHAPE_CLASSES.index(main[1]), instances


class Shapes:
    """The built-in scenes as a source; see `render_scene`. Scenes of the val split never appear in the others."""

    classes = list(SHAPE_CLASSES)

    def __init__(self, split="pretrain", image_size=64, length=None):
        self.first, self.length = (10**9, 1024) if split == "val" else (0, 4096)
        self.length = length or self.length
        self.image_size = image_size
        self.in_memory, self.kept = image_size <= 64, {}  # once rendered, as drawing takes longer than cropping
        self.description = (f"shapes: {len(self)} built-in scenes of {image_size}x{image_size}, "
                            f"{len(self.classes)} classes")

    def __len__(self):
        return self.length

    def read(self, index):
        if index in self.kept:
            return dict(self.kept[index])
        image, label, instances = render_scene(self.first + index, self.image_size)
        item = dict(image=torch.from_numpy(image), label=label, instances=torch.from_numpy(instances))
        if self.in_memory:
            self.kept[index] = item
        return dict(item)

    def name(self, index):
        return f"scene {index}"

    def file(self, index):
        return f"shapes-{self.image_size}/{self.first + index}"


class Arrays:
    """A torchvision dataset that holds its images as one array, [N, 32, 32, 3] (CIFAR) or [N, 3, 96, 96] (STL-10)."""

    in_memory = True

    def __init__(self, dataset, name):
        data = torch.from_numpy(dataset.data)
        self.data = data if data.shape[1] == 3 else data.permute(0, 3, 1, 2)
        labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
        self.labels, self.classes = np.asarray(labels).astype(int), list(dataset.classes)
        self.image_size, self.title = self.data.shape[-1], name
        self.description = (f"{name}: {len(self)} images of {self.image_size}x{self.image_size}, "
                            f"{len(self.classes)} classes")

    def __len__(self):
        return len(self.data)

    def read(self, index):
        return dict(image=self.data[index].contiguous(), label=int(self.labels[index]))

    def name(self, index):
        return f"{self.title} image {index}"

    def file(self, index):
        return f"{self.title}-{len(self)}/{index}"


LARGE = 2**19  # bytes; of smaller files hardly a crop allows a reduction, and looking for one costs time


def decode(path, shrink=None, turn=True):
    """An image file of any kind -> uint8 RGB [3, H, W]; the EXIF rotation is applied unless turn=False.

    shrink: function (H, W) -> how many times smaller a large JPEG may come; libjpeg then decodes at a half, quarter or
        eighth of the size, in less time.

    JPEGs go through torchvision, all else through Pillow: torchvision's PNG decoder takes the process down with it on
    some damaged files. Raises what they raise if the file cannot be decoded.
    """
    with open(path, "rb") as file:
        data = file.read()
    is_jpeg = data[:2] == b"\xff\xd8"
    if is_jpeg and shrink is not None and len(data) > LARGE:
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:  # torchvision may read more
            turned = turn and image.getexif().get(0x0112, 1) > 4
            times = shrink(*(image.size if turned else image.size[::-1]))
            if times >= 2:
                image.draft("RGB", tuple(side // times for side in image.size))
                image = (ImageOps.exif_transpose(image) if turn else image).convert("RGB")
                return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if is_jpeg and decode_image is not None:
        return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), "RGB", apply_exif_orientation=turn)
    with Image.open(io.BytesIO(data)) as image:
        image = ImageOps.exif_transpose(image) if turn else image
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert("RGB") would clip
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


class Files:
    """Image files below a folder with their labels. Paths are one byte array, which forked workers share.

    turn: whether EXIF rotations are applied.
    """

    in_memory, can_shrink = False, True

    def __init__(self, root, paths, labels, classes, description, turn=True):
        self.root, self.classes, self.description, self.turn = root, classes, description, turn
        self.paths, self.labels = np.array([os.fsencode(p) for p in paths]), np.asarray(labels)
        side = np.median([max_side(self.name(i)) for i in np.linspace(0, len(paths) - 1, 9).astype(int)])
        self.image_size = int(side) if MIN_SIDE <= side <= SMALL else 224

    def __len__(self):
        return len(self.paths)

    def read(self, index, shrink=None):
        return dict(image=decode(self.name(index), shrink, self.turn), label=int(self.labels[index]))

    def name(self, index):
        return os.path.join(self.root, os.fsdecode(self.paths[index].item()))

    def file(self, index):
        root = os.path.abspath(self.root)
        key = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]  # folders of one name are not one data set
        return os.path.join(f"{os.path.basename(root)}-{key}", os.fsdecode(self.paths[index].item()))


def max_side(path):
    """The longer side of an image file in pixels, from its header; 224 if that cannot be read."""
    try:
        with Image.open(path) as image:
            return max(image.size)
    except Exception:
        return 224


def find_images(folder):
    """All image files below a folder, at any depth, as sorted relative paths."""
    found = []
    for where, _, names in os.walk(folder, followlinks=True):
        inside = os.path.relpath(where, folder)
        inside = "" if inside == os.curdir else inside + os.sep
        found += [inside + name for name in names if name.lower().endswith(EXTENSIONS)]
    return sorted(found)


def number_classes(folder, paths, classes=None):
    """(labels, classes): the first folder of each relative path is its class, numbered by sorted name or as given."""
    names = [p.split(os.sep)[0] for p in paths]
    classes = classes or sorted(set(names))
    number = {name: i for i, name in enumerate(classes)}
    unknown = next((n for n in names if n not in number), None)
    if unknown:
        raise UsageError(f"{folder} has the class {unknown!r}, which its train folder has not")
    return [number[n] for n in names], classes


def train_and_val(root, split):
    """The split of a folder with train/ and val/: (folder, paths, labels, classes)."""
    train, val = os.path.join(root, "train"), os.path.join(root, "val")
    paths = find_images(train)
    if any(os.sep not in p for p in paths):
        raise UsageError(f"--data {root}: images lie directly in {train}, which must have a folder per class; for "
                         f"pre-training alone give --data {train}")
    labels, classes = number_classes(train, paths)
    if split != "val":
        return train, paths, labels, classes
    if not os.path.isdir(val):
        raise UsageError(f"--data {root}: there is a train folder but no val folder")
    annotations = Path(val, "val_annotations.txt")
    if annotations.is_file():  # Tiny ImageNet: file name, class, box
        rows = [line.split("\t") for line in annotations.read_text().splitlines() if line]
        number = {name: i for i, name in enumerate(classes)}
        return val, [os.path.join("images", r[0]) for r in rows], [number[r[1]] for r in rows], classes
    paths = find_images(val)
    return val, paths, number_classes(val, paths, classes)[0], classes


def load_folder(root, split):
    """A folder of one of these layouts -> Files; `split` is "pretrain" (all there is to train on), "train" or "val".

    - COCO's own: train2017/, val2017/ and annotations/; no labels;
    - train/ and val/ with a folder per class (ImageNet; Tiny ImageNet with its val_annotations.txt);
    - a folder per class: every tenth image of a class is the val split;
    - plain images at any depth: no labels, one split.
    """
    if not os.path.isdir(root):
        raise UsageError(f"--data {root}: no such folder, and not one of {', '.join(NAMED)}")
    if coco_folder(root, "train"):
        return load_coco(root, split)
    folder, layout = root, "plain images, no labels"
    if os.path.isdir(os.path.join(root, "train")):
        layout = "train/ and val/ with a folder per class"
        folder, paths, labels, classes = train_and_val(root, split)
    else:
        paths = find_images(root)
        labels, classes = [0] * len(paths), []
        if paths and all(os.sep in p for p in paths):
            layout = "a folder per class"
            labels, classes = number_classes(root, paths)
            place = np.zeros(len(classes), int)  # how many images of its class stand before each image
            for i, label in enumerate(labels if split != "pretrain" else []):
                place[label] += 1
                if (place[label] % 10 == 0) != (split == "val"):
                    paths[i] = None
            labels = [label for path, label in zip(paths, labels) if path]
            paths = [path for path in paths if path]
    if not paths:
        raise UsageError(f"--data {root}: no images in {folder} for the {split} split "
                         f"(looked for {' '.join(EXTENSIONS)})")
    return Files(folder, paths, labels, classes, f"{root}: {layout}, {len(paths)} images, {len(classes)} classes")


def load_named(name, split, root):
    """torchvision's CIFAR-10, CIFAR-100 or STL-10, downloaded below `root` if it is not there."""
    try:
        if name == "stl10":
            stl_split = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split]
            return Arrays(torchvision.datasets.STL10(root, stl_split, download=True), "STL-10")
        dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        return Arrays(dataset(root, train=split != "val", download=True), name.upper().replace("CIFAR", "CIFAR-"))
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--data {name}: could not download it into {root}/ or read it there ({error})") from None


NAMED = ("shapes", "cifar10", "cifar100", "stl10")


class Part:
    """`count` images of a source, evenly spread over it, and so over the classes of a folder."""

    def __init__(self, source, count):
        self.source, self.classes, self.image_size = source, source.classes, source.image_size
        self.can_shrink, self.in_memory = getattr(source, "can_shrink", False), source.in_memory
        self.places = np.linspace(0, len(source), count, endpoint=False).astype(int).tolist()
        self.description = f"{source.description}, {len(self)} of them"

    def __len__(self):
        return len(self.places)

    def read(self, index, shrink=None):
        return self.source.read(self.places[index], *[shrink] * self.can_shrink)

    def name(self, index):
        return self.source.name(self.places[index])

    def file(self, index):
        return self.source.file(self.places[index])


def load_data(name, split="pretrain", image_size=None, root="data", limit=None):
    """What --data names -> a source. split: "pretrain" (labels unused), "train" or "val"; limit: of its images.

    Raises UsageError if there is no such data, or no images in it.
    """
    if name == "shapes":
        source = Shapes(split, pair_max(image_size) or 64)
    else:
        source = load_named(name, split, root) if name in NAMED else load_folder(name, split)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be positive, got {limit}")
    return source if limit is None or limit >= len(source) else Part(source, limit)


def pair_max(size):
    """The longer side of an int or (height, width) size; None stays None."""
    return size if size is None or isinstance(size, int) else max(size)


# ---------------------------------------------------------------------------------------------------------
# Regions: regions.read(i, item) -> maps [L, h, w] of image i, at any resolution. Integers are labels, 0 is nothing, and
# the L layers may overlap one another; booleans are L single regions; floats are responses with maximum 1.

# COCO (Lin et al. 2014, https://cocodataset.org/#format-data) with its instances or its panoptic segments
# (Kirillov et al. 2019) as maps of numbered regions.

def coco_folder(root, split):
    """The image folder of a COCO root's split, such as root/train2017, the newest; None if root is not a COCO root."""
    folders = Path(root).glob("val*" if split == "val" else "train*") if Path(root, "annotations").is_dir() else ()
    return max((f for f in folders if any(f.glob("*.jpg"))), default=None)


def load_coco(root, split):
    """A COCO root -> Files without labels, in the order of the names; UsageError if the split has no images.

    Its annotations are of the pixels as they are stored, so EXIF rotations are not applied.
    """
    folder = coco_folder(root, split)
    if folder is None:
        raise UsageError(f"--data {root}: no {'val' if split == 'val' else 'train'}* folder with .jpg images in it")
    paths = find_images(folder)
    return Files(folder, paths, [0] * len(paths), [], f"{root}: COCO {folder.name}, {len(paths)} images", turn=False)


def fill_polygon(points, height, width):
    """[x1, y1, x2, y2, ...] in pixels -> bool [height, width]: the pixels with their centre inside, by even-odd rule.

    Pillow would draw the outline too, half a pixel all around. Where a vertex lies on whole pixels, centres right on
    an edge fall on the same side as with COCO's own tools, which also go down the columns. They round the edges to
    fifths of a pixel, so that with other vertices some pixels on the border differ.
    """
    start = np.reshape(points, (-1, 2)).T
    end = np.roll(start, -1, axis=1)
    centres = np.arange(width)[:, None] + 0.5
    columns, edges = np.nonzero((start[0] > centres) != (end[0] > centres))  # which edge crosses which column
    (x, y), (dx, dy) = start[:, edges], (end - start)[:, edges]
    rows = np.ceil(y + (columns + 0.5 - x) / dx * dy - 0.5).clip(0, height).astype(int)  # the first centre below it
    crossings = np.zeros((height + 1, width), np.uint8)  # it may overflow, and stay odd or even
    np.add.at(crossings, (rows, columns), 1)
    return crossings[:height].cumsum(0, dtype=np.uint8) % 2 == 1


def rle_counts(text):
    """COCO's compressed run lengths -> list of ints. A character is 5 bits, the lowest first; its bit 5 says that more
    follow, the last one's bit 4 is the sign. From the fourth on they are differences to the number two before."""
    counts, value, shift = [], 0, 0
    for code in text.encode():
        bits, shift = code - 48, shift + 5
        value |= (bits & 31) << shift - 5
        if not bits & 32:
            value -= (bits & 16 > 0) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def coco_mask(segmentation, height, width):
    """A COCO segmentation -> bool [height, width]: the union of polygons, or runs of 0 and 1 in turn, by columns."""
    if isinstance(segmentation, list):
        return np.any([fill_polygon(part, height, width) for part in segmentation], axis=0)
    counts = segmentation["counts"]
    counts = rle_counts(counts) if isinstance(counts, str) else counts
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


class CocoMaps:
    """The region maps of a COCO root's split. kind: "instances" (crowds left out) or "panoptic" (things and stuff).

    Raises UsageError if the annotations are not there or cannot be understood.
    """

    def __init__(self, root, split, kind):
        name = (coco_folder(root, split) or Path(split)).name
        self.kind, self.pngs = kind, Path(root, "annotations", f"{kind}_{name}")
        path = self.pngs.with_suffix(".json")
        for needed in (path, self.pngs) if kind == "panoptic" else (path,):
            if not needed.exists():
                raise UsageError(f"--regions {kind}: there is no {needed}")
        regions = collections.defaultdict(list)  # of an image: its segmentations, or pairs of a PNG and the ids in it
        try:
            data = json.loads(path.read_text("utf-8"))
            if kind == "instances":
                data["annotations"].sort(key=lambda a: -a["area"])
            for a in data["annotations"]:
                if kind == "panoptic":
                    regions[a["image_id"]].append((a["file_name"], [segment["id"] for segment in a["segments_info"]]))
                elif not a.get("iscrowd"):
                    regions[a["image_id"]].append(a["segmentation"])
            kept = [pickle.dumps((i["height"], i["width"], regions[i["id"]])) for i in data["images"]]
            stems = [Path(i["file_name"]).stem for i in data["images"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"--regions {kind}: {path} is not a file of COCO annotations ({error!r})") from None
        ends = np.cumsum([len(k) for k in kept]).tolist()  # one string of bytes: forked workers share it
        self.kept, self.spans = b"".join(kept), dict(zip(stems, zip([0] + ends, ends)))

    def read(self, path):
        """The path of an image, or its stem -> uint16 [height, width], 0 = nothing, 1.. the regions.

        Instances count from the largest to the smallest, which lies on top; a hidden one leaves a gap. Panoptic
        segments count as in the JSON. Raises UsageError if the image's annotations are broken, or its PNG missing.
        """
        stem = Path(path).stem
        if stem not in self.spans:
            return np.zeros(decode(path, turn=False).shape[1:], np.uint16)
        height, width, regions = pickle.loads(self.kept[slice(*self.spans[stem])])
        numbers = np.zeros((height, width), np.uint16)
        try:
            for number, region in enumerate(regions, start=1):
                if self.kind == "instances":
                    numbers[coco_mask(region, height, width)] = number
                    continue
                with Image.open(self.pngs / region[0]) as image:
                    red, green, blue = np.asarray(image.convert("RGB"), np.uint32).transpose(2, 0, 1)
                number_of = np.zeros(1 << 24, np.uint16)  # pages never touched take no memory
                number_of[region[1]] = np.arange(1, len(region[1]) + 1)
                numbers = number_of[red + 256 * green + 65536 * blue]
        except FileNotFoundError as error:
            raise UsageError(f"--regions {self.kind}: there is no {error.filename}") from None
        except Exception as error:  # Pillow raises anything from OSError to SyntaxError
            raise UsageError(f"--regions {self.kind}: broken annotations of {stem} ({error!r})") from None
        return numbers


def renumber(maps, most=255):
    """Label maps, or any number of binary maps, [L, H, W] -> uint8 label maps, numbered from the largest region down.

    Binary maps are dealt to at most 8 layers in which they do not overlap, the largest first. What is in excess of
    `most` regions in a layer, or of the layers, becomes 0.
    """
    if maps.dtype == torch.bool:
        layers = np.zeros((1, *maps.shape[1:]), np.int64)
        maps = maps.numpy()
        for number, region in enumerate(maps[np.argsort(-maps.sum((1, 2)), kind="stable")], start=1):
            free = [k for k, layer in enumerate(layers) if not layer[region].any()]
            if not free and len(layers) < 8:
                free, layers = [len(layers)], np.concatenate([layers, np.zeros_like(layers[:1])])
            if free:
                layers[free[0]][region] = number
    else:
        layers = maps.numpy()
    out = np.zeros(layers.shape, np.uint8)
    for layer, into in zip(layers, out):
        areas = np.bincount(layer.ravel())
        areas[0] = 0
        order = np.argsort(-areas, kind="stable")[: min(most, np.count_nonzero(areas))]
        number = np.zeros(len(areas), np.uint8)
        number[order] = np.arange(1, len(order) + 1)
        np.take(number, layer, out=into)
    return torch.from_numpy(out)


class Instances:
    """The instance maps that a source has itself (`shapes`)."""

    def read(self, index, item):
        return item["instances"][None]


def check_shape(name, image, maps, exact=False):
    """Raises UsageError if region maps [L, h, w] have another size, or if not `exact` another shape, than their image."""
    (H, W), (h, w) = image.shape[1:], maps.shape[1:]
    if (h, w) != (H, W) if exact else abs(h * W - w * H) > max(H, W, h, w):
        raise UsageError(f"--regions: {name} has {W}x{H} pixels, its regions have {w}x{h}")


class CocoRegions:
    """COCO's instances or panoptic segments."""

    def __init__(self, source, root, split, kind):
        self.source, self.maps = source, CocoMaps(root, split, kind)

    def read(self, index, item):
        maps = torch.from_numpy(self.maps.read(self.source.name(index)).astype(np.int32))[None]
        check_shape(self.source.name(index), item["image"], maps, exact=True)
        return maps


def read_labels(path):
    """A label PNG -> int32 [H, W]: of a palette PNG the indices, of a coloured one a number for each colour."""
    with Image.open(path) as image:
        plain = image.mode in ("1", "L", "P") or image.mode.startswith("I")
        labels = np.asarray(image if plain else image.convert("RGB"), np.int64)
    if labels.ndim == 3:
        labels = np.unique(labels @ [1, 256, 65536], return_inverse=True)[1].reshape(labels.shape[:2])
    return torch.from_numpy(labels.astype(np.int32))


class MaskFolder:
    """A user's masks, matched by file name: label PNGs, or .npz files with one stack of binary masks [M, H, W] (SAM's).

    They lie in the images' own subfolders or, where a name is unique, anywhere. An image without one has no regions.
    """

    def __init__(self, source, folder):
        self.source, self.files = source, {}
        if not os.path.isdir(folder):
            raise UsageError(f"--regions {folder}: no such folder, and not one of {', '.join(REGIONS)}")
        for where, _, names in os.walk(folder, followlinks=True):
            for name in names:
                stem, extension = os.path.splitext(os.path.relpath(os.path.join(where, name), folder))
                if extension.lower() in (".png", ".npz"):
                    self.files[stem] = os.path.join(where, name)
        self.stems = [os.path.splitext(source.file(i).split(os.sep, 1)[1])[0] for i in range(len(source))]
        self.count = collections.Counter(os.path.basename(stem) for stem in self.stems)
        self.found = sum(self.path(i) is not None for i in range(len(source)))
        if not self.found:
            raise UsageError(f"--regions {folder}: no .png or .npz in it has the name of an image, such as "
                             f"{os.path.basename(source.name(0))}")

    def path(self, index):
        stem = self.stems[index]
        name = os.path.basename(stem)
        return self.files.get(stem) or (self.files.get(name) if self.count[name] == 1 else None)

    def read(self, index, item):
        path = self.path(index)
        if path is None:
            return torch.zeros(1, *item["image"].shape[1:], dtype=torch.int32)
        try:
            if path.endswith(".npz"):
                with np.load(path) as file:
                    masks = file[file.files[0]]
                if masks.ndim != 3:
                    raise ValueError(f"its first array is {list(masks.shape)}, not [M, H, W]")
                maps = torch.from_numpy(masks != 0)
            else:
                maps = read_labels(path)[None]
        except Exception as error:
            raise UsageError(f"--regions: {path} holds no masks ({error})") from None
        check_shape(self.source.name(index), item["image"], maps)
        return maps


class RegionCache:
    """Maps computed once and kept in one file an image below `folder`, whose name has the settings.

    compute(item of the source) -> the maps, an array. Files are written whole or not at all, so that an interrupted
    computation continues where it was.
    """

    def __init__(self, source, folder, compute):
        self.source, self.folder, self.compute = source, folder, compute

    def path(self, index):
        return os.path.join(self.folder, self.source.file(index) + ".npz")

    def save(self, index, maps):
        path = self.path(index)
        temporary = f"{path}.{os.getpid()}.npz"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            np.savez_compressed(temporary, maps)
            os.replace(temporary, path)
        except OSError as error:
            Path(temporary).unlink(missing_ok=True)
            raise UsageError(f"--region-cache: cannot write {path}: {error.strerror}") from None

    def read(self, index, item):
        path = self.path(index)
        if not os.path.exists(path):
            self.save(index, self.compute(item))
        try:
            with np.load(path) as file:
                maps = file["arr_0"]
        except Exception:
            raise UsageError(f"{path} is broken: delete it, it will be computed anew") from None
        return torch.from_numpy(maps.astype(np.float32) / 255 if maps.dtype == np.uint8 else maps.astype(np.int32))

    def missing(self, rank=0, world_size=1):
        """The indices of this process's share of the images that have no maps yet."""
        return [i for i in range(rank, len(self.source), world_size) if not os.path.exists(self.path(i))]

    def fill(self, workers=0, rank=0, world_size=1):
        """Computes what is missing, an image at a time in each of the workers."""
        missing = self.missing(rank, world_size)
        if missing:
            loader = make_loader(torch.utils.data.Subset(self, missing), workers, batch_size=4)
            with tqdm(total=len(missing), desc=f"regions ({os.path.basename(self.folder)})", disable=rank > 0) as bar:
                for batch in loader:
                    bar.update(len(batch["index"]))

    def __getitem__(self, index):
        if not os.path.exists(self.path(index)):
            try:
                item = self.source.read(index)
            except UsageError:
                raise
            except Exception:  # a broken image is named when it is to be trained on
                return dict(index=index)
            self.save(index, self.compute(item))
        return dict(index=index)


# Felzenszwalb-Huttenlocher segments (FH): regions from pixels alone

CHUNK = 8192  # edges; fewer cost more calls of numpy, more let more idle edges through to the Python loop


def smooth(image, sigma):
    """uint8 [3, H, W] -> float64 in [0, 1], blurred by a Gaussian (sigma > 0 in pixels), mirrored at the borders."""
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 / sigma ** 2 * np.arange(-radius, radius + 1) ** 2)
    taps /= taps.sum()
    image = np.asarray(image) * (1 / 255)  # this and the order of the sum: the same bits as scikit-image's
    for _ in range(2):  # along H, then, as the axes are swapped, along W
        size = image.shape[1]
        padded = np.pad(image, ((0, 0), (radius, radius), (0, 0)), mode="symmetric")
        image = sum((taps[k] * (padded[:, k:k + size] + padded[:, 2 * radius - k:][:, :size]) for k in range(radius)),
                    taps[radius] * image)
        image = np.ascontiguousarray(image.transpose(0, 2, 1))
    return image


def grid_edges(image):
    """Float [3, H, W] -> the E edges of the 8-neighbour grid by ascending weight: weights [E], ends int32 [2, E].

    A weight is the Euclidean distance of two pixels' colours; an end is a pixel's number y * W + x.
    """
    numbers = np.arange(image[:1].size, dtype=np.int32).reshape(image[:1].shape)
    neighbours = ((np.s_[:, :, 1:], np.s_[:, :, :-1]), (np.s_[:, 1:], np.s_[:, :-1]),
                  (np.s_[:, 1:, 1:], np.s_[:, :-1, :-1]), (np.s_[:, :-1, 1:], np.s_[:, 1:, :-1]))
    weights, ends = [], []
    for p, q in neighbours:
        r, g, b = (image[p] - image[q]) ** 2
        weights.append(np.sqrt(r + g + b).ravel())
        ends.append((numbers[p].ravel(), numbers[q].ravel()))
    weights, ends = np.concatenate(weights), np.concatenate(ends, axis=1)
    order = np.argsort(weights, kind="stable")  # the same segments on every machine
    return weights.take(order), ends.take(order, axis=1)


def find_roots(forest, nodes):
    """The roots of the nodes [M] in a forest of parents [N]; they become the nodes' parents."""
    roots = forest.take(nodes)
    while not np.array_equal(roots, above := forest.take(roots)):
        roots = above
    forest[nodes] = roots
    return roots


def crossings(parent, weights, ends, alive):
    """Yield (u, v, weight), in the order of the edges, for those that lead from one tree of the forest to another.

    u < v are the roots, and the caller may join them by parent[v] = u. alive(a, b, weight) says which edges between
    the trees of roots a and b [M] might be of use from this weight on. numpy drops the others, and those inside
    a tree, a chunk at a time; only about as many as there are joins are left to the slow loop.
    """
    forest = np.frombuffer(parent, "i")  # the same memory
    for i in range(0, len(weights), CHUNK):
        a, b = (find_roots(forest, end[i:i + CHUNK]) for end in ends)
        keep = np.flatnonzero((a != b) & alive(a, b, weights[i:i + 1]))
        for u, v, weight in zip(a[keep].tolist(), b[keep].tolist(), weights[i + keep].tolist()):
            while parent[u] != u:
                u = parent[u]
            while parent[v] != v:
                v = parent[v]
            if u != v:
                yield (u, v, weight) if u < v else (v, u, weight)


def segment(weights, ends, pixels, scale, min_size):
    """Sorted edges of a graph of so many pixels -> int32 labels [pixels], numbered by the segments' first pixels.

    An edge joins two segments if it weighs less than the limit of both: the heaviest edge inside + scale / size.
    A segment whose limit has been passed stays as it is, because the weights only rise: its edges are dropped.
    """
    scale = scale / 255  # the authors' colours go up to 255
    numbers = np.arange(pixels, dtype=np.int32)
    # numpy and the loop share each array's memory. Float32 limits are scikit-image's
    parent, size, limit = array("i", numbers.tobytes()), array("i", [1]) * pixels, array("f", [scale]) * pixels
    forest, sizes, limits = np.frombuffer(parent, "i"), np.frombuffer(size, "i"), np.frombuffer(limit, "f")

    for u, v, weight in crossings(parent, weights, ends, lambda a, b, w: np.minimum(limits[a], limits[b]) > w):
        if weight < limit[u] and weight < limit[v]:
            parent[v] = u
            size[u] += size[v]
            limit[u] = weight + scale / size[u]

    a, b = find_roots(forest, numbers).take(ends)
    left = np.flatnonzero(a != b)
    for u, v, _ in crossings(parent, weights.take(left), ends.take(left, axis=1),
                             lambda a, b, _: np.minimum(sizes[a], sizes[b]) < min_size):
        if size[u] < min_size or size[v] < min_size:
            parent[v] = u
            size[u] += size[v]
    roots = find_roots(forest, numbers)
    return np.cumsum(roots == numbers, dtype=np.int32)[roots] - 1


def felzenszwalb(image, scale=1000, sigma=0.8, min_size=None):
    """uint8 [3, H, W] -> int32 labels [H, W] from 0; several scales (a tuple, faster than one by one): [S, H, W].

    Felzenszwalb and Huttenlocher, "Efficient graph-based image segmentation", IJCV 2004, with scikit-image's result.
    A larger scale makes larger segments; those of fewer than min_size pixels (default: scale) join a neighbour.
    """
    weights, ends = grid_edges(smooth(image, sigma))
    height, width = image.shape[1:]
    labels = [segment(weights, ends, height * width, s, s if min_size is None else min_size) for s in np.ravel(scale)]
    return np.reshape(labels, (*np.shape(scale), height, width))


def fh_maps(item, scales, largest=640):
    """FH partitions of an item's image -> uint16 [scales, h, w], int32 if they are many.

    Maps of more than `largest` pixels a side are kept at that size, which a crop of a fifth of the image still exceeds
    at 224 pixels.
    """
    maps = felzenszwalb(item["image"].numpy(), scales) + 1
    step = max(1.0, max(maps.shape[1:]) / largest)
    rows, columns = (((np.arange(int(n / step)) + 0.5) * step).astype(int) for n in maps.shape[1:])
    return maps[:, rows[:, None], columns].astype(np.uint16 if maps.max() < 2**16 else np.int32)


class FHRegions:
    """FH partitions computed whenever they are asked for."""

    def __init__(self, scales):
        self.scales = scales

    def read(self, index, item):
        return torch.from_numpy(fh_maps(item, self.scales).astype(np.int32))


class CAMCache(RegionCache):
    """Class activation maps of a classifier (see `mim.class_activation_map`), as 8-bit responses at its resolution.

    load: function -> the classifier, called when a map is missing. labelled: of the images' labels, which must be the
    classifier's, instead of the predicted classes.
    """

    def __init__(self, source, folder, load, device="cpu", labelled=False):
        super().__init__(source, folder, self.map_of)
        self.load, self.device, self.labelled = load, device, labelled

    @functools.cached_property
    def network(self):
        return self.load().to(self.device).eval()

    def map_of(self, item):
        image = TF.resize(item["image"], [224, 224], interpolation=v2.InterpolationMode.BICUBIC)
        return self.maps(image[None], torch.tensor([item["label"]]))[0]

    def maps(self, images, labels=None):
        """uint8 images [B, 3, 224, 224] -> uint8 responses [B, 1, h, w]."""
        images = normalize(images.to(self.device))
        maps = mim.class_activation_map(self.network, images, labels.to(self.device) if self.labelled else None)
        return (255 * maps.clamp(0, 1)).round().byte().cpu().numpy()

    def read(self, index, item):
        maps = super().read(index, item)[None]
        return F.interpolate(maps, item["image"].shape[1:], mode="bilinear", align_corners=False)[0]

    def fill(self, workers=0, rank=0, world_size=1):
        missing = self.missing(rank, world_size)
        whole = torch.utils.data.Subset(Images(self.source, 224, "whole"), missing)
        with tqdm(total=len(missing), desc="class activation maps", disable=rank > 0 or not missing) as bar:
            for batch in make_loader(whole, workers, batch_size=64) if missing else ():
                for index, maps in zip(batch["index"].tolist(), self.maps(batch["image"], batch["label"])):
                    self.save(index, maps)
                bar.update(len(batch["index"]))
        self.device = "cpu"  # a few more may be asked for, in a worker
        if "network" in vars(self):
            self.network.cpu()


def resnet50(weights=None):
    """torchvision's ImageNet ResNet-50; its weights from a file, or downloaded. UsageError if they cannot be had."""
    network = torchvision.models.resnet50()
    try:
        if weights:
            network.load_state_dict(mim.read_checkpoint(weights))
        else:
            enum = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
            network.load_state_dict(enum.get_state_dict(progress=True, check_hash=True))
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        where = f"--cam-weights {weights}: {reason}" if weights else (
            f"--regions cam: torchvision's ResNet-50 weights could not be downloaded ({reason}); --cam-weights takes "
            "them from a file")
        raise UsageError(where) from None
    return network


REGIONS = ("instances", "panoptic", "fh", "cam")


def default_regions(method, data):
    """The kind of regions that --regions stands for where it is not given."""
    if data == "shapes" or method == "objmae" and coco_folder(data, "train"):
        return "instances"
    return "cam" if method == "objmae" else "fh"


def default_scales(source, data):
    """FH's scales: of R-MAE's §4 for COCO and for ImageNet; for small images ours, in proportion to their area."""
    if source.image_size <= SMALL:
        return [max(4, round(s * source.image_size**2 / 64**2)) for s in (25, 50, 100)]
    return [500, 1000, 1500] if coco_folder(data, "train") else [1000]


def open_regions(kind, source, data, split="pretrain", scales=None, cache="data/regions", cam_weights=None,
                 cam_labels=False, device="cpu"):
    """What --regions names -> regions of the source's images (see the head of this section), some yet to `fill`.

    kind: one of REGIONS, or a folder of masks. Raises UsageError if there are none of that kind.
    """
    if kind == "instances" and data == "shapes":
        return Instances()
    if kind in ("instances", "panoptic"):
        if not coco_folder(data, split):
            raise UsageError(f"--regions {kind}: --data {data} has none; they come with COCO"
                             + (" and shapes" if kind == "instances" else ""))
        return CocoRegions(source, data, split, kind)
    if kind == "fh":
        scales = sorted(scales or default_scales(source, data))
        folder = os.path.join(cache, "fh-0.8-" + "-".join(f"{s:g}" for s in scales))
        return RegionCache(source, folder, functools.partial(fh_maps, scales=scales))
    if kind == "cam":
        if cam_labels and len(source.classes) != 1000:
            raise UsageError(f"--cam-labels: the labels must be ImageNet's 1000 classes, {data} has "
                             f"{len(source.classes)}")
        network, key = functools.partial(resnet50, cam_weights), "labels" if cam_labels else "predicted"
        if cam_weights:
            if not os.path.isfile(cam_weights):
                raise UsageError(f"--cam-weights {cam_weights}: no such file")
            key += "-" + hashlib.sha256(Path(cam_weights).read_bytes()).hexdigest()[:8]
        return CAMCache(source, os.path.join(cache, f"cam-{key}"), network, device, cam_labels)
    return MaskFolder(source, kind)


# ---------------------------------------------------------------------------------------------------------
# Items and batches


def resized_crop(image, box, full, size):
    """A box (top, left, height, width) of an image [C, H, W], which was of the size `full`, resized to `size`, bicubic.

    torchvision's uint8 kernel is fast on pixels that lie together, and slow on a slice of a decoded image.
    """
    if tuple(full) != tuple(image.shape[-2:]):  # decoded at a reduced size
        (top, left, height, width), (down, across) = box, (new / old for new, old in zip(image.shape[-2:], full))
        top, bottom, left, right = (round(x) for x in (top * down, (top + height) * down,
                                                       left * across, (left + width) * across))
        box = top, left, bottom - top, right - left
    box = TF.crop(image, *box)[None].contiguous(memory_format=torch.channels_last)
    return TF.resize(box, size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)[0]


class Images(torch.utils.data.Dataset):
    """Items of a source for one way of looking at its images.

    view: "crop" a random resized crop (training); "center" the largest centred crop as the papers evaluate, of 7/8
        the side for images of 97 to 224 pixels, the whole square for smaller and for larger ones; "whole" the full image, resized. Large JPEGs are decoded at a reduced size as far as the
        crop allows (`decode`), but not for "center", so that accuracies compare with others', nor with regions.
    flip: whether every second random crop, by chance, is mirrored.
    crop_scale: area of the random crop, as fractions of the image's.
    augment: a transforms.v2 transform of the cropped uint8 image, such as RandAugment.
    regions: where the maps of the images' regions come from (`open_regions`); items then carry `regions`, cropped and
        flipped exactly as the image: label maps [L, H, W] uint8 with 0 for nothing, or one map of floats (CAM).

    Keys are an index or (epoch, index), which changes the random view from epoch to epoch. In the place of a file
    that cannot be decoded comes the next that can; `index` says which, and `broken` is the bad one's (else -1).
    """

    def __init__(self, source, image_size, view="crop", crop_scale=(0.2, 1.0), flip=True, seed=0, augment=None,
                 regions=None):
        self.source, self.view, self.flip, self.seed, self.augment = source, view, flip, seed, augment
        self.size = list(image_size) if not isinstance(image_size, int) else [image_size, image_size]
        self.random_crop = v2.RandomResizedCrop(self.size, scale=crop_scale)
        self.regions = regions
        self.can_shrink = getattr(source, "can_shrink", False) and view != "center" and regions is None

    def __len__(self):
        return len(self.source)

    def read(self, epoch, index):
        """(item, index, broken): the source's item at index, or at the next place where one can be read.

        The image may be smaller than its file's, as far as the crop allows; item["size"] is then the file's.
        """
        for shift in range(min(100, len(self))):
            at, size = (index + shift) % len(self), {}

            def shrink(H, W):
                _, _, height, width = self.choose_box(epoch, at, H, W)
                times = min(height // self.size[0], width // self.size[1])
                if times >= 2:
                    size["size"] = H, W
                return times

            try:
                item = self.source.read(at, *[shrink] * self.can_shrink) | size
                if min(item["image"].shape[-2:]) < MIN_SIDE:
                    raise TooSmall("{2}x{1} pixels, too small".format(*item["image"].shape))
                return item, at, index if shift else -1
            except UsageError:
                raise
            except Exception as error:  # decoders raise anything from OSError to SyntaxError
                reason = str(error) if isinstance(error, TooSmall) else "cannot be decoded as an image"
        raise UsageError(f"{self.source.name(index)} and the images after it are broken; the last: {reason}")

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        state = torch.get_rng_state()
        item, index, broken = self.read(epoch, index)
        H, W = item.get("size", item["image"].shape[-2:])
        top, left, height, width = self.choose_box(epoch, index, H, W)
        flip = self.flip and self.view == "crop" and bool(torch.rand(()) < 0.5)
        out = dict(label=item["label"], index=index, broken=broken, flip=flip,
                   box=torch.tensor([left / W, top / H, (left + width) / W, (top + height) / H]))
        image = resized_crop(item["image"], (top, left, height, width), (H, W), self.size)
        out["image"] = image.flip(-1) if flip else image
        if self.regions is not None:
            maps = self.regions.read(index, item)
            if maps.is_floating_point():
                maps = resized_crop(maps, (top, left, height, width), (H, W), self.size)
            else:  # the pixel under each centre, at the maps' own resolution: v2's `nearest` is half a pixel off
                boxes = zip((top / H, left / W), (height / H, width / W), maps.shape[1:], self.size)
                rows, columns = ((n * (start + length * (torch.arange(count) + 0.5) / count)).long()
                                 for start, length, n, count in boxes)
                maps = maps[:, rows[:, None], columns]
            maps = maps.flip(-1) if flip else maps
            out["regions"] = maps if maps.is_floating_point() else renumber(maps)
        if self.augment is not None:
            out["image"] = self.augment(out["image"])
        torch.set_rng_state(state)
        return out

    def choose_box(self, epoch, index, H, W):
        """The crop (top, left, height, width) in pixels of an image of this size; seeds what is random of the item."""
        torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
        if self.view == "crop":
            return self.random_crop.get_params(torch.empty(0, H, W), self.random_crop.scale, self.random_crop.ratio)
        if self.view == "whole":
            return 0, 0, H, W
        share = 224 / 256 if SMALL < max(self.size) <= 224 else 1.0
        scale = share * min(H / self.size[0], W / self.size[1])
        height, width = max(1, round(scale * self.size[0])), max(1, round(scale * self.size[1]))
        return (H - height) // 2, (W - width) // 2, height, width


class EpochBatches:
    """Batch sampler: keys (epoch, index), a seeded permutation an epoch, its last incomplete batch dropped.

    A step's batch is cut into micro-batches of `micro_batch` images, dealt to the processes in turn, so that
    2 processes see what 1 process sees that accumulates 2 micro-batches. Set `.epoch` before each epoch.
    """

    def __init__(self, num_images, batch_size, micro_batch, seed=0, rank=0, world_size=1):
        self.num_images, self.batch_size, self.micro_batch = num_images, batch_size, micro_batch
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0

    def __len__(self):
        return self.num_images // self.batch_size * (self.batch_size // self.micro_batch // self.world_size)

    def __iter__(self):
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        steps = self.num_images // self.batch_size
        for step in order[: steps * self.batch_size].view(steps, -1, self.micro_batch):
            for micro in step[self.rank :: self.world_size]:
                yield [(self.epoch, i) for i in micro.tolist()]


def collate(items):
    """Items -> a batch; regions of fewer layers are filled up with empty ones."""
    if "regions" in items[0]:
        most = max(len(item["regions"]) for item in items)
        for item in items:
            item["regions"] = F.pad(item["regions"], (0, 0, 0, 0, 0, most - len(item["regions"])))
    return torch.utils.data.default_collate(items)


def make_loader(dataset, workers=0, device=None, **options):
    """A DataLoader whose workers, if any, live as long as it does, and whose batches a CUDA device can copy unnoticed
    (with non_blocking=True). options: batch_sampler=... or batch_size=..."""
    pin_memory = device is not None and torch.device(device).type == "cuda"
    return torch.utils.data.DataLoader(dataset, num_workers=workers, pin_memory=pin_memory, collate_fn=collate,
                                       persistent_workers=workers > 0, **options)


# Small data sets on the device: what `Images` does with an item, done with a batch of them at once


def scramble(x):
    """int64 -> int64, each bit of which depends on all of x: splitmix64's mixing (Steele, Lea, Flood, 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        x = (x ^ (x >> shift & 2 ** (64 - shift) - 1)) * factor
    return x


def uniform(keys, count):
    """Random numbers [n, count] in [0, 1), float32, that depend on each of the int64 keys [n] alone."""
    counter = torch.arange(1, count + 1, device=keys.device) * (0x9E3779B97F4A7C15 - 2**64)
    return (scramble(scramble(keys)[:, None] + counter) >> 40 & 2**24 - 1).float() / 2**24


def random_boxes(numbers, H, W, scale, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's boxes for images of H x W pixels: (top, left, height, width), int64 [n] each.

    numbers: [n, 22] in [0, 1). The first of ten draws of area and of width / height that fits; if none does, the
    largest centred box of a permitted shape.
    """
    area = H * W * (scale[0] + (scale[1] - scale[0]) * numbers[:, :10])
    aspect = (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * numbers[:, 10:20]).exp()
    width, height = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (width > 0) & (width <= W) & (height > 0) & (height <= H)
    first, none = fits.int().argmax(1, keepdim=True), ~fits.any(1)
    height = height.gather(1, first)[:, 0].masked_fill(none, min(H, round(W / ratio[0])))
    width = width.gather(1, first)[:, 0].masked_fill(none, min(W, round(H * ratio[1])))
    top, left = ((room * x).long() for room, x in ((H - height + 1, numbers[:, 20]), (W - width + 1, numbers[:, 21])))
    return top.where(~none, (H - height) // 2), left.where(~none, (W - width) // 2), height, width


def resize_weights(start, length, sides, size):
    """The matrices [n, size, sides] that resize lines of `sides` pixels, of which start .. start + length - 1 count.

    Bicubic (a = -0.5) and antialiased, as Pillow and torchvision resize: the kernel is as wide as an output pixel.
    """
    scale = (length / size)[:, None, None]
    pixel, out = torch.arange(sides, device=start.device), torch.arange(size, device=start.device)[:, None]
    x = ((pixel + 0.5 - start[:, None, None] - (out + 0.5) * scale) / scale.clamp_min(1)).abs()
    weights = torch.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, (-0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) * (x < 2))
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weights = weights * inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


def resized_crops(images, boxes, flip, size):
    """Boxes of uint8 images [n, 3, H, W], resized to `size`, mirrored where `flip` [n] is true: two matrix products."""
    top, left, height, width = boxes
    rows = resize_weights(top, height, images.shape[2], size[0])
    columns = resize_weights(left, width, images.shape[3], size[1])
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    out = rows[:, None] @ images.float() @ columns.mT[:, None]
    return out.round().clamp(0, 255).to(torch.uint8)


class DeviceLoader:
    """The batches of an `Images` of random crops whose source is in memory, cropped and flipped on the device.

    All images lie there. What is random of an item depends on (seed, epoch, index) alone, as with `Images`, though the
    numbers differ. Batches have no labels.
    """

    def __init__(self, dataset, batches, device):
        self.dataset, self.batches, self.device = dataset, batches, device
        images = torch.empty(len(dataset), *dataset.source.read(0)["image"].shape, dtype=torch.uint8)
        for index in range(len(dataset)):
            images[index] = dataset.source.read(index)["image"]
        self.images = images.to(device)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        (H, W), dataset = self.images.shape[2:], self.dataset
        for keys in self.batches:
            index = torch.tensor([i for _, i in keys]).to(self.device, non_blocking=True)
            seed = seed_of(dataset.seed, keys[0][0])
            numbers = uniform(index + (seed if seed < 2**63 else seed - 2**64), 23)
            boxes = top, left, height, width = random_boxes(numbers, H, W, dataset.random_crop.scale)
            flip = (numbers[:, 22] < 0.5) & dataset.flip
            box = torch.stack([left / W, top / H, (left + width) / W, (top + height) / H], dim=1)
            image = resized_crops(self.images[index], boxes, flip, dataset.size)
            yield dict(image=image, index=index, box=box, flip=flip, broken=torch.empty(0))


class BrokenFiles:
    """Names each broken file once, and raises UsageError when more than 1% of the images are broken."""

    def __init__(self, source, echo=print):
        self.source, self.echo, self.found = source, echo, set()

    def watch(self, broken):
        """broken: [B], the items' `broken` entries of one batch, on the CPU."""
        for index in set(broken[broken >= 0].tolist()) - self.found:
            self.found.add(index)
            self.echo(f"broken image, another takes its place: {self.source.name(index)}")
        self.check()

    def check(self):
        """Raises UsageError if too many have been found."""
        if len(self.found) > 0.01 * len(self.source):
            raise UsageError(f"{len(self.found)} of {len(self.source)} images are broken, more than 1%: "
                             f"{self.source.name(min(self.found))} is one")
