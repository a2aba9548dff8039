"""The sample inputs and error inputs that torch tests its own batch norm with, run through ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from modules import NAMES, assert_agree, assert_same_step, ours
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bn_ext

pytest.importorskip("expecttest", reason="needs expecttest, as torch's own tests do")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

MODULE_INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in NAMES}
(OP_INFO,) = [op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

every_module = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_all_are_found() -> None:
    assert sorted(MODULE_INFOS) == NAMES


def module_samples(name: str, device: str, dtype: torch.dtype, training: bool) -> Iterator[tuple]:
    """Our module, torch's and the input of each sample."""
    info = MODULE_INFOS[name]
    samples = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training)
    assert samples, "no samples"
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = info.module_cls(*args, **kwargs).to(device, dtype).train(training)
        mine = ours(name)(*args, **kwargs).to(device, dtype).train(training)
        (input,) = sample.forward_input.args
        assert not sample.forward_input.kwargs
        yield mine, theirs, input


@every_module
@every_dtype
@pytest.mark.parametrize("training", [True, False])
def test_module_samples(name: str, dtype: torch.dtype, training: bool, device: str) -> None:
    for mine, theirs, input in module_samples(name, device, dtype, training):
        assert_same_step(mine, theirs, input)


@every_module
@pytest.mark.parametrize("training", [True, False])
def test_module_gradients(name: str, training: bool, device: str) -> None:
    for module, _, input in module_samples(name, device, torch.float64, training):

        def call(x: Tensor, *_: Tensor, module=module) -> Tensor:
            return module(x)

        assert gradcheck(call, (input, *module.parameters()), fast_mode=True), module
        assert gradgradcheck(call, (input, *module.parameters()), fast_mode=True), module


@every_module
def test_module_errors(name: str, device: str) -> None:
    info = MODULE_INFOS[name]
    errors = info.module_error_inputs_func(info, device=device, dtype=torch.float32, requires_grad=False, training=True)
    assert errors, "no error inputs"
    for error in errors:
        constructor, input = error.module_error_input.constructor_input, error.module_error_input.forward_input

        def construct(constructor=constructor) -> torch.nn.Module:
            return ours(name)(*constructor.args, **constructor.kwargs).to(device)

        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                construct()
            continue
        module = construct()
        with pytest.raises(error.error_type, match=error.error_regex):
            module(*input.args, **input.kwargs)
        assert module.num_batches_tracked.item() == 0


def op_samples(device: str, dtype: torch.dtype, requires_grad: bool = True) -> list:
    samples = list(OP_INFO.sample_inputs_func(OP_INFO, device, dtype, requires_grad))
    assert samples, "no samples"
    return samples


def _pure(sample, batch_norm: Callable, dtype: torch.dtype = torch.float64) -> tuple:
    """The sample's call as a function of what is differentiable, on copies of the running statistics, and that."""
    input, mean, var, weight, bias = (None if t is None else t.to(dtype) for t in (sample.input, *sample.args))

    def call(input: Tensor, weight: Tensor | None = weight, bias: Tensor | None = bias) -> Tensor:
        running = [None if t is None else t.clone() for t in (mean, var)]
        return batch_norm(input, *running, weight, bias, **sample.kwargs)

    return call, tuple(t.detach().requires_grad_() for t in (input, weight, bias) if t is not None)


@every_dtype
def test_op_samples(dtype: torch.dtype, device: str) -> None:
    """Ours is as near to torch's in float64 as torch's is."""
    assert dtype in OP_INFO.dtypes
    for sample in op_samples(device, dtype):
        dy = torch.randn_like(sample.input)
        results = []
        torchs = torch.nn.functional.batch_norm
        for batch_norm, kind in (bn_ext.functional.batch_norm, dtype), (torchs, dtype), (torchs, torch.float64):
            call, leaves = _pure(sample, batch_norm, kind)
            output = call(*leaves)
            results.append([output.detach(), *torch.autograd.grad(output, leaves, dy.to(kind))])
        for mine, theirs, exact in zip(*results, strict=True):
            assert_agree(mine, theirs, exact, sample.summary())


@pytest.mark.parametrize("forward_mode", [False, True])
def test_op_gradients(forward_mode: bool, device: str) -> None:
    for sample in op_samples(device, torch.float64):
        call, leaves = _pure(sample, bn_ext.functional.batch_norm)
        options = {"check_forward_ad": True, "check_backward_ad": False} if forward_mode else {}
        assert gradcheck(call, leaves, check_batched_grad=not forward_mode, **options), sample.summary()
        if not forward_mode:
            assert gradgradcheck(call, leaves), sample.summary()


def test_op_errors(device: str) -> None:
    if OP_INFO.error_inputs_func is None:
        pytest.skip("this torch has no error inputs for nn.functional.batch_norm")
    for error in OP_INFO.error_inputs(device):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            bn_ext.functional.batch_norm(sample.input, *sample.args, **sample.kwargs)
