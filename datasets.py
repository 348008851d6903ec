"""Images for pre-training and evaluation, and maps of their regions.

Contents: constants and normalisation; sources (the built-in scenes, torchvision's small sets, folders); items
and batches (crops, loaders, broken files); regions (instances, COCO, masks from a folder, computed ones);
dense truth (classes of pixels, objects); Felzenszwalb-Huttenlocher segments.

A *source* reads images as they are, one at a time. `Images` makes items of them, which are cropped and
flipped, still in uint8. `normalize` does the rest on the device, for a whole batch. All random numbers of an
item follow from (seed, epoch, index). So a run is the same for any number of workers and processes, and a
resumed run is the same as one that was never stopped.
"""

import cmath
import collections
import contextlib
import difflib
import errno
import hashlib
import heapq
import json
import math
import os
import pickle
import re
import sys
import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import mim

try:  # torchvision has announced that it will drop its decoders; Pillow then decodes JPEGs, too
    from torchvision.io import decode_image
except ImportError:
    decode_image = None

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's; all the papers normalise by them
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of 89 million pixels
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MIN_SIDE = 8  # pixels; an image with a shorter side counts as broken
SMALL = 96  # pixels; images of up to this size are evaluated as a whole, and have recipes of their own


class UsageError(ValueError):
    """A mistake of the user, explained in one line: which file or flag it is, what it was, what it may be."""


def did_you_mean(word, choices):
    """The end of an error message: it asks for the choice that resembles a wrong word, if there is one."""
    near = difflib.get_close_matches(str(word).lower(), choices, 1, 0.7)
    return f"; did you mean {near[0]}?" if near else ""


def check_folder(flag, path, choices):
    """Raises UsageError if there is no such folder. choices: the names that the flag may have instead."""
    if not os.path.isdir(path):
        raise UsageError(f"{flag} {path}: no such folder, and not one of {', '.join(choices)}"
                         f"{did_you_mean(path, choices)}")


@contextlib.contextmanager
def explained(what, problem):
    """A context manager that turns any exception into a UsageError: "WHAT: PROBLEM (the exception's
    message)". If a file is missing, the error names it instead."""
    try:
        yield
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"{what}: there is no {error.filename}") from None
    except Exception as error:  # decoders raise anything from OSError to SyntaxError
        if "DataLoader worker" in str(error):  # a worker was killed meanwhile; this is not the cause
            raise
        raise UsageError(f"{what}: {problem} ({reason_of(error)})") from None


def reason_of(error):
    """The message of an exception in one line, without what only programmers of Python and torch need."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__  # the cause, which torch.save hides
    if getattr(error, "errno", None) == errno.ENOSPC:
        return "the disk is full"
    words = getattr(error, "strerror", None) or str(error)
    if isinstance(error, KeyError):
        words = f"it has no {error}"
    if isinstance(error, MemoryError) or "alloc" in words:
        return "out of memory: use fewer or smaller images a step, or in training --accumulate"
    own = r"<\S+ object at \w+>|<urlopen error |\[(?:enforce fail|Errno) .*?\]|>$|Error\(s\) in loading .*?:"
    return " ".join(re.sub(own, "", words).split())[:200] or type(error).__name__


def counted(number, things):
    """1, "classes" -> "1 class"; 2, "classes" -> "2 classes"."""
    return f"{number} {re.sub('(?<=ss|ch)es$|s$', '', things) if number == 1 else things}"


UNFINISHED = []  # the files that `write_atomically` is writing


def write_atomically(path, write):
    """Calls write(file) for a new file, and then gives it the name `path`. So a file of this name is always
    whole. Makes the folder if it is missing. Raises UsageError if the file cannot be written."""
    temporary = Path(f"{path}.{os.urandom(4).hex()}.tmp")  # another process may write here too
    with explained(f"cannot write {path}", "what was there before is kept"):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        UNFINISHED.append(temporary)
        try:
            with open(temporary, "xb") as file:  # x: never an existing file
                write(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            UNFINISHED.remove(temporary)


def digest(data):
    """A short hash of bytes, by which others can be compared with them later."""
    return hashlib.sha256(data).hexdigest()[:12]


def seed_of(*keys):
    """Non-negative ints -> one seed of 64 bits, which depends on all of them and on their number."""
    return int(np.random.SeedSequence((len(keys), *keys)).generate_state(1, np.uint64)[0])


@cache
def statistics(device):
    """ImageNet's mean and standard deviation, [2, 3, 1, 1].

    They are copied to each device only once, because the CPU waits for the GPU at every copy.
    """
    return torch.tensor((MEAN, STD), device=device).view(2, 3, 1, 1)


def normalize(images):
    """uint8 [B, 3, H, W] -> float32 of ImageNet's mean 0 and standard deviation 1, on the images' device."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")
    mean, std = statistics(images.device)
    return (images / 255 - mean) / std


def denormalize(images):
    """The inverse of `normalize`, clipped to floats in [0, 1]: what a picture shows."""
    mean, std = statistics(images.device)
    return (images.float() * std + mean).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------
# Sources


class Source:
    """A set of images. Besides its length a source has:

    source[i] -> dict(image uint8 [3, H, W], label int); the built-in scenes also give instances and shapes
    name(i): the path of image i or, if it is no file, a name that looks like one; no two images share a name
    path(i): for a file its path below the folder of the images, else its name
    title: the first part of the names, if the images are no files
    classes: list of the classes' names
    image_size: the images' natural size in pixels
    description: one line
    in_memory: True if the images are few, small and of one size
    order: array with the place of each image in what is stored; --limit shortens it
    """

    in_memory = False

    def __len__(self):
        return len(self.order)

    def name(self, index):
        return f"{self.title}/{self.order[index]}"

    def path(self, index):
        return self.name(index)

    def digest(self):
        """The `digest` of the paths of all images, in their order."""
        return digest(os.fsencode("\n".join(self.path(i) for i in range(len(self)))))


# The built-in scenes: 3 or 4 objects, partly over one another, on a background that fades from one colour to
# another. The largest, near the centre, is the main object, and its class is the label. An object has the
# outline and the texture of its class. Its place, size, direction and colour say nothing about the class.


def norm(u, v):
    """The length of the vectors (u, v)."""
    return np.sqrt(u * u + v * v)


def wave(x):
    """A sine-like wave of period 1, made of exactly rounded operations: the same bits everywhere."""
    x = x - np.rint(x)
    return x * (8 - 16 * abs(x))


def star(u, v):
    """A pentagram; by symmetry half of its upper point, onto which the plane is folded, stands for all."""
    for side in (0.809, -0.809):
        fold = 2 * np.maximum(side * u + 0.588 * v, 0)
        u, v = u - side * fold, v - 0.588 * fold
    return 0.951 * abs(u) - 0.309 * v - 0.41


# The classes' outlines: how far the points (u, v) lie outside, roughly; inside it is negative. Lengths are in
# radii, v points down. As all are symmetric, u is its absolute value. Every shape has an area of about 2, and
# none reaches farther than 1.35 from its centre.
OUTLINES = {
    "disc": lambda u, v: norm(u, v) - 0.8,
    "square": lambda u, v: np.maximum(u, abs(v)) - 0.71,
    "triangle": lambda u, v: np.maximum(v, 0.866 * u - 0.5 * v) - 0.62,
    "star": star,
    "cross": lambda u, v: np.maximum(np.minimum(u, abs(v)) - 0.34, np.maximum(u, abs(v)) - 0.9),
    "ring": lambda u, v: abs(norm(u, v) - 0.63) - 0.255,
    "crescent": lambda u, v: np.maximum(norm(u, v - 0.15) - 1, 0.65 - norm(u, v - 0.7)),
    "heart": lambda u, v: norm(u, v - 0.25 + 0.75 * np.sqrt(u)) - 0.8,
    "diamond": lambda u, v: 0.6 * u + 0.8 * abs(v) - 0.7,
    "hourglass": lambda u, v: np.maximum(abs(v) - 0.95, 0.75 * u - 0.64 * abs(v) - 0.07),
}
# Their textures: how much lighter (1) or darker (-1) an object is at the points (u, v), in periods
TEXTURES = (
    lambda u, v: wave(norm(u, v)),  # disc: rings
    lambda u, v: 2 * wave(u / 2) * wave(v / 2),  # square: checks
    lambda u, v: wave(v + 1.5 * abs(u / 2 - np.rint(u / 2))),  # triangle: zigzag
    lambda u, v: wave(1.5 * u * v / (u * u + v * v + 0.001)),  # star: wedges
    lambda u, v: np.maximum(wave(u), wave(v)) - 0.5,  # cross: a grid
    lambda u, v: wave(u) + wave(v) - 0.7,  # ring: dots
    lambda u, v: wave(u),  # crescent: stripes
    lambda u, v: wave(u + 0.5 * wave(v / 2)),  # heart: waves
    lambda u, v: wave(u / 2),  # diamond: broad stripes
    lambda u, v: wave(2 * u),  # hourglass: narrow stripes
)
SHAPE_CLASSES = tuple(OUTLINES)


