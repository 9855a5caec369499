"""Training loop: equivalence with a plain one, determinism, resumption, records and errors."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastmnist.beton.reader import Beton
from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, DataError, FastmnistError
from fastmnist.loader.loader import Loader
from fastmnist.training.compiling import set_up_compile
from fastmnist.training.loop import Trainer
from fastmnist.training.model import build_model
from fastmnist.training.precision import Precision

FLOAT32 = Precision(None, "a test")


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory, write_small_beton) -> Path:
    path = tmp_path_factory.mktemp("loop") / "a.beton"
    write_small_beton(path, 100)
    return path


def trainer(path: Path, model: nn.Module | None = None, precision: Precision = FLOAT32, **settings) -> Trainer:
    config = TrainConfig(**({"epochs": 2, "batch_size": 16, "log_every": 2} | settings))
    torch.manual_seed(config.seed)
    loader = Loader(path, config.batch_size, seed=config.seed, device="cpu", drop_last=True)
    return Trainer(model or build_model("small-cnn"), loader, config, precision)


def weights(of: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in of.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_equals_a_plain_loop(beton: Path, optimizer: str) -> None:
    """The same batches through a loop as a notebook has it: torch's own optimizer, OneCycleLR, no extras."""
    ours = trainer(beton, optimizer=optimizer, augment=False, label_smoothing=0.1)
    torch.manual_seed(0)
    model = build_model("small-cnn")
    peak = 0.1 if optimizer == "sgd" else 0.003
    plain: torch.optim.Optimizer
    if optimizer == "sgd":
        plain = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        plain = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.999), weight_decay=5e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(plain, peak, total_steps=13, cycle_momentum=False)
    mean, std = (np.float32(m[0]) for m in Beton(beton).moments)
    for images, labels in [batch for epoch in range(2) for batch in list(ours.loader)]:
        loss = nn.functional.cross_entropy(model((images.float() / 255 - mean) / std), labels, label_smoothing=0.1)
        plain.zero_grad()
        loss.backward()
        plain.step()
        cycle.step()
    ours.loader.set_epoch(0)
    records = [ours.run_epoch() for _ in range(2)]
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.float(), ours.model.state_dict()[name].float(), rtol=1e-3, atol=1e-4), name
    assert ours.step == 12
    assert records[1] is not None
    assert records[1]["step"] == 12


def test_the_same_seed_gives_the_same_bits(beton: Path) -> None:
    first, second, other = trainer(beton), trainer(beton), trainer(beton, seed=1)
    for each in (first, second, other):
        each.run_epoch()
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


def test_warming_up_leaves_no_trace(beton: Path) -> None:
    warm, cold = trainer(beton), trainer(beton)
    warm.warm_up()
    warm.warm_up()
    assert warm.step == 0
    assert all(p.grad is None for p in warm.model.parameters())
    assert same(weights(warm), weights(cold))
    for each in (warm, cold):
        each.run_epoch()
    assert same(weights(warm), weights(cold))


@pytest.mark.parametrize("at", [1, 3, 6, 8, 11])
def test_state_goes_on_bit_for_bit(beton: Path, at: int) -> None:
    def begin() -> Trainer:
        torch.manual_seed(5)
        return trainer(beton, model=nn.Sequential(nn.Dropout(0.3), build_model("small-cnn")))

    whole = begin()
    for _ in range(2):
        whole.run_epoch()

    first = begin()
    while first.step < at:
        first.run_epoch(stop=lambda: first.step == at)
    state = first.state_dict()
    second = begin()
    torch.manual_seed(99)
    second.load_state_dict(state)
    while second.loader.epoch < 2:
        second.run_epoch()
    assert second.step == whole.step
    assert same(weights(second), weights(whole))


