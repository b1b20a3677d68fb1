"""The names of the splits and their default shares (apart, so that reading a configuration loads nothing heavy)."""

SPLITS = ("train", "validation", "attack_search", "test", "attack_test")
"""Names of the splits, from the one that yields first to the one that is kept whole."""

DEFAULT_FRACTIONS = {"train": 0.80, "validation": 0.04, "attack_search": 0.04, "test": 0.05, "attack_test": 0.07}
"""Share of documents of each split; the pocket model was trained on the training split that these give."""

USES = {"train": ("train", "validation"), "test": ("attack_search", "test", "attack_test")}
"""Splits that a source of documents may be for."""
