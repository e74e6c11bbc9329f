"""The measurements by name, in the order in which they run."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.adding import adding, many_blobs, many_models
from tests.bench.disk import exporting, importing
from tests.bench.link import fetch_all, first_load, first_touch, prefetch
from tests.bench.local import cold_reads, random_reads, warm_loads
from tests.bench.measure import Result
from tests.bench.peers import with_rclone, with_tensorfs

Case = Callable[[Path, int], Iterator[Result]]

CASES: dict[str, Case] = {
    "warm": warm_loads,
    "cold": cold_reads,
    "random": random_reads,
    "rclone": with_rclone,
    "tensorfs": with_tensorfs,
    "first-load": first_load,
    "first-touch": first_touch,
    "prefetch": prefetch,
    "fetch": fetch_all,
    "add": adding,
    "import": importing,
    "export": exporting,
    "many": many_models,
    "blobs": many_blobs,
}
