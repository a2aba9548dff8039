"""Compiles every CUDA file for every architecture, without a GPU, and prints what each kernel takes of one.

    python -m tests.support.cuda_check

Fails where a file does not compile or a kernel takes more than the launch plans count on.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ROOT = Path(__file__).parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
INCLUDES = ["-Icsrc", *(f"-isystem={path}" for path in include_paths())]

# csrc/cuda/plan.cpp lets a multiprocessor run 512 threads, and it has 64 Ki registers.
MOST_REGISTERS = 128


class Usage(NamedTuple):
    """A kernel takes these: registers a thread; bytes of static shared memory a block, of stack and spills a thread."""

    registers: int
    shared: int
    stack: int
    spills: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


def nvcc() -> str | None:
    return shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


FUNCTION = re.compile(
    r"Function properties for (?P<name>.+)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(\nptxas info\s*: Used (?P<registers>\d+) registers(.* (?P<shared>\d+) bytes smem)?)?"
)
KERNEL = re.compile(
    r"batch_norm_kernel<.*::(?P<direction>\w+)Pass<(.*?::)?(?P<dtype>\w+), .*::(?P<functor>\w+), "
    r"(?P<masked>true|false)>, (?P<lanes>\d+)>"
)
DTYPES = {"double": "float64", "float": "float32", "Half": "float16", "BFloat16": "bfloat16"}


def readable(name: str) -> str:
    kernel = KERNEL.search(name)
    if kernel is None:
        return re.sub(r"\(anonymous namespace\)::|\w+::|\(\)$", "", name)
    lanes = "one channel" if kernel["lanes"] == "1" else "per lane"
    masked = "masked " if kernel["masked"] == "true" else ""
    return f"{masked}{kernel['direction'].lower()} {kernel['functor'].lower()} {DTYPES[kernel['dtype']]} {lanes}"


def usages(ptxas: str) -> dict[str, Usage]:
    """By the readable names of the functions, from what ptxas says of one compilation, demangled."""
    return {
        readable(f["name"]): Usage(
            int(f["registers"] or 0), int(f["shared"] or 0), int(f["stack"]), int(f["stores"]) + int(f["loads"])
        )
        for f in FUNCTION.finditer(ptxas)
    }


def excess(usage: Usage) -> list[str]:
    """In words, what a kernel takes that it should not."""
    found = {
        f"{usage.registers} registers": usage.registers > MOST_REGISTERS,
        f"{usage.stack} bytes of stack": usage.stack > 0,
        f"{usage.spills} bytes spilled": usage.spills > 0,
    }
    return [words for words, wrong in found.items() if wrong]


class Compiled(NamedTuple):
    seconds: float
    failed: bool
    said: str


def compile_for(source: str, arch: str) -> Compiled:
    """The glue is no CUDA code and includes torch: the host compiler takes it, with the headers that nvcc finds."""
    if source.endswith(".cu"):
        strict = ["-Werror=all-warnings", "-Wno-deprecated-gpu-targets"]
        flags = [*COMMON_NVCC_FLAGS, *SETUP["NVCC_FLAGS"], *strict, f"-arch={arch}", "-Xptxas=-v"]
    else:
        host = [flag for flag in SETUP["FLAGS"] if not flag.startswith(("-std", "-O"))]
        # A CPU build of torch lacks the header that is generated for a CUDA build.
        flags = [*SETUP["NVCC_FLAGS"], "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", *(f"-Xcompiler={flag}" for flag in host)]
        flags.append("-Xcompiler=-fsyntax-only")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [str(nvcc()), "-c", *flags, *INCLUDES, source, "-o", f"{folder}/built.o"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = subprocess.run(["c++filt"], input=run.stdout + run.stderr, capture_output=True, text=True, check=True).stdout
    return Compiled(time.perf_counter() - start, run.returncode != 0, said)


def main() -> int:
    if nvcc() is None:
        print("cuda-check: there is no nvcc on the PATH or in /usr/local/cuda/bin")
        return 1
    jobs = [
        (source, arch)
        for source in SETUP["GPU_SOURCES"]
        for arch in (ARCHITECTURES if source.endswith(".cu") else ("host",))
    ]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        results = dict(zip(jobs, pool.map(lambda job: compile_for(*job), jobs)))

    wrong = []
    table: dict[str, dict[str, Usage]] = {}
    for (source, arch), result in results.items():
        found = usages(result.said)
        if result.failed:
            wrong.append(f"{source} does not compile for {arch}:\n{result.said}")
        elif source.endswith(".cu") and not found:
            wrong.append(f"{source} has no kernel for {arch}, or ptxas does not say so in known words:\n{result.said}")
        for name, usage in found.items():
            table.setdefault(name, {})[arch] = usage
            wrong += [f"{name}, {arch}: {words}" for words in excess(usage)]

    width = max(map(len, table), default=0)
    print("registers/bytes of static shared memory/bytes of stack/bytes spilled")
    print(" " * width, *(f"{arch:>10}" for arch in ARCHITECTURES))
    for name, usage in table.items():
        print(f"{name:{width}}", *(f"{usage.get(arch, '')!s:>10}" for arch in ARCHITECTURES))
    seconds = {arch: sum(r.seconds for (_, a), r in results.items() if a == arch) for arch in ["host", *ARCHITECTURES]}
    print("seconds:", ", ".join(f"{arch} {spent:.0f}" for arch, spent in seconds.items()))
    for words in wrong:
        print(words)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
