"""One model under attack: every log continues where it ends, and the model is loaded only if one is not complete."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from isotone import records
from isotone.attacks import Vocabulary, Window, evaluate_trigger, replay, run_documents, search_trigger
from isotone.attacks.exchange import exchange_contexts
from isotone.attacks.interface import DocumentAttack
from isotone.attacks.probe import Probe, probe_documents
from isotone.attacks.running import Progress, edits_of
from isotone.constraint import certify
from isotone.data.packing import separator_of
from isotone.errors import UsageError
from isotone.evaluation import evaluate_perplexity, summarize
from isotone.evaluation.pairs import evaluate_pairs
from isotone.evidence import EXCHANGED
from isotone.matching import Temperature, bisect, clean_nll, divide_logits, matched_entry
from isotone.models import load_model
from isotone.pipeline.graph import PROBE, Node, probed_arms
from isotone.pipeline.stages.evaluate import LONGEST_WINDOW
from isotone.pipeline.stages.transfer import from_source, sources
from isotone.pipeline.stages.triggers import trigger_search
from isotone.suite.work import Row, Work

Edits = dict[str, list[list[int]]]


class Arm:
    """One arm, its model loaded when it is first needed; drop the object and the model is gone."""

    def __init__(self, work: Work, name: str):
        self.work, self.name = work, name

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in fp32 and eval mode; of a matched-loss control what it starts from, with its logits divided."""
        matched = self._matched
        source = self.work.experiment.arms[self.name].start if matched else self.name
        model = load_model(self.work.request.model(source))
        nn.Module.float(model)  # transformers' own refuses weights that came from a GGUF file
        nn.Module.to(model, torch.device(self.work.experiment.runtime.device))
        _require_embeddings(model, self.work.tokenizer, source)
        if matched:
            divide_logits(model, records.read_json(self._result("match"))["parameter"])
        return model.eval()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens that attacks may write."""
        return Vocabulary.from_tokenizer(self.work.tokenizer, _num_embeddings(self.model))

    # --- what an arm is asked ---

    def evaluate(self) -> None:
        """Score every token of the attacked documents, whole, and certify what claims to be constrained."""
        work, node = self.work, Node("evaluate", self.name)
        if self._result("evaluate").is_file():
            return
        config, context = work.experiment.evaluation, work.request.context
        log = records.JsonLines(work.folder.work(node) / "last.jsonl")
        with work.show(str(node), 1, "batch") as bar:
            shared: dict[str, Any] = {"work": log, "identity": {"arm": self.name}, "stop": work.stop, "report": bar.set}
            if work.pairs is not None:
                rows = evaluate_pairs(
                    self.model, work.documents.test, work.pairs, batch_size=config.batch_size, **shared
                )
            else:
                rows = evaluate_perplexity(
                    self.model,
                    work.documents.test,
                    context=min(config.context or LONGEST_WINDOW, context or LONGEST_WINDOW),
                    stride=config.stride,
                    batch_size=config.batch_size,
                    leading_token=separator_of(work.tokenizer),
                    **shared,
                )
        claims = getattr(self.model.config, "isotone", None) and not self._matched
        certificate = certify(self.model).to_dict() if claims else None
        records.write_bytes(work.folder.documents(node), records.dump_json_lines(rows))
        entry = {"checkpoint": "start", "certificate": certificate, **summarize(rows)}
        self._write("evaluate", {"primary_checkpoint": "last", "checkpoints": {"last": entry}, **entry})

    def attack(self) -> None:
        """Run every attack on the documents that is asked for."""
        work = self.work
        for node, variant, split, attack in work.attacks(self.name, self._num_embeddings()):
            windows = work.windows(split)
            self._log(
                node,
                variant,
                windows,
                partial(self._run, attack, windows),
            )
        windows = work.windows("attack_test")
        self._log(Node("hotflip", self.name), EXCHANGED, windows, partial(self._exchange, windows), quiet=True)

    def probe(self) -> None:
        """Ask how much gradients tell, where ``attacks.probe`` is there: what two signs of masking are measured on."""
        work, config = self.work, self.work.experiment.attacks.probe
        if config is None or self.name not in probed_arms(work.experiment):
            return
        windows = work.windows("attack_test")[: config.num_documents]
        asked = Probe(config.edits, config.candidates, config.oracle_tokens, seed=work.seed)
        self._log(
            Node(PROBE, self.name),
            None,
            windows,
            lambda log, done: probe_documents(
                asked, self.model, self.vocabulary, windows, work.protocol, log=log, stop=work.stop, progress=done
            ),
        )

    def trigger(self) -> None:
        """Search a trigger on the search documents and put it before the others."""
        work, node = self.work, Node("triggers", self.name)
        search = trigger_search(work.experiment.attacks.triggers, work.seed)
        if not self._result("triggers").is_file():
            with work.show(f"{node} (search)", 1, "step") as bar:
                found = search_trigger(
                    search,
                    self.model,
                    self.vocabulary,
                    work.windows("attack_search", first=False),
                    work.protocol,
                    state_path=work.folder.work(node) / "search.json",
                    stop=work.stop,
                    progress=bar.set,
                )
            self._write("triggers", {"search": found})
        self._put_trigger(node, None, records.read_json(self._result("triggers"))["search"], controls=True)

    def replay_all(self) -> list[Row]:
        """Return what edits and triggers of all other arms do to this one: a row for each document and attack."""
        others = [name for name in self.work.experiment.arms if name != self.name]
        with self.work.show(f"transfer.{self.name}", len(others), "arm") as bar:
            rows = []
            for done, source in enumerate(others):
                bar.update(done, source)
                rows += self._replayed(source)
            bar.update(len(others))
        return rows

    def _replayed(self, source: str) -> list[Row]:
        work, rows = self.work, list[Row]()
        for node, variant in sources(work.experiment, source):
            if node.kind == "hotflip" and "hotflip" not in work.request.attacks:
                continue
            found, windows = work.rows(node, variant), work.windows("attack_test")
            name = f"{node}.{variant}" if variant else str(node)
            self._log(
                Node("transfer", self.name), name, windows, partial(self._replay, edits_of(found), windows), quiet=True
            )
            rows += from_source(work.rows(Node("transfer", self.name), name), found, source)
        if "triggers" in work.request.attacks:
            node = Node("triggers", source)
            search = records.read_json(work.folder.node_result(node))["search"]
            self._put_trigger(Node("transfer", self.name), str(node), search, controls=False)
            rows += [{**row, "source": source} for row in work.rows(Node("transfer", self.name), str(node))]
        return rows

    # --- clean loss ---

    def measure_clean(self) -> float | None:
        """Return the clean loss of what is attacked, nats per scored token; None where it is not finite."""
        path = self._result("clean")
        if not path.is_file():
            nll = self._clean_nll()
            self._write("clean", {"nll": nll if np.isfinite(nll) else None})
        return records.read_json(path)["nll"]

    def match(self) -> None:
        """Bring the model that this control is made from to the clean loss of the one that it is matched to."""
        work, node = self.work, Node("match", self.name)
        matched, path = self._matched, self._result("match")
        assert matched is not None
        if path.is_file():
            return
        target = Arm(work, matched.to).measure_clean()
        aim = float("nan") if target is None else target
        start = Arm(work, work.experiment.arms[self.name].start)
        with work.show(str(node), 1, "evaluation") as bar:
            found = bisect(
                Temperature(start.model),
                start._clean_nll,
                aim,
                records.JsonLines(work.folder.work(node) / "evaluations.jsonl"),
                before=lambda known: work.stop.check(f"{node} after {known} evaluations"),
                after=lambda known, nll: bar.set(known, known + 1, f"loss {nll:.4f} of {aim:.4f}"),
            )
            bar.set(found.evaluations, found.evaluations)
        windows, protocol = work.windows("attack_test"), work.protocol
        num_tokens = sum(protocol.num_scored(window.tokens.tolist()) for window in windows)
        counts = {"num_documents": len(windows), "num_tokens": num_tokens}
        made = {"start": start.name, **matched.model_dump(mode="json")}
        self._write("match", {**made, **matched_entry(found, aim), **counts})

    def _clean_nll(self) -> float:
        work, protocol = self.work, self.work.protocol
        ids_BL = torch.from_numpy(np.stack([window.tokens for window in work.windows("attack_test")]))
        return clean_nll(self.model, ids_BL, protocol.scored, work.experiment.attacks.batch_documents, protocol.pairs)

    # --- logs and results ---

    @property
    def _matched(self) -> Any:
        return self.work.experiment.arms[self.name].matched_loss

    def _num_embeddings(self) -> int:
        """Return what counting frequencies needs; without such an attack the model stays where it is."""
        return _num_embeddings(self.model) if "frequency" in self.work.request.attacks else 0

    def _put_trigger(self, node: Node, variant: str | None, search: Row, controls: bool) -> None:
        work, windows = self.work, self.work.windows("attack_test", first=False)
        self._log(
            node,
            variant,
            windows,
            lambda log, done: evaluate_trigger(
                trigger_search(work.experiment.attacks.triggers, work.seed),
                search,
                self.model,
                self.vocabulary,
                windows,
                work.protocol,
                controls=controls,
                log=log,
                stop=work.stop,
                batch_documents=work.experiment.attacks.batch_documents,
                progress=done,
            ),
            quiet=not controls,
        )

    def _run(self, attack: DocumentAttack, windows: list[Window], log: records.JsonLines, done: Progress) -> None:
        run_documents(
            attack,
            self.model,
            self.vocabulary,
            windows,
            self.work.protocol,
            log=log,
            stop=self.work.stop,
            batch_documents=self.work.experiment.attacks.batch_documents,
            progress=done,
        )

    def _exchange(self, windows: list[Window], log: records.JsonLines, done: Progress) -> None:
        exchange_contexts(
            self.model,
            self.vocabulary,
            windows,
            self.work.protocol,
            log=log,
            stop=self.work.stop,
            batch_documents=self.work.experiment.attacks.batch_documents,
        )

    def _replay(self, edits: Edits, windows: list[Window], log: records.JsonLines, done: Progress) -> None:
        replay(
            self.model,
            self.vocabulary,
            windows,
            edits,
            self.work.protocol,
            log=log,
            stop=self.work.stop,
            batch_documents=self.work.experiment.attacks.batch_documents,
        )

    def _log(
        self,
        node: Node,
        variant: str | None,
        windows: Sequence[Window],
        make: Callable[[records.JsonLines, Progress], object],
        quiet: bool = False,
    ) -> None:
        """Complete a log, if it is not complete; ``quiet`` within work that shows itself how far it is."""
        log = records.JsonLines(self.work.folder.documents(node, variant))
        if len(log.read()) == len(windows):
            return
        if quiet:
            make(log, lambda done, total: None)
            return
        with self.work.show(f"{node} {variant}" if variant else str(node), len(windows), "document") as bar:
            make(log, bar.set)

    def _result(self, kind: str) -> Path:
        return self.work.folder.node_result(Node(kind, self.name))

    def _write(self, kind: str, found: Row) -> None:
        records.write_json(self._result(kind), {"schema": 1, "arm": self.name, **found})


def _num_embeddings(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.size(0))  # type: ignore[operator, union-attr]


def _require_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arm: str) -> None:
    """Check that every token of a text has an embedding: arms must be able to read each other's edits."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    largest = max(i for i in tokenizer.get_vocab().values() if i not in special)
    if largest >= _num_embeddings(model):
        raise UsageError(
            f"{arm}: its tokenizer has token {largest}, but the model {_num_embeddings(model)} embeddings; it is not "
            "the tokenizer that belongs to it"
        )
