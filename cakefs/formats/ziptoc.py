"""Table of contents of a zip archive, read in one way only. Pure.

Zip readers disagree on archives that say two things, and an archive that shows one content to a scanner and another to
a loader is a known trick. So there is one reading here, that of an archive as torch writes it: end record in the last
22 bytes, zip64 records right in front of it if at all, central directory right in front of those, members that are
STORED and neither repeat a name nor overlap. Anything else is refused by name.

Sizes come from the directory (local headers may say 0), where the data starts from the local header, since torch pads
there so that data is aligned.
"""

import struct
import zlib
from operator import attrgetter
from typing import NamedTuple

from cakefs.errors import InvalidFormat
from cakefs.formats.steps import Steps
from cakefs.formats.strictjson import brief
from cakefs.model import KIB, MIB, ByteRange

MAGIC = b"PK\3\4"
TAIL = 32 * KIB  # Holds the directory of 400 members, and so nearly always spares a request.
_MAX_MEMBERS = 250_000
_MAX_DIRECTORY = 64 * MIB
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 1 | 1 << 6 | 1 << 13
_STORED, _ZIP64 = 0, 1
_METHODS = {8: "deflated", 9: "deflated", 12: "compressed by bzip2", 14: "compressed by LZMA", 93: "compressed by zstd"}


class Member(NamedTuple):
    """A file in the archive.

    Attributes:
        header: Offset of its local header.
        stop: Offset of what follows it: the next local header or the directory.
    """

    name: str
    header: int
    size: int
    crc: int
    stop: int

    @property
    def local(self) -> ByteRange:
        """Bytes to fetch for `data_start`."""
        return ByteRange(self.header, self.header + _LOCAL.size + len(self.name.encode()))

    @property
    def whole(self) -> ByteRange:
        """Bytes to fetch for `content`."""
        return ByteRange(self.header, self.stop)


def tail_range(file_size: int) -> ByteRange:
    """Bytes to fetch for `read_directory`."""
    return ByteRange(max(0, file_size - TAIL), file_size)


def read_directory(tail: bytes, file_size: int, path: str) -> Steps[dict[str, Member]]:
    """The members by name, in the order of their places. Raises InvalidFormat, naming `path`.

    Args:
        tail: The bytes of `tail_range`.
    """
    tail_start = file_size - len(tail)
    try:
        count, where = _find_directory(tail, file_size)
        data = tail[where.start - tail_start : where.stop - tail_start]
        if where.start < tail_start:
            (data,) = yield [where]
        return _parse_directory(data, count, where.start)
    except ValueError as error:
        raise InvalidFormat(f"archive {path}: {error}") from error


def _find_directory(tail: bytes, file_size: int) -> tuple[int, ByteRange]:
    """Number of members, and where the directory is."""
    if len(tail) < _END.size:
        raise ValueError(f"{file_size} bytes are too few")
    magic, disk, first_disk, here, count, size, start, comment = _END.unpack_from(tail, len(tail) - _END.size)
    if magic != b"PK\5\6" or comment:
        raise ValueError("does not end with the end record of a zip file: truncated, or something follows")
    stop = file_size - _END.size
    at = len(tail) - _END.size - _LOCATOR.size
    if at >= 0 and tail[at : at + 4] == b"PK\6\7":
        narrow = (disk, first_disk, here, count, size, start)
        disk, first_disk, here, count, size, start = _end64(tail, at, narrow)
        stop -= _LOCATOR.size + _END64.size
        _check_locator(tail, at, stop)
    if disk or first_disk or here != count:
        raise ValueError("is one part of several")
    if count > _MAX_MEMBERS or size > _MAX_DIRECTORY:
        raise ValueError(f"directory of {count} members in {size} bytes")
    if start + size != stop:
        raise ValueError(f"directory [{start}, {start + size}) does not end at {stop}, where the end records begin")
    return count, ByteRange(start, stop)


def _end64(tail: bytes, locator: int, narrow: tuple[int, ...]) -> tuple[int, ...]:
    """The end record's fields as the zip64 one has them; the narrow ones must be the same or say that they are full."""
    at = locator - _END64.size
    if at < 0 or tail[at : at + 4] != b"PK\6\6":
        raise ValueError("zip64 end record is not in front of its locator")
    _, length, _, _, *fields = _END64.unpack_from(tail, at)
    if length != _END64.size - 12:
        raise ValueError(f"zip64 end record of {length + 12} bytes")
    for wide, value, full in zip(fields, narrow, (*[_FULL16] * 4, *[_FULL32] * 2), strict=True):
        if value not in (wide, full):
            raise ValueError(f"end records contradict each other: {value} and {wide}")
    return tuple(fields)


