"""Kernels that torch.compile makes of a step for GPUs that are not here: how many, their registers, their spills.

    python benchmarks/research/kernels.py --data-dir FOLDER --output benchmarks/results/kernels.json

Evidence that the compiled step fits a T4, an A100 and an H100 (training/compiling.py). No GPU is needed: the step is
traced on the CPU, inductor lowers the graph with its tensors declared to be on a GPU, and Triton compiles each kernel
for the architecture. Left out: kernels of cuDNN and cuBLAS (counted, since the libraries choose them on the device),
the optimizer, and the choice among several configurations, which takes measurements: each kernel's first one is shown.

Inductor's interfaces that this needs are private ones, as of torch 2.14.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock, patch

import torch
from torch import fx

from fastmnist.files import write_json
from fastmnist.presets import preset_config
from fastmnist.system.environment import origin
from fastmnist.system.progress import Reporter
from fastmnist.training.compiling import COMBINED
from fastmnist.training.overlap import overlap
from fastmnist.training.precision import Precision
from fastmnist.training.session import Session


class Target(NamedTuple):
    """An architecture: compute capability, multiprocessors, threads of one, and the 16-bit type of its tensor cores."""

    major: int
    minor: int
    processors: int
    threads: int
    amp: torch.dtype


TARGETS = {
    "sm_75 (T4)": Target(7, 5, 40, 1024, torch.float16),
    "sm_80 (A100)": Target(8, 0, 108, 2048, torch.bfloat16),
    "sm_90 (H100)": Target(9, 0, 132, 2048, torch.bfloat16),
}


def trace(preset: str, data_dir: str, amp: torch.dtype) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Loss and gradients of a preset's step as a graph of ATen operators, and its inputs, on the CPU."""
    from torch._inductor import lowering  # noqa: F401  decompositions look it up
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    config = preset_config(preset, dataset="mnist", data_dir=data_dir, val_size=0, device="cpu")
    with Session(config, Reporter(quiet=True), precision=lambda device: Precision(amp, "of the target")) as session:
        trainer = session.trainer
        model, low = trainer.model.train(), trainer.optimizer.low
        assert low is not None
        overlap(model)
        trainer.load_example()
        images, labels, _ = trainer._loaded
        size = trainer.loader.batch_size
        state = dict(model.named_parameters()) | dict(model.named_buffers()) | low.tensors
        trained = [name for name, tensor in state.items() if tensor.requires_grad]

        def step(images: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, *tensors: torch.Tensor) -> Any:
            low.tensors = dict(zip(state, tensors, strict=True))
            trainer._targets = targets
            loss, right = trainer.forward(images, labels)
            return loss, right, *torch.autograd.grad(loss, [low.tensors[name] for name in trained])

        inputs = [images[:size], labels[:size], trainer._targets, *state.values()]
        return make_fx(step, decomposition_table=select_decomp_table())(*inputs), inputs


@contextmanager
def pretended(target: Target) -> Iterator[None]:
    """Within it, torch and Triton take this machine to have that GPU; none of its code can run."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    capability = 10 * target.major + target.minor
    properties = SimpleNamespace(
        name="",
        major=target.major,
        minor=target.minor,
        multi_processor_count=target.processors,
        max_threads_per_multi_processor=target.threads,
        regs_per_multiprocessor=1 << 16,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=1 << 34,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_properties": properties,
        "get_device_capability": (target.major, target.minor),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch(f"torch.cuda.{name}", Mock(return_value=answer)))
        for place in (CudaInterface, CudaInterface.Worker):
            stack.enter_context(patch.object(place, "get_device_properties", Mock(return_value=properties)))
        stack.enter_context(patch.object(CudaInterface, "get_compute_capability", Mock(return_value=capability)))
        stack.enter_context(patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu"))
        stack.enter_context(config.patch(COMBINED | {"use_static_triton_launcher": False}))
        gpu = GPUTarget("cuda", capability, 32)
        driver.set_active(Mock(**{"get_current_target.return_value": gpu, "get_current_device.return_value": 0}))
        yield


def lower(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> str:
    """Inductor's code for a graph whose tensors are said to be on a GPU."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode

    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    with FakeTensorMode() as mode:
        there = [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="cuda") for each in inputs]
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        view_to_reshape(graph)
        fake_tensor_prop(graph, there, True)
        _recursive_post_grad_passes(graph, is_inference=True)
        lowering = GraphLowering(graph, example_inputs=there, is_inference=True)
        with V.set_graph_handler(lowering):
            lowering.run(*there)
            code = lowering.codegen()[0]
    return str(getattr(code, "value", code))


LIBRARY_CALL = re.compile(r"(?:extern_kernels|torch\.ops\.\w+)\.(\w+)(?:\.\w+)?\(")
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)


def compiled(code: str) -> list[dict[str, Any]]:
    """Each Triton kernel of inductor's `code`: its name, registers of a thread, bytes spilled, shared memory."""
    from torch._inductor.codecache import PyCodeCache
    from triton import knobs

    rows = []
    for name, source in KERNEL.findall(code):
        kernel = getattr(PyCodeCache.load(source), name)
        binary = kernel._precompile_config(kernel.configs[0]).kernel
        architecture = re.findall(r"^\.target (\w+)", binary.asm["ptx"], re.MULTILINE)[0]
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(binary.asm["ptx"])
            file.flush()
            command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers, stores, loads = (
            int(re.findall(pattern, printed)[-1])
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
        )
        rows.append({"name": name, "registers": registers, "spilled": stores + loads, "shared": binary.metadata.shared})
    return rows


def measure(preset: str, data_dir: str, name: str) -> dict[str, Any]:
    target = TARGETS[name]
    graph, inputs = trace(preset, data_dir, target.amp)
    with pretended(target):
        code = lower(graph, inputs)
        kernels = compiled(code)
    libraries = Counter(LIBRARY_CALL.findall(code.partition("def call")[2]))
    return {
        "preset": preset,
        "target": name,
        "dtype": str(target.amp).removeprefix("torch."),
        "kernels": len(kernels),
        "most_registers": max(kernel["registers"] for kernel in kernels),
        "spilling": [kernel for kernel in kernels if kernel["spilled"]],
        "libraries": dict(libraries.most_common()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder with MNIST's IDX files")
    parser.add_argument("--presets", nargs="+", default=["fast99", "accurate"])
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    rows = []
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # torch keeps the properties of its first GPU
        for preset in options.presets:
            for name in TARGETS:
                rows.append(pool.apply(measure, (preset, options.data_dir, name)))
                print(rows[-1], flush=True)
    if options.output:
        write_json(options.output, origin(torch.device("cpu")) | {"rows": rows})


if __name__ == "__main__":
    main()
