"""The counters of a mount: what each key of status.json means, and all of them as Prometheus text.

The table is the documentation too: `cakefs help status.json` prints it, and a test holds a real mount to it.
"""

from collections.abc import Iterator, Mapping

GAUGE, COUNTER, TEXT = "gauge", "counter", ""  # TEXT is for people: not a number, or one that only names something.

# Key in status.json, nested ones with a dot → kind, meaning.
KEYS = {
    "pid": (TEXT, "process that serves the mount"),
    "store": (TEXT, "directory of the store"),
    "uptime_s": (GAUGE, "seconds since the mount began"),
    "models": (GAUGE, "names in the store"),
    "reads": (COUNTER, "read requests of the kernel that were answered or failed"),
    "bytes_served": (COUNTER, "bytes they were answered with"),
    "reads_without_waiting": (COUNTER, "reads answered from what was local and in memory"),
    "reads_waited": (COUNTER, "reads that waited for the disk or the network"),
    "read_errors": (COUNTER, "reads that failed"),
    "hit_rate": (GAUGE, "share of reads without waiting, 0 to 1; null before the first"),
    "served_per_s": (GAUGE, "bytes served per second, over the last ten seconds"),
    "fetched_per_s": (GAUGE, "bytes fetched per second, over the last ten seconds"),
    "bytes_fetched": (COUNTER, "bytes that came from upstream"),
    "requests": (COUNTER, "ranged requests sent upstream"),
    "requests_failed": (COUNTER, "requests given up after their retries"),
    "chunks_on_their_way": (GAUGE, "chunks asked for and not there yet: flights"),
    "worker_deaths": (COUNTER, "transfer processes that died and were replaced"),
    "files_confirmed": (COUNTER, "upstream files whose published SHA-256 was met"),
    "files_refuted": (COUNTER, "upstream files that did not have it, and are fetched again"),
    "added_on_demand": (COUNTER, "models added because somebody looked their name up"),
    "refused_on_demand": (COUNTER, "names looked up that could not be added"),
    "being_added": (GAUGE, "models being added on demand"),
    "sizes_as_of": (TEXT, "when the store was last counted, Unix seconds; null before the first time"),
    "stored_bytes": (GAUGE, "bytes the store took when it was last counted; null before"),
    "saved_bytes": (
        GAUGE,
        "bytes that plain copies of what is local of each model would take beyond that; null before",
    ),
    "per_model": (TEXT, "size, local_bytes and state of each model, as of then; empty before"),
    "mount.mountpoint": (TEXT, "where it is mounted"),
    "mount.pid": (TEXT, "as above"),
    "mount.since": (TEXT, "when it was mounted, Unix seconds"),
    "mount.lookups": (COUNTER, "names looked up"),
    "mount.opens": (COUNTER, "files opened"),
    "mount.open_files": (GAUGE, "files open now"),
    "mount.reads": (COUNTER, "read requests received"),
    "mount.hits": (COUNTER, "those answered at once"),
    "mount.bytes": (COUNTER, "bytes sent to the kernel"),
    "mount.failures": (COUNTER, "reads answered with an error"),
    "mount.waiting": (GAUGE, "reads that wait now"),
    "mount.stalled": (GAUGE, "reads that have waited for 5 s and longer"),
    "mount.longest_wait_s": (GAUGE, "seconds that the longest of them has waited"),
    "mount.inodes": (GAUGE, "inodes that the kernel remembers"),
}
_PER_MODEL = (("size", "bytes of the model's files"), ("local_bytes", "bytes of them that are in the store"))


def render(status: Mapping[str, object]) -> str:
    """Prometheus text, version 0.0.4, of what a mount says about itself."""
    return "\n".join(_lines(status)) + "\n"


def _lines(status: Mapping[str, object]) -> Iterator[str]:
    for key, (kind, meaning) in KEYS.items():
        value = _value(status, key)
        if kind and isinstance(value, int | float):
            name = f"cakefs_{key.replace('.', '_')}" + "_total" * (kind == COUNTER)
            yield from (f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", f"{name} {value}")
    models = status.get("per_model")
    for field, meaning in _PER_MODEL if isinstance(models, Mapping) else ():
        name = f"cakefs_model_{field}"
        yield from (f"# HELP {name} {meaning}", f"# TYPE {name} gauge")
        for model, sizes in models.items() if isinstance(models, Mapping) else ():
            yield f'{name}{{model="{_label(model)}"}} {sizes[field]}'


def _value(status: Mapping[str, object], key: str) -> object:
    first, _, rest = key.partition(".")
    value = status.get(first)
    return _value(value, rest) if rest and isinstance(value, Mapping) else None if rest else value


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
