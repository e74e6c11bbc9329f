"""The local store: catalog, blobs, partials. See `store.py`."""

from cakefs.store.catalog import BlobRecord, Catalog, Verified
from cakefs.store.content import Content, Outcome
from cakefs.store.lease import Lease
from cakefs.store.models import ModelRecord
from cakefs.store.store import LITERAL, Store
from cakefs.store.upkeep import Usage

__all__ = [
    "LITERAL",
    "BlobRecord",
    "Catalog",
    "Content",
    "Lease",
    "ModelRecord",
    "Outcome",
    "Store",
    "Usage",
    "Verified",
]
