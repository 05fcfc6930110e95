"""Trainings whose states or parameters are split among processes: ZeRO-1, FSDP, DeepSpeed. Needs no toolbox."""

from ..version import check_dependencies

check_dependencies()
