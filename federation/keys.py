"""Certificates and keys for trials: TLS for the server and for remote agents, and a key for each node.

    ca.pem                    who trusts this trusts the certificates below, and nothing else
    server.pem, server.key    of the server, for the loopback and its hosts
    agent.pem, agent.key      of remote agents, for the loopback and their hosts, and of those who call them
    node-0, node-0.pub, ..    of the nodes: EC P-384 in OpenSSH's format, as Flower wants them

The authority's own key is never written: nobody can issue more certificates, and a new host needs a new folder.
Nothing here can be revoked, so these are for trials. In production, issue certificates from an authority of your own.
"""

from __future__ import annotations

import inspect
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from federation.errors import ConfigError
from federation.files import new_folder

CA = "ca.pem"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TRIAL_DAYS = 90
MOST_DAYS = 397
"""The most that browsers and many TLS libraries take."""

Role = Literal["server", "agent"]

_CLOCK_SKEW = timedelta(hours=1)
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(rf"(?:{_LABEL}\.)*(?!\d+$){_LABEL}", re.IGNORECASE)
_PURPOSES = {
    "server": [ExtendedKeyUsageOID.SERVER_AUTH],
    "agent": [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
}


def make_keys(
    folder: Path, nodes: int, hosts: Sequence[str] = (), agents: Sequence[str] = (), days: int = TRIAL_DAYS
) -> None:
    """Fills a new folder, which only its owner may open, with what `nodes` nodes need; valid for `days`.

    hosts: DNS names or IP addresses that nodes reach the server by, besides the loopback's. agents: the same for
    remote agents; without them there is no agent certificate.
    Raises ConfigError for a folder that is there already, for what is no name of a host, and for numbers out of range.
    """
    if nodes < 1:
        raise ConfigError(f"keys are for at least one node, got {nodes}; raise it")
    if not 1 <= days <= MOST_DAYS:
        raise ConfigError(f"certificates last 1 to {MOST_DAYS} days, got {days}; choose a number between")
    names: dict[Role, list[x509.GeneralName]] = {"server": _names(hosts)}
    if agents:
        names["agent"] = _names(agents)
    if folder.exists():
        raise ConfigError(f"keys are never overwritten, {folder} is there already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as filled:
        filled.chmod(0o700)
        _fill(filled, nodes, names, days)


def private_key(folder: Path, node: int) -> Path:
    """The private key of a node, counted from 0."""
    return folder / f"node-{node}"


def public_key(folder: Path, node: int) -> Path:
    """What the server registers of a node, counted from 0."""
    return folder / f"node-{node}.pub"


def certificate(folder: Path, role: Role) -> Path:
    """The certificate of the server, or of remote agents."""
    return folder / f"{role}.pem"


def certificate_key(folder: Path, role: Role) -> Path:
    """The private key of that certificate."""
    return folder / f"{role}.key"


@dataclass(frozen=True)
class _Authority:
    key: EllipticCurvePrivateKey
    name: x509.Name
    starts: datetime
    ends: datetime

    def issue(
        self, subject: x509.Name, key: EllipticCurvePrivateKey, extensions: Sequence[tuple[x509.ExtensionType, bool]]
    ) -> bytes:
        """A certificate in PEM. extensions: each with whether it is critical."""
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.starts)
            .not_valid_after(self.ends)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.key, hashes.SHA384()).public_bytes(Encoding.PEM)


def _fill(folder: Path, nodes: int, names: dict[Role, list[x509.GeneralName]], days: int) -> None:
    authority = _new_authority(days)
    _write(folder / CA, _of_authority(authority), 0o644)
    for role, hosts in names.items():
        key = generate_private_key(SECP384R1())
        _write(certificate(folder, role), _of_host(authority, role, key, hosts), 0o644)
        _write(certificate_key(folder, role), _private(key, PrivateFormat.PKCS8), 0o600)
    for node in range(nodes):
        key = generate_private_key(SECP384R1())
        _write(private_key(folder, node), _private(key, PrivateFormat.OpenSSH), 0o600)
        _write(public_key(folder, node), key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH), 0o644)


def _new_authority(days: int) -> _Authority:
    now = datetime.now(UTC)
    return _Authority(
        generate_private_key(SECP384R1()), _called("fedquilt trial CA"), now - _CLOCK_SKEW, now + timedelta(days=days)
    )


def _of_authority(authority: _Authority) -> bytes:
    return authority.issue(
        authority.name,
        authority.key,
        [(x509.BasicConstraints(ca=True, path_length=0), True), (_key_usage(key_cert_sign=True, crl_sign=True), True)],
    )


def _of_host(
    authority: _Authority, role: Role, key: EllipticCurvePrivateKey, hosts: Sequence[x509.GeneralName]
) -> bytes:
    return authority.issue(
        _called(f"fedquilt trial {role}"),
        key,
        [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_key_usage(digital_signature=True), True),
            (x509.ExtendedKeyUsage(_PURPOSES[role]), False),
            (x509.SubjectAlternativeName(hosts), False),
        ],
    )


def _called(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_usage(**allowed: bool) -> x509.KeyUsage:
    nothing = dict.fromkeys(inspect.signature(x509.KeyUsage).parameters, False)
    return x509.KeyUsage(**{**nothing, **allowed})


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    return [_name(host) for host in dict.fromkeys((*LOOPBACK, *hosts))]


def _name(host: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if len(host) > 253 or not _DNS_NAME.fullmatch(host):
            raise ConfigError(
                f"a host is a DNS name or an IP address, without scheme and port, got {host!r}; give server.example.org"
            ) from None
        return x509.DNSName(host)
    if address.is_unspecified:
        raise ConfigError(f"a certificate names what nodes connect to, {host} is no such address; give the machine's")
    return x509.IPAddress(address)


def _private(key: EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def _write(path: Path, payload: bytes, mode: int) -> None:
    """A new file that never had more permissions than `mode`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(payload)
