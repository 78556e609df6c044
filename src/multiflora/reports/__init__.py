"""The report: what a run or a comparison found, as one page that needs nothing else."""
