"""Latency models whose coefficients others have published.

DistServe's fits of OPT models on A100-80G SXM (LLMServe/DistServe, Apache-2.0, simdistserve's
profile data), with its engine's overhead of 2 ms and 0.1 us per token that a step feeds. A decode
batch of 95 sequences and more has coefficients of its own. Milliseconds:

    prefill = a + b * tokens + c * sum of squares      decode = a + b * sum of contexts + c * batch
"""

from dataclasses import dataclass

from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve
from simulator.profiles.types import BadProfile

_STEP_MS = 2.0
_TOKEN_MS = 1e-4
_LARGE_BATCH = 95

Three = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class _Fit:
    prefill: Three
    small: Three
    large: Three


_DISTSERVE = {
    ("opt-13b", 1): _Fit((18.10, 0.1019, 7.12e-6), (19.93, 6.27e-4, 0.0385), (7.17, 5.8e-4, 0.158)),
    ("opt-13b", 2): _Fit(
        (14.74, 0.0686, 2.45e-6), (13.29, 3.41e-4, 0.0630), (10.64, 3.12e-4, 0.0856)
    ),
    ("opt-13b", 4): _Fit(
        (12.06, 0.0381, 5.2e-7), (10.26, 1.88e-4, 0.0327), (10.48, 1.71e-4, 0.0457)
    ),
    ("opt-66b", 2): _Fit(
        (43.06, 0.2742, 2.2e-5), (48.29, 9.42e-4, 0.1276), (28.73, 4.74e-4, 0.296)
    ),
    ("opt-66b", 4): _Fit((29.44, 0.1514, 8e-6), (30.76, 4.52e-4, 0.0633), (27.47, 4.05e-4, 0.1248)),
    ("opt-66b", 8): _Fit((25.49, 0.1066, 3e-6), (23.16, 2.27e-4, 0.0480), (21.72, 3.76e-4, 0.0898)),
}

DISTSERVE_KV_TOKENS = {1: 66_144, 2: 163_008, 4: 356_736}
"""Tokens of KV that OPT-13B leaves room for, by tensor parallel degree."""


def distserve_latency(model: str, tp: int) -> FittedLatency:
    """Raises BadProfile naming what was published."""
    fit = _DISTSERVE.get((model, tp))
    if fit is None:
        known = ", ".join(f"{name} tp{degree}" for name, degree in _DISTSERVE)
        raise BadProfile(f"DistServe published no fit of {model} tp{tp}, only of {known}")
    base, token, square = fit.prefill
    return FittedLatency(
        prefill=PrefillCurve(
            base_s=(base + _STEP_MS) / 1e3,
            per_token_s=(token + _TOKEN_MS) / 1e3,
            per_pair_s=2 * square / 1e3,
        ),
        decode=(_decode(fit.small, 0), _decode(fit.large, _LARGE_BATCH)),
    )


def _decode(fit: Three, from_sequences: int) -> DecodeCurve:
    base, context, sequence = fit
    return DecodeCurve(
        base_s=(base + _STEP_MS) / 1e3,
        per_sequence_s=(sequence + _TOKEN_MS) / 1e3,
        per_context_token_s=context / 1e3,
        from_sequences=from_sequences,
    )
