"""Why a model has no GGUF form here."""

from cakefs.errors import InvalidFormat


class NoGguf(InvalidFormat):
    """The model cannot be shown as GGUF with exactly what it says: the message names what is in the way."""
