"""Figures of a report: which curves are drawn, and how."""

from __future__ import annotations

from pathlib import Path

from megatron_ettin.report.document import read_models
from megatron_ettin.report.plots import panels
from tests.report.synthetic import write_run


def test_panels_draw_learning_rate_of_the_first_model_under_the_others(tmp_path: Path) -> None:
    """The first colour is the encoder's, whichever model comes first."""
    models = read_models([write_run(tmp_path / "clm", "clm"), write_run(tmp_path / "mlm", "mlm")])
    assert [model.objective for model in models] == ["clm", "mlm"]
    drawn = dict(panels(models))
    assert [curve.is_background for curve in drawn["lr"].curves] == [True, False]
    assert not any(curve.is_background for curve in drawn["loss"].curves)
    assert not any(curve.is_background for curve in dict(panels(models[:1]))["lr"].curves)
