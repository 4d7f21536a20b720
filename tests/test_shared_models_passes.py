"""shared/models/passes.py: every pass equals the plain forward over whole texts, for every family."""

import numpy as np
import pytest
import torch
from plain_forward import generate, plain_inputs, plain_logprobs

from shared.models import passes
from shared.models.inputs import continuation
from shared.models.loading import FAMILIES, load_vlm
from shared.models.passes import PartSize, Prompt, features_of, in_parts, logprobs, make_prompts, margin, never_drawn
from shared.models.passes import places_of, sample, score, stop_tokens, text_of, write
from shared.phantom import phantom_study
from shared.runtime import InputError

# two questions about one film, in words that begin alike; one about a film of another shape; one in colour
TEXTS = (
    "Answer with one word. Is there an effusion?",
    "Answer with one word. Which side is the large mass on, left or right?",
    "Is it normal or not, and where is the heart?",
    "Normal?",
)
TEMPERATURE = 1.3


@pytest.fixture(scope="module", params=list(FAMILIES))
def vlm(request):
    return load_vlm(f"tiny:{request.param}")


@pytest.fixture(scope="module")
def films():
    rng = np.random.default_rng(0)
    film = phantom_study(0, 1, 112).image
    return [film, film, *(rng.integers(0, 255, shape, dtype=np.uint8) for shape in ((84, 140), (112, 112, 3)))]


@pytest.fixture(scope="module")
def prompts(vlm, films):
    return make_prompts(vlm, TEXTS, films)


@pytest.fixture(scope="module")
def sampled(vlm, prompts):
    """Four continuations of each prompt, one of them shorter, whatever was drawn."""
    groups, logps = sample(vlm, prompts, 4, 12, TEMPERATURE, torch.Generator().manual_seed(3))
    groups[1][2], logps[1][2] = groups[1][2][:5], logps[1][2][:5]
    return groups, logps


def test_prompts_are_those_of_the_processor(vlm, films, prompts):
    for text, film, prompt in zip(TEXTS, films, prompts, strict=True):
        assert prompt.ids.tolist() == plain_inputs(vlm, [text], [film])["input_ids"][0].tolist()
        assert [len(f) for f in prompt.features] == [rows * columns for rows, columns in prompt.grids]
    assert prompts[0].features[0] is prompts[1].features[0]  # the same film was looked at once


@pytest.mark.parametrize("share", [True, False])
def test_logprobs_equal_the_plain_forward(vlm, films, prompts, sampled, share):
    groups, logps = sampled
    never = never_drawn(vlm)
    with torch.no_grad():
        logp, entropy, mask = logprobs(vlm, prompts, groups, share, TEMPERATURE, never, entropy=True)
        lines = zip(logp, entropy, mask, strict=True)
        for text, film, group, of_group in zip(TEXTS, films, groups, logps, strict=True):
            for ids, drawn in zip(group, of_group, strict=True):
                ours, spread, keep = next(lines)
                assert keep.tolist() == [True] * len(ids) + [False] * (len(keep) - len(ids))
                theirs = plain_logprobs(vlm, text, film, ids, TEMPERATURE, never)
                torch.testing.assert_close(ours[keep], theirs[0], rtol=0, atol=1e-5)
                torch.testing.assert_close(spread[keep], theirs[1], rtol=0, atol=1e-5)
                torch.testing.assert_close(ours[keep], torch.tensor(drawn), rtol=0, atol=1e-5)  # the sampler's own
                assert not ours[~keep].any() and not spread[~keep].any()


