"""Removes what interruptions and --fresh left behind."""

import shutil
from pathlib import Path

from isotone.errors import BlockedError
from isotone.pipeline.lease import holder
from isotone.pipeline.run_directory import RunDirectory


def clean_run(folder: Path, *, remove: bool) -> list[str]:
    """List, or remove, leftovers of kills (``.NAME.tmp``, ``.NAME.removed``) and what was set aside, with their sizes.

    Raises:
        UsageError: the folder is not a run.
        BlockedError: a process works on the run.
    """
    run = RunDirectory.find(folder)
    for lease in [*run.root.glob("leases/*.json"), *run.setup.glob("leases/*.json")]:
        if found := holder(lease):
            raise BlockedError(
                f"{lease.stem} is being worked on by process {found['pid']} on {found['host']}; wait for it"
            )
    lines = []
    for path in _leftovers(run):
        size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
        lines.append(f"{'removed' if remove else 'would remove'} {path} ({size / 1e6:.1f} MB)")
        if remove:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lines or ["nothing to remove"]


def _leftovers(run: RunDirectory) -> list[Path]:
    found: list[Path] = []
    for root in (run.root, run.setup):
        for pattern in (".*.tmp", ".*.removed", "*.set-aside-*"):
            found += [p for p in sorted(root.rglob(pattern)) if not any(q in p.parents for q in found)]
    return found
