"""What the timed engine must answer: its text is a function of the prompt alone."""

from core.ids import BlockId, SequenceId
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.timed import TimedEngine
from engine.types import Sampled, SeqStep
from router.types import GenerateRequest


class Oracle:
    """One engine of its own, one sequence at a time, no time taken."""

    def __init__(self, vocab_size: int) -> None:
        config = EngineConfig(kind="timed", kv_memory_mb=16)
        self._engine = TimedEngine(config, vocab_size=vocab_size, sleep=lambda _: None)

    def answer(self, request: GenerateRequest) -> list[int]:
        """All tokens of the answer."""
        prompt = list(request.prompt_tokens)
        tokens, fed = list(prompt), 0
        size = self._engine.info.layout.block_size
        while len(tokens) < len(prompt) + request.sampling.max_tokens:
            step = SeqStep(
                sequence_id=SequenceId(request.request_id),
                tokens=tokens,
                start=fed,
                end=len(tokens),
                block_table=[BlockId(b) for b in range(-(-len(tokens) // size))],
                sample=SamplingParams(max_tokens=1),
            )
            fed = len(tokens)
            (sampled,) = self._engine.step([step])
            assert isinstance(sampled, Sampled), sampled
            tokens.append(sampled.token)
        return tokens[len(prompt) :]
