"""The figure of a sweep: what the constraint costs on validation text, and what is gained where it was measured."""

from dataclasses import replace

from isotone.report.figures import Trial, standalone, trials
from isotone.result_models import SweepResults

X_LABEL = "perplexity over the best baseline's, validation (95 %; filled: chosen)"
Y_LABEL = "remainder at equal clean loss, nats"


def sweep_figure(results: SweepResults) -> str | None:
    """Return the figure as an SVG file; None while nothing is measured.

    A chosen point that was attacked stands once for each matched-loss control. All others stand on the axis of ratios.
    """
    arms = list(dict.fromkeys(point.arm for point in results.points))
    shown: list[Trial] = []
    measured: list[Trial] = []
    for point in results.points:
        if point.ratio is None:
            continue
        drawn = Trial(
            label=point.arm,
            arm=arms.index(point.arm),
            x=point.ratio.value,
            x_ends=point.ratio.ci95,
            chosen=point.id in results.chosen.values(),
        )
        shown.append(drawn)
        for found in point.remainders:
            measured.append(
                replace(drawn, label=f"{point.arm} beside {found.control}", y=found.value, y_ends=found.ci95)
            )
    if not shown:
        return None
    return standalone(trials(f"sweep-{results.experiment}", shown, measured, X_LABEL, Y_LABEL))
