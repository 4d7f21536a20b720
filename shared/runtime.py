"""
What every script needs and must not do differently: arguments, seed, device, memory, checkpoints, JSON, CSV, reports,
run folders.

A script reads:

    @script                                                # InputError -> one sentence, exit code 2
    def main(argv=None):
        args = parse_args(argv)                            # script_parser(__doc__, task=...) and the script's own
                                                           groups
        seed_everything(args.seed)
        device, dtype = pick_device(args.device)
        run_dir = open_run_dir(args, "task1_classification", "train")
        ...
        write_json(run_dir / "metrics.json", {...} | run_facts(started, device))
"""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import argparse
import contextlib
import csv
import errno
import functools
import gc
import hashlib
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

ROOT = Path(__file__).resolve().parents[1]


class InputError(Exception):
    """What the user gave cannot be used. The message is one sentence: what is wrong and what to do. Exit code 2."""


class DataNotFound(InputError):
    """The data set is neither there nor can it be downloaded."""


PLACES = (errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
FULL = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def script(main=None, *, torchrun=False):
    """
    Decorator of every main(argv=None): turns the failures a user can mend into one sentence and exit code 2.
    torchrun: the script shares its work between the processes that torchrun starts; the others refuse to be started so.
    """
    if main is None:
        return functools.partial(script, torchrun=torchrun)

    @functools.wraps(main)
    def wrapped(argv=None):
        code, open_before = 2, set(RUNS)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError):  # file names of any bytes can be printed
                stream.reconfigure(errors="backslashreplace")
        try:
            if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torchrun:
                raise InputError("this script works in one process: start it with python, not with torchrun")
            return main(argv)
        except InputError as error:
            message = str(error)
        except torch.OutOfMemoryError:
            message = "the GPU is out of memory: lower --batch-size, or close what else runs on the card"
        except KeyboardInterrupt:
            code, message = 130, "interrupted"
        except BrokenPipeError:  # ... | head: nobody reads on
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except (OSError, MemoryError, RuntimeError) as error:
            message = mendable(error)
            if message is None:
                raise
        finally:
            for run_dir in set(RUNS) - open_before:
                close_run(run_dir)
            if dist.is_initialized():
                dist.destroy_process_group()
        if is_main_process():
            print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(code)

    return wrapped


