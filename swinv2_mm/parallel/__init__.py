"""Trainings whose states or parameters are split among processes: ZeRO-1, FSDP, DeepSpeed. Needs no toolbox."""

from ..version import HAS_OPENMMLAB, check_dependencies

if not HAS_OPENMMLAB:
    check_dependencies()
