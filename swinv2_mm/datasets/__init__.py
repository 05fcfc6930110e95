"""Transforms and datasets that the toolboxes lack. Most modules import a toolbox, so a config gives their full path."""
