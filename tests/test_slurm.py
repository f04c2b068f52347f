"""The examples on a real SLURM of two virtual nodes on this host. Needs root, slurm-wlm and munge (Debian's packages)."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers import free_port

REPOSITORY = Path(__file__).parents[1]
PATIENCE = 300  # seconds
OPTIONS = "--sequence_length 2 --num_classes 2 --num_time_steps 20 --embedding_size 8 --memory_size 10 --seed 1".split()
WITHOUT_GPUS = {  # what the examples say to change, and node names that no other host knows
    "#SBATCH --gpus-per-node=4\n": "",
    "--cpus-per-task=32": "--cpus-per-task=2",
    "--dist-backend nccl --multiprocessing-distributed": "--dist-backend gloo --processes_per_node 2",
    "--dist-backend nccl": "--dist-backend gloo",
    "--nproc_per_node 4": "--nproc_per_node 2",
    'node0=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)': "node0=127.0.0.1",
}
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
SlurmctldPort={ports[0]}
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=1000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000
PartitionName=main Nodes=n0,n1 Default=YES State=UP
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.name != "posix" or os.geteuid() != 0 or not all(map(shutil.which, ("munged", "slurmctld", "slurmd"))),
        reason="no SLURM here: apt-get install slurm-wlm munge, and run as root",
    ),
]


class Slurm:
    def __init__(self, folder: Path):
        self.folder = folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "OMP_NUM_THREADS": "1"}
        (folder / "state").mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        ports = [free_port() for _ in range(3)]
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=os.uname().nodename, ports=ports))
        (folder / "memorizing_associations_task.py").symlink_to(REPOSITORY / "memorizing_associations_task.py")
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")]
        munge = ["munged", "-F", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge", *files]
        self.daemons = [self._start(munge)]
        time.sleep(1)
        self.daemons += [
            self._start(words) for words in (["slurmctld", "-D"], ["slurmd", "-D", "-Nn0"], ["slurmd", "-D", "-Nn1"])
        ]

    def _start(self, words: list[str]) -> subprocess.Popen:
        log = open(self.folder / "daemons.log", "a")  # noqa: SIM115 (open as long as the daemon lives)
        return subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)

    def run(self, *words: str) -> str:
        return subprocess.run(
            words, env=self.environment, cwd=self.folder, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def submit(self, example: str, *options: str) -> str:
        text = (REPOSITORY / "examples" / example).read_text()
        for words, others in WITHOUT_GPUS.items():
            text = text.replace(words, others)
        (self.folder / example).write_text(text)
        return self.run("sbatch", "--parsable", example, *OPTIONS, *options).strip()

    def log(self, job: str) -> str:
        path = self.folder / f"slurm_{job}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, text: str, state: str = "") -> str:
        """Until the log, or what SLURM says of the job's state, holds a text. Returns the log."""
        deadline = time.monotonic() + PATIENCE
        while text not in (self.run("scontrol", "show", "job", job) if state else self.log(job)):
            assert time.monotonic() < deadline, self.log(job) + self.run("scontrol", "show", "job", job)
            time.sleep(0.2)
        return self.log(job)

    def stop(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=60)
        deadline = time.monotonic() + 90
        while (
            self.run("squeue", "--noheader") and time.monotonic() < deadline
        ):  # daemons that end first leave their jobs behind
            time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(60)


@pytest.fixture(scope="module")
def slurm():
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # the path of a socket must be short
    slurm = Slurm(folder)
    yield slurm
    slurm.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(("example", "number"), [("slurm_multiprocessing.sh", "USR1"), ("slurm_torchrun.sh", "TERM")])
def test_an_interrupted_job_is_queued_again_and_ends_well(slurm, example, number):
    shutil.rmtree(slurm.folder / "runs", ignore_errors=True)
    job = slurm.submit(example, "--epochs", "20")
    slurm.wait(job, "epoch   2/20")
    slurm.run("scancel", f"--signal={number}", job)  # as SLURM does some time before the job's time is over
    slurm.wait(job, "JobState=PENDING Reason=BeginTime", "state")
    time.sleep(10)  # for SLURM to clean up after the first start; it would wait two minutes
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    slurm.wait(job, "JobState=COMPLETED", "state")
    log = slurm.wait(job, "best validation accuracy")
    assert log.count("interrupted in epoch") == log.count("resuming runs/slurm/") == 1
    epochs = [int(epoch) for epoch in re.findall(r"^epoch +(\d+)/20", log, re.M)]
    assert epochs == list(range(1, 21)), "appended to the log, not one epoch lost"


def test_a_usage_error_keeps_its_message_and_status(slurm):
    job = slurm.submit("slurm_multiprocessing.sh", "--epochs", "x")
    slurm.wait(job, "JobState=FAILED", "state")
    assert "error: --epochs: must be a whole number" in slurm.log(job)
    assert "Restarts=0 BatchFlag=1 Reboot=0 ExitCode=2:0" in slurm.run("scontrol", "show", "job", job)
