from typing import Literal

def activations() -> list[tuple[str, float | None]]:
    """The names of the activations, each with its parameter unless given, if it has one."""

def keeps_mask(activation: str) -> bool:
    """Whether the gradient of an activation behind a residual needs no more than one bit an element."""

def instruction_set() -> str:
    """The instruction set whose CPU kernels run: ``"DEFAULT"``, ``"AVX2"`` or ``"AVX512"``."""

def last_cache_bytes() -> int:
    """The size of the first core's last cache in bytes, 32 MiB where the system does not tell."""

def bypasses_cache(output_bytes: int, last_cache_bytes: int) -> bool:
    """Whether the CPU kernels write an output of this size past a last cache of this size."""

def warn_of_fallbacks(enabled: bool) -> None:
    """Whether calls that torch's own operators answer are told to ``bn_ext._fallback.fell_back``."""

class LaunchPlan:
    """How one pass is laid out on a GPU; ``csrc/cuda/plan.h`` says what each number means."""

    @property
    def strategy(self) -> Literal["elementwise", "small", "resident", "streaming"]: ...
    @property
    def team(self) -> Literal["block", "cluster", "grid"]: ...
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
    def zeroed_mask(self) -> bool: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def bytes_moved(self) -> int: ...
    @property
    def bytes_on_chip(self) -> int: ...

def launch_plan(
    n: int,
    c: int,
    s: int,
    *,
    gpu: str = "h100",
    dtype: str = "float32",
    layout: str = "planar",
    direction: str = "forward",
    activation: str = "identity",
    residual: bool = False,
) -> LaunchPlan:
    """The plan for n images of c channels of s values each.

    Args:
        gpu: the device whose limits hold: ``"t4"``, ``"a100"``, ``"rtx4090"``, ``"h100"``, ``"b200"``, ``"rtx5090"``.
        dtype: of the tensor: ``"float64"``, ``"float32"``, ``"float16"``, ``"bfloat16"``.
        layout: ``"planar"`` (channels second) or ``"interleaved"`` (channels last).
        direction: ``"forward"`` (training), ``"inference"`` or ``"backward"``.
        activation: one of :data:`bn_ext.activation.NAMES`.
        residual: whether there is one. Training then keeps a mask, if the activation has two branches.

    Raises:
        ValueError: for a name that is not one of these, or sizes that are not positive.
    """
