"""An index that somebody else published: whatever it holds, the client answers, or fails with one line, in good time.

Every case is a payload in a real index or a real encoder. The kept index (``tests/compatibility``) is the sound one: an
update beside its base.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import TensorProto, helper
from PIL import Image

import probelog
from probelog.encoders import process
from probelog.encoders.image import ImageEncoder
from probelog.encoders.text import TextEncoder
from probelog.errors import ProbeLogError, StoreError
from probelog.index.generation import Generation
from probelog.index.pointer import read_pointer
from probelog.index.tables import first_line
from probelog.storage.checksummed_json import sealed_json
from probelog.storage.encoding import from_npy, npy
from probelog.storage.layout import POINTER
from probelog.storage.store import Store
from probelog.trees.edges import Edge, Relation, edge_table
from tests.compatibility.make import KEPT
from tests.support.worlds.small_index import Model, build

SOUND = KEPT / probelog.__version__ / "store" / "index"
POINTED = json.loads((SOUND / POINTER).read_text())
LIVE, BASE = POINTED["generation"], POINTED["base"]
# As one number of JSON, each is sound to Python's reader.
NUMBERS: dict[str, str] = {
    "1e400": "1e400",
    "nan": "NaN",
    "10^15": "1" + "0" * 15,
    "10^4000": "1" + "0" * 4000,
}
TEXT = "dog\x1b[2J\x1b]0;owned\x07\u202e\n\r\x00"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return shutil.copytree(SOUND, tmp_path / "index")


@pytest.fixture(scope="module")
def sound() -> Generation:
    store = Store(SOUND)
    return Generation(store, read_pointer(store)[0])


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes too long is ended after seconds."""
    monkeypatch.setattr(process, "_SECONDS", 3.0)


def one_line(error: ProbeLogError) -> str:
    text = str(error)
    assert "\n" not in text
    assert text.isprintable(), text
    assert len(text) < 1500
    return text


# The encoder: graphs


def graph(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto] = [], **more: Any) -> bytes:  # noqa: B006
    """A text tower: token ids (texts, tokens) to ``features`` (texts, 16)."""
    made = helper.make_graph(
        nodes,
        "tower",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["texts", "tokens"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("features", more.pop("kind", TensorProto.FLOAT), None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("stranger", 1)]
    model: bytes = helper.make_model(made, opset_imports=opsets, ir_version=9).SerializeToString()
    return model


def whole(name: str, *values: int) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def endless() -> bytes:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["was", "one"], ["is"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("was", TensorProto.FLOAT, [1, 16]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("is", TensorProto.FLOAT, [1, 16]),
        ],
    )
    return graph(
        [helper.make_node("Loop", ["times", "yes", "zeros"], ["features"], body=body)],
        [
            helper.make_tensor("times", TensorProto.INT64, [], [2**62]),
            helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
            helper.make_tensor("zeros", TensorProto.FLOAT, [1, 16], [0.0] * 16),
            helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        ],
    )


def filled(value: float, *shape: int, then: str = "Identity", kind: int = TensorProto.FLOAT) -> bytes:
    """A tower that gives one number everywhere, whatever it is asked."""
    constant = helper.make_tensor("value", kind, [1], [value])
    return graph(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["filled"], value=constant),
            helper.make_node(then, ["filled"], ["features"]),
        ],
        [whole("shape", *shape)],
        kind=kind,
    )


def external(location: str) -> bytes:
    tensor = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[1, 16])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        tensor.external_data.add(key=key, value=value)
    return graph([helper.make_node("Identity", ["secret"], ["features"])], [tensor])


def nested(levels: int) -> bytes:
    """Subgraphs in subgraphs: what reads them recursively leaves its stack."""
    inner = helper.make_graph(
        [helper.make_node("Identity", ["zeros"], ["x"])],
        "inner",
        [],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
    )
    for _ in range(levels):
        node = helper.make_node("If", ["yes"], ["x"], then_branch=inner, else_branch=inner)
        inner = onnx.GraphProto(name="g", output=inner.output)
        inner.node.append(node)
        if inner.ByteSize() > 30_000_000:
            break
    zeros = helper.make_tensor("zeros", TensorProto.FLOAT, [1, 16], [0.0] * 16)
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    last = helper.make_node("If", ["yes"], ["features"], then_branch=inner, else_branch=inner)
    return graph([last], [zeros, yes])


