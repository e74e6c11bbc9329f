"""Where bytes and names come from: I/O leaves that know HTTP and the Hub, and neither the store nor the engine.

`Remote` (`base.py`) is a source of bytes, `HttpRemote` the one there is, `wrap.py` has what is put around any of them.
`hub.py` and `web.py` turn what a user names into a `Listing`. Only errors of `cakefs.errors` leave this package.
"""

import sys

# httpx imports its own command line, and rich with it, where it can: 0.05 s for every process that starts.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
