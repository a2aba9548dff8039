"""The CPU kernels write an output through the last cache while its reader can find it there."""

from __future__ import annotations

from pathlib import Path

import pytest

from bn_ext._C import bypasses_cache, last_cache_bytes

MIB = 1 << 20


@pytest.mark.parametrize("cache", [1, 8, 32, 96, 384])
def test_outputs_stay_in_the_cache_up_to_five_eighths_of_it(cache: int) -> None:
    threshold = cache * MIB * 5 // 8
    assert not bypasses_cache(threshold - 1, cache * MIB)
    assert bypasses_cache(threshold, cache * MIB)


def test_a_layer_of_6_mib_stays_in_32_mib() -> None:
    assert not bypasses_cache(8 * 64 * 56 * 56 * 4, 32 * MIB)
    assert bypasses_cache(32 * 64 * 56 * 56 * 4, 32 * MIB)


def test_size_is_what_the_system_tells() -> None:
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    sizes = {int((c / "level").read_text()): (c / "size").read_text().strip() for c in caches}
    if not sizes:
        assert last_cache_bytes() == 32 * MIB
    else:
        assert f"{last_cache_bytes() >> 10}K" == sizes[max(sizes)]
