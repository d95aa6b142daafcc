#!/usr/bin/env bash
# Runs the SuperLink of a fleet: TLS, SuperNodes known by their keys, a database that outlives it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'END'
usage: superlink.sh [-H ADDRESS] [-p PORT] [-w FOLDER] FOLDER [OPTION...]

  FOLDER      has ca.crt, server.pem and server.key, made by certificates.sh
  -H ADDRESS  to listen at (127.0.0.1: this machine only); 0.0.0.0 for all. Read in docs/deployment.md who may then
              submit runs.
  -p PORT     to listen at (8000)
  -w FOLDER   where its database and its working directory are (superlink in the first FOLDER)
  -h          this help

Whatever follows goes to flower-superlink, which has to be in PATH with its companions, as an active virtual
environment has them. Runs have processes of their own (a SuperExec's), so that they go on when the SuperLink alone
ends: it is started again. TERM stops all; USR1 has the SuperLink start anew, with another certificate, say.
END
}

host=127.0.0.1 port=8000 state=''
while getopts 'H:p:w:h' option; do
  case $option in
    H) host=$OPTARG ;;
    p) port=$OPTARG ;;
    w) state=$OPTARG ;;
    h) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
  esac
done
shift $((OPTIND - 1))
(($# > 0)) || { usage >&2 && exit 2; }
for file in ca.crt server.pem server.key; do
  [[ -r $1/$file ]] || { echo "superlink.sh: $1 lacks $file; certificates.sh makes it" >&2 && exit 1; }
done
folder=$(cd "$1" && pwd)
shift
mkdir -p "${state:-$folder/superlink}/empty"
state=$(cd "${state:-$folder/superlink}" && pwd)

# Nothing is told to anyone.
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$state/empty" # modules in a working directory could stand in for the app's
source "$here/keep.sh"

case $host in # as the machine itself reaches it
  0.0.0.0) own=127.0.0.1 ;;
  ::) own='[::1]' ;;
  *:*) own="[$host]" ;;
  *) own=$host ;;
esac
set -m # Ctrl-C is for this script, which ends the others in order
keep 'superlink.sh: the SuperLink' 1 flower-superlink --host "$host" --port "$port" \
  --ssl-ca-certfile "$folder/ca.crt" --ssl-certfile "$folder/server.pem" --ssl-keyfile "$folder/server.key" \
  --enable-supernode-auth --database "$state/state.db" --isolation process \
  --disable-runtime-dependency-installation "$@" &
superlink=$!
# It never installs what an app asks for: the environment that it is started in has to have it.
keep 'superlink.sh: the SuperExec' 1 flower-superexec --runtime-api-address "$own:$port" \
  --root-certificates "$folder/ca.crt" &
superexec=$!

stopped=''
trap stopped=1 TERM INT HUP
trap 'kill -USR1 "$superlink"' USR1
while [[ -z $stopped ]] && kill -0 "$superlink" 2>/dev/null; do wait "$superlink" || true; done
for keeper in "$superexec" "$superlink"; do # a run that ends can still say so
  kill -TERM "$keeper" 2>/dev/null || true
  while kill -0 "$keeper" 2>/dev/null; do wait "$keeper" || true; done
done
