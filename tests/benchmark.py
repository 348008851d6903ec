"""What methods cost and what they give; not part of the test suite: `python tests/benchmark.py speed --model
base`.

speed: what a training step of each method costs. costs: operations by the settings that the papers vary.
data: what reading images costs. compare: what all methods, or the rows of a paper's ablation, give when they
are pre-trained and evaluated alike. cuda: whether everything works on a GPU. recipes: every setting of the
papers, and where it stands. Each prints a table, and its numbers as one line of JSON last. Two draw pictures:
masks, one image under the mask of each method; attention, where several encoders look.
"""

import contextlib
import inspect
import io
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import mim  # noqa: E402
import train  # noqa: E402
from datasets import (MEAN, SMALL, STD, DeviceLoader, EpochBatches, Images, SceneInstances,  # noqa: E402
                      UsageError, collate, default_regions, denormalize, explained, load_data, normalize)
from train import NonNegativeInt, Parser, PositiveInt  # noqa: E402
from train import autocast, call, exit_with_one_line  # noqa: E402

# ------------------------------------------------------------------------------------------------------
# speed

VOCABULARY = dict(vocab_size=8192)  # DALL-E's; tokens are drawn at random, so that no tokenizer takes time
VARIANTS = {  # name: (method, its arguments); "vit" is the encoder alone on all patches
    "vit": (None, {}),
    "mae": ("mae", {}), "simmim": ("simmim", {}), "beit": ("beit", VOCABULARY),
    "amt": ("amt", {}), "amt-simmim": ("amt", dict(base="simmim")),
    "lomar": ("lomar", {}),
    "objmae-1/2": ("objmae", dict(alpha=1 / 2)), "objmae-1/4": ("objmae", dict(alpha=1 / 4)),
    "objmae-1/8": ("objmae", dict(alpha=1 / 8)), "objmae-1/16": ("objmae", dict(alpha=1 / 16)),
    "rae": ("rae", {}), "rmae": ("rmae", {}), "rmae-batch": ("rmae", dict(variant="batch")),
    "cae": ("cae", {}), "cae-token": ("cae", VOCABULARY),
}


class Plain(nn.Module):
    """A ViT under a loss, to time its pass over all patches."""

    inputs = ()

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return dict(loss=self.encoder(images).square().mean())


def build_variant(name, image_size, patch_size, model):
    """A variant by its name -> the method (or Plain), for ViT of that size."""
    method, options = VARIANTS[name]
    if method is None:
        with explained(f"--image-size {image_size}", "there is no such ViT"):
            return Plain(mim.ViT(image_size, patch_size, **mim.SIZES[model]))
    return train.build_method(method, image_size, patch_size=patch_size, model=model, **options)


