"""Deliberate mistakes in the package's code, each of which makes a result wrong without an error. The first tier of
tests must catch them.

`MISTAKES` maps each to the test that fails under it. `FAULTS` maps each fault of tests/fault_injection.py to the test
that sees it detected. tests/test_mutations.py proves both; `python -m tests.mutations` writes docs/mistakes.md from
them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import numpy as np

from tests.conditions import fp32_orthogonal


@contextlib.contextmanager
def rms_per_shard() -> Iterator[None]:
    """Clip StableAdamW's update by the RMS of this rank's shard alone."""
    from megatron_ettin.optim import adamw

    bind = adamw.DecoupledAdamW.bind

    def bind_shards(self, slices, num_params, group):
        def as_whole(p, part):
            numel = max(1, p[part.elements].numel())
            return dataclasses.replace(part, param=dataclasses.replace(part.param, numel=numel, is_counted=True))

        bind(self, {p: [as_whole(p, part) for part in parts] for p, parts in slices.items()}, num_params, group=None)

    with mock.patch.object(adamw.DecoupledAdamW, "bind", bind_shards):
        yield


@contextlib.contextmanager
def no_data_parallel_reduction() -> Iterator[None]:
    """Let each data-parallel replica train on its own gradients."""
    from megatron.core.distributed import DistributedDataParallel

    def nothing(self, *_, **__):
        return None

    with (
        mock.patch.object(DistributedDataParallel, "start_grad_sync", nothing),
        mock.patch.object(DistributedDataParallel, "finish_grad_sync", nothing),
    ):
        yield


@contextlib.contextmanager
def no_tied_embedding_reduction() -> Iterator[None]:
    """Let the first and the last pipeline stage update their copies of the embedding from their own gradients."""
    # a function of the same name hides the module
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    with mock.patch.object(module, "_allreduce_word_embedding_grads", lambda *_, **__: None):
        yield


@contextlib.contextmanager
def orthogonal_per_shard() -> Iterator[None]:
    """Orthogonalize, in Muon, this rank's part of each matrix."""
    from megatron_ettin.optim import muon

    bind = muon.Muon.bind

    def bind_shards(self, slices, *arguments):
        def as_whole(part):
            if not isinstance(part.param, muon.Matrix):
                return part
            return dataclasses.replace(part, param=dataclasses.replace(part.param, partition_dim=None))

        bind(self, {p: [as_whole(part) for part in parts] for p, parts in slices.items()}, *arguments)

    # in fp32, as in `fp32_orthogonal`: rounding in bfloat16 would hide the mistake
    with mock.patch.object(muon.Muon, "bind", bind_shards), fp32_orthogonal():
        yield


@contextlib.contextmanager
def resumed_with_another_bit() -> Iterator[None]:
    """Flip a bit of the last rank's weights when a run resumes from a checkpoint."""
    import torch

    from megatron_ettin.train import resume

    real = resume.begin

    def begin(train_state, *arguments):
        progress, origin = real(train_state, *arguments)
        if progress.step and train_state.layout.rank == train_state.layout.topology.world - 1:
            weight = dict(train_state.model_chunks[-1].named_parameters())["transformer.final_layernorm.weight"]
            weight.data.view(torch.int32)[3] ^= 1
            train_state.optimizer.reload_master_weights()
        return progress, origin

    with mock.patch.object(resume, "begin", begin):
        yield


@contextlib.contextmanager
def latest_before_the_checkpoint() -> Iterator[None]:
    """Write `latest` before the checkpoint that it names is there."""
    from megatron_ettin.checkpoint import directory

    real = directory.seal_and_rename

    def seal_and_rename(staging, final, known=None):
        directory.write_atomically(final.parent / directory.LATEST, final.name + "\n")
        real(staging, final, known)

    with mock.patch.object(directory, "seal_and_rename", seal_and_rename):
        yield


@contextlib.contextmanager
def nothing_forced_to_the_disk() -> Iterator[None]:
    """Rename a checkpoint before any of its files is forced to the disk."""
    from megatron_ettin.base import files
    from megatron_ettin.checkpoint import integrity

    with (
        mock.patch.object(integrity, "fsync", lambda path: None),
        mock.patch.object(files, "fsync", lambda path: None),
    ):
        yield


