"""A plugin of pytest for `make gpu` (-p gpu_session), where one bad test must not cost all others.

A test that hangs, or leaves an error on the GPU that persists, ends its process, since everything after it would fail
alike. SIGALRM ends one that hangs, EX_TEMPFAIL tells of the error. pytest-xdist starts another process; without it, a
new run leaves out the tests that are in the file that BN_EXT_TESTS_BEGUN names. A file of tests whose imports need a
package that is not there is left out, and the summary says so.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

LONGEST = float(os.environ.get("BN_EXT_TESTS_LONGEST", "100"))  # seconds for a test
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT, ROOT / "tests", ROOT / "tests" / "support")  # of modules that tests import
BEGUN = os.environ.get("BN_EXT_TESTS_BEGUN")
FAILURE = pytest.StashKey[str]()
stderr = 2


def pytest_configure() -> None:
    global stderr  # noqa: PLW0603
    stderr = os.dup(2)  # before output is captured
    faulthandler.register(signal.SIGALRM, stderr, chain=True)  # says where it hung


def end(why: str) -> None:
    os.write(stderr, f"\n{why}\n".encode())
    os._exit(os.EX_TEMPFAIL)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if BEGUN:
        Path(BEGUN).parent.mkdir(parents=True, exist_ok=True)
        with Path(BEGUN).open("a") as file:
            print(item.nodeid, file=file)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)  # no other thread and no handler in Python may run while it hangs
    try:
        result = yield
        check_device(item)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return result


def check_device(item: pytest.Item) -> None:
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            end(f"{item.stash.get(FAILURE, '')}\n{item.nodeid} left an error on the GPU: {error}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        item.stash[FAILURE] = report.longreprtext
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    begun = set(Path(BEGUN).read_text().splitlines()) if BEGUN and Path(BEGUN).exists() else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in begun])
    items[:] = [item for item in items if item.nodeid not in begun]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    missing = re.search(r"No module named '(\w+)", str(report.longrepr))
    if report.failed and missing and not is_ours(missing[1]):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: there is no {missing[1]}")
    return report


def is_ours(module: str) -> bool:
    return any((folder / name).exists() for folder in FOLDERS for name in (module, f"{module}.py"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    places = dict.fromkeys((r.nodeid.partition("[")[0], r.longrepr[2].removeprefix("Skipped: ")) for r in reports)
    for place, reason in places:
        terminalreporter.write_line(f"left out: {place}: {reason}")
