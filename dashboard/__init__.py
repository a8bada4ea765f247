"""The pages that show a study: python -m dashboard STUDY. Reads a study folder, never imports TensorFlow."""

from dashboard.launcher import launch

__all__ = ["launch"]
