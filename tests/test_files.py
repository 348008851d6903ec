"""Files of all kinds: only regular files are read, folders once, headers before pixels, and no stale maps."""

import os
import runpy
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import eval as evaluation
from datasets import Images, UsageError, decode, find_files, load_data, open_regions, read_ids


def save(path, colour=128, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, colour, colour)).save(path)


def test_only_regular_files_are_found(tmp_path):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "fifo.png")
    os.symlink("/dev/zero", tmp_path / "device.png")
    os.symlink(tmp_path / "nothing", tmp_path / "dangling.png")
    (tmp_path / "folder.png").mkdir()
    os.symlink(tmp_path / "a.png", tmp_path / "link.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.png"))
        assert find_files(tmp_path) == ["a.png", "link.png"]


def test_fifos_and_devices_are_not_read(cli, tmp_path):
    """Reading them would never end."""
    os.mkfifo(tmp_path / "fifo.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    for name in ("fifo.png", "zero.png"):
        for read in (decode, read_ids):
            with pytest.raises(OSError, match=f"{name} is not a regular file"):
                read(tmp_path / name)
    assert datasets.longer_side(tmp_path / "fifo.png") == 224
    given, path = ["random", "--task", "attention", "--output", tmp_path / "out.png"], tmp_path / "fifo.png"
    code, _, err = cli(evaluation, *given, "--images", path)
    assert code == 2 and err.startswith(f"eval.py: error: --images {path}: ") and err.count("\n") == 1


def test_a_link_upwards_adds_nothing(tmp_path):
    for i in range(3):
        save(tmp_path / "data" / "a" / f"{i}.png")
    save(tmp_path / "outside.png")
    expected = ["a/0.png", "a/1.png", "a/2.png"]
    links = {"a/up": "..", "a/self": ".", "above": tmp_path, "a/again": tmp_path / "data" / "a"}
    for link, target in links.items():
        os.symlink(target, tmp_path / "data" / link)
        assert find_files(tmp_path / "data") == expected
    os.symlink(tmp_path / "data", tmp_path / "entrance")
    assert find_files(tmp_path / "entrance") == expected  # the folder itself may be a link
    assert find_files(os.path.relpath(tmp_path / "data")) == expected


def test_linked_folders_are_visited_once_and_real_ones_first(tmp_path):
    save(tmp_path / "elsewhere" / "cat" / "1.png")
    save(tmp_path / "data" / "z" / "deep" / "2.png")
    os.symlink(tmp_path / "data" / "z" / "deep", tmp_path / "data" / "a")  # the same as z/deep
    for name in ("y", "x"):  # classes of another data set
        os.symlink(tmp_path / "elsewhere", tmp_path / "data" / name)
    assert find_files(tmp_path / "data") == ["x/cat/1.png", "z/deep/2.png"]


def test_hidden_files_and_other_extensions_are_left_out(tmp_path):
    for name in ("b.PNG", ".b.png", ".hidden/b.png", "c/d.e/f.jpeg"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert find_files(tmp_path) == ["b.PNG", "c/d.e/f.jpeg"]
    assert find_files(tmp_path, (".txt",)) == ["notes.txt"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "b" / "1.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # for root, every folder is readable
    with pytest.raises(UsageError, match=f"^data: {tmp_path}/b cannot be read .*Permission denied"):
        load_data(str(tmp_path))
    with pytest.raises(UsageError, match=f"^data: there is no {tmp_path}/c"):
        find_files(tmp_path / "c")


def test_files_in_folders_are_not_looked_at_one_by_one(tmp_path, monkeypatch):
    """Data sets have millions of files: what kind each is, the folder says."""
    for i in range(50):
        (tmp_path / f"{i}.png").touch()
    looked = []
    for name in ("stat", "lstat"):
        look = getattr(os, name)

        def look_and_note(path, *rest, look=look, **options):
            looked.append(path)
            return look(path, *rest, **options)

        monkeypatch.setattr(os, name, look_and_note)
    assert len(find_files(tmp_path)) == 50
    assert not [path for path in looked if str(path).endswith(".png")]


def png(width, height, data=b""):
    """A PNG file whose header says width x height."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_an_enormous_image_is_refused_by_its_header(tmp_path, monkeypatch, kind):
    path = tmp_path / f"bomb.{kind}"
    if kind == "jpg":
        save(path)
        data = bytearray(path.read_bytes())
        place = data.index(b"\xff\xc0") + 5  # height and width in the start of frame
        data[place:place + 4] = struct.pack(">HH", 65000, 65000)
        path.write_bytes(data)
    else:
        path.write_bytes(png(65000, 65000))
    monkeypatch.setattr(datasets, "decode_image", lambda *rest, **options: pytest.fail("it was decoded"))
    with pytest.raises(Image.DecompressionBombError, match="4225000000 pixels"):
        decode(path)
    save(tmp_path / "good.png")
    item = Images(load_data(str(tmp_path)), 16, "center")[0]
    assert (item["index"], item["broken"]) == (1, 0)  # as every broken image


def test_a_large_photo_is_read_without_a_warning(tmp_path):
    """Pillow warns from 89 million pixels on."""
    path = tmp_path / "large.png"
    path.write_bytes(png(10_000, 10_000))
    with warnings.catch_warnings(record=True) as said:
        module = runpy.run_path(datasets.__file__)  # pytest undid the filters of its import
        assert module["longer_side"](path) == 10_000
    assert said == []


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_pixel_that_is_not_finite_leaves_the_others(tmp_path, value):
    pixels = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for largest, name in ((1, "one.tif"), (1000, "many.tif")):
        written = pixels * largest
        written[3, 5] = value
        Image.fromarray(written).save(tmp_path / name)
        expected = np.rint(255 * pixels)
        expected[3, 5] = 0
        got = decode(tmp_path / name)
        assert got.shape == (3, 16, 16) and np.abs(got.numpy() - expected).max() <= 1


def test_maps_of_a_replaced_image_are_not_used(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{i}.png")
    source = load_data(str(tmp_path))
    regions = open_regions("fh", source, str(tmp_path), region_cache=str(tmp_path / "cache"))
    regions.fill()
    before = [regions.read(i, source[i]) for i in range(2)]
    assert len(find_files(tmp_path / "cache", (".npz",))) == 2
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "1.png")
    now = [regions.read(i, source[i]) for i in range(2)]
    assert torch.equal(now[0], before[0]) and not torch.equal(now[1], before[1])
    fresh = open_regions("fh", source, str(tmp_path), region_cache=str(tmp_path / "fresh"))
    assert torch.equal(now[1], fresh.read(1, source[1]))
    regions.fill()
    assert len(find_files(tmp_path / "cache", (".npz",))) == 3 and os.path.exists(regions.path(1))
    os.utime(tmp_path / "0.png", ns=(0, 10**18))  # another image of the same size
    assert not os.path.exists(regions.path(0))


def test_labels_may_have_a_transparency(tmp_path):
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(np.stack([labels, np.full_like(labels, 255)], axis=2), "LA").save(tmp_path / "a.png")
    assert np.array_equal(read_ids(tmp_path / "a.png"), labels)
