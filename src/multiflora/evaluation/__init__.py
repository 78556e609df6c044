"""Evaluation: every task's score by lm-evaluation-harness, for a base model and for the adapted one."""