def synthetic_batch(method, batch_size, device="cpu"):
    """Random images and whatever else the method takes in training, as keyword arguments.

    ObjMAE gets no regions: then the whole image is the object, the most work that alpha leaves.
    """
    H, W = method.encoder.image_size
    rows, columns = torch.meshgrid(torch.arange(H) * 4 // H, torch.arange(W) * 4 // W, indexing="ij")
    regions = (1 + 4 * rows + columns).to(torch.uint8).expand(batch_size, 1, -1, -1)  # 16 squares
    box, flip = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor(False)
    values = dict(regions=regions, index=torch.arange(batch_size), flip=flip.expand(batch_size),
                  box=box.expand(batch_size, -1))
    names = () if isinstance(method, mim.ObjMAE) else method.inputs
    batch = dict(images=torch.randn(batch_size, 3, H, W)) | {name: values[name] for name in names}
    if getattr(method, "vocab_size", None):
        batch["tokens"] = torch.randint(method.vocab_size, (batch_size, method.encoder.num_patches))
    if hasattr(method, "maps_due"):  # masks from maps that are there, as nearly always in training
        method.maps = torch.rand(batch_size, *method.encoder.grid, device=device).half()
    return {name: value.to(device) for name, value in batch.items()}


def make_step(model, batch, device, precision):
    """A function that takes one training step, AdamW's included, and returns its seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step(call=model):
        began = time.perf_counter()
        with autocast(device, precision):
            loss = call(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def count_gmac(model, batch):
    """10^9 multiply-adds of matrix products and convolutions for one image: forward alone, forward and
    backward."""
    one = {name: value[:1] for name, value in batch.items()}
    with sdpa_kernel(SDPBackend.MATH):  # older torch does not count all fused kernels
        with FlopCounterMode(display=False) as forward:
            loss = model(**one)["loss"]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    model.zero_grad()
    return forward.get_total_flops() / 2e9, (forward.get_total_flops() + backward.get_total_flops()) / 2e9


def matmul_peak(device, dtype, seconds=2.0):
    """The most multiply-adds a second (in 10^9) that a large matrix product reaches here."""
    n = 8192 if device.type == "cuda" else 2048
    a, best, until = torch.randn(n, n, device=device, dtype=dtype), math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return n**3 / best / 1e9


def speed(methods: list[Literal[tuple(VARIANTS)]] | None = None,
          reference: Literal[tuple(VARIANTS)] = "mae", model: Literal[tuple(mim.SIZES)] | None = None,
          image_size: PositiveInt = 224, patch_size: PositiveInt = 16, batch_size: PositiveInt | None = None,
          repeats: PositiveInt = 5, compile: bool = False, device="cpu", precision="fp32"):
    """Parameters, GMAC of the forward pass, training images/s, ratio to the reference, share of the matmul
    peak, peak memory: a table.

    `rate` is the multiply-adds a second of a variant's steps, forward and backward, over the reference's:
    below 1 where more than products takes time. Its steps and the reference's take turns, so that what else
    the machine does falls on both. A compiled variant's ratio is to the compiled reference. The tokenizer of
    token targets and AMT's updates of its maps are not part of the time.

    methods: some of the variants (default: all)
    reference: the variant that the others are compared with
    model: size of the encoder (default: base on CUDA, else small)
    image_size: pixels
    patch_size: pixels
    batch_size: images a step (default: 64 on CUDA, else 4)
    repeats: timed steps of each variant
    compile: with torch.compile too
    """
    on_cuda, rows = device.type == "cuda", []
    model, batch_size = model or ("base" if on_cuda else "small"), batch_size or (64 if on_cuda else 4)
    peak = matmul_peak(device, train.PRECISIONS[precision])
    print(f"ViT-{model}/{patch_size}, {image_size} pixels, batch {batch_size}, {precision}, {device}; matmul "
          f"peak {peak:.0f} GMAC/s")
    print(f"{'':12s}{'parameters':>11s}{'GMAC':>8s}{'images/s':>10s}{'x ' + reference:>7s}{'rate':>7s}"
          + f"{'of peak':>9s}" + f"{'MiB':>8s}" * on_cuda + f"{'compiled':>10s}{'ratio':>7s}" * compile)

    def prepare(name):
        variant = build_variant(name, image_size, patch_size, model).to(device).train()
        batch = synthetic_batch(variant, batch_size, device)
        return variant, make_step(variant, batch, device, precision), count_gmac(variant, batch)

    other, reference_step, (_, reference_gmac) = prepare(reference)
    reference_step()  # from here on the memory has its optimizer's state
    others = {"": other, "compiled_": torch.compile(other, dynamic=False) if compile else None}
    for name in tqdm(methods or list(VARIANTS), leave=False, disable=not on_cuda):
        before = torch.cuda.memory_allocated() if on_cuda else 0
        variant, step, (gmac, step_gmac) = prepare(name)
        parameters = sum(p.numel() for p in variant.parameters() if p.requires_grad)
        row = dict(name=name, parameters=parameters, gmac=round(gmac, 4))
        calls = {"": variant}
        if compile:
            calls["compiled_"] = torch.compile(variant, dynamic=False)
        for prefix, function in calls.items():
            times = [(step(function), reference_step(others[prefix])) for _ in range(repeats + 2)]
            mine, usual = (min(some[2:]) for some in zip(*times))  # two warm up
            row[prefix + "images_per_s"] = round(batch_size / mine, 2)
            row[prefix + "ratio"] = round(usual / mine, 3)
            if not prefix:
                row["rate"] = round(usual / mine * step_gmac / reference_gmac, 3)
                row["of_peak"] = round(step_gmac * batch_size / mine / peak, 3)
            if not prefix and on_cuda:
                torch.cuda.reset_peak_memory_stats()
                step()
                row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        line = f"{name:12s}{parameters / 1e6:10.1f}M{gmac:8.2f}{row['images_per_s']:10.2f}{row['ratio']:7.2f}"
        line += f"{row['rate']:7.2f}{100 * row['of_peak']:8.1f}%"
        line += f"{row['peak_mib']:8d}" if on_cuda else ""
        line += f"{row['compiled_images_per_s']:10.2f}{row['compiled_ratio']:7.2f}" if compile else ""
        tqdm.write(line)
        rows.append(row)
        del variant, step, calls, function
    return dict(rows=rows, matmul_peak_gmac_per_s=round(peak), model=model, image_size=image_size,
                patch_size=patch_size, batch_size=batch_size, repeats=repeats, reference=reference,
                compile=compile)


# ------------------------------------------------------------------------------------------------------
# data


def data(data: str = "shapes", image_size: PositiveInt = 224, limit: PositiveInt = 200,
         repeats: PositiveInt = 3):
    """Images/s of reading, decoding, cropping and flipping on one core: the usual pipeline of Pillow and
    transforms v1 as MAE's code has it, and `Images`, which leaves normalisation to the device. They take
    turns.

    data: a folder of image files
    image_size: pixels
    limit: so many of the images
    repeats: timed passes
    """
    source = load_data(data, "pretrain", limit=limit)
    if source.in_memory:
        raise UsageError(f"data reads image files, and --data {data} is none: give a folder")
    transform = transforms.Compose([
        transforms.RandomResizedCrop(image_size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def usual(index):
        try:
            with open(source.name(index), "rb") as file:
                return transform(Image.open(file).convert("RGB"))
        except Exception as error:
            raise UsageError(f"{source.name(index)} cannot be decoded as an image ({error})") from None

    images = Images(source, image_size)
    torch.set_num_threads(1)
    seconds = dict(usual=[], ours=[])
    for epoch in range(repeats + 1):
        for name, read in (("usual", usual), ("ours", lambda index: images[epoch, index])):
            began = time.perf_counter()
            for index in tqdm(range(len(source)), desc=name, leave=False):
                read(index)
            seconds[name].append(time.perf_counter() - began)
    # The median of the passes but for the first, which warms up.
    rates = {name: len(source) / sorted(some[1:])[len(some) // 2 - 1] for name, some in seconds.items()}
    print(f"{source.description}: {rates['usual']:.0f} images/s with Pillow and transforms v1, "
          f"{rates['ours']:.0f} here, {rates['ours'] / rates['usual']:.2f} times as many")
    return {name: round(rate, 1) for name, rate in rates.items()} | dict(
        ratio=round(rates["ours"] / rates["usual"], 3), data=data)


# ------------------------------------------------------------------------------------------------------
# compare: a table of what each method gives for the same epochs

# Rows: what train.py is told. Options may follow a name, so that an ablation is a row of its own:
# amt:throw=low, cae:decoder_depth=0,alignment_weight=0.
COMPARED = {
    "mae": "--method mae", "simmim": "--method simmim", "beit": "--method beit --tokenizer",
    "amt": "--method amt", "amt-simmim": "--method amt --base simmim", "lomar": "--method lomar",
    "objmae": "--method objmae", "objmae-inter": "--method objmae --selection inter", "rae": "--method rae",
    "rmae": "--method rmae", "cae": "--method cae", "cae-token": "--method cae --tokenizer",
}
# The papers' ablations, as rows. With object_floor=1 the whole image is ObjMAE's one object: MAE with an
# alpha. Those that end in -small are for 8 x 8 patches, as the scenes have.
ABLATIONS = {
    "amt-table-2": "simmim amt-simmim:throw_ratio=0 amt-simmim amt-simmim:mask_ratio=0.33,throw_ratio=0.5",
    "amt-table-4": "mae amt:throw_ratio=0 amt:throw=random amt:mask_ratio=0.75,throw_ratio=0.1 amt:throw=low "
                   "amt",
    "lomar-table-4": "lomar:window_size=5 lomar:window_size=7 lomar:window_size=9 lomar:window_size=11 "
                     "lomar:window_size=14",
    "lomar-table-4-small": "lomar:window_size=3 lomar:window_size=5 lomar:window_size=8",
    "objmae-table-8": "objmae objmae-inter objmae:alignment=replicate objmae:alignment=random",
    "objmae-table-9": "objmae:alpha=0.25 objmae:alpha=0.17 objmae:alpha=0.05 objmae:object_floor=1,alpha=0.5 "
                      "objmae:object_floor=1,alpha=0.25 objmae:object_floor=1,alpha=0.17",
    "rmae-table-1a": "rae:num_regions=1 rae:num_regions=4 rae rae:num_regions=16",
    "rmae-table-1c": "rae rae:variant=batch rae:variant=channel",
    "rmae-table-1d": "rae:regions=fh rae:regions=instances mae",
    "rmae-table-1e": "mae rmae:cross_feed=both rmae rmae:cross_feed=region_to_pixel",
    "rmae-figure-4": "rmae:region_mask_ratio=0.6 rmae rmae:region_mask_ratio=0.9 rmae:mask_ratio=0.6",
    "cae-table-2": "cae-token:decoder_depth=0,alignment_weight=0 cae-token:alignment_weight=0 cae-token",
    "cae-table-5": "cae-token:mask_ratio=0.4 cae-token cae-token:mask_ratio=0.6",
    "cae-table-6": "cae-token:regressor_depth=1,decoder_depth=1 cae-token:regressor_depth=4,decoder_depth=4",
}
# What can be measured of an encoder: the task of eval.py with its flags, and its figures by their column
MEASURES = {
    "knn": ("knn --pool mean", {"k-NN": "top1"}),
    "linear": ("linear --pool mean --cache-features", {"linear": "top1"}),
    "attentive": ("attentive --cache-features", {"attentive": "top1"}),
    "finetune": ("finetune --pool mean", {"fine-tuned": "top1"}),
    "semseg-linear": ("semseg --head linear --freeze", {"mIoU, linear": "miou"}),
    "semseg": ("semseg", {"mIoU, UPerNet": "miou"}),
    "detect": ("detect", {"box AP": "box_ap", "mask AP": "mask_ap"}),
    "attention": ("attention --regions instances --query 0",
                  {"object": "attention_main", "area": "area_main"}),
    "segment": ("segment", {"IoU, own image": "iou_80", "another": "other_image_80"}),  # of rae and rmae
}


def flags(**values):
    """Keywords -> words of a command line; None: the flag is left out, True: it stands alone."""
    words = []
    for name, value in values.items():
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return words


def split_row(row):
    """The row "amt:throw=low,norm_pix=false" -> its name, "amt", and the words of its options, ["--throw",
    "low", "--no-norm-pix"]."""
    name, _, options = row.partition(":")
    if name not in COMPARED:
        raise UsageError(f"--methods {row}: there is no row {name} (choose from {', '.join(COMPARED)}); "
                         "options come after a colon, as in amt:throw=low,interval=2")
    words = []
    for option in options.split(",") if options else []:
        argument, _, value = option.partition("=")
        if not argument or not value:
            raise UsageError(f"--methods {row}: an option is NAME=VALUE, got {option!r}")
        if argument == "epochs":
            raise UsageError(f"--methods {row}: all rows have the same --epochs")
        flag = argument.replace("_", "-")
        words += dict(true=[f"--{flag}"], false=[f"--no-{flag}"]).get(value, [f"--{flag}", value])
    return name, words


def folder_of(output, row, epochs):
    """The folder of a row's run, whose name has no character that some file system refuses."""
    return output / f"{re.sub(r'[^A-Za-z0-9_.,=-]+', '_', row)}-{epochs}"


def train_command(name, epochs, output, small=False, compile=False, **common):
    """train.py's arguments for a row of the table, or for the tokenizer, `dvae`, but for --output."""
    if name == "dvae":
        common |= dict(model=None, patch_size=None)
        return ["train.py", "--method", "dvae", *flags(**common, compile=compile)]
    name, options = split_row(name)
    words = [*COMPARED[name].split(), "--epochs", str(epochs)]
    if "--tokenizer" in words:
        words.insert(words.index("--tokenizer") + 1, str(output / "dvae" / "checkpoint.pt"))
    if words[1] == "objmae" and small and default_regions("objmae", common["data"]) == "cam":
        words += ["--regions", "fh"]  # ImageNet's ResNet-50 has no maps of small images
    return ["train.py", *words, *flags(**common, compile=compile), *options]


def eval_commands(folder, measures, finetune_epochs, probe_epochs, untrained=False, **common):
    """eval.py's arguments for measures of the encoder in a folder, or of an untrained one. All have MAE's
    settings, whatever made them, and pool by the mean: some methods train no class token."""
    commands, epochs = {}, dict(finetune=finetune_epochs, linear=probe_epochs, attentive=probe_epochs)
    for measure in measures:
        task, *words = MEASURES[measure][0].split()
        functions = evaluation.functions_of(task)
        whole = evaluation.open_method in functions
        if whole and (untrained or not folder.name.startswith(("rae", "rmae"))):
            continue
        checkpoint = "random" if untrained else folder / ("checkpoint.pt" if whole else "encoder.pt")
        known = [*train.flags_of(functions)]
        if evaluation.open_pair not in functions:  # the others have no training images to limit
            known.remove("limit")
        words += flags(epochs=epochs.get(task))
        if "output" in known:
            words += flags(output=folder / f"{measure}.{'pt' if task in evaluation.FINISHED else 'png'}")
        words += flags(method="mae" if "method" in known else None)
        words += flags(**{name: value for name, value in common.items() if name in known})
        commands[measure] = ["eval.py", str(checkpoint), "--task", task, *words]
    return commands


def plain_gmac(encoder):
    """10^9 multiply-adds of an encoder's pass over all patches of an image, forward and backward."""
    return count_gmac(Plain(encoder), dict(images=torch.zeros(1, 3, *encoder.image_size)))[1]


def map_gmac(encoder):
    """10^9 multiply-adds of AMT's map of an image. Most of the last block takes no part in it."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.last_attention(torch.zeros(1, 3, *encoder.image_size))
    return counter.get_total_flops() / 2e9


def training_gmac(method, epochs):
    """10^9 multiply-adds that an image costs in pre-training, the mean over the epochs: forward, backward
    and AMT's passes for its maps.

    Those of a tokenizer are left out.
    """
    gmac = count_gmac(method, synthetic_batch(method, 1))[1]
    if hasattr(method, "maps_due"):
        first = min(epochs, method.interval_for(epochs))  # epochs of the base's own masks, before the maps
        due = sum(method.maps_due(epoch, epochs) for epoch in range(epochs)) * (method.throw != "random")
        base = count_gmac(method.base, synthetic_batch(method.base, 1))[1]
        gmac = (first * base + (epochs - first) * gmac + due * map_gmac(method.encoder)) / epochs
    return gmac


def build_compared(name, source, **command):
    """The method that a row's command trains, and the settings that its run would take."""
    def settings(name):
        return train.settle(train.parse(train_command(name, **command)[1:]), source)

    args = settings(name)
    if args.get("tokenizer"):
        args["vocab_size"] = settings("dvae")["vocab_size"]
    return train.build_method(**args), args


def carry_out(command, log):
    """Runs a command unless its log says that it has been; returns the log's last line.

    The log is the command, what it printed, and last its result; beside it, as .err, what went to stderr.
    UsageError if the command fails, or if another command's run is there.
    """
    text, errors = "python " + " ".join(command), log.with_suffix(".err")
    lines = log.read_text(errors="replace").split("\n") if log.exists() else [""]
    if lines[0] == text and len(lines) > 2 and (lines[-2].startswith("{") or "next: python" in lines[-2]):
        return lines[-2]
    kept = log.with_suffix(".pt") if log.name != "train.txt" else log.with_name("checkpoint.pt")
    resume = kept.exists()
    if resume and lines[0] != text:
        before = lines[0] or "without a log"
        raise UsageError(f"{log.parent} holds a run of another command, {before}: choose another --output")
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(ROOT / command[0]), *command[1:], *flags(resume=resume)]
    with open(log, "w") as out, open(errors, "w") as err:
        print(text, file=out, flush=True)
        # With a preexec_fn Python runs become_program's hook, by which the command ends with this process.
        code = subprocess.run(words, stdout=out, stderr=err, preexec_fn=lambda: None).returncode
    if code:
        said = errors.read_text(errors="replace").strip().splitlines()
        why = f"killed by signal {-code}" if code < 0 else said[-1] if said else f"it ended with {code}"
        raise UsageError(f"{text}: {why}")
    return log.read_text(errors="replace").split("\n")[-2]


