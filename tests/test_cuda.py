"""The CUDA path, on machines without a GPU too.

A fake tensor has a shape, a type and a device, but no values. An operation that mixes devices or types fails
as on a GPU, and every place where the CPU would wait for the GPU is seen, as there is no value to wait for.
Such a wait costs nothing but speed, so no other test would notice it.
"""

import contextlib
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torchvision.ops import StochasticDepth, roi_align
from torchvision.transforms import v2

import datasets
import eval as evaluation
import mim
import train
from conftest import ROOT

CUDA, SIZE, GRID = torch.device("cuda:0"), (32, 24), (8, 6)
MACHINE = dict(device=CUDA, precision="bf16")
aten = torch.ops.aten


class FakeCuda(FakeTensorMode):
    """Inside, tensors have no values, and may lie on CUDA. `waits` lists the functions of this project in
    which the CPU would wait for the GPU, in the order of the waits.

    A value that is read is 1 (or True), so that the program goes on. Boolean indexing and nonzero, whose
    shape only the GPU knows, raise torch's DynamicOutputShapeException instead.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.waits = []

    def dispatch(self, function, types, args=(), kwargs=None):
        if function is aten._local_scalar_dense.default:
            if on_cuda(args[0]):
                self.note()
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        out = super().dispatch(function, types, args, kwargs or {})
        source = {aten._to_copy.default: 0, aten.copy_.default: 1}.get(function)
        if source is not None and on_cuda(args[source]) and not on_cuda(out):
            self.note()
        return out

    def note(self):
        frame = sys._getframe(1)
        while Path(frame.f_code.co_filename).parent != ROOT or frame.f_code.co_name.startswith("<"):
            frame = frame.f_back  # out of torch, and out of <listcomp>
        self.waits.append(frame.f_code.co_name)


def on_cuda(tensor):
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def to(module, device):
    """In the place of nn.Module.to, which cannot exchange fake parameters in all versions."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                copy = torch.empty(value.shape, dtype=value.dtype, device=device)
                part._parameters[name] = nn.Parameter(copy, value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = value.to(device)
    return module


def backward(loss):
    """Tensor.backward, whose own engine asks the driver for the streams of the device."""
    waiting, found = {}, [loss.grad_fn]
    for node in found:  # how many nodes each one waits for
        for after, _ in node.next_functions:
            if after is not None:
                if after not in waiting:
                    found.append(after)
                waiting[after] = waiting.get(after, 0) + 1
    gradients, ready = {loss.grad_fn: [torch.ones_like(loss)]}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        results = getattr(node, "apply", node)(*gradients.pop(node))  # those written in Python have `apply`
        results = results if isinstance(results, tuple) else (results,) * max(1, len(node.next_functions))
        for (after, place), gradient in zip(node.next_functions, results):
            if after is None:
                continue
            wanted = after._input_metadata
            sums = gradients.setdefault(after, [None] * len(wanted))
            if gradient is not None:
                assert on_cuda(gradient)
                if gradient.shape != tuple(wanted[place].shape):  # as of a bias, which is summed last
                    gradient = gradient.sum_to_size(tuple(wanted[place].shape))
                sums[place] = gradient if sums[place] is None else sums[place] + gradient
            waiting[after] -= 1
            if waiting[after] == 0:
                ready.append(after)


def batches_in_order(dataset, workers=0, device=None, collate_fn=datasets.collate, batch_size=None,
                     batch_sampler=None, sampler=None):
    """In the place of datasets.make_loader, whose DataLoader draws a seed and reads its value."""
    keys = sampler or range(len(dataset))
    batches = batch_sampler or [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    return [collate_fn([dataset[key] for key in some]) for some in batches]


class BatchesInOrder(datasets.EpochBatches):
    """Draws no order, whose values would have to be read."""

    def __iter__(self):
        each = self.batch_size // self.accumulate
        for first in range(0, self.num_images // self.batch_size * self.batch_size, each):
            yield [(self.epoch, index) for index in range(first, first + each)]


def tiles_on_the_device(columns, per_row=1):
    """In the place of train.picture, which draws on the CPU."""
    assert {tile.device for tile in columns.values()} == {CUDA}
    return torch.cat([tile.float().flatten() for tile in columns.values()]).view(1, 1, -1)


@contextlib.contextmanager
def fake_cuda():
    """Inside, torch takes cuda for a device that it has; gives the list of waits for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
        patch.setattr(nn.Module, "to", to)
        patch.setattr(train, "EpochBatches", BatchesInOrder)
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setitem(mim.SIZES, "nano", dict(embed_dim=32, depth=1, num_heads=2))
        patch.setattr(nn.init, "trunc_normal_", lambda *args, **options: None)  # it reads what it has drawn
        patch.setattr(evaluation, "frozen", lambda model, device: model.to(device).eval())  # without the copy
        patch.setattr(evaluation, "settings_of", lambda *arguments: {})  # a digest of weights
        for module in (train, evaluation):
            patch.setattr(module, "make_loader", batches_in_order)
            patch.setattr(module, "picture", tiles_on_the_device)
        datasets.statistics.cache_clear()
        try:
            with FakeCuda() as mode:
                yield mode.waits
        finally:
            datasets.statistics.cache_clear()


def needs_a_driver():
    """torch 2.6 asks for a driver even if no tensor is real."""
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda").uniform_()
    except RuntimeError:
        return True
    return False


pytestmark = pytest.mark.skipif(needs_a_driver(), reason="this torch needs a driver for fake CUDA tensors")


def images(count=2):
    return torch.randn(count, 3, *SIZE, device=CUDA)


def labels(high, *shape, dtype=torch.long):
    return torch.randint(high, shape, dtype=dtype, device=CUDA)


def regions():
    """Label maps of two layers."""
    return labels(4, 2, 2, *SIZE, dtype=torch.uint8)


def encoder(**options):
    with unset_fake_temporarily():
        return mim.ViT(SIZE, 4, **mim.SIZES["nano"], **options)


def build(method, **options):
    small = dict(decoder_dim=32, decoder_depth=1, decoder_heads=2, regressor_depth=1, window_size=5,
                 region_dim=32, region_heads=2)
    if method == "dvae":
        small = dict(hidden_dim=8, groups=3, blocks_per_group=1, vocab_size=16)
    with unset_fake_temporarily():  # real tensors are faster to draw
        built = train.build_method(method, SIZE, model="nano", patch_size=4, **small | options)
    if getattr(built, "encoder_options", {}).get("drop_path"):  # a single block has none of its own
        built.encoder.blocks[0].drop_path = StochasticDepth(0.1, "row")
    return built


def learn(model, losses, optimizer=None):
    """One step of training -> the dict that losses() returned under autocast."""
    optimizer = optimizer or torch.optim.AdamW(train.parameter_groups(model, 0.05), fused=True)
    with train.autocast(**MACHINE):
        out = losses()
    assert out["loss"].dtype == torch.float32
    assert {value.device for value in out.values() if torch.is_tensor(value)} == {CUDA}
    out["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()
    return out


# ----------------------------------------------------------------------------------------------------------
# Pre-training

METHODS = [  # method, its options, what it is given besides images
    ("mae", {}, ()), ("mae", dict(norm_pix=False), ()), ("simmim", {}, ()),
    ("beit", dict(vocab_size=16), ("tokens",)), ("dvae", {}, ("progress",)),
    ("lomar", {}, ()), ("lomar", dict(vocab_size=16), ("tokens",)),
    ("cae", {}, ()), ("cae", dict(vocab_size=16), ("tokens",)),
    ("amt", {}, ("index", "box", "flip")),  # before there are maps
    *[("amt", dict(base=base, throw=throw), given) for base in ("mae", "simmim") for throw, given in (
        ("middle", ()), ("middle", ("maps", "index", "box", "flip")),
        ("random", ("maps", "index", "box", "flip")),
        ("low", ("maps", "index", "box", "flip")))],
    ("objmae", {}, ()),
    *[("objmae", dict(alignment=alignment), ("regions",))
      for alignment in ("throwout", "zero", "replicate", "random")],
    *[("objmae", dict(selection=selection), (kind,)) for selection, kind in (
        ("intra", "cam"), ("inter", "regions"), ("inter", "cam"))],
    *[("rae", dict(variant=variant, region_decoder_depth=2), ("regions",))
      for variant in ("length", "batch", "channel")],
    *[("rmae", dict(variant=variant, cross_feed=feed), ("regions",))
      for variant in ("length", "batch", "channel")
      for feed in ("pixel_to_region", "region_to_pixel", "both")],
]


def title(values):
    """The part of a test's name for a method, its options or its inputs."""
    values = values.values() if isinstance(values, dict) else values
    return values if isinstance(values, str) else " ".join(map(str, values))


@pytest.mark.parametrize("method, options, given", METHODS, ids=title)
def test_every_method_trains_on_its_device_and_waits_for_nothing(method, options, given):
    with fake_cuda() as waits:
        model = build(method, **options).to(CUDA)
        index, patches = torch.arange(2, device=CUDA), math.prod(GRID)
        values = dict(tokens=labels(16, 2, patches), progress=torch.full((), 0.5, device=CUDA), index=index,
                      box=torch.rand(2, 4, device=CUDA), flip=index > 0, regions=regions())
        inputs = {name: values[name] for name in given if name in values}
        if "cam" in given:
            inputs["regions"] = torch.rand(2, 1, *SIZE, device=CUDA)
        if "maps" in given:
            with train.autocast(**MACHINE):
                model.update_maps([(images(), index)], 2)
        out = learn(model, lambda: model(images(), **inputs))
        assert {out[key].dtype for key in ("pred", "pred_regions") if key in out} == {torch.bfloat16}
        # throwout makes all lists as long as the shortest, and lengths are numbers of the CPU.
        assert waits == ["align_patches"] * (options.get("alignment") == "throwout")


class Few(datasets.Source):
    """Eight images in memory."""

    in_memory, order, image_size, classes, description = True, range(8), 40, ["a", "b"], ""

    def __getitem__(self, index):
        return dict(image=torch.zeros(3, 40, 40, dtype=torch.uint8), label=self.order[index] % 2)


@pytest.mark.parametrize("method, precision, reads", [
    ("amt", "bf16", 1), ("beit", "fp16", 3), ("mae", "fp32", 1)])
def test_a_run_waits_once_a_step_to_read_the_losses(method, precision, reads, tmp_path, monkeypatch):
    for name in ("write_checkpoint", "draw_examples", "picture_items"):
        monkeypatch.setattr(train, name, lambda *args, **options: None)
    monkeypatch.setattr(train, "name_broken", lambda loader, *_: iter(loader))  # it reads what is on the CPU
    with fake_cuda() as waits:
        tokenizer, types = build("dvae").to(CUDA).eval() if method == "beit" else None, set()
        if tokenizer:
            tokenizer.encoder.register_forward_hook(lambda module, args, out: types.add(out.dtype))
        model = build(method, vocab_size=16 if tokenizer else None, interval=1).to(CUDA)
        train.pretrain(model, Few(), tokenizer=tokenizer, output=tmp_path, epochs=2, batch_size=8,
                       accumulate=2, lr_batch=256, warmup_epochs=1.0, betas=(0.9, 0.95), lookahead=1,
                       clip_grad=1.0, crop_scale=(0.2, 1.0), flip=True, device=CUDA, precision=precision)
        assert (method != "amt") or model.maps.is_cuda
    assert types <= {torch.float32}  # other types would often give other tokens
    # Two epochs of one step, and after each a check of the weights and the scaler's two numbers for the
    # checkpoint. A fake list is read number by number.
    saved = 2 * ["state_after"] if precision == "fp16" else []
    assert waits == 2 * (reads * ["train_epochs"] + ["all_finite"] + saved)


def test_the_device_loader_crops_without_a_wait():
    with fake_cuda() as waits:
        dataset = datasets.Images(Few(), SIZE)
        assert train.crops_on_device(None, dataset, CUDA)
        for batch in datasets.DeviceLoader(dataset, BatchesInOrder(8, 4, 2), CUDA):
            assert batch.pop("broken").device.type == "cpu"
            assert {value.device for value in batch.values()} == {CUDA}
            assert batch["image"].shape == (2, 3, *SIZE) and batch["image"].dtype == torch.uint8
        assert waits == []


# ----------------------------------------------------------------------------------------------------------
# Evaluation

def attention_maps():
    for options in ({}, dict(relative_position=True)):
        vit = encoder(**options).to(CUDA)
        with torch.no_grad(), train.autocast(**MACHINE):
            flow, attention = vit.rollout(images()), vit.last_attention(images(), 3)
            for maps in (flow, attention, mim.attention_map(vit, images())):
                assert maps.dtype == torch.float32 and maps.device == CUDA


def class_activation_maps():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)).to(CUDA)
    for classes in (None, labels(5, 2)):
        assert mim.class_activation_map(network, images(), classes).device == CUDA


def attention_picture():
    evaluation.attention(encoder(relative_position=True), images(), **MACHINE)
    for some in (None, regions(), torch.rand(2, 1, *SIZE)):
        evaluation.attention(encoder(), images(), some, rollout=True, **MACHINE)


def reconstructions():
    tokenizer = build("dvae")
    for name in ("amt", "lomar", "objmae", "rmae", "cae", "cae tokens", "dvae"):
        name, *tokens = name.split()
        method = build(name, **dict(vocab_size=16) if tokens else {})
        given = regions() if "regions" in method.inputs else None
        evaluation.reconstruct(method, images(), given, tokenizer if tokens else None, **MACHINE)


def completed_regions():
    for variant in ("length", "channel"):
        method = build("rae", variant=variant).to(CUDA)
        maps, _ = mim.select_objects(regions(), 1)
        patches = mim.patchify(maps, 4)
        ids = evaluation.hint_patches(patches, 5)
        with torch.no_grad(), train.autocast(**MACHINE):
            completed = evaluation.complete_hints(method, images(), maps, ids, 0.25)
        guess = mim.patchify(completed[:, :1], 4) > 0.5
        for some in (guess, evaluation.nearest_hint(patches, ids, GRID)):
            assert evaluation.hidden_iou(some, patches, ids).device == CUDA


def some_data():
    return torch.zeros(8, 3, *SIZE, dtype=torch.uint8), torch.zeros(8, dtype=torch.long)


def nearest_neighbours():
    evaluation.knn(encoder(), some_data(), some_data(), k=3, **MACHINE)


def linear_probe():
    evaluation.linear(encoder(), some_data(), some_data(), epochs=1, batch_size=8, **MACHINE)


def attentive_probe():
    evaluation.attentive(encoder(), some_data(), some_data(), images(), epochs=1, batch_size=8,
                         cache_features=True, **MACHINE)


def fine_tuning():
    for pool in ("mean", "cls"):
        evaluation.finetune(encoder(), some_data(), some_data(), epochs=1, batch_size=8, pool=pool, **MACHINE)
    v2.MixUp(alpha=0.8, num_classes=4)(images(), labels(4, 2))  # of the two, the run above draws CutMix


def segmentation():
    for head, freeze in (("upernet", False), ("linear", True)):
        model = evaluation.Segmenter(evaluation.trainable(encoder(), 0.1, freeze), 5, head, 16).to(CUDA)
        optimizer = evaluation.layer_wise_adamw(model.encoder, [model.head], 0.05, 0.65)
        truth = labels(5, 2, *SIZE)
        learn(model, lambda: dict(loss=F.cross_entropy(model(images()), truth, ignore_index=255)), optimizer)


def detection():
    """The backbone and the heads. torchvision's choice of proposals indexes by booleans, on every device."""
    for options in ({}, dict(relative_position=True)):
        with unset_fake_temporarily():
            model = evaluation.Detector(evaluation.trainable(encoder(**options), 0.1), 3, 16, window=4)
        model, heads = model.to(CUDA), model.roi_heads

        def losses():
            maps = list(model.backbone(images()).values())
            scores, shifts = model.rpn.head(maps)
            boxes = torch.rand(6, 5, device=CUDA)
            found = heads.box_predictor(heads.box_head(roi_align(maps[0], boxes, 7)))
            masks = heads.mask_predictor(heads.mask_head(roi_align(maps[1], boxes, 14)))
            return dict(loss=sum(x.float().square().mean() for x in (*maps, *scores, *shifts, *found, masks)))

        learn(model, losses)


TASKS = {  # what is run, and the functions that may wait: those that end in numbers for the user
    attention_maps: set(), class_activation_maps: set(), attention_picture: set(), completed_regions: set(),
    reconstructions: {"reconstruct", "some_left_out"}, segmentation: set(), detection: set(),
    nearest_neighbours: {"accuracies"}, linear_probe: {"train_epochs", "all_finite", "accuracies"},
    attentive_probe: {"train_epochs", "all_finite", "accuracies", "train_probe"},  # features wait on the CPU
    fine_tuning: {"train_epochs", "all_finite", "accuracies"},
}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_every_evaluation_keeps_to_its_device(task, monkeypatch):
    for module in (train, evaluation):
        monkeypatch.setattr(module, "name_broken", lambda loader, *_: iter(loader))
    with fake_cuda() as waits:
        task()
    assert set(waits) == TASKS[task]


@pytest.mark.parametrize("native", [True, False])
def test_what_a_cuda_device_is_used_with(monkeypatch, native):
    """bf16 where the GPU has it (it can be emulated, slowly, on any), TF32, and workers for all cores."""
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", done.append)
    monkeypatch.setattr(train, "cores", lambda: 20)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with FakeCuda():
        usual = train.open_device()
        assert usual == (CUDA, "bf16" if native else "fp16", 16) and done == ["cuda:0", "high"]
        assert train.open_device("cuda:1", "fp32", 3) == (torch.device("cuda:1"), "fp32", 3)
        assert train.open_device("cpu") == (torch.device("cpu"), "fp32", 0)
        monkeypatch.setenv("LOCAL_RANK", "5")  # of torchrun
        monkeypatch.setattr(train, "cores", lambda: 2)
        assert train.open_device() == (torch.device("cuda:5"), usual[1], 2)
    assert done == ["cuda:0", "high", "cuda:1", "high", "cuda:5", "high"]
