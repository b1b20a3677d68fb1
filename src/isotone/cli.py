"""The command line: parses and calls. No logic, and no torch until a command needs it."""

import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from isotone.arguments import spread_lists
from isotone.errors import IsotoneError, Stopped, UsageError
from isotone.interruption import StopFlag

app = typer.Typer(
    name="isotone",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make language models monotone, train and attack them, compare them with their unconstrained twins.",
)
config_app = typer.Typer(no_args_is_help=True, help="Show, check or describe an experiment's configuration.")
app.add_typer(config_app, name="config")

_stop = StopFlag()


def run_command_line(arguments: list[str], stop: StopFlag) -> int:
    """Run one command and return its exit code; errors become one line unless ``--debug`` is among the arguments."""
    global _stop
    _stop = stop
    debug = "--debug" in arguments
    try:
        code = app(spread_lists([a for a in arguments if a != "--debug"]), standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Stopped as stopped:
        _print_error("PARTIAL", stopped, debug, "Run the same command again to continue.")
        return stopped.exit_code
    except IsotoneError as error:
        _print_error("ERROR", error, debug)
        return error.exit_code
    except typer.Exit as left:
        return left.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # the parser's own errors
            print(f"ERROR: {error.format_message()} (isotone --help)", file=sys.stderr)
            return 2
        if debug:
            traceback.print_exc()
        else:
            text = " ".join(str(error).split())
            print(f"ERROR: {type(error).__name__}: {text} (--debug shows where)", file=sys.stderr)
        return 1


def _print_error(word: str, error: IsotoneError, debug: bool, advice: str = "") -> None:
    if debug:
        traceback.print_exc()
    if error.told:
        return
    for line in str(error).splitlines():  # a configuration may have several faults, one a line
        print(f"{word}: {line.strip()}", file=sys.stderr)
    if advice:
        print(advice, file=sys.stderr)


# --- arguments that several commands share ---------------------------------------------------------------------------

ExperimentArgument = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="A preset's name, or a YAML file.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, runs/NAME/seed-N, or runs/NAME.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the experiment.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder that holds all runs.")]
SiteOption = Annotated[
    str | None, typer.Option(metavar="PROFILE", help="A site profile: a YAML file, or one that comes with isotone.")
]
SeedsOption = Annotated[list[int], typer.Option("--seeds", metavar="N...", help="Several seeds: 42 1337 or 42,1337.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


# --- the pipeline ----------------------------------------------------------------------------------------------------


@app.command()
def run(
    experiment: ExperimentArgument,
    seed: Annotated[int | None, typer.Option(help="Else EXPERIMENT_SEED, else the first of seeds.")] = None,
    seeds: SeedsOption = [],  # noqa: B006 - typer copies it
    out: OutOption = Path("runs"),
    overrides: SetOption = [],  # noqa: B006
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    only: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Run this stage alone, or one arm's part, such as hotflip.ARM.")
    ] = None,
    max_epochs_per_run: Annotated[
        str | None, typer.Option(metavar="X", help="Stop after X epochs of training in this process (0.5, 1/3).")
    ] = None,
    max_minutes_per_run: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Stop, with everything saved, after X minutes.")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Set what these stages left aside, and start them over.")] = False,
    debug: DebugOption = False,
) -> None:
    """Run an experiment to its end, or continue it: the same command does both.

    With --seeds: one seed after the other, then the summary over them.
    """
    from isotone.config_io import load_experiment
    from isotone.pipeline.run_directory import RunDirectory
    from isotone.pipeline.runner import Request, run_nodes, run_seeds
    from isotone.pipeline.seeds import seeds_to_run

    config = load_experiment(experiment, overrides)
    options = (until, only, fresh, _epochs(max_epochs_per_run), max_minutes_per_run)
    config, chosen_seeds = seeds_to_run(config, seed, seeds)
    requests = [Request(config, RunDirectory.of(out, config.name, s), s, *options) for s in chosen_seeds]
    root = requests[0].run.root
    if seeds:
        end, root = run_seeds(requests, _stop, _say), root.parent
    else:
        run_nodes(requests[0], _stop, _say)
        end = root
    part = only or (f"until {until}" if until else None)
    print(f"{part}: complete, of {root}" if part else f"COMPLETE: {end}")


@app.command()
def summarize(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="An experiment's folder, runs/NAME.")],
    seeds: SeedsOption = [],  # noqa: B006
    debug: DebugOption = False,
) -> None:
    """Write the results over several seeds; exit 4, and write nothing, where a seed is missing or stale."""
    from isotone.pipeline.summary import summarize_seeds

    print(summarize_seeds(runs, seeds, _say))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _epochs(text: str | None) -> Any:
    from fractions import Fraction

    if text is None:
        return None
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"--max-epochs-per-run {text!r} is not a number; give 1, 0.5 or 1/3") from None
    if value <= 0:
        raise UsageError(f"--max-epochs-per-run {text} must be above 0")
    return value


