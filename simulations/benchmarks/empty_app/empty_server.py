"""Rounds of nothing, with pushes and pulls as fedquilt's server does them, and how long each took."""

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()

PAUSE_SECONDS = 0.2
"""As `deployment.poll_seconds` is by default."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Writes the seconds of each round to the file `out`."""
    nodes, rounds = (int(context.run_config[key]) for key in ("nodes", "rounds"))
    while len(list(grid.get_node_ids())) < nodes:
        time.sleep(PAUSE_SECONDS)
    taken = [one_round(grid) for _ in range(rounds)]
    Path(str(context.run_config["out"])).write_text(json.dumps(taken))


def one_round(grid: Grid) -> float:
    """A message to each node, and its answer."""
    started = time.perf_counter()
    awaited: list[str] = []
    for node in grid.get_node_ids():
        awaited += grid.push_messages([Message(RecordDict({"empty": ConfigRecord()}), node, "train")])
    while awaited:
        arrived = {reply.metadata.reply_to_message_id for reply in grid.pull_messages(awaited)}
        awaited = [ticket for ticket in awaited if ticket not in arrived]
        time.sleep(PAUSE_SECONDS)
    return time.perf_counter() - started
