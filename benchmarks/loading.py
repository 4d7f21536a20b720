"""
Two things that loading costs: seconds and memory of bf16 against NF4, and image preprocessing in a loop against all at
once.

Usage:
    python benchmarks/loading.py  # models of about 50 M parameters with random weights, CPU, a minute
    python benchmarks/loading.py --models google/medgemma-4b-it --device cuda
    python benchmarks/loading.py --small                      # the short form for tests

Loading: `weights` are the bytes of the parameters (with the scales of quantised ones), `peak` what the process (or the
GPU's allocator) needed above what it had before. Preprocessing is compared with what a user would write first, the
processor's own apply_chat_template in a loop over the cases, and with one call of it for all; the aim is 10 times the
loop. Processor seconds are counted beside wall seconds, since other programs may share the machine. Writes
outputs/benchmarks/loading.json.
"""

import argparse
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import shared  # noqa: F401, isort: skip  # before transformers
import torch
from PIL import Image

from shared.models import memory
from shared.models.inputs import preprocess_images, prompt_ids
from shared.models.loading import load_vlm
from shared.models.passes import make_prompts, sample
from shared.models.tiny import tiny_folder
from shared.phantom import phantom_study
from shared.runtime import free_gpu, pick_device, positive_int, run_facts, script, write_json

MEDIUM = dict(
    hidden=512,
    mlp=2048,
    heads=8,
    kv_heads=2,
    layers=12,
    vision_hidden=512,
    vision_mlp=1024,
    vision_heads=8,
    vision_layers=6,
    vocab=1024,
)
FAMILIES = ("gemma3", "qwen2vl", "llava")


class PeakMemory:
    """
    Highest memory use inside a `with` block above the one before it, in bytes: of the GPU's allocator, else of the
    process.
    """

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def resident(self):
        try:
            with open("/proc/self/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * 4096
        except OSError:  # not Linux
            return 0

    def watch(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.resident() - self.before)

    def __enter__(self):
        self.before, self.peak, self.done = self.resident(), 0, threading.Event()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated() - self.before


def measure_loading(name, quant, device):
    start = time.perf_counter()
    with PeakMemory(device) as loading:
        vlm = load_vlm(name, quant=quant, device=device, dtype="bfloat16")
    seconds = time.perf_counter() - start
    layout = memory.read_layout(name)
    film = phantom_study(0, 0, 224).image
    with PeakMemory(device) as running, torch.inference_mode():
        start = time.perf_counter()
        sample(vlm, make_prompts(vlm, ["Is there a nodule?"], [film]), 1, 8)
        generated = time.perf_counter() - start
    row = {
        "model": name,
        "family": vlm.family,
        "quant": quant,
        "parameters": layout.parameters,
        "load_seconds": seconds,
        "load_peak_mb": loading.peak / 1e6,
        "weights_mb": memory.weight_bytes(layout, quant, torch.bfloat16) / 1e6,
        "generate_seconds": generated,
        "generate_peak_mb": running.peak / 1e6,
    }
    del vlm
    free_gpu()
    return row


def timed(function, repeats):
    """(processor seconds, wall seconds) of one call, the best of several."""
    function()
    best = []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        function()
        best.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(c for c, _ in best), min(w for _, w in best)


def measure_preprocessing(family, count, repeats):
    vlm = load_vlm("tiny:" + family)
    films = [phantom_study(0, i, 224).image for i in range(count)]
    pictures, questions = [Image.fromarray(f) for f in films], ["Is there a nodule?"] * count
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": q}]}]
        for p, q in zip(pictures, questions, strict=True)
    ]
    options = dict(
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=dict(padding=True),
    )
    images = preprocess_images(vlm.processor, films)

    def texts(images):
        return [prompt_ids(vlm, q, (tuple(grid),)) for q, grid in zip(questions, images.grids, strict=True)]

    ways = {
        "processor, loop": lambda: [vlm.processor.apply_chat_template(c, **options) for c in chats],
        "processor, one call": lambda: vlm.processor.apply_chat_template(chats, **options),
        "ours": lambda: texts(preprocess_images(vlm.processor, films)),
        "ours, images ready": lambda: texts(images),
        "images only: processor, loop": lambda: [
            vlm.processor.image_processor(images=[p], return_tensors="pt") for p in pictures
        ],
        "images only: preprocess_images": lambda: preprocess_images(vlm.processor, films),
    }
    row = {"family": family, "images": count}
    for name, way in ways.items():
        row[name] = [1000 * s / count for s in timed(way, repeats)]
    return row


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--models", nargs="*",
        help="hub names or folders (default: the three families at 50 M parameters, random)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--images", type=positive_int, default=128, help="films per timing (%(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=3,
        help="timings per row; the best counts (%(default)s)")
    # fmt: on
    parser.add_argument("--small", action="store_true", help="models of 2 M parameters, 8 films, once")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(argv)
    if args.small:
        args.images, args.repeats = 8, 1
    started = time.time()
    device, _ = pick_device(args.device)
    models = args.models or [str(tiny_folder("tiny:" + f, **({} if args.small else MEDIUM))) for f in FAMILIES]
    loading = [measure_loading(name, quant, device) for name in models for quant in ("none", "nf4")]
    preprocessing = [measure_preprocessing(family, args.images, args.repeats) for family in FAMILIES]

    print(
        "\n| family | M parameters | weights held in | load s | load peak MB | weights MB | 8 tokens s | running peak"
        " MB |\n|---|---|---|---|---|---|---|---|"
    )
    for r in loading:
        held = "bf16" if r["quant"] == "none" else r["quant"]
        print(
            f"| {r['family']} | {r['parameters'] / 1e6:.1f} | {held} | {r['load_seconds']:.2f} |"
            f" {r['load_peak_mb']:.0f} | {r['weights_mb']:.1f} | {r['generate_seconds']:.2f} |"
            f" {r['generate_peak_mb']:.0f} |"
        )
    print(
        "\nmilliseconds per case, processor time (wall time)\n\n| "
        + " | ".join(["way", *FAMILIES])
        + " |\n|---|---|---|---|"
    )
    ways = [k for k in preprocessing[0] if k not in ("family", "images")]
    for way in ways:
        print(f"| {way} | " + " | ".join(f"{r[way][0]:.2f} ({r[way][1]:.2f})" for r in preprocessing) + " |")
    for r in preprocessing:
        r["ratio"] = [r["processor, loop"][i] / r["ours"][i] for i in (0, 1)]
        r["ratio_images_ready"] = [r["processor, loop"][i] / r["ours, images ready"][i] for i in (0, 1)]
    print(
        "| loop / ours | " + " | ".join(f"{r['ratio'][0]:.1f} x ({r['ratio'][1]:.1f} x)" for r in preprocessing) + " |"
    )
    print(
        "| loop / images ready | "
        + " | ".join(f"{r['ratio_images_ready'][0]:.1f} x ({r['ratio_images_ready'][1]:.1f} x)" for r in preprocessing)
        + " |"
    )
    write_json(
        args.out_dir / "loading.json",
        {"loading": loading, "preprocessing": preprocessing, **run_facts(started, device)},
    )
    print(f"results in {args.out_dir / 'loading.json'}")
    return loading, preprocessing


if __name__ == "__main__":
    main()
