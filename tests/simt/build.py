"""Kernels compiled for the CPU's model of a GPU, and where they run: in this process, or under AddressSanitizer."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import multiprocessing
import os
import subprocess
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/simt"
TORCH = Path(importlib.util.find_spec("torch").origin).parent
MODEL = [HERE / f"{name}.cpp" for name in ("c_api", "fiber", "sanitizers", "scheduler", "shared_memory", "text")]
FLAGS = [
    "-std=c++20",
    "-g1",
    "-fPIC",
    "-fno-gnu-unique",
    "-Wall",
    "-Wextra",
    "-Werror=switch",
    "-Wno-unknown-pragmas",
]
FLAGS += [f"-I{folder}" for folder in (HERE, ROOT / "csrc", TORCH / "include")]
CHECKS = ["-fsanitize=alignment,null"]  # of kernels, if not changed; sanitizers.cpp replaces the runtime library
ADDRESSES = ["-fsanitize=address", "-fsanitize-recover=address", "-fno-omit-frame-pointer"]
FAST = ["-O1"]  # the model, where the time goes
SOME = ["-Og"]  # kernels: with -O1 they and their checks take twice as long to compile, which is most of their time
NONE = ["-O0"]  # kernels that are changed for one test
JOBS = 2


def library(
    name: str,
    sources: Iterable[Path],
    *,
    sanitize: bool = False,
    defines: Iterable[str] = (),
    changed: Iterable[Path] = (),
    include: Iterable[Path] = (),
) -> Path:
    """The shared object of ``sources`` and the model, compiled if a source or a header is newer. The sources that are
    ``changed`` find headers in the folders ``include`` before those of csrc."""
    folders = list(include)
    flags = [*FLAGS, *(f"-D{define}" for define in defines), *(["-DBN_SIMT_SANITIZE"] if sanitize else [])]
    addresses = ADDRESSES if sanitize else []
    of_kernels, of_model = [*flags, *CHECKS, *addresses, *SOME], [*flags, *FAST]
    of_changed = [*(f"-I{folder}" for folder in folders), *flags, *addresses, *NONE]
    headers = newest([Path(__file__), *headers_of(HERE), *headers_of(ROOT / "csrc")])
    changed_headers = newest(header for folder in folders for header in headers_of(folder))

    def compiled(source: Path, flags: list[str], headers: float) -> Path:
        target = folder_of(flags) / f"{source.stem}.o"
        if not is_newer(target, max(headers, source.stat().st_mtime)):
            run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    target = folder_of(of_changed if folders else of_kernels) / f"{name}.so"
    with (BUILD / "lock").open("w") as lock, ThreadPoolExecutor(JOBS) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        units = [(source, of_changed, max(headers, changed_headers)) for source in changed]
        units += [(source, of_kernels, headers) for source in sources]
        units += [(source, of_model, headers) for source in MODEL]
        objects = list(pool.map(compiled, *zip(*units, strict=True)))
        if not is_newer(target, newest(objects)):
            run(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects), *ADDRESSES[:sanitize], "-o", str(target)])
    return target


def folder_of(flags: list[str]) -> Path:
    """The folder for objects that are compiled with these flags."""
    folder = BUILD / sha256(" ".join(flags).encode()).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def headers_of(folder: Path) -> Iterable[Path]:
    return folder.glob("**/*.h")


def newest(files: Iterable[Path]) -> float:
    return max((file.stat().st_mtime for file in files), default=0.0)


def is_newer(target: Path, time: float) -> bool:
    return target.exists() and target.stat().st_mtime >= time


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    cluster: int
    cooperative: bool


class Library(ctypes.CDLL):
    """A library whose functions return null, or the text of an error, which is raised."""

    def __getattr__(self, name: str) -> Any:
        function = super().__getattr__(name)
        function.restype = ctypes.c_char_p
        function.errcheck = raise_error
        return function

    def configure(
        self, seed: int = 0, *, preempt: int = 0, resident_blocks: int = 132, shared_bytes: int = 227 << 10
    ) -> None:
        """The model's settings (model.h); forgets the launches so far."""
        configure = super().__getattr__("simt_configure")
        configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        configure.restype = None
        configure(seed, preempt, resident_blocks, shared_bytes)

    def launches(self) -> list[Launch]:
        launches = super().__getattr__("simt_launches")
        launches.restype = ctypes.c_char_p
        lines = (line.split() for line in launches().decode().splitlines())
        return [Launch(kernel, *map(int, shape[:4]), shape[4] == "1") for kernel, *shape in lines]


def raise_error(result: bytes | None, *_: object) -> None:
    if result is not None:
        raise RuntimeError(result.decode())


@functools.cache
def sanitized() -> ProcessPoolExecutor:
    """A process with AddressSanitizer, which runs the functions of modules that are submitted to it. An error that it
    finds while a kernel runs is an error of that kernel; any other ends the process."""
    files = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    options = "detect_leaks=0:halt_on_error=0:suppress_equal_pcs=0:color=never"
    with mock.patch.dict(os.environ, LD_PRELOAD=" ".join(files), ASAN_OPTIONS=options):
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(int).result()  # starts it
    return pool
