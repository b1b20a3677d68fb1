"""Measure the memory and time of packing: made-up text of a given size, packed by the same code as any corpus.

    python benchmarks/packing_memory.py --megabytes 200

Prints the process's peak resident memory before and after, so that two sizes give its slope.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from isotone.config import Data
from isotone.data import prepare_data
from isotone.interruption import StopFlag


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--words", type=int, default=600, help="mean number of words of a document")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, args.megabytes * 1_000_000, args.words)
        tokenizer = make_tokenizer(corpus)
        before_mb, started = peak_rss_mb(), time.monotonic()
        config = Data(source=str(corpus), sequence_length=512)
        summary = prepare_data(config, tokenizer, Path(folder) / "packed", max_context=512, stop=StopFlag())
    print(
        f"{args.megabytes} MB of text, {summary['documents_read']} documents, "
        f"{sum(s['tokens'] for s in summary['splits'].values())} tokens: peak {peak_rss_mb():.0f} MB of memory "
        f"({before_mb:.0f} MB before packing), {time.monotonic() - started:.0f} s"
    )


def write_corpus(path: Path, num_bytes: int, mean_words: int) -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = np.array(
        ["".join(letters[np.minimum(rng.geometric(0.15, rng.integers(1, 10)) - 1, 25)]) for _ in range(50_000)]
    )
    size = 0
    with open(path, "w") as file:
        while size < num_bytes:
            chosen = np.minimum(rng.zipf(1.3, max(5, rng.poisson(mean_words))) - 1, len(words) - 1)
            size += file.write(json.dumps({"text": " ".join(words[chosen])}) + "\n")


def make_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    with open(corpus) as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(500), strict=False)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>")


def peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


if __name__ == "__main__":
    main()
