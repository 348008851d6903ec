"""The benchmarks: what they list, count and run."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark
import datasets
import eval as evaluation
import mim
import train
from datasets import load_data, render_scene
from test_cuda import needs_a_driver


SMALL = dict(decoder_dim=32, decoder_depth=1, decoder_heads=2, regressor_depth=1, region_dim=32,
             region_heads=2)


@pytest.fixture
def small(monkeypatch):
    """A ViT-nano of two blocks, and all else that the variants have at a small size."""
    monkeypatch.setitem(mim.SIZES, "nano", dict(embed_dim=32, depth=2, num_heads=2))
    for name, (method, options) in benchmark.VARIANTS.items():
        monkeypatch.setitem(benchmark.VARIANTS, name, (method, SMALL | options))


def test_speed_lists_what_was_asked(cli, small, monkeypatch):
    assert benchmark.matmul_peak(torch.device("cpu"), torch.float32, seconds=0.05) > 0.1
    monkeypatch.setattr(benchmark, "matmul_peak", lambda *args: 0.1)
    code, out, err = cli(benchmark, "speed", "--methods", "mae", "objmae-1/4", "rmae", "--model", "nano",
                         "--image-size", 32, "--patch-size", 4, "--repeats", 1, "--batch-size", 2)
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["name"] for row in rows] == ["mae", "objmae-1/4", "rmae"]
    mae = mim.MAE(mim.ViT(32, 4, **mim.SIZES["nano"]), decoder_dim=32, decoder_depth=1, decoder_heads=2)
    assert rows[0]["parameters"] == sum(p.numel() for p in mae.parameters() if p.requires_grad)
    assert all(row["images_per_s"] > 0 and row["of_peak"] > 0 and row["rate"] > 0 for row in rows)
    code, _, err = cli(benchmark, "speed", "--methods", "vit", "--reference", "vit", "--image-size", 30)
    assert code == 2 and "--image-size 30: there is no such ViT (image_size must be a multiple" in err
    code, _, err = cli(benchmark, "speed", "--methods", "mae", "--workers", 1)
    assert code == 2 and "--workers is of no use to speed" in err
    assert rows[2]["gmac"] > rows[0]["gmac"] > rows[1]["gmac"]
    assert len(out.splitlines()) == 6


def test_the_speed_of_a_variant_is_over_the_references(monkeypatch, small):
    """MAE takes 2 seconds a step, ObjMAE 0.5: images a second, ratio, and share of a peak of 1 GMAC/s."""
    monkeypatch.setattr(benchmark, "matmul_peak", lambda *args: 1.0)
    monkeypatch.setattr(benchmark, "make_step", lambda variant, *_: lambda function=None: 0.5 + 1.5 * (
        type(variant) is mim.MAE))
    row, = benchmark.speed(["objmae-1/4"], model="nano", image_size=32, patch_size=4, batch_size=8, repeats=1,
                           device=torch.device("cpu"))["rows"]
    assert row["images_per_s"] == 16 and row["ratio"] == 4
    mae, own = (benchmark.build_variant(name, 32, 4, "nano") for name in ("mae", "objmae-1/4"))
    whole = [benchmark.count_gmac(m, benchmark.synthetic_batch(m, 1))[1] for m in (mae, own)]
    assert row["rate"] == pytest.approx(4 * whole[1] / whole[0], abs=1e-3)
    assert row["of_peak"] == pytest.approx(16 * whole[1], abs=1e-3)


@pytest.mark.parametrize("name", [
    "mae", "simmim", "amt", "lomar", "objmae-1/4", "rmae", "rmae-batch", "cae-token"])
def test_every_method_compiles_to_one_graph_once(name, small):
    if torch.__version__.startswith("2.6") and name in ("amt", "cae-token"):
        pytest.skip("torch 2.6 cannot trace Module.to and exponential_, and breaks the graph there")
    model = benchmark.build_variant(name, 64, 8, "nano").train()
    step = benchmark.make_step(model, benchmark.synthetic_batch(model, 2), torch.device("cpu"), "fp32")
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    call = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        step(call)
    assert counter.frame_count == 1


def test_reading_images_is_timed_against_pillow(cli, tmp_path):
    for i in range(6):
        image = render_scene(i, 64)[0].transpose(1, 2, 0)
        Image.fromarray(image).save(tmp_path / f"{i}.jpg")
    code, out, err = cli(benchmark, "data", "--data", tmp_path, "--image-size", 32, "--repeats", 1,
                         "--limit", 4)
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["ratio"] == pytest.approx(result["ours"] / result["usual"], rel=0.01), err
    assert "6 images, 0 classes, 4 of them" in out


@pytest.fixture
def in_process(monkeypatch):
    """The commands of `compare` run in this process, with a ViT-nano of one block; the list of them."""
    monkeypatch.setitem(mim.SIZES, "nano", dict(embed_dim=128, depth=1, num_heads=4))
    commands = []

    def run(words, stdout, stderr, **options):
        commands.append(words[1:])
        name = Path(words[1]).name
        program = {"train.py": train, "eval.py": evaluation}[name]
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            return SimpleNamespace(returncode=train.exit_with_one_line(name, lambda: program.main(words[2:])))

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    return commands


def test_compare_gives_every_method_equal_epochs(cli, folder, tmp_path, in_process):
    flags = ["--data", folder, "--model", "nano", "--limit", 20, "--epochs", 2, "--finetune-epochs", 1,
             "--probe-epochs", 1, "--output", tmp_path / "table", "--methods", "cae-token", "objmae"]
    code, out, err = cli(benchmark, "compare", *flags)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    rows = {(r["name"], r["epochs"]): r for r in result["rows"]}
    gmac = result["gmac"]
    assert [name for name, _ in rows] == ["random", "supervised", "cae-token", "objmae"]
    assert gmac["cae-token"] > gmac["mae"] > gmac["objmae"]
    for (name, epochs), row in rows.items():
        four = {"k-NN", "linear", "attentive", "fine-tuned"}
        assert row.keys() - {"name", "epochs", "seconds", "loss"} == ({"fine-tuned"} if name == "supervised" else four)
        assert row["seconds"] >= 0
        if name not in ("random", "supervised"):
            assert epochs == 2
            log = (tmp_path / "table" / f"{name}-{epochs}" / "log.jsonl").read_text()
            assert len(log.splitlines()) == epochs
    # `supervised` has MAE's compute, pre-training and one epoch of fine-tuning, in epochs on all patches.
    (_, supervised), = [key for key in rows if key[0] == "supervised"]
    plain = benchmark.plain_gmac(mim.ViT(32, 4, **mim.SIZES["nano"]))
    assert supervised == 1 + round(2 * gmac["mae"] * 24 / (plain * 20)) > 1
    scratch = (tmp_path / "table" / f"supervised-{supervised}" / "finetune.txt").read_text().split("\n")[0]
    assert scratch.endswith("--layer-decay 1 --base-lr 0.001") and f"--epochs {supervised} " in scratch
    table = [line for line in out.splitlines() if line.startswith("|")]
    compute = {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in table)}
    assert compute["objmae"] == f"{gmac['objmae'] / gmac['mae']:.2f}" and not compute["random"]
    assert len(table) == 2 + 2 + 2 and {line.count("|") for line in table} == {8}
    trained = [c for c in in_process if "train.py" in c[0]]
    assert any("--tokenizer" in c for c in trained) and all("fh" in c for c in trained if "objmae" in c)
    first, count = (tmp_path / "table" / "objmae-2" / "knn.txt").read_text().split("\n")[0], len(in_process)
    assert first.startswith("python eval.py ") and "--task knn --pool mean" in first
    code, again, _ = cli(benchmark, "compare", *flags)
    assert code == 0 and len(in_process) == count
    assert json.loads(again.splitlines()[-1])["rows"] == result["rows"]
    (tmp_path / "table" / "objmae-2" / "linear.txt").write_text(first)  # as after an interrupt
    assert cli(benchmark, "compare", *flags)[0] == 0 and len(in_process) == count + 1


def test_options_of_a_row_are_not_those_of_others(tmp_path, monkeypatch):
    rows = {}

    def compare_row(name, *_, **common):
        rows[name] = common["patch_size"]
        return dict(name=name, seconds=0)

    monkeypatch.setattr(benchmark, "compare_row", compare_row)
    result = benchmark.compare(methods=["mae", "mae:patch_size=16"], device=torch.device("cpu"), epochs=1, limit=16,
                               measures=["knn"], output=tmp_path)
    assert rows == {"random": 8, "mae": 8, "mae:patch_size=16": 8}  # the row's own flag comes after
    assert result["gmac"]["mae"] > result["gmac"]["mae:patch_size=16"]


def test_a_row_may_have_options(cli, folder, tmp_path, in_process):
    """Each is a run of its own, evaluated as all others."""
    command = benchmark.train_command("objmae:alignment=random,norm_pix=true", 3, tmp_path, data="shapes")
    assert command == ["train.py", "--method", "objmae", "--epochs", "3", "--data", "shapes",
                       "--alignment", "random", "--norm-pix"]
    with pytest.raises(datasets.UsageError, match="all rows have the same --epochs"):
        benchmark.train_command("mae:epochs=1", 3, tmp_path, data="shapes")
    command = benchmark.train_command("mae:seed=1", 3, tmp_path, data="shapes", seed=0)
    assert train.parse(command[1:])["seed"] == 1
    assert benchmark.train_command("mae:norm_pix=false", 3, tmp_path)[-1] == "--no-norm-pix"
    row = "amt:throw=random,mask_ratio=0.5"
    code, out, err = cli(benchmark, "compare", "--data", folder, "--model", "nano", "--limit", 20, "--epochs", 1,
                         "--finetune-epochs", 1, "--probe-epochs", 1, "--output", tmp_path / "table",
                         "--methods", row)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert [r["name"] for r in result["rows"]] == ["random", "supervised", row] and row in result["gmac"]
    run = tmp_path / "table" / "amt_throw=random,mask_ratio=0.5-1"
    args = mim.load_file(run / "checkpoint.pt")["args"]
    assert args["throw"] == "random" and args["mask_ratio"] == 0.5
    assert all("--method mae" in " ".join(words) for words in in_process if words[0].endswith("eval.py"))


def test_compare_measures_what_is_asked_for_and_names_a_papers_table(tmp_path, in_process, monkeypatch):
    monkeypatch.setitem(benchmark.ABLATIONS, "some", "rae:num_regions=2 lomar")
    result = benchmark.compare(device=torch.device("cpu"), ablation="some", measures=["attention"], epochs=1,
                               limit=16, output=tmp_path)
    assert [row["name"] for row in result["rows"]] == ["random", "rae:num_regions=2", "lomar"]
    assert all(0 < row["object"] < 100 and 0 < row["area"] < 100 for row in result["rows"])
    lines = (tmp_path / "lomar-1" / "attention.txt").read_text().splitlines()
    assert json.loads(lines[-1])["query"] == 0  # the class token's, as that of the others


def test_every_measure_is_a_command_of_eval(tmp_path):
    common = dict(data="shapes", seed=0, limit=16, workers=0)
    for name, untrained in (("random", True), ("mae-1", False), ("rmae-1", False)):
        commands = benchmark.eval_commands(tmp_path / name, benchmark.MEASURES, 1, 2, untrained, **common)
        assert list(commands) == [m for m in benchmark.MEASURES if m != "segment" or name == "rmae-1"]
        for measure, words in commands.items():
            given = evaluation.parse(words[1:])
            assert given["seed"] == 0 and given["task"] == measure.removesuffix("-linear")
            assert ("limit" in given) == (measure not in ("attention", "segment"))  # of the training images
            assert given.get("method", "mae") == "mae" and given.get("pool", "mean") == "mean"


def test_costs_count_what_the_papers_vary(monkeypatch):
    monkeypatch.setattr(benchmark, "COSTS", {"some": "mae amt:throw_ratio=0 objmae:alpha=0.05 lomar"})
    mae, nothing_thrown, little, lomar = benchmark.costs("nano")["rows"]
    assert mae["gmac"] == nothing_thrown["gmac"] and mae["ratio"] == 1.0
    assert little["ratio"] < lomar["ratio"] < 0.1  # MAE's decoder is far larger than a ViT-nano
    monkeypatch.setattr(benchmark, "COSTS", {"some": "objmae:alpha=0.05 lomar:window_size=8"})
    row, = benchmark.costs("nano", 112)["rows"]  # of 7 x 7 patches there is no window of 8 x 8
    assert row["gmac"] < little["gmac"] / 3


def test_compute_takes_the_tokenizers_own_vocabulary():
    """512 tokens of small images, 8,192 of large ones."""
    for size, count in ((64, 512), (224, 8192)):
        command = dict(epochs=2, output=Path("none"), data="/imagenet", model="nano")
        method, _ = benchmark.build_compared("beit", benchmark.Imagined(size), **command)
        assert method.vocab_size == count


def test_the_papers_ablations_can_be_run(tmp_path):
    """Every row is a command that train.py takes, and builds."""
    built = {}
    for part in ("annotations", "train2017/1.jpg"):  # what COCO's layout is recognised by
        (tmp_path / part).mkdir(parents=True)
    for name, rows in benchmark.ABLATIONS.items():
        source = benchmark.Imagined(64 if name.endswith("small") else 224)
        for row in rows.split():
            words = benchmark.train_command(row, 200, tmp_path / "out", data=tmp_path)[1:]
            args = train.settle(train.parse(words + ["--model", "nano"]), source)
            with torch.device("meta"):
                vocabulary = dict(vocab_size=8192 if args.get("tokenizer") else None)
                built[row if source.image_size > 64 else f"{row} small"] = train.build_method(**args | vocabulary)
    assert len(built) > 40
    assert built["amt:throw_ratio=0"].mask_ratio == 0.75 and built["amt:throw_ratio=0"].num_thrown == 0  # Table 4
    windows = [built[f"lomar:window_size={side}"].num_windows for side in (5, 7, 9, 11, 14)]
    assert windows == [8, 4, 3, 2, 1]
    assert [built[f"lomar:window_size={side} small"].num_windows for side in (3, 5, 8)] == [8, 3, 1]
    mae = built["objmae:object_floor=1,alpha=0.25"]
    assert mae.object_floor == 1 and mae.count == 49
    first = built["cae-token:decoder_depth=0,alignment_weight=0"]
    assert len(first.decoder_blocks) == 0 and first.alignment_weight == 0


def test_an_interrupted_measure_goes_on(tmp_path, monkeypatch):
    """semseg.pt is there before its first epoch ends."""
    command = benchmark.eval_commands(tmp_path / "random", ["semseg-linear"], 1, 1, True, data="shapes")
    log = tmp_path / "random" / "semseg-linear.txt"
    log.parent.mkdir()
    log.write_text("python " + " ".join(command["semseg-linear"]) + "\n")
    log.with_suffix(".pt").touch()

    def run(words, stdout, stderr, **options):
        print("{}", file=stdout)
        return SimpleNamespace(returncode="--resume" not in words)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    assert benchmark.carry_out(command["semseg-linear"], log) == "{}"


def test_compare_counts_what_training_costs():
    source, command = load_data("shapes"), dict(epochs=8, output=Path("none"), data="shapes", seed=0)
    methods = {name: benchmark.build_compared(name, source, **command)[0]
               for name in ("mae", "amt", "amt:throw=random", "simmim", "objmae")}
    gmac = {name: benchmark.training_gmac(method, 8) for name, method in methods.items()}
    dim, n, dec = 128, 64, 64
    block = lambda tokens, d: 12 * tokens * d * d + 2 * tokens * tokens * d  # noqa: E731
    patches, pixels = n * dim * 192, 192  # 64 patches of 8x8 RGB
    encoder = patches + 6 * block(17, dim)
    decoder = 17 * dim * dec + 2 * block(65, dec) + 48 * dec * pixels
    # Images need no gradient.
    assert gmac["mae"] == pytest.approx((3 * (encoder + decoder) - patches) / 1e9, rel=0.01)
    visible = n - int(n * 0.45 + 1e-6) - int(n * 0.40 + 1e-6)
    amt = 3 * (patches + 6 * block(1 + visible, dim) + (1 + visible) * dim * dec
               + 2 * block(n - int(n * 0.40) + 1, dec) + 28 * dec * pixels) - patches
    # A map before epoch 5 of 8, until then MAE's own masks. Of the last block it takes queries, keys, values.
    maps = 1 / 8 * (patches + 5 * block(65, dim) + 3 * 65 * dim * dim + 65 * dim)
    assert gmac["amt"] == pytest.approx((amt / 2 + maps) / 1e9 + gmac["mae"] / 2, rel=0.01)
    assert gmac["amt:throw=random"] == pytest.approx(gmac["amt"] - maps / 1e9, rel=0.01)
    assert gmac["simmim"] > 2 * gmac["mae"] > 2 * gmac["objmae"]


def test_compare_stops_at_the_first_failure_and_keeps_what_is_there(cli, folder, tmp_path, in_process):
    flags = ["compare", "--data", folder, "--model", "nano", "--methods", "mae", "--epochs", 1, "--limit", 20,
             "--finetune-epochs", 1, "--probe-epochs", 1]
    code, _, err = cli(benchmark, "compare", "--data", folder / "val" / "a", "--methods", "cae-token")
    assert code == 2 and not in_process and "compare needs labels" in err
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "attentive.png").mkdir()  # where a picture is to be written
    code, _, err = cli(benchmark, *flags, "--output", tmp_path)
    last = err.strip().splitlines()[-1]
    assert code == 2 and "python eval.py random --task attentive" in last and "it is a folder" in last
    assert len(in_process) == 3 and "it is a folder" in (tmp_path / "random" / "attentive.err").read_text()
    (tmp_path / "random" / "attentive.png").rmdir()
    assert cli(benchmark, *flags, "--output", tmp_path)[0] == 0
    count = len(in_process)
    code, _, err = cli(benchmark, *flags, "--limit", 22, "--output", tmp_path)
    assert code == 2 and "random holds a run of another command, python eval.py" in err
    assert "--limit 20" in err
    log = tmp_path / "mae-1" / "finetune.txt"
    log.write_text(log.read_text().split("\n")[0] + "\n")
    assert cli(benchmark, *flags, "--output", tmp_path)[0] == 0
    assert "finetune" in in_process[-1] and in_process[-1][-1] == "--resume"  # killed there, it goes on there
    assert not any("train.py" in c[0] for c in in_process[count:])


@pytest.fixture
def short_check(monkeypatch):
    """`cuda` for two methods of small size, without compiling, and with one task."""
    small = "--image-size 32 --patch-size 8 --decoder-dim 16 --decoder-depth 1"
    monkeypatch.setattr(benchmark, "CHECKED", {
        "dvae": "--method dvae --image-size 32 --hidden-dim 8", "amt": f"--method amt {small}"})
    monkeypatch.setattr(benchmark, "BOUNDS", dict(fp32=1e-6, bf16=0.05))
    monkeypatch.setattr(benchmark, "TASKS", dict(knn="amt"))


def test_cuda_goes_through_its_checks_on_the_cpu(cli, short_check):
    code, out, err = cli(benchmark, "cuda", "--device", "cpu")
    *lines, last = out.splitlines()
    rows = {row["what"]: row for row in json.loads(last)["rows"]}
    assert list(rows) == ["device loader", "dvae on the CPU", "dvae fp32", "dvae bf16", "amt on the CPU",
                          "amt fp32", "amt bf16", "eval knn"]
    assert code == 0 and {row["result"] for row in rows.values()} == {"ok"}, out
    losses = [(rows[f"{name} fp32"]["loss"], rows[f"{name} bf16"]["loss"]) for name in ("dvae", "amt")]
    assert [a for a, _ in losses] == [rows[f"{name} fp32"]["cpu"] for name in ("dvae", "amt")]
    assert any(a != b for a, b in losses)
    assert lines[-1] == "8 checks, 0 failed" and len(lines) == 1 + len(rows) + 1


def test_cuda_checks_every_task(tmp_path, monkeypatch):
    small, device = "--image-size 32 --patch-size 8 --decoder-dim 16 --decoder-depth 1", torch.device("cpu")
    monkeypatch.setattr(benchmark, "CHECKED", {
        "mae": f"--method mae {small}", "rmae": f"--method rmae {small} --region-dim 16 --region-heads 2"})
    for name in benchmark.CHECKED:
        benchmark.short_run(name, tmp_path / name, device, "fp32", None, 0)
    for task, name in benchmark.TASKS.items():
        assert benchmark.short_task(task, tmp_path / name, device, "fp32", 0), task


def test_cuda_goes_on_after_a_failure_and_ends_with_1(cli, short_check, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "short_run", lambda name, output, device, precision, *rest: [
        2.0, {"fp32": 1.0, "bf16": 1.06}[precision]])
    with pytest.raises(SystemExit) as end:
        cli(benchmark, "cuda", "--device", "cpu")
    out = capsys.readouterr().out
    assert end.value.code == 1
    assert "failed: losses [2.0, 1.06], on the CPU [2.0, 1.0]" in out
    assert "checkpoint.pt: it cannot be used" in out  # there is none to evaluate
    assert json.loads(out.splitlines()[-1])["failed"] == ["dvae bf16", "amt bf16", "eval knn"]


@pytest.mark.skipif(needs_a_driver(), reason="this torch needs a driver for fake CUDA tensors")
def test_masks_for_cuda_are_drawn_on_the_cpu():
    drawn_on = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.Tag.nondeterministic_seeded in function.tags:
                drawn_on.append(out.device.type)
            return out

    with FakeTensorMode(), Spy(), benchmark.DrawnOnCPU():
        zeros = torch.zeros(5, device="cuda")
        drawn = [torch.rand(3, 4, device="cuda"), zeros.exponential_(), zeros.bernoulli_(0.5),
                 torch.multinomial(torch.ones(2, 7, device="cuda"), 3)]
    assert {value.device.type for value in drawn} == {"cuda"} and drawn_on == 4 * ["cpu"]


def test_one_image_under_the_mask_of_every_method(cli, folder, tmp_path):
    """14 x 14 patches of 4 pixels: what is hidden is grey, what is left out neither grey nor the image."""
    regions = torch.zeros(1, 1, 56, 56, dtype=torch.uint8)
    regions[..., 14:42, 14:42] = 3
    image = torch.full((1, 3, 56, 56), 3.0)  # drawn as white
    tiles = benchmark.mask_tiles(image, regions, 4)
    assert len(tiles) == 10 and all(tile.shape == (1, 3, 56, 56) for tile in tiles.values())

    def patches(title):
        tile, = (tile for name, tile in tiles.items() if name.startswith(title))
        return mim.patchify(tile, 4)[0]

    def hidden(title):
        return int((patches(title) == 0.5).all(1).sum())

    seen = {title: int((patches(title) == 1).all(1).sum()) for title in tiles if "attention" not in title}
    assert hidden("MAE") == 147 and seen["MAE: random patches"] == 49  # 75% of 196
    assert hidden("SimMIM") == 120 and hidden("CAE") == 98
    assert hidden("AMT: attended") == 88 and seen["AMT: attended patches hidden, others thrown"] == 30  # 45, 40%
    assert hidden("LoMaR: a window") == 39  # 80% of 49
    assert 24 <= hidden("ObjMAE") <= 32  # half of the 49 to 64 patches of the object
    attention = patches("AMT: the attention").view(14, 14, -1)
    assert (attention[5:9, 5:9, 2] < 0.5).all() and (attention[:2, :, 2] == 1).all()  # in the middle, orange
    frames = (patches("LoMaR: windows")[:, :3] != 1).any(1)
    assert 0 < frames.sum() < 4 * 4 * 7
    for flags in (["--scene", 3], ["--images", folder / "val" / "a" / "0.png"]):
        flags = ["masks", "--image-size", 56, "--output", tmp_path / "masks.png", *flags]
        code, out, err = cli(benchmark, *flags)
        assert code == 0, err
    assert Image.open(tmp_path / "masks.png").width == 4 + 5 * 172
    code, _, err = cli(benchmark, "masks", "--output", folder / "val" / "a" / "0.png")
    assert code == 2 and "it is no picture of benchmark.py" in err


def test_lomars_encoder_looks_from_the_middle(cli, tmp_path, monkeypatch):
    """No loss reaches its class token."""
    queries, shares = [], evaluation.attention_shares
    monkeypatch.setattr(evaluation, "attention_shares", lambda *args: queries.append(args[2]) or shares(*args))
    for relative in (True, False):
        encoder = mim.ViT(64, 8, 16, 1, 2, relative_position=relative)
        state = encoder.state_dict()
        state._metadata[""] |= dict(image_size=[64, 64])  # as a run says it
        torch.save(state, tmp_path / "encoder.pt")
        code, _, err = cli(benchmark, "attention", "--checkpoints", tmp_path / "encoder.pt", "--limit", 2,
                           "--count", 1, "--output", tmp_path / "a.png")
        assert code == 0, err
    assert queries == [1 + 4 * 8 + 4, 0]


def test_encoders_look_side_by_side(cli, tmp_path):
    encoder = mim.ViT(64, 8, 16, 1, 2)
    (tmp_path / "run").mkdir()
    torch.save(encoder.state_dict(), tmp_path / "run" / "encoder.pt")
    flags = ["--checkpoints", tmp_path / "run" / "encoder.pt", "random", "--limit", 5, "--count", 2]
    code, out, err = cli(benchmark, "attention", *flags, "--output", tmp_path / "a.png")
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["checkpoint"] for row in rows] == [str(tmp_path / "run" / "encoder.pt"), "random"]
    assert rows[0]["area_main"] == rows[1]["area_main"] < rows[0]["area_objects"] < 100
    assert rows[0]["attention_main"] != rows[1]["attention_main"]
    assert Image.open(tmp_path / "a.png").width == 4 + 2 * 3 * 132  # image and two encoders, two images


@pytest.mark.parametrize("arguments, words", [
    (["cuda"], "no GPU that torch can use; --device cpu goes through the same steps on the CPU"),
    (["speed", "--methods", "mea"], "--methods invalid choice: 'mea' (choose from"),
    (["speed", "some.pt"], "unknown argument some.pt"),
    (["compare", "--methods", "rma"], "--methods rma: there is no row rma (choose from mae, "),
    (["compare", "--methods", "amt:throw"], "--methods amt:throw: an option is NAME=VALUE, got 'throw'"),
    (["compare", "--methods", "amt:trow=low"], "unknown argument --trow: see --help; did you mean --throw?"),
    (["compare", "--methods", "mae:throw=low"], "--throw belongs to --method amt"),
    (["compare", "--methods", "amt:throw=high"], "--throw invalid choice: 'high'"),
    (["compare", "--methods", "amt:throw_ratio=2"], "throw_ratio must be in 0..1, got 2.0"),
    (["compare", "--relative-position"], "unknown argument --relative-position"),
    (["data", "--image-size", "0", "--data", "{data}"],
     "--image-size must be a positive whole number, got '0'"),
    (["data", "--model", "nano", "--data", "{data}"], "unknown argument --model"),
    (["data"], "--data shapes is none: give a folder"),
    (["sped"], "argument benchmark: invalid choice: 'sped' (choose from"),
])
def test_a_users_mistake_is_one_line(cli, folder, arguments, words):
    code, _, err = cli(benchmark, *[a.format(data=folder) for a in arguments])
    last = err.strip().splitlines()[-1]
    assert code == 2 and words in last and last.startswith("benchmark.py: error: ") and "Traceback" not in err


@pytest.fixture(scope="module")
def published():
    """{(task, recipe, setting): (value, place)} of the table of recipes, each a line that is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        rows = benchmark.recipes()["rows"]
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["finetune", "cae-base", "base_lr", "0.008", "CAE:", "Appendix", "A"] in lines
    found = {(row["task"], row["recipe"], row["setting"]): (row["value"], row["place"]) for row in rows}
    assert len(found) == len(rows) == len(lines)
    return found


