"""
GRPO for a vision-language model in one file: answer each question about an image several times, and make the answers
that turned out right likelier than the wrong ones. Plain PyTorch, one loop, one reward that can be checked.

Usage:
    python vqa_sft_grpo/grpo_minimal.py                # Qwen2-VL 2B with LoRA, one GPU, made-up chest films
    python vqa_sft_grpo/grpo_minimal.py --data data/train.json --sft_ckpt checkpoints/qwen2vl_sft
    python vqa_sft_grpo/grpo_minimal.py --data L/rows.json --sft_ckpt L/weak --questions 16 --lr 1e-3 --steps 40
    python vqa_sft_grpo/grpo_minimal.py --dry-run      # everything once, seconds

Expected of the third, a minute on a laptop (L: 90/ of benchmarks/grpo_ladder.py): docs/results/vqa_sft_grpo.md.
Writes to the run folder: the LoRA adapter with the best validation accuracy, history.jsonl, metrics.json. evaluate.py
and infer.py take it as --sft_ckpt. In a notebook, paste this file and change its last line to main(["--dry-run"]).

Four steps (DeepSeekMath, arXiv 2402.03300, section 4.1, without its KL term and with one update per batch)
    1  sample   --group answers to each of --questions questions, from the model as it is now
    2  reward   1 for a right answer in the right form, else 0: a rule and not a model, so there is nothing to flatter
    3  compare  advantage = (reward - mean of its group) / spread of its group, so no value network has to be trained
    4  learn    one gradient step: tokens of better answers become likelier, tokens of worse ones less likely
The image is in every pass. Log-probabilities computed without it would be those of another model than the one that
answered, and training would run on quietly, so the first step compares them with the sampler's.

What train_grpo.py has in addition, and when you need it
    KL to a reference model    answers drift from what the model could say before, or find a way to trick the reward
    old policy, clipping       several gradient steps on the same answers, because sampling takes most of the time
    no division by the spread  rewards with small parts: divided by it, 0.01 of one counts as much as right or wrong
    graded rewards             open answers of several words, boxes, contradictions, padding, copied questions
    weights of rare answers    most gold answers are the same, so that always saying it earns most
    V                          right answers for a wrong reason: does the answer change when the finding is gone?
    warm-up and decay, --resume, alarms, every rollout in a log           runs of hours
    checkpointing, passes that get smaller when memory ends, 4-bit weights    larger models, smaller GPUs
"""

import json
import random
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))  # finds shared/ from any folder; in a notebook, cd to the project first

import shared  # noqa: F401, isort: skip  # before transformers
import torch

from shared.data.images import read_pixels
from shared.models.loading import add_lora, load_vlm, save_vlm
from shared.models.passes import logprobs, make_prompts, never_drawn, sample, text_of
from shared.phantom import phantom_study
from shared.runtime import InputError, bounded, command, open_run_dir, pick_device, positive_float, positive_int
from shared.runtime import read_json, run_facts, script, script_parser, seed_everything, write_json, write_jsonl
from shared.training import GuardedStep

BASE_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
PROMPT = (  # as in MedVLM-R1 (arXiv 2502.19634); word for word the "think" prompt of train_sft.py and evaluate.py
    "Answer the question. First write what you see between <think> and </think>, "
    "then the answer in a few words between <answer> and </answer>.\nQuestion: {}"
)
FIELDS = ("image", "question", "answer", "split", "dataset", "policy", "overlap")  # of a row


