"""What a program must never lose or mix up: files that are not its own, results, what they were made from."""

import os

import pytest
import torch
from PIL import Image

import datasets
import train


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
