"""What every stage needs: the job, its progress, its lease."""
