"""The `ettin` console script: finds the command's module and runs it. Only the command asked for is imported,
so that `ettin --help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from megatron_ettin.base import log
from megatron_ettin.base.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, RankError, UserError, nearest
from megatron_ettin.cli.parsing import OneLineParser, parse_overrides
from megatron_ettin.parallel.env import is_launched
from megatron_ettin.parallel.failure_report import exit_with_parent, record_failure

# command -> (module under megatron_ettin.cli, one line for `ettin --help`)
COMMANDS = {
    "prepare": ("prepare", "text -> an indexed, tokenized dataset"),
    "inspect": ("inspect", "what a dataset, checkpoint or run holds; --verify checks every checksum"),
    "train": ("train", "train an encoder or a decoder; resumes by itself"),
    "bench": ("bench", "how fast a run trains here, over layouts, precisions, micro-batches"),
    "plan": ("plan", "layouts of N GPUs ranked by predicted speed, their memory, a phase's cost"),
    "launch": ("launch", "write a run's sbatch script, and submit it"),
    "status": ("status", "queue state, step, speed, time left, restarts of jobs and runs"),
    "eval": ("eval", "validation loss of a run or checkpoint on a dataset"),
    "compare": ("compare", "prove that runs are a pair and draw their curves"),
    "doctor": ("doctor", "is this machine fit to train; what is missing and what that costs"),
    "report": ("report", "one page of a run or a pair: curves, data, restarts, checkpoints; --watch"),
    "order": ("order", "which documents each step used or will use"),
    "convert": ("convert", "to and from Hugging Face folders"),
    "release": ("release", "every checkpoint of a run as revisions of a Hugging Face repository"),
    "completion": ("completion", "completion for bash, zsh and fish"),
}


def help_text() -> str:
    rows = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: ettin COMMAND [options]\n\n"
        "Pre-training of paired encoders and decoders on Megatron-Core.\n\n"
        f"commands:\n{rows}\n\n"
        "`ettin COMMAND --help` shows the options and an example. `ettin --version` shows the version.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 the user's mistake, 75 saved and wants requeueing)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    log.open_standard_files()
    if arguments[:1] in (["train"], ["bench"]) and is_launched():
        exit_with_parent()
    try:
        return _status_of(arguments)
    finally:
        log.drop_unwritten()


def _status_of(arguments: list[str]) -> int:
    """Run one command and tell of how it failed; the exit status."""
    try:
        status = dispatch(arguments)
        if arguments[:1] == ["train"]:
            log.flush()
        else:
            # here, so that a closed pipe is met below and not at the interpreter's exit
            sys.stdout.flush()
        return status
    except UserError as error:
        record_failure(error, "user")
        local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        if isinstance(error, RankError) or local_rank == "0":  # one line a machine, not a rank
            log.log_warning(f"ettin {arguments[0]}: {error}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        log.log_warning(f"ettin {arguments[0]}: interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        # `ettin order | head` is no error; any other pipe that broke is
        if isinstance(error, BrokenPipeError) and log.output_has_no_reader():
            return 0
        printing = isinstance(error, OSError) and error.filename is None and arguments[:1] != ["train"]
        if printing and (why := log.output_failure()):
            return _output_lost(arguments, why)
        record_failure(error)
        raise
    except SystemExit:  # of a command's --help
        if why := log.output_failure():
            return _output_lost(arguments, why)
        raise


def _output_lost(arguments: list[str], why: str) -> int:
    log.log_warning(f"ettin {arguments[0]}: standard output cannot be written ({why})")
    return EXIT_FAILURE


def dispatch(arguments: list[str]) -> int:
    """Find the command's module, parse its options, run it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        from megatron_ettin.base.versions import version_text

        print(version_text())
        return 0
    if arguments[0] == "__complete":  # of the scripts that `ettin completion` prints
        from megatron_ettin.cli.completion import print_offers

        return print_offers(arguments[1:])
    name, rest = arguments[0], arguments[1:]
    # core and torch warn at length, on every rank, of packages that are optional and of their own deprecations
    warnings.filterwarnings("ignore", module=r"(megatron\.|torch\.|transformers\.|megatron_ettin\.platform\.cpu)")
    if name not in COMMANDS:
        hint = nearest(name, [*COMMANDS, "--help", "--version"])
        raise UserError(f"no command {name!r}{hint}; commands: {', '.join(COMMANDS)}")
    module = importlib.import_module(f"megatron_ettin.cli.{COMMANDS[name][0]}")
    parser = OneLineParser(
        prog=f"ettin {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    return int(module.run(parse_overrides(parser, name, rest)) or 0)
