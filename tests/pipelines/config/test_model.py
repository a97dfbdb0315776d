"""Configuration files: every problem at once, in words that say what to do."""

from __future__ import annotations

import inspect
import json
import tomllib
from pathlib import Path

import pytest

from cluster.runtime.settings import WorkerSettings
from pipelines.config.model import OLD_NAMES, Config, load_config, template
from pipelines.config.page import config_page
from probelog.errors import ConfigError, UsageError


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "job.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_small_file_is_enough(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, 'store = "s"\nprobes = "p"\n[filters]\nauthor = "me"\nlist = "l.txt"\n')
    )
    assert (config.store, config.fraction, config.filters.author) == ("s", 0.25, "me")
    assert config.filters.repos == Path("l.txt")


def test_none_is_written_where_leaving_a_key_out_means_something_else(tmp_path: Path) -> None:
    text = (
        'store = "s"\nprobes = "p"\nprobe_count = "none"\n[filters]\npipeline_tag = "none"\nauthor = "none"\n'
    )
    config = load_config(write(tmp_path, text))
    assert config.probe_count is None
    assert config.filters.pipeline_tag is None
    assert config.filters.author == "none"  # somebody's name; leaving it out means nobody's
    with pytest.raises(ConfigError, match="fraction"):
        load_config(write(tmp_path, 'store = "s"\nprobes = "p"\nfraction = "none"\n'))


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, 'probes = ""\nfraction = 2\nrnak = 3\n[filters]\nlibrary = ["keras"]\n')
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["seed"])
    text = str(caught.value)
    assert len(caught.value.problems) == 6
    for word in (
        "store: is needed",
        "probes",
        "fraction",
        "rnak: there is no such key",
        "library",
        "--set seed",
    ):
        assert word in text
    assert caught.value.exit_status == 2


def test_overrides_override_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'store = "s"\nprobes = "p"\nfraction = 0.5\n')
    config = load_config(file, ["fraction=0.125", "filters.limit=3", "encoder=some/model"], store="other")
    assert (config.fraction, config.filters.limit, config.encoder, config.store) == (
        0.125,
        3,
        "some/model",
        "other",
    )


def test_overrides_of_a_key_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no table and has no keys"):
        load_config(write(tmp_path, 'store = "s"\nprobes = "p"\n'), ["store.x=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("store = ", "not TOML"),
        ('store = "s"\nprobes = "p"\nprompt = "photo"', "must hold {}"),
        ('store = "s"\nprobes = "p"\ntop_r = 50\nprobe_count = 20', "larger than probe_count"),
        ('store = "s"\nprobes = "p"\nfraction = 0', "greater than 0"),
        ('store = "s"\nprobes = "p"\nHF_TOKEN = "hf_x"', "no such key"),
    ],
)
def test_clear_messages(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such configuration file"):
        load_config(tmp_path / "none.toml")


def test_the_template_is_a_valid_file_that_names_every_key(tmp_path: Path) -> None:
    text = template()
    config = load_config(write(tmp_path, text))
    assert config.model_copy(update={"store": "s", "probes": "p"}) == Config(store="s", probes="p")
    for name in Config.model_fields:
        assert name in text
    uncommented = "\n".join(
        line[2:]
        if line.startswith("# ") and " = " in line and line.split(" = ")[0][2:].isidentifier()
        else line
        for line in text.splitlines()
    )
    assert tomllib.loads(uncommented)["fraction"] == 0.25


def test_since_without_a_zone_is_utc(tmp_path: Path) -> None:
    config = load_config(None, ["probes=p", "filters.since=2024-01-01T00:00:00"], "s")
    assert config.filters.since is not None
    assert config.filters.since.utcoffset() is not None


def test_a_key_of_the_workers_is_written_once() -> None:
    """What the record of the workers says of a key, the file, its checks and the page say, in the record's order."""
    keys = WorkerSettings.model_fields
    assert [name for name in Config.model_fields if name in keys] == list(keys)
    for base in Config.__mro__:
        assert base is WorkerSettings or not keys.keys() & inspect.get_annotations(base).keys(), base
    own, inherited = (model.model_json_schema()["properties"] for model in (WorkerSettings, Config))
    assert {name: inherited[name] for name in own} == own  # type, bounds, default and description
    rows = {line.split("`")[1]: line for line in config_page().splitlines() if line.startswith("| `")}
    for name, field in keys.items():
        default = None if field.default is None else json.dumps(field.default)
        assert f"# {field.description}\n# {name} ={f' {default}' if default else ''}\n" in template()
        assert rows[name].endswith(f" | {f'`{default}`' if default else 'none'} | {field.description} |")


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_the_old_name_of_a_key_still_works_with_a_notice(
    old: str, new: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = 'store = "s"\nprobes = "p"\n'
    notice = f"{old} is called {new} now"
    config = load_config(write(tmp_path, f"{start}{old} = 7\n"))
    assert getattr(config, new) == 7
    assert [record.getMessage().count(notice) for record in caplog.records] == [1]
    caplog.clear()
    config = load_config(write(tmp_path, f"{start}{new} = 7\n"), [f"{old}=8"])
    assert getattr(config, new) == 8
    assert [record.getMessage().count(notice) for record in caplog.records] == [1]
    caplog.clear()
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, f"{start}{old} = 7\n{new} = 8\n"))
    assert caught.value.problems == [f"{old}: is called {new} now, and both are given: leave {old} out"]
    with pytest.raises(ConfigError, match=f"{new}: .*greater than or equal to 0"):
        load_config(write(tmp_path, f"{start}{old} = -1\n"))
    assert old not in template() + config_page()
