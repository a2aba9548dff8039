"""The bytes that a GPU's memory moved, beside the plans: ncu's report, on a stub of ncu."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench is no part of the installed package

from bench import traffic

CASE = ("2x4x5x5", "contiguous", "float32", "bn")
HEAD = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'


def ncu_line(launch: int, metric: str, value: str) -> str:
    return f'"{launch}","7","batch_norm_kernel","Command line profiler metrics","{metric}","byte","{value}"'


def test_traffic_of_each_launch() -> None:
    lines = ["==PROF== Connected to process 7", HEAD]
    for launch, (read, write) in enumerate([("1,000", "500.0"), ("2,000,000", "1")]):
        lines += [ncu_line(launch, "dram__bytes_read.sum", read), ncu_line(launch, "dram__bytes_write.sum", write)]
    assert traffic.moved("\n".join(lines)) == [1500, 2000001]
    text = traffic.table([CASE], [1500, 2400], "h100")
    for unclear in ([1500], [1500, 2400, 2400]):
        with pytest.raises(SystemExit, match="1 cases ran, so there should be 2 launches, got"):
            traffic.table([CASE], unclear, "h100")
    assert "| 2×4×5×5 NCHW | float32 | backward | small, block, 1 x 1 blocks, slabs: 1 | 0.0 | 0.0 | 1.00 |" in text
    with pytest.raises(SystemExit, match="ncu measured nothing"):
        traffic.moved("==ERROR== no permission")


NCU_STUB = """\
#!/bin/sh
for last; do case $last in *.csv) cp "$NCU_STUB_WROTE" "$last";; esac; done
echo "until $last"
echo "1 cases ran"
"""


def test_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that ncu runs ends by itself in time, here after one case; where ncu is missing, that is said."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(traffic, "time", lambda: 1000.0)
    command = [str(tmp_path / "profile.csv"), "--within", "30"]
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert traffic.main(command) == 0
    assert capsys.readouterr().out == "left out: bytes that memory moved: there is no ncu\n"
    (tmp_path / "ncu").write_text(NCU_STUB)
    (tmp_path / "ncu").chmod(0o755)
    wrote = tmp_path / "wrote"
    launches = [ncu_line(launch, "dram__bytes_read.sum", "12,845,056") for launch in range(2)]
    wrote.write_text("\n".join([HEAD, *launches]))
    monkeypatch.setenv("NCU_STUB_WROTE", str(wrote))
    assert traffic.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "until 1030.0"
    assert lines[-3].startswith("| 32×64×56×56 NCHW | bfloat16 | forward | ") and "| 12.8 |" in lines[-3]
    assert lines[-1] == "left out: 19 of 20 cases: the time was up"
    wrote.write_text("\n".join([HEAD, launches[0]]))
    with pytest.raises(SystemExit, match="2 launches, got 1"):
        traffic.main(command)


def test_what_ncu_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(traffic, "DEVICE", "cpu")
    monkeypatch.setattr(traffic, "CASES", [CASE] * 3)
    clock = iter([0.0, 0.0, 5.0, 11.0])
    monkeypatch.setattr(traffic, "time", lambda: next(clock))
    assert traffic.main(["--until", "10"]) == 0
    assert capsys.readouterr().out == "2 cases ran\n"
