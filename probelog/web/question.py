"""A search as its address says it: what is asked, and which models may answer. Every part is bounded and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from urllib.parse import urlencode

from probelog.errors import QueryError
from probelog.index.tables import is_valid_sql_text, sql_literal

# Of one search. Addresses longer than 16 KiB are refused by the server.
_MOST_NAMES = 20
_LONGEST_NAME = 200
_MOST_PICTURES = 5
_MOST_VALUES = 20
MOST_ANSWERS = 200
ANSWERS = 20

# Buckets of a facet of numbers: name, title, least and upper bound.
SIZES = (
    ("0-5m", "under 5 million", 0, 5_000_000),
    ("5m-25m", "5 to 25 million", 5_000_000, 25_000_000),
    ("25m-100m", "25 to 100 million", 25_000_000, 100_000_000),
    ("100m-1b", "100 million to 1 billion", 100_000_000, 1_000_000_000),
    ("1b-", "1 billion and more", 1_000_000_000, 1 << 62),
)
DOWNLOADS = (
    ("10", "10 and more", 10, 1 << 62),
    ("100", "100 and more", 100, 1 << 62),
    ("1000", "1,000 and more", 1_000, 1 << 62),
    ("10000", "10,000 and more", 10_000, 1 << 62),
    ("100000", "100,000 and more", 100_000, 1 << 62),
)
CLASSIFIER, GENERATOR = "classifier", "generator"
KINDS = (CLASSIFIER, GENERATOR)
# Facets of a kind by their columns. Values of the same facet are alternatives; facets are all met.
TEXT_FACETS = {
    CLASSIFIER: ("licence", "library", "architecture", "head", "root"),
    GENERATOR: ("licence", "pipeline", "architecture", "conditioning", "base_repo", "root"),
}
FACETS = {kind: (*names, "size", "downloads", "created") for kind, names in TEXT_FACETS.items()}
UNKNOWN = "unknown"
ORDERS = ("score", "confidence")
# What answers of a kind are folded by: the first is what each is by itself.
FOLDS = {CLASSIFIER: ("logit", "model", "family"), GENERATOR: ("model", "family")}


@dataclass(frozen=True)
class Question:
    """One search.

    Attributes:
        texts: names of one concept.
        negative: what must not be recognised.
        like: a logit of the index, ``REPO#NUMBER``, or a generator, ``REPO``, or for generators a classifier, ``REPO``.
        pictures: embedded ones (``probelog.web.pictures``).
        sketches: likewise, of generators alone.
        kind: of the models that answer.
        k: number of answers.
        by: what answers are folded by; by default nothing.
        sort: what orders the answers.
        min_confidence: answers have at least this confidence.
        filters: values of facets, by name.
    """

    texts: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    like: str | None = None
    pictures: tuple[str, ...] = ()
    sketches: tuple[str, ...] = ()
    kind: str = CLASSIFIER
    k: int = ANSWERS
    by: str | None = None
    sort: str = "score"
    min_confidence: float | None = None
    filters: tuple[tuple[str, str], ...] = field(default=())

    @classmethod
    def from_query(cls, query: Iterable[tuple[str, str]], strict: bool = False) -> Question:
        """Read an address's query.

        Args:
            query: names and values.
            strict: whether a name that is unknown, or of the other kind of models, is an error; it is left out otherwise.

        Raises:
            QueryError: a value is none that can be asked for; names it.
        """
        values: dict[str, list[str]] = {}
        for name, value in query:
            if not is_valid_sql_text(value):
                raise QueryError(f"{name} holds a character that no text has")
            values.setdefault(name, []).append(value)
        kind = _choice(values, "kind", KINDS)
        known = PARAMETERS[kind]
        unknown = values.keys() - known
        if strict and unknown:
            raise QueryError(
                f"a search for {kind}s has no parameter {min(unknown)!r}; there are {', '.join(known)}"
            )
        values = {name: values[name] for name in values.keys() & known}
        return cls(
            texts=_names(values, "q"),
            negative=_names(values, "not"),
            like=_only(values, "like"),
            pictures=_several(values, "picture", _MOST_PICTURES),
            sketches=_several(values, "sketch", _MOST_PICTURES),
            kind=kind,
            k=_count(values, "k", ANSWERS, MOST_ANSWERS),
            by=_by(values, kind),
            sort=_choice(values, "sort", ORDERS),
            min_confidence=_share(values, "min_confidence"),
            filters=tuple(
                (name, value) for name in FACETS[kind] for value in _several(values, name, _MOST_VALUES)
            ),
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        return not (self.texts or self.pictures or self.sketches or self.like)

    @property
    def whole_model(self) -> str | None:
        """The repository whose like is looked for among classifiers, where nothing else is asked."""
        whole = self.like is not None and "#" not in self.like and self.kind == CLASSIFIER
        return (
            self.like
            if whole and not (self.texts or self.negative or self.pictures or self.filters)
            else None
        )

    @property
    def text(self) -> str:
        """The names as they are typed."""
        return ", ".join(self.texts)

    @property
    def negative_text(self) -> str:
        """Likewise what must not be recognised."""
        return ", ".join(self.negative)

    @property
    def where(self) -> str | None:
        """The filters as an SQL condition over the models."""
        return where(self.filters)

    def having(self, name: str) -> list[str]:
        """The values of one filter."""
        return [value for facet, value in self.filters if facet == name]

    def changed(self, **changes: object) -> Question:
        """Another search, with some parts changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def toggled(self, name: str, value: str) -> Question:
        """The search with one filter more, or without it where it has it. Of downloads there is one at most."""
        pair = (name, value)
        if pair in self.filters:
            kept = tuple(item for item in self.filters if item != pair)
        else:
            others = [item for item in self.filters if name != "downloads" or item[0] != name]
            order = FACETS[self.kind]
            kept = tuple(sorted([*others, pair], key=lambda item: (order.index(item[0]), item[1])))
        return replace(self, filters=kept, k=ANSWERS)

    def pairs(self) -> list[tuple[str, str]]:
        """Names and values of its address, in one order, without what is as by default."""
        pairs = [("kind", self.kind)] if self.kind != CLASSIFIER else []
        pairs += [("q", self.text)] if self.texts else []
        pairs += [("not", self.negative_text)] if self.negative else []
        pairs += [("like", self.like)] if self.like else []
        pairs += [("picture", picture) for picture in self.pictures]
        pairs += [("sketch", sketch) for sketch in self.sketches]
        pairs += [*self.filters]
        defaults = {item.name: item.default for item in fields(Question)}
        for name in ("by", "sort", "min_confidence", "k"):
            value = getattr(self, name)
            if value != defaults[name]:
                pairs.append((name, f"{value:g}" if isinstance(value, float) else str(value)))
        return pairs

    @property
    def query(self) -> str:
        """The query of its address."""
        return urlencode(self.pairs())


