"""
Rows of the sets with texts (iu_xray.py here, sources.py of vqa_sft_grpo), splits by group, and what to look for before
a split is trusted: images and texts on both sides, repeated rows, near-identical images.
`python -m shared.data audit NAME` prints all of it.

Audits take lists of rows and return plain numbers and lists of ids. Texts are compared by `plain_text`, so that "Yes."
= "yes".
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import hashlib
import itertools
import re
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shared.data.images import read_image
from shared.runtime import InputError

SPLITS = ("train", "val", "test")
SAME_IMAGE = 32  # of 255 bits, see image_hash


@dataclass
class RowSet:
    """Rows of one data set, each a dict (keys: iu_xray.py, sources.py), and what was left out on the way to them."""

    name: str
    source: str  # where it came from, for people
    rows: list = field(default_factory=list)
    version: str = ""  # section, split, policy, language: numbers of two versions are not comparable
    left_out: dict = field(default_factory=dict)  # reason -> how many rows (studies)
    sha256: dict = field(default_factory=dict)  # of the text files, by name
    official: bool = False  # are these the files whose counts the tests know?
    notes: dict = field(default_factory=dict)  # other things to know, such as how boxes were understood

    def split(self, name):
        return [row for row in self.rows if row["split"] == name]

    def keep(self, wanted, reason):
        """Leave out the rows for which wanted(row) is not true, and count them under `reason`."""
        kept = [row for row in self.rows if wanted(row)]
        self.left_out[reason] = self.left_out.get(reason, 0) + len(self.rows) - len(kept)
        self.rows = kept

    def counts(self):
        return {split: n for split in (*SPLITS, None) if (n := len(self.split(split)))}

    def limit(self, n):
        """Keep the first n rows of every split."""
        self.rows = [row for split in (*SPLITS, None) for row in self.split(split)[:n]]

    def facts(self):
        """What metrics files say about the data."""
        names = ("name", "version", "counts", "left_out", "notes", "sha256", "official", "source")
        return {name: getattr(self, name) for name in names} | {"counts": self.counts()}

    def __str__(self):
        counts = ", ".join(f"{split or 'no split'} {n}" for split, n in self.counts().items())
        left_out = "".join(f"; left out: {n} ({reason})" for reason, n in self.left_out.items() if n)
        return f"{self.name} ({self.version}; {counts}{left_out}) from {self.source}"


# --------------------------------------------------------------------------------------------------------------- splits


def split_groups(groups, shares, seed=0):
    """
    Group names (repeats allowed) -> {group: split}. shares: {"train": 0.7, "val": 0.1, "test": 0.2}, of the groups,
    adding up to 1. The order is that of a hash of seed and name: the same on every machine and with every library
    version.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise InputError(f"the shares of a split must be above 0 and add up to 1, not {shares}")

    def place(item):
        return hashlib.sha256(f"{seed}:{item[0]}".encode()).digest()

    order = sorted({str(group): group for group in groups}.items(), key=place)
    ends = [round(len(order) * share) for share in itertools.accumulate(shares.values())]
    chosen, start = {}, 0
    for split, end in zip(shares, ends, strict=True):
        if end == start:
            raise InputError(f"{len(order)} groups are too few for a share of {shares[split]} in {split}")
        chosen.update((group, split) for _, group in order[start:end])
        start = end
    return chosen


# ---------------------------------------------------------------------------------------------------------------- texts


def plain_text(text):
    """Lower case, punctuation to spaces, single spaces: "X-ray, T2?" -> "x ray t2"."""
    return " ".join(re.sub(r"[^\w\s]", " ", str(text).lower()).split())


def id_of(row):
    return row["qid"] if "qid" in row else row["uid"]


TEXTS = ("question", "question_frame", "answer", "report", "findings", "impression")


def values_of(row, keys, plain=plain_text):
    """The row's values under `keys`; texts among them as plain(text). Names of images and groups stay as they are."""
    return tuple(plain(row[key]) if key in TEXTS else row[key] for key in keys)


def counted(ids, of=None):
    return {"rows": len(ids)} | ({} if of is None else {"of": len(of)}) | {"ids": ids}


def shared_values(a, b, key="image_id"):
    """Which values of `key` rows a and rows b have in common (image_id, image_group, patient, ...)."""
    in_a, in_b = {row[key] for row in a}, {row[key] for row in b}
    return {"a": len(in_a), "b": len(in_b), "shared": len(in_a & in_b), "ids": sorted(in_a & in_b)}


def shared_between_splits(rows, key="image_id"):
    """shared_values of every two splits: {"train, test": ...}."""
    by_split = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    return {
        f"{a}, {b}": shared_values(by_split[a], by_split[b], key)
        for a, b in itertools.combinations(SPLITS, 2)
        if by_split[a] and by_split[b]
    }


