"""fastmnist: MNIST compiled to a memory-mapped file, loaded as fast as memory allows, trained in seconds."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported on first access, so that `import fastmnist` and `fastmnist --help` do not load torch.
_MODULES = {
    "Augmentation": "fastmnist.loader.augment",
    "Beton": "fastmnist.beton.reader",
    "ConfigError": "fastmnist.errors",
    "DataError": "fastmnist.errors",
    "FastmnistError": "fastmnist.errors",
    "Loader": "fastmnist.loader.loader",
    "TrainConfig": "fastmnist.config",
    "build_model": "fastmnist.training.model",
    "append_beton": "fastmnist.beton.editing",
    "bench": "fastmnist.measure.bench",
    "compile_dataset": "fastmnist.prepare.prepare",
    "doctor": "fastmnist.measure.doctor",
    "evaluate": "fastmnist.inference.predict",
    "export": "fastmnist.inference.export",
    "ladder": "fastmnist.runs.ladder",
    "predict": "fastmnist.inference.predict",
    "preset_config": "fastmnist.presets",
    "relabel_beton": "fastmnist.beton.editing",
    "resume": "fastmnist.runs.train",
    "speedrun": "fastmnist.runs.speedrun",
    "train": "fastmnist.runs.train",
    "tune": "fastmnist.measure.tune",
    "tune_loader": "fastmnist.measure.tune",
    "watch": "fastmnist.measure.watch",
    "write_beton": "fastmnist.beton.writer",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