GRAPHS: list[tuple[str, Callable[[], bytes], str]] = [
    ("an endless Loop", endless, "has not answered within 3 seconds"),
    ("ConstantOfShape of a terabyte", lambda: filled(1.0, 1, 1 << 38), "is damaged"),
    ("Expand to a terabyte", lambda: graph([helper.make_node("Expand", ["one", "to"], ["features"])], [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]), whole("to", 1 << 19, 1 << 19)]), "is damaged"),
    ("Tile to a terabyte", lambda: graph([helper.make_node("Tile", ["one", "to"], ["features"])], [helper.make_tensor("one", TensorProto.FLOAT, [1, 1], [1.0]), whole("to", 1 << 19, 1 << 19)]), "is damaged"),
    ("shapes beyond int64", lambda: filled(1.0, 1 << 40, 1 << 40), "is damaged"),
    ("negative shapes", lambda: filled(1.0, -1, 16), "is damaged"),
    ("data in a file of the current folder", lambda: external("secret.bin"), "is damaged"),
    ("data in an absolute path", lambda: external("/etc/passwd"), "is damaged"),
    ("data in a folder above", lambda: external("../../../etc/passwd"), "is damaged"),
    ("data in a device", lambda: external("/dev/zero"), "is damaged"),
    ("an operator of its own", lambda: graph([helper.make_node("Run", ["input_ids"], ["features"], domain="stranger")]), "is damaged"),
    ("subgraphs in subgraphs", lambda: nested(12), "is damaged"),
    ("NaN", lambda: filled(float("nan"), 1, 16), "gives numbers that are not finite"),
    ("infinity", lambda: filled(float("inf"), 1, 16), "gives numbers that are not finite"),
    ("zeros", lambda: filled(0.0, 1, 16), "gives embeddings of zeros"),
    ("too few numbers", lambda: filled(1.0, 1, 15), r"gives \(1, 15\) numbers in place of \(1, 16\)"),
    ("too many rows", lambda: filled(1.0, 9, 16), r"gives \(9, 16\) numbers"),
    ("one dimension", lambda: filled(1.0, 16), r"gives \(16,\) numbers"),
    ("whole numbers", lambda: filled(1, 1, 16, kind=TensorProto.INT64), "something else than float32"),
    ("double numbers", lambda: filled(1, 1, 16, kind=TensorProto.DOUBLE), "something else than float32"),
    ("no graph", lambda: b"", "is damaged"),
    ("garbage", lambda: os.urandom(5000), "is damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in GRAPHS], ids=[case[0] for case in GRAPHS])
def test_a_graph(
    make: Callable[[], bytes], message: str, sound: Generation, soon: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    (tmp_path / "secret.bin").write_bytes(np.ones(16, np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    encoder = TextEncoder(make(), tokenizer_of(sound), sound.settings.text_encoder)
    started = time.monotonic()
    with pytest.raises(StoreError, match=message) as error:
        encoder.embed(["dog"])
    one_line(error.value)
    assert time.monotonic() - started < 60


def tokenizer_of(generation: Generation) -> str:
    return generation.meta("tokenizer.json").decode()


# The encoder: tokenizers


def growing(content: dict[str, Any]) -> None:
    tenfold = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1000}
    content["normalizer"] = {"type": "Sequence", "normalizers": [tenfold] * 4}


def backtracking(content: dict[str, Any]) -> None:
    pattern = {"Regex": r"^(((((a?)*)*)*)*)*b\1$"}
    content["normalizer"] = {"type": "Replace", "pattern": pattern, "content": ""}


def padded(content: dict[str, Any]) -> None:
    content["padding"] |= {"strategy": {"Fixed": 1 << 45}}


def ragged(content: dict[str, Any]) -> None:
    content["padding"] = None


def foreign_numbers(content: dict[str, Any]) -> None:
    content["model"]["vocab"] = {name: number + 10**6 for name, number in content["model"]["vocab"].items()}


def other_model(content: dict[str, Any]) -> None:
    content["model"] = {"type": "NoSuchModel\x1b[2J"}


@pytest.mark.parametrize("change", [growing, backtracking, padded, ragged, foreign_numbers, other_model])
def test_a_tokenizer(change: Callable[[dict[str, Any]], None], sound: Generation, soon: None) -> None:
    content = json.loads(tokenizer_of(sound))
    change(content)
    encoder = TextEncoder(sound.meta("text_encoder.onnx"), json.dumps(content), sound.settings.text_encoder)
    started = time.monotonic()
    try:
        found = encoder.embed(["a" * 60, "dog and cat"])
    except StoreError as error:
        one_line(error)
    else:
        assert change is backtracking, "the library gives up by itself"
        assert np.isfinite(found).all()
    assert time.monotonic() - started < 60


def test_text_that_is_no_tokenizer(sound: Generation) -> None:
    for text in ("", "[]", "[" * 100_000, "{}", '{"model": 3}', "\ud800"):
        encoder = TextEncoder(sound.meta("text_encoder.onnx"), text, sound.settings.text_encoder)
        with pytest.raises(StoreError, match="text encoder is damaged") as error:
            encoder.embed(["dog"])
        one_line(error.value)


# The encoder: its process


def test_the_process_holds_nothing_of_the_analysts(
    sound: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No credential, no file, no connection, no terminal, and not the analyst's folder."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    encoder = text_encoder(sound)
    encoder.embed(["dog"])
    running = Path("/proc", str(pid(encoder)))
    assert b"secret" not in (running / "environ").read_bytes()
    files = sorted(os.readlink(file) for file in (running / "fd").iterdir())
    assert all(file == "/dev/null" or file.startswith("socket:") or "(deleted)" in file for file in files), (
        files
    )
    assert os.readlink(running / "cwd") == "/"
    limits = {
        line[:26].strip(): line[26:].split()[:2] for line in (running / "limits").read_text().splitlines()
    }
    assert limits["Max open files"] == ["0", "0"]
    assert limits["Max core file size"] == ["1", "1"]  # which Linux hands to no program either
    assert int(limits["Max file size"][1]) < 1 << 20
    assert int(limits["Max address space"][1]) < 8 << 30
    assert int(limits["Max cpu time"][0]) < 1000


@pytest.mark.acceptance
def test_it_ends_with_its_client(sound: Generation) -> None:
    code = (
        "import os, sys; from tests.redteam import test_index as t; s = t.Store(t.SOUND);"
        "e = t.text_encoder(t.Generation(s, t.read_pointer(s)[0])); e.embed(['dog']); print(t.pid(e), flush=True);"
        "{}"
    )
    for ending in ("sys.exit()", "os._exit(3)", "os.kill(os.getpid(), 9)"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(ending)],
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
        running = Path("/proc", done.stdout.strip())
        for _ in range(100):
            if not running.exists():
                break
            time.sleep(0.1)
        assert not running.exists(), ending


def test_after_it_was_killed_the_next_query_has_another(sound: Generation) -> None:
    encoder = text_encoder(sound)
    before = encoder.embed(["dog"])
    os.kill(pid(encoder), 9)
    with pytest.raises(StoreError, match=r"its process ended \(SIGKILL") as error:
        encoder.embed(["dog"])
    one_line(error.value)
    np.testing.assert_array_equal(encoder.embed(["dog"]), before)


def test_a_forked_process_has_its_own(sound: Generation) -> None:
    encoder = text_encoder(sound)
    encoder.embed(["dog"])
    asked = multiprocessing.get_context("fork").Process(target=lambda: encoder.embed(["cat"]))
    asked.start()
    for _ in range(20):
        encoder.embed(["dog"])
    asked.join(60)
    assert asked.exitcode == 0
    assert Path("/proc", str(pid(encoder))).exists()


def test_an_interrupt_leaves_no_answer_behind(sound: Generation, soon: None) -> None:
    """What interrupted a request ended its process: the next answer is that of the next request."""
    encoder = text_encoder(sound)
    dog, cat = encoder.embed(["dog"]), encoder.embed(["cat"])
    assert not np.array_equal(dog, cat)
    # A shell starts what runs in its background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            [encoder.embed(["dog"] * 64) for _ in range(10_000)]
    finally:
        signal.signal(signal.SIGINT, before)
    timer.join()
    np.testing.assert_array_equal(encoder.embed(["cat"]), cat)


def text_encoder(generation: Generation) -> TextEncoder:
    return TextEncoder(
        generation.meta("text_encoder.onnx"), tokenizer_of(generation), generation.settings.text_encoder
    )


def pid(encoder: TextEncoder) -> int:
    running = encoder._process._process
    assert running is not None
    return running.popen.pid


@pytest.mark.parametrize(
    "change",
    [
        {"crop": [10**9, 10**9]}, {"crop": [0, 0]}, {"crop": [32]}, {"crop": "32"}, {"crop": [32, -1]},
        {"exact": [10**9, 32]}, {"shortest_edge": 10**9}, {"crop": None, "exact": None}, {"resample": 99},
        {"mean": [1.0]}, {"mean": ["a", "b", "c"]}, {"std": [0.0, 1.0, 1.0]}, {"std": [float("nan")] * 3},
        {"rescale": float("inf")}, {"dimension": 10**15}, {"dimension": -1}, {"output": 3}, {"input": []},
        {"made_with": 3}, {"version": True}, {"version": float("inf")}, {"key\x1b[2J": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_image_settings(change: dict[str, Any], sound: Generation) -> None:
    assert sound.settings.image_encoder is not None
    with pytest.raises(StoreError) as error:
        ImageEncoder(b"", sound.settings.image_encoder | change).embed([Image.new("RGB", (40, 40))])
    one_line(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []}, {"inputs": ["pixels"]}, {"inputs": [[]]}, {"inputs": "input_ids"}, {"output": None},
        {"dimension": 0}, {"dimension": 10**15}, {"dimension": "16"}, {"max_length": -1}, {"fixed_length": 1},
        {"pad_id": 1e400}, {"made_with": {"a": {}}}, {"\x1b[2J": 1}, {"version": "1"},
    ],
    ids=repr,
)  # fmt: skip
def test_text_settings(change: dict[str, Any], sound: Generation) -> None:
    with pytest.raises(StoreError) as error:
        TextEncoder(b"", "{}", sound.settings.text_encoder | change)
    one_line(error.value)


# Damage of every value


def nest(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


VALUES: dict[str, Any] = {
    "null": None,
    "a list": [1, "a", {}],
    "an object": {"a": 1},
    "true": True,
    "a text": "x",
    "an empty text": "",
    "escapes": TEXT,
    "a text of a megabyte": "a" * 10**6,
    "a path": "../../../etc",
    "zero": 0,
    "one below zero": -1,
    "10^15": 10**15,
    "2^63": 2**63,
    "10^4000": 10**4000,
    "1e400": float("inf"),
    "NaN": float("nan"),
    "1e30": 1e30,
    "a fraction": 0.5,
    "lists in lists": nest(400),
}
KINDS = [pytest.param(value, id=name) for name, value in VALUES.items()]


def places(content: Any, levels: int = 2) -> Iterator[list[Any]]:
    """The keys to every value of some JSON."""
    if isinstance(content, dict | list) and levels >= 0:
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield [key]
            for inner in places(value, levels - 1):
                yield [key, *inner]


def changed(content: Any, place: list[Any], value: Any) -> Any:
    copy = json.loads(json.dumps(content))
    target = copy
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return copy


def answers(folder: Path, text: bool = True) -> str:
    """All that an analyst can ask, as text."""
    index = probelog.open_index(folder)
    found: list[Any] = [index.models, index.logits, index.settings["encoder"]]
    if text:
        found += [index.search("dog", k=3), index.search("dog", negative="cat", where="downloads > 6")]
    found += [index.search(like="bob/one-logit#0", k=3), index.models_like("ada/resnet", k=3)]
    found += [index.show(repo) for repo in ("ada/resnet-again", "cleo/new")]
    found.append(len(index.thumbnail(1)))
    return repr(found)


@pytest.fixture(scope="module")
def expected() -> str:
    return answers(SOUND)


def survives(folder: Path, text: bool = True) -> str | None:
    """What an index answers, or None where it fails as it should; anything else but one line is raised."""
    try:
        return answers(folder, text)
    except ProbeLogError as error:
        one_line(error)
        return None


def open_table(folder: Path, generation: str, name: str) -> pa.Table:
    return lancedb.connect(folder / "generations" / generation).open_table(name).to_arrow()


def put_table(folder: Path, generation: str, name: str, table: pa.Table) -> None:
    lancedb.connect(folder / "generations" / generation).create_table(name, table, mode="overwrite")


def put_meta(folder: Path, generation: str, **values: bytes | None) -> None:
    """Replace values of a generation's ``meta`` table (None: remove)."""
    table = open_table(folder, generation, "meta")
    rows = dict(zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True))
    rows |= {key.replace("__", "."): value for key, value in values.items()}
    kept = {key: value for key, value in rows.items() if value is not None}
    put_table(
        folder,
        generation,
        "meta",
        pa.table({"key": [*kept], "value": pa.array([*kept.values()], pa.large_binary())}),
    )


def settings_of(folder: Path, generation: str = LIVE) -> dict[str, Any]:
    table = open_table(folder, generation, "meta")
    values = dict(zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True))
    content: dict[str, Any] = json.loads(values["settings"])
    return content


@pytest.mark.acceptance
@pytest.mark.parametrize("value", KINDS)
def test_every_value_of_the_pointer(value: Any, index: Path) -> None:
    expected = answers(SOUND, text=False)
    content = {key: item for key, item in POINTED.items() if key != "seal"}
    for place in places(content):
        odd = changed(content, place, value)
        (index / POINTER).write_bytes(sealed_json(odd))
        assert survives(index, text=False) in (None, expected), place
        # With the seal of the sound one it is damaged, whatever it says.
        (index / POINTER).write_text(json.dumps({**odd, "seal": POINTED["seal"]}, indent=1))
        with pytest.raises(StoreError, match="damaged"):
            probelog.open_index(index)


@pytest.mark.acceptance
@pytest.mark.parametrize("kind", VALUES)
def test_every_value_of_the_settings(kind: str, index: Path) -> None:
    """Each place has a third of the kinds, each kind a third of the places: all pairs are two thousand questions."""
    content = settings_of(index)
    value, number = VALUES[kind], [*VALUES].index(kind)
    for place in [*places(content)][number % 3 :: 3]:
        put_meta(index, LIVE, settings=json.dumps(changed(content, place, value)).encode())
        if place[0] == "image_encoder" or "made_with" in place[:-1]:
            # No answer below depends on these: they are looked at when the index is opened, or never (`test_image_settings`).
            try:
                probelog.open_index(index)
            except ProbeLogError as error:
                one_line(error)
        else:
            read = place[0] in ("prompts", "text_encoder", "sharpness", "confidence", "middle_offset")
            survives(index, text=read)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"3", b"null", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b'{"version": 1e400}',
     b'{"version": ' + b"9" * 5000 + b"}", b'"' + b"a" * 1_000_000 + b'"', b"\x1b[2J"],
    ids=lambda data: repr(data[:20]),
)  # fmt: skip
@pytest.mark.parametrize("key", ["settings", "background"])
def test_json_that_is_none(data: bytes, key: str, index: Path) -> None:
    put_meta(index, LIVE, **{key: data})
    with pytest.raises(ProbeLogError) as error:
        answers(index, text=key == "background")
    one_line(error.value)


def header(shape: str, kind: str = "<f4") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


ARRAYS: dict[str, Callable[[np.ndarray], bytes]] = {
    "one dimension": lambda array: npy(array.reshape(-1)),
    "no dimension": lambda array: npy(np.float32(1)),  # type: ignore[arg-type]
    "three dimensions": lambda array: npy(array[None]),
    "turned": lambda array: npy(np.ascontiguousarray(array.T)),
    "empty": lambda array: npy(array[:0]),
    "one row more": lambda array: npy(np.concatenate([array, array[:1]])),
    "one column less": lambda array: npy(array[..., :-1]),
    "NaN": lambda array: npy(np.full(array.shape, np.nan, np.float32)),
    "infinity": lambda array: npy(np.full(array.shape, np.inf, np.float32)),
    "1e30": lambda array: npy(np.full(array.shape, 1e30, np.float32)),
    "zeros": lambda array: npy(np.zeros(array.shape, array.dtype)),
    "negative": lambda array: npy(-np.abs(array) - 1),
    "texts": lambda array: npy(np.full(array.shape, "x")),
    "complex": lambda array: npy(array.astype(np.complex64)),
    "truth": lambda array: npy(array.astype(bool)),
    "dates": lambda array: npy(np.full(array.shape, np.datetime64("2026-01-01"))),
    "records": lambda array: npy(np.zeros(array.shape, "f4,f4")),
    "objects": lambda array: header("(1,)", "|O") + b"\x80\x04.",
    "a claim of 10^15 rows": lambda array: header("(1000000000000000, 16)"),
    "10^15 rows of nothing": lambda array: header("(1000000000000000, 0)"),
    "a negative shape": lambda array: header("(-1, 16)") + bytes(64),
    "a shape of texts": lambda array: header("('a',)"),
    "a header that is a program": lambda array: header("__import__('os').abort()"),
    "half": lambda array: npy(array)[: len(npy(array)) // 2],
    "nothing": lambda array: b"",
    "no array": lambda array: b"\x1b[2J" * 100,
}


@pytest.mark.acceptance
@pytest.mark.parametrize("damage", ARRAYS)
def test_every_array(damage: str, index: Path, sound: Generation) -> None:
    for key in (
        "basis.npy",
        "background_vectors.npy",
        "background_statistics.npy",
        "replaced.npy",
        "copies.npy",
    ):
        array = from_npy(sound.meta(key))
        put_meta(index, LIVE, **{key: ARRAYS[damage](array)})
        survives(index)
        put_meta(index, LIVE, **{key: sound.meta(key)})


COLUMNS: dict[str, Callable[[pa.ChunkedArray], Any]] = {
    "nulls": lambda column: pa.nulls(len(column), column.type),
    "below zero": lambda column: filled_with(column, -1),
    "largest": lambda column: filled_with(column, 2**31 - 1),
    "10^15": lambda column: filled_with(column, 10**15),
    "texts": lambda column: pa.array([TEXT] * len(column)),
    "a dictionary": lambda column: pa.array([TEXT] * len(column)).dictionary_encode(),
    "fractions": lambda column: pa.array([0.5] * len(column)),
    "lists": lambda column: pa.array([[1, None]] * len(column)),
    "records": lambda column: pa.array([{"a": None}] * len(column)),
    "lists of nulls": lambda column: pa.array([[None]] * len(column), column.type if pa.types.is_list(column.type) else pa.list_(pa.string())),
    "times beyond the calendar": lambda column: pa.array([2**62] * len(column), pa.int64()).cast(column.type if pa.types.is_timestamp(column.type) else pa.int64()),
    "long texts": lambda column: pa.array(["a" * 10**6] * len(column)),
}  # fmt: skip


def filled_with(column: pa.ChunkedArray, value: int) -> pa.Array:
    if not pa.types.is_integer(column.type):
        return pa.array([value] * len(column))
    most = 2 ** (column.type.bit_width - 1) - 1
    return pa.array([min(value, most)] * len(column), column.type)


@pytest.mark.acceptance
@pytest.mark.parametrize("damage", COLUMNS)
@pytest.mark.parametrize(
    ("generation", "name"), [(LIVE, "models"), (BASE, "models"), (BASE, "probes"), (LIVE, "meta")]
)
def test_every_column(damage: str, generation: str, name: str, index: Path) -> None:
    """Of models the update and its base have every other column each: one reader reads both."""
    table = open_table(index, generation, name)
    for place, column in enumerate(table.column_names):
        if name == "models" and (place + [*COLUMNS].index(damage) + (generation == LIVE)) % 2:
            continue
        odd = table.set_column(place, column, COLUMNS[damage](table[column]))
        with contextlib.suppress(RuntimeError):  # LanceDB does not write every column that it would read
            put_table(index, generation, name, odd)
        survives(index, text=name != "models")


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    edges = [
        Edge("a/child", "a/base", Relation.FINE_TUNED, 0.75, evidence={"distance": 0.25}),
        Edge("a/merge", "a/child", Relation.MERGE, 0.75, 0.5, True),
        Edge("a/merge", "latent:0123456789ab", Relation.MERGE, 0.75, 0.5, False, latent=True),
    ]
    models = [Model(repo, ("cat",)) for repo in ("a/base", "a/child", "a/merge")]
    folder = tmp_path_factory.mktemp("forest") / "index"
    build(Store(folder), models=models, images=False, edges=edge_table(edges))
    return folder


@pytest.mark.acceptance
@pytest.mark.parametrize("damage", COLUMNS)
def test_every_column_of_edges(damage: str, forest: Path) -> None:
    table = open_table(forest, "first", "edges")
    for place, column in enumerate(table.column_names):
        odd = table.set_column(place, column, COLUMNS[damage](table[column]))
        with contextlib.suppress(RuntimeError):
            put_table(forest, "first", "edges", odd)
        for ask in (
            lambda index: index.tree("a/child"),
            lambda index: index.edges("probability > 0.5 OR latent"),
            lambda index: index.licence_conflicts(),
        ):
            try:
                repr(ask(probelog.open_index(forest)))
            except ProbeLogError as error:
                one_line(error)
    put_table(forest, "first", "edges", table)


@pytest.mark.acceptance
@pytest.mark.parametrize(("generation", "name"), [(LIVE, "models"), (BASE, "models"), (BASE, "probes"), (LIVE, "meta"), (BASE, "logits"), (LIVE, "logits")])  # fmt: skip
def test_every_table(generation: str, name: str, index: Path, expected: str) -> None:
    """One without its rows, with each twice, in another order, with other columns, or none at all."""
    table = open_table(index, generation, name)
    backwards = table.take(list(range(len(table)))[::-1])
    for other in (table.slice(0, 0), pa.concat_tables([table, table]), backwards, pa.table({"x": [1]})):
        put_table(index, generation, name, other)
        assert survives(index) in (None, expected)
    folder = index / "generations" / generation / f"{name}.lance"
    shutil.rmtree(folder)
    with pytest.raises(StoreError) as error:
        answers(index)
    one_line(error.value)
    folder.write_bytes(b"")
    with pytest.raises(StoreError):
        answers(index)


@pytest.mark.acceptance
@pytest.mark.parametrize("generation", [LIVE, BASE])
def test_every_byte_of_the_logits(generation: str, index: Path, sound: Generation) -> None:
    """Each field of the facts holds the largest, the least, and what is no number."""
    table = open_table(index, generation, "logits")
    kind = sound._facts
    rows = np.frombuffer(b"".join(table["facts"].to_pylist()), kind)
    for name in kind.names or ():
        for pattern in (0x00, 0x7F, 0x80, 0xFF):
            odd = rows.copy()
            odd[name] = np.frombuffer(bytes([pattern]) * odd[name].nbytes, odd[name].dtype).reshape(
                odd[name].shape
            )
            column = pa.array([row.tobytes() for row in odd], pa.binary(kind.itemsize))
            put_table(index, generation, "logits", table.set_column(1, "facts", column))
            survives(index, text=False)
    for odd_column in (
        pa.array([b"x"] * len(table), pa.binary(1)),
        pa.nulls(len(table), pa.binary(kind.itemsize)),
        pa.array([b"x" * kind.itemsize] * len(table), pa.binary()),
        pa.array([1] * len(table)),
    ):
        put_table(index, generation, "logits", table.set_column(1, "facts", odd_column))
        with pytest.raises(StoreError) as error:
            answers(index, text=False)
        one_line(error.value)


@pytest.mark.acceptance
@pytest.mark.parametrize("seed", range(40))
def test_any_byte_of_any_file(seed: int, index: Path) -> None:
    random = np.random.default_rng(seed)
    files = sorted(file for file in index.rglob("*") if file.is_file() and file.stat().st_size)
    for file in random.choice(np.array(files, object), 8):
        data = bytearray(file.read_bytes())
        kept = bytes(data)
        for place in random.integers(0, len(data), 1 + seed % 5):
            data[place] = random.integers(256)
        file.write_bytes(data[: random.integers(len(data))] if seed % 4 == 0 else data)
        survives(index, text=False)
        file.write_bytes(kept)


# One by one, as an analyst meets them on the command line


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return python("from probelog.cli import main; main()", *map(str, arguments))


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100, check=False
    )


# Commands that one process runs, one after the other: half of each one's time goes into imports.
EACH = """
import contextlib, io, json, sys
from probelog.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main()
    print(json.dumps([out.getvalue(), err.getvalue()]))
"""


def put_pointer(index: Path, **values: Any) -> None:
    content = {key: item for key, item in POINTED.items() if key != "seal"}
    (index / POINTER).write_bytes(sealed_json({**content, **values}))


@pytest.mark.parametrize(
    "name",
    ["a" * 1_000_000, "/.rs:" * 200_000, TEXT, "../../../etc", "/etc", "a/../../..", ".", "", "x" * 101, 3, ["a"]],
    ids=lambda name: repr(name)[:20],
)  # fmt: skip
def test_a_generations_name(name: object, index: Path) -> None:
    for values in ({"generation": name}, {"base": name}, {"retired": {str(name) + "/": "t"}}):
        put_pointer(index, **values)
        started = time.process_time()
        with pytest.raises(ProbeLogError) as error:
            probelog.open_index(index)
        one_line(error.value)
        assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "text",
    ["/" * 10**6, "a/" * 10**6, "x" * 10**6 + ".rs:1", ", /" * 10**6, TEXT * 10**5],
    ids=lambda text: repr(text[:6]),
)
def test_messages_are_cleaned_in_no_time(text: str) -> None:
    """A pattern over the messages of LanceDB took the square of their length: a name of 1 MB took hours."""
    started = time.process_time()
    cleaned = first_line(ValueError(text))
    assert len(cleaned) <= 300
    assert cleaned.isprintable()
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "change",
    [
        {"base": [1]}, {"base": "x"}, {"rows": 10**15}, {"rows": -1}, {"version": 1e400}, {"version": [1]},
        {"models": 10**15}, {"probes": 10**15}, {"probes": 0}, {"sharpness": 1e299},
        {"sharpness": 10**4000}, {"middle_offset": 1e400}, {"prompts": ["a {}"] * 10**5}, {"prompts": ["a" * 10**6]},
        {"drift": nest(400)}, {"confidence": {"intercept": 1e400}}, {"confidence": TEXT}, {"text_encoder": {TEXT: 1}},
        {"base": {"generation": LIVE, "models": 4, "rows": 4}}, {"base": {"generation": "../..", "models": 1, "rows": 1}},
    ],
    ids=lambda change: repr(change)[:40],
)  # fmt: skip
def test_a_setting(change: dict[str, Any], index: Path) -> None:
    put_meta(index, LIVE, settings=json.dumps(settings_of(index) | change).encode())
    with pytest.raises(ProbeLogError) as error:
        answers(index)
    one_line(error.value)


