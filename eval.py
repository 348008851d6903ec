"""Evaluation: `python eval.py CHECKPOINT --task linear`, or `linear(encoder, train, val)` in a notebook.

Accuracies: knn, linear, attentive, finetune. Dense transfer: semseg, detect. Pictures: reconstruct,
attention, segment. Each is a function of this file; it takes an encoder (or a whole method), data and
keywords, and returns a dict, which the command line prints as one line of JSON. Its arguments stay as they
were: it works on a copy of the encoder.

On the command line CHECKPOINT comes first: checkpoint.pt or encoder.pt of a run, a file of the MAE release, a
timm state dict, or `random` for an untrained encoder. What finetune, semseg or detect left, given for the
same task, is evaluated as it is, or predicts (`--images`). `python eval.py --task knn --help` shows the flags
of a task.
"""

# First, because it sets what a signal does while the rest is imported
from train import (HIDDEN, SCALE, Fraction, Log, NonNegativeFloat, NonNegativeInt, Parser, PositiveFloat,
                   PositiveInt, add_lookahead, all_finite, autocast, build_encoder, call, check_place,
                   check_setting, class_colours, copy_into, cut_batch, draw_reconstruction,
                   exit_with_one_line, first_process_first, flags_of, heat, image_pair, join_processes,
                   load_method, load_tokenizer, not_empty, open_device, paint, parameter_groups, picture,
                   picture_items, put_patches, rank, recipe as run_recipe, run_settings, save_picture,
                   save_png, sized, train_epochs, world_size, write, write_atomically)

import contextlib
import copy
import functools
import inspect
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import Conv2dNormActivation, MultiScaleRoIAlign, box_convert
from torchvision.ops.poolers import LevelMapper
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

import mim
from datasets import (IGNORED, MEAN, MIN_SIDE, SMALL, Files, Images, UsageError, boxes_of, counted, decode,
                      default_regions, denormalize, digest, encode_mask, explained, load_data, load_dense,
                      make_loader, mask_areas, name_broken, normalize, open_regions, seed_of)

PIECE = 256  # images that `extract` encodes at a time
MEAN_COLOUR = [round(255 * m) for m in MEAN]  # fills up what an image does not cover

# The defaults of the tasks are those of MAE's paper and code. Here are the values in which others differ, by
# task and by the method that made the encoder; "-large" are those for ViT-L and above (`recipe`).
PAPER_RECIPES = {
    "finetune mae-large": dict(base_lr=1e-3, epochs=50, drop_path=0.2, layer_decay=0.75),  # MAE's code
    "finetune mae-huge": dict(drop_path=0.3),  # MAE's code
    # CAE, Appendix A, which takes the best rate of 3e-5, 4e-5 and 5e-5
    "semseg mae-large": dict(base_lr=4e-5, width=1024, drop_path=0.15, layer_decay=0.95),
    "detect mae-large": dict(drop_path=0.4, layer_decay=0.8),  # ViTDet
    # SimMIM's released configuration
    "finetune simmim": dict(base_lr=1.25e-3, lr_batch=512, usual_warmup=20),
    # AMT: §4.1 has the class token; §4.3 has 90,000 steps of detection, which are 12.2 epochs of COCO. The
    # rate and its decay are those of the released command, which pools by the mean.
    "finetune amt": dict(base_lr=1e-3, layer_decay=0.75, pool="cls"),
    "finetune amt-simmim": dict(base_lr=1.25e-3, lr_batch=512, usual_warmup=20, pool="cls"),
    "detect amt": dict(epochs=12, batch_size=16),
    # LoMaR: §6.1 and §6.2; the decay is MAE's for this rate. The pool of the probes is ours, as no loss
    # reaches the class token's output.
    "knn lomar": dict(pool="mean"),
    "linear lomar": dict(pool="mean"),
    "finetune lomar": dict(base_lr=1e-3, layer_decay=0.75),
    "detect lomar": dict(epochs=25),
    # ObjMAE: Tables 2 and 3; for CIFAR-100 it has --epochs 90. The augmentation is MAE's, and the centre is
    # cut out as in MAE's evaluation; §4.2 follows Kolesnikov et al. (2020) there.
    "finetune objmae": dict(batch_size=256, base_lr=1e-3, min_lr=1e-5, lookahead=5),
    # R-MAE: §4.2, following MAE
    "semseg rae": dict(epochs=100),
    "semseg rmae": dict(epochs=100),
    # CAE: Appendix A, for ViT-S, ViT-B and ViT-L. Its probes have the defaults. In its released code they
    # have Nesterov momentum and 1e-5 in the batch norm, and the attentive one sees the class token, too. Its
    # detector is another (Mask R-CNN with the 1x schedule), which is not here.
    "finetune cae": dict(batch_size=4096, lr_batch=4096, base_lr=1.6e-2, epochs=200, layer_decay=0.75),
    "finetune cae-base": dict(base_lr=8e-3, epochs=100, layer_decay=0.65),
    "finetune cae-large": dict(base_lr=2e-3, epochs=50, layer_decay=0.75),
}

# These two tables are ours. The first is for images of up to 96 pixels, the second for such images and a ViT
# as small as `nano`. Whatever the method, they pool the mean of the patches. With them every task ends
# within five minutes for the built-in scenes on two cores.
SMALL_RECIPES = {
    "knn": dict(pool="mean"),
    "linear": dict(pool="mean", batch_size=256, base_lr=20.0, cache_features=True),
    "attentive": dict(batch_size=256, base_lr=0.05, cache_features=True),
    "finetune": dict(epochs=30, batch_size=128, base_lr=1e-3),
    "semseg": dict(epochs=3, base_lr=1e-3, width=64),
    "detect": dict(epochs=2, batch_size=8, base_lr=2e-3, warmup_epochs=0.14, width=32),
}
NANO_RECIPES = {"attentive": dict(epochs=30), "finetune": dict(epochs=5, base_lr=4e-3, layer_decay=0.75)}


def recipe(task, encoder, method: Literal[(*mim.METHODS, "amt-simmim")] | None = None):
    """The keywords of a task that differ from its defaults for this mim.ViT: `linear(..., **recipe("linear",
    vit, "lomar"))`.

    method: what made the encoder, and so whose settings are taken for images of more than 96 pixels; default:
        what a run's file says, lomar for other encoders with relative positions, else mae
    """
    sizes = [f"-{name}" for name, size in mim.SIZES.items() if size["embed_dim"] <= encoder.embed_dim]
    paper = {}
    for name, size in itertools.product(("mae", method), ("", *sizes)):
        paper |= PAPER_RECIPES.get(f"{task} {name}{size}", {})
    if max(encoder.image_size) > SMALL:
        return paper
    nano = encoder.embed_dim <= mim.SIZES["nano"]["embed_dim"]
    return SMALL_RECIPES.get(task, {}) | (NANO_RECIPES.get(task, {}) if nano else {})


# ---------------------------------------------------------------------------------------------------------
# Data and features


class Pairs(torch.utils.data.Dataset):
    """A dataset of (image, label) pairs, or of dicts with these (as a Subset of datasets.Images is), or two
    tensors (images, labels), with items like those of datasets.Images: dict(image, label). Keys: an index, or
    (epoch, index); only datasets.Images are given the epoch.

    Images: [3, H, W], uint8, which are normalised later, or floats, which are taken as they are.
    """

    def __init__(self, data):
        tensors = isinstance(data, (tuple, list)) and torch.is_tensor(data[0])
        self.source = torch.utils.data.TensorDataset(*data) if tensors else data

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        data = self.source
        while isinstance(data, torch.utils.data.Subset):
            data, index = data.dataset, data.indices[index]
        item = data[(epoch, index) if isinstance(data, Images) else index]
        image, label = (item["image"], item["label"]) if isinstance(item, dict) else item
        return dict(image=image, label=int(label), broken=-1)


def as_items(data):
    """What a task is given as train or val -> a Dataset with items of image and label."""
    return data if isinstance(data, (Images, Pairs)) else Pairs(data)


def class_names(dataset):
    """The data's `classes`. Without those, the numbers up to the largest label; then all data are read."""
    if hasattr(dataset.source, "classes"):
        return dataset.source.classes
    return [str(k) for k in range(1 + max(int(dataset[i]["label"]) for i in range(len(dataset))))]


def prepare(images, device):
    """Images [b, 3, H, W] -> the same on the device; uint8 images are normalised."""
    images = images.to(device, non_blocking=True)
    return images if images.is_floating_point() else normalize(images)


@torch.no_grad()
def extract(function, dataset, device="cpu", precision="fp32", workers=0, title="features"):
    """All images through function(images [b, 3, H, W]) -> outputs [n, ...] and labels [n], on the device."""
    outputs, labels = [], []
    loader = tqdm(make_loader(dataset, workers, device, batch_size=PIECE), title, leave=False, disable=None)
    for batch in name_broken(loader, dataset.source, set()):
        with autocast(device, precision):
            outputs.append(function(prepare(batch["image"], device)))
        labels.append(batch["label"].to(device))
    return torch.cat(outputs), torch.cat(labels)


def frozen(model, device):
    """A copy of the model on the device in evaluation mode, so that the caller's stays as it is."""
    return copy.deepcopy(model).to(device).eval()


def trainable(encoder, drop_path, freeze=False):
    """A copy of a mim.ViT of which everything trains, the position table too (as in MAE's fine-tuning); with
    freeze=True, nothing."""
    encoder = copy.deepcopy(encoder).requires_grad_(not freeze)
    mim.set_drop_path(encoder.blocks, 0.0 if freeze else drop_path)
    return encoder


def pooled(encoder, pool):
    """The function from images to features [b, D], float32: the class token's, or the mean of the patches'.

    The mean is of the encoder's outputs, that is, after its last norm. The authors' global pooling
    (`Classifier`) takes the mean first and norms it.
    """
    mim.check_choice("pool", pool, Literal["cls", "mean"])

    def features(images):
        latents = encoder(images).float()
        return latents[:, 0] if pool == "cls" else latents[:, 1:].mean(1)

    return features


