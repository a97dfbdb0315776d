"""Code that runs inside a model's process: it spoils that model's own result, and nothing else.

The code travels in a model's weights and runs where any model runs (`tests.support.hub.rogue_models.Scripted`).
"""

from __future__ import annotations

import inspect
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probelog.encoders.torch_encoder import load_encoder
from probelog.errors import FailureReason, ItemFailure
from probelog.probes.probe_set import make_probe_set
from probelog.sandbox.fork_server.client import ForkServer, ProcessLostError
from probelog.sandbox.process import ModelProcess, PlanCache, fork_server
from probelog.sandbox.spec import ProcessSpec, downloads_folder, home_folder, pixels_folder
from probelog.storage.store import Store
from tests.redteam import payloads
from tests.redteam.surroundings import server_places, surroundings
from tests.support.hub.rogue_models import write_scripted
from tests.support.worlds import tiny_encoders
from tests.support.worlds.tiny_world import write_probes

pytestmark = pytest.mark.acceptance

PROBES = range(20)
# How a guard says no: by the kernel's refusal, and once each by an absent token, memory's end, threads' end, and the two
# payloads that look for something and find nothing.
REFUSALS = (
    r"PermissionError: \[Errno (1|13)\]", r"OSError: \[Errno (22|25|38)\]", "KeyError: 'HF_TOKEN'", "MemoryError",
    "RuntimeError: can't start new thread", "none", "nowhere",
)  # fmt: skip
PAYLOADS: dict[str, Callable[[payloads.Places], Any]] = {
    name: function
    for name, function in vars(payloads).items()
    if inspect.isfunction(function) and name != "call"
}


@dataclass
class Field:
    """A worker's processes, and the model that a sound repository holds."""

    scratch: Path
    server: ForkServer
    spec: ProcessSpec
    process: ModelProcess
    sound: Path
    right: np.ndarray[Any, Any]
    places: payloads.Places = field(default_factory=dict)

    def program(self, text: str, timeout: float = 60) -> str:
        """Run a program in a model's process; what it found."""
        folder = downloads_folder(self.scratch) / "rogue"
        shutil.rmtree(folder, ignore_errors=True)
        write_scripted(folder, text)
        with pytest.raises(ItemFailure) as failure:
            self.observe(folder, timeout)
        return failure.value.detail

    def observe(self, folder: Path, timeout: float = 60) -> np.ndarray[Any, Any]:
        """A model's logits, as a worker has them."""
        try:
            loaded = self.process.load(folder, "some/model", "0" * 40, timeout)
            self.process.prepare(PROBES, timeout)
            return self.process.observe(PROBES, int(loaded.facts["logits"]), timeout).values
        finally:
            self.process.release()

    def check(self) -> None:
        """A sound model that comes afterwards gets its own logits, in time."""
        np.testing.assert_array_equal(self.observe(self.sound), self.right)


@pytest.fixture(scope="module")
def battle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    root = tmp_path_factory.mktemp("redteam")
    write_probes(root / "probes.parquet", len(PROBES))
    store = Store(root / "store")
    encoder = load_encoder(str(tiny_encoders.folder("clip")))
    probe_set = make_probe_set(str(root / "probes.parquet"), None, 0, store, encoder)
    scratch = root / "scratch"
    with surroundings(root, scratch, "models") as places:
        server = fork_server(scratch, ["tests.support.hub.rogue_models"])
        spec = ProcessSpec(
            probes=store.uri, probe_set=probe_set.hash, scratch=str(scratch), cache_bytes=10**8,
            batch_size=64, precision="float32", max_params=10**9, allow_pickle=False, memory_bytes=10**9,
        )  # fmt: skip
        process = ModelProcess(server, spec, PlanCache())
        downloads = downloads_folder(scratch)
        sound = downloads / "sound"
        for folder in (sound, downloads / "gated"):
            write_scripted(folder, "found = None")
        made = Field(scratch, server, spec, process, sound, np.empty(0))
        made.right = made.observe(sound)
        made.places = places | server_places(scratch) | {"pixels": str(pixels_folder(scratch))}
        yield made
        process.close()
        server.close()