def mendable(error):
    """One sentence for a failure of the machine that a user can mend, None for any other."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "not enough memory" in str(error):
        return "there is not enough memory: lower --batch-size or --limit, or close what else runs"
    named, why, elsewhere = getattr(error, "filename", None), getattr(error, "strerror", None), "choose another place"
    elsewhere += " (--out-dir, or what named this one)"
    if getattr(error, "errno", None) in PLACES:
        return f"cannot use {named}: {why}; {elsewhere}"
    full = re.search(r"\d+ requested and \d+ written", str(error))  # NumPy's words
    if full or getattr(error, "errno", None) in FULL:
        return f"cannot write {named or 'the results'}: {why or 'No space left on device'}; {elsewhere}"
    return None


def command(script, *arguments):
    """A command of this project, to be pasted where the user is now: command("task1/train.py", "--resume", folder)."""
    path = ROOT / script
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return shlex.join(["python", *map(str, (path, *arguments))])


# ---------------------------------------------------------------------------------------------------------- arguments

ALIASES = {"--cfg": "--config", "--base-model": "--model", "--output-dir": "--out-dir", "--dataset": "--data"}


class ScriptParser(argparse.ArgumentParser):
    """argparse with underscores accepted in flags, a few documented aliases, --config, and one-line errors."""

    script_dir = Path()

    def parse_args(self, argv=None, namespace=None):
        argv = [self.dashed(str(a)) for a in (sys.argv[1:] if argv is None else argv)]
        namespace = argparse.Namespace() if namespace is None else namespace
        if any("\0" in argument for argument in argv):
            self.error("an argument holds a NUL character")
        first = ScriptParser(prog=self.prog, add_help=False, allow_abbrev=False)
        for name in ("--config", "--out-dir"):
            first.add_argument(name)
        first.add_argument("--resume", nargs="?", const=True)
        early = first.parse_known_args(argv)[0]
        # The settings of a file, or of the run that goes on, come first, so that flags on the command line win.
        if early.config is not None:
            argv = self.arguments_of(*self.read_config(early.config), namespace) + argv
            early = first.parse_known_args(argv)[0]  # the file may name the run to go on with
        if early.resume and "--resume" in self._option_string_actions:
            argv = self.arguments_of_run(early.out_dir if early.resume is True else early.resume, namespace) + argv
        return super().parse_args(argv, namespace)

    def dashed(self, argument):
        """--batch_size=8 -> --batch-size=8, --cfg -> --config; values pass through."""
        flag, equals, value = argument.partition("=")
        if not re.fullmatch(r"--[A-Za-z][\w-]*", flag):
            return argument
        flag = flag.replace("_", "-")
        return (flag if flag in self._option_string_actions else ALIASES.get(flag, flag)) + equals + value

    def read_config(self, name):
        """--config FILE -> (its settings, its path)."""
        path = next((p for p in (Path(name), self.script_dir / name) if p.is_file()), None)
        if path is None:
            self.error(f"--config: there is no file {name}, neither here nor in {self.script_dir}")
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8-sig"))  # JSON is YAML
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # a 13th month, 6,000 digits, a thousand brackets
            self.error(f"--config: {path} is not readable as YAML or JSON ({str(error).splitlines()[0]})")
        if not isinstance(settings, dict):
            self.error(f"--config: {path} must hold names and values, such as 'epochs: 15'")
        return settings, path

    def arguments_of_run(self, place, namespace):
        """--resume PATH -> the arguments that the run there was started with, all but where it writes."""
        path = resume_dir(place) / "settings.json" if place and Path(place).exists() else None
        if path is None or not path.is_file():
            return []  # open_run_dir says what is wrong
        then, settings, switches = read_json(path), {}, []
        for action in self._actions:
            value = then.get(action.dest)
            if value is None or action.dest in ("config", "out_dir", "overwrite", "resume"):
                continue
            if action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction):  # store_true, store_false
                switches += [action.option_strings[0]] if action.const is value else []
            elif action.option_strings:
                settings[action.option_strings[0][2:]] = value
        return self.arguments_of(settings, path, namespace) + switches

    def arguments_of(self, settings, path, namespace):
        """
        Settings by name as command-line arguments, so that types and choices are checked alike. Lists go into the
        namespace, since "--seeds 3 4" would take the positional arguments that follow as its own.
        """
        argv = []
        for key, value in settings.items():
            flag = self.dashed(f"--{key}") if len(key) > 1 else f"-{key}"
            action = self._option_string_actions.get(flag)
            if action is None or flag in ("--config", "--help"):
                self.error(f"--config: '{key}' in {path} is not an option of this script (see --help)")
            if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
                if not isinstance(value, bool):
                    self.error(f"--config: '{key}' in {path} must be true or false, not {value!r}")
                if value:
                    argv.append(flag)
                elif isinstance(action, argparse.BooleanOptionalAction):
                    argv.append("--no-" + flag[2:])
            elif isinstance(value, (list, dict)):
                if isinstance(value, dict) or action.nargs in (None, "?") or not (value or action.nargs == "*"):
                    self.error(f"--config: '{key}' in {path} cannot be {value!r}")
                try:
                    setattr(namespace, action.dest, self._get_values(action, [str(v) for v in value]))
                except argparse.ArgumentError as error:
                    self.error(str(error))
            elif value is not None:
                argv.append(f"{flag}={value}")
        return argv

    def error(self, message):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def script_parser(doc, task, data=None):
    """
    The parser of one script: `doc` is its docstring, `task` its folder; `data` names the task's real data set where the
    script reads one. The shared options stand here; a script adds its own groups to what this returns.
    """
    parser = ScriptParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.script_dir = Path(__file__).resolve().parents[1] / task
    g = parser.add_argument_group("run")
    g.add_argument("--config", metavar="FILE", help="YAML or JSON file with the same names; flags given here win")
    g.add_argument("--seed", type=seed_number, default=0, help="seed of every random choice (%(default)s)")
    # fmt: off
    g.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"],
        help="where to compute (%(default)s)")
    g.add_argument("--out-dir", metavar="DIR", help=f"results folder (default: a new outputs/{task}/<script>/<number>)")
    g.add_argument("--overwrite", action="store_true", help="replace the run that --out-dir already holds")
    g.add_argument("--dry-run", action="store_true",
        help="everything once on a few phantom images, on the CPU, in seconds")
    # fmt: on
    g.add_argument("--limit", type=positive_int, metavar="N", help="use only the first N cases of each split")
    if data is not None:
        g = parser.add_argument_group("data")
        g.add_argument(
            "--data",
            default="auto",
            metavar="NAME",
            help=f"data set; auto = {data} where it can be had, else the phantom (%(default)s)",
        )
        g.add_argument(
            "--data-dir",
            metavar="DIR",
            default=os.environ.get("MEDVLM_DATA") or "data",
            help="folder with the data files; $MEDVLM_DATA, else data (%(default)s)",
        )
    return parser


def add_resume(group):
    """--resume for scripts that train: a path, or alone together with --out-dir."""
    # fmt: off
    group.add_argument("--resume", nargs="?", const=True, metavar="PATH",
        help="go on from a run folder or its last.pt; alone: from --out-dir")
    # fmt: on


def bounded(kind, low, high, below=None):
    """argparse type: a number of this kind (int or float) from low to high; `below`: what is said of a lower one."""

    def number(text):
        value = kind(text)
        if below and high < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at most {high:g}, not {text}")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{below or f'must be between {low} and {high}'}, not {text}")
        return value

    return number


positive_int = bounded(int, 1, 10**9, "must be at least 1")
positive_float = bounded(float, 1e-12, 1e6, "must be above 0")  # what lies beyond is a typing error, and overflows
not_negative = bounded(float, 0, 1e6, "must be 0 or more")
fraction = bounded(float, 0, 1)
seed_number = bounded(int, 0, 2**32 - 1)


# ----------------------------------------------------------------------------------- seed, device, memory, several GPUs


def seed_everything(seed):
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name="auto", dtype="auto"):
    """
    --device and --dtype -> (torch.device, torch.dtype to compute in); both are printed with the reason. Under torchrun
    each process takes the GPU of its local rank. InputError when the device asked for is not there.
    """
    mps = torch.backends.mps.is_available()
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA GPU; use --device cpu, or install a CUDA build of torch")
    if name == "mps" and not mps:
        raise InputError("--device mps: torch sees no Apple GPU; use --device cpu")
    why = "asked for"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        why = {"cuda": "a CUDA GPU is there", "mps": "an Apple GPU is there", "cpu": "no GPU is there"}[name]
    device = (
        torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        if name == "cuda"
        else torch.device(name)
    )
    if dtype == "float16" and device.type == "cpu":
        raise InputError("--dtype float16 is for GPUs (a CPU takes a hundred times as long): use float32 or bfloat16")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        why += f": {torch.cuda.get_device_name(device)}"
    if dtype != "auto":
        chosen, dtype_why = getattr(torch, dtype), "asked for"
    elif device.type != "cuda":
        chosen, dtype_why = torch.float32, "the safe choice outside CUDA"
    elif torch.cuda.get_device_capability(device)[0] >= 8:
        chosen, dtype_why = torch.bfloat16, "this GPU computes bfloat16"
    else:
        chosen, dtype_why = torch.float16, "this GPU (a T4, say) has no fast bfloat16"
    if is_main_process():
        print(f"device: {device} ({why}), dtype: {str(chosen).removeprefix('torch.')} ({dtype_why})", flush=True)
    return device, chosen


def free_gpu():
    """Hand unused memory back; call after `del model` and before the next model is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(device):
    """
    Highest memory use so far in GiB: of this process (peak_ram_gib) and of the GPU's allocator; None where unknown.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    ram = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    gpu = torch.cuda.max_memory_allocated(device) / 2**30 if torch.device(device).type == "cuda" else None
    return {"peak_ram_gib": ram and round(ram, 3), "peak_gpu_gib": gpu and round(gpu, 3)}


def peak_words(device):
    """peak_memory to be printed: "0.65 GiB RAM, 7.20 GiB GPU"."""
    sizes = zip(peak_memory(device).values(), ("RAM", "GPU"), strict=True)
    return ", ".join(f"{gib:.2f} GiB {where}" for gib, where in sizes if gib) or "unknown"


def start_distributed(device):
    """
    Join the group when started by torchrun (nccl on GPUs, gloo elsewhere); returns (rank, world_size), (0, 1) alone.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    return (dist.get_rank(), world_size) if world_size > 1 else (0, 1)


