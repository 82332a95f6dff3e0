"""Experiments: a YAML file says what is compared; a run gives raw data, a summary and a report."""
