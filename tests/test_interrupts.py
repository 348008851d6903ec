"""Interrupts and closed streams: whatever happens, a program ends in one line, and what it saved is kept."""

import multiprocessing
import os
import re
import runpy
import signal
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT
from torch.utils.data import get_worker_info
from tqdm import tqdm

import datasets
import eval as evaluation
import train
from datasets import Images, explained, make_loader

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
KEPT = "a checkpoint that was saved is kept, --resume continues from it\n"
TINY = ["--method", "mae", "--model", "nano", "--patch-size", 8, "--batch-size", 8, "--device", "cpu",
        "--decoder-dim", 16, "--decoder-depth", 1]


def running(group):
    """The processes of a process group that still run."""
    left = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, _, its_group = file.read().rsplit(")", 1)[1].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(its_group) == group and state not in "ZX":
            left.append(int(pid))
    return left


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", CODES)
def test_a_signal_in_the_run_is_one_line_and_the_checkpoint_is_kept(start, folder, tmp_path, number, workers):
    program = start(train, *TINY, "--data", folder, "--epochs", 500, "--workers", workers,
                    "--output", tmp_path / "run")
    program.until((tmp_path / "run" / "log.jsonl").exists)
    program.kill(number, group=workers == 2)  # as Ctrl-C does
    program.kill(number)  # the impatient user's second one
    code, _, err = program.wait()
    assert (code, err) == (CODES[number], f"train.py: interrupted ({number.name}); {KEPT}")
    epochs = len((tmp_path / "run" / "log.jsonl").read_text().splitlines())
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] in (epochs - 1, epochs)  # the log is written first
    time.sleep(0.02)
    assert running(program.pid) == []


def test_workers_end_with_a_killed_program(start, folder, tmp_path):
    program = start(train, *TINY, "--data", folder, "--epochs", 500, "--workers", 2,
                    "--output", tmp_path / "run")
    program.until((tmp_path / "run" / "log.jsonl").exists)
    assert len(running(program.pid)) == 3
    program.kill(signal.SIGKILL)
    program.wait()
    time.sleep(0.05)
    assert running(program.pid) == []


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_a_checkpoint_is_written_keeps_the_last(fork, folder, tmp_path, monkeypatch, number):
    save = torch.save

    def save_and_interrupt(state, file):
        save(state, file)
        if state.get("epoch") == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(torch, "save", save_and_interrupt)
    code, _, err = fork(train, *TINY, "--data", folder, "--epochs", 3, "--output", tmp_path / "run")
    assert (code, err) == (CODES[number], f"train.py: interrupted ({number.name}); {KEPT}")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_workers_start_is_one_line(start, folder, tmp_path, monkeypatch, number, group):
    begin = multiprocessing.process.BaseProcess.start

    def begin_and_interrupt(process):
        begin(process)
        (os.killpg if group else os.kill)(os.getpid(), number)

    def command_line():
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", begin_and_interrupt)
        train.become_program("eval.py")
        flags = ["--task", "knn", "--data", folder, "--workers", 2, "--device", "cpu"]
        return train.exit_with_one_line("eval.py", lambda: evaluation.main(["random", *map(str, flags)]))

    program = start(command_line)
    code, _, err = program.wait()
    said = [line for line in err.splitlines(True) if "images" not in line]
    assert (code, said) == (CODES[number], [f"eval.py: interrupted ({number.name}); {KEPT}"])
    time.sleep(0.02)
    assert running(program.pid) == []


@pytest.mark.parametrize("number", CODES)
def test_a_worker_that_was_not_forked_says_nothing(fork, number):
    def worker():
        multiprocessing.current_process().name = "SpawnProcess-1"
        train.become_program("train.py")
        os.kill(os.getpid(), number)

    assert fork(worker) == (CODES[number], "", "")


def test_no_semaphore_is_left_that_python_would_miss(monkeypatch):
    monkeypatch.delattr(tqdm, "_lock", raising=False)
    assert train.exit_with_one_line("train.py", lambda: None) == 0
    assert isinstance(tqdm.get_lock(), type(threading.RLock()))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_workers_share_the_memory_of_the_dataset_whatever_python_does():
    """Python 3.14 starts processes by forkserver, and would give each worker a copy."""
    loader = make_loader(torch.arange(4), 1, batch_size=2)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    assert make_loader(torch.arange(4), batch_size=2).multiprocessing_context is None


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
@pytest.mark.parametrize("number", CODES)
def test_a_signal_during_the_imports_is_one_line(fork, name, number):
    class Interrupting:
        """Sends the signal when train.py imports its first large module."""

        def find_spec(name, *rest):
            if name == "argparse":
                os.kill(os.getpid(), number)

    def program():
        sys.argv = [str(ROOT / name)]
        sys.meta_path.insert(0, Interrupting)
        for module in ("argparse", "train"):
            sys.modules.pop(module, None)
        runpy.run_path(sys.argv[0], run_name="__main__")

    code, out, err = fork(program)
    assert (code, out, err) == (CODES[number], "", f"{name}: interrupted ({number.name}); {KEPT}")


