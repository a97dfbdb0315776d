"""Types of the arrays that the mathematics takes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


Ints = npt.NDArray[np.integer]
