"""
A GRPO step of train_grpo.py against trl's GRPOTrainer: the same model, prompts, group size, lengths, LoRA, loss and KL,
in one run.

Usage:
    pip install -r requirements-dev.txt
    python benchmarks/grpo.py                   # leave the machine alone meanwhile
    python benchmarks/grpo.py --small           # the short form for tests: everything runs, the numbers mean nothing

Rows:
    ours                    prompts shared by their samples, log-probabilities in chunks
    ours, nothing shared    every rollout a text of its own in the log-probability passes (--checkpointing without
                            recomputing)
    ours, merged            the adapter is added to the weights while answers are sampled, and taken out again
    ours, with V            the default reward: answers are scored again on edited images (trl has no such thing)
    trl                     GRPOTrainer, dapo loss, beta 0.02, LoRA (reference = adapter switched off), no gradient
                            checkpointing
    trl, checkpointing      the same as it comes

The model is tiny:qwen2vl with random weights and a vocabulary of --vocab tokens, so that what it writes hardly ever
ends: every rollout has --tokens tokens. The reward is the same function of the tokens for all. Each row runs in a
process of its own, once per round, taking turns. Seconds per step: median over the steps after the first ones and the
rounds. Memory: growth of the process's peak over what it held with model and libraries loaded. Prints a table and
writes --out-dir/metrics.json.
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
import torch
from PIL import Image

from benchmarks.vqa_sft import Clock, memory, reset_peak
from shared.models.loading import LORA_LAYERS, load_vlm
from shared.runtime import InputError, positive_int, run_facts, script, seed_everything, write_json
from shared.training import Weights
from vqa_sft_grpo import rollouts, train_grpo
from vqa_sft_grpo.grpo import group_advantages
from vqa_sft_grpo.looking import Statement
from vqa_sft_grpo.prompting import build_prompt
from vqa_sft_grpo.rewards import RewardSettings
from vqa_sft_grpo.rows import make_rows, read_rows, write_rows

ROWS = ("ours", "ours, nothing shared", "ours, merged", "ours, with V", "trl", "trl, checkpointing")
LR = 1e-4


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=positive_int, default=32768, help="tokens the model knows (%(default)s)")
    parser.add_argument("--prompts", type=positive_int, default=4, help="questions per step (%(default)s)")
    parser.add_argument("--num-generations", type=positive_int, default=8, help="answers to each (%(default)s)")
    parser.add_argument("--tokens", type=positive_int, default=64, help="length of an answer (%(default)s)")
    # fmt: off
    parser.add_argument("--image-size", type=positive_int, default=224,
        help="pixels; 28 x 28 are a token (%(default)s)")
    # fmt: on
    parser.add_argument("--steps", type=positive_int, default=6, help="steps that are timed (%(default)s)")
    parser.add_argument("--skip", type=positive_int, default=2, help="steps before the clock starts (%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="turns of each row (%(default)s)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="which rows (all)")
    parser.add_argument("--small", action="store_true", help="a few steps of each row, once")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks/grpo"))
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)  # the process of one row
    args = parser.parse_args(argv)
    if args.small:
        args.vocab, args.prompts, args.num_generations, args.tokens, args.image_size = 2048, 2, 2, 6, 56
        args.steps, args.skip, args.rounds = 2, 1, 1
    return args


def build_model(args):
    """tiny:qwen2vl with a larger vocabulary -> its folder."""
    seed_everything(0)
    vlm = load_vlm("tiny:qwen2vl")
    vlm.model.resize_token_embeddings(args.vocab, mean_resizing=False)
    vlm.model.save_pretrained(args.out_dir / "model")
    vlm.processor.save_pretrained(args.out_dir / "model")


def reward_of(ids):
    """Some number of the tokens, the same for ours and trl."""
    return len({i % 7 for i in ids}) + ids[0] % 5 / 5


# ---------------------------------------------------------------------------------------------------------------- rows


def train_ours(args, rows, clock, shared_prompts, with_v, merged):
    options = (
        f"--sft-ckpt {args.out_dir / 'model'} --num-generations {args.num_generations} --batch-size {args.prompts}"
        f" --max-new-tokens {args.tokens} --scale-rewards group --beta 0.02 --lr {LR} --dtype float32 --device cpu"
    )
    settings = train_grpo.parse_args(options.split())
    vlm = train_grpo.load_policy(settings, torch.device("cpu"))
    vlm.base.generation_config.eos_token_id = []  # nothing ends a rollout but its length
    # the log-probability pass shares prompts unless activations are recomputed
    settings.checkpointing = not shared_prompts
    trained = list(Weights(vlm.model).values())
    optimizer, scaler = torch.optim.AdamW(trained, lr=LR), torch.amp.GradScaler("cpu", enabled=False)
    reward = RewardSettings(weights=(0.2, 0.4, 0.2, 0.2 if with_v else 0.0), max_tokens=args.tokens)
    policy = rollouts.Policy(vlm, settings, reward)
    if with_v:  # random text has no answer: here the last token of every rollout counts as one
        policy.statement_of = lambda ids, *rest: Statement(tuple(ids), (False,) * (len(ids) - 1) + (True,), False)
    clock.held, clock.ready = reset_peak(), time.perf_counter()
    for step in range(args.skip + args.steps):
        some = [rows[(step * args.prompts + i) % len(rows)] for i in range(args.prompts)]
        if merged:
            vlm.model.merge_adapter()
        batch = policy.roll_out(some, list(range(args.prompts)), torch.Generator().manual_seed(step))
        if merged:
            vlm.model.unmerge_adapter()
        ids = batch.flat
        advantages = group_advantages([reward_of(i) for i in ids], args.num_generations, "group")[0].float()
        with rollouts.as_reference(vlm):
            ref = policy.fixed_logprobs(batch)
        policy.loss_and_gradient(batch, advantages, None, ref, scaler)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick()
    return statistics.mean(map(len, ids))


def train_trl(args, rows, clock, checkpointing):
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    lengths = []

    class Tick(TrainerCallback):
        def on_train_begin(self, *arguments, **options):
            clock.held, clock.ready = reset_peak(), time.perf_counter()

        def on_step_end(self, *arguments, **options):
            clock.tick()

    def reward(completion_ids, **_):
        lengths[:] = map(len, completion_ids)
        return [reward_of(ids) for ids in completion_ids]

    count = args.prompts * args.num_generations
    config = GRPOConfig(
        output_dir=str(args.out_dir / "trl"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        max_steps=args.skip + args.steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        per_device_train_batch_size=count,
        gradient_accumulation_steps=1,
        num_generations=args.num_generations,
        num_iterations=1,
        max_completion_length=args.tokens,
        temperature=1.0,
        beta=0.02,
        loss_type="dapo",
        gradient_checkpointing=checkpointing,
        dataloader_pin_memory=False,
        weight_decay=0.0,
    )
    model = AutoModelForImageTextToText.from_pretrained(args.out_dir / "model")
    model.generation_config.eos_token_id = None  # nothing ends a rollout but its length, as in ours
    processor = AutoProcessor.from_pretrained(args.out_dir / "model")
    data = datasets.Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": build_prompt(r["question"])}] for r in rows],
            "image": [Image.open(r["image"]).convert("RGB") for r in rows],
        }
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=processor,
        args=config,
        reward_funcs=reward,
        train_dataset=data.cast_column("image", datasets.Image()),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LORA_LAYERS, task_type="CAUSAL_LM"
        ),
        callbacks=[Tick()],
    )
    trainer.generation_config.eos_token_id = None
    trainer.train()
    return statistics.mean(lengths)


def run_one(args):
    """One row in this process; prints its numbers as the last line."""
    seed_everything(0)
    rows = read_rows(args.out_dir / "rows.json", "train")
    clock = Clock(args.skip)
    if args.one.startswith("trl"):
        import datasets  # noqa: F401  # libraries are loaded before the memory is read
        from trl import GRPOTrainer  # noqa: F401

        length = train_trl(args, rows, clock, args.one != "trl")
    else:
        of = ("nothing shared" not in args.one, "with V" in args.one, "merged" in args.one)
        length = train_ours(args, rows, clock, *of)
    ends = clock.ends[args.skip - 1 :]
    print(
        json.dumps(
            {
                "seconds_per_step": statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False)),
                "peak_growth_mib": memory("VmHWM") - clock.held,
                "tokens_per_rollout": length,
            }
        )
    )


@script
def main(argv=None):
    args = parse_args(argv)
    if args.one:
        return run_one(args)
    started = time.time()
    rows, _ = make_rows(
        "phantom", "train", image_dir=args.out_dir / "phantom_images", studies=30, image_size=args.image_size
    )
    write_rows(
        args.out_dir / "rows.json",
        [r for r in rows if r["region"] and r["answer"] == "yes"] if "ours, with V" in args.rows else rows,
    )
    build_model(args)
    found = {name: [] for name in args.rows}
    same = [
        f"--{key}={getattr(args, key.replace('-', '_'))}"
        for key in ("vocab", "prompts", "num-generations", "tokens", "steps", "skip", "out-dir")
    ]
    for _ in range(args.rounds):
        for name in args.rows:
            done = subprocess.run([sys.executable, __file__, "--one", name, *same], capture_output=True, text=True)
            if done.returncode:
                raise InputError(
                    f"the row '{name}' ended with: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}"
                )
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    table = {
        name: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} for name, rounds in found.items()
    }
    print("| row | seconds per step | peak growth MiB | tokens per rollout |\n|---|---|---|---|")
    for name, row in table.items():
        print(
            f"| {name} | {row['seconds_per_step']:.2f} | {row['peak_growth_mib']:.0f} |"
            f" {row['tokens_per_rollout']:.0f} |"
        )
    ratios = {}
    for a, b in (
        ("trl", "ours"),
        ("trl, checkpointing", "ours"),
        ("trl", "ours, nothing shared"),
        ("ours", "ours, merged"),
        ("trl", "ours, with V"),
    ):
        if a in table and b in table:
            ratios[f"{a} / {b}"] = {
                "time": table[a]["seconds_per_step"] / table[b]["seconds_per_step"],
                "memory": table[b]["peak_growth_mib"] / table[a]["peak_growth_mib"],
            }
            print(
                f"{b} against {a}: {ratios[f'{a} / {b}']['time']:.2f} x as fast, {ratios[f'{a} / {b}']['memory']:.2f} x"
                " the memory growth"
            )
    write_json(
        args.out_dir / "metrics.json",
        {
            "rows": table,
            "rounds": found,
            "ratios": ratios,
            "dataset": "phantom",
            "model": "tiny:qwen2vl",
            "settings": vars(args) | {"out_dir": str(args.out_dir)},
            **run_facts(started, "cpu"),
        },
    )
    print(f"results in {args.out_dir}")
    return table


if __name__ == "__main__":
    main()
