"""Timing: variants interleaved round by round, medians, ratios; child processes' CPU beside the wall clock."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Action = Callable[[], float]
"""Does one run and returns its seconds."""


@dataclass
class Result:
    """One row of the table: what was measured against what, and the bar."""

    name: str
    bar: str
    ratio: float | None
    ok: bool | None
    detail: str
    samples: dict[str, list[float]] = field(default_factory=dict)


def interleaved(variants: dict[str, Action], rounds: int) -> dict[str, list[float]]:
    """Runs every variant once per round, in turning order; the first round warms up and is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = variants[name]()
            if turn:
                samples[name].append(seconds)
    return samples


def ratio(samples: dict[str, list[float]], of: str, to: str) -> float:
    """Median of the ratios pair by pair: steadier than the ratio of medians on a noisy machine."""
    return statistics.median(a / b for a, b in zip(samples[of], samples[to], strict=True))


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0