@pytest.mark.parametrize(
    "damage", ["one dimension", "NaN", "a claim of 10^15 rows", "objects", "a header that is a program"]
)
def test_a_basis(damage: str, index: Path, sound: Generation) -> None:
    put_meta(index, LIVE, basis__npy=ARRAYS[damage](from_npy(sound.meta("basis.npy"))))
    with pytest.raises(StoreError, match=r"damaged \(basis.npy\)") as error:
        answers(index, text=False)
    one_line(error.value)


def test_a_value_that_is_a_number(index: Path) -> None:
    """``bytes(10**15)`` would be a petabyte of zeros."""
    table = open_table(index, LIVE, "meta")
    put_table(index, LIVE, "meta", table.set_column(1, "value", pa.array([10**15] * len(table))))
    with pytest.raises(StoreError, match="its value is int64 in place of large_binary"):
        probelog.open_index(index)


@pytest.mark.acceptance
def test_terminal_escapes_reach_no_terminal(index: Path) -> None:
    """Keys and values of settings, labels, names and messages."""
    content = settings_of(index)
    odd_settings = {**content, "encoder": TEXT, TEXT: TEXT, "method": TEXT}
    put_meta(index, LIVE, settings=json.dumps(odd_settings).encode())
    for generation in (LIVE, BASE):
        table = open_table(index, generation, "models")
        for name in ("architecture", "library", "licence", "head", "sha"):
            table = table.set_column(table.column_names.index(name), name, pa.array([TEXT] * len(table)))
        labels = pa.array([[TEXT] * 3] * len(table))
        table = table.set_column(table.column_names.index("labels"), "labels", labels)
        put_table(index, generation, "models", table)
    asked = (["info"], ["show", "cleo/new"], ["search", "dog"], ["search", "--model", "cleo/new"])
    lists = [[*words, *option, "--index", str(index)] for words in asked for option in ([], ["--json"])]
    done = python(EACH, json.dumps(lists))
    assert (done.returncode, done.stderr) == (0, "")
    answered = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answered) == len(lists)
    for out, err in answered:
        assert out, err
        assert all(char.isprintable() or char == "\n" for char in out + err)
    failing = command("search", "dog", "--index", index, "--like", "cleo/new#9")
    assert (failing.returncode, failing.stderr.count("\n")) == (2, 1)


