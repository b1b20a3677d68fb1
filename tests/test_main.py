"""The entry point works wherever it is started: no locale ends a command that has done its work."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_locale_that_lacks_a_character_ends_no_command(tmp_path: Path) -> None:
    experiment = tmp_path / "größe.yaml"
    experiment.write_text("name: x\nmodel: {source: pocket}\ndescription: süß\n", encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    for command in (["config", "check", experiment], ["config", "show", experiment]):
        done = subprocess.run(
            [sys.executable, "-m", "isotone", *map(str, command)],
            env={**os.environ, **ascii_only},
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert b"\\" in done.stdout
