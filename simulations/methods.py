"""The rows of the result table: every way to serve a new user that is compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from client.personal import Tuned
from client.task import row_format
from federation.config import RunConfig
from federation.errors import ConfigError
from federation.formats import RowFormat
from federation.plugins import suggest

Source = Literal["base", "fresh", "pool", "shared", "random_pool"]
MaskRule = Literal["none", "all", "gate", "saliency", "random", "other"]

FP16 = RowFormat("fp16")


@dataclass(frozen=True)
class Method:
    """One way to serve a user.

    source: where the rows start: the frozen base alone, fresh LoRA rows, the pool, the shared dense LoRA, or a pool
    that was trained with random masks. mask: which rows. tuned: what the user then tunes on its support part.
    rows: how the difference to the source is written, which sets the bytes. rank: rows per module where the mask is
    "all". cache: whether a 5-gram cache of the user's own text is interpolated.
    """

    name: str
    source: Source
    mask: MaskRule
    tuned: Tuned
    rows: RowFormat
    rank: int
    cache: bool = False

    @property
    def start(self) -> Method:
        """What methods have in common that only differ in how the tuned difference is written, or in the cache."""
        return replace(self, name="", rows=FP16, cache=False)


def methods_of(config: RunConfig) -> list[Method]:
    """The configured methods, in the table's order; "base" is always the first.

    Raises ConfigError for an unknown name.
    """
    known = known_methods(config)
    chosen = ["base", *[name for name in config.evaluate.methods if name != "base"]]
    methods = [_compressed(name, known) if "@" in name else known.get(name) for name in chosen]
    for name, method in zip(chosen, methods, strict=True):
        if method is None:
            raise ConfigError(f"unknown method {name!r} in evaluate.methods; {suggest(name, known)}")
        if method.mask in ("gate", "other") and config.gate.policy != "gate":
            raise ConfigError(
                f"the method {name!r} takes a gate's masks, but gate.policy is {config.gate.policy!r}; "
                "set it to 'gate' or leave the method out"
            )
    return [method for method in methods if method is not None]


def known_methods(config: RunConfig) -> dict[str, Method]:
    """Every method by name, with the budgets and formats of a configuration."""
    k, full = config.gate.budget, config.pool.rank
    personal = row_format(config.evaluate.personal)
    table = [
        Method("base", "base", "none", "nothing", FP16, 0),
        Method("shared", "shared", "all", "nothing", FP16, k),
        Method("dense_lora", "fresh", "all", "rows", FP16, k),
        Method("dense_lora_full_rank", "fresh", "all", "rows", FP16, full),
        Method("dense_lora_compressed", "fresh", "all", "rows", personal, k),
        Method("shared_tuned", "shared", "all", "rows", FP16, k),
        Method("shared_tuned_compressed", "shared", "all", "rows", personal, k),
        Method("shared_scales", "shared", "all", "scales", FP16, k),
        Method("random_mask", "pool", "random", "nothing", FP16, k),
        Method("random_mask_random_pool", "random_pool", "random", "nothing", FP16, k),
        Method("other_mask", "pool", "other", "nothing", FP16, k),
        Method("saliency_mask", "pool", "saliency", "nothing", FP16, k),
        Method("dsa_t0", "pool", "gate", "nothing", FP16, k),
        Method("dsa_t1", "pool", "gate", "scales", FP16, k),
        Method("dsa_t2", "pool", "gate", "rows", personal, k),
        Method("ngram_cache", "base", "none", "nothing", FP16, 0, cache=True),
        Method("dsa_t2_cache", "pool", "gate", "rows", personal, k, cache=True),
    ]
    return {method.name: method for method in table}


def sources_of(methods: list[Method]) -> set[Source]:
    """What must have been trained before these methods can be measured."""
    return {method.source for method in methods}


def _compressed(name: str, known: dict[str, Method]) -> Method | None:
    """`dsa_t2@ternary:0.2` or `dense_lora@int8`: a method with its difference written in another format."""
    base_name, _, written = name.partition("@")
    kind, _, top = written.partition(":")
    method = known.get(base_name)
    if method is None:
        return None
    try:
        return replace(method, name=name, rows=RowFormat(kind, float(top) if top else 1.0))  # type: ignore[arg-type]
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"a format is written method@kind or method@ternary:share, got {name!r} ({error})") from error
