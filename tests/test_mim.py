"""The ViT, the masks, the losses and the methods, against numbers worked out another way."""

import doctest
import inspect
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mim
from mim import AMT, CAE, MAE, RAE, RMAE, BEiT, LoMaR, ObjMAE, SimMIM, ViT

SMALL = dict(image_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=4)
DECODER = dict(decoder_dim=16, decoder_depth=2, decoder_heads=2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(batch=4, height=32, width=32):
    return torch.randn(batch, 3, height, width)


# The methods, tiny, by name


def vit(**options):
    return ViT(**SMALL | options)


def mae(**options):
    return MAE(vit(), **DECODER | options)


def simmim(**options):
    return SimMIM(vit(), **options)


def amt_mae(**options):
    return AMT(mae(), **options)


def amt_simmim(**options):
    return AMT(simmim(), **options)


def lomar(**options):
    return LoMaR(vit(relative_position=True), **dict(window_size=5, num_windows=2) | options)


def objmae(**options):
    return ObjMAE(vit(), **DECODER | options)


BUILDERS = {"mae": mae, "simmim": simmim, "amt-mae": amt_mae, "amt-simmim": amt_simmim, "lomar": lomar,
            "objmae": objmae}


# Patches, positions, the ViT


def test_patchify_orders_row_column_channel():
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = mim.patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    # Patch 4 of a 2x3 grid is at row 1, column 1: pixels (2..3, 2..3).
    expected = [x[1, c, 2 + r, 2 + k].item() for r in range(2) for k in range(2) for c in range(3)]
    assert patches[1, 4].tolist() == expected
    assert torch.equal(mim.unpatchify(patches, 2, (2, 3)), x)


def test_patchify_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="divisible by patch_size=5.*32x32"):
        mim.patchify(images(), 5)


def test_sincos_table_against_its_definition():
    table = mim.sincos_position_embedding(16, (3, 5))[0]
    assert table.shape == (16, 16) and not table[0].any()
    for row, column in itertools.product(range(3), range(5)):
        for i in range(4):
            w = 1 / 10000 ** (i / 4)
            entry = table[1 + row * 5 + column]
            expected = [math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w)]
            assert entry[[i, 4 + i, 8 + i, 12 + i]].tolist() == pytest.approx(expected, abs=1e-6)


def test_parameters_are_named_and_shaped_as_timm_names_them():
    vit = ViT(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    expected = {"cls_token": (1, 1, 32), "pos_embed": (1, 17, 32), "patch_embed.proj.weight": (32, 3, 8, 8),
                "patch_embed.proj.bias": (32,), "norm.weight": (32,), "norm.bias": (32,)}
    for i in range(2):
        for name, shape in {"norm1": (32,), "norm2": (32,), "attn.qkv": (96, 32), "attn.proj": (32, 32),
                            "mlp.fc1": (128, 32), "mlp.fc2": (32, 128)}.items():
            expected |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    assert {k: tuple(v.shape) for k, v in vit.state_dict().items()} == expected


@pytest.mark.parametrize("name, millions", [
    ("tiny", 5.5), ("small", 21.7), ("base", 85.8), ("large", 303.3), ("huge", 630.8)])
def test_sizes_are_the_literatures(name, millions):
    with torch.device("meta"):
        vit = ViT(224, 14 if name == "huge" else 16, **mim.SIZES[name])
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_initial_weights():
    vit = ViT(embed_dim=192, depth=1, num_heads=3)
    bound = math.sqrt(6 / (192 + 3 * 16 * 16))  # xavier-uniform of a Linear from a whole patch
    weight, qkv = vit.patch_embed.proj.weight, vit.blocks[0].attn.qkv.weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert qkv.abs().max().item() == pytest.approx(math.sqrt(6 / (4 * 192)), rel=0.01)
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.3) and not vit.pos_embed.requires_grad


