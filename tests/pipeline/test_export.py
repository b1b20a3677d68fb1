"""What is done without a pipeline refuses what it cannot measure."""

from pathlib import Path

import pytest

from isotone.errors import UsageError
from isotone.interruption import StopFlag
from isotone.pipeline.export import evaluate_documents


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_documents_without_text_are_refused_and_not_measured(text: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(text)
    with pytest.raises(UsageError, match=r"--documents: .*empty\.txt holds no text"):
        evaluate_documents("pocket", tmp_path / "empty.txt", "text", None, StopFlag())
