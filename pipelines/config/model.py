"""The one configuration file of a job: TOML, validated when read, every problem at once.

Secrets are never in it: the Hub's address and token come from ``HF_ENDPOINT`` and ``HF_TOKEN``, object stores'
credentials from the ``AWS_*`` variables.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from cluster.runtime.settings import Positive, WorkerSettings
from probelog.errors import ConfigError, UsageError

# TOML has no null.
NONE = "none"
#: Keys that files of earlier versions may still have, and what they are called now.
OLD_NAMES = {"store_patience": "store_retry_seconds", "disk_patience": "disk_retry_seconds"}

_log = logging.getLogger(__name__)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _none_is_written(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {
            key: None if value == NONE and has_written_none(cls.model_fields.get(key)) else value
            for key, value in content.items()
        }


def has_written_none(field: FieldInfo | None) -> bool:
    """Whether a key may be none, but is not when it is left out: the word "none" is written then."""
    return field is not None and field.default is not None and type(None) in get_args(field.annotation)


class Filters(_Strict):
    """Which models of the Hub are crawled."""

    library: list[Literal["transformers", "timm"]] = Field(
        ["transformers", "timm"], description="Libraries whose checkpoints are loaded."
    )
    pipeline_tag: str | None = Field(
        "image-classification", description='The Hub\'s task; "none" for any task.'
    )
    author: str | None = Field(None, description="Only this user's or organisation's repositories.")
    licence: list[str] = Field([], description="Only these licences (the Hub's short names); empty for any.")
    max_bytes: Positive = Field(20_000_000_000, description="Largest download of one model, in bytes.")
    max_params: Positive = Field(5_000_000_000, description="Largest number of parameters of one model.")
    since: dt.datetime | None = Field(None, description="Only repositories modified at or after this time.")
    repos: Path | None = Field(
        None, alias="list", description="A text file of repositories, one a line; nothing else is read."
    )
    limit: Positive | None = Field(None, description="At most so many repositories, newest first.")

    @field_validator("since")
    @classmethod
    def _in_utc(cls, value: dt.datetime | None) -> dt.datetime | None:
        return value.replace(tzinfo=dt.UTC) if value is not None and value.tzinfo is None else value


class Nightly(_Strict):
    """How a nightly run finds what changed, and when it asks for more than a night's work."""

    overlap_hours: float = Field(
        24.0,
        ge=0,
        description="So far below the newest change that the last night saw, the listing is read again.",
    )
    reconcile_days: float = Field(
        7.0,
        ge=0,
        description="After so many days the whole index is compared with the Hub, for what was removed, renamed or "
        "gated since; 0: every night.",
    )
    max_removed_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="If more of the index than this (and ten models or more) would disappear at once, none does: "
        "the token or a mirror may be at fault.",
    )
    lease_seconds: float = Field(
        900.0,
        ge=2,
        description="How long the lease of a run that died keeps others from starting; a running one renews its own.",
    )
    lease_wait: float = Field(
        0.0, ge=0, description="Seconds to wait for another run to end; 0: leave at once, with a message."
    )
    max_drift: float = Field(
        0.1,
        ge=0,
        description="With more drift (relative change) of the index's statistics since the last full run than this, "
        "the run says that a full refit is due.",
    )
    rebuild_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="When more of the index than this came by nightly runs, it is built anew as a whole.",
    )


Share = Annotated[float, Field(ge=0, le=1)]


class Quality(_Strict):
    """What a generation is measured by before it goes live, and how much worse it may be."""

    enforce: bool = Field(
        True,
        description="Refuse a generation that is worse than a limit (exit status 3). If false it is published all the "
        "same, and the report says so.",
    )
    canaries: list[str] | Path | None = Field(
        None,
        description="Names that are asked of the live and of the new generation: a list, or a text file with one a "
        "line. After a tab may stand an answer that must be among the first ten: name<TAB>REPO#LOGIT, the logit by "
        "number or label.",
    )
    background_canaries: int = Field(
        50, ge=0, description="How many of the background's names are asked besides them."
    )
    max_lost: Share = Field(
        0.15,
        description="Share of the first ten answers to canaries that may be lost, but for those that left the Hub or "
        "that newer models pushed down. Ordinary nights lose a hundredth.",
    )
    max_known_missed: Share = Field(
        0.0, description="Share of the canaries with a known answer whose first ten may lack it."
    )
    max_agreement_fall: Share = Field(
        0.05,
        description="By how much the share of declared names that find a logit declared so may fall, and the share of "
        "logits that are named as declared (99.9 % sure).",
    )
    max_new_agreement_fall: Share = Field(
        0.3,
        description="By how much less often the new models' logits may be named as declared than the others' "
        "(99.9 % sure).",
    )
    max_gone: Share = Field(
        0.2, description="Share of the live generation's repositories that may be gone (99.9 % sure)."
    )
    max_failure_rise: Share = Field(
        0.1,
        description="By how much the share of models that fail, all together or with one reason, may rise over the "
        "last run's (99.9 % sure).",
    )


