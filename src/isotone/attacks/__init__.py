"""Attacks propose edits under one interface; one judge scores them, the same for every attack and arm."""

from isotone.attacks.hotflip import HotFlip
from isotone.attacks.interface import DocumentAttack
from isotone.attacks.protocol import PrefixProtocol, Window
from isotone.attacks.published import PublishedHotFlip
from isotone.attacks.random_edits import RandomEdits
from isotone.attacks.running import replay, run_documents
from isotone.attacks.summary import success_threshold, summarize, summarize_triggers
from isotone.attacks.trigger_rows import evaluate_trigger
from isotone.attacks.triggers import UniversalTriggers, search_trigger
from isotone.attacks.vocabulary import Vocabulary

__all__ = [
    "DocumentAttack",
    "HotFlip",
    "PrefixProtocol",
    "PublishedHotFlip",
    "RandomEdits",
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
]
