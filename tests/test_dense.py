"""Dense transfer: windows against loops, pyramids' shapes, gradients, heads against numbers by hand, overfitting."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import datasets
import eval as evaluation
import mim
from eval import DenseImages, Segmenter, UPerNet, ViTDet, block_outputs, detect, make_detector, semseg, trainable

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
    after = {depth: Segmenter(make_encoder(depth=depth), 2).after for depth in (1, 2, 5, 6, 12, 24)}
    assert after[12] == [4, 6, 8, 12] and after[24] == [8, 12, 16, 24]  # BEiT's code: ViT-B, ViT-L
    assert after[6] == [2, 3, 4, 6] and after[5] == [2, 3, 4, 5] and after[2] == [1, 1, 2, 2]
    assert after[1] == [1, 1, 1, 1]
    assert ViTDet(make_encoder(depth=12)).global_blocks == [3, 6, 9, 12]  # ViTDet, §3
    assert ViTDet(make_encoder(depth=32)).global_blocks == [8, 16, 24, 32]
    assert ViTDet(make_encoder(depth=6)).global_blocks == [2, 3, 5, 6]


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
    assert sizes == [(16, 32, 48), (16, 16, 24), (16, 8, 12), (16, 4, 6)]  # patches of 16 pixels: 4, 8, 16, 32


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
    assert not any(reached) if freeze else sum(reached) > 0.8 * len(reached)  # gradients of key biases are zero
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
    """A grid of 5 x 7 in windows of 3 x 3: behind the norm, zeros fill up those at the edges and are attended to."""
    encoder = make_encoder((40, 56), relative=relative)
    backbone = ViTDet(encoder, width=8, window=3).eval()
    x, block = torch.randn(2, 5, 7, 32), encoder.blocks[0]
    normed, attention = torch.zeros(2, 6, 9, 32), torch.zeros(2, 6, 9, 32)
    normed[:, :5, :7] = block.norm1(x)
    buckets = mim.relative_buckets((3, 3))[1:, 1:] if relative else None
    for row in (0, 3):
        for column in (0, 3, 6):
            inside = normed[:, row:row + 3, column:column + 3]
            attention[:, row:row + 3, column:column + 3] = block.attn(inside.flatten(1, 2), buckets).unflatten(1, (3, 3))
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
    model = make_detector(trainable(make_encoder(64), 0.0, freeze), 3, width=8, window=4).train()
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


@pytest.mark.parametrize("size, patch", [((32, 48), 4), ((64, 96), 8), (96, 12), (128, 16)])
def test_anchors_and_pools_know_the_strides(size, patch):
    model = make_detector(make_encoder(size, patch), 3, width=8).eval()
    H, W = mim.pair(size)
    seen = {}
    model.rpn.anchor_generator.register_forward_hook(lambda module, inputs, output: seen.update(anchors=output[0]))
    with torch.no_grad():
        out = model(torch.randn(1, 3, H, W))
    cells = [(4 * H // patch) * (4 * W // patch) // 4**level for level in range(4)]
    finest, second = seen["anchors"].split([3 * cells[0], 3 * cells[1], len(seen["anchors"]) - 3 * sum(cells[:2])])[:2]
    centres = (second[:, :2] + second[:, 2:]) / 2
    assert centres.amax(0).tolist() == [W - patch // 2, H - patch // 2]  # strides of half a patch
    sides = (finest[1::3, 2:] - finest[1::3, :2]).unique()
    assert sides.tolist() == [2 * patch]  # eight strides of a quarter of a patch
    # Feature Pyramid Networks, Eq. 1, where 224 is 14 patches of 16.
    boxes = torch.tensor([[0, 0, s, s] for s in (3.4, 3.6, 6.9, 7.1, 13.9, 14.1, 27.9, 28.1, 100)]) * patch
    assert model.roi_heads.box_roi_pool.map_levels([boxes]).tolist() == [0, 1 - 1, 0, 1, 1, 2, 2, 3, 3]
    assert model.roi_heads.box_roi_pool.scales == [4 / patch, 2 / patch, 1 / patch, 0.5 / patch]
    assert set(out[0]) == {"boxes", "labels", "scores", "masks"}


def test_detector_takes_images_as_they_are():
    model = make_detector(make_encoder((32, 48), 4), 3, width=8).eval()
    images, seen = torch.randn(2, 3, 32, 48), []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    torch.testing.assert_close(seen[0], images)


@pytest.mark.parametrize("size, patch", [(42, 14), (24, 8)])
def test_detector_refuses_sizes_that_have_no_whole_strides(size, patch):
    with pytest.raises(ValueError, match="divisible"):
        make_detector(make_encoder(size, patch), 3)


# ---------------------------------------------------------------------------------------------------------
# The two tasks


def scenes(objects, count=32, size=64):
    """Training and validation images of the same scenes."""
    source = datasets.load_dense("shapes", objects, "train", size, count)
    train = DenseImages(source, (size, size), (1, 1))
    train.transform.transforms.pop()  # no mirroring
    return train, DenseImages(source, (size, size))


def test_truth_of_the_scenes():
    source = datasets.load_dense("shapes", True, "val", 64, 8)
    classes = datasets.load_dense("shapes", False, "val", 64, 8)
    assert source.classes == list(datasets.SHAPES) and classes.classes == ["background", *datasets.SHAPES]
    for i in range(8):
        item, truth = source[i], source.truth(i, source[i])
        assert truth["labels"][0] == item["label"] + 1  # the main object comes first
        whole = sum(label * mask for label, mask in zip(truth["labels"], truth["masks"]))
        assert np.array_equal(whole, classes.truth(i, item)) and (truth["masks"].sum(0) <= 1).all()
        assert np.array_equal(truth["areas"], truth["masks"].sum((1, 2))) and not truth["crowd"].any()


def test_boxes_and_masks_are_cropped_with_the_image():
    """An image whose pixels are its mask: they still are after scaling, cropping and mirroring."""

    class Source(list):
        def truth(self, index, item):
            masks = (item["image"][:1] > 128).numpy()
            return dict(masks=masks, labels=np.array([3]), areas=masks.sum((1, 2)), crowd=np.array([False]))

        def name(self, index):
            return "square"

    image = torch.zeros(3, 48, 80, dtype=torch.uint8)
    image[:, 10:30, 20:60] = 255
    items = DenseImages(Source([dict(image=image)]), (64, 64), (0.5, 2.0))
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
    again = items[7, 0]
    assert torch.equal(again["image"], items[7, 0]["image"])


OVERFIT = dict(layer_decay=1.0, drop_path=0.0, width=32)


@pytest.mark.parametrize("head, patch_size", [("linear", 4), ("upernet", 8)])
def test_segmentation_overfits(head, patch_size):
    train, val = scenes(False, 12)
    torch.manual_seed(0)
    encoder = mim.ViT(64, patch_size, embed_dim=64, depth=3, num_heads=4)
    result = semseg(encoder, train, val, head, epochs=60, batch_size=6, base_lr=8e-3, warmup_epochs=6, **OVERFIT)
    assert result["miou"] > 80 and result["pixel_accuracy"] > 90 and result["classes"] == 11


def test_detection_overfits():
    train, val = scenes(True, 8)
    torch.manual_seed(0)
    encoder = mim.ViT(64, 8, embed_dim=64, depth=3, num_heads=4)
    result = detect(encoder, train, val, epochs=100, batch_size=4, base_lr=5e-3, warmup_epochs=10, **OVERFIT)
    assert result["box_ap"] > 60 and result["box_ap50"] > 90 and result["mask_ap50"] > 70


def test_a_perfect_prediction_scores_a_hundred(monkeypatch):
    train, val = scenes(False, 4)

    def predict(model, dataset, *rest):
        for i in range(len(dataset)):
            item = dataset.source[i]
            truth = dataset.source.truth(i, item)
            yield dict(original=item["image"], label=truth), F.one_hot(torch.from_numpy(truth).long(), 11).permute(2, 0, 1).float()

    monkeypatch.setattr(evaluation, "predict_dense", predict)
    monkeypatch.setattr(evaluation, "fit", lambda *args, **options: {})
    result = semseg(make_encoder(64), train, val, "linear")
    assert result["miou"] == 100 and result["pixel_accuracy"] == 100


@pytest.fixture
def dense(cli, tmp_path):
    """dense(task, *flags) -> (exit code, the JSON line or None, stderr), of an untrained encoder on few scenes."""

    def call(task, *flags, out="out"):
        code, text, err = cli(evaluation, "random", "--task", task, "--output", tmp_path / f"{out}.pt", *flags)
        return code, json.loads(text.splitlines()[-1]) if code == 0 else None, err

    return call


FEW = ["--limit", 12, "--batch-size", 4, "--epochs", 2, "--width", 16, "--precision", "fp32"]


@pytest.mark.parametrize("task", ["semseg", "detect"])
def test_a_dense_task_resumes_exactly(dense, task, tmp_path, monkeypatch):
    val = datasets.load_dense
    monkeypatch.setattr(evaluation, "load_dense", lambda data, objects, split, size, limit: val(data, objects, split, size, 12))
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
    assert Path(result["picture"]).is_file()
    a, b = (torch.load(tmp_path / f"{name}.pt", weights_only=True)["model"] for name in ("whole", "out"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    code, _, err = dense(task, *FEW, "--resume", "--base-lr", 0.5)
    assert code == 2 and "was made with base_lr" in err


@pytest.mark.parametrize("task", ["semseg", "detect"])
def test_lomars_encoder_at_another_size(task, tmp_path, cli, monkeypatch):
    load = datasets.load_dense
    monkeypatch.setattr(evaluation, "load_dense", lambda data, objects, split, size, limit: load(data, objects, split, size, 8))
    torch.save(make_encoder(64, relative=True).state_dict(), tmp_path / "encoder.pt")
    flags = ["--task", task, "--image-size", 96, "--limit", 4, "--batch-size", 2, "--epochs", 1, "--width", 8]
    code, out, err = cli(evaluation, tmp_path / "encoder.pt", *flags)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["image_size"] == [96, 96]


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
    assert sorted(set(truth.ravel().tolist())) == [0, 6, 149, 255]  # 0 is unlabelled, 1..150 are the classes


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
    assert sorted(set(source.truth(0, source[0]).ravel().tolist())) == [0, 15, 20, 255]


def spoil(root, what):
    if what == "label":
        Image.fromarray(np.full((20, 30), 200, np.uint8)).save(root / "annotations" / "training" / "0.png")
    elif what == "size":
        Image.fromarray(np.full((30, 20), 1, np.uint8)).save(root / "annotations" / "training" / "0.png")
    elif what == "missing":
        (root / "annotations" / "training" / "0.png").unlink()
    elif what == "broken":
        (root / "annotations" / "training" / "0.png").write_bytes(b"no image")


@pytest.mark.parametrize("what, words", [
    ("label", "label 200 is not one of 150 classes"), ("size", "has 30x20 pixels, its annotations have 20x30"),
    ("missing", "labels of {ade}/images/training/0.jpg: there is no {ade}/annotations/training/0.png"),
    ("broken", "{ade}/annotations/training/0.png cannot be read"),
])
def test_labels_that_do_not_fit_are_one_line(dense, tmp_path, what, words):
    spoil(write_ade20k(tmp_path / "ade"), what)
    code, _, err = dense("semseg", "--data", tmp_path / "ade", "--image-size", 32, "--patch-size", 8, "--model", "nano",
                         "--epochs", 1, "--batch-size", 2, "--head", "linear")
    assert code == 2 and words.format(ade=tmp_path / "ade") in err and "Traceback" not in err, err
    assert "0.png" in err or "0.jpg" in err


@pytest.mark.parametrize("task, words", [("semseg", "it has no classes of pixels"), ("detect", "it has no objects")])
def test_data_without_truth_are_refused(dense, folder, task, words):
    code, _, err = dense(task, "--data", folder, "--image-size", 32, "--patch-size", 8, "--model", "nano")
    assert code == 2 and words in err and err.strip().count("\n") == 0


def test_coco_objects_and_crowds(tmp_path):
    """An image without objects, one with an object and a crowd: categories are numbered from 1 in the order of ids."""
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for i in range(2):
        Image.new("RGB", (30, 20)).save(tmp_path / "train2017" / f"{i}.jpg")
    shapes = [dict(image_id=1, category_id=9, area=50, iscrowd=0, bbox=[1.5, 3, 10.5, 5], segmentation=[[2, 3, 12, 3, 12, 8, 2, 8]]),
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
    assert full["labels"].tolist() == [1, 2] and full["crowd"].tolist() == [True, False]
    assert full["masks"][1].sum() == 50 and full["areas"].tolist() == [600, 50]
    assert full["boxes"].tolist() == [[0, 0, 30, 20], [1.5, 3, 12, 8]]  # as annotated, not around the mask
    items = DenseImages(source, (32, 32), (1, 1))
    assert items[0]["label"]["boxes"].shape == (0, 4) and items[1]["label"]["labels"].tolist() == [2]
    encoder = make_encoder(32)
    shutil.copytree(tmp_path / "train2017", tmp_path / "val2017")
    result = detect(encoder, items, DenseImages(source, (32, 32)), epochs=1, batch_size=2, width=8)
    assert result["box_ap"] is not None and 0 <= result["box_ap"] <= 100
