"""Durations and sizes as people read them."""


def duration(seconds: float) -> str:
    """Return seconds as 45 s, 12 min, 5.2 h or 236 days."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 86400:,.0f} days"


def size(num_bytes: float) -> str:
    """Return bytes as Slurm counts them (powers of 1,024): 512M, 40G, 1.2T."""
    for unit, factor in (("T", 2**40), ("G", 2**30)):
        if num_bytes >= factor:
            return (
                f"{num_bytes / factor:.3g}{unit}" if num_bytes < 1000 * factor else f"{num_bytes / factor:,.0f}{unit}"
            )
    return f"{num_bytes / 2**20:.0f}M"