# Palettes of six colours, float32 [3, 6, 3, 1, 1] in 0..255: pale, medium and deep. The background's two are
# of one palette, the objects' of the two others, so that they stand out against it.
PALETTES = np.float32([*bytes.fromhex(
    "fbf1df fad7c1 bddcee bfe3cd dacaf1 f3c6d3"  # cream, peach, sky, mint, lilac, blush
    "e4826c e9b45c 7db398 5e9bc4 a187c4 df94ae"  # coral, honey, sage, blue, lavender, rose
    "24334f 2b6872 614a80 8b4259 456048 6b4a3a"  # navy, petrol, plum, wine, forest, brown
)]).reshape(3, 6, 3, 1, 1)


def render_scene(seed, size=64):
    """One scene, a pure function of (seed, size); another size shows the same scene. seed: 0 to 2^32 - 1

    Returns the image (uint8, [3, size, size]), the class of the main object (an index into SHAPE_CLASSES),
    the instance map (uint8, [size, size]) and the classes of the instances, a list: instance k is of class
    shapes[k - 1], and no two are of the same. The map marks visible pixels: 0 is background, 1 the main
    object, 2.. the others. From 32 pixels on no object is hidden entirely.
    """
    rng = np.random.RandomState(seed)  # which draws the same on every version of numpy

    def direction():
        """A place at distance 1 from the centre. To multiply by it is to turn by its angle."""
        return cmath.rect(1, rng.uniform(0, 2 * math.pi))

    # A place is a complex number, in sides of the image: from its centre to the right and, imaginary, down.
    side = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    places = side + 1j * side[:, None]
    ground, *others = rng.permutation(PALETTES)
    one, other = rng.permutation(ground)[:2]
    image = one + (other - one) * ((places * direction()).real + 0.5)
    colours = rng.permutation(np.concatenate(others))
    instances = np.zeros((size, size), np.uint8)

    shapes = rng.permutation(len(OUTLINES))[:rng.randint(3, 5)].tolist()
    centre, radius = complex(*rng.uniform(-0.1, 0.1, 2)), rng.uniform(0.36, 0.42)
    step = radius * direction()
    for k in rng.permutation(len(shapes)):
        points, scale = places - centre, radius
        if k > 0:  # The others lie around the main object.
            step *= cmath.rect(1, 2 * math.pi / (len(shapes) - 1))
            points -= step * rng.uniform(0.9, 1.05)
            scale *= rng.uniform(0.48, 0.58)
        points *= direction()
        u, v = points.real, points.imag
        distance = scale * OUTLINES[SHAPE_CLASSES[shapes[k]]](abs(u) / scale, v / scale)
        cover = (0.5 - size * distance).clip(0, 1)  # how much of each pixel the object covers
        texture = (2 * TEXTURES[shapes[k]](7 * u, 7 * v)).clip(-1, 1)
        image += cover * ((1 + 0.5 * texture) * colours[k] - image)
        instances[distance < 0] = k + 1
    return image.clip(0, 255).astype(np.uint8), shapes[0], instances, shapes


class Shapes(Source):
    """The built-in scenes as a source; see `render_scene`. The val split shares no scene with the others."""

    classes = list(SHAPE_CLASSES)

    def __init__(self, split="pretrain", image_size=64):
        self.order = np.arange(1024) + 10**9 if split == "val" else np.arange(4096)  # the scenes' seeds
        self.image_size, self.title = image_size, f"shapes-{image_size}"
        self.in_memory, self.kept = image_size <= 64, {}  # drawing one takes longer than cropping it
        self.description = (f"shapes: {len(self)} built-in scenes of {image_size}x{image_size}, "
                            f"{len(self.classes)} classes")

    def __getitem__(self, index):
        if index in self.kept:
            return self.kept[index]
        image, label, instances, shapes = render_scene(self.order[index], self.image_size)
        item = dict(image=torch.from_numpy(image), label=label, instances=torch.from_numpy(instances),
                    shapes=shapes)
        if self.in_memory:
            self.kept[index] = item
        return item


class Arrays(Source):
    """A torchvision dataset whose images are one array: CIFAR [N, 32, 32, 3], STL-10 [N, 3, 96, 96]."""

    in_memory = True

    def __init__(self, dataset, title):
        images = torch.from_numpy(dataset.data)
        self.images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
        self.labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
        self.order, self.classes = np.arange(len(images)), list(dataset.classes)
        self.title, self.image_size = f"{title}-{len(images)}", self.images.shape[-1]
        self.description = (f"{title}: {len(self)} images of {self.image_size}x{self.image_size}, "
                            f"{len(self.classes)} classes")

    def __getitem__(self, index):
        place = self.order[index]
        return dict(image=self.images[place].contiguous(), label=int(self.labels[place]))


class Files(Source):
    """Image files below a folder, with their labels.

    paths: relative to root. turn: True to apply the rotations in EXIF data.
    """

    def __init__(self, root, paths, labels=[], classes=[], description="", turn=True):
        if not paths:
            raise UsageError(f"no images in {root} (looked for {' '.join(EXTENSIONS)})")
        self.root, self.classes, self.description, self.turn = root, classes, description, turn
        # Processes share the memory of arrays; of a list, each worker would soon have a copy.
        self.paths = np.array([os.fsencode(p) for p in paths])
        self.labels = np.array(labels if len(labels) else [0] * len(paths))
        self.order = np.arange(len(paths))
        side = np.median([longer_side(self.name(i)) for i in np.linspace(0, len(paths) - 1, 9).astype(int)])
        self.image_size = int(side) if MIN_SIDE <= side <= SMALL else 224

    def __getitem__(self, index):
        return dict(image=decode(self.name(index), self.turn), label=int(self.labels[self.order[index]]))

    def path(self, index):
        return os.fsdecode(self.paths[self.order[index]])

    def name(self, index):
        return os.path.join(self.root, self.path(index))


