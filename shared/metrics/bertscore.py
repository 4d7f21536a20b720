"""
BERTScore (Zhang et al. 2020, arXiv 1904.09675) with any encoder in a local folder, equal to the package bert-score
0.3.13 to 1e-5.

    bert_score(hypotheses, references, "models/distilbert-base-uncased", layer=5)
    # {"bertscore_precision": ..., "bertscore_recall": ..., "bertscore_f1": ..., "hash": "..._L5_no-idf_version=..."}

Always print the hash: model, layer, idf weights and rescaling change the number by more than models differ. Layers that
papers use: roberta-large 17, microsoft/deberta-xlarge-mnli 40, distilbert-base-uncased 5. Rescaling, (x - b) / (1 - b)
with b the score of unrelated sentences, needs `baseline`: the file of the package's rescale_baseline folder, or (b_P,
b_R, b_F).
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import math
from collections import Counter
from pathlib import Path

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer

from shared.metrics.text import check_reports, readable
from shared.runtime import InputError

VERSION = "0.3.12"  # what release 0.3.13 of the package calls itself in its hash
NAMES = ("bertscore_precision", "bertscore_recall", "bertscore_f1")


def bert_score(
    hypotheses, references, model, layer, idf=False, baseline=None, batch_size=64, device="cpu", per_report=False
):
    """
    hypotheses: N strings; references: N strings or lists of strings (the best of each number counts, as in the
    package). model: folder of an encoder with its tokenizer. layer: hidden layer, from 1. idf: weigh each word piece by
    the log of its rarity in the references. baseline: None, a .tsv file with a row for each layer, or three numbers. ->
    dict of the means and the hash; with per_report=True arrays (N,). InputError for a folder that holds no encoder, a
    layer it has not, a bad baseline.
    """
    hypotheses, groups = check_reports(hypotheses, references)
    tokenizer, encoder = load_encoder(model, layer, device)
    offset = read_baseline(baseline, layer) if baseline is not None else None
    repeated = [text for text, group in zip(hypotheses, groups, strict=True) for _ in group]
    flat = [text for group in groups for text in group]
    longest = longest_input(tokenizer, encoder.config)
    ids = {
        text: tokenizer(readable(text.strip()), truncation=True, max_length=longest)["input_ids"]
        for text in {*repeated, *flat}
    }
    if idf:
        weights = idf_weights([ids[text] for text in flat])
    else:  # CLS and SEP have no weight of their own, but words may match them
        weights = Weights({tokenizer.cls_token_id: 0.0, tokenizer.sep_token_id: 0.0}, 1.0)
    vectors = embed(encoder, ids, tokenizer.pad_token_id, batch_size, device)

    scores = []
    for start in range(0, len(flat), batch_size):
        pairs = list(zip(repeated[start : start + batch_size], flat[start : start + batch_size], strict=True))
        scores.append(match(*(side(texts, ids, vectors, weights, device) for texts in zip(*pairs, strict=True))))
    scores = np.concatenate(scores)  # (pairs, 3)
    sizes = [len(group) for group in groups]
    scores = np.maximum.reduceat(scores, np.cumsum(sizes) - sizes)
    if offset is not None:
        scores = (scores - offset) / (1 - offset)
    result = {name: scores[:, i].astype(np.float64) for i, name in enumerate(NAMES)}
    if not per_report:
        result = {name: float(values.mean()) for name, values in result.items()}
    return result | {"hash": score_hash(model, layer, idf, baseline is not None)}


class Weights(dict):
    """{id: weight} with one weight for all ids that are not in it."""

    def __init__(self, values, other):
        super().__init__(values)
        self.other = other

    def __missing__(self, key):
        return self.other


def idf_weights(documents):
    """Lists of ids -> log((N + 1) / (documents with it + 1)); CLS and SEP are in every one and get 0."""
    n, counts = len(documents), Counter(i for document in documents for i in set(document))
    return Weights({i: math.log((n + 1) / (count + 1)) for i, count in counts.items()}, math.log(n + 1))


def score_hash(model, layer, idf, rescaled):
    """The string that names a setting, as the package builds it for a folder with a baseline file of one's own."""
    name = f"{model}_L{layer}_{'idf' if idf else 'no-idf'}_version={VERSION}(hug_trans={transformers.__version__})"
    return name + "-custom-rescaled" * rescaled


