"""The SLURM template, run on one node by stand-ins for srun and scontrol: same command line, no cluster."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from tests.faults.ranks import steps_done, until
from tests.support import ROOT, corpus_overrides, read_metrics

TEMPLATE = ROOT / "launch/slurm/pretrain.sbatch"
MARK = "TANDEM_TEST_JOB"

SRUN = """#!/usr/bin/env bash
# Drops srun's options and runs the command as task 0 of node 0, its output where --output says.
log=/dev/stdout
while [[ "$1" == --* ]]; do
    if [[ "$1" == --output=* ]]; then log="${1#--output=}"; fi
    shift
done
log="${log//%j/$SLURM_JOB_ID}"
export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
exec "$@" >"${log//%n/0}" 2>&1
"""

SCONTROL = """#!/usr/bin/env bash
if [[ "$1 $2 $3" == "show hostnames node[0]" ]]; then echo localhost; fi
if [[ "$1" == requeue ]]; then echo "$2" >"$RUN_DIR/requeued"; fi
"""
STOPPED = 85


def processes_of(job: str) -> list[psutil.Process]:
    """Processes whose environment carries the mark of this job."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == job and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def node(tmp_path):
    """Environment of a batch script on a one-node allocation; whatever the job leaves behind is killed."""
    write_script(tmp_path / "bin/srun", SRUN)
    write_script(tmp_path / "bin/scontrol", SCONTROL)
    write_script(tmp_path / "venv/bin/activate", f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    job = uuid.uuid4().hex
    torchrun_sets = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in torchrun_sets}
    yield inherited | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        MARK: job,
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "tandem",
        "SLURM_JOB_NODELIST": "node[0]",
        "SLURM_NNODES": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "VENV": str(tmp_path / "venv"),
        "RUN_DIR": str(tmp_path / "run"),
        "RANKS_PER_NODE": "2",
        "RDZV_PORT": str(free_port()),
        "NETWORK_INTERFACE": "lo",
        "OMP_NUM_THREADS": "1",
        "PET_LOCAL_ADDR": "127.0.0.1",  # torchrun's --local-addr
        "CUDA_VISIBLE_DEVICES": "",
    }
    for process in processes_of(job):
        process.kill()


def test_the_template_is_valid_bash():
    subprocess.run(["bash", "-n", str(TEMPLATE)], check=True)


def test_the_template_stops_on_request_is_requeued_and_goes_on(node, corpus):
    """The request is a signal to one rank; the job runs a second time as SLURM would run it."""
    overrides = [
        "+recipe=stage1",
        "scale=toy",
        "train.seq_length=256",
        "train.global_batch_size=4",
        "data.max_patches=64",
        "logger.wandb=disabled",
        "logger.peak_tflops=1",
        *corpus_overrides(corpus),
    ]
    run_dir = Path(node["RUN_DIR"])
    log = run_dir / "logs/4711-node0.log"
    with subprocess.Popen(
        ["bash", str(TEMPLATE), *overrides, "train.steps=100000"],
        env=node,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    ) as job:
        until(lambda: steps_done(run_dir) >= 2, 200, "step 2", alive=lambda: job.poll() is None)
        first_rank(node[MARK]).send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=120)
    assert job.returncode == STOPPED, f"{said}\n{log.read_text()[-4000:]}"
    assert "head node localhost" in said
    assert "stage1 at toy scale on 2 ranks" in log.read_text()
    assert (run_dir / "requeued").read_text() == "4711\n"
    assert processes_of(node[MARK]) == []
    done = steps_done(run_dir)
    command = ["bash", str(TEMPLATE), *overrides, f"train.steps={done + 1}"]
    again = subprocess.run(
        command, env={**node, "SLURM_RESTART_COUNT": "1"}, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, f"{again.stderr}\n{log.read_text()[-4000:]}"
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(done + 1))
    assert (run_dir / f"checkpoints/step-{done + 1:08d}/manifest.json").is_file()
    assert processes_of(node[MARK]) == []


def first_rank(job: str) -> psutil.Process:
    ranks = [process for process in processes_of(job) if "launch/pretrain.py" in process.cmdline()]
    return next(process for process in ranks if process.environ().get("RANK") == "0")
