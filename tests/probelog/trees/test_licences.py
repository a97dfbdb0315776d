"""Licences of parents and children: what is forbidden, dropped, fine, and unknown."""

from __future__ import annotations

import pytest

from probelog.trees.licences import LICENCES, ConflictKind, judge, known


@pytest.mark.parametrize(
    ("parent", "child", "kind", "reason"),
    [
        ("cc-by-nc-4.0", "mit", "forbidden", "cc-by-nc-4.0 forbids commercial use, which mit allows"),
        ("cc-by-nc-sa-4.0", "apache-2.0", "forbidden", "forbids commercial use"),
        ("cc-by-nd-4.0", "cc-by-nd-4.0", "forbidden", "does not allow that adapted versions are shared"),
        ("cc-by-nc-nd-4.0", "cc-by-nc-4.0", "forbidden", "adapted versions"),
        ("gpl-3.0", "mit", "conditions", "gpl-3.0 asks that what is made from it is under gpl-3.0"),
        ("gpl", "apache-2.0", "conditions", "under gpl or gpl-2.0 or gpl-3.0"),
        ("agpl-3.0", "mit", "conditions", "agpl-3.0"),
        ("cc-by-sa-4.0", "cc-by-4.0", "conditions", "under cc-by-sa-4.0 or gpl-3.0"),
        ("cc-by-sa-4.0", "cc-by-sa-3.0", "conditions", "cc-by-sa-4.0"),
        ("mpl-2.0", "mit", "conditions", "mpl-2.0"),
        ("eupl-1.2", "mit", "conditions", "eupl-1.2"),
        ("creativeml-openrail-m", "mit", "conditions", "restrictions are passed on; mit has none"),
        ("llama2", "apache-2.0", "conditions", "restrictions are passed on"),
        ("apache-2.0", "mit", "notice", "if changes are stated; mit does not ask for that"),
        ("apache-2.0", "cc0-1.0", "notice", "notices are kept and changes are stated; cc0-1.0"),
        ("mit", "unlicense", "notice", "if the licence's text and the copyright notices are kept"),
        ("cc-by-4.0", "mit", "notice", "changes are stated"),
        ("apache-2.0", "mpl-2.0", "notice", "changes are stated"),
    ],
)
def test_conflicts(parent, child, kind, reason):
    judgement = judge([parent], [child])

    assert judgement is not None
    assert judgement.kind == kind
    assert reason in judgement.reason
    assert (judgement.parent, judgement.child) == (parent, child)


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        ("mit", "apache-2.0"),
        ("mit", "gpl-3.0"),
        ("apache-2.0", "gpl-3.0"),
        ("bsd-3-clause", "mit"),
        ("cc0-1.0", "mit"),
        ("mit", "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
        ("cc-by-sa-3.0", "cc-by-sa-4.0"),
        ("cc-by-sa-4.0", "gpl-3.0"),
        ("lgpl-2.1", "gpl-3.0"),
        ("apache-2.0", "creativeml-openrail-m"),
        ("creativeml-openrail-m", "openrail"),  # which restrictions: the identifier does not tell
        ("gpl-2.0", "gpl-3.0"),  # "or any later version": likewise
        ("gpl-3.0", "agpl-3.0"),
        ("mpl-2.0", "gpl-3.0"),
        ("eupl-1.2", "mpl-2.0"),
        ("other", "mit"),
        ("cc-by-nc-4.0", "other"),
        ("cc-by-nc-4.0", "apache-2"),  # no identifier of the Hub's
    ],
)
def test_no_conflict_and_unknown(parent, child):
    assert judge([parent], [child]) is None


def test_nothing_conflicts_with_itself_but_what_may_not_be_adapted():
    conflicting = {licence for licence in LICENCES if judge([licence], [licence]) is not None}

    assert conflicting == {"cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"}
    assert not any(judge([licence], [licence], unchanged=True) for licence in LICENCES)


def test_licences_that_are_named_by_others_are_the_hub_s():
    named = set().union(*(licence.same | licence.unsure for licence in LICENCES.values()))

    assert named - LICENCES.keys() == {"epl-1.0", "eupl-1.1"}
    assert all(identifier in licence.same for identifier, licence in LICENCES.items() if licence.same)


def test_a_copy_changes_nothing():
    assert judge(["apache-2.0"], ["mit"], unchanged=True) is None
    assert judge(["cc-by-nd-4.0"], ["cc-by-nd-4.0"], unchanged=True) is None
    assert judge(["cc-by-nc-4.0"], ["mit"], unchanged=True).kind is ConflictKind.FORBIDDEN


def test_several_licences():
    assert judge(["gpl-3.0", "mit"], ["mit"]) is None, "the child took it under mit"
    assert judge(["mit"], ["mit", "cc0-1.0"]).kind is ConflictKind.NOTICE, (
        "somebody may take it under cc0-1.0"
    )
    assert judge(["gpl-3.0", "other"], ["mit"]) is None
    assert judge([], ["mit"]) is None
    assert not known([])
