"""The files that make the tests' SLURM cluster: slurm.conf, gres.conf, hosts, and the start of a node."""

import os
import pwd
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Partition:
    """All nodes under a name. A job in a higher tier preempts those in lower ones, by requeue."""

    name: str
    priority_tier: int = 10
    max_time: str = "7-00:00:00"
    default: bool = False


@dataclass(frozen=True)
class Settings:
    """A cluster's shape and limits; all nodes are alike, with two sockets each."""

    nodes: int = 8
    gpus_per_node: int = 8
    gpu_type: str = "h100"  # the type in --gres=gpu:h100:8
    cpus: int = 64
    memory_mb: int = 1_000_000
    features: str = ""  # of every node: a100_80g,ib
    partitions: tuple[Partition, ...] = (
        Partition("gpu", default=True),
        Partition("urgent", priority_tier=100),
        Partition("cpu"),
    )
    max_array_size: int = 1001
    max_job_count: int = 20_000
    cred_expire_s: int = 5  # a requeued job waits so long before it starts again; SLURM allows 5 at the least
    min_job_age_s: int = 86_400  # an ended job is remembered so long
    slurmd_timeout_s: int = 15  # a silent node is down after this (in fact up to twice as long)

    def __post_init__(self) -> None:
        if self.cpus % 2:
            raise ValueError(f"cpus={self.cpus}: a node has two sockets, give an even number")

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]


# Intervals are the least that SLURM allows, so that tests need not wait; MinJobAge keeps ended jobs a day.
SLURM_CONF = """\
ClusterName=testbed
SlurmctldHost={hostname}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire={s.cred_expire_s}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/spool/slurmctld.pid
SlurmdPidFile={root}/spool/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
PlugStackConfig={root}/etc/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1,nohold_on_prolog_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
MaxArraySize={s.max_array_size}
MaxJobCount={s.max_job_count}
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={s.slurmd_timeout_s}
SlurmctldTimeout=10
MessageTimeout=10
InactiveLimit=0
KillWait=5
UnkillableStepTimeout=120
MinJobAge={s.min_job_age_s}
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=node[1-{s.nodes}] NodeHostname=node[1-{s.nodes}] NodeAddr=127.0.0.1 Port=[{node_ports}] \
CPUs={s.cpus} Boards=1 Sockets=2 CoresPerSocket={cores_per_socket} ThreadsPerCore=1 RealMemory={s.memory_mb} \
Gres=gpu:{s.gpu_type}:{s.gpus_per_node}{features} State=UNKNOWN
"""

# Process 1 of a node. `wait` also reaps what its tasks leave behind.
NODE_SCRIPT = """\
#!/bin/bash
set -e
hostname "$1"
mount --bind {root}/etc/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
slurmd -D -N "$1" &
slurmd=$!
trap 'kill -TERM $slurmd' TERM
while kill -0 $slurmd 2>/dev/null; do wait $slurmd || true; done
"""


def write_files(root: Path, settings: Settings, first_port: int) -> None:
    """Write etc/ and dev/ under `root`. slurmctld listens at `first_port`, the nodes at those after it."""
    etc, dev = root / "etc", root / "dev"
    for folder in (etc, dev):
        folder.mkdir(parents=True, exist_ok=True)
    lines = SLURM_CONF.format(
        hostname=socket.gethostname().split(".")[0],
        user=pwd.getpwuid(os.geteuid()).pw_name,
        root=root,
        controller_port=first_port,
        node_ports=f"{first_port + 1}-{first_port + settings.nodes}",
        cores_per_socket=settings.cpus // 2,
        features=f" Features={settings.features}" if settings.features else "",
        s=settings,
    )
    for partition in settings.partitions:
        lines += (
            f"PartitionName={partition.name} Nodes=ALL Default={'YES' if partition.default else 'NO'} "
            f"MaxTime={partition.max_time} DefaultTime=60 PriorityTier={partition.priority_tier} "
            "DefMemPerCPU=1000\n"
        )
    (etc / "slurm.conf").write_text(lines)
    (etc / "plugstack.conf").touch()
    for number in range(settings.gpus_per_node):  # SLURM wants character devices, and follows links to them
        (dev / f"nvidia{number}").symlink_to("/dev/null")
    (etc / "gres.conf").write_text(
        f"AutoDetect=off\nNodeName=node[1-{settings.nodes}] Name=gpu Type={settings.gpu_type} "
        f"File={dev}/nvidia[0-{settings.gpus_per_node - 1}]\n"
    )
    addresses = [f"127.0.1.{number} {name}" for number, name in enumerate(settings.node_names, 1)]
    (etc / "hosts").write_text("\n".join([Path("/etc/hosts").read_text(), *addresses, ""]))
    (etc / "node.sh").write_text(NODE_SCRIPT.format(root=root))
