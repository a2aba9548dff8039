"""What holds for each class that normalizes by other sets of values: a call and its gradients against formulas in
float64, and how the class meets copies, compilers, transforms and exporters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Given a module of dtype float64 and an input: the normalized values, without residual and activation.
Formula = Callable[..., Tensor]

TAILS = [(False, None), (True, "relu"), (True, "silu")]
tails = pytest.mark.parametrize(("residual", "activation"), TAILS, ids=str)
# What the largest difference may be, for values of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
calls = pytest.mark.parametrize(
    ("dtype", "residual", "activation"),
    [
        (torch.float64, False, None),
        (torch.float64, True, "silu"),
        (torch.float32, True, "relu"),
        (torch.bfloat16, True, "relu"),
        (torch.float16, False, "silu"),
    ],
    ids=str,
)


def randomized(module: nn.Module) -> nn.Module:
    """``module`` with parameters and statistics that are not what they begin as."""
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if name == "running_var":
                t.uniform_(0.5, 2)
            elif t.is_floating_point():
                t.normal_()
    return module


def spread(t: Tensor, x: Tensor) -> Tensor:
    """A (C,) tensor, or one of (N, C), to broadcast against (N, C, *)."""
    return t.view(*([1] * (2 - t.dim())), *t.shape, *[1] * (x.dim() - 2))


def normalized(x: Tensor, others: Any) -> Tensor:
    """To mean 0 and variance 1 over some dimensions."""
    xmu = x - x.mean(others, True)
    return xmu * (xmu.square().mean(others, True) + 1e-5).rsqrt()


def results(call: Callable[..., Tensor], module: nn.Module, x: Tensor, residual: Tensor | None, *args: Any) -> dict:
    """The output of ``call(x, residual)`` and all gradients, by name, for a gradient of the output that is fixed."""
    leaves = {"dx": x.detach().requires_grad_()}
    if residual is not None:
        leaves["dresidual"] = residual.detach().requires_grad_()
    output = call(leaves["dx"], *args, leaves.get("dresidual"))
    dy = torch.linspace(-1, 1.3, output.numel(), dtype=torch.float64, device=x.device).cos().view(output.shape)
    wanted = leaves | dict(module.named_parameters())
    return {"output": output.detach()} | dict(
        zip(wanted, torch.autograd.grad(output, wanted.values(), dy.to(output.dtype)), strict=True)
    )


def assert_follows(
    formula: Formula, module: nn.Module, x: Tensor, *args: Any, residual: bool = False, activation: str | None = None
) -> None:
    """The module's output and gradients, for ``x`` of its dtype, are those of the formula in float64."""
    added = torch.randn_like(x) if residual else None
    exact = copy.deepcopy(module).double()

    def expected(x: Tensor, *rest: Any) -> Tensor:
        *args, added = rest
        z = formula(exact, x, *args)
        z = z if added is None else z + added
        return z if activation is None else getattr(F, activation)(z)

    double = None if added is None else added.double()
    theirs = results(expected, exact, x.double(), double, *args)
    ours = results(lambda *a: module(*a, activation=activation), module, x, added, *args)
    assert ours["output"].dtype == ours["dx"].dtype == x.dtype
    for name, value in theirs.items():
        scale = max(1.0, value.abs().max().item())
        off = (ours[name].double() - value).abs().max().item()
        assert off <= TOLERANCE[x.dtype] * scale, f"{name} is off by {off} of {scale}"


