"""Who may reach an agent: addresses, tokens, files that are their owner's alone, and one agent per folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from client.agent.security import (
    Credentials,
    TcpAddress,
    TlsFiles,
    UnixAddress,
    check_owner,
    check_protected,
    new_token,
    parse_address,
    private_files,
    read_token,
    same_token,
    sole_agent,
    tls_files,
    token_header,
)
from federation.errors import ConfigError
from tests.child import exit_code

TLS = TlsFiles(Path("a.pem"), Path("a.key"), Path("ca.pem"))


@pytest.mark.parametrize(
    ("text", "address", "again"),
    [
        ("unix:/run/agent.sock", UnixAddress(Path("/run/agent.sock")), "unix:/run/agent.sock"),
        ("unix:///run/agent.sock", UnixAddress(Path("/run/agent.sock")), "unix:/run/agent.sock"),
        ("127.0.0.1:7070", TcpAddress("127.0.0.1", 7070), "127.0.0.1:7070"),
        ("[::1]:0", TcpAddress("::1", 0), "[::1]:0"),
        ("agent.example:65535", TcpAddress("agent.example", 65535), "agent.example:65535"),
    ],
)
def test_addresses_are_read_and_written(text: str, address: object, again: str) -> None:
    assert parse_address(text) == address
    assert str(address) == again


def test_a_relative_socket_lies_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_address("unix:a.sock") == UnixAddress(tmp_path / "a.sock")


@pytest.mark.parametrize("text", ["", "7070", "127.0.0.1", "127.0.0.1:65536", "::1:70", "http://127.0.0.1:70", "a b:7"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"unix:PATH or HOST:PORT, such as 127.0.0.1:7070, got ") as refused:
        parse_address(text)
    assert repr(text) in str(refused.value)


def test_a_sockets_path_has_a_limit_in_bytes() -> None:
    longest = "/" + "a" * 106
    assert parse_address(f"unix:{longest}") == UnixAddress(Path(longest))
    for path, size in ((longest + "a", 108), ("/" + "é" * 54, 109), ("", 0)):
        with pytest.raises(ConfigError, match=f"has 1 to 107 bytes, .* comes to {size}; use a shorter one"):
            parse_address(f"unix:{path}")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_tls(host: str) -> None:
    check_protected(TcpAddress(host, 1), None)
    check_protected(TcpAddress(host, 1), TLS)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "agent.example", "localhost.example", "127.0.0.1.example"]
)
def test_beyond_loopback_there_is_tls(host: str) -> None:
    address = TcpAddress(host, 7070)
    check_protected(address, TLS)
    with pytest.raises(ConfigError, match=r"beyond loopback an agent speaks TLS alone, .* or use unix:PATH") as refused:
        check_protected(address, None)
    assert str(address) in str(refused.value)


def test_a_unix_socket_takes_no_tls() -> None:
    check_protected(UnixAddress(Path("/a")), None)
    with pytest.raises(ConfigError, match="unix:/a is open to its owner alone; leave the TLS files out"):
        check_protected(UnixAddress(Path("/a")), TLS)


def test_a_socket_is_ones_own_or_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = UnixAddress(tmp_path / "agent.sock")
    check_owner(address)
    for owner, user, is_fine in ((7, 7, True), (0, 7, True), (7, 8, False), (7, 0, False)):
        monkeypatch.setattr(Path, "stat", lambda _, owner=owner: SimpleNamespace(st_uid=owner))
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        if is_fine:
            check_owner(address)
            continue
        words = f"{address} belongs to user {owner}, this is user {user}; nothing was sent. Run this as"
        with pytest.raises(ConfigError, match=words):
            check_owner(address)


def test_a_socket_that_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/agent.sock cannot be looked at \(Not a directory\); run this as"):
        check_owner(UnixAddress(tmp_path / "file" / "agent.sock"))


def test_tls_files_come_together_or_not_at_all() -> None:
    assert tls_files({"--cert": None, "--key": None, "--ca": None}) is None
    assert tls_files({"--cert": "a.pem", "--key": Path("a.key"), "--ca": "ca.pem"}) == TLS
    with pytest.raises(ConfigError, match="needs --cert, --key, --ca, --cert and --ca missing; give all"):
        tls_files({"--cert": None, "--key": "a.key", "--ca": None})
    with pytest.raises(ConfigError, match=r"readable PEM files, 'a.pem' is not: No such file"):
        TLS.read()


def test_tls_files_are_pem(tmp_path: Path) -> None:
    for name in ("a.pem", "a.key"):
        (tmp_path / name).write_bytes(b"-----BEGIN A THING-----\n" + name.encode())
    (tmp_path / "ca.der").write_bytes(b"\x30\x82")
    certificate, key = tmp_path / "a.pem", tmp_path / "a.key"
    read = TlsFiles(certificate, key, certificate).read()
    assert [payload[-5:] for payload in read] == [b"a.pem", b"a.key", b"a.pem"]
    with pytest.raises(ConfigError, match=r"in PEM format, '.*ca.der' is in another; convert it"):
        TlsFiles(certificate, key, tmp_path / "ca.der").read()


def test_credentials_are_files_that_the_environment_names() -> None:
    assert Credentials.of_environment({}) == Credentials()
    tls = {"FEDQUILT_AGENT_CERT": "a.pem", "FEDQUILT_AGENT_KEY": "a.key", "FEDQUILT_AGENT_CA": "ca.pem"}
    assert Credentials.of_environment({"FEDQUILT_AGENT_TOKEN": "t", **tls}) == Credentials(Path("t"), TLS)


def test_a_token_is_new_each_time_and_its_owners_alone(tmp_path: Path) -> None:
    first, second = new_token(tmp_path), new_token(tmp_path)
    assert first != second
    assert len(second) >= 43  # 256 bits in base 64
    assert read_token(tmp_path / "token") == second
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match=r"gone.* cannot be read .*FEDQUILT_AGENT_TOKEN names the file 'token'"):
        read_token(tmp_path / "gone")


def test_only_the_token_itself_is_accepted() -> None:
    assert same_token(token_header("secret"), "secret")
    assert same_token(token_header("secret").encode(), "secret")
    for header in ("", "secret", "Bearer ", "Bearer secreT", "Bearer secret ", "bearer secret", "Bearer é"):
        assert not same_token(header, "secret")


def test_private_files_are_so_as_long_as_it_is_asked(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with private_files():
            (tmp_path / "mine").touch()
        (tmp_path / "open").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o644


def test_a_second_agent_of_a_folder_is_told_who_holds_it(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"
    with sole_agent(state):
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        words = f"process {os.getpid()} holds {state}; stop that one, or give another --state"
        with pytest.raises(ConfigError, match=words), sole_agent(state):
            pass
        assert exit_code(lambda: refused(state)) == 0
    with sole_agent(state):
        pass


def test_a_killed_agent_holds_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"

    def die() -> None:
        with sole_agent(state):
            os.kill(os.getpid(), 9)

    assert exit_code(die) == -9
    with sole_agent(state):
        pass


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_a_folder_that_others_may_look_into_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    words = f"for its owner alone .mode 700., {tmp_path} .* has mode {mode:o}; chmod 700 it"
    with pytest.raises(ConfigError, match=words), sole_agent(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_state_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file cannot be used"), sole_agent(tmp_path / "file"):
        pass


def refused(state: Path) -> None:
    """Raises AssertionError unless another process holds the folder."""
    with pytest.raises(ConfigError), sole_agent(state):
        pass
