"""
shared/__init__.py with a broken, a healthy and no torchvision, and the allocator settings.

The fake torchvision registers its operators' shapes as the real one does at import; torch itself then says that an
operator does not exist. Each test starts one process, since importing torch takes seconds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import shared

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

PRELUDE = """
import importlib, json, os, sys
sys.path.insert(0, ROOT)

def fresh(folder=None):
    "Import shared anew, with the fake torchvision of this folder."
    for name in [m for m in sys.modules if m.split(".")[0] in ("shared", "torchvision")]:
        del sys.modules[name]
    sys.path[:] = ([folder] if folder else []) + [p for p in sys.path if not p.startswith("fake")]
    importlib.invalidate_caches()
    return importlib.import_module("shared")
"""

REGISTERS = (
    'import torch\n\n@torch.library.register_fake("torchvision::nms")\ndef meta_nms(dets, scores, iou_threshold):\n   '
    " return dets\n"
)


def package(folder, init, **modules):
    (Path(folder) / "torchvision").mkdir(parents=True)
    for name, text in {"__init__": init, **modules}.items():
        (Path(folder) / "torchvision" / f"{name}.py").write_text(text)


def run(code, **environment):
    """The JSON that the code prints last."""
    kept = {k: v for k, v in os.environ.items() if k not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", f"ROOT = {str(ROOT)!r}\n{PRELUDE}\n{code}"],
        capture_output=True,
        text=True,
        env=kept | environment,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_this_environment_has_a_torchvision():
    assert shared.TORCHVISION in ("ok", "declared") and shared.make_torchvision_importable() == shared.TORCHVISION


def test_a_torchvision_without_its_operators_is_made_importable():
    package("fake", "from . import ops\nfrom ._meta import meta_nms\ncount = 1\n", ops="", _meta=REGISTERS)
    found = run("""
import torch
sys.path.insert(0, "fake")
try:
    import torchvision
except RuntimeError as error:
    alone = str(error)
shared = fresh("fake")
import torchvision, torchvision.ops
print(json.dumps({"alone": alone, "state": shared.TORCHVISION, "again": shared.make_torchvision_importable(),
                  "count": torchvision.count,
                  "declared": [hasattr(torch.ops.torchvision, name) for name in ("nms", "qnms", "roi_align")]}))
""")
    assert "operator torchvision::nms does not exist" in found["alone"]  # the fake fails as the real one does
    assert found == {
        "alone": found["alone"],
        "state": "declared",
        "again": "declared",
        "count": 1,
        "declared": [True, True, False],
    }


def test_a_healthy_an_absent_and_another_broken_torchvision():
    define = (
        'import torch\nlibrary = torch.library.Library("torchvision", "DEF")\nlibrary.define("nms(Tensor dets, Tensor'
        ' scores, float iou_threshold) -> Tensor")\n'
    )
    package("fake1", "healthy = True\n")
    package("fake2", define + "from . import _meta\n", _meta=REGISTERS)
    package("fake3", 'raise RuntimeError("CUDA driver version is insufficient")\n')
    package("fake4", "import a_module_that_is_not_there\n")
    found = run("""
found = {}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
block = Block()
sys.meta_path.insert(0, block)
found["absent"] = fresh().TORCHVISION
sys.meta_path.remove(block)

for name in ("fake3", "fake4"):
    try:
        fresh(name)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
shared = fresh("fake1")
import torch
found["plain"] = [shared.TORCHVISION, shared._library is None, hasattr(torch.ops.torchvision, "nms")]
shared = fresh("fake2")
there = [hasattr(torch.ops.torchvision, name) for name in ("nms", "qnms")]
found["with operators"] = [shared.TORCHVISION, shared._library is None, *there]

# the allocator: what was set when torch was imported, and what happens to the user's own values
new, old = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
for own in ({}, {new: "a:1"}, {old: "b:2"}, {new: "c:3", old: "d:4"}, {old: ""}):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.pop(name, None)
    os.environ.update(own)
    fresh("fake1")
    found[json.dumps(own)] = {k: v for k, v in os.environ.items() if k.endswith("ALLOC_CONF")}
print(json.dumps(found))
""")
    assert found["absent"] == "absent"
    assert found["fake3"] == "RuntimeError: CUDA driver version is insufficient"
    assert found["fake4"] == "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    assert found["plain"] == ["ok", True, False] and found["with operators"] == ["ok", True, True, False]
    assert found["{}"] == dict.fromkeys(NAMES, "expandable_segments:True")
    own = [json.loads(key) for key in found if key.startswith('{"')]
    assert len(own) == 4 and all(found[json.dumps(settings)] == settings for settings in own)


def test_the_allocator_is_set_before_torch_is_imported():
    package("fake", "healthy = True\n")
    found = run("""
seen = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not seen:
            seen.append({k: v for k, v in os.environ.items() if k.endswith("ALLOC_CONF")})
sys.meta_path.insert(0, Watch())
fresh("fake")
print(json.dumps(seen))
""")
    assert found == [dict.fromkeys(NAMES, "expandable_segments:True")]
