"""Dense transfer: windows against loops, pyramids, gradients, heads and figures by hand, overfitting."""

import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import box_convert

import datasets
import eval as evaluation
import mim
from eval import (DenseImages, Detector, Segmenter, UPerNet, ViTDet, block_outputs, detect, load_finished,
                  predict, semseg, trainable)

RELATIVE = pytest.mark.parametrize("relative", [False, True])


def make_encoder(image_size=32, patch_size=8, relative=False, **options):
    """A small ViT with random weights, those of the relative positions too, in evaluation mode."""
    torch.manual_seed(0)
    options = dict(embed_dim=32, depth=6, num_heads=2) | options
    encoder = mim.ViT(image_size, patch_size, relative_position=relative, **options)
    for name, parameter in encoder.named_parameters():
        if "relative_table" in name:
            torch.nn.init.normal_(parameter)
    return encoder.eval()


@RELATIVE
def test_block_outputs_end_in_what_the_encoder_gives(relative):
    encoder = make_encoder((32, 48), relative=relative)
    images = torch.randn(2, 3, 32, 48)
    first, last, same = block_outputs(encoder, images, [1, 6, 6])
    expected = encoder(images)[:, 1:].reshape(2, 4, 6, 32)
    torch.testing.assert_close(encoder.norm(last.permute(0, 2, 3, 1)), expected)
    assert torch.equal(last, same) and first.shape == last.shape and not torch.allclose(first, last)


def test_blocks_are_evenly_spaced():
    def encoder(depth):
        return make_encoder(depth=depth, embed_dim=8, num_heads=1)

    after = {depth: Segmenter(encoder(depth), 2, width=8).after for depth in (1, 2, 5, 6, 12, 24)}
    assert after[12] == [4, 6, 8, 12] and after[24] == [8, 12, 16, 24]  # BEiT's code: ViT-B, ViT-L
    assert after[6] == [2, 3, 4, 6] and after[5] == [2, 3, 4, 5] and after[2] == [1, 1, 2, 2]
    assert after[1] == [1, 1, 1, 1]
    assert ViTDet(encoder(12), width=8).global_blocks == [3, 6, 9, 12]  # ViTDet, §3
    assert ViTDet(encoder(32), width=8).global_blocks == [8, 16, 24, 32]
    assert ViTDet(encoder(6), width=8).global_blocks == [2, 3, 5, 6]


# ---------------------------------------------------------------------------------------------------------
# Segmentation


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 1)])
def test_upernet_takes_any_grid(grid):
    model = UPerNet(dim=16, num_classes=7, width=8)
    maps = [torch.randn(2, 16, *grid) for _ in range(4)]
    assert model(maps).shape == (2, 7, 4 * grid[0], 4 * grid[1])
    encoder = make_encoder((8 * grid[0], 8 * grid[1]))
    images = torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    for head in ("upernet", "linear"):
        assert Segmenter(encoder, 5, head, width=8)(images).shape == (2, 5, *images.shape[-2:])


def test_upernets_levels_have_the_strides_of_the_paper():
    sizes = []
    model = UPerNet(dim=16, num_classes=7, width=8)
    for rescale in model.rescalers:
        rescale.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    model([torch.randn(2, 16, 8, 12) for _ in range(4)])
    # Of patches of 16 pixels these are strides of 4, 8, 16, 32.
    assert sizes == [(16, 32, 48), (16, 16, 24), (16, 8, 12), (16, 4, 6)]


def test_every_map_reaches_upernets_output():
    model = UPerNet(dim=16, num_classes=7, width=8).eval()
    maps = [torch.randn(1, 16, 4, 4, requires_grad=True) for _ in range(4)]
    gradients = torch.autograd.grad(model(maps)[0, 0, 0, 0], maps)
    # The finest is local. The pyramid pooling's mean over the image carries the coarsest everywhere.
    assert all(g.abs().sum() > 0 for g in gradients)
    assert gradients[0][..., 3, 3].abs().sum() == 0 and gradients[3].abs().amax(1).count_nonzero() > 8


def test_linear_head_is_a_matrix_product():
    encoder = make_encoder((32, 48))
    model = Segmenter(encoder, 5, "linear").eval()
    norm, layer = model.head
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 32, 48)
    x = (encoder(images)[:, 1:] - norm.running_mean) / (norm.running_var + 1e-6).sqrt()
    logits = x @ layer.weight[:, :, 0, 0].T + layer.bias
    expected = F.interpolate(logits.reshape(2, 4, 6, 5).permute(0, 3, 1, 2), scale_factor=8, mode="bilinear")
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("head", ["upernet", "linear"])
@pytest.mark.parametrize("freeze", [False, True])
def test_gradients_of_segmentation(head, freeze):
    encoder = trainable(make_encoder(drop_path=0.5), 0.5, freeze)
    model = Segmenter(encoder, 5, head, width=8).train()
    before = encoder.norm.weight.clone()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    reached = [p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.blocks.parameters()]
    assert encoder.blocks[-1].drop_path.p == (0.0 if freeze else 0.5)
    # The gradients of the keys' biases are zero.
    assert not any(reached) if freeze else sum(reached) > 0.8 * len(reached)
    assert all(p.grad is not None for p in model.head.parameters())
    assert torch.equal(before, encoder.norm.weight)


def test_unknown_head():
    with pytest.raises(ValueError, match="upernet or linear"):
        Segmenter(make_encoder(), 5, "upper")


# ---------------------------------------------------------------------------------------------------------
# ViTDet


def global_blocks_only(encoder, images):
    """The encoder's blocks on the patches alone, attending everywhere, [B, N, D]."""
    x = encoder.sequence(encoder.embed(images))[:, 1:]
    for block in encoder.blocks:
        x = block(x, encoder.buckets[1:, 1:] if encoder.relative_position else None)
    return x


@RELATIVE
@pytest.mark.parametrize("window", [4, 14])
def test_one_window_is_global_attention(relative, window):
    encoder = make_encoder(32, relative=relative)
    images = torch.randn(2, 3, 32, 32)
    backbone = ViTDet(encoder, width=8, window=window)
    assert backbone.window == 4
    expected = global_blocks_only(encoder, images).transpose(1, 2).reshape(2, 32, 4, 4)
    torch.testing.assert_close(backbone.eval().last_map(images), expected, atol=1e-5, rtol=0)


@RELATIVE
def test_windows_against_a_loop(relative):
    """A grid of 5 x 7 in windows of 3 x 3: behind the norm, zeros fill up those at the edges and are attended
    to."""
    encoder = make_encoder((40, 56), relative=relative)
    backbone = ViTDet(encoder, width=8, window=3).eval()
    x, block = torch.randn(2, 5, 7, 32), encoder.blocks[0]
    normed, attention = torch.zeros(2, 6, 9, 32), torch.zeros(2, 6, 9, 32)
    normed[:, :5, :7] = block.norm1(x)
    buckets = mim.relative_buckets((3, 3))[1:, 1:] if relative else None
    for row in (0, 3):
        for column in (0, 3, 6):
            inside = normed[:, row:row + 3, column:column + 3]
            attended = block.attn(inside.flatten(1, 2), buckets).unflatten(1, (3, 3))
            attention[:, row:row + 3, column:column + 3] = attended
    expected = x + attention[:, :5, :7]
    expected = expected + block.mlp(block.norm2(expected))
    attended = backbone.windowed(block, x.flatten(1, 2))
    torch.testing.assert_close(attended, expected.flatten(1, 2), atol=1e-5, rtol=1e-5)


@RELATIVE
def test_information_leaves_a_window_only_in_global_blocks(relative):
    encoder = make_encoder(64, relative=relative)  # 8 x 8 patches, depth 6: blocks 2, 3, 5, 6 are global
    backbone = ViTDet(encoder, width=8, window=4).eval()
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[:, :, :8, :8] += 1
    differs = (backbone.last_map(images) - backbone.last_map(changed)).abs().amax(1)[0] > 1e-6
    assert differs.all()
    numbers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "windowed", lambda block, x: numbers.append([*encoder.blocks].index(block)) or x)
        backbone.last_map(images)
    assert numbers == [0, 3]
    backbone.global_blocks = []
    differs = (backbone.last_map(images) - backbone.last_map(changed)).abs().amax(1)[0] > 0
    assert differs[:4, :4].all() and differs.sum() == 16


def test_drop_path_drops_whole_images():
    backbone = ViTDet(make_encoder(64, drop_path=0.999), width=8, window=4).train()
    x, block = torch.randn(64, 64, 32), backbone.encoder.blocks[-1]
    same = (backbone.windowed(block, x) == x).all(-1)
    assert (same.all(1) | ~same.any(1)).all()
    assert same.all(1).sum() > 32  # survivors are rare


@RELATIVE
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_pyramid(norm, relative):
    norms = dict(layer=evaluation.layer_norm_2d, batch=torch.nn.BatchNorm2d)
    backbone = ViTDet(make_encoder((64, 96), relative=relative), width=8, window=4, norm=norms[norm])
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert list(maps) == ["0", "1", "2", "3", "4"] and backbone.out_channels == 8
    expected = [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]  # strides of 2, 4, 8, 16, 32 for patches of 8
    assert [tuple(x.shape) for x in maps.values()] == [(2, 8, *size) for size in expected]
    over = 1 if norm == "layer" else (0, 2, 3)
    for x in list(maps.values())[:4]:
        torch.testing.assert_close(x.mean(over), torch.zeros_like(x.mean(over)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("freeze", [False, True])
def test_gradients_of_detection(freeze):
    torch.manual_seed(0)
    model = Detector(trainable(make_encoder(64), 0.0, freeze), 3, width=8, window=4).train()
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 10:40, 20:50] = 1
    full = dict(boxes=torch.tensor([[20.0, 10, 50, 40]]), labels=torch.tensor([2]), masks=masks)
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=masks[:0])
    losses = model(torch.randn(2, 3, 64, 64), [full, empty])
    assert all(loss.isfinite() and loss > 0 for loss in losses.values()) and len(losses) == 5
    sum(losses.values()).backward()
    encoder = model.backbone.encoder
    reached = [p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.blocks.parameters()]
    assert not any(reached) if freeze else sum(reached) > 0.8 * len(reached)
    heads = [p for name, p in model.named_parameters() if "encoder" not in name]
    assert all(p.grad is not None for p in heads)


