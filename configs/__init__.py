"""Configurations; see common.py for every key."""
