"""`config check` and the page of keys: what a wrong file is told before a cluster is paid for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.config.model import Config, Filters
from pipelines.config.page import config_page
from pipelines.inspect.config_check import check_config
from probelog.errors import ConfigError, UsageError
from tests.support.paths import CHECKOUT
from tests.support.processes.operator_command import operator

PAGE = CHECKOUT / "docs/configuration.md"


@pytest.fixture
def good(tmp_path: Path) -> dict[str, object]:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"not looked into")
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").write_text("{}")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    return {
        "store": str(tmp_path / "made/later"),
        "probes": str(tmp_path / "photos"),
        "encoder": str(tmp_path / "encoder"),
        "background": str(tmp_path / "names.txt"),
    }


def write(tmp_path: Path, keys: dict[str, object]) -> Path:
    file = tmp_path / "job.toml"
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.items()))
    return file


def test_a_good_file_and_nothing_is_made(tmp_path: Path, good: dict[str, object]) -> None:
    assert check_config(write(tmp_path, good)).store == good["store"]
    assert not (tmp_path / "made").exists()
    assert check_config(write(tmp_path, good | {"encoder": "openai/clip-vit-base-patch32"}))
    assert check_config(write(tmp_path, good | {"probes": "hf://datasets/a/b/*.parquet"}))


def test_all_missing_files_are_reported_at_once(tmp_path: Path, good: dict[str, object]) -> None:
    (tmp_path / "a-file").write_text("")
    wrong = good | {
        "store": str(tmp_path / "a-file/store"),
        "probes": str(tmp_path / "nothing"),
        "encoder": str(tmp_path / "photos"),
        "background": str(tmp_path / "a-file"),
        "filters.list": str(tmp_path / "no-list"),
        "quality.canaries": ["dog", "cat\tanna/pets"],
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
    ended = operator("config", "check", str(write(tmp_path, good)))
    assert ended.status == 0
    assert "no errors" in ended.out
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
