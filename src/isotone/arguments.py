"""Options that take several values in one go: ``--seeds 42 1337 2024``, which the parser only knows repeated."""

import re
from collections.abc import Sequence

LIST_OPTIONS = ("--seeds",)
"""Options whose values are whole numbers, with blanks or commas between them."""

_NUMBERS = re.compile(r"\d+(,\d+)*,?")


def spread_lists(arguments: Sequence[str]) -> list[str]:
    """Return arguments with each list option repeated before every value: ``--seeds 1 2`` as ``--seeds 1 --seeds 2``.

    A list ends at the first word that is no number, so a command's own arguments may stand behind it. What follows
    ``--`` is left as it is, and so is an option without a value: the parser says what is wrong.
    """
    words, spread = list(arguments), list[str]()
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if word == "--":
            return [*spread, word, *words]
        if option not in LIST_OPTIONS:
            spread.append(word)
            continue
        lists = [value] if equals else []
        while words and _NUMBERS.fullmatch(words[0]):
            lists.append(words.pop(0))
        values = [number for text in lists for number in text.split(",") if number]
        spread += [part for number in values for part in (option, number)] or [word]
    return spread
