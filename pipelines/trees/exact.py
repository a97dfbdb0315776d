"""An exact look where sketches cannot decide: some whole layers of two models, read from the Hub by byte ranges."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipelines.config.model import Trees
from pipelines.trees.remote import RemoteWeights
from probelog.errors import ItemFailure
from probelog.hub.client import HubClient
from probelog.storage.schemas import CatalogueRow
from probelog.weights.blocks import numbers_of, whole_layers

# Of the bytes of a model for layers; the rest is for headers.
_LAYERS_SHARE = 0.75
# Models whose layers are kept for their next pair.
_KEPT = 32

_Layers = dict[str, npt.NDArray[np.float32]]

_log = logging.getLogger(__name__)


class ExactLook:
    """Distances of pairs by all numbers of some layers, the same ones of both.

    Args:
        client: of the Hub.
        rows: the models at the commits that are compared, by repository.
        most_bytes: that are read of each, headers included.
    """

    def __init__(self, client: HubClient, rows: Mapping[str, CatalogueRow], most_bytes: int) -> None:
        self._client, self._rows, self._most_bytes = client, rows, most_bytes
        self._kept: OrderedDict[str, _Layers] = OrderedDict()

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """The mean over the layers of ||a - b||^2 / (||a||^2 + ||b||^2); no pair of which a model cannot be read."""
        distances = {}
        for one, other in pairs:
            ratio = _distance(self._layers(one), self._layers(other))
            if ratio is not None:
                distances[one, other] = ratio
        return distances

    def _layers(self, repo: str) -> _Layers:
        if repo not in self._kept:
            self._kept[repo] = self._read(repo)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(repo)
        return self._kept[repo]

    def _read(self, repo: str) -> _Layers:
        """The layers of a model; none where it is not listed any more or cannot be read."""
        if repo not in self._rows:
            return {}
        try:
            weights = RemoteWeights(self._client, self._rows[repo], self._most_bytes)
            most = min(int(self._most_bytes * _LAYERS_SHARE), weights.budget.left)
            chosen = whole_layers((tensor for _, tensor in weights.tensors.values()), most)
            data = weights.read_tensors([tensor.name for tensor in chosen])
        except ItemFailure as failure:
            _log.warning("%s is not compared exactly: %s", repo, failure)
            return {}
        return {tensor.name: numbers_of(tensor, data[tensor.name]) for tensor in chosen}


@contextlib.contextmanager
def exact_look(
    settings: Trees, endpoint: str, rows: Mapping[str, CatalogueRow]
) -> Iterator[ExactLook | None]:
    """What `probelog.trees.recovery.recover.recover_family` asks; None where it is switched off (``exact_bytes``)."""
    if not settings.exact_bytes:
        yield None
        return
    with HubClient(endpoint) as client:
        yield ExactLook(client, rows, settings.exact_bytes)


def _distance(one: _Layers, other: _Layers) -> float | None:
    ratios = []
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        length = float(a @ a) + float(b @ b)
        if len(a) == len(b) and np.isfinite(length) and length > 0:
            difference = a - b
            ratios.append(float(difference @ difference) / length)
    return float(np.mean(ratios)) if ratios else None
