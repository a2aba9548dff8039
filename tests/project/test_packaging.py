"""Distributions hold and require what they should, and a build says what is missing before it begins."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import forked
import pytest
import torch
from setuptools.command.build_ext import customize_compiler, new_compiler

ROOT = Path(__file__).parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
PRODUCTS = (
    "bn_ext/_C.so",
    "bn_ext/_build_info.py",
    "bn_ext/__pycache__/a.pyc",
    "build/kernels.o",
    "tests/__pycache__/a.pyc",
)


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.run("setup.py", "-q", *arguments, folder=folder, environment=os.environ | environment)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, of the tests and of the examples, with products of builds and runs among them."""
    folder = tmp_path_factory.mktemp("sources") / "bn_ext"
    names = ("build", ".git", ".venv", ".*_cache", ".hypothesis", "*.egg-info", "*.so", "_build_info.py", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*names))
    for product in PRODUCTS:
        (folder / product).parent.mkdir(parents=True, exist_ok=True)
        (folder / product).touch()
    return folder


@pytest.fixture(scope="module")
def distribution(sources: Path) -> dict[str, str]:
    """The files of a source distribution, by their paths in it."""
    run = run_setup(sources, "sdist", "--dist-dir", "distributions")
    assert run.returncode == 0, run.stderr
    (archive,) = (sources / "distributions").iterdir()
    with tarfile.open(archive) as tar:
        files = [member for member in tar if member.isfile()]
        contents = {member: tar.extractfile(member) for member in files}
        return {
            member.name.partition("/")[2]: file.read().decode(errors="replace")
            for member, file in contents.items()
            if file is not None
        }


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the list of files that git has")
def test_a_source_distribution_has_every_file_of_the_repository(distribution: dict[str, str]) -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tracked = {name for name in listing.splitlines() if (ROOT / name).exists()}
    assert tracked - distribution.keys() == set()


def test_a_source_distribution_has_no_product(distribution: dict[str, str]) -> None:
    assert not distribution.keys() & set(PRODUCTS)


def test_a_source_distribution_requires_a_torch_to_build_against(distribution: dict[str, str]) -> None:
    assert required(distribution["PKG-INFO"]) == ["torch>=2.11"]
    assert "Dynamic: requires-dist" in distribution["PKG-INFO"]


def test_a_wheel_requires_the_torch_that_it_was_built_against(sources: Path, tmp_path: Path) -> None:
    run = run_setup(sources, "dist_info", "--output-dir", str(tmp_path))
    assert run.returncode == 0, run.stderr
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    assert required(metadata.read_text()) == [SETUP["needed_torch"](torch.__version__)]


def test_a_wheel_has_every_module_of_the_package(sources: Path, tmp_path: Path) -> None:
    run = run_setup(sources, "build_py", "--build-lib", str(tmp_path))
    assert run.returncode == 0, run.stderr
    there, built = (
        {str(path.relative_to(folder)) for path in folder.glob("**/*.py")}
        for folder in (sources / "bn_ext", tmp_path / "bn_ext")
    )
    assert built == there


def required(metadata: str) -> list[str]:
    return [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]


@pytest.mark.parametrize(
    ("version", "needed"),
    [
        ("2.13.0+cpu", "torch==2.13.0"),
        ("2.11.0+cu130", "torch==2.11.0"),
        ("2.11.0a0+git1a2b3c.nv26.1", "torch==2.11.0a0"),
        ("2.12.1", "torch==2.12.1"),
    ],
)
def test_needed_torch(version: str, needed: str) -> None:
    assert SETUP["needed_torch"](version) == needed


def fake_compiler(folder: Path, macros: str) -> Path:
    """Says that it defines these macros, and notes any other call."""
    path = folder / "c++"
    answer = f'case "$*" in *-dM*) printf "{macros}" ;; *) touch {folder}/called; exit 1 ;; esac'
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return path


GCC = r"#define __cplusplus 202002L\n#define __GNUC__ {}\n#define __GNUC_MINOR__ 5\n"


