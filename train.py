"""Pre-training, from a folder of images to a checkpoint: `python train.py --method amt --data /imagenet`.

On several GPUs or machines: `torchrun --nproc_per_node=8 train.py ...`. The flags of a method are explained
by `--method amt --help`.

Flags. Every annotated argument with a default is a flag, whichever function or class it belongs to. Its line
in the docstring is its help; if that says "not with" another flag, the two exclude each other. `functions_of`
lists the functions of a method's run, and `call` hands each of them the settings that it names. A setting has
the value that the user gave, or else that of the method's recipe, or else the default.

This file reads from the top: the recipes, the loop (`train_epochs`), one run (`pretrain`), the command line
(`main`); then the functions that these use. The random numbers of a step depend only on (seed, step,
micro-batch), those of an image only on (seed, epoch, index). So a run that was stopped and then continued
with --resume gives the same result as one that was never stopped: on a CPU the same bits, if the number of
threads is the same; on CUDA the same but for the order in which kernels add numbers.
"""

import ctypes
import multiprocessing
import os
import signal
import sys

UNFINISHED = []  # the list of datasets.py takes its place below


def become_program(name):
    """Prepares this process for signals and for unusual streams.

    SIGINT (Ctrl-C) and SIGTERM end the process and its workers at once, with one line on stderr and the exit
    code 130 or 143. Files are whole all the same, see `write_atomically`. Workers have the same rules, but do
    not print the line; under torchrun only the first process does. Characters that stdout cannot encode, as in
    strange file names, are escaped.
    """
    spawned = multiprocessing.current_process().name != "MainProcess"  # a worker on macOS imports this, too
    process = None if spawned else os.getpid()

    def end(number, frame):
        try:
            for other in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):  # no second signal may interfere
                signal.signal(other, signal.SIG_IGN)
            for temporary in UNFINISHED:
                temporary.unlink(missing_ok=True)
            if os.getpid() == process and not int(os.environ.get("RANK", 0)):
                line = f"{name}: interrupted ({signal.Signals(number).name})"
                if name != "benchmark.py":
                    line += "; a checkpoint that was saved is kept, --resume continues from it"
                line += "\n"
                os.write(2, ("\n" * os.isatty(2) + line).encode())
        finally:
            os._exit(128 + number)  # even if the line cannot be written

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: workers end with this process, even if it is killed
        os.register_at_fork(after_in_child=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL))
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed, as by `2>&-`; the next file would take its place
            setattr(sys, stream, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)


PROGRAM = os.path.basename(sys.argv[0])
if PROGRAM in ("train.py", "eval.py"):  # not in a notebook. The imports below take seconds
    become_program(PROGRAM)

import argparse
import contextlib
import datetime
import inspect
import json
import math
import re
import shlex
import textwrap
import threading
import time
import typing
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageColor, ImageDraw, ImageFont, PngImagePlugin
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid
from tqdm import tqdm

import mim
from datasets import (NAMED, SMALL, UNFINISHED, DeviceLoader, EpochBatches, Images, UsageError, collate,
                      counted, default_regions, denormalize, did_you_mean, digest, explained, load_data,
                      make_loader, name_broken, normalize, open_regions, reason_of, seed_of,
                      write_atomically)

# ---------------------------------------------------------------------------------------------------------
# Recipes: the papers' training settings. The absolute learning rate is base_lr * batch_size / lr_batch. Where
# a paper trains for several numbers of epochs, warmup_epochs is a dict {epochs of the run: epochs of
# warm-up}.

# MAE: Table 8 (pre-training setting). AMT trains it for 400 epochs.
MAE_RECIPE = dict(epochs=800, batch_size=4096, base_lr=1.5e-4, lr_batch=256,
                  warmup_epochs={400: 40.0, 800: 40.0}, min_lr=0.0, betas=(0.9, 0.95), weight_decay=0.05,
                  crop_scale=(0.2, 1.0), flip=True)
# SimMIM: §4.1. The learning rate is per 512 images. Gradient clipping is from the released configuration for
# ViT-B. Its ablations train for 100 epochs, AMT for 200.
SIMMIM_RECIPE = MAE_RECIPE | dict(batch_size=2048, base_lr=1e-4, lr_batch=512,
                                  warmup_epochs={100: 10.0, 200: 10.0, 800: 10.0}, betas=(0.9, 0.999),
                                  clip_grad=5.0, crop_scale=(0.67, 1.0))
# CAE: Appendix (pre-training), 800 epochs. The learning rate is that of a batch of 2048. The only
# augmentations are crop and flip. Gradient clipping, the smallest learning rate and the crop scale are from
# the code of BEiT and CAE.
CAE_RECIPE = MAE_RECIPE | dict(batch_size=2048, base_lr=1.5e-3, lr_batch=2048,
                               warmup_epochs={300: 10.0, 800: 20.0, 1600: 40.0}, min_lr=1e-5,
                               betas=(0.9, 0.999), clip_grad=3.0, crop_scale=(0.08, 1.0))
RECIPES = {
    "mae": MAE_RECIPE,
    "simmim": SIMMIM_RECIPE,
    "cae": CAE_RECIPE,
    # BEiT: Table 6, but without colour jitter, as CAE's own pre-training (§5.1)
    "beit": CAE_RECIPE | dict(warmup_epochs={300: 10.0, 800: 10.0}),
    # AMT: "the settings of pre-training follow the original works strictly", for 400 and 200 epochs (§4.1).
    # Its baselines are MAE with --epochs 400 and SimMIM with --epochs 200.
    "amt-mae": MAE_RECIPE | dict(epochs=400),
    "amt-simmim": SIMMIM_RECIPE | dict(epochs=200),
    # LoMaR: "we follow the MAE settings", but images are only cropped and not flipped. The warm-up takes 40
    # epochs of 1600, 20 of 800 and 10 of 400 (supplement, §6.1).
    "lomar": MAE_RECIPE | dict(epochs=1600, warmup_epochs=40.0, flip=False),
    # ObjMAE: Tables 1, 2 and 3. Images are "randomly cropped" and not flipped. The learning rate is that of a
    # batch of 128, for COCO and ImageNet-100. For CLEVR: --epochs 300 --batch-size 256 --lr 1.5e-4. Ours:
    # Lookahead's 5 steps, which the paper does not give; and that Table 2's layer decay is fine-tuning's.
    "objmae": MAE_RECIPE | dict(model="small", batch_size=128, lr_batch=128,
                                warmup_epochs={300: 40.0, 800: 40.0}, min_lr=1e-5, betas=(0.9, 0.999),
                                lookahead=5, flip=False),
    # R-MAE: "we exactly follow MAE for hyper-parameters. Our base learning rate is set to 1e-4" (§4). On COCO
    # it trains for 4000 epochs. Its baseline is MAE with --base-lr 1e-4 (Table 7).
    "rae": MAE_RECIPE | dict(base_lr=1e-4),
    "rmae": MAE_RECIPE | dict(base_lr=1e-4),
    # The tokenizer: Appendix A.2 of DALL-E, but for its 3 million steps
    "dvae": MAE_RECIPE | dict(image_size=112, epochs=50, batch_size=512, base_lr=1e-4, lr_batch=512,
                              warmup_epochs=0.0, min_lr=1.25e-6, betas=(0.9, 0.999), weight_decay=1e-4),
}

# Our settings, not the papers', for images of up to 96 pixels. The patch size is then an eighth of the longer
# side (`small_patch`). NANO_RECIPE is for the built-in scenes and for --model nano; CAE's decoder then has 2
# blocks, too, beside the regressor's 4. `recipe` leaves out the settings for which a method has no flag.
SMALL_RECIPE = dict(model="tiny", epochs=200, batch_size=512, base_lr=1e-3, lr_batch=256, warmup_epochs=10.0,
                    decoder_dim=192, decoder_depth=4, decoder_heads=3, window_size=5)