def source(name: str, places: payloads.Places) -> str:
    """A payload as a program: what it achieved, or the refusal."""
    return (
        f"from typing import Any\nPlaces = dict\n{inspect.getsource(payloads.call)}\n{inspect.getsource(PAYLOADS[name])}\n"
        f"try:\n    result = {name}({places!r})\n"
        "    found = f'refused: {result}' if isinstance(result, OSError) else f'DONE: {result!r}'\n"
        "except BaseException as error:\n    found = f'refused: {type(error).__name__}: {error}'[:300]\n"
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the payloads' system calls are those of x86-64")
@pytest.mark.parametrize("name", PAYLOADS)
def test_from_inside(battle: Field, name: str) -> None:
    """It gets nothing, and a sound model that comes afterwards gets its own logits."""
    found = battle.program(source(name, battle.places))
    assert re.search(rf"found: refused: ({'|'.join(REFUSALS)})", found), found
    battle.check()


def test_the_same_payloads_succeed_without_the_guards(battle: Field) -> None:
    """Here, where nothing is confined, most of them do what they came for: they do test the guards."""
    harmless = ["read_the_checkout", "read_a_file_of_the_current_folder", "read_the_key_of_the_server", "make_a_pair_of_sockets",
                "list_sockets_of_the_machine", "read_a_token_in_the_environment", "read_the_environment_of_the_worker",
                "list_the_downloads_of_others", "read_the_download_of_another", "change_a_mode", "change_times",
                "signal_the_worker", "signal_the_parent", "make_memory_files", "map_shared_memory", "connect_to_a_port",
                "connect_to_the_server_that_forks", "connect_to_an_abstract_socket", "claim_pixels", "lock_pixels",
                "write_pixels", "run_a_shell", "take_pages_that_are_kept_for_others", "watch_files",
                "open_files_beyond_the_limit_by_a_thread"]  # fmt: skip
    for name in harmless:
        places = dict(battle.places)
        result = PAYLOADS[name](places)
        assert result not in ([], "none"), name


# What it may say


LIES: dict[str, str] = {
    # half an answer, endless ones, and none
    "half a length": "os.write(channel, b'\\x10\\x00')",
    "a length and one byte": "os.write(channel, struct.pack('<II', 1000, 0) + b'{')",
    "a trickle": "[(os.write(channel, b' '), time.sleep(0.05)) for _ in [os.write(channel, struct.pack('<II', 10**6, 0))] * 10**6]",
    "an object without end": "os.write(channel, struct.pack('<II', 2**32 - 1, 0))",
    "many empty strings": "os.write(channel, struct.pack('<II', 2, 2**32 - 1)); [os.write(channel, bytes(2**16)) for _ in range(10**4)]",
    "a string of 16 exabytes": "os.write(channel, struct.pack('<IIQ', 2, 1, 2**64 - 1) + b'{}')",
    "no JSON": "say(b'[1, 2')",
    "a list": "say(b'[1, 2]')",
    "deep JSON": "say(b'[' * 10**6)",
    "a number of 10,000 digits": "say(b'{\"number\": ' + b'1' * 10**4 + b'}')",
    "NaN": "say(b'{\"number\": 2, \"batch_size\": NaN}')",
    "an answer to another question": "say(answer(number=4), logits)",
    "the answer of the load again": "say(json.dumps({'number': 2, 'facts': {}, 'weights': []}).encode(), b'')",
    # facts that no process of ours would give
    "logits that are not finite": "say(answer(), numpy.full(3 * 20, numpy.nan, numpy.float32).tobytes())",
    "too few logits": "say(answer(), logits[:-4])",
    "too many logits": "say(answer(), logits + bytes(4))",
    "two strings": "say(answer(), logits, logits)",
    "a batch of 10^30": "say(answer(batch_size=10**30), logits)",
    "a batch that is a word": "say(answer(batch_size='64'), logits)",
    "an unknown precision": "say(answer(precision='\\x1b[31m'), logits)",
    "a reason of its worker's": "say(answer(failure='store-failed', detail='x'))",
    "a reason that does not exist": "say(answer(failure='nonsense', detail='x'))",
    "a reason that is a list": "say(answer(failure=['internal'], detail='x'))",
    "a detail of 20 MB": "say(answer(failure='internal', detail='x' * 20_000_000))",
    "a traceback of 20 MB": "say(answer(failure='internal', detail='x', traceback='\\x1b[31m' * 4_000_000))",
}  # fmt: skip

_TALK = """
import json, os, stat, struct, time
import numpy

def _is_socket(number):
    try:
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        return False

channel = next(number for number in range(3, 1024) if _is_socket(number))
os.set_blocking(channel, True)
logits = numpy.ones(3 * 20, numpy.float32).tobytes()

def answer(**changes):
    said = {'number': 3, 'batch_size': 20, 'precision': 'float32', 'plan': None, **changes}
    return json.dumps(said).encode()

def say(text, *strings):
    sizes = b''.join(struct.pack('<Q', len(one)) for one in strings)
    data = struct.pack('<II', len(text), len(strings)) + sizes + text + b''.join(strings)
    while data:
        data = data[os.write(channel, data):]
"""


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_no_sound_process_gives(
    battle: Field, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a failure of that model within its time, of bounded length; a model that comes afterwards is right."""
    folder = downloads_folder(battle.scratch) / "rogue"
    shutil.rmtree(folder, ignore_errors=True)
    write_scripted(folder, f"{_TALK}\n{LIES[lie]}\ntime.sleep(600)\n")
    begun = time.monotonic()
    with pytest.raises(ItemFailure) as failure:
        battle.observe(folder, timeout=5)
    assert failure.value.reason in (FailureReason.INTERNAL, FailureReason.TIMEOUT)
    assert len(failure.value.detail) < 3000
    assert time.monotonic() - begun < 60
    assert len(caplog.text) < 100_000
    battle.check()


def test_its_own_logits_are_its_own_to_choose(battle: Field) -> None:
    """What the lies above would be without what is wrong with them."""
    folder = downloads_folder(battle.scratch) / "rogue"
    shutil.rmtree(folder, ignore_errors=True)
    write_scripted(folder, f"{_TALK}\nsay(answer(), logits)\ntime.sleep(600)\n")
    assert (battle.observe(folder) == 1).all()
    battle.check()


def test_answers_too_many_are_not_those_of_later_models(battle: Field) -> None:
    folder = downloads_folder(battle.scratch) / "rogue"
    shutil.rmtree(folder, ignore_errors=True)
    write_scripted(folder, f"{_TALK}\n[say(answer(number=n), logits) for n in range(1, 50)]\nfound = 'x'\n")
    with pytest.raises(ItemFailure, match="another question"):
        battle.observe(folder)
    battle.check()


FACTS: dict[str, Any] = {
    "logits": [0, -1, 10**9, "3", 3.0, True, None],
    "labels": [
        [],
        ["a", "b"],
        ["a", "b", 3],
        ["a", "b", "\x1b[31mc"],
        ["a", "b", "c" * 301],
        "abc",
        {"0": "a"},
    ],
    "head": ["none", None, []],
    "library": ["tensorflow", None, 1, ["timm"]],
    "architecture": ["a" * 301, "\x1b]0;x", None, 7],
    "parameters": [-1, 10**30, 1.5, None],
    "recipe": ["r" * 100_000, None, {}],
    "dtype": ["d" * 31, None],
    "device": ["tpu", None],
    "weight_digest": ["g" * 64, "", None, "0" * 1000],
    "weight_mean": [None, "0", 1e300],
    "weight_std": [-1.0, None],
    "identity": ["", "0" * 15, "X" * 16, None],
    "name_or_path": [1, "\x00", "n" * 301],
    "seconds_load": [-1.0, 1e30, "1", None],
}


@pytest.mark.parametrize("fact", FACTS)
def test_facts_that_no_sound_process_gives(battle: Field, fact: str) -> None:
    """Checked one by one; the same facts unchanged are believed."""
    from probelog.models.config import LoadLimits
    from probelog.sandbox import answers
    from probelog.sandbox.checks import AnswerError

    facts = battle.process.load(battle.sound, "some/model", "0" * 40, 60).facts
    battle.process.release()
    limits = LoadLimits(max_parameters=10**9)
    assert answers.facts(facts, limits) == facts
    for value in FACTS[fact]:
        with pytest.raises(AnswerError):
            answers.facts({**facts, fact: value}, limits)
    if fact != "name_or_path":  # most models have none
        with pytest.raises(AnswerError):
            answers.facts({name: value for name, value in facts.items() if name != fact}, limits)


# What it does to itself


SELF: dict[str, tuple[str, type[Exception], str]] = {
    "ends itself": ("import os; os._exit(0)", ProcessLostError, "status 0"),
    "kills itself": ("import os; os.kill(os.getpid(), 9)", ProcessLostError, "SIGKILL"),
    "crashes": ("import ctypes; ctypes.string_at(0)", ProcessLostError, "SIGSEGV"),
    "hangs": ("while True: pass", ItemFailure, "timeout"),
    "ignores signals and hangs": (
        "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; time.sleep(600)",
        ItemFailure, "timeout",
    ),
    "closes its channel and hangs": (
        "import os, time; os.closerange(3, 100); time.sleep(600)", ProcessLostError, "SIGKILL",
    ),
}  # fmt: skip


@pytest.mark.parametrize("deed", SELF)
def test_what_it_does_to_itself(battle: Field, deed: str) -> None:
    program, error, text = SELF[deed]
    folder = downloads_folder(battle.scratch) / "rogue"
    shutil.rmtree(folder, ignore_errors=True)
    write_scripted(folder, program)
    with pytest.raises(error, match=text):
        battle.observe(folder, timeout=5)
    battle.check()


POISON: dict[str, str] = {
    "a patched operator": "import torch; torch.nn.functional.linear = torch.nn.Linear.forward = lambda *_: 1 / 0",
    "a patched loader": "import safetensors.torch as s, timm; s.load_file = timm.create_model = lambda *a, **k: 1 / 0",
    "other defaults": "import torch; torch.set_default_dtype(torch.float16); torch.set_grad_enabled(True)",
    "weights that stay": "import builtins, torch; builtins.sum = max; torch.manual_seed(7)",
    "a thread that goes on": (
        "import threading, time\nthreading.Thread(target=lambda: time.sleep(100), daemon=False).start()"
    ),
}  # fmt: skip


@pytest.mark.parametrize("poison", POISON)
def test_what_it_leaves_behind(battle: Field, poison: str) -> None:
    """Nothing: the next model meets a process that no model ran in."""
    battle.program(f"{POISON[poison]}\nfound = 'x'")
    battle.check()


def test_a_pretended_plan_slows_few_others(battle: Field) -> None:
    """What is learnt about a kind of model comes from processes of models."""
    folder = downloads_folder(battle.scratch) / "rogue"
    shutil.rmtree(folder, ignore_errors=True)
    plan = {
        "batch_size": 10**9,
        "measured": True,
        "variant": {"layout": "\x1b", "precision": "int1"},
        "untried": [],
    }
    write_scripted(
        folder, f"{_TALK}\nsay(answer(plan=json.loads({json.dumps(plan)!r})), logits)\ntime.sleep(600)\n"
    )
    battle.observe(folder)
    battle.check()


def test_nothing_is_left(battle: Field) -> None:
    """No process of the server's, no file of a model's, and a log of bounded length."""
    from tests.probelog.sandbox.fork_server.test_client import children_of
    from tests.support.processes.processes import eventually

    battle.process.close()
    assert eventually(lambda: not children_of(battle.server.pid))
    written = [path for path in battle.scratch.rglob("*") if path.is_file() and "loot" in path.name]
    assert not written
    assert sum(path.stat().st_size for path in home_folder(battle.scratch).glob("*.log")) < 100_000
