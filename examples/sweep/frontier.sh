#!/bin/sh
# A frontier over several machines: five epsilons and none, three seeds each, on the public default data.
#     examples/sweep/frontier.sh slurm|ray|local FOLDER [SETTING...]
# FOLDER must be on a disk that all machines see. `local` is Slurm's way on this machine alone, to try it.
set -eu
how=$1 folder=$2
shift 2
case $how in
slurm) launcher="hydra/launcher=submitit_slurm hydra.launcher.timeout_min=120 hydra.launcher.cpus_per_task=2 hydra.launcher.mem_gb=8" ;;
local) launcher="hydra/launcher=submitit_local hydra.launcher.timeout_min=120" ;;
ray) launcher="hydra/launcher=ray" ;;
*) echo "frontier.sh: name slurm, ray or local, not '$how'." >&2 && exit 2 ;;
esac
# shellcheck disable=SC2086
fedtune run experiment=privacy_frontier hydra.sweep.dir="$folder" $launcher "$@"
fedtune report "$folder"
