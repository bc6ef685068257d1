"""Pipelines: one file a pipeline."""
