"""Exported folders in environments with other transformers, each made by tools/compat_env.sh.

$ETTIN_COMPAT names the environments: by default the oldest and the newest, in tests/nightly.sh more."""

from __future__ import annotations

import os
import re

import pytest
import yaml

from tests.convert.compat.conftest import ROOT
from tests.convert.compat.exports import EXPORTS, ettin, objective_of
from tests.convert.compat.probe import checks_of
from tests.convert.folders import same_bits, tensors

pytestmark = pytest.mark.full
ENVIRONMENTS = os.environ.get("ETTIN_COMPAT", "oldest newest").split()
CHECKED = [(name, check.__name__) for name in EXPORTS for check in checks_of(objective_of(name))]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize(("name", "check"), CHECKED)
def test_export_in_other_transformers_passes_check(probed, environment, name, check):
    went_wrong = probed(environment).failures[name][check]
    assert went_wrong is None, went_wrong


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_compat_environment_has_requested_transformers(probed, environment):
    lowest = re.search(r"transformers >= ([\d.]+)", (ROOT / "setup.cfg").read_text())[1]
    pinned = re.search(r"transformers==([\d.]+)", (ROOT / "constraints-cpu.txt").read_text())[1]
    wanted = {"oldest": f"{lowest}.0", "newest": pinned, "latest": ""}.get(environment, environment)
    assert probed(environment).version.startswith(wanted)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("name", EXPORTS)
def test_from_hf_folder_saved_by_other_transformers_keeps_bits(probed, environment, exports, tmp_path, name):
    version = probed(environment).version
    ettin("convert", "from-hf", exports / name / "model", tmp_path / "first")
    ettin("convert", "from-hf", exports / name / f"saved_by_{version}", tmp_path / "second")
    first, second = (yaml.safe_load((tmp_path / which / "config.yaml").read_text()) for which in ("first", "second"))
    assert first["model"] == second["model"]
    assert first["run"]["objective"] == second["run"]["objective"]
    for which in ("first", "second"):
        ettin("convert", "to-hf", tmp_path / which, tmp_path / f"{which}_out", "--no-verify")
    assert same_bits(tensors(tmp_path / "first_out"), tensors(tmp_path / "second_out"))
    for file in ("config.json", "tokenizer_config.json"):
        assert (tmp_path / "first_out" / file).is_file()
        assert (tmp_path / "second_out" / file).is_file()
