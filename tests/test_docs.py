"""What README and docs show exists: links, files, commands with their options, and Python that runs."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from isotone.arguments import spread_lists
from isotone.cluster import Cluster
from isotone.config_io import list_presets, load_experiment
from isotone.slurm.site import load_cluster

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _id(page: Path) -> str:
    return page.name


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def _commands(page: Path) -> list[list[str]]:
    """Return every ``isotone …`` line of a page's shell blocks as words, comments left out."""
    lines = [line for block in _blocks(page, "bash") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    found = [w[w.index("isotone") + 1 :] for w in words if "isotone" in w]
    return [spread_lists(w[: w.index(">")] if ">" in w else w) for w in found]


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert not [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_files_that_are_named_with_a_command_exist(page: Path) -> None:
    named = re.findall(r"(?:bash|python) ((?:[\w.]+/)*[\w.]+\.(?:sh|py)|\.ci/run)", page.read_text())
    assert not [name for name in named if not (ROOT / name).is_file()]


@pytest.mark.parametrize("page", [p for p in PAGES if _commands(p)], ids=_id)
def test_commands_are_understood(page: Path) -> None:
    from isotone.cli import app

    group = typer.main.get_command(app)
    for words in _commands(page):
        command, context, left = group, None, [w for w in words if w != "--debug"]
        while hasattr(command, "commands"):
            context = command.make_context(words[0], [left[0]], parent=context, resilient_parsing=True)
            assert left[0] in command.commands, f"isotone {' '.join(words)}"
            command, left = command.commands[left[0]], left[1:]
        command.make_context(words[0], left, parent=context)  # raises where an option or argument is not understood


@pytest.mark.parametrize("page", [p for p in PAGES if _blocks(p, "python")], ids=_id)
def test_python_runs(page: Path) -> None:
    for block in _blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("page", [p for p in PAGES if _blocks(p, "yaml")], ids=_id)
def test_experiments_are_valid(page: Path, tmp_path: Path) -> None:
    for block in _blocks(page, "yaml"):
        path = tmp_path / "mine.yaml"
        path.write_text(block)
        assert load_experiment(path).arms


def test_presets_that_are_named_exist() -> None:
    names = {preset.name for preset in list_presets()}
    shown = {words[1] for page in PAGES for words in _commands(page) if words[:1] == ["run"]}
    assert {name for name in shown if not name.endswith(".yaml")} - {"EXPERIMENT"} <= names


def test_no_page_names_a_machine() -> None:
    for page in PAGES:
        assert not re.search(r"/work/|/root/|/home/\w", page.read_text()), page


def test_the_site_profile_that_the_cluster_guide_shows_is_valid(tmp_path: Path) -> None:
    profile = tmp_path / "cluster.yaml"
    (block,) = _blocks(ROOT / "docs/cluster.md", "yaml cluster.yaml")
    profile.write_text(block)
    cluster = load_cluster(str(profile), Cluster())
    assert cluster.resources("setup").partition == "cpu"
