from core import telemetry
from core.stages import Stage


def test_log_line_is_one_event_with_its_fields():
    line = telemetry.log_line("done", request_id="r-1", status=200, e2e_ms=1.23456, error=None)
    assert line == "done request_id=r-1 status=200 e2e_ms=1.235"


def test_value_from_outside_cannot_forge_a_field_or_a_line():
    line = telemetry.log_line("done", message='a b="c"\nstatus=500')
    assert line == 'done message="a b=\\"c\\"\\nstatus=500"'


def test_spans_are_named_by_the_stages():
    assert list(telemetry.STAGE_SPANS.values()) == [
        *("admit", "route", "prefill", "kv_transfer", "decode")
    ]
    assert Stage.DONE not in telemetry.STAGE_SPANS


def test_metric_names_are_unique_and_prefixed():
    names = [v for k, v in vars(telemetry).items() if k.isupper() and isinstance(v, str)]
    metrics = [name for name in names if name.startswith("baton_")]
    assert len(metrics) == len(set(metrics)) >= 11
