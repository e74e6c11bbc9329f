"""The figures of a status: those of a store, and all of them as lines for people."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cakefs.cli.out import counted, human_size

if TYPE_CHECKING:
    from cakefs.engine.serve.sizes import Sizes


def store_status(path: Path, sizes: "Sizes") -> dict[str, Any]:
    from cakefs.engine.known.survey import summarize_store

    models = {name: size._asdict() for name, size in sizes.models.items()}
    summary = summarize_store(path)._asdict()
    return {"path": str(path), **summary, "saved_bytes": sizes.saved_bytes, "per_model": models}


def lines_of(status: dict[str, Any]) -> list[str]:
    store = status["store"]
    blobs = f"{human_size(store['blob_bytes'])} in {counted(store['blobs'], 'blob')}"
    if store["borrowed_bytes"]:
        blobs += f" and {human_size(store['borrowed_bytes'])} borrowed"
    complete = sum(model["state"] in ("complete", "verified") for model in store["per_model"].values())
    limit = f"; limit {human_size(store['limit'])}" if store["limit"] else ""
    lines = [
        f"store  {store['path']}{limit}",
        f"       {counted(store['models'], 'model')}, {complete:,} of them complete",
        f"       {blobs}, {human_size(store['partial_bytes'])} unfinished; plain copies would take"
        f" {human_size(store['saved_bytes'])} more",
    ]
    for mount in status["mounts"]:
        lines += [f"mount  {mount['mountpoint']}", *(f"       {line}" for line in _mount_lines(mount))]
    return lines if status["mounts"] else [*lines, "no mount"]


def _mount_lines(mount: dict[str, Any]) -> list[str]:
    if not mount["answers"]:
        return [str(mount["trouble"])]
    count = defaultdict[str, Any](int, mount)  # A mount of another version may count other things.
    reads = count["reads"]
    hits = f"{100 * count['reads_without_waiting'] / reads:.1f} % without waiting" if reads else "none so far"
    errors = f", {count['read_errors']} failed" if count["read_errors"] else ""
    failed = f", {count['requests_failed']} failed" if count["requests_failed"] else ""
    return [
        f"pid {count['pid']}, up {_duration(count['uptime_s'])}, store {count['store']}",
        f"served   {human_size(count['bytes_served'])} in {counted(reads, 'read')} ({hits}{errors})"
        f"{_rate(count['served_per_s'])}",
        f"fetched  {human_size(count['bytes_fetched'])} in {counted(count['requests'], 'request')}{failed}; "
        f"{counted(count['chunks_on_their_way'], 'chunk')} on the way{_rate(count['fetched_per_s'])}",
        *_waiting(defaultdict(int, count["mount"] or {})),
    ]


def _rate(per_second: float) -> str:
    return f", {human_size(round(per_second))}/s" if per_second else ""


def _waiting(count: Mapping[str, Any]) -> list[str]:
    """Only while there is something to say."""
    if not count["waiting"]:
        return []
    stalled = f", {count['stalled']} stalled" if count["stalled"] else ""
    return [f"waiting  {counted(count['waiting'], 'read')}{stalled}, the longest for {count['longest_wait_s']:.0f} s"]


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"
