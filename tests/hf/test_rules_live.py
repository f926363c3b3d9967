"""The exhibit hf-gemma4, and the ensemble rule, against transformers' own functions on the same uniforms."""

from types import SimpleNamespace

import numpy as np
import pytest

from minimtp.acceptance import Verdict, accept, exact_law
from minimtp.audit import CASES, emitted, integrate, total_variation
from minimtp.sampling import draw

torch = pytest.importorskip("torch")
utils = pytest.importorskip("transformers.generation.utils")
candidates = pytest.importorskip("transformers.generation.candidate_generator")


@pytest.fixture
def theirs(monkeypatch):
    """transformers' _speculative_sampling as (p_JV, tokens_K, q_KV, u_J, weight) -> Verdict, in float64."""
    uniforms = []
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.tensor(uniforms[:-1], dtype=x.dtype).reshape(x.shape))
    monkeypatch.setattr(
        torch, "multinomial", lambda p, num_samples: torch.tensor([[draw(p.reshape(-1).numpy(), uniforms[-1])]])
    )

    def judge(p_JV, tokens_K, q_KV, u_J, weight=None):
        uniforms[:] = [float(u) for u in u_J]
        with np.errstate(divide="ignore"):
            p, q = (torch.from_numpy(np.log(np.array(law)))[None] for law in (p_JV, q_KV))
        ids = torch.tensor([[7, 7, *tokens_K]])
        tokens, matches = utils._speculative_sampling(ids, q, len(tokens_K), p, assistant_ensemble_weight=weight)
        assert tokens[0, :-1].tolist() == list(tokens_K[: int(matches)])
        return Verdict(int(matches), int(tokens[0, -1]))

    return judge


def rounds(count, seed):
    """(p_JV, soft_KV, argmax drafts, u_J): near and far drafters, K 1 to 4, some tokens impossible for the target."""
    rng = np.random.RandomState(seed)
    for n in range(count):
        K, V = 1 + n % 4, rng.randint(2, 7)
        p_JV = rng.dirichlet(np.full(V, 0.7), K + 1)
        q_KV = rng.dirichlet(np.ones(V), K) if n % 3 else p_JV[:K] * np.exp(0.3 * rng.standard_normal((K, V)))
        if n % 5 == 0:
            p_JV[:, 0] = 0
            p_JV[:, 1] += 0.1
        laws = [law / law.sum(1, keepdims=True) for law in (p_JV, q_KV)]
        yield *laws, laws[1].argmax(1).tolist(), rng.random_sample(K + 1)


def test_hf_gemma4_decides_as_transformers_does(theirs):
    seen = set()
    for p_JV, soft_KV, tokens_K, u_J in rounds(400, 0):
        ours = accept("hf-gemma4", p_JV, SimpleNamespace(tokens=tokens_K, q_KV=None, soft_KV=soft_KV), u_J)
        assert ours == theirs(p_JV, tokens_K, soft_KV, u_J)
        seen.add((len(tokens_K), ours.accepted))
    assert seen >= {(K, n) for K in range(1, 5) for n in range(K + 1)}


@pytest.mark.parametrize("u, kept", [(0.0, 1), (5e-324, 0)])
def test_a_uniform_of_zero_keeps_an_impossible_token(theirs, u, kept):
    """Their test is r <= p/q: torch.rand gives 0 once in 2^24 draws."""
    p_JV, soft_KV = np.array([[0, 0.4, 0.6]] * 2), np.array([[0.8, 0.1, 0.1]])
    ours = accept("hf-gemma4", p_JV, SimpleNamespace(tokens=[0], q_KV=None, soft_KV=soft_KV), [u, 0.5])
    assert ours == theirs(p_JV, [0], soft_KV, [u, 0.5]) and ours.accepted == kept
    assert accept("rejection", p_JV, SimpleNamespace(tokens=[0], q_KV=soft_KV), [u, 0.5]).accepted == 0


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.9])
def test_ensemble_decides_as_transformers_does(theirs, weight):
    for p_JV, q_KV, tokens_K, u_J in rounds(150, 1):
        draft = SimpleNamespace(tokens=tokens_K, q_KV=q_KV)
        assert accept("ensemble", p_JV, draft, u_J, assistant_ensemble_weight=weight) == theirs(
            p_JV, tokens_K, q_KV, u_J, weight
        )


def test_rejection_decides_as_transformers_does_for_drawn_drafts(theirs):
    for p_JV, q_KV, tokens_K, u_J in rounds(150, 2):
        assert accept("rejection", p_JV, SimpleNamespace(tokens=tokens_K, q_KV=q_KV), u_J) == theirs(
            p_JV, tokens_K, q_KV, u_J
        )


@pytest.mark.parametrize("case, apart", [("A", 0.4), ("B", 0.6), ("E", 7 / 30)])
def test_the_exact_law_of_transformers_own_function(theirs, case, apart):
    """Integrated over its uniforms: the argmax of q drafted, q's logits handed over, as its Gemma 4 generator does."""
    p, q = CASES[case]
    best = int(q.argmax())

    def emit(u):
        verdict = theirs([p, p], [best], [q], u)
        return best if verdict.accepted else verdict.token

    law = integrate(emit, 2)
    law_V = np.array([law.get(token, 0) for token in range(5)])
    np.testing.assert_allclose(law_V, exact_law("hf-gemma4", p, q), rtol=0, atol=1e-12)
    assert total_variation(law_V, p) == pytest.approx(apart, abs=1e-12)


def test_their_generator_drafts_the_argmax_and_reports_the_soft_logits():
    """SinglePositionMultiTokenCandidateGenerator itself, with an assistant that is nothing but its logits."""
    z_KV = torch.tensor(np.random.RandomState(3).standard_normal((3, 5)))
    steps = iter(z_KV)

    def assistant(**kwargs):
        return SimpleNamespace(logits=next(steps)[None, None], last_hidden_state=torch.zeros(1, 1, 2))

    generator = object.__new__(candidates.SinglePositionMultiTokenCandidateGenerator)
    assistant.device = torch.device("cpu")
    generator.assistant_model, generator.is_main_model_prefill = assistant, True
    generator.target_model_input_embeddings = lambda ids: torch.zeros(1, 1, 2)
    generator.num_assistant_tokens, generator.main_model_max_length = 3, 99
    outputs = SimpleNamespace(hidden_states=[torch.zeros(1, 2, 2)], shared_kv_states={})
    ids, logits = generator.get_candidates(torch.tensor([[1, 2]]), {}, outputs, False, 0)
    assert ids[0, 2:].tolist() == z_KV.argmax(1).tolist()
    torch.testing.assert_close(logits[0], z_KV)


def test_their_generators_round_has_the_exhibits_law(theirs):
    """Over a block of two as well: the law of what is emitted, and acceptance."""
    P, Q = (lambda law: lambda prefix: np.roll(law, sum(prefix)))(CASES["A"][0]), lambda prefix: CASES["A"][1]

    def judge(p_JV, tokens_K, q_KV, u_J):
        verdict = theirs(p_JV, tokens_K, q_KV, u_J)
        return verdict.accepted, verdict.token

    did, ours = (emitted(who, P, Q, 2, drawn=lambda prefix: 0) for who in (judge, "hf-gemma4"))
    assert did == pytest.approx(ours, abs=1e-12)
