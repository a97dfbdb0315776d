"""A published index with the observations that it was made of: what the methods are run on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.benchmark.questions import LogitName
from probelog.completion import scoring
from probelog.errors import StoreError, UsageError
from probelog.evaluation.gallery import Concepts, Gallery
from probelog.index.generation import Generation
from probelog.index.pointer import find_index, read_pointer
from probelog.probes.probe_set import COMMON, subset
from probelog.ranking.matched_heads import Observed
from probelog.search.query import numbers_named, text_vectors
from probelog.storage.encoding import short_key
from probelog.storage.layout import LedgerFolder
from probelog.storage.ledger import Ledger, observed_models
from probelog.storage.schemas import Head, ProbedModel
from probelog.storage.store import Store

# Why a model is left out, or None; asked for the index's models in order.
Verdict = Callable[[ProbedModel], str | None]


@dataclass(frozen=True)
class ProbedHub:
    """One hub on one probe set.

    Attributes:
        name: what tables call the probe set.
        store: where index and observations lie.
        generation: the published index; its encoder and background are used.
        models: facts of the models that take part, in order.
        observed: their observations. Constant logits are left out; a one-logit head has a second, negated row.
        logits: (N,) the logits that ``observed`` holds, in order.
        left_out: how many models do not take part, by reason.
    """

    name: str
    store: Store
    generation: Generation
    models: list[ProbedModel]
    observed: list[Observed]
    logits: list[LogitName]
    left_out: dict[str, int]
    _vectors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(cls, uri: str, verdict: Verdict) -> ProbedHub:
        """Read the observations behind an index, all of them into memory (4 bytes a logit and probe).

        Raises:
            UsageError: the index has no store around it that holds its observations, or no model takes part.
        """
        index = find_index(uri)
        generation = Generation(index, read_pointer(index)[0])
        key = generation.settings.observations
        parent, _, folder = index.uri.rpartition("/")
        store = Store(parent) if folder == "index" and parent else index
        receipts = Ledger(store, LedgerFolder.of(key).path).receipts()
        if not receipts:
            raise UsageError(
                f"{index.uri}: the observations of this index ({key}) are not in {store.uri}; the benchmark needs "
                "the store that it was published from"
            )
        listed = generation.models_table(["repo", "sha"])
        published = set(zip(listed["repo"].to_pylist(), listed["sha"].to_pylist(), strict=True))
        indexed = {
            (model.repo, model.sha): (model, _rows(model, numbers, values))
            for receipt in receipts
            for model, numbers, values in observed_models(store, receipt)
            if (model.repo, model.sha) in published
        }
        if missing := published - indexed.keys():
            raise StoreError(
                f"{store.uri}: observations of {len(missing)} published models are missing, {min(missing)[0]} for one"
            )
        models, observed, logits, left_out = [], [], [], Counter[str]()
        for place in sorted(indexed):
            model, (rows, names) = indexed[place]
            reason = verdict(model) if names else "all its logits are constant"
            if reason is not None:
                left_out[reason] += 1
                continue
            models.append(model)
            observed.append(rows)
            logits += names
        if not models:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            raise UsageError(f"{index.uri}: no model takes part in the evaluation ({reasons})")
        name = store.uri.rstrip("/").rpartition("/")[2]
        return cls(name, store, generation, models, observed, logits, dict(left_out))

    def named(self, name: str) -> ProbedHub:
        """The same under another name."""
        return replace(self, name=name)

    @cached_property
    def key(self) -> str:
        """Identity of everything that scores depend on: probes, observations, encoder, prompt, background."""
        settings = self.generation.settings
        models = [[model.repo, model.sha] for model in self.models]
        parts = ("probe_set", "observations", "encoder_digest", "prompts")
        return short_key(*(getattr(settings, part) for part in parts), self.generation.background, models)

    @property
    def fraction(self) -> float:
        """Which share of the probes each model was observed on."""
        return self.generation.settings.fraction

    @property
    def probes(self) -> int:
        """Number of probes, n."""
        return self.generation.settings.probes

    def embed(self, names: Sequence[str]) -> npt.NDArray[np.float32]:
        """(C, d) embeddings of concepts' names in the index's prompt."""
        if new := [name for name in dict.fromkeys(names) if name not in self._vectors]:
            self._vectors.update(zip(new, text_vectors(self.generation, new), strict=True))
        dimension = self.generation.probe_embeddings.shape[1]
        return np.array([self._vectors[name] for name in names], np.float32).reshape(-1, dimension)

    def concepts(
        self,
        queries: npt.NDArray[np.floating[Any]],
        synonyms: Sequence[Sequence[str]],
        background: Sequence[str] | None = None,
    ) -> Concepts:
        """Query vectors (C, d) beside a background, by default the index's, without the query's own names."""
        if background is None:
            background = self.generation.background
        excluded = [numbers_named(background, names) for names in synonyms]
        return Concepts(queries, self.embed(background), excluded)

    def gallery(
        self, share: float, seed: int, common: float = COMMON
    ) -> tuple[Gallery, npt.NDArray[np.int64]]:
        """The hub as if every model had seen only a share of the probes, drawn as the probe stage draws.

        Returns:
            The gallery, and the numbers of its logits among ``logits``: those that are constant on their share
            are left out.

        Raises:
            UsageError: the models were not observed on all probes, so that another share cannot be drawn.
        """
        if share == self.fraction and share < 1:
            return Gallery(self.observed, self.generation.probe_embeddings), np.arange(len(self.logits))
        if self.fraction < 1:
            raise UsageError(
                f"{self.name}: its models saw {self.fraction:g} of the probes; only this share can be evaluated. "
                "For other budgets index with fraction = 1"
            )
        models, kept, start = [], [], 0
        probe_set = self.generation.settings.probe_set
        for model, rows in zip(self.models, self.observed, strict=True):
            chosen = subset(probe_set, model.repo, model.sha, seed, share, self.probes, common)
            values = rows.values[:, chosen]
            varied = np.flatnonzero(~scoring.is_constant(values))
            if len(varied):
                models.append(Observed(rows.head, chosen, values[varied]))
                kept.append(start + varied)
            start += len(rows.values)
        if not models:
            raise UsageError(f"{self.name}: every logit is constant on {share:g} of the probes")
        return Gallery(models, self.generation.probe_embeddings), np.concatenate(kept)


def _rows(
    model: ProbedModel, numbers: npt.NDArray[np.int32], values: npt.NDArray[np.float32]
) -> tuple[Observed, list[LogitName]]:
    varied = np.flatnonzero(~scoring.is_constant(values))
    names = [
        LogitName(model.repo, int(n), False, model.labels[n] if n < len(model.labels) else f"LABEL_{n}")
        for n in numbers[varied]
    ]
    values = values[varied]
    if model.head == Head.SINGLE:
        names += [name._replace(negated=True) for name in names]
        values = np.concatenate([values, -values])
    return Observed(Head(model.head), np.asarray(model.probes), values), names
