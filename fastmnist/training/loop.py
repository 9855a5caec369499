"""Training loop: steps, epochs, their records, and the state to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, DataError, FastmnistError
from fastmnist.loader.augment import Augmentation, warp_on_device, warp_on_host
from fastmnist.loader.device import on_device
from fastmnist.loader.epochs import EpochLoader, with_position
from fastmnist.loader.normalise import Normaliser, scale_and_bias
from fastmnist.system.machine import synchronize, wake
from fastmnist.system.processes import average, gather, world_size
from fastmnist.training.graph import Body, StepGraph, cuda_graph
from fastmnist.training.optimizer import DEFAULT_RATES, MixedPrecisionOptimizer, one_cycle
from fastmnist.training.parallel import distribute
from fastmnist.training.precision import Precision
from fastmnist.training.readback import Readback, Readbacks
from fastmnist.training.state import check_state, random_state, restoring, set_random_state

Record = dict[str, Any]
LOG_EVERY, LEAST_LINES = 50, 30  # steps between two log lines at most; lines of a run at least
CHUNK_VALUES = 1 << 24  # pixels that a GPU prepares together: their sampling grid takes at most 134 MB
STREAMED_TOGETHER = 16  # batches


# Shapes never change, so cuDNN times its algorithms once; training, warm-up and recording must find the same ones.
fastest_convolutions = torch.backends.cudnn.flags(enabled=True, benchmark=True)


class Trainer:
    """Trains `model` on the batches of `loader` (drop_last, on the model's device).

    Attributes:
        step, steps: optimizer steps done, and in all; the last epoch may be a fraction of one.
        seconds: the training clock, which stops during validation.
        network: `model`, as DistributedDataParallel where there are several processes.
        batch_size: images of a step, in all processes together.
        chunk: number of batches that are prepared together.
        compute: prepared (images, labels) to (mean loss, number of right answers): `forward`, or its compiled form.
        graph: the whole step as one CUDA graph, once it is recorded. watched: what an epoch's chunks pass through.
    """

    def __init__(self, model: nn.Module, loader: EpochLoader, config: TrainConfig, precision: Precision) -> None:
        assert config.epochs is not None
        self.model, self.loader, self.config, self.precision = model, loader, config, precision
        self.device = loader.device
        self.network = distribute(model, self.device, compress=config.compress_gradients)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.batch_size = loader.stride
        self.steps = max(1, round(len(loader) * config.epochs))
        self.chunk = _batches_together(loader)
        self.normalise = Normaliser(*loader.file.moments, self.device)
        self._scale_and_bias = scale_and_bias(*loader.file.moments)
        augmentation = Augmentation.of(config)
        self.augmentation = augmentation if loader.dtype == torch.uint8 else None
        self._warp = warp_on_device if augmentation is None else augmentation.on_device
        self.optimizer = MixedPrecisionOptimizer(model, config, precision, self.device)
        peak = config.learning_rate or DEFAULT_RATES[config.optimizer]
        self.log_every = config.log_every or max(1, min(LOG_EVERY, self.steps // LEAST_LINES))
        # Steps after which the processes exchange results. On a GPU none waits for the others more often than it must.
        self._together = 1 if world_size() == 1 or self.device.type == "cpu" else min(self.log_every, LOG_EVERY)
        self.rates = one_cycle(self.steps, peak, config.warmup)
        classes, smoothing = len(loader.file.class_names), config.label_smoothing
        # Smoothed target of each label, (C, C): a third of the operations of cross_entropy's own label_smoothing.
        self._targets = torch.eye(classes, device=self.device) * (1 - smoothing) + smoothing / classes
        self.compute: Callable[..., tuple[torch.Tensor, torch.Tensor]] = self.forward
        self.graph: StepGraph | None = None
        self.watched: Callable[[Iterable[Any]], Iterable[Any]] = iter
        self.step, self.seconds = 0, 0.0
        self._losses = torch.zeros(len(loader), device=self.device)
        self._right = torch.zeros(len(loader), device=self.device)
        self._loaded: tuple[torch.Tensor, torch.Tensor, int]  # images, labels, place of the first batch
        self._drawn: tuple[int, torch.Tensor | None] | None = None  # epoch and its transforms

    def prepare(self, images: torch.Tensor, transforms: torch.Tensor | None) -> torch.Tensor:
        """Augments and normalises images (n, C, H, W) uint8 after transforms (n, 2, 3) or None, for `compute`.

        Images of a float type come augmented and normalised from their loader.
        """
        if images.dtype == torch.uint8:
            if transforms is not None and self.device.type == "cpu":
                images = warp_on_host(images, transforms, *self._scale_and_bias)
            else:
                images = images.to(torch.float32)
                images = self.normalise(images if transforms is None else self._warp(images, transforms))
        # One channel fits both layouts: a copy fixes the strides.
        return images.to(self.precision.amp or torch.float32).clone(memory_format=self.layout)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepared images (B, C, H, W) and labels (B,) int64 to (mean loss (), number of right answers ())."""
        amp = self.precision.amp
        with torch.autocast(self.device.type, amp or torch.bfloat16, enabled=amp is not None):
            low = self.optimizer.low
            logits = self.network(images) if low is None else functional_call(self.model, low.tensors, (images,))
        loss = functional.cross_entropy(logits.float(), self._targets.index_select(0, labels))
        return loss, (logits.argmax(1) == labels).sum()

    def update(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on a prepared batch: its mean loss and number of right answers, on the device.

        Nothing in it waits for the device, and every tensor that it changes keeps its place in memory.
        """
        loss, right = self.compute(images, labels)
        self.optimizer.backward(loss)
        self.optimizer.step()
        return loss.detach(), right

    def transforms(self, epoch: int) -> torch.Tensor | None:
        """Augmentation of that epoch, (samples of the file, 2, 3) on the device; None without augmentation."""
        loader, augmentation = self.loader, self.augmentation
        if augmentation is None:
            return None
        draws = augmentation.draw(len(loader.file), loader.seed, epoch)
        return on_device(augmentation.matrices(draws, loader.file.image_shape[:2]), self.device)

    def _cached_transforms(self, epoch: int) -> torch.Tensor | None:
        """`transforms`, computed once per epoch."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self.transforms(epoch)
        return self._drawn[1]

    def load(self, images: torch.Tensor, labels: torch.Tensor, transforms: torch.Tensor | None, at: int) -> None:
        """Prepares the batches of the next steps, the first of which is number `at` of its epoch.

        images (n, C, H, W) as a loader gives them, labels (n,), transforms (n, 2, 3) or None; at most `chunk` batches.
        """
        prepared = self.prepare(images, transforms)
        self._loaded = prepared, labels, at
        if self.graph is not None:
            self.graph.load(prepared, labels, at, self.step)

    def train_step(self, at: int) -> None:
        """Trains on the loaded batch number `at`; its loss and right answers stay on the device, at that place."""
        if self.graph is not None:
            self.graph.replay()
        else:
            images, labels, first = self._loaded
            size = self.loader.batch_size
            batch = slice((at - first) * size, (at - first + 1) * size)
            self.optimizer.rate.fill_(self.rates[self.step])
            self._losses[at], self._right[at] = self.update(images[batch], labels[batch])
        self.step += 1

    @fastest_convolutions
    def warm_up(self) -> None:
        """A forward and backward pass that leaves no trace: compiles, and finds whether the batch fits.

        Raises:
            ConfigError: the batch does not fit into the GPU's memory; the message names a size that does.
        """
        wake(self.device)
        images, labels, transforms = self._example()
        size = self.loader.batch_size
        part = None if transforms is None else transforms[:size]
        try:
            self._trial(images[:size], labels[:size], part)
        except torch.OutOfMemoryError:
            raise ConfigError(self._advice_on_memory(images[:size], labels[:size], part)) from None

    def _example(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The first batches that are prepared together, and the transforms of their images."""
        state = self.loader.state_dict()
        self.loader.set_epoch(0)  # from its start: chunks of full length
        images, labels, rows = next(iter(self.loader.chunks(self.chunk)))
        self.loader.load_state_dict(state)
        transforms = self._cached_transforms(0)
        return images, labels, None if transforms is None else transforms.index_select(0, rows)

    def load_example(self) -> None:
        """Loads the first `chunk` batches of the first epoch, to measure steps with."""
        self.load(*self._example(), 0)

    def seek(self, step: int) -> None:
        """Makes number `step` the next one, in schedule and order; weights stay, as measurements of steps need it."""
        self.step = step

    def _trial(self, images: torch.Tensor, labels: torch.Tensor, transforms: torch.Tensor | None) -> None:
        """A forward and backward pass; statistics, gradients and random state are as before."""
        with self._rehearsal(self.model.buffers()):
            loss, _ = self.compute(self.prepare(images, transforms), labels)
            self.optimizer.backward(loss)
            self.synchronize()

    @contextmanager
    def _rehearsal(self, changed: Iterable[torch.Tensor]) -> Iterator[None]:
        """Leaves no trace of the passes in its block, which write to `changed`."""
        scale = self.optimizer.scaler.state_dict()
        with restoring(changed, self.device):
            try:
                yield
            finally:
                self.optimizer.drop_gradients()
                if self.precision.scaled:
                    self.optimizer.scaler.load_state_dict(scale)

    @fastest_convolutions
    def record_graph(self, record: Callable[[Body, Body], Body] = cuda_graph) -> None:
        """Makes every further step one CUDA graph. Raises RuntimeError as StepGraph."""
        images, labels, transforms = self._example()
        with self._rehearsal([*self.optimizer.tensors(), *self.model.buffers(), self._losses, self._right]):
            self.graph = StepGraph(
                self.update,
                self.prepare(images, transforms),
                labels,
                self.loader.batch_size,
                self.optimizer.rate,
                torch.tensor(self.rates, device=self.device),
                self._losses,
                self._right,
                record,
            )

    def begin_again(self, model: nn.Module, loader: EpochLoader) -> None:
        """Starts over with the weights of `model` and the order of `loader`; what was compiled or recorded stays."""
        self.model.load_state_dict(model.state_dict())
        self.optimizer.reset()
        self.loader, self._drawn = loader, None
        self.step, self.seconds = 0, 0.0
        self._losses.zero_()
        self._right.zero_()

    def _advice_on_memory(self, images: torch.Tensor, labels: torch.Tensor, transforms: torch.Tensor | None) -> str:
        size = len(labels) // 2
        while size >= 2:
            try:
                self._trial(images[:size], labels[:size], None if transforms is None else transforms[:size])
            except torch.OutOfMemoryError:
                size //= 2
            else:
                return (
                    f"--batch-size {len(labels)} does not fit into the memory of {self.device}; "
                    f"{size} does: use --batch-size {size}"
                )
        return f"no batch fits into the memory of {self.device}; free it, or take a smaller --model or --stem"

    def synchronize(self) -> None:
        """Waits until the device has finished its queue."""
        synchronize(self.device)

    @fastest_convolutions
    def run_epoch(
        self,
        *,
        stop: Callable[[], bool] = lambda: False,
        on_log: Callable[[Record], None] = lambda record: None,
        on_tick: Callable[[Record], None] = lambda record: None,
        after_step: Callable[[], None] = lambda: None,
        tick_seconds: float = 0.5,
    ) -> Record | None:
        """Trains for the rest of the current epoch.

        Args:
            stop: asked after each step; True, in any process, ends the epoch early.
            on_log, on_tick: get a record every `log_every` steps and every `tick_seconds`; on a GPU some steps late,
                for neither waits for it. Several processes have no ticks and wait for their logs, so that a loss that
                is not finite ends them all at the same step.
            after_step: called after each step; with several processes, after those on whose results they agreed.

        Returns:
            The whole epoch's record; None when `stop` ended it.

        Raises:
            FastmnistError: the loss is no longer finite.
        """
        epoch, first = divmod(self.step, len(self.loader))
        self.loader.seek(epoch, first)  # resumes an epoch that ended early
        batches = self.batches_of(epoch)
        self.model.train()
        self.synchronize()
        begun, before = time.perf_counter(), self.seconds
        readbacks = Readbacks(self._losses, self._right)

        def tell(then: Callable[[Record], None]) -> Callable[[Readback], None]:
            def told(read: Readback) -> None:
                self.seconds = before + time.perf_counter() - begun
                then(self._record(epoch, read))

            return told

        logged, ticked, agreed = first, before, first
        for done in self._train(epoch, first):
            stopping = False
            if together := done - agreed == self._together or done % self.log_every == 0 or done == batches:
                stopping, agreed = self._agree(agreed, done, stop()), done
            self.seconds = before + time.perf_counter() - begun
            if done % self.log_every == 0 or done == batches:
                readbacks.request(logged, done, self.step, tell(on_log))
                if world_size() > 1:
                    readbacks.finish()
                logged, ticked = done, self.seconds
            elif world_size() == 1 and self.seconds - ticked > tick_seconds and not readbacks.pending:
                readbacks.request(logged, done, self.step, tell(on_tick))
                ticked = self.seconds
            else:
                readbacks.poll()
            if together:
                after_step()
            if done < batches and stopping:
                readbacks.request(logged, done, self.step, tell(lambda record: None))
                readbacks.finish()
                self.synchronize()
                self.seconds = before + time.perf_counter() - begun
                return None
        if self.step < self.steps:
            self._cached_transforms(epoch + 1)  # while the GPU works
        readbacks.finish()
        self.synchronize()
        self.seconds = before + time.perf_counter() - begun
        return self.epoch_record(epoch)

    def _agree(self, start: int, end: int, stop: bool) -> bool:
        """Averages the results of these batches over all processes; whether any process is to stop."""
        if world_size() == 1:
            return stop
        results = torch.stack([self._losses[start:end], self._right[start:end]])
        average(results)
        self._losses[start:end], self._right[start:end] = results
        return any(gather(stop))

    def _train(self, epoch: int, first: int) -> Iterator[int]:
        """Trains on the batches of an epoch from number `first` on; yields after each how many are done."""
        batches, size, transforms = self.batches_of(epoch), self.loader.batch_size, self._cached_transforms(epoch)
        for images, labels, rows in self.watched(self.loader.chunks(self.chunk)):
            chosen = None if transforms is None else transforms.index_select(0, rows)
            self.load(images, labels, chosen, first)
            end = min(first + len(labels) // size, batches)
            for at in range(first, end):
                self.train_step(at)
                yield at + 1
            if end == batches:
                return
            first = end

    def _loader_state(self) -> dict[str, Any]:
        """The loader's state at the last batch trained on, however far it has read ahead."""
        epoch, position = self._place_of(self.step)
        return self.loader.state_dict() | {"epoch": epoch, "position": position}

    def _place_of(self, step: int) -> tuple[int, int]:
        """The epoch in which that many steps end, and the place of its next sample in the order."""
        epoch, batch = divmod(step, len(self.loader))
        return epoch, batch * self.loader.stride

    def batches_of(self, epoch: int) -> int:
        """Steps of that epoch; the last epoch may be a fraction of one."""
        return min(len(self.loader), self.steps - epoch * len(self.loader))

    @property
    def finished_epoch(self) -> int | None:
        """The epoch that ended with the last step; None within an epoch and before the first step."""
        ended = self.step and (self.step == self.steps or self.step % len(self.loader) == 0)
        return (self.step - 1) // len(self.loader) if ended else None

    def epoch_record(self, epoch: int) -> Record:
        """The record of `epoch`, the last finished one."""
        losses, right = (values[: self.batches_of(epoch)].mean().item() for values in (self._losses, self._right))
        return {
            "kind": "epoch",
            "epoch": epoch,
            "epochs": self.step / len(self.loader),
            "step": self.step,
            "train_loss": losses,
            "train_accuracy": right / self.loader.batch_size,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
        }

    @property
    def images_per_second(self) -> float:
        """Images trained on over the training clock."""
        return self.step * self.batch_size / self.seconds if self.seconds else 0.0

    def _record(self, epoch: int, read: Readback) -> Record:
        wrong = (~torch.isfinite(read.losses)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            step = read.step - len(read.losses) + at
            raise FastmnistError(
                f"the loss is {float(read.losses[at])} at step {step + 1} of {len(self.rates)} "
                f"(learning rate {self.rates[step]:.3g}); try a smaller --learning-rate, a longer --warmup or --amp off"
            )
        return {
            "kind": "step",
            "step": read.step,
            "epoch": epoch,
            "loss": float(read.losses.mean()),
            "accuracy": float(read.right.mean()) / self.loader.batch_size,
            "learning_rate": self.rates[read.step - 1],
            "images_per_second": read.step * self.batch_size / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, and the losses of the epoch so far; tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            **self.optimizer.state_dict(),
            "loader": self._loader_state(),
            "random": random_state(self.device),
            "amp": self.precision.name,
            "step": self.step,
            "seconds": self.seconds,
            "losses": self._losses,
            "right": self._right,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a `state_dict`, also from an older one without "amp".

        Raises:
            DataError: the state is damaged, or of another model, precision, file or setting; the trainer is unchanged.
        """
        state = {"amp": self.precision.name} | state
        check_state(state, self.state_dict())
        step, position = state["step"], with_position(state["loader"])
        at = position.get("epoch"), position.get("position")
        if not 0 <= step <= self.steps or at != self._place_of(step) or not 0 <= state["seconds"] < math.inf:
            raise DataError(
                f"the state is damaged: step {step} of {self.steps}, epoch {at[0]}, sample {at[1]}, "
                f"{state['seconds']} seconds"
            )
        self.loader.load_state_dict(state["loader"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state)
        self.step, self.seconds = step, state["seconds"]
        self._losses.copy_(state["losses"])
        self._right.copy_(state["right"])
        set_random_state(state["random"], self.device)


def _batches_together(loader: EpochLoader) -> int:
    """Batches to prepare together: several on a GPU, where every launch counts; one on a CPU.

    Fewer when they are streamed, because the first step waits for all of them.
    """
    if loader.device.type != "cuda":
        return 1
    most = STREAMED_TOGETHER if loader.needs_file else len(loader)
    return max(1, min(most, CHUNK_VALUES // (loader.batch_size * loader.file.image_size)))
