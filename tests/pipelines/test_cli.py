"""``probelog-index``: what it says and how it ends, above all where something is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.config.model import load_config
from pipelines.inspect import reach
from pipelines.inspect.doctor import try_needs
from probelog import __version__
from probelog.hub.client import Retry
from probelog.publication.lifecycle import go_live
from probelog.search.client import open_index
from probelog.storage.store import Store
from tests.support.hub.faults import faulty
from tests.support.hub.hostile import REPOSITORIES
from tests.support.processes.operator_command import CHECKOUT, operator
from tests.support.worlds.tiny_world import LOGITS, MODELS, PROBES, Indexed, truth

STAGES = ["crawl", "probe", "complete", "publish", "full"]


@pytest.fixture(autouse=True)
def _at_the_tiny_hub(indexed: Indexed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)


@pytest.fixture
def configured(indexed: Indexed, tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration for a new store ``tmp_path/store``, with changes."""

    def write(**changes: object) -> Path:
        store = changes.pop("store", tmp_path / "store")
        return indexed.world.config_file(tmp_path / "job.toml", store, **changes)

    return write


def refused(*arguments: object, status: int = 2) -> str:
    """Run a command that must end in one clear message; returns it, blanks made single."""
    ended = operator(*arguments)
    assert ended.status == status, ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) <= 12, ended.err
    return re.sub(r"[│╭╰─╮╯\s]+", " ", ended.err)


# Usage and configuration


def test_as_a_process_of_its_own(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines", *arguments]
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False)

    helped = run("--help")
    assert helped.returncode == 0
    for command in [*STAGES, "plan", "status", "evaluate", "rollback", "config", "demo", "hub", "probes"]:
        assert re.search(rf"\b{command}\b", helped.stdout)
    missing = run("full", "--config", str(tmp_path / "no.toml"))
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "there is no such configuration file" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_configuration_that_is_not_there(stage: str, tmp_path: Path) -> None:
    message = refused(stage, "--config", tmp_path / "no.toml")
    assert "no.toml: there is no such configuration file" in message


def test_no_configuration_names_what_is_needed() -> None:
    message = refused("full")
    assert "store: is needed" in message
    assert "probes: is needed" in message


def test_every_mistake_is_named(configured: Callable[..., Path]) -> None:
    file = configured(fraction=2, colour="red", filters={"libary": ["timm"]})
    message = refused("full", "--config", file, "--set", "rank=none", "--set", "nonsense")
    for word in [
        "5 problems",
        "fraction",
        "colour: there is no such key",
        "filters.libary",
        "rank",
        "key=value",
    ]:
        assert word in message, message


