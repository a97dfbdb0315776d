"""Parameters of a completion's fit, its state between sweeps, and the checkpoint of that state in the store."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass

import numpy as np

from probelog.completion.als import Float32, HeldOutError
from probelog.storage.encoding import npy
from probelog.storage.store import Store


@dataclass(frozen=True)
class Fit:
    """Parameters of a fit.

    Attributes:
        probes: number n of probes.
        rank: of the factorisation.
        regularisation: of the factorisation.
        seed: of the start and of the held-out entries.
        held_share: share of each model's probes that is held out while choosing.
        top_share: share of a row that counts as its top entries (r / n).
        sweeps: largest number of sweeps.
        sample: share of the models that the choice is made on.
        tolerance: a sweep that lowers the held-out error by less than this share is the last one.
    """

    probes: int
    rank: int
    regularisation: float
    seed: int
    top_share: float
    held_share: float = 0.1
    sample: float = 1.0
    sweeps: int = 20
    tolerance: float = 1e-3


@dataclass(frozen=True)
class Fitted:
    """The result of a fit: columns V (n, k), the sweeps it took and, where entries were held out, their error."""

    columns: Float32
    sweeps: int
    error: HeldOutError | None


@dataclass(frozen=True)
class State:
    """State of a fit: number of finished sweeps, the columns after them, and the best columns by held-out error."""

    fit: Fit
    held_out: bool
    sweep: int
    columns: Float32
    best: Fitted | None = None

    def to_bytes(self) -> bytes:
        """Serialise: a line of JSON, then the columns as ``.npy``, then the best ones."""
        best = self.best
        facts = {
            "fit": asdict(self.fit),
            "held_out": self.held_out,
            "sweep": self.sweep,
            "best": None if best is None or best.error is None else [best.sweeps, asdict(best.error)],
        }
        return b"".join(
            [json.dumps(facts).encode(), b"\n", npy(self.columns), b"" if best is None else npy(best.columns)]
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """Parse the bytes of ``to_bytes``."""
        line, _, arrays = data.partition(b"\n")
        facts = json.loads(line)
        stream = io.BytesIO(arrays)
        columns = np.load(stream, allow_pickle=False)
        best = None
        if facts["best"] is not None:
            sweeps, error = facts["best"]
            best = Fitted(np.load(stream, allow_pickle=False), sweeps, HeldOutError(**error))
        return cls(Fit(**facts["fit"]), facts["held_out"], facts["sweep"], columns, best)


class Checkpoint:
    """The checkpoint of a running fit: one object in the store, replaced after every sweep."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name

    def save(self, state: State) -> None:
        """Write a state in place of the previous one."""
        self._store.write(self._name, state.to_bytes())

    def load(self, fit: Fit, held_out: bool) -> State | None:
        """The saved state, if it is of a fit with the same parameters; None otherwise."""
        data = self._store.read_or_none(self._name)
        try:
            state = None if data is None else State.from_bytes(data)
        except (EOFError, KeyError, TypeError, ValueError):  # written by another version
            return None
        return state if state is not None and (state.fit, state.held_out) == (fit, held_out) else None

    def clear(self) -> None:
        """Delete the saved state."""
        self._store.delete(self._name)