def open_image(path):
    """Opens an image file with Pillow, which reads only the header. Pillow raises an error if the file is no
    image or has more than 178,956,970 pixels. Raises OSError for FIFOs and devices, which might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is not a regular file")
    return Image.open(path)


def longer_side(path):
    """The longer side of an image file in pixels, from its header, or 224 if the header cannot be read."""
    try:
        with open_image(path) as image:
            return max(image.size)
    except Exception:
        return 224


def to_bytes(pixels):
    """Grey pixels, uint16, int32 or float32 -> uint8.

    White is 65535 in uint16, and 1 in floats if none is larger. Otherwise it is the largest value, but at
    least 255. Pixels that are not finite numbers become black.
    """
    pixels = np.nan_to_num(pixels, posinf=0, neginf=0)
    kind, white = pixels.dtype.kind, max(pixels.max(), 255)
    if kind == "u":
        white = 65535
    elif kind == "f" and pixels.max() <= 1:
        white = 1
    return (pixels.clip(0, white) * (255 / white)).round().astype(np.uint8)


def decode(path, turn=True):
    """Reads an image file of any kind -> uint8 RGB [3, H, W]. turn: True to apply the rotation in EXIF data.

    torchvision decodes JPEGs, and Pillow all other files, because torchvision's PNG decoder can crash the
    whole process on a damaged file. Raises what these raise if the file cannot be decoded, and what
    `open_image` does.
    """
    with open_image(path) as image:
        if image.format in ("JPEG", "MPO") and decode_image:
            data = torch.from_numpy(np.fromfile(path, np.uint8))
            return decode_image(data, "RGB", apply_exif_orientation=turn)
        kind = image.format
        if turn:
            with contextlib.suppress(Exception):  # broken EXIF data, which decode_image ignores
                image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # more than 8 bits a pixel, which convert("RGB") would clip
            pixels = np.asarray(image)
            if kind == "PNG":  # these have 16 bits, which older Pillow widens
                pixels = pixels.astype(np.uint16)
            image = Image.fromarray(to_bytes(pixels))
        return TF.pil_to_tensor(image.convert("RGB"))


def find_files(folder, extensions=EXTENSIONS):
    """Finds the regular files with these extensions below a folder, at any depth -> sorted relative paths.

    Links are followed, but no folder is visited twice, and none that contains `folder` itself. Hidden files
    and folders, whose names begin with a dot, are left out, and the folders of train.py's runs, which hold
    pictures. Raises UsageError if a folder cannot be read.
    """
    visited, found, folders = {*Path(folder).resolve().parents}, [], [(False, "")]
    while folders:
        _, below = heapq.heappop(folders)  # links come last: of two paths the one without links counts
        real = Path(folder, below).resolve()
        if real in visited:
            continue
        visited.add(real)
        with explained("data", f"{real} cannot be read"):
            entries = [*os.scandir(real)]
            if below and {"checkpoint.pt", "encoder.pt"} & {entry.name for entry in entries}:
                continue
            for entry in entries:
                path = os.path.join(below, entry.name)
                if entry.name.startswith("."):
                    continue
                with contextlib.suppress(OSError):  # a link to itself
                    if entry.is_dir():
                        heapq.heappush(folders, (entry.is_symlink(), path))
                    elif path.lower().endswith(extensions) and entry.is_file():
                        found.append(path)
    return sorted(found)


def find_labelled(folder):
    """Finds the images below a folder -> their relative paths, and the names of their classes.

    The class is the first folder of the path. In the val folder of Tiny ImageNet a list has the classes.
    """
    annotations = Path(folder, "val_annotations.txt")
    if annotations.is_file() and Path(folder, "images").is_dir():
        with explained("--data", f"{annotations} has no line of file name, class and box for each image"):
            rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
            return [f"images/{row[0]}" for row in rows], [row[1] for row in rows]
    paths = find_files(folder)
    return paths, [path.split(os.sep)[0] for path in paths]


def check_labelled(root, folder, paths):
    """Raises UsageError if an image, of the paths below the folder, has no class."""
    if any(os.sep not in path for path in paths):
        raise UsageError(f"--data {root}: images lie directly in {folder}, which must have a folder per "
                         "class")


def load_folder(root, split):
    """Opens a folder of one of these layouts -> Files. The split "pretrain" is all that may be trained on.

    - COCO's own: train2017/, val2017/ and annotations/; without labels;
    - images with masks, see `mask_layout`; without labels;
    - train/ and val/ with a folder per class (ImageNet; Tiny ImageNet with its val_annotations.txt);
    - a folder per class, at least two; every tenth image of a class belongs to the val split;
    - plain images at any depth; without labels, and with one split.
    """
    check_folder("--data", root, NAMED)
    only_val = coco_folder(root, split) and any(Path(root, "annotations").glob("*_val*.json"))
    if coco_folder(root, "train") or only_val:
        return load_coco(root, split)
    masked = mask_layout(root, "val" if split == "val" else "train")
    if masked is None and mask_layout(root, "train"):
        raise UsageError(f"--data {root}: it has images with masks, but none for the {split} split")
    if masked:
        folder = os.path.join(root, masked[0])
        paths = find_files(folder)
        return Files(folder, paths, description=f"{folder}: {counted(len(paths), 'images')}, no labels")
    folder, layout, train = root, "a folder per class", os.path.join(root, "train")
    if os.path.isdir(train):
        folder, layout = train, "train/ and val/ with a folder per class"
    paths, names = find_labelled(folder)
    if folder == train and split != "pretrain":
        check_labelled(root, folder, paths)
    elif any(os.sep not in path for path in paths) or folder == root and len(set(names)) < 2:
        names, layout = [], "plain images, no labels"
    classes = sorted(set(names))
    if folder == train and split == "val":
        folder = os.path.join(root, "val")
        paths, names = find_labelled(folder)
        check_labelled(root, folder, paths)
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise UsageError(f"{folder} has the class {unknown[0]!r}, which {train} does not have")
    labels = np.searchsorted(classes, names)
    if layout == "a folder per class" and split != "pretrain":
        order = np.argsort(labels, kind="stable")
        _, first = np.unique(labels[order], return_index=True)
        place = np.empty_like(order)
        place[order] = np.arange(len(labels)) - first[labels[order]]  # an image's number within its class
        kept = np.flatnonzero((place % 10 == 9) == (split == "val"))
        paths, labels = [paths[i] for i in kept], labels[kept]
    if not paths:
        raise UsageError(f"--data {root}: no images in {folder} for the {split} split "
                         f"(looked for {' '.join(EXTENSIONS)})")
    description = f"{root}: {layout}, {counted(len(paths), 'images')}, {counted(len(classes), 'classes')}"
    if classes:  # in an album by year they are years; pre-training ignores them
        description += f" ({', '.join(classes[:3])}{', ...' * (len(classes) > 3)})"
    return Files(folder, paths, labels, classes, description)


NAMED = {"shapes": 64, "cifar10": 32, "cifar100": 32, "stl10": 96}  # the images' sizes in pixels


def load_named(name, split, root):
    """Opens torchvision's CIFAR-10, CIFAR-100 or STL-10, which is downloaded to `root` if it is not there."""
    cls = getattr(torchvision.datasets, name.upper())
    options = dict(train=split != "val")
    if name == "stl10":
        options = dict(split={"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split])
    with explained(f"--data {name}",
                   f"could not download it into {root}/ or read it there; put its archive {cls.filename} "
                   f"into {root}/, or give --data a folder with a folder of images per class"):
        return Arrays(cls(root, download=True, **options), name)


def load_data(data: str = "shapes", split="pretrain", image_size=None, limit: int | None = None, root="data"):
    """Opens the images that --data names -> a source.

    data: the images: shapes (built-in scenes), cifar10, cifar100, stl10 (downloaded), or a folder: train/ and
        val/ with a folder per class, a folder per class, COCO's layout, images with masks, or plain images
    limit: use only so many of the images (where a task has training images, of those), evenly spread over
        all and so over the classes; default: all

    split: "pretrain" (labels are not used), "train" or "val". image_size: that of the scenes, an int or
    (height, width). root: the folder of torchvision's data sets. Raises UsageError if there are no such data,
    or no images.
    """
    sides = np.ravel(image_size or 64).tolist()
    if min(sides) < MIN_SIDE:
        raise UsageError(f"--image-size must be at least {MIN_SIDE} pixels, got {min(sides)}")
    if data == "shapes":
        source = Shapes(split, max(sides))
    else:
        source = load_named(data, split, root) if data in NAMED else load_folder(data, split)
    return shorten(source, limit)


def shorten(source, limit):
    """Shortens a source to `limit` of its images, evenly spread. None: to all of them."""
    if limit is None or limit >= len(source):
        return source
    if limit < 1:
        raise UsageError(f"--limit must be positive, got {limit}")
    source.order = source.order[np.linspace(0, len(source), limit, endpoint=False).astype(int)]
    source.description += f", {limit} of them"
    return source


# ---------------------------------------------------------------------------------------------------------
# Items and batches


def resized_crop(image, box, size):
    """Cuts the box (top, left, height, width) out of an image, uint8 [3, H, W], and resizes it to `size`."""
    # torchvision's uint8 kernel is fast on contiguous pixels, and slow on a slice of a larger image.
    box = TF.crop(image, *box)[None].contiguous(memory_format=torch.channels_last)
    return TF.resize(box, size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)[0]


def crop_boxes(images, box, flip, size, mode="bicubic"):
    """Cuts a box out of each image of a batch, floats [B, C, H, W], and resizes them on their device: [B, C,
    *size].

    box: [B, 4] (x1, y1, x2, y2) as fractions of the image. flip: [B] bool, True where the crop is mirrored.
    """
    # grid_sample does not antialias. So an image that is larger than `size` is sampled more finely, and
    # averaged.
    times = math.ceil(max(1, images.shape[2] / size[0], images.shape[3] / size[1]))

    def places(count, first, last):  # of the centres of the pixels; the image's go from -1 to 1
        steps = (torch.arange(count, device=box.device) + 0.5) / count
        return 2 * torch.lerp(first[:, None], last[:, None], steps) - 1

    x1, y1, x2, y2 = box.unbind(1)
    x1, x2 = torch.where(flip, x2, x1), torch.where(flip, x1, x2)
    x, y = places(times * size[1], x1, x2), places(times * size[0], y1, y2)
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), dim=3)
    out = F.grid_sample(images, grid, mode, padding_mode="border", align_corners=False)
    return F.avg_pool2d(out, times)


def random_boxes(count, scale, generator):
    """Draws the boxes of RandomResizedCrop for `count` square images: [count, 4] (x1, y1, x2, y2) as
    fractions.

    As in torchvision, area and width / height are drawn ten times, and the first box that fits into the image
    is taken, or the whole image if none fits. Unlike in torchvision, a box need not lie on whole pixels.
    """
    area = torch.empty(count, 10).uniform_(*scale, generator=generator)
    widest = math.log(4 / 3)
    aspect = torch.empty(count, 10).uniform_(-widest, widest, generator=generator).exp()
    sides = torch.stack([area * aspect, area / aspect], dim=2).sqrt()  # width and height: [count, 10, 2]
    fits = (sides <= 1).all(2)
    sides = sides[torch.arange(count), fits.int().argmax(1)]
    sides[~fits.any(1)] = 1.0
    corner = torch.rand(count, 2, generator=generator) * (1 - sides)
    return torch.cat([corner, corner + sides], dim=1)


