"""A build compiles the CPU kernels once per instruction set, the GPU kernels where torch can use them, the operators.

``BN_EXT_CUDA=0`` leaves the GPU kernels out, ``BN_EXT_CUDA=1`` insists on them. ``MAX_JOBS`` is the number of compilers
that run at once, ``CXX`` the compiler. ``TORCH_CUDA_ARCH_LIST`` names the GPUs to compile for; unless set, they
are those that are here, or the usual ones where none is.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

from setuptools import setup
from setuptools.command.sdist import sdist

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise SystemExit(
        "bn_ext is compiled against the torch that will run it: install torch 2.11 or newer first, then\n"
        '    pip install ninja pybind11 "setuptools>=77" wheel\n'
        "    pip install --no-build-isolation ."
    ) from None

ROOT = Path(__file__).parent
KERNELS = "csrc/cpu/kernels/kernels.cpp"
HEADERS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h"))
ON_GPU = "csrc/ops/cuda.cpp"
SOURCES = sorted(
    str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp") if str(p.relative_to(ROOT)) not in (KERNELS, ON_GPU)
)
GPU_SOURCES = [ON_GPU, *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/**/*.cu"))]

OLDEST_TORCH = "torch>=2.11"
OLDEST_GCC = 11
USUAL_GPUS = ("7.5", "8.0", "9.0", "10.0", "12.0")  # compute capabilities: the first of each generation

# Python's own flags ask for debug information, which would be nine tenths of the library.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Werror=switch",
    "-Wno-unknown-pragmas",
]
# For kernels: x * y + z may become one instruction. GCC warns inside its own AVX-512 header.
KERNEL_FLAGS = [*FLAGS, "-ffp-contract=fast", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
NVCC_FLAGS = ["-std=c++20", "-O3"]

# By the names that ATen's vectors have for them.
INSTRUCTION_SETS: dict[str, list[str]] = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]


class Build(BuildExtension):
    """Compiles the kernels once per instruction set, and notes how, and the torch that all of it was built against."""

    def run(self) -> None:
        jobs()
        if found := unfit_compiler():
            raise SystemExit(f"bn_ext needs g++ {OLDEST_GCC} or newer, found {found}. Install one, or set CXX to it.")
        os.environ["CXX"] = compiler()  # unless it is set, torch takes c++, and setuptools what built Python
        if not without_cuda() and not torch.cuda.device_count():
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures())  # torch would look for GPUs, and fail
        super().run()
        lines = [f"{name} = {value!r}\n" for name, value in build_info().items()]
        (Path(self.get_ext_fullpath("bn_ext._C")).parent / "_build_info.py").write_text("".join(lines))
        if self.inplace:  # entry points, which an installation would note
            self.run_command("egg_info")

    def build_extensions(self) -> None:
        with ThreadPoolExecutor(jobs()) as pool:
            self.extensions[0].extra_objects = list(pool.map(self._compile_kernels, INSTRUCTION_SETS))
        super().build_extensions()

    def _compile_kernels(self, capability: str) -> str:
        folder = Path(self.build_temp, capability)
        built = folder / KERNELS.replace(".cpp", ".o")
        headers = [f for f in HEADERS if f.startswith(("csrc/core", "csrc/cpu"))]
        newest = max(Path(f).stat().st_mtime for f in [KERNELS, *headers, __file__])
        if built.exists() and built.stat().st_mtime > newest:
            return str(built)
        (compiled,) = self.compiler.compile(
            [KERNELS],
            output_dir=str(folder),
            macros=[
                ("BN_KERNELS", f"kernels_{capability.lower()}"),
                ("CPU_CAPABILITY", capability),
                (f"CPU_CAPABILITY_{capability}", None),
            ],
            include_dirs=["csrc", *include_paths()],
            extra_postargs=[*KERNEL_FLAGS, *INSTRUCTION_SETS[capability]],
        )
        return compiled


class SourceDistribution(sdist):
    """Requires a torch to be built against, where a wheel requires the one that it was built against."""

    def run(self) -> None:
        self.distribution.install_requires[:] = [OLDEST_TORCH]  # in place: its metadata have the same list
        super().run()


def needed_torch(version: str) -> str:
    """A wheel that is built against this version of torch requires it; pip ignores its local part, such as +cpu."""
    return f"torch=={version.partition('+')[0]}"


def jobs() -> int:
    """How many compilers of kernels run at once."""
    asked = os.environ.get("MAX_JOBS") or str(len(INSTRUCTION_SETS))
    if not asked.isdecimal() or int(asked) < 1:
        raise SystemExit(f"bn_ext: MAX_JOBS should be a number from 1 on, got {asked}")
    return int(asked)


def compiler() -> str:
    """The command of the C++ compiler, as torch chooses it."""
    return os.environ.get("CXX", "").strip() or "c++"


def compiler_words() -> list[str]:
    try:
        return shlex.split(compiler())
    except ValueError as error:
        raise SystemExit(f"bn_ext: CXX should be a command, got {compiler()}: {error}") from None


def unfit_compiler() -> str:
    """Says what is there in place of a compiler that is new enough; empty if there is one. Another than g++ may try."""
    command = compiler_words()
    if which(command[0]) is None:
        return f"none: there is no {command[0]}"
    ask = [*command, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(ask, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stdout
    if not re.search(r"^#define __cplusplus\b", macros, re.MULTILINE):
        return f"none: {compiler()} compiles no C++"
    version = re.search(r"^#define __GNUC__ (\d+)", macros, re.MULTILINE)
    if version and "__clang__" not in macros and int(version[1]) < OLDEST_GCC:
        return f"{version[1]}: {compiler()}"
    return ""


def without_cuda() -> str:
    """Why there will be no GPU kernels; empty if there will be."""
    wants = os.environ.get("BN_EXT_CUDA", "")
    if wants not in ("", "0", "1"):
        raise SystemExit(f"bn_ext: BN_EXT_CUDA should be 0 or 1, got {wants}")
    if wants == "0":
        return "BN_EXT_CUDA=0"
    missing = ""
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} has no CUDA"
    elif CUDA_HOME is None:
        missing = "no nvcc was found"
    if missing and wants == "1":
        raise SystemExit(f"bn_ext: BN_EXT_CUDA=1 needs nvcc and a CUDA build of torch; {missing}")
    return missing


def output(*command: str) -> str:
    """The first line that a command prints; nothing where it fails."""
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False) if which(command[0]) else None
    return run.stdout.partition("\n")[0] if run and run.returncode == 0 else ""


def architectures() -> tuple[str, ...]:
    """The compute capabilities that torch compiles for: those asked for, those of the GPUs here, or the usual ones."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked not in ("", "native"):
        return tuple(asked.replace(" ", ";").split(";"))
    gpus = range(torch.cuda.device_count())
    return tuple(sorted({".".join(map(str, torch.cuda.get_device_capability(i))) for i in gpus})) or usual()


