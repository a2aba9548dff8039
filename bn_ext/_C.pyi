from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

# The fake kernel of each operator below batch_norm.
fakes: dict[str, Callable[..., tuple[Tensor | None, ...]]]

def activations() -> list[tuple[str, str | None, float | None]]:
    """Name, parameter's name and parameter's default of each activation; None for both where it has no parameter."""

def backward_chain(activation: str, *, residual: bool, frozen: bool = False) -> tuple[bool, bool]:
    """Whether a backward reads the residual, and whether it reads branch bits (``csrc/core/pass.h``)."""

def empty_output(input: Tensor) -> Tensor:
    """An uninitialized output for an input, with the strides of torch's."""

def observe_outputs(observe: Callable[..., bool] | None) -> None:
    """Has ``observe`` told, or nobody, of each recorded call of this thread whose backward keeps the input: the output;
    the arguments of ``batch_norm_elemt`` in front of ``with_branches``; whether the backward keeps the residual too.
    It returns whether hooks for saved tensors are passed by while the call's tensors are saved.
    """

def instruction_set() -> str:
    """The instruction set whose CPU kernels run: ``"DEFAULT"``, ``"AVX2"`` or ``"AVX512"``."""

def last_cache_bytes() -> int:
    """The size of the first core's last cache in bytes, 32 MiB where the system does not tell."""

def set_last_cache_bytes(bytes: int) -> int:
    """Makes CPU kernels take this for the size of the last cache, as tests do. Returns the size so far."""

def bypasses_cache(output_bytes: int, last_cache_bytes: int) -> bool:
    """Whether the CPU kernels write an output of this size past a last cache of this size."""

def warn_of_fallbacks(enabled: bool) -> None:
    """Whether calls that torch's own operators answer are told to ``bn_ext._fallback.fell_back``."""

class Pass:
    """What a call does, without its tensors (``csrc/core/pass.h``).

    Args:
        sizes: (n, c, s): images, channels, and the values of each plane.
        dtype: of the tensor: ``"float64"``, ``"float32"``, ``"float16"``, ``"bfloat16"``.
        layout: ``"planar"`` (channels second) or ``"interleaved"`` (channels last).
        direction: ``"forward"`` (training), ``"inference"`` or ``"backward"`` (of training, with every gradient).
        activation: one of :data:`bn_ext.activation.NAMES`.
        residual: whether there is one. Training then keeps branch bits, if the activation has two branches.
        set_size: images of a statistic set; all unless given. Inference has no sets.
        masked: whether there is a mask.

    Raises:
        ValueError: for a name that is not one of these, or sizes that are not positive.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int],
        *,
        dtype: str = "float32",
        layout: str = "planar",
        direction: str = "forward",
        activation: str = "identity",
        residual: bool = False,
        set_size: int | None = None,
        masked: bool = False,
    ) -> None: ...
    def wanting(self, gradients: set[str], *, training: bool = True) -> Pass:
        """The backward that writes only these: ``"dx"``, ``"dresidual"``, ``"dweight"``, ``"dbias"``."""

    def only(self, stage: str) -> Pass:
        """``"reduce"`` or ``"apply"`` alone, as an operator of its own runs it."""

    @property
    def reduce_reads(self) -> tuple[int, bool]:
        """The number of tensors that the reduction reads, and whether it reads branch bits."""

    @property
    def apply_reads(self) -> tuple[int, bool]:
        """The same of the stage that writes the outputs."""

    @property
    def writes(self) -> tuple[int, bool]:
        """The number of tensors written, and whether branch bits are."""

    @property
    def holds(self) -> int:
        """The number of tensors that may stay on chip between the two stages."""

class CpuPlan:
    """How one pass is cut into work on a CPU; ``csrc/cpu/plan.h`` says what each number means."""

    @property
    def n(self) -> int: ...
    @property
    def c(self) -> int: ...
    @property
    def s(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def segment(self) -> int: ...
    @property
    def segments(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def per_chunk(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    @property
    def joined(self) -> bool: ...
    @property
    def sets(self) -> int: ...
    @property
    def last_n(self) -> int: ...
    @property
    def last_joined(self) -> bool: ...
    @property
    def tile(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def split(self) -> bool: ...
    @property
    def bypass_cache(self) -> bool: ...
    @property
    def whole_bytes(self) -> bool: ...
    @property
    def ahead(self) -> int: ...

def cpu_plan(call: Pass, *, threads: int, last_cache_bytes: int) -> CpuPlan:
    """The plan of a call on a CPU. ValueError: a number that is not positive."""

class LaunchPlan:
    """How one pass is laid out on a GPU; ``csrc/cuda/plan.h`` says what each number means."""

    @property
    def strategy(self) -> Literal["elementwise", "small", "resident", "streaming"]: ...
    @property
    def team(self) -> Literal["block", "cluster", "grid"]: ...
    @property
    def sums(self) -> bool: ...
    @property
    def channels(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def per_lane(self) -> bool: ...
    @property
    def threads(self) -> int: ...
    @property
    def active(self) -> int: ...
    @property
    def sets(self) -> int: ...
    @property
    def slabs(self) -> int: ...
    @property
    def teams(self) -> int: ...
    @property
    def team_blocks(self) -> int: ...
    @property
    def share(self) -> int: ...
    @property
    def held(self) -> int: ...
    @property
    def tensors_held(self) -> int: ...
    @property
    def mask_parts(self) -> int: ...
    @property
    def zeroed_branches(self) -> bool: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def bytes_moved(self) -> int: ...
    @property
    def bytes_on_chip(self) -> int: ...

def sm_margin() -> int: ...
def set_sm_margin(multiprocessors: int) -> None: ...
def launch_plan(call: Pass, gpu: str = "h100", *, groups: Sequence[int] | None = None, margin: int = 0) -> LaunchPlan:
    """The plan of a call on a GPU, by name: ``"t4"``, ``"a100"``, ``"rtx4090"``, ``"h100"``, ``"b200"``, ``"rtx5090"``.
    ``groups`` has the multiprocessors of each of its GPCs, if they are others than usual; ``margin`` those that grids
    leave free.

    ValueError: another name, or a problem that is beyond all memories.
    """
