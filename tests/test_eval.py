"""Evaluation: the protocols against numbers by hand, every task from every kind of checkpoint, and mistakes."""

import argparse
import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.io import read_image, write_png
from torchvision.transforms import v2

import datasets
import eval as evaluation
import mim
import train
from datasets import render_scene

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
    datasets.Shapes.__len__, length = lambda self: min(32, self.length), datasets.Shapes.__len__
    root = tmp_path_factory.mktemp("runs")
    scenes = ["--data", "shapes", "--region-dim", 16, "--region-heads", 2]
    for name, flags in {"mae": ["mae"], "amt": ["amt"], "simmim": ["simmim"], "lomar": ["lomar"], "cae": ["cae"],
                        "objmae": ["objmae", *scenes[:2]], "rae": ["rae", *scenes], "rmae": ["rmae", *scenes]}.items():
        decoder = ["--decoder-dim", 16, "--decoder-depth", 1, "--decoder-heads", 2]
        small = decoder if name in ("mae", "amt", "objmae", "rmae") else []
        train.main([str(a) for a in ["--method", flags[0], "--data", folder, *flags[1:], "--output", root / name, *SIZE,
                                     "--epochs", 1, "--batch-size", 8, *small]])
    datasets.Shapes.__len__ = length
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
    groups = evaluation.layer_groups(model, 0.05, 0.5)
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


def test_a_batch_of_many_is_made_of_whole_pieces():
    for given, images, batch in ((1024, 797, 768), (514, 9999, 512), (1024, 200, 200), (100, 797, 100)):
        settings = dict(batch_size=given, epochs=3, base_lr=0.5)
        assert evaluation.fit_batch(settings, range(images)) == (batch, 3, 0.5 * batch / 256) and settings["batch_size"] == batch


def test_each_operation_of_randaugment_is_applied_half_the_time(folder):
    dataset = evaluation.augmented(dict(data=str(folder), seed=0, task="finetune"), 32)
    augment = v2.Compose(dataset.augment.transforms[:-1])  # without random erasing
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
    settings = evaluation.settle(dict(task="finetune", checkpoint="encoder.pt"), encoder, "fp32", False)
    assert {k: settings[k] for k in expected} == expected


def test_the_releases_files_say_whether_pixels_were_normalised(tmp_path):
    method = mim.MAE(mim.ViT(32, 8, 64, 1, 1), decoder_dim=32, decoder_depth=1, decoder_heads=16)
    for args, flags, expected in ((argparse.Namespace(norm_pix_loss=False), {}, False),
                                  (argparse.Namespace(norm_pix_loss=True), {}, True), (None, {}, True),
                                  (argparse.Namespace(norm_pix_loss=False), dict(norm_pix=True), True)):
        torch.save(dict(model=method.state_dict(), args=args), tmp_path / "full.pth")
        settings = dict(checkpoint=tmp_path / "full.pth", method_options=flags, task="reconstruct")
        assert evaluation.open_method(settings).norm_pix is expected


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
        code, _, err = call("part.pt")
    assert code == 130 and "part.pt has is kept, --resume continues from it" in err
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
    monkeypatch.setattr(evaluation, "train_probe", None)
    (tmp_path / "text").write_text("no image")
    for flags in (["--output", tmp_path / "text" / "a.png"], ["--images", tmp_path / "text"]):
        code, _, err = cli(evaluation, runs / "mae" / "encoder.pt", "--task", "attentive", "--data", folder, *flags)
        assert code == 2 and err.startswith(f"eval.py: error: {flags[0]} {flags[1]}")


def test_features_beyond_the_memory(cli, runs, folder, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: (_ for _ in ()).throw(RuntimeError("can't allocate memory")))
    code, _, err = cli(evaluation, runs / "mae" / "encoder.pt", "--task", "linear", "--cache-features", "--data", folder)
    assert code == 2 and "no memory for the train features of" in err and "--cache-features" in err


