"""Data: examples become tokens, tasks become one seeded mixture, examples become batches. Every token
keeps its task.
"""
