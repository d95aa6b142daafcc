#!/usr/bin/env bash
# What the machines of a fleet know each other by: a CA, the SuperLink's certificate, a key for each SuperNode.
set -euo pipefail

usage() {
  cat <<'END'
usage: certificates.sh -o FOLDER [-n NUMBER] [-k NAME]... [-d DAYS] [HOST...]

Makes in FOLDER:
  ca.key, ca.crt           a certificate authority of your own; one that is there already is used again
  server.key, server.pem   the SuperLink's certificate, signed by it; only if a HOST is given
  keys/NAME, keys/NAME.pub a key pair for each SuperNode

  HOST       a name or address that SuperNodes reach the SuperLink by, as they will write it;
             localhost, 127.0.0.1 and ::1 are always in the certificate: the server talks to itself
  -n NUMBER  keys for node0, node1, ... as many as this
  -k NAME    a key for one more SuperNode; may be given again
  -d DAYS    how long the server's certificate is valid (365); the CA's is for ten years
  -h         this help

Nothing is overwritten: for a new server certificate move server.* away and run this again. Private keys are readable
by you alone. ca.key and the keys of others belong on no device: see docs/deployment.md.
END
}

fail() {
  echo "certificates.sh: $*" >&2
  exit 1
}

folder='' days=365 names=()
while getopts 'o:n:k:d:h' option; do
  case $option in
    o) folder=$OPTARG ;;
    n)
      [[ $OPTARG =~ ^[0-9]{1,5}$ ]] || fail "-n needs a number, got '$OPTARG'"
      for ((i = 0; i < 10#$OPTARG; i++)); do names+=("node$i"); done
      ;;
    k) names+=("$OPTARG") ;;
    d) days=$OPTARG ;;
    h) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
  esac
done
shift $((OPTIND - 1))
hosts=("$@")

# Everything is looked at before anything is written.
[[ -n $folder ]] || { usage >&2 && exit 2; }
[[ $days =~ ^[1-9][0-9]{0,4}$ ]] || fail "-d needs a number of days, got '$days'"
for name in ${names[@]+"${names[@]}"}; do
  [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ && $name != *.pub ]] || fail "a SuperNode's name has letters, digits, . _ -; got '$name'"
done
for host in ${hosts[@]+"${hosts[@]}"}; do
  [[ $host =~ ^[A-Za-z0-9*:.-]+$ ]] || fail "a HOST is a name or an address without a port, got '$host'"
done
made=()
for name in ${names[@]+"${names[@]}"}; do made+=("keys/$name" "keys/$name.pub"); done
((${#hosts[@]} == 0)) || made+=(server.key server.pem)
((${#made[@]} > 0)) || fail "nothing to make: give a HOST for the server's certificate, -n or -k for keys of SuperNodes"
for file in "${made[@]}"; do
  [[ ! -e $folder/$file ]] || fail "$folder/$file is there already, and nothing is overwritten; nothing was made"
done
if [[ -e $folder/ca.key && ! -e $folder/ca.crt || ! -e $folder/ca.key && -e $folder/ca.crt ]]; then
  fail "$folder has only one of ca.key and ca.crt; nothing was made"
fi
[[ $(printf '%s\n' "${made[@]}" | sort | uniq -d) == '' ]] || fail "a SuperNode's name is given twice"

umask 077
mkdir -p "$folder/keys"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Subject and extensions stand in files: other versions of openssl read them alike, and none reads its own defaults.
private_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$1" 2>/dev/null; }
settings() { printf '[req]\ndistinguished_name = name\nprompt = no\n[name]\nCN = %s\n[extensions]\n%s\n' "$1" "$2"; }

if [[ ! -e $folder/ca.key ]]; then
  settings 'flexfed fleet CA' $'basicConstraints = critical, CA:TRUE\nkeyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash' >"$work/ca.cnf"
  private_key "$work/ca.key"
  openssl req -x509 -new -sha256 -days 3650 -key "$work/ca.key" -config "$work/ca.cnf" -extensions extensions \
    -out "$work/ca.crt"
  mv "$work/ca.key" "$work/ca.crt" "$folder/"
  chmod 644 "$folder/ca.crt"
fi

if ((${#hosts[@]} > 0)); then
  names_of_server='DNS:localhost, IP:127.0.0.1, IP:::1'
  for host in "${hosts[@]}"; do
    if [[ $host == *:* || $host =~ ^[0-9.]+$ ]]; then kind=IP; else kind=DNS; fi
    names_of_server+=", $kind:$host"
  done
  settings 'flexfed SuperLink' "subjectAltName = $names_of_server"$'\nbasicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature\nextendedKeyUsage = serverAuth
subjectKeyIdentifier = hash\nauthorityKeyIdentifier = keyid' >"$work/server.cnf"
  private_key "$work/server.key"
  openssl req -new -sha256 -key "$work/server.key" -config "$work/server.cnf" -out "$work/server.csr"
  openssl x509 -req -sha256 -days "$days" -in "$work/server.csr" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" \
    -set_serial "0x$(openssl rand -hex 8)" -extfile "$work/server.cnf" -extensions extensions \
    -out "$work/server.pem" 2>/dev/null || fail "openssl would not sign a certificate for ${hosts[*]}"
  mv "$work/server.key" "$work/server.pem" "$folder/"
  chmod 644 "$folder/server.pem"
fi

for name in ${names[@]+"${names[@]}"}; do
  ssh-keygen -q -t ecdsa -b 384 -N '' -C "$name" -f "$folder/keys/$name"
  chmod 644 "$folder/keys/$name.pub"
done

echo "made in $folder: ${made[*]}"
