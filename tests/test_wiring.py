"""What train.py hands on: images, masks, rates, settings, maps, tokens. A method that keeps all that reaches
it stands in for the real ones, and the settings of these are compared with their papers."""

import functools
import inspect
import json
import math
import multiprocessing
import os
import re
import warnings

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.io import read_image, write_png
from torchvision.transforms.v2 import functional as TF

import datasets
import mim
import train
from conftest import assert_same_run, equal, interrupted_after, load, log

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)  # ImageNet's


class Probe(torch.nn.Module):
    """A method that keeps what reaches it, and draws a number as others draw masks. Its loss is the mean of
    the images times the sum of all its parameters: that mean is the gradient of each of them."""

    inputs = ("index", "box", "flip", "progress")
    encoder_options = {}
    seen = []  # a dict for each micro-batch

    def __init__(self, encoder, vocab_size: int | None = None):
        super().__init__()
        self.encoder, self.norm_pix, self.vocab_size = encoder, False, vocab_size

    def forward(self, images, **inputs):
        brightness = images.mean()
        loss = brightness * sum(p.sum() for p in self.parameters() if p.requires_grad)
        if self.training:
            precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            state = dict(draw=torch.rand(()).item(), loss=loss.item(), precision=precision,
                         vocab_size=self.vocab_size, workers=len(multiprocessing.active_children()))
            self.seen.append(dict(images=images.clone()) | inputs | state)
        ids = torch.arange(self.encoder.num_patches).expand(len(images), -1)
        return dict(loss=loss, brightness=brightness, ids_visible=ids[:, ::2], ids_masked=ids[:, 1::2],
                    pred=images.new_zeros(len(images), len(ids[0, 1::2]), 3 * self.encoder.patch_size**2))


class RegionProbe(Probe):
    inputs = Probe.inputs + ("regions",)


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


def write_tokenizer(path, seed=0):
    """Writes an untrained tokenizer as a run would -> the tokenizer."""
    torch.manual_seed(seed)
    options = dict(image_size=[16, 16], vocab_size=64, hidden_dim=8, groups=1, blocks_per_group=1)
    dvae = mim.DVAE(**options).eval()
    torch.save(dict(model=dvae.state_dict(), args=dict(options, method="dvae")), path)
    return dvae


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
    other, _ = run("--workers", 1, "--model", "tiny", "--lr", 1e-9, out="other")
    assert same(seen, other) and [batch["workers"] for batch in seen + other] == 12 * [0] + 12 * [1]
    other, _ = run("--seed", 1, out="seed")
    assert not set(draws) & {batch["draw"] for batch in other}
    assert (column(seen, "index") != column(other, "index")).any()

    def one_of_two():
        warnings.simplefilter("error", FutureWarning)  # of DistributedDataParallel, say
        seen, _ = run(out="two")
        torch.save(seen, tmp_path / f"{os.environ['RANK']}.pt")

    codes, _, err = fork(one_of_two, processes=2)
    assert codes == [0, 0], err
    for rank in range(2):
        assert same(seen[rank::2], load(tmp_path / f"{rank}.pt"))  # dealt out in turn


def test_a_run_takes_the_images_and_regions_for_pretraining(run, monkeypatch):
    """STL-10 has 100,000 without labels that no evaluation takes."""
    splits = []
    for name in ("load_data", "open_regions"):
        function = getattr(train, name)

        @functools.wraps(function)
        def note(*arguments, _function=function, **settings):
            bound = inspect.signature(_function).bind(*arguments, **settings).arguments
            splits.append((_function.__name__, bound.get("split")))
            return _function(*arguments, **settings)

        monkeypatch.setattr(train, name, note)
    run("--epochs", 1, "--data", "shapes", "--limit", 8, method="RegionProbe")
    assert splits == [("load_data", "pretrain"), ("open_regions", "pretrain")]


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
    dvae = write_tokenizer(tmp_path / "dvae.pt")
    seen, _ = run("--tokenizer", tmp_path / "dvae.pt")
    assert {batch["vocab_size"] for batch in seen} == {64}
    images, tokens = column(seen, "images"), column(seen, "tokens")
    assert torch.equal(tokens, dvae.tokenize(images, (2, 2)))
    assert not torch.equal(tokens, dvae.tokenize(images * STD[0] + MEAN[0], (2, 2)))