def is_main_process():
    return int(os.environ.get("RANK", 0)) == 0


# ------------------------------------------------------------------------------------------------- checkpoints and JSON


@contextlib.contextmanager
def atomic_file(path, mode="wb"):
    """Open a temporary file beside `path`, renamed onto it only when the block ends well: never a half-written file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        record(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path):
    """A temporary folder beside `path` that takes its place only when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    building, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}part") for end in ("", "old."))
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        yield building
        if path.exists():
            os.replace(path, old)
        os.replace(building, path)
        record(path)
    finally:
        for folder in (building, old):
            shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values (what torch.load(weights_only=True) reads back), atomically."""
    check_plain(state)
    with atomic_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error


def check_plain(value, where="checkpoint"):
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_plain(item, f"{where}[{i}]")
    elif type(value) not in (int, float, str, bool, type(None)) and not isinstance(value, torch.Tensor):
        raise TypeError(f"{where} is a {type(value).__name__}; checkpoints hold tensors and plain values only")


def digest(value):
    """sha256 of what a checkpoint holds: tensors, and plain values in dicts and lists, with their names."""

    def pieces(value):
        if isinstance(value, dict):
            for name, item in value.items():
                yield str(name).encode()
                yield from pieces(item)
        elif isinstance(value, (list, tuple)):
            yield b"["
            for item in value:
                yield from pieces(item)
            yield b"]"
        elif isinstance(value, torch.Tensor):
            yield value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        else:
            yield repr(value).encode()

    sha256 = hashlib.sha256()
    for piece in pieces(value):
        sha256.update(piece)
    return sha256.hexdigest()


def load_checkpoint(path, keys=(), what="checkpoint"):
    """
    Read a checkpoint onto the CPU without ever running pickled code. InputError when it is not one, or lacks `keys`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no {what} at {path}; give the path of one, or train it first")
    try:
        if zipfile.is_zipfile(path):  # torch writes checksums, and does not look at them
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here; none of them is a bug of the script
        unsafe = "GLOBAL" in str(error)  # "Unsupported global: GLOBAL pathlib.Path.touch ..."
        why = "it holds pickled Python code, which is never run" if unsafe else "the file is damaged or of another kind"
        raise InputError(f"{path} cannot be read as a {what}: {why}") from error
    missing = [k for k in keys if not isinstance(state, dict) or k not in state]
    if missing:
        raise InputError(f"{path} is not a {what} of this script: it lacks {', '.join(missing)}")
    return state


