"""A node is stale only if what it uses has changed."""

from isotone.config import Experiment
from isotone.pipeline.graph import Graph
from isotone.pipeline.slices import config_slice


def test_what_is_declared_confirmatory_concerns_the_results_alone() -> None:
    one = Experiment(name="tiny")
    declared = {"analysis": {"family": [{"metric": "nll"}], "margin_share": 0.2}}
    other = Experiment.model_validate({"name": "tiny"} | declared)
    stale = [n.kind for n in Graph(one).nodes if config_slice(one, 1, n) != config_slice(other, 1, n)]
    assert stale == ["aggregate"]


def test_defaults_change_no_slice() -> None:
    """Records that were written before a part existed stay good."""
    one = Experiment(name="tiny")
    assert all("analysis" not in config_slice(one, 1, node) for node in Graph(one).nodes)