def test_regions_are_cut_as_their_images(run, tmp_path, photos):
    """Silhouettes, and masks of what is bright in them: cut alike, they are what is bright in the crop."""
    for number, path in enumerate(sorted(photos.iterdir())):
        bright = torch.from_numpy(datasets.render_scene(number, 48)[2] > 0)[None]
        write_png(255 * bright.byte().expand(3, -1, -1), str(path))
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


def test_from_a_notebook_the_rate_follows_the_batch_too(run, photos, tmp_path, updates):
    train.pretrain(
        Probe(mim.ViT(16, 8, 16, 1, 2)), datasets.load_data(str(photos)), base_lr=0.64, lr_batch=32,
        batch_size=4, epochs=1, warmup_epochs=0, betas=(0.9, 0.95), crop_scale=(0.2, 1.0), flip=True,
        output=tmp_path)
    assert [step["groups"][0]["lr"] for step in updates] == pytest.approx([0.08, 0.06, 0.02])


def test_the_optimizer_has_the_settings_of_the_run(run, updates):
    run("--weight-decay", 0.3, recipe=dict(betas=(0.7, 0.8)))
    assert [group["weight_decay"] for group in updates[0]["groups"]] == [0.3, 0.0]
    assert {group["betas"] for step in updates for group in step["groups"]} == {(0.7, 0.8)}


class Numbers(torch.utils.data.Dataset):
    """`count` items without images, for `train_epochs`."""

    source = None

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        return dict(broken=-1)


def test_a_group_gets_its_share_of_the_rate():
    """As layer-wise decay has it: SGD with gradient 1 and momentum 0 takes off the rate itself."""
    model = torch.nn.ParameterList(torch.zeros(()) for _ in range(2))
    groups = [dict(params=[model[0]]), dict(params=[model[1]], lr_scale=0.25)]
    *_, (line, _) = train.train_epochs(
        model, torch.optim.SGD(groups, lr=9.0), Numbers(3),
        lambda model, *_: dict(loss=model[0] + model[1]), epochs=2, batch_size=1, accumulate=1,
        peak_lr=1.0, warmup_epochs=0, fall=lambda progress: 10.0 ** (-6 * progress))
    assert [p.item() for p in model] == pytest.approx([-1.11111, -0.2777775])
    assert line["lr"] == pytest.approx(1e-5)


def test_weights_that_are_not_finite_are_not_kept():
    """The loss before the step is."""
    weight = torch.nn.Parameter(torch.ones(()))
    run = train.train_epochs(
        torch.nn.ParameterList([weight]), torch.optim.SGD([weight], lr=1.0), Numbers(1),
        lambda model, *_: dict(loss=10 * model[0]), epochs=1, batch_size=1, accumulate=1,
        peak_lr=1e38, warmup_epochs=0)
    assert next(run)[1]["epoch"] == 0
    with pytest.raises(train.UsageError, match="the weights are not finite, at step 1 "):
        next(run)


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


def settle(*flags, images=1_281_167, size=224):
    """The settings that these flags come to on so many images of this size; by default, of ImageNet."""
    class Source:
        image_size = size

        def __len__(self):
            return images

    return train.settle(train.parse([str(flag) for flag in flags]), Source())


MAE = dict(  # Table 8, §4 and Table 1 of its paper
    model="base", patch_size=16, image_size=[224, 224], epochs=800, batch_size=4096, base_lr=1.5e-4,
    lr_batch=256, lr=2.4e-3, warmup_epochs=40, min_lr=0, betas=(0.9, 0.95), weight_decay=0.05, clip_grad=None,
    lookahead=0, crop_scale=(0.2, 1.0), flip=True,
    mask_ratio=0.75, decoder_dim=512, decoder_depth=8, decoder_heads=16, norm_pix=True)
TRAINING = {name: MAE[name] for name in list(MAE)[:16]}  # without the arguments of the method
SIMMIM = TRAINING | dict(  # its §4.1, and clipping as in its released configuration
    batch_size=2048, base_lr=1e-4, lr_batch=512, lr=4e-4, warmup_epochs=10, betas=(0.9, 0.999), clip_grad=5.0,
    crop_scale=(0.67, 1.0), mask_ratio=0.6, unit_size=2)