@dataclass
class Images(Dataset):
    """Items of a source: dict(image uint8 [3, h, w], label, index, box [4], flip, broken, perhaps regions).

    view: "crop" is a random resized crop (for training); "whole" is the full image, resized; "center" is the
        largest centred crop, or 7/8 of its sides for images of 97 to 224 pixels, as the papers evaluate.
    crop_scale: smallest and largest area of the random crop, as fractions of the image.
    flip: True to mirror random crops with a probability of one half.
    augment: a transforms.v2 transform of the cropped uint8 image, such as RandAugment.
    regions: gives the maps of the images' regions (`open_regions`). Items then have `regions`, cropped and
        flipped exactly as the image: label maps [L, h, w] uint8, in which 0 is no region, or floats (CAM).

    box: the crop (x1, y1, x2, y2) as fractions of the whole image. The key of an item is an index or (epoch,
    index): the random crop changes with the epoch. If a file cannot be decoded, the next readable image takes
    its place. The item's `index` is then that of this image, and `broken` that of the unreadable one (else
    -1).
    """

    source: object
    image_size: object
    view: str = "crop"
    crop_scale: tuple = (0.2, 1.0)
    flip: bool = True
    seed: int = 0
    augment: object = None
    regions: object = None

    def __post_init__(self):
        self.size = list(mim.pair(self.image_size))

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):  # by which a loop over the images ends
            raise IndexError(f"there are {len(self)} images, and none at {index}")
        item, index, broken = self.read(index)
        H, W = item["image"].shape[-2:]
        state = torch.get_rng_state()  # torchvision draws from the global generator, as its users may
        torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
        top, left, height, width = crop = self.choose_crop(H, W)
        flip = self.flip and self.view == "crop" and bool(torch.rand(()) < 0.5)
        image = resized_crop(item["image"], crop, self.size)
        image = image.flip(-1) if flip else image
        image = self.augment(image) if self.augment else image
        torch.set_rng_state(state)
        box = torch.tensor([left / W, top / H, (left + width) / W, (top + height) / H])
        out = dict(image=image, label=item["label"], index=index, box=box, flip=flip, broken=broken)
        if self.regions is not None:
            out["regions"] = crop_regions(self.regions.read(index, item), box, flip, self.size)
        return out

    def read(self, index):
        """Returns (item, index, broken): the source's item at `index`, or the next one that is readable."""
        for place in range(index, index + min(100, len(self))):
            place %= len(self)
            try:
                item = self.source[place]
                if min(item["image"].shape[1:]) >= MIN_SIDE:
                    return item, place, -1 if place == index else index
                reason = f"a side has fewer than {MIN_SIDE} pixels"
            except Exception as error:  # decoders raise anything from OSError to SyntaxError
                reason = reason_of(error)
        name = getattr(self.source, "name", str)(index)
        raise UsageError(f"{name} and the images after it are broken; the last one tried: {reason}")

    def choose_crop(self, H, W):
        """The crop (top, left, height, width) of an image of H x W pixels.

        For evaluation, MAE's code resizes the whole image and then cuts out the centre. Here the centre is
        cut out first, on whole pixels of the original, and so it can be half a pixel off.
        """
        if self.view == "whole":
            return 0, 0, H, W
        if self.view == "crop":
            return v2.RandomResizedCrop.get_params(torch.empty(0, H, W), self.crop_scale, (3 / 4, 4 / 3))
        share = 224 / 256 if SMALL < max(self.size) <= 224 else 1.0
        scale = share * min(H / self.size[0], W / self.size[1])
        height, width = (max(1, round(scale * side)) for side in self.size)
        return (H - height) // 2, (W - width) // 2, height, width


@dataclass
class EpochBatches:
    """A batch sampler of keys (epoch, index). Each epoch has its own order, and no incomplete batch.

    The batch of a step is cut into `accumulate` equal micro-batches, and the processes take them in turn. So
    two processes see what one process sees that accumulates two micro-batches. Set `.epoch` before each
    epoch.
    """

    num_images: int
    batch_size: int
    accumulate: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    epoch: int = 0

    def __iter__(self):
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        steps = self.num_images // self.batch_size
        micro_batches = order[: steps * self.batch_size].view(steps, self.accumulate, -1)
        for micro_batch in micro_batches[:, self.rank :: self.world_size].flatten(0, 1).tolist():
            yield [(self.epoch, index) for index in micro_batch]


def collate(items):
    """Joins items to a batch. If an image has fewer layers of regions than another, empty layers are
    added."""
    batch = default_collate([{k: item[k] for k in item if k != "regions"} for item in items])
    if "regions" in items[0]:
        batch["regions"] = pad_sequence([item["regions"] for item in items], batch_first=True)
    return batch


def make_loader(dataset, workers=0, device=None, collate_fn=collate, **options):
    """Makes a DataLoader for `Images`. options: batch_sampler=... or batch_size=...

    The workers live as long as the loader. On Linux they are forked, also by Python 3.14, so that they share
    the memory of the dataset. For a CUDA device the memory is pinned, so that copies with non_blocking=True
    run while the GPU computes.
    """
    start = "fork" if workers and sys.platform == "linux" else None
    pin_memory = str(device).startswith("cuda")
    return DataLoader(dataset, num_workers=workers, persistent_workers=workers > 0, pin_memory=pin_memory,
                      collate_fn=collate_fn, multiprocessing_context=start, **options)


class DeviceLoader:
    """The batches of random crops of an `Images`, made on the device, for sources that are in memory.

    All images lie on the device. The boxes and flips of all images are drawn at the beginning of an epoch,
    from (seed, epoch), so that every process draws the same. They are not the crops of `Images`. Batches have
    no labels.
    """

    def __init__(self, dataset, batches, device):
        self.dataset, self.batches, self.device = dataset, batches, device
        self.images = torch.stack([item["image"] for item in dataset.source]).to(device)

    def __iter__(self):
        dataset = self.dataset
        generator = torch.Generator().manual_seed(seed_of(dataset.seed, self.batches.epoch, 0))
        boxes = random_boxes(len(dataset), dataset.crop_scale, generator).to(self.device)
        flips = (torch.rand(len(dataset), generator=generator) < 0.5 * dataset.flip).to(self.device)
        # All at once, because the CPU waits for the GPU at every such copy.
        indices = torch.tensor([[i for _, i in keys] for keys in self.batches], device=self.device)
        for index in indices:
            box, flip = boxes[index], flips[index]
            image = crop_boxes(self.images[index].float(), box, flip, dataset.size).round().clamp(0, 255)
            yield dict(image=image.byte(), index=index, box=box, flip=flip, broken=torch.empty(0))


def name_broken(loader, source, known):
    """Yields the batches of a loader. Prints the name of each broken file that is not yet in the set `known`,
    and adds it to the set."""
    for batch in loader:
        for index in set(batch["broken"].tolist()) - known - {-1}:
            known.add(index)
            tqdm.write(f"broken image, another takes its place: {source.name(index)}")
        yield batch


# ---------------------------------------------------------------------------------------------------------
# Regions. regions.read(i, item) -> maps [L, h, w] of image i, at any resolution; item is source[i]. Integers
# are labels: 0 is no region, and regions of different layers may overlap. Booleans are L single regions.
# Floats are responses of at most 1.


def pack_masks(masks):
    """Binary masks, bool [M, H, W] -> label maps [L, H, W] of at most 8 layers, inside which no masks
    overlap.

    The largest masks are placed first. Those that fit into none of the layers are left out.
    """
    packed = np.zeros((8, *masks.shape[1:]), np.int64)
    order = np.argsort(-masks.sum((1, 2)), kind="stable")
    for number, mask in enumerate(masks[order], start=1):
        for layer in packed:
            if not layer[mask].any():
                layer[mask] = number
                break
    return packed[:max(1, packed.any((1, 2)).sum())]


def renumber(maps):
    """Label maps [L, H, W] or binary masks -> uint8 label maps, in which 1 is the largest region of a layer.

    If a layer has more than 255 regions, the smallest become 0.
    """
    layers = pack_masks(maps.numpy()) if maps.dtype == torch.bool else maps.numpy()
    out = np.zeros(layers.shape, np.uint8)
    for layer, into in zip(layers, out):
        areas = np.bincount(layer.ravel())
        order = 1 + np.argsort(-areas[1:], kind="stable")[:255]  # 0, no region, gets no number
        number = np.zeros(len(areas), np.uint8)
        number[order] = np.arange(1, len(order) + 1)
        into[:] = number[layer]
    return torch.from_numpy(out)


def crop_regions(maps, box, flip, size):
    """Cuts out and mirrors the maps of `regions.read` as the image -> labels, uint8, or floats, [L,
    *size]."""
    if maps.is_floating_point():
        return crop_boxes(maps[None], box[None], torch.tensor([flip]), size, "bilinear")[0]

    def places(side, first, last, count):  # of the centres of the pixels; v2's `nearest` is half a pixel off
        return (side * (first + (last - first) * (torch.arange(count) + 0.5) / count)).long()

    x1, y1, x2, y2 = box
    rows, columns = places(maps.shape[1], y1, y2, size[0]), places(maps.shape[2], x1, x2, size[1])
    maps = maps[:, rows[:, None], columns]
    return renumber(maps.flip(-1) if flip else maps)


def check_shape(name, image, shape, exact=False):
    """Raises UsageError if maps of shape (h, w) do not have the proportions of their image (exact: its
    size)."""
    (H, W), (h, w) = image.shape[1:], shape
    if (h, w) != (H, W) if exact else abs(h * W - w * H) > max(H, W, h, w):
        raise UsageError(f"{name} has {W}x{H} pixels, its annotations have {w}x{h}")


class SceneInstances:
    """The instances of the built-in scenes."""

    def read(self, index, item):
        return item["instances"][None]


