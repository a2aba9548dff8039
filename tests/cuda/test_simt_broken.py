"""The CUDA kernels with something wrong in them: the model of a GPU says what, or the results differ."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cases import Case
from simt.batch_norm import Device, Kernels
from simt.build import ROOT, sanitized
from simt.passes import WAYS, assert_same, both_passes, chained, limits_of


class Broken(NamedTuple):
    """A wrong text in place of a right one, what is said of it, and the way through the kernels and the pass that it
    matters to."""

    name: str
    file: str
    right: str
    wrong: str
    error: str
    way: int
    of: str = "passes/forward.cu"


BROKEN = [
    Broken(
        "missing barrier",
        "kernel/team_sums.h",
        "gpu::thread(), mine[l]);\n    }\n    gpu::sync_block();",
        "gpu::thread(), mine[l]);\n    }",
        r"reads element \d+ .*(which nothing wrote|wrote with no barrier)",
        2,
    ),
    Broken(
        "missing barrier before the coefficients are read",
        "kernel/kernel.h",
        "    gpu::sync_block();\n    if (has_channel(slab) && sums_.leads())",
        "    if (has_channel(slab) && sums_.leads())",
        r"reads element \d+ .*(which nothing wrote|wrote with no barrier)",
        0,
    ),
    Broken(
        "missing barrier before the references are read",
        "kernel/kernel.h",
        "      gpu::sync_block();\n#pragma unroll",
        "#pragma unroll",
        r"reads element \d+ .*(which nothing wrote|wrote with no barrier)",
        2,
    ),
    Broken(
        "block without threads for all channels",
        "kernel/kernel.h",
        "return gpu::thread() < slab.channels();",
        "return gpu::thread() < slab.channels() - 1;",
        r"reads element \d+ .*which nothing wrote",
        1,
    ),
    Broken(
        "missing barrier of the cluster",
        "kernel/team_sums.h",
        "      gpu::sync_cluster();\n      sum_entries",
        "      sum_entries",
        "before a cluster barrier|which nothing wrote",
        2,
    ),
    Broken(
        "block that ends early",
        "kernel/team_sums.h",
        "      gpu::wait_cluster();\n",
        "",
        "returns between arrive_cluster and wait_cluster",
        2,
    ),
    Broken(
        "block that never arrives",
        "kernel/team_sums.h",
        "      gpu::arrive_cluster();\n    }\n  }",
        "    }\n  }",
        "wait_cluster without arrive_cluster",
        2,
    ),
    Broken(
        "block that arrives before it has read",
        "kernel/team_sums.h",
        "      gpu::sync_cluster();\n",
        "      gpu::sync_cluster();\n      gpu::arrive_cluster();\n",
        "after arrive_cluster: that block may have returned",
        2,
    ),
    Broken(
        "sums of blocks that are not there",
        "kernel/team_sums.h",
        "i + u * step < entries ? read(i + u * step) : 0",
        "read(i + u * step)",
        r"block \d+ of a cluster of \d+",
        2,
    ),
    Broken("counter that is not set", "kernel/team_sums.h", "*arrivals_ = 0;", "", "deadlock: .*arrivals", 4),
    Broken(
        "one arrival too many",
        "kernel/team_sums.h",
        "meetings_ * g_.team_blocks)",
        "meetings_ * g_.team_blocks + 1)",
        "deadlock: .* with 2 of 3 arrivals",
        4,
    ),
    Broken(
        "lanes that do not come",
        "kernel/team_sums.h",
        "    double sum = sum_steps",
        "    if (k >= channels) {\n      break;\n    }\n    double sum = sum_steps",
        "deadlock: .*shuffle_xor",
        1,
    ),
    Broken(
        "wrong lane mask",
        "kernel/team_sums.h",
        "shuffle_xor(gpu::kAllLanes,",
        "shuffle_xor(0x7fffffff,",
        "which `lanes` does not name|do not name the caller",
        0,
    ),
    Broken(
        "off by one",
        "kernel/slab.h",
        "rest < kLanes ? rest : kLanes",
        "rest < kLanes ? rest + 1 : kLanes",
        "heap-buffer-overflow",
        1,
    ),
    Broken(
        "unguarded tail",
        "kernel/slab.h",
        "i < packs_ ? channels_ * g_.s - position : 0",
        "channels_ * g_.s - position",
        "heap-buffer-overflow",
        5,
    ),
    Broken(
        "tile without room",
        "kernel/kernel.h",
        "i + u < g_.held && j",
        "i + u <= g_.held && j",
        "out of bounds|which nothing wrote",
        5,
    ),
]


BACKWARD = "passes/backward.cu"

# These break no barrier, bound or address; ``error`` names the result that differs.
WRONG = [
    Broken(
        "bits in another order",
        "kernel/branches.h",
        "bits <<= turn * kLanes",
        "bits <<= (kThreads - 1 - turn) * kLanes",
        "branches",
        0,
    ),
    Broken("bits that do not meet", "kernel/branches.h", "bits |= gpu::shuffle_xor", "gpu::shuffle_xor", "branches", 0),
    Broken(
        "a byte of others too",
        "kernel/slab.h",
        "whole_bytes(!plan.zeroed_branches)",
        "whole_bytes(true)",
        "branches",
        1,
    ),
    Broken("branch bits of anything", "passes/forward.cu", "if (plan.zeroed_branches)", "if (false)", "branches", 1),
    Broken("no atomic", "kernel/branches.h", "gpu::atomic_or(word, low)", "*word = low", "branches", 1),
    Broken("bits of the next word", "kernel/branches.h", "high != 0", "false", "branches", 1),
    Broken("no residual", "passes/forward.cu", "z = z + batch.tensor[1][u].get(l);", "", "branches", 0),
    Broken("no residual behind it", BACKWARD, "z = z + batch.tensor[2][u].get(l);", "", "dx", 0, BACKWARD),
    Broken(
        "inputs of another channel",
        "passes/forward.cu",
        "inputs(int64_t set, int64_t c) const {",
        "inputs(int64_t set, int64_t c) const {\n    c = 0;",
        "branches",
        1,
    ),
    Broken("a gradient of a gradient", "kernel/kernel.h", "if (i + u >= g_.held)", "", "dx", 0, BACKWARD),
]


def write_broken(broken: Broken, folder: Path, functor: str) -> None:
    """The file that is wrong, and for quick compilation headers that know no number type but float and one functor."""
    for name, right, wrong in (
        (f"cuda/{broken.file}", re.escape(broken.right), broken.wrong),
        ("core/dtype.h", r"return f\(.*\);", "return f(float{});"),
        ("core/activation.h", r"return f\(activation::.*\);", f"return f(activation::{functor});"),
    ):
        source = (ROOT / "csrc" / name).read_text()
        changed = re.sub(right, lambda _, wrong=wrong: wrong, source)
        assert changed != source
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(changed)


def broken_passes(
    folder: str, of: str, sanitize: bool, shape: tuple[int, ...], layout: Any, limits: tuple[int, ...]
) -> None:
    kernels = Kernels("broken", sanitize=sanitize, include=[Path(folder)], changed=[of])
    for seed in range(4):
        kernels.configure(seed)
        both_passes(kernels, Case(shape, layout), Device(*limits))


@pytest.mark.parametrize("broken", BROKEN, ids=[b.name for b in BROKEN])
def test_what_is_broken_is_found(broken: Broken, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_broken(broken, tmp_path, "Identity{}")
    shape, layout, device = WAYS[broken.way]
    of_memory = "heap" in broken.error
    given = str(tmp_path), broken.of, of_memory, shape, layout, limits_of(device)
    with pytest.raises(RuntimeError) as caught:
        if of_memory:  # the process is this test's own: a read that also leaves the heap ends it, after the report
            with sanitized.__wrapped__() as process:
                process.submit(broken_passes, *given).result()
        else:
            broken_passes(*given)
    said = f"{caught.value}\n{capfd.readouterr().err}"
    assert re.search(f"(?s)kernel batch_norm_(forward|backward): .*({broken.error})", said), said


@pytest.mark.parametrize("wrong", WRONG, ids=[w.name for w in WRONG])
def test_what_is_wrong_differs(wrong: Broken, tmp_path: Path) -> None:
    write_broken(wrong, tmp_path, "Any{{}, a}")
    shape, layout, device = WAYS[wrong.way]
    name = "silu" if wrong.error == "dx" else "relu6"
    each = Kernels(), Kernels("broken", include=[tmp_path], changed=[wrong.of])
    right, broken = (chained(k, device, Case(shape, layout), name=name) for k in each)
    with pytest.raises(AssertionError, match=wrong.error):
        assert_same(broken, right)