@pytest.mark.parametrize("share", [True, False])
def test_gradients_equal_the_plain_forward(vlm, films, sampled, share):
    """Also into the vision tower, whose features come with their gradient."""
    groups = [group[:2] for group in sampled[0]]
    weights = torch.linspace(-1, 1, 8)
    vlm.model.zero_grad()
    total = 0
    for i, (text, film) in enumerate(zip(TEXTS, films, strict=True)):
        for j, ids in enumerate(groups[i]):
            total = total + weights[2 * i + j] * plain_logprobs(vlm, text, film, ids)[0].sum()
    total.backward()
    wanted = {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad()
    prompts = []
    for text, film in zip(TEXTS, films, strict=True):
        bare = make_prompts(vlm, [text], [film])[0]
        seen = features_of(vlm, passes.preprocess_images(vlm.processor, [film]))
        prompts.append(Prompt(bare.ids, bare.grids, tuple(seen)))
    prompts[1].features = prompts[0].features
    logp, _, _ = logprobs(vlm, prompts, groups, share)
    (logp * weights[:, None]).sum().backward()
    found = {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad()
    assert found.keys() == wanted.keys() and any(n.startswith(vlm.spec.tower) for n in found)
    scale = max(g.abs().max() for g in wanted.values())
    for name, grad in found.items():
        torch.testing.assert_close(grad / scale, wanted[name] / scale, rtol=1e-5, atol=1e-5, msg=name)


def test_greedy_sampling_writes_what_generate_writes(vlm, films, prompts):
    assert write(vlm, prompts, 20) == generate(vlm, TEXTS, films, 20)


def test_a_batch_is_its_single_cases(vlm, films, prompts):
    assert write(vlm, prompts, 8) == [write(vlm, [p], 8)[0] for p in prompts]


def test_two_images_and_none(vlm, films):
    texts, images = ["Compare them.", "What is an effusion?", "Normal?"], [[films[0], films[2]], None, films[0]]
    some = make_prompts(vlm, texts, images, system="Be brief.")
    for text, image, prompt in zip(texts, images, some, strict=True):
        assert prompt.ids.tolist() == plain_inputs(vlm, [text], [image], "Be brief.")["input_ids"][0].tolist()
    plain = [generate(vlm, [t], [i], 6)[0] for t, i in zip(texts, images, strict=True)]
    assert write(vlm, make_prompts(vlm, texts, images), 6) == plain


def test_written_tokens_stand_where_they_are_read(vlm):
    text = 'Grün \u4e2d "no" \U0001f600 <x> 3 cm'
    ids = continuation(vlm, text)[0]
    found = places_of(vlm, ids)
    assert len(found) == len(ids)
    text = text_of(vlm, ids, skip_special_tokens=False)
    for (a, b), (_, last), n in zip(found, found[1:] + [(0, len(text))], range(len(ids)), strict=True):
        assert 0 <= a < b <= last <= len(text)
        part = vlm.tokenizer.decode(ids[n : n + 1])
        assert "\ufffd" in part or text[a:b].strip() == part.strip()


def test_score_is_the_mean_over_the_tokens_of_a_span(vlm, films, prompts):
    texts = [["yes", "no"], ["left lower zone"], ["Grün, 3 cm"], ["the answer: no"]]
    spans = [[[(0, 3), (0, 0)], [(0, 2), (0, 0)]], [[(5, 10), (0, 15)]], [[(0, 10), (0, 10)]], [[(12, 14), (0, 14)]]]
    with torch.no_grad():
        found = score(vlm, prompts, texts, spans)
        whole = score(vlm, prompts, texts)[:, 0]
    assert found.shape == (5, 2) and torch.isnan(found[:2, 1]).all()
    rows = [(i, text) for i, some in enumerate(texts) for text in some]
    for n, (i, text) in enumerate(rows):
        ids, places = continuation(vlm, text)
        with torch.no_grad():
            plain = plain_logprobs(vlm, TEXTS[i], films[i], ids)[0]
        inside = [a < len(text) and b > 0 and b > a for a, b in places]
        assert whole[n].item() == pytest.approx(plain[torch.tensor(inside)].mean().item(), abs=1e-5)
    ids, places = continuation(vlm, "left lower zone")
    chosen = [i for i, (a, b) in zip(ids, places, strict=True) if a < 10 and b > 5 and b > a]
    assert vlm.tokenizer.decode(chosen).strip() == "lower"


def test_margin_is_the_log_odds_of_the_spellings(vlm, films, prompts, capsys):
    start = '{"answer": "'
    found = margin(vlm, prompts, yes=("yes", "Yes"), no=("no", "xylophone"), start=start)
    assert "xylophone left out, more than one token" in capsys.readouterr().out
    before = continuation(vlm, start)[0]
    for i, value in enumerate(found.tolist()):
        sides = []
        for spellings in (("yes", "Yes"), ("no",)):
            ids = [continuation(vlm, start + s)[0] for s in spellings]
            some = [plain_logprobs(vlm, TEXTS[i], films[i], x)[0][-1] for x in ids if len(x) == len(before) + 1]
            sides.append(torch.stack(some).logsumexp(0).item())
        assert value == pytest.approx(sides[0] - sides[1], abs=1e-4)
    with pytest.raises(InputError, match="none of xylophone is one token"):
        margin(vlm, prompts, no=("xylophone",))


def test_the_image_matters_and_image_tokens_are_never_drawn(vlm, films, prompts, sampled):
    groups, _ = sampled
    others = make_prompts(vlm, TEXTS, [255 - film for film in films])
    with torch.no_grad():
        a, b = (logprobs(vlm, some, groups)[0] for some in (prompts, others))
    assert ((a - b).abs().amax(1) > 1e-4).all()
    drawn = sample(vlm, prompts, 16, 30, 5.0, torch.Generator().manual_seed(0))[0]
    assert not {i for group in drawn for ids in group for i in ids} & set(never_drawn(vlm))


def test_what_ends_a_text_is_what_the_checkpoint_says(vlm, prompts, monkeypatch):
    greedy = sample(vlm, prompts[:1], 1, 6)[0][0][0]
    monkeypatch.setattr(vlm.base.generation_config, "eos_token_id", [greedy[2]])
    ended = sample(vlm, prompts[:1], 1, 6)[0][0][0]
    first = greedy.index(greedy[2])
    assert ended == greedy[: first + 1] and stop_tokens(vlm) == [greedy[2]]
    assert text_of(vlm, ended) == vlm.tokenizer.decode(greedy[:first], skip_special_tokens=True).strip()


def test_numbers_that_are_not_finite_end_in_a_sentence(vlm, prompts, monkeypatch):
    head = vlm.base.lm_head
    monkeypatch.setattr(head, "forward", lambda x: torch.full((*x.shape[:-1], head.weight.shape[0]), float("nan")))
    for work in (lambda: sample(vlm, prompts, 1, 2), lambda: margin(vlm, prompts)):
        with pytest.raises(InputError, match="not finite, computing in float32"):
            work()
    monkeypatch.setattr(vlm, "dtype", torch.float16)
    with pytest.raises(InputError, match="float16: use --dtype bfloat16 or float32"):
        write(vlm, prompts, 2)


def test_training_mode_and_checkpointing_change_nothing(vlm, prompts, sampled):
    groups = [group[:1] for group in sampled[0]]
    with torch.no_grad():
        plain, texts = logprobs(vlm, prompts, groups)[0], write(vlm, prompts, 6)
    vlm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    vlm.model.train()
    try:
        torch.testing.assert_close(logprobs(vlm, prompts, groups)[0], plain, rtol=0, atol=1e-5)
        assert write(vlm, prompts, 6) == texts and vlm.model.training
    finally:
        vlm.model.gradient_checkpointing_disable()
        vlm.model.eval()


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [(["a", "b"], 1, "2 texts and 1 images"), (["what is {image}?"], 1, "stands for an image; take it out")],
)
def test_text_and_images_that_do_not_fit(vlm, films, texts, images, message):
    texts = [t.replace("{image}", vlm.tokenizer.image_token) for t in texts]
    with pytest.raises(InputError, match=message):
        make_prompts(vlm, texts, films[:images])
    with pytest.raises(InputError, match="stands for an image"):
        score(vlm, [], [[vlm.tokenizer.image_token]])


def test_a_template_without_or_with_two_places_is_refused(vlm, films, monkeypatch):
    whole = vlm.processor.chat_template
    mark = vlm.tokenizer.boi_token if vlm.spec.framed else vlm.spec.image_tokens[0]
    for template, places in ((whole.replace(mark, ""), 0), (whole.replace(mark, mark + " " + mark), 2)):
        monkeypatch.setattr(vlm.processor, "chat_template", template)
        with pytest.raises(InputError, match=f"room for {places} images, and there are 1"):
            make_prompts(vlm, ["Normal?"], films[:1])


# --- parts ---


def test_out_of_memory_halves_what_goes_through_at_a_time(capsys):
    size, calls = PartSize(8), []

    def work(part):
        calls.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("no room")
        return [x + 1 for x in part]

    assert in_parts(work, range(9), size) == list(range(1, 10)) and calls == [8, 4, 2, 2, 2, 2, 1] and size.now == 2
    assert capsys.readouterr().out.count("out of GPU memory") == 2

    def never(part):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        in_parts(never, [1, 2], 1)


def test_items_that_stand_for_several_and_work_that_is_undone():
    size, done, calls = PartSize(8), [], []

    def work(part):
        calls.append(len(part))
        done.extend(part)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return list(part)

    assert in_parts(work, range(6), size, each=4, undo=done.clear) == list(range(6)) and done == list(range(6))
    assert calls == [2, 2, 1, 1, 1, 1, 1, 1] and size.now == 4
