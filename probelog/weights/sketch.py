"""What is kept of every tensor of weights: its moments, and of matrices a sketch that preserves distances.

WeightMoments: mean, standard deviation and kurtosis, merged from blocks by the pairwise formulas of Chan, Golub and
LeVeque (1983) and Pébay (2008, SAND2008-6212). Kurtosis is Pearson's, 3 for normally distributed weights; it tends
to move in one direction along a chain of fine-tunings, which MoTHer (arXiv 2405.18432) uses to tell a parent from
its child.

Sketch: a random projection after Johnson and Lindenstrauss to 32 numbers, so that distances between layers of equal
shape can be estimated without their weights; they recover which model was fine-tuned from which. The flat weights
are cut into rows of ``BLOCK`` numbers, x[i, j]; with random signs a[j] and b[i] and random slots h[j]

    y[k] = sum of b[i] a[j] x[i, j] over all i and all j with h[j] = k,

one multiplication of the signs b with the matrix x (a pass over the weights), then a count sketch (Charikar, Chen
and Farach-Colton 2002) of the BLOCK sums u = b x. Signs, slots and so the sketch depend on positions alone: it is
linear in the weights, and those of two layers of one shape subtract to the sketch of their difference.

The estimate ||y||^2 of ||x||^2 is unbiased, because the signs b[i] a[j] are pairwise independent. Its variance is

    2/32 (E||u||^4 - E sum u[j]^4)  +  2 sum over i != i' of <x[i], x[i']>^2.

The first term bounds the relative standard deviation of a squared distance by sqrt(2/32) = 25 % (a distance's by
about 12.5 %), whatever the weights, where the tensor fits one row. The second is there for larger tensors only and
says how alike the rows are: nothing to speak of for random differences, up to twice the squared value where all
rows are equal, such as for a constant difference. ``BLOCK`` is prime, so that rows of the sketch do not line up with
rows of the layer and differences of low rank stay harmless.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

#: Numbers of a sketch.
WIDTH = 32

#: Numbers of a row, and of the pieces that weights are best handed over in. As float32 they fit a core's cache.
BLOCK = 131_071

#: Part of what the signs are made of: sketches of different versions must not be compared.
VERSION = 1

# Below this, the exact way costs less than the calls of the fast one.
_SHORT = 8192
# Fourth powers of float32 numbers leave its range early; below this mean, its smallest numbers blur them.
_SMALLEST_FOURTH_POWER = 1e-30


@dataclass(frozen=True, slots=True)
class WeightMoments:
    """Count and mean of some numbers, and the sums of the 2nd, 3rd and 4th powers of their deviations from it."""

    count: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation (over n, not n - 1); 0 for no numbers."""
        return math.sqrt(self.second / self.count) if self.count else 0.0

    @property
    def kurtosis(self) -> float | None:
        """Pearson's kurtosis, 3 for a normal distribution; None where all numbers are equal."""
        # Divided before it is squared: the square of a small sum of squares is zero.
        if self.second == 0 or self.count == 0:
            return None
        variance = self.second / self.count
        return self.fourth / self.count / variance / variance

    @property
    def finite(self) -> bool:
        """Whether all the numbers were: a NaN or an infinity among them is never lost."""
        return math.isfinite(self.fourth) and math.isfinite(self.mean)

    def merged(self, other: WeightMoments) -> WeightMoments:
        """The moments of both sets of numbers together (Pébay 2008, equations 2.1, 3.1 with p = 2, 3, 4)."""
        if not self.count or not other.count:
            return other if not self.count else self
        n, na, nb = self.count + other.count, self.count, other.count
        delta = other.mean - self.mean
        step = delta / n
        return WeightMoments(
            n,
            self.mean + nb * step,
            self.second + other.second + delta * step * na * nb,
            self.third
            + other.third
            + delta * step * step * na * nb * (na - nb)
            + 3 * step * (na * other.second - nb * self.second),
            self.fourth
            + other.fourth
            + delta * step * step * step * na * nb * (na * na - na * nb + nb * nb)
            + 6 * step * step * (na * na * other.second + nb * nb * self.second)
            + 4 * step * (na * other.third - nb * self.third),
        )


