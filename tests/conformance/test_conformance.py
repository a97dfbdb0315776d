"""Every class of transformers and one architecture of each module of timm beside its own library."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from tests.conformance import construction, timm_models, transformers_models


@pytest.mark.acceptance
@pytest.mark.parametrize(
    "architecture", sorted(transformers_models.classes().keys() - {transformers_models.WRAPPER})
)
def test_transformers(architecture: str, tmp_path: Path) -> None:
    results = {outcome.layout: outcome for outcome in transformers_models.outcomes(architecture, tmp_path)}
    if architecture in transformers_models.REFUSED:
        assert [outcome.result for outcome in results.values()] == ["refused: unsupported"]
    else:
        assert len(results) == 2
        assert {outcome.result for outcome in results.values()} == {"equal"}, results


@pytest.mark.acceptance
@pytest.mark.parametrize("architecture", timm_models.ONE_OF_EACH)
def test_timm(architecture: str, tmp_path: Path) -> None:
    results = {outcome.layout: outcome for outcome in timm_models.outcomes(architecture, tmp_path)}
    assert len(results) == 3
    assert {outcome.result for outcome in results.values()} == {"equal"}, results


@pytest.mark.acceptance
@pytest.mark.parametrize("architecture", ["fbnetc_100", "vit_tiny_patch16_224"])
def test_timm_is_built_alike(architecture: str, tmp_path: Path) -> None:
    results = [outcome.result for outcome in construction.outcomes(architecture, tmp_path)]
    assert results == ["equal"] * len(construction.LAYOUTS)
    # What timm creates otherwise as pretrained is seen.
    seen = str(construction.description(construction.by_library(tmp_path, "of 2022")))
    assert ("eps=0.001" in seen) == (architecture == "fbnetc_100")


def test_nothing_of_the_libraries_is_left_out() -> None:
    """A new release brings classes and modules: add them to the tables, tiny, and run the comparison."""
    classes = transformers_models.classes().keys() - {transformers_models.WRAPPER}
    assert classes == transformers_models.TINY.keys() | transformers_models.REFUSED.keys()
    own = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm.")]
    modules = {timm_models.module_of(name) for name in own}  # other tests register architectures
    assert modules == {timm_models.module_of(name) for name in timm_models.ONE_OF_EACH} | set(
        timm_models.LARGE
    )
