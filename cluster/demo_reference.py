"""What transformers' own `generate` answers: the text the cluster must have sent."""

from collections.abc import Sequence
from pathlib import Path

import torch
from openai.types.chat import ChatCompletionMessageParam
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


class Reference:
    """The checkpoint loaded by transformers alone, greedy, in fp32 on the CPU."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), local_files_only=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(checkpoint), local_files_only=True, dtype=torch.float32
        )
        self._model = model.eval()

    def answer(self, messages: Sequence[ChatCompletionMessageParam], max_tokens: int) -> str:
        """The text that continues the chat."""
        prompt = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
        encoded = self._tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=encoded.input_ids,
                attention_mask=encoded.attention_mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        tokens = output[0, encoded.input_ids.shape[1] :]
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
