"""Results over seeds pool what all seeds have, fail loudly where one is missing, and compare byte for byte."""

import html
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from synthetic_run import ARMS, THRESHOLD, write_run, write_true_records

from isotone import records
from isotone.comparisons import compare, evaluation_quantities
from isotone.errors import BlockedError, UsageError
from isotone.pipeline.run_directory import ExperimentDirectory, RunDirectory
from isotone.pipeline.status import explain_run, format_status, run_status
from isotone.pipeline.summary import summarize_seeds
from isotone.report import write_report
from isotone.result_models import SUMMARY, json_schema

SEEDS = [42, 44, 46]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an experiment of three complete seeds that is not summarized."""
    out = tmp_path_factory.mktemp("runs")
    for seed in SEEDS:
        write_report(write_run(out, seed=seed, num_documents=8, complete=True))
    return out / "pocket"


@pytest.fixture(scope="module")
def summary(runs: Path) -> Path:
    """Return the summary of a copy of the three seeds."""
    copy = Path(shutil.copytree(runs, runs.parents[0] / "summarized" / "pocket"))
    return summarize_seeds(copy, SEEDS, lambda _: None)


@pytest.fixture
def own(runs: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may break."""
    return Path(shutil.copytree(runs, tmp_path / "pocket"))


def results(folder: Path) -> dict[str, Any]:
    return records.read_json(folder / "final_results.json")