def test_block_against_float64_arithmetic():
    block = mim.Block(8, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def norm(x, layer):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * layer.weight + layer.bias

    q, k, v = (norm(x, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias).split(8, dim=-1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = (q[..., h] @ k[..., h].transpose(1, 2) / math.sqrt(4)).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ v[..., h])
    y = x + torch.cat(heads, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = norm(y, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    assert torch.allclose(block(x), y + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias, atol=1e-12)


@pytest.mark.parametrize("relative_position", [False, True])
def test_last_attention_is_what_the_last_block_applies_to_each_query(relative_position):
    encoder, pictures = vit(relative_position=relative_position), images(2)
    for block in encoder.blocks:
        if relative_position:
            torch.nn.init.normal_(block.attn.relative_table)
    x = encoder.sequence(encoder.embed(pictures))
    for block in encoder.blocks[:-1]:
        x = block(x, encoder.buckets)
    attn = encoder.blocks[-1].attn
    x = encoder.blocks[-1].norm1(x)
    weights = attn.weights(x, buckets=encoder.buckets)
    applied = attn.proj((weights @ attn.split_heads(x)[2]).transpose(1, 2).flatten(2))
    assert torch.allclose(applied, attn(x, encoder.buckets), atol=1e-5)
    for query in (0, 1, 7, 64):  # the class token, and patches 0, 6 and 63
        shown = encoder.last_attention(pictures, query)
        assert shown.shape == (2, 4, 64)
        assert torch.allclose(shown, weights[:, :, query, 1:], atol=1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 65))


def test_every_token_has_its_own_position_the_class_token_too():
    """The tables of some releases give the class token a position; ours is zero there."""
    encoder, x, ids = vit(), images(2), torch.tensor([[3, 9, 60], [0, 8, 31]])
    encoder.pos_embed.data.normal_()
    table, tokens = encoder.pos_embed, encoder.embed(x)
    chosen = [[encoder.cls_token[0, 0] + table[0, 0]] + [tokens[b, i] + table[0, 1 + i] for i in ids[b]]
              for b in range(2)]
    expected = torch.stack([torch.stack(row) for row in chosen])
    assert torch.equal(encoder.sequence(tokens, ids), expected)


@pytest.mark.parametrize("relative_position", [False, True])
def test_tokens_that_may_not_be_attended_to_change_no_other(relative_position):
    encoder, tokens = vit(relative_position=relative_position), torch.randn(2, 64, 32)
    keep = torch.rand(2, 64) < 0.5
    other = torch.where(keep[..., None], tokens, torch.randn(2, 64, 32))
    one, two = (encoder.encode(x, keep=keep)[:, 1:] for x in (tokens, other))
    assert torch.allclose(one[keep], two[keep], atol=1e-6)
    assert not torch.allclose(encoder.encode(tokens)[:, 1:][keep], one[keep], atol=1e-3)


def test_drop_path_grows_from_zero_over_the_blocks_and_drops_whole_images():
    encoder, x = vit(depth=5, drop_path=0.4), torch.ones(4000, 1, 1)
    dropped = [(block.drop_path(x) == 0).float() for block in encoder.blocks]
    assert [d.mean().item() for d in dropped] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=0.03)
    kept = encoder.blocks[4].drop_path(torch.ones(50, 3, 2)).flatten(1)
    assert torch.equal(kept, kept[:, :1].expand(-1, 6))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert torch.equal(encoder.eval().blocks[4].drop_path(x), x)


def test_encoding_chosen_patches_ignores_the_others_and_their_order():
    encoder, x = vit(image_size=(32, 64), patch_size=8), images(2, 32, 64)
    ids = torch.tensor([[3, 9, 30], [0, 8, 31]])
    out = encoder(x, ids)
    noise = mim.patchify(torch.randn_like(x), 8)
    other = mim.unpatchify(mim.put(noise, ids, mim.take(mim.patchify(x, 8), ids)), 8, encoder.grid)
    assert torch.allclose(encoder(other, ids), out, atol=1e-5)
    assert torch.allclose(encoder(x, ids.flip(1))[:, 1:].flip(1), out[:, 1:], atol=1e-5)
    everything = torch.arange(32).expand(2, -1)
    assert torch.allclose(encoder(x, everything), encoder(x), atol=1e-5)
    assert torch.allclose(encoder.features(x, "mean"), encoder(x)[:, 1:].mean(1))
    assert torch.equal(encoder.features(x), encoder(x)[:, 0])


def test_vit_names_the_wrong_size():
    words = r"images of 3 channels, height and width \(32, 32\), got "
    with pytest.raises(ValueError, match=words + r"\[1, 3, 32, 40\]"):
        vit()(images(1, 32, 40))
    with pytest.raises(ValueError, match=words + r"\[2, 1, 32, 32\]"):
        vit()(images(2)[:, :1])
    with pytest.raises(ValueError, match="multiple of patch_size=16, got 30x32"):
        ViT(image_size=(30, 32))


def test_forward_cost_is_the_papers():
    """GMAC at ViT-B/16, 224 pixels: MAE 9.78, AMT 5.94, SimMIM 17.6; AMT on SimMIM at most 0.76 of that."""
    with torch.device("meta"):
        encoder, x = ViT(), images(1, 224, 224)
        on_mae, on_simmim = AMT(MAE(encoder)), AMT(SimMIM(encoder))

        @torch.no_grad()
        def gmac(method, weights=None):
            ids = {} if weights is None else dict(zip(("ids_visible", "ids_masked"), method.draw(weights)))
            with FlopCounterMode(display=False) as counter:
                method(x, **ids)
            return counter.get_total_flops() / 2e9

        assert gmac(on_mae.base) == pytest.approx(9.78, rel=0.01)
        assert gmac(on_mae, torch.rand(1, 14, 14)) == pytest.approx(5.94, rel=0.01)
        whole = gmac(on_simmim.base)
        assert whole == pytest.approx(17.6, rel=0.01)
        assert gmac(on_simmim, torch.rand(1, 7, 7)) / whole < 0.76


# Masks


def assert_partition(*ids, n):
    together = torch.cat(ids, dim=1)
    assert together.dtype == torch.int64
    assert torch.equal(together.sort(1).values, torch.arange(n).expand(len(together), -1))


SIXTEEN = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
REGIONS = SIXTEEN.repeat_interleave(4, 2).repeat_interleave(4, 3)
ONES, OBJECT = torch.ones(1, 60), (torch.arange(60) < 30)[None]
# name: (images, generator) -> tensors, a row an image.
DRAWS = {
    "random": lambda n, g: mim.random_masking(n, 60, 0.5, generator=g),
    "units": lambda n, g: mim.unit_masking(n, (12, 12), 2, 0.5, generator=g),
    "windows": lambda n, g: mim.window_masking(n, (12, 12), 5, 3, 0.5, generator=g),
    "blocks": lambda n, g: mim.block_masking(n, (12, 12), 60, generator=g),
    "one-block": lambda n, g: [mim.random_blocks(torch.full((n,), 90.0), (80, 80), 0.3, generator=g)],
    "attention": lambda n, g: mim.attention_masking(ONES.expand(n, -1), 20, 20, generator=g),
    "attention-low": lambda n, g: mim.attention_masking(ONES.expand(n, -1), 20, 20, "low", generator=g),
    "attention-random": lambda n, g: mim.attention_masking(ONES.expand(n, -1), 20, 20, "random", generator=g),
    "regions": lambda n, g: [mim.sample_regions(
        REGIONS.expand(n, -1, -1, -1), torch.arange(16).expand(n, -1), 4, 9, generator=g)],
    "objects": lambda n, g: [mim.select_objects(REGIONS.expand(n, -1, -1, -1), 5)[0]],
    "keep": lambda n, g: [mim.keep_patches(OBJECT.expand(n, -1), 15)],
    "divide": lambda n, g: mim.divide_patches(OBJECT.expand(n, -1), 9),
    "align": lambda n, g: mim.align_patches(OBJECT.expand(n, -1), ~OBJECT.expand(n, -1), 30, "throwout")[:2],
    "align-random": lambda n, g: mim.align_patches(
        OBJECT.expand(n, -1), ~OBJECT.expand(n, -1), 30, "random")[:2],
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_image_has_draws_of_its_own(name):
    for drawn in DRAWS[name](8, None):
        rows = {tuple(row.flatten().tolist()) for row in drawn}
        assert len(drawn) == len(rows) == 8


@pytest.mark.parametrize("name", DRAWS)
def test_draws_depend_on_the_seed_and_on_nothing_else(name):
    def draw(seed, other_seed=0, generator=True):
        torch.manual_seed(other_seed)
        return torch.cat(
            [x.flatten() for x in DRAWS[name](3, torch.Generator().manual_seed(seed) if generator else None)])

    if name not in ("objects", "keep", "divide", "align", "align-random"):  # these take no generator
        assert torch.equal(draw(1, 2), draw(1, 3)) and not torch.equal(draw(1, 2), draw(4, 2))
    one, again, other = (draw(0, seed, generator=False) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("n, ratio, visible", [
    (196, 0.75, 49), (196, 0.5, 98), (100, 0.9, 10), (10, 0.75, 2), (64, 0.75, 16)])
def test_random_masking_counts(n, ratio, visible):
    ids_visible, ids_masked = mim.random_masking(3, n, ratio)
    assert ids_visible.shape == (3, visible)
    assert_partition(ids_visible, ids_masked, n=n)


def test_shares_are_exact_where_floats_are_not():
    """100 * 0.29 is 28.999999999999996, and 100 * 0.07 is 7.000000000000001."""
    assert [mim.count_share(100, share) for share in (0.29, 0.07, 0.075, 1.0)] == [29, 7, 7, 100]
    assert [mim.count_share(100, share, round_up=True) for share in (0.29, 0.07, 0.075)] == [29, 7, 8]


def test_random_masking_is_uniform_over_patches_and_pairs():
    draws = 20_000
    ids_visible, _ = mim.random_masking(draws, 12, 0.75)
    shown = torch.zeros(draws, 12).scatter(1, ids_visible, 1.0)
    tolerance = 5 / math.sqrt(draws)  # 5 standard deviations and more
    assert (shown.mean(0) - 3 / 12).abs().max() < tolerance
    pairs = shown.T @ shown / draws
    assert (pairs[~torch.eye(12, dtype=bool)] - 3 / 12 * 2 / 11).abs().max() < tolerance


def test_unit_masking_masks_whole_units():
    ids_visible, ids_masked = mim.unit_masking(5, (14, 14), 2, 0.6)
    assert ids_masked.shape == (5, 30 * 4) and ids_visible.shape == (5, 19 * 4)  # ceil(49 * 0.6) = 30
    assert_partition(ids_visible, ids_masked, n=196)
    masked = torch.zeros(5, 196).scatter(1, ids_masked, 1.0).view(5, 7, 2, 7, 2)
    assert torch.equal(masked.amax((2, 4)), masked.amin((2, 4)))
    # A unit in row 1, column 1 of 2 x 3 units.
    assert mim.units_to_patches(torch.tensor([[4]]), (4, 6), 2).tolist() == [[14, 15, 20, 21]]


def sequential_draws(weights):
    """P(order) of drawing without replacement by weight, for all orders of few items."""
    table = {}
    for order in itertools.permutations(range(len(weights))):
        p, left = 1.0, sum(weights)
        for i in order:
            p, left = p * weights[i] / left, left - weights[i]
        table[order] = p
    return table


def test_attention_masking_is_weighted_sampling_without_replacement():
    weights, draws = [0.1, 0.2, 0.3, 0.4], 40_000
    ids_visible, ids_masked, ids_thrown = mim.attention_masking(torch.tensor(weights).expand(draws, -1), 1, 1)
    assert ids_visible.shape == (draws, 2)
    table = sequential_draws(weights)
    for i in range(4):
        first = sum(p for order, p in table.items() if order[0] == i)
        second = sum(p for order, p in table.items() if order[1] == i)
        last_two = sum(p for order, p in table.items() if i in order[2:])
        for ids, p in ((ids_masked, first), (ids_thrown, second), (ids_visible, last_two)):
            assert (ids == i).any(1).float().mean().item() == pytest.approx(p, abs=5 * 0.5 / math.sqrt(draws))


def test_a_patchs_chance_to_be_masked_rises_with_its_weight():
    weights = torch.linspace(0.05, 1, 64)
    _, ids_masked, _ = mim.attention_masking(weights.expand(20_000, -1), 28, 25)
    chance = torch.bincount(ids_masked.flatten(), minlength=64) / 20_000
    smooth = chance.view(8, 8).mean(1)  # neighbours averaged, so that noise cannot reverse the order
    assert (smooth.diff() > 0.01).all() and chance[-1] < 0.95 and chance[0] > 0.005


def test_what_is_thrown():
    weights = torch.rand(5, 20)
    for throw in ("middle", "low", "random"):
        ids = mim.attention_masking(weights, 9, 8, throw)
        assert [i.shape[1] for i in ids] == [3, 9, 8]
        assert_partition(*ids, n=20)
    # So steep that the order is nearly sure.
    sharp = torch.tensor([1e6] * 3 + [1.0] * 3 + [1e-6] * 3).expand(200, -1)
    for throw, expected in (("middle", {3, 4, 5}), ("low", {6, 7, 8})):
        ids_visible, ids_masked, ids_thrown = mim.attention_masking(sharp, 3, 3, throw)
        assert set(ids_masked.unique().tolist()) == {0, 1, 2}
        assert set(ids_thrown.unique().tolist()) == expected
    _, ids_masked, _ = mim.attention_masking(sharp, 3, 3, "random")
    assert set(ids_masked.unique().tolist()) == set(range(9))  # Table 4, MAE+Random T: the map plays no part


def test_half_precision_draws_as_finely():
    """Maps are kept in float16, whose random numbers would often be equal."""
    weights = torch.rand(8, 49).half()
    some, others = (mim.attention_masking(w, 9, 8, generator=torch.Generator().manual_seed(0))
                    for w in (weights, weights.float()))
    assert all(map(torch.equal, some, others))


def test_zero_weights_come_last_in_random_order():
    weights = torch.zeros(4000, 10)
    weights[:, 7] = 0.5
    _, ids_masked, _ = mim.attention_masking(weights, 2, 0)
    assert (ids_masked[:, 0] == 7).all()
    others = torch.bincount(ids_masked[:, 1], minlength=10) / 4000
    assert others[7] == 0 and (others[torch.arange(10) != 7] - 1 / 9).abs().max() < 0.03


# Losses


def test_pixel_loss_by_hand():
    pred, target = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 1.0, 5.0, 5.0]]])
    assert mim.pixel_loss(pred, target).item() == pytest.approx((1 + 0 + 9 + 4) / 4)
    absolute = mim.pixel_loss(pred, target, distance=torch.nn.functional.l1_loss)
    assert absolute.item() == pytest.approx((1 + 0 + 3 + 2) / 4)
    s = math.sqrt(16 / 3 + 1e-6)  # unbiased: squares of (-2, -2, 2, 2) over n - 1
    expected = sum((p - t) ** 2 for p, t in zip([0, 1, 2, 3], [-2 / s, -2 / s, 2 / s, 2 / s])) / 4
    assert mim.pixel_loss(pred, target, norm_pix=True).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_prediction_reconstructs_the_image(norm_pix):
    x = images(2, 16, 24)
    _, ids_masked = mim.random_masking(2, 24, 0.75)
    target = mim.take(mim.patchify(x, 4), ids_masked)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(mim.reconstruct(x, target, ids_masked, 4, norm_pix), x, atol=1e-5)
    assert not torch.allclose(mim.reconstruct(x, target * 0, ids_masked, 4, norm_pix), x, atol=0.1)


# MAE and SimMIM