# COCO (Lin et al. 2014, https://cocodataset.org/#format-data), panoptic segments (Kirillov et al. 2019)


def coco_folder(root, split):
    """The newest image folder of a split, such as root/train2017; None if root is not in COCO's layout.

    There are annotations that have its name or, if there are for none, images in it.
    """
    annotations = Path(root, "annotations")
    folders = [*Path(root).glob("val*" if split == "val" else "train*")] if annotations.is_dir() else []
    annotated = [folder for folder in folders if any(annotations.glob(f"*_{folder.name}.json"))]
    return max(annotated or [folder for folder in folders if any(
        path.suffix.lower() in EXTENSIONS for path in folder.glob("*"))], default=None)


def load_coco(root, split, lvis=False):
    """A COCO root -> Files without labels, in the order of the names; UsageError if the split has no images.

    Its annotations are of the pixels as they are stored, so EXIF rotations are not applied. lvis: all images
    that there are, because LVIS divides them otherwise.
    """
    folder = Path(root) if lvis else coco_folder(root, split)
    if folder is None:
        raise UsageError(f"--data {root}: there is no folder val*")
    paths = find_files(folder)
    description = f"{root}: COCO {folder.name}, {counted(len(paths), 'images')}"
    return Files(folder, paths, description=description, turn=False)


def fill_polygon(points, height, width):
    """[x1, y1, x2, y2, ...] -> bool [height, width]: the inside by the even-odd rule, as COCO's own tools see
    it.

    They trace the edges in steps of a fifth of a pixel. So slanting edges differ by some pixels from those
    whose centre is inside, and Pillow's polygon has the outline, too: half a pixel all around.
    """
    start = (5 * np.reshape(points, (-1, 2)) + 0.5).astype(int)  # in fifths of a pixel
    end = np.roll(start, -1, axis=0)
    steps = abs(end - start)
    length, along = steps.max(1), np.argmax(steps, axis=1)[:, None]  # the longer axis, which has no gaps
    back = np.take_along_axis(end < start, along, axis=1)
    first, last = np.where(back, end, start), np.where(back, start, end)  # rounding depends on the direction
    edge = np.repeat(np.arange(len(start)), length + 1)
    step = np.arange(len(edge)) - np.searchsorted(edge, edge)
    step = np.where(back[edge, 0], length[edge] - step, step)[:, None]
    slope = (last - first) / np.maximum(length, 1)[:, None]
    traced = (first[edge] + slope[edge] * step + 0.5).astype(int)
    # Below the places where the trace crosses the centre of a column, inside and outside change.
    x, y = np.minimum(traced[1:], traced[:-1]).T
    crosses = (traced[1:, 0] != traced[:-1, 0]) & (x % 5 == 2) & (x >= 0) & (x < 5 * width)
    columns, rows = x[crosses] // 5, (-((2 - y[crosses]) // 5)).clip(0, height)
    changes = np.zeros((height + 1, width), np.uint8)  # an overflow keeps odd numbers odd and even ones even
    np.add.at(changes, (rows, columns), 1)
    return changes[:height].cumsum(0, dtype=np.uint8) % 2 == 1


def rle_counts(text):
    """COCO's compressed run lengths -> list of ints.

    A character is 5 bits of a number, the lowest first. Its bit 5 says that more follow; bit 4 of the last
    one is the sign. From the fourth number on they are differences to the number two before.
    """
    counts, value, shift = [], 0, 0
    for code in text.encode():
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16 > 0) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def coco_mask(segmentation, height, width):
    """A COCO segmentation, a list of polygons or run lengths down the columns -> bool [height, width]."""
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), bool)
        for part in segmentation:
            mask |= fill_polygon(part, height, width)
        return mask
    counts = segmentation["counts"]
    if segmentation.get("size", [height, width]) != [height, width]:
        raise ValueError(f"a mask's size is {segmentation['size']}, the image's {[height, width]}")
    counts = rle_counts(counts) if isinstance(counts, str) else counts
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def encode_mask(mask):
    """A mask bool [height, width] -> COCO's segmentation by compressed run lengths, which `coco_mask`
    reads."""
    starts = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
    counts = np.diff([0, *starts, mask.size]).tolist()
    text = ""
    for i, count in enumerate(counts):
        value = count - (counts[i - 2] if i > 2 else 0)
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != -(bits >> 4)  # what is left is not the sign alone
            text += chr(48 + bits + 32 * more)
    return dict(size=list(mask.shape), counts=text)


def read_ids(path):
    """A label PNG -> int32 [H, W]: a palette's indices, or of colours red + 256 green + 65536 blue."""
    with open_image(path) as image:
        if len(image.getbands()) < 3:  # perhaps with a transparency
            return np.asarray(image if len(image.getbands()) == 1 else image.getchannel(0), np.int32)
        rgba = np.asarray(image.convert("RGBA"))
    return rgba.view("<i4")[..., 0] & 0xFFFFFF  # a pixel's four bytes as one number, without the last


def in_entries(source, entries, where):
    """Which of a source's images, by their paths, are in a dict of annotations: list of bools; UsageError if
    none is."""
    known = [source.path(i) in entries for i in range(len(source))]
    if not any(known):
        raise UsageError(f"{where}: nothing in it has the name of an image, such as {source.path(0)}")
    return known


class CocoRegions:
    """The annotations of a COCO root's split, and the region maps made of them.

    kind: "instances", "panoptic" (things and stuff) or "lvis_v1"; with it the JSON file's name begins. The
        file's entry of an image is that whose file_name (in LVIS: coco_url) is the image's path, relative to
        the source's folder or to the one above.

    `categories` are the file's own, ids -> names. Raises UsageError if the annotations are not there or
    cannot be understood.
    """

    def __init__(self, source, root, split, kind):
        self.source, self.kind, found = source, kind, collections.defaultdict(list)
        name = split if kind == "lvis_v1" else coco_folder(root, split).name
        self.pngs = Path(root, "annotations", f"{kind}_{name}")
        self.file = f"{self.pngs}.json"
        with explained(f"--data {root}", f"{self.file} is not a file of COCO annotations"):
            data = json.loads(Path(self.file).read_bytes())
            if kind == "panoptic":
                self.pngs.stat()  # they come in a zip of their own, which is easily left packed
            for annotation in data["annotations"]:
                found[annotation["image_id"]].append(annotation)
                mask = annotation.get("segmentation") or [0]
                if kind != "panoptic" and isinstance(mask, list) and max(map(np.size, mask)) < 6:
                    raise UsageError(f"{self.file}: an object of image {annotation['image_id']} has no mask, "
                                     "which is needed beside its box")
            self.listed = sorted(data.get("categories", []), key=lambda category: category["id"])
            names = [str(category["name"]) for category in self.listed]
            self.categories = {c["id"]: name if names.count(name) == 1 else f"{name} ({c['id']})"
                               for c, name in zip(self.listed, names)}
            self.used = collections.Counter(part.get("category_id") for a in data["annotations"]
                                            for part in a.get("segments_info", [a]))
            paths = [image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:])
                     for image in data["images"]]
            folder = f"{Path(source.root).name}/"
            paths = [path.removeprefix(folder) for path in paths]
            ids = [image["id"] for image in data["images"]]
            for what, keys in (("", paths), ("the category ", [category["id"] for category in self.listed]),
                               ("the image ", ids)):
                for key, times in collections.Counter(keys).items():
                    if times > 1:
                        raise UsageError(f"{self.file}: {what}{key} is listed {times} times")
            if found and not found.keys() & set(ids):
                raise UsageError(f"{self.file}: no annotation's image_id is the id of an image")
            kept = [pickle.dumps((image, found[image["id"]])) for image in data["images"]]
            ends = np.cumsum([len(k) for k in kept]).tolist()
        # One string of bytes: processes share its memory; of a list, each worker would soon have a copy.
        self.kept, self.spans = b"".join(kept), dict(zip(paths, zip([0] + ends, ends)))
        self.known = in_entries(source, self.spans, self.file)

    def annotations(self, index):
        """(COCO's dict of an image, its annotations); ({}, []) if the JSON file does not list the image.

        Instances are dicts with category_id, segmentation (see `coco_mask`) and perhaps bbox, area, iscrowd.
        Panoptic ones have file_name, whose `read_ids` are the segments' ids, and segments_info with id and
        category_id.
        """
        span = self.spans.get(self.source.path(index))
        return pickle.loads(self.kept[slice(*span)]) if span else ({}, [])

    def objects(self, index, item):
        """An image's instances or panoptic segments: a list of (COCO's dict, mask bool [H, W]).

        Raises UsageError if they are broken or of another image size, or if the PNG is missing.
        """
        name, found = self.source.name(index), []
        image, annotations = self.annotations(index)
        height, width = item["image"].shape[1:]
        height, width = image.get("height", height), image.get("width", width)
        if self.kind != "panoptic":
            check_shape(name, item["image"], (height, width), exact=True)
        with explained(self.file, f"broken annotations of {name}"):
            for annotation in annotations:
                if self.kind == "panoptic":
                    ids = read_ids(self.pngs / annotation["file_name"])
                    check_shape(name, item["image"], ids.shape, exact=True)
                    found += [(segment, ids == segment["id"]) for segment in annotation["segments_info"]]
                else:
                    found.append((annotation, coco_mask(annotation["segmentation"], height, width)))
        return found

    def read(self, index, item):
        """Label map [1, H, W]: smaller instances lie on top of larger ones; crowds of them are left out."""
        labels = np.zeros(item["image"].shape[1:], np.int32)
        masks = [mask for annotation, mask in self.objects(index, item)
                 if self.kind == "panoptic" or not annotation.get("iscrowd")]
        for number, mask in enumerate(sorted(masks, key=np.count_nonzero, reverse=True), start=1):
            labels[mask] = number
        return torch.from_numpy(labels)[None]