def test_a_command_ends_with_one_line(index: Path) -> None:
    put_meta(index, LIVE, text_encoder__onnx=filled(float("nan"), 1, 16))
    done = command("search", "dog", "--index", index)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "gives numbers that are not finite" in done.stderr


# Files of a folder that somebody else made


def test_a_pipe_among_the_files(index: Path) -> None:
    for name in ("logits", "models", "meta"):
        manifest = next((index / "generations" / LIVE / f"{name}.lance" / "_versions").glob("*.manifest"))
        kept = manifest.read_bytes()
        manifest.unlink()
        os.mkfifo(manifest)
        with pytest.raises(StoreError, match="no plain file"):
            probelog.open_index(index)
        manifest.unlink()
        manifest.write_bytes(kept)
    (index / POINTER).unlink()
    os.mkfifo(index / POINTER)
    with pytest.raises(ProbeLogError):
        probelog.open_index(index)


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "../../../../../etc/passwd", "{outside}"])
def test_links_out_of_the_index(target: str, index: Path, tmp_path: Path) -> None:
    outside = shutil.copytree(index, tmp_path / "outside") / "generations" / LIVE / "models.lance"
    models = index / "generations" / LIVE / "models.lance"
    for entry in (
        next((models / "data").iterdir()),
        next((models / "_versions").glob("*.manifest")),
        models,
    ):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
        entry.symlink_to(target.format(outside=outside))
        with pytest.raises(StoreError, match="leads out of the index"):
            probelog.open_index(index)
        if entry != models:
            entry.unlink()


