"""Share of the training clock that checkpoints take.

    python benchmarks/research/checkpoint_cost.py --output benchmarks/results/checkpoint_cost.json

Evidence for writing a checkpoint every 20 s (training/checkpoint.py): ResNet-18 trains with one every 2 s and without,
in turn, on an idle machine; what one adds is held against 20 s.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from fastmnist.config import TrainConfig
from fastmnist.files import write_json
from fastmnist.system.environment import origin
from fastmnist.system.progress import Reporter
from fastmnist.system.statistics import row
from fastmnist.training import checkpoint
from fastmnist.training.session import Session

SAVE_EVERY = 2.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file for the rows")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60, help="in a turn")
    options = parser.parse_args()
    turns, steps = options.turns, options.steps
    usual, checkpoint.SAVE_EVERY = checkpoint.SAVE_EVERY, SAVE_EVERY
    clocks: dict[str, list[float]] = {"with": [], "without": []}
    written = 0
    with tempfile.TemporaryDirectory() as scratch:
        config = TrainConfig(dataset="digits", batch_size=128, epochs=(2 * turns + 2) * steps, cache_dir=scratch)
        with Session(config, Reporter(quiet=True)) as session:
            trainer = session.trainer
            for turn in range(turns + 1):
                for side, values in clocks.items():
                    with checkpoint.Checkpoints(Path(scratch), session.config.to_dict()) as checkpoints:

                        def save(side: str = side, to: checkpoint.Checkpoints = checkpoints) -> None:
                            nonlocal written
                            if side == "with" and to.due():
                                to.begin(trainer.state_dict())
                                written += 1

                        last, before = trainer.step + steps, trainer.seconds
                        while trainer.step < last:
                            trainer.run_epoch(stop=lambda last=last: trainer.step >= last, after_step=save)
                        values.append(trainer.seconds - before)
                        checkpoints.wait()
                if not turn:  # a warm-up
                    written, clocks = 0, {side: [] for side in clocks}
            where = origin(session.device)
        size = (Path(scratch) / checkpoint.CHECKPOINT).stat().st_size
    if not written:
        raise SystemExit(f"{steps} steps ended before the first checkpoint: nothing was measured")
    more = statistics.median(clocks["with"]) - statistics.median(clocks["without"])
    each = more * turns / written
    about = {"checkpoint_bytes": size, "checkpoints": written, "seconds_per_checkpoint": each}
    print(f"{each:.3f} s each, {each / usual:.2%} of the training clock with one every {usual:.0f} s")
    rows = [row("checkpoints", side, values, "seconds", where, {"steps": steps}) for side, values in clocks.items()]
    write_json(options.output, {"rows": rows, "share_of_the_training_clock": each / usual, **about})


if __name__ == "__main__":
    main()
