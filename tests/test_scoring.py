"""Losses are right: by hand on a table-lookup bigram model, and for every supported architecture."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    PreTrainedModel,
    T5Config,
)

from isotone import scoring

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
ARCHITECTURES = {
    "gpt_neox": TINY,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64},
    "opt": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 64}
    | {"word_embed_proj_dim": 8, "max_position_embeddings": 64},
    "llama": TINY,
    "arcee": TINY,
    "mistral": TINY | {"num_key_value_heads": 1},
    "qwen2": TINY | {"num_key_value_heads": 1},
    "gemma": TINY | {"head_dim": 8, "num_key_value_heads": 1},
    "phi": TINY,
}


class Bigram(nn.Module):
    """p(next | token) is a row of a table."""

    def __init__(self, probabilities_VV: torch.Tensor):
        super().__init__()
        self.log_VV = nn.Parameter(probabilities_VV.log())

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.log_VV[input_ids][:, logits_to_keep])


@pytest.fixture
def bigram() -> Bigram:
    return Bigram(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]]))


def tiny(architecture: str) -> PreTrainedModel:
    torch.manual_seed(1)
    defaults = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture], **defaults)
    return AutoModelForCausalLM.from_config(config).eval()


def test_losses_equal_those_computed_by_hand(bigram: Bigram) -> None:
    nll = scoring.token_nll(bigram, torch.tensor([[0, 1, 2, 2], [2, 0, 0, 1]]))
    by_hand = [[0.25, 0.8, 0.25], [0.25, 0.5, 0.25]]
    assert nll.tolist() == [pytest.approx([-math.log(p) for p in row]) for row in by_hand]


def test_only_the_asked_positions_are_scored_in_their_order(bigram: Bigram) -> None:
    ids = torch.tensor([[0, 1, 2, 2]])
    everything = scoring.token_nll(bigram, ids)
    assert torch.equal(scoring.token_nll(bigram, ids, slice(2, 4)), everything[:, 1:])
    assert torch.equal(scoring.token_nll(bigram, ids, torch.tensor([3, 1])), everything[:, [2, 0]])


def test_a_tie_is_correct_for_the_lowest_id_only(bigram: Bigram) -> None:
    tied = Bigram(torch.tensor([[0.2, 0.4, 0.4]] * 3))
    assert scoring.token_scores(tied, torch.tensor([[0, 1, 2]])).correct_BT.tolist() == [[True, False]]
    assert scoring.token_scores(bigram, torch.tensor([[0, 0, 1, 2]])).correct_BT.tolist() == [[True, False, True]]


@pytest.mark.parametrize("positions", [slice(0, 2), torch.tensor([0]), torch.tensor([4]), slice(3, 3)])
def test_positions_without_a_context_or_outside_are_refused(bigram: Bigram, positions: slice | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"1…3 of a sequence of 4 tokens"):
        scoring.token_nll(bigram, torch.tensor([[0, 1, 2, 2]]), positions)


def test_chunks_do_not_change_a_loss(bigram: Bigram, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 3, (5, 9), generator=torch.Generator().manual_seed(0))
    whole = scoring.token_scores(bigram, ids)
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 7)
    chunked = scoring.token_scores(bigram, ids)
    assert torch.equal(whole.nll_BT, chunked.nll_BT)
    assert torch.equal(whole.correct_BT, chunked.correct_BT)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_scores_as_its_own_full_logits_say(architecture: str) -> None:
    model = tiny(architecture).double()
    ids = torch.randint(2, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_p = model(input_ids=ids).logits.log_softmax(-1)
        reference = -log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        at = torch.tensor([5, 9, 11])
        assert scoring.token_nll(model, ids, at) == pytest.approx(reference[:, at - 1], abs=1e-5)
        padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], dim=1)
        assert scoring.token_nll(model, padded, slice(1, 12)) == pytest.approx(reference, abs=1e-5)
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        assert scoring.token_nll(model, ids[:, 4:], past=cache) == pytest.approx(reference[:, 4:], abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "opt"])
def test_gradients_reach_the_embeddings(architecture: str) -> None:
    model = tiny(architecture)
    ids = torch.randint(2, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    nll = scoring.token_nll(model, ids, slice(5, 8), inputs_embeds_BLD=embeds)
    assert torch.allclose(nll, scoring.token_nll(model, ids, slice(5, 8)), atol=1e-6)
    nll.sum().backward()
    assert embeds.grad is not None
    assert bool(embeds.grad[:, 4].abs().sum() > 0)
    assert bool((embeds.grad[:, 7] == 0).all()), "the last token predicts nothing"


def test_the_leading_token_is_bos_then_eos_then_none() -> None:
    assert scoring.leading_token(SimpleNamespace(bos_token_id=0, eos_token_id=2)) == 0
    assert scoring.leading_token(SimpleNamespace(bos_token_id=None, eos_token_id=2)) == 2
    assert scoring.leading_token(SimpleNamespace(bos_token_id=None, eos_token_id=None)) is None


PAIRS = scoring.PairLayout(source=7, pad=0)
ROWS_BL = torch.tensor([[5, 9, 4, 8, 7, 6, 1, 3, 2, 8, 1, 0], [5, 9, 1, 0, 0, 0, 0, 4, 1, 0, 0, 0]])
LENGTHS = ((7, 4), (3, 2))


@pytest.fixture(scope="module", params=("relu", "gated-gelu"))
def t5(request: pytest.FixtureRequest) -> PreTrainedModel:
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj=request.param,
        dropout_rate=0.0,
    )
    config.decoder_start_token_id = 0
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def test_padded_pairs_have_the_losses_of_each_pair_by_itself(t5: PreTrainedModel) -> None:
    nll_BT = scoring.token_nll(t5, ROWS_BL, pairs=PAIRS)
    for row, (num_source, num_target) in enumerate(LENGTHS):
        source, target = ROWS_BL[row, :num_source][None], ROWS_BL[row, 7 : 7 + num_target][None]
        logits_TV = t5(input_ids=source, labels=target).logits[0].log_softmax(-1)
        expected_T = -logits_TV.gather(1, target[0, :, None])[:, 0]
        torch.testing.assert_close(nll_BT[row, :num_target], expected_T, rtol=0, atol=1e-5)
        assert not nll_BT[row, num_target:].any()  # padding costs nothing


def test_positions_of_a_pair_are_those_of_its_row_and_its_source_is_never_scored(t5: PreTrainedModel) -> None:
    whole = scoring.token_scores(t5, ROWS_BL, pairs=PAIRS)
    part = scoring.token_scores(t5, ROWS_BL, slice(8, 10), pairs=PAIRS)
    torch.testing.assert_close(part.nll_BT, whole.nll_BT[:, 1:3])
    assert not whole.correct_BT[0, 4:].any()
    assert not whole.correct_BT[1, 2:].any()
    with pytest.raises(ValueError, match="7…11"):
        scoring.token_nll(t5, ROWS_BL, slice(6, 9), pairs=PAIRS)


def test_columns_that_hold_no_text_cost_nothing_and_change_no_bit(t5: PreTrainedModel) -> None:
    wide_BL = torch.cat([nn.functional.pad(side, (0, 6)) for side in PAIRS.sides(ROWS_BL)], dim=1)
    wide, read = scoring.PairLayout(source=13, pad=0).around(wide_BL), []
    hook = t5.register_forward_pre_hook(
        lambda _, __, given: read.append((given["attention_mask"].shape[1], given["decoder_input_ids"].shape[1])),
        with_kwargs=True,
    )
    tight = PAIRS.around(ROWS_BL)
    scores, scores_wide = scoring.token_scores(t5, ROWS_BL, pairs=tight), scoring.token_scores(t5, wide_BL, pairs=wide)
    nll_BT, wide_BT = scoring.token_nll(t5, ROWS_BL, pairs=tight), scoring.token_nll(t5, wide_BL, pairs=wide)
    padding_BT = scoring.token_nll(t5, wide_BL, slice(18, 22), pairs=wide)
    hook.remove()
    assert read == [(7, 4)] * 5
    for whole, part in (
        (scores_wide.nll_BT, scores.nll_BT),
        (scores_wide.correct_BT, scores.correct_BT),
        (wide_BT, nll_BT),
    ):
        assert whole.shape == (2, 11)
        assert torch.equal(whole[:, :5], part)
        assert not whole[:, 5:].any()
    assert padding_BT.shape == (2, 4)
    assert not padding_BT.any()


def test_gradients_reach_the_source_of_a_pair_and_not_its_padding(t5: PreTrainedModel) -> None:
    embeds_BSD = t5.get_input_embeddings()(ROWS_BL[:, :7]).detach().requires_grad_()
    nll_BT = scoring.token_nll(t5, ROWS_BL, inputs_embeds_BLD=embeds_BSD, pairs=PAIRS)
    torch.testing.assert_close(nll_BT, scoring.token_nll(t5, ROWS_BL, pairs=PAIRS))
    nll_BT.sum().backward()
    assert embeds_BSD.grad is not None
    assert embeds_BSD.grad[0].any(-1).all()
    assert embeds_BSD.grad[1, :3].any(-1).all()
    assert not embeds_BSD.grad[1, 3:].any()