def test_one_process_evaluates(cli, runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    code, _, err = cli(evaluation, runs / "mae" / "encoder.pt", "--task", "knn")
    assert code == 2 and "eval.py runs in one process" in err


@pytest.mark.parametrize("name, file", [("mae", "checkpoint.pt"), ("amt", "encoder.pt"), ("simmim", "checkpoint.pt")])
def test_accuracies_of_every_kind_of_checkpoint(call, runs, folder, name, file):
    path = runs / name / file
    results = {}
    for task, flags in (("knn", []), ("linear", ["--cache-features", "--epochs", 5]), ("linear", ["--epochs", 2]),
                        ("finetune", ["--epochs", 2, "--batch-size", 8])):
        code, result, _ = call(path, task, "--data", folder, *flags)
        assert code == 0 and result["task"] == task and 0 <= result["top1"] <= 100 and "top5" not in result
        results[task, "--cache-features" in flags] = result
    assert results["linear", True]["features"] == "cached" and results["linear", False]["features"] == "augmented"


def test_a_lomar_encoder_is_pooled_by_the_mean_at_any_size(call, runs, folder):
    code, result, _ = call(runs / "lomar" / "encoder.pt", "knn", "--data", folder, "--image-size", 48)
    assert code == 0 and result["pool"] == "mean"
    assert call(runs / "lomar" / "checkpoint.pt", "linear", "--data", folder, "--pool", "cls", "--epochs", 1)[1]["pool"] == "cls"
    assert call(runs / "lomar" / "checkpoint.pt", "finetune", "--data", folder, "--epochs", 1, "--batch-size", 8)[0] == 0
    code, result, _ = call(runs / "lomar" / "checkpoint.pt", "reconstruct", "--data", folder, "--count", 2, "--mask-ratio", 0.6)
    assert code == 0 and read_image(result["picture"]).shape == (3, 130 + 2, 8 * 130 + 2)
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
    assert code == 0 and foreign["top1"] == own["top1"] and "left over: head.weight" in err


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
    results = [call(runs / "mae" / "encoder.pt", "linear", "--data", folder, "--epochs", 2, "--workers", w)[1] for w in (0, 1)]
    assert results[0]["top1"] == results[1]["top1"]


def test_reconstruct_draws_a_run_and_the_release_and_takes_overrides(call, runs, folder, tmp_path):
    image = folder / "val" / "a" / "0.png"
    for name in ("mae", "amt", "simmim"):
        code, result, _ = call(runs / name / "checkpoint.pt", "reconstruct", "--data", folder, "--count", 2)
        assert code == 0 and read_image(result["picture"]).shape == (3, 130 + 2, 6 * 130 + 2)
    content = torch.load(runs / "mae" / "checkpoint.pt", weights_only=True)["model"]
    torch.save({"model": {k.removeprefix("encoder."): v for k, v in content.items()}}, tmp_path / "full.pth")
    code, result, _ = call(tmp_path / "full.pth", "reconstruct", "--images", image, "--output", tmp_path / "one.png", "--mask-ratio", 0.5)
    assert code == 0 and result["picture"] == str(tmp_path / "one.png")
    masked = read_image(str(tmp_path / "one.png"))[:, 2:130, 132:260].reshape(3, 8, 16, 8, 16).float()
    grey = (masked.std((0, 2, 4)) < 1) & ((masked.mean((0, 2, 4)) - 127.5).abs() < 1)
    assert grey.sum() == 32  # half of 64 patches


def test_attention_draws_the_mean_and_every_head(call, runs, folder):
    code, result, _ = call(runs / "amt" / "encoder.pt", "attention", "--data", folder, "--count", 3)
    assert code == 0 and read_image(result["picture"]).shape == (3, 3 * 130 + 2, 6 * 130 + 2)  # image, mean, 4 heads


def test_heat_is_brightest_where_attention_is():
    attention = torch.zeros(1, 8, 8)
    attention[0, 2, 5] = 0.3
    shown = evaluation.heat(torch.full((1, 3, 64, 64), 0.5), attention)[0].sum(0)
    row, column = divmod(shown.argmax().item(), 64)
    assert row // 8 == 2 and column // 8 == 5 and shown[40:, :30].max() == pytest.approx(0.6, abs=1e-5)


def test_every_method_has_its_picture(call, runs):
    for name, columns in (("objmae", 5), ("rae", 5), ("rmae", 6), ("cae", 4)):
        code, result, _ = call(runs / name / "checkpoint.pt", "reconstruct", "--count", 2)
        assert code == 0 and read_image(result["picture"]).shape == (3, 130 + 2, 2 * columns * 130 + 2)
        assert result["loss"] > 0 and ("loss_full" in result) == (name == "cae")


def test_regions_of_single_images_are_computed(call, runs, folder, tmp_path):
    image = folder / "val" / "a" / "0.png"
    code, result, err = call(runs / "rmae" / "checkpoint.pt", "reconstruct", "--images", image, "--output", tmp_path / "a.png")
    assert code == 0 and read_image(result["picture"]).shape == (3, 132, 6 * 130 + 2), err


def test_rollout_of_the_class_token_and_of_an_object(call, runs, folder):
    code, result, _ = call(runs / "objmae" / "encoder.pt", "attention", "--rollout", "--count", 3)
    assert code == 0 and read_image(result["picture"]).shape == (3, 3 * 130 + 2, 2 * 130 + 2)
    code, result, _ = call(runs / "objmae" / "encoder.pt", "attention", "--rollout", "--regions", "instances", "--count", 3)
    assert code == 0 and read_image(result["picture"]).shape == (3, 3 * 130 + 2, 4 * 130 + 2)


class Oracle(torch.nn.Module):
    """Completes every region rightly, or wrongly."""

    def __init__(self, right):
        super().__init__()
        self.encoder, self.right = mim.ViT(32, 4, 16, 1, 2), right

    def complete(self, images, hints, ids_visible, ids_image=None):
        assert ids_image.shape == (len(images), 16) and all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(ids_visible, ids_image))
        return hints.float() if self.right else 1 - hints.float()


