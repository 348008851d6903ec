"""Block-wise masking and the discrete VAE, against plain references, numbers by hand and a short training."""

import math
import random
import time

import pytest
import torch
import torch.nn.functional as F

import mim
from mim import DVAE, block_masking, random_blocks

# ---------------------------------------------------------------------------------------------------------
# Block-wise masking


def reference_mask(grid, num_masked, rng, min_block=16, min_aspect=0.3):
    """BEiT's Algorithm 1 for one image, a block at a time until all is masked -> mask [gh, gw], and the first
    block's (h, w)."""
    (gh, gw), mask, first = grid, torch.zeros(grid, dtype=torch.bool), None
    for _ in range(10_000):
        remaining = num_masked - int(mask.sum())
        if not remaining:
            break
        u, v, a, b = rng.random(), rng.random(), rng.random(), rng.random()
        area, aspect = min_block + u * (remaining - min_block), math.exp((2 * v - 1) * -math.log(min_aspect))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h > gh or w > gw:
            continue
        top, left = int(a * (gh - h + 1)), int(b * (gw - w + 1))
        new = mask.clone()
        new[top : top + h, left : left + w] = True
        if new.sum() <= num_masked:
            mask = new
            first = first or (h, w)
    return mask, first


def components(mask):
    """The number of 4-connected parts of each mask [B, gh, gw]."""
    B, gh, gw = mask.shape
    label = torch.where(mask, torch.arange(1.0, gh * gw + 1).view(gh, gw), torch.zeros(()))
    for _ in range(gh * gw):
        spread = torch.maximum(F.max_pool2d(label, (3, 1), 1, (1, 0)), F.max_pool2d(label, (1, 3), 1, (0, 1)))
        label, before = torch.where(mask, spread, label), label
        if torch.equal(label, before):
            break
    return torch.tensor([float(len(row.unique()) - 1) for row in F.pad(label.flatten(1), (1, 0))])


def perimeter(mask):
    """Edges between a masked and a visible patch, [B]."""
    return ((mask[:, 1:] ^ mask[:, :-1]).sum((1, 2)) + (mask[:, :, 1:] ^ mask[:, :, :-1]).sum((1, 2))).float()


def as_mask(ids, grid):
    mask = torch.zeros(len(ids), grid[0] * grid[1], dtype=torch.bool)
    return mask.scatter(1, ids, True).unflatten(1, grid)


def same_mean(x, y, slack):
    """The means agree within four standard errors, and `slack` for what the two may differ in by design."""
    error = 4 * math.sqrt(x.var() / len(x) + y.var() / len(y))
    assert abs(x.mean() - y.mean()) < error + slack, f"{x.mean():.3f} against {y.mean():.3f}, +-{error:.3f}"


def ks_distance(x, y):
    """The largest distance of the two samples' cumulative distributions."""
    at = torch.cat([x, y]).unique()
    return max(abs((x <= a).float().mean() - (y <= a).float().mean()) for a in at)


@pytest.mark.parametrize("grid, num_masked", [
    ((14, 14), 98), ((14, 14), 75), ((8, 8), 32), ((8, 8), 63), ((8, 8), 1), ((5, 12), 30), ((1, 20), 9),
    ((24, 24), 500)])
def test_masks_exactly_the_asked_number(grid, num_masked):
    N = grid[0] * grid[1]
    ids_visible, ids_masked = block_masking(200, grid, num_masked)
    assert ids_visible.shape == (200, N - num_masked) and ids_masked.shape == (200, num_masked)
    assert ids_masked.dtype == torch.int64
    together = torch.cat([ids_visible, ids_masked], dim=1).sort(1).values
    assert torch.equal(together, torch.arange(N).expand(200, -1))


@pytest.mark.parametrize("num_masked", [0, -1, 64, 100])
def test_num_masked_out_of_range(num_masked):
    with pytest.raises(ValueError, match=r"num_masked must be in 1\.\.63"):
        block_masking(2, (8, 8), num_masked)