class Summary:
    """Moments and sketches of tensors, one after the other, each handed over in pieces of ``BLOCK`` numbers.

    Keeps its work space, a few times ``BLOCK`` numbers, from one tensor to the next.
    """

    def __init__(self) -> None:
        import torch

        self._deviations, self._squares = torch.empty(BLOCK), torch.empty(BLOCK)
        self._sums = torch.empty(BLOCK)
        self._used = 0
        self._rows = 0
        self._sketched = False
        self._moments = WeightMoments()

    def begin(self, *, sketched: bool) -> None:
        """Start with another tensor."""
        self._moments, self._sketched, self._rows, self._used = WeightMoments(), sketched, 0, 0

    def add(self, piece: torch.Tensor) -> None:
        """The tensor's next numbers, (n,) float32 with n = ``BLOCK`` in every piece but the last."""
        self._moments = self._moments.merged(self._of_piece(piece))
        if not self._sketched:
            return
        if self._rows == 0:  # its sign is kept apart for later: most tensors have one row
            self._used = len(piece)
            self._sums[: self._used].copy_(piece)
        else:
            self._sums[: len(piece)].add_(piece, alpha=_row_sign(self._rows) * _row_sign(0))
        self._rows += 1

    def finish(self) -> tuple[WeightMoments, npt.NDArray[np.float32] | None]:
        """Moments of the tensor, and its sketch (32,) where one was asked for and float32 can hold it."""
        if not self._sketched:
            return self._moments, None
        signs, slots = _columns()
        sums = self._sums[: self._used].numpy()
        # In float64: this costs nothing here and keeps the order of the sum out of the result.
        counts = np.bincount(slots[: self._used], sums * signs[: self._used], minlength=WIDTH)
        return self._moments, _in_float32(counts * _row_sign(0))

    def _of_piece(self, piece: torch.Tensor) -> WeightMoments:
        import torch

        n = len(piece)
        if n < _SHORT:
            return exact_moments(piece.numpy())
        # Deviations from a mean that is rounded to float32, put right below in float64.
        centre = float(piece.sum()) / n
        if not math.isfinite(centre):
            return exact_moments(piece.numpy())
        deviations, squares = self._deviations[:n], self._squares[:n]
        torch.sub(piece, np.float32(centre).item(), out=deviations)
        torch.mul(deviations, deviations, out=squares)
        first, second = float(deviations.sum()) / n, float(squares.sum()) / n
        third, fourth = float(torch.dot(squares, deviations)) / n, float(torch.dot(squares, squares)) / n
        if not _SMALLEST_FOURTH_POWER < fourth < math.inf:
            return exact_moments(piece.numpy())
        return WeightMoments(
            n,
            np.float32(centre).item() + first,
            n * (second - first * first),
            n * (third - 3 * first * second + 2 * first**3),
            n * (fourth - 4 * first * third + 6 * first * first * second - 3 * first**4),
        )


def sketch_of_blocks(
    blocks: Iterable[tuple[int, npt.NDArray[np.floating[Any]]]], elements: int
) -> npt.NDArray[np.float32] | None:
    """The sketch of a tensor of which only some numbers are known; None where float32 cannot hold it.

    The unknown ones count as zero, and the result is scaled so that its square estimates that of the whole tensor. It is
    linear in the known numbers: sketches of two tensors subtract where the same positions are known.

    Args:
        blocks: position of the first number in the flat tensor, and the numbers.
        elements: numbers of the whole tensor.
    """
    signs, slots = _columns()
    counts, known = np.zeros(WIDTH), 0
    for start, values in blocks:
        known += len(values)
        while len(values):
            row, column = divmod(start, BLOCK)
            part = values[: BLOCK - column].astype(np.float64)
            columns = slice(column, column + len(part))
            counts += _row_sign(row) * np.bincount(slots[columns], part * signs[columns], minlength=WIDTH)
            start, values = start + len(part), values[len(part) :]
    return _in_float32(counts * math.sqrt(elements / known)) if known else None


def _in_float32(counts: npt.NDArray[Any]) -> npt.NDArray[np.float32] | None:
    """None where weights at the end of float32's range add up beyond it."""
    return counts.astype(np.float32) if (np.abs(counts) < np.finfo(np.float32).max).all() else None


def exact_moments(values: npt.NDArray[np.floating[Any]]) -> WeightMoments:
    """The moments of numbers (n,), all computed in float64."""
    exact = values.astype(np.float64)
    if not len(exact):
        return WeightMoments()
    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(exact.sum()) / len(exact)
        deviations = exact - mean
        squares = deviations * deviations
        return WeightMoments(
            len(exact),
            mean,
            float(squares.sum()),
            float((squares * deviations).sum()),
            float((squares * squares).sum()),
        )


def _random_bytes(what: str, count: int) -> bytes:
    # A hash with output of any length rather than a library's generator: the same on every machine, for ever.
    return hashlib.shake_256(f"probelog weight sketch {VERSION} {what}".encode()).digest(count)


@functools.cache
def _columns() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.intp]]:
    """The sign (+-1) and the slot (0..31) of every column."""
    drawn = np.frombuffer(_random_bytes("columns", BLOCK), np.uint8)
    return np.where(drawn & 128, -1, 1).astype(np.float32), (drawn % WIDTH).astype(np.intp)


@functools.cache
def _row_signs(bytes_of_signs: int) -> bytes:
    return _random_bytes("rows", bytes_of_signs)


def _row_sign(row: int) -> int:
    """The sign (+-1) of a row. Longer output of the hash begins as shorter does, so there is no last row."""
    size = 1 << max(10, (row // 8).bit_length())
    return 1 if _row_signs(size)[row // 8] >> (row % 8) & 1 else -1
