"""The pages as HTML. Every text is untrusted: it is escaped, made printable and cut, whatever the template forgets."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse, Response

from probelog import __version__
from probelog.terminal import printable
from probelog.web import answers
from probelog.web.question import CLASSIFIER, GENERATOR, KINDS, MOST_ANSWERS, Question

if TYPE_CHECKING:
    from probelog.search.client import Index
    from probelog.search.evidence import Evidence
    from probelog.search.generators.results import GeneratorHit, GeneratorResults, GeneratorSummary
    from probelog.search.results import Hit, ModelSummary, Results
    from probelog.search.trees import Tree
    from probelog.web.facets import Facet

_LONGEST = 2000
_FACET_TITLES = {
    "licence": "Licence",
    "library": "Library",
    "pipeline": "Pipeline",
    "architecture": "Architecture",
    "head": "Head",
    "root": "Root of its tree",
    "conditioning": "Asked by",
    "base_repo": "Adapter of",
    "size": "Parameters",
    "downloads": "Downloads",
    "created": "Year",
}
_KIND_TITLES = {CLASSIFIER: "Classifiers", GENERATOR: "Generators"}
_FOLD_TITLES = {
    CLASSIFIER: {None: "every class", "model": "one a model", "family": "one a family"},
    GENERATOR: {None: "every generator", "family": "one a family"},
}


class Pages:
    """Renders the pages.

    Args:
        static: addresses of style, script and icon, by name.
    """

    def __init__(self, static: Mapping[str, str]) -> None:
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=_harmless,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {
            "percent": _percent,
            "count": _count,
            "date": _date,
            "ago": _ago,
            "lines": _lines,
        }
        self._templates.globals |= {
            "static": static,
            "version": __version__,
            "address": answers.address,
            "differs": answers.differs,
            "accuracy_title": answers.accuracy_title,
            "hub": _hub,
            "logit_name": lambda repo, logit: f"{repo}#{logit}",
            "query": urlencode,
            "facet_titles": _FACET_TITLES,
            "fold_titles": _FOLD_TITLES,
            "kind_titles": _KIND_TITLES,
        }

    def home(
        self, index: Index, question: Question | None = None, problem: str = "", status: int = 200
    ) -> Response:
        """The box, and what the index holds; or why a search was not understood."""
        settings = index.settings
        return self._page(
            "home",
            status,
            index=index,
            settings=settings,
            question=question or Question(),
            problem=problem,
            kinds=_kinds(index),
        )

    def search(
        self,
        index: Index,
        question: Question,
        results: Results | GeneratorResults | None,
        evidence: Sequence[Evidence],
        facets: Sequence[Facet],
        matching: int,
    ) -> Response:
        """Answers with their evidence, or how many models the filters leave."""
        more = None
        if results is not None and len(results) == question.k and question.k < MOST_ANSWERS:
            more = question.changed(k=min(MOST_ANSWERS, question.k + 20))
        return self._page(
            "search",
            index=index,
            probes=_probes(index),
            question=question,
            results=results,
            evidence=evidence,
            facets=facets,
            matching=matching,
            more=more,
            samples=_samples(index),
            images=index.settings.get("image_encoder") is not None,
            kinds=_kinds(index),
        )

    def model(self, index: Index, model: answers.Model) -> Response:
        """One model."""
        return self._page(
            "model",
            model=model,
            summary=model.summary,
            probes=_probes(index),
            trees=answers.has_trees(index),
            logits=answers.LOGITS,
            kinds=_kinds(index),
        )

    def generator(self, index: Index, summary: GeneratorSummary) -> Response:
        """One generator."""
        return self._page(
            "generator", summary=summary, samples=_samples(index), classifiers=index.settings["models"] > 0
        )

    def use(self, repo: str, logit: str, code: str) -> Response:
        """Code for a model."""
        return self._page("use", repo=repo, logit=logit, code=code)

    def tree(self, tree: Tree) -> Response:
        """A model's tree."""
        return self._page("tree", tree=tree, nodes=answers.outline(tree))

    def about(self, index: Index, facts: answers.Facts) -> Response:
        """What the index says about itself."""
        return self._page("index", index=index, facts=facts, settings=facts.settings)

    def error(self, status: int, reason: str, headers: Mapping[str, str]) -> Response:
        """Why there is no page."""
        page = self._page("error", status, title=HTTPStatus(status).phrase, reason=reason)
        page.headers.update(headers)
        return page

    def _page(self, template: str, status: int = 200, **values: object) -> Response:
        text = self._templates.get_template(f"{template}.html.j2").render(**values)
        return HTMLResponse(text.encode("utf-8", "replace"), status)


def _hub(answer: Hit | ModelSummary | GeneratorHit | GeneratorSummary) -> str | None:
    """The Hub's page of a model; None where an index names a Hub that no browser should be sent to."""
    return answer.url if answer.url.startswith(("https://", "http://")) else None


def _probes(index: Index) -> str:
    """Where the probes' pictures are."""
    return "/probes/" + quote(str(index.settings["probe_set"])[:16], safe="")


def _samples(index: Index) -> str:
    """Where the pictures are that generators made."""
    return "/samples/" + quote(index.generation, safe="")


def _kinds(index: Index) -> list[str]:
    """Kinds of models that the index holds."""
    held = {CLASSIFIER: index.models, GENERATOR: index.generators}
    return [kind for kind in KINDS if held[kind]]


def _harmless(value: object) -> object:
    """What an expression of a template gives, without control characters; markup is our own."""
    if isinstance(value, Markup) or value is None:
        return value
    text = str(value)
    if text.isascii() and text.isprintable() and len(text) <= _LONGEST:
        return text
    return printable(text, _LONGEST)


def _lines(code: str) -> Markup:
    """Text of several lines."""
    return Markup("\n").join(escape(printable(line, _LONGEST)) for line in code.splitlines())


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _count(number: float | None) -> str:
    return "unknown" if number is None else f"{number:,.0f}"


def _date(time: dt.datetime | None) -> str:
    return "unknown" if time is None else f"{time:%Y-%m-%d}"


def _ago(time: str) -> str:
    """How long ago a time was (ISO 8601)."""
    try:
        then = dt.datetime.fromisoformat(time)
        seconds = (dt.datetime.now(dt.UTC) - then).total_seconds()
    except (ValueError, TypeError):
        return "at an unknown time"
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number:,} {unit}{'s' if number != 1 else ''} ago"
    return "just now"
