"""Transforms that the toolboxes lack. They extend mmdet, so a config names their file: nothing is imported here."""