BEIT = TRAINING | dict(  # CAE's appendix, which trains BEiT too; clipping, min_lr and crops as in its code
    batch_size=2048, base_lr=1.5e-3, lr_batch=2048, lr=1.5e-3, warmup_epochs=10, min_lr=1e-5,
    betas=(0.9, 0.999), clip_grad=3.0, crop_scale=(0.08, 1.0), mask_ratio=75 / 196, min_block=16)
AMT_ALONE = dict(mask_ratio=None, throw_ratio=None, throw="middle", interval=None)  # None: by the base
RMAE = MAE | dict(  # its §4 and Appendix A
    base_lr=1e-4, lr=1.6e-3, num_regions=8, variant="length", cross_feed="pixel_to_region", region_dim=128,
    region_heads=8, region_decoder_depth=1, regions="fh", region_mask_ratio=None)
PAPERS = {
    ("mae",): MAE,
    ("simmim",): SIMMIM,
    ("beit",): BEIT,
    ("amt",): MAE | AMT_ALONE | dict(epochs=400),  # §4.1
    ("amt", "--base", "simmim"): SIMMIM | AMT_ALONE | dict(epochs=200),
    ("lomar",): TRAINING | dict(  # §3.2, §4.1 and its supplement's §6.1
        epochs=1600, flip=False, mask_ratio=0.8, window_size=7, num_windows=None, norm_pix=True),
    ("objmae",): MAE | dict(  # Tables 1 to 4, §3.2, §4.1; no mask ratio
        model="small", batch_size=128, lr_batch=128, lr=1.5e-4, min_lr=1e-5, betas=(0.9, 0.999), lookahead=5,
        flip=False, decoder_dim=192, decoder_depth=4, decoder_heads=3, norm_pix=False, alpha=0.25,
        alignment="zero", selection="intra", object_floor=0.05, patch_share=0.2, regions="cam"),
    ("rae",): {name: value for name, value in RMAE.items() if name in TRAINING or "region" in name
               or name in ("mask_ratio", "variant")},
    ("rmae",): RMAE,
    ("cae",): BEIT | dict(  # Appendix A, Table 6
        warmup_epochs=20, mask_ratio=0.5, regressor_depth=4, decoder_depth=4, alignment_weight=2.0,
        norm_pix=True),
    ("dvae",): TRAINING | dict(  # DALL-E's Appendix A.2
        image_size=[112, 112], epochs=50, batch_size=512, base_lr=1e-4, lr_batch=512, lr=1e-4,
        warmup_epochs=0, min_lr=1.25e-6, betas=(0.9, 0.999), weight_decay=1e-4, vocab_size=8192,
        hidden_dim=256, groups=4, blocks_per_group=2, kl_weight=2.0, tau_start=1.0, tau_end=1 / 16),
}
ELSEWHERE = {  # settings without a value of a paper; the table of flags below has these
    "data", "limit", "accumulate", "loader", "compile", "seed", "device", "precision", "workers", "output",
    "resume", "overwrite", "prepare", "fh_scales", "region_cache", "cam_weights", "cam_labels", "tokenizer",
    "method", "base", "num_images", "save_every"}


@pytest.mark.parametrize("flags", PAPERS, ids=" ".join)
def test_every_value_of_a_recipe_is_the_papers(flags):
    settings = settle("--method", *flags, "--data", "imagenet")
    expected = dict(PAPERS[flags])
    if flags == ("objmae",):
        del expected["mask_ratio"]
    if flags == ("dvae",):
        del expected["model"], expected["patch_size"]
    assert settings.keys() - ELSEWHERE == expected.keys()
    for name, value in expected.items():
        assert settings[name] == (pytest.approx(value) if isinstance(value, float) else value), name


SMALL = dict(  # ours, for images of up to 96 pixels
    model="tiny", patch_size=4, epochs=200, batch_size=512, base_lr=1e-3, lr_batch=256, lr=2e-3,
    warmup_epochs=10, decoder_dim=192, decoder_depth=4, decoder_heads=3)