def test_every_setting_of_a_recipe_is_listed_with_its_place(published):
    recipes = {f"pretrain {name}": settings for name, settings in train.RECIPES.items()}
    for recipe, settings in (recipes | evaluation.PAPER_RECIPES).items():
        for name, value in settings.items():
            assert published[(*recipe.split(), name)][0] == value, (recipe, name)
    for name, cls in mim.METHODS.items():
        recipe = dict(amt="amt-mae").get(name, name)
        for argument, (parameter, _) in train.flags_of([cls]).items():
            if argument != "region_mask_ratio":  # which has no value of its own
                assert parameter.default in (None, published["pretrain", recipe, argument][0])
    assert [key for key, (_, place) in published.items() if not place] == []


def test_a_setting_of_its_own_has_a_place_of_its_own(published):
    """What differs from the recipe that it is made from, such as MAE's, is not said to stand there."""
    for recipe, settings in train.RECIPES.items():
        parent = benchmark.PARENTS.get(f"pretrain {recipe}", "pretrain mae").split()[1]
        for name, value in settings.items():
            if value != train.RECIPES[parent].get(name):
                own = " ".join(benchmark.PLACES[f"pretrain {recipe}"].values()).split()
                assert name in own, (recipe, name)
    for recipe, settings in evaluation.PAPER_RECIPES.items():
        assert sorted(" ".join(benchmark.PLACES[recipe].values()).split()) == sorted(settings)


