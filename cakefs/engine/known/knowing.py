"""What the store knows of the bytes of models, as a list of sources for `plan/knowledge.py`. The earlier ones are
believed first; one more source (the terms of Xet, a registry) is one more item here."""

from cakefs.engine.known.claims import claims_of
from cakefs.model import Manifest, SpanKey
from cakefs.plan.diff import Diff, diff_models
from cakefs.plan.knowledge import Knowledge, Names
from cakefs.store.store import Store


def knowledge(store: Store, *manifests: Manifest) -> list[Knowledge]:
    """All that is known of the spans of models, without reading one of them."""
    identities = {source.identity for manifest in manifests for source in manifest.sources}
    digests = {
        SpanKey(identity, *span): digest
        for identity in identities
        for span, digest in store.catalog.spans(identity).items()
    }
    computed = store.catalog.sha256.of(set(digests.values()))
    hashes = {key: computed[digest] for key, digest in digests.items() if digest in computed}
    return [
        Names("blob", digests),
        Names("sha256", hashes),
        Names("sha256", claims_of(store, identities), claimed=True),
    ]


def diff(store: Store, a: Manifest, b: Manifest) -> Diff:
    """Compares two models as far as anything is known of their bytes."""
    return diff_models(a, b, knowledge(store, a, b))
