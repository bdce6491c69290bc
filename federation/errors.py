"""Every error that fedquilt raises on purpose.

A message states the rule, the value, the place and the remedy.

    FedquiltError
    ├── ConfigError        a configuration that cannot be run (also a ValueError)
    ├── PopulationError    users or their data are not as asked
    ├── PoolError          rows or units do not belong to this pool
    │   ├── MaskError      a packed mask that is not one of this pool
    │   └── PoolFormatError  a pool file of another release
    ├── CodecError         bytes that are not a valid update
    ├── StoreError         the user store is full, of another format, or cannot be used
    │   ├── DamagedShardError  a shard's data is damaged
    │   └── DamagedValuesError  a user's personal values are damaged
    ├── CheckpointError    no usable checkpoint
    ├── ExchangeError      what a server or a node said is not as agreed
    │   └── NodeError          a node cannot do what it was asked (.fault)
    ├── PluginError        an unknown, duplicate or ill-formed plugin
    └── RunError           a run that cannot start, continue or be read
"""

from __future__ import annotations


class FedquiltError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(FedquiltError, ValueError):
    """A configuration that cannot be run."""


class PopulationError(FedquiltError):
    """Users or their data are not as asked."""


class PoolError(FedquiltError):
    """Rows or units do not belong to this pool."""


class MaskError(PoolError):
    """A packed mask that is not one of this pool."""


class PoolFormatError(PoolError):
    """A pool file of another release of fedquilt: whole, as far as this one can tell."""


class CodecError(FedquiltError):
    """Bytes that are not a valid update."""


class StoreError(FedquiltError):
    """The user store is full, of another format, or cannot be used."""


class DamagedShardError(StoreError):
    """A shard's data is damaged. shard: its number in the store."""

    def __init__(self, message: str, shard: int) -> None:
        super().__init__(message)
        self.shard = shard

    def __reduce__(self) -> tuple[type[DamagedShardError], tuple[str, int]]:
        return DamagedShardError, (str(self), self.shard)


class DamagedValuesError(StoreError):
    """A user's personal values are damaged: they fail their checksum, or their bytes are none of the format."""


class CheckpointError(FedquiltError):
    """No usable checkpoint."""


class ExchangeError(FedquiltError):
    """What a server or a node said is not as agreed."""


class NodeError(ExchangeError):
    """A node cannot do what it was asked. fault: a `federation.exchange.Fault`."""

    def __init__(self, fault: str, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class PluginError(FedquiltError):
    """An unknown, duplicate or ill-formed plugin."""


class RunError(FedquiltError):
    """A run that cannot start, continue or be read."""


class FedquiltWarning(UserWarning):
    """Something that the user should know, though the run goes on."""
