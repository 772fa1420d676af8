"""The router's HTTP application: the two generating endpoints and the small ones around them.

POST /v1/chat/completions, /v1/completions   raw ASGI (http_edge.py): the hot path
GET  /v1/models, /v1/models/{id}             what is served
GET  /health, /ready, /metrics               alive; routable; Prometheus
POST /control/migrate                        move a running sequence to another decode worker
POST /debug/route                            explains a placement; only with an `explainer`
"""

from collections.abc import Sequence

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from core.clock import Clock
from core.errors import (
    BatonError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NoSuchRoute,
)
from core.ids import RequestId, WorkerId, new_request_id
from core.json_body import read_object, shortened, validated
from core.openai import ChatCompletionRequest, CompletionRequest, OpenAiRequest
from engine.build import ServedModel
from router.config import RouterConfig
from router.http_body import BodyLimit, Intake, parsed
from router.http_edge import Edge, GenerateEndpoint
from router.http_errors import error_body, error_headers
from router.metrics import EdgeMetrics
from router.openapi import ERRORS, GENERATING_BODY, body_schema, describe
from router.request_context import RequestContext, request_id_of
from router.requests import Planner
from router.tokenizer import Tokenizer
from router.types import Generator, MigrationReport, RouteChoice, RouteExplainer, WorkerStatus

_GENERATING: tuple[tuple[str, type[OpenAiRequest], str], ...] = (
    ("/v1/chat/completions", ChatCompletionRequest, "chatcmpl"),
    ("/v1/completions", CompletionRequest, "cmpl"),
)


class RouterApp(FastAPI):
    """FastAPI, but for the hot path: its endpoints are reached without the layers between."""

    hot: dict[str, ASGIApp]
    """By path; they answer POST and raise nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hot = self.hot.get(scope["path"]) if scope["type"] == "http" else None
        if hot is not None and scope["method"] == "POST":
            await hot(scope, receive, send)
        elif scope.get("method") == "HEAD":  # of whose answer the server sends no body
            await super().__call__({**scope, "method": "GET"}, receive, send)
        else:
            await super().__call__(scope, receive, send)


class ModelCard(BaseModel):
    """One served model, as OpenAI lists them; `max_model_len` is what the workers hold now."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "baton"
    max_model_len: int


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelCard]


class MigrateBody(BaseModel):
    """Which running sequence to move, and where to; without `worker_id` the router chooses."""

    model_config = ConfigDict(extra="forbid")

    request_id: str = Field(max_length=256)
    """As in the answer's id, after `chatcmpl-` or `cmpl-`."""
    choice: int = Field(0, ge=0)
    worker_id: str | None = Field(None, max_length=256)
    timeout_s: float = Field(10.0, gt=0, le=600)
    """A migration not done by then is given up; the sequence runs on where it is."""


def create_app(
    generator: Generator,
    settings: RouterConfig,
    tokenizer: Tokenizer,
    *,
    model: ServedModel,
    model_names: Sequence[str],
    clock: Clock,
    metrics: EdgeMetrics,
    explainer: RouteExplainer | None = None,
) -> FastAPI:
    """Wire the HTTP edge. `model_names` are equal names of the one model, at least one."""
    metrics.watch_workers(generator.workers)
    app = RouterApp(title="Baton", openapi_url="/openapi.json", redoc_url=None, responses=ERRORS)
    app.hot = {}
    app.router.redirect_slashes = False
    intake = Intake(settings)
    # Within the next one: a caller without a key has no body read.
    app.add_middleware(BodyLimit, intake=intake)
    app.add_middleware(RequestContext, api_keys=settings.api_keys)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(BatonError, _on_baton_error)
    app.add_exception_handler(Exception, _on_bug)
    planner = Planner(
        generator=generator,
        tokenizer=tokenizer,
        model=model,
        model_names=model_names,
        clock=clock,
    )
    edge = Edge(
        generator=generator,
        tokenizer=tokenizer,
        planner=planner,
        intake=intake,
        settings=settings,
        metrics=metrics,
        clock=clock,
        fingerprint=model.model_id,
    )
    for path, request_type, prefix in _GENERATING:
        endpoint = GenerateEndpoint(edge, request_type, prefix)
        app.hot[path] = RequestContext(endpoint, api_keys=settings.api_keys)
        app.router.routes.append(Route(path, endpoint, methods=["POST"]))  # other methods: 405
    _add_models(app, generator, model_names, created_s=int(clock.wall_s()))
    _add_probes(app, generator, metrics)
    _add_control(app, generator)
    if explainer is not None:
        _add_debug(app, explainer, planner, clock, settings.request_timeout_s)
    describe(app, model_names)
    return app


