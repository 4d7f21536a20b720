"""
Checkpoints of CheXQuery (best.pt), and the options of every script that writes reports with one.

    save_model(path, model, phase, thresholds=..., data=...)
    model, told = load_model("outputs/chexquery/train/001")
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from pathlib import Path

from chexquery.cases import SECTIONS, VIEWS
from chexquery.model import build_model
from shared.metrics.labels import CONDITIONS
from shared.models.hub import explained
from shared.runtime import InputError, bounded, load_checkpoint, newest_run, pick_device, positive_int, save_checkpoint

KEYS = ("chexquery", "phase", "weights", "thresholds", "data", "decoding")
MADE_UP = "The model was trained on films drawn by this project: what it says of real films means nothing."


def save_model(path, model, phase, **more):
    """more: plain values, such as thresholds, how far it got, and what it was trained on."""
    settings = model.settings | {"names": model.names}
    save_checkpoint(path, {"chexquery": settings, "phase": phase, "weights": model.own_state(), **more})


def load_model(path, device="cpu"):
    """best.pt, or a phase or run folder (its last phase) -> (CheXQuery in eval mode, the checkpoint's other values)."""
    path = find_checkpoint(path)
    state = load_checkpoint(path, KEYS, what="CheXQuery model (best.pt)")
    with explained(f"{path} is damaged, or of another version"):
        settings, data, beams = state["chexquery"], state["data"], state["decoding"]
        model = build_model(settings, vocabulary=settings.get("pieces"))
        if settings["names"] != model.names:
            raise ValueError("its queries stand in another order")
        model.load_own_state(state, path)
        cuts = state["thresholds"]
        if cuts is not None and not (len(cuts) == len(CONDITIONS) and all(-1 <= cut <= 2 for cut in cuts)):
            raise ValueError("14 thresholds are needed")
        if not (1 <= beams[0] <= 32 and 0 <= beams[1] < settings["max_tokens"] and type(beams[0]) is int):
            raise ValueError(f"it writes with {beams}")
        kinds = {"name": str, "phantom": bool, "drawn": (dict, type(None)), "again": dict, "patients": list}
        if not data["views"] or not set(data["views"]) <= set(VIEWS) or data["section"] not in SECTIONS or not all(
            isinstance(data[key], kind) for key, kind in kinds.items()
        ):  # fmt: skip
            raise ValueError("what it was trained on cannot be read")
    more = {k: v for k, v in state.items() if k not in ("weights", "chexquery")}
    return model.to(device).eval(), more | {"path": str(path)}


UNTRAINED = dict(
    vision_model="tiny:siglip", text_model="tiny:t5", condition_model="tiny:bert", image_size=56, patch_size=14,
    width=64, vision_layers=1, text_layers=1, vocabulary=256, num_layers=1, num_heads=2, num_pool_queries=3,
    dropout=0.0, aux_dropout=0.0, gate=True, gate_hidden=32, regions=True, conditions=True, query_attention=True,
    query_init="random", lora_rank=4, lora_alpha=8.0, lora_dropout=0.0, prompt="", max_tokens=12, seed=0,
)  # fmt: skip


def untrained(**changes):
    """The smallest model, of random weights, for dry runs and tests -> (model, what a checkpoint would say)."""
    model = build_model(UNTRAINED | changes, ["The heart is enlarged. No effusion or pneumothorax is seen."])
    data = {"name": "phantom", "phantom": True, "section": "findings", "views": list(VIEWS), "drawn": {}, "again": {},
            "patients": []}  # fmt: skip
    told = {"path": "untrained", "phase": 0, "thresholds": [0.5] * len(CONDITIONS), "data": data, "decoding": [1, 0]}
    return model.eval(), told


def find_checkpoint(path):
    path = Path(path)
    if path.is_dir():
        found = [path / "best.pt", *(path / f"phase{n}" / "best.pt" for n in (3, 2, 1))]
        return next((p for p in found if p.is_file()), path / "best.pt")
    return path


def add_writing_options(group):
    # fmt: off
    group.add_argument("--checkpoint", metavar="PATH", help="best.pt, or a run folder (default: the newest run)")
    group.add_argument("--batch-size", type=positive_int, default=32, help="reports at once (%(default)s)")
    group.add_argument("--beams", type=bounded(int, 1, 32), help="1 is greedy (default: as trained)")
    group.add_argument("--min-tokens", type=bounded(int, 0, 1024),
        help="shortest report, in tokens (default: as trained)")
    group.add_argument("--length-penalty", type=bounded(float, -10, 10), default=1.1,
        help="above 1: longer reports, with beams (%(default)s)")
    # fmt: on


def open_model(args):
    """
    -> (model on its device, what its checkpoint says with "device", arguments of model.write). Without --checkpoint the
    newest run is taken; a dry run without one takes an untrained model. InputError where there is none.
    """
    path = args.checkpoint or (None if args.dry_run else newest_run("chexquery", "train", "phase*/best.pt"))
    if path is None and not args.dry_run:
        raise InputError("there is no trained model: train one with chexquery/train.py, or give --checkpoint PATH")
    device, _ = pick_device(args.device)
    model, told = load_model(path, device) if path else untrained()
    if told["data"]["phantom"]:
        print(f"*** PHANTOM: {MADE_UP} ***")
    beams, shortest = told["decoding"]
    decoding = {"beams": args.beams or beams, "min_tokens": shortest if args.min_tokens is None else args.min_tokens}
    if decoding["min_tokens"] >= model.settings["max_tokens"]:
        raise InputError(f"--min-tokens {args.min_tokens}: this model writes at most {model.settings['max_tokens']}")
    return model, told | {"device": device}, decoding | {"length_penalty": args.length_penalty}
