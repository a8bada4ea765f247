"""The commands of `mobile-bench`, one file each. Nothing heavy is imported before a command runs."""
