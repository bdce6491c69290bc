"""The rows of the result table: every way to serve a new user that is compared.

A method is written `name[option=value,..]@format`, as in `dsa_t2[pool=disarm,windows=4]@ternary:0.2`. Options of those
whose masks are chosen by user:

    pool      the federation whose pool and gate serve, one of `variants.federations_of`; the main one by default
    windows   how many support examples the choice sees; `evaluate.gain_examples` by default
    budget    active units per module; `gate.budget` of the federation by default

Of those that tune:

    steps     how many steps; chosen from `evaluate.steps` by default
    shots     how many support examples the user owns, for the choice of its mask too; all by default

Of `melpa`, `maml`, `fomaml` and `reptile`:

    by        what steps: adam or sgd, whose rates are chosen, or rule, the steps that the pool was meta-trained for
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal, cast, get_args

from client.personal import Tuned
from client.task import row_format
from federation.config import CurvesConfig, EvaluateConfig, RunConfig
from federation.errors import ConfigError
from federation.formats import RowFormat
from federation.meta_config import SignalName
from federation.plugins import suggest
from simulations.variants import MAIN, SHARED, federations_of

UserRule = Literal["gate", "other", "saliency", "magnitude", "random", "best", "type", "informed"]
MaskRule = Literal["none", "all", "head", "own"] | UserRule
"""head: the units of the classifying module alone. own: as the federation itself chooses."""

Stepping = Literal["adam", "sgd", "rule"]

FP16 = RowFormat("fp16")
TEACHERS: tuple[UserRule, ...] = ("best", "type")
"""Masks that only a population with a teacher knows."""

_OPTIONS: Mapping[MaskRule, tuple[str, ...]] = {
    **dict.fromkeys(("gate", "other", "saliency"), ("pool", "windows", "budget")),
    **dict.fromkeys(("random", "magnitude"), ("pool", "budget")),
    **dict.fromkeys(TEACHERS, ("pool",)),
    "informed": ("pool", "windows"),
    "own": ("pool", "windows", "budget"),
}
_OF_TUNED = ("steps", "shots")
_OF_VOTES = ("shots",)
_OPTION = r"\s*\w+\s*=\s*[^\s\[\]@,=]+\s*"
_WRITTEN = re.compile(rf"(?P<base>[^\[\]@]+)(?:\[(?P<options>{_OPTION}(?:,{_OPTION})*)\])?(?:@(?P<written>.+))?")


@dataclass(frozen=True)
class MethodName:
    """A method's name in parts. options: as they are written, by name. written: the format, "" for the usual one."""

    base: str
    options: Mapping[str, str] = field(default_factory=dict)
    written: str = ""

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return self.base + (f"[{options}]" if options else "") + (f"@{self.written}" if self.written else "")


def seen(windows: int, shots: int) -> int:
    """How many of a user's support examples are seen, where it owns `shots` (0: enough)."""
    return min(windows, shots) if shots else windows


@dataclass(frozen=True)
class Choice:
    """How users' masks are chosen, of the units of a federation's pool.

    "other" is what the gate chose for another user; "best", "type" and "informed" are the known best masks of the
    user, of its type, and given its type and the very examples that a policy sees. windows: support examples that
    are seen. budget: active units per module. shots: support examples that the user owns, 0 for all that it has.
    """

    rule: UserRule
    pool: str
    windows: int
    budget: int
    shots: int = 0

    @property
    def seen(self) -> int:
        """How many support examples there are to see."""
        return seen(self.windows, self.shots)


@dataclass(frozen=True)
class Method:
    """One way to serve a user.

    source: where the rows start: the frozen base alone ("base"), new LoRA rows ("fresh"), or a federation's pool, by
    the federation's name. mask: which rows. tuned: what the user then tunes on its support part. rows: how the
    difference to the source is written, which sets the bytes. budget: active units per module; where the mask is
    "all", as many rows as there are. windows: support examples that a mask is chosen by. cache: whether a 5-gram cache
    of the user's own text is interpolated. by: what steps. learned: whether rows start where the federation's f_init
    says. steps: of the tuning, None where they are chosen. shots: as of a `Choice`. neighbours: whether the user's
    examples vote, with no training at all.
    """

    name: str
    source: str
    mask: MaskRule
    tuned: Tuned
    rows: RowFormat
    budget: int
    windows: int = 0
    cache: bool = False
    by: Stepping = "adam"
    learned: bool = False
    steps: int | None = None
    shots: int = 0
    neighbours: bool = False

    @property
    def start(self) -> Method:
        """What methods have in common that only differ in how the tuned difference is written, or in the cache."""
        return replace(self, name="", rows=FP16, cache=False)

    @property
    def choice(self) -> Choice | None:
        """How the user's mask is chosen; None where nobody chooses."""
        if self.mask == "none" or self.mask == "all" or self.mask == "head":
            return None
        assert self.mask != "own", f"{self.name!r} has taken its federation's policy"
        return Choice(self.mask, self.source, self.windows, self.budget, self.shots)

    @property
    def seen(self) -> int:
        """How many support examples f_init is told of."""
        return seen(self.windows, self.shots)


