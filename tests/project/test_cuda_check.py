"""The CUDA files compile, their kernels keep to what plans count on, and the check would say so if not."""

from __future__ import annotations

import re
from pathlib import Path

import cuda_check
import pytest

FORWARD = "bn::cuda::(anonymous namespace)::ForwardPass"
FLOAT = f"bn::cuda::batch_norm_kernel<{FORWARD}<float, bn::activation::Identity, false>, 4>(int)"
HALF = f"bn::cuda::batch_norm_kernel<{FORWARD}<c10::Half, bn::activation::ReLU, true>, 1>(int)"
PTXAS = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void {FLOAT}' for 'sm_90'
ptxas info    : Function properties for void {FLOAT}
    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 129 registers, used 1 barriers, 24 bytes cumulative stack size, 4096 bytes smem, 688 bytes cmem[0]
ptxas info    : Compile time = 298.479 ms
ptxas info    : Compiling entry function 'void {HALF}' for 'sm_90'
ptxas info    : Function properties for void {HALF}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
ptxas info    : Function properties for bn::helper(double)
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


@pytest.mark.skipif(cuda_check.nvcc() is None, reason="needs nvcc, on the PATH or in /usr/local/cuda/bin")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("__global__ void batch_norm_kernel(float* x) { *x = y; }", 'broken.cu does not compile for sm_90:.*"y"'),
        ("inline int not_a_kernel() { return 1; }", "broken.cu has no kernel for sm_90"),
        (
            "__global__ void batch_norm_kernel(float* x, int i) { float held[64]; held[i] = *x; *x = held[i / 2]; }",
            "batch_norm_kernel.*, sm_90: 256 bytes of stack",
        ),
    ],
    ids=["error", "no kernel", "stack"],
)
def test_a_wrong_file_is_reported(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check of all files for all architectures takes minutes: `make cuda-check`, which CI runs too."""
    (tmp_path / "broken.cu").write_text(source)
    monkeypatch.setitem(cuda_check.SETUP, "GPU_SOURCES", [str(tmp_path / "broken.cu")])
    monkeypatch.setattr(cuda_check, "ARCHITECTURES", ("sm_90",))
    assert cuda_check.main() == 1
    assert re.search(f"(?s){said}", capsys.readouterr().out)


def test_what_ptxas_says_is_understood() -> None:
    assert cuda_check.usages(PTXAS) == {
        "forward identity float32 per lane": cuda_check.Usage(registers=129, shared=4096, stack=24, spills=36),
        "masked forward relu float16 one channel": cuda_check.Usage(registers=128, shared=0, stack=0, spills=0),
        "helper(double)": cuda_check.Usage(registers=0, shared=0, stack=8, spills=0),
    }


def test_excess_is_reported() -> None:
    spilling, lean, helper = cuda_check.usages(PTXAS).values()
    assert cuda_check.excess(spilling) == ["129 registers", "24 bytes of stack", "36 bytes spilled"]
    assert cuda_check.excess(lean) == []
    assert cuda_check.excess(helper) == ["8 bytes of stack"]