def test_a_configuration_that_is_not_toml(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("store = [")
    assert "not TOML" in refused("full", "--config", tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    assert "not TOML" in refused("full", "--config", tmp_path / "bad.toml")
    assert "Is a directory" in refused("full", "--config", tmp_path)


@pytest.mark.parametrize("arguments", [["full", "--colour"], ["nonsense"], ["explain"], ["evaluate", "--colour"], ["crawl", "--retry-failed"]])  # fmt: skip
def test_unknown_or_missing_arguments(arguments: list[str]) -> None:
    ended = operator(*arguments)
    assert ended.status == 2
    assert "Usage: probelog-index" in ended.err


def test_the_template_is_a_configuration(tmp_path: Path) -> None:
    from pipelines.config.model import Config, load_config

    ended = operator("config")
    assert ended.status == 0
    assert set(tomllib.loads(ended.out)) == {
        "store",
        "probes",
        "filters",
        "generators",
        "nightly",
        "quality",
        "trees",
    }, "the rest are defaults"
    for key in Config.model_fields:
        assert re.search(rf"^(# )?{key} =|^\[{key}\]", ended.out, re.MULTILINE), key
    (tmp_path / "template.toml").write_text(ended.out)
    assert load_config(tmp_path / "template.toml").fraction == 0.25


def test_a_store_is_named_in_three_ways(
    tmp_path: Path, indexed: Indexed, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = indexed.world.config_file(tmp_path / "job.toml", indexed.store)
    for command in (["status"], ["verify"], ["failures"], ["explain", "ada/resnet"], ["rollback"]):
        assert "--store URI, --config FILE, or PROBELOG_STORE" in refused(*command)
    monkeypatch.setenv("PROBELOG_STORE", str(tmp_path / "none"))
    for command in (["status"], ["failures"], ["explain", "ada/resnet"]):
        assert operator(*command, "--config", file).out == operator(*command, "--store", indexed.store).out
    assert str(tmp_path / "none") in refused("status").replace(" ", "")
    monkeypatch.setenv("PROBELOG_STORE", str(indexed.store))
    assert operator("failures").out == f"{indexed.store}: no failures\n"


def test_the_version() -> None:
    assert operator("--version").out == operator("-V").out == f"probelog {__version__}\n"
    assert operator("status", "-h").out == operator("status", "--help").out


# Inputs that are not there or not what they should be


def test_probes_that_are_not_there(configured: Callable[..., Path], tmp_path: Path) -> None:
    assert "no such folder or file" in refused(
        "full", "--config", configured(probes=str(tmp_path / "photos"))
    )
    (tmp_path / "empty").mkdir()
    message = refused("full", "--config", configured(probes=str(tmp_path / "empty")))
    assert "holds no image and no Parquet file" in message
    (tmp_path / "photos.parquet").write_bytes(b"PAR1 no Parquet")
    message = refused("full", "--config", configured(probes=str(tmp_path / "photos.parquet")))
    assert "cannot be read as Parquet" in message


def test_fewer_probes_than_asked_for(configured: Callable[..., Path]) -> None:
    message = refused("full", "--config", configured(probe_count=PROBES + 1))
    assert f"has at most {PROBES} images, fewer than probe_count ({PROBES + 1})" in message


def test_an_encoder_that_is_none(configured: Callable[..., Path], indexed: Indexed, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", indexed.world.hub / "ada/resnet"):
        message = refused("full", "--config", configured(encoder=str(folder)))
        assert str(folder) in message.replace(" ", "")
    assert "encoder" in refused("full", "--config", configured(encoder=str(tmp_path / "none")))


def test_a_background_that_is_not_there(
    configured: Callable[..., Path], indexed: Indexed, tmp_path: Path
) -> None:
    store = indexed.copy_store(tmp_path / "store")
    message = refused("publish", "--config", configured(store=store, background=str(tmp_path / "names.txt")))
    assert "there is no such file" in message
    (tmp_path / "names.txt").write_text("# nothing\n\n")
    assert "empty" in refused(
        "publish", "--config", configured(store=store, background=str(tmp_path / "names.txt"))
    )
    assert open_index(store).generation == indexed.run.published.pointer.generation


def test_a_hub_that_is_not_served(configured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Retry, "wait", lambda retry, failures: 0.01)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = refused("crawl", "--config", configured(), status=1)
    assert "http://127.0.0.1:9" in message
    assert "HF_ENDPOINT" in message
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert "HF_ENDPOINT" in refused("crawl", "--config", configured())


def test_filters_that_match_nothing(configured: Callable[..., Path], indexed: Indexed) -> None:
    message = refused("full", "--config", configured(), "--set", "filters.author=nobody")
    assert "lists no model that meets the filters" in message


def test_stages_before_their_turn(configured: Callable[..., Path]) -> None:
    file = configured()
    assert "run `probelog-index crawl` first" in refused("probe", "--config", file)
    assert "run `probelog-index probe` first" in refused("complete", "--config", file)
    assert "run `probelog-index crawl` first" in refused("publish", "--config", file)


def test_a_store_that_cannot_be_written(configured: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for stage in ("crawl", "full"):
        message = refused(stage, "--config", configured(store=tmp_path / "file" / "store"), status=1)
        assert str(tmp_path / "file") in message.replace(" ", "")
    refused("status", "--store", tmp_path / "file" / "store", status=1)
    refused("rollback", "--store", tmp_path / "file" / "store")
    assert "ftp" in refused("crawl", "--config", configured(store="ftp://somewhere/store"))


# Reading a store


def test_status_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        assert "is not a ProbeLog store" in refused("status", "--store", folder)
    assert not (tmp_path / "none").exists()


def test_status(indexed: Indexed) -> None:
    ended = operator("status", "--store", indexed.store)
    assert ended.status == 0
    assert f"{len(MODELS)} of {len(MODELS)} models indexed, 0 failed, 0 left" in ended.out
    found = json.loads(operator("status", "--store", indexed.store, "--json").out)
    assert found["index"]["generation"] == indexed.run.published.pointer.generation
    assert found["ledgers"][0]["indexed"] == len(MODELS)


def test_evaluate(indexed: Indexed) -> None:
    ended = operator("evaluate", "--index", indexed.store, "--truth", indexed.world.truth)
    assert ended.status == 0
    assert "this index (matched heads)" in ended.out
    found = json.loads(
        operator("evaluate", "--index", indexed.store / "index", "--truth", indexed.world.truth, "--json").out
    )
    assert found["logits"] == LOGITS - MODELS["ada/resnet-again"][0]


def test_evaluate_with_a_truth_that_is_none(indexed: Indexed, tmp_path: Path) -> None:
    file = tmp_path / "truth.json"
    good = truth()
    bad: list[object] = [
        [],
        {},
        {"classes": [], "concepts": {}, "models": {}},
        good | {"concepts": {}},
        good | {"concepts": {"dog": [99]}},
        good | {"concepts": {"dog": ["dog"]}},
        good | {"concepts": {"dog": []}},
        good | {"classes": 7},
        good | {"models": {"no/such-model": {"logits": [[0]]}}},
        good | {"models": {repo: {"logits": [[]] * 9} for repo in MODELS}},
        good | {"models": {"ada/resnet": {"logits": [0, 1, 2]}}},
    ]
    for content in bad:
        file.write_text(json.dumps(content))
        message = refused("evaluate", "--index", indexed.store, "--truth", file)
        assert "truth.json" in message, message
    file.write_text("{")
    assert "not a truth file" in refused("evaluate", "--index", indexed.store, "--truth", file)
    assert "cannot be read" in refused("evaluate", "--index", indexed.store, "--truth", tmp_path / "no.json")
    assert "no published index" in refused("evaluate", "--index", tmp_path, "--truth", indexed.world.truth)


def test_rollback(indexed: Indexed, tmp_path: Path) -> None:
    store = indexed.copy_store(tmp_path / "store")
    assert "no earlier generation" in refused("rollback", "--store", store)
    assert "no published index" in refused("rollback", "--store", tmp_path)
    before = open_index(store).generation
    shutil.copytree(store / f"index/generations/{before}", store / "index/generations/later")
    go_live(Store(store).child("index"), "later", "another source")
    assert open_index(store).generation == "later"
    ended = operator("rollback", "--store", store)
    assert (ended.status, ended.out) == (0, f"generation {before} is live again\n"), ended.err
    assert open_index(store).generation == before
    assert "belongs to --hold" in refused(
        "rollback", "--store", store, "--to", "later", "--reason", "later is better"
    )
    held = operator("rollback", "--store", store, "--to", "later", "--hold", "--reason", "before is worse")
    assert held.out.startswith("generation later is live again; nothing is published over it until"), held.err
    again = operator("rollback", "--store", store, "--to", "later", "--hold", "--reason", "before is worse")
    assert again.out.startswith("generation later stays live; nothing is published over it until"), again.err
    assert "held since" in operator("status", "--store", store).out
    assert (
        json.loads(operator("status", "--store", store, "--json").out)["index"]["held"]["reason"]
        == "before is worse"
    )
    assert (
        operator("release", "--store", store).out
        == "generation later is released: the next run publishes again\n"
    )
    assert "is not held" in refused("release", "--store", store)
    operator("rollback", "--store", store, "--hold")
    assert "rolled back from later" in operator("status", "--store", store).out
    (store / "index/current.json").write_text("{")
    assert "damaged" in refused("rollback", "--store", store, status=1)


def test_a_dry_run_changes_nothing(indexed: Indexed, configured: Callable[..., Path], tmp_path: Path) -> None:
    store = indexed.copy_store(tmp_path / "store")
    before = sorted(path for path in tmp_path.rglob("*"))
    asked = len(indexed.hub.requests)
    file = configured(store=store)
    done = operator("full", "--dry-run", "--config", file).out
    assert f"would run 0 models (0.0 GB of weights); {len(MODELS)} are indexed, 0 failed" in done
    again = operator("full", "--dry-run", "--config", file, "--set", "seed=1").out
    assert f"probe: would run {len(MODELS)} models" in again
    assert "would list" in operator("full", "--dry-run", "--refresh", "--config", file).out
    nightly = operator("nightly", "--dry-run", "--config", file)
    assert f"would add to generation {open_index(store).generation} ({len(MODELS)} models)" in nightly.out, (
        nightly.err
    )
    assert "fraction" in refused("nightly", "--dry-run", "--config", file, "--set", "fraction=0.5")
    assert sorted(path for path in tmp_path.rglob("*") if path != file) == before
    assert len(indexed.hub.requests) == asked


def test_doctor_tries_what_a_job_needs(
    indexed: Indexed, configured: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "_GPU_SECONDS", 1.0)
    file = configured(store=indexed.copy_store(tmp_path / "store"), cache_bytes=0)
    answer = json.loads(operator("doctor", "--config", file, "--json").out)
    assert {need["name"]: need["works"] for need in answer["needs"]} == dict.fromkeys(
        ["hub", "hub-file", "hub-limits", "store", "clock", "probes", "encoder", "disk", "ray", "gpu"], True
    )
    file = configured(store=tmp_path / "file/store", gpus_per_worker=2, cache_bytes=10**18)
    (tmp_path / "file").write_text("in the way")
    needs = {need.name: need for need in try_needs(load_config(file))}
    assert [name for name, need in needs.items() if not need.works] == ["store", "disk", "ray", "gpu"]
    assert "set scratch to another disk" in needs["disk"].detail
    assert "none of them with 1 CPUs and 2 GPUs for one worker" in needs["ray"].detail


# Making


def test_what_only_reads_or_points_loads_no_ray(indexed: Indexed, tmp_path: Path) -> None:
    """These run beside a job, on small machines: neither Ray nor what models need is imported."""
    store = indexed.copy_store(tmp_path / "store")
    live = open_index(store).generation
    later = tmp_path / "later"
    shutil.copytree(store, later)
    shutil.copytree(store / f"index/generations/{live}", later / "index/generations/later")
    go_live(Store(later).child("index"), "later", "another source")
    file = indexed.world.config_file(tmp_path / "job.toml", store)
    commands = [
        ["status", "--store", store],
        ["verify", "--store", store],
        ["failures", "--store", store],
        ["explain", "ada/resnet", "--store", store],
        ["rollback", "--store", later],
        ["config"],
        ["config", "check", file],
    ]
    # One process for all: each would import the same for a second. The first that imports more is named.
    code = (
        "import json, sys\nfrom pipelines.cli import app\n"
        "heavy = ('ray', 'torch', 'transformers', 'timm', 'boto3', 'cluster.probing.prober')\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n        app(words)\n"
        "    except SystemExit as end:\n        assert not end.code, (words, end.code)\n"
        "    assert not (found := [name for name in heavy if name in sys.modules]), (words, found)\n"
        "print('none of them')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands, default=str)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "none of them"


def test_a_run_with_nothing_to_do_starts_no_ray_and_imports_no_torch(
    indexed: Indexed, tmp_path: Path
) -> None:
    store = indexed.copy_store(tmp_path / "store")
    file = indexed.world.config_file(tmp_path / "job.toml", store, ray_address="127.0.0.1:1")
    code = (
        "import sys\nfrom pipelines.cli import app\n"
        "try:\n    app(sys.argv[1:])\nfinally:\n"
        "    print([name for name in ('torch', 'transformers', 'timm') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "full", "--config", str(file)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is already live" in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_probes_alone(indexed: Indexed, tmp_path: Path) -> None:
    arguments = [
        "probes",
        indexed.world.probes,
        "--store",
        tmp_path / "store",
        "--encoder",
        indexed.world.encoder,
    ]
    ended = operator(*arguments, "-n", PROBES)
    assert ended.status == 0
    assert ended.out.strip() == indexed.probe_set
    assert operator(*arguments, "-n", 5).out.strip() != indexed.probe_set
    assert operator(*arguments, "-n", 0).status == 2


def test_too_many_failures_end_with_3_and_a_live_index(
    indexed: Indexed, configured: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "hub"
    for repo in ("ada/resnet", "bob/many-labels"):
        shutil.copytree(indexed.world.hub / repo, root / repo)
    REPOSITORIES["headless"][0](root / "eve/headless")
    store = indexed.copy_store(tmp_path / "store", "index", "catalogue")
    with faulty(root) as (endpoint, _):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        file = configured(store=store, workers=1)
        ended = operator("full", "--config", file, "--set", "max_failed_share=0.3")
        assert ended.status == 3, ended.err
        assert "33.3% of the models failed, more than max_failed_share (30.0%) allows" in ended.err
        assert "config-mismatch 1" in ended.err
        assert open_index(store).models == 2
        assert operator("probe", "--config", file, "--set", "max_failed_share=0.3").status == 3
        assert operator("full", "--config", file, "--set", "max_failed_share=0.4").status == 0


# An object store


def test_a_bucket_that_is_not_there(configured: Callable[..., Path], bucket_of_ray: str) -> None:
    message = refused("crawl", "--config", configured(store="s3://no-such-bucket/prefix"), status=1)
    assert "no-such-bucket" in message
    assert "AWS_ENDPOINT_URL" in message


@pytest.mark.acceptance
def test_a_full_run_into_s3(
    indexed: Indexed, configured: Callable[..., Path], bucket_of_ray: str, tmp_path: Path
) -> None:
    """Ray's workers find the object store through their environment, as this process does."""
    names = tmp_path / "repos.txt"
    names.write_text("ada/resnet\nbob/one-logit\n")
    store = f"{bucket_of_ray}/some/where"
    file = configured(store=store, workers=1, filters={"list": str(names)})
    ended = operator("full", "--config", file)
    assert ended.status == 0, ended.err
    assert f"--index {store}" in ended.out + ended.err
    index = open_index(store)
    assert (index.models, index.logits) == (2, 5)
    local = open_index(indexed.store)
    for hit in index.search(text="dog", k=9):
        (same,) = (
            other
            for other in local.search(text="dog", k=LOGITS)
            if (other.repo.removesuffix("-again"), other.logit, other.negated)
            == (hit.repo, hit.logit, hit.negated)
        )
        # The score is in units of the whole hub, and what answers there moves the direction a little.
        assert hit.distance == pytest.approx(same.distance, abs=1e-2)
    found = json.loads(operator("status", "--store", store, "--json").out)
    assert [ledger["indexed"] for ledger in found["ledgers"]] == [2]
    ended = operator("full", "--config", file)
    assert ended.status == 0
    assert "is already live" in ended.err
