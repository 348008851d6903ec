"""What train.py hands on: images, masks, rates, settings, maps, tokens. A method that keeps all that reaches
it stands in for the real ones, and the settings of these are compared with their papers."""

import json
import math
import os
import re

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.io import read_image, write_png
from torchvision.transforms.v2 import functional as TF

import datasets
import mim
import train
from conftest import assert_same_run, interrupted_after, load, log

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)  # ImageNet's


class Probe(torch.nn.Module):
    """A method that keeps what reaches it, and draws a number as others draw masks. Its loss is the mean of
    the images times the sum of all its parameters: that mean is the gradient of each of them."""

    inputs = ("index", "box", "flip", "progress")
    encoder_options = {}
    seen = []  # a dict for each micro-batch

    def __init__(self, encoder, vocab_size: int | None = None):
        super().__init__()
        self.encoder, self.norm_pix = encoder, False

    def forward(self, images, **inputs):
        brightness = images.mean()
        loss = brightness * sum(p.sum() for p in self.parameters() if p.requires_grad)
        if self.training:
            precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            state = dict(draw=torch.rand(()).item(), loss=loss.item(), precision=precision)
            self.seen.append(dict(images=images.clone()) | inputs | state)
        ids = torch.arange(self.encoder.num_patches).expand(len(images), -1)
        return dict(loss=loss, brightness=brightness, ids_visible=ids[:, ::2], ids_masked=ids[:, 1::2],
                    pred=images.new_zeros(len(images), len(ids[0, 1::2]), 3 * self.encoder.patch_size**2))


