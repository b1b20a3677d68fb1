"""Print what non-negative weights cost and whether they help, model by model: the tables of docs/science.md.

    isotone run benchmarks/quality/pocket-arcee.yaml --seeds 42 1337 2024
    python benchmarks/quality/quality.py runs/quality-pocket-arcee

Give as many runs as there are. Killed, the first command goes on where it was. A ratio is the exponential of the
difference of mean losses on the test documents to the baseline's, with the interval of that difference (over documents
and, where there are several seeds, seeds). Of a run of one seed that ended with --until evaluate, only the cost is
printed.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from isotone import records
from isotone.comparisons import compare, evaluation_quantities
from isotone.config_io import load_experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders runs/NAME that are complete")
    for folder in parser.parse_args().runs:
        results = read(folder)
        print(f"## {folder.name}\n")
        print_cost(results)
        print_rouge(results)
        print_robustness(results)


def read(folder: Path) -> dict[str, Any]:
    """Return the results over seeds, or of the only seed; where it is evaluated and no further, what that says.

    Raises:
        SystemExit: the run is not complete.
    """
    over_seeds, seeds = folder / "summary/final_results.json", sorted(folder.glob("seed-*/results/final_results.json"))
    if over_seeds.is_file():
        return records.read_json(over_seeds)
    if len(seeds) == 1:
        return records.read_json(seeds[0])
    runs = [path.parent for path in folder.glob("seed-*/config.yaml")]
    if seeds or len(runs) != 1:
        raise SystemExit(f"{folder} holds no results; finish it with isotone run")
    return of_evaluation(runs[0])


def of_evaluation(run: Path) -> dict[str, Any]:
    """Return what the arms of a run that is evaluated cost, in the form of its results.

    Raises:
        SystemExit: an arm is not evaluated yet.
    """
    arms = list(load_experiment(run / "config.yaml").arms)
    if lacking := [arm for arm in arms if not (run / f"records/evaluate.{arm}.json").is_file()]:
        raise SystemExit(f"{run}: {', '.join(lacking)} not evaluated yet; finish it with isotone run")
    found = {arm: records.read_json(run / f"results/by_arm/evaluate.{arm}.json") for arm in arms}
    rows = {arm: records.JsonLines(run / f"results/documents/evaluate.{arm}.jsonl").read() for arm in arms}
    nll = {arm: evaluation_quantities(of_arm)[0] for arm, of_arm in rows.items()}
    compared = [compare((arm, [nll[arm]]), ("baseline", [nll["baseline"]])) for arm in arms if arm != "baseline"]
    certificates = {arm: {"certificate": result["certificate"]} for arm, result in found.items()}
    return {"arms": certificates, "comparisons": [entry for entry in compared if entry], "verdicts": []}


def against_baseline(
    results: dict[str, Any],
    metric: str,
    attack: str | None = None,
    variant: str | None = None,
    protocol: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the comparison with the baseline in a metric, by arm."""
    asked = {"metric": metric, "attack": attack, "variant": variant, "protocol": protocol, "b": "baseline"}
    return {c["a"]: c for c in results["comparisons"] if asked.items() <= c.items()}


def print_cost(results: dict[str, Any]) -> None:
    print("| arm | perplexity | ratio to the baseline | certificate |\n|---|---|---|---|")
    compared = against_baseline(results, "nll")
    for arm, found in results["arms"].items():
        its = compared.get(arm)
        nll = its["value_a"] if its else next(iter(compared.values()))["value_b"]
        ratio = "1" if its is None else interval(math.exp(its["difference"]), map(math.exp, its["ci95"]), "{:.3f}")
        certificate = found["certificate"]["verdict"] if found["certificate"] else "–"
        print(f"| {arm} | {math.exp(nll):.2f} | {ratio} | {certificate} |")
    print()


def print_rouge(results: dict[str, Any]) -> None:
    metrics = [m for m in ("rouge1", "rouge2", "rougeLsum") if against_baseline(results, m)]
    if not metrics:
        return
    print("| arm | " + " | ".join(f"{m}, difference" for m in metrics) + " |\n|---" + "|---" * len(metrics) + "|")
    for arm in against_baseline(results, metrics[0]):
        cells = [", ".join(cells_of(against_baseline(results, metric)[arm], "{:+.3f}")) for metric in metrics]
        print(f"| {arm} | {' | '.join(cells)} |")
    print()


def print_robustness(results: dict[str, Any]) -> None:
    verdicts = {v["arm"]: v for v in results["verdicts"]}
    worst = against_baseline(results, "delta_nll", "ensemble", "worst_case", "prefix")
    published = against_baseline(results, "delta_nll", "hotflip", "published", "after_first_flip")
    if not worst:  # HotFlip alone was asked for
        return
    print(
        "| arm | Δ, worst of all attacks | and minus the baseline's | Δ, published HotFlip | and minus the baseline's |"
    )
    print("|---|---|---|---|---|")
    of_baseline = [f"{next(iter(compared.values()))['value_b']:.3f}" for compared in (worst, published)]
    print(f"| baseline | {' | – | '.join(of_baseline)} | – |")
    for arm in worst:
        print(f"| {arm} | {' | '.join(cell for c in (worst, published) for cell in cells_of(c[arm], '{:+.3f}'))} |")
    print("\n| arm | remainders, by control | verdict | premise met |\n|---|---|---|---|")
    for arm, verdict in verdicts.items():
        found = [(one["control"], one["remainder"]) for one in verdict["against"] if one["remainder"]]
        remainders = "; ".join(f"{name} {interval(one['value'], one['ci95'], '{:+.3f}')}" for name, one in found)
        premise = (results["arms"][arm]["certificate"] or {}).get("premise")
        met = f"{premise['ordered']:,} of {premise['pairs']:,}" if premise else "–"
        print(f"| {arm} | {remainders or '–'} | {verdict['verdict']} | {met} |")
    print()


def cells_of(its: dict[str, Any], form: str) -> list[str]:
    return [f"{its['value_a']:.3f}", interval(its["difference"], its["ci95"], form)]


def interval(value: float, bounds: Any, form: str) -> str:
    low, high = bounds
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"


if __name__ == "__main__":
    main()
