"""
rollouts.py: shared prompts change nothing but the time, the sampler's numbers are the model's own, and answers are
scored as evaluate.py does.
"""

import numpy as np
import pytest
import torch

from shared.models.loading import load_vlm
from vqa_sft_grpo.infer import Answerer
from vqa_sft_grpo.prompting import build_prompt
from vqa_sft_grpo.rewards import answer_alone
from vqa_sft_grpo.rollouts import Fits, answer_logprobs, answer_tokens, completion_logprobs, make_prompts, sample
from vqa_sft_grpo.rollouts import stop_tokens

QUESTIONS = [
    "Is there an effusion?",
    "Which side is the large mass on?",
    "Is it normal or not, and where is the heart?",
]
TEMPERATURE = 1.3


@pytest.fixture(scope="module", params=["qwen2vl", "gemma3", "llava"])
def rolled(request):
    """
    A tiny model of each family, prompts of different lengths about images of different sizes, and four rollouts of
    each.
    """
    vlm = load_vlm(f"tiny:{request.param}")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, shape, dtype=np.uint8) for shape in ((112, 84), (112, 112), (112, 112, 3))]
    prompts = make_prompts(vlm, QUESTIONS, "json", images)
    common = dict(suppress=vlm.model.generation_config.suppress_tokens, stop_ids=stop_tokens(vlm))
    groups, logps = sample(vlm, prompts, 4, 20, TEMPERATURE, torch.Generator().manual_seed(3), **common)
    groups[1][2], logps[1][2] = groups[1][2][:5], logps[1][2][:5]  # one that is shorter, whatever was drawn
    return vlm, images, prompts, groups, logps, common


def test_the_samplers_numbers_are_those_of_one_pass_over_the_whole_text(rolled):
    vlm, _, prompts, groups, logps, common = rolled
    assert [len(g) for g in groups] == [4, 4, 4] and len({tuple(ids) for g in groups for ids in g}) == 12
    with torch.no_grad():
        shared_logp, entropy, mask = completion_logprobs(vlm, prompts, groups, TEMPERATURE, common["suppress"])
        plain_logp, plain_entropy, _ = completion_logprobs(
            vlm, prompts, groups, TEMPERATURE, common["suppress"], share=False
        )
    assert mask.sum(1).tolist() == [len(ids) for g in groups for ids in g]
    torch.testing.assert_close(shared_logp, plain_logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, plain_entropy, rtol=0, atol=1e-5)
    for line, sampled in zip(plain_logp, [x for g in logps for x in g], strict=True):
        torch.testing.assert_close(line[: len(sampled)], torch.tensor(sampled), rtol=0, atol=1e-5)


def test_gradient_of_shared_prompts_is_that_of_whole_texts(rolled):
    vlm, _, prompts, groups, _, common = rolled
    weights = torch.linspace(-1, 1, 12)[:, None]
    found = []
    for share in (True, False):
        vlm.model.zero_grad()
        logp, _, _ = completion_logprobs(vlm, prompts, groups, TEMPERATURE, common["suppress"], share)
        (logp * weights).sum().backward()
        found.append({n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None})
    vlm.model.zero_grad()
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_greedy_sampling_writes_what_generate_writes(rolled):
    vlm, images, prompts, _, _, common = rolled
    groups, _ = sample(vlm, prompts, 1, 20, **common)
    written = [vlm.tokenizer.decode(g[0], skip_special_tokens=True).strip() for g in groups]
    assert written == Answerer(vlm, 8, 20).generate([build_prompt(q) for q in QUESTIONS], images)


def test_answers_are_scored_as_the_evaluation_does(rolled):
    vlm, images, prompts, _, _, _ = rolled
    answers = [["yes", "no"], ["left lower zone"], ["Grün, 3 cm"]]
    flat = [(i, answer) for i, some in enumerate(answers) for answer in some]
    with torch.no_grad():
        found = answer_logprobs(vlm, prompts, answers, "json")
    wanted = Answerer(vlm, 8).score(
        [build_prompt(QUESTIONS[i]) for i, _ in flat],
        [images[i] for i, _ in flat],
        [answer_alone(a)[0] for _, a in flat],
    )
    assert found.tolist() == pytest.approx([w["answer"] for w in wanted], abs=1e-5)
    ids, chosen = answer_tokens(vlm, "no effusion", "think")
    assert vlm.tokenizer.decode([i for i, c in zip(ids, chosen, strict=True) if c]).strip(" ><") == "no effusion"


def test_the_image_matters_to_every_pass_and_image_tokens_are_never_drawn(rolled):
    vlm, images, prompts, groups, _, common = rolled
    others = make_prompts(vlm, QUESTIONS, "json", [255 - image for image in images])
    with torch.no_grad():
        a, b = (
            completion_logprobs(vlm, some, groups, TEMPERATURE, common["suppress"])[0] for some in (prompts, others)
        )
    assert ((a - b).abs().amax(1) > 1e-4).all()
    assert not {i for g in groups for ids in g for i in ids} & set(common["suppress"])


def test_equal_images_are_looked_at_once(rolled, monkeypatch):
    vlm, images, prompts, _, _, _ = rolled
    seen = []
    from vqa_sft_grpo import rollouts

    real = rollouts.image_features
    monkeypatch.setattr(rollouts, "image_features", lambda vlm, some: seen.append(len(some)) or real(vlm, some))
    again = make_prompts(vlm, [*QUESTIONS, QUESTIONS[0]], "json", [*images, images[0]])
    assert seen == [3] and torch.equal(again[3].features, prompts[0].features)


def test_out_of_memory_halves_what_goes_through_at_a_time(capsys):
    fits, calls = Fits(8), []

    def work(start, stop):
        calls.append(stop - start)
        if stop - start > 3:
            raise torch.OutOfMemoryError("no room")
        return list(range(start, stop))

    assert fits.parts(work, 9) == list(range(9)) and calls == [8, 4, 2, 2, 2, 2, 1] and fits.size == 2
    assert capsys.readouterr().out.count("out of GPU memory") == 2
    with pytest.raises(torch.OutOfMemoryError):
        Fits(1).parts(lambda start, stop: work(0, 8), 1)
