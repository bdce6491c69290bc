"""A base model with a pool around it: what clients call to get U users' losses in one computation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from federation.activations import with_fast_activations
from federation.base import BaseModel, at_least_fp32
from federation.data.population import Batch
from federation.errors import PoolError
from federation.pool.layers import (
    GatedPool,
    PoolLayer,
    PoolTuner,
    TunerConfig,
    UserRows,
    binding,
    target_layers,
    weight_of,
)
from federation.pool.prefix import remember_frozen
from federation.pool.spec import ModuleSpec, PoolSpec
from federation.qualities import NegativeLoss, Quality
from federation.update import Values


@dataclass(frozen=True)
class PooledModel:
    """A frozen base model whose targeted linear layers take units from a pool.

    >>> model = PooledModel.around(base, rank=32, scale=2.0)
    >>> with model.bound(rows):               # {section: (U, k, d_in + d_out)}
    ...     loss_u = model.loss(batch)        # (U,)
    """

    base: BaseModel
    spec: PoolSpec

    @classmethod
    def around(
        cls, base: BaseModel, rank: int, scale: float, target_modules: tuple[str, ...] | None = None
    ) -> PooledModel:
        """Wraps the targeted linear layers of the base's module, in place; once for each module.

        Raises PoolError, and changes nothing, when the targets match nothing or something that is not a linear layer.
        """
        planned = cls.planned(base, rank, scale, target_modules)
        with_fast_activations(base.module)
        PoolTuner(base.module, _tuning(base, scale, target_modules), "pool")
        remember_frozen(base.module, PoolLayer)
        return planned

    @classmethod
    def planned(
        cls, base: BaseModel, rank: int, scale: float, target_modules: tuple[str, ...] | None = None
    ) -> PooledModel:
        """What `around` gives, or would have before the module was wrapped. Changes nothing; raises as it does."""
        config = _tuning(base, scale, target_modules)
        targets = target_layers(base.module, config)
        if not targets:
            names = {name.rsplit(".", 1)[-1] for name, m in base.module.named_modules() if hasattr(m, "weight")}
            raise PoolError(
                f"target_modules {config.target_modules} match no linear layer of {base.name!r}; "
                f"it has {sorted(names - {'base_layer'})}"
            )
        modules = (ModuleSpec(name, *weight_of(layer).shape) for name, layer in targets.items())
        return cls(base, PoolSpec(tuple(modules), rank, scale))

    def of_rank(self, rank: int) -> PooledModel:
        """The same wrapped model with a pool of another rank: layers own no rows, so they fit any."""
        return replace(self, spec=replace(self.spec, rank=rank))

    def bound(self, rows: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Binds each user's own rows, {section: (U, k, d_in + d_out)}, for the calls made inside."""
        users = {rows[m.section].shape[0] for m in self.spec.modules if m.section in rows}
        for m in self.spec.modules:
            got = tuple(rows[m.section].shape) if m.section in rows else None
            if got is None or len(got) != 3 or got[2] != m.width or len(users) != 1:
                raise PoolError(
                    f"bound rows must be (U, k, {m.width}) with one U for all modules, got {got} (module {m.name!r}); "
                    "were they gathered from another pool?"
                )
        return binding(UserRows(users.pop(), {m.name: rows[m.section] for m in self.spec.modules}))

    def gated(self, values: Values, gates_ug: Tensor) -> AbstractContextManager[None]:
        """Binds the whole pool with unit g of user u at strength gates_ug (U, G), for the calls made inside."""
        if gates_ug.shape[1] != self.spec.units:
            raise PoolError(f"gates are (U, {self.spec.units}), got {tuple(gates_ug.shape)}; made for another pool?")
        by_module = gates_ug.view(len(gates_ug), len(self.spec.modules), self.spec.rank)
        rows = {m.name: values[m.section] for m in self.spec.modules}
        gates = {m.name: by_module[:, j] for j, m in enumerate(self.spec.modules)}
        return binding(GatedPool(len(gates_ug), rows, gates))

    def loss(self, batch: Batch) -> Tensor:
        """Each user's mean loss over its examples, weighted by `batch.weight`: (U,) nats; 0 for a user without any."""
        return -self.quality(batch, NegativeLoss())

    def quality(self, batch: Batch, quality: Quality) -> Tensor:
        """Each user's mean quality over its examples, weighted by `batch.weight`: (U,); 0 for a user without any."""
        inputs, targets = self._cast(batch.flat())
        quality_un = quality.measure(self.base, inputs, targets).view(batch.weight.shape)
        return (quality_un * batch.weight).sum(1) / batch.weight.sum(1).clamp_min(1e-12)

    @torch.no_grad()
    def example_features(self, batch: Batch) -> Tensor:
        """Each example's features from the frozen base: (U, N, feature_width)."""
        inputs, _ = self._cast(batch.flat())
        return at_least_fp32(self.base.features(self.base.module, inputs)).view(*batch.weight.shape, -1)

    def features(self, batch: Batch) -> Tensor:
        """Each user's mean features from the frozen base: (U, feature_width)."""
        features, weight = self.example_features(batch), batch.weight[..., None]
        return (features * weight).sum(1) / weight.sum(1).clamp_min(1e-12)

    def _cast(self, inputs_and_targets: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Inputs that are numbers, not tokens, in the precision of the module."""
        inputs, targets = inputs_and_targets
        return inputs.to(next(self.base.module.parameters()).dtype) if inputs.is_floating_point() else inputs, targets


def _tuning(base: BaseModel, scale: float, target_modules: tuple[str, ...] | None) -> TunerConfig:
    return TunerConfig(target_modules=list(target_modules or base.target_modules), scale=scale)