def test_generator_decides():
    """The generator, and not the global one."""
    first, again, other = (
        block_masking(8, (8, 8), 32, generator=torch.Generator().manual_seed(seed))[1] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("grid, num_masked", [((14, 14), 75), ((6, 12), 36)])
def test_first_block_and_masks_are_distributed_as_beit_s(grid, num_masked, monkeypatch):
    torch.manual_seed(0)
    rng, proposed = random.Random(0), []

    def spy(*args, **kwargs):
        proposed.append(random_blocks(*args, **kwargs))
        return proposed[-1]

    monkeypatch.setattr(mim, "random_blocks", spy)
    ours = as_mask(block_masking(4000, grid, num_masked)[1], grid)
    blocks = torch.stack(proposed, dim=1)
    area = blocks.sum((2, 3))
    usable = (area > 0) & (area <= num_masked)
    first = usable.float().argmax(1)  # the first that fits is placed, as nothing is masked before it
    rows = torch.arange(len(first))
    height = blocks[rows, first].amax(2).sum(1)
    width = blocks[rows, first].amax(1).sum(1)
    masks, sizes = zip(*(reference_mask(grid, num_masked, rng) for _ in range(1500)))
    reference, (h, w) = torch.stack(masks), torch.tensor(sizes, dtype=torch.float32).unbind(1)
    assert (height * width).min() >= 12 and (height * width).max() <= num_masked  # rounding takes 16 to 12
    assert ks_distance(height * width, h * w) < 0.06  # 1% critical value for 4000 and 1500: 0.049
    assert ks_distance((height / width).log(), (h / w).log()) < 0.06
    same_mean(perimeter(ours), perimeter(reference), 0.02 * perimeter(reference).mean())
    same_mean(components(ours[:1500]), components(reference), 0.08)
    place = (ours.float().mean(0) - reference.float().mean(0)).abs().max()
    assert place < 0.07  # how often each patch is masked: four standard errors and a little
    scattered = torch.rand(500, grid[0] * grid[1]).argsort(1)[:, :num_masked]
    assert perimeter(as_mask(scattered, grid)).mean() > 1.5 * perimeter(ours).mean()


def test_blocks_have_the_asked_area_and_aspect():
    torch.manual_seed(0)
    blocks = random_blocks(torch.full((8000,), 400.0), (50, 50), 0.3)
    height, width = blocks.amax(2).sum(1), blocks.amax(1).sum(1)
    assert torch.equal(blocks.sum((1, 2)), height * width)  # solid
    assert ((height * width - 400).abs() < 40).all()
    log_aspect = (height / width).log() / math.log(1 / 0.3)
    assert log_aspect.abs().max() < 1.06 and abs(log_aspect.mean()) < 0.03
    assert abs(log_aspect.std() - 1 / math.sqrt(3)) < 0.02  # of a uniform variable in (-1, 1)


def test_few_patches_are_left_to_the_random_fill(monkeypatch):
    torch.manual_seed(0)
    filled = []
    pool = F.max_pool2d

    def spy(mask, *args, **kwargs):
        filled.append(mask.sum((1, 2)))
        return pool(mask, *args, **kwargs)

    monkeypatch.setattr(F, "max_pool2d", spy)
    cases = [((14, 14), 98, 0.3), ((14, 14), 75, 0.3), ((8, 8), 32, 0.1), ((24, 24), 288, 0.5)]
    for grid, num_masked, most in cases:
        block_masking(1000, grid, num_masked)
        assert 0 <= num_masked - filled[-1].mean() < most


@pytest.mark.parametrize("num_masked", [98, 75])
def test_masks_per_second(num_masked):
    block_masking(256, (14, 14), num_masked)
    seconds = []
    for _ in range(4):
        start = time.process_time()  # of this process: the machine may be shared
        block_masking(256, (14, 14), num_masked)
        seconds.append(time.process_time() - start)
    assert 256 / min(seconds) > 5000


# ---------------------------------------------------------------------------------------------------------
# DVAE


def tiny(**options):
    return DVAE(**{**dict(image_size=32, vocab_size=128, hidden_dim=16, groups=3), **options})


def test_encoder_has_the_released_names_shapes_and_size():
    with torch.device("meta"):  # names and shapes without memory
        encoder = DVAE().encoder
    shapes = {name: tuple(p.shape) for name, p in encoder.state_dict().items()}
    for name, shape in {
        "blocks.input.w": (256, 3, 7, 7), "blocks.input.b": (256,),
        "blocks.group_1.block_1.res_path.conv_1.w": (64, 256, 3, 3),
        "blocks.group_1.block_2.res_path.conv_3.w": (64, 64, 3, 3),
        "blocks.group_2.block_1.id_path.w": (512, 256, 1, 1), "blocks.group_2.block_1.id_path.b": (512,),
        "blocks.group_3.block_1.res_path.conv_1.w": (256, 512, 3, 3),
        "blocks.group_4.block_2.res_path.conv_4.w": (2048, 512, 1, 1),
        "blocks.group_4.block_2.res_path.conv_4.b": (2048,),
        "blocks.output.conv.w": (8192, 2048, 1, 1), "blocks.output.conv.b": (8192,),
    }.items():
        assert shapes.pop(name) == shape
    assert not {"blocks.group_1.block_1.id_path.w", "blocks.group_2.block_2.id_path.w"} & shapes.keys()

    def conv(n_in, n_out, k):
        return n_in * n_out * k * k + n_out

    total, n_in = conv(3, 256, 7) + conv(2048, 8192, 1), 256
    for n_out in (256, 512, 1024, 2048):
        for _ in range(2):
            n = n_out // 4
            total += conv(n_in, n, 3) + 2 * conv(n, n, 3) + conv(n, n_out, 1)
            total += conv(n_in, n_out, 1) if n_in != n_out else 0
            n_in = n_out
    assert total == 53_786_240  # CAE and BEiT state 53.8M
    assert sum(p.numel() for p in encoder.parameters()) == total
    assert len(encoder.state_dict()) == 2 * (2 + 8 * 4 + 3)


def test_residual_branches_are_scaled_and_pixels_mapped():
    dvae = DVAE(vocab_size=64, hidden_dim=16)
    block = dvae.encoder.blocks.group_2.block_1
    x = torch.randn(2, 16, 4, 4)
    # 1 / (4 groups * 2 blocks)^2
    assert torch.allclose(block(x) - block.id_path(x), block.res_path(x) / 64, atol=1e-6)
    seen = []
    dvae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for tone, mapped in ((0.0, 0.1), (0.5, 0.5), (1.0, 0.9), (-1.0, 0.1), (2.0, 0.9)):  # bicubic overshoots
        dvae.tokens(torch.full((1, 3, 16, 16), tone).sub(dvae.mean).div(dvae.std))
        assert torch.allclose(seen.pop(), torch.tensor(mapped))


@pytest.mark.parametrize("patch_size", [4, 5, 8, 16])
@pytest.mark.parametrize("grid", [(8, 8), (5, 9)])
def test_tokens_line_up_with_patches_of_any_size(patch_size, grid):
    """Patches of one colour each: the token of a patch is that of its colour, whatever the patch size."""
    torch.manual_seed(0)
    dvae = tiny(groups=4)
    with torch.no_grad():  # sees one pixel at a time, so that neighbours cannot blur the comparison
        centre = dvae.encoder.blocks.input.w[..., 3:4, 3:4].clone()
        dvae.encoder.blocks.input.w.zero_()[..., 3:4, 3:4] = 5 * centre
        dvae.encoder.blocks.input.b.copy_(-2.3 * centre.sum((1, 2, 3)))
        for block in [m for m in dvae.encoder.modules() if isinstance(m, mim.DVAEBlock)]:
            block.gain = 0
    palette = torch.tensor([[1.0, 1, 1], [-1, 1, 0], [1, -1, -1]]) * 1.5
    colours = torch.randint(3, (2, *grid))
    images = palette[colours].permute(0, 3, 1, 2)
    of_colour = dvae.tokens(palette.view(3, 3, 1, 1).expand(-1, -1, 8, 8)).flatten()
    assert len(of_colour.unique()) == 3
    big = images.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    got, want = dvae.tokenize(big, grid), of_colour[colours.flatten(1)]
    assert got.shape == (2, grid[0] * grid[1])
    # Max-pooling may see the rim that resizing from p to 8 pixels blurs; at 8 and 16 there is next to none.
    assert (got == want).float().mean() > (0.99 if patch_size in (8, 16) else 0.8)


def test_tokens_follow_moved_patches():
    """Exchanging two halves of an image exchanges their tokens, except near the seams and rims, over which
    the filters reach."""
    torch.manual_seed(0)
    dvae = tiny()
    images = F.interpolate(torch.randn(4, 3, 16, 16), scale_factor=4.0, mode="bicubic")
    tokens = dvae.tokenize(images, (16, 16)).view(4, 16, 16)
    moved = dvae.tokenize(images.roll(32, 3), (16, 16)).view(4, 16, 16)
    same = (tokens.roll(8, 2) == moved).float().mean((0, 1))
    assert (same[[3, 4, 11, 12]] == 1).all()
    assert (tokens == moved).float().mean() < 0.5


def test_large_patches_are_averaged_not_sampled():
    """Lines of two pixels have the token of their mean."""
    torch.manual_seed(0)
    dvae, lines = tiny(), torch.tensor([1.5, -1.5, -1.5, 1.5]).repeat(16).expand(1, 3, 64, 64)
    tokens = dvae.tokenize(torch.stack([lines[0], torch.zeros(3, 64, 64)]), (4, 4)).view(2, 4, 4)
    assert torch.equal(tokens[0, :, 1:3], tokens[1, :, 1:3])


@pytest.mark.parametrize("groups, blocks", [(3, 1), (2, 3)])
def test_an_encoder_alone_is_a_tokenizer_of_its_size(groups, blocks):
    torch.manual_seed(0)
    dvae = tiny(groups=groups, blocks_per_group=blocks, hidden_dim=8, vocab_size=16)
    alone, images = DVAE.from_encoder(dvae.encoder.state_dict()), torch.randn(2, 3, 32, 32)
    assert (alone.factor, alone.vocab_size, alone.decoder) == (dvae.factor, 16, None)
    assert torch.equal(alone.tokens(images), dvae.tokens(images))
    with pytest.raises(ValueError, match="no parameter is named blocks.input.w"):
        DVAE.from_encoder({"cls_token": torch.zeros(1)})


def test_tokens_take_no_noise_and_no_autocast():
    torch.manual_seed(0)
    dvae, images = tiny(), torch.randn(2, 3, 32, 32)
    state = torch.get_rng_state()
    tokens = dvae.tokens(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert tokens.shape == (2, 8, 8) and tokens.dtype == torch.int64 and tokens.max() < 128
    assert torch.equal(dvae.eval()(images)["ids"], tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dvae.tokens(images), tokens)


def test_without_training_the_most_probable_words_are_drawn_in_their_places():
    torch.manual_seed(0)
    dvae, images = tiny().eval(), torch.randn(2, 3, 16, 48)
    with torch.no_grad():
        out = dvae(images)
    pred, share = out["pred"], out["ids"].unique(return_counts=True)[1] / out["ids"].numel()
    assert out["codes_used"] == len(share) and share.min() < 0.02  # a word that is used once counts, too
    assert torch.allclose(out["perplexity"], (-share * share.log()).sum().exp())
    tokens = dvae.tokens(images).flatten(1)
    assert pred.shape == images.shape and torch.allclose(pred, dvae.decode(tokens, (4, 12)), atol=1e-5)
    other = tokens.clone()
    other[:, 3 * 12 + 10] = (other[:, 3 * 12 + 10] + 1) % 128  # the last row, the last column but one
    changed = (dvae.decode(other, (4, 12)) - pred).abs().amax((0, 1))
    row, column = divmod(changed.argmax().item(), 48)
    assert 12 - 4 <= row < 16 and 40 - 4 <= column < 44 + 4
    assert changed[:, :16].max() < 1e-3 * changed.max()


def test_loss_is_made_of_its_parts_also_under_autocast():
    torch.manual_seed(0)
    dvae, images = tiny(kl_weight=24.0), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dvae(images, 0.5)
    assert out["loss"].dtype == torch.float32
    assert torch.allclose(out["loss"], out["loss_pixel"] + 24 / (3 * 4 * 4) * out["loss_kl"])
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dvae.parameters())
    with torch.no_grad():
        dvae.encoder.blocks.output.conv.w.zero_()  # uniform words: no divergence from uniform
        assert abs(dvae(images)["loss_kl"]) < 1e-5
        dvae.encoder.blocks.output.conv.b[7] = 100.0  # always word 7: ln V nats, one word in use
        out = dvae(images)
    assert torch.allclose(out["loss_kl"], torch.tensor(math.log(128))) and out["codes_used"] == 1
    assert torch.allclose(out["perplexity"], torch.ones(())) and (out["ids"] == 7).all()


def test_temperature_falls_along_a_half_cosine(monkeypatch):
    taus = []

    def note(logits, tau, dim):
        taus.append(tau)
        return logits.softmax(dim)

    monkeypatch.setattr(F, "gumbel_softmax", note)
    dvae, images = tiny(), torch.zeros(1, 3, 16, 16)
    for progress in (0.0, 0.5, 1.0):
        dvae(images, progress)
    assert taus == pytest.approx([1, (1 + 1 / 16) / 2, 1 / 16])


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="image_size must be a positive multiple of 8"):
        DVAE(image_size=100, hidden_dim=8, vocab_size=8)
    for options, words in [(dict(hidden_dim=30), "hidden_dim must be a multiple of 4, got 30"),
                           (dict(hidden_dim=0), "hidden_dim must be at least 1, got 0"),
                           (dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
                           (dict(groups=0), "groups must be at least 1, got 0"),
                           (dict(blocks_per_group=-1), "blocks_per_group must be at least 1, got -1"),
                           (dict(kl_weight=math.nan), "kl_weight must be at least 0, got nan"),
                           (dict(tau_start=math.inf), "tau_start must be at least 0.001, got inf"),
                           (dict(tau_end=2.0), "tau_end must be in 0.001..1.0, got 2.0")]:
        with pytest.raises(ValueError, match=words):
            tiny(**options)
    with pytest.raises(ValueError, match="divisible by 4, got 30x32"):
        tiny().tokens(torch.zeros(1, 3, 30, 32))


def test_learns_in_seconds_and_keeps_its_words_in_use():
    """Smooth random images: far better than their mean colour, with many words."""
    torch.manual_seed(0)
    dvae, steps = tiny(blocks_per_group=1), 100
    optimizer = torch.optim.AdamW(dvae.parameters(), lr=3e-3, betas=(0.9, 0.999))

    def batch(n):
        return F.interpolate(torch.rand(n, 3, 2, 2) * 4 - 2, size=(16, 16), mode="bilinear")

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        loss = dvae(batch(16), step / steps)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dvae.eval()
    with torch.no_grad():
        images = batch(256)
        out = dvae(images)
    assert out["loss_pixel"] < 0.4 * images.var()
    assert out["perplexity"] > 8
