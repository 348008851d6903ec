"""Evaluation of a checkpoint: `python eval.py CHECKPOINT --task linear --data /imagenet`.

Tasks: knn, linear, finetune (accuracies, as one JSON line last), reconstruct, attention (PNG pictures). CHECKPOINT is
checkpoint.pt or encoder.pt of a run, a file of the MAE release, a timm state dict, or `random`: an untrained encoder.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

import mim
from datasets import (MEAN, SMALL, BrokenFiles, EpochBatches, Images, UsageError, decode, default_scales, denormalize,
                      load_data, make_loader, normalize, open_regions, pair_max, seed_of)
from train import (PRECISIONS, Parser, add_method_flags, build_method, check_choice, check_ranges, draw_reconstruction,
                   exit_with_one_line, image_size_flag, learning_rate, method_parameters, parameter_groups,
                   picture_items, settle_machine, tile, write_atomically)

# ---------------------------------------------------------------------------------------------------------
# Recipes: the papers' on large images, ours (the second table) for images of up to 96 pixels

RECIPES = {
    "knn": dict(k=20, temperature=0.07, pool="cls"),  # Wu et al., 2018, arXiv:1805.01978
    "linear": dict(epochs=90, batch_size=16384, base_lr=0.1, warmup_epochs=10, pool="cls"),  # MAE, Table 10
    "finetune": dict(epochs=100, batch_size=1024, base_lr=5e-4, warmup_epochs=5, weight_decay=0.05, layer_decay=None,
                     drop_path=0.1, label_smoothing=0.1, pool="mean"),  # MAE, Table 9; base_lr its code's for ViT-B
    "reconstruct": dict(count=8),
    "attention": dict(count=4, query=None),
}
SMALL_RECIPES = {
    "linear": dict(epochs=90, batch_size=256, base_lr=20.0, warmup_epochs=10),
    "finetune": dict(epochs=30, batch_size=128, base_lr=1e-3, warmup_epochs=3),
}
SETTINGS = {  # flag: (type, what it is)
    "epochs": (int, "passes over the training images"),
    "batch_size": (int, "images per step"),
    "base_lr": (float, "learning rate per 256 images of the batch"),
    "warmup_epochs": (float, "linear warm-up"),
    "weight_decay": (float, "of AdamW"),
    "layer_decay": (float, "learning rate of a block over that of the one above (default: 0.65, from ViT-L on 0.75)"),
    "drop_path": (float, "stochastic depth of the last block"),
    "label_smoothing": (float, "of the cross-entropy"),
    "pool": (str, "an image's feature: cls (class token) or mean (of the patches)"),
    "k": (int, "neighbours"),
    "temperature": (float, "of the neighbours' votes"),
    "count": (int, "images in the picture"),
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
    drop_path = settings.get("drop_path", RECIPES["finetune"]["drop_path"]) if settings["task"] == "finetune" else 0.0
    try:
        if path == "random":
            torch.manual_seed(settings["seed"])
            size = size or load_data(settings["data"], "val").image_size
            small, shapes = pair_max(size) <= SMALL, settings["data"] == "shapes"
            model = settings.get("model", "nano" if shapes else "tiny" if small else "base")
            check_choice("--model", model, list(mim.SIZES))
            patch_size = settings.get("patch_size", max(1, pair_max(size) // 8) if small else 16)
            return mim.ViT(size, patch_size, **mim.SIZES[model], drop_path=drop_path,
                           relative_position="relative_position" in settings)
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
        encoder, names = mim.vit_from_checkpoint(content, size, drop_path=drop_path)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    report(path, *names)
    return encoder


def open_method(settings, overrides):
    """The whole method, decoder included: from a run's checkpoint.pt, or the MAE release's file with decoder."""
    path = settings["checkpoint"]
    if path == "random":
        raise UsageError("--task reconstruct needs a pre-trained model with its decoder, not random")
    try:
        content = mim.load_file(path)
        if isinstance(content, dict) and isinstance(content.get("args"), dict) and "method_options" in content["args"]:
            run = dict(content["args"])
            unknown = [k for k in overrides if k not in run["method_options"]]
            if unknown:
                flag = unknown[0].replace("_", "-")
                raise UsageError(f"--{flag} is no argument of {run['method']}, which {path} is of")
            run["method_options"] = run["method_options"] | overrides
            for name in ("regions", "fh_scales"):
                if name in run and "images" not in settings:
                    settings.setdefault(name, run[name])
            method = build_method(run)
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
        method = mim.MAE(encoder, decoder_dim=decoder_dim, decoder_depth=depth, decoder_heads=16, **overrides)
        report(path, *mim.load_mae(method, state))
        return method
    except UsageError:
        raise
    except (ValueError, RuntimeError, TypeError) as error:
        message = str(error).splitlines()[0]
        raise UsageError(message if str(path) in message else f"{path}: {message}") from None


@torch.no_grad()
def extract(encoder, dataset, pool, machine, label="features"):
    """All images of a dataset -> features [n, D] and labels [n], on the device."""
    device, amp, workers = machine
    broken, features, labels = BrokenFiles(dataset.source, tqdm.write), [], []
    encoder.eval()
    for batch in tqdm(make_loader(dataset, workers, batch_size=256), desc=label, leave=False):
        broken.watch(batch["broken"])
        with amp():
            features.append(encoder.features(normalize(batch["image"].to(device)), pool).float())
        labels.append(batch["label"].to(device))
    return torch.cat(features), torch.cat(labels)


def accuracies(logits, labels):
    """Top-1 and, with at least 5 classes, top-5 accuracy in percent."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    top = dict(top1=round(100 * hits[:, 0].float().mean().item(), 2))
    return top | (dict(top5=round(100 * hits.any(1).float().mean().item(), 2)) if logits.shape[1] >= 5 else {})


