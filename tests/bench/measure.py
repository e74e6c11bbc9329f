"""Timing: variants interleaved round by round, medians, ratios; child processes' CPU beside the wall clock."""

import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
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


def interleaved(variants: Mapping[str, Action], rounds: int, *, memory: int = 0) -> dict[str, list[float]]:
    """Runs every variant once per round, in turning order; the first round warms up and is not counted.

    Args:
        memory: Bytes of new memory that a run takes, about: see `_back`.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _back(memory)
            seconds = variants[name]()
            if turn:
                samples[name].append(seconds)
    return samples


def _back(size: int) -> None:
    """Has so much of the free memory be memory of the machine.

    A virtual machine may give what is free back to its host within seconds, and have it again for 2 s a GB, ten times
    what it takes to write it. Whoever was measured after a longer pause than another paid for that.
    """
    if size:
        with mmap.mmap(-1, size) as taken, memoryview(taken) as view:
            view[::4096] = bytes(len(view[::4096]))


def ratio(samples: dict[str, list[float]], of: str, to: str) -> float:
    """Median of the ratios pair by pair: steadier than the ratio of medians on a noisy machine."""
    return statistics.median(a / b for a, b in zip(samples[of], samples[to], strict=True))


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process, of its children that live, and of those it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children: list[str] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has just ended
            children += (task / "children").read_text().split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(int(child)) for child in children)


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def row(name: str, samples: dict[str, list[float]], of: str, to: str, bar: float) -> Result:
    """The ratio of two variants against a bar."""
    value = ratio(samples, of, to)
    medians = ", ".join(f"{k} {statistics.median(v):.3f} s" for k, v in samples.items())
    return Result(name, f"<= {bar:.2f}", value, value <= bar, medians, samples)


LOAD = """
import sys, time, torch, transformers
import transformers.models.llama.modeling_llama
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    model(torch.arange(4)[None])
print("\\nseconds", time.perf_counter() - start)
"""
LOAD_GGUF = """
import sys, time, xllamacpp as x
start = time.perf_counter()
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.fit_params, p.verbosity = sys.argv[1], 64, 1, False, False, -1
asked = {"prompt": [1, 270], "n_predict": 1, "temperature": 0, "ignore_eos": True, "samplers": ["temperature"]}
x.Server(p).handle_completions(asked)
print("\\nseconds", time.perf_counter() - start)
"""


def loading(path: Path, program: str = LOAD) -> float:
    """Seconds of loading and one forward pass, by transformers or by `program`; imports not counted."""
    env = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"loading {path}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return float(done.stdout.rpartition("seconds")[2])
