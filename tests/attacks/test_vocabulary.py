"""An attack writes only what a text can contain."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from isotone.attacks import Vocabulary
from isotone.errors import UsageError

TEXT = ["the quick brown fox jumps over the lazy dog, über den faulen Hund", "größe and naïveté, the other day"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|pad|>"])
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|pad|>")
    fast.add_tokens(["[added]"])
    return fast


def test_specials_added_and_padding_rows_are_not_admissible(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(tokenizer) + 7)
    assert vocabulary.admissible_V.shape == (len(tokenizer) + 7,)
    assert not vocabulary.admissible_V[len(tokenizer) :].any()
    assert not vocabulary.admissible_V[tokenizer.convert_tokens_to_ids(["<|end|>", "<|pad|>", "[added]"])].any()


def test_every_admissible_token_decodes_and_encodes_to_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(tokenizer))
    assert len(vocabulary.ids_N) > 100
    for token in vocabulary.ids_N.tolist():
        assert vocabulary.through_text([token]) == [token]


def test_bytes_that_are_no_text_by_themselves_are_not_admissible(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(tokenizer))
    half_of_a_letter = tokenizer.convert_tokens_to_ids("Ã")  # the byte C3
    assert not vocabulary.admissible_V[half_of_a_letter]
    assert vocabulary.admissible_V[tokenizer.convert_tokens_to_ids("x")]


def test_rows_that_the_model_does_not_have_are_not_admissible(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Vocabulary.from_tokenizer(tokenizer, 100).admissible_V.shape == (100,)


def test_ids_that_merge_do_not_survive_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(tokenizer))
    letters = [tokenizer.get_vocab()[letter] for letter in "the"]
    assert vocabulary.through_text(letters) == tokenizer("the")["input_ids"] != letters


def test_a_tokenizer_without_admissible_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="no token of the tokenizer is admissible"):
        Vocabulary(torch.zeros(4, dtype=torch.bool))
