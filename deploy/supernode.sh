#!/usr/bin/env bash
# Starts a SuperNode of a fleet, and starts it again whenever it ends.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'END'
usage: supernode.sh [-s HOST:PORT] [-p PORT] [-r SECONDS] FOLDER NAME NODE_CONFIG [OPTION...]

  FOLDER       has ca.crt and keys/NAME, made by certificates.sh
  NAME         of this SuperNode's key; the SuperLink has to know it: flwr supernode register keys/NAME.pub
  NODE_CONFIG  what it says of itself, the words that `flexfed profile` prints:
               'partition-id=0 num-partitions=3 memory-bytes=4e9 data-path="/home/me/data"'
  -s HOST:PORT of the SuperLink (127.0.0.1:8000)
  -p PORT      on this machine, for its own processes (9094); each SuperNode of a machine needs its own
  -r SECONDS   to wait before it starts again (5); 0 = do not, for whoever watches over it otherwise
  -h           this help

After a kill or a power cut the SuperLink refuses the key for up to a minute, until it takes the old SuperNode for
dead; so a SuperNode has to be started again and again. Whatever follows goes to flower-supernode, which has to be in
PATH with its companions, as an active virtual environment has them.
END
}

superlink=127.0.0.1:8000 port=9094 pause=5
while getopts 's:p:r:h' option; do
  case $option in
    s) superlink=$OPTARG ;;
    p) port=$OPTARG ;;
    r) pause=$OPTARG ;;
    h) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
  esac
done
shift $((OPTIND - 1))
(($# >= 3)) || { usage >&2 && exit 2; }
[[ $pause =~ ^[0-9]+$ ]] || { echo "supernode.sh: -r needs a number of seconds, got '$pause'" >&2 && exit 2; }
for file in ca.crt "keys/$2"; do
  [[ -r $1/$file ]] || { echo "supernode.sh: $1 lacks $file; certificates.sh makes it" >&2 && exit 1; }
done
folder=$(cd "$1" && pwd)
name=$2
command=(flower-supernode --superlink "$superlink" --root-certificates "$folder/ca.crt"
  --auth-supernode-private-key "$folder/keys/$name" --port "$port" --node-config "$3" "${@:4}")

# Nothing is installed at run time (Flower's default on devices), and nothing is told to anyone.
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if ((pause == 0)); then exec "${command[@]}"; fi

source "$here/keep.sh"
keep "supernode.sh: $name" "$pause" "${command[@]}"
