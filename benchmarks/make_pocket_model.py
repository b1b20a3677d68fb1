"""Train a bundled model of 6.8M parameters on the train split of the World English Bible.

    python benchmarks/make_pocket_model.py --out src/isotone/models/pocket --seed 7 --epochs 10 --stop-after 9
    python benchmarks/make_pocket_model.py --architecture arcee --out FOLDER    RMSNorm and ReLU: the constraint binds
    python benchmarks/make_pocket_model.py --architecture llama --out FOLDER    RMSNorm, gated: cannot be certified

Weights start at random, the tokenizer (byte-level BPE, 4,096 entries) is learned from the train split alone. The hidden
matrices are trained with Muon (Jordan et al. 2024), the rest with AdamW; dropout is on in training only and is 0 in the
exported configuration; the exported weights are an exponential moving average. A killed run continues from its last
epoch. About 45 minutes on 2 cores.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--architecture", choices=tuple(CONFIGS), default="gpt_neox")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=10, help="the schedule's end")
    parser.add_argument("--stop-after", type=int, help="stop before it, with the average of the weights so far")
    parser.add_argument("--batch", type=int, default=16, help="rows of as many tokens as the context")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
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
    average = train(model, tokens, args)
    for parameter, mean in zip(model.parameters(), average, strict=True):
        parameter.data.copy_(mean.to(torch.bfloat16))  # what is stored is what is measured
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


def train(model: PreTrainedModel, tokens: dict[str, np.ndarray], args: argparse.Namespace) -> list[torch.Tensor]:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    other = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    optimizers = [
        torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original"),
        torch.optim.AdamW(other, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    per_epoch = (len(tokens["train"]) - 1) // (args.batch * CONTEXT)
    total, warmup = per_epoch * args.epochs, 100
    average = [p.detach().clone() for p in model.parameters()]
    state, first = args.out / "unfinished.pt", 0
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        for optimizer, s in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(s)
        average, first = saved["average"], saved["epoch"]
    started = time.monotonic()
    for epoch in range(first, args.stop_after or args.epochs):
        torch.manual_seed(args.seed * 1000 + epoch)  # dropout; an epoch does not depend on the ones before it
        rng = np.random.default_rng((args.seed, epoch))
        offset = int(rng.integers(0, CONTEXT))  # another cut of the text into rows every epoch
        starts = rng.permutation((len(tokens["train"]) - 1 - offset) // CONTEXT) * CONTEXT + offset
        model.train()
        for k in range(per_epoch):
            step = epoch * per_epoch + k
            scale = min((step + 1) / warmup, 1.0) * (1 - max(0.0, (step - 0.3 * total) / (0.7 * total)) * 0.99)
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * scale
            rows = starts[k * args.batch : (k + 1) * args.batch]
            x_BL = torch.from_numpy(np.stack([tokens["train"][s : s + CONTEXT + 1] for s in rows]))
            with torch.autocast("cpu", torch.bfloat16):
                logits_BLV = model(x_BL[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits_BLV.float().flatten(0, 1), x_BL[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                decay = min(0.995, (step + 1) / (step + 10))
                for mean, parameter in zip(average, model.parameters(), strict=True):
                    mean.lerp_(parameter, 1 - decay)
            if k % 50 == 0:
                seconds = time.monotonic() - started
                print(f"step {step}/{total} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "average": average,
                "epoch": epoch + 1,
            },
            state.with_suffix(".new"),
        )
        state.with_suffix(".new").replace(state)
        live = [p.detach().clone() for p in model.parameters()]
        for parameter, mean in zip(model.parameters(), average, strict=True):
            parameter.data.copy_(mean)
        nats = mean_nats(model, tokens["validation"])
        for parameter, value in zip(model.parameters(), live, strict=True):
            parameter.data.copy_(value)
        print(f"epoch {epoch + 1} validation {nats:.4f} nats a token, perplexity {math.exp(nats):.2f}", flush=True)
    state.unlink()
    return average


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