def load_encoder(folder, layer, device):
    """-> tokenizer, encoder with just `layer` layers: deeper ones are not needed for the output of that one."""
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"{folder} is not a folder with an encoder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        layers = config.num_hidden_layers
        if not 1 <= layer <= layers:
            raise InputError(f"the encoder in {folder} has the layers 1 to {layers}, there is no layer {layer}")
        config.num_hidden_layers = layer
        log = transformers.logging
        verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
        log.set_verbosity_error()  # it would list the weights of the layers left out
        log.disable_progress_bar()
        try:
            encoder = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32, local_files_only=True)
        finally:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"the encoder in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        raise InputError(f"the tokenizer in {folder} has no CLS, SEP or PAD token: BERTScore needs a kind of BERT")
    return tokenizer, encoder.to(device).eval()


def longest_input(tokenizer, config):
    """Ids per text. Texts are cut where the tokenizer says; one that does not say is cut where the positions end."""
    if tokenizer.model_max_length < 1_000_000:
        return tokenizer.model_max_length
    return config.max_position_embeddings - 2 * ("roberta" in config.model_type)  # RoBERTa counts positions from 2


@torch.inference_mode()
def embed(encoder, ids, pad, batch_size, device):
    """{text: ids} -> {text: (ids, D) unit vectors on the CPU}; texts of like length together, each once."""
    texts, vectors = sorted(ids, key=lambda text: len(ids[text]), reverse=True), {}
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        padded = padded_rows([torch.tensor(ids[text]) for text in batch], device, pad)
        mask = inside(padded, [len(ids[text]) for text in batch])
        hidden = encoder(input_ids=padded, attention_mask=mask.long()).last_hidden_state  # (B, L, D)
        hidden = torch.nn.functional.normalize(hidden, dim=-1).cpu()
        vectors.update({text: row[: len(ids[text])] for text, row in zip(batch, hidden, strict=True)})
    return vectors


def padded_rows(rows, device, value=0):
    return pad_sequence(rows, batch_first=True, padding_value=value).to(device)


def inside(padded, lengths):
    """(B, L, ...), B lengths -> (B, L) bool: no padding."""
    return torch.arange(padded.shape[1], device=padded.device) < torch.tensor(lengths, device=padded.device)[:, None]


def side(texts, ids, vectors, weights, device):
    """-> unit vectors (B, L, D), weights (B, L) that sum to 1, mask (B, L), and which texts are empty (B,)."""
    weight = padded_rows([torch.tensor([weights[i] for i in ids[text]]) for text in texts], device)
    vector = padded_rows([vectors[text] for text in texts], device)
    lengths = [len(ids[text]) for text in texts]
    empty = torch.tensor(lengths, device=device) == 2  # CLS and SEP alone
    return vector, weight / weight.sum(dim=1, keepdim=True), inside(vector, lengths), empty


@torch.inference_mode()
def match(hypothesis, reference):
    """Each word piece takes its most similar partner: -> (B, 3) precision (of the hypothesis), recall, F."""
    vector, weight, mask, empty = hypothesis
    other_vector, other_weight, other_mask, other_empty = reference
    pairs = mask[:, :, None] & other_mask[:, None, :]
    similarity = vector @ other_vector.transpose(1, 2) * pairs  # padding counts as 0
    precision = (similarity.amax(dim=2) * weight).sum(dim=1)
    recall = (similarity.amax(dim=1) * other_weight).sum(dim=1)
    scores = torch.stack([precision, recall, 2 * precision * recall / (precision + recall)], dim=1)
    scores = scores.masked_fill((empty | other_empty)[:, None], 0)
    return scores.nan_to_num(0.0).cpu().numpy()  # idf weights can all be 0; the package gives NaN there


def read_baseline(baseline, layer):
    """Three numbers, or a .tsv file whose rows are layer,P,R,F -> array (3,)."""
    if not isinstance(baseline, (str, Path)):
        values = np.asarray(baseline, dtype=np.float32)
        if values.shape != (3,) or not (values < 1).all():
            raise InputError("a baseline is three numbers below 1 (precision, recall, F), or a file")
        return values
    try:
        rows = np.loadtxt(baseline, delimiter=",", skiprows=1, ndmin=2, dtype=np.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"{baseline} cannot be read as a baseline file (LAYER,P,R,F, a row per layer)") from error
    row = rows[rows[:, 0] == layer] if rows.shape[1] == 4 else rows[:0]
    if len(row) != 1:
        raise InputError(f"{baseline} has no row of four numbers for layer {layer}")
    return row[0, 1:]
