"""The report of a run: one HTML file that needs nothing else."""

from qpd.lab.experiment.report.page import write

__all__ = ["write"]
