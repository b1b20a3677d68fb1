"""Packs a corpus once: split by document, near-duplicates removed, tokenized, cut into rows, and given a fingerprint.

Reading fills shards (``shards.py``) beside the folder to be; when all is read they are assembled (``assembly.py``) and
published in one step, so the folder is complete or absent, and the same whether or not the packing was killed.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isotone import records
from isotone.config import Data
from isotone.data.assembly import Assembly
from isotone.data.corpora import Asked, Corpus, open_corpus
from isotone.data.packed import DATASET
from isotone.data.shards import PairRecipe, Recipe, Shard, read_into_shards
from isotone.errors import UsageError
from isotone.interruption import StopFlag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Number of the packed format; part of the fingerprint."""

_PLAN = "plan.json"


def prepare_data(
    config: Data,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    *,
    max_context: int | None,
    stop: StopFlag,
    progress: Callable[[int, str], None] | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Pack a corpus into a folder that ``open_packed`` opens; continue, or find it done, where an earlier call ended.

    A row's tokens are those of the split's documents in the order of the corpus, each after a separator (BOS, or else
    EOS, where the tokenizer has one), cut every ``sequence_length`` tokens; the last, incomplete row is dropped. Of
    pairs each is a row by itself (``isotone.pairs``), cut to fit where it is too long.

    Args:
        config: corpus, splits and packing.
        tokenizer: the model's tokenizer.
        folder: what is there of another corpus or another packing is replaced.
        max_context: the model's context, in tokens; None: unlimited.
        stop: read between batches of text.
        progress: told the documents read so far and, as text, the megabytes of them.
        vocab_size: rows of the model's embedding; the tokenizer's length unless given.

    Returns:
        What ``dataset.json`` holds: ``fingerprint``, ``source`` (with the exact commit of a hub data set),
        ``settings``, ``sequence_length``, ``separator``, ``splits`` (counts), ``near_duplicates``, ``too_short``, …; of
        pairs also ``pairs``: ``source`` and ``target`` (columns of a row), ``pad`` and ``eos``.

    Raises:
        UsageError: corpus, configuration, tokenizer and model do not fit together.
        Stopped: a stop was requested; what was read is kept.
    """
    folder = Path(folder)
    recipe = _recipe(config, tokenizer, max_context, vocab_size)
    work = folder.with_name(f"{folder.name}.unfinished")
    done, begun = (_read_if_there(path) for path in (folder / DATASET, work / _PLAN))
    corpus = open_corpus(config, _pinned(begun) | _pinned(done))
    plan = {"source": corpus.identity, "asked_revision": config.revision, "settings": _settings(config, recipe)}
    if done and _same(done, plan) and _intact(folder):
        shutil.rmtree(work, ignore_errors=True)
        return done
    if not (begun and _same(begun, plan)):
        shutil.rmtree(work, ignore_errors=True)
        records.write_json(work / _PLAN, plan)
    shards = read_into_shards(corpus, config.num_documents, recipe, work, stop, progress)
    _publish(folder, plan, config, corpus, recipe, shards, stop)
    shutil.rmtree(work)
    return records.read_json(folder / DATASET)


def hash_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a hash of all that decides which tokens a text gets, wherever the tokenizer was loaded from."""
    parts: dict[str, Any] = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    if tokenizer.is_fast:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        parts["pipeline"] = {k: v for k, v in whole.items() if k not in ("truncation", "padding")}  # set by each call
    return records.hash_json(parts)


def separator_of(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the token that stands before a document: BOS, or else EOS, or None where the tokenizer has neither."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _recipe(
    config: Data, tokenizer: "PreTrainedTokenizerBase", max_context: int | None, vocab_size: int | None
) -> Recipe:
    if max_context is not None and not config.pairs and config.sequence_length > max_context:
        raise UsageError(
            f"data.sequence_length: rows of {config.sequence_length} tokens are longer than the model's context of "
            f"{max_context}; set it to {max_context} or less"
        )
    num_vocab = len(tokenizer) if vocab_size is None else vocab_size
    largest = max(tokenizer.vocab_size - 1, separator_of(tokenizer) or 0)
    if largest >= num_vocab:
        raise UsageError(
            f"model.source: the tokenizer knows token {largest}, but the model's vocabulary has {num_vocab} entries; "
            "use the tokenizer that belongs to the model"
        )
    pairs = pair_recipe(config, tokenizer) if config.pairs else None
    return Recipe(tokenizer, config.fractions, config.min_chars, num_vocab, pairs)


def pair_recipe(config: Data, tokenizer: "PreTrainedTokenizerBase") -> PairRecipe:
    """Return how pairs become rows.

    Raises:
        UsageError: the tokenizer has no EOS, or no padding that is another token.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or eos is None or pad == eos:
        raise UsageError(
            "model.source: rows of pairs need a tokenizer with a padding token and another EOS token, as T5's has; "
            f"this one has pad_token_id {pad} and eos_token_id {eos}"
        )
    return PairRecipe((config.source_length, config.target_length), pad, eos, config.source_prefix)


def _settings(config: Data, recipe: Recipe) -> dict[str, Any]:
    """Return what, beside the source, decides the packed bytes."""
    of_pairs = {"source_field", "target_field", "source_prefix", "source_length", "target_length"}
    if config.sources:
        of_pairs.add("sources")
    shape = of_pairs if config.pairs else {"text_field", "sequence_length"}
    return {
        "format": FORMAT,
        **config.model_dump(include={"num_documents", "min_chars", "fractions", *shape}),
        "tokenizer": hash_tokenizer(recipe.tokenizer),
        "separator": _separator(recipe),
        "dtype": recipe.dtype,
    }


def _separator(recipe: Recipe) -> int | None:
    return None if recipe.pairs else separator_of(recipe.tokenizer)


def _read_if_there(path: Path) -> dict[str, Any] | None:
    try:
        return records.read_json(path)
    except (FileNotFoundError, records.CorruptError):
        return None


def _pinned(plan: dict[str, Any] | None) -> dict[Asked, str]:
    """Return the commits that an earlier call took, by what was asked for."""
    if plan is None:
        return {}
    if plan["source"]["kind"] == "several":
        given = zip(plan["source"]["sources"], plan["settings"]["sources"], strict=True)
        found = [(part["of"], asked["revision"]) for part, asked in given]
    else:
        found = [(plan["source"], plan["asked_revision"])]
    return {
        (of["name"], of["config_name"], of["split"], revision): of["commit"]
        for of, revision in found
        if of["kind"] == "hub"
    }


def _same(plan: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(plan[key] == other[key] for key in ("source", "settings"))


def _intact(folder: Path) -> bool:
    try:
        records.verify_directory(folder)
    except records.CorruptError:
        return False
    return True


def _publish(
    folder: Path,
    plan: dict[str, Any],
    config: Data,
    corpus: Corpus,
    recipe: Recipe,
    shards: list[Shard],
    stop: StopFlag,
) -> None:
    separator, pairs = _separator(recipe), recipe.pairs
    if not any(len(shard.array("levels")) for shard in shards):
        raise UsageError(f"data.source: {config.source} holds no text of {config.min_chars} characters or more")
    assembly = Assembly(
        shards, config.row_length, separator, recipe.dtype, lambda: stop.check("packing the data"), pairs is not None
    )
    splits = assembly.counts()
    _check_counts(splits, config)
    counts = [shard.counts() for shard in shards]
    summary = {
        **plan,
        "revision": corpus.revision,
        "sequence_length": config.row_length,
        "separator": separator,
        "splits": splits,
        "near_duplicates": assembly.near_duplicates(),
        "documents_read": counts[-1]["documents_read"],
        "too_short": sum(c["too_short"] for c in counts),
    }
    if pairs:
        summary["pairs"] = {"source": pairs.lengths[0], "target": pairs.lengths[1], "pad": pairs.pad, "eos": pairs.eos}

    def description() -> Iterator[bytes]:  # produced last, when every hash is known
        content = {"source": plan["source"], "settings": plan["settings"], "files": assembly.hashes}
        yield records.dump_json({"fingerprint": records.hash_json(content), **summary})

    if folder.exists():
        records.remove_directory(folder)
    records.require_free_space(folder.parent, assembly.total_bytes())
    records.publish_directory(folder, {**assembly.files(), DATASET: description()})


def _check_counts(splits: dict[str, dict[str, int]], config: Data) -> None:
    for split, counts in splits.items():
        if split == "train" and not counts["rows"]:
            raise UsageError(
                f"data.source: the train split of {config.source} has {counts['tokens']} tokens, less than one row of "
                f"{config.row_length}; give more text{'' if config.pairs else ' or lower data.sequence_length'}"
            )
        if config.fractions[split] and (not counts["documents"] or not counts.get("rows", 1)):
            raise UsageError(
                f"data.fractions.{split}: {config.source} gives this split {counts['documents']} documents of "
                f"{counts['tokens']} tokens in all, too little; give more documents or a larger share (0 leaves it out)"
            )