_COMMON = ("kind", "q", "not", "like", "picture", "k", "by", "sort", "min_confidence", "format")
PARAMETERS = {
    kind: (*_COMMON, *own, *FACETS[kind]) for kind, own in ((CLASSIFIER, ()), (GENERATOR, ("sketch",)))
}
_EVERY_TEXT_FACET = frozenset(name for names in TEXT_FACETS.values() for name in names)


def where(filters: Sequence[tuple[str, str]]) -> str | None:
    """Filters as an SQL condition.

    Raises:
        QueryError: a value is none of its facet.
    """
    by_name: dict[str, list[str]] = {}
    for name, value in filters:
        by_name.setdefault(name, []).append(_condition(name, value))
    return " AND ".join(f"({' OR '.join(conditions)})" for conditions in by_name.values()) or None


def _condition(name: str, value: str) -> str:
    if name in _EVERY_TEXT_FACET:
        return f"{name} IS NULL" if value == UNKNOWN else f"{name} = {sql_literal(value)}"
    if name == "created":
        if value == UNKNOWN:
            return "created_at IS NULL"
        year = _year(value)
        return (
            f"(created_at >= timestamp '{year:04}-01-01 00:00:00' AND "
            f"created_at < timestamp '{year + 1:04}-01-01 00:00:00')"
        )
    column, buckets = ("parameters", SIZES) if name == "size" else ("downloads", DOWNLOADS)
    if value == UNKNOWN:
        return f"{column} IS NULL"
    for key, _, least, bound in buckets:
        if key == value:
            return f"({column} >= {least} AND {column} < {bound})"
    known = ", ".join(key for key, *_ in buckets)
    raise QueryError(f"{name}={value!r} is none of {known}, {UNKNOWN}")


def _year(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) == 4 and 1 <= int(value) < 9999):
        raise QueryError(f"created={value!r} is no year, such as 2025, and not {UNKNOWN}")
    return int(value)


def _names(values: dict[str, list[str]], name: str) -> tuple[str, ...]:
    """Names, several separated by commas."""
    parts = [part.strip() for value in values.get(name, ()) for part in value.split(",")]
    names = tuple(dict.fromkeys(part for part in parts if part))
    if len(names) > _MOST_NAMES or any(len(part) > _LONGEST_NAME for part in names):
        raise QueryError(f"{name} has at most {_MOST_NAMES} names of {_LONGEST_NAME} characters each")
    return names


def _several(values: dict[str, list[str]], name: str, most: int) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(value for value in values.get(name, ()) if value))
    if len(found) > most:
        raise QueryError(f"{name} may be given {most} times")
    if name not in ("picture", "sketch") and any(len(value) > _LONGEST_NAME for value in found):
        raise QueryError(f"{name} has at most {_LONGEST_NAME} characters")
    return found


def _only(values: dict[str, list[str]], name: str) -> str | None:
    given = [value for value in values.get(name, ()) if value]
    if len(given) > 1 or any(len(value) > 2 * _LONGEST_NAME for value in given):
        raise QueryError(f"{name} may be given once, with at most {2 * _LONGEST_NAME} characters")
    return given[0] if given else None


def _choice(values: dict[str, list[str]], name: str, known: Sequence[str]) -> str:
    value = _only(values, name) or known[0]
    if value not in known:
        raise QueryError(f"{name}={value!r} is none of {', '.join(known)}")
    return value


def _by(values: dict[str, list[str]], kind: str) -> str | None:
    value = _choice(values, "by", FOLDS[kind])
    return None if value == FOLDS[kind][0] else value


def _count(values: dict[str, list[str]], name: str, default: int, most: int) -> int:
    value = _only(values, name) or str(default)
    if not (value.isascii() and value.isdigit() and len(value) < 10 and 1 <= int(value) <= most):
        raise QueryError(f"{name}={value!r} is no number from 1 to {most}")
    return int(value)


def _share(values: dict[str, list[str]], name: str) -> float | None:
    value = _only(values, name)
    if value is None:
        return None
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise QueryError(f"{name}={value!r} is no number from 0 to 1")
    return share
