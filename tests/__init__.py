"""Tests of cakefs: behaviour through the public surface."""