def test_of_several_processes_the_first_speaks(start, folder, tmp_path):
    program = start(train, *TINY, "--data", folder, "--epochs", 500, "--output", tmp_path / "run",
                    processes=2)
    program.until((tmp_path / "run" / "log.jsonl").exists)
    program.kill(signal.SIGTERM)
    codes, _, err = program.wait()
    assert codes == [143, 143]
    assert err.count("interrupted") == 1 and "Traceback" not in err


def test_importing_train_leaves_the_signals_alone():
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # A shell has SIGINT ignored by what it runs in the background.
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)


def test_a_killed_worker_is_not_a_broken_image(fork, folder, tmp_path, monkeypatch):
    decode = datasets.decode

    def killed(*arguments):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out
        return decode(*arguments)

    monkeypatch.setattr(datasets, "decode", killed)
    code, out, err = fork(train, *TINY, "--data", folder, "--workers", 1, "--output", tmp_path / "run")
    assert code == 2 and "broken" not in out + err
    assert err == ("train.py: error: a worker was killed, perhaps because memory or, in a container, shared "
                   "memory (docker run --shm-size) ran out: try fewer --workers\n")


def test_a_worker_killed_while_something_else_is_read_is_no_error_of_that(folder):
    images = iter(make_loader(Images(datasets.load_data(str(folder)), 32), 1, batch_size=2))
    next(images)
    with pytest.raises(RuntimeError, match="DataLoader worker"), explained("a.png", "it cannot be decoded"):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(5)  # until the signal that a child has ended


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_closed_stream_is_no_file_and_no_error(fork, folder, tmp_path, descriptor):
    """As with `2>&-`: else the next file that is opened would receive what is written to stderr."""

    def program():
        os.close(descriptor)
        setattr(sys, [None, "stdout", "stderr"][descriptor], None)
        train.become_program("train.py")
        with open(tmp_path / "other", "w") as file:
            assert file.fileno() > 2
        arguments = [*TINY, "--data", folder, "--epochs", 1, "--output", tmp_path / "run"]
        return train.exit_with_one_line("train.py", lambda: train.main([str(a) for a in arguments]))

    code, out, err = fork(program)
    assert code in (0, None), err
    assert (" done: " in out) == (descriptor == 2) and err == ""
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 1


def test_a_broken_pipe_is_one_line(fork, folder, tmp_path):
    """As with `| head`."""

    def program():
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = open(writer, "w")
        train.become_program("train.py")
        arguments = [*TINY, "--data", folder, "--output", tmp_path / "run"]
        code = train.exit_with_one_line("train.py", lambda: train.main([str(a) for a in arguments]))
        sys.stdout.flush()  # as at the exit
        return code

    code, _, err = fork(program)
    assert (code, err) == (2, "train.py: error: nobody reads its output any more\n")


def test_a_file_name_of_another_encoding_is_escaped(fork, folder, tmp_path):
    """A broken file is named on a terminal that knows only ASCII."""
    root = os.fsencode(tmp_path) + b"/d\xe9/\xff"
    os.makedirs(root)
    for i in range(16):
        os.link(folder / "train" / "a" / "0.png", root + b"/%d.png" % i)
    with open(root + b"/\xc3\xa9.png", "w"):
        pass

    def program():
        sys.stdout = open(1, "w", encoding="ascii", closefd=False)
        train.become_program("train.py")
        data = os.fsdecode(os.path.dirname(root))
        arguments = [*TINY, "--data", data, "--epochs", 1, "--output", tmp_path / "run", "--batch-size", 17]
        return train.exit_with_one_line("train.py", lambda: train.main([str(a) for a in arguments]))

    code, out, err = fork(program)
    assert code in (0, None), err
    assert re.search(r"broken image, another takes its place: .*/d\\udce9/\\udcff/\\xe9.png", out)
