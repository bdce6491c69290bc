from dataclasses import dataclass, replace

from federation.update import UpdateBlock
from strategies import MaskedMean, State, Sums


@dataclass(frozen=True)
class SignMean(MaskedMean):
    """Users vote with signs, so the size of an update does not count (signSGD; Bernstein et al., 2018)."""

    def lift(self, block: UpdateBlock, state: State) -> Sums:
        votes = {name: replace(sent, rows_ukw=sent.rows_ukw.sign()) for name, sent in block.sections.items()}
        return super().lift(replace(block, sections=votes), state)
