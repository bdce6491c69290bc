"""The commands of a device: the agent that serves it, and what its apps and its owner ask the agent.

Heavy modules are imported inside the commands, as in `simulations/cli.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federation.errors import ConfigError

if TYPE_CHECKING:
    from client.agent.client import AgentClient
    from client.node import NodeConfig

ask = typer.Typer(no_args_is_help=True)

Address = Annotated[
    str,
    typer.Option(
        "--agent",
        metavar="ADDRESS",
        envvar="FEDQUILT_AGENT",
        help="unix:PATH or HOST:PORT, where the agent listens. Who answers is proved by a Unix socket or TLS alone.",
    ),
]
Seconds = Annotated[float, typer.Option(min=0.1, help="The longest that it may take.")]
User = Annotated[str, typer.Argument(metavar="USER", help="A user's name, as in the data.")]


def agent(
    *,
    state: Annotated[Path, typer.Option(help="Folder for all that the agent keeps; its owner's alone.")],
    data: Annotated[
        Path | None, typer.Option(help="The users' texts: a folder with one per user, JSONL, or a dataset on disk.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The frozen model: a folder, or a name on the hub.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Tokens per example; 64 by default.")] = None,
    experiment: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="The users of an experiment, instead of --data and --base.")
    ] = None,
    partition: Annotated[
        str, typer.Option(metavar="I/N", help="Which part of these users is here, counted from 0, such as 0/2.")
    ] = "0/1",
    listen: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="unix:PATH or HOST:PORT; the socket agent.sock in --state by default."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The agent's certificate, needed beyond loopback.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="The authority of those who may call.")] = None,
    block: Annotated[int, typer.Option(help="Users trained in one stacked computation.")] = 16,
    precision: Annotated[str, typer.Option(metavar="fp32|bf16", help="Of forward and backward.")] = "fp32",
    device: Annotated[str, typer.Option(metavar="cpu|cuda|auto", help="Where the model is.")] = "cpu",
) -> None:
    """Serve this device: own its users' data, train when the federation asks, answer its apps.

    Runs until SIGTERM or Ctrl-C. On 127.0.0.1:PORT callers need the token that is in --state; beyond loopback both
    sides need certificates.
    """
    from client.agent.security import SOCKET_NAME, check_protected, parse_address, tls_files

    tls = tls_files({"--tls-cert": tls_cert, "--tls-key": tls_key, "--tls-ca": tls_ca})
    address = parse_address(f"unix:{state / SOCKET_NAME}" if listen is None else listen)
    check_protected(address, tls)
    population = _population(experiment, {"data": data and str(data), "base": base, "window": window})
    config = _node_config(population, partition, state=state, block=block, precision=precision, device=device)

    from client.agent.process import serve

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("fedquilt").setLevel(logging.INFO)
    serve(config, address, tls, typer.echo)


@ask.command()
def status(*, agent: Address, seconds: Seconds = 30.0) -> None:
    """Show how many users the agent has, what it serves and what it takes on the disk."""
    with _agent(agent) as client:
        found = client.status(seconds)
    _say("users", ", ".join(f"{count} {split}" for split, count in sorted(found.users.items())))
    _say("personalised", str(found.personalised))
    _say("forgotten", str(found.forgotten))
    _say("release", found.release or "none")
    _say("pools kept", ", ".join(found.versions) or "none")
    _say("on the disk", f"{found.disk_bytes:,} bytes")


@ask.command()
def personalize(user: User, *, agent: Address, seconds: Seconds = 600.0) -> None:
    """Tune a user's personal model on its own data, now."""
    with _agent(agent) as client:
        done = client.personalize(user, seconds)
    typer.echo(
        f"{done.steps} steps on {done.version}: loss {done.loss_before:.4f} -> {done.loss_after:.4f} nats per target, "
        f"{done.personal_bytes:,} bytes kept"
    )


@ask.command()
def generate(
    user: User,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the text begins with.")],
    *,
    agent: Address,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens written.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, where the temperature is above 0.")] = 0,
    seconds: Seconds = 120.0,
) -> None:
    """Have a user's personal model go on with a text, and show it as it is written."""
    with _agent(agent) as client:
        pieces = client.generate(user, prompt, seconds, max_tokens=max_tokens, temperature=temperature, seed=seed)
        for piece in pieces:
            typer.echo(_harmless(piece), nl=False)
    typer.echo()


