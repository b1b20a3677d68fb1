"""Every value of a configuration is read by the program: a setting that nothing reads is a promise nothing keeps."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isotone.config import ArmTraining, Training

SOURCE = Path(__file__).parents[1] / "src"
CONFIG = SOURCE / "isotone" / "config.py"


def _fields() -> dict[str, list[ast.AnnAssign]]:
    tree = ast.parse(CONFIG.read_text())
    classes = [c for c in tree.body if isinstance(c, ast.ClassDef) and any(ast.unparse(b) == "Part" for b in c.bases)]
    return {c.name: [s for s in c.body if isinstance(s, ast.AnnAssign)] for c in classes}


def _deprecated(source: str) -> str:
    """Return config.py with every field turned into a deprecated property, so that a type checker reports each read."""
    lines = source.splitlines()
    for fields in _fields().values():
        for field in fields:
            name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
            for number in range(field.lineno - 1, field.end_lineno or field.lineno):
                lines[number] = ""
            lines[field.lineno - 1] = f"    @property\n    @deprecated('read')\n    def {name}(self) -> {kind}: ..."
    head = "from typing_extensions import deprecated"
    return "\n".join(lines).replace("from typing import", f"{head}\nfrom typing import", 1)


def _reads(shadow: Path, source: Path) -> set[str]:
    """Return ``Class.field`` of every read in a package that mypy can see; validators do not count."""
    shadow.write_text(_deprecated(CONFIG.read_text()))
    command = [sys.executable, "-m", "mypy", str(source), "--shadow-file", str(CONFIG), str(shadow)]
    options = ["--no-site-packages", "--ignore-missing-imports", "--enable-error-code=deprecated", "--config-file="]
    options += [
        "--follow-imports=silent",
        "--check-untyped-defs",
        f"--cache-dir={shadow.parent / 'cache'}",
        "--no-error-summary",
    ]
    shown = subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=SOURCE)
    assert shown.returncode in (0, 1), shown.stderr
    found = re.findall(r"^(\S+?):(\d+):.*isotone\.config\.(\w+\.\w+) is deprecated", shown.stdout, re.MULTILINE)
    public = _lines_of_public_functions(shadow.read_text())
    return {field for file, line, field in found if Path(file).name != CONFIG.name or int(line) in public}


def _lines_of_public_functions(source: str) -> set[int]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    ranges = [range(f.lineno, (f.end_lineno or f.lineno) + 1) for f in functions if not f.name.startswith("_")]
    return {line for lines in ranges for line in lines}


@pytest.mark.integration
def test_every_field_is_read_somewhere(tmp_path: Path) -> None:
    reads = _reads(tmp_path / "config.py", SOURCE / "isotone")
    unread = [
        f"{part}.{ast.unparse(field.target)}"
        for part, fields in _fields().items()
        if part != "ArmTraining"  # read as a whole by Experiment.training_of; its fields are Training's, see below
        for field in fields
        if f"{part}.{ast.unparse(field.target)}" not in reads
    ]
    assert not unread


@pytest.mark.integration
def test_a_field_that_nothing_reads_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "reader.py").write_text(
        "from isotone.config import Training\n\n\ndef rate(recipe: Training) -> float:\n    return recipe.lr\n"
    )
    reads = _reads(tmp_path / "config.py", tmp_path / "package")
    assert "Training.lr" in reads
    assert "Training.accumulation" not in reads


def test_an_arm_overrides_only_what_training_has() -> None:
    assert set(ArmTraining.model_fields) <= set(Training.model_fields)
