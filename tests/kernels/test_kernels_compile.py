"""Every kernel compiles for NVIDIA and AMD GPUs, with the arguments that it is called with. Needs no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAST_MEMORY = {"cuda:90": 99 * 1024, "hip:gfx942": 64 * 1024}  # of one processor; 99 KiB is what a desktop GPU has

COMPILE = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from duet.kernels import launch, source

class Absent:  # a GPU that kernels are compiled for and not run on
    def __init__(self, number, target):
        self.number, self.target = number, target
    def get_current_target(self):
        return self.target
    def get_current_device(self):
        return self.number
    def get_current_stream(self, device=None):
        return 0

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *args, **options: found.append(
            [target, self.kernel.__name__, self.kernel.warmup(*args, grid=grid, **options).metadata.shared])

found = []
for name in ("row_lse", "column_sums", "gather_rows", "cluster_means", "cluster_means_backward"):
    setattr(source, name, Compiled(getattr(source, name)))
for number, target in enumerate(sys.argv[1:]):
    kind, arch = target.split(":")
    gpu = GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)
    driver.set_active(Absent(number, gpu))
    for dtype in (torch.bfloat16, torch.float32):
        tower = torch.randn(1, 16, 577, 64, dtype=dtype)
        launch.column_mass(tower[:, :, 1:], tower, 0.125)
        x = torch.randn(1, 2, 512, 80, dtype=dtype)
        launch.column_mass(x, x, 0.1, torch.tensor([0, 100, 512]), torch.ones(1, 512, dtype=torch.bool))
        query, key, table = (torch.randn(*s, dtype=dtype) for s in ((2, 28, 1, 128), (2, 4, 640, 128), (1, 640, 128)))
        rows = torch.full((2, 1), 640), torch.ones(2, 1, dtype=torch.bool)
        launch.received(query, key, *rows, 0.1, torch.ones(2, 640, dtype=torch.bool), (table, table))
        x = torch.randn(1, 576, 1024, dtype=dtype).requires_grad_()
        launch.cluster_means(x, torch.zeros(1, 30, 4, dtype=torch.long)).sum().backward()
    hidden, mask = torch.randn(2, 640, 4096).bfloat16(), torch.ones(2, 640, dtype=torch.bool)
    places, index = torch.arange(640)[None], torch.zeros(2, 300, dtype=torch.long)
    for state in ([hidden, mask, places, torch.randn(1, 640, 128)], [mask], [hidden]):
        launch.gather_all(state, index)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_compiles_and_fits_into_the_fast_memory_of_a_processor(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *FAST_MEMORY],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * (2 * 8 + 3), "the calls of each target"
    for target, kernel, shared in found:
        assert shared <= FAST_MEMORY[target], f"{kernel} wants {shared} bytes on {target}"
