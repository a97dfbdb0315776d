"""What generators were made to make, and the questions that are asked about it: a truth file, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probelog.errors import UsageError
from probelog.evaluation.accuracy import Bools

TEXT, IMAGE, SKETCH = "text", "image", "sketch"
MODALITIES = (TEXT, IMAGE, SKETCH)


@dataclass(frozen=True)
class Asked:
    """One query: a concept, and the name, picture or sketch that stands for it."""

    modality: str
    concept: str
    file: Path | None
    text: str


@dataclass(frozen=True)
class GeneratorTruth:
    """A truth file.

    Attributes:
        concepts: of each generator by its repository, what it makes.
        queries: what is asked, concepts that no generator makes among them.
        absent: those concepts.
    """

    concepts: Mapping[str, frozenset[str]]
    queries: Sequence[Asked]
    absent: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> GeneratorTruth:
        """Read JSON of the form ``{"generators": [{"repo": "a/b", "concepts": [name]}], "queries": [{"modality": "image",
        "concept": name, "file": path below the file's folder, "text": null}], "absent": [name]}``; other keys are ignored.

        Raises:
            UsageError: it has another form, or is missing.
        """
        try:
            content = json.loads(path.read_text())
            truth = cls(
                {item["repo"]: frozenset(item["concepts"]) for item in content["generators"]},
                [
                    Asked(
                        item["modality"],
                        item["concept"],
                        path.parent / item["file"] if item.get("file") else None,
                        item.get("text") or item["concept"],
                    )
                    for item in content["queries"]
                ],
                frozenset(content.get("absent", ())),
            )
        except OSError as error:
            raise UsageError(f"the truth file cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a truth file of generators: {error!r}") from error
        for query in truth.queries:
            if query.modality not in MODALITIES:
                raise UsageError(
                    f"{path}: a modality is one of {', '.join(MODALITIES)}, not {query.modality!r}"
                )
            if query.modality != TEXT and (query.file is None or not query.file.is_file()):
                raise UsageError(f"{path}: there is no file {query.file} to ask for {query.concept!r} with")
        return truth

    def relevant(self, queries: Sequence[Asked], repos: Sequence[str]) -> Bools:
        """(Q, M): which generators make what a query asks for."""
        return np.array([[query.concept in self.concepts[repo] for repo in repos] for query in queries], bool)
