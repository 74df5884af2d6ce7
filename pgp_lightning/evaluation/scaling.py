"""What a training of posterior-guided pruning takes on a cluster: seconds of a step, bytes over the wire, money.

A first-order model: FLOPs by closed forms over the peak of the device times one utilisation, bytes over the wire over
the bandwidth of the links, decoding over the cores of the workers. docs/scaling.md has the constants with their
sources, what has been checked, and what has not: no GPU has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.flops import Decoder
from pgp_lightning.evaluation.training_flops import WIDE_PARTS, Shape, training_flops
from pgp_lightning.training.global_batch import micro_batches
from pgp_lightning.vlm.memory import Config, FitMemory, fit_memory, parameters, tokens_per_tile, trained_parameters

__all__ = ["Assumptions", "Cluster", "Prediction", "Strategy", "Workload", "largest_batch", "predict", "utilisation"]

Strategy = Literal["ddp", "zero2", "zero3", "fsdp2"]
HALF, SINGLE = 2, 4  # bytes of bfloat16 and float32


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind in nodes of one kind.

    Attributes:
        gpus_per_node: of every node.
        nodes: of the cluster.
        flops: peak of a GPU in dense bfloat16, FLOP/s.
        single_flops: the same in float32, in which adapter and bottleneck are computed.
        memory: bytes of a GPU.
        intra: bytes/s that a GPU sends within its node, one direction.
        inter: bytes/s that a node sends to others, per GPU of it, one direction.
        price: of a GPU for an hour, in any currency.
    """

    gpus_per_node: int
    nodes: int
    flops: float
    single_flops: float
    memory: float
    intra: float
    inter: float
    price: float

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return self.gpus_per_node * self.nodes

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a ring through all GPUs: over the edge of a node it has as many links as the node has GPUs."""
        return self.intra if self.nodes == 1 else min(self.intra, self.gpus_per_node * self.inter)

    def of(self, gpus: int) -> Cluster:
        """Return as many whole nodes, or as much of one, as has a number of GPUs.

        Raises:
            ConfigError: if that many are not whole nodes.
        """
        if gpus <= self.gpus_per_node:
            return replace(self, gpus_per_node=gpus, nodes=1)
        if gpus % self.gpus_per_node:
            raise ConfigError(f"{gpus} GPUs are no whole nodes of {self.gpus_per_node}: use a multiple of that")
        return replace(self, nodes=gpus // self.gpus_per_node)


@dataclass(frozen=True)
class Assumptions:
    """What no specification says; docs/scaling.md has the source of each.

    Attributes:
        utilisation: share of the peaks that is reached over the FLOPs that run, recomputed ones among them.
        link: share of the bandwidth that collectives reach.
        overlap: share of the lesser of computing and communicating that is hidden behind the other.
        launch: seconds of processor time that starts an operation on the GPU.
        launches: operations of a micro-batch per decoder layer, those outside the decoder among them.
        image_bytes: of an encoded image.
        decode: processor seconds that make tiles of it.
        workers: cores per GPU that do so.
        live: parameters that ZeRO-3 keeps whole at a time.
        usable: share of a GPU's memory that tensors can take.
    """

    utilisation: float = 0.3
    link: float = 0.7
    overlap: float = 0.0
    launch: float = 10e-6
    launches: int = 573
    image_bytes: float = 160e3
    decode: float = 0.03
    workers: int = 4
    live: float = 1e9
    usable: float = 0.9


@dataclass(frozen=True)
class Workload:
    """A training: the paper's, with the lengths of docs/models.md.

    Attributes:
        config: of the guide's base.
        tiles: of an image, the thumbnail included.
        text: prompt slots before the visual tokens.
        answer: supervised tokens.
        records: of an optimiser step.
        steps: optimiser steps.
        rank: of the adapter.
    """

    config: Config
    tiles: int = 7
    text: int = 128
    answer: int = 64
    records: int = 176
    steps: int = 7200
    rank: int = 32

    @cached_property
    def flops(self) -> tuple[int, int]:
        """FLOPs of a record, with gradient checkpointing: in the dtype of the base, and in float32."""
        visual = self.tiles * tokens_per_tile(self.config)
        slots = visual + self.text
        shape = Shape(self.tiles, 1, visual, slots, slots + self.answer, 0, self.answer, checkpointing=True)
        parts = {part: sum(flops) for part, flops in training_flops(self.config, self.rank, shape).items()}
        wide = sum(parts[part] for part in WIDE_PARTS)
        return sum(parts.values()) - wide, wide

    @cached_property
    def trained(self) -> int:
        """Bytes of the trained parameters, which are those of their gradients too."""
        return SINGLE * trained_parameters(self.config, self.rank)

    @cached_property
    def gathered(self) -> int:
        """Bytes that sharded parameters make in a micro-batch when each module's are collected whenever it runs.

        The decoder runs in both passes and, recomputed, in the backward pass of both; the head in the second alone,
        forward and backward, as the bottleneck in the first; embeddings twice forward; tower and projector once.
        """
        decoder = Decoder(self.config)
        layers, words = decoder.depth * decoder.linear // 2, decoder.vocabulary * decoder.width
        once = parameters(self.config) - layers - 2 * words
        adapter = SINGLE * decoder.depth * decoder.adapter(self.rank) // 2
        return HALF * (4 * layers + 2 * words + 2 * words + once) + 4 * adapter + 2 * (self.trained - adapter)

    @cached_property
    def fit(self) -> FitMemory:
        """Memory of a micro-batch of one record; what is no weight grows with the records."""
        return fit_memory(
            self.config, rows=1, tiles=self.tiles, text_slots=self.text + self.answer, answer=self.answer,
            lora_rank=self.rank,
        )  # fmt: skip

    def wire(self, strategy: Strategy, gpus: int, accumulation: int) -> float:
        """Return the bytes that each GPU sends in an optimiser step, by rings.

        DDP reduces gradients once a step, 2 (n - 1) / n of them. ZeRO and, under Lightning, FSDP2 scatter their sums in
        every micro-batch; ZeRO-2 then collects the new weights, the others collect weights whenever modules run.
        """
        ring = (gpus - 1) / gpus
        if strategy == "ddp":
            return 2 * ring * self.trained
        if strategy == "zero2":
            return ring * self.trained * (accumulation + 1)
        return ring * accumulation * (self.trained + self.gathered)

    def memory(self, strategy: Strategy, gpus: int, batch_size: int, live: float) -> float:
        """Return the bytes that a GPU holds; weight, gradient and two moments are a quarter each of the trained."""
        fit = self.fit
        activations = batch_size * (fit.total - fit.weights - fit.trained)
        if strategy == "ddp":
            return fit.weights + fit.trained + activations
        if strategy == "zero2":
            return fit.weights + fit.trained * (1 + 3 / gpus) / 4 + activations
        return (fit.weights + fit.trained) / gpus + min(fit.weights, HALF * live) + activations


@dataclass(frozen=True)
class Prediction:
    """An optimiser step and the whole training.

    Attributes:
        gpus: that take part.
        batch_size: records of a micro-batch.
        accumulation: micro-batches of a GPU.
        compute: seconds, gradients included.
        communication: seconds.
        data: seconds that the workers need.
        seconds: of the step.
        wire: bytes that each GPU sends.
        memory: bytes of each GPU.
        read: bytes/s of images that each GPU asks for.
        cores: of the workers of each GPU that are busy.
        hours: of the training.
        gpu_hours: the same, for all GPUs together.
        cost: the same, in money.
    """

    gpus: int
    batch_size: int
    accumulation: int
    compute: float
    communication: float
    data: float
    seconds: float
    wire: float
    memory: float
    read: float
    cores: float
    hours: float
    gpu_hours: float
    cost: float


def largest_batch(
    work: Workload, cluster: Cluster, strategy: Strategy, given: Assumptions | None = None, most: int = 16
) -> int:
    """Return the largest micro-batch that fits into a GPU and makes a step of the workload's records; 0 if none does.

    Raises:
        ConfigError: if the records cannot be dealt to so many GPUs.
    """
    given = given or Assumptions()
    each = micro_batches(work.records, cluster.gpus, 1)
    room = given.usable * cluster.memory
    sizes = [n for n in range(1, min(each, most) + 1) if each % n == 0]
    return max((n for n in sizes if work.memory(strategy, cluster.gpus, n, given.live) <= room), default=0)


def predict(
    work: Workload,
    cluster: Cluster,
    strategy: Strategy = "ddp",
    batch_size: int | None = None,
    given: Assumptions | None = None,
) -> Prediction:
    """Predict an optimiser step.

    Raises:
        ConfigError: if the records cannot be dealt so, or no micro-batch fits.
    """
    given = given or Assumptions()
    gpus = cluster.gpus
    size = largest_batch(work, cluster, strategy, given) if batch_size is None else batch_size
    if not size:
        raise ConfigError(f"not one record fits into {cluster.memory / 2**30:.0f} GiB with {strategy} on {gpus} GPUs")
    accumulation = micro_batches(work.records, gpus, size)
    each = work.records // gpus
    floor = given.launch * given.launches * Decoder(work.config).depth
    compute = accumulation * max(size * _ideal(work, cluster) / given.utilisation, floor)
    wire = work.wire(strategy, gpus, accumulation)
    communication = wire / (given.link * cluster.bandwidth)
    data = each * given.decode / given.workers
    seconds = max(data, compute + communication - given.overlap * min(compute, communication))
    hours = seconds * work.steps / 3600
    return Prediction(
        gpus=gpus, batch_size=size, accumulation=accumulation, compute=compute, communication=communication, data=data,
        seconds=seconds, wire=wire, memory=work.memory(strategy, gpus, size, given.live),
        read=each * given.image_bytes / seconds, cores=each * given.decode / seconds,
        hours=hours, gpu_hours=hours * gpus, cost=hours * gpus * cluster.price,
    )  # fmt: skip


def utilisation(work: Workload, cluster: Cluster, seconds: float) -> float:
    """Return the utilisation that a measured step of so many seconds means, if communication is little of it."""
    return work.records / cluster.gpus * _ideal(work, cluster) / seconds


def _ideal(work: Workload, cluster: Cluster) -> float:
    """Return the seconds of a record at both peaks."""
    half, wide = work.flops
    return half / cluster.flops + wide / cluster.single_flops
