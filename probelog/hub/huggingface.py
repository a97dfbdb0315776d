"""What is used of `huggingface_hub` without being documented by it: here alone, checked with the version below.

A new version that lacks any of it fails the test of this module, with the name of what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import get_args

#: The version that these were last checked with.
CHECKED = "2.4.0"


def token() -> str | None:
    """The token that requests to the Hub carry, if any; none where the user has switched that off."""
    from huggingface_hub import constants, get_token

    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


def is_repo_id(name: str) -> bool:
    """Whether the Hub would take this as a repository's id (by its own rule: no ``..``, at most one slash)."""
    validate, refusal = _rule_of_ids()
    try:
        validate(name)
    except refusal:
        return False
    return True


@cache  # looked up once for a listing of a million
def _rule_of_ids() -> tuple[Callable[[str], object], type[Exception]]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    return validate_repo_id, HFValidationError


def listing_properties() -> frozenset[str]:
    """What a listing of models may be asked for (``expand``), beside the id."""
    from huggingface_hub.hf_api import ExpandModelProperty_T

    return frozenset(get_args(ExpandModelProperty_T))
