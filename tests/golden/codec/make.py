"""Makes the golden payloads: an update and a personal value per row format, from numbers made by integers.

Run `python -m tests.golden.codec.make` only after a deliberate change of format, with a new `codec.VERSION`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from federation.codec import RowFormat, encode, encode_personal
from federation.update import Schema, Section, SectionSpec, UpdateBlock

FOLDER = Path(__file__).parent
POOL_VERSION = "release-3"
SCHEMA = Schema(
    {
        "pool/a": SectionSpec(rows=6, factors={"down": 48, "up": 16}, max_rows=3),
        "pool/b": SectionSpec(rows=5, factors={"down": 3, "up": 2}, max_rows=3),
        "gate": SectionSpec(rows=1, factors={"phi": 7}, max_rows=1),
    }
)
MASK_SCHEMA = Schema({name: SectionSpec(spec.rows, {}, spec.max_rows) for name, spec in SCHEMA.sections.items()})
FORMATS = {
    "fp32": RowFormat("fp32"),
    "fp16": RowFormat("fp16"),
    "int8": RowFormat("int8"),
    "ternary-bitmap": RowFormat("ternary", top=0.5),
    "ternary-rice": RowFormat("ternary", top=0.06),
}


def numbers(*shape: int) -> Tensor:
    """Multiples of 1/512 in [-2, 2) that jump about: exact in float16 and float32."""
    index = torch.arange(torch.Size(shape).numel())
    return ((index * 40_503 % 2_048 - 1_024).float() / 512).view(shape)


def sections(schema: Schema) -> dict[str, Section]:
    """One user: rows 1, 4 and 5 of pool/a (out of order, with padding), row 0 of pool/b, the gate."""
    ids = {"pool/a": [4, 0, 1, 5], "pool/b": [0], "gate": [0]}
    valid = {"pool/a": [True, False, True, True], "pool/b": [True], "gate": [True]}
    return {
        name: Section(
            torch.tensor([ids[name]], dtype=torch.int32),
            torch.tensor([valid[name]]),
            numbers(1, len(ids[name]), spec.width),
        )
        for name, spec in schema.sections.items()
    }


def block() -> UpdateBlock:
    """The update that every golden payload holds."""
    metrics = {"reward": torch.tensor([0.75]), "loss": torch.tensor([1.5])}
    return UpdateBlock(sections(SCHEMA), torch.tensor([2.0]), metrics, 7, POOL_VERSION)


def payloads() -> dict[str, bytes]:
    """The golden payloads by file name."""
    made: dict[str, bytes] = {}
    for name, row_format in FORMATS.items():
        formats = {"pool": row_format, "gate": RowFormat("fp32")}
        made[f"update-{name}.bin"] = encode(block(), 0, SCHEMA, formats)
        made[f"personal-{name}.bin"] = encode_personal(sections(SCHEMA), 0, SCHEMA, formats, POOL_VERSION)
    exact = {"pool": RowFormat("fp32"), "gate": RowFormat("fp32")}
    made["personal-mask.bin"] = encode_personal(sections(MASK_SCHEMA), 0, MASK_SCHEMA, exact, POOL_VERSION)
    return made


if __name__ == "__main__":
    for file_name, payload in payloads().items():
        (FOLDER / file_name).write_bytes(payload)
