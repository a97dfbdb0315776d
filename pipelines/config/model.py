"""The one configuration file of a job: TOML, validated when read, every problem at once.

Secrets are never in it: the Hub's address and token come from ``HF_ENDPOINT`` and ``HF_TOKEN``, object stores'
credentials from the ``AWS_*``, ``GOOGLE_*`` or ``AZURE_*`` variables.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from cluster.runtime.settings import Positive, WorkerSettings
from pipelines.config.spelling import did_you_mean
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
    def _none_is_written(cls, content: object) -> object:
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
        "image-classification", description='Task of the models on the Hub; "none" for any task.'
    )
    author: str | None = Field(None, description="Only this user's or organisation's repositories.")
    licence: list[str] = Field([], description="Only these licences (the Hub's short names); empty for any.")
    max_bytes: Positive = Field(20_000_000_000, description="Largest download of one model, in bytes.")
    max_params: Positive = Field(5_000_000_000, description="Largest number of parameters of one model.")
    since: dt.datetime | None = Field(None, description="Only repositories modified at or after this time.")
    repos: Path | None = Field(
        None, alias="list", description="A text file of repositories, one per line; only these are crawled."
    )
    limit: int | None = Field(
        None,
        ge=0,
        description="At most this many repositories, newest first; 0 for an index of generators alone.",
    )

    @field_validator("since")
    @classmethod
    def _in_utc(cls, value: dt.datetime | None) -> dt.datetime | None:
        return value.replace(tzinfo=dt.UTC) if value is not None and value.tzinfo is None else value


class Nightly(_Strict):
    """How a nightly run finds changes, and when a full run is due."""

    overlap_hours: float = Field(
        24.0,
        ge=0,
        description="The listing is read again for this long before the newest change that the last nightly run read.",
    )
    reconcile_days: float = Field(
        7.0,
        ge=0,
        description="Days after which the whole index is compared with the Hub again, for repositories that were "
        "removed, renamed or gated; 0: in every nightly run.",
    )
    max_removed_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="If more of the index than this (and ten models or more) would be removed at once, the run ends "
        "without removing any: the token or a mirror may be at fault.",
    )
    lease_seconds: float = Field(
        900.0,
        ge=2,
        description="Seconds for which the lease of a run that died blocks others; a live run renews its lease.",
    )
    lease_wait: float = Field(
        0.0, ge=0, description="Seconds to wait for another run to end; 0: end at once, with a message."
    )
    max_drift: float = Field(
        0.1,
        ge=0,
        description="If the index's statistics have drifted (relative change) by more than this since the last full "
        "run, the nightly run says that a full run is due.",
    )
    rebuild_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="If nightly runs have added a larger share of the logits, the index is rebuilt as a whole.",
    )


class GeneratorFilters(Filters):
    """Which generators of the Hub are crawled."""

    library: list[Literal["diffusers", "peft"]] = Field(  # type: ignore[assignment]
        ["diffusers", "peft"], description="Libraries whose checkpoints and adapters are loaded."
    )
    pipeline_tag: str | None = Field(
        None,
        description="Task of the models on the Hub; none for each of unconditional-image-generation and text-to-image.",
    )
    max_params: Positive = Field(4_000_000_000, description="Largest number of parameters of one model.")
    limit: Positive | None = Field(
        None, description="At most this many repositories of each task, newest first."
    )


class Generators(_Strict):
    """Models that make pictures: they are sampled, and found by what they make."""

    enabled: bool = Field(False, description="Also list, sample and publish generators.")
    samples: Positive = Field(64, le=10_000, description="Pictures that each generator makes.")
    max_samples: Positive = Field(
        256,
        le=10_000,
        description="Up to so many pictures are made of a generator as long as one half of them shows something else than "
        "the other; as many as `samples`, or fewer, for no more than these.",
    )
    steps: Positive = Field(25, le=1000, description="Steps of the sampler.")
    # With the words that an adapter declares there are 64 at most.
    prompts: list[Annotated[str, Field(max_length=500)]] = Field(
        [], max_length=56, description="Prompts for generators that take text; empty for the built-in ones."
    )
    max_image_size: Positive = Field(
        1024, le=4096, description="Largest edge of a picture, in pixels; generators of larger ones fail."
    )
    galleries: Path | None = Field(
        None,
        description="A text file of repositories, one per line, whose pictures stand for a model; these are listed besides.",
    )
    filters: GeneratorFilters = Field(
        GeneratorFilters(), description="Which generators of the Hub are crawled."
    )

    @field_validator("prompts")
    @classmethod
    def _printable(cls, value: list[str]) -> list[str]:
        if wrong := [prompt for prompt in value if not prompt.isprintable()]:
            raise ValueError(f"must be printable text on one line: {wrong[0]!r:.80}")
        return value


Share = Annotated[float, Field(ge=0, le=1)]


class Trees(_Strict):
    """How it is found out which model was made from which."""

    enabled: bool = Field(True, description="Recover model trees and publish them with the index.")
    least_probability: Share = Field(0.5, description="Edges that are less probable are left out.")
    times: bool = Field(True, description="Use the times at which repositories were made as evidence.")
    declared: bool = Field(True, description="Use the parents that models declare as evidence.")
    memory_mb: Positive = Field(2000, description="Memory that the comparison of weights may use, in MB.")
    tasks: list[str] = Field(
        [],
        description="Tasks on the Hub whose repositories are not probed but get trees, of any library: parts of their "
        'weights are read. "text-generation", for example.',
    )
    repos: Path | None = Field(
        None,
        alias="list",
        description="A text file of repositories, one per line, that get trees without being probed.",
    )
    limit: Positive | None = Field(
        None, description="At most this many repositories of each of these tasks, newest first."
    )
    bytes_per_model: Positive = Field(
        50_000_000,
        description="Bytes that are read of the weights of a repository that is not probed.",
    )
    whole: bool = Field(
        False,
        description="Read all of their weights, where these fit bytes_per_model, and not parts: only then are they compared "
        "with those of models that are probed.",
    )
    exact_bytes: int = Field(
        0,
        ge=0,
        description="Bytes that are read again of each of two models where the stored sketches leave open which one is "
        "nearest to a third; 0: none.",
    )
    readers: Positive = Field(4, description="Repositories whose weights are read at the same time.")


class Quality(_Strict):
    """The quality gate: measures of a generation before it goes live, and their limits."""

    enforce: bool = Field(
        True,
        description="Refuse a generation that exceeds a limit (exit status 3). If false it is published anyway, and "
        "the report says so.",
    )
    canaries: list[str] | Path | None = Field(
        None,
        description="Names to query in the live and in the new generation: a list, or a text file with one per "
        "line. An answer that must be among the first ten may follow after a tab: name<TAB>REPO#LOGIT, the logit by "
        "number or label, or name<TAB>REPO, a generator.",
    )
    background_canaries: int = Field(
        50, ge=0, description="Number of background names that are queried as well."
    )
    max_lost: Share = Field(
        0.15,
        description="Share of the first ten answers to canaries that may be lost, without models that left the Hub "
        "and answers that newer models pushed down. An ordinary nightly run loses 0.01.",
    )
    max_known_missed: Share = Field(
        0.0, description="Share of the canaries with a known answer that may lack it among the first ten."
    )
    max_agreement_fall: Share = Field(
        0.05,
        description="Fall that is allowed in the share of declared names whose first answers are declared so, and in "
        "the share of logits that are named as declared (at 99.9 % confidence).",
    )
    max_new_agreement_fall: Share = Field(
        0.3,
        description="Allowed difference between the share of the new models' logits that are named as declared and "
        "the others' (at 99.9 % confidence).",
    )
    max_gone: Share = Field(
        0.2,
        description="Share of the live generation's repositories that may be missing (at 99.9 % confidence).",
    )
    max_failure_rise: Share = Field(
        0.1,
        description="Allowed rise of the share of models that fail, for any reason or for one, over the last run's "
        "(at 99.9 % confidence).",
    )


class _Indexed(_Strict):
    """The keys that decide what is indexed and how a logit is described."""

    store: str = Field(
        description="Where everything is kept: a directory, or s3://, gs:// or az://bucket/prefix."
    )
    probes: str = Field(
        description="Probe images: a folder, Parquet with an image column, or hf://datasets/OWNER/NAME/*.parquet."
    )
    probe_count: Positive | None = Field(4000, description='Number of probes that are drawn; "none" for all.')
    encoder: str = Field(
        "openai/clip-vit-base-patch32", description="The text-image encoder: a Hub id or a folder."
    )
    background: str = Field(
        "hub",
        description="Background concepts: hub (what its models declare; where that is little, names of imagenet-21k that "
        "fit its logits), imagenet-21k, or a text file, one name a line.",
    )
    background_count: Positive = Field(2000, description="Largest number of background concepts.")
    prompt: str | list[str] = Field(
        "a photo of a {}",
        description="Sentence that a concept's name is put into before encoding; the embeddings of several are averaged.",
    )

    fraction: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Share of the probes that each model sees; three quarters of them are the same for all models.",
    )
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
    trees: Trees = Field(Trees(), description="Model trees.")
    generators: Generators = Field(Generators(), description="Models that make pictures.")

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
    """The configuration of a job.

    Keys are in the file's order: those of the index, those of the workers, and those below.
    """

    spread_logits: Positive = Field(
        500_000,
        description="From this many logits on an index is built and checked by workers on Ray; a smaller one by the command "
        "alone.",
    )
    max_failed_share: float = Field(
        0.5, ge=0, le=1, description="The job ends with status 3 if a larger share of the models failed."
    )
    quality: Quality = Field(
        Quality(), description="Limits of the quality gate; its reports are in `STORE/quality`."
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
        return f"{old}: is called {name} now, and both are given: leave {old} out"
    content[name] = value
    return None


def _name_now(name: str) -> str:
    if name not in OLD_NAMES:
        return name
    _log.warning("configuration: %s is called %s now; the old name will be removed", name, OLD_NAMES[name])
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
            return f"--set {item}: {key} is no table and has no keys"
        place = inner
    place[keys[-1]] = value
    return None


def _problem(error: ErrorDetails) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file as a whole"
    if error["type"] == "missing":
        return f"{where}: is needed ({_description(error['loc'])})"
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such key{did_you_mean(str(error['loc'][-1]), _keys(error['loc'][:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    shown = f", not {value!r}" if isinstance(value, str | int | float | bool) else ""
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}"


def _keys(table: Sequence[Any]) -> list[str]:
    """The keys of the file, or of one of its tables."""
    model: type[BaseModel] = Config
    for name in table:
        field = model.model_fields.get(str(name))
        if field is None or not isinstance(field.default, BaseModel):
            return []
        model = type(field.default)
    return [field.alias or name for name, field in model.model_fields.items()]


def _description(location: Sequence[Any]) -> str:
    field = Config.model_fields.get(str(location[0])) if location else None
    return (field.description if field is not None else None) or "see docs/configuration.md"


def template() -> str:
    """A configuration file with every key, its meaning, and its default (commented out where there is one)."""
    lines = ["# probelog-index: every key, its meaning and its default.", ""]
    for name, _, table in tables():
        if name:
            lines += [f"[{name}]", ""]
        for key, field in table.model_fields.items():
            if not isinstance(field.default, BaseModel):
                lines += _template_lines(field.alias or key, field)
    return "\n".join(lines)


def tables(
    model: type[BaseModel] = Config, name: str = "", meaning: str = ""
) -> Iterator[tuple[str, str, type[BaseModel]]]:
    """The tables of the file: name (empty: the top of the file), meaning and model, each before those below it."""
    yield name, meaning, model
    for key, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from tables(type(field.default), f"{name}.{key}" if name else key, field.description or "")


def _template_lines(name: str, field: FieldInfo) -> list[str]:
    if field.is_required():
        example = {"store": '"/data/probelog"', "probes": '"photos/"'}[name]
        return [f"# {field.description}", f"{name} = {example}", ""]
    shown = "none" if field.default is None else json.dumps(field.default)
    key = f"# {name} =" if field.default is None else f"# {name} = {shown}"
    return [f"# {field.description}", key, ""]
