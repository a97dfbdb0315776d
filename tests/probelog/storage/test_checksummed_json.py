"""JSON files that can be checked by themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probelog.errors import StoreError
from probelog.storage.checksummed_json import sealed_json, unsealed_json

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text().filter(lambda key: key != "seal"), plain, min_size=1, max_size=4)


@given(objects, st.sampled_from([1, None]))
def test_a_sealed_object_is_read_as_it_was_written(value: dict[str, Any], indent: int | None) -> None:
    data = sealed_json(value, indent)
    assert unsealed_json(data, "here") == value
    assert json.loads(data).keys() == {*value, "seal"}
    assert sealed_json(unsealed_json(data, "here"), indent) == data


@given(objects, st.sampled_from([1, None]), st.data())
def test_any_other_bit_is_damage(value: dict[str, Any], indent: int | None, data: st.DataObject) -> None:
    sealed = bytearray(sealed_json(value, indent))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(StoreError, match="here is damaged"):
        unsealed_json(bytes(sealed), "here")


def test_files_are_written_so_that_people_can_read_them() -> None:
    lines = sealed_json({"b": [1], "a": {}}).decode().splitlines()
    assert lines[:5] == ["{", ' "a": {},', ' "b": [', "  1", " ],"]


@pytest.mark.parametrize("other", [b'"sea1"', b'"Seal"'])
def test_the_right_digest_in_another_frame_is_damage(other: bytes) -> None:
    with pytest.raises(StoreError, match="here is damaged"):
        unsealed_json(sealed_json({"a": 1}).replace(b'"seal"', other), "here")


@given(objects)
def test_a_shorter_file_is_damage(value: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="here is damaged"):
        unsealed_json(sealed_json(value)[:-2], "here")


@given(plain)
def test_what_was_never_sealed_is_damaged(value: object) -> None:
    with pytest.raises(StoreError, match="here is damaged"):
        unsealed_json(json.dumps(value, indent=1).encode(), "here")
