"""`megatron_ettin.api`: names of former versions still work and warn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_ettin import api


@pytest.mark.parametrize(("old", "new"), [("Evaluated", "EvalResult"), ("Measured", "EvalMetrics")])
def test_api_renamed_class_warns_and_is_the_new_one(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now .*{new}"):
        renamed = getattr(api, old)
    assert renamed.__name__ == new


def test_api_model_machine_warns_and_is_the_train_state() -> None:
    state = cast(Any, SimpleNamespace())
    model = api.Model(api.configure("17m", "mlm", "pretrain"), state)
    with pytest.warns(DeprecationWarning, match="train_state"):
        assert model.machine is state


def test_api_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = api.no_such_name


def test_api_configure_site_warns_and_is_the_user_config(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("optim:\n  lr: 0.25\n")
    with pytest.warns(DeprecationWarning, match="user_config"):
        old = api.configure("17m", "mlm", "pretrain", site=tmp_path / "site.yaml")
    assert old == api.configure("17m", "mlm", "pretrain", user_config=tmp_path / "site.yaml")
    assert old.optim.lr == 0.25
