"""Good and hostile safetensors files, made by hand: every rule of the format with its violation.

Expectations are the official library's (0.8), which the tests ask again.
"""

from cakefs.formats.safetensors import DTYPES, HEADER_LIMIT

DATA = b"abcd"
FIELDS = '"dtype":"U8","shape":[4],"data_offsets":[0,4]'
MAX = 2**64 - 1


def braced(members: str) -> str:
    return "{" + members + "}"


def make(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "U8", shape: str = "4", offsets: str = "0,4") -> str:
    return f'{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{offsets}]}}'


def named(data: bytes | int = 0, **entries: str) -> bytes:
    text = ",".join(f'"{name}":{value}' for name, value in entries.items())
    return make(f"{{{text}}}", bytes(data) if isinstance(data, int) else data)


def one(data: bytes | int = 0, **fields: str) -> bytes:
    return named(data, a=entry(**fields))


ONE = braced(f'"a":{entry()}')


def extra(text: str) -> bytes:
    return make(braced('"a":' + braced(f"{FIELDS},{text}")), DATA)


def metadata(text: str) -> bytes:
    return make(braced(f'"__metadata__":{text},{ONE[1:-1]}'), DATA)


def key(text: str) -> bytes:
    return make(braced(f'"{text}":{entry()}'), DATA)


ACCEPTED = {
    "no tensor": make("{}"),
    "one tensor": make(ONE, DATA),
    "spaces in front": make(" \n\t\r" + ONE, DATA),
    "spaces behind": make(ONE + " \n\t\r ", DATA),
    "spaces everywhere": make(' { "a" : { "dtype" : "U8" , "shape" : [ 4 ] , "data_offsets" : [ 0 , 4 ] } } ', DATA),
    "length no multiple of 8": make(ONE + " " * (7 - len(ONE) % 8), DATA),
    "odd offsets": named(8, a=entry(shape="1", offsets="0,1"), b=entry("F32", "1", "1,5"), c=entry("U8", "3", "5,8")),
    "listed out of order": named(8, b=entry(offsets="4,8"), a=entry(offsets="0,4")),
    "dtypes out of order": named(12, a=entry("U8", "4", "0,4"), b=entry("F32", "2", "4,12")),
    "fields out of order": make('{"a":{"data_offsets":[0,4],"shape":[4],"dtype":"U8"}}', DATA),
    "rank 0": one(4, dtype="F32", shape="", offsets="0,4"),
    "zero size": one(shape="0", offsets="0,0"),
    "zero size, several at one place": named(
        4,
        a=entry(shape="0", offsets="0,0"),
        b=entry(),
        c=entry(shape="4,0", offsets="4,4"),
        d=entry(shape="0", offsets="4,4"),
    ),
    "zero size listed after its place": named(4, b=entry(), a=entry(shape="0", offsets="0,0")),
    "2000 dims": one(1, shape=",".join(["1"] * 2000), offsets="0,1"),
    "zero before huge dims": one(shape=f"0,{2**33},{2**33}", offsets="0,0"),
    "zero before the largest dim": one(shape=f"0,{MAX}", offsets="0,0"),
    "F4 filling bytes": one(1, dtype="F4", shape="2", offsets="0,1"),
    "F6 filling bytes": one(3, dtype="F6_E2M3", shape="4", offsets="0,3"),
    "bool that is no bool": one(b"\7\7\7\7", dtype="BOOL"),
    "empty name": key(""),
    "name with slash, dots, NUL": key("../a/..\\u0000"),
    "name of other scripts": key("模型 \u2028 ✓ 🍰"),
    "name with every escape": key(r"\"\\\/\b\f\n\r\t\u00e9\ud83c\udf70"),
    "name with DEL": key("\x7f"),
    "name with braces": key("}{},:"),
    "name of 300 KiB": key("n" * 300 * 1024),
    "metadata": metadata('{"format":"pt","n":"1"}'),
    "metadata empty": metadata("{}"),
    "metadata behind": make(ONE[:-1] + ',"__metadata__":{"format":"pt"}}', DATA),
    "metadata with braces and escapes": metadata(r'{"}":"{\"a\":[1]}","\u00e9":"\n"}'),
    "metadata with an escaped name": make('{"\\u005f_metadata__":{"a":"b"}}'),
    "metadata alone": make('{"__metadata__":{"a":"b"}}'),
    "name that only begins like metadata": key("__metadata___"),
    "unknown field: number": extra('"x":1'),
    "unknown field: negative number": extra('"x":-1'),
    "unknown field: float": extra('"x":-1.5e-3'),
    "unknown field: past 64 bits": extra('"x":184467440737095516160'),
    "unknown field: 300 digits": extra('"x":' + "9" * 300),
    "unknown field: tiny": extra('"x":1e-999'),
    "unknown field: string": extra('"x":"\\u00e9"'),
    "unknown field: null, true, false": extra('"x":null,"y":true,"z":false'),
    "escaped field name": make('{"a":{"d\\u0074ype":"U8","shape":[4],"data_offsets":[0,4]}}', DATA),
    "escaped dtype": make('{"a":{"dtype":"\\u0055\\u0038","shape":[4],"data_offsets":[0,4]}}', DATA),
} | {f"dtype {name}": one(bits, dtype=name, shape="8", offsets=f"0,{bits}") for name, (_, bits) in DTYPES.items()}

