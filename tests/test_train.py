"""The training program: learning, exact resume, several processes, and what it says to a user's mistakes.
What settings set, and what reaches a method, is in test_wiring.py."""

import argparse
import inspect
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
from torchvision.io import read_image, write_png

import datasets
import mim
import train
from conftest import ROOT, assert_same_run, equal, interrupted_after, load, log

ENCODER = ["--model", "nano", "--image-size", 32, "--patch-size", 4, "--batch-size", 8, "--epochs", 2]
TINY = [*ENCODER, "--decoder-dim", 16, "--decoder-depth", 1, "--decoder-heads", 2]


@pytest.fixture(autouse=True)
def smaller_nano(monkeypatch):
    """The smallest size is smaller yet, for speed: these runs are of one program, not of a large model."""
    monkeypatch.setitem(mim.SIZES, "nano", dict(embed_dim=32, depth=2, num_heads=2))


@pytest.fixture
def call(cli, folder, tmp_path):
    """call(method, *flags, out=name) trains on the folder of 24 scenes, for 2 epochs of 3 steps ->
    (exit code, stdout, stderr, output folder)."""

    def run(method, *flags, out="run", data=folder, tiny=None):
        if tiny is None:
            decoder = method in ("mae", "amt", "objmae", "rmae") and "simmim" not in flags
            tiny = [] if method == "dvae" else TINY if decoder else ENCODER
        result = cli(train, "--method", method, "--data", data, "--output", tmp_path / out, *tiny, *flags)
        return *result, tmp_path / out

    return run


def tiles_in(path):
    """(rows, columns) of a picture's tiles of 128 pixels; the words above are lower than a tile."""
    _, height, width = read_image(str(path)).shape
    assert width % 132 == 4
    return (height - 4) // 132, width // 132


def weights(output):
    return load(output / "checkpoint.pt")["model"]


# Settings


def test_a_run_says_what_made_its_encoder(call):
    """In encoder.pt's metadata."""
    for method, flags, kept in (("cae", [], dict(method="cae")), ("amt", ["--base", "simmim"], dict(
            method="amt", base="simmim"))):
        code, out, err, output = call(method, *flags, "--epochs", 1, out=method)
        assert code == 0, err
        state = load(output / "encoder.pt")
        assert kept.items() <= state._metadata[""].items() and state._metadata[""]["image_size"] == [32, 32]
        vit = mim.ViT(32, 4, **mim.SIZES["nano"], layer_scale=0.1)
        assert not any(vit.load_state_dict(state, strict=True))


def test_a_run_says_what_new_maps_decide(call):
    for number, (flags, expected) in enumerate((
            ([], ["masked and thrown"]), (["--throw-ratio", 0], ["masked"]), (["--throw", "random"], []))):
        code, out, err, _ = call("amt", "--epochs", 2, "--interval", 1, *flags, out=f"amt-{number}")
        assert code == 0, err
        assert re.findall("epoch 2: new attention maps decide which patches are (.*), so", out) == expected
        assert "there are no attention maps" not in out
    code, out, err, _ = call("amt", "--epochs", 1, out="amt-short")
    assert code == 0 and "in 1 epoch there are no attention maps, and all masks are the base's own" in out, err


def test_cae_says_what_its_pixels_are(call):
    for flag, end in (("--norm-pix", ", and normalising them is ours"), ("--no-norm-pix", "")):
        code, out, err, _ = call("cae", "--epochs", 1, flag, out=f"cae{flag}")
        assert code == 0, err
        assert f"without --tokenizer CAE predicts pixels: Table 9's variant{end}\n" in out


def test_learning_rate_by_hand():
    steps = (0, 5, 10, 35, 60, 110)
    rates = [train.learning_rate(step, steps=110, warmup_steps=10, peak=2.0, minimum=0.5) for step in steps]
    assert rates == pytest.approx([0, 1, 2, 0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2, 1.25, 0.5])


