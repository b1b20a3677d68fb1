"""Attacks propose edits under one interface; one judge scores them, the same for every attack and arm."""

from isotone.attacks.hotflip import HotFlip
from isotone.attacks.interface import DocumentAttack
from isotone.attacks.protocol import PrefixProtocol, Window
from isotone.attacks.published import PublishedHotFlip
from isotone.attacks.random_edits import RandomEdits
from isotone.attacks.running import replay, run_documents
from isotone.attacks.vocabulary import Vocabulary

__all__ = [
    "DocumentAttack",
    "HotFlip",
    "PrefixProtocol",
    "PublishedHotFlip",
    "RandomEdits",
    "Vocabulary",
    "Window",
    "replay",
    "run_documents",
]
