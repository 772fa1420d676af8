"""A latency model for models and devices that nobody measured: the roofline of each operator.

An operator takes the longer of computing and of moving its bytes, plus a launch. Per layer:

    qkv, out, gate+up, down     2 * m * n * k FLOP; m * k + n * k + m * n values moved
    attention of a chunk        4 * heads * head_dim * pairs FLOP; history and chunk of KV read
    attention of decodes        the KV of all contexts read
    two all-reduces             2 * (t - 1) / t * m * hidden values over NVLink, 2 * (t - 1) hops

with m tokens in the step and each rank holding 1/t of the heads and of the MLP; then the output
projection for each sequence that gets a token. A MoE step reads 1 - (1 - k/E)^m of its experts.
Formulas as in DistServe (OSDI'24, appendix A) and Mooncake (FAST'25). `step_s` of a step is what
the operators do not show: scheduling, sampling and the gaps between launches.
"""

from dataclasses import dataclass, field

from core.errors import ConfigError
from engine.latency.base import StepShape
from engine.latency.devices import Device
from engine.latency.shapes import ModelShape

_REMEMBERED = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of the datasheet that operators reach, and what each costs beside."""

    compute: float = 0.75
    attention_compute: float = 0.55
    memory: float = 0.75
    link: float = 0.7
    launch_s: float = 3e-6
    hop_s: float = 2e-6
    step_s: float = 2e-3


@dataclass(frozen=True, slots=True)
class _Matmul:
    """One projection of one rank: `flops` and `bytes_moved` per token, `weight_bytes` once."""

    flops: float
    bytes_moved: float
    weight_bytes: float
    expert: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    """Of one layer of one rank. Bytes are those of one token, `flops_per_pair` all ranks'."""

    flops_per_pair: int
    flops_per_s: float
    kv_bytes: float
    """Ranks beyond the KV heads hold copies."""
    query_bytes: float
    memory_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineLatency:
    """Implements LatencyModel for `model` on `tp` devices. Raises ConfigError when the heads do not
    divide by `tp`.
    """

    model: ModelShape
    device: Device
    tp: int = 1
    efficiency: Efficiency = Efficiency()
    _matmuls: tuple[_Matmul, ...] = field(init=False, repr=False, compare=False)
    _attention: _Attention = field(init=False, repr=False, compare=False)
    _known: dict[tuple[int, int], float] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if self.tp < 1 or self.model.heads % self.tp:
            raise ConfigError(
                f"the {self.model.heads} attention heads of {self.model.name} do not divide by"
                f" a tensor parallel degree of {self.tp}"
            )
        object.__setattr__(self, "_matmuls", _layer_matmuls(self.model, self.tp))
        object.__setattr__(self, "_attention", self._attention_rates())

    def _attention_rates(self) -> _Attention:
        model, gained, device = self.model, self.efficiency, self.device
        return _Attention(
            flops_per_pair=4 * model.heads * model.head_dim,
            flops_per_s=gained.attention_compute * device.flops_per_s,
            kv_bytes=2 * max(1.0, model.kv_heads / self.tp) * model.head_dim * model.kv_bytes,
            query_bytes=model.heads * model.head_dim * 2 / self.tp,
            memory_bytes_per_s=gained.memory * device.memory_bytes_per_s,
        )

    def step_s(self, shape: StepShape) -> float:
        tokens = shape.decode_sequences
        attention_s = 0.0
        for start, end in shape.prefill:
            tokens += end - start
            attention_s += self._chunk_s(start, end)
        if not tokens:
            return 0.0
        sequences = shape.decode_sequences + len(shape.prefill)
        layer_s = attention_s + self._decode_attention_s(shape.decode_context_tokens)
        return self._fixed_s(tokens, sequences) + self.model.layers * layer_s

    def decode_run_s(self, sequences: int, context_tokens: int, steps: int) -> float:
        if steps <= 0:
            return 0.0
        mean_context = context_tokens + sequences * (steps - 1) / 2
        layer_s = self._decode_attention_s(mean_context)
        return steps * (self._fixed_s(sequences, sequences) + self.model.layers * layer_s)

    def _fixed_s(self, tokens: int, sequences: int) -> float:
        """All of a step but the attention, remembered: a simulation asks for few sizes, often."""
        key = tokens, sequences
        known_s = self._known.get(key)
        if known_s is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            known_s = self._known[key] = self._compute_fixed_s(tokens, sequences)
        return known_s

    def _compute_fixed_s(self, tokens: int, sequences: int) -> float:
        gained = self.efficiency
        layer_s = 2 * self._all_reduce_s(tokens)
        for matmul in self._matmuls:
            layer_s += self._matmul_s(matmul, tokens)
        model = self.model
        columns = model.vocab / self.tp
        output = _matmul(model.hidden, columns, model.weight_bytes)
        return self.model.layers * layer_s + self._matmul_s(output, sequences) + gained.step_s

    def _matmul_s(self, matmul: _Matmul, tokens: int) -> float:
        gained, weight_bytes = self.efficiency, matmul.weight_bytes
        if matmul.expert:
            weight_bytes *= 1 - (1 - self.model.top_k / self.model.experts) ** tokens
        compute_s = matmul.flops * tokens / (gained.compute * self.device.flops_per_s)
        moved = weight_bytes + matmul.bytes_moved * tokens
        memory_s = moved / (gained.memory * self.device.memory_bytes_per_s)
        return max(compute_s, memory_s) + gained.launch_s

    def _chunk_s(self, start: int, end: int) -> float:
        """Attention of one layer over a chunk's own tokens and the KV before them."""
        rates, tokens = self._attention, end - start
        pairs = tokens * (start + end) / 2
        moved = (end + tokens) * rates.kv_bytes + 4 * tokens * rates.query_bytes
        compute_s = rates.flops_per_pair * pairs / self.tp / rates.flops_per_s
        memory_s = moved / rates.memory_bytes_per_s
        return max(compute_s, memory_s) + self.efficiency.launch_s

    def _decode_attention_s(self, context_tokens: float) -> float:
        if not context_tokens:
            return 0.0
        rates = self._attention
        moved_s = context_tokens * rates.kv_bytes / rates.memory_bytes_per_s
        return moved_s + self.efficiency.launch_s

    def _all_reduce_s(self, tokens: int) -> float:
        """Ring all-reduce of 16-bit activations."""
        if self.tp == 1:
            return 0.0
        gained, share = self.efficiency, 2 * (self.tp - 1) / self.tp
        moved = share * tokens * self.model.hidden * 2
        link_s = moved / (gained.link * self.device.nvlink_bytes_per_s)
        return link_s + 2 * (self.tp - 1) * gained.hop_s


def _matmul(
    inputs: float, outputs: float, weight_bytes: float, *, copies: float = 1, experts: int = 0
) -> _Matmul:
    """`copies` of a token go through it, each through one of `experts`."""
    return _Matmul(
        flops=2 * inputs * outputs * copies,
        bytes_moved=(inputs + outputs) * 2 * copies,
        weight_bytes=inputs * outputs * weight_bytes * max(1, experts),
        expert=experts > 0,
    )


def _layer_matmuls(model: ModelShape, tp: int) -> tuple[_Matmul, ...]:
    width, per_weight = model.head_dim, model.weight_bytes
    queries = model.heads * width / tp
    keys_values = 2 * max(1.0, model.kv_heads / tp) * width
    copies = max(1, model.top_k)
    up = (2 if model.gated else 1) * model.ffn / tp
    return (
        _matmul(model.hidden, queries + keys_values, per_weight),
        _matmul(queries, model.hidden, per_weight),
        _matmul(model.hidden, up, per_weight, copies=copies, experts=model.experts),
        _matmul(model.ffn / tp, model.hidden, per_weight, copies=copies, experts=model.experts),
    )
