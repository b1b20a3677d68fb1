"""What is asked for is checked before anything is loaded, and named as users name it."""

from pathlib import Path

import pytest

from isotone.errors import UsageError
from isotone.suite.request import Options, make_request, name_models


def test_arms_are_named_after_their_models() -> None:
    given = ["pocket", "mono=./a/folder", "models/SmolLM2-135M", "x/y.Q4_1.gguf", "other/SmolLM2-135M", "a/7b"]
    assert name_models(given) == {
        "baseline": "pocket",
        "mono": "./a/folder",
        "SmolLM2_135M": "models/SmolLM2-135M",
        "y_Q4_1": "x/y.Q4_1.gguf",
        "SmolLM2_135M_2": "other/SmolLM2-135M",
        "m_7b": "a/7b",
    }
    assert name_models(["baseline=pocket"]) == {"baseline": "pocket"}


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ([], "give at least one model"),
        (["mine=pocket"], "the first MODEL is the baseline"),
        (["pocket", "a=pocket", "a=pocket"], "two models of the name a"),
        (["pocket", "7b=pocket"], "a name is made of"),
        (["pocket", "a="], "a model stands behind"),
        (["pocket", "a=pocket", "a_matched=pocket"], "names that end in _matched are those of controls"),
    ],
)
def test_names_that_cannot_be_are_refused(models: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        name_models(models)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(attacks=["hotflop"]), "there is no attack 'hotflop'; allowed: hotflip"),
        (Options(attacks=[]), "give at least one"),
        (Options(overrides=["training.lr=1"]), "nothing is made from it here; allowed: attacks"),
        (Options(overrides=["data.source=x"]), "nothing is made from it here"),
        (Options(attacks=["hotflip"], overrides=["attacks.gcg.steps=3"]), "--attacks alone says"),
        (Options(overrides=["attacks.gcg=null"]), "--attacks alone says"),
        (Options(overrides=["attacks.hotflip.flip=3"]), r"--set: .*did you mean attacks\.hotflip\.flips"),
        (Options(flips=64), "64 flips do not fit"),
        (Options(budget_tokens=10), "do not buy one round"),
        (Options(prefix=300), "baseline reads 256 tokens"),
    ],
)
def test_requests_that_cannot_be_carried_out_are_refused_in_one_line(options: Options, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        make_request(["pocket"], Path("texts.jsonl"), None, options)
    assert "\n" not in str(caught.value)


def test_a_budget_must_buy_a_round_of_what_is_asked_for_alone() -> None:
    small = Options(attacks=["coordinate"], budget_tokens=2000, overrides=["attacks.coordinate.candidates=8"])
    assert make_request(["pocket"], Path("texts.jsonl"), None, small).experiment.attacks.budget_tokens == 2000
    with pytest.raises(UsageError, match="do not buy one round of hotflip"):
        make_request(["pocket"], Path("texts.jsonl"), None, Options(attacks=["hotflip"], budget_tokens=2000))


def test_a_revision_is_not_given_to_several_models_at_once() -> None:
    options = Options(overrides=["model.revision=main"])
    with pytest.raises(UsageError, match="it would hold for every MODEL"):
        make_request(["pocket", "a=pocket"], Path("texts.jsonl"), None, options)


def test_the_protocol_is_what_fits_the_models_unless_given() -> None:
    def protocol(options: Options) -> tuple[int, int, int]:
        found = make_request(["pocket"], Path("texts.jsonl"), None, options).experiment.attacks.protocol
        return found.prefix, found.gap, found.continuation

    assert protocol(Options()) == (64, 8, 64)
    assert protocol(Options(prefix=32, gap=0)) == (32, 0, 64)
    assert protocol(Options(prefix=32, overrides=["attacks.protocol.prefix=16"])) == (16, 8, 64)


def test_the_family_is_what_is_asked_for_unless_declared() -> None:
    def family(*overrides: str) -> list[tuple[str, str | None]]:
        options = Options(attacks=["gcg", "random"], overrides=overrides)
        request = make_request(["pocket", "b=pocket"], Path("texts.jsonl"), None, options)
        return [(declared.metric, declared.attack) for declared in request.experiment.analysis.family]

    assert family() == [("nll", None), ("delta_nll", "gcg")]
    assert family("analysis.family=[{metric: nll}]") == [("nll", None)]
