"""Counts what a model costs, from what its config builds; and code shared by the studies and measuring tools."""
