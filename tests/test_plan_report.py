"""The numbers of the report against models that were worked out by hand."""

from collections.abc import Mapping

from cakefs.model import Computed, Extent, File, Literal, Locator, Manifest, Source, Span, SpanKey, StackLayer, View
from cakefs.model import TensorInfo as Info
from cakefs.plan.knowledge import Names
from cakefs.plan.report import Cell, Entry, Model, Report, Run, Tint, make_report, runs

HEADER = 8
STATE = "complete"

# Tensors by content: its first letter says how many bytes it has.
SIZES = {"e": 100, "w": 40, "v": 20, "n": 1}
BASE = {"emb": "e0", "l.0.w": "w0", "l.0.n": "n0", "l.1.w": "w1", "l.1.n": "n0", "head": "e1"}


def published(name: str, tensors: Mapping[str, str], *, identity: str = "", created: int = 0) -> Entry:
    """One file, header and tensors."""
    source = Source("model.safetensors", identity or f"sha256:{name}", Locator("http://x", 1 << 20))
    spans, infos, at = [Span(0, 0, HEADER)], [], HEADER
    for i, (tensor, content) in enumerate(tensors.items()):
        size = SIZES[content[0]]
        spans.append(Span(0, at, at + size))
        infos.append(Info(tensor, "U8", (size,), i + 1))
        at += size
    segments = tuple(Extent(i, 0, span.size) for i, span in enumerate(spans))
    file = File("model.safetensors", at, View.BOTH, segments)
    return Entry(Manifest(name, "", "", "", 0, (source,), tuple(spans), tuple(infos), (file,)), created, STATE)


def names(*models: tuple[Entry, Mapping[str, str]], claimed: bool = False) -> Names:
    """What the tensors of models are, by content; their headers are all different."""
    table = {
        entry.manifest.key(i + 1): content for entry, tensors in models for i, content in enumerate(tensors.values())
    }
    return Names("blob", table, claimed=claimed)


def everything(key: SpanKey) -> int:
    return key.size


def model(report: Report, name: str) -> Model:
    return next(model for model in report.models if model.name == name)


def test_a_fine_tune_that_changes_one_layer() -> None:
    tuned = BASE | {"l.1.w": "w9"}
    a, b = published("a", BASE), published("b", tuned, created=1)
    report = make_report([b, a], [names((a, BASE), (b, tuned))], everything)
    one = HEADER + 100 + 40 + 1 + 40 + 1 + 100
    assert report.whole == report.here == (2 * one, 2 * one, 2 * HEADER + 100 + 40 + 1 + 40 + 100 + 40)
    assert [m.name for m in report.models] == ["a", "b"] and report.families == ((0, 1),)
    found = model(report, "b")
    assert (found.size, found.local, found.shared) == (one, one, one - HEADER - 40)
    # In common: embedding, head, the first layer's weight, and the norm, which is one content.
    assert found.kin == ((0, 100 + 100 + 40 + 1),)
    (strip,) = found.strips
    assert (strip.prefix, strip.path) == ("l", "model.safetensors")
    tints = report.tints
    assert tints == (Tint(0, "emb", -0.3), Tint(0, "layer 0", 0), Tint(0, "head", -0.15))
    assert strip.rest == (Cell("emb", 100, 100, ((0, 100),)), Cell("head", 100, 100, ((2, 100),)))
    # The norm of layer 1 is that of layer 0, where it is at home.
    assert strip.layers == {0: Cell("layer 0", 41, 41, ((1, 41),)), 1: Cell("layer 1", 41, 41, ((1, 1),))}
    assert runs(strip, tints) == [Run(0, 0, 0, 0), Run(1, 1, 0, None)]


def test_no_two_places_of_a_model_have_one_colour() -> None:
    """An encoder and a decoder, and what is no layer."""
    tensors = {f"{stack}.{i}.w": f"w{stack}{i}" for stack in ("encoder", "decoder") for i in range(3)}
    tensors |= {"emb": "e0", "head": "e1", "norm": "n0"}
    a, b = published("a", tensors), published("b", tensors, created=1)
    tints = make_report([a, b], [names((a, tensors), (b, tensors))], everything).tints
    assert len(tints) == len({tint.depth for tint in tints}) == len(tensors)
    assert all((tint.depth < 0) == (tint.place in ("emb", "head", "norm")) for tint in tints)
    assert min(tint.depth for tint in tints) == -0.3 and max(tint.depth for tint in tints) < 1


def test_one_file_in_two_repositories_is_kept_once_by_both_ways() -> None:
    a, b = published("a", BASE, identity="sha256:same"), published("b", BASE, identity="sha256:same")
    report = make_report([a, b], [], everything)
    size = a.manifest.files[0].size
    assert report.whole == (2 * size, size, size - 0)
    assert report.models[0].shared == report.models[1].shared == size - HEADER


