"""Answers for programs: JSON, CSV, problem details (RFC 9457), and the description of the interface (OpenAPI 3.1)."""

from __future__ import annotations

import datetime as dt
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from probelog import __version__
from probelog.spreadsheet import csv_lines
from probelog.web.answers import as_json
from probelog.web.question import ANSWERS, FACETS, FOLDS, KINDS, MOST_ANSWERS, ORDERS


def json_response(content: object, status: int = 200) -> Response:
    """Any value as JSON."""
    body = json.dumps(as_json(content), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    return Response(body, status, media_type="application/json")


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as a problem detail."""
    phrase = HTTPStatus(status).phrase
    content = {"type": "about:blank", "title": phrase, "status": status, "detail": detail}
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    return Response(body, status, dict(headers or {}), media_type="application/problem+json")


def csv_response(rows: Sequence[Mapping[str, Any]], name: str) -> Response:
    """Rows as CSV (`probelog.spreadsheet`), with a header."""
    columns = [*rows[0]] if rows else []
    text = "".join(csv_lines(columns, ([as_json(row[column]) for column in columns] for row in rows)))
    headers = {"Content-Disposition": f'attachment; filename="{name}.csv"'}
    return Response(text.encode("utf-8", "replace"), 200, headers, "text/csv; charset=utf-8")


# The description


def openapi() -> dict[str, Any]:
    """The description of the interface; what answers hold is read from the records that they are made of."""
    from probelog.search.generators.results import GeneratorHit, GeneratorSummary
    from probelog.search.licences import LicenceConflict
    from probelog.search.results import Hit, ModelHit, ModelSummary
    from probelog.trees.edges import Edge

    schemas: dict[str, Any] = {
        "Problem": _object(
            {"type": _TEXT, "title": _TEXT, "status": {"type": "integer"}, "detail": _TEXT},
            "An error (RFC 9457).",
        ),
        "Search": _object(
            {
                "generation": _TEXT,
                "query": {"type": "object"},
                "notes": _list(_TEXT),
                "hits": _list({"anyOf": [_ref("Hit"), _ref("GeneratorHit")]}),
            },
            "Answers, best first: logits of classifiers, or generators.",
        ),
        "Model": _object(
            {
                "generation": _TEXT,
                "model": _ref("ModelSummary"),
                "start": {"type": "integer"},
                "more": {"type": "boolean"},
            },
            "A model, with a part of its logits; `more`: others follow, from `start` plus their number on.",
        ),
        "Generator": _object(
            {"generation": _TEXT, "generator": _ref("GeneratorSummary")}, "A generator and what it makes."
        ),
        "Similar": _object({"generation": _TEXT, "hits": _list(_ref("ModelHit"))}, "Models, best first."),
        "Conflicts": _object(
            {"generation": _TEXT, "notes": _list(_TEXT), "conflicts": _list(_ref("LicenceConflict"))},
            "Where a model's declarations do not fit its weights.",
        ),
        "Tree": _object(
            {
                "generation": _TEXT,
                "repo": _TEXT,
                "root": _TEXT_OR_NULL,
                "depth": {"type": ["integer", "null"]},
                **{name: _list(_ref("Edge")) for name in ("ancestors", "siblings", "descendants")},
                "notes": _list(_TEXT),
            },
            "The edges around a model.",
        ),
        "Facets": _object(
            {"generation": _TEXT, "models": {"type": "integer"}, "facets": _list({"type": "object"})},
            "How many models have which values, under some filters.",
        ),
        "Index": {"type": "object", "description": "How the index was made, and what it holds."},
        "Picture": _object({"picture": _TEXT}, "What to give a search as `picture`."),
        "Sketch": _object({"sketch": _TEXT}, "What to give a search for generators as `sketch`."),
    }
    for record in (Hit, ModelHit, ModelSummary, GeneratorHit, GeneratorSummary, LicenceConflict, Edge):
        _schema(record, schemas)
    repo = _parameter("repo", "A repository: owner/name. Its slash may stand in the path.", _TEXT, "path")
    start = _parameter(
        "start", "So many logits are left out.", {"type": "integer", "minimum": 0, "default": 0}
    )
    limit = _parameter("limit", "Most descendants, and most siblings.", {"type": "integer", "minimum": 1})
    table = _parameter("format", "`json` or `csv`.", {"enum": ["json", "csv"], "default": "json"})
    facets = [
        _parameter(name, f"Only models whose {name} is one of these; `unknown` is a value.", _list(_TEXT))
        for name in dict.fromkeys(name for names in FACETS.values() for name in names)
    ]
    kind = _parameter(
        "kind",
        "Of the models that answer. Not all filters are there for both kinds; `sketch` is for generators.",
        {"enum": [*KINDS], "default": KINDS[0]},
    )
    search = [
        kind,
        _parameter("q", "Names of one concept; separated by commas or repeated.", _list(_TEXT)),
        _parameter("not", "What must not be recognised or made; likewise.", _list(_TEXT)),
        _parameter(
            "like",
            "A logit whose like is looked for, REPO#NUMBER, or a generator, REPO; or a classifier, REPO, for generators of "
            "what it recognises.",
            _TEXT,
        ),
        _parameter("picture", "What `POST /api/pictures` gave.", _list(_TEXT)),
        _parameter("sketch", "What `POST /api/sketches` gave.", _list(_TEXT)),
        _parameter(
            "k",
            "Number of answers.",
            {"type": "integer", "minimum": 1, "maximum": MOST_ANSWERS, "default": ANSWERS},
        ),
        _parameter(
            "by",
            "What answers are folded by: logits by model or family, generators by family.",
            {"enum": [*FOLDS[KINDS[0]]]},
        ),
        _parameter("sort", "What orders the answers.", {"enum": [*ORDERS], "default": ORDERS[0]}),
        _parameter("min_confidence", "From 0 to 1.", {"type": "number", "minimum": 0, "maximum": 1}),
        *facets,
        table,
    ]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ProbeLog",
            "version": __version__,
            "description": "Search for image classifiers by what they recognise, and for generators by what they make.",
        },
        "paths": {
            "/api/search": _get(
                "search", "The logits that recognise a concept, or generators that make it", "Search", search
            ),
            "/api/models/{repo}": _get(
                "model", "A model and what its logits recognise", "Model", [repo, start, table]
            ),
            "/api/generators/{repo}": _get("generator", "A generator and what it makes", "Generator", [repo]),
            "/api/similar/{repo}": _get(
                "similar", "Models that do what this one does", "Similar", [repo, table]
            ),
            "/api/tree/{repo}": _get("tree", "The edges around a model", "Tree", [repo, limit, table]),
            "/api/licences/{repo}": _get("licences", "Its licence conflicts", "Conflicts", [repo, table]),
            "/api/facets": _get("facets", "Counts of models by their facts", "Facets", [kind, *facets]),
            "/api/index": _get("index", "What the index says about itself", "Index", []),
            "/api/pictures": _post("picture", "Embed a picture to search with; it is not kept", "Picture"),
            "/api/sketches": _post(
                "sketch", "Embed a drawing of dark lines to search generators with; it is not kept", "Sketch"
            ),
        },
        "components": {"schemas": schemas},
    }


_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_SIMPLE: dict[Any, dict[str, Any]] = {
    str: _TEXT,
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    dt.datetime: {"type": "string", "format": "date-time"},
    type(None): {"type": "null"},
}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _object(properties: Mapping[str, Any], description: str) -> dict[str, Any]:
    return {"type": "object", "description": description, "properties": properties, "required": [*properties]}


def _schema(kind: object, schemas: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type; those of records go into ``schemas``."""
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [item.value for item in kind]}
    if isinstance(kind, type) and is_dataclass(kind):
        if kind.__name__ not in schemas:
            schemas[kind.__name__] = {}
            hints = typing.get_type_hints(kind)
            properties = {item.name: _schema(hints[item.name], schemas) for item in fields(kind)}
            summary = (kind.__doc__ or "").strip().split("\n")[0]
            schemas[kind.__name__] = _object(properties, summary)
        return _ref(kind.__name__)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(item, schemas) for item in arguments]}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], schemas)}
    return _list(_schema(arguments[0], schemas))


def _parameter(
    name: str, description: str, schema: Mapping[str, Any], where: str = "query"
) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "description": description,
        "schema": schema,
        **({"required": True} if where == "path" else {}),
    }


def _get(name: str, summary: str, schema: str, parameters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    responses = _responses(schema)
    if any(item["name"] == "format" for item in parameters):
        responses["200"]["content"]["text/csv"] = {"schema": _TEXT}
    return {
        "get": {
            "operationId": name,
            "summary": summary,
            "parameters": [*parameters],
            "responses": responses,
        }
    }


def _post(name: str, summary: str, schema: str) -> dict[str, Any]:
    picture = {"image/*": {"schema": {"type": "string", "format": "binary"}}}
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            "requestBody": {"required": True, "content": picture},
            "responses": _responses(schema),
        }
    }


def _responses(schema: str) -> dict[str, Any]:
    return {
        "200": {"description": "Answered.", "content": {"application/json": {"schema": _ref(schema)}}},
        "default": {
            "description": "An error; 503 has a Retry-After header.",
            "content": {"application/problem+json": {"schema": _ref("Problem")}},
        },
    }
