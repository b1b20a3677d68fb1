"""How source and target of an encoder-decoder model lie in one row of token ids, for data, losses and attacks alike.

    source, EOS, padding … │ target, EOS, padding …
    0            S−1       │ S             S+T−1

So positions mean the same thing as in a causal model's row: an attack edits positions below S and the positions from S
on are scored. Shapes: B rows, L = S + T tokens of a row, D embedding.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PairLayout:
    """Where a row is divided.

    Attributes:
        source: S, columns of the source.
        pad: the id that fills a side on its right; no text contains it.
        text: columns of source and target beyond which there is only padding: nothing is computed there. None: all may
            hold text.
    """

    source: int
    pad: int
    text: tuple[int, int] | None = None

    def sides(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the source [B, S] and the target [B, T] of rows."""
        return ids_BL[:, : self.source], ids_BL[:, self.source :]

    def around(self, ids_BL: Tensor) -> "PairLayout":
        """Return the same layout with ``text`` for these rows: of a batch that stays together whatever is edited.

        How many columns are computed decides the last bits of a loss. So these are the rows of documents that belong
        together by their order, and never those of a forward pass, which may be halved.
        """
        return replace(self, text=self._text(ids_BL))

    def trimmed(self, ids_BL: Tensor) -> tuple["PairLayout", Tensor]:
        """Return rows without the columns that hold no text (if ``text`` is None: in these rows), and how those lie."""
        source, target = self.text or self._text(ids_BL)
        source_BS, target_BT = self.sides(ids_BL)
        return PairLayout(source, self.pad), torch.cat([source_BS[:, :source], target_BT[:, :target]], dim=1)

    def _text(self, ids_BL: Tensor) -> tuple[int, int]:
        source, target = (max(1, int((side != self.pad).sum(1).max())) for side in self.sides(ids_BL))
        return source, target

    def num_scored(self, ids_BL: Tensor) -> int:
        """Return how many target tokens rows have, padding left out."""
        return int((self.sides(ids_BL)[1] != self.pad).sum())

    def inputs(self, model: nn.Module, ids_BL: Tensor, inputs_embeds_BSD: Tensor | None = None) -> dict[str, Any]:
        """Return what the model is called with to be asked for every target token, teacher-forced.

        The decoder reads the target shifted right; it is causal, so padding after a token does not reach it.

        Args:
            model: an encoder-decoder model of transformers.
            ids_BL: rows.
            inputs_embeds_BSD: what the encoder reads instead of the embeddings of the source; padding stays masked.
        """
        source_BS, target_BT = self.sides(ids_BL)
        read = {"input_ids": source_BS} if inputs_embeds_BSD is None else {"inputs_embeds": inputs_embeds_BSD}
        return read | {
            "attention_mask": (source_BS != self.pad).long(),
            "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(target_BT),  # type: ignore[operator]
        }
