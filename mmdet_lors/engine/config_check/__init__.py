"""Checks every part of a config against what is built from it, before a run reads data or writes anything."""

from .check import check_config
from .operators import check_operators
from .top_level import check_options

__all__ = ["check_config", "check_operators", "check_options"]
