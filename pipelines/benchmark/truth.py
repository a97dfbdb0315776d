"""Truth files: what every logit of a hub really recognises."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from probelog.errors import UsageError

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
        wanted = self.concepts[concept]
        return wanted <= classes if len(wanted) == 1 else bool(classes) and classes <= wanted

    def answers(self, concept: str, repo: str, logit: int) -> bool:
        """Whether one logit of one model is an answer to a concept; False for what the file does not speak of."""
        logits = self.logits.get(repo, [])
        return concept in self.concepts and logit < len(logits) and self.relevant(concept, logits[logit])