# ---------------------------------------------------------------------------------------------------------
# Tasks: each takes the model, the settings and the machine (device, autocast, workers); returns news for the JSON line


def labelled(settings, split, size, view="center", **options):
    """The labelled images of --data as items; raises UsageError if they have no labels."""
    source = load_data(settings["data"], split, size)
    if len(source.classes) < 2:
        raise UsageError(f"--task {settings['task']} needs labels: a folder per class; {source.description}")
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
    known, labels = extract(encoder, datasets[0], settings["pool"], machine, "train features")
    new, truth = extract(encoder, datasets[1], settings["pool"], machine, "val features")
    votes = knn_logits(known, labels, new, len(datasets[0].source.classes), settings["k"], settings["temperature"])
    return accuracies(votes, truth)


def train_batches(train, batches, encoder, pool, machine, cached=None):
    """One epoch of the probe's training, a step at a time: (features [b, D], labels [b]) on the device.

    cached: (features, labels) of all images; otherwise each batch is read and encoded, in pieces that fit.
    """
    device, amp, workers = machine
    broken = BrokenFiles(train.source, tqdm.write)
    if cached:
        for keys in batches:
            ids = torch.tensor([index for _, index in keys], device=device)
            yield cached[0][ids], cached[1][ids]
        return
    pieces = []
    for batch in make_loader(train, workers, batch_sampler=batches):
        broken.watch(batch["broken"])
        with torch.no_grad(), amp():
            features = encoder.features(normalize(batch["image"].to(device)), pool).float()
        pieces.append((features, batch["label"].to(device)))
        if len(pieces) == batches.batch_size // batches.micro_batch:
            yield tuple(torch.cat(x) for x in zip(*pieces))
            pieces = []


