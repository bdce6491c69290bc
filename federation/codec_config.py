"""How rows are written, as a part of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from federation.settings import Settings


class CodecConfig(Settings):
    """How rows are written."""

    rows: Literal["fp32", "fp16", "int8", "ternary"] = Field("fp32", description="format of the rows")
    top: float = Field(1.0, gt=0, le=1, description="share of values kept (ternary)")
