"""
Makes torchvision importable and sets up the CUDA allocator. Import anything from `shared` before torchvision or
transformers.

A torchvision wheel built for CUDA beside a CPU-only torch cannot load its C++ operators, and its import fails with
"operator torchvision::nms does not exist"; transformers and peft then fail too. Nothing here uses these operators
(images are decoded with Pillow), so declaring their names is enough. A healthy torchvision must not meet the
declaration first: try the import, and declare only when it failed for this very reason.
"""

import os
import sys

# Fewer out-of-memory failures from fragmentation. Read when torch first touches CUDA, so it has to be set before; torch
# renamed the variable in 2.9, older versions read the second name. A value chosen by the user is left alone.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ[name] = "expandable_segments:True"


def quiet_interrupt(kind, error, trace):
    """Ctrl-C during the seconds that the imports take is no bug; afterwards `script` in runtime.py says the same."""
    print("interrupted", file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, error, trace)


sys.excepthook = quiet_interrupt

from torch.library import Library

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # the declarations live as long as this object


def make_torchvision_importable():
    """Import torchvision; returns "ok", "declared" (operators had to be declared) or "absent" (not installed)."""
    global _library
    try:
        import torchvision  # noqa: F401

        return "ok" if _library is None else "declared"
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        return "absent"  # transformers then uses its Pillow image processors; task 1 says what is missing
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[module]  # half-imported
    _library = Library("torchvision", "FRAGMENT")
    for schema in OPERATORS:
        _library.define(schema)
    import torchvision  # noqa: F401

    return "declared"


TORCHVISION = make_torchvision_importable()