@pytest.mark.parametrize("right", [True, False])
def test_completed_regions_are_scored_inside_what_was_hidden(right, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.Shapes, "__len__", lambda self: 20)
    settings = dict(task="segment", data="shapes", regions="instances", count=4, seed=0, image_visible=0.25,
                    output=tmp_path / "a.png")
    result = evaluation.segment(Oracle(right), settings, (torch.device("cpu"), contextlib.nullcontext, 0))
    assert [result[f"iou_{r}"] for r in (80, 85, 90)] == ([100] * 3 if right else [0] * 3)
    assert all(0 < result[f"nearest_hint_{r}"] < 100 for r in (80, 85, 90)) and result["objects"] == 20
    assert read_image(str(tmp_path / "a.png")).shape == (3, 4 * 130 + 2, 8 * 130 + 2)


def test_hints_show_the_object_and_the_nearest_one_is_copied():
    maps = torch.zeros(5, 1, 16, 4, dtype=torch.bool)
    maps[:, :, 6] = True
    ids = evaluation.hint_patches(maps, 3)
    assert ids.shape == (5, 1, 3) and (ids == 6).any(-1).all() and all(len(set(i.tolist())) == 3 for i in ids[:, 0])
    patches = torch.zeros(1, 16, 4, dtype=torch.bool)
    patches[:, 0] = True
    near = evaluation.nearest_hint(patches, torch.tensor([[0, 15]]), (4, 4))[0, :, 0]
    assert near[[0, 1, 4]].all() and not near[[15, 14, 11]].any()


def test_one_image_is_segmented_from_points_and_from_a_label_map(call, runs, folder, tmp_path):
    image, label = folder / "val" / "a" / "0.png", torch.zeros(1, 32, 32, dtype=torch.uint8)
    label[0, 8:12, 8:12], label[0, 24:, 24:] = 2, 1
    write_png(label, str(tmp_path / "hints.png"))
    for hints in (["--points", "9,9", "--background", "25,25", "30,30"], ["--hints", tmp_path / "hints.png"]):
        code, result, err = call(runs / "rmae" / "checkpoint.pt", "segment", "--images", image, *hints, "--output", tmp_path / "a.png")
        assert code == 0, err
        assert read_image(result["picture"]).shape == (3, 132, 4 * 130 + 2)
        mask = read_image(result["mask"])
        assert mask.shape[1:] == (32, 32) and set(mask.unique().tolist()) <= {0, 255}
        assert mask[:, 9:11, 9:11].eq(255).all() and mask[:, 29:, 29:].eq(0).all()  # the hints themselves


