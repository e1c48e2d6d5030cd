"""List the science keys, which must not change within a run directory because they decide what is learned."""

from __future__ import annotations

from collections.abc import Callable

from megatron_ettin.config.schema import Config, all_keys


def _decays_to_the_end(config: Config) -> bool:
    schedule = config.schedule
    return schedule.name != "constant" and schedule.decay_tokens > 0 and schedule.end_tokens is None


# keys that are science keys in some runs only
CONDITIONS: dict[str, Callable[[Config], bool]] = {
    # the decay ends there
    "run.tokens": _decays_to_the_end,
    # a mean of micro-batches' means depends on what is in one
    "batch.micro_batch_rows": lambda config: config.batch.loss_normalization == "microbatch",
    "data.order": lambda config: True,
}
# these decide which updates are made
GUARD_KEYS = tuple(name for name, key in all_keys().items() if name.startswith("resilience.") and key.science)


def science_keys(config: Config) -> dict[str, object]:
    """Return the keys that must not change within a run directory, flat; operations keys (layout, sinks) may."""
    names = [
        name for name, key in all_keys().items() if key.science is True or (key.science and CONDITIONS[name](config))
    ]
    values = {name: config.value(name) for name in names}
    # a recorded order is fixed by the fingerprint of its content, not by the path of its files
    values["data.order"] = "keyed" if config.data.order == "keyed" else "given"
    return values