def accuracies(logits, labels):
    """Logits [n, classes] -> top-1 and, with at least 5 classes, top-5 accuracy in percent."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {f"top{k}": round(100 * hits[:, :k].any(1).float().mean().item(), 2)
            for k in (1, 5) if k <= logits.shape[1]}


# ---------------------------------------------------------------------------------------------------------
# k-nearest neighbours


def knn_logits(train_features, train_labels, features, num_classes, k=20, temperature=0.07):
    """Votes [n, num_classes] of the k nearest training features by cosine. A vote weighs exp(cosine /
    temperature), divided by the weight of the nearest one."""
    train_features, features = F.normalize(train_features, dim=1), F.normalize(features, dim=1)
    votes = torch.zeros(len(features), num_classes, device=features.device)
    # 1,024 at a time: the similarities of all could fill the memory.
    for some, rows in zip(features.split(1024), votes.split(1024)):
        similarity, nearest = (some @ train_features.T).topk(k, dim=1)
        rows.scatter_add_(1, train_labels[nearest], ((similarity - similarity[:, :1]) / temperature).exp())
    return votes


def knn(encoder, train, val, k: PositiveInt = 20, temperature: PositiveFloat = 0.07,
        pool: Literal["cls", "mean"] = "cls", device="cpu", precision="fp32", workers=0) -> dict:
    """k-nearest-neighbour classification on frozen features (Wu et al., CVPR 2018, arXiv:1805.01978), with
    the 20 neighbours of DINO (arXiv:2104.14294).

    encoder: a mim.ViT, or any module from images [b, 3, H, W] to latents [b, 1+N, D], the class token's
        first.
    train, val: datasets.Images, a Dataset of (image, label) pairs, or two tensors (images, labels); see
        `Pairs`.
    k: number of neighbours
    temperature: of the neighbours' votes
    pool: an image's feature: cls (the class token) or mean (of the patches, each after the encoder's norm)
    """
    train, val = as_items(train), as_items(val)
    if k > len(train):
        raise UsageError(f"--k {k} is more than the {counted(len(train), 'training images')}")
    features = pooled(frozen(encoder, device), pool)
    known, labels = extract(features, train, device, precision, workers, "train features")
    new, truth = extract(features, val, device, precision, workers, "val features")
    return accuracies(knn_logits(known, labels, new, len(class_names(train)), k, temperature), truth)


# ---------------------------------------------------------------------------------------------------------
# The loop of all that is trained here


def settings_of(task, arguments, classes):
    """What a task keeps in its file: the plain values among its arguments and a short hash of the encoder's
    weights, which a resumed run must share, and what else `load_finished` needs."""
    machine = ("output", "resume", "accumulate", "eval_every", "per_class", "device", "precision", "workers")
    plain = {name: value for name, value in arguments.items()
             if isinstance(value, (int, float, str)) and name not in machine}
    encoder = arguments["encoder"]
    weights = [value.float().cpu().numpy().tobytes() for value in encoder.state_dict().values()]
    # What a message is to name first comes first.
    return dict(task=task, image_size=list(encoder.image_size)) | plain | dict(
        encoder=digest(b"".join(weights)), num_heads=encoder.num_heads, classes=list(classes),
        categories=getattr(arguments["train"].source, "categories", None))


def fit(model, optimizer, train, compute_losses, score=lambda model: {}, *, epochs, batch_size, base_lr,
        lr_batch=256, warmup_epochs=None, usual_warmup=10, warmup_steps=None, min_lr=0.0, accumulate=None,
        most=256, eval_every=None, output=None, resume=False, settings={}, seed=0, device="cpu",
        precision="fp32", workers=0, **options):
    """Trains `model`: probes, fine-tuning and dense tasks share this loop; `call` hands it those of their
    variables that it names. Returns a dict: the batch size and the warm-up that it used, and in the first
    process the score.

    train: a dataset whose items are dicts with image and label.
    compute_losses(model, images, labels) -> dict of scalars: "loss" and, if there are, its parts. The model
        is an argument because it is wrapped where several processes train it. Labels are as collated.
    score(model) -> dict of figures, and perhaps a picture: after training, and every `eval_every` epochs.
    base_lr: learning rate per `lr_batch` images of the batch
    most: images in a micro-batch, if `accumulate` is not given
    warmup_epochs: default: `usual_warmup`, or `warmup_steps` in epochs, but at most a ninth of the epochs; or
        usual_warmup percent of them, if that is more (SimMIM: 20%).
    output: the file that has, after each epoch, the model and all that an exact resume needs, also
        `settings`, which a resumed run must share (`settings_of`). Beside it, with .jsonl for its ending,
        lies a log, a line for each epoch.
    options: others of `train_epochs`, such as fall, collate_fn.
    """
    batch_size, accumulate = cut_batch(batch_size, len(train), accumulate, most)
    if warmup_epochs is None:
        usual = warmup_steps / (len(train) // batch_size) if warmup_steps else usual_warmup
        warmup_epochs = min(usual, epochs * max(1 / 9, usual_warmup / 100))
    images = getattr(train.source, "digest", train.__len__)()  # plain data say how many they are
    settings = settings | dict(batch_size=batch_size, accumulate=accumulate, images=images,
                               warmup_epochs=warmup_epochs)
    begun = open_kept(output, settings) if resume and output and Path(output).exists() else None
    log, found = Log(output and Path(output).with_suffix(".jsonl"), begun, sys.stderr), {}

    def losses(model, batch, progress):
        return compute_losses(model, prepare(batch["image"], device), batch["label"])

    for line, state in call(train_epochs, locals(), dataset=train, compute_losses=losses, state=begun,
                            peak_lr=base_lr * batch_size / lr_batch, **options):
        if rank() > 0:
            continue
        if not line and begun:  # a stop during the evaluation may have left this out of the log
            line = begun["line"]
        if output is not None:
            write_atomically(output, functools.partial(torch.save, state | dict(args=settings, line=line)))
        if line and line["epoch"] > len(log.lines):
            due = line["epoch"] == epochs or eval_every and line["epoch"] % eval_every == 0
            found = score(model.eval()) if due else {}
            figures = {name: value for name, value in found.items() if name != "picture"}
            log.add(dict(task=settings.get("task")) | line | figures)
    model.eval()
    if rank() == 0 and not found:  # a whole run was resumed
        found = score(model)
    return dict(batch_size=batch_size, warmup_epochs=round(warmup_epochs, 3)) | found


def open_kept(path, settings):
    """Loads a file that `fit` wrote. UsageError if it is something else, or of other settings."""
    with explained("--resume", f"{path} is not of --task {settings['task']}"):
        state = mim.load_file(path)
        check_setting("epoch", state["epoch"], NonNegativeInt)
        state.setdefault("line", {})
        for name, value in settings.items():
            kept = state["args"].get(name)
            if kept != value:
                words = f"{name} {kept}, not {value}"
                if name in ("encoder", "images", "classes", "categories"):  # digests and long lists
                    words = "another encoder" if name == "encoder" else f"other {name}"
                raise UsageError(f"--resume: {path} was made with {words}; give the same or another --output")
    return state


# ---------------------------------------------------------------------------------------------------------
# Probes: a classifier on a frozen encoder


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al., 2017, arXiv:1708.03888), as MAE's linear probe uses it.

    SGD with momentum in which the gradient of a weight matrix is scaled to a norm of trust * |w|; gradients
    of biases are not scaled.
    """

    def __init__(self, params, lr, momentum=0.9, trust=0.001):
        super().__init__(params, lr, momentum)
        self.trust = trust

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    w, g = p.norm(), p.grad.norm()
                    p.grad *= torch.where((w > 0) & (g > 0), self.trust * w / g, 1.0)
        return super().step(closure)


def classifier(dim, num_classes):
    """Batch norm without affine and a linear layer, [B, dim] -> [B, num_classes] (MAE, Table 10; CAE,
    Appendix A)."""
    head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, num_classes))
    nn.init.normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    return head


class AttentiveProbe(nn.Module):
    """CAE's probe (§5.2, Appendix A, arXiv:2202.03026): patch outputs [B, N, D] -> logits [B, num_classes].

    One learned query attends to the patches; what it gathers goes to the same classifier as the linear
    probe's. There is no MLP and no skip connection.
    """

    def __init__(self, dim, num_heads, num_classes):
        super().__init__()
        self.attn = mim.CrossAttention(dim, num_heads)
        self.attn.apply(mim.init_weights)
        self.classifier = classifier(dim, num_classes)
        self.query = mim.learned_token(dim)

    def forward(self, patches):
        patches = patches.float()
        gathered = self.attn(self.query.expand(len(patches), -1, -1), patches, patches)
        return self.classifier(gathered.squeeze(1))

    def attention(self, patches):
        """The query's attention to the patches (Figure 5): [B, heads, N], rows sum to one."""
        return self.attn.weights(self.query, patches.float()).squeeze(2)


def train_probe(features, make_head, make_optimizer, train, val, epochs, batch_size, base_lr, warmup_epochs,
                cache_features, seed, device, precision, workers):
    """Trains a head on frozen features -> the head, and a dict of its accuracies.

    features: images [b, 3, H, W] -> what the head takes.
    make_head(dim, num_classes); make_optimizer(parameters, lr).
    """
    train, val = as_items(train), as_items(val)
    num_classes = len(class_names(train))
    with torch.no_grad():
        dim = features(prepare(train[0]["image"][None], device)).shape[-1]
    torch.manual_seed(seed)
    head = make_head(dim, num_classes).to(device)
    optimizer = make_optimizer(head.parameters(), base_lr)
    if cache_features:  # the features take the images' place
        known, labels = extract(features, train, device, precision, workers, "train features")
        train = Pairs((known.cpu(), labels.cpu()))

    def compute_losses(head, inputs, labels):
        if not cache_features:
            with torch.no_grad():  # autocast is on, see `train_epochs`
                inputs = features(inputs)
        return dict(loss=F.cross_entropy(head(inputs), labels.to(device, non_blocking=True)))

    def logits(images):
        inputs = features(images)
        with autocast(device, "fp32"):
            return head(inputs)

    result = call(fit, locals(), model=head, workers=0 if cache_features else workers,
                  score=lambda _: accuracies(*extract(logits, val, device, precision, workers, "val")))
    return head, result | dict(features="cached" if cache_features else "augmented")


def linear(encoder, train, val, epochs: PositiveInt = 90, batch_size: PositiveInt = 16384,
           base_lr: PositiveFloat = 0.1, warmup_epochs: NonNegativeFloat | None = None,
           pool: Literal["cls", "mean"] = "cls", cache_features: bool | None = None, seed: NonNegativeInt = 0,
           device="cpu", precision="fp32", workers=0) -> dict:
    """Linear probe (MAE, Table 10): frozen encoder, batch norm without affine, linear layer, LARS.

    encoder, train, val: as for `knn`. The paper's `train` are random resized crops, flipped. The batch norm
    takes its mean over a micro-batch, at most 256 images (MAE's code: over the 512 of a GPU).

    epochs: passes over the training images
    batch_size: images a step
    base_lr: learning rate per 256 images of the batch
    warmup_epochs: epochs of linear warm-up; default: 10, or a ninth of the epochs if they are fewer than 90
    pool: an image's feature: cls (the class token) or mean (of the patches, each after the encoder's norm)
    cache_features: encode the training images once, and not anew in each epoch from random crops and flips;
        on the command line this is the default for images of up to 96 pixels
    seed: of everything random
    """
    features = pooled(frozen(encoder, device), pool)
    return call(train_probe, locals(), make_head=classifier, make_optimizer=LARS)[1]


def attentive(encoder, train, val, images=None, epochs: PositiveInt = 90, batch_size: PositiveInt = 8192,
              base_lr: PositiveFloat = 0.0125, warmup_epochs: NonNegativeFloat | None = None,
              cache_features: bool | None = None, seed: NonNegativeInt = 0, device="cpu", precision="fp32",
              workers=0) -> dict:
    """Attentive probe (CAE, Appendix A): frozen encoder, `AttentiveProbe`, SGD; base_lr and batch_size
    together give a learning rate of 0.4.

    Cached, the patches of all training images are in memory, 2 N D bytes each: 1.2 GB for CIFAR-10 at ViT-Ti
    and 64 patches. While they are joined into one tensor, they take twice that.

    encoder, train, val: as for `knn`.
    images: [n, 3, H, W], of which the result has a `picture` [3, h, w] of where the query looks (for a
        mim.ViT).

    epochs: passes over the training images
    batch_size: images a step
    base_lr: learning rate per 256 images of the batch
    warmup_epochs: epochs of linear warm-up; default: 10, or a ninth of the epochs if they are fewer than 90
    cache_features: encode the training images once, and not anew in each epoch from random crops and flips;
        on the command line this is the default for images of up to 96 pixels
    seed: of everything random
    """
    encoder = frozen(encoder, device)

    def features(images):
        return encoder(images)[:, 1:].half()

    def make_head(dim, num_classes):
        usual = max(heads for heads in range(1, dim // 64 + 2) if dim % (4 * heads) == 0)
        return AttentiveProbe(dim, getattr(encoder, "num_heads", usual), num_classes)

    sgd = functools.partial(torch.optim.SGD, momentum=0.9)
    probe, result = call(train_probe, locals(), make_optimizer=sgd)
    if images is not None:
        images = prepare(images, device)
        with torch.no_grad(), autocast(device, precision):
            maps = probe.attention(features(images)).float().unflatten(2, encoder.grid)
        result["picture"] = attention_picture(denormalize(images), maps)
    return result


# ---------------------------------------------------------------------------------------------------------
# Fine-tuning


class Classifier(nn.Module):
    """A mim.ViT with a linear classifier on its class token or, behind a new norm, its patches' mean; the
    encoder's own norm is then taken out of it."""

    def __init__(self, encoder, num_classes, pool="mean"):
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.fc_norm = nn.Identity()
        if pool == "mean":  # MAE and BEiT norm after the mean, so the encoder's own norm is taken out
            self.fc_norm, encoder.norm = mim.layer_norm(encoder.embed_dim), nn.Identity()
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        # As in MAE's fine-tuning code, so that training starts from nearly equal logits.
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        return self.head(self.fc_norm(self.encoder.features(images, self.pool)))

    def predict(self, image):
        """An image uint8 [3, H, W] -> dict of the five likeliest classes of its centre, labels [5], scores
        [5], and boxes [5, 4], which are all of the image."""
        centre = Images([dict(image=image, label=-1)], self.encoder.image_size, "center")[0]["image"]
        scores, labels = self(normalize(centre[None])).float().softmax(1)[0].sort(descending=True)
        boxes = torch.tensor(len(labels) * [[0, 0, *image.shape[:0:-1]]])
        return dict(labels=labels[:5], scores=scores[:5], boxes=boxes[:5])


def layer_wise_adamw(encoder, heads, weight_decay, layer_decay):
    """AdamW whose groups have `lr_scale` = layer_decay^(layers above): BEiT's layer-wise learning rate decay.

    The patch embedding and tokens are layer 0, block i is layer i+1. `heads`, the modules on top of the
    encoder, and the encoder's last norm count as the layer above the last block, which has the full rate.
    """
    depth, groups = len(encoder.blocks), []
    top = nn.ModuleList([encoder.norm, *heads])
    for number, layer in enumerate([encoder.patch_embed, *encoder.blocks, top]):
        for group in parameter_groups(layer, weight_decay):
            groups.append(group | dict(lr_scale=layer_decay ** (depth + 1 - number)))
    tokens = [p for p in encoder.parameters(recurse=False) if p.requires_grad]
    groups.append(dict(params=tokens, weight_decay=0.0, lr_scale=layer_decay ** (depth + 1)))
    return torch.optim.AdamW(groups, fused=True)


def augmentation():
    """RandAugment and random erasing for uint8 images (MAE, Table 9): `augment` of the training Images.

    Each of the two operations is applied with probability 0.5, as in timm, which MAE's code uses.
    Departs from timm: the magnitude is always 9 (there it varies, with a deviation of 0.5); torchvision's 14
    operations have the identity in place of timm's inversion and addition of brightness below a threshold
    (SolarizeAdd), Posterize keeps 4 bits (1), and images are turned and sheared bilinearly (bicubic); erased
    boxes are ImageNet's mean, not noise.
    """
    bilinear = v2.InterpolationMode.BILINEAR
    operation = v2.RandAugment(1, 9, num_magnitude_bins=11, interpolation=bilinear, fill=MEAN_COLOUR)
    once = v2.RandomApply([operation], p=0.5)  # one operation, of magnitude 9 of 0..10
    return v2.Compose([once, once, v2.RandomErasing(0.25, value=MEAN_COLOUR)])


def finetune(encoder, train, val, epochs: PositiveInt = 100, batch_size: PositiveInt = 1024,
             base_lr: PositiveFloat = 5e-4, lr_batch: PositiveInt = 256,
             warmup_epochs: NonNegativeFloat | None = None, usual_warmup=5, min_lr: NonNegativeFloat = 1e-6,
             weight_decay: NonNegativeFloat = 0.05, lookahead: NonNegativeInt = 0,
             layer_decay: Fraction = 0.65, drop_path: Fraction = 0.1, label_smoothing: Fraction = 0.1,
             pool: Literal["cls", "mean"] = "mean", accumulate: PositiveInt | None = None,
             eval_every: PositiveInt | None = None, output=None, resume: bool = False,
             seed: NonNegativeInt = 0, device="cpu", precision="fp32", workers=0) -> dict:
    """End-to-end fine-tuning (MAE, Table 9, and its code for ViT-B): layer-wise decay, mixup and cutmix.

    Several processes (torchrun) share each batch; the first evaluates and writes, the others give no
    accuracy.

    encoder: a mim.ViT. train, val: as for `knn`; the paper's `train` are random crops with `augmentation()`.
    output: a file; after every epoch the model and all that an exact resume needs are written there.

    epochs: passes over the training images
    batch_size: images a step, over all processes
    base_lr: learning rate per lr_batch images of the batch
    lr_batch: images that base_lr is for
    warmup_epochs: epochs of linear warm-up; default: 5, or a ninth of the epochs if they are fewer than 45
        (SimMIM: 20, or a fifth of them)
    min_lr: absolute learning rate at the end of the cosine
    weight_decay: of AdamW
    lookahead: AdamW steps between two updates of Lookahead's slow weights; 0: no Lookahead
    layer_decay: learning rate of a block over that of the one above
    drop_path: stochastic depth of the last block
    label_smoothing: of the cross-entropy
    pool: what is classified: cls (the class token) or mean (of the patches; a new norm comes after the mean)
    accumulate: number of micro-batches of a step, over all processes; default: the smallest that leaves at
        most 256 images in each
    eval_every: evaluate after every so many epochs, too
    resume: go on from --output
    seed: of everything random
    """
    train, val = as_items(train), as_items(val)
    classes = class_names(train)
    settings, num_classes = settings_of("finetune", locals(), classes), len(classes)
    torch.manual_seed(seed)
    model = Classifier(trainable(encoder, drop_path), num_classes, pool).to(device)
    optimizer = layer_wise_adamw(model.encoder, [model.fc_norm, model.head], weight_decay, layer_decay)
    if lookahead:
        add_lookahead(optimizer, lookahead)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=num_classes),
                           v2.CutMix(alpha=1.0, num_classes=num_classes)])

    def compute_losses(model, images, labels):
        images, targets = mix(images, labels.to(device, non_blocking=True))
        logits = model(images).float()
        return dict(loss=F.cross_entropy(logits, targets, label_smoothing=label_smoothing))

    return call(fit, locals(), score=lambda model: score_labels(model, val, device, precision, workers))


