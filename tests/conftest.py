import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests everywhere: a GPU's sums are not bit for bit repeatable

import pytest  # noqa: E402
import torch  # noqa: E402
from torchvision.io import write_png  # noqa: E402

torch.set_num_threads(1)  # the tensors are tiny: a second thread costs more than it gives

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding capabilities:DeprecationWarning")


@pytest.fixture(scope="session", autouse=True)
def checkout_stays_as_it_is():
    """Tests write below tmp_path alone: after all of them the checkout has the files it had before,
    unchanged."""

    def state():
        files = (path for path in ROOT.rglob("*") if path.is_file())
        own = (path for path in files if not {".git", "__pycache__", ".pytest_cache", ".venv"} & set(path.parts))
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in own}

    before = state()
    yield
    assert state() == before


@pytest.fixture(autouse=True)
def work_elsewhere(tmp_path, monkeypatch):
    """What a program writes by default, such as runs/ and data/, falls below tmp_path."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """32 built-in scenes of 32x32 pixels as files: train/ and val/ with the folders a and b."""
    from datasets import render_scene

    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 24), ("val", 8)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(torch.from_numpy(render_scene(i, 32)[0]), str(path))
    return root


@pytest.fixture
def cli(capsys):
    """Runs a program's command line in this process: cli(module, *arguments) -> (exit code, stdout,
    stderr)."""

    def call(module, *arguments):
        from train import exit_with_one_line

        code = exit_with_one_line(f"{module.__name__}.py", lambda: module.main([str(a) for a in arguments]))
        out, err = capsys.readouterr()
        return code, out, err

    return call


class MeanTokenizer(torch.nn.Module):
    """A patch's token is its mean colour, each channel in `levels` steps."""

    def __init__(self, levels=2):
        super().__init__()
        self.levels, self.vocab_size = levels, levels**3
        self.register_buffer("centre", torch.zeros(3))
        self.unused = torch.nn.Parameter(torch.zeros(2))

    def tokenize(self, images, grid):
        mean = torch.nn.functional.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2) - self.centre
        step = (torch.sigmoid(1.5 * mean) * self.levels).long().clamp(0, self.levels - 1)
        return step @ torch.tensor([self.levels**2, self.levels, 1], device=images.device)
