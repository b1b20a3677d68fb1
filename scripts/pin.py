"""Print what isotone and its extras need, pinned to what is installed: ``python scripts/pin.py > constraints.txt``.

Local version suffixes (``+cpu``) are left out, so that the same pins fit machines with and without a GPU.
"""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("pocket", "gguf", "dev")


def main() -> None:
    """Print the pins."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [r for extra in EXTRAS for r in project["optional-dependencies"][extra]]
    pins = closure([Requirement(text) for text in wanted])
    print("# What was tested together; refreshed by: python scripts/pin.py > constraints.txt")
    for name in sorted(pins):
        print(f"{name}=={pins[name]}")


def closure(wanted: list[Requirement]) -> dict[str, str]:
    """Return name -> version of the requirements, and of what they need in turn, in this environment."""
    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                found = distribution(name)
            except PackageNotFoundError as error:
                raise SystemExit(f"ERROR: {name} is not installed; install isotone with its extras first") from error
            pins[name] = found.version.partition("+")[0]
            for text in found.requires or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    wanted.append(needed)
    return pins


if __name__ == "__main__":
    main()
