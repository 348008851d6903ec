"""CAE, BEiT, the token target and the attentive probe: equations by hand, and what the papers claim."""

import copy
import json
import math

import eval as evaluation
import pytest
import torch
import torch.nn.functional as F
from conftest import MeanTokenizer
from mim import (CAE, BEiT, Block, LoMaR, TargetHead, ViT, block_masking, patchify, pixel_loss, put, take,
                 token_loss, unpatchify, vit_from_checkpoint)
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import read_image, write_png


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def vit(image_size=32, **options):
    return ViT(image_size, 8, 32, 2, 2, **options)


def images(batch=2, height=32, width=32):
    """Noise on patches of different colours."""
    colours = F.interpolate(2 * torch.randn(batch, 3, height // 8, width // 8), scale_factor=8)
    return colours + torch.randn(batch, 3, height, width)


def shaken(module):
    """The module with every parameter moved at random, so that no bias, norm or scale is neutral."""
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module


def split(batch=2, N=16, masked=8):
    order = torch.rand(batch, N).argsort(1)
    return order[:, masked:], order[:, :masked]


def gradients(loss, module):
    grads = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in grads]


# Layer scale and initialisation


def test_layer_scale_has_timms_names_and_is_absent_by_default():
    plain, scaled = vit(), vit(layer_scale=0.1)
    extra = {f"blocks.{i}.ls{j}.gamma" for i in range(2) for j in (1, 2)}
    assert set(scaled.state_dict()) == set(plain.state_dict()) | extra
    assert not any("ls1" in k for k in plain.state_dict())
    assert all((scaled.state_dict()[k] == 0.1).all() for k in extra)


def test_layer_scale_multiplies_both_branches():
    block, x = shaken(Block(32, 2, layer_scale=0.5)), torch.randn(2, 5, 32)
    y = x + block.ls1.gamma * block.attn(block.norm1(x))
    assert torch.allclose(block(x), y + block.ls2.gamma * block.mlp(block.norm2(y)), atol=1e-6)


def test_projections_start_smaller_with_depth():
    cae, plain = CAE(ViT(32, 8, 64, 3, 2, layer_scale=0.1)), ViT(32, 8, 64, 3, 2)
    for blocks in (cae.encoder.blocks, cae.regressor_blocks, cae.decoder_blocks):
        for i, block in enumerate(blocks, start=1):
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                xavier = math.sqrt(2 / sum(weight.shape))
                assert weight.std().item() == pytest.approx(xavier / math.sqrt(2 * i), rel=0.05)
    assert plain.blocks[2].attn.proj.weight.std().item() == pytest.approx(math.sqrt(1 / 64), rel=0.05)


def test_a_checkpoint_with_layer_scale_is_recognised():
    encoder = shaken(vit(layer_scale=1e-5))
    other, (missing, left_over) = vit_from_checkpoint(CAE(encoder).state_dict(), num_heads=2)
    x = images()
    assert not missing and torch.allclose(encoder(x), other(x))
    assert any(k.startswith("regressor") for k in left_over)


# Targets


def test_token_loss_by_hand():
    logits, tokens = torch.randn(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    expected = -sum(logits[b, n].log_softmax(0)[tokens[b, n]] for b in range(2) for n in range(3)) / 6
    assert token_loss(logits, tokens).item() == pytest.approx(expected.item(), rel=1e-6)
    assert token_loss(logits.bfloat16(), tokens).dtype == torch.float32


def words(x, vocab_size=8, patch_size=8):
    """The tokens that MeanTokenizer gives the patches of the images x."""
    tokenizer = MeanTokenizer(round(vocab_size ** (1 / 3)))
    return tokenizer.tokenize(x, (x.shape[2] // patch_size, x.shape[3] // patch_size))


TOKEN_METHODS = {
    "cae": lambda vocab_size: CAE(vit(), vocab_size),
    "beit": lambda vocab_size: BEiT(vit(), vocab_size),
    "lomar": lambda vocab_size: LoMaR(vit(relative_position=True), vocab_size, window_size=3),
}


@pytest.mark.parametrize("name", TOKEN_METHODS)
def test_tokens_are_an_input_and_no_module_holds_their_source(name):
    method, x = TOKEN_METHODS[name](8), images()
    assert method.vocab_size == 8 and method.head.weight.shape == (8, 32)
    out = method(x, words(x))
    again = method(x, words(x), out["ids_visible"], out["ids_masked"])
    other = method(x, (words(x) + 1) % 8, out["ids_visible"], out["ids_masked"])
    assert torch.equal(again["loss"], out["loss"]) and torch.equal(other["pred"], out["pred"])
    assert other["loss"] != out["loss"] and not torch.equal(other["loss_token"], out["loss_token"])
    if name != "beit":
        pixels = TOKEN_METHODS[name](None)
        assert pixels.vocab_size is None and pixels.head.weight.shape == (192, 32)


def test_tokens_are_given_if_and_only_if_there_is_a_vocabulary():
    x = images()
    for build in TOKEN_METHODS.values():
        with pytest.raises(ValueError, match="tokens must be given if .* vocab_size is 8"):
            build(8)(x, None)
    with pytest.raises(ValueError, match="tokens must be given if .* and only then; vocab_size is None"):
        CAE(vit())(x, words(x))


def test_targets_are_the_masked_patches_own_tokens():
    x = images(3, 32, 48)
    head, tokens = TargetHead(vit((32, 48)), 27), words(x, 27)
    _, ids = split(3, 24)
    expected = torch.stack([tokens[b, ids[b]] for b in range(3)])
    loss, parts = head.loss(100.0 * F.one_hot(expected, 27), x, tokens, ids)
    assert loss.item() < 1e-6 and parts["accuracy"].item() == 1.0
    wrong = torch.where(torch.arange(8) < 2, (expected + 1) % 27, expected)
    _, parts = head.loss(100.0 * F.one_hot(wrong, 27), x, tokens, ids)
    assert parts["accuracy"].item() == pytest.approx(6 / 8)


def test_the_pixel_target_is_maes():
    x, (visible, masked) = images(), split()
    for norm_pix in (True, False):
        cae = CAE(vit(), norm_pix=norm_pix)
        out = cae(x, None, visible, masked)
        expected = pixel_loss(out["pred"], take(patchify(x, 8), masked), norm_pix)
        assert out["loss_pixel"].item() == pytest.approx(expected.item())
        assert out["loss"].item() == pytest.approx(expected.item() + 2 * out["loss_align"].item(), rel=1e-6)
        assert "accuracy" not in out and out["pred"].shape == (2, 8, 192)


@pytest.mark.parametrize("build, words", [
    (lambda: BEiT(vit(), None), "BEiT predicts tokens and needs the vocab_size of a tokenizer"),
    (lambda: BEiT(vit(), 8, mask_ratio=1.0), "mask_ratio=1.0 masks 16 of 16;"),
    (lambda: BEiT(vit(), 8, mask_ratio=math.nan), "mask_ratio must be in 0..1, got nan"),
    (lambda: BEiT(vit(), 8, min_block=0), "min_block must be at least 1, got 0"),
    (lambda: CAE(vit(), mask_ratio=0.0), "mask_ratio=0.0 masks 0 of 16"),
    (lambda: CAE(vit(relative_position=True)), "needs an encoder with a position table"),
    (lambda: CAE(vit(), regressor_depth=0), "regressor_depth must be at least 1, got 0"),
    (lambda: CAE(vit(), decoder_depth=-1), "decoder_depth must be at least 0, got -1"),
    (lambda: CAE(vit(), alignment_weight=math.inf), "alignment_weight must be at least 0, got inf"),
])
def test_mistakes_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize("cls, ratio, min_block", [(CAE, 0.5, 2), (CAE, 0.25, 16), (BEiT, 0.5, 3)])
def test_masks_are_blocks_as_asked_for(cls, ratio, min_block):
    method, x = cls(vit(), 8, mask_ratio=ratio, min_block=min_block), images(6)
    torch.manual_seed(3)
    out = method(x, words(x))
    torch.manual_seed(3)
    expected = block_masking(6, (4, 4), int(16 * ratio), min_block)
    assert torch.equal(out["ids_visible"], expected[0]) and torch.equal(out["ids_masked"], expected[1])


def test_defaults_are_the_papers():
    large = ViT(224, 16, 32, 1, 2)
    cae, beit = CAE(large), BEiT(large, 8)
    assert cae.num_masked == 98 and cae.alignment_weight == 2
    assert len(cae.regressor_blocks) == len(cae.decoder_blocks) == 4
    assert beit.num_masked == 75
    out = beit(images(2, 224, 224), torch.zeros(2, 196, dtype=torch.int64))
    assert out["ids_masked"].shape == (2, 75) and out["ids_visible"].shape == (2, 121)


# CAE's equations


def norm(x, layer):
    return F.layer_norm(x, x.shape[-1:], layer.weight.double(), layer.bias.double(), 1e-6)


def affine(x, layer):
    return x @ layer.weight.double().T + layer.bias.double()


def regressor_by_hand(cae, latents, ids_visible, ids_masked):
    """§3.1 for one image at a time, one head and one query at a time, in float64."""
    table, results = cae.encoder.pos_embed[0, 1:].double(), []
    for z, visible, masked in zip(latents.double(), ids_visible, ids_masked):
        queries = cae.mask_token[0].double().expand(len(masked), -1)
        for block in cae.regressor_blocks:
            a, context = block.attn, torch.cat([z, queries])
            places = torch.cat([table[visible], table[masked]])
            q = affine(norm(queries + table[masked], a.norm_q), a.q)
            k, v = affine(norm(context + places, a.norm_k), a.k), affine(norm(context, a.norm_v), a.v)
            gathered, d = torch.zeros_like(q), q.shape[1] // a.num_heads
            for h in range(a.num_heads):
                part = slice(h * d, (h + 1) * d)
                for i in range(len(q)):
                    weights = torch.stack([q[i, part] @ key / math.sqrt(d) for key in k[:, part]]).exp()
                    gathered[i, part] = (weights / weights.sum()) @ v[:, part]
            x = norm(queries + block.ls1.gamma.double() * affine(gathered, a.proj), block.norm2)
            queries = x + block.ls2.gamma.double() * affine(F.gelu(affine(x, block.mlp.fc1)), block.mlp.fc2)
        results.append(norm(queries, cae.regressor_norm))
    return torch.stack(results)


def test_regressor_is_the_papers_equations():
    cae = shaken(CAE(vit(layer_scale=0.1), regressor_depth=2))
    visible, masked = split(2, 16, 5)
    latents = torch.randn(2, 11, 32)
    before = latents.clone()
    predicted = cae.regress(latents, visible, masked)
    assert predicted.shape == (2, 5, 32) and torch.equal(latents, before)  # visible latents are never updated
    with torch.no_grad():
        assert torch.allclose(predicted.double(), regressor_by_hand(cae, latents, visible, masked), atol=1e-5)


def test_the_decoder_adds_positions_once():
    cae, z, (_, ids) = shaken(CAE(vit(layer_scale=0.1), decoder_depth=2)), torch.randn(2, 8, 32), split()
    x = z + cae.encoder.pos_embed[0, 1:][ids]
    for block in cae.decoder_blocks:
        x = block(x)
    expected = F.linear(cae.decoder_norm(x), cae.head.weight, cae.head.bias)
    assert torch.allclose(cae.decode(z, ids), expected, atol=1e-6)


def test_without_blocks_the_decoder_is_a_linear_layer_alone():
    """Table 2, the first row."""
    cae, z, (_, ids) = shaken(CAE(vit(layer_scale=0.1), 8, decoder_depth=0)), torch.randn(2, 8, 32), split()
    assert torch.equal(cae.decode(z, ids), F.linear(z, cae.head.weight, cae.head.bias))
    own = {name.split(".")[0] for name in cae.state_dict()} - {"encoder"}
    assert own == {"mask_token", "regressor_blocks", "regressor_norm", "head"}
    with torch.no_grad():
        whole, (x, tokens) = cae.predict_whole(images()), (images(), torch.randint(8, (2, 16)))
    assert whole.shape == (2, 16, 8)
    loss = cae(x, tokens)["loss"]
    assert all(g.any() for g in gradients(loss, cae.regressor_blocks)[-4:])


def test_regressor_and_decoder_take_over_the_encoders_drop_path():
    cae = CAE(ViT(32, 8, 32, 3, 2, drop_path=0.4), regressor_depth=5, decoder_depth=3)
    assert [block.drop_path.p for block in cae.regressor_blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [block.drop_path.p for block in cae.decoder_blocks] == pytest.approx([0, 0.2, 0.4])


def test_order_of_patches_does_not_matter():
    cae, x, (visible, masked) = shaken(CAE(vit(), regressor_depth=2)).eval(), images(), split()
    out, turned = cae(x, None, visible, masked), cae(x, None, visible.flip(1), masked.flip(1))
    assert torch.allclose(out["pred"], turned["pred"].flip(1), atol=1e-4)
    assert out["loss"].item() == pytest.approx(turned["loss"].item(), rel=1e-4)


def test_masked_pixels_reach_the_targets_only():
    x, other, (visible, masked) = images(), images(), split()
    mixed = unpatchify(put(patchify(x, 8), masked, take(patchify(other, 8), masked)), 8, (4, 4))
    for method, tokens in ((CAE(vit()), None), (BEiT(vit(), 8), words)):
        shaken(method)
        first, second = (method(y, tokens and tokens(y), visible, masked) for y in (x, mixed))
        assert torch.allclose(first["pred"], second["pred"], atol=1e-5)
        assert not torch.isclose(first["loss"], second["loss"])


def test_visible_latents_do_not_enter_the_decoder(monkeypatch):
    cae, (visible, masked) = shaken(CAE(vit())), split()
    x, y = images(), images()
    ids = dict(ids_visible=visible, ids_masked=masked)
    assert not torch.allclose(cae(x, **ids)["pred"], cae(y, **ids)["pred"], atol=1e-3)
    held = torch.randn(2, 8, 32)
    monkeypatch.setattr(cae, "regress", lambda latents, *ids: held)
    assert torch.equal(cae(x, **ids)["pred"], cae(y, **ids)["pred"])


def test_no_gradient_enters_the_alignment_target():
    cae, x, (visible, masked) = shaken(CAE(vit())), images(), split()
    frozen = copy.deepcopy(cae.encoder).requires_grad_(False)
    predicted = cae.regress(cae.encoder(x, visible)[:, 1:], visible, masked)
    expected = gradients(F.mse_loss(predicted, frozen(x, masked)[:, 1:]), cae)
    actual = gradients(cae(x, None, visible, masked)["loss_align"], cae)
    assert all(torch.allclose(a, e, atol=1e-6) for a, e in zip(actual, expected))
    through = gradients(F.mse_loss(predicted.detach(), cae.encoder(x, masked)[:, 1:]), cae)
    assert max(g.abs().max() for g in through) > 1e-3  # there is a gradient to stop


def test_without_its_weight_alignment_contributes_nothing():
    cae, x, ids = shaken(CAE(vit(), alignment_weight=0.0)), images(), split()
    out = cae(x, None, *ids)
    whole, part = gradients(out["loss"], cae), gradients(cae(x, None, *ids)["loss_pixel"], cae)
    assert all(torch.equal(a, b) for a, b in zip(whole, part))


def test_autocast_keeps_the_gradients():
    """The encoder's weights are cast once for the pass with and the pass without gradient."""
    cae, x, ids = CAE(vit(layer_scale=0.1)), images(), split()
    exact = gradients(cae(x, None, *ids)["loss"], cae)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cae(x, None, *ids)["loss"]
    for a, b in zip(gradients(loss, cae), exact):
        assert (a - b).norm() <= 0.1 * b.norm() + 0.01  # of biases of keys both are zero


def test_the_whole_image_is_decoded_without_the_regressor(monkeypatch):
    cae, x = shaken(CAE(vit())), images()
    monkeypatch.setattr(cae, "regress", None)
    full = cae.predict_whole(x)
    ids = torch.rand(2, 16).argsort(1)
    by_hand = cae.decode(cae.encoder(x, ids)[:, 1:], ids)  # in another order
    assert full.shape == (2, 16, 192) and torch.allclose(take(full, ids), by_hand, atol=1e-4)


def test_cost_is_the_papers():
    """24.2 GMAC forward at ViT-B/16 with 8192 tokens, the alignment pass counted."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        cae = CAE(ViT(224, layer_scale=0.1), 8192).requires_grad_(False)
        cae(torch.empty(1, 3, 224, 224), torch.zeros(1, 196, dtype=torch.int64))
    assert counter.get_total_flops() / 2e9 == pytest.approx(24.2, rel=0.01)


# Learning


def waves(count, seed):
    """Images [count, 3, 32, 32], each of two slow waves in random directions and colours."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.arange(32) + 0.5) / 32
    fx, fy, phase = (2 * math.pi * torch.rand(3, count, 2, 1, 1, generator=generator)).unbind(0)
    wave = torch.sin(0.5 * fx * x + 0.5 * fy * x[:, None] + phase)
    colours = torch.randn(count, 2, 3, 1, 1, generator=generator)
    return (colours * wave[:, :, None]).sum(1)


@pytest.fixture(scope="module")
def data():
    return waves(512, 0), waves(64, 1)


def fit(method, data, steps, lr, batch_size=32):
    tokens = words(data) if method.vocab_size else None
    optimizer = torch.optim.AdamW(method.parameters(), lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for _ in range(steps):
        chosen = torch.randint(len(data), (batch_size,))
        loss = method(data[chosen], None if tokens is None else tokens[chosen])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return method.eval()


@pytest.mark.parametrize("build", [
    lambda: CAE(vit(layer_scale=0.1), 8, regressor_depth=1, decoder_depth=1, min_block=4),
    lambda: BEiT(vit(layer_scale=0.1), 8, min_block=4),
    lambda: LoMaR(vit(relative_position=True), 8, mask_ratio=0.5, window_size=4, num_windows=1),
], ids=["cae", "beit", "lomar"])
def test_tokens_are_learned(data, build):
    """Better than the most frequent token, and than the entropy of the tokens' frequencies."""
    train, val = data
    share = words(train).flatten().bincount(minlength=8) / (512 * 16)
    entropy = -(share * share.clamp_min(1e-9).log()).sum().item()
    method = fit(build(), train, 30, lr=1e-2)
    with torch.no_grad():
        out = method(val, words(val))
    assert out["loss_token"].item() < entropy - 0.2 and out["accuracy"].item() > share.max().item() + 0.12


def full_error(alignment_weight, data):
    cae = CAE(vit(layer_scale=0.1), regressor_depth=1, decoder_depth=1, min_block=4,
              alignment_weight=alignment_weight)
    fit(cae, data[0], 50, lr=8e-3, batch_size=24)
    with torch.no_grad():
        full = pixel_loss(cae.predict_whole(data[1]), patchify(data[1], 8), True)
        return full.item(), cae(data[1])["loss_pixel"].item()


def test_alignment_keeps_predictions_in_the_encoders_space(data):
    """Figure 3: with it the decoder reads what the encoder says of the whole image; without, nothing.

    The error is that of patches normalised to variance one, so that 1 is the error of saying nothing.
    """
    (aligned, masked), (free, masked_free) = full_error(2.0, data), full_error(0.0, data)
    assert masked < 0.9 and masked_free < 0.9  # both have learned their task, equally well
    assert aligned < 0.75 < 1.05 < free


# Attentive probe


def test_attentive_probe_by_hand():
    probe = shaken(evaluation.AttentiveProbe(32, 4, 5)).double().eval()
    patches = torch.randn(2, 6, 32).half()
    x, a = patches.double(), probe.attn
    probe.float()
    q = affine(norm(probe.query.double(), a.norm_q), a.q)[0, 0]
    k, v = affine(norm(x, a.norm_k), a.k), affine(norm(x, a.norm_v), a.v)
    gathered, maps = [], []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        weights = (k[..., part] @ q[part] / math.sqrt(8)).softmax(-1)
        gathered.append((weights[..., None] * v[..., part]).sum(1))
        maps.append(weights)
    pooled = affine(torch.cat(gathered, 1), a.proj)  # no skip: the query itself is not in it
    logits = affine(pooled / math.sqrt(1 + 1e-6), probe.classifier[1])  # batch norm's statistics are 0 and 1
    assert torch.allclose(probe(patches).double(), logits, atol=1e-5)
    assert torch.allclose(probe.attention(patches).double(), torch.stack(maps, 1), atol=1e-5)


def test_the_probe_finds_the_patch_that_tells():
    """One patch in 16, anywhere, carries class and marker: the query learns to look there alone."""
    def draw(count):
        patches, where = 0.5 * torch.randn(count, 16, 32), torch.randint(16, (count,))
        labels = torch.randint(4, (count,))
        patches[torch.arange(count), where] = 4 * torch.eye(32)[labels] + 4 * torch.eye(32)[10]
        return patches, where, labels

    probe = evaluation.AttentiveProbe(32, 2, 4)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        patches, _, labels = draw(128)
        optimizer.zero_grad()
        F.cross_entropy(probe(patches), labels).backward()
        optimizer.step()
    patches, where, labels = draw(256)
    probe.eval()
    found = probe.attention(patches).mean(1).argmax(1) == where
    assert found.float().mean() > 0.95 and (probe(patches).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.parametrize("flags", [
    ["--cache-features", "--epochs", "60"], ["--no-cache-features", "--epochs", "20"]])
def test_the_attentive_task(flags, tmp_path, capsys):
    for name, count in (("train", 32), ("val", 8)):
        for i in range(count):
            path = tmp_path / name / ("dark" if i % 2 else "bright") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            tone = torch.randint(0, 80, (3, 1, 1)) + (0 if i % 2 else 170)
            write_png((tone + torch.randint(0, 5, (3, 32, 32))).to(torch.uint8), str(path))
    torch.save(CAE(vit(layer_scale=0.1)).encoder.state_dict(), tmp_path / "encoder.pt")
    evaluation.main([str(tmp_path / "encoder.pt"), "--task", "attentive", "--data", str(tmp_path),
                     "--batch-size", "16", *flags, "--count", "3"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["top1"] >= 87.5
    assert result["features"] == ("cached" if "--cache-features" in flags else "augmented")
    # Three samples side by side, an image and a map each; tiles of 128 pixels with gaps of 4.
    assert read_image(result["picture"]).shape[2] == 4 + 3 * 2 * 132