@pytest.mark.parametrize("flags", ["", " -m64"])
def test_an_old_compiler_is_refused_before_it_compiles(sources: Path, tmp_path: Path, flags: str) -> None:
    compiler = f"{fake_compiler(tmp_path, GCC.format(9))}{flags}"
    run = run_setup(sources, "build_ext", "--inplace", CXX=compiler)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == (
        f"bn_ext needs g++ 11 or newer, found 9: {compiler}. Install one, or set CXX to it."
    )
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("macros", [GCC.format(11), GCC.format(4) + "#define __clang__ 1\n"])
def test_other_compilers_may_try(sources: Path, tmp_path: Path, macros: str) -> None:
    run = run_setup(sources, "build_ext", "--inplace", CXX=str(fake_compiler(tmp_path, macros)), BN_EXT_CUDA="0")
    assert run.returncode != 0 and "bn_ext needs" not in run.stderr
    assert (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"CXX": "no-such-compiler"}, "there is no no-such-compiler"),
        ({"CXX": "", "PATH": ""}, "there is no c++"),
        ({"CXX": " ", "PATH": ""}, "there is no c++"),
        ({"CXX": "false"}, "false compiles no C++"),
        ({"CXX": "cat"}, "cat compiles no C++"),
    ],
)
def test_a_compiler_that_is_not_there(sources: Path, environment: dict[str, str], found: str) -> None:
    run = run_setup(sources, "build_ext", "--inplace", **environment)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == (
        f"bn_ext needs g++ 11 or newer, found none: {found}. Install one, or set CXX to it."
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": '"g++'}, 'CXX should be a command, got "g++: No closing quotation'),
        ({"MAX_JOBS": "0"}, "MAX_JOBS should be a number from 1 on, got 0"),
        ({"MAX_JOBS": "abc"}, "MAX_JOBS should be a number from 1 on, got abc"),
    ],
)
def test_variables_that_are_wrong(sources: Path, tmp_path: Path, environment: dict[str, str], message: str) -> None:
    compiler = str(fake_compiler(tmp_path, GCC.format(11)))
    run = run_setup(sources, "build_ext", "--inplace", **({"CXX": compiler} | environment))
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == f"bn_ext: {message}" and "Traceback" not in run.stderr
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(("missing", "advised"), [("torch", True), ("numbers_of_torch", False)])
def test_torch_is_installed_first(sources: Path, tmp_path: Path, missing: str, advised: bool) -> None:
    (tmp_path / "torch.py").write_text(f'raise ModuleNotFoundError("No module named {missing!r}", name="{missing}")')
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert ("install torch 2.11 or newer first" in run.stderr) == advised
    assert ("Traceback" in run.stderr) != advised
    advice = [line.strip() for line in run.stderr.splitlines() if line.startswith("    pip install")]
    readme = (ROOT / "README.md").read_text()
    assert bool(advice) == advised and all(command in readme for command in advice)


def test_there_is_no_debug_information(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own flags ask for it, in most builds of Python."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXXFLAGS", "-g")
    Path("source.cpp").write_text("int one() { return 1; }")
    compiler = new_compiler()
    customize_compiler(compiler)
    (with_it,) = compiler.compile(["source.cpp"], output_dir="with")
    (without,) = compiler.compile(["source.cpp"], output_dir="without", extra_postargs=SETUP["FLAGS"])
    assert b".debug_info" in Path(with_it).read_bytes()
    assert b".debug_info" not in Path(without).read_bytes()


def test_build_requirements_are_said_once() -> None:
    assert f'"{SETUP["OLDEST_TORCH"]}"' in (ROOT / "pyproject.toml").read_text()


# A build for GPUs, with commands in the place of the compilers that note how they are called and leave empty files.
WITH_CUDA = """\
import os, runpy, sys, torch, torch.utils.cpp_extension
torch.version.cuda, torch.utils.cpp_extension.CUDA_HOME = "13.0", os.environ["CUDA_HOME"]
torch.utils.cpp_extension._check_cuda_version = lambda *_: None
sys.argv[1:] = ["-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
COMPILES = r"""#!/bin/sh
echo "$0 $*" >> {folder}/called
case "$*" in
  *-dM*) printf "{gcc}" ;;
  *--list-gpu-code*) printf "{gpus}" ;;
esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done
exit 0
"""


@pytest.mark.parametrize(
    ("listed", "asked", "built"),
    [
        ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", "", ("7.5", "8.0", "9.0", "10.0", "12.0+PTX")),
        ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", "native", ("7.5", "8.0", "9.0", "10.0", "12.0+PTX")),
        ("sm_75 sm_80 sm_89 sm_90", "", ("7.5", "8.0", "9.0+PTX")),  # nvcc before 12.8
        ("", "", ("7.5", "8.0", "9.0", "10.0", "12.0+PTX")),
        ("sm_75 sm_80 sm_86 sm_90", "8.6 9.0+PTX", ("8.6", "9.0+PTX")),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU in sight")
def test_a_build_without_a_gpu_in_sight(
    sources: Path, tmp_path: Path, listed: str, asked: str, built: tuple[str, ...]
) -> None:
    folder = tmp_path / "sources"
    shutil.copytree(sources, folder)
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    for path in (tmp_path / "c++", tmp_path / "cuda" / "bin" / "nvcc"):
        path.write_text(COMPILES.format(folder=tmp_path, gcc=GCC.format(12), gpus=listed.replace(" ", r"\n")))
        path.chmod(0o755)
    environment = os.environ | {
        "CXX": str(tmp_path / "c++"),
        "CUDA_HOME": str(tmp_path / "cuda"),
        "BN_EXT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": asked,
    }
    run = forked.run(WITH_CUDA, folder=folder, environment=environment)
    assert run.returncode == 0, run.stderr
    info = runpy.run_path(str(folder / "bn_ext" / "_build_info.py"))
    assert info["cuda_architectures"] == built and info["without_cuda"] == ""
    (compiled, *_) = [line for line in (tmp_path / "called").read_text().splitlines() if "forward.cu" in line]
    flags = {
        f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in re.findall(r"[\d.]+", " ".join(built).replace(".", ""))
    }
    assert set(re.findall(r"-gencode=arch=compute_\d+,code=sm_\d+", compiled)) == flags
    newest = built[-1].replace(".", "").removesuffix("+PTX")
    assert f"code=compute_{newest}" in compiled
