"""Experiment tracking, model bundles and promotion (MLflow)."""