@contextlib.contextmanager
def window_one_too_wide() -> Iterator[None]:
    """Let a local layer see one token more than its window."""
    from megatron_ettin.model import attention

    real = attention.allowed

    def wider(query, key, window, causal):
        return real(query, key, None if window is None else window + 1, causal)

    with mock.patch.object(attention, "allowed", wider):
        yield


@contextlib.contextmanager
def masks_seeded_by_the_rank() -> Iterator[None]:
    """Draw the masks of a row from a seed of the rank that reads it."""
    from megatron_ettin.batching.objectives import MaskingCollator

    real = MaskingCollator.__call__

    def masked(self, *arguments, **named):
        seed_key = self.seed_key ^ int(os.environ.get("RANK", "0"))
        return real(dataclasses.replace(self, seed_key=seed_key), *arguments, **named)

    with mock.patch.object(MaskingCollator, "__call__", masked):
        yield


@contextlib.contextmanager
def loss_mean_per_micro_batch() -> Iterator[None]:
    """Normalise the loss by each micro-batch's number of labels instead of the batch's."""
    from megatron_ettin.train import step

    real = step.loss_and_labels

    def mean(labels, total, *more, **named):
        _, count, report = real(labels, total, *more, **named)
        return total / max(labels, 1), count.clamp(max=1), report

    with mock.patch.object(step, "loss_and_labels", mean):
        yield


@contextlib.contextmanager
def resume_skips_a_batch() -> Iterator[None]:
    """Go on from a checkpoint with the batch after the one that is due."""
    from megatron_ettin.batching.host import HostBatches
    from megatron_ettin.train import resume

    real, make, resumed = resume.begin, HostBatches.make, False

    def begin(*arguments, **named):
        nonlocal resumed
        progress, origin = real(*arguments, **named)
        resumed = progress.step > 0
        return progress, origin

    def made(self, step, index):
        return make(self, step + resumed, index)

    with mock.patch.object(HostBatches, "make", made), mock.patch.object(resume, "begin", begin):
        yield


@contextlib.contextmanager
def swapped_query_and_key_in_exports() -> Iterator[None]:
    """Write a layer's keys as its queries, and its queries as its keys, to Hugging Face folders."""
    import torch

    from megatron_ettin.convert import rules

    real = rules.QKV.split

    def swapped(tensor, model, parts):
        query, key, value = real(tensor, model, 3)
        return list(torch.cat([key, query, value]).chunk(parts))

    # the rules are frozen dataclasses, so the table's entries are replaced
    object.__setattr__(rules.QKV, "split", swapped)
    try:
        yield
    finally:
        object.__setattr__(rules.QKV, "split", real)


@contextlib.contextmanager
def skips_are_ignored() -> Iterator[None]:
    """Train on the rows that `data.skip` leaves out."""
    from megatron_ettin.data.blended_dataset import BlendedDataset

    with mock.patch.object(BlendedDataset, "order_indices", lambda self, row_indices: np.array(row_indices, np.int64)):
        yield


