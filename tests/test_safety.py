"""What a program must never lose or mix up: files that are not its own, results, what they were made from."""

import contextlib
import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.io import write_png

import datasets
import eval as evaluation
import mim
import train
from conftest import interrupted_after, load

# ---------------------------------------------------------------------------------------------------------
# Written files


def test_a_temporary_file_spares_the_users(tmp_path):
    """Neither a user's NAME.tmp nor what a link of this name points to is touched, and none is left."""
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "a.tmp").symlink_to(tmp_path / "mine")
    (tmp_path / "b.tmp").write_bytes(b"b")
    for name in "ab":
        train.write_atomically(tmp_path / name, lambda file: file.write(b"new"))
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert content == {"mine": b"mine", "a.tmp": b"mine", "b.tmp": b"b", "a": b"new", "b": b"new"}


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    def outer(file):
        file.write(b"one ")
        file.flush()
        train.write_atomically(tmp_path / "a", lambda other: other.write(b"another"))
        assert (tmp_path / "a").read_bytes() == b"another"
        file.write(b"whole")

    train.write_atomically(tmp_path / "a", outer)
    assert (tmp_path / "a").read_bytes() == b"one whole" and os.listdir(tmp_path) == ["a"]


def test_a_failed_write_keeps_what_was_there(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("no more")

    with pytest.raises(datasets.UsageError, match="cannot write .*what was there before is kept .no more"):
        train.write_atomically(tmp_path / "a", fail)
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_picture_says_of_which_task_it_is(tmp_path):
    image = torch.arange(3 * 16 * 16).remainder(256).view(3, 16, 16)
    train.save_picture(tmp_path / "a.png", image / 255, "attention")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info["task"] == "attention" and picture.mode == "RGB"
        assert torch.equal(train.TF.pil_to_tensor(picture).long(), image)


# ---------------------------------------------------------------------------------------------------------
# Whose a file is

TINY = ["--model", "nano", "--image-size", 16, "--patch-size", 4, "--batch-size", 4]
DECODER = ["--decoder-dim", 16, "--decoder-depth", 1, "--decoder-heads", 2]


@pytest.fixture(autouse=True)
def smaller_nano(monkeypatch):
    monkeypatch.setitem(mim.SIZES, "nano", dict(embed_dim=16, depth=1, num_heads=2))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two folders, one and other, of 8 training and 4 validation images of other names in classes a and b."""
    root = tmp_path_factory.mktemp("images")
    for folder, first in (("one", 0), ("other", 20)):
        for split, count in (("train", 8), ("val", 4)):
            for i in range(first, first + count):
                path = root / folder / split / "ab"[i % 2] / f"{i:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = datasets.render_scene(i, 16)[0]
                write_png(torch.from_numpy(image), str(path))
    return root


@pytest.fixture
def pretrain(cli, images):
    """pretrain(*flags) -> (exit code, stderr) of a run of AMT."""

    def run(*flags, data=images / "one", method="amt"):
        tiny = [*TINY, *DECODER, "--epochs", 3] if "--resume" not in flags else []
        code, _, err = cli(train, "--method", method, "--data", data, "--output", "run", *tiny, *flags)
        return code, err

    return run


@pytest.fixture(scope="module")
def kept(images, tmp_path_factory):
    """The checkpoint of AMT after two epochs of three."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, interrupted_after(2):
        patch.chdir(folder)
        patch.setitem(mim.SIZES, "nano", dict(embed_dim=16, depth=1, num_heads=2))
        flags = ["--method", "amt", "--data", images / "one", "--output", "run", *TINY, *DECODER]
        with pytest.raises(KeyboardInterrupt):
            train.main([str(flag) for flag in [*flags, "--interval", 1, "--epochs", 3]])
    return load(folder / "run" / "checkpoint.pt")


@pytest.fixture
def evaluate(cli, images):
    """evaluate(task, *flags) -> (exit code, stderr) of a task on an encoder, encoder.pt."""
    torch.manual_seed(0)
    torch.save(mim.ViT(16, 4, **mim.SIZES["nano"]).state_dict(), "encoder.pt")

    def run(task, *flags, data=images / "one", encoder="encoder.pt"):
        settings = ["--epochs", 2, "--batch-size", 4] if task == "finetune" else []
        code, _, err = cli(evaluation, encoder, "--task", task, "--data", data, *settings, *flags)
        return code, err

    return run


@pytest.mark.parametrize("name", ["checkpoint.pt", "encoder.pt", "encoder-10.pt", "log.jsonl",
                                  "reconstruction.png"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_run_does_not_overwrite_others_files(pretrain, name, overwrite):
    os.mkdir("run")
    torch.save({"mine": torch.zeros(1)}, f"run/{name}")
    before = Path("run", name).read_bytes()
    code, err = pretrain(*overwrite)
    words = "is not a checkpoint of train.py" if name == "checkpoint.pt" else f"run holds {name} but no"
    assert code == 2 and words in err and err.count("\n") == 1
    assert os.listdir("run") == [name] and Path("run", name).read_bytes() == before


@pytest.mark.parametrize("place", ["link", "dangling link", "folder", "device"])
def test_nothing_is_written_through_links_or_onto_devices(pretrain, evaluate, place):
    path = dict(device="/dev/null").get(place, place)
    if "link" in place:
        Path("target").write_text("target" if place == "link" else "")
        os.symlink("target" if place == "link" else "nowhere", path)
    if place == "folder":
        os.mkdir(path)
    for task, flags in (("attention", []), ("finetune", []), ("finetune", ["--overwrite"]),
                        ("finetune", ["--resume"])):
        code, err = evaluate(task, "--output", path, *flags)
        assert code == 2 and f"--output {path}: it is a folder, a link or a device" in err, err
    if "link" in place:
        os.mkdir("run")
        os.symlink("../target", "run/encoder.pt")
        code, err = pretrain("--overwrite")
        assert code == 2 and "run/encoder.pt: it is a folder, a link or a device" in err
        assert Path("target").read_text() == ("target" if place == "link" else "")


def test_an_evaluation_does_not_overwrite_what_is_not_its_own(evaluate, kept, images):
    torch.save(kept, "checkpoint.pt")
    Path("photo.png").write_bytes((images / "one" / "val" / "a" / "00.png").read_bytes())
    train.save_picture("reconstruction.png", torch.zeros(3, 8, 8), "pretrain")
    before = {name: Path(name).read_bytes() for name in ("encoder.pt", "checkpoint.pt", "photo.png",
                                                         "reconstruction.png")}
    for name in before:
        for task, flags in (("finetune", []), ("finetune", ["--overwrite"]), ("attention", [])):
            code, err = evaluate(task, "--output", name, *flags)
            assert code == 2 and f"--output {name}: it is " in err and err.count("\n") == 1, err
    os.mkdir("beside")
    for name, task in (("attention.png", "attention"), ("finetune.pt", "finetune"), ("semseg.png", "semseg"),
                       ("detect.jsonl", "detect")):
        # where the result would lie if --output were not given
        Path(name).write_text(mine := '{"task": ["mine"]}' if name == "detect.jsonl" else "mine")
        code, err = evaluate(task)
        assert code == 2 and f"--output {name}: it is no result of eval.py" in err
        assert Path(name).read_text() == mine
    assert all(Path(name).read_bytes() == content for name, content in before.items())


def test_a_result_is_overwritten_on_demand_and_a_picture_always(evaluate):
    assert evaluate("attention")[0] == evaluate("attention", "--query", 1)[0] == 0
    assert evaluate("finetune", "--epochs", 1)[0] == 0
    before = Path("finetune.pt").read_bytes()
    code, err = evaluate("finetune", "--epochs", 1)
    assert code == 2 and "it holds a result: --resume goes on from it, --overwrite starts anew" in err
    assert Path("finetune.pt").read_bytes() == before
    code, err = evaluate("finetune", "--epochs", 1, "--seed", 1, "--overwrite")
    assert code == 0 and Path("finetune.pt").read_bytes() != before, err
    before = Path("finetune.pt").read_bytes()
    code, err = evaluate("attention", "--output", "finetune.pt")
    assert code == 2 and "--output finetune.pt: it is for the picture" in err
    code, err = evaluate("semseg", "--output", "finetune.pt", "--overwrite", encoder="finetune.pt")
    assert code == 2 and "or the checkpoint itself" in err and Path("finetune.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------
# What is resumed


def test_a_moved_folder_resumes_and_another_does_not(pretrain, evaluate, kept, images, tmp_path):
    os.mkdir("run")
    torch.save(kept, "run/checkpoint.pt")
    code, err = pretrain("--resume", data=images / "other")
    assert code == 2 and "the run was started with other images than" in err and err.count("\n") == 1
    shutil.copytree(images / "one", tmp_path / "moved")
    assert pretrain("--resume", data=tmp_path / "moved")[0] == 0
    assert evaluate("finetune")[0] == 0
    assert evaluate("finetune", "--resume", data=tmp_path / "moved")[0] == 0
    code, err = evaluate("finetune", "--resume", data=images / "other")
    assert code == 2 and "finetune.pt was made with other images;" in err, err


def test_the_images_digest_depends_on_names_order_and_limit(images):
    digests = [datasets.load_data(*arguments, limit=limit).digest() for limit in (None, 3)
               for arguments in ((str(images / "one"), "train"), (str(images / "one"), "val"),
                                 (str(images / "other"), "train"), ("shapes", "train"), ("shapes", "val"))]
    assert len(set(digests)) == 10
    source = datasets.load_data(str(images / "one"), "train")
    source.order = source.order[::-1]
    assert source.digest() != digests[0]


def test_another_encoders_result_is_not_continued(evaluate):
    assert evaluate("finetune", "--output", "out.pt")[0] == 0
    torch.save(mim.ViT(16, 4, **mim.SIZES["nano"]).state_dict(), "other.pt")
    code, err = evaluate("finetune", "--output", "out.pt", "--resume", encoder="other.pt")
    assert code == 2 and "out.pt was made with another encoder;" in err.splitlines()[-1], err
    state = torch.load("encoder.pt", weights_only=True)
    torch.save({name: value.clone() for name, value in state.items()}, "copy.pt")
    assert evaluate("finetune", "--output", "out.pt", "--resume", encoder="copy.pt")[0] == 0


def test_resume_starts_goes_on_or_refuses_fewer_epochs(pretrain, evaluate, kept):
    assert evaluate("finetune", "--resume")[0] == 0  # nothing is there yet
    before = load("finetune.pt")
    assert before["epoch"] == 2
    assert evaluate("finetune", "--resume")[0] == 0  # it only evaluates
    after = load("finetune.pt")["model"]
    assert all(torch.equal(value, after[name]) for name, value in before["model"].items())
    code, err = evaluate("finetune", "--resume", "--epochs", 1)
    assert code == 2 and "finetune.pt was made with epochs 2, not 1" in err
    os.mkdir("run")
    torch.save(kept, "run/checkpoint.pt")
    code, err = pretrain("--resume", "--epochs", 1)
    assert code == 2 and "--epochs 1: the run to resume has had 2" in err
    assert load("run/checkpoint.pt")["epoch"] == 2
    assert pretrain("--resume", "--epochs", 2)[0] == 0 and load("run/checkpoint.pt")["epoch"] == 2


def test_a_notebooks_finetuning_resumes_on_plain_data(tmp_path):
    encoder = mim.ViT(16, 4, **mim.SIZES["nano"])
    data = torch.rand(8, 3, 16, 16), torch.arange(8) % 2
    more = torch.rand(12, 3, 16, 16), torch.arange(12) % 2
    settings = dict(epochs=2, batch_size=4, output=tmp_path / "a.pt", resume=True)
    first = evaluation.finetune(encoder, data, data, **settings)
    assert evaluation.finetune(encoder, data, data, **settings) == first
    with pytest.raises(datasets.UsageError, match="was made with other images;"):
        evaluation.finetune(encoder, more, data, **settings)


# ---------------------------------------------------------------------------------------------------------
# Damaged and crafted checkpoints


def changed(content, path, value):
    """A copy of nested dicts with another value at a path of keys, which a function may compute from the
    old one; ... leaves the key out."""
    if not path:
        return value(content) if callable(value) else value
    if len(path) == 1 and value is ...:
        return {key: old for key, old in content.items() if key != path[0]}
    return content | {path[0]: changed(content[path[0]], path[1:], value)}


WEIGHT = "base.encoder.patch_embed.proj.weight"
NAN = float("nan")
DAMAGE = {  # of train.py's checkpoint. Words of the error message: places and values
    "cannot be used": [
        (["epoch"], ...), (["args", "method"], "x"), (["args", "method"], []), (["args", "base"], "x")],
    "cannot be used (its setting": [
        (["epoch"], -1), (["epoch"], None), (["epoch"], 1.5), (["epoch"], True), (["epoch"], "a"),
        (["args", "image_size"], "a"), (["args", "image_size"], []), (["args", "image_size"], [16, "a"]),
        (["args", "lr"], NAN), (["args", "lr"], -1.0), (["args", "precision"], "fp8"),
        (["args", "batch_size"], True), (["args", "batch_size"], "4"), (["args", "epochs"], torch.tensor(3)),
        (["args", "epochs"], [3]), (["args", "norm_pix"], 1),
        (["args", "throw"], "all"), (["args", "data"], 3), (["args", "seed"], {}),
        (["args", "mask_ratio"], "0.5")],
    "does not fit the settings": [
        (["model"], ...), (["model"], 3), (["model", WEIGHT], ...), (["model", WEIGHT], None),
        (["model", WEIGHT], lambda w: w.double()), (["model", WEIGHT], lambda w: w[:1]),
        (["model", WEIGHT], lambda w: w * NAN), (["optimizer"], ...), (["optimizer"], {}),
        (["optimizer", 0], ...), (["optimizer", 0], {}), (["optimizer", 0, "step"], torch.zeros(0)),
        (["optimizer", 0, "step"], 2.0), (["optimizer", 0, "step"], torch.tensor(2)),
        (["optimizer", 0, "exp_avg"], ...), (["optimizer", 0, "exp_avg"], torch.zeros(1)),
        (["optimizer", 0, "exp_avg"], lambda m: m.half()), (["optimizer", 0, "exp_avg"], lambda m: m * NAN),
        (["optimizer", 0, "exp_avg_sq"], lambda v: v[None]), (["scaler"], ...), (["maps"], torch.zeros(3)),
        (["maps"], lambda maps: maps[:1]), (["maps"], lambda maps: maps.float()),
        (["maps"], lambda maps: maps * NAN), (["maps"], "a")],
}
CASES = [(words, *case) for words, cases in DAMAGE.items() for case in cases]


def test_a_damaged_checkpoint_is_not_resumed(pretrain, kept):
    os.mkdir("run")
    for words, path, value in CASES:
        torch.save(changed(kept, path, value), "run/checkpoint.pt")
        code, err = pretrain("--resume")
        assert code == 2 and words in err and err.count("\n") == 1, (path, value, err)
    for name in ("lr", "precision"):  # None is a value of these flags, from which the same follows as before
        torch.save(changed(kept, ["args", name], None), "run/checkpoint.pt")
        assert pretrain("--resume")[0] == 0 and load("run/checkpoint.pt")["epoch"] == 3
        assert load("run/checkpoint.pt")["args"][name] == kept["args"][name]
    for name in ("optimizer", "model"):  # one number in the place of many: nothing is written past it
        first = next(iter(kept[name]))
        path = [name, first, "exp_avg"] if name == "optimizer" else [name, first]
        torch.save(changed(kept, path, lambda m: torch.zeros(1).expand(m.shape)), "run/checkpoint.pt")
        assert pretrain("--resume")[0] == 0 and load("run/checkpoint.pt")["epoch"] == 3


def test_a_run_of_an_older_version_goes_on_with_the_default_of_a_new_setting(pretrain, kept):
    os.mkdir("run")
    torch.save(changed(kept, ["args", "norm_pix"], ...), "run/checkpoint.pt")
    assert pretrain()[0] == 2 and load("run/checkpoint.pt")["epoch"] == kept["epoch"]
    assert pretrain("--resume")[0] == 0
    state = load("run/checkpoint.pt")
    assert state["epoch"] == 3 and state["args"]["norm_pix"] is True


@pytest.mark.parametrize("scaler", [dict(scale=0.0), dict(scale="a"), dict(scale=...),
                                    dict(_growth_tracker=-1)])
def test_a_damaged_loss_scale_is_not_resumed(scaler):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    own = torch.amp.GradScaler("cpu", init_scale=4.0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict()["state"], scaler=own.state_dict())
    state = copy.deepcopy(state)
    train.restore(state, model, optimizer, own, 1)
    assert own.get_scale() == 4.0 and optimizer.state[model.weight]["step"] == 1
    for name, value in scaler.items():
        with pytest.raises(datasets.UsageError, match="--resume: the checkpoint does not fit the settings"):
            train.restore(changed(state, ["scaler", name], value), model, optimizer, own, 1)


def test_damaged_files_are_not_evaluated(evaluate, kept):
    cases = [(words, path, value) for words, path, value in CASES
             if path[0] in ("args", "model") and path[-1] not in ("lr", "precision", "epochs")]
    for words, path, value in cases:
        if value is not ... and not (path == ["model", WEIGHT] and callable(value)):
            torch.save(changed(kept, path, value), "bad.pt")
            code, err = evaluate("reconstruct", encoder="bad.pt")
            assert code == 2 and "bad.pt" in err and err.count("\n") == 1, (path, value, err)
    for change in (lambda w: w * NAN, lambda w: w.long(), lambda w: w > 0, lambda w: w.to(torch.complex64)):
        torch.save(changed(kept, ["model", WEIGHT], change), "bad.pt")
        for task in ("reconstruct", "knn"):
            code, err = evaluate(task, encoder="bad.pt")
            assert code == 2 and err.splitlines()[-1].startswith("eval.py: error: bad.pt: "), err
    assert evaluate("finetune", "--output", "out.pt")[0] == 0
    result = load("out.pt")
    first = next(iter(result["model"]))
    for path, value in ((["epoch"], None), (["epoch"], 3), (["args"], ...), (["args"], "a"),
                        (["args", "seed"], torch.zeros(2)), (["model", first], torch.zeros(1)),
                        (["optimizer", 0, "exp_avg"], torch.zeros(1)), (["optimizer"], ...)):
        torch.save(changed(result, path, value), "out.pt")
        code, err = evaluate("finetune", "--output", "out.pt", "--resume")
        assert code == 2 and err.splitlines()[-1].startswith("eval.py: error: --"), (path, value, err)


def test_a_damaged_tokenizer_is_not_used():
    options = dict(vocab_size=16, hidden_dim=8, groups=2, blocks_per_group=1)
    tokenizer = mim.DVAE(16, **options)
    args = dict(method="dvae", image_size=[16, 16], **options)
    state = dict(model=tokenizer.state_dict(), args=args)
    first = next(iter(state["model"]))
    torch.save(state, "tokenizer.pt")
    assert train.load_tokenizer("tokenizer.pt").vocab_size == 16
    for path, value in ((["args", "vocab_size"], "16"), (["args", "hidden_dim"], None),
                        (["args", "groups"], 2.5), (["args", "image_size"], "a"), (["args", "method"], 3),
                        (["model"], 3), (["model", first], torch.zeros(1)),
                        (["model", first], lambda w: w * NAN)):
        torch.save(changed(state, path, value), "tokenizer.pt")
        with pytest.raises(datasets.UsageError, match="tokenizer.pt: "):
            train.load_tokenizer("tokenizer.pt")


def test_overwrite_deletes_what_the_run_made_and_nothing_else(pretrain, images):
    assert pretrain("--save-every", 1)[0] == 0
    Path("run", "encoder-best.pt").write_bytes(b"mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.torch.nn.utils, "clip_grad_norm_", lambda *_: 1 / 0)  # before the first step
        with pytest.raises(ZeroDivisionError):
            pretrain("--overwrite", "--clip-grad", 1)
    assert sorted(os.listdir("run")) == ["checkpoint.pt", "encoder-best.pt"]


def test_a_run_is_not_among_its_images_and_not_written_over_its_tokenizer(cli, images, monkeypatch):
    shutil.copytree(images / "one" / "train", "photos")
    monkeypatch.chdir("photos")
    flags = ["--method", "mae", "--data", ".", *TINY, *DECODER]
    assert cli(train, *flags, "--epochs", 1)[0] == 0 and Path("runs/mae/reconstruction.png").exists()
    code, out, err = cli(train, *flags, "--epochs", 2, "--resume")
    assert code == 0 and "8 images, 2 classes (a, b)" in out, err
    code, _, err = cli(train, *flags, "--epochs", 1, "--output", ".")
    assert code == 2 and "--output .: it is the folder of the images, and the picture would be one" in err
    code, _, err = cli(train, "--method", "beit", "--tokenizer", "runs/mae/checkpoint.pt", "--output", "runs/mae",
                       "--overwrite")
    assert code == 2 and "--output runs/mae: it holds the tokenizer, which the run would overwrite" in err
    Path("runs/mae/encoder-1.pt").touch()
    for name in ("encoder.pt", "encoder-1.pt", "own.pt"):  # another file of that folder is not in the way
        with contextlib.nullcontext() if name == "own.pt" else pytest.raises(datasets.UsageError):
            train.open_output("beit", "runs/mae", overwrite=True, tokenizer=f"runs/mae/{name}")


def test_masks_are_not_among_the_images(cli, images):
    shutil.copytree(images / "one" / "train" / "a", "photos")
    shutil.copytree("photos", "photos/masks")
    flags = ["--method", "rmae", *TINY, *DECODER, "--epochs", 1]
    code, _, err = cli(train, *flags, "--data", "photos", "--regions", "photos/masks")
    assert code == 2 and "--regions photos/masks is among the images of --data" in err
    shutil.move("photos/masks", "masks")
    code, _, err = cli(train, *flags, "--data", "photos", "--regions", "photos")
    assert code == 2 and "--regions photos is the folder of --data, and its PNG files are images" in err
    code, out, err = cli(train, *flags, "--data", "photos", "--regions", "masks")
    assert code == 0 and "images without regions" not in out, err
    next(Path("masks").glob("*.png")).unlink()
    code, out, err = cli(train, *flags, "--data", "photos", "--regions", "masks", "--overwrite")
    assert code == 0 and "images without regions: 1 of 4" in out, err


def test_an_encoders_heads_and_sides_are_kept(tmp_path):
    source = datasets.Shapes()
    source.order = source.order[:16]
    method = mim.MAE(mim.ViT((32, 16), 8, 64, 1, 4), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    train.pretrain(method, source, output=tmp_path, epochs=1, batch_size=8, warmup_epochs=0, lr_batch=256,
                   betas=(0.9, 0.95), crop_scale=(0.2, 1.0), flip=True)
    encoder, _ = mim.vit_from_checkpoint(tmp_path / "encoder.pt")
    assert encoder.num_heads == 4 and encoder.image_size == (32, 16)
    x = torch.randn(2, 3, 32, 16)
    assert torch.equal(encoder.eval()(x), method.encoder.eval()(x))
    opened, _ = evaluation.open_encoder(tmp_path / "encoder.pt")
    assert opened.num_heads == 4 and opened.image_size == (32, 16)


def test_pictures_of_two_epochs_and_predictions_of_two_models_lie_side_by_side(evaluate):
    for name in ("encoder-1.pt", "encoder-2.pt"):
        shutil.copy("encoder.pt", name)
        assert evaluate("attention", encoder=name)[0] == 0
    assert evaluate("attention")[0] == 0
    assert {"attention.png", "attention-1.png", "attention-2.png"} <= set(os.listdir())
    photo = "photo.png"
    write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), photo)
    for name in ("one.pt", "finetune.pt"):
        assert evaluate("finetune", "--output", name)[0] == 0
    evaluation.main(["one.pt", "--task", "finetune", "--images", photo])
    evaluation.main(["finetune.pt", "--task", "finetune", "--images", photo])
    assert {"one-predictions.json", "finetune-predictions.json"} <= set(os.listdir())
