"""Tuner: the fastest loader settings on this machine, for a training run or for any loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from joblib import cpu_count

from fastmnist.baselines.loaders import LOADERS
from fastmnist.config import TrainConfig, unused
from fastmnist.errors import ConfigError
from fastmnist.files import write_bytes
from fastmnist.loader_settings import LOADER_SETTINGS, LoaderName
from fastmnist.measure.batches import step_of_batch
from fastmnist.measure.halving import Candidate, Halving, Progress, Search, Settings, combinations, describe, possible
from fastmnist.measure.step import TrainingSetup, training_setup
from fastmnist.system.environment import describe_hardware, hardware, origin, tuned_on
from fastmnist.system.progress import Reporter
from fastmnist.system.statistics import summarise
from fastmnist.training.session import loader_arguments

LEAST_BUDGET = 1.0


@dataclass(frozen=True)
class Tuning:
    """The outcome of a search.

    Attributes:
        settings: the simplest that tie with the fastest, as keywords of the loader (of `TrainConfig`, for a run).
        search: all candidates with their values.
        what: the quantity measured, in words.
        budget: seconds.
        on: the machine and the data, in one line.
        origin: hardware, versions, date, commit.
        unit: of the values.
    """

    settings: Settings
    search: Search
    what: str
    budget: float
    on: str
    origin: dict[str, Any]
    unit: str = "images/s"

    def verdict(self) -> str:
        """The outcome in one sentence."""
        chosen, simplest = self.search.chosen, self.search.reference
        measured = [candidate for candidate in self.search.candidates if candidate.values]
        if chosen is simplest:
            name = "defaults" if chosen.name == "defaults" else f"simplest settings ({chosen.name})"
            found = f"The {name} are as fast as anything tried ({len(measured)} settings)."
        else:
            gain = chosen.summary().median / simplest.summary().median
            found = f"{chosen.name}: {gain:.2f} times as fast as {simplest.name}, the best of {len(measured)} measured."
        ceiling = self.search.ceiling
        return found if ceiling is None else f"{found} No loader could make it more than {possible(ceiling)} times."

    def apply(self, config: TrainConfig) -> TrainConfig:
        """A run's configuration with these settings."""
        return replace(config, **self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `report.tune_chart.plot_search` and --json."""
        lines, simplest = [], self.search.reference
        for candidate in self.search.candidates:
            line = {
                "name": candidate.name,
                "settings": candidate.settings,
                "rounds": candidate.rounds,
                "status": candidate.status,
                "reason": candidate.reason,
                "chosen": candidate is self.search.chosen,
                "memory_bytes": candidate.memory,
            }
            if candidate.values:
                ratios = candidate.ratios(simplest)
                summary = summarise([value for values in ratios[1:] or ratios for value in values])
                line |= candidate.summary().to_dict() | {"ratios": ratios, "over_default": summary.to_dict()}
            lines.append(line)
        return {
            "what": self.what,
            "unit": self.unit,
            "settings": self.settings,
            "candidates": lines,
            "default": self.search.reference.name,
            "ceiling": self.search.ceiling and self.search.ceiling.to_dict(),
            "budget_seconds": self.budget,
            "seconds": self.search.seconds,
            **self.origin,
        }


def tune_loader(
    make: Callable[..., Iterable[Any]],
    space: Mapping[str, Sequence[Any]],
    step: Callable[..., Any] | None = None,
    *,
    budget: float = 30.0,
    max_memory: int | None = None,
    ahead: Callable[[Settings], int] | None = None,
    same_as: Callable[[Settings], Settings] = lambda settings: settings,
    progress: Progress = lambda text, share: None,
) -> Tuning:
    """The fastest settings of any loader, measured in your own training loop.

    Each candidate is measured beside the simplest; the best few are measured again, in turn. The simplest of those
    that tie with the fastest (at least 0.95 of its rate) is chosen. A step is measured on one fixed batch first: no
    settings can be faster than that, and the search ends where they are as fast.

    Args:
        make: `make(**settings)` returns a loader that can be iterated over repeatedly. It is closed by its `close`, if
            it has one.
        space: the values of each setting, the simplest first: {"num_workers": [0, 1, 2, 4], "prefetch_factor": [2, 4]}.
        step: one training step: step(batch), a batch as the loader yields it, or step(images, labels); None measures
            the loader alone. It changes the weights: train a copy of your model (copy.deepcopy).
        budget: seconds in all; two settings are compared however long that takes.
        max_memory: bytes that loaders open at the same time may take; settings that take more are left out.
        ahead: batches that a loader with these settings may have ready; they are used up before a turn is timed. By
            default num_workers * prefetch_factor.
        same_as: the simplest settings with the same effect (without workers nothing is prefetched), so that they are
            measured once.

    Raises:
        ConfigError: the budget is below a second, there is nothing to choose from, or `step` takes neither a batch nor
            images and labels.
        FastmnistError: no settings work; the first error is its cause.
    """
    if not space or not all(len(values) for values in space.values()):
        raise ConfigError("space needs at least one setting, and each at least one value")
    _check_budget(budget)
    halving = Halving(
        combinations(space, same_as),
        lambda settings: make(**settings),
        None if step is None else step_of_batch(step),
        budget,
        max_memory=max_memory,
        ahead=ahead or _ahead,
        progress=progress,
        ceiling="batch_size" not in space,
        announce=lambda text: progress(text, 0.0),
    )
    search = halving.run()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    what = "the loader alone" if step is None else "training steps"
    on = describe_hardware(hardware(device))
    return Tuning(dict(search.chosen.settings), search, what, budget, on, origin(device))


def _check_budget(budget: float) -> None:
    if not budget >= LEAST_BUDGET:
        raise ConfigError(f"--budget {budget:g}: nothing is measured in less than {LEAST_BUDGET:g} s; give about 30")


def _ahead(settings: Settings) -> int:
    workers = settings.get("num_workers", settings.get("workers")) or 0
    ready = [workers * (settings.get("prefetch_factor") or 2)]
    ready += [settings.get(name) or 0 for name in ("batches_ahead", "prefetch")]
    return max(1, *ready)


def space_of(
    loader: LoaderName, device: torch.device, batch_sizes: Sequence[int], orders: Sequence[str]
) -> dict[str, Sequence[Any]]:
    """The values of each setting to try on this machine, the simplest first; names are those of `TrainConfig`."""
    cores = cpu_count()
    own = {name: setting.search(device.type, cores) for name, setting in LOADER_SETTINGS[loader].items()}
    pages = {"order": orders} if loader in ("ours", "ffcv") else {}  # the other loaders read no pages of the file
    return {"loader": [loader], "batch_size": batch_sizes, **pages, **own}


def simplest(settings: Settings, placement: str, device: torch.device) -> Settings:
    """The simplest settings with the same effect.

    placement: the meaning of "auto" on `device`.
    """
    same, meant = dict(settings), dict(settings)
    if same.get("placement") in ("auto", placement):
        same["placement"], meant["placement"] = "auto", placement
    return same | {name: neutral for name, (neutral, _) in unused(meant, device.type).items()}


def tune(
    config: TrainConfig | None = None,
    *,
    loader: LoaderName | str = "ours",
    budget: float = 30.0,
    loader_only: bool = False,
    max_memory: int | None = None,
    batch_sizes: Sequence[int] = (),
    orders: Sequence[str] = (),
    reporter: Reporter | None = None,
    progress: Progress = lambda text, share: None,
) -> Tuning:
    """The fastest loader settings for a training run on this machine, measured in its own training step.

    Batch size and order stay as they are, and with them each step's samples and the accuracy, unless `batch_sizes` or
    `orders` name others.

    Args:
        config: of the run.
        loader: a name of `LOADERS`, or "all".
        budget: seconds in all.
        loader_only: measure the loader without the model.
        max_memory: bytes, as for `tune_loader`.
        batch_sizes, orders: to try besides the run's own.

    Raises:
        ConfigError: a setting cannot be used, FFCV is missing, or the budget is below a second.
        DataError: the data cannot be used.
    """
    begun = time.perf_counter()
    config = config or TrainConfig()
    _check_budget(budget)
    names: tuple[Any, ...] = tuple(LOADERS) if loader == "all" else (loader,)
    if loader != "all" and loader not in LOADERS:
        raise ConfigError(f"--loader {loader}; choose all, {', '.join(LOADERS)}")
    sizes = list(dict.fromkeys([config.batch_size, *batch_sizes]))
    with training_setup(config, reporter or Reporter(quiet=True), max(sizes)) as setup:
        candidates: list[Candidate] = []
        _check_sizes(sizes, setup)
        for at, name in enumerate(names):
            tried = list(dict.fromkeys([config.order, *orders]))
            for candidate in _candidates(name, setup, sizes, tried, len(names) > 1):
                candidate.place = (at, *candidate.place[1:])  # another loader is a change too
                candidates.append(candidate)
        candidates.sort(key=lambda candidate: candidate.complexity)
        gpu = setup.device.type == "cuda"
        halving = Halving(
            candidates,
            lambda settings: make_loader(setup, settings),
            None if loader_only else setup.step,
            budget,
            max_memory=max_memory,
            ahead=lambda settings: _ahead(settings if gpu else settings | {"prefetch": 0}),
            progress=progress,
            begun=begun,
            ceiling=len(sizes) == len(names) == 1,  # other sizes and loaders make other steps
            announce=(reporter or Reporter(quiet=True)).say,
        )
        search = halving.run()
        on = tuned_on(setup.device, setup.files.train.image_shape, setup.files.dataset)
        origins = origin(setup.device) | {"device": str(setup.device), "dataset": setup.files.dataset}
    what = f"batches of {config.batch_size} images"
    if not loader_only:
        what = f"training steps of {config.model}, {what}"
    return Tuning(search.chosen.settings, search, f"{what}, {origins['dataset']}", budget, on, origins)


def _check_sizes(sizes: Sequence[int], setup: TrainingSetup) -> None:
    for size in sizes:
        if not 2 <= size <= len(setup.indices):
            raise ConfigError(
                f"--batch-sizes {size}: {setup.config.dataset} has {len(setup.indices):,} images to train on; "
                "take 2 to that many"
            )


def _candidates(
    name: LoaderName, setup: TrainingSetup, sizes: Sequence[int], orders: Sequence[str], named: bool
) -> list[Candidate]:
    space = space_of(name, setup.device, sizes, orders)
    defaults = {key: values[0] for key, values in space.items()}
    with LOADERS["ours"](setup.files.train, 2, device=setup.device, indices=setup.indices) as ours:
        placement = str(getattr(ours, "placement"))  # noqa: B009

    def label(settings: Settings) -> str:
        return f"{name}: {describe(settings, defaults)}" if named else describe(settings, defaults)

    return combinations(space, lambda settings: simplest(settings, placement, setup.device), label)


def make_loader(setup: TrainingSetup, settings: Settings) -> Iterable[Any]:
    """The loader that a run with these settings would train on."""
    config = replace(setup.config, **settings)
    return LOADERS[config.loader](
        setup.files.train,
        config.batch_size,
        seed=config.seed,
        indices=setup.indices,
        drop_last=True,
        device=setup.device,
        rank=0,
        world_size=1,
        **loader_arguments(config, setup.files.train),
    )


def write_yaml(tuning: Tuning, path: Path) -> None:
    """The settings as a YAML file for `train --config`; its comments give the rates, the machine and the date.

    Raises:
        FastmnistError: the file cannot be written.
    """
    best = tuning.search.candidates[0].summary()
    on = tuning.on
    chosen = tuning.search.chosen.summary()
    comments = [
        f"Found by fastmnist tune on {datetime.now().astimezone().isoformat(timespec='minutes')} "
        f"in {tuning.search.seconds:.0f} s.",
        f"Measured: {tuning.what}; on {on}.",
        f"These settings: {chosen.median:,.0f} {tuning.unit} ({chosen.low:,.0f} to {chosen.high:,.0f}, "
        f"n = {chosen.n}); the fastest: {best.median:,.0f}.",
    ]
    content = yaml.safe_dump(tuning.settings | {"tuned_on": on}, sort_keys=False, allow_unicode=True, width=1000)
    write_bytes(path, ("".join(f"# {line}\n" for line in comments) + content).encode())
