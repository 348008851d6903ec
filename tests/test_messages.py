"""What both programs say: a mistake is one line in a user's words, and no flag is ignored in silence."""

import json
import shlex
import urllib.error
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

import datasets
import eval as evaluation
import mim
import train

PROGRAMS = dict(train=train, eval=evaluation)
NANO = ["--model", "nano", "--image-size", 16, "--patch-size", 8, "--batch-size", 2, "--epochs", 1]


@pytest.fixture
def mistake(cli):
    """mistake(program, *arguments) -> the only line on stderr of a run that a mistake stopped."""

    def run(program, *arguments):
        code, _, err = cli(PROGRAMS[program], *arguments)
        assert code == 2 and err.startswith(f"{program}.py: error: ") and err.count("\n") == 1, err
        return err.removeprefix(f"{program}.py: error: ").strip()

    return run


def write_images(folder, *names):
    """Images of 16x16 pixels, name.png, below a folder, which is returned."""
    for number, name in enumerate(names):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(torch.full((3, 16, 16), 40 * number, dtype=torch.uint8), str(path))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch of SimMIM on two plain images, in folders whose names a shell would take apart: its
    folder, its data, and what it said."""
    root = tmp_path_factory.mktemp("runs")
    photos, output = write_images(root / "my photos; $HOME", "a", "b"), root / "it's a run"
    flags = ["--method", "simmim", "--unit-size", 1, "--data", photos, "--output", output, *NANO]
    with pytest.MonkeyPatch.context() as patch, open(root / "out", "w") as out:
        patch.setattr("sys.stdout", out)
        train.main([str(flag) for flag in flags])
    return output, photos, (root / "out").read_text()


# The words


def test_the_next_command_can_be_pasted_into_a_shell(run):
    output, photos, out = run
    command = shlex.split(out.splitlines()[-1].removeprefix("next: python eval.py"))
    assert command == [f"{output}/checkpoint.pt", "--task", "reconstruct", "--data", str(photos)]


def test_one_thing_is_not_called_several(run, mistake, tmp_path):
    def description():
        return datasets.load_folder(str(tmp_path / "data"), "pretrain").description

    output, photos, out = run
    assert "1 epoch done" in out
    message = mistake("train", "--method", "simmim", "--data", photos, "--output", output)
    assert "a run of 1 epoch:" in message
    write_images(tmp_path / "data" / "a", "1")
    assert description().endswith(": plain images, no labels, 1 image, 0 classes")
    write_images(tmp_path / "data" / "b", "1", "2")
    assert description().endswith(", 3 images, 2 classes (a, b)")
    message = mistake("train", "--method", "mae", "--data", tmp_path / "data" / "a", "--batch-size", 2)
    assert message == "--batch-size 2 is more than the 1 image of --data"


@pytest.mark.parametrize("content", ["tensors", "many tensors", "picture", "log"])
def test_a_full_disk_is_called_a_full_disk(content, tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("as it was")
    monkeypatch.setattr(datasets, "open", lambda path, mode: open("/dev/full", "wb"), raising=False)
    write = {"tensors": lambda to: torch.save(dict(a=torch.zeros(3)), to),
             "many tensors": lambda to: torch.save(dict(a=torch.zeros(3_000_000)), to),
             "log": lambda to: to.write(b"a line")}.get(content)
    with pytest.raises(datasets.UsageError) as error:
        if content == "picture":
            train.save_picture(tmp_path / "kept", torch.zeros(3, 9, 9), "train.py")
        else:
            train.write_atomically(tmp_path / "kept", write)
    problem = "what was there before is kept (the disk is full)"
    assert str(error.value) == f"cannot write {tmp_path}/kept: {problem}"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "as it was"


TOO_LARGE = "out of memory: use fewer or smaller images a step, or in training --accumulate"


@pytest.mark.parametrize("error, says", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate"), TOO_LARGE),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"), TOO_LARGE),
    (MemoryError(), TOO_LARGE),
    (OSError(28, "No space left on device"), "system: the disk is full"),
    (OSError(28, "No space left on device", "data/a.npz"), "data/a.npz: the disk is full"),
    (PermissionError(13, "Permission denied", "data"), "data: Permission denied"),
])
def test_the_systems_errors_are_told_in_a_users_words(error, says, capsys):
    def fail():
        raise error

    assert train.exit_with_one_line("train.py", fail) == 2
    assert capsys.readouterr().err == f"train.py: error: {says}\n"


def test_an_error_of_the_program_itself_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"):
        train.exit_with_one_line("train.py", lambda: torch.zeros(2).view(3))


def test_pythons_and_torchs_names_for_things_are_left_out(run, mistake, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    message = mistake("eval", run[0] / "encoder.pt", "--task", "attention", "--images", "text.png")
    problem = "it cannot be used as an image (cannot identify image file"
    assert message.startswith(f"--images text.png: {problem}") and "<" not in message
    with pytest.raises(datasets.UsageError, match=r"^a: b \(. unexpected pos 64 vs 0\)$"):
        with datasets.explained("a", "b"):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


@pytest.mark.parametrize("error, reason", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate"), TOO_LARGE),
    (urllib.error.URLError(OSError(-2, "Name or service not known")), "Name or service not known"),
    (RuntimeError("Error(s) in loading state_dict for ResNet:\n\tMissing key: a"), "Missing key: a"),
    (KeyError("epoch"), "it has no 'epoch'"),
    (AssertionError(), "AssertionError"),
])
def test_reasons_are_one_line_in_a_users_words(error, reason):
    with pytest.raises(datasets.UsageError) as told, datasets.explained("--data a", "it cannot be read"):
        raise error
    assert str(told.value) == f"--data a: it cannot be read ({reason})"


def test_sizes_beyond_the_memory_are_one_line(run, mistake):
    message = mistake("train", "--method", "mae", "--model", "nano", "--image-size", 10**6, "--patch-size", 1)
    assert message == f"--method mae: it cannot be built ({TOO_LARGE})"


# Values


@pytest.mark.parametrize("program, command", [
    ("train", "--method objmae"), ("train", "--method cae"),
    ("eval", "random --task finetune"), ("eval", "random --task attention")])
def test_no_flag_takes_an_empty_string(program, command, mistake):
    parsers, command = [], command.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Parser, "parse", lambda parser, *_: parsers.append(parser) or {})
        PROGRAMS[program].parse(command)
    flags = {a.option_strings[-1] for a in parsers[0]._actions if a.option_strings and a.nargs != 0}
    assert {"--data", "--device", "--output"} <= flags and len(flags) > 15
    for flag in flags - {"--method", "--task"}:
        message = mistake(program, *command, flag, "")
        assert message.startswith(f"{flag} ") and ("must not be empty" in message or "''" in message)
        assert mistake(program, *command, f"{flag}=") == message


def test_nothing_else_is_an_empty_string(mistake):
    assert mistake("train", "--method", "").startswith("--method invalid choice: ''")
    for task in ("knn", "reconstruct"):
        assert mistake("eval", "", "--task", task) == "argument checkpoint: must not be empty"
    message = mistake("eval", "random", "--task", "attention", "--images", "a.png", "")
    assert message == "--images must not be empty"


@pytest.mark.parametrize("name", [
    "meta", "mps", "xla", "cuda:99", "cuda", "gpu", "opengl", "privateuseone", "cpu:x"])
def test_a_device_that_is_not_there_is_one_line(name, mistake):
    message = mistake("train", "--method", "mae", "--device", name)
    named = "cuda:0" if name == "cuda" else name
    assert message.startswith(f"--device {named}: it cannot be used; beside cpu there are 0 CUDA devices (")


def test_more_workers_than_a_machine_bears_are_refused(monkeypatch):
    monkeypatch.setattr(train, "cores", lambda: 2)
    assert train.open_device(workers=16)[2] == 16
    with pytest.raises(datasets.UsageError, match="^--workers 17: at most 8 for each core, here 16$"):
        train.open_device(workers=17)


@pytest.mark.parametrize("program, command, says", [
    ("train", "--method mae --data CIFAR10", "shapes, cifar10, cifar100, stl10; did you mean cifar10?"),
    ("eval", "random --task knn --zzz 1", "unknown argument --zzz: see --help"),
    ("eval", "random --task finetune --layer-decay 9", "--layer-decay must be a number from 0 to 1, got '9'"),
])
def test_what_else_it_may_be_is_said(program, command, says, mistake):
    assert mistake(program, *command.split()).endswith(says)


def test_a_low_temperature_asks_the_nearest_alone():
    """exp(cosine / temperature) would be beyond float32."""
    known, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.9, 0.1]]), torch.tensor([2, 1, 1])
    votes = evaluation.knn_logits(known, labels, torch.tensor([[1.0, 0.0]]), 3, k=3, temperature=1e-4)
    assert votes[0].tolist() == pytest.approx([0.0, 0.0, 1.0])


def test_a_full_disk_keeps_no_piece_of_a_regions_file(tmp_path, monkeypatch):
    regions = datasets.ComputedRegions(datasets.load_data("shapes"), str(tmp_path), [9])

    def save(file, maps):
        file.write(b"a piece")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.np, "savez_compressed", save)
    with pytest.raises(datasets.UsageError, match=r"cannot write .*\(the disk is full\)$"):
        regions.save(0, torch.zeros(1, 8, 8).numpy())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# Two flags, one of which would do nothing


@pytest.mark.parametrize("program, command, one, other", [
    ("train", "--method mae --lr 1 --base-lr 1", "--lr", "--base-lr"),
    ("train", "--method rmae --resume --overwrite", "--resume", "--overwrite"),
    ("train", "--method rmae --prepare --resume", "--resume", "--prepare"),
    ("train", "--method rmae --overwrite --prepare", "--overwrite", "--prepare"),
    ("train", "--method mae --workers 1 --loader device", "--loader device", "--workers"),
    ("train", "--method cae --no-norm-pix --tokenizer t.pt", "--tokenizer", "--norm-pix"),
    ("train", "--method lomar --norm-pix --tokenizer t.pt", "--tokenizer", "--norm-pix"),
    ("train", "--method objmae --regions cam --object-floor 0.1", "--regions cam", "--object-floor"),
    ("train", "--method rmae --regions instances --region-cache a", "--regions instances", "--region-cache"),
    ("eval", "random --task semseg --head linear --width 9", "--head linear", "--width"),
    ("eval", "random --task semseg --freeze --drop-path 0.2", "--freeze", "--drop-path"),
    ("eval", "random --task semseg --freeze --layer-decay 0.2", "--freeze", "--layer-decay"),
    ("eval", "random --task detect --drop-path 0.2 --freeze", "--freeze", "--drop-path"),
    ("eval", "random --task detect --layer-decay 0.2 --freeze", "--freeze", "--layer-decay"),
    ("eval", "random --task attentive --images a.png --count 2", "--images", "--count"),
    ("eval", "random --task attention --images a.png --count 2", "--images", "--count"),
    ("eval", "random --task attention --images a.png --region-cache b", "--images", "--region-cache"),
])
def test_a_flag_that_another_makes_useless_is_refused(program, command, one, other, mistake):
    assert mistake(program, *command.split()) == f"{one} and {other} exclude each other"


@pytest.mark.parametrize("program, command, says", [
    ("train", "--method rmae --fh-scales 9", "--fh-scales belongs to --regions fh, not to instances"),
    ("eval", "random --task attention --rollout --fh-scales 9",
     "--fh-scales belongs to --regions fh, not to none"),
    ("eval", "random --task attention --rollout --cam-labels",
     "--cam-weights and --cam-labels belong to --regions cam, not to none"),
    ("eval", "random --task attention --images a.png --data shapes",
     "--images are drawn instead of --data: leave one out"),
])
def test_a_flag_without_what_it_is_for_is_refused(program, command, says, mistake):
    assert mistake(program, *command.split()) == says


@pytest.mark.parametrize("program, command", [
    ("train", "--method amt --throw low --interval 1"),
    ("train", "--method mae --workers 1 --loader workers"),
    ("train", "--method rmae --regions fh --region-cache a --fh-scales 9"),
    ("train", "--method cae --no-norm-pix"),
    ("train", "--method objmae --regions instances --object-floor 0.1"),
    ("train", "--method mae --base-lr 1 --overwrite"),
    ("eval", "random --task semseg --head upernet --width 9 --drop-path 0.2"),
    ("eval", "random --task semseg --head linear --no-freeze --drop-path 0.2"),
    ("eval", "random --task attention --count 2"),
    ("eval", "random --task attentive --images a.png --data shapes"),
])
def test_flags_that_work_together_are_taken(program, command):
    """The same flags with another value, or without the one that makes them useless."""
    given = PROGRAMS[program].parse(command.split())
    flags = {word.removeprefix("--").removeprefix("no-") for word in command.split() if word.startswith("--")}
    assert {flag.replace("-", "_") for flag in flags} <= given.keys()


def test_pictures_take_no_flags_of_training_alone(run, mistake):
    for name in ("interval", "tau_end", "epochs"):
        message = mistake("eval", run[0] / "checkpoint.pt", "--task", "reconstruct", "--set", f"{name}=1")
        assert message.startswith(f"--set {name}=1: it takes NAME=VALUE; the names are mask_ratio, ")


# Files


def test_a_picture_gets_the_name_it_was_given(run, cli, mistake, tmp_path):
    output, photos, _ = run
    command = [output / "checkpoint.pt", "--task", "reconstruct", "--data", photos, "--output"]
    for name in ("notes.txt", "no ending", "a.b.png"):
        code, out, _ = cli(evaluation, *command, name)
        assert code == 0 and json.loads(out)["picture"] == name
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.png", "no ending", "notes.txt"]
    message = mistake("eval", "random", "--task", "semseg", "--output", "model.png")
    assert message.startswith("--output model.png: it is for the model, and must end in .pt;")
    message = mistake("eval", "random", "--task", "finetune", "--output", "rate-0.001")
    assert message.startswith("--output rate-0.001: it is for the model, and must end in .pt;")


@pytest.mark.parametrize("names, drawn", [
    ("a b c", 3), ("a/0 b/0", 2), ("train/a/0 train/b/0", 2), ("train/0 train/1", 2), ("train/0 val/0", 1),
    ("train/a/0 val/a/0 val/a/1 val/a/2", 3)])
def test_images_without_labels_or_a_val_split_are_drawn(names, drawn, tmp_path):
    write_images(tmp_path, *names.split())
    source, split = evaluation.load_unlabelled(str(tmp_path))
    assert len(source) == drawn and split in ("val", "pretrain")


@pytest.mark.parametrize("file, task", [("checkpoint.pt", "reconstruct"), ("encoder.pt", "attention")])
def test_pictures_need_no_labels(file, task, run, cli, tmp_path):
    write_images(tmp_path, "train/0", "train/1")
    code, out, _ = cli(evaluation, run[0] / file, "--task", task, "--data", tmp_path, "--output", "a.png")
    assert code == 0 and json.loads(out)["picture"] == "a.png"


# Checkpoints


def tiny(value=0.0):
    """The state dict of a ViT of 16x16 pixels whose patch embedding has this bias."""
    torch.manual_seed(0)
    vit = mim.ViT(16, 8, 64, 2, 1)
    torch.nn.init.constant_(vit.patch_embed.proj.bias, value)
    return vit.state_dict()


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("content, says", [
    ({"conv1.weight": torch.zeros(3), "bn1.bias": torch.zeros(3)},
     "no parameter is named patch_embed.proj.weight; it has conv1.weight, bn1.bias)"),
    ({"epoch": 3, "lr": 0.1, "a": 1, "b": 2, "c": 3},
     "no state dict of tensors in it; it has epoch, lr, a, b, ...)"),
    ([torch.zeros(3)], "no state dict of tensors in it; it has no names)"),
    ({name: value for name, value in tiny().items() if name != "cls_token"},
     "lacks 1 of 30 parameters, cls_token first; it has pos_embed, patch_embed.proj.weight, "),
])
def test_a_checkpoints_error_says_what_it_has(content, says, mistake):
    torch.save(content, "some.pt")
    message = mistake("eval", "some.pt", "--task", "attention")
    assert message.startswith("some.pt: it cannot be used (") and says in message


def test_a_foreign_checkpoint_to_resume_says_what_it_has(mistake, tmp_path):
    for content, has in ((tiny(), "cls_token, pos_embed, "), ([torch.zeros(3)], "no names")):
        torch.save(content, tmp_path / "checkpoint.pt")
        message = mistake("train", "--method", "mae", "--output", tmp_path)
        assert f"checkpoint.pt is not a checkpoint of train.py; it has {has}" in message


@pytest.mark.parametrize("name", ["reg_token", "register_tokens", "dist_token", "norm_pre.weight"])
@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_what_would_change_the_output_is_refused_and_not_dropped(name, prefix, mistake):
    """Beside a position table without rows for such tokens, as timm's models with registers have."""
    torch.save(under(prefix, tiny() | {name: torch.zeros(1, 4, 64)}), "some.pt")
    message = mistake("eval", "some.pt", "--task", "knn")
    assert message == f"some.pt: it cannot be used (another architecture: there is no {name} here)"
    with pytest.raises(ValueError, match=name):
        mim.load_encoder(mim.ViT(16, 8, 64, 2, 1), "some.pt")