def find_masks(source, folder, extensions=(".png",)):
    """A dict of the images' paths -> the files in a folder that belong to them.

    A mask has the file name of its image. It lies in the same subfolder as the image or, if no other image
    has this name, in the folder itself. Images that differ in their extensions alone have none.
    """
    by_stem, by_name, found = collections.defaultdict(list), collections.defaultdict(list), {}
    for path in map(source.path, range(len(source))):
        stem, _ = os.path.splitext(path)
        by_stem[stem].append(path)
        by_name[os.path.basename(stem)].append(path)
    for path in find_files(folder, extensions):
        stem, _ = os.path.splitext(path)
        owners = by_stem[stem] or by_name[stem]
        if len(owners) == 1:
            found[owners[0]] = os.path.join(folder, path)
    return found


class MaskFolder:
    """A user's masks: label PNGs, or .npz files with one stack of binary masks [M, H, W] (SAM's, say).

    `find_masks` says which belongs to which image. An image without a mask has no regions.
    """

    def __init__(self, source, folder):
        check_folder("--regions", folder, REGIONS)
        inside = os.path.relpath(os.path.realpath(folder), os.path.realpath(getattr(source, "root", folder)))
        if any(source.path(i).startswith(inside + os.sep) for i in range(len(source))):
            raise UsageError(f"--regions {folder} is among the images of --data, and its masks would be "
                             "images: give a folder of images alone")
        self.source, self.files = source, find_masks(source, folder, (".png", ".npz"))
        if inside == "." and hasattr(source, "root") and any(p.endswith(".png") for p in self.files.values()):
            raise UsageError(f"--regions {folder} is the folder of --data, and its PNG files are images")
        self.known = in_entries(source, self.files, f"--regions {folder} (PNG and npz files)")

    def read(self, index, item):
        path = self.files.get(self.source.path(index))
        if path is None:
            return torch.zeros(1, *item["image"].shape[1:], dtype=torch.int32)
        must = "binary masks [M, H, W]" if path.endswith(".npz") else "labels, one for each pixel"
        with explained("--regions", f"{path} must hold {must}"):
            if path.endswith(".npz"):
                with np.load(path) as file:
                    values = file[file.files[0]]
                maps = values != 0
                if values.dtype.kind in "iu" and any(len(np.unique(v[m])) > 1 for v, m in zip(values, maps)):
                    raise ValueError("a mask in it has several values")
            else:
                maps = read_ids(path)[None]
                if maps.max() >= 2**16:  # colours become small numbers; black stays 0
                    maps = np.unique(np.append(0, maps), return_inverse=True)[1][1:].reshape(maps.shape)
            _, height, width = maps.shape
        check_shape(self.source.name(index), item["image"], (height, width))
        return torch.from_numpy(maps)


@dataclass
class ComputedRegions(Dataset):
    """FH segments or class activation maps, which `fill` computes before training, one file per image.

    A file is written as a whole or not at all, so that an interrupted `fill` goes on where it stopped. Its
    name has the size and the modification time of the image, so that maps of a replaced image are never used.
    """

    source: object
    folder: str  # its name has the settings, so that maps of other settings are never used
    scales: list | None = None  # of FH; None for class activation maps
    open_classifier: object = None  # called if maps are missing; returns the function of `open_cam`

    @property
    def title(self):
        return os.path.basename(self.folder)

    def path(self, index):
        name = self.source.name(index)
        if os.path.isfile(name):  # not of the scenes and of other sources in memory
            status = os.stat(name)
            name = f"{os.path.abspath(name)}-{status.st_size}-{status.st_mtime_ns}"
            name += "" if getattr(self.source, "turn", True) else "-stored"
        return os.path.join(self.folder, name.lstrip(os.sep) + ".npz")

    def fill(self, workers=0, rank=0, world_size=1):
        """Computes the missing maps of this process's share of the images."""
        missing = [i for i in range(rank, len(self.source), world_size) if not os.path.exists(self.path(i))]
        if not missing:
            return
        classify = self.open_classifier and self.open_classifier()
        loader = make_loader(Subset(self, missing), workers, batch_size=8)
        for batch in tqdm(loader, f"regions ({self.title})", disable=rank > 0 or None):
            if classify:
                for index, maps in zip(batch["index"].tolist(), classify(batch)):
                    self.save(index, maps)

    def __getitem__(self, index):
        """What a worker does for `fill`: it computes FH segments, or reads an image for the classifier."""
        images = Images(self.source, 224, "whole")
        if self.scales is None:
            return images[index]
        item, index, _ = images.read(index)  # of a broken file: the image that will take its place
        self.save(index, fh_maps(item["image"], self.scales))
        return dict(index=index)

    def save(self, index, maps):
        write_atomically(self.path(index), lambda to: np.savez_compressed(to, maps))

    def read(self, index, item):
        path = self.path(index)
        if self.scales and not os.path.exists(path):
            return torch.from_numpy(fh_maps(item["image"], self.scales))
        with explained("--regions", f"{path} is broken: delete it, it will be computed anew"):
            with np.load(path) as file:
                maps = torch.from_numpy(file["arr_0"])
        return maps if self.scales else maps / 255


def fh_maps(image, scales):
    """Computes FH segments of an image, uint8 [3, H, W] -> int32 [scales, h, w], numbered from 1.

    An image with a side of more than 640 pixels, COCO's largest, is made smaller first: the scales are for
    such images, and the time grows with the pixels.
    """
    share = min(1, 640 / max(image.shape[1:]))
    sides = [max(1, round(share * side)) for side in image.shape[1:]]
    return felzenszwalb(TF.resize(image, sides, antialias=True).numpy(), scales) + 1


def resnet50(weights=None):
    """torchvision's ResNet-50 for ImageNet, with weights from a file or downloaded. Raises UsageError if that
    fails."""
    with explained(f"--cam-weights {weights or 'is not given, so there was a download'}",
                   "the weights of torchvision's ResNet-50 could not be loaded"):
        network = torchvision.models.resnet50(weights=None if weights else "IMAGENET1K_V1")
        if weights:  # which may count the batches of their norms, or not
            counts = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
            network.load_state_dict(counts | mim.read_checkpoint(weights))
    return network


def open_cam(weights, labelled, device):
    """Returns a function from a batch of items to class activation maps, uint8 [B, 1, h, w], at the
    resolution of the ResNet-50. labelled: the maps are of the images' labels instead of the predicted
    classes."""
    network = resnet50(weights).to(device).eval()

    def classify(batch):
        labels = batch["label"].to(device) if labelled else None
        maps = mim.class_activation_map(network, normalize(batch["image"].to(device)), labels)
        return (255 * maps.clamp(0, 1)).round().byte().cpu().numpy()

    return classify


REGIONS = ("instances", "panoptic", "fh", "cam")


def default_regions(method, data):
    """The value of --regions if it is not given."""
    if data == "shapes" or method == "objmae" and coco_folder(data, "train"):
        return "instances"
    return "cam" if method == "objmae" else "fh"


def default_scales(source, data):
    """The scales of FH: those of R-MAE (§4) for COCO and ImageNet; for small images ours, in proportion to
    their area."""
    if source.image_size <= SMALL:
        return [max(4, round(s * source.image_size**2 / 64**2)) for s in (25, 50, 100)]
    return [500, 1000, 1500] if coco_folder(data, "train") else [1000]


