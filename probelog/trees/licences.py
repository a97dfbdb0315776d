"""Whether a model may be under its licence, given that of the model it was made from.

The table has common licences by the Hub's identifiers (its documentation, "Licenses"; they follow SPDX). What each asks
for is what choosealicense.com lists as its conditions (``include-copyright``, ``document-changes``, ``same-license``);
Creative Commons of other versions, the RAIL family, Llama's and Gemma's are from the licences' own texts. What is not
in the table, and pairs of which identifiers alone cannot tell, are unknown: no conflict is guessed. This is no legal advice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class ConflictKind(StrEnum):
    """What is wrong with an edge between two models."""

    FORBIDDEN = "forbidden"
    CONDITIONS = "conditions"
    NOTICE = "notice"
    CONTRADICTED = "contradicted"
    UNDECLARED = "undeclared"


@dataclass(frozen=True, slots=True)
class Licence:
    """What a licence allows, and what it asks of who shares an adapted version.

    Attributes:
        commercial: whether commercial use is allowed.
        adapted: whether adapted versions may be shared.
        notice: whether its text and the copyright notices must be passed on.
        changes: whether it must be stated that something was changed.
        restricted: whether it restricts uses, and these restrictions must be passed on.
        same: the licences that an adapted version may be under, by identifier; empty: any whose terms fit.
        unsure: those of which the identifier does not tell, such as "or any later version".
    """

    commercial: bool = True
    adapted: bool = True
    notice: bool = True
    changes: bool = False
    restricted: bool = False
    same: frozenset[str] = frozenset()
    unsure: frozenset[str] = frozenset()


def _share_alike(same: str, unsure: str = "", *, commercial: bool = True, changes: bool = True) -> Licence:
    return Licence(
        commercial=commercial,
        changes=changes,
        same=frozenset(same.split()),
        unsure=frozenset(unsure.split()),
    )


_DEDICATED = Licence(notice=False)
_PERMISSIVE = Licence()
_STATED = Licence(changes=True)
_NON_COMMERCIAL = Licence(commercial=False, changes=True)
_RESTRICTED = Licence(changes=True, restricted=True)
_GNU = "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 agpl-3.0"
# The European Union Public Licence lists them in its appendix.
_EUPL = "gpl gpl-2.0 gpl-3.0 agpl-3.0 osl-3.0 epl-1.0 mpl-2.0 lgpl lgpl-2.1 lgpl-3.0 cc-by-sa-3.0 eupl-1.1"

LICENCES: dict[str, Licence] = {
    **dict.fromkeys(["cc0-1.0", "unlicense", "wtfpl", "pddl"], _DEDICATED),
    **dict.fromkeys(["mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear"], _PERMISSIVE),
    **dict.fromkeys(["isc", "ncsa", "postgresql", "ms-pl", "cc-by-2.0", "cc-by-2.5"], _PERMISSIVE),
    **dict.fromkeys(["apache-2.0", "afl-3.0", "ecl-2.0", "cc-by-3.0", "cc-by-4.0"], _STATED),
    **dict.fromkeys(["cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"], _NON_COMMERCIAL),
    "cc-by-nd-4.0": Licence(adapted=False, changes=True),
    **dict.fromkeys(
        ["cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"], Licence(commercial=False, adapted=False, changes=True)
    ),
    "cc-by-sa-3.0": _share_alike("cc-by-sa-3.0 cc-by-sa-4.0"),
    "cc-by-sa-4.0": _share_alike("cc-by-sa-4.0 gpl-3.0", "gpl"),
    "cc-by-nc-sa-2.0": _share_alike("cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0", commercial=False),
    "cc-by-nc-sa-3.0": _share_alike("cc-by-nc-sa-3.0 cc-by-nc-sa-4.0", commercial=False),
    "cc-by-nc-sa-4.0": _share_alike("cc-by-nc-sa-4.0", commercial=False),
    "gpl": _share_alike("gpl gpl-2.0 gpl-3.0", "agpl-3.0"),
    "gpl-2.0": _share_alike("gpl-2.0", "gpl gpl-3.0 agpl-3.0"),
    "gpl-3.0": _share_alike("gpl-3.0", "gpl agpl-3.0"),
    "agpl-3.0": _share_alike("agpl-3.0", "gpl gpl-3.0"),
    "lgpl": _share_alike("lgpl lgpl-2.1 lgpl-3.0 gpl gpl-3.0", "gpl-2.0 agpl-3.0"),
    "lgpl-2.1": _share_alike("lgpl-2.1 gpl gpl-2.0 gpl-3.0", "lgpl lgpl-3.0 agpl-3.0"),
    "lgpl-3.0": _share_alike("lgpl-3.0 gpl-3.0", "lgpl gpl agpl-3.0"),
    "mpl-2.0": _share_alike("mpl-2.0", _GNU, changes=False),
    "epl-2.0": _share_alike("epl-2.0", _GNU, changes=False),
    "eupl-1.2": _share_alike("eupl-1.2", _EUPL),
    "osl-3.0": _share_alike("osl-3.0"),
    **dict.fromkeys(
        [
            *("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m"),
            *("bigcode-openrail-m", "bigscience-bloom-rail-1.0"),
            *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma"),
        ],
        _RESTRICTED,
    ),
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is wrong between two licences, and why; ``parent`` and ``child`` are those that the reason is about."""

    kind: ConflictKind
    parent: str
    child: str
    reason: str


