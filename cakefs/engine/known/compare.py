"""How near two models' tensors are: what is not known to be equal is read on both sides, in blocks.

Each side is read as a file of just the tensors to be compared, one after the other. So readahead fetches those in large
ranges and no byte of a tensor that is skipped, and what came is in the store as after any other read.
"""

from collections.abc import Callable, Sequence

import trio

from cakefs.engine.export.forms import Form, Source
from cakefs.engine.fetch import Fetcher
from cakefs.engine.jobs import Progress
from cakefs.engine.reading import Reading
from cakefs.model import CHUNK, File, Literal, Manifest, Segment, View
from cakefs.plan.pairs import Pair
from cakefs.plan.similarity import Measure, Similarity
from cakefs.plan.tensors import Tensor

_HEAD = 8  # Bytes before the first tensor of a file that is made up: readahead takes what is there for a header.


async def compare(
    fetcher: Fetcher,
    reading: Reading,
    manifests: tuple[Manifest, Manifest],
    pairs: Sequence[Pair],
    found: Callable[[Pair, Similarity], None],
    progress: Progress,
) -> None:
    """Reads the pairs and tells what was found of each, in turn.

    Raises:
        CakeError: A byte of either side cannot be had.
    """
    a = Source(reading, _only(manifests[0], [pair.a for pair in pairs]))
    b = Source(reading, _only(manifests[1], [pair.b for pair in pairs]))
    offset = _HEAD
    for pair in pairs:
        measure, stop = Measure(pair.a.dtype), offset + pair.a.data.size
        while offset < stop:
            size = min(CHUNK, stop - offset)
            left, right = await a.read(offset, offset + size), await b.read(offset, offset + size)
            await trio.to_thread.run_sync(measure.add, memoryview(left), memoryview(right))
            offset += size
            progress(size)
        found(pair, measure.result())
    await fetcher.flush()


def _only(manifest: Manifest, tensors: Sequence[Tensor]) -> Form:
    segments: tuple[Segment, ...] = (Literal("", _HEAD), *(tensor.data for tensor in tensors))
    size = sum(segment.size for segment in segments)
    return Form(manifest, File("tensors", size, View.MODEL, segments), [bytes(_HEAD)], False)