def test_what_nobody_knows_is_not_said_to_be_shared() -> None:
    a, b = published("a", BASE), published("b", BASE)
    blind = make_report([a, b], [], everything)
    size = a.manifest.files[0].size
    assert blind.whole == (2 * size, 2 * size, 2 * size)
    assert blind.families == ((0,), (1,)) and blind.tints == ()
    claimed = make_report([a, b], [names((a, BASE), (b, BASE), claimed=True)], everything)
    assert claimed == blind


def test_what_is_here_counts_once_however_many_have_it() -> None:
    a, b = published("a", BASE), published("b", BASE)
    here = {a.manifest.key(1): 100, b.manifest.key(1): 100, a.manifest.key(2): 15}
    report = make_report([a, b], [names((a, BASE), (b, BASE))], lambda key: here.get(key, 0))
    assert report.here == (215, 215, 115)
    assert (report.models[0].local, report.models[1].local) == (115, 100)
    assert report.models[0].strips[0].layers[0].local == 15


def test_a_view_weighs_its_header_and_a_repeated_layer_is_at_home_in_its_parent() -> None:
    base = published("org/a", {"l.0.w": "w0", "l.1.w": "w1", "l.2.w": "w2"})
    parent = base.manifest
    order = [0, 1, 1, 2]
    header = Literal("xxh3:00", 30)
    file = File("model.safetensors", 30 + 160, View.MODEL, (header, *(Extent(i + 1, 0, 40) for i in order)))
    infos = tuple(Info(f"l.{at}.w", "U8", (40,), i + 1) for at, i in enumerate(order))
    stack = (StackLayer(0, ()),)
    made = Manifest("deep", "", "", "", 0, parent.sources, parent.spans, infos, (file,), stack)
    report = make_report([Entry(made, -5, STATE), base], [], everything)
    assert [m.name for m in report.models] == ["org/a", "deep"], "what was published comes first"
    assert report.whole == (HEADER + 120 + 190, HEADER + 120 + 190, HEADER + 120 + 30)
    assert model(report, "deep").made_here and model(report, "deep").shared == 160
    assert model(report, "deep").kin == ((0, 120),), "what it has twice counts once"
    assert runs(model(report, "deep").strips[0], report.tints) == [Run(0, 1, 0, 0), Run(2, 3, 0, 1)]


def test_what_is_calculated_is_its_own_and_as_local_as_its_inputs() -> None:
    base = published("org/a", {"l.0.w": "w0", "l.1.w": "w1"})
    parent = base.manifest
    mean = Computed("linear", "U8", 40, (Extent(1, 0, 40), Extent(2, 0, 40)), ("U8", "U8"), (0.5, 0.5))
    file = File("model.safetensors", 30 + 40, View.MODEL, (Literal("xxh3:00", 30), mean))
    infos = (Info("l.0.w", "U8", (40,), -1),)
    made = Manifest("mean", "", "", "", 0, parent.sources, parent.spans, infos, (file,), (StackLayer(0, ()),))
    report = make_report([base, Entry(made, 0, STATE)], [], lambda key: 20 if key == parent.key(1) else 0)
    (strip,) = model(report, "mean").strips
    assert strip.layers[0] == Cell("layer 0", 40, 40 * 20 // 80, ())
    assert runs(strip, report.tints) == [Run(0, 0, None, None)]
    assert report.whole.tensors == HEADER + 80 + 30 and report.here == (20 + 30 + 10, 60, 20 + 30)


def test_a_norm_in_common_makes_no_family() -> None:
    small = {"l.0.w": "e1", "l.0.n": "n0"}
    other = {"l.0.w": "e2", "l.0.n": "n0"}
    a, b = published("a", small), published("b", other)
    report = make_report([a, b], [names((a, small), (b, other))], everything)
    assert report.models[0].kin == ((1, 1),) and report.families == ((0,), (1,))


def test_many_tensors_that_are_no_layer_are_few_cells() -> None:
    tensors = {f"t{chr(97 + i)}": f"v{i}" for i in range(9)} | {"big": "e0"}
    report = make_report([published("a", tensors)], [], everything)
    (strip,) = report.models[0].strips
    assert [cell.place for cell in strip.rest] == ["big", "ta", "tb", "tc", "td", "5 other tensors"]
    assert sum(cell.size for cell in strip.rest) == 9 * 20 + 100 and strip.layers == {}


def test_nothing_at_all() -> None:
    report = make_report([], [], everything)
    assert report.models == () and report.whole == (0, 0, 0)
