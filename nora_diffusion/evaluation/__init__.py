"""Metrics and reports. Every score carries the name of the network that measured it."""