def test_a_link_inside_the_index_is_followed(index: Path, expected: str) -> None:
    folder = index / "generations" / BASE
    folder.rename(index / "elsewhere")
    folder.symlink_to("../elsewhere")
    data = next((index / "elsewhere" / "models.lance" / "data").iterdir())
    data.rename(index / "data")
    data.symlink_to(index / "data")
    assert answers(index) == expected


@pytest.mark.parametrize("generation", [LIVE, BASE])
def test_a_table_whose_data_lie_elsewhere(generation: str, index: Path, tmp_path: Path) -> None:
    """Lance's manifests can name another folder as the place of their data."""
    elsewhere = shutil.copytree(index, tmp_path / "elsewhere") / "generations" / generation / "models.lance"
    shutil.rmtree(index / "generations" / generation / "models.lance")
    lancedb.connect(index / "generations" / generation).clone_table("models", str(elsewhere))
    with pytest.raises(StoreError, match="data lie elsewhere"):
        probelog.open_index(index)


@pytest.mark.acceptance
def test_a_panic_in_the_library(index: Path) -> None:
    """Some bytes of a table make LanceDB panic, and write about it to the terminal."""
    random = np.random.default_rng(0)
    manifest = next((index / "generations" / LIVE / "meta.lance" / "_versions").glob("*.manifest"))
    sound = manifest.read_bytes()
    for place in random.permutation(len(sound)):
        manifest.write_bytes(sound[:place] + bytes([sound[place] ^ 0xFF]) + sound[place + 1 :])
        try:
            probelog.open_index(index)
        except StoreError as error:
            one_line(error)
            if "panicked" in str(error):
                break
    else:
        pytest.fail("no byte makes it panic any more")
    done = command("info", "--index", index)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr[:-1].isprintable()
