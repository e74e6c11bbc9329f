"""Ordinary files of what models show, written outside the store."""
