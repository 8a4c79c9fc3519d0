"""Run VLMEvalKit's own `LLaVA` class, unmodified, on the golden tiny checkpoint.

python tests/clients/run_vlmevalkit.py FOLDER_WITH_VLMEVAL

Of VLMEvalKit only `vlmeval/vlm/base.py` and `vlmeval/vlm/llava/llava.py` are loaded; its data sets and tools need some
eighty packages and have stand-ins. Without a CUDA device, `cuda()` and `to("cuda")` leave everything where it is.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = str(ROOT / "tests" / "golden" / "llava_tiny")
PICTURES = [str(ROOT / "tests" / "golden" / "images" / name) for name in ("coffee.png", "astronaut.png")]


def stand_in(name: str, **names: object) -> types.ModuleType:
    """A module that holds these names."""
    module = types.ModuleType(name)
    module.__dict__.update(names)
    module.__path__ = []  # so that it can have modules below it
    sys.modules[name] = module
    return module


def load(name: str, path: Path) -> types.ModuleType:
    """A module from a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_llava(folder: Path) -> type:
    """The class, from a folder that holds `vlmeval`."""
    nothing = dict.fromkeys(("concat_images_vlmeval", "encode_image_to_base64", "listinstr", "parse_file"))
    stand_in("vlmeval")
    stand_in("vlmeval.dataset", DATASET_TYPE=lambda name: "MCQ", DATASET_MODALITY=lambda name: "IMAGE")
    stand_in("vlmeval.smp", cn_string=lambda text: False, splitlen=lambda text: len(text.split("/")), **nothing)
    stand_in("vlmeval.vlm")
    stand_in("vlmeval.vlm.llava")
    load("vlmeval.vlm.base", folder / "vlmeval" / "vlm" / "base.py")
    return load("vlmeval.vlm.llava.llava", folder / "vlmeval" / "vlm" / "llava" / "llava.py").LLaVA


def stay_on_the_cpu() -> None:
    """Let `cuda()` and `to("cuda")` do nothing, for this process."""
    move = torch.Tensor.to
    torch.nn.Module.cuda = lambda self, *_: self
    torch.Tensor.cuda = lambda self, *_: self
    torch.Tensor.to = lambda self, *a, **k: move(self, *(x for x in ("cpu" if x == "cuda" else x for x in a)), **k)


def main(folder: str) -> None:
    """Ask with one picture, two, and none; then in several turns. Prints each answer."""
    if not torch.cuda.is_available():
        stay_on_the_cpu()
    model = load_llava(Path(folder))(CHECKPOINT, max_new_tokens=8)
    text = {"type": "text", "value": "What is in the cup?"}
    one = [{"type": "image", "value": PICTURES[0]}, text]
    two = [{"type": "image", "value": PICTURES[1]}, *one]
    answers = [model.generate_inner(message) for message in (one, two, [text])]
    turns = [
        {"role": "user", "content": one},
        {"role": "assistant", "content": [{"type": "text", "value": "Coffee."}]},
        {"role": "user", "content": [{"type": "text", "value": "And which colour is it?"}]},
    ]
    answers.append(model.chat_inner(turns))
    line = {"question": "Which?", "hint": "Look.", "A": "one", "B": "two"}
    model.dump_image_func = lambda line: PICTURES[:1]
    answers.append(model.generate_inner(model.build_prompt(line, "MMBench_DEV_EN")))
    assert all(answers) and len(set(answers)) > 2, answers
    print("\n".join(answers))


if __name__ == "__main__":
    main(sys.argv[1])