def parse_args(argv=None):
    parser = script_parser(__doc__, task="vqa_sft_grpo")
    g = parser.add_argument_group("data and model")
    # fmt: off
    g.add_argument("--data", default="phantom", metavar="FILE",
        help="rows of prepare_data.py --output, or phantom: 1,000 films drawn here (%(default)s)")
    g.add_argument("--model", help=f"hub name, folder or tiny (default: that of --sft-ckpt, else {BASE_MODEL})")
    g.add_argument("--sft-ckpt", metavar="FOLDER", help="of train_sft.py: an adapter, to go on with, or a whole model")
    g = parser.add_argument_group("GRPO")
    g.add_argument("--steps", type=positive_int, default=200, help="gradient steps (%(default)s)")
    g.add_argument("--questions", type=positive_int, default=4, metavar="Q", help="questions per step (%(default)s)")
    g.add_argument("--group", type=bounded(int, 2, 1000), default=8, metavar="G", help="answers to each (%(default)s)")
    g.add_argument("--max-new-tokens", type=positive_int, default=128, help="longest answer (%(default)s)")
    g.add_argument("--lr", type=positive_float, default=1e-5, help="of AdamW; the tiny model: 1e-3 (%(default)s)")
    g.add_argument("--eval-every", type=positive_int, default=25, help="steps between validations (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.dry_run:
        args.data, args.model, args.device, args.limit = "phantom", None if args.sft_ckpt else "tiny", "cpu", 8
        args.steps, args.questions, args.max_new_tokens = 2, 2, 16
    return args


def load_rows(args):
    """-> rows to train on, rows for validation (of other patients), what metrics.json says of them."""
    path, rows = Path(args.data), []
    if args.data.lower() == "phantom":
        known = {"dataset": "phantom", "policy": "by patient", "overlap": False}
        for split, start, films in ("train", 0, 1000), ("val", 8_000_000, 100):  # evaluate.py: from 16,000,000 on
            for n in range(min(films, args.limit or films)):
                film = phantom_study(args.seed, start + n, size=112)
                found = [{"question": q.text, "answer": q.answer} for q in film.questions]
                rows += [{"image": film.image, "split": split, **row, **known} for row in found]
    else:
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            rows = [{name: row[name] for name in FIELDS} | {"image": path.parent / row["image"]} for row in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read as rows of prepare_data.py --output: {error!r}") from error
        if absent := [row["image"] for row in rows if not row["image"].is_file()]:
            raise InputError(f"{len(absent)} rows of {path} have no image, the first is {absent[0]}")
    train, val = ([row for row in rows if row["split"] == split][: args.limit] for split in ("train", "val"))
    if not train or not val:
        raise InputError(f"{args.data} has {len(train)} rows of split train and {len(val)} of val; both are needed")
    names = "+".join(sorted({row["dataset"] for row in train}))
    facts = {"name": names, "phantom": "phantom" in names, "policy": train[0]["policy"]}
    facts |= {"overlap": any(row["overlap"] for row in train), "test": any(row["split"] == "test" for row in rows)}
    return train, random.Random(args.seed).sample(val, min(200, len(val))), facts


def load_model(args, device):
    """-> VLM of which a LoRA adapter alone is trained: a new one, or that of --sft-ckpt."""
    model, adapter = args.model, args.sft_ckpt
    if adapter and (Path(adapter) / "config.json").is_file():  # a whole model: tiny ones are fine-tuned whole
        model, adapter = adapter, None
    elif adapter and model is None:
        model = read_json(Path(adapter) / "adapter_config.json").get("base_model_name_or_path")
    vlm = load_vlm(model or BASE_MODEL, device=device, adapter=adapter, trainable_adapter=True, family="qwen2vl")
    if adapter is None:
        add_lora(vlm, rank=16, checkpointing=False)
    vlm.model.eval()  # no dropout: the policy that learns must be the one that samples
    size = dict(getattr(vlm.processor.image_processor, "size", None) or {})
    if size.get("longest_edge", 0) > 2**18:  # Qwen2-VL, pixels of an image: 784 are a token; lower it to save memory
        vlm.processor.image_processor.size = size | {"longest_edge": 2**18}
    return vlm


def prompts_of(vlm, rows):
    texts = [PROMPT.format(row["question"]) for row in rows]
    return make_prompts(vlm, texts, [read_pixels(row["image"]) for row in rows])


def reward(text, gold):
    """
    1.0 where the text is <think>..</think><answer>..</answer> with the words of the gold answer, else 0.0.

    The whole text has to match. Paid wherever a right answer stands in it, a model learns to write on and on behind it.
    """
    whole = re.fullmatch(r"<think>[^<]*</think>\s*<answer>([^<]*)</answer>", text)
    said, right = (re.findall(r"\w+", answer.lower()) for answer in (whole[1] if whole else "", gold))
    return float(whole is not None and said == right)


def group_advantages(rewards):
    """
    rewards (Q, G), a row per question -> advantages (Q, G).

    A = (r - mean) / (std + 1e-4) over the row: arXiv 2402.03300, section 4.1.2, std over n - 1 and 1e-4 as in trl.
    Where all answers to a question earn the same, A is 0: there is nothing to tell them apart by, and no gradient.
    """
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def policy_loss(logp, mask, advantages, total_tokens):
    """
    logp, mask (N, T): log-probabilities of the sampled tokens, padded on the right; advantages (N,) -> scalar

    L = -1 / total_tokens * sum_it ratio_it A_i,  ratio_it = pi(token_it) / pi_old(token_it)

    On policy pi_old is pi: the ratio is 1, clipping would change nothing, and the gradient is that of A log pi, the
    policy gradient. total_tokens is of the whole step, so every token weighs the same (DAPO, arXiv 2503.14476, section
    3.3); a mean over each answer first, as in 2402.03300, makes long wrong answers cheap (arXiv 2503.20783).
    """
    ratio = (logp - logp.detach()).exp()  # 1, with the gradient of logp
    return -(ratio * advantages[:, None])[mask].sum() / total_tokens


def accuracy(vlm, rows, args):
    """Share of right answers; greedy: always the most likely token."""
    rewards = []
    for start in range(0, len(rows), 16):
        some = rows[start : start + 16]
        groups, _ = sample(vlm, prompts_of(vlm, some), 1, args.max_new_tokens)
        rewards += [reward(text_of(vlm, ids), row["answer"]) for (ids,), row in zip(groups, some, strict=True)]
    return sum(rewards) / len(rewards)


@script
def main(argv=None):
    args, started = parse_args(argv), time.time()
    seed_everything(args.seed)
    device, _ = pick_device(args.device)
    train_rows, val_rows, facts = load_rows(args)
    vlm = load_model(args, device)
    run_dir = open_run_dir(args, "vqa_sft_grpo", "grpo_minimal")
    weights = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=vlm.dtype == torch.float16)  # keeps small gradients in float16
    guard = GuardedStep(optimizer, scaler, weights, grad_clip=1.0)  # optimizer.step(), unless a number is not finite
    generator = torch.Generator(device).manual_seed(args.seed)
    first = best = accuracy(vlm, val_rows, args)
    save_vlm(vlm, run_dir)  # replaced by what is better
    write_json(run_dir / "training.json", {"dataset": facts})  # evaluate.py stamps its results with it
    print(f"{sum(p.numel() for p in weights):,} weights, {len(train_rows)} questions; validation accuracy {first:.3f}")

    history = []
    for step in range(1, args.steps + 1):
        # 1  sample: a question and its image pass through the model once, and all answers start from there
        rows = random.choices(train_rows, k=args.questions)
        prompts = prompts_of(vlm, rows)
        groups, sampled = sample(vlm, prompts, args.group, args.max_new_tokens, 1.0, generator)

        # 2  reward, (Q, G)
        texts = [[text_of(vlm, ids) for ids in group] for group in groups]
        rewards = torch.tensor([[reward(text, rows[q]["answer"]) for text in texts[q]] for q in range(len(rows))])

        # 3  compare, (Q, G)
        advantages = group_advantages(rewards).to(device)

        # 4  learn, one question at a time to spare memory: the gradients add up to that of the step
        loss, total_tokens = 0.0, sum(len(ids) for group in groups for ids in group)
        for q in range(len(rows)):
            logp, _, mask = logprobs(vlm, [prompts[q]], [groups[q]], suppress=never_drawn(vlm))  # (G, T)
            told = torch.tensor([x for line in sampled[q] for x in line], device=device)  # by the sampler
            if step == 1 and (logp[mask] - told).abs().mean() > 0.1:
                raise RuntimeError("the model that learns is not the one that sampled: their passes differ")
            part = policy_loss(logp, mask, advantages[q], total_tokens)
            scaler.scale(part).backward()
            loss += part.item()
        guard.step(loss)

        row = {"step": step, "reward": rewards.mean().item(), "loss": loss, "grad_norm": guard.norm}
        row["groups_that_differ"] = (rewards.std(1) > 0).float().mean().item()  # the others teach nothing
        history.append(row | {"tokens": total_tokens / rewards.numel(), "seconds": time.time() - started})
        if step % args.eval_every == 0 or step == args.steps:
            recent = statistics.mean(row["reward"] for row in history[-args.eval_every :])
            history[-1]["val_accuracy"] = now = accuracy(vlm, val_rows, args)
            print(f"step {step}  reward {recent:.3f}  validation accuracy {now:.3f}  {texts[0][0]}", flush=True)
            write_jsonl(run_dir / "history.jsonl", history)
            if now > best:
                best = now
                save_vlm(vlm, run_dir)

    found = {"split": "val", "n": len(val_rows), "first": first, "best": best, "last": now, "seed": args.seed}
    found |= {"dataset": facts, "settings": vars(args), **vlm.facts(), **run_facts(started, device)}
    write_json(run_dir / "metrics.json", found)
    known = set(facts["name"].split("+")) <= {"vqa_rad", "slake", "phantom"}  # their test rows are found by name
    data = args.data if facts["test"] or not known else "both" if "+" in facts["name"] else facts["name"]
    split = "test" if facts["test"] or known else "val"
    asked = ["--sft_ckpt", run_dir, "--data", data, "--split", split, "--prompts", "think"]
    measure = command("vqa_sft_grpo/evaluate.py", *asked)
    print(f"validation accuracy {first:.3f} before, {best:.3f} at best; measure it on {split} rows with\n  {measure}")
    print(f"{'' if best > first else '*** no step was better than the start *** '}results in {run_dir}")


if __name__ == "__main__":
    main()
