"""The page of all configuration keys, made from the code: ``docs/configuration.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from pipelines.config.model import Config, tables

_HEAD = """\
# Configuration

One TOML file describes a job; `--set key=value` (`--set filters.limit=10`) overrides one of its keys,
`--store` of `store`. `probelog-index config` prints a file with every key to start from, and
`probelog-index config check FILE` reports every error in one, before a cluster is paid for.
This page is generated: `probelog-index config --markdown > docs/configuration.md`.

A key that is not given has its default. Relative paths are relative to the folder that the job runs in.
"""

_ENVIRONMENT = """\
## Secrets and addresses

These come from the environment, never from the file.

| variable | meaning |
|---|---|
| `HF_ENDPOINT` | the Hub's address, for mirrors and `probelog-index hub`; by default the public Hub. A user and password in it (`https://USER:PASSWORD@mirror`) are sent to it in place of the token, and are written nowhere |
| `HF_TOKEN` | raises the Hub's rate limits, and opens gated repositories that its owner has access to |
| `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN` | credentials for `s3://`; profiles and roles (`AWS_PROFILE`, SSO) do as well |
| `AWS_REGION`, `AWS_ENDPOINT_URL` | its region, and its address where it is not Amazon's |
| `GOOGLE_APPLICATION_CREDENTIALS` | credentials for `gs://`: a file; on Google's machines none is needed |
| `AZURE_STORAGE_ACCOUNT_NAME`, and `AZURE_STORAGE_ACCOUNT_KEY`, `AZURE_STORAGE_SAS_TOKEN` or `AZURE_CLIENT_ID`, `AZURE_TENANT_ID`, `AZURE_CLIENT_SECRET` | the account of `az://CONTAINER`, and credentials; on Azure's machines and with workload identity the name is enough |
| `GOOGLE_BASE_URL`, `AZURE_STORAGE_ENDPOINT` | addresses of such services elsewhere |
| `RAY_ADDRESS` | the Ray cluster; set inside a Ray job |
| `PROBELOG_NODE_RESOURCE` | on a cluster that others use: a custom resource of Ray's; actors and tasks go only to nodes that offer it |
| `RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` | Ray's own; a Ray on this machine has a token in `~/.ray/auth_token` unless they say another |
| `RAY_TMPDIR` | where a Ray on this machine keeps its logs (in `ray/session_latest/logs` there); by default `/tmp/probelog-UID` |

Keys in an address of a store (`s3://KEY:SECRET@bucket`, a signature after `?`, or in `AWS_ENDPOINT_URL`) are refused: addresses are recorded.
What stands in these variables, and in those of proxies, is cut from logs, messages, tracebacks and records (`***`).
"""


def config_page() -> str:
    """Every key with its type, default and meaning, in Markdown."""
    needed = Config.model_json_schema()["required"]
    lines = [_HEAD, "## Keys", "", *_TABLE_HEAD]
    for name, meaning, table in tables():
        if name:
            lines += ["", f"## `[{name}]`", "", meaning, "", *_TABLE_HEAD]
        keys = table.model_json_schema()["properties"]
        for key, field in table.model_fields.items():
            if not isinstance(field.default, BaseModel):
                key = field.alias or key
                lines.append(_row(key, keys[key], not name and key in needed))
    return "\n".join([*lines, "", _ENVIRONMENT])


_TABLE_HEAD = ["| key | type | default | meaning |", "|---|---|---|---|"]


def _row(name: str, facts: Mapping[str, Any], needed: bool) -> str:
    default = facts.get("default")
    shown = "none" if default is None else f"`{json.dumps(default)}`"
    cells = [f"`{name}`", _type(facts), "**needed**" if needed else shown, facts["description"]]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_NAMES = {
    ("string", None): "text",
    ("string", "path"): "path",
    ("string", "date-time"): "date and time",
    ("integer", None): "whole number",
    ("number", None): "number",
    ("boolean", None): "true or false",
}


def _type(facts: Mapping[str, Any]) -> str:
    """The type of a key in words, from a field's JSON schema."""
    if "anyOf" in facts:
        kinds = [_type(kind) for kind in facts["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in facts:
        return " or ".join(f"`{json.dumps(value)}`" for value in facts["enum"])
    if facts["type"] == "array":
        return f"list of {_type(facts['items'])}"
    kind = _NAMES[facts["type"], facts.get("format")]
    bounds = [
        f"{sign} {facts[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"))
        if key in facts
    ]
    return " ".join([kind, ", ".join(bounds)]) if bounds else kind
