"""What a hub is asked and which of its logits are right, from a truth file or from declared labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.labels.labels import Lexicon, names_in
from probelog.errors import UsageError
from probelog.evaluation.accuracy import half_of
from probelog.storage.encoding import short_key

Bools = npt.NDArray[np.bool_]

SINGLE, SUPER, ALL = "single", "super", "all"
# Scores are a dense matrix of concepts and logits: of more declared names than these a sample is asked.
MAX_CONCEPTS = 1000


class LogitName(NamedTuple):
    """One logit of a gallery: its model, its place in the head, whether it is the negated one, its declared label."""

    repo: str
    logit: int
    negated: bool
    label: str


@dataclass(frozen=True)
class Questions:
    """C concepts and their relevance to N logits.

    Attributes:
        names: what is asked.
        synonyms: for each concept, the names that are left out of the background (its own among them).
        single: (C,) True for a single class, False for a superclass.
        relevant: (C, N).
        classes: the class number of each single class; None for superclasses and where there is no truth file.
    """

    names: list[str]
    synonyms: list[list[str]]
    single: Bools
    relevant: Bools
    classes: list[int | None]

    @cached_property
    def key(self) -> str:
        """Identity of the questions and their answers."""
        digest = hashlib.sha256(np.packbits(self.relevant).tobytes()).hexdigest()
        return short_key(self.names, self.synonyms, self.single.tolist(), digest, *self.relevant.shape)

    @cached_property
    def answerable(self) -> npt.NDArray[np.int64]:
        """Numbers of the concepts that at least one logit recognises."""
        return np.flatnonzero(self.relevant.any(axis=1))

    @cached_property
    def nameable(self) -> npt.NDArray[np.int64]:
        """Numbers of the logits that recognise at least one of the concepts."""
        return np.flatnonzero(self.relevant.any(axis=0))

    @cached_property
    def parts(self) -> npt.NDArray[np.str_]:
        """(C,) ``single`` or ``super``."""
        return np.where(self.single, SINGLE, SUPER)

    @cached_property
    def halves(self) -> npt.NDArray[np.str_]:
        """(C,) ``development`` or ``test``."""
        return np.array([half_of(name) for name in self.names])


def from_truth(truth: Truth, logits: Sequence[LogitName]) -> Questions:
    """The questions of a truth file.

    Raises:
        UsageError: none of its concepts is recognised by any of the logits.
    """
    names = list(truth.concepts)
    classes: list[set[int]] = [
        set() if item.negated else truth.logits[item.repo][item.logit] for item in logits
    ]
    sizes = [len(truth.concepts[name]) for name in names]
    questions = Questions(
        names=names,
        synonyms=[truth.names_of(name) for name in names],
        single=np.array([size == 1 for size in sizes]),
        relevant=np.array([[truth.relevant(name, class_set) for class_set in classes] for name in names]),
        classes=[
            next(iter(truth.concepts[name])) if size == 1 else None
            for name, size in zip(names, sizes, strict=True)
        ],
    )
    if not questions.relevant.any():
        raise UsageError("the truth file names no concept that a model of the index recognises")
    return questions


def from_labels(logits: Sequence[LogitName], lexicon: Lexicon) -> Questions:
    """The names that uploaders declared, asked of the logits that carry them or a name above or below.

    A name with others below it is a superclass. At most ``MAX_CONCEPTS`` are asked, those with the smallest hashes.

    Raises:
        UsageError: no label is the name of a concept.
    """
    # The first name of a label asks; its further ones are synonyms.
    concepts: dict[str, list[str]] = {}
    for item in logits:
        if not item.negated and (names := names_in(item.label)):
            known = concepts.setdefault(names[0], [])
            known += [name for name in names if name not in known]
    if not concepts:
        raise UsageError(
            "no model of the index declares a label that names a concept: give a truth file (--truth)"
        )
    if len(concepts) > MAX_CONCEPTS:
        chosen = sorted(concepts, key=lambda name: hashlib.sha256(name.encode()).digest())[:MAX_CONCEPTS]
        concepts = {name: concepts[name] for name in sorted(chosen)}
    names = list(concepts)
    meanings = [lexicon.meaning(concepts[name]) for name in names]
    above = frozenset[str]().union(*(meaning.wider for meaning in meanings))
    return Questions(
        names=names,
        synonyms=[concepts[name] for name in names],
        single=np.array([above.isdisjoint(meaning.same) for meaning in meanings]),
        relevant=label_relevance(list(concepts.values()), logits, lexicon),
        classes=[None] * len(names),
    )


def label_relevance(
    concepts: Sequence[Sequence[str]], logits: Sequence[LogitName], lexicon: Lexicon
) -> Bools:
    """Relevance (C, N) by declared labels, for concepts given as normalised synonyms."""
    asked = [lexicon.meaning(names) for names in concepts]
    columns: dict[str, Bools] = {}
    relevant = np.zeros((len(asked), len(logits)), bool)
    for number, item in enumerate(logits):
        if item.negated:
            continue
        if item.label not in columns:
            declared = lexicon.meaning(names_in(item.label))
            columns[item.label] = np.array([declared.matches(concept) for concept in asked], bool)
        relevant[:, number] = columns[item.label]
    return relevant


class Agreement(NamedTuple):
    """How well declared labels stand in for the truth, in pairs of a concept and a logit.

    Attributes:
        part: which concepts.
        declared: pairs that the labels call relevant.
        true: pairs that the truth file calls relevant.
        both: pairs that both do.
    """

    part: str
    declared: int
    true: int
    both: int


def agreement(truth: Questions, logits: Sequence[LogitName], lexicon: Lexicon) -> list[Agreement]:
    """Declared labels against a truth file's questions, for single classes, superclasses and all of them."""
    concepts = [
        list(dict.fromkeys(normal for name in names for normal in names_in(name))) for names in truth.synonyms
    ]
    declared = label_relevance(concepts, logits, lexicon)
    parts = {SINGLE: truth.single, SUPER: ~truth.single, ALL: np.ones_like(truth.single)}
    return [
        Agreement(
            part,
            int(declared[rows].sum()),
            int(truth.relevant[rows].sum()),
            int((declared & truth.relevant)[rows].sum()),
        )
        for part, rows in parts.items()
    ]


