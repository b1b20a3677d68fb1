"""What an attack spends, in tokens, counted as if nothing were cached: the same for every arm and every machine.

A forward pass over L positions costs L, its backward pass 2L; rejected candidates count. What the prefix cache saves is
time, never budget.
"""

from isotone.errors import UsageError


def forward_tokens(num_sequences: int, length: int) -> int:
    """Return the cost of a forward pass."""
    return num_sequences * length


def gradient_tokens(num_sequences: int, length: int) -> int:
    """Return the cost of a forward and its backward pass."""
    return 3 * num_sequences * length


def affordable(budget_tokens: int, unit_tokens: int, fixed_tokens: int = 0) -> int:
    """Return how many units (rounds, candidates a round) a document's budget buys.

    Args:
        budget_tokens: of one document.
        unit_tokens: cost of a unit.
        fixed_tokens: spent whatever the number of units.

    Raises:
        UsageError: it does not buy one.
    """
    units = (budget_tokens - fixed_tokens) // unit_tokens
    if units < 1:
        raise UsageError(
            f"attacks.budget_tokens: {budget_tokens} tokens a document do not buy one round; "
            f"at least {fixed_tokens + unit_tokens} are needed"
        )
    return units
