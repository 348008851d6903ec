"""A method of one's own: README's, a subclass with another mask, and one from scratch."""

import json
import re

import pytest
import torch

import mim
import train
from conftest import ROOT


class ColourMIM(torch.nn.Module):
    """Predicts one colour for each hidden patch.

    mask_ratio: share of the patches that is hidden
    """

    inputs, encoder_options, norm_pix = (), {}, False

    def __init__(self, encoder, mask_ratio: float = 0.6):
        super().__init__()
        self.encoder, self.mask_ratio = encoder, mask_ratio
        self.mask_token = mim.learned_token(encoder.embed_dim)
        self.head = torch.nn.Linear(encoder.embed_dim, 3)

    def forward(self, images, ids_visible=None, ids_masked=None):
        p, N = self.encoder.patch_size, self.encoder.num_patches
        if ids_visible is None:
            ids_visible, ids_masked = mim.random_masking(len(images), N, self.mask_ratio, images.device)
        tokens = mim.put(self.encoder.embed(images), ids_masked, self.mask_token)
        latents = mim.take(self.encoder.encode(tokens)[:, 1:], ids_masked)
        pred = self.head(latents).repeat(1, 1, p * p)  # [B, n, p*p*3]: the colour of every pixel
        loss = mim.pixel_loss(pred, mim.take(mim.patchify(images, p), ids_masked))
        return dict(loss=loss, pred=pred, ids_visible=ids_visible, ids_masked=ids_masked)


@pytest.fixture(autouse=True)
def own_tables(monkeypatch):
    monkeypatch.setitem(mim.SIZES, "nano", dict(embed_dim=32, depth=1, num_heads=2))
    monkeypatch.setattr(mim, "METHODS", mim.METHODS | dict(colour=ColourMIM))
    monkeypatch.setattr(train, "RECIPES", train.RECIPES | dict(colour=train.RECIPES["mae"]))


def trained(run, folder, name):
    """run(flags) trains the method of this name for nine epochs at a mask ratio of 0.5 -> method."""
    run(f"--method {name} --limit 64 --batch-size 16 --image-size 32 --patch-size 8 --mask-ratio 0.5 --epochs 9 "
        "--base-lr 1e-2 --output run".split())
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    checkpoint = mim.load_file(folder / "run" / "checkpoint.pt")
    assert checkpoint["args"]["mask_ratio"] == 0.5 and checkpoint["args"]["weight_decay"] == 0.05
    assert (folder / "run" / "reconstruction.png").exists()
    return train.load_method(checkpoint, "checkpoint.pt")


def test_readmes_method_hides_blocks(monkeypatch, tmp_path, capsys):
    [code] = re.findall(r"```python\n([^`]*class BlockMAE[^`]*)```", (ROOT / "README.md").read_text())

    def run(flags):
        monkeypatch.setattr("sys.argv", ["mine.py", *flags])
        with pytest.raises(SystemExit) as end:
            exec(code, {})
        assert not end.value.code

    method = trained(run, tmp_path, "blocks")
    assert type(method).__name__ == "BlockMAE"
    assert train.recipe(dict(method="blocks", data="cifar10"), (224, 224))["epochs"] == 100
    hidden = torch.zeros(64, 16).scatter(1, method(torch.randn(64, 3, 32, 32))["ids_masked"], 1.0)
    assert (hidden.sum(1) == 8).all()
    hidden = hidden.view(64, 4, 4)
    rows, columns = hidden.amax(2).sum(1), hidden.amax(1).sum(1)
    assert (rows * columns == 8).float().mean() > 0.3  # one block of 2 x 4 patches; at random 1 in 2,000
    run(["--method", "blocks", "--help"])
    assert re.search(r"--decoder-depth INT\s+number of", capsys.readouterr().out)


def test_a_method_from_scratch_is_trained_by_train_py(tmp_path, capsys):
    method = trained(train.main, tmp_path, "colour")
    assert type(method) is ColourMIM and method.encoder.num_patches == 16
    out = method(torch.randn(2, 3, 32, 32))
    assert out["ids_masked"].shape == (2, 8)
    colours = out["pred"].unflatten(2, (64, 3))
    assert torch.equal(colours, colours[:, :, :1].expand_as(colours))
    with pytest.raises(SystemExit):
        train.main(["--method", "colour", "--help"])
    assert re.search(r"--mask-ratio FLOAT\s+share of the patches that is hidden", capsys.readouterr().out)
    checkpoint = mim.load_file(tmp_path / "run" / "checkpoint.pt")
    del mim.METHODS["colour"]  # as in another program
    with pytest.raises(ValueError, match="its method is colour, and not one of mae, simmim"):
        train.run_settings(checkpoint)
