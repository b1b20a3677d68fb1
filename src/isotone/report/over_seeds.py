"""The page and the tables of a summary over seeds: pooled figures with each seed's beside them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from isotone.report import content
from isotone.report.figures import Interval
from isotone.report.page import render_page
from isotone.report.run_files import ATTACKS, SECONDARY_PROTOCOLS, RunFiles
from isotone.report.sections import (
    CLAIM,
    FURTHER,
    Section,
    how_to_read,
    interval_figure,
    transfer_section,
    verdict_section,
)
from isotone.report.tables import MISSING, Table, count, interval, number, p_value, share, signed

Json = Mapping[str, Any]

_FEW_SEEDS = (
    "Two seeds say little about the spread between seeds: in simulations, where seeds differ much, an interval that is "
    "to hold the truth in 95 % of cases held it in 88 % with two seeds, in 92 % with three and in 94 % with five."
)


@dataclass(frozen=True)
class SummaryFiles(RunFiles):
    """A summary's results, read like a run's; ``root`` is the configuration of one of its seeds."""

    results: Json

    @cached_property
    def final(self) -> Json:
        """The results over seeds."""
        return self.results

    @cached_property
    def config(self) -> Json:
        """The resolved experiment."""
        return yaml.safe_load(self.root.read_text())

    @property
    def seeds(self) -> Sequence[int]:
        """All seeds, in order."""
        return self.results["seeds"]

    def measurement(self, arm: str, metric: str, attack: str | None = None, variant: str | None = None) -> Json:
        """The pooled measurement of an arm's metric, in its primary protocol; empty if there is none."""
        return next(iter(self._measured("pooled", arm, metric, attack, variant)), {})

    def by_seed(self, arm: str, metric: str, attack: str | None = None, variant: str | None = None) -> dict[int, float]:
        """The same measurement of each seed that has it."""
        found = self._measured("measurements", arm, metric, attack, variant)
        return {m["seed"]: m["value"] for m in found if m["value"] is not None}

    def _measured(self, part: str, arm: str, metric: str, attack: str | None, variant: str | None) -> list[Json]:
        wanted = {"arm": arm, "metric": metric, "attack": attack, "variant": variant}
        return [
            m for m in self.results[part] if wanted.items() <= m.items() and m["protocol"] not in SECONDARY_PROTOCOLS
        ]

    def entry_key(self, attack: str, variant: str) -> tuple[str, str]:
        """Attack and variant as measurements name them (random edits are a variant of HotFlip's stage)."""
        entry = self._of_arms(attack, variant)[0]
        return entry["attack"], entry["variant"]

    @property
    def scope(self) -> str:
        """What intervals are over."""
        return "seeds and documents" if len(self.seeds) > 1 else "documents, of these models only"

    @property
    def attacks_made(self) -> list[tuple[str, str]]:
        """Attack and variant, of all that are scored in the primary protocol."""
        return [(attack, variant) for attack in self.attacks for variant in self.primary_variants(attack)]


def render_summary(results: Json, config: Path) -> str:
    """Return the page over seeds as HTML; it needs no other file, and links to each seed's own page.

    Args:
        results: summary/final_results.json.
        config: the resolved experiment of one of the seeds.
    """
    run = SummaryFiles(config, results)
    sections = [_conclusions(run), verdict_section(run), _cost(run), _attacks(run), transfer_section(run)]
    sections += [_comparisons(run), _certificates(run), _fairness(run), _seeds(run)]
    word = "seeds" if len(run.seeds) > 1 else "seed"
    title = f"{run.config['name']} · {word} {', '.join(map(str, run.seeds))}"
    return render_page(title=title, run=run, sections=[s for s in sections if s is not None])


def summary_tables(results: Json, config: Path) -> dict[str, str]:
    """Return the tables of figures over seeds as Markdown and LaTeX, by file name."""
    run = SummaryFiles(config, results)
    tables = {
        "arms": content.overview_table(run),
        "comparisons": content.comparisons_table(run, declared=True),
        "by_seed": _by_seed_table(run),
        **{attack: _attack_table(run, attack) for attack in ATTACKS},
        **({"further_attacks": _attack_table(run, *run.further)} if run.further else {}),
    }
    return {
        f"{name}.{ending}": text
        for name, table in tables.items()
        for ending, text in (("md", table.markdown()), ("tex", table.latex()))
    }


def _conclusions(run: SummaryFiles) -> Section:
    text = how_to_read(run)
    if len(run.seeds) == 1:
        text.append("One seed: intervals and tests speak of these models only, not of the recipes that made them.")
    if len(run.seeds) == 2:
        text.append(_FEW_SEEDS)
    title = "What these seeds say" if len(run.seeds) > 1 else "What this seed says"
    return Section("conclusions", title, tables=[content.overview_table(run)], text=text)


