"""What a command says. stdout is for data that can be piped; notes, hints, errors and progress go to stderr.

Three ways to say it: lines and tables for people, JSON (`--json`) for programs, and with `--quiet` only the names.
Nothing that came from upstream reaches a terminal unescaped. rich is imported only for bars and pictures.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from cakefs.errors import CakeError

Advance = Callable[[int], None]
"""Called with the number of bytes that are done in all."""


class Counted:
    """An `Advance` for who tells what was done since the last call."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._done = 0

    def __call__(self, size: int) -> None:
        self._done += size
        self._advance(self._done)


class Out:
    """Where a command writes. Streams are looked up when used: a progress bar may have taken them over."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def line(self, text: str) -> None:
        """A line of data."""
        _send(printable(text))

    def json(self, value: object) -> None:
        _send(json.dumps(value, indent=2))

    def json_line(self, value: object) -> None:
        """One of a stream of values, sent at once."""
        _send(json.dumps(value))
        self.flush()

    def script(self, text: str) -> None:
        """A text for a program to read, as it is."""
        _send(text.rstrip("\n"))

    def result(self, name: str, text: str) -> None:
        """The line that says what was done; with --quiet only the name of what it was done to."""
        self.line(name if self.quiet else text)

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Aligned columns; with --quiet only the first of them. Nothing when there are no rows.

        Args:
            titles: One that begins with `>` makes a right-aligned column.
        """
        if self.quiet:
            for row in rows:
                self.line(row[0])
        elif rows:
            lines = [[title.removeprefix(">") for title in titles], *([printable(c) for c in row] for row in rows)]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            align = [str.rjust if title.startswith(">") else str.ljust for title in titles]
            for line in lines:
                cells = (put(cell, width) for put, cell, width in zip(align, line, widths, strict=True))
                self.line("  ".join(cells).rstrip())

    def picture(self, text: str, marks: str) -> None:
        """A line of data; on a terminal that has colours, the characters `marks` in another one."""
        if sys.stdout is None or not sys.stdout.isatty() or sys.stdout.encoding.lower() != "utf-8":
            return self.line(text)
        from rich.console import Console
        from rich.text import Text

        painted = Text(printable(text))
        painted.highlight_regex(f"[{marks}]+", "bold yellow")
        with _reported():
            Console().print(painted, soft_wrap=True)

    def note(self, text: str) -> None:
        """What a person wants to know and a program does not."""
        if not self.quiet:
            _write(sys.stderr, printable(text))

    def hint(self, text: str) -> None:
        """The next step."""
        self.note(f"hint: {text}")

    def error(self, message: str, hint: str = "") -> None:
        """What failed, and the next step if there is one: also with --quiet."""
        _write(sys.stderr, printable(f"error: {message}"))
        if hint:
            _write(sys.stderr, printable(f"hint: {hint}"))

    def flush(self) -> None:
        """Raises CakeError where stdout cannot take what was written to it, as `line` and the others do."""
        with _reported():
            if sys.stdout is not None:
                sys.stdout.flush()

    @contextmanager
    def progress(self, label: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A bar with bytes, speed and time left, while a terminal is there to show it; nothing otherwise.

        Args:
            done: Bytes that were done before: they count for the bar, not for the speed.
        """
        if self.quiet or not total or sys.stderr is None or not sys.stderr.isatty():
            yield lambda completed: None
            return
        from rich import progress
        from rich.console import Console

        bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        with bar:
            task = bar.add_task(printable(label), total=total, completed=done)
            yield lambda completed: bar.update(task, completed=min(completed, total))


def printable(text: str) -> str:
    """The text with control characters written as escapes: names come from upstream, and a terminal obeys them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def human_size(size: int) -> str:
    """Three digits and a decimal unit, as disks are sold."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{value / 1000:.2f} PB"


def counted(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _send(text: str) -> None:
    with _reported():
        _write(sys.stdout, text)


@contextmanager
def _reported() -> Iterator[None]:
    """Makes a failure of stdout an error of ours, once: what is still buffered must not fail again when Python ends."""
    try:
        yield
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        if isinstance(error, BrokenPipeError):
            raise
        raise CakeError(f"cannot write to stdout: {error.strerror}") from error


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # closed by `>&-`
        return
    try:
        stream.write(text + "\n")
    except UnicodeEncodeError:  # of a locale that is not UTF-8
        stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding) + "\n")