def methods_of(config: RunConfig) -> list[Method]:
    """The configured methods, in the table's order; "base" is always the first.

    Raises ConfigError for an unknown name, option or format, for options that do not fit the method or its
    federation, and for a gate's masks of a federation without a gate.
    """
    known, federations = known_methods(config), federations_of(config)
    written = dict.fromkeys(str(parsed_name(name)) for name in ("base", *config.evaluate.methods))
    chosen = {**written, **dict.fromkeys(curve_names(config.evaluate.curves))}
    return [_method(parsed_name(name), known, federations) for name in chosen]


def curve_names(curves: CurvesConfig) -> list[str]:
    """The methods that make up the few-shot curves, by the names that tables have.

    Raises ConfigError for one that is a point already.
    """
    found = []
    for name, shots, steps in product(map(parsed_name, curves.methods), curves.shots or (0,), curves.steps):
        if set(name.options) & set(_OF_TUNED):
            raise ConfigError(
                f"a curve has the steps and shots of evaluate.curves, got {str(name)!r} in its methods; leave them out"
            )
        few = {"shots": str(shots)} if shots else {}
        found.append(str(replace(name, options={**name.options, **few, "steps": str(steps)})))
    return found


def points_alone(config: EvaluateConfig) -> list[str]:
    """The points of curves that are no rows of the table."""
    rows = {str(parsed_name(name)) for name in config.methods}
    return [name for name in curve_names(config.curves) if name not in rows]


def known_methods(config: RunConfig) -> dict[str, Method]:
    """Every method by its bare name, with the budgets and formats of a configuration."""
    k, full, windows = config.gate.budget, config.pool.rank, config.evaluate.gain_examples
    personal = row_format(config.evaluate.personal)
    table = [
        Method("base", "base", "none", "nothing", FP16, 0),
        Method("shared", SHARED, "all", "nothing", FP16, k),
        Method("dense_lora", "fresh", "all", "rows", FP16, k),
        Method("dense_lora_full_rank", "fresh", "all", "rows", FP16, full),
        Method("dense_lora_compressed", "fresh", "all", "rows", personal, k),
        Method("shared_tuned", SHARED, "all", "rows", FP16, k),
        Method("shared_tuned_compressed", SHARED, "all", "rows", personal, k),
        Method("shared_scales", SHARED, "all", "scales", FP16, k),
        Method("random_mask", MAIN, "random", "nothing", FP16, k, windows),
        Method("magnitude_mask", MAIN, "magnitude", "nothing", FP16, k, windows),
        Method("saliency_mask", MAIN, "saliency", "nothing", FP16, k, windows),
        Method("other_mask", MAIN, "other", "nothing", FP16, k, windows),
        Method("type_mask", MAIN, "type", "nothing", FP16, k, windows),
        Method("informed_mask", MAIN, "informed", "nothing", FP16, k, windows),
        Method("best_mask", MAIN, "best", "nothing", FP16, k, windows),
        Method("dsa_t0", MAIN, "gate", "nothing", FP16, k, windows),
        Method("dsa_t1", MAIN, "gate", "scales", FP16, k, windows),
        Method("dsa_t2", MAIN, "gate", "rows", personal, k, windows),
        Method("melpa", MAIN, "own", "rows", personal, k, windows, by="rule", learned=True),
        Method("maml", "maml", "own", "rows", personal, k, windows, by="rule", learned=True),
        Method("fomaml", "fomaml", "own", "rows", personal, k, windows, by="rule", learned=True),
        Method("reptile", "reptile", "own", "rows", personal, k, windows, learned=True),
        Method("head_only", "fresh", "head", "rows", FP16, k),
        Method("neighbours", "base", "none", "nothing", FP16, 0, neighbours=True),
        Method("ngram_cache", "base", "none", "nothing", FP16, 0, cache=True),
        Method("dsa_t2_cache", MAIN, "gate", "rows", personal, k, windows, cache=True),
    ]
    return {method.name: method for method in table}


def sources_of(methods: Sequence[Method]) -> list[str]:
    """What must have been trained before these methods can be measured, in their order; "base" and "fresh" need not."""
    return list(dict.fromkeys(method.source for method in methods))


def parsed_name(text: str) -> MethodName:
    """The parts of a method's name; `str` puts them together again. Raises ConfigError where it is not written so."""
    match = _WRITTEN.fullmatch(text)
    pairs = match["options"].split(",") if match and match["options"] else []
    options = {name.strip(): value.strip() for name, value in (pair.split("=") for pair in pairs)}
    if match is None or len(options) < len(pairs):
        raise ConfigError(
            f"a method is written name[option=value,..]@format, each option once, got {text!r} in evaluate.methods; "
            "for example dsa_t2[windows=4,budget=2]@int8"
        )
    return MethodName(match["base"], options, match["written"] or "")


