"""Outputs made again under hooks, checkpoints, threads, copies and compilers."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from recomputed import Net, assert_same, every_way, example, fused, kept, pair, step, written
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import bn_ext
from bn_ext.graph.fusion.installed import surrounding
from bn_ext.tools.profiling import allocated
from bn_ext.train import keep_outputs, recompute_outputs

# ---------------------------------------------------------------------------------------------- hooks, checkpoints


class Copies(saved_tensors_hooks):
    """A user's own hooks, which save copies of everything."""

    def __init__(self) -> None:
        self.bytes = 0

        def pack(t: Tensor) -> Tensor:
            self.bytes += t.nbytes
            return t.detach().clone()

        super().__init__(pack, lambda t: t)


@every_way
@pytest.mark.parametrize("hooks", [save_on_cpu, Copies])
def test_hooks_around(hooks: Callable, make: Callable, device: str) -> None:
    plain, again = (model.to(device) for model in pair(make))
    x = example(device=device)
    assert_same(step(plain, x), step(again, x, around=hooks))


def test_hooks_around_get_what_is_not_made_again() -> None:
    plain, again = pair(fused)
    x, packed = example(16), []
    for model in (plain, again):
        model(x)
        hooks = Copies()
        with hooks:
            model(x)
        packed.append(hooks.bytes)
    assert packed[1] < 0.7 * packed[0]


@every_way
@pytest.mark.parametrize("hooks", [save_on_cpu, Copies])
def test_hooks_inside(hooks: Callable, make: Callable) -> None:
    def inside(call: Callable, x: Tensor) -> Tensor:
        with hooks():
            return call(x)

    plain, again = pair(make)
    again.within = inside
    x = example()
    assert_same(step(plain, x), step(again, x))


@every_way
def test_hooks_inside_get_everything(make: Callable) -> None:
    bytes_packed = []
    for model in pair(make):
        hooks = Copies()

        def inside(call: Callable, x: Tensor, hooks: Copies = hooks) -> Tensor:
            with hooks:
                return call(x)

        model.within = inside
        model(example())
        hooks.bytes = 0
        model(example())
        bytes_packed.append(hooks.bytes)
    assert bytes_packed[0] == bytes_packed[1] > 0


@every_way
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpoints(inside: bool, reentrant: bool, make: Callable) -> None:
    def call(model: Callable, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)

    plain, again = pair(make)
    x = example(requires_grad=True)
    for model in (plain, again) if inside else ():
        model.within = call
    results = [
        step(model, x, call=None if inside else lambda x, model=model: call(model, x)) for model in (plain, again)
    ]
    assert_same(*results)


def test_checkpoint_around_keeps_nothing_inside() -> None:
    plain, again = pair(fused)
    x = example(16, requires_grad=True)
    sizes = []
    for model in (plain, again):
        step(model, x)
        sizes.append(allocated(lambda model=model: checkpoint(model, x, use_reentrant=False), "cpu")[0])
    assert sizes[1] <= sizes[0] + 4096  # two numbers a channel, in float64


# ---------------------------------------------------------------------------------------------- calls


def hooked() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@every_way
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_forward_takes_hooks_off(error: type[BaseException], make: Callable) -> None:
    _, model = pair(make)
    fails = True

    def inside(call: Callable, x: Tensor) -> Tensor:
        if fails:
            raise error
        return call(x)

    model.within = inside
    with pytest.raises(error):
        model(example())
    assert not hooked()
    fails = False
    y = bn_ext.BatchNorm2d(3)(example(requires_grad=True))
    y.sum().backward()


def test_two_threads() -> None:
    plain, again = pair(written)
    plain.drop.p = again.drop.p = 0.0
    again.within = lambda call, x: (barrier.wait(30), call(x))[1]
    barrier = threading.Barrier(2)
    xs = [example() for _ in range(2)]
    results: dict[int, tuple[Tensor, ...]] = {}

    def run(number: int) -> None:
        output = again(xs[number])
        results[number] = torch.autograd.grad(output.square().sum(), [*again.parameters()])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, x in enumerate(xs):
        expected = torch.autograd.grad(plain(x).square().sum(), [*plain.parameters()])
        assert_same([*expected], [*results[number]])


