"""`observe.profile`: a trace of some steps, a table of where their time goes, and what to try."""
