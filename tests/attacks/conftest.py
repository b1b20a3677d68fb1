"""A tiny model whose losses react to edits, documents, and a bigram model whose losses can be computed by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import nn
from transformers import PreTrainedModel

from isotone.attacks import PrefixProtocol, Vocabulary, Window

PROTOCOL = PrefixProtocol(prefix=10, gap=2, continuation=12)


class Bigram(nn.Module):
    """p(next | token) is a row of a table; the embedding is the identity, so that gradients can be asked for."""

    def __init__(self, probabilities_VV: torch.Tensor):
        super().__init__()
        self.log_VV = nn.Parameter(probabilities_VV.log())
        self.embedding = nn.Embedding.from_pretrained(torch.eye(len(probabilities_VV)))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: torch.Tensor | None = None,
        **unused: object,
    ) -> SimpleNamespace:
        logits_BLV = self.log_VV[input_ids] if inputs_embeds is None else inputs_embeds @ self.log_VV
        return SimpleNamespace(logits=logits_BLV[:, logits_to_keep])


@pytest.fixture
def bigram() -> Bigram:
    return Bigram(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]]))


@pytest.fixture
def model() -> PreTrainedModel:
    return reactive_model()


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary.all_ids(VOCABULARY)


@pytest.fixture
def windows() -> list[Window]:
    return make_windows(6)


def reactive_model(name: str = "gpt_neox", seed: int = 0) -> PreTrainedModel:
    """Return a random model with weights so large that single tokens matter to the loss of others."""
    return tiny_model(name, seed=seed, initializer_range=0.5)


def make_windows(count: int, length: int = PROTOCOL.length, seed: int = 0) -> list[Window]:
    rng = np.random.default_rng(seed)
    return [Window(f"document-{i}", rng.integers(0, VOCABULARY, length)) for i in range(count)]
