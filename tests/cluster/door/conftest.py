"""Places to listen at, certificates, and that nothing is left of a test's connections."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from divisi.cluster.door import Place, TlsFiles
from divisi.cluster.seats import Address


@pytest.fixture
def folder() -> Iterator[Path]:
    """For sockets: with a short path."""
    with TemporaryDirectory(prefix="door") as name:
        yield Path(name)


@pytest.fixture(params=["tcp", "unix"])
def place(request: pytest.FixtureRequest, folder: Path) -> Place:
    return Address("127.0.0.1") if request.param == "tcp" else folder / "door.sock"


def _sockets() -> set[str]:
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return {os.readlink(link) for link in links if os.path.islink(link) and "socket:" in os.readlink(link)}


@pytest.fixture
async def nothing_left() -> AsyncIterator[None]:
    """Fails a test that leaves a socket or a task behind."""
    sockets, tasks = _sockets(), asyncio.all_tasks()
    yield
    ours = {asyncio.current_task()}
    async with asyncio.timeout(5):
        while left := (_sockets() - sockets) | {str(task) for task in asyncio.all_tasks() - tasks - ours}:
            try:
                await asyncio.sleep(0.01)  # the loop closes sockets in its own next turns
            except TimeoutError:
                raise AssertionError(f"left behind: {left}") from None


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TlsFiles]:
    """Files of a node's certificate by the CA's name."""
    folder = tmp_path_factory.mktemp("tls")
    return lambda name: _write_certificates(folder, name)


def _write_certificates(folder: Path, name: str) -> TlsFiles:
    now = datetime.datetime.now(datetime.UTC)
    keys = {who: ec.generate_private_key(ec.SECP256R1()) for who in ("ca", "node")}
    names = {who: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"{name} {who}")]) for who in keys}
    for who, key in keys.items():
        certificate = (
            x509.CertificateBuilder()
            .subject_name(names[who]).issuer_name(names["ca"]).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=who == "ca", path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["ca"].public_key()), False)
            .sign(keys["ca"], hashes.SHA256())
        )  # fmt: skip
        (folder / f"{name}-{who}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}-key.pem").write_bytes(
        keys["node"].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return TlsFiles(*(str(folder / f"{name}-{part}.pem") for part in ("node", "key", "ca")))
