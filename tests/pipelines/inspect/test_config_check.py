"""`config check` and the page of keys: what a wrong file is told before a cluster is paid for."""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.config.model import Config, Filters, load_config
from pipelines.config.page import config_page
from pipelines.inspect import reach
from pipelines.inspect.config_check import check_config, refuse_early
from probelog.errors import ConfigError, ProbeLogError, StoreError, UsageError
from probelog.hub.client import Retry
from probelog.storage.store import Store
from tests.support.hub.faults import FaultyHub, answer, faulty
from tests.support.hub.hostile import write_json
from tests.support.paths import CHECKOUT
from tests.support.processes.operator_command import operator
from tests.support.worlds.tiny_world import write_probes

PAGE = CHECKOUT / "docs/configuration.md"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    """With a model under a licence of its own, and with an encoder."""
    for repo in ("anna/pets", "bob/clip", "bob/pickled"):
        (tmp_path / "hub" / repo).mkdir(parents=True)
        write_json(tmp_path / "hub" / repo, "config.json", {"architecture": "resnet18", "num_classes": 2})
        if repo != "bob/pickled":
            (tmp_path / "hub" / repo / "model.safetensors").write_bytes(b"")
    write_json(
        tmp_path / "hub", "hub.json", [{"id": "anna/pets", "license": "pet-licence", "library": "timm"}]
    )
    with faulty(tmp_path / "hub") as (endpoint, hub):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr(Retry, "wait", lambda retry, failures: 0.01)
        yield hub


@pytest.fixture
def good(tmp_path: Path) -> dict[str, object]:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"not looked into")
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").write_text("{}")
    (tmp_path / "encoder/model.safetensors").write_bytes(b"")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    return {
        "store": str(tmp_path / "made/later"),
        "probes": str(tmp_path / "photos"),
        "encoder": str(tmp_path / "encoder"),
        "background": str(tmp_path / "names.txt"),
        "probe_count": 1,
        "top_r": 1,
    }


def write(tmp_path: Path, keys: dict[str, object]) -> Path:
    file = tmp_path / "job.toml"
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.items()))
    return file


def test_a_good_file_and_nothing_is_made(tmp_path: Path, good: dict[str, object]) -> None:
    assert check_config(write(tmp_path, good)).store == good["store"]
    assert not (tmp_path / "made").exists()
    assert check_config(write(tmp_path, good | {"encoder": "bob/clip", "trees.tasks": ["text-generation"]}))