@app.command()
def submit(
    experiment: ExperimentArgument,
    seeds: SeedsOption = [],  # noqa: B006
    out: OutOption = Path("runs"),
    overrides: SetOption = [],  # noqa: B006
    site: SiteOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show graph, scripts and Slurm's answers.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Take the experiment's jobs out of the queue.")] = False,
    debug: DebugOption = False,
) -> None:
    """Submit an experiment to Slurm as a chain of jobs; again: only what is neither queued nor done.

    Without --seeds: EXPERIMENT_SEED if set, else all seeds of the experiment.
    """
    from isotone.config_io import load_experiment
    from isotone.pipeline.seeds import seeds_to_submit
    from isotone.slurm import submission

    config, chosen_seeds = seeds_to_submit(load_experiment(experiment, overrides), seeds)
    if cancel:
        submission.cancel_experiment(config.name, seeds, out)
        return
    act = submission.show_experiment if dry_run else submission.submit_experiment
    act(config, site, chosen_seeds, out)


@app.command()
def sweep(
    experiment: ExperimentArgument,
    seed: Annotated[int | None, typer.Option(help="Else EXPERIMENT_SEED, sweep.seed, the first of seeds.")] = None,
    out: OutOption = Path("runs"),
    overrides: SetOption = [],  # noqa: B006
    only: Annotated[str | None, typer.Option(metavar="PART", help="A point's id, setup or table: this alone.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the points and what they cost.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit it, one element of an array a point.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Take the sweep's jobs out of the queue.")] = False,
    site: SiteOption = None,
    max_minutes_per_run: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Stop, with everything saved, after X minutes.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Try every combination of an experiment's sweep, choose on validation text, write best.yaml; again: continue."""
    from isotone.config_io import load_experiment
    from isotone.sweep.points import resolve_seed_of_points

    config = load_experiment(experiment, overrides)
    chosen_seed = resolve_seed_of_points(config, seed)
    if dry_run:
        from isotone.sweep.cost import format_cost

        print(format_cost(config, chosen_seed, site, out))
    if slurm or cancel:
        from isotone.slurm.sweeping import cancel_sweep, show_sweep, submit_sweep

        if cancel:
            cancel_sweep(config.name, out)
        else:
            (show_sweep if dry_run else submit_sweep)(config, chosen_seed, site, out)
    if dry_run or slurm or cancel:
        return
    from isotone.sweep.running import Sweeping, run_sweep

    directory = run_sweep(Sweeping(config, chosen_seed, out, only, max_minutes_per_run), _stop, _say)
    print(f"COMPLETE: {directory.root}" if only is None else f"{only}: at its end, of {directory.root}")


@app.command()
def status(run_folder: RunArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show how every stage of a run stands, or of all seeds and their summary."""
    from isotone.pipeline.status import format_status
    from isotone.slurm.watch import status_with_jobs

    rows = status_with_jobs(run_folder)
    print(json.dumps(rows, indent=1) if as_json else format_status(rows))


@app.command()
def why(run_folder: RunArgument, debug: DebugOption = False) -> None:
    """Say why a run is not complete, and what to do."""
    from isotone.pipeline.status import explain_run
    from isotone.slurm.watch import status_with_jobs

    print(explain_run(run_folder, status_with_jobs(run_folder)))


@app.command()
def plan(
    experiment: ExperimentArgument,
    seeds: SeedsOption = [],  # noqa: B006
    out: OutOption = Path("runs"),
    overrides: SetOption = [],  # noqa: B006
    site: SiteOption = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="Training tokens of one epoch: 1e9, 300M.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine first, and keep the rates.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what every stage will take, against its limits; exit 3 if one does not fit."""
    from isotone.config_io import load_experiment
    from isotone.pipeline.seeds import seeds_to_submit
    from isotone.planning.plan import make_plan, measure_rates
    from isotone.planning.table import format_plan

    config, chosen_seeds = seeds_to_submit(load_experiment(experiment, overrides), seeds)
    if measure:
        print(f"rates measured: {measure_rates(config, site, out)}", file=sys.stderr)
    found = make_plan(config, site, out, chosen_seeds, tokens)
    print(json.dumps([row.to_dict() for row in found.rows], indent=1) if as_json else format_plan(found))
    if found.unsafe:
        raise typer.Exit(3)


@app.command()
def clean(
    run_folder: RunArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only list.")] = False,
    debug: DebugOption = False,
) -> None:
    """Remove what interruptions and --fresh left behind; results and checkpoints of complete stages stay."""
    from isotone.pipeline.clean import clean_run

    for line in clean_run(run_folder, remove=yes):
        print(line)


@app.command()
def report(run_folders: Annotated[list[Path], typer.Argument(metavar="RUN...")], debug: DebugOption = False) -> None:
    """Write report.html anew from a run's records and results."""
    from isotone.pipeline.run_directory import RunDirectory
    from isotone.report import write_report

    for folder in run_folders:
        print(write_report(RunDirectory.find(folder).root))


@app.command()
def export(
    run_folder: RunArgument,
    arm: Annotated[str, typer.Argument(metavar="ARM")],
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    checkpoint: Annotated[str, typer.Option(help="last or best.")] = "last",
    debug: DebugOption = False,
) -> None:
    """Write an arm as a folder that loads with AutoModelForCausalLM.from_pretrained, without isotone."""
    from isotone.pipeline.export import export_arm

    print(export_arm(run_folder, arm, folder, checkpoint))


# --- configuration ---------------------------------------------------------------------------------------------------


@app.command()
def presets(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the experiments that come with isotone."""
    from isotone.config_io import list_presets

    found = list_presets()
    if as_json:
        print(json.dumps([preset._asdict() for preset in found], indent=1))
        return
    width = max(len(preset.name) for preset in found)
    for preset in found:
        print(f"{preset.name:{width}}  {preset.description}")


@config_app.command("show")
def config_show(
    experiment: ExperimentArgument,
    overrides: SetOption = [],  # noqa: B006
    defaults: Annotated[bool, typer.Option(help="Show values left at their default, too.")] = True,
    debug: DebugOption = False,
) -> None:
    """Print an experiment as YAML."""
    from isotone.config_io import dump_yaml, load_experiment

    print(dump_yaml(load_experiment(experiment, overrides), defaults=defaults), end="")


@config_app.command("check")
def config_check(
    experiment: ExperimentArgument,
    overrides: SetOption = [],  # noqa: B006
    debug: DebugOption = False,
) -> None:
    """Validate an experiment; exit 2 with file and key if something is wrong."""
    from isotone.config_io import load_experiment

    config = load_experiment(experiment, overrides)
    arms, seeds = ", ".join(config.arms), ", ".join(map(str, config.seeds))
    print(f"{experiment}: valid; experiment {config.name}, arms {arms}, seeds {seeds}")


@config_app.command("schema")
def config_schema(debug: DebugOption = False) -> None:
    """Print the JSON schema of an experiment file."""
    from isotone.config_io import json_schema

    print(json.dumps(json_schema(), indent=1))


# --- models and checks -----------------------------------------------------------------------------------------------


@app.command()
def doctor(debug: DebugOption = False) -> None:
    """Check this machine in about a minute: exit 0 only if everything holds, else 3."""
    from isotone.doctor import run_doctor

    run_doctor()


@app.command()
def constrain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="pocket, a folder, a GGUF file, or a hub name.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the constrained model.")],
    scope: Annotated[str, typer.Option(help="Which projections.")] = "mlp_both",
    parametrization: Annotated[str, typer.Option(help="How weights are kept non-negative.")] = "scaled_softplus",
    initialization: Annotated[str, typer.Option(help="Where they start.")] = "absolute",
    layers: Annotated[str | None, typer.Option(help="Only in these blocks: 0,2 or first:N, last:N, A:B.")] = None,
    activation: Annotated[str | None, typer.Option(help="In the place of the model's: relu, monotone_gelu.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="DOCUMENTS", help="Text that a start is fitted on."),
    ] = None,
    calibration_rows: Annotated[int, typer.Option(min=1, help="Rows of 512 tokens of it, at most.")] = 64,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Match means and variances after the start, on that text.")
    ] = False,
    text_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    debug: DebugOption = False,
) -> None:
    """Constrain a model's feed-forward weights and write it as a plain folder with its certificate."""
    from isotone.pipeline.export import Calibration, constrain_to_folder

    text = None if calibration is None else Calibration(calibration, calibration_rows, text_field)
    start = (scope, parametrization, initialization, layers, activation)
    certificate = constrain_to_folder(model, out, *start, calibration=text, calibrate=calibrate)
    print(f"{out}: {certificate.verdict} ({_examined(certificate)})")


@app.command()
def certify(
    folder: Annotated[str, typer.Argument(metavar="FOLDER")],
    probe: Annotated[
        Path | None, typer.Option("--probe", metavar="DOCUMENTS", help="Also measure on these texts how order shows.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what is proved about the feed-forward networks of a model folder; exit 3 when violated."""
    from isotone.constraint import certify as certify_model
    from isotone.pipeline.export import probe_documents

    certificate = certify_model(folder)
    found = {key: certificate.to_dict()[key] for key in ("verdict", "reasons", "weights_hash")}
    found["fields"] = certificate.fields
    if probe is not None:
        found["measured"] = probe_documents(folder, probe, text_field)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{folder}: {certificate.verdict} ({_examined(certificate)})")
        for reason in found["reasons"]:
            print(f"  {reason}")
        for line in _measured_lines(found.get("measured")):
            print(f"  {line}")
    if certificate.verdict == "violated":
        raise typer.Exit(3)


def _examined(certificate: Any) -> str:
    """Say what a certificate is about."""
    blocks = "" if certificate.layers is None else f", blocks {', '.join(map(str, certificate.layers))}"
    return f"{certificate.scope}: {certificate.map}{blocks}"


def _measured_lines(measured: dict[str, Any] | None) -> Iterator[str]:
    """Say in words what ``certify --probe`` measured."""
    if measured is None:
        return
    premise = measured["premise"]
    yield (
        f"measured, not proved: of {premise['pairs']} pairs of network inputs that one edited token changed, "
        f"{premise['ordered']} were ordered ({measured['documents']} documents)"
    )
    for name, found in measured["probes"].items():
        yield (
            f"measured, not proved: {name}: {found['monotone']:.1%} of {found['n']} outputs moved one way with every "
            f"dose; control {found['control']:.1%}, chance {measured['chance']:.1%}"
        )


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    documents: Annotated[Path, typer.Option("--documents", help="txt, jsonl(.gz, .zst) or parquet.")],
    text_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for per-document results; resumes.")] = None,
    debug: DebugOption = False,
) -> None:
    """Measure a model's perplexity and bits per byte on documents."""
    from isotone.pipeline.export import evaluate_documents

    print(json.dumps(evaluate_documents(model, documents, text_field, out, _stop), indent=1))


@app.command()
def attack(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="pocket, folder, GGUF file, hub name; or NAME=MODEL.")
    ],
    documents: Annotated[Path, typer.Option("--documents", help="txt, jsonl(.gz, .zst) or parquet.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for logs and results; resumes.")],
    attacks: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of hotflip, triggers, gcg, coordinate, pgd, frequency, random.")
    ] = "hotflip,triggers,gcg,coordinate,random",
    search_documents: Annotated[
        Path | None, typer.Option(help="What is fitted on: else one in five of --documents.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    source_field: Annotated[
        str | None, typer.Option(help="The field that an encoder-decoder reads: source, unless given.")
    ] = None,
    target_field: Annotated[
        str | None, typer.Option(help="The field that it is asked for: target, unless given.")
    ] = None,
    prefix: Annotated[int | None, typer.Option(help="Tokens, of which all but the first are attacked.")] = None,
    gap: Annotated[int | None, typer.Option(help="Tokens that are neither attacked nor scored.")] = None,
    continuation: Annotated[int | None, typer.Option(help="Tokens that are scored.")] = None,
    flips: Annotated[int | None, typer.Option(help="Most edited tokens a document.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(help="Forward tokens a search may spend a document.")] = None,
    num_documents: Annotated[int | None, typer.Option(help="Most attacked documents.")] = None,
    matched_loss: Annotated[bool, typer.Option("--matched-loss", help="Add a control at equal clean loss.")] = False,
    seed: Annotated[int | None, typer.Option(help="Else EXPERIMENT_SEED, else 42.")] = None,
    overrides: SetOption = [],  # noqa: B006
    debug: DebugOption = False,
) -> None:
    """Attack models on documents, without a pipeline; several are compared with the first, with a verdict."""
    from isotone.report.summary import attack_summary_text
    from isotone.suite import attack_models

    results = attack_models(
        models,
        documents,
        out,
        attacks=[name.strip() for name in attacks.split(",") if name.strip()],
        search_documents=search_documents,
        text_field=text_field,
        source_field=source_field,
        target_field=target_field,
        prefix=prefix,
        gap=gap,
        continuation=continuation,
        flips=flips,
        budget_tokens=budget_tokens,
        num_documents=num_documents,
        matched_loss=matched_loss,
        overrides=overrides,
        seed=seed,
        stop=_stop,
        say=_say,
    )
    print(attack_summary_text(results), end="")


@app.command()
def version(debug: DebugOption = False) -> None:
    """Print the versions of isotone and of what it runs on."""
    from isotone.environment import provenance

    print(json.dumps(provenance(Path.cwd()), indent=1))
