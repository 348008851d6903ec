"""The methods against numbers that their authors' own code gives.

golden.json holds losses, predictions, gradient norms and the losses of five steps of AdamW. The authors'
modules gave them in float64, for weights, images and masks made by the formulas below. "tolerance" is what
float32 may differ by, relative to the root mean square of what is expected. README.md names the repositories
and commits.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
import mim

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
CASES = GOLDEN["cases"]


def cases(kind):
    return [name for name, case in CASES.items() if case["kind"] == kind]


# ---------------------------------------------------------------------------------------------------------
# Formulas, computed in float64


def fill(module, amplitude):
    """Sets the k-th element of each trained parameter to A sin(phi k^2 (1 + s % 7) + s), s from its name.

    The weight of a LayerNorm gets 1 more, layer scale 0.5 more.
    """
    owners = dict(module.named_modules())
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, own = name.rpartition(".")
        s = zlib.crc32(name.encode()) % 1000
        k = np.arange(1.0, parameter.numel() + 1)
        values = amplitude * np.sin(0.61803398875 * k * k * (1 + s % 7) + s)
        if isinstance(owners[owner], torch.nn.LayerNorm) and own == "weight":
            values += 1
        if own == "gamma":
            values += 0.5
        parameter.data = torch.from_numpy(values).float().view_as(parameter)


def images():
    """[2, 3, 32, 32]: two waves."""
    b, c, y, x = np.ogrid[:2, :3, :32, :32]
    return torch.from_numpy(np.sin(0.7 * x + 0.3 * y * (c + 1) + b) + 0.3 * np.cos(0.05 * x * y + c)).float()


def region_maps():
    """[2, 4, 32, 32] bool: a disc, stripes, a rectangle, bands along hyperbolas."""
    b, y, x = np.ogrid[:2, :32, :32]
    maps = [(x - 8 - 4 * b) ** 2 + (y - 10) ** 2 <= 49,
            (x + 2 * y + 3 * b) % 11 < 4,
            (x >= 12) & (x < 28) & (y + b >= 4) & (y + b < 20),
            (x * y // 16 + b) % 3 == 0]
    return torch.from_numpy(np.stack([np.broadcast_to(m, (2, 32, 32)) for m in maps], axis=1).copy())


def photo(n):
    """uint8 [3, 64, 80]: waves, a disc, bands and a texture. No two edges of the grid weigh the same."""
    c, y, x = np.ogrid[:3, :64, :80]
    values = 120 + 30 * np.sin(x / 7 + c + n) * np.cos(y / 9 - c / 2)
    values = values + 80 * ((x - 25 - 20 * n) ** 2 + (y - 30) ** 2 < 500)
    values = values - 70 * ((x + (2 - 3 * n) * y) % 90 < 40)
    values = values + 6 * np.sin(1.3 * x + 2.1 * y + c + 0.01 * x * y)
    return np.clip(np.floor(values), 0, 255).astype(np.uint8)


def formula_tokens():
    """[2, 64]: patch i of image b has the token (5 i^2 + 7 i + 11 b) mod 64."""
    i, b = torch.arange(64), torch.arange(2)[:, None]
    return (5 * i**2 + 7 * i + 11 * b) % 64


# ---------------------------------------------------------------------------------------------------------
# Comparisons


def close(value, expected, kind):
    """Asserts that numbers agree to the tolerance of their kind."""
    value, expected = np.atleast_1d(value).astype(float), np.atleast_1d(expected).astype(float)
    scale = np.sqrt(np.mean(expected**2))
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= GOLDEN["tolerance"][kind] * scale


def close_array(tensor, expected):
    """Asserts that a tensor has the expected shape, entries (some of them), sum and sum of squares."""
    assert list(tensor.shape) == expected["shape"]
    values = tensor.detach().double().flatten().numpy()
    scale = np.sqrt(expected["sum_squares"] / values.size)
    entries = values[expected.get("at", slice(None))]
    tolerance = GOLDEN["tolerance"]["values"]
    assert np.abs(entries - expected["values"]).max() <= tolerance * scale
    assert abs(values.sum() - expected["sum"]) <= tolerance * scale * values.size
    assert abs(np.sum(values**2) - expected["sum_squares"]) <= tolerance * expected["sum_squares"]


def unpack(text, shape):
    """zlib-compressed uint8 as hexadecimal text -> int64 array."""
    return np.frombuffer(zlib.decompress(bytes.fromhex(text)), np.uint8).reshape(shape).astype(int)


def build(case):
    """The module of a case, filled, and what its forward takes besides the images."""
    encoder = mim.ViT(**GOLDEN["encoder"], **case.get("encoder", {}))
    inputs = {k: torch.tensor(v) for k, v in GOLDEN["index"][case["index"]].items()}
    options = dict(case["options"])
    if "tokens" in case:
        options["vocab_size"], inputs["tokens"] = 64, formula_tokens()
    if "regions" in case:
        inputs["region_maps"] = region_maps()
    if case["class"] == "AMT":
        base = {"mae": mim.MAE, "simmim": mim.SimMIM}[options.pop("base", "mae")]
        masking = {k: options.pop(k) for k in ("mask_ratio", "throw_ratio") if k in options}
        module = mim.AMT(base(encoder, **options), **masking)
    else:
        module = getattr(mim, case["class"])(encoder, **options)
    module.train()
    fill(module, GOLDEN["amplitude"])
    return module, inputs


def quantity(name, module, inputs, out):
    """An array of a case, by its name in golden.json."""
    if name == "attention_map":
        return mim.attention_map(module.encoder, images())
    if name == "features":
        return module.encoder.features(images(), "cls")
    if name == "predicted_latents":
        latents = module.encoder(images(), inputs["ids_visible"])[:, 1:]
        return module.regress(latents, inputs["ids_visible"], inputs["ids_masked"])
    return out[name]


# ---------------------------------------------------------------------------------------------------------
# Tests


@pytest.mark.parametrize("name", cases("method"))
def test_a_method_equals_its_authors_code(name):
    case = CASES[name]
    module, inputs = build(case)
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert zlib.crc32("\n".join(sorted(parameters)).encode()) == case["names"]
    out = module(images(), **inputs)
    for part, expected in case["losses"].items():
        close(out[part].item(), expected, "loss")
    for array, expected in case["arrays"].items():
        close_array(quantity(array, module, inputs, out), expected)
    out["loss"].backward()
    for parameter, expected in case["gradients"].items():
        close(parameters[parameter].grad.norm().item(), expected, "gradients")
    optimizer = torch.optim.AdamW(parameters.values(), **GOLDEN["adamw"])
    losses = []
    for _ in case["steps"]:
        optimizer.step()
        loss = module(images(), **inputs)["loss"]
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
    close(losses, case["steps"], "steps")


@pytest.mark.parametrize("name", cases("dvae"))
def test_the_tokenizer_equals_dall_es_encoder(name):
    case = CASES[name]
    tokenizer = mim.DVAE(**case["options"]).eval()
    fill(tokenizer, case["amplitude"])
    normalised = (0.5 + 0.3 * images() - tokenizer.mean) / tokenizer.std
    close_array(tokenizer.logits(normalised), case["logits"])
    assert tokenizer.tokens(normalised).tolist() == case["tokens"]


def test_relative_position_buckets_equal_lomars():
    for side, packed in CASES["lomar_buckets"]["buckets"].items():
        own = mim.relative_buckets((int(side), int(side))).numpy()
        theirs = unpack(packed, own.shape)  # their offset is i - j, ours j - i: 48 - b; 49: class token
        assert np.array_equal(np.where(own == 49, 49, 48 - own), theirs)


@pytest.mark.parametrize("case", CASES["fh"]["maps"], ids=lambda c: f"photo{c['photo']}-scale{c['scale']}")
def test_fh_segments_equal_scikit_images(case):
    labels = datasets.felzenszwalb(photo(case["photo"]), case["scale"], case["sigma"], case["min_size"])
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    by_first_pixel = first.argsort().argsort()[inverse].reshape(labels.shape)
    assert np.array_equal(by_first_pixel, unpack(case["labels"], labels.shape))
    assert len(first) == case["segments"]
