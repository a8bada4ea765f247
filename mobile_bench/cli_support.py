"""What the command lines share: a problem is one readable block on standard error, never a traceback."""

from __future__ import annotations

import os
import sys

import typer

from mobile_bench import interrupts
from mobile_bench.errors import Problem

INTERRUPTED = 130
#: Whoever read the output has gone, as after `| head`. Click and Rich give the same.
NOT_READ = 1


def run_app(app: typer.Typer) -> None:
    """Run a Typer app and exit: 0 fine, a Problem's exit code (2), 2 for wrong usage, 130 interrupted.

    A command ends with another code by `raise typer.Exit(code)`. SIGTERM and SIGHUP are interrupts, too: what Ctrl-C
    cleans up and keeps is cleaned up and kept.
    """
    interrupts.listen()
    if sys.stdout is None:
        print_problem(Problem("Standard output is closed: nobody would see the result", next_step="Leave out >&-"))
        sys.exit(Problem.exit_code)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may hold what no encoding has
            stream.reconfigure(errors="backslashreplace")
    sys.exit(exit_code_of(app))


def exit_code_of(app: typer.Typer) -> int:
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except Problem as problem:
        print_problem(problem, as_json="--json" in sys.argv[1:])
        return problem.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # What is left in the buffer goes nowhere when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOT_READ
    except OSError as error:
        # A full disk or a folder that is closed to us, where no code nearer to it had more to say.
        print_problem(Problem("The system refused", received=error))
        return Problem.exit_code
    except Exception as error:
        # Typer's usage errors: their class has moved between its versions, these two methods have not.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            if "--json" in sys.argv[1:]:
                _print_json(Problem(error.format_message()))
            return error.exit_code
        if not interrupts.asked():
            raise
        code = INTERRUPTED
    if code == INTERRUPTED:  # some versions of Typer turn the interrupt into this code themselves
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def print_problem(problem: Problem, as_json: bool = False) -> None:
    """The parts of a problem, a line each, on standard error; as_json: also as one object on standard output."""
    rows = [("error", problem.what), ("received", problem.received), ("allowed", problem.allowed)]
    rows.append(("next", problem.next_step))
    bold = "\033[1;31merror\033[0m" if sys.stderr.isatty() else "error"
    for name, value in rows:
        if value is not None and value != "":
            label = bold + ":" if name == "error" else f"  {name}:"
            print(f"{label} {visible(str(value))}", file=sys.stderr)
    if as_json:
        _print_json(problem)


def _print_json(problem: Problem) -> None:
    from mobile_bench.files import json_text
    from mobile_bench.records import SCHEMA_VERSION

    parts = {"what": problem.what, "received": problem.received, "allowed": problem.allowed, "next": problem.next_step}
    error = {name: str(value) for name, value in parts.items() if value not in (None, "")}
    print(json_text({"schema_version": SCHEMA_VERSION, "error": error}))


def visible(text: str) -> str:
    """Text whose control characters are written out: a file's name must not move the terminal's cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
