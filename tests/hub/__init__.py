"""A loopback Hugging Face Hub with a CDN on a second host, plain HTTP, faults and a shaped link."""

from tests.hub.hub import Hub
from tests.hub.wire import Request

__all__ = ["Hub", "Request"]
