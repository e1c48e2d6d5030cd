"""Load a checkpoint's weights on the ranks of a layout and save them again:
`torchrun ... -m tests.convert.reshard CHECKPOINT OUT PRECISION TP PP`. No optimizer is built, because the training
state of the models it is used for does not fit this machine."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from megatron_ettin.base.files import write_atomically
from megatron_ettin.checkpoint import directory, state
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.evaluate.inference import single_process_config
from megatron_ettin.parallel.collectives import barrier
from megatron_ettin.parallel.env import read_distributed_env
from megatron_ettin.parallel.process_groups import destroy_process_group, init_process_group
from megatron_ettin.platform import detect
from megatron_ettin.train import resume
from megatron_ettin.train.setup import setup_training


def main(checkpoint: Path, out: Path, precision: str, tp: int, pp: int) -> None:
    config = single_process_config(resume.checkpoint_config(checkpoint))
    config = config.with_keys({"parallel.tp": tp, "parallel.pp": pp, "precision.name": precision})
    env, platform = read_distributed_env(), detect("cpu")
    init_process_group(env, platform)
    train_state = setup_training(config, platform, env.world, training=False, initial_weights=False)
    progress = resume.load(train_state, checkpoint, with_optimizer=False, verified=True)
    staging = out.with_name(f".tmp-{out.name}")
    if env.rank == 0:
        staging.mkdir()
    barrier()
    model = state.model_state(train_state.model_chunks, train_state.layout.dp_group)
    plan = state.plan_state(staging, model, None, dataclasses.asdict(progress))
    plan.write()
    barrier()
    if env.rank == 0:
        known = plan.finish(lambda: False)
        write_atomically(staging / "config.yaml", to_yaml(config))
        write_atomically(staging / "progress.json", '{"step": 0, "tokens": 0}\n')
        directory.seal_and_rename(staging, out, known)
    barrier()
    destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