NANO_RECIPE = dict(model="nano", epochs=5, batch_size=64, base_lr=4e-3, lr_batch=256, warmup_epochs=0.5,
                   decoder_dim=64, decoder_depth=2, decoder_heads=2, window_size=5, region_dim=64)
SMALL_METHOD_RECIPES = {
    "dvae": dict(epochs=5, batch_size=32, base_lr=3e-3, lr_batch=32, warmup_epochs=0.0, hidden_dim=32,
                 groups=3, vocab_size=512),
    # At the learning rate of the other methods RAE's encoder collapses at this scale: after 60 to 160 steps
    # 99% of the normalised latents are one direction, and the region loss is the same with another image.
    # Hints and the usual shape of objects alone lower that loss. So all parameters have an eighth of
    # ViT-nano's. With an eighth for the encoder alone (CIFAR-10, 512 steps) the loss is lower (0.107, not
    # 0.143), but the same with another image, and the encoder is no better. At the full rate neither a
    # warm-up of two epochs (98% after one) nor a norm before the neck (99%) keeps it from collapsing.
    "rae": dict(base_lr=5e-4),
}

# Types of flags: the kind of number, the smallest and the largest value, the words for the error message
LARGEST = sys.float_info.max
PositiveInt = Annotated[int, 1, 2**63 - 1, "a positive whole number"]
NonNegativeInt = Annotated[int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1"]
PositiveFloat = Annotated[float, sys.float_info.min, LARGEST, "a positive number"]
NonNegativeFloat = Annotated[float, 0, LARGEST, "0 or a positive number"]
Fraction = Annotated[float, 0, 1, "a number from 0 to 1"]


# ---------------------------------------------------------------------------------------------------------
# Learning rate


def half_cosine(progress):
    """Falls from 1 to 0 as the progress goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(step, steps, warmup_steps, peak, minimum=0.0, fall=half_cosine):
    """The learning rate of a step. During the warm-up it rises linearly from 0 to `peak`. Then it falls to
    `minimum` as `fall` does, a function from the progress in 0..1 to 1..0.

    A warm-up of less than one step is left out, because a run of one step would learn nothing.
    """
    if step < warmup_steps and warmup_steps >= 1:
        return peak * step / warmup_steps
    progress = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
    return minimum + (peak - minimum) * fall(progress)


def check_rates(epochs, warmup_epochs, lr, min_lr):
    """Raises UsageError if the warm-up takes longer than all epochs, or if the smallest learning rate is
    above the peak, `lr`."""
    if warmup_epochs > epochs:
        raise UsageError(f"--warmup-epochs {warmup_epochs:g} is more than --epochs {epochs}")
    if min_lr > lr:
        raise UsageError(f"--min-lr {min_lr:g} is above the peak learning rate, {lr:.3g}")


# ---------------------------------------------------------------------------------------------------------
# The loop


def train_epochs(model, optimizer, dataset, compute_losses, *, epochs, batch_size, accumulate, peak_lr,
                 warmup_epochs, min_lr=0.0, fall=half_cosine, clip_grad=None,
                 before_epoch=lambda epoch: None, state=None, on_device=False, collate_fn=collate, seed=0,
                 device="cpu", precision="fp32", workers=0):
    """Trains `model`, or goes on from a `state`. Pre-training, probes, fine-tuning and dense tasks share it.

    Yields a pair before it begins and after each epoch: a dict of figures for the log, and the state. The
    first dict is empty. The figures are the means of the losses over the epoch, the last learning rate and
    the speed. The state is a dict of all that an exact resume needs. It has no states of random generators,
    because every draw follows from numbers that the run knows.

    compute_losses: function (model, micro-batch, progress of the run from 0 to 1) -> dict of scalars: first
        `loss`, which is minimised, then others to log. The model is an argument because it is wrapped where
        several processes train it.
    batch_size, accumulate: images and micro-batches of a step, over all processes; see `cut_batch`
    peak_lr, warmup_epochs, min_lr, fall: see `learning_rate`; a parameter group with `lr_scale` gets that
        much of the rate
    clip_grad: largest norm of the gradient
    before_epoch: function that is called with the number of each epoch, from 0, before it begins
    on_device: crop on the device (`DeviceLoader`); else by `make_loader`, which takes workers and collate_fn
    """
    check_rates(epochs, warmup_epochs, peak_lr, min_lr)
    steps = len(dataset) // batch_size
    batches = EpochBatches(len(dataset), batch_size, accumulate, seed, rank(), world_size())
    own_micro_batches = range(rank(), accumulate, world_size())
    if on_device:
        loader = DeviceLoader(dataset, batches, device)
    else:
        loader = make_loader(dataset, workers, device, collate_fn, batch_sampler=batches)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")
    done, broken = state["epoch"] if state else 0, set()
    if done > epochs:
        raise UsageError(f"--epochs {epochs}: the run to resume has had {done}")
    if done:
        restore(state, model, optimizer, scaler, len(dataset))
    wrapped = share_gradients(model)

    def state_after(epoch):
        return dict(model=model.state_dict(), optimizer=optimizer.state_dict()["state"],
                    scaler=scaler.state_dict(), epoch=epoch)

    yield {}, state_after(done)
    for epoch in range(done, epochs):
        began, batches.epoch, history = time.perf_counter(), epoch, []
        before_epoch(epoch)
        wrapped.train()
        micro_batches = name_broken(loader, dataset.source, broken)
        training_began = time.perf_counter()
        bar = tqdm(range(epoch * steps, (epoch + 1) * steps), f"epoch {epoch + 1}/{epochs}", unit=" images",
                   unit_scale=batch_size, disable=rank() > 0 or None, leave=False)
        for step in bar:
            lr = learning_rate(step, epochs * steps, warmup_epochs * steps, peak_lr, min_lr, fall)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            sums = 0
            for micro in own_micro_batches:
                batch = next(micro_batches)
                # Masks depend only on the seed, the step and the micro-batch. So neither a stop nor the
                # number of processes changes them.
                torch.manual_seed(seed_of(seed, step, micro))
                # DistributedDataParallel sums the processes' gradients only in the last backward pass of a
                # step.
                wrapped.require_backward_grad_sync = micro == own_micro_batches[-1]
                with autocast(device, precision):
                    losses = compute_losses(wrapped, batch, step / (epochs * steps))
                scaler.scale(losses["loss"] / len(own_micro_batches)).backward()
                values = torch.stack([value.detach() for value in losses.values()])
                sums = sums + values / len(own_micro_batches)
            if clip_grad:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            history.append(sums.tolist())  # the only place in a step where the CPU waits for the GPU
            loss = history[-1][0]
            # The weights are checked once an epoch, before they are saved.
            if not math.isfinite(loss) or len(history) == steps and not all_finite(model):
                raise UsageError(f"the loss is {loss}, or the weights are not finite, at step {step + 1} "
                                 f"(epoch {epoch + 1}), learning rate {lr:.3g}; "
                                 + "the files of the epochs before are kept. " * (epoch > 0)
                                 + "Try a lower learning rate or --precision fp32")
            bar.set_postfix(loss=loss)
        speed = steps * batch_size / (time.perf_counter() - training_began)
        means = torch.tensor(gather(history), dtype=torch.float64).mean((0, 1)).tolist()
        broken.update(*gather(broken))  # a file is broken for all processes
        line = dict(epoch=epoch + 1, step=step + 1, **dict(zip(losses, means)), lr=lr,
                    images_per_s=round(speed, 1), seconds=round(time.perf_counter() - began, 3))
        if broken:
            line["broken_images"] = len(broken)
        yield line, state_after(epoch + 1)


def pretrain(method, source, regions=None, tokenizer=None, *, output, epochs: PositiveInt = 800,
             batch_size: PositiveInt = 4096, accumulate: PositiveInt | None = None,
             lr: PositiveFloat | None = None, base_lr: PositiveFloat = 1.5e-4, lr_batch,
             warmup_epochs: NonNegativeFloat = 40.0, min_lr: NonNegativeFloat = 0.0, betas,
             weight_decay: NonNegativeFloat = 0.05, lookahead: NonNegativeInt = 0,
             clip_grad: PositiveFloat | None = None, crop_scale, flip,
             loader: Literal["workers", "device"] | None = None, compile: bool = False,
             save_every: PositiveInt | None = None, seed: NonNegativeInt = 0, device="cpu", precision="fp32",
             workers=0, args={}, state=None):
    """Trains a method of mim.py and writes checkpoint.pt, encoder.pt, log.jsonl and reconstruction.png into
    the folder `output`.

    source: the images, a `Source` of datasets.py. regions: maps of their regions, for methods that take them.
    tokenizer: for methods that predict tokens. args: a dict, which the checkpoint keeps.
    state: the checkpoint from which the run goes on (`open_output`).

    epochs: passes over the data
    batch_size: images per optimizer step, over all processes
    accumulate: micro-batches per step, over all processes; default: the smallest number that leaves at most
        256 images in each
    lr: absolute learning rate at the end of the warm-up, instead of --base-lr
    base_lr: learning rate per 256 images of the batch (dvae: 32; above 96 pixels dvae, SimMIM and AMT on it:
        512; ObjMAE: 128; CAE and BEiT: 2048); not with --lr
    warmup_epochs: epochs in which the learning rate rises from 0; the default may name several lengths of a
        run: a run of another length warms up for the same fraction as the next longer one of these, and a run
        that is longer than all of them for as many epochs as the longest
    min_lr: absolute learning rate at the end of the cosine
    weight_decay: of AdamW, for parameters of two or more dimensions
    lookahead: AdamW steps between two updates of Lookahead's slow weights; 0: no Lookahead
    clip_grad: largest norm of the gradient
    loader: where images are cropped and flipped: workers (on the CPU) or device (only for data in memory and
        methods without regions); default: device on CUDA where that is possible
    compile: compile the method with torch.compile
    save_every: also keep the encoder of every so many epochs, as encoder-EPOCH.pt
    seed: of all random numbers
    """
    device, output = torch.device(device), Path(output)
    image_size = sized(method).image_size
    dataset = Images(source, image_size, "crop", crop_scale, flip, seed, regions=regions)
    examples = picture_items(Images(source, image_size, "center", regions=regions))
    batch_size, accumulate = cut_batch(batch_size, len(dataset), accumulate)
    optimizer = torch.optim.AdamW(parameter_groups(method, weight_decay), betas=betas, fused=True)
    if lookahead:
        add_lookahead(optimizer, lookahead)
    if compile:
        method.compile(dynamic=False)

    def compute_losses(model, batch, progress):
        images = normalize(batch["image"].to(device, non_blocking=True))
        batch["progress"] = torch.full((), progress, device=device)
        inputs = {k: batch[k].to(device, non_blocking=True) for k in method.inputs if k in batch}
        if tokenizer is not None:
            inputs["tokens"] = tokenizer.tokenize(images, method.encoder.grid)
        out = model(images, **inputs)
        return {name: value for name, value in out.items() if torch.is_tensor(value) and value.ndim == 0}

    def before_epoch(epoch):
        if hasattr(method, "maps_due") and method.maps_due(epoch, epochs):
            update_maps(method, source, epoch, device, precision, workers)

    log = Log(output / "log.jsonl", state)
    # The loop takes the variables above that it names.
    for line, kept in call(train_epochs, locals(), model=method,
                           peak_lr=lr or base_lr * batch_size / lr_batch,
                           on_device=crops_on_device(loader, dataset, device)):
        if rank() > 0:
            continue
        if line:
            log.add(line)
            heading = f"{type(method).__name__}, epoch {line['epoch']} of {epochs}, {source.description}"
            draw_examples(output / "reconstruction.png", method, examples, tokenizer, device, seed, heading)
        # If the disk is full or read-only, the run fails here before its first epoch and not after it.
        kept |= dict(args=args, maps=getattr(method, "maps", None))
        write_checkpoint(output, method, kept, save_every)


def main(argv):
    """The command line: from the flags to the data and the method, and then to `pretrain`."""
    given = parse(argv)
    output, state = call(open_output, given)
    if state is not None:
        given = resumed(given, state)
    device, precision, workers = call(open_device, given)
    join_processes(device)
    with first_process_first():
        source = call(load_data, given, split="pretrain")
    if hasattr(source, "root") and output.resolve() == Path(source.root).resolve():
        raise UsageError(f"--output {output}: it is the folder of the images, and the picture would be one")
    images = source.digest()
    if given.setdefault("data_digest", images) != images:
        raise UsageError(f"--resume: the run was started with other images than {source.description}")
    args = settle(given, source)
    tokenizer = call(load_tokenizer, args)
    if tokenizer is not None:
        tokenizer.to(device)
        args |= dict(vocab_size=tokenizer.vocab_size, tokenizer_digest=tokenizer.digest)
    args |= dict(device=str(device), precision=precision, workers=workers)
    torch.manual_seed(args["seed"])
    method = build_method(**args).to(device)
    if rank() == 0:
        print(source.description)
        if args["method"] == "cae" and tokenizer is None:
            print("without --tokenizer CAE predicts pixels: Table 9's variant"
                  + ", and normalising them is ours" * method.norm_pix)
        for name, value in args.items():
            value = getattr(method, name, None) if value is None else value
            if value is not None:
                print(f"  {name:16s} {value}")
        epochs = args["epochs"]
        if args["method"] == "amt" and not any(method.maps_due(epoch, epochs) for epoch in range(epochs)):
            print(f"in {counted(epochs, 'epochs')} there are no attention maps, and all masks are the base's "
                  f"own: more --epochs{' or a smaller --interval' * (epochs > 1)} change that")
    regions = call(open_regions, args, source=source, split="pretrain")  # None if the method takes none
    missing = getattr(regions, "known", []).count(False)
    if missing and rank() == 0:
        print(f"images without regions: {missing} of {len(source)}")
    if hasattr(regions, "fill"):
        if args["regions"] == "cam" and args.setdefault("region_maps", regions.title) != regions.title:
            raise UsageError("--resume: the run was started with the maps of another network: --cam-weights")
        regions.fill(cores() if given.get("workers") is None else workers, rank(), world_size())
        gather(None)  # each process computes a part of the maps, and reads all
    if args["prepare"]:
        if regions is None:
            raise UsageError(f"--prepare computes regions, and --method {args['method']} takes none")
        if rank() == 0:
            print("the regions are ready: without --prepare the run starts")
        return
    call(pretrain, args, method=method, source=source, regions=regions, tokenizer=tokenizer, output=output,
         args=args, state=state)
    if rank() == 0:
        labelled = len(source.classes) > 1 and args["method"] != "dvae"
        file, task = ("encoder.pt", "linear") if labelled else ("checkpoint.pt", "reconstruct")
        print(f"{counted(args['epochs'], 'epochs')} done: {output}/ holds checkpoint.pt, encoder.pt, "
              "log.jsonl and reconstruction.png")
        command = ["python", "eval.py", f"{output}/{file}", "--task", task, "--data", args["data"]]
        if labelled or type(method).__module__ == mim.__name__:  # eval.py cannot build a method of one's own
            print("next:", shlex.join(command))


# ---------------------------------------------------------------------------------------------------------
# Loading and optimization


def crops_on_device(loader, dataset, device):
    """True if images are cropped on the device; `loader` is the flag of `pretrain`."""
    possible = dataset.source.in_memory and dataset.regions is None
    if loader == "device" and not possible:
        raise UsageError("--loader device is for data in memory (shapes, cifar10, cifar100, stl10), and for "
                         "methods without regions")
    return loader == "device" or loader is None and possible and device.type == "cuda"


def parameter_groups(module, weight_decay):
    """The two parameter groups for AdamW. Parameters of one dimension (biases, norms, layer scale) have no
    weight decay, as in the authors' code of MAE, LoMaR and CAE. All others have, also class and mask tokens
    and LoMaR's table."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [dict(params=[p for p in trained if p.ndim > 1], weight_decay=weight_decay),
            dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0)]