def test_speed_lists_what_was_asked(cli):
    code, out, err = cli(evaluation, "--task", "speed", "--methods", "mae", "objmae-1/4", "rmae", "--model", "nano", "--image-size",
                         "32", "--patch-size", "4", "--repeats", "1", "--batch-size", "2")
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["name"] for row in rows] == ["mae", "objmae-1/4", "rmae"]
    assert rows[0]["parameters"] == sum(p.numel() for p in mim.MAE(mim.ViT(32, 4, **mim.SIZES["nano"])).parameters() if p.requires_grad)
    assert all(row["images_per_s"] > 0 and 0 < row["of_peak"] and row["gmac"] > 0 for row in rows)
    assert len(out.splitlines()) == 6


@pytest.mark.parametrize("name", [n for n in evaluation.VARIANTS if n not in ("objmae-1/2", "objmae-1/8", "objmae-1/16", "cae")])
def test_every_variant_compiles_to_one_graph_once(name):
    if torch.__version__.startswith("2.6") and name in ("beit", "amt", "amt-simmim", "cae-token"):
        pytest.skip("torch 2.6 cannot trace Module.to and exponential_, and breaks the graph there")
    settings = dict(image_size=64, patch_size=8, model="nano", batch_size=2, amp=contextlib.nullcontext)
    model, batch, step = evaluation.make_variant(name, settings, torch.device("cpu"))
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    call = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(3):
        step(call)
    assert counter.frame_count == 1


def fake_cuda_needs_a_driver():
    """torch 2.6 asks for one even if no tensor is real."""
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda").uniform_()
    except RuntimeError:
        return True
    return False