def open_regions(regions: str | None = None, source=None, data="shapes", split="pretrain",
                 fh_scales: list[float] | None = None, region_cache: str = "data/regions",
                 cam_weights: str | None = None, cam_labels: bool = False, device="cpu"):
    """Opens the regions of a source's images: an object with `read`, and `fill` where maps are computed.

    regions: maps of the images' regions: instances, panoptic (with COCO; the built-in scenes have instances),
        fh (Felzenszwalb-Huttenlocher segments), cam (class activation maps), or a folder of masks; default
        in eval.py: those of the run, if any (with --images fh, of attention none); in train.py: instances for
        the built-in scenes and for objmae on COCO, else cam for objmae, fh for rae and rmae
    fh_scales: scales of fh, which are minimum sizes in pixels too; default: 500 1000 1500 for COCO, 1000 for
        other large images, in proportion to their area for small ones
    region_cache: folder for computed regions (not with --images, not with --regions instances, not with
        --regions panoptic)
    cam_weights: file with torchvision's ResNet-50 weights for cam; default: they are downloaded
    cam_labels: cam of the images' labels, which must be ImageNet's 1000 classes, instead of the predicted
        classes

    source, data, split: what `load_data` gave and was given. device: where cam's network runs.
    Raises UsageError if there are no such regions, or a flag is of another kind of regions.
    """
    if fh_scales and regions != "fh":
        raise UsageError(f"--fh-scales belongs to --regions fh, not to {regions or 'none'}")
    if (cam_weights or cam_labels) and regions != "cam":
        raise UsageError("--cam-weights and --cam-labels belong to --regions cam, not to "
                         f"{regions or 'none'}")
    if regions == "instances" and data == "shapes":
        return SceneInstances()
    if regions in ("instances", "panoptic"):
        if not coco_folder(data, split):
            raise UsageError(f"--regions {regions}: --data {data} has none; they come with COCO and shapes "
                             "(panoptic with COCO alone)")
        return CocoRegions(source, data, split, regions)
    if regions == "fh":
        scales = sorted(fh_scales or default_scales(source, data))
        if scales[0] <= 0:
            raise UsageError(f"--fh-scales must be positive, got {scales[0]:g}")
        folder = os.path.join(region_cache, "fh-0.8-640-" + "-".join(f"{s:g}" for s in scales))
        return ComputedRegions(source, folder, scales)
    if regions == "cam":
        if cam_labels and len(source.classes) != 1000:
            raise UsageError(f"--cam-labels: the labels must be ImageNet's 1000 classes, {data} has "
                             f"{len(source.classes)}")
        name = "cam-labels" if cam_labels else "cam-predicted"
        if cam_weights:
            with explained("--cam-weights", f"{cam_weights} cannot be read"):
                name += "-" + digest(Path(cam_weights).read_bytes())
        open_classifier = partial(open_cam, cam_weights, cam_labels, device)
        return ComputedRegions(source, os.path.join(region_cache, name), open_classifier=open_classifier)
    return None if regions is None else MaskFolder(source, regions)


# ---------------------------------------------------------------------------------------------------------
# Dense truth: the class of every pixel, or the masks and classes of all objects. source.truth(index, item)
# gives it of image `index`, whose item is source[index]; source.classes are the names.

IGNORED = -1  # the class of pixels that do not count
ADE20K_CLASSES = {k: f"class {k}" for k in range(1, 151)}
VOC_CLASSES = dict(enumerate((
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor").split()))


def load_dense(data, objects, split="train", image_size=None, limit=None, categories=None):
    """Opens images with dense truth: the built-in scenes, COCO, LVIS (only with `objects`), label PNGs (only
    without; `open_masks`).

    Without `objects` truth is [H, W] int16, classes or IGNORED. With them it is a dict of masks, bool
    [n, H, W]; boxes, [n, 4], COCO's (x, y, width, height) in pixels; labels, int64 [n] from 1; areas, [n] in
    pixels; crowd, bool [n]; of LVIS also labels, neg_category_ids and not_exhaustive_category_ids. A source
    of LVIS has groups, a dict of labels -> r, c or f (rare, common, frequent), and image_counts, the number
    of training images of each class. Files without annotations are left out. Raises UsageError if the data
    have no such truth.

    categories: source.categories of the training data, by whose ids the classes are numbered; default: they
        are read, if they are there
    """
    if split != "train" and categories is None:
        with contextlib.suppress(UsageError):
            categories = load_dense(data, objects).categories
    if data == "shapes":
        source = load_data(data, split, image_size)
        source.truth, source.categories = scene_truth, dict(enumerate(SHAPE_CLASSES, 1))
        if not objects:
            source.truth, source.categories = scene_classes, {0: "background"} | source.categories
        if categories not in (None, source.categories):
            raise UsageError("--data shapes: its classes are not those of the training data")
    elif coco_folder(data, split):
        annotations = Path(data, "annotations")
        lvis = objects and any(annotations.glob("lvis_v1_*"))
        if lvis and any(annotations.glob("instances_*")):
            raise UsageError(f"{annotations} has both LVIS's and COCO's objects: make a folder for each, "
                             "with links to the images")
        kind = "lvis_v1" if lvis else "instances" if objects else "panoptic"
        source = load_coco(data, split, lvis)
        regions = CocoRegions(source, data, split, kind)
        source.truth, source.categories = partial(coco_truth, regions), categories or regions.categories
        for k in regions.used:
            if regions.categories.get(k, "") != source.categories.get(k):
                raise UsageError(f"{regions.file}: it has objects of category {k}, which is not among its "
                                 "categories, or not among those of the training data")
        source.order = source.order[regions.known]
        source.description = (f"{regions.file}: {counted(len(source), 'images')}, objects: "
                              f"{regions.used.total()}, files without entry: {regions.known.count(False)}, "
                              f"entries without file: {len(regions.spans) - len(source)}")
        if lvis:
            with explained(regions.file, "its categories are not LVIS's"):
                groups = {category["id"]: category["frequency"] for category in regions.listed}
                source.groups = {n: groups[k] for n, k in enumerate(source.categories, 1) if k in groups}
                source.image_counts = [category["image_count"] for category in regions.listed]
                if split == "train":
                    source, limit = repeat_rare(shorten(source, limit), regions), None
    elif objects:
        raise UsageError(f"--data {data}: it has no objects for the {split} split; give shapes or COCO")
    else:
        source = open_masks(data, split, categories)
    source.classes = list(source.categories.values())
    return shorten(source, limit)


def repeat_rare(source, regions, threshold=1e-3):
    """Repeat-factor sampling (Gupta et al., LVIS, CVPR 2019, arXiv:1908.03195): a class in a share f of the
    images asks for each of them sqrt(threshold / f) times; an image is there as often as one of its classes
    asks.

    Parts of a time are added up over the images until they make one (detectron2 draws them in each epoch).
    """
    factors = {c["id"]: math.sqrt(threshold * len(regions.spans) / max(1, c["image_count"]))
               for c in regions.listed}
    times = [max([1, *(factors[a["category_id"]] for a in regions.annotations(i)[1])])
             for i in range(len(source))]
    source.order = np.repeat(source.order, np.diff(np.floor(np.cumsum(times)), prepend=0).astype(int))
    source.description += f"; with repeated ones, {len(source)} images an epoch"
    return source


def mask_areas(masks):
    """n masks, bool [H, W] -> [n], pixels. One at a time, numpy counts them far faster."""
    return np.array([np.count_nonzero(mask) for mask in masks])


def as_truth(masks, labels):
    """Masks bool [n, H, W] and the labels of their objects -> their dense truth, as far as masks tell it."""
    boxes = [Image.fromarray(mask).getbbox() or (0, 0, 0, 0) for mask in masks]
    boxes = np.array(boxes, float).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return dict(masks=masks, boxes=boxes, labels=np.array(labels, int),
                areas=mask_areas(masks).astype(float), crowd=np.zeros(len(masks), bool))


def scene_truth(index, item):
    """The objects of a built-in scene."""
    instances = item["instances"].numpy()
    numbers = np.setdiff1d(instances, 0)  # in small images some may be hidden
    return as_truth(instances == numbers[:, None, None], np.array(item["shapes"])[numbers - 1] + 1)


def coco_truth(regions, index, item):
    """The objects of an image's `CocoRegions`, or of panoptic segments the classes of its pixels."""
    objects, shape = regions.objects(index, item), item["image"].shape[1:]
    number = {k: place for place, k in enumerate(regions.source.categories)}
    if regions.kind == "panoptic":
        labels = np.full(shape, IGNORED, np.int16)
        for segment, mask in objects:
            labels[mask] = number[segment["category_id"]]
        return labels
    masks = np.array([mask for _, mask in objects], bool).reshape(-1, *shape)
    truth = as_truth(masks, [number[o["category_id"]] + 1 for o, _ in objects])
    for name, key in (("boxes", "bbox"), ("areas", "area"), ("crowd", "iscrowd")):
        for k, (annotation, _) in enumerate(objects):
            with explained(regions.file, f"broken {key} of {regions.source.name(index)}"):
                truth[name][k] = annotation.get(key) or truth[name][k]
                if np.any(truth[name][k] < 0):
                    raise ValueError(f"{annotation[key]}")
    image, _ = regions.annotations(index)
    return truth | {key: np.array([number[k] + 1 for k in image[key] if k in number], int)
                    for key in ("neg_category_ids", "not_exhaustive_category_ids") if key in image}


def boxes_of(masks):
    """Masks [n, H, W] -> boxes [n, 4] around them: (x1, y1, x2, y2) in pixels, the far sides outside."""
    return masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])


def scene_classes(index, item):
    """The class of every pixel of a built-in scene: 0 is the background, 1.. the shapes."""
    return np.array([0, *(shape + 1 for shape in item["shapes"])], np.int16)[item["instances"].numpy()]


def mask_layout(data, split):
    """The folders of a split's images and of their masks, below the folder `data`, and the names of their
    classes: of ADE20K's layout, of Pascal VOC's, or of one's own, images/train and masks/train or
    train/images and train/masks, likewise for val, without names. None if it has another layout."""
    root, part = Path(data), "training" if split == "train" else "validation"
    for images, masks, names in (
            (f"images/{part}", f"annotations/{part}", ADE20K_CLASSES),
            ("JPEGImages", "SegmentationClass", VOC_CLASSES),
            (f"images/{split}", f"masks/{split}", {}), (f"{split}/images", f"{split}/masks", {})):
        if (root / images).is_dir() and (root / masks).is_dir():
            return images, masks, names
    return None


def open_masks(data, split, categories):
    """Opens images with a label PNG for each (`find_masks`) in one of the layouts of `mask_layout`.

    Line k of classes.txt names label k, from 0. Without it, the classes are the labels that the training
    masks have. 255 does not count, unless there are two classes and the masks have 0 and 255 alone.
    """
    root, layout = Path(data), mask_layout(data, split)
    if layout is None:
        raise UsageError(f"--data {data}: it has no classes of pixels for the {split} split; give shapes, or "
                         "a folder of COCO, ADE20K or Pascal VOC, or with images/train and masks/train")
    images, masks, names = layout
    with explained(f"--data {data}", "it cannot be read"):
        paths = find_files(root / images)
        if images == "JPEGImages":
            stems = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
            paths = [f"{stem}.jpg" for stem in stems]
        source = Files(root / images, paths)
        files = find_masks(source, root / masks)
        if (root / "classes.txt").exists():
            names = dict(enumerate((root / "classes.txt").read_text("utf-8-sig").rstrip().splitlines()))
        if categories is None and len(names) in (0, 2):
            labels = set()
            for file in files.values():
                with explained(f"--data {data}", f"{file} cannot be read"):
                    labels |= {*np.unique(read_ids(file)).tolist()}
            if labels == {0, 255}:
                names = dict(zip((0, 255), names.values() or ("0", "255")))
            elif not names:
                names = {k: str(k) for k in sorted(labels - {255})}
                if not names:
                    raise UsageError(f"--data {data}: no pixel of {root / masks} counts, all labels are 255")
        if categories and names and [*categories.values()] != [*names.values()]:
            raise UsageError(f"--data {data}: its classes are not those of the training data")
    known = in_entries(source, files, root / masks)
    source.order, source.categories = source.order[known], categories or names
    source.description = (f"{data}: {images}, {counted(len(source), 'images')}, {len(source.categories)} "
                          f"classes, images without mask: {known.count(False)}")
    source.truth = partial(read_classes, source, files)
    return source


def read_classes(source, files, index, item):
    """The classes of an image's pixels from its PNG, which has the ids of source.categories.

    Pixels of 0 and 255, if these are no ids, become IGNORED. UsageError for other values, and if the PNG is
    broken. files: dict of images' paths -> PNGs.
    """
    path = files[source.path(index)]
    with explained(f"labels of {source.name(index)}", f"{path} cannot be read"):
        labels = read_ids(path)
    check_shape(source.name(index), item["image"], labels.shape, exact=True)
    ids = np.array([*source.categories])
    classes = np.searchsorted(ids[1:], labels, side="right")  # the last id that is not above the label
    known = ids[classes] == labels
    wrong = labels[~known & (labels != 0) & (labels != 255)]
    if wrong.size:
        raise UsageError(f"{path}: label {wrong[0]} is not one of {counted(len(ids), 'classes')}")
    return np.where(known, classes, IGNORED).astype(np.int16)


# ---------------------------------------------------------------------------------------------------------
# Felzenszwalb-Huttenlocher segments (FH): regions from pixels alone


CHUNK = 8192  # edges at a time: with fewer, numpy is called more often; with more, Python's loop is longer


def smooth(image, sigma):
    """uint8 [3, H, W] -> float64 in [0, 1], blurred by a Gaussian of sigma pixels (0: not at all). The
    borders mirror."""
    image = np.asarray(image) * (1 / 255)  # this and the order of the sum: the same bits as scikit-image's
    if sigma == 0:
        return image
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 / sigma ** 2 * np.arange(-radius, radius + 1) ** 2)
    taps /= taps.sum()
    for _ in range(2):  # along H; then, as the axes are swapped, along W
        size = image.shape[1]
        padded = np.pad(image, ((0, 0), (radius, radius), (0, 0)), mode="symmetric")
        image = taps[radius] * image
        for k in range(radius):
            image += taps[k] * (padded[:, k:k + size] + padded[:, 2 * radius - k:][:, :size])
        image = np.ascontiguousarray(image.transpose(0, 2, 1))
    return image