class RegionProbe(Probe):
    inputs = Probe.inputs + ("regions",)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """12 images of 44 x 32 pixels: no square, so that a crop, the centre and the whole differ."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(12):
        image = torch.from_numpy(datasets.render_scene(i, 48)[0])[:, 2:46, :32].contiguous()
        write_png(image, str(root / f"{i:02d}.png"))
    return root


@pytest.fixture
def run(cli, photos, tmp_path, monkeypatch):
    """run(*flags, method=Probe, recipe={}, out="run") trains for 2 epochs of 3 steps of 2 micro-batches of 2
    images of 16 x 16 pixels -> (what reached the method, folder of the run)."""
    monkeypatch.setitem(mim.SIZES, "nano", dict(embed_dim=16, depth=1, num_heads=2))
    for method in (Probe, RegionProbe):
        monkeypatch.setitem(mim.METHODS, method.__name__, method)

    def call(*flags, method="Probe", recipe={}, out="run", data=photos, code=0):
        Probe.seen.clear()
        if method in ("Probe", "RegionProbe"):
            monkeypatch.setitem(train.RECIPES, method, train.RECIPES["mae"] | recipe)
        base = ["--data", data, "--model", "nano", "--image-size", 16, "--patch-size", 8, "--epochs", 2,
                "--batch-size", 4, "--accumulate", 2]
        result = cli(train, "--method", method, *base, "--output", tmp_path / out, *flags)
        assert result[0] == code, result
        return list(Probe.seen), tmp_path / out

    return call


@pytest.fixture
def updates():
    """A dict for each step that an optimizer takes: its groups' settings, and the gradients it steps with."""
    found = []

    def note(optimizer, *_):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        scale = getattr(optimizer, "grad_scale", None)  # a scaler leaves this division to a fused optimizer
        grads = [p.grad.clone() / (1 if scale is None else scale)
                 for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found.append(dict(groups=groups, grads=torch.cat([grad.flatten() for grad in grads])))

    handle = register_optimizer_step_pre_hook(note)
    yield found
    handle.remove()


def column(seen, name):
    """What the micro-batches had under a name, one after the other."""
    return torch.cat([batch[name] for batch in seen])


def same(one, other):
    """Whether the same images, with the same draws, reached the method twice."""
    return len(one) == len(other) and all(
        torch.equal(a["images"], b["images"]) and a["draw"] == b["draw"] for a, b in zip(one, other))


# ---------------------------------------------------------------------------------------------------------
# Images, their order, and the draws of a step


@pytest.mark.parametrize("recipe", [dict(crop_scale=(0.2, 1.0), flip=True),
                                    dict(crop_scale=(0.4, 0.5), flip=False)])
def test_images_reach_the_method_cropped_flipped_and_normalised(run, photos, recipe):
    seen, _ = run("--seed", 3, recipe=recipe)
    source = datasets.load_data(str(photos))
    crops = datasets.Images(source, 16, "crop", recipe["crop_scale"], recipe["flip"], seed=3)
    for number, batch in enumerate(seen):
        for i, index in enumerate(batch["index"].tolist()):
            item = crops[number // 6, index]  # a crop depends on the epoch and the image's number
            expected = (item["image"] / 255 - MEAN[0]) / STD[0]
            assert torch.allclose(batch["images"][i], expected, atol=1e-5)
            assert torch.equal(batch["box"][i], item["box"]) and batch["flip"][i] == item["flip"]
    x1, y1, x2, y2 = column(seen, "box").unbind(1)
    area, (low, high) = (x2 - x1) * (y2 - y1), recipe["crop_scale"]
    assert low - 0.03 < area.min() and area.max() < high + 0.03 and area.max() - area.min() > (high - low) / 2
    assert column(seen, "flip").any() == recipe["flip"] and not column(seen, "flip").all()


def test_every_epoch_sees_all_images_in_another_order(run):
    seen, _ = run()
    index = column(seen, "index").view(2, 12)
    assert torch.equal(index.sort(1).values, torch.arange(12).expand(2, -1))
    assert not torch.equal(index[0], index[1])
    boxes = column(seen, "box").view(2, 12, 4)
    first, second = (box[place] for box, place in zip(boxes, index.argsort(1)))
    assert (first != second).any(1).all()  # another crop of each image


def test_a_step_takes_its_share_of_the_images(run):
    """Of 12 images in batches of 5, 10 make an epoch; of a batch of 5 in 2 micro-batches, 4 make a step."""
    seen, output = run("--batch-size", 5, "--accumulate", 1, "--epochs", 1)
    assert [len(batch["images"]) for batch in seen] == [5, 5]
    assert len(column(seen, "index").unique()) == 10 and log(output)[0]["step"] == 2
    seen, output = run("--batch-size", 5, "--epochs", 1, out="cut")
    assert [len(batch["images"]) for batch in seen] == 6 * [2] and log(output)[0]["step"] == 3


def test_the_draws_of_a_step_depend_on_seed_step_and_micro_batch_alone(run, fork, tmp_path):
    seen, _ = run()
    draws = [batch["draw"] for batch in seen]
    assert len(draws) == 12 and len(set(draws)) == 12  # of every epoch, step and micro-batch
    torch.manual_seed(5)
    assert same(seen, run("--workers", 1, "--model", "tiny", "--lr", 1e-9, out="other")[0])
    other, _ = run("--seed", 1, out="seed")
    assert not set(draws) & {batch["draw"] for batch in other}
    assert (column(seen, "index") != column(other, "index")).any()

    def one_of_two():
        seen, _ = run(out="two")
        torch.save(seen, tmp_path / f"{os.environ['RANK']}.pt")

    codes, _, err = fork(one_of_two, processes=2)
    assert codes == [0, 0], err
    for rank in range(2):
        assert same(seen[rank::2], load(tmp_path / f"{rank}.pt"))  # dealt out in turn


def test_a_resumed_run_goes_on_with_the_draws_of_the_next_step(run):
    whole, _ = run("--epochs", 3, out="whole")
    first, _ = run("--epochs", 2)
    later, _ = run("--epochs", 3, "--resume")
    assert same(whole, first + later)


def test_progress_runs_from_0_to_1_over_the_whole_run(run):
    seen, _ = run("--epochs", 4)
    progress = torch.stack([batch["progress"] for batch in seen])
    assert torch.allclose(progress, torch.arange(12).repeat_interleave(2) / 12)


def test_tokens_are_those_of_the_images_that_the_method_gets(run, tmp_path):
    torch.manual_seed(0)
    options = dict(image_size=16, vocab_size=64, hidden_dim=8, groups=1, blocks_per_group=1)
    dvae = mim.DVAE(**options).eval()
    torch.save(dict(model=dvae.state_dict(), args=dict(options, method="dvae", image_size=[16, 16])),
               tmp_path / "dvae.pt")
    seen, _ = run("--tokenizer", tmp_path / "dvae.pt")
    images, tokens = column(seen, "images"), column(seen, "tokens")
    assert torch.equal(tokens, dvae.tokenize(images, (2, 2)))
    assert not torch.equal(tokens, dvae.tokenize(images * STD[0] + MEAN[0], (2, 2)))


def test_regions_are_cut_as_their_images(run, tmp_path, photos):
    """Masks of what is bright lie beside the images: cut alike, they are what is bright in the crop."""
    for path in sorted(photos.iterdir()):
        bright = read_image(str(path)).float().mean(0, keepdim=True) > 120
        (tmp_path / "masks").mkdir(exist_ok=True)
        write_png(bright.byte(), str(tmp_path / "masks" / path.name))
    seen, _ = run("--regions", tmp_path / "masks", method="RegionProbe")
    images, regions = column(seen, "images"), torch.cat([batch["regions"][:, 0] for batch in seen])
    bright = (images * STD[0] + MEAN[0]).mean(1) > 120 / 255
    assert 0.1 < bright.float().mean() < 0.9
    assert ((regions > 0) == bright).float().mean() > 0.95
    assert ((regions.flip(-1) > 0) == bright).float().mean() < 0.9


# ---------------------------------------------------------------------------------------------------------
# Rates, gradients, precision, and what is kept


def test_the_rate_of_every_step_by_hand(run, updates):
    """Six steps, of which two warm up from 0 to the peak; then a half-cosine to the smallest rate."""
    run("--lr", 0.4, "--warmup-epochs", 2 / 3, "--min-lr", 0.1)
    fall = [0.1 + 0.3 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    rates = [group["lr"] for step in updates for group in step["groups"]]
    assert rates == pytest.approx([0, 0, 0.2, 0.2, *[rate for rate in fall for _ in range(2)]])


def test_the_last_rate_of_an_epoch_is_logged_with_the_means_of_its_losses(run, updates):
    seen, output = run("--lr", 0.4, "--warmup-epochs", 0)
    lines = log(output)
    for number, line in enumerate(lines):
        batches = seen[6 * number:6 * number + 6]
        assert line["loss"] == pytest.approx(sum(batch["loss"] for batch in batches) / 6, rel=1e-5)
        assert line["brightness"] == pytest.approx(column(batches, "images").mean().item(), rel=1e-5)
        assert line["lr"] == pytest.approx(updates[3 * number + 2]["groups"][0]["lr"])
        assert (line["epoch"], line["step"]) == (number + 1, 3 * number + 3)


def test_images_per_second(run, monkeypatch):
    """With a clock that goes on by a quarter of a second in each micro-batch, and at nothing else."""
    monkeypatch.setattr(train.time, "perf_counter", lambda: len(Probe.seen) / 4)
    _, output = run()
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [(line["images_per_s"], line["seconds"]) for line in lines] == [(8.0, 1.5)] * 2


@pytest.mark.parametrize("flags, recipe, peak", [
    (["--base-lr", 0.64], {}, 0.64 * 4 / 256),
    (["--base-lr", 0.64], dict(lr_batch=128), 0.64 * 4 / 128),
    ([], dict(base_lr=0.32, lr_batch=8), 0.16),
    (["--lr", 0.3], dict(base_lr=0.32, lr_batch=8), 0.3)])
def test_the_peak_rate_follows_the_batch(run, updates, flags, recipe, peak, monkeypatch):
    monkeypatch.setattr(train, "SMALL", 0)  # these images too have the recipe's rate
    run(*flags, "--warmup-epochs", 0, recipe=recipe)
    assert updates[0]["groups"][0]["lr"] == pytest.approx(peak)


def test_the_optimizer_has_the_settings_of_the_run(run, updates):
    run("--weight-decay", 0.3, recipe=dict(betas=(0.7, 0.8)))
    assert [group["weight_decay"] for group in updates[0]["groups"]] == [0.3, 0.0]
    assert {group["betas"] for step in updates for group in step["groups"]} == {(0.7, 0.8)}


def test_a_group_gets_its_share_of_the_rate():
    """As layer-wise decay has it: SGD with gradient 1 and momentum 0 takes off the rate itself."""
    model = torch.nn.ParameterList(torch.zeros(()) for _ in range(2))
    groups = [dict(params=[model[0]]), dict(params=[model[1]], lr_scale=0.25)]
    line = train.train_epoch(
        model, [None] * 3, torch.optim.SGD(groups, lr=9.0),
        lambda model, batch, step: dict(loss=model[0] + model[1]),
        epoch=1, epochs=2, steps=3, lr=lambda step: 10.0**-step, batch_size=1, accumulate=1,
        scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert [p.item() for p in model] == pytest.approx([-1.11e-3, -0.2775e-3]) and line["lr"] == 1e-5


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_is_the_mean_over_its_batch_clipped_to_the_norm(run, updates, precision):
    """A probe's gradient is the brightness of its images. All parameters of a step have the same."""
    flags = ["--precision", precision, "--warmup-epochs", 0]
    free, _ = run(*flags, out="free")
    expected = [column(free[i:i + 2], "images").mean().item() for i in range(0, 12, 2)]
    rel = 1e-4 if precision == "fp32" else 2e-2
    for step, brightness in zip(updates, expected):
        assert step["grads"].mean().item() == pytest.approx(brightness, rel=rel)
        assert step["grads"].std() < rel * abs(brightness)
    norms = [step["grads"].norm().item() for step in updates]
    limit = sorted(norms)[2]  # half of the steps have more
    updates.clear()
    run(*flags, "--clip-grad", limit, out="clipped")
    assert [step["grads"].norm().item() for step in updates] == pytest.approx(
        [min(norm, limit) for norm in norms], rel=rel)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16),
                                              ("fp16", torch.float16)])
def test_a_run_has_its_precision_and_a_scaler_for_fp16_alone(run, precision, dtype):
    seen, output = run("--precision", precision, "--epochs", 1)
    assert {batch["precision"] for batch in seen} == {dtype}
    run("--precision", precision, "--resume")
    scaler = load(output / "checkpoint.pt")["scaler"]
    assert scaler.get("_growth_tracker") == (6 if precision == "fp16" else None)  # it counts steps


def test_lookahead_is_on_where_the_recipe_or_the_user_says(run):
    """Its slow weights start at the first weights; every second step goes half of the way, and back."""
    flags = ["--lr", 0.1, "--warmup-epochs", 0, "--weight-decay", 0, "--epochs", 1, "--batch-size", 6]
    _, plain = run(*flags, out="plain")
    _, ahead = run(*flags, recipe=dict(lookahead=2), out="ahead")
    _, off = run(*flags, "--lookahead", 0, recipe=dict(lookahead=2), out="off")
    torch.manual_seed(0)
    first = train.build_method("Probe", [16, 16], model="nano", patch_size=8).state_dict()
    plain, ahead, off = (load(output / "checkpoint.pt")["model"] for output in (plain, ahead, off))
    for name in first:
        assert torch.equal(plain[name], off[name])
        assert torch.allclose(ahead[name], (first[name] + plain[name]) / 2, atol=1e-6)
    assert any(not torch.equal(first[name], plain[name]) for name in first)


def test_encoder_pt_is_the_encoder_of_the_checkpoint_after_every_epoch(run, saved):
    run("--epochs", 3, "--lr", 0.1)
    assert [state["epoch"] for state, _ in saved] == [0, 1, 2, 3] and saved[0][1] is None
    for state, encoder in saved[1:]:
        own = {name.removeprefix("encoder."): value for name, value in state["model"].items()}
        assert own.keys() == encoder.keys() and all(torch.equal(own[name], encoder[name]) for name in own)
    assert not torch.equal(saved[1][1]["cls_token"], saved[3][1]["cls_token"])


# ---------------------------------------------------------------------------------------------------------
# AMT's maps


AMT = ["--epochs", 5, "--interval", 2, "--decoder-dim", 16, "--decoder-depth", 1, "--decoder-heads", 2]


def test_maps_are_of_whole_normalised_images_and_renewed_after_every_interval(run, saved, photos):
    run(*AMT, "--patch-size", 4, method="amt")
    maps = [state["maps"] for state, _ in saved]
    assert [m is None for m in maps] == [True, True, True, False, False, False]  # epochs 0, 1 and 2 are done
    assert torch.equal(maps[3], maps[4]) and not torch.equal(maps[4], maps[5])
    images = torch.stack([read_image(str(path)) for path in sorted(photos.iterdir())])
    whole = (TF.resize(images, [16, 16], TF.InterpolationMode.BICUBIC).float() / 255 - MEAN) / STD
    vit = mim.ViT(16, 4, **mim.SIZES["nano"])
    for epochs in (2, 4):
        vit.load_state_dict(saved[epochs][1])
        assert torch.allclose(maps[epochs + 1].float(), mim.attention_map(vit, whole), atol=2e-3)


def test_maps_are_those_of_the_images_that_are_masked(run, monkeypatch):
    """The maps are cut by the number, the crop and the flip of each image."""
    calls, cut = [], mim.crop_maps

    def note(maps, box, flip, size):
        if len(box) == 2:  # a micro-batch, and no picture
            calls.append((maps, box, flip))
        return cut(maps, box, flip, size)

    monkeypatch.setattr(mim, "crop_maps", note)
    probes, _ = run("--epochs", 3, out="probe")
    _, output = run(*AMT, "--epochs", 3, method="amt")
    maps = load(output / "checkpoint.pt")["maps"]
    assert len(calls) == 6  # the micro-batches of the last epoch
    for batch, (cropped, box, flip) in zip(probes[12:], calls):
        assert torch.equal(cropped, maps[batch["index"]])
        assert torch.equal(box, batch["box"]) and torch.equal(flip, batch["flip"])


def test_a_run_resumed_between_two_updates_has_the_maps_of_the_first(run, saved):
    """No update follows: a run that lost its maps would draw random masks, and end with other weights."""
    _, whole = run(*AMT, "--epochs", 4, method="amt", out="whole")
    with interrupted_after(3):
        run(*AMT, "--epochs", 4, method="amt", code=130)
    _, output = run(*AMT, "--resume", "--epochs", 4, method="amt")
    assert_same_run(whole, output)


# ---------------------------------------------------------------------------------------------------------
# Settings