def add_lookahead(optimizer, k=5, alpha=0.5):
    """Lookahead: k steps forward, one step back (Zhang, Lucas, Hinton, Ba, NeurIPS 2019, arXiv:1907.08610).

    After every k-th step of the torch optimizer the slow weights move `alpha` of the way to the weights, and
    the weights are set to them. The slow weights are part of the optimizer's state, and so of its state dict.
    """
    start = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def after_step(optimizer, args, kwargs):
        optimizer.state["lookahead"] += 1
        for p, first in start.items():
            slow = optimizer.state[p].setdefault("slow", first)
            if optimizer.state["lookahead"] % k == 0:
                p.copy_(slow.lerp_(p, alpha))

    optimizer.state["lookahead"] = torch.tensor(0)  # counts the steps
    optimizer.register_step_post_hook(after_step)


def cut_batch(batch_size, num_images, accumulate=None, most=256):
    """Returns the batch size and the number of its micro-batches, over all processes. The batch size is
    reduced to the number of images, if that is smaller, and to a multiple of the number of micro-batches.

    accumulate: the number of micro-batches; None: the smallest that leaves at most `most` images in each.
    """
    batch_size = min(batch_size, num_images)
    pieces = accumulate or world_size() * math.ceil(batch_size / world_size() / most)
    if pieces % world_size():
        raise UsageError(f"--accumulate {pieces}: {world_size()} processes cannot share out {pieces} "
                         "micro-batches evenly")
    if batch_size < 2 * pieces:
        what = "--batch-size" if num_images >= 2 * pieces else "the number of images"
        got = batch_size if num_images >= 2 * pieces else num_images
        raise UsageError(f"{what} must be at least {2 * pieces}, got {got}: 2 images in each micro-batch")
    return batch_size // pieces * pieces, pieces