def plain(value):
    """Anything a script measures -> JSON: NumPy and torch values become numbers and lists, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)


def write_json(path, value):
    with atomic_file(path, "w") as file:
        json.dump(plain(value), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path, kind=dict):
    """-> dict (kind=object: any value). InputError when the file is missing, is not JSON, or holds something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} is damaged or another file: it holds a {type(value).__name__}, not an object")
    return value


def write_jsonl(path, rows):
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def write_csv(path, rows):
    """rows: dicts with the same names, at least one."""
    with atomic_file(path, "w") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------------------------------------------------- run folders

RUNS = {}  # the run folders that this process has open: absolute path -> {lock, names written down, is it new?}
WRITTEN = ".written"  # in a run folder: what the run wrote there, one name a line


def open_run_dir(args, task, name):
    """
    The folder this run writes to, created, locked and printed; its settings.json holds every argument. Without
    --out-dir: the next free outputs/<task>/<name>/001, 002, ... (dry runs: .../dry-run, replaced each time). InputError
    when a folder given by name holds a run already and neither --resume nor --overwrite is given, or when another
    process is writing there. Call it last, when all that may be refused was looked at: --overwrite removes the old run.
    """
    if not is_main_process():  # rank 0 creates the folder and tells the others
        problem, run_dir = json.loads(broadcast_text(None))
        if problem:
            raise InputError(problem)
        return Path(run_dir)
    try:
        run_dir = claim_run_dir(args, Path("outputs") / task / name, f"{task}/{name}.py")
    except InputError as error:
        broadcast_text(json.dumps([str(error), None]))
        raise
    print(f"results go to {run_dir}", flush=True)
    broadcast_text(json.dumps([None, str(run_dir)]))
    return run_dir