@pytest.mark.parametrize("name", BUILDERS)
def test_every_method_returns_the_same_keys_learns_everywhere_and_replays(name):
    method, x = BUILDERS[name](), images()
    out = method(x)
    assert {"loss", "pred", "ids_visible", "ids_masked"} <= out.keys()
    assert out["pred"].shape == (*out["ids_masked"].shape, 4 * 4 * 3)
    again = method(x, ids_visible=out["ids_visible"], ids_masked=out["ids_masked"])
    assert torch.equal(again["loss"], out["loss"]) and torch.equal(again["pred"], out["pred"])
    out["loss"].backward()
    still = {n for n, p in method.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {n for n, _ in method.named_parameters() if n.endswith("pos_embed")}


@pytest.mark.parametrize("name", BUILDERS)
def test_predictions_see_visible_patches_alone(name):
    method, x = BUILDERS[name](), images().requires_grad_()
    out = method(x)
    out["pred"].sum().backward()
    used = mim.patchify(x.grad, 4).abs().sum(-1)
    expected = torch.zeros(4, 64).scatter(1, out["ids_visible"], 1.0).bool()
    assert torch.equal(used > 0, expected)


def test_mae_against_the_releases_way_of_decoding():
    """The release sorts all tokens back to raster order and predicts every patch; ours does neither."""
    method, x = mae().double(), images().double()
    out = method(x)
    order = torch.cat([out["ids_visible"], out["ids_masked"]], dim=1)
    latents = method.decoder_embed(method.encoder(x, out["ids_visible"]))
    tokens = torch.cat([latents[:, 1:], method.mask_token.expand(4, 48, -1)], dim=1)
    tokens = mim.take(tokens, order.argsort(1))
    y = torch.cat([latents[:, :1], tokens], dim=1) + method.decoder_pos_embed
    for block in method.decoder_blocks:
        y = block(y)
    pred = method.decoder_pred(method.decoder_norm(y))[:, 1:]
    target = mim.patchify(x, 4)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    mask = torch.ones(4, 64).double().scatter(1, out["ids_visible"], 0.0)
    loss = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    assert torch.allclose(mim.take(pred, out["ids_masked"]), out["pred"], atol=1e-10)
    assert out["loss"].item() == pytest.approx(loss.item(), rel=1e-6)


def test_simmim_loss_is_mean_absolute_error_of_raw_pixels():
    x = images()
    out = simmim()(x)
    target = mim.take(mim.patchify(x, 4), out["ids_masked"])
    assert out["loss"].item() == pytest.approx((out["pred"] - target).abs().mean().item(), rel=1e-6)
    assert out["ids_masked"].shape[1] == 10 * 4  # ceil(16 units * 0.6) = 10


BAD = [
    (MAE, dict(mask_ratio=1.0), "mask_ratio=1.0 masks 64 of 64; at least one must be masked and one visible"),
    (MAE, dict(mask_ratio=math.nan), "mask_ratio must be in 0..1, got nan"),
    (MAE, dict(mask_ratio=math.inf), "mask_ratio must be in 0..1, got inf"),
    (MAE, dict(mask_ratio=-0.5), "mask_ratio must be in 0..1, got -0.5"),
    (MAE, dict(decoder_dim=0), "decoder_dim must be at least 1, got 0"),
    (MAE, dict(decoder_dim=30), "decoder_dim must be divisible by 4 and by decoder_heads=16, got 30"),
    (MAE, dict(decoder_heads=0), "decoder_heads must be at least 1, got 0"),
    (MAE, dict(decoder_heads=7), "decoder_dim must be divisible by 4 and by decoder_heads=7, got 512"),
    (MAE, dict(decoder_depth=-1), "decoder_depth must be at least 1, got -1"),
    (SimMIM, dict(unit_size=3), "unit_size=3 must divide both sides of the grid, (8, 8)"),
    (SimMIM, dict(unit_size=0), "unit_size=0 must divide"),
    (SimMIM, dict(mask_ratio=0), "mask_ratio=0 masks 0 of 16"),
    (SimMIM, dict(mask_ratio=math.nan), "mask_ratio must be in 0..1, got nan"),
    (amt_mae, dict(mask_ratio=0.7, throw_ratio=0.32),
     "mask_ratio=0.7 and throw_ratio=0.32 leave nothing visible: 44 masked and 20 thrown of 64"),
    (amt_mae, dict(throw_ratio=math.nan), "throw_ratio must be in 0..1, got nan"),
    (amt_mae, dict(throw_ratio=-0.1), "throw_ratio must be in 0..1, got -0.1"),
    (amt_mae, dict(mask_ratio=math.inf), "mask_ratio must be in 0..1, got inf"),
    (amt_mae, dict(throw="top"), "throw must be middle or low or random, got 'top'"),
    (amt_mae, dict(interval=0), "interval must be at least 1, got 0"),
    (LoMaR, dict(), "needs an encoder with relative positions"),
    (lomar, dict(window_size=9), "window_size must be in 1..8, got 9"),
    (lomar, dict(window_size=0), "window_size must be in 1..8, got 0"),
    (lomar, dict(window_size=7, num_windows=0), "num_windows must be in 1..4, got 0"),
    (lomar, dict(window_size=7, num_windows=5), "num_windows must be in 1..4, got 5"),
    (lomar, dict(mask_ratio=1), "mask_ratio=1 masks 25 of 25"),
    (vit, dict(embed_dim=30), "embed_dim must be divisible by 4 and by num_heads=4, got 30"),
    (vit, dict(embed_dim=0), "embed_dim must be at least 1, got 0"),
    (vit, dict(num_heads=0), "num_heads must be at least 1, got 0"),
    (vit, dict(depth=-2), "depth must be at least 1, got -2"),
    (vit, dict(patch_size=0), "patch_size must be at least 1, got 0"),
    (vit, dict(drop_path=1.5), "drop_path must be in 0..1, got 1.5"),
    (objmae, dict(alpha=0.6), "alpha must be in 0.015625..0.5, got 0.6"),
    (objmae, dict(alpha=math.nan), "alpha must be in 0.015625..0.5, got nan"),
    (objmae, dict(alpha=0.001), "alpha must be in 0.015625..0.5, got 0.001"),
    (objmae, dict(alignment="cut"), "alignment must be throwout or zero or replicate or random, got 'cut'"),
    (objmae, dict(selection="both"), "selection must be intra or inter, got 'both'"),
    (objmae, dict(object_floor=-1), "object_floor must be in 0..1, got -1"),
    (objmae, dict(patch_share=0.0), "patch_share must be in 0.0625..1, got 0.0"),
]


@pytest.mark.parametrize("build, options, words", BAD, ids=[f"{b.__name__}-{o}" for b, o, _ in BAD])
def test_bad_arguments_are_named(build, options, words):
    encoder = () if build in (amt_mae, lomar, objmae, vit) else (vit(),)
    with pytest.raises(ValueError, match=re.escape(words)):
        build(*encoder, **options)


# AMT


def test_amt_counts_are_the_papers():
    encoder = ViT(embed_dim=16, depth=1, num_heads=2)
    on_mae, on_simmim = MAE(encoder, **DECODER), SimMIM(encoder)
    for base, options, ratios, counts in [
            (on_mae, dict(), (0.45, 0.4), (30, 88, 78)),
            (on_mae, dict(throw_ratio=0), (0.75, 0), (49, 147, 0)),
            (on_mae, dict(mask_ratio=0.75, throw_ratio=0.1), (0.75, 0.1), (30, 147, 19)),
            (on_simmim, dict(), (0.44, 0.26), (14 * 4, 22 * 4, 13 * 4)),
            (on_simmim, dict(throw_ratio=0), (0.6, 0), (19 * 4, 30 * 4, 0)),
            (on_simmim, dict(mask_ratio=0.33, throw_ratio=0.5), (0.33, 0.5), (7 * 4, 17 * 4, 25 * 4))]:
        amt = AMT(base, **options)
        assert (amt.mask_ratio, amt.throw_ratio) == ratios  # what None came to
        ids = amt.draw(torch.rand(2, *amt.unit_grid))
        assert tuple(i.shape[1] for i in ids) == counts
        assert_partition(*ids, n=196)


@pytest.mark.parametrize("build", [amt_mae, amt_simmim])
def test_thrown_patches_change_nothing(build):
    amt, x = build(), images()
    ids = amt.draw(torch.rand(4, *amt.unit_grid))
    out = amt(x, ids_visible=ids[0], ids_masked=ids[1])
    noise = torch.randn(4, ids[2].shape[1], 48)
    other = mim.unpatchify(mim.put(mim.patchify(x, 4), ids[2], noise), 4, (8, 8))
    assert torch.equal(amt(other, ids_visible=ids[0], ids_masked=ids[1])["loss"], out["loss"])


def test_attention_map_is_the_mean_of_heads_scaled_each():
    amt, x = amt_mae(), images()
    heads = amt.encoder.last_attention(x)
    low, high = heads.min(2, keepdim=True).values, heads.max(2, keepdim=True).values
    expected = ((heads - low) / (high - low)).mean(1)
    assert torch.allclose(mim.attention_map(amt.encoder, x).flatten(1), expected, atol=1e-5)
    assert amt.training and amt.encoder.training


def test_attention_maps_are_made_without_drop_path_and_leave_the_mode_as_it_was():
    encoder, x = vit(drop_path=0.9), images()
    assert torch.equal(mim.attention_map(encoder, x), mim.attention_map(encoder, x)) and encoder.training
    mim.attention_map(encoder.eval(), x)
    assert not encoder.training


@pytest.mark.parametrize("build", [amt_mae, amt_simmim])
def test_without_an_index_the_maps_lie_as_the_images_do(build, monkeypatch):
    amt = build()
    maps = torch.arange(64.0).view(1, 8, 8).expand(4, -1, -1)  # from the first patch to the last
    monkeypatch.setattr(mim, "attention_map", lambda encoder, images: maps)
    weights = amt.patch_weights(images(), None, None, None)
    assert weights.shape == (4, *amt.unit_grid)
    assert (weights.diff(dim=2) > 0).all() and (weights.diff(dim=1) > 0).all()


def test_maps_are_kept_for_each_image_and_cut_from_its_own():
    amt = amt_mae()
    amt.maps = torch.arange(5.0).view(5, 1, 1).expand(5, 8, 8)
    box, flip = torch.tensor([[0.0, 0, 1, 1]]).expand(3, -1), torch.zeros(3, dtype=torch.bool)
    weights = amt.patch_weights(images(3), torch.tensor([4, 0, 2]), box, flip)
    assert torch.allclose(weights.mean((1, 2)), torch.tensor([4.0, 0, 2]))


def test_masks_are_random_until_there_are_maps_and_follow_them_then():
    amt, x = amt_mae(), images(64)
    index, box = torch.arange(64), torch.tensor([[0.0, 0, 1, 1]]).expand(64, -1)
    flip = torch.zeros(64, dtype=torch.bool)
    first = amt(x, index, box, flip)
    assert first["ids_masked"].shape[1] == 48 and first["ids_thrown"].shape[1] == 0  # MAE's 0.75 of 64
    amt.maps = torch.zeros(64, 8, 8, dtype=torch.float16)
    # All attention is on the left of the top two rows. Of 64 patches 28 are masked, 25 thrown.
    amt.maps[:, :2, :4] = 1.0
    then = amt(x, index, box, flip)
    assert [then[k].shape[1] for k in ("ids_masked", "ids_thrown", "ids_visible")] == [28, 25, 11]
    assert all({0, 1, 2, 3, 8, 9, 10, 11} <= set(ids) for ids in then["ids_masked"].tolist())
    then = amt(x, index, box, ~flip)
    assert all({4, 5, 6, 7, 12, 13, 14, 15} <= set(ids) for ids in then["ids_masked"].tolist())
    lower_half = torch.tensor([[0.0, 0.5, 1, 1]]).expand(64, -1)  # without attention
    elsewhere = amt(x, index, lower_half, flip)
    chance = torch.bincount(elsewhere["ids_masked"].flatten(), minlength=64) / 64
    assert chance.min() > 0.15 and chance.max() < 0.75
    assert "maps" not in amt.state_dict()


def test_maps_are_updated_at_the_papers_epochs():
    def due(amt, epochs):
        return [epoch for epoch in range(epochs) if amt.maps_due(epoch, epochs)]

    on_mae, on_simmim = amt_mae(), amt_simmim()
    assert due(on_mae, 400) == list(range(40, 400, 40)) and due(on_simmim, 200) == [40, 80, 120, 160]
    assert due(on_mae, 50) == list(range(5, 50, 5)) and due(on_simmim, 50) == [10, 20, 30, 40]
    assert due(on_mae, 20) == [4, 8, 12, 16] and due(on_simmim, 10) == [4, 8]  # in short runs a bit rarer
    assert due(amt_mae(interval=4), 9) == [4, 8]
    assert [on_mae.interval_for(e) for e in (1, 30, 400, 1600)] == [4, 4, 40, 40]
    assert on_simmim.interval_for(100) == 20


def test_random_throwing_begins_with_the_second_interval_and_looks_at_no_image():
    amt = amt_mae(throw="random")
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, -1), torch.zeros(4, dtype=torch.bool)
    out = amt(images(), torch.arange(4), *whole)
    assert out["ids_thrown"].shape[1] == 0 and out["ids_masked"].shape[1] == 48  # the base's 0.75
    assert [e for e in range(40) if amt.maps_due(e, 40)] == list(range(4, 40, 4))
    amt.update_maps(iter(lambda: pytest.fail("a batch is read"), None), 4)
    out = amt(images(), torch.arange(4), *whole)
    assert out["ids_thrown"].shape[1] == 25 and out["ids_masked"].shape[1] == 28
    with pytest.raises(ValueError, match="index needs box and flip"):
        amt(images(), torch.arange(4))