def compare_row(name, epochs, output, measures, finetune_epochs, probe_epochs, compile, small, **common):
    """Pre-trains and measures one encoder -> dict(name, epochs, seconds, the figures of each measure by their
    columns)."""
    folder = output / name if name == "random" else folder_of(output, name, epochs)
    row = dict(name=name, epochs=epochs, seconds=0.0)
    if name == "random":
        commands = eval_commands(folder, measures, finetune_epochs, probe_epochs, untrained=True, **common)
    elif name == "supervised":
        commands = eval_commands(folder, ["finetune"], epochs, probe_epochs, untrained=True, **common)
        # From scratch all layers have the full rate, and on small images a quarter of ViT-nano's is better.
        commands["finetune"] += flags(layer_decay=1, base_lr=1e-3 if small else None)
    else:
        command = train_command(name, epochs, output, small, compile, **common)
        carry_out([*command, *flags(output=folder)], folder / "train.txt")
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        row |= dict(seconds=sum(line["seconds"] for line in lines), loss=round(lines[-1]["loss"], 4))
        common |= dict(model=None, patch_size=None)  # encoder.pt brings its own
        commands = eval_commands(folder, measures, finetune_epochs, probe_epochs, **common)
    for measure, command in commands.items():
        result = json.loads(carry_out(command, folder / f"{measure}.txt"))
        row |= {column: result[figure] for column, figure in MEASURES[measure][1].items()}
        row["seconds"] += result["seconds"]
    return row | dict(seconds=round(row["seconds"]))


