"""Evaluation: the protocols against numbers by hand, every task from every kind of checkpoint, and mistakes."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.io import read_image, write_png
from torchvision.transforms import v2

import datasets
import eval as evaluation
import mim
import train

ROOT = Path(__file__).parents[1]

def picture_shape(rows, columns, per_row=1):
    """Of a picture of tiles enlarged to 128 pixels: see train.picture."""
    return 3, 16 + rows * 132, 4 + per_row * columns * 132


SIZE = ["--image-size", 32, "--patch-size", 4, "--model", "nano"]


@pytest.fixture
def call(cli):
    """call(checkpoint, task, *flags) -> (exit code, the last line's JSON or None, stderr)."""

    def run(checkpoint, task, *flags):
        code, out, err = cli(evaluation, checkpoint, "--task", task, *flags)
        return code, json.loads(out.splitlines()[-1]) if code == 0 else None, err

    return run


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A finished run of each method, one epoch long; of those that need regions on 32 scenes that have them."""
    root = tmp_path_factory.mktemp("runs")
    scenes = ["--data", "shapes", "--limit", 32]
    regions = ["--region-dim", 16, "--region-heads", 2]
    for name, flags in {"mae": ["mae"], "amt": ["amt"], "simmim": ["simmim"], "lomar": ["lomar"], "cae": ["cae"],
                        "objmae": ["objmae", *scenes], "rae": ["rae", *scenes, *regions],
                        "rmae": ["rmae", *scenes, *regions]}.items():
        decoder = ["--decoder-dim", 16, "--decoder-depth", 1, "--decoder-heads", 2]
        small = decoder if name in ("mae", "amt", "objmae", "rmae") else []
        train.main([str(a) for a in ["--method", flags[0], "--data", folder, *flags[1:], "--output", root / name, *SIZE,
                                     "--epochs", 1, "--batch-size", 8, *small]])
    return root


# Protocols


def test_lars_by_hand():
    weight, bias = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = evaluation.LARS([weight, bias], lr=0.5, momentum=0.9, trust=0.01)
    w, b, mw, mb = torch.tensor([[3.0, 4.0]]), 1.0, torch.zeros(1, 2), 0.0
    for gradient in (torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])):
        weight.grad, bias.grad = gradient.clone(), torch.tensor([0.2])
        optimizer.step()
        mw = 0.9 * mw + gradient * 0.01 * w.norm() / gradient.norm()
        mb = 0.9 * mb + 0.2
        w, b = w - 0.5 * mw, b - 0.5 * mb
        assert torch.allclose(weight, w) and bias.item() == pytest.approx(b)


def test_knn_votes_by_hand():
    train_features = torch.tensor([[1.0, 0], [2, 2], [0, 3], [-1, 0]])
    labels = torch.tensor([0, 1, 1, 0])
    votes = evaluation.knn_logits(train_features, labels, torch.tensor([[5.0, 0]]), 2, k=3, temperature=0.5)
    expected = [math.exp(1 / 0.5), math.exp(math.sqrt(0.5) / 0.5) + math.exp(0)]  # the three nearest by cosine: 1, 0.707, 0
    assert votes[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_accuracies_count_hits_among_the_first_and_the_first_five():
    logits = torch.eye(8)[[0, 1, 2, 3]] - torch.arange(8) * 1e-3
    result = evaluation.accuracies(logits, torch.tensor([0, 1, 0, 7]))
    assert result == dict(top1=50.0, top5=75.0)
    assert evaluation.accuracies(logits[:, :4], torch.tensor([0, 1, 0, 3])) == dict(top1=75.0)


def test_layer_wise_decay():
    model = evaluation.Classifier(mim.ViT(32, 8, 32, depth=3, num_heads=2), 5)
    model.encoder.pos_embed.requires_grad_(True)
    groups = evaluation.layer_wise_adamw(model.encoder, [model.fc_norm, model.head], 0.05, 0.5).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert scale["head.weight"] == (1.0, 0.05) and scale["fc_norm.weight"] == (1.0, 0.0)
    assert scale["encoder.blocks.2.attn.qkv.weight"] == (0.5, 0.05) and scale["encoder.blocks.0.norm1.bias"] == (0.125, 0.0)
    assert scale["encoder.patch_embed.proj.weight"] == (0.0625, 0.05)
    assert scale["encoder.cls_token"] == scale["encoder.pos_embed"] == (0.0625, 0.0)
    assert len(scale) == len(names) == sum(len(g["params"]) for g in groups)


def test_classifier_norms_after_the_mean():
    encoder = mim.ViT(32, 8, 32, depth=1, num_heads=2)
    x, blocks = torch.randn(2, 3, 32, 32), encoder.blocks
    model = evaluation.Classifier(encoder, 5, "mean")
    tokens = blocks[0](encoder.sequence(encoder.embed(x)))[:, 1:].mean(1)
    assert torch.allclose(model(x), model.head(F.layer_norm(tokens, (32,), eps=1e-6)), atol=1e-6)


def test_each_operation_of_randaugment_is_applied_half_the_time():
    augment = v2.Compose(evaluation.augmentation().transforms[:-1])  # without random erasing
    torch.manual_seed(0)
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    same = sum(torch.equal(augment(image), image) for _ in range(1000)) / 1000
    # RandAugment has 14 operations, of which Identity changes nothing: (1 - 13/14 / 2)^2, and a little for chance
    assert abs(same - (1 - 13 / 28) ** 2) < 0.06


@pytest.mark.parametrize("size, expected", [
    ("base", dict(base_lr=5e-4, epochs=100, drop_path=0.1, layer_decay=0.65)),
    ("large", dict(base_lr=1e-3, epochs=50, drop_path=0.2, layer_decay=0.75)),
    ("huge", dict(base_lr=1e-3, epochs=50, drop_path=0.3, layer_decay=0.75)),
])
def test_finetuning_follows_the_size_of_the_encoder(size, expected):
    with torch.device("meta"):
        encoder = mim.ViT(224, 14 if size == "huge" else 16, **mim.SIZES[size])
    defaults = {name: p.default for name, p in train.flag_parameters(evaluation.finetune).items()}
    settings = defaults | evaluation.recipe("finetune", encoder)
    assert {k: settings[k] for k in expected} == expected


def test_the_releases_files_say_whether_pixels_were_normalised(tmp_path):
    method = mim.MAE(mim.ViT(32, 8, 64, 1, 1), decoder_dim=32, decoder_depth=1, decoder_heads=16)
    for args, flags, expected in ((argparse.Namespace(norm_pix_loss=False), {}, False),
                                  (argparse.Namespace(norm_pix_loss=True), {}, True), (None, {}, True),
                                  (argparse.Namespace(norm_pix_loss=False), dict(norm_pix=True), True)):
        torch.save(dict(model=method.state_dict(), args=args), tmp_path / "full.pth")
        method, settings = evaluation.open_method(tmp_path / "full.pth", **flags)
        assert type(method) is mim.MAE and settings == {} and method.norm_pix is expected


# Tasks


def test_finetuning_resumes_exactly(cli, runs, folder, tmp_path, monkeypatch):
    def call(out, *more):
        code, out, err = cli(evaluation, runs / "mae" / "encoder.pt", "--task", "finetune", "--data", folder, "--epochs", 3,
                             "--batch-size", 8, "--output", tmp_path / out, *more)
        return code, json.loads(out.splitlines()[-1]) if code == 0 else None, err

    code, whole, _ = call("whole.pt")
    assert code == 0 and whole["output"] == str(tmp_path / "whole.pt")
    write, written = evaluation.write_atomically, []

    def write_then_interrupt(path, content):
        write(path, content)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_atomically", write_then_interrupt)
        code, *_ = call("part.pt")
    assert code == 130
    code, _, err = call("part.pt", "--resume", "--base-lr", 0.5)
    assert code == 2 and "was made with base_lr 0.001, not 0.5" in err
    code, part, _ = call("part.pt", "--resume")
    assert code == 0 and {k: v for k, v in part.items() if k not in ("seconds", "output")} == {
        k: v for k, v in whole.items() if k not in ("seconds", "output")}
    states = [mim.load_file(tmp_path / name) for name in ("whole.pt", "part.pt")]
    assert states[0]["epoch"] == states[1]["epoch"] == 3
    assert all(torch.equal(states[0]["model"][k], v) for k, v in states[1]["model"].items())
    code, out, _ = cli(evaluation, tmp_path / "part.pt", "--task", "knn", "--data", folder)  # it holds an encoder
    assert code == 0


def test_what_would_spoil_the_result_is_tried_first(cli, runs, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "extract", None)
    (tmp_path / "text").write_text("no image")
    for flags in (["--output", tmp_path / "text" / "a.png"], ["--images", tmp_path / "text"]):
        code, _, err = cli(evaluation, runs / "mae" / "encoder.pt", "--task", "attentive", "--data", folder, *flags)
        assert code == 2 and err.splitlines()[-1].startswith(f"eval.py: error: {flags[0]} {flags[1]}")


def test_features_beyond_the_memory(cli, runs, folder, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(evaluation, "extract", refuse)
    code, _, err = cli(evaluation, runs / "mae" / "encoder.pt", "--task", "linear", "--cache-features", "--data", folder)
    assert code == 2 and "out of memory" in err.strip().splitlines()[-1] and "Traceback" not in err


def torchrun(processes, *arguments):
    """eval.py by torchrun: the finished process."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
             str(ROOT / "eval.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)


def test_finetuning_in_two_processes_is_that_in_one(cli, runs, folder, tmp_path):
    flags = [runs / "mae" / "encoder.pt", "--task", "finetune", "--data", folder, "--epochs", 2, "--batch-size", 8]
    code, out, _ = cli(evaluation, *flags, "--accumulate", 2, "--output", tmp_path / "one.pt")
    two = torchrun(2, *flags, "--accumulate", 2, "--output", tmp_path / "two.pt")
    assert code == two.returncode == 0, two.stderr
    states = [mim.load_file(tmp_path / name)["model"] for name in ("one.pt", "two.pt")]
    assert all(torch.allclose(states[0][name], value, atol=1e-6) for name, value in states[1].items())
    lines = [line for line in two.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1 and json.loads(lines[0])["top1"] == json.loads(out.splitlines()[-1])["top1"]


def test_a_mistake_under_torchrun_is_said_once(runs, folder):
    process = torchrun(2, runs / "mae" / "encoder.pt", "--task", "knn", "--data", folder)
    assert process.returncode and process.stderr.count("runs in one process") == 1


@pytest.mark.parametrize("name, file", [("mae", "checkpoint.pt"), ("amt", "encoder.pt"), ("simmim", "checkpoint.pt")])
def test_accuracies_of_every_kind_of_checkpoint(call, runs, folder, name, file):
    path = runs / name / file
    results = {}
    for task, flags in (("knn", []), ("linear", ["--epochs", 5]), ("linear", ["--no-cache-features", "--epochs", 2]),
                        ("finetune", ["--epochs", 2, "--batch-size", 8])):
        code, result, _ = call(path, task, "--data", folder, *flags)
        assert code == 0 and result["task"] == task and 0 <= result["top1"] <= 100 and "top5" not in result
        results[task, "--no-cache-features" not in flags] = result
    assert results["linear", True]["features"] == "cached" and results["linear", False]["features"] == "augmented"


def test_a_lomar_encoder_is_pooled_by_the_mean_at_any_size(call, runs, folder):
    code, result, _ = call(runs / "lomar" / "encoder.pt", "knn", "--data", folder, "--image-size", 48)
    assert code == 0 and result["pool"] == "mean"
    assert call(runs / "lomar" / "checkpoint.pt", "linear", "--data", folder, "--pool", "cls", "--epochs", 1)[1]["pool"] == "cls"
    assert call(runs / "lomar" / "checkpoint.pt", "finetune", "--data", folder, "--epochs", 1, "--batch-size", 8)[0] == 0
    code, result, _ = call(runs / "lomar" / "checkpoint.pt", "reconstruct", "--data", folder, "--count", 2, "--mask-ratio", 0.6)
    assert code == 0 and read_image(result["picture"]).shape == picture_shape(1, 3, per_row=2)
    code, result, _ = call(runs / "lomar" / "checkpoint.pt", "attention", "--data", folder, "--count", 1)
    assert code == 0 and result["query"] == 1 + 4 * 8 + 4  # the patch in the middle
    code, result, _ = call("random", "knn", "--data", folder, *SIZE, "--relative-position")
    assert code == 0 and result["pool"] == "mean" and result["image_size"] == [32, 32]
    code, _, err = call(runs / "lomar" / "encoder.pt", "attention", "--images", folder / "val" / "a" / "0.png")
    assert code == 2 and "--image-size is needed" in err


def test_random_and_foreign_checkpoints(call, runs, folder, tmp_path):
    code, result, _ = call("random", "knn", "--data", folder, *SIZE)
    assert code == 0 and result["checkpoint"] == "random"
    state = torch.load(runs / "mae" / "encoder.pt", weights_only=True)
    torch.save({"model": state | {"head.weight": torch.zeros(3, 128)}}, tmp_path / "release.pth")
    code, foreign, err = call(tmp_path / "release.pth", "knn", "--data", folder)
    own = call(runs / "mae" / "encoder.pt", "knn", "--data", folder)[1]
    assert code == 0 and foreign["top1"] == own["top1"] and "1 left over: head.weight" in err


def test_a_probe_reads_what_features_say(call, tmp_path):
    """Two classes, dark and bright: any encoder separates them, so every protocol must reach (nearly) 100%."""
    for split, count in (("train", 32), ("val", 8)):
        for i in range(count):
            path = tmp_path / split / ("dark" if i % 2 else "bright") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            tone = torch.randint(0, 80, (3, 1, 1)) + (0 if i % 2 else 170)
            write_png((tone + torch.randint(0, 5, (3, 32, 32))).to(torch.uint8), str(path))
    for task, flags in (("knn", ["--k", 5]), ("linear", ["--cache-features", "--epochs", 60, "--batch-size", 16, "--pool", "mean"]),
                        ("finetune", ["--epochs", 12, "--batch-size", 8, "--base-lr", 0.03, "--label-smoothing", 0.0])):
        code, result, _ = call("random", task, "--data", tmp_path, *SIZE, *flags)
        assert code == 0 and result["top1"] >= 87.5, task


def test_the_same_seed_gives_the_same_result(call, folder, runs):
    results = [call(runs / "mae" / "encoder.pt", "linear", "--no-cache-features", "--data", folder, "--epochs", 2,
                    "--workers", w)[1] for w in (0, 1)]
    assert results[0]["top1"] == results[1]["top1"]


def test_reconstruct_draws_a_run_and_the_release_and_takes_overrides(call, runs, folder, tmp_path):
    image = folder / "val" / "a" / "0.png"
    for name in ("mae", "amt", "simmim"):
        code, result, _ = call(runs / name / "checkpoint.pt", "reconstruct", "--data", folder, "--count", 2)
        assert code == 0 and read_image(result["picture"]).shape == picture_shape(1, 3, per_row=2)
    content = torch.load(runs / "mae" / "checkpoint.pt", weights_only=True)["model"]
    torch.save({"model": {k.removeprefix("encoder."): v for k, v in content.items()}}, tmp_path / "full.pth")
    code, result, _ = call(tmp_path / "full.pth", "reconstruct", "--images", image, "--output", tmp_path / "one.png", "--mask-ratio", 0.5)
    assert code == 0 and result["picture"] == str(tmp_path / "one.png")
    masked = read_image(str(tmp_path / "one.png"))[:, 16:144, 136:264].reshape(3, 8, 16, 8, 16).float()
    grey = (masked.std((0, 2, 4)) < 1) & ((masked.mean((0, 2, 4)) - 127.5).abs() < 1)
    assert grey.sum() == 32  # half of 64 patches


def test_attention_draws_the_mean_and_every_head(call, runs, folder):
    code, result, _ = call(runs / "amt" / "encoder.pt", "attention", "--data", folder, "--count", 3)
    assert code == 0 and read_image(result["picture"]).shape == picture_shape(3, 6)  # image, mean, 4 heads


def test_heat_is_brightest_where_attention_is():
    attention = torch.zeros(1, 8, 8)
    attention[0, 2, 5] = 0.3
    shown = evaluation.heat(torch.full((1, 3, 64, 64), 0.5), attention)[0]
    row, column = divmod(shown.sum(0).argmax().item(), 64)
    assert row // 8 == 2 and column // 8 == 5
    bottom, top = (torch.tensor(evaluation.COLOURS[i]) for i in (0, -1))
    assert torch.allclose(shown[:, 60, 5], 0.4 * 0.5 + 0.6 * bottom, atol=1e-5)  # no attention: the lowest colour
    assert torch.allclose(shown[:, row, column], 0.4 * 0.5 + 0.6 * top, atol=0.05)
    more = evaluation.heat(torch.full((1, 3, 1, 9), 0.5), torch.linspace(0, 1, 9).view(1, 1, 9))[0, :, 0]
    assert (torch.tensor([0.3, 0.6, 0.1]) @ more).diff().min() > 0.03  # more attention is brighter


def test_the_query_is_marked_in_the_picture():
    encoder, images = mim.ViT(32, 8, 16, 1, 2), torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    pictures = [evaluation.attention(encoder, images, query=query)["picture"] for query in (0, 7)]
    differs = (pictures[0] - pictures[1])[:, 16:144, 4:132].abs().sum(0) > 0.1  # the first tile, below its title
    rows, columns = differs.any(1).nonzero()[:, 0], differs.any(0).nonzero()[:, 0]
    assert (rows.min() // 32, rows.max() // 32, columns.min() // 32, columns.max() // 32) == (1, 1, 2, 2)  # 7 = 1 + 4 + 2


def test_every_method_has_its_picture(call, runs):
    for name, columns in (("objmae", 3), ("rae", 5), ("rmae", 6), ("cae", 4)):
        code, result, _ = call(runs / name / "checkpoint.pt", "reconstruct", "--count", 2)
        assert code == 0 and read_image(result["picture"]).shape == picture_shape(1, columns, per_row=2)
        assert result["loss"] > 0 and ("loss_full" in result) == (name == "cae")


def test_regions_of_single_images_are_computed(call, runs, folder, tmp_path):
    image = folder / "val" / "a" / "0.png"
    code, result, err = call(runs / "rmae" / "checkpoint.pt", "reconstruct", "--images", image, "--output", tmp_path / "a.png")
    assert code == 0 and read_image(result["picture"]).shape == picture_shape(1, 6), err


def test_rollout_of_the_class_token_and_of_an_object(call, runs, folder):
    code, result, _ = call(runs / "objmae" / "encoder.pt", "attention", "--rollout", "--count", 3)
    assert code == 0 and read_image(result["picture"]).shape == picture_shape(3, 2)
    code, result, _ = call(runs / "objmae" / "encoder.pt", "attention", "--rollout", "--regions", "instances", "--count", 3)
    assert code == 0 and read_image(result["picture"]).shape == picture_shape(3, 4)


class Oracle(nn.Module):
    """Completes every region rightly, or wrongly."""

    def __init__(self, right):
        super().__init__()
        self.encoder, self.right = mim.ViT(32, 4, 16, 1, 2), right

    def complete(self, images, hints, ids_visible, ids_image=None):
        assert ids_image.shape == (len(images), 16)
        assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(ids_visible, ids_image))
        return hints.float() if self.right else 1 - hints.float()


@pytest.mark.parametrize("right", [True, False])
def test_completed_regions_are_scored_inside_what_was_hidden(right):
    source = datasets.load_data("shapes", "val", 32, limit=70)  # more than a batch
    images = datasets.Images(source, 32, "center", regions=datasets.open_regions("instances", source))
    result = evaluation.segment(Oracle(right), images, count=66)
    assert [result[f"iou_{r}"] for r in (80, 85, 90)] == ([100] * 3 if right else [0] * 3)
    assert all(0 < result[f"nearest_hint_{r}"] < 100 for r in (80, 85, 90)) and result["objects"] == 70
    assert result["picture"].shape == picture_shape(66, 8)


def test_hidden_iou_by_hand():
    patches, guess = torch.zeros(1, 4, 2, dtype=torch.bool), torch.zeros(1, 4, 2, dtype=torch.bool)
    patches[0, 0], patches[0, 1], patches[0, 2, 0] = True, True, True
    guess[0, 1], guess[0, 3, 0] = True, True
    # patch 0 is shown; of the others 3 pixels are the region's, 3 the guess's, 2 of both
    assert evaluation.hidden_iou(guess, patches, torch.tensor([[0]])).item() == pytest.approx(2 / 4)
    assert evaluation.hidden_iou(guess & False, patches & False, torch.tensor([[0]])).isnan().all()


def test_hints_show_the_object_and_the_nearest_one_is_copied():
    maps = torch.zeros(5, 16, 4, dtype=torch.bool)
    maps[:, 6] = True
    ids = evaluation.hint_patches(maps, 3)
    assert ids.shape == (5, 3) and (ids == 6).any(-1).all() and all(len(set(i.tolist())) == 3 for i in ids)
    patches = torch.zeros(1, 16, 4, dtype=torch.bool)
    patches[:, 0] = True
    near = evaluation.nearest_hint(patches, torch.tensor([[0, 15]]), (4, 4))[0, :, 0]
    assert near[[0, 1, 4]].all() and not near[[15, 14, 11]].any()


# In a notebook


class TwoTones(torch.utils.data.Dataset):
    """A user's own dataset: (image, label) pairs of floats, dark and bright."""

    def __init__(self, count):
        self.labels = torch.arange(count) % 2
        self.images = torch.rand(count, 3, 16, 16) * 0.2 + self.labels.view(-1, 1, 1, 1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


class OwnViT(nn.Module):
    """A user's own encoder: images [B, 3, 16, 16] -> latents [B, 1 + 16, 32], the class token's first."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.5, batch_first=True)

    def forward(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return self.block(torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1))


def test_a_notebook_evaluates_its_own_encoder_on_its_own_data():
    torch.manual_seed(0)
    encoder, train_set, val_set = OwnViT(), TwoTones(64), TwoTones(16)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert evaluation.knn(encoder, train_set, val_set, k=5) == dict(top1=100.0)
    assert evaluation.linear(encoder, train_set, val_set, epochs=20, batch_size=16, base_lr=5.0)["top1"] == 100
    cached = evaluation.linear(encoder, train_set, val_set, epochs=20, batch_size=16, base_lr=5.0, cache_features=True)
    assert cached["top1"] == 100 and cached["features"] == "cached"
    assert evaluation.attentive(encoder, train_set, val_set, epochs=20, batch_size=16, base_lr=0.1)["top1"] == 100
    assert encoder.training and all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    assert all(p.requires_grad for p in encoder.parameters())


def test_bytes_are_normalised_and_floats_are_not():
    encoder, labels = mim.ViT(16, 4, 32, 1, 2).eval(), torch.arange(8) % 2
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    features = evaluation.pooled(encoder, "mean")
    given = [evaluation.extract(features, evaluation.as_items(data)) for data in (
        (images, labels), TensorDataset(datasets.normalize(images), labels))]
    assert torch.equal(given[0][0], given[1][0]) and torch.equal(given[0][1], labels)
    assert not torch.allclose(given[0][0], evaluation.extract(features, evaluation.as_items((images / 255, labels)))[0])


def test_finetuning_does_not_change_the_encoder_it_is_given():
    torch.manual_seed(0)
    encoder, train_set = mim.ViT(16, 4, 32, 2, 2), TwoTones(64)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    result = evaluation.finetune(encoder, (train_set.images, train_set.labels), TwoTones(16), epochs=10, batch_size=16,
                                 base_lr=0.02, label_smoothing=0.0)
    assert result["top1"] >= 87.5
    after = encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_help_shows_the_flags_of_the_task_alone(cli, runs, capsys):
    for arguments, shown, absent in (
            (["--task", "knn"], ["--k INT", "number of neighbours", "(default: 20)"], ["--epochs", "--rollout", "--output"]),
            (["--task", "attention"], ["--rollout", "--query"], ["--k ", "--limit"]),
            ([runs / "amt" / "checkpoint.pt", "--task", "reconstruct"], ["--throw-ratio", "--decoder-dim"], ["--k ", "--alpha"])):
        with pytest.raises(SystemExit):
            evaluation.main([str(a) for a in [*arguments, "--help"]])
        text = capsys.readouterr().out
        assert all(word in text for word in shown) and not any(word in text for word in absent), text


def test_small_images_are_cached_and_large_ones_are_not():
    small, large = (mim.ViT(size, 16, 32, 1, 2) for size in (64, 224))
    assert evaluation.recipe("linear", small)["cache_features"] and evaluation.recipe("linear", large) == {}


# Mistakes


@pytest.mark.parametrize("arguments, words", [
    (["random"], "the following arguments are required: --task"),
    (["random", "--task", "lineal"], "--task invalid choice: 'lineal' (choose from"),
    (["nowhere.pt", "--task", "knn"], "cannot read nowhere.pt: No such file"),
    (["text", "--task", "knn"], "cannot read text: not a whole PyTorch checkpoint"),
    (["list.pt", "--task", "knn"], "list.pt"),
    (["list.pt", "--task", "reconstruct"], "list.pt"),
    (["nan.pt", "--task", "knn"], "nan.pt: its weights are not all finite numbers"),
    (["random", "--task", "reconstruct"], "--task reconstruct needs a whole pre-trained model, not random"),
    (["{mae}/encoder.pt", "--task", "reconstruct"], "it has an encoder only; give the checkpoint.pt of a run"),
    (["{mae}/encoder.pt", "--task", "segment"], "it has an encoder only; give the checkpoint.pt of a run"),
    (["{mae}/encoder.pt", "--task", "knn", "--model", "tiny"], "--model is for an untrained encoder"),
    (["{mae}/encoder.pt", "--task", "knn", "--image-size", "30"], "multiple of patch_size=4, got 30x30"),
    (["{mae}/checkpoint.pt", "--task", "reconstruct", "--throw-ratio", "0.1"], "unknown argument --throw-ratio"),
    (["{mae}/checkpoint.pt", "--task", "reconstruct", "--mask-ration", "0.1"], "did you mean --mask-ratio"),
    (["{mae}/checkpoint.pt", "--task", "reconstruct", "--mask-ratio", "1.5"], "mask_ratio"),
    (["{mae}/encoder.pt", "--task", "knn", "--mask-ratio", "0.5"], "unknown argument --mask-ratio"),
    (["{mae}/encoder.pt", "--task", "knn", "--epochs", "3"], "unknown argument --epochs"),
    (["{mae}/encoder.pt", "--task", "linear", "--batchsize", "3"], "did you mean --batch-size"),
    (["{mae}/encoder.pt", "--task", "knn", "--k", "0"], "--k must be a positive whole number, got '0'"),
    (["{mae}/encoder.pt", "--task", "knn", "--k", "1000", "--data", "{data}"], "--k 1000 is more than the 24 training images"),
    (["{mae}/encoder.pt", "--task", "knn", "--pool", "max"], "--pool"),
    (["{mae}/encoder.pt", "--task", "attention", "--query", "65"], "--query 65: it may be 0 (class token) to 64"),
    (["{mae}/encoder.pt", "--task", "attention", "--regions", "instances"], "--regions of --task attention is for --rollout"),
    (["{mae}/encoder.pt", "--task", "attention", "--images", "nowhere.png"], "--images nowhere.png: "),
    (["{mae}/encoder.pt", "--task", "attention", "--images", "text"], "--images text: it cannot be used as an image"),
    (["{mae}/encoder.pt", "--task", "attention", "--output", "text/folder/a.png"], "--output text/folder/a.png: it cannot be written (Not a directory"),
    (["{mae}/encoder.pt", "--task", "attention", "--output", "folder"], "--output folder: it is a folder"),
    (["{mae}/encoder.pt", "--task", "attention", "--images", "low.png", "{image}"], "--images low.png: it cannot be used as an image (a side has fewer than"),
    (["{mae}/encoder.pt", "--task", "knn", "--resume"], "unknown argument --resume"),
    (["{mae}/encoder.pt", "--task", "finetune", "--resume", "--output", "none.pt", "--data", "{data}"], "none.pt is not of --task finetune (cannot read none.pt: No such file"),
    (["{mae}/encoder.pt", "--task", "finetune", "--resume", "--output", "{mae}/checkpoint.pt", "--data", "{data}"], "was made with task None, not finetune"),
    (["{mae}/encoder.pt", "--task", "finetune", "--warmup-epochs", "5", "--epochs", "3", "--data", "{data}"],
     "--warmup-epochs 5 is more than --epochs 3"),
    (["{mae}/encoder.pt", "--task", "knn", "--data", "{plain}"], "needs labels"),
    (["{mae}/encoder.pt", "--task", "knn", "--cache-features"], "unknown argument --cache-features"),
    (["{mae}/checkpoint.pt", "--task", "reconstruct", "--image-size", "64"], "unknown argument --image-size"),
    (["{mae}/checkpoint.pt", "--task", "reconstruct", "--decoder-dim", "32"], "its weights do not fit {'decoder_dim': 32}"),
    (["{mae}/encoder.pt", "--task", "finetune", "--label-smoothing", "2"], "--label-smoothing must be"),
    (["{mae}/encoder.pt", "--task", "linear", "--batch-size", "1", "--data", "{data}"], "--batch-size must be at least 2"),
    (["{mae}/encoder.pt", "--task", "linear", "--base-lr", "1e38", "--data", "{data}"], "Try a lower"),
    (["--task", "knn"], "the following arguments are required: checkpoint"),
    (["{mae}/checkpoint.pt", "--task", "segment"], "--task segment is for runs of rae and rmae"),
    (["{rmae}/checkpoint.pt", "--task", "segment", "--image-visible", "2"], "--image-visible must be"),
    (["{rmae}/checkpoint.pt", "--task", "segment", "--regions", "panoptic"], "--regions panoptic: --data shapes has none"),
    (["{mae}/encoder.pt", "--task", "knn", "--limit", "0"], "--limit must be positive, got 0"),
    (["{mae}/encoder.pt", "--task", "knn", "--dat", "shapes"], "unknown argument --dat: did you mean --data"),
])
def test_a_users_mistake_is_one_line(cli, runs, folder, arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("neither a checkpoint nor an image")
    (tmp_path / "folder").mkdir()
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    state = torch.load(runs / "mae" / "encoder.pt", weights_only=True)
    torch.save(state | {"norm.weight": state["norm.weight"] * float("nan")}, tmp_path / "nan.pt")
    write_png(torch.zeros(3, 4, 40, dtype=torch.uint8), str(tmp_path / "low.png"))
    places = dict(mae=runs / "mae", rmae=runs / "rmae", image=folder / "val" / "a" / "0.png", plain=folder / "val" / "a", data=folder)
    code, _, err = cli(evaluation, *[a.format(**places) for a in arguments])
    last = err.strip().splitlines()[-1]
    assert code == 2 and words in last and last.startswith("eval.py: error: ") and "Traceback" not in err
