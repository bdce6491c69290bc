"""Who may reach an agent: addresses, the token for loopback, TLS beyond it. Neither torch nor gRPC.

unix:PATH       a socket that its owner alone may open, so callers know whose it is too
127.0.0.1:PORT  anyone on the machine may connect, so each call carries the agent's token; who answers is not proved
HOST:PORT       with TLS alone, on both sides: the agent and its callers each show a certificate
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from ipaddress import ip_address
from pathlib import Path

from client.private import private_folder
from federation.errors import ConfigError
from federation.files import write_file

SOCKET_NAME, TOKEN_NAME, LOCK_NAME = "agent.sock", "token", "agent.lock"
TOKEN_HEADER = "authorization"
_SOCKET_PATH_BYTES = 107
_TCP = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[^\[\]:/\s]+)):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class UnixAddress:
    """A socket in the file system. Its text is what gRPC calls it, and so is that of a `TcpAddress`."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TcpAddress:
    """A port of a host. 0: any that is free, for who listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it; of names, "localhost" alone."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


Address = UnixAddress | TcpAddress


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: one's own certificate and private key, and the authority that signed the other side's."""

    certificate: Path
    key: Path
    authority: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """The certificate, the key and the authority. Raises ConfigError."""
        return _pem(self.certificate), _pem(self.key), _pem(self.authority)


@dataclass(frozen=True)
class Credentials:
    """What a caller shows: a token's file on loopback, certificates beyond it, nothing on a Unix socket."""

    token_file: Path | None = None
    tls: TlsFiles | None = None

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Credentials:
        """From FEDQUILT_AGENT_TOKEN, FEDQUILT_AGENT_CERT, FEDQUILT_AGENT_KEY and FEDQUILT_AGENT_CA: paths of files.

        Raises ConfigError.
        """
        token = environment.get("FEDQUILT_AGENT_TOKEN")
        names = ("FEDQUILT_AGENT_CERT", "FEDQUILT_AGENT_KEY", "FEDQUILT_AGENT_CA")
        return cls(Path(token) if token else None, tls_files({name: environment.get(name) for name in names}))


def parse_address(text: str) -> Address:
    """unix:PATH or HOST:PORT. Raises ConfigError."""
    if text.startswith("unix:"):
        return _unix_address(text.removeprefix("unix:").removeprefix("//"))
    found = _TCP.fullmatch(text)
    if not found or int(found["port"]) > 65535:
        raise ConfigError(f"an agent's address is unix:PATH or HOST:PORT, such as 127.0.0.1:7070, got {text!r}")
    return TcpAddress(found["v6"] or found["name"], int(found["port"]))


def tls_files(paths: Mapping[str, str | Path | None]) -> TlsFiles | None:
    """The certificate, the key and the authority, by what the user calls them, in this order; None without any.

    Raises ConfigError when some are missing.
    """
    missing = [name for name, path in paths.items() if not path]
    if len(missing) == len(paths):
        return None
    if missing:
        raise ConfigError(f"TLS needs {', '.join(paths)}, {' and '.join(missing)} missing; give all of them, or none")
    certificate, key, authority = (Path(path) for path in paths.values() if path)
    return TlsFiles(certificate, key, authority)


def check_protected(address: Address, tls: TlsFiles | None) -> None:
    """Raises ConfigError where strangers could listen in or call: beyond loopback without TLS."""
    match address:
        case UnixAddress() if tls is not None:
            raise ConfigError(f"TLS is for HOST:PORT, {address} is open to its owner alone; leave the TLS files out")
        case TcpAddress(is_loopback=False) if tls is None:
            raise ConfigError(
                f"beyond loopback an agent speaks TLS alone, {address} would be without; "
                "give a certificate, its key and the other side's authority, or use unix:PATH or 127.0.0.1:PORT"
            )


def check_owner(address: UnixAddress) -> None:
    """Raises ConfigError for a socket of someone else, who would hear what is sent; a missing one is nobody's."""
    try:
        owner = address.path.stat().st_uid
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(
            f"an agent's socket is this user's or root's, {address} cannot be looked at ({error.strerror}); run this "
            "as the user that runs the agent"
        ) from error
    if owner not in (os.geteuid(), 0):
        raise ConfigError(
            f"an agent's socket is this user's or root's, {address} belongs to user {owner}, this is user "
            f"{os.geteuid()}; nothing was sent. Run this as the user that runs the agent, or name another address"
        )


def new_token(state: Path) -> str:
    """A token for this start of the agent, for its owner to read in the state folder."""
    token = secrets.token_urlsafe(32)
    with private_files():
        write_file(state / TOKEN_NAME, token.encode())
    return token


def read_token(path: Path) -> str:
    """Raises ConfigError."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"an agent on loopback wants its token, {path} cannot be read ({error}); "
            f"FEDQUILT_AGENT_TOKEN names the file {TOKEN_NAME!r} in the agent's state folder"
        ) from error


def same_token(header: str | bytes, token: str) -> bool:
    """Whether a call's header carries the token; takes as long for any header of this length."""
    given = header.encode() if isinstance(header, str) else header
    return secrets.compare_digest(given, token_header(token).encode())


def token_header(token: str) -> str:
    """What a call carries under `TOKEN_HEADER`."""
    return f"Bearer {token}"


@contextmanager
def private_files() -> Iterator[None]:
    """All files and sockets that this process makes meanwhile are their owner's alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def sole_agent(state: Path) -> Iterator[None]:
    """Holds the state folder, which is made if need be; the system lets go of it if this process is killed.

    Raises ConfigError while another agent holds it, when others may look into it, and when it cannot be used.
    """
    private_folder(state)
    try:
        descriptor = os.open(state / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"an agent's state is in a folder of its own, {state} cannot be used ({error})") from error
    try:
        _lock(descriptor, state)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, state: Path) -> None:
    """Takes the lock, and leaves this process's number for who comes second."""
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 20).decode() or "unknown"
        raise ConfigError(
            f"one agent at a time works on a state folder, process {holder} holds {state}; "
            "stop that one, or give another --state"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())


def _unix_address(path: str) -> UnixAddress:
    whole = os.path.abspath(path)
    size = len(os.fsencode(whole))
    if not path or size > _SOCKET_PATH_BYTES:
        raise ConfigError(
            f"a Unix socket's path has 1 to {_SOCKET_PATH_BYTES} bytes, {path!r} comes to {size if path else 0}; "
            "use a shorter one, such as unix:/run/user/1000/agent.sock"
        )
    return UnixAddress(Path(whole))


def _pem(path: Path) -> bytes:
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS files are readable PEM files, {str(path)!r} is not: {error.strerror}") from error
    if b"-----BEGIN " not in payload:
        raise ConfigError(f"TLS files are in PEM format, {str(path)!r} is in another; convert it")
    return payload
