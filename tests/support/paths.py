"""Where the checkout lies, and the bench hub that may lie beside it."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
BENCH = CHECKOUT.parent / "shared" / "bench"