def test_heads_may_be_left_over(cli):
    torch.save(tiny() | {"head.weight": torch.zeros(9, 64), "fc_norm.weight": torch.zeros(64)}, "some.pt")
    code, _, err = cli(evaluation, "some.pt", "--task", "attention", "--output", "a.png")
    assert code == 0 and "2 left over: head.weight, fc_norm.weight" in err


@pytest.mark.parametrize("content, taken, other", [
    (dict(student=under("module.backbone.", tiny(1.0)), teacher=under("backbone.", tiny(2.0)), epoch=3),
     "teacher.backbone.", "student.module.backbone."),
    (dict(state_dict=under("module.momentum_encoder.", tiny(1.0)) | under("module.base_encoder.", tiny(2.0))),
     "module.base_encoder.", "module.momentum_encoder."),
    (under("student.", tiny(1.0)) | under("teacher.", tiny(2.0)), "teacher.", "student."),
    (dict(encoder=tiny(2.0), target_encoder=tiny(1.0)), "encoder.", "target_encoder."),
], ids=["DINO", "MoCo v3", "one dict", "no known names"])
def test_whose_encoder_is_taken_is_said(content, taken, other, capsys):
    torch.save(content, "some.pt")
    encoder, _ = evaluation.open_encoder("some.pt")
    assert (encoder.patch_embed.proj.bias == 2.0).all()
    assert f"some.pt: the encoder is {taken} and not {other}\n" in capsys.readouterr().err
    assert (mim.vit_from_checkpoint("some.pt")[0].patch_embed.proj.bias == 2.0).all()


def test_of_one_encoder_nothing_is_said(capsys):
    torch.save(under("encoder.", tiny()), "some.pt")
    evaluation.open_encoder("some.pt")
    assert capsys.readouterr().err == ""


def test_a_rank_without_other_processes(mistake, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    said = mistake("train", "--method", "mae", "--limit", 8)
    assert said.startswith("RANK is set, as by torchrun: the processes cannot be joined (")
    assert "WORLD_SIZE" in said