def _cost(run: SummaryFiles) -> Section:
    rows = _intervals(run, "perplexity")
    caption = f"Held-out perplexity with its 95 % interval over {run.scope}; hollow: each seed"
    plots = [interval_figure("perplexity", rows, "perplexity", caption)] if rows else []
    written = content.rouge_table(run)
    return Section(
        "cost", "What it costs", figures=plots, tables=[*([written] if written.rows else []), _by_seed_table(run)]
    )


def _attacks(run: SummaryFiles) -> Section:
    plots = []
    for name, attacks in (("each attack", ATTACKS), ("each further attack", run.further)):
        rows: list[Interval] = []
        for pair in (pair for pair in run.attacks_made if pair[0] in attacks):
            found = _intervals(run, "delta_nll", *run.entry_key(*pair))
            rows += [Interval(content.attack_name(*pair)), *found] if found else []
        if rows:
            caption = f"Rise of the loss under {name}, with its 95 % interval over {run.scope}; hollow: each seed"
            plots.append(interval_figure(f"rise under {name}", rows, "Δ, nats per scored token", caption, zero=True))
    tables = [_attack_table(run, attack) for attack in ATTACKS if run.primary_variants(attack)]
    tables += [_attack_table(run, *run.further)] if run.further else []
    text = ["An attack on a document succeeds above τ, which is each seed's own: see the seeds below."]
    text += [FURTHER] if run.further else []
    return Section("attacks", "What attacks do", text=text, figures=plots, tables=tables)


def _comparisons(run: SummaryFiles) -> Section:
    family = [c for c in run.final["comparisons"] if c["family"] == "confirmatory"]
    caption = f"Differences of the declared family, with 95 % intervals over {run.scope}; hollow: each seed"
    plots = [interval_figure("differences", _differences(run, family), "a − b, nats per token", caption, zero=True)]
    tables = [content.comparisons_table(run, declared=True), _differences_by_seed(run, family)]
    exploratory = [c for c in run.final["comparisons"] if c["family"] != "confirmatory"]
    more = [content.comparisons_table(run, declared=False), _differences_by_seed(run, exploratory)]
    return Section("comparisons", "Comparisons", figures=plots if family else [], tables=tables, more=more)


def _certificates(run: SummaryFiles) -> Section:
    rows = []
    for arm in run.arms:
        certificate = run.arm(arm).get("certificate") or {}
        by_seed = certificate.get("by_seed") or {}
        verdicts = (by_seed.get(str(seed)) or "none" for seed in run.seeds)
        rows.append([arm, *verdicts, content.premise_met(certificate)])
    columns = ["Arm", *(f"Seed {seed}" for seed in run.seeds), "Premise met"]
    table = Table("Certificates by seed", columns, rows, frozenset(range(len(columns))))
    return Section("certificates", "Certificates", text=[CLAIM], tables=[table])


def _fairness(run: SummaryFiles) -> Section:
    tables = [content.differences_table(run), _missing_table(run)]
    return Section("fairness", "Differences and gaps", tables=[table for table in tables if table.rows])


def _seeds(run: SummaryFiles) -> Section:
    rows = []
    for seed in map(str, run.seeds):
        margins = run.final["equivalence_margins_by_seed"][seed]
        rows.append([seed, number(run.final["success_thresholds"][seed]), content.plain(_rounded(margins) or None)])
    columns = ["Seed", "τ, nats per scored token", "Margins of equivalence, nats per scored token"]
    table = Table("What each seed's own baseline sets", columns, rows, frozenset({0, 2}))
    links = [(f"../seed-{seed}/report.html", f"Report of seed {seed}") for seed in run.seeds]
    return Section("seeds", "The seeds", links=links, tables=[table])


def _rounded(values: Mapping[str, float]) -> dict[str, str]:
    return {name: number(value) for name, value in values.items()}


def _intervals(run: SummaryFiles, metric: str, attack: str | None = None, variant: str | None = None) -> list[Interval]:
    rows = []
    for index, arm in enumerate(run.arms):
        found = run.measurement(arm, metric, attack, variant)
        if found.get("value") is not None:
            points = tuple(run.by_seed(arm, metric, attack, variant).values())
            rows.append(Interval(arm, index, found["value"], *_ends(found), points))
    return rows


def _differences(run: SummaryFiles, comparisons: Iterable[Json]) -> list[Interval]:
    rows: list[Interval] = []
    for c in comparisons:
        name = content.comparison_name(c)
        if name not in {row.label for row in rows if row.value is None}:
            rows.append(Interval(name))
        points = tuple(of_seed["difference"] for of_seed in c["by_seed"])
        label = f"{c['a']} − {c['b']}"
        rows.append(Interval(label, run.arms.index(c["a"]), c["difference"], *_ends(c), points))
    return rows


