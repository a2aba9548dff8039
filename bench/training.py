"""Whole training steps of a network: forward, loss, backward and an SGD step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext
from bench.measure import Row, refusal, summary
from bench.networks import resnet
from bench.peers import BASELINE, OURS, set_inductor, without_cudnn
from bench.validate import TIMES_BASELINE, WrongResultError
from bench.workloads import DTYPES, LAYOUTS, sizes_of
from bn_ext.tools.timing import interleave, ratios
from bn_ext.tools.trial import Call, Trial

PASS = "step"
COMPILED = f"{OURS}, compiled"
PLAIN = {OURS: BASELINE, COMPILED: "Inductor"}  # the same without bn_ext
CLASSES = 1000
LARGEST_ERROR = 0.5  # a ReLU that rounding turns on or off changes all gradients before it; wrong ones are off by 1
FIELDS = {
    "error": "of all gradients and the loss of the first step, the norm of the difference to float64 / the norm",
    "kept, peak": "bytes between forward and backward, and the most in a step; without inputs, parameters, optimizer",
    "kept_over, peak_over": f"the same / that of {BASELINE}",
    "bound": f"speedup if our operators took no time, of {OURS}: no batch norm can give more",
    "over_plain": "time of the same without bn_ext / time of this one, median over the rounds",
}

Step = Callable[[], float]


class Network(NamedTuple):
    """A residual network, and the images that it is trained on. Half precision is by autocast."""

    depth: int
    shape: str
    layout: str
    dtype: str
    device: str = "cpu"
    width: int = 64

    def build(self) -> nn.Module:
        model = resnet(self.depth, CLASSES, self.width).to(self.device)
        return model.to(memory_format=LAYOUTS[self.layout])  # type: ignore[call-overload]


def _aten(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = without_cudnn(module.forward)  # type: ignore[method-assign]
    return model


def _ours(model: nn.Module) -> nn.Module:
    return bn_ext.fuse(bn_ext.convert(model))


def _compiled(model: nn.Module, backend: str | Callable = "inductor") -> nn.Module:
    model.compile(backend=backend, fullgraph=True, dynamic=False)
    return model


def _ours_compiled(model: nn.Module) -> nn.Module:
    from bn_ext.graph.fusion import backends

    return _compiled(bn_ext.convert(model), backends.inductor)


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    BASELINE: _aten,
    OURS: _ours,
    "cuDNN": lambda model: model,
    "Inductor": _compiled,
    COMPILED: _ours_compiled,
}


def step_of(model: nn.Module, images: Tensor, labels: Tensor, autocast: torch.dtype | None = None) -> Step:
    """A training step, which returns the loss when all of it is done."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _observed(model: nn.Module, step: Step) -> Tensor:
    """All gradients of the next step, in the order of their names, and its loss."""
    loss = step()
    gradients = [p.grad for _, p in sorted(model.named_parameters())]
    return torch.cat([torch.tensor([loss]), *(g.double().flatten().cpu() for g in gradients if g is not None)])


def measure(
    network: Network,
    others: Iterable[str],
    seconds: float,
    rounds: int,
    always: Sequence[str] = (BASELINE, OURS),
) -> list[Row]:
    """Validates the first step of the network in each peer, then times steps in turn: a row each."""
    torch.manual_seed(0)
    model = network.build()
    images = torch.randn(sizes_of(network.shape), device=network.device).to(memory_format=LAYOUTS[network.layout])
    labels = torch.randint(CLASSES, (len(images),), device=network.device)
    exact = copy.deepcopy(model).double()
    expected = _observed(exact, step_of(exact, images.double(), labels))
    del exact
    half = None if network.dtype == "float32" else DTYPES[network.dtype]
    found: dict[str, Row] = {}
    trials: dict[str, Trial] = {}
    calls: dict[str, Callable[[], object]] = {}
    set_inductor(cached=False, backward_repeats=False, workers=os.cpu_count() or 1)
    for name in dict.fromkeys((*always, *others, *([COMPILED] if "Inductor" in others else []))):
        try:
            peer = PEERS[name](copy.deepcopy(model))
            step = step_of(peer, images, labels, half)
            error = float((_observed(peer, step) - expected).norm() / expected.norm())
            allowed = min(LARGEST_ERROR, TIMES_BASELINE[False] * found.get(BASELINE, {}).get("error", 1.0))
            if not error <= allowed:
                raise WrongResultError(f"error of the gradients is {error:.1e}, allowed is {allowed:.1e}")
        except Exception as refused:
            found[name] = refusal(refused)
        else:
            trials[name] = Trial(
                peer, Call((images,), {}, partial(F.cross_entropy, target=labels), half, images.device)
            )
            kept, peak = trials[name].memory()
            found[name] = {"status": "ok", "error": error, "kept": kept, "peak": peak}
            calls[name] = step
    samples = interleave(calls, seconds, rounds)[0] if calls else {}
    for name in calls:
        row = found[name] | summary(samples, name)
        row["images_a_second"] = len(images) / row["median_ms"] * 1e3
        if BASELINE in samples:
            row |= {f"{what}_over": row[what] / found[BASELINE][what] for what in ("kept", "peak")}
        if name == OURS and BASELINE in samples:
            row["bound"] = row["speedup"] / (1 - trials[name].share_of_ours())
        if PLAIN.get(name) in samples:
            row["over_plain"] = median(ratios(samples, PLAIN[name], name))
        found[name] = row
    return [{"pass": PASS, "peer": name, **row} for name, row in found.items()]
