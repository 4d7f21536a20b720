"""
What goes wrong in GRPO shows in its numbers before it shows in its answers: rules over the last steps, each with a
sentence.

    for name, text in alarms(history): print(text)        # history: rows of history.jsonl, oldest first

A rule looks at means over the last WINDOW steps, some against the first WINDOW steps; before that many steps it says
nothing. The levels come from what was seen to collapse in published runs; they call for a look at completions.md, and
stop nothing.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import statistics

WINDOW = 20  # steps
STILL = 1e-4  # nats per token of KL; a policy that learned something is further from its reference


def alarms(history, window=WINDOW):
    """-> {name: sentence} of the rules that hold now."""
    if len(history) < window:
        return {}
    now, then = (Means(rows) for rows in (history[-window:], history[:window]))
    past = Means(history[-2 * window : -window] or history[:window])
    # the learning rate was as high before these steps as in them: the warm-up is over
    before, here = (max((row.get("lr") or 0 for row in rows), default=0) for rows in (history[:-window], now.rows))
    rules = {
        "truncated": now.truncated > 0.5,
        "zero_variance": now.frac_reward_zero_std > 0.8,
        "entropy": now.entropy < 0.05,
        "one_answer": now.most_frequent_answer > 0.8 and now.most_frequent_answer > now.most_frequent_gold + 0.2,
        "length_collapse": now.length < 0.5 * then.length,
        "length_growth": now.length > 2 * then.length,
        "unreadable": now.gate < 0.9 and now.gate <= then.gate,
        "reward_variance": now.reward_std < 0.1 * then.reward_std,
        "clipping": now.clip_region > 0.2,
        "kl": now.kl > 0.1 and now.kl > 4 * past.kl,
        "not_moving": now.kl < STILL and before >= here > 0,
        "not_looking": now.gap < then.gap - 0.05 and now.correct > then.correct + 0.05,
        "v_at_clip": now.v_clipped > 0.5,
        "contradictions": now.contradiction > then.contradiction + 0.1,
        "skipped": now.skipped > 0.1,
    }
    return {
        name: SENTENCES[name].format(now=now, then=then, past=past, window=window)
        for name, holds in rules.items()
        if holds
    }


SENTENCES = {
    "truncated": "{now.truncated:.0%} of the rollouts are cut off at --max-new-tokens: raise it, or look whether the"
    " end token is still written",
    "zero_variance": "{now.frac_reward_zero_std:.0%} of the groups have equal rewards and teach nothing: other"
    " questions or more generations",
    "entropy": "entropy is {now.entropy:.3f} nats per token: nothing is tried out any more; a smaller --lr or a larger"
    " --beta",
    "one_answer": "one answer makes up {now.most_frequent_answer:.0%} of the rollouts, and"
    " {now.most_frequent_gold:.0%} of the gold answers",
    "length_collapse": "responses have shrunk from {then.length:.0f} to {now.length:.0f} tokens",
    "length_growth": "responses have grown from {then.length:.0f} to {now.length:.0f} tokens",
    "unreadable": "only {now.gate:.0%} of the responses pass the gate",
    "reward_variance": "the spread of the rewards has fallen from {then.reward_std:.3f} to {now.reward_std:.3f}",
    "clipping": "{now.clip_region:.0%} of the ratios are clipped: fewer --inner-steps or a smaller --lr",
    "kl": "KL from the reference has risen from {past.kl:.3f} to {now.kl:.3f} nats per token within {window} steps",
    "not_moving": "KL from the reference is {now.kl:.0e} nats per token after the warm-up: the policy does not move,"
    " and what is saved will be what came in; raise --lr (an adapter bears about 1e-5)",
    "not_looking": "accuracy rose from {then.correct:.0%} to {now.correct:.0%} while taking the region out came to"
    " matter less ({then.gap:.3f} to {now.gap:.3f} nats): a shortcut?",
    "v_at_clip": "V is at its limit in {now.v_clipped:.0%} of the rollouts that have one",
    "contradictions": "reasoning contradicts the answer in {now.contradiction:.0%} of the rollouts, in the beginning"
    " {then.contradiction:.0%}",
    "skipped": "{now.skipped:.0%} of the steps were skipped: loss or gradient not finite",
}


class Means:
    """
    Means of the columns over rows in which they are defined; NaN, with which every comparison is false, where there are
    none.
    """

    def __init__(self, rows):
        self.rows = rows

    def __getattr__(self, name):
        values = [row[name] for row in self.rows if row.get(name) is not None]
        return statistics.fmean(values) if values else float("nan")
