"""Transforms and data sets that the toolboxes lack. Most extend a toolbox, so a config names their file."""
