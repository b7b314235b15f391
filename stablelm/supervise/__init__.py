"""Heartbeats, hangs, shutdown, requeueing, injected faults."""