NANO = dict(  # for the scenes, and for --model nano
    model="nano", patch_size=8, epochs=5, batch_size=64, base_lr=4e-3, lr_batch=256, lr=1e-3,
    warmup_epochs=0.5, decoder_dim=64, decoder_depth=2, decoder_heads=2)
SCENES = dict(norm_pix=False)


@pytest.mark.parametrize("flags, images, size, expected", [
    ("mae --data cifar10", 50_000, 32, MAE | SMALL),
    ("mae --data cifar10 --model nano", 50_000, 32, MAE | NANO | dict(patch_size=4)),
    ("mae", 4096, 64, MAE | NANO | SCENES),
    ("mae --model base", 4096, 64, MAE | NANO | SCENES | dict(model="base")),
    ("mae --model nano --data x", 8192, 64, MAE | NANO),
    ("lomar --data stl10", 105_000, 96, dict(window_size=5, patch_size=12, base_lr=1e-3, flip=False)),
    ("lomar", 4096, 64, dict(window_size=5, base_lr=4e-3)),
    ("lomar --patch-size 16", 4096, 64, dict(window_size=4)),  # no window is larger than the grid
    ("lomar --data x --image-size 32 64", 8192, 300, dict(window_size=4)),
    ("lomar --data x --image-size 64 128", 8192, 300, dict(window_size=4)),
    ("amt", 4096, 64, MAE | NANO | SCENES | AMT_ALONE),
    ("mae --norm-pix", 4096, 64, MAE | NANO),
    ("rmae", 4096, 64, RMAE | NANO | SCENES | dict(region_dim=64, regions="instances")),
    ("rae", 4096, 64, dict(region_dim=64, base_lr=5e-4, lr=1.25e-4, regions="instances")),
    ("rae --data cifar10", 50_000, 32, dict(region_dim=128, base_lr=5e-4, lr=1e-3, regions="fh")),
    ("dvae", 4096, 64, dict(epochs=5, batch_size=32, base_lr=3e-3, lr_batch=32, lr=3e-3, warmup_epochs=0,
                              hidden_dim=32, groups=3, vocab_size=512, image_size=[64, 64])),
    ("mae --data x", 8192, 96, MAE | SMALL | dict(patch_size=12)),
    ("mae --data x", 4096, 97, MAE | dict(batch_size=256, lr=1.5e-4)),
    ("mae --data x --image-size 32 64", 8192, 300, MAE | SMALL | dict(patch_size=8)),
])
def test_recipes_shrink_for_small_images(flags, images, size, expected):
    settings = settle("--method", *flags.split(), images=images, size=size)
    given = [int(n) for n in flags.split("--image-size")[1].split()] if "--image-size" in flags else 2 * [size]
    for name, value in (expected | dict(image_size=given)).items():
        assert settings[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_a_floor_of_objects_is_not_for_the_class_activation_maps_that_are_the_default():
    with pytest.raises(datasets.UsageError, match="--object-floor has no effect with --regions cam"):
        settle("--method", "objmae", "--data", "x", "--object-floor", "0.1")
    floor = settle("--method", "objmae", "--data", "x", "--object-floor", "0.1", "--regions", "fh")
    assert floor["object_floor"] == 0.1


@pytest.mark.parametrize("flags, expected", [
    ("--epochs 80", dict(warmup_epochs=8)),  # a shorter run warms up for the share of the next longer, 400,
    ("--epochs 1600", dict(warmup_epochs=40)),  # a longer one for as long
    ("--epochs 80 --warmup-epochs 9", dict(warmup_epochs=9)),
    ("--batch-size 1024", dict(lr=6e-4, accumulate=4)),
    ("--batch-size 1024 --accumulate 8", dict(lr=6e-4, accumulate=8)),
    ("--base-lr 1e-3", dict(lr=0.016)),
    ("--lr 0.1", dict(lr=0.1, batch_size=4096, accumulate=16)),
    ("--lr 1e-6 --min-lr 1e-6", dict(lr=1e-6, min_lr=1e-6)),
    ("--weight-decay 0 --clip-grad 2 --model huge --patch-size 14",
     dict(weight_decay=0, clip_grad=2, model="huge", patch_size=14))])
def test_what_the_user_gives_comes_before_the_recipe(flags, expected):
    settings = settle("--method", "mae", "--data", "imagenet", *flags.split())
    assert {name: settings[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("flags, expected", [
    ("mae", {200: 20, 400: 40, 800: 40, 1600: 40}),  # Table 8, and AMT's baseline of 400
    ("simmim", {50: 5, 100: 10, 200: 10, 800: 10, 1600: 10}),
    ("amt", {400: 40, 200: 20, 800: 40}), ("amt --base simmim", {200: 10, 100: 10}),  # §4.1
    ("lomar", {400: 10, 800: 20, 1600: 40}),  # §6.1: 2.5%
    ("objmae", {300: 40, 800: 40}),  # Table 3
    ("rmae", {800: 40, 1600: 40, 4000: 40}),
    ("cae", {150: 5, 300: 10, 400: 10, 800: 20, 1600: 40, 2000: 40}),  # Appendix A
    ("beit --tokenizer x", {300: 10, 800: 10, 400: 5}),
    ("dvae", {10: 0, 100: 0}),
])
def test_warm_ups_of_other_lengths_are_the_papers(flags, expected):
    settled = {n: settle("--method", *flags.split(), "--data", "imagenet", "--epochs", n) for n in expected}
    assert {n: settings["warmup_epochs"] for n, settings in settled.items()} == pytest.approx(expected)


@pytest.mark.parametrize("images, flags, batch, rate", [
    # 62 photographs: a batch of 32 would make one step an epoch, at a rate of 1.9e-5.
    (62, "", 8, 1.5e-4), (20_000, "", 1250, 1250 / 256 * 1.5e-4), (65_535, "", 4095, 4095 / 256 * 1.5e-4),
    (65_536, "", 4096, 2.4e-3), (62, "--batch-size 32", 32, 1.5e-4 / 8),  # what the user says is done
    (62, "--lr 0.1", 8, 0.1), (62, "--base-lr 0.1", 8, 0.1)])
def test_few_images_get_a_batch_and_a_rate_that_train(images, flags, batch, rate, capsys):
    settings = settle("--method", "mae", "--data", "x", *flags.split(), images=images)
    assert (settings["batch_size"], settings["accumulate"]) == (batch, math.ceil(batch / 256))
    assert settings["lr"] == pytest.approx(rate)
    said, chosen = capsys.readouterr().out, batch in (32, 4096)
    told = f"few for the recipe's batch of 4096: taking {batch}, and a learning rate of {rate:.3g};"
    assert (f"{images} images are {told}" in said) != chosen


@pytest.mark.parametrize("images, epochs", [(3, 1), (3, 5), (64, 1)])
def test_a_run_of_few_steps_learns(images, epochs):
    settings = settle("--method", "mae", "--epochs", epochs, images=images, size=64)
    assert settings["batch_size"] == min(images, 8)
    steps = epochs * (images // settings["batch_size"])
    warmup = settings["warmup_epochs"] * steps / epochs
    assert sum(train.learning_rate(step, steps, warmup, settings["lr"]) for step in range(steps)) > 0


def test_the_smallest_rate_of_a_recipe_is_no_higher_than_the_peak():
    settings = settle("--method", "cae", "--data", "x", "--batch-size", 8)
    assert settings["min_lr"] == settings["lr"] == pytest.approx(1.5e-3 * 8 / 2048)


@pytest.mark.parametrize("method", ["mae", "simmim", "beit", "cae", "lomar", "objmae", "rmae"])
@pytest.mark.parametrize("model", ["base", "large", "huge"])
def test_an_encoder_is_made_as_its_paper_does(monkeypatch, method, model):
    """SimMIM's released configuration and CAE's Appendix A: layer scale 0.1, for large models 1e-5, and drop
    path 0.1. LoMaR: relative positions."""
    monkeypatch.setitem(mim.SIZES, model, dict(embed_dim=48, depth=2, num_heads=3))
    settings = settle("--method", method, "--data", "x", "--model", model) | dict(vocab_size=None)
    small = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2, region_dim=16, region_heads=2)
    if method == "beit":
        small["vocab_size"] = 8
    encoder = train.build_method(**settings | small).encoder
    scaled = method in ("simmim", "beit", "cae")
    for block in encoder.blocks:
        gammas = [p for name, p in block.named_parameters() if name.endswith("gamma")]
        assert len(gammas) == 2 * scaled
        assert all(torch.allclose(gamma, torch.tensor(0.1 if model == "base" else 1e-5)) for gamma in gammas)
    assert (encoder.drop_path, encoder.relative_position) == (0.1 * scaled, method == "lomar")
    assert (encoder.embed_dim, encoder.patch_size, encoder.image_size) == (48, 16, (224, 224))


# ---------------------------------------------------------------------------------------------------------
# Flags: every flag of every method, with a value other than its own


SAME = "changes nothing: "  # and why
# A pair is a value, and what the run has with it and without.
SHARED = {  # the flags of all methods, tried with MAE
    "data": "{other}", "limit": "6", "epochs": "2", "batch-size": "3", "accumulate": "2", "lr": "0.01",
    "base-lr": "0.01", "warmup-epochs": "0", "min-lr": "1e-5", "weight-decay": "0.9", "lookahead": "1",
    "clip-grad": "0.001", "seed": "1", "precision": "bf16", "output": "elsewhere", "image-size": "24",
    "model": "tiny", "patch-size": "8", "loader": ("device", "--data shapes --limit 8"),
    "compile": SAME + "it is faster; test_train.py compares the numbers",
    "save-every": SAME + "files beside encoder.pt; see test_train.py",
    "device": SAME + "there is only the CPU",
    "workers": SAME + "they are to make the same batches",
    "resume": SAME + "there is nothing to resume; see test_train.py",
    "overwrite": SAME + "there is nothing to overwrite; see test_train.py",
    "prepare": SAME + "without regions it is a mistake; see test_train.py"}
DECODER = {"decoder-dim": "16", "decoder-depth": "1", "decoder-heads": "4"}
REGIONS = {
    "regions": "{masks}", "fh-scales": "30", "region-cache": "elsewhere", "prepare": "yes",
    "cam-weights": SAME + "cam is for objmae",
    "cam-labels": SAME + "the labels must be ImageNet's; see test_datasets.py"}
RAE = REGIONS | {"mask-ratio": "0.5", "region-mask-ratio": "0.5", "num-regions": "3", "variant": "batch",
                 "region-dim": "32", "region-heads": "4", "region-decoder-depth": "2"}
BLOCKS = {"mask-ratio": "0.6", "min-block": "4", "tokenizer": "{tokenizer}"}
AMT_OWN = {"mask-ratio": "0.3", "throw-ratio": "0.2", "throw": "low", "interval": "2"}
OWN = {  # a method with what all of its runs have -> its other flags
    "mae": DECODER | {"mask-ratio": "0.5", "norm-pix": "no"},
    "simmim": {"mask-ratio": "0.5", "unit-size": "1"},
    "amt --interval 1 --epochs 2": DECODER | AMT_OWN | {"norm-pix": "no", "base": "simmim"},
    "amt --interval 1 --epochs 2 --base simmim": AMT_OWN | {"unit-size": "1", "base": "mae"},
    "lomar": {"mask-ratio": "0.5", "window-size": "3", "num-windows": "1", "norm-pix": "no",
              "tokenizer": "{tokenizer}"},
    "beit --tokenizer {other_tokenizer}": BLOCKS,
    "cae": BLOCKS | {"regressor-depth": "1", "decoder-depth": "1", "alignment-weight": "1", "norm-pix": "no"},
    "objmae --regions fh --region-cache {cache} --workers 0": REGIONS | DECODER | {
        "cam-weights": ("{tokenizer}", "--regions cam"), "alpha": "0.1", "alignment": "random",
        "selection": "inter", "object-floor": "0.9", "patch-share": "0.9", "norm-pix": "yes"},
    "rae --regions fh --region-cache {cache} --workers 0": RAE,
    "rmae --regions fh --region-cache {cache} --workers 0": RAE | DECODER | {
        "cross-feed": "both", "norm-pix": "no"},
    "dvae --hidden-dim 8 --vocab-size 16 --groups 2 --blocks-per-group 1": {
        "vocab-size": "32", "hidden-dim": "12", "groups": "3", "blocks-per-group": "2", "kl-weight": "0",
        "tau-start": "0.5", "tau-end": "0.5"},
}


@pytest.fixture(scope="module")
def paths(photos, tmp_path_factory):
    """What the tables name in braces."""
    root = tmp_path_factory.mktemp("paths")
    for i, path in enumerate(sorted(photos.iterdir())):
        for name in ("images", "other", "masks"):
            (root / name).mkdir(exist_ok=True)
        image = read_image(str(path))
        mask = (image.float().mean(0, keepdim=True) > 120).byte()
        if i < 8:
            write_png(image, str(root / "images" / path.name))
            write_png(mask, str(root / "masks" / path.name))
        else:
            write_png(image, str(root / "other" / path.name))
    for seed, name in enumerate(("tokenizer", "other_tokenizer")):
        write_tokenizer(root / name, seed)
    return {path.name: path for path in root.iterdir()} | {"cache": root / "cache"}


@pytest.fixture
def effect(cli, paths, tmp_path, monkeypatch):
    """effect(method and flags) -> what a run leaves: the names of its files, and what is in its log and
    checkpoint.pt, except for the speeds and the settings."""
    monkeypatch.setitem(mim.SIZES, "nano", dict(embed_dim=16, depth=1, num_heads=2))
    monkeypatch.setitem(mim.SIZES, "tiny", dict(embed_dim=16, depth=2, num_heads=2))
    monkeypatch.setattr(train, "draw_examples", lambda *_: None)  # for speed
    monkeypatch.setattr(datasets, "open_cam", lambda weights, *_: lambda batch: [
        255 * (torch.eye(4)[None] if weights else torch.ones(1, 4, 4)) for _ in batch["index"]])

    def run(command):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        monkeypatch.chdir(folder)
        method, *flags = command.format(**paths).split()
        size = ["--image-size", 32, *["--model", "nano", "--patch-size", 4][:4 * (method != "dvae")]]
        base = ["--method", method, "--data", paths["images"], "--batch-size", 4, "--epochs", 1, *size]
        code, _, err = cli(train, *base, *flags)
        assert code == 0, err
        files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
        left = {str(name): None for name in files}
        for name, path in files.items():
            if name.name == "checkpoint.pt":
                state = load(path)
                left[str(name)] = {key: state[key] for key in state if key != "args"}
            elif name.name == "log.jsonl":
                left[str(name)] = log(path.parent)
        return left

    return run


@pytest.mark.parametrize("method", OWN)
def test_every_flag_changes_the_run(method, effect, cli, capsys):
    """Or the table says why it does not. The flags that all methods share are tried with MAE alone."""
    name = method.split()[0]
    with pytest.raises(SystemExit):
        cli(train, "--method", *method.split(), "--help")
    has = set(re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.MULTILINE)) - {"method"}
    table = SHARED | OWN[method]
    assert has == table.keys() - ({"model", "patch-size"} if name == "dvae" else set())
    before = effect(method)
    for flag, value in (table if name == "mae" else OWN[method]).items():
        value, both = (value, "") if isinstance(value, str) else value
        if not value.startswith(SAME):
            flags = {"yes": f"--{flag}", "no": f"--no-{flag}"}.get(value, f"--{flag} {value}")
            without = effect(f"{method} {both}") if both else before
            assert not equal(effect(f"{method} {both} {flags}"), without), flags


MAY_CHANGE = {"data", "tokenizer", "device", "precision", "workers", "compile", "output", "resume",
              "overwrite", "region-cache", "cam-weights", "prepare", "epochs", "save-every"}


def test_a_resumed_run_refuses_what_would_make_it_another(cli, effect, paths, tmp_path):
    effect("mae --output " + str(tmp_path / "run"))
    again = ["--method", "mae", "--data", paths["images"], "--output", tmp_path / "run", "--resume"]
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for flag, value in (SHARED | OWN["mae"]).items():
        if flag not in MAY_CHANGE:
            value = [] if value == "no" else value[0] if isinstance(value, tuple) else value
            code, _, err = cli(train, *again, *([f"--{flag}", value] if value else [f"--no-{flag}"]))
            assert code == 2 and f"--{flag} " in err and "the run to resume was made with" in err, (flag, err)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
