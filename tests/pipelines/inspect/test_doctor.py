"""`probelog-index doctor`: its lines, its JSON and its exit status. What it tries: `tests/probelog/sandbox/doctor/test_examine.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipelines.inspect import doctor
from probelog.sandbox.doctor.examine import GUARDS, Examination, Finding
from tests.support.processes.operator_command import operator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these guards are Linux's")

FACTS = {
    "system": "Linux", "kernel": "4.18", "machine": "x86_64", "user": 0, "model_user": 65534, "landlock": 0,
    "scratch": "/scratch", "scratch_file_system": "nfs4", "scratch_owner": 0, "scratch_mode": "0700", "file_locks": False,
    "device": "cuda", "device_files": ["/dev/nvidia0"],
}  # fmt: skip


def test_the_command(tmp_path: Path) -> None:
    """With a job's file: tests/pipelines/test_cli.py."""
    run = operator("doctor", "--json")
    answer = json.loads(run.out)
    assert run.status == (0 if answer["holds"] else 1)
    assert set(answer) == {"holds", "facts", "guards"}
    assert set(answer["facts"]) == set(FACTS) | {"model_capabilities"}
    assert [each["guard"] for each in answer["guards"]] == [name for name in GUARDS if name != "connections"]
    assert {frozenset(each) for each in answer["guards"]} == {
        frozenset({"guard", "state", "detail", "needed", "means", "remedy"})
    }
    assert {each["state"] for each in answer["guards"]} <= {"holds", "does not hold", "not tried"}


def test_what_a_job_lacks_is_said_last() -> None:
    works, fails = doctor.Need("hub", True, "answers"), doctor.Need("store", False, "is read-only: mend it")
    assert list(doctor.need_lines([works])) == [
        "works          hub                answers",
        "works: everything that the job needs",
    ]
    assert list(doctor.need_lines([works, fails]))[1:] == [
        "does not work  store              is read-only: mend it",
        "does not work: store: mend it before the job is started",
    ]
    sandbox = Examination(FACTS, [])
    assert not doctor.Diagnosis(sandbox, [works, fails]).well
    assert doctor.Diagnosis(sandbox, [works]).well
    assert "needs" not in doctor.Diagnosis(sandbox).to_dict()


def test_what_does_not_hold_says_what_to_do() -> None:
    findings = [
        Finding("landlock", "does not hold", "not in this kernel", True, "files are closed", "use another kernel"),
        Finding("ipc-namespace", "does not hold", "this machine's", False, "nothing is shared", "nothing"),
        Finding("signals", "holds", "Operation not permitted", True, "no other process can be signalled", ""),
    ]  # fmt: skip
    text = list(doctor.lines(Examination(FACTS, findings)))
    assert text[0] == ("Linux 4.18 on x86_64, Landlock missing; workers run as root, models as user 65534")
    assert "nfs4" in text[1]
    assert "not kept" in text[1]
    assert text[2] == "devices: /dev/nvidia0; used: what their drivers need is open"
    assert [line.split() for line in text[3:8]] == [
        ["does", "not", "hold", "landlock", "files", "are", "closed", "(not", "in", "this", "kernel)"],
        ["->", "use", "another", "kernel"],
        ["does", "not", "hold", "ipc-namespace", "nothing", "is", "shared", "(this", "machine's)"],
        ["->", "not", "needed;", "nothing"],
        ["holds", "signals", "no", "other", "process", "can", "be", "signalled", "(Operation", "not", "permitted)"],
    ]  # fmt: skip
    assert text[8] == "does not hold: landlock: a model could do more here than spoil its own result"


def test_where_all_that_is_needed_holds() -> None:
    optional = Finding("ipc-namespace", "does not hold", "", False, "", "")
    examined = Examination(FACTS, [optional, Finding("signals", "holds", "", True, "", "")])
    assert examined.holds
    assert list(doctor.lines(examined))[-1] == "holds: a model can spoil its own result, and nothing else"
    assert not Examination(FACTS, [Finding("signals", "not tried", "", True, "", "")]).holds
