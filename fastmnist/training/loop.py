"""The training loop: one step, one epoch, and the state from which both go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fastmnist.config import TrainConfig
from fastmnist.data.augment import Augmentation, warp_on_device
from fastmnist.data.epochs import Batch, EpochLoader
from fastmnist.data.normalise import Normaliser
from fastmnist.errors import ConfigError, DataError, FastmnistError
from fastmnist.training.graph import StepGraph
from fastmnist.training.precision import Precision

Record = dict[str, Any]
DEFAULT_RATES = {"sgd": 0.1, "adamw": 0.003}
LOG_EVERY, LEAST_LINES = 50, 30  # steps between two looks at the loss; looks in a run, unless it is shorter
FIRST_SCALE = 2.0**10  # of fp16's gradients: at torch's own 2**16 the first step overflows
FIRST_RATE, LAST_RATE = 25.0, 1e4  # the peak rate over the first, and the first over the last one


def one_cycle(steps: int, peak: float, warmup: float) -> list[float]:
    """The learning rate of each step, by torch's OneCycleLR (L. Smith, N. Topin: "Super-convergence", 2017)."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        peak,
        total_steps=steps + 1,
        pct_start=warmup,
        cycle_momentum=False,
        div_factor=FIRST_RATE,
        final_div_factor=LAST_RATE,
    )
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