def linear(encoder, settings, machine):
    """Linear probe (MAE, Table 10): frozen encoder, batch norm without affine, linear layer, LARS.

    cache_features: the training images are encoded once, from the evaluation view, instead of anew in every epoch
    from random crops and flips.
    """
    device = machine[0]
    encoder.requires_grad_(False)
    cache = settings["cache_features"]
    train = labelled(settings, "train", encoder.image_size, "center" if cache else "crop", crop_scale=(0.08, 1.0))
    val = labelled(settings, "val", encoder.image_size)
    cached = extract(encoder, train, settings["pool"], machine, "train features") if cache else None
    torch.manual_seed(settings["seed"])
    head = nn.Sequential(nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6),
                         nn.Linear(encoder.embed_dim, len(train.source.classes))).to(device)
    nn.init.normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    batch_size, epochs, lr = fit_batch(settings, train)
    optimizer = LARS(head.parameters(), lr=lr)
    batches = EpochBatches(len(train), batch_size, batch_size if cache else piece_of(batch_size), settings["seed"])
    steps = len(train) // batch_size
    progress = tqdm(total=epochs * steps, desc="linear probe")
    for epoch in range(epochs):
        batches.epoch = epoch
        for features, labels in train_batches(train, batches, encoder, settings["pool"], machine, cached):
            warmup_steps = settings["warmup_epochs"] * steps
            optimizer.param_groups[0]["lr"] = learning_rate(progress.n, epochs * steps, warmup_steps, lr)
            F.cross_entropy(head(features), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.update()
    progress.close()
    if not all(p.isfinite().all() for p in head.parameters()):
        raise UsageError(f"the probe's weights are no longer finite: try a lower --base-lr than {settings['base_lr']}")
    features, labels = extract(encoder, val, settings["pool"], machine, "val features")
    with torch.no_grad():
        return accuracies(head.eval()(features), labels) | dict(features="cached" if cache else "augmented")


def fit_batch(settings, train):
    """(batch size, epochs, learning rate), after cutting settings["batch_size"] to the number of training images."""
    settings["batch_size"] = min(settings["batch_size"], len(train))
    if settings["batch_size"] < 2:
        raise UsageError(f"--batch-size must be at least 2, got {settings['batch_size']}")
    return settings["batch_size"], settings["epochs"], settings["base_lr"] * settings["batch_size"] / 256


def piece_of(batch_size, largest=256):
    """How many images of a batch go through the encoder at a time: its largest divisor up to `largest`."""
    return max(n for n in range(1, min(largest, batch_size) + 1) if batch_size % n == 0)


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


def finetune(encoder, settings, machine):
    """End-to-end fine-tuning (MAE, Table 9): layer-wise decay, RandAugment, mixup and cutmix, random erasing.

    torchvision's RandAugment has no magnitude noise (the papers' 0.5), and erased boxes are ImageNet's mean, not noise.
    """
    device, amp, workers = machine
    mean = [round(255 * m) for m in MEAN]
    augment = v2.Compose([  # magnitude 9 of 10
        v2.RandAugment(2, 9, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR, fill=mean),
        v2.RandomErasing(0.25, value=mean)])
    train = labelled(settings, "train", encoder.image_size, "crop", crop_scale=(0.08, 1.0), augment=augment)
    val = labelled(settings, "val", encoder.image_size)
    num_classes = len(train.source.classes)
    torch.manual_seed(settings["seed"])
    encoder.requires_grad_(True)  # the position table too, as in MAE's fine-tuning
    model = Classifier(encoder, num_classes, settings["pool"]).to(device)
    batch_size, epochs, peak = fit_batch(settings, train)
    # The layer decay is Table 9's for ViT-B, and for larger models MAE's fine-tuning code's.
    settings["layer_decay"] = settings["layer_decay"] or (0.75 if encoder.embed_dim >= 1024 else 0.65)
    optimizer = torch.optim.AdamW(layer_groups(model, settings["weight_decay"], settings["layer_decay"]), lr=peak,
                                  betas=(0.9, 0.999), fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=settings["precision"] == "fp16")
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=num_classes), v2.CutMix(alpha=1.0, num_classes=num_classes)])
    piece = piece_of(batch_size)  # mixed, and through the model, at a time
    batches = EpochBatches(len(train), batch_size, piece, settings["seed"])
    loader, broken = make_loader(train, workers, batch_sampler=batches), BrokenFiles(train.source, tqdm.write)
    steps = len(train) // batch_size
    progress = tqdm(total=epochs * steps, desc="fine-tuning")
    for epoch in range(epochs):
        batches.epoch = epoch
        model.train()
        for number, batch in enumerate(loader, start=1):
            broken.watch(batch["broken"])
            torch.manual_seed(seed_of(settings["seed"], epoch, number))
            images, targets = mix(normalize(batch["image"].to(device)), batch["label"].to(device))
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
            progress.set_postfix_str(f"loss {loss.item():.4f}")
            if not math.isfinite(loss.item()):
                raise UsageError(f"the loss is {loss.item()} at step {progress.n}, learning rate {lr:.3g}: try a lower "
                                 "--base-lr")
    progress.close()
    model.eval()
    outputs, broken = [], BrokenFiles(val.source, tqdm.write)
    with torch.no_grad(), amp():
        for batch in tqdm(make_loader(val, workers, batch_size=256), desc="val", leave=False):
            broken.watch(batch["broken"])
            outputs.append((model(normalize(batch["image"].to(device))).float(), batch["label"].to(device)))
    return accuracies(*(torch.cat(x) for x in zip(*outputs)))


