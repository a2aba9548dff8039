"""One workload measured: every peer validated, then all of them timed in turn. Knows nothing of the device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from bench import validate
from bench.peers import BASELINE, OURS, PEERS, Peer
from bench.workloads import LEAST_MOVES, Workload
from bn_ext.tools.timing import interleave, percentiles, ratios

COPY = "copy"
COPY_MOVES = 2

Row = dict[str, Any]

FIELDS = {
    "status": "ok; wrong: the results differ, so not timed; unavailable: could not run; reason says why",
    "error": "largest error of output, dx or dresidual against float64, relative to the largest expected value",
    "error_per_channel": "the same for running statistics or gradients of the parameters",
    "rounds": "samples of each peer; sample i of all peers of a case was taken in round i",
    "calls": "calls in one sample",
    "p20_ms, median_ms, p80_ms": "time of one call over the rounds",
    "speedup": f"time of {BASELINE} / time of this peer, median over the rounds (p20, p80: percentiles)",
    "over_ours": f"time of this peer / time of {OURS}, median over the rounds",
    "over_best": "time of the fastest peer, which is called best / time of this one",
    "of_copy": "time to move the least bytes at the rate of a copy / time of this peer, median over the rounds",
}


def refusal(error: Exception) -> Row:
    """Gives the record of a peer that cannot be timed: its error's first line, without this machine's paths."""
    reason = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, validate.WrongResultError):
        return {"status": "wrong", "reason": reason}
    reason = re.sub(r"(/[\w.+-]+){2,}", "<path>", f"{type(error).__name__}: {reason}")
    return {"status": "unavailable", "reason": reason[:200]}


def build(workload: Workload, names: Iterable[str]) -> dict[str, Peer | Row]:
    """The peers by name, or why they are missing. The baseline comes first: its errors are the others' bound."""
    built: dict[str, Peer | Row] = {}
    for name in dict.fromkeys((BASELINE, OURS, *names)):
        try:
            built[name] = PEERS[name](workload)
        except Exception as error:  # a peer that cannot run is a result too
            built[name] = refusal(error)
    return built


Timed = Callable[[dict[str, Callable[[], object]], float, int], tuple[dict[str, list[float]], int]]


def _one_by_one(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One call that makes all calls and keeps their results to the end, so that no result reuses another's memory."""
    return calls[0] if len(calls) == 1 else lambda: [call() for call in calls]


def measure(
    workload: Workload,
    peers: dict[str, Peer | Row],
    name: str,
    seconds: float,
    rounds: int,
    timed: Timed = interleave,
) -> list[Row]:
    """Validates and times the pass ``name`` over the sets of ``workload``: one row a peer and one for a plain copy."""
    copied = [workload.input, *(inputs[0] for inputs, _ in workload.others)]
    copies = [partial(torch.empty_like(x).copy_, x) for x in copied]
    calls: dict[str, Callable[[], object]] = {COPY: _one_by_one(copies)}
    found: dict[str, Row] = {COPY: {"status": "ok"}}
    baseline: dict[str, float] = {}
    with torch.set_grad_enabled(name != "inference"):
        for key, peer in peers.items():
            if not isinstance(peer, Peer):
                found[key] = peer
                continue
            try:
                call, errors = validate.observe(peer, workload, name)
                if key == BASELINE:
                    baseline = errors
                validate.compare(errors, baseline, workload, strict=key == OURS)
            except Exception as error:
                found[key] = refusal(error)
            else:
                found[key] = {"status": "ok", **_largest(errors)}
                calls[key] = _one_by_one([call, *(peer.on(inputs, dy).call(name) for inputs, dy in workload.others)])
        turns, times = timed(calls, seconds, rounds)
    samples = {key: [t / len(copied) for t in seconds_a_turn] for key, seconds_a_turn in turns.items()}
    for key in calls:
        found[key] |= {"calls": times * len(copied), **summary(samples, key)}
        if key != COPY:
            moves = LEAST_MOVES[workload.pattern][name] / COPY_MOVES
            found[key]["of_copy"] = moves * median(ratios(samples, COPY, key))
    note_best(found)
    return [{"pass": name, "peer": key, **row} for key, row in found.items()]


def _largest(errors: dict[str, float]) -> Row:
    named: Row = {}
    for key, error in errors.items():
        field = "error" if validate.of_input_form(key) else "error_per_channel"
        named[field] = max(error, named.get(field, 0.0))
    return named


def note_best(found: dict[str, Row]) -> None:
    """Sets ours beside the fastest of the others."""
    others = {key: row["over_ours"] for key, row in found.items() if key not in (OURS, COPY) and "over_ours" in row}
    if others and OURS in found:
        best = min(others, key=lambda key: others[key])
        found[OURS] |= {"over_best": others[best], "best": best}


def summary(samples: dict[str, list[float]], key: str) -> Row:
    """The figures of one peer."""
    low, middle, high = percentiles([1e3 * t for t in samples[key]])
    row: Row = {"rounds": len(samples[key]), "p20_ms": low, "median_ms": middle, "p80_ms": high}
    if key == COPY:
        return row
    if BASELINE in samples:
        row["speedup_p20"], row["speedup"], row["speedup_p80"] = percentiles(ratios(samples, BASELINE, key))
    if OURS in samples:
        row["over_ours"] = median(ratios(samples, key, OURS))
    return row
