"""Attacks propose edits under one interface; one judge scores them, the same for every attack and arm."""

from isotone.attacks.beam import BeamHotFlip
from isotone.attacks.coordinate import CoordinateSearch
from isotone.attacks.ensemble import worst_case
from isotone.attacks.frequency import FrequencyEdits, token_counts
from isotone.attacks.gcg import GCG
from isotone.attacks.hotflip import HotFlip
from isotone.attacks.interface import DocumentAttack
from isotone.attacks.pgd import EmbeddingPGD
from isotone.attacks.protocol import AttackProtocol, PrefixProtocol, SourceProtocol, Window
from isotone.attacks.published import PublishedHotFlip
from isotone.attacks.random_edits import RandomEdits
from isotone.attacks.running import replay, run_documents
from isotone.attacks.shuffled import ShuffledHotFlip
from isotone.attacks.summary import success_threshold, summarize, summarize_triggers
from isotone.attacks.trigger_rows import evaluate_trigger
from isotone.attacks.triggers import UniversalTriggers, search_trigger
from isotone.attacks.vocabulary import Vocabulary

__all__ = [
    "GCG",
    "AttackProtocol",
    "BeamHotFlip",
    "CoordinateSearch",
    "DocumentAttack",
    "EmbeddingPGD",
    "FrequencyEdits",
    "HotFlip",
    "PrefixProtocol",
    "PublishedHotFlip",
    "RandomEdits",
    "ShuffledHotFlip",
    "SourceProtocol",
    "UniversalTriggers",
    "Vocabulary",
    "Window",
    "evaluate_trigger",
    "replay",
    "run_documents",
    "search_trigger",
    "success_threshold",
    "summarize",
    "summarize_triggers",
    "token_counts",
    "worst_case",
]
