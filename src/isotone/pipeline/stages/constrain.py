"""Stage 1: apply the non-negative parametrization, verify the effective weights, write the certificate."""

from dataclasses import asdict
from pathlib import Path

from isotone import records
from isotone.constraint import certify, fold
from isotone.errors import IsotoneError
from isotone.pipeline.arms import start_constrained, start_identity
from isotone.pipeline.context import Context
from isotone.training import save_initial


def run(context: Context) -> list[Path]:
    """Publish the arm's starting point and what is proved about it.

    Raises:
        UsageError: scope, parametrization or initialization do not fit the model; the reason is named.
        IsotoneError: the effective weights do not satisfy the constraint.

    A gated network may be proved not to be monotone although every weight is non-negative: that is a result, recorded
    and said, and no failure of the constraint.
    """
    model, constraint = start_constrained(context, context.arm_name)
    assert constraint is not None  # the graph has this node for constrained arms only
    folder = context.run.checkpoints(context.arm_name)
    checkpoint = save_initial(folder, model, constraint, start_identity(context))
    fold(model)  # which checks that the constraint holds
    scope = None if constraint.slack else context.arm.certified_scope  # where it is annealed, nothing holds yet
    certificate = certify(model, scope=scope).to_dict() if scope else None
    if certificate and certificate["weights"] != "nonneg":
        raise IsotoneError(f"arm {context.arm_name} violates its constraint: {'; '.join(certificate['reasons'])}")
    if certificate and certificate["verdict"] == "violated":
        context.say(f"{context.node}: no weight is negative, yet not monotone: {'; '.join(certificate['reasons'])}")
    records.write_json(
        context.run.node_result(context.node),
        {
            "schema": 1,
            "arm": context.arm_name,
            **constraint.description,
            "constrained_weights": list(constraint.names),
            "certificate": certificate,
            **({"fits": {name: asdict(fit) for name, fit in constraint.fits.items()}} if constraint.fits else {}),
        },
    )
    return [checkpoint / records.MANIFEST, context.run.node_result(context.node)]