def _add_models(
    app: FastAPI, generator: Generator, model_names: Sequence[str], created_s: int
) -> None:
    def card(name: str) -> ModelCard:
        context_tokens = generator.limits().context_tokens
        return ModelCard(id=name, created=created_s, max_model_len=context_tokens)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card(name) for name in model_names])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        if name not in model_names:
            raise ModelNotFound(f"the model '{shortened(name)}' does not exist", param="model")
        return card(name)


def _add_probes(app: FastAPI, generator: Generator, metrics: EdgeMetrics) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", responses={503: {"model": dict[str, str], "description": "Not ready"}})
    async def ready(response: Response) -> dict[str, str]:
        if generator.limits().ready:
            return {"status": "ready"}
        response.status_code = 503
        return {"status": "not_ready", "reason": _why_not_ready(generator)}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_control(app: FastAPI, generator: Generator) -> None:
    @app.get("/control/workers")
    async def workers() -> list[WorkerStatus]:
        """The workers as this router sees them."""
        return list(generator.workers())

    @app.post("/control/migrate", openapi_extra=body_schema(MigrateBody.model_json_schema()))
    async def migrate(request: Request) -> MigrationReport:
        """Answers when the new worker has spoken, or when the sequence stays where it is."""
        body = await parsed(_migrate_body, await request.body())
        to = None if body.worker_id is None else WorkerId(body.worker_id)
        return await generator.migrate(RequestId(body.request_id), body.choice, to, body.timeout_s)


def _add_debug(
    app: FastAPI, explainer: RouteExplainer, planner: Planner, clock: Clock, timeout_s: float
) -> None:
    @app.post("/debug/route", openapi_extra=body_schema(GENERATING_BODY))
    async def route(request: Request) -> list[RouteChoice]:
        """Where the first choice of such a request would be prefilled and decoded now, and why."""
        body = await parsed(_generating_body, await request.body())
        plan = await planner.plan(body, new_request_id(), clock.now_s() + timeout_s)
        return list(explainer.explain_route(plan.choices[0].request))


def _migrate_body(raw: bytes | bytearray) -> MigrateBody:
    return validated(MigrateBody, read_object(raw))


def _generating_body(raw: bytes | bytearray) -> OpenAiRequest:
    """Of either endpoint."""
    body = read_object(raw)
    return CompletionRequest.of(body) if "prompt" in body else ChatCompletionRequest.of(body)


def _why_not_ready(generator: Generator) -> str:
    routable = {w.role for w in generator.workers() if w.connected and not w.draining}
    missing = [role for role in ("prefill", "decode") if role not in routable]
    if missing:
        return f"no {' and no '.join(missing)} worker is connected"
    return "no pair of prefill and decode workers is routable"


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """404 and 405 of the routing itself."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    where = f"{request.method} {shortened(request.url.path)}"
    if status == 404:
        return _error_response(NoSuchRoute(f"{where} does not exist"))
    if status == 405:
        response = _error_response(MethodNotAllowed(f"{where} is not allowed"))
        allowed = (error.headers or {}).get("Allow", "") if isinstance(error, HTTPException) else ""
        response.headers["allow"] = "GET, HEAD" if allowed == "GET" else allowed
        return response
    return _error_response(InvalidRequest(f"{where} is refused: {error}"))


async def _on_baton_error(request: Request, error: Exception) -> Response:
    known = error if isinstance(error, BatonError) else InternalError(str(error))
    return _error_response(known)


async def _on_bug(request: Request, error: Exception) -> Response:
    """The server logs the traceback. This answer does not pass the middleware that adds the id."""
    request_id = request_id_of(request.scope)
    response = _error_response(InternalError(f"internal error in request {request_id}"))
    response.headers["x-request-id"] = request_id
    return response


def _error_response(error: BatonError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    return Response(
        error_body(error),
        status_code=error.http_status,
        headers=headers,
        media_type="application/json",
    )