@pytest.mark.parametrize("method", [
    mim.MAE(mim.ViT(32, 8, 32, 1, 2), decoder_dim=16, decoder_depth=1, decoder_heads=2),
    mim.LoMaR(mim.ViT(32, 8, 32, 1, 2, relative_position=True), window_size=3),
    mim.CAE(mim.ViT(32, 8, 32, 1, 2, layer_scale=0.1)),
], ids=["mae", "lomar", "cae"])
def test_weight_decay_spares_what_has_one_dimension(method):
    """As the authors' code of all three: biases, norms and layer scale; not tokens, nor LoMaR's table."""
    decayed, spared = train.parameter_groups(method, 0.05)
    names = {id(p): n for n, p in method.named_parameters()}
    ends = {names[id(p)].split(".")[-1] for p in decayed["params"]}
    table = {"relative_table"} if isinstance(method, mim.LoMaR) else set()
    assert ends == {"weight", "cls_token", "mask_token"} | table
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
    assert {names[id(p)].split(".")[-1] for p in spared["params"]} <= {"bias", "weight", "gamma"}
    assert all("norm" in names[id(p)] or not names[id(p)].endswith("weight") for p in spared["params"])
    assert not any(names[id(p)].endswith("pos_embed") for p in decayed["params"] + spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == sum(p.requires_grad for p in method.parameters())


@pytest.mark.parametrize("method", mim.METHODS)
def test_every_constructor_argument_is_a_flag_and_every_flag_has_a_meaning(method, capsys):
    with pytest.raises(SystemExit):
        train.main(["--method", method, "--help"])
    text = capsys.readouterr().out
    flags = dict(re.findall(r"^  --(?:no-)?([\w-]+)(.*(?:\n {4,}.*)*)", text, re.MULTILINE))
    arguments = set(inspect.signature(mim.METHODS[method]).parameters) - {"encoder", "base", "image_size"}
    if method != "dvae":
        arguments -= {"vocab_size"}  # the tokenizer's
    assert {name.replace("_", "-") for name in arguments} <= flags.keys()
    flags.pop("method")
    for name, line in flags.items():
        described = re.sub(r"\(default: .*?\)|[A-Z]{3,}|\{.*?\}|--[\w-]+", "", line, flags=re.DOTALL)
        assert re.search(r"\w", described), f"--{name} has no meaning, only a default"
    assert "(default: " not in flags["image-size"]  # the data decide, in ways that the meaning tells


def test_flags_have_their_arguments_types():
    line = "--method amt --throw-ratio 0.1 --interval 3 --throw low --no-norm-pix --decoder-depth 2"
    given = train.parse(line.split())
    assert given == dict(
        method="amt", throw_ratio=0.1, interval=3, throw="low", norm_pix=False, decoder_depth=2)
    given = train.parse("--method amt --base simmim --unit-size 4".split())
    assert given == dict(method="amt", base="simmim", unit_size=4)


# Training


@pytest.mark.parametrize("method, flags, tiles", [
    ("mae", [], (4, 8)), ("amt", ["--base", "simmim", "--interval", 1], (4, 8)),
    ("lomar", ["--window-size", 5], (8, 5)),
])
def test_a_run_leaves_what_it_promises(call, method, flags, tiles):
    code, out, err, output = call(method, *flags)
    assert code == 0 and "24 images, 2 classes" in out and re.search("patch_size +4", out)
    command = f"next: python eval.py {output}/encoder.pt --task linear --data "
    assert f"2 epochs done: {output}/ holds checkpoint.pt, encoder.pt, log.jsonl" in out and command in out
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    assert {"loss", "lr", "images_per_s", "seconds"} <= lines[0].keys() and lines[0]["loss"] < 3
    files = {"checkpoint.pt", "encoder.pt", "log.jsonl", "reconstruction.png"}
    assert {path.name for path in output.iterdir()} == files
    size = 32 if method == "lomar" else None
    encoder, (missing, left_over) = mim.vit_from_checkpoint(output / "encoder.pt", size)
    assert not missing and not left_over and encoder.image_size == (32, 32)
    assert equal(dict(encoder.state_dict()), dict(load(output / "encoder.pt")))
    assert (load(output / "checkpoint.pt")["maps"] is not None) == (method == "amt")
    assert tiles_in(output / "reconstruction.png") == tiles  # of 8 images


def test_without_labels_the_next_step_is_a_picture(call, photos):
    _, out, _, output = call("simmim", "--epochs", 1, data=photos)
    assert f"1 epoch done: {output}/ holds" in out
    assert f"next: python eval.py {output}/checkpoint.pt --task reconstruct --data {photos}" in out


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6 breaks the graphs of some methods")
def test_a_compiled_run_compiles_once_and_is_the_same(call, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    monkeypatch.setitem(mim.SIZES, "nano", dict(embed_dim=16, depth=1, num_heads=2))
    *_, plain = call("simmim")
    compile, counter = torch.nn.Module.compile, CompileCounter()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile(self, backend=counter, **options))
    torch._dynamo.reset()
    code, _, err, compiled = call("simmim", "--compile", out="compiled")
    assert code == 0 and counter.frame_count == 1, err
    assert_same_run(compiled, plain)


def test_without_a_compiler_the_message_is_one_line(call, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "g++")))
    torch._dynamo.reset()
    code, _, err, output = call("simmim", "--compile")
    assert code == 2 and err.splitlines()[-1].startswith("train.py: error: --compile: torch.compile needs a C++")
    assert "Traceback" not in err and not (output / "encoder.pt").exists()


