"""The Flower ServerApp: a federation over the SuperNodes of a run.

Run-config:

    experiment    one of ours by name, or the path of a TOML file
    set           changes of its settings, separated by spaces: "federation.rounds=20 deployment.nodes=5"
    state         folder of checkpoints, history and releases, an absolute path; a run continues from what is there
    ray-address   a running Ray cluster that decodes, lifts and merges; "" for this process
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federation.config import RunConfig, load_config
from federation.data.cache import state_dir
from federation.data.registry import make_population
from federation.errors import ConfigError
from federation.experiments import experiment_path
from federation.house import check_house
from server.begin import first_state
from server.live.grid import GridNodes
from server.live.loop import RoundLine, federate
from server.releases import released

app = ServerApp()

_log = logging.getLogger("fedquilt")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs all rounds that are left. Raises FedquiltErrors, which end the Flower run as failed."""
    check_house()
    torch.set_num_threads(1)
    _log_to_stderr()
    settings = {key: str(value) for key, value in context.run_config.items()}
    config = configuration(settings)
    folder = state_folder(settings["state"], config.name)
    _log.info("state in %s", folder)
    rules, first = first_state(config, make_population(config.population).base_model())
    federate(config, rules, first, GridNodes(grid), folder, on_round=say, released=lambda: released(folder))


def configuration(settings: dict[str, str]) -> RunConfig:
    """The experiment that the run-config names, with its changes. Raises ConfigError where there is none."""
    try:
        overrides = shlex.split(settings["set"])
    except ValueError as error:
        raise ConfigError(
            f"set is a list of section.key=value with spaces between them, got {settings['set']!r} ({error}); "
            "close every quote"
        ) from error
    if settings["ray-address"]:
        overrides.append(f'compute.ray_address="{settings["ray-address"]}"')
    return load_config(experiment_path(settings["experiment"]), overrides)


def state_folder(state: str, name: str) -> Path:
    """Where a federation keeps its state: under the user's own, unless the run-config says where.

    Raises ConfigError for a relative path: it would begin in the folder that the SuperLink was started in.
    """
    if not state:
        return state_dir() / "servers" / name
    folder = Path(os.path.expanduser(state))
    if not folder.is_absolute():
        raise ConfigError(f"state is an absolute path, or empty for {state_dir()}, got {state!r}; write it in full")
    return folder


def say(line: RoundLine) -> None:
    """One line a round."""
    _log.info(
        "round %d: %d of %d users admitted, from %d nodes, in %.1f s",
        *(line.round_index, line.admitted, line.users, line.nodes, line.seconds),
    )


def _log_to_stderr() -> None:
    """Ours alone: Flower tells of every request. Once for a process that runs `main` again."""
    if _log.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("fedquilt: %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
