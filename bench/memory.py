"""The memory that a training step of a pattern takes, in units of its input's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.measure import Row
from bench.peers import BASELINE, OURS, PEERS, Peer
from bench.workloads import Workload
from bn_ext.tools.profiling import allocated

PASS = "memory"
FIELDS = {
    "kept": "bytes between forward and backward / bytes of the input, which is counted too; the caller has no output",
    "peak": "the most there is at once in forward and backward; the residual and the output's gradient not counted",
    "kept_over, peak_over": f"the same / that of {BASELINE}",
}


class _Consumer(torch.autograd.Function):
    """The layer after the pattern. It keeps nothing of the pattern's output and gives it the gradient dy."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, dy: Tensor) -> Tensor:
        ctx.dy = dy
        return dy.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.dy, None


def of_pattern(peer: Peer, device: str = "cpu") -> tuple[float, float]:
    """``kept`` and ``peak`` of :data:`FIELDS`."""

    def forward() -> Tensor:
        return _Consumer.apply(peer.train(*peer.inputs), peer.dy)

    def step() -> object:
        return torch.autograd.grad(forward(), (*peer.inputs, *peer.affine))

    step()  # what is allocated once
    input = peer.inputs[0].nbytes
    return 1 + allocated(forward, device)[0] / input, 1 + allocated(step, device)[1] / input


def measure(workload: Workload) -> list[Row]:
    """A row for eager torch and one for ours."""
    device = workload.input.device.type
    found = {name: of_pattern(PEERS[name](workload), device) for name in (BASELINE, OURS)}
    return [
        {
            "pass": PASS,
            "peer": name,
            "status": "ok",
            "kept": kept,
            "peak": peak,
            "kept_over": kept / found[BASELINE][0],
            "peak_over": peak / found[BASELINE][1],
        }
        for name, (kept, peak) in found.items()
    ]