def score_labels(model, val, device="cpu", precision="fp32", workers=0) -> dict:
    """The accuracies of a `Classifier` on datasets.Images, in percent."""
    return accuracies(*extract(model, val, device, precision, workers, "val"))


# ---------------------------------------------------------------------------------------------------------
# Dense transfer: semantic segmentation


def as_map(x, grid):
    """Patches [B, N, D] -> [B, D, gh, gw]."""
    return x.transpose(1, 2).unflatten(2, grid)


def block_outputs(encoder, images, after):
    """Images [B, 3, H, W] -> the patches' maps [B, D, gh, gw] after the blocks with these numbers (from 1).

    The class token takes part and is then dropped; the encoder's last norm is not applied.
    """
    x, maps = encoder.sequence(encoder.embed(images)), []
    for block in encoder.blocks:
        x = block(x, encoder.buckets)
        maps.append(as_map(x[:, 1:], encoder.grid))
    return [maps[number - 1] for number in after]


def rescalers(dim, dim_2, dim_4, norm):
    """Four modules that scale maps [B, dim, gh, gw] by 4, 2, 1 and 1/2, to dim_4, dim_2, dim, dim channels.

    From patches of 16 pixels these are strides of 4, 8, 16 and 32, as convolutional networks have them.
    """
    return nn.ModuleList([
        nn.Sequential(nn.ConvTranspose2d(dim, dim_2, 2, stride=2), norm(dim_2), nn.GELU(),
                      nn.ConvTranspose2d(dim_2, dim_4, 2, stride=2)),
        nn.ConvTranspose2d(dim, dim_2, 2, stride=2),
        nn.Identity(),
        nn.MaxPool2d(2, ceil_mode=True)])  # odd grids are rounded up


def resize(x, size):
    """Bilinear resizing of maps [B, C, h, w] to a (height, width)."""
    return F.interpolate(x, size, mode="bilinear")


class UPerNet(nn.Module):
    """Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, arXiv:1807.10221, §3.1.

    New: a feature pyramid network with a pyramid pooling module on top, whose levels are classified together.
    Four maps [B, dim, gh, gw] of a ViT -> logits [B, num_classes, 4 gh, 4 gw].

    Departs from the paper: the maps are a ViT's, all of one scale, which BEiT's transposed convolutions and
    pooling change; of the heads, only that for segmentation. The norm is batch norm, as there: in one
    process, on 16 images, it computes what the released codes' synchronised one does; under torchrun each
    process norms its own images. LayerNorm over the channels would not need a batch, but learned far more
    slowly here: most of a ViT's output is the same at all positions, and only a mean over positions removes
    that. So a step needs 2 images or more. mmsegmentation's second head and its dropout are left out.
    """

    sides = (1, 2, 3, 6)  # of the pooled maps: Pyramid Scene Parsing Network, CVPR 2017, arXiv:1612.01105

    def __init__(self, dim, num_classes, width=768):
        super().__init__()
        self.rescalers = rescalers(dim, dim, dim, nn.BatchNorm2d)
        # A Conv2dNormActivation is a convolution that keeps height and width, batch norm and ReLU.
        self.pooled = nn.ModuleList([Conv2dNormActivation(dim, width, 1) for _ in self.sides])
        self.top = Conv2dNormActivation(dim + len(self.sides) * width, width, 3)
        self.laterals = nn.ModuleList([Conv2dNormActivation(dim, width, 1) for _ in range(3)])
        self.smooth = nn.ModuleList([Conv2dNormActivation(width, width, 3) for _ in range(3)])
        self.fuse = Conv2dNormActivation(4 * width, width, 3)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def pool_pyramid(self, x):
        """The coarsest maps [B, dim, h, w], with their means over 1, 4, 9, 36 regions -> [B, width, h, w]."""
        pooled = [conv(F.adaptive_avg_pool2d(x, side)) for side, conv in zip(self.sides, self.pooled)]
        return self.top(torch.cat([x, *(resize(p, x.shape[-2:]) for p in pooled)], dim=1))

    def forward(self, maps):
        *finer, coarsest = [rescale(x) for rescale, x in zip(self.rescalers, maps)]
        x = self.pool_pyramid(coarsest)
        levels = [x]
        for i in (2, 1, 0):  # top-down
            x = self.laterals[i](finer[i]) + resize(x, finer[i].shape[-2:])
            levels.append(self.smooth[i](x))
        levels = [resize(level, x.shape[-2:]) for level in levels]
        return self.classifier(self.fuse(torch.cat(levels, dim=1)))


