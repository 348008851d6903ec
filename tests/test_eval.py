"""Evaluation: protocols and pictures against numbers by hand; what reaches a task; every flag; mistakes."""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.io import read_image, write_jpeg, write_png
from torchvision.transforms import v2

import datasets
import eval as evaluation
import mim
import train

NANO = mim.SIZES["nano"]
UNTRAINED = ["--image-size", 32, "--patch-size", 8, "--model", "nano"]


@pytest.fixture(scope="module", autouse=True)
def smaller_sizes():
    """Here the two smallest models have few blocks, which is enough to see what reaches them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mim.SIZES, "nano", dict(embed_dim=32, depth=2, num_heads=2))
        patch.setitem(mim.SIZES, "tiny", dict(embed_dim=48, depth=5, num_heads=3))
        yield


@pytest.fixture
def call(cli):
    """call(checkpoint, task, *flags) -> (exit code, the last line's JSON or None, stderr)."""

    def run(checkpoint, task, *flags):
        code, out, err = cli(evaluation, checkpoint, "--task", task, *flags)
        return code, json.loads(out.splitlines()[-1]) if code == 0 else None, err

    return run


@pytest.fixture
def handed(call, monkeypatch):
    """handed(checkpoint, task, *flags) -> the arguments that the command line gives to the task."""

    def run(checkpoint, task, *flags):
        @functools.wraps(evaluation.TASKS[task])
        def function(**arguments):
            taken.update(arguments)
            return {}

        taken = {}
        with monkeypatch.context() as patch:
            patch.setitem(evaluation.TASKS, task, function)
            code, _, err = call(checkpoint, task, *flags)
        assert code == 0, err
        return taken

    return run


@pytest.fixture
def columns(monkeypatch):
    """The columns of each picture that eval.py draws from now on, a list of {title: tiles}."""
    drawn, draw = [], evaluation.picture

    def picture(columns, legend={}):
        drawn.append(columns)
        return draw(columns, legend)

    monkeypatch.setattr(evaluation, "picture", picture)
    return drawn


@pytest.fixture
def training(monkeypatch):
    """Stands in for `fit`: nothing is trained. The attributes are what it was given last."""

    class Training:
        def __call__(self, model, optimizer, train, compute_losses, **options):
            self.model, self.optimizer, self.train = model, optimizer, train
            self.compute_losses, self.options = compute_losses, options
            model.eval()
            return {}

    fit = Training()
    monkeypatch.setattr(evaluation, "fit", fit)
    return fit


DECODER = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2)
REGIONS = dict(regions="instances", region_dim=16, region_heads=2)
SETTINGS = {
    "mae": DECODER, "amt": DECODER, "simmim": {}, "lomar": dict(window_size=3), "objmae": DECODER | REGIONS,
    "rae": REGIONS, "rmae": DECODER | REGIONS, "cae": dict(regressor_depth=1, decoder_depth=1),
    "dvae": dict(hidden_dim=8, groups=2, vocab_size=16), "beit": dict(vocab_size=16, min_block=4),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The files that a run of each method leaves, with random weights: images of 32 pixels, 4 x 4 patches."""
    root = tmp_path_factory.mktemp("runs")
    for name, settings in SETTINGS.items():
        args = dict(method=name, image_size=[32, 32], patch_size=8, model="nano") | settings
        torch.manual_seed(0)
        method = train.build_method(**args)
        if name == "beit":
            args["tokenizer"] = str(root / "dvae" / "checkpoint.pt")
        (root / name).mkdir()
        train.write_checkpoint(root / name, method, dict(model=method.state_dict(), args=args, epoch=1))
    return root


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Label maps of two objects for the images 0 to 7 of `folder`."""
    root = tmp_path_factory.mktemp("masks")
    for i in range(8):
        label = torch.zeros(1, 32, 32, dtype=torch.uint8)
        label[0, 4:16, i:i + 14], label[0, 18:28, 12:28] = 1, 2
        write_png(label, str(root / f"{i}.png"))
    return root


# ---------------------------------------------------------------------------------------------------------
# Protocols by hand


def test_lars_by_hand():
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = evaluation.LARS([weight, bias], lr=0.5, momentum=0.9, trust=0.01)
    w, b, mw, mb = torch.tensor([[3.0, 4.0]]), 1.0, torch.zeros(1, 2), 0.0
    for gradient in (torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])):
        weight.grad, bias.grad = gradient.clone(), torch.tensor([0.2])
        optimizer.step()
        mw = 0.9 * mw + gradient * 0.01 * w.norm() / gradient.norm()
        mb = 0.9 * mb + 0.2
        w, b = w - 0.5 * mw, b - 0.5 * mb
        assert torch.allclose(weight, w) and bias.item() == pytest.approx(b)


def test_lars_does_not_scale_by_zero():
    weight = nn.Parameter(torch.zeros(1, 2))
    optimizer = evaluation.LARS([weight], lr=1.0)
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.trust == 0.001  # MAE's code
    weight.grad = torch.tensor([[1.0, 2.0]])
    optimizer.step()
    assert weight.tolist() == [[-1, -2]]


