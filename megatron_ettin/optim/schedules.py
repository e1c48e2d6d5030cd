"""Learning-rate schedules as pure functions of tokens: what fraction of `optim.lr` a step uses.

Tokens are the global non-padding tokens trained on before the step, as in the original trainer (its time base), so the
first step under a warm-up uses 1e-10. Source: the Ettin fork's src/scheduler.py (see docs/decisions.md)."""

from __future__ import annotations

import math

from megatron_ettin.config.schema import ScheduleConfig

FLOOR = 1e-10  # where the linear warm-up begins


def warmup(tokens: float, warmup_tokens: int) -> float:
    """Linear from 1e-10 to 1 over `warmup_tokens`, 1 afterwards."""
    return 1.0 if tokens >= warmup_tokens else FLOOR + (1 - FLOOR) * tokens / warmup_tokens


def wsd(tokens: float, schedule: ScheduleConfig, total_tokens: int) -> float:
    """Warm-up, stable, linear decay to final_lr_fraction over the last `decay_tokens` of `total_tokens`."""
    if tokens < schedule.warmup_tokens:
        return warmup(tokens, schedule.warmup_tokens)
    begin = total_tokens - schedule.decay_tokens
    if schedule.decay_tokens == 0 or tokens <= begin:
        return 1.0
    done = min((tokens - begin) / schedule.decay_tokens, 1.0)
    return 1 - done * (1 - schedule.final_lr_fraction)


def one_minus_sqrt(tokens: float, schedule: ScheduleConfig, total_tokens: int) -> float:
    """f + (1 - f)(1 - sqrt(t / decay_tokens)), no lower than f = final_lr_fraction."""
    done = min(tokens / schedule.decay_tokens, 1.0)
    final = schedule.final_lr_fraction
    return warmup(tokens, schedule.warmup_tokens) * (final + (1 - final) * (1 - math.sqrt(done)))


def constant(tokens: float, schedule: ScheduleConfig, total_tokens: int) -> float:
    """1 after the warm-up."""
    return warmup(tokens, schedule.warmup_tokens)


SCHEDULES = {"wsd": wsd, "one_minus_sqrt": one_minus_sqrt, "constant": constant}


def lr_fraction(tokens: float, schedule: ScheduleConfig, total_tokens: int) -> float:
    """Fraction of the learning rate for the step that begins after `tokens`."""
    return SCHEDULES[schedule.name](tokens, schedule, total_tokens)
