"""Tests for a kernel that has netem, which this tier does not run by itself: docs/development.md tells how."""
