"""Print what a bundled model's feed-forward networks do for it: its loss as it is, and with them silent.

    isotone run benchmarks/quality/pocket-arcee.yaml --only setup
    isotone run benchmarks/quality/pocket-t5.yaml --only setup
    python benchmarks/quality/silent_networks.py runs/quality-pocket-arcee runs/quality-pocket-t5

A constraint on networks that a model hardly needs cannot cost it much. Silent means that the second projection, weights
and bias, is 0. Losses are of at most 64 test documents, or 400 pairs.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from isotone import load_model, records
from isotone.constraint.feed_forward import feed_forwards
from isotone.data.packed import PackedData, open_packed
from isotone.evaluation import evaluate_perplexity, summarize
from isotone.evaluation.pairs import evaluate_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders runs/NAME whose setup is complete")
    print("| model | nats a token | with all networks silent | with the encoder's silent | with the decoder's silent |")
    print("|---|---|---|---|---|")
    for folder in parser.parse_args().runs:
        data = open_packed(folder / "setup/data")
        source = records.read_json(folder / "setup/model.json")["source"]
        losses = [loss(silenced(source, part), data) for part in (None, "", "encoder.", "decoder.")]
        print(f"| {source} | {' | '.join('–' if nats is None else f'{nats:.3f}' for nats in losses)} |", flush=True)


def silenced(source: str, part: str | None) -> PreTrainedModel | None:
    """Return a model whose networks in blocks under ``part`` put out nothing; None if it has none there."""
    model = load_model(source).float().eval()
    networks = [] if part is None else [n for n in feed_forwards(model) if n.block.startswith(part)]
    if part is not None and not networks:
        return None
    with torch.no_grad():
        for network in networks:
            for parameter in network.down.parameters():
                parameter.zero_()
    return model


def loss(model: PreTrainedModel | None, data: PackedData) -> float | None:
    if model is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        rest = {"work": records.JsonLines(Path(scratch) / "batches.jsonl"), "identity": {}}
        if data.pairs:
            rows = evaluate_pairs(model, data.documents("test").shuffled(0)[:400], data.pairs, batch_size=32, **rest)
        else:
            texts = data.documents("test").shuffled(0)[:64]
            rows = evaluate_perplexity(model, texts, context=256, leading_token=data.separator, **rest)
    return float(summarize(rows)["nll"]["value"])


if __name__ == "__main__":
    main()