class _Indexed(_Strict):
    """What is indexed, and how a logit is described."""

    store: str = Field(description="Where everything is kept: a directory or s3://bucket/prefix.")
    probes: str = Field(
        description="Probe images: a folder, Parquet with an image column, or hf://datasets/OWNER/NAME/*.parquet."
    )
    probe_count: Positive | None = Field(4000, description='How many probes are drawn; "none" for all.')
    encoder: str = Field(
        "openai/clip-vit-base-patch32", description="The text-image encoder: a Hub id or a folder."
    )
    background: str = Field(
        "imagenet-21k", description="Background concepts: a text file, one name a line, or imagenet-21k."
    )
    background_count: Positive = Field(
        2000, description="How many background concepts are drawn; more are better, and cost little."
    )
    prompt: str | list[str] = Field(
        "a photo of a {}",
        description="What a concept's name is put into before encoding; of several the embeddings are averaged.",
    )

    fraction: float = Field(0.25, gt=0, le=1, description="Share of the probes that each model sees.")
    seed: int = Field(0, ge=0, description="Seed of every random choice.")
    rank: Positive | None = Field(None, description="Rank of the completion; none: by held-out entries.")
    regularisation: float | None = Field(
        None, gt=0, description="The completion's lambda; none: by held-out entries."
    )
    top_r: Positive = Field(
        50,
        description="Entries kept of a logit: the probes that fire it most (and version 2's r, in evaluate).",
    )

    filters: Filters = Field(Filters(), description="Which models of the Hub are crawled.")
    nightly: Nightly = Field(Nightly(), description="Nightly runs.")

    @field_validator("store", "probes", "encoder", "background")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty")
        return value

    @field_validator("prompt")
    @classmethod
    def _has_a_place(cls, value: str | list[str]) -> str | list[str]:
        if not value or not all("{}" in prompt for prompt in ([value] if isinstance(value, str) else value)):
            raise ValueError("must hold {} where the concept's name goes")
        return value

    @property
    def prompts(self) -> list[str]:
        """The prompts, one or several."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @model_validator(mode="after")
    def _truncation_fits(self) -> _Indexed:
        if self.probe_count is not None and self.top_r > self.probe_count:
            raise ValueError(f"top_r ({self.top_r}) is larger than probe_count ({self.probe_count})")
        return self


class Config(WorkerSettings, _Indexed):
    """Everything that a full run depends on.

    Keys stand in the file's order: what is indexed, the workers', and those below.
    """

    max_failed_share: float = Field(
        0.5, ge=0, le=1, description="With more of the models failed than this the job ends with status 3."
    )
    quality: Quality = Field(
        Quality(), description="What keeps a bad generation from readers; see its report in `STORE/quality`."
    )
    ray_address: str | None = Field(None, description="A Ray cluster; none: RAY_ADDRESS, else this machine.")


def load_config(file: Path | None, overrides: Sequence[str] = (), store: str | None = None) -> Config:
    """Read a configuration file.

    Args:
        file: TOML; relative paths in it are relative to the current folder.
        overrides: ``key=value`` (``filters.limit=10``), the value in TOML's notation; a bare word is a string.
        store: overrides the file's ``store``.

    Raises:
        ConfigError: with every problem found.
        UsageError: the file is missing or is not TOML.
    """
    content: dict[str, Any] = {}
    source = "the command line"
    if file is not None:
        source = str(file)
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{file}: there is no such configuration file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(source, [f"not TOML: {error}"]) from None
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror}") from None
    problems = [problem for old in OLD_NAMES if old in content and (problem := _rename(content, old))]
    problems += [problem for item in overrides if (problem := _override(content, item))]
    if store is not None:
        content["store"] = store
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        problems += [_problem(item) for item in error.errors()]
        raise ConfigError(source, problems) from None
    if problems:
        raise ConfigError(source, problems)
    return config


def _rename(content: dict[str, Any], old: str) -> str | None:
    name, value = _name_now(old), content.pop(old)
    if name in content:
        return f"{old}: is called {name} now, which is there too: leave {old} out"
    content[name] = value
    return None


def _name_now(name: str) -> str:
    if name not in OLD_NAMES:
        return name
    _log.warning("configuration: %s is called %s now; the old name will go", name, OLD_NAMES[name])
    return OLD_NAMES[name]


def _override(content: dict[str, Any], item: str) -> str | None:
    name, mark, text = item.partition("=")
    keys = name.strip().split(".")
    if not mark or not all(keys):
        return f"--set {item}: write key=value, for example --set fraction=0.25"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    keys[0] = _name_now(keys[0])
    place = content
    for key in keys[:-1]:
        inner = place.setdefault(key, {})
        if not isinstance(inner, dict):
            return f"--set {item}: {key} has no keys of its own"
        place = inner
    place[keys[-1]] = value
    return None


def _problem(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file as a whole"
    if error["type"] == "missing":
        return f"{where}: is needed ({_description(error['loc'])})"
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such key"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}"


def _description(location: Sequence[Any]) -> str:
    field = Config.model_fields.get(str(location[0])) if location else None
    return (field.description if field is not None else None) or "see the README"


def template() -> str:
    """A configuration file with every key, its meaning, and its default (commented out where there is one)."""
    lines = ["# probelog-index: every key, its meaning and its default.", ""]
    tables = []
    for name, field in Config.model_fields.items():
        if isinstance(field.default, BaseModel):
            tables.append((name, field.default))
        else:
            lines += _template_lines(name, field)
    for name, table in tables:
        lines += [f"[{name}]", ""]
        for key, field in type(table).model_fields.items():
            lines += _template_lines(field.alias or key, field)
    return "\n".join(lines)


def _template_lines(name: str, field: Any) -> list[str]:
    if field.is_required():
        example = {"store": '"/data/probelog"', "probes": '"photos/"'}[name]
        return [f"# {field.description}", f"{name} = {example}", ""]
    shown = "none" if field.default is None else json.dumps(field.default)
    key = f"# {name} =" if field.default is None else f"# {name} = {shown}"
    return [f"# {field.description}", key, ""]