def compare_table(share, measures, rows):
    """The rows -> Markdown, a line a method; share: its compute an image over MAE's."""
    columns = [column for measure in measures for column in MEASURES[measure][1]]
    lines = [["", "compute", *columns, "minutes"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        measured = [f"{row[column]:.1f}" if column in row else "" for column in columns]
        compute = f"{share[row['name']]:.2f}" if row["name"] in share else ""
        lines.append([row["name"], compute, *measured, f"{row['seconds'] / 60:.0f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def compare(methods: list[str] | None = None, ablation: Literal[tuple(ABLATIONS)] | None = None,
            measures: list[Literal[tuple(MEASURES)]] = ["knn", "linear", "attentive", "finetune"],
            data: str = "shapes", limit: PositiveInt | None = None,
            model: Literal[tuple(mim.SIZES)] | None = None, epochs: PositiveInt | None = None,
            finetune_epochs: PositiveInt | None = None, probe_epochs: PositiveInt | None = None,
            compile: bool = False, output: str | None = None, seed: NonNegativeInt = 0, device="cpu",
            chosen=None):
    """The methods, or a paper's ablation, under one budget: pre-trained for the same epochs and measured, and
    the minutes of a row's epochs and evaluations.

    Every row is a sequence of train.py and eval.py commands, which its logs in --output show. What is there
    is not done again, so that the table goes on after an interrupt, even if code, defaults or machine have
    changed since: another --output starts anew. The first failure ends it. `random` is
    the untrained encoder, its fine-tuning supervised training from scratch; `supervised` is that for the
    compute of MAE's pre-training and fine-tuning together.

    methods: some of the rows, also with options of train.py, as amt:throw=low (default: all)
    ablation: the rows of a paper's table (not with --methods)
    measures: what is measured of each
    data: as in train.py, with labels
    limit: so many of the training images, evenly spread
    model: size of the encoders
    epochs: of pre-training (default: 200 on CUDA, else 10)
    finetune_epochs: of fine-tuning (default: 30 on CUDA, else 5)
    probe_epochs: of the linear and the attentive probe (default: 90 on CUDA, else 30)
    compile: train with torch.compile
    output: folder of the runs (default: runs/compare-DATA)
    seed: of everything random

    chosen: those of --device, --precision and --workers that the commands get.
    """
    on_cuda = device.type == "cuda"
    epochs, probe_epochs = epochs or (200 if on_cuda else 10), probe_epochs or (90 if on_cuda else 30)
    finetune_epochs = finetune_epochs or (30 if on_cuda else 5)
    names = ABLATIONS[ablation].split() if ablation else methods or list(COMPARED)
    output = Path(output or f"runs/compare-{Path(data).name}")
    labelled = load_data(data, "train", limit=limit)
    if len(labelled.classes) < 2:
        raise UsageError(f"compare needs labels: a folder per class; {labelled.description}")
    source = load_data(data, "pretrain", limit=limit)
    small = source.image_size <= SMALL
    common = dict(data=data, seed=seed, limit=limit, model=model, **chosen or {})
    gmac = {}
    for name in dict.fromkeys(("mae", *names)):
        method, args = build_compared(name, source, epochs=epochs, output=output, small=small, **common)
        gmac[name] = training_gmac(method, epochs)
        if name == "mae":  # its encoder is that of all
            common |= dict(model=args["model"], patch_size=args["patch_size"])
            plain = plain_gmac(method.encoder)
    share = {name: some / gmac["mae"] for name, some in gmac.items()}
    scratch = epochs * gmac["mae"] * len(source) / (plain * len(labelled))
    if any("--tokenizer" in COMPARED[split_row(name)[0]] for name in names):
        command = train_command("dvae", None, output, small, compile, **common)
        carry_out([*command, *flags(output=output / "dvae")], output / "dvae" / "train.txt")
    rows = [("random", 0), *[("supervised", finetune_epochs + round(scratch))] * ("finetune" in measures)]
    rows += [(name, epochs) for name in names]
    print(f"{len(rows)} encoders; the commands and what they print are in {output}/", file=sys.stderr)
    done = []
    for name, count in tqdm(rows, "encoders"):
        done.append(compare_row(name, count, output, measures, finetune_epochs, probe_epochs, compile, small,
                                **common))
        tqdm.write(json.dumps(done[-1]), file=sys.stderr)
    print(compare_table(share, measures, done))
    return dict(rows=done, gmac={name: round(some, 4) for name, some in gmac.items()}, epochs=epochs,
                finetune_epochs=finetune_epochs, probe_epochs=probe_epochs, compile=compile, **common)


# ------------------------------------------------------------------------------------------------------
# costs: operations by the settings that the papers vary

COSTS = {
    "AMT, share thrown": "mae amt:throw_ratio=0 amt:throw_ratio=0.2 amt",
    "LoMaR, side of a window": "lomar:window_size=5 lomar lomar:window_size=9 lomar:window_size=11 "
                               "lomar:window_size=14",
    "ObjMAE, alpha": "objmae:alpha=0.5 objmae:alpha=0.25 objmae:alpha=0.17 objmae:alpha=0.125 "
                     "objmae:alpha=0.0625 objmae:alpha=0.05",
    "R-MAE, number of regions": " ".join(
        f"rmae:variant={variant},num_regions={count}" for variant in ("length", "batch", "channel")
        for count in (1, 4, 8, 16)),
    "RAE": "rae rae:region_dim=256 rae:region_dim=256,mask_ratio=0.6",
}


class Imagined:
    """Stands for data of which only the size and the number of images matter."""

    def __init__(self, image_size, count=100_000):
        self.image_size, self.count = image_size, count

    def __len__(self):
        return self.count


def costs(model: Literal[tuple(mim.SIZES)] = "base", image_size: PositiveInt = 224):
    """Multiply-adds of an image, forward, and forward and backward over MAE's, by the settings that the
    papers vary: LoMaR's Figure 5, ObjMAE's Tables 4 and 9, R-MAE's Tables 1b and 8 (where p_E stays 128).

    ObjMAE has the whole image as its object, the most that alpha leaves.

    model: size of the encoder
    image_size: pixels
    """
    rows, mae, source = [], None, Imagined(image_size)
    for title, names in COSTS.items():
        print(f"{title:40s}{'GMAC':>8s}{'x mae':>8s}")
        for name in names.split():
            try:
                method, _ = build_compared(name, source, epochs=800, output=Path(), data="/imagenet",
                                           model=model, image_size=image_size)
            except UsageError as error:  # a window that is larger than the image
                if mae is None:
                    raise
                print(f"  {name:38s}{error}")
                continue
            gmac, whole = count_gmac(method, synthetic_batch(method, 1))
            mae = mae or whole
            rows.append(dict(group=title, name=name, gmac=round(gmac, 3), ratio=round(whole / mae, 3)))
            print(f"  {name:38s}{gmac:8.2f}{whole / mae:8.2f}")
    return dict(rows=rows, model=model, image_size=image_size)


# ------------------------------------------------------------------------------------------------------
# cuda: a check of everything on a GPU

CHECKED = {"dvae": "--method dvae"} | COMPARED | {"lomar-token": "--method lomar --tokenizer"}
TASKS = {task: "rmae" if task == "segment" else "mae" for task in evaluation.TASKS}  # task: of which method
# How far a loss may be from the CPU's, relative to it. A compiled step draws other masks.
BOUNDS = dict(fp32=0.001, bf16=0.003, fp16=0.003, compiled=0.1)
DRAWS = ("aten.rand", "aten.multinomial", "aten.bernoulli_", "aten.exponential_")


class DrawnOnCPU(TorchDispatchMode):
    """Inside, random numbers are the CPU's on every device: CUDA's own give other masks for the same seed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = str(function.overloadpacket), kwargs or {}
        if name not in DRAWS:
            return function(*args, **kwargs)
        if name == "aten.rand":
            return function(*args, **kwargs | dict(device="cpu")).to(kwargs.get("device") or "cpu")
        drawn = function(args[0].cpu(), *args[1:], **kwargs)
        return args[0].copy_(drawn) if name.endswith("_") else drawn.to(args[0].device)


def short_run(name, output, device, precision, tokenizer, seed):
    """Trains a method on the scenes for two epochs of 3 steps, the second resumed -> the two losses."""
    compiled, words = precision == "compiled", CHECKED[name].split()
    if words[-1] == "--tokenizer":
        words.append(str(tokenizer))
    inputs = mim.METHODS[words[1]].inputs
    words += flags(data="shapes", limit=48, batch_size=16, seed=seed, device=device, output=output,
                   precision="fp32" if compiled else precision, compile=compiled,
                   interval=1 if "index" in inputs else None,  # AMT's maps are there in the second epoch
                   workers=(0 if str(device) == "cpu" else 2) if "regions" in inputs else None,
                   loader=None if "regions" in inputs else "device")  # then the CPU has the same crops
    drawn = contextlib.nullcontext() if compiled else DrawnOnCPU()
    with drawn, contextlib.redirect_stdout(io.StringIO()):
        train.main([*words, "--epochs", "1"])
        train.main([*words, "--epochs", "2", "--resume"])
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def short_task(task, folder, device, precision, seed):
    """A moment of a task of eval.py with what is trained in a folder."""
    method, _ = evaluation.open_method(str(folder / "checkpoint.pt"))
    size, scenes = method.encoder.image_size, load_data("shapes", "val", limit=32)
    options = dict(method=method, encoder=method.encoder, seed=seed, device=device, precision=precision)
    if task == "segment":
        options["dataset"] = Images(scenes, size, "center", regions=SceneInstances())
    elif task in ("reconstruct", "attention"):
        options |= train.picture_items(Images(scenes, size, "center"))
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            options |= evaluation.open_pair("shapes", task, size, limit=32, val_limit=32)
        options |= evaluation.recipe(task, method.encoder) | dict(epochs=1, batch_size=16)
    return call(evaluation.TASKS[task], options)


def same_crops(device):
    """Raises ValueError if the crops of DeviceLoader differ from the CPU's by more than a grey level."""
    dataset = Images(load_data("shapes", limit=48), 64)
    loaders = [DeviceLoader(dataset, EpochBatches(48, 16, 1), place) for place in ("cpu", device)]
    for one, other in zip(*loaders):
        if (one["image"].float() - other["image"].cpu().float()).abs().max() > 1:
            raise ValueError("the crops differ from the CPU's")


def cuda(methods: list[Literal[tuple(CHECKED)]] | None = None, compile: bool = False,
         seed: NonNegativeInt = 0, device="cpu", chosen=None):
    """Trains, resumes and evaluates on a GPU for a moment, and compares losses with the CPU's: a line each.

    Every method trains in fp32, bf16 and fp16, MAE compiled too. Its two losses must be within BOUNDS of the
    CPU's in fp32 of the same seed, step and masks. A failure ends only its own line (but for one that breaks
    the GPU's context), and the exit code is 1. Several GPUs (torchrun) are not tried.

    methods: some of the methods, beside dvae, the tokenizer of others, mae and rmae (default: all)
    compile: compile every method, which takes about half a minute each

    chosen: --device cpu goes through the same steps without a GPU, there without fp16.
    """
    on_cuda, rows = device.type == "cuda", []
    if not on_cuda and "device" not in (chosen or {}):
        raise UsageError("no GPU that torch can use; --device cpu goes through the same steps on the CPU")
    names = dict.fromkeys(("dvae", *TASKS.values(), *(methods or CHECKED)))
    print(f"{'':24s}{'CPU':>9s}{device.type:>9s}{'seconds':>9s}")

    def check(what, run, known=None, bound=math.inf):
        began, row = time.perf_counter(), dict(what=what, result="ok")
        try:
            found = run()
            if isinstance(found, list):
                row["loss"] = round(found[-1], 4)
            if known is not None:
                row["cpu"] = round(known[-1], 4)
                if not all(abs(a - b) <= bound * abs(b) for a, b in zip(found, known, strict=True)):
                    row["result"] = f"failed: losses {found}, on the CPU {known}"
        except Exception as error:  # the next check may still pass
            reason = " ".join(str(error).split())[:300]
            found, row["result"] = None, f"failed: {type(error).__name__}: {reason}"
        row["seconds"] = round(time.perf_counter() - began, 1)
        losses = "".join(f"{row[key]:9.4f}" if key in row else f"{'':9s}" for key in ("cpu", "loss"))
        print(f"{what:24s}{losses}{row['seconds']:9.1f}  {row['result']}", flush=True)
        rows.append(row)
        return found

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokenizer = folder / "dvae-cpu" / "checkpoint.pt"
        check("device loader", lambda: same_crops(device))
        for name in names:
            known = check(f"{name} on the CPU",
                          lambda: short_run(name, folder / f"{name}-cpu", "cpu", "fp32", tokenizer, seed))
            for precision, bound in BOUNDS.items():
                wanted = dict(fp16=on_cuda, compiled=compile or name == "mae").get(precision, True)
                output = folder / (name if precision == "fp32" else f"{name}-{precision}")
                if wanted:
                    check(f"{name} {precision}",
                          lambda: short_run(name, output, device, precision, tokenizer, seed), known, bound)
        for task, of in TASKS.items():
            check(f"eval {task}", lambda: short_task(task, folder / of, device, "bf16", seed))
    failed = [row["what"] for row in rows if row["result"] != "ok"]
    print(f"{len(rows)} checks, {len(failed)} failed" + ": " * bool(failed) + ", ".join(failed))
    return dict(rows=rows, failed=failed)


# ------------------------------------------------------------------------------------------------------
# recipes: every published setting, and where it stands

# Where the settings of train.RECIPES, of the encoders, of the tasks and of eval.PAPER_RECIPES come from:
# {recipe: {place: settings}}. What a recipe takes from another one, as LoMaR's from MAE's, stands at that one
# alone. The arguments of a method have their places beside them in mim.py.
PLACES = {
    "pretrain mae": {
        "MAE: Table 8": "batch_size base_lr lr_batch warmup_epochs betas weight_decay",
        "MAE: Table 1": "epochs",
        "MAE: the authors' code": "min_lr crop_scale flip"},
    "pretrain simmim": {
        "SimMIM: §4.1": "batch_size betas weight_decay crop_scale flip",
        "SimMIM: the released configuration of ViT-B":
            "epochs base_lr lr_batch warmup_epochs clip_grad drop_path layer_scale"},
    "pretrain cae": {
        "CAE: Appendix A": "epochs batch_size base_lr lr_batch warmup_epochs weight_decay drop_path",
        "CAE: §5.1": "flip",
        "CAE: the authors' code": "min_lr betas clip_grad crop_scale layer_scale"},
    "pretrain beit": {
        "BEiT: Table 6":
            "epochs batch_size base_lr lr_batch warmup_epochs min_lr betas weight_decay clip_grad drop_path",
        "BEiT: the authors' code": "crop_scale flip layer_scale"},
    "pretrain dvae": {
        "DALL-E: Appendix A.2": "batch_size base_lr lr_batch warmup_epochs min_lr betas weight_decay",
        "CAE: the authors' code": "image_size",
        "ours": "epochs crop_scale flip"},
    "pretrain amt-mae": {"AMT: §4.1": "epochs"},
    "pretrain amt-simmim": {"AMT: §4.1": "epochs"},
    "pretrain lomar": {
        "LoMaR: §6.1": "epochs batch_size base_lr warmup_epochs weight_decay flip",
        "LoMaR: §3.2": "relative_position"},
    "pretrain objmae": {
        "ObjMAE: Table 1": "model",
        "ObjMAE: Table 2": "min_lr betas weight_decay",
        "ObjMAE: Table 2, but its 5 steps are ours": "lookahead",
        "ObjMAE: Table 3": "epochs batch_size base_lr lr_batch warmup_epochs",
        "ObjMAE: §4.2": "flip"},
    "pretrain rae": {"R-MAE: §4.1": "epochs base_lr"},
    "pretrain rmae": {"R-MAE: §4.1": "epochs base_lr"},
    "knn mae": {
        "DINO, arXiv:2104.14294": "k", "Wu et al., arXiv:1805.01978": "temperature", "ours": "pool"},
    "knn lomar": {"ours": "pool"},
    "linear mae": {"MAE: Table 10": "epochs batch_size base_lr lr_batch usual_warmup", "MAE: A.1": "pool"},
    "linear lomar": {"ours": "pool"},
    "attentive mae": {"CAE: Appendix A": "epochs batch_size base_lr lr_batch usual_warmup"},
    "finetune mae": {
        "MAE: Table 9": "epochs batch_size lr_batch usual_warmup weight_decay drop_path label_smoothing",
        "MAE: the authors' code": "base_lr min_lr layer_decay pool"},
    "finetune mae-large": {
        "MAE: Table 9": "epochs base_lr layer_decay", "MAE: the authors' code": "drop_path"},
    "finetune mae-huge": {"MAE: the authors' code": "drop_path"},
    "finetune simmim": {"SimMIM: the released configuration of ViT-B": "base_lr lr_batch usual_warmup"},
    "finetune amt": {"AMT: the released command": "base_lr layer_decay", "AMT: §4.1": "pool"},
    "finetune amt-simmim": {
        "SimMIM: the released configuration of ViT-B": "base_lr lr_batch usual_warmup", "AMT: §4.1": "pool"},
    "finetune lomar": {"LoMaR: §6.1": "base_lr", "MAE: Table 9": "layer_decay"},
    "finetune objmae": {
        "ObjMAE: Table 2": "min_lr", "ObjMAE: Table 2, but its 5 steps are ours": "lookahead",
        "ObjMAE: Table 3": "batch_size base_lr"},
    "finetune cae": {"CAE: Appendix A": "epochs batch_size base_lr lr_batch layer_decay"},
    "finetune cae-base": {"CAE: Appendix A": "epochs base_lr layer_decay"},
    "finetune cae-large": {"CAE: Appendix A": "epochs base_lr layer_decay"},
    "semseg mae": {
        "CAE: Appendix A": "epochs batch_size base_lr layer_decay drop_path",
        "BEiT: the authors' code": "head lr_batch warmup_steps weight_decay width"},
    "semseg mae-large": {
        "CAE: Appendix A": "base_lr drop_path layer_decay", "CAE: the authors' code": "width"},
    "semseg rae": {"R-MAE: §4.2": "epochs"},
    "semseg rmae": {"R-MAE: §4.2": "epochs"},
    "detect mae": {
        "R-MAE: §4.1": "epochs batch_size warmup_steps",
        "ViTDet: Appendix A.2, arXiv:2203.16527":
            "base_lr lr_batch weight_decay layer_decay drop_path width window"},
    "detect mae-large": {"ViTDet: Appendix A.2, arXiv:2203.16527": "layer_decay drop_path"},
    "detect amt": {"AMT: §4.3": "epochs batch_size"},
    "detect lomar": {"LoMaR: §6.2": "epochs"},
    "segment mae": {"R-MAE: Figure 6": "image_visible", "ours": "count"},
}
PARENTS = {"pretrain amt-simmim": "pretrain simmim"}  # the other recipes take the rest from their task's MAE


def place_of(recipe, name):
    """Where a setting of a recipe stands; None if nothing says so."""
    for key in (recipe, PARENTS.get(recipe), recipe.split()[0] + " mae"):
        for place, names in PLACES.get(key, {}).items():
            if name in names.split():
                return place


def places_in(cls):
    """What is written beside the arguments of a method's constructor: {argument: place}."""
    paper = dict(RAE="R-MAE", RMAE="R-MAE", DVAE="DALL-E").get(cls.__name__, cls.__name__)
    written = re.findall(r"^ +(\w+): .*  # (.*)$", inspect.getsource(cls.__init__), re.MULTILINE)
    return {name: place if place.startswith("ours") else f"{paper}: {place}" for name, place in written}


def pretraining_settings(name):
    """(setting, value, place) of a recipe of train.RECIPES: those of the run, of the encoder, of the
    method."""
    method, _, base = name.partition("-")
    classes = [mim.METHODS[word] for word in (method, base) if word]
    settings = dict(image_size=[224, 224], base=base) | VOCABULARY | train.RECIPES[name]
    with torch.device("meta"):  # without memory
        built = train.build_method(method, **settings)
    options = getattr(classes[-1], "encoder_options", {})
    for setting, value in (train.RECIPES[name] | options).items():
        yield setting, value, place_of(f"pretrain {name}", setting)
    places = {name: place for cls in classes[::-1] for name, place in places_in(cls).items()}
    for setting, (parameter, _) in train.flags_of(classes).items():
        value = getattr(built, setting, None) if parameter.default is None else parameter.default
        if setting == "interval":
            value = built.interval_for(train.RECIPES[name]["epochs"])
        yield setting, value, places.get(setting)


def task_settings(task):
    """{setting: value} of a task's function for a ViT-B of MAE, with what the function hands to `fit`."""
    function = evaluation.TASKS[task]
    own = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    given = re.findall(r"\b(lr_batch|warmup_steps)=(\d+)", inspect.getsource(function))
    told = {name: int(value) for name, value in given}
    if "epochs" in own:
        usual = {name: p.default for name, p in inspect.signature(evaluation.fit).parameters.items()} | own
        names = ["lr_batch"] + ["usual_warmup"] * ("warmup_steps" not in told)
        told = {name: usual[name] for name in names} | told
    return told | {name: own[name] for name in train.flags_of([function]) if own[name]}


def recipes():
    """Prints every setting of the papers' recipes, for images of more than 96 pixels: the task, the recipe,
    its value, and where it stands. An evaluation's "mae" is what all methods have that say nothing else;
    "-large" and so on are for encoders of that size, or larger.
    """
    rows = []

    def add(task, recipe, settings):
        for name, value, place in settings:
            if value is not None:
                rows.append(dict(task=task, recipe=recipe, setting=name, value=value, place=place))

    for name in train.RECIPES:
        add("pretrain", name, pretraining_settings(name))
    for task in evaluation.TASKS:
        own = {f"{task} mae": task_settings(task)}
        own |= {key: some for key, some in evaluation.PAPER_RECIPES.items() if key.startswith(task + " ")}
        for key, some in own.items():
            add(task, key.split()[1], [(name, value, place_of(key, name)) for name, value in some.items()])
    for row in rows:
        value = row["value"]
        if isinstance(value, dict):  # {epochs: warm-up}
            value = ", ".join(f"{warmup:g} of {epochs}" for epochs, warmup in value.items())
        value = f"{value:g}" if isinstance(value, float) else str(value)
        print(f"{row['task']:10s}{row['recipe']:12s}{row['setting']:21s}{value:36s}{row['place']}")
    return dict(rows=rows)


# ------------------------------------------------------------------------------------------------------
# masks and attention: pictures


def open_picture(output):
    """The path of a picture; UsageError if something else is there."""
    path = Path(output)
    if path.exists() and evaluation.task_of(path) not in BENCHMARKS:
        raise UsageError(f"--output {output}: it is no picture of benchmark.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def frame_windows(image, ids, grid, patch_size):
    """Images [B, 3, H, W] in 0..1 with frames around their windows of patches [B, W, n], the first's in red.
    """
    places = torch.stack([ids % grid[1], ids // grid[1]], dim=-1)  # x, y
    boxes = torch.cat([places.amin(2), places.amax(2) + 1], dim=-1) * patch_size
    boxes[..., 2:] -= 1
    colours = ["red"] + ["yellow"] * (ids.shape[1] - 1)
    return torch.stack([draw_bounding_boxes(tile, frames.flip(0), colors=colours[::-1], width=4)  # red last
                        for tile, frames in zip(image, boxes)])


def attention_of(checkpoint, image, regions, grid):
    """What draws AMT's mask: the attention map [1, gh, gw] of a checkpoint's encoder, which sees the image at
    its own size. Without a checkpoint it is the region in the middle of the image, blurred."""
    if checkpoint is None:
        label = regions[:, :1, regions.shape[2] // 2, regions.shape[3] // 2, None, None]
        middle = F.adaptive_avg_pool2d((regions[:, :1] == label).float(), grid)
        return 0.1 + F.avg_pool2d(middle, 3, 1, 1)[:, 0]
    encoder = evaluation.open_encoder(checkpoint)[0].eval()
    small = v2.functional.resize(image, list(encoder.image_size), antialias=True)
    return mim.attention_map(encoder, small)


@torch.no_grad()
def mask_tiles(image, regions, patch_size, checkpoint=None, seed=0):
    """A normalised image [1, 3, H, W] and its label maps [1, L, H, W] -> {title: tile [1, 3, H, W]}: what
    each method with its paper's settings hides of it and leaves out."""
    size, p, shown = list(image.shape[-2:]), patch_size, denormalize(image)
    map = attention_of(checkpoint, image, regions, [side // p for side in size])
    inputs = dict.fromkeys(("objmae", "rmae"), dict(regions=regions))
    whole = torch.tensor([[0.0, 0, 1, 1]])
    inputs["amt"] = dict(index=torch.tensor([0]), box=whole, flip=torch.tensor([False]))

    def mask(name):
        method = train.build_method(name, size, patch_size=p, model="nano").eval()
        if name == "amt":
            method.maps = map.half()
        torch.manual_seed(seed)
        out, windows = method(image, **inputs.get(name, {})), getattr(method, "num_windows", 1)
        parts = [out[key].unflatten(1, (windows, -1)) for key in ("ids_visible", "ids_masked")]
        return out, train.show_mask(shown, *(ids[:, 0] for ids in parts), p), torch.cat(parts, dim=2)

    window, windows = mask("lomar")[1:]
    out, _, _ = mask("rmae")
    colours = train.class_colours(1 + out["region_maps"].shape[1])[1:]
    covered = train.paint(torch.ones_like(shown), out["region_maps"], colours)
    return {
        "image": shown,
        "MAE: random patches": mask("mae")[1],
        "SimMIM: larger units": mask("simmim")[1],
        "CAE: blocks (BEiT: fewer)": mask("cae")[1],
        "R-MAE: regions, hidden as MAE's patches": train.put_patches(
            covered, torch.full_like(shown, 0.5), out["ids_masked"], p),
        "AMT: the attention" + " (here drawn by hand)" * (checkpoint is None): train.heat(shown, map),
        "AMT: attended patches hidden, others thrown": mask("amt")[1],
        "LoMaR: windows, each on its own": frame_windows(shown, windows, [side // p for side in size], p),
        "LoMaR: a window, as the network sees it": window,
        "ObjMAE: half of an object": mask("objmae")[1],
    }


def masks(images: list[str] | None = None, scene: NonNegativeInt = 0, image_size: PositiveInt = 224,
          checkpoint: str | None = None, seed: NonNegativeInt = 0, output: str = "masks.png"):
    """A picture of one image under the mask of each method, with the settings of the papers.

    images: image files, instead of a built-in scene; their regions are Felzenszwalb-Huttenlocher segments
    scene: number of the built-in scene among those for validation (not with --images)
    image_size: pixels; a patch is a fourteenth
    checkpoint: whose encoder's attention draws AMT's mask (default: an attention that is drawn by hand)
    seed: of the masks
    output: file of the picture, PNG
    """
    path, p = open_picture(output), image_size // 14
    if image_size % 14:
        raise UsageError(f"--image-size {image_size}: it must be a multiple of 14")
    regions = dict(regions="fh", fh_scales=[300]) if images else dict(regions="instances")
    dataset = evaluation.open_images("shapes", [image_size, image_size], regions, images)["dataset"]
    if not images and scene >= len(dataset):
        raise UsageError(f"--scene {scene}: there are {len(dataset)}")
    drawn, legend = [], train.SCALE | train.HIDDEN | train.LEFT_OUT
    for index in range(len(images)) if images else [scene]:
        batch = collate([dataset[index]])
        tiles = mask_tiles(normalize(batch["image"]), batch["regions"], p, checkpoint, seed)
        for half in (list(tiles.items())[:5], list(tiles.items())[5:]):
            drawn.append(train.picture(dict(half), {} if drawn else legend))
    train.save_picture(path, torch.cat(drawn, dim=1), "masks")
    return dict(output=output, images=images or f"scene {scene}", checkpoint=checkpoint, seed=seed)


def attention(checkpoints: list[str] | None = None, data: str = "shapes", regions: str = "instances",
              count: PositiveInt = 4, limit: PositiveInt | None = None, seed: NonNegativeInt = 0,
              output: str = "attention.png", device="cpu", precision="fp32", workers=0):
    """A picture of where several encoders look, a column each, and the share of their attention that falls on
    the main object and on all objects of the validation images (AMT, Figure 4).

    checkpoints: as eval.py takes them; `random`, the default, is an untrained encoder
    data: as in train.py
    regions: the objects' maps: instances (of the built-in scenes and COCO), panoptic, or a folder of masks
    count: images in the picture
    limit: so many of the validation images, evenly spread
    seed: of an untrained encoder
    output: file of the picture, PNG
    """
    if regions in ("fh", "cam"):
        raise UsageError(f"--regions {regions}: their maps are of no objects; give instances, panoptic or a "
                         "folder")
    path, size, rows, dataset = open_picture(output), None, [], None
    for checkpoint in checkpoints or ["random"]:
        encoder, _ = evaluation.open_encoder(checkpoint, data, image_size=size, seed=seed)
        encoder = encoder.to(device).eval()
        if dataset is None:  # the first sets the size
            size = list(encoder.image_size)
            settings = dict(data=data, regions=regions, limit=limit, workers=workers)
            opened = evaluation.open_images(data, size, settings, count=count)
            dataset, images = opened["dataset"], opened["images"].to(device)
            columns = dict(image=denormalize(images))
        with torch.no_grad(), autocast(device, precision):
            query = evaluation.default_query(encoder)
            shares = evaluation.attention_shares(encoder, dataset, query, device, workers)
            map = encoder.last_attention(images, query).mean(1).unflatten(1, encoder.grid)
        name = str(checkpoint).removesuffix("/encoder.pt").removesuffix("/checkpoint.pt")
        main, both = shares["attention_main"], shares["attention_objects"]
        title = f"{name}: {main:.1f}% on the main object, {both:.1f}% on all"
        columns[title] = train.heat(columns["image"], map)
        print(f"{name:30s} {main:6.2f}% on the main object, {both:6.2f}% on all")
        rows.append(dict(checkpoint=checkpoint, **shares))
    main, both = shares["area_main"], shares["area_objects"]
    print(f"{'their share of the area':30s} {main:6.2f}% {'':18s} {both:6.2f}%")
    heading = f"attention: the main object has {main:.1f}% of the area, all have {both:.1f}%; data {data}"
    train.save_picture(path, train.picture(columns, train.SCALE), "attention", heading)
    return dict(rows=rows, data=data, limit=limit, output=output)


# ------------------------------------------------------------------------------------------------------

BENCHMARKS = dict(speed=speed, data=data, compare=compare, costs=costs, cuda=cuda, recipes=recipes,
                  masks=masks, attention=attention)


def main(argv):
    """One benchmark, from the command line to its line of JSON."""
    began, parser = time.perf_counter(), Parser(description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    functions = [BENCHMARKS[argv[0]]] if argv and argv[0] in BENCHMARKS else []
    computes = "device" in inspect.signature(functions[0]).parameters if functions else False
    parser.add(functions + [train.open_device] * computes)
    given = parser.parse(argv)
    takes = inspect.signature(BENCHMARKS[given["benchmark"]]).parameters
    for name in ("precision", "workers"):
        if name in given and name not in takes and given["benchmark"] != "compare":
            raise UsageError(f"--{name} is of no use to {given['benchmark']}")
    device, precision, workers = call(train.open_device, given) if computes else (None, None, None)
    chosen = {name: given[name] for name in ("device", "precision", "workers") if name in given}
    machine = dict(device=device, precision=precision, workers=workers, chosen=chosen)
    result = call(BENCHMARKS[given["benchmark"]], given | machine)
    result = dict(benchmark=given["benchmark"], **result)
    if computes:
        result |= dict(device=str(device)) | (dict(precision=precision) if "precision" in takes else {})
    print(json.dumps(result | dict(seconds=round(time.perf_counter() - began, 1)), default=str))
    if result.get("failed"):
        sys.exit(1)


if __name__ == "__main__":
    train.become_program("benchmark.py")
    sys.exit(exit_with_one_line("benchmark.py", lambda: main(sys.argv[1:])))
