"""Run the `ettin` console script: find the command's module, parse its options, run it.

Only the module of the given command is imported, so that `ettin --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ettin.base import log
from megatron_ettin.base.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, RankError, UserError, nearest
from megatron_ettin.cli.parsing import OneLineParser, parse_arguments
from megatron_ettin.parallel.env import is_launched
from megatron_ettin.parallel.failure_report import exit_with_parent, record_failure

# command -> (module under megatron_ettin.cli, one line for `ettin --help`)
COMMANDS = {
    "prepare": ("prepare", "turn text into an indexed, tokenized dataset"),
    "inspect": ("inspect", "show what a dataset, checkpoint or run holds; --verify checks every checksum"),
    "train": ("train", "train an encoder or a decoder; resumes by itself"),
    "bench": ("bench", "measure how fast a run trains here, over layouts, precisions, micro-batches"),
    "plan": ("plan", "rank layouts of N GPUs by predicted speed, with memory and a phase's cost"),
    "launch": ("launch", "write a run's sbatch script, and submit it"),
    "status": ("status", "show queue state, step, speed, time left and restarts of jobs and runs"),
    "eval": ("eval", "compute the validation loss of a run or checkpoint on a dataset"),
    "compare": ("compare", "prove that runs are a pair and draw their curves"),
    "doctor": ("doctor", "check whether this machine is fit to train; what is missing and what that costs"),
    "report": ("report", "write one page of a run or a pair: curves, data, restarts, checkpoints; --watch"),
    "order": ("order", "list which documents each step used or will use"),
    "convert": ("convert", "convert checkpoints to and from Hugging Face folders"),
    "release": ("release", "export every checkpoint of a run as revisions of a Hugging Face repository"),
    "completion": ("completion", "print the completion script for bash, zsh or fish"),
}


def help_text() -> str:
    """Return the text of `ettin --help`."""
    rows = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: ettin COMMAND [options]\n\n"
        "Pre-training of paired encoders and decoders on Megatron-Core.\n\n"
        f"commands:\n{rows}\n\n"
        "`ettin COMMAND --help` shows the options and an example. `ettin --version` shows the version.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 failed, 2 a user error, 75 saved and to be requeued."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    trains = name == "train"
    log.open_standard_files()
    if name in ("train", "bench") and is_launched():
        exit_with_parent()
    try:
        run, arguments = find_command(name, rest)
        status = int(run(arguments) or 0)
        if trains:
            log.flush()
        else:
            # a closed pipe then raises in this block and not at the interpreter's exit
            sys.stdout.flush()
        return status
    except UserError as error:
        record_failure(error, "user")
        local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        # all ranks of a host meet most errors, so only the first of them prints
        if isinstance(error, RankError) or local_rank == "0":
            log.log_warning(f"ettin {name}: {error}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        log.log_warning(f"ettin {name}: interrupted")
        return EXIT_INTERRUPTED
    # argparse raises SystemExit after it has printed --help
    except (Exception, SystemExit) as error:
        # `ettin order | head` is not an error; any other broken pipe is
        if isinstance(error, BrokenPipeError) and log.output_has_no_reader():
            return 0
        prints = isinstance(error, OSError) and error.filename is None and not trains
        if (prints or isinstance(error, SystemExit)) and (why := log.output_failure()):
            log.log_warning(f"ettin {name}: standard output cannot be written ({why})")
            return EXIT_FAILURE
        if not isinstance(error, SystemExit):
            record_failure(error)
        raise
    finally:
        log.drop_unwritten()


def find_command(name: str, rest: list[str]) -> tuple[Callable[[Any], int | None], Any]:
    """Return the function that runs a command, and its argument, mostly the parsed options. Raises UserError."""
    if name in ("-h", "--help"):
        return print, help_text().removesuffix("\n")
    if name in ("-V", "--version"):
        from megatron_ettin.base.versions import version_text

        return print, version_text()
    if name == "__complete":
        # called by the scripts that `ettin completion` prints
        from megatron_ettin.cli.completion import print_offers

        return print_offers, rest
    if name not in COMMANDS:
        hint = nearest(name, [*COMMANDS, "--help", "--version"])
        raise UserError(f"no command {name!r}{hint}; commands: {', '.join(COMMANDS)}")
    # Megatron-Core and torch warn on every rank of missing optional packages and of deprecations in their own code
    warnings.filterwarnings("ignore", module=r"(megatron\.|torch\.|transformers\.|megatron_ettin\.platform\.cpu)")
    module = importlib.import_module(f"megatron_ettin.cli.{COMMANDS[name][0]}")
    parser = OneLineParser(
        prog=f"ettin {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    return module.run, parse_arguments(parser, name, rest)