def claim_run_dir(args, base, script_name):
    resume = getattr(args, "resume", None)
    run_dir = Path(args.out_dir) if args.out_dir else None
    if resume is True and run_dir is None:
        raise InputError("--resume alone goes on in --out-dir: name that folder, or give --resume the path of the run")
    if resume and resume is not True:
        if run_dir is not None:
            raise InputError("--resume PATH goes on in the folder of PATH; leave --out-dir out")
        run_dir = resume_dir(resume)
    if resume and not (run_dir / "settings.json").exists():
        raise InputError(
            f"--resume: there is nothing to go on with in {run_dir}; leave --resume out to start a run there"
        )
    if run_dir is None and not args.dry_run:
        run_dir = new_numbered(base)
    run_dir = run_dir or base / "dry-run"
    run_dir.mkdir(parents=True, exist_ok=True)
    lock_run(run_dir)
    if not resume:
        problem = None
        if args.out_dir and holds_run(run_dir) and not args.overwrite:
            problem = "already holds a run; go on with --resume, replace it with --overwrite, or"
        elif found := read_there(args, run_dir):
            problem = f"holds {found}, which is read here and would be removed with the old run;"
        if problem:
            close_run(run_dir)
            raise InputError(f"{run_dir} {problem} name another --out-dir")
        clear_run(run_dir)
        RUNS[run_dir.absolute()]["new"] = True
        settings = {k: v for k, v in vars(args).items() if k != "config"}
        write_json(run_dir / "settings.json", settings | {"script": script_name, "command": " ".join(sys.argv)})
    for part in run_dir.rglob(".*.part"):  # of a process that was killed while it wrote; the lock says that it is gone
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    return run_dir


def read_there(args, run_dir):
    """-> the first argument that names something which the run that was there before wrote, or None."""
    inside = run_dir.resolve()
    gone = [(run_dir / name).resolve() for name in written(run_dir)]
    values = [value for name, value in vars(args).items() if name != "out_dir"]
    for value in (v for some in values for v in (some if isinstance(some, (list, tuple)) else [some])):
        if isinstance(value, (str, Path)) and value and os.path.exists(value):
            path = Path(value).resolve()
            if path.is_relative_to(inside) and any(file.is_relative_to(path) for file in gone):
                return value
    return None


def broadcast_text(text):
    """The text of rank 0, on every rank."""
    box = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def new_numbered(base):
    """A new folder base/001, 002, ...: the next after the highest, and never one that another process made."""
    while True:
        numbers = [int(p.name) for p in base.glob("[0-9]*") if re.fullmatch("[0-9]+", p.name)]
        run_dir = base / f"{max(numbers, default=0) + 1:03d}"
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir()
            return run_dir


