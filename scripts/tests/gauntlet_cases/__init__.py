"""Rounds that test gauntlet.py."""
