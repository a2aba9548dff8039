"""Batch norm over several processes, beside one process with the whole batch.

torch's own cases, in torch.testing._internal.distributed.distributed_test, and what covers each: cases of CASES, or
jobs that tests have several processes do. DDP_SBN stands for test_DistributedDataParallel_SyncBatchNorm.

| torch's test | here |
| --- | --- |
| DDP_SBN | `_wrapped` in test_sync_training.py; pickling: `test_others` |
| DDP_SBN_No_Affine | "no affine" |
| DDP_SBN_2D_Input | "2-D" |
| DDP_SBN_Channels_Last | "channels last", "channels last 3-D" |
| DDP_SBN_Single_Input_Per_Process | "one value a rank" |
| DDP_SBN_Diff_Input_Sizes_Running_Value | every other case, by its running statistics |
| DDP_SBN_Diff_Input_Sizes_gradient | every other case, by its gradients |
| DDP_SBN_half | "half", `_large_half`, `_mixed_types` |
| test_SyncBatchNorm_process_group | `test_conversion` in test_sync_convert.py; `_several_groups` |
| test_ddp_uneven_inputs_stop_iteration_sync_bn | `_join` in test_sync_training.py |
| test_ddp_inference | `_collectives`; `_evaluation_in_training` in test_sync_training.py |
| test_ddp_sync_bn_training_vs_eval | `_collectives` |
| test_sync_bn_logged | none: DDP's log knows torch's class alone |
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import collectives, in_each_of
from torch import Tensor, nn

import bn_ext
from bn_ext import SyncBatchNorm

C = 6
PLAIN = {2: bn_ext.BatchNorm1d, 3: bn_ext.BatchNorm1d, 4: bn_ext.BatchNorm2d, 5: bn_ext.BatchNorm3d}


def options(shape: tuple, **more: Any) -> dict[str, Any]:
    """A case: sizes of the whole batch, how many images each rank has, options of the class, arguments of the call."""
    given = {"shape": shape, "cut": None, "module": {}, "call": {}, "residual": False, "mask": None, "layout": None}
    return {**given, "dtype": torch.float64, "steps": 2, **more}


CASES = {
    "2-D": options((9, C)),
    "3-D": options((9, C, 7)),
    "4-D": options((9, C, 5, 3)),
    "5-D": options((9, C, 2, 3, 2)),
    "channels last": options((9, C, 5, 3), layout=torch.channels_last),
    "channels last 3-D": options((9, C, 2, 3, 2), layout=torch.channels_last_3d),
    "permuted": options((9, C, 5, 3), layout="permuted"),
    "one value a rank": options((4, C), cut=[1, 1, 1, 1]),
    "an empty rank": options((9, C, 5), cut=[4, 0, 3, 2]),
    "first ranks empty": options((9, C, 5), cut=[0, 0, 6, 3]),
    "one rank has all": options((9, C, 5), cut=[0, 9, 0, 0]),
    "no affine": options((9, C, 5), module={"affine": False}),
    "no statistics": options((9, C, 5), module={"track_running_stats": False}),
    "cumulative": options((9, C, 5), module={"momentum": None}, steps=3),
    "relu": options((9, C, 5), call={"activation": "relu"}),
    "residual and relu": options((9, C, 5), residual=True, call={"activation": "relu"}),
    "residual and silu": options((9, C, 5), residual=True, call={"activation": "silu"}, cut=[0, 3, 3, 3]),
    "residual": options((9, C, 5), residual=True),
    "mask": options((9, C, 5), mask="bool", residual=True, call={"activation": "relu"}),
    "mask and residual": options((9, C, 5), mask="bool", residual=True),
    "mask and silu": options((9, C, 5), mask="bool", residual=True, call={"activation": "silu"}),
    "weights": options((9, C, 5), mask="weights", cut=[3, 0, 4, 2]),
    "a large mean": options((9, C, 5), call={"activation": None}, offset=1e6),
    "float32": options((9, C, 5, 3), dtype=torch.float32, residual=True, call={"activation": "relu"}),
    "half": options((9, C, 5, 3), dtype=torch.float16, module={"dtype": torch.float16}),
}


def _cut(case: dict[str, Any]) -> slice:
    ranks, mine, n = dist.get_world_size(), dist.get_rank(), case["shape"][0]
    sizes = (case["cut"] or [n // 3 + 1, 1, 2, 0])[:ranks]
    sizes[-1] += n - sum(sizes)
    return slice(sum(sizes[:mine]), sum(sizes[: mine + 1]))


def _laid_out(x: Tensor, layout: Any) -> Tensor:
    if layout == "permuted":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return x if layout is None else x.contiguous(memory_format=layout)


def _mask(case: dict[str, Any], x: Tensor) -> Tensor | None:
    if case["mask"] is None:
        return None
    weights = torch.rand(x.shape[:1] + x.shape[2:]) - 0.3
    return weights > 0 if case["mask"] == "bool" else weights


def _results(bn: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor, call: dict[str, Any]) -> dict[str, Any]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    bn.zero_grad()
    y = bn(x, residual, **call)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "dresidual": None if residual is None else residual.grad}
    return {**found, **{f"d{name}": p.grad for name, p in bn.named_parameters()}}


def _as_one_process(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(len(name))
    mine, dtype = _cut(case), case["dtype"]
    module = {"dtype": dtype, **case["module"]}
    whole = PLAIN[len(case["shape"])](C, **module)
    with torch.no_grad():
        for p in whole.parameters():
            p.normal_()
    sync = SyncBatchNorm(C, **module)
    sync.load_state_dict(whole.state_dict())
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3}[dtype]
    tolerance *= 1e3 if "offset" in case else 1
    for _ in range(case["steps"]):
        x, residual, dy = torch.randn(3, *case["shape"], dtype=torch.float64).to(dtype)
        x = _laid_out(x * 2 + 1 + case.get("offset", 0), case["layout"])
        mask = _mask(case, x)
        call = case["call"] | ({} if mask is None else {"mask": mask})
        expected = _results(whole, x, residual if case["residual"] else None, dy, call)
        if mask is not None:
            call["mask"] = mask[mine]
        mine_of = (_laid_out(x[mine], case["layout"]), residual[mine] if case["residual"] else None, dy[mine], call)
        found = _results(sync, *mine_of)
        for key, whole_value in expected.items():
            if whole_value is None:
                assert found[key] is None
                continue
            if key in ("dweight", "dbias"):  # of each rank's own values
                dist.all_reduce(found[key])
            value = whole_value if key in ("dweight", "dbias") else whole_value[mine]
            scale = value.abs().max().clamp(min=1).item() if value.numel() else 1
            torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance * scale, msg=f"{name}: {key}")
        if isinstance(case["layout"], torch.memory_format):
            assert found["y"].is_contiguous(memory_format=case["layout"])
    names = ("running_mean", "running_var", "num_batches_tracked")
    for key in names:
        a, b = getattr(sync, key), getattr(whole, key)
        assert (a is None) == (b is None)
        if a is not None and key != "num_batches_tracked":
            scale = b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, msg=f"{name}: {key}")
        if a is not None:
            same = [torch.empty_like(a) for _ in range(dist.get_world_size())]
            dist.all_gather(same, a)
            assert all(torch.equal(one, a) for one in same), f"{name}: {key} differs between ranks"


def _cases() -> None:
    for name in CASES:
        try:
            _as_one_process(name)
        except Exception as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_as_one_process(ranks: int, tmp_path: Path) -> None:
    in_each_of(ranks, tmp_path, _cases)


# ---------------------------------------------------------------------------------------------- more than values


def _pair(dtype: torch.dtype = torch.float64, **given: Any) -> tuple[nn.Module, SyncBatchNorm]:
    whole = bn_ext.BatchNorm1d(C, dtype=dtype, **given)
    with torch.no_grad():
        for p in whole.parameters():
            p.normal_()
    sync = SyncBatchNorm(C, dtype=dtype, **given)
    sync.load_state_dict(whole.state_dict())
    return whole, sync


def _mine(whole: Tensor) -> Tensor:
    """A part for each rank, of different sizes."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    first = rank * (rank + 1) // 2
    return whole[first : None if rank == ranks - 1 else first + rank + 1]