REFUSED = {
    "empty file": b"",
    "7 bytes": b"\2\0\0\0\0\0\0",
    "length 0": make(""),
    "length 1": make("{"),
    "length past the file": make(ONE, DATA, length=len(ONE) + len(DATA) + 1),
    "length past 64 bits minus 8": make(ONE, DATA, length=MAX),
    "length over the limit": make("{}", length=HEADER_LIMIT + 8),
    "length short by one": make(ONE, DATA, length=len(ONE) - 1),
    "null": make("null"),
    "an array": make("[]"),
    "a number": make("12"),
    "only spaces": make("    "),
    "BOM": make("\ufeff" + ONE, DATA),
    "NUL padding": make(ONE + "\0\0", DATA),
    "vertical tab as space": make("\v" + ONE, DATA),
    "no-break space": make("\u00a0" + ONE, DATA),
    "text behind": make(ONE + "x", DATA),
    "a second object": make(ONE + "{}", DATA),
    "not closed": make(ONE[:-1], DATA),
    "not closed entry": make(ONE[:-2], DATA),
    "trailing comma": make(ONE[:-1] + ",}", DATA),
    "leading comma": make("{," + ONE[1:], DATA),
    "two commas": make(braced(f'"a":{entry()},,"b":{entry(offsets="4,8")}'), bytes(8)),
    "no comma": make(braced(f'"a":{entry()} "b":{entry(offsets="4,8")}'), bytes(8)),
    "no colon": make(braced(f'"a"{entry()}'), DATA),
    "name without quotes": make(braced(f"a:{entry()}"), DATA),
    "name in single quotes": make(braced(f"'a':{entry()}"), DATA),
    "name that is a number": make(braced(f"1:{entry()}"), DATA),
    "comment": make("/**/" + ONE, DATA),
    "invalid UTF-8 in a name": make(b'{"\xff":%s}' % entry().encode(), DATA),
    "overlong UTF-8": make(b'{"\xc0\xaf":%s}' % entry().encode(), DATA),
    "surrogate in UTF-8": key("\ud800"),
    "invalid UTF-8 in an entry": make(ONE.replace("U8", "U\xff").encode("latin-1"), DATA),
    "invalid UTF-8 behind": make(ONE.encode() + b"\xff", DATA),
    "lone surrogate in a name": key(r"\ud800"),
    "reversed surrogates in a name": key(r"\udf70\ud83c"),
    "lone surrogate in metadata": metadata(r'{"a":"\udc00"}'),
    "lone surrogate in a metadata key": metadata(r'{"\udc00":"a"}'),
    "lone surrogate in an unknown field": extra(r'"x":"\ud800"'),
    "lone surrogate in an unknown field's name": extra(r'"\ud800":1'),
    "lone surrogate as dtype": one(4, dtype=r"\ud800"),
    "control character in a name": key("\x01"),
    "newline in a name": key("\n"),
    "control character in metadata": metadata('{"a":"\x1f"}'),
    "control character in a dtype": one(4, dtype="U8\t"),
    "unknown escape": key(r"\x41"),
    "escaped newline": key("\\\n"),
    "cut escape": key(r"\u12"),
    "metadata a string": metadata('"x"'),
    "metadata an array": metadata("[]"),
    "metadata a number": metadata("1"),
    "metadata with a number": metadata('{"a":1}'),
    "metadata with null": metadata('{"a":null}'),
    "metadata with an object": metadata('{"a":{}}'),
    "metadata with a trailing comma": metadata('{"a":"b",}'),
    "metadata twice": make('{"__metadata__":{},"__metadata__":{}}'),
    "metadata twice, once escaped": make('{"__metadata__":{},"\\u005f_metadata__":{}}'),
    "metadata that is an entry": make(braced(f'"__metadata__":{entry()}'), DATA),
    "entry null": make('{"a":null}'),
    "entry a string": make('{"a":"b"}'),
    "entry empty": make('{"a":{}}'),
    "no dtype": make('{"a":{"shape":[4],"data_offsets":[0,4]}}', DATA),
    "no shape": make('{"a":{"dtype":"U8","data_offsets":[0,4]}}', DATA),
    "no data_offsets": make('{"a":{"dtype":"U8","shape":[4]}}', DATA),
    "fields in capitals": make(ONE.replace("dtype", "DTYPE"), DATA),
    "duplicate dtype": extra('"dtype":"U8"'),
    "duplicate shape": extra('"shape":[4]'),
    "duplicate data_offsets": extra('"data_offsets":[0,4]'),
    "dtype in small letters": one(4, dtype="u8"),
    "dtype empty": one(4, dtype=""),
    "dtype C128": one(16, dtype="C128", shape="1", offsets="0,16"),
    "dtype I4": one(1, dtype="I4", shape="2", offsets="0,1"),
    "dtype null": make(ONE.replace('"U8"', "null"), DATA),
    "dtype a number": make(ONE.replace('"U8"', "8"), DATA),
    "dtype a list": make(ONE.replace('"U8"', '["U8"]'), DATA),
    "shape null": make(ONE.replace("[4]", "null"), DATA),
    "shape a number": make(ONE.replace("[4]", "4"), DATA),
    "shape an object": make(ONE.replace("[4]", "{}"), DATA),
    "shape of strings": one(4, shape='"4"'),
    "shape of lists": one(4, shape="[4]"),
    "shape with a trailing comma": one(4, shape="4,"),
    "shape with true": one(1, shape="true", offsets="0,1"),
    "shape with null": one(4, shape="4,null"),
    "shape 4.0": one(4, shape="4.0"),
    "shape 4e0": one(4, shape="4e0"),
    "shape 04": one(4, shape="04"),
    "shape +4": one(4, shape="+4"),
    "shape 0x4": one(4, shape="0x4"),
    "shape -4": one(4, shape="-4"),
    "shape -4 twice": one(16, shape="-4,-4", offsets="0,16"),
    "shape -0": one(shape="-0", offsets="0,0"),
    "shape NaN": one(4, shape="NaN"),
    "shape Infinity": one(4, shape="Infinity"),
    "shape past 64 bits": one(shape=f"{2**64},0", offsets="0,0"),
    "shape past 64 bits behind a zero": one(shape=f"0,{2**64}", offsets="0,0"),
    "shape of 5000 digits": one(4, shape="4" * 5000),
    "product past 64 bits": one(4, shape=f"{2**32},{2**32}"),
    "product that wraps to 4": one(4, shape=f"{2**62},4,{2**2},4"),
    "product past 64 bits, then zero": one(shape=f"{2**33},{2**33},0", offsets="0,0"),
    "bits past 64 bits": one(dtype="F32", shape=f"{2**60}", offsets=f"0,{2**62}"),
    "F4 in half a byte": one(1, dtype="F4", shape="1", offsets="0,1"),
    "F6 in two thirds of a byte": one(2, dtype="F6_E3M2", shape="2", offsets="0,2"),
    "offsets one": one(4, offsets="4"),
    "offsets three": one(4, offsets="0,4,4"),
    "offsets -0": one(4, offsets="-0,4"),
    "offsets as floats": one(4, offsets="0.0,4.0"),
    "offsets negative": one(4, offsets="-4,0"),
    "offsets past 64 bits": one(4, offsets=f"{2**64},{2**64 + 4}"),
    "offsets reversed": one(4, offsets="4,0"),
    "offsets null": make(ONE.replace("[0,4]", "null"), DATA),
    "offsets an object": make(ONE.replace("[0,4]", "{}"), DATA),
    "hole at the start": one(8, offsets="4,8"),
    "hole between": named(9, a=entry(), b=entry(offsets="5,9")),
    "overlap": named(7, a=entry(), b=entry(offsets="3,7")),
    "two tensors share a range": named(4, a=entry(), b=entry()),
    "zero size in a hole": named(4, a=entry(), b=entry(shape="0", offsets="9,9")),
    "zero size inside another": named(4, a=entry(), b=entry(shape="0", offsets="2,2")),
    "rest behind the data": one(5),
    "data cut": one(3),
    "data with no tensor": make("{}", b"x"),
    "range larger than the shape": one(5, offsets="0,5"),
    "range smaller than the shape": one(3, offsets="0,3"),
    "unknown field: number out of range": extra('"x":1e400'),
    "unknown field: 400 digits": extra('"x":' + "9" * 400),
    "unknown field: NaN": extra('"x":NaN'),
    "unknown field: control character": extra('"x":"\x01"'),
    "unknown field: 10,000 levels": extra('"x":' + "[" * 10_000 + "]" * 10_000),
    "100,000 levels": make('{"a":' * 100_000),
}  # fmt: skip

# The list in the module's docstring. The library accepts all of these.
STRICTER = {
    "tensor name twice": make(braced(f'"a":{entry(offsets="0,8", shape="8")},"a":{entry()}'), DATA),
    "tensor name twice, once escaped": make(braced(f'"a":{entry()},"\\u0061":{entry()}'), DATA),
    "metadata key twice": metadata('{"a":"b","a":"c"}'),
    "unknown field twice": extra('"x":1,"x":2'),
    "metadata null": metadata("null"),
    "entry an array": make('{"a":["U8",[4],[0,4]]}', DATA),
    "dtype an object": make(ONE.replace('"U8"', '{"U8":null}'), DATA),
    "unknown field: array": extra('"x":[]'),
    "unknown field: 100 levels": extra('"x":' + "[" * 100 + "]" * 100),
    "unknown field: object": extra('"x":{"y":1}'),
    "unknown field: brace in a string": extra('"x":"}"'),
    "entry of more than 1 MiB": extra(f'"x":"{"x" * 2**20}"'),
    "more than 100,000 metadata keys": metadata(braced(",".join(f'"{n}":""' for n in range(100_001)))),
}
