"""Noise schedules, training objectives and solvers for one token's distribution: pure functions of tensors."""
