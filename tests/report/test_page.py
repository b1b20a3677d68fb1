"""The page shows what the results hold, calls missing what they do not, and lets no text of a document act."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from synthetic_run import ARMS, NOT_FINITE, write_run

from isotone import records
from isotone.errors import BlockedError
from isotone.report import content, write_report, write_tables
from isotone.report.sections import MAX_POINTS

_VOID = {"meta", "link", "br", "hr", "img", "input"}


class _Page(HTMLParser):
    """Collects tags, attributes and cells, and checks that tags nest."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[list[str]] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data

    def rows(self, name: str) -> list[list[str]]:
        return [row for row in self.cells if row[0] == name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("run"))
    write_report(run)
    return run


def test_page_shows_every_arm_figure_and_conclusion(run: Path) -> None:
    page, text = _Page(run / "report.html"), (run / "report.html").read_text()
    final = records.read_json(run / "results" / "final_results.json")
    perplexity = next(m for m in final["measurements"] if m["arm"] == "monotonic" and m["metric"] == "perplexity")
    overview = page.rows("monotonic")[0]
    low, high = perplexity["ci95"]
    assert overview[1] == f"{perplexity['value']:.2f} [{low:.2f}, {high:.2f}]"
    assert overview[-1] == "vacuous"
    assert len(final["conclusions"]) >= 4
    for conclusion in final["conclusions"]:
        assert conclusion["sentence"] in html.unescape(text)
    # perplexity, validation and training loss; all attacks, success of four, course of two
    assert text.count("<figure") == 3 + 1 + 4 + 2


