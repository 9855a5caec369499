"""Evidence for `fastmnist doctor` and `watch`: twelve planted troubles, and what three tools say of them.

    python -m venv --system-site-packages .tools && .tools/bin/pip install traceml-ai loadtune
    .tools/bin/python benchmarks/research/verdicts.py --output benchmarks/results/verdicts.json

Each case is a training loop with one trouble. The model's compute is a pause, as an accelerator's is for the host,
except where cores are the trouble. Each tool looks at the case in a process of its own, set up as it documents:

- fastmnist: `doctor(loader, step)`; for troubles of a whole run (`watched`), `watch`;
- traceml-ai: `traceml run` of the loop with `traceml.init(mode="auto")` and `trace_step(model)`, and with
  `wrap_dataloader_fetch` where the loader is none of torch's; its primary diagnosis and those of its sections on
  memory, system and process;
- loadtune: `profile` of a `Workload` with the case's number of workers, then `tune`. It builds the DataLoader itself.

The rule was fixed before the first whole run: `MEANS` turns what a tool says into words, and it is right if one of them
is in the case's `right`. There is no accelerator here: the slow copy is to a stand-in, whose `Tensor.to` takes so long.
Other work on the machine is no part of a case: where that is allowed, cases that are not about cores or threads run at
real-time priority, the others at a niceness of -15.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

TOOLS = ("fastmnist", "traceml-ai", "loadtune")
LOOP_SECONDS, TIMEOUT = 20.0, 180.0
CORES = len(os.sched_getaffinity(0))
MEANS: dict[str, dict[str, str]] = {
    "traceml-ai": {
        "INPUT_BOUND": "loader",
        "H2D_BOUND": "copy",
        "COMPUTE_BOUND": "model",
        "NO_CLEAR_PERFORMANCE_BOTTLENECK": "model",
        "RESIDUAL_HEAVY": "stalls",  # "Logging, checkpointing, validation, CPU stalls, or unobserved work"
        "MEMORY_CREEP_EARLY": "memory",
        "MEMORY_CREEP_CONFIRMED": "memory",
        "HIGH_CPU": "host",
        "HIGH_PROCESS_CPU": "host",
    },
    "loadtune": {
        "input-bound": "loader",
        "CPU already saturated": "host",
        "compute-bound": "model",
        "mildly contended": "loader",
    },
}


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Samples of 784 values; each is prepared by `prepare`."""

    def __init__(self, prepare: Callable[[int], None] = lambda index: None) -> None:
        self.prepare = prepare
        self.values = torch.rand(10_000, 784, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.prepare(index)
        return self.values[index], index % 10


def read(seconds: float) -> Callable[[int], None]:
    return lambda index: time.sleep(seconds)


def decode(times: int) -> Callable[[int], None]:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "jpeg")

    def prepare(index: int) -> None:
        for _ in range(times):
            np.asarray(Image.open(io.BytesIO(buffer.getvalue())).resize((28, 28)))

    return prepare


def python_loop(index: int) -> None:
    total = 0
    for value in range(30_000):
        total += value * value % 7


class Rare:
    """A source that pauses at each 800th sample."""

    def __call__(self, index: int) -> None:
        if index % 800 == 799:
            time.sleep(0.4)


class Model(nn.Module):
    """A linear layer behind a pause, for each image or for each batch, or behind matrices multiplied on the host."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.linear, self.case = nn.Linear(784, 10), case
        self.matrix = torch.rand(500, 500)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        case = self.case
        time.sleep(case.fixed + case.pause * len(images) / case.batch_size)
        for _ in range(case.products * len(images) // case.batch_size):
            self.matrix @ self.matrix
        return self.linear(images)


class Ahead:
    """A loader's batches, made ahead by a thread."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        made: queue.Queue[Any] = queue.Queue(2)

        def work() -> None:
            for batch in self.loader:
                made.put(batch)
            made.put(None)

        threading.Thread(target=work, daemon=True).start()
        return iter(made.get, None)


class Case(NamedTuple):
    """One loop. pause, fixed: seconds of a step that its images take, and that it takes for any batch.

    right: words that count. copy: seconds to copy a batch to the stand-in. grows: bytes kept by each step.
    """

    right: tuple[str, ...]
    prepare: Callable[[int], None] = lambda index: None
    pause: float = 0.03
    fixed: float = 0.0
    products: int = 0
    batch_size: int = 64
    workers: int = 0
    shuffle: bool = True
    ahead: bool = False
    copy: float = 0.0
    grows: int = 0
    burners: int = 0
    watched: bool = False


