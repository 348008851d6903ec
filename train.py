"""Pre-training, from a folder of images to a checkpoint: `python train.py --method amt --data /imagenet`.

Several GPUs or machines: `torchrun --nproc_per_node=8 train.py ...`. What every flag does: `--help`, with --method
also the method's own. All randomness of a step is a function of (seed, step, micro-batch) and that of an image of
(seed, epoch, index), so a run continued with --resume ends where it would have ended without the stop: bit for bit on
a CPU, on CUDA but for the order in which its kernels sum.
"""

import argparse
import contextlib
import datetime
import difflib
import hashlib
import inspect
import json
import math
import os
import sys
import time
import typing
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import mim
from datasets import (REGIONS, SMALL, BrokenFiles, DeviceLoader, EpochBatches, Images, UsageError, collate,
                      default_regions, default_scales, denormalize, load_data, make_loader, normalize, open_regions,
                      pair_max, seed_of)

# ---------------------------------------------------------------------------------------------------------
# Recipes: the papers' training settings. The absolute learning rate is base_lr * batch_size / lr_batch.

RECIPES = {
    # MAE: Table 8 (pre-training setting)
    "mae": dict(model="base", patch_size=16, epochs=800, batch_size=4096, base_lr=1.5e-4, lr_batch=256,
                warmup_epochs=40, min_lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, lookahead=0, clip_grad=None,
                crop_scale=(0.2, 1.0), flip=True),
    # SimMIM: §4.1; the learning rate is per 512 images. Clipping is its released ViT-B configuration's.
    "simmim": dict(model="base", patch_size=16, epochs=800, batch_size=2048, base_lr=1e-4, lr_batch=512,
                   warmup_epochs=10, min_lr=0.0, betas=(0.9, 0.999), weight_decay=0.05, lookahead=0, clip_grad=5.0,
                   crop_scale=(0.67, 1.0), flip=True),
}
# AMT: "the settings of pre-training follow the original works strictly", for 400 and 200 epochs (§4.1). Its baselines
# are MAE with --epochs 400 --warmup-epochs 40, SimMIM with --epochs 200 --warmup-epochs 10.
RECIPES["amt-mae"] = RECIPES["mae"] | dict(epochs=400)
RECIPES["amt-simmim"] = RECIPES["simmim"] | dict(epochs=200)
# LoMaR: "we follow the MAE settings", but crops alone, no flip; 40 epochs of warm-up for 1600 (its supplement, §6.1)
RECIPES["lomar"] = RECIPES["mae"] | dict(epochs=1600, flip=False)
# ObjMAE: Tables 1, 2 and 3; "randomly cropped", no flip. The rate is that of a batch of 128 on COCO and ImageNet-100;
# CLEVR has --epochs 300 --batch-size 256 --lr 1.5e-4 --warmup-epochs 40.
RECIPES["objmae"] = RECIPES["mae"] | dict(model="small", batch_size=128, lr_batch=128, min_lr=1e-5, betas=(0.9, 0.999),
                                          lookahead=5, flip=False)

# R-MAE: "we exactly follow MAE for hyper-parameters. Our base learning rate is set to 1e-4" (§4; 4000 epochs on COCO)
RECIPES["rae"] = RECIPES["rmae"] = RECIPES["mae"] | dict(base_lr=1e-4)

# CAE: Appendix (pre-training), 800 epochs; the rate is absolute at a batch of 2048. Crop and flip alone. 300 and 1600
# epochs have --warmup-epochs 10 and 40. Clipping, least rate and crop scale are BEiT's and CAE's code's.
RECIPES["cae"] = dict(model="base", patch_size=16, epochs=800, batch_size=2048, base_lr=1.5e-3, lr_batch=2048,
                      warmup_epochs=20, min_lr=1e-5, betas=(0.9, 0.999), weight_decay=0.05, lookahead=0, clip_grad=3.0,
                      crop_scale=(0.08, 1.0), flip=True)
# BEiT: its Table 6, but without colour jitter, as CAE trains it
RECIPES["beit"] = RECIPES["cae"] | dict(warmup_epochs=10)
# The tokenizer: DALL-E's Appendix A.2 but for its 3 million steps
RECIPES["dvae"] = dict(image_size=112, epochs=50, batch_size=512, base_lr=1e-4, lr_batch=512, warmup_epochs=0.0,
                       min_lr=1.25e-6, betas=(0.9, 0.999), weight_decay=1e-4, lookahead=0, clip_grad=None,
                       crop_scale=(0.2, 1.0), flip=True)

# What changes for images of up to 96 pixels: ours, not the papers'. NANO_RECIPE: the built-in scenes and --model nano.
# patch_size is an eighth of the image; `options` are constructor arguments of the method, for those that have them.
SMALL_RECIPE = dict(model="tiny", epochs=200, batch_size=512, base_lr=1e-3, lr_batch=256, warmup_epochs=10,
                    options=dict(decoder_dim=192, decoder_depth=4, decoder_heads=3, window_size=5))
NANO_RECIPE = dict(model="nano", epochs=5, batch_size=64, base_lr=4e-3, lr_batch=256, warmup_epochs=0.5,
                   options=dict(decoder_dim=64, decoder_depth=2, decoder_heads=2, window_size=5, region_dim=64))
DVAE_SMALL_RECIPE = dict(base_lr=3e-3, lr_batch=32, batch_size=32, epochs=5, warmup_epochs=0.0,
                         options=dict(hidden_dim=32, groups=3, vocab_size=512))

# ---------------------------------------------------------------------------------------------------------
# Flags

