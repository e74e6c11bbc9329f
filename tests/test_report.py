"""`cakefs report` over a real hub: its numbers are those of `ls`, its page needs nothing else, a browser draws it."""

import html
import json
import os
import re
import shutil
import struct
import subprocess
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cakefs.cli.report_page import page
from cakefs.model import Extent, File, Locator, Manifest, Source, Span, SpanKey, TensorInfo, View
from cakefs.plan.knowledge import Names
from cakefs.plan.report import Entry, make_report
from tests.hub import Hub
from tests.inside import Inside
from tests.models import llama, sharded, single, tensor

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (scripts/setup --dev)")
LIGHT, DARK = 1, 0  # As Blink counts colour schemes.
FOUR = json.dumps({"model_type": "llama", "num_hidden_layers": 4}).encode()
NASTY = 'x"><script>document.title=1</script>&amp;'


@pytest.fixture
def cli(tmp_path: Path, hub: Hub) -> Inside:
    cli = Inside(tmp_path, hub)
    base = llama(4, width=64)
    tuned = base | {"model.layers.3.mlp.down_proj.weight": tensor(77, 64, 256)}
    hub.add_repo("org/base", {"model.safetensors": single(base), "config.json": FOUR})
    hub.add_repo("org/tuned", sharded(tuned, 2) | {"config.json": FOUR})
    hub.add_repo("org/other", {"model.safetensors": single(llama(2, seed=9, width=64)), "config.json": b"{}"})
    for name in ("org/base", "org/tuned", "org/other"):
        cli("add", name)
    for name in ("org/base", "org/tuned"):
        cli("pull", name)
    cli("slice", "org/base", "--layers", "1-2", "--as", "part")
    return cli


class Page(HTMLParser):
    """What an HTML file refers to, and the text of its table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset") and v and v != "data:,"]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.cells and self.cells[-1]:
            self.cells[-1][-1] += data


def test_its_numbers_are_those_of_ls(cli: Inside, tmp_path: Path) -> None:
    listed = {model["name"]: model for model in cli.told("ls")}
    found = cli.told("report")
    for model in found["models"]:
        same = listed[model["name"]]
        assert (model["size"], model["local_bytes"]) == (same["size"], same["local_bytes"])
    assert found["families"] == [["org/base", "org/tuned", "part"], ["org/other"]]
    changed = 64 * 256 * 4
    shared = {model["name"]: model["shares_with"] for model in found["models"]}
    whole = sum(t.nbytes for t in llama(4, width=64).values())
    assert shared["org/base"]["org/tuned"] == whole - changed
    assert found["whole"]["copies"] == sum(model["size"] for model in listed.values())
    assert found["whole"]["tensors"] < found["whole"]["files"] <= found["whole"]["copies"]
    assert found["here"]["tensors"] <= found["whole"]["tensors"]
    two = cli.told("report", "org/base", "org/other")
    assert two["families"] == [["org/base"], ["org/other"]] and two["models"][0]["shared_bytes"] == 0
    assert "no model 'nix'" in cli("report", "nix", "-o", tmp_path / "x.html", code=2)
    assert "-o FILE.html" in cli("report", code=2)
    assert "cannot write" in cli("report", "-o", tmp_path / "no/x.html", code=2)


def test_what_is_no_file_is_written_to_and_not_replaced(cli: Inside, tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for path in (fifo, link):
        reading = subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE)
        cli("report", "-o", path)
        assert reading.communicate(timeout=20)[0].startswith(b"<!doctype html>")
    assert fifo.is_fifo() and link.is_symlink()


def test_one_file_that_needs_nothing_else(cli: Inside, tmp_path: Path) -> None:
    said = cli("report", "-o", tmp_path / "x.html")
    assert said.startswith(f"wrote {tmp_path / 'x.html'}: 4 models, ")
    text = (tmp_path / "x.html").read_text()
    parsed = Page(text)
    assert parsed.links == [] and not re.search(r"https?://|@import|url\(", text)
    rows = {row[0].removesuffix("verified"): row[1:] for row in parsed.cells}
    assert rows["org/tuned"][3:5] == ["4", "0\N{EN DASH}2 = org/base 0\N{EN DASH}2, 3 in part org/base"]
    assert rows["part"][4] == "1\N{EN DASH}2 = org/base 1\N{EN DASH}2"
    assert list(tmp_path.glob(".x.html*")) == []


def large(models: int, layers: int, tensors: int) -> tuple[list[Entry], Names]:
    """Ten families; in each, the n-th model has every n-th layer for itself."""
    entries, table = [], {}
    for number in range(models):
        name, at = f"org{number // 10}/model-{number}", 8
        spans, infos = [], []
        for layer in range(layers):
            own = number % 10 and layer % (number % 10 + 1) == 0
            for i in range(tensors):
                spans.append(Span(0, at, at + 1000 + i))
                infos.append(TensorInfo(f"model.layers.{layer}.t{i}.weight", "U8", (1000 + i,), len(spans) - 1))
                content = f"{number if own else number // 10 * 10}.{layer}.{i}"
                table[SpanKey(f"sha256:{name}", at, at + 1000 + i)] = content
                at += 1000 + i
        source = Source("model.safetensors", f"sha256:{name}", Locator("http://x", at))
        file = File("model.safetensors", at - 8, View.BOTH, tuple(Extent(i, 0, s.size) for i, s in enumerate(spans)))
        manifest = Manifest(name, "", "", "", 0, (source,), tuple(spans), tuple(infos), (file,))
        entries.append(Entry(manifest, number, "complete"))
    return entries, Names("blob", table)


def test_a_hundred_models_of_126_layers() -> None:
    entries, names = large(100, 126, 3)
    started = time.process_time()
    text = page(make_report(entries, [names], lambda key: key.size), "now")
    assert time.process_time() - started < 30
    assert text.count("<i") >= 12_600 and len(text) < 4_000_000


def nasty() -> str:
    """Names come from upstream."""
    source = Source("model.safetensors", "sha256:x", Locator("http://x", 100))
    spans = (Span(0, 0, 10), Span(0, 10, 20), Span(0, 20, 30))
    infos = [TensorInfo(f"{NASTY}.{i}.w", "U8", (10,), i) for i in (0, 1)]
    infos.append(TensorInfo(f"{NASTY}\x1b[31m\u202e", "U8", (10,), 2))
    file = File("model.safetensors", 30, View.BOTH, tuple(Extent(i, 0, 10) for i in range(3)))
    entries = [
        Entry(Manifest(name, "", "", "", 0, (source,), spans, tuple(infos), (file,)), 0, NASTY)
        for name in (NASTY, "</script><!--")
    ]
    return page(make_report(entries, [], lambda key: 5), NASTY)


def test_names_are_text_and_nothing_else() -> None:
    text = nasty()
    assert Page(text).tags.count("script") == 2 and "<script>document" not in text
    assert "\x1b" not in text and "\u202e" not in text
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["models"] == ["</script><!--", NASTY]
    assert html.escape(NASTY) in text


# --- in a browser ---------------------------------------------------------------------------------------------------


def browse(path: Path, *options: str) -> str:
    """stdout of Chromium; what the page wrote to its console fails the test."""
    assert BROWSER is not None
    profile = path.parent / "profile"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={profile}", "--window-size=1280,1000", *options, path.as_uri()]
    environment = os.environ | {"HOME": str(path.parent), "XDG_CONFIG_HOME": str(profile)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert done.returncode == 0, done.stderr
    assert console == []
    return done.stdout


def pixels(path: Path) -> set[bytes]:
    """The colours of a PNG of 8-bit RGB or RGBA; unfiltered as far as is needed to tell one from many."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    at, packed, width = 8, b"", 3
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        if kind == b"IHDR":
            width = {2: 3, 6: 4}[data[at + 8 + 9]]
        if kind == b"IDAT":
            packed += data[at + 8 : at + 8 + size]
        at += 12 + size
    raw = zlib.decompress(packed)
    return {raw[i : i + width] for i in range(1, len(raw) - width, 997)} | {raw[1 : 1 + width]}


