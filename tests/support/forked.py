"""Code that runs in a fork of a process that has imported torch, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

METHOD = "forkserver"
_FORKS = multiprocessing.get_context(METHOD)
_FORKS.set_forkserver_preload(["setuptools", "torch.utils.cpp_extension"])


def run(
    code: str, *arguments: str, folder: Path | None = None, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """As ``python -c code arguments`` in ``folder``, whose modules come first; the code may be a script's name."""
    with tempfile.TemporaryDirectory() as parent:
        said = Path(parent, "out"), Path(parent, "err")
        process = start(code, *arguments, said=said, folder=folder, environment=environment)
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(code, 120)
        return subprocess.CompletedProcess([code, *arguments], process.exitcode, *(file.read_text() for file in said))


def start(
    code: str,
    *arguments: str,
    said: tuple[Path, Path],
    folder: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> multiprocessing.process.BaseProcess:
    """Starts what :func:`run` runs. Its output goes to the two files ``said``."""
    where = str(folder or Path.cwd())
    process = _FORKS.Process(target=_run, args=(code, arguments, where, dict(environment), *map(str, said)))
    process.start()
    return process


def _run(code: str, arguments: tuple[str, ...], folder: str, environment: dict[str, str], *said: str) -> None:
    for descriptor, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):  # torch, which is there, has read it already
        torch.set_num_threads(int(threads))
    is_script = code.endswith(".py")
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [code if is_script else "-c", *arguments]
    if is_script:
        runpy.run_path(code, run_name="__main__")
    else:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
