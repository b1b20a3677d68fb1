"""Stage 6: asks one arm how much its gradients tell, on the first of the documents that attacks are made on."""

from pathlib import Path

from isotone import records
from isotone.attacks.probe import Probe, probe_documents
from isotone.data.packed import open_packed
from isotone.pipeline.arms import attack_protocol, attack_vocabulary, attacked_windows, first_token, load_end
from isotone.pipeline.context import Context


def run(context: Context) -> list[Path]:
    """Probe one document after the other."""
    config = context.experiment.attacks.probe
    assert config is not None  # the graph has this node where the part is there
    model = load_end(context, context.arm_name, context.experiment.attacks.checkpoint)
    attacked, num_short = attacked_windows(context, open_packed(context.run.data), "attack_test", first_token(context))
    windows = attacked[: config.num_documents]
    path, result = context.run.documents(context.node), context.run.node_result(context.node)
    with context.progress(len(windows), "document") as bar:
        probe_documents(
            Probe(config.edits, config.candidates, config.oracle_tokens, seed=context.seed),
            model,
            attack_vocabulary(context, model),
            windows,
            attack_protocol(context),
            log=records.JsonLines(path),
            stop=context.stop,
            progress=bar.set,
        )
    documents = {"attack_test": {"probed": len(windows), "too_short": num_short}}
    records.write_json(result, {"schema": 1, "arm": context.arm_name, "documents": documents})
    return [path, result]
