"""cakefs: every ML model as an ordinary directory, lazily fetched and stored once per tensor."""

__version__ = "0.1.0"
