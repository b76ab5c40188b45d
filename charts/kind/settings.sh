# shellcheck shell=bash
# Read by the scripts in this folder; the names in capitals can be set in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

REGISTRY=localhost:5001 # as in charts/firm/ci/kind-values.yaml
VERSION=${VERSION:-$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' firm/__init__.py)}
CLUSTER=${CLUSTER:-firm}     # name of the kind cluster
NAMESPACE=${NAMESPACE:-firm} # where both charts are installed
KFP=${KFP:-1}                # 0: without the KFP backend; the pipeline then runs on this machine and trains on the cluster
DOCKER=${DOCKER:-docker}
BIN=${BIN:-.venv/bin}

# Never the current context of kubectl.
kubectl() { command kubectl --context "kind-$CLUSTER" "$@"; }
helm() { command helm --kube-context "kind-$CLUSTER" "$@"; }

say() { printf '%s\n' "$*" >&2; }
fail() {
  say "error: $*"
  exit 1
}

need() { # need PROGRAM...: stop unless all are there
  for program; do command -v "$program" >/dev/null || fail "$program is missing: install it first"; done
}

need_cluster() {
  kind get clusters 2>/dev/null | grep -qx "$CLUSTER" || fail "there is no kind cluster $CLUSTER: make kind-up"
}

scratch=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$scratch"' EXIT

# forward SERVICE PORT: make a service reachable on this machine until the script ends; sets $forwarded to the local port.
forward() {
  local log=$scratch/$1
  : >"$log"
  keep_forwarding "$1" "$2" "$log" &
  for _ in $(seq 60); do
    forwarded=$(sed -n 's/^Forwarding from 127.0.0.1:\([0-9]*\) .*/\1/p' "$log" | head -n 1)
    [ -z "$forwarded" ] || return 0
    kill -0 $! 2>/dev/null || break
    sleep 0.5
  done
  fail "service $1 cannot be reached: $(tail -n 1 "$log")"
}

# A connection ends with the pod behind its service: make it again, at the same local port.
keep_forwarding() { # SERVICE PORT LOG
  local child port=
  trap 'kill "$child" 2>/dev/null; exit' TERM
  while
    command kubectl --context "kind-$CLUSTER" -n "$NAMESPACE" port-forward "service/$1" "$port:$2" >>"$3" 2>&1 &
    child=$!
    wait "$child" || true
    port=$(sed -n 's/^Forwarding from 127.0.0.1:\([0-9]*\) .*/\1/p' "$3" | head -n 1)
    [ -n "$port" ]
  do sleep 0.5; done
}