def known(licences: Sequence[str]) -> bool:
    """Whether all of some declared licences are in the table, and there is one."""
    return bool(licences) and all(licence in LICENCES for licence in licences)


def judge(parent: Sequence[str], child: Sequence[str], *, unchanged: bool = False) -> Judgement | None:
    """What is wrong with the licences of a child, given those of its parent; None where nothing is, or it is unknown.

    Who takes a model under several licences may choose one: of the parent's, one that fits is enough; of the child's,
    all must fit, because somebody else will choose.

    Args:
        parent: the declared licences of the parent.
        child: those of the child.
        unchanged: whether the child is a copy, or the same numbers in another type.
    """
    if not known(parent) or not known(child):
        return None
    for one in child:
        judgements = [_judge(other, one, unchanged) for other in parent]
        if all(judgement is not None for judgement in judgements):
            return judgements[0]
    return None


def _judge(parent: str, child: str, unchanged: bool) -> Judgement | None:
    one, other = LICENCES[parent], LICENCES[child]
    if parent == child:
        if one.adapted or unchanged:
            return None
        return Judgement(
            ConflictKind.FORBIDDEN, parent, child, f"{parent} does not allow that adapted versions are shared"
        )
    if child in one.unsure:
        return None
    kind, reason = _violation(parent, one, child, other, unchanged)
    return None if kind is None else Judgement(kind, parent, child, reason)


def _violation(
    parent: str, one: Licence, child: str, other: Licence, unchanged: bool
) -> tuple[ConflictKind | None, str]:
    if not one.adapted and not unchanged:
        return ConflictKind.FORBIDDEN, f"{parent} does not allow that adapted versions are shared"
    if not one.commercial and other.commercial:
        return ConflictKind.FORBIDDEN, f"{parent} forbids commercial use, which {child} allows"
    if one.same and child not in one.same:
        allowed = " or ".join(sorted(one.same))
        return ConflictKind.CONDITIONS, f"{parent} asks that what is made from it is under {allowed}"
    if one.restricted and not other.restricted:
        return ConflictKind.CONDITIONS, (
            f"{parent} restricts uses and asks that these restrictions are passed on; {child} has none"
        )
    dropped = [
        *(["the licence's text and the copyright notices are kept"] if one.notice > other.notice else []),
        *(["changes are stated"] if one.changes > other.changes and not unchanged else []),
    ]
    if dropped:
        return ConflictKind.NOTICE, (
            f"{parent} allows other terms for what is made from it if {' and '.join(dropped)}; "
            f"{child} does not ask for that, so the repository itself must"
        )
    return None, ""
