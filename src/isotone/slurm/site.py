"""Site profiles: what is the same for all experiments of a cluster, in one YAML file."""

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from isotone.cluster import Cluster
from isotone.config_io import is_file_name, read_part
from isotone.errors import UsageError

_SHIPPED = resources.files("isotone") / "sites"


def load_cluster(site: str | None, own: Cluster, environment: Mapping[str, str] = os.environ) -> Cluster:
    """Return what jobs ask for: an experiment's own values over those of the site profile.

    Args:
        site: a YAML file, or the name of a profile that comes with isotone; None: the user's own, if there is one.
        own: the experiment's ``cluster``.
        environment: where the user's folder of configuration is looked up.

    Raises:
        UsageError: there is no such profile, or it has faults; a line for each, with file and key.
    """
    profile = _read(site, environment)
    over = own.model_dump(exclude_unset=True)
    tree = profile.model_dump(exclude_unset=True)
    stages, device = tree.pop("stages", {}), tree.pop("device", {})
    for stage, values in over.pop("stages", {}).items():
        stages[stage] = stages.get(stage, {}) | values
    tree |= {"stages": stages, "device": device | over.pop("device", {}), **over}
    return Cluster.model_validate(tree)


def user_profile(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where the user's own profile lies: $XDG_CONFIG_HOME/isotone/cluster.yaml, else below ~/.config."""
    folder = environment.get("XDG_CONFIG_HOME") or Path(environment.get("HOME", "~")).expanduser() / ".config"
    return Path(folder) / "isotone" / "cluster.yaml"


def shipped_profiles() -> list[str]:
    """Return the names of the profiles that come with isotone."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def _read(site: str | None, environment: Mapping[str, str]) -> Cluster:
    if site is None:
        path = user_profile(environment)
        return _validated(str(path), path.read_text(encoding="utf-8")) if path.is_file() else Cluster()
    if is_file_name(site):
        try:
            return _validated(site, Path(site).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UsageError(f"--site {site}: {reason}; give a YAML file with the keys of cluster") from error
    if site not in shipped_profiles():
        raise UsageError(
            f"--site {site}: there is no such profile; those that come with isotone: {', '.join(shipped_profiles())}; "
            f"or give a YAML file"
        )
    return _validated(f"site profile {site}", (_SHIPPED / f"{site}.yaml").read_text(encoding="utf-8"))


def _validated(label: str, text: str) -> Cluster:
    found: Any = read_part(Cluster, label, text)
    assert isinstance(found, Cluster)
    return found