CASES: dict[str, Case] = {
    "slow source": Case(("loader",), read(0.001)),
    "slow decode": Case(("loader",), decode(1)),
    "GIL-bound transform": Case(("loader",), python_loop, ahead=True),
    "too many workers": Case(("host", "fewer workers"), decode(12), 0.0, products=20, batch_size=32, workers=4 * CORES),
    "too few workers": Case(("loader", "more workers"), read(0.002), workers=1),
    "slow copy": Case(("copy",), copy=0.03),
    "tiny batches": Case(("batch",), pause=0.0, fixed=0.02, batch_size=4),
    "stalls every n steps": Case(("stalls",), Rare(), batch_size=32, shuffle=False, watched=True),
    "memory that creeps": Case(("memory",), grows=2 << 20, watched=True),
    "starved host": Case(("host",), products=20, pause=0.0, burners=2 * CORES),
    "slow model": Case(("model",), pause=0.1),
    "all well": Case(("model",), pause=0.05, workers=1),
}


def loader_of(case: Case) -> Any:
    loader = DataLoader(
        Images(case.prepare), case.batch_size, shuffle=case.shuffle, num_workers=case.workers, drop_last=True,
        persistent_workers=case.workers > 0,
    )  # fmt: skip
    return Ahead(loader) if case.ahead else loader


def step_of(case: Case) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Any, Any], torch.Tensor]]:
    model = Model(case)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    kept = []

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if case.copy:
            images = images.to("cuda")
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images.as_subclass(torch.Tensor)), labels)
        loss.backward()
        optimizer.step()
        if case.grows:
            kept.append(np.ones(case.grows, np.uint8))
        return loss

    return model, optimizer, step


def batches(loader: Any) -> Iterator[Any]:
    """Epochs for so many seconds after the first batch."""
    end = None
    for _ in itertools.count():
        for batch in loader:
            yield batch
            end = end or time.monotonic() + LOOP_SECONDS
            if time.monotonic() > end:
                return


