"""Writes the page of a run: one HTML file that needs nothing else, made from the run's records and results alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Constraint
from isotone.report import content, figures
from isotone.report.run_files import ATTACKS, RunFiles
from isotone.report.sections import NUM_TEXTS, SECTIONS, Section
from isotone.report.tables import MISSING, signed
from isotone.report.texts import AttackedDocument, TokenTexts, attacked_documents, visible

QUESTION = "What does a monotone feed-forward network buy, and what does it cost?"

_CONSTRAINT_KEYS = ("recipe", "parametrization", "initialization", "scope", "layers", "activation", "anneal")
_SHOWN_IF_GIVEN = {
    key: Constraint.model_fields[key].default for key in ("step", "calibrate", "calibration_rows", "enforce")
}
"""Keys of a constraint, and their defaults, that are read only where they say something else."""


def write_report(run_directory: Path) -> Path:
    """Write report.html into a run's directory and return its path.

    Raises:
        BlockedError: the run has no final results.
        CorruptError: a result file is not what was written.
    """
    path = run_directory / "report.html"
    records.write_text(path, render_report(RunFiles(run_directory)))
    return path


def write_tables(run_directory: Path) -> list[Path]:
    """Write the tables of figures as Markdown and LaTeX into results/tables and return their paths.

    Raises:
        BlockedError: the run has no final results.
    """
    run, folder = RunFiles(run_directory), run_directory / "results" / "tables"
    written = content.rouge_table(run)
    tables = {
        "arms": content.overview_table(run),
        "comparisons": content.comparisons_table(run, declared=True),
        **{attack: content.attack_table(run, attack) for attack in ATTACKS},
        **({"rouge": written} if written.rows else {}),
        **({"further_attacks": content.attack_table(run, *run.further)} if run.further else {}),
    }
    paths = []
    for name, table in tables.items():
        for path, text in ((folder / f"{name}.md", table.markdown()), (folder / f"{name}.tex", table.latex())):
            records.write_text(path, text)
            paths.append(path)
    return paths


def render_report(run: RunFiles) -> str:
    """Return the page as HTML; all text of models and documents is escaped."""
    return render_page(
        title=f"{run.config['name']} · seed {run.final['seed']}",
        run=run,
        sections=[found for section in SECTIONS if (found := section(run)) is not None],
        documents=_documents(run),
    )


def render_page(
    *, title: str, run: RunFiles, sections: Sequence[Section], documents: Sequence[AttackedDocument] = ()
) -> str:
    """Return a page about one run, or about several that share their arms; all text is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("isotone.report"), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.globals.update(missing=MISSING, signed=signed)
    return environment.get_template("report.html.j2").render(
        title=title,
        description=run.config.get("description") or QUESTION,
        arms=[_arm_key(run, number) for number in range(len(run.arms))],
        sections=sections,
        conclusions=[visible(c["sentence"]) for c in run.final.get("conclusions", ())],
        documents=documents,
    )


def _documents(run: RunFiles) -> list[AttackedDocument]:
    variants = [v for v in ("iterative", "once") if v in run.variants("hotflip")]
    if not variants:
        return []
    rows = {arm: run.rows(arm, "hotflip", variants[0]) for arm in run.arms}
    return attacked_documents(rows, TokenTexts.of_run(run.root), variants[0], NUM_TEXTS)


def _arm_key(run: RunFiles, number: int) -> dict[str, Any]:
    name = run.arms[number]
    arm = (run.config.get("arms") or {}).get(name) or {}
    constraint = arm.get("constraint") or {}
    given = {key: constraint[key] for key in _CONSTRAINT_KEYS if constraint.get(key) is not None}
    given |= {key: constraint[key] for key, usual in _SHOWN_IF_GIVEN.items() if constraint.get(key, usual) != usual}
    words = [content.plain(given)] if given else [content.UNCONSTRAINED]
    words += [f"starts from {arm['start']}"] if arm.get("start", "pretrained") != "pretrained" else []
    words += ["not trained further"] if arm.get("train") is False else []
    return {"name": name, "description": "; ".join(words), **figures.line_style(number)}