def test_boxes_keep_all_bits_under_autocast(monkeypatch):
    """bf16 has 8 bits: of places above 512 pixels it tells every fourth."""
    model, given = Detector(make_encoder(64), 3, width=8, window=4), []
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight)
    heads = model.roi_heads.forward
    monkeypatch.setattr(model.roi_heads, "forward", lambda *args: given.extend(args[1]) or heads(*args))
    full = dict(boxes=torch.tensor([[20.3, 10, 50, 40]]), labels=torch.tensor([2]), masks=torch.ones(1, 64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(torch.randn(2, 3, 64, 64), 2 * [full])
        found = model.eval()(torch.randn(2, 3, 64, 64))
    assert len(found[0]["boxes"]) > 0
    for boxes in (*given, found[0]["boxes"]):
        assert boxes.dtype == torch.float32 and not torch.equal(boxes, boxes.bfloat16().float())


@pytest.mark.parametrize("size, patch, rois, proposals, convs", [(96, 12, 32, 100, 1), (128, 16, 512, 1000, 4)])
def test_small_images_have_fewer_regions_and_shallower_heads(size, patch, rois, proposals, convs):
    model = Detector(make_encoder(size, patch), 3, width=8)
    rpn, heads = model.rpn, model.roi_heads
    assert heads.fg_bg_sampler.batch_size_per_image == rois
    assert rpn._pre_nms_top_n == dict(training=2 * proposals, testing=proposals)
    assert rpn._post_nms_top_n == dict(training=proposals, testing=proposals)
    for head in (heads.box_head, heads.mask_head):
        assert sum(isinstance(module, torch.nn.Conv2d) for module in head.modules()) == convs


@pytest.mark.parametrize("size, patch", [((32, 48), 4), ((64, 96), 8), (96, 12), (128, 16), ((96, 160), 16)])
def test_anchors_and_pools_know_the_strides(size, patch):
    model = Detector(make_encoder(size, patch), 3, width=8).eval()
    H, W = mim.pair(size)
    seen = {}
    generator = model.rpn.anchor_generator
    generator.register_forward_hook(lambda module, inputs, output: seen.update(anchors=output[0]))
    with torch.no_grad():
        out = model(torch.randn(1, 3, H, W))
    cells = [(4 * H // patch) * (4 * W // patch) // 4**level for level in range(4)]
    finest, second = seen["anchors"][:3 * sum(cells[:2])].split([3 * cells[0], 3 * cells[1]])
    centres = (second[:, :2] + second[:, 2:]) / 2
    assert centres.amax(0).tolist() == [W - patch // 2, H - patch // 2]  # strides of half a patch
    rows, columns = (math.ceil(n / patch / 4) for n in (H, W))  # an odd number of cells is rounded up
    coarsest = seen["anchors"][-3 * rows * columns::3].unflatten(0, (rows, columns))
    places = (coarsest[..., :2] + coarsest[..., 2:]) / 2
    assert places[0, :, 0].tolist() == [4 * patch * k for k in range(columns)]
    assert places[:, 0, 1].tolist() == [4 * patch * k for k in range(rows)]
    sides = (finest[1::3, 2:] - finest[1::3, :2]).unique()
    assert sides.tolist() == [2 * patch]  # eight strides of a quarter of a patch
    # Feature Pyramid Networks, Eq. 1, where 224 is 14 patches of 16.
    boxes = torch.tensor([[0, 0, s, s] for s in (3.4, 3.6, 6.9, 7.1, 13.9, 14.1, 27.9, 28.1, 100)]) * patch
    assert model.roi_heads.box_roi_pool.map_levels([boxes]).tolist() == [0, 1 - 1, 0, 1, 1, 2, 2, 3, 3]
    assert model.roi_heads.box_roi_pool.scales == [4 / patch, 2 / patch, 1 / patch, 0.5 / patch]
    assert set(out[0]) == {"boxes", "labels", "scores", "masks"}


def test_detector_takes_images_as_they_are():
    model = Detector(make_encoder((32, 48), 4), 3, width=8).eval()
    images, seen = torch.randn(2, 3, 32, 48), []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    torch.testing.assert_close(seen[0], images)


@pytest.mark.parametrize("size, patch", [(42, 14), (24, 8)])
def test_detector_refuses_sizes_that_have_no_whole_strides(size, patch):
    with pytest.raises(ValueError, match="divisible"):
        Detector(make_encoder(size, patch), 3)


# ---------------------------------------------------------------------------------------------------------
# Items


class Truth(list):
    """A source of (image uint8 [3, H, W], truth), with named classes."""

    def __init__(self, *pairs, classes=("square",)):
        super().__init__(dict(image=image) for image, _ in pairs)
        self.truths, self.classes = [truth for _, truth in pairs], list(classes)

    def truth(self, index, item):
        assert item is self[index]
        return self.truths[index]

    def name(self, index):
        return f"picture {index}"


def objects(*masks, labels=None, crowd=None):
    """Masks [H, W] -> the truth of their objects."""
    masks = torch.stack(masks).bool()
    boxes = box_convert(datasets.boxes_of(masks), "xyxy", "xywh").numpy()
    return dict(masks=masks.numpy(), boxes=boxes, areas=masks.sum((1, 2)).numpy(),
                labels=np.array(labels or [1] * len(masks)), crowd=np.array(crowd or [False] * len(masks)))


def rectangle(height, width, rows, columns):
    """A mask with these rows and columns, two slices."""
    mask = torch.zeros(height, width)
    mask[rows, columns] = 1
    return mask


def test_boxes_and_masks_are_cropped_with_the_image():
    """An image whose pixels are its mask: they still are after scaling, cropping and mirroring."""
    mask = rectangle(48, 80, slice(10, 30), slice(20, 60))
    image = (255 * mask).byte().expand(3, 48, 80)
    items = DenseImages(Truth((image, objects(mask, labels=[3]))), (64, 64), (0.5, 2.0))
    sizes = set()
    for epoch in range(30):
        item = items[epoch, 0]
        mask = item["label"]["masks"]
        if not len(mask):  # all of it was cut off
            continue
        assert ((item["image"][0] > 160) != mask[0].bool()).float().mean() < 0.06  # but for the edge
        x1, y1, x2, y2 = item["label"]["boxes"][0].int().tolist()
        assert mask[0, y1:y2, x1:x2].any(0).all() and mask.sum() == mask[0, y1:y2, x1:x2].sum()
        sizes.add((x2 - x1, y2 - y1))
        assert item["label"]["labels"].tolist() == [3]
    assert len(sizes) > 10


def test_draws_follow_from_seed_epoch_and_index_alone():
    """Two images of the same content."""
    image = torch.randint(256, (3, 24, 48), dtype=torch.uint8)
    source = Truth(*2 * [(image, np.zeros((24, 48), np.int16))])
    items = {(seed, epoch, index): DenseImages(source, (32, 32), (0.5, 2.0), seed=seed)[epoch, index]["image"]
             for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)}
    assert all(torch.equal(a, b) == (i == j) for i, a in items.items() for j, b in items.items())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = DenseImages(source, (32, 32), (0.5, 2.0), seed=1)[1, 0]["image"]
    assert torch.equal(again, items[1, 1, 0]) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 0.5), (0.5, 1.0), (2.0, 2.0)])
@pytest.mark.parametrize("fits", [True, False])
def test_an_image_is_scaled_and_the_rest_filled_up(scale, fits):
    """24 x 48 pixels fit into 32 x 32 as 16 x 32, and cover it as 32 x 64. With objects they fit, with
    classes of pixels they cover; then they are scaled, and half of the time mirrored."""
    image = torch.zeros(3, 24, 48, dtype=torch.uint8)
    image[0], image[1, :, :24] = 255, 255  # yellow on the left, red on the right
    left = rectangle(24, 48, slice(None), slice(0, 24))
    truth = objects(left, 1 - left) if fits else 7 * left.short().numpy()
    items = DenseImages(Truth((image, truth)), (32, 32), scale)
    found, mirrored = set(), 0
    for epoch in range(60):
        item = items[epoch, 0]
        inside = (item["image"].int() - torch.tensor(evaluation.MEAN_COLOUR).view(3, 1, 1)).abs().amax(0) > 2
        rows, columns = inside.any(1).sum().item(), inside.any(0).sum().item()
        assert inside.sum() == rows * columns  # one rectangle
        found.add((rows, columns))
        if not fits:
            assert (item["label"] == datasets.IGNORED).equal(~inside)
            yellow = (item["image"][1] > 127) & inside
            assert (yellow != (item["label"] == 7)).sum() <= 2 * rows  # but for the edge between the colours
            mirrored += (item["label"] == 7)[inside][0].item() == 0
    rows, columns = (16, 32) if fits else (32, 64)
    whole = [(min(32, round(rows * s)), min(32, round(columns * s))) for s in scale]
    assert min(found) >= whole[0] and max(found) <= whole[1] and (len(found) > 8) == (scale == (0.5, 1.0))
    assert fits or 15 < mirrored < 50 or scale[0] == 2


def test_parts_of_one_class_are_avoided():
    """A quarter of the image, in its corner, is of the second class, which a part of the size rarely has on a
    quarter of it; where all is of one class, some part is taken all the same."""
    truth = np.zeros((128, 128), np.int16)
    truth[:64, :64] = 1
    image = torch.zeros(3, 128, 128, dtype=torch.uint8)
    items = DenseImages(Truth((image, truth), (image, 0 * truth)), (32, 32), (4.0, 4.0))
    shares = torch.stack([items[epoch, 0]["label"].float().mean() for epoch in range(100)])
    mixed = ((shares > 0.25) & (shares < 0.75)).float().mean()
    assert mixed > 0.65  # of parts that are drawn once, 0.2
    assert items[0, 1]["label"].unique().tolist() == [0]


def test_colours_change_only_if_asked():
    image = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    source = Truth((image, np.zeros((16, 16), np.int16)))
    both = [DenseImages(source, (16, 16), (1, 1), distort) for distort in (False, True)]
    plain, distorted = ([items[epoch, 0]["image"] for epoch in range(20)] for items in both)
    assert all(torch.equal(some, image) for some in plain)
    assert sum(not torch.equal(some, image) for some in distorted) > 10


def test_crowds_and_specks_are_not_learned():
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    one, crowd = (rectangle(16, 16, slice(0, 8), slice(k, k + 8)) for k in (0, 8))
    speck, pair = (rectangle(16, 16, slice(12, 13), slice(0, k)) for k in (1, 2))
    truth = objects(one, crowd, speck, pair, labels=[4, 5, 6, 7], crowd=[False, True, False, False])
    label = DenseImages(Truth((image, truth)), (16, 16), (1, 1))[0]["label"]
    assert label["labels"].tolist() == [4, 7] and label["masks"].sum((1, 2)).tolist() == [64, 2]
    val = DenseImages(Truth((image, truth)), (16, 16))[0]
    assert val["label"] is truth  # in evaluation they all count


def test_images_fit_inside_from_the_upper_left_corner():
    wide, tall = (torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((8, 16), (16, 8)))
    cases = [(wide, (32, 32), [16, 32]), (tall, (32, 32), [32, 16]), (wide, (16, 64), [16, 32]),
             (wide, (32, 16), [8, 16]), (wide, (40, 4), [2, 4])]
    for image, size, fitted in cases:
        assert evaluation.fitting_size(image, size) == fitted
        whole = evaluation.fit_inside(image, size)
        h, w = fitted
        inside = F.interpolate(image[None].float(), fitted, mode="bilinear", antialias=True)[0]
        assert (whole[:, :h, :w] - inside).abs().max() <= 1 and whole.shape == (3, *size)
        rest = torch.cat([whole[:, h:].flatten(1), whole[:, :h, w:].flatten(1)], dim=1)
        assert (rest == torch.tensor(evaluation.MEAN_COLOUR)[:, None]).all()
    assert evaluation.fitting_size(torch.zeros(3, 1, 500), (32, 32)) == [1, 32]
    assert evaluation.fitting_size(torch.zeros(3, 20, 60), (32, 32)) == [11, 32]  # 10.67
    assert evaluation.fitting_size(torch.zeros(3, 480, 640), (512, 512), max) == [512, 683]
    assert evaluation.fitting_size(torch.zeros(3, 640, 480), (512, 512), max, 0.5) == [341, 256]


def test_each_image_keeps_its_own_label():
    pairs = [(torch.full((3, 8, 8), k, dtype=torch.uint8), np.full((8, 8), k, np.int16)) for k in range(3)]
    items = DenseImages(Truth(*pairs), (8, 8), (1, 1))
    batch = evaluation.collate_dense([items[k] for k in (2, 0, 1)])
    assert batch["image"][:, 0, 0, 0].tolist() == [int(label[0, 0]) for label in batch["label"]] == [2, 0, 1]


# ---------------------------------------------------------------------------------------------------------
# Figures by hand, of models that see the classes in the colours


class Painter(Segmenter):
    """Class k is where the red channel is brightest near 60 k."""

    calls = []

    def __init__(self, encoder, num_classes, head, width):
        super().__init__(encoder, num_classes, "linear")

    def forward(self, images):
        self.calls.append((self.training, images.shape))
        red = datasets.denormalize(images)[:, 0] * 255
        nearest = (red[:, None] - 60 * torch.arange(self.num_classes).view(1, -1, 1, 1)).abs().argmin(1)
        return 10 * F.one_hot(nearest, self.num_classes).permute(0, 3, 1, 2) + 0 * self.head[1].weight.sum()


def painting(classes):
    """A map of classes [H, W] -> an image that `Painter` reads as this map."""
    return (60 * torch.as_tensor(classes)).byte().expand(3, *classes.shape)


NAMES = ("sky", "tree", "car", "road")


def segmentation(monkeypatch, val, size=(32, 32), **options):
    """semseg's result with `Painter` on Truth `val`."""
    monkeypatch.setattr(evaluation, "Segmenter", Painter)
    sky = np.zeros((32, 32), np.int16)
    train = DenseImages(Truth(*2 * [(painting(sky), sky)], classes=NAMES), size, (1, 1))
    options = dict(epochs=1, batch_size=2) | options
    return semseg(make_encoder(size), train, DenseImages(val, size), **options)


def checks(height, width, side, low=0, high=1):
    """A chess board of two classes, numpy uint8 [height, width]."""
    y, x = np.mgrid[:height, :width] // side
    return np.where((y + x) % 2, high, low).astype(np.int16)


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)])
def test_images_of_any_shape_are_segmented_at_their_own_size(monkeypatch, size):
    """Boards of 8 x 16 and 16 x 8 pixels are enlarged and filled up; the classes come back to their places.
    """
    boards = [checks(8, 16, 4), checks(16, 8, 4)]
    val = Truth(*((painting(board), board) for board in boards), classes=NAMES)
    result = segmentation(monkeypatch, val, size=size)
    assert result["miou"] == result["pixel_accuracy"] == 100 and result["classes"] == 2
    inverted = Truth(*((painting(board), 1 - board) for board in boards), classes=NAMES)
    result = segmentation(monkeypatch, inverted, size=size)
    assert result["miou"] == result["pixel_accuracy"] == 0
    assert Painter.calls[-1] == (False, (1, 3, *size))


