"""
CheXbert: the 14 conditions of a report, read by a BERT with 14 heads (Smit et al. 2020, arXiv 2004.09167).

    labeller = load_chexbert("chexbert.pth", "bert-base-uncased", device="cuda")   # local paths, nothing is downloaded
    labeller.label(["Small left effusion. No pneumothorax."])   # [{"Pleural Effusion": 1, "Pneumothorax": 0, ...}]

The weights (research use; trained on credentialed reports) are linked in github.com/stanfordmlgroup/CheXbert and copied
in the hub repository StanfordAIMI/RRG_scorers; the folder of bert-base-uncased gives vocab.txt and config.json.

chexbert.pth holds model_state_dict with the keys module.bert.* and module.linear_heads.0 ... .13: thirteen heads of
four classes (blank, positive, negative, uncertain) in CHEXBERT_ORDER and, last, No Finding with two (blank, positive).
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from shared.metrics.labels import CHEXBERT_ORDER, CONDITIONS, NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN
from shared.metrics.text import readable
from shared.runtime import InputError, load_checkpoint

CLASSES = (UNKNOWN, POSITIVE, NEGATIVE, UNCERTAIN)  # what class 0, 1, 2, 3 of a head means
MAX_TOKENS = 512  # a longer text keeps its first 511 ids, [CLS] included, and a closing [SEP]
WHERE = "github.com/stanfordmlgroup/CheXbert links it, and the hub repository StanfordAIMI/RRG_scorers has a copy"


class CheXbert(nn.Module):
    """input_ids, attention_mask (B, T) int64 -> 14 logits in CHEXBERT_ORDER: 13 of (B, 4), the last (B, 2)."""

    def __init__(self, config):
        super().__init__()
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(0.1)
        self.linear_heads = nn.ModuleList(
            nn.Linear(config.hidden_size, 2 if name == "No Finding" else len(CLASSES)) for name in CHEXBERT_ORDER
        )

    def forward(self, input_ids, attention_mask):
        first = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]  # of [CLS]: (B, hidden)
        first = self.dropout(first)
        return [head(first) for head in self.linear_heads]


class CheXbertLabeller:
    """A CheXbert network with its tokenizer; label(texts) is what label_report is for one text."""

    def __init__(self, network, tokenizer):
        self.network, self.tokenizer = network.eval(), tokenizer

    def encode(self, text):
        """-> list of at most 512 ids, [CLS] first and [SEP] last."""
        ids = self.tokenizer(readable(" ".join(text.split())), verbose=False)["input_ids"]
        return ids if len(ids) <= MAX_TOKENS else ids[: MAX_TOKENS - 1] + [self.tokenizer.sep_token_id]

    @torch.inference_mode()
    def label(self, texts, batch_size=32):
        """
        texts: N strings -> N dicts {condition: 1, 0, -1 (uncertain) or None (blank)}, the 14 in the order of
        CONDITIONS.
        """
        if isinstance(texts, str):
            raise TypeError("label takes a list of texts, not one text")
        device = next(self.network.parameters()).device
        encoded = [self.encode(text) for text in texts]
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # a batch is padded to its longest text
        results = [None] * len(encoded)
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            ids = nn.utils.rnn.pad_sequence(
                [torch.tensor(encoded[i]) for i in rows], batch_first=True, padding_value=self.tokenizer.pad_token_id
            )
            lengths = torch.tensor([len(encoded[i]) for i in rows])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            logits = self.network(ids.to(device), mask.to(device))
            classes = torch.stack([head.argmax(dim=1) for head in logits], dim=1).tolist()  # (B, 14)
            for i, row in zip(rows, classes, strict=True):
                found = {name: CLASSES[c] for name, c in zip(CHEXBERT_ORDER, row, strict=True)}
                results[i] = {name: found[name] for name in CONDITIONS}
        return results


def load_chexbert(checkpoint, encoder, device="cpu"):
    """
    checkpoint: path of chexbert.pth; encoder: folder with the config.json and vocab.txt of bert-base-uncased
    -> CheXbertLabeller on `device`. InputError when a file is missing or the checkpoint's keys or shapes are not
    CheXbert's.
    """
    checkpoint, encoder = Path(checkpoint), Path(encoder)
    if not checkpoint.is_file():
        raise InputError(f"there is no CheXbert checkpoint at {checkpoint}; {WHERE}")
    missing = [name for name in ("config.json", "vocab.txt") if not (encoder / name).is_file()]
    if missing:
        raise InputError(f"{encoder} lacks {' and '.join(missing)}; CheXbert needs the folder of bert-base-uncased")
    state = load_checkpoint(checkpoint, keys=("model_state_dict",), what="CheXbert checkpoint")["model_state_dict"]
    # "module." is DataParallel's; position_ids is a buffer that newer versions of transformers no longer store
    state = {key.removeprefix("module."): value for key, value in state.items() if not key.endswith("position_ids")}
    network = CheXbert(BertConfig.from_pretrained(encoder))
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(f"{checkpoint} does not fit CheXbert on {encoder}: {why}") from error
    tokenizer = BertTokenizer.from_pretrained(encoder, do_lower_case=True)
    return CheXbertLabeller(network.to(device), tokenizer)
