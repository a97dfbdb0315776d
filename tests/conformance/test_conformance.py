"""Every class of transformers and one architecture of each module of timm beside its own library."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from tests.conformance import __main__ as command
from tests.conformance import construction, timm_models, transformers_models
from tests.conformance.compare import Outcome
from tests.conformance.table import read_csv, write_csv


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


def test_a_run_goes_on_where_another_was_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = [Outcome("timm", "test_vit", layout, "equal", 0.5, 0.001) for layout in ("as saved", "of 2022")]
    write_csv([earlier], tmp_path / "found.csv")
    page = tmp_path / "page.md"
    page.write_text("By hand.\n" + command.BEGIN + "an older table\n")
    arguments = ["--resume", "test_vit", "--csv", str(tmp_path / "found.csv"), "--page", str(page)]
    monkeypatch.setattr("sys.argv", ["conformance", *arguments])
    assert command.main() == 0
    assert read_csv(tmp_path / "found.csv") == earlier
    assert page.read_text().startswith("By hand.\n" + command.BEGIN + "\nWith ")
    assert "| timm | of 2022 | 1 | 1 | 0 | 0 | 0.5 | 0.001 |" in page.read_text()
