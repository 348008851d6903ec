import contextlib
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

# The same tests everywhere: a GPU's sums are not bit for bit repeatable.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402
from torchvision.io import write_png  # noqa: E402
from tqdm import tqdm  # noqa: E402

torch.set_num_threads(1)  # the tensors are tiny: a second thread costs more than it gives
# The first backward pass starts a thread for each device that there is. It comes here, before test_cuda.py pretends
# that there is a CUDA device: with such a thread, autograd refuses to work in the forks of this process.
torch.zeros((), requires_grad=True).backward()

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    words = "The image decoding and encoding capabilities"
    config.addinivalue_line("filterwarnings", f"ignore:{words}:DeprecationWarning")


@pytest.fixture(scope="session", autouse=True)
def checkout_stays_as_it_is():
    """Tests write below tmp_path alone: after all of them the checkout has the files it had before, unchanged.
    Of what git ignores, such as runs/, where a training may be going on, it need only be there or not."""
    ignored = (ROOT / ".gitignore").read_text().replace("/", "").split()

    def state():
        names = {path.name for path in ROOT.iterdir()} - {"__pycache__", ".pytest_cache"}
        own = [ROOT / name for name in names.difference(ignored, [".git"])]
        files = [path for part in own for path in (part, *part.rglob("*"))]
        stats = {path: path.stat() for path in files if path.is_file() and "__pycache__" not in path.parts}
        return names, {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

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


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """12 images of 44 x 32 pixels: no square, so that a crop, the centre and the whole differ."""
    from datasets import render_scene

    root = tmp_path_factory.mktemp("photos")
    for i in range(12):
        image = torch.from_numpy(render_scene(i, 48)[0])[:, 2:46, :32].contiguous()
        write_png(image, str(root / f"{i:02d}.png"))
    return root


@pytest.fixture
def cli(capsys):
    """Runs a program's command line in this process: cli(module, *arguments) -> (exit code, stdout,
    stderr)."""

    def call(module, *arguments):
        from train import exit_with_one_line

        try:
            given = [str(argument) for argument in arguments]
            code = exit_with_one_line(f"{module.__name__}.py", lambda: module.main(given))
        except KeyboardInterrupt:  # as Ctrl-C's signal ends a program
            code = 130
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def rates(monkeypatch):
    """rates(run) -> (the learning rates of all groups at each optimizer step of run(), its result)."""

    def call(run):
        def step(scaler, optimizer):
            steps.append([group["lr"] for group in optimizer.param_groups])
            return do(scaler, optimizer)

        steps, do = [], torch.amp.GradScaler.step
        with monkeypatch.context() as patch:
            patch.setattr(torch.amp.GradScaler, "step", step)
            return steps, run()

    return call


class Program:
    """A program in forked children of this process, for which the imports are paid already.

    `kill` sends a signal to it, `until` waits for something that it does, `wait` for its end.
    """

    def __init__(self, target, processes, environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.files = [(tempfile.TemporaryFile(), tempfile.TemporaryFile()) for _ in range(processes)]
        self.children = []
        for rank, files in enumerate(self.files):
            variables = dict(environment)
            if processes > 1:  # as torchrun sets them
                variables |= dict(RANK=rank, WORLD_SIZE=processes, LOCAL_RANK=rank,
                                  LOCAL_WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            arguments = (target, variables, files)
            child = multiprocessing.get_context("fork").Process(
                target=run_as_program, args=arguments, name="MainProcess")
            child.start()
            self.children.append(child)
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it may have done so, or ended
                os.setpgid(child.pid, child.pid)

    @property
    def pid(self):
        return self.children[0].pid

    def kill(self, number=signal.SIGKILL, group=False):
        """Sends a signal to each process; with `group` to its own children too, as Ctrl-C does."""
        for child in self.children:
            if child.exitcode is None:
                (os.killpg if group else os.kill)(child.pid, number)

    def until(self, happened, timeout=60):
        """Waits until happened() is true. Fails if the program ends before, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not happened():
            if time.monotonic() > deadline or not any(child.is_alive() for child in self.children):
                raise AssertionError(f"it did not happen: {self.wait(0)}")
            time.sleep(0.005)

    def wait(self, timeout=60):
        """Waits for the end -> (exit code, stdout, stderr). After `timeout` seconds the program is killed.

        The exit code of a process that a signal ended is the signal's negative number. Of several processes
        it is a list, in the order of the ranks; if one fails, the others are ended, as torchrun does.
        """
        deadline = time.monotonic() + timeout
        while alive := [child for child in self.children if child.exitcode is None]:
            if time.monotonic() > deadline:
                self.kill(group=True)
            elif any(child.exitcode for child in self.children):
                self.kill(signal.SIGTERM)
            left = max(0, deadline - time.monotonic())
            multiprocessing.connection.wait([child.sentinel for child in alive], left)
        codes = [child.exitcode for child in self.children]
        return codes if len(codes) > 1 else codes[0], self.stdout, self.stderr

    @property
    def stdout(self):
        """What it has written so far; of several processes, one after the other."""
        return "".join(os.pread(out.fileno(), 10**7, 0).decode() for out, _ in self.files)

    @property
    def stderr(self):
        return "".join(os.pread(err.fileno(), 10**7, 0).decode() for _, err in self.files)


def run_as_program(target, variables, files):
    """Runs target() in a forked child as if it were a program of its own; it returns the exit code, or None
    for 0."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
    os.environ |= {name: str(value) for name, value in variables.items()}
    # tqdm's lock is shared by all forked processes: one that is killed while it holds it would stop them all.
    tqdm.set_lock(threading.RLock())
    sys.exit(target())


@pytest.fixture
def start():
    """start(module, *arguments, processes=1, environment={}) starts a program's command line, or a function
    with these arguments, in a forked child -> Program. If it runs at the end of the test, it is killed."""
    programs = []

    def call(module, *arguments, processes=1, environment={}):
        def command_line():
            from train import become_program, exit_with_one_line

            become_program(f"{module.__name__}.py")
            given = [str(argument) for argument in arguments]
            return exit_with_one_line(f"{module.__name__}.py", lambda: module.main(given))

        is_program = isinstance(module, types.ModuleType)
        target = command_line if is_program else functools.partial(module, *arguments)
        programs.append(Program(target, processes, environment))
        return programs[-1]

    yield call
    for program in programs:
        program.wait(timeout=0)


@pytest.fixture
def fork(start):
    """fork(...) is `start`(...).wait() -> (exit code, or a list of those of several processes, stdout,
    stderr)."""

    def call(*arguments, timeout=60, **options):
        return start(*arguments, **options).wait(timeout)

    return call


def load(path):
    return torch.load(path, weights_only=True)


def log(output):
    """The lines of a run's log, without its speeds."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "seconds")} for line in lines]


def equal(one, other):
    """Whether two values, perhaps dicts or lists of tensors, are the same to the bit."""
    if isinstance(one, dict | list | tuple):
        if type(one) is not type(other) or len(one) != len(other):
            return False
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
        return all(map(equal, one, other))
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def assert_same_run(one, other):
    """Two runs left the same to the bit, except for the speeds in the log and the settings."""
    assert log(one) == log(other)
    a, b = load(one / "checkpoint.pt"), load(other / "checkpoint.pt")
    assert a.keys() == b.keys() and [k for k in a if k != "args" and not equal(a[k], b[k])] == []
    assert (one / "reconstruction.png").read_bytes() == (other / "reconstruction.png").read_bytes()


@contextlib.contextmanager
def after_checkpoints(do):
    """Inside, do(path) is called after each checkpoint.pt that train.py has written."""
    replace = os.replace

    def replace_then_do(temporary, path):
        replace(temporary, path)
        if Path(path).name == "checkpoint.pt":
            do(Path(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_then_do)
        yield


@contextlib.contextmanager
def interrupted_after(epoch):
    """Runs inside are interrupted, as by Ctrl-C, once they have saved this epoch."""

    def interrupt(path):
        if load(path)["epoch"] == epoch:
            raise KeyboardInterrupt

    with after_checkpoints(interrupt):
        yield


@pytest.fixture
def saved():
    """Every checkpoint.pt as it was written, beside the encoder.pt that lay there at this moment."""
    found = []

    def note(path):
        encoder = path.with_name("encoder.pt")
        found.append((load(path), load(encoder) if encoder.exists() else None))

    with after_checkpoints(note):
        yield found


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