def test_records_tell_the_truth(beton: Path) -> None:
    each = trainer(beton, augment=False)
    logged, seen = [], []
    inner = each.compute

    def spy(images, labels):
        loss, right = inner(images, labels)
        seen.append((float(loss.detach()), float(right) / len(labels)))
        return loss, right

    each.compute = spy
    record = each.run_epoch(on_log=logged.append)
    assert record is not None
    assert [r["step"] for r in logged] == [2, 4, 6]
    for r, start in zip(logged, (0, 2, 4), strict=True):
        assert r["loss"] == pytest.approx(np.mean([loss for loss, _ in seen[start : start + 2]]))
        assert r["accuracy"] == pytest.approx(np.mean([a for _, a in seen[start : start + 2]]))
        assert r["learning_rate"] == each.rates[r["step"] - 1]
    assert record["train_loss"] == pytest.approx(np.mean([loss for loss, _ in seen]))
    assert record["images_per_second"] == pytest.approx(6 * 16 / record["seconds"])


@pytest.mark.parametrize("bad_step", [0, 3, 5])
def test_a_loss_that_is_not_finite_stops_with_step_and_rate(beton: Path, bad_step: int) -> None:
    each = trainer(beton)
    inner, calls = each.compute, iter(range(100))

    def spoil(images, labels):
        loss, right = inner(images, labels)
        return (loss * float("nan") if next(calls) == bad_step else loss), right

    each.compute = spoil
    with pytest.raises(FastmnistError) as caught:
        each.run_epoch()
    text = str(caught.value)
    assert f"nan at step {bad_step + 1} of 12" in text
    assert f"learning rate {each.rates[bad_step]:.3g}" in text
    assert "--learning-rate" in text


@pytest.mark.parametrize(("fits", "advice"), [(5, "--batch-size 4"), (0, "no batch fits")])
def test_a_batch_too_large_names_one_that_fits(beton: Path, fits: int, advice: str) -> None:
    each = trainer(beton)
    inner = each.compute

    def small_memory(images, labels):
        if len(labels) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(images, labels)

    each.compute = small_memory
    before = weights(each)
    with pytest.raises(ConfigError, match=advice):
        each.warm_up()
    assert same(before, weights(each))


def test_mixed_precision_trains_in_bfloat16(beton: Path) -> None:
    each = trainer(beton, precision=Precision(torch.bfloat16, "a test"))
    seen = []
    each.model.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    record = each.run_epoch()
    assert record is not None
    assert set(seen) == {torch.bfloat16}
    assert np.isfinite(record["train_loss"])


def test_images_reach_the_model_normalised_and_channels_last(beton: Path) -> None:
    each = trainer(beton, augment=False)
    seen = []
    each.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    each.run_epoch()
    everything = torch.cat(seen)
    assert everything.dtype == torch.float32
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert abs(float(everything.mean())) < 0.05
    assert abs(float(everything.std()) - 1) < 0.05


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # torch's compiler has much to say
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["off", "graph", "default"])
def test_on_a_gpu_every_mode_learns_the_same(beton: Path, dtype: torch.dtype | None, mode: str) -> None:
    def run(device: str, precision: Precision, mode: str) -> list[float]:
        config = TrainConfig(epochs=2, batch_size=16)
        torch.manual_seed(0)
        loader = Loader(beton, 16, device=device, drop_last=True)
        model = build_model("small-cnn").to(device, memory_format=torch.channels_last)
        each = Trainer(model, loader, config, precision)
        assert set_up_compile(each, mode)[0] == mode
        return [record["train_loss"] for record in (each.run_epoch(), each.run_epoch()) if record]

    tolerance = 1e-2 if dtype is None else 0.1
    assert run("cuda", Precision(dtype, ""), mode) == pytest.approx(run("cpu", FLOAT32, "off"), rel=tolerance)


