"""Names of metrics, spans and log fields, and the one shape of a log line.

Dashboards and alerts outlive code: a name is written here once and only added to.
"""

import json
import re

from core.stages import Stage

# Counters carry `_total`, durations `_seconds`: Prometheus' own habit.
HTTP_REQUESTS = "baton_http_requests_total"
REQUESTS_IN_FLIGHT = "baton_requests_in_flight"
TTFT = "baton_ttft_seconds"
TPOT = "baton_tpot_seconds"
REQUEST_DURATION = "baton_request_duration_seconds"
PROMPT_TOKENS = "baton_prompt_tokens_total"
CACHED_TOKENS = "baton_cached_tokens_total"
OUTPUT_TOKENS = "baton_output_tokens_total"
STREAM_EVENTS = "baton_stream_events_total"
STREAM_EVENTS_COALESCED = "baton_stream_events_coalesced_total"
SLOW_CLIENTS = "baton_slow_clients_cancelled_total"
ATTEMPTS = "baton_attempts_total"
RETRIES = "baton_retries_total"
ADMISSION_WAIT = "baton_admission_wait_seconds"
ADMISSION_QUEUE = "baton_admission_queue_requests"
ADMISSION_REJECTED = "baton_admission_rejected_total"
LOCAL_PREFILLS = "baton_local_prefills_total"
WORKERS_EJECTED = "baton_workers_ejected_total"
WORKERS_READMITTED = "baton_workers_readmitted_total"
REQUEUES = "baton_requeues_total"
QUEUE = "baton_queue_seconds"
PREFILL = "baton_prefill_seconds"
KV_TRANSFER = "baton_kv_transfer_seconds"
KV_TRANSFER_BYTES = "baton_kv_transfer_bytes_total"
KV_TRANSFER_BLOCKS = "baton_kv_transfer_blocks_total"
KV_TRANSFER_DESCRIPTORS = "baton_kv_transfer_descriptors_total"
KV_TRANSFER_HIDDEN = "baton_kv_transfer_hidden_seconds_total"
MIGRATIONS = "baton_migrations_total"
# Of one worker.
LEASES_ENDED = "baton_kv_leases_ended_total"
LEASES_OPEN = "baton_kv_leases_open"
KV_BLOCKS = "baton_kv_blocks"
KV_BLOCKS_HELD = "baton_kv_blocks_held"
PREFIX_FETCHES = "baton_prefix_fetches_total"
PREFIX_FETCHED_TOKENS = "baton_prefix_fetched_tokens_total"
PREEMPTIONS = "baton_preemptions_total"
MESSAGE_BUGS = "baton_router_message_bugs_total"
KV_WAYS = "baton_kv_transport_up"
PULLS_WAITING = "baton_kv_pulls_waiting_for_memory"
# Of one worker as the owner of what one reader reads.
PAIR_LEASES_ENDED = "baton_kv_pair_leases_ended_total"
# Of one worker as the reader of one owner.
PAIR_HANDOFFS = "baton_kv_pair_handoffs_total"
PAIR_BYTES = "baton_kv_pair_bytes_total"
PAIR_DESCRIPTORS = "baton_kv_pair_descriptors_total"
PAIR_SECONDS = "baton_kv_pair_seconds_total"
PAIR_HIDDEN = "baton_kv_pair_hidden_seconds_total"
PAIR_SEALED = "baton_kv_pair_sealed_handoffs_total"
PAIR_FAILURES = "baton_kv_pair_failures_total"
WORKERS_CONNECTED = "baton_workers_connected"
WORKERS_LEFT_OUT = "baton_workers_left_out"
INDEX_BLOCKS = "baton_index_blocks"
INDEX_NOT_TAKEN = "baton_index_blocks_not_taken"

KEEP_LINE = {"keep_line": True}
"""The `extra` of a log line that is written however many there are of its kind."""

SPAN_REQUEST = "request"
STAGE_SPANS: dict[Stage, str] = {stage: stage.label for stage in Stage if stage is not Stage.DONE}

# Of the request span, one per choice.
ATTR_REQUEST_ID = "baton.request_id"
ATTR_CHOICE = "baton.choice"
ATTR_OUTCOME = "baton.outcome"
ATTR_OUTPUT_TOKENS = "baton.output_tokens"
ATTR_CACHED_TOKENS = "baton.cached_tokens"
ATTR_TRANSFER_BYTES = "baton.transfer_bytes"
# Of the stages' spans.
ATTR_WORKER_ID = "baton.worker_id"
ATTR_ATTEMPT = "baton.attempt"
ATTR_TRANSFER_DESCRIPTORS = "baton.transfer_descriptors"
ATTR_TRANSFER_OVERLAP = "baton.transfer_overlap"


_QUOTED = re.compile('[ "=]')


def log_line(event: str, /, **fields: object) -> str:
    """One event with its fields: `request_done request_id=req-1 status=200 e2e_ms=12.4`.

    None is left out; a float keeps three decimals; text with spaces, quotes or `=` is quoted as
    JSON, so a value from outside can neither break the line nor forge a field.
    """
    return " ".join([event, *(f"{k}={_text(v)}" for k, v in fields.items() if v is not None)])


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    if isinstance(value, int):
        return text
    plain = text.isprintable() and text != "" and _QUOTED.search(text) is None
    return text if plain else json.dumps(text)
