"""Declared labels as noisy truth: which names mean the same, which contain each other, and which are none.

The rule of the paper's Hub set: other spellings match; a sub-class and its super-class match in both directions;
siblings do not. Spellings and plurals are found by simple rules, synonyms in the names of ImageNet-21k's classes
(WordNet's lemmas, which timm carries), sub-classes by the head noun ("egyptian cat" is a "cat") and in a file of
the operator's own. All of it errs: "hot dog" is no dog. What it costs is measured where the truth is known.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from probelog.errors import UsageError
from probelog.ranking.names import canonical_name, is_placeholder, without_prefix

_MAX_WORDS = 6
# Words that name no concept by themselves.
_EMPTY_WORDS = {
    "background", "class", "false", "label", "misc", "negative", "neither", "no", "none", "normal", "other",
    "others", "positive", "true", "unknown", "yes",
}  # fmt: skip


def names_in(label: str) -> list[str]:
    """The normalised names that a declared label holds, first one first; none where it names nothing.

    Commas separate synonyms ("tench, Tinca tinca"), as in ImageNet's labels.
    """
    if any(unicodedata.category(letter).startswith("C") for letter in label):
        return []
    names = (canonical_name(part) for part in without_prefix(label).split(","))
    return list(dict.fromkeys(name for name in names if _is_name(name)))


def _is_name(name: str) -> bool:
    words = name.split()
    return (
        0 < len(words) <= _MAX_WORDS
        and any(letter.isalpha() for letter in name)
        and not is_placeholder(name)
        and not all(word in _EMPTY_WORDS or word.isdigit() for word in words)
    )


@dataclass(frozen=True)
class Meaning:
    """What a set of synonymous names stands for: keys of the same meaning, and keys of wider ones."""

    same: frozenset[str]
    wider: frozenset[str]

    def matches(self, other: Meaning) -> bool:
        """Whether the two are the same, or one is a sub-class of the other."""
        return not (
            self.same.isdisjoint(other.same)
            and self.same.isdisjoint(other.wider)
            and self.wider.isdisjoint(other.same)
        )


class Lexicon:
    """Knows synonyms and super-classes of normalised names.

    Args:
        parents: for each normalised name, those directly above it.
        synonyms: groups of names of one meaning each, in any spelling.
    """

    def __init__(
        self, parents: Mapping[str, Iterable[str]] | None = None, synonyms: Iterable[Sequence[str]] = ()
    ) -> None:
        self._parents = {child: frozenset(above) for child, above in (parents or {}).items()}
        self._groups: dict[str, list[str]] = {}
        for number, group in enumerate(synonyms):
            for name in group:
                self._groups.setdefault(canonical_name(name), []).append(f"synonyms {number}")

    def meaning(self, names: Sequence[str]) -> Meaning:
        """The meaning of normalised synonyms, as ``names_in`` gives them."""
        same = set(names)
        for name in names:
            same.update(self._groups.get(name, ()))
        wider: set[str] = set()
        todo = list(names)
        while todo:
            for above in self._above(todo.pop()):
                if above not in wider and above not in names:
                    wider.add(above)
                    todo.append(above)
        return Meaning(frozenset(same), frozenset(wider))

    def _above(self, name: str) -> set[str]:
        """The names directly above one: as the file says, and by the head noun."""
        words = name.split()
        head = words[: words.index("of")] if "of" in words[1:] else words[1:]
        return {*self._parents.get(name, ()), *([" ".join(head)] if head else [])}


def imagenet_synonyms() -> list[list[str]]:
    """The synonyms of ImageNet-21k's classes."""
    from timm.data import ImageNetInfo

    return [text.split(",") for text in ImageNetInfo("imagenet-22k").label_descriptions()]


@lru_cache(maxsize=1)
def imagenet_lexicon() -> Lexicon:
    """The lexicon of these synonyms."""
    return Lexicon(synonyms=imagenet_synonyms())


def read_hierarchy(file: Path) -> dict[str, set[str]]:
    """Read lines of ``child<TAB>parent``; blank lines and ``#`` comments are left out.

    Raises:
        UsageError: the file cannot be read, or a line has another form.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: the hierarchy cannot be read ({error})") from None
    parents: dict[str, set[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        child, mark, parent = line.partition("\t")
        below, above = names_in(child), names_in(parent)
        if not mark or not below or not above:
            raise UsageError(f"{file}, line {number}: write child<TAB>parent, both names of concepts")
        for name in below:
            parents.setdefault(name, set()).update(above)
    if not parents:
        raise UsageError(f"{file}: the hierarchy is empty")
    return parents
