"""The blocks of docs/training.md run as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.findall(r"bn_ext\.train\.(\w+)", block)[0])
def test_block(block: str) -> None:
    assert len(block.splitlines()) <= 16
    exec(compile(block, "docs/training.md", "exec"), {})
