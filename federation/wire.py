"""The fields of the byte table in `codec.py`, as those who write and those who read need them."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import get_args

from federation.formats import Kind
from federation.update import Schema

VERSION = 1
UPDATE, PERSONAL = b"fu", b"fp"
HEAD = struct.Struct("<2sB4s")
ROUND = struct.Struct("<IfB")
FLOAT = struct.Struct("<f")
CRC = struct.Struct("<I")
COUNT = struct.Struct("<I")
BITMAP = 255
KINDS: tuple[Kind, ...] = get_args(Kind)
SCALED = ("int8", "ternary")
LEVELS = {"fp32": "<f4", "fp16": "<f2", "int8": "i1"}
SCALE = "<i2"


def digest_of(schema: Schema, pool_version: str) -> bytes:
    """Four bytes that tell pools and layouts apart; `max_rows` is a limit, not layout, so it may change."""
    layout = [(name, spec.rows, list(spec.factors.items())) for name, spec in schema.sections.items()]
    return hashlib.blake2b(json.dumps([pool_version, layout]).encode(), digest_size=4).digest()
