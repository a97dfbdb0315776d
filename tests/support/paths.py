"""Where the checkout lies, and the bench hub that may lie beside it."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
BENCH = CHECKOUT.parent / "shared" / "bench"

# Names a folder in which exported encoders are kept. The processes of a run share one; mutation tests share it between
# runs: an export takes longer than their tests.
KEPT_EXPORTS = "PROBELOG_TEST_EXPORTS"
