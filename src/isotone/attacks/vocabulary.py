"""Which tokens an attack may write: those that a text can contain, so that an edit in ids is an edit of a text."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from isotone.errors import UsageError


class Vocabulary:
    """The admissible tokens of a model and its tokenizer.

    Attributes:
        admissible_V: bool, over the rows of the embedding.
        tokenizer: None where only ids are known; then nothing is said about texts.
    """

    def __init__(self, admissible_V: Tensor, tokenizer: Any = None):
        if not bool(admissible_V.any()):
            raise UsageError("no token of the tokenizer is admissible: none decodes to a text that encodes to it again")
        self.admissible_V = admissible_V
        self.tokenizer = tokenizer

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, num_embeddings: int) -> "Vocabulary":
        """Find the admissible tokens: no specials, no padding rows, each decodes and encodes to itself.

        Args:
            tokenizer: of transformers.
            num_embeddings: rows of the model's embedding; rows beyond the tokenizer's tokens are padding.
        """
        admissible_V = torch.zeros(num_embeddings, dtype=torch.bool)
        forbidden = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ids = [i for i in range(min(num_embeddings, len(tokenizer))) if i not in forbidden]
        texts = [_decode(tokenizer, [i]) for i in ids]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        admissible_V[[i for i, again in zip(ids, encoded, strict=True) if again == [i]]] = True
        return cls(admissible_V, tokenizer)

    @classmethod
    def all_ids(cls, num_embeddings: int) -> "Vocabulary":
        """Admit every id; for models without a tokenizer."""
        return cls(torch.ones(num_embeddings, dtype=torch.bool))

    @cached_property
    def ids_N(self) -> Tensor:  # noqa: N802 - shape suffix
        """The admissible ids, ascending."""
        return self.admissible_V.nonzero().flatten()

    def decode(self, ids: list[int]) -> str | None:
        """Return the text of ids, or None without a tokenizer."""
        return None if self.tokenizer is None else _decode(self.tokenizer, ids)

    def through_text(self, ids: list[int]) -> list[int] | None:
        """Return the ids that the text of ``ids`` encodes to: what a model sees if the attacker hands over text."""
        if self.tokenizer is None:
            return None
        return list(self.tokenizer(_decode(self.tokenizer, ids), add_special_tokens=False)["input_ids"])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
