"""Every error a user or a peer can see, and how each leaves the process.

    BatonError
    +-- UserError                 the caller must change something; never retried
    |   +-- InvalidRequest            400  a field is wrong or not served
    |   |   +-- ContextTooLong        400  prompt, or prompt and answer, over the context
    |   +-- NotAuthenticated          401  no API key, or a wrong one
    |   +-- ModelNotFound             404
    |   +-- NoSuchRoute               404  no endpoint has this path
    |   +-- MethodNotAllowed          405  the path exists, for another method
    |   +-- RequestTooLarge           413  body over the limit
    |   +-- ConfigError                -   bad set-up: one sentence, non-zero exit
    +-- Unavailable               another worker, or a later moment, may succeed
    |   +-- Overloaded                429  with Retry-After
    |   +-- NoWorkers                 503  no routable prefill or decode worker; with Retry-After
    |   +-- WorkerLost                503  its stream ended
    |   +-- WorkerFailed              500  an InternalError of a worker; another may have none
    |   +-- TransferFailed            503  KV did not arrive, or may not be used
    |       +-- KvMismatch            503  KV that arrived is proven wrong
    +-- DeadlineExceeded          504  the request's own time is up
    +-- Cancelled                 499  the client went away, or asked
    +-- InternalError             500  a bug; logged with its traceback

`retryable` says whether flow.py may try the same sequence on other workers.
"""

from enum import StrEnum


class BatonError(Exception):
    """Root. `message` is for people and names the next step where there is one."""

    http_status: int = 500
    code: str = "internal_error"
    error_type: str = "server_error"
    retryable: bool = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class UserError(BatonError):
    """The caller's to mend."""

    http_status = 400
    error_type = "invalid_request_error"
    code = "invalid_request"


class InvalidRequest(UserError):
    """A field is wrong, contradictory, or not served yet; `param` names it."""


class ContextTooLong(InvalidRequest):
    """Prompt, or prompt and answer, do not fit the context."""

    code = "context_length_exceeded"


class NotAuthenticated(UserError):
    """No bearer token, or one that is not accepted."""

    http_status = 401
    code = "invalid_api_key"


class ModelNotFound(UserError):
    """The request names a model this cluster does not serve."""

    http_status = 404
    code = "model_not_found"


class NoSuchRoute(UserError):
    """No endpoint has this path."""

    http_status = 404
    code = "not_found"


class MethodNotAllowed(UserError):
    """The path exists, for another method."""

    http_status = 405
    code = "method_not_allowed"


class RequestTooLarge(UserError):
    """The body is over the configured limit."""

    http_status = 413
    code = "request_too_large"


class ConfigError(UserError):
    """Bad set-up, found before any port opens."""

    code = "config_error"


class Unavailable(BatonError):
    """Nothing is wrong with the request; here and now it could not be served."""

    http_status = 503
    code = "unavailable"
    retryable = True


class Overloaded(Unavailable):
    """Accepting more would break what is already promised."""

    http_status = 429
    code = "overloaded"
    error_type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoWorkers(Unavailable):
    """No worker of a needed role is routable."""

    code = "no_workers"
    retry_after_s = 5.0  # a worker that restarts needs some seconds at least


class WorkerLost(Unavailable):
    """A worker's stream ended while it held a leg of the sequence."""

    code = "worker_lost"


class WorkerFailed(Unavailable):
    """A worker ended a leg with an InternalError. Whether that is the worker's fault or the
    sequence's, only another worker can tell; `worker_id` is empty where it is not known.
    """

    http_status = 500
    code = "worker_failed"

    def __init__(self, message: str, *, worker_id: str = "") -> None:
        super().__init__(message)
        self.worker_id = worker_id


class TransferCause(StrEnum):
    """Why a transfer failed; the label of its counter."""

    NO_ANSWER = "no_answer"
    OWNER_LOST = "owner_lost"
    OWNER_SILENT = "owner_silent"
    OWNER_RESTARTED = "owner_restarted"
    OTHER_MODEL = "other_model"
    OTHER_PROTOCOL = "other_protocol"
    NO_TRANSPORT = "no_transport"
    NO_PLAN = "no_plan"
    OWNER_ENDED = "owner_ended"
    WITHDRAWN = "withdrawn"
    NOT_HELD = "not_held"
    EXPIRED = "expired"
    NOT_CONFIRMED = "not_confirmed"
    READ_FAILED = "read_failed"
    READ_SLOW = "read_slow"
    CHECKSUM = "checksum"
    NO_MEMORY = "no_memory"
    OTHER = "other"


class TransferFailed(Unavailable):
    """The KV cache did not arrive, or arrived and may not be used."""

    code = "kv_transfer_failed"

    def __init__(self, message: str, *, cause: TransferCause = TransferCause.OTHER) -> None:
        super().__init__(message)
        self.cause = cause


class KvMismatch(TransferFailed):
    """The KV in an arena is proven not to be that of the sequence's tokens."""

    code = "kv_mismatch"


class DeadlineExceeded(BatonError):
    """The request's own deadline passed."""

    http_status = 504
    code = "deadline_exceeded"
    error_type = "timeout_error"


class Cancelled(BatonError):
    """The client went away, or asked for it."""

    http_status = 499
    code = "cancelled"


class InternalError(BatonError):
    """A bug. The log holds the traceback under the request's id."""


_BY_CODE: dict[str, type[BatonError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest,
        ContextTooLong,
        NotAuthenticated,
        ModelNotFound,
        NoSuchRoute,
        MethodNotAllowed,
        RequestTooLarge,
        ConfigError,
        Overloaded,
        NoWorkers,
        WorkerLost,
        WorkerFailed,
        TransferFailed,
        KvMismatch,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        InternalError,
    )
}


def from_code(code: str, message: str) -> BatonError:
    """The error a peer sent by code; a code from a newer peer becomes a retryable Unavailable."""
    return _BY_CODE.get(code, Unavailable)(message)


def plain(error: BaseException) -> str:
    """What went wrong, for a sentence: of an OSError only what the system says."""
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error) or type(error).__name__
