"""A worker as prefill worker: submit -> lease -> chunks announced -> first token -> lease lives on.

The leg ends for the router with the first token; the lease ends with the reader's close, an abort,
or its expiry. Until then a cancel of the leg still ends the lease.
"""

from dataclasses import dataclass

from core.clock import Clock
from core.errors import BatonError
from core.messages import Accepted, LegFailed, LegTimes, LegTokens, PrefillSubmit, Rejected
from core.sampling import FinishReason
from core.sink import RouterSink
from core.stages import Stage
from engine.runner import Runner
from engine.sequence import Sequence
from engine.types import EngineInfo, Sampled
from kv_transfer.leases import FirstToken, Lease
from kv_transfer.owner import Owner
from prefill_worker.config import PrefillConfig
from prefill_worker.policy import refuse_prompt


@dataclass(frozen=True, slots=True)
class _LegKey:
    sink: int
    number: int


class PrefillRole:
    """All prefill legs of one worker."""

    def __init__(
        self, info: EngineInfo, runner: Runner, owner: Owner, config: PrefillConfig, clock: Clock
    ) -> None:
        self._info = info
        self._runner = runner
        self._owner = owner
        self._config = config
        self._clock = clock
        self._capacity_tokens = min(info.context_tokens, info.num_blocks * info.layout.block_size)
        self._legs: dict[_LegKey, _PrefillLeg] = {}

    @property
    def open_legs(self) -> int:
        """Legs whose prefill runs or whose lease is open."""
        return len(self._legs)

    def submit(self, submit: PrefillSubmit, sink: RouterSink) -> None:
        """Accept, with a lease, or reject with the true reason."""
        refusal = refuse_prompt(
            len(submit.tokens), self._capacity_tokens, self._runner.load(), self._config
        )
        if refusal is not None:
            rejected = Rejected(number=submit.number, code=refusal.code, message=refusal.message)
            sink.send(rejected)
            return
        sequence = Sequence.of(submit, self._info.model_id, self._clock.now_s())
        lease = self._owner.open(submit.sequence_id)
        leg = _PrefillLeg(self, sink, submit.number, sequence, lease)
        self._legs[_LegKey(id(sink), submit.number)] = leg
        sink.send(
            Accepted(
                number=submit.number, lease_id=lease.lease_id, lease_s=self._owner.table.lease_s
            )
        )
        self._runner.submit(sequence, leg)

    def cancel(self, sink: RouterSink, number: int, reason: str) -> None:
        """Stop the prefill, or end the lease it left."""
        leg = self._legs.pop(_LegKey(id(sink), number), None)
        if leg is not None:
            self._runner.remove(leg.sequence)
            self._owner.abort(leg.lease.lease_id, reason)

    def sink_lost(self, sink: RouterSink) -> None:
        """The router's stream ended: so do its legs."""
        for key in [key for key in self._legs if key.sink == id(sink)]:
            self.cancel(sink, key.number, "the router's stream ended")

    def sweep(self) -> None:
        """Forget legs whose lease has ended."""
        for key, leg in list(self._legs.items()):
            if leg.sequence.done and self._owner.table.get(leg.lease.lease_id) is None:
                del self._legs[key]

    # -- called by the legs ---------------------------------------------------------------------

    def announce(self, leg: "_PrefillLeg", sequence: Sequence) -> None:
        """Blocks that are full are final."""
        full = min(sequence.computed, sequence.context_tokens) // self._info.layout.block_size
        fresh = sequence.blocks[len(leg.lease.blocks) : full]
        if fresh and sequence.computed < sequence.context_tokens:
            self._owner.announce(leg.lease, fresh)

    def complete(
        self, leg: "_PrefillLeg", sequence: Sequence, sampled: Sampled, finish: FinishReason | None
    ) -> None:
        """The first token: to the router at once, to the reader with the last blocks."""
        rest = sequence.blocks[len(leg.lease.blocks) :]
        self._owner.finish(leg.lease, rest, FirstToken(sampled.token, finish is not None))
        self._runner.remove(sequence)
        started_s = sequence.started_at_s or sequence.arrived_at_s
        leg.sink.tokens(
            LegTokens(
                number=leg.number,
                tokens=(sampled.token,),
                finish=finish,
                times=LegTimes(
                    queue_s=started_s - sequence.arrived_at_s,
                    prefill_s=self._clock.now_s() - started_s,
                    cached_tokens=sequence.cached_tokens,
                ),
                logits=sampled.logits,
            )
        )

    def fail(self, leg: "_PrefillLeg", error: BatonError) -> None:
        """The router hears why; the reader that its lease has ended."""
        self._legs.pop(_LegKey(id(leg.sink), leg.number), None)
        self._owner.abort(leg.lease.lease_id, error.message)
        leg.sink.send(
            LegFailed(
                number=leg.number, code=error.code, message=error.message, stage=Stage.PREFILL
            )
        )


class _PrefillLeg:
    """One submit; hears of its sequence (engine.runner.SequenceListener)."""

    def __init__(
        self, role: PrefillRole, sink: RouterSink, number: int, sequence: Sequence, lease: Lease
    ) -> None:
        self.role = role
        self.sink = sink
        self.number = number
        self.sequence = sequence
        self.lease = lease

    def on_blocks(self, sequence: Sequence) -> None:
        self.role.announce(self, sequence)

    def on_token(self, sequence: Sequence, sampled: Sampled, finish: FinishReason | None) -> None:
        self.role.complete(self, sequence, sampled, finish)

    def on_failed(self, sequence: Sequence, error: BatonError) -> None:
        self.role.fail(self, error)
