"""Several processes train as one does, and a run that was killed continues bit for bit."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import pytest
import torch
from torch.distributed.run import get_args_parser

SCRIPT = Path(__file__).parents[2] / "examples" / "train_ddp.py"
STEPS = 30


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes: dark and bright images, of several sizes and kinds."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    draw = random.Random(0)
    for name, start in (("bright", 100), ("dark", 0)):
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("no image")
        for number in range(10):
            size = draw.randint(5, 9), draw.randint(5, 9)
            pixels = bytes(draw.randint(start, start + 150) for _ in range(3 * size[0] * size[1]))
            Image.frombytes("RGB", size, pixels).save(folder / name / f"{number}.{draw.choice(['png', 'bmp'])}")
    return folder


def options(pictures: Path, checkpoint: Path) -> list[str]:
    given = {"data": pictures, "side": 8, "batch": 7, "steps": STEPS, "checkpoint": checkpoint, "every": 2}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start(folder: Path, *arguments: str) -> list[BaseProcess]:
    """Two processes, as torchrun would start them."""
    port = str(free_port())
    started = []
    for rank in ("0", "1"):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | variables | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        said = folder / f"out{rank}", folder / f"err{rank}"
        started.append(forked.start(str(SCRIPT), *arguments, said=said, folder=SCRIPT.parent, environment=environment))
    return started


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The last checkpoint of a run that nothing interrupts, by the command of README."""
    checkpoint = tmp_path_factory.mktemp("whole") / "checkpoint.pt"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, str(SCRIPT), *options(pictures, checkpoint)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    difference = re.search(r"the whole batch: losses of 2 processes and of one differ by (\S+)", run.stdout)
    assert difference is not None and float(difference[1]) < 1e-11
    assert f"after {STEPS} steps" in run.stdout
    assert run.stderr.count("training: ") == 1, "one process shows its progress"
    yield checkpoint


def test_killed_and_resumed(pictures: Path, whole: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    processes = start(tmp_path, *options(pictures, checkpoint))
    deadline = time.monotonic() + 60
    while not checkpoint.exists():
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
        time.sleep(0.001)
    time.sleep(random.random() * 0.05)
    for process in processes:
        process.kill()
        process.join()
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < step < STEPS, "the run ended before it was killed"
    for process in (resumed := start(tmp_path, *options(pictures, checkpoint))):
        process.join(60)
    assert [process.exitcode for process in resumed] == [0, 0], (tmp_path / "err0").read_text()
    expected, found = (torch.load(file, weights_only=True) for file in (whole, checkpoint))
    assert found["step"] == STEPS
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_errors(pictures: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["--data", str(tmp_path)], "expected a sub-folder for each of two classes or more, got 1"),
        (["--data", str(tmp_path / "none")], "No such file or directory"),
        ([*options(pictures, whole), "--rate", "1"], "is of another run"),
    ):
        run = forked.run(str(SCRIPT), *arguments, folder=SCRIPT.parent)
        assert run.returncode == 2
        assert run.stderr.startswith("error: ") and message in run.stderr


def test_options_are_not_taken_by_torchrun() -> None:
    """It takes the start of an option of its own for that option, behind the script's name too."""
    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    ours = re.findall(r'add_argument\("(--[\w-]+)"', SCRIPT.read_text())
    assert len(ours) > 5
    assert [name for name in ours if any(other.startswith(name) for other in theirs)] == []
