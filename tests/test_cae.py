"""CAE, BEiT, the token target and the attentive probe: equations against numbers by hand, and what the papers claim."""

import copy
import json
import math

import eval as evaluation
import pytest
import torch
import torch.nn.functional as F
from datasets import normalize, render_scene
from mim import CAE, MAE, BEiT, Block, LoMaR, TargetHead, ViT, patchify, pixel_loss, take, token_loss
from conftest import MeanTokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
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
    assert set(scaled.state_dict()) - set(plain.state_dict()) == extra and not set(plain.state_dict()) - set(scaled.state_dict())
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
    import mim

    encoder = shaken(vit(layer_scale=1e-5))
    other, (missing, left_over) = mim.vit_from_checkpoint(CAE(encoder).state_dict(), num_heads=2)
    x = images()
    assert not missing and torch.allclose(encoder(x), other(x)) and any(k.startswith("regressor") for k in left_over)


# Targets


def test_token_loss_by_hand():
    logits, tokens = torch.randn(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    expected = -sum(logits[b, n].log_softmax(0)[tokens[b, n]] for b in range(2) for n in range(3)) / 6
    assert token_loss(logits, tokens).item() == pytest.approx(expected.item(), rel=1e-6)
    assert token_loss(logits.bfloat16(), tokens).dtype == torch.float32


def test_the_tokenizer_is_no_part_of_the_model():
    tokenizer = MeanTokenizer()
    for method in (CAE(vit(), tokenizer), BEiT(vit(), tokenizer), LoMaR(vit(relative_position=True), tokenizer, window_size=3)):
        mine = {id(p) for p in tokenizer.parameters()}
        assert not any(id(p) in mine for p in method.parameters()) and tokenizer not in list(method.modules())
        assert not any("tokenizer" in k for k in method.state_dict()) and method.head.tokenizer is tokenizer
        assert method.head.weight.shape == (tokenizer.vocab_size, 32)
        method(images())["loss"].backward()
        assert tokenizer.unused.grad is None


def test_the_tokenizer_follows_the_images():
    class Spy(MeanTokenizer):
        moved = None

        def to(self, device):
            Spy.moved = device
            return self

    TargetHead(vit(), Spy()).tokens(images())
    assert Spy.moved == torch.device("cpu")


def test_targets_are_the_masked_patches_own_tokens():
    x, tokenizer = images(3, 32, 48), MeanTokenizer(3)
    head = TargetHead(vit((32, 48)), tokenizer)
    _, ids = split(3, 24)
    expected = torch.stack([tokenizer.tokenize(x, (4, 6))[b, ids[b]] for b in range(3)])
    loss, parts = head.compare(100.0 * F.one_hot(expected, 27), x, ids)
    assert loss.item() < 1e-6 and parts["accuracy"].item() == 1.0
    wrong = torch.where(torch.arange(8) < 2, (expected + 1) % 27, expected)
    assert head.compare(100.0 * F.one_hot(wrong, 27), x, ids)[1]["accuracy"].item() == pytest.approx(6 / 8)


def test_the_pixel_target_is_maes():
    x, (visible, masked) = images(), split()
    for norm_pix in (True, False):
        cae = CAE(vit(), norm_pix=norm_pix)
        out = cae(x, visible, masked)
        expected = pixel_loss(out["pred"], take(patchify(x, 8), masked), norm_pix)
        assert out["loss_pixel"].item() == pytest.approx(expected.item())
        assert out["loss"].item() == pytest.approx(expected.item() + 2 * out["loss_align"].item(), rel=1e-6)
        assert "accuracy" not in out and out["pred"].shape == (2, 8, 192)


@pytest.mark.parametrize("build, words", [
    (lambda: BEiT(vit()), "BEiT predicts tokens and needs a tokenizer"),
    (lambda: BEiT(vit(), MeanTokenizer(), mask_ratio=1.0), "mask_ratio=1.0 leaves 0 of 16 patches visible"),
    (lambda: CAE(vit(), mask_ratio=0.0), "mask_ratio=0.0 leaves 16 of 16"),
    (lambda: CAE(vit(relative_position=True)), "needs an encoder with a position table"),
    (lambda: CAE(vit(), regressor_depth=0), "regressor_depth=0 must be at least 1"),
])
def test_mistakes_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_defaults_are_the_papers():
    large = ViT(224, 16, 32, 1, 2)
    cae, beit = CAE(large), BEiT(large, MeanTokenizer())
    assert cae.num_masked == 98 and len(cae.regressor_blocks) == len(cae.decoder_blocks) == 4 and cae.alignment_weight == 2
    assert beit.num_masked == 75
    out = beit(images(2, 224, 224))
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
                    weights = torch.stack([(q[i, part] * k[j, part]).sum() / math.sqrt(d) for j in range(len(k))]).exp()
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
    assert torch.allclose(cae.decode(z, ids), F.linear(cae.decoder_norm(x), cae.head.weight, cae.head.bias), atol=1e-6)


def test_order_of_patches_does_not_matter():
    cae, x, (visible, masked) = shaken(CAE(vit(), regressor_depth=2)).eval(), images(), split()
    out, turned = cae(x, visible, masked), cae(x, visible.flip(1), masked.flip(1))
    assert torch.allclose(out["pred"], turned["pred"].flip(1), atol=1e-4)
    assert out["loss"].item() == pytest.approx(turned["loss"].item(), rel=1e-4)


def test_masked_pixels_reach_the_targets_only():
    x, other, (visible, masked) = images(), images(), split()
    patches = patchify(x, 8).scatter(1, masked[..., None].expand(-1, -1, 192), take(patchify(other, 8), masked))
    mixed = patches.view(2, 4, 4, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 32, 32)
    for method in (CAE(vit()), BEiT(vit(), MeanTokenizer())):
        shaken(method)
        first, second = method(x, visible, masked), method(mixed, visible, masked)
        assert torch.allclose(first["pred"], second["pred"], atol=1e-5) and not torch.isclose(first["loss"], second["loss"])


def test_visible_latents_do_not_enter_the_decoder(monkeypatch):
    cae, (visible, masked) = shaken(CAE(vit())), split()
    x, y = images(), images()
    assert not torch.allclose(cae(x, visible, masked)["pred"], cae(y, visible, masked)["pred"], atol=1e-3)
    held = torch.randn(2, 8, 32)
    monkeypatch.setattr(cae, "regress", lambda latents, *ids: held)
    assert torch.equal(cae(x, visible, masked)["pred"], cae(y, visible, masked)["pred"])


def test_no_gradient_enters_the_alignment_target():
    cae, x, (visible, masked) = shaken(CAE(vit())), images(), split()
    frozen = copy.deepcopy(cae.encoder).requires_grad_(False)
    predicted = cae.regress(cae.encoder(x, visible)[:, 1:], visible, masked)
    expected = gradients(F.mse_loss(predicted, frozen(x, masked)[:, 1:]), cae)
    actual = gradients(cae(x, visible, masked)["loss_align"], cae)
    assert all(torch.allclose(a, e, atol=1e-6) for a, e in zip(actual, expected))
    through = gradients(F.mse_loss(predicted.detach(), cae.encoder(x, masked)[:, 1:]), cae)
    assert max(g.abs().max() for g in through) > 1e-3  # there is a gradient to stop


def test_without_its_weight_alignment_contributes_nothing():
    cae, x, ids = shaken(CAE(vit(), alignment_weight=0.0)), images(), split()
    out = cae(x, *ids)
    whole, part = gradients(out["loss"], cae), gradients(cae(x, *ids)["loss_pixel"], cae)
    assert all(torch.equal(a, b) for a, b in zip(whole, part))


def test_autocast_keeps_the_gradients():
    """The encoder's weights are cast once for the pass with and the pass without gradient."""
    cae, x, ids = CAE(vit(layer_scale=0.1)), images(), split()
    exact = gradients(cae(x, *ids)["loss"], cae)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cae(x, *ids)["loss"]
    for a, b in zip(gradients(loss, cae), exact):
        assert (a - b).norm() <= 0.1 * b.norm() + 0.01  # of biases of keys both are zero


def test_the_whole_image_is_decoded_without_the_regressor(monkeypatch):
    cae, x = shaken(CAE(vit())), images()
    monkeypatch.setattr(cae, "regress", None)
    full = cae.reconstruct_full(x)
    ids = torch.rand(2, 16).argsort(1)
    by_hand = cae.decode(cae.encoder(x, ids)[:, 1:], ids)  # in another order
    assert full.shape == (2, 16, 192) and torch.allclose(take(full, ids), by_hand, atol=1e-4)


def test_cost_is_the_papers():
    """24.2 GMAC forward at ViT-B/16 with 8192 tokens, the alignment pass counted."""
    tokenizer = MeanTokenizer()
    tokenizer.vocab_size = 8192
    cae = CAE(ViT(224, layer_scale=0.1), tokenizer).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # torch 2.6 cannot count the fused one
        cae(images(1, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(24.2, rel=0.01)


# Learning


def scenes(count, first=0):
    return normalize(torch.stack([torch.from_numpy(render_scene(first + i, 32)[0]) for i in range(count)]))


@pytest.fixture(scope="module")
def data():
    return scenes(512), scenes(64, 10**9)


def fit(method, data, steps, lr=4e-3, batch_size=32):
    optimizer = torch.optim.AdamW(method.parameters(), lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for _ in range(steps):
        loss = method(data[torch.randint(len(data), (batch_size,))])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return method.eval()


@pytest.mark.parametrize("build", [
    lambda tokenizer: CAE(vit(layer_scale=0.1), tokenizer, regressor_depth=1, decoder_depth=1, min_block=4),
    lambda tokenizer: BEiT(vit(layer_scale=0.1), tokenizer, min_block=4),
    lambda tokenizer: LoMaR(vit(relative_position=True), tokenizer, mask_ratio=0.5, window_size=4, num_windows=1),
], ids=["cae", "beit", "lomar"])
def test_tokens_are_learned(data, build):
    """Better than the most frequent token, and than the entropy of the tokens' frequencies: it reads the context."""
    train, val = data
    tokenizer = MeanTokenizer()
    share = tokenizer.tokenize(train, (4, 4)).flatten().bincount(minlength=8) / (512 * 16)
    entropy = -(share * share.clamp_min(1e-9).log()).sum().item()
    method = fit(build(tokenizer), train, 100)
    with torch.no_grad():
        out = method(val)
    assert out["loss_token"].item() < entropy - 0.2 and out["accuracy"].item() > share.max().item() + 0.12


def full_error(alignment_weight, data):
    cae = CAE(vit(layer_scale=0.1), regressor_depth=1, decoder_depth=1, min_block=4, alignment_weight=alignment_weight)
    fit(cae, data[0], 100)
    with torch.no_grad():
        return pixel_loss(cae.reconstruct_full(data[1]), patchify(data[1], 8), True).item(), cae(data[1])["loss_pixel"].item()


def test_alignment_keeps_predictions_in_the_encoders_space(data):
    """Figure 3: with it the decoder reads what the encoder says of the whole image; without, not even a patch's mean.

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
    q, k, v = affine(norm(probe.query.double(), a.norm_q), a.q)[0, 0], affine(norm(x, a.norm_k), a.k), affine(norm(x, a.norm_v), a.v)
    gathered, maps = [], []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        weights = (k[..., part] @ q[part] / math.sqrt(8)).softmax(-1)
        gathered.append((weights[..., None] * v[..., part]).sum(1))
        maps.append(weights)
    pooled = affine(torch.cat(gathered, 1), a.proj)  # no skip: the query itself is not in it
    logits = affine(pooled / math.sqrt(1 + 1e-6), probe.classifier[1])  # batch norm's statistics are 0 and 1 here
    assert torch.allclose(probe(patches).double(), logits, atol=1e-5)
    assert torch.allclose(probe.attention(patches).double(), torch.stack(maps, 1), atol=1e-5)


def test_the_probe_finds_the_patch_that_tells():
    """One patch in 16, anywhere, carries class and marker: the query learns to look there and nowhere else."""
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


@pytest.mark.parametrize("flags", [["--cache-features", "--epochs", "60"], ["--epochs", "20"]])
def test_the_attentive_task(flags, tmp_path, capsys):
    for name, count in (("train", 32), ("val", 8)):
        for i in range(count):
            path = tmp_path / name / ("dark" if i % 2 else "bright") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            tone = torch.randint(0, 80, (3, 1, 1)) + (0 if i % 2 else 170)
            write_png((tone + torch.randint(0, 5, (3, 32, 32))).to(torch.uint8), str(path))
    torch.save(CAE(vit(layer_scale=0.1)).encoder.state_dict(), tmp_path / "encoder.pt")
    evaluation.main([str(tmp_path / "encoder.pt"), "--task", "attentive", "--data", str(tmp_path), "--batch-size", "16",
                     *flags, "--count", "3"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["top1"] >= 87.5 and result["features"] == ("cached" if "--cache-features" in flags else "augmented")
    assert read_image(result["picture"]).shape == (3, 3 * 130 + 2, 2 * 130 + 2)  # image, 1 head


def test_other_methods_are_unchanged():
    encoder = vit()
    assert MAE(encoder)(images())["loss"].isfinite() and not any("ls1" in k for k in encoder.state_dict())