def all_finite(module):
    """True if all parameters are finite numbers."""
    return bool(torch.stack([p.isfinite().all() for p in module.parameters()]).all())


def update_maps(method, source, epoch, device, precision, workers):
    """Computes AMT's attention maps before an epoch, each process those of its share of the training images.
    The images are resized as a whole, and not cropped."""
    whole = Images(source, method.encoder.image_size, "whole")
    share = range(rank(), len(whole), world_size())
    loader = make_loader(whole, workers, device, batch_size=256, sampler=share)

    def batches():
        for batch in tqdm(loader, "attention maps", leave=False, disable=rank() > 0 or None):
            yield normalize(batch["image"].to(device, non_blocking=True)), batch["index"].to(device)

    with autocast(device, precision):
        method.update_maps(batches(), len(whole))
    if rank() == 0 and method.throw != "random":
        print(f"epoch {epoch + 1}: new attention maps decide which patches are masked"
              f"{' and thrown' * (method.num_thrown > 0)}, so the loss may rise")


# ---------------------------------------------------------------------------------------------------------
# The machine: one process, or several under torchrun


def rank():
    """The number of this process under torchrun; 0 without."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(device):
    """Joins the other processes of torchrun, if there are any."""
    if "RANK" in os.environ and not dist.is_initialized():
        # The timeout is a day, because processes may wait for others that compute regions or download data.
        backend = "nccl" if device.type == "cuda" else "gloo"
        with explained("RANK is set, as by torchrun", "the processes cannot be joined"):
            dist.init_process_group(backend, timeout=datetime.timedelta(days=1))


def share_gradients(model):
    """Wraps a model so that backward passes average its gradients over all processes, if there are several.
    Buffers, such as statistics of a batch norm, stay each process's own."""
    if world_size() == 1:
        return model
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # torch 2.13
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{buffers: False})


def gather(value):
    """Collects `value` from all processes, in the order of their ranks. Every process must call it."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block before the others, because it may download data."""
    if rank():
        gather(None)
    yield
    if not rank():
        gather(None)


def cores():
    """The number of CPU cores for this process: those on which it may run, divided by the processes that
    torchrun started on this machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, precision):
    """A context manager of automatic mixed precision. For fp32 it does nothing."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "fp32")


def open_device(device: str | None = None, precision: Literal[tuple(PRECISIONS)] | None = None,
                workers: NonNegativeInt | None = None):
    """Returns (device, precision, workers) for this machine. A CUDA device becomes the current one.

    device: cuda, cuda:1, cpu, ...; default: cuda if there is one; each process of torchrun takes its own
    precision: of autocast; default: on CUDA bf16, or fp16 where there is none; else fp32 (on CUDA with TF32)
    workers: number of processes that load data, at most 8 per core (not with --loader device of train.py);
        default: on CUDA as many as there are cores, but at most 16; else 0
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    others = counted(torch.cuda.device_count(), "CUDA devices")
    with explained(f"--device {name}", f"it cannot be used; beside cpu there are {others}"):
        device = torch.device(name)
        torch.ones(1, device=device).item()
    usual_precision, usual_workers = "fp32", 0
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for NCCL, timings and memory counts
        torch.set_float32_matmul_precision("high")
        usual_precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        usual_workers = min(16, cores())
    workers = usual_workers if workers is None else workers
    if workers > 8 * cores():
        raise UsageError(f"--workers {workers}: at most 8 for each core, here {8 * cores()}")
    return device, precision or usual_precision, workers


# ---------------------------------------------------------------------------------------------------------
# Methods and tokenizers


def sized(method):
    """The module that knows the image size: a method's encoder, or the DVAE itself."""
    return method if hasattr(method, "image_size") else method.encoder


def build_method(method, image_size: list[PositiveInt] | None = None, **settings):
    """Builds a method of mim.METHODS with its encoder, by its name. settings: arguments of the constructors
    of the method and of its encoder; all other settings are ignored.

    image_size: pixels, one number, or height and width; default: the size of the data's images if that is at
        most 96, else 224 (dvae: 112)
    """
    cls, settings = mim.METHODS[method], settings | dict(image_size=image_size)
    if cls is mim.BEiT and not settings.get("vocab_size"):
        raise UsageError("--method beit predicts tokens and needs --tokenizer FILE; --method dvae trains one")
    with explained(f"--method {method}", "it cannot be built"):
        if cls is mim.DVAE:
            return call(cls, settings)
        if cls is mim.AMT:
            return call(build_amt, settings, settings=settings)
        return call(cls, settings, encoder=call(build_encoder, settings, **cls.encoder_options))


def build_encoder(image_size, *, model: Literal[tuple(mim.SIZES)] = "base", patch_size: PositiveInt = 16,
                  **options):
    """Builds the ViT of a method. options: the `encoder_options` of the method's class.

    model: size of the encoder
    patch_size: side of a patch in pixels
    """
    if "layer_scale" in options and model in ("large", "huge"):
        options["layer_scale"] = 1e-5  # as CAE and BEiT have it for ViT-L
    return mim.ViT(image_size, patch_size, **mim.SIZES[model], **options)


def build_amt(settings, base: Literal["mae", "simmim"] = "mae"):
    """Builds AMT and the method that it masks for.

    base: the method that AMT masks for
    """
    # The base keeps its own mask_ratio, for the epochs of random masking.
    inner = build_method(base, **{name: value for name, value in settings.items() if name != "mask_ratio"})
    return call(mim.AMT, settings, base=inner)


def load_method(state, path, **overrides):
    """Builds the method of a run from its checkpoint.pt, `state`, and loads the weights.

    path: names the file in messages. overrides: arguments of the method's constructor to change.
    """
    method = build_method(**run_settings(state) | overrides)
    with explained(path, f"its weights do not fit {overrides or 'its settings'}"):
        copy_into(method.state_dict(), state["model"], "model")
    return method