def pictured(settings, size, device):
    """The items of a picture on the device: images (normalised) of --images, or `count` spread over --data's val split.

    With settings["regions"] the latter have regions too.
    """
    if "images" in settings:
        items = picture_items(Images(FileList(settings["images"]), size, "center"), len(settings["images"]))
        return {k: v.to(device) for k, v in items.items()}
    source, regions = load_data(settings["data"], "val", size), None
    if "regions" in settings:
        scales = settings.get("fh_scales") or default_scales(source, settings["data"])
        regions = open_regions(settings["regions"], source, settings["data"], "val", scales,
                               cam_weights=settings.get("cam_weights"))
    items = picture_items(Images(source, size, "center", regions=regions), settings["count"])
    return {k: v.to(device) for k, v in items.items()}


class FileList:
    """A source of single files, each of which must be readable."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def read(self, index):
        try:
            return dict(image=decode(self.paths[index]), label=0)
        except (OSError, RuntimeError, ValueError):
            reason = "cannot be decoded as an image" if Path(self.paths[index]).is_file() else "no such file"
            raise UsageError(f"--images {self.paths[index]}: {reason}") from None

    def name(self, index):
        return self.paths[index]


def reconstruct(method, settings, machine):
    """A picture of image, masked image and reconstruction. The method's own flags override the run's."""
    device, amp, _ = machine
    if "regions" not in method.inputs:
        settings.pop("regions", None)
    items = pictured(settings, method.encoder.image_size, device)
    torch.manual_seed(settings["seed"])
    with torch.no_grad(), amp():
        grid = draw_reconstruction(method, **items)
    write_atomically(settings["output"], lambda to: save_image(grid, to, format="png"))
    return dict(picture=str(settings["output"]))


def heat(images, attention):
    """Images [n, 3, H, W] in [0, 1] and maps [n, gh, gw] -> images under the map, black-red-yellow-white."""
    attention = F.interpolate(attention[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)
    attention = attention / attention.amax((2, 3), keepdim=True).clamp_min(1e-12)
    colour = (3 * attention - torch.arange(3.0, device=images.device).view(3, 1, 1)).clamp(0, 1)
    return 0.4 * images + 0.6 * colour


def object_flow(flow, regions, patch_size):
    """Rollout [B, 1+N, 1+N] -> mean over the patches of one object of each image, and these: [B, N], [B, N] bool."""
    maps, found = mim.select_objects(regions, 1)
    member = mim.object_patches(maps[:, 0], patch_size) & found
    flow = (member[:, None].float() @ flow[:, 1:, 1:])[:, 0] / member.sum(1, keepdim=True).clamp_min(1)
    return flow - flow.amin(1, keepdim=True), member


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
    items = pictured(settings, encoder.image_size, device)
    images, shown = items["images"], denormalize(items["images"])
    torch.manual_seed(settings["seed"])
    with torch.no_grad(), amp():
        if settings.get("rollout"):
            flow = encoder.rollout(images)
            maps = flow[:, settings["query"], 1:].unflatten(1, encoder.grid)[:, None]
            maps = maps - maps.amin((2, 3), keepdim=True)
        else:
            maps = encoder.last_attention(images, settings["query"]).unflatten(2, encoder.grid)
            maps = torch.cat([maps.mean(1, keepdim=True), maps], dim=1)
    rows = [torch.cat([image[None], heat(image.expand(len(m), -1, -1, -1), m)]) for image, m in zip(shown, maps)]
    if settings.get("rollout") and "regions" in items:
        flow, member = object_flow(flow, items["regions"], encoder.patch_size)
        over = heat(shown, flow.unflatten(1, encoder.grid))
        inside = F.interpolate(member.unflatten(1, encoder.grid)[:, None].float(), images.shape[-2:])
        rows = [torch.cat([row, a[None], b[None]]) for row, a, b in zip(rows, shown * (0.3 + 0.7 * inside), over)]
    grid = tile(torch.cat(rows), columns=len(rows[0]))
    write_atomically(settings["output"], lambda to: save_image(grid, to, format="png"))
    return dict(picture=str(settings["output"]))


ONLY_FOR = dict(cache_features=["linear"], rollout=["attention"], regions=["reconstruct", "attention"],
                cam_weights=["reconstruct", "attention"], images=["reconstruct", "attention"], output=["reconstruct", "attention"],
                image_size=["knn", "linear", "finetune", "attention"])  # reconstruct: the decoder has its own size
TASKS = dict(knn=knn, linear=linear, finetune=finetune, reconstruct=reconstruct, attention=attention)

# ---------------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    """Command line -> what the user gave; arguments of pre-training methods (for reconstruct) in method_options."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="a file, or `random`")
    parser.add_argument("--task", help=", ".join(TASKS))
    parser.add_argument("--data", default="shapes", help="as in train.py")
    parser.add_argument("--images", nargs="+", help="image files for a picture, instead of --data")
    parser.add_argument("--model", help="size of an untrained encoder")
    parser.add_argument("--image-size", type=int, nargs="+", help="pixels (default: the checkpoint's)")
    parser.add_argument("--patch-size", type=int, help="of an untrained encoder")
    parser.add_argument("--relative-position", action="store_true", default=None,
                        help="an untrained encoder with LoMaR's relative positions")
    parser.add_argument("--rollout", action="store_true", default=None, help="attention: rolled out through all blocks")
    parser.add_argument("--regions", help="reconstruct, attention: as in train.py (default: the run's)")
    parser.add_argument("--cam-weights", help="as in train.py")
    parser.add_argument("--cache-features", action="store_true", help="linear: encode the training images once")
    parser.add_argument("--output", help="the picture's file (default: TASK.png beside the checkpoint)")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--precision")
    for name, (kind, text) in SETTINGS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=text)
    options = {k: p for m in mim.METHODS for k, p in method_parameters(m).items()}
    add_method_flags(parser.add_argument_group("overrides of the run's method, for reconstruct"), options)
    given = {k: v for k, v in vars(parser.parse_all(argv)).items() if v is not None}
    if "task" not in given:
        raise UsageError(f"--task is missing; it may be {', '.join(TASKS)}")
    check_choice("--task", given["task"], list(TASKS))
    given["method_options"] = {k: given.pop(k) for k in options if k in given}
    if "image_size" in given:
        given["image_size"] = image_size_flag(given["image_size"])
    return given


