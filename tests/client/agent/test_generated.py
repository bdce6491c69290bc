"""What protoc made of agent.proto is what it makes now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[3]
PROTO = "client/agent/agent.proto"
MADE = ("agent_pb2.py", "agent_pb2.pyi", "agent_pb2_grpc.py")


@pytest.mark.slow
def test_the_generated_modules_are_those_of_the_proto(tmp_path: Path) -> None:
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={HOUSE}", *out, PROTO]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=60)
    for name in MADE:
        made, kept = (folder / "client" / "agent" / name for folder in (tmp_path, HOUSE))
        assert made.read_text() == kept.read_text(), f"run the command at the head of {PROTO}"