def test_mean_iou_by_hand(monkeypatch):
    """The left half is found to be sky, the right half tree. Of 64 pixels 32 are sky, 8 cars (on the left), 8
    road (on the right); 16 do not count, though they are found to be half sky, half tree."""
    found = torch.zeros(8, 8)
    found[:, 4:] = 1
    truth = np.zeros((8, 8), np.int16)
    truth[4:6, :4], truth[4:6, 4:], truth[6:] = 2, 3, datasets.IGNORED
    result = segmentation(monkeypatch, Truth((painting(found), truth), classes=NAMES))
    # Sky: 16 hits, 32 true, 24 found: 16 / 40. Cars and road: 0. There is no tree.
    assert result["classes"] == 3 and result["miou"] == pytest.approx(100 * (16 / 40) / 3, abs=0.01)
    assert result["pixel_accuracy"] == pytest.approx(100 * 16 / 48, abs=0.01)


def test_pixels_are_counted_over_all_images(monkeypatch):
    """Two images: the first is all sky, as found; of the second a quarter is, the rest is road found as sky.
    """
    one, two = np.zeros((8, 8), np.int16), np.full((16, 16), 3, np.int16)
    two[:8, :8] = 0
    val = Truth((painting(torch.zeros(8, 8)), one), (painting(torch.zeros(16, 16)), two), classes=NAMES)
    result = segmentation(monkeypatch, val)
    assert result["miou"] == pytest.approx(100 * (128 / 320) / 2, abs=0.01)
    assert result["pixel_accuracy"] == pytest.approx(100 * 128 / 320, abs=0.01)


@pytest.fixture
def losses_of(monkeypatch):
    """losses_of(run) -> the function of the losses that run() gives to `fit`, which trains nothing here."""

    def fit(model, optimizer, train, compute_losses, **options):
        model.eval()
        given.append(compute_losses)
        return {}

    def call(run):
        monkeypatch.setattr(evaluation, "fit", fit)
        run()
        return given.pop()

    given = []
    return call


def test_the_loss_of_segmentation_leaves_out_ignored_pixels(monkeypatch, losses_of):
    val = Truth((painting(torch.zeros(8, 8)), np.zeros((8, 8), np.int16)), classes=NAMES)
    compute_losses = losses_of(lambda: segmentation(monkeypatch, val))
    logits, truth = torch.randn(2, 4, 6, 6), torch.randint(4, (2, 6, 6))
    truth[0, :3] = datasets.IGNORED
    loss = compute_losses(lambda images: logits, None, list(truth.short()))["loss"]
    right = -logits.log_softmax(1).gather(1, truth.clamp(min=0)[:, None])[:, 0]
    assert loss.item() == pytest.approx(right[truth >= 0].mean().item(), rel=1e-5)
    nothing = list(torch.full_like(truth, datasets.IGNORED).short())
    assert compute_losses(lambda images: logits, None, nothing)["loss"] == 0  # and not nan


def test_validation_masks_of_nothing_and_images_beyond_the_last_are_refused(monkeypatch):
    item = dict(image=torch.zeros(3, 8, 8, dtype=torch.uint8), label=np.full((8, 8), datasets.IGNORED, np.int16))
    monkeypatch.setattr(evaluation, "predictions", lambda *_: [(item, dict(classes=np.zeros((8, 8), int)))])
    dataset = DenseImages(datasets.load_dense("shapes", False, "val", 32, 2), (32, 32))
    with pytest.raises(datasets.UsageError, match="no pixel of the validation masks counts"):
        evaluation.score_pixels(None, dataset)
    assert len(list(dataset)) == 2


def test_the_loss_of_detection_is_the_sum_of_its_parts(monkeypatch, losses_of):
    compute_losses = losses_of(lambda: detection(monkeypatch, spots(8, 16)))
    parts = dict(box=torch.tensor(2.0), mask=torch.tensor(3.0))
    assert compute_losses(lambda images, targets: parts, None, []) == dict(loss=5, box=2, mask=3)


