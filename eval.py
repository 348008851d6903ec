"""Evaluation of a checkpoint: `python eval.py CHECKPOINT --task linear --data /imagenet`.

Tasks: knn, linear, attentive, finetune (accuracies, as one JSON line last); reconstruct, attention, segment (PNG
pictures); speed, data and compare (without a checkpoint: what a step of each method costs, what reading images costs,
what all methods give). CHECKPOINT is checkpoint.pt or encoder.pt of a run, a file of the MAE release, a timm state
dict, or `random`: an untrained encoder.
"""

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

import mim
from datasets import (MEAN, MIN_SIDE, SMALL, STD, BrokenFiles, EpochBatches, FHRegions, Images, UsageError, decode,
                      default_regions, default_scales, denormalize, load_data, make_loader, normalize, open_regions,
                      pair_max, read_labels, seed_of)
from train import PRECISIONS, Parser, add_method_flags, all_finite, build_method, check_choice, check_ranges, cores
from train import draw_reconstruction, exit_with_one_line, image_size_flag, learning_rate, method_parameters
from train import parameter_groups, parse as parse_run
from train import picture_items, settle as settle_recipe, settle_machine, tile, tokenizer_id, write_atomically

# ---------------------------------------------------------------------------------------------------------
# Recipes: the papers' on large images, ours (the second table) for images of up to 96 pixels

RECIPES = {
    "knn": dict(k=20, temperature=0.07, pool="cls"),  # Wu et al., 2018, arXiv:1805.01978
    "linear": dict(epochs=90, batch_size=16384, base_lr=0.1, warmup_epochs=10, pool="cls"),  # MAE, Table 10
    "attentive": dict(epochs=90, batch_size=8192, base_lr=0.0125, warmup_epochs=10, count=4),  # CAE: 0.4 in all
    "finetune": dict(epochs=100, batch_size=1024, base_lr=5e-4, warmup_epochs=5, weight_decay=0.05, layer_decay=0.65,
                     drop_path=0.1, label_smoothing=0.1, pool="mean"),  # MAE, Table 9, and its code for ViT-B
    "reconstruct": dict(count=8),
    "attention": dict(count=4, query=None),
    "segment": dict(count=6, image_visible=0.25),
    "speed": dict(model="base", image_size=224, patch_size=16, batch_size=64, repeats=5, methods=None,
                  reference="mae"),
    "data": dict(image_size=224, limit=200, repeats=3),
    "compare": dict(epochs=200, finetune_epochs=30, probe_epochs=90, jobs=1, methods=None),
}
LARGE_FINETUNE = dict(base_lr=1e-3, epochs=50, drop_path=0.2, layer_decay=0.75)  # MAE's code for ViT-L; ViT-H: 0.3
SMALL_RECIPES = {
    "linear": dict(epochs=90, batch_size=256, base_lr=20.0, warmup_epochs=10),
    "attentive": dict(epochs=90, batch_size=256, base_lr=0.05, warmup_epochs=10),
    "finetune": dict(epochs=30, batch_size=128, base_lr=1e-3, warmup_epochs=3),
    "speed": dict(model="small", batch_size=4),  # this and the next: on a CPU
    "compare": dict(epochs=10, finetune_epochs=5, probe_epochs=30),
}
SETTINGS = {  # flag: (type, what it is)
    "epochs": (int, "passes over the training images"),
    "batch_size": (int, "images per step"),
    "base_lr": (float, "learning rate per 256 images of the batch"),
    "warmup_epochs": (float, "linear warm-up"),
    "weight_decay": (float, "of AdamW"),
    "layer_decay": (float, "learning rate of a block over that of the one above"),
    "drop_path": (float, "stochastic depth of the last block"),
    "label_smoothing": (float, "of the cross-entropy"),
    "pool": (str, "an image's feature: cls (class token) or mean (of the patches, each after the encoder's norm; in "
                  "finetune a new norm comes behind the mean)"),
    "k": (int, "neighbours"),
    "temperature": (float, "of the neighbours' votes"),
    "count": (int, "images in the picture"),
    "image_visible": (float, "segment: share of the image's patches that are encoded, those of the hints among them "
                             "(default 0.25, as many as in pre-training; 1: the whole image)"),
    "finetune_epochs": (int, "compare: of fine-tuning"),
    "probe_epochs": (int, "compare: of the linear and the attentive probe"),
    "jobs": (int, "compare: rows of the table worked on at a time, which share the CPU's cores"),
    "repeats": (int, "speed: timed steps of each variant; data: timed passes"),
    "query": (int, "whose attention: 0 the class token (default; of LoMaR, which does not train it, the patch in the "
                   "middle), 1+i patch i"),
}


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017, arXiv:1708.03888), as MAE's linear probe uses it.

    SGD with momentum in which the gradient of a weight matrix is scaled to trust * |w| / |g|; biases are not scaled.
    """

    def __init__(self, params, lr, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                gradient = p.grad
                if p.ndim > 1:
                    w, g = p.norm(), gradient.norm()
                    gradient = gradient * torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1.0)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(gradient)
                p.add_(momentum, alpha=-group["lr"])


# ---------------------------------------------------------------------------------------------------------
# Checkpoints and features


def report(path, missing, left_over):
    """Says on stderr what a checkpoint lacked, and what of it was not used."""
    for what, names in (("missing", missing), ("left over", left_over)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            print(f"{path}: {what}: {', '.join(names[:4])}{more}", file=sys.stderr)


def open_encoder(settings):
    """The ViT to evaluate, from settings["checkpoint"] or untrained; raises UsageError if it cannot be had."""
    path, size = settings["checkpoint"], settings.get("image_size")
    try:
        if path == "random":
            torch.manual_seed(settings["seed"])
            size = size or load_data(settings["data"], "val").image_size
            small, shapes = pair_max(size) <= SMALL, settings["data"] == "shapes"
            model = settings.get("model", "nano" if shapes else "tiny" if small else "base")
            check_choice("--model", model, list(mim.SIZES))
            patch_size = settings.get("patch_size", max(1, pair_max(size) // 8) if small else 16)
            return mim.ViT(size, patch_size, **mim.SIZES[model], relative_position="relative_position" in settings)
        for flag in ("model", "patch_size", "relative_position"):
            if flag in settings:
                raise UsageError(f"--{flag.replace('_', '-')} is for an untrained encoder; {path} brings its own")
        content = mim.load_file(path)
        if size is None and isinstance(content, dict) and isinstance(content.get("args"), dict):
            size = content["args"].get("image_size")  # the only record of a grid that is not square
        if size is None and not any(k.endswith("pos_embed") for k in mim.read_checkpoint(content)):
            if "images" in settings:
                raise UsageError(f"--image-size is needed: {path} has relative positions, which fit any")
            size = load_data(settings["data"], "val").image_size
            print(f"{path} has relative positions, which fit any size: taking the data's, {size}", file=sys.stderr)
        encoder, names = mim.vit_from_checkpoint(content, size)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    report(path, *names)
    return encoder


def open_method(settings):
    """The whole method, decoder included: from a run's checkpoint.pt, or the MAE release's file with decoder."""
    path, overrides = settings["checkpoint"], settings["method_options"]
    if path == "random":
        raise UsageError(f"--task {settings['task']} needs a whole pre-trained model, not random")
    try:
        content = mim.load_file(path)
        if isinstance(content, dict) and isinstance(content.get("args"), dict) and "method_options" in content["args"]:
            run = dict(content["args"])
            unknown = [k for k in overrides if k not in run["method_options"]]
            if unknown:
                flag = unknown[0].replace("_", "-")
                raise UsageError(f"--{flag} is no argument of {run['method']}, which {path} is of")
            run["method_options"] = run["method_options"] | overrides
            if "tokenizer" in settings and not run.get("tokenizer"):
                raise UsageError(f"--tokenizer: the {run['method']} run of {path} has pixels as its target")
            for name in ("regions", "fh_scales", "cam_weights", "cam_labels", "region_cache"):
                if name in run and (name == "fh_scales" or "images" not in settings):
                    settings.setdefault(name, run[name])
            if "images" in settings and run["method"] in ("rae", "rmae"):
                settings.setdefault("regions", "fh")
            run["tokenizer"] = settings.get("tokenizer", run.get("tokenizer"))
            method = build_method(run)
            if tokenizer_id(method) != run.get("tokenizer_id"):
                raise UsageError(f"--tokenizer {run['tokenizer']} is not what {path} was trained with")
            try:
                method.load_state_dict(content["model"])
            except RuntimeError:
                flags = ", ".join("--" + k.replace("_", "-") for k in overrides)
                raise UsageError(f"{flags}: makes another model than the one in {path}") from None
            return method
        state = mim.read_checkpoint(content)
        if not any(k.startswith("decoder_blocks.") for k in state):
            raise ValueError("it has an encoder only; --task reconstruct needs checkpoint.pt, or an MAE with decoder")
        encoder, _ = mim.vit_from_checkpoint(state)
        decoder_dim = state["decoder_embed.weight"].shape[0]
        depth = len({k.split(".")[1] for k in state if k.startswith("decoder_blocks.")})
        args = content.get("args")  # MAE's files hold the options of their training
        norm_pix = getattr(args, "norm_pix_loss", None) if not isinstance(args, dict) else args.get("norm_pix_loss")
        if norm_pix is not None:
            overrides = dict(norm_pix=bool(norm_pix)) | overrides
        method = mim.MAE(encoder, decoder_dim=decoder_dim, decoder_depth=depth, decoder_heads=16, **overrides)
        report(path, *mim.load_mae(method, state))
        return method
    except UsageError:
        raise
    except (ValueError, RuntimeError, TypeError) as error:
        message = str(error).splitlines()[0]
        raise UsageError(message if str(path) in message else f"{path}: {message}") from None


PIECE = 256  # images that go through an encoder at a time


def to_device(batch, device):
    """A loader's batch -> normalised images [b, 3, H, W] and labels [b] on the device."""
    return normalize(batch["image"].to(device, non_blocking=True)), batch["label"].to(device, non_blocking=True)


