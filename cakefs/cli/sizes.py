"""Rates and times as people write and read them."""

from cakefs.errors import UserError


def parse_rate(text: str) -> int:
    """Bytes per second of `50MB` or `50 MB/s`. Raises UserError."""
    from cakefs.config import parse_size

    rate = parse_size(text.strip().removesuffix("/s"))
    if not rate:
        raise UserError(f"not a rate: {text!r}", hint="such as 50MB")
    return rate


def human_time(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
