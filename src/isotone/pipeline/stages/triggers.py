"""Stage 5: a universal trigger for one arm, searched on the search documents and measured on held-out ones."""

from pathlib import Path

from isotone import records
from isotone.attacks import UniversalTriggers, evaluate_trigger, search_trigger
from isotone.config import Triggers
from isotone.data.packed import open_packed
from isotone.pipeline.arms import attack_protocol, attack_vocabulary, attacked_windows, load_end
from isotone.pipeline.context import Context


def run(context: Context) -> list[Path]:
    """Search, then put the best trigger before every held-out document."""
    config, data = context.experiment.attacks, open_packed(context.run.data)
    model = load_end(context, context.arm_name, config.checkpoint)
    vocabulary, protocol = attack_vocabulary(context, model), attack_protocol(context)
    attack = trigger_search(config.triggers, context.seed)
    search_windows, num_short_search = attacked_windows(context, data, "attack_search")
    with context.progress(1, "step") as bar:
        found = search_trigger(
            attack,
            model,
            vocabulary,
            search_windows,
            protocol,
            state_path=context.run.work(context.node) / "search.json",
            stop=context.stop,
            progress=bar.set,
        )
    test_windows, num_short_test = attacked_windows(context, data, "attack_test")
    path = context.run.documents(context.node)
    evaluate_trigger(
        attack,
        found,
        model,
        vocabulary,
        test_windows,
        protocol,
        log=records.JsonLines(path),
        stop=context.stop,
        batch_documents=config.batch_documents,
    )
    result = context.run.node_result(context.node)
    records.write_json(
        result,
        {
            "schema": 1,
            "arm": context.arm_name,
            "documents": {
                "attack_search": {"attacked": len(search_windows), "too_short": num_short_search},
                "attack_test": {"attacked": len(test_windows), "too_short": num_short_test},
            },
            "search": found,
        },
    )
    return [path, result]


def trigger_search(config: Triggers, seed: int) -> UniversalTriggers:
    """Return the search as configured."""
    return UniversalTriggers(
        length=config.length,
        candidates=config.candidates,
        iterations=config.iterations,
        restarts=config.restarts,
        batch_documents=config.batch_size,
        budget_tokens=config.budget_tokens,
        seed=seed,
        proposals=config.proposals,
    )