def test_knn_votes_by_hand():
    train_features = torch.tensor([[1.0, 0], [2, 2], [0, 3], [-1, 0]])
    labels = torch.tensor([0, 1, 1, 0])
    votes = evaluation.knn_logits(train_features, labels, torch.tensor([[5.0, 0]]), 2, k=3, temperature=0.5)
    # The three nearest by cosine: 1, 0.707, 0; over the nearest one's weight
    expected = [1.0, (math.exp(math.sqrt(0.5) / 0.5) + math.exp(0)) / math.exp(1 / 0.5)]
    assert votes[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_each_image_gets_its_own_votes():
    """More images than are compared at a time."""
    generator = torch.Generator().manual_seed(0)
    known, features = (torch.randn(n, 4, generator=generator) for n in (30, 2500))
    labels = torch.arange(30) % 3
    votes = evaluation.knn_logits(known, labels, features, 3, k=5)
    for i in (0, 1023, 1024, 2499):
        assert torch.allclose(votes[i], evaluation.knn_logits(known, labels, features[i:i + 1], 3, k=5)[0])


def test_accuracies_count_hits_among_the_first_and_the_first_five():
    logits = torch.eye(8)[[0, 1, 2, 3]] - torch.arange(8) * 1e-3
    result = evaluation.accuracies(logits, torch.tensor([0, 1, 0, 7]))
    assert result == dict(top1=50.0, top5=75.0)
    assert evaluation.accuracies(logits[:, :5], torch.tensor([0, 4, 0, 3])) == dict(top1=50.0, top5=100.0)
    assert evaluation.accuracies(logits[:, :4], torch.tensor([0, 1, 0, 3])) == dict(top1=75.0)
    logits = -torch.arange(7.0).expand(3, 7)  # the classes in order: 5 is the sixth
    assert evaluation.accuracies(logits, torch.tensor([1, 4, 5])) == dict(top1=0.0, top5=66.67)


def test_layer_wise_decay():
    model = evaluation.Classifier(mim.ViT(32, 8, 32, depth=3, num_heads=2), 5)
    model.encoder.pos_embed.requires_grad_(True)
    heads = [model.fc_norm, model.head]
    groups = evaluation.layer_wise_adamw(model.encoder, heads, 0.05, 0.5).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert scale["head.weight"] == (1.0, 0.05) and scale["fc_norm.weight"] == (1.0, 0.0)
    assert scale["encoder.blocks.2.attn.qkv.weight"] == (0.5, 0.05)
    assert scale["encoder.blocks.0.norm1.bias"] == (0.125, 0.0)
    assert scale["encoder.patch_embed.proj.weight"] == (0.0625, 0.05)
    assert scale["encoder.cls_token"] == scale["encoder.pos_embed"] == (0.0625, 0.0)
    assert len(scale) == len(names) == sum(len(g["params"]) for g in groups)
    assert all(g["betas"] == (0.9, 0.999) for g in groups)  # MAE, Table 9


def test_classifier_norms_after_the_mean():
    encoder = mim.ViT(32, 8, 32, depth=1, num_heads=2)
    x, blocks = torch.randn(2, 3, 32, 32), encoder.blocks
    model = evaluation.Classifier(encoder, 5, "mean")
    assert model.head.weight.std() < 1e-4 and not model.head.bias.any()
    nn.init.normal_(model.head.weight)
    tokens = blocks[0](encoder.sequence(encoder.embed(x)))[:, 1:].mean(1)
    assert torch.allclose(model(x), model.head(F.layer_norm(tokens, (32,), eps=1e-6)), atol=1e-5)


def test_classifier_takes_the_class_token_behind_the_encoders_norm():
    encoder = mim.ViT(32, 8, 32, depth=1, num_heads=2)
    x = torch.randn(2, 3, 32, 32)
    expected = encoder(x)[:, 0]
    model = evaluation.Classifier(encoder, 5, "cls")
    nn.init.normal_(model.head.weight)
    assert torch.allclose(model(x), model.head(expected), atol=1e-5)


def test_features_are_the_class_token_or_the_mean_of_the_patches():
    latents = torch.tensor([[[1.0, 2], [3, 5], [7, 9]]]).half()
    features = [evaluation.pooled(lambda images: latents, pool)(None) for pool in ("cls", "mean")]
    assert features[0].tolist() == [[1, 2]] and features[1].tolist() == [[5, 7]]
    assert features[0].dtype == features[1].dtype == torch.float32


def test_the_probes_classifier_norms_without_learning_to():
    torch.manual_seed(0)
    head = evaluation.classifier(3, 4)
    assert [name for name, _ in head.named_parameters()] == ["1.weight", "1.bias"]
    assert 0.003 < head[1].weight.std() < 0.03 and not head[1].bias.any()
    x = torch.randn(64, 3) * torch.tensor([1.0, 10, 0.1]) + 5
    normed = (x - x.mean(0)) / x.std(0, unbiased=False)
    assert torch.allclose(head(x), normed @ head[1].weight.T, atol=1e-4)


def test_each_operation_of_randaugment_is_applied_half_the_time():
    *twice, _ = evaluation.augmentation().transforms  # without random erasing
    for once in twice:
        operation, = once.transforms
        assert (operation.num_ops, operation.magnitude, operation.num_magnitude_bins) == (1, 9, 11)
        assert operation.fill == [round(255 * m) for m in datasets.MEAN]
    augment = v2.Compose(twice)
    torch.manual_seed(0)
    image = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    same = sum(torch.equal(augment(image), image) for _ in range(1000)) / 1000
    # RandAugment has 14 operations, of which Identity changes nothing: (1 - 13/14 / 2)^2, a little for chance
    assert abs(same - (1 - 13 / 28) ** 2) < 0.06


def test_a_quarter_of_the_images_has_a_part_erased():
    erase = evaluation.augmentation().transforms[-1]
    torch.manual_seed(0)
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    changed = [x for x in (erase(image) for _ in range(1000)) if not torch.equal(x, image)]
    assert abs(len(changed) / 1000 - 0.25) < 0.04
    mean = [round(255 * m) for m in datasets.MEAN]
    assert all(x.flatten(1).unique(dim=1).T.tolist() == [[0, 0, 0], mean] for x in changed)


def test_some_of_the_images_are_data_as_well():
    images = datasets.Images(datasets.load_data("shapes", "val", 16), 16, "center")
    item = evaluation.as_items(torch.utils.data.Subset(images, [5, 7]))[1]
    assert torch.equal(item["image"], images[7]["image"]) and item["label"] == images[7]["label"]


def recipe(task, method, size, image_size):
    """The settings of a task for such an encoder: the function's own, and what differs."""
    with torch.device("meta"):
        sizes = dict(mim.SIZES[size], depth=1)
        encoder = mim.ViT(image_size, 14 if size == "huge" else 16, **sizes)
    function = evaluation.TASKS[task]
    defaults = {name: p.default for name, (p, _) in train.flags_of([function]).items()}
    return defaults | evaluation.recipe(task, encoder, method)


# The papers' values, as they stand there: task, method, size of the encoder; the peak learning rate at a
# number of images a step
TUNED = dict(weight_decay=0.05, label_smoothing=0.1, min_lr=1e-6, lookahead=0, drop_path=0.1, pool="mean")
AT_WORK = {
    # MAE: Table 9, and its code for ViT-L and ViT-H
    ("finetune", "mae", "base"): TUNED | dict(
        epochs=100, batch_size=1024, warmup=5, layer_decay=0.65, peak=(5e-4, 256)),
    ("finetune", "mae", "large"): TUNED | dict(
        epochs=50, batch_size=1024, warmup=5, layer_decay=0.75, drop_path=0.2, peak=(1e-3, 256)),
    ("finetune", "mae", "huge"): TUNED | dict(
        epochs=50, batch_size=1024, warmup=5, layer_decay=0.75, drop_path=0.3, peak=(1e-3, 256)),
    # SimMIM: its released configuration
    ("finetune", "simmim", "base"): TUNED | dict(
        epochs=100, warmup=20, layer_decay=0.65, peak=(1.25e-3, 512)),
    # AMT: §4.1 and its released commands
    ("finetune", "amt", "base"): TUNED | dict(
        epochs=100, warmup=5, layer_decay=0.75, peak=(1e-3, 256), pool="cls"),
    ("finetune", "amt-simmim", "base"): TUNED | dict(
        epochs=100, warmup=20, layer_decay=0.65, peak=(1.25e-3, 512), pool="cls"),
    ("linear", "amt", "base"): dict(epochs=90, batch_size=16384, warmup=10, peak=(6.4, 16384), pool="cls"),
    ("linear", "amt-simmim", "base"): dict(pool="cls"), ("knn", "amt", "base"): dict(pool="cls"),
    ("detect", "amt", "base"): dict(batch_size=16, epochs=90_000 * 16 // 118_287),  # §4.3, on COCO's images
    # LoMaR: §6.1 and §6.2
    ("finetune", "lomar", "base"): TUNED | dict(
        epochs=100, batch_size=1024, warmup=5, layer_decay=0.75, peak=(1e-3, 256)),
    ("linear", "lomar", "base"): dict(pool="mean", peak=(6.4, 16384)),
    ("knn", "lomar", "base"): dict(pool="mean"),
    ("detect", "lomar", "base"): dict(batch_size=64, epochs=25),
    # ObjMAE: Tables 2 and 3
    ("finetune", "objmae", "small"): TUNED | dict(
        epochs=100, batch_size=256, warmup=5, layer_decay=0.65, peak=(1e-3, 256), min_lr=1e-5, lookahead=5),
    # R-MAE: MAE's, and §4.1
    ("finetune", "rmae", "base"): TUNED | dict(epochs=100, layer_decay=0.65, peak=(5e-4, 256)),
    ("semseg", "rmae", "base"): dict(epochs=100, batch_size=16),
    ("semseg", "rae", "base"): dict(epochs=100, batch_size=16),
    ("detect", "rmae", "base"): dict(
        epochs=100, batch_size=64, peak=(1e-4, 64), layer_decay=0.7, drop_path=0.1, weight_decay=0.1,
        width=256,
        window=14),
    ("detect", "rmae", "large"): dict(epochs=100, layer_decay=0.8, drop_path=0.4, peak=(1e-4, 64)),  # ViTDet
    # CAE: Appendix A
    ("finetune", "cae", "small"): TUNED | dict(
        epochs=200, batch_size=4096, warmup=5, layer_decay=0.75, peak=(1.6e-2, 4096)),
    ("finetune", "cae", "base"): TUNED | dict(
        epochs=100, batch_size=4096, warmup=5, layer_decay=0.65, peak=(8e-3, 4096)),
    ("finetune", "cae", "large"): dict(
        epochs=50, batch_size=4096, warmup=5, layer_decay=0.75, peak=(2e-3, 4096)),
    ("linear", "cae", "base"): dict(epochs=90, batch_size=16384, warmup=10, peak=(6.4, 16384)),
    ("attentive", "cae", "base"): dict(epochs=90, batch_size=8192, warmup=10, peak=(0.4, 8192)),
    ("semseg", "cae", "base"): dict(
        epochs=127, batch_size=16, layer_decay=0.65, drop_path=0.1, weight_decay=0.05, peak=(1e-4, 16),
        width=768),
    ("semseg", "cae", "large"): dict(
        epochs=127, batch_size=16, layer_decay=0.95, drop_path=0.15, peak=(4e-5, 16), width=1024),
}


@pytest.mark.parametrize("task, method, size", AT_WORK, ids="-".join)
def test_recipes_are_those_of_the_papers(task, method, size):
    settings, expected = recipe(task, method, size, 224), dict(AT_WORK[task, method, size])
    if "peak" in expected:
        rate, images = expected.pop("peak")
        lr_batch = settings.get("lr_batch", 16 if task in ("semseg", "detect") else 256)
        assert settings["base_lr"] * images / lr_batch == pytest.approx(rate)
    if "warmup" in expected:
        usual = settings.get("usual_warmup", dict(finetune=5).get(task, 10))
        assert expected.pop("warmup") == min(usual, settings["epochs"] * max(1 / 9, usual / 100))
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize("method", ["mae", "beit", "rmae", "colour"])
def test_methods_without_settings_of_their_own_have_maes(method):
    for task in ("knn", "linear", "attentive", "finetune", "detect"):
        assert recipe(task, method, "base", 224) == recipe(task, "mae", "base", 224)


@pytest.mark.parametrize("task, method, size, image_size, expected", [
    ("finetune", "mae", "base", 112, dict(epochs=100, batch_size=1024)),
    ("finetune", "mae", "nano", 112, dict(epochs=100)),
    ("finetune", "mae", "nano", (64, 112), dict(epochs=100)),  # the longer side tells
    ("finetune", "mae", "small", 96, dict(epochs=30, batch_size=128, base_lr=1e-3)),
    ("finetune", "mae", "nano", 64, dict(epochs=5, batch_size=128, base_lr=4e-3, layer_decay=0.75)),
    ("finetune", "mae", "large", 64, dict(epochs=30, drop_path=0.1)),
    ("finetune", "objmae", "small", 64,
     dict(epochs=30, batch_size=128, base_lr=1e-3, lr_batch=256, lookahead=0)),
    ("finetune", "cae", "nano", 112, dict(epochs=200, layer_decay=0.75)),  # as ViT-S
    # The mean of the patches is pooled for every method.
    ("finetune", "amt", "small", 64, dict(pool="mean", layer_decay=0.65, batch_size=128)),
    ("finetune", "amt-simmim", "nano", 64, dict(pool="mean")),
    ("finetune", "lomar", "nano", 64, dict(pool="mean")),
    ("linear", "mae", "base", 224, dict(cache_features=None)),
    ("linear", "lomar", "small", 64, dict(pool="mean", batch_size=256, base_lr=20.0, cache_features=True)),
    ("linear", "mae", "nano", 64, dict(pool="mean", epochs=90)),
    ("knn", "mae", "base", 224, dict(pool="cls", k=20, temperature=0.07)),
    ("knn", "amt", "nano", 64, dict(pool="mean", k=20)),
    ("attentive", "mae", "small", 64, dict(batch_size=256, base_lr=0.05, epochs=90, cache_features=True)),
    ("attentive", "mae", "nano", 64, dict(batch_size=256, epochs=30)),
    ("semseg", "rmae", "nano", 64, dict(epochs=3, batch_size=16, base_lr=1e-3, width=64)),
    ("detect", "lomar", "small", 64, dict(epochs=2, batch_size=8, base_lr=2e-3, width=32)),
])
def test_settings_shrink_for_small_images(task, method, size, image_size, expected, monkeypatch):
    monkeypatch.setitem(mim.SIZES, "nano", NANO)
    settings = recipe(task, method, size, image_size)
    assert {name: settings[name] for name in expected} == expected


# ---------------------------------------------------------------------------------------------------------
# The loop


def test_rates_of_every_step_and_group_by_hand(rates):
    """8 images in batches of 4, 5 epochs, one of them warm-up: 2 steps of warm-up, 8 of falling."""
    data = evaluation.Pairs((torch.randn(8, 3), torch.arange(8) % 2))
    model = nn.Linear(3, 2)

    def run(**options):
        groups = [dict(params=[model.weight]), dict(params=[model.bias], lr_scale=0.5)]
        optimizer = torch.optim.SGD(groups, lr=7.0)
        return evaluation.fit(model, optimizer, data, cross_entropy, epochs=5, batch_size=4, base_lr=0.8,
                              lr_batch=32, **options)

    steps, result = rates(lambda: run(warmup_epochs=1, min_lr=0.02))
    cosine = [0.02 + 0.08 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert [one for one, _ in steps] == pytest.approx([0, 0.05, *cosine])
    assert [two for _, two in steps] == pytest.approx([rate / 2 for rate, _ in steps])
    assert result == dict(batch_size=4, warmup_epochs=1)
    steps, _ = rates(lambda: run(warmup_epochs=1, min_lr=0.02, fall=lambda progress: 1 - progress))
    assert [one for one, _ in steps] == pytest.approx([0, 0.05] + [0.1 - 0.01 * i for i in range(8)])
    steps, result = rates(lambda: run())  # a ninth of the epochs: 10/9 steps; from then on to 0
    cosine = [0.05 * (1 + math.cos(math.pi * (step - 10 / 9) / (80 / 9))) for step in range(2, 10)]
    assert [one for one, _ in steps] == pytest.approx([0, 0.09, *cosine])
    assert result == dict(batch_size=4, warmup_epochs=0.556)
    # 5 epochs of 2 steps
    for usual, warmup in ((dict(usual_warmup=0.5), 0.5), (dict(usual_warmup=20), 1),
                          (dict(usual_warmup=10), 0.556), (dict(warmup_steps=1), 0.5),
                          (dict(warmup_steps=1500), 0.556),
                          (dict(warmup_steps=1500, warmup_epochs=2), 2)):
        assert rates(lambda: run(**usual))[1]["warmup_epochs"] == warmup


@pytest.mark.parametrize("options, words", [
    (dict(min_lr=0.11), "--min-lr 0.11 is above the peak learning rate, 0.1"),
    (dict(warmup_epochs=5.5), "--warmup-epochs 5.5 is more than --epochs 5")])
def test_a_schedule_that_cannot_be_is_refused_by_whatever_trains(options, words, tmp_path):
    data, model = evaluation.Pairs((torch.randn(8, 3), torch.arange(8) % 2)), nn.Linear(3, 2)
    with pytest.raises(datasets.UsageError, match=words):
        evaluation.fit(model, torch.optim.SGD(model.parameters()), data, cross_entropy, epochs=5, batch_size=4,
                       base_lr=0.8, lr_batch=32, output=tmp_path / "probe.pt", **options)
    assert not (tmp_path / "probe.pt").exists()


def cross_entropy(model, inputs, labels):
    return dict(loss=F.cross_entropy(model(inputs), labels))


class Read(evaluation.Pairs):
    """Pairs that note which keys are read."""

    def __init__(self, data):
        super().__init__(data)
        self.keys = []

    def __getitem__(self, key):
        self.keys.append(key)
        return super().__getitem__(key)


def test_every_epoch_has_its_own_order_and_keys():
    data = Read((torch.randn(8, 3), torch.arange(8) % 2))
    model = nn.Linear(3, 2)

    def keys(**options):
        data.keys.clear()
        evaluation.fit(model, torch.optim.SGD(model.parameters(), 1.0), data, cross_entropy, epochs=3,
                       batch_size=4, base_lr=0.1, **options)
        return list(data.keys)

    first = keys()
    assert [epoch for epoch, _ in first] == 8 * [0] + 8 * [1] + 8 * [2]
    orders = [[index for epoch, index in first if epoch == k] for k in range(3)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert keys() == first and keys(seed=1) != first


def test_fit_resumes_exactly_and_only_the_same_run(tmp_path):
    data = Read((torch.randn(8, 3), torch.arange(8) % 2))
    start = nn.Linear(3, 2).state_dict()

    def run(epochs, **options):
        model = nn.Linear(3, 2)
        model.load_state_dict(start)
        data.keys.clear()
        optimizer = torch.optim.AdamW(model.parameters())
        evaluation.fit(model, optimizer, data, cross_entropy, epochs=epochs, batch_size=4, base_lr=8.0,
                       warmup_epochs=1, fall=lambda progress: 1.0, **options)
        return model.weight.detach(), list(data.keys)

    settings = dict(task="finetune", pool="cls")
    whole, keys = run(3)
    part, _ = run(2, output=tmp_path / "part.pt", settings=settings)
    state = mim.load_file(tmp_path / "part.pt")
    assert state["epoch"] == 2 and torch.equal(state["model"]["weight"], part)
    assert not torch.equal(part, whole)
    resumed, rest = run(3, output=tmp_path / "part.pt", settings=settings, resume=True)
    assert torch.equal(resumed, whole) and rest == keys[16:]
    assert mim.load_file(tmp_path / "part.pt")["epoch"] == 3
    with pytest.raises(datasets.UsageError, match="was made with pool cls, not mean"):
        run(3, output=tmp_path / "part.pt", settings=settings | dict(pool="mean"), resume=True)


class Colours(nn.Module):
    """An encoder of images [b, 3, H, W] -> latents [b, 1 + 2, 4]: the patches' are the colours of the left
    and the right half, and red once more; the class token's are minus their mean."""

    calls = []  # for each: whether gradients were on, and whether it was training

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, images):
        self.calls.append((torch.is_grad_enabled(), self.training))
        images = torch.cat([images, images[:, :1]], dim=1)
        halves = F.adaptive_avg_pool2d(images, (1, 2)).flatten(2).transpose(1, 2)
        return torch.cat([-halves.mean(1, keepdim=True), halves], dim=1) * self.scale


def tones(labels):
    """Green images for the label 0, purple ones for 1: floats [n, 3, 8, 8]."""
    colour = torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1)
    return (2 * labels - 1).view(-1, 1, 1, 1) * colour + 0.2 * torch.randn(len(labels), 3, 8, 8)


probe = dict(epochs=20, batch_size=32)
PROTOCOLS = {
    "knn": functools.partial(evaluation.knn, k=3),
    "linear": functools.partial(evaluation.linear, **probe, base_lr=100.0),
    "linear, cached": functools.partial(evaluation.linear, **probe, base_lr=100.0, cache_features=True),
    "attentive": functools.partial(evaluation.attentive, **probe, base_lr=0.5),
    "attentive, cached": functools.partial(evaluation.attentive, **probe, base_lr=0.5, cache_features=True),
    "finetune": functools.partial(evaluation.finetune, epochs=6, batch_size=8, base_lr=0.2, layer_decay=1.0),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_accuracy_is_that_of_the_validation_images(name):
    """Right for every validation image; of inverted validation labels none."""
    torch.manual_seed(0)
    encoder = mim.ViT(8, 4, 16, 1, 2) if name == "finetune" else Colours()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    labels = torch.arange(32) % 2
    images, new, truth = tones(labels), tones(labels[:9]), labels[:9]
    Colours.calls.clear()
    assert PROTOCOLS[name](encoder, (images, labels), (new, truth))["top1"] == 100
    assert set(Colours.calls) <= {(False, False)}  # frozen: no graph, no dropout
    assert PROTOCOLS[name](encoder, (images, labels), (new, 1 - truth))["top1"] == 0
    assert encoder.training and all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("task", ["linear", "attentive"])
def test_cached_images_are_encoded_once_and_others_in_every_epoch(task):
    labels = torch.arange(8) % 2
    data, val = Read((tones(labels), labels)), (tones(labels), labels)
    data.source.classes = ["green", "purple"]
    options = dict(epochs=3, batch_size=4)
    result = getattr(evaluation, task)(Colours(), data, val, cache_features=True, **options)
    assert sorted(data.keys) == [0, *range(8)] and result["features"] == "cached"  # the first tells the width
    data.keys.clear()
    result = getattr(evaluation, task)(Colours(), data, val, cache_features=False, **options)
    assert sorted(data.keys[1:]) == [(e, i) for e in range(3) for i in range(8)]
    assert result["features"] == "augmented"


def wave(peak, warmup, steps, low=0.0):
    """The rates of all steps: linear warm-up, then half a cosine."""
    falls = [(step - warmup) / (steps - warmup) for step in range(warmup, steps)]
    return [peak * step / warmup for step in range(warmup)] + [
        low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2 for progress in falls]


@pytest.mark.parametrize("name, epochs, warmup, low, scales", [
    ("linear, cached", 100, 10, 0, [1]), ("attentive, cached", 27, 3, 0, [1]),
    # Patches and tokens are under a block, and that is under the head. Each has two groups, with and without
    # weight decay; the tokens have one.
    ("finetune", 50, 5, 1e-6, [0.25, 0.25, 0.5, 0.5, 1, 1, 0.25]),
])
def test_rates_of_the_protocols_by_hand(name, epochs, warmup, low, scales, rates):
    """One step an epoch. The rate is that of 256 images; the batch is cut to the 4 images that there are."""
    labels = torch.arange(4) % 2
    encoder = mim.ViT(8, 4, 16, 1, 2) if name == "finetune" else Colours()
    options = dict(layer_decay=0.5) if name == "finetune" else {}
    data = (tones(labels), labels)
    run = functools.partial(PROTOCOLS[name].func, encoder, data, data, epochs=epochs, base_lr=0.64, **options)
    if "cached" in name:
        run = functools.partial(run, cache_features=True)
    steps, result = rates(run)
    expected = wave(0.01, warmup, epochs, low)
    expected = [rate * scale for rate in expected for scale in scales]
    assert [rate for step in steps for rate in step] == pytest.approx(expected)
    assert result["batch_size"] == 4 and result["warmup_epochs"] == warmup


def test_probes_have_their_optimizers(training):
    labels = torch.arange(8) % 2
    data = (tones(labels), labels)
    evaluation.linear(Colours(), data, data)
    assert type(training.optimizer) is evaluation.LARS
    assert training.optimizer.param_groups[0]["weight_decay"] == 0
    evaluation.attentive(Colours(), data, data)
    assert type(training.optimizer) is torch.optim.SGD
    group = training.optimizer.param_groups[0]
    assert group["momentum"] == 0.9 and group["weight_decay"] == 0 and not group["nesterov"]


def test_finetuning_mixes_images_and_labels_alike(training):
    """Images of one value each: their mean after mixing tells the shares, and so the labels and the loss."""
    labels = torch.arange(4)
    images = labels.float().view(4, 1, 1, 1).expand(4, 3, 16, 16)
    encoder = mim.ViT(16, 8, 16, 2, 2)
    evaluation.finetune(encoder, (images, labels), (images, labels), label_smoothing=0.2, drop_path=0.4)
    assert training.model.encoder.blocks[-1].drop_path.p == 0.4
    assert all(p.requires_grad for p in training.model.parameters())  # the position table too
    torch.manual_seed(0)
    logits, seen = torch.randn(4, 4), []

    def model(images):
        seen.append(images)
        return logits

    shares = dict(mixup=[], cutmix=[])
    for draw in range(1000):
        loss = training.compute_losses(model, images, labels)["loss"].item()
        mixed = seen.pop()
        kind = "mixup" if all(len(image.unique()) == 1 for image in mixed) else "cutmix"
        share = mixed[1].mean().item()  # of image 1; the rest is image 0's
        shares[kind].append(share)
        if draw < 20:
            targets = share * torch.eye(4) + (1 - share) * torch.eye(4).roll(1, 0)  # with the image before
            smooth = 0.8 * targets + 0.2 / 4
            assert loss == pytest.approx(-(smooth * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-4)
    assert abs(len(shares["mixup"]) / 1000 - 0.5) < 0.06
    # The variance of Beta(a, a) is 1 / (4 (2 a + 1)); a = 0.8. CutMix's boxes are cut off at the edges.
    assert torch.tensor(shares["mixup"]).var().item() == pytest.approx(1 / (4 * 2.6), abs=0.008)
    assert torch.tensor(shares["cutmix"]).var().item() == pytest.approx(0.03, abs=0.005)


def test_the_classes_are_those_that_the_data_name():
    """Five names, of which the images have but two: there is a top-5 accuracy."""
    labels = torch.arange(8) % 2
    data = TensorDataset(tones(labels), labels)
    assert "top5" not in evaluation.knn(Colours(), data, data, k=3)
    data.classes = list("abcde")
    assert evaluation.knn(Colours(), data, data, k=3)["top5"] == 100
    later = TensorDataset(tones(labels), labels + 4)  # without names: the largest label tells
    assert evaluation.knn(Colours(), later, later, k=3)["top5"] == 100
    one = TensorDataset(tones(labels[:1]), labels[:1])  # of two classes there is one to evaluate
    assert evaluation.knn(Colours(), TensorDataset(*data.tensors), one, k=8)["top1"] == 100


def test_outputs_keep_the_order_of_the_images(monkeypatch):
    monkeypatch.setattr(evaluation, "PIECE", 3)
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    data = evaluation.as_items((labels.float().view(8, 1, 1, 1).expand(8, 3, 2, 2), labels))
    outputs, found = evaluation.extract(lambda images: images[:, 0, 0, 0], data)
    assert outputs.tolist() == found.tolist() == labels.tolist()


def test_bytes_are_normalised_and_floats_are_not():
    encoder, labels = mim.ViT(16, 4, 32, 1, 2).eval(), torch.arange(8) % 2
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    features = evaluation.pooled(encoder, "mean")
    given = [evaluation.extract(features, evaluation.as_items(data)) for data in (
        (images, labels), TensorDataset(datasets.normalize(images), labels))]
    assert torch.equal(given[0][0], given[1][0]) and torch.equal(given[0][1], labels)
    raw = evaluation.extract(features, evaluation.as_items((images / 255, labels)))[0]
    assert not torch.allclose(given[0][0], raw)


class OwnData(torch.utils.data.Dataset):
    """A user's own dataset: (image, label) pairs of floats, green and purple."""

    def __init__(self, count):
        self.labels = torch.arange(count) % 2
        self.images = tones(self.labels)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


class OwnViT(nn.Module):
    """A user's own encoder: images [B, 3, 8, 8] -> latents [B, 1 + 4, 32], the class token's first."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.5, batch_first=True)

    def forward(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return self.block(torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1))


@pytest.mark.parametrize("name", ["knn", "linear", "linear, cached", "attentive"])
def test_a_notebook_evaluates_its_own_encoder_on_its_own_data(name):
    torch.manual_seed(0)
    encoder = OwnViT()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    assert PROTOCOLS[name](encoder, OwnData(32), OwnData(16))["top1"] == 100
    assert encoder.training and all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    assert all(p.requires_grad for p in encoder.parameters())
    # A list of pairs will do, too, and labels of any type.
    listed = [(image, torch.tensor(label).byte()) for image, label in map(OwnData(32).__getitem__, range(32))]
    assert PROTOCOLS[name](encoder, listed, OwnData(16))["top1"] == 100


# ---------------------------------------------------------------------------------------------------------
# What the command line hands to a task


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Images of 24 x 48 pixels in two folders per split, 8 to train on and 4 to evaluate."""
    root = tmp_path_factory.mktemp("wide")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 4)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(torch.randint(256, (3, 24, 48), dtype=torch.uint8, generator=generator), str(path))
    return root


@pytest.mark.parametrize("task, flags, view", [
    ("knn", [], "centre"),
    ("linear", [], "centre"), ("linear", ["--cache-features"], "centre"),
    ("linear", ["--no-cache-features"], "crop"),
    ("attentive", ["--cache-features"], "centre"), ("attentive", ["--no-cache-features"], "crop"),
    ("finetune", [], "augmented"),
])
def test_every_task_has_its_views_of_its_splits(handed, wide, task, flags, view):
    size = ["--image-size", 16, 24, "--patch-size", 8]
    taken = handed("random", task, "--data", wide, *size, "--limit", 6, "--seed", 3, *flags)
    data, val = taken["train"], taken["val"]
    assert [Path(val.source.name(i)).parts[-3:] for i in range(len(val))] == [
        ("val", "ab"[label], f"{i}.png") for label, i in ((0, 0), (0, 2), (1, 1), (1, 3))]
    assert len(data) == 6 and all(Path(data.source.name(i)).parts[-3] == "train" for i in range(6))
    centre = pytest.approx([1 / 8, 0, 7 / 8, 1])  # 24 x 36 pixels of 24 x 48
    for some in (data, val):
        for i in range(len(some)):
            item = some[1, i]
            assert item["label"] == "ab".index(Path(some.source.name(i)).parts[-2])
            assert item["image"].shape == (3, 16, 24)
            if some is val or view == "centre":
                assert item["box"].tolist() == centre and not item["flip"]
                plain = datasets.Images(some.source, (16, 24), "center")
                assert torch.equal(item["image"], plain[i]["image"])
    if view == "centre":
        return
    items = [data[epoch, i] for epoch in range(20) for i in range(6)]
    x0, y0, x1, y1 = torch.stack([item["box"] for item in items]).T
    area = (x1 - x0) * (y1 - y0)
    assert 0.07 < area.min() < 0.15 and area.max() > 0.55  # MAE's code: 0.08 to 1
    assert 0.3 < sum(item["flip"] for item in items) / len(items) < 0.7
    # They change with epoch and index, but for a few that are equal by chance.
    assert len({tuple(item["box"].tolist()) for item in items}) > 110
    plain = datasets.Images(data.source, (16, 24), "crop", (0.08, 1.0), seed=3)
    same = sum(torch.equal(plain[e, i]["image"], data[e, i]["image"]) for e in range(20) for i in range(6))
    assert same == 120 if view == "crop" else 10 < same < 60  # 1/4 or so is not augmented


def test_an_untrained_encoder_is_the_one_that_is_asked_for(handed, wide, monkeypatch):
    monkeypatch.setitem(mim.SIZES, "base", dict(embed_dim=64, depth=1, num_heads=1))

    def encoder(*flags):
        return handed("random", "knn", "--data", *flags)["encoder"]

    one = encoder(wide, "--image-size", 32, 48, "--patch-size", 8, "--model", "nano")
    assert one.image_size == (32, 48) and one.patch_size == 8 and one.embed_dim == 32 and len(one.blocks) == 2
    assert not one.relative_position
    for data, size, dim, patch in (("shapes", 64, 32, 8), ("shapes", 32, 32, 4), (wide, 48, 48, 6),
                                   (wide, 112, 64, 16)):
        some = encoder(data, "--image-size", size)
        assert (some.image_size, some.embed_dim, some.patch_size) == ((size, size), dim, patch)
    assert encoder(wide).image_size == (48, 48) and encoder("shapes").image_size == (64, 64)
    assert encoder(wide, "--relative-position").relative_position
    weights = [encoder(wide, *flags).patch_embed.proj.weight for flags in ([], ["--seed", 0], ["--seed", 1])]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_checkpoint_keeps_its_sizes_or_is_resized(handed, runs, folder):
    state = mim.load_file(runs / "mae" / "encoder.pt")
    for file in ("encoder.pt", "checkpoint.pt"):
        encoder = handed(runs / "mae" / file, "knn", "--data", folder)["encoder"]
        assert encoder.image_size == (32, 32) and encoder.num_heads == 2
        assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())
    wide = handed(runs / "mae" / "encoder.pt", "knn", "--data", folder, "--image-size", 16, 64)["encoder"]
    assert wide.image_size == (16, 64) and wide.grid == (2, 8)
    assert torch.equal(wide.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


def test_what_is_not_given_is_the_recipes_and_then_the_functions(handed, runs, folder):
    path = runs / "mae" / "encoder.pt"
    taken = handed(path, "linear", "--data", folder, "--epochs", 7)
    assert (taken["base_lr"], taken["batch_size"], taken["epochs"]) == (20.0, 256, 7)
    assert taken["cache_features"] is True
    taken = handed(path, "linear", "--data", folder, "--base-lr", 3, "--no-cache-features", "--seed", 5)
    assert taken["base_lr"] == 3 and taken["cache_features"] is False and taken["seed"] == 5
    assert "k" not in handed(path, "knn", "--data", folder)
    assert (taken["device"], taken["precision"]) == (torch.device("cpu"), "fp32")
    for task in ("knn", "linear"):
        assert handed(path, task, "--data", folder)["pool"] == "mean"
        assert handed(path, task, "--data", folder, "--pool", "cls")["pool"] == "cls"


def test_a_file_says_which_method_made_its_encoder(call, runs, folder, tmp_path):
    """A run's two files, a file of others and an untrained encoder."""
    def said(checkpoint, *flags):
        code, result, err = call(checkpoint, "knn", "--data", folder, *flags)
        assert code == 0 and result["pool"] == "mean", err
        return result["recipe"]

    small = ", small images"
    for name in ("amt", "cae", "objmae", "rae"):
        for file in ("encoder.pt", "checkpoint.pt"):
            assert said(runs / name / file) == name + small
    assert said(runs / "lomar" / "encoder.pt") == "lomar" + small
    assert said(runs / "lomar" / "encoder.pt", "--method", "mae") == "mae" + small
    assert said(runs / "beit" / "encoder.pt") == "beit" + small
    state = mim.load_file(runs / "amt" / "encoder.pt")
    assert state._metadata[""]["method"] == "amt"
    torch.save(dict(state), tmp_path / "foreign.pt")
    assert said(tmp_path / "foreign.pt") == "mae" + small
    assert said(tmp_path / "foreign.pt", "--method", "amt-simmim") == "amt-simmim" + small
    state._metadata[""]["method"] = "colour"  # a method of the user's own
    torch.save(state, tmp_path / "colour.pt")
    assert said(tmp_path / "colour.pt") == "mae" + small
    state._metadata[""] |= dict(method="amt", base="simmim")
    torch.save(state, tmp_path / "simmim.pt")
    assert said(tmp_path / "simmim.pt") == "amt-simmim" + small
    assert said("random", *UNTRAINED) == "mae" + small
    assert said("random", *UNTRAINED, "--relative-position") == "lomar" + small


def test_large_images_get_the_papers_settings(handed, runs, folder, monkeypatch):
    monkeypatch.setattr(evaluation, "SMALL", 16)
    taken = handed(runs / "objmae" / "encoder.pt", "finetune", "--data", folder)
    assert (taken["lookahead"], taken["min_lr"], taken["batch_size"]) == (5, 1e-5, 256)
    flags = ["--data", folder, "--method", "simmim", "--epochs", 7]
    taken = handed(runs / "objmae" / "encoder.pt", "finetune", *flags)
    assert "lookahead" not in taken and taken["usual_warmup"] == 20 and taken["epochs"] == 7


def test_an_encoder_says_its_image_size_where_its_tensors_do_not(handed, call, runs, folder, tmp_path):
    """With relative positions; the built-in scenes have 64 pixels."""
    for file in ("encoder.pt", "checkpoint.pt"):
        encoder = handed(runs / "lomar" / file, "knn")["encoder"]
        assert encoder.image_size == (32, 32) and encoder.relative_position
        assert handed(runs / "lomar" / file, "knn", "--image-size", 48)["encoder"].grid == (6, 6)
    torch.save(dict(mim.load_file(runs / "lomar" / "encoder.pt")), tmp_path / "foreign.pt")
    code, _, err = call(tmp_path / "foreign.pt", "knn", "--data", folder)
    assert code == 2 and "--image-size is needed: " in err and "does not tell it" in err
    strict = mim.ViT(32, 8, **mim.SIZES["nano"], relative_position=True)
    assert not any(strict.load_state_dict(mim.load_file(runs / "lomar" / "encoder.pt"), strict=True))


def test_finetuning_with_lookahead_resumes_exactly(tmp_path):
    labels = torch.arange(8) % 2
    data, encoder = (tones(labels), labels), mim.ViT(8, 4, 16, 1, 2)
    run = functools.partial(evaluation.finetune, encoder, data, data, batch_size=4, warmup_epochs=1,
                            base_lr=1.0)
    for name, options in (("plain", {}), ("whole", dict(lookahead=3)), ("parts", dict(lookahead=3))):
        if name == "parts":  # interrupted in the second epoch: after the third of six steps
            with pytest.MonkeyPatch.context() as patch:
                train_all = evaluation.train_epochs
                first_two = functools.wraps(train_all)(lambda *a, **k: itertools.islice(train_all(*a, **k), 2))
                patch.setattr(evaluation, "train_epochs", first_two)
                run(epochs=3, output=tmp_path / name, **options)
            assert mim.load_file(tmp_path / name)["epoch"] == 1
        run(epochs=3, output=tmp_path / name, resume=name == "parts", **options)
    plain, whole, parts = (mim.load_file(tmp_path / n)["model"] for n in ("plain", "whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert not torch.equal(plain["head.weight"], whole["head.weight"])


def test_what_is_drawn_is_cut_from_the_centre(handed, runs, wide):
    images = handed(runs / "mae" / "encoder.pt", "attention", "--data", wide, "--count", 1)["images"]
    first = read_image(str(wide / "val" / "a" / "0.png"))
    expected = v2.functional.resize(first[:, :, 12:36], [32, 32], v2.InterpolationMode.BICUBIC)
    assert (datasets.denormalize(images)[0] - expected / 255).abs().max() < 0.02


def test_the_line_names_the_data_that_a_probe_learns_from(call, runs, folder, monkeypatch):
    path, image = runs / "mae" / "checkpoint.pt", folder / "val" / "a" / "0.png"
    for task in ("attention", "attentive"):
        monkeypatch.setitem(evaluation.TASKS, task, functools.wraps(evaluation.TASKS[task])(lambda **_: {}))
        code, line, err = call(path, task, "--images", image, *["--data", folder] * (task == "attentive"))
        assert code == 0 and line.get("data") == (str(folder) if task == "attentive" else None), err


def test_an_untrained_encoders_data_are_downloaded_by_one_process(call, folder, monkeypatch):
    inside, load = [], evaluation.load_unlabelled

    @contextlib.contextmanager
    def first():
        inside.append(True)
        yield
        inside.pop()

    def checked(*args):
        assert inside
        return load(*args)

    monkeypatch.setattr(evaluation, "first_process_first", first)
    monkeypatch.setattr(evaluation, "load_unlabelled", checked)
    code, _, err = call("random", "knn", "--data", folder, "--model", "nano", "--k", 1)
    assert code == 0, err


def test_what_is_drawn_is_spread_over_the_validation_images_or_given(handed, runs, folder):
    path = runs / "mae" / "checkpoint.pt"
    val = datasets.Images(datasets.load_data(str(folder), "val"), 32, "center")
    for task in ("reconstruct", "attention", "attentive"):
        images = handed(path, task, "--data", folder, "--count", 3)["images"]
        assert torch.equal(images, datasets.normalize(torch.stack([val[i]["image"] for i in (0, 3, 7)])))
        files = [folder / "train" / "ab"[i % 2] / f"{i}.png" for i in range(9, 0, -1)]  # 8 is for --data
        images = handed(path, task, "--images", *files, *["--data", folder] * (task == "attentive"))["images"]
        assert torch.equal(images, datasets.normalize(torch.stack([read_image(str(f)) for f in files])))
    assert len(handed(path, "reconstruct", "--data", folder)["images"]) == 8
    # Of all regions that are completed, `count` are drawn.
    images = handed(runs / "rmae" / "checkpoint.pt", "segment", "--count", 2)["dataset"]
    assert len(images) == 1024 and images.source.name(0) == datasets.load_data("shapes", "val", 32).name(0)


def test_regions_are_those_of_the_run_or_given(handed, runs, folder, masks):
    def regions(name, *flags):
        return handed(runs / name / "checkpoint.pt", "reconstruct", *flags)["regions"]

    scenes = datasets.load_data("shapes", "val", 32)
    whole = datasets.Images(scenes, 32, "center", regions=datasets.open_regions("instances"))
    assert torch.equal(regions("rmae", "--count", 2)[1], whole[1023]["regions"])
    given = regions("objmae", "--data", folder, "--regions", masks, "--count", 2)
    assert given.shape == (2, 1, 32, 32) and given[:, 0, 20, 20].tolist() == [2, 2]
    files = [folder / "val" / "a" / "0.png", folder / "val" / "b" / "1.png"]
    computed = regions("rmae", "--images", *files, "--fh-scales", 20)
    source = datasets.Files("", files, [], [], "")
    segments = datasets.open_regions("fh", source, fh_scales=[20])
    expected = datasets.Images(source, 32, "center", regions=segments)
    assert all(torch.equal(computed[i], expected[i]["regions"]) for i in range(2))


@pytest.mark.parametrize("own, given", [
    (dict(regions="fh", fh_scales=[30]), dict(regions="instances")),
    (dict(regions="cam", cam_weights="weights.pth", cam_labels=True), dict(images=["a.png"]))])
def test_settings_of_the_runs_regions_are_not_those_of_others(own, given):
    method = mim.ObjMAE(mim.ViT(32, 8, 32, 1, 2), decoder_dim=16, decoder_heads=2)
    args = dict(method="objmae", regions=None, fh_scales=None, cam_weights=None, cam_labels=False) | own
    kept = evaluation.kept_settings(method, args, given)
    assert kept["regions"] == given.get("regions", "fh")
    assert not kept["fh_scales"] and not kept["cam_weights"] and not kept["cam_labels"]
    assert evaluation.kept_settings(method, args, dict(regions=own["regions"])).items() >= own.items()


def test_regions_of_coco_are_those_of_the_validation_images(handed, runs, tmp_path):
    """An image of 32 x 32 pixels in each split, with one object."""
    (tmp_path / "annotations").mkdir()
    for split, left in (("train", 0), ("val", 16)):
        (tmp_path / f"{split}2017").mkdir()
        write_jpeg(torch.zeros(3, 32, 32, dtype=torch.uint8), str(tmp_path / f"{split}2017" / "1.jpg"))
        corners = [left, 8, left + 16, 8, left + 16, 24, left, 24]
        thing = dict(image_id=1, category_id=1, area=256, iscrowd=0, bbox=[left, 8, 16, 16],
                     segmentation=[corners])
        content = dict(images=[dict(id=1, file_name="1.jpg", width=32, height=32)], annotations=[thing],
                       categories=[dict(id=1, name="square")])
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    flags = ["--data", tmp_path, "--regions", "instances"]
    regions = handed(runs / "rmae" / "checkpoint.pt", "reconstruct", *flags)["regions"]
    assert torch.equal(regions[0, 0, 8:24].sum(0) > 0, torch.arange(32) >= 16)


def test_the_releases_files_say_whether_pixels_were_normalised(tmp_path):
    method = mim.MAE(mim.ViT(32, 8, 64, 1, 1), decoder_dim=32, decoder_depth=2, decoder_heads=16)
    plain, normed = (argparse.Namespace(norm_pix_loss=value) for value in (False, True))
    for args, flags, expected in ((plain, {}, False), (normed, {}, True), (None, {}, True),
                                  (dict(epochs=1), {}, True), (plain, dict(set=["norm_pix=true"]), True)):
        torch.save(dict(model=method.state_dict(), args=args), tmp_path / "full.pth")
        method, settings = evaluation.open_method(tmp_path / "full.pth", **flags)
        assert type(method) is mim.MAE and settings == {} and method.norm_pix is expected
        assert len(method.decoder_blocks) == 2


def test_a_foreign_checkpoint_is_used_and_what_is_left_over_is_said(call, runs, folder, tmp_path):
    state = torch.load(runs / "mae" / "encoder.pt", weights_only=True)
    torch.save({"model": state | {"head.weight": torch.zeros(3, 128)}}, tmp_path / "release.pth")
    code, foreign, err = call(tmp_path / "release.pth", "knn", "--data", folder)
    own = call(runs / "mae" / "encoder.pt", "knn", "--data", folder)[1]
    assert code == 0 and foreign["top1"] == own["top1"] and "1 left over: head.weight" in err


# ---------------------------------------------------------------------------------------------------------
# Pictures


ORANGE = torch.tensor([1.0, 0.4, 0.0]).view(3, 1, 1)


def test_heat_is_orange_where_attention_is_and_grey_where_it_is_least():
    attention = torch.full((1, 8, 8), 0.2)
    attention[0, 2, 5] = 0.3
    shown = evaluation.heat(torch.full((1, 3, 64, 64), 0.5), attention)[0]
    row, column = divmod((shown - 0.5).abs().sum(0).argmax().item(), 64)
    assert row // 8 == 2 and column // 8 == 5
    assert torch.allclose(shown[:, 60, 5], torch.full((3,), 0.5), atol=1e-5)
    assert torch.allclose(shown[:, row, column], 0.2 * 0.5 + 0.8 * ORANGE.flatten(), atol=0.05)
    even = evaluation.heat(torch.full((1, 3, 8, 8), 0.7), torch.ones(1, 2, 2))
    assert torch.allclose(even, torch.tensor(0.7))
    more = evaluation.heat(torch.full((1, 3, 1, 9), 0.5), torch.linspace(0, 1, 9).view(1, 1, 9))[0, :, 0]
    expected = torch.lerp(torch.full((3, 1), 0.5), ORANGE[..., 0], torch.linspace(0, 0.8, 9))
    assert torch.allclose(more, expected)


def test_each_image_is_under_its_own_map():
    images = torch.rand(2, 3, 8, 16)
    maps = torch.tensor([[[1.0, 0]], [[0, 100.0]]])  # the first looks left, the second right
    for tile, image, most, least in zip(evaluation.heat(images, maps), images.mean(1), (0, 15), (15, 0)):
        assert torch.allclose(tile[:, :, most], 0.2 * image[:, most] + 0.8 * ORANGE[..., 0], atol=1e-5)
        assert torch.allclose(tile[:, :, least], image[:, least].expand(3, -1), atol=1e-5)


class Known(mim.ViT):
    """A ViT of 2 x 3 patches whose attention is known: head h of query q gives 0.8 to patch (q + h) % 6, the
    rest to the class token. The rollout is a table of random numbers."""

    def __init__(self, **options):
        super().__init__((16, 24), 8, 32, 1, 4, **options)

    def last_attention(self, images, query=0):
        looks = (query + torch.arange(4)) % 6
        return 0.8 * F.one_hot(looks, 6).float().expand(len(images), 4, 6)

    def rollout(self, images):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(len(images), 7, 7, generator=generator).softmax(2)


@pytest.mark.parametrize("query", [None, 0, 4, 6])
@pytest.mark.parametrize("relative", [False, True])
def test_attention_is_that_of_the_query_head_by_head(columns, query, relative):
    images = torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8)
    result = evaluation.attention(Known(relative_position=relative), images, query=query)
    taken = query if query is not None else 5 if relative else 0  # LoMaR: the patch in the middle
    assert result["query"] == taken
    drawn, = columns
    assert list(drawn) == ["image", "attention", "head 1", "head 2", "head 3", "head 4"]
    shown = images / 255
    if taken:  # the patch is tinted red
        top, left = (taken - 1) // 3 * 8, (taken - 1) % 3 * 8
        red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
        shown[:, :, top:top + 8, left:left + 8] = (shown[:, :, top:top + 8, left:left + 8] + red) / 2
    assert torch.allclose(drawn["image"], shown, atol=1e-5)
    maps = torch.zeros(4, 6)
    for head in range(4):
        maps[head, (taken + head) % 6] = 0.8
    for title, map in zip(list(drawn)[1:], [maps.mean(0), *maps]):
        expected = evaluation.heat(images / 255, map.view(1, 2, 3).expand(2, 2, 3))  # without the mark
        assert torch.allclose(drawn[title], expected, atol=1e-5), title


@pytest.mark.parametrize("relative", [False, True])
def test_the_share_of_the_attention_that_falls_on_objects_by_hand(relative):
    """Head h of the class token looks at patch h alone; of LoMaR's patch in the middle, 5, at 5, 0, 1, 2."""
    regions = torch.zeros(3, 2, 16, 24, dtype=torch.uint8)
    regions[0, 0, :8, 8:16] = 7  # patch 1, the largest
    regions[0, 1, :8, 16:20] = 7  # half of patch 2
    regions[1, 1, 8:] = 3  # patches 3, 4, 5; the third image has no object
    items = [dict(image=torch.zeros(3, 16, 24, dtype=torch.uint8), regions=some) for some in regions]
    images = regions.new_zeros(1, 3, 16, 24)
    result = evaluation.attention(Known(relative_position=relative), images, regions, items)
    names = ("attention_main", "attention_objects", "area_main", "area_objects")
    shares = {name: result[name] for name in names}
    sums = (0.25 + 0.25, 0.375 + 0.25, 1 / 6 + 1 / 2, 1.5 / 6 + 1 / 2)  # of the two images with objects
    assert list(shares.values()) == [pytest.approx(50 * value, abs=0.006) for value in sums]
    with pytest.raises(datasets.UsageError, match="no image has an object"):
        evaluation.attention(Known(), regions.new_zeros(1, 3, 16, 24), regions, items[2:])
    responses = torch.rand(1, 1, 16, 24)  # of a class activation map
    assert "area_main" not in evaluation.attention(Known(), regions.new_zeros(1, 3, 16, 24), responses, items)


def test_rollout_shows_what_reaches_the_query(columns):
    """Its row of the table."""
    images = torch.randint(256, (1, 3, 16, 24), dtype=torch.uint8)
    encoder = Known()
    flow = encoder.rollout(images)
    evaluation.attention(encoder, images, query=3, rollout=True)
    row = flow[0, 3, 1:]
    expected = evaluation.heat(images / 255, row.view(1, 2, 3))
    assert list(columns[0]) == ["image", "attention"]
    assert torch.allclose(columns[0]["attention"], expected, atol=1e-5)


def test_rollout_of_an_object_is_the_mean_of_its_patches_rows(columns):
    images = torch.randint(256, (1, 3, 16, 24), dtype=torch.uint8)
    regions = torch.zeros(1, 1, 16, 24, dtype=torch.uint8)
    regions[..., :8, 8:] = 1  # patches 1 and 2
    encoder = Known()
    flow = encoder.rollout(images)
    evaluation.attention(encoder, images, regions, rollout=True)
    drawn, = columns
    assert list(drawn) == ["image", "attention", "object", "of the object"]
    row = (flow[0, 2, 1:] + flow[0, 3, 1:]) / 2
    expected = evaluation.heat(images / 255, row.view(1, 2, 3))
    assert torch.allclose(drawn["of the object"], expected, atol=1e-5)
    assert torch.allclose(drawn["object"], images / 255 * torch.where(regions > 0, 1.0, 0.3), atol=1e-5)


def test_an_activation_maps_object_is_where_it_responds():
    flow = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(0))
    responses = torch.full((2, 1, 16, 24), 0.2)
    responses[0, :, 8:, :8], responses[1, :, :8, 16:] = 0.4, 0.9
    mean, member = evaluation.object_flow(flow, responses, 8)
    assert member.nonzero().tolist() == [[0, 3], [1, 2]]
    for got, row in zip(mean, (flow[0, 4, 1:], flow[1, 3, 1:])):
        assert torch.allclose(got, row)
    responses = torch.zeros(2, 1, 16, 24)
    responses[0, :, :4, :4] = 1  # less than 5% of the image; of the second nothing
    mean, member = evaluation.object_flow(flow, responses, 8)
    assert not member.any() and not mean.any()


def test_the_query_is_marked_in_the_picture(columns):
    encoder, images = mim.ViT(32, 8, 16, 1, 2), torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    for query in (0, 7):
        evaluation.attention(encoder, images, query=query)
    first, marked = (drawn["image"][0] for drawn in columns)
    rows, places = ((first - marked).abs().sum(0) > 0.1).nonzero().T
    assert rows.unique().tolist() == list(range(8, 16))
    assert places.unique().tolist() == list(range(16, 24))  # query 7 is patch 6 = 1 * 4 + 2


def test_the_attentive_picture_is_the_probes_attention_to_these_images(columns, monkeypatch):
    """The probe looks at the brighter half of each image."""

    def attention(probe, patches):
        assert not torch.is_grad_enabled()
        return patches.float().mean(2).softmax(1)[:, None]

    monkeypatch.setattr(evaluation.AttentiveProbe, "attention", attention)
    encoder, labels = Colours(), torch.arange(8) % 2
    encoder.grid = (1, 2)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[0, :, :, :4], images[1, :, :, 4:] = 255, 255
    data = (tones(labels), labels)
    evaluation.attentive(encoder, data, data, images=images, epochs=1, batch_size=8)
    drawn, = columns
    assert list(drawn) == ["image", "attention"] and torch.allclose(drawn["image"], images / 255, atol=1e-5)
    halves = datasets.normalize(torch.tensor([255, 0], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    means = torch.cat([halves.flatten(1), halves[:, :1, 0, 0]], dim=1).mean(1)  # red counts twice
    one = means.softmax(0)
    maps = torch.stack([one, one.flip(0)])[:, None]
    assert torch.allclose(drawn["attention"], evaluation.heat(images / 255, maps), atol=1e-2)


@pytest.mark.parametrize("encoder, heads", [(mim.ViT(8, 4, 32, 1, 4), 4), (OwnViT(), 1)])
def test_the_probe_has_as_many_heads_as_the_encoder(columns, encoder, heads):
    """Or one for 64 channels, where the encoder does not say."""
    encoder.grid = (2, 2)
    labels = torch.arange(8) % 2
    data = (tones(labels), labels)
    evaluation.attentive(encoder, data, data, images=tones(labels[:2]), epochs=1, batch_size=8)
    titles = [f"head {i + 1}" for i in range(heads)] if heads > 1 else []
    assert list(columns[0]) == ["image", "attention", *titles]


@pytest.mark.parametrize("name", ["mae", "rmae", "cae"])
def test_losses_are_those_of_the_drawn_images(name, runs, monkeypatch):
    method, _ = evaluation.open_method(runs / name / "checkpoint.pt")
    source = datasets.load_data("shapes", "val", 32, limit=3)
    items = train.picture_items(datasets.Images(source, 32, "center", regions=datasets.SceneInstances()))
    items = items if name == "rmae" else dict(images=items["images"])
    result = evaluation.reconstruct(method, **items, seed=3)
    assert method.training
    method.eval()
    torch.manual_seed(3)
    with torch.no_grad():
        drawn, out = train.draw_reconstruction(method, **items)
    losses = {key: value for key, value in out.items() if key.startswith(("loss", "error"))}
    assert ("error_hint" in losses) == method.norm_pix and losses["error"] > 0
    assert ("loss_full" in losses) == (name == "cae") and ("loss_region" in losses) == (name == "rmae")
    assert {key: result[key] for key in losses} == {key: round(v.item(), 5) for key, v in losses.items()}
    assert torch.equal(result["picture"], drawn)


# ---------------------------------------------------------------------------------------------------------
# Completing regions


class Oracle(nn.Module):
    """Completes every region by a function of its map [n, 1, H, W]. Keeps the hints that it was given."""

    given = []

    def __init__(self, completed):
        super().__init__()
        self.encoder, self.completed = mim.ViT((16, 32), 2, 16, 1, 2), completed  # 8 x 16 patches

    def complete(self, images, hints, ids_visible, ids_image=None):
        self.given.append((images, hints, ids_visible, ids_image))
        return self.completed(hints.float())


def region_items(count):
    """Images with a region each that covers the rows 4 to 12 and half of the columns, which differ."""
    items = []
    for i in range(count):
        regions = torch.zeros(1, 16, 32, dtype=torch.uint8)
        regions[0, 4:12, i % 16:i % 16 + 16] = 1
        items.append(dict(image=torch.full((3, 16, 32), i, dtype=torch.uint8), regions=regions, label=0))
    return items


@pytest.mark.parametrize("completed, iou", [
    (lambda maps: maps, 1.0), (lambda maps: 1 - maps, 0.0), (lambda maps: 0.4 * maps, 0.0),
    (lambda maps: 0.6 + 0.0 * maps, None), (lambda maps: maps.roll(8, 3), None),
])
def test_completed_regions_are_scored_inside_what_was_hidden(completed, iou):
    Oracle.given.clear()
    items = region_items(66)  # more than a batch
    items[5]["regions"] *= 0  # without an object
    result = evaluation.segment(Oracle(completed), items, count=3, image_visible=0.5)
    assert result["objects"] == 65 and result["picture"].shape == (3, 34 + 4 + 3 * 132, 4 + 8 * 260)
    assert all(0 < result[f"nearest_hint_{ratio}"] < 100 for ratio in (80, 85, 90))
    for number, (ratio, count) in enumerate(((80, 26), (85, 19), (90, 13))):  # of 128 patches are shown
        scores = []
        for images, maps, ids, ids_image in Oracle.given[2 * number::6]:
            assert ids.shape == (len(maps), count) and ids_image.shape == (len(maps), 64)
            assert (ids_image[:, :, None] == ids[:, None]).any(1).all()  # the hints are among them
            hidden = torch.ones(len(maps), 128)
            hidden.scatter_(1, ids, 0.0)
            hidden = hidden.view(-1, 8, 16).repeat_interleave(2, 1).repeat_interleave(2, 2).bool()
            truth, guess = maps[:, 0].bool() & hidden, (completed(maps.float())[:, 0] > 0.5) & hidden
            scores += ((truth & guess).sum((1, 2)) / (truth | guess).sum((1, 2))).tolist()
        assert result[f"iou_{ratio}"] == pytest.approx(100 * sum(scores) / 65, abs=0.01)
        assert iou is None or result[f"iou_{ratio}"] == 100 * iou
        assert result[f"other_image_{ratio}"] == result[f"iou_{ratio}"]  # it does not look at the image


def test_the_nearest_hint_is_copied_where_most_of_it_is_region():
    patches = torch.zeros(1, 6, 16, dtype=torch.bool)  # 2 x 3 patches of 4 x 4 pixels
    patches[0, 0, :9], patches[0, 5, :8], patches[0, 3] = True, True, True
    copied = evaluation.nearest_hint(patches, torch.tensor([[5, 0]]), (2, 3))
    assert copied.shape == (1, 6, 1) and copied[0, :, 0].nonzero()[:, 0].tolist() == [0, 1, 3]


class Seer(Oracle):
    """Completes a region of `region_items` if it is given the region's own image, else nothing."""

    def complete(self, images, hints, ids_visible, ids_image=None):
        self.given.append((images, hints, ids_visible, ids_image))
        first = hints[:, 0].any(1).int().argmax(1)  # where the region begins: that is the image's number
        shown = (datasets.denormalize(images)[:, 0, 0, 0] * 255).round()
        return hints.float() * (shown == first)[:, None, None, None]


def test_the_control_has_the_same_hints_and_another_image():
    Oracle.given.clear()
    result = evaluation.segment(Seer(None), region_items(8))
    for ratio in (80, 85, 90):
        assert (result[f"iou_{ratio}"], result[f"other_image_{ratio}"]) == (100, 0)
    for own, other in zip(Oracle.given[::2], Oracle.given[1::2]):
        assert torch.equal(own[1], other[1]) and torch.equal(own[2], other[2])  # maps and hints
        assert own[3].shape[1] == 128  # by default the whole image is seen


def test_a_single_region_has_no_control():
    result = evaluation.segment(Seer(None), region_items(1))
    assert result["iou_80"] == 100 and not [name for name in result if name.startswith("other")]


def test_an_object_that_is_shown_whole_has_no_score(monkeypatch):
    """The first patches are shown. They hold all of the second object, so that the first alone counts."""
    def first_patches(patches, count):
        return torch.arange(count).expand(len(patches), count)

    monkeypatch.setattr(evaluation, "hint_patches", first_patches)
    items = region_items(2)
    items[1]["regions"] *= 0
    items[1]["regions"][0, :2, :20] = 1  # 10 of 128 patches
    result = evaluation.segment(Oracle(lambda maps: maps), items)
    assert [result[f"iou_{ratio}"] for ratio in (80, 85, 90)] == [100, 100, 100] and result["objects"] == 2
    result = evaluation.segment(Oracle(lambda maps: maps), items[1:])
    assert [result[f"iou_{ratio}"] for ratio in (80, 85, 90)] == [None] * 3  # JSON has no nan


def test_the_picture_shows_hints_and_what_was_completed(columns):
    Oracle.given.clear()
    items = region_items(4)
    evaluation.segment(Oracle(lambda maps: maps.roll(8, 3)), items, count=2, image_visible=0.25)
    drawn, = columns
    names = [f"{ratio}% {what}" for ratio in (80, 85, 90) for what in ("hidden", "completed")]
    assert list(drawn) == ["image", "region", *names]
    assert torch.allclose(drawn["image"], torch.stack([item["image"] for item in items[:2]]) / 255, atol=1e-5)
    region = torch.stack([item["regions"] for item in items[:2]]).float()
    assert torch.equal(drawn["region"], region.expand(2, 3, 16, 32))
    for ratio, (_, _, ids, ids_image) in zip((80, 85, 90), Oracle.given[::2]):
        assert torch.equal(drawn[f"{ratio}% completed"], drawn["region"].roll(8, 3))
        hidden = drawn[f"{ratio}% hidden"]
        patches = mim.patchify(hidden, 2)
        grey = (patches == 0.5).all(2)
        assert all(sorted((~grey[i]).nonzero()[:, 0].tolist()) == sorted(ids[i].tolist()) for i in range(2))
        assert torch.equal(hidden[hidden != 0.5], drawn["region"][hidden != 0.5])
        assert ids_image.shape == (4, 32)  # a quarter of the image, by default


def test_without_any_region_it_is_said():
    items = region_items(2)
    for item in items:
        item["regions"][:, :, 2:] = 0  # 8 x 2 or fewer pixels of 16 x 32: less than 5%
    with pytest.raises(datasets.UsageError, match="no image has a region of at least 5% of it"):
        evaluation.segment(Oracle(None), items)


def test_hidden_iou_by_hand():
    patches, guess = torch.zeros(1, 4, 2, dtype=torch.bool), torch.zeros(1, 4, 2, dtype=torch.bool)
    patches[0, 0], patches[0, 1], patches[0, 2, 0] = True, True, True
    guess[0, 1], guess[0, 3, 0] = True, True
    # patch 0 is shown; of the others 3 pixels are the region's, 3 the guess's, 2 of both
    assert evaluation.hidden_iou(guess, patches, torch.tensor([[0]])).item() == pytest.approx(2 / 4)
    assert evaluation.hidden_iou(guess & False, patches & False, torch.tensor([[0]])).isnan().all()


def test_hints_show_the_object_and_the_nearest_one_is_copied():
    torch.manual_seed(0)
    maps = torch.zeros(40, 16, 4, dtype=torch.bool)
    maps[:, [6, 9], 3] = True
    ids = evaluation.hint_patches(maps, 3)
    assert ids.shape == (40, 3) and all(len(set(i.tolist())) == 3 for i in ids)
    objects = [set(i.tolist()) & {6, 9} for i in ids]
    assert all(objects) and {6} in objects and {9} in objects
    assert {place for i in ids for place in i.tolist()} == set(range(16))
    patches = torch.zeros(1, 8, 4, dtype=torch.bool)  # 2 x 4; the first and the last are shown
    patches[:, 0, :3], patches[:, 7, :2] = True, True
    near = evaluation.nearest_hint(patches, torch.tensor([[0, 7]]), (2, 4))[0, :, 0]
    assert near.tolist() == [True, True, False, False, True, True, False, False]  # half is not most


# ---------------------------------------------------------------------------------------------------------
# Every flag of every task

DIFFERS, SAME, REFUSED = "differs", "same", "refused"


def differs(value, beside="", checkpoint=None):
    """A value that changes the result. beside: flags without which there is nothing to change."""
    return DIFFERS, value, beside, checkpoint


def same(value, beside=""):
    """A value that must not change the result."""
    return SAME, value, beside, None


def refused(value):
    """A value that is refused, because weights or data do not fit it."""
    return REFUSED, value, "", None


# Flags of all tasks, then the tasks' own. A word in place of a value says where else a flag is tested.
EVERYWHERE = {
    "--help": "test_help_shows_the_flags_of_the_task_alone", "--task": "every command has it",
    "--device": "there is none but the CPU", "--precision": differs("bf16"), "--workers": same("1"),
}
ENCODER = {
    "--image-size": differs("48"), "--model": differs("tiny", checkpoint="random"),
    "--patch-size": differs("16", checkpoint="random"),
    "--relative-position": differs("", checkpoint="random"),
}
TRAINED = {
    "--limit": differs("5"), "--val-limit": differs("2"), "--epochs": differs("3"),
    "--batch-size": differs("2"),
    "--base-lr": differs("5"), "--warmup-epochs": differs("1"), "--seed": differs("1"),
}
PROBE = ENCODER | TRAINED | {"--method": same("lomar"), "--data": differs("{folder}"),
                             "--cache-features": differs("--no-cache-features")}
TUNED = ENCODER | TRAINED | {
    "--weight-decay": differs("5"), "--layer-decay": differs("0.1"), "--drop-path": differs("0.9"),
    "--resume": "tests of resuming", "--overwrite": "test_safety.py", "--output": "every command has it",
    "--method": same("amt"), "--accumulate": differs("2", "--batch-size 4"), "--eval-every": same("1"),
    "--images": "test_dense.py and below, with a model that is trained",
}
DENSE = TUNED | {"--data": "test_dense.py", "--val-limit": differs("1"), "--batch-size": differs("4"),
                 "--freeze": differs(""), "--width": differs("4"), "--per-class": differs("")}
PICTURE = {
    "--data": differs("{folder}"), "--output": "every command has it", "--count": differs("2"),
    "--images": differs("{image}"), "--seed": differs("1"),
}


def region_flags(beside=""):
    return {
        "--regions": differs("fh", beside), "--fh-scales": differs("150", f"{beside} --regions fh"),
        "--region-cache": same("elsewhere", f"{beside} --regions fh"),
        "--cam-weights": "test_datasets.py: it needs a ResNet-50", "--cam-labels": "so does this",
    }


TASK_FLAGS = {
    "knn": ENCODER | {"--val-limit": differs("3"), "--k": differs("3"), "--temperature": differs("1"),
                      "--pool": differs("cls"),
                      "--limit": differs("22"), "--data": differs("{wide} --k 3"),
                      "--method": same("lomar"), "--seed": differs("1", checkpoint="random")},
    "linear": PROBE | {"--pool": differs("cls")},
    "attentive": PICTURE | PROBE | dict.fromkeys(ENCODER, "as for linear"),
    "finetune": TUNED | {"--data": differs("{folder}"), "--pool": differs("cls"),
                         "--eval-every": differs("1"),  # one score more
                         "--label-smoothing": differs("0.5"),
                         "--lr-batch": differs("16"), "--min-lr": differs("1e-5"),
                         "--lookahead": differs("1"),
                         "--method": same("amt")},
    "semseg": DENSE | {"--head": differs("linear")},
    "detect": DENSE | dict.fromkeys(ENCODER, "as for semseg") | {
        "--window": differs("2", "--model tiny --patch-size 4", "random")},
    "attention": ENCODER | PICTURE | region_flags("--rollout") | {
        "--limit": differs("1"),
        "--query": differs("5"), "--rollout": differs(""),
        "--seed": differs("1", "--rollout --regions instances")},
}
DECODER_FLAGS = {"decoder_dim": refused("32"), "decoder_depth": refused("2"),
                 "decoder_heads": differs("4"), "norm_pix": differs("false")}
BRANCH = {"mask_ratio": differs("0.5"), "region_mask_ratio": differs("0.5"), "num_regions": differs("2"),
          "variant": refused("batch"), "region_dim": refused("32"), "region_heads": differs("4"),
          "region_decoder_depth": refused("2"),
          **region_flags(), "--data": differs("{folder} --regions fh")}
# Arguments of a method, for --set, have no dashes.
METHOD_FLAGS = {
    "mae": DECODER_FLAGS | {"mask_ratio": differs("0.5")},
    "simmim": {"mask_ratio": differs("0.3"), "unit_size": differs("1")},
    "amt": DECODER_FLAGS | {"mask_ratio": differs("0.3"), "throw_ratio": differs("0.1"),
                            "throw": differs("low")},
    "lomar": {"mask_ratio": differs("0.5"), "window_size": differs("2"), "num_windows": differs("3"),
              "norm_pix": differs("false")},
    "objmae": DECODER_FLAGS | region_flags() | {
        "alpha": differs("0.1"), "alignment": differs("throwout"), "selection": differs("inter"),
        "object_floor": differs("0.3"), "patch_share": differs("0.9"),
        "norm_pix": differs("true"), "--data": differs("{folder} --regions fh")},
    "rae": BRANCH | dict.fromkeys(region_flags(), "as for rmae"),
    "rmae": BRANCH | DECODER_FLAGS | {"cross_feed": refused("both")},
    "cae": {"mask_ratio": differs("0.3"), "min_block": differs("2"), "regressor_depth": refused("2"),
            "decoder_depth": refused("2"), "alignment_weight": differs("1"),
            "norm_pix": differs("false")},
    "beit": {"mask_ratio": differs("0.2"), "min_block": differs("2"),
             "--tokenizer": refused("{dvae}")},
    "dvae": {"vocab_size": refused("8"), "hidden_dim": refused("16"), "groups": refused("3"),
             "blocks_per_group": refused("1"), "kl_weight": differs("1"), "--seed": same("1")},
}
BASE = {  # what every command of a task begins with
    "knn": "--data {folder}", "linear": "--data {wide} --epochs 2 --batch-size 4",
    "attentive": "--data {wide} --epochs 2 --batch-size 4",
    "finetune": "--data {wide} --epochs 2 --batch-size 4",
    "semseg": "--limit 4", "detect": "--limit 4", "attention": "", "reconstruct": "", "segment": "",
}


@pytest.fixture
def outcome(cli, monkeypatch, tmp_path):
    """outcome(checkpoint, task, *flags) -> a digest of all that a command computes, or its error: weights,
    logits, figures and picture."""

    def run(*arguments):
        def accuracies(logits, labels):
            found.update(logits.float().numpy().tobytes())
            return count(logits, labels)

        found, count = hashlib.sha256(), evaluation.accuracies
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "accuracies", accuracies)
            code, out, err = cli(evaluation, *arguments)
        if code:
            return err.splitlines()[-1]
        result = json.loads(out.splitlines()[-1])
        figures = (r"top|loss|error|attention_|area|accuracy|iou|nearest|objects|miou|pixel|box_|mask_ap|"
                   r"classes")
        found.update(repr([item for item in result.items() if re.match(figures, item[0])]).encode())
        if "picture" in result:
            found.update(Path(result["picture"]).read_bytes())
        if str(result.get("output", "")).endswith(".pt") and Path(result["output"]).exists():
            for value in mim.load_file(result["output"])["model"].values():
                found.update(value.numpy().tobytes())
            Path(result["output"]).unlink()
        return found.hexdigest()

    return run


# Flags of tasks that take a whole method, where the method has no use for them
METHOD_TASK = {"--set": "arguments of the method stand by their names", "--limit": differs("1"),
               "--tokenizer": refused("{dvae}"), **dict.fromkeys(region_flags(), refused("fh")),
               "--region-cache": same("elsewhere")}


def all_cases():
    """(task, the checkpoint's method, its table)."""
    for task, table in TASK_FLAGS.items():
        yield pytest.param(task, "mae", EVERYWHERE | table, id=task)
    for name, table in METHOD_FLAGS.items():
        common = EVERYWHERE | PICTURE | METHOD_TASK | {"--hide": differs("object")}
        if name in ("lomar", "dvae"):  # its masks are windows, or none
            common["--hide"] = refused("object")
        if name != "mae":
            common |= dict.fromkeys(PICTURE, "as for mae")
        yield pytest.param("reconstruct", name, common | table, id=f"reconstruct-{name}")
    table = EVERYWHERE | PICTURE | METHOD_TASK | region_flags() | {
        "--data": differs("{folder} --regions fh"), "--image-visible": differs("0.3"),
        **{name: "as for reconstruct" for name in METHOD_FLAGS["rmae"] if not name.startswith("--")}}
    yield pytest.param("segment", "rmae", table, id="segment")


class FewScenes(datasets.Shapes):
    """The first of the built-in scenes."""

    counts = dict(pretrain=6, train=6, val=3)

    def __init__(self, split="pretrain", image_size=64):
        super().__init__(split, image_size)
        self.order = self.order[:self.counts[split]]


@pytest.mark.parametrize("task, name, table", list(all_cases()))
def test_every_flag_reaches_what_it_sets(task, name, table, outcome, runs, folder, wide, capsys, monkeypatch):
    """Another value changes the result, or the table says why not. The help's flags are those of the table.
    """
    monkeypatch.setattr(datasets, "Shapes", FewScenes)
    if task in ("semseg", "detect"):
        monkeypatch.setitem(FewScenes.counts, "val", 2)
        short = dict(epochs=1, batch_size=2, base_lr=1e-3, width=8)
        monkeypatch.setitem(evaluation.SMALL_RECIPES, task, short)
    path = runs / name / "checkpoint.pt"
    with pytest.raises(SystemExit):
        evaluation.main([str(path), "--task", task, "--help"])
    shown = re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.M)
    assert sorted(set(shown)) == sorted(name for name in table if name.startswith("--"))
    if "--set" in table:
        message = outcome(path, "--task", task, "--set", "nothing=1")
        assert sorted(re.sub(".*names are ", "", message).split(", ")) == sorted(set(table) - set(shown))
    places = dict(folder=folder, wide=wide, image=folder / "train" / "a" / "4.png",
                  dvae=runs / "mae" / "checkpoint.pt")
    base, known = BASE[task].format(**places).split(), {}
    wrong = []
    for flag, row in table.items():
        if isinstance(row, str):
            continue
        effect, value, beside, checkpoint = row
        untrained = UNTRAINED if checkpoint else []
        begin = [checkpoint or path, "--task", task, *base, *untrained, *beside.split()]
        if str(begin) not in known:
            known[str(begin)] = outcome(*begin)
            assert len(known[str(begin)]) == 64, known[str(begin)]
        value = value.format(**places)
        words = value.split() if value.startswith("--no-") else [flag, *value.split()]
        if not flag.startswith("--"):
            words = ["--set", f"{flag}={value}"]
        got = outcome(*begin, *words)
        found = REFUSED if len(got) != 64 else SAME if got == known[str(begin)] else DIFFERS
        if found != effect:
            wrong.append(f"{words}: {found} instead of {effect}" + f" ({got})" * (found == REFUSED))
    assert not wrong


# ---------------------------------------------------------------------------------------------------------
# The command line


def tiles_in(picture):
    """(rows, columns) of a picture's tiles of 128 pixels; the words above are lower than a tile."""
    assert picture.shape[2] % 132 == 4
    return (picture.shape[1] - 4) // 132, picture.shape[2] // 132


def first_tiles(picture):
    """The first row of a picture of tiles of 128 pixels, [3, columns, 128, 128]."""
    rows, _ = tiles_in(picture)
    return picture[:, -132 * rows:][:, :128, 4:].unfold(2, 128, 132).transpose(1, 2)


def test_finetuning_resumes_exactly(call, runs, folder, tmp_path, monkeypatch):
    def finetune(out, *more):
        return call(runs / "mae" / "encoder.pt", "finetune", "--data", folder, "--epochs", 3,
                    "--batch-size", 8, "--output", tmp_path / out, *more)

    code, whole, _ = finetune("whole.pt")
    assert code == 0 and whole["output"] == str(tmp_path / "whole.pt")
    write, written = evaluation.write_atomically, []

    def write_then_interrupt(path, content):
        write(path, content)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_atomically", write_then_interrupt)
        code, *_ = finetune("part.pt")
    assert code == 130
    code, _, err = finetune("part.pt", "--resume", "--base-lr", 0.5)
    assert code == 2 and "was made with base_lr 0.004, not 0.5" in err
    code, part, _ = finetune("part.pt", "--resume")
    assert code == 0 and {k: v for k, v in part.items() if k not in ("seconds", "output")} == {
        k: v for k, v in whole.items() if k not in ("seconds", "output")}
    states = [mim.load_file(tmp_path / name) for name in ("whole.pt", "part.pt")]
    assert states[0]["epoch"] == states[1]["epoch"] == 3
    assert all(torch.equal(states[0]["model"][k], v) for k, v in states[1]["model"].items())
    assert call(tmp_path / "part.pt", "knn", "--data", folder)[0] == 0  # it holds an encoder


def test_what_would_spoil_the_result_is_tried_first(call, runs, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "extract", None)
    (tmp_path / "text").write_text("no image")
    for flags in (["--output", tmp_path / "text" / "a.png"], ["--images", tmp_path / "text"]):
        code, _, err = call(runs / "mae" / "encoder.pt", "attentive", "--data", folder, *flags)
        assert code == 2 and err.splitlines()[-1].startswith(f"eval.py: error: {flags[0]} {flags[1]}")


def test_features_beyond_the_memory(call, runs, folder, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(evaluation, "extract", refuse)
    code, _, err = call(runs / "mae" / "encoder.pt", "linear", "--cache-features", "--data", folder)
    assert code == 2 and "out of memory" in err.strip().splitlines()[-1] and "Traceback" not in err


def test_finetuning_in_two_processes_is_that_in_one(call, fork, runs, folder, tmp_path):
    path = runs / "mae" / "encoder.pt"
    flags = ["--data", folder, "--epochs", 2, "--batch-size", 8, "--accumulate", 2, "--output"]
    code, one, _ = call(path, "finetune", *flags, tmp_path / "one.pt")
    arguments = [path, "--task", "finetune", *flags, tmp_path / "two.pt"]
    codes, out, err = fork(evaluation, *arguments, processes=2)
    assert code == 0 and codes == [0, 0], err
    states = [mim.load_file(tmp_path / name)["model"] for name in ("one.pt", "two.pt")]
    assert all(torch.allclose(states[0][name], value, atol=1e-6) for name, value in states[1].items())
    line, = [line for line in out.splitlines() if line.startswith("{")]
    assert json.loads(line)["top1"] == one["top1"]


def test_a_mistake_of_two_processes_is_said_once(fork, runs, folder):
    arguments = [runs / "mae" / "encoder.pt", "--task", "knn", "--data", folder]
    codes, _, err = fork(evaluation, *arguments, processes=2)
    assert all(codes) and err.count("runs in one process") == 1


@pytest.mark.parametrize("name", ["mae", "lomar", "cae"])
def test_the_line_of_json_says_what_was_done(call, runs, folder, name):
    flags = ["--data", folder, "--epochs", 2, "--no-cache-features"]
    code, result, _ = call(runs / name / "checkpoint.pt", "linear", *flags)
    expected = dict(task="linear", epochs=2, batch_size=24, base_lr=20.0, features="augmented", seed=0,
                    pool="mean", image_size=[32, 32], device="cpu",
                    precision="fp32", workers=0, warmup_epochs=0.222, data=str(folder),
                    checkpoint=str(runs / name / "checkpoint.pt"), cache_features=False,
                    recipe=f"{name}, small images")
    assert code == 0 and {key: result[key] for key in expected} == expected
    assert set(result) - set(expected) == {"top1", "seconds"}  # two classes have no top-5


@pytest.mark.parametrize("name, regions", [
    ("mae", True), ("objmae", True), ("rmae", True), ("cae", True), ("mae", False)])
def test_an_object_is_hidden_and_all_the_rest_is_shown(name, regions, runs, monkeypatch):
    """ObjMAE's Figure 7, image by image: objects of 6 and of 1 patches, no object, an object without a rest.
    """
    seen, draw = [], evaluation.draw_reconstruction

    def note(method, images, regions, tokenizer, **mask):
        seen.append((images, regions, mask))
        return draw(method, images, regions, tokenizer, **mask)

    monkeypatch.setattr(evaluation, "draw_reconstruction", note)
    method = evaluation.open_method(runs / name / "checkpoint.pt")[0]
    maps = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    maps[0, 0, 8:24, 8:32], maps[1, 0, 24:, :8], maps[3] = 3, 9, 1
    if not regions:  # class activation maps
        maps = maps.float()
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    result = evaluation.reconstruct(method, images, maps, hide="object")
    hidden = [[5, 6, 7, 9, 10, 11], [12]]
    assert len(seen) == 2
    losses = []
    for i, (image, region, mask) in enumerate(seen):
        assert torch.equal(image[0], images[i]) and torch.equal(region[0], maps[i])
        assert sorted(mask["ids_masked"].tolist()[0]) == hidden[i]
        visible = mask["ids_visible"].tolist()[0]  # in random order, see below
        assert visible != sorted(visible) == [n for n in range(16) if n not in hidden[i]]
        torch.manual_seed(0)
        if name != "rmae":  # which draws regions
            losses.append(method.eval()(image, **mask)["loss"].item())
    if losses:
        assert result["loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
    one = draw(method, images[:1], maps[:1], None, **seen[0][2])[0]
    assert result["picture"].shape == (3, 2 * one.shape[1], one.shape[2])


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_region_maps_show_random_patches_beside_a_hidden_object(ratio):
    """With a mask of their own they show the first of the visible patches, and then of the hidden ones."""
    method = mim.RAE(mim.ViT(32, 4, 32, 1, 2), region_mask_ratio=ratio, region_dim=16, region_heads=2)
    maps = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    maps[..., :16, :] = 1
    encode, seen = method.region_branch.encode, []
    method.region_branch.encode = lambda maps, ids: seen.append(ids) or encode(maps, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "frozen", lambda model, device: model)
        evaluation.reconstruct(method, torch.randn(1, 3, 32, 32), maps, hide="object")
    shown = sorted(seen[0][0].tolist())
    assert len(shown) == 64 * (1 - ratio) and set(shown) - set(range(32, 64)) <= set(range(32))
    few = [n for n in shown if (n < 32) == (ratio < 0.5)]  # 16 of the 32 that are not all shown
    assert len(few) == 16 and few not in (list(range(16)), list(range(32, 48)))


def test_objects_are_hidden_on_the_command_line(handed, call, runs, folder, masks):
    """Of an MAE, which takes no regions."""
    path = runs / "mae" / "checkpoint.pt"
    taken = handed(path, "reconstruct", "--hide", "object", "--count", 2)
    assert taken["hide"] == "object" and taken["regions"].shape == (2, 1, 32, 32)
    taken = handed(path, "reconstruct", "--hide", "object", "--data", folder, "--regions", masks)
    assert taken["regions"][:, 0, 20, 20].tolist() == 8 * [2]
    image = folder / "val" / "a" / "0.png"
    taken = handed(path, "reconstruct", "--hide", "object", "--images", image, "--fh-scales", 20)
    assert taken["regions"].any()
    code, _, err = call(path, "reconstruct", "--data", folder, "--regions", masks)
    assert code == 2 and "--regions: the method of" in err
    code, _, err = call(runs / "lomar" / "checkpoint.pt", "reconstruct", "--hide", "object")
    assert code == 2 and "--hide object: lomar masks inside of windows" in err
    empty = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    with pytest.raises(datasets.UsageError, match="no image has an object of at least 5%"):
        method, _ = evaluation.open_method(path)
        evaluation.reconstruct(method, torch.randn(2, 3, 32, 32), empty, hide="object")


def test_reconstruct_draws_the_release_with_another_ratio(call, runs, folder, tmp_path):
    image = folder / "val" / "a" / "0.png"
    method = mim.MAE(mim.ViT(32, 4, 32, 1, 2), decoder_dim=32, decoder_depth=1, decoder_heads=16)
    flags = ["--images", image, "--output", tmp_path / "one.png", "--set", "mask_ratio=0.5"]
    state = {name.removeprefix("encoder."): value for name, value in method.state_dict().items()}
    torch.save(dict(model=state), tmp_path / "full.pth")
    code, result, _ = call(tmp_path / "full.pth", "reconstruct", *flags)
    assert code == 0 and result["picture"] == str(tmp_path / "one.png")
    picture = read_image(str(tmp_path / "one.png"))
    assert tiles_in(picture) == (1, 4)
    masked = first_tiles(picture)[:, 1].reshape(3, 8, 16, 8, 16).float()
    grey = (masked.std((0, 2, 4)) < 1) & ((masked.mean((0, 2, 4)) - 127.5).abs() < 1)
    assert grey.sum() == 32  # half of 64 patches


@pytest.mark.parametrize("name, tiles", [
    ("mae", 8), ("amt", 5), ("simmim", 6), ("lomar", 5), ("objmae", 8), ("rae", 5), ("rmae", 7), ("cae", 5),
    ("beit", 6),
])
def test_every_method_has_its_picture(call, runs, name, tiles):
    code, result, err = call(runs / name / "checkpoint.pt", "reconstruct", "--count", 2)
    assert code == 0, err
    assert tiles_in(read_image(result["picture"])) == (1 if tiles in (6, 8) else 2, tiles)  # two images
    assert result["picture"] == str(runs / name / "reconstruct.png")  # beside the checkpoint
    assert result["loss"] > 0 and ("loss_full" in result) == (name == "cae")


def test_the_tokenizer_of_a_run_is_its_own(handed, runs, tmp_path):
    taken = handed(runs / "beit" / "checkpoint.pt", "reconstruct", "--count", 2)
    state = mim.load_file(runs / "dvae" / "checkpoint.pt")["model"]
    assert all(torch.equal(state[name], value) for name, value in taken["tokenizer"].state_dict().items())
    assert handed(runs / "mae" / "checkpoint.pt", "reconstruct", "--count", 2)["tokenizer"] is None


def test_lomars_middle_is_the_query_at_any_size(call, runs, folder):
    flags = ["--data", folder, "--image-size", 32, 48, "--count", 1]
    code, result, _ = call(runs / "lomar" / "encoder.pt", "attention", *flags)
    assert code == 0 and result["query"] == 1 + 2 * 6 + 3
    image = folder / "val" / "a" / "0.png"
    code, result, _ = call(runs / "lomar" / "encoder.pt", "attention", "--images", image)
    assert code == 0 and result["query"] == 1 + 2 * 4 + 2


def test_attention_draws_the_mean_and_every_head(call, runs, folder):
    code, result, _ = call(runs / "amt" / "encoder.pt", "attention", "--data", folder, "--count", 3)
    assert code == 0 and tiles_in(read_image(result["picture"])) == (2, 8)  # image, mean, 2 heads


def test_help_shows_the_flags_of_the_task_alone(cli, runs, capsys):
    amt = runs / "amt" / "checkpoint.pt"
    for arguments, shown, absent in (
            (["--task", "knn"], ["--k INT", "number of neighbours", "(default: 20)"], ["--epochs", "(default: mae)"]),
            (["--task", "attention"], ["--rollout", "--query"], ["--k ", "--val-limit"]),
            ([amt, "--task", "reconstruct"], ["--set", "--count", "--images"], ["--k ", "--alpha"])):
        with pytest.raises(SystemExit):
            evaluation.main([str(a) for a in [*arguments, "--help"]])
        text = capsys.readouterr().out
        assert all(word in text for word in shown) and not any(word in text for word in absent), text


# ---------------------------------------------------------------------------------------------------------
# Mistakes

MISTAKES = [
    ("random", "the following arguments are required: --task"),
    ("random --task lineal", "--task invalid choice: 'lineal' (choose from"),
    ("nowhere.pt --task knn", "cannot read nowhere.pt: No such file"),
    ("text --task knn", "cannot read text: not a whole PyTorch checkpoint"),
    ("list.pt --task knn", "list.pt"),
    ("list.pt --task reconstruct", "list.pt"),
    ("nan.pt --task knn", "nan.pt: its weights are not all finite numbers"),
    ("random --task reconstruct", "random: this task needs a whole pre-trained model"),
    ("{mae}/encoder.pt --task reconstruct", "it has an encoder only; give the checkpoint.pt of a run"),
    ("{mae}/encoder.pt --task segment", "it has an encoder only; give the checkpoint.pt of a run"),
    ("{mae}/encoder.pt --task knn --model tiny", "--model is for an untrained encoder"),
    ("{mae}/encoder.pt --task knn --patch-size 4", "--patch-size is for an untrained encoder"),
    ("{mae}/encoder.pt --task knn --image-size 30", "multiple of patch_size=8, got 30x30"),
    ("{mae}/checkpoint.pt --task reconstruct --set throw_ratio=0.1",
     "--set throw_ratio=0.1: it takes NAME=VALUE; the names are mask_ratio, decoder_dim"),
    ("{mae}/checkpoint.pt --task reconstruct --set mask_ratio", "--set mask_ratio: it takes NAME=VALUE"),
    ("{mae}/checkpoint.pt --task reconstruct --set mask_ratio=1.5", "mask_ratio"),
    ("{mae}/encoder.pt --task knn --mask-ratio 0.5", "unknown argument --mask-ratio"),
    ("{mae}/encoder.pt --task knn --epochs 3", "--epochs belongs to --task linear or --task attentive"),
    ("{mae}/encoder.pt --task linear --batchsize 3", "did you mean --batch-size"),
    ("{mae}/encoder.pt --task knn --k 0", "--k must be a positive whole number, got '0'"),
    ("{mae}/encoder.pt --task knn --k 25 --data {data}", "--k 25 is more than the 24 training images"),
    ("{mae}/encoder.pt --task knn --pool max", "--pool"),
    ("{mae}/encoder.pt --task attention --query 17", "--query 17: it may be 0 (class token) to 16"),
    ("{mae}/encoder.pt --task attention --images nowhere.png", "--images nowhere.png: "),
    ("{mae}/encoder.pt --task attention --images text", "--images text: it cannot be used as an image"),
    ("{mae}/encoder.pt --task attention --output text/folder/a.png",
     "--output text/folder/a.png: it cannot be written (Not a directory"),
    ("{mae}/encoder.pt --task attention --output folder", "--output folder: it is a folder"),
    ("{mae}/encoder.pt --task attention --images low.png {image}",
     "--images low.png: it cannot be used as an image (a side has fewer than"),
    ("{mae}/encoder.pt --task knn --resume", "--resume belongs to --task finetune or --task semseg"),
    ("{mae}/encoder.pt --task finetune --resume --output {mae}/checkpoint.pt --data {data}",
     "checkpoint.pt: it is no result of eval.py"),
    ("{mae}/encoder.pt --task finetune --warmup-epochs 5 --epochs 3 --data {data} --output w.pt",
     "--warmup-epochs 5 is more than --epochs 3"),
    ("{mae}/encoder.pt --task finetune --min-lr 1 --data {data} --output w.pt",
     "--min-lr 1 is above the peak learning rate, 0.000375"),
    ("{mae}/encoder.pt --task knn --data {plain}", "needs labels"),
    ("{mae}/encoder.pt --task knn --cache-features", "--cache-features belongs to --task linear or"),
    ("{mae}/checkpoint.pt --task reconstruct --image-size 64", "--image-size belongs to --task knn or"),
    ("{mae}/checkpoint.pt --task reconstruct --set decoder_dim=32",
     "its weights do not fit {'decoder_dim': 32}"),
    ("{mae}/encoder.pt --task finetune --label-smoothing 2", "--label-smoothing must be"),
    ("{mae}/encoder.pt --task linear --batch-size 1 --data {data}", "--batch-size must be at least 2"),
    ("{mae}/encoder.pt --task linear --base-lr 1e38 --data {data}", "Try a lower"),
    ("--task knn", "the following arguments are required: checkpoint"),
    ("{mae}/checkpoint.pt --task segment", "--task segment is for runs of rae and rmae"),
    ("{rmae}/checkpoint.pt --task segment --image-visible 2", "--image-visible must be"),
    ("{rmae}/checkpoint.pt --task segment --regions panoptic", "--regions panoptic: --data shapes has none"),
    ("{rmae}/checkpoint.pt --task reconstruct --regions cam", "--regions cam is for objmae"),
    ("{cae}/checkpoint.pt --task reconstruct --tokenizer t.pt", "--tokenizer: the method of "),
    ("{mae}/encoder.pt --task knn --limit 0", "--limit must be positive, got 0"),
    ("{mae}/encoder.pt --task knn --dat shapes", "unknown argument --dat: see --help; did you mean --data"),
]


@pytest.mark.parametrize("line, words", MISTAKES)
def test_a_users_mistake_is_one_line(cli, runs, folder, line, words, tmp_path):
    (tmp_path / "text").write_text("neither a checkpoint nor an image")
    (tmp_path / "folder").mkdir()
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    state = torch.load(runs / "mae" / "encoder.pt", weights_only=True)
    torch.save(state | {"norm.weight": state["norm.weight"] * float("nan")}, tmp_path / "nan.pt")
    write_png(torch.zeros(3, 4, 40, dtype=torch.uint8), str(tmp_path / "low.png"))
    places = dict(mae=runs / "mae", rmae=runs / "rmae", cae=runs / "cae", plain=folder / "val" / "a",
                  image=folder / "val" / "a" / "0.png", data=folder)
    code, _, err = cli(evaluation, *line.format(**places).split())
    last = err.strip().splitlines()[-1]
    assert code == 2 and words in last and last.startswith("eval.py: error: ") and "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------
# Odd files, names and data


def test_a_stop_during_an_evaluation_leaves_no_gap_in_the_log(tmp_path):
    data, path = evaluation.Pairs((torch.randn(8, 3), torch.arange(8) % 2)), tmp_path / "run.pt"

    def run(stop=None, epochs=3, **options):
        calls = []

        def score(model):
            calls.append(model.weight.sum().item())
            if len(calls) == stop:
                raise KeyboardInterrupt
            return dict(weights=calls[-1])

        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        evaluation.fit(model, optimizer, data, cross_entropy, score, epochs=epochs, batch_size=4, base_lr=8.0,
                       warmup_epochs=1, eval_every=1, output=path, settings=dict(task="finetune"), **options)

    def figures():
        lines = map(json.loads, path.with_suffix(".jsonl").read_text().splitlines())
        return [(line["epoch"], line["weights"]) for line in lines]

    run()
    whole = figures()
    assert [epoch for epoch, _ in whole] == [1, 2, 3]
    for stop in (1, 2, 3):
        path.unlink()
        with pytest.raises(KeyboardInterrupt):
            run(stop)
        assert mim.load_file(path)["epoch"] == stop
        run(resume=True)
        assert figures() == whole


def test_a_subset_of_images_has_new_crops_in_each_epoch():
    source = datasets.load_data("shapes", "train", 32, limit=8)
    images = datasets.Images(source, 32)
    pairs = evaluation.as_items(torch.utils.data.Subset(torch.utils.data.Subset(images, [3, 4, 5]), [2, 0]))
    for epoch in (0, 1):
        for place, index in ((0, 5), (1, 3)):
            assert torch.equal(pairs[epoch, place]["image"], images[epoch, index]["image"])
            assert pairs[epoch, place]["label"] == images[0, index]["label"]
    assert not torch.equal(pairs[0, 0]["image"], pairs[1, 0]["image"])


def test_a_finetuned_models_own_size_and_heads_are_taken(call, tmp_path):
    """Its position table, which has been trained, could be of 4 x 4 patches, and 32 channels of one head."""
    images = torch.randint(0, 256, (8, 3, 16, 64), dtype=torch.uint8)
    encoder = mim.ViT((16, 64), 8, 32, 2, 4)
    torch.nn.init.normal_(encoder.pos_embed)
    data = (images, torch.arange(8) % 2)
    evaluation.finetune(encoder, data, data, epochs=1, batch_size=8, output=tmp_path / "model.pt")
    vit, _ = evaluation.open_encoder(str(tmp_path / "model.pt"))
    own = evaluation.load_finished(tmp_path / "model.pt").encoder
    assert vit.num_heads == 4 and vit.image_size == (16, 64)
    assert torch.equal(vit.pos_embed, own.pos_embed)


def test_encoders_of_other_channels_are_refused_in_one_line(call, tmp_path):
    torch.save(mim.ViT(32, 8, 32, 2, 2, channels=1).state_dict(), tmp_path / "grey.pt")
    code, _, err = call(tmp_path / "grey.pt", "knn")
    assert code == 2 and "its images have 1 channels, and not 3" in err and "Traceback" not in err


def test_the_checkpoint_is_not_overwritten_under_another_name(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    data = (images, torch.arange(8) % 2)
    evaluation.finetune(mim.ViT(32, 8, 32, 2, 2), data, data, epochs=1, batch_size=8, output="model.pt")
    before = Path("model.pt").read_bytes()
    code, _, err = call("./model.pt", "semseg", "--output", "model.pt", "--overwrite", "--epochs", 1)
    assert code == 2 and "or the checkpoint itself" in err and Path("model.pt").read_bytes() == before
    code, _, err = call("model.pt", "finetune")  # the scenes have ten classes
    assert code == 2 and "its classes are not those that the model was trained on" in err


@pytest.mark.parametrize("dim", [20, 64, 200, 400])
def test_the_attentive_probe_takes_any_width_that_four_divides(dim):
    class Encoder(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, None, :dim].expand(-1, 3, -1)

    data = (torch.randn(8, 3, 16, 16), torch.arange(8) % 2)
    assert "top1" in evaluation.attentive(Encoder(), data, data, epochs=1, batch_size=8)


def test_errors_count_each_hidden_pixel_once():
    """`ObjMAE(alignment="replicate")` repeats patches of small objects."""
    torch.manual_seed(0)
    regions = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    regions[0, 0, :16, :16], regions[1, 0, :, :16] = 1, 1  # 4 and 8 patches of 16
    method = mim.ObjMAE(mim.ViT(32, 8, 32, 2, 2), alpha=0.25, alignment="replicate", norm_pix=False)
    images = torch.randn(2, 3, 32, 32)
    _, out = train.draw_reconstruction(method.eval(), images, regions)
    ids = out["ids_masked"]
    assert len(ids[0].unique()) < ids.shape[1]
    shown = datasets.denormalize(mim.reconstruct(images, out["pred"], ids, 8, False))
    errors = mim.patchify((shown - datasets.denormalize(images)).square(), 8).mean(2)  # [2, 16]
    distinct = torch.cat([errors[i][ids[i].unique()] for i in range(2)])
    assert out["error"].item() == pytest.approx(distinct.mean().item(), rel=1e-4)


def test_all_windows_are_shown_even_if_they_have_as_many_patches_as_the_image(monkeypatch):
    """Four windows of 2 x 2 patches, drawn anywhere, of an image of 4 x 4."""
    shown = {}
    monkeypatch.setattr(train, "picture", lambda tiles, legend={}: shown.update(tiles))
    method = mim.LoMaR(mim.ViT(32, 8, 32, 2, 2, relative_position=True), num_windows=4, window_size=2)
    train.draw_reconstruction(method.eval(), torch.randn(2, 3, 32, 32))
    assert "all windows" in shown


def test_what_a_notebook_gives_wrongly_is_named():
    encoder, pairs = mim.ViT(8, 4, 16, 1, 2), (torch.randn(8, 3, 8, 8), torch.arange(8) % 2)
    with pytest.raises(ValueError, match="pool must be cls or mean, got 'max'"):
        evaluation.knn(encoder, pairs, pairs, k=1, pool="max")
    with pytest.raises(ValueError, match="images must be uint8, got torch.float32"):
        datasets.normalize(torch.rand(1, 3, 8, 8))
    model = evaluation.Classifier(encoder, 2)
    with pytest.raises(datasets.UsageError, match="0 and the images after it are broken; .*fewer than 8 pixels"):
        model.predict(torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert model.predict(torch.zeros(3, 12, 20, dtype=torch.uint8))["boxes"].tolist() == 2 * [[0, 0, 20, 12]]


def test_regions_are_computed_for_the_picture_alone(call, runs, folder):
    """`segment` scores all 8 validation images; of the one that is drawn alone no maps are kept."""
    flags = [runs / "rmae" / "checkpoint.pt", "--data", folder, "--regions", "fh", "--region-cache", "cache"]
    for task, options, count in (("reconstruct", ["--count", 1], 0), ("segment", [], 8)):
        code, *_ = call(flags[0], task, *flags[1:], *options)
        assert code == 0 and sum(path.is_file() for path in Path("cache").rglob("*")) == count
