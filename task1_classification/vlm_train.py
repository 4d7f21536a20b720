"""
Train classifiers on a frozen vision-language model: linear heads before and behind the projector, the projector, LoRA.

Usage:
    python task1_classification/vlm_train.py --data films.csv                      # MedGemma 4B; A and B
    python task1_classification/vlm_train.py --data films.csv --mode head projector-head random-projector projector
    python task1_classification/vlm_train.py --model tiny:llava --data phantom --severe    # offline, minutes
    python task1_classification/vlm_train.py --resume outputs/task1_classification/vlm_train/001
    python task1_classification/vlm_train.py --dry-run

--mode head               A: a linear head on the mean of the tower's tokens
       projector-head     B: a linear head on the mean of the projector's output, the projector frozen
       random-projector   B with a projector of random numbers, the control
       projector          C: B and the projector, beginning as the trained B of the same seed
       lora               D: B and low-rank adapters in the tower, beginning as B; rank: as many numbers as projector
       cnn                task 1's ResNet-18 on the same films, 64 px
Several modes and --seeds are trained one after the other on features computed once. What tuning the projector adds is
C - B; C and D bring B along. The tower is frozen only where it is pretrained: a bare tiny model first learns to see on
films of another drawn hospital (--mode tower does that alone), and the seconds are counted.

Loss: masked binary cross-entropy, positives weighted up. The epoch, B itself being epoch 0 of C and D, is chosen by the
loss on validation (an AUC over four positives is mostly noise); test is never read.

Writes seed<n>-<mode>/best.pt for vlm_evaluate.py, history.jsonl,
metrics.json, figures/curves.png, and model/ where a tower was trained here. --resume goes on exactly.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import numpy as np
import torch
from torch import nn

from shared.models.hub import QUANTS
from shared.models.loading import DTYPES, save_vlm, unfreeze
from shared.models.tiny import is_tiny, quietly
from shared.report import draw_history
from shared.runtime import InputError, add_resume, bounded, not_negative, open_run_dir, pick_device
from shared.runtime import positive_float, positive_int, read_json, run_facts, save_checkpoint, script, script_parser
from shared.runtime import seed_everything, write_json, write_jsonl
from shared.training import GuardedStep, StopSignal, Weights, learning_rate, load_state, refuse_other_settings
from shared.training import save_state, settings_of
from task1_classification.vlm_data import add_film_options, auc_by_label, films_of, mean_of, measure_line
from task1_classification.vlm_data import phantom_films
from task1_classification.vlm_model import FORMAT, MEANS, MODES, NEED_PROJECTOR, Bank, Encoder, check_gradients
from task1_classification.vlm_model import class_weights, inputs_of, load_encoder, load_probe, lora_weights
from task1_classification.vlm_model import make_probe, make_store, masked_loss, matching_rank, predict, put_lora
from task1_classification.vlm_model import small_films

TASK = "task1_classification"
DEFAULT = "google/medgemma-4b-it"
ASIDE = ("cache_gib", "mode", "seeds")  # a resumed run may change these: more modes or seeds can be added
BEGIN_AS_B = ("projector", "lora")


def parse_args(argv=None):
    parser = script_parser(__doc__, task=TASK, data="a table of vlm_prepare.py or iu_xray")
    add_film_options(parser)
    # fmt: off
    g = parser.add_argument_group("model")
    g.add_argument("--model", default=DEFAULT, help="hub name, folder, tiny:gemma3, tiny:llava, ... (%(default)s)")
    g.add_argument("--quant", default="none", choices=QUANTS, help="how the weights are held (%(default)s)")
    g.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="to compute the tower in (%(default)s)")
    g.add_argument("--mode", nargs="+", default=["head", "projector-head"], choices=[*MODES, "tower"],
        help="what to train; see above")
    g.add_argument("--lora-rank", type=bounded(int, 1, 1024),
        help="of the adapters (default: as many numbers as the projector)")
    g.add_argument("--cache-gib", type=positive_float, default=4.0, metavar="GIB",
        help="memory for the tower's tokens; where they do not fit it runs again for each batch (%(default)s)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--seeds", type=bounded(int, 1, 1000), default=5,
        help="trainings of each mode, from --seed on (%(default)s)")
    g.add_argument("--head-epochs", type=positive_int, default=60, help="of A, B and the control (%(default)s)")
    g.add_argument("--epochs", type=positive_int, default=10, help="of C, D and the CNN (%(default)s)")
    g.add_argument("--batch-size", type=positive_int, default=64, help="films per step (%(default)s)")
    g.add_argument("--lr", type=positive_float, default=0.01,
        help="of the head, AdamW; a tenth for the trained heads of C and D, and for the CNN (%(default)s)")
    g.add_argument("--projector-lr", type=positive_float, default=1e-4,
        help="of projector and adapters; ten times as much below 100 M parameters (%(default)s)")
    g.add_argument("--weight-decay", type=not_negative, default=0.01, help="of AdamW (%(default)s)")
    g = parser.add_argument_group("tower", "of a bare tiny model, trained here first")
    g.add_argument("--tower-films", type=bounded(int, 1, 100_000), default=4000, help="drawn for it (%(default)s)")
    g.add_argument("--tower-steps", type=positive_int, default=1500, help="of 32 films (%(default)s)")
    # fmt: on
    add_resume(g)
    args = parser.parse_args(argv)
    if args.dry_run:
        args.data, args.device, args.films, args.tower_films, args.tower_steps = "phantom", "cpu", 24, 16, 2
        args.model = args.model if is_tiny(args.model) else "tiny:llava"
        args.seeds, args.head_epochs, args.epochs, args.severe = min(args.seeds, 2), 2, 2, True
    if "tower" in args.mode and (len(args.mode) > 1 or not is_tiny(args.model)):
        parser.error("--mode tower stands alone, and is for tiny models: others are pretrained")
    return args


# ---------------------------------------------------------------------------------------------------------------- tower


def train_tower(encoder, args, folder):
    """
    Teach tower and projector of a tiny model to see: the labels of drawn films of another hospital, read from every
    single token, so that each knows of the whole film as in a large tower -> facts. The model is written to `folder`.
    """
    started = time.time()
    films = phantom_films(args.tower_films, args.image_size or 112, args.seed + 100_000, args.conditions, args.severe,
                          ("train", "val"))  # fmt: skip
    store, rows = make_store(encoder, films, args.cache_gib), films.rows_of("train")
    if encoder.vlm:
        parameters = [*unfreeze(encoder.vlm, "tower"), *unfreeze(encoder.vlm, "projector")]
    else:
        parameters = list(encoder.dual.vision_model.requires_grad_(True).parameters())

    def look(some):
        tokens = encoder.tower(store.get([store.number_of[i] for i in some]))
        return torch.stack(encoder.project(encoder.projector, tokens) if encoder.vlm else tokens).float()

    with torch.no_grad():
        width = look(rows[:1]).shape[-1]
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(films.labels))).to(encoder.device)
    parameters += head.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    guard = GuardedStep(optimizer, torch.amp.GradScaler(encoder.device.type, enabled=False), parameters, 1.0)
    truth = torch.from_numpy(films.truth).to(encoder.device)
    weight, generator = class_weights(truth[rows]), np.random.default_rng(args.seed)
    state, begun, written = folder.with_name("tower.pt"), 0, time.time()
    parts = {"weights": Weights(encoder.model), "head": head, "optimizer": optimizer}
    saved = state, parts, settings_of(args, ASIDE), {"fingerprint": films.fingerprint()}
    if args.resume and state.exists():
        begun = load_state(*saved)["step"]
    with StopSignal() as stop:
        for step in range(args.tower_steps):
            some = generator.choice(rows, min(32, len(rows)), replace=False)
            if step < begun:
                continue
            logits = head(look(some))  # (B, T, L)
            each = truth[some][:, None].expand_as(logits)
            loss = masked_loss(logits.flatten(0, 1), each.flatten(0, 1), weight)
            loss.backward()
            guard.step(loss.item(), learning_rate(step, args.tower_steps, args.tower_steps // 20, 1e-3))
            if (step + 1) % max(1, args.tower_steps // 5) == 0:
                print(f"tower: step {step + 1}/{args.tower_steps}  loss {loss.item():.3f}", flush=True)
            if stop.requested() or time.time() - written > 60:
                save_state(*saved, step=step + 1)
                written = time.time()
            if stop.requested():
                stop.exit(folder.parent)
    val = films.rows_of("val")
    with torch.no_grad():
        logits = torch.cat([head(look(val[i : i + 64])).mean(1).cpu() for i in range(0, len(val), 64)])
    encoder.model.requires_grad_(False)
    facts = {"films": len(rows), "steps": args.tower_steps, "seconds": round(time.time() - started, 1)}
    facts |= {"val_auc_by_label": auc_by_label(films.truth[val], logits.numpy(), films.labels)}
    facts["val_auc"] = mean_of(facts["val_auc_by_label"].values())
    print(f"tower: macro-AUC {facts['val_auc'] or 0:.3f} on other drawn films, {facts['seconds']:.0f} s", flush=True)
    with quietly():
        if encoder.vlm:
            save_vlm(encoder.vlm, folder)
        else:
            encoder.dual.save_pretrained(folder)
            encoder.processor.save_pretrained(folder)
    write_json(folder / "training.json", facts | {"phantom": True})
    state.unlink(missing_ok=True)
    return facts


# --------------------------------------------------------------------------------------------------------- one training


def validate(mode, probe, bank, films, encoder, truth, weight):
    rows = films.rows_of("val")
    logits = predict(mode, probe, bank, films, rows, encoder)
    loss = masked_loss(logits, truth[rows].cpu(), weight.cpu())
    return {"val_auc": mean_of(auc_by_label(truth[rows].cpu().numpy(), logits.numpy(), films.labels).values()),
            "val_loss": float(loss)}  # fmt: skip


def train(mode, probe, bank, films, encoder, args, seed, folder, settings, stop, run_dir):
    """Train one probe -> (history, best row, seconds per epoch); the best weights are put into it."""
    epochs = args.head_epochs if mode in MEANS else args.epochs
    usable = films.usable("train", "val")
    truth = torch.from_numpy(np.where(usable, films.truth, np.nan)).to(encoder.device)
    rows, weight = films.rows_of("train"), class_weights(truth[films.rows_of("train")])
    weights = trained_weights(mode, probe, encoder)
    rate = args.lr / 10 if mode == "cnn" else args.projector_lr * (10 if encoder.small else 1)
    head_rate = args.lr / 10 if mode in BEGIN_AS_B else args.lr  # their head is trained already
    heads = [p for name, p in weights.items() if name.startswith("head.")]
    others = [p for name, p in weights.items() if not name.startswith("head.")]
    if mode == "cnn":
        weights.update(probe.named_buffers())  # batch statistics belong to the weights of an epoch
    groups = [{"params": some, "lr": lr} for some, lr in ((heads, head_rate), (others, rate)) if some]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    guard = GuardedStep(optimizer, torch.amp.GradScaler(encoder.device.type, enabled=False), weights.values(), 1.0)
    saved = {"weights": weights, "optimizer": optimizer}, settings, {"fingerprint": films.fingerprint()}
    history, checked, last = [], False, folder / "last.pt"
    if mode != "cnn":
        history = [{"epoch": 0, **validate(mode, probe, bank, films, encoder, truth, weight)}]
    best = {"row": history[0] if history else None, "weights": copied(weights)}
    if args.resume and last.exists():
        then = load_state(last, *saved)
        history, best = then["history"], then["best"]
    seconds, written = [], time.time()
    while (epoch := (history[-1]["epoch"] if history else 0) + 1) <= epochs:
        begin, total = time.time(), 0.0
        order = rows[np.random.default_rng([seed, epoch]).permutation(len(rows))]  # known from seed and epoch alone
        probe.train(mode == "cnn")
        for start in range(0, len(order), args.batch_size):
            batch = order[start : start + args.batch_size]
            x = inputs_of(mode, bank, films, batch, encoder)
            if mode == "cnn":  # no flips: left and right matter
                dx, dy = np.random.default_rng([seed, epoch, start]).integers(-3, 4, 2).tolist()
                x = torch.roll(x, (dx, dy), (2, 3))
            loss = masked_loss(probe(x), truth[batch], weight)
            loss.backward()
            checked = checked or check_gradients(mode, probe, encoder)
            guard.step(loss.item())
            total += loss.item() * len(batch)
        seconds.append(time.time() - begin)
        row = {"epoch": epoch, "train_loss": total / len(order)}
        row |= validate(mode, probe, bank, films, encoder, truth, weight)
        history.append(row)
        if best["row"] is None or row["val_loss"] < best["row"]["val_loss"]:
            best = {"row": row, "weights": copied(weights)}
        if stop.requested() or time.time() - written > 60:
            save_state(last, *saved, history=history, best=best)
            written = time.time()
        if stop.requested():
            stop.exit(run_dir)
    weights.load_state_dict(best["weights"])
    return history, best["row"], seconds


def trained_weights(mode, probe, encoder):
    weights = Weights(probe)
    if mode == "lora":
        weights.update(lora_weights(encoder))
    return weights


def copied(weights):
    return {name: p.detach().cpu().clone() for name, p in weights.items()}


def job(mode, seed, bank, films, encoder, args, run_dir, stop):
    """One mode and seed -> facts for metrics.json; writes best.pt, or takes the one that is there."""
    folder = run_dir / f"seed{seed}-{mode}"
    settings = settings_of(args, ASIDE) | {"seed": seed}
    if args.resume and (folder / "best.pt").exists():
        state = load_probe(folder / "best.pt", mode)
        refuse_other_settings(settings, state["settings"], folder / "best.pt")
        other = mode != "cnn" and state.get("base") != encoder.digest
        if other or state["data"].get("fingerprint") != films.fingerprint():
            raise InputError(f"{folder / 'best.pt'} was trained on other films, labels or weights; start a new run")
        return state["told"], state["history"]
    started = time.time()
    width = 0 if mode == "cnn" else (bank.before if mode == "head" else bank.behind).shape[1]
    probe = make_probe(encoder, mode, len(films.labels), width, seed)
    rows, rank, take_off = films.rows_of("train"), None, lambda: None
    if mode == "cnn":
        pixels = small_films(films)[rows].float() / 255
        probe.scale.copy_(torch.tensor([pixels.mean(), pixels.std()]))
    elif mode in BEGIN_AS_B:
        path = run_dir / f"seed{seed}-projector-head" / "best.pt"
        start = load_probe(path, "projector-head", encoder.family, films.labels)
        probe.load_state_dict(start["weights"], strict=False)
        if mode == "lora":
            rank = args.lora_rank or matching_rank(encoder)
            take_off = put_lora(encoder, rank, seed)
    else:
        if mode == "random-projector":
            bank.look_through(probe)
        probe.standardise(bank.means(rows, MEANS[mode]))
    torch.manual_seed(seed)
    history, best, seconds = train(mode, probe, bank, films, encoder, args, seed, folder, settings, stop, run_dir)
    trainable = sum(p.numel() for p in trained_weights(mode, probe, encoder).values())
    told = {"mode": mode, "seed": seed, "trainable_parameters": trainable, "lora_rank": rank,
            **{k: best[k] for k in ("epoch", "val_auc", "val_loss")}, "seconds": round(time.time() - started, 2),
            "seconds_per_epoch": float(np.median(seconds)) if seconds else None}  # fmt: skip
    kept = {k: v for k, v in probe.state_dict().items() if mode in ("projector", "cnn") or "projector." not in k}
    kept |= lora_weights(encoder) if mode == "lora" else {}
    where = {k: v for k, v in encoder.facts().items() if k != "parameters"}
    save_checkpoint(folder / "best.pt", {
        "format": FORMAT, "mode": mode, **where, "labels": list(films.labels),
        "weights": {k: v.detach().cpu() for k, v in kept.items()}, "lora_rank": rank, "validation": best, "seed": seed,
        "trainable": trainable, "data": {"fingerprint": films.fingerprint()}, "settings": settings,
        "told": told, "history": history, "base": None if mode == "cnn" else encoder.digest,
    })  # fmt: skip
    (folder / "last.pt").unlink(missing_ok=True)
    take_off()
    print(f"{mode:17} seed {seed}: epoch {best['epoch']:3d}, macro-AUC {best['val_auc'] or 0:.3f} on validation,"
          f" {trainable:,} numbers trained, {told['seconds']:.1f} s", flush=True)  # fmt: skip
    return told, history


# ----------------------------------------------------------------------------------------------------------------- main


def modes_of(args, encoder):
    """The modes in the order of training; C and D need B."""
    wanted = set(args.mode) | ({"projector-head"} if set(args.mode) & set(BEGIN_AS_B) else set())
    if wanted & set(NEED_PROJECTOR):
        encoder.projector  # noqa: B018  # InputError for a model without one
    return [mode for mode in MODES if mode in wanted]


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    seed_everything(args.seed)
    device, _ = pick_device(args.device, args.dtype)
    films = films_of(args, TASK).part("train", "val")
    unusable = [n for n, fine in zip(films.labels, films.usable("train", "val"), strict=True) if not fine]
    if unusable:
        print(f"left out, one kind only in train or val: {', '.join(unusable)}")
    if len(unusable) == len(films.labels):
        raise InputError(f"no label of {films.name} has both kinds of films in train and in val: there is nothing to"
                         " learn")  # fmt: skip
    alone = args.mode == ["cnn"]
    encoder = Encoder(device=device) if alone else load_encoder(args.model, args.quant, args.dtype, device)
    modes = [] if args.mode == ["tower"] else modes_of(args, encoder)
    run_dir = open_run_dir(args, TASK, "vlm_train")
    tower = None
    if is_tiny(args.model) and not alone:
        trained = run_dir / "model"
        told = trained / "training.json"
        tower = read_json(told) if args.resume and told.is_file() else train_tower(encoder, args, trained)
        encoder = load_encoder(str(trained), args.quant, args.dtype, device)
    results, histories, clock = [], {}, time.time()
    bank = None
    if any(mode != "cnn" for mode in modes):
        store = make_store(encoder, films, args.cache_gib)
        bank = Bank(encoder, store, args.cache_gib, tokens=bool(set(modes) - {"head", "projector-head", "cnn"}))
        clock = time.time() - clock
        print(f"{store}; tower run once, {clock:.1f} s; tokens {bank.gib:.2f} GiB,"
              f" {'kept' if bank.keeps else 'not kept'}", flush=True)  # fmt: skip
    with StopSignal() as stop:
        for seed in range(args.seed, args.seed + args.seeds):
            for mode in modes:
                told, history = job(mode, seed, bank, films, encoder, args, run_dir, stop)
                results.append(told)
                histories[f"seed {seed}, {mode}"] = history
    write_jsonl(run_dir / "history.jsonl", [{"run": name, **row} for name, rows in histories.items() for row in rows])
    share = len(films.rows_of("train")) / len(films.rows)
    tower_seconds = {"train_and_val": clock, "train": clock * share} if bank is not None else None
    write_json(run_dir / "metrics.json", {
        "dataset": films.facts(), "split": "val", **encoder.facts(), "tower_trained_here": tower,
        "left_out_labels": unusable, "trainings": results, "features_seconds": tower_seconds, "seed": args.seed,
        "settings": settings_of(args, ASIDE), **run_facts(started, device),
    })  # fmt: skip
    if histories:
        shown = {"train_loss": "training loss", "val_loss": "validation loss", "val_auc": "macro-AUC on validation"}
        panels = [(text, {f"{mode} {key}": mode for mode in modes}) for key, text in shown.items()]  # a colour per mode
        title = f"{films.name}, {args.model}: {', '.join(modes)}"
        histories = {
            run: [
                {"epoch": row["epoch"], **{f"{run.split(', ')[1]} {key}": row.get(key) for key in shown}}
                for row in rows
            ]
            for run, rows in histories.items()
        }
        draw_history(run_dir / "figures" / "curves.png", histories, panels, "epoch", title, films.phantom)
        print(measure_line(run_dir, films, args))
    print(f"results in {run_dir} ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    main()
