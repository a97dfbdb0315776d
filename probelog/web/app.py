"""The application: which address gives which page, and the same answers for programs under ``/api``."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from probelog.encoders.decoding import UnreadableImageError, decode
from probelog.errors import ProbeLogError, QueryError, StoreError
from probelog.search.evidence import media_type
from probelog.web import answers
from probelog.web.facets import Facets
from probelog.web.formats import csv_response, json_response, openapi, problem
from probelog.web.middleware import Guard, Metrics
from probelog.web.pages import Pages
from probelog.web.pictures import Thumbnails, form_fields, token_of
from probelog.web.question import CLASSIFIER, GENERATOR, Question
from probelog.web.workers import BusyError, Workers

if TYPE_CHECKING:
    from probelog.search.client import Index
    from probelog.search.evidence import Evidence
    from probelog.search.results import Hit

P = ParamSpec("P")
T = TypeVar("T")

# Work that waits for a thread, and how long: 200 searches take a few seconds.
_MOST_WAITING = 200
_WAIT_SECONDS = 10.0
# Work that has not ended after so long never will: the server says that it is ill.
_STALLED_SECONDS = 120.0
_LARGEST_PICTURE = 10 << 20  # likewise all files of a form
_MOST_PIXELS = 24_000_000  # 72 MB, for each thread
_PICTURE_SECONDS = 20.0
# How often a server that nobody asks looks for a newer generation.
_LOOK_SECONDS = 30.0
# Pages are a tenth as large then; the probes' pictures are smaller than this, and gain nothing.
_SMALLEST_GZIP = 4096
# Fields of a search that are files.
_EMBEDDED = ("picture", "sketch")
_FOR_EVER = "public, max-age=31536000, immutable"
_STATIC = {"style.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}


def create_app(index: Index, hosts: Sequence[str] | None = None, threads: int = 4) -> Starlette:
    """The application that answers from an index.

    Args:
        index: that is asked.
        hosts: names that the server may be called by; None: any.
        threads: answers that are computed at the same time.
    """
    return _Site(index, hosts, threads).app


class _Site:
    def __init__(self, index: Index, hosts: Sequence[str] | None, threads: int) -> None:
        self._index = index
        self._workers = Workers(threads, _MOST_WAITING, _WAIT_SECONDS)
        self._facets = Facets(index)
        self._thumbnails = Thumbnails()
        self._static = _static_files()
        self._pages = Pages({name: f"/static/{digest}/{name}" for name, (digest, _) in self._static.items()})
        self._metrics = Metrics()
        self._metrics.gauge("waiting", "Answers that wait for a thread.", lambda: self._workers.waiting)
        self._metrics.gauge("computing", "Answers that are computed.", lambda: self._workers.running)
        self._metrics.gauge("models", "Models in the index.", lambda: self._index.settings["models"])
        self._metrics.gauge("logits", "Logits in the index.", lambda: self._index.settings["logits"])
        self._metrics.gauge("generators", "Generators in the index.", lambda: self._index.generators)
        self._description = openapi()
        routes = [
            Route("/", self.home),
            Route("/search", self.search),
            Route("/search", self.upload, methods=["POST"]),
            Route("/models/{repo:path}", self.model),
            Route("/generators/{repo:path}", self.generator),
            Route("/use/{repo:path}", self.use),
            Route("/tree/{repo:path}", self.tree),
            Route("/index", self.about),
            Route("/probes/{set}/{probe:int}", self.thumbnail),
            Route("/samples/{generation}/{number:int}/{repo:path}", self.sample),
            Route("/static/{digest}/{name}", self.static),
            Route("/api/search", self.api_search),
            Route("/api/models/{repo:path}", self.api_model),
            Route("/api/generators/{repo:path}", self.api_generator),
            Route("/api/similar/{repo:path}", self.api_similar),
            Route("/api/tree/{repo:path}", self.api_tree),
            Route("/api/licences/{repo:path}", self.api_licences),
            Route("/api/facets", self.api_facets),
            Route("/api/index", self.api_index),
            Route("/api/pictures", self.api_pictures, methods=["POST"]),
            Route("/api/sketches", self.api_sketches, methods=["POST"]),
            Route("/api/openapi.json", self.api_description),
            Route("/healthz", self.health),
            Route("/metrics", self.metrics),
        ]
        self.app = Starlette(
            routes=routes,
            middleware=[
                Middleware(Guard, metrics=self._metrics, problem=self._error, hosts=hosts),
                Middleware(GZipMiddleware, minimum_size=_SMALLEST_GZIP, compresslevel=4),
            ],
            exception_handlers={
                HTTPException: self._on_http,
                ProbeLogError: self._on_error,
                BusyError: self._on_error,
            },
            lifespan=self._lifespan,
        )

    # What is computed goes to a thread, and back comes a whole answer: the loop that serves everybody only passes it on.

    async def _answer(self, request: Request, work: Callable[[], Response]) -> Response:
        client = request.client.host if request.client else ""
        return await self._workers.run(client, work)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        keeping = asyncio.create_task(self._keep_up())
        yield
        keeping.cancel()
        self._workers.close()

    async def _keep_up(self) -> None:
        """Look for a newer generation, and ask it something before a visitor does: the first answer takes longest."""
        warm = ""
        while True:
            with contextlib.suppress(ProbeLogError, BusyError):
                await self._workers.run("", self._look)
                if self._index.generation != warm:
                    warm = self._index.generation
                    await self._workers.run("", functools.partial(self._facets.counts, ()))
                    await self._workers.run("", lambda: self._index.search("dog", k=1))
            await asyncio.sleep(_LOOK_SECONDS)

    def _look(self) -> None:
        with contextlib.suppress(QueryError):
            self._index.thumbnail(0)

    # Pages

    async def home(self, request: Request) -> Response:
        """The box, and what the index holds."""
        kind = [pair for pair in request.query_params.multi_items() if pair[0] == "kind"]
        question = self._asked(kind)
        return await self._answer(request, lambda: self._pages.home(self._index, question))

    async def search(self, request: Request) -> Response:
        """Answers to a search. A search that is not understood is said so, above the box that it was typed into."""
        query = request.query_params.multi_items()
        try:
            question = self._asked(query)
        except QueryError as error:
            return self._pages.home(self._index, problem=str(error), status=400)
        if question.is_empty and not question.filters:
            return RedirectResponse("/" if question.kind == CLASSIFIER else f"/?kind={question.kind}", 303)

        def work() -> Response:
            try:
                results = None if question.is_empty else answers.search(self._index, question)
                hits = () if question.kind != CLASSIFIER else cast("Sequence[Hit]", results or ())
                evidence = self._evidence(hits)
                facets, matching = self._facets.counts(question.filters, question.kind)
            except QueryError as error:
                asked = question.whole_model
                if asked is not None and asked in self._index:  # what it is like is on its page
                    return RedirectResponse(f"{answers.address('/models', asked)}?similar=1#similar", 303)
                return self._pages.home(self._index, question, str(error), 400)
            return self._pages.search(self._index, question, results, evidence, facets, matching)

        return await self._answer(request, work)

    def _asked(self, query: Sequence[tuple[str, str]]) -> Question:
        """What a visitor asks. Where the index holds generators alone, these are meant unless a kind is named."""
        settings = self._index.settings
        alone = not settings["models"] and settings.get("generators") is not None
        named = any(name == "kind" for name, _ in query)
        return Question.from_query([*query, *([("kind", GENERATOR)] if alone and not named else [])])

    async def upload(self, request: Request) -> Response:
        """A search with files, of a browser that runs no script: its answer is the search's address."""
        fields = form_fields(request.headers.get("content-type", ""), await _body(request))

        def work() -> Response:
            query = []
            for name, content in fields:
                if name in _EMBEDDED:
                    query.append((name, self._embedded(name, content)))
                else:
                    query.append((name, content.decode("utf-8", "replace")))
            return RedirectResponse(f"/search?{self._asked(query).query}", 303)

        return await self._answer(request, work)

    def _evidence(self, hits: Sequence[Hit]) -> list[Evidence]:
        """The evidence of all answers. Pictures that a visitor is about to ask for are read at once: one by one costs more."""
        evidence = self._index.evidence_of(hits, pictures=False)
        probe_set = self._index.settings["probe_set"][:16]

        def kept(item: Evidence) -> bool:
            return all(self._thumbnails.get(probe_set, shown.probe) for shown in item.strongest)

        unread = [hit for hit, item in zip(hits, evidence, strict=True) if not kept(item)]
        for item in self._index.evidence_of(unread):
            shown = (*item.strongest, *item.weakest)
            self._thumbnails.keep(probe_set, [(one.probe, one.picture) for one in shown if one.picture])
        return evidence

    async def model(self, request: Request) -> Response:
        """One model."""
        repo, start = request.path_params["repo"], _start(request)

        def work() -> Response:
            # In a large index it takes a second to compare a model with all others: not for everybody who looks at it.
            similar = not self._index.settings["large"] or "similar" in request.query_params
            found = _existing(answers.model, self._index, repo, start, similar=similar)
            return self._pages.model(self._index, found)

        return await self._answer(request, work)

    async def generator(self, request: Request) -> Response:
        """One generator, and what it made."""
        repo = request.path_params["repo"]

        def work() -> Response:
            return self._pages.generator(self._index, _existing(self._index.show_generator, repo))

        return await self._answer(request, work)

    async def use(self, request: Request) -> Response:
        """Code that loads a model and gives one of its logits."""
        repo, logit = request.path_params["repo"], request.query_params.get("logit", "0")

        def work() -> Response:
            return self._pages.use(repo, logit, _existing(self._index.snippet, repo, logit))

        return await self._answer(request, work)

    async def tree(self, request: Request) -> Response:
        """A model's tree."""
        repo = request.path_params["repo"]
        return await self._answer(
            request, lambda: self._pages.tree(_existing(self._index.tree, repo, limit=answers.RELATIVES))
        )

    async def about(self, request: Request) -> Response:
        """What the index says about itself."""
        return await self._answer(request, lambda: self._pages.about(self._index, answers.facts(self._index)))

    async def thumbnail(self, request: Request) -> Response:
        """A small picture of a probe. Its address holds the probe set, so that it never changes."""
        probe_set, probe = request.path_params["set"], request.path_params["probe"]
        picture = self._thumbnails.get(probe_set, probe)
        if picture is None:

            def work() -> Response:
                if probe_set != self._index.settings["probe_set"][: len(probe_set)] or probe >= 1 << 31:
                    return problem(404, "the index has no such probes")
                read = _existing(self._index.thumbnail, probe)
                self._thumbnails.keep(probe_set, [(probe, read)])
                return _picture(read)

            return await self._answer(request, work)
        return _picture(picture)

    async def sample(self, request: Request) -> Response:
        """A small picture that a generator made. Its address holds the generation, so that it never changes."""
        repo, number = request.path_params["repo"], request.path_params["number"]
        owner = f"{request.path_params['generation']}/{repo}"
        picture = self._thumbnails.get(owner, number)
        if picture is None:

            def work() -> Response:
                current = request.path_params["generation"] == self._index.generation
                pictures = _existing(self._index.generator_samples, repo)
                if number >= len(pictures):
                    return problem(404, f"there is no sample {number}")
                if not current:
                    return _picture(pictures[number], "no-cache")
                self._thumbnails.keep(owner, enumerate(pictures))
                return _picture(pictures[number])

            return await self._answer(request, work)
        return _picture(picture)

    async def static(self, request: Request) -> Response:
        """Style, script and icon. Their addresses hold a digest, so that they never change."""
        name = request.path_params["name"]
        digest, content = self._static.get(name, ("", b""))
        if request.path_params["digest"] != digest or not digest:
            raise HTTPException(404)
        return Response(content, media_type=_STATIC[name], headers={"Cache-Control": _FOR_EVER})

    # For programs

    async def api_search(self, request: Request) -> Response:
        """Answers to a search."""
        question = Question.from_query(request.query_params.multi_items(), strict=True)

        def work() -> Response:
            results = answers.search(self._index, question)
            hits = [answers.record(hit) for hit in results]
            if _table(request):
                return csv_response(hits, "search")
            query = dict.fromkeys(name for name, _ in question.pairs())
            asked = {name: [v for n, v in question.pairs() if n == name] for name in query}
            return json_response({**self._generation(), "query": asked, "notes": results.notes, "hits": hits})

        return await self._answer(request, work)

    async def api_model(self, request: Request) -> Response:
        """One model and what its logits recognise."""
        repo, start = request.path_params["repo"], _start(request)

        def work() -> Response:
            found = _existing(answers.model, self._index, repo, start, around=False)
            if _table(request):
                return csv_response([answers.record(item) for item in found.summary.logits], "model")
            return json_response(
                {**self._generation(), "model": found.summary, "start": start, "more": found.more}
            )

        return await self._answer(request, work)

    async def api_generator(self, request: Request) -> Response:
        """One generator and what it makes."""
        repo = request.path_params["repo"]

        def work() -> Response:
            found = _existing(self._index.show_generator, repo)
            return json_response({**self._generation(), "generator": found})

        return await self._answer(request, work)

    async def api_similar(self, request: Request) -> Response:
        """Models that do what one does."""
        return await self._rows(
            request, "similar", "hits", lambda repo: (self._index.models_like(repo, k=answers.SIMILAR), {})
        )

    async def api_licences(self, request: Request) -> Response:
        """The licence conflicts of one model."""

        def rows(repo: str) -> tuple[Sequence[Any], Mapping[str, Any]]:
            conflicts = self._index.licence_conflicts(repo=repo)
            return [item.to_dict() for item in conflicts], {"notes": conflicts.notes}

        return await self._rows(request, "licences", "conflicts", rows)

    async def _rows(
        self,
        request: Request,
        name: str,
        key: str,
        read: Callable[[str], tuple[Sequence[Any], Mapping[str, Any]]],
    ) -> Response:
        def work() -> Response:
            rows, further = _existing(read, request.path_params["repo"])
            plain = [answers.record(row) for row in rows]
            if _table(request):
                return csv_response(plain, name)
            return json_response({**self._generation(), **further, key: plain})

        return await self._answer(request, work)

    async def api_tree(self, request: Request) -> Response:
        """The edges around one model."""
        repo, limit = request.path_params["repo"], _number(request, "limit", answers.RELATIVES, 1, 1000)

        def work() -> Response:
            tree = _existing(self._index.tree, repo, limit=limit)
            if _table(request):
                return csv_response([edge.to_dict() for edge in tree.edges], "tree")
            return json_response({**self._generation(), **tree.to_dict()})

        return await self._answer(request, work)

    async def api_facets(self, request: Request) -> Response:
        """Counts of models by their facts."""
        question = Question.from_query(request.query_params.multi_items(), strict=True)
        assert question.where is None or question.where  # a value that is none of its facet is an error

        def work() -> Response:
            facets, matching = self._facets.counts(question.filters, question.kind)
            return json_response({**self._generation(), "models": matching, "facets": facets})

        return await self._answer(request, work)

    async def api_index(self, request: Request) -> Response:
        """What the index says about itself."""
        return await self._answer(request, lambda: json_response(answers.facts(self._index)))

    async def api_pictures(self, request: Request) -> Response:
        """Embed a picture to search with."""
        return await self._embed(request, "picture")

    async def api_sketches(self, request: Request) -> Response:
        """Embed a sketch to search generators with."""
        return await self._embed(request, "sketch")

    async def _embed(self, request: Request, name: str) -> Response:
        data = await _body(request)
        return await self._answer(request, lambda: json_response({name: self._embedded(name, data)}, 201))

    def _embedded(self, name: str, data: bytes) -> str:
        """A picture or a sketch as text for an address."""
        embed = self._index.embed_images if name == "picture" else self._index.embed_sketch
        (embedding,) = embed(decode(data, _MOST_PIXELS))
        return token_of(embedding, self._index.settings["encoder_digest"])

    async def api_description(self, request: Request) -> Response:
        """The description of all this (OpenAPI)."""
        return json_response(self._description)

    async def health(self, request: Request) -> Response:
        """Whether answers are to be had."""
        if self._workers.longest > _STALLED_SECONDS:
            return problem(503, "answers do not end: restart the server")
        return json_response({"status": "ok", **self._generation()})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return PlainTextResponse(generate_latest(self._metrics.registry))

    def _generation(self) -> dict[str, str]:
        return {"generation": self._index.generation}

    # Errors

    async def _on_http(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        unsaid = error.detail == HTTPStatus(error.status_code).phrase
        reason = "there is no such page" if unsaid and error.status_code == 404 else error.detail
        return self._error(request, error.status_code, reason, error.headers)

    async def _on_error(self, request: Request, error: Exception) -> Response:
        if isinstance(error, BusyError):
            return self._error(
                request, 503, f"too many ask at once: try again in {error.retry_after} seconds"
            )
        if isinstance(error, QueryError | UnreadableImageError):
            return self._error(request, 400, str(error))
        status = HTTPStatus.SERVICE_UNAVAILABLE if isinstance(error, StoreError) else 500
        return self._error(request, status, str(error))

    def _error(
        self, request: Request, status: int, reason: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        headers = dict(headers or {})
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = str(BusyError.retry_after)
        if request.url.path.startswith(("/api/", "/probes/", "/samples/", "/healthz", "/metrics")):
            return problem(status, reason, headers)
        return self._pages.error(status, reason, headers)


def _existing(read: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """What an index says about a model; an error of the query is that there is none."""
    try:
        return read(*arguments, **options)
    except QueryError as error:
        raise HTTPException(404 if answers.unknown_model(error) else 400, str(error)) from error


def _picture(content: bytes, kept: str = _FOR_EVER) -> Response:
    kind = media_type(content)
    if kind is None:
        return problem(404, "this is no picture")
    return Response(content, media_type=kind, headers={"Cache-Control": kept})


async def _body(request: Request) -> bytes:
    """A picture that is sent, of a bounded size.

    Raises:
        HTTPException: it is too large, takes too long, or is none.
    """
    too_large = HTTPException(413, f"a picture has at most {_LARGEST_PICTURE >> 20} MiB")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > _LARGEST_PICTURE:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(_PICTURE_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > _LARGEST_PICTURE:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, "the picture took too long to arrive") from None
    except ClientDisconnect:
        raise HTTPException(400, "the picture ended early") from None
    return bytes(data)


def _table(request: Request) -> bool:
    asked = request.query_params.get("format", "json")
    if asked not in ("json", "csv"):
        raise QueryError(f"format={asked!r} is none of json, csv")
    return asked == "csv"


def _start(request: Request) -> int:
    return _number(request, "start", 0, 0, 1 << 31)


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    value = request.query_params.get(name, str(default))
    if not (value.isascii() and value.isdigit() and len(value) < 12 and least <= int(value) <= most):
        raise QueryError(f"{name}={value!r} is no number from {least} to {most}")
    return int(value)


def _static_files() -> dict[str, tuple[str, bytes]]:
    folder = Path(__file__).parent / "static"
    contents = {name: (folder / name).read_bytes() for name in _STATIC}
    return {name: (hashlib.sha256(data).hexdigest()[:16], data) for name, data in contents.items()}