# Models that answer everything or repeat another's answer say nothing about the search.
LEFT_OUT_KINDS = ("foundation", "copy")


@dataclass(frozen=True)
class Truth:
    """A truth file: what each logit of each model recognises, as sets of class numbers.

    ``concepts`` maps a query's name to its classes (one: a single class; several: a superclass). A logit is
    relevant to a single class if its set contains it, to a superclass if its set lies within it.
    """

    synonyms: list[list[str]]
    concepts: dict[str, set[int]]
    logits: dict[str, list[set[int]]]
    kinds: dict[str, str]

    @classmethod
    def read(cls, file: Path) -> Truth:
        """Read a JSON truth file.

        Raises:
            UsageError: missing, or not of this form.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            truth = cls(
                synonyms=[list(names) for names in content["classes"]],
                concepts={name: set(classes) for name, classes in content["concepts"].items()},
                logits={
                    repo: [set(classes) for classes in model["logits"]]
                    for repo, model in content["models"].items()
                },
                kinds={repo: str(model.get("kind", "")) for repo, model in content["models"].items()},
            )
            truth._check()
            return truth
        except OSError as error:
            raise UsageError(f"{file}: the truth file cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{file} is not a truth file ({error!r}); it needs classes (lists of synonyms), concepts "
                "(name: class numbers) and models (repository: logits, a list of class numbers each)"
            ) from None

    def _check(self) -> None:
        if not self.concepts:
            raise ValueError("it names no concept")
        known = range(len(self.synonyms))
        for name, classes in self.concepts.items():
            if not classes or not all(isinstance(number, int) and number in known for number in classes):
                raise ValueError(f"the concept {name!r} covers no class, or one that is not listed")

    def names_of(self, concept: str) -> list[str]:
        """A concept's name and, for a single class, its synonyms."""
        classes = self.concepts[concept]
        more = self.synonyms[next(iter(classes))] if len(classes) == 1 else []
        return [concept, *more]

    def relevant(self, concept: str, classes: set[int]) -> bool:
        """Whether a logit of these classes is an answer to a concept."""
        class_numbers = self.concepts[concept]
        return (
            class_numbers <= classes
            if len(class_numbers) == 1
            else bool(classes) and classes <= class_numbers
        )

    def answers(self, concept: str, repo: str, logit: int) -> bool:
        """Whether one logit of one model is an answer to a concept; False for what the file does not speak of."""
        logits = self.logits.get(repo, [])
        return concept in self.concepts and logit < len(logits) and self.relevant(concept, logits[logit])