def load_tokenizer(tokenizer: str | None = None, tokenizer_digest=None):
    """Loads a tokenizer from its file. Its attribute `digest` is that of the file. Raises UsageError if the
    file holds none, or if the digest is not `tokenizer_digest` (None: any).

    tokenizer: file of the tokenizer whose tokens are the target: checkpoint.pt of a dvae run, or a state dict
        of DALL-E's encoder; default: pixels are the target (in eval.py: what the run had)
    """
    if tokenizer is None:
        return None
    with explained(f"--tokenizer {tokenizer}", "there is no tokenizer in it"):
        content = mim.load_file(tokenizer)
        if run_settings(content):
            if content.get("epoch") == 0:
                raise ValueError("its run has had no epoch yet")
            module = load_method(content, tokenizer)
        else:
            module = mim.DVAE.from_encoder(mim.read_checkpoint(content))
        if not isinstance(module, mim.DVAE):
            raise ValueError("it is of another method's run, not of dvae")
        if not all_finite(module):
            raise ValueError("its weights are not all finite numbers")
    module.digest = digest(Path(tokenizer).read_bytes())
    if tokenizer_digest not in (None, module.digest):
        raise UsageError(f"--tokenizer {tokenizer} is not the file that the run was started with")
    return module.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------
# Files


class Log:
    """The log of a run, one line of JSON per epoch, in the file `path`, or in none if that is None. The lines
    are also printed to `stream`. If a checkpoint `state` is given, the log goes on after its epoch."""

    def __init__(self, path, state=None, stream=None):
        self.path, self.stream, self.lines = path, stream, []
        if state and path.exists():  # after a kill it may have one line too many
            self.lines = path.read_text().splitlines()[:state["epoch"]]

    def add(self, figures):
        self.lines.append(json.dumps(figures))
        words = [f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, (int, float))]
        tqdm.write(", ".join(words), self.stream)
        if self.path:
            write_atomically(self.path, lambda to: to.write("\n".join([*self.lines, ""]).encode()))


def write_checkpoint(output, method, state, save_every=None):
    """Writes encoder.pt and then checkpoint.pt, the state from which the run can go on.

    encoder.pt is a plain state dict with timm's names, or with DALL-E's for a tokenizer. Its metadata, which
    load_state_dict ignores, tell the method, its base, the image size and the number of heads.
    """
    if state["epoch"]:
        encoder, args = method.encoder.state_dict(), state["args"]
        encoder._metadata[""] |= {k: args[k] for k in ("method", "base", "image_size") if k in args}
        if isinstance(method.encoder, mim.ViT):
            encoder._metadata[""] |= dict(image_size=list(method.encoder.image_size),
                                          num_heads=method.encoder.num_heads)
        names = ["encoder.pt"]
        if save_every and state["epoch"] % save_every == 0:
            names.append(f"encoder-{state['epoch']}.pt")
        for name in names:
            write_atomically(output / name, lambda to: torch.save(encoder, to))
    write_atomically(output / "checkpoint.pt", lambda to: torch.save(state, to))
    if not state["epoch"]:
        for old in output.iterdir():  # of a run that is overwritten
            if re.fullmatch(r"encoder(-\d+)?\.pt|log\.jsonl|reconstruction\.png", old.name):
                old.unlink()


def run_settings(content):
    """The settings in the content of a checkpoint.pt: those of the flags, and those that a resumed run
    compares. For the content of other files {}. Raises ValueError if a flag would not take the value of its
    setting."""
    args = content.get("args") if isinstance(content, dict) else None
    if not isinstance(args, dict) or "method" not in args:
        return {}
    if args["method"] not in mim.METHODS:
        raise ValueError(f"its method is {args['method']}, and not one of {', '.join(mim.METHODS)}")
    flags = flags_of(functions_of(args))
    for name, (flag, _) in flags.items():
        if name in args:
            check_setting(name, args[name], flag.annotation)
    others = ("method", "vocab_size", "tokenizer_digest", "data_digest", "region_maps")
    return {name: args[name] for name in (*others, *flags) if name in args}


def copy_into(own, kept, name):
    """Copies tensors of a checkpoint into ours; both are in nested dicts. Raises ValueError if the keys
    differ, or if a tensor has another shape or type, which optimizers do not notice, or is not finite."""
    if isinstance(own, dict):
        if own.keys() != kept.keys():
            raise ValueError(f"{name} has other entries")
        for key, value in own.items():
            copy_into(value, kept[key], f"{name}.{key}")
    elif (own.shape, own.dtype) != (kept.shape, kept.dtype) or not kept.isfinite().all():
        raise ValueError(f"{name} must be finite numbers {list(own.shape)}, {own.dtype}")
    else:
        own.copy_(kept)