def test_fuse_and_undo_in_any_order() -> None:
    x, plain = example(16), Net()
    expected = bn_ext.fuse(copy.deepcopy(plain))
    for prepare in (
        lambda m: bn_ext.fuse(recompute_outputs(bn_ext.convert(m))),
        lambda m: recompute_outputs(recompute_outputs(bn_ext.fuse(m), chains=False)),
        lambda m: bn_ext.fuse(bn_ext.fuse(recompute_outputs(m)), x),
    ):
        again = prepare(copy.deepcopy(plain))
        assert kept(again, x) < 0.7 * kept(expected, x)
        assert len(bn_ext.graph.fusions(again)) == 2
        assert_same(step(bn_ext.fuse(copy.deepcopy(plain)), x), step(prepare(copy.deepcopy(plain)), x))
        bn_ext.graph.unfuse(again)
        assert surrounding(again) is not None
        assert set(vars(bn_ext.revert(keep_outputs(again)))) == set(vars(plain))
        assert type(again.bn1) is nn.BatchNorm2d


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("prepare", [bn_ext.fuse, bn_ext.convert])
def test_copies_keep_their_outputs(again: Callable, prepare: Callable) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model = recompute_outputs(prepare(model))
    twin, x = again(model), example(16)
    assert_same(step(model, x), step(twin, x))
    assert kept(twin, x) > kept(model, x)
    recompute_outputs(twin)
    assert kept(twin, x) == kept(model, x)
    keep_outputs(twin)


def test_nothing_to_record() -> None:
    _, model = pair(written)
    model.eval().within = lambda call, x: (seen.append(hooked()), call(x))[1]
    seen: list[bool] = []
    with torch.no_grad():
        model(example())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (example(),)).sum())(parameters)
    assert seen == [False, False]
    model(example())
    assert seen == [False, False, True]


@pytest.mark.parametrize("how", ["torch.compile", "compile"])
def test_compiled_by_the_eager_backend(how: str) -> None:
    torch._dynamo.reset()  # of other tests Dynamo would know sizes that vary
    x, plain = example(16), Net()
    expected = bn_ext.fuse(copy.deepcopy(plain))
    model = recompute_outputs(bn_ext.convert(copy.deepcopy(plain)))
    if how == "compile":
        model.compile(backend="bn_ext")
        call = model
    else:
        call = torch.compile(model, backend="bn_ext")
    assert_same(step(expected, x), step(model, x, call=call))
    size = allocated(lambda: call(x), "cpu")[0]
    assert size < 0.7 * kept(expected, x)


def test_compiled_by_inductor() -> None:
    """The backward makes outputs again, and gives what it gives without."""
    x = example(16)
    model = bn_ext.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    found = []
    for options in ({}, {"joint_custom_post_pass": None}):
        torch._dynamo.reset()
        call = torch.compile(copy.deepcopy(model), backend="bn_ext_inductor", options=options)
        call(x).square().sum().backward()
        gradients = [p.grad.clone() for p in call.parameters()]
        found.append((gradients, allocated(lambda call=call: call(x), "cpu")[0]))
    (ours, kept_by_us), (plain, kept_without) = found
    torch.testing.assert_close(ours, plain)
    assert kept_by_us < 0.7 * kept_without


def test_partition() -> None:
    """AOTAutograd keeps less, and makes an output when it is about to be read."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    from bn_ext.graph.fusion.partition import partition
    from bn_ext.graph.fusion.rewrite import rewrite

    def nop(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return boxed_nop(graph, inputs)

    model = bn_ext.convert(Net("silu"))
    model.drop.p = 0.0
    x, sizes, results, graphs = example(16), [], [], []
    for cut in (min_cut_rematerialization_partition, partition):
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        inner = aot_autograd(fw_compiler=nop, partition_fn=cut)
        call = torch.compile(twin, backend=lambda *given, inner=inner: (rewrite(given[0]), inner(*given))[1])
        results.append(step(twin, x, call=call))
        sizes.append(allocated(lambda call=call: call(x), "cpu")[0])
    assert_same(*results)
    assert sizes[0] - sizes[1] >= 2 * 4 * 6 * 16 * 16 * 4
    names = [node.name for node in graphs[-1].graph.nodes]
    order = [
        name.startswith("batch_norm_elemt") for name in names if name.startswith(("batch_norm_elemt", "convolution_b"))
    ]
    assert order.count(True) == 2
    assert order[0] is False, "the last convolution reads no output of a batch norm"


@pytest.mark.parametrize("given", [1, "no"])
def test_arguments(given: object) -> None:
    with pytest.raises(TypeError, match="chains should be True or False, got an object of"):
        recompute_outputs(nn.BatchNorm2d(3), chains=given)
    for function in (recompute_outputs, keep_outputs):
        with pytest.raises(TypeError, match=f"{function.__name__}: model should be a torch.nn.Module"):
            function(given)