def test_the_loss_falls(call):
    *_, output = call("mae", "--epochs", 8, "--base-lr", 0.1, "--no-norm-pix")
    losses = [line["loss"] for line in log(output)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("flags", [["amt", "--interval", 1], ["lomar"]])
def test_a_resumed_run_is_the_uninterrupted_one(call, flags):
    *_, whole = call(*flags, "--epochs", 3, out="whole")
    with interrupted_after(2):
        code, *_, output = call(*flags, "--epochs", 3)
    assert code == 130 and load(output / "checkpoint.pt")["epoch"] == 2
    for _ in range(2):  # the second time there is nothing left to do
        code, out, *_ = call(*flags, "--epochs", 3, "--resume")
        assert code == 0 and "3 epochs done" in out
        assert_same_run(whole, output)


def test_resuming_keeps_what_was_given_at_the_start(call):
    with interrupted_after(1):
        flags = ["mae", "--base-lr", 0.05, "--accumulate", 2, "--precision", "bf16"]
        *_, output = call(*flags)
    assert call("mae", "--resume")[0] == 0 and call(*flags, "--resume")[0] == 0
    settings = load(output / "checkpoint.pt")["args"]
    assert (settings["base_lr"], settings["accumulate"], settings["precision"]) == (0.05, 2, "bf16")
    assert settings["lr"] == pytest.approx(0.05 * 8 / 256)
    *_, whole = call(*flags, out="whole")
    assert_same_run(whole, output)


def test_encoders_on_the_way_are_kept_if_asked_for(call):
    *_, output = call("mae", "--save-every", 2)
    assert sorted(path.name for path in output.glob("encoder*")) == ["encoder-2.pt", "encoder.pt"]
    assert call("mae", "--resume", "--epochs", 4, "--save-every", 2)[0] == 0
    kept = [load(output / name) for name in ("encoder-2.pt", "encoder-4.pt", "encoder.pt")]
    assert all(torch.equal(kept[1][name], value) for name, value in kept[2].items())
    assert not all(torch.equal(kept[0][name], value) for name, value in kept[2].items())


def test_a_finished_run_can_be_made_longer(call):
    *_, output = call("mae", "--epochs", 2, "--warmup-epochs", 1)
    code, out, err, _ = call("mae", "--resume", "--epochs", 4)
    assert code == 0, err
    lines = log(output)
    peak = 4e-3 * 8 / 256
    expected = [train.learning_rate(3 * epoch - 1, 3 * epochs, 3, peak)
                for epoch, epochs in ((2, 2), (3, 4), (4, 4))]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines[1:]] == pytest.approx(expected)


def test_resume_starts_where_nothing_was_kept(call):
    """As a script that restarts its job does, whatever the moment of the kill."""
    *_, whole = call("mae", out="whole")
    *_, output = call("mae", "--resume")
    assert_same_run(whole, output)
    with interrupted_after(0):  # in the first epoch
        *_, early = call("mae", out="early")
    assert call("mae", "--resume", out="early")[0] == 0
    assert_same_run(whole, early)


def test_a_checkpoint_that_does_not_fit_itself_is_one_line(call):
    *_, output = call("mae")
    state = load(output / "checkpoint.pt")
    changes = [dict(model={"x": torch.zeros(1)}), dict(optimizer={}), dict(args={}),
               dict(args=dict(state["args"], decoder_dim=32))]
    for change in changes:
        torch.save(state | change, output / "checkpoint.pt")
        code, _, err, _ = call("mae", "--resume", tiny=[])
        assert code == 2 and err.startswith("train.py: error: ") and err.count("\n") == 1, err


