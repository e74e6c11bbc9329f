"""What `cakefs report` draws: all that is known of the models of a store. Only reads; nothing is fetched."""

from collections.abc import Sequence
from pathlib import Path

from cakefs.engine.known.knowing import knowledge
from cakefs.engine.known.survey import Local, open_store, require_models, summarize
from cakefs.plan.report import Entry, Report, make_report


def report(path: Path, names: Sequence[str] = ()) -> Report:
    """Of these models, or of all. Raises UserError."""
    with open_store(path) as store:
        require_models(store, names)
        records = store.catalog.models()
        chosen = [records[name] for name in dict.fromkeys(names or sorted(records))]
        models = [(record.added, store.catalog.manifest(record.manifest)) for record in chosen]
        local = Local.of_all(store)
        found = zip(models, summarize(store, models, local), strict=True)
        entries = [Entry(manifest, added, summary.state) for (added, manifest), summary in found]
        return make_report(entries, knowledge(store, *(manifest for _, manifest in models)), local.size)