def repeats(rows, keys=("image_id", "question", "answer"), plain=plain_text):
    """Rows equal in `keys`: how many are distinct, how many repeat an earlier one, and the ids of each such group."""
    groups = defaultdict(list)
    for row in rows:
        groups[values_of(row, keys, plain)].append(id_of(row))
    again = [ids for ids in groups.values() if len(ids) > 1]
    return {"rows": len(rows), "distinct": len(groups), "repeats": len(rows) - len(groups), "ids": again}


def seen(test, train, keys=("image_id", "question", "answer"), plain=plain_text):
    """Rows of `test` for which `train` has a row equal in `keys`; ("question",) or ("report",) compares texts alone."""
    known = {values_of(row, keys, plain) for row in train}
    return counted([id_of(row) for row in test if values_of(row, keys, plain) in known], test)


# --------------------------------------------------------------------------------------------------------------- images


def image_hash(pixels):
    """
    float (H, W) or (H, W, 3) in 0..1 -> bool (255,): the signs, against their median, of the lowest 16 x 16 frequencies
    of the image at 64 x 64 pixels, without the mean (a pHash with more bits than usual: with 64 bits, chest films of
    different patients lie as near as copies do).

    Measured: copies saved as JPEG of quality 40, at a half or a third of the size, 30 % darker or with 30 % more
    contrast, with gamma 0.7, or moved by one pixel differ in at most 30 bits (190 films of IU X-ray, 79 images of
    VQA-RAD); films of different patients in at least 48 (3,794 of IU X-ray), different images of VQA-RAD in at least
    68. Hence SAME_IMAGE. Two exposures of one patient lie at 30 and up; a copy without its outer 2 % differs in about
    40 bits and is not found.
    """
    if pixels.ndim == 3:
        pixels = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    small = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.float32)).resize((64, 64), Image.BOX)
    low = dctn(np.asarray(small, np.float64), norm="ortho")[:16, :16].ravel()[1:]
    return low > np.median(low)


def similar_images(paths, max_distance=SAME_IMAGE):
    """
    paths: {id: path} -> groups of ids with the same pixels (`identical`), groups linked by hashes at most
    `max_distance` bits apart (`similar`; these hold the identical ones too), the pairs behind them with their distance,
    and ids that cannot be read with the reason. About 2 ms per image of 256 x 256 pixels on one core, and 0.3 s to
    compare 3,794 with each other.
    """
    ids, hashes, pixels_seen, unreadable = [], [], defaultdict(list), {}
    for key, path in paths.items():
        try:
            pixels = read_image(path)
        except InputError as error:
            unreadable[key] = str(error)
            continue
        ids.append(key)
        hashes.append(image_hash(pixels))
        pixels_seen[pixels.shape, hashlib.sha256(pixels.tobytes()).digest()].append(key)
    pairs = [(ids[i], ids[j], distance) for i, j, distance in near_pairs(np.array(hashes), max_distance)]
    return {
        "images": len(ids),
        "identical": [group for group in pixels_seen.values() if len(group) > 1],
        "similar": linked_groups(pairs),
        "pairs": pairs,
        "unreadable": unreadable,
    }


def near_pairs(hashes, max_distance, block=1024):
    """bool (N, bits) -> [(i, j, differing bits)] with i < j, nearest first."""
    signs = np.where(hashes, 1, -1).astype(np.float32)
    pairs = []
    for start in range(0, len(signs), block):
        distance = ((signs.shape[1] - signs[start : start + block] @ signs.T) / 2).round().astype(int)
        i, j = np.nonzero(distance <= max_distance)
        keep = i + start < j
        pairs += zip((i[keep] + start).tolist(), j[keep].tolist(), distance[i[keep], j[keep]].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: (pair[2], pair[0], pair[1]))


def linked_groups(pairs):
    """[(a, b, ...)] -> sorted groups of everything that is linked by pairs, however indirectly."""
    if not pairs:
        return []
    names = sorted({name for pair in pairs for name in pair[:2]})  # of any kind: (data set, image) too
    number = {name: i for i, name in enumerate(names)}
    ends = np.array([[number[a], number[b]] for a, b, *_ in pairs]).T
    links = coo_array((np.ones(len(pairs)), ends), shape=(len(names), len(names)))
    groups = defaultdict(list)
    for name, label in zip(names, connected_components(links, directed=False)[1], strict=True):
        groups[label].append(name)
    return sorted(groups.values())


def similar_across_splits(rows, paths):
    """similar_images of paths {id: path}, and those of its groups that lie in two splits. rows: [(id, split)]."""
    found, split_of = similar_images(paths), dict(rows)
    across = [group for group in found["similar"] if len({split_of[name] for name in group}) > 1]
    return found | {"similar across splits": across}
