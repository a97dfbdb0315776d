"""`examine` on this machine, on kernels that lack a guard, and its attempts where nothing guards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from probelog.sandbox import process
from probelog.sandbox.doctor import attempts, examine
from tests.support.paths import CHECKOUT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these guards are Linux's")

#: Facts about a process, which no attempt stands for.
FACTS = {"landlock", "seccomp", "capabilities", "user", "memory-limit", "connections"} | {
    f"{name}-namespace" for name in ("process", "network", "ipc")
}
OTHER_USER = 12345


def test_every_guard_is_a_fact_or_is_tried() -> None:
    assert set(examine.GUARDS) == FACTS | set(attempts.ATTEMPTS)


def test_this_machine(tmp_path: Path) -> None:
    """What it says of the process is what it can do: with Landlock and seccomp all that is needed holds."""
    examined = examine.examine(tmp_path)
    states = {each.guard: each for each in examined.findings}
    assert set(states) == set(examine.GUARDS) - {"connections"}
    assert not list(tmp_path.iterdir()), "nothing is left"
    assert examined.facts["scratch_owner"] == os.getuid()
    if states["landlock"].state != "holds" or states["seccomp"].state != "holds":
        pytest.skip("this kernel lacks a guard")
    wrong = [each for each in examined.findings if each.needed and each.state != "holds"]
    assert not wrong
    assert examined.holds


def test_a_device_leaves_open_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "DEVICE_FILES", ("/dev/zero",))
    examined = examine.examine(tmp_path, "cuda")
    states = {each.guard: each for each in examined.findings}
    if states["seccomp"].state != "holds":
        pytest.skip("this kernel has no seccomp")
    assert states["connections"].state == states["datagrams"].state == states["path-sockets"].state == "holds"
    assert states["shared-memory"].state == states["address-space"].state == "does not hold"
    assert not states["shared-memory"].needed
    assert not states["address-space"].needed


@pytest.mark.parametrize(
    "name",
    # The others would end this process, fill its memory or take minutes.
    sorted(set(attempts.ATTEMPTS) - {"exec", "threads", "threads-of-others", "deadline", "allocations", "descriptors"}),
)  # fmt: skip
def test_an_attempt_succeeds_where_nothing_guards(name: str, tmp_path: Path) -> None:
    """So that a refusal is a guard's."""
    with examine._places(tmp_path, "cpu") as at:
        key = tmp_path / "key"
        key.write_text("key")
        assert attempts.ATTEMPTS[name](
            at | {"server": at["listening"], "key": str(key), "memory_bytes": 1 << 20}
        )


def as_json(
    *before: str, interpreter: str = sys.executable, **environment: str
) -> tuple[int, dict[str, Any]]:
    """Exit status and answer of the command, after other commands that change what it runs on."""
    run = subprocess.run(
        [*before, interpreter, "-B", "-m", "pipelines", "doctor", "--json"],
        capture_output=True, text=True, timeout=300, cwd=CHECKOUT, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    assert run.returncode in (0, 1), run.stderr
    return run.returncode, json.loads(run.stdout)


def lacking(calls: str) -> list[str]:
    return [sys.executable, "-m", "tests.support.processes.refusing", calls]


def failed(answer: dict[str, Any]) -> set[str]:
    return {each["guard"] for each in answer["guards"] if each["needed"] and each["state"] != "holds"}


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("calls", "missing", "some_of"),
    [
        ("landlock", "landlock", {"fork-server-key", "current-folder", "other-files"}),
        ("seccomp", "seccomp", {"sockets", "path-sockets", "fork", "shared-memory"}),
        (
            "landlock,seccomp,namespaces",
            "landlock",
            {"seccomp", "network", "abstract-sockets", "other-files"},
        ),
    ],
)
def test_a_kernel_without_a_guard(calls: str, missing: str, some_of: set[str]) -> None:
    status, answer = as_json(*lacking(calls))
    assert status == 1
    assert not answer["holds"]
    assert {missing} | some_of <= failed(answer)
    (finding,) = [each for each in answer["guards"] if each["guard"] == missing]
    assert finding["state"] == "does not hold"
    assert "kernel" in finding["remedy"]


#: Rights of root in a container (Docker's default): it has none to read alone.
OF_CONTAINERS = (
    "chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap", "net_bind_service", "net_raw",
    "sys_chroot", "mknod", "audit_write", "setfcap",
)  # fmt: skip


@pytest.mark.acceptance
def test_a_container_without_namespaces() -> None:
    """They are missed, and not needed; as root a model keeps the one right by which it reads its own files."""
    root = os.geteuid() == 0 and shutil.which("setpriv") is not None
    rights = ["setpriv", "--bounding-set", ",".join(["-all", *(f"+{name}" for name in OF_CONTAINERS)])]
    status, answer = as_json(*(rights if root else []), *lacking("namespaces"))
    states = {each["guard"]: each["state"] for each in answer["guards"]}
    assert {states[f"{name}-namespace"] for name in ("process", "network", "ipc")} == {"does not hold"}
    assert (status, failed(answer)) == (0, set())
    if root:
        (kept,) = [each["detail"] for each in answer["guards"] if each["guard"] == "capabilities"]
        assert int(kept.removeprefix("effective: "), 16) == 1 << 1


def interpreter_of_others() -> str:
    """One of this version that any user may run."""
    for path in (
        sys.executable,
        shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin:/usr/local/bin"),
    ):
        real = Path(os.path.realpath(path)) if path else None
        if real is not None and all(parent.stat().st_mode & 0o001 for parent in real.parents):
            return str(path)
    pytest.skip("no interpreter of this version that another user may run")


def as_other_user() -> list[str]:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("another user's process needs root and setpriv")
    for place in (Path(sysconfig.get_path("purelib")), CHECKOUT):
        if not all(parent.stat().st_mode & 0o001 for parent in (place, *place.parents)):
            pytest.skip(f"another user may not read {place}")
    user = str(OTHER_USER)
    return ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"]


@pytest.mark.acceptance
@pytest.mark.parametrize("calls", ["", "namespaces"], ids=["with namespaces", "as in a pod"])
def test_another_user_than_root(calls: str) -> None:
    before = [*lacking(calls), *as_other_user()]
    path = f"{sysconfig.get_path('purelib')}{os.pathsep}{CHECKOUT}"
    status, answer = as_json(
        *before, interpreter=interpreter_of_others(), PYTHONPATH=path, HOME="/nonexistent"
    )
    assert (status, failed(answer)) == (0, set())
    assert answer["facts"]["user"] == OTHER_USER
    assert answer["facts"]["model_user"] != 0
    states = {each["guard"]: each["state"] for each in answer["guards"]}
    assert states["home-folder"] == "not tried"
    # Without namespaces the limit is over the machine's threads, and what else begins and ends there meanwhile decides.
    assert states["threads-of-others"] == "holds" or calls


@pytest.mark.acceptance
def test_root_that_may_not_change_its_user() -> None:
    """Models stay root: the number of its threads has no limit, and the command says so."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("this needs root and setpriv")
    dropped = "-setuid,-setgid,-sys_admin,-sys_resource"
    status, answer = as_json(*lacking("namespaces"), "setpriv", "--bounding-set", dropped)
    assert (status, failed(answer)) == (1, {"threads"})
    assert answer["facts"]["model_user"] == 0
