"""The benchmark behind `probelog-index evaluate --out`: every method, budget, probe set and seed on one hub."""
