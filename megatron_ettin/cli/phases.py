"""Resolve the runs of an `ettin train` command: one phase, the phases of a chain, or the members of a sweep."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.base.errors import UserError

if TYPE_CHECKING:
    from megatron_ettin.config.overrides import Member
    from megatron_ettin.config.schema import Config

# phase -> the phase of the recipe that it continues
PREVIOUS = {"extend": "pretrain", "decay": "extend"}


@dataclass(frozen=True)
class PlannedPhase:
    """One phase of one run, resolved and checked."""

    config: Config
    run_dir: Path
    init_from: Path | None
    kept: dict[str, Any]
    """Keys of `model` that come with the weights from which the phase begins, and their values."""
    overrides: list[str]
    """Its `group.key=value` overrides."""
    begun: Config | None = None
    """The run's recorded configuration; None before its first launch."""
    given: frozenset[str] = frozenset()
    """`group.key` of everything that the user's config and overrides set."""

    @property
    def free(self) -> frozenset[str]:
        """Keys of the schedule that follow the run's length."""
        from megatron_ettin.config.resolve import SPAN

        return frozenset() if self.begun is not None else frozenset(SPAN) - self.given

    @property
    def planned(self) -> Config:
        """The configuration with its schedule fitted to `run.steps`, by the expected tokens of a row."""
        from megatron_ettin.plan.schedule_end import expected_row_tokens, fit_schedule

        return fit_schedule(self.config, self.free, expected_row_tokens(self.config.data))


def model_of_weights(run_dir: Path, init_from: Path | None) -> dict[str, Any]:
    """Return the keys of `model`, with values, that come with the weights from which the run begins.

    A run that has begun has them from the record of its first launch, so that it resumes without the weights too. A new
    run has them from `init_from`; empty if that is None.

    Raises:
        UserError: `init_from` holds no weights.
    """
    from megatron_ettin.runs.directory import RunDirectory

    first = RunDirectory(run_dir).first_launch
    if first is not None:
        return dict(first.get("model_of_weights") or {})
    if init_from is None:
        return {}
    from megatron_ettin.config.resolve import inherited

    return inherited(config_of_weights(init_from))


def config_of_weights(init_from: Path) -> dict[str, Any]:
    """Return the groups of the configuration stored with weights. Raises UserError if there are no weights."""
    from megatron_ettin.checkpoint.directory import read_config, resolve
    from megatron_ettin.convert.from_hf import is_hf_folder, model_group

    return model_group(init_from) if is_hf_folder(init_from) else read_config(resolve(init_from))


def plan_phases(args: argparse.Namespace) -> list[PlannedPhase]:
    """Return the phases to train, resolved and checked, from the completed options. Raises UserError."""
    from megatron_ettin.config.overrides import given_by_user
    from megatron_ettin.config.resolve import Start, inherited, parse
    from megatron_ettin.runs.directory import CHAIN, RunDirectory, last_phase

    run_dir, overrides = args.run_dir, args.overrides
    if args.init_from is not None:
        args.init_from = last_phase(args.init_from)
    if args.sweep:
        return [phase for member in chosen_members(args) for phase in member_phases(args, member)]
    if args.phase != "all":
        check_weights(args)
    planned: list[PlannedPhase] = []
    for phase in CHAIN if args.phase == "all" else [args.phase]:
        phase_dir = run_dir / phase if args.phase == "all" else run_dir
        begun = RunDirectory(phase_dir).recorded_config
        if planned:
            kept = inherited(dataclasses.asdict(planned[-1].config))
        else:
            kept = model_of_weights(phase_dir, args.init_from)
        config = parse(args.size, args.objective, phase, args.config, overrides, Start(kept, begun))
        source = planned[-1].run_dir if planned else args.init_from
        given = given_by_user(args.config, overrides, phase)
        planned.append(PlannedPhase(config, phase_dir, source, kept, overrides, begun, given))
    return planned


def check_weights(args: argparse.Namespace) -> None:
    """Raise UserError if --run-dir is a folder of phases, or if --phase cross has no weights to begin from."""
    from megatron_ettin.checkpoint.directory import list_checkpoints
    from megatron_ettin.runs.directory import phases_in

    if phases := phases_in(args.run_dir):
        names = ", ".join(one.name for one in phases)
        own = args.run_dir / args.phase
        raise UserError(f"--run-dir {args.run_dir}: holds the phases {names}; give --run-dir {own}, or --phase all")
    if args.phase == "cross" and args.init_from is None and not args.explain and not list_checkpoints(args.run_dir):
        raise UserError(
            "--phase cross: trains on weights of the other objective; name them with --init-from RUN|CHECKPOINT|HF_DIR"
        )


def chosen_members(args: argparse.Namespace) -> list[Member]:
    """Return the sweep's members that this job runs. Raises UserError."""
    from megatron_ettin.config.overrides import members

    if args.phase == "all" or args.from_step is not None:
        other = "--phase all" if args.phase == "all" else "--from-step"
        raise UserError(f"--sweep: cannot be combined with {other}; leave one out")
    sweep = members(args.sweep)
    if args.sweep_member is None:
        return sweep
    if not 0 <= args.sweep_member < len(sweep):
        raise UserError(f"--sweep-member {args.sweep_member}: the sweep has runs 0 to {len(sweep) - 1}")
    return [sweep[args.sweep_member]]


def member_phases(args: argparse.Namespace, member: Member) -> list[PlannedPhase]:
    """Return the phase of a member of a sweep, resolved as a single run is."""
    names = {name: member.values.get(name, getattr(args, name)) for name in ("size", "objective")}
    own = {"run_dir": args.run_dir / member.name, "overrides": [*args.overrides, *member.overrides], "sweep": []}
    return plan_phases(argparse.Namespace(**{**vars(args), **names, **own}))


def reference_rate_line(phase: PlannedPhase) -> str | None:
    """Return a line if a resumed run has another learning rate and its weight decay keeps the reference, else None."""
    if phase.begun is None or phase.begun.optim.lr == phase.config.optim.lr:
        return None
    before, now = phase.begun.optim, phase.config.optim
    reference = now.weight_decay_reference_lr
    if before.weight_decay_reference_lr != reference:
        return None
    return (
        f"optim.lr {before.lr:g} -> {now.lr:g}; optim.weight_decay_reference_lr stays {reference:g}, so weights decay"
        f" by {now.lr / before.lr:.3g} of what they did"
    )


def chain_warning(phase: PlannedPhase) -> str | None:
    """Return a warning if a new run does not continue the phase that the recipe has before it, else None.

    For cross-training it is a note if the weights were trained with the same objective.
    """
    from megatron_ettin.runs.directory import RunDirectory

    name = phase.config.run.phase
    if RunDirectory(phase.run_dir).first_launch is not None:
        return None
    if name == "cross" and phase.init_from is not None:
        source = (config_of_weights(phase.init_from).get("run") or {}).get("objective")
        if source == phase.config.run.objective:
            return f"note: cross continues weights of the same objective, {source}: a control, no cross-training"
    if name not in PREVIOUS:
        return None
    if phase.init_from is None:
        return f"warning: {name} begins from initial weights; the recipe continues {PREVIOUS[name]} (--init-from)"
    source = (config_of_weights(phase.init_from).get("run") or {}).get("phase")
    if source in (PREVIOUS[name], None):
        return None
    return f"warning: {name} begins from {source}; the recipe continues {PREVIOUS[name]}"
