"""python -m dashboard [STUDY_OR_PARENT] [--port N] [--headless]"""

import argparse
import sys

from dashboard.launcher import launch
from mobile_bench.errors import Problem


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m dashboard", description="Look at a study, or at all studies of a folder."
    )
    parser.add_argument(
        "study", nargs="?", default="saved_models", help="a study folder or a folder of studies (saved_models)"
    )
    parser.add_argument("--port", type=int, help="8501 or the next free one by default")
    parser.add_argument("--headless", action="store_true", help="open no browser window")
    given = parser.parse_args()
    try:
        launch(given.study, given.port, given.headless)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
