"""Code that runs inside a generator's process: it spoils that generator's own samples, and nothing else.

The guards are those of classifiers, but the server that forks these processes is another one, with rights of its own.
"""

from __future__ import annotations

import inspect
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probelog.errors import ItemFailure
from probelog.sandbox.fork_server.client import ForkServer, ProcessLostError
from probelog.sandbox.generators import GeneratorProcess, generator_server
from probelog.sandbox.spec import GeneratorSpec, downloads_folder
from tests.redteam import payloads
from tests.redteam.surroundings import server_places, surroundings
from tests.redteam.test_model_process import PAYLOADS, REFUSALS
from tests.support.hub.rogue_generators import PROGRAM
from tests.support.worlds import tiny_generators

pytestmark = [pytest.mark.acceptance, pytest.mark.xdist_group("rogue generators")]  # they share a server

# These leave a process without memory or threads for others: they come last.
LAST = [name for name in PAYLOADS if name.startswith(("allocate", "start_threads", "fill_memory", "stretch"))]
# No pixels lie anywhere that generators could want.
TRIED = [name for name in PAYLOADS if "pixels" not in name and name not in LAST] + LAST
REFUSED = rf"refused: ({'|'.join(REFUSALS)})"
NUMBERS = range(3)


@dataclass
class Field:
    """A worker's process for generators, a sound adapter with its base, and what it makes."""

    scratch: Path
    server: ForkServer
    process: GeneratorProcess
    places: payloads.Places = field(default_factory=dict)
    right: np.ndarray[Any, Any] = field(default_factory=lambda: np.empty(0))

    @property
    def downloads(self) -> Path:
        return downloads_folder(self.scratch)

    def sample(self, name: str, timeout: float = 60) -> np.ndarray[Any, Any]:
        """An adapter's samples and its base's, as a worker has them."""
        try:
            self.process.load(
                self.downloads / name, "some/adapter", "0" * 40, timeout, self.downloads / "base"
            )
            made = self.process.sample(NUMBERS, timeout)
            assert made.base is not None
            return np.stack([made.pixels, made.base])
        finally:
            self.process.release()

    def rogue(self, program: str) -> str:
        """The sound adapter's repository with a program."""
        shutil.rmtree(self.downloads / "rogue", ignore_errors=True)
        shutil.copytree(self.downloads / "sound", self.downloads / "rogue")
        (self.downloads / "rogue" / PROGRAM).write_text(program)
        return "rogue"

    def check(self) -> None:
        """A sound adapter of the same base that comes afterwards makes what it made before."""
        np.testing.assert_array_equal(self.sample("sound"), self.right)


@pytest.fixture(scope="module")
def battle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    root = tmp_path_factory.mktemp("rogue-generators")
    scratch = root / "scratch"
    with surroundings(root, scratch, "generators") as places:
        server = generator_server(scratch, ["tests.support.hub.rogue_generators"])
        process = GeneratorProcess(server, GeneratorSpec(steps=2, memory_bytes=10**9))
        made = Field(scratch, server, process)
        downloads = made.downloads
        tiny_generators.text_to_image(downloads / "base")
        tiny_generators.adapter(downloads / "sound", downloads / "base", "peft")
        shutil.copytree(downloads / "sound", downloads / "gated")
        (downloads / "gated/config.json").write_text("{}")
        made.right = made.sample("sound")
        made.places = places | server_places(scratch) | {"pixels": str(root / "nowhere")}
        yield made
        process.close()
        server.close()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the payloads' system calls are those of x86-64")
def test_from_inside(battle: Field) -> None:
    """None of what code in a classifier's process tries comes off in an adapter's, one after the other in one process."""
    sources = [inspect.getsource(one) for one in (payloads.call, *(PAYLOADS[name] for name in TRIED))]
    program = f"""
import re
from typing import Any
Places = dict
{"".join(sources)}
def stay_at_home(at):
    return "of course"
came_off = {{}}
for name in [*{TRIED!r}, "stay_at_home"]:
    try:
        result = globals()[name]({battle.places!r})
        said = f"refused: {{result}}" if isinstance(result, OSError) else f"DONE: {{result!r}}"
    except BaseException as error:
        said = f"refused: {{type(error).__name__}}: {{error}}"
    if not re.match({REFUSED!r}, said):
        came_off[name] = said[:100]
found = f"these came off: {{came_off}}"
"""
    with pytest.raises(ItemFailure) as failure:
        battle.sample(battle.rogue(program))
    assert failure.value.detail == "found: these came off: {'stay_at_home': \"DONE: 'of course'\"}"
    assert len(TRIED) > 60
    battle.check()


@pytest.mark.parametrize(
    ("program", "error", "text"),
    [
        ("import os; os._exit(0)", ProcessLostError, "status 0"),
        ("import os; os.kill(os.getpid(), 9)", ProcessLostError, "SIGKILL"),
        ("while True: pass", ItemFailure, "timeout"),
        ("import torch; torch.nn.functional.linear = lambda *_: 1 / 0", ItemFailure, "ZeroDivisionError"),
        (
            "import torch; torch.nn.functional.silu = torch.zeros_like; found = 'poison'",
            ItemFailure,
            "poison",
        ),
    ],
)
def test_what_it_does_to_itself_is_its_own_affair(
    battle: Field, program: str, error: type[Exception], text: str
) -> None:
    """The next adapter of the same base meets a process in which no other ran."""
    with pytest.raises(error, match=text):
        battle.sample(battle.rogue(program), timeout=3 if text == "timeout" else 60)
    battle.check()
