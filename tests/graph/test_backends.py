"""Fused graphs by torch.compile: backends by name, other compilers around fused models, checkpoints, processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fusing import fused_with, operators
from networks import NETWORKS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bn_ext
from bn_ext.graph.fusion import backends
from bn_ext.graph.fusion.installed import installed


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


FUSED = {"bn_ext::batch_norm": 1}
ROOT = Path(bn_ext.__file__).parents[1]


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), norm(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + x)


def example(**options) -> Tensor:
    return torch.randn(2, 3, 4, 4, **options)


# ---------------------------------------------------------------------------------------------- by name


def test_entry_points() -> None:
    found = {point.name: point.value for point in entry_points(group="torch_dynamo_backends")}
    assert found["bn_ext"] == "bn_ext.graph.fusion.backends:eager"
    assert found["bn_ext_inductor"] == "bn_ext.graph.fusion.backends:inductor"


def test_backend_by_name_with_nothing_imported() -> None:
    code = (
        "import sys, torch; m = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU())\n"
        "x = torch.randn(2, 3, 4, 4); expected = m(x)\n"
        "assert not [name for name in sys.modules if name.startswith('bn_ext')]\n"
        "torch.testing.assert_close(torch.compile(m, backend='bn_ext')(x), expected)\n"
        "assert 'bn_ext.graph.fusion.rewrite' in sys.modules and int(m[0].num_batches_tracked) == 2\n"
    )
    run = forked.run(code, environment=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("backend", ["bn_ext", "bn_ext_inductor"])
def test_backends_by_name(backend: str) -> None:
    """torch's modules stay on the model: the graph alone is ours."""
    model = Block().double()
    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    batches = [example(dtype=torch.float64) for _ in range(2)]
    for x in batches:
        expected = model(x)
        found = compiled(x)
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(expected.sin().sum(), list(model.parameters()))
        mine = torch.autograd.grad(found.sin().sum(), list(compiled._orig_mod.parameters()))
        torch.testing.assert_close(mine, gradients)
    torch.testing.assert_close(compiled._orig_mod.state_dict(), model.state_dict())
    assert type(compiled._orig_mod.bn) is nn.BatchNorm2d
    counted = operators(lambda: compiled(batches[0]))
    assert counted == ({"bn_ext::batch_norm": 1} if backend == "bn_ext" else {})


def test_inductor_takes_modes_and_options() -> None:
    x = example()
    model = Block().eval()
    for given in ({"mode": "max-autotune-no-cudagraphs"}, {"options": {"epilogue_fusion": False}}):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="bn_ext_inductor", **given)(x), model(x))
    with pytest.raises(Exception, match="mode"):
        torch.compile(model, backend="bn_ext", mode="max-autotune")(x)


# ---------------------------------------------------------------------------------------------- around fused models


def whole(model: nn.Module) -> nn.Module:
    return model


def contained(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), model)


def deeper(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(model)), nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize("around", [whole, contained, deeper])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_other_compilers_refuse(backend: str, around: Callable, fullgraph: bool) -> None:
    model = around(bn_ext.fuse(Block()))
    with pytest.raises(Exception, match="backend='bn_ext_inductor'"):
        torch.compile(model, backend=backend, fullgraph=fullgraph)(example())
    if around is whole:
        with pytest.raises(RuntimeError, match="backend='bn_ext_inductor'"):
            model.compile(backend=backend)


@pytest.mark.parametrize("around", [whole, contained, deeper])
@pytest.mark.parametrize("backend", [backends.eager, backends.inductor, "bn_ext"])
def test_ours_take_fused_models(backend: object, around: Callable) -> None:
    x = example()
    plain = around(Block())
    model = copy.deepcopy(plain)
    part = next(m for m in model.modules() if isinstance(m, Block))
    bn_ext.fuse(part)
    graphs = []
    real = backends.rewrite

    def rewrite(module: torch.fx.GraphModule) -> list:
        graphs.append(real(module))
        return graphs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "rewrite", rewrite)
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), plain(x))
    assert [fusion.fused for graph in graphs for fusion in graph] == [("add", "relu")]


