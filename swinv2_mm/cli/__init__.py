"""What only the command line tools use: launching, checks before the start, the memory model. Needs no toolbox."""
