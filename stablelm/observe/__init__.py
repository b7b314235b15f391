"""Metrics, sinks, measurements of layers, profiles."""