def _collectives() -> None:
    _, sync = _pair()
    x = torch.randn(2, C, 3, dtype=torch.float64)
    for given in ({}, {"activation": "relu", "residual": x}, {"mask": torch.ones(2, 3)}):
        leaf = x.clone().requires_grad_()
        with collectives(1):
            y = sync(leaf, **given)
        with collectives(1):
            y.sum().backward()
    with collectives(1):
        y = sync(x)
    with collectives(0):  # gradients of weight and bias are of the rank's own values
        y.sum().backward()
    with collectives(1), torch.no_grad():
        sync(x)
    with collectives(0):
        sync.eval()(leaf).sum().backward()
    if dist.get_rank() == 0:
        SyncBatchNorm(C, track_running_stats=False).eval()(x.float())


def _large_half() -> None:
    """Sums beyond 65504, in a rank and over ranks."""
    sync = SyncBatchNorm(C, affine=False)
    x = torch.full((64, C, 64), 500.0).half()
    x[:, :, ::2] = -300
    x.requires_grad_()
    y = sync(x)
    (y * 60000).sum().backward()
    expected = torch.tensor([1.0, -1.0]).repeat(32)
    torch.testing.assert_close(y[0, 0].float(), expected.flip(0), rtol=0, atol=2e-3)
    assert x.grad.isfinite().all()
    assert sync.running_mean.allclose(torch.tensor(10.0)), sync.running_mean


