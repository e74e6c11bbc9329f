"""A hub and a CDN that speak TLS, as the real ones do: everything else that is tested does not."""

import subprocess
import sys
from pathlib import Path

from tests.hub import Hub
from tests.models import CONFIG, llama, sharded, single, tensor
from tests.mounts import Cakefs, needs_fuse

DOWNLOAD = "import sys; from huggingface_hub import snapshot_download as s; print(s('org/m', token='hf_mine'))"


@needs_fuse
def test_a_private_model_over_tls(tmp_path: Path, certificate: Path) -> None:
    """The token goes to the hub only; the bytes are those that the real client gets."""
    big = single({"a": tensor(1, 9_000_000), "b": tensor(2, 1000)})
    files = sharded(llama(2), 2) | {"config.json": CONFIG}
    with Hub(certificate=certificate) as hub:
        hub.add_repo("org/m", files | {"other/model.safetensors": big}, private=True, token="hf_mine")
        cakefs = Cakefs(tmp_path, hub.endpoint, SSL_CERT_FILE=str(certificate), HF_TOKEN="hf_mine")
        cakefs.run("add", "org/m")
        with cakefs.mounted() as path:
            assert (path / "org/m/model.safetensors").read_bytes() == single(llama(2))
            assert (path / "org/m/other/model.safetensors").read_bytes() == big
            cakefs.run("pull", "org/m")
            cakefs.run("verify", "org/m")
        asked = [r for r in hub.requests if r.path.endswith(".safetensors")]
        assert {r.host for r in asked if r.authorized} == {"localhost"}
        assert {r.host for r in asked if not r.authorized} == {"127.0.0.1"}
        environment = cakefs.environment | {"HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run([sys.executable, "-c", DOWNLOAD], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (Path(done.stdout.strip()) / "other/model.safetensors").read_bytes() == big


def test_a_hub_that_nobody_vouches_for_is_told(tmp_path: Path, certificate: Path) -> None:
    with Hub(certificate=certificate) as hub:
        hub.add_repo("org/m", {"model.safetensors": single(llama(1)), "config.json": CONFIG})
        done = Cakefs(tmp_path, hub.endpoint).run("add", "org/m", check=False)
    assert done.returncode == 13
    assert "certificate" in done.stderr and "SSL_CERT_FILE" in done.stderr and done.stderr.count("\n") <= 2