@pytest.fixture
def columns(monkeypatch):
    """What each picture that eval.py draws from now on is made of, a list of ({title: tiles}, legend)."""
    drawn, draw = [], evaluation.picture

    def picture(columns, legend):
        drawn.append((columns, legend))
        return draw(columns, legend)

    monkeypatch.setattr(evaluation, "picture", picture)
    return drawn


def test_the_picture_of_classes_shows_prediction_and_truth(monkeypatch, columns):
    """5 images of 16 x 32 pixels, of which the first 4 are shown, on white squares of 256 pixels."""
    found, truth = checks(16, 32, 16, 1, 2), checks(16, 32, 16, 0, 3)
    truth[:8, :16] = datasets.IGNORED
    pairs = [(painting(np.full((16, 32), k % 4)), truth) for k in range(4)]
    segmentation(monkeypatch, Truth((painting(found), truth), *pairs, classes=NAMES), size=(32, 32))
    (drawn, legend), = columns
    assert list(drawn) == ["image", "prediction", "truth"]
    assert all(tiles.shape == (4, 3, 256, 256) for tiles in drawn.values())
    colours = evaluation.class_colours(4)
    assert len(colours.unique(dim=0)) == 4
    white = torch.ones(3)
    one, other = white * 60 / 255, white * 120 / 255  # classes 1 and 2 of the image
    expected = dict(prediction={(60, 60): (one, 1), (60, 200): (other, 2)},
                    truth={(100, 60): (one, 0), (60, 200): (other, 3)})
    for title, places in expected.items():
        for (y, x), (below, k) in places.items():
            mixed = 0.4 * below + 0.6 * colours[k]
            assert torch.allclose(drawn[title][0, :, y, x], mixed, atol=0.01), (title, y, x)
    for title, tiles in drawn.items():
        assert torch.equal(tiles[0, :, 200, 60], white), title
    for y, x, title in ((60, 60, "image"), (60, 200, "image"), (30, 60, "truth")):  # there truth is ignored
        below = other if x == 200 else one
        assert torch.allclose(drawn[title][0, :, y, x], below, atol=0.01), (title, y, x)
    fourth = drawn["prediction"][3, :, 60, 60]  # of five
    assert torch.allclose(fourth, 0.4 * drawn["image"][3, :, 60, 60] + 0.6 * colours[2], atol=0.01)
    assert set(legend) == set(NAMES)
    assert all(torch.equal(legend[name].flatten(), colours[k]) for k, name in enumerate(NAMES))


class Spotter(Detector):
    """An object of class 1 is where red is bright, one of class 2 where green is. `wrong`: boxes, which are
    then too wide, or masks, which are then empty."""

    wrong, targets = [], []

    def forward(self, images, targets=None, covered=None):
        if self.training:
            self.targets.append(targets)
            weight = self.roi_heads.box_predictor.cls_score.bias.sum()
            return dict(loss_a=0 * weight + 2, loss_b=weight + 3)
        return [self.spot(image) for image in datasets.denormalize(images)]

    def spot(self, image):
        labels = [k for k in (1, 2) if (image[k - 1] > 0.5).any()]
        masks = torch.stack([image[k - 1] > 0.5 for k in labels])
        boxes = datasets.boxes_of(masks).float()
        boxes[:, 2] += 20 * ("boxes" in self.wrong)
        # As torchvision cuts out the masks that its heads learn
        masks = project_masks_on_boxes(masks.byte(), boxes, torch.arange(len(labels)), 28)[:, None]
        return dict(boxes=boxes, labels=torch.tensor(labels), scores=torch.linspace(0.9, 0.4, len(labels)),
                    masks=masks * ("masks" not in self.wrong))