class Trainer:
    """Trains `model` on the batches of `loader` (drop_last, on the model's device).

    Attributes:
        step, steps: optimizer steps done, and in all; the last epoch may be a part of one.
        seconds: the training clock: from a batch's request to the end of its step, without validation.
        compute: (images, labels, transforms) to (mean loss, number of right answers); may be replaced by its compiled
            form.
        graph: the whole step, once it is recorded.
    """

    def __init__(self, model: nn.Module, loader: EpochLoader, config: TrainConfig, precision: Precision) -> None:
        assert config.epochs is not None
        self.model, self.loader, self.config, self.precision = model, loader, config, precision
        self.device = loader.device
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.steps = max(1, round(len(loader) * config.epochs))
        self.normalise = Normaliser(*loader.file.moments, self.device)
        on_device = config.augment and loader.dtype == torch.uint8
        self.augmentation = Augmentation(config.shift, config.rotation, config.scale) if on_device else None
        self.optimizer = self._optimizer()
        self._fill_optimizer_state()
        self.scaler = self._scaler()
        peak = config.learning_rate or DEFAULT_RATES[config.optimizer]
        self.log_every = config.log_every or max(1, min(LOG_EVERY, self.steps // LEAST_LINES))
        self.rates = one_cycle(self.steps, peak, config.warmup)
        self.compute: Callable[..., tuple[torch.Tensor, torch.Tensor]] = self.forward
        self.graph: StepGraph | None = None
        self.step = 0
        self.seconds = 0.0
        self._losses = torch.zeros(len(loader), device=self.device)
        self._right = torch.zeros(len(loader), device=self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        config, rate = self.config, 0.0  # each step sets its own rate
        if config.optimizer == "adamw":
            return torch.optim.AdamW(
                self.model.parameters(),
                lr=rate,
                betas=(config.momentum, 0.999),
                weight_decay=config.weight_decay,
                fused=True,
            )
        return torch.optim.SGD(
            self.model.parameters(),
            lr=rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def _fill_optimizer_state(self) -> None:
        """Momenta of zeros, by a step at rate 0.

        Fused SGD makes them at its first step from memory as it comes, and does not write them when a scaler skips it.
        """
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._clear_optimizer_state()

    def _clear_optimizer_state(self) -> None:
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def _scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, init_scale=FIRST_SCALE, enabled=self.precision.scaled)

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor, transforms: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augments, normalises, classifies; images (B, C, H, W) uint8, labels (B,), transforms (B, 2, 3) or None.

        Images of a float type come augmented and normalised from their loader.
        """
        values = images.to(torch.float32)
        if transforms is not None:
            values = warp_on_device(values, transforms)
        if images.dtype == torch.uint8:
            values = self.normalise(values)
        # A map of one channel is laid out both ways: a copy says which one is meant.
        values = values.clone(memory_format=self.layout)
        amp = self.precision.amp
        with torch.autocast(self.device.type, amp or torch.bfloat16, enabled=amp is not None):
            logits = self.model(values)
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        return loss, (logits.argmax(1) == labels).sum()

    def transforms(self, epoch: int) -> torch.Tensor | None:
        """(images of the epoch in their order, 2, 3) on the device; None without augmentation."""
        loader, augmentation = self.loader, self.augmentation
        if augmentation is None:
            return None
        drawn = augmentation.draw(len(loader.file), loader.seed, epoch)[loader.epoch_indices(epoch)]
        matrices = augmentation.matrices(drawn, loader.file.image_shape[:2])
        return torch.from_numpy(matrices).to(self.device)

    def warm_up(self, passes: int = 1) -> float:
        """Forward and backward passes that leave no trace in the model: compiles, and finds what does not fit.

        Returns:
            Seconds per pass, without loading.

        Raises:
            ConfigError: the batch does not fit into the GPU's memory; names one that does.
        """
        state = self.loader.state_dict()
        batch = next(iter(self.loader))
        self.loader.load_state_dict(state)
        transforms = self.transforms(0)
        try:
            return self.trial(batch, transforms, passes)
        except torch.OutOfMemoryError:
            raise ConfigError(self._advice_on_memory(batch, transforms)) from None

    def trial(self, batch: Batch, transforms: torch.Tensor | None, passes: int = 1) -> float:
        """Seconds per forward and backward pass; statistics, gradients and random state are as before."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        random_state = _random_state(self.device)
        images, labels = batch
        try:
            self.synchronize()
            begun = time.perf_counter()
            for _ in range(passes):
                loss, _ = self.compute(images, labels, None if transforms is None else transforms[: len(labels)])
                self.scaler.scale(loss).backward()
                self.optimizer.zero_grad(set_to_none=True)
            self.synchronize()
            return (time.perf_counter() - begun) / passes
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(buffers[name])
            _set_random_state(random_state, self.device)

    def record_graph(self) -> float:
        """From now on a step is one CUDA graph: returns the seconds that it took. Raises RuntimeError as StepGraph."""
        state = self.loader.state_dict()
        images, labels = next(iter(self.loader))
        self.loader.load_state_dict(state)
        transforms = self.transforms(0)
        part = None if transforms is None else transforms[: len(labels)]
        graph = StepGraph(self.compute, self.model, self.optimizer, images, labels, part, self._losses, self._right)
        self.graph = graph
        return graph.seconds

    def begin_again(self, model: nn.Module, loader: EpochLoader) -> None:
        """From step 0 with the weights of `model` and the order of `loader`, and what was compiled or recorded."""
        with torch.no_grad():
            self.model.load_state_dict(model.state_dict())
            self._clear_optimizer_state()
        self.loader = loader
        self.scaler = self._scaler()
        self.step, self.seconds = 0, 0.0
        self._losses.zero_()
        self._right.zero_()

    def _advice_on_memory(self, batch: Batch, transforms: torch.Tensor | None) -> str:
        images, labels = batch
        size = len(labels) // 2
        while size >= 2:
            try:
                self.trial((images[:size], labels[:size]), transforms)
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

    def train_step(self, batch: Batch, transforms: torch.Tensor | None, at: int) -> None:
        """One optimizer step; loss and right answers stay on the device, at place `at` of the epoch."""
        images, labels = batch
        if self.graph is not None:
            self.graph.run(images, labels, transforms, self.rates[self.step], at)
            self.step += 1
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.step]
        loss, right = self.compute(images, labels, transforms)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._losses[at] = loss.detach()
        self._right[at] = right
        self.step += 1

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

        on_log is given a record every `log_every` steps, on_tick one every `tick_seconds`: a look at the loss waits
        for the GPU, so there are few. after_step is called after each step and what is logged of it.

        Raises:
            FastmnistError: the loss is no longer finite.
        """
        self.loader.load_state_dict(self.loader.state_dict())  # an epoch that was left early goes on
        epoch, first = self.loader.epoch, self.step % len(self.loader)
        batches = self.batches_of(epoch)
        size = self.loader.batch_size
        self.model.train()
        self.synchronize()
        begun = time.perf_counter()
        transforms = self.transforms(epoch)
        before, logged = self.seconds, first
        ticked = before
        for at, batch in enumerate(self.loader, first):
            part = None if transforms is None else transforms[at * size : (at + 1) * size]
            self.train_step(batch, part, at)
            done = at + 1
            self.seconds = before + time.perf_counter() - begun
            if done % self.log_every == 0 or done == batches:
                on_log(self._record(epoch, logged, done))
                logged, ticked = done, self.seconds
            elif self.seconds - ticked > tick_seconds:
                on_tick(self._record(epoch, logged, done))
                ticked = self.seconds
            after_step()
            if done == batches:
                break
            if stop():
                self._check_finite(logged, done)
                self.seconds = before + time.perf_counter() - begun
                return None
        self.synchronize()
        self.seconds = before + time.perf_counter() - begun
        return self.epoch_record(epoch)

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
        loss, accuracy = self._means(0, self.batches_of(epoch))
        return {
            "kind": "epoch",
            "epoch": epoch,
            "epochs": self.step / len(self.loader),
            "step": self.step,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
        }

    @property
    def images_per_second(self) -> float:
        """Images trained on over the training clock."""
        return self.step * self.loader.batch_size / self.seconds if self.seconds else 0.0

    def _record(self, epoch: int, start: int, end: int) -> Record:
        self._check_finite(start, end)
        loss, accuracy = self._means(start, end)
        return {
            "kind": "step",
            "step": self.step,
            "epoch": epoch,
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": self.rates[self.step - 1],
            "images_per_second": self.images_per_second,
            "seconds": self.seconds,
        }

    def _means(self, start: int, end: int) -> tuple[float, float]:
        return (
            float(self._losses[start:end].mean()),
            float(self._right[start:end].mean()) / self.loader.batch_size,
        )

    def _check_finite(self, start: int, end: int) -> None:
        wrong = (~torch.isfinite(self._losses[start:end])).nonzero()
        if not len(wrong):
            return
        at = start + int(wrong[0])
        step = self.step - end + at
        value = float(self._losses[at])
        raise FastmnistError(
            f"the loss is {value} at step {step + 1} of {len(self.rates)} "
            f"(learning rate {self.rates[step]:.3g}); try a smaller --learning-rate, a longer --warmup or --amp off"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, and the sums of the epoch so far; tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "random": _random_state(self.device),
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
        here = self.state_dict()
        state = {"amp": self.precision.name} | state
        for name in ("optimizer", "random", "loader"):
            _check_like({}, state.get(name), name, whole=False)
        if state["amp"] != self.precision.name:
            raise DataError(f"the state was taken with --amp {state['amp']}, this run has {self.precision.name}")
        # The optimizer's settings are those of this run; the loader checks its own part.
        settings = here["optimizer"].pop("param_groups")
        del here["loader"]
        if "cuda" not in state["random"]:
            here["random"].pop("cuda", None)
        for name, expected in here.items():
            _check_like(expected, state.get(name), name, whole=name not in ("optimizer", "random"))
        step, at = state["step"], (state["loader"].get("epoch"), state["loader"].get("batch"))
        if not 0 <= step <= self.steps or at != divmod(step, len(self.loader)) or not 0 <= state["seconds"] < math.inf:
            raise DataError(
                f"the state is damaged: step {step} of {self.steps}, epoch {at[0]}, batch {at[1]}, "
                f"{state['seconds']} seconds"
            )
        self.loader.load_state_dict(state["loader"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = step, state["seconds"]
        self._losses.copy_(state["losses"])
        self._right.copy_(state["right"])
        _set_random_state(state["random"], self.device)


def _check_like(expected: Any, found: Any, name: str, whole: bool = True) -> None:
    """Raises DataError naming the part of `found` that differs from `expected` in its keys, types, shapes or dtypes.

    whole: whether a mapping may have no more keys than is expected.
    """
    alike = isinstance(found, type(expected)) and isinstance(found, bool) == isinstance(expected, bool)
    if isinstance(expected, torch.Tensor):
        alike = alike and (found.shape, found.dtype) == (expected.shape, expected.dtype)
    elif isinstance(expected, dict) and alike:
        alike = expected.keys() <= found.keys() and (not whole or len(found) == len(expected))
        for key in expected if alike else ():
            _check_like(expected[key], found[key], f"{name}.{key}")
    if not alike:
        raise DataError(f"the state is damaged, or of another run: its {name} is not what this run's would be")


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of dropout and its like: the order and the augmentation have random bits of their own."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
