"""Transforms that the toolboxes lack. Some extend mmdet, so a config names their file: nothing is imported here."""
