"""What generators were made to make, and the questions that are asked about it: a truth file, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from probelog.errors import UsageError
from probelog.evaluation.accuracy import Bools

TEXT, IMAGE, SKETCH = "text", "image", "sketch"
MODALITIES = (TEXT, IMAGE, SKETCH)


@dataclass(frozen=True)
class Query:
    """One query: a concept, and the name, picture or sketch that stands for it; with a style, in that style alone."""

    modality: str
    concept: str
    file: Path | None
    text: str
    style: str | None = None


@dataclass(frozen=True)
class GeneratorTruth:
    """A truth file.

    Attributes:
        concepts: of each generator by its repository, what it makes, and
        styles: in which style, if in a certain one.
        queries: what is asked, concepts that no generator makes among them.
        absent: those concepts.
    """

    concepts: Mapping[str, frozenset[str]]
    styles: Mapping[str, str | None]
    queries: Sequence[Query]
    absent: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> GeneratorTruth:
        """Read JSON of the form ``{"generators": [{"repo": "a/b", "concepts": [name]}], "queries": [{"modality": "image",
        "concept": name, "file": path below the file's folder, "text": null}], "absent": [name]}``; generators and queries
        may have a ``style``; other keys are ignored.

        Raises:
            UsageError: it has another form, or is missing.
        """
        try:
            content = json.loads(path.read_text())
            truth = cls(
                {item["repo"]: frozenset(item["concepts"]) for item in content["generators"]},
                {item["repo"]: item.get("style") for item in content["generators"]},
                [
                    Query(
                        item["modality"],
                        item["concept"],
                        path.parent / item["file"] if item.get("file") else None,
                        item.get("text") or item["concept"],
                        item.get("style"),
                    )
                    for item in content["queries"]
                ],
                frozenset(content.get("absent", ())),
            )
        except OSError as error:
            raise UsageError(f"the truth file cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a truth file of generators: {error!r}") from error
        if not truth.queries:
            raise UsageError(f"{path} asks nothing: its queries are empty")
        for query in truth.queries:
            if query.modality not in MODALITIES:
                raise UsageError(
                    f"{path}: a modality is one of {', '.join(MODALITIES)}, not {query.modality!r}"
                )
            if query.modality != TEXT and (query.file is None or not query.file.is_file()):
                raise UsageError(f"{path}: there is no file {query.file} to ask for {query.concept!r} with")
        return truth

    @cached_property
    def by_modality(self) -> dict[str, list[Query]]:
        """The queries of each modality that any is of."""
        by_modality = {
            modality: [query for query in self.queries if query.modality == modality]
            for modality in MODALITIES
        }
        return {modality: queries for modality, queries in by_modality.items() if queries}

    def relevant(self, queries: Sequence[Query], repos: Sequence[str]) -> Bools:
        """(Q, M): which generators make what a query asks for."""
        return np.array([[self._makes(repo, query) for repo in repos] for query in queries], bool)

    def _makes(self, repo: str, query: Query) -> bool:
        return query.concept in self.concepts[repo] and query.style in (None, self.styles[repo])