def one(entries: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    [found] = [e for e in entries if wanted.items() <= e.items()]
    return found


PRIMARY = {"attack": "hotflip", "variant": "iterative", "protocol": "prefix"}


def test_a_summary_has_every_file_and_its_published_form(summary: Path) -> None:
    names = {p.relative_to(summary).as_posix() for p in summary.rglob("*") if p.is_file()}
    tables = {
        f"tables/{n}.{e}" for n in ("arms", "by_seed", "comparisons", "hotflip", "triggers") for e in ("md", "tex")
    }
    files = {"final_results.json", "experiment_summary.txt", "learned_triggers.csv", "report.html", "record.json"}
    assert names == files | tables
    jsonschema.validate(results(summary), json_schema(SUMMARY))
    assert results(summary)["seeds"] == SEEDS


def test_every_seeds_figures_are_kept_and_pooled(runs: Path, summary: Path) -> None:
    final = results(summary)
    of_runs = [m for s in SEEDS for m in results(runs / f"seed-{s}/results")["measurements"]]
    assert final["measurements"] == of_runs
    pooled = one(final["pooled"], arm="monotonic", metric="delta_nll", **PRIMARY)
    values = [one(of_runs, arm="monotonic", seed=s, metric="delta_nll", **PRIMARY)["value"] for s in SEEDS]
    assert pooled["value"] == pytest.approx(sum(values) / 3)  # all documents have as many scored tokens
    assert pooled["ci95"][0] < min(values) < max(values) < pooled["ci95"][1]
    assert (pooled["num_seeds"], pooled["n"], pooled["num_missing"]) == (3, 7, 1)
    nll, perplexity = (one(final["pooled"], arm="baseline", metric=m) for m in ("nll", "perplexity"))
    assert perplexity["value"] == pytest.approx(math.exp(nll["value"]))
    assert final["arms"]["baseline"]["perplexity"] == perplexity["value"]
    assert final["arms"]["monotonic"]["hotflip"]["delta_nll"] == pooled["value"]
    premise = final["arms"]["monotonic"]["certificate"]["premise"]
    assert premise == {"variant": "iterative", "pairs": 36_000, "ordered": 9, "rate": 0.00025}


def test_comparisons_cross_documents_with_seeds(runs: Path, summary: Path) -> None:
    entry = one(results(summary)["comparisons"], a="monotonic", metric="nll")
    of_arms = []
    for arm in ("monotonic", "baseline"):
        paths = [runs / f"seed-{s}/results/documents/evaluate.{arm}.jsonl" for s in SEEDS]
        of_arms.append((arm, [evaluation_quantities(records.JsonLines(p).read())[0] for p in paths]))
    expected = compare(*of_arms)
    assert expected is not None
    assert {k: entry[k] for k in ("difference", "ci95", "p", "dof", "num_seeds", "scope")} == {
        k: expected[k] for k in ("difference", "ci95", "p", "dof", "num_seeds", "scope")
    }
    assert (entry["num_seeds"], entry["scope"], entry["family"]) == (3, "seeds and documents", "confirmatory")


def test_success_keeps_each_seeds_own_threshold_and_exact_test(runs: Path, summary: Path) -> None:
    final, success = results(summary), {"metric": "success_rate", **PRIMARY}
    assert final["success_thresholds"] == {"42": THRESHOLD, "44": THRESHOLD + 0.02, "46": THRESHOLD + 0.04}
    pooled = one(final["pooled"], arm="baseline", **success)
    shares = [one(final["measurements"], arm="baseline", seed=s, **success)["value"] for s in SEEDS]
    assert pooled["value"] == pytest.approx(sum(shares) / 3)
    assert pooled["threshold"] is None
    assert 0 <= pooled["ci95"][0] < pooled["ci95"][1] <= 1
    by_seed = one(final["comparisons"], a="monotonic", **success)["by_seed"]
    for seed, found in zip(SEEDS, by_seed, strict=True):
        own = one(results(runs / f"seed-{seed}/results")["comparisons"], a="monotonic", **success)
        assert found == {"seed": seed, **{k: own[k] for k in found if k != "seed"}}
        assert found["test"] == "exact McNemar"
        assert found["only_a"] is not None


def test_further_attacks_and_the_transfer_matrix_are_pooled_over_seeds(tmp_path: Path) -> None:
    for seed in SEEDS:
        write_run(tmp_path, seed=seed, num_documents=8, complete=True, further=True)
    path = tmp_path / "pocket/seed-44/results/documents/transfer.monotonic.jsonl"
    rows = records.JsonLines(path).read()
    assert (rows[0]["source"], rows[0]["attack"]) == ("baseline", "gcg")
    rows[0] |= {"status": "missing", "reason": "made up"}
    records.write_bytes(path, records.dump_json_lines(rows))
    write_true_records(RunDirectory(tmp_path / "pocket/seed-44"), 44)
    folder = summarize_seeds(tmp_path / "pocket", SEEDS, lambda _: None)
    final = results(folder)
    jsonschema.validate(final, json_schema(SUMMARY))
    cells = {(c["source"], c["target"], c["attack"]): c for c in final["transfer"]}
    assert len(cells) == 3 * 3 * 3
    of_runs = [
        one(
            results(tmp_path / f"pocket/seed-{s}/results")["transfer"],
            source="monotonic",
            target="baseline",
            attack="gcg",
        )
        for s in SEEDS
    ]
    pooled = cells["monotonic", "baseline", "gcg"]
    assert pooled["value"] == pytest.approx(sum(c["value"] for c in of_runs) / 3)
    assert pooled["ci95"][0] < min(c["value"] for c in of_runs) < max(c["value"] for c in of_runs) < pooled["ci95"][1]
    assert (pooled["num_seeds"], pooled["n"], pooled["num_missing"]) == (3, 7, 1)
    assert cells["baseline", "monotonic", "gcg"]["n"] == 6  # without a figure in one seed, so left out in all
    own = one(final["pooled"], arm="baseline", metric="delta_nll", attack="gcg", variant="top_k", protocol="prefix")
    assert cells["baseline", "baseline", "gcg"]["value"] == own["value"]
    assert final["arms"]["baseline"]["attacks"]["pgd"]["upper_bound"] is True
    text = (folder / "report.html").read_text()
    assert 'id="transfer"' in text
    assert "(7 documents, 3 seeds)" in text
    assert '<th scope="row">baseline, PGD (upper bound)</th>' in text
    assert (folder / "tables/further_attacks.md").is_file()


def test_margins_are_the_mean_of_the_seeds(summary: Path) -> None:
    final = results(summary)
    assert final["equivalence_margins"] == {"hotflip": pytest.approx(0.05)}
    assert final["equivalence_margins_by_seed"]["46"] == {"hotflip": pytest.approx(0.07)}


def test_a_document_missing_in_one_seed_is_left_out_in_all_and_counted(own: Path) -> None:
    path = own / "seed-44/results/documents/hotflip.monotonic.iterative.jsonl"
    rows = records.JsonLines(path).read()
    rows[0] |= {"status": "missing", "reason": "made up"}
    records.write_bytes(path, records.dump_json_lines(rows))
    write_true_records(RunDirectory(own / "seed-44"), 44)
    summarize_seeds(own, SEEDS, lambda _: None)
    entry = one(results(own / "summary")["comparisons"], a="monotonic", metric="delta_nll", **PRIMARY)
    assert (entry["n"], entry["num_missing"]) == (6, 2)
    assert "left out in all seeds" in (own / "summary/report.html").read_text()


def test_seeds_that_measured_other_documents_are_refused(own: Path) -> None:
    path = own / "seed-44/results/documents/evaluate.monotonic.jsonl"
    records.write_bytes(path, path.read_bytes().replace(b'"test/3"', b'"test/x"'))
    write_true_records(RunDirectory(own / "seed-44"), 44)
    with pytest.raises(BlockedError, match=r"seeds 42 and 44 measured other documents in monotonic .*test/3"):
        summarize_seeds(own, SEEDS)
    assert not (own / "summary").exists()


def test_a_measure_that_one_seed_lacks_is_named_and_not_pooled(own: Path) -> None:
    path = own / "seed-44/results/final_results.json"
    records.write_json(path, records.read_json(path) | {"success_threshold": None})
    write_true_records(RunDirectory(own / "seed-44"), 44)
    summarize_seeds(own, SEEDS, lambda _: None)
    final = results(own / "summary")
    assert {g["metric"] for g in final["not_pooled"]} == {"success_rate"}
    assert final["not_pooled"][0]["missing_in"] == [44]
    assert not [m for m in final["pooled"] if m["metric"] == "success_rate" and m["protocol"] == "prefix"]
    assert "missing in seeds 44" in (own / "summary/report.html").read_text()


def test_every_missing_seed_is_named_with_reason_and_command_and_nothing_is_written(own: Path) -> None:
    (own / "seed-44/records/aggregate.json").unlink()
    with pytest.raises(BlockedError) as blocked:
        summarize_seeds(own, [7, *SEEDS])
    seven, fortyfour = str(blocked.value).splitlines()
    assert seven.startswith(f"seed 7 is missing: {own / 'seed-7'} has not been started; bring it: isotone run ")
    assert seven.endswith(f"seed-42/config.yaml --seed 7 --out {own.parent}")
    assert "seed 44 is missing: aggregate is absent" in fortyfour
    assert not (own / "summary").exists()


def test_a_changed_row_makes_its_seed_missing(own: Path) -> None:
    path = own / "seed-46/results/documents/hotflip.baseline.once.jsonl"
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(BlockedError, match=r"seed 46 is missing: hotflip\.baseline is stale"):
        summarize_seeds(own, SEEDS)


def test_seeds_of_another_configuration_are_refused_by_key(own: Path) -> None:
    config = own / "seed-46/config.yaml"
    tree = yaml.safe_load(config.read_text())
    config.write_text(yaml.dump(tree | {"training": {"lr": 3e-4}}))
    write_true_records(RunDirectory(own / "seed-46"), 46)
    with pytest.raises(BlockedError, match=r"seed 46 has another configuration than seed 42: training\.lr is 0\.0003"):
        summarize_seeds(own, SEEDS)


def test_what_decides_no_result_may_differ(own: Path) -> None:
    config = own / "seed-46/config.yaml"
    config.write_text(yaml.dump(yaml.safe_load(config.read_text()) | {"training": {"keep_last": 5}}))
    summarize_seeds(own, SEEDS, lambda _: None)


def test_a_seed_that_was_not_asked_for_is_named_and_not_used(own: Path) -> None:
    lines: list[str] = []
    summarize_seeds(own, [46, 42], lines.append)
    assert lines[0] == "seed-44 is not used: the summary is over seeds 42, 46"
    assert results(own / "summary")["seeds"] == [42, 46]
    assert {m["seed"] for m in results(own / "summary")["measurements"]} == {42, 46}


def test_seeds_come_from_the_configuration_and_then_from_the_summary_that_is_there(own: Path) -> None:
    summarize_seeds(own, say=lambda _: None)
    assert results(own / "summary")["seeds"] == [42]  # the default of seeds
    summarize_seeds(own, SEEDS, lambda _: None)
    summarize_seeds(own, say=lambda _: None)  # made again, it leaves out nobody in silence
    assert results(own / "summary")["seeds"] == SEEDS


def test_configurations_that_name_other_seeds_ask_which(own: Path) -> None:
    config = own / "seed-44/config.yaml"
    config.write_text(yaml.dump(yaml.safe_load(config.read_text()) | {"seeds": [44, 46]}))
    with pytest.raises(UsageError, match=r"seeds is 42 in seed-42/config.yaml and 44, 46 in seed-44"):
        summarize_seeds(own)


def test_one_run_is_no_experiment(own: Path) -> None:
    with pytest.raises(UsageError, match="it is one run: give"):
        summarize_seeds(own / "seed-42")


def test_two_summaries_of_the_same_seeds_are_equal_byte_for_byte(summary: Path, own: Path) -> None:
    again = summarize_seeds(own, list(reversed(SEEDS)), lambda _: None)
    for path in summary.rglob("*"):
        if path.is_file() and path.name != "record.json":
            assert path.read_bytes() == (again / path.relative_to(summary)).read_bytes(), path


def test_the_page_shows_every_seed_and_needs_nothing_else(summary: Path) -> None:
    text, final = (summary / "report.html").read_text(), results(summary)
    links = re.findall(r'href="([^#"]*)"', text)
    assert links == [f"../seed-{seed}/report.html" for seed in SEEDS]
    assert all((summary / link).is_file() for link in links)
    assert all(c["sentence"] in html.unescape(text) for c in final["conclusions"])
    assert any("3 seeds" in c["sentence"] for c in final["conclusions"])
    assert "<script" not in text
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    for arm in ARMS:
        assert f'<th scope="row">{arm}, perplexity</th>' in text


def test_status_shows_all_seeds_and_the_summary(own: Path) -> None:
    waiting = run_status(own)
    assert {row["seed"] for row in waiting} == {None, *SEEDS}
    assert (waiting[-1]["node"], waiting[-1]["state"]) == ("summary", "waiting")
    summarize_seeds(own, SEEDS, lambda _: None)
    assert {row["state"] for row in run_status(own)} == {"complete"}
    assert "summary over seeds 42, 44, 46: complete" in format_status(run_status(own))
    shutil.rmtree(own / "seed-46")
    (own / "seed-44/records/hotflip.monotonic.json").unlink()
    rows = json.loads(json.dumps(run_status(own)))
    assert one(rows, seed=46)["state"] == "waiting"
    assert one(rows, seed=44, node="hotflip.monotonic")["state"] == "waiting"
    assert rows[-1]["state"] == "stale"
    assert max(map(len, format_status(rows).splitlines()[:-1])) <= 100
    text = explain_run(own, run_status(own))
    assert "seed 42 is complete." in text
    assert "seed 44:\n  hotflip.monotonic is waiting" in text
    assert "the summary is stale: seed 44" in text


def test_a_seed_made_anew_makes_the_summary_stale(own: Path) -> None:
    summarize_seeds(own, SEEDS, lambda _: None)
    path = own / "seed-44/results/final_results.json"
    records.write_json(path, records.read_json(path) | {"success_threshold": 0.5})
    write_true_records(RunDirectory(own / "seed-44"), 44)
    assert run_status(own)[-1]["reason"] == "seed 44, which it was made from, has changed"


def test_many_seeds_fit_a_terminal(own: Path) -> None:
    rows = run_status(own)
    many = [{**row, "seed": 10_000 + i} for i in range(12) for row in rows if row["seed"] == 42] + rows[-1:]
    *lines, _ = format_status(many).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("seed 100" in line for line in lines) > 1


def test_one_run_is_shown_as_before(own: Path) -> None:
    rows = run_status(own / "seed-42")
    assert all("seed" not in row for row in rows)
    assert format_status(rows).splitlines()[0].startswith("0  setup")
    assert ExperimentDirectory(own).runs.keys() == set(SEEDS)


def test_whether_contexts_are_read_is_known_over_seeds_as_in_each_of_them(tmp_path: Path) -> None:
    """Without it no verdict over seeds says more or less robust."""
    for seed in SEEDS:
        documents = write_run(tmp_path, seed=seed, complete=True, further=True) / "results" / "documents"
        for arm in ARMS:
            rows = records.JsonLines(documents / f"hotflip.{arm}.iterative.jsonl").read()
            exchanged = [row | {"variant": "exchanged"} for row in rows]
            records.JsonLines(documents / f"hotflip.{arm}.exchanged.jsonl").append(*exchanged)
    verdicts = results(summarize_seeds(tmp_path / "pocket", SEEDS, lambda _: None))["verdicts"]
    against = [entry for verdict in verdicts for entry in verdict["against"]]
    assert against
    assert all(entry["context_arm"] is not None and entry["context_baseline"] is not None for entry in against)