def test_places_are_of_settings_that_there_are(published):
    for recipe, places in benchmark.PLACES.items():
        names = " ".join(places.values()).split()
        assert len(names) == len(set(names)), recipe
        assert all((*recipe.split(), name) in published for name in names), recipe


@pytest.mark.parametrize("key, value, place", [
    ("pretrain mae base_lr", 1.5e-4, "MAE: Table 8"),
    ("pretrain amt-mae mask_ratio", 0.45, "AMT: §4.1"), ("pretrain amt-mae throw_ratio", 0.4, "AMT: §4.1"),
    ("pretrain amt-simmim mask_ratio", 0.44, "AMT: §4.1"), ("pretrain amt-simmim epochs", 200, "AMT: §4.1"),
    ("pretrain amt-mae weight_decay", 0.05, "MAE: Table 8"), ("pretrain amt-mae interval", 40, "AMT: §4.1"),
    ("pretrain amt-simmim interval", 40, "AMT: §4.1"),
    ("pretrain simmim clip_grad", 5.0, "SimMIM: the released configuration of ViT-B"),
    ("pretrain lomar warmup_epochs", 40, "LoMaR: §6.1"), ("pretrain lomar num_windows", 4, "LoMaR: Table 4"),
    ("pretrain objmae batch_size", 128, "ObjMAE: Table 3"),
    ("pretrain objmae min_lr", 1e-5, "ObjMAE: Table 2"),
    ("pretrain rmae base_lr", 1e-4, "R-MAE: §4.1"), ("pretrain rae num_regions", 8, "R-MAE: §4.1"),
    ("pretrain cae warmup_epochs", {300: 10, 800: 20, 1600: 40}, "CAE: Appendix A"),
    ("pretrain cae alignment_weight", 2.0, "CAE: Appendix A"), ("pretrain cae norm_pix", True, "ours"),
    ("linear mae batch_size", 16384, "MAE: Table 10"), ("attentive mae epochs", 90, "CAE: Appendix A"),
    ("finetune mae usual_warmup", 5, "MAE: Table 9"),
    ("finetune mae base_lr", 5e-4, "MAE: the authors' code"),
    ("finetune amt-simmim pool", "cls", "AMT: §4.1"), ("finetune cae epochs", 200, "CAE: Appendix A"),
    ("semseg mae warmup_steps", 1500, "BEiT: the authors' code"), ("semseg rmae epochs", 100, "R-MAE: §4.2"),
    ("detect mae warmup_steps", 250, "R-MAE: §4.1"), ("detect lomar epochs", 25, "LoMaR: §6.2"),
    ("segment mae image_visible", 1.0, "R-MAE: Figure 6")])
def test_published_numbers_and_where_they_stand(published, key, value, place):
    assert published[tuple(key.split())] == (value, place)
