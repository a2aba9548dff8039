"""The lines to copy do what their comments say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import bn_ext

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_text("of another")
    names = runpy.run_path(str(SCRIPT))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_text() == "of another"
    model, loaded, folded, images = (names[name] for name in ("model", "loaded", "folded", "images"))
    assert type(model[1]) is bn_ext.BatchNorm2d and type(loaded[1]) is nn.BatchNorm2d
    assert loaded[1].num_batches_tracked == 3 and "relu" in capsys.readouterr().out
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    expected = loaded.eval()(images)
    for other in (model, folded):
        torch.testing.assert_close(other(images), expected)
