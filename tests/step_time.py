"""Time of a training step (forward and backward, one random batch) of each method, and its ratio to MAE's.

    python tests/step_time.py --image-sizes 224 384 448 --methods mae lomar --model base --batch-size 2
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import mim  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--methods", nargs="+", default=list(mim.METHODS), choices=list(mim.METHODS))
parser.add_argument("--image-sizes", nargs="+", type=int, default=[224])
parser.add_argument("--model", default="base", choices=list(mim.SIZES))
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
options = parser.parse_args()
device = torch.device(options.device)


def step(method, images):
    """Seconds of one step, the device's work included; AMT masks by a map given, as in training."""
    ids = {}
    if isinstance(method, mim.AMT):
        ids = dict(zip(("ids_visible", "ids_masked"), method.draw(torch.rand(len(images), *method.unit_grid, device=device))))
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        method(images, **ids)["loss"].backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    method.zero_grad()
    return time.perf_counter() - began


for size in options.image_sizes:
    methods = {}
    for name in options.methods:
        relative = getattr(mim.METHODS[name], "relative_position", False)
        methods[name] = mim.METHODS[name](mim.ViT(size, 16, **mim.SIZES[options.model], relative_position=relative)).to(device)
    images = torch.randn(options.batch_size, 3, size, size, device=device)
    times = {name: [] for name in methods}
    for _ in range(options.repeats + 1):  # in turn, so that what else the machine does falls on all; the first warms up
        for name, method in methods.items():
            times[name].append(step(method, images))
    best = {name: min(t[1:]) for name, t in times.items()}
    for name, seconds in best.items():
        print(f"{size} pixels  {name:8s} {1000 * seconds / options.batch_size:9.1f} ms/image"
              + (f"   {best['mae'] / seconds:5.2f} x MAE's speed" if "mae" in best else ""))
