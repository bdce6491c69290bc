"""How updates combine (strategies), how the result changes the values (optimizers), and plugins for both."""

from strategies.means import FedAvg, MaskedMean, Sums, weighted_sums
from strategies.optimizers import Adam, Momentum, Sgd
from strategies.protocol import Optimizer, State, Step, StepSection, Strategy, Tensors
from strategies.registry import OPTIMIZERS, STRATEGIES, make_optimizer, make_strategy

__all__ = [
    "OPTIMIZERS",
    "STRATEGIES",
    "Adam",
    "FedAvg",
    "MaskedMean",
    "Momentum",
    "Optimizer",
    "Sgd",
    "State",
    "Step",
    "StepSection",
    "Strategy",
    "Sums",
    "Tensors",
    "make_optimizer",
    "make_strategy",
    "weighted_sums",
]
