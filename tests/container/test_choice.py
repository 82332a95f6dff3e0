"""QPDT_LABS: what it may say, and what is deployed then."""

from __future__ import annotations

import pytest

from . import choice
from .choice import Choice, ChoiceError, chosen


def of(words: str) -> list[Choice]:
    return chosen({choice.VARIABLE: words}, cores=2)


def test_words_become_labs_in_their_order() -> None:
    assert of("four-site two-dc:small") == [Choice("four-site"), Choice("two-dc", small=True)]
    assert of("all") == [Choice("four-site"), Choice("four-spine"), Choice("two-dc")]
    assert of("four-spine:frr=trixie") == [Choice("four-spine", spines="trixie", leaves="trixie")]
    assert of("two-dc:small:spines=sid") == [Choice("two-dc", small=True, spines="sid")]


@pytest.mark.parametrize(
    "word", ["four-site", "two-dc:small", "two-dc:frr=sid", "two-dc:small:leaves=trixie", "two-dc:spines=sid"]
)
def test_a_choice_is_written_as_it_is_read(word: str) -> None:
    assert [str(one) for one in of(word)] == [word]


@pytest.mark.parametrize("word", ["three-dc", "two-dc:tiny", "two-dc:frr=", "two-dc:spines=../x"])
def test_what_is_wrong_is_named(word: str) -> None:
    with pytest.raises(ChoiceError, match=r"^QPDT_LABS: .*there is no lab|^QPDT_LABS: .*is none of"):
        of(word)


def test_small_labs_keep_a_leaf_at_both_ends() -> None:
    spare = {"leaf2", "host2"}
    assert Choice("four-spine", small=True).left_out() == {"grafana"} | spare
    sites = ("ams", "fra", "iad", "yyz")
    assert Choice("four-site", small=True).left_out() == {"grafana"} | {
        f"{site}-{kind}2" for site in sites for kind in ("leaf", "host")
    }
    assert Choice("two-dc").left_out() == {"grafana"}


def test_a_machine_of_few_cores_gets_a_small_lab() -> None:
    assert [[one.small for one in chosen({}, cores)] for cores in (2, 4)] == [[True], [False]]