def main(argv):
    """One evaluation, from the command line to its JSON line."""
    given = parse(argv)
    task, began = given["task"], time.perf_counter()
    device, precision, workers = settle_machine(given)
    if given["method_options"] and task != "reconstruct":
        raise UsageError(f"--{next(iter(given['method_options'])).replace('_', '-')} is for --task reconstruct")
    for name in SETTINGS.keys() & given.keys() - RECIPES[task].keys():
        raise UsageError(f"--{name.replace('_', '-')} is no setting of --task {task}")
    for name, tasks in ONLY_FOR.items():
        if given.get(name) and task not in tasks:
            raise UsageError(f"--{name.replace('_', '-')} is for --task {' and '.join(tasks)}")
    for name, end in (("label_smoothing", 1), ("drop_path", 1), ("seed", 2**63)):
        if given.get(name, 0) >= end:
            raise UsageError(f"--{name.replace('_', '-')} must be below {end}, got {given[name]}")
    check_ranges(given, ("epochs", "batch_size", "base_lr", "layer_decay", "k", "temperature", "count"),
                 ("warmup_epochs", "weight_decay", "drop_path", "label_smoothing", "seed"))
    check_choice("--pool", given.get("pool", "cls"), ["cls", "mean"])
    model = open_method(given, given["method_options"]) if task == "reconstruct" else open_encoder(given)
    small = task in SMALL_RECIPES and max(model.image_size) <= SMALL
    recipe = RECIPES[task] | (SMALL_RECIPES[task] if small else {})
    if "epochs" in given:  # a shorter run warms up for the same share of it
        recipe["warmup_epochs"] *= min(1.0, given["epochs"] / recipe["epochs"])
    settings = recipe | dict(precision=precision) | given
    beside = Path(".") if given["checkpoint"] == "random" else Path(given["checkpoint"]).parent
    encoder = getattr(model, "encoder", model)
    if encoder.relative_position and "pool" in recipe:  # LoMaR pools by the mean, and fine-tunes at 1e-3 (its §6.1)
        settings["pool"] = given.get("pool", "mean")
        if task == "finetune" and not small:
            settings["base_lr"] = given.get("base_lr", 1e-3)
    settings["output"] = Path(given.get("output", beside / f"{task}.png"))
    amp = lambda: torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")  # noqa: E731
    result = TASKS[task](model.to(device).eval(), settings, (device, amp, workers))
    result = dict(task=task, **result, checkpoint=given["checkpoint"], data=given["data"])
    result |= dict(image_size=list(encoder.image_size))
    result |= {k: settings[k] for k in RECIPES[task]}
    result |= dict(seed=given["seed"], device=str(device), precision=precision)
    print(json.dumps(result | dict(seconds=round(time.perf_counter() - began, 1))))


if __name__ == "__main__":
    sys.exit(exit_with_one_line("eval.py", lambda: main(sys.argv[1:])))
