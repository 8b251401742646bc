"""The command `flashgen`: commands load when they are named, errors become exit codes.

0 done; 1 the work failed; 2 wrong usage (unknown names of presets, targets, backends and options included); 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import Any

import click

from flashgen import __version__
from flashgen.cli.output import Group, print_error, wants_json
from flashgen.errors import FlashgenError, InvalidProblemError

# command -> (module below flashgen.cli, one line for --help); the help must not import torch.
_COMMANDS = {
    "doctor": ("doctor", "Versions, GPUs, database, and which backends work here."),
    "quickstart": ("quickstart", "The whole chain on this machine, on a real model."),
    "tune": ("tune", "Search the best configuration and store every trial."),
    "bench": ("bench", "Time flashgen beside its peers."),
    "check": ("check", "Accuracy of the generated kernels against the fp64 reference."),
    "render": ("render", "Print the kernel source of a spec."),
    "show": ("show", "Variants, targets, presets, spaces, portfolios, plans."),
    "export": ("export", "Write a kernel that works without flashgen."),
    "memory": ("memory", "Activation memory and HBM traffic of a model's attention, against materialised."),
    "report": ("report", "One HTML file: tuning results, accuracy, memory."),
    "db": ("db", "The tuning database."),
}


class LazyGroup(Group):
    """Imports a command's module when the command is named, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"flashgen.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flashgen")
@click.option("--debug", is_flag=True, help="Show the traceback of an error; may stand anywhere.")
def cli(debug: bool) -> None:
    """Exact attention kernels, generated and tuned for your GPU.

    Every command takes --json: one JSON document on stdout and nothing else.
    """


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    as_json, debug = wants_json(arguments), "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        value: Any = cli.main(args=arguments, prog_name="flashgen", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        print_error(_usage(error), "UsageError", as_json=as_json, hint=_hint(error))
        return 2
    except (click.Abort, KeyboardInterrupt):
        print_error("interrupted", "KeyboardInterrupt", as_json=as_json)
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FlashgenError as error:
        if debug:
            traceback.print_exc()
        print_error(
            str(error),
            type(error).__name__,
            as_json=as_json,
            reasons=getattr(error, "reasons", None) or getattr(error, "causes", None),
        )
        return 2 if isinstance(error, InvalidProblemError) else 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print_error(
            f"{type(error).__name__}: {error} (a bug: --debug shows where)", type(error).__name__, as_json=as_json
        )
        return 1
    return value if isinstance(value, int) else 0


def _usage(error: click.UsageError) -> str:
    """Click's message; where a name is not known or missing, with the names that are allowed."""
    message = error.format_message()
    if error.ctx is None:
        return message
    command = error.ctx.command
    if isinstance(error, click.exceptions.NoArgsIsHelpError) and isinstance(command, click.Group):
        return f"name a command of {error.ctx.command_path}: {', '.join(command.list_commands(error.ctx))}."
    if isinstance(error, click.NoSuchOption):
        names = [name for option in command.get_params(error.ctx) for name in option.opts if name.startswith("--")]
        return f"{message} Allowed are {', '.join(names)}."
    return message


def _hint(error: click.UsageError) -> str:
    return f"Try '{error.ctx.command_path} --help'." if error.ctx is not None else "Try 'flashgen --help'."


def main() -> None:
    """Entry point of the script."""
    sys.exit(run(sys.argv[1:]))
