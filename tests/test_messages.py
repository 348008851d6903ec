"""What both programs say: one line for every mistake, in words that a user knows, and no flag ignored in silence."""

import json
import shlex

import pytest
import torch
from torchvision.io import write_png

import datasets
import eval as evaluation
import mim
import train

NANO = ["--model", "nano", "--image-size", 16, "--patch-size", 8, "--batch-size", 2, "--epochs", 1]


def one_line(result, program="train"):
    """The message of a run that a mistake stopped: the only line on stderr, and the program's own."""
    code, out, err = result
    assert code == 2 and err.startswith(f"{program}.py: error: ") and err.count("\n") == 1, err
    return err.removeprefix(f"{program}.py: error: ").strip()


def write_images(folder, count, size=16):
    folder.mkdir(parents=True)
    for i in range(count):
        write_png(torch.full((3, size, size), 40 * i, dtype=torch.uint8), str(folder / f"{i}.png"))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch of SimMIM on two plain images, in folders whose names a shell would take apart."""
    root = tmp_path_factory.mktemp("runs")
    photos, output = write_images(root / "my photos; $HOME", 2), root / "it's a run"
    with pytest.MonkeyPatch.context() as patch, open(root / "out", "w") as out:
        patch.setattr("sys.stdout", out)
        train.main([str(a) for a in ["--method", "simmim", "--data", photos, "--output", output, *NANO, "--unit-size", 1]])
    return output, photos, (root / "out").read_text()


# The words


def test_the_next_command_can_be_pasted_into_a_shell(run):
    output, photos, out = run
    command = shlex.split(out.splitlines()[-1].removeprefix("next:"))
    assert command == ["python", "eval.py", f"{output}/checkpoint.pt", "--task", "reconstruct", "--data", str(photos)]


def test_one_thing_is_not_called_several(run, cli, tmp_path):
    output, photos, out = run
    assert "1 epoch done" in out
    assert "a run of 1 epoch:" in one_line(cli(train, "--method", "simmim", "--data", photos, "--output", output))
    write_images(tmp_path / "data" / "a", 1)
    assert datasets.load_folder(str(tmp_path / "data"), "pretrain").description.endswith(", 1 image, 1 class")
    write_images(tmp_path / "data" / "b", 2)
    assert datasets.load_folder(str(tmp_path / "data"), "pretrain").description.endswith(", 3 images, 2 classes")
    message = one_line(cli(train, "--method", "mae", "--data", tmp_path / "data" / "a", "--batch-size", 2))
    assert "--batch-size 2 is more than the 1 image of --data" in message


@pytest.mark.parametrize("content", ["tensors", "many tensors", "picture", "log"])
def test_a_full_disk_is_called_a_full_disk(content, tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("as it was")
    monkeypatch.setattr(train, "open", lambda path, mode: open("/dev/full", "wb"), raising=False)
    write = {"tensors": lambda to: torch.save(dict(a=torch.zeros(3)), to),
             "many tensors": lambda to: torch.save(dict(a=torch.zeros(3_000_000)), to),
             "log": lambda to: to.write(b"a line")}.get(content)
    with pytest.raises(datasets.UsageError) as error:
        if content == "picture":
            train.save_picture(tmp_path / "kept", torch.zeros(3, 9, 9), "train.py")
        else:
            train.write_atomically(tmp_path / "kept", write)
    assert str(error.value) == f"cannot write {tmp_path}/kept: what was there before is kept (the disk is full)"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_text() == "as it was"


@pytest.mark.parametrize("error, says", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                  "tried to allocate 9 bytes."), "out of memory: use fewer or smaller images a step"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
     "out of memory: use fewer or smaller images a step"),
    (MemoryError(), "out of memory: use fewer or smaller images a step"),
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


def test_pythons_and_torchs_names_for_things_are_left_out(run, cli, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    output, *_ = run
    message = one_line(cli(evaluation, output / "encoder.pt", "--task", "attention", "--images", "text.png"), "eval")
    assert message == "--images text.png: it cannot be used as an image (cannot identify image file)"
    with pytest.raises(datasets.UsageError, match=r"^a: b \(. unexpected pos 64 vs 0\)$"), datasets.explained("a", "b"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


# Values


@pytest.mark.parametrize("program, command", [
    (train, "--method objmae"), (train, "--method cae"),
    (evaluation, "random --task finetune"), (evaluation, "random --task attention")])
def test_no_flag_takes_an_empty_string(program, command, cli):
    parsers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Parser, "parse", lambda parser, argv: parsers.append(parser))
        with pytest.raises(TypeError):
            program.main(command.split())
    flags = {a.option_strings[-1] for a in parsers[0]._actions if a.option_strings and a.nargs != 0}
    assert {"--data", "--device", "--output"} <= flags and len(flags) > 15
    for flag in flags - {"--method", "--task"}:
        message = one_line(cli(program, *command.split(), flag, ""), program.__name__)
        assert flag.lstrip("-") in message and ("empty string" in message or "''" in message)
        assert one_line(cli(program, *command.split(), f"{flag}="), program.__name__) == message
    assert one_line(cli(train, "--method", "")).startswith("--method invalid choice: ''")
    assert one_line(cli(evaluation, "", "--task", "knn"), "eval") == "checkpoint is an empty string"
    assert one_line(cli(evaluation, "", "--task", "reconstruct"), "eval") == "checkpoint is an empty string"
    assert one_line(cli(evaluation, "random", "--task", "attention", "--images", "a.png", ""),
                    "eval") == "images is an empty string"


@pytest.mark.parametrize("name", ["meta", "mps", "xla", "cuda:99", "cuda", "gpu", "opengl", "privateuseone", "cpu:x"])
def test_a_device_that_is_not_there_is_one_line(name, cli):
    message = one_line(cli(train, "--method", "mae", "--device", name))
    named = "cuda:0" if name == "cuda" else name
    assert message == f"--device {named}: it cannot be used here; there is cpu"


def test_more_workers_than_a_machine_bears_are_refused(monkeypatch):
    monkeypatch.setattr(train, "cores", lambda: 2)
    assert train.open_device(workers=16)[2] == 16
    with pytest.raises(datasets.UsageError, match="^--workers 17: at most 8 for each core, here 16$"):
        train.open_device(workers=17)


# Files


def test_a_picture_gets_the_name_it_was_given(run, cli, tmp_path):
    output, photos, _ = run
    command = [output / "checkpoint.pt", "--task", "reconstruct", "--data", photos, "--output"]
    for name in ("notes.txt", "no ending", "a.b.png"):
        code, out, _ = cli(evaluation, *command, name)
        assert code == 0 and json.loads(out)["picture"] == name
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.png", "no ending", "notes.txt"]
    message = one_line(cli(evaluation, "random", "--task", "semseg", "--output", "model.png"), "eval")
    assert message == "--output model.png: it is for the model; a picture beside it ends in .png"