def spots(height, width, **options):
    """An image with a red and a green rectangle, whose masks are their truth."""
    red = rectangle(height, width, slice(0, height // 2), slice(0, width // 4))
    green = rectangle(height, width, slice(height // 4, height), slice(width // 2, width))
    image = (255 * torch.stack([red, green, torch.zeros(height, width)])).byte()
    return image, objects(red, green, **dict(labels=[1, 2]) | options)


def detection(monkeypatch, *pairs, size=(32, 32), **options):
    """detect's result with `Spotter` on the pairs of image and truth."""
    monkeypatch.setattr(evaluation, "Detector", Spotter)
    train = Truth(*2 * [spots(32, 32)], classes=["red", "green"])
    options = dict(epochs=1, batch_size=2) | options
    val = DenseImages(Truth(*pairs, classes=["red", "green"]), size)
    return detect(make_encoder(size), DenseImages(train, size, (1, 1)), val, **dict(width=8) | options)


KINDS = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)])
def test_objects_are_found_in_images_of_any_shape(monkeypatch, size):
    """Images of 8 x 16 and 16 x 8 pixels are enlarged; boxes and masks come back to their size. If the
    classes of the truth are exchanged, nothing is right."""
    right = detection(monkeypatch, spots(8, 16), spots(16, 8), size=size)
    assert [right[name] for name in KINDS] == 6 * [100]
    wrong = detection(monkeypatch, spots(8, 16, labels=[2, 1]), spots(16, 8, labels=[2, 1]), size=size)
    assert [wrong[name] for name in KINDS] == 6 * [0]
    assert right["box_ap_small"] == right["mask_ap_small"] == 100
    assert right["box_ap_large"] is right["mask_ap_medium"] is None


@pytest.mark.parametrize("moved, right", [
    ("boxes", 3 * [False] + 3 * [True]), ("masks", 3 * [True] + 3 * [False]),
])
def test_boxes_and_masks_are_scored_apart(monkeypatch, moved, right):
    monkeypatch.setattr(Spotter, "wrong", [moved])
    result = detection(monkeypatch, spots(32, 32))
    assert [result[name] > 80 for name in KINDS] == right and 0 in result.values()


def test_the_detector_trains_on_the_training_objects(monkeypatch):
    Spotter.targets.clear()
    detection(monkeypatch, spots(8, 16))
    (one, two), = Spotter.targets
    assert one["labels"].tolist() == two["labels"].tolist() == [1, 2]
    assert one["masks"].shape == (2, 32, 32) and one["masks"].sum((1, 2)).tolist() == [128, 384]
    assert sorted(one["boxes"][0].tolist()) in ([0, 0, 8, 16], [0, 16, 24, 32])  # as it is, or mirrored


def test_detections_are_scaled_back_by_hand(monkeypatch):
    """An image of 20 x 60 pixels lies in the upper 16 rows of 48 x 48. Half a pixel of the canvas is that by
    which torchvision's masks are off."""
    def forward(self, images, covered):
        seen.update(images=images, covered=covered)
        masks = torch.ones(3, 1, 28, 28)
        masks[1, :, :, 14:] = 0
        boxes = torch.tensor([[23.5, 0, 48, 8], [11.5, 4, 35.5, 15.5], [10, 15.75, 40, 16]])
        labels, scores = torch.tensor([2, 1, 1]), torch.tensor([0.5, 0.25, 0.125])
        return [dict(boxes=boxes, labels=labels, scores=scores, masks=masks)]

    seen, model = {}, Detector(make_encoder(48, 4), 3, width=8).eval()
    monkeypatch.setattr(Detector, "forward", forward)
    image = torch.randint(256, (3, 20, 60), dtype=torch.uint8)
    back = predict(model, image)
    assert seen["covered"] == (16, 48) and torch.equal(
        seen["images"], datasets.normalize(evaluation.fit_inside(image, (48, 48))[None]))
    assert back["boxes"][:2].tolist() == [[29.375, 0, 30.625, 10], [14.375, 5, 30, 14.375]]
    assert not back["masks"][2].any()  # a thin box at the edge
    assert back["masks"].shape == (3, 20, 60) and back["masks"].dtype == bool
    assert back["masks"][0, 1:10, 30:].all() and not back["masks"][0, :, :30].any()
    assert back["masks"][1].any(1).nonzero()[0].tolist() == list(range(6, 20))
    assert back["masks"][1].any(0).nonzero()[0].tolist() == list(range(15, 30))
    assert back["labels"].tolist() == [2, 1, 1] and back["scores"].tolist() == [0.5, 0.25, 0.125]


def test_a_pasted_mask_is_the_one_that_was_cut_out():
    """Discs of 8 to 24 pixels, cut out as torchvision does for its heads to learn."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for radius in (4, 7, 12):
        disc = (y + 0.5 - 30.3) ** 2 + (x + 0.5 - 25.8) ** 2 < radius**2
        box = datasets.boxes_of(disc[None]).float() + torch.tensor([-0.7, 0.4, 0.9, 0.6])
        cut = project_masks_on_boxes(disc[None].byte(), box, torch.tensor([0]), 28)
        back = evaluation.paste(cut, box[0] + 0.5, (64, 64)) > 0.5
        assert (back ^ disc).sum() <= 0.06 * disc.sum(), radius
        off = evaluation.paste(cut, box[0], (64, 64)) > 0.5
        assert (off ^ disc).sum() > 2 * (back ^ disc).sum()


def test_boxes_end_where_the_image_does():
    """Of a canvas the upper 16 rows and the left 24 columns are image."""
    torch.manual_seed(0)
    model = Detector(make_encoder(32, 4), 3, width=8).eval()
    model.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        part, = model(torch.randn(1, 3, 32, 32), covered=(16, 24))
        whole, = model(torch.randn(1, 3, 32, 32))
    for found, height, width in ((part, 16, 24), (whole, 32, 32)):
        x, y = found["boxes"].amax(0)[2:].tolist()
        assert width - 1 < x <= width and height - 1 < y <= height


def test_rois_are_aligned():
    """The features of a ramp at the pooled positions are the ramp's values there, on every level."""
    pool = Detector(make_encoder(64, 8), 3, width=8).roi_heads.box_roi_pool
    boxes = torch.tensor([[16.0, 8, 30, 22], [16, 8, 60, 52], [3, 5, 17, 12]])
    maps = {str(level): (torch.arange(64 // stride) + 0.5).mul(stride).expand(1, 1, 64 // stride, -1)
            for level, stride in enumerate((2, 4, 8, 16))}
    pooled = pool(maps, [boxes], [(64, 64)])
    centres = boxes[:, :1] + (boxes[:, 2:3] - boxes[:, :1]) * (torch.arange(7) + 0.5) / 7
    inside = (centres > 8) & (centres < 56)  # at the edges of a map there is no slope
    assert pooled.shape == (3, 1, 7, 7)
    torch.testing.assert_close(pooled[:, 0, 3][inside], centres[inside], atol=1e-4, rtol=0)


def test_windows_cover_an_image_and_their_logits_are_averaged():
    assert evaluation.window_starts(683, 512) == [0, 171]  # 341 pixels a step, the last at the edge
    assert evaluation.window_starts(512, 512) == [0]
    assert evaluation.window_starts(1300, 512) == [0, 341, 682, 788]
    torch.manual_seed(0)
    model = Segmenter(make_encoder(16, 8), 5, "linear").eval()
    image = torch.randint(256, (3, 16, 40), dtype=torch.uint8)
    found = predict(model, image)["classes"]
    images = datasets.normalize(image[None])
    sums = torch.zeros(1, 5, 16, 40)
    counts = torch.zeros(40)
    with torch.no_grad():
        for left in (0, 10, 20, 24):
            sums[..., left:left + 16] += model(images[..., left:left + 16])
            counts[left:left + 16] += 1
    assert np.array_equal(found, (sums / counts)[0].argmax(0)) and len(np.unique(found)) > 2
    larger = predict(model, torch.randint(256, (3, 50, 31), dtype=torch.uint8))["classes"]
    assert larger.shape == (50, 31)


def test_the_picture_of_detections_shows_those_that_are_sure_beside_the_truth(monkeypatch, columns):
    """The red object has a score of 0.9, the green one of 0.4. 7 images, of which the first 6 are shown."""
    drawn, written = [], []
    draw, write = evaluation.draw_bounding_boxes, evaluation.write

    def draw_boxes(tile, boxes, colors, width):
        drawn.append(boxes.tolist())
        return draw(tile, boxes, colors=colors, width=width)

    def write_texts(tile, texts):
        written.append(list(texts.values()))
        return write(tile, texts)

    monkeypatch.setattr(evaluation, "draw_bounding_boxes", draw_boxes)
    monkeypatch.setattr(evaluation, "write", write_texts)
    tall = spots(32, 16)
    detection(monkeypatch, tall, *6 * [spots(16, 32)])
    (tiles, legend), = columns
    assert list(tiles) == ["image", "prediction: scores above 0.5", "truth"] and list(legend) == ["red", "green"]
    assert all(some.shape == (6, 3, 256, 256) for some in tiles.values())
    assert len(drawn) == 12 and drawn[0] == [[0, 0, 32, 128]] and drawn[2] == [[0, 0, 64, 64]]
    assert written[:2] == [["red"], ["red", "green"]]
    red, green = evaluation.class_colours(3)[1:]
    assert torch.equal(legend["green"].flatten(), green)
    image, found, truth = (some[1] for some in tiles.values())
    for tile in (found, truth):  # the masks let 40% through
        assert torch.allclose(tile[:, 40, 40], 0.4 * torch.tensor([1.0, 0, 0]) + 0.6 * red, atol=0.01)
    assert torch.equal(found[:, 100, 200], image[:, 100, 200])
    assert torch.allclose(truth[:, 100, 200], 0.4 * torch.tensor([0, 1.0, 0]) + 0.6 * green, atol=0.01)
    assert all((tile[:, 200, 100] == 1).all() for tile in (image, found, truth))  # the white below


def test_a_classifiers_likeliest_class_is_drawn_however_low_its_score(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "picture", lambda tiles, legend: drawn.append((list(tiles), list(legend))))
    found = dict(labels=np.array([2, 0]), scores=np.float32([0.3, 0.2]), boxes=np.array(2 * [[0, 0, 16, 16]]))
    evaluation.draw_masks([(torch.zeros(3, 16, 16, dtype=torch.uint8), found)], ["a", "b", "c"])
    assert drawn == [(["image", "prediction"], ["c"])]


def test_every_class_has_a_colour_of_its_own():
    colours = (255 * evaluation.class_colours(151)).round()
    assert len(colours.unique(dim=0)) == 151


def test_a_picture_of_nothing_is_the_image():
    image = torch.randint(256, (3, 256, 256), dtype=torch.uint8)
    nothing = dict(masks=np.zeros((0, 256, 256), bool), labels=np.zeros(0, int), boxes=np.zeros((0, 4)))
    drawn = evaluation.draw_masks([(image, nothing, nothing)], ["", "red"])
    assert all(torch.equal(drawn[:, -260:-4, k:k + 256], image / 255) for k in (4, 264, 524))


def test_masks_over_one_another_are_painted_one_after_another():
    masks = torch.zeros(2, 1, 3)
    masks[0, 0, :2], masks[1, 0, 1:] = 1, 0.5
    painted = evaluation.paint(torch.zeros(3, 1, 3), masks, torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
    assert painted[:, 0].T.tolist() == [[1, 0, 0], [0.5, 0, 0.5], [0, 0, 0.5]]


def test_rates_of_the_dense_tasks_by_hand(monkeypatch, rates):
    """20 epochs of one step; the batch is cut to the 2 images that there are. The rate is that of 16 images.
    """
    def scaled(steps):
        """Of the groups that have the whole rate: the heads."""
        assert all(step[0] == pytest.approx(step[-2] * 0.5**7) for step in steps)  # below six blocks
        return [step[-2] for step in steps]

    val = Truth((painting(torch.zeros(8, 8)), np.zeros((8, 8), np.uint8)), classes=NAMES)
    options = dict(epochs=20, base_lr=0.8, layer_decay=0.5, batch_size=9)
    steps, result = rates(lambda: segmentation(monkeypatch, val, **options))
    warm = 20 / 9  # which is less than 1,500 steps
    falls = [0.1 * (1 - (step - warm) / (20 - warm)) for step in range(3, 20)]
    assert scaled(steps) == pytest.approx([0, 0.1 / warm, 0.2 / warm, *falls])
    assert result["warmup_epochs"] == 2.222 and result["batch_size"] == 2
    steps, result = rates(lambda: detection(monkeypatch, spots(8, 16), **options))
    # A tenth from 2.222 + 0.9 * 17.778 = 18.222 on, a hundredth from 2.222 + 0.95 * 17.778 = 19.111 on
    assert scaled(steps) == pytest.approx([0, 0.1 / warm, 0.2 / warm] + 16 * [0.1] + [0.01])
    assert result["warmup_epochs"] == 2.222
    asked, fit = [], evaluation.fit
    note = functools.wraps(fit)(lambda *args, **more: asked.append(more) or fit(*args, **more))
    monkeypatch.setattr(evaluation, "fit", note)
    segmentation(monkeypatch, val, epochs=1)
    detection(monkeypatch, spots(8, 16), epochs=1)
    assert [options["warmup_steps"] for options in asked] == [1500, 250]  # of ADE20K and of COCO
    factors = [evaluation.stepwise(progress) for progress in (0, 0.899, 0.9, 0.949, 0.95, 1)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


# ---------------------------------------------------------------------------------------------------------
# The two tasks


def scenes(objects, count=32, size=64):
    """Training and validation images of the same scenes."""
    source = datasets.load_dense("shapes", objects, "train", size, count)
    train = DenseImages(source, (size, size), (1, 1))
    train.transform = lambda *both: both  # no mirroring
    return train, DenseImages(source, (size, size))


def test_truth_of_the_scenes():
    source = datasets.load_dense("shapes", True, "val", 64, 8)
    classes = datasets.load_dense("shapes", False, "val", 64, 8)
    assert source.classes == list(datasets.SHAPE_CLASSES)
    assert classes.classes == ["background", *datasets.SHAPE_CLASSES]
    for i in range(8):
        item, truth = source[i], source.truth(i, source[i])
        assert truth["labels"][0] == item["label"] + 1  # the main object comes first
        whole = sum(label * mask for label, mask in zip(truth["labels"], truth["masks"]))
        assert np.array_equal(whole, classes.truth(i, item)) and (truth["masks"].sum(0) <= 1).all()
        assert np.array_equal(truth["areas"], truth["masks"].sum((1, 2))) and not truth["crowd"].any()


OVERFIT = dict(layer_decay=1.0, drop_path=0.0, width=32)


def test_segmentation_overfits():
    train, val = scenes(False, 6)
    torch.manual_seed(0)
    encoder = mim.ViT(64, 8, embed_dim=64, depth=3, num_heads=4)
    result = semseg(encoder, train, val, epochs=60, batch_size=6, base_lr=8e-3, warmup_epochs=6, **OVERFIT)
    assert result["miou"] > 80 and result["pixel_accuracy"] > 90 and result["classes"] == 11


def test_detection_overfits():
    train, val = scenes(True, 2)
    torch.manual_seed(0)
    encoder = mim.ViT(64, 8, embed_dim=64, depth=3, num_heads=4)
    result = detect(encoder, train, val, epochs=100, batch_size=2, base_lr=8e-3, warmup_epochs=10, **OVERFIT)
    assert result["box_ap"] > 60 and result["box_ap50"] > 90 and result["mask_ap50"] > 70


@pytest.fixture
def few_scenes(monkeypatch):
    """Of what --data names there are 4 images to evaluate."""
    load = evaluation.load_dense

    def load_few(data, objects, split, size, limit=None, categories=None):
        return load(data, objects, split, size, limit or 4, categories)

    monkeypatch.setattr(evaluation, "load_dense", load_few)


@pytest.fixture
def dense(cli, tmp_path, few_scenes):
    """dense(task, *flags) -> (exit code, the JSON line or None, stderr): of few images."""
    def call(task, *flags, out="out"):
        flags = ["--task", task, "--output", tmp_path / f"{out}.pt", *flags]
        code, text, err = cli(evaluation, "random", *flags)
        return code, json.loads(text.splitlines()[-1]) if code == 0 else None, err

    return call


FEW = ["--image-size", 32, "--limit", 8, "--batch-size", 4, "--epochs", 2, "--width", 16, "--patch-size", 4]


@pytest.mark.parametrize("task", ["semseg", "detect"])
def test_a_dense_task_resumes_exactly(dense, task, tmp_path, monkeypatch):
    monkeypatch.setitem(mim.SIZES, "nano", dict(embed_dim=32, depth=2, num_heads=2))
    code, whole, err = dense(task, *FEW, out="whole")
    assert code == 0, err
    write, written = evaluation.write_atomically, []

    def write_and_stop(path, save):
        write(path, save)
        written.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "write_atomically", write_and_stop)
    assert dense(task, *FEW)[0] == 130 and written == [tmp_path / "out.pt"]
    monkeypatch.setattr(evaluation, "write_atomically", write)
    code, result, err = dense(task, *FEW, "--resume")
    assert code == 0, err
    same = {k: v for k, v in whole.items() if k not in ("output", "picture", "seconds")}
    assert same == {k: result[k] for k in same}
    assert Path(result["picture"]).read_bytes() == Path(whole["picture"]).read_bytes()
    a, b = (torch.load(tmp_path / f"{name}.pt", weights_only=True)["model"] for name in ("whole", "out"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    code, _, err = dense(task, *FEW, "--resume", "--base-lr", 0.5)
    assert code == 2 and "was made with base_lr" in err


def test_a_log_lies_beside_the_result_and_figures_in_it_if_asked(dense, tmp_path):
    code, result, err = dense("semseg", *FEW, "--eval-every", 2, "--epochs", 3)
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3] and all(line["images_per_s"] > 0 for line in lines)
    assert ["miou" in line for line in lines] == [False, True, True]  # the last is that of the result
    assert lines[2]["miou"] == result["miou"] and lines[2]["pixel_accuracy"] == result["pixel_accuracy"]
    assert f"epoch 2, step 4, loss {lines[1]['loss']:.4g}, lr {lines[1]['lr']:.4g}" in err
    assert f"miou {lines[1]['miou']:.4g}, classes" in err
    before = (tmp_path / "out.jsonl").read_text()
    code, again, err = dense("semseg", *FEW, "--epochs", 3, "--resume")
    assert code == 0 and again["miou"] == result["miou"], err  # nothing is left to train
    assert (tmp_path / "out.jsonl").read_text() == before


# ---------------------------------------------------------------------------------------------------------
# Models that were trained here


def test_masks_are_scaled_as_their_image_is():
    """The centre of a disc and of its mask, over many scales; half a pixel of the image is lost otherwise."""
    y, x = np.mgrid[:96, :96]
    mask = torch.from_numpy((y - 40) ** 2 + (x - 55) ** 2 < 900)
    image = (255 * mask).byte().expand(3, 96, 96)
    for source in (Truth((image, objects(mask))), Truth((image, mask.numpy().astype(np.int16)))):
        items, shifts = DenseImages(source, (128, 128), (0.3, 0.9)), []
        for epoch in range(30):
            item = items[epoch, 0]
            masks = item["label"]["masks"][0] if isinstance(item["label"], dict) else item["label"] > 0
            weights = item["image"][0].float() - item["image"][0].min()
            centre = [(w * torch.arange(128.0)[:, None]).sum() / w.sum() for w in (weights, masks.float())]
            shifts.append((centre[1] - centre[0]).item())
        assert abs(np.mean(shifts)) < 0.15, shifts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{task: file of a small model with random weights, as the tasks leave it}."""
    root = tmp_path_factory.mktemp("finished")
    options = dict(finetune=dict(pool="mean"), semseg=dict(head="upernet", width=8),
                   detect=dict(width=8, window=2))
    for task, own in options.items():
        encoder = make_encoder(32, 4, depth=2, embed_dim=64, num_heads=4, relative=task == "detect")
        source = datasets.load_data("shapes", "train", 32, 4)
        if task != "finetune":
            source = datasets.load_dense("shapes", task == "detect", "train", 32, 4)
        train = DenseImages(source, (32, 32))
        classes = ["background"] * (task == "detect") + source.classes
        build = evaluation.FINISHED[task][0]
        model = build(trainable(encoder, 0.0), len(classes), **own)
        if task == "detect":  # so that some are found
            torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
        settings = evaluation.settings_of(task, dict(own, encoder=encoder, train=train), classes)
        torch.save(dict(model=model.state_dict(), args=settings, epoch=1), root / f"{task}.pt")
    return {task: root / f"{task}.pt" for task in options}


FIGURES = dict(finetune="top1", semseg="miou", detect="mask_ap50")


@pytest.mark.parametrize("task", FIGURES)
def test_a_finished_model_is_evaluated_and_not_trained_again(task, finished, cli, monkeypatch, few_scenes):
    monkeypatch.setattr(evaluation, "fit", None)
    before = finished[task].read_bytes()
    shutil.copy(finished[task], "mine.pt")
    code, out, err = cli(evaluation, "mine.pt", "--task", task, "--val-limit", 4)
    assert code == 0 and "train" not in err, err
    found = json.loads(out.splitlines()[-1])
    scenes = datasets.load_data("shapes", "val", 32, 4) if task == "finetune" else \
        datasets.load_dense("shapes", task == "detect", "val", 32, 4)
    val = datasets.Images(scenes, 32, "center") if task == "finetune" else DenseImages(scenes, (32, 32))
    figures = evaluation.FINISHED[task][1](load_finished(finished[task]), val)
    assert found[FIGURES[task]] == figures[FIGURES[task]] and finished[task].read_bytes() == before
    assert found.get("picture") == (None if task == "finetune" else "mine.png")  # no other model's


def test_files_are_predicted(finished, cli, folder, tmp_path):
    """On the command line and in a notebook: two images of one name, the same objects, pixels and classes."""
    files = [folder / split / "a" / "0.png" for split in ("train", "val")]
    images = [datasets.decode(file) for file in files]
    for task in FIGURES:
        output = tmp_path / f"{task}.png"
        flags = ["--task", task, "--images", *files, "--output", output]
        code, out, err = cli(evaluation, finished[task], *flags)
        assert code == 0, err
        result, model = json.loads(out.splitlines()[-1]), load_finished(str(finished[task]))
        assert result["picture"] == str(output) and Image.open(output).text["task"] == task
        entries = json.loads(Path(result["predictions"]).read_text())
        for file, image in zip(files, images):
            own, found = [e for e in entries if e["file_name"] == str(file)], predict(model, image)
            labels = found["labels"] if task != "semseg" else np.unique(found["classes"])
            assert [e["category_id"] for e in own] == labels.tolist() and len(labels) > 0
            assert [e["category_name"] for e in own] == [model.classes[label] for label in labels]
            assert {e["image_id"] for e in own} == {str(file)}  # a name of both would join them
            if task == "semseg":
                assert np.array_equal(datasets.read_ids(own[0]["labels"]), found["classes"])
                masks = [found["classes"] == k for k in labels]
            else:
                assert [e["score"] for e in own] == found["scores"].tolist()
                assert [e["bbox"] for e in own] == found["boxes"].tolist()
                masks = found.get("masks", [])
            for e, mask in zip(own, masks):
                assert np.array_equal(datasets.coco_mask(e["segmentation"], 32, 32), mask)
    assert len({e["labels"] for e in json.loads((tmp_path / "semseg.json").read_text())}) == 2


def test_predicted_labels_are_the_datas_own(finished, folder, tmp_path):
    model = load_finished(finished["semseg"])
    model.categories = {300 + 2 * k: name for k, name in enumerate(model.classes)}
    file = str(folder / "train" / "a" / "0.png")
    result = evaluation.predict_images(model, tmp_path / "a.png", 18 * [file])
    entries = json.loads((tmp_path / "a.json").read_text())
    labels = datasets.read_ids(entries[0]["labels"])
    assert set(labels.ravel().tolist()) == {e["category_id"] for e in entries if e["labels"] == entries[0]["labels"]}
    assert labels.min() >= 300 and len({e["labels"] for e in entries}) == 18
    model.categories = {k << 15: name for k, name in enumerate(model.classes)}  # masks in colours
    evaluation.predict_images(model, tmp_path / "c.png", [file])
    entries = json.loads((tmp_path / "c.json").read_text())
    coloured = datasets.read_ids(entries[0]["labels"])
    assert np.array_equal(coloured >> 15, (labels - 300) // 2) and not (coloured & 0x7FFF).any()
    shorter = evaluation.predict_images(model, tmp_path / "b.png", 16 * [file])
    assert torch.equal(result["picture"], shorter["picture"])  # it has the first 16
    evaluation.predict_images(model, tmp_path / "b.png", [file])  # its own file
    for mine in ('[{"name": "mine"}]', '[{"category_name": "mine"}]', "mine", '{"mine": 1}'):
        (tmp_path / "b.json").write_text(mine)
        with pytest.raises(datasets.UsageError, match="b.json is there, and no result of eval.py"):
            evaluation.predict_images(model, tmp_path / "b.png", [file])
        assert (tmp_path / "b.json").read_text() == mine


def test_other_classes_than_the_models_are_refused(finished, cli, tmp_path):
    state = mim.load_file(finished["semseg"])
    state["args"]["categories"] = dict(enumerate(state["args"]["classes"][::-1]))
    torch.save(state, tmp_path / "other.pt")
    code, _, err = cli(evaluation, tmp_path / "other.pt", "--task", "semseg")
    assert code == 2 and "--data shapes: its classes are not those of the training data" in err


@pytest.mark.parametrize("flags, words", [
    ("{detect} --task detect --epochs 3", "--epochs is for training, and {detect} is trained"),
    ("{semseg} --task semseg --limit 3", "--limit is for training"),
    ("{semseg} --task semseg --overwrite", "--overwrite is for training"),
    ("{semseg} --task semseg --limit 3 --epochs 3 --overwrite", "--limit is for training"),
    ("{semseg} --task semseg --images {image} --val-limit 3", "--val-limit is for figures, and --images are"),
    ("{semseg} --task semseg --images {image} --per-class", "--per-class is for figures, and --images are"),
    ("{semseg} --task detect --images {image}", "{semseg} is no model that --task detect has trained"),
    ("random --task detect --images {image}", "--images: random is no model"),
    ("{detect} --task detect --images {image} --data shapes", "leave one out"),
    ("{detect} --task detect --images nowhere.jpg", "--images nowhere.jpg: there is no nowhere.jpg"),
    ("damaged.pt --task semseg", "damaged.pt: it is no model of --task finetune, semseg or detect (model."),
    ("poor.pt --task semseg", "it is no model of --task finetune, semseg or detect (it has no 'classes'"),
    ("{semseg} --task semseg --images {image} --output mine.png", "mine.json is there"),
])
def test_what_a_finished_model_cannot_do_is_one_line(flags, words, finished, cli, folder):
    state = mim.load_file(finished["semseg"])
    torch.save(state | dict(model=state["model"] | {"head.classifier.weight": torch.zeros(3)}), "damaged.pt")
    torch.save(state | dict(args={k: v for k, v in state["args"].items() if k != "classes"}), "poor.pt")
    Path("mine.json").write_text("{}")
    places = dict(finished, image=folder / "val" / "a" / "0.png")
    code, _, err = cli(evaluation, *flags.format(**places).split())
    last = err.strip().splitlines()[-1]
    assert code == 2 and words.format(**places) in last and "Traceback" not in err, err
    assert Path("mine.json").read_text() == "{}"


@pytest.mark.parametrize("task", ["semseg", "detect"])
def test_lomars_encoder_at_another_size(task, tmp_path, cli, few_scenes):
    torch.save(make_encoder(64, depth=2, relative=True).state_dict(), tmp_path / "encoder.pt")
    flags = ["--task", task, "--image-size", 96, "--limit", 4, "--batch-size", 2, "--epochs", 1, "--width", 8]
    code, out, err = cli(evaluation, tmp_path / "encoder.pt", *flags)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["image_size"] == [96, 96]


@pytest.mark.parametrize("task", ["semseg", "detect"])
def test_a_dense_task_has_its_views_of_its_splits(task, cli, monkeypatch):
    """The command line gives a task training scenes that are scaled, and validation scenes that are not."""
    function = evaluation.TASKS[task]

    def items(*flags):
        @functools.wraps(function)
        def note(**arguments):
            taken.update(arguments)
            return {}

        taken = {}
        monkeypatch.setitem(evaluation.TASKS, task, note)
        code, _, err = cli(evaluation, "random", "--task", task, "--model", "nano", "--limit", 6, *flags)
        assert code == 0, err
        return taken["train"], taken["val"]

    train, val = items("--image-size", 32, 48, "--seed", 7)
    whole = datasets.load_data("shapes", "train", 48)
    assert [train.source.name(i) for i in range(6)] == [whole.name(i * 4096 // 6) for i in range(6)]
    later = datasets.load_data("shapes", "val", 48)
    assert len(val) == 1024 and val.source.name(1023) == later.name(1023)
    assert isinstance(val.source.truth(0, val.source[0]), dict) == (task == "detect")
    item = val[3]
    assert torch.equal(item["image"], later[3]["image"])
    expected = DenseImages(train.source, (32, 48), (0.8, 1.25), seed=7)
    assert all(torch.equal(train[1, i]["image"], expected[1, i]["image"]) for i in range(6))
    train, val = items("--image-size", 128, "--patch-size", 16)
    scale = (0.5, 2.0) if task == "semseg" else (0.1, 2.0)
    expected = DenseImages(train.source, (128, 128), scale, distort=task == "semseg")
    assert all(torch.equal(train[1, i]["image"], expected[1, i]["image"]) for i in range(6))


# ---------------------------------------------------------------------------------------------------------
# Other people's data


def write_ade20k(root, labels=(0, 1, 7, 150)):
    for part in ("training", "validation"):
        for folder in ("images", "annotations"):
            (root / folder / part).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(root / "images" / part / f"{i}.jpg")
            truth = np.repeat(np.array(labels, np.uint8), 150).reshape(20, 30)
            Image.fromarray(truth).save(root / "annotations" / part / f"{i}.png")
    return root


def test_ade20ks_layout(tmp_path):
    source = datasets.load_dense(str(write_ade20k(tmp_path)), False, "val")
    truth = source.truth(0, source[0])
    assert len(source) == 2 and len(source.classes) == 150 and truth.shape == (20, 30)
    assert sorted(set(truth.ravel().tolist())) == [-1, 0, 6, 149]  # 0 is unlabelled, 1..150 are the classes


def test_pascal_vocs_layout(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(tmp_path / "JPEGImages" / "b.jpg")
    Image.new("RGB", (30, 20)).save(tmp_path / "JPEGImages" / "a.jpg")
    palette = Image.fromarray(np.repeat(np.array([0, 15, 20, 255], np.uint8), 150).reshape(20, 30), "P")
    palette.putpalette([k * 7 % 256 for k in range(768)])
    palette.save(tmp_path / "SegmentationClass" / "b.png")
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("b\n")
    source = datasets.load_dense(str(tmp_path), False, "val")
    assert len(source) == 1 and source.classes[15] == "person"
    assert sorted(set(source.truth(0, source[0]).ravel().tolist())) == [-1, 0, 15, 20]


def spoil(root, what):
    if what == "label":
        Image.fromarray(np.full((20, 30), 200, np.uint8)).save(root / "annotations" / "training" / "0.png")
    elif what == "size":
        Image.fromarray(np.full((30, 20), 1, np.uint8)).save(root / "annotations" / "training" / "0.png")
    elif what == "missing":
        for path in (root / "annotations" / "training").iterdir():
            path.unlink()
    elif what == "broken":
        (root / "annotations" / "training" / "0.png").write_bytes(b"no image")


@pytest.mark.parametrize("what, words", [
    ("label", "label 200 is not one of 150 classes"),
    ("size", "has 30x20 pixels, its annotations have 20x30"),
    ("missing", "{ade}/annotations/training: nothing in it has the name of an image, such as 0.jpg"),
    ("broken", "{ade}/annotations/training/0.png cannot be read"),
])
def test_labels_that_do_not_fit_are_one_line(dense, tmp_path, what, words):
    spoil(write_ade20k(tmp_path / "ade"), what)
    flags = ["--image-size", 32, "--patch-size", 8, "--model", "nano", "--epochs", 1, "--batch-size", 2]
    code, _, err = dense("semseg", "--data", tmp_path / "ade", *flags, "--head", "linear")
    assert code == 2 and words.format(ade=tmp_path / "ade") in err and "Traceback" not in err, err
    assert "0.png" in err or "0.jpg" in err


@pytest.mark.parametrize("task, words", [
    ("semseg", "it has no classes of pixels"), ("detect", "it has no objects"),
])
def test_data_without_truth_are_refused(dense, folder, task, words):
    code, _, err = dense(task, "--data", folder, "--image-size", 32, "--patch-size", 8, "--model", "nano")
    assert code == 2 and words in err and err.strip().count("\n") == 0


def test_coco_objects_and_crowds(tmp_path):
    """An image without objects, one with an object and a crowd. Categories are numbered from 1 in the order
    of their ids."""
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for i in range(2):
        Image.new("RGB", (30, 20)).save(tmp_path / "train2017" / f"{i}.jpg")
    shapes = [dict(image_id=1, category_id=9, area=50, iscrowd=0, bbox=[1.5, 3, 10.5, 5],
                   segmentation=[[2, 3, 12, 3, 12, 8, 2, 8]]),
              dict(image_id=1, category_id=4, area=600, iscrowd=1, bbox=[0, 0, 30, 20],
                   segmentation=dict(size=[20, 30], counts=[0, 600]))]
    images = [dict(id=i, file_name=f"{i}.jpg", width=30, height=20) for i in range(2)]
    names = [dict(id=9, name="cat"), dict(id=4, name="dog")]
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(dict(images=images, annotations=shapes, categories=names)))
    source = datasets.load_dense(str(tmp_path), True, "train")
    assert source.classes == ["dog", "cat"]
    empty, full = (source.truth(i, source[i]) for i in range(2))
    assert empty["masks"].shape == (0, 20, 30) and len(empty["labels"]) == 0
    assert full["labels"].tolist() == [2, 1] and full["crowd"].tolist() == [False, True]
    assert full["masks"][0].sum() == 50 and full["areas"].tolist() == [50, 600]
    assert full["boxes"].tolist() == [[1.5, 3, 10.5, 5], [0, 0, 30, 20]]  # as annotated, not around the mask
    items = DenseImages(source, (32, 32), (1, 1))
    assert items[0]["label"]["boxes"].shape == (0, 4) and items[1]["label"]["labels"].tolist() == [2]
    assert DenseImages(source, (32, 32))[1]["label"]["labels"].tolist() == [2, 1]  # crowds are for figures


def spoil_validation(root, task):
    """Of two images, the first has labels or objects that do not fit."""
    if task == "detect":
        path = root / "annotations" / "instances_val2017.json"
        data = json.loads(path.read_text())
        data["annotations"][0]["segmentation"] = [6 * ["a"]]
        path.write_text(json.dumps(data))
        return f"{path}: broken annotations of {root}/val2017/0.jpg"
    path = root / "annotations" / "validation" / "0.png"
    Image.fromarray(np.full((20, 30), 200, np.uint8)).save(path)
    return f"{path}: label 200 is not one of 150 classes"


@pytest.mark.parametrize("task", ["semseg", "detect"])
def test_validation_data_are_opened_before_the_training(dense, tmp_path, monkeypatch, task):
    if task == "semseg":
        write_ade20k(tmp_path / "data")
    else:
        for split in ("train", "val"):
            write_objects(tmp_path / "data", split)
    told = spoil_validation(tmp_path / "data", task)
    monkeypatch.setattr(evaluation, "fit", lambda *_, **__: pytest.fail("it was trained"))
    flags = ["--data", tmp_path / "data", "--image-size", 32, "--model", "nano", "--limit", 2]
    code, _, err = dense(task, *flags)
    assert code == 2 and told in err and "Traceback" not in err, err


def write_objects(root, split):
    """COCO's layout: two images with an object each."""
    images, objects = [], []
    for k in range(2):
        (root / f"{split}2017").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20)).save(root / f"{split}2017" / f"{k}.jpg")
        images.append(dict(id=k, file_name=f"{k}.jpg"))
        objects.append(dict(image_id=k, category_id=1, segmentation=[[0, 0, 9, 0, 9, 9, 0, 9]]))
    (root / "annotations").mkdir(exist_ok=True)
    content = dict(images=images, annotations=objects, categories=[dict(id=1, name="square")])
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------------------
# LVIS's loss and detector


def chosen_classes(logits, labels, weights, count):
    """The columns of the logits that the loss depends on."""
    logits = logits.clone().requires_grad_()
    evaluation.federated_loss(logits, torch.tensor(labels), torch.tensor(weights), count).backward()
    return set(logits.grad.any(0).nonzero()[:, 0].tolist())


def test_the_federated_loss_of_all_classes_by_hand():
    logits, labels = torch.randn(4, 6), torch.tensor([2, 0, 5, 2])
    loss = evaluation.federated_loss(logits, labels, torch.ones(6))
    truth = torch.zeros(4, 6)
    truth[0, 2] = truth[2, 5] = truth[3, 2] = 1
    share = logits.sigmoid()
    expected = -(truth * share.log() + (1 - truth) * (1 - share).log())[:, 1:].sum() / 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_federated_loss_takes_the_classes_of_the_labels_and_draws_others():
    """The background is one of the count, though it has no loss."""
    torch.manual_seed(0)
    logits, weights = torch.randn(3, 8), [0.0, 1, 3, 1, 1, 0, 1, 1]
    for count, labels in ((4, [0, 5, 2]), (4, [5, 5, 2]), (2, [1, 5, 2]), (1, [0, 0, 0])):
        classes = {*labels, 0} - {0}
        found = [chosen_classes(logits, labels, weights, count) for _ in range(20)]
        assert all(some >= classes and 0 not in some for some in found)
        assert {len(some) for some in found} == {max(count - (0 in labels), len(classes))}
    drawn = [chosen_classes(logits, [0, 0, 6], weights, 3) - {6} for _ in range(300)]
    shares = [sum(k in some for some in drawn) / 300 for k in range(8)]  # in proportion to the weights
    assert shares == pytest.approx([0, 1 / 7, 3 / 7, 1 / 7, 1 / 7, 0, 0, 1 / 7], abs=0.08)


@pytest.fixture
def rarely():
    """A detector of three classes for LVIS."""
    return Detector(make_encoder(32, 4), 4, width=8, image_counts=[1, 4, 16])


def test_lviss_detector_gives_sigmoids(rarely):
    """So that an object can be of two classes. At most 300 detections of at least 0.02."""
    heads = rarely.eval().roi_heads
    assert (heads.score_thresh, heads.detections_per_img) == (0.02, 300)
    torch.nn.init.zeros_(heads.box_predictor.cls_score.weight)
    logits = torch.tensor([9, 2, -3.5, 1])  # the first is the background's
    heads.box_predictor.cls_score.bias.data[:] = logits
    with torch.no_grad():
        found, = rarely(torch.randn(1, 3, 32, 32))
    scores = {k: found["scores"][found["labels"] == k] for k in (1, 2, 3)}
    assert len(scores[2]) and all(scores[k] == pytest.approx(logits[k].sigmoid().item()) for k in scores)


def test_lviss_detector_learns_by_the_federated_loss(rarely, monkeypatch):
    asked = []

    def note(logits, labels, weights):
        asked.append((type(logits), labels.max().item(), weights.tolist()))
        return logits.sum() * 0 + 7

    monkeypatch.setattr(evaluation, "federated_loss", note)
    targets = [dict(boxes=torch.tensor([[4.0, 4, 20, 20]]), labels=torch.tensor([2]),
                    masks=torch.ones(1, 32, 32, dtype=torch.uint8))]
    losses = rarely.train()(torch.randn(1, 3, 32, 32), targets)
    assert losses["loss_classifier"] == 7 and asked == [(torch.Tensor, 2, [0, 1, 2, 4])]
    sum(losses.values()).backward()
    plain = Detector(make_encoder(32, 4), 4, width=8).train()
    assert plain(torch.randn(1, 3, 32, 32), targets)["loss_classifier"] != 7
    assert (plain.roi_heads.score_thresh, plain.roi_heads.detections_per_img) == (0.05, 100)


def test_lviss_detector_is_evaluated_as_lvis_is_and_rebuilt(monkeypatch, tmp_path):
    """Of the classes red is rare, green frequent, and the image is known to have no red. An object is green,
    a second is not annotated."""
    image, truth = spots(8, 16)
    truth = {name: values[1:] for name, values in truth.items()}
    truth |= dict(neg_category_ids=np.array([1]), not_exhaustive_category_ids=np.array([], int))
    source = Truth((image, truth), (image, truth), classes=["red", "green"])
    source.image_counts, source.groups = [1, 2000], {1: "r", 2: "f"}
    monkeypatch.setattr(evaluation, "Detector", Spotter)
    train = DenseImages(Truth(*2 * [spots(32, 32)], classes=["red", "green"]), (32, 32), (1, 1))
    train.source.image_counts = source.image_counts
    result = detect(make_encoder(32, depth=2), train, DenseImages(source, (32, 32)), epochs=1, batch_size=2,
                    width=8, per_class=True, output=tmp_path / "detect.pt")
    figures = {name: result[f"box_{name}"] for name in ("ap", "ap_r", "ap_f")}
    assert figures == dict(ap=100, ap_r=None, ap_f=100)
    assert result["box_ap_by_class"] == result["mask_ap_by_class"] == {"green": 100}
    heads = load_finished(tmp_path / "detect.pt").roi_heads
    logits, _ = heads.box_predictor(torch.zeros(1, 32))
    assert heads.detections_per_img == 300 and logits.weights.tolist() == pytest.approx([0, 1, 2000 ** 0.5])


def test_each_class_has_its_own_figure_if_asked(monkeypatch):
    truth = np.zeros((8, 8), np.int16)
    truth[4:6, :4], truth[4:6, 4:], truth[6:] = 2, 3, datasets.IGNORED
    val = Truth((painting(torch.from_numpy(np.where(truth == 3, 2, truth.clip(0)))), truth), classes=NAMES)
    result = segmentation(monkeypatch, val, size=(8, 8), per_class=True)
    assert "iou_by_class" not in segmentation(monkeypatch, val, size=(8, 8))
    found = result["iou_by_class"]
    assert found == {NAMES[0]: 100, NAMES[2]: 50, NAMES[3]: 0} and result["miou"] == 50
    result = detection(monkeypatch, spots(8, 16), spots(16, 8, labels=[1, 1]), per_class=True)
    assert set(result["box_ap_by_class"]) == {"red", "green"} == set(result["mask_ap_by_class"])
    assert result["box_ap_by_class"]["red"] < result["box_ap_by_class"]["green"] == 100
    assert np.mean([*result["box_ap_by_class"].values()]) == pytest.approx(result["box_ap"], abs=0.01)
    assert "box_ap_by_class" not in detection(monkeypatch, spots(8, 16))


@pytest.mark.parametrize("task, name", [("semseg", "iou_by_class"), ("detect", "box_ap_by_class")])
def test_figures_of_classes_on_the_command_line(task, name, finished, cli, few_scenes):
    """Of a model that is trained; in training, test_eval.py tries the flag."""
    code, out, err = cli(evaluation, finished[task], "--task", task, "--val-limit", 1, "--per-class")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])[name]
    assert found and set(found) <= {"background", *datasets.SHAPE_CLASSES}


def test_masks_are_pasted_in_full_precision():
    mask, box = torch.rand(1, 28, 28), torch.tensor([10.3, 20.7, 310.2, 250.9])
    plain = evaluation.paste(mask, box, (300, 400))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(evaluation.paste(mask, box, (300, 400)), plain)


def test_detection_computes_eight_images_at_a_time_unless_told_otherwise(monkeypatch):
    def train_epochs(*_, batch_size, accumulate, **options):
        steps.append((batch_size, accumulate))
        return iter(())

    steps = []
    monkeypatch.setattr(evaluation, "train_epochs", train_epochs)
    train = DenseImages(datasets.load_dense("shapes", True, limit=40), (64, 64), (1.0, 1.0))
    monkeypatch.setattr(evaluation, "score_objects", lambda *_: {})
    for accumulate in (None, 1):
        detect(mim.ViT(64, 8, 32, 2, 2), train, train, batch_size=32, width=8, accumulate=accumulate)
    assert steps == [(32, 4), (32, 1)]