def _check_locator(tail: bytes, at: int, end64: int) -> None:
    _, disk, offset, disks = _LOCATOR.unpack_from(tail, at)
    if disk or disks != 1 or offset != end64:
        raise ValueError(f"zip64 locator points at {offset}, not at {end64}")


def _parse_directory(data: bytes, count: int, start: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        member, at = _entry(data, at)
        if member.name in members:
            raise ValueError(f"member {brief(member.name)} is there twice")
        members[member.name] = member
    if at != len(data):
        raise ValueError(f"directory of {count} members has {len(data) - at} bytes left")
    placed = sorted(members.values(), key=attrgetter("header"))
    stops = [*(member.header for member in placed), start][1:]
    found = [member._replace(stop=stop) for member, stop in zip(placed, stops, strict=True)]
    for member in found:
        if member.local.stop + member.size > member.stop:
            raise ValueError(f"member {brief(member.name)} overlaps what follows it at {member.stop}")
    return {member.name: member for member in found}


def _entry(data: bytes, at: int) -> tuple[Member, int]:
    """The member at an entry of the directory, and where the next entry is."""
    if at + _ENTRY.size > len(data):
        raise ValueError("directory ends in the middle of a member")
    magic, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment_size, disk, _, _, header = (
        _ENTRY.unpack_from(data, at)
    )
    name_stop = at + _ENTRY.size + name_size
    stop = name_stop + extra_size + comment_size
    if magic != b"PK\1\2" or stop > len(data):
        raise ValueError("directory ends in the middle of a member")
    name = _name(data[at + _ENTRY.size : name_stop])
    size, packed, header = _wide(data[name_stop : name_stop + extra_size], name, size, packed, header)
    if method != _STORED:
        raise ValueError(f"member {brief(name)} is {_METHODS.get(method, f'compressed by method {method}')}")
    if flags & _ENCRYPTED or disk or packed != size:
        raise ValueError(f"member {brief(name)} is encrypted, in another file or has two sizes")
    return Member(name, header, size, crc, 0), stop


def _name(data: bytes) -> str:
    name = data.decode()
    if not name or "\0" in name:
        raise ValueError(f"member {brief(name)} has no usable name")
    return name


def _wide(extra: bytes, name: str, *narrow: int) -> list[int]:
    """Fields with those that are full taken from the zip64 extra field, in its order."""
    wide = b""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if at + 4 + size > len(extra) or (kind == _ZIP64 and wide):
            raise ValueError(f"member {brief(name)} has a broken extra field")
        if kind == _ZIP64:
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    if len(wide) < 8 * narrow.count(_FULL32):
        raise ValueError(f"member {brief(name)} lacks its zip64 sizes")
    numbers = iter(struct.unpack_from(f"<{len(wide) // 8}Q", wide))
    return [next(numbers) if value == _FULL32 else value for value in narrow]


def data_start(member: Member, local: bytes, path: str) -> int:
    """Offset of a member's data, from the bytes of `Member.local`. Raises InvalidFormat, naming `path`."""
    magic, _, flags, method, _, _, _, packed, size, name_size, extra_size = _LOCAL.unpack_from(local)
    name = local[_LOCAL.size : member.local.stop - member.header]
    if magic != MAGIC or name_size != len(name) or name != member.name.encode():
        raise InvalidFormat(f"archive {path}: member {brief(member.name)} has another local header")
    if method != _STORED or flags & _ENCRYPTED or any(n not in (0, member.size, _FULL32) for n in (packed, size)):
        raise InvalidFormat(f"archive {path}: local header of {brief(member.name)} contradicts the directory")
    start: int = member.local.stop + extra_size
    if start + member.size > member.stop:
        raise InvalidFormat(f"archive {path}: member {brief(member.name)} overlaps what follows it")
    return start


def content(member: Member, whole: bytes, path: str) -> bytes:
    """A small member, its checksum tested, from the bytes of `Member.whole`. Raises InvalidFormat, naming `path`."""
    start = data_start(member, whole, path) - member.header
    data = whole[start : start + member.size]
    if zlib.crc32(data) != member.crc:
        raise InvalidFormat(f"archive {path}: member {brief(member.name)} does not have its checksum")
    return data
