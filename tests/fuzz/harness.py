"""Damaged inputs for whatever parses what others wrote, and what must hold of each: only errors that are declared.

A target is a function of some bytes, and a folder of good examples in ``tests/fuzz/corpus``. Inputs are examples with a
few changes: to the bytes, and where an example is JSON to its values too. The time and the memory that one input takes
are bounded.
"""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"

Run = Callable[[bytes, Path], object]

#: What one input may take, in seconds of the processor: far more than any takes, far less than what an attack would be after.
MOST_SECONDS = 10.0
MOST_MEBIBYTES = 700

# Values where parsers go wrong: bounds of types, numbers beyond them, other types, escapes, names of code and files.
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 255, 256, 65535, 65537, 2**31 - 1, 2**31, 2**53 + 1, 10**18 - 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1,
    10**30, 10**400, -(10**400), 0.0, -0.0, 0.5, 1e-320, 1e300, 1e400, -1e400, float("nan"), "", " ", "0", "-1", "1e9", "x", "\x00", "\x1b[31m",
    "\ud800", "\u202e", "é" * 50, "9" * 5000, "a" * 70_000, "../../etc/passwd", "/etc/passwd", "os.system", "__class__",
    "2026-01-01T00:00:00.000Z", "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+14:00", [], {}, [[]], [{}], {"": None}, [0] * 20,
    [1, 2, 3], {"0": "a"}, {"__proto__": 1}, [[[[[[[[]]]]]]]],
]  # fmt: skip
_TOKENS = [
    b"", b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r\n", b"\r\n\r\n", b" ", b"\t", b"\"", b"{", b"}", b"[" * 1000,
    b"{\"a\":" * 500, b"]", b",", b":", b"NaN", b"-Infinity", b"1e999", b"1" * 400, b"1" * 5000, b"9223372036854775808", b"-1", b"-0", b"\\ud800",
    b"\\u0000", b"%s%n", b"%00", b"../", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff\xff\xff\xff\xff", b"A" * 10_000,
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """``run`` gets an input and an empty folder; ``declared`` is what it may raise. ``tokens`` are put into inputs too."""

    name: str
    run: Run
    declared: tuple[type[Exception], ...]
    tokens: tuple[bytes, ...] = ()

    def examples(self) -> list[bytes]:
        """The corpus."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).iterdir())]


TARGETS: dict[str, Target] = {}


def target(*declared: type[Exception], tokens: tuple[bytes, ...] = ()) -> Callable[[Run], Run]:
    """Make a function a target, called as itself with hyphens. Its examples are in the corpus' folder of that name."""

    def register(run: Run) -> Run:
        name = run.__name__.replace("_", "-")
        TARGETS[name] = Target(name, run, declared, tokens)
        return run

    return register


@st.composite
def inputs(draw: st.DrawFn, examples: list[bytes], tokens: tuple[bytes, ...]) -> bytes:
    """An example with up to five changes."""
    data = draw(st.sampled_from(examples))
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    changes = draw(st.integers(0, 5))
    if isinstance(value, dict | list) and draw(st.integers(0, 3)):
        for _ in range(changes):
            value = _other_value(draw, value)
        return json.dumps(value).encode()
    for _ in range(changes):
        data = _other_bytes(draw, data, tokens)
    return data


def _other_value(draw: st.DrawFn, value: Any) -> Any:
    """The value with one change somewhere below it."""
    value = copy.deepcopy(value)
    boxes = [box for box in _boxes(value) if box]
    if not boxes:
        return draw(st.sampled_from(_VALUES))
    box = draw(st.sampled_from(boxes))
    key = draw(st.sampled_from(list(box) if isinstance(box, dict) else range(len(box))))
    change = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "copy", "rename", "grow"]))
    if change == "replace":
        box[key] = copy.deepcopy(draw(st.sampled_from(_VALUES)))
    elif change == "remove":
        del box[key]
    elif change == "wrap":
        box[key] = [box[key]]
    elif change == "copy":
        box[key] = copy.deepcopy(draw(st.sampled_from(boxes)))
    elif change == "rename" and isinstance(box, dict):
        new = draw(st.sampled_from([item for item in _VALUES if isinstance(item, str)]))
        box[new] = box.pop(key)
    elif isinstance(box[key], int | float) and not isinstance(box[key], bool):
        box[key] = box[key] * draw(st.sampled_from([-1, 0, 2, 1000, 2**31, 10**12]))
    elif isinstance(box[key], list):
        box[key] = box[key] * draw(st.sampled_from([2, 100]))
    return value


def _boxes(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for item in list(value.values() if isinstance(value, dict) else value):
            yield from _boxes(item)


def _other_bytes(draw: st.DrawFn, data: bytes, tokens: tuple[bytes, ...]) -> bytes:
    """The bytes with one change somewhere."""
    starts = [0, *(place + 1 for place, byte in enumerate(data) if byte == 10)]
    begin = draw(st.one_of(st.integers(0, len(data)), st.sampled_from(starts)))
    end = min(len(data), begin + draw(st.sampled_from([0, 0, 1, 1, 2, 4, 8, 64, 10**6])))
    new = draw(st.one_of(st.sampled_from([*_TOKENS, *tokens]), st.binary(max_size=8)))
    if draw(st.booleans()):
        return data[:begin] + new + data[end:]
    lines = data.split(b"\n")
    one, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
    lines[one:one] = [lines[other]]
    return b"\n".join(lines)


def check(target: Target, data: bytes) -> None:
    """Run a target on one input.

    Raises:
        AssertionError: it took too long or too much memory.
        Exception: what the target does not declare.
    """
    _forget_peak()
    before, started = _peak(), time.process_time()  # the machine may be another's meanwhile
    _run(target, data)
    seconds, grown = time.process_time() - started, _peak() - before
    assert seconds < MOST_SECONDS, f"took {seconds:.1f} s"
    assert grown < MOST_MEBIBYTES, f"took {grown} MiB"


def _run(target: Target, data: bytes) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="probelog-fuzz-") as folder,
        contextlib.suppress(*target.declared),
    ):
        target.run(data, Path(folder))


def _forget_peak() -> None:
    """Let the most memory that this process ever had be what it has now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most memory that this process had, in MiB; elsewhere than on Linux since its beginning."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20


def fuzz(target: Target, examples: int, number: int | None = None) -> None:
    """Try so many inputs; the same ones for the same ``number`` (None: always the same).

    Raises:
        BaseException: of the smallest input that fails; a note says which.
    """
    corpus = target.examples()
    for data in corpus:  # first without bounds: what is imported counts for nobody
        _run(target, data)
    for data in corpus:
        check(target, data)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=number is None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(inputs(corpus, target.tokens))
    def one(data: bytes) -> None:
        try:
            check(target, data)
        except Exception as error:
            error.add_note(f"input of {target.name}: {data!r}")
            raise

    (one if number is None else seed(number)(one))()
