# shellcheck shell=bash
# What the scripts of this folder share. Sourced, never run.
# shellcheck disable=SC2034 # what is set here is used there
set -eEuo pipefail
trap 'echo "cluster: ${BASH_SOURCE[0]##*/}, line $LINENO: $BASH_COMMAND: failed" >&2' ERR

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/sluice
K8S_DIR=$CACHE/k8s-$(cat "$HERE"/build "$HERE"/k8s/go.{mod,sum} "$HERE"/k8s/{.,*}/*.go | sha256sum | cut -c1-16)
K8S=$K8S_DIR/sluice-k8s
CLUSTERS=/var/tmp/sluice-cluster

say() { echo "cluster: $*" >&2; }
die() {
    say "$*"
    exit 1
}

# need COMMAND WHAT_TO_INSTALL
need() { command -v "$1" >/dev/null || die "$1 is missing: install $2"; }

# use_cluster NAME: everything below is about this cluster.
use_cluster() {
    [[ $1 =~ ^[a-z][a-z0-9-]{0,29}$ ]] || die "\"$1\" cannot name a cluster: small letters, digits and dashes, at most 30"
    NAME=$1
    STATE=$CLUSTERS/$NAME
    NODES=0
    SUBNET='' LINK=''
    # NODES, SUBNET and LINK, once the cluster has them.
    # shellcheck source=/dev/null
    if [[ -f $STATE/cluster.env ]]; then source "$STATE/cluster.env"; fi
}

# A cluster that a script of ours must find running.
use_running_cluster() {
    use_cluster "$1"
    if ((NODES == 0)) || ! node_alive 1; then die "no cluster \"$NAME\" is running: start it with tests/cluster/up $NAME"; fi
}

node_address() { echo "$SUBNET.$((9 + $1))"; }

# The process, as this machine numbers it, that holds node N's namespaces.
node_pid() { cat "$STATE/node$1/pid" 2>/dev/null; }

# Process numbers are used again after a crash or a restart of the machine, so the name must be right too.
node_alive() {
    local pid
    pid=$(node_pid "$1") && [[ $(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") == "sluice-node $STATE/node$1 " ]]
}

# in_node N COMMAND...: runs it in all namespaces of node N.
in_node() {
    local pid
    pid=$(node_pid "$1")
    shift
    nsenter --target "$pid" --mount --net --pid --uts --ipc -- "$@"
}

# start_in_node N LOG COMMAND...: the same for a daemon; it becomes a child of the node's process 1. Its log is in
# logs/. The shell's number 9 is the lock on the cluster, which a daemon must not keep. Starting is mostly work for the
# processor, and a fifth less of it if less garbage is collected.
start_in_node() {
    local node=$1 log=$STATE/logs/$2
    shift 2
    # shellcheck disable=SC2016
    GOGC=${GOGC:-400} in_node "$node" bash -c 'setsid "$@" >>"$0" 2>&1 </dev/null 9>&- &' "$log" "$@"
}

# make_pki DIR SUBJECT_ALT_NAMES: an authority, the API server's certificates (its own, and the one that it shows to API servers
# behind it), and the key of service account tokens.
make_pki() {
    local dir=$1 names=$2
    local key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365)
    mkdir -p "$dir"
    {
        openssl req -x509 "${key[@]}" -subj /CN=sluice-test-cluster -keyout "$dir/ca.key" -out "$dir/ca.crt"
        openssl req -x509 "${key[@]}" -subj /CN=kube-apiserver -CA "$dir/ca.crt" -CAkey "$dir/ca.key" \
            -addext "subjectAltName=$names" -addext basicConstraints=critical,CA:FALSE \
            -keyout "$dir/apiserver.key" -out "$dir/apiserver.crt"
        openssl req -x509 "${key[@]}" -subj /CN=front-proxy -CA "$dir/ca.crt" -CAkey "$dir/ca.key" \
            -addext basicConstraints=critical,CA:FALSE -keyout "$dir/front-proxy.key" -out "$dir/front-proxy.crt"
        openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$dir/service-accounts.key"
        openssl pkey -in "$dir/service-accounts.key" -pubout -out "$dir/service-accounts.pub"
    } 2>"$dir/openssl.log" || die "openssl failed: $(cat "$dir/openssl.log")"
}

# etcd for data that nobody will want after the test: quick to write, and quick to elect its only member.
ETCD=(--unsafe-no-fsync --heartbeat-interval 10 --election-timeout 100 --log-level warn)

# apiserver_flags PKI_DIR ETCD_URL: what the full cluster and the fixture have in common, in the array APISERVER.
apiserver_flags() {
    APISERVER=(
        --etcd-servers="$2"
        --tls-cert-file="$1/apiserver.crt" --tls-private-key-file="$1/apiserver.key" --client-ca-file="$1/ca.crt"
        --service-account-key-file="$1/service-accounts.pub"
        --service-account-signing-key-file="$1/service-accounts.key"
        --service-account-issuer=https://kubernetes.default.svc.cluster.local
        --service-cluster-ip-range=10.96.0.0/16
        --token-auth-file="$1/tokens.csv"
        --requestheader-client-ca-file="$1/ca.crt" --requestheader-allowed-names=front-proxy
        --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group
        --requestheader-extra-headers-prefix=X-Remote-Extra-
        --proxy-client-cert-file="$1/front-proxy.crt" --proxy-client-key-file="$1/front-proxy.key"
        --allow-privileged=true
    )
}

# write_kubeconfig FILE SERVER CA_FILE TOKEN
write_kubeconfig() {
    (umask 077 && cat >"$1") <<YAML
apiVersion: v1
kind: Config
current-context: sluice
contexts: [{name: sluice, context: {cluster: sluice, user: sluice}}]
users: [{name: sluice, user: {token: "$4"}}]
clusters:
- name: sluice
  cluster: {server: "$2", certificate-authority-data: "$(base64 -w0 "$3")"}
YAML
}

# Every directory where this machine keeps cgroups: one per controller (v1), one for all (v2), or both.
cgroup_roots() { awk '$3 ~ /^cgroup2?$/ && index($2, "/sys/fs/cgroup") == 1 {print $2}' /proc/mounts; }

# lock_cluster: one script at a time starts or stops a cluster, and knows it as the one before has left it. The directory itself is locked, so nothing stays behind.
lock_cluster() {
    while true; do
        (umask 077 && mkdir -p "$STATE")
        [[ -O $CLUSTERS ]] || die "$CLUSTERS belongs to someone else"
        exec 9<"$STATE"
        flock 9
        # Whoever had it before may have removed the directory.
        if [[ $STATE -ef /proc/self/fd/9 ]]; then break; fi
    done
    use_cluster "$NAME"
}

# stop_cluster: ends whatever there is of it, running or half started, and removes what it kept. Prints what is left,
# and fails, if anything is.
stop_cluster() {
    local node pid ids='' left='' root
    # All of a node's processes, pods too, are in the process namespace of the one that is ended here; the kernel ends
    # them with it, and their mounts and network go with the last of them.
    for node in "$STATE"/node*/; do
        node=${node%/}
        node=${node##*/node}
        node_alive "$node" || continue
        pid=$(node_pid "$node")
        ids+=" $(readlink "/proc/$pid/ns/pid") $(readlink "/proc/$pid/ns/net")"
        kill -KILL "$pid"
        until [[ ! -e /proc/$pid ]]; do sleep 0.02; done
    done
    if [[ -n $LINK ]]; then ip link delete "$LINK" 2>/dev/null || true; fi
    for root in $(cgroup_roots); do
        # The kernel takes a moment to let go of a cgroup whose last process has ended.
        for _ in {1..100}; do
            [[ -d $root/sluice-$NAME ]] || break
            find "$root/sluice-$NAME" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.02
        done
        [[ ! -d $root/sluice-$NAME ]] || left+="cgroup $root/sluice-$NAME"$'\n'
    done
    left+=$(awk -v state="$STATE" 'index($2, state "/") == 1 {print "mount " $2}' /proc/mounts)
    for pid in /proc/[0-9]*; do
        for node in $ids; do
            [[ $(readlink "$pid/ns/${node%%:*}" 2>/dev/null) != "$node" ]] ||
                left+="process ${pid#/proc/} in ${node%%:*} namespace: $(tr '\0' ' ' <"$pid/cmdline")"$'\n'
        done
    done
    if [[ -n $LINK && -e /sys/class/net/$LINK ]]; then left+="network link $LINK"$'\n'; fi
    rm -rf --one-file-system "$STATE"
    rmdir "$CLUSTERS" 2>/dev/null || true
    [[ -z $left ]] || die "left of \"$NAME\":"$'\n'"$left"
}