@torch.no_grad()
def extract(function, dataset, machine, label="features"):
    """All images of a dataset through function(images [b, 3, H, W]) -> outputs [n, ...], labels [n], on the device."""
    device, amp, workers = machine
    broken, outputs, labels = BrokenFiles(dataset.source, tqdm.write), None, []
    for batch in tqdm(make_loader(dataset, workers, device, batch_size=PIECE), desc=label, leave=False):
        broken.watch(batch["broken"])
        images, some_labels = to_device(batch, device)
        with amp():
            some = function(images)
        if outputs is None:  # all of it at once: patches of many images are too much to hold twice
            try:
                outputs = some.new_empty(len(dataset), *some.shape[1:])
            except RuntimeError:
                size = len(dataset) * some[0].numel() * some.element_size() / 2**30
                raise UsageError(f"there is no memory for the {label} of {len(dataset)} images, {size:.1f} GiB: leave "
                                 "out --cache-features, or --limit the images") from None
        done = sum(map(len, labels))
        outputs[done : done + len(some)] = some
        labels.append(some_labels)
    return outputs, torch.cat(labels)


def accuracies(logits, labels):
    """Top-1 and, with at least 5 classes, top-5 accuracy in percent."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    top = dict(top1=round(100 * hits[:, 0].float().mean().item(), 2))
    return top | (dict(top5=round(100 * hits.any(1).float().mean().item(), 2)) if logits.shape[1] >= 5 else {})


# ---------------------------------------------------------------------------------------------------------
# Tasks: each takes the model, the settings and the machine (device, autocast, workers); returns news for the JSON line


def labelled_source(settings, split, size=None):
    """The images of --data; raises UsageError if they have no labels."""
    limit = settings.get("limit") if split == "train" else None
    source = load_data(settings["data"], split, size, limit=limit)
    if len(source.classes) < 2:
        raise UsageError(f"--task {settings['task']} needs labels: a folder per class; {source.description}")
    return source


def labelled(settings, split, size, view="center", **options):
    """The labelled images of --data as items."""
    source = labelled_source(settings, split, size)
    print(source.description, file=sys.stderr)
    return Images(source, size, view, seed=settings["seed"], **options)


def knn_logits(train_features, train_labels, features, num_classes, k=20, temperature=0.07):
    """Votes [n, num_classes] of the k nearest training features by cosine, weighted exp(cosine / temperature)."""
    train_features, features = F.normalize(train_features, dim=1), F.normalize(features, dim=1)
    votes = torch.zeros(len(features), num_classes, device=features.device)
    for some, rows in zip(features.split(1024), votes.split(1024)):
        similarity, nearest = (some @ train_features.T).topk(min(k, len(train_features)), dim=1)
        rows.scatter_add_(1, train_labels[nearest], (similarity / temperature).exp())
    return votes


def knn(encoder, settings, machine):
    """k-nearest-neighbour classification on frozen features."""
    datasets = [labelled(settings, split, encoder.image_size) for split in ("train", "val")]
    features = pooled(encoder, settings["pool"])
    known, labels = extract(features, datasets[0], machine, "train features")
    new, truth = extract(features, datasets[1], machine, "val features")
    votes = knn_logits(known, labels, new, len(datasets[0].source.classes), settings["k"], settings["temperature"])
    return accuracies(votes, truth)


def pooled(encoder, pool):
    """The function images -> features [b, D] in float32."""
    return lambda images: encoder.features(images, pool).float()


def classifier(dim, num_classes):
    """Batch norm without affine and a linear layer, [B, dim] -> [B, num_classes] (MAE, Table 10; CAE, Appendix A)."""
    head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, num_classes))
    nn.init.normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    return head


class AttentiveProbe(nn.Module):
    """CAE's probe (§5.2, Appendix A, arXiv:2202.03026): patch outputs [B, N, D] -> logits [B, num_classes].

    One learned query gathers by cross-attention from the patches what a classifier, as the linear probe's, reads;
    no MLP, no skip connection.
    """

    def __init__(self, dim, num_heads, num_classes):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.attn = mim.CrossAttention(dim, num_heads)
        self.attn.apply(mim.init_weights)
        self.classifier = classifier(dim, num_classes)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, patches):
        patches = patches.float()
        gathered = self.attn(self.query.expand(len(patches), -1, -1), patches, patches)
        return self.classifier(gathered.squeeze(1))

    def attention(self, patches):
        """Where the query looks (Figure 5): [B, heads, N], rows sum to one."""
        patches = patches.float()
        return self.attn.weights(self.query.expand(len(patches), -1, -1), patches).squeeze(2)


def train_batches(train, batches, loader, features, machine, cached=None):
    """One epoch of a probe's training, a step at a time: (features [b, ...], labels [b]) on the device.

    cached: (features, labels) of all images; otherwise each batch of the loader is encoded, in pieces that fit.
    """
    device, amp, _ = machine
    broken = BrokenFiles(train.source, tqdm.write)
    if cached:
        for keys in batches:
            ids = torch.tensor([index for _, index in keys]).to(device, non_blocking=True)
            yield cached[0][ids], cached[1][ids]
        return
    pieces = []
    for batch in loader:
        broken.watch(batch["broken"])
        images, labels = to_device(batch, device)
        with torch.no_grad(), amp():
            pieces.append((features(images), labels))
        if len(pieces) == batches.batch_size // batches.micro_batch:
            yield tuple(torch.cat(x) for x in zip(*pieces))
            pieces = []


def train_probe(encoder, features, make_head, make_optimizer, settings, machine):
    """Trains a head on a frozen encoder -> the head in eval mode, and its accuracies.

    features: images [b, 3, H, W] -> what the head takes. make_head(num_classes); make_optimizer(parameters, lr=...).
    cache_features: the training images are encoded once, from the evaluation view, instead of anew in every epoch
    from random crops and flips.
    """
    device, cache, title = machine[0], settings["cache_features"], f"{settings['task']} probe"
    encoder.requires_grad_(False).eval()
    train = labelled(settings, "train", encoder.image_size, "center" if cache else "crop", crop_scale=(0.08, 1.0))
    val = labelled(settings, "val", encoder.image_size)
    cached = extract(features, train, machine, "train features") if cache else None
    torch.manual_seed(settings["seed"])
    head = make_head(len(train.source.classes)).to(device)
    batch_size, epochs, lr = fit_batch(settings, train)
    optimizer = make_optimizer(head.parameters(), lr=lr)
    batches = EpochBatches(len(train), batch_size, batch_size if cache else min(PIECE, batch_size), settings["seed"])
    loader, steps = make_loader(train, machine[2], device, batch_sampler=batches), len(train) // batch_size
    progress = tqdm(total=epochs * steps, desc=title)
    for epoch in range(epochs):
        batches.epoch = epoch
        for inputs, labels in train_batches(train, batches, loader, features, machine, cached):
            warmup_steps = settings["warmup_epochs"] * steps
            optimizer.param_groups[0]["lr"] = learning_rate(progress.n, epochs * steps, warmup_steps, lr)
            F.cross_entropy(head(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.update()
    progress.close()
    if not all_finite(head):
        raise UsageError(f"the probe's weights are no longer finite: try a lower --base-lr than {settings['base_lr']}")
    head.eval()

    def logits(images):
        inputs = features(images)
        with torch.autocast(device.type, enabled=False):  # as in training, the head is in float32
            return head(inputs)

    return head, accuracies(*extract(logits, val, machine, "val")) | dict(features="cached" if cache else "augmented")


def linear(encoder, settings, machine):
    """Linear probe (MAE, Table 10): frozen encoder, batch norm without affine, linear layer, LARS."""
    head = functools.partial(classifier, encoder.embed_dim)
    return train_probe(encoder, pooled(encoder, settings["pool"]), head, LARS, settings, machine)[1]


def attentive(encoder, settings, machine):
    """Attentive probe (CAE, Appendix A): frozen encoder, `AttentiveProbe`, SGD; and a picture of where it looks.

    Cached, the patches of all training images are on the device, 2 N D bytes each: 1.2 GB for CIFAR-10 at ViT-Ti and 64
    patches. Otherwise those of a batch are: 2.5 GB for 8192 at ViT-B/16 and 224 pixels.
    """
    features = lambda images: encoder(images)[:, 1:].half()  # noqa: E731
    head = functools.partial(AttentiveProbe, encoder.embed_dim, encoder.num_heads)
    optimizer = functools.partial(torch.optim.SGD, momentum=0.9)
    probe, result = train_probe(encoder, features, head, optimizer, settings, machine)
    images = pictured(settings, encoder.image_size, machine[0])["images"]
    with torch.no_grad(), machine[1]():
        maps = probe.attention(features(images)).unflatten(2, encoder.grid)
    write_picture(settings["output"], tile_attention(images, maps))
    return result | dict(picture=str(settings["output"]))


def fit_batch(settings, train):
    """(batch size, epochs, learning rate), after cutting settings["batch_size"] to the number of training images, and
    above PIECE to a multiple of it."""
    settings["batch_size"] = min(settings["batch_size"], len(train))
    settings["batch_size"] -= settings["batch_size"] % PIECE if settings["batch_size"] > PIECE else 0
    if settings["batch_size"] < 2:
        raise UsageError(f"--batch-size must be at least 2, got {settings['batch_size']}")
    return settings["batch_size"], settings["epochs"], settings["base_lr"] * settings["batch_size"] / 256


class Classifier(nn.Module):
    """An encoder with a linear classifier on its class token or, behind a new norm, the mean of its patches."""

    def __init__(self, encoder, num_classes, pool="mean"):
        super().__init__()
        self.encoder, self.pool = encoder, pool
        # With mean pooling the norm comes after the mean (MAE and BEiT), so the encoder's own steps aside.
        self.fc_norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6) if pool == "mean" else nn.Identity()
        if pool == "mean":
            encoder.norm = nn.Identity()
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # as in MAE's fine-tuning code: starts from near-equal logits
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        return self.head(self.fc_norm(self.encoder.features(images, self.pool)))


def layer_groups(model, weight_decay, layer_decay):
    """Parameter groups with `lr_scale` = layer_decay^(layers above): BEiT's layer-wise learning rate decay.

    The patch embedding and tokens are layer 0, block i is layer i+1, the head is above all and keeps the full rate.
    """
    depth, groups = len(model.encoder.blocks), []
    top = nn.ModuleList([model.encoder.norm, model.fc_norm, model.head])
    for number, layer in enumerate([model.encoder.patch_embed, *model.encoder.blocks, top]):
        for group in parameter_groups(layer, weight_decay):
            groups.append(group | dict(lr_scale=layer_decay ** (depth + 1 - number)))
    tokens = [p for _, p in model.encoder.named_parameters(recurse=False) if p.requires_grad]
    groups.append(dict(params=tokens, weight_decay=0.0, lr_scale=layer_decay ** (depth + 1)))
    return [g for g in groups if g["params"]]


def augmented(settings, size):
    """The training images of fine-tuning: crops, flips, RandAugment, random erasing (MAE, Table 9).

    Each of the two operations is applied with probability 0.5, as in timm, which MAE's code uses. torchvision's
    RandAugment has no magnitude noise (the papers' 0.5), and erased boxes are ImageNet's mean, not noise.
    """
    mean = [round(255 * m) for m in MEAN]
    operation = v2.RandAugment(1, 9, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR, fill=mean)
    once = v2.RandomApply([operation], p=0.5)  # magnitude 9 of 10
    augment = v2.Compose([once, once, v2.RandomErasing(0.25, value=mean)])
    return labelled(settings, "train", size, "crop", crop_scale=(0.08, 1.0), augment=augment)


def finetune(encoder, settings, machine):
    """End-to-end fine-tuning (MAE, Table 9): layer-wise decay, mixup and cutmix of `augmented` images.

    After every epoch the model and all that an exact resume needs are in finetune.pt.
    """
    device, amp, workers = machine
    train, val = augmented(settings, encoder.image_size), labelled(settings, "val", encoder.image_size)
    num_classes = len(train.source.classes)
    torch.manual_seed(settings["seed"])
    encoder.requires_grad_(True)  # the position table too, as in MAE's fine-tuning
    mim.set_drop_path(encoder.blocks, settings["drop_path"])
    model = Classifier(encoder, num_classes, settings["pool"]).to(device)
    batch_size, epochs, peak = fit_batch(settings, train)
    optimizer = torch.optim.AdamW(layer_groups(model, settings["weight_decay"], settings["layer_decay"]), lr=peak,
                                  betas=(0.9, 0.999), fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=settings["precision"] == "fp16")
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=num_classes), v2.CutMix(alpha=1.0, num_classes=num_classes)])
    piece = min(PIECE, batch_size)  # mixed, and through the model, at a time
    batches = EpochBatches(len(train), batch_size, piece, settings["seed"])
    loader = make_loader(train, workers, device, batch_sampler=batches)
    broken, steps, path = BrokenFiles(train.source, tqdm.write), len(train) // batch_size, settings["output"]
    chosen = dict({k: settings[k] for k in (*RECIPES["finetune"], "checkpoint", "data", "seed")}, images=len(train))
    done = 0
    if settings.get("resume"):
        state = open_finetuned(path, chosen)
        done = state["epoch"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    progress = tqdm(total=epochs * steps, initial=done * steps, desc="fine-tuning")
    for epoch in range(done, epochs):
        batches.epoch = epoch
        model.train()
        for number, batch in enumerate(loader, start=1):
            broken.watch(batch["broken"])
            torch.manual_seed(seed_of(settings["seed"], epoch, number))
            images, targets = mix(*to_device(batch, device))
            lr = learning_rate(progress.n, epochs * steps, settings["warmup_epochs"] * steps, peak, minimum=1e-6)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            with amp():
                loss = F.cross_entropy(model(images).float(), targets, label_smoothing=settings["label_smoothing"])
            scaler.scale(loss * piece / batch_size).backward()
            if number * piece % batch_size:
                continue
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            progress.update()
            value = loss.item()  # the step's one wait for the device
            progress.set_postfix_str(f"loss {value:.4f}")
            if not math.isfinite(value):
                raise UsageError(f"the loss is {value} at step {progress.n}, learning rate {lr:.3g}: try a lower "
                                 "--base-lr")
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                     epoch=epoch + 1, args=chosen)
        write_atomically(path, functools.partial(torch.save, state))
    progress.close()
    model.eval()
    return accuracies(*extract(lambda images: model(images).float(), val, machine, "val")) | dict(output=str(path))


def open_finetuned(path, chosen):
    """What `finetune` has written to a file; UsageError if it is something else or was made with other settings."""
    if not path.exists():
        raise UsageError(f"--resume: there is no {path}")
    try:
        state = mim.load_file(path)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not isinstance(state, dict) or not isinstance(state.get("args"), dict) or "layer_decay" not in state["args"]:
        raise UsageError(f"--resume: {path} is not of --task finetune")
    for name, value in chosen.items():
        if state["args"].get(name) != value:
            raise UsageError(f"--resume: {path} was made with {name} {state['args'].get(name)}, not {value}")
    return state


def pictured(settings, size, device):
    """The items of a picture on the device: images (normalised) of --images, or `count` spread over --data's val split.

    With settings["regions"] they have regions too; of single images those are FH's.
    """
    if "images" in settings:
        regions = None
        if "regions" in settings:
            if settings["regions"] != "fh":
                raise UsageError(f"--regions {settings['regions']}: single images have no regions but fh")
            regions = FHRegions(settings.get("fh_scales") or [1000])
        images = Images(FileList(settings["images"]), size, "center", regions=regions)
        items = picture_items(images, len(settings["images"]))
        return {k: v.to(device) for k, v in items.items()}
    items = picture_items(with_regions(settings, size), settings["count"])
    return {k: v.to(device) for k, v in items.items()}


def with_regions(settings, size):
    """--data's val images as items, with their regions if settings["regions"] says which."""
    source, regions = load_data(settings["data"], "val", size), None
    if "regions" in settings:
        scales = settings.get("fh_scales") or default_scales(source, settings["data"])
        options = {k: settings[k] for k in ("cam_weights", "cam_labels") if k in settings}
        regions = open_regions(settings["regions"], source, settings["data"], "val", scales,
                               settings.get("region_cache", "data/regions"), **options)
    return Images(source, size, "center", regions=regions)


def write_picture(path, picture):
    """A picture [3 or 1, H, W] in [0, 1] -> a PNG file."""
    write_atomically(path, lambda to: save_image(picture, to, format="png"))


class FileList:
    """A source of single files, each of which must be readable."""

    def __init__(self, paths, flag="--images"):
        self.paths, self.flag = paths, flag

    def __len__(self):
        return len(self.paths)

    def read(self, index):
        try:
            image = decode(self.paths[index])
        except Exception:  # decoders raise anything
            reason = "cannot be decoded as an image" if Path(self.paths[index]).is_file() else "no such file"
            raise UsageError(f"{self.flag} {self.paths[index]}: {reason}") from None
        if min(image.shape[1:]) < MIN_SIDE:
            raise UsageError(f"{self.flag} {self.paths[index]}: {image.shape[2]}x{image.shape[1]} pixels, too small")
        return dict(image=image, label=0)

    def name(self, index):
        return self.paths[index]


def reconstruct(method, settings, machine):
    """A picture of image, masked image and reconstruction, and the losses of these images.

    The method's own flags override the run's. loss_full is CAE's of the whole image's pass, which skips the regressor.
    """
    device, amp, _ = machine
    if "regions" not in method.inputs:
        settings.pop("regions", None)
    items = pictured(settings, sized(method).image_size, device)
    torch.manual_seed(settings["seed"])
    with torch.no_grad(), amp():
        grid = draw_reconstruction(method, **items)
        torch.manual_seed(settings["seed"])
        losses = {k: v for k, v in method(**items).items() if k.startswith("loss") or k == "accuracy"}
        if hasattr(method, "reconstruct_full"):
            images = items["images"]
            ids = torch.arange(method.encoder.num_patches, device=device).expand(len(images), -1)
            losses["loss_full"] = method.head.compare(method.reconstruct_full(images), images, ids)[0]
    write_picture(settings["output"], grid)
    return {k: round(v.item(), 4) for k, v in losses.items()} | dict(picture=str(settings["output"]))


def hint_patches(maps, count):
    """Binary maps in patches [B, k, N, p*p] -> `count` random patches of each, one with foreground, [B, k, count]."""
    noise = torch.rand(maps.shape[:3], device=maps.device)
    inside = noise + maps.any(-1)  # one patch that shows the object, and otherwise any
    first = inside.argmax(-1, keepdim=True)
    return noise.scatter(-1, first, 2.0).argsort(-1, descending=True)[..., :count]


def given_hints(settings, size, patch_size):
    """The user's hints -> (hint map bool [1, 1, H, W], ids [1, n] of the patches that they show).

    --points and --background: x,y in pixels of the image file; each shows its whole patch. --hints: a label PNG as
    large as the image, 0 for unknown, 1 for background, more for the region.
    """
    path, (H, W) = settings["images"][0], size
    height, width = FileList([path]).read(0)["image"].shape[1:]
    labels = torch.zeros(H, W, dtype=torch.long)
    if "hints" in settings:
        try:
            hints = read_labels(settings["hints"])
        except Exception as error:
            raise UsageError(f"--hints {settings['hints']}: it is no label PNG ({error})") from None
        if hints.shape != (height, width):
            raise UsageError(f"--hints {settings['hints']}: {hints.shape[1]}x{hints.shape[0]} pixels, the image has "
                             f"{width}x{height}")
        labels = F.interpolate(hints[None, None].float(), (H, W), mode="nearest-exact")[0, 0].long().clamp(max=2)
    for flag, label in (("points", 2), ("background", 1)):
        for point in settings.get(flag, []):
            try:
                x, y = (float(v) for v in point.split(","))
            except ValueError:
                raise UsageError(f"--{flag} {point}: a point is x,y in pixels") from None
            if not (0 <= x < width and 0 <= y < height):
                raise UsageError(f"--{flag} {point} is outside of the image of {width}x{height} pixels")
            row, column = (int(v) // patch_size * patch_size for v in (y * H / height, x * W / width))
            labels[row : row + patch_size, column : column + patch_size] = label
    patches = mim.patchify(labels[None, None], patch_size)
    shown = patches.any(-1)
    if not (patches == 2).any():
        raise UsageError("--task segment of --images needs hints: --points x,y ... inside the region, or --hints")
    if shown.all():
        raise UsageError("--hints: there is no patch left to complete")
    return (labels == 2)[None, None], shown.nonzero()[:, 1][None]


def image_patches(ids_hint, num_patches, share):
    """The patches of the image to encode, [B, n]: those of the hints and random others up to `share` of all."""
    count = max(ids_hint.shape[1], int(share * num_patches))
    noise = torch.rand(len(ids_hint), num_patches, device=ids_hint.device).scatter(1, ids_hint, 2.0)
    return noise.argsort(1, descending=True)[:, :count]


def nearest_hint(patches, ids, grid):
    """What a patch's nearest shown patch holds: patches [B, N, p*p] with `ids` [B, n] shown -> bool [B, N, p*p]."""
    rows, columns = (torch.arange(patches.shape[1], device=ids.device) // grid[1],
                     torch.arange(patches.shape[1], device=ids.device) % grid[1])
    place = torch.stack([rows, columns], 1).float()
    nearest = torch.cdist(place.expand(len(ids), -1, -1), place[ids]).argmin(2)
    mostly = mim.take(patches, ids).float().mean(2) > 0.5
    return mostly.gather(1, nearest)[..., None].expand_as(patches)


def segment_one(method, settings, machine):
    """The region of one image, from the user's hints: the picture, and the region's mask in the image's own size."""
    device, amp, _ = machine
    size, p, N = method.encoder.image_size, method.encoder.patch_size, method.encoder.num_patches
    if len(settings["images"]) > 1:
        raise UsageError("--task segment takes one image")
    image = normalize(Images(FileList(settings["images"]), size, "whole")[0]["image"][None].to(device))
    hints, ids = (x.to(device) for x in given_hints(settings, size, p))
    with torch.no_grad(), amp():
        region = method.complete(image, hints, ids, image_patches(ids, N, settings["image_visible"]))
    shown = torch.full_like(mim.patchify(region, p), 0.5)
    shown = mim.unpatchify(mim.put(shown, ids, mim.take(mim.patchify(hints.float(), p), ids)), p, method.encoder.grid)
    picture = denormalize(image)
    tiles = [picture, shown.expand(-1, 3, -1, -1), region.expand(-1, 3, -1, -1), picture * (0.2 + 0.8 * region)]
    write_picture(settings["output"], tile(torch.cat(tiles), columns=4))
    whole = FileList(settings["images"]).read(0)["image"].shape[1:]
    mask = F.interpolate(region, whole, mode="bilinear", align_corners=False)[0] > 0.5
    path = settings["output"].with_name(settings["output"].stem + "_mask.png")
    write_picture(path, mask.float())
    return dict(picture=str(settings["output"]), mask=str(path))


def segment(method, settings, machine):
    """Interactive segmentation (R-MAE, Figure 6): a region is completed from a few of its patches.

    With --images and hints: the completed region of one image, as a picture and as a mask of the image's size. Without:
    objects of the val images with 80, 85 and 90% of their patches hidden, the picture of some, and the mean
    intersection over union (IoU, in percent) inside the hidden patches; beside it that of copying the nearest hint.
    """
    if not hasattr(method, "complete"):
        raise UsageError("--task segment is for runs of rae and rmae")
    device, amp, workers = machine
    encoder, share = method.encoder, settings["image_visible"]
    size, p, N = encoder.image_size, encoder.patch_size, encoder.num_patches
    torch.manual_seed(settings["seed"])
    if "images" in settings:
        return segment_one(method, settings, machine)
    if settings.get("regions") == "cam" or "regions" not in settings:
        raise UsageError("--task segment needs --regions fh, panoptic, instances or a folder of masks")
    dataset = with_regions(settings, size)
    if hasattr(dataset.regions, "fill"):
        dataset.regions.fill(workers)
    rows, found = [], {r: [] for r in (80, 85, 90)}
    for batch in tqdm(make_loader(dataset, workers, device, batch_size=64), desc="segment", leave=False):
        images, regions = to_device(batch, device)[0], batch["regions"].to(device, non_blocking=True)
        maps, real = mim.select_objects(regions, 1)
        patches, tiles = mim.patchify(maps, p), [denormalize(images), maps.float().expand(-1, 3, -1, -1)]
        for ratio in found:
            ids = hint_patches(patches[:, None], max(1, round(N * (1 - ratio / 100))))[:, 0]
            with torch.no_grad(), amp():
                region = method.complete(images, maps, ids, image_patches(ids, N, share))
            hidden = torch.ones(patches.shape[:2], dtype=torch.bool, device=device).scatter(1, ids, False)
            guesses = mim.patchify(region, p) > 0.5, nearest_hint(patches, ids, encoder.grid)
            both = [((g & patches & hidden[..., None]).sum((1, 2)), ((g | patches) & hidden[..., None]).sum((1, 2)))
                    for g in guesses]
            iou = torch.stack([i / u.clamp_min(1) for i, u in both], 1)
            found[ratio].append(iou[real[:, 0] & (both[0][1] > 0)])
            grey = torch.full_like(patches, 0.5, dtype=torch.float32)
            shown = mim.unpatchify(mim.put(grey, ids, mim.take(patches.float(), ids)), p, encoder.grid)
            tiles += [shown.expand(-1, 3, -1, -1), region.expand(-1, 3, -1, -1)]
        rows += [torch.stack(row) for row, ok in zip(zip(*tiles), real[:, 0]) if ok][: settings["count"] - len(rows)]
    if not rows:
        raise UsageError(f"--task segment: no image of {settings['data']} has a region of at least 5% of it")
    write_picture(settings["output"], tile(torch.cat(rows), columns=len(rows[0])))
    iou = {r: 100 * torch.cat(values) for r, values in found.items()}
    scores = {f"iou_{r}": round(v[:, 0].mean().item(), 2) for r, v in iou.items()}
    return scores | {f"nearest_hint_{r}": round(v[:, 1].mean().item(), 2) for r, v in iou.items()} | dict(
        objects=len(iou[80]), picture=str(settings["output"]))


def heat(images, attention):
    """Images [n, 3, H, W] in [0, 1] and maps [n, gh, gw] -> images under the map, black-red-yellow-white."""
    attention = F.interpolate(attention[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)
    attention = attention / attention.amax((2, 3), keepdim=True).clamp_min(1e-12)
    colour = (3 * attention - torch.arange(3.0, device=images.device).view(3, 1, 1)).clamp(0, 1)
    return 0.4 * images + 0.6 * colour


def object_flow(flow, regions, patch_size):
    """Rollout [B, 1+N, 1+N] -> mean over the patches of one object of each image, and these: [B, N], [B, N] bool."""
    if regions.is_floating_point():
        regions = (regions > 0.3).long()  # a class activation map, as in ObjMAE
    maps, found = mim.select_objects(regions, 1)
    member = mim.object_patches(maps[:, 0], patch_size) & found
    flow = (member[:, None].float() @ flow[:, 1:, 1:])[:, 0] / member.sum(1, keepdim=True).clamp_min(1)
    return flow - flow.amin(1, keepdim=True), member


def tile_attention(images, maps, beside=()):
    """A grid: a row has an image, the mean of its attention maps [n, heads, gh, gw] over it, each map if there are
    several, and the pictures [n, 3, H, W] `beside`."""
    shown = denormalize(images)
    if maps.shape[1] > 1:
        maps = torch.cat([maps.mean(1, keepdim=True), maps], dim=1)
    over = [heat(image.expand(len(m), -1, -1, -1), m) for image, m in zip(shown, maps)]
    rows = [torch.cat(parts) for parts in zip(shown[:, None], over, *(b[:, None] for b in beside))]
    return tile(torch.cat(rows), columns=len(rows[0]))


def attention(encoder, settings, machine):
    """A picture of the last block's attention: a row has the image, the mean of the heads over it, and each head.

    rollout: instead, the attention rolled out through all blocks; with regions also one object (all else dark) and the
    rollout of its patches (ObjMAE, Figures 7 and 10).
    """
    device, amp, _ = machine
    if settings["query"] is None:
        (gh, gw), relative = encoder.grid, encoder.relative_position
        settings["query"] = 1 + gh // 2 * gw + gw // 2 if relative else 0
    if not 0 <= settings["query"] <= encoder.num_patches:
        raise UsageError(f"--query {settings['query']}: it may be 0 (class token) to {encoder.num_patches} (the last "
                         "patch)")
    items, beside = pictured(settings, encoder.image_size, device), ()
    images = items["images"]
    torch.manual_seed(settings["seed"])
    with torch.no_grad(), amp():
        if settings.get("rollout"):
            flow = encoder.rollout(images)
            maps = flow[:, settings["query"], 1:].unflatten(1, encoder.grid)[:, None]
            maps = maps - maps.amin((2, 3), keepdim=True)
        else:
            maps = encoder.last_attention(images, settings["query"]).unflatten(2, encoder.grid)
    if settings.get("rollout") and "regions" in items:
        flow, member = object_flow(flow, items["regions"], encoder.patch_size)
        inside = F.interpolate(member.unflatten(1, encoder.grid)[:, None].float(), images.shape[-2:])
        shown = denormalize(images)
        beside = shown * (0.3 + 0.7 * inside), heat(shown, flow.unflatten(1, encoder.grid))
    write_picture(settings["output"], tile_attention(images, maps, beside))
    return dict(picture=str(settings["output"]))


# ---------------------------------------------------------------------------------------------------------
# Speed

class RandomTokens(nn.Module):
    """In place of a tokenizer, at no cost: random tokens, by default DALL-E's 8192."""

    def __init__(self, vocab_size=8192):
        super().__init__()
        self.vocab_size = vocab_size

    def tokenize(self, images, grid):
        return torch.randint(self.vocab_size, (len(images), grid[0] * grid[1]), device=images.device)


TOKENS = dict(tokenizer=RandomTokens())
VARIANTS = {  # name: (method, its arguments); "vit" is the encoder alone on all patches
    "vit": (None, {}),
    "mae": ("mae", {}), "simmim": ("simmim", {}), "beit": ("beit", TOKENS),
    "amt": ("amt", {}), "amt-simmim": ("amt", dict(base="simmim")),
    "lomar": ("lomar", {}),
    "objmae-1/2": ("objmae", dict(alpha=1 / 2)), "objmae-1/4": ("objmae", dict(alpha=1 / 4)),
    "objmae-1/8": ("objmae", dict(alpha=1 / 8)), "objmae-1/16": ("objmae", dict(alpha=1 / 16)),
    "rae": ("rae", {}), "rmae": ("rmae", {}), "rmae-batch": ("rmae", dict(variant="batch")),
    "cae": ("cae", {}), "cae-token": ("cae", TOKENS),
}


class Plain(nn.Module):
    """A ViT under a loss, to time its pass over all patches."""

    inputs = ()

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return dict(loss=self.encoder(images).square().mean())


def synthetic_batch(method, batch_size, device):
    """Random images and whatever else the method takes in training, as keyword arguments."""
    H, W = method.encoder.image_size
    rows, columns = torch.meshgrid(torch.arange(H) * 4 // H, torch.arange(W) * 4 // W, indexing="ij")
    regions = (1 + 4 * rows + columns).to(torch.uint8).expand(batch_size, 1, -1, -1)  # 16 squares
    values = dict(regions=regions, index=torch.arange(batch_size), flip=torch.zeros(batch_size, dtype=torch.bool),
                  box=torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(batch_size, -1))
    if hasattr(method, "maps_due"):  # masks from maps that are there, as nearly always in training
        method.maps = torch.rand(batch_size, *method.encoder.grid, device=device).half()
    if isinstance(method, mim.ObjMAE):
        values["regions"] = None  # the whole image as the object, which is the most that alpha leaves
    inputs = {k: values[k] for k in method.inputs if values[k] is not None}
    return dict(images=torch.randn(batch_size, 3, H, W)) | inputs


def make_variant(name, settings, device):
    """A variant, its batch and a function that takes one training step, AdamW's included, and returns its seconds."""
    method, options = VARIANTS[name]
    size, patch_size = settings["image_size"], settings["patch_size"]
    cls = mim.METHODS.get(method)
    try:
        encoder_options = cls.encoder_options if cls else {}
        encoder = mim.ViT(size, patch_size, **mim.SIZES[settings["model"]], **encoder_options)
        model = (cls(encoder, **options) if cls else Plain(encoder)).to(device).train()
    except ValueError as error:
        raise UsageError(f"--methods {name}: {error}") from None
    batch = {k: v.to(device) for k, v in synthetic_batch(model, settings["batch_size"], device).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step(call=model):
        began = time.perf_counter()
        with settings["amp"]():
            call(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return model, batch, step


def count_gmac(model, batch):
    """10^9 multiply-adds of matrix products and convolutions for one image: forward alone, forward and backward."""
    one = {k: v[:1] for k, v in batch.items()}
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


def speed(settings, machine):
    """Parameters, GMAC, training images/s, ratio to the reference, share of the matmul peak, peak memory: a table.

    `rate` is a variant's multiply-adds a second over the reference's: below 1 where more than products takes time. Its
    steps and the reference's (MAE's) take turns, so that what else the machine does falls on both. The tokenizer of
    token targets is not part of the time.
    """
    device, amp, _ = machine
    settings["amp"] = amp
    names = settings["methods"] or list(VARIANTS)
    for name in names:
        check_choice("--methods", name, list(VARIANTS))
    check_choice("--reference", settings["reference"], list(VARIANTS))
    peak = matmul_peak(device, PRECISIONS[settings["precision"]])
    print(f"ViT-{settings['model']}/{settings['patch_size']}, {settings['image_size']} pixels, batch "
          f"{settings['batch_size']}, {settings['precision']}, {device}; matmul peak {peak:.0f} GMAC/s\n"
          f"{'':12s}{'parameters':>11s}{'GMAC':>8s}{'images/s':>10s}{'x ' + settings['reference']:>7s}{'rate':>7s}"
          + f"{'of peak':>9s}"
          + f"{'MiB':>8s}" * (device.type == "cuda")
          + f"{'compiled':>10s}{'ratio':>7s}" * bool(settings.get("compile")))
    reference, batch, reference_step = make_variant(settings["reference"], settings, device)
    _, reference_gmac = count_gmac(reference, batch)
    rows = []
    for name in tqdm(names, leave=False, disable=device.type != "cuda"):
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        model, batch, step = make_variant(name, settings, device)
        gmac, step_gmac = count_gmac(model, batch)
        row = dict(name=name, parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                   gmac=round(gmac, 2))
        calls = {"": model} | ({"compiled_": torch.compile(model, dynamic=False)} if settings.get("compile") else {})
        for prefix, call in calls.items():
            times = [(step(call), reference_step()) for _ in range(settings["repeats"] + 2)][2:]  # two warm up
            mine, other = (min(t) for t in zip(*times))
            row |= {prefix + "images_per_s": round(settings["batch_size"] / mine, 2),
                    prefix + "ratio": round(other / mine, 3)}
            if not prefix:
                row["rate"] = round(row["ratio"] * step_gmac / reference_gmac, 3)
                row["of_peak"] = round(step_gmac * settings["batch_size"] / mine / peak, 3)
            if not prefix and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                step()
                row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        cells = [f"{name:12s}{row['parameters'] / 1e6:10.1f}M{gmac:8.2f}{row['images_per_s']:10.2f}{row['ratio']:7.2f}"
                 f"{row['rate']:7.2f}{100 * row['of_peak']:8.1f}%"]
        cells += [f"{row['peak_mib']:8d}"] if "peak_mib" in row else []
        if settings.get("compile"):
            cells.append(f"{row['compiled_images_per_s']:10.2f}{row['compiled_ratio']:7.2f}")
        tqdm.write("".join(cells))
        rows.append(row)
        del model, batch, step, calls
    return dict(rows=rows, matmul_peak_gmac_per_s=round(peak))


def data(settings, machine):
    """Images/s of reading, decoding, cropping and flipping on one core: the usual pipeline of Pillow and transforms v1
    as MAE's code has it, and `Images`, whose normalisation is left to the device. They take turns."""
    source = load_data(settings["data"], "pretrain", limit=settings["limit"])
    if source.in_memory or settings["data"] == "shapes":
        raise UsageError(f"--task data reads image files, and --data {settings['data']} is none: give a folder")
    transform = transforms.Compose([
        transforms.RandomResizedCrop(settings["image_size"], (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def usual(index):
        try:
            with open(source.name(index), "rb") as file:
                return transform(Image.open(file).convert("RGB"))
        except Exception as error:
            raise UsageError(f"{source.name(index)} cannot be decoded as an image ({error})") from None

    images = Images(source, settings["image_size"])
    torch.set_num_threads(1)
    seconds = dict(usual=[], ours=[])
    for epoch in range(settings["repeats"] + 1):
        for name, read in (("usual", usual), ("ours", lambda index: images[epoch, index])):
            began = time.perf_counter()
            for index in tqdm(range(len(source)), desc=name, leave=False):
                read(index)
            seconds[name].append(time.perf_counter() - began)
    speed = {name: len(source) / sorted(s[1:])[len(s) // 2 - 1] for name, s in seconds.items()}  # the first warms up
    print(f"{source.description}: {speed['usual']:.0f} images/s with Pillow and transforms v1, {speed['ours']:.0f} "
          f"here, {speed['ours'] / speed['usual']:.2f} times as many")
    return {name: round(x, 1) for name, x in speed.items()} | dict(ratio=round(speed["ours"] / speed["usual"], 3),
                                                                   data=settings["data"])


# Side by side: a table of what each method gives for the same epochs, and for the same compute

COMPARED = {  # name: what train.py is told
    "mae": "--method mae", "simmim": "--method simmim", "beit": "--method beit --tokenizer",
    "amt": "--method amt", "amt-simmim": "--method amt --base simmim", "lomar": "--method lomar",
    "objmae": "--method objmae", "objmae-inter": "--method objmae --selection inter", "rae": "--method rae",
    "rmae": "--method rmae", "cae": "--method cae", "cae-token": "--method cae --tokenizer",
}
MEASURES = ("knn", "linear", "attentive", "finetune")


def shared_flags(settings, *names):
    """Those of these flags that are set, for the commands of --task compare."""
    given = {k: settings[k] for k in ("data", "seed", "limit", "device", "precision", "workers", *names)
             if settings.get(k) is not None}
    return [word for k, v in given.items() for word in (f"--{k.replace('_', '-')}", str(v))]


def train_command(name, epochs, settings):
    """train.py's arguments for a row of the table, but for --output."""
    words = ["--method", "dvae"] if name == "dvae" else [*COMPARED[name].split(), "--epochs", str(epochs)]
    if "--tokenizer" in words:
        words.insert(words.index("--tokenizer") + 1, str(settings["output"] / "dvae" / "checkpoint.pt"))
    if words[1] == "objmae" and settings.get("small") and default_regions("objmae", settings["data"]) == "cam":
        words += ["--regions", "fh"]  # a ResNet-50 of ImageNet has no maps of so small images
    words += shared_flags(settings, *() if name == "dvae" else ("model", "patch_size"))
    return ["train.py", *words, *["--compile"] * bool(settings.get("compile"))]


def eval_commands(checkpoint, settings, output):
    """eval.py's arguments for the measures of one encoder. All pool by the mean: some methods train no class token."""
    common = shared_flags(settings, *("model", "patch_size") if checkpoint == "random" else ())
    mean, probe = ["--pool", "mean"], ["--cache-features", "--epochs", str(settings["probe_epochs"])]
    to = lambda name: ["--output", str(output / name)]  # noqa: E731
    special = dict(knn=mean, linear=[*mean, *probe], attentive=[*probe, *to("attentive.png")],
                   finetune=[*mean, "--epochs", str(settings["finetune_epochs"]), *to("finetune.pt")])
    return {task: ["eval.py", str(checkpoint), "--task", task, *special[task], *common] for task in MEASURES}


def plain_gmac(encoder):
    """10^9 multiply-adds of an encoder's pass over all patches of an image: forward alone, forward and backward."""
    return count_gmac(Plain(encoder), dict(images=torch.zeros(1, 3, *encoder.image_size)))


def training_gmac(method, epochs):
    """10^9 multiply-adds that an image costs in pre-training: forward, backward and AMT's passes for its maps.

    Those of a tokenizer are left out, as BEiT's and CAE's papers do.
    """
    tokenizer = getattr(getattr(method, "head", None), "tokenizer", None)
    if tokenizer is not None:
        method.head.tokenizer = RandomTokens(tokenizer.vocab_size)
    gmac = count_gmac(method, synthetic_batch(method, 1, torch.device("cpu")))[1]
    if hasattr(method, "maps_due"):
        due = sum(method.maps_due(epoch, epochs) for epoch in range(epochs))
        gmac += plain_gmac(method.encoder)[0] * due / epochs
    return gmac


def carry_out(command, log, settings):
    """Runs a command unless its log says that it has been; returns the log's last line.

    The log is the command, what it printed, and last its result; beside it, as .err, what went to stderr. UsageError if
    the command fails, if another row has, or if another command's run is there.
    """
    text, errors = "python " + " ".join(command), log.with_suffix(".err")
    lines = log.read_text(errors="replace").split("\n") if log.exists() else [""]
    result = lines[-2] if len(lines) > 2 else ""
    if lines[0] == text and (result.startswith("{") or "epochs done" in result):
        return result
    kept = log.parent / {"train.txt": "checkpoint.pt", "finetune.txt": "finetune.pt"}.get(log.name, "no file")
    resume = kept.exists() and (command[0] == "train.py" or lines[0] == text)
    if resume and lines[0] != text:
        raise UsageError(f"{log.parent} holds a run of another command, {lines[0] or 'without a log'}: choose another "
                         "--output")
    if settings["stopped"].is_set():
        raise UsageError("another row of the table has failed")
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // settings["jobs"]))} if settings["jobs"] > 1 else {}
    words = [sys.executable, str(Path(__file__).parent / command[0]), *command[1:], *["--resume"] * resume]
    with open(log, "w") as out, open(errors, "w") as err:
        print(text, file=out, flush=True)
        code = subprocess.run(words, stdout=out, stderr=err, env=os.environ | threads).returncode
    if code:
        said = errors.read_text(errors="replace").strip().splitlines()
        why = f"killed by signal {-code}" if code < 0 else said[-1] if said else f"it ended with {code}"
        raise UsageError(f"{text}: {why}")
    return log.read_text(errors="replace").split("\n")[-2]


def pretrain(name, epochs, settings, output):
    """Carries out a row's pre-training in the folder `output`."""
    carry_out([*train_command(name, epochs, settings), "--output", str(output)], output / "train.txt", settings)


def compare_row(name, epochs, settings):
    """Pre-trains and measures one encoder -> dict(epochs, seconds of training, an accuracy for each of MEASURES)."""
    output = settings["output"] / (name if name in ("random", "supervised") else f"{name}-{epochs}")
    row = dict(name=name, epochs=epochs, seconds=0.0)
    if name == "supervised":
        scratch = eval_commands("random", settings | dict(finetune_epochs=epochs), output)["finetune"]
        commands = dict(finetune=[*scratch, "--layer-decay", "1"])
    elif name == "random":
        commands = eval_commands("random", settings, output)
    else:
        pretrain(name, epochs, settings, output)
        lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        row |= dict(seconds=sum(line["seconds"] for line in lines), loss=round(lines[-1]["loss"], 4))
        commands = eval_commands(output / "encoder.pt", settings, output)
    for task, command in commands.items():
        result = json.loads(carry_out(command, output / f"{task}.txt", settings))
        row[task] = result["top1"]
        row["seconds"] += result["seconds"]
    return row | dict(seconds=round(row["seconds"]))


def compare_table(share, done):
    """The rows done -> Markdown, a line a method; share: its compute an image over MAE's."""
    lines = [["", "compute", "k-NN", "linear", "attentive", "fine-tuned", "minutes"], ["---"] * 7]
    for row in done:
        accuracies = [f"{row[task]:.1f}" if task in row else "" for task in MEASURES]
        compute = f"{share[row['name']]:.2f}" if row["name"] in share else ""
        lines.append([row["name"], compute, *accuracies, f"{row['seconds'] / 60:.0f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def compare(settings, machine):
    """The methods under one budget: pre-trained for the same epochs, four accuracies each, minutes of all a row took.

    Every row is a sequence of train.py and eval.py commands, which its logs in --output show. What is there is not done
    again, so that the table goes on after an interrupt. `random` is the untrained encoder, its fine-tuning supervised
    training from scratch; `supervised` is that for the compute of MAE's pre-training and fine-tuning together.
    """
    names, epochs, output = settings["methods"] or list(COMPARED), settings["epochs"], settings["output"]
    for name in names:
        check_choice("--methods", name, list(COMPARED))
    train, _ = (labelled_source(settings, split) for split in ("train", "val"))
    source = load_data(settings["data"], "pretrain", limit=settings.get("limit"))
    settle = lambda name: settle_recipe(  # noqa: E731
        parse_run(train_command(name, epochs, settings)[1:]), len(source), source.image_size)
    mae = settle("mae")  # whose encoder all have
    settings |= dict(model=mae["model"], patch_size=mae["patch_size"], small=pair_max(mae["image_size"]) <= SMALL)
    settings["stopped"] = threading.Event()
    if any("--tokenizer" in COMPARED[name] for name in names):
        pretrain("dvae", None, settings | dict(jobs=1), output / "dvae")  # alone, so on all cores
    methods = {name: build_method(settle(name)) for name in dict.fromkeys(("mae", *names))}
    gmac = {name: training_gmac(method, epochs) for name, method in methods.items()}
    share = {name: g / gmac["mae"] for name, g in gmac.items()}
    scratch = epochs * gmac["mae"] * len(source) / (plain_gmac(methods["mae"].encoder)[1] * len(train))
    rows = [("random", 0), ("supervised", settings["finetune_epochs"] + round(scratch))]
    rows = list(dict.fromkeys([*rows, *((name, epochs) for name in names)]))
    print(f"{len(rows)} encoders; the commands and what they print are in {output}/", file=sys.stderr)
    done = {}
    with ThreadPoolExecutor(settings["jobs"]) as pool, tqdm(total=len(rows), desc="encoders") as progress:
        def work(row):
            try:
                return compare_row(*row, settings)
            except BaseException:  # an interrupt ends the commands, and so comes here too
                settings["stopped"].set()
                raise

        for result in as_completed([pool.submit(work, row) for row in rows]):
            row = result.result()
            done[row["name"], row["epochs"]] = row
            progress.update()
            tqdm.write(json.dumps(row), file=sys.stderr)
    done = [done[row] for row in rows]
    print(compare_table(share, done))
    chosen = {k: settings.get(k) for k in ("data", "limit", "model", "patch_size", "compile")}
    return dict(rows=done, gmac={k: round(v, 4) for k, v in gmac.items()}, **chosen)


# ---------------------------------------------------------------------------------------------------------
# Command line

TASKS = dict(knn=knn, linear=linear, attentive=attentive, finetune=finetune, reconstruct=reconstruct,
             attention=attention, segment=segment, speed=speed, data=data,
             compare=compare)
OF_ALL = ("speed", "compare", "data")  # tasks without a checkpoint
WHOLE = ("reconstruct", "segment")  # tasks of the whole method, not the encoder alone
OF_ENCODER = ("knn", "linear", "attentive", "finetune", "attention")
PICTURES = ("attentive", "reconstruct", "attention", "segment")
WRITES = (*PICTURES, "finetune")
ONLY_FOR = dict(  # the decoder of reconstruct and segment has its own image size
    image_size=("knn", "linear", "attentive", "finetune", "attention", "speed", "data"), images=PICTURES,
    output=(*WRITES, "compare"), resume=("finetune",),
    limit=("knn", "linear", "attentive", "finetune", "compare", "data"),
    cache_features=("linear", "attentive"), rollout=("attention",), tokenizer=("reconstruct",),
    regions=("reconstruct", "attention", "segment"), cam_weights=("reconstruct", "attention"), points=("segment",),
    background=("segment",), hints=("segment",), model=(*OF_ENCODER, "speed", "compare"),
    patch_size=(*OF_ENCODER, "speed"), relative_position=OF_ENCODER, methods=("speed", "compare"), reference=("speed",),
    compile=("speed", "compare"))


def parse(argv):
    """Command line -> what the user gave; arguments of pre-training methods (for reconstruct) in method_options."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?", help="a file, or `random`; speed, data and compare need none")
    parser.add_argument("--task", help=", ".join(TASKS))
    parser.add_argument("--data", default="shapes", help="as in train.py")
    parser.add_argument("--limit", type=int, help="use so many of the training images, evenly spread (default: all)")
    parser.add_argument("--images", nargs="+", help="image files for a picture, instead of --data")
    parser.add_argument("--model", help="size of an untrained encoder")
    parser.add_argument("--image-size", type=int, nargs="+", help="pixels (default: the checkpoint's)")
    parser.add_argument("--patch-size", type=int, help="of an untrained encoder")
    parser.add_argument("--relative-position", action="store_true", default=None,
                        help="an untrained encoder with LoMaR's relative positions")
    parser.add_argument("--rollout", action="store_true", default=None, help="attention: rolled out through all blocks")
    parser.add_argument("--regions", help="as in train.py, for reconstruct, segment (default: the run's) and --rollout")
    parser.add_argument("--cam-weights", help="as in train.py")
    parser.add_argument("--tokenizer", help="reconstruct: as in train.py, if it is not where it was")
    parser.add_argument("--methods", nargs="+", help=f"speed: some of {', '.join(VARIANTS)}; compare: "
                                                             f"some of {', '.join(COMPARED)}")
    parser.add_argument("--reference", help="speed: the variant that the others are compared with (default: mae)")
    parser.add_argument("--compile", action="store_true", default=None, help="speed: with torch.compile too; "
                                                                                   "compare: train with it")
    parser.add_argument("--points", nargs="+", help="segment: x,y ... in pixels, inside the region")
    parser.add_argument("--background", nargs="+", help="segment: x,y ... outside of it")
    parser.add_argument("--hints", help="segment: label PNG of the image's size, 0 unknown, 1 background, 2 region")
    parser.add_argument("--cache-features", action="store_true", help="linear, attentive: encode training images once")
    parser.add_argument("--output", help="the file of the picture, or of the fine-tuned model (default: TASK.png or "
                                         "finetune.pt beside the checkpoint); compare: a folder")
    parser.add_argument("--resume", action="store_true", default=None, help="finetune: go on from --output")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--precision")
    for name, (kind, text) in SETTINGS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=text)
    options = {k: p for m in mim.METHODS for k, p in method_parameters(m).items()}
    add_method_flags(parser.add_argument_group("overrides of the run's method, for reconstruct and segment"), options)
    given = {k: v for k, v in vars(parser.parse_all(argv)).items() if v is not None}
    if "task" not in given:
        raise UsageError(f"--task is missing; it may be {', '.join(TASKS)}")
    check_choice("--task", given["task"], list(TASKS))
    given["method_options"] = {k: given.pop(k) for k in options if k in given}
    if "image_size" in given:
        given["image_size"] = image_size_flag(given["image_size"])
    return given


def check(given):
    """Raises UsageError for what does not go with the task, or is out of range."""
    task = given["task"]
    if given["method_options"] and task not in WHOLE:
        raise UsageError(f"--{next(iter(given['method_options'])).replace('_', '-')} is for --task reconstruct")
    for name in SETTINGS.keys() & given.keys() - RECIPES[task].keys():
        raise UsageError(f"--{name.replace('_', '-')} is no setting of --task {task}")
    for name, tasks in ONLY_FOR.items():
        if given.get(name) and task not in tasks:
            raise UsageError(f"--{name.replace('_', '-')} is for --task {' and '.join(tasks)}")
    for name, end in (("label_smoothing", 1), ("drop_path", 1), ("seed", 2**63)):
        if given.get(name, 0) >= end:
            raise UsageError(f"--{name.replace('_', '-')} must be below {end}, got {given[name]}")
    if task == "attention" and "regions" in given and not given.get("rollout"):
        raise UsageError("--regions of --task attention is for --rollout")
    if given.get("image_visible", 0) > 1:
        raise UsageError(f"--image-visible must be at most 1, got {given['image_visible']}")
    check_ranges(given, ("epochs", "batch_size", "base_lr", "layer_decay", "k", "temperature", "count", "repeats",
                         "image_visible", "finetune_epochs", "probe_epochs", "jobs", "limit"),
                 ("warmup_epochs", "weight_decay", "drop_path", "label_smoothing", "seed"))
    check_choice("--pool", given.get("pool", "cls"), ["cls", "mean"])
    if task in OF_ALL:
        check_choice("--model", given.get("model", "base"), list(mim.SIZES))
        if "checkpoint" in given:
            raise UsageError(f"--task {task} takes no checkpoint, got {given['checkpoint']}")
    elif "checkpoint" not in given:
        raise UsageError("which checkpoint? Give a file, or `random`")


def sized(model):
    """What has the image size: the encoder of a method, or the model itself."""
    return model if model is None or hasattr(model, "image_size") else model.encoder


def settle(given, model, precision, on_cuda):
    """What the user gave, the task's recipe for the rest -> all settings; model: the method or encoder, or None."""
    task, encoder = given["task"], sized(model)
    recipe = dict(RECIPES[task])
    small = task in SMALL_RECIPES and encoder is not None and max(encoder.image_size) <= SMALL
    if small or task in ("speed", "compare") and not on_cuda:
        recipe |= SMALL_RECIPES[task]
    if task == "finetune" and not small and encoder.embed_dim >= mim.SIZES["large"]["embed_dim"]:
        recipe |= LARGE_FINETUNE | (dict(drop_path=0.3) if encoder.embed_dim >= mim.SIZES["huge"]["embed_dim"] else {})
    if "epochs" in given and "warmup_epochs" in recipe:  # a shorter run warms up for the same share of it
        recipe["warmup_epochs"] *= min(1.0, given["epochs"] / recipe["epochs"])
    settings = recipe | dict(precision=precision) | given
    if getattr(encoder, "relative_position", False) and "pool" in recipe:  # LoMaR pools by the mean, and
        settings["pool"] = given.get("pool", "mean")
        if task == "finetune" and not small:
            settings["base_lr"] = given.get("base_lr", 1e-3)  # fine-tunes at 1e-3 (its §6.1)
    if task == "compare":
        settings["output"] = Path(given.get("output", f"runs/compare-{Path(given['data']).name}"))
        return settings | dict(precision=given.get("precision"))
    beside = Path("runs/random") if given.get("checkpoint") == "random" else Path(given.get("checkpoint", "")).parent
    settings["output"] = Path(given.get("output", beside / f"{task}.{'pt' if task == 'finetune' else 'png'}"))
    return settings


def try_output(path):
    """Says at once, and not after an hour, if a file cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(f"--output {path}: {error.strerror}") from None
    if path.is_dir():
        raise UsageError(f"--output {path}: it is a folder; give a file")


def main(argv):
    """One evaluation, from the command line to its JSON line."""
    given = parse(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("eval.py runs in one process: start it with python, not with torchrun")
    task, began = given["task"], time.perf_counter()
    device, precision, workers = settle_machine(given)
    check(given)
    model = None if task in OF_ALL else open_method(given) if task in WHOLE else open_encoder(given)
    settings = settle(given, model, precision, device.type == "cuda")
    amp = lambda: torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")  # noqa: E731
    machine = device, amp, workers
    if task in WRITES:
        try_output(settings["output"])
    for i in range(len(settings.get("images", []))):
        FileList(settings["images"]).read(i)  # says now what is wrong
    if task in OF_ALL:
        result = dict(task=task, **TASKS[task](settings, machine))
    else:
        try:
            result = TASKS[task](model.to(device).eval(), settings, machine)
        except KeyboardInterrupt:
            if task != "finetune":
                raise
            raise KeyboardInterrupt(f"what {settings['output']} has is kept, --resume continues from it") from None
        result = dict(task=task, **result, checkpoint=given["checkpoint"], data=given["data"])
        result |= dict(image_size=list(sized(model).image_size))
    result |= {k: settings[k] for k in RECIPES[task]}
    result |= dict(seed=given["seed"], device=str(device), precision=precision)
    print(json.dumps(result | dict(seconds=round(time.perf_counter() - began, 1))))


if __name__ == "__main__":
    sys.exit(exit_with_one_line("eval.py", lambda: main(sys.argv[1:])))
