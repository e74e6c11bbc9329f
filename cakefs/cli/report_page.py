"""The report as one HTML file that needs nothing else: no network, no fonts; for light and dark, and as a table.

Every text that is not ours goes through `_text`, into the script as JSON, and from there only into text nodes.
"""

import json
from collections.abc import Iterator, Sequence
from html import escape

from cakefs.cli.out import counted, human_size, printable
from cakefs.cli.report_style import SCRIPT, STYLE
from cakefs.plan.bill import Bill
from cakefs.plan.report import Cell, Report, Run, Strip, runs

HUE, TURN = 250.0, 137.508  # The golden angle: neighbours differ, and the circle fills evenly.
BANDS = 4  # Colours in a cell.
AXIS = 10  # Layers between two numbers.
KIN = 3
TO = "\N{EN DASH}"
RUNS = 24


def page(report: Report, when: str) -> str:
    """The whole file. Args: when: It was made, in words."""
    hues = _hues(report)
    body = [
        *_head(report, when),
        *_legend(),
        *(part for family in report.families if len(family) > 1 for part in _family(report, family, hues)),
        *_family(report, [family[0] for family in report.families if len(family) == 1], hues),
        *_table(report),
    ]
    data = {
        "models": [printable(model.name) for model in report.models],
        "tints": [[tint.home, printable(tint.place)] for tint in report.tints],
    }
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>cakefs report</title><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + f'\n<script type="application/json" id="data">{_json(data)}</script>\n<script>{SCRIPT}</script>\n'
        "</body></html>\n"
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _json(value: object) -> str:
    """Such that nothing in it ends the script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _hues(report: Report) -> dict[int, float]:
    """Of each model that is the home of anything, in the order in which they are drawn."""
    homes = {tint.home for tint in report.tints}
    drawn = (number for family in report.families for number in family if number in homes)
    return {number: round((HUE + i * TURN) % 360, 1) for i, number in enumerate(drawn)}


# --- above the map --------------------------------------------------------------------------------------------------


def _head(report: Report, when: str) -> Iterator[str]:
    whole, here = report.whole, report.here
    saved = _part(whole.copies - whole.tensors, whole.copies)
    yield '<header><p class="kicker">cakefs report'
    yield f" · <time>{_text(when)}</time></p>"
    models = counted(len(report.models), "model")
    if report.models:
        fit = "fits" if len(report.models) == 1 else "fit"
        yield f"<h1>{models} of {human_size(whole.copies)} {fit} into {human_size(whole.tensors)}</h1>"
        yield f'<p class="lead">Each tensor kept once saves {saved} of what plain copies take'
        yield f" and {_part(whole.files - whole.tensors, whole.files)} of what keeping each file once takes.</p>"
    else:
        yield "<h1>No models yet</h1>"
    yield '</header><section class="bills" aria-label="What it takes">'
    yield from _bill("All of every model", whole)
    yield from _bill("What is here now", here)
    yield "</section>"


def _part(size: int, of: int) -> str:
    return f"{round(100 * size / of)} %" if of else "0 %"


def _bill(title: str, bill: Bill) -> Iterator[str]:
    yield f'<figure class="bill"><figcaption>{title}</figcaption><dl>'
    rows = (
        ("plain copies", bill.copies, "a"),
        ("each file once", bill.files, "b"),
        ("each tensor once", bill.tensors, "c"),
    )
    for label, size, kind in rows:
        width = 100 * size / bill.copies if bill.copies else 0
        yield f'<dt>{label}</dt><dd><span class="bar {kind}" style="width:{width:.2f}%"></span>'
        yield f"<b>{human_size(size)}</b></dd>"
    yield "</dl></figure>"


def _legend() -> Iterator[str]:
    ramp = "".join(f'<i style="--h:{HUE};--t:{t / 8:.2f}"></i>' for t in range(9))
    yield '<section class="legend" aria-label="Legend">'
    yield f'<span><span class="cells">{ramp}</span> same colour, same bytes; first layer to last</span>'
    yield '<span><i class="u"></i> nowhere else</span>'
    yield (
        f'<span><i style="--g:linear-gradient(90deg,{_colour(HUE, 0.3)} 60%,var(--u) 0)"></i> part of the layer</span>'
    )
    yield f'<span><i style="--h:{HUE};--t:.3;--p:40%"></i> filled as far as it is here</span></section>'


# --- the map --------------------------------------------------------------------------------------------------------


def _family(report: Report, family: Sequence[int], hues: dict[int, float]) -> Iterator[str]:
    """Those that belong together; the last is of those that belong to nobody."""
    if not family:
        return
    models = [report.models[number] for number in family]
    numbers = [number for model in models for strip in model.strips for number in strip.layers]
    start, stop = min(numbers, default=0), max(numbers, default=-1) + 1
    title = f"{_text(models[0].name)} <small>and {counted(len(models) - 1, 'relative')}</small>"
    if (family[0],) in report.families:
        title = "On their own <small>they share little or nothing with others</small>"
    rest = max((len(strip.rest) for model in models for strip in model.strips), default=0)
    yield f'<section class="family" style="--n:{max(1, stop - start)};--r:{rest}"><h2>{title}</h2><div class="map">'
    if stop > start:
        ticks = (f'<b style="grid-column:{n - start + 1}">{n}</b>' for n in range(start, stop) if n % AXIS == 0)
        yield '<div class="row axis" aria-hidden="true"><span></span><span></span>'
        yield f'<span class="cells">{"".join(ticks)}</span></div>'
    for number in family:
        yield from _rows(report, number, hues, start)
    yield "</div></section>"


def _rows(report: Report, number: int, hues: dict[int, float], start: int) -> Iterator[str]:
    model = report.models[number]
    several, files = len(model.strips) > 1, len({strip.path for strip in model.strips}) > 1
    for i, strip in enumerate(model.strips or (Strip("", "", (), {}),)):
        name = f"<b>{_text(model.name)}</b>" if i == 0 else ""
        where = " ".join(part for part in (strip.path if files else "", strip.prefix) if part)
        label = f"<small>{_text(where)}</small>" if several else ""
        made = "<em>made here</em>" if model.made_here and i == 0 else ""
        dot = f'<u style="--h:{hues[number]};--t:.3"></u>' if number in hues and i == 0 else ""
        said = f"{model.name} {where}: {_words(report, number, strip)}"
        yield f'<div class="row" data-m="{number}" role="img" aria-label="{_text(said)}">'
        yield f'<span class="name">{dot}{name}{made}{label}</span>'
        yield f'<span class="rest">{"".join(_cell(report, cell, hues, "") for cell in strip.rest)}</span>'
        yield f'<span class="cells">{"".join(_layers(report, strip, hues, start))}</span>'
        size = f"{human_size(model.size)}<small>{_text(model.state)}</small>" if i == 0 else ""
        yield f'<span class="size">{size}</span></div>'
    if model.omitted:
        yield f'<div class="row"><span class="name"><small>and {model.omitted} more</small></span></div>'


def _layers(report: Report, strip: Strip, hues: dict[int, float], start: int) -> Iterator[str]:
    expected = start
    for number, cell in strip.layers.items():
        place = f"grid-column:{number - start + 1};" if number != expected else ""
        yield _cell(report, cell, hues, place)
        expected = number + 1


def _cell(report: Report, cell: Cell, hues: dict[int, float], style: str) -> str:
    shared = sum(size for _, size in cell.bands)
    tints = ",".join(str(number) for number, _ in cell.bands)
    if not cell.bands:
        kind = ' class="u"'
    elif len(cell.bands) == 1 and shared == cell.size:
        tint = report.tints[cell.bands[0][0]]
        kind, style = "", f"{style}--h:{hues[tint.home]};--t:{tint.depth:g};"
    else:
        kind, style = "", f"{style}--g:{_bands(report, cell, hues)};"
    if cell.local < cell.size:
        style += f"--p:{100 * cell.local // cell.size}%"
    look = f' style="{style}"' if style else ""
    shares = f' data-t="{tints}"' if tints else ""
    return f'<i{kind}{look}{shares} data-s="{cell.size},{cell.local},{shared}" data-p="{_text(cell.place)}"></i>'


def _bands(report: Report, cell: Cell, hues: dict[int, float]) -> str:
    stops, at = [], 0.0
    for number, size in cell.bands[:BANDS]:
        tint = report.tints[number]
        end = at + 100 * size / cell.size
        stops.append(f"{_colour(hues[tint.home], tint.depth)} {at:.0f}% {end:.0f}%")
        at = end
    return f"linear-gradient(90deg,{','.join(stops)},var(--u) {at:.0f}%)"


def _colour(hue: float, depth: float) -> str:
    """As the style sheet has it for `--h` and `--t`."""
    lightness, chroma = f"calc(var(--l0) + {depth:g}*var(--l1))", f"calc(var(--c0) - {depth:g}*.03)"
    return f"oklch({lightness} {chroma} {hue + 70 * depth:.0f})"


# --- the table ------------------------------------------------------------------------------------------------------


def _table(report: Report) -> Iterator[str]:
    yield '<section class="numbers"><h2>In numbers</h2><div class="scroll"><table><thead><tr><th scope="col">Model</th>'
    for title in ("Size", "Here", "Shared", "Layers"):
        yield f'<th scope="col" class="n">{title}</th>'
    yield '<th scope="col">Where its layers are at home</th><th scope="col">Shares most with</th></tr></thead><tbody>'
    for number in (number for family in report.families for number in family):
        model = report.models[number]
        sizes = (human_size(model.size), human_size(model.local), human_size(model.shared), f"{model.layers:,}")
        cells = "".join(f'<td class="n">{size}</td>' for size in sizes)
        stacks = "; ".join(filter(None, (_words(report, number, strip) for strip in model.strips)))
        kin = ", ".join(f"{report.models[other].name} ({human_size(size)})" for other, size in model.kin[:KIN])
        name = f'<th scope="row">{_text(model.name)}<small>{_text(model.state)}</small></th>'
        yield f"<tr>{name}{cells}<td>{_text(stacks)}</td><td>{_text(kin)}</td></tr>"
    yield "</tbody></table></div><p>Shared: bytes of its tensors that another model of this report has, too. Equal is"
    yield " what has one hash, or the same place in the same upstream file; of bytes that are not here and have no"
    yield " known hash nothing is said, and what an imported hashes.json claims does not count.</p></section>"


def _words(report: Report, number: int, strip: Strip) -> str:
    found = runs(strip, report.tints)
    said = [_run(report, number, run) for run in found[:RUNS]]
    return ", ".join([*said, f"and {len(found) - RUNS} more"] if len(found) > RUNS else said)


def _run(report: Report, number: int, run: Run) -> str:
    layers = f"{run.first}{TO}{run.last}" if run.last > run.first else str(run.first)
    if run.home is None:
        return f"{layers} own"
    if run.home == number and run.origin in (run.first, None):
        return f"{layers} own, used elsewhere" if run.origin is not None else f"{layers} own, used in part elsewhere"
    if run.origin is None:
        return f"{layers} in part {_owner(report, number, run.home)}"
    last = run.origin + run.last - run.first
    origin = f"{run.origin}{TO}{last}" if last > run.origin else str(run.origin)
    return f"{layers} = {_owner(report, number, run.home)} {origin}"


def _owner(report: Report, number: int, home: int) -> str:
    return "its own" if home == number else report.models[home].name