def test_update_maps_places_each_map_at_its_index():
    amt, x = amt_mae(), images(6)
    amt.update_maps([(x[[4, 0, 2]], torch.tensor([4, 0, 2])), (x[[5, 1]], torch.tensor([5, 1]))], 6)
    assert amt.maps.dtype == torch.float16 and amt.maps.shape == (6, 8, 8)
    known = [0, 1, 2, 4, 5]
    assert torch.allclose(amt.maps[known].float(), mim.attention_map(amt.encoder, x[known]), atol=1e-3)
    assert not amt.maps[3].any()


def test_crop_maps_by_hand():
    maps = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]).repeat_interleave(8, 1).repeat_interleave(8, 2)
    maps = maps.expand(3, -1, -1)
    box = torch.tensor([[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 1, 0.5]])
    crops = mim.crop_maps(maps, box, torch.tensor([False, False, True]), (4, 4))
    assert torch.allclose(crops[0][:3, :3], torch.zeros(3, 3))
    assert torch.allclose(crops[1][1:, 1:], torch.full((3, 3), 3.0))
    assert torch.allclose(crops[2][:3], torch.tensor([1.0, 1, 0, 0]).expand(3, -1), atol=0.13)  # flipped


def test_crop_maps_of_a_grid_that_is_not_square():
    """Values that grow linearly with the column or with the row: a cell has the value of its centre."""
    row, column = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(30) + 0.5, indexing="ij")
    box = torch.tensor([[0.1, 0.25, 0.7, 0.75]])  # columns 3 to 21, rows 3 to 9
    for flip in (False, True):
        x, y = (mim.crop_maps(m[None], box, torch.tensor([flip]), (2, 3))[0] for m in (column, row))
        assert torch.allclose(x, torch.tensor([18.0, 12, 6] if flip else [6.0, 12, 18]).expand(2, -1))
        assert torch.allclose(y, torch.tensor([[4.5], [7.5]]).expand(-1, 3))


# LoMaR


def test_relative_buckets_by_hand():
    """round(1.9 + ln(|x|/1.9) / ln(8) * 1.9): 2 -> 1.95, 3 -> 2.32, 4 -> 2.58, 5 -> 2.78, 6 -> 2.95,
    8 -> 3.21, 11 -> 3.50."""
    index = {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 6: 3, 8: 3, 11: 3, 13: 3, 40: 3}
    buckets = mim.relative_buckets((14, 41))
    assert buckets.shape == (1 + 14 * 41,) * 2 and set(buckets.unique().tolist()) == set(range(50))
    assert (buckets[0] == 49).all() and (buckets[:, 0] == 49).all() and (buckets[1:, 1:] < 49).all()
    for dy, dx in itertools.product([0, 1, 2, 3, 4, 5, 6, 8, 11, 13], index):
        there, back = 1 + dy * 41 + dx, 1  # from the first patch to dy rows below and dx columns to the right
        assert buckets[back, there] == (index[dy] + 3) * 7 + index[dx] + 3
        assert buckets[there, back] == (3 - index[dy]) * 7 + 3 - index[dx]