class OnStandIn(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda, device = True, torch.device("cuda")


def stand_in(seconds: float, holder: Any = torch.Tensor, name: str = "to") -> ExitStack:
    """A GPU to which copying a batch takes so long, and whose work is done at once.

    holder, name: of the function that copies, if a tool has put its own before it.
    """
    real = torch.Tensor.to

    def to(tensor: torch.Tensor, *place: Any, **options: Any) -> torch.Tensor:
        if (place and torch.device("cuda") in place) or "cuda" in place:
            if not isinstance(tensor, OnStandIn):
                time.sleep(seconds)
            return tensor.as_subclass(OnStandIn)
        return real(tensor, *place, **options)

    stack = ExitStack()
    for target, attribute, new in (
        (holder, name, to),
        (torch.Tensor, "pin_memory", lambda tensor: tensor),
        (torch.cuda, "synchronize", lambda device=None: None),
    ):
        stack.enter_context(patch.object(target, attribute, new))
    return stack


def by_fastmnist(case: Case) -> dict[str, Any]:
    import fastmnist
    from fastmnist.measure import doctor as module

    _, _, step = step_of(case)
    if case.watched:
        watch = fastmnist.watch(loader_of(case))
        for images, labels in batches(watch):
            step(images, labels)
        found: Any = watch.report()
    else:
        with ExitStack() as stack:
            if case.copy:
                stack.enter_context(stand_in(case.copy))
                stack.enter_context(patch.object(module, "choose_device", lambda asked: torch.device("cuda")))
            found = fastmnist.doctor(loader_of(case), step, seconds=8)
    return {"words": [found.kind], "said": found.verdict}


def traced_loop(case: Case) -> None:
    """Training loop of a case, for `traceml run`."""
    import traceml_ai as traceml
    from traceml_ai.instrumentation.patches import h2d_auto_timer_patch

    loader = loader_of(case)
    with ExitStack() as stack:
        if case.copy:
            stack.enter_context(stand_in(case.copy, h2d_auto_timer_patch, "_ORIG_TENSOR_TO"))
        if case.ahead:  # no DataLoader: it is wrapped by hand
            traceml.init(mode="selective", patch_dataloader=False, patch_forward=True, patch_backward=True)
            loader = traceml.wrap_dataloader_fetch(loader)
        else:
            traceml.init(mode="auto")
        model, _, step = step_of(case)
        for images, labels in batches(loader):
            with traceml.trace_step(model):
                step(images, labels)


def by_traceml(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        command = [str(Path(sys.executable).with_name("traceml")), "run", __file__, "--logs-dir", folder]
        command += ["--run-name", "case", "--aggregator-port", port, "--args", "--traced", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        summaries = list(Path(folder).rglob("final_summary.json"))
        if done.returncode or not summaries:
            return {"words": [], "said": "", "error": (done.stderr or done.stdout).strip()[-300:]}
        summary = json.loads(summaries[0].read_text())
    found = [summary.get("primary_diagnosis") or {}]
    found += [(summary.get(part) or {}).get("diagnosis") or {} for part in ("step_memory", "system", "process")]
    kinds = [str(one.get("kind")) for one in found]
    means = MEANS["traceml-ai"]
    return {"words": [means[kind] for kind in kinds if kind in means], "said": ", ".join(kinds)}


def by_loadtune(case: Case) -> dict[str, Any]:
    import loadtune
    from loadtune.heuristic import HeuristicBrain
    from loadtune.knobs import Knobs

    def make_model() -> nn.Module:
        made.clear()
        made.extend(step_of(case))
        return made[0]

    made: list[Any] = []
    with ExitStack() as stack:
        if case.copy:
            stack.enter_context(stand_in(case.copy))
        workload = loadtune.Workload(
            name="case",
            make_dataset=lambda: Images(case.prepare),
            make_model=make_model,
            make_optimizer=lambda model: made[1],
            train_step=lambda model, optimizer, batch, device: made[2](*batch),
            default_batch_size=case.batch_size,
        )
        now = Knobs(num_workers=case.workers, persistent_workers=case.workers > 0)
        profile = loadtune.profile(workload, now, steps=60)
        said = HeuristicBrain().explain(profile, [])
        words = [word for text, word in MEANS["loadtune"].items() if text in said]
        if case.workers:
            best = loadtune.tune(workload, steps=60, max_trials=4, verbose=False).best
            if best is not None and best.throughput > profile.throughput:
                chosen = best.knobs.num_workers
                words.append("fewer workers" if chosen < case.workers else "more workers")
                said += f" tune: num_workers={chosen}"
    return {"words": words, "said": said}


def one(name: str, tool: str) -> dict[str, Any]:
    case = CASES[name]
    if tool == "traceml-ai":
        return by_traceml(name)
    return by_fastmnist(case) if tool == "fastmnist" else by_loadtune(case)


def before_others(case: Case) -> Callable[[], None]:
    """Raises the priority of the calling process, if it may."""

    def raised() -> None:
        with suppress(OSError):
            os.nice(-15)
            if not case.burners and case.workers <= CORES and not case.ahead:
                os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))

    return raised


def ask(name: str, tool: str) -> dict[str, Any]:
    """A tool's answer on a case, from a process of its own, beside the case's burners."""
    burn = [sys.executable, "-c", "while True: pass"]
    raised = before_others(CASES[name])
    burners = [subprocess.Popen(burn, preexec_fn=raised) for _ in range(CASES[name].burners)]
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name, tool],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            preexec_fn=raised,
        )
        lines = done.stdout.strip().splitlines()
        found = json.loads(lines[-1]) if done.returncode == 0 and lines else {
            "words": [], "said": "", "error": done.stderr.strip()[-300:]
        }  # fmt: skip
    except subprocess.TimeoutExpired:
        found = {"words": [], "said": "", "error": f"no answer within {TIMEOUT:.0f} s"}
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    return found | {"right": bool(set(found["words"]) & set(CASES[name].right))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--only", help="one case, which replaces that of an earlier result in the file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--traced", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.traced:
        return traced_loop(CASES[options.traced])
    if options.one:
        return print(json.dumps(one(*options.one)))
    from fastmnist.system.environment import origin

    cases: dict[str, Any] = {}
    if options.only and options.output and options.output.exists():
        cases = {case["case"]: case for case in json.loads(options.output.read_text())["cases"]}
    for name, case in CASES.items():
        if options.only in (None, name):
            found = {tool: ask(name, tool) for tool in TOOLS}
            date = datetime.now().astimezone().isoformat(timespec="seconds")
            cases[name] = {"case": name, "right": list(case.right), "tools": found, "date": date}
            print(name, json.dumps(found, indent=2), flush=True)
    score = {tool: sum(case["tools"][tool]["right"] for case in cases.values()) for tool in TOOLS}
    print(score)
    if options.output is not None:
        versions = {tool: version(tool) for tool in TOOLS[1:]}
        result = {
            "cases": [cases[name] for name in CASES if name in cases],
            "score": score,
            "tools": versions,
        }
        options.output.write_text(json.dumps(result | origin(torch.device("cpu")), indent=2) + "\n")


if __name__ == "__main__":
    main()