def problems_of(tmp_path: Path, keys: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_config(write(tmp_path, keys))
    return caught.value.problems


def test_words_that_the_hub_does_not_know(tmp_path: Path, good: dict[str, object]) -> None:
    words = {"filters.licence": ["mit", "MIT", "apache2", "pet-licence", "qqq"], "filters.pipeline_tag": "image-clasification"}  # fmt: skip
    assert problems_of(tmp_path, good | words) == [
        "filters.pipeline_tag: the Hub has no task 'image-clasification'; did you mean image-classification?",
        "filters.licence: the Hub has no licence 'MIT'; did you mean mit?",
        "filters.licence: the Hub has no licence 'apache2'; did you mean apache-2.0?",
        "filters.licence: the Hub has no licence 'qqq'",
    ]
    assert problems_of(tmp_path, good | {"probe_cuont": 7, "filters.licens": ["mit"], "zzz": 1}) == [
        "filters.licens: there is no such key; did you mean licence?",
        "probe_cuont: there is no such key; did you mean probe_count?",
        "zzz: there is no such key",
    ]


def test_generators_are_checked_where_they_are_wanted(
    tmp_path: Path, good: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as where it is not installed
    wrong = {
        "generators.filters.pipeline_tag": "text-to-imgae",
        "generators.filters.list": str(tmp_path / "none"),
        "generators.galleries": str(tmp_path / "no-galleries"),
    }
    assert check_config(write(tmp_path, good | wrong))
    problems = problems_of(tmp_path, good | wrong | {"generators.enabled": True})
    assert [problem.partition(":")[0] for problem in problems] == [
        "generators.filters.list", "generators.galleries", "generators.enabled", "generators.filters.pipeline_tag",
    ]  # fmt: skip
    assert problems[2].endswith(
        'diffusers is not installed, which generators are run with: pip install ".[index]"'
    )
    assert problems[3].endswith("the Hub has no task 'text-to-imgae'; did you mean text-to-image?")
    (problem,) = problems_of(tmp_path, good | {"generators.prompts": ["a cat", "a \x1b[0m dog"]})
    assert problem.startswith("generators.prompts: must be printable text on one line: 'a \\x1b[0m dog'")


def test_more_than_there_is(tmp_path: Path, good: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_probes(tmp_path / "probes/a.parquet", 7, side=8)
    (tmp_path / "probes/b.png").write_bytes(b"perhaps")
    probes = good | {"probes": str(tmp_path / "probes")}
    assert check_config(write(tmp_path, probes | {"probe_count": 8}))
    (problem,) = problems_of(tmp_path, probes | {"probe_count": 9})
    assert "has at most 8 images, fewer than probe_count (9)" in problem
    for gpus, message in ((1.5, "above one Ray gives whole ones only"), (64, "but this machine has")):
        (problem,) = problems_of(tmp_path, good | {"gpus_per_worker": gpus})
        assert problem.startswith("gpus_per_worker: ")
        assert message in problem
    assert check_config(write(tmp_path, good | {"gpus_per_worker": 64, "ray_address": "head:6379"}))
    (problem,) = problems_of(tmp_path, good | {"cpus_per_worker": 100_000})
    assert problem.startswith("cpus_per_worker: 100000 CPUs each")


def test_what_the_hub_does_not_have_or_open(
    tmp_path: Path, good: dict[str, object], hub: FaultyHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (problem,) = problems_of(tmp_path, good | {"encoder": "bob/none"})
    assert problem.startswith("encoder: ")
    assert "bob/none" in problem
    (problem,) = problems_of(tmp_path, good | {"encoder": "bob/pickled"})
    assert "has no safetensors" in problem
    invalid = {
        "content-type": "application/json",
        "x-error-message": "Invalid credentials in Authorization header",
    }
    hub.spoil("/api/models", answer(401, invalid))
    (problem,) = problems_of(tmp_path, good | {"encoder": "bob/none", "filters.licence": ["pet-licence"]})
    assert "does not know HF_TOKEN" in problem
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    problems = problems_of(
        tmp_path, good | {"probes": "hf://datasets/a/b/*.parquet", "filters.licence": ["MIT"]}
    )
    assert [problem.partition(":")[0] for problem in problems] == ["hub"], "the rest is the Hub's to say"


def test_a_store_that_cannot_be_written(
    tmp_path: Path, good: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    assert check_config(write(tmp_path, good | {"store": str(tmp_path / "store")}))
    assert not list((tmp_path / "store").iterdir()), "nothing is left"
    place = Store(tmp_path / "store")
    place.write("a", b"1")
    reach.check_conditions(place, "a", b"1")
    assert place.read("a") == b"2"

    def forgets(store: Store, name: str, data: bytes, expected: bytes) -> None:
        store.write(name, data)

    monkeypatch.setattr(Store, "swap", forgets)
    with pytest.raises(StoreError, match="does not keep conditions on puts"):
        reach.check_conditions(place, "a", b"2")


def test_a_clock_that_is_wrong(
    tmp_path: Path, good: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    config = check_config(write(tmp_path, good | {"store": str(tmp_path / "store")}))
    assert "from the store's" in reach.store_clock(config)
    monkeypatch.setattr(Store, "time", lambda store: dt.datetime.now(dt.UTC) + dt.timedelta(hours=1))
    with pytest.raises(ProbeLogError, match=r"3,(599|600) s behind the store's"):
        reach.store_clock(config)


def test_a_job_is_refused_with_the_error_itself_or_with_all(tmp_path: Path, good: dict[str, object]) -> None:
    (tmp_path / "a-file").write_text("")
    refuse_early(load_config(write(tmp_path, good)), ask_hub=True)
    wrong = good | {"store": str(tmp_path / "a-file/store")}
    with pytest.raises(StoreError, match="not a folder that can be written"):
        refuse_early(load_config(write(tmp_path, wrong)), ask_hub=False)
    # Its rights say that root may.
    with pytest.raises(StoreError, match="/proc is not a folder that can be written"):
        refuse_early(load_config(write(tmp_path, good | {"store": "/proc/no/store"})), ask_hub=False)
    with pytest.raises(ConfigError, match="2 problems"):
        refuse_early(load_config(write(tmp_path, wrong | {"preload": ["no_such_module"]})), ask_hub=False)


def test_all_missing_files_are_reported_at_once(tmp_path: Path, good: dict[str, object]) -> None:
    (tmp_path / "a-file").write_text("")
    wrong = good | {
        "store": str(tmp_path / "a-file/store"),
        "probes": str(tmp_path / "nothing"),
        "encoder": str(tmp_path / "photos"),
        "background": str(tmp_path / "a-file"),
        "filters.list": str(tmp_path / "no-list"),
        "quality.canaries": ["dog", "cat\tanna/pets#"],
        "scratch": str(tmp_path / "a-file"),
        "preload": ["no_such_module_anywhere", "json"],
    }
    with pytest.raises(ConfigError) as caught:
        check_config(write(tmp_path, wrong))
    problems = caught.value.problems
    for start in (
        "store:",
        "probes:",
        "encoder:",
        "background",
        "filters.list:",
        "quality.canaries:",
        "scratch:",
        "preload:",
    ):
        assert sum(problem.startswith(start) for problem in problems) == 1, (start, problems)
    assert len(problems) == 8


def test_an_empty_folder_of_probes(tmp_path: Path, good: dict[str, object]) -> None:
    (tmp_path / "photos/a.png").unlink()
    with pytest.raises(ConfigError, match="holds no image"):
        check_config(write(tmp_path, good))


def test_a_bucket_out_of_reach(
    tmp_path: Path, good: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ConfigError, match=r"store: s3://.* cannot be read: .* AWS_ENDPOINT_URL"):
        check_config(write(tmp_path, good | {"store": "s3://bucket/store"}))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such configuration file"):
        check_config(tmp_path / "none.toml")


def test_the_command(tmp_path: Path, good: dict[str, object]) -> None:
    file = write(tmp_path, good)
    for named in ([file], ["--config", file]):  # as all other commands take it
        ended = operator("config", "check", *named)
        assert ended.status == 0
        assert "no errors" in ended.out
    for named in ([], [file, "--config", file]):
        ended = operator("config", "check", *named)
        assert ended.status == 2
        assert "name one file: probelog-index config check FILE" in ended.err
    ended = operator("config", "check", str(write(tmp_path, good)), "--set", "fraction=7", "--set", "nope=1")
    assert ended.status == 2
    assert "fraction" in ended.err
    assert "nope: there is no such key" in ended.err


def test_the_page_is_the_code() -> None:
    """Made anew by: probelog-index config --markdown > docs/configuration.md."""
    page = config_page()
    assert PAGE.read_text(encoding="utf-8") == page
    tables = {name: type(field.default) for name, field in Config.model_fields.items() if is_table(field)}
    assert tables["filters"] is Filters
    for model in (Config, *tables.values()):
        for name, field in model.model_fields.items():
            if not is_table(field):
                assert f"| `{field.alias or name}` |" in page
            assert field.description in page.replace("\\|", "|")


def is_table(field: FieldInfo) -> bool:
    return isinstance(field.default, BaseModel)


def test_nightly_runs_need_no_encoder_but_for_generators(tmp_path: Path, good: dict[str, object]) -> None:
    config = load_config(write(tmp_path, {**good, "encoder": str(tmp_path / "none")}))
    refuse_early(config, "nightly", ask_hub=False)
    for command, more in (("probe", []), ("nightly", ["generators.enabled=true"])):
        with pytest.raises(ProbeLogError, match="is no folder with"):
            refuse_early(load_config(tmp_path / "job.toml", more), command, ask_hub=False)


def test_room_for_preprocessed_probes(tmp_path: Path, good: dict[str, object]) -> None:
    """Those that are there count; a stage alone does with what there is."""
    config = load_config(write(tmp_path, {**good, "scratch": str(tmp_path), "cache_bytes": 1 << 60}))
    with pytest.raises(UsageError, match="cache_bytes"):
        refuse_early(config, ask_hub=False)
    for command in ("probe", "nightly"):
        refuse_early(config, command, ask_hub=False)
    (tmp_path / "probelog/pixels").mkdir(parents=True)
    with open(tmp_path / "probelog/pixels/a.pixels", "wb") as stream:
        stream.truncate(1 << 40)
    config = load_config(write(tmp_path, {**good, "scratch": str(tmp_path), "cache_bytes": 1 << 40}))
    refuse_early(config, ask_hub=False)
