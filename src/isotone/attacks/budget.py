"""What an attack spends, in tokens, counted as if nothing were cached: the same for every arm and every machine.

A forward pass over L positions costs L, its backward pass 2L; rejected candidates count. What the prefix cache saves is
time, never budget.
"""


def forward_tokens(num_sequences: int, length: int) -> int:
    """Return the cost of a forward pass."""
    return num_sequences * length


def gradient_tokens(num_sequences: int, length: int) -> int:
    """Return the cost of a forward and its backward pass."""
    return 3 * num_sequences * length