def _mixed_types() -> None:
    """Ranks may have inputs of other dtypes, ranks of tensors and sizes."""
    x = torch.randn(10, C, 4)
    rank = dist.get_rank()
    whole, sync = _pair(torch.float32)
    mine = _mine(x)
    given = mine.half() if rank == 0 else mine.unsqueeze(-1)
    y = sync(given.clone().requires_grad_())
    y.sum().backward()
    assert y.dtype == given.dtype
    torch.testing.assert_close(y.float().reshape(mine.shape), _mine(whole(x)), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(sync.running_var, whole.running_var, rtol=1e-3, atol=1e-3)


def _by_ranks() -> None:
    """Each rank counts alike, but those without values. Gradients against autograd's of the formula."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    parts = [torch.randn(n, C, 4, dtype=torch.float64) * (n + 1) + n for n in (1, 3, 0, 4)[:ranks]]
    dys = [torch.randn_like(part) for part in parts]
    sync = SyncBatchNorm(C, weighting="ranks", momentum=1.0, dtype=torch.float64)
    leaves = [part.clone().requires_grad_() for part in parts]
    some = [leaf for leaf in leaves if len(leaf)]
    mean = sum(leaf.mean((0, 2)) for leaf in some) / len(some)
    var = sum((leaf - mean[:, None]).square().mean((0, 2)) for leaf in some) / len(some)
    outputs = [(leaf - mean[:, None]) / (var[:, None] + sync.eps).sqrt() for leaf in leaves]
    torch.autograd.backward(outputs, dys)
    x = parts[rank].clone().requires_grad_()
    y = sync(x)
    y.backward(dys[rank])
    torch.testing.assert_close(y, outputs[rank], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, leaves[rank].grad, rtol=1e-12, atol=1e-12)
    values = len(some) ** 2 / sum(1 / (len(leaf) * 4) for leaf in some)  # that vary as much: an unbiased variance
    torch.testing.assert_close(sync.running_mean, mean.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sync.running_var, var.detach() * values / (values - 1), rtol=1e-12, atol=1e-12)


def _no_values() -> None:
    """One value in all, or none, is normalized to 0; statistics and counter stay."""
    _, sync = _pair()
    for n in (0, int(dist.get_rank() == 1)):
        x = torch.full((n, C), 3.0, dtype=torch.float64, requires_grad=True)
        y = sync(x)
        y.sum().backward()
        torch.testing.assert_close(y, sync.bias.expand_as(y))
        assert x.grad.shape == x.shape
        assert not x.grad.any()
    assert not sync.running_mean.any()
    assert sync.num_batches_tracked == 0


def _second_derivatives() -> None:
    """Of the sum of all ranks' losses, as in one process."""
    whole_x, equal = torch.randn(10, C, 4, dtype=torch.float64), torch.randn(6, C, 4, dtype=torch.float64)
    mask = torch.rand(10, 4) > 0.3
    for weighting, x, call in (
        ("samples", whole_x, {}),
        ("samples", whole_x, {"activation": "silu"}),
        ("samples", whole_x, {"mask": mask}),
        ("samples", whole_x, {"mask": mask, "residual": whole_x.flip(0), "activation": "silu"}),
        ("ranks", equal, {}),
    ):
        whole, sync = _pair()
        sync.weighting = weighting
        cut = _equal_parts if weighting == "ranks" else _mine
        theirs = _second(whole, x, call)
        ours = _second(sync, cut(x), {name: cut(t) if isinstance(t, Tensor) else t for name, t in call.items()})
        dist.all_reduce(ours["dweight"])
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value if key == "dweight" else cut(value), rtol=1e-10, atol=1e-10)