def usual() -> tuple[str, ...]:
    """The usual GPUs that nvcc can compile for, and PTX, of which drivers make code for later ones."""
    command = [str(Path(CUDA_HOME or "", "bin", "nvcc")), "--list-gpu-code"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    *others, newest = [gpu for gpu in USUAL_GPUS if f"sm_{gpu.replace('.', '')}" in listed] or USUAL_GPUS
    return *others, f"{newest}+PTX"


def build_info() -> dict[str, object]:
    """Gives the names and values in bn_ext/_build_info.py."""
    cuda = without_cuda()
    return {
        "torch_version": torch.__version__,
        "commit": output("git", "describe", "--always", "--dirty") or "unknown",
        "compiler": output(*compiler_words(), "--version") or "unknown",
        "instruction_sets": tuple(INSTRUCTION_SETS),
        "cuda_architectures": () if cuda else architectures(),
        "without_cuda": cuda,
    }


def extension() -> CppExtension:
    # OpenMP's runtime is the one inside torch: linking another would give it threads of its own.
    flags = {"cxx": [*FLAGS, "-fopenmp"], "nvcc": NVCC_FLAGS}
    common = {"include_dirs": [str(ROOT / "csrc")], "depends": HEADERS}
    if not without_cuda():
        return CUDAExtension("bn_ext._C", [*SOURCES, *GPU_SOURCES], extra_compile_args=flags, **common)
    return CppExtension("bn_ext._C", SOURCES, extra_compile_args=flags["cxx"], **common)


if __name__ == "__main__":
    setup(
        ext_modules=[extension()],
        install_requires=[needed_torch(torch.__version__)],
        cmdclass={"build_ext": Build, "sdist": SourceDistribution},
    )
