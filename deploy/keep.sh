# Sourced by superlink.sh and supernode.sh: keep a program running.

# keep NAME SECONDS COMMAND...: run a command, again after SECONDS whenever it ends, until we are told to stop.
# TERM, INT and HUP stop it for good; USR1 has it start anew.
keep() {
  local name=$1 pause=$2 code
  shift 2
  program='' hurry='' stopped=''
  trap 'stopped=1; ask_to_end' TERM INT HUP
  trap ask_to_end USR1
  set -m # each start is a process group of its own: what a killed program leaves behind can be ended with it
  while [[ -z $stopped ]]; do
    "$@" &
    program=$! code=0
    wait "$program" || code=$?
    while kill -0 "$program" 2>/dev/null; do wait "$program" || code=$?; done # a signal to us ends `wait` alone
    [[ -z $hurry ]] || kill -KILL -- "-$hurry" 2>/dev/null || true
    end_group "$program"
    program='' hurry=''
    [[ -z $stopped ]] || break
    echo "$name ended with code $code; again in $pause s" >&2
    sleep "$pause" &
    wait $! || true
  done
}

# Flower's server waits up to a minute for whoever follows a log, and serves nobody meanwhile; INT hurries it.
ask_to_end() {
  [[ -n $program ]] || return 0
  kill -TERM "$program" 2>/dev/null || true
  (sleep 2 && kill -INT "$program" && sleep 10 && kill -KILL "$program") 2>/dev/null &
  hurry=$!
}

# Processes notice within a second that the one they belong to has gone; what is still there then is ended.
end_group() {
  local tries
  for ((tries = 0; tries < 30; tries++)); do
    kill -0 -- "-$1" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL -- "-$1" 2>/dev/null || true
}