def assert_gradcheck(module: nn.Module, x: Tensor, *args: Any, second: bool = True, **options: Any) -> None:
    """In float64, of input, residual and parameters; of the second order too, unless there is none."""
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        given = {**dict(zip(names, parameters, strict=True)), **{n: b.clone() for n, b in module.named_buffers()}}
        return torch.func.functional_call(module, given, (x, *args, residual), options)

    leaves = [t.detach().double().requires_grad_() for t in (x, torch.randn_like(x), *module.parameters())]
    assert torch.autograd.gradcheck(call, leaves)
    if second:
        assert torch.autograd.gradgradcheck(call, leaves)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_copies(module: nn.Module, x: Tensor, *args: Any) -> None:
    """Copies are of the same class and compute the same, in training and in evaluation."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin) is type(module)
        assert repr(twin) == repr(module)
        assert repr(twin).endswith("bn_ext)")
        one = copy.deepcopy(module)
        for training in (True, False):
            assert torch.equal(twin.train(training)(x, *args), one.train(training)(x, *args))
        assert same(twin.state_dict(), one.state_dict())


def assert_compiles(module: nn.Module, x: Tensor, *args: Any, **options: Any) -> None:
    """Whole, and to the bits of the plain call: output, gradients, statistics."""
    torch._dynamo.reset()
    compiled = copy.deepcopy(module)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        one, other = (
            results(lambda *a, m=m: m(*a, **options), m.train(mode), x, torch.ones_like(x), *args)
            for m in (compiled, module)
        )
        for name, value in other.items():
            assert torch.equal(one[name], value), name
        assert same(compiled.state_dict(), module.state_dict())
    torch._dynamo.reset()


def assert_deterministic(module: nn.Module, x: Tensor, *args: Any) -> None:
    """The same bits for every number of threads, statistics too."""
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        one = copy.deepcopy(module)
        found.append(results(one, one, x, None, *args) | one.state_dict())
    assert all(same(found[0], other) for other in found[1:])


def assert_transforms(module: nn.Module, x: Tensor, *args: Any) -> None:
    """torch.func gives the gradient that autograd gives; the buffers are those of the transformed function."""
    module = copy.deepcopy(module).double()
    x = x.double()

    def value(x: Tensor) -> Tensor:
        buffers = {name: x.new_zeros(b.shape, dtype=b.dtype).copy_(b) for name, b in module.named_buffers()}
        return torch.func.functional_call(module, buffers, (x, *args)).square().sin().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(copy.deepcopy(module)(leaf, *args).square().sin().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(value)(x), expected, rtol=1e-9, atol=1e-9)
    module.eval()
    many = torch.stack([x, x + 1])
    by_map = torch.func.vmap(lambda x: module(x, *args))(many)
    torch.testing.assert_close(by_map, torch.stack([module(x, *args) for x in many]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(module(dual, *args)).tangent
    _, expected = torch.func.jvp(lambda x: module(x, *args), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected)


def assert_exports(module: nn.Module, x: Tensor, *args: Any, training: str | None) -> None:
    """In evaluation by standard operators alone; in training too, or it refuses with this message."""
    program = torch.export.export(module.eval(), (x, *args))
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert all(name.startswith("aten.") for name in called), called
    torch.testing.assert_close(program.module()(x, *args), module(x, *args))
    torch.onnx.export(module, (x, *args), io.BytesIO(), dynamo=False)
    module.train()
    if training is None:
        program = torch.export.export(copy.deepcopy(module), (x, *args))
        torch.testing.assert_close(program.module()(x, *args), module(x, *args))
        return
    for exported in (
        lambda: torch.export.export(module, (x, *args), strict=False),
        lambda: torch.onnx.export(
            module, (x, *args), io.BytesIO(), dynamo=False, training=torch.onnx.TrainingMode.TRAINING
        ),
    ):
        with pytest.raises(RuntimeError, match=training):
            exported()


def assert_autocast(layer: nn.Module, norm: nn.Module, x: Tensor) -> None:
    """Behind a layer that autocast computes in half precision."""
    model = nn.Sequential(layer, norm)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), copy.deepcopy(model)(x), rtol=0.05, atol=0.05)


def assert_refuses(module: nn.Module, x: Tensor, *args: Any) -> None:
    """Nested and complex inputs, by name, with nothing changed."""
    before = copy.deepcopy(module.state_dict())
    nested = torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)
    for wrong, name in ((nested, "nested tensors"), (x + 0j, "ComplexFloat|complex64")):
        with pytest.raises(NotImplementedError, match=name):
            module(wrong, *args)
    assert same(module.state_dict(), before)
