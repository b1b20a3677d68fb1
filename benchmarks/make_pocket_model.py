"""Train a bundled model of 6.8M parameters on the train split of the World English Bible.

    python benchmarks/make_pocket_model.py --out src/isotone/models/pocket --seed 7 --epochs 10 --stop-after 9
    python benchmarks/make_pocket_model.py --architecture arcee --out FOLDER    RMSNorm and ReLU: the constraint binds
    python benchmarks/make_pocket_model.py --architecture llama --out FOLDER    RMSNorm, gated: cannot be certified

Weights start at random, the tokenizer (byte-level BPE, 4,096 entries) is learned from the train split alone. Dropout is
on in training only and is 0 in the exported configuration. pocket_training.py says how it is trained; a killed run
continues from its last epoch. About 45 minutes on 2 cores.
"""

import argparse
import json
import math
from collections.abc import Iterator

import numpy as np
import torch
from pocket_training import Batch, add_arguments, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from isotone.data.bible import web_bible
from isotone.data.fractions import DEFAULT_FRACTIONS, SPLITS
from isotone.data.splits import assign_split, minhash, removed_duplicates

VOCABULARY, CONTEXT = 4096, 256
EOS = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--architecture", choices=tuple(CONFIGS), default="gpt_neox")
    parser.add_argument("--batch", type=int, default=16, help="rows of as many tokens as the context")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    texts = split_texts()
    tokenizer = make_tokenizer(texts["train"])
    tokenizer.save_pretrained(args.out)
    tokens = {name: tokenize(tokenizer, texts[name]) for name in ("train", "validation", "test")}
    print({name: (len(texts[name]), len(t)) for name, t in tokens.items()}, flush=True)

    model = make_model(args.architecture, args.dropout)
    train_on(model, tokens, args)
    figures = {
        name: bits_per_byte(model, tokens[name], sum(len(t.encode()) for t in texts[name]))
        for name in ("validation", "test")
    }
    print("bits per byte", figures, flush=True)
    if hasattr(model.config, "hidden_dropout"):  # of GPT-NeoX; others have none in their configuration
        model.config.hidden_dropout = 0.0
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "training.json").write_text(
        json.dumps(
            {
                "bits_per_byte": figures,
                "parameters": sum(p.numel() for p in model.parameters()),
                "train_tokens_per_epoch": len(tokens["train"]),
                **{k: v for k, v in vars(args).items() if k not in ("out", "threads")},
            },
            indent=2,
        )
        + "\n"
    )


def split_texts() -> dict[str, list[str]]:
    documents = list(web_bible())
    splits = [assign_split(d.text, DEFAULT_FRACTIONS) for d in documents]
    removed = set(removed_duplicates((s, minhash(d.text)) for s, d in zip(splits, documents, strict=True)))
    return {
        name: [d.text for i, (d, s) in enumerate(zip(documents, splits, strict=True)) if s == name and i not in removed]
        for name in SPLITS
    }


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS, model_max_length=CONTEXT
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    ids = [token for text in texts for token in [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]]
    return np.array([*ids, tokenizer.eos_token_id], np.int64)


def make_model(architecture: str, dropout: float) -> PreTrainedModel:
    """Return a model with random weights; in training, dropout is on what attention and feed-forward networks add."""
    config = CONFIGS[architecture]()
    if hasattr(config, "hidden_dropout"):
        config.hidden_dropout = dropout
        return AutoModelForCausalLM.from_config(config)
    model = AutoModelForCausalLM.from_config(config)
    for name, module in model.named_modules():
        if name.endswith((".mlp", ".self_attn.o_proj")):
            module.register_forward_hook(lambda m, _, out: torch.nn.functional.dropout(out, dropout, m.training))
    return model


def gpt_neox() -> PreTrainedConfig:
    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        hidden_act="gelu",
        rotary_pct=0.25,
        max_position_embeddings=CONTEXT,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        attention_dropout=0.0,  # its random numbers cost half the time of a step on a CPU
        bos_token_id=0,
        eos_token_id=0,
    )


def arcee() -> PreTrainedConfig:
    return ArceeConfig(intermediate_size=1024, hidden_act="relu", mlp_bias=True, **LLAMA_SHAPED)


def llama() -> PreTrainedConfig:
    return LlamaConfig(intermediate_size=683, hidden_act="silu", **LLAMA_SHAPED)  # as many weights in three matrices


LLAMA_SHAPED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {"gpt_neox": gpt_neox, "arcee": arcee, "llama": llama}


def train_on(model: PreTrainedModel, tokens: dict[str, np.ndarray], args: argparse.Namespace) -> None:
    per_epoch = (len(tokens["train"]) - 1) // (args.batch * CONTEXT)

    def batches(epoch: int) -> Iterator[Batch]:
        rng = np.random.default_rng((args.seed, epoch))
        offset = int(rng.integers(0, CONTEXT))  # another cut of the text into rows every epoch
        starts = rng.permutation((len(tokens["train"]) - 1 - offset) // CONTEXT) * CONTEXT + offset
        for k in range(per_epoch):
            rows = starts[k * args.batch : (k + 1) * args.batch]
            yield {"x_BL": torch.from_numpy(np.stack([tokens["train"][s : s + CONTEXT + 1] for s in rows]))}

    def loss(batch: Batch) -> Tensor:
        logits_BLV = model(batch["x_BL"][:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits_BLV.float().flatten(0, 1), batch["x_BL"][:, 1:].flatten())

    train(
        model,
        lambda name: ".layers." in name,
        batches,
        per_epoch,
        loss,
        lambda: mean_nats(model, tokens["validation"]),
        args,
    )


@torch.no_grad()
def mean_nats(model: PreTrainedModel, tokens: np.ndarray) -> float:
    """Return the mean loss over all tokens but the first, in windows of the whole context that overlap by half."""
    model.eval()
    total, scored = 0.0, 1
    while scored < len(tokens):
        start = max(0, scored - CONTEXT // 2)
        window = torch.from_numpy(tokens[start : start + CONTEXT + 1])[None]
        losses = torch.nn.functional.cross_entropy(model(window[:, :-1]).logits[0], window[0, 1:], reduction="none")
        total += losses[scored - start - 1 :].double().sum().item()
        scored = start + window.shape[1]
    return total / (len(tokens) - 1)


def bits_per_byte(model: PreTrainedModel, tokens: np.ndarray, num_bytes: int) -> float:
    return mean_nats(model, tokens) * (len(tokens) - 1) / math.log(2) / num_bytes


if __name__ == "__main__":
    main()
