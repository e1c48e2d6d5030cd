"""What runs a call of `ettin train` asks for: one, the phases of a chain, or the members of a sweep."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.runs.history import CHAIN, last_phase, phases_in

if TYPE_CHECKING:
    from megatron_ettin.config.overrides import Member
    from megatron_ettin.config.schema import Config

BEFORE = {"extend": "pretrain", "decay": "extend"}  # what a phase of the recipe goes on from


@dataclass(frozen=True)
class Stage:
    """One phase of a job. `kept`: keys of `model` that come with the weights it begins from; `words`: its own."""

    config: Config
    run_dir: Path
    init_from: Path | None
    kept: dict[str, Any]
    words: list[str]
    begun: Config | None = None
    """The run's recorded configuration; None before its first launch."""
    given: frozenset[str] = frozenset()
    """`group.key` of all that the user sets."""

    @property
    def free(self) -> frozenset[str]:
        """Keys of the schedule that follow the run's length."""
        from megatron_ettin.config.resolve import SPAN

        return frozenset() if self.begun is not None else frozenset(SPAN) - self.given

    @property
    def planned(self) -> Config:
        """The configuration with the schedule that it has for `run.steps`, as far as that is known without the data."""
        from megatron_ettin.plan.schedule_end import expected_row_tokens, fit_schedule

        return fit_schedule(self.config, self.free, expected_row_tokens(self.config))


def begun_with(run_dir: Path) -> Config | None:
    """Return the configuration that a run directory records, None where no run has begun in it. Raises UserError."""
    from megatron_ettin.config.resolve import from_yaml

    path = run_dir / "config.yaml"
    return from_yaml(path) if path.exists() else None


def weights_model(run_dir: Path, init_from: Path | None) -> dict[str, Any]:
    """Keys of `model` that come with the weights which the run began from: as its first launch recorded them, so that a
    run resumes without them too, or as `init_from` has them. Raises UserError where there are no such weights."""
    from megatron_ettin.runs.history import first_launch

    first = first_launch(run_dir)
    if first is not None:
        return dict(first.get("model_of_weights") or {})
    if init_from is None:
        return {}
    from megatron_ettin.config.resolve import inherited

    return inherited(weights_config(init_from))


def weights_config(init_from: Path) -> dict[str, Any]:
    """The groups of the config that lies with weights. Raises UserError where there are none."""
    from megatron_ettin.checkpoint.directory import read_config, resolve
    from megatron_ettin.convert.from_hf import groups_of, is_hf_folder

    return groups_of(init_from) if is_hf_folder(init_from) else read_config(resolve(init_from))


def stages_of(args: argparse.Namespace) -> list[Stage]:
    """The phases asked for, resolved and checked. Raises UserError."""
    from megatron_ettin.config.resolve import given_by_user, inherited, parse

    run_dir, words = args.run_dir, args.words
    if args.init_from is not None:
        args.init_from = last_phase(args.init_from)
    if args.sweep:
        return [stage for member in chosen_members(args) for stage in member_stages(args, member)]
    if args.phase != "all":
        check_begin(args)
        kept, begun = weights_model(run_dir, args.init_from), begun_with(run_dir)
        config = parse(args.size, args.objective, args.phase, args.config, words, kept, begun)
        given = given_by_user(args.config, words, args.phase)
        return [Stage(config, run_dir, args.init_from, kept, words, begun, given)]
    stages: list[Stage] = []
    for phase in CHAIN:
        own = run_dir / phase
        begun = begun_with(own)
        kept = inherited(dataclasses.asdict(stages[-1].config)) if stages else weights_model(own, args.init_from)
        config = parse(args.size, args.objective, phase, args.config, words, kept, begun)
        source, given = stages[-1].run_dir if stages else args.init_from, given_by_user(args.config, words, phase)
        stages.append(Stage(config, own, source, kept, words, begun, given))
    return stages


def check_begin(args: argparse.Namespace) -> None:
    """Raise UserError for a phase in a chain's folder, beside its phases, and for cross-training of no weights."""
    from megatron_ettin.base.errors import UserError
    from megatron_ettin.checkpoint.directory import list_checkpoints

    if phases := phases_in(args.run_dir):
        names = ", ".join(one.name for one in phases)
        own = args.run_dir / args.phase
        raise UserError(f"--run-dir {args.run_dir}: holds the phases {names}; say --run-dir {own}, or --phase all")
    if args.phase == "cross" and args.init_from is None and not args.explain and not list_checkpoints(args.run_dir):
        raise UserError(
            "--phase cross: trains on weights of the other objective; name them with --init-from RUN|CHECKPOINT|HF_DIR"
        )


def chosen_members(args: argparse.Namespace) -> list[Member]:
    """Those of the sweep that this job runs. Raises UserError."""
    from megatron_ettin.base.errors import UserError
    from megatron_ettin.config.overrides import members

    if args.phase == "all" or args.from_step is not None:
        raise UserError(f"--sweep: does not go with {'--phase all' if args.phase == 'all' else '--from-step'}")
    found = members(args.sweep)
    if args.sweep_member is None:
        return found
    if not 0 <= args.sweep_member < len(found):
        raise UserError(f"--sweep-member {args.sweep_member}: the sweep has runs 0 to {len(found) - 1}")
    return [found[args.sweep_member]]


def member_stages(args: argparse.Namespace, member: Member) -> list[Stage]:
    """The one run of a member, by the rules of a run alone."""
    names = {name: member.values.get(name, getattr(args, name)) for name in ("size", "objective")}
    own = {"run_dir": args.run_dir / member.name, "words": [*args.words, *member.overrides], "sweep": []}
    return stages_of(argparse.Namespace(**{**vars(args), **names, **own}))


def reference_rate_line(stage: Stage) -> str | None:
    """Say that weight decay keeps its reference where a run goes on with another learning rate; None elsewhere."""
    if stage.begun is None or stage.begun.optim.lr == stage.config.optim.lr:
        return None
    before, now = stage.begun.optim, stage.config.optim
    reference = now.weight_decay_reference_lr
    if before.weight_decay_reference_lr != reference:
        return None
    return (
        f"optim.lr {before.lr:g} -> {now.lr:g}; optim.weight_decay_reference_lr stays {reference:g}, so weights decay"
        f" by {now.lr / before.lr:.3g} of what they did"
    )


def chain_warning(stage: Stage) -> str | None:
    """Where a phase does not go on from the one that the recipe has before it."""
    from megatron_ettin.runs.history import first_launch

    phase = stage.config.run.phase
    if first_launch(stage.run_dir) is not None:
        return None
    if phase == "cross" and stage.init_from is not None:
        source = (weights_config(stage.init_from).get("run") or {}).get("objective")
        if source == stage.config.run.objective:
            return f"note: cross goes on from weights of the same objective, {source}: a control, no cross-training"
    if phase not in BEFORE:
        return None
    if stage.init_from is None:
        return f"warning: {phase} begins from initial weights; the recipe goes on from {BEFORE[phase]} (--init-from)"
    found = (weights_config(stage.init_from).get("run") or {}).get("phase")
    if found in (BEFORE[phase], None):
        return None
    return f"warning: {phase} begins from {found}; the recipe goes on from {BEFORE[phase]}"
