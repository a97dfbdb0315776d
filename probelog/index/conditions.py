"""SQL conditions as users write them: other spellings, values in any case, and bounds for what no table holds.

What a condition means is LanceDB's matter. Here it is read as words and signs only, and what is not understood is left as it
was written.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.errors import QueryError
from probelog.index.generators.schema import GENERATOR_FACTS, GENERATOR_TABLE
from probelog.index.schema import MODEL_FACTS, MODELS
from probelog.storage.schemas import EDGES

_TOKEN = re.compile(
    r"""(?P<blank>\s+|--[^\n]*|/\*.*?\*/)
    |(?P<text>'(?:[^']|'')*')
    |(?P<name>[^\W\d]\w*|"[^"]*"|`[^`]*`)
    |(?P<number>\.?\d[\w.]*)
    |(?P<sign><=|>=|<>|!=|.)""",
    re.VERBOSE | re.DOTALL,
)
# Of the tables that users filter: the columns that they know, all columns, and a condition.
_FILTERED: Mapping[str, tuple[pa.Schema, pa.Schema, str]] = {
    "models": (
        MODEL_FACTS,
        MODELS,
        "licence = 'mit' AND downloads > 100. Times are written timestamp '2023-01-01 00:00:00'",
    ),
    "generators": (GENERATOR_FACTS, GENERATOR_TABLE, "licence = 'mit' AND conditioning = 'text'"),
    "edges": (EDGES, EDGES, "relation = 'copy' AND probability > 0.9"),
}
_SPELLINGS = {"license": "licence", "licenses": "licences"}
_EQUALS = ("=", "!=", "<>", "LIKE", "ILIKE")
_HAS = ("ARRAY_HAS", "ARRAY_CONTAINS", "LIST_HAS", "LIST_CONTAINS")
# Of an answer, not of a model: compared with numbers once the answers are ranked.
RANKED = ("score", "confidence")
_COMPARED: Mapping[str, Callable[[npt.NDArray[np.float64], float], npt.NDArray[np.bool_]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


class _Token(NamedTuple):
    kind: str
    text: str

    @property
    def word(self) -> str:
        """What it says, whatever its case and its quotes are."""
        return self.text.strip('"`').upper() if self.kind == "name" else self.text


@dataclass(frozen=True)
class Bound:
    """What an answer's ``score`` or ``confidence`` is compared with."""

    name: str
    sign: str
    value: float

    @property
    def is_least(self) -> bool:
        """Whether it excludes small values."""
        return self.sign in (">", ">=")

    def allows(self, values: npt.NDArray[np.float64] | None) -> npt.NDArray[np.bool_]:
        """Whether each of n values (n,) is within it; unknown ones (None) are not."""
        return np.asarray(False if values is None else _COMPARED[self.sign](values, self.value))


def prepared(condition: str, name: str) -> str:
    """A condition over the columns of a table that users know, as the table is asked: texts are compared without case.

    Raises:
        QueryError: it is empty, or names another column of the table.
    """
    if not condition.strip():
        raise QueryError("the filter is empty: leave it out or write an SQL condition")
    columns, table, _ = _FILTERED[name]
    tokens = [*_tokens(condition)]
    for token in tokens:
        if token.kind == "name" and token.word.lower() in {*table.names} - {*columns.names}:
            raise not_understood(name, unknown_column(token.text, columns.names), columns.names)
    texts = {name.upper() for name in columns.names if pa.types.is_string(columns.field(name).type)}
    out = [_SPELLINGS.get(token.text.lower(), token.text) for token in tokens]
    # Places of what counts, and the words there; two ends that match nothing.
    places = [place for place, token in enumerate(tokens) if token.kind != "blank"]
    words = ["", *(_SPELLINGS.get(tokens[p].word.lower(), tokens[p].word).upper() for p in places), "", ""]

    def is_column(i: int) -> bool:
        plain = words[i - 1] != "." and words[i + 1] not in (".", "[", "(")
        return plain and tokens[places[i - 1]].kind == "name" and words[i] in texts

    def is_text(i: int) -> bool:
        return i <= len(places) and tokens[places[i - 1]].kind == "text"

    def compare(column: int, values: Sequence[int]) -> None:
        out[places[column - 1]] = f"lower({words[column].lower()})"
        for value in values:
            out[places[value - 1]] = out[places[value - 1]].lower()

    for i in range(1, len(places) + 1):
        if is_column(i):
            sign = i + 1 + (words[i + 1] == "NOT")
            if words[sign] in _EQUALS and is_text(sign + 1) and words[sign + 2] != "ESCAPE":
                compare(i, [sign + 1])
            elif words[sign] == "IN" and words[sign + 1] == "(":
                values = [*_listed(words, sign + 2)]
                if values and all(map(is_text, values)):
                    compare(i, values)
        elif is_text(i) and words[i + 1] in _EQUALS[:3] and i + 2 <= len(places) and is_column(i + 2):
            compare(i + 2, [i])
        elif words[i] in _HAS and words[i + 1 : i + 4] == ["(", "LICENCES", ","] and is_text(i + 4):
            # As the Hub writes them; items of a list cannot be compared without case.
            out[places[i + 3]] = out[places[i + 3]].lower()
    return "".join(out)