@pytest.mark.parametrize(("epochs", "ends"), [(0.5, [3]), (1.0, [6]), (1.5, [6, 9]), (0.01, [1])])
def test_the_last_epoch_may_be_a_part_of_one(beton: Path, epochs: float, ends: list[int]) -> None:
    each = trainer(beton, epochs=epochs)  # 6 steps per epoch
    finished = []
    while each.step < each.steps:
        record = each.run_epoch()
        assert record is not None
        assert each.finished_epoch == record["epoch"] == len(finished)
        finished.append(record)
    assert [record["step"] for record in finished] == ends
    assert finished[-1]["epochs"] == pytest.approx(ends[-1] / 6)
    assert len(each.rates) == each.steps == ends[-1]


def test_begun_again_as_if_new(beton: Path) -> None:
    """After a whole run of another seed: weights, momenta, order and records of a new trainer."""
    used = trainer(beton, seed=1)
    while used.step < used.steps:
        used.run_epoch()
    new, model = trainer(beton, seed=2), trainer(beton, seed=2).model
    used.begin_again(model, trainer(beton, seed=2).loader)
    for _ in range(2):
        a, b = used.run_epoch(), new.run_epoch()
        assert a is not None
        assert b is not None
        clocks = {"seconds", "images_per_second"}
        assert {key: a[key] for key in a.keys() - clocks} == {key: b[key] for key in b.keys() - clocks}
    assert same(weights(used), weights(new))


def test_a_first_step_that_the_scaler_skips_leaves_no_trace(beton: Path) -> None:
    """Fused SGD would keep momenta that nobody wrote: memory as the allocator had it."""
    each = trainer(beton, precision=Precision(torch.float16, "a test"))
    assert each.optimizer.scaler.get_scale() == 1024
    dirty = [torch.full_like(parameter, 7e8) for parameter in each.model.parameters() for _ in range(20)]
    del dirty
    parameters = dict(each.model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert each.optimizer.low is not None
    hook = next(iter(each.optimizer.low.tensors.values())).register_hook(lambda grad: grad * float("inf"))
    each.load(*next(iter(each.loader)), None, 0)
    each.train_step(0)
    hook.remove()
    assert each.optimizer.scaler.get_scale() == 512
    assert same(before, parameters)
    assert not any(state["momentum_buffer"].any() for state in each.optimizer.base.state.values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_damaged_state_is_refused_and_changes_nothing(beton: Path, optimizer: str) -> None:
    each = trainer(beton, optimizer=optimizer)
    each.run_epoch(stop=lambda: each.step == 3)
    good = copy.deepcopy(each.state_dict())
    first = next(iter(good["model"]))
    momentum = "momentum_buffer" if optimizer == "sgd" else "exp_avg"

    def spoiled(path: list, value: object) -> dict:
        state = copy.deepcopy(good)
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        if value is KeyError:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        return state

    new = trainer(beton, optimizer=optimizer)
    before = weights(new)
    for path, value in [
        *(([name], KeyError) for name in good if name != "amp"),
        *(([name], value) for name in good for value in ([], torch.zeros(2), {})),
        *((["step"], value) for value in (-1, 4, 10**9, True, 3.0)),
        *((["seconds"], value) for value in (-1.0, float("nan"), "1")),
        (["amp"], "bf16"),
        (["model", first], torch.zeros(1)),
        (["model", first], good["model"][first].double()),
        (["model", "more"], torch.zeros(1)),
        (["optimizer", "state"], {}),
        (["optimizer", "state", 0, momentum], torch.zeros(1)),
        (["optimizer", "state", 0], {}),
        (["optimizer", "state", 99], {}),
        (["random", "cpu"], torch.zeros(3, dtype=torch.uint8)),
        (["losses"], torch.zeros(99)),
        (["loader", "position"], 99),
        (["loader", "epoch"], -1),
    ]:
        if path == ["scaler"] and value == {}:
            continue  # as it is without a scaler
        with pytest.raises(DataError):
            new.load_state_dict(spoiled(path, value))
        assert same(weights(new), before), path
        assert new.step == 0
    new.load_state_dict(good)
    assert new.step == 3
