"""Crashes made on purpose: kill -9 at every change of a file, and what a power cut leaves of those not yet synced."""