def _by_seed_table(run: SummaryFiles) -> Table:
    """One row an arm and headline figure, one column a seed."""
    measures = [("perplexity", None, None, "perplexity", 2)]
    measures += [
        ("delta_nll", *run.entry_key(*pair), f"Δ {content.attack_name(*pair)}", 3)  # type: ignore[misc]
        for pair in run.attacks_made
    ]
    rows = []
    for metric, attack, variant, name, digits in measures:
        for arm in run.arms:
            found = run.by_seed(arm, metric, attack, variant)
            pooled = content.value(run.measurement(arm, metric, attack, variant), digits)
            rows.append([f"{arm}, {name}", pooled, *(number(found.get(seed), digits) for seed in run.seeds)])
    columns = ["Arm, figure", "All seeds [95\u00a0%]", *(f"Seed {seed}" for seed in run.seeds)]
    return Table("Figures by seed", columns, rows)


def _attack_table(run: SummaryFiles, *attacks: str) -> Table:
    """One row an arm and variant: losses and success over all seeds; of one attack, or of all further ones."""
    columns = ["Arm, attack", "Documents", "Clean, nats", "Attacked, nats", "Δ, nats per token [95\u00a0%]"]
    if attacks == ("triggers",):
        columns += ["minus shifted text [95\u00a0%]", "minus random trigger [95\u00a0%]"]
    else:
        columns += ["Success [95\u00a0%]", "Δ through text", "Published success"]
    rows = []
    for attack, variant in ((a, variant) for a in attacks for variant in run.primary_variants(a)):
        for arm in run.arms:
            entry = run.entry(arm, attack, variant)
            rows.append(
                [
                    f"{arm}, {content.attack_name(attack, variant)}",
                    count(entry.get("n")),
                    number(entry.get("clean_nll")),
                    number(entry.get("attacked_nll")),
                    content.value(run.attacked(arm, "delta_nll", attack, variant)),
                    *(_controls(run, arm, variant) if attack == "triggers" else _successes(run, arm, attack, variant)),
                ]
            )
    return Table(f"{content.attacks_name(attacks)}: primary figures over all seeds", columns, rows)


def _controls(run: SummaryFiles, arm: str, variant: str) -> list[str]:
    return [content.value(run.attacked(arm, f"delta_minus_{c}", "triggers", variant)) for c in ("shift", "random")]


def _successes(run: SummaryFiles, arm: str, attack: str, variant: str) -> list[str]:
    entry, success = run.entry(arm, attack, variant), run.attacked(arm, "success_rate", attack, variant)
    shown = content.success_share(success) if success.get("value") is not None else MISSING
    if entry.get("upper_bound"):
        return [shown, content.NO_TEXT, content.NO_TEXT]
    published = share((entry.get("published_accounting") or {}).get("success_rate"))
    through_text = signed(entry.get("text_space_delta_nll"))
    return [shown, through_text, "–" if attack == "ensemble" else published]  # it is the worst by another measure


def _differences_by_seed(run: SummaryFiles, comparisons: Sequence[Json]) -> Table:
    """What each seed's own run says about each comparison; successes by the exact test of McNemar."""
    rows = [
        [
            f"{content.comparison_name(c)}, {c['a']} − {c['b']}",
            str(of_seed["seed"]),
            signed(of_seed["difference"], 4),
            interval(of_seed["ci95"], 4),
            p_value(of_seed["p"]),
            count(of_seed["n"]),
            of_seed["test"],
        ]
        for c in comparisons
        for of_seed in c["by_seed"]
    ]
    columns = ["Comparison", "Seed", "a − b", "95 % interval", "p, not corrected", "n", "Test"]
    kind = "the declared family" if any(c["family"] == "confirmatory" for c in comparisons) else "exploratory"
    return Table(
        f"The same, seed by seed: {kind}; each speaks of its own models only", columns, rows, frozenset({0, 6})
    )


def _missing_table(run: SummaryFiles) -> Table:
    """Documents left out of a primary figure since one seed lacks them, and measures that some seeds lack."""
    rows = []
    for m in run.final["pooled"]:
        if m["num_missing"] and m["protocol"] not in SECONDARY_PROTOCOLS and m["metric"] in ("nll", "delta_nll"):
            name = _figure_name(m)
            rows.append([m["arm"], name, count(m["num_missing"]), "left out in all seeds: missing in one at least"])
    for gap in run.final["not_pooled"]:
        rows.append(
            [gap["arm"], _figure_name(gap), "", f"not pooled: missing in seeds {content.plain(gap['missing_in'])}"]
        )
    return Table("What is missing", ["Arm", "Figure", "Documents", "Why"], rows, frozenset({0, 1, 3}))


def _figure_name(measure: Json) -> str:
    return " ".join(str(measure[key]) for key in ("attack", "variant", "metric") if measure[key])


def _ends(found: Json) -> tuple[float | None, float | None]:
    low, high = found["ci95"] or (None, None)
    return low, high