def _method(name: MethodName, known: Mapping[str, Method], federations: Mapping[str, RunConfig]) -> Method:
    method = known.get(name.base)
    if method is None:
        raise ConfigError(f"unknown method {str(name)!r} in evaluate.methods; {suggest(name.base, known)}")
    method = replace(method, name=str(name))
    if name.options or method.mask == "own":
        method = _with_options(method, name, federations)
    if name.written:
        method = replace(method, rows=_format(name))
    if method.mask == "own":
        method = _as_its_federation(method, name, federations)
    policy = federations[method.source].gate.policy if method.source in federations else None
    if method.mask in ("gate", "other") and policy != "gate":
        raise ConfigError(
            f"the method {method.name!r} takes a gate's masks, but gate.policy is {policy!r} in the federation "
            f"{method.source!r}; set it to 'gate', name another pool or leave the method out"
        )
    return method


def _as_its_federation(method: Method, name: MethodName, federations: Mapping[str, RunConfig]) -> Method:
    """The method with the masks that its federation trains with."""
    config = federations[method.source]
    signal = config.meta.signal
    if name.base in get_args(SignalName) and method.source == name.base != signal:
        raise ConfigError(
            f"the method {name.base!r} serves by a federation with that signal, the variant {name.base!r} has "
            f"meta.signal = {signal!r}; set it to {name.base!r}, or leave the method out"
        )
    if method.by == "rule" and not config.meta.adapts:
        raise ConfigError(
            f"by = 'rule' steps as the pool was meta-trained for, but meta.signal is {signal!r} in the federation "
            f"{method.source!r}, in {method.name!r}; set it to 'fomaml' or 'maml', or write by=adam"
        )
    if config.gate.policy != "all":
        return replace(method, mask=config.gate.policy)
    if "budget" in name.options:
        raise ConfigError(
            f"a budget is of masks, but gate.policy is 'all' in the federation {method.source!r}, in {method.name!r}; "
            "drop it"
        )
    return replace(method, mask="all", budget=config.pool.rank)


def _with_options(method: Method, name: MethodName, federations: Mapping[str, RunConfig]) -> Method:
    """The method as its options say. What they leave out is as in its federation."""
    takes = _options_of(method)
    for option in name.options:
        if option not in takes:
            raise ConfigError(
                f"the method {name.base!r} has no option {option!r}, in {method.name!r}; {suggest(option, takes)}"
            )
    if method.tuned != "nothing" or method.neighbours:
        method = _with_tuning(method, name)
    return _with_pool(method, name, federations) if "pool" in takes else method


def _options_of(method: Method) -> tuple[str, ...]:
    tuned = _OF_TUNED if method.tuned != "nothing" and not method.cache else ()
    if method.neighbours:
        return _OF_VOTES
    return (*_OPTIONS.get(method.mask, ()), *tuned, *(("by",) if method.learned else ()))


def _with_tuning(method: Method, name: MethodName) -> Method:
    by = name.options.get("by", method.by)
    if by not in get_args(Stepping):
        raise ConfigError(f"what steps is one of {get_args(Stepping)}, got by = {by!r} in {method.name!r}")
    steps = _number(name, "steps", 0, least=0) if "steps" in name.options else None
    return replace(method, by=cast(Stepping, by), steps=steps, shots=_number(name, "shots", 0))


def _with_pool(method: Method, name: MethodName, federations: Mapping[str, RunConfig]) -> Method:
    pool = name.options.get("pool", method.source)
    if pool not in federations and pool == name.base:
        raise ConfigError(
            f"the method {str(name)!r} serves by a federation called {pool!r}, there is none; add "
            f"[variants.{pool}.meta] with signal = {pool!r}, or leave the method out"
        )
    if pool not in federations:
        raise ConfigError(f"no federation is called {pool!r}, in {method.name!r}; {suggest(pool, federations)}")
    gate, rank = federations[pool].gate, federations[pool].pool.rank
    if "budget" in name.options and gate.distribution == "bernoulli":
        raise ConfigError(
            f"a Bernoulli gate has no budget to choose, in {method.name!r}: the federation {pool!r} has "
            "gate.distribution = 'bernoulli'; leave the budget out, or set it to 'budget'"
        )
    budget = _number(name, "budget", gate.budget)
    if budget > rank:
        raise ConfigError(f"a budget is at most the pool's rank, {rank}, got {budget} in {method.name!r}; lower it")
    return replace(method, source=pool, windows=_number(name, "windows", method.windows), budget=budget)


def _number(name: MethodName, option: str, default: int, least: int = 1) -> int:
    if option not in name.options:
        return default
    text = name.options[option]
    if not re.fullmatch(r"0|[1-9][0-9]*", text, re.ASCII) or int(text) < least:
        raise ConfigError(
            f"{option} is a whole number from {least}, got {text!r} in {str(name)!r}; for example {option}=4"
        )
    return int(text)


def _format(name: MethodName) -> RowFormat:
    kind, _, top = name.written.partition(":")
    try:
        return RowFormat(kind, float(top) if top else 1.0)  # type: ignore[arg-type]
    except (ConfigError, ValueError) as error:
        raise ConfigError(
            f"a format is written method@kind or method@ternary:share, got {str(name)!r} ({error})"
        ) from error
