"""What the command lines share: a problem is one readable block on standard error, never a traceback."""

from __future__ import annotations

import sys

import typer

from mobile_bench.errors import Problem

INTERRUPTED = 130


def run_app(app: typer.Typer) -> None:
    """Run a Typer app and exit: 0 fine, a Problem's exit code (2), 2 for wrong usage, 130 interrupted.

    A command ends with another code by `raise typer.Exit(code)`.
    """
    sys.exit(exit_code_of(app))


def exit_code_of(app: typer.Typer) -> int:
    try:
        code = app(standalone_mode=False)
    except Problem as problem:
        print_problem(problem)
        return problem.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        # A full disk or a folder that is closed to us, where no code nearer to it had more to say.
        print_problem(Problem("The system refused", received=error))
        return Problem.exit_code
    except Exception as error:
        # Typer's usage errors: their class has moved between its versions, these two methods have not.
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()
        return error.exit_code
    if code == INTERRUPTED:  # some versions of Typer turn the interrupt into this code themselves
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def print_problem(problem: Problem) -> None:
    """The parts of a problem, a line each, on standard error."""
    rows = [("error", problem.what), ("received", problem.received), ("allowed", problem.allowed)]
    rows.append(("next", problem.next_step))
    bold = "\033[1;31merror\033[0m" if sys.stderr.isatty() else "error"
    for name, value in rows:
        if value is not None and value != "":
            label = bold + ":" if name == "error" else f"  {name}:"
            print(f"{label} {value}", file=sys.stderr)
