"""Populations by name: built in, or from anyone's package (entry points `fedquilt.populations`)."""

from __future__ import annotations

from federation.config import PopulationConfig
from federation.data.population import Population
from federation.plugins import Plugins

POPULATIONS: Plugins[Population] = Plugins(
    kind="population",
    group="fedquilt.populations",
    contract=Population,
    builtin={
        "code": "simulations.populations.text:code",
        "shakespeare": "simulations.populations.text:shakespeare",
        "texts": "federation.data.texts:texts",
        "digits": "simulations.populations.digits:digits",
        "docs": "simulations.populations.docs:docs",
        "synthetic": "simulations.populations.synthetic:SyntheticPopulation",
        "workload": "simulations.benchmarks.workloads:WorkloadPopulation",
    },
)


def make_population(config: PopulationConfig) -> Population:
    """The population that a configuration names, with its options."""
    return POPULATIONS.make(config.name, **config.options)
