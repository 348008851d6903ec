"""README's code does what README says of it."""

import json
import re

import pytest
import torch

import mim
import train
from conftest import ROOT


def code_with(words):
    """README's one block of Python that has these words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [block] = [block for block in blocks if words in block]
    return block


@pytest.fixture
def mine(monkeypatch):
    """mine(*arguments) runs README's example of a method of one's own, and returns its class."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["mine.py", "--method", "colour", *map(str, arguments)])
        names = {}
        exec(code_with("class ColourMIM"), names)
        return names["ColourMIM"]

    monkeypatch.setitem(mim.SIZES, "nano", dict(embed_dim=32, depth=1, num_heads=2))
    monkeypatch.setattr(mim, "METHODS", dict(mim.METHODS))
    monkeypatch.setattr(train, "RECIPES", dict(train.RECIPES))
    return run


def test_a_method_of_ones_own_is_trained_by_train_py(mine, tmp_path):
    flags = ["--limit", 64, "--batch-size", 16, "--image-size", 32, "--patch-size", 8, "--mask-ratio", 0.5]
    cls = mine(*flags, "--epochs", 6, "--output", "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    checkpoint = mim.load_file(tmp_path / "run" / "checkpoint.pt")
    assert checkpoint["args"]["mask_ratio"] == 0.5 and checkpoint["args"]["weight_decay"] == 0.05
    method = train.load_method(checkpoint, "checkpoint.pt")
    assert type(method).__name__ == cls.__name__ and method.encoder.num_patches == 16
    out = method(torch.randn(2, 3, 32, 32))
    assert out["ids_masked"].shape == (2, 8) and (tmp_path / "run" / "reconstruction.png").exists()
    colours = out["pred"].unflatten(2, (64, 3))
    assert torch.equal(colours, colours[:, :, :1].expand_as(colours))
    del mim.METHODS["colour"]  # as in another program
    with pytest.raises(ValueError, match="its method is colour, and not one of mae, simmim"):
        train.run_settings(checkpoint)


def test_a_method_of_ones_own_has_its_flags(mine, capsys):
    with pytest.raises(SystemExit):
        mine("--help")
    assert re.search(r"--mask-ratio FLOAT\s+share of the patches that is hidden", capsys.readouterr().out)
