"""
The answers that evaluate.py measures: of the prompts and controls, on edited images, and on films drawn anew.

A record is one answer to one row: the response, what was read from it, and how it scores.
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import functools
import time
import zlib
from collections import Counter, defaultdict

import numpy as np

from shared.data.images import read_pixels
from shared.runtime import InputError
from vqa_sft_grpo.asking import pixel_boxes
from vqa_sft_grpo.counterfactual import LARGEST, SMALLEST, fill_region, identity_edits, plan_regions, region_mask
from vqa_sft_grpo.counterfactual import whole_boxes
from vqa_sft_grpo.measures import case_summary
from vqa_sft_grpo.prompting import build_prompt, parse_response
from vqa_sft_grpo.rows import REDRAWN
from vqa_sft_grpo.scoring import choice, llava_med_scores, medevalkit_scores, normalise, polarity, score_answer
from vqa_sft_grpo.scoring import score_with_synonyms

CHUNK = 8  # cases whose edited images are in memory together

load_image = functools.lru_cache(maxsize=1024)(read_pixels)


def load_images(rows):
    """-> (uint8 images, None where one cannot be read; errors for errors.csv)."""
    images, errors = [], {}
    for row in rows:
        try:
            images.append(load_image(str(row["image"])))
        except InputError as error:
            images.append(None)
            errors[str(row["image"])] = str(error)
    return images, [{"path": path, "error": error} for path, error in errors.items()]


def ask(answerer, rows, images, style, with_image=True):
    """One record per row, in order; a row without image gets an empty response."""
    good = [i for i, image in enumerate(images) if image is not None]
    prompts = [build_prompt(rows[i]["question"], style) for i in good]
    texts = dict(zip(good, answerer.generate(prompts, [images[i] if with_image else None for i in good]), strict=True))
    return [record_of(row, texts.get(i, ""), style, images[i]) for i, row in enumerate(rows)]


def record_of(row, text, style, image):
    """A response -> what was read from it and how it scores."""
    found = parse_response(text, style)
    caption = found.data.get("caption") if found.data else None
    read = {
        "response": text,
        "answer": found.answer,
        "level": found.level,
        "valid": found.valid,
        "boxes": [] if image is None else pixel_boxes(found, image.shape[:2]),
        "caption": caption.strip() if isinstance(caption, str) and caption.strip() else None,
    }
    return read | scores_of(row, found.answer)


def scores_of(row, answer):
    asked = (row["answer"], row["answer_type"], row["question"])
    score = score_answer(answer, *asked)
    return score | {
        "key": answer_key(answer, row["question"], score["kind"]),
        "synonyms": score_with_synonyms(answer, *asked)["correct"],
        "llava_med": llava_med_scores(answer, *asked[:2]),
        "medevalkit": medevalkit_scores(answer, *asked[:2], row["dataset"]),
    }


def answer_key(answer, question, kind):
    """
    What must stay equal for an answer to be the same one: yes or no, the option, or the normalised words. None:
    unparsed.
    """
    if kind == "yes/no":
        return polarity(answer or "", question)
    words = " ".join(normalise(answer)) or None
    if kind == "choice":
        option = choice(answer or "", question)
        return None if option is None else f"option {option}"
    return words


def shuffled_images(rows, images, seed):
    """Each row gets an image of another group, the same for all rows of a group; None when there is one group only."""
    by_group = {}
    for row, image in zip(rows, images, strict=True):
        if image is not None:
            by_group.setdefault(row["group"], image)
    names = sorted(by_group, key=lambda name: zlib.crc32(f"{seed} {name}".encode()))
    if len(names) < 2:
        return None
    following = dict(zip(names, names[1:] + names[:1], strict=True))
    return [
        None if image is None else by_group[following[row["group"]]] for row, image in zip(rows, images, strict=True)
    ]


def majority_answers(rows, train_rows):
    """
    The most frequent answer that training rows give to the same question, else to questions of the same kind; None
    without training rows.
    """
    if not train_rows:
        return None

    def keys(row):
        kind = score_answer(None, row["answer"], row["answer_type"], row["question"])["kind"]
        return " ".join(normalise(row["question"])), ("kind", kind), None

    counts = defaultdict(Counter)
    for row in train_rows:
        for key in keys(row):
            counts[key][row["answer"].lower()] += 1
    frequent = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    return [next(frequent[key] for key in keys(row) if key in frequent) for row in rows]


# ------------------------------------------------------------------------------------------------------- counterfactual


def edit_seed(row, seed):
    """Random regions and noise of a row are the same in every run with this seed, whatever other rows there are."""
    return [seed, zlib.crc32(str(row["id"]).encode())]


def pick_cases(rows, records, images, limit, k, seed):
    """
    Rows for the counterfactual test, drawn by the seed among those with a parsed answer and a region: gold ones first,
    then the model's own boxes. "own" of a gold case: the boxes of the response, where they can be taken out as well.
    -> (cases, {source: {reason: how many were looked at and not taken}}).
    """
    cases, refused = [], {"gold": Counter(), "self": Counter()}
    usable = [i for i, r in enumerate(records) if r["key"] is not None and images[i] is not None]
    draw = np.random.default_rng(seed)
    for source in ("gold", "self"):
        candidates = [i for i in usable if bool(rows[i].get("region")) == (source == "gold")]
        draw.shuffle(candidates)
        for i in candidates:
            if len(cases) >= limit:
                refused[source]["not looked at"] += 1
                continue
            boxes = rows[i]["region"] if source == "gold" else records[i]["boxes"]
            plan = plan_regions(images[i], boxes, k, edit_seed(rows[i], seed))
            if plan.why:
                refused[source][plan.why if source == "gold" or boxes else "no box of its own"] += 1
            else:
                own = own_region(records[i]["boxes"], images[i].shape[:2]) if source == "gold" else []
                of_case = {"plan": plan, "own": own, "was_correct": bool(records[i]["correct"])}
                cases.append({"row": i, "source": source, **of_case})
    return cases, {source: dict(counts) for source, counts in refused.items()}


def own_region(boxes, shape):
    """The boxes of a response in whole pixels; none where they are too small or too large to be taken out."""
    whole = whole_boxes(boxes, *shape)
    return whole if whole and SMALLEST <= region_mask(whole, *shape).mean() <= LARGEST else []


def edits_of(image, plan, fills, seed, own=()):
    """
    All edited images of a case -> [((what, fill, number), image)]: identity edits, the region, the random regions, and
    the model's own boxes.
    """
    edits = [(("identity", name, 0), edited) for name, edited in identity_edits(image).items()]
    for fill in fills:
        for number, boxes in enumerate([plan.roi, *plan.random]):
            edits.append(
                (
                    ("roi" if number == 0 else "random", fill, max(0, number - 1)),
                    fill_region(image, boxes, fill, seed=[*seed, number]),
                )
            )
        edits += [(("own", fill, 0), fill_region(image, own, fill, seed=[*seed, 0]))] if own else []
    return edits


def run_counterfactual(answerer, rows, records, images, cases, style, fills, seed, scores):
    """
    Answer every edited image anew, and score the original response on it. Adds to each case "edits": {(what, fill,
    number): {"answer", "flipped", "unparsed", "wrong_now", "drop", "drop_response"}}. drop: mean log-probability per
    token of the original answer (of the whole original response), original minus edited image.
    """
    begin = time.time()
    for start in range(0, len(cases), CHUNK):
        some = cases[start : start + CHUNK]
        jobs = []
        for case in some:
            i = case["row"]
            jobs += [
                (case, name, image)
                for name, image in edits_of(images[i], case["plan"], fills, edit_seed(rows[i], seed), case["own"])
            ]
        prompts = [build_prompt(rows[case["row"]]["question"], style) for case, _, _ in jobs]
        pictures = [image for _, _, image in jobs]
        texts = answerer.generate(prompts, pictures)
        rescored = answerer.score(prompts, pictures, [records[case["row"]]["response"] for case, _, _ in jobs])
        for (case, name, image), text, score in zip(jobs, texts, rescored, strict=True):
            i = case["row"]
            now, before = record_of(rows[i], text, style, image), scores[i]
            unparsed = now["key"] is None
            case.setdefault("edits", {})[name] = {
                "answer": now["answer"],
                "unparsed": unparsed,
                "flipped": not unparsed and now["key"] != records[i]["key"],
                "wrong_now": bool(records[i]["correct"]) and not now["correct"],
                **{
                    key: None if None in (before[part], score[part]) else before[part] - score[part]
                    for key, part in (("drop", "answer"), ("drop_response", "response"))
                },
            }
        done = start + len(some)
        if len(cases) > CHUNK:
            left = (time.time() - begin) / done * (len(cases) - done)
            print(f"  counterfactual cases: {done} of {len(cases)}, about {left / 60:.0f} minutes left", flush=True)
    return cases


# -------------------------------------------------------------------------------------------------------- redrawn films


def ask_redrawn(answerer, rows, style):
    """
    The questions whose film was drawn anew without a finding -> {"redrawn", "redrawn_other": {row number: record}}; a
    film that cannot be read gives no answer.
    """
    asked = {}
    for field in REDRAWN:
        chosen = [i for i, row in enumerate(rows) if row.get(field)]
        some = [rows[i] | {"image": rows[i][field]} for i in chosen]
        answers = ask(answerer, some, load_images(some)[0], style) if chosen else ()
        asked[field] = dict(zip(chosen, answers, strict=True))
    return asked


# ------------------------------------------------------------------------------------------------------------ pictures


def panel(image, name, answer, changed, boxes, more=""):
    """One picture of report.draw_strip."""
    return dict(image=image, name=name, below=(answer or "no answer") + more, changed=changed, boxes=boxes)


def telling_cases(cases, rows, records, images, args, most=4, least=2):
    """
    Cases for the picture, by rule: the largest and the smallest difference of flip rates, ties by the log-probability
    drops. Each shows the image with its regions, the region taken out by each fill, and the first random region taken
    out.
    """

    def order(case):
        told = case_summary(case, args.fills, args.random_regions)
        drops = [told["delta_cf_roi"], told["delta_cf_rand"]]
        return told["flip_roi"] - told["flip_random"], 0.0 if None in drops else drops[0] - drops[1]

    ranked, what = sorted(cases, key=order, reverse=True), ""
    if not any(order(case)[0] for case in cases):  # ranked by the drops alone
        told = any(abs(order(case)[1]) >= 0.005 for case in cases)
        what = " in log-probability, none in answers" if told else " (none in any case)"
    chosen = [(f"largest difference{what}", c) for c in ranked[:most]] + [
        (f"smallest difference{what}", c) for c in ranked[max(most, len(ranked) - least) :]
    ]
    strips = []
    for rule, case in chosen:
        i, plan = case["row"], case["plan"]
        row, image = rows[i], images[i]
        outlines = [(box, "tab:blue") for boxes in plan.random for box in boxes] + [(box, "red") for box in plan.roi]
        panels = [panel(image, f"original ({case['source']} region)", records[i]["answer"], False, outlines)]
        pictures = dict(edits_of(image, plan, args.fills, edit_seed(row, args.seed)))
        for name in [("roi", fill, 0) for fill in args.fills] + [("random", args.fills[0], 0)]:
            edit = case["edits"][name]
            drop = "" if edit["drop"] is None else f" ({0.0 - round(edit['drop'], 2):+.2f})".replace("+0.00", "0.00")
            what, boxes, colour = ("without it", plan.roi, "red")
            if name[0] == "random":
                what, boxes, colour = "random", plan.random[0], "tab:blue"
            changed, boxes = edit["flipped"] or edit["unparsed"], [(box, colour) for box in boxes]
            panels.append(panel(pictures[name], f"{what}: {name[1]}", edit["answer"], changed, boxes, drop))
        strips.append({"text": f"{rule}: {row['question']} gold: {row['answer']}", "panels": panels})
    return strips


def redrawn_strips(rows, records, predictions, most=2):
    """
    Pictures of films drawn anew: the first two on which the answer follows the finding and nothing else, and the first
    two on which it does not.
    """
    chosen, seen = {True: [], False: []}, set()
    for i, row in enumerate(rows):
        if row["image"] not in seen and all(field in predictions[i] for field in REDRAWN):
            seen.add(row["image"])
            keys = [answer_key(predictions[i][field]["answer"], row["question"], "yes/no") for field in REDRAWN]
            chosen[records[i]["key"] == keys[1] == "yes" and keys[0] == "no"].append((i, keys))
    strips = []
    for i, keys in chosen[True][:most] + chosen[False][:most]:
        row, region = rows[i], [(box, "red") for box in rows[i]["region"]]
        panels = [panel(load_image(str(row["image"])), "as it is", records[i]["answer"], False, region)]
        for field, key, name in zip(REDRAWN, keys, ("without it", "without another finding"), strict=True):
            answer, film = predictions[i][field]["answer"], load_image(str(row[field]))
            panels.append(panel(film, name, answer, key != records[i]["key"], region))
        strips.append({"text": f"{row['question']} gold: {row['answer']}", "panels": panels})
    return strips