def grid_edges(image):
    """Float [3, H, W] -> the edges of the 8-neighbour grid by rising weight: weights [E], ends int32 [2, E].

    A weight is the Euclidean distance of two pixels' colours; an end is a pixel's number y * W + x.
    """
    numbers = np.arange(image[0].size, dtype=np.int32).reshape(image[0].shape)
    colours, weights, ends = image.reshape(3, -1), [], []
    for neighbours in ((numbers[:, 1:], numbers[:, :-1]), (numbers[1:], numbers[:-1]),
                       (numbers[1:, 1:], numbers[:-1, :-1]), (numbers[:-1, 1:], numbers[1:, :-1])):
        one, other = (some.ravel() for some in neighbours)
        red, green, blue = (colours.take(one, axis=1) - colours.take(other, axis=1)) ** 2
        weights.append(np.sqrt(red + green + blue))
        ends.append((one, other))
    weights, ends = np.concatenate(weights), np.concatenate(ends, axis=1)
    order = np.argsort(weights, kind="stable")  # the same segments on every machine
    return weights.take(order), ends.take(order, axis=1)


def find_roots(forest, nodes):
    """The roots of the nodes [M] in a forest of parents [N]; the roots then become the nodes' parents."""
    roots = forest.take(nodes)
    while not np.array_equal(roots, above := forest.take(roots)):
        roots = above
    forest[nodes] = roots
    return roots


def crossings(forest, weights, ends, alive):
    """Yields (u, v, weight) of the edges that lead from one tree of the forest to another, in their order.

    u < v are the trees' roots; the caller may join them by forest[v] = u. alive(a, b, weight) says which
    edges between the trees of roots a and b [M] can still join them at this weight or a larger one. numpy
    drops all others, a chunk at a time. About as many as there are joins are left to the slow Python loop.
    """
    parent = forest.data  # the same memory, in which Python is fast at single numbers
    for i in range(0, len(weights), CHUNK):
        a, b = (find_roots(forest, end[i:i + CHUNK]) for end in ends)
        keep = np.flatnonzero((a != b) & alive(a, b, weights[i:i + 1]))
        for u, v, weight in zip(a[keep].tolist(), b[keep].tolist(), weights[i + keep].tolist()):
            while parent[u] != u:
                u = parent[u]
            while parent[v] != v:
                v = parent[v]
            if u != v:
                yield min(u, v), max(u, v), weight


def join_pixels(weights, ends, pixels, scale, min_size):
    """Sorted edges of a graph of pixels -> int32 labels [pixels], numbered by the segments' first pixels.

    An edge joins two segments if it weighs less than the limit of both: the heaviest edge inside + scale /
    size. A segment whose limit is below the present weight stays as it is, because the weights only rise.
    """
    scale = scale / 255  # the authors' colours go up to 255
    numbers = np.arange(pixels, dtype=np.int32)
    forest, sizes = numbers.copy(), np.ones(pixels, np.int32)
    limits = np.full(pixels, scale, np.float32)  # as scikit-image's
    parent, size, limit = forest.data, sizes.data, limits.data  # the same memory, see `crossings`

    def both_limits_are_above(a, b, weight):
        return np.minimum(limits[a], limits[b]) > weight

    def one_is_too_small(a, b, _):
        return np.minimum(sizes[a], sizes[b]) < min_size

    for u, v, weight in crossings(forest, weights, ends, both_limits_are_above):
        if weight < limit[u] and weight < limit[v]:
            parent[v] = u
            size[u] += size[v]
            limit[u] = weight + scale / size[u]

    for u, v, _ in crossings(forest, weights, ends, one_is_too_small):
        if size[u] < min_size or size[v] < min_size:
            parent[v] = u
            size[u] += size[v]
    roots = find_roots(forest, numbers)
    return np.cumsum(roots == numbers, dtype=np.int32)[roots] - 1


def felzenszwalb(image, scale=1000, sigma=0.8, min_size=None):
    """uint8 [3, H, W] -> int32 labels [H, W] from 0; several scales (a tuple; saves time): [S, H, W].

    Felzenszwalb and Huttenlocher, "Efficient graph-based image segmentation", IJCV 2004; the result is that
    of scikit-image. A larger scale makes larger segments. Those of fewer than min_size pixels (default: as
    many as scale) join a neighbour.
    """
    weights, ends = grid_edges(smooth(image, sigma))
    height, width = image.shape[1:]
    labels = [join_pixels(weights, ends, height * width, s, s if min_size is None else min_size)
              for s in np.ravel(scale)]
    return np.reshape(labels, (*np.shape(scale), height, width))
