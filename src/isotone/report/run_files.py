"""Reads the files of a run that a report is made from: configuration, results, metrics and records."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from isotone import records
from isotone.errors import BlockedError

ATTACKS = ("hotflip", "triggers")
"""Attacks that every run makes; further ones are asked for."""

Json = Mapping[str, Any]

SECONDARY_PROTOCOLS = frozenset({"prefix_text_space", "after_first_flip", "published"})


@dataclass(frozen=True)
class RunFiles:
    """One run's folder; what is not there is None or empty, so that a report can say it is missing."""

    root: Path

    @cached_property
    def final(self) -> Json:
        """The merged results.

        Raises:
            BlockedError: the run was not aggregated.
        """
        path = self.root / "results" / "final_results.json"
        if not path.is_file():
            raise BlockedError(f"{path} is not there; finish the run first: isotone run … --until aggregate")
        return records.read_json(path)

    @cached_property
    def config(self) -> Json:
        """The resolved experiment."""
        return yaml.safe_load((self.root / "config.yaml").read_text(encoding="utf-8"))

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """All arms of the experiment, measured or not, the baseline first."""
        names = list(self.config.get("arms") or self.final["arms"])
        return tuple(sorted(names, key=lambda name: name != "baseline"))

    def is_constrained(self, arm: str) -> bool:
        """Say whether the configuration constrains an arm."""
        return bool(((self.config.get("arms") or {}).get(arm) or {}).get("constraint"))

    def arm(self, name: str) -> Json:
        """What the results say about an arm."""
        return self.final["arms"].get(name) or {}

    @cached_property
    def further(self) -> tuple[str, ...]:
        """The further attacks that any arm has, and the ensemble, in the order of the results."""
        return tuple(dict.fromkeys(name for arm in self.arms for name in self.arm(arm).get("attacks") or ()))

    @property
    def attacks(self) -> tuple[str, ...]:
        """All attacks."""
        return (*ATTACKS, *self.further)

    def entries(self, arm: str, attack: str) -> Mapping[str, Json]:
        """What one attack found in an arm, by variant; empty if it was not made."""
        of_arm = self.arm(arm)
        found = (of_arm if attack in ATTACKS else of_arm.get("attacks") or {}).get(attack) or {}
        return found.get("variants") or ({found["variant"]: found} if found else {})

    def entry(self, arm: str, attack: str, variant: str) -> Json:
        """What one variant of an attack found in an arm; empty if it was not made."""
        return self.entries(arm, attack).get(variant) or {}

    def variants(self, attack: str) -> tuple[str, ...]:
        """The variants of an attack that any arm has, in the order of the results."""
        return tuple(dict.fromkeys(variant for arm in self.arms for variant in self.entries(arm, attack)))

    def primary_variants(self, attack: str) -> tuple[str, ...]:
        """The variants that are scored in the primary protocol, with figures or without."""
        return tuple(v for v in self.variants(attack) if any(map(_is_primary, self._of_arms(attack, v))))

    def _of_arms(self, attack: str, variant: str) -> list[Json]:
        return [entry for arm in self.arms if (entry := self.entry(arm, attack, variant))]

    def measurement(self, arm: str, metric: str, attack: str | None = None, variant: str | None = None) -> Json:
        """The measurement of an arm's metric, for an attack in its primary protocol; empty if there is none."""
        wanted = {"arm": arm, "metric": metric, "attack": attack, "variant": variant}
        found = (m for m in self.final["measurements"] if wanted.items() <= m.items())
        return next((m for m in found if m["protocol"] not in SECONDARY_PROTOCOLS), {})

    def attacked(self, arm: str, metric: str, attack: str, variant: str) -> Json:
        """The measurement of an attack's metric; empty if there is none."""
        entry = self.entry(arm, attack, variant)
        return self.measurement(arm, metric, entry["attack"], entry["variant"]) if entry else {}

    def rows(self, arm: str, attack: str, variant: str | None = None) -> list[dict[str, Any]]:
        """One row for each document and variant of an attack; of one variant alone, none of the search documents'."""
        folder = self.root / "results" / "documents"
        if variant is not None:
            return records.JsonLines(folder / f"{attack}.{arm}.{variant}.jsonl").read()
        paths = [folder / f"{attack}.{arm}.jsonl", *sorted(folder.glob(f"{attack}.{arm}.*.jsonl"))]
        return [row for path in paths for row in records.JsonLines(path).read()]

    def metrics(self, arm: str) -> list[dict[str, Any]]:
        """One line for each training step and each validation of an arm."""
        return records.JsonLines(self.root / "metrics" / f"train.{arm}.jsonl").read()

    def provenance(self) -> Iterator[tuple[str, Json]]:
        """Yield each node's name with what its record says, by name.

        Not aggregate's: it is written after the page, and a page made again must be the same.
        """
        for path in sorted((self.root / "records").glob("*.json")):
            if path.stem != "aggregate":
                yield path.stem, records.read_json(path)


def _is_primary(entry: Json) -> bool:
    """Say whether an entry has a primary figure, or none only because every document is missing."""
    return entry["delta_nll"] is not None or not entry["n"]
