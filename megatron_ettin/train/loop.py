"""The training loop and the command behind `ettin train`: resolve, check, assemble, go on from where the run stands,
step until the phase's tokens are trained on."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ettin import parallel
from megatron_ettin.config.counts import format_count
from megatron_ettin.config.errors import UserError
from megatron_ettin.config.schema import Config
from megatron_ettin.config.sizes import parameter_count
from megatron_ettin.data.mixture import parse_mixture
from megatron_ettin.data.order import Corpus, open_corpus
from megatron_ettin.optim.schedules import lr_fraction
from megatron_ettin.platform import Platform, detect
from megatron_ettin.platform.device import gpu_count
from megatron_ettin.platform.rendezvous import Place, find_place, join, leave
from megatron_ettin.train import resume, run_directory
from megatron_ettin.train.assembly import Machine, assemble
from megatron_ettin.train.batches import Batches
from megatron_ettin.train.evaluate import validation_batches
from megatron_ettin.train.hooks import Checkpoints, Console, Evaluation, Hook, Metrics, Run, StopSignal
from megatron_ettin.train.resume import Progress
from megatron_ettin.train.step import StepInfo, train_step


class TrainingStopped(RuntimeError):
    """The run cannot go on for a reason that is nobody's typing mistake (exit 1)."""


@dataclass(frozen=True)
class Launch:
    """What `ettin train` was told besides the configuration."""

    run_dir: Path
    init_from: Path | None = None
    keep_optimizer: bool | None = None  # None: by the rule of `resume.keeps_optimizer`
    allow_change: Sequence[str] = ()


def train(run: Run, hooks: Sequence[Hook], stop: StopSignal) -> bool:
    """Step until the run is done; True if it was asked to stop before. Every rank returns the same."""
    for hook in hooks:
        hook.start(run)
    stopped = False
    while not stopped and not is_done(run.config, run.progress):
        lr = run.config.optim.lr * lr_fraction(run.progress.tokens, run.config.schedule, run.config.run.tokens)
        info = train_step(run.machine, run.batches, run.progress.step, run.progress.tokens, lr, stop.received)
        check_finite(run.config, info)
        run.progress = Progress(info.step, info.tokens, run.progress.updates + 1)
        for hook in hooks:
            hook.step(run, info)
        stopped = info.stop_requested
    for hook in hooks:
        hook.stop(run)
    return stopped and not is_done(run.config, run.progress)


def is_done(config: Config, progress: Progress) -> bool:
    steps = config.run.steps
    return progress.tokens >= config.run.tokens or (steps is not None and progress.step >= steps)


def check_finite(config: Config, info: StepInfo) -> None:
    """Stop before anything of this step is kept. Every rank has the same figures, so all of them stop."""
    if config.resilience.stop_on_nonfinite and not (math.isfinite(info.loss) and math.isfinite(info.grad_norm)):
        raise TrainingStopped(
            f"step {info.step}: loss {info.loss}, gradient norm {info.grad_norm}; rows {info.rows[0]} to"
            f" {info.rows[1] - 1} (`ettin order` names their documents). Nothing of this step was saved"
        )


def run_training(config: Config, launch: Launch) -> bool:
    """Train as this process's rank; True if the run was saved before its end and wants requeueing."""
    place = find_place()
    corpus = open_training_data(config, place)
    run_directory.check_writable(launch.run_dir)
    changes = run_directory.check_unchanged(launch.run_dir, config, corpus, launch.allow_change)
    platform = detect(config.run.device, place.local_rank)
    if config.run.deterministic:
        platform.make_deterministic()
    stop = StopSignal(config.resilience.save_on_signal)
    with run_directory.locked(launch.run_dir, chief=place.rank == 0):
        join(place, platform)
        return _train_as(place, config, launch, corpus, platform, changes, stop)


def _train_as(
    place: Place,
    config: Config,
    launch: Launch,
    corpus: Corpus,
    platform: Platform,
    changes: list[str],
    stop: StopSignal,
) -> bool:
    """This rank's run, from assembly to the last save; its process groups are gone afterwards."""
    try:
        machine = assemble(config, platform, place.world)
        progress, origin = resume.begin(machine, launch.run_dir, launch.init_from, launch.keep_optimizer, corpus)
        batches = Batches.of(config, corpus, machine.layout, platform.device)
        run = Run(machine, batches, launch.run_dir, progress)
        if run.is_chief:
            announce(run, place, origin)
            record = {"from": origin, "changes": changes, "layout": str(machine.layout.topology), "world": place.world}
            threads = {"threads": torch.get_num_threads(), "torch": torch.__version__, "step": progress.step}
            run_directory.write_launch(launch.run_dir, config, corpus, {**record, **threads})
        return train(run, build_hooks(run), stop)
    finally:
        parallel.destroy()
        leave()


def build_hooks(run: Run) -> list[Hook]:
    """In the order they run: evaluation adds figures that the metrics then write, checkpoints come last."""
    hooks: list[Hook] = [Metrics(), Console()]
    if run.config.data.validation is not None:
        held_out = validation_batches(run.machine, run.config.data.validation)
        if held_out.corpus.tokenizer_fingerprint != run.batches.corpus.tokenizer_fingerprint:
            raise UserError(
                f"data.validation: {run.config.data.validation} was made with another tokenizer than the data"
            )
        hooks.insert(0, Evaluation(held_out))
    return [*hooks, Checkpoints(hooks)]


def open_training_data(config: Config, place: Place) -> Corpus:
    """The corpus of the run. Raises UserError for what is missing or made with another tokenizer."""
    if config.data.mixture is None:
        raise UserError("data.mixture: not set; give a dataset made by `ettin prepare`, data.mixture=DATASET")
    data = config.data
    corpus = open_corpus(parse_mixture(data.mixture), data.seq_len, data.batching, config.run.seed, config.run.phase)
    if config.model.vocab_size != corpus.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size}, but the dataset's tokenizer has {corpus.vocab_size} entries;"
            f" set model.vocab_size={corpus.vocab_size} or prepare the data with the model's tokenizer"
        )
    return corpus


def announce(run: Run, place: Place, origin: str) -> None:
    config, machine = run.config, run.machine
    parameters = format_count(parameter_count(config.model, config.model.vocab_size))
    print(
        f"{config.run.objective} {config.run.size} {config.run.phase}: {parameters} parameters,"
        f" {config.precision.name},"
        f" {place.world} rank{'s' * (place.world > 1)} on {machine.platform.name} ({machine.layout.topology}),"
        f" {machine.chunks[0].config.backend.name} layers; {origin}",
        flush=True,
    )
    gpus = gpu_count() if machine.platform.is_gpu else 0
    if place.source == "alone" and gpus > 1:
        print(
            f"this machine has {gpus} GPUs and one is used; to use all:"
            f" torchrun --nproc-per-node {gpus} --no-python ettin train ...",
            flush=True,
        )
    if os.cpu_count() and not machine.platform.is_gpu and "OMP_NUM_THREADS" not in os.environ and place.world > 1:
        print(f"OMP_NUM_THREADS is not set; every rank uses {torch.get_num_threads()} threads", flush=True)


def machine_alone(config: Config, training: bool = False) -> Machine:
    """The whole model in this process, for evaluation, export checks and tools."""
    platform = detect(config.run.device)
    join(Place(0, 1, 0, None, 0, "alone"), platform)
    return assemble(config, platform, 1, training)
