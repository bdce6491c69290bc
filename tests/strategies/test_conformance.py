"""The suite passes our own strategies, and each of its laws catches a strategy that breaks it."""

from dataclasses import dataclass, replace

import pytest
import torch

from federation.update import Schema, UpdateBlock
from strategies import STRATEGIES, FedAvg, MaskedMean, State, Step, Sums, make_strategy
from strategies.conformance import LAWS, Finding, check


@pytest.mark.parametrize("name", STRATEGIES.builtin)
def test_built_in_strategies_keep_every_law(name: str) -> None:
    assert check(make_strategy(name)) == []


class FirstGroupHeavier(FedAvg):
    def merge(self, a: Sums, b: Sums) -> Sums:
        return super().merge(super().merge(a, a), b)


class MeanOfMeans(MaskedMean):
    """Commutes, but groups count alike, whatever their size."""

    def merge(self, a: Sums, b: Sums) -> Sums:
        total = super().merge(a, b)
        return replace(total, rows={name: rows / 2 for name, rows in total.rows.items()})


class BlockMaximum(FedAvg):
    """Divides by the block's largest weight, which single users do not share."""

    def lift(self, block: UpdateBlock, state: State) -> Sums:
        largest = block.weight_u.max() if len(block.weight_u) else 1.0
        sums = super().lift(block, state)
        return replace(sums, rows={name: rows / largest for name, rows in sums.rows.items()})


class CountsPadding(FedAvg):
    def lift(self, block: UpdateBlock, state: State) -> Sums:
        sections = {
            name: replace(s, valid_uk=torch.ones_like(s.valid_uk), ids_uk=s.ids_uk.clamp(0, 0))
            for name, s in block.sections.items()
        }
        return super().lift(replace(block, sections=sections), state)


class AlwaysOneMore(FedAvg):
    """Counts a user who is not there."""

    def lift(self, block: UpdateBlock, state: State) -> Sums:
        sums = super().lift(block, state)
        return replace(sums, weight=sums.weight + 1, weights={n: w + 1 for n, w in sums.weights.items()})


class DividesByZero(MaskedMean):
    def finish(self, partial: Sums, state: State) -> tuple[Step, State]:
        step, state = super().finish(partial, state)
        sections = {n: replace(s, mean=partial.rows[n] / s.contributors[:, None]) for n, s in step.sections.items()}
        return Step(sections), state


class MergesInPlace(FedAvg):
    def merge(self, a: Sums, b: Sums) -> Sums:
        for name in a.rows:
            a.rows[name].add_(b.rows[name])
        return replace(super().merge(a, b), rows=a.rows)


class FinishesInPlace(FedAvg):
    def finish(self, partial: Sums, state: State) -> tuple[Step, State]:
        for rows in partial.rows.values():
            rows.mul_(0.5)
        return super().finish(partial, state)


class WeighsInPlace(FedAvg):
    def lift(self, block: UpdateBlock, state: State) -> Sums:
        for section in block.sections.values():
            section.rows_ukw.mul_(block.weight_u[:, None, None])
        return super().lift(block, state)


class CountsRoundsInPlace(FedAvg):
    def init(self, schema: Schema) -> State:
        return State(schema, {"rounds": torch.zeros(())})

    def finish(self, partial: Sums, state: State) -> tuple[Step, State]:
        state.tensors["rounds"].add_(1)
        return super().finish(partial, state)


class TrustsTooMuch(FedAvg):
    def finish(self, partial: Sums, state: State) -> tuple[Step, State]:
        step, state = super().finish(partial, state)
        return Step({n: replace(s, factor=s.factor + 1) for n, s in step.sections.items()}), state


class ForgetsTheGate(FedAvg):
    def finish(self, partial: Sums, state: State) -> tuple[Step, State]:
        step, state = super().finish(partial, state)
        return Step({n: s for n, s in step.sections.items() if n != "gate"}), state


class LosesItsState(FedAvg):
    def finish(self, partial: Sums, state: State) -> tuple[Step, State]:
        return super().finish(partial, state)[0], None  # type: ignore[return-value]


@dataclass(frozen=True)
class SumsAndUsers(Sums):
    blocks: tuple[UpdateBlock, ...] = ()


class KeepsEveryUser(FedAvg):
    def lift(self, block: UpdateBlock, state: State) -> Sums:
        return SumsAndUsers(**vars(super().lift(block, state)), blocks=(block,))


class DoesNotPickle(FedAvg):
    def lift(self, block: UpdateBlock, state: State) -> Sums:
        return SumsAndUsers(**vars(super().lift(block, state)), blocks=(lambda: None,))  # type: ignore[arg-type]


class AlwaysRaises(FedAvg):
    def lift(self, block: UpdateBlock, state: State) -> Sums:
        raise RuntimeError("out of thread")


WRONG = [
    (FirstGroupHeavier, "merge commutes", "differ: section 'pool/a', mean"),
    (MeanOfMeans, "merge associates", "differ: section 'pool/a', mean"),
    (BlockMaximum, "a block is its users", "differ: section 'pool/a', mean"),
    (CountsPadding, "padding is ignored", "differ: section 'pool/a', mean, by up to nan"),
    (AlwaysOneMore, "nobody is neutral", "the lift of nobody has contributors"),
    (AlwaysOneMore, "one user is enough", "rows that the only user did not send have contributors"),
    (DividesByZero, "nobody is neutral", "numbers that are not finite"),
    (DividesByZero, "one user is enough", "numbers that are not finite"),
    (MergesInPlace, "no argument changes", "merge changed its first argument"),
    (FinishesInPlace, "no argument changes", "finish changed the partial"),
    (WeighsInPlace, "no argument changes", "lift changed the block"),
    (CountsRoundsInPlace, "no argument changes", "the state was changed in place"),
    (TrustsTooMuch, "steps are sound", "the factor must lie in [0, 1]"),
    (ForgetsTheGate, "steps are sound", "the step must have the sections"),
    (LosesItsState, "steps are sound", "finish must return a State"),
    (KeepsEveryUser, "partials travel", "so linear_memory must be True"),
    (DoesNotPickle, "partials travel", "raised"),
    (AlwaysRaises, "merge commutes", "raised RuntimeError('out of thread')"),
]


@pytest.mark.parametrize(("wrong", "law", "detail"), WRONG)
def test_a_wrong_strategy_is_caught(wrong: type[FedAvg | MaskedMean], law: str, detail: str) -> None:
    findings = check(wrong())
    assert any(finding.law == law and detail in finding.detail for finding in findings), findings


def test_every_law_has_caught_something() -> None:
    assert {law for _, law, _ in WRONG} == set(LAWS)


def test_a_fault_of_one_method_is_found_by_its_own_law_alone() -> None:
    assert {finding.law for finding in check(KeepsEveryUser())} == {"partials travel"}
    assert {finding.law for finding in check(WeighsInPlace())} == {"no argument changes"}


def test_a_finding_reads_as_a_sentence() -> None:
    assert str(Finding("merge commutes", "it does not")) == "merge commutes: it does not"
