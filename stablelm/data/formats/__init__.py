"""Rows of files: JSON lines, plain text, compressed text that can be entered in the middle, parquet, data sets."""
