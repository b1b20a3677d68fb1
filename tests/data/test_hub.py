"""Hub data sets are pinned to a commit, read in order from anywhere, and explained when they cannot be reached."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from datasets.load import load_dataset as load
from huggingface_hub import constants, errors
from tiny_pairs import pair_tokenizer, random_pairs, write_pairs

from isotone.config import Data
from isotone.data.corpora import first_documents, open_corpus
from isotone.data.packing import prepare_data
from isotone.errors import IsotoneError, UsageError
from isotone.interruption import StopFlag

from .conftest import Pack, random_texts, write_jsonl

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A download of me/corpus as the hub's client leaves it, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    folder = tmp_path / "hub" / "datasets--me--corpus"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    write_jsonl(folder / "snapshots" / COMMIT / "train.jsonl", random_texts(50))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub that has me/corpus; what it was asked is noted."""
    asked: dict[str, Any] = {"commit": COMMIT, "revisions": []}
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)

    def dataset_info(self: Any, name: str, revision: str | None, timeout: float) -> Any:
        asked["revisions"].append(revision)
        if revision and len(revision) == 40:
            return SimpleNamespace(sha=revision)
        return SimpleNamespace(sha=asked["commit"])

    real = datasets.load_dataset
    file = str(write_jsonl(tmp_path / "hub.jsonl", random_texts(240)))

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        asked["loaded"] = options["revision"]
        return real("json", data_files={"train": file}, split=options["split"], streaming=True)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_downloaded_data_set_is_read_without_a_network(cache: Path) -> None:
    corpus = open_corpus(Data(source="me/corpus"))
    assert corpus.revision == corpus.identity["commit"] == COMMIT
    documents = list(corpus.read(0))
    assert [d.text for d in documents] == random_texts(50)
    assert [d.id for d in documents[:2]] == ["train:1", "train:2"]
    assert list(corpus.read(20)) == documents[20:]
    assert list(first_documents(corpus, 22, 20)) == documents[20:22]


def test_a_hub_out_of_reach_is_told_with_what_to_do(cache: Path) -> None:
    with pytest.raises(UsageError) as caught:
        open_corpus(Data(source="you/other", revision="v1"))
    message = str(caught.value)
    assert "\n" not in message
    for part in ("you/other", "HF_HUB_OFFLINE", "hf download you/other --repo-type dataset --revision v1", "HF_HOME"):
        assert part in message


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (errors.RevisionNotFoundError, "data.revision: me/corpus has no revision 'v9'"),
        (errors.GatedRepoError, "hf auth login"),
        (errors.RepositoryNotFoundError, "no public data set of that name"),
        (errors.HfHubHTTPError, "the hub cannot be reached"),
    ],
)
def test_the_hubs_refusals_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Any, said: str
) -> None:
    def dataset_info(*args: Any, **kwargs: Any) -> Any:
        raise raised("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    with pytest.raises(UsageError, match=said):
        open_corpus(Data(source="me/corpus", revision="v9"))


def test_the_commit_is_pinned_at_the_first_start(
    hub: dict[str, Any], pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack("me/corpus")
    assert first["revision"] == hub["loaded"] == COMMIT
    hub["commit"] = "f" * 40
    assert pack("me/corpus") == first
    assert pack("me/corpus", revision=COMMIT)["fingerprint"] == first["fingerprint"]
    assert pack("me/corpus", revision="newer")["revision"] == "f" * 40


def test_the_commit_of_each_of_several_sources_is_pinned(
    hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"train": "me/seen", "test": "me/held-out"}
    files = {
        name: str(write_pairs(tmp_path / f"{use}.jsonl", random_pairs(60, seed=len(use))))
        for use, name in names.items()
    }

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        return load("json", data_files={"train": files[name]}, split=options["split"], streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def prepare(revision: str | None = None) -> dict[str, Any]:
        fields = {"source_field": "source", "target_field": "target", "revision": revision}
        given = [{"source": name, "use": use, **fields} for use, name in names.items()]
        config = Data(sources=given, source_length=16, target_length=8)  # type: ignore[arg-type]
        return prepare_data(config, pair_tokenizer(), tmp_path / "packed", max_context=None, stop=StopFlag())

    first = prepare()
    assert [part["of"]["commit"] for part in first["source"]["sources"]] == [COMMIT, COMMIT]
    hub["commit"] = "f" * 40
    assert prepare() == first
    assert [part["of"]["commit"] for part in prepare("newer")["source"]["sources"]] == ["f" * 40] * 2


def test_a_missing_field_or_split_is_named(hub: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"me/corpus, row 1 of train: there is no field 'body'; fields there: text"):
        next(open_corpus(Data(source="me/corpus", text_field="body")).read(0))
    with pytest.raises(UsageError, match=r"cannot be opened with config_name None and split 'nosuch'"):
        next(open_corpus(Data(source="me/corpus", split="nosuch")).read(0))


def test_a_connection_that_breaks_off_is_a_failure_that_keeps_what_was_read(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rows:
        def skip(self, count: int) -> Any:
            yield {"text": "one"}
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: Rows())
    documents = open_corpus(Data(source="me/corpus")).read(0)
    assert next(documents).text == "one"
    with pytest.raises(IsotoneError, match=r"broke off while it was read .* run again") as caught:
        next(documents)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("source", ["what is this", "a/b/c", "https://example.org/x"])
def test_what_is_no_name_at_all_is_said_so(source: str) -> None:
    with pytest.raises(UsageError, match="neither a file or folder that exists nor a name on the hub"):
        open_corpus(Data(source=source))
