"""
What CheXQuery learns on the phantom, what its parts are for, and how fast it trains and writes.

Usage:
    python benchmarks/chexquery.py learn                    # five severe conditions; 40 minutes on one core
    python benchmarks/chexquery.py learn --all-conditions   # all 13, severe
    python benchmarks/chexquery.py ablate                   # one part off at a time, phase 1 alone
    python benchmarks/chexquery.py speed                    # 5 minutes; leave the machine alone meanwhile
    python benchmarks/chexquery.py memory                   # a GPU: the full model's size from random weights
    python benchmarks/chexquery.py learn --small            # the short form of each: the numbers mean nothing

learn: trains chexquery/train.py, measures chexquery/evaluate.py on films of other patients, and beside it a CNN
classifier of the same films (0.5 M parameters, thresholds chosen on validation). Micro-F1 is against what was drawn.
ablate: the same for each row of ABLATIONS after phase 1 alone, whose reports hold only what is abnormal; intervals draw
patients.
speed: studies per second of training against transformers' Trainer with the same model, batches, optimiser and loss;
writing in batches with the cache against one by one and against one by one without it; an epoch of phase 1 of a model
with a frozen tower, features kept against computed. Each pair takes turns in one process, three rounds, medians.
Writes --out-dir/metrics.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from chexquery import train as trainer
from chexquery.cases import Films, phantom_rows
from chexquery.checkpoints import UNTRAINED
from chexquery.model import build_model
from chexquery.scoring import Resamples, f1_draws, interval
from shared.metrics.classification import choose_threshold
from shared.metrics.labels import CONDITIONS
from shared.models.tiny import tiny_folder
from shared.report import markdown_table, number, with_interval
from shared.runtime import peak_memory, read_json, run_facts, script, seed_everything, write_json
from shared.training import GuardedStep, Weights

FIVE = ["Pleural Effusion", "Pneumothorax", "Consolidation", "Cardiomegaly", "Edema"]  # as in vqa_sft_grpo/README.md
ABLATIONS = {
    "everything": [],
    "no gate": ["--no-gate"],
    "no regions": ["--no-regions"],
    "regions shuffled": ["--shuffle-regions"],
    "no conditions": ["--no-use-conditions"],
    "random query starts": ["--query-init", "random"],
    "no attention between queries": ["--no-query-attention"],
    "1 token": ["--num-pool-queries", "0"],
    "4 tokens": ["--num-pool-queries", "3"],
    "32 tokens": ["--num-pool-queries", "31"],
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["learn", "ablate", "speed", "memory"])
    parser.add_argument("--films", type=int, default=8000, help="phantom: studies to train on (%(default)s)")
    parser.add_argument("--epochs", type=int, nargs=3, help="of the phases (default: configs/tiny.yaml)")
    parser.add_argument("--all-conditions", action="store_true", help="all 13 severe conditions in place of five")
    parser.add_argument("--rows", nargs="+", choices=list(ABLATIONS), help="ablate: these only")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--small", action="store_true", help="seconds; the numbers mean nothing")
    parser.add_argument("--out-dir", type=Path, help="(default: outputs/benchmarks/chexquery/<what>)")
    args = parser.parse_args(argv)
    args.out_dir = args.out_dir or Path("outputs/benchmarks/chexquery") / args.what
    return args


# ------------------------------------------------------------------------------------------------------ learn, ablate


def data_flags(args):
    drawn = ["--severe"] if args.all_conditions else ["--severe", "--prevalence", 0.25, "--conditions", *FIVE]
    return ["--data", "phantom", "--films", 24 if args.small else args.films, *drawn]


def train_and_measure(args, folder, options, faithfulness):
    """chexquery/train.py and evaluate.py as a user starts them -> their metrics.json, both."""
    more = ["--views", "frontal", "--seed", args.seed, *options]
    if args.epochs:
        more += ["--epochs", *args.epochs]
    if args.small:
        more += "--epochs 1 --width 64 --vision-layers 1 --text-layers 1 --eval-studies 8".split()
    steps = (
        ["train.py", "--model", "tiny", *data_flags(args), *more, "--out-dir", folder / "train", "--overwrite"],
        ["evaluate.py", "--checkpoint", folder / "train", *data_flags(args), "--faithfulness", faithfulness,
         "--out-dir", folder / "test", "--overwrite"],
    )  # fmt: skip
    for name, *arguments in steps:
        subprocess.run([sys.executable, str(ROOT / "chexquery" / name), *map(str, arguments)], check=True)
    return read_json(folder / "train" / "metrics.json"), read_json(folder / "test" / "metrics.json")


class Classifier(nn.Sequential):
    """What a user would train for labels alone: five convolutions with batch norm, the mean, one linear layer."""

    def __init__(self, num_classes, width=32):
        layers, last = [], 1
        for n in (width, 2 * width, 4 * width, 4 * width, 8 * width):
            layers += [nn.Conv2d(last, n, 3, 2 if n > width else 1, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
            last = n
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, num_classes))


def classify(args, epochs=12, size=112):
    """-> interval of the classifier's micro-F1 against what was drawn, and its seconds."""
    drawn = {"conditions": None if args.all_conditions else FIVE, "prevalence": None if args.all_conditions else 0.25,
             "severe": True}  # fmt: skip
    studies = phantom_rows(24 if args.small else args.films, **drawn)
    names, x, y = drawn["conditions"] or list(CONDITIONS[1:]), {}, {}
    for split in ("train", "val", "test"):
        rows = studies.split(split)
        films = Films(rows, size, studies.notes["drawn"], ["frontal"]).get(list(range(len(rows))))[0][:, :1]
        x[split] = torch.from_numpy(films)
        y[split] = torch.tensor([[float(row["truth"][name]) for name in names] for row in rows])
    seed_everything(args.seed)
    started, model, batch = time.time(), Classifier(len(names)), 32
    steps = (1 if args.small else epochs) * -(-len(x["train"]) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    for step in range(steps):
        if step % -(-len(x["train"]) // batch) == 0:
            order = torch.randperm(len(x["train"])).split(batch)
        chosen = order[step % len(order)]
        loss = F.binary_cross_entropy_with_logits(model(x["train"][chosen].float() / 255), y["train"][chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        scores = {
            s: torch.cat([model(part.float() / 255) for part in x[s].split(100)]).numpy().astype(float)
            for s in ("val", "test")
        }
    both = [0 < y["val"][:, j].sum() < len(y["val"]) for j in range(len(names))]
    thresholds = [
        choose_threshold(y["val"][:, j].int().numpy(), scores["val"][:, j]) if both[j] else 0 for j in range(len(names))
    ]
    found, true = scores["test"] > np.array(thresholds), y["test"].numpy() == 1
    groups = [row["patient"] for row in studies.split("test")]
    draws = f1_draws(found, true, Resamples(len(true), groups), list(range(len(names))))
    return {"f1": interval(draws["micro"]), "seconds": time.time() - started,
            "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip


def learn(args):
    folder = args.out_dir
    training, test = train_and_measure(args, folder, [], 20 if args.small else 150)
    cnn = classify(args)
    lines, found = test["lines"], test["faithfulness"]
    pointing = found["pointing"]
    rows = [[name, with_interval(line["f1_micro_drawn"], number), with_interval(line["bleu_4"], number),
             line["diversity"]["distinct_reports"]] for name, line in lines.items()]  # fmt: skip
    rows.append([f"CNN classifier, {cnn['parameters']:,} parameters", with_interval(cnn["f1"], number), "–", "–"])
    print(markdown_table(["", "micro-F1 against what was drawn", "BLEU-4", "distinct reports"], rows))
    gone = {what: value and value["value"] for what, value in found["redrawn"].items()}
    print(
        f"trained {training['seconds'] / 60:.1f} minutes, {training['parameters']:,} parameters; redrawn: sentence gone"
        f" {gone}"
    )
    for kind, parts in pointing.items():
        print(f"{kind} maps of conditions: {number(parts['condition']['all']['times_chance'], 2)} x chance (hits),"
              f" {number(parts['condition']['all']['mass_times_chance'], 2)} x (weight)")  # fmt: skip
    return {"training": training, "test": test, "classifier": cnn}


def ablate(args):
    found, rows = {}, []
    for name in args.rows or ABLATIONS:
        folder, options = args.out_dir / name.replace(" ", "_"), ["--phase", 1, *ABLATIONS[name]]
        training, test = train_and_measure(args, folder, options, 0)
        line = test["lines"]["model"]
        found[name] = {
            "seconds": training["seconds"],
            **{k: line[k] for k in ("f1_micro_drawn", "f1_micro_13", "bleu_4")},
        }
        rows.append([name, with_interval(line["f1_micro_drawn"], number), with_interval(line["bleu_4"], number),
                     f"{training['seconds'] / 60:.1f}"])  # fmt: skip
        print(markdown_table(["", "micro-F1 against what was drawn", "BLEU-4", "minutes"], rows), flush=True)
    return found


# --------------------------------------------------------------------------------------------------------------- speed


def turns(jobs, rounds=3):
    """{name: job, which may return its own seconds} -> {name: median seconds}, taking turns; each warmed up once."""
    seconds = {name: [] for name in jobs}
    for n in range(rounds + 1):
        for name, job in jobs.items():
            started = time.time()
            own = job()
            seconds[name] += [own if isinstance(own, float) else time.time() - started] if n else []
    return {name: statistics.median(values) for name, values in seconds.items()}


def prepared(args, model=None, films=None):
    """-> (arguments of train.py, model, Split of phantom studies)."""
    flags = ["--model", "tiny", "--no-augment", "--seed", str(args.seed), "--views", "frontal", "--dropout", "0"]
    options = trainer.parse_args(flags + (["--width", "64"] if args.small else []))
    studies = phantom_rows(films or (16 if args.small else 320), conditions=FIVE, prevalence=0.25, severe=True)
    rows = studies.split("train")
    model = model or build_model(trainer.shape_of(options), [row["report"] for row in rows])
    split = trainer.Split(rows, model, options, studies.notes["drawn"])
    split.films.get(list(range(len(rows))))  # drawn before the clock starts
    return options, model, split


def training_jobs(args):
    """One epoch of ours and one of transformers' Trainer, on copies that start alike."""
    from transformers import Trainer, TrainingArguments

    options, model, split = prepared(args)
    batch, device = 8 if args.small else 16, torch.device("cpu")
    options.batch_size = [batch] * 3
    work = device, torch.float32, torch.amp.GradScaler("cpu", enabled=False), 0, 1
    model.freeze(2)
    model.train()
    weights = Weights(model)

    def ours():
        optimizer = trainer.optimizer_of(weights, options, 2)
        guard = GuardedStep(optimizer, work[2], weights.values(), 1.0)
        for start in range(0, len(split.rows), batch):
            rows = list(range(start, start + batch))
            guard.step(trainer.take_step(model, split, rows, options, 2, work, False)["loss"], 1e-4)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, rows, labels=None):
            return {"loss": trainer.losses(self.inner, split, rows.tolist(), options, 2, device, torch.float32)[0]}

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(split.rows)

        def __getitem__(self, i):
            return {"rows": i, "labels": 0}

    settings = TrainingArguments(
        str(args.out_dir / "trainer"), per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=1e-4,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, max_grad_norm=1.0, use_cpu=True,
        weight_decay=0.01,
    )  # fmt: skip
    return {
        "train.py": ours,
        # its own clock: from the first step on, without building the Trainer
        "transformers Trainer": lambda: float(
            Trainer(Wrapped(), settings, train_dataset=Rows()).train().metrics["train_runtime"]
        ),
    }, len(split.rows)


def writing_jobs(args):
    """
    Reports of 48 studies: in one batch; one by one; one by one without the cache. End tokens are held off, so that all
    write the same number of tokens.
    """
    options, model, split = prepared(args, films=16 if args.small else 48)
    model.eval()
    with torch.inference_mode():
        tokens = model(**split.inputs(list(range(len(split.rows))), torch.device("cpu"))).tokens
    length = 8 if args.small else 60

    def one_by_one(cache):
        model.text.generation_config.use_cache = cache
        for row in tokens:
            model.write(row[None], min_tokens=length, max_tokens=length)
        model.text.generation_config.use_cache = True

    return {
        "in one batch": lambda: model.write(tokens, min_tokens=length, max_tokens=length),
        "one by one": lambda: one_by_one(True),
        "one by one, no cache": lambda: one_by_one(False),
    }, len(split.rows)


def phase1_jobs(args):
    """An epoch of phase 1 with a frozen tower of the width of the full one's third: features kept, or computed."""
    sizes = dict(image_size=56 if args.small else 224, patch_size=16 if not args.small else 14)
    tower = tiny_folder(
        "tiny:siglip", **sizes, vision_hidden=128, vision_layers=2 if args.small else 12, vision_heads=4
    )
    shape = UNTRAINED | {
        "vision_model": str(tower),
        "text_model": str(tiny_folder("tiny:t5")),
        "num_heads": 4,
        "max_tokens": 96,
    }
    options, model, split = prepared(args, build_model(shape), 16 if args.small else 64)
    model.freeze(1)
    model.train()
    work = torch.device("cpu"), torch.float32, torch.amp.GradScaler("cpu", enabled=False), 0, 1
    seconds = time.time()
    split.cache(model.eval(), work[0], 16, 4.0)
    seconds, kept = time.time() - seconds, (split.patches, split.whole)
    model.train()
    weights = Weights(model)

    def epoch(patches, whole):
        split.patches, split.whole = patches, whole
        guard = GuardedStep(trainer.optimizer_of(weights, options, 1), work[2], weights.values(), 1.0)
        for start in range(0, len(split.rows), 16):
            rows = list(range(start, start + 16))
            guard.step(trainer.take_step(model, split, rows, options, 1, work, False)["loss"], 1e-4)

    return (
        {"features kept": lambda: epoch(*kept), "features computed": lambda: epoch(None, None)},
        len(split.rows),
        seconds,
    )


def speed(args):
    found = {}
    for name, make in (("training", training_jobs), ("writing", writing_jobs), ("phase 1", phase1_jobs)):
        jobs, n, *more = make(args)
        seconds = turns(jobs, 1 if args.small else 3)
        first = next(iter(seconds))
        rows = [[job, f"{s:.2f}", f"{n / s:.1f}", f"{s / seconds[first]:.2f}"] for job, s in seconds.items()]
        print(
            markdown_table([name, "seconds", "studies per second", f"times the seconds of {first}"], rows), flush=True
        )
        found[name] = {"studies": n, "seconds": seconds, "before": more}
    return found


def memory(args):
    """Full size from random weights: speed and peak GPU memory of each phase and of writing with four beams."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    big = not args.small
    tower = dict(image_size=384, patch_size=16, vision_hidden=768, vision_layers=12, vision_heads=12, vision_mlp=3072)
    decoder = dict(hidden=768, layers=12, heads=12, mlp=2048)
    shape = UNTRAINED | {
        "num_heads": 8,
        "num_layers": 2,
        "num_pool_queries": 10,
        "gate_hidden": 512,
        "max_tokens": 512,
        "lora_rank": 16,
    }
    shape |= {"vision_model": str(tiny_folder("tiny:siglip", **(tower if big else {}))),
              "text_model": str(tiny_folder("tiny:t5", **(decoder if big else {})))}  # fmt: skip
    options, model, split = prepared(args, build_model(shape).to(device), 32)
    dtype, found = torch.bfloat16 if device.type == "cuda" else torch.float32, {}
    split.ids = {phase: F.pad(ids, (0, max(0, 100 - ids.shape[1])), value=1) for phase, ids in split.ids.items()}
    work = device, dtype, torch.amp.GradScaler(device.type, enabled=False), 0, 1
    for phase, batch in ((1, 16), (2, 4), (3, 8)):
        model.freeze(phase)
        model.train()
        options.batch_size, weights = [batch] * 3, Weights(model)
        guard = GuardedStep(trainer.optimizer_of(weights, options, phase), work[2], weights.values(), 1.0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for n in range(2 if args.small else 6):
            started = time.time() if n <= 1 else started  # noqa: F821  # the first step is not timed
            guard.step(trainer.take_step(model, split, list(range(batch)), options, phase, work, False)["loss"], 1e-5)
        found[f"phase {phase}"] = {
            "studies per second": batch * (n - 1 or 1) / (time.time() - started),
            "batch": batch,
            **peak_memory(device),
        }
    model.eval()
    started = time.time()
    with torch.inference_mode():
        model.write(
            model(**split.inputs(list(range(8)), device)).tokens,
            beams=4,
            min_tokens=20,
            max_tokens=20 if args.small else 100,
        )
    found["writing, 4 beams"] = {"studies per second": 8 / (time.time() - started), "batch": 8, **peak_memory(device)}
    print(json.dumps(found, indent=2))
    return found | {"parameters": sum(p.numel() for p in model.parameters())}


@script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    found = {"learn": learn, "ablate": ablate, "speed": speed, "memory": memory}[args.what](args)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_json(args.out_dir / "metrics.json", {args.what: found, "settings": settings, **run_facts(started, "cpu")})
    print(f"numbers in {args.out_dir / 'metrics.json'} ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    main()
