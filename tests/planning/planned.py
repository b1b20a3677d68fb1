"""Sizes of a made-up experiment, for tests of planning."""

import numpy as np

from isotone.config_io import load_experiment
from isotone.planning.corpus import CorpusSize
from isotone.planning.shape import read_shape
from isotone.planning.sizes import Sizes


def planned(*overrides: str, documents: int = 50, length: int = 400) -> Sizes:
    experiment = load_experiment("pocket", overrides)
    held_out = {split: np.full(documents, length) for split in ("validation", "attack_search", "test", "attack_test")}
    return Sizes(experiment, read_shape(experiment.model), CorpusSize(1e6, 4e6, held_out, "test"))
