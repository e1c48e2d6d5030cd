"""`train/setup.py`: a model that could not be built leaves nothing behind in the process."""

import pytest
import torch.distributed as dist

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.resolve import parse
from megatron_ettin.train.setup import build_single_process


def test_single_process_that_cannot_be_set_up_leaves_no_process_group() -> None:
    overrides = ["runtime.device=cpu", "runtime.attention=flash"]
    config = parse("17m", "mlm", "pretrain", None, overrides)
    # the second attempt must not fail because of state that the first one left
    for _ in range(2):
        with pytest.raises(UserError, match=r"runtime\.attention: flash"):
            build_single_process(config)
        assert not dist.is_initialized()