def test_relative_attention_against_its_formula_in_float64():
    attn = mim.Attention(8, 2, relative_position=True).double()
    torch.nn.init.normal_(attn.relative_table)
    buckets, x = mim.relative_buckets((2, 3)), torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = attn.split_heads(x)
    out = torch.zeros_like(q)
    for b, h, i in itertools.product(range(2), range(2), range(7)):
        r = attn.relative_table[buckets[i]]  # [L, d]: r_ij for all j
        logits = torch.stack([q[b, h, i] @ k[b, h, j] / math.sqrt(4) + q[b, h, i] @ r[j] for j in range(7)])
        out[b, h, i] = logits.softmax(0) @ v[b, h]
        if i == 3:
            assert torch.allclose(attn.weights(x, buckets=buckets)[b, h, 3], logits.softmax(0))
    assert torch.allclose(attn(x, buckets), attn.proj(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("grid, window, windows", [
    ((14, 14), 7, 4), ((8, 8), 5, 2), ((6, 11), 4, 3), ((5, 5), 5, 1)])
def test_windows_are_squares_inside_the_grid(grid, window, windows):
    ids_visible, ids_masked = mim.window_masking(6, grid, window, windows, 0.8)
    masked = int(window**2 * 0.8)
    assert ids_masked.shape == (6, windows * masked)
    assert ids_visible.shape == (6, windows * (window**2 - masked))
    ids = torch.cat([ids_visible.view(6, windows, -1), ids_masked.view(6, windows, -1)], dim=2).sort(2).values
    first = ids[..., :1]
    square = (torch.arange(window)[:, None] * grid[1] + torch.arange(window)).flatten()
    assert torch.equal(ids, first + square)
    assert first.min() >= 0
    assert (first // grid[1] + window <= grid[0]).all() and (first % grid[1] + window <= grid[1]).all()


def test_windows_are_uniform_over_places_and_drawn_for_each_image():
    draws = 20_000
    ids_visible, ids_masked = mim.window_masking(draws, (5, 6), 3, 2, 0.8)
    ids = torch.cat([ids_visible.view(draws, 2, -1), ids_masked.view(draws, 2, -1)], dim=2)
    first = ids.min(2).values  # the upper left patch: 3 x 4 places
    assert (first[:, 0] != first[:, 1]).all()  # "at different spatial locations"
    counts = torch.bincount(first.flatten(), minlength=30)[[r * 6 + c for r in range(3) for c in range(4)]]
    assert counts.sum() == first.numel()
    assert (counts / first.numel() - 1 / 12).abs().max() < 5 * math.sqrt(1 / 12 / first.numel())
    pairs = torch.bincount(first[:, 0] * 30 + first[:, 1])
    # Each pair of places is as likely.
    assert (pairs[pairs > 0] / draws - 1 / 132).abs().max() < 5 * math.sqrt(1 / 132 / draws)
    inside = (ids_masked.view(draws, 2, 7) - first[..., None])
    chance = torch.bincount(inside.flatten(), minlength=18).float() / inside.shape[:2].numel()
    assert (chance[[0, 1, 2, 6, 7, 8, 12, 13, 14]] - 7 / 9).abs().max() < 0.02  # uniform inside the window
    one, two = (inside[:, w].sort(1).values for w in range(2))
    assert (one == two).all(1).float().mean() < 0.06  # each window has a mask of its own: by chance one of 36


def test_a_moved_window_predicts_the_same():
    """The image and its windows, moved by whole patches: absolute positions are really gone."""
    method = lomar().double()
    for block in method.encoder.blocks:
        torch.nn.init.normal_(block.attn.relative_table)
    patches = torch.randn(1, 8, 8, 48).double()
    moved = patches.roll((2, 1), (1, 2))
    ids_visible, ids_masked = mim.window_masking(1, (6, 7), 5, 2, 0.8)  # on the part that stays inside
    place = lambda ids, dy, dx: (ids // 7 + dy) * 8 + ids % 7 + dx  # noqa: E731
    preds = []
    for x, dy, dx in ((patches, 0, 0), (moved, 2, 1)):
        ids = dict(ids_visible=place(ids_visible, dy, dx), ids_masked=place(ids_masked, dy, dx))
        preds.append(method(mim.unpatchify(x.flatten(1, 2), 4, (8, 8)), **ids)["pred"])
    assert torch.allclose(*preds, atol=1e-10) and preds[0].std() > 0.1
    assert "encoder.pos_embed" not in method.state_dict()


def test_a_window_of_the_whole_grid_is_what_the_encoder_gives():
    """One window of 8x8 patches, one of them masked: the prediction is head(encoder(masked image))."""
    method = lomar(window_size=8, num_windows=1, mask_ratio=1.5 / 64).double()
    encoder = method.encoder
    for block in encoder.blocks:
        torch.nn.init.normal_(block.attn.relative_table)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = method(x)
    tokens = mim.put(encoder.embed(x), out["ids_masked"], method.mask_token)
    expected = method.head(mim.take(encoder.encode(tokens)[:, 1:], out["ids_masked"]))
    assert torch.allclose(out["pred"], expected, atol=1e-12) and expected.std() > 0.1


def test_more_windows_than_places_are_refused():
    with pytest.raises(ValueError, match=r"num_windows must be in 1..4, got 5"):
        mim.window_masking(1, (8, 8), 7, 5, 0.8)


def test_checkpoints_load_whatever_the_default_dtype(tmp_path):
    vit = mim.ViT(32, 8, 16, 1, 2)
    torch.save(vit.state_dict(), tmp_path / "encoder.pt")
    torch.set_default_dtype(torch.float64)
    try:
        again, names = mim.vit_from_checkpoint(tmp_path / "encoder.pt")
    finally:
        torch.set_default_dtype(torch.float32)
    assert names == ([], []) and torch.equal(again.pos_embed.float(), vit.pos_embed)
    assert torch.equal(again.blocks[0].mlp.fc1.weight.float(), vit.blocks[0].mlp.fc1.weight)


def test_relative_positions_matter_and_learn():
    method, x = lomar(), images()
    method(x)["loss"].backward()
    assert all(b.attn.relative_table.grad.abs().max() > 0 for b in method.encoder.blocks)
    before = method.encoder(x)
    torch.nn.init.normal_(method.encoder.blocks[0].attn.relative_table)
    assert not torch.allclose(method.encoder(x), before, atol=1e-3)


def test_windows_are_sequences_of_their_own():
    method, x = lomar(), images(2)
    out = method(x)
    one = {k: out[k][:, : out[k].shape[1] // 2] for k in ("ids_visible", "ids_masked")}
    assert torch.allclose(method(x, **one)["pred"], out["pred"][:, : one["ids_masked"].shape[1]], atol=1e-5)
    shared = {k: out[k][:1] for k in one}  # [1, n], for all images
    again, each = method(x, **shared), method(x, **{k: ids.expand(2, -1) for k, ids in shared.items()})
    assert torch.equal(again["loss"], each["loss"]) and torch.equal(again["pred"], each["pred"])


def test_lomar_defaults_and_cost_are_the_papers():
    """17.5 GMAC at ViT-B/16 with 4 windows of 7x7; at 448 pixels the same but for the patch projection."""

    def build(size, **options):
        with torch.device("meta"):
            method = LoMaR(ViT(size, relative_position=True), **options)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                method(torch.randn(1, 3, size, size))
        return method, counter.get_total_flops() / 2e9

    def windows(size, patch_size=16, **options):
        with torch.device("meta"):
            encoder = ViT(size, patch_size, 32, 1, 2, relative_position=True)
            return LoMaR(encoder, **options).num_windows

    method, small = build(224)
    assert (method.num_windows, method.window_size, method.num_masked, method.num_visible) == (4, 7, 39, 10)
    assert small == pytest.approx(17.5, rel=0.01)
    projection = (28**2 - 14**2) * 768 * 768 / 1e9
    assert build(448, num_windows=4)[1] - projection == pytest.approx(small, rel=1e-6)
    assert [windows(size) for size in (384, 448)] == [6, 9]
    assert windows(224, patch_size=8) == 4  # §4.1, pretraining on small patches
    assert (windows(448, patch_size=32), windows(384, patch_size=32)) == (4, 3)
    assert [windows(224, window_size=k) for k in (5, 9, 11, 14)] == [8, 3, 2, 1]


def test_the_plain_vit_pays_nothing():
    assert vit().buckets is None and not any("relative" in k or "bucket" in k for k in vit().state_dict())


def test_a_relative_encoder_loads_at_any_size():
    relative = ViT(**SMALL, relative_position=True)
    for block in relative.blocks:
        torch.nn.init.normal_(block.attn.relative_table)
    vit, report = mim.vit_from_checkpoint(relative.state_dict(), image_size=(32, 48))
    assert report == ([], []) and vit.grid == (8, 12) and vit.blocks[0].attn.num_heads == 4
    assert torch.equal(vit.blocks[2].attn.relative_table, relative.blocks[2].attn.relative_table)
    narrow = ViT(32, 4, embed_dim=192, depth=12, num_heads=6, relative_position=True)
    assert mim.vit_from_checkpoint(narrow.state_dict(), 32)[0].blocks[0].attn.num_heads == 6
    with pytest.raises(ValueError, match="give image_size"):
        mim.vit_from_checkpoint(relative.state_dict())
    with pytest.raises(ValueError, match="another architecture: there is no blocks.0.attn.relative_table"):
        mim.load_encoder(ViT(**SMALL), relative.state_dict())


# Loading weights


def timm_style(vit):
    return {k: torch.randn_like(v) for k, v in vit.state_dict().items()}


def test_loads_timm_release_and_own_checkpoints(tmp_path):
    vit = ViT(**SMALL)
    state = timm_style(vit)
    sources = {
        "timm": state | {"head.weight": torch.zeros(10, 32)},
        "release": {"model": state | {"mask_token": torch.zeros(1, 1, 16),
                                      "decoder_embed.weight": torch.zeros(16, 32)}},
        "ours": {"model": {f"base.encoder.{k}": v for k, v in state.items()} | {"base.extra": torch.zeros(1)},
                 "epoch": 3},
        "wrapped": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }
    left = {"timm": 1, "release": 2, "ours": 1, "wrapped": 0}
    for name, content in sources.items():
        torch.save(content, tmp_path / "file.pth")
        for source in (tmp_path / "file.pth", content):
            vit = ViT(**SMALL)
            missing, left_over = mim.load_encoder(vit, source)
            assert (len(missing), len(left_over)) == (0, left[name])
            assert all(torch.equal(v, state[k]) for k, v in vit.state_dict().items())


def test_loads_an_mae_of_the_release_with_its_decoder():
    ours = {k: torch.randn_like(v) for k, v in mae().state_dict().items()}
    release = {k.removeprefix("encoder."): v for k, v in ours.items()}
    assert {"mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.1.attn.qkv.weight",
            "decoder_norm.bias", "decoder_pred.weight", "cls_token", "blocks.0.norm1.bias"} <= release.keys()
    for source in ({"model": release}, ours):
        fresh = mae()
        assert mim.load_mae(fresh, source) == ([], [])
        assert all(torch.equal(v, ours[k]) for k, v in fresh.state_dict().items())


def test_vit_from_checkpoint_reads_the_sizes_off_the_tensors():
    state = timm_style(ViT(64, 8, **mim.SIZES["tiny"]))
    encoder, (missing, left_over) = mim.vit_from_checkpoint(state)
    heads = encoder.blocks[0].attn.num_heads
    assert (encoder.image_size, encoder.patch_size, len(encoder.blocks), heads) == ((64, 64), 8, 12, 3)
    assert not missing and not left_over
    assert torch.equal(encoder.blocks[11].mlp.fc2.weight, state["blocks.11.mlp.fc2.weight"])
    nano, _ = mim.vit_from_checkpoint(ViT(64, 8, **mim.SIZES["nano"]).state_dict())
    assert nano.num_heads == 4  # of 32 channels, where 64 are usual


@pytest.mark.parametrize("options", [
    dict(mlp_ratio=2.0), dict(mlp_ratio=2.5), dict(layer_scale=0.3), dict(image_size=(16, 64)),
    dict(patch_size=8), dict(depth=1), dict(embed_dim=64, num_heads=2), dict(num_heads=2)])
def test_an_encoder_computes_the_same_after_a_checkpoint(options):
    encoder = vit(**options)
    again, names = mim.vit_from_checkpoint(encoder.state_dict(), num_heads=options.get("num_heads", 4))
    x = images(2, *encoder.image_size)
    assert names == ([], []) and torch.equal(again(x), encoder(x))


def test_position_tables_are_resized():
    column = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 8, 8, 32)  # a table that grows with the column
    table = torch.cat([torch.full((1, 1, 32), -1.0), column.reshape(1, 64, 32)], dim=1)
    resized = mim.resize_position_embedding(table, (4, 16))
    assert resized.shape == (1, 65, 32) and (resized[:, 0] == -1).all()
    # Column 5 of 16 lies at (5 + 0.5) / 2 - 0.5 = 2.25 of 8: cubic convolution, a = -0.75, of columns 1 to 4.
    near, far = (lambda t: 1.25 * t**3 - 2.25 * t**2 + 1), (lambda t: -0.75 * (t**3 - 5 * t**2 + 8 * t - 4))
    expected = 1 * far(1.25) + 2 * near(0.25) + 3 * near(0.75) + 4 * far(1.75)
    assert torch.allclose(resized[0, 1:].view(4, 16, 32)[:, 5], torch.full((4, 32), expected), atol=1e-5)
    vit = ViT(image_size=(32, 96), patch_size=8, embed_dim=32, depth=1, num_heads=4)
    mim.load_encoder(vit, vit.state_dict() | {"pos_embed": table})
    assert torch.equal(vit.pos_embed, mim.resize_position_embedding(table, (4, 12)))


def test_a_table_tells_its_grid():
    for grid in ((4, 16), (16, 4), (8, 8), (3, 5), (1, 7), (7, 1)):
        assert mim.grid_of(mim.sincos_position_embedding(16, grid)) == grid
    learned = torch.randn(1, 65, 16)
    assert mim.grid_of(learned) == (8, 8) and mim.grid_of(torch.randn(1, 16, 16), likely=(3, 5)) == (3, 5)
    with pytest.raises(ValueError, match="position table of a class token and 15 patches"):
        mim.grid_of(torch.randn(1, 16, 16))
    vit, _ = mim.vit_from_checkpoint(ViT((16, 64), 4, 32, 1, 1).state_dict())
    assert vit.grid == (4, 16)
    square = ViT(32, 4, 32, 1, 1)
    mim.load_encoder(square, vit.state_dict())  # as many patches, another grid
    assert torch.equal(square.pos_embed, mim.resize_position_embedding(vit.pos_embed, (8, 8)))
    assert not torch.allclose(square.pos_embed, vit.pos_embed)


@pytest.mark.parametrize("change, words", [
    (lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(32)}),
     "another architecture: there is no blocks.0.ls1.gamma"),
    (lambda s: s.update({"blocks.3.norm1.weight": torch.ones(32)}),
     "another architecture: there is no blocks.3"),
    (lambda s: s.pop("blocks.1.mlp.fc1.weight"), "lacks 1 of .* blocks.1.mlp.fc1.weight"),
    (lambda s: s.update({"blocks.0.norm1.weight": torch.zeros(5)}),
     r"blocks.0.norm1.weight is \[5\] in the checkpoint, \[32\] here"),
    (lambda s: s.pop("patch_embed.proj.weight"), "no Vision Transformer"),
    (lambda s: s.clear(), "no state dict"),
])
def test_what_does_not_fit_is_refused_and_changes_nothing(change, words):
    vit = ViT(**SMALL)
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    state = timm_style(vit)
    change(state)
    with pytest.raises(ValueError, match=words):
        mim.load_encoder(vit, state)
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())


def test_a_missing_last_norm_is_reported_not_refused():
    state = {k: v for k, v in timm_style(vit()).items() if not k.startswith("norm.")}
    state["fc_norm.weight"] = torch.ones(32)
    assert mim.load_encoder(vit(), state) == (["norm.weight", "norm.bias"], ["fc_norm.weight"])


def beits_names(state):
    """A state dict of ours as BEiT's and CAE's code names it; their keys have no bias."""
    renamed = {}
    for name, value in state.items():
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if name.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            renamed |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            renamed[name] = value
    return renamed


def test_encoders_of_beits_and_caes_code_load():
    """Their code computes q, k, v as the product with qkv.weight, and adds q_bias, 0, v_bias."""
    ours = timm_style(ViT(**SMALL, layer_scale=0.1))
    theirs = beits_names(ours)
    assert "blocks.0.gamma_1" in theirs and "blocks.1.attn.v_bias" in theirs
    mine = dict(ours)
    for i in range(SMALL["depth"]):
        mine[f"blocks.{i}.attn.qkv.bias"][32:64] = 0
    whole = {f"encoder.{k}": v for k, v in (theirs | {"mask_token": torch.zeros(1, 1, 32)}).items()}
    for content, left in ((theirs, []), ({"model": whole}, ["mask_token"])):
        encoder, (missing, left_over) = mim.vit_from_checkpoint(content, num_heads=4)
        assert missing == [] and left_over == left
        assert all(torch.equal(value, mine[name]) for name, value in encoder.state_dict().items())
    for name in ("rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"):
        state = {k: v for k, v in theirs.items() if k != "pos_embed"} | {name: torch.zeros(732, 2)}
        with pytest.raises(ValueError, match=f"another architecture: there is no {name} here"):
            mim.vit_from_checkpoint(state, 32)


def test_broken_files_are_refused_in_one_line(tmp_path):
    for name, content in (("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read .*{name}") as caught:
            mim.read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict of tensors in .*list.pt"):
        mim.read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict of tensors in it; it has no names"):
        mim.read_checkpoint([torch.zeros(3)])
    with pytest.raises(ValueError, match="No such file"):
        mim.read_checkpoint(tmp_path / "none.pt")


# ObjMAE


def squares(*boxes, size=32):
    """A label map [1, 1, size, size] with the boxes (top, left, bottom, right) numbered from 1."""
    regions = torch.zeros(1, 1, size, size, dtype=torch.uint8)
    for number, (top, left, bottom, right) in enumerate(boxes, start=1):
        regions[..., top:bottom, left:right] = number
    return regions


def patches_of(box, p=4, g=8):
    """The patches that a box covers wholly, a set."""
    top, left, bottom, right = (x // p for x in box)
    return {r * g + c for r in range(top, bottom) for c in range(left, right)}


def test_objects_are_drawn_uniformly_and_small_ones_never():
    """Of 1024 pixels 5% are 51.2: 52 pixels count as an object, 51 do not."""
    regions = squares((0, 0, 16, 16), (0, 16, 4, 29), (16, 0, 32, 32))
    regions[0, 0, 8:12, 20:32] = 4
    regions[0, 0, 12, 20:23] = 4
    assert (regions == 2).sum() == 52 and (regions == 4).sum() == 51
    maps, found = mim.select_objects(regions.expand(3000, -1, -1, -1), 2)
    assert found.all() and maps.shape == (3000, 2, 32, 32)
    numbers = (maps * regions).amax((2, 3))
    counts = torch.bincount(numbers[:, 0].long(), minlength=5)
    assert counts[0] == counts[4] == 0 and (counts[1:4] - 1000).abs().max() < 4 * (3000 * 2 / 9) ** 0.5
    assert (numbers[:, 0] != numbers[:, 1]).all()
    layered = torch.cat([torch.zeros_like(regions), regions], dim=1)  # an empty layer changes nothing
    maps, found = mim.select_objects(layered.expand(300, -1, -1, -1), 2)
    assert found.all() and set((maps * regions).amax((2, 3)).unique().tolist()) == {1, 2, 3}
    assert torch.equal(mim.region_areas(layered)[:, 256:], mim.region_areas(regions))
    assert not mim.select_objects(torch.zeros_like(layered), 1)[1].any()
    assert not mim.select_objects(torch.zeros_like(layered), 1, floor=0)[1].any()
    maps, found = mim.select_objects(regions, 256, floor=0)  # of all labels only those that are there
    assert found.sum() == len(regions.unique()) - 1 and maps[found].any((1, 2)).all()


@pytest.mark.parametrize("pixels, inside", [(19, False), (20, True), (21, True)])
def test_a_patch_is_the_objects_from_a_fifth_of_its_pixels_on(pixels, inside):
    maps = torch.zeros(1, 20, 20, dtype=torch.bool)
    maps[0, 10 + torch.arange(pixels) // 10, torch.arange(pixels) % 10] = True  # in the third of four patches
    assert mim.object_patches(maps, 10).tolist() == [[False, False, inside, False]]


def test_division_is_in_two_disjoint_equal_random_halves():
    member = (torch.arange(64) < 21).expand(4000, -1)
    source, target = mim.divide_patches(member, 32)
    assert not (source & target).any() and not ((source | target) & ~member).any()
    assert (source.sum(1) == 10).all() and (target.sum(1) == 10).all()
    for half in (source, target):  # every patch falls into each with chance 10/21
        assert (half[:, :21].float().mean(0) - 10 / 21).abs().max() < 4 * 0.5 / 4000**0.5
    assert all((half.sum(1) == 4).all() for half in mim.divide_patches(member, 4))


@pytest.mark.parametrize("alignment", ["throwout", "zero", "replicate", "random"])
@pytest.mark.parametrize("selection", ["intra", "inter"])
def test_alignment_brings_source_and_target_to_one_length(alignment, selection):
    """Two images, n = 16 patches each: an object of 16 patches beside one of 12; one of 4 patches alone."""
    boxes = [[(0, 0, 16, 16), (16, 0, 28, 16)], [(8, 8, 16, 16)]]
    regions = torch.cat([squares(*b) for b in boxes])
    method, sources = objmae(alignment=alignment, selection=selection), set()
    for _ in range(20):
        out = method(images(2), regions)
        visible, masked = out["ids_visible"], out["ids_masked"]
        smallest = {"intra": 2, "inter": 4}[selection]
        assert visible.shape == masked.shape == (2, smallest if alignment == "throwout" else 16)
        for b in range(2):
            source, target = set(visible[b].tolist()), set(masked[b].tolist())
            objects = [patches_of(box) for box in boxes[b]]
            if selection == "inter" and b == 1:
                objects.append(set(range(64)) - objects[0])  # the background
            assert not source & target
            if alignment == "random":
                assert len(source) == len(target) == 16
            elif selection == "intra":
                assert any(source | target <= o for o in objects)
            else:
                assert [source <= o for o in objects] == [not target <= o for o in objects]
                sources.add((b, source <= objects[0]))
            if alignment == "zero":
                assert out["keep_visible"][b].sum() == len(source)
                assert out["keep_masked"][b].sum() == len(target)
            else:
                assert out["keep_visible"] is None
    if sources:  # either is the source, the background too (Figure 6)
        assert sources == {(b, first) for b in (0, 1) for first in (True, False)}


def test_source_and_target_have_the_whole_number_below_alpha_of_all_patches():
    """Table 9's 0.17, 0.25 and 0.05 of 64 patches are 10.88, 16 and 3.2."""
    for alpha, count in ((0.17, 10), (0.25, 16), (0.05, 3)):
        out = objmae(alpha=alpha)(images(2))
        assert out["ids_visible"].shape == out["ids_masked"].shape == (2, count)


def test_padding_changes_no_other_token_and_no_loss():
    method, x, regions = objmae(), images(2), squares((8, 8, 16, 16)).expand(2, -1, -1, -1)
    out = method(x, regions)
    keep = dict(keep_visible=out["keep_visible"], keep_masked=out["keep_masked"])
    assert keep["keep_visible"].sum(1).tolist() == [2, 2] and keep["keep_visible"].shape == (2, 16)
    ids = [torch.where(keep[f"keep_{k}"], out[f"ids_{k}"], 63) for k in ("visible", "masked")]
    x[:, :, 28:, 28:] = 9  # padding with another patch of other pixels
    for again in (method(x, None, *ids, **keep), method(x, None, *(i[:, :2] for i in ids))):  # or without any
        assert torch.allclose(again["loss"], out["loss"], atol=1e-6)
        assert torch.allclose(again["pred"][:, :2], out["pred"][:, :2], atol=1e-6)


def test_the_whole_image_at_a_half_is_mae():
    method, half = objmae(alpha=0.5), mae(mask_ratio=0.5, norm_pix=False)
    half.load_state_dict(method.state_dict())
    x = images()
    out = method(x)
    assert out["ids_visible"].shape == out["ids_masked"].shape == (4, 32) and out["keep_masked"].all()
    assert_partition(out["ids_visible"], out["ids_masked"], n=64)
    same = half(x, out["ids_visible"], out["ids_masked"])
    assert torch.allclose(same["loss"], out["loss"], atol=1e-6)
    assert torch.allclose(same["pred"], out["pred"], atol=1e-5)
    for regions in (squares(), squares((0, 0, 4, 4))):  # no object of 5%: the whole image
        assert method(x, regions.expand(4, -1, -1, -1))["keep_visible"].all()


def test_objects_that_overlap_share_no_patch():
    """Between objects the target is the second one without the first; layers may overlap."""
    regions = torch.cat([squares((0, 0, 32, 16)), squares((0, 8, 32, 32))], dim=1).expand(30, -1, -1, -1)
    method = objmae(selection="inter", alpha=0.5)
    first, second = method.select(regions, 30)
    assert not (first & second).any()
    assert set(first.sum(1).tolist()) == {4 * 8, 6 * 8} and (first | second).all()


def test_an_object_between_patches_falls_back_to_the_whole_image():
    """Thin lines, of 10% of the pixels, that fill no patch to a fifth."""
    regions = torch.zeros(1, 1, 40, 40, dtype=torch.uint8)
    regions[..., 5::10, :] = 1
    method = ObjMAE(ViT(40, 10, 32, 1, 2), alpha=0.5, alignment="throwout", **DECODER)
    assert method(images(1, 40, 40), regions)["ids_visible"].shape == (1, 8)


def test_maps_on_the_spot_leave_autocast_its_gradients():
    """torch 2.6 keeps the weights that autocast casts in the pass for the maps, which has no gradients."""
    method = amt_mae()
    with torch.autocast("cpu", torch.bfloat16):
        method(images())["loss"].backward()
    assert all(p.grad is not None for p in method.encoder.blocks.parameters())


def test_class_activation_maps_by_hand_and_their_strongest_patches():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 4, 4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(5, 7))
    x = images(6)
    maps, features = mim.class_activation_map(network, x, torch.arange(6)), network[0](x)
    for b in range(6):
        expected = sum(network[2].weight[b, k] * features[b, k] for k in range(5))
        assert torch.allclose(maps[b, 0], (expected / expected.max()).clamp(min=0), atol=1e-5)
    network[2].weight.data[6], features = -1.0, features.relu()  # a class that everything speaks against
    network[0].register_forward_hook(lambda *args: args[-1].relu())
    assert not mim.class_activation_map(network, x, torch.full((6,), 6)).any()
    predicted = network[2](features.mean((2, 3))).argmax(1)
    assert torch.equal(mim.class_activation_map(network, x), mim.class_activation_map(network, x, predicted))
    response = torch.arange(64.0).view(1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3) / 63
    # 8 + 8 patches of strongest response.
    out = objmae(alpha=0.125, alignment="throwout")(images(1), response)
    assert sorted(torch.cat([out["ids_visible"], out["ids_masked"]], 1)[0].tolist()) == list(range(48, 64))
    # More than 0.3: from patch 19 on, 45 of them.
    out = objmae(alpha=0.5, alignment="throwout")(images(1), response)
    assert out["ids_visible"].shape == (1, 22) and out["ids_visible"].min() >= 19
    # The other "object" is the background, in which the weaker patches of this one are not.
    first, background = objmae(alpha=0.125).select(response, 1)
    assert first[0].sum() == 16 and background[0].nonzero().flatten().tolist() == list(range(19))


def test_what_a_class_activation_map_denies_does_not_outweigh_what_it_claims():
    """Three patches have a fifth of their pixels above 0.3. The first is below zero elsewhere, by far."""
    response = torch.zeros(1, 1, 32, 32)
    response[..., :4, :4], response[..., :4, 4:8] = -9.0, 0.5
    response[..., 0, :4], response[..., 0, 8:12] = 1.0, 0.4  # means of what is above zero: 0.25, 0.5, 0.1
    method = objmae(alpha=1 / 64, alignment="throwout")  # one patch each
    first, _ = method.select(response, 1)
    assert first[0].nonzero().flatten().tolist() == [0, 1]


def test_attention_rollout_against_float64():
    vit, x = ViT(**SMALL).double(), images(2).double()
    h, flow = vit.sequence(vit.embed(x)), torch.eye(65, dtype=torch.float64)
    for block in vit.blocks:
        q, k, _ = block.attn.split_heads(block.norm1(h))
        attention = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1).mean(1) + torch.eye(65)
        flow = attention / attention.sum(-1, keepdim=True) @ flow
        h = block(h)
    rolled = vit.rollout(x)
    assert torch.allclose(rolled.double(), flow, atol=1e-6)
    assert torch.allclose(rolled.sum(-1), torch.ones(2, 65))


# Around other encoders

AROUND = {
    "mae": lambda encoder: MAE(encoder, **DECODER),
    "simmim": SimMIM,
    "beit": lambda encoder: BEiT(encoder, 7),
    "cae": lambda encoder: CAE(encoder, regressor_depth=1, decoder_depth=1),
    "amt": lambda encoder: AMT(MAE(encoder, **DECODER)),
    "lomar": lambda encoder: LoMaR(encoder, window_size=5, num_windows=2),
    "objmae": lambda encoder: ObjMAE(encoder, **DECODER),
    "rae": lambda encoder: RAE(encoder, region_dim=16, region_heads=2),
    "rmae": lambda encoder: RMAE(encoder, region_dim=16, region_heads=2, **DECODER),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("channels", [1, 5])
def test_every_method_takes_images_of_any_number_of_channels(name, channels):
    encoder = vit(channels=channels, relative_position=name == "lomar")
    method, x = AROUND[name](encoder), torch.randn(2, channels, 32, 32)
    inputs = dict(regions=REGIONS.repeat(2, 1, 2, 2)) if name in ("objmae", "rae", "rmae") else {}
    if name == "beit":
        inputs["tokens"] = torch.zeros(2, 64, dtype=torch.int64)
    out = method(x, **inputs)
    out["loss"].backward()
    assert encoder.patch_embed.proj.weight.grad[:, -1].any()  # the last channel is seen
    if name not in ("beit", "rae"):
        assert out["pred"].shape == (*out["ids_masked"].shape, 16 * channels)
        filled = mim.reconstruct(x, out["pred"], out["ids_masked"], 4, method.norm_pix)
        same = (mim.patchify(filled, 4) == mim.patchify(x, 4)).all(2)
        assert torch.equal(same, torch.ones(2, 64, dtype=torch.bool).scatter(1, out["ids_masked"], False))
    again, names = mim.vit_from_checkpoint(method.state_dict(), image_size=32, num_heads=4)
    assert again.channels == channels and torch.equal(again(x), encoder(x)) and names[0] == []


@pytest.mark.parametrize("name", AROUND)
def test_every_method_takes_one_mask_for_all_images(name):
    """[1, n], as `take` and `put`."""
    method, inputs = AROUND[name](vit(relative_position=name == "lomar")), {}
    if name in ("rae", "rmae"):
        inputs = dict(region_maps=(torch.rand(2, 3, 32, 32) < 0.5))
    if name == "beit":
        inputs = dict(tokens=torch.zeros(2, 64, dtype=torch.int64))
    x = images(2)
    mask = {k: v[:1] for k, v in method(x, **inputs).items() if k in ("ids_visible", "ids_masked")}
    shared, each = method(x, **inputs, **mask), method(x, **inputs, **{k: v.expand(2, -1) for k, v in mask.items()})
    assert torch.allclose(shared["loss"], each["loss"], atol=1e-6)


@pytest.mark.parametrize("method", [mae(), simmim()])
def test_a_mask_of_nothing_predicts_nothing(method):
    ids = torch.arange(64).expand(2, -1)
    latents = method.encoder(images(2), ids)
    assert not isinstance(method, MAE) or method.decode(latents, ids, ids[:, :0]).shape == (2, 0, 48)
    if isinstance(method, SimMIM):
        assert method(images(2), ids, ids[:, :0])["pred"].shape == (2, 0, 48)


def test_objmaes_padding_is_given_whole_and_with_its_ids():
    out = objmae()(images(2), squares((8, 8, 16, 16)).expand(2, -1, -1, -1))
    ids = {k: out[k] for k in ("ids_visible", "ids_masked")}
    for keep in (dict(ids, keep_visible=out["keep_visible"]), dict(ids, keep_masked=out["keep_masked"]),
                 {k: out[k] for k in ("keep_visible", "keep_masked")}):
        with pytest.raises(ValueError, match="keep_visible and keep_masked must be given together and with ids"):
            objmae()(images(2), **keep)


def test_maps_leave_every_module_in_its_mode():
    encoder = vit(drop_path=0.5).train()
    encoder.blocks[1].eval()
    before = [module.training for module in encoder.modules()]
    mim.attention_map(encoder, images(2))
    assert [module.training for module in encoder.modules()] == before


def test_patches_of_another_grid_make_no_image():
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        mim.unpatchify(torch.randn(1, 8, 48), 4, (2, 2))


def test_areas_are_counted_whatever_the_default_type():
    torch.set_default_dtype(torch.float64)
    try:
        assert mim.region_areas(REGIONS).sum() == (REGIONS > 0).sum()
    finally:
        torch.set_default_dtype(torch.float32)


def test_lomar_takes_a_stranger_encoders_image_size_as_it_is():
    for size in (384, [384, 384], (384, 384)):
        with torch.device("meta"):
            encoder = ViT(384, 16, 32, 1, 2, relative_position=True)
            encoder.image_size = size
            assert LoMaR(encoder).num_windows == 6


@pytest.mark.parametrize("name", ["patch_embed.norm.weight", "patch_embed.backbone.conv.weight", "rope.freqs"])
def test_what_would_change_the_output_is_refused(name):
    with pytest.raises(ValueError, match=f"another architecture: there is no {name} here"):
        mim.load_encoder(vit(), vit().state_dict() | {name: torch.zeros(3)})


def test_a_hidden_layer_of_any_width_is_read_from_its_file():
    state = ViT(32, 8, 152, 1, 4, mlp_ratio=8 / 3).state_dict()
    assert len(state["blocks.0.mlp.fc1.weight"]) == 405
    assert mim.vit_from_checkpoint(state, num_heads=4)[1] == ([], [])
    # Numbers beside a state dict are no weights.
    assert mim.vit_from_checkpoint(dict(net=state, best=torch.tensor(0.3)), num_heads=4)[1] == ([], ["best"])


@pytest.mark.parametrize("name", AROUND)
def test_every_method_refuses_half_a_mask(name):
    method, inputs = AROUND[name](vit(relative_position=name == "lomar")), {}
    if name in ("objmae", "rae", "rmae"):
        inputs = dict(regions=REGIONS.repeat(2, 1, 2, 2))
    if name == "beit":
        inputs = dict(tokens=torch.zeros(2, 64, dtype=torch.int64))
    mask = method(images(2), **inputs)
    for given in ("ids_visible", "ids_masked"):
        with pytest.raises(ValueError, match="ids_visible and ids_masked must be given together"):
            method(images(2), **inputs, **{given: mask[given]})


@pytest.mark.parametrize("name", [name for name in AROUND if name != "cae"])  # CAE's: see test_cae.py
def test_every_linear_layer_starts_xavier_uniform(name):
    method = AROUND[name](vit(relative_position=name == "lomar"))
    for layer in method.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.95 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()


class Wrapped(torch.nn.Module):
    """Somebody else's transformer as an encoder, with what the head of mim.py asks for."""

    def __init__(self):
        super().__init__()
        self.grid, self.num_patches, self.patch_size, self.patch_dim, self.embed_dim = (8, 8), 64, 4, 48, 32
        self.proj = torch.nn.Linear(48, 32)
        self.positions = torch.nn.Parameter(torch.randn(1, 64, 32) * 0.02)
        self.cls = torch.nn.Parameter(torch.zeros(1, 1, 32))
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def embed(self, images):
        return self.proj(mim.patchify(images, 4))

    def encode(self, tokens, ids=None):
        tokens = tokens + self.positions
        tokens = tokens if ids is None else mim.take(tokens, ids)
        return self.layers(torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1))

    def forward(self, images, ids=None):
        return self.encode(self.embed(images), ids)


@pytest.mark.parametrize("method, inputs", [
    (MAE, {}), (RMAE, dict(region_maps=torch.empty(2, 8, 224, 224, device="meta")))])
def test_the_encoder_of_the_readme_fits(method, inputs):
    readme = (Path(mim.__file__).parent / "README.md").read_text()
    space = {}
    exec(re.search(r"```python\n([^`]*class Encoder[^`]*)```", readme)[1], space)
    with torch.device("meta"):
        out = method(space["Encoder"](torch.nn.Identity()))(torch.empty(2, 3, 224, 224), **inputs)
    assert out["pred"].shape == (*out["ids_masked"].shape, 768)


@pytest.mark.parametrize("name", ["mae", "simmim", "beit", "rae", "rmae"])
def test_a_strangers_encoder_trains(name):
    encoder = Wrapped()
    method, losses = AROUND[name](encoder), []
    inputs = dict(tokens=torch.zeros(8, 64, dtype=torch.int64)) if name == "beit" else {}
    if "regions" in method.inputs:
        inputs = dict(regions=REGIONS.repeat(8, 1, 2, 2))
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    x = torch.randn(8, 3, 1, 1).expand(-1, -1, 32, 32) + 0.1 * images(8)
    for _ in range(8):
        out = method(x, **inputs)
        optimizer.zero_grad()
        out["loss"].backward()
        assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())
        optimizer.step()
        losses.append(out["loss"].item())
    assert sum(losses[-3:]) < 0.99 * sum(losses[:3])


# Learning, and lifting


TINY = dict(image_size=16, depth=2)


@pytest.mark.parametrize("build", [
    lambda: MAE(vit(**TINY), norm_pix=False, **DECODER), lambda: SimMIM(vit(**TINY)),
    lambda: LoMaR(vit(**TINY, relative_position=True), window_size=3, norm_pix=False),
    lambda: ObjMAE(vit(**TINY), **DECODER)], ids=["mae", "simmim", "lomar", "objmae"])
def test_a_tiny_model_learns_in_seconds(build):
    """Images of one colour: any visible patch tells the masked ones, so the loss falls far."""
    method, losses = build(), []
    optimizer = torch.optim.AdamW(method.parameters(), lr=5e-3)
    for _ in range(60):
        out = method(torch.randn(16, 3, 1, 1).expand(-1, -1, 16, 16))
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out["loss"].item())
    assert sum(losses[-5:]) < 0.35 * sum(losses[:5])


def test_the_worked_examples_come_out_as_written():
    failed, tried = doctest.testmod(mim)
    assert failed == 0 and tried >= 40


PARTS = re.split(r"^# -{100,}\n(?=# \d+\. )", inspect.getsource(mim), flags=re.M)
CONTENTS = {title: (int(number), used) for number, title, used in re.findall(
    r"^ +(\d+)\. (\S.*?)  +\S.*?(?:  +((?:\d[-\d, ]*|all)))?$", mim.__doc__, re.M)}


def test_the_contents_list_is_the_order_of_the_sections():
    headings = [part.splitlines()[0] for part in PARTS[1:]]
    assert len(headings) == len(CONTENTS)
    for heading, (title, (number, _)) in zip(headings, CONTENTS.items()):
        assert heading.startswith(f"# {number}. {title}")


def lift(title):
    """The names that the imports of mim.py, the section `title` and the sections that it uses define."""
    number, used = CONTENTS[title]
    spans = [[int(n) for n in part.split("-")] for part in used.split(",")]
    numbers = [n for span in spans for n in range(span[0], span[-1] + 1)] + [number]
    space = {}
    for i in [0, *numbers]:
        exec(PARTS[i], space)
    return space


@pytest.mark.parametrize("title, build", [
    ("MAE", lambda m: m["MAE"](m["ViT"](**SMALL), **DECODER)),
    ("SimMIM", lambda m: m["SimMIM"](m["ViT"](**SMALL))),
    ("BEiT", lambda m: m["BEiT"](m["ViT"](**SMALL), 7)),
    ("CAE", lambda m: m["CAE"](m["ViT"](**SMALL))),
    ("LoMaR", lambda m: m["LoMaR"](m["ViT"](**SMALL, relative_position=True), window_size=5)),
    ("ObjMAE", lambda m: m["ObjMAE"](m["ViT"](**SMALL), **DECODER)),
    ("R-MAE and RAE", lambda m: m["RMAE"](m["ViT"](**SMALL), **DECODER)),
    ("R-MAE and RAE", lambda m: m["RAE"](m["ViT"](**SMALL))),
    ("Tokenizer", lambda m: m["DVAE"](32, 16, 8, 3, 1)),
])
def test_a_paper_lifts_out_with_the_sections_that_the_contents_list_names(title, build):
    method = build(lift(title))
    inputs = dict(regions=torch.ones(4, 1, 32, 32, dtype=torch.uint8)) if "regions" in method.inputs else {}
    if title == "BEiT":
        inputs["tokens"] = torch.zeros(4, 64, dtype=torch.int64)
    assert method(images(), **inputs)["loss"].isfinite()


def test_amt_lifts_out():
    """With its own section and those that it names, AMT masks for a method that has nothing of this file."""

    class Encoder(torch.nn.Module):
        grid, cls_token = (8, 8), torch.zeros(1, 1, 16)

        def last_attention(self, images):
            return torch.nn.functional.adaptive_avg_pool2d(images, 8).mean(1).flatten(1).abs()[:, None]

    class Method(torch.nn.Module):
        mask_ratio, encoder = 0.75, Encoder()

        def forward(self, images, ids_visible=None, ids_masked=None):
            return dict(loss=images.mean(), ids_visible=ids_visible, ids_masked=ids_masked)

    assert CONTENTS["AMT"][1] == "1, 2, 5"
    out = lift("AMT")["AMT"](Method())(images())
    assert [out[k].shape[1] for k in ("ids_masked", "ids_thrown", "ids_visible")] == [28, 25, 11]
    assert_partition(out["ids_masked"], out["ids_thrown"], out["ids_visible"], n=64)


def test_every_argument_of_a_method_is_explained():
    """`name: meaning` in the docstring of its class or of a class above: that line is the flag's help."""
    for cls in {ViT, *mim.METHODS.values()}:
        text = "\n".join(inspect.getdoc(c) or "" for c in cls.__mro__[:-2])
        names = [name for name in inspect.signature(cls).parameters if name not in ("encoder", "base")]
        assert [n for n in names if not re.search(rf"^{n}: \w", text, re.M)] == []


# ---------------------------------------------------------------------------------------------------------
# Half precision


def test_gradients_of_a_mask_token_add_up_in_its_own_precision():
    """In half precision 200,000 would be infinite, and a step of fp16 would be skipped."""
    token = torch.nn.Parameter(torch.zeros(1, 1, 1))
    out = mim.put(torch.zeros(1, 2000, 1, dtype=torch.float16), torch.arange(2000)[None], token)
    assert out.dtype == torch.float16
    out.backward(torch.full_like(out, 100))
    assert token.grad.item() == 200_000


def test_gradients_of_relative_positions_add_up_in_full_precision():
    """CUDA would add up thousands of keys of one bucket in bf16, where a sum of ones stops at 256."""

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "scatter_add" in str(function):
                dtypes.append(args[0].dtype)
            return function(*args, **kwargs or {})

    attn, dtypes = mim.Attention(4, 1, relative_position=True), []
    q = torch.ones(1, 1, 1, 4, dtype=torch.bfloat16)
    with Sums():
        bias = attn.relative_bias(q, torch.zeros(1, 2000, dtype=torch.long))
        bias.backward(torch.ones_like(bias))
    assert bias.dtype == torch.bfloat16 and dtypes == [torch.float32]
    assert attn.relative_table.grad[0].tolist() == pytest.approx(4 * [2000], rel=0.01)


@pytest.mark.parametrize("size, grid", [((64, 64), (8, 8)), ((128, 64), (16, 8)), ((128, 32), (16, 4))])
def test_a_learned_table_is_resized_from_the_grid_that_its_file_tells(size, grid):
    """16 x 4 patches are as many as 8 x 8. Columns 0 to 3 of the table become 0 to 3 of any grid."""
    vit = ViT((128, 32), 8, 16, 1, 2)
    column = torch.arange(4.0).expand(16, -1).reshape(1, 64, 1).expand(-1, -1, 16)
    vit.pos_embed.data = torch.nn.functional.pad(column, (0, 0, 1, 0))
    state = vit.state_dict()
    state._metadata[""]["image_size"] = [128, 32]
    found, _ = mim.vit_from_checkpoint(state, size)
    rows = found.pos_embed[0, 1:, 0].view(grid)
    assert found.grid == grid and torch.allclose(rows, rows[:1].expand(grid), atol=1e-5)
    assert (rows[0].diff() > 0).all() and rows[0, 0] < 0.5 and rows[0, -1] > 2.5


def test_a_head_has_64_channels_where_nothing_else_is_known():
    state = ViT(16, 16, embed_dim=256, depth=1, num_heads=2).state_dict()
    assert mim.vit_from_checkpoint(state)[0].num_heads == 4


@pytest.mark.parametrize("prefix, heads", [("module.base_encoder.", 12), ("module.", 6)])
def test_moco_v3s_small_vit_has_twelve_heads(prefix, heads):
    state = {prefix + name: value for name, value in mim.ViT(32, 16, 384, 12, 12).state_dict().items()}
    vit, _ = mim.vit_from_checkpoint(dict(state_dict=state))
    assert vit.num_heads == heads
    assert mim.vit_from_checkpoint(dict(state_dict=state), num_heads=12)[0].num_heads == 12


def test_a_learned_table_of_a_square_number_of_patches_may_be_of_another_grid():
    """2 x 8 patches are as many as 4 x 4; a ViT that has this grid takes the table as it is."""
    table = torch.randn(1, 17, 8)
    assert mim.grid_of(table) == (4, 4) and mim.grid_of(table, (2, 8)) == (2, 8)
    vit = mim.ViT((16, 64), 8, 8, 1, 2)
    state = vit.state_dict() | dict(pos_embed=table)
    assert torch.equal(mim.vit_from_checkpoint(state, (16, 64))[0].pos_embed, table)


def test_a_mask_for_all_images_is_one_row_and_other_sizes_are_refused():
    x, (ids_visible, ids_masked) = images(), mim.random_masking(1, 64, 0.5)
    for method in (MAE(vit(), **DECODER), SimMIM(vit()), mim.CAE(vit()), AMT(MAE(vit(), **DECODER))):
        method.eval()
        one = method(x, ids_visible=ids_visible, ids_masked=ids_masked)
        four = method(x, ids_visible=ids_visible.expand(4, -1), ids_masked=ids_masked.expand(4, -1))
        assert one["pred"].shape == four["pred"].shape and torch.equal(one["loss"], four["loss"])
        with pytest.raises(RuntimeError, match="expanded size"):
            method(x, ids_visible=ids_visible.expand(2, -1), ids_masked=ids_masked.expand(2, -1))


@pytest.mark.parametrize("shape", [(4, 1, 16, 16), (1, 1, 32, 32), (4, 32, 32)])
@pytest.mark.parametrize("method", [ObjMAE, RMAE])
def test_regions_are_as_many_and_as_large_as_the_images(method, shape):
    with pytest.raises(ValueError, match=r"as many and as large as the images, got \["):
        method(vit(), **DECODER)(images(), torch.ones(shape, dtype=torch.uint8))


def test_what_a_function_cannot_use_is_named():
    with pytest.raises(ValueError, match="throw must be middle or low or random, got 'Low'"):
        mim.attention_masking(torch.rand(2, 16), 4, 4, "Low")
    with pytest.raises(ValueError, match=r"num_masked must be in 0\.\.6, got 8"):
        mim.attention_masking(torch.rand(2, 16), 8, 10)
    with pytest.raises(ValueError, match="as many images, got 1, 3 and 3"):
        mim.crop_maps(torch.ones(1, 4, 4), torch.rand(3, 4), torch.zeros(3, dtype=torch.bool), (2, 2))
    with pytest.raises(ValueError, match=r"tokens must be \[B, N\], one for each patch, got \[4, 16\]"):
        mim.BEiT(vit(), 5)(images(), torch.zeros(4, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        mim.BEiT(vit(), 0)
    with pytest.raises(ValueError, match="tau_start must be at least 0.001, got 0"):
        mim.DVAE(16, 8, 4, 2, 1, tau_start=0)
