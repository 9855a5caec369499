"""What Linux alone has, hidden: the same files, batches and runs come about as on macOS and Windows."""

from __future__ import annotations

import os
import re
import threading

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest

from fastmnist import files
from fastmnist.loader.kernels import prefetch

WINDOWS = """
    import os, pathlib, signal, sys, types
    import fcntl, joblib, multiprocessing, numba, psutil, resource, sklearn.datasets
    import torch, torch.distributed, torchvision  # these find the real system
    hidden = {os: "pread preadv posix_fadvise fork register_at_fork killpg sched_getaffinity sysconf getuid",
              signal: "SIGSTOP SIGCONT SIGKILL SIGHUP"}
    for module, names in hidden.items():
        for name in names.split():
            delattr(module, name)

    def locking(descriptor, mode, count):
        try:
            real_fcntl.flock(descriptor, real_fcntl.LOCK_EX | real_fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(13, "Permission denied") from None

    real_fcntl = fcntl
    sys.modules |= {"fcntl": None, "resource": None, "msvcrt": types.SimpleNamespace(locking=locking, LK_NBLCK=2)}

    def refuse_open_files(act):
        def acts(*paths, **options):
            held = {os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")}
            with open("/proc/self/maps") as maps:
                held |= {line.split()[-1] for line in maps if "/" in line}
            if not options and held & {os.path.realpath(path) for path in paths}:
                raise PermissionError(13, "The process cannot access the file because it is being used", paths[0])
            return act(*paths, **options)
        return acts

    os.replace, os.unlink = refuse_open_files(os.replace), refuse_open_files(os.unlink)

    def without_proc(act):
        def acts(path, *arguments, **options):
            if str(path).startswith(("/proc", "/sys")):
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return act(path, *arguments, **options)
        return acts

    for name in ("read_text", "write_text", "iterdir"):
        setattr(pathlib.Path, name, without_proc(getattr(pathlib.Path, name)))
"""

RUN = """
    import numpy as np
    import fastmnist
    from fastmnist import files
    from fastmnist.loader import order
    from fastmnist.runs.train import _Run
    from fastmnist.baselines.workers import worker_settings
    from fastmnist.system.machine import available_memory, physical_cores
    assert files.fcntl is None and available_memory() > 2**20 and physical_cores() >= 1
    folder = pathlib.Path(sys.argv[1])
    train, _ = fastmnist.compile_dataset("digits", output=folder)
    fastmnist.append_beton(fastmnist.write_beton(folder / "a.beton", np.zeros((3, 8, 8), np.uint8), [0, 1, 2]),
                           np.ones((1, 8, 8), np.uint8), [3])
    order.WINDOW_PAGES = 1
    with fastmnist.Loader(train.path, 100, order="quasi_random", device="cpu") as loader:
        for batch in loader.chunks():
            rows = batch.rows.numpy()
            assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), loader.file.images(rows))

    _Run._draw = lambda *_: None
    config = fastmnist.TrainConfig("digits", cache_dir=str(folder), out=str(folder / "run"), model="small-cnn",
                                   epochs=1, batch_size=256, val_size=0, quiet=True)
    step = fastmnist.training.loop.Trainer.train_step
    def interrupted(trainer, at):
        step(trainer, at)
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)

    fastmnist.training.loop.Trainer.train_step = interrupted
    run = fastmnist.train(config)
    assert run.interrupted
    fastmnist.training.loop.Trainer.train_step = step
    run = fastmnist.resume(run.folder)
    assert not run.interrupted and run.summary["steps"] == 5
    assert (run.folder / "model.safetensors").exists()
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob(".lock"))
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    assert worker_settings(2)["multiprocessing_context"].get_start_method() == "spawn"
"""


def test_compile_load_train_and_resume_as_on_windows(tmp_path, in_a_new_process, monkeypatch):
    """No POSIX call, no /proc; open or mapped files can be neither renamed nor deleted; locks are msvcrt's."""
    monkeypatch.delenv("FASTMNIST_DATA", raising=False)
    in_a_new_process(WINDOWS + RUN, tmp_path)


@pytest.mark.parametrize("there", [["preadv"], []], ids=["preadv", "neither"])
def test_reads_at_an_offset_in_several_threads(tmp_path, monkeypatch, there):
    for name in {"preadv", "pread"} - set(there):
        monkeypatch.delattr(os, name)
    content = np.random.default_rng(0).bytes(50_000)
    (tmp_path / "a").write_bytes(content)
    found: dict[int, bytes] = {}
    with open(tmp_path / "a", "rb") as file:

        def read(start: int) -> None:
            memory = bytearray(1000)
            found[start] = bytes(memory[: files.read_at(file.fileno(), memoryview(memory), start)])

        threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 51_000, 700)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {start: content[start : start + 1000] for start in range(0, 51_000, 700)}


def test_prefetching_is_an_instruction_of_arm_too():
    @numba.njit
    def touch(data):
        prefetch(data, 64)

    touch.compile((numba.uint8[::1],))
    [text] = touch.inspect_llvm().values()
    call = re.search(r"call void @(llvm\.prefetch\S*?)\((\S+)[^%\n]*%[^,\n]+, (i32 .*?)\)", text)
    assert call is not None
    name, pointer, constants = call.groups()
    module = llvm.parse_assembly(
        f"declare void @{name}({pointer}, i32, i32, i32)\n"
        f"define void @touch({pointer} %at) {{\n call void @{name}({pointer} %at, {constants})\n ret void\n}}"
    )
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    for triple in ("arm64-apple-darwin", "aarch64-unknown-linux-gnu"):
        assert "prfm" in llvm.Target.from_triple(triple).create_target_machine().emit_assembly(module)
