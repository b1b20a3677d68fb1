from pathlib import Path

import pytest

from isotone.cluster import Cluster, Resources, duration_s, size_bytes
from isotone.config import Experiment, Runtime
from isotone.errors import UsageError
from isotone.slurm.site import load_cluster
from isotone.slurm.submission import for_cluster


def test_an_experiment_goes_over_the_profile_value_by_value(tmp_path: Path) -> None:
    (tmp_path / "isotone").mkdir()
    (tmp_path / "isotone/cluster.yaml").write_text(
        "account: a\ntime: '4:00:00'\nstages: {setup: {cpus: 2, memory: 8G}}\n"
    )
    own = Cluster(time="8:00:00", stages={"setup": Resources(memory="16G")})
    found = load_cluster(None, own, {"XDG_CONFIG_HOME": str(tmp_path)})
    assert (found.account, found.time) == ("a", "8:00:00")
    assert found.resources("setup") == Resources(time="8:00:00", cpus=2, memory="16G")


def test_a_user_without_a_profile_has_an_empty_one(tmp_path: Path) -> None:
    assert load_cluster(None, Cluster(), {"HOME": str(tmp_path)}) == Cluster()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("accont: a", "accont: unknown key; did you mean account?"),
        ("time: tomorrow", "time: found 'tomorrow', allowed: a duration such as 24:00:00"),
        ("memory: much", "memory: found 'much', allowed: a size such as 80G"),
        ("stages: {evalute: {}}", "stages.evalute: there is no such stage; allowed: setup"),
        ("stages: {setup: {tme: 1}}", "stages.setup.tme: unknown key; did you mean stages.setup.time?"),
        ("account: a b", "account: found 'a b', allowed: a word"),
        ("- a", "expected keys and values"),
    ],
)
def test_a_fault_in_a_profile_is_named_with_file_and_key(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as found:
        load_cluster(str(path), Cluster())
    assert str(path) in str(found.value)
    assert told in str(found.value)


def test_a_profile_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UsageError, match="founding"):
        load_cluster("fouding", Cluster())
    with pytest.raises(UsageError, match="No such file"):
        load_cluster("/nowhere/site.yaml", Cluster())


def test_slurms_forms_of_durations_and_sizes_are_read() -> None:
    texts = ["90", "1:30", "24:00:00", "1-0", "2-12:30", "1-0:0:10"]
    assert [duration_s(text) for text in texts] == [5400, 90, 86400, 86400, 217_800, 86410]
    assert [size_bytes(text) for text in ("512", "512M", "80G", "1.5T")] == [2**29, 2**29, 80 * 2**30, 3 * 2**39]


def test_the_first_job_does_not_decide_the_device_for_all() -> None:
    """Setup runs on a node without a GPU; what the others will have is known from what they ask for."""
    open_ended = Experiment(name="x")
    assert for_cluster(open_ended, Cluster(gpus=1)).runtime.device == "cuda"
    assert for_cluster(open_ended, Cluster(gres="gpu:a100:1", cpus=8)).runtime == Runtime(device="cuda", threads=8)
    assert for_cluster(open_ended, Cluster()).runtime == Runtime()
    given = Experiment(name="x", runtime=Runtime(device="cpu", threads=2))
    assert for_cluster(given, Cluster(gpus=1, cpus=8)).runtime == given.runtime


def test_stages_that_disagree_on_the_device_are_refused() -> None:
    """Whichever of two stages side by side came first would decide for both."""
    mixed = Cluster(gpus=1, stages={"constrain": Resources(gpus=0)})
    with pytest.raises(UsageError, match=r"cluster.stages.constrain: asks for no GPU.*runtime.device"):
        for_cluster(Experiment(name="x"), mixed)
    said = Experiment(name="x", runtime=Runtime(device="cpu"))
    assert for_cluster(said, mixed).runtime.device == "cpu"


def test_only_training_is_given_several_devices_or_nodes() -> None:
    cluster = Cluster(gres="gpu:a100:4,nvme:1", nodes=2)
    assert (cluster.resources("train_baseline").gres, cluster.resources("train_baseline").nodes) == (cluster.gres, 2)
    assert (cluster.resources("evaluate").gres, cluster.resources("evaluate").nodes) == ("gpu:a100:1,nvme:1", None)
    with pytest.raises(ValueError, match="only training is shared"):
        Cluster(stages={"evaluate": Resources(nodes=2)})
