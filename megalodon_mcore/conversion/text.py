"""Text to a checkpoint's tokens and back, as Megatron's tokenizers do it."""

from __future__ import annotations

from collections.abc import Sequence

from megalodon_mcore.conversion.model import Tokenizer
from megalodon_mcore.conversion.tokenizers import NULL_TOKENIZER, load_processor, load_tokenizer


class TextTokenizer:
    """A tokenizer at work.

    Args:
        tokenizer: Its kind and its files.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.kind, self.eod = tokenizer.kind, tokenizer.eos_token_id
        self._numbers = tokenizer.kind == NULL_TOKENIZER
        self._from_hf = tokenizer.kind == "HuggingFaceTokenizer"
        if self._from_hf:
            self._own = load_tokenizer(tokenizer.files[0].parent)
        elif not self._numbers:
            self._own = load_processor(tokenizer.files[0])

    def tokenize(self, text: str) -> list[int]:
        """The text's ids, with what the tokenizer adds by itself.

        Raises:
            ValueError: the text is not numbers, and the tokenizer one of numbers.
        """
        if self._numbers:
            try:
                return [int(number) for number in text.split()]
            except ValueError as error:
                raise ValueError(
                    f"The checkpoint has a tokenizer of numbers, and the prompt is none: {error}."
                ) from None
        if self._from_hf:
            return self._own(text).input_ids
        return self._own.encode_as_ids(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        if self._numbers:
            return " ".join(map(str, ids))
        if not self._from_hf:
            return self._own.decode_ids(list(ids))
        tokens = self._own.convert_ids_to_tokens(list(ids))
        return self._own.convert_tokens_to_string([token for token in tokens if token is not None])
