"""The configuration file of a job."""
