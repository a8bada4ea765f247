"""`python -m mobile_bench` is `mobile-bench`."""

from mobile_bench.cli import main

if __name__ == "__main__":
    main()
