from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from probelog.errors import FailureReason, ItemFailure
from probelog.weights.safetensors import (
    ContentDigest,
    TensorInfo,
    read_header,
    read_headers,
    read_into,
    weight_files,
)
from tests.support.hub.hostile import entry, write_json, write_safetensors

TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
        lambda name: name != "__metadata__"
    ),
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.uint8]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements=st.integers(0, 100),
    ),
    max_size=6,
)


def read(path: Path, tensor: TensorInfo) -> bytes:
    """The bytes of one tensor, read eight at a time."""
    room = bytearray(tensor.end - tensor.begin)
    with open(path, "rb", buffering=0) as stream:
        pieces = [bytes(piece) for piece in read_into(stream, tensor, memoryview(room), 8)]
    assert b"".join(pieces) == room
    return bytes(room)


def digest(files: list[Path]) -> str:
    """What the files hold, by the digest that models are known by."""
    content = ContentDigest()
    for name, (path, tensor) in sorted(read_headers(files).items()):
        content.begin(name, tensor.dtype, tensor.shape)
        content.add(read(path, tensor))
    return content.result()


def outcome(path: Path) -> FailureReason | None:
    """Why a header is refused, or None; any other error fails the test."""
    try:
        read_header(path)
    except ItemFailure as failure:
        return failure.reason
    return None


@settings(deadline=None)  # the machine may be busy
@given(TENSORS)
def test_header_and_bytes_of_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, np.ndarray]
) -> None:
    path = tmp_path_factory.mktemp("w") / "model.safetensors"
    save_file(tensors, path, metadata={"format": "np"})
    header = read_header(path)
    assert header.elements == sum(array.size for array in tensors.values())
    assert header.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        assert header.tensors[name].shape == array.shape
        assert read(path, header.tensors[name]) == array.tobytes()


@settings(deadline=None)  # the machine may be busy
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_any_bytes_are_refused_or_read_never_worse(
    tmp_path_factory: pytest.TempPathFactory, body: bytes, length: int
) -> None:
    path = tmp_path_factory.mktemp("w") / "model.safetensors"
    for announced in (length, len(body), len(body) // 2):
        path.write_bytes(announced.to_bytes(8, "little") + body)
        assert outcome(path) in (None, FailureReason.CORRUPT_WEIGHTS)


@settings(deadline=None)  # the machine may be busy
@given(st.data())
def test_damaged_headers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """One value of a sound header replaced by anything: refused, or still sound."""
    path = tmp_path_factory.mktemp("w") / "model.safetensors"
    header = {"a": entry([2], 0, 8), "b": entry([2, 1], 8, 16)}
    name = data.draw(st.sampled_from(["a", "b"]))
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    numbers = (
        st.integers(-2, 2**70) | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
    )
    header[name][key] = data.draw(
        numbers | st.text(max_size=5) | st.lists(numbers | st.lists(numbers), max_size=4)
    )
    write_safetensors(path, header, bytes(16))
    reason = outcome(path)
    assert reason in (None, FailureReason.CORRUPT_WEIGHTS)
    assert reason or sum(t.end - t.begin for t in read_header(path).tensors.values()) == 16


def test_header_longer_than_accepted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, b"{}" + b" " * 20_000_000)
    assert outcome(path) is FailureReason.CORRUPT_WEIGHTS


def test_digest_ignores_order_sharding_and_metadata(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"layer.{i}": rng.normal(size=(3, i)).astype(np.float32) for i in range(6)}
    save_file(tensors, tmp_path / "one.safetensors", metadata={"made": "today"})
    names = list(tensors)
    random.Random(1).shuffle(names)
    save_file({n: tensors[n] for n in names[:2]}, tmp_path / "a.safetensors")
    save_file({n: tensors[n] for n in names[2:]}, tmp_path / "b.safetensors")
    whole = digest([tmp_path / "one.safetensors"])
    assert whole == digest([tmp_path / "b.safetensors", tmp_path / "a.safetensors"])
    assert len(whole) == 64


def test_digest_sees_name_dtype_shape_and_bytes(tmp_path: Path) -> None:
    base = np.arange(4, dtype=np.float32)
    other = base.copy()
    other[3] = np.nextafter(other[3], 9, dtype=np.float32)
    variants = [{"a": base}, {"b": base}, {"a": base.reshape(2, 2)}, {"a": base.view(np.int32)}, {"a": other}]
    digests = set()
    for i, tensors in enumerate(variants):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        digests.add(digest([tmp_path / f"{i}.safetensors"]))
    assert len(digests) == len(variants)


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ItemFailure, match=r"corrupt-weights.*b.safetensors.*a.safetensors"):
        read_headers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_weight_files(tmp_path: Path) -> None:
    with pytest.raises(ItemFailure, match="not-found"):
        weight_files(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(ItemFailure, match=r"unsafe-format.*tf_model.h5"):
        weight_files(tmp_path)
    shards = {f"model-0000{i}-of-00002.safetensors": {f"t{i}": np.zeros(i, np.float32)} for i in (1, 2)}
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name)
    write_json(
        tmp_path,
        "model.safetensors.index.json",
        {"weight_map": {f"t{i}": n for i, n in enumerate(shards, 1)}},
    )
    assert [path.name for path in weight_files(tmp_path)] == sorted(shards)
    save_file({}, tmp_path / "model.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]


def test_index_is_strict_json(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ItemFailure, match="corrupt-weights"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ItemFailure, match="corrupt-config"):
        weight_files(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(100, np.float32)}, path)
    tensor = read_header(path).tensors["a"]
    os.truncate(path, tensor.end - 4)
    with pytest.raises(ItemFailure, match=r"corrupt-weights.*cut off while tensor 'a'"):
        read(path, tensor)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_types_of_the_format_that_are_not_converted(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": {"dtype": dtype, "shape": [16], "data_offsets": [0, 16]}}, bytes(16))
    assert outcome(path) is FailureReason.UNSUPPORTED
