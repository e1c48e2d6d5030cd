"""`megatron_ettin.api`: former names work and warn; steps and objectives mean the same as in commands."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_ettin import api
from megatron_ettin.base.errors import UserError
from megatron_ettin.cli.main import main
from megatron_ettin.config.resolve import to_yaml
from tests.convert.folders import make_folder
from tests.train.runs import TINY


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


def test_api_order_lists_the_chunks_of_the_command(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = api.configure("17m", "mlm", "pretrain", *TINY, f"data.mixture={corpus}")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    for first, last in ((1, 2), (3, 3)):
        assert main(["order", str(tmp_path), "--steps", f"{first}:{last + 1}", "--json"]) == 0
        printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert list(api.order(tmp_path, first, last)) == printed
        assert {chunk["step"] for chunk in printed} == {first, last}
    for first, last in ((0, 2), (3, 2)):
        with pytest.raises(UserError, match=rf"^steps {first} to {last}: "):
            api.order(tmp_path, first, last)


@pytest.mark.parametrize("objective", ["nsp", "hybrid"])
def test_api_evaluate_by_an_objective_that_rows_do_not_have_is_refused(objective: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", "mlm")
    with pytest.raises(UserError, match=rf"^--objective: '{objective}' does not exist; it is one of mlm, clm, mntp$"):
        api.evaluate(folder, tmp_path / "nowhere", objective=objective)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [({"rows": 0}, r"^--rows 0: must be at least 1$"), ({"seq_len": 0}, r"^--seq-len 0: a row of")],
)
def test_api_evaluate_numbers_out_of_range_are_refused(numbers: dict[str, int], message: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", "mlm")
    with pytest.raises(UserError, match=message):
        api.evaluate(folder, tmp_path / "nowhere", **numbers)