@torch.no_grad()
def restore(state, model, optimizer, scaler, num_images):
    """Copies a checkpoint's state into a model, its optimizer and its scaler. Raises UsageError if it does
    not fit."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # it makes the tensors into which the checkpoint's are copied
    model.zero_grad()
    own = dict(model=model.state_dict(), optimizer=optimizer.state_dict()["state"])
    with explained("--resume", "the checkpoint does not fit the settings"):
        if state.get("maps") is not None:
            shape = num_images, *model.encoder.grid
            own["maps"] = model.maps = model.encoder.cls_token.new_zeros(shape, dtype=torch.float16)
        copy_into(own, {name: state[name] for name in own}, "checkpoint")
        if state["scaler"]:
            loss_scale = {name: state["scaler"][name] for name in ("scale", "_growth_tracker")}
            check_setting("scale", loss_scale["scale"], PositiveFloat)
            check_setting("_growth_tracker", loss_scale["_growth_tracker"], NonNegativeInt)
            scaler.load_state_dict(scaler.state_dict() | loss_scale)


def check_place(path):
    """Raises UsageError if a link, a folder or a device is at the path, where a file is to be written."""
    if path.is_symlink() or path.exists() and not path.is_file():
        raise UsageError(f"--output {path}: it is a folder, a link or a device")


def open_output(method, output: str | None = None, resume: bool = False, overwrite: bool = False,
                prepare: bool = False, tokenizer=None):
    """Returns the folder of the run, and the checkpoint from which it goes on, or None. Raises UsageError
    rather than overwrite another run or files of another program.

    output: folder of the run; default: runs/METHOD
    resume: continue the run in --output, or start it if there is none
    overwrite: start anew where --output already holds a run (not with --resume)
    prepare: compute the regions of all images and stop (not with --resume, not with --overwrite)
    """
    output = Path(output or f"runs/{method}")
    path = output / "checkpoint.pt"
    if tokenizer and Path(tokenizer).resolve() in [f.resolve() for f in (path, *output.glob("encoder*.pt"))]:
        raise UsageError(f"--output {output}: it holds the tokenizer, which the run would overwrite")
    for file in (path, *output.glob("encoder*.pt"), output / "log.jsonl", output / "reconstruction.png"):
        check_place(file)
        if file.exists() and not path.exists():
            raise UsageError(f"{output} holds {file.name} but no checkpoint.pt of its run: move it, or write "
                             "to another --output")
    if prepare or not path.exists():
        return output, None
    with explained(path, "it cannot be used"):
        state = mim.load_file(path)
        args = run_settings(state)
        if not args:
            raise UsageError(f"{path} is not a checkpoint of train.py; {mim.listed(state)}")
        state["args"] = args
        check_setting("epoch", state["epoch"], NonNegativeInt)
    if state["epoch"] and not resume and not overwrite:
        raise UsageError(f"{output} already holds a run of {counted(state['epoch'], 'epochs')}: --resume "
                         "continues it, --overwrite starts anew, --output writes elsewhere")
    return output, state if resume else None


# ---------------------------------------------------------------------------------------------------------
# Pictures


def write(image, texts):
    """Writes texts, {(x, y): text}, into a picture [3, H, W] in 0..1. The letters are black with a white rim,
    so that they can be read on any background."""
    image, font = TF.to_pil_image(image), ImageFont.load_default()
    with contextlib.suppress(TypeError, ImportError):  # Pillow before 10.1 has only small letters
        font = ImageFont.load_default(13)
    for place, text in texts.items():
        text = text.encode("latin-1", "replace").decode("latin-1")  # the font has few other letters
        ImageDraw.Draw(image).text(place, text, "black", font, spacing=0, stroke_width=2, stroke_fill="white")
    return TF.pil_to_tensor(image).float() / 255


def picture(columns, legend={}):
    """Joins tiles to one picture [3, H, W]. columns: {title: tiles [n, 3, h, w] in 0..1}.

    A row shows one of the n samples, or several if they are narrow. The titles stand above the columns, and
    the legend above the titles: {words: a tensor that can be expanded to [3, 12, 24]}. Small tiles are
    enlarged to at least 128 pixels.
    """
    tiles = torch.stack([tile.float().cpu() for tile in columns.values()], dim=1)  # [n, columns, 3, h, w]
    tiles = F.interpolate(tiles.flatten(0, 1), scale_factor=math.ceil(128 / min(tiles.shape[-2:])))
    width = tiles.shape[-1] + 4
    per_row = max(1, 1100 // (width * len(columns)))
    grid, texts = make_grid(tiles, nrow=per_row * len(columns), padding=4, pad_value=1.0), {}
    titles = [textwrap.wrap(title, width // 8) for title in columns]
    per_line = max(1, grid.shape[2] // 220)
    above = 17 * (math.ceil(len(legend) / per_line) + max(map(len, titles)))
    image = F.pad(grid, (0, 0, above, 0), value=1.0)
    for k, lines in enumerate(per_row * titles):
        texts[4 + k * width, above - 17 * len(lines)] = "\n".join(lines)
    for k, (words, swatch) in enumerate(legend.items()):
        x, y = 4 + k % per_line * 220, k // per_line * 17
        image[:, y + 3:y + 15, x:x + 24] = swatch
        texts[x + 30, y] = words
    return write(image, texts)


def save_picture(path, image, task, heading=""):
    """Writes a picture [3, H, W] in 0..1 with a heading to a PNG file."""
    lines = textwrap.wrap(heading, image.shape[2] // 8)
    image = write(F.pad(image, (0, 0, 17 * len(lines), 0), value=1.0), {(4, 0): "\n".join(lines)})
    save_png(path, TF.to_pil_image((255 * image).round().byte()), task)


def save_png(path, image, task):
    """Writes a PIL image to a PNG file. The file also holds the name of the task, which eval.py looks for
    before it overwrites a file."""
    text = PngImagePlugin.PngInfo()
    text.add_text("task", task)
    write_atomically(path, lambda to: image.save(to, "png", pnginfo=text))


def picture_items(dataset, count=8):
    """Takes `count` items, evenly spread over a dataset -> dict of images, normalised, [count, 3, H, W], and
    of regions if the dataset has them."""
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    batch = collate([dataset[i] for i in places])
    return dict(images=normalize(batch["image"])) | {k: batch[k] for k in ("regions",) if k in batch}


def class_colours(count):
    """Colours for `count` classes, [count, 3] in 0..1, up to 469 different ones: silver for the first, which
    is mostly the background, then hues that are 222.49 degrees apart, the golden angle, in turn light and
    dark."""
    names = ["silver"] + [f"hsv({222.49 * k % 360:.1f},75%,{95 - 30 * (k % 2)}%)" for k in range(1, count)]
    return torch.tensor([ImageColor.getrgb(name) for name in names]) / 255


def paint(images, maps, colours):
    """Paints maps [..., k, H, W] in 0..1 over images [..., 3, H, W], one after another, in the colours [k,
    3]."""
    for map, colour in zip(maps.split(1, dim=-3), colours.to(images)):
        images = images.lerp(colour.view(3, 1, 1), map.to(images))
    return images


def heat(images, attention):
    """Images [n, 3, H, W] in 0..1 and attention maps [n, gh, gw] -> grey images, the more orange the larger
    the map. Every map is scaled from its smallest to its largest value."""
    attention = attention.float() - attention.amin((1, 2), keepdim=True)
    attention = attention / attention.amax((1, 2), keepdim=True).clamp_min(1e-12)
    attention = F.interpolate(0.8 * attention[:, None], images.shape[-2:], mode="bilinear")
    return paint(images.mean(1, keepdim=True).expand_as(images), attention, torch.tensor([[1.0, 0.4, 0.0]]))


def hatch(height, width, period):
    """Grey stripes on white, [height, width]; in pictures they mean that something is left out."""
    diagonal = torch.arange(height)[:, None] + torch.arange(width)
    return 1 - 0.5 * (diagonal % period < period / 4)


# Legends of `picture`
SCALE = {"least to most attention": heat(torch.full((1, 3, 12, 24), 0.5), torch.arange(24).view(1, 1, 24))[0]}
HIDDEN = {"hidden, to be predicted": torch.tensor(0.5)}
LEFT_OUT = {"left out, enters nothing": hatch(12, 24, 8)}


def put_patches(under, image, ids, patch_size):
    """Returns the images `under` with the patches `ids` [B, n] taken from `image`; both are [B, C, H, W]."""
    return mim.reconstruct(under, mim.take(mim.patchify(image, patch_size), ids), ids, patch_size)


def show_mask(image, ids_visible, ids_masked, patch_size):
    """Shows images [B, 3, H, W] in 0..1 as a method gets them: visible patches as they are, masked patches
    grey, and all other patches hatched."""
    under = hatch(*image.shape[-2:], max(2, patch_size // 2)).to(image).expand_as(image)
    visible = put_patches(under, image, ids_visible, patch_size)
    return put_patches(visible, torch.full_like(image, 0.5), ids_masked, patch_size)


def draw_reconstruction(method, images, regions=None, tokenizer=None, **mask):
    """Draws what a method makes of normalised images [B, 3, H, W]. Returns a picture [3, h, w], and what the
    method returned, with `error`: the mean squared error of the hidden pixels as drawn, in 0..1.

    A method that predicts normalised patches does not predict their mean and contrast. The picture then takes
    the true ones, and a tile beside it shows what the true mean alone looks like; its error is `error_hint`.
    Of LoMaR's windows only the first is shown. mask: ids_visible and ids_masked, if they are to be used.
    """
    image = denormalize(images)
    if isinstance(method, mim.DVAE):
        out = method(images)
        return picture(dict(image=image, reconstruction=denormalize(out["pred"]))), out
    p, grid = method.encoder.patch_size, method.encoder.grid
    num_patches = math.prod(grid)
    inputs = dict(mask, regions=regions) if "regions" in method.inputs else mask
    if tokenizer is not None:
        inputs["tokens"] = tokenizer.tokenize(images, grid)
    out, windows = method(images, **inputs), getattr(method, "num_windows", 1)
    ids_visible, ids_masked = (out[name].chunk(windows, dim=1)[0] for name in ("ids_visible", "ids_masked"))
    ids_used = torch.cat([out["ids_visible"], out["ids_masked"]], dim=1)
    white, masked = torch.ones_like(image), show_mask(image, ids_visible, ids_masked, p)

    def predicted(pred, ids):
        """The images with the patches `ids` as predicted. Tokens are drawn by their tokenizer."""
        if tokenizer is None:
            return denormalize(mim.reconstruct(images, pred.float(), ids, p, method.norm_pix))
        drawn = tokenizer.decode(inputs["tokens"].scatter(1, ids, pred.argmax(-1)), grid)
        return denormalize(F.interpolate(drawn.float(), image.shape[-2:], mode="bicubic", antialias=True))

    def add(title, pred, error):
        shown = predicted(pred, ids_masked)
        tiles[title] = put_patches(masked, shown, ids_masked, p)
        hidden = put_patches(0 * white, white, ids_masked, p)  # 1 where hidden; some ids are there twice
        out[error] = (hidden * (shown - image).square()).sum() / hidden.sum()

    def some_left_out(ids):  # a patch may be there twice
        used = torch.zeros(len(image), num_patches, device=image.device)
        return not used.scatter(1, ids.expand(len(image), -1), 1.0).all()

    tiles, legend, given = dict(image=image), HIDDEN, ""
    if "ids_thrown" in out:
        if method.throw != "random" and not mask:
            tiles["attention"] = heat(image, mim.attention_map(method.encoder, images))
            legend = SCALE | HIDDEN
    elif some_left_out(ids_used):
        title = "all windows" if hasattr(method, "num_windows") else "source and target"
        tiles[title] = show_mask(image, ids_used, ids_used[:, :0], p)
    tiles["masked" if windows == 1 else "masked: one window"] = masked
    can_draw = tokenizer is None or tokenizer.decoder is not None  # not with DALL-E's encoder alone
    if "pred" in out and can_draw:
        pred = out["pred"][:, :ids_masked.shape[1]]
        if tokenizer is None and method.norm_pix:
            given = ", true mean and contrast given"
            add("hint alone: true mean", 0 * pred, "error_hint")
        add("reconstruction" + given, pred, "error")
    if hasattr(method, "predict_whole"):
        everything = torch.arange(num_patches, device=image.device).expand(len(image), -1)
        full = method.predict_whole(images)
        out["loss_full"] = method.head.loss(full, images, inputs.get("tokens"), everything)[0]
        if can_draw:
            tiles["from all patches" + given] = predicted(full, everything)
    if "pred_regions" in out:
        maps = out["region_maps"]
        colours = class_colours(1 + maps.shape[1])[1:]
        ids = out.get("ids_masked_regions", ids_masked)
        tiles["regions"] = paint(white, maps, colours)
        tiles["masked regions"] = put_patches(tiles["regions"], white / 2, ids, p)
        completed = mim.reconstruct_regions(maps, out["pred_regions"], ids, p)
        tiles["completed regions"] = paint(white, completed, colours)
    if some_left_out(torch.cat([ids_visible, ids_masked], dim=1)):
        legend = legend | LEFT_OUT
    return picture(tiles, legend), out


def draw_examples(path, method, items, tokenizer, device, seed, heading):
    """Draws a reconstruction, with the same masks each time, and writes it to a file."""
    torch.manual_seed(seed)
    method.eval()
    items = {name: value.to(device) for name, value in items.items()}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # it is compiled for another batch size
        drawn = draw_reconstruction(method, **items, tokenizer=tokenizer)[0]
    save_picture(path, drawn, "pretrain", heading)


# ---------------------------------------------------------------------------------------------------------
# Settings: those that the user gave, else those of the recipe, else the defaults of the functions


def functions_of(given):
    """The functions and classes whose flags a run has. given: settings, of which `method` and `base`
    decide."""
    cls = mim.METHODS[given["method"]]
    functions = [load_data, pretrain, open_device, open_output, build_method, cls]
    if cls is mim.AMT:
        functions += [build_amt, mim.METHODS[given.get("base", "mae")]]
    if "regions" in cls.inputs:
        functions.append(open_regions)
    if cls is not mim.DVAE:
        functions.append(build_encoder)
        if "vocab_size" in inspect.signature(cls).parameters:
            functions.append(load_tokenizer)
    return functions


def recipe(given, image_size=(224, 224)):
    """The settings of a run in which it differs from the defaults of its functions: those of the paper, or
    ours for images (height, width) of up to 96 pixels. given: settings, of which method, base, data and model
    decide.
    """
    method, base = given["method"], given.get("base", "mae")
    paper = RECIPES[f"amt-{base}" if method == "amt" else method]
    if max(image_size) > SMALL:
        return paper
    scenes = given.get("data", "shapes") == "shapes"
    nano = scenes or given.get("model") == "nano"
    small = (NANO_RECIPE if nano else SMALL_RECIPE) | dict(patch_size=small_patch(image_size))
    if scenes:  # raw pixels teach more within minutes; on photographs normalised ones do (MAE, Table 1d)
        small["norm_pix"] = False
    small |= SMALL_METHOD_RECIPES.get(method, {})
    names = paper | flags_of(functions_of(given))
    return paper | {name: value for name, value in small.items() if name in names}


def parse(argv):
    """Reads the command line -> dict of the flags that the user gave. It opens no file."""
    first = Parser(add_help=False)  # these flags decide which others there are, and what the help shows
    first.add_argument("--method", choices=mim.METHODS)
    first.add([load_data, build_method, build_encoder, build_amt])
    known = vars(first.parse_known_args(argv)[0])
    more = ("With --method, --help lists its own flags too. The defaults are those of the run that would "
            "start with this command line (of folders: for images above 96 pixels, or of --image-size).")
    parser = Parser(description=__doc__.split("\n")[0], epilog=more)
    parser.add_argument("--method", required=True, choices=mim.METHODS)
    if "method" in known:
        size = known.get("image_size") or [NAMED.get(known.get("data", "shapes"), 224)]
        parser.add(functions_of(known), **recipe(known, image_pair(size)) | dict(image_size=None))
    others = {f"--method {name}": functions_of(dict(method=name)) for name in mim.METHODS}
    given = parser.parse(argv, others | {"--base simmim": [mim.SimMIM]})
    if "image_size" in given:
        given["image_size"] = image_pair(given["image_size"])
    return given


MAY_CHANGE = ("data", "tokenizer", "device", "precision", "workers", "compile", "output", "resume",
              "overwrite", "region_cache", "cam_weights", "prepare", "epochs", "save_every")


def resumed(given, state):
    """The settings of a resumed run: those that it was started with, and those that the user gives now.
    Raises UsageError if the user changes one that must not change."""
    saved = state["args"]
    for name, value in given.items():
        if name not in MAY_CHANGE and saved.get(name) != value:
            was = "its default" if saved.get(name) is None else saved[name]
            raise UsageError(f"--{name.replace('_', '-')} {value}: the run to resume was made with {was}; "
                             "keep that, or write to another --output")
    return {name: value for name, value in saved.items() if name not in ("device", "workers")} | given


def settle(given, source):
    """All settings of a run, in plain types: those that the user gave (or those of the run that is resumed),
    else those of the recipe, else the defaults of the flags."""
    natural = min(source.image_size, recipe(given).get("image_size", 224))
    size = given.get("image_size") or [natural, natural]
    defaults = {name: p.default for name, (p, _) in flags_of(functions_of(given)).items()}
    chosen = defaults | recipe(given, size)
    # A run of another length warms up for the same fraction of its epochs as the next longer one.
    epochs, warmup = given.get("epochs", chosen["epochs"]), chosen["warmup_epochs"]
    warmup = warmup if isinstance(warmup, dict) else {chosen["epochs"]: warmup}
    length = min((length for length in warmup if length >= epochs), default=max(warmup))
    chosen["warmup_epochs"] = warmup[length] * min(1.0, epochs / length)
    if "window_size" in chosen:  # LoMaR's, which may be larger than a small grid
        longest = min(size) // (chosen | given)["patch_size"]
        chosen["window_size"] = max(1, min(chosen["window_size"], longest))
    args = chosen | given | dict(image_size=size)
    args |= call(settle_batch, args, num_images=len(source), chosen="batch_size" in given)
    if "min_lr" not in given:
        args["min_lr"] = min(args["min_lr"], args["lr"])
    call(check_rates, args)
    if "regions" in args:
        args["regions"] = args["regions"] or default_regions(args["method"], args["data"])
        if args["regions"] == "cam" and args["method"] != "objmae":
            raise UsageError("--regions cam is for objmae; rae, rmae take fh, panoptic, instances, folders")
        if args["regions"] == "cam" and "object_floor" in given and "regions" not in given:
            raise UsageError("--object-floor has no effect with --regions cam, the default here")
        if args["regions"] == "instances" and "region_cache" in given and "regions" not in given:
            raise UsageError("--region-cache has no effect with --regions instances, the default here")
    return args


def settle_batch(batch_size, num_images, accumulate, lr, base_lr, lr_batch, chosen):
    """The batch size, the number of micro-batches and the learning rate of a run, as a dict.

    chosen: True if the user gave the batch size. If not, and if there are few images, a batch is a sixteenth
    of them, but at least 8. Its learning rate is at least that of lr_batch images, but at most the recipe's,
    because that of so small a batch would be almost 0.
    """
    if chosen and batch_size > num_images:
        raise UsageError(f"--batch-size {batch_size} is more than the {counted(num_images, 'images')} of "
                         "--data")
    batch = batch_size if chosen else min(batch_size, num_images, max(8, num_images // 16))
    lr = lr or base_lr * min(batch_size, max(batch, lr_batch)) / lr_batch
    if batch < batch_size and rank() == 0:
        print(f"{num_images} images are few for the recipe's batch of {batch_size}: taking {batch}, and "
              f"a learning rate of {lr:.3g}; --batch-size and --lr set others")
    return dict(batch_size=batch, accumulate=cut_batch(batch, num_images, accumulate)[1], lr=lr)


def small_patch(size):
    """The patch size for a small image (height, width): an eighth of the longer side, or the next smaller
    number that divides both sides."""
    return max((p for p in range(1, max(size) // 8 + 1) if math.gcd(*size) % p == 0), default=1)


def image_pair(size):
    """The one or two numbers of --image-size -> [height, width]."""
    if len(size) > 2:
        raise UsageError(f"--image-size takes one number, or height and width; got {size}")
    return list(size * 2)[:2]


# ---------------------------------------------------------------------------------------------------------
# Flags, for both programs. Each is an annotated keyword argument of a function.


def call(function, flags, **fixed):
    """Calls a function with the arguments `fixed`, and with those of the dict `flags` whose names it
    takes."""
    names = inspect.signature(function).parameters
    return function(**{name: value for name, value in flags.items() if name in names} | fixed)


def check_setting(name, value, annotation):
    """Raises ValueError if a value, which comes from a file, could not have come from a flag of this
    annotation.
    """
    parser = Parser(add_help=False)
    parser.add_argument("--flag", **flag_options(annotation))
    words = ["--flag", *map(str, value)] if isinstance(value, list) else ["--flag=" + str(value)]
    if isinstance(value, bool):
        words = ["--flag" if value else "--no-flag"]
    fitting = value is None and type(None) in typing.get_args(annotation)
    with contextlib.suppress(UsageError):
        fitting = fitting or parser.parse_args(words).flag == value
    if not fitting:
        raise ValueError(f"its setting {name} is wrong: {value}")


def flags_of(functions):
    """The flags of functions and classes: {name: (inspect.Parameter, help)}.

    The help is the line "name: text" of the docstring, for a class also of its base classes' docstrings.
    Where two functions have a flag of one name, the first counts.
    """
    flags = {}
    for function in functions:
        parts = getattr(function, "__mro__", [function])  # a class and its bases
        text = "\n".join(inspect.cleandoc(part.__doc__ or "") for part in reversed(parts))
        lines = re.findall(r"^((?:\w+, )*\w+): (.*(?:\n {4,}\S.*)*)", text, re.MULTILINE)
        texts = {name: " ".join(line.split()) for names, line in lines for name in names.split(", ")}
        for name, p in inspect.signature(function).parameters.items():
            if p.annotation is not p.empty and p.default is not p.empty:
                flags.setdefault(name, (p, texts.get(name, "")))
    return flags


def number(kind, low, high, words):
    """Returns the argparse type of numbers of a kind, int or float, from low to high."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}")

    return convert