def test_page_says_of_a_constraint_what_is_unusual(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    config = (run / "config.yaml").read_text()
    usual = {"step": "raw", "calibrate": False, "calibration_rows": 64, "enforce": True}
    unusual = {"step": "matched", "calibrate": True, "calibration_rows": 8, "enforce": False}
    pages = []
    for more in ({}, usual, unusual):
        tree = yaml.safe_load(config)
        tree["arms"]["monotonic"]["constraint"] |= more
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
        pages.append(html.unescape(write_report(run).read_text()))
    assert pages[0] == pages[1]
    assert "step matched, calibrate yes, calibration rows 8, enforce no" in pages[2]


def test_page_shows_further_attacks_and_who_is_harmed_by_whose_edits(tmp_path: Path) -> None:
    run = write_run(tmp_path, further=True)
    page, text = _Page(write_report(run)), html.unescape((run / "report.html").read_text())
    final = records.read_json(run / "results" / "final_results.json")
    for words in ("baseline, GCG", "baseline, PGD (upper bound)", "baseline, Worst case"):
        assert f'<th scope="row">{words}</th>' in text
    assert page.rows("monotonic, PGD (upper bound)")[0][7] == "no text"
    assert "Rise of the loss under each further attack" in text
    cell = next(
        c for c in final["transfer"] if (c["source"], c["target"], c["attack"]) == ("baseline", "monotonic", "gcg")
    )
    low, high = cell["ci95"]
    shown = f"{cell['value']:.3f} [{low:.3f},\u00a0{high:.3f}]".replace("-", "−")
    assert sum(shown in row for row in page.rows("baseline")) == 2  # of GCG, and of HotFlip with the same made-up rows
    assert text.count('class="heat"') == 3
    assert text.count(' own"') == 3 * len(ARMS)
    assert {"further_attacks.md", "further_attacks.tex"} <= {path.name for path in write_tables(run)}


@pytest.mark.parametrize(
    ("attack", "variant", "name"),
    [
        ("hotflip", "iterative", "HotFlip iterative"),
        ("hotflip", "random", "Random edits"),  # as a variant of HotFlip's stage, and as rows name them
        ("random_edits", "uniform", "Random edits"),
        ("random_edits", "frequency", "Random edits by frequency"),
        ("coordinate", "random", "Coordinate search"),
        ("ensemble", "worst_case", "Worst case"),
    ],
)
def test_an_attack_has_one_name_on_the_page(attack: str, variant: str, name: str) -> None:
    assert content.attack_name(attack, variant) == name


def test_page_without_further_attacks_has_no_part_for_them(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert 'id="transfer"' not in text
    assert "further attack" not in text
    assert not [path for path in write_tables(run) if path.stem == "further_attacks"]


def test_page_needs_nothing_else_and_runs_nothing(run: Path) -> None:
    page, text = _Page(run / "report.html"), (run / "report.html").read_text()
    assert not {"script", "link", "iframe", "object", "embed", "form", "img", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "src", "xlink:href"))
    assert set(re.findall(r"https?://[^\s\"<]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'" in text


def test_page_can_be_read_without_seeing_it(run: Path) -> None:
    page = _Page(run / "report.html")
    assert page.tags.count("figure") == page.attributes.count(("role", "img")) == page.tags.count("figcaption")
    assert all(value for name, value in page.attributes if name == "aria-label")
    assert page.tags.count("caption") == page.tags.count("table")
    assert ("lang", "en") in page.attributes
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in page.attributes if name == "xlink:href"} <= set(ids)


def test_equal_runs_give_equal_pages_without_time_or_host(run: Path, tmp_path: Path) -> None:
    again = write_run(tmp_path)
    for record in (again / "records").glob("*.json"):
        content = records.read_json(record)
        content["provenance"] |= {"host": "another", "started": 1.0, "seconds": 99.0}
        records.write_json(record, content)
    records.write_json(again / "records" / "aggregate.json", {"status": "complete"})  # comes after the page
    write_report(again)
    assert (again / "report.html").read_bytes() == (run / "report.html").read_bytes()
    assert "secret-host" not in (run / "report.html").read_text()
    assert "torch" in (run / "report.html").read_text()


def test_attacked_texts_are_those_of_the_attacked_documents_and_not_of_search_documents(tmp_path: Path) -> None:
    """The baseline's log of search documents has the same attack, variant and indices."""
    run = write_run(tmp_path)
    before = write_report(run).read_bytes()
    log = run / "results" / "documents" / "hotflip.baseline.iterative.jsonl"
    other = [{**row, "id": f"search/{row['index']}"} for row in records.JsonLines(log).read()]
    records.JsonLines(log.with_name("hotflip.baseline.iterative_search.jsonl")).append(*other)
    assert write_report(run).read_bytes() == before


def test_hostile_text_of_documents_and_models_cannot_act(tmp_path: Path) -> None:
    evil = [
        "<script>alert(1)</script>",
        "</p><img/src=x/onerror=alert(1)>",
        '"onmouseover="x',
        "\u202ereversed",
        "\ud800",
        "&lt;",
    ]
    run = write_run(tmp_path, text=[*evil, "plain", "words"] * 6)
    final = records.read_json(run / "results" / "final_results.json")
    final["arms"]["baseline"]["triggers"]["trigger_text"] = "<script>trigger</script>"
    final["arms"]["monotonic"]["hotflip"]["variants"]["once"]["missing"] = {"<b>why</b>": 3}
    records.write_json(run / "results" / "final_results.json", final)
    page, text = _Page(write_report(run)), (run / "report.html").read_text()
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;script&gt;trigger&lt;/script&gt;" in text
    assert "&lt;b&gt;why&lt;/b&gt;" in text
    assert "\u202e" not in text
    assert r"\u202ereversed" in text
    assert r"\ud800" in text
    assert "&amp;lt;" in text


def test_arm_without_figures_is_missing_and_never_zero(tmp_path: Path) -> None:
    page = _Page(write_report(write_run(tmp_path, attacked=["baseline", "monotonic"])))
    overview, *others = page.rows("shifted_twin")
    assert overview[1:] == ["missing"] * (len(overview) - 1)
    assert {(row[1], row[3]) for row in others if len(row) == 4} >= {
        ("perplexity", "not measured"),
        ("HotFlip", "not attacked"),
        ("Triggers", "not attacked"),
    }
    for name in ("HotFlip once", "HotFlip iterative", "Triggers"):
        (row,) = page.rows(f"shifted_twin, {name}")[:1]
        assert set(row[1:]) == {"missing"}


def test_documents_without_figures_are_listed_with_their_reason(run: Path) -> None:
    page = _Page(run / "report.html")
    assert ["monotonic", "HotFlip iterative", "1", NOT_FINITE] in page.cells


def test_only_hotflip_or_no_attack_at_all_still_gives_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    final = records.read_json(run / "results" / "final_results.json")
    for arm in final["arms"].values():
        arm |= {"hotflip": None, "triggers": None, "certificate": None}
    final |= {"comparisons": [], "conclusions": [], "measurements": []}
    records.write_json(run / "results" / "final_results.json", final)
    page = _Page(write_report(run))
    assert page.rows("baseline")[0][1:] == ["missing", "missing", "unconstrained"]
    assert page.rows("monotonic")[0][1:] == ["missing"] * 3


def test_long_training_is_drawn_from_few_points_that_keep_its_course(tmp_path: Path) -> None:
    run = write_run(tmp_path, attacked=["baseline"])
    lines = [{"step": step, "loss": 5 - step / 10_000} for step in range(1, 10_001)]
    records.JsonLines(run / "metrics" / "train.baseline.jsonl").append(*lines)
    page = write_report(run)
    longest = max(re.findall(r' d="([^"]*)"', page.read_text()), key=len)
    assert 300 < longest.count("L") <= MAX_POINTS
    assert page.stat().st_size < 500_000


def test_a_distilled_arms_curve_is_of_its_loss_on_text(tmp_path: Path) -> None:
    """What it is trained on mixes in a divergence, and would look like a far better model."""
    plain, distilled = (write_run(tmp_path / name) for name in ("plain", "distilled"))
    path = distilled / "metrics" / "train.monotonic.jsonl"
    lines = records.JsonLines(path).read()
    path.unlink()
    mixed = [line | {"loss": 0.1, "nll": line["loss"], "logits": 0.05} if "loss" in line else line for line in lines]
    records.JsonLines(path).append(*mixed)
    assert write_report(distilled).read_bytes() == write_report(plain).read_bytes()


def test_unfinished_run_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: pocket\n")
    with pytest.raises(BlockedError, match=r"final_results\.json is not there; finish the run first"):
        write_report(tmp_path)


def test_tables_hold_the_same_cells_in_markdown_and_latex(run: Path) -> None:
    paths = write_tables(run)
    assert {path.name for path in paths} == {
        f"{name}.{ending}" for name in ("arms", "comparisons", "hotflip", "triggers") for ending in ("md", "tex")
    }
    folder = run / "results" / "tables"
    shown = _Page(run / "report.html").rows("shifted_twin")[0]
    assert "| " + " | ".join(shown) + " |" in (folder / "arms.md").read_text()
    latex = (folder / "arms.tex").read_text()
    assert r"shifted\_twin & " in latex
    assert latex.count(r"\\") == 1 + len(ARMS)
