"""
One step of GRPO, in parts: answers are sampled and scored, and gradients are added up.

    policy = Policy(vlm, args, settings, frequencies)                     # args: see train_grpo.py
    batch = policy.roll_out(rows, places, generator)                      # a Batch: rollouts with every term of their
    reward loss, metrics = policy.loss_and_gradient(batch, advantages, old, ref, scaler)
    cf_loss = policy.reward_gradient(batch, scaler)

All passes are those of shared/models/passes.py. The vision tower is not trained here: its features are numbers that
policy, reference and scoring share, and all samples of a question share one pass over it.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import contextlib
import functools
import time

import shared  # noqa: F401, isort: skip  # before transformers
import numpy as np
import torch
from tqdm import tqdm

from shared.data.images import read_pixels
from shared.models.loading import count_parameters
from shared.models.passes import PartSize, in_parts, logprobs, make_prompts, never_drawn, places_of, sample, text_of
from shared.runtime import InputError
from vqa_sft_grpo.grpo import combine_metrics, policy_loss
from vqa_sft_grpo.prompting import build_prompt
from vqa_sft_grpo.looking import NATS, images_of_v, measure_drops, plan_edits, read_statement
from vqa_sft_grpo.rewards import answer_to_score
from vqa_sft_grpo.rewards import score_rollouts, slope

# mean distance in nats of log-probabilities computed token by token and all at once
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


class Batch:
    """
    The questions of a step with their rollouts. Lists by question: rows, places, prompts, plans, edited (Prompts of the
    plan's images, None where nothing was measured), groups and logps (by rollout, see passes.sample); by rollout:
    texts, statements (of looking.py, None where the gate is closed or V is not asked for), terms (of the reward).
    """

    def __init__(self, **fields):
        self.__dict__.update(fields)

    @property
    def rewards(self):
        return [t["reward"] for t in self.terms]

    @property
    def flat(self):
        """Token ids of all rollouts, in order."""
        return [ids for group in self.groups for ids in group]


def image_of(row):
    """-> uint8 (H, W) or (H, W, 3)."""
    return read_pixels(row.get("image_path") or row["image"])


def with_size(row, image):
    """Rows of older files do not say how large their image is; boxes need it."""
    return row | {"height": image.shape[0], "width": image.shape[1]}


def check_images(rows):
    """An image that cannot be read is named before the first step, not at the step that draws it. InputError."""
    paths = sorted({str(r.get("image_path") or r["image"]) for r in rows})
    broken = []
    for path in tqdm(paths, desc="looking at the images", leave=False, disable=None):
        try:
            read_pixels(path)
        except InputError as error:
            broken.append(f"{path}: {error}")
    if broken:
        raise InputError(f"{len(broken)} of {len(paths)} images cannot be read; {broken[0]}; take their rows out")


def row_at(place, count, seed):
    """
    The row of a place in the endless stream of questions: every row once per epoch, each epoch in an order of its own.
    """
    return int(order_of(count, seed, place // count)[place % count])


@functools.lru_cache(maxsize=2)
def order_of(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


@contextlib.contextmanager
def as_reference(vlm):
    """The model as it was given: its adapter off, or the frozen copy of the adapter that it came with."""
    if "reference" not in vlm.model.peft_config:
        with vlm.model.disable_adapter():
            yield
        return
    vlm.model.set_adapter("reference")
    try:
        yield
    finally:
        vlm.model.set_adapter("default")


def score_statements(vlm, prompts, statements, share=True):
    """
    statements[i]: some that may follow prompts[i] -> float32 (N, 2): log-probability in nats of what each says, and of
    the whole response, sums over its tokens. Differentiable.
    """
    groups = [[statement.ids for statement in some] for some in statements]
    logp, _, _ = logprobs(vlm, prompts, groups, share, suppress=never_drawn(vlm))
    said = torch.zeros(logp.shape)
    for line, statement in zip(said, (statement for some in statements for statement in some), strict=True):
        line[: len(statement.said)] = torch.tensor(statement.said)
    return torch.stack([(logp * said.to(logp)).sum(1), logp.sum(1)], 1)


class Policy:
    """
    The model that learns and what its passes need. size: answers, or edited images, that go through it at a time when
    they are scored or learned from; sampling: when they are written, which keeps no activations: all of a step.
    """

    def __init__(self, vlm, args, settings, frequencies=None):
        self.vlm, self.args, self.settings, self.frequencies = vlm, args, settings, frequencies
        small = count_parameters(vlm.base) < 100e6
        step = args.num_generations * args.batch_size
        self.size = PartSize(args.micro_batch or (step if small else args.num_generations))
        self.sampling, self.never = PartSize(step), never_drawn(vlm)

    # ------------------------------------------------------------------------------------------------------- sampling

    def roll_out(self, rows, places, generator):
        """Sample answers to rows and score them -> Batch. generator None: one answer each, the most likely one."""
        begin, args, vlm = time.time(), self.args, self.vlm
        images = [image_of(row) for row in rows]
        rows = [with_size(row, image) for row, image in zip(rows, images, strict=True)]
        prompts = self.prompts_of([r["question"] for r in rows], images)
        each, temperature = (1, 1.0) if generator is None else (args.num_generations, args.temperature)

        def some(part):
            return list(zip(*sample(vlm, part, each, args.max_new_tokens, temperature, generator), strict=True))

        groups, logps = zip(*in_parts(some, prompts, self.sampling, each), strict=True)
        sampled = time.time()
        batch = self.score(rows, images, places, prompts, list(groups))
        batch.logps, batch.seconds = list(logps), {"seconds_sample": sampled - begin}
        batch.seconds["seconds_score"] = time.time() - sampled
        return batch

    def score(self, rows, images, places, prompts, groups):
        """Responses to rows (token ids, those to one row a group), wherever they come from -> Batch without logps."""
        args, of_rollout = self.args, [row for row, group in zip(rows, groups, strict=True) for _ in group]
        flat = [ids for group in groups for ids in group]
        # without the token that ends it, but with any other special token, which the reward must see
        texts = [text_of(self.vlm, ids, skip_special_tokens=False) for ids in flat]
        plans, edited, drops, statements = [None] * len(rows), [None] * len(rows), None, [None] * len(texts)
        if self.settings.weights[3] > 0:
            cases = zip(rows, images, places, strict=True)
            how = args.cf_regions, args.cf_fill
            plans = [plan_edits(r, i, *how, [args.seed, place], args.max_pixels) for r, i, place in cases]
            statements = list(map(self.statement_of, flat, texts, of_rollout))
            drops, edited = self.drops_of(rows, statements, plans)
        terms = score_rollouts(of_rollout, texts, self.settings, self.frequencies, drops, list(map(len, flat)))
        return Batch(
            rows=rows, places=places, prompts=prompts, plans=plans, edited=edited, groups=groups, texts=texts,
            statements=statements, terms=terms,
        )  # fmt: skip

    def statement_of(self, ids, text, row):
        """-> Statement of a rollout, None behind a closed gate, where V cannot matter."""
        if answer_to_score(text, self.settings) is None:
            return None
        return read_statement(ids, places_of(self.vlm, ids), text, row["question"], self.settings.style)

    def prompts_of(self, questions, images):
        texts = [build_prompt(question, self.settings.style) for question in questions]
        return make_prompts(self.vlm, texts, images, batch_size=max(32, self.size.now))

    @torch.no_grad()
    def drops_of(self, rows, statements, plans):
        """-> what measure_drops gives for the rollouts, and per row the Prompts of its edited images."""
        each = len(statements) // len(rows)
        said = [statements[i * each : (i + 1) * each] for i in range(len(rows))]
        needed = [bool(plan.images) and any(s) for plan, s in zip(plans, said, strict=True)]
        pairs = [(rows[i]["question"], image) for i, plan in enumerate(plans) if needed[i] for image in plan.images]
        prompts = self.prompts_of(*zip(*pairs, strict=True)) if pairs else []
        prompt_of = {id(image): prompt for (_, image), prompt in zip(pairs, prompts, strict=True)}

        def measure(images, statements):
            jobs = {}  # by image: its responses share one pass over the prompt
            for n, (image, statement) in enumerate(zip(images, statements, strict=True)):
                jobs.setdefault(id(image), []).append((n, statement))

            def some(part):
                of_image = [[statement for _, statement in jobs[key]] for key in part]
                found = score_statements(self.vlm, [prompt_of[key] for key in part], of_image)
                return list(zip([n for key in part for n, _ in jobs[key]], found.tolist(), strict=True))

            return [value for _, value in sorted(in_parts(some, list(jobs), self.size))]

        drops = measure_drops(measure, statements, [plan for plan in plans for _ in range(each)])
        edited = [[prompt_of[id(i)] for i in p.images] if n else None for p, n in zip(plans, needed, strict=True)]
        return drops, edited

    # ------------------------------------------------------------------------------------------------------- learning

    def logprobs_of(self, batch, numbers, share=True):
        """-> logp, entropy, mask (B, T) of the rollouts with these numbers, neighbours."""
        flat, by_question = batch.flat, {}
        for n in numbers:
            by_question.setdefault(n // self.args.num_generations, []).append(flat[n])
        prompts = [batch.prompts[q] for q in by_question]
        groups = list(by_question.values())
        return logprobs(self.vlm, prompts, groups, share, self.args.temperature, self.never, entropy=True)

    @torch.no_grad()
    def fixed_logprobs(self, batch):
        """Log-probabilities that no gradient goes through -> list of (tokens of the rollout,) tensors."""

        def some(part):
            logp, _, mask = self.logprobs_of(batch, part)
            return [line[keep] for line, keep in zip(logp, mask, strict=True)]

        return in_parts(some, range(len(batch.texts)), self.size)

    def check_sampler(self, batch):
        """
        -> fixed_logprobs of the policy, after a look whether they are those that the sampler found token by token: if
        not, the two see different inputs (image, positions, temperature), and training would go astray. RuntimeError.
        """
        lines = self.fixed_logprobs(batch)
        sampled = torch.tensor([x for group in batch.logps for line in group for x in line], device=self.vlm.device)
        distance = (torch.cat(lines) - sampled).abs().mean().item()
        if not distance <= TOLERANCE[self.vlm.dtype]:
            raise RuntimeError(
                "The policy that learns must be the policy that sampled: their log-probabilities differ by"
                f" {distance:.3g} nats on average. The passes see different inputs or settings."
            )
        return lines

    def loss_and_gradient(self, batch, advantages, old, ref, scaler):
        """Adds the gradient of policy_loss over all rollouts to the parameters -> (loss, metrics)."""
        args, total_tokens = self.args, sum(map(len, batch.flat))

        def aligned(lines, part, like):
            """Lines of the part -> (B, T) as `like`, 0 behind the ends."""
            if lines is None:
                return None
            out = torch.zeros_like(like)
            for row, n in zip(out, part, strict=True):
                row[: len(lines[n])] = lines[n]
            return out

        def some(part):
            logp, entropy, mask = self.logprobs_of(batch, part, share=not args.checkpointing)
            loss, metrics = policy_loss(
                logp, aligned(old, part, logp), aligned(ref, part, logp), advantages[part.start : part.stop], mask,
                eps_low=args.eps_low, eps_high=args.eps_high, beta=args.beta, total_tokens=total_tokens,
                entropy=entropy,
            )  # fmt: skip
            scaler.scale(loss).backward()
            return [(loss.item(), metrics)]

        undo = functools.partial(self.vlm.model.zero_grad, set_to_none=True)
        losses, metrics = zip(*in_parts(some, range(len(batch.texts)), self.size, undo=undo), strict=True)
        return sum(losses), combine_metrics(metrics)

    def reward_gradient(self, batch, scaler):
        """
        Adds the gradient of the reward through V -> its loss: what right answers state becomes less likely without
        their gold region (where that is at its limit, or there is none, on the image as it is) and likelier without the
        random region that they depend on most.

        Its unit is the policy's. The gradient of the mean reward of N rollouts is
            1/N sum_i (A_i sum_t grad log p_it + dR_i/dV_i grad V_i),
        t running over the tokens of a rollout. The dapo loss divides the first part by the tokens of the step, M, where
        the mean divides by N: it is N / M of that gradient, one over the mean length. So V's part is divided by M as
        well, and --cf-gradient 1 is the gradient of the mean reward itself: a nat of V weighs dR/dV against an
        advantage of A on a nat of the rollout, whether this has 7 tokens or 120. (Divided by N, V would weigh 7 times
        as much as the policy's part at 7 tokens, and 120 times at 120.) The default of --cf-gradient is larger than 1:
        see train_grpo.py.
        """
        total_tokens, jobs = sum(map(len, batch.flat)), {}
        for row, (statement, terms) in enumerate(zip(batch.statements, batch.terms, strict=True)):
            i = row // (len(batch.texts) // len(batch.rows))
            if batch.edited[i] and (by_v := slope(terms, self.settings)):
                # equal responses to a question share a pass
                key = (i, statement, *images_of_v(terms, batch.plans[i]))
                jobs[key] = jobs.get(key, 0.0) + self.args.cf_gradient * by_v / NATS / total_tokens
        parameters = [p for p in self.vlm.model.parameters() if p.requires_grad]
        before = [None if p.grad is None else p.grad.clone() for p in parameters]

        def undo():
            for p, grad in zip(parameters, before, strict=True):
                p.grad = None if grad is None else grad.clone()

        def some(part):
            prompts = [batch.edited[q][image] for (q, _, less, more), _ in part for image in (less, more)]
            said = [[statement] for (_, statement, _, _), _ in part for _ in range(2)]
            found = score_statements(self.vlm, prompts, said, not self.args.checkpointing)[:, 0]
            less, more = found.view(-1, 2).T
            loss = (torch.tensor([weight for _, weight in part]).to(less) * (less - more)).sum()
            scaler.scale(loss).backward()
            return [loss.item()]

        return sum(in_parts(some, list(jobs.items()), self.size, each=2, undo=undo))