MISTAKES: dict[str, str] = {
    "rms_per_shard": "tests/train/test_invariance.py"
    "::test_train_on_layout_matches_one_process[dp2 distributed optimizer-clm stable_adamw dropout]",
    "no_data_parallel_reduction": "tests/train/test_invariance.py"
    "::test_train_on_layout_matches_one_process[dp2-mlm stable_adamw dropout]",
    "no_tied_embedding_reduction": "tests/train/test_invariance.py"
    "::test_train_on_layout_matches_one_process[pp2-clm adamw dropout]",
    "masks_seeded_by_the_rank": "tests/train/test_invariance.py"
    "::test_train_on_layout_matches_one_process[dp2-mlm stable_adamw dropout]",
    "loss_mean_per_micro_batch": "tests/train/test_invariance.py"
    "::test_train_on_layout_matches_one_process[micro-batch 1-mlm stable_adamw dropout]",
    "orthogonal_per_shard": "tests/train/test_invariance.py::test_muon_on_layout_matches_one_process[tp2-clm muon]",
    "window_one_too_wide": "tests/model/test_model.py::test_logits_padded_and_packed_match_transformers[17m-mlm]",
    "resume_skips_a_batch": "tests/train/test_resume.py::test_resume_on_same_layout_is_bit_identical[1-stable_adamw]",
    "resumed_with_another_bit": "tests/train/test_resume.py"
    "::test_resume_on_same_layout_is_bit_identical[1-stable_adamw]",
    "swapped_query_and_key_in_exports": "tests/convert/test_round_trip.py::test_round_trip_keeps_bits_and_logits[mlm]",
    "skips_are_ignored": "tests/runs/test_rollback.py::test_data_skip_after_from_step_leaves_out_rows",
    "latest_before_the_checkpoint": "tests/checkpoint/test_directory.py"
    "::test_publish_fsyncs_checkpoint_before_updating_latest[next step]",
    "nothing_forced_to_the_disk": "tests/checkpoint/test_directory.py"
    "::test_publish_fsyncs_checkpoint_before_updating_latest[next step]",
}
FAULTS: dict[str, str] = {
    "edited_code_on_rank_1": "tests/faults/test_consistency.py"
    "::test_train_edited_code_on_one_rank_is_refused_on_all_ranks",
    "nan_gradients_in_step_3": "tests/faults/test_skipped_steps.py"
    "::test_nonfinite_gradient_step_is_skipped_without_changing_weights[]",
    "flipped_weight_on_rank_1": "tests/faults/test_consistency.py::test_replica_check_names_rank_with_flipped_weight",
    "flipped_tied_weight_on_last_stage": "tests/faults/test_consistency.py"
    "::test_replica_check_compares_both_copies_of_tied_embedding",
    "unsound_layer_on_rank_1": "tests/faults/test_consistency.py"
    "::test_replay_check_names_rank_with_irreproducible_output",
    "reading_stops_on_rank_1": "tests/faults/test_watchdog.py::test_watchdog_rank_stuck_reading_data_is_named",
    "c_code_on_rank_1": "tests/faults/test_watchdog.py::test_watchdog_rank_stuck_in_c_code_is_named",
    "slow_rank_1": "tests/faults/test_watchdog.py::test_straggler_slow_rank_is_named_in_metrics_and_status",
    "disk_full_while_writing": "tests/train/test_saving.py"
    "::test_save_disk_filled_while_writing_keeps_previous_checkpoint",
    "no_locks": "tests/runs/test_launches.py::test_train_on_a_file_system_without_locks_warns_and_trains",
    "copies_change_a_byte": "tests/checkpoint/test_writer.py::test_staging_copy_that_differs_is_refused",
    "doctor_of_other_code_on_rank_1": "tests/doctor/test_ranks.py::test_doctor_ranks_agree_or_name_the_differing_rank",
    "memory_ends_on_rank_1": "tests/bench/test_bench.py::test_bench_out_of_memory_on_one_rank_continues_the_sweep",
}


PAGE = Path(__file__).resolve().parents[1] / "docs" / "mistakes.md"
INTRODUCTION = """\
# Mistakes that the tests catch

Each entry of the first list is a mistake that was made on purpose in the code of the package, and a test
of the first tier (`bash tests/run.sh`) that fails under it. Each entry of the second is a fault of a host,
and the test that sees the package detect it or survive it; without the fault that test fails.
`tests/test_mutations.py` proves every entry in `bash tests/run.sh --all`. `python -m tests.mutations` writes
this page.
"""


def page() -> str:
    """Return docs/mistakes.md."""
    parts = [INTRODUCTION]
    for title, table in (("Mistakes", MISTAKES), ("Faults", FAULTS)):
        parts.append(f"## {title}\n")
        for name, test in sorted(table.items()):
            file, _, function = test.partition("::")
            parts.append(_wrapped(f"- `{name}`: {first_sentence(name)}. Caught by `{file}`:") + f"\n  `{function}`")
        parts.append("")
    return "\n".join(parts)


def _wrapped(text: str) -> str:
    """Return an item of a Markdown list in lines of at most 106 characters."""
    return textwrap.fill(text, 106, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def first_sentence(name: str) -> str:
    """Return the first sentence of a mistake's docstring, without its full stop."""
    text = " ".join((inspect.getdoc(find(name)) or "").split())
    return text.partition(". ")[0].rstrip(".")


def find(name: str) -> Callable[[], AbstractContextManager[None]]:
    """Return the mistake, fault or condition of this name."""
    for module in ("mutations", "fault_injection", "conditions"):
        function = getattr(importlib.import_module(f"tests.{module}"), name, None)
        if function is not None:
            return function
    raise KeyError(name)


if __name__ == "__main__":
    # imports the module by its name, because the tables hold functions of that module
    from tests.mutations import page as imported_page

    PAGE.write_text(imported_page())