NOT_OF_DVAE = ("model", "patch_size")
FLAGS = {  # name: (type, what it is); None as a default stands for "the recipe's"
    "data": (str, "shapes (built in), cifar10, cifar100, stl10, or a folder of images"),
    "limit": (int, "use so many of the images, evenly spread (default: all)"),
    "model": (str, f"encoder size: {', '.join(mim.SIZES)}"),
    "image_size": (int, "pixels, one number or height and width"),
    "patch_size": (int, "pixels"),
    "epochs": (int, "passes over the data"),
    "batch_size": (int, "images per optimizer step, over all processes"),
    "accumulate": (int, "micro-batches per step and process (default: as many as keep them at 256 images or fewer)"),
    "lr": (float, "absolute learning rate, instead of --base-lr"),
    "base_lr": (float, "learning rate per 256 images of the batch (the recipe's lr_batch says if per more or fewer)"),
    "warmup_epochs": (float, "linear warm-up"),
    "min_lr": (float, "absolute learning rate at the end of the cosine"),
    "weight_decay": (float, "of AdamW, on weight matrices only"),
    "lookahead": (int, "steps of AdamW between those of Lookahead's slow weights; 0: no Lookahead"),
    "clip_grad": (float, "largest gradient norm"),
    "loader": (str, "who crops and flips: workers (processes on the CPU), or device for data sets that are in memory "
                    "and methods without regions (default: device with CUDA where it can be, else workers)"),
    "workers": (int, "data loading processes (default: with CUDA as many as cores, at most 16; else 0)"),
    "seed": (int, "of everything random"),
    "device": (str, "cuda, cuda:1, cpu, ... (default: cuda if there is one)"),
    "precision": (str, "fp32, bf16 or fp16 autocast (default: bf16 or fp16 with CUDA, else fp32)"),
    "output": (str, "folder of the run (default: runs/METHOD)"),
}
TOKENIZER_FLAG = {  # of methods that can predict tokens
    "tokenizer": (str, "file of the tokenizer whose tokens are the target: checkpoint.pt of a dvae run, or a state "
                       "dict of DALL-E's encoder (default: pixels are the target)"),
}
REGION_FLAGS = {  # of methods that take regions
    "regions": (str, f"{', '.join(REGIONS)}, or a folder of label PNGs or .npz stacks of masks, matched by file name "
                     "(default: instances if the data have them, else cam for objmae and fh for rae, rmae)"),
    "fh_scales": (float, "Felzenszwalb-Huttenlocher: scales, which are minimum sizes in pixels too (default: 500 1000 "
                         "1500 for COCO, 1000 for other large images)"),
    "region_cache": (str, "folder for computed regions (default: data/regions)"),
    "cam_weights": (str, "file with torchvision's ResNet-50 weights (default: downloaded)"),
}
REGION_SWITCHES = {
    "cam_labels": "cam of the labels, ImageNet's 1000 classes, instead of the predicted classes",
    "prepare": "compute the regions of all images, and stop",
}
SWITCHES = {
    "compile": "torch.compile the model",
    "resume": "continue the run in --output",
    "overwrite": "start anew where --output already holds a run",
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def method_parameters(method, base="mae"):
    """The constructor arguments of a method (and of the base that AMT wraps): name -> inspect.Parameter."""
    parameters = dict(inspect.signature(mim.METHODS[method].__init__).parameters)
    not_flags = ("self", "encoder", "tokenizer", "image_size")
    own = {k: p for k, p in parameters.items() if k not in not_flags and p.kind != p.VAR_KEYWORD}
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        own = method_parameters(base) | own
    return own


def takes_tokenizer(method):
    """Whether the method can predict tokens."""
    return "tokenizer" in inspect.signature(mim.METHODS[method].__init__).parameters


def add_method_flags(parser, parameters):
    """One flag for every constructor argument, of the type that its annotation gives."""
    for name, parameter in parameters.items():
        kind, options = parameter.annotation, {}
        if typing.get_origin(kind) is typing.Literal:
            options = dict(choices=typing.get_args(kind))
        elif kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        else:  # `float | None` takes a float
            options = dict(type=next((t for t in typing.get_args(kind) if t is not type(None)), kind))
        default = "by the paper, see the class" if parameter.default is None else parameter.default
        parser.add_argument("--" + name.replace("_", "-"), default=None, help=f"(default: {default})", **options)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors name the nearest flag, and reach the caller as UsageError."""

    def error(self, message):
        raise UsageError(message)

    def parse_all(self, argv):
        arguments, rest = self.parse_known_args(argv)
        if rest:
            flag = rest[0].split("=")[0]
            known = [o for a in self._actions for o in a.option_strings if o.startswith("--")]
            near = difflib.get_close_matches(flag, known, 1, cutoff=0.5)
            hint = f": did you mean {near[0]}?" if near else "; --help lists them"
            raise UsageError(f"unknown argument {flag}{hint}")
        return arguments


def check_choice(flag, value, choices):
    """Raises UsageError, with the nearest choice, if value is none of them."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f": did you mean {near[0]}?" if near else f"; it may be {', '.join(choices)}"
        raise UsageError(f"{flag} {value!r} is unknown{hint}")


def parse(argv):
    """Command line -> dict of what the user gave, nothing else; method arguments under their own names."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--method")
    first.add_argument("--base", default="mae")
    known, _ = first.parse_known_args(argv)
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    epilog="" if known.method else "With --method, --help also lists the method's own flags.")
    parser.add_argument("--method", help=", ".join(mim.METHODS))
    recipe = {}
    if known.method is not None:
        check_choice("--method", known.method, list(mim.METHODS))
        if known.method == "amt":
            check_choice("--base", known.base, list(mim.AMT_BASES))
        recipe = RECIPES[f"amt-{known.base}" if known.method == "amt" else known.method]
    with_regions = known.method is not None and "regions" in mim.METHODS[known.method].inputs
    flags = FLAGS | (REGION_FLAGS if with_regions else {})
    if known.method is not None and takes_tokenizer(known.method):
        flags = flags | TOKENIZER_FLAG
    if known.method == "dvae":
        flags = {k: v for k, v in flags.items() if k not in NOT_OF_DVAE}
    for name, (kind, text) in flags.items():
        nargs = "+" if name in ("image_size", "fh_scales") else None
        whose = "the recipe's" if known.method == "dvae" else "the paper's"
        text += f" ({whose}: {recipe[name]})" if recipe.get(name) is not None else ""
        parser.add_argument("--" + name.replace("_", "-"), type=kind, nargs=nargs, help=text)
    for name, text in (SWITCHES | (REGION_SWITCHES if with_regions else {})).items():
        parser.add_argument("--" + name.replace("_", "-"), action="store_true", default=None, help=text)
    if known.method is not None:
        group = parser.add_argument_group(f"{known.method}'s own")
        add_method_flags(group, method_parameters(known.method, known.base))
    given = {k: v for k, v in vars(parser.parse_all(argv)).items() if v is not None}
    if "method" not in given:
        raise UsageError(f"--method is missing; it may be {', '.join(mim.METHODS)}")
    if "image_size" in given:
        given["image_size"] = image_size_flag(given["image_size"])
    return given


def image_size_flag(value):
    """--image-size's one or two numbers -> an int or (height, width)."""
    if len(value) > 2:
        raise UsageError(f"--image-size takes one number, or height and width; got {len(value)} numbers")
    if min(value) < 1:
        raise UsageError(f"--image-size must be positive, got {min(value)}")
    return value[0] if len(value) == 1 else list(value)


def settle(given, num_images, natural_size, world_size=1):
    """What the user gave, the recipe for the rest -> every setting of the run, in plain types.

    num_images, natural_size: of the data, which batch and image size follow. UsageError for values out of range.
    """
    method, base = given["method"], given.get("base", "mae")
    recipe = dict(RECIPES[f"amt-{base}" if method == "amt" else method])
    natural_size = natural_size if natural_size <= SMALL else recipe.pop("image_size", natural_size)
    recipe.pop("image_size", None)
    image_size = given.get("image_size", natural_size)
    if pair_max(image_size) <= SMALL:
        nano = given.get("data", "shapes") == "shapes" or given.get("model") == "nano"
        small = NANO_RECIPE if nano else SMALL_RECIPE
        recipe |= small | (DVAE_SMALL_RECIPE if method == "dvae" else {})
        sides = [image_size] if isinstance(image_size, int) else image_size
        common = math.gcd(*sides)  # an eighth of the image, or the nearest below that divides it
        recipe["patch_size"] = max([p for p in range(1, max(sides) // 8 + 1) if common % p == 0], default=1)
    recipe["batch_size"] = min(recipe["batch_size"], max(world_size, 2 ** int(math.log2(num_images))))
    # A shorter run warms up for the same share of it.
    recipe["warmup_epochs"] *= min(1.0, given.get("epochs", recipe["epochs"]) / recipe["epochs"])
    options = recipe.pop("options", {})
    options = {k: options.get(k, p.default) for k, p in method_parameters(method, base).items()}
    settings = dict(data="shapes", image_size=image_size, seed=0, output=f"runs/{method}", compile=False, lr=None)
    settings |= recipe | given
    if method == "dvae":
        settings = {k: v for k, v in settings.items() if k not in NOT_OF_DVAE}
    settings["method_options"] = {k: settings.pop(k, default) for k, default in options.items()}
    check_choice("--model", settings.get("model", "base"), list(mim.SIZES))
    check_ranges(settings, ("epochs", "batch_size", "patch_size", "lr", "base_lr", "clip_grad", "accumulate"),
                 ("warmup_epochs", "min_lr", "weight_decay", "lookahead", "seed"))
    if settings["seed"] >= 2**63:
        raise UsageError(f"--seed must be below 2**63, got {settings['seed']}")
    if "lr" in given and "base_lr" in given:
        raise UsageError("--lr and --base-lr exclude each other")
    batch = settings["batch_size"]
    if batch > num_images:
        raise UsageError(f"--batch-size {batch} is more than the {num_images} images that there are")
    if "accumulate" not in settings:
        fits = (a for a in range(1, batch + 1) if batch % (world_size * a) == 0 and batch // (world_size * a) <= 256)
        settings["accumulate"] = next(fits, 1)
        share = batch // (world_size * settings["accumulate"])
        if settings["accumulate"] > 1 and share < 64:
            raise UsageError(f"--batch-size {batch} can only be split into micro-batches of {share} images: take a "
                             "multiple of 256 for each process, or give --accumulate")
    if batch % (world_size * settings["accumulate"]):
        raise UsageError(f"--batch-size {batch} is not divisible by {world_size} processes x "
                         f"{settings['accumulate']} micro-batches")
    settings["lr"] = settings["lr"] or settings["base_lr"] * batch / recipe["lr_batch"]
    return settings


def check_ranges(settings, positive, not_negative):
    """Raises UsageError for a setting that is out of range; those that are absent or None pass."""
    for name in (*positive, *not_negative):
        value = settings.get(name)
        good = value is None or value >= 0 and math.isfinite(value) and (value > 0 or name in not_negative)
        if not good:
            must = "be positive" if name in positive else "not be negative"
            raise UsageError(f"--{name.replace('_', '-')} must {must}, got {value}")


def cores():
    """The CPU cores of this process: those it may run on, shared with the other processes of the run."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def settle_machine(given):
    """(device, precision, workers) of this machine from what the user gave; a CUDA device becomes the current one."""
    name = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise UsageError(f"--device {name}: torchrun gives every process a GPU of its own; leave the flag out")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)  # which NCCL, timings and memory counts work on
        torch.set_float32_matmul_precision("high")
    default = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if on_cuda else "fp32"
    precision = given.get("precision", default)
    check_choice("--precision", precision, list(PRECISIONS))
    workers = given.get("workers", min(16, cores()) if on_cuda else 0)
    check_ranges(dict(workers=workers), (), ("workers",))
    return device, precision, workers


# ---------------------------------------------------------------------------------------------------------
# Pieces of the loop


def load_tokenizer(path):
    """The tokenizer in a dvae run's checkpoint.pt, or in a state dict of its or DALL-E's encoder; or UsageError."""
    try:
        content = mim.load_file(path)
        if isinstance(content, dict) and isinstance(content.get("args"), dict):
            if content["args"].get("method") != "dvae":
                raise ValueError(f"it is of a {content['args'].get('method')} run, not of dvae")
            tokenizer = build_method(content["args"])
            tokenizer.load_state_dict(content["model"])
        else:
            tokenizer = mim.DVAE.from_encoder(mim.read_checkpoint(content))
    except KeyError as error:
        raise UsageError(f"--tokenizer {path}: it lacks {error}") from None
    except (ValueError, RuntimeError, TypeError) as error:
        message = str(error).splitlines()[0].removeprefix(f"cannot read {path}: ")
        raise UsageError(f"--tokenizer {path}: {message}") from None
    return tokenizer.eval().requires_grad_(False)


def tokenizer_id(method):
    """What tells one tokenizer from another, or None: a digest of its encoder's weights."""
    tokenizer = getattr(getattr(method, "head", None), "tokenizer", None)
    if tokenizer is None:
        return None
    weights = (v.detach().cpu().contiguous().numpy().tobytes() for v in tokenizer.encoder.state_dict().values())
    return hashlib.sha256(b"".join(weights)).hexdigest()[:16]


def build_method(settings):
    """The method with its encoder, as the settings say; raises UsageError if they do not fit together."""
    method, options = mim.METHODS[settings["method"]], dict(settings["method_options"])
    if method is mim.BEiT and not settings.get("tokenizer"):
        raise UsageError("--method beit predicts tokens and needs --tokenizer FILE; --method dvae trains one")
    if settings.get("tokenizer"):
        options["tokenizer"] = load_tokenizer(settings["tokenizer"])
    try:
        if method is mim.DVAE:
            return method(settings["image_size"], **options)
        encoder_options = dict((mim.AMT_BASES[options["base"]] if method is mim.AMT else method).encoder_options)
        if "layer_scale" in encoder_options and settings["model"] in ("large", "huge"):
            encoder_options["layer_scale"] = 1e-5  # CAE's and BEiT's for ViT-L
        encoder = mim.ViT(settings["image_size"], settings["patch_size"], **mim.SIZES[settings["model"]],
                          **encoder_options)
        return method(encoder, **options)
    except ValueError as error:
        raise UsageError(f"--method {settings['method']}: {error}") from None


def parameter_groups(module, weight_decay):
    """AdamW's two groups: no weight decay on what has one dimension (biases, norms, layer scale), as in the authors'
    code of MAE, LoMaR and CAE; on all else, class and mask tokens and LoMaR's table included."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [dict(params=[p for p in trained if p.ndim > 1], weight_decay=weight_decay),
            dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0)]


class Lookahead(torch.optim.Optimizer):
    """k steps forward, one step back: after every `k` steps of any torch optimizer the weights return to the slow ones,
    moved by `alpha` of the way (Zhang, Lucas, Hinton, Ba, NeurIPS 2019, arXiv:1907.08610)."""

    def __init__(self, optimizer, k=5, alpha=0.5):
        if k < 1 or not 0 < alpha <= 1:
            raise ValueError(f"k={k} must be at least 1 and alpha={alpha} in (0, 1]")
        self.optimizer, self.k, self.alpha, self.count = optimizer, k, alpha, 0
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults
        self.weights = [p for group in optimizer.param_groups for p in group["params"]]
        self.slow = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            torch._foreach_lerp_(self.slow, self.weights, self.alpha)
            torch._foreach_copy_(self.weights, self.slow)
        return loss

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return dict(self.optimizer.state_dict(), slow=self.slow, count=self.count)

    def load_state_dict(self, state):
        self.optimizer.load_state_dict({k: v for k, v in state.items() if k not in ("slow", "count")})
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state  # it replaces both
        for own, saved in zip(self.slow, state["slow"], strict=True):
            own.copy_(saved)
        self.count = state["count"]


def learning_rate(step, steps, warmup_steps, peak, minimum=0.0):
    """Linear warm-up from 0 to `peak`, then half a cosine down to `minimum` at the last of `steps`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def write_atomically(path, write):
    """write(temporary path), then rename: a file under `path` is always whole. UsageError if the disk refuses."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "writing it failed, the disk may be full"
        kept = "; what was there before is kept" if Path(path).exists() else ""
        raise UsageError(f"cannot write {path}: {reason}{kept}") from None


def draw_reconstruction(method, images, regions=None):
    """Normalised images [B, 3, H, W] -> a grid [3, h, w] in [0, 1]: of each image the tiles that method.picture names.

    Masked patches are grey; patches that the method left out (AMT's thrown ones, all outside of LoMaR's window or of
    ObjMAE's object) are black. Of LoMaR's windows and of R-MAE's regions the first is shown.
    """
    if isinstance(method, mim.DVAE):
        return tile(torch.stack([denormalize(images), denormalize(method(images)["pred"])], 1).flatten(0, 1), columns=8)
    out, p = method(images) if regions is None else method(images, regions=regions), method.encoder.patch_size
    if hasattr(method, "num_windows"):
        out = {k: out[k][:, : out[k].shape[1] // method.num_windows] for k in ("pred", "ids_visible", "ids_masked")}
    image = mim.patchify(denormalize(images), p)
    black, grey = torch.zeros_like(image), torch.full_like(image, 0.5)
    show = lambda under, ids, patches: mim.put(under, ids, mim.take(patches, ids))  # noqa: E731
    visible = show(black, out["ids_visible"], image)
    tiles = dict(image=image, source=visible, target=show(black, out["ids_masked"], image),
                 region=show(visible, out["ids_masked"], image), masked=show(visible, out["ids_masked"], grey))
    if "filled" in method.picture:
        filled = fill_in(method, images, out["pred"], out["ids_masked"])
        tiles["filled"] = show(visible, out["ids_masked"], mim.patchify(denormalize(filled), p))
    if "full" in method.picture:
        everything = torch.arange(image.shape[1], device=image.device).expand(len(image), -1)
        full = fill_in(method, images, method.reconstruct_full(images), everything)
        tiles["full"] = mim.patchify(denormalize(full), p)
    if "region_filled" in method.picture:
        filled = mim.reconstruct_regions(out["region_maps"], out["pred_regions"], out["ids_masked"], p)
        true, filled = (mim.patchify(x[:, :1].float().expand(-1, 3, -1, -1), p) for x in (out["region_maps"], filled))
        tiles |= dict(region_true=true, region_masked=show(true, out["ids_masked"], grey), region_filled=filled)
    pictures = torch.stack([tiles[name] for name in method.picture], dim=1).flatten(0, 1)
    pictures = mim.unpatchify(pictures, p, method.encoder.grid)
    return tile(pictures, columns=2 * len(method.picture))


def fill_in(method, images, pred, ids):
    """The images with what was predicted of the patches `ids`; predicted tokens are decoded by their tokenizer."""
    tokenizer = getattr(getattr(method, "head", None), "tokenizer", None)
    if tokenizer is not None and tokenizer.decoder is None:
        return torch.zeros_like(images)  # of an encoder alone the words cannot be drawn
    if tokenizer is None:
        return mim.reconstruct(images, pred.float(), ids, method.encoder.patch_size, method.norm_pix)
    tokens = method.head.tokens(images).scatter(1, ids, pred.argmax(-1))
    decoded = tokenizer.decode(tokens, method.encoder.grid)
    return F.interpolate(decoded, images.shape[-2:], mode="bicubic", antialias=True, align_corners=False)


def tile(pictures, columns):
    """Pictures [n, 3, H, W] in [0, 1] -> one grid [3, h, w]; small ones are enlarged to at most 128 pixels."""
    zoom = max(1, 128 // pictures.shape[-1])
    return make_grid(F.interpolate(pictures, scale_factor=zoom, mode="nearest"), nrow=columns, pad_value=1.0)


def picture_items(dataset, count=8):
    """`count` items spread over a dataset -> images, normalised, [count, 3, H, W], and regions if it has them."""
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    batch = collate([dataset[i] for i in places])
    return dict(images=normalize(batch["image"])) | {k: batch[k] for k in ("regions",) if k in batch}


def save_picture(path, method, items, device, seed=0):
    """Draws and writes reconstruction.png with the same masks each time."""
    training = method.training
    method.eval()
    torch.manual_seed(seed)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # a compiled method is for batches of one size
        grid = draw_reconstruction(method, **{k: v.to(device) for k, v in items.items()})
    method.train(training)
    write_atomically(path, lambda to: save_image(grid, to, format="png"))


def save_run(run):
    """Writes encoder.pt, a plain state dict of timm's names, and last checkpoint.pt, all that an exact resume needs.

    There are no generator states to keep: every draw is seeded by (seed, step, micro-batch) or (seed, epoch, index).
    """
    state = dict(model=run.method.state_dict(), optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(),
                 epoch=run.epoch, step=run.epoch * (run.settings["num_images"] // run.settings["batch_size"]),
                 args=run.settings, maps=getattr(run.method, "maps", None))
    write_atomically(run.output / "encoder.pt", lambda to: torch.save(run.method.encoder.state_dict(), to))
    write_atomically(run.output / "checkpoint.pt", lambda to: torch.save(state, to))


def restore(run, state):
    """Puts a loaded checkpoint's state into a prepared run."""
    run.epoch = state["epoch"]
    if state["args"].get("tokenizer_id") != run.settings["tokenizer_id"]:
        raise UsageError(f"--resume: --tokenizer {run.settings.get('tokenizer')} is not what the run was started with")
    run.method.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    if state["maps"] is not None:
        run.method.maps = state["maps"].to(run.device)
    log = run.output / "log.jsonl"
    if log.exists():  # a run killed between two writes has logged an epoch that it must repeat
        run.log = [x for x in log.read_text().splitlines() if json.loads(x)["epoch"] <= run.epoch]


def load_run(path):
    """A checkpoint.pt of ours, whole; raises UsageError if it is something else."""
    try:
        state = mim.load_file(path)
    except ValueError as error:
        raise UsageError(str(error)) from None
    ours = isinstance(state, dict) and {"model", "optimizer", "epoch", "args"} <= state.keys()
    if not ours or not isinstance(state["args"], dict) or "method_options" not in state["args"]:
        raise UsageError(f"{path} is not a checkpoint of train.py")
    return state


MAY_CHANGE = ("data", "tokenizer", "device", "precision", "workers", "compile", "output", "resume", "overwrite",
              "accumulate", "region_cache", "cam_weights", "prepare")


def open_output(given):
    """Looks into --output: (folder, checkpoint to resume or None). Refuses to overwrite or mix up runs."""
    output = Path(given.get("output", f"runs/{given['method']}"))
    path = output / "checkpoint.pt"
    if not given.get("resume"):
        if not given.get("overwrite") and not given.get("prepare"):
            done = load_run(path)["epoch"] if path.exists() else 0
            if done:
                raise UsageError(f"{output} already holds a run of {done} epochs: --resume continues it, --overwrite "
                                 "starts anew, --output writes elsewhere")
            if not path.exists() and (output / "encoder.pt").exists():
                raise UsageError(f"{output} already holds the encoder.pt of a run: --overwrite starts anew, --output "
                                 "writes elsewhere")
        return output, None
    if not path.exists():
        raise UsageError(f"--resume: there is no {path}")
    state = load_run(path)
    saved = state["args"] | state["args"]["method_options"]
    for name, value in given.items():
        if name not in MAY_CHANGE and saved.get(name) != value:
            raise UsageError(f"--{name.replace('_', '-')} {value}: {path} was made with {saved.get(name)}; leave the "
                             "flag out or write to another --output")
    return output, state


def all_finite(module):
    """Whether all parameters are finite numbers."""
    return bool(torch.stack([p.isfinite().all() for p in module.parameters()]).all())


def write_log(path, lines):
    """Replaces log.jsonl by these lines."""
    write_atomically(path, lambda to: to.write_text("".join(line + "\n" for line in lines)))


# ---------------------------------------------------------------------------------------------------------
# Training


def join_processes(device):
    """(rank, world size) under torchrun, (0, 1) without."""
    if "RANK" not in os.environ:
        return 0, 1
    # A day, as processes may wait for one another's regions or for a download.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    return dist.get_rank(), dist.get_world_size()


def settle_run(given, state, rank, world_size, on_cuda):
    """The data of a run and all its settings; those of a run to resume come from its checkpoint."""
    if state:
        saved = state["args"] | state["args"]["method_options"]
        chosen = {k: given[k] for k in MAY_CHANGE if k in given}
        given = {k: v for k, v in saved.items() if k not in ("method_options", "base_lr") and v is not None} | chosen
        # A step keeps its micro-batches, and so its masks, if the processes can share them out.
        micro_batches = saved["world_size"] * saved["accumulate"]
        if "accumulate" not in chosen:
            given["accumulate"] = micro_batches // world_size if micro_batches % world_size == 0 else None
        if world_size * (given["accumulate"] or 0) != micro_batches and rank == 0:
            print(f"--resume: a step no longer has {micro_batches} micro-batches, so its masks differ from now on")
        given = {"loader": "workers"} | {k: v for k, v in given.items() if v is not None}
    if rank and world_size > 1:
        dist.barrier()  # one process downloads
    source = load_data(given.get("data", "shapes"), "pretrain", given.get("image_size"), limit=given.get("limit"))
    if not rank and world_size > 1:
        dist.barrier()
    if world_size > 1:
        found = [None] * world_size
        dist.all_gather_object(found, (len(source), *(os.path.basename(source.name(i)) for i in (0, len(source) - 1))))
        if len(set(found)) > 1:
            raise UsageError("--data: the processes do not see the same images: "
                             + "; ".join("{} from {} to {}".format(*x) for x in sorted(set(found))))
    if state and saved["num_images"] != len(source):
        raise UsageError(f"--resume: the run had {saved['num_images']} images, --data {given['data']} has "
                         f"{len(source)}")
    keep_out = ("resume", "overwrite", "prepare", "tokenizer_id", "device", "precision", "workers", "world_size",
                "num_images")
    settings = settle({k: v for k, v in given.items() if k not in keep_out}, len(source), source.image_size, world_size)
    if state:
        settings["base_lr"] = saved["base_lr"]
    if "regions" in mim.METHODS[settings["method"]].inputs:
        settings.setdefault("regions", default_regions(settings["method"], settings["data"]))
        if settings["regions"] == "cam" and settings["method"] != "objmae":
            raise UsageError("--regions cam is for objmae; rae and rmae take fh, panoptic, instances or a folder")
        for name, kind in (("fh_scales", "fh"), ("cam_weights", "cam"), ("cam_labels", "cam")):
            if settings.get(name) and settings["regions"] != kind:
                raise UsageError(f"--{name.replace('_', '-')} is for --regions {kind}, not {settings['regions']}")
        if settings["regions"] == "fh":
            settings.setdefault("fh_scales", default_scales(source, settings["data"]))
            for scale in settings["fh_scales"]:
                check_ranges(dict(fh_scales=scale), ("fh_scales",), ())
    settings["loader"] = choose_loader(settings, source, on_cuda)
    return source, settings | dict(num_images=len(source), world_size=world_size)


def choose_loader(settings, source, on_cuda):
    """--loader, or its default; UsageError if it cannot be."""
    possible = source.in_memory and "regions" not in settings
    loader = settings.get("loader", "device" if on_cuda and possible else "workers")
    check_choice("--loader", loader, ["workers", "device"])
    if loader == "device" and not possible:
        raise UsageError("--loader device is for shapes, cifar10, cifar100 and stl10, and for methods without regions")
    return loader


def update_maps(run):
    """AMT: this process's share of the training images, whole and resized, through the encoder."""
    whole = Images(run.source, run.settings["image_size"], "whole")
    share = torch.utils.data.Subset(whole, range(run.rank, len(whole), run.world_size))
    loader = make_loader(share, run.workers, run.device, batch_size=256)
    loader = tqdm(loader, "attention maps", leave=False, disable=run.rank > 0)
    put = lambda x: x.to(run.device, non_blocking=True)  # noqa: E731
    batches = ((normalize(put(b["image"])), put(b["index"])) for b in loader)
    with run.amp():
        run.method.update_maps(batches, len(whole))


LOGGED = ("accuracy", "perplexity", "codes_used")  # of the tokens


def train_epoch(run, epoch):
    """One pass over the data -> the line for log.jsonl: the mean of the loss and its parts, speed, learning rate."""
    settings, device, accumulate = run.settings, run.device, run.settings["accumulate"]
    steps = run.settings["num_images"] // settings["batch_size"]
    run.batches.epoch, began, totals = epoch, time.perf_counter(), {}
    run.model.train()
    micro_batches = iter(run.loader)
    progress = tqdm(range(steps), desc=f"epoch {epoch + 1}/{settings['epochs']}", disable=run.rank > 0, leave=False)
    for i in progress:
        step = epoch * steps + i
        lr = learning_rate(step, settings["epochs"] * steps, settings["warmup_epochs"] * steps, settings["lr"],
                           settings["min_lr"])
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        losses = 0
        for micro in range(accumulate):
            batch = next(micro_batches)
            run.broken.watch(batch["broken"])
            images = normalize(batch["image"].to(device, non_blocking=True))
            inputs = {k: batch[k].to(device, non_blocking=True) for k in run.method.inputs if k in batch}
            if "progress" in run.method.inputs:
                inputs["progress"] = torch.full((), step / (settings["epochs"] * steps), device=device)
            # Masks depend on the step and the micro-batch alone: no stop and no number of processes changes them.
            torch.manual_seed(seed_of(settings["seed"], step, micro * run.world_size + run.rank))
            last = micro == accumulate - 1
            with contextlib.nullcontext() if last or run.world_size == 1 else run.model.no_sync():
                with run.amp():
                    out = run.model(images, **inputs)
                run.scaler.scale(out["loss"] / accumulate).backward()
            parts = {k: v.detach() / accumulate for k, v in out.items() if k.startswith("loss") or k in LOGGED}
            losses = losses + torch.stack(list(parts.values()))
        if settings["clip_grad"]:
            run.scaler.unscale_(run.optimizer)
            torch.nn.utils.clip_grad_norm_(run.method.parameters(), settings["clip_grad"])
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        losses = dict(zip(parts, losses.tolist()))  # the step's one wait for the device
        if not math.isfinite(losses["loss"]):
            raise UsageError(f"the loss is {losses['loss']} at step {step + 1} (epoch {epoch + 1}), learning rate "
                             f"{lr:.3g}; {run.output / 'checkpoint.pt'} is of epoch {epoch}: try a lower --lr, "
                             "--clip-grad or --precision fp32")
        totals = {k: totals.get(k, 0.0) + v / steps for k, v in losses.items()}
        speed = (i + 1) * settings["batch_size"] / (time.perf_counter() - began)
        progress.set_postfix_str(f"loss {losses['loss']:.4f}, {speed:.0f} images/s")
    seconds = time.perf_counter() - began
    totals = average_over_processes(totals, device, run.world_size)
    return dict(epoch=epoch + 1, step=(epoch + 1) * steps, **totals, lr=lr,
                images_per_s=round(steps * settings["batch_size"] / seconds, 1))


def prepare_regions(run, given):
    """The regions of the run's images, those to be computed shared out over the processes."""
    settings = run.settings
    if run.rank == 0:
        print(f"regions: {settings['regions']}")
    options = {k: settings[k] for k in ("cam_weights", "cam_labels") if k in settings}
    regions = open_regions(settings["regions"], run.source, settings["data"], "pretrain", settings.get("fh_scales"),
                           settings.get("region_cache", "data/regions"), device=run.device, **options)
    if hasattr(regions, "fill"):
        regions.fill(given.get("workers", cores()), run.rank, run.world_size)
    if hasattr(regions, "found") and regions.found < len(run.source) and run.rank == 0:
        print(f"regions: {len(run.source) - regions.found} of {len(run.source)} images have no masks in "
              f"{settings['regions']}")
    if run.world_size > 1:
        dist.barrier()
    return regions


def prepare(given):
    """Everything that a run needs, from the user's flags; run.epoch epochs are done, run.log holds their lines."""
    run = SimpleNamespace(epoch=0, log=[])
    run.output, state = open_output(given)
    if state:
        given = dict(precision=state["args"]["precision"]) | given
    run.device, precision, run.workers = settle_machine(given)
    on_cuda = run.device.type == "cuda"
    run.rank, run.world_size = join_processes(run.device)
    run.source, run.settings = settle_run(given, state, run.rank, run.world_size, on_cuda)
    settings = run.settings = run.settings | dict(precision=precision)
    if run.rank == 0:
        shown = {k: v for k, v in settings.items() if k not in ("method_options", "num_images")}
        shown |= settings["method_options"]
        print(run.source.description)
        if takes_tokenizer(settings["method"]):
            print(f"target: {'tokens of ' + settings['tokenizer'] if settings.get('tokenizer') else 'pixels'}")
        shown |= dict(device=run.device, workers=run.workers)
        print("\n".join(f"  {k:14s} {v}" for k, v in shown.items()))
    run.amp = lambda: torch.autocast(run.device.type, PRECISIONS[precision], enabled=precision != "fp32")
    torch.manual_seed(settings["seed"])
    run.method = build_method(settings).to(run.device)
    settings["tokenizer_id"] = tokenizer_id(run.method)
    run.optimizer = torch.optim.AdamW(parameter_groups(run.method, settings["weight_decay"]), lr=settings["lr"],
                                      betas=tuple(settings["betas"]), fused=run.device.type in ("cuda", "cpu"))
    if settings["lookahead"]:
        run.optimizer = Lookahead(run.optimizer, settings["lookahead"])
    run.scaler = torch.amp.GradScaler(run.device.type, enabled=precision == "fp16")
    if state:
        restore(run, state)
    if settings["compile"]:
        run.method.compile(dynamic=False)
    run.model = run.method
    if run.world_size > 1:
        run.model = DistributedDataParallel(run.method, broadcast_buffers=False, gradient_as_bucket_view=True)
    run.regions = prepare_regions(run, given) if "regions" in run.method.inputs else None
    dataset = Images(run.source, settings["image_size"], "crop", tuple(settings["crop_scale"]), settings["flip"],
                     settings["seed"], regions=run.regions)
    micro_batch = settings["batch_size"] // run.world_size // settings["accumulate"]
    run.batches = EpochBatches(len(dataset), settings["batch_size"], micro_batch, settings["seed"], run.rank,
                               run.world_size)
    if settings["loader"] == "device":
        run.loader = DeviceLoader(dataset, run.batches, run.device)
    else:
        run.loader = make_loader(dataset, run.workers, run.device, batch_sampler=run.batches)
    run.broken = BrokenFiles(run.source, tqdm.write)
    return run


def main(argv):
    """One training run, from the command line to the files in --output."""
    given = parse(argv)
    run = prepare(given)
    if given.get("prepare"):
        if run.world_size > 1:
            dist.destroy_process_group()
        return
    output, epochs = run.output, run.settings["epochs"]
    if run.rank == 0:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output {output}: {error.strerror}") from None
        if run.epoch == 0:  # says now, and not after the first epoch, if this cannot be written
            save_run(run)
        write_log(output / "log.jsonl", run.log)
        examples = picture_items(Images(run.source, run.settings["image_size"], "center", regions=run.regions))
    while run.epoch < epochs:
        began = time.perf_counter()
        if hasattr(run.method, "maps_due") and run.method.maps_due(run.epoch, epochs):
            update_maps(run)
        line = train_epoch(run, run.epoch)
        line["seconds"] = round(time.perf_counter() - began, 3)
        if not all_finite(run.method):
            raise UsageError(f"the weights are no longer finite after epoch {run.epoch + 1}; {output}/checkpoint.pt is "
                             f"of epoch {run.epoch}: try a lower --lr, --clip-grad or --precision fp32")
        run.epoch += 1
        if run.world_size > 1:  # a file is broken for all, and all stop together if there are too many
            found = [None] * run.world_size
            dist.all_gather_object(found, run.broken.found)
            run.broken.found = set().union(*found)
            run.broken.check()
        if run.broken.found:
            line["broken_images"] = len(run.broken.found)
        if run.rank == 0:
            tqdm.write(", ".join(f"{k} {v:.4g}" for k, v in line.items()))
            run.log.append(json.dumps(line))
            write_log(output / "log.jsonl", run.log)
            save_picture(output / "reconstruction.png", run.method, examples, run.device, run.settings["seed"])
            save_run(run)
    if run.rank == 0:
        print(f"{epochs} epochs done: {output}/ holds checkpoint.pt, encoder.pt, log.jsonl and reconstruction.png")
    if run.world_size > 1:
        dist.destroy_process_group()


def average_over_processes(totals, device, world_size):
    """The mean of a dict of floats over all processes."""
    if world_size == 1:
        return totals
    values = torch.tensor(list(totals.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(totals, (values / world_size).tolist()))


def exit_with_one_line(program, main):
    """Runs main(); a user's mistake, an interrupt or a full memory ends in one line on stderr, not in a traceback."""
    try:
        main()
        return 0
    except UsageError as error:  # one from a worker process brings its traceback; the last line is the message
        message = str(error).strip().splitlines()[-1].removeprefix("datasets.UsageError: ")
    except torch.OutOfMemoryError as error:
        advice = ("a smaller --batch-size or a larger --accumulate" if program == "train.py" else
                  "a smaller --batch-size (256 images are held at a time, or fewer), or no --cache-features")
        message = f"out of memory: use {advice} ({str(error).splitlines()[0]})"
    except OSError as error:
        message = f"{error.filename or 'system'}: {error.strerror or error}"
    except KeyboardInterrupt as error:
        kept = "the last epoch's checkpoint is kept, --resume continues from it"
        kept = kept if program == "train.py" else str(error)
        print(f"\n{program}: interrupted{kept and '; ' + kept}", file=sys.stderr)
        return 130
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(exit_with_one_line("train.py", lambda: main(sys.argv[1:])))