def forward_on_fake_cuda(method, options):
    """The loss of a bf16 step on CUDA without a GPU: a fake tensor has a device and no values, so that mixing devices or
    types in an operation raises, and reading a value, which waits for the device, does too."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    cls = mim.METHODS.get(method)
    with FakeTensorMode():
        try:
            torch.set_autocast_enabled("cuda", True)  # torch.autocast refuses without a GPU
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            with torch.device("cuda"):
                encoder = mim.ViT(64, 8, **mim.SIZES["nano"], **(cls.encoder_options if cls else {}))
                model = cls(encoder, **options) if cls else evaluation.Plain(encoder)
            batch = evaluation.synthetic_batch(model, 2, torch.device("cuda"))
            if method == "objmae":
                batch["regions"] = torch.ones(2, 2, 64, 64, dtype=torch.uint8)
            batch = {k: v.to("cuda") for k, v in batch.items()}
            latents = encoder(batch["images"])
            assert latents.dtype == torch.float32 and encoder.blocks[0].attn(latents).dtype == torch.bfloat16
            return model(**batch)["loss"]
        finally:
            torch.set_autocast_enabled("cuda", enabled)
            torch.set_autocast_dtype("cuda", dtype)


MORE_VARIANTS = {
    "amt-random": ("amt", dict(throw="random")), "objmae-inter": ("objmae", dict(selection="inter")),
    "objmae-replicate": ("objmae", dict(alignment="replicate")), "objmae-random": ("objmae", dict(alignment="random")),
    "rmae-channel": ("rmae", dict(variant="channel")), "rmae-one": ("rmae", dict(num_regions=1)),
}


@pytest.mark.skipif(fake_cuda_needs_a_driver(), reason="this torch has no fake CUDA tensors without a driver")
@pytest.mark.parametrize("name", [*evaluation.VARIANTS, *MORE_VARIANTS])
def test_every_variant_keeps_to_its_device_and_waits_for_nothing(name):
    loss = forward_on_fake_cuda(*(evaluation.VARIANTS | MORE_VARIANTS)[name])
    assert loss.device.type == "cuda" and loss.dtype == torch.float32


@pytest.mark.skipif(fake_cuda_needs_a_driver(), reason="this torch has no fake CUDA tensors without a driver")
def test_throwout_waits_for_the_device():
    with pytest.raises(DataDependentOutputException):
        forward_on_fake_cuda("objmae", dict(alignment="throwout"))


def test_reading_images_is_timed_against_pillow(cli, tmp_path):
    for i in range(6):
        image = render_scene(i, 64)[0].transpose(1, 2, 0)
        Image.fromarray(image).save(tmp_path / f"{i}.jpg")
    code, out, err = cli(evaluation, "--task", "data", "--data", tmp_path, "--image-size", 32, "--repeats", 1, "--limit", 4)
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["ratio"] == pytest.approx(result["ours"] / result["usual"], rel=0.01), err
    assert "6 images, 0 classes, 4 of them" in out


@pytest.fixture
def in_process(monkeypatch):
    """The commands of --task compare run in this process; the list of them."""
    commands = []

    def run(words, stdout, stderr, env):
        commands.append(words[1:])
        program = {"train.py": train, "eval.py": evaluation}[Path(words[1]).name]
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            return SimpleNamespace(returncode=train.exit_with_one_line(Path(words[1]).name, lambda: program.main(words[2:])))

    monkeypatch.setattr(evaluation.subprocess, "run", run)
    return commands


def test_compare_gives_every_method_equal_epochs(cli, folder, tmp_path, in_process):
    flags = ["--data", folder, "--model", "nano", "--limit", 8, "--epochs", 4, "--finetune-epochs", 1, "--probe-epochs", 2,
             "--output", tmp_path / "table", "--methods", "cae-token", "objmae"]
    code, out, err = cli(evaluation, "--task", "compare", *flags)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    rows = {(r["name"], r["epochs"]): r for r in result["rows"]}
    gmac = result["gmac"]
    assert [name for name, _ in rows] == ["random", "supervised", "cae-token", "objmae"]
    assert gmac["cae-token"] > gmac["mae"] > gmac["objmae"]
    for (name, epochs), row in rows.items():
        assert {"finetune"} | ({"knn", "linear", "attentive"} if name != "supervised" else set()) <= row.keys()
        assert row["seconds"] >= 0
        if name not in ("random", "supervised"):
            assert epochs == 4
            assert len((tmp_path / "table" / f"{name}-{epochs}" / "log.jsonl").read_text().splitlines()) == epochs
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 + 2 and {line.count("|") for line in table} == {8}
    trained = [c for c in in_process if "train.py" in c[0]]
    assert any("--tokenizer" in c for c in trained) and all("fh" in c for c in trained if "objmae" in c)
    first, count = (tmp_path / "table" / "objmae-4" / "knn.txt").read_text().split("\n")[0], len(in_process)
    assert first.startswith("python eval.py ") and "--task knn --pool mean" in first
    code, again, _ = cli(evaluation, "--task", "compare", *flags)
    assert code == 0 and len(in_process) == count and json.loads(again.splitlines()[-1])["rows"] == result["rows"]
    (tmp_path / "table" / "objmae-4" / "linear.txt").write_text(first)  # as after an interrupt
    assert cli(evaluation, "--task", "compare", *flags)[0] == 0 and len(in_process) == count + 1


def test_compare_counts_what_training_costs():
    settings = dict(data="shapes", output=Path("none"), seed=0)
    commands = {name: evaluation.train_command(name, 8, settings) for name in ("mae", "amt", "simmim", "objmae")}
    methods = {name: train.build_method(train.settle(train.parse(c[1:]), 4096, 64)) for name, c in commands.items()}
    gmac = {name: evaluation.training_gmac(method, 8) for name, method in methods.items()}
    dim, n, dec = 128, 64, 64
    block = lambda tokens, d: 12 * tokens * d * d + 2 * tokens * tokens * d  # noqa: E731
    patches, pixels = n * dim * 192, 192  # 64 patches of 8x8 RGB
    encoder = patches + 6 * block(17, dim)
    decoder = 17 * dim * dec + 2 * block(65, dec) + 48 * dec * pixels
    assert gmac["mae"] == pytest.approx((3 * (encoder + decoder) - patches) / 1e9, rel=0.01)  # images need no gradient
    visible = n - int(n * 0.45 + 1e-6) - int(n * 0.40 + 1e-6)
    amt = 3 * (patches + 6 * block(1 + visible, dim) + (1 + visible) * dim * dec
               + 2 * block(n - int(n * 0.40) + 1, dec) + 28 * dec * pixels) - patches
    maps = 3 / 8 * (patches + 6 * block(65, dim))  # before epochs 3, 5 and 7 of 8
    assert gmac["amt"] == pytest.approx((amt + maps) / 1e9, rel=0.01)
    assert gmac["simmim"] > 2 * gmac["mae"] > 2 * gmac["objmae"]


def test_compare_stops_at_the_first_failure_and_keeps_what_is_there(cli, folder, tmp_path, in_process):
    flags = ["--task", "compare", "--data", folder, "--model", "nano", "--methods", "mae", "--epochs", 1, "--limit", 8,
             "--finetune-epochs", 1, "--probe-epochs", 1]
    code, _, err = cli(evaluation, "--task", "compare", "--data", folder / "val" / "a", "--methods", "cae-token")
    assert code == 2 and not in_process and "--task compare needs labels" in err
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "attentive.png").mkdir()  # where a picture is to be written
    code, _, err = cli(evaluation, *flags, "--output", tmp_path)
    last = err.strip().splitlines()[-1]
    assert code == 2 and "python eval.py random --task attentive" in last and "it is a folder" in last
    assert len(in_process) == 3 and "it is a folder" in (tmp_path / "random" / "attentive.err").read_text()
    (tmp_path / "random" / "attentive.png").rmdir()
    assert cli(evaluation, *flags, "--output", tmp_path)[0] == 0
    count = len(in_process)
    code, _, err = cli(evaluation, *flags, "--limit", 12, "--output", tmp_path)
    assert code == 2 and "mae-1 holds a run of another command, python train.py" in err and "--limit 8" in err
    (tmp_path / "mae-1" / "finetune.txt").write_text((tmp_path / "mae-1" / "finetune.txt").read_text().split("\n")[0] + "\n")
    assert cli(evaluation, *flags, "--output", tmp_path)[0] == 0
    assert "finetune" in in_process[-1] and in_process[-1][-1] == "--resume"  # killed there, it goes on there
    assert not any("train.py" in c[0] for c in in_process[count:])


# Mistakes


@pytest.mark.parametrize("arguments, words", [
    (["random"], "--task is missing; it may be knn, linear, attentive, finetune, reconstruct, attention, segment, speed, data, compare"),
    (["random", "--task", "lineal"], "--task 'lineal' is unknown: did you mean linear"),
    (["nowhere.pt", "--task", "knn"], "cannot read nowhere.pt: No such file"),
    (["text", "--task", "knn"], "cannot read text: not a whole PyTorch checkpoint"),
    (["random", "--task", "reconstruct"], "needs a whole pre-trained model, not random"),
    (["{mae}/encoder.pt", "--task", "reconstruct"], "it has an encoder only"),
    (["{mae}/encoder.pt", "--task", "knn", "--model", "tiny"], "--model is for an untrained encoder"),
    (["{mae}/encoder.pt", "--task", "knn", "--image-size", "30"], "multiple of patch_size=4, got 30x30"),
    (["{mae}/checkpoint.pt", "--task", "reconstruct", "--throw-ratio", "0.1"], "--throw-ratio is no argument of mae"),
    (["{mae}/checkpoint.pt", "--task", "reconstruct", "--mask-ratio", "1.5"], "mask_ratio=1.5 leaves"),
    (["{mae}/encoder.pt", "--task", "knn", "--mask-ratio", "0.5"], "--mask-ratio is for --task reconstruct"),
    (["{mae}/encoder.pt", "--task", "knn", "--epochs", "3"], "--epochs is no setting of --task knn"),
    (["{mae}/encoder.pt", "--task", "knn", "--k", "0"], "--k must be positive, got 0"),
    (["{mae}/encoder.pt", "--task", "knn", "--pool", "max"], "--pool 'max' is unknown"),
    (["{mae}/encoder.pt", "--task", "attention", "--query", "65"], "--query 65: it may be 0 (class token) to 64"),
    (["{mae}/encoder.pt", "--task", "attention", "--images", "nowhere.png"], "--images nowhere.png"),
    (["{mae}/encoder.pt", "--task", "attention", "--images", "text"], "--images text: cannot be decoded"),
    (["{mae}/encoder.pt", "--task", "attention", "--output", "text/folder/a.png"], "--output text/folder/a.png: Not a directory"),
    (["{mae}/encoder.pt", "--task", "attention", "--output", "folder"], "--output folder: it is a folder"),
    (["{mae}/encoder.pt", "--task", "attention", "--images", "low.png", "{image}"], "--images low.png: 40x4 pixels, too small"),
    (["{mae}/encoder.pt", "--task", "knn", "--resume"], "--resume is for --task finetune"),
    (["{mae}/encoder.pt", "--task", "finetune", "--resume", "--output", "none.pt"], "--resume: there is no none.pt"),
    (["{mae}/encoder.pt", "--task", "finetune", "--resume", "--output", "{mae}/checkpoint.pt"], "is not of --task finetune"),
    (["{mae}/encoder.pt", "--task", "knn", "--data", "{plain}"], "needs labels"),
    (["{mae}/encoder.pt", "--task", "knn", "--cache-features"], "--cache-features is for --task linear"),
    (["{mae}/checkpoint.pt", "--task", "reconstruct", "--image-size", "64"], "--image-size is for --task knn"),
    (["{mae}/checkpoint.pt", "--task", "reconstruct", "--decoder-dim", "32"], "--decoder-dim: makes another model"),
    (["{mae}/encoder.pt", "--task", "finetune", "--label-smoothing", "2"], "--label-smoothing must be below 1, got 2.0"),
    (["{mae}/encoder.pt", "--task", "linear", "--batch-size", "1", "--data", "{data}"], "--batch-size must be at least 2"),
    (["{mae}/encoder.pt", "--task", "linear", "--base-lr", "1e38", "--data", "{data}"], "no longer finite"),
    (["--task", "knn"], "which checkpoint? Give a file, or `random`"),
    (["{mae}/checkpoint.pt", "--task", "segment"], "--task segment is for runs of rae and rmae"),
    (["{rmae}/checkpoint.pt", "--task", "segment", "--images", "{image}"], "needs hints: --points"),
    (["{rmae}/checkpoint.pt", "--task", "segment", "--images", "{image}", "--points", "40,3"], "outside of the image of 32x32"),
    (["{rmae}/checkpoint.pt", "--task", "segment", "--images", "{image}", "--points", "4"], "a point is x,y in pixels"),
    (["{rmae}/checkpoint.pt", "--task", "segment", "--image-visible", "2"], "--image-visible must be at most 1"),
    (["{rmae}/checkpoint.pt", "--task", "segment", "--regions", "panoptic"], "--regions panoptic: --data shapes has none"),
    (["{mae}/encoder.pt", "--task", "speed"], "--task speed takes no checkpoint, got"),
    (["--task", "compare", "--methods", "rma"], "--methods 'rma' is unknown: did you mean rmae"),
    (["--task", "compare", "--jobs", "0"], "--jobs must be positive, got 0"),
    (["--task", "data", "--image-size", "0", "--data", "{data}"], "--image-size must be positive, got 0"),
    (["--task", "data", "--model", "nano", "--data", "{data}"], "--model is for --task knn"),
    (["--task", "compare", "--relative-position"], "--relative-position is for --task knn"),
    (["--task", "data"], "--data shapes is none: give a folder"),
    (["{mae}/encoder.pt", "--task", "knn", "--limit", "0"], "--limit must be positive, got 0"),
    (["--task", "speed", "--methods", "mea"], "--methods 'mea' is unknown: did you mean mae"),
    (["{mae}/encoder.pt", "--task", "knn", "--dat", "shapes"], "unknown argument --dat: did you mean --data"),
])
def test_a_users_mistake_is_one_line(cli, runs, folder, arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("neither a checkpoint nor an image")
    (tmp_path / "folder").mkdir()
    write_png(torch.zeros(3, 4, 40, dtype=torch.uint8), str(tmp_path / "low.png"))
    places = dict(mae=runs / "mae", rmae=runs / "rmae", image=folder / "val" / "a" / "0.png", plain=folder / "val" / "a", data=folder)
    code, _, err = cli(evaluation, *[a.format(**places) for a in arguments])
    last = err.strip().splitlines()[-1]
    assert code == 2 and words in last and last.startswith("eval.py: error: ") and "Traceback" not in err
