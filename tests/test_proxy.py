"""Proxies and certificates by the variables of the environment: used for all that is asked, or told in one line."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.hub import Hub
from tests.hub.proxy import proxy
from tests.models import CONFIG, single, tensor
from tests.mounts import Cakefs, needs_fuse


@needs_fuse
@pytest.mark.parametrize(
    ("variable", "scheme", "tls"),
    [("HTTPS_PROXY", "http", True), ("HTTP_PROXY", "http", False), ("ALL_PROXY", "socks5", True)],
)
def test_all_goes_through_a_proxy(
    tmp_path: Path, request: pytest.FixtureRequest, variable: str, scheme: str, tls: bool
) -> None:
    certificate = request.getfixturevalue("certificate") if tls else None
    published = single({"a": tensor(1, 3_000_000)})
    with Hub(certificate=certificate) as hub, proxy() as between:
        hub.add_repo("org/m", {"model.safetensors": published, "config.json": CONFIG})
        told = {variable: f"{scheme}://127.0.0.1:{between.port}", "SSL_CERT_FILE": str(certificate or "")}
        cakefs = Cakefs(tmp_path, hub.endpoint, **told)
        cakefs.run("add", "org/m")
        with cakefs.mounted() as path:
            before = len(between.reached)
            assert (path / "org/m/model.safetensors").read_bytes() == published
            assert set(between.reached[before:]) == {urlsplit(at).netloc for at in (hub.endpoint, hub.cdn_endpoint)}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HTTPS_PROXY", "foo://localhost:1", "proxy that is set cannot be used: Unknown scheme"),
        ("ALL_PROXY", "http://local:host:1", "proxy that is set cannot be used: "),
        ("SSL_CERT_FILE", "/nowhere/certificates.pem", "certificates to trust cannot be read: No such file"),
        ("SSL_CERT_FILE", __file__, "certificates to trust cannot be read: "),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path: Path, hub: Hub, variable: str, value: str, said: str) -> None:
    hub.add_repo("org/m", {"model.safetensors": single({"a": tensor(1, 10)}), "config.json": CONFIG})
    done = Cakefs(tmp_path, hub.endpoint, **{variable: value}).run("add", "org/m", check=False)
    error, hint = done.stderr.splitlines()
    assert done.returncode == 2 and error.startswith("error: ") and said in error
    assert variable in hint


@needs_fuse
def test_a_mount_goes_on_without_a_network_that_is_set_up_wrongly(tmp_path: Path, hub: Hub) -> None:
    published = single({"a": tensor(1, 3_000_000)})
    hub.add_repo("org/m", {"model.safetensors": published, "config.json": CONFIG})
    cakefs = Cakefs(tmp_path, hub.endpoint).provoking("certificates to trust cannot be read")
    cakefs.run("add", "org/m")
    with cakefs.mounted(SSL_CERT_FILE="/nowhere/certificates.pem") as path:
        with pytest.raises(OSError, match="Input/output error"):
            (path / "org/m/model.safetensors").read_bytes()
        assert "(hint: SSL_CERT_FILE" in cakefs.log() and cakefs.status()["worker_deaths"] == 0
        done = cakefs.run("pull", "org/m", check=False, SSL_CERT_FILE="/nowhere/certificates.pem")
        assert done.returncode == 2 and done.stderr.startswith("error: the certificates to trust cannot be read")
        cakefs.run("pull", "org/m")
        assert (path / "org/m/model.safetensors").read_bytes() == published
