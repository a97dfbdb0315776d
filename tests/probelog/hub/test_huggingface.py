"""What is used of huggingface_hub beside its documented names."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import constants

from probelog.hub import huggingface


def test_this_version_has_what_is_used() -> None:
    """Fails where a new version moved something: mend `probelog.hub.huggingface`, then raise its ``CHECKED``."""
    versions = f"huggingface_hub {huggingface_hub.__version__}, checked with {huggingface.CHECKED}"
    try:
        assert huggingface.is_repo_id("ada/resnet"), versions
        assert not huggingface.is_repo_id("ada/../resnet"), versions
        assert {"cardData", "downloads", "safetensors", "sha", "tags"} <= huggingface.listing_properties(), (
            versions
        )
    except ImportError as error:
        pytest.fail(f"{versions}: {error}")


def test_the_token_of_the_user_and_its_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    assert huggingface.token() == "hf_something"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert huggingface.token() is None