def _listed(words: Sequence[str], start: int) -> Iterator[int]:
    """Places of the values of a list in brackets; none where it is no plain list."""
    places = []
    for i in range(start, len(words) - 1, 2):
        places.append(i)
        if words[i + 1] == ")":
            yield from places
            return
        if words[i + 1] != ",":
            return


def split(condition: str | None) -> tuple[str | None, list[Bound]]:
    """A condition without its comparisons of ``score`` and ``confidence``, and these.

    Raises:
        QueryError: one is not compared with a number, or is combined otherwise than by AND.
    """
    if condition is None:
        return None, []
    bounds, others = [], []
    for part in _conjuncts([*_tokens(condition)]):
        plain = [token for token in part if token.kind != "blank"]
        if any(token.word.lower() in RANKED for token in plain):
            bounds.append(_bound(plain))
        else:
            others.append("".join(token.text for token in part))
    if not bounds:
        return condition, []
    return " AND".join(others) or None, bounds


def _conjuncts(tokens: Sequence[_Token]) -> list[list[_Token]]:
    """The parts of a condition that are combined by AND; one part where OR combines it."""
    parts: list[list[_Token]] = [[]]
    depth = between = 0
    for token in tokens:
        word = token.word if token.kind in ("name", "sign") else ""
        depth += (word in ("(", "[", "CASE")) - (word in (")", "]", "END"))
        if depth == 0 and word == "OR":
            return [list(tokens)]
        if depth == 0 and word == "BETWEEN":
            between += 1
        if depth == 0 and word == "AND" and not between:
            parts.append([])
            continue
        between -= depth == 0 and word == "AND"
        parts[-1].append(token)
    return parts


def _bound(tokens: Sequence[_Token]) -> Bound:
    words = [token.word.lower() for token in tokens]
    for sign in ("-", "+"):  # of a number
        if sign in words[:-1] and tokens[place := words.index(sign)].kind == "sign":
            words[place : place + 2] = [sign + words[place + 1]]
    try:
        left, sign, right = words
        if left in RANKED:
            return Bound(left, sign, float(right)) if sign in _COMPARED else _no_bound()
        return Bound(right, _TURNED[sign], float(left)) if right in RANKED else _no_bound()
    except (ValueError, KeyError):
        return _no_bound()


def _no_bound() -> Bound:
    raise QueryError(
        "score and confidence can be compared with a number (<, <=, >, >=), and combined with the rest of the filter by AND: "
        "confidence > 0.5 AND licence = 'mit'"
    )


def _tokens(condition: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(condition):
        assert match.lastgroup is not None
        yield _Token(match.lastgroup, match.group())


def not_understood(name: str, reason: str, columns: Sequence[str]) -> QueryError:
    """The error for a condition over a table that has these of the columns that users know."""
    return QueryError(
        f"the filter is not understood: {reason}\n"
        f"It is an SQL condition over: {', '.join(columns)}. For example: {_FILTERED[name][2]}."
    )


def filtered_columns(name: str) -> list[str]:
    """The columns of a table that users know."""
    return _FILTERED[name][0].names


def check_columns(names: Sequence[str], columns: Sequence[str]) -> None:
    """Refuse names that are no columns.

    Raises:
        QueryError: there is such a name; says what it may have been meant for, and what there is.
    """
    for name in names:
        if name not in columns:
            raise QueryError(f"{unknown_column(name, columns)}\nThe columns are: {', '.join(columns)}.")


def unknown_column(name: str, columns: Sequence[str]) -> str:
    """That there is no such column, and which one may have been meant."""
    near = difflib.get_close_matches(name.lower(), columns, n=1, cutoff=0.6)
    return f"there is no column {name!r}" + (f": did you mean {near[0]}?" if near else "")