def not_empty(words):
    """The argparse type of texts that are not empty, such as names of files."""
    if not words:
        raise argparse.ArgumentTypeError("must not be empty")
    return words


def flag_options(annotation):
    """The annotation of a parameter -> the keyword arguments of argparse's add_argument."""
    origin = typing.get_origin(annotation)
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    if origin is Annotated:
        return dict(type=number(*inner), metavar=inner[0].__name__.upper())
    if origin is Literal:
        return dict(choices=inner)
    if origin is list:
        return flag_options(inner[0]) | dict(nargs="+")
    if inner:  # X | None
        return flag_options(inner[0])
    if annotation is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if annotation in (int, float):  # neither nan nor inf
        words = "a whole number" if annotation is int else "a finite number"
        return flag_options(Annotated[annotation, -LARGEST, LARGEST, words])
    return dict(type=not_empty, metavar=annotation.__name__.upper())


class Parser(argparse.ArgumentParser):
    """A parser whose flags are arguments of functions. The type, choices and range of a flag come from the
    argument's annotation, its help from the docstring. Errors are raised as UsageError."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)

    def add(self, functions, **defaults):
        """Adds the flags of functions. defaults: shown in the help instead of those of the functions."""
        for name, (parameter, text) in flags_of(functions).items():
            default = defaults.get(name, parameter.default)
            if default is not None and default is not False:
                text += f" (default: {default})"
            self.add_argument("--" + name.replace("_", "-"), dest=name, help=text.replace("%", "%%"),
                              **flag_options(parameter.annotation))

    def error(self, message):
        raise UsageError(re.sub(r"^argument (--[\w-]+): ", r"\1 ", message))

    def parse(self, argv, others={}):
        """Reads the command line -> dict of the flags that were given. others: {words: functions}; a flag of
        these functions that this parser does not have is refused with "belongs to" and the words."""
        arguments, rest = self.parse_known_args(argv)
        if rest:
            flag = rest[0].split("=")[0]
            name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
            owners = [words for words, functions in others.items() if name in flags_of(functions)]
            if owners and flag.startswith("--") and name not in [action.dest for action in self._actions]:
                raise UsageError(f"{flag} belongs to {' or '.join(owners)}")
            hint = did_you_mean(flag, self._option_string_actions)
            raise UsageError(f"unknown argument {flag}: see --help{hint}")
        given = vars(arguments)
        for action in self._actions:
            for other, value in re.findall(r"not with (?:a |--)?(\w+)[ =]?(\w*)", action.help or ""):
                if action.dest in given and given.get(other) and value in ("", given[other]):
                    both = f"--{other} {value}".strip(), action.option_strings[0]
                    raise UsageError(f"{' and '.join(both)} exclude each other")
        return given


def exit_with_one_line(program, main):
    """Runs main() and returns the exit code. After a mistake of the user, or if memory runs out, it prints
    one line on stderr instead of a traceback."""
    tqdm.set_lock(threading.RLock())  # its own is for processes, too, and after Ctrl-C Python 3.14 misses it
    try:
        main()
        if dist.is_initialized() and dist.get_backend() == "nccl":  # with gloo torch 2.6 may hang here
            dist.destroy_process_group()
        return 0
    except UsageError as error:  # from a worker it comes with a traceback, whose last line is the message
        message = str(error).strip().splitlines()[-1].removeprefix("datasets.UsageError: ")
    except BrokenPipeError:  # as in `| head`
        sys.stdout = open(os.devnull, "w")  # or Python would try to write again at its exit
        message = "nobody reads its output any more"
    except OSError as error:
        message = f"{error.filename or 'system'}: {reason_of(error)}"
    except (RuntimeError, MemoryError) as error:
        if "DataLoader worker" in str(error):
            message = ("a worker was killed, perhaps because memory or, in a container, shared memory (docker "
                       "run --shm-size) ran out: try fewer --workers")
        elif re.search(r"C(\+\+)? compiler|triton installation", str(error)):
            message = "--compile: torch.compile needs a C++ compiler, on CUDA Triton, and does not find it"
        else:
            message = reason_of(error)
            if not message.startswith("out of memory"):
                raise
    if int(os.environ.get("RANK", 0)):
        time.sleep(10)  # the first process may fail too: then its line is printed, and torchrun ends this one
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(exit_with_one_line("train.py", lambda: main(sys.argv[1:])))
