"""
Checkpoints of CheXQuery (best.pt), and the options of every script that writes reports with one.

    save_model(path, model, phase, thresholds=..., data=...)
    model, told = load_model("outputs/chexquery/train/001")
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

from pathlib import Path

from chexquery.model import SHAPE, VIEWS, build_model
from shared.metrics.labels import CONDITIONS
from shared.runtime import InputError, load_checkpoint, newest_run, pick_device, positive_int, save_checkpoint


def save_model(path, model, phase, **more):
    """more: plain values, such as thresholds, how far it got, and what it was trained on."""
    settings = model.settings | {"names": model.names}
    save_checkpoint(path, {"chexquery": settings, "phase": phase, "weights": model.own_state(), **more})


def load_model(path, device="cpu"):
    """best.pt, or a phase or run folder (its last phase) -> (CheXQuery in eval mode, the checkpoint's other values)."""
    path = find_checkpoint(path)
    state = load_checkpoint(path, ("chexquery", "phase", "weights"), what="CheXQuery model (best.pt)")
    settings = state["chexquery"]
    missing = [name for name in SHAPE if name not in settings]
    if missing:
        raise InputError(f"{path} was written by another version: it does not say {', '.join(missing)}")
    model = build_model(settings, vocabulary=settings.get("pieces"))
    if settings["names"] != model.names:
        raise InputError(f"{path} has its queries in another order: {', '.join(settings['names'])}")
    model.load_own_state(state["weights"], path)
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
    data = {"name": "phantom", "phantom": True, "section": "findings", "views": list(VIEWS), "drawn": {}}
    return model.eval(), {"path": "untrained", "phase": 0, "thresholds": [0.5] * len(CONDITIONS), "data": data}


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
    group.add_argument("--beams", type=positive_int, help="1 is greedy (default: as trained)")
    group.add_argument("--min-tokens", type=int, help="shortest report, in tokens (default: as trained)")
    group.add_argument("--length-penalty", type=float, default=1.1,
        help="above 1: longer reports, with beams (%(default)s)")
    # fmt: on


def open_model(args):
    """
    -> (model on its device, what its checkpoint says with "device", arguments of model.write). Without --checkpoint the
    newest run is taken; a dry run without one takes an untrained model. InputError where there is none.
    """
    path = args.checkpoint or (None if args.dry_run else newest_run("chexquery", "train", "phase1/best.pt"))
    if path is None and not args.dry_run:
        raise InputError("there is no trained model: train one with chexquery/train.py, or give --checkpoint PATH")
    device, _ = pick_device(args.device)
    model, told = load_model(path, device) if path else untrained()
    beams, shortest = told.get("decoding", [1, 0])
    decoding = {"beams": args.beams or beams, "min_tokens": shortest if args.min_tokens is None else args.min_tokens}
    return model, told | {"device": device}, decoding | {"length_penalty": args.length_penalty}