@needs_browser
def test_a_browser_draws_it_in_light_and_dark_without_complaint(
    cli: Inside, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The pictures are kept, to be looked at: `.pytest_cache/d/report/`."""
    kept = request.config.cache.mkdir("report")
    cli("report", "-o", tmp_path / "x.html")
    first = {}
    for name, scheme in (("light", LIGHT), ("dark", DARK)):
        shot = kept / f"{name}.png"
        shot.unlink(missing_ok=True)
        browse(tmp_path / "x.html", f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={scheme}")
        assert len(pixels(shot)) > 10
        first[name] = shot.read_bytes()
    assert first["light"] != first["dark"]


PROBE = """<script>
const number = JSON.parse(document.getElementById("data").textContent).models.indexOf(%s);
const cell = document.querySelector(`[data-m="${number}"] .cells i:nth-child(%d)`);
cell.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
document.body.dataset.tip = document.getElementById("tip").textContent;
document.body.dataset.hits = [...document.querySelectorAll(".hit")].length;
document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
document.body.dataset.fill = getComputedStyle(cell).backgroundImage;
</script></html>"""


def probe(path: Path, model: str, cell: int) -> dict[str, Any]:
    """What the page does when the pointer is over a cell."""
    probing = path.with_name("probe.html")
    probing.write_text(path.read_text().replace("</html>", PROBE % (json.dumps(model), cell)))
    found = re.search(r"<body([^>]*)>", browse(probing, "--dump-dom"))
    assert found is not None
    return {k: html.unescape(v) for k, v in re.findall(r'data-(\w+)="([^"]*)"', found[1])}


@needs_browser
def test_a_cell_tells_what_it_is_and_where_else(cli: Inside, tmp_path: Path) -> None:
    cli("report", "-o", tmp_path / "x.html")
    found = probe(tmp_path / "x.html", "org/tuned", 2)
    lines = found["tip"].split("\n")
    assert lines[0] == "org/tuned, layer 1" and lines[1].endswith(", here")
    assert lines[2:] == ["at home in org/base, layer 1", "in 2 other places, 2 models"]
    assert (found["hits"], found["wide"]) == ("3", "false")
    assert "oklch" in found["fill"] or "rgb" in found["fill"]
    other = probe(tmp_path / "x.html", "org/other", 1)
    assert other["tip"].startswith("org/other, layer 0\n") and other["tip"].endswith("\nnowhere else")
    assert other["hits"] == "0"


@needs_browser
def test_a_browser_runs_nothing_that_came_with_a_name(tmp_path: Path) -> None:
    path = tmp_path / "nasty.html"
    path.write_text(nasty())
    drawn = browse(path, "--dump-dom")
    assert "<h1>2 models" in drawn and "<title>cakefs report</title>" in drawn


@needs_browser
def test_a_page_that_complains_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<!doctype html><script>nonsense()</script>")
    with pytest.raises(AssertionError, match="nonsense"):
        browse(path, "--dump-dom")