def _equal_parts(whole: Tensor) -> Tensor:
    return whole.chunk(dist.get_world_size())[dist.get_rank()]


def _second(bn: nn.Module, x: Tensor, call: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients, and the gradients of the first one's square."""
    x = x.clone().requires_grad_()
    residual = call.get("residual", torch.zeros_like(x)).clone().requires_grad_()
    y = bn(x, **(call | {"residual": residual}))
    first = torch.autograd.grad((y.pow(3) + y).sum(), [x, residual], create_graph=True)
    second = torch.autograd.grad(first[0].pow(2).sum() + y.sum(), [x, bn.weight])
    return {"dx": first[0].detach(), "dresidual": first[1].detach(), "second": second[0], "dweight": second[1]}


def _refused_second_derivative() -> None:
    _, sync = _pair()
    x, residual = torch.randn(2, 3, C, dtype=torch.float64).unbind()
    y = sync(x.requires_grad_(), residual.requires_grad_(), activation="relu")
    with pytest.raises(RuntimeError, match="a second derivative needs the residual"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def _checkpointed() -> None:
    """The second forward makes no collective, reads the same statistics, and moves none."""
    _, sync = _pair()
    layers = nn.Sequential(nn.Linear(C, C, dtype=torch.float64), sync, nn.Tanh())
    twin = copy.deepcopy(layers)
    x = _mine(torch.randn(10, C, dtype=torch.float64)).requires_grad_()
    with collectives(2):
        y = layers(x)
        y.square().sum().backward()
    x2 = x.detach().clone().requires_grad_()
    with collectives(2):
        again = torch.utils.checkpoint.checkpoint(twin, x2, use_reentrant=False, context_fn=bn_ext.checkpoint_contexts)
        again.square().sum().backward()
    assert torch.equal(y, again)
    assert torch.equal(x.grad, x2.grad)
    assert all(map(torch.equal, layers.state_dict().values(), twin.state_dict().values()))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(layers.parameters(), twin.parameters()))


def _compiled() -> None:
    group = dist.new_group()
    for given in ({}, {"activation": "relu", "residual": True, "mask": True}):
        _, sync = _pair()
        sync.process_group = group
        twin = copy.deepcopy(sync)
        torch._dynamo.reset()
        step = torch.compile(twin, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x = _mine(torch.randn(10, C, 4, dtype=torch.float64))
            call = dict(given)
            if "residual" in call:
                call["residual"] = torch.randn_like(x)
            if "mask" in call:
                call["mask"] = torch.rand(len(x), 4) > 0.3
            grads = []
            for bn in (sync, step):
                leaf = x.clone().requires_grad_()
                with collectives(2, group):
                    y = bn(leaf, **call)
                    y.square().sum().backward()
                grads.append((y.detach(), leaf.grad))
            torch.testing.assert_close(grads[1], grads[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(twin.state_dict(), sync.state_dict(), rtol=1e-13, atol=1e-13)


BEHAVIOURS = [
    _collectives,
    _large_half,
    _mixed_types,
    _by_ranks,
    _no_values,
    _second_derivatives,
    _refused_second_derivative,
    _checkpointed,
    _compiled,
]


def _behaviours() -> None:
    for behaviour in BEHAVIOURS:
        torch.manual_seed(0)
        try:
            behaviour()
        except BaseException as error:
            raise AssertionError(behaviour.__name__) from error


def test_behaviours(tmp_path: Path) -> None:
    in_each_of(3, tmp_path, _behaviours)
