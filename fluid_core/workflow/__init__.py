"""Stages that know whether their work is done, the workflow that runs them in order, and its report."""
