"""What comes from elsewhere: the libraries, the token, the Hub.

The Hub is asked by urllib: a doctor must be able to speak when the libraries that it looks for are missing.
"""

import http.client
import importlib.metadata
import platform
import re
import ssl
import sys
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from cakefs import __version__
from cakefs.cli.checks.check import Check, said_by

HUB_TIMEOUT_S = 3.0

IMPORT = """import importlib, sys
for name in sys.argv[1:]:
    try: importlib.import_module(name)
    except Exception as error: print(f"{name}: {error}")"""


def check_libraries() -> Check:
    """Versions, and whether each can be imported: a compiled one may lack its system library."""
    try:
        wanted = [r for r in importlib.metadata.requires("cakefs") or [] if "extra ==" not in r]
    except importlib.metadata.PackageNotFoundError:
        return Check("libraries", None, "unknown: cakefs runs from a tree that was not installed", "pip install .")
    names = [re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in wanted]
    modules = {_module(name): name for name in names}
    broken = said_by([sys.executable, "-c", IMPORT, *modules])
    if broken:
        wrong = [line.partition(":")[0] for line in broken.splitlines()]
        packages = " ".join(modules.get(module, module) for module in wrong)
        fix = f"{sys.executable} -m pip install --force-reinstall {packages}"
        if "libfuse3" in broken:
            fix = "sudo apt-get install --reinstall fuse3"
        return Check("libraries", False, "; ".join(broken.splitlines()), fix)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return Check("libraries", True, f"cakefs {__version__}, Python {platform.python_version()}, {versions}")


def _module(package: str) -> str:
    """What a package is imported as: PyYAML is `yaml`."""
    provided = importlib.metadata.packages_distributions()
    found = [m for m, packages in provided.items() if package.lower() in map(str.lower, packages)]
    usual = package.replace("-", "_").lower()
    return usual if usual in found or not found else min(found, key=lambda m: m.startswith("_"))


def check_token(present: bool) -> Check:
    if present:
        return Check("token", True, "present")
    return Check("token", None, "none: private and gated models are refused", "hf auth login, or set HF_TOKEN")


def check_hub(endpoint: str, offline: bool, *, timeout_s: float = HUB_TIMEOUT_S) -> Check:
    """Any answer will do: it proves name, route, proxy and certificate."""
    parts = urlsplit(endpoint)
    host = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # a name and password are nobody's business
    if offline:
        return Check("hub", None, f"{host} not asked: offline")
    answer: list[Check] = []
    # A name server that does not answer is not bound by the timeout of urllib.
    asking = threading.Thread(target=lambda: answer.append(_ask_hub(host, parts.path, timeout_s)), daemon=True)
    asking.start()
    asking.join(timeout_s)
    return answer[0] if answer else _unreachable(host, f"no answer within {timeout_s:g} s")


def _ask_hub(host: str, path: str, timeout_s: float) -> Check:
    request = urllib.request.Request(host + path, method="HEAD", headers={"User-Agent": f"cakefs/{__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            status = reply.status
    except urllib.error.HTTPError as error:
        error.close()
        status = error.code
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _unreachable(host, getattr(error, "reason", None) or error)
    if status == 407:
        return _unreachable(host, "the proxy wants a login (407)")
    if status >= 500:
        return Check("hub", False, f"{host} answers {status}", "try again later; local models work meanwhile")
    return Check("hub", True, f"{host} answers{_by_proxy(host)}")


def _unreachable(host: str, cause: object) -> Check:
    fix = f"try: curl -I {host}; look at HF_ENDPOINT, HTTPS_PROXY, NO_PROXY; without a network set HF_HUB_OFFLINE=1"
    if isinstance(cause, ssl.SSLCertVerificationError):
        fix = "set SSL_CERT_FILE to a bundle with the certificate of your proxy or mirror"
    return Check("hub", False, f"{host} not reached{_by_proxy(host)}: {cause}", fix)


def _by_proxy(host: str) -> str:
    parts = urlsplit(host)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return ""
    return f" through the proxy {urlsplit(proxy).netloc.rpartition('@')[2] or 'that is set'}"
