def instruction_set() -> str:
    """The instruction set whose kernels run: ``"DEFAULT"``, ``"AVX2"`` or ``"AVX512"``."""
