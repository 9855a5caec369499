"""Other projects' loaders, each with its own format, set up as its documentation advises for speed.

Their packages are imported only where they are used. Of a library that reads sample by sample, its cheapest way was
chosen by measurement.
"""

from __future__ import annotations

import importlib
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from joblib import cpu_count
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, get_worker_info

from fastmnist.baselines.workers import batches_of, unchanged, worker_settings

Batch = tuple[torch.Tensor, torch.Tensor]

SHARDS = 16  # of a dataset that is shuffled shard by shard
BUFFER = 1000  # samples in a shuffle buffer: the number in the peers' documentation
MOST_THREADS = 16  # Grain's own default


class Peer(ABC):
    """A loader to compare with. An object keeps its files open, and its workers, from one epoch to the next.

    Attributes:
        name: on command lines. title: in tables.
        package: for pip to install. module: to import.
        extra: of fastmnist, which installs the package.
        workers_advised: processes with which it was fastest on two cores, for MNIST in batches of 512.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    package: ClassVar[str]
    module: ClassVar[str]
    workers_advised: ClassVar[int] = 0
    extra: ClassVar[str] = "peers"

    @abstractmethod
    def write(self, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
        """Writes images (N, H, W, C) uint8 and labels (N,) int64 in the peer's format into an empty folder."""

    @abstractmethod
    def epoch(self, folder: Path, batch_size: int, epoch: int, seed: int, workers: int) -> Iterator[Batch]:
        """One shuffled epoch of the samples written to `folder`; every sample comes once.

        Args:
            workers: processes that load; 0 loads in this one. They are not forked from this process: a script that
                uses them needs `if __name__ == "__main__"`.

        Yields:
            images uint8 of B * H * W * C values, in a shape that begins with B, and labels (B,) int64. B is
            `batch_size` but for the last batch, or, where a class says so, the last batch of each worker. The order
            is a function of (seed, epoch, workers).
        """


def missing(peer: type[Peer]) -> str | None:
    """A sentence with the peer's missing package and how to get it; None when it is installed.

    Nothing is imported to find out: that takes seconds, and may change what is measured in this process.
    """
    try:
        version(peer.package)
    except PackageNotFoundError:
        return f"the package {peer.package} is not installed; pip install '.[{peer.extra}]'"
    return None


class _Kept(Peer):
    """A loader that is kept as long as each epoch follows the one before with the same settings."""

    def __init__(self) -> None:
        self._next: tuple[Any, ...] = ()  # the epoch and settings that the loader can continue with
        self._loader: Any = None

    def epoch(self, folder: Path, batch_size: int, epoch: int, seed: int, workers: int) -> Iterator[Batch]:
        settings = (folder, batch_size, seed, workers)
        expected, self._next = self._next, ()
        if expected != (epoch, *settings):
            self._end()
            self._loader = self._make(folder, batch_size, epoch, seed, workers)
        yield from self._run(self._loader, epoch, seed)
        self._next = (epoch + 1, *settings)

    @abstractmethod
    def _make(self, folder: Path, batch_size: int, epoch: int, seed: int, workers: int) -> Any:
        """A loader that begins with that epoch and continues with those after it."""

    def _run(self, loader: Any, epoch: int, seed: int) -> Iterator[Batch]:
        """The loader's next epoch, number `epoch`."""
        return batches_of(loader)

    def _end(self) -> None:
        """Releases the loader, whose workers end with it."""
        if hasattr(self._loader, "_iterator"):
            self._loader._iterator = None  # litData's refers back: the workers would wait for a garbage collection
        self._loader = None

    def __del__(self) -> None:
        self._end()


