"""Keys for trials, as TLS and OpenSSH see them: handshakes by the standard library's ssl, never by our own code."""

from __future__ import annotations

import os
import ssl
import stat
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from federation.errors import ConfigError
from federation.keys import CA, LOOPBACK, certificate, certificate_key, make_keys, private_key, public_key

HOSTS = ("10.0.0.5", "server.example.org", "2001:db8::7")
AGENTS = ("device-1.example.org",)
NODES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "new" / "keys"
    before = os.umask(0)
    try:
        make_keys(path, NODES, HOSTS, AGENTS, days=30)
    finally:
        os.umask(before)
    return path


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """A TLS handshake in memory, until both sides are content. Raises what either has against the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = {
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname=host),
    }
    for _ in range(10):
        for side in list(sides):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
                sides.remove(side)
    assert not sides


def serving(folder: Path, role: str = "server") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{role}.pem", folder / f"{role}.key")
    return context


def trusting(folder: Path) -> ssl.SSLContext:
    """Verifies certificate and name, and is strict on RFC 5280, as Python is from 3.13 on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / CA)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def loaded(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("host", [*LOOPBACK, *HOSTS])
def test_the_server_is_trusted_by_every_name_it_was_made_for(folder: Path, host: str) -> None:
    handshake(serving(folder), trusting(folder), host)


@pytest.mark.parametrize("host", ["other.example.org", "10.0.0.6", *AGENTS])
def test_the_server_is_trusted_by_no_other_name(folder: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
        handshake(serving(folder), trusting(folder), host)


def test_certificates_of_another_authority_are_not_trusted(folder: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "others", 1)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(serving(tmp_path / "others"), trusting(folder), "localhost")


@pytest.mark.parametrize("host", [*LOOPBACK, *AGENTS])
def test_an_agent_takes_callers_with_its_certificate(folder: Path, host: str) -> None:
    agent, caller = serving(folder, "agent"), trusting(folder)
    agent.verify_mode = ssl.CERT_REQUIRED
    agent.load_verify_locations(folder / CA)
    caller.load_cert_chain(folder / "agent.pem", folder / "agent.key")
    handshake(agent, caller, host)


def test_an_agent_is_no_server_and_the_server_calls_no_agent(folder: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
        handshake(serving(folder, "agent"), trusting(folder), HOSTS[1])
    agent, caller = serving(folder, "agent"), trusting(folder)
    agent.verify_mode = ssl.CERT_REQUIRED
    agent.load_verify_locations(folder / CA)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        handshake(agent, caller, "localhost")
    caller.load_cert_chain(folder / "server.pem", folder / "server.key")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"purpose|unsuitable"):
        handshake(agent, caller, "localhost")


def test_what_certificates_are_for_and_how_long(folder: Path) -> None:
    authority = loaded(folder / CA)
    for role in ("server", "agent"):
        issued = loaded(certificate(folder, role))
        issued.verify_directly_issued_by(authority)
        assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = issued.extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.digital_signature
        assert not usage.key_cert_sign
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    assert authority.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    for path in (CA, "server.pem", "agent.pem"):
        left = loaded(folder / path).not_valid_after_utc - datetime.now(UTC)
        assert timedelta(days=29, hours=23) < left <= timedelta(days=30)
        assert loaded(folder / path).not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=30)


def test_node_keys_are_what_flower_registers(folder: Path) -> None:
    for node in range(NODES):
        key = load_ssh_private_key(private_key(folder, node).read_bytes(), password=None)
        assert isinstance(key, EllipticCurvePrivateKey)
        assert isinstance(key.curve, SECP384R1)
        assert private_key(folder, node).read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----\n")
        assert load_ssh_public_key(public_key(folder, node).read_bytes()) == key.public_key()
    assert public_key(folder, 0).read_bytes() != public_key(folder, 1).read_bytes()


def test_nobody_has_the_authoritys_key(folder: Path) -> None:
    def public(key: object) -> bytes:
        return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]

    keys = [load_pem_private_key(certificate_key(folder, role).read_bytes(), None) for role in ("server", "agent")]
    keys += [load_ssh_private_key(private_key(folder, node).read_bytes(), None) for node in range(NODES)]
    private = [path for path in folder.iterdir() if b"PRIVATE" in path.read_bytes()]
    assert len(private) == len(keys)
    authority = public(loaded(folder / CA))
    assert authority not in {public(key) for key in keys}


def test_secrets_are_their_owners_alone_whatever_the_umask(folder: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes == {
        "keys": 0o700,
        CA: 0o644,
        "server.pem": 0o644,
        "server.key": 0o600,
        "agent.pem": 0o644,
        "agent.key": 0o600,
        "node-0": 0o600,
        "node-0.pub": 0o644,
        "node-1": 0o600,
        "node-1.pub": 0o644,
    }


def test_without_remote_agents_there_is_no_agent_certificate(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", 1)
    assert {path.name for path in (tmp_path / "keys").iterdir()} == {
        CA, "server.pem", "server.key", "node-0", "node-0.pub",
    }  # fmt: skip


@pytest.mark.parametrize("nodes", [1, 3])
def test_nothing_is_overwritten(folder: Path, nodes: int) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=rf"never overwritten, {folder} is there already; name a new folder"):
        make_keys(folder, nodes)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "host",
    [
        "https://server",
        "server:8000",
        "a b",
        "",
        "-a.example",
        "a..b",
        "*.example.org",
        "10.0.0.999",
        "bücher.example",
        "a" * 64,
        ".".join(["abcdefg"] * 40),
    ],
)
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    for hosts, agents in (([host], []), ([], [host])):
        with pytest.raises(ConfigError, match="DNS name or an IP address") as caught:
            make_keys(tmp_path / "keys", 1, hosts, agents)
        assert repr(host) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_where_a_server_listens_is_not_where_it_is(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=f"what nodes connect to, {host} is no such address"):
        make_keys(tmp_path / "keys", 1, [host])


@pytest.mark.parametrize(
    ("nodes", "days", "words"),
    [(0, 90, "at least one node, got 0"), (1, 0, "got 0"), (1, 398, "1 to 397 days, got 398")],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, nodes: int, days: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_keys(tmp_path / "keys", nodes, days=days)
    assert not list(tmp_path.iterdir())