class Segmenter(nn.Module):
    """Semantic segmentation with a ViT: images [B, 3, H, W] -> logits [B, num_classes, H, W].

    head: upernet, on the maps after 1/3, 1/2, 2/3 and all of the blocks (ViT-B: 4, 6, 8, 12, as in BEiT's
        code), or linear, batch norm and one linear layer on the encoder's outputs. Logits are upsampled
        bilinearly.
    width: channels of UPerNet's maps.
    """

    def __init__(self, encoder, num_classes, head="upernet", width=768):
        super().__init__()
        self.encoder, self.num_classes = encoder, num_classes
        self.after = [math.ceil(len(encoder.blocks) * share) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        if head == "upernet":
            encoder.norm.requires_grad_(False)  # it reads the blocks
            self.head = UPerNet(encoder.embed_dim, num_classes, width)
        elif head == "linear":  # the norm needs no scale and shift: the linear layer can learn both
            self.head = nn.Sequential(nn.BatchNorm2d(encoder.embed_dim, affine=False, eps=1e-6),
                                      nn.Conv2d(encoder.embed_dim, num_classes, 1))
        else:
            raise ValueError(f"head must be upernet or linear, got {head!r}")

    def forward(self, images):
        if isinstance(self.head, UPerNet):
            x = block_outputs(self.encoder, images, self.after)
        else:
            x = as_map(self.encoder(images)[:, 1:], self.encoder.grid)
        return resize(self.head(x).float(), images.shape[-2:])

    def predict(self, image):
        """An image uint8 [3, H, W] of any size -> dict(classes=[H, W]), of its pixels.

        As BEiT's and CAE's code evaluates: the image is resized to cover the encoder's size; windows of this
        size lie on it at steps of two thirds of a window, and their logits are averaged.
        """
        size, sides = self.encoder.image_size, fitting_size(image, self.encoder.image_size, max)
        images = normalize(v2.functional.resize(image[None], sides))
        sums, counts = images.new_zeros(self.num_classes, *sides), images.new_zeros(sides)
        for top, left in itertools.product(*map(window_starts, sides, size)):
            window = np.s_[..., top:top + size[0], left:left + size[1]]
            sums[window] += self(images[window])[0]
            counts[window] += 1
        best, classes = -math.inf, 0
        for k, logits in enumerate(sums / counts):  # one after another: all could fill the memory
            logits = resize(logits[None, None], image.shape[1:])[0, 0]
            best, classes = logits.clamp(min=best), torch.where(logits > best, k, classes)
        return dict(classes=classes)


def window_starts(length, window):
    """Where windows begin that cover a length, at steps of two thirds of a window: 683, 512 -> [0, 171]."""
    last = length - window
    return [min(start, last) for start in range(0, last + window * 2 // 3, window * 2 // 3)]


class DenseImages(torch.utils.data.Dataset):
    """Images with their dense truth (datasets.load_dense), for training transformed together.

    scale: in training, an image is resized to a random factor of this range times the scale at which it fits
        into `size`, (height, width), if its truth is objects, or covers it, if that is classes of pixels.
        Then a random part is cut out, or the rest is filled up, and half of the images are mirrored. Of ten
        parts the first is taken in which less than 75% of the pixels have the same class. None, for
        evaluation: images and labels are as the source gives them.
    distort: whether colours are changed at random, too.
    Items: dict(image uint8 [3, *size], label), the label a tensor map of classes, or a dict of the objects'
        tensors.
    """

    def __init__(self, source, size, scale=None, distort=False, seed=0):
        self.source, self.size, self.seed, self.scale = source, list(size), seed, scale
        fill = {tv_tensors.Mask: 0, "others": MEAN_COLOUR}
        self.crop = v2.RandomCrop(self.size, pad_if_needed=True, fill=fill)
        jitters = [dict(brightness=0.125), dict(contrast=0.5), dict(saturation=0.5), dict(hue=0.1)]
        colours = [v2.RandomApply([v2.ColorJitter(**jitter)]) for jitter in jitters] * distort
        self.transform = v2.Compose([v2.RandomHorizontalFlip(), *colours])

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} images, and none at {index}")
        with explained(self.source.name(index), "it cannot be decoded as an image"):
            item = self.source[index]
        image, label = item["image"], self.source.truth(index, item)
        if self.scale is None:
            return dict(image=image, label=label)
        objects = isinstance(label, dict)
        # 0 is what masks are filled up with: no object, and of classes those that do not count
        masks = torch.from_numpy(label["masks"].astype(np.uint8) if objects else label[None] - IGNORED)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            factor = torch.empty(()).uniform_(*self.scale).item()
            sides = fitting_size(image, self.size, min if objects else max, factor)
            masks = v2.functional.resize(masks, sides, v2.InterpolationMode.NEAREST_EXACT)
            whole = v2.functional.resize(tv_tensors.Image(image), sides), tv_tensors.Mask(masks)
            for _ in range(10):
                image, masks = self.crop(*whole)
                counts = masks[masks > 0].bincount(minlength=1)
                if objects or counts.max() < 0.75 * counts.sum():
                    break
            image, masks = self.transform(image, masks)
        if not objects:
            return dict(image=image, label=masks[0] + IGNORED)
        seen = (masks.sum((1, 2)) > 1) & torch.from_numpy(~label["crowd"])  # crowds are no objects to learn
        labels, masks = torch.from_numpy(label["labels"])[seen], masks[seen]
        return dict(image=image, label=dict(boxes=boxes_of(masks), masks=masks, labels=labels))


def fitting_size(image, size, fit=min, factor=1.0):
    """The (height, width) of an image [3, H, W] at a factor times the largest scale at which it fits inside
    `size` or, with fit=max, the smallest at which it covers it."""
    scale = factor * fit(size[0] / image.shape[1], size[1] / image.shape[2])
    return [max(1, round(side * scale)) for side in image.shape[1:]]


def fit_inside(image, size, fill=MEAN_COLOUR, interpolation=v2.InterpolationMode.BILINEAR):
    """A uint8 image [C, H, W], as large as fits into `size`; `fill` is the colour of the empty part on the
    right and below."""
    h, w = fitting_size(image, size)
    image = v2.functional.resize(image, [h, w], interpolation)
    return v2.functional.pad(image, [0, 0, size[1] - w, size[0] - h], fill=fill)


def collate_dense(items):
    """Items of `DenseImages` -> their images as one tensor, their labels as a list."""
    images = torch.stack([item["image"] for item in items])
    return dict(image=images, label=[item["label"] for item in items], broken=torch.empty(0))


def predictions(model, val, precision, workers):
    """Yields (item, `predict` of its image) for the items of a dataset in order, one at a time."""
    items = make_loader(val, workers, collate_fn=dict, batch_size=None)
    for item in tqdm(items, "val", leave=False, disable=None):
        yield item, predict(model, item["image"], precision)


def semseg(encoder, train, val, head: Literal["upernet", "linear"] = "upernet", freeze: bool = False,
           epochs: PositiveInt = 127, batch_size: PositiveInt = 16, base_lr: PositiveFloat = 1e-4,
           warmup_epochs: NonNegativeFloat | None = None, weight_decay: NonNegativeFloat = 0.05,
           layer_decay: Fraction = 0.65, drop_path: Fraction = 0.1, width: PositiveInt = 768,
           accumulate: PositiveInt | None = None, eval_every: PositiveInt | None = None, per_class=False,
           output=None, resume: bool = False, seed: NonNegativeInt = 0, device="cpu", precision="fp32",
           workers=0) -> dict:
    """Semantic segmentation, as on ADE20K by BEiT's and CAE's code: 160,000 steps of 16 images.

    encoder: a mim.ViT. train, val: `DenseImages` of `load_dense(data, objects=False)`. Returns miou, the mean
    over the classes that val has of intersection over union, and pixel_accuracy, in percent, and a picture.
    The loss is the mean over the pixels that count (mmsegmentation: their sum over the number of all pixels).
    Images of any size are segmented as a whole (`Segmenter.predict`).

    head: what is trained on the encoder's outputs: upernet, or linear (batch norm and one linear layer)
    freeze: train the head alone
    epochs: passes over the training images (127 of ADE20K are 160,000 steps; R-MAE has 100)
    batch_size: images a step, over all processes
    base_lr: learning rate per 16 images of the batch (CAE takes the best of 1e-4 to 4e-4); it falls linearly
        to 0
    warmup_epochs: epochs of linear warm-up; default: 1,500 steps, but at most a ninth of the epochs
    weight_decay: of AdamW
    layer_decay: learning rate of a block over that of the one above (not with --freeze)
    drop_path: stochastic depth of the last block (not with --freeze)
    width: channels of UPerNet's maps (not with --head linear)
    accumulate: number of micro-batches of a step, over all processes; batch norm is over one of them
    eval_every: evaluate after every so many epochs, too
    resume: go on from --output
    seed: of everything random
    """
    classes = train.source.classes
    settings = settings_of("semseg", locals(), classes)
    torch.manual_seed(seed)
    model = Segmenter(trainable(encoder, drop_path, freeze), len(classes), head, width).to(device)
    optimizer = layer_wise_adamw(model.encoder, [model.head], weight_decay, layer_decay)

    def compute_losses(model, images, maps):
        truth = torch.stack([some.to(device, non_blocking=True) for some in maps]).long()
        total = F.cross_entropy(model(images), truth, ignore_index=IGNORED, reduction="sum")
        return dict(loss=total / (truth != IGNORED).sum().clamp(min=1))

    return call(fit, locals(), lr_batch=16, warmup_steps=1500, fall=lambda progress: 1 - progress,
                collate_fn=collate_dense,
                score=lambda model: score_pixels(model, val, per_class, precision, workers))


def score_pixels(model, val, per_class: bool = False, precision="fp32", workers=0) -> dict:
    """The figures of a `Segmenter` on `DenseImages`, see `semseg`.

    per_class: the IoU of each class that occurs, too
    """
    names, pairs, shown = val.source.classes, 0, []
    for item, found in predictions(model, val, precision, workers):
        truth, found = item["label"].astype(int), found["classes"]
        both = len(names) * truth + found
        pairs = pairs + np.bincount(both[truth != IGNORED], minlength=len(names) ** 2)
        shown += [(item["image"], as_masks(found), as_masks(truth))] * (len(shown) < 4)
    if not pairs.sum():
        raise UsageError("no pixel of the validation masks counts: all are ignored")
    pairs = pairs.reshape(len(names), -1)
    hits, occurs = pairs.diagonal(), pairs.sum(1) > 0
    iou = hits / np.maximum(pairs.sum(0) + pairs.sum(1) - hits, 1)
    accuracy = (100 * hits.sum() / pairs.sum()).item()
    result = dict(miou=round(100 * iou[occurs].mean().item(), 2), classes=int(occurs.sum()),
                  pixel_accuracy=round(accuracy, 2), picture=draw_masks(shown, names))
    if per_class:
        result["iou_by_class"] = {names[k]: round(100 * iou[k], 2) for k in np.flatnonzero(occurs)}
    return result


# An image [C, H, W] uint8 -> its longer side brought to 256 pixels, on a white square
enlarge = functools.partial(fit_inside, size=(256, 256), fill=255, interpolation=v2.InterpolationMode.NEAREST)


def as_masks(classes):
    """The classes [H, W] of an image's pixels -> for `draw_masks`."""
    labels = np.unique(classes[classes != IGNORED])
    return dict(masks=classes == labels[:, None, None], labels=labels)


def draw_masks(shown, names):
    """Of some images: (uint8 [3, H, W], what was predicted, perhaps the truth) -> a picture with a legend of
    the classes.

    The last two are dicts of labels [n], the classes' numbers, and of masks [n, H, W], which are painted, and
    boxes [n, 4] (x, y, width, height), which are drawn with their names; with scores, only those that have
    more than 0.5, and of a `Classifier` the likeliest.
    """
    colours, rows, legend, title = class_colours(len(names)), [], {}, "prediction"
    for image, *parts in shown:
        row = [enlarge(image) / 255]
        for part in parts:
            sure = ...
            if "scores" in part:
                sure = part["scores"] > 0.5
                if "masks" in part:
                    title = "prediction: scores above 0.5"
                else:
                    sure[0] = True
            part = {name: torch.as_tensor(values[sure]) for name, values in part.items()}
            labels, tile = part["labels"].long(), row[0]
            of = colours[labels]
            legend |= {names[k]: colours[k].view(3, 1, 1) for k in labels}
            if "masks" in part:
                tile = paint(tile, 0.6 * enlarge(part["masks"].byte(), fill=0), of)
            if "boxes" in part and len(labels) > 0:
                boxes = box_convert(part["boxes"] * 256 / max(image.shape[1:]), "xywh", "xyxy")
                of = [tuple(colour) for colour in (255 * of).int().tolist()]
                tile = draw_bounding_boxes(tile, boxes, colors=of, width=2)
                corners = (boxes[:, :2] + 3).tolist()
                tile = write(tile, {tuple(corner): names[k] for corner, k in zip(corners, labels)})
            row.append(tile)
        rows.append(row)
    return picture(dict(zip(("image", title, "truth"), map(torch.stack, zip(*rows)))), legend)


# ---------------------------------------------------------------------------------------------------------
# Dense transfer: object detection


layer_norm_2d = functools.partial(LayerNorm2d, eps=1e-6)  # over the channels of every position


class ViTDet(nn.Module):
    """Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022,
    arXiv:2203.16527.

    New: a plain ViT is a detector's backbone. Most blocks attend inside windows only; the last block of each
    quarter of the depth attends everywhere (§3, "Backbone adaptation"). The last map alone makes the pyramid
    (Figure 2c).

    Images [B, 3, H, W] -> dict of five maps [B, width, h, w], of 4, 2, 1, 1/2, 1/4 times the patches'
    grid: what torchvision asks of a backbone, with `out_channels`. The class token is left out.

    width: channels of the maps.
    window: patches on a window's side; no more than the grid has. As in the released code, zeros fill up the
        windows at the edges, and are attended to.
    norm: of the pyramid, a function of the channels.

    Departs from the released code: positions are the encoder's own (there learned relative ones are added).
    """

    def __init__(self, encoder, width=256, window=14, norm=layer_norm_2d):
        super().__init__()
        encoder.norm.requires_grad_(False)  # the pyramid reads the last block
        self.encoder, self.out_channels, depth = encoder, width, len(encoder.blocks)
        self.global_blocks = [math.ceil(depth * quarter / 4) for quarter in (1, 2, 3, 4)]
        self.window = min(window, *encoder.grid)
        buckets = mim.relative_buckets(2 * [self.window])[1:, 1:] if encoder.relative_position else None
        self.register_buffer("window_buckets", buckets, persistent=False)
        D = encoder.embed_dim
        self.rescalers = rescalers(D, D // 2, D // 4, norm)
        plain = functools.partial(Conv2dNormActivation, norm_layer=norm, activation_layer=None)
        self.outputs = nn.ModuleList([nn.Sequential(plain(dim, width, 1), plain(width, width, 3))
                                      for dim in (D // 4, D // 2, D, D)])

    def windowed(self, block, x):
        """A block that attends inside windows, [B, N, D] -> [B, N, D]; drop path still drops whole images."""
        (gh, gw), window = self.encoder.grid, self.window
        maps = as_map(block.norm1(x), (gh, gw))
        maps = F.pad(maps, (0, -gw % window, 0, -gh % window))
        windows = mim.patchify(maps, window).unflatten(2, (window**2, -1))  # [B, n, window^2, D]
        windows = block.attn(windows.flatten(0, 1), self.window_buckets).view_as(windows)
        grid = [side // window for side in maps.shape[2:]]  # of windows
        maps = mim.unpatchify(windows.flatten(2), window, grid)[:, :, :gh, :gw]
        x = x + block.drop_path(block.ls1(maps.flatten(2).transpose(1, 2)))
        return x + block.drop_path(block.ls2(block.mlp(block.norm2(x))))

    def last_map(self, images):
        """Images [B, 3, H, W] -> the last block's maps [B, D, gh, gw]."""
        encoder = self.encoder
        buckets = encoder.buckets[1:, 1:] if encoder.relative_position else None
        x = encoder.sequence(encoder.embed(images))[:, 1:]
        for number, block in enumerate(encoder.blocks, start=1):
            x = block(x, buckets) if number in self.global_blocks else self.windowed(block, x)
        return as_map(x, encoder.grid)

    def forward(self, images):
        x = self.last_map(images)
        maps = [output(rescale(x)) for rescale, output in zip(self.rescalers, self.outputs)]
        maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return {str(level): x for level, x in enumerate(maps)}


class AlignedPool(MultiScaleRoIAlign):
    """torchvision's RoIAlign, but aligned as detectron2's: where that would read half a position too far to
    the right and below, the boxes are moved. Regions are of `size` positions, on maps of `strides`."""

    def __init__(self, size, strides):
        super().__init__(["0", "1", "2", "3"], size, sampling_ratio=0)  # 0: as many as positions
        # torchvision would guess these, as powers of two. Feature Pyramid Networks, Eq. 1, for any patch
        # size: objects of 14 x 14 patches (ViT-B: 224 pixels) belong to the patches' own grid.
        self.scales = [1 / stride for stride in strides]
        self.map_levels = LevelMapper(0, 3, canonical_scale=14 * strides[2], canonical_level=2)

    def forward(self, maps, boxes, image_shapes):
        strides = 1 / boxes[0].new_tensor(self.scales)
        moved = [some - strides[self.map_levels([some]), None] / 2 for some in boxes]
        return super().forward(maps, moved, image_shapes)


class Anchors(AnchorGenerator):
    """torchvision's anchors, at the strides of the maps, which it would guess from the maps' sizes, and too
    low where an odd size was rounded up."""

    def __init__(self, strides):
        super().__init__([(8 * stride,) for stride in strides], len(strides) * [(0.5, 1.0, 2.0)])
        self.strides = [(stride, stride) for stride in strides]

    def grid_anchors(self, grid_sizes, strides):
        return super().grid_anchors(grid_sizes, self.strides)


def federated_loss(logits, labels, weights, count=50):
    """Federated loss (Zhou et al., "Probabilistic two-stage detection", arXiv:2103.07461): binary
    cross-entropy, summed over some classes, averaged over the regions.

    These are the classes of the labels and, if they with the background are fewer than `count`, others, drawn
    without replacement in proportion to the weights.

    logits: [n, 1 + num_classes], of which the background's are not used. labels: [n], 0 for the background.
    weights: [1 + num_classes].
    """
    keys = weights / torch.empty_like(weights).exponential_()  # the largest are such a draw
    keys[labels] = math.inf
    chosen = keys >= keys.topk(min(count, len(keys))).values[-1]
    chosen[0] = False
    truth = F.one_hot(labels, len(keys)).float()
    losses = F.binary_cross_entropy_with_logits(logits[:, chosen], truth[:, chosen], reduction="sum")
    return losses / len(labels)


class FederatedLogits(torch.Tensor):
    """Logits of LVIS's classes. Where torchvision's Mask R-CNN asks for the cross-entropy or the softmax of
    logits, of these it gets the federated loss or the sigmoid. `weights` is as in `federated_loss`."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in (F.cross_entropy, F.softmax):
            return super().__torch_function__(function, types, args, kwargs)
        logits = args[0].as_subclass(torch.Tensor).float()
        return logits.sigmoid() if function is F.softmax else federated_loss(logits, args[1], args[0].weights)


def as_federated(weights, predictor, inputs, outputs):
    """A forward hook of a FastRCNNPredictor: its logits become `FederatedLogits`."""
    logits, boxes = outputs
    logits = logits.as_subclass(FederatedLogits)
    logits.weights = weights.to(logits.device)
    return logits, boxes


def decode_boxes(decode, codes, boxes):
    """`decode` of torchvision's BoxCoder in float32, whatever autocast made of the codes."""
    return decode(codes.float(), boxes)


class Detector(MaskRCNN):
    """Mask R-CNN (He et al., ICCV 2017, arXiv:1703.06870), torchvision's, with ViTDet's backbone and heads.

    In training model(images, targets) -> dict of losses to add up; otherwise model(images) -> a dict per
    image with boxes [n, 4], labels [n], scores [n] and masks [n, 1, 28, 28] in [0, 1], each inside its box.
    images: [B, 3, H, W], normalised, of the encoder's size. targets: a dict per image with boxes [m, 4] (x1,
    y1, x2, y2 in pixels), labels [m] from 1, masks [m, H, W] of 0 and 1.

    num_classes: with the background, which is class 0.
    width: channels of all maps; the box head's linear layer has 4 * width.
    window: patches on the side of the windows that most blocks attend in.
    image_counts: of LVIS alone, in how many images each class is; then the loss is `federated_loss`, and 300
        detections of an image are given, not 100, that have a score of 0.02, not 0.05.

    Departs from ViTDet's released detector, where torchvision has nothing else: the boxes' loss is smooth L1,
    not L1; in training, small images lie anywhere on the canvas, not in its upper left corner, and proposals
    are not clipped to them. Biases have no weight decay. For images of up to 96 pixels three things are ours:
    batch norm (it learns faster with many images a step), shallower heads, fewer regions.
    """

    def __init__(self, encoder, num_classes, width=256, window=14, image_counts=None):
        (H, W), p = encoder.image_size, encoder.patch_size
        if p % 4 or H % (2 * p) or W % (2 * p):
            raise UsageError("detection needs a patch_size divisible by 4, and an image_size divisible by "
                             f"twice the patch_size, got {p} and {H}x{W}")
        small = max(H, W) <= SMALL
        norm = nn.BatchNorm2d if small else layer_norm_2d
        rois, proposals, convs = (32, 100, [width]) if small else (512, 1000, 4 * [width])
        strides = [p // 4, p // 2, p, 2 * p, 4 * p]

        predictor, more = FastRCNNPredictor(4 * width, num_classes), {}
        if image_counts:
            weights = torch.tensor([0, *image_counts]).sqrt()  # as in detectron2
            predictor.register_forward_hook(functools.partial(as_federated, weights))
            more = dict(box_score_thresh=0.02, box_detections_per_img=300)
        super().__init__(
            ViTDet(encoder, width, window, norm),
            rpn_anchor_generator=Anchors(strides),
            rpn_head=RPNHead(width, 3, conv_depth=2),
            rpn_pre_nms_top_n_train=2 * proposals, rpn_post_nms_top_n_train=proposals,
            rpn_pre_nms_top_n_test=proposals, rpn_post_nms_top_n_test=proposals,
            box_roi_pool=AlignedPool(7, strides[:4]), box_batch_size_per_image=rois,
            box_head=FastRCNNConvFCHead((width, 7, 7), convs, [4 * width], norm),
            box_predictor=predictor,
            mask_roi_pool=AlignedPool(14, strides[:4]), mask_head=MaskRCNNHeads(width, convs, 1, norm),
            mask_predictor=MaskRCNNPredictor(width, width, num_classes), **more)
        for coder in (self.rpn.box_coder, self.roi_heads.box_coder):  # bf16 has too few bits for pixels
            coder.decode_single = functools.partial(decode_boxes, coder.decode_single)

    def forward(self, images, targets=None, covered=None):
        """covered: (height, width) of the upper left part to which boxes are clipped; default: all."""
        maps = self.backbone(images)
        images = ImageList(images, len(images) * [covered or images.shape[2:]])
        proposals, losses = self.rpn(images, maps, targets)
        found, others = self.roi_heads(maps, proposals, images.image_sizes, targets)
        return losses | others if self.training else found

    def predict(self, image):
        """An image uint8 [3, H, W] of any size -> dict of the objects in it: boxes [n, 4] (x, y, width,
        height; in double precision, as COCO's tools read them), labels [n], scores [n] and masks, bool
        [n, H, W]."""
        (H, W), size = image.shape[1:], self.backbone.encoder.image_size
        h, w = fitting_size(image, size)
        found, = self(normalize(fit_inside(image, size)[None]), covered=(h, w))
        boxes, scale = found["boxes"], found["boxes"].new_tensor(2 * [W / w, H / h])
        masks = image.new_zeros(len(boxes), H, W, dtype=torch.bool)
        # torchvision cuts the masks to learn half a pixel too far to the right and below.
        places = (boxes + 0.5) * scale
        for mask, box, corners, whole in zip(found["masks"], places, places.int().tolist(), masks):
            left, top, right, bottom = corners
            part = whole[top:bottom + 1, left:right + 1]
            if part.numel():  # a thin box at the edge may have left the image
                part |= paste(mask, box - box.new_tensor(2 * [left, top]), part.shape) > 0.5
        boxes = box_convert((boxes * scale).cpu().double(), "xyxy", "xywh")
        return found | dict(boxes=boxes, scores=found["scores"].float(), masks=masks)


def paste(mask, box, size):
    """A mask [1, h, w], resized into the box (x1, y1, x2, y2) of an empty image of `size`: [H, W]."""
    start, end = box.view(2, 2)
    # From places in the image, which count from -1 to 1, to those in the box
    scale = box.new_tensor(size[::-1]) / (end - start)
    theta = torch.stack([*scale.diag(), scale - (start + end) / (end - start)], dim=1)
    with torch.autocast(box.device.type, enabled=False):  # bf16 has too few bits for places
        grid = F.affine_grid(theta[None], (1, 1, *size), align_corners=False)
        return F.grid_sample(mask[None].float(), grid, align_corners=False)[0, 0]


def stepwise(progress):
    """The factor of the learning rate for detection: a tenth from 90%, a hundredth from 95% on."""
    return 0.1 ** ((progress >= 0.9) + (progress >= 0.95))


def detect(encoder, train, val, freeze: bool = False, epochs: PositiveInt = 100, batch_size: PositiveInt = 64,
           base_lr: PositiveFloat = 2.5e-5, warmup_epochs: NonNegativeFloat | None = None,
           weight_decay: NonNegativeFloat = 0.1, layer_decay: Fraction = 0.7, drop_path: Fraction = 0.1,
           width: PositiveInt = 256, window: PositiveInt = 14, accumulate: PositiveInt | None = None,
           eval_every: PositiveInt | None = None, per_class=False, output=None, resume: bool = False,
           seed: NonNegativeInt = 0, device="cpu", precision="fp32", workers=0) -> dict:
    """Object detection and instance segmentation, as ViTDet's on COCO (R-MAE, §4.1): Mask R-CNN.

    encoder: a mim.ViT. train, val: `DenseImages` of `load_dense(data, objects=True)`. Returns COCO's six
    figures in percent (`average_precision`; nine of LVIS) of boxes and of masks, box_ap, mask_ap, ..., and a
    picture.

    freeze: train only what follows the encoder
    epochs: passes over the training images
    batch_size: images a step, over all processes
    base_lr: learning rate per 16 images of the batch (1e-4 at 64); a tenth from 90%, a hundredth from 95% on
    warmup_epochs: epochs of linear warm-up; default: 250 steps, but at most a ninth of the epochs
    weight_decay: of AdamW
    layer_decay: learning rate of a block over that of the one above (not with --freeze)
    drop_path: stochastic depth of the last block (not with --freeze)
    width: channels of the feature pyramid and the heads
    window: patches on the side of the windows that most blocks attend in
    accumulate: number of micro-batches of a step, over all processes; default: the smallest that leaves at
        most 8 images in each (at 1024 pixels in bf16 ViT-B needs about 2.5 GiB an image, LoMaR's about 4)
    eval_every: evaluate after every so many epochs, too
    resume: go on from --output
    seed: of everything random
    """
    classes = ["background", *train.source.classes]
    image_counts = getattr(train.source, "image_counts", None)
    settings = settings_of("detect", locals(), classes) | dict(image_counts=image_counts)
    torch.manual_seed(seed)
    model = Detector(trainable(encoder, drop_path, freeze), len(classes), width, window, image_counts)
    model.to(device)
    backbone = model.backbone
    heads = [backbone.rescalers, backbone.outputs, model.rpn, model.roi_heads]
    optimizer = layer_wise_adamw(backbone.encoder, heads, weight_decay, layer_decay)

    def compute_losses(model, images, objects):
        targets = [{name: value.to(device, non_blocking=True) for name, value in some.items()}
                   for some in objects]
        parts = model(images, targets)
        return dict(loss=sum(parts.values()), **parts)

    return call(fit, locals(), lr_batch=16, most=8, warmup_steps=250, fall=stepwise, collate_fn=collate_dense,
                score=lambda model: score_objects(model, val, per_class, precision, workers))


def score_objects(model, val, per_class: bool = False, precision="fp32", workers=0) -> dict:
    """The figures of a `Detector` on `DenseImages`, see `detect`.

    per_class: the AP of each class that occurs, too
    """
    records, shown, result, names = [], [], {}, ["", *val.source.classes]
    for item, found in predictions(model, val, precision, workers):
        records.append([match_image(item["label"], found, kind) for kind in ("boxes", "masks")])
        shown += [(item["image"], found, item["label"])] * (len(shown) < 6)
    for name, matches in zip(("box", "mask"), zip(*records)):
        figures, by_class = average_precision(matches, getattr(val.source, "groups", {}))
        for figure, value in figures.items():
            result[f"{name}_{figure}"] = None if value is None else round(value, 2)
        if per_class:
            result[f"{name}_ap_by_class"] = {names[k]: round(value, 2) for k, value in by_class.items()}
    return result | dict(picture=draw_masks(shown, names))


# ---------------------------------------------------------------------------------------------------------
# Average precision as COCO and LVIS count it, of boxes and of masks: pycocotools' and lvis-api's figures for
# the same detections

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREA_RANGES = np.square([[0, 1e5], [0, 32], [32, 96], [96, 1e5]])  # pixels: all, small, medium, large
HIT, MISS, NOT_COUNTED = 1, 0, -1


def box_areas(boxes):
    """[n, 4] (x, y, width, height) -> [n]."""
    return boxes[:, 2:].prod(1)


def box_overlaps(boxes, others):
    """The area that two boxes share: [m, 4], [n, 4] (x, y, width, height) -> [m, n]."""
    start = np.maximum(boxes[:, None, :2], others[:, :2])
    end = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:], others[:, :2] + others[:, 2:])
    return (end - start).clip(0).prod(2)


def mask_overlaps(masks, others):
    """The pixels that two masks share: bool [m, H, W], [n, H, W] -> [m, n]."""
    return np.array([mask_areas(others & mask) for mask in masks]).reshape(len(masks), len(others))


def outside(areas):
    """True for each of the areas [n] that lies outside of a range: bool [4, n]. Ranges include both ends."""
    low, high = AREA_RANGES.T[..., None]
    return (areas < low) | (areas > high)


def match_image(truths, detections, kind="boxes"):
    """Which detections of one image are hits, for each range of areas and each IoU threshold.

    By falling score, each detection takes the truth of its class with the largest IoU among those that are
    free and reach the threshold. It takes a crowd, or a truth outside the range of areas, only if it can take
    no other; it is then neither hit nor miss. So is one that takes none, if its own area is outside the
    range. A crowd can be taken many times; the IoU with it is the part of the detection that lies inside it.
    In each class, only the 100 detections with the highest scores count. In LVIS these are 300 of all classes
    together, and of them only those of classes that the image is known to have or not to have; if not all
    objects of a class are annotated, a detection that takes none is not a miss.

    truths: dict of arrays: boxes [n, 4] (x, y, width, height; from COCO's own, no bit is lost) or masks bool
        [n, H, W], labels [n], crowd bool [n], and areas [n] as annotated, which decide the range; of LVIS the
        labels neg_category_ids, which the image has not, and not_exhaustive_category_ids, of which it may
        have more
    detections: dict of arrays: boxes [m, 4] or masks bool [m, H, W], labels [m], scores [m]
    kind: boxes or masks; IoU and the detections' areas are of these
    returns: labels [k], scores [k], outcomes int8 [4, 10, k] of the detections that count, by falling score;
        labels [n] of the truths, and bool [4, n] which of them are to be found
    """
    areas_of, overlaps_of = (mask_areas, mask_overlaps) if kind == "masks" else (box_areas, box_overlaps)
    order = np.argsort(-detections["scores"], kind="stable")
    labels = detections["labels"][order]
    if "neg_category_ids" in truths:  # LVIS
        known = np.isin(labels, np.append(truths["labels"], truths["neg_category_ids"]))
        order = order[known & (np.arange(len(order)) < 300)]
    else:
        rank = np.tril(labels[:, None] == labels, -1).sum(1)  # how many of the same class come before
        order = order[rank < 100]
    labels, scores = detections["labels"][order], detections["scores"][order]
    truths = {name: values[::-1] for name, values in truths.items()}  # of equal IoUs, COCO takes the last
    crowd = truths["crowd"]

    areas, truth_areas = areas_of(detections[kind])[order], areas_of(truths[kind])
    overlaps = overlaps_of(detections[kind], truths[kind])[order]
    overlaps = overlaps * (labels[:, None] == truths["labels"])  # [k, n]; 0 between two classes
    unions = areas[:, None] + truth_areas * ~crowd - overlaps * ~crowd
    iou = overlaps / np.maximum(unions, 1e-12)

    wanted = ~(crowd | outside(truths["areas"]))  # [4, n]
    free = np.ones((4, 10, len(crowd)), dtype=bool)
    unsure = outside(areas) | np.isin(labels, truths.get("not_exhaustive_category_ids", []))
    outcomes = np.where(unsure, NOT_COUNTED, MISS).astype(np.int8)
    outcomes = outcomes[:, None].repeat(10, axis=1)  # [4, 10, k]
    for i in np.flatnonzero((iou >= IOU_THRESHOLDS[0]).any(1)):
        possible = free & (iou[i] >= IOU_THRESHOLDS[:, None])
        likeness = np.where(possible, iou[i] - ~wanted[:, None], -1)  # those wanted first
        best = likeness.argmax(2, keepdims=True)
        taken = possible & (best == np.arange(len(crowd)))  # [4, 10, n]: one truth or none
        free &= ~taken | crowd
        outcomes[taken.any(2), i] = NOT_COUNTED
        outcomes[(taken & wanted[:, None]).any(2), i] = HIT
    return labels, scores, outcomes, truths["labels"], wanted


def mean_precision(outcomes, num_truths):
    """One class's precision, averaged over the recalls 0, 0.01, ... 1: outcomes [k] by falling score.

    The precision at a recall is the highest at this recall or above, and 0 at recalls that are not reached.
    """
    hits = np.cumsum(outcomes == HIT)
    misses = np.cumsum(outcomes == MISS)
    precision = hits / np.maximum(hits + misses, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(hits / num_truths, RECALLS)
    return np.append(precision, 0)[reached].mean()


def average_precision(records, groups={}):
    """From match_image's results COCO's six figures, dict(ap, ap50, ap75, ap_small, ap_medium, ap_large), and
    a dict of the classes' labels -> their AP.

    Each figure is the mean over the classes with truths in its range of areas, in percent; None if no class
    has any.

    groups: dict of labels -> names; each name adds a figure, ap_NAME, the AP of its classes alone
    """
    figures = {name: {} for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")}
    joined = [np.concatenate(parts, axis=-1) for parts in zip(*records)]
    labels, scores, outcomes, truth_labels, wanted = joined or 5 * [np.zeros(0)]
    order = np.argsort(-scores, kind="stable")
    labels, outcomes = labels[order], outcomes[..., order]
    for label in np.unique(truth_labels).tolist():
        totals = wanted[:, truth_labels == label].sum(1)
        of_class = outcomes[..., labels == label]  # [4, 10, k]
        for name, total, rows in zip(("ap", "ap_small", "ap_medium", "ap_large"), totals, of_class):
            if total > 0:
                precisions = [100 * mean_precision(row, total) for row in rows]  # one for each IoU threshold
                figures[name][label] = np.mean(precisions)
                if name == "ap":
                    figures["ap50"][label], figures["ap75"][label] = precisions[0], precisions[5]
    by_class = figures["ap"]
    for name in sorted(set(groups.values())):
        figures[f"ap_{name}"] = {label: ap for label, ap in by_class.items() if groups[label] == name}
    means = {name: float(np.mean([*values.values()])) if values else None for name, values in figures.items()}
    return means, by_class


# ---------------------------------------------------------------------------------------------------------
# Pictures


def attention_picture(images, maps, more={}):
    """Images [n, 3, H, W] in [0, 1] and their attention maps [n, heads, gh, gw] -> a picture [3, h, w].

    A row has an image, the mean of its maps over it, each map if there are several, and the columns `more`.
    """
    columns = dict(image=images, attention=heat(images, maps.mean(1)))
    if maps.shape[1] > 1:
        columns |= {f"head {i + 1}": heat(images, maps[:, i]) for i in range(maps.shape[1])}
    return picture(columns | more, SCALE)


def one_object(regions, patch_size):
    """Maps of regions -> the patches of one object of each image, bool [B, N]; none if it has no object."""
    if regions.is_floating_point():
        regions = (regions > 0.3).long()  # a class activation map, as in ObjMAE
    maps, found = mim.select_objects(regions, 1)
    return mim.object_patches(maps[:, 0], patch_size) & found


def object_flow(flow, regions, patch_size):
    """Rollout [B, 1+N, 1+N] -> its mean over the patches of one object of each image, and these: [B, N], [B,
    N] bool."""
    member = one_object(regions, patch_size)
    flow = (member[:, None].float() @ flow[:, 1:, 1:])[:, 0] / member.sum(1, keepdim=True).clamp_min(1)
    return flow, member


def default_query(encoder):
    """The class token, 0; of LoMaR, where no loss reaches it, the patch in the middle."""
    gh, gw = encoder.grid
    return 1 + gh // 2 * gw + gw // 2 if encoder.relative_position else 0


def attention_shares(encoder, dataset, query=0, device="cpu", workers=0):
    """The share of the last block's attention that falls on the largest object, and on all objects, beside
    the objects' shares of the area: means over the images with an object, in percent.

    dataset: datasets.Images with regions, label maps.
    """
    shares, p = [], encoder.patch_size
    for batch in tqdm(make_loader(dataset, workers, device, batch_size=PIECE), leave=False, disable=None):
        regions = batch["regions"].to(device)
        main = mim.binary_maps(regions, mim.region_areas(regions).argmax(1, keepdim=True))
        objects = torch.cat([main, regions.amax(1, keepdim=True) > 0], dim=1)
        inside = F.avg_pool2d(objects.float(), p).flatten(2)  # [B, 2, N], of each patch
        maps = encoder.last_attention(prepare(batch["image"], device), query).float().mean(1, keepdim=True)
        share = (inside * maps).sum(2) / maps.sum(2)
        shares.append(torch.cat([share, inside.mean(2)], dim=1)[objects[:, 1].any((1, 2))])
    shares, names = torch.cat(shares), ("attention_main", "attention_objects", "area_main", "area_objects")
    if len(shares) == 0:
        raise UsageError("--regions: no image has an object")
    return {name: round(100 * share, 2) for name, share in zip(names, shares.mean(0).tolist())}


@torch.no_grad()
def attention(encoder, images, regions=None, dataset=None, query: NonNegativeInt | None = None,
              rollout: bool = False, seed: NonNegativeInt = 0, device="cpu", precision="fp32",
              workers=0) -> dict:
    """A `picture` [3, h, w] of the last block's attention: a row has the image, the mean of the heads, and
    each head.

    encoder: a mim.ViT. images: [n, 3, H, W], uint8, or floats that are normalised.
    regions: maps of the images' regions, for rollout: one object (the rest is dark, all of an image that has
        none) and the rollout of its patches are drawn too (ObjMAE, Figures 7 and 10).
    dataset: datasets.Images with regions, label maps. Then the mean shares of the attention that fall on the
        largest object and on all objects, attention_main and attention_objects, are returned, too, and the
        objects' shares of the area, all in percent (not of a rollout). Attention that knows nothing of
        objects has the area's.
    query: whose attention: 0 the class token, 1+i patch i, which the picture marks (default: the class token;
        for LoMaR, where no loss reaches it, the patch in the middle)
    rollout: the attention rolled out through all blocks instead (see mim.ViT.rollout)
    seed: of the choice of the object, and of an untrained encoder
    """
    encoder, images = frozen(encoder, device), prepare(images, device)
    (gh, gw), p, more = encoder.grid, encoder.patch_size, {}
    query = default_query(encoder) if query is None else query
    if query > gh * gw:
        raise UsageError(f"--query {query}: it may be 0 (class token) to {gh * gw} (the last patch)")
    torch.manual_seed(seed)
    shown, result = denormalize(images), dict(query=query)
    with autocast(device, precision):
        if rollout:
            flow = encoder.rollout(images)
            maps = flow[:, query, None, 1:]
        else:
            maps = encoder.last_attention(images, query)
            # Class activation maps are no objects.
            if dataset is not None and regions is not None and not regions.is_floating_point():
                result |= attention_shares(encoder, dataset, query, device, workers)
    maps = maps.float().unflatten(2, (gh, gw))
    if rollout and regions is not None:
        flow, member = object_flow(flow, regions.to(device), p)
        inside = F.interpolate(member.unflatten(1, (gh, gw))[:, None].float(), images.shape[-2:])
        more["object"] = shown * (0.3 + 0.7 * inside)
        more["of the object"] = heat(shown, flow.unflatten(1, (gh, gw)))
    if query > 0:
        red = paint(shown, torch.full_like(shown[:, :1], 0.5), torch.tensor([[1.0, 0.0, 0.0]]))
        more["image"] = put_patches(shown, red, torch.full((len(shown), 1), query - 1, device=device), p)
    return result | dict(picture=attention_picture(shown, maps, more))


@torch.no_grad()
def reconstruct(method, images, regions=None, tokenizer=None, hide: Literal["object"] | None = None,
                seed: NonNegativeInt = 0, device="cpu", precision="fp32") -> dict:
    """A `picture` [3, h, w] of images, masked images and reconstructions, and the losses of these images.

    loss_full is CAE's of the whole image, encoded and decoded without the regressor. error is the mean
    squared error of the hidden pixels as drawn, in 0..1; error_hint, for methods on normalised patches, that
    of each patch's true mean, which the picture is given.

    method: one of mim.METHODS. images: [n, 3, H, W], uint8, or floats that are normalised.
    regions, tokenizer: for methods that take them; regions also for hide.

    hide: object hides an object of each image and shows all the rest (ObjMAE, Figure 7). The objects are
        those of --regions, by default the run's, else objmae's (with --images fh); not for lomar and dvae
    seed: of the masks
    """
    method, images = frozen(method, device), prepare(images, device)
    regions = None if regions is None else regions.to(device)
    tokenizer = None if tokenizer is None else frozen(tokenizer, device)
    torch.manual_seed(seed)
    if hide and isinstance(method, (mim.LoMaR, mim.DVAE)):
        raise UsageError("--hide object: lomar masks inside of windows, and dvae nothing")
    with autocast(device, precision):
        parts = [] if hide else [draw_reconstruction(method, images, regions, tokenizer)]
        for i, hidden in enumerate(one_object(regions, method.encoder.patch_size) if hide else ()):
            if 0 < hidden.sum() < len(hidden):
                order = torch.randperm(len(hidden), device=device)  # region maps may show only the first
                ids_visible, ids_masked = (order[member[order]][None] for member in (~hidden, hidden))
                parts.append(draw_reconstruction(method, images[i, None], regions[i, None], tokenizer,
                                                 ids_visible=ids_visible, ids_masked=ids_masked))
    if not parts:
        raise UsageError("--hide object: no image has an object of at least 5% of it")
    pictures, outs = zip(*parts)
    losses = {name: round(sum(out[name].item() for out in outs) / len(outs), 5) for name in outs[0]
              if name.startswith(("loss", "error", "accuracy"))}
    if hide:
        losses["objects"] = len(parts)  # images without one are left out
    return losses | dict(picture=torch.cat(pictures, dim=1))


# ---------------------------------------------------------------------------------------------------------
# Interactive segmentation (R-MAE, Figure 6): a region is completed from a few of its patches


def draw_patches(first, num_patches, count):
    """`count` patches of an image, [B, count]: those of `first` [B, n] and random others."""
    noise = torch.rand(len(first), num_patches, device=first.device).scatter(1, first, 2.0)
    return noise.argsort(1, descending=True)[:, :count]


def hint_patches(patches, count):
    """Maps in patches [B, N, p*p] -> `count` random patches of each, at least one of which shows the
    object, [B, count]."""
    first = (torch.rand(patches.shape[:2], device=patches.device) + patches.any(-1)).argmax(-1, keepdim=True)
    return draw_patches(first, patches.shape[1], count)


def complete_hints(method, images, maps, ids, image_visible):
    """Completes maps [B, 1, H, W] from their patches `ids` [B, n], with a share of the images' patches."""
    N = method.encoder.num_patches
    ids_image = draw_patches(ids, N, max(ids.shape[1], int(image_visible * N)))
    return method.complete(images, maps, ids, ids_image).float()


def nearest_hint(patches, ids, grid):
    """Copies to every patch its nearest shown patch: patches [B, N, p*p] with `ids` [B, n] shown -> bool
    [B, N, 1], true where most of that patch is region."""
    place = torch.cartesian_prod(*(torch.arange(float(side), device=ids.device) for side in grid))
    nearest = torch.cdist(place, place[ids]).argmin(2)
    mostly = mim.take(patches, ids).float().mean(2) > 0.5
    return mostly.gather(1, nearest)[..., None]


def hidden_iou(guess, patches, ids):
    """Intersection over union [B] of two maps in patches [B, N, p*p], outside of the shown patches `ids`; nan
    if both are empty there."""
    hidden = torch.ones_like(patches[..., :1]).scatter(1, ids[..., None], False)
    return (guess & patches & hidden).sum((1, 2)) / ((guess | patches) & hidden).sum((1, 2))


@torch.no_grad()
def segment(method, dataset, image_visible: Fraction = 1.0, count: PositiveInt = 8, seed: NonNegativeInt = 0,
            device="cpu", precision="fp32", workers=0) -> dict:
    """Hides 80, 85 and 90% of the patches of an object's map and completes it. Returns the mean intersection
    over union (IoU, in percent) inside the hidden patches, and a `picture`. Two controls tell what the hints
    alone give: the same hints with another image of the batch (other_image), and a copy of the nearest shown
    patch.

    method: mim.RMAE or RAE. dataset: datasets.Images with regions, label maps.
    image_visible: share of the image's patches that are encoded, the hints' among them, 0 to 1: all, as in
        Figure 6; 0.25 are as many as in pre-training
    count: images in the picture
    seed: of hints and objects
    """
    if not hasattr(method, "complete"):
        raise UsageError("--task segment is for runs of rae and rmae")
    method = frozen(method, device)
    encoder, p = method.encoder, method.encoder.patch_size
    torch.manual_seed(seed)
    scores, columns = {}, {}
    loader = make_loader(dataset, workers, device, batch_size=64)
    for batch in tqdm(loader, "segment", leave=False, disable=None):
        maps, usable = mim.select_objects(batch["regions"].to(device), 1)
        if not usable.any():
            continue
        some, maps = prepare(batch["image"], device)[usable[:, 0]], maps[usable[:, 0]]
        tiles = dict(image=denormalize(some), region=maps)
        patches = mim.patchify(maps, p)
        for ratio in (80, 85, 90):
            ids = hint_patches(patches, max(1, round(encoder.num_patches * (1 - ratio / 100))))
            with autocast(device, precision):
                completed = complete_hints(method, some, maps, ids, image_visible)
                control = complete_hints(method, some.roll(1, 0), maps, ids, image_visible)
            guess, other = (mim.patchify(x, p) > 0.5 for x in (completed, control))
            near = nearest_hint(patches, ids, encoder.grid)
            for name, found in dict(iou=guess, other_image=other, nearest_hint=near).items():
                if name == "other_image" and len(some) == 1:
                    continue  # there is no other
                scores.setdefault(f"{name}_{ratio}", []).append(hidden_iou(found, patches, ids))
            hints = put_patches(torch.full_like(completed, 0.5), maps.float(), ids, p)
            tiles |= {f"{ratio}% hidden": hints, f"{ratio}% completed": completed}
        for title, tile in tiles.items():
            tile = tile.expand(-1, 3, -1, -1)
            columns[title] = torch.cat([columns.get(title, tile[:0]), tile])[:count]
    if not scores:
        raise UsageError("--task segment: no image has a region of at least 5% of it")
    scores = {name: torch.cat(values) for name, values in scores.items()}
    means = {name: None if values.isnan().all() else round(100 * values.nanmean().item(), 2)
             for name, values in scores.items()}
    return means | dict(objects=len(scores["iou_80"]), picture=picture(columns, HIDDEN))


# ---------------------------------------------------------------------------------------------------------
# Models that were trained here

FINISHED = dict(finetune=(Classifier, score_labels), semseg=(Segmenter, score_pixels),
                detect=(Detector, score_objects))


def load_finished(path):
    """The model that `finetune`, `semseg` or `detect` left in a file, in evaluation mode; its `classes` are
    the names of the labels that its `predict` gives."""
    with explained(path, "it is no model of --task finetune, semseg or detect"):
        content = mim.load_file(path)
        args = content["args"]
        encoder, _ = mim.vit_from_checkpoint(content["model"], args["image_size"], args["num_heads"])
        build, classes = FINISHED[args["task"]][0], args["classes"]
        model = call(build, args, encoder=encoder, num_classes=len(classes))
        copy_into(model.state_dict(), content["model"], "model")
    model.classes, model.categories, model.image_size = classes, args["categories"], encoder.image_size
    return model.eval()


def predict(model, image, precision="fp32"):
    """What a finished model says of an image uint8 [3, H, W]: its `predict`, as a dict of numpy arrays."""
    device = next(model.parameters()).device
    with torch.no_grad(), autocast(device, precision):
        found = model.predict(image.to(device))
    return {name: value.cpu().numpy() for name, value in found.items()}


def predict_images(model, output, images: list[str] | None = None, precision="fp32") -> dict:
    """Writes what a finished model says of image files beside its picture, which has the first 16: everything
    in COCO's result format, as JSON; of a `Segmenter` the labels of pixels, too, a PNG for each image. An
    image's id is its file name without the ending or, if two share that, its path. Photographs are turned as
    their EXIF data say, COCO's as data are not.

    images: image files to predict: the checkpoint is then a model that the task has trained
    """
    results, shown, path = [], [], output.with_suffix(".json")
    stems = [Path(name).stem for name in images]
    image_ids = [int(stem) if stem.isdecimal() else stem for stem in stems]
    with explained(f"--output {output}", f"{path} is there, and no result of eval.py"):
        entries = json.loads(path.read_bytes()) if path.exists() else []
        own = {"image_id", "file_name", "category_id", "category_name"}
        if not isinstance(entries, list) or not all(own <= entry.keys() for entry in entries):
            raise ValueError("it has other entries")
    ids = [0, *(model.categories or range(len(model.classes)))][-len(model.classes):]  # 0: the background
    for number, (name, stem, image_id) in enumerate(zip(images, stems, image_ids), start=1):
        image = open_photo(name)
        known = dict(image_id=image_id if image_ids.count(image_id) == 1 else name, file_name=name)
        found = predict(model, image, precision)
        if "classes" in found:
            file = output.with_name(f"{output.stem}-{number}-{stem}.png")
            labels = np.array(ids)[found["classes"]].astype(np.min_scalar_type(max(ids)))
            if max(ids) > 65535:  # of masks in colours, see `read_ids`
                labels = (labels[..., None] >> np.array([0, 8, 16])).astype(np.uint8)
            save_png(check_output(file), Image.fromarray(labels), "semseg")
            found, known["labels"] = as_masks(found["classes"]), str(file)
        shown += [(image, found)] * (number <= 16)
        for i, label in enumerate(found["labels"].tolist()):
            entry = known | dict(category_id=ids[label], category_name=model.classes[label])
            if "scores" in found:
                entry |= dict(score=float(found["scores"][i]), bbox=found["boxes"][i].tolist())
            if "masks" in found:
                entry["segmentation"] = encode_mask(found["masks"][i])
            results.append(entry)
    write_atomically(path, lambda to: to.write(json.dumps(results).encode()))
    return dict(predictions=path, picture=draw_masks(shown, model.classes))


# ---------------------------------------------------------------------------------------------------------
# Checkpoints and images of the command line


def loaded(model, path, missing=(), left_over=()):
    """Says on stderr what a checkpoint lacked and what of it was not used; returns the model."""
    for what, names in (("missing", missing), ("left over", left_over)):
        if names:
            print(f"{path}: {len(names)} {what}: {', '.join(names)[:200]}", file=sys.stderr)
    if not all_finite(model):
        raise UsageError(f"{path}: its weights are not all finite numbers")
    return model


def warn_untrained(checkpoint, content):
    """Says on stderr if a run was stopped in its first epoch."""
    if run_settings(content) and content.get("epoch") == 0:
        print(f"{checkpoint}: its run has had no epoch yet, its weights are the first", file=sys.stderr)


def open_encoder(checkpoint, data="shapes", image_size: list[PositiveInt] | None = None,
                 model: Literal[tuple(mim.SIZES)] | None = None, patch_size: PositiveInt | None = None,
                 relative_position: bool = False, seed: NonNegativeInt = 0):
    """(the ViT of a checkpoint, or an untrained one; the method that made it, for `recipe`).

    image_size: pixels, one number or height and width (default: the checkpoint's)
    model: size of an untrained encoder (default: that of a run on these images: nano for scenes, tiny for
        other images of up to 96 pixels, base for larger ones)
    patch_size: of an untrained encoder, pixels (default: 16; of images of up to 96 pixels an eighth)
    relative_position: an untrained encoder with LoMaR's relative positions
    seed: of an untrained encoder
    """
    size = image_pair(image_size) if image_size else None
    sizes = dict(model=model, patch_size=patch_size, relative_position=relative_position)
    given = {name: value for name, value in sizes.items() if value}
    if checkpoint == "random":
        with first_process_first():
            size = size or image_pair([load_unlabelled(data)[0].image_size])
        torch.manual_seed(seed)
        with explained("--image-size", "there is no such ViT"):
            settings = run_recipe(dict(method="mae", data=data), size) | given
            encoder = call(build_encoder, settings, image_size=size, relative_position=relative_position)
        return encoder, "lomar" if relative_position else "mae"
    for name in given:
        flag = name.replace("_", "-")
        raise UsageError(f"--{flag} is for an untrained encoder; {checkpoint} brings its own")
    with explained(checkpoint, "it cannot be used"):
        content = mim.load_file(checkpoint)
        state = mim.read_checkpoint(content)
        taken, *others = mim.encoder_prefixes(state)
        if others:
            print(f"{checkpoint}: the encoder is {taken} and not {', '.join(others)}", file=sys.stderr)
        # What a run says of its encoder, in encoder.pt among the metadata, in what a task has trained in its
        # args. Nothing else tells a grid that is not square, the image size where positions are relative, or
        # an unusual number of heads.
        warn_untrained(checkpoint, content)
        run, args = getattr(content, "_metadata", {}).get("", {}), content.get("args")
        if isinstance(args, dict):
            run = args if args.get("task") in FINISHED else run_settings(content)
        size = size or run.get("image_size")
        if size is None and not any(name.endswith("pos_embed") for name in state):
            raise UsageError(f"--image-size is needed: {checkpoint} has relative positions and does not tell "
                             "it")
        state._metadata = {"": run}  # where vit_from_checkpoint looks for these
        encoder, names = mim.vit_from_checkpoint(state, size)
        if encoder.channels != 3:
            raise ValueError(f"its images have {encoder.channels} channels, and not 3")
        method = run.get("method")
        if method not in mim.METHODS:
            method = "lomar" if encoder.relative_position else "mae"
    return loaded(encoder, checkpoint, *names), method + "-simmim" * (run.get("base") == "simmim")


def open_method(checkpoint, set: list[str] | None = None):
    """A whole pre-trained model -> (method, the settings of its run; of a file of the MAE release none, {}).

    set: arguments of the method to change, such as --set mask_ratio=0.3 norm_pix=false
    """
    if checkpoint == "random":
        raise UsageError("random: this task needs a whole pre-trained model")
    with explained(checkpoint, "it cannot be used"):
        content = mim.load_file(checkpoint)
        args = run_settings(content)
        warn_untrained(checkpoint, content)
        changes = call(read_changes, args, changes=set)
        if args:
            method = load_method(content, checkpoint, **changes)
            return loaded(method, checkpoint), args | dict(epoch=content.get("epoch"))
        state = mim.read_checkpoint(content)
        depth = len({name.split(".")[1] for name in state if name.startswith("decoder_blocks.")})
        if not depth:
            raise ValueError("it has an encoder only; give the checkpoint.pt of a run, or an MAE with its "
                             "decoder")
        norm_pix = getattr(content.get("args"), "norm_pix_loss", True)  # `args`: the options of its training
        options = dict(decoder_dim=len(state["decoder_embed.weight"]), decoder_depth=depth, norm_pix=norm_pix)
        method = mim.MAE(mim.vit_from_checkpoint(state)[0], **options | changes)
        return loaded(method, checkpoint, *mim.load_mae(method, state)), {}


def read_changes(changes, method="mae", base="mae"):
    """The words NAME=VALUE of --set -> dict of arguments of the method's constructor; UsageError if it has
    none of this name, or not with such a value."""
    parser, words = Parser(add_help=False), []
    functions = [mim.METHODS[method]] + [mim.METHODS[base]] * (method == "amt")
    parser.add(functions)
    names = [name for name in flags_of(functions) if name not in ("interval", "tau_start", "tau_end")]
    for change in changes or ():
        name, _, value = change.partition("=")
        if name not in names or not value:
            raise UsageError(f"--set {change}: it takes NAME=VALUE; the names are {', '.join(names)}")
        flag = name.replace("_", "-")
        words.append(dict(true=f"--{flag}", false=f"--no-{flag}").get(value.lower(), f"--{flag}={value}"))
    return parser.parse(words)


def open_pair(data, task, size, finished=None, limit=None, val_limit: PositiveInt | None = None,
              cache_features=False, seed=0):
    """dict(train, val) of --data for a task that trains or compares: datasets.Images, or `DenseImages`; for a
    `finished` model val alone.

    val_limit: use so many of the validation images, evenly spread; default: all
    """
    dense, small = task in ("semseg", "detect"), max(size) <= SMALL
    with first_process_first():
        if dense:
            train = finished or load_dense(data, task == "detect", "train", size, limit)
            val = load_dense(data, task == "detect", "val", size, val_limit, train.categories)
        else:
            train = finished or load_data(data, "train", size, limit)
            val = load_data(data, "val", size, val_limit)
    if rank() == 0:
        print("; ".join(source.description for source in [train] * (not finished) + [val]), file=sys.stderr)
    if not dense and (len(train.classes) < 2 or finished and finished.classes != val.classes):
        need = "this task needs labels: a folder per class"
        if finished and val.classes:
            need = "its classes are not those that the model was trained on"
        raise UsageError(f"--data {data}: {need}; {val.description}")
    pair = dict(val=DenseImages(val, size) if dense else Images(val, size, "center"))
    pair["val"][0]  # what is wrong with the validation data is told before the training
    if finished:
        return pair
    if dense:  # small images are scaled less, and keep their colours
        scale = (0.8, 1.25) if small else (0.1, 2.0) if task == "detect" else (0.5, 2.0)
        distort = task == "semseg" and not small
        return pair | dict(train=DenseImages(train, size, scale, distort, seed))
    view = "center" if cache_features or task == "knn" else "crop"
    augment = augmentation() if task == "finetune" else None
    return pair | dict(train=Images(train, size, view, (0.08, 1.0), augment=augment, seed=seed))


def load_unlabelled(data, size=None, limit=None):
    """The images that --data names, for what needs no labels, and their split: val, or where there is none,
    pretrain, which is all."""
    try:
        return load_data(data, "val", size, limit), "val"
    except UsageError:
        return load_data(data, "pretrain", size, limit), "pretrain"


def open_photo(path):
    """A file of --images -> uint8 [3, H, W]; UsageError if it is none."""
    with explained(f"--images {path}", "it cannot be used as an image"):
        image = decode(path)
        if min(image.shape[1:]) < MIN_SIDE:
            raise ValueError(f"a side has fewer than {MIN_SIDE} pixels")
    return image


def open_images(data, size, settings, images: list[str] | None = None, count: PositiveInt = 8):
    """What is drawn, the files of --images, or the val split of --data, as a dict: dataset (datasets.Images),
    and of some of it images [count, 3, H, W] and regions, if it has any.

    images: image files to draw, instead of some of --data
    count: images in the picture, spread over those of --data (not with --images)
    """
    for path in images or ():
        open_photo(path)
    limit = settings.get("limit")
    source, split = (Files("", images), "val") if images else load_unlabelled(data, size, limit)
    if images and settings.get("regions") not in (None, "fh"):
        raise UsageError(f"--regions {settings['regions']}: single images have no regions but fh")
    regions = call(open_regions, settings, source=source, split=split)
    task = settings.get("task")
    scored = task == "segment" or task == "attention" and not settings.get("rollout")
    if hasattr(regions, "fill") and not images and (scored or settings["regions"] == "cam"):
        regions.fill(settings["workers"])  # of all images; `read` computes fh's of those that are drawn
    dataset = Images(source, size, "center", regions=regions)
    return dict(dataset=dataset) | picture_items(dataset, len(images) if images else count)


def task_of(path):
    """The task whose model, log or picture a file is; None if another program made it."""
    for read in (lambda: Image.open(path).info, lambda: mim.load_file(path)["args"],
                 lambda: json.loads(open(path).readline())):
        with contextlib.suppress(Exception):  # on others' files, readers raise anything
            return str(read()["task"])


def check_output(path, checkpoint=None):
    """Returns the path of a result, after trying now, and not after an hour of training, to write beside it.
    UsageError if that fails, or if eval.py has not written what is there."""
    check_place(path)
    itself = checkpoint and os.path.exists(checkpoint) and path.exists() and path.samefile(checkpoint)
    if itself or path.exists() and task_of(path) not in TASKS:
        raise UsageError(f"--output {path}: it is no result of eval.py, or the checkpoint itself")
    with explained(f"--output {path}", "it cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    return path


def beside(checkpoint, name):
    """The path of a result, which lies beside its checkpoint where --output is not given."""
    return ("runs/random" if checkpoint == "random" else Path(checkpoint).parent) / Path(name)


def open_picture(checkpoint, task, output: str | None = None):
    """The file of a task's picture, which may be drawn anew.

    output: file of the picture, PNG; default: TASK.png beside the checkpoint; of encoder-N.pt TASK-N.png
    """
    number = re.search(r"(-\d+)?$", Path(checkpoint).stem)[0]
    path = Path(output or beside(checkpoint, f"{task}{number}.png"))
    if path.suffix in (".pt", ".jsonl", ".json"):
        raise UsageError(f"--output {output}: it is for the picture, and models, logs and predictions end so")
    return check_output(path, checkpoint)


def open_result(checkpoint, task, output: str | None = None, resume=False, overwrite: bool = False):
    """The file of a trained model. A task's picture lies beside it, under the same name but for .png.

    output: file of the trained model; default: TASK.pt beside the checkpoint (given a trained model, that of
        its picture, PNG)
    overwrite: start anew where --output already holds a trained model (not with --resume)
    """
    path = check_output(Path(output or beside(checkpoint, f"{task}.pt")), checkpoint)
    if path.suffix != ".pt":
        raise UsageError(f"--output {output}: it is for the model, and must end in .pt; what lies beside it "
                         "ends in .jsonl and .png")
    if path.exists() and not (resume or overwrite):
        raise UsageError(f"--output {path}: it holds a result: --resume goes on from it, --overwrite starts "
                         "anew")
    for suffix in (".jsonl", ".png"):
        check_output(path.with_suffix(suffix), checkpoint)
    return path


# ---------------------------------------------------------------------------------------------------------
# Command line

TASKS = dict(knn=knn, linear=linear, attentive=attentive, finetune=finetune, semseg=semseg, detect=detect,
             reconstruct=reconstruct, attention=attention, segment=segment)


def functions_of(task):
    """The functions whose flags a task has."""
    takes = inspect.signature(TASKS[task]).parameters
    functions = [TASKS[task], load_data, open_device]
    functions += [open_encoder] if "encoder" in takes else [open_method, load_tokenizer]
    functions += [open_pair, recipe] if "train" in takes else [open_regions]
    if takes.keys() & {"images", "dataset"}:
        functions += [open_images, open_picture]
    if "output" in takes:
        functions += [open_result, predict_images, FINISHED[task][1]]
    return functions


def parse(argv):
    """Command line -> dict of what the user gave. It opens no file."""
    first = Parser(add_help=False)  # other flags depend on the task
    first.add_argument("--task", choices=TASKS)
    known = vars(first.parse_known_args(argv)[0])
    more = ("With --task, --help lists its flags. The defaults are the papers'; images of up to 96 pixels "
            "have others, which the last line shows.")
    parser = Parser(description=__doc__, epilog=more)
    parser.add_argument("checkpoint", type=not_empty, help="a file, or `random`")
    parser.add_argument("--task", choices=TASKS, required=True)
    if "task" in known:
        parser.add(functions_of(known["task"]))
    return parser.parse(argv, {f"--task {task}": functions_of(task) for task in TASKS})


def kept_settings(method, args, given):
    """The settings `args` of a method's run that its evaluation shares, where the user gives no others.
    UsageError if the user gives regions or a tokenizer, and the method takes none."""
    accepted = inspect.signature(method.forward).parameters
    if "hide" in given:  # objects, for methods that are trained without, too
        args = dict(regions=default_regions("objmae", given.get("data", "shapes"))) | args
    elif "regions" in given and "regions" not in accepted:
        raise UsageError(f"--regions: the method of {given['checkpoint']} takes none")
    if given.get("regions") == "cam" and not isinstance(method, mim.ObjMAE) and "hide" not in given:
        raise UsageError("--regions cam is for objmae; rae, rmae take fh, panoptic, instances, folders")
    if "tokenizer" in given and getattr(method, "vocab_size", None) is None:
        raise UsageError(f"--tokenizer: the method of {given['checkpoint']} takes none")
    regions = given.get("regions", "fh" if "images" in given else args.get("regions"))
    if regions != args.get("regions", regions):  # the run's other settings are of its own kind of regions
        args = args | dict(regions=regions, fh_scales=None, cam_weights=None, cam_labels=False)
    kept = ("method", "epoch", "tokenizer", "tokenizer_digest", *flags_of([open_regions]))
    return {name: args[name] for name in kept if name in args}


def main(argv):
    """One evaluation, from the command line to its line of JSON."""
    began = time.perf_counter()
    given = parse(argv)
    task, checkpoint = given["task"], given["checkpoint"]
    run, functions = TASKS[task], functions_of(task)
    if {"data", "images"} <= given.keys() and task != "attentive":
        raise UsageError("--images are drawn instead of --data: leave one out")
    device, precision, workers = call(open_device, given)
    join_processes(device)
    finished = task in FINISHED and task_of(checkpoint) == task
    if finished:
        model, settings = load_finished(checkpoint).to(device), {}
        training = {"limit", "overwrite", *flags_of([run, open_encoder, recipe])}
        for name in [name for name in given if name in training]:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is for training, and {checkpoint} is trained")
        run, functions = FINISHED[task][1], [open_pair, open_picture]
        settings["output"] = beside(checkpoint, f"{Path(checkpoint).stem}.png")
        if "images" in given:
            for flag in {"val_limit", "per_class"} & given.keys():
                flag = flag.replace("_", "-")
                raise UsageError(f"--{flag} is for figures, and --images are only predicted")
            settings["output"] = beside(checkpoint, f"{Path(checkpoint).stem}-predictions.png")
            run, functions = predict_images, [open_picture]
    elif "images" in given and task in FINISHED:
        raise UsageError(f"--images: {checkpoint} is no model that --task {task} has trained")
    elif open_encoder in functions:
        model, method = call(open_encoder, given)
        method = given.get("method", method)
        small = max(model.image_size) <= SMALL
        settings = recipe(task, model, method) | dict(recipe=method + ", small images" * small)
    else:
        model, args = call(open_method, given)
        settings = kept_settings(model, args, given)
    if world_size() > 1 and open_result not in functions:
        raise UsageError(f"--task {task} runs in one process: start it with python, not with torchrun")
    # What the user gave, else what the model asks for; else the default of the function that takes it
    settings = dict(data="shapes", seed=0) | settings | given
    settings |= dict(device=device, precision=precision, workers=workers)
    for open_output in (open_picture, open_result):
        if open_output in functions:
            settings["output"] = call(open_output, settings)
    size = sized(model).image_size
    objects = dict(encoder=model, method=model, model=model, tokenizer=call(load_tokenizer, settings))
    known = settings | dict(settings=settings, size=size, finished=finished and model)
    for open_data in (open_pair, open_images):
        if open_data in functions:
            objects |= call(open_data, known)
    result = call(run, settings | objects)  # it takes one model, and of the data what it names
    if "picture" in result:
        path = settings["output"]
        if open_result in functions:  # it is the model's
            path = path.with_suffix(".png")
        names = ("checkpoint", *["method", "epoch"] * (open_method in functions), "task")
        words = [f"{name} {settings[name]}" for name in names if settings.get(name) is not None]
        words += given.get("images", [settings["data"]])
        save_picture(path, result["picture"], task, ", ".join(words))
        result["picture"] = path
    if rank() == 0:
        shown = {name: p.default for name, (p, _) in flags_of([run]).items()} | settings | result
        shown |= dict(image_size=list(size), seconds=round(time.perf_counter() - began, 1))
        for name in ["resume", "overwrite"] + ["data"] * ("images" in given and task != "attentive"):
            shown.pop(name, None)
        print(json.dumps(shown, default=str))


if __name__ == "__main__":
    sys.exit(exit_with_one_line("eval.py", lambda: main(sys.argv[1:])))
