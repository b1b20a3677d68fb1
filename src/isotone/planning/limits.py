"""What a plan is held against: what jobs ask for, what a partition allows, what is free."""

import shutil
import subprocess
from pathlib import Path

from isotone.cluster import Cluster, duration_s, size_bytes
from isotone.environment import free_disk_bytes, memory_bytes


def time_limit(cluster: Cluster, stage: str) -> int | None:
    """Return a stage's --time in seconds; None where it asks for none."""
    text = cluster.resources(stage).time
    return duration_s(text) if text else None


def partition_maximum(cluster: Cluster, partition: str | None, here: bool) -> int | None:
    """Return the longest limit that a partition allows, in seconds; asked of sinfo where not stated."""
    if cluster.max_time:
        return duration_s(cluster.max_time)
    return _asked(partition) if here and shutil.which("sinfo") else None


def host_memory_limit(cluster: Cluster, stage: str, here: bool) -> int | None:
    """Return the bytes that a stage may hold: what its job asks for; without a described job, what is here."""
    text = cluster.resources(stage).memory
    if text:
        return size_bytes(text)
    return memory_bytes() if here and cluster == Cluster() else None


def device_memory_limit(cluster: Cluster) -> int | None:
    """Return the bytes of one device, where stated."""
    return size_bytes(cluster.device.memory) if cluster.device.memory else None


def disk_limit(cluster: Cluster, folder: Path, here: bool) -> int | None:
    """Return the bytes that a run may fill: a stated quota, or what is free beside what of it is there already."""
    if cluster.free_disk:
        return size_bytes(cluster.free_disk)
    if not here:
        return None
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    return free_disk_bytes(folder) + there


def _asked(partition: str | None) -> int | None:
    """Return what sinfo says of a partition, or of the default one; None where it does not answer."""
    command = ["sinfo", "-h", "-o", "%P %l", *(["-p", partition] if partition else [])]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.split() for line in answer.stdout.splitlines()]
    limits = [words[1] for words in lines if len(words) == 2 and (partition or words[0].endswith("*"))]
    try:
        return duration_s(limits[0]) if limits else None
    except ValueError:
        return None  # infinite