@ask.command()
def score(
    user: User,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the model is to foretell.")],
    *,
    agent: Address,
    seconds: Seconds = 60.0,
) -> None:
    """Measure how well a user's personal model foretells a text."""
    with _agent(agent) as client:
        found = client.score(user, text, seconds)
    typer.echo(
        f"{found.nats_per_token:.4f} nats per token, {found.bits_per_char:.4f} bits per character, "
        f"over {found.tokens:,} tokens"
    )


@ask.command()
def begin_anew(user: User, *, agent: Address, seconds: Seconds = 60.0) -> None:
    """Have a user's next personalisation begin a course of tasks; its personal values stay meanwhile."""
    with _agent(agent) as client:
        done = client.begin_anew(user, seconds)
    typer.echo("removed: what it remembers of its tasks" if done.had_course else "nothing to remove: no course began")


@ask.command()
def forget(user: User, *, agent: Address, seconds: Seconds = 60.0) -> None:
    """Have the device forget what it made of a user's data; says what that cannot undo."""
    with _agent(agent) as client:
        done = client.forget(user, seconds)
    values = "its personal values" if done.had_values else "no personal values, for there were none"
    typer.echo(f"removed: {values}, and its training state in {done.federations} federations")
    for left in done.cannot_undo:
        typer.echo(f"remains: {left}")


@ask.command()
def rebase(
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="A pool that the agent keeps; its release by default.")
    ] = None,
    *,
    agent: Address,
    user: Annotated[str | None, typer.Option(help="One user; all by default.")] = None,
    margin: Annotated[float, typer.Option(help="How much higher, in nats per target, its loss may be then.")] = 0.0,
    seconds: Seconds = 600.0,
) -> None:
    """Move personal values to another release, for those users whom it serves as well."""
    with _agent(agent) as client:
        wanted = version or client.status(seconds).release
        if not wanted:
            raise ConfigError("values move to a release, this agent serves none yet; name a version that it keeps")
        done = client.rebase(wanted, seconds, user=user, margin=margin)
    typer.echo(f"{wanted}: {done.moved} users moved, {done.stayed} stayed with their own release")


@ask.command()
def adopt(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A release's pool file.")],
    *,
    agent: Address,
    seconds: Seconds = 60.0,
) -> None:
    """Have the agent keep a pool, and serve it from now on."""
    with _agent(agent) as client:
        version = client.keep(_pool_bytes(file), seconds)
        client.adopt(version, seconds)
    typer.echo(f"serving {version}")


def _population(experiment: str | None, texts: dict[str, Any]) -> dict[str, Any]:
    """Whose data the agent holds: an experiment's users, or users with texts of their own."""
    from federation.config import load_config
    from federation.experiments import experiment_path

    given = {name: value for name, value in texts.items() if value is not None}
    if experiment is not None and given:
        raise ConfigError(
            f"users are those of --experiment or those of --data, got --experiment and --{', --'.join(given)}; "
            "leave one out"
        )
    if experiment is not None:
        return load_config(experiment_path(experiment)).population.model_dump()
    if missing := [f"--{name}" for name in ("data", "base") if name not in given]:
        raise ConfigError(
            f"an agent needs --data and --base, or --experiment; {' and '.join(missing)} missing; give users' texts "
            "and the frozen model"
        )
    return {"name": "texts", "options": given}


def _node_config(population: dict[str, Any], partition: str, **settings: Any) -> NodeConfig:
    from client.node import NodeConfig
    from federation.settings import parse

    parts = re.fullmatch(r"(\d+)/(\d+)", partition)
    if parts is None:
        raise ConfigError(f"--partition is I/N, part I of N counted from 0, such as 0/2, got {partition!r}")
    own = {"population": population, "partition": int(parts[1]), "partitions": int(parts[2])}
    return parse(NodeConfig, {**own, **settings})


@contextmanager
def _agent(address: str) -> Iterator[AgentClient]:
    from client.agent.client import AgentClient

    with AgentClient(address) as client:
        yield client


def _pool_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"a release is one pool file, {str(file)!r} cannot be read ({error.strerror}); name the file that "
            "`fedquilt release` wrote"
        ) from error


def _say(what: str, words: str) -> None:
    typer.echo(f"{what + ':':<14}{words}")


def _harmless(text: str) -> str:
    """The text without what would command a terminal."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