class HFDatasets(_Kept):
    """Hugging Face datasets: a memory-mapped Arrow table, shuffled as an IterableDataset, read as Arrow batches.

    For shuffled reading the documentation advises an IterableDataset of shards with a shuffle buffer, because a
    shuffled Dataset may be ten times slower ("Differences between Dataset and IterableDataset"), and the Arrow format
    for zero-copy batches ("Use with PyArrow"). Images are lists of fixed length, whose rows lie side by side. Before
    version 5.1 the buffer works row by row, a hundred times slower. Each worker's last batch has a size of its own.
    """

    name, title, package, module = "hf-datasets", "HF datasets", "datasets", "datasets"

    def write(self, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
        datasets, arrow = importlib.import_module(self.module), importlib.import_module("pyarrow")
        size = int(np.prod(images.shape[1:]))
        values = datasets.List(datasets.Value("uint8"), length=size)
        features = datasets.Features({"image": values, "label": datasets.Value("int64")})
        rows = arrow.FixedSizeListArray.from_arrays(arrow.array(images.reshape(-1)), size)
        table = arrow.table({"image": rows, "label": labels}, schema=features.arrow_schema)
        datasets.disable_progress_bars()
        datasets.Dataset(table).save_to_disk(str(folder))

    def _make(self, folder: Path, batch_size: int, epoch: int, seed: int, workers: int) -> Any:
        rows = importlib.import_module(self.module).load_from_disk(str(folder))
        shards = rows.to_iterable_dataset(num_shards=min(SHARDS, len(rows))).with_format("arrow")
        batches = _ArrowBatches(shards, batch_size, seed)
        return DataLoader(batches, None, collate_fn=unchanged, **_persistent(workers))

    def _run(self, loader: Any, epoch: int, seed: int) -> Iterator[Batch]:
        loader.dataset.rows.set_epoch(epoch)  # in shared memory, which the workers see
        return batches_of(loader)


class _ArrowBatches(IterableDataset[Batch]):
    """Shuffled batches of a Hugging Face IterableDataset in Arrow format; each worker takes its own shards."""

    def __init__(self, rows: Any, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rows = self.rows if worker is None else self.rows.shard(worker.num_workers, worker.id)
        rows = rows.shuffle(self.seed, buffer_size=BUFFER)
        rows.set_epoch(self.rows.epoch)
        for table in rows.iter(self.batch_size):
            images, labels = table.column("image").combine_chunks(), table.column("label").combine_chunks()
            yield torch.from_dlpack(images.flatten()).view(len(images), -1), torch.from_dlpack(labels)


class WebDataset(_Kept):
    """WebDataset: tar files that are read in sequence, shuffled by shard and in a buffer, batched in the pipeline.

    The documentation advises many shuffled shards and a shuffle buffer for their samples ("The webdataset Pipeline API"
    in the README), and to make batches in the workers, because passing single samples between processes is slow
    (README of its example wds-distributed). A sample is one file, label before image: two files would double the time.
    The order is that of seed + epoch. Each worker's last batch has a size of its own.
    """

    name, title, package, module = "webdataset", "WebDataset", "webdataset", "webdataset"
    workers_advised = 2

    def write(self, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
        wds = importlib.import_module(self.module)
        # A whole number as each file's time: a fraction costs a second header, and half the reading speed.
        with wds.ShardWriter(str(folder / "%06d.tar"), -(-len(images) // SHARDS), verbose=0, mtime=0) as sink:
            for index, record in enumerate(_records(images, labels)):
                sink.write({"__key__": f"{index:09d}", "bin": record})

    def _make(self, folder: Path, batch_size: int, epoch: int, seed: int, workers: int) -> Any:
        wds = importlib.import_module(self.module)
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(sorted(map(str, folder.glob("*.tar")))),
            wds.detshuffle(SHARDS, seed=seed, epoch=epoch - 1),  # it adds one as it begins
            wds.split_by_worker,
            wds.tarfile_to_samples(),
            wds.detshuffle(BUFFER, seed=seed, epoch=epoch - 1),
            wds.to_tuple("bin"),
            wds.batched(batch_size, collation_fn=_from_samples),
        )
        return wds.WebLoader(pipeline, batch_size=None, collate_fn=unchanged, **_persistent(workers))


class Streaming(_Kept):
    """MosaicML Streaming: an MDS file on the local disk, read sample by sample.

    The documentation advises its MDS format as the fastest ("Dataset Format"), to give `batch_size` to the dataset as
    well, `local` alone for data on this machine, and workers that stay between epochs ("FAQs and Tips").
    """

    name, title, package, module = "streaming", "MosaicML Streaming", "mosaicml-streaming", "streaming"
    extra = "peers-streaming"  # version 0.13 needs older packages than a fast version of Hugging Face datasets
    workers_advised = 2

    def write(self, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
        shape = ",".join(map(str, images.shape[1:]))  # a fixed shape spares each sample a header
        columns = {"image": f"ndarray:uint8:{shape}", "label": "int64"}
        with importlib.import_module(self.module).MDSWriter(out=str(folder), columns=columns) as out:
            for image, label in zip(images, labels, strict=True):
                out.write({"image": image, "label": label})

    def _make(self, folder: Path, batch_size: int, epoch: int, seed: int, workers: int) -> Any:
        streaming = importlib.import_module(self.module)
        dataset = streaming.StreamingDataset(
            local=str(folder), batch_size=batch_size, shuffle=True, shuffle_seed=seed, num_canonical_nodes=1
        )
        dataset.next_epoch = epoch
        return streaming.StreamingDataLoader(
            dataset, batch_size=batch_size, collate_fn=_stacked, **_persistent(workers)
        )


class LitData(_Kept):
    """litData: chunks of 64 MB that are memory-mapped, read by its StreamingDataLoader.

    The documentation advises to optimise the data into chunks of arrays, its own StreamingDataLoader, and the default
    shuffle, which permutes blocks of 256 samples and the samples in each, to use together what was decoded together
    ("Speed up model training" and "Shuffle, seed, and drop_last" in the README).
    """

    name, title, package, module = "litdata", "litData", "litdata", "litdata"
    workers_advised = 2

    def write(self, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
        # `litdata.optimize` does this in processes of its own, to which the images would have to be sent.
        cache = importlib.import_module("litdata.streaming").Cache(str(folder), chunk_bytes="64MB")
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            cache[index] = {"image": image, "label": label}
        cache.done()
        cache.merge()

    def _make(self, folder: Path, batch_size: int, epoch: int, seed: int, workers: int) -> Any:
        litdata = importlib.import_module(self.module)
        dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=False, seed=seed)
        loader = litdata.StreamingDataLoader(dataset, batch_size=batch_size, **_persistent(workers))
        loader.current_epoch = epoch  # it adds one as it begins
        return loader

    def _run(self, loader: Any, epoch: int, seed: int) -> Iterator[Batch]:
        for batch in batches_of(loader):
            yield batch["image"], batch["label"]


class Grain(_Kept):
    """Grain: a file of ArrayRecord, shuffled over all samples, read batch by batch in threads.

    The documentation advises `MapDataset` with shuffle and batch, turned into an `IterDataset` last, whose threads
    read ahead ("Dataset basics"), and files with `group_size:1` for random access ("Reading ArrayRecord Files"). A
    batch is read by one call, which the file's library offers: sample by sample it takes five times as long. Workers
    are processes that Grain starts by itself.
    """

    name, title, package, module = "grain", "Grain", "grain", "grain"
    workers_advised = 2

    def write(self, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
        importlib.import_module(self.module)  # fails first if missing; it brings the next one
        files = importlib.import_module("array_record.python.array_record_module")
        writer = files.ArrayRecordWriter(str(folder / "samples.array_record"), "group_size:1,uncompressed")
        for record in _records(images, labels):
            writer.write(record)
        writer.close()

    def _make(self, folder: Path, batch_size: int, epoch: int, seed: int, workers: int) -> Any:
        grain = importlib.import_module(self.module)
        source = grain.sources.ArrayRecordDataSource(str(folder / "samples.array_record"))
        batches = grain.MapDataset.range(len(source)).shuffle(seed=seed).batch(batch_size, batch_fn=_FromFile(source))
        threads = max(1, min(MOST_THREADS, cpu_count()) // max(1, workers))
        # Indices beyond the end belong to later epochs, each in its own order.
        ahead = batches.repeat()[epoch * len(batches) :].to_iter_dataset(grain.ReadOptions(threads, 2 * threads))
        if workers:
            ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        return iter(ahead), len(batches)

    def _run(self, loader: Any, epoch: int, seed: int) -> Iterator[Batch]:
        for images, labels in itertools.islice(*loader):
            yield torch.from_numpy(images), torch.from_numpy(labels)


class _FromFile:
    """A batch of samples, by their numbers, as arrays."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __call__(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return _arrays(self.source.__getitems__(rows))


class TensorDict(_Kept):
    """tensordict: memory-mapped tensors that a DataLoader indexes batch by batch.

    The documentation advises to give a memory-mapped tensordict to a DataLoader as it is, whose `__getitems__` then
    reads a batch by one index operation that no `collate_fn` takes apart ("Load data and share it between
    processes").
    """

    name, title, package, module = "tensordict", "tensordict", "tensordict", "tensordict"

    def write(self, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
        tensors = {"image": _tensor(images), "label": _tensor(labels)}
        importlib.import_module(self.module).TensorDict(tensors, batch_size=[len(images)]).memmap(str(folder))

    def _make(self, folder: Path, batch_size: int, epoch: int, seed: int, workers: int) -> Any:
        samples = importlib.import_module(self.module).TensorDict.load_memmap(str(folder))
        order = RandomSampler(range(len(samples)), generator=torch.Generator())
        return DataLoader(samples, batch_size, sampler=order, collate_fn=_images_and_labels, **_persistent(workers))

    def _run(self, loader: Any, epoch: int, seed: int) -> Iterator[Batch]:
        loader.sampler.generator.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
        return batches_of(loader)


class _ByThreads(_Kept):
    """Two memory-mapped arrays, from which threads gather batches ahead: torch's gather needs no interpreter lock.

    Its workers are threads; 0 takes one for each core.
    """

    def write(self, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
        np.save(folder / "images.npy", images.reshape(len(images), -1))
        np.save(folder / "labels.npy", labels)

    def _make(self, folder: Path, batch_size: int, epoch: int, seed: int, workers: int) -> Any:
        # Mapped for changes that stay in memory: torch warns of arrays that cannot be written.
        tensors = [torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in ("images", "labels")]
        return tensors, batch_size, workers or max(1, min(MOST_THREADS, cpu_count()))

    def _run(self, loader: Any, epoch: int, seed: int) -> Iterator[Batch]:
        (images, labels), batch_size, threads = loader
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(labels)))
        return self._ahead(
            lambda rows: (images.index_select(0, rows), labels.index_select(0, rows)), order.split(batch_size), threads
        )

    @abstractmethod
    def _ahead(
        self, gather: Callable[[torch.Tensor], Batch], rows: Sequence[torch.Tensor], threads: int
    ) -> Iterator[Batch]:
        """`gather` of each of `rows`, in their order, made by that many threads."""


class SPDL(_ByThreads):
    """SPDL: a pipeline whose threads gather batches, in the order of their indices.

    The documentation advises a source of batches of indices, a stage that fetches and batches at once, as many threads
    as the stage's concurrency, and threads rather than processes where the work releases the interpreter's lock
    ("Restructuring PyTorch Datasets for SPDL", "Choosing between them").
    """

    name, title, package, module = "spdl", "SPDL", "spdl", "spdl.pipeline"

    def _ahead(
        self, gather: Callable[[torch.Tensor], Batch], rows: Sequence[torch.Tensor], threads: int
    ) -> Iterator[Batch]:
        builder = importlib.import_module(self.module).PipelineBuilder().add_source(rows)
        builder.pipe(gather, concurrency=threads, output_order="input").add_sink(2 * threads)
        pipeline = builder.build(num_threads=threads)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()


class ThreadPool(_ByThreads):
    """Batches of a memory-mapped dataset that the threads of a pool fetch ahead, as torch's DataLoader has none."""

    name, title, package, module = "threads", "DataLoader, threads", "torch", "torch"

    def _ahead(
        self, gather: Callable[[torch.Tensor], Batch], rows: Sequence[torch.Tensor], threads: int
    ) -> Iterator[Batch]:
        with ThreadPoolExecutor(threads) as pool:
            asked = iter(rows)
            ahead = deque(pool.submit(gather, some) for some in itertools.islice(asked, 2 * threads))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(gather, some) for some in itertools.islice(asked, 1))
                yield batch


ALL: tuple[type[Peer], ...] = (
    HFDatasets,
    WebDataset,
    Streaming,
    LitData,
    Grain,
    TensorDict,
    SPDL,
    ThreadPool,
)
PEERS = {peer.name: peer for peer in ALL}


def _persistent(workers: int) -> dict[str, Any]:
    """A DataLoader's settings for that many persistent workers."""
    generator = torch.Generator().manual_seed(0)  # by default it draws from the bits that dropout uses
    return {**worker_settings(workers), "persistent_workers": workers > 0, "generator": generator}


def _tensor(array: np.ndarray) -> torch.Tensor:
    """`array` as a tensor; copied only if it is read-only, which a tensor cannot be."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _records(images: np.ndarray, labels: np.ndarray) -> Iterator[bytes]:
    """Each sample as bytes: the label's 8, then the image's."""
    for image, label in zip(images, labels.astype("<i8"), strict=True):
        yield label.tobytes() + image.tobytes()


def _arrays(records: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, size) uint8 and labels (B,) int64 of records by `_records`."""
    lines = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)
    return lines[:, 8:].copy(), lines[:, :8].copy().view("<i8")[:, 0]


def _from_samples(samples: Sequence[tuple[bytes]]) -> Batch:
    images, labels = _arrays([record for (record,) in samples])
    return torch.from_numpy(images), torch.from_numpy(labels)


def _stacked(samples: Sequence[dict[str, Any]]) -> Batch:
    images, labels = (np.stack([sample[name] for sample in samples]) for name in ("image", "label"))
    return torch.from_numpy(images), torch.from_numpy(labels)


def _images_and_labels(batch: Any) -> Batch:
    return batch["image"], batch["label"]