def lock_run(run_dir):
    """Two processes never write into one run folder. The lock ends with the process, however that ends."""
    close_run(run_dir, keep=True)
    lock = None
    if fcntl is not None:
        lock = os.open(run_dir, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise InputError(
                f"another process is writing into {run_dir}; wait for it, or name another folder"
            ) from error
        except OSError:  # a file system without locks
            os.close(lock)
            lock = None
    RUNS[run_dir.absolute()] = {"lock": lock, "names": set(written(run_dir)), "new": False}


def close_run(run_dir, keep=False):
    """Let go of the lock; unless `keep`, a new folder that got only its settings (the run was refused) is removed."""
    run = RUNS.pop(run_dir.absolute(), {"lock": None, "new": False})
    with contextlib.suppress(OSError):
        if run["new"] and not keep and set(os.listdir(run_dir)) == {"settings.json", WRITTEN}:
            clear_run(run_dir)
            run_dir.rmdir()
    if run["lock"] is not None:
        os.close(run["lock"])


def record(path):
    """Write down in its run folder that the run wrote this file, or all files of this folder; see clear_run."""
    path = Path(path).absolute()
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for run_dir, run in RUNS.items():
        names = [str(file.relative_to(run_dir)) for file in files if file.is_relative_to(run_dir)]
        names = [name for name in names if name not in run["names"]]
        if names:
            run["names"].update(names)
            with open(run_dir / WRITTEN, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(name) + "\n" for name in names)


def written(run_dir):
    """Names of the files that a run wrote into its folder, as far as they are written down."""
    try:
        lines = (run_dir / WRITTEN).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    names = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that was cut short
            names.append(json.loads(line))
    return [name for name in names if isinstance(name, str)]


def holds_run(run_dir):
    """A run that was refused before it wrote anything but its settings does not count."""
    names = [name for name in written(run_dir) if name != "settings.json"]
    return any((run_dir / name).exists() for name in names) or (
        (run_dir / "settings.json").exists() and not (run_dir / WRITTEN).exists()
    )


def clear_run(run_dir):
    """Remove exactly what the run in this folder wrote, and the folders this leaves empty."""
    inside = run_dir.resolve()
    for name in written(run_dir):
        path = run_dir / name
        if path.resolve().is_relative_to(inside) and (path.is_file() or path.is_symlink()):
            path.unlink()
            for folder in path.relative_to(run_dir).parents:
                with contextlib.suppress(OSError):  # not empty
                    (run_dir / folder).rmdir() if folder != Path() else None
    (run_dir / WRITTEN).unlink(missing_ok=True)
    if run_dir.absolute() in RUNS:
        RUNS[run_dir.absolute()]["names"].clear()


def resume_dir(path):
    """--resume PATH: a run folder, or a checkpoint in it."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"--resume: there is nothing at {path}")
    run_dir = path if path.is_dir() else path.parent
    part = re.match("seed|phase", run_dir.name) and (run_dir.parent / "settings.json").exists()
    return run_dir.parent if part else run_dir


def newest_run(task, name, holding):
    """
    The newest numbered run folder that holds a file `holding` (a name or a pattern), None without one. Runs on real
    data with all cases come before phantom runs, and these before runs with --limit; what is taken and what passed
    over is printed.
    """
    runs = [p for p in (Path("outputs") / task / name).glob("[0-9]*") if re.fullmatch("[0-9]+", p.name)]
    runs = sorted((p for p in runs if any(p.glob(holding))), key=lambda p: int(p.name), reverse=True)
    kinds = {run: run_kind(run) for run in runs}
    best = min(runs, key=lambda run: (bool(kinds[run]["limit"]), kinds[run]["phantom"]), default=None)
    if best is not None:
        words = {
            run: ", ".join([f"--limit {k['limit']}"] * bool(k["limit"]) + ["phantom"] * k["phantom"]) or "real data"
            for run, k in kinds.items()
        }
        passed = [f"{run.name} ({words[run]})" for run in runs[: runs.index(best)]]
        print(f"taking {best} ({words[best]})" + (f"; passed over {', '.join(passed)}" if passed else ""), flush=True)
    return best


def run_kind(run_dir):
    """What a run was -> {"limit": its --limit or None, "phantom": was its data made up?, "finished": to the end?}."""
    told = {}
    for name in ("settings", "metrics"):
        with contextlib.suppress(InputError):
            told[name] = read_json(Path(run_dir) / f"{name}.json")
    settings, metrics = (told.get(k, {}) for k in ("settings", "metrics"))
    dataset = metrics.get("dataset") if isinstance(metrics.get("dataset"), dict) else {}
    phantom = dataset.get("phantom", metrics.get("phantom", settings.get("data") == "phantom"))
    return {"limit": settings.get("limit"), "phantom": bool(phantom), "finished": bool(metrics)}


def run_facts(started, device):
    """What belongs into every metrics.json beside the numbers: seconds since `started`, memory, hardware, versions."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "seconds": round(time.time() - started, 2),
        **peak_memory(device),
        "hardware": {
            "device": str(device),
            "gpu": gpu,
            "cpu_threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
