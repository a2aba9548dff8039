"""Launch plans, as tables: every batch-norm layer of some networks, on every GPU that has a name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from layers import EFFICIENTNET_B0, RESNET_50

from bn_ext import _C
from bn_ext._C import LaunchPlan, Pass
from bn_ext.activation import NAMES

KIB = 1 << 10
TYPE_SIZES = {"float32": 4, "bfloat16": 2}
LAYOUTS = "planar", "interleaved"
BATCHES = 1, 32, 256

# Tensors read to be summed and to be applied; those written are one.
WORK = {"forward": (1, 1), "inference": (0, 1), "backward": (2, 2)}
LEAST = {"forward": 2, "inference": 2, "backward": 3}
TORCHS = {"forward": 3, "inference": 2, "backward": 5}


class Gpu(NamedTuple):
    """Multiprocessors, bytes of shared memory that a block and a multiprocessor have, blocks of a cluster."""

    multiprocessors: int
    block: int
    multiprocessor: int
    cluster: int


GPUS = {
    "t4": Gpu(40, 64 * KIB, 64 * KIB, 1),
    "a100": Gpu(108, 163 * KIB, 164 * KIB, 1),
    "rtx4090": Gpu(128, 99 * KIB, 100 * KIB, 1),
    "h100": Gpu(132, 227 * KIB, 228 * KIB, 16),
    "b200": Gpu(148, 227 * KIB, 228 * KIB, 16),
    "rtx5090": Gpu(170, 99 * KIB, 100 * KIB, 8),
}
MULTIPROCESSOR_THREADS = 512  # of 128 registers each
RESERVED = 1 * KIB  # of a multiprocessor's shared memory, for each block

NETWORKS: dict[str, tuple[int, dict[int, list[int]]]] = {
    "ResNet-50": (2, RESNET_50),
    "EfficientNet-B0": (2, EFFICIENTNET_B0),
    "DenseNet-121": (
        2,
        {
            112: [64],
            56: [*range(64, 257, 32)],
            28: [*range(128, 513, 32)],
            14: [128, *range(256, 1025, 32)],
            7: [128, *range(512, 1025, 32)],
        },
    ),
    "3-D U-Net": (3, {128: [32, 64], 64: [64, 128], 32: [128, 256], 16: [256, 512]}),
}


class Planned(NamedTuple):
    """A plan and what it is of: n rows of c channels of s values each, as kernels see the problem."""

    n: int
    c: int
    s: int
    dtype: str
    direction: str
    gpu: Gpu
    plan: LaunchPlan

    @property
    def lanes(self) -> int:
        return 16 // TYPE_SIZES[self.dtype]

    @property
    def tensor_bytes(self) -> int:
        return self.n * self.c * self.s * TYPE_SIZES[self.dtype]

    @property
    def blocks(self) -> int:
        return self.plan.teams * self.plan.team_blocks

    @property
    def most_packs(self) -> int:
        """Of one thread."""
        return -(-self.plan.share // self.plan.active)


def launch_plan(
    n: int, c: int, s: int, gpu: str = "h100", groups: Sequence[int] | None = None, **call: Any
) -> LaunchPlan:
    return _C.launch_plan(Pass((n, c, s), **call), gpu, groups=groups)


def planned(n: int, c: int, s: int, dtype: str, layout: str, direction: str, gpu: str) -> Planned:
    plan = launch_plan(n, c, s, gpu=gpu, dtype=dtype, layout=layout, direction=direction)
    if c == 1:
        n, s = 1, n * s
    elif layout == "interleaved":
        n, s = n * s, 1
    return Planned(n, c, s, dtype, direction, GPUS[gpu], plan)


def of_network(network: str) -> Iterator[Planned]:
    rank, layers = NETWORKS[network]
    shapes = [(n, c, side**rank) for n in BATCHES for side, channels in layers.items() for c in channels]
    for shape, *rest in itertools.product(shapes, TYPE_SIZES, LAYOUTS, WORK, GPUS):
        yield planned(*shape, *rest)


# Few channels, single values, odd rows, one row, rows longer than a block is wide, everything at once.
AWKWARD = [
    planned(*shape, *rest)
    for shape, *rest in itertools.product(
        itertools.product([1, 2, 33, 4097], [1, 2, 3, 35, 65, 1000], [1, 3, 49, 1023, 65537]),
        TYPE_SIZES,
        LAYOUTS,
        WORK,
        ["t4", "h100"],
    )
]


@pytest.fixture(params=[*NETWORKS, "awkward sizes"], scope="module")
def every(request: pytest.FixtureRequest) -> list[Planned]:
    return AWKWARD if request.param == "awkward sizes" else list(of_network(request.param))


def test_no_limit_is_exceeded(every: list[Planned]) -> None:
    for a in every:
        p, gpu = a.plan, a.gpu
        assert p.threads in range(32, MULTIPROCESSOR_THREADS + 1, 32), a
        assert 1 <= a.blocks < 2**31, a
        assert p.shared_bytes <= gpu.block, a
        side_by_side = min(MULTIPROCESSOR_THREADS // p.threads, gpu.multiprocessor // (p.shared_bytes + RESERVED))
        assert side_by_side >= (2 if p.threads <= 256 and p.strategy != "elementwise" else 1), a
        if p.team == "cluster":
            assert p.team_blocks in [size for size in (2, 4, 8, 16) if size <= gpu.cluster], a
        if p.team == "grid":
            assert a.blocks <= gpu.multiprocessors * side_by_side, a


def test_every_element_is_covered_once(every: list[Planned]) -> None:
    for a in every:
        p = a.plan
        assert p.slabs == -(-a.c // p.channels), a
        assert p.width == -(-p.channels * a.s // a.lanes), a
        assert p.team_blocks * p.share >= a.n * p.width, a
        assert 1 <= p.active <= p.threads, a
        assert p.channels <= p.threads, "each channel is finished by one thread"
        # A block of each team for each of its slabs; the slabs of a cooperative grid's teams are a stride apart.
        assert p.teams == p.slabs or (p.team == "grid" and 1 <= p.teams < p.slabs), a
        assert (p.team_blocks == 1) == (p.team == "block") or p.strategy == "elementwise", a
        assert p.per_lane == (p.channels > 1), a
        if p.per_lane:  # a thread stays in its column
            assert p.share % p.width == 0 and p.active % p.width == 0, a


def test_bytes_moved_lie_between_the_least_and_torchs(every: list[Planned]) -> None:
    for a in every:
        least, most = (times[a.direction] * a.tensor_bytes for times in (LEAST, TORCHS))
        assert least <= a.plan.bytes_moved <= most, a
        assert (a.plan.bytes_moved == least) == (a.plan.strategy != "streaming"), a


def test_bytes_on_chip(every: list[Planned]) -> None:
    for a in every:
        p = a.plan
        summed, applied = WORK[a.direction]
        tensors = applied if summed else 0
        assert 0 <= p.held <= a.most_packs, a
        assert (p.held == a.most_packs) == (p.strategy in ("small", "resident")), a
        assert 16 * p.threads * p.held * tensors <= p.shared_bytes, a
        assert p.bytes_on_chip <= min(tensors * a.tensor_bytes, a.blocks * p.shared_bytes), a
        assert p.bytes_on_chip <= a.gpu.multiprocessors * a.gpu.multiprocessor, a
        assert (p.workspace_bytes > 0) == (p.team == "grid"), a


# What becomes of ResNet-50 in float32, as strategy, team and, where it is not 1, bytes moved over the least.
# fmt: off
GOLDEN = """
h100  32  planar forward        planar backward       interleaved forward   interleaved backward
64x112    resident cluster      resident grid         resident grid         streaming grid 1.30
64x56     resident cluster      resident grid         resident grid         resident grid
128x56    resident cluster      resident cluster      resident grid         resident grid
256x56    resident cluster      resident cluster      resident grid         resident grid
128x28    resident cluster      resident cluster      resident grid         resident grid
256x28    resident block        resident cluster      resident grid         resident grid
512x28    resident block        resident cluster      resident cluster      resident grid
256x14    resident block        resident block        resident grid         resident grid
512x14    resident block        resident block        resident grid         resident cluster
1024x14   resident block        resident block        resident cluster      resident cluster
512x7     small block           small block           resident cluster      resident cluster
2048x7    resident block        resident block        resident cluster      resident cluster
h100 256  planar forward        planar backward       interleaved forward   interleaved backward
64x112    resident grid         resident grid         streaming grid 1.43   streaming grid 1.62
64x56     resident grid         resident grid         streaming grid 1.23   streaming grid 1.48
128x56    resident grid         resident grid         streaming grid 1.23   streaming grid 1.48
256x56    resident grid         resident grid         streaming grid 1.23   streaming grid 1.48
128x28    resident cluster      resident cluster      resident grid         resident grid
256x28    resident cluster      resident cluster      resident grid         resident grid
512x28    resident cluster      resident cluster      resident grid         resident grid
256x14    resident cluster      resident cluster      resident grid         resident grid
512x14    resident cluster      resident cluster      resident grid         resident grid
1024x14   resident cluster      resident cluster      resident grid         resident grid
512x7     resident cluster      resident cluster      resident grid         resident grid
2048x7    resident cluster      resident cluster      resident cluster      resident cluster
a100  32  planar forward        planar backward       interleaved forward   interleaved backward
64x112    resident grid         resident grid         streaming grid 1.19   streaming grid 1.46
64x56     resident grid         resident grid         resident grid         resident grid
128x56    resident grid         resident grid         resident grid         resident grid
256x56    resident grid         resident grid         resident grid         resident grid
128x28    resident grid         resident grid         resident grid         resident grid
256x28    resident grid         resident grid         resident grid         resident grid
512x28    resident block        resident grid         resident grid         resident grid
256x14    resident block        resident block        resident grid         resident grid
512x14    resident block        resident block        resident grid         resident grid
1024x14   resident block        resident block        resident grid         resident grid
512x7     resident block        resident block        resident grid         resident grid
2048x7    resident block        resident block        resident grid         resident grid
a100 256  planar forward        planar backward       interleaved forward   interleaved backward
64x112    resident grid         streaming grid 1.25   streaming grid 1.46   streaming grid 1.64
64x56     resident grid         resident grid         streaming grid 1.35   streaming grid 1.56
128x56    resident grid         resident grid         streaming grid 1.35   streaming grid 1.56
256x56    resident grid         resident grid         streaming grid 1.35   streaming grid 1.56
128x28    resident grid         resident grid         resident grid         streaming grid 1.25
256x28    resident grid         resident grid         resident grid         streaming grid 1.25
512x28    resident grid         resident grid         resident grid         streaming grid 1.25
256x14    resident grid         resident grid         resident grid         resident grid
512x14    resident grid         resident grid         resident grid         resident grid
1024x14   resident grid         resident grid         resident grid         resident grid
512x7     resident grid         resident grid         resident grid         resident grid
2048x7    resident grid         resident grid         resident grid         resident grid
t4    32  planar forward        planar backward       interleaved forward   interleaved backward
64x112    resident grid         streaming grid 1.26   streaming grid 1.47   streaming grid 1.65
64x56     resident grid         resident grid         streaming grid 1.37   streaming grid 1.60
128x56    resident grid         resident grid         streaming grid 1.37   streaming grid 1.60
256x56    resident grid         resident grid         streaming grid 1.37   streaming grid 1.60
128x28    resident grid         resident grid         resident grid         streaming grid 1.39
256x28    resident grid         resident grid         resident grid         streaming grid 1.39
512x28    resident grid         resident grid         resident grid         streaming grid 1.39
256x14    resident block        resident grid         resident grid         resident grid
512x14    resident block        resident grid         resident grid         resident grid
1024x14   resident block        resident grid         resident grid         resident grid
512x7     resident block        resident grid         resident grid         resident grid
2048x7    resident block        resident grid         resident grid         resident grid
t4   256  planar forward        planar backward       interleaved forward   interleaved backward
64x112    streaming grid 1.41   streaming grid 1.62   streaming grid 1.50   streaming grid 1.66
64x56     streaming grid 1.14   streaming grid 1.46   streaming grid 1.48   streaming grid 1.66
128x56    streaming grid 1.14   streaming grid 1.46   streaming grid 1.48   streaming grid 1.66
256x56    streaming grid 1.14   streaming grid 1.46   streaming grid 1.48   streaming grid 1.66
128x28    resident grid         resident grid         streaming grid 1.44   streaming grid 1.63
256x28    resident grid         resident grid         streaming grid 1.44   streaming grid 1.63
512x28    resident grid         resident grid         streaming grid 1.44   streaming grid 1.63
256x14    resident grid         resident grid         streaming grid 1.25   streaming grid 1.53
512x14    resident grid         resident grid         streaming grid 1.25   streaming grid 1.53
1024x14   resident grid         resident grid         streaming grid 1.25   streaming grid 1.53
512x7     resident grid         resident grid         resident grid         streaming grid 1.12
2048x7    resident grid         resident grid         resident grid         streaming grid 1.12
"""
# fmt: on


def golden() -> list[str]:
    lines = []
    for gpu, n in itertools.product(["h100", "a100", "t4"], [32, 256]):
        columns = [(layout, direction) for layout in LAYOUTS for direction in ("forward", "backward")]
        lines.append(f"{gpu:5}{n:>3}  " + "".join(f"{' '.join(column):22}" for column in columns))
        for side, channels in RESNET_50.items():
            for c in channels:
                cells = []
                for layout, direction in columns:
                    a = planned(n, c, side * side, "float32", layout, direction, gpu)
                    over = a.plan.bytes_moved / (LEAST[direction] * a.tensor_bytes)
                    cells.append(f"{a.plan.strategy} {a.plan.team} {'' if over == 1 else f'{over:.2f}'}")
                lines.append(f"{f'{c}x{side}':8}  " + "".join(f"{cell:22}" for cell in cells))
    return [line.rstrip() for line in lines]


def test_what_becomes_of_resnet_50() -> None:
    assert golden() == GOLDEN.strip().splitlines()


GROUPS = {"h100": None, "132 for clusters": [132], "120 for clusters": [16] * 7 + [8]}

# Blocks of a cluster, or the team if it is another: sizes, layout, direction, with the multiprocessors of GROUPS.
BY_WAVES = [
    ((32, 64, 3136), "planar", "forward", [4, 4, "grid"]),  # 64 slabs: 66, 66 or 60 clusters of 4 at the same time
    ((32, 64, 3136), "planar", "backward", ["grid", 8, "grid"]),
    ((32, 2048, 49), "interleaved", "forward", [2, 2, "grid"]),  # 128 slabs: 132 or 120 clusters of 2
    ((32, 512, 784), "interleaved", "forward", [16, 16, 16]),
    ((256, 512, 784), "planar", "forward", [8, 8, 8]),
    ((32, 512, 784), "planar", "forward", ["block", "block", "block"]),
]


@pytest.mark.parametrize(("sizes", "layout", "direction", "teams"), BY_WAVES, ids=str)
def test_clusters_are_chosen_by_waves(
    sizes: tuple[int, int, int], layout: str, direction: str, teams: list[int | str]
) -> None:
    found = [launch_plan(*sizes, layout=layout, direction=direction, groups=groups) for groups in GROUPS.values()]
    assert [plan.team_blocks if plan.team == "cluster" else plan.team for plan in found] == teams


def test_a_gpu_without_room_for_clusters_has_none() -> None:
    for n, (side, channels) in itertools.product(BATCHES, RESNET_50.items()):
        assert launch_plan(n, channels[0], side * side, groups=[]).team != "cluster"


class Chain(NamedTuple):
    """A pass with what follows the normalization; the least it moves: tensors, and masks of a bit an element."""

    direction: str
    activation: str
    residual: bool
    tensors: int
    masks: int

    def plan(self, *sizes: int, **rest: str) -> LaunchPlan:
        return launch_plan(*sizes, direction=self.direction, activation=self.activation, residual=self.residual, **rest)

    def least(self, values: int, dtype: str) -> int:
        return self.tensors * values * TYPE_SIZES[dtype] + self.masks * -(-values // 8)


CHAINS = [
    Chain("forward", "relu", False, 2, 0),
    Chain("forward", "relu", True, 3, 1),
    Chain("forward", "silu", True, 3, 0),
    Chain("inference", "relu", True, 3, 0),
    Chain("backward", "identity", True, 3, 0),  # the residual's gradient is dy itself
    Chain("backward", "relu", False, 3, 0),
    Chain("backward", "relu", True, 4, 1),
    Chain("backward", "silu", False, 3, 0),
    Chain("backward", "silu", True, 5, 0),  # the residual, too, is read
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: f"{c.direction} {c.activation}{' residual' * c.residual}")
@pytest.mark.parametrize("gpu", GPUS)
def test_a_chain_moves_the_least_where_it_is_held(chain: Chain, gpu: str) -> None:
    """Of ResNet-50, and with as much of it on chip as without the chain."""
    shapes = [(n, c, side * side) for n in BATCHES for side, channels in RESNET_50.items() for c in channels]
    for (n, c, s), dtype, layout in itertools.product(shapes, TYPE_SIZES, LAYOUTS):
        plan = chain.plan(n, c, s, gpu=gpu, dtype=dtype, layout=layout)
        least = chain.least(n * c * s, dtype)
        assert (plan.bytes_moved == least) == (plan.strategy != "streaming")
        assert least <= plan.bytes_moved < 2 * least
        plain = launch_plan(n, c, s, gpu=gpu, dtype=dtype, layout=layout, direction=chain.direction)
        assert (plan.strategy == "streaming") == (plain.strategy == "streaming")
        assert not plan.zeroed_branches, "two blocks or threads far apart share a byte of the mask"


# The ends of the blocks of ResNet-50, add and ReLU: strategy, team, channels of a slab and, where it is not 1, bytes
# moved over the least.
# fmt: off
GOLDEN_CHAINS = """
float32   32  planar forward          planar backward         interleaved forward     interleaved backward
256x56        resident cluster 1      resident cluster 1      resident grid 16        resident grid 16
512x28        resident block 1        resident cluster 1      resident cluster 16     resident grid 16
1024x14       resident block 2        resident block 1        resident cluster 16     resident cluster 16
2048x7        resident block 8        resident block 4        resident cluster 16     resident cluster 16
float32  256  planar forward          planar backward         interleaved forward     interleaved backward
256x56        resident grid 1         resident grid 1         streaming grid 16 1.15  streaming grid 16 1.37
512x28        resident cluster 1      resident cluster 1      resident grid 16        resident grid 16
1024x14       resident cluster 2      resident cluster 1      resident grid 16        resident grid 16
2048x7        resident cluster 8      resident cluster 4      resident cluster 16     resident cluster 16
bfloat16  32  planar forward          planar backward         interleaved forward     interleaved backward
256x56        resident cluster 1      resident cluster 1      resident grid 32        resident grid 32
512x28        resident block 1        resident block 1        resident grid 32        resident grid 32
1024x14       resident block 2        resident block 2        resident grid 32        resident cluster 32
2048x7        resident block 8        resident block 8        resident cluster 32     resident cluster 32
bfloat16 256  planar forward          planar backward         interleaved forward     interleaved backward
256x56        resident cluster 1      resident grid 1         streaming grid 32 1.16  streaming grid 32 1.38
512x28        resident cluster 1      resident cluster 1      resident grid 32        resident grid 32
1024x14       resident cluster 2      resident cluster 2      resident grid 32        resident grid 32
2048x7        resident cluster 8      resident cluster 8      resident cluster 32     resident grid 32
"""
# fmt: on


def golden_chains() -> list[str]:
    lines = []
    for dtype, n in itertools.product(TYPE_SIZES, [32, 256]):
        chains = [chain for chain in CHAINS if chain.activation == "relu" and chain.residual and chain.masks]
        columns = list(itertools.product(LAYOUTS, chains))
        heads = [f"{layout} {chain.direction}" for layout, chain in columns]
        lines.append(f"{dtype:8} {n:>3}  " + "".join(f"{head:24}" for head in heads))
        for c, side in (256, 56), (512, 28), (1024, 14), (2048, 7):
            cells = []
            for layout, chain in columns:
                p = chain.plan(n, c, side * side, dtype=dtype, layout=layout)
                over = p.bytes_moved / chain.least(n * c * side * side, dtype)
                cells.append(f"{p.strategy} {p.team} {p.channels} {'' if over == 1 else f'{over:.2f}'}")
            lines.append(f"{f'{c}x{side}':12}  " + "".join(f"{cell:24}" for cell in cells))
    return [line.rstrip() for line in lines]


def test_what_becomes_of_the_blocks_of_resnet_50() -> None:
    assert golden_chains() == GOLDEN_CHAINS.strip().splitlines()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPE_SIZES)
def test_masks_are_zero_before_where_bytes_are_shared(dtype: str, layout: str) -> None:
    def zeroed(n: int, c: int, s: int, activation: str = "relu") -> bool:
        return Chain("forward", activation, True, 3, 1).plan(n, c, s, dtype=dtype, layout=layout).zeroed_branches

    assert zeroed(2, 3, 5) and zeroed(600, 35, 1) and zeroed(3, 65, 49)
    assert zeroed(2, 8, 5), "ends within a word"
    assert not zeroed(4, 8, 5) and not zeroed(600, 40, 1) and not zeroed(3, 64, 49)
    assert not zeroed(2, 3, 5, "silu"), "has no mask"


def test_a_plan_is_a_value() -> None:
    def plan() -> LaunchPlan:
        return launch_plan(32, 64, 3136)

    assert plan() == plan()
    assert plan() != launch_plan(32, 64, 3136, direction="backward")
    assert plan() == launch_plan(32, 64, 3136, gpu="h100", dtype="float32", layout="planar", direction="forward")


@pytest.mark.parametrize("gpu", GPUS)
def test_an_activation_alone_changes_no_forward(gpu: str) -> None:
    """Without a residual there is no mask, for whose bytes channels would be cut."""
    for s, dtype in itertools.product([1, 3, 49, 196], TYPE_SIZES):
        plain, relu = (launch_plan(32, 64, s, gpu, dtype=dtype, activation=name) for name in ("identity", "relu"))
        assert plain == relu


def test_float16_is_as_bfloat16() -> None:
    assert launch_plan(32, 64, 49, dtype="float16") == launch_plan(32, 64, 49, dtype="bfloat16")


@pytest.mark.parametrize("direction", WORK)
@pytest.mark.parametrize("gpu", GPUS)
def test_problems_that_are_the_same_have_the_same_plan(gpu: str, direction: str) -> None:
    def plan(n: int, c: int, s: int, layout: str) -> LaunchPlan:
        return launch_plan(n, c, s, gpu=gpu, layout=layout, direction=direction)

    one_channel = [plan(n, 1, 6000 // n, layout) for n in (1, 6, 6000) for layout in LAYOUTS]
    assert all(p == one_channel[0] for p in one_channel)
    single_values = [plan(n, 35, 600 // n, "interleaved") for n in (1, 6, 600)] + [plan(600, 35, 1, "planar")]
    assert all(p == single_values[0] for p in single_values)


@pytest.mark.parametrize("argument", ["gpu", "dtype", "layout", "direction", "activation"])
def test_unknown_names_are_refused_with_the_known_ones(argument: str) -> None:
    known = {
        "gpu": GPUS,
        "dtype": ["bfloat16", "float16", "float32", "float64"],
        "layout": LAYOUTS,
        "direction": WORK,
        "activation": NAMES,
    }
    with pytest.raises(ValueError, match="voodoo") as error:
        launch_plan(2, 3, 4, **{argument: "voodoo"})
    listed = str(error.value).replace(",", " ").split()
    names = [word for word in listed if word in known[argument]]
    assert sorted(names) == sorted(known[argument])
    for name in names:
        launch_plan(2, 3, 4, **{argument: name})


@pytest.mark.parametrize("wrong", [0, -1, -(2**62)])
@pytest.mark.parametrize("place", range(3))
def test_sizes_are_positive(place: int, wrong: int) -> None:
    sizes = [2, 3, 4]
    sizes[place] = wrong
    with pytest.raises(ValueError, match="positive"):
        launch_plan(*sizes)


# Beyond all memories, with products beyond 63 bits, and (a TypeError of the binding) sizes beyond them.
@pytest.mark.parametrize("sizes", [(1, 2, 2**40), (2**40, 3, 1), (2**62, 4, 2**62), (2**32, 2**31, 1), (2**64, 1, 1)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_absurd_sizes_are_refused(sizes: tuple[int, int, int], layout: str, direction: str) -> None:
    with pytest.raises(TypeError if max(sizes) >= 2**63 else ValueError):
        launch_plan(*sizes, layout=layout, direction=direction)


def test_a_mask_takes_workspace_and_changes_nothing_else() -> None:
    """Four sets of 50176 numbers, each added up by 7 blocks."""
    for layout in LAYOUTS:
        plain, masked = (
            _C.launch_plan(Pass((64, 32, 3136), layout=layout, set_size=16, masked=m)) for m in (False, True)
        )
        assert (plain.mask_parts, masked.mask_parts) == (0, 7)
        assert masked.workspace_bytes == plain.workspace_bytes + 128 + 96 + 32 + 4 * 7 * 48
        as_plain = repr(masked).replace("mask_parts=7", "mask_parts=0")
        assert as_plain.replace(str(masked.workspace_bytes), str(plain.workspace_bytes)) == repr(plain)


def test_a_mask_is_added_up_where_its_sums_are_needed() -> None:
    def parts(call: Pass) -> int:
        return _C.launch_plan(call).mask_parts

    forward, inference, backward = (
        Pass((4, 3, 50), direction=direction, activation="relu", masked=True) for direction in WORK
    )
    assert [parts(call) for call in (forward, forward.only("reduce"), backward)] == [1, 1, 1]
    assert parts(Pass((2, 3, 10**8), masked=True)) == 256
    frozen = backward.wanting({"dx", "dweight", "dbias"}, training=False)
    of_parameters = backward.wanting({"dweight", "dbias"})
    needless = inference, forward.only("apply"), backward.only("apply"), frozen, of_parameters
    assert [parts(call) for call in needless] == [0] * 5