def test_compile_in_place() -> None:
    x = example()
    model = bn_ext.fuse(Block())
    model.compile(backend=backends.eager, fullgraph=True)
    assert installed(model) is None
    assert operators(lambda: model(x)) == FUSED


def test_a_fused_part_of_a_fused_model() -> None:
    x = example()
    model = bn_ext.fuse(contained(bn_ext.fuse(Block())))
    assert operators(lambda: model(x)) == FUSED
    assert fused_with(model) == {"1.bn": ("add", "relu")}
    assert operators(lambda: model[1](x)) == FUSED
    bn_ext.graph.unfuse(model)
    assert installed(model[1]) is None


def test_plain_models_beside_fused_ones_compile_as_ever() -> None:
    x = example()
    fused, plain = bn_ext.fuse(Block()), bn_ext.convert(Block())
    fused(x)
    torch.compile(plain, backend="eager", fullgraph=True)(x)
    copy.deepcopy(fused)(x)
    torch.compile(copy.deepcopy(fused), backend="eager", fullgraph=True)(x)
    bn_ext.graph.unfuse(fused)
    torch.compile(fused, backend="eager", fullgraph=True)(x)


# ---------------------------------------------------------------------------------------------- checkpoints


class Checkpointed(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options
        self.block, self.bn = Block(), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.block, x, **self.options) if self.options else self.block(x)
        return F.silu(self.bn(y))


CHECKPOINTS: dict[str, dict] = {
    "plain": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "with contexts": {"use_reentrant": False, "context_fn": bn_ext.checkpoint_contexts},
}


@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("way", [bn_ext.fuse, lambda m: torch.compile(m, backend=backends.eager)])
def test_checkpointed_regions(way: Callable, options: dict) -> None:
    """They are fused, run again in the backward, and count each batch once."""
    plain = Checkpointed().double()
    model = Checkpointed(**options).double()
    model.load_state_dict(plain.state_dict())
    mine = way(model)
    for x in (example(dtype=torch.float64, requires_grad=True) for _ in range(2)):
        plain(x).square().sum().backward()
        mine(x).square().sum().backward()
    torch.testing.assert_close(*([p.grad for p in m.parameters()] for m in (model, plain)))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    loss = mine(x).square().sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        loss.backward()
    names = [event.name for event in profiled.events()]
    assert names.count("aten::convolution") == 1
    assert "aten::relu" not in names
    if way is bn_ext.fuse:
        assert fused_with(model) == {"bn": ("silu",), "block.bn": ("add", "relu")}


# ---------------------------------------------------------------------------------------------- processes


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_the_whole_graph_under_ddp() -> None:
    """torch would cut it where a bucket of gradients is full, as between this batch norm and its addition."""
    plain = Block().double()
    model = bn_ext.fuse(copy.deepcopy(plain))
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-5)
    x = example(dtype=torch.float64)
    for twin in (wrapped, plain):
        twin(x).square().sum().backward()
    torch.testing.assert_close(*([p.grad for p in m.parameters()] for m in (model, plain)))
    assert operators(lambda: wrapped(x)) == FUSED
    assert fused_with(model) == {"bn": ("add", "relu")}
    network = NETWORKS["resnet18"]
    whole_net = bn_ext.fuse(network.make())
    DistributedDataParallel(whole_net, bucket_cap_mb=1e-3)(network.input())
    assert sum(fused == ("add", "relu") for fused in fused_with(whole_net).values()) == 3


# ---------------------------------------------------------------------------------------------- imports


def test_fuse_loads_the_compiler_when_it_is_called() -> None:
    code = "import sys, torch, bn_ext\nassert 'torch._dynamo' not in sys.modules\n"
    code += "bn_ext.graph.unfuse(torch.nn.ReLU())\nassert 'torch._dynamo' not in sys.modules\n"
    run = forked.run(code)
    assert run.returncode == 0, run.stderr
