"""The regression learns from evaluations alone, proposes nothing twice, and finds more than drawing does."""

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

from isotone.attacks import CoordinateSearch, UniversalTriggers, Vocabulary, run_documents
from isotone.attacks.interface import Problem
from isotone.attacks.scoring import Target, frozen
from isotone.attacks.surrogate import MOST, Evaluated, predicted_gains, promising_pairs, token_features

from .conftest import PROTOCOL, make_windows, reactive_model


def evaluated(count: int, num_positions: int = 3) -> tuple[torch.Tensor, torch.Tensor, Evaluated]:
    """Return embeddings, the gains of all edits (linear in embedding and position), and some evaluations."""
    generator = torch.Generator().manual_seed(0)
    embeddings_VD = torch.randn(200, 5, generator=generator) * 7 + 30
    slopes_D = torch.randn(5, generator=generator)
    gains_PV = (embeddings_VD @ slopes_D).double() + torch.arange(num_positions)[:, None]
    positions_N = torch.randint(0, num_positions, (count,), generator=generator)
    tokens_N = torch.randint(0, 200, (count,), generator=generator)
    return embeddings_VD, gains_PV, Evaluated(positions_N, tokens_N, gains_PV[positions_N, tokens_N])


def test_gains_of_tokens_that_were_not_evaluated_are_predicted_from_those_that_were() -> None:
    embeddings_VD, gains_PV, known = evaluated(60)
    predicted_PV = predicted_gains(token_features(embeddings_VD), known, 3)
    assert np.corrcoef(predicted_PV.flatten().numpy(), gains_PV.flatten().numpy())[0, 1] > 0.9


def test_what_is_proposed_is_allowed_new_and_no_gain_that_is_not_a_number_is_learned_from() -> None:
    embeddings_VD, gains_PV, known = evaluated(60)
    known.gains_N[7] = torch.nan
    admissible_V = torch.arange(200) % 2 == 0
    allowed_P, current_P = torch.tensor([True, False, True]), torch.tensor([4, 5, 6])
    tried = known.positions_N[30:], known.tokens_N[30:]
    positions_N, tokens_N = promising_pairs(embeddings_VD, admissible_V, current_P, allowed_P, known, tried, 20)
    proposed = set(zip(positions_N.tolist(), tokens_N.tolist(), strict=True))
    assert len(proposed) == 20
    assert all(position != 1 and token % 2 == 0 for position, token in proposed)
    assert not proposed & {*zip(*(part.tolist() for part in tried), strict=True), *enumerate(current_P.tolist())}
    assert gains_PV[positions_N, tokens_N].mean() > gains_PV.mean() + gains_PV.std()


def test_the_latest_evaluations_are_learned_from() -> None:
    known = Evaluated(torch.arange(MOST + 5), torch.arange(MOST + 5), torch.arange(MOST + 5).double())
    known.gains_N[-1] = torch.inf
    assert known.learnable().tokens_N.tolist() == list(range(4, MOST + 4))


def test_it_finds_more_than_drawing_does_with_the_same_tokens() -> None:
    found = {}
    for proposals in ("random", "surrogate"):
        attack = CoordinateSearch(flips=3, candidates=8, rounds=24, proposals=proposals)  # type: ignore[arg-type]
        rows = [
            row
            for seed in range(3)
            for row in run_documents(
                attack,
                tiny_model("gpt_neox", seed=seed, initializer_range=0.1),
                Vocabulary.all_ids(VOCABULARY),
                make_windows(8),
                PROTOCOL,
            )
        ]
        found[proposals] = np.mean([row["delta_nats"] for row in rows])
    assert found["surrogate"] > 1.05 * found["random"]


def test_no_candidate_is_evaluated_twice_on_the_same_text() -> None:
    attack, model = CoordinateSearch(flips=2, candidates=8, rounds=12, proposals="surrogate"), reactive_model()
    with frozen(model):
        problem = Problem(Target(model, PROTOCOL.scored), PROTOCOL, Vocabulary.all_ids(VOCABULARY))
        state, since = attack.start(problem, make_windows(4)), [0] * 4
        kept = 0
        for _ in range(12):
            before, state = state, attack.step(problem, state)
            for index in range(4):
                columns = slice(since[index], None)
                pairs = state["tried_positions_BN"][index, columns], state["tried_tokens_BN"][index, columns]
                drawn = 8 if since[index] == 0 else 0  # the first round draws, and may draw a pair twice
                proposed = list(zip(*(part.tolist() for part in pairs), strict=True))
                assert len(set(proposed[drawn:])) == len(proposed[drawn:])
                assert not set(proposed[:drawn]) & set(proposed[drawn:])
                if torch.equal(before["current_BL"][index], state["current_BL"][index]):
                    kept += 1
                else:
                    since[index] = state["tried_gains_BN"].shape[1]
        assert kept


def test_gains_at_an_edited_position_are_against_the_token_that_is_there() -> None:
    attack, model = CoordinateSearch(flips=2, candidates=8, rounds=1, proposals="surrogate"), reactive_model()
    with frozen(model):
        problem = Problem(Target(model, PROTOCOL.scored), PROTOCOL, Vocabulary.all_ids(VOCABULARY))
        state = attack.step(problem, attack.start(problem, make_windows(4)))
        edited_B = (state["current_BL"] != state["clean_BL"]).any(dim=1)
        assert bool(edited_B.any())
        for index in edited_B.nonzero().flatten().tolist():
            position = int((state["current_BL"][index] != state["clean_BL"][index]).nonzero())
            there = state["tried_positions_BN"][index] + PROTOCOL.attackable.start == position
            edits_NL = state["clean_BL"][index].repeat(int(there.sum()), 1)
            edits_NL[:, position] = state["tried_tokens_BN"][index][there]
            gains_N = problem.target.nats(edits_NL) - problem.target.nats(state["current_BL"][index][None])
            assert state["tried_gains_BN"][index][there].tolist() == pytest.approx(gains_N.tolist(), abs=1e-4)


@pytest.mark.parametrize("attack", [CoordinateSearch, UniversalTriggers])
def test_other_proposals_are_refused(attack: type) -> None:
    with pytest.raises(ValueError, match="proposals: found 'guessed', allowed are"):
        attack(proposals="guessed")