def test_torchrun_starts_the_program_and_a_log_file_has_no_bars(folder, tmp_path):
    """Where stderr is no terminal, an epoch is one line."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py"]
    command = [*start, "--method", "mae", "--data", folder, *TINY, "--output", tmp_path / "run"]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))
    out, err = result.stdout, result.stderr
    assert result.returncode == 0 and "\r" not in out + err and "images/s" not in err, err
    assert sum(line.startswith("epoch ") for line in out.splitlines()) == 2


def test_an_interrupt_inside_an_epoch_repeats_the_epoch(call, monkeypatch):
    *_, whole = call("amt", "--interval", 1, out="whole")
    rate = train.learning_rate

    def interrupt(step, *rest):
        if step == 4:  # the second step of the second epoch
            raise KeyboardInterrupt
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", interrupt)
    code, *_, output = call("amt", "--interval", 1)
    assert code == 130 and len(log(output)) == 1
    monkeypatch.setattr(train, "learning_rate", rate)
    with open(output / "log.jsonl", "a") as file:  # as if killed between the log's line and the checkpoint
        file.write(json.dumps(dict(epoch=2, loss=0)) + "\n")
    call("amt", "--interval", 1, "--resume")
    assert_same_run(whole, output)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_run_resumes_exactly(call, fork, moment):
    """Killed while it writes the checkpoint of the second epoch: before it takes its name, or just after."""
    *_, whole = call("mae", "--epochs", 3, out="whole")

    def run_and_die():
        replace = os.replace

        def die(temporary, path):
            last = path.name == "checkpoint.pt" and load(temporary)["epoch"] == 2
            if not (last and moment == "before"):
                replace(temporary, path)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = die
        call("mae", "--epochs", 3)

    assert fork(run_and_die)[0] == -signal.SIGKILL
    *_, output = call("mae", "--epochs", 3, "--resume")
    assert_same_run(whole, output)


@pytest.mark.parametrize("flags", [
    ["amt", "--interval", 1], ["rmae", "--region-dim", 16, "--region-heads", 2]], ids=["amt", "rmae"])
def test_two_processes_train_as_one(fork, folder, tmp_path, flags):
    """2 processes see the micro-batches that 1 process accumulates, so losses agree to rounding, and maps
    and regions too. Each of the two sees one of the broken images at least."""
    for number, path in enumerate(sorted((folder / "train").rglob("*.png"))):
        (tmp_path / "data").mkdir(exist_ok=True)
        content = b"no image" if number % 6 == 0 else path.read_bytes()
        (tmp_path / "data" / path.name).write_bytes(content)
    arguments = ["--method", *flags, "--data", tmp_path / "data", *TINY, "--accumulate", 4]
    for out, processes in (("one", 1), ("two", 2)):
        cache = ["--region-cache", tmp_path / f"cache-{out}"] if flags[0] == "rmae" else []
        codes, said, err = fork(train, *arguments, *cache, "--output", tmp_path / out, processes=processes)
        assert codes in (0, [0, 0]), err
        assert said.count(": new attention maps decide") == (flags[0] == "amt")  # after the first epoch
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        assert b == pytest.approx(a, rel=1e-5) and b["broken_images"] == 4
    one, two = (load(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for name, value in one["model"].items():
        assert torch.allclose(value, two["model"][name], atol=2e-4), name
    for a, b in zip(one["optimizer"].values(), two["optimizer"].values()):
        assert (a["exp_avg"] - b["exp_avg"]).norm() <= 1e-3 * a["exp_avg"].norm()  # of gradients as large
    if flags[0] == "amt":
        assert one["maps"].shape == (24, 8, 8)
        assert torch.allclose(one["maps"].float(), two["maps"].float(), atol=2e-2)


def test_the_weights_are_checked_once_an_epoch(call, monkeypatch):
    """At every step the CPU would wait for the GPU once more."""
    checks = []
    monkeypatch.setattr(train, "all_finite", lambda module: checks.append(module) or True)
    assert call("mae")[0] == 0 and len(checks) == 2  # of 3 steps each


def test_workers_change_nothing(call):
    runs = [call("amt", "--interval", 1, "--workers", w, out=f"w{w}")[-1] for w in (0, 2)]
    assert_same_run(*runs)


def test_cropping_on_the_device_trains_as_well_and_resumes(call):
    flags = ["amt", "--interval", 1, "--data", "shapes", "--limit", 24]
    *_, workers = call(*flags, out="workers", data="shapes")
    code, out, err, whole = call(*flags, "--loader", "device", out="whole", data="shapes")
    assert code == 0 and re.search("loader +device", out), err
    assert log(whole) != log(workers)
    assert log(whole)[-1]["loss"] == pytest.approx(log(workers)[-1]["loss"], rel=0.1)
    with interrupted_after(1):
        *_, output = call(*flags, "--loader", "device", data="shapes")
    assert call(*flags, "--resume", data="shapes")[0] == 0
    assert_same_run(whole, output)
    code, _, err, _ = call("mae", "--loader", "device", out="folder")
    assert code == 2 and "--loader device is for data in memory (shapes, cifar10" in err
    code, _, err, _ = call("rmae", "--loader", "device", "--data", "shapes", out="regions")
    assert code == 2 and "methods without regions" in err
    code, _, err, _ = call("mae", "--loader", "divice", out="typo")
    assert code == 2 and "--loader invalid choice: 'divice' (choose from" in err


def test_bf16_on_the_cpu_trains_close_to_fp32(call):
    runs = [log(call("mae", "--precision", p, out=p)[-1]) for p in ("fp32", "bf16")]
    for a, b in zip(*runs):
        assert b["loss"] != a["loss"] and b["loss"] == pytest.approx(a["loss"], rel=0.02)


def test_broken_images_are_reported_and_counted(call, folder, tmp_path):
    """However many they are, another image takes the place of each."""
    image = (folder / "train" / "a" / "0.png").read_bytes()
    for i in range(8):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / f"{i:03d}.png").write_bytes(b"no image" if i == 5 else image)
    code, out, err, output = call("mae", "--epochs", 1, data=tmp_path / "d")
    assert code == 0 and (out + err).count("005.png") == 1 and log(output)[0]["broken_images"] == 1
    for i in (2, 6):
        (tmp_path / "d" / f"{i:03d}.png").write_bytes(b"")
    code, out, err, output = call("mae", "--epochs", 1, "--workers", 1, data=tmp_path / "d", out="other")
    assert code == 0 and log(output)[0]["broken_images"] == 3
    assert all((out + err).count(f"00{i}.png") == 1 for i in (2, 5, 6))


def test_a_loss_that_is_not_finite_stops_the_run(call):
    code, _, err, output = call("mae", "--lr", 1e30, "--warmup-epochs", 0, "--epochs", 20)
    words = (r"the loss is (?:nan|inf), .* at step \d+ \(epoch (\d+)\), learning rate 9.99e\+29; "
             r"(the files of the epochs before are kept\. )?Try a lower")
    epoch, kept = re.search(words, err).groups()
    assert code == 2 and bool(kept) == (int(epoch) > 1)
    assert all(v.isfinite().all() for v in weights(output).values())


def test_a_full_disk_keeps_the_last_checkpoint(call):
    *_, output = call("mae")
    before = (output / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal; writes fail as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 4, limits[1]))
    try:
        code, _, err, _ = call("mae", "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and err.count("\n") == 1
    assert "cannot write" in err and "checkpoint.pt" in err and "kept" in err
    assert (output / "encoder.pt").exists()
    assert (output / "checkpoint.pt").read_bytes() == before and not list(output.glob("*.tmp"))


def test_runs_are_not_overwritten_or_mixed_up(call):
    *_, output = call("mae")
    mistakes = [(("mae",), "already holds a run of 2 epochs"),
                (("simmim", "--resume"), "--method simmim.*mae"),
                (("mae", "--resume", "--mask-ratio", 0.5), "--mask-ratio 0.5.*0.75"),
                (("mae", "--resume", "--embed", 3), "unknown argument --embed")]
    before = (output / "checkpoint.pt").read_bytes()
    for flags, words in mistakes:
        code, _, err, _ = call(*flags)
        assert code == 2 and re.search(words, err) and err.count("\n") == 1
    assert (output / "checkpoint.pt").read_bytes() == before
    (output / "encoder-2.pt").write_bytes((output / "encoder.pt").read_bytes())  # as --save-every leaves it
    assert call("mae", "--overwrite", "--epochs", 1)[0] == 0 and len(log(output)) == 1
    assert not (output / "encoder-2.pt").exists()
    of_mae_code = dict(model={}, optimizer={}, epoch=3, args=argparse.Namespace(lr=1.0))
    torch.save(of_mae_code, output / "checkpoint.pt")
    code, _, err, _ = call("mae", "--resume")
    assert code == 2 and "is not a checkpoint of train.py" in err and err.count("\n") == 1
    (output / "checkpoint.pt").unlink()
    encoder = (output / "encoder.pt").read_bytes()
    code, _, err, _ = call("mae")
    assert code == 2 and "holds encoder.pt but no checkpoint.pt of its run" in err
    assert (output / "encoder.pt").read_bytes() == encoder and len(log(output)) == 1


def test_a_batch_is_cut_into_equal_micro_batches(monkeypatch):
    for batch, expected in ((768, (768, 3)), (1000, (1000, 4)), (514, (513, 3)), (256, (256, 1))):
        assert train.cut_batch(batch, 10**6) == expected
    assert train.cut_batch(64, 40) == (40, 1)
    for images, words in ((4, "--batch-size"), (3, "the number of images")):
        with pytest.raises(train.UsageError, match=f"^{words} must be at least 4, got 3"):
            train.cut_batch(3, images, accumulate=2)
    monkeypatch.setattr(train, "world_size", lambda: 2)
    assert train.cut_batch(64, 10**6) == (64, 2) and train.cut_batch(1026, 10**6) == (1026, 6)


def test_a_resumed_step_keeps_its_micro_batches(monkeypatch):
    """They are counted over all processes, so that another number of processes draws the same masks."""
    for processes in (1, 2, 4):
        monkeypatch.setattr(train, "world_size", lambda: processes)
        assert train.cut_batch(24, 24, accumulate=4) == (24, 4)
    monkeypatch.setattr(train, "world_size", lambda: 3)
    with pytest.raises(train.UsageError, match="--accumulate 4: 3 processes cannot share out 4 "):
        train.cut_batch(24, 24, accumulate=4)


def test_a_run_does_not_resume_on_other_data(call, folder, tmp_path):
    assert call("mae", "--epochs", 1)[0] == 0
    code, _, err, _ = call("mae", "--epochs", 2, "--limit", 20, "--resume")
    assert code == 2 and "--limit 20: the run to resume was made with its default" in err
    other = tmp_path / "other" / "a"
    other.mkdir(parents=True)
    for file in sorted(folder.rglob("*.png"))[:9]:
        (other / f"{file.parent.name}{file.name}").write_bytes(file.read_bytes())
    code, _, err, _ = call("mae", "--epochs", 2, "--resume", data=tmp_path / "other")
    assert code == 2 and err.count("\n") == 1
    assert "--resume: the run was started with other images than" in err


def test_a_run_is_resumed_by_its_own_command(call):
    """Of 24 images in 5 micro-batches, 20 make a step."""
    flags = ["--batch-size", 24, "--accumulate", 5]
    *_, whole = call("mae", *flags, out="whole")
    with interrupted_after(1):
        *_, output = call("mae", *flags)
    assert call("mae", *flags, "--resume")[0] == 0
    assert_same_run(whole, output)


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert train.cores() == 6


MISTAKES = {
    "no method": ("", "the following arguments are required: --method"),
    "unknown method": ("--method mea", "--method invalid choice: 'mea' (choose from"),
    "near flag": (
        "--method amt --trow-ratio 0.4",
        "unknown argument --trow-ratio: see --help; did you mean --throw-ratio"),
    "another method's flag": (
        "--method simmim --decoder-dim 4",
        "--decoder-dim belongs to --method mae or --method amt or --method objmae or"),
    "not a number": ("--method mae --epochs many", "--epochs must be a positive whole number, got 'many'"),
    "bad choice": ("--method amt --throw top", "--throw invalid choice: 'top' (choose from"),
    "bad base": ("--method amt --base simim", "--base invalid choice: 'simim' (choose from"),
    "bad model": ("--method mae --model bose", "--model invalid choice: 'bose' (choose from"),
    "bad precision": ("--method mae --precision fp8", "--precision invalid choice: 'fp8'"),
    "bad device": ("--method mae --device gpu", "--device gpu"),
    "no folder": ("--method mae --data nowhere", "--data nowhere: no such folder"),
    "zero epochs": ("--method mae --epochs 0", "--epochs must be a positive whole number, got '0'"),
    "negative workers": ("--method mae --workers -1", "--workers must be a whole number from 0 to"),
    "no number": ("--method mae --lr nan", "--lr must be a positive number, got 'nan'"),
    "no heads": ("--method mae --decoder-heads 0", "decoder_heads must be at least 1, got 0"),
    "long seed": (
        "--method mae --seed 9223372036854775808",
        "--seed must be a whole number from 0 to 2^63 - 1, got"),
    "negative seed": ("--method mae --seed -1", "--seed must be a whole number from 0 to 2^63 - 1, got '-1'"),
    "large batch": ("--method mae --batch-size 5000", "--batch-size 5000 is more than the 4096 images"),
    "small pieces": ("--method mae --batch-size 9 --accumulate 5", "--batch-size must be at least 10, got 9"),
    "one image": ("--method mae --limit 1", "the number of images must be at least 2, got 1"),
    "few images": ("--method mae --limit 16 --accumulate 9", "the number of images must be at least 18, got 16"),
    "part of an image": ("--method mae --limit 0.5", "--limit must be a whole number, got '0.5'"),
    "underscores": (
        "--method mae --mask_ratio 0.5", "unknown argument --mask_ratio: see --help; did you mean --mask-ratio"),
    "a word": ("--method mae regions", "unknown argument regions: see --help"),
    "a cache of nothing": (
        "--method rmae --region-cache a", "--region-cache has no effect with --regions instances, the"),
    "two rates": ("--method mae --lr 1 --base-lr 1", "--lr and --base-lr exclude"),
    "patch": ("--method mae --patch-size 7", "multiple of patch_size=7, got 64x64"),
    "ratio": ("--method amt --mask-ratio 0.9", "mask_ratio=0.9 and throw_ratio=0.4"),
    "three sizes": (
        "--method mae --image-size 1 2 3",
        "--image-size takes one number, or height and width; got [1, 2, 3]"),
    "infinite ratio": ("--method mae --mask-ratio inf", "--mask-ratio must be"),
    "ratio that is no number": ("--method mae --mask-ratio nan", "--mask-ratio must be"),
    "no decoder": ("--method mae --decoder-dim 0", "decoder_dim"),
    "negative decoder": ("--method mae --decoder-depth -1", "decoder_depth"),
    "long warm-up": (
        "--method mae --epochs 3 --warmup-epochs 4",
        "--warmup-epochs 4 is more than --epochs 3"),
    "nothing to prepare": (
        "--method mae --prepare",
        "--prepare computes regions, and --method mae takes none"),
    "high minimum": ("--method mae --min-lr 1", "--min-lr 1 is above the peak learning rate, 0.001"),
    "two ways": ("--method mae --resume --overwrite", "--resume and --overwrite exclude each other"),
    "nothing near": ("--method mae --frobnicate", "unknown argument --frobnicate: see --help"),
    "near data": ("--method mae --data cifar", "did you mean cifar10"),
    "near regions": ("--method rmae --regions instance", "did you mean instances"),
    "small image": ("--method mae --image-size 4", "--image-size must be at least 8"),
    "output is a file": (
        "--method mae --output file",
        "cannot write file/checkpoint.pt: what was there before is kept (File exists)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_is_one_line(cli, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    flags, words = MISTAKES[name]
    code, _, err = cli(train, *flags.split())
    assert code == 2 and words in err and err.startswith("train.py: error: ") and err.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_checkpoint_is_named(call):
    *_, output = call("mae")
    content = (output / "checkpoint.pt").read_bytes()
    (output / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    code, _, err, _ = call("mae", "--resume")
    assert code == 2 and "checkpoint.pt" in err and "not a whole" in err and err.count("\n") == 1
    torch.save({"cls_token": torch.zeros(1)}, output / "checkpoint.pt")
    code, _, err, _ = call("mae", "--resume")
    assert code == 2 and "is not a checkpoint of train.py" in err


def test_images_that_fit_no_square(call, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(9):
        write_png(torch.randint(0, 255, (3, 30, 50), dtype=torch.uint8), str(images / f"{i}.png"))
    flags = ["--model", "nano", "--image-size", 16, 32, "--patch-size", 4, "--batch-size", 4, "--epochs", 2]
    code, _, _, output = call("amt", "--interval", 1, data=images, tiny=flags + TINY[10:])
    assert code == 0 and load(output / "checkpoint.pt")["maps"].shape == (9, 4, 8)
    assert call("amt", "--resume", data=images, tiny=[])[0] == 0


# Lookahead and regions


def test_lookahead_by_hand():
    """SGD on f(w) = w with rate 1, k=2, alpha=0.5: each step takes 1 off; every second lands half-way between
    there and the slow weight."""
    w = torch.nn.Parameter(torch.tensor([10.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    train.add_lookahead(optimizer, k=2, alpha=0.5)
    seen = []
    for _ in range(6):
        w.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(w.item())
    assert seen == [9.0, 9.0, 8.0, 8.0, 7.0, 7.0]


def test_lookahead_goes_on_from_its_state():
    def steps(optimizer, w, count):
        for i in range(count):
            (w * w).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh(value):
        w = torch.nn.Parameter(value.clone())
        optimizer = torch.optim.AdamW([w], lr=0.1, fused=True)
        train.add_lookahead(optimizer, k=3)
        return w, optimizer

    w, optimizer = fresh(torch.tensor([3.0, -2.0]))
    steps(optimizer, w, 4)
    other, resumed = fresh(w.detach())
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    steps(optimizer, w, 5)
    steps(resumed, other, 5)
    assert torch.equal(w, other)


def test_objmae_pretrains_on_shapes_and_resumes(call):
    flags = ["--limit", 32, "--selection", "inter", "--alignment", "random"]
    code, out, _, whole = call("objmae", *flags, data="shapes", out="whole")
    assert code == 0 and re.search("regions +instances", out) and re.search("lookahead +5", out)
    assert tiles_in(whole / "reconstruction.png") == (4, 8)
    with interrupted_after(1):
        *_, output = call("objmae", *flags, data="shapes")
    assert call("objmae", *flags, "--resume", data="shapes")[0] == 0
    assert_same_run(whole, output)


def test_regions_on_the_command_line(call, tmp_path):
    code, _, err, _ = call("mae", "--regions", "fh")
    assert code == 2 and "--regions belongs to --method objmae or --method rae or --method rmae" in err
    code, _, err, _ = call("objmae", "--regions", tmp_path / "none")
    assert code == 2 and "no such folder" in err


@pytest.mark.parametrize("method, columns", [("rae", 5), ("rmae", 7)])
def test_regions_of_files_are_computed_once_and_trained_on(call, method, columns, tmp_path, monkeypatch):
    flags = ["--region-dim", 16, "--region-heads", 2, "--num-regions", 4, "--workers", 0, "--epochs", 1]
    code, out, _, output = call(method, *flags)
    assert code == 0 and re.search("regions +fh", out)
    files = list((tmp_path / "data" / "regions").rglob("*.npz"))
    assert len(files) == 24 and "fh-0.8-640-6-12-25" in str(files[0])
    assert "loss_region" in log(output)[0] and ("loss_pixel" in log(output)[0]) == (method == "rmae")
    assert tiles_in(output / "reconstruction.png") == (8, columns)
    made = {f: f.stat().st_mtime_ns for f in files}
    monkeypatch.setattr(datasets, "felzenszwalb", None)  # a second run uses the files
    *_, again = call(method, *flags, out="again")
    assert_same_run(output, again)
    assert made == {f: f.stat().st_mtime_ns for f in (tmp_path / "data" / "regions").rglob("*.npz")}


def test_regions_can_be_prepared_ahead(call, tmp_path):
    flags = ["--workers", 2, "--region-cache", "cache", "--fh-scales", 30]
    code, out, _, output = call("rmae", "--prepare", *flags)
    assert code == 0 and not output.exists()
    assert out.endswith("\nthe regions are ready: without --prepare the run starts\n")
    assert len(list((tmp_path / "cache" / "fh-0.8-640-30").rglob("*.npz"))) == 24


def test_a_run_with_activation_maps_goes_on_with_those_of_the_same_network(call, tmp_path, monkeypatch):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 32, 32), torch.nn.AdaptiveAvgPool2d(1),
                                  torch.nn.Linear(4, 1000))
    monkeypatch.setattr(datasets, "resnet50", lambda weights: network)
    for name in "ab":
        (tmp_path / name).write_text(name)
    flags = ["--cam-weights", tmp_path / "a"]
    assert call("objmae", *flags, "--epochs", 1)[0] == 0
    (tmp_path / "a").rename(tmp_path / "moved")
    code, _, err, _ = call("objmae", "--cam-weights", tmp_path / "b", "--epochs", 2, "--resume")
    assert code == 2 and "--resume: the run was started with the maps of another network: --cam-weights" in err
    code, _, err, output = call("objmae", "--cam-weights", tmp_path / "moved", "--epochs", 2, "--resume")
    assert code == 0 and len(log(output)) == 2, err


@pytest.mark.parametrize("given, used", [([], 5), (["--workers", 2], 2), (["--workers", 0], 0)])
def test_regions_are_computed_on_all_cores(call, monkeypatch, given, used):
    workers = []
    monkeypatch.setattr(train, "cores", lambda: 5)
    monkeypatch.setattr(datasets.ComputedRegions, "fill", lambda self, number, *_: workers.append(number))
    assert call("rmae", "--prepare", *given)[0] == 0 and workers == [used]


DVAE = ["--image-size", 32, "--hidden-dim", 8, "--groups", 3, "--vocab-size", 16, "--batch-size", 8]


@pytest.fixture(scope="module")
def tokenizer(folder, tmp_path_factory):
    """The folder of a dvae run on the scenes."""
    output = tmp_path_factory.mktemp("dvae")
    flags = ["--method", "dvae", "--data", folder, *DVAE, "--epochs", 2, "--output", output]
    train.main([str(flag) for flag in flags])
    return output


def test_a_tokenizer_is_trained_and_pictured(tokenizer):
    line = log(tokenizer)[-1]
    assert {"loss_pixel", "loss_kl", "perplexity", "codes_used"} <= line.keys()
    assert 1 <= line["perplexity"] <= line["codes_used"] <= 16
    assert tiles_in(tokenizer / "reconstruction.png") == (2, 8)


@pytest.mark.parametrize("method", ["beit", "lomar", "cae"])
def test_tokens_are_trained_on(call, method, tokenizer):
    code, out, _, output = call(method, "--tokenizer", tokenizer / "checkpoint.pt", "--epochs", 1)
    assert code == 0 and re.search(f"tokenizer +{tokenizer}", out)
    line = log(output)[0]
    assert ("loss_align" in line) == (method == "cae") and 0 <= line["accuracy"] < 0.5
    assert line["loss"] == pytest.approx(line["loss_token"] + 2 * line.get("loss_align", 0), rel=1e-5)
    assert tiles_in(output / "reconstruction.png") == (4, 6 if method == "beit" else 8)
    assert not any("tokenizer" in name for name in weights(output))


def test_a_run_on_tokens_resumes_with_its_own_tokenizer_alone(call, tokenizer, tmp_path):
    flags = ["cae", "--tokenizer", tokenizer / "checkpoint.pt"]
    *_, whole = call(*flags, out="whole")
    with interrupted_after(1):
        assert call(*flags)[0] == 130
    assert call("dvae", *DVAE, "--epochs", 1, "--seed", 1, out="other")[0] == 0
    code, _, err, _ = call("cae", "--resume", "--tokenizer", tmp_path / "other" / "checkpoint.pt")
    assert code == 2 and "is not the file that the run was started with" in err
    moved = tmp_path / "moved.pt"
    moved.write_bytes((tokenizer / "checkpoint.pt").read_bytes())
    code, *_, output = call("cae", "--resume", "--tokenizer", moved)
    assert code == 0
    assert_same_run(whole, output)


def test_without_a_tokenizer_the_target_is_pixels(call, tokenizer, tmp_path):
    code, out, _, output = call("cae")
    assert code == 0 and not re.search("^ +tokenizer", out, re.M) and "loss_pixel" in log(output)[0]
    assert "blocks.0.ls1.gamma" in load(output / "encoder.pt")
    code, _, err, _ = call("beit", out="beit")
    assert code == 2 and "--tokenizer" in err
    for file, says in ((output / "checkpoint.pt", "not of dvae"), (output / "encoder.pt", "blocks.input.w"),
                       (tmp_path / "none.pt", "No such file")):
        code, _, err, _ = call("beit", "--tokenizer", file, out="beit")
        assert code == 2 and says in err and len(err.strip().splitlines()) == 1
    state = load(tokenizer / "checkpoint.pt")
    torch.save(state | dict(epoch=0), tmp_path / "begun.pt")
    code, _, err, _ = call("beit", "--tokenizer", tmp_path / "begun.pt", out="beit")
    assert code == 2 and "there is no tokenizer in it (its run has had no epoch yet)" in err
    assert call("beit", "--tokenizer", tokenizer / "encoder.pt", out="beit")[0] == 0  # DALL-E's names
    code, _, err, _ = call("dvae", "--model", "tiny")
    assert code == 2 and "--model belongs to --method mae or" in err


@pytest.mark.parametrize("method, flags, says", [
    ("rmae", ["--regions", "cam"], "--regions cam is for objmae"),
    ("rmae", ["--regions", "fh", "--fh-scales", "-3"], "--fh-scales must be positive"),
    ("objmae", ["--regions", "fh", "--cam-weights", "w.pt"],
     "--cam-weights and --cam-labels belong to --regions cam, not to fh"),
    ("cae", ["--min-block", "0"], "min_block"),
    ("dvae", ["--tau-end", "-1", "--image-size", "32", "--groups", "3"],
     "tau_end must be in 0.001..1.0, got -1.0"),
    ("dvae", ["--image-size", "30"], "multiple of 4, got"),
])
def test_mistakes_of_regions_and_tokens_are_one_line(call, method, flags, says):
    code, _, err, output = call(method, *flags)
    assert code == 2 and says in err and err.count("\n") == 1 and not output.exists()
