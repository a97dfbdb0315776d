"""Rows of models that were never run, for tests of what is written about models."""

from __future__ import annotations

from typing import Any

from probelog.storage.schemas import ProbedModel


def probed_model(repo: str, **facts: Any) -> ProbedModel:
    """One model with what every row must have; ``facts`` on top."""
    given: dict[str, Any] = {
        "repo": repo,
        "head": "softmax",
        "library": "timm",
        "architecture": "test",
        "parameters": 10,
        "recipe": "{}",
        "dtype": "float32",
        "device": "cpu",
        "weight_digest": "d",
        "weight_mean": 0.0,
        "weight_std": 1.0,
    }
    return ProbedModel(**(given | facts))
