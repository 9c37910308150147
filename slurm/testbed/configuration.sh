# shellcheck shell=bash disable=SC2154  # dir, subnet, instance: set by who sources this
# Sourced by testbed: writes slurm.conf, gres.conf, slurmdbd.conf and what the nodes need, into $dir/etc.
# What is set against the defaults, and why, was found with SLURM 22.05 (Debian 12).

write_configuration() {
    local nodes=${TESTBED_NODES:-2} plugins
    plugins=$(dirname "$(find /usr/lib -name select_cons_tres.so -path '*slurm*' -print -quit)")
    (umask 077 && head -c 1024 /dev/urandom >"$dir/etc/munge.key")
    write_hosts
    write_gpus >"$dir/etc/gres.conf"
    {
        write_controller
        write_scheduling
        write_accounting
        write_nodes
        printf '%s\n' "${TESTBED_SLURM_CONF:-}"
    } >"$dir/etc/slurm.conf"
    (umask 077 && write_slurmdbd >"$dir/etc/slurmdbd.conf")
}

write_hosts() {
    local node
    {
        echo "127.0.0.1 localhost"
        echo "$subnet.1 $(hostname) $(hostname -s)"
        for ((node = 0; node < nodes; node++)); do echo "$subnet.$((10 + node)) node$node"; done
    } >"$dir/etc/hosts"
    # No DNS inside a node, which reaches none: a reverse lookup costs each torch process 10 s.
    sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$dir/etc/nsswitch.conf"
}

# gpus_of NODE: TYPE:COUNT, or 0
gpus_of() {
    local all
    read -ra all <<<"${TESTBED_GPUS:-a100:4}"
    echo "${all[$(($1 % ${#all[@]}))]}"
}

# SLURM wants a character device for each GPU, with its number at the end of the name: these are null devices.
write_gpus() {
    local node gpu gpus count most=0
    echo "AutoDetect=off"
    for ((node = 0; node < nodes; node++)); do
        gpus=$(gpus_of "$node") count=${gpus##*:}
        [ "$gpus" != 0 ] || continue
        echo "NodeName=node$node Name=gpu Type=${gpus%:*} File=$dir/dev/nvidia[0-$((count - 1))]"
        [ "$count" -le "$most" ] || most=$count
    done
    for ((gpu = 0; gpu < most; gpu++)); do mknod -m 666 "$dir/dev/nvidia$gpu" c 1 3; done
}

write_controller() {
    cat <<END
ClusterName=testbed
SlurmctldHost=$(hostname -s)($subnet.1)
SlurmctldPort=$((16800 + instance))
SlurmdPort=$((16900 + instance))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits cred_expire + 1 s; SLURM's default is 120, its least is 5, which a busy machine misses.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=12
PluginDir=$plugins
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
DebugFlags=NO_CONF_HASH
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
# Believe the cores and the memory written below, not the machine.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=${TESTBED_NODE_TIMEOUT_S:-10}
KillWait=${TESTBED_KILL_WAIT_S:-5}
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=3
CompleteWait=0
UnkillableStepTimeout=30
END
}

write_scheduling() {
    cat <<END
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=1
# Refuse at once what no partition can ever run, rather than let it wait.
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PriorityType=priority/multifactor
PriorityWeightPartition=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END
}

write_accounting() {
    if [ "${TESTBED_ACCOUNTING:-1}" = 0 ]; then
        echo "AccountingStorageType=accounting_storage/none"
        return
    fi
    cat <<END
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$subnet.1
AccountingStoragePort=$((17000 + instance))
# With munge this is the socket towards slurmdbd; AuthInfo is not used there.
AccountingStoragePass=$dir/run/munge.socket
AccountingStorageTRES=gres/gpu
END
}

write_slurmdbd() {
    cat <<END
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.socket
DbdHost=$(hostname -s)
DbdAddr=$subnet.1
DbdPort=$((17000 + instance))
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((13306 + instance))
StorageUser=root
StorageLoc=slurm_acct
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
PluginDir=$plugins
CommitDelay=1
END
}

write_nodes() {
    local node gpus
    for ((node = 0; node < nodes; node++)); do
        gpus=$(gpus_of "$node")
        echo "NodeName=node$node NodeAddr=$subnet.$((10 + node)) CPUs=${TESTBED_CPUS:-8}" \
            "RealMemory=${TESTBED_MEMORY_MB:-8000} $([ "$gpus" = 0 ] || echo "Gres=gpu:$gpus") State=UNKNOWN"
    done
    # A job of the partition urgent takes the nodes of one of main, which is requeued.
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=2-00:00:00 PriorityTier=10 GraceTime=${TESTBED_GRACE_S:-0}"
    echo "PartitionName=urgent Nodes=ALL MaxTime=01:00:00 PriorityTier=100 PreemptMode=OFF"
}
