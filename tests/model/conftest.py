"""A process group of one rank and models of any shape, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from megatron_ettin.config.resolve import parse
from megatron_ettin.config.schema import Config


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """Initialize a process group of one rank in this process."""
    from megatron_ettin.parallel.env import DistributedEnv, Topology
    from megatron_ettin.parallel.groups import destroy_model_parallel, initialize_model_parallel
    from megatron_ettin.parallel.process_groups import destroy_process_group, init_process_group
    from megatron_ettin.platform import detect

    platform = detect("cpu")
    init_process_group(DistributedEnv(0, 1, 0, None, 0, "alone"), platform)
    initialize_model_parallel(Topology.of(parse("17m", "mlm", "pretrain"), 1), 1)
    yield
    destroy_model_parallel()
    destroy_process_group()


@pytest.fixture
def build_model(process_group: None) -> Callable[[Config], object]:
    """Return a function that builds the EttinModel of a configuration, with initial weights, in evaluation mode."""

    def build(config: Config) -> object:
        from megatron.core.process_groups_config import ProcessGroupCollection

        from megatron_ettin.model import init
        from megatron_ettin.model.config import transformer_config
        from megatron_ettin.model.model import EttinModel
        from megatron_ettin.platform import detect
        from megatron_ettin.platform.layers import layer_backend

        core = transformer_config(config, layer_backend(detect("cpu"), "fp32"), None, False)
        model = EttinModel(core, ProcessGroupCollection.use_mpu_process_groups())
        init.init_weights(model, init.recipe_weights(config.run.seed, config.model), 1, 0)
        return model.eval()

    return build
