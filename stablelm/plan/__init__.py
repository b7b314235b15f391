"""Memory, communication and time of a run that is not started."""
