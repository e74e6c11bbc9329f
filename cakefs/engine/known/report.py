"""What `cakefs report` draws: all that is known of the models of a store. Only reads; nothing is fetched."""

from collections.abc import Sequence
from pathlib import Path

from cakefs.engine.known.knowing import knowledge
from cakefs.engine.known.shown import Local
from cakefs.engine.known.survey import open_store, require_models, summarize
from cakefs.plan.report import Entry, Report, make_report


def report(path: Path, names: Sequence[str] = ()) -> Report:
    """Of these models, or of all. Raises UserError."""
    with open_store(path) as store:
        require_models(store, names)
        records = store.catalog.models.all()
        chosen = {name: records[name] for name in names or records}
        local = Local.of_all(store)
        states = {summary.name: summary.state for summary in summarize(store, chosen, local)}
        models = {name: store.catalog.models.manifest(chosen[name].manifest) for name in names or sorted(chosen)}
        entries = [Entry(manifest, chosen[name].added, states[name]) for name, manifest in models.items()]
        return make_report(entries, knowledge(store, *models.values()), local.size)
