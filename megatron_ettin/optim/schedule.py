"""Define learning-rate schedules: the fraction of `optim.lr` that a step uses, as a pure function of tokens.

Tokens are the global non-padding tokens trained on before the step, as in the original trainer, so the first step of a
warm-up uses 1e-10. Source: the Ettin fork's src/scheduler.py (see docs/decisions.md).
"""

from __future__ import annotations

import math

from megatron_ettin.config.schema import ScheduleConfig

# fraction at which the linear warm-up begins
FLOOR = 1e-10


def warmup(tokens: float, warmup_tokens: int) -> float:
    """Return the warm-up factor: linear from 1e-10 to 1 over `warmup_tokens`, 1 afterwards."""
    return 1.0 if tokens >= warmup_tokens else FLOOR + (1 - FLOOR) * tokens / warmup_tokens


def wsd(tokens: float, schedule: ScheduleConfig, end_tokens: int) -> float:
    """Warm up, hold, then decay linearly to final_lr_fraction over the last `decay_tokens` before `end_tokens`."""
    if tokens < schedule.warmup_tokens:
        return warmup(tokens, schedule.warmup_tokens)
    return 1 - decayed(tokens, schedule, end_tokens) * (1 - schedule.final_lr_fraction)


def one_minus_sqrt(tokens: float, schedule: ScheduleConfig, end_tokens: int) -> float:
    """Warm up, hold, then decay as f + (1 - f)(1 - sqrt(x)), with f = final_lr_fraction.

    x goes from 0 to 1 over the last `decay_tokens` before `end_tokens`, and stays at 1 after it.
    """
    final = schedule.final_lr_fraction
    done = decayed(tokens, schedule, end_tokens)
    return warmup(tokens, schedule.warmup_tokens) * (final + (1 - final) * (1 - math.sqrt(done)))


def constant(tokens: float, schedule: ScheduleConfig, end_tokens: int) -> float:
    """Warm up, then hold."""
    return warmup(tokens, schedule.warmup_tokens)


SCHEDULES = {"wsd": wsd, "one_minus_sqrt": one_minus_sqrt, "constant": constant}


def decayed(tokens: float, schedule: ScheduleConfig, end_tokens: int) -> float:
    """Return the part of the decay that is done at `tokens`: 0 until it begins, 1 from `end_tokens` on."""
    begin = end_tokens - schedule.decay_tokens
    if schedule.decay_tokens == 0 or tokens <= begin:
        return 0.0
    return min((tokens - begin) / schedule.decay_tokens, 1.0)


def lr_fraction(tokens: float, schedule: ScheduleConfig, run_tokens: int) -> float:
    """Return the fraction of the learning rate for the step that begins after `tokens`.

    Args:
        tokens: global non-padding tokens trained on before the step.
        schedule: the schedule.
        run_tokens: `run.tokens`, where the decay ends unless `schedule.end_tokens` says otherwise.
    """
    return SCHEDULES[schedule.name](tokens, schedule, schedule.end_tokens or run_tokens)
