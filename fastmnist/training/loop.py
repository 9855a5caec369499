"""The training loop: one step, one epoch, and the state from which both go on."""

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
from fastmnist.loader.augment import Augmentation, warp_on_device
from fastmnist.loader.device import on_device
from fastmnist.loader.epochs import EpochLoader
from fastmnist.loader.normalise import Normaliser
from fastmnist.training.graph import Body, StepGraph, cuda_graph
from fastmnist.training.looks import Look, Looks
from fastmnist.training.optimizer import DEFAULT_RATES, MixedPrecisionOptimizer, one_cycle
from fastmnist.training.precision import Precision
from fastmnist.training.state import check_state, random_state, restoring, set_random_state

Record = dict[str, Any]
LOG_EVERY, LEAST_LINES = 50, 30  # steps between two looks at the loss; looks in a run, unless it is shorter
WAKING_SECONDS = 0.2
CHUNK_VALUES = 1 << 24  # pixels that a GPU prepares together: 134 MB at most for where each comes from
STREAMED_TOGETHER = 16  # batches


# Shapes never change: cuDNN times its algorithms once. All that trains, warms up or records is to find the same ones.
fastest_convolutions = torch.backends.cudnn.flags(enabled=True, benchmark=True)


def wake(device: torch.device) -> None:
    """Raises a GPU's clock, a fraction at rest of what it is at work: times taken then mislead cuDNN's choice."""
    if device.type != "cuda":
        return
    matrix = torch.ones(4096, 4096, device=device, dtype=torch.float16)
    until = time.perf_counter() + WAKING_SECONDS
    while time.perf_counter() < until:
        matrix @ matrix
        torch.cuda.synchronize(device)


