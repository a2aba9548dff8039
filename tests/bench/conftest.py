"""Settings of the compiler are a process's: what a bench sets, the tests after it should not find."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch._dynamo
import torch._functorch.config
import torch._inductor.config

SETTINGS = (
    (torch._dynamo.config, ("recompile_limit",)),
    (torch._inductor.config, ("compile_threads", "fx_graph_cache")),
    (torch._functorch.config, ("enable_autograd_cache", "donated_buffer")),
)


@pytest.fixture(autouse=True, scope="module")
def _compiler_settings() -> Iterator[None]:
    before = [(config, name, getattr(config, name)) for config, names in SETTINGS for name in names]
    yield
    for config, name, value in before:
        setattr(config, name, value)
