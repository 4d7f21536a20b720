"""
CheXbert in the layout of chexbert.pth: random weights in a tiny encoder, and heads that are set to answer by word.
"""

import json

import pytest
import torch
from transformers import BertConfig

from shared.metrics.chexbert import CheXbert, load_chexbert
from shared.metrics.labels import CHEXBERT_ORDER, CONDITIONS
from shared.runtime import InputError

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] no effusion heart is normal enlarged lungs clear pneumonia . ,".split()


@pytest.fixture
def files(tmp_path):
    """-> (checkpoint path, encoder folder, the network in it)."""
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = dict(
        model_type="bert",
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    (encoder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    network = CheXbert(BertConfig(**config)).eval()
    with torch.no_grad():  # far apart, so that no rounding turns a class
        for head in network.linear_heads:
            head.weight.mul_(50)
    return save(tmp_path / "chexbert.pth", layout(network)), encoder, network


def layout(network):
    """The state as the authors' file has it: DataParallel's prefix and the stored buffer of old versions."""
    state = {f"module.{key}": value.clone() for key, value in network.state_dict().items()}
    state["module.bert.embeddings.position_ids"] = torch.arange(512)[None]
    return state


def save(path, state):
    torch.save({"model_state_dict": state, "epoch": 3}, path)
    return path


TEXTS = [
    "The heart is enlarged.",
    "no effusion",
    "",
    "lungs clear, " * 30,
    "No pneumonia. Heart is normal.",
    "effusion " * 600,
]


def test_the_layout_is_that_of_the_published_file(files):
    _, _, network = files
    heads = {k: tuple(v.shape) for k, v in layout(network).items() if "linear_heads" in k}
    assert (
        len(heads) == 28
        and heads["module.linear_heads.0.weight"] == (4, 16)
        and heads["module.linear_heads.13.bias"] == (2,)
    )
    assert all(k.startswith(("module.bert.", "module.linear_heads.")) for k in layout(network))
    assert "module.bert.pooler.dense.weight" in layout(
        network
    ) and "module.bert.encoder.layer.1.output.dense.bias" in layout(network)


def test_labels_equal_the_network_run_by_hand_on_one_text_at_a_time(files):
    checkpoint, encoder, network = files
    labeller = load_chexbert(checkpoint, encoder)
    read = labeller.label(TEXTS, batch_size=4)
    seen = set()
    for text, labels in zip(TEXTS, read, strict=True):
        assert list(labels) == list(CONDITIONS)
        ids = torch.tensor([labeller.encode(text)])
        with torch.no_grad():
            logits = network(ids, torch.ones_like(ids))
        for name, row in zip(CHEXBERT_ORDER, logits, strict=True):  # No Finding is the last head
            value = [None, 1, 0, -1][int(row.argmax())]
            assert labels[name] == value
            seen.add(value)
    assert seen == {None, 1, 0, -1}
    assert labeller.label([]) == [] and len(labeller.label(["\ud800 broken \x00", "", "effusion " * 9999])) == 3
    assert labeller.label(TEXTS, batch_size=1) == read == labeller.label(TEXTS[::-1], batch_size=3)[::-1]


def test_classes_and_heads_map_by_name(files, tmp_path):
    _, encoder, network = files
    with torch.no_grad():
        for i, head in enumerate(network.linear_heads):
            head.weight.zero_()
            head.bias.zero_()
            head.bias[i % head.out_features] = 1.0
    labeller = load_chexbert(save(tmp_path / "set.pth", layout(network)), encoder)
    (labels,) = labeller.label(["heart"])
    assert labels == {name: [None, 1, 0, -1][i % 4] if i < 13 else 1 for i, name in enumerate(CHEXBERT_ORDER)}
    assert labels["Enlarged Cardiomediastinum"] is None and labels["Cardiomegaly"] == 1 and labels["No Finding"] == 1


def test_long_texts_keep_511_ids_and_the_end_mark(files):
    checkpoint, encoder, _ = files
    labeller = load_chexbert(checkpoint, encoder)
    effusion, start, end = (WORDS.index(word) for word in ("effusion", "[CLS]", "[SEP]"))
    assert labeller.encode("effusion " * 600) == [start] + [effusion] * 510 + [end]
    assert labeller.encode("effusion " * 510) == [start] + [effusion] * 510 + [end]
    assert labeller.encode(" Effusion\n\n effusion ") == [start, effusion, effusion, end]
    assert labeller.encode("") == [start, end]


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "no state"])
def test_other_checkpoints_are_refused_in_one_sentence(files, tmp_path, change):
    _, encoder, network = files
    state = layout(network)
    if change == "missing":
        del state["module.linear_heads.13.bias"]
    elif change == "extra":
        state["module.linear_heads.14.bias"] = torch.zeros(2)
    elif change == "shape":
        state["module.linear_heads.13.bias"] = torch.zeros(4)
    path = tmp_path / "other.pth"
    torch.save(state if change == "no state" else {"model_state_dict": state}, path)
    with pytest.raises(
        InputError, match="model_state_dict" if change == "no state" else r"linear_heads\.1[34]\.bias"
    ) as refusal:
        load_chexbert(path, encoder)
    assert "\n" not in str(refusal.value)


def test_missing_files_say_where_to_get_them(files, tmp_path):
    checkpoint, encoder, _ = files
    with pytest.raises(InputError, match="github.com/stanfordmlgroup/CheXbert"):
        load_chexbert(tmp_path / "none.pth", encoder)
    (encoder / "vocab.txt").unlink()
    with pytest.raises(InputError, match="lacks vocab.txt; .*bert-base-uncased"):
        load_chexbert(checkpoint, encoder)


def test_pickled_code_is_never_run(files, tmp_path):
    _, encoder, network = files
    torch.save({"model_state_dict": network}, tmp_path / "module.pth")  # a whole module, not a state
    with pytest.raises(InputError, match="pickled Python code"):
        load_chexbert(tmp_path / "module.pth", encoder)


def test_one_text_instead_of_a_list(files):
    checkpoint, encoder, _ = files
    with pytest.raises(TypeError, match="list"):
        load_chexbert(checkpoint, encoder).label("heart")


@pytest.mark.realdata
def test_the_tokens_of_bert_base_uncased(real_data, files, tmp_path):
    """[CLS], five words, full stop, [SEP] of the official vocabulary."""
    folder = real_data("hub_configs/bert-base-uncased")
    config = json.loads((folder / "config.json").read_text()) | dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    network = CheXbert(BertConfig.from_pretrained(tmp_path))
    labeller = load_chexbert(save(tmp_path / "real.pth", layout(network)), tmp_path)
    assert labeller.encode("The heart is\nenlarged.") == [101, 1996, 2540, 2003, 11792, 1012, 102]