class Trainer:
    """Trains `model` on the batches of `loader` (drop_last, on the model's device).

    Attributes:
        step, steps: optimizer steps done, and in all; the last epoch may be a part of one.
        seconds: the training clock: from a batch's request to the end of its step, without validation.
        chunk: batches that are prepared together.
        compute: (images, labels) that are prepared to (mean loss, number of right answers); may be replaced by its
            compiled form.
        graph: the whole step, once it is recorded.
    """

    def __init__(self, model: nn.Module, loader: EpochLoader, config: TrainConfig, precision: Precision) -> None:
        assert config.epochs is not None
        self.model, self.loader, self.config, self.precision = model, loader, config, precision
        self.device = loader.device
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.steps = max(1, round(len(loader) * config.epochs))
        self.chunk = _batches_together(loader)
        self.normalise = Normaliser(*loader.file.moments, self.device)
        moved_here = config.augment and loader.dtype == torch.uint8
        self.augmentation = Augmentation(config.shift, config.rotation, config.scale) if moved_here else None
        self.optimizer = MixedPrecisionOptimizer(model, config, precision, self.device)
        peak = config.learning_rate or DEFAULT_RATES[config.optimizer]
        self.log_every = config.log_every or max(1, min(LOG_EVERY, self.steps // LEAST_LINES))
        self.rates = one_cycle(self.steps, peak, config.warmup)
        classes, smoothing = len(loader.file.class_names), config.label_smoothing
        # What each label asks for, (C, C): a third of the operations of cross_entropy's own label_smoothing.
        self._targets = torch.eye(classes, device=self.device) * (1 - smoothing) + smoothing / classes
        self.compute: Callable[..., tuple[torch.Tensor, torch.Tensor]] = self.forward
        self.graph: StepGraph | None = None
        self.step = 0
        self.seconds = 0.0
        self._losses = torch.zeros(len(loader), device=self.device)
        self._right = torch.zeros(len(loader), device=self.device)
        self._loaded: tuple[torch.Tensor, torch.Tensor, int]  # images, labels, place of the first batch
        self._moves: tuple[int, torch.Tensor | None] | None = None  # an epoch's transforms

    def prepare(self, images: torch.Tensor, transforms: torch.Tensor | None) -> torch.Tensor:
        """Augments and normalises images (n, C, H, W) uint8 after transforms (n, 2, 3) or None, for `compute`.

        Images of a float type come augmented and normalised from their loader.
        """
        if images.dtype == torch.uint8:
            images = images.to(torch.float32)
            if transforms is not None:
                images = warp_on_device(images, transforms)
            images = self.normalise(images)
        # A map of one channel is laid out both ways: a copy says which one is meant.
        return images.to(self.precision.amp or torch.float32).clone(memory_format=self.layout)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classifies images (B, C, H, W) that are prepared, and holds that against labels (B,) int64."""
        amp = self.precision.amp
        with torch.autocast(self.device.type, amp or torch.bfloat16, enabled=amp is not None):
            low = self.optimizer.low
            logits = self.model(images) if low is None else functional_call(self.model, low.tensors, (images,))
        loss = functional.cross_entropy(logits.float(), self._targets.index_select(0, labels))
        return loss, (logits.argmax(1) == labels).sum()

    def update(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step at `rate` on a prepared batch: its mean loss and right answers, on the device.

        Nothing in it waits for the device, and all that it changes stays where it is in memory.
        """
        loss, right = self.compute(images, labels)
        self.optimizer.backward(loss)
        self.optimizer.step()
        return loss.detach(), right

    def transforms(self, epoch: int) -> torch.Tensor | None:
        """(samples of the file, 2, 3) on the device; None without augmentation."""
        loader, augmentation = self.loader, self.augmentation
        if augmentation is None:
            return None
        draws = augmentation.draw(len(loader.file), loader.seed, epoch)
        return on_device(augmentation.matrices(draws, loader.file.image_shape[:2]), self.device)

    def _transforms(self, epoch: int) -> torch.Tensor | None:
        """The same; made once when it is asked for again."""
        if self._moves is None or self._moves[0] != epoch:
            self._moves = epoch, self.transforms(epoch)
        return self._moves[1]

    def load(self, images: torch.Tensor, labels: torch.Tensor, transforms: torch.Tensor | None, at: int) -> None:
        """Prepares the batches of the steps to come, the first of which is number `at` of its epoch.

        images (n, C, H, W) as a loader gives them, labels (n,), transforms (n, 2, 3) or None; at most `chunk` batches.
        """
        prepared = self.prepare(images, transforms)
        self._loaded = prepared, labels, at
        if self.graph is not None:
            self.graph.load(prepared, labels, at, self.step)

    def train_step(self, at: int) -> None:
        """The optimizer step of the loaded batch `at`; loss and right answers stay on the device, at that place."""
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
        """A forward and backward pass that leaves no trace in the model: compiles, and finds what does not fit.

        Raises:
            ConfigError: the batch does not fit into the GPU's memory; names one that does.
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
        self.loader.set_epoch(0)  # as many as there ever are
        images, labels, rows = next(iter(self.loader.chunks(self.chunk)))
        self.loader.load_state_dict(state)
        transforms = self._transforms(0)
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
        """From now on a step is one CUDA graph. Raises RuntimeError as StepGraph."""
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
        """From step 0 with the weights of `model` and the order of `loader`, and what was compiled or recorded."""
        self.model.load_state_dict(model.state_dict())
        self.optimizer.reset()
        self.loader, self._moves = loader, None
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
                    f"{size} does: say --batch-size {size}"
                )
        return f"no batch fits into the memory of {self.device}; free it, or take a smaller --model or --stem"

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

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
        """The rest of the current epoch: the whole epoch's record, or None when `stop` became true before its end.

        on_log is given a record every `log_every` steps, on_tick one every `tick_seconds`; on a GPU some time after the
        step, for neither waits for it. after_step is called after each step.

        Raises:
            FastmnistError: the loss is no longer finite.
        """
        epoch, first = divmod(self.step, len(self.loader))
        self.loader.seek(epoch, first)  # an epoch that was left early goes on
        batches = self.batches_of(epoch)
        self.model.train()
        self.synchronize()
        begun, before = time.perf_counter(), self.seconds
        looks = Looks(self._losses, self._right)

        def tell(then: Callable[[Record], None]) -> Callable[[Look], None]:
            def told(look: Look) -> None:
                self.seconds = before + time.perf_counter() - begun
                then(self._record(epoch, look))

            return told

        logged, ticked = first, before
        for done in self._train(epoch, first):
            self.seconds = before + time.perf_counter() - begun
            if done % self.log_every == 0 or done == batches:
                looks.take(logged, done, self.step, tell(on_log))
                logged, ticked = done, self.seconds
            elif self.seconds - ticked > tick_seconds and not looks.pending:
                looks.take(logged, done, self.step, tell(on_tick))
                ticked = self.seconds
            else:
                looks.poll()
            after_step()
            if done < batches and stop():
                looks.take(logged, done, self.step, tell(lambda record: None))
                looks.finish()
                self.synchronize()
                self.seconds = before + time.perf_counter() - begun
                return None
        if self.step < self.steps:
            self._transforms(epoch + 1)  # while the GPU works
        looks.finish()
        self.synchronize()
        self.seconds = before + time.perf_counter() - begun
        return self.epoch_record(epoch)

    def _train(self, epoch: int, first: int) -> Iterator[int]:
        """Trains on the batches of an epoch from number `first` on; after each, how many of the epoch's are done."""
        batches, size, transforms = self.batches_of(epoch), self.loader.batch_size, self._transforms(epoch)
        for images, labels, rows in self.loader.chunks(self.chunk):
            moves = None if transforms is None else transforms.index_select(0, rows)
            self.load(images, labels, moves, first)
            end = min(first + len(labels) // size, batches)
            for at in range(first, end):
                self.train_step(at)
                yield at + 1
            if end == batches:
                return
            first = end

    def _loader_state(self) -> dict[str, Any]:
        """Of the loader as if it had handed out the batches that were trained on, and no more."""
        epoch, batch = divmod(self.step, len(self.loader))
        return self.loader.state_dict() | {"epoch": epoch, "batch": batch}

    def batches_of(self, epoch: int) -> int:
        """Steps of that epoch: fewer in the last one, when a part of it makes the epochs that were asked for."""
        return min(len(self.loader), self.steps - epoch * len(self.loader))

    @property
    def finished_epoch(self) -> int | None:
        """The epoch that the last step ended; None in the middle of one, and before the first step."""
        ended = self.step and (self.step == self.steps or self.step % len(self.loader) == 0)
        return (self.step - 1) // len(self.loader) if ended else None

    def epoch_record(self, epoch: int) -> Record:
        """The record of `epoch`, the last one that was finished."""
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
        return self.step * self.loader.batch_size / self.seconds if self.seconds else 0.0

    def _record(self, epoch: int, look: Look) -> Record:
        wrong = (~torch.isfinite(look.losses)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            step = look.step - len(look.losses) + at
            raise FastmnistError(
                f"the loss is {float(look.losses[at])} at step {step + 1} of {len(self.rates)} "
                f"(learning rate {self.rates[step]:.3g}); try a smaller --learning-rate, a longer --warmup or --amp off"
            )
        size = self.loader.batch_size
        return {
            "kind": "step",
            "step": look.step,
            "epoch": epoch,
            "loss": float(look.losses.mean()),
            "accuracy": float(look.right.mean()) / size,
            "learning_rate": self.rates[look.step - 1],
            "images_per_second": look.step * size / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, and the sums of the epoch so far; tensors and plain values."""
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
        """Goes on from `state_dict`, also from one without "amp", as it was before.

        Raises:
            DataError: the state is damaged, or of another model, precision, file or setting; the trainer is as before.
        """
        state = {"amp": self.precision.name} | state
        check_state(state, self.state_dict())
        step, at = state["step"], (state["loader"].get("epoch"), state["loader"].get("batch"))
        if not 0 <= step <= self.steps or at != divmod(step, len(self.loader)) or not 0 <= state["seconds"] < math.inf:
            raise DataError(
                f"the state is damaged: step {step} of {self.steps}, epoch {at[0]}, batch {at[1]}, "
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
    """How many batches are prepared in one go: some on a GPU, where every launch counts; on a CPU the next one.

    Fewer of those that are streamed: the first step waits for all of them.
    """
    if loader.device.type != "cuda":
        return 1
    most = STREAMED_TOGETHER if loader.needs_file else len(loader)
    return max(1, min(most, CHUNK_VALUES // (loader.batch_size * loader.file.image_size)))
